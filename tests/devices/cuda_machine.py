"""A machine with an NVIDIA GPU, made up: what MLX says of it, and kernels that run or do not.

Its kernels compute by MLX's own operations whatever their source says, so that tests can tell what
is done *about* a kernel that fails. A kernel that is not launched hands out what it was given, as
MLX does: memory that still holds the right answer of an earlier kernel, or the initial value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import pytest

from metalgen import chips
from metalgen.append.launch import plain_rows
from metalgen.problem.config import AttentionConfig
from metalgen.reference import attention_mlx, config_features

Compute = Callable[[Sequence[mx.array], Sequence[Sequence[int]]], list[mx.array]]


@dataclasses.dataclass
class CudaMachine:
    """What `mx.fast.cuda_kernel` is there.

    Args:
        config: of every call; causal or not, nothing else.
        unlaunched: parts of names of kernels that are not launched.
        broken: what MLX raises when a kernel is run, by part of its name.
    """

    config: AttentionConfig
    unlaunched: tuple[str, ...] = ()
    broken: Mapping[str, str] = dataclasses.field(default_factory=dict)
    launched: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def cuda_kernel(
        self, *, name: str, input_names: Sequence[str], output_names: Sequence[str], **_: object
    ) -> Callable[..., list[mx.array]]:
        """A kernel, by its name."""

        def call(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            init_value: float | None = None,
        ) -> list[mx.array]:
            self.launched.append({"name": name, "grid": grid, "threads": threadgroup[0]})
            for part, message in self.broken.items():
                if part in name:
                    raise RuntimeError(message)
            shapes = list(zip(output_shapes, output_dtypes, strict=True))
            if init_value is not None and any(part in name for part in self.unlaunched):
                return [mx.full(shape, init_value).astype(dtype) for shape, dtype in shapes]
            given = dict(zip(input_names, inputs, strict=True))
            # Several splits, or warps that share out keys, leave an output each: one more axis.
            parts = output_shapes[0][0] if len(output_shapes[0]) == 5 else 1
            found = self._right(name, given, output_names, parts)
            return [
                mx.broadcast_to(x, shape).astype(dtype)
                for x, (shape, dtype) in zip(found, shapes, strict=True)
            ]

        return call

    def _right(
        self, name: str, given: dict[str, mx.array], outputs: Sequence[str], parts: int
    ) -> list[mx.array]:
        if "append" in name:
            rows = plain_rows(self.config, given)
            return [rows[output] for output in outputs]
        if "combine" in name:
            # The parts are alike, as below; NaN in any of them stays NaN.
            count = len(given["parts"])
            exponents, sums = (given["sums"].sum(axis=0)[..., n] / count for n in (0, 1))
            lse = 2 * math.log(2) * exponents + mx.log(count * sums)
            return [given["parts"].sum(axis=0) / count, lse][: len(outputs)]
        dtype = getattr(mx, self.config.dtype)
        q, k, v = (given[x] for x in "qkv")
        assert q.dtype == dtype
        scale = float(given["scale"][0].item()) / 1.4426950408889634
        features = config_features(dataclasses.replace(self.config, return_lse=True))
        out, lse = attention_mlx(q, k, v, scale=scale, **features)
        assert lse is not None
        if "sums" in outputs:  # every part has the same share of each key: all have the same rows
            half = lse / (2 * math.log(2))
            return [out, mx.stack([half, mx.full(lse.shape, 1 / parts)], axis=-1)]
        return [out, lse][: len(outputs)]


def use_cuda(
    monkeypatch: pytest.MonkeyPatch,
    machine: CudaMachine,
    capability: tuple[int, int] | None = (9, 0),
) -> None:
    """Make MLX a CUDA one, on `machine`; with no capability on one without a GPU."""
    info = {}
    if capability is not None:
        info["device_name"] = "NVIDIA H200"
        info["compute_capability_major"], info["compute_capability_minor"] = capability
    monkeypatch.setattr(chips, "detect", lambda: None)  # it would be remembered
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=None: info)
    monkeypatch.setattr(mx.fast, "cuda_kernel", machine.cuda_kernel)
