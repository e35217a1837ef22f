"""What the conformance suites share: a device by its name."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from metalgen import devices
from metalgen.devices import Device
from metalgen.devices.marking import marked_outputs
from metalgen.kinds import kinds_in


class OnDevice:
    """Tests of one device; `name` is all that a subclass must set.

    Attributes:
        name: of a device that metalgen knows.
        made: instead of a name, a device that it does not know; it is listed while a test runs.
    """

    name: str
    made: Device | None = None

    @pytest.fixture(autouse=True)
    def _list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.made is not None:
            self.name = self.made.name
            monkeypatch.setitem(devices._DEVICES, self.name, self.made)

    @pytest.fixture(autouse=True)
    def _mark(self) -> Iterator[None]:
        """What an earlier kernel left in memory is never taken for an output."""
        with marked_outputs():
            yield

    @functools.cached_property
    def device(self) -> Device:
        """The device; where it is not available here, the test is skipped with the reason."""
        device = devices._DEVICES[self.name]
        reason = device.unavailable()
        if reason:
            pytest.skip(f"device {self.name}: {reason}")
        return device

    def require(self, dtype: str) -> None:
        """Skip the test where the device's target has no kernels of a type."""
        target = self.device.limits.language
        if dtype not in kinds_in(target)[0].dtypes:
            pytest.skip(f"{target} has no {dtype} kernels")
