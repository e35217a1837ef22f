"""The languages that kernels are written in, as far as schedules must know them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a target's matrix instructions and memory fix for a schedule.

    Args:
        name: ``"metal"`` or ``"cuda"``.
        row_block: query rows of one block: of an 8x8 simdgroup matrix, of a 16x8x16 ``mma``.
        depth: keys and columns that one instruction contracts; lengths are padded to it.
        buffers: most staging buffers.
        threads: most threads of a threadgroup. An NVIDIA GPU has 65,536 registers for a block: from
            257 threads on a kernel may need more, and then it is not launched.
        dtypes: the types that it has kernels for.
        bytes: whether kernels take rows (of Q, of keys) as bytes: MLX then copies an array whose
            last axis has gaps, and no other. Else they read across gaps themselves.
        choices: the only values that these fields of a schedule may take.
    """

    name: str
    row_block: int
    depth: int
    buffers: int
    threads: int
    dtypes: tuple[str, ...]
    bytes: bool
    choices: tuple[tuple[str, tuple[object, ...]], ...] = ()


METAL = Target(
    "metal",
    row_block=8,
    depth=8,
    buffers=2,
    threads=1024,
    dtypes=("float32", "float16", "bfloat16"),
    bytes=True,
    choices=(("key_simdgroups", (1,)),),
)
CUDA = Target(
    "cuda",
    row_block=16,
    depth=16,
    buffers=4,
    threads=256,
    dtypes=("float32", "float16", "bfloat16"),
    bytes=False,
    choices=(
        ("k_source", ("threadgroup",)),
        ("v_source", ("threadgroup",)),
        ("load_width", (8,)),
        ("fragment", ("input",)),
        ("math_mode", ("safe",)),
    ),
)
TARGETS = {target.name: target for target in (METAL, CUDA)}
