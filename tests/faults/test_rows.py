"""The columns that go with each prompt, when workers are killed under way: every answer stays with its own question."""

import json
import re
import signal
import statistics
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
    table = pa.table(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    pq.write_table(table.take(list(range(0, NUM_ROWS, 2))), tmp_path / "even.parquet")
    odd = table.take(list(range(1, NUM_ROWS, 2))).to_pylist()
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    sources = f"[{{name: even, path: {tmp_path / 'even.parquet'}, weight: 0.3}}, "
    sources += f"{{name: odd, path: {tmp_path / 'odd.jsonl'}, weight: 0.1}}]"
    sets = f"{{hard: {{path: {tmp_path / 'rows.parquet'}, num_prompts: 5}}}}"
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    parts = "[{name: number, function: 'rewards_of_rows:score_number', weight: 0.5}, "
    parts += "{name: length, function: 'rewards_of_rows:score_length', weight: -2}]"
    options = (
        *("rollout.engine=hf", f"steps={STEPS}", f"rollout.batch_size={BATCH}", "reward.path=null", "reward.workers=2"),
        *("prompts.path=null", f"prompts.sources={sources}", "prompts.column=messages"),
        *("prompts.keep=[number, source, note]", f"evaluation.sets={sets}"),
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
    numbers: list[int] = []
    scores: list[float] = []
    for step in range(STEPS):
        for row in pq.read_table(run / "trajectories" / f"step-{step:05d}.parquet").to_pylist():
            system, user = json.loads(row["messages"])
            number = int(re.findall(r"\d+", user["content"])[0])
            numbers.append(number)
            assert system["content"] == "be brief" and f"count to {number}" in row["prompt"]
            source = "odd" if number % 2 else "even"
            assert row["row"] == {"number": number**2, "source": source, "note": {"of": [str(number)]}}
            length = None if len(user["content"]) % 7 == 0 else float(len(row["response_ids"]))
            assert row["parts"] == {"number": number**2, "length": length}
            scores.append(row["score"])
            assert row["score"] == pytest.approx(0.5 * number**2 - 2 * (length or 0), rel=1e-6)
        assert sum(number % 2 for number in numbers[-BATCH:]) == BATCH // 4
        odd_mean = statistics.fmean(scores[-BATCH:][place] for place in range(BATCH) if numbers[-BATCH:][place] % 2)
        assert lines(run)[step]["sources/odd_score_mean"] == pytest.approx(odd_mean, rel=1e-6)
    assert len(numbers) == STEPS * BATCH and len(set(numbers)) == NUM_ROWS - 8
    for figure in ("eval/score_mean", "eval/hard/score_mean", "eval/hard/length_mean", "eval/hard/kl_per_sequence"):
        assert [step for step, line in enumerate(lines(run)) if figure in line] == [0, 2, 4]
    before, after = (json.loads((run / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    assert (before["num_prompts"], before["sets"]["hard"]["num_prompts"]) == (8, 5)
    assert after["figures"]["eval/hard/score_mean"] == after["sets"]["hard"]["mean_score"] != after["mean_score"]
