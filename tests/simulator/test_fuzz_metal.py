"""Random legal Metal on the simulator against NumPy.

A sample by default; the sweep, `pytest -m slow tests/simulator/test_fuzz_metal.py`, makes programs for
20 minutes, or for as many seconds as METALGEN_FUZZ_SECONDS says.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metalgen.simulator import Output, record, run_metal

sys.path.insert(0, str(Path(__file__).parent))
from metal_programs import THREADS, Program, kernel

PROGRAMS = 6
"""Programs of one kernel: compiling costs more than running."""


def check(seed: int, checked: bool) -> None:
    random = np.random.default_rng(seed)
    inputs = random.integers(0, 256, THREADS).astype(np.int32)
    programs = [Program(seed * PROGRAMS + n, inputs) for n in range(PROGRAMS)]
    for program in programs:
        program.write(10)
    source, expected = kernel(programs)
    with record(checked=checked) as runs:
        outputs = run_metal(
            source,
            "k",
            {0: mx.array(inputs), 1: Output(expected.shape, mx.float32)},
            (THREADS, 1, 1),
            (32, 1, 1),
        )
    found = np.array(outputs[1])
    wrong = np.argwhere(found != expected)
    assert not wrong.size, f"seed {seed}: (thread, element) {wrong[0]} of\n{source}"
    assert not runs[0].findings, f"seed {seed}: {runs[0].findings.report()}"


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_have_the_values_of_numpy(seed: int) -> None:
    check(seed, checked=seed % 2 == 1)


@pytest.mark.slow
def test_random_programs_for_a_while() -> None:
    until = time.monotonic() + float(os.environ.get("METALGEN_FUZZ_SECONDS", "1200"))
    seed = 1000
    while time.monotonic() < until:
        check(seed, checked=seed % 4 == 0)
        seed += 1
    print(f"{seed - 1000} kernels of {PROGRAMS} programs")
