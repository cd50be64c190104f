import resource
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.assets.cache import build_once
from ppo_ray.assets.pretrained import save_pretrained
from ppo_ray.errors import AssetError


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
