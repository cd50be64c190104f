"""The linters that come as Python packages: binaries beside this Python."""

import subprocess
import sys
from pathlib import Path


def lint(name: str, *arguments: str | Path, text: str | None = None) -> str:
    """Run shellcheck or hadolint, on files or on a text as its input; returns what it complains about."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments), *(["-"] if text is not None else [])]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert result.returncode == (1 if result.stdout else 0), result.stderr
    return result.stdout
