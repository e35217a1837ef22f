"""Configs that together use every feature; unlike the suites, this module does not need pytest."""

from __future__ import annotations

from typing import Any

FEATURES: dict[str, dict[str, Any]] = {
    "ALiBi": {"alibi": True, "causal": True},
    "ALiBi by sequence": {"alibi": True, "alibi_by_sequence": True, "varlen": True},
    "bias": {"bias": True},
    "array mask": {"array_mask": True, "causal": True},
    "sinks": {"sinks": True, "window_left": 9},
    "dropout": {"dropout": 0.3, "causal": True},
    "packed": {"varlen": True, "causal": True},
    "packed, with sinks": {"varlen": True, "sinks": True, "window_left": 20, "window_right": 3},
    "lengths": {"kv_lens": True, "causal": True},
    "starts": {"kv_starts": True, "causal": True},
    "starts, lengths and a window": {"kv_starts": True, "kv_lens": True, "window_left": 12},
    "starts in quantized pages": {
        "kv_starts": True,
        "page_size": 16,
        "kv_bits": 8,
        "kv_group": 32,
        "causal": True,
    },
    "queries that are used": {"seqused_q": True, "causal": True, "alibi": True},
    "used in packed sequences": {"seqused_q": True, "varlen": True, "window_left": 12},
    "offset": {"q_offset": True, "causal": True, "alibi": True, "dropout": 0.2},
    "offset in packed sequences": {"q_offset": True, "varlen": True, "window_left": 12},
    "pages": {"page_size": 16, "causal": True},
    "packed pages": {"page_size": 8, "varlen": True, "causal": True},
    "4 bits": {"kv_bits": 4, "kv_group": 32},
    "8 bits": {"kv_bits": 8, "kv_group": 64, "causal": True},
    "8-bit keys, 4-bit values": {
        "kv_bits": 8,
        "kv_group": 64,
        "value_bits": 4,
        "value_group": 32,
        "causal": True,
    },
    "4-bit keys, 8-bit values in pages": {
        "kv_bits": 4,
        "kv_group": 32,
        "value_bits": 8,
        "page_size": 16,
        "causal": True,
    },
    "quantized pages": {"kv_bits": 4, "kv_group": 64, "page_size": 24},
    "rotary, halves": {"rope": "half", "causal": True},
    "rotary, pairs in part": {"rope": "pairs", "rope_dims": 24, "kv_lens": True},
    "rotary at one position": {"rope": "half", "rope_fixed": True, "causal": True},
    "rotary by tables": {"rope": "half", "rope_tables": True, "causal": True},
    "deterministic": {"deterministic": True, "varlen": True, "causal": True},
    "everything on scores": {
        "softcap": 20.0,
        "alibi": True,
        "bias": True,
        "array_mask": True,
        "sinks": True,
        "dropout": 0.2,
        "causal": True,
    },
    "everything on keys": {
        "varlen": True,
        "page_size": 16,
        "kv_bits": 8,
        "kv_group": 32,
        "rope": "half",
        "sinks": True,
        "causal": True,
    },
}
BY_TILES: dict[str, dict[str, Any]] = {
    "array mask by tiles": {"array_mask": True, "block_mask": True},
    "array mask by tiles, causal": {"array_mask": True, "block_mask": True, "causal": True},
    "array mask by tiles, with lengths": {
        "array_mask": True,
        "block_mask": True,
        "kv_lens": True,
        "kv_starts": True,
        "q_offset": True,
        "window_left": 30,
    },
    "array mask by tiles, in pages": {"array_mask": True, "block_mask": True, "page_size": 16},
}
"""Configs that no decode kernel computes."""
WHERE: dict[str, dict[str, Any]] = {
    "packed": {"varlen": True, "causal": True, "return_lse": True},
    "lengths": {"kv_lens": True, "sinks": True, "rope": "half"},
    "starts": {"kv_starts": True, "window_left": 40},
    "queries that are used": {"seqused_q": True, "kv_lens": True, "rope": "half"},
    "starts in packed sequences": {"kv_starts": True, "varlen": True, "sinks": True},
    "starts in quantized rows": {"kv_starts": True, "kv_lens": True, "kv_bits": 4, "kv_group": 32},
    "pages": {"page_size": 8, "causal": True},
    "packed pages": {"page_size": 16, "varlen": True, "kv_bits": 8, "kv_group": 32},
}
"""Configs whose calls say where things are."""
WAYS = {"forward": ("forward", 1), "decode": ("decode", 1), "decode in 8": ("decode", 8)}
DTYPES = ("float16", "float32", "bfloat16")
