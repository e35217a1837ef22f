"""The plain fields of a config, which features read; `metalgen.AttentionConfig` checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""The types of queries, keys, values and output, with their bytes per element."""


@dataclass(frozen=True)
class Fields:
    """What one attention problem consists of; `metalgen.AttentionConfig` documents each field.

    ``others`` holds the values of fields that features from outside of metalgen declare, as pairs
    of name and value in the order of their names, without those at their default.
    """

    head_dim: int
    dtype: str = "float16"
    value_head_dim: int | None = None
    heads_per_kv: int = 1
    causal: bool = False
    return_lse: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    score_mod: str | None = None
    mask_mod: str | None = None
    block_mask: bool = False
    alibi: bool = False
    bias: bool = False
    array_mask: bool = False
    sinks: bool = False
    dropout: float = 0.0
    varlen: bool = False
    kv_lens: bool = False
    page_size: int | None = None
    kv_bits: int | None = None
    kv_group: int = 64
    rope: str | None = None
    rope_dims: int | None = None
    deterministic: bool = False
    tf32: bool = False
    max_work: int | None = None
    kv_starts: bool = False
    q_offset: bool = False
    seqused_q: bool = False
    alibi_by_sequence: bool = False
    rope_fixed: bool = False
    value_bits: int | None = None
    value_group: int | None = None
    rope_tables: bool = False
    others: tuple[tuple[str, Any], ...] = field(default=(), kw_only=True)

    features: ClassVar[tuple[Any, ...]] = ()
    """The features that a checked config uses, in their order."""

    @property
    def v_dim(self) -> int:
        """Width of a value and output row."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def v_bits(self) -> int | None:
        """Bits of an element of quantized values; None: they are not quantized."""
        return self.kv_bits if self.value_bits is None else self.value_bits

    @property
    def v_group(self) -> int:
        """Columns of quantized values that share a scale and a bias."""
        return self.kv_group if self.value_group is None else self.value_group

    @property
    def kv_row_bytes(self) -> float:
        """Bytes of the elements of a key and its value, without scales and biases."""
        if self.kv_bits is None or self.v_bits is None:
            return (self.head_dim + self.v_dim) * self.itemsize
        return (self.head_dim * self.kv_bits + self.v_dim * self.v_bits) / 8

    @property
    def quantized_apart(self) -> bool:
        """Whether values are quantized otherwise than keys."""
        return self.value_bits is not None or self.value_group is not None

    @property
    def rotary_dim(self) -> int:
        """Columns of a query that a rotary embedding rotates."""
        return self.head_dim if self.rope_dims is None else self.rope_dims

    @property
    def has_lengths(self) -> bool:
        """Whether calls bring the number of keys of each sequence as `kv_lens`."""
        return self.kv_lens or self.page_size is not None

    @property
    def differs_by_sequence(self) -> bool:
        """Whether sequences of a call differ in more than their rows."""
        places = self.varlen or self.has_lengths or self.kv_starts or self.q_offset
        return places or self.seqused_q or self.alibi_by_sequence

    @property
    def itemsize(self) -> int:
        """Bytes of one element of Q, K, V and O."""
        return DTYPES[self.dtype]
