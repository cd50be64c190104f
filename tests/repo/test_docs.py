"""The documents name what there is: every metric, option, message and link; and they build as a site."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ppo_ray.config import Config, load_config
from ppo_ray.run.health import HEALTHY, healthy_ranges
from ppo_ray.run.loop import run_steps
from ppo_ray.trl import PPOConfig
from tests.learning import make_learner, make_table

ROOT = Path(__file__).parents[2]
DIAGNOSTICS = (ROOT / "docs" / "diagnostics.md").read_text()
TRL = (ROOT / "docs" / "trl.md").read_text()
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md")])
}
CONFIGS = [
    pytest.param(block, id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    if "output_dir:" in block
]
LOOP = {f"time/{part}_s" for part in ("step", "generate", "score", "learn", "publish", "sync", "wait")}
LOOP |= {"groups/num_refilled", "prompts/num_skipped", "rollout/staleness_mean", "rollout/staleness_max"}
LOOP |= {
    "eval/score_mean",
    "eval/score_error",
    "eval/unscored",
    "eval/tokens_mean",
    "eval/eos_rate",
    "eval/kl_per_sequence",
}
LOOP |= {
    f"memory/{kind}_{figure}gib"
    for kind in ("rollout", "reward", "learner")
    for figure in ("", "peak_", "gpu_", "gpu_reserved_")
}
"""What actors and the log add to a learner's metrics; tests/e2e reads them."""

NO_OPTIONS = {"prompts.parquet", "model.safetensors", "model.pretrained_model", "model.v_head"}
"""Words that look like options: files, and attributes of TRL's."""


def first_column(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def placeholders(names: set[str]) -> set[str]:
    """Return the names with a word in capitals, as `parts/NAME_mean`."""
    return {name for name in names if name != name.lower()}


def test_the_loop_of_the_concepts_is_the_loop_that_runs() -> None:
    source = textwrap.dedent(inspect.getsource(run_steps))
    loop = source[source.index("    " * 2 + "for step in") :]
    assert f"```python\n{textwrap.dedent(loop)}```" in CONCEPTS


def test_every_metric_is_explained_and_nothing_else(tiny_policy: Path) -> None:
    found = set(make_learner(tiny_policy, importance_cap=2.0).update(make_table(group_size=2), 0).metrics)
    explained = first_column(DIAGNOSTICS)
    parts = {f"parts/NAME_{figure}" for figure in ("mean", "std", "unscored")}
    parts |= {"sources/NAME_score_mean", "sources/NAME_unscored"}
    assert placeholders(explained) == parts | {"eval/NAME_mean", "eval/pass@K", "eval/SET/..."}
    of_compiling = {"learner/compiled_pieces", "learner/compile_s"}
    assert explained - placeholders(explained) == found | LOOP | of_compiling


def test_healthy_ranges_are_those_that_the_run_warns_of() -> None:
    cells = [line.split(" | ") for line in DIAGNOSTICS.splitlines() if line.startswith("| `")]
    healthy = {name: row[2] for row in cells if len(row) > 3 for name in re.findall(r"`([^`]+)`", row[0])}
    for name, limits in HEALTHY.items():
        assert str(limits) in healthy[name], name
    for name, limits in healthy_ranges("gspo").items():
        of_its_own = limits != HEALTHY[name]
        assert str(limits) in healthy[name].partition("ith gspo")[2 if of_its_own else 0], name


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


def test_the_options_that_are_named_exist() -> None:
    sections = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]
    known = {
        f"{section}.{leaf}" for section in sections for leaf in Config.model_fields[section].annotation.model_fields
    }
    for page, text in PAGES.items():
        named = set(re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_]+)(?:=[^`]*)?`", text))
        assert named - known <= NO_OPTIONS, page


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    names = re.findall(r"`((?:tests|examples|docs|benchmarks|configs|cluster|requirements)/[\w/.-]+)`", PAGES[page])
    assert [name for name in names if not (ROOT / name).exists()] == []
    tests = re.findall(r"`(test_\w+\.py)`", PAGES[page])
    assert [name for name in tests if not (ROOT / "tests" / "faults" / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """Return what links may have behind #: each heading as GitHub spells it."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    joined = [re.sub(r'"\s+f?"', "", path.read_text()) for path in (ROOT / "ppo_ray").rglob("*.py")]
    tables = TROUBLESHOOTING[TROUBLESHOOTING.index("### Config") : TROUBLESHOOTING.index("## Questions")]
    messages = re.findall(r"^\| `([^|]+)` \|", tables, re.MULTILINE)
    assert len(messages) >= 8
    for message in messages:
        parts = [part.strip() for part in message.split("...") if len(part.strip()) > 3]
        assert any(all(part in source for part in parts) for source in joined), message


@pytest.mark.parametrize("block", CONFIGS)
def test_the_configs_of_the_pages_are_right(block: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(block)
    load_config(tmp_path / "task.yaml", [])


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"REPOSITORY_URL": "https://git.example.org/us/ppo_ray"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first = (tmp_path / "site" / "index.html").read_text()
    assert 'src="architecture.svg"' in first and 'href="quickstart/"' in first
    assert 'href="https://git.example.org/us/ppo_ray/blob/main/SECURITY.md"' in first
