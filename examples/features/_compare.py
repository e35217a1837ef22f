"""What the examples share: where to run, and how far two results are apart."""

from __future__ import annotations

import sys

import mlx.core as mx

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "simulator"
"""The kernels run in the simulator, or on the device that the command line names."""


def normal(*shape: int, seed: int, dtype: mx.Dtype = mx.float16) -> mx.array:
    """Random numbers, the same at each run."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def report(what: str, out: mx.array, expected: mx.array) -> None:
    """Say how far an output is from what it should be; fail where that is not rounding alone."""
    a, b = out.astype(mx.float32), expected.astype(mx.float32)
    error = float(mx.linalg.norm(a - b) / mx.linalg.norm(b))
    print(f"{what}: {out.shape}, relative error {error:.1e} (device {DEVICE!r})")
    if not error < 2e-3:
        sys.exit("that is too much")
