"""From a config to a kernel that can be called: look up, check once, remember."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen import switches
from metalgen.arguments import as_number, check_positive
from metalgen.counters import Tally, tally
from metalgen.database.hit import Hit, brief
from metalgen.database.lookup import checked, last_chip, lookup
from metalgen.devices import Device, Runner, default_device, get_device
from metalgen.devices.mlx_attention import is_fused, mlx_runner
from metalgen.devices.reference import ReferenceDevice
from metalgen.errors import ArgumentError, DeviceError, InvalidSchedule, MetalgenError
from metalgen.families import Limits, Schedule, default_schedule
from metalgen.gradients import BACKWARDS, backward_of, differentiable, function_of
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs, check_inputs, check_qkv, needs_inputs
from metalgen.problem.sizes import Problem
from metalgen.source.hashes import template_hash

if TYPE_CHECKING:
    from metalgen.chips import Chip

TYPICAL_HEADS = 32
TYPICAL_LENGTH = 1024
MAX_SCALE = 1e30
"""Scales are below this; those below its inverse are 0."""


@dataclass(eq=False)
class Kernel:
    """Attention for one config, on one device. Call it with arrays.

    Attributes:
        config: what it computes.
        device: name of the device that computes it.
        backend: ``"metalgen"`` (our kernel), ``"mlx"`` (``mx.fast.scaled_dot_product_attention``)
            or ``"plain"`` (plain MLX operations).
        family: ``"forward"`` or ``"decode"`` (up to 64 queries); either takes any lengths.
        schedule: how our kernel runs, or would run where another backend keeps the call.
        path: how the schedule was found, and why the backend is what it is.
    """

    config: AttentionConfig
    device: str
    backend: str
    family: str
    schedule: Schedule
    path: tuple[str, ...]
    _run: Runner = field(repr=False)

    def __repr__(self) -> str:
        """Short, for a prompt; `explain` says more."""
        return f"<Kernel {self.config}: {self.backend} on {self.device}, {self.schedule}>"

    @functools.cached_property
    def _tally(self) -> Tally:
        """Where calls of this kernel are counted."""
        ours = self.backend == "metalgen" or not self.path
        return tally(self.backend, "" if ours else self.path[-1])

    @functools.cached_property
    def _asks(self) -> bool:
        return needs_inputs(self.config)

    @functools.cached_property
    def backward(self) -> str:
        """What computes gradients: ``"mlx"``, the function's of ``mx.fast``, or ``"plain"``."""
        return "mlx" if self.backend == "mlx" else backward_of(self.config)

    @functools.cached_property
    def _has_own_gradient(self) -> bool:
        """Whether gradients are not those that MLX finds by itself of what runs."""
        return self.backend == "metalgen" or (self.backend, self.backward) == ("plain", "mlx")

    @functools.cached_property
    def source(self) -> str:
        """The source of our kernel for this config and schedule: Metal, or on a CUDA GPU CUDA."""
        from metalgen.source.render import render

        return render(self.config, self.schedule).text

    def explain(self) -> str:
        """Where the schedule came from, what runs, and why; one step a line."""
        names = {
            "metalgen": "metalgen's kernel",
            "mlx": "MLX's own fused attention",
            "plain": "plain MLX operations",
        }
        head = f"{self.config}: {names[self.backend]} on device {self.device!r}"
        steps = (f"  {step}" for step in brief(self.path))
        gradients = f"  gradients: {BACKWARDS[self.backward]}"
        return "\n".join([head, f"  schedule: {self.schedule}", *steps, gradients])

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float | None = None,
        inputs: Inputs = NOTHING,
    ) -> mx.array | tuple[mx.array, mx.array]:
        """Attention of `q`, `k` and `v`; lazy on a GPU, and differentiable.

        Args:
            q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``, of the config's
                type; any lengths, any strides. (Shapes and types of packed sequences, pages and
                quantized keys: `AttentionConfig`.)
            scale: factor of the scores; None means ``1 / sqrt(D)``.
            inputs: the other arrays that the config asks for.

        Returns:
            ``(B, H, Lq, Dv)``; with the config's ``return_lse`` a pair with the log-sum-exp,
            ``(B, H, Lq)``, float32.

        Raises:
            ArgumentError: shapes or types that do not fit the config.
        """
        check_qkv(self.config, q, k, v, inputs)
        if self._asks or inputs is not NOTHING:
            check_inputs(self.config, q, k, v, inputs)
        scale = check_scale(self.config.head_dim, scale)
        self._tally.calls += 1
        if self._has_own_gradient:
            out, lse = differentiable(self._run, self.config, q, k, v, scale, inputs)
        else:
            out, lse = self._run(q, k, v, scale, inputs)
        return out if lse is None else (out, lse)

    def _with_scale(self, scale: float) -> Callable[..., tuple[mx.array, ...]]:
        """The kernel as a function of q, k and v that checks and counts nothing.

        For one of ours whose config asks for no other input. It returns the output and, where the
        config asks for it, the log-sum-exp.
        """
        return function_of(
            self._run, self.config, check_scale(self.config.head_dim, scale), NOTHING
        )


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
        _recording.append((problem, batch, name, chip))
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
    path = ["schedule: pinned by the caller"]
    if where.language is None or switches.forced_reference():
        path.append("plain MLX operations: no kernel runs on this device")
        run, backend, name = _plain(config), "plain", "reference"
    elif _passes(where, config, schedule, template_hash("forward", where.language), path):
        run, backend, name = where.build(config, schedule), "metalgen", where.name
    else:
        path.append("FALLBACK to plain MLX operations: the pinned kernel failed its check")
        run, backend, name = _plain(config), "plain", where.name
    return Kernel(config, name, backend, "forward", schedule, tuple(path), run)


_known: dict[Any, Kernel] = {}
kept_with_kernels: list[dict[Any, Any]] = []
"""What others decided from kernels and keep: forgotten with them."""
MOST_KNOWN = 4096
"""Kernels that are kept: functions with numbers that change make a new one each time."""


Request = tuple[Problem, int, str, str | None]
"""What a call asks `get_kernel` for: problem, batch, device, chip."""
_recording: list[Request] | None = None


@contextlib.contextmanager
def recorded_requests() -> Iterator[list[Request]]:
    """What is asked for meanwhile, each once; plain MLX operations stand in for every kernel."""
    global _recording
    forget_kernels()
    found: list[Request] = []
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


def check_scale(head_dim: int, scale: float | None) -> float:
    """The scale as a float, by default ``1 / sqrt(D)``; raises `ArgumentError` if it is none."""
    if scale is None:
        return float(head_dim**-0.5)
    number = as_number(scale)
    if number is None or not abs(number) < MAX_SCALE:
        expected = f"a finite number below {MAX_SCALE:g}, or None for 1 / sqrt(head_dim)"
        raise ArgumentError("scale", expected, scale)
    # Below, a kernel's factor would be no normal float32, and masked scores no longer be lowest.
    return number if abs(number) >= 1 / MAX_SCALE else 0.0


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
    versions = template_hash(family, device.language)
    hit = lookup(problem, chip, versions, limits=limits, trace=path)
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
        path.append("schedule: the default one, for nothing on record fits")
    else:  # shown, and never built
        schedule = default_schedule(config, replace(limits, threadgroup_bytes=1 << 30), family)
    if device.is_gpu and is_fused(config) and not (hit and hit.beats_mlx):
        path.append("MLX's own fused attention keeps the call: ours was not measured as faster")
        return Kernel(config, device.name, "mlx", family, schedule, tuple(path), mlx_runner(config))
    for candidate in dict.fromkeys([hit.schedule, *default] if hit else default):
        if _passes(device, config, candidate, versions, path):
            run = device.build(config, candidate)
            return Kernel(config, device.name, "metalgen", family, candidate, tuple(path), run)
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
            path.append(f"chip: {last}, the one tuned last; this machine's is unknown")
    if own is None:
        path.append("chip: unknown")
    return own


def _describe(hit: Hit) -> str:
    words = [f"schedule: {hit.place}, {hit.provenance}"]
    if hit.seconds is not None:
        words.append(f"{hit.seconds * 1e3:.3f} ms")
    if hit.default_seconds is not None:
        words.append(f"default {hit.default_seconds * 1e3:.3f} ms")
    if hit.mlx_seconds is not None:
        words.append(f"MLX {hit.mlx_seconds * 1e3:.3f} ms")
    return ", ".join(words)


def _passes(
    device: Device,
    config: AttentionConfig,
    schedule: Schedule,
    versions: str,
    path: list[str],
) -> bool:
    """Whether a kernel was checked on this device; checks it, and records that, if it never was."""
    status = checked(config, schedule, versions, device=device.name, family=schedule.family)
    if status is not None:
        path.append(f"check on {device.name}: {status}, on record")
        return status == "ok"
    from metalgen.kernel_check import CannotCheck, record_check, run_check

    try:
        check = run_check(device, config, schedule, versions)
    except (CannotCheck, DeviceError) as problem:  # the next process tries again
        path.append(f"check on {device.name}: not possible now: {problem}")
        return False
    path.append(
        f"check on {device.name}: {check.status} now"
        + (f", relative error {check.error:.1e}" if check.error is not None else "")
        + (f" of {check.tolerance:.0e}" if check.tolerance is not None else "")
        + (f" ({check.detail})" if check.detail else "")
    )
    try:
        from metalgen.database.store import Store

        with Store.open(busy=1.0) as store:
            record_check(store, check)
    except (MetalgenError, OSError) as problem:
        path.append(f"the check could not be recorded: {problem}")
    return check.ok


def _plain(config: AttentionConfig) -> Runner:
    return ReferenceDevice().build(config)
