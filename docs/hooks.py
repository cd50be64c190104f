"""Hooks of MkDocs: README is the site's first page, and links out of docs/ lead to the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\[(?:[^\]\[]|\[[^\]]*\])*\])\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add README as the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to files that are no part of the site to the repository; without its address they become text."""
    folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"

    def lead(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if files.get_file_from_path(match[2]) is not None or not path.exists():
            return match[0]
        address = f"{config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT)}" if config.repo_url else ""
        return f"{match[1]}({address})" if address else match[1][1:-1]

    return _LINK.sub(lead, markdown)
