"""mlx-lm's models, also where what its programs need is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for `zoo`


@pytest.fixture(scope="session", autouse=True)
def mlx_lm() -> None:
    """Makes ``mlx_lm.models`` importable; without transformers, around the package's top."""
    found = importlib.util.find_spec("mlx_lm")
    if found is None:
        pytest.skip("mlx-lm is not installed (pip install --no-deps mlx-lm==0.32.2)")
    if importlib.util.find_spec("transformers") is None and "mlx_lm" not in sys.modules:
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules["mlx_lm"] = package


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Whatever a test does, the next one finds mlx-lm as it was."""
    yield
    from metalgen.mlx_lm import unpatch

    unpatch()
