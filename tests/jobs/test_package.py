"""What of a folder travels with a job: Ray's own answer, the size that Ray's server takes, what makes it large."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package

from ppo_ray.errors import InputError
from ppo_ray.jobs import package
from ppo_ray.jobs.package import LIMIT, Package


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "judge.py": 5,
        "data/films.csv": 7,
        "data/.gitignore": 0,
        "data/big.bin": 40,
        "runs/a/model.safetensors": 60,
        "notes.txt": 3,
        ".git/config": 9,
        ".venv/lib.py": 11,
        "deep/__pycache__/judge.pyc": 13,
    }
    for name, size in files.items():
        path = tmp_path / "job" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return tmp_path / "job"


def test_ray_s_own_exclusions_are_left_out(folder: Path) -> None:
    found = Package.scan(folder)
    assert found.files == {
        "judge.py": 5,
        "data/films.csv": 7,
        "data/.gitignore": 0,
        "data/big.bin": 40,
        "runs/a/model.safetensors": 60,
        "notes.txt": 3,
    }
    assert found.size == 115


def test_ignore_files_are_followed_wherever_they_lie(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".gitignore").write_text("runs/\n*.txt\n")
    (folder / "data" / ".rayignore").write_text("big.*\n")
    found = Package.scan(folder)
    assert set(found.files) == {"judge.py", "data/films.csv", "data/.gitignore", "data/.rayignore", ".gitignore"}
    assert found.holds("data") and found.holds("./data/films.csv") and not found.holds("data/big.bin")
    assert not found.holds("dat") and not found.holds("runs") and not found.holds("../job/judge.py")
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert Package.scan(folder).holds("runs")


def test_it_is_what_ray_would_pack(folder: Path, tmp_path: Path) -> None:
    (folder / ".rayignore").write_text("notes.*\n")
    create_package(str(folder), tmp_path / "theirs.zip", True, excludes=[".git", ".venv", "venv", "__pycache__"])
    with ZipFile(tmp_path / "theirs.zip") as theirs:
        names = {info.filename: info.file_size for info in theirs.infolist() if not info.is_dir()}
    assert Package.scan(folder).files == names


def test_the_archive_holds_the_files_and_the_config(folder: Path, tmp_path: Path) -> None:
    Package.scan(folder).write(tmp_path / "ours.zip", {"submitted.yaml": "steps: 3\n"})
    with ZipFile(tmp_path / "ours.zip") as ours:
        assert ours.read("runs/a/model.safetensors") == b"x" * 60
        assert ours.read("submitted.yaml") == b"steps: 3\n"
        assert len(ours.namelist()) == 7
    Package().write(tmp_path / "alone.zip", {"submitted.yaml": "steps: 3\n"})
    with ZipFile(tmp_path / "alone.zip") as alone:
        assert alone.namelist() == ["submitted.yaml"]


def test_what_is_too_large_is_named_largest_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIMIT == 100 << 20
    assert Package.scan(folder).problem() is None
    monkeypatch.setattr(package, "LIMIT", 115)
    assert Package.scan(folder).problem() is None
    monkeypatch.setattr(package, "LIMIT", 114)
    problem = Package(folder, {name: size << 20 for name, size in Package.scan(folder).files.items()}).problem()
    assert problem is not None
    assert problem.startswith(
        f"--working-dir={folder}: 115.0 MiB in 6 files, more than the 0.0 MiB that Ray's job server"
    )
    assert (
        "largest: runs/ 60.0 MiB, data/ 47.0 MiB, judge.py 5.0 MiB, runs/a/model.safetensors 60.0 MiB, "
        "data/big.bin 40.0 MiB, data/films.csv 7.0 MiB. Leave out"
    ) in problem
    assert ".rayignore" in problem


def test_no_folder_and_a_file_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Package.scan(tmp_path / "nowhere")
    found = Package.scan(folder)
    (folder / "judge.py").unlink()
    with pytest.raises(InputError, match=r"judge\.py cannot be read: No such file"):
        found.write(tmp_path / "ours.zip", {})


def test_links_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "aws"
    secret.mkdir()
    (secret / "credentials").write_text("key")
    (folder / "inner").symlink_to(folder / "notes.txt")
    assert Package.scan(folder).holds("inner")
    (folder / "more").symlink_to(secret)
    with pytest.raises(InputError, match="1 files lie elsewhere, behind links, e.g. more/credentials"):
        Package.scan(folder)
    (folder / ".rayignore").write_text("more\n")
    assert not Package.scan(folder).holds("more/credentials")
