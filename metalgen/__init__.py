"""Writes, tunes and dispatches fused attention kernels for MLX.

    import metalgen

    out = metalgen.attention(q, k, v, causal=True)
    kernel = metalgen.get_kernel(metalgen.AttentionConfig(head_dim=64, causal=True))

Importing this package imports MLX and the standard library, nothing else; everything public is
resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:  # first, so that its absence is said before anything else
    import mlx.core  # noqa: F401
except ImportError as error:
    # Under Linux, `pip install metalgen` alone brings MLX without a back end.
    raise ImportError(
        f"metalgen needs MLX with a back end ({error}): pip install 'metalgen[cpu]', or on a "
        "machine with an NVIDIA GPU 'metalgen[cuda13]'"
    ) from None

from metalgen._version import __version__

if TYPE_CHECKING:
    from metalgen.caches.dense import KVCache
    from metalgen.caches.paged import CacheFull, PagedKVCache
    from metalgen.calls.kernel import Kernel
    from metalgen.calls.recording import Recording, record
    from metalgen.calls.resolve import get_kernel
    from metalgen.counters import Stats, reset_stats, stats
    from metalgen.errors import ArgumentError, DeviceError, InvalidSchedule, MetalgenError
    from metalgen.families import Schedule
    from metalgen.ops.alibi import alibi_slopes
    from metalgen.ops.append import append_kv
    from metalgen.ops.attention import attention, explain, varlen_attention
    from metalgen.ops.blocks import Gradients, attention_backward, merge
    from metalgen.ops.flex_attention import (
        AuxOutput,
        AuxRequest,
        and_masks,
        flex_attention,
        or_masks,
    )
    from metalgen.ops.installing import install, is_installed, uninstall
    from metalgen.ops.preparing import Prepared, prepare
    from metalgen.ops.sdpa import explain_sdpa, scaled_dot_product_attention
    from metalgen.problem.block_mask import (
        BlockMask,
        create_block_mask,
        create_mask,
        noop_mask,
    )
    from metalgen.problem.config import AttentionConfig
    from metalgen.problem.rope import Rope

_WHERE = {
    "ArgumentError": "metalgen.errors",
    "AttentionConfig": "metalgen.problem.config",
    "AuxOutput": "metalgen.ops.flex_attention",
    "AuxRequest": "metalgen.ops.flex_attention",
    "BlockMask": "metalgen.problem.block_mask",
    "CacheFull": "metalgen.caches.paged",
    "DeviceError": "metalgen.errors",
    "Gradients": "metalgen.ops.blocks",
    "InvalidSchedule": "metalgen.errors",
    "KVCache": "metalgen.caches.dense",
    "Kernel": "metalgen.calls.kernel",
    "MetalgenError": "metalgen.errors",
    "PagedKVCache": "metalgen.caches.paged",
    "Prepared": "metalgen.ops.preparing",
    "Recording": "metalgen.calls.recording",
    "Rope": "metalgen.problem.rope",
    "Schedule": "metalgen.families",
    "Stats": "metalgen.counters",
    "alibi_slopes": "metalgen.ops.alibi",
    "and_masks": "metalgen.ops.flex_attention",
    "append_kv": "metalgen.ops.append",
    "attention": "metalgen.ops.attention",
    "attention_backward": "metalgen.ops.blocks",
    "create_block_mask": "metalgen.problem.block_mask",
    "create_mask": "metalgen.problem.block_mask",
    "noop_mask": "metalgen.problem.block_mask",
    "explain": "metalgen.ops.attention",
    "explain_sdpa": "metalgen.ops.sdpa",
    "flex_attention": "metalgen.ops.flex_attention",
    "get_kernel": "metalgen.calls.resolve",
    "install": "metalgen.ops.installing",
    "is_installed": "metalgen.ops.installing",
    "merge": "metalgen.ops.blocks",
    "or_masks": "metalgen.ops.flex_attention",
    "prepare": "metalgen.ops.preparing",
    "record": "metalgen.calls.recording",
    "reset_stats": "metalgen.counters",
    "scaled_dot_product_attention": "metalgen.ops.sdpa",
    "stats": "metalgen.counters",
    "uninstall": "metalgen.ops.installing",
    "varlen_attention": "metalgen.ops.attention",
}

__all__ = [
    "ArgumentError",
    "AttentionConfig",
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "CacheFull",
    "DeviceError",
    "Gradients",
    "InvalidSchedule",
    "KVCache",
    "Kernel",
    "MetalgenError",
    "PagedKVCache",
    "Prepared",
    "Recording",
    "Rope",
    "Schedule",
    "Stats",
    "__version__",
    "alibi_slopes",
    "and_masks",
    "append_kv",
    "attention",
    "attention_backward",
    "create_block_mask",
    "create_mask",
    "explain",
    "explain_sdpa",
    "flex_attention",
    "get_kernel",
    "install",
    "is_installed",
    "merge",
    "noop_mask",
    "or_masks",
    "prepare",
    "record",
    "reset_stats",
    "scaled_dot_product_attention",
    "stats",
    "uninstall",
    "varlen_attention",
]


_ROOMS = ("flash_attn", "mlx_lm", "nn")
"""Subpackages that stand for themselves, so that ``metalgen.flash_attn`` needs no import."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"metalgen.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_ROOMS})
