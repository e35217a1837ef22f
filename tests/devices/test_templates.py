"""Families and features are written once: languages and matrix kinds have files of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metalgen.languages import LANGUAGES
from metalgen.resources import templates_dir

FOLDER = templates_dir()
ROOMS = ("families", "features", "shared")
SHARED = sorted(path for room in ROOMS for path in (FOLDER / room).iterdir())
SPELLED = r"\w*simdgroup_\w+|simd_\w+|threadgroup_barrier|__\w+|\w*ldmatrix\w*|mma_\w+|asm|bfloat"
"""What one of the targets alone can say."""


def code(path: Path) -> str:
    """A template without its comments, those of Jinja and those of the kernel."""
    text = re.sub(r"\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def test_there_are_the_families_and_features_that_are_looked_at() -> None:
    names = {path.stem for path in SHARED}
    assert {"forward", "combine", "append", "alibi", "paged", "dropout", "varlen"} <= names


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
