"""Score and mask functions on every device of this machine."""

from __future__ import annotations

import pytest

from metalgen.testing.functions import FunctionConformance


class TestReference(FunctionConformance):
    name = "reference"


class TestKernels(FunctionConformance):
    """The Metal kernels, on the device that --device names."""

    @pytest.fixture(autouse=True)
    def _choose(self, device: str) -> None:
        self.name = device
