"""Where the calls of these tests run; lets them import `attention_calls` and `emulated_cuda`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metalgen.calls import resolve

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "cuda"))  # for `emulated_cuda`


@pytest.fixture(params=["reference", "kernel"])
def where(request: pytest.FixtureRequest, device: str) -> str:
    """Both ways: by plain MLX, and by the kernels of the device under test."""
    return "reference" if request.param == "reference" else device


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """What a device with kernels was asked for, its kernels computed."""
    resolve.forget_kernels()
    yield
    for kernel in resolve._known.values():
        assert (kernel.backend == "plain") == (kernel.device == "reference"), kernel.explain()
