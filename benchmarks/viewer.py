"""Seconds and memory of `ppo-ray view` with 100,000 trajectories of 64 tokens: python -m benchmarks.viewer.

The limits: the page in 1 s, a filter in 0.3 s, 500 MB. Trajectories are random.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import requests

from ppo_ray import trajectory

STEPS, ROWS, TOKENS, ACTORS = 400, 250, 64, 16
PAGE_S, FILTER_S, MEMORY_MB = 1.0, 0.3, 500
REPEATS = 5
WORDS = ("the", "a", "film", "was", "great", "bad", "really", "good", "watch", "it", "of", "plot", "never", "love")
FILTERS = {
    "newest step first": {"sort": "step", "order": "desc"},
    "sorted by KL": {"sort": "kl", "order": "desc"},
    "score at least 1": {"min.score": "1", "sort": "score", "order": "desc"},
    "one worker, one step range": {"worker": "rollout-1", "min.step": "100", "max.step": "200"},
    "text": {"text": "love great"},
    "pattern": {"text": "love (great|film) .*never", "pattern": "1"},
}


def make_run(folder: Path) -> None:
    """Write a run's trajectories and metrics."""
    (folder / "trajectories").mkdir()
    rng = np.random.default_rng(0)
    offsets = pa.array(np.arange(ROWS + 1, dtype=np.int32) * TOKENS)

    def draw() -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(rng.normal(size=ROWS * TOKENS).astype(np.float32)))

    for step in range(STEPS):
        ids = pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 50_000, ROWS * TOKENS).astype(np.int32)))
        columns = {
            "sample_id": np.arange(ROWS) + step * ROWS,
            "step": np.full(ROWS, step),
            "policy_version": np.full(ROWS, step),
            "worker": [f"rollout-{row % 2}" for row in range(ROWS)],
            "seed": rng.integers(0, 2**60, ROWS),
            "prompt": [f"prompt {row % 64} of the films" for row in range(ROWS)],
            "response": [" ".join(rng.choice(WORDS, TOKENS)) for _ in range(ROWS)],
            "prompt_ids": [[1, 2, 3, 4]] * ROWS,
            "response_ids": ids,
            "finish_reason": rng.choice(["stop", "length"], ROWS),
            "score": rng.normal(size=ROWS).astype(np.float32),
            "truncated": [False] * ROWS,
            **{name: draw() for name in ("rollout_logprobs", *trajectory.LEARNED_FIELDS)},
        }
        table = pa.table([columns[name] for name in trajectory.LEARNED_SCHEMA.names], trajectory.LEARNED_SCHEMA.names)
        pq.write_table(table.cast(trajectory.LEARNED_SCHEMA), folder / "trajectories" / f"step-{step:05d}.parquet")
    metrics = {f"group/metric_{number}": 1.0 for number in range(60)}
    lines = (json.dumps({"step": step, "score/mean": step / STEPS, **metrics}) for step in range(STEPS))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    memory = {
        "host": "node",
        "time/generate_s": 1.0,
        "memory/rollout_gib": 2.5,
        "memory/rollout_gpu_reserved_gib": 60.0,
    }
    actors = {f"rollout-{number}": memory for number in range(ACTORS)}
    rows = (json.dumps({"step": step, "actors": actors}) for step in range(STEPS))
    (folder / "actors.jsonl").write_text("\n".join(rows) + "\n")


def measure(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yield what was measured, its value, and its limit; a limit that is infinite is none."""
    began = time.monotonic()
    command = [sys.executable, "-m", "ppo_ray", "view", str(folder)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found = re.search(r"(http://\S+)/#token=(\S+)", server.stderr.readline())
        assert found is not None
        yield "start of the server, s", time.monotonic() - began, np.inf
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {found[2]}"

        def ask(path: str, **query: str) -> tuple[float, requests.Response]:
            asked = time.monotonic()
            answer = session.get(f"{found[1]}{path}", params=query, timeout=60)
            answer.raise_for_status()
            return time.monotonic() - asked, answer

        yield (
            "page and its curves, first time, s",
            sum(ask(path)[0] for path in ("/", "/api/runs", "/api/runs/0")),
            PAGE_S,
        )
        seconds, answer = ask("/api/runs/0/samples")
        yield "table of samples, first answer, s", seconds, PAGE_S
        asked = time.monotonic()
        while not answer.json()["is_whole"]:
            answer = ask("/api/runs/0/samples")[1]
        assert answer.json()["num_rows"] == STEPS * ROWS
        yield "until all steps are read, s", time.monotonic() - asked, np.inf
        for name, query in FILTERS.items():
            yield (
                f"{name}, s",
                float(np.median([ask("/api/runs/0/samples", **query)[0] for _ in range(REPEATS)])),
                FILTER_S,
            )
        yield (
            "actors of a step, and the memory of all, s",
            sum(ask(f"/api/runs/0/{path}")[0] for path in ("workers/7", "memory")),
            PAGE_S,
        )
        opened = [ask(f"/api/runs/0/samples/{step}/7")[0] for step in range(REPEATS)]
        yield "one sample, with the same prompt at all steps, s", float(np.median(opened)), PAGE_S
        yield "memory of the server, MB", psutil.Process(server.pid).memory_info().rss / 1e6, MEMORY_MB
    finally:
        server.terminate()
        server.wait(60)


def main() -> int:
    """Print a line for each figure; 1 if one is beyond its limit."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        beyond = 0
        for name, value, limit in measure(Path(folder)):
            beyond += value > limit
            print(f"{name:55s} {value:8.3f}" + (f"   limit {limit:g}" if np.isfinite(limit) else ""), flush=True)
    return int(beyond > 0)


if __name__ == "__main__":
    sys.exit(main())
