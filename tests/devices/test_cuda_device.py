"""The CUDA device without a GPU: what is refused, and kernels that fail or never run."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import mlx.core as mx
import numpy as np
import pytest
from cuda_machine import CudaMachine, use_cuda

import metalgen
from metalgen import chips
from metalgen.append.launch import row_maker
from metalgen.calls import resolve
from metalgen.calls.verify import verify
from metalgen.devices import cuda, default_device, get_device
from metalgen.devices.cuda import CudaDevice
from metalgen.devices.marking import is_unwritten, marked_outputs
from metalgen.errors import ArgumentError, DeviceError, InvalidSchedule
from metalgen.families import Limits, default_schedule, space
from metalgen.families.append import append_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.reference import attention_float64
from metalgen.source.render import render

# MLX has no fused kernel for this width.
CONFIG = AttentionConfig(40, causal=True, return_lse=True)
Found = TypeVar("Found")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Nothing that a made-up machine did is remembered."""
    for clear in (resolve.forget_kernels, row_maker.cache_clear):
        clear()
    yield
    for clear in (resolve.forget_kernels, row_maker.cache_clear):
        clear()


def unmarked(call: Callable[[], Found]) -> Found:
    """The result of a call outside of these tests' own marking."""
    return contextvars.Context().run(call)


def test_without_a_cuda_back_end_the_device_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    with pytest.raises(
        DeviceError, match=r"'cuda' is not available: this MLX has no CUDA back end"
    ):
        get_device("cuda")
    assert CudaDevice().limits.threadgroup_bytes == 101376


def test_an_mlx_for_cuda_on_a_machine_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There `mx.cuda.is_available` is true all the same, and `mx.device_info` empty."""
    use_cuda(monkeypatch, CudaMachine(CONFIG), None)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert default_device().name == "reference"
    with pytest.raises(DeviceError, match="'cuda' is not available: MLX sees no NVIDIA GPU"):
        get_device("cuda")
    assert CudaDevice().limits.threadgroup_bytes == 101376


@pytest.mark.parametrize(
    ("capability", "usable"), [((7, 5), False), ((7, 9), False), ((8, 0), True), ((12, 1), True)]
)
def test_a_gpu_before_compute_capability_8_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], usable: bool
) -> None:
    use_cuda(monkeypatch, CudaMachine(CONFIG), capability)
    if usable:
        assert get_device("cuda").name == "cuda"
        return
    major, minor = capability
    with pytest.raises(DeviceError, match=f"compute capability {major}.{minor}, and 8.0 is needed"):
        get_device("cuda")


@pytest.mark.parametrize(
    ("capability", "kibibytes"), [((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((12, 0), 99)]
)
def test_a_schedule_that_needs_more_shared_memory_than_the_gpu_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kibibytes: int
) -> None:
    machine = CudaMachine(CONFIG)
    use_cuda(monkeypatch, machine, capability)
    device = get_device("cuda")
    assert device.limits.threadgroup_bytes == kibibytes * 1024
    config = AttentionConfig(512, "float32")
    schedule = dataclasses.replace(
        default_schedule(config, device.limits), bk=48, buffers=4, row_blocks=1
    )
    wanted = rf"\(threadgroup memory\): \d+ bytes of at most {kibibytes * 1024}"
    with pytest.raises(InvalidSchedule, match=wanted):
        device.build(config, schedule)
    assert machine.launched == []


def test_every_config_has_a_default_schedule_on_the_smallest_gpu_that_is_supported() -> None:
    limits = Limits(99 * 1024, 1024, "cuda")
    for dtype in ("float32", "float16", "bfloat16"):
        for head_dim in (8, 64, 72, 128, 256, 512, 576):
            for family in ("forward", "decode"):
                config = AttentionConfig(head_dim, dtype)
                default = default_schedule(config, limits, family)
                source = render(config, default)
                assert source.shared_memory <= 99 * 1024
                assert space(config, limits, family).point(default) is not None


def test_where_no_schedule_fits_plain_mlx_takes_the_call_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = CudaMachine(CONFIG)
    use_cuda(monkeypatch, machine, (8, 6))
    monkeypatch.setattr(cuda, "OTHER_SHARED_MEMORY", 1024)
    kernel = metalgen.get_kernel(CONFIG, q_len=100, device="cuda")
    assert kernel.backend == "plain"
    assert "FALLBACK to plain MLX operations: no default schedule for" in kernel.explain()
    assert machine.launched == []
    x = mx.random.normal((1, 1, 6, 40), key=mx.random.key(0)).astype(mx.float16)
    expected, _ = attention_float64(x, x, x, scale=40**-0.5, causal=True)
    np.testing.assert_allclose(np.array(kernel(x, x, x)[0]), expected, atol=2e-3)


def test_a_kernel_keeps_to_the_gpu_that_is_here_whichever_chip_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_cuda(monkeypatch, CudaMachine(AttentionConfig(256)), (8, 6))
    for chip in ("H200", None):
        kernel = metalgen.get_kernel(AttentionConfig(256), q_len=100, device="cuda", chip=chip)
        source = render(kernel.config, kernel.schedule)
        assert source.shared_memory <= 99 * 1024


def test_the_simulator_runs_metals_kernels_on_a_machine_with_an_nvidia_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ziglang", reason="the simulator's compiler is not installed")
    monkeypatch.setattr(chips, "detect", lambda: chips.get_chip("H200"))
    config = AttentionConfig(8)
    kernel = metalgen.get_kernel(config, q_len=100, device="simulator")
    assert kernel.backend == "metalgen"
    assert kernel.schedule == default_schedule(config)
    assert "check on simulator: ok now" in kernel.explain()


def test_what_a_kernel_is_checked_with_runs_on_the_made_up_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = CudaMachine(CONFIG)
    use_cuda(monkeypatch, machine)
    device = get_device("cuda")
    for family in ("forward", "decode"):
        schedule = default_schedule(CONFIG, device.limits, family)
        assert verify(device, CONFIG, schedule).ok
    kinds = {launch["name"].split("_")[1] for launch in machine.launched}
    assert kinds == {"forward", "decode", "combine"}
    assert all(launch["threads"] <= 512 for launch in machine.launched)


@pytest.mark.parametrize(
    ("family", "kernel"), [("forward", "forward"), ("decode", "decode"), ("decode", "combine")]
)
def test_a_kernel_that_is_never_launched_fails_though_its_memory_holds_the_right_answer(
    monkeypatch: pytest.MonkeyPatch, family: str, kernel: str
) -> None:
    use_cuda(monkeypatch, CudaMachine(CONFIG, unlaunched=(kernel,)))
    device = get_device("cuda")
    schedule = default_schedule(CONFIG, device.limits, family)
    result = unmarked(lambda: verify(device, CONFIG, schedule))
    assert not result.ok
    assert result.error == float("inf")
    assert "relative error inf (all of it is NaN, as where nothing is launched)" in result.detail


def test_a_call_is_not_marked() -> None:
    """Filling outputs costs time: only whoever judges a kernel asks for it."""
    seen = []

    def kernel(**given: object) -> list[mx.array]:
        seen.append(given)
        return []

    from metalgen.devices.marking import marking

    unmarked(lambda: marking(kernel)(grid=(1, 1, 1)))
    with marked_outputs():
        marking(kernel)(grid=(1, 1, 1))
    assert seen[0] == {"grid": (1, 1, 1)}
    assert np.isnan(seen[1].pop("init_value")) and seen[1] == seen[0]
    assert not is_unwritten(mx.array([float("nan"), 0.0])) and not is_unwritten(mx.zeros((0,)))


@pytest.mark.parametrize("q_len", [100, 1])
def test_a_kernel_that_is_never_launched_is_never_dispatched(
    monkeypatch: pytest.MonkeyPatch, q_len: int
) -> None:
    config = dataclasses.replace(CONFIG, return_lse=False)
    use_cuda(monkeypatch, CudaMachine(config, unlaunched=("metalgen",)))
    kernel = unmarked(lambda: metalgen.get_kernel(config, q_len=q_len, device="cuda"))
    assert kernel.backend == "plain"
    assert "check on cuda: wrong now" in kernel.explain()
    assert "as where nothing is launched" in kernel.explain()
    assert "FALLBACK to plain MLX" in kernel.explain()


def test_an_append_that_is_never_launched_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (
        AttentionConfig(64, kv_bits=8, kv_group=64),
        AttentionConfig(64, kv_lens=True),
        AttentionConfig(64, rope="half"),
    ):
        use_cuda(monkeypatch, CudaMachine(config))
        assert unmarked(lambda c=config: row_maker(c, "cuda", append_schedule())) is not None
        row_maker.cache_clear()
        use_cuda(monkeypatch, CudaMachine(config, unlaunched=("append",)))
        with pytest.warns(RuntimeWarning, match="append runs in plain MLX operations: no kernel"):
            unmarked(lambda c=config: row_maker(c, "cuda", append_schedule()))
        row_maker.cache_clear()


@pytest.mark.parametrize(
    "message",
    [
        "Failed to compile kernel: metalgen_forward.cu(9): error: expected a ';'.",
        "cuGraphAddKernelNode(&node, graph_, NULL, 0, &params) failed: invalid argument",
        "cudaStreamSynchronize(stream_) failed: an illegal memory access was encountered",
    ],
)
def test_what_the_compiler_or_the_launch_says_is_shown_and_plain_mlx_takes_the_call(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    use_cuda(monkeypatch, CudaMachine(CONFIG, broken={"metalgen": message}))
    kernel = metalgen.get_kernel(CONFIG, q_len=100, device="cuda")
    assert kernel.backend == "plain"
    assert message in kernel.explain()
    x = mx.random.normal((1, 1, 6, 40), key=mx.random.key(0)).astype(mx.float16)
    out, lse = kernel(x, x, x)
    expected, expected_lse = attention_float64(x, x, x, scale=40**-0.5, causal=True)
    np.testing.assert_allclose(np.array(out), expected, atol=2e-3)
    np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-3)


def test_more_entries_or_heads_than_a_grid_takes_are_several_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AttentionConfig(8, heads_per_kv=2)
    machine = CudaMachine(config)
    use_cuda(monkeypatch, machine)
    device = get_device("cuda")
    run = device.build(config, default_schedule(config, device.limits))
    q, k = mx.zeros((65537, 2, 1, 8), mx.float16), mx.ones((65537, 1, 1, 8), mx.float16)
    out, _ = run(q, k, k, 1.0)
    assert [launch["grid"][1:] for launch in machine.launched] == [(2, 65535), (2, 2)]
    assert out.shape == (65537, 2, 1, 8) and mx.all(out == 1).item()
    machine.launched.clear()
    q, k = mx.zeros((1, 65536, 1, 8), mx.float16), mx.ones((1, 32768, 1, 8), mx.float16)
    out, _ = run(q, k, k, 1.0)
    assert [launch["grid"][1:] for launch in machine.launched] == [(65534, 1), (2, 1)]
    assert out.shape == (1, 65536, 1, 8)
    seen = AttentionConfig(8, dropout=0.5)
    run = device.build(seen, default_schedule(seen, device.limits))
    with pytest.raises(ArgumentError, match="q.shape: expected at most 65535 batch entries"):
        run(mx.zeros((65536, 1, 1, 8), mx.float16), k, k, 1.0)
