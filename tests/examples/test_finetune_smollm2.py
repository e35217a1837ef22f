"""The training example: the same losses with every attention, and a run that goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--random", "--vocabulary", "256", "--layers", "2", "--steps", "2", "--length", "80"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("finetune_smollm2", None)
    import finetune_smollm2  # type: ignore[import-not-found]

    return finetune_smollm2


def losses(example: Any, *options: str) -> list[float]:
    found: list[float] = example.train(example.parser().parse_args([*SMALL, *options]))
    return found


@pytest.mark.parametrize(
    "options",
    [[], ["--mode", "full", "--softcap", "20", "--window", "40"]],
    ids=["LoRA", "full, softcap and window"],
)
def test_losses_are_those_of_mlx_and_fall(example: Any, options: list[str]) -> None:
    """On the simulator softcaps and windows are differentiated by backward kernels."""
    by_mlx = losses(example, "--attention", "mlx", *options)
    by_kernels = losses(example, "--device", "simulator", "--checkpoint", *options)
    assert by_mlx == pytest.approx(by_kernels, abs=1e-3)
    assert by_mlx[1] < by_mlx[0]


def test_a_run_goes_on_from_what_it_saved(example: Any, tmp_path: Path) -> None:
    kept, curve = tmp_path / "run.safetensors", tmp_path / "losses.svg"
    options = ["--device", "reference"]
    whole = losses(example, *options, "--steps", "3")
    losses(example, *options, "--steps", "2", "--save", str(kept))
    again = losses(
        *(example, *options, "--steps", "1"), "--resume", str(kept), "--picture", str(curve)
    )
    assert again == pytest.approx(whole, abs=1e-5)
    assert curve.read_text(encoding="utf-8").count("<svg") == 1
