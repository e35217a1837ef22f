"""Hooks of MkDocs: files of the repository that pages link to are part of the site, too.

A page says `../CONTRIBUTING.md`, which is right in a checkout. On the site such a file lies under
`repo/`: Markdown as a page, anything else as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
"""A link from a page to a file of the repository outside of `docs/`."""
OWN = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
"""A link to a file in a page that stands at the top of the repository."""
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "README.md")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to, and the pages at the top of the repository."""
    named = {*PAGES}
    for page in (ROOT / "docs").glob("*.md"):
        named.update(OUTSIDE.findall(page.read_text(encoding="utf-8")))
    for name in PAGES:
        found = OWN.findall((ROOT / name).read_text(encoding="utf-8"))
        named.update(x for x in found if not x.startswith("docs/"))
    for name in sorted(named):
        path = ROOT / name
        if path.is_dir():
            continue
        text = path.read_text(encoding="utf-8")
        files.append(File.generated(config, f"repo/{name}", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to where the files lie on the site."""
    source = page.file.src_uri
    if not source.startswith("repo/"):
        return OUTSIDE.sub(r"](repo/\1", markdown)
    depth = source.count("/") - 1

    def moved(match: re.Match[str]) -> str:
        target = match.group(1)
        if depth:
            return match.group(0)
        return (
            f"](../{target.removeprefix('docs/')}" if target.startswith("docs/") else match.group(0)
        )

    return OWN.sub(moved, markdown)
