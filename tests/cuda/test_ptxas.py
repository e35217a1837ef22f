"""What NVIDIA's assembler says of kernels of warp groups, where nvcc is installed; without a GPU.

Where it runs short of registers it makes warp-group products wait for each other (C7510, C7512),
and where it does not know a block's size it ignores `setmaxnreg` (C7508): such kernels are right,
and slow.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from metalgen.families import Limits, default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.source.render import KernelSource, render
from metalgen.testing.cases import FEATURES

LIMITS = Limits(232448, 1024, "cuda", ("wgmma",))
TYPES = {"q": "T", "k": "T", "v": "T", "dout": "T", "bias": "T", "array_mask": "bool", "out": "T"}
FLOATS = {"scale", "alibi_slopes", "sinks", "rope_freqs", "rope_cos", "rope_sin", "lse", "sums"}
FLOATS |= {"terms", "grad_sum", "sums_q"}
PRELUDE = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
typedef __nv_bfloat16 Element;
struct Shape { int x[8]; __device__ int operator[](int n) const { return x[n]; } };
struct Strides { int64_t x[8]; __device__ int64_t operator[](int n) const { return x[n]; } };
"""
"""What MLX writes before a kernel, as far as kernels see it."""
SLOW = re.compile(r"C7508|C7510|C7512")


def program(source: KernelSource) -> str:
    """A kernel with a signature such as MLX's."""
    parameters = []
    for name in source.inputs:
        kind = TYPES.get(name, "float" if name in FLOATS else "int").replace("T", "Element")
        parameters.append(f"const {kind}* {name}")
        for fact in ("Shape", "Strides"):
            if f"{name}_{fact.lower()}" in source.source:
                parameters.append(f"const __grid_constant__ {fact} {name}_{fact.lower()}")
    for name in source.outputs:
        parameters.append(f"{'float' if name in FLOATS else 'Element'}* {name}")
    head = f'extern "C" __global__ void kernel({", ".join(parameters)})'
    return f"{PRELUDE}{source.header}\n{head} {{\n{source.source}\n}}\n"


def assembled(config: AttentionConfig, folder: Path) -> str:
    """What nvcc prints of the default schedule's kernel."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    schedule = default_schedule(config, LIMITS)
    assert schedule.kind == "wgmma"
    path = folder / "kernel.cu"
    path.write_text(program(render(config, schedule)))
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = [
        "nvcc",
        "-std=c++17",
        target,
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        "kernel.cubin",
        path.name,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 128, "softcap": 50.0},
        {"head_dim": 256, "causal": True},
    ],
    ids=str,
)
def test_products_are_not_made_to_wait(fields: dict[str, Any], tmp_path: Path) -> None:
    found = assembled(AttentionConfig(dtype="bfloat16", **fields), tmp_path)
    assert "registers" in found
    assert not SLOW.search(found), found


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("name", [name for name in FEATURES if "kv_bits" not in FEATURES[name]])
def test_no_feature_makes_products_wait(name: str, dim: int, tmp_path: Path) -> None:
    config = AttentionConfig(dim, "bfloat16", heads_per_kv=2, **FEATURES[name])
    found = assembled(config, tmp_path)
    assert not SLOW.search(found), found
