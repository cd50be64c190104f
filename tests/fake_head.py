"""A job server that answers as Ray's does, in this process: what a client does with it needs no Ray."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeHead:
    """What it says, and what it was told."""

    token: str | None = None
    """That requests must bring; None: any."""
    cpus: float = 8.0
    log: str = ""
    streams: list[str] = field(default_factory=list)
    """What each stream of the log holds before it breaks off; afterwards, all of it."""
    states: list[dict[str, Any]] = field(default_factory=lambda: [{"status": "SUCCEEDED", "driver_exit_code": 0}])
    """Of the job, one a question; the last one stays."""
    names: tuple[str, ...] = ()
    """Of earlier jobs."""
    list_failure: str = ""
    """What it does instead of listing them: `error` (it answers HTTP 500) or `hang up`."""
    packages: list[bytes] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    refusal: str = ""
    """Of a job that is submitted, as Ray's server words it."""
    silent: bool = False
    """Whether a stream that is to break off hangs instead."""
    address: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._authenticate], client_max_size=100 << 20)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/v0/nodes", self._nodes),
                web.get("/api/packages/{protocol}/{name}", self._package),
                web.put("/api/packages/{protocol}/{name}", self._upload),
                web.get("/api/jobs/", self._jobs),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{name}", self._job),
                web.get("/api/jobs/{name}/logs", self._logs),
                web.get("/api/jobs/{name}/logs/tail", self._tail),
            ]
        )
        return app

    @web.middleware
    async def _authenticate(self, request, handler):
        given = request.headers.get("Authorization")
        if self.token and not given:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token and given != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def _version(self, request):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})

    async def _nodes(self, request):
        resources = {"CPU": self.cpus, "memory": 1.0}
        node = {"node_id": "1", "node_ip": "1", "is_head_node": True, "state": "ALIVE", "state_message": None}
        node |= {"node_name": "1", "resources_total": resources, "labels": {}, "start_time_ms": 1, "end_time_ms": 1}
        result = {"total": 1, "num_after_truncation": 1, "num_filtered": 1, "result": [node]}
        result |= {"partial_failure_warning": "", "warnings": None}
        return web.json_response({"result": True, "msg": "", "data": {"result": result}})

    async def _package(self, request):
        return web.Response(status=404)

    async def _upload(self, request):
        self.packages.append(await request.read())
        return web.Response()

    def _details(self, name, **state):
        return {"type": "SUBMISSION", "submission_id": name, "entrypoint": "x", "status": "STOPPED", **state}

    async def _jobs(self, request):
        if self.list_failure == "error":
            return web.Response(status=500, text="Traceback (most recent call last):\n  File x\nValueError: no store")
        if self.list_failure == "hang up":
            request.transport.close()
        return web.json_response([self._details(name) for name in self.names])

    async def _submit(self, request):
        self.submitted.append(await request.json())
        if self.refusal:
            return web.Response(status=500, text=self.refusal)
        name = self.submitted[-1]["submission_id"]
        return web.json_response({"job_id": name, "submission_id": name})

    async def _job(self, request):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return web.json_response(self._details(request.match_info["name"], **state))

    async def _logs(self, request):
        return web.json_response({"logs": self.log})

    async def _tail(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = self.streams.pop(0) if self.streams else self.log
        for start in range(0, len(text), 7):
            await socket.send_str(text[start : start + 7])
        if self.silent:
            await self.done.wait()
        return socket


@contextlib.contextmanager
def fake_head(**answers: Any) -> Iterator[FakeHead]:
    """Serve on a free port of this machine from a thread."""
    head, ready = FakeHead(**answers), threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(head.application(), shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        head.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await head.done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield head
    finally:
        loop.call_soon_threadsafe(head.done.set)
        thread.join(10)
