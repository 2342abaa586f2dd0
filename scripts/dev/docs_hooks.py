"""What MkDocs is told beside mkdocs.yml: names of headings, and links that leave docs/."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:]+)\)")


def _slug(text: str, separator: str) -> str:
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", separator)


def on_config(config: Any) -> Any:
    """Let links to headings hold in the site as they do in the repository."""
    config.mdx_configs["toc"]["slugify"] = _slug
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository outside of docs/ into their names."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        return f"{match[1]} (`{path[3:]}`)" if path.startswith("../") else match[0]

    return _LINK.sub(inside, markdown)
