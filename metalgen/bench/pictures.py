"""A benchmark as a picture: bars of each row, and a roofline. It can be read in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalgen.bench.measuring import Peaks, Row
from metalgen.bench.tables import rate, unit_of
from metalgen.errors import ArgumentError

HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "***")
SHADES = ("0.25", "0.8", "0.6", "0.9", "0.45", "0.7", "0.95", "0.5")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_ROWS = 40
"""Rows of bars in one picture, the first ones."""
FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Whether a picture can be drawn to a file.

    Raises:
        ArgumentError: an ending other than `FORMATS`, or a library that is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ArgumentError("--plot", f"a file that ends in {', '.join(FORMATS)}", str(path))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        expected = "matplotlib to be installed (pip install 'metalgen[plot]')"
        raise ArgumentError("--plot", expected, "no such module") from None


def draw(path: Path, title: str, rows: Sequence[Row], unit: str, peaks: Peaks | None) -> None:
    """Draw bars and, where the peaks are known, a roofline, and write them to a file.

    Args:
        path: ends in one of `FORMATS`.
        title: what stands above, such as the preset, the device and the date.
        rows: what was measured.
        unit: the preset's.
        peaks: what the device does at best.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if any(r.seconds for r in row.results)][:MOST_ROWS]
    names = list(dict.fromkeys(r.name for row in shown for r in row.results if r.seconds))
    panels = 2 if peaks else 1
    height = max(4.0, 1.2 + 0.16 * len(shown) * (len(names) + 1))
    figure = Figure(figsize=(7.5 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title)
    _bars(axes[0], shown, names, unit)
    if peaks:
        _roofline(axes[1], shown, names, peaks)
    figure.savefig(path, dpi=150)


def _bars(axis, rows: Sequence[Row], names: Sequence[str], unit: str) -> None:  # type: ignore[no-untyped-def]
    """Rates of each entry; the units of rows bound by memory stand at their labels."""
    height = 0.8 / max(1, len(names))
    for n, name in enumerate(names):
        places, values = [], []
        for place, row in enumerate(rows):
            for r in row.results:
                if r.name == name and r.seconds:
                    own = unit_of(row.work, unit)
                    best = max(rate(row.work, x.seconds, own) for x in row.results if x.seconds)
                    places.append(place + n * height)
                    values.append(rate(row.work, r.seconds, own) / best)
        style = {"color": SHADES[n % len(SHADES)], "hatch": HATCHES[n % len(HATCHES)]}
        axis.barh(places, values, height, label=name, edgecolor="black", linewidth=0.5, **style)
    axis.set_yticks([n + 0.4 - height / 2 for n in range(len(rows))], [_label(r) for r in rows])
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("speed, as a share of the fastest in its row (more is better)")
    axis.legend(fontsize=7, loc="lower right")


def _label(row: Row) -> str:
    w = row.work
    sizes = f"B={w.batch} H={w.heads} {w.q_len}x{w.kv_len}"
    return f"{w.label}, D={w.config.head_dim}\n{sizes}" if w.label else f"{w.config}\n{sizes}"


def _roofline(axis, rows: Sequence[Row], names: Sequence[str], peaks: Peaks) -> None:  # type: ignore[no-untyped-def]
    """Operations a second over operations a byte, below what the device was measured to reach."""
    points = [(row.work.operations / _bytes(row), row) for row in rows]
    low = min([x for x, _ in points], default=1.0) / 2
    high = max([x for x, _ in points], default=1.0) * 2
    edge = peaks.operations / peaks.bytes
    line = sorted({low, min(max(edge, low), high), high})
    tops = [min(x * peaks.bytes, peaks.operations) / 1e12 for x in line]
    axis.plot(line, tops, color="black", label="measured peaks")
    for n, name in enumerate(names):
        some = [
            (x, row.work.operations / r.seconds / 1e12)
            for x, row in points
            for r in row.results
            if r.name == name and r.seconds
        ]
        marker, color = MARKERS[n % len(MARKERS)], SHADES[n % len(SHADES)]
        style = {"marker": marker, "color": color, "edgecolors": "black", "s": 28}
        axis.scatter(*zip(*some, strict=True), label=name, **style)
    axis.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axis.set_xlabel("operations for each byte of queries, keys, values and outputs")
    axis.legend(fontsize=7)


def _bytes(row: Row) -> float:
    w = row.work
    c = w.config
    return w.kv_bytes + w.batch * w.heads * w.q_len * (c.head_dim + c.v_dim) * c.itemsize
