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
    *("rollout.engine=hf", "steps=2", "prompts.min_tokens=12", "prompts.max_tokens=12"),
    *("rollout.batch_size=4", "rollout.min_response_tokens=6", "rollout.max_response_tokens=6"),
    *("rollout.max_context=32", "rollout.kv_cache_mib=32", "learner.threads=1", "ray.object_store_mib=80"),
    *("evaluation.num_prompts=4", "evaluation.num_samples=2"),
]


def test_the_task_of_the_page(ppo_ray: CommandLine, tmp_path: Path, tiny_policy: Path) -> None:
    names = re.findall(r"^`(\w+\.(?:jsonl|py|yaml))`[,:]", PAGE, re.MULTILINE)
    blocks = re.findall(r"```(?:json|python|yaml)\n(.*?)```", PAGE, re.DOTALL)
    files = dict(zip(names, blocks, strict=False))
    assert list(files) == ["questions.jsonl", "short_answers.py", "task.yaml"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    question = json.loads(files["questions.jsonl"].splitlines()[0])["prompt"]
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"prompt": question.replace("sky", f"sky of day {day}")}) + "\n" for day in range(20)
        )

    result = replace(ppo_ray, prefix=("env", f"--chdir={tmp_path}")).run(
        "train", "task.yaml", f"model.path={tiny_policy}", *SMALL
    )
    assert result.returncode == 0, result.stderr
    table = pq.read_table(tmp_path / "runs" / "task" / "trajectories" / "step-00001.parquet")
    assert {len(ids) for ids in table["prompt_ids"].to_pylist()} == {12}
    assert max(len(ids) for ids in table["response_ids"].to_pylist()) == 6
    for text, score in zip(table["response"].to_pylist(), table["score"].to_pylist(), strict=True):
        assert score == (pytest.approx(1 - len(text) / 100) if text.strip() else None)
