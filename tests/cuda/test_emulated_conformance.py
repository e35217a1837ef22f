"""The whole conformance suites on the emulated GPU: minutes, so `pytest -m slow tests/cuda`."""

from __future__ import annotations

import pytest
from emulated_cuda import EmulatedCuda

from metalgen.testing.backward import BackwardConformance
from metalgen.testing.devices import DeviceConformance
from metalgen.testing.features import FeatureConformance
from metalgen.testing.functions import FunctionConformance

pytestmark = pytest.mark.slow


class TestDevice(DeviceConformance):
    made = EmulatedCuda()


class TestFeatures(FeatureConformance):
    made = EmulatedCuda()


class TestFunctions(FunctionConformance):
    made = EmulatedCuda()


class TestBackward(BackwardConformance):
    made = EmulatedCuda()
