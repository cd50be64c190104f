"""The documents name what there is: every metric, every option of TRL's, every recording."""

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.run.health import HEALTHY
from ppo_ray.run.loop import run_steps
from ppo_ray.trl import PPOConfig
from tests.learning import make_learner, make_table

ROOT = Path(__file__).parents[2]
DIAGNOSTICS = (ROOT / "docs" / "diagnostics.md").read_text()
TRL = (ROOT / "docs" / "trl.md").read_text()
OWN_TASK = (ROOT / "docs" / "own_task.md").read_text()
WEIGHTS = (ROOT / "docs" / "weights.md").read_text()
README = (ROOT / "README.md").read_text()
LOOP = {f"time/{part}_s" for part in ("step", "generate", "score", "learn", "publish", "sync", "wait")}
LOOP |= {"prompts/num_skipped", "rollout/staleness_mean", "rollout/staleness_max"}
LOOP |= {
    "eval/score_mean",
    "eval/score_error",
    "eval/unscored",
    "eval/tokens_mean",
    "eval/eos_rate",
    "eval/kl_per_sequence",
}
"""What actors and the log add to a learner's metrics; tests/e2e reads them."""


def first_column(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def placeholders(names: set[str]) -> set[str]:
    """Return the names with a word in capitals, as `parts/NAME_mean`."""
    return {name for name in names if name != name.lower()}


def test_the_loop_in_the_readme_is_the_loop_that_runs() -> None:
    source = textwrap.dedent(inspect.getsource(run_steps))
    loop = source[source.index("    " * 2 + "for step in") :]
    assert f"```python\n{textwrap.dedent(loop)}```" in README


def test_every_metric_is_explained_and_nothing_else(tiny_policy: Path) -> None:
    found = set(make_learner(tiny_policy, importance_cap=2.0).update(make_table(), 0).metrics)
    explained = first_column(DIAGNOSTICS)
    parts = {f"parts/NAME_{figure}" for figure in ("mean", "std", "unscored")}
    assert placeholders(explained) == parts | {"eval/NAME_mean", "eval/pass@K", "eval/SET/..."}
    assert explained - placeholders(explained) == found | LOOP


def test_healthy_ranges_are_those_that_the_run_warns_of() -> None:
    cells = [line.split(" | ") for line in DIAGNOSTICS.splitlines() if line.startswith("| `")]
    healthy = {name: row[2] for row in cells if len(row) > 3 for name in re.findall(r"`([^`]+)`", row[0])}
    for name, limits in HEALTHY.items():
        assert str(limits) in healthy[name], name


def test_every_option_of_trls_update_has_a_row() -> None:
    documented = first_column(TRL) | {"steps"}
    not_of_the_update = {
        "exp_name",
        "seed",
        "log_with",
        "task_name",
        "model_name",
        "query_dataset",
        "reward_model",
        "steps",
        "remove_unused_columns",
        "tracker_kwargs",
        "accelerator_kwargs",
        "project_kwargs",
        "tracker_project_name",
        "push_to_hub_if_best_kwargs",
        "forward_batch_size",
        "world_size",
        "optimize_cuda_cache",
        "compare_steps",
        "optimize_device_cache",
        "gradient_checkpointing",
        "is_encoder_decoder",
        "is_peft_model",
        "backward_batch_size",
        "global_backward_batch_size",
        "global_batch_size",
        "dataset_num_proc",
    }
    assert {field.name for field in dataclasses.fields(PPOConfig)} - not_of_the_update <= documented


def test_the_recordings_and_options_that_are_named_exist() -> None:
    table = TRL[TRL.index("| TRL | ppo_ray | recordings |") : TRL.index("## Where TRL errs")]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    recordings = {name for row in rows for name in re.findall(r"`(\w+)`", row[3])}
    assert all((ROOT / "tests/golden/trl_options" / f"{name}.json").is_file() for name in recordings - {"trl_default"})
    named = {path.stem for path in (ROOT / "tests/golden/trl_options").glob("*.json")}
    assert named - recordings == {"max_grad_norm_as_it_is"}
    for option in set(re.findall(r"`((?:ppo|rollout|prompts|learner)\.\w+)[`=]", TRL + DIAGNOSTICS + WEIGHTS)):
        section, _, leaf = option.partition(".")
        known = Config.model_fields[section].annotation.model_fields
        assert leaf in known, option


@pytest.mark.parametrize(
    "name", re.findall(r"`(tests/[\w/.]+|examples/[\w/.]+|docs/[\w/.]+)`", TRL + DIAGNOSTICS + WEIGHTS)
)
def test_files_that_are_named_exist(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", OWN_TASK, re.DOTALL))
def test_the_configs_of_ones_own_task_are_right(block: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(block)
    sources = [source for _, source in load_config(tmp_path / "task.yaml", []).reward.sources]
    assert all(source.function and source.function.startswith("rewards:score_") for source in sources)
