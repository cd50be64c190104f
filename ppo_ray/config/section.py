"""What all sections of a config have in common: frozen, strict, documented, and sources that name assets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ppo_ray.assets.cache import asset_path

_ASSETS: tuple[Literal["policy", "classifier", "prompts"], ...] = ("policy", "classifier", "prompts")


def _resolve(source: str) -> str:
    """Turn `asset:NAME` into the asset's path in the cache and `~` into the home folder; leave the rest as it is."""
    prefix, colon, name = source.partition(":")
    if prefix == "asset" and colon:
        for asset in _ASSETS:
            if name == asset:
                return str(asset_path(asset))
        raise ValueError(f"{source!r} is no asset; there are {', '.join(f'asset:{asset}' for asset in _ASSETS)}")
    return str(Path(source).expanduser()) if source.startswith("~") else source


Source = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]
"""A folder, a file, a hub name, or `asset:policy`, `asset:classifier`, `asset:prompts` (`ppo-ray assets imdb`)."""
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Trust:
    """What a model's folder may do beyond being read; nothing, unless its owner is trusted."""

    remote_code: bool = False
    """Run Python code that lies with the model."""
    pickles: bool = False
    """Load weights that are pickled, where there are no safetensors."""


NO_TRUST = Trust()


class Section(BaseModel):
    """A section of options."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
    refused: ClassVar[dict[str, str]] = {}
    """Options that people look for here and must not have, with the reason and what to do instead."""


class ModelSource(Section):
    """A section that names a model."""

    trust_remote_code: bool = False
    """Whether Python code that lies with the model is run, on every machine of the run. Only for models whose authors
    you trust with your account."""
    allow_pickled_weights: bool = False
    """Whether weights are loaded that are pickled (.bin), where there are no safetensors. Only for models you trust."""

    @property
    def trust(self) -> Trust:
        """Both."""
        return Trust(self.trust_remote_code, self.allow_pickled_weights)
