"""The Python packages that carry the assets: their files are read, the packages never imported."""

import importlib.util
from pathlib import Path

from ppo_ray.errors import AssetError


def package_file(package: str, pattern: str) -> Path:
    """Return the one file of an installed package that matches a glob pattern.

    Raises:
        AssetError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise AssetError(
        f"the package {package} with its {pattern} is not installed; install it with: pip install 'ppo-ray[demo]'"
    )
