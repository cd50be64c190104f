"""What is published: the wheel, made of the source archive as `python -m build` makes it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import ppo_ray

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "ppo_ray" / "view" / "static"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build in a copy, which leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "ppo_ray", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    build("sdist", folder)
    with tarfile.open(next(folder.glob("dist/*.tar.gz"))) as archive:
        archive.extractall(folder / "extracted", filter="data")
    (source,) = (folder / "extracted").iterdir()
    build("wheel", source)
    return zipfile.ZipFile(next(source.glob("dist/*.whl")))


def build(kind: str, folder: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_it_holds_the_package_its_types_and_the_demos_config_alone(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if not name.startswith("ppo_ray-")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ppo_ray").rglob("*.py")}
    assert files == modules | {
        "ppo_ray/py.typed",
        *(f"ppo_ray/assets/{name}.yaml" for name in ("imdb", "arithmetic", "assistant", "toy")),
        "ppo_ray/run/report.html",
        *(path.relative_to(ROOT).as_posix() for path in STATIC.rglob("*") if path.is_file()),
    }
    assert wheel.read("ppo_ray/assets/imdb.yaml") == (ROOT / "configs" / "imdb.yaml").read_bytes()


def test_what_others_wrote_has_its_licence(wheel: zipfile.ZipFile) -> None:
    files = {name.rpartition("/")[2] for name in wheel.namelist() if "/static/vendor/" in name}
    assert files == {"uPlot.esm.js", "uPlot.min.css", "uPlot.LICENSE"}
    assert b"MIT License" in wheel.read("ppo_ray/view/static/vendor/uPlot.LICENSE")


def test_it_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"ppo_ray-{ppo_ray.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert (metadata["Version"], metadata["License-Expression"]) == (ppo_ray.__version__, "Apache-2.0")
    assert wheel.read(f"{info}/entry_points.txt").decode() == "[console_scripts]\nppo-ray = ppo_ray.cli:main\n"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
