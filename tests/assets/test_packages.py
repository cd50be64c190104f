import importlib.util
import sys
from pathlib import Path

import pytest

from ppo_ray.assets.packages import package_file, require_package
from ppo_ray.assets.policy import build_policy
from ppo_ray.errors import AssetError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package that fails when imported, on the path."""
    folder = tmp_path / "reviews_of_nothing"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "reviews.csv").write_text("text,label")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_file_is_found_without_importing_its_package(package: Path) -> None:
    assert package_file("reviews_of_nothing", "data/*.csv") == package / "data" / "reviews.csv"
    assert "reviews_of_nothing" not in sys.modules


@pytest.mark.parametrize(("name", "pattern"), [("no_such_package", "*.gguf"), ("reviews_of_nothing", "*.gguf")])
def test_what_is_missing_is_named_with_the_remedy(package: Path, name: str, pattern: str) -> None:
    with pytest.raises(AssetError, match=rf"{name}.*pip install 'ppo-ray\[demo\]'"):
        package_file(name, pattern)


def test_the_reader_of_gguf_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    require_package("pytest")
    with pytest.raises(AssetError, match=r"gguf is not installed.*ppo-ray\[demo\]"):
        build_policy(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
