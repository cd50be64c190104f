"""What `ppo-ray show` prints of a run, against pandas."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from ppo_ray import trajectory
from ppo_ray.cli import app
from ppo_ray.run.log import MetricsLog

HOSTILE = "\x1b]0;owned\x07<script>\x00[red]\u202eabc\u2066\x9b31m" + "a" * 200_000
STEPS, BATCH = 5, 8


def make_table(step: int, rng: np.random.Generator) -> pa.Table:
    """Return a step's trajectories; some have no score, some nothing that was learnt; some scores are equal."""
    rows, learned = [], {name: [] for name in trajectory.LEARNED_FIELDS}
    for index in range(BATCH):
        tokens = int(rng.integers(1, 6))
        score = None if index == 3 else float(rng.integers(0, 3))
        rows.append(
            {
                "sample_id": step * BATCH + index,
                "step": step,
                "policy_version": step,
                "worker": "rollout-0",
                "seed": 1,
                "prompt": f"prompt {index}",
                "response": HOSTILE if (step, index) == (1, 2) else f"film {'good' if index % 2 else 'bad'} {step}",
                "prompt_ids": [1],
                "response_ids": [2] * tokens,
                "rollout_logprobs": rng.normal(size=tokens).tolist(),
                "finish_reason": "length",
                "score": score,
            }
        )
        for column in learned.values():
            column.append(None if index == 4 else rng.normal(size=tokens).astype(np.float32))
    scores = [row["score"] for row in rows]
    halves = [None if score is None else score / 2 for score in scores]
    table = trajectory.with_parts(
        trajectory.from_rows(rows), {"tone": halves, "odd": scores}, {"tone": 1.0, "odd": 0.5}
    )
    return trajectory.with_learned(table, learned)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "trajectories").mkdir()
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        pq.write_table(make_table(step, rng), folder / "trajectories" / f"step-{step:05d}.parquet")
    with MetricsLog(folder) as log:
        for step in range(STEPS):
            log.write(step, {"score/mean": step / 4, "kl/per_sequence": float("nan") if step == 1 else 0.5 * step})
    return folder


@pytest.fixture(scope="module")
def frame(run: Path) -> pd.DataFrame:
    """Return all responses with their figures, computed row by row."""
    frames = [pd.read_parquet(path) for path in sorted((run / "trajectories").glob("*.parquet"))]
    found = pd.concat(frames, ignore_index=True)

    def each(column: str, compute) -> pd.Series:
        return found[column].map(lambda values: np.nan if values is None else compute(np.asarray(values, np.float64)))

    found["kl"], found["reward"] = each("kl", np.sum), each("rewards", np.sum)
    found["advantage"], found["value"] = each("advantages", np.mean), each("values", np.mean)
    found["tokens"] = found["response_ids"].map(len)
    pairs = zip(found["rollout_logprobs"], found["old_logprobs"], strict=True)
    found["mismatch"] = [np.nan if theirs is None else np.abs(ours - theirs).max() for ours, theirs in pairs]
    found["tone"] = found["parts"].map(lambda parts: parts["tone"])
    return found


def show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def ids(*arguments: object) -> list[int]:
    result = show(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line)["sample_id"] for line in result.output.splitlines()]


@pytest.mark.parametrize("order", ["worst", "best"])
@pytest.mark.parametrize("by", ["score", "kl", "reward", "advantage", "value", "mismatch", "tokens", "tone"])
def test_the_worst_and_the_best_are_those_of_a_query(run, frame, by, order) -> None:
    ascending = (order == "worst") != (by in ("kl", "mismatch", "tokens"))
    known = frame.dropna(subset=[by]).sort_values([by, "step", "sample_id"], ascending=[ascending, True, True])
    assert ids(run, f"--{order}", 12, "--by", by) == known["sample_id"].head(12).tolist()


def test_of_some_steps_and_with_a_text(run, frame) -> None:
    of_two = frame[frame.step.isin([1, 4])]
    assert ids(run, "--step", -1, "--step", 1) == of_two["sample_id"].tolist()
    good = of_two[of_two.response.str.contains("good")].dropna(subset=["score"])
    wanted = good.sort_values(["score", "step", "sample_id"])["sample_id"].head(3).tolist()
    assert ids(run, "--step", 1, "--step", 4, "--contains", "good", "--worst", 3) == wanted
    both = ids(run, "--worst", 2, "--best", 2)
    assert both == [*ids(run, "--worst", 2), *ids(run, "--best", 2)]


def test_whatever_a_model_wrote_is_shown_as_text(run) -> None:
    result = show(run, "--step", 1)
    assert result.exit_code == 0, result.exception
    cell = "".join(line.split("│")[5].strip() for line in result.output.splitlines() if line.count("│") == 7)
    assert "\\x1b]0;owned\\x07<script>\\x00[red]\\u202eabc\\u2066\\x9b31maaa" in cell
    assert "... (200,033 characters; --json has all)".replace(" ", "") in cell.replace(" ", "")
    assert not {"\x1b", "\x00", "\x07", "\u202e", "\u2066", "\x9b"} & set(result.output)
    (line,) = [line for line in show(run, "--step", 1, "--json").output.splitlines() if "owned" in line]
    assert json.loads(line)["response"] == HOSTILE and line.isascii() and line.isprintable()


def test_files_that_cannot_be_read_are_left_out_and_said(run, frame, tmp_path) -> None:
    (tmp_path / "trajectories").mkdir()
    for path in (run / "trajectories").iterdir():
        (tmp_path / "trajectories" / path.name).write_bytes(path.read_bytes())
    torn, old = (tmp_path / "trajectories" / f"step-0000{step}.parquet" for step in (2, 3))
    torn.write_bytes(torn.read_bytes()[:-100])
    pq.write_table(pq.read_table(old).drop_columns(["kl"]), old)
    (tmp_path / "trajectories" / "step-00009.parquet.partial").write_text("half")
    result = show(tmp_path, "--worst", 100, "--by", "kl", "--json")
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        "step-00002.parquet is left out",
        "step-00003.parquet is left out",
    ]
    assert "it has no column kl" in result.stderr
    found = {json.loads(line)["step"] for line in result.stdout.splitlines()}
    assert found == {0, 1, 4}


def test_steps_are_shown_without_an_option(run) -> None:
    lines = show(run).output.splitlines()
    assert lines[0].split()[:3] == ["step", "score", "KL"] and len(lines) == STEPS + 2
    assert lines[1].split()[:3] == ["0", "+0.00", "0"] and lines[2].split()[:3] == ["1", "+0.25", "nan"]
    records = [json.loads(line) for line in show(run, "--json").output.splitlines()]
    assert [record["kl/per_sequence"] for record in records] == [0.0, None, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", 9], "--step 9: the run has the steps 0 to 4"),
        (["--step", -6], "--step -6: the run has the steps 0 to 4"),
        (["--worst", 3, "--by", "beauty"], "none of 0 responses has the figure beauty; there are score, kl, reward"),
    ],
)
def test_what_there_is_not_is_refused(run, arguments, message) -> None:
    result = show(run, *arguments)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize("arguments", [[], ["--worst", 3]])
def test_a_folder_that_is_no_run_is_refused(tmp_path, arguments) -> None:
    result = show(tmp_path, *arguments)
    assert result.exit_code == 2 and "give the folder of a run" in result.output
