"""Entries of other packages, where they are installed: mlx-mfa, and PyTorch on its own device.

Each is checked like every other entry before it is timed, so a changed interface shows as a failure
with its reason, never as a number. PyTorch's arrays are made from the same numbers; its calls wait
for one another as ours do, and it is timed by the same clock.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.bench.entries import Absent, Entry, Found, definition, sample_set
from metalgen.bench.work import Work
from metalgen.calls.verify import tolerance_of
from metalgen.errors import ArgumentError
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs

AGAINST = ("mlx-mfa", "torch", "flex")
"""What ``--against`` takes: the package mlx-mfa, PyTorch's fused attention, its FlexAttention."""


def foreign_entries(work: Work, against: tuple[str, ...]) -> list[Found]:
    """The packages asked for, or why they take no part.

    Raises:
        ArgumentError: a package that is not known.
    """
    found: list[Found] = []
    for name in against:
        if name not in AGAINST:
            raise ArgumentError("--against", f"one of {', '.join(AGAINST)}", name)
        make = {"mlx-mfa": _mfa, "torch": _torch, "flex": _flex}[name]
        module = "mlx_mfa" if name == "mlx-mfa" else "torch"
        if importlib.util.find_spec(module) is None:
            found.append(Absent(name, f"{module} is not installed"))
        elif work.kind != "attention" or work.train:
            found.append(Absent(name, "only the forward pass of the operation is compared"))
        else:
            found.append(make(work))
    return found


def _uses_only(config: AttentionConfig, *allowed: str) -> bool:
    always = {"head_dim", "dtype", "heads_per_kv", "return_lse"}
    used = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    return used <= always | set(allowed)


def _mfa(work: Work) -> Found:
    """``mlx_mfa.flash_attention(q, k, v, scale=, causal=)``, as its documentation has it."""
    config = work.config
    if not _uses_only(config, "causal"):
        return Absent("mlx-mfa", "its function does not take these features")
    from mlx_mfa import flash_attention  # type: ignore[import-not-found]

    def call(q: mx.array, k: mx.array, v: mx.array, inputs: Inputs) -> mx.array:
        out: mx.array = flash_attention(q, k, v, scale=config.head_dim**-0.5, causal=config.causal)
        return out

    return Entry("mlx-mfa", call, sample_set, definition(config), tolerance_of(config))


@dataclasses.dataclass(frozen=True)
class _Torch:
    """PyTorch's arrays of a call, behind the same interface as MLX's."""

    q: Any
    k: Any
    v: Any


def _torch_device() -> str | None:
    import torch  # type: ignore[import-not-found]

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return None


def _torch(work: Work) -> Found:
    """``scaled_dot_product_attention``, by whichever of its backends PyTorch selects."""
    config = work.config
    if not _uses_only(config, "causal"):
        return Absent("torch", "its function does not take these features")
    import torch

    causal, grouped = config.causal, config.heads_per_kv > 1
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=grouped)

    def call(q: Any, k: Any, v: Any) -> Any:
        if not causal or q.shape[2] == 1:
            return attend(q, k, v)
        if q.shape[2] == k.shape[2]:
            return attend(q, k, v, is_causal=True)
        own = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
        return attend(q, k, v, attn_mask=torch.arange(k.shape[2], device=q.device) <= own)

    return _of_torch("torch", work, call)


def _flex(work: Work) -> Found:
    """FlexAttention, compiled, with the score function and the block mask of the config."""
    config = work.config
    if not _uses_only(config, "causal", "window_left", "softcap"):
        return Absent("flex", "these features are not written for it here")
    import torch
    from torch.nn.attention.flex_attention import (  # type: ignore[import-not-found]
        create_block_mask,
        flex_attention,
    )

    cap, left = config.softcap, config.window_left
    compiled = torch.compile(flex_attention)
    masks: dict[tuple[int, int], Any] = {}

    def score(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return x if cap is None else cap * torch.tanh(x / cap)

    def call(q: Any, k: Any, v: Any) -> Any:
        sizes = q.shape[2], k.shape[2]
        if config.causal and sizes not in masks:
            offset = sizes[1] - sizes[0]

            def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
                kept = j <= i + offset
                return kept if left is None else kept & (j >= i + offset - left)

            masks[sizes] = create_block_mask(mask, None, None, *sizes, device=str(q.device))
        return compiled(
            *(q, k, v),
            score_mod=None if cap is None else score,
            block_mask=masks.get(sizes),
            enable_gqa=config.heads_per_kv > 1,
        )

    return _of_torch("flex", work, call)


def _of_torch(name: str, work: Work, attend: Callable[[Any, Any, Any], Any]) -> Found:
    import torch

    device = _torch_device()
    if device is None:
        return Absent(name, "PyTorch has no GPU here")
    config = work.config
    synchronize = torch.cuda.synchronize if device == "cuda" else torch.mps.synchronize

    def make(work: Work, seed: int) -> tuple[Any, ...]:
        q, k, v, inputs = sample_set(work, seed)
        dtype = getattr(torch, config.dtype)
        made = [
            torch.from_numpy(np.array(x.astype(mx.float32))).to(device=device, dtype=dtype)
            for x in (q, k, v)
        ]
        return (*made, (q, k, v, inputs))

    def outputs(q: Any, k: Any, v: Any, given: Any) -> mx.array:
        return mx.array(attend(q, k, v).float().cpu().numpy())

    def call(q: Any, k: Any, v: Any, given: Any) -> Any:
        return attend(q, k, v)

    def run(sets: Any, launches: int, first: int) -> None:
        out = None
        for n in range(launches):
            q, k, v, _ = sets[(first + n) % len(sets)]
            same = out is not None and out.shape == q.shape
            out = attend(out if same else q, k, v)
        synchronize()

    return Entry(
        *(name, call, make, lambda given: definition(config)(given[3]), tolerance_of(config)),
        outputs=outputs,
        run=run,
    )
