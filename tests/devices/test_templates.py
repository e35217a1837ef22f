"""Families and features are written once: targets differ in their tile libraries alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metalgen.languages import LANGUAGES
from metalgen.resources import templates_dir

FOLDER = templates_dir()
SHARED = sorted([*(FOLDER / "families").iterdir(), *(FOLDER / "features").iterdir()])
SPELLED = r"\w*simdgroup_\w+|simd_\w+|threadgroup_barrier|__\w+|\w*ldmatrix\w*|mma_\w+|asm|bfloat"
"""What one of the targets alone can say."""


def code(path: Path) -> str:
    """A template without its comments, those of Jinja and those of the kernel."""
    text = re.sub(r"\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def test_there_are_the_families_and_features_that_are_looked_at() -> None:
    names = {path.stem for path in SHARED}
    assert {"forward", "combine", "append", "window", "paged", "dropout", "varlen"} <= names


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_no_family_and_no_feature_knows_its_target(path: Path) -> None:
    text = code(path)
    names = "|".join([*LANGUAGES, "nvidia", "apple", "warp"])
    assert re.findall(rf"\b({names})\b", text, re.IGNORECASE) == []
    decided = re.findall(r"\{%-? *(?:el)?if ([^%]*)%\}", text)
    assert [found for found in decided if "target" in found or "limits" in found] == []


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_no_family_and_no_feature_says_what_one_target_alone_understands(path: Path) -> None:
    assert re.findall(rf"(?<![\w.])(?:{SPELLED})(?!\w)", code(path)) == []


def test_every_target_spells_the_same_operations() -> None:
    """Those that the families and features call; a macro of one library only is its own affair."""
    called = set(re.findall(r"\btile\.(\w+)\(", "".join(map(code, SHARED))))
    assert len(called) > 15
    for target in LANGUAGES:
        library = (FOLDER / "targets" / target / "tile.jinja").read_text()
        assert called - set(re.findall(r"\{%-? *macro (\w+)\(", library)) == set()
