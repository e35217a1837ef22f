"""The conformance suite, on every device of this machine."""

from __future__ import annotations

import pytest

from metalgen.testing.devices import DeviceConformance


class TestReference(DeviceConformance):
    name = "reference"


class TestKernels(DeviceConformance):
    """The Metal kernels, on the device that --device names."""

    @pytest.fixture(autouse=True)
    def _choose(self, device: str) -> None:
        self.name = device
