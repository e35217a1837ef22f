"""Lets these tests import `peer_cases` from anywhere, and watches what computed their calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metalgen.calls import resolve

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def own_kernels() -> Iterator[None]:
    """Kernels of the device under test computed all calls; none fell back."""
    resolve.forget_kernels()
    yield
    for kernel in resolve._known.values():
        assert kernel.backend == ("plain" if kernel.device == "reference" else "metalgen"), (
            kernel.explain()
        )
