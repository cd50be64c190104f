"""The Python packages that carry the assets: their files are read, the packages never imported."""

import importlib.util
from pathlib import Path

from ppo_ray.errors import AssetError

_REMEDY = "install it with: pip install 'ppo-ray[demo]'"


def package_file(package: str, pattern: str) -> Path:
    """Return the one file of an installed package that matches a glob pattern.

    Raises:
        AssetError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise AssetError(f"the package {package} with its {pattern} is not installed; {_REMEDY}")


def require_package(package: str) -> None:
    """Raise an AssetError unless a package that reads an asset is installed."""
    if importlib.util.find_spec(package) is None:
        raise AssetError(f"the package {package} is not installed; {_REMEDY}")
