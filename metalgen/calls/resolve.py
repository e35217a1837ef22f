"""From a config to a kernel: look up, check once, remember."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from metalgen import switches
from metalgen.arguments import check_positive
from metalgen.calls.backward import Where, kernel_gradients, with_lse
from metalgen.calls.checked import passes
from metalgen.calls.kernel import Kernel
from metalgen.database.hit import Hit
from metalgen.database.lookup import last_chip, lookup
from metalgen.devices import Device, Runner, default_device, get_device
from metalgen.devices.mlx_attention import is_fused, mlx_runner
from metalgen.devices.reference import ReferenceDevice
from metalgen.errors import ArgumentError, InvalidSchedule, MetalgenError
from metalgen.families import Limits, Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hashes

if TYPE_CHECKING:
    from metalgen.chips import Chip

TYPICAL_HEADS = 32
TYPICAL_LENGTH = 1024


def get_kernel(
    config: AttentionConfig,
    *,
    batch: int = 1,
    q_len: int | None = None,
    kv_len: int | None = None,
    device: str | None = None,
    heads: int | None = None,
    chip: str | None = None,
) -> Kernel:
    """The best known kernel for a config; the same object when asked again.

    The sizes choose among tuned schedules, by powers of two; they never limit what the kernel may
    be called with.

    Args:
        config: what to compute.
        batch, heads: batch entries, and query heads of each (None: 32).
        q_len, kv_len: lengths (None: 1024 queries; as many keys as queries).
        device: ``"metal"``, ``"simulator"``, ``"reference"``, or None for this machine's GPU, and
            plain MLX where there is none.
        chip: whose tuning records to use, such as ``"M3Max"``; None means this machine's, and on
            a machine with no known chip the one that was tuned last.

    Raises:
        ArgumentError: a bad argument (an unknown chip comes with the nearest names).
        DeviceError: the device is not available here.
    """
    queries = TYPICAL_LENGTH if q_len is None else q_len
    keys = queries if kv_len is None else kv_len
    each = TYPICAL_HEADS if heads is None else heads
    name = default_device().name if device is None else device
    try:
        key = (
            config,
            (int.__mul__(batch, each) - 1).bit_length(),  # a product of NumPy's may overflow
            (queries - 1).bit_length(),
            (keys - 1).bit_length(),
            min(batch, each, queries, keys) > 0,  # of others no kernel is ever known
            name,
            chip,
        )
        return _known[key]
    except (KeyError, TypeError, AttributeError):
        pass  # unknown yet, integers of another library, or arguments to be complained about
    if not isinstance(config, AttentionConfig):
        raise ArgumentError("config", "an AttentionConfig", config)
    rows = check_positive("batch", batch) * check_positive("heads", each)
    problem = Problem(config, rows, queries, keys)
    sizes = {"batch": batch, "heads": each, "q_len": queries, "kv_len": keys}
    if any(type(size) is not int for size in sizes.values()):
        plain = {argument: int(size) for argument, size in sizes.items()}
        return get_kernel(config, **plain, device=device, chip=chip)
    if _recording is not None:
        _recording.append(KernelRequest(problem, batch, name, chip))
        kernel = Kernel(
            *(config, "reference", "plain", problem.family, default_schedule(config)),
            ("plain MLX operations: metalgen.prepare looks at what is called",),
            _plain(config),
        )
    else:
        kernel = _resolve(problem, get_device(name), chip)
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[key] = kernel
    return kernel


def pinned_kernel(
    config: AttentionConfig, schedule: Schedule, *, device: str | None = None
) -> Kernel:
    """The forward kernel of a config with a schedule of the caller's own, checked as any other.

    It is not looked up, and a new one each time; plain MLX stands in where no kernel runs, or where
    this one is wrong, and `Kernel.explain` says so.

    Raises:
        InvalidSchedule: the schedule cannot run the config on that device.
        DeviceError, ArgumentError: as `get_kernel`.
    """
    where = get_device(device)
    path = ["schedule source: pinned by the caller"]
    if where.language is None or switches.forced_reference():
        path.append("plain MLX operations: no kernel runs on this device")
        return Kernel(
            config, "reference", "plain", schedule.family, schedule, tuple(path), _plain(config)
        )
    problem = Problem(config, TYPICAL_HEADS, TYPICAL_LENGTH, TYPICAL_LENGTH)
    gradients = kernel_gradients(Where(where, where.limits), problem, schedule, path)
    own = with_lse(config, gradients)
    if passes(where, own, schedule, path):
        run = where.build(own, schedule)
        head = (config, where.name, "metalgen", schedule.family, schedule)
        return Kernel(*head, tuple(path), run, gradients)
    path.append("FALLBACK to plain MLX operations: the pinned kernel failed its check")
    return Kernel(
        config, where.name, "plain", schedule.family, schedule, tuple(path), _plain(config)
    )


_known: dict[Any, Kernel] = {}
kept_with_kernels: list[dict[Any, Any]] = []
"""What others decided from kernels and keep: forgotten with them."""
MOST_KNOWN = 4096
"""Kernels that are kept: functions with numbers that change make a new one each time."""


class KernelRequest(NamedTuple):
    """What a call asks `get_kernel` for: of a problem, a number of batch entries on a device."""

    problem: Problem
    batch: int
    device: str
    chip: str | None


_recording: list[KernelRequest] | None = None


@contextlib.contextmanager
def recorded_requests() -> Iterator[list[KernelRequest]]:
    """What is asked for meanwhile, each once; plain MLX operations stand in for every kernel."""
    global _recording
    forget_kernels()
    found: list[KernelRequest] = []
    _recording = found
    try:
        yield found
    finally:
        _recording = None
        forget_kernels()


def forget_kernels() -> None:
    """Forget every kernel that `get_kernel` has handed out.

    Databases and environment variables are then read again.
    """
    _known.clear()
    for kept in kept_with_kernels:
        kept.clear()
    switches.read_again()


def _resolve(problem: Problem, device: Device, chip_name: str | None) -> Kernel:
    config, family = problem.config, problem.family
    path: list[str] = []
    chip = _chip(chip_name, device, path)
    forced = switches.forced_reference()
    if device.language is None or forced:
        why = f"{forced} forces them" if forced else "no kernel runs on this device"
        path.append(f"plain MLX operations: {why}")
        device = get_device("reference")
        return Kernel(
            config,
            device.name,
            "plain",
            family,
            default_schedule(config, family=family),
            tuple(path),
            _plain(config),
        )
    limits = _limits(device, chip)
    templates = template_hashes(family, device.language)
    hit = lookup(problem, chip, templates, limits=limits, trace=path)
    fallback = "no kernel passed its check on this device"
    try:
        default = [default_schedule(config, limits, family)]
    except InvalidSchedule as error:  # a GPU with little shared memory, and wide heads
        default, fallback = [], error.detail
    if hit:
        schedule = hit.schedule
        path.append(_describe(hit))
    elif default:
        schedule = default[0]
        path.append("schedule source: default (no matching tuning record)")
    else:  # shown, and never built
        schedule = default_schedule(config, replace(limits, threadgroup_bytes=1 << 30), family)
    if device.is_gpu and is_fused(config) and not (hit and hit.beats_mlx):
        path.append(
            "MLX's own fused attention keeps the call: metalgen's kernel has not "
            "been measured as faster on this chip"
        )
        return Kernel(config, device.name, "mlx", family, schedule, tuple(path), mlx_runner(config))
    for candidate in dict.fromkeys([hit.schedule, *default] if hit else default):
        gradients = kernel_gradients(Where(device, limits, chip), problem, candidate, path)
        own = with_lse(config, gradients)
        if passes(device, own, candidate, path):
            run = device.build(own, candidate)
            head = (config, device.name, "metalgen", family, candidate)
            return Kernel(*head, tuple(path), run, gradients)
    path.append(f"FALLBACK to plain MLX operations: {fallback}")
    return Kernel(config, device.name, "plain", family, schedule, tuple(path), _plain(config))


def _limits(device: Device, chip: Chip | None) -> Limits:
    """What kernels may use: on a GPU what it has; else what the chip has whose kernels they are."""
    if device.is_gpu or chip is None or chip.limits.language != device.language:
        return device.limits
    return chip.limits


def _chip(name: str | None, device: Device, path: list[str]) -> Chip | None:
    from metalgen import chips

    if name is not None:
        chip = chips.get_chip(name)
        path.append(f"chip: {chip.name}, as asked")
        return chip
    own = chips.detect()
    if own:
        path.append(f"chip: {own.name}, this machine's")
    elif device.language and not device.is_gpu and (last := last_chip()):
        with contextlib.suppress(MetalgenError):
            own = chips.get_chip(last)
            path.append(f"chip: {last}, the last one tuned; this machine's chip is unknown")
    if own is None:
        path.append("chip: unknown")
    return own


def _describe(hit: Hit) -> str:
    words = [f"schedule source: {hit.place}, {hit.provenance}"]
    if hit.seconds is not None:
        words.append(f"{hit.seconds * 1e3:.3f} ms")
    if hit.default_seconds is not None:
        words.append(f"default {hit.default_seconds * 1e3:.3f} ms")
    if hit.mlx_seconds is not None:
        words.append(f"MLX {hit.mlx_seconds * 1e3:.3f} ms")
    return ", ".join(words)


def _plain(config: AttentionConfig) -> Runner:
    return ReferenceDevice().build(config)
