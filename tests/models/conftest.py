"""mlx-lm's models, also where what its programs need is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for `zoo`


FOUND = importlib.util.find_spec("mlx_lm")
if FOUND and importlib.util.find_spec("transformers") is None and "mlx_lm" not in sys.modules:
    package = types.ModuleType("mlx_lm")
    package.__path__ = list(FOUND.submodule_search_locations or [])
    package.__spec__ = FOUND  # which importlib asks for
    sys.modules["mlx_lm"] = package


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Whatever a test does, the next one finds mlx-lm as it was."""
    yield
    from metalgen.mlx_lm import unpatch

    unpatch()
