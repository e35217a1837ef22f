"""The picture at the head of README: ``python -m benchmarks.pictures docs/speed.svg``.

Left, measured on an NVIDIA H200: how many times as long the fastest form in MLX's own operations
takes as metalgen's kernel, by feature, from the results of `metalgen bench features`. Right,
counted in machine code for M1 and M2: the share of issue slots that are matrix products in MLX's
own attention kernel, in metalgen's default schedule and in the chip model's pick for an M1 Max.
Both read result files that are kept in `benchmarks/results`, and nothing else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MEASURED = "2026-12-01-h200-bench.txt"
COUNTED = "2026-12-01-agx-static.txt"
FEATURES = ("softcap", "ALiBi", "window of 1,024", "bias")
"""Features that MLX does not fuse, or only as a mask array, and that are easy to write by hand."""
WIDTHS = (64, 80, 128, 256)
PICKED = "M1/4k"


def measured(text: str) -> dict[str, float]:
    """By feature and head dimension, the least time of MLX's forms over that of our kernel."""
    found: dict[str, float] = {}
    for block in text.split("\n\n"):
        head = re.match(r"(.+): D(\d+) ", block)
        rows = re.findall(r"^  (MLX fused|by hand).* ([\d.]+) \[", block, re.MULTILINE)
        if head and head[1] in FEATURES and rows:
            found[f"{head[1]}, D={head[2]}"] = min(float(ratio) for _, ratio in rows)
    return found


def counted(text: str) -> dict[str, dict[int, float]]:
    """By kind of kernel, the share of matrix products by head dimension, in percent."""
    found: dict[str, dict[int, float]] = {"steel": {}, "default": {}, PICKED: {}}
    for line in text.splitlines():
        if match := re.match(r"D(\d+) (\S+) ", line):
            width, names = int(match[1]), match[2].split("+")
            for name in names:
                if name in found and width in WIDTHS:
                    found[name].setdefault(width, float(line.split()[-2]))
    return found


def draw(path: Path) -> None:
    """Write the picture, as SVG or PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "metalgen", "svg.fonttype": "path"})
    from matplotlib import pyplot

    speed = measured((RESULTS / MEASURED).read_text(encoding="utf-8"))
    share = counted((RESULTS / COUNTED).read_text(encoding="utf-8"))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.patch.set_facecolor("white")
    names = sorted(speed, key=speed.__getitem__)
    bars = left.barh(names, [speed[name] for name in names], color="#3f51b5")
    left.bar_label(bars, fmt="%.1fx", padding=3)
    left.set_xlim(0, max(speed.values()) * 1.15)
    left.set_title(
        "Measured on an NVIDIA H200: speed-up over\nthe fastest MLX operations", fontsize=10
    )
    left.set_xlabel("bfloat16, 4 x 16 heads, 4,096 queries and keys; bias: not causal", fontsize=8)
    labels = {"steel": "MLX", "default": "metalgen, default", PICKED: "metalgen, picked for M1 Max"}
    styles = {"steel": ("#bdbdbd", "//"), "default": ("#7986cb", ""), PICKED: ("#3f51b5", "")}
    for number, (name, label) in enumerate(labels.items()):
        places = [n + (number - 1) * 0.27 for n in range(len(WIDTHS))]
        heights = [share[name].get(width, 0.0) for width in WIDTHS]
        color, hatch = styles[name]
        drawn = right.bar(places, heights, 0.25, label=label, color=color, hatch=hatch)
        right.bar_label(drawn, fmt="%.0f", fontsize=7)
    right.set_xticks(range(len(WIDTHS)), [f"D={width}" for width in WIDTHS])
    right.set_ylim(0, 110)
    right.set_title(
        "Counted in machine code for M1 and M2: matrix products\nper issue slot, percent",
        fontsize=10,
    )
    right.legend(fontsize=8, loc="upper left", ncols=3, frameon=False, columnspacing=1)
    right.set_xlabel("float16, forward; an independent compiler, not timed", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/speed.svg"))
