"""What the pages about the ways in show runs, from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import metalgen

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "own-model",
    "flash-attn",
    "flex-attention",
    "how-a-kernel-comes-to-be",
    "your-own-attention",
    "distributed",
]


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    metalgen.uninstall()


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
