"""Following a job's log. Nothing is started: the head is played."""

import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from ppo_ray.jobs import server as jobs


class Head:
    """Sends a log for longer than the patience, breaks the connection, and does not answer the first question after."""

    def __init__(self) -> None:
        self.asked = 0

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        if self.asked:
            return
        for number in range(8):
            time.sleep(0.1)
            yield f"line {number}\n"
        raise ConnectionError("reset")

    def get_job_info(self, name: str) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise ConnectionError("refused")
        return SimpleNamespace(status=JobStatus.SUCCEEDED, driver_exit_code=0, message="")

    def get_job_logs(self, name: str) -> str:
        return "".join(f"line {number}\n" for number in range(8))


def test_patience_begins_with_the_heads_last_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.5)
    server, written = jobs.JobServer.__new__(jobs.JobServer), list[str]()
    server._client = Head()
    assert server.follow("films", written.append).exit_code == 0
    assert "".join(written) == "".join(f"line {number}\n" for number in range(8))
