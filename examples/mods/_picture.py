"""Draws a mask and a score as a PNG: one panel a head, keys from left to right, queries downwards.

Grey keys are not seen; the others go from blue (the score is lowered) over white to red (it is
raised), from a raw score of 1. The lines are the blocks of the block mask: a dark block is skipped.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

import metalgen

PIXELS = 3
GAP = 8


def save(
    script: str,
    *,
    score_mod: Callable[..., mx.array] | None = None,
    mask_mod: Callable[..., mx.array] | None = None,
    blocks: metalgen.BlockMask | None = None,
    heads: int = 1,
    length: int = 128,
    raw: mx.array | None = None,
) -> None:
    """Write the picture to the first argument of the command line, or beside where it is run."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else f"{Path(script).stem}.png")
    if path.suffix != ".png":
        sys.exit(f"picture: expected the name of a .png file, but got {str(path)!r}")
    i, j = mx.arange(length)[:, None], mx.arange(length)
    start = mx.ones((length, length)) if raw is None else raw
    scores, masks = [], []
    for head in range(heads):
        b, h = mx.array(0), mx.array(head)
        score = score_mod(start, b, h, i, j) - start if score_mod else mx.zeros(start.shape)
        score = mx.broadcast_to(score, start.shape)
        seen = mask_mod(b, h, i, j) if mask_mod else mx.array(True)
        seen = mx.broadcast_to(seen, score.shape) & (score > -mx.inf)
        masks.append(np.array(seen))
        scores.append(np.where(masks[-1], np.array(score), 0.0))
    most = float(np.abs(scores).max()) or 1.0
    panels = [_panel(scores[n] / most, masks[n], blocks, n) for n in range(heads)]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    joined = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    path.write_bytes(_png(joined))
    print(f"picture of {heads} x {length} x {length}: {path}")


def difference(out: mx.array | tuple[mx.array, mx.array], expected: mx.array) -> str:
    """How far an output is from what it should be, in words."""
    assert isinstance(out, mx.array)
    a, b = out.astype(mx.float32), expected.astype(mx.float32)
    error = float(mx.linalg.norm(a - b) / mx.linalg.norm(b))
    return f"relative error {error:.1e} against plain MLX"


def _panel(
    score: NDArray[np.float64],
    seen: NDArray[np.bool_],
    blocks: metalgen.BlockMask | None,
    head: int,
) -> NDArray[np.uint8]:
    shade = score[..., None]
    red, blue, white = (np.array(c, np.float32) for c in ((200, 40, 40), (40, 70, 200), (245,) * 3))
    colours = np.where(shade > 0, white + shade * (red - white), white - shade * (blue - white))
    colours = np.where(seen[..., None], colours, np.float32(150))
    image = np.repeat(np.repeat(colours, PIXELS, axis=0), PIXELS, axis=1).astype(np.uint8)
    if blocks:
        some = np.array(blocks.some)[0, min(head, blocks.heads - 1)]
        height, width = (PIXELS * size for size in blocks.block_size)
        for (row, column), visited in np.ndenumerate(some):
            at = image[row * height : (row + 1) * height, column * width : (column + 1) * width]
            if not visited:
                at[:] = 90
            at[0], at[:, 0] = 60, 60
    return image


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file (8-bit RGB), by the PNG specification, third edition."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [
        chunk(b"IHDR", head),
        chunk(b"IDAT", zlib.compress(rows.tobytes())),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
