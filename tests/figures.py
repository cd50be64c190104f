"""The names of everything that a step reports: those of docs/diagnostics.md, which tests/repo holds to the code.

Names with a placeholder in capitals, such as `parts/NAME_mean`, are left out.
"""

import re
from pathlib import Path

_TEXT = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text()
_FIRST_COLUMNS = [line.split("|")[1] for line in _TEXT.splitlines() if line.startswith("| `")]

_NAMES = [name for cell in _FIRST_COLUMNS for name in re.findall(r"`([^`]+)`", cell)]

FIGURES = ["step", *(name for name in _NAMES if name == name.lower())]
