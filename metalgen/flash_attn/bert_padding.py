"""Padded batches as packed sequences, and back (``flash_attn.bert_padding``).

How many rows are packed decides a shape, so these functions wait for the mask, once each.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.flash_attn.arguments import array, integers


def index_first_axis(x: Any, indices: Any) -> mx.array:
    """Rows ``x[indices]``."""
    return array("x", x)[integers("indices", indices, 1)]


def index_put_first_axis(values: Any, indices: Any, first_axis_dim: int) -> mx.array:
    """Zeros with `values` in rows `indices`, ``(first_axis_dim, ...)``."""
    values = array("values", values)
    out = mx.zeros((first_axis_dim, *values.shape[1:]), values.dtype)
    return out.at[integers("indices", indices, 1)].add(values)


def index_first_axis_residual(x: Any, indices: Any) -> tuple[mx.array, mx.array]:
    """Rows ``x[indices]``, and `x`."""
    x = array("x", x)
    return index_first_axis(x, indices), x


def unpad_input(
    hidden_states: Any, attention_mask: Any, unused_mask: Any = None
) -> tuple[mx.array, mx.array, mx.array, int, mx.array]:
    """The rows of a padded batch that its mask keeps, one sequence after the other.

    Args:
        hidden_states: ``(B, L, ...)``.
        attention_mask: ``(B, L)``, booleans or integers: nonzero where a row is there.
        unused_mask: ``(B, L)``: nonzero where a row is allocated but not used; such rows are packed
            as well, and not counted in the last result.

    Returns:
        Rows ``(rows, ...)``; their indices in the flattened batch; starts of the sequences
        ``(B + 1,)``; the longest; and how many rows of each are used, ``(B,)``. Integers are int32.
    """
    hidden_states = array("hidden_states", hidden_states)
    used = _mask("attention_mask", attention_mask, hidden_states)
    there = used if unused_mask is None else used | _mask("unused_mask", unused_mask, hidden_states)
    lengths = there.sum(axis=1).astype(mx.int32)
    indices, longest = _where(there.reshape(-1), lengths)
    rows = hidden_states.reshape(-1, *hidden_states.shape[2:])[indices]
    return rows, indices, _starts(lengths), longest, used.sum(axis=1).astype(mx.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Any, attention_mask_in_length: Any
) -> tuple[mx.array, mx.array, mx.array, int]:
    """The same for a batch whose entries hold several short sequences each.

    Args:
        hidden_states: ``(B, L, ...)``.
        attention_mask_in_length: ``(B, L)`` integers: in each entry the lengths of its sequences,
            in order, then zeros.

    Returns:
        Rows, indices, starts of all sequences, and the longest, as `unpad_input`.
    """
    hidden_states = array("hidden_states", hidden_states)
    given = integers("attention_mask_in_length", attention_mask_in_length, 2)
    there = mx.arange(given.shape[1]) < given.sum(axis=1, keepdims=True)
    indices, _ = _where(there.reshape(-1), given.sum(axis=1))
    places, longest = _where((given > 0).reshape(-1), given.reshape(-1))
    lengths = given.reshape(-1)[places]
    rows = hidden_states.reshape(-1, *hidden_states.shape[2:])[indices]
    return rows, indices, _starts(lengths), longest


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> mx.array:
    """A padded batch of packed rows, ``(batch, seqlen, ...)``; zeros where no row is."""
    out = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return out.reshape(batch, seqlen, *out.shape[1:])


def _mask(name: str, mask: Any, rows: mx.array) -> mx.array:
    found = array(name, mask)
    if found.shape != rows.shape[:2]:
        raise ArgumentError(f"{name}.shape", f"{rows.shape[:2]}, as hidden_states has", found.shape)
    return found != 0


def _where(there: mx.array, lengths: mx.array) -> tuple[mx.array, int]:
    """Indices where `there` is true, ascending, and the greatest of some lengths: one wait."""
    count, longest = there.sum(), lengths.max() if lengths.size else mx.array(0)
    found: Any = mx.stack([count.astype(mx.int32), longest.astype(mx.int32)]).tolist()
    places = mx.where(there, mx.arange(there.size), there.size)
    return mx.sort(places)[: found[0]].astype(mx.int32), found[1]


def _starts(lengths: mx.array) -> mx.array:
    return mx.concatenate([mx.zeros((1,), mx.int32), mx.cumsum(lengths).astype(mx.int32)])
