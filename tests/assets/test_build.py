import importlib.util
import resource
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.assets.build import (
    _BUILDS,
    Advance,
    build_assets,
    build_policy,
    find_package_file,
    require_package,
    save_pretrained,
)
from ppo_ray.assets.cache import ASSETS, SETS, build_once
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


def test_every_asset_is_built() -> None:
    assert sorted(_BUILDS) == sorted(ASSETS) == sorted({name for names in SETS.values() for name in names})


def test_a_log_says_what_is_built_and_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_slowly(path: Path, advance: Advance) -> None:
        for _ in range(100):
            advance(0.01)
        path.write_text("built")

    monkeypatch.setenv("PPO_RAY_CACHE", str(tmp_path))
    monkeypatch.setitem(SETS, "toy", ("words",))
    monkeypatch.setitem(_BUILDS, "words", ("64 short texts", build_slowly))
    for expected in (["64 short texts", "20%", "40%", "60%", "80%", "100%"], []):  # the second time it is there
        build_assets("toy", console=Console(width=200))
        lines = capsys.readouterr().out.splitlines()
        assert [line.removeprefix("building words: ") for line in lines if "building" in line] == expected


def test_a_file_is_found_without_importing_its_package(package: Path) -> None:
    assert find_package_file("reviews_of_nothing", "data/*.csv") == package / "data" / "reviews.csv"
    assert "reviews_of_nothing" not in sys.modules


@pytest.mark.parametrize(("name", "pattern"), [("no_such_package", "*.gguf"), ("reviews_of_nothing", "*.gguf")])
def test_what_is_missing_is_named_with_the_remedy(package: Path, name: str, pattern: str) -> None:
    with pytest.raises(AssetError, match=rf"{name}.*pip install 'ppo-ray\[demo\]'"):
        find_package_file(name, pattern)


def test_the_reader_of_gguf_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    require_package("pytest")
    with pytest.raises(AssetError, match=r"gguf is not installed.*ppo-ray\[demo\]"):
        build_policy(tmp_path / "policy", lambda share: None)
    assert not (tmp_path / "policy").exists()


def test_a_full_disk_is_an_asset_error_and_leaves_nothing(tiny_policy: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the weights are larger: the write fails half-way
    try:
        with pytest.raises(AssetError, match=r"File too large.*PPO_RAY_CACHE"):
            build_once(tmp_path / "policy", lambda folder: save_pretrained(model, tokenizer, folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [".policy.lock"]
    assert build_once(tmp_path / "policy", lambda folder: save_pretrained(model, tokenizer, folder))
    assert (tmp_path / "policy" / "model.safetensors").stat().st_size > 100_000


def test_what_is_written_does_not_tell_how_it_was_loaded(tiny_policy: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    written = []
    for offline in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
        tokenizer.init_kwargs["local_files_only"] = offline  # as with HF_HUB_OFFLINE set and unset
        folder = tmp_path / str(offline)
        save_pretrained(model, tokenizer, folder)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(written[0])
