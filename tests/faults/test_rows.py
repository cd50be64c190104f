"""The columns that go with each prompt, when workers are killed under way: every answer stays with its own question."""

import json
import re
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import CommandLine, events, lines, wait_for_steps

pytestmark = pytest.mark.slow

NUM_ROWS, BATCH, STEPS = 3348, 2048, 5  # 10,240 rows: three epochs and some of the fourth
REWARDS = """
async def score_number(response: str, number: int, finish_reason: str) -> float:
    return float(number)


def score_length(response_ids: list[list[int]], messages: list[list[dict]]) -> list[float | None]:
    return [None if len(chat[1]["content"]) % 7 == 0 else len(ids) for ids, chat in zip(response_ids, messages)]
"""


@pytest.mark.timeout(600)
def test_every_row_keeps_its_own_columns(ppo_ray: CommandLine, tmp_path: Path) -> None:
    ppo_ray.put_on_path("rewards_of_rows.py", REWARDS)
    chats = [[{"role": "user", "content": f"count to {n}"}] for n in range(NUM_ROWS)]
    rows = {
        "messages": chats,
        "number": [n * n for n in range(NUM_ROWS)],
        "note": [{"of": [str(n)]} for n in range(NUM_ROWS)],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    parts = "[{name: number, function: 'rewards_of_rows:score_number', weight: 0.5}, "
    parts += "{name: length, function: 'rewards_of_rows:score_length', weight: -2}]"
    options = (
        *("rollout.engine=hf", f"steps={STEPS}", f"rollout.batch_size={BATCH}", "reward.path=null", "reward.workers=2"),
        *(f"prompts.path={tmp_path / 'rows.parquet'}", "prompts.column=messages", "prompts.keep=[number, note]"),
        *("prompts.min_tokens=null", "prompts.max_tokens=40", "prompts.min_chars=0", "prompts.system=be brief"),
        *(f"prompts.chat_template={template}", f"reward.parts={parts}", "ppo.learning_rate=1e-5"),
        *("rollout.max_response_tokens=8", "ppo.minibatch_size=1024", "ppo.epochs=1"),
        *("evaluation.num_prompts=8", "evaluation.every_steps=2", "evaluation.samples_per_prompt=2"),
    )
    process = ppo_ray.start("train", str(ppo_ray.config), *options)
    wait_for_steps(process, tmp_path / "run", 1)
    for kind in ("rollout", "reward"):
        ppo_ray.wait_for_workers(kind)[-1][1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors

    run = tmp_path / "run"
    assert {event["worker"].partition("-")[0] for event in events(run)} >= {"rollout", "reward"}
    numbers = []
    for step in range(STEPS):
        for row in pq.read_table(run / "trajectories" / f"step-{step:05d}.parquet").to_pylist():
            system, user = json.loads(row["messages"])
            number = int(re.findall(r"\d+", user["content"])[0])
            numbers.append(number)
            assert system["content"] == "be brief" and f"count to {number}" in row["prompt"]
            assert row["row"] == {"number": number**2, "note": {"of": [str(number)]}}
            length = None if len(user["content"]) % 7 == 0 else float(len(row["response_ids"]))
            assert row["parts"] == {"number": number**2, "length": length}
            assert row["score"] == pytest.approx(0.5 * number**2 - 2 * (length or 0), rel=1e-6)
    assert len(numbers) == STEPS * BATCH and len(set(numbers)) == NUM_ROWS - 8
    assert [step for step, line in enumerate(lines(run)) if "eval/score_mean" in line] == [0, 2, 4]
