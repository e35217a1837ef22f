"""Compiling and checking ahead what a program will call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.arguments import check_positive
from metalgen.calls.kernel import Kernel
from metalgen.calls.resolve import KernelRequest, get_kernel, recorded_requests
from metalgen.devices import default_device, get_device
from metalgen.errors import ArgumentError
from metalgen.families import attention_families, get_attention
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import sample_call

Progress = Callable[[int, int, Kernel], None]
"""Called after each kernel with how many are done, how many there are, and the kernel."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made ready.

    Attributes:
        kernels: each kernel that calls will get.
        seconds: wall time of all.
    """

    kernels: tuple[Kernel, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{len(self.kernels)} kernels are ready after {self.seconds:.1f} s"]
        lines += [
            f"  {kernel.config}, {kernel.family}: {kernel.backend} on {kernel.device}"
            for kernel in self.kernels
        ]
        return "\n".join(lines)


def prepare(
    what: Any,
    *example: Any,
    device: str | None = None,
    chip: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Compile and check ahead the kernels that a program will call, so that no call waits for them.

    Args:
        what: a config, an iterable of configs, or a model: anything that is called. A config is
            prepared for many queries and for one. A model is called once with `example`, which
            tells what it asks for; plain MLX operations stand in, and its result is not evaluated.
        example: arguments of a model, of the lengths that it will see.
        device, chip: as in `metalgen.attention`. A model's calls that name a device keep it.
        workers: kernels that are prepared at once, where the device allows it (the simulator,
            whose compiler is another process; MLX compiles one GPU kernel at a time). None: 2.
        progress: called after each kernel.

    Returns:
        The kernels, and the time that they took.

    Raises:
        ArgumentError: nothing that can be prepared.
        DeviceError: the device is not available here.
    """
    begin = time.perf_counter()
    name = default_device().name if device is None else get_device(device).name
    many = 2 if workers is None else check_positive("workers", workers)
    requests = _requests(what, example, name, chip, device is not None)
    kernels: list[Kernel] = []
    threads = many if name == "simulator" else 1
    if threads == 1:  # MLX's streams belong to threads
        found: Iterable[Kernel] = map(_ready, requests)
        pool = None
    else:
        pool = ThreadPoolExecutor(threads)
        found = pool.map(_ready, requests)
    try:
        for kernel in found:
            kernels.append(kernel)
            if progress is not None:
                progress(len(kernels), len(requests), kernel)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return Prepared(tuple(dict.fromkeys(kernels)), time.perf_counter() - begin)


def _requests(
    what: Any, example: tuple[Any, ...], device: str, chip: str | None, named: bool
) -> list[KernelRequest]:
    if isinstance(what, AttentionConfig):
        what = [what]
    if callable(what):
        with recorded_requests() as found:
            what(*example)
        if named:
            found = [request._replace(device=device) for request in found]
        return [request._replace(chip=chip or request.chip) for request in found]
    configs = list(what) if isinstance(what, Iterable) else []
    if not configs or not all(isinstance(c, AttentionConfig) for c in configs):
        expected = "an AttentionConfig, an iterable of them, or a model and arguments for it"
        raise ArgumentError("what", expected, type(what).__name__)
    if example:
        raise ArgumentError("example", "nothing with configs", example)
    lengths = [family.usual_q_len for family in attention_families().values()]
    problems = [Problem(c, 32, q_len, 1024) for c in configs for q_len in lengths]
    return [KernelRequest(problem, 1, device, chip) for problem in dict.fromkeys(problems)]


def _ready(request: KernelRequest) -> Kernel:
    """The kernel of a request, which has run once."""
    problem, batch, device, chip = request
    config = problem.config
    kernel = get_kernel(
        config,
        batch=batch,
        heads=max(1, problem.batch_heads // batch),
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        device=device,
        chip=chip,
    )
    if get_device(device).is_gpu and kernel.backend == "metalgen":
        # The check, if there was none, compiled it; one on record did not.
        q_len = get_attention(kernel.family).usual_q_len
        q, k, v, inputs = sample_call(config, batch=1, q_len=q_len, kv_len=96, seed=0)
        mx.eval(kernel._run(q, k, v, 1.0, inputs)[0])
    return kernel
