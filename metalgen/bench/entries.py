"""What competes in a row: ours, MLX's own, operations written by hand, and other packages.

An entry computes the same thing as the others of its row. What it computes is compared with the
float64 reference on a small call before anything is timed, so its function takes arrays of any
sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.bench.work import Work
from metalgen.calls.backward import Where, backward_kernels, with_lse
from metalgen.calls.kernel import Kernel
from metalgen.calls.verify import tolerance_of
from metalgen.database.lookup import lookup
from metalgen.devices import Device
from metalgen.devices.mlx_attention import computes, differentiates, mlx_sdpa, seen_by
from metalgen.errors import MetalgenError
from metalgen.families import default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call
from metalgen.reference import attention_float64, attention_mlx, config_features

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metalgen.chips import Chip

Set = tuple[Any, ...]
"""The arrays of a call; the first is what a call takes from the one before."""
Call = Callable[..., mx.array]
SMALL = {"batch": 2, "kv_heads": 2, "q_len": 70, "kv_len": 150}
"""Most of each in the call that an entry is checked with."""
BY_HAND_FACTOR = 8.0
"""How many times a kernel's error operations may have that round scores to 16 bits."""
GIB = 1 << 30
MOST_SCORES = 16 * GIB
"""Bytes of scores beyond which nothing is computed unfused."""


@dataclass(frozen=True)
class Entry:
    """One competitor in a row.

    Args:
        name: unique in its row.
        call: computes the output from the members of a set.
        make: ``make(work, seed)`` makes a set of any sizes up to those of a work.
        expected: ``expected(set)``: the output in float64.
        tolerance: the largest relative error that is right.
        note: what else there is to say of it, such as a schedule.
        cache_bytes: bytes of the keys and values that it keeps; 0: not a cache.
        live_bytes: bytes of those that a call reads; 0: those of dense arrays.
        outputs: computes what is compared with `expected`; None: `call` does.
        run: ``run(sets, launches, first)`` runs calls one after the other to their end; None: MLX's
            arrays, by `metalgen.tuning.timing.measure.chain`.
    """

    name: str
    call: Call
    make: Callable[[Work, int], Set]
    expected: Callable[[Set], NDArray[np.float64]]
    tolerance: float
    note: str = ""
    cache_bytes: int = 0
    live_bytes: float = 0.0
    outputs: Call | None = None
    run: Callable[[Sequence[Set], int, int], None] | None = None


@dataclass(frozen=True)
class Absent:
    """A competitor that does not take part, and why."""

    name: str
    why: str


Found = Entry | Absent


def attention_entries(work: Work, device: Device, chip: Chip | None) -> list[Found]:
    """Competitors of the operation itself."""
    config = work.config
    found: list[Found] = []
    for name, kernel in kernels(work, device, chip).items():
        if isinstance(kernel, str):
            found.append(Absent(name, kernel))
            continue
        gradients = kernel.backward_schedules if work.train else ()
        note = "; ".join(str(schedule) for schedule in (kernel.schedule, *gradients))
        found.append(_entry(work, name, kernel_call(kernel), note=note))
    plain = dataclasses.replace(config, return_lse=False)
    if differentiates(plain) or (computes(plain) and not work.train):
        name = "MLX fused" if config.window_left is None else "MLX fused, mask array"
        found.append(_entry(work, name, _Fused(config)))
    else:
        found.append(Absent("MLX fused", "it does not compute this"))
    scores = work.batch * work.heads * work.q_len * work.kv_len * 4
    if scores > MOST_SCORES:
        found.append(Absent("by hand", f"its scores need {scores / GIB:.0f} GiB"))
    else:
        tolerance = BY_HAND_FACTOR * tolerance_of(config)
        found.append(_entry(work, "by hand", _by_hand(config), tolerance=tolerance))
    return found


def _entry(
    work: Work, name: str, forward: Call, *, tolerance: float = 0.0, note: str = ""
) -> Entry:
    """An entry of a call of queries, keys, values and inputs; of its gradients in training."""
    config = work.config
    right = tolerance or tolerance_of(config)
    if not work.train:
        return Entry(name, forward, sample_set, definition(config), right, note)

    def gradients(
        q: mx.array, k: mx.array, v: mx.array, inputs: Inputs, dout: mx.array
    ) -> list[mx.array]:
        def of(*qkv: mx.array) -> list[mx.array]:
            return [forward(*qkv, inputs)]

        found: list[mx.array] = mx.vjp(of, [q, k, v], [dout])[1]
        return found

    def call(*given: Any) -> mx.array:
        dq, *others = gradients(*given)
        for x in others:  # one element of each, which makes MLX compute them all
            dq = dq + 0 * x.reshape(-1)[0]
        return dq

    def outputs(*given: Any) -> mx.array:
        return mx.concatenate([x.reshape(-1) for x in gradients(*given)])

    return Entry(
        *(name, call, _samples_and_cotangent, _gradients(config), 4 * right, note),
        outputs=outputs,
    )


def _samples_and_cotangent(work: Work, seed: int) -> Set:
    q, k, v, inputs = sample_set(work, seed)
    shape = (*q.shape[:3], work.config.v_dim)
    dout = mx.random.normal(shape, key=mx.random.key(1000 + seed)).astype(q.dtype)
    return q, k, v, inputs, dout


def sample_set(work: Work, seed: int) -> Set:
    """Queries, keys, values and the other inputs of a work's call."""
    return sample_call(
        work.config,
        batch=work.batch,
        kv_heads=work.kv_heads,
        q_len=work.q_len,
        kv_len=work.kv_len,
        seed=seed,
        ragged=False,
    )


def definition(config: AttentionConfig) -> Callable[[Set], NDArray[np.float64]]:
    """What computes the output of a set in float64."""

    def expected(given: Set) -> NDArray[np.float64]:
        q, k, v, inputs = given
        features = config_features(config) | {"inputs": inputs}
        return attention_float64(q, k, v, scale=config.head_dim**-0.5, **features)[0]

    return expected


def _gradients(config: AttentionConfig) -> Callable[[Set], NDArray[np.float64]]:
    """The gradients of queries, keys and values one after the other, in float64."""
    import numpy as np

    from metalgen.reference import gradients_float64

    def expected(given: Set) -> NDArray[np.float64]:
        q, k, v, inputs, dout = given
        features = config_features(config) | {"inputs": inputs}
        found = gradients_float64(q, k, v, (dout, None), scale=config.head_dim**-0.5, **features)
        return np.concatenate([found[name].reshape(-1) for name in ("q", "k", "v")])

    return expected


def kernels(work: Work, device: Device, chip: Chip | None) -> dict[str, Kernel | str]:
    """Our kernels by name: the tuned one where one is on record, and the default one.

    In training with our backward kernels, also where dispatch leaves gradients to MLX's function.
    """
    from metalgen.source.hashes import template_hashes

    config = work.config
    if device.language is None:
        return {"ours": "no kernel runs on this device"}
    problem = work.problem
    try:
        default = default_schedule(config, device.limits, problem.family)
    except MetalgenError as error:
        return {"ours": str(error)}
    templates = template_hashes(problem.family, device.language)
    hit = lookup(problem, chip, templates, limits=device.limits)
    schedules = {"ours tuned": hit.schedule} if hit and hit.schedule != default else {}
    default_name = "ours tuned" if hit and hit.schedule == default else "ours default"
    schedules[default_name] = default
    found: dict[str, Kernel | str] = {}
    where = Where(device, device.limits, chip)
    for name, schedule in schedules.items():
        gradients = backward_kernels(where, problem, schedule, []) if work.train else None
        try:
            run = device.build(with_lse(config, gradients), schedule)
        except (MetalgenError, RuntimeError) as error:
            found[name] = str(error)
            continue
        head = (config, device.name, "metalgen", problem.family, schedule)
        found[name] = Kernel(*head, (), run, gradients)
    return found


def kernel_call(kernel: Kernel) -> Call:
    """A kernel as a function of a set's members; its output alone."""

    def call(q: mx.array, k: mx.array, v: mx.array, inputs: Inputs) -> mx.array:
        out = kernel(q, k, v, inputs=inputs)
        return out[0] if isinstance(out, tuple) else out

    return call


class _Fused:
    """MLX's function. What is masked by a rule is an array made once for each pair of lengths."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self.masks: dict[tuple[int, int], mx.array | str | None] = {}

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, inputs: Inputs) -> mx.array:
        ruled = self.rule(q.shape[2], k.shape[2])
        given = inputs.array_mask
        if given is None:
            mask = ruled
        elif isinstance(ruled, mx.array):
            mask = given & ruled
        else:
            mask = given
        sinks = None if inputs.sinks is None else inputs.sinks.astype(q.dtype)
        scale = self.config.head_dim**-0.5
        return mlx_sdpa(q, k, v, scale=scale, mask=mask, sinks=sinks)

    def rule(self, q_len: int, kv_len: int, *, array: bool = False) -> mx.array | str | None:
        """The causal mask and the window, made once; as an array of booleans where asked for."""
        config, key = self.config, (q_len, kv_len)
        if key not in self.masks:
            windows = config.window_left, config.window_right
            made = seen_by(q_len, kv_len, config.causal, windows, None)
            if made == "causal" and (array or config.array_mask):
                own = mx.arange(q_len)[:, None] + (kv_len - q_len)
                made = mx.arange(kv_len) <= own
            self.masks[key] = made
        return self.masks[key]


SIMPLE = {
    *("head_dim", "dtype", "value_head_dim", "heads_per_kv", "return_lse", "causal"),
    *("window_left", "window_right", "softcap", "alibi", "bias", "array_mask"),
}
"""Fields of configs that `_written_out` computes."""


def _by_hand(config: AttentionConfig) -> Call:
    """What one writes in MLX: in the arrays' type where it is simple, else in float32."""
    used = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    if used <= SIMPLE:
        return _written_out(config)
    features = config_features(config)

    def call(q: mx.array, k: mx.array, v: mx.array, inputs: Inputs) -> mx.array:
        scale = config.head_dim**-0.5
        return attention_mlx(q, k, v, scale=scale, **features, inputs=inputs)[0]

    return call


def _written_out(config: AttentionConfig) -> Call:
    """Two products and a softmax, as models write them."""
    rules = _Fused(config)

    def call(q: mx.array, k: mx.array, v: mx.array, inputs: Inputs) -> mx.array:
        batch, heads, q_len, dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        grouped = (q * dim**-0.5).reshape(batch, kv_heads, heads // kv_heads, q_len, dim)
        scores = grouped @ k[:, :, None].swapaxes(-1, -2)
        if config.softcap is not None:
            scores = config.softcap * mx.tanh(scores / config.softcap)
        scores = scores.reshape(batch, heads, q_len, kv_len)
        if inputs.alibi_slopes is not None:
            own = mx.arange(q_len)[:, None] + (kv_len - q_len)
            distance = mx.abs(own - mx.arange(kv_len)).astype(scores.dtype)
            scores = scores - inputs.alibi_slopes[:, None, None].astype(scores.dtype) * distance
        if inputs.bias is not None:
            scores = scores + inputs.bias.astype(scores.dtype)
        for mask in (rules.rule(q_len, kv_len, array=True), inputs.array_mask):
            if isinstance(mask, mx.array):
                scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
        weights = mx.softmax(scores, axis=-1, precise=True)
        weights = weights.reshape(batch, kv_heads, heads // kv_heads, q_len, kv_len)
        return (weights @ v[:, :, None]).reshape(batch, heads, q_len, v.shape[3])

    return call


def small(work: Work) -> Work:
    """The sizes of the call that entries of a work are checked with."""
    group = work.config.heads_per_kv
    q_len = min(work.q_len, SMALL["q_len"])
    kv_len = max(q_len, min(work.kv_len, SMALL["kv_len"]))
    return dataclasses.replace(
        work,
        batch=min(work.batch, SMALL["batch"]),
        heads=group * min(work.kv_heads, SMALL["kv_heads"]),
        q_len=q_len,
        kv_len=kv_len,
        capacity=min(work.capacity, 2 * SMALL["kv_len"]) if work.capacity else 0,
    )


def names_of(entries: Sequence[Found]) -> list[str]:
    """Their names, in order."""
    return [entry.name for entry in entries]
