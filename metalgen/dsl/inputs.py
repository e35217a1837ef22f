"""What a call brings for the functions of its config: captured arrays, and a block mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.dsl.graph import Graph, parse
from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from metalgen.block_mask import BlockMask
    from metalgen.config import AttentionConfig


@dataclass(frozen=True, eq=False)
class FunctionInputs:
    """Captured arrays of a config's score and mask functions, and the block mask.

    Their types and shapes are those in the config's graphs; their contents may change.
    """

    score: tuple[mx.array, ...] = ()
    mask: tuple[mx.array, ...] = ()
    blocks: BlockMask | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All captured arrays: of the score, then of the mask."""
        return self.score + self.mask

    def replaced(self, arrays: tuple[mx.array, ...]) -> FunctionInputs:
        """The same with other captured arrays, in the order of `arrays`."""
        count = len(self.score)
        return FunctionInputs(arrays[:count], arrays[count:], self.blocks)


NOTHING = FunctionInputs()


def check_inputs(config: AttentionConfig, inputs: FunctionInputs, q: mx.array, k: mx.array) -> None:
    """Whether a call's inputs fit its config and its arrays.

    Raises:
        ArgumentError: naming the first that does not.
    """
    for name, text, arrays in (
        ("score_mod", config.score_mod, inputs.score),
        ("mask_mod", config.mask_mod, inputs.mask),
    ):
        expected = parse(text).arrays if text is not None else ()
        found = [(str(a.dtype).removeprefix("mlx.core.").rstrip("_"), a.shape) for a in arrays]
        if found != [(a.dtype, a.shape) for a in expected]:
            wanted = ", ".join(f"{a.dtype}{list(a.shape)}" for a in expected) or "none"
            raise ArgumentError(name, f"these captured arrays: {wanted}", found)
    blocks = inputs.blocks
    if config.block_mask != (blocks is not None):
        expected_blocks = "a BlockMask" if config.block_mask else "None"
        raise ArgumentError("block_mask", f"{expected_blocks}, as the config says", blocks)
    if blocks is None:
        return
    if (blocks.q_len, blocks.kv_len) != (q.shape[2], k.shape[2]):
        wanted = f"one made for {q.shape[2]} queries and {k.shape[2]} keys"
        raise ArgumentError("block_mask", wanted, blocks)
    for name, own, given in (
        ("batch", q.shape[0], blocks.batch),
        ("heads", q.shape[1], blocks.heads),
    ):
        if given not in (1, own):
            raise ArgumentError("block_mask", f"one of {name} {own} or 1", blocks)


def synthetic_inputs(
    config: AttentionConfig, batch: int, heads: int, q_len: int, kv_len: int, seed: int
) -> FunctionInputs:
    """Inputs for checking a kernel: normal floats, small integers, and the mask's own blocks."""
    if config.score_mod is None and config.mask_mod is None:
        return NOTHING
    from metalgen.block_mask import BlockMask, _computed
    from metalgen.dsl.trace import Traced

    graphs: dict[str, Graph] = {}
    arrays: dict[str, tuple[mx.array, ...]] = {"score": (), "mask": ()}
    for role, text in (("score", config.score_mod), ("mask", config.mask_mod)):
        if text is not None:
            graphs[role] = parse(text)
            seeds = range(seed, seed + len(graphs[role].arrays))
            arrays[role] = tuple(
                _synthetic(a.dtype, a.shape, s)
                for a, s in zip(graphs[role].arrays, seeds, strict=True)
            )
    blocks = None
    if config.block_mask:
        traced = Traced(graphs["mask"], arrays["mask"])
        some, every = _computed(traced, batch, heads, q_len, kv_len, 8, 8)
        blocks = BlockMask(traced, q_len, kv_len, (8, 8), some, every)
    return FunctionInputs(arrays["score"], arrays["mask"], blocks)


def _synthetic(dtype: str, shape: tuple[int, ...], seed: int) -> mx.array:
    key = mx.random.key(1000 + seed)
    kind: Any = getattr(mx, "bool_" if dtype == "bool" else dtype)
    if "float" in dtype:
        return mx.random.normal(shape, key=key).astype(kind)
    return mx.random.randint(0, 2 if dtype == "bool" else 4, shape, key=key).astype(kind)
