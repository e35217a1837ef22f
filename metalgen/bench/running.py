"""A benchmark run: the rows of a preset one after the other, and everything that came of it."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen._version import __version__
from metalgen.bench.caches import cache_entries
from metalgen.bench.entries import Found, attention_entries
from metalgen.bench.foreign import foreign_entries
from metalgen.bench.layers import layer_entries
from metalgen.bench.measuring import QUICK, Effort, Peaks, Row, measure, measure_peaks
from metalgen.bench.unmeasured import CountedRow, ModelledRow, counted, modelled
from metalgen.bench.work import Preset, Work
from metalgen.devices import Device

if TYPE_CHECKING:
    from metalgen.chips import Chip

AnyRow = Row | ModelledRow | CountedRow


@dataclass(frozen=True)
class Setting:
    """What a run uses.

    Args:
        manner: ``"measured"``, ``"modelled"`` or ``"simulated"``.
        device: what computes.
        chip: whose records to use, or whose model; None: unknown.
        against: packages to compare with.
        quick: small sizes and few rounds.
    """

    manner: str
    device: Device
    chip: Chip | None = None
    against: tuple[str, ...] = ()
    quick: bool = False


@dataclass
class Run:
    """What came of it; `rows` grows while it runs."""

    preset: Preset
    setting: Setting
    machine: dict[str, str]
    peaks: Peaks | None = None
    rows: list[AnyRow] = field(default_factory=list)
    interrupted: bool = False

    @property
    def measured(self) -> list[Row]:
        """The rows that were measured."""
        return [row for row in self.rows if isinstance(row, Row)]

    @property
    def wrong(self) -> list[str]:
        """Entries that compute something else, each with its row."""
        return [
            f"{result.name} in {row.work}: {result.detail}"
            for row in self.measured
            for result in row.results
            if result.status == "wrong"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "metalgen_bench": 1,
            "preset": self.preset.name,
            "unit": self.preset.unit,
            "manner": self.setting.manner,
            "device": self.setting.device.name,
            "chip": self.setting.chip.name if self.setting.chip else None,
            "quick": self.setting.quick,
            "machine": self.machine,
            "peaks": asdict(self.peaks) if self.peaks else None,
            "interrupted": self.interrupted,
            "rows": [row.to_dict() for row in self.rows],
        }


def machine_of(device: Device) -> dict[str, str]:
    """The date, the GPU or processor, and the versions of what runs."""
    name = platform.processor() or platform.machine()
    if device.is_gpu:
        info = mx.device_info(mx.Device(mx.gpu, 0))
        name = str(info.get("device_name", "unknown GPU"))
    return {
        "date": datetime.date.today().isoformat(),
        "computed_by": name,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": getattr(mx, "__version__", "unknown"),
        "metalgen": __version__,
    }


def entries_of(work: Work, setting: Setting) -> list[Found]:
    """Everything that competes in a row."""
    if work.kind == "layer":
        return layer_entries(work, setting.device)
    if work.kind == "cache":
        return cache_entries(work, setting.device, setting.chip)
    found = attention_entries(work, setting.device, setting.chip)
    return found + foreign_entries(work, setting.against)


Observer = Callable[[Run, Work | None], None]
"""Told of each row before it is computed, and of None at the end of each."""


def run(
    preset: Preset,
    setting: Setting,
    observe: Observer = lambda run, work: None,
    entries: Callable[[Work, Setting], Sequence[Found]] = entries_of,
) -> Run:
    """Measure, predict or count the rows of a preset. Ctrl-C keeps those that are done.

    Args:
        preset: the rows.
        setting: what to use.
        observe: told of progress.
        entries: what competes; another one for tests.
    """
    preset = preset.quick() if setting.quick else preset
    found = Run(preset, setting, machine_of(setting.device))
    try:
        if setting.manner == "measured":
            dtype = preset.works[0].config.dtype
            large = setting.device.is_gpu and not setting.quick
            found.peaks = measure_peaks(dtype, large=large)
        for work in preset.works:
            observe(found, work)
            found.rows.append(_row(work, setting, entries))
            observe(found, None)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _row(
    work: Work, setting: Setting, entries: Callable[[Work, Setting], Sequence[Found]]
) -> AnyRow:
    if setting.manner == "modelled":
        assert setting.chip is not None
        return modelled(work, setting.chip)
    if setting.manner == "simulated":
        return counted(work)
    return measure(work, entries(work, setting), QUICK if setting.quick else Effort())
