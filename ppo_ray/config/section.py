"""What all sections of a config have in common: frozen, strict, documented, and sources that name assets."""

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
