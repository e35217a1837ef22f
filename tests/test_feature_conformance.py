"""Every feature on every device of this machine."""

from __future__ import annotations

import pytest

from metalgen.testing.features import FeatureConformance


class TestReference(FeatureConformance):
    name = "reference"


class TestKernels(FeatureConformance):
    """The kernels, on the device that --device names."""

    @pytest.fixture(autouse=True)
    def _choose(self, device: str) -> None:
        self.name = device
