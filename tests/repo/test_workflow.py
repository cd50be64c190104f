"""The workflow for GitHub: what every submission must pass, on the versions that the locks serve; pinned actions."""

import re
from pathlib import Path

import yaml

from requirements.set_up import PYTHONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
WORKFLOW = yaml.safe_load(TEXT)


def test_each_version_of_python_passes_what_every_submission_must() -> None:
    job = WORKFLOW["jobs"]["test"]
    assert tuple(job["strategy"]["matrix"]["python"]) == PYTHONS
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_locks_are_looked_through_each_week() -> None:
    assert "schedule" in WORKFLOW[True]  # YAML reads the key `on` as true
    job = WORKFLOW["jobs"]["audit"]
    assert "pip-audit" in job["steps"][-1]["run"] and "schedule" in job["if"]
    assert all((ROOT / "requirements" / f"{lock}.txt").is_file() for lock in job["strategy"]["matrix"]["lock"])


def test_actions_are_pinned_and_may_only_read() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    uses = re.findall(r"uses: (.*)", TEXT)
    assert uses and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)
