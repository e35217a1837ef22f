"""The pictures of docs/your-own-attention.md: ``python -m benchmarks.walk_through FOLDER``.

The page's own blocks are run from top to bottom, and what they computed is drawn: mask, blocks and
bias, the loss and the learned table. The times of schedules are the chip model's, for the same
functions at 4,096 tokens on an M3 Max: modelled, not measured.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "your-own-attention.md"
CHIP, TOKENS, BATCH_HEADS = "M3Max", 4096, 32


def computed() -> dict[str, Any]:
    """What the page's blocks leave behind, by name."""
    names: dict[str, Any] = {}
    text = PAGE.read_text(encoding="utf-8")
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
                exec(compile(block, PAGE.name, "exec"), names)
        finally:
            os.chdir(before)
    return names


def modelled() -> tuple[list[float], int]:
    """Milliseconds of every valid schedule, in ascending order, and the place of the default's."""
    from metalgen import AttentionConfig
    from metalgen.chips import get_chip
    from metalgen.chips.model import predict_sizes
    from metalgen.families import default_schedule, enumerate_valid

    config = AttentionConfig(64, "float16")
    sizes = {"batch_heads": BATCH_HEADS, "q_len": TOKENS, "kv_len": TOKENS}
    chip, default = get_chip(CHIP), default_schedule(config)
    times = {
        schedule: 1e3 * predict_sizes(config, schedule, chip, **sizes).seconds
        for schedule in enumerate_valid(config)
    }
    ranked = sorted(times.values())
    return ranked, ranked.index(times[default])


def draw(folder: Path) -> None:
    """Write the three pictures into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "metalgen", "svg.fonttype": "path"})
    from matplotlib import pyplot

    def saved(name: str, figure: Any) -> None:
        figure.patch.set_facecolor("white")
        metadata = {"Date": None, "Creator": None}
        figure.savefig(folder / name, metadata=metadata)
        pyplot.close(figure)

    names = computed()
    seen = np.array(names["seen"]).reshape(names["LENGTH"], -1)
    dense = np.array(names["blocks"].to_dense())[0, 0]
    size = names["LENGTH"] // len(dense)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.imshow(seen, cmap="Blues", vmin=0, vmax=1.6, interpolation="nearest")
    for row, column in zip(*np.nonzero(dense), strict=True):
        corner = (column * size - 0.5, row * size - 0.5)
        left.add_patch(pyplot.Rectangle(corner, size, size, fill=False, color="#444", lw=0.8))
    left.set(title="Keys that queries see, and blocks computed", xlabel="key", ylabel="query")
    for head, line in enumerate(np.array(names["true_table"])):
        right.plot(line, label=f"head {head}", ls=("-", "--", "-.", ":")[head])
    right.set(title="Bias by distance", xlabel="distance", ylabel="added to the score")
    right.legend()
    saved("mask.svg", figure)

    times, place = modelled()
    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    axes.plot(range(1, len(times) + 1), times)
    axes.plot([place + 1], [times[place]], "o", color="black")
    axes.annotate(
        f"default: {times[place] / times[0]:.2f}x the best",
        (place + 1, times[place]),
        xytext=(12, 18),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-"},
    )
    axes.set(
        title=f"All {len(times):,} valid schedules, {CHIP}, {TOKENS:,} tokens (modelled)",
        xlabel="rank",
        ylabel="milliseconds",
        ylim=(0, 4 * times[0]),
    )
    saved("schedules.svg", figure)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.semilogy(names["losses"])
    left.set(title="Loss", xlabel="step", ylabel="mean squared error")
    for head in (0, 2):
        for table, style, word in (("true_table", ":", "true"), ("table", "-", "learned")):
            line = np.array(names[table])[head]
            right.plot(line - line.mean(), style, label=f"head {head}, {word}")
    right.set(title="Bias by distance, less its mean", xlabel="distance")
    right.legend()
    saved("training.svg", figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.walk_through FOLDER")
    draw(Path(sys.argv[1]))
