"""`ppo-ray view`: a page that shows runs, served to this machine alone.

Generated text is data: the page sets it as text, and its content security policy forbids scripts and requests of
others. Every request for data must carry a token, which only the address that is printed has.
"""

import hmac
import importlib.resources
import ipaddress
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ppo_ray import __version__
from ppo_ray.config import is_loopback
from ppo_ray.errors import InputError, first_line
from ppo_ray.run.record import PANELS
from ppo_ray.view.sample import QUANTILES, SPREADS, count_bins, count_workers, open_sample, read_values
from ppo_ray.view.shown import LONGEST_PAGE, View, read_query

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
except ModuleNotFoundError as missing:
    raise InputError(f"view needs {missing.name}: pip install 'ppo-ray[serve]'") from missing

_INDEX_S = 0.15  # seconds that an answer may spend on reading trajectories that are new
_MOST_TOKENS, _MOST_BINS = 4096, 120
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer."""


def make_app(views: Sequence[View], token: str, host: str = "127.0.0.1") -> FastAPI:
    """Return the application that serves the page and the data of some runs, for reading only.

    Args:
        views: the runs; a request names one by its place among them.
        token: that every request for data must have.
        host: that it listens at.
    """
    app = FastAPI(title="ppo-ray view", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").encode()
        if request.method not in ("GET", "HEAD"):
            response = Response("this server is read only", 405)
        elif not is_expected_host(request.headers.get("host", ""), host):
            response = Response("the Host header names another machine", 421)
        elif request.url.path.startswith("/api/") and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            response = _answer(
                {"detail": "the token is missing or wrong: open the address that ppo-ray view printed"}, 401
            )
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(InputError)
    async def refuse(request: Request, error: InputError) -> Response:
        return _answer({"detail": first_line(error)}, 400)

    @app.exception_handler(OSError)
    @app.exception_handler(pa.ArrowException)
    async def report(request: Request, error: Exception) -> Response:
        return _answer({"detail": f"a file cannot be read: {first_line(error)}"}, 404)

    def find(run: int) -> View:
        if not 0 <= run < len(views):
            raise HTTPException(404, f"no run {run}: there are {len(views)}")
        return views[run]

    @app.get("/")
    def page() -> Response:
        return _read_static("index.html")

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        return _read_static(name)

    @app.get("/api/runs")
    def runs() -> Response:
        panels = [vars(panel) for panel in PANELS]
        known = {"version": __version__, "panels": panels, "spreads": list(SPREADS)}
        return _answer({**known, "runs": [view.summarize() for view in views]})

    @app.get("/api/runs/{run}")
    def measure(run: int) -> Response:
        return _answer(find(run).measure())

    @app.get("/api/runs/{run}/samples")
    def samples(run: int, request: Request) -> Response:
        view = find(run)
        is_whole = view.index.refresh(_INDEX_S)
        page = view.index.search(read_query(request.query_params))
        read, there = view.index.progress
        state = {"is_whole": is_whole, "num_read": read, "num_files": there, "skipped": view.index.skipped}
        return _answer({**state, **view.index.describe(), "num_matches": page.num_matches, "rows": page.rows})

    @app.get("/api/runs/{run}/samples/{step}/{row}")
    def sample(run: int, step: int, row: int, offset: int = 0, limit: int = 1024) -> Response:
        view = find(run)
        offset, limit = max(offset, 0), min(max(limit, 1), _MOST_TOKENS)
        opened = open_sample(view.folder, step, row, view.texts, offset, limit)
        alike = view.index.find_prompt(opened["prompt"], LONGEST_PAGE)
        return _answer({**opened, "alike": alike.rows, "num_alike": alike.num_matches})

    @app.get("/api/runs/{run}/spread/{name}")
    def spread(run: int, name: str) -> Response:
        if name not in SPREADS:
            raise InputError(f"{name}: no such figure; there are {', '.join(SPREADS)}")
        view, found, notes = find(run), [], []
        for step in view.folder.list_steps():
            try:
                values = view.spreads.quantiles(step, name)
            except (OSError, pa.ArrowException, InputError) as error:
                notes.append(f"step {step}: {first_line(error)}")
                continue
            found.append({"step": step, "quantiles": values})
        return _answer({"quantiles": QUANTILES, "steps": found, "notes": notes})

    @app.get("/api/runs/{run}/spread/{name}/{step}")
    def histogram(
        run: int, name: str, step: int, bins: int = 40, low: float | None = None, high: float | None = None
    ) -> Response:
        values = read_values(find(run).folder, step, name)
        edges, counts = count_bins(values, min(max(bins, 2), _MOST_BINS), low, high)
        return _answer({"edges": edges, "counts": counts, "num_values": int(values.size)})

    @app.get("/api/runs/{run}/workers/{step}")
    def workers(run: int, step: int) -> Response:
        view = find(run)
        actors = [{"name": name, **figures} for name, figures in sorted(view.actors.get(step, {}).items())]
        try:
            return _answer({"workers": count_workers(view.folder, step), "actors": actors, "notes": []})
        except (OSError, pa.ArrowException, InputError) as error:
            return _answer({"workers": [], "actors": actors, "notes": [first_line(error)]})

    @app.get("/api/runs/{run}/memory")
    def memory(run: int) -> Response:
        return _answer(find(run).trace_memory())

    return app


def is_expected_host(header: str, host: str) -> bool:
    """Say whether a Host header names this machine: another name may be a page's that was led here (DNS rebinding).

    A server that the network reaches is known by its addresses and by the machine's own names as well.
    """
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    name = name.removeprefix("[").removesuffix("]").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        names = {"localhost"} if is_loopback(host) else {"localhost", host, socket.gethostname(), socket.getfqdn()}
        return name in {known.lower() for known in names}
    return address.is_loopback or not is_loopback(host)


def _read_static(name: str) -> Response:
    """Return a file of the page, by its name among them."""
    folder = importlib.resources.files("ppo_ray.view") / "static"
    for file in (*folder.iterdir(), *(folder / "vendor").iterdir()):
        kind = _TYPES.get(Path(file.name).suffix)
        if file.name == name and kind:
            return Response(file.read_bytes(), media_type=kind)
    raise HTTPException(404, "no such file")


def _answer(content: Mapping[str, Any], code: int = 200) -> Response:
    text = json.dumps(content, allow_nan=False, default=str)
    # unpaired surrogates, which no UTF-8 can have, stay escaped
    return Response(text, code, media_type="application/json")


def serve(paths: Sequence[Path], host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve the page of some runs until a signal ends it.

    Args:
        paths: folders of runs.
        host: address or name to listen at.
        port: to listen at; 0: a free one.
        say: is called with each line for people.

    Raises:
        InputError: a folder holds no run, or nothing can listen at that address.
    """
    views = [View(path) for path in paths]
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host={host} --port={port}: cannot listen there: {error}") from error
    with listener:
        token = secrets.token_urlsafe(24)
        if not is_loopback(host):
            say(
                f"warning: --host={host}: nothing is encrypted; whoever reads the network, or has the address below, "
                "can read prompts, responses and options of these runs. A tunnel is safer: ssh -L"
            )
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{listener.getsockname()[1]}/#token={token}")
        say("open this address in a browser; end the server with Ctrl-C")
        settings = uvicorn.Config(
            make_app(views, token, host), log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(settings).run(sockets=[listener])
