"""What every test shares: the choice of the device that executes kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

DEVICES = ("simulator", "metal")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=DEVICES,
        default="simulator",
        help="what executes the kernels of tests that run on any device (default: simulator)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "metal":
        import mlx.core as mx

        if not mx.metal.is_available():
            raise pytest.UsageError("--device metal: MLX finds no Apple GPU on this machine")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Name of the device under test, for `metalgen.get_kernel` and `metalgen.attention`."""
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def own_database(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a user database of its own, absent at first; it never sees the user's."""
    path = tmp_path_factory.mktemp("database") / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    return path
