"""Lets these tests import `flash_cases` from anywhere, and starts each with nothing known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metalgen
from metalgen.calls import resolve

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No kernel, no count and no installed function is left of an earlier test."""
    resolve.forget_kernels()
    metalgen.reset_stats()
    yield
    metalgen.uninstall()
    resolve.forget_kernels()
