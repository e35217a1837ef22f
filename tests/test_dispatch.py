from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError, AttentionConfig, DeviceError, Schedule, chips
from metalgen.calls import resolve
from metalgen.database.store import Store
from metalgen.devices import Device, Runner, default_device, get_device
from metalgen.families import default_schedule
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference import attention_float64, attention_mlx, config_features
from metalgen.simulator.errors import LaunchError
from metalgen.source.hashes import template_hash
from metalgen.testing.devices import normal


@pytest.fixture(autouse=True)
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    resolve.forget_kernels()
    yield path
    resolve.forget_kernels()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever GPU this machine has, these tests do not see it."""
    for back_end in (mx.metal, mx.cuda):
        monkeypatch.setattr(back_end, "is_available", lambda: False)
    monkeypatch.setattr(chips, "detect", lambda: None)
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


class FakeGpu(Device):
    """A GPU that computes by the definition, right or wrong, and counts what it built."""

    name = "reference"  # so that `get_device` finds it by a known name
    language = "metal"
    is_gpu = True

    def __init__(self, factor: float = 1.0, broken: str = "") -> None:
        self.factor, self.broken = factor, broken
        self.built: list[Schedule] = []

    def unavailable(self) -> str | None:
        return None

    def build(self, config: AttentionConfig, schedule: Schedule) -> Runner:
        self.built.append(schedule)
        if self.broken:
            raise RuntimeError(self.broken)

        def run(
            q: mx.array, k: mx.array, v: mx.array, scale: float, inputs: Inputs = NOTHING
        ) -> tuple[mx.array, mx.array | None]:
            features = config_features(config) | {"inputs": inputs}
            out, lse = attention_mlx(q, k, v, scale=scale, **features)
            return out * self.factor, lse if config.return_lse else None

        return run


def use(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(resolve, "get_device", lambda name=None: device)


def test_the_same_kernel_is_handed_out_again() -> None:
    config = AttentionConfig(64, causal=True)
    kernel = metalgen.get_kernel(config, q_len=700)
    assert metalgen.get_kernel(AttentionConfig(64, causal=True), q_len=1000) is kernel
    assert metalgen.get_kernel(config, q_len=1025) is not kernel
    assert metalgen.get_kernel(config, q_len=700, batch=3) is not kernel


def test_without_a_gpu_plain_mlx_runs_and_says_so() -> None:
    kernel = metalgen.get_kernel(AttentionConfig(64))
    assert (kernel.backend, kernel.device) == ("plain", "reference")
    assert "plain MLX operations on device 'reference'" in kernel.explain()
    for name, needed in (("metal", "Metal back end"), ("cuda", "CUDA back end")):
        with pytest.raises(DeviceError, match=f"device '{name}' is not available: .*{needed}"):
            metalgen.get_kernel(AttentionConfig(64), device=name)


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_the_gpu_on_which_mlx_computes_is_the_default_device(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    info = {"compute_capability_major": 9, "compute_capability_minor": 0}
    monkeypatch.setattr(getattr(mx, name), "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=None: info)
    assert default_device().name == "reference"  # MLX computes on the CPU
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert default_device().name == name
    kernel = metalgen.get_kernel(AttentionConfig(64))
    assert (kernel.device, kernel.backend) == (name, "mlx")


def test_mlx_keeps_the_call_where_its_own_kernel_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    use(monkeypatch, gpu)
    kernel = metalgen.get_kernel(AttentionConfig(64, causal=True))
    assert kernel.backend == "mlx"
    assert gpu.built == []
    assert "has not been measured as faster" in kernel.explain()
    x = normal((1, 2, 9, 64), "float16")
    expected, _ = attention_float64(x, x, x, scale=0.125, causal=True)
    out = kernel(x, x, x)
    assert isinstance(out, mx.array)
    np.testing.assert_allclose(np.array(out), expected, atol=2e-3)


def test_gradients_are_mlxs_where_it_keeps_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeGpu())
    for config, backward in (
        (AttentionConfig(64, sinks=True), "mlx"),  # rounded to float16 in both directions
        (AttentionConfig(40, sinks=True), "metalgen"),  # exact in the kernel, so in the gradient
        (AttentionConfig(40, causal=True), "metalgen"),  # MLX's gradient would keep all scores
        (AttentionConfig(40, causal=True, page_size=16), "metalgen"),
        (AttentionConfig(512, causal=True), "plain"),  # too wide for backward kernels
    ):
        kernel = metalgen.get_kernel(config)
        assert kernel.backward == backward, kernel.explain()


def test_rows_that_see_no_key_are_zeros_whoever_keeps_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, FakeGpu())
    kernel = metalgen.get_kernel(AttentionConfig(64, "float32", causal=True))
    x = normal((1, 1, 6, 64))
    out = kernel(x, x[:, :, :2], x[:, :, :2])
    assert isinstance(out, mx.array)
    assert np.array_equal(np.array(out)[0, 0, :4], np.zeros((4, 64)))


def with_lse(config: AttentionConfig) -> AttentionConfig:
    """What runs where backward kernels need the log-sum-exp."""
    return replace(config, return_lse=True)


def test_a_kernel_that_was_never_checked_is_checked_once(
    monkeypatch: pytest.MonkeyPatch, own_database: Path
) -> None:
    config = AttentionConfig(40)  # MLX has no fused kernel for it
    gpu = FakeGpu()
    use(monkeypatch, gpu)
    kernel = metalgen.get_kernel(config)
    assert kernel.backend == "metalgen"
    assert "check on reference: ok now, relative error" in kernel.explain()
    assert len(gpu.built) == 2  # to check, and to run
    with Store.open(own_database) as store:
        check = store.find_check(
            with_lse(config), kernel.schedule, template_hash(kernel.schedule), "reference"
        )
    assert check is not None and check.ok and check.error is not None and check.error < 1e-3

    resolve.forget_kernels()
    again = metalgen.get_kernel(config)
    assert "check on reference: ok, on record" in again.explain()
    assert len(gpu.built) == 3


def test_a_wrong_kernel_is_never_dispatched(
    monkeypatch: pytest.MonkeyPatch, own_database: Path
) -> None:
    config = AttentionConfig(40, "float32")
    use(monkeypatch, FakeGpu(factor=1.001))
    kernel = metalgen.get_kernel(config)
    assert kernel.backend == "plain"
    assert "FALLBACK to plain MLX" in kernel.explain()
    with Store.open(own_database) as store:
        check = store.find_check(
            with_lse(config), kernel.schedule, template_hash(kernel.schedule), "reference"
        )
    assert check is not None and check.status == "wrong"
    x = normal((1, 1, 5, 40))
    expected, _ = attention_float64(x, x, x, scale=40**-0.5)
    out = kernel(x, x, x)
    assert isinstance(out, mx.array)
    np.testing.assert_allclose(np.array(out), expected, atol=1e-6)


def test_a_kernel_that_does_not_compile_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeGpu(broken="[metal::Device] Unable to build metal library"))
    kernel = metalgen.get_kernel(AttentionConfig(40))
    assert kernel.backend == "plain"
    assert "compile now ([metal::Device] Unable to build metal library)" in kernel.explain()


def test_a_kernel_that_failed_is_on_record_as_in_tuning(
    monkeypatch: pytest.MonkeyPatch, own_database: Path
) -> None:
    gpu = FakeGpu(broken="[metal::Device] Unable to build metal library\n1:2: error: no")
    use(monkeypatch, gpu)
    kernel = metalgen.get_kernel(AttentionConfig(40))
    with Store.open(own_database) as store:
        own = with_lse(kernel.config)
        check = store.find_check(own, kernel.schedule, template_hash(kernel.schedule), "reference")
    assert check is not None
    message = "[metal::Device] Unable to build metal library; 1:2: error: no"
    assert (check.status, check.detail) == ("compile", message)
    resolve.forget_kernels()
    assert "check on reference: compile, on record" in metalgen.get_kernel(kernel.config).explain()
    assert len(gpu.built) == 1


@pytest.mark.parametrize(
    "message",
    [
        "[malloc] Unable to allocate 8192 bytes.",
        "failed to compile kernel: nvrtc: error: failed to open libnvrtc-builtins.so.13.0.",
    ],
    ids=["no memory", "no compiler"],
)
def test_a_failure_of_the_machine_is_not_recorded_and_the_next_process_tries_again(
    monkeypatch: pytest.MonkeyPatch, own_database: Path, message: str
) -> None:
    gpu = FakeGpu(broken=message)
    use(monkeypatch, gpu)
    kernel = metalgen.get_kernel(AttentionConfig(40))
    assert kernel.backend == "plain"
    assert "check on reference: not possible now" in kernel.explain()
    assert not own_database.exists()
    resolve.forget_kernels()
    gpu.broken = ""
    assert metalgen.get_kernel(AttentionConfig(40)).backend == "metalgen"


def test_an_unwritable_database_does_not_stop_a_call(
    monkeypatch: pytest.MonkeyPatch, own_database: Path
) -> None:
    own_database.write_bytes(b"this is no database" * 100)
    use(monkeypatch, FakeGpu())
    kernel = metalgen.get_kernel(AttentionConfig(40))
    assert kernel.backend == "metalgen"
    assert "user database not used" in kernel.explain()
    assert "could not be recorded" in kernel.explain()
    assert own_database.read_bytes() == b"this is no database" * 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_len": 0}, "q_len: expected an integer from 1"),
        ({"q_len": 1.5}, "q_len: expected an integer from 1"),
        ({"batch": 0}, "batch: expected a positive integer, but got 0"),
        ({"batch": "2"}, "batch: expected a positive integer, but got '2'"),
        ({"heads": -1}, "heads: expected a positive integer, but got -1"),
        ({"device": "cpu"}, "device: expected one of metal, cuda, simulator, reference, or None"),
        ({"device": "simulator", "chip": "M3Mox"}, "chip: expected .*M3Max"),
    ],
)
def test_a_bad_argument_of_get_kernel_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        metalgen.get_kernel(AttentionConfig(64), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["batch", "heads", "q_len", "kv_len"])
def test_a_bad_size_is_named_where_a_kernel_for_good_ones_is_known(size: str) -> None:
    config = AttentionConfig(64)
    good = {"batch": 1, "heads": 2, "q_len": 2, "kv_len": 2}
    metalgen.get_kernel(config, **good)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=f"{size}: expected .*, but got 0"):
        metalgen.get_kernel(config, **good | {size: 0})  # type: ignore[arg-type]


def test_kernels_of_ever_new_configs_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "MOST_KNOWN", 3)
    made = [metalgen.get_kernel(AttentionConfig(8 + n), device="reference") for n in range(5)]
    assert len(resolve._known) <= 3
    assert metalgen.get_kernel(AttentionConfig(12), device="reference") is made[-1]


def array(*shape: int, dtype: mx.Dtype = mx.float16) -> mx.array:
    return mx.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (array(2, 9, 64), array(1, 2, 9, 64), array(1, 2, 9, 64), r"q.shape: expected 4 axes"),
        (array(1, 3, 9, 64), array(1, 2, 9, 64), array(1, 2, 9, 64), r"divides the 3 of q"),
        (array(1, 2, 9, 64), array(1, 2, 9, 32), array(1, 2, 9, 64), r"k.shape: .* axis of 64"),
        (array(1, 2, 9, 64), array(2, 2, 9, 64), array(2, 2, 9, 64), r"k.shape: .* batch of 1"),
        (array(1, 2, 9, 64), array(1, 2, 9, 64), array(1, 2, 8, 64), r"v.shape: .* as k has"),
        (
            array(1, 2, 9, 64, dtype=mx.complex64),
            array(1, 2, 9, 64),
            array(1, 2, 9, 64),
            r"dtype: expected one of float32, float16, bfloat16",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    q: mx.array, k: mx.array, v: mx.array, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        metalgen.attention(q, k, v)


def test_a_kernel_takes_arrays_of_its_own_type_only() -> None:
    kernel = metalgen.get_kernel(AttentionConfig(64), device="reference")
    q, k = array(1, 2, 9, 64), array(1, 2, 9, 64, dtype=mx.float32)
    with pytest.raises(ArgumentError, match=r"k.dtype: expected float16, but got 'mlx.core.float3"):
        kernel(q, k, q)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", True])
def test_a_scale_that_is_no_finite_number_is_refused(scale: object) -> None:
    x = array(1, 1, 2, 64)
    with pytest.raises(ArgumentError, match="scale: expected a finite number"):
        metalgen.attention(x, x, x, scale=scale)  # type: ignore[arg-type]


def test_scales_of_any_size_and_type_are_those_of_the_definition() -> None:
    q, k, v = (normal((1, 1, 5, 16), seed=n) for n in range(3))
    for scale in (1e-300, -1e-45, 1e-38, 3e-31, 0, np.float32(0.25), np.int64(1)):
        out = metalgen.attention(q, k, v, scale=scale, causal=True, device="simulator")  # type: ignore[arg-type]
        expected, _ = attention_float64(q, k, v, scale=float(scale), causal=True)
        np.testing.assert_allclose(np.array(out), expected, atol=2e-6, err_msg=str(scale))


@pytest.mark.parametrize("moved", [(0, 2), (1,)])
def test_derivatives_along_a_direction_are_those_of_the_definition(moved: tuple[int, ...]) -> None:
    config = AttentionConfig(8, "float32", causal=True, return_lse=True)
    kernel = metalgen.get_kernel(config, q_len=5, device="simulator")
    given = [normal((1, 2, 5, 8), seed=n) for n in range(3)]
    along = [normal((1, 2, 5, 8), seed=3 + n) for n in moved]

    def call(*some: mx.array) -> list[mx.array]:
        every = dict(enumerate(given)) | dict(zip(moved, some, strict=True))
        return list(kernel(*every.values(), scale=0.4))

    got = mx.jvp(call, [given[n] for n in moved], along)[1]
    ends = []
    for step in (1e-5, -1e-5):
        every = [np.array(x, dtype=np.float64) for x in given]
        for n, direction in zip(moved, along, strict=True):
            every[n] += step * np.array(direction)
        ends.append(attention_float64(*every, scale=0.4, causal=True))
    for x, above, below in zip(got, *ends, strict=True):
        np.testing.assert_allclose(np.array(x), (above - below) / 2e-5, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_match_finite_differences_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    config = AttentionConfig(
        8, "float32", value_head_dim=12, heads_per_kv=2, causal=causal, return_lse=True
    )
    use(monkeypatch, FakeGpu())
    kernel = metalgen.get_kernel(config)
    assert kernel.backend == "metalgen"
    arrays = [normal((1, 2, 5, 8), seed=1), normal((1, 1, 4, 8), seed=2)]
    arrays.append(normal((1, 1, 4, 12), seed=3))
    weights = normal((1, 2, 5, 12), seed=4)

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out, lse = kernel(q, k, v, scale=0.4)
        seen = mx.where(lse == -mx.inf, 0.0, lse)
        return (out * weights).sum() + 0.5 * seen.sum()

    def loss64(*xs: np.ndarray) -> float:
        out, lse = attention_float64(*xs, scale=0.4, causal=causal)
        return float((out * np.array(weights)).sum() + 0.5 * lse[np.isfinite(lse)].sum())

    gradients = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    exact = [np.array(x, dtype=np.float64) for x in arrays]
    for number, gradient in enumerate(gradients):
        expected = np.zeros_like(exact[number])
        for place in np.ndindex(expected.shape):
            shifted = [x.copy() for x in exact]
            shifted[number][place] += 1e-5
            above = loss64(*shifted)
            shifted[number][place] -= 2e-5
            expected[place] = (above - loss64(*shifted)) / 2e-5
        np.testing.assert_allclose(np.array(gradient), expected, atol=2e-5)


def test_gradients_of_calls_of_one_kernel_are_each_calls_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What MLX knows of a kernel is kept for calls to come, of any shape and scale."""
    use(monkeypatch, FakeGpu())
    kernel = metalgen.get_kernel(AttentionConfig(8, "float32", causal=True))
    plain = get_device("reference").build(AttentionConfig(8, "float32", causal=True))
    calls = [
        ([normal((b, 2, length, 8), seed=n + length) for n in range(3)], scale)
        for b, length, scale in ((1, 5, 0.3), (2, 3, 0.3), (1, 5, 0.6), (1, 5, 0.3))
    ]

    def loss(arrays: list[mx.array], scale: float) -> mx.array:
        return (kernel(*arrays, scale=scale) ** 2).sum()

    def loss_of_plain(arrays: list[mx.array], scale: float) -> mx.array:
        return (plain(*arrays, scale)[0] ** 2).sum()

    pending = [mx.grad(loss)(arrays, scale) for arrays, scale in calls]
    for (arrays, scale), got in zip(calls, pending, strict=True):
        expected = mx.grad(loss_of_plain)(arrays, scale)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=1e-5)


def test_calls_take_part_in_compile_and_stay_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeGpu())
    kernel = metalgen.get_kernel(AttentionConfig(40))
    x = normal((1, 2, 9, 40), "float16")
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("mx.eval on the way of a call"))
    compiled = mx.compile(lambda x: kernel(x, x, x) * 2)
    expected, _ = attention_float64(x, x, x, scale=40**-0.5)
    np.testing.assert_allclose(np.array(compiled(x)), 2 * expected, atol=4e-3)


@pytest.mark.parametrize("transform", [mx.compile, mx.vmap])
def test_the_simulator_says_that_it_has_no_place_in_a_lazy_transformation(transform: Any) -> None:
    x = normal((3, 1, 2, 5, 16))
    cache = mx.zeros((1, 2, 8, 16)), mx.zeros((1, 2, 8, 16))
    if transform is mx.compile:
        x = x[0]

    def attend(x: mx.array) -> mx.array:
        return metalgen.attention(x, x, x, device="simulator")

    def append(x: mx.array) -> mx.array:
        rope = metalgen.Rope()
        return metalgen.append_kv(cache, x, x, offset=0, rope=rope, device="simulator")[0]

    for function in (attend, append):
        with pytest.raises(LaunchError, match="at once; call it outside of mx.compile"):
            transform(function)(x)


def test_importing_metalgen_brings_nothing_but_mlx() -> None:
    code = (
        "import sys, mlx.core; before = set(sys.modules); import metalgen, json;"
        "metalgen.get_kernel(metalgen.AttentionConfig(64));"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = set(json.loads(out.stdout)) - set(sys.stdlib_module_names)
    assert brought == {"metalgen"}


def test_every_public_name_resolves() -> None:
    for name in metalgen.__all__:
        assert getattr(metalgen, name) is not None
    assert set(metalgen.__all__) <= set(dir(metalgen))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metalgen.nothing  # noqa: B018


def test_the_reference_can_be_forced() -> None:
    config = AttentionConfig(64, return_lse=True)
    kernel = metalgen.get_kernel(config, device="reference")
    assert kernel.backend == "plain"
    x = normal((1, 1, 4, 64))
    out, lse = metalgen.attention(x, x, x, return_lse=True, device="reference")
    expected, expected_lse = attention_float64(x, x, x, scale=0.125)
    np.testing.assert_allclose(np.array(out), expected, atol=1e-6)
    np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-6)
    assert get_device("reference").language is None
    assert kernel.schedule == default_schedule(config)


def test_a_kernel_says_in_a_line_what_it_is() -> None:
    kernel = metalgen.get_kernel(AttentionConfig(64, causal=True), q_len=200, device="reference")
    assert repr(kernel) == f"<Kernel D64 float16 causal: plain on reference, {kernel.schedule}>"
