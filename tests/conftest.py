"""What every test shares: the choice of the device that executes kernels."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from metalgen.devices.marking import marked_outputs

DEVICES = ("simulator", "metal", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=DEVICES,
        default="simulator",
        help="what executes the kernels of tests that run on any device (default: simulator)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore Ctrl-C, which tests send, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = config.getoption("--device")
    if name != "simulator":
        from metalgen.devices import all_devices

        reason = {device.name: device for device in all_devices()}[name].unavailable()
        if reason:
            raise pytest.UsageError(f"--device {name}: {reason}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Name of the device under test, for `metalgen.get_kernel` and `metalgen.attention`."""
    return str(request.config.getoption("--device"))


@pytest.fixture
def the_simulator() -> str:
    """Its name, for tests that run on no other device; where it is missing they are skipped."""
    from metalgen.devices import all_devices

    own = {device.name: device for device in all_devices()}["simulator"]
    if reason := own.unavailable():
        pytest.skip(f"device simulator: {reason}")
    return own.name


@pytest.fixture(autouse=True)
def own_database(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a user database of its own, absent at first; it never sees the user's."""
    path = tmp_path_factory.mktemp("database") / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    return path


@pytest.fixture(autouse=True)
def marked() -> Iterator[None]:
    """No test takes what an earlier kernel left in a GPU's memory for an output."""
    with marked_outputs():
        yield
