"""What lies in a model's folder, read without torch: its config, its tokenizer, the names of its files.

Each function returns what it has read, or None and a line that says what is wrong.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_ray.config import JudgeConfig, ModelConfig, RewardSource, Trust, revision_problem
from ppo_ray.errors import QUOTED, first_line

_PARTS = re.compile(r"layer|expert|label|block|depth|stage|(^|_)n_(enc|dec)", re.IGNORECASE)
_MOST_PARTS = 100_000  # the largest models have some hundred layers and experts, classifiers some ten thousand labels


def read_config(key: str, path: str, trust: Trust) -> tuple[Any, str | None]:
    """Load a model's own config; return it, or None and what is wrong with the model."""
    from transformers import AutoConfig, PreTrainedConfig

    folder = Path(path)
    if not folder.is_dir() and (path.startswith((".", "/")) or path.count("/") > 1 or folder.exists()):
        return None, f"{key}={path}: missing model: no such folder{asset_hint(path)}"
    if problem := revision_problem(path, trust.revision) or _find_excess(path, trust):
        return None, f"{key}={path}: {problem}"
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust.remote_code, **trust.place)
    except Exception as error:  # OSError, ValueError, whatever a hub client raises, or the model's own code
        if not trust.remote_code and _has_code(PreTrainedConfig.get_config_dict, path, trust):
            return None, _code_problem(key, path, "the model (auto_map in config.json)")
        where = "its config cannot be loaded" if folder.is_dir() else "neither a folder here nor to be had from the hub"
        return None, f"{key}={path}: missing model: {where}: {first_line(error)}{asset_hint(path)}"
    return model, _weights_problem(key, folder, trust) if folder.is_dir() else None


def _find_excess(path: str, trust: Trust) -> str | None:
    """Say which number in a model's config.json asks for more parts than any model has: they would be built one by one.

    What cannot be read is said where the config is loaded.
    """
    from transformers import PreTrainedConfig

    try:
        pending = [PreTrainedConfig.get_config_dict(path, **trust.place)[0]]
    except Exception:  # OSError, ValueError, whatever a hub client raises
        return None
    while pending:
        item = pending.pop()
        for name, value in item.items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, int) and value > _MOST_PARTS and _PARTS.search(str(name)):
                return f"config.json asks for {name[:QUOTED]}={value:.3g}; the limit is {_MOST_PARTS:,}"
    return None


def _weights_problem(key: str, folder: Path, trust: Trust) -> str | None:
    """Say what is wrong if a local folder has no safetensors: pickled weights can run any code, and need consent."""
    if any(folder.glob("*.safetensors")):
        return None
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    loadable = any(folder.glob("pytorch_model*.bin"))
    if loadable and trust.pickles:
        return None
    if pickles:
        unless = f" unless {key.partition('.')[0]}.allow_pickled_weights=true" if loadable else ""
        return (
            f"{key}={folder}: holds pickled weights only ({', '.join(pickles[:3])}), which are not loaded{unless}; "
            "better convert them: load them where you trust them and save_pretrained(...)"
        )
    return f"{key}={folder}: missing model: the folder holds no *.safetensors"


def _has_code(read: Callable[..., Any], path: str, trust: Trust) -> bool:
    """Say whether the config of a model or tokenizer, which `read` returns, names Python code that lies with it."""
    try:
        found = read(path, **trust.place)
        return "auto_map" in (found[0] if isinstance(found, tuple) else found)
    except Exception:  # what is wrong with it is said elsewhere
        return False


def _code_problem(key: str, path: str, what: str) -> str:
    return (
        f"{key}={path}: {what} needs Python code that lies with it, which is not run unless "
        f"{key.partition('.')[0]}.trust_remote_code=true; read it first, it runs with your rights"
    )


def read_tokenizer(key: str, model: ModelConfig | RewardSource | JudgeConfig) -> tuple[Any, str | None]:
    """Load a tokenizer; return it, or None and what is wrong: it is missing, or not the one its authors meant.

    Where transformers must not run a tokenizer's own code it may silently build another tokenizer from the other files,
    which can split texts in another way than the model was trained on.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path, trust = str(model.path), model.trust
    if not trust.remote_code and _has_code(get_tokenizer_config, path, trust):
        return None, _code_problem(key, path, "the tokenizer (auto_map in tokenizer_config.json)")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust.remote_code, **trust.place), None
    except Exception as error:  # each tokenizer library has its own errors
        return None, f"{key}={path}: its tokenizer cannot be loaded: {first_line(error)}"


def asset_hint(path: str) -> str:
    """Return how to build what is missing, if it is one of our own assets."""
    from ppo_ray.assets.cache import SETS, asset_path

    demo = next((demo for demo, names in SETS.items() for name in names if path == str(asset_path(name))), None)
    return f"; build it with `ppo-ray assets {demo}`" if demo and not Path(path).exists() else ""
