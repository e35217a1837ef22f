"""A kernel that an NVIDIA GPU does not launch, on a real one: MLX says nothing, and we do."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import dataclasses
from metalgen.problem.config import AttentionConfig
from metalgen import targets
from metalgen.devices import get_device
from metalgen.families import Schedule
from metalgen.kinds import MMA
from metalgen.calls.verify import verify

device, config = get_device("cuda"), AttentionConfig(128, "bfloat16")
wide = Schedule(
    bq=256, bk=32, bd=128, simdgroups=8, row_blocks=2, q_source="threadgroup", buffers=2, kind="mma"
)
assert verify(device, config, wide).ok
# Twice the threads, as no schedule may have: more than half of a block's registers each.
MMA.threads = 512
wider = dataclasses.replace(wide, bq=512, simdgroups=16)
try:
    print(verify(device, config, wider).detail)
except RuntimeError as error:
    print("MLX says:", error)
"""


def test_a_kernel_that_needs_too_many_registers_does_not_pass_its_check(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs --device cuda")
    # In a process of its own: nothing may run after it.
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "as where nothing is launched" in done.stdout or "MLX says:" in done.stdout
