"""The task of docs/own_task.md, as it stands there but for its size."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.command_line import CommandLine

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parents[2] / "docs" / "own_task.md").read_text()
SMALL = [
    *("rollout.engine=hf", "steps=2", "prompts.chat_template=chat.jinja", "evaluation.every_steps=1"),
    *("rollout.batch_size=4", "rollout.max_response_tokens=6", "rollout.max_context=160"),
    *("learner.threads=1", "ray.object_store_mib=80", "evaluation.num_prompts=4", "evaluation.num_samples=2"),
]


def test_the_task_of_the_page(ppo_ray: CommandLine, tmp_path: Path, tiny_policy: Path) -> None:
    names = re.findall(r"^`(\w+\.(?:jsonl|py|yaml))`[,:]", PAGE, re.MULTILINE)
    blocks = re.findall(r"```(?:json|python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    files = dict(zip(names, blocks, strict=False))
    assert list(files) == ["questions.jsonl", "rewards.py", "task.yaml"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:")
    row = json.loads(files["questions.jsonl"].splitlines()[0])
    with (tmp_path / "questions.jsonl").open("a") as file:
        for day in range(20):
            chat = [{"role": "user", "content": row["messages"][0]["content"].replace("France", f"day {day}")}]
            file.write(json.dumps({"messages": chat, "answer": chr(97 + day)}) + "\n")

    result = replace(ppo_ray, prefix=("env", f"--chdir={tmp_path}")).run(
        "train", "task.yaml", f"model.path={tiny_policy}", *SMALL
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "task"
    for step in range(2):
        table = pq.read_table(run / "trajectories" / f"step-{step:05d}.parquet")
        for sample in table.to_pylist():
            system, user = json.loads(sample["messages"])
            answer, text = sample["row"]["answer"], sample["response"]
            assert system == {"role": "system", "content": "Answer with the name alone."}
            number = re.search(r"day (\d+)", user["content"])
            assert answer == (
                chr(97 + int(number[1])) if number else {"France?": "Paris", "Peru?": "Lima"}[user["content"][23:]]
            )
            brevity = pytest.approx(1 - len(text) / 100) if text.strip() else None
            assert sample["parts"] == {"answer": float(answer in text), "brevity": brevity}
            wanted = sample["parts"]["answer"] + 0.1 * (sample["parts"]["brevity"] or 0)
            assert sample["score"] == pytest.approx(wanted, abs=1e-6)
    first, second = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    before, after = (json.loads((run / f"evaluation_{when}.json").read_text()) for when in ("before", "after"))
    assert first["eval/score_mean"] == before["mean_score"] and first["eval/kl_per_sequence"] == 0
    assert second["eval/answer_mean"] >= 0 and after["figures"]["eval/kl_per_sequence"] != 0
