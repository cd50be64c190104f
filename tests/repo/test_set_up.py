"""The set-up of the environment: what it refuses, what it takes for whole, which torch it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from requirements import set_up
from requirements.set_up import Environment

SCRIPT = Path(set_up.__file__)


def fake(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """A whole environment of one package, whose Python says that it is 3.12 and whose pip sees two builds of torch."""
    monkeypatch.delenv("PYTHON", raising=False)
    made = Environment(tmp_path / ".venv", "cpu")
    fake(made.python, """case "$*" in *index*) echo '{"versions": ["2.13.0+cpu", "2.13.0"]}' ;; *) echo 3.12 ;; esac""")
    site = made.path / "lib" / "python3.12" / "site-packages"
    for file in ("pip/__main__.py", "numpy-2.0.dist-info/RECORD"):
        (site / file).parent.mkdir(parents=True)
        (site / file).touch()
    packages = ["lib/python3.12/site-packages/numpy-2.0.dist-info"]
    made.stamp.write_text(json.dumps({"locks": made._digest(), "packages": packages}))
    return made


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (("Darwin", "arm64", ("", "")), "this is Darwin on arm64"),
        (("Linux", "aarch64", ("glibc", "2.36")), "this is Linux on aarch64"),
        (("Linux", "x86_64", ("glibc", "2.9")), "this machine's C library is glibc 2.9"),
        (("Linux", "x86_64", ("", "")), "this machine's C library is another one"),
    ],
)
def test_other_machines_are_named(machine, found, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        set_up.check_machine(*machine)
    assert "need Linux on x86-64 with glibc 2.31 or newer" in (said := capsys.readouterr().err) and found in said
    set_up.check_machine("Linux", "x86_64", ("glibc", "2.31"))


@pytest.mark.parametrize(("version", "found"), [("", "this machine has none"), ("570.211.01", "has 570.211.01")])
def test_an_old_or_absent_driver_is_named(version: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        set_up.check_driver(version)
    assert "NVIDIA's driver 580 or newer" in (said := capsys.readouterr().err) and found in said
    set_up.check_driver("580.65.06")


def test_the_drivers_version_is_read_from_nvidia_smi_where_the_kernel_does_not_show_it(tmp_path, monkeypatch) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("the kernel shows this machine's")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set_up.read_driver_version() == ""
    fake(tmp_path / "nvidia-smi", "echo 580.95.05")
    assert set_up.read_driver_version() == "580.95.05"


def test_a_suitable_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    old = fake(tmp_path / "python3", "echo 3.9")
    fake(tmp_path / "python3.11", "exit 127")  # as a version manager's command for a version that is switched off
    with pytest.raises(SystemExit, match="2"):
        set_up.find_python("")
    assert "found: python3 is 3.9." in capsys.readouterr().err
    fake(tmp_path / "python3.13", "echo 3.13")
    assert set_up.find_python("") == "python3.13"
    with pytest.raises(SystemExit, match="2"):
        set_up.find_python(str(old))  # what PYTHON names is taken or refused
    fake(tmp_path / "python3", "echo 3.12")
    assert set_up.find_python("") == "python3"
    fake(tmp_path / "python3", "echo '3.12 without venv (Debian: apt install python3-venv)'")
    assert set_up.find_python("") == "python3.13"


def test_this_python_describes_itself() -> None:
    assert set_up.describe_python(sys.executable) == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_whole_environment_is_left_alone(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.is_complete()
    environment.named = str(environment.python)
    assert environment.is_complete()


@pytest.mark.parametrize(
    ("damage", "must_be_made"),
    [
        ("rm lib/python3.12/site-packages/numpy-2.0.dist-info/RECORD", False),
        ("rm .installed-cpu", False),
        ('sed -i \'s/"locks": "./&0/\' .installed-cpu', False),
        ("rm bin/python", True),
        ("echo 'echo 3.14' > bin/python", True),
        ("rm -r lib/python3.12/site-packages/pip", True),
        ("touch .installing", True),
        ("touch .installed-gpu", True),
    ],
)
def test_a_damaged_environment_is_found(environment: Environment, damage: str, must_be_made: bool) -> None:
    subprocess.run(damage, shell=True, cwd=environment.path, check=True)
    assert not environment.is_complete()
    assert environment._must_be_made() == must_be_made


def test_the_tools_of_developers_are_installed_with_the_lock(environment: Environment) -> None:
    environment.stamp.unlink()
    environment.install()
    (line,) = [line for line in environment.log.read_text().splitlines() if "cpu.txt" in line]
    locks = [Path(part).name for part in line.split() if part.endswith(".txt")]
    assert locks == ["cpu.txt", "dev.txt", "torch-cpu.txt"]
    assert environment.is_complete()


def test_the_cpu_build_of_torch_is_taken_where_pip_sees_it(environment: Environment, capsys) -> None:
    assert environment._find_torch_lock().name == "torch-cpu.txt"
    fake(environment.python, """echo '{"versions": ["2.14.0+cpu", "2.13.0"]}'""")
    assert environment._find_torch_lock().name == "torch-cuda.txt"
    assert "2.3 GB more to download" in (said := capsys.readouterr().out) and "PIP_EXTRA_INDEX_URL" in said
    fake(environment.python, "echo no network >&2; exit 1")
    with pytest.raises(SystemExit, match="1"):
        environment._find_torch_lock()
    assert "pip cannot list the builds of torch:\nno network" in capsys.readouterr().err


def test_pip_shows_a_line_per_package_and_its_last_words_if_it_fails(environment: Environment, capsys) -> None:
    fake(
        environment.python,
        "echo 'Collecting a==1 (from -r x)'; echo '  Downloading a-1-py3-none-any.whl (5.1 MB)'\n"
        "echo 'Processing /folder/b-2-py3-none-any.whl (from -r x)'; echo 'Installing collected packages: a, b'\n"
        "echo 'ERROR: disk is full' >&2; exit 1",
    )
    lock = environment.path / "lock.txt"
    lock.write_text("a==1 --hash=x\nb==2 --hash=y\n")
    with pytest.raises(SystemExit, match="1"):
        environment._pip_install("-r", str(lock))
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == ["[1/2] a==1 (5.1 MB)", "[2/2] b-2-py3-none-any.whl"]
    assert "ERROR: disk is full" in said.err and str(environment.log) in said.err
    assert "Collecting a==1" in environment.log.read_text()


def test_the_command_takes_no_other_extra(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, SCRIPT, "tpu"], capture_output=True, text=True, env={**os.environ})
    assert (result.returncode, result.stderr) == (2, "set-up: EXTRA=tpu: must be cpu or gpu\n")
