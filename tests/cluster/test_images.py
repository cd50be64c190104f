"""The Dockerfiles: what can be told of them without building them."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from tests.cluster.linters import lint

ROOT = Path(__file__).parents[2]
FILES = {"cpu": ROOT / "cluster" / "Dockerfile", "gpu": ROOT / "cluster" / "Dockerfile.gpu"}


def instructions(extra: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their arguments, comments left out and continued lines joined."""
    lines = [line for line in FILES[extra].read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in joined.splitlines() if line.strip()]


def copied(extra: str) -> list[str]:
    return [source for name, rest in instructions(extra) if name == "COPY" for source in rest.split()[:-1]]


def position(extra: str, name: str, part: str) -> int:
    (found,) = [i for i, (other, rest) in enumerate(instructions(extra)) if other == name and part in rest]
    return found


@pytest.mark.parametrize("extra", FILES)
def test_hadolint_has_nothing_to_say(extra: str) -> None:
    assert lint("hadolint", FILES[extra]) == ""


def test_hadolint_would() -> None:
    bad = FILES["cpu"].read_text().replace("3.11-slim-bookworm", "latest").replace("USER 1000", "USER root")
    assert {"DL3007", "DL3002"} <= set(re.findall(r"DL\d+", lint("hadolint", text=bad)))


@pytest.mark.parametrize("extra", FILES)
def test_packages_are_those_of_the_lock_and_are_not_installed_again_for_new_code(extra: str) -> None:
    install = position(extra, "RUN", f"--no-deps --require-hashes -r requirements/{extra}.txt")
    assert position(extra, "COPY", f"requirements/{extra}.txt") < install < position(extra, "COPY", "ppo_ray ppo_ray")
    pips = [rest for name, rest in instructions(extra) if name == "RUN" and "pip install" in rest]
    assert all("--no-deps" in rest for rest in pips)
    locks = {word for rest in pips for word in rest.split() if word.endswith(".txt")}
    wanted = {"cpu": ["pip", "cpu", "torch-cpu"], "gpu": ["pip", "gpu"]}[extra]
    assert locks == {f"requirements/{lock}.txt" for lock in wanted}  # not the developers' tools


@pytest.mark.parametrize("extra", FILES)
def test_what_is_copied_is_there_and_sent_to_the_builder(extra: str) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    for source in copied(extra):
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in sent), source
    needed = {source.split("/")[0] for source in copied(extra)}
    assert needed == sent


@pytest.mark.parametrize("extra", FILES)
def test_what_the_package_is_built_from_is_copied_before(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    build = position(extra, "RUN", "--no-build-isolation .")
    before = [rest for name, rest in instructions(extra)[:build] if name == "COPY"]
    assert {"pyproject.toml", project["readme"], "ppo_ray", "configs"} <= {
        word for rest in before for word in rest.split()
    }


@pytest.mark.parametrize("extra", FILES)
def test_it_is_python_3_11_for_nobodys_root_with_authentication_on(extra: str) -> None:
    base = [rest for name, rest in instructions(extra) if name == "FROM"]
    assert base == ["python:3.11-slim-bookworm"]
    users = [rest for name, rest in instructions(extra) if name == "USER"]
    assert users[-1].isdigit() and int(users[-1]) > 0  # Kubernetes' runAsNonRoot wants a number
    assert f"--uid {users[-1]}" in FILES[extra].read_text()
    assert position(extra, "ENV", "RAY_AUTH_MODE=token")


@pytest.mark.parametrize("extra", FILES)
def test_no_secret_gets_into_a_layer(extra: str) -> None:
    for name, rest in instructions(extra):
        assert name != "ARG"  # build arguments stay in the image's history
        assert not re.search(r"(TOKEN|PASSWORD|SECRET|_KEY)=", rest, re.IGNORECASE)


def test_cudas_compiler_is_found_where_there_are_gpus() -> None:
    """FlashInfer, vLLM's first choice on Blackwell, is left out without it."""
    set_to = dict(rest.split("=", 1) for name, rest in instructions("gpu") if name == "ENV" and "CUDA" in rest)
    assert set_to["CUDA_HOME"].endswith("/nvidia/cu13") and set_to["PATH"].startswith("$CUDA_HOME/bin:")
