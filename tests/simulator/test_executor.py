"""Whatever a kernel does, the calling process lives and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.errors import ArgumentError
from metalgen.simulator import executor, launch_limits
from metalgen.simulator.errors import (
    ExecutionError,
    KernelCrash,
    KernelTimeout,
    MemoryLimit,
    SimulatorError,
    StackOverflow,
)

DOUBLE = "uint i = thread_position_in_grid.x; out[i] = x[i] * 2;"


def run(source: str, size: int = 64, header: str = "", **changes: Any) -> mx.array:
    kernel = simulator.metal_kernel(
        name="k", input_names=["x"], output_names=["out"], source=source, header=header
    )
    arguments: dict[str, Any] = dict(
        inputs=[mx.arange(size, dtype=mx.float32)],
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(size, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return kernel(**{**arguments, **changes})[0]


@pytest.fixture
def the_next_call_works() -> Iterator[None]:
    yield
    assert run(DOUBLE).tolist() == [2.0 * i for i in range(64)]


def line_of(error: ExecutionError, source: str, needle: str) -> bool:
    """Whether the error's line is the one with ``needle`` (the signature has 4 lines)."""
    assert error.line is not None
    return needle in source.split("\n")[error.line - 5]


@pytest.mark.usefixtures("the_next_call_works")
def test_an_endless_loop_ends_at_the_time_limit() -> None:
    source = "volatile uint i = thread_position_in_grid.x;\nwhile (true) { i += 1; }"
    with (
        simulator.limits(seconds=0.5),
        pytest.raises(KernelTimeout, match=r"after 0\.5 s") as caught,
    ):
        run(source)
    assert line_of(caught.value, source, "while (true)")
    assert caught.value.thread == (0, 0, 0)


@pytest.mark.usefixtures("the_next_call_works")
def test_a_write_through_a_wild_pointer_is_a_crash_that_names_line_and_thread() -> None:
    source = "uint i = thread_position_in_grid.x;\nif (i == 37) {\n  out[i + (1ul << 40)] = 1; // here\n}"
    with pytest.raises(KernelCrash, match="touched memory that no buffer owns") as caught:
        run(source)
    assert caught.value.thread == (5, 0, 0) and caught.value.threadgroup == (1, 0, 0)
    assert line_of(caught.value, source, "// here")


@pytest.mark.usefixtures("the_next_call_works")
def test_a_read_through_a_null_pointer_is_a_crash() -> None:
    source = (
        "uint i = thread_position_in_grid.x;\n"
        "const device float* p = (const device float*)(ulong(i) * 0);\nout[i] = p[3]; // here"
    )
    with pytest.raises(KernelCrash) as caught:
        run(source)
    assert line_of(caught.value, source, "// here")


@pytest.mark.usefixtures("the_next_call_works")
def test_endless_recursion_is_a_stack_overflow() -> None:
    header = """
    int down(int n, const device float* x) {
      int a[64];
      for (int i = 0; i < 64; i++) { a[i] = n + int(x[i % 4]); }
      return n < 0 ? 0 : down(n + 1, x) + a[n % 64];
    }
    """
    with pytest.raises(StackOverflow, match="more stack than its"):
        run("out[thread_position_in_grid.x] = down(1, x);", header=header)


@pytest.mark.usefixtures("the_next_call_works")
def test_a_stack_limit_can_be_raised() -> None:
    source = """
    int big[40000];
    uint t = thread_position_in_grid.x;
    for (int i = 0; i < 40000; i++) { big[i] = i + int(x[t]); }
    int total = 0;
    for (int i = 0; i < 40000; i += 1 + int(x[0])) { total += big[(i * 7) % 40000] & 1; }
    out[t] = total;
    """
    with pytest.raises(StackOverflow):
        run(source)
    with simulator.limits(stack_bytes=1 << 20):
        assert run(source).tolist() == [20000.0] * 64


@pytest.mark.usefixtures("the_next_call_works")
def test_a_huge_output_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(MemoryLimit, match=r"'out' with 1,099,511,627,776") as caught:
        run(DOUBLE, output_shapes=[(1 << 20, 1 << 18)])
    assert isinstance(caught.value, MemoryError)


@pytest.mark.usefixtures("the_next_call_works")
def test_the_memory_limit_can_be_lowered() -> None:
    with simulator.limits(memory_bytes=1 << 20), pytest.raises(MemoryLimit):
        run(DOUBLE, output_shapes=[(1 << 20,)])


@pytest.mark.usefixtures("the_next_call_works")
def test_an_integer_division_by_zero_does_not_end_the_caller() -> None:
    # Metal leaves the result undefined; a CPU may trap.
    source = "int i = int(x[thread_position_in_grid.x]);\nout[0] = 5 / (i - i); // here"
    try:
        run(source)
    except KernelCrash as error:
        assert line_of(error, source, "// here")


@pytest.mark.usefixtures("the_next_call_works")
def test_a_worker_that_is_killed_while_idle_is_replaced() -> None:
    run(DOUBLE)
    for worker in executor._pool.idle:
        os.kill(worker.process.pid, signal.SIGKILL)
    time.sleep(0.05)


@pytest.mark.usefixtures("the_next_call_works")
def test_ctrl_c_ends_the_kernel_and_reaches_the_caller() -> None:
    # In another process, so that the interrupt cannot reach the test run by mistake.
    code = (
        "import mlx.core as mx, os, signal, threading\n"
        "from metalgen import simulator\n"
        "k = simulator.metal_kernel(name='k', input_names=['x'], output_names=['o'],\n"
        "  source='volatile uint i = thread_position_in_grid.x; while (true) { i += 1; }')\n"
        "threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "  k(inputs=[mx.zeros(9)], output_shapes=[(1,)], output_dtypes=[mx.float32],\n"
        "    grid=(1, 1, 1), threadgroup=(1, 1, 1))\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "interrupted\n", done.stderr


def test_ctrl_c_while_the_process_ends_kills_what_it_waits_for_and_says_nothing() -> None:
    code = (
        "import os, signal, threading\n"
        "from metalgen.simulator import executor\n"
        "worker = executor.Worker()\n"
        "executor._pool.idle.append(worker)\n"
        "os.kill(worker.process.pid, signal.SIGSTOP)\n"  # it does not leave by itself
        "print(worker.process.pid)\n"
        "timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "timer.daemon = True\n"  # else its end is waited for before
        "timer.start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def children() -> set[int]:
    """Return the process ids of this process's children, zombies included."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, which Linux has")
def test_no_zombie_and_no_surplus_child_is_left() -> None:
    for _ in range(3):
        with pytest.raises(KernelCrash):
            run("out[1ul << 40] = thread_position_in_grid.x;")
    run(DOUBLE)
    ours = {worker.process.pid for worker in executor._pool.idle}
    assert ours and len(ours) <= launch_limits.usable_cores()
    states = {
        pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        for pid in children()
    }
    assert "Z" not in states.values()
    assert ours <= set(states)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_workers_of_its_own() -> None:
    run(DOUBLE)
    before = {worker.process.pid for worker in executor._pool.idle}
    pid = os.fork()
    if pid == 0:  # MLX itself does not survive a fork, so the child only looks and leaves
        status = 0 if not executor._pool.idle and not executor._pool.busy else 1
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert run(DOUBLE).tolist() == [2.0 * i for i in range(64)]
    assert {worker.process.pid for worker in executor._pool.idle} >= before


def test_children_end_with_the_interpreter() -> None:
    code = (
        "import mlx.core as mx\n"
        "from metalgen import simulator\n"
        "from metalgen.simulator import executor\n"
        "k = simulator.metal_kernel(name='k', input_names=['x'], output_names=['o'],\n"
        "  source='o[thread_position_in_grid.x] = 1;')\n"
        "k(inputs=[mx.zeros(9)], output_shapes=[(9,)], output_dtypes=[mx.float32],\n"
        "  grid=(9, 1, 1), threadgroup=(9, 1, 1))\n"
        "print(executor._pool.idle[0].process.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_several_python_threads_share_the_workers() -> None:
    results: dict[int, list[float]] = {}

    def work(index: int) -> None:
        for _ in range(5):
            results[index] = run(
                f"uint i = thread_position_in_grid.x; out[i] = x[i] + {index};", size=4096
            ).tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [float(i + n) for i in range(4096)] for n in range(5)}
    assert not executor._pool.busy


def test_a_large_grid_is_split_over_processes_and_gives_the_same_result() -> None:
    with simulator.record() as runs:
        split = run(DOUBLE, size=1 << 16)
        with simulator.limits(processes=1):
            whole = run(DOUBLE, size=1 << 16)
    assert mx.array_equal(split, whole).item()
    assert runs[1].processes == 1
    assert runs[0].processes == min(launch_limits.usable_cores(), (1 << 16) // 64)


def test_limits_are_restored_and_unknown_ones_are_refused() -> None:
    before = launch_limits.current_limits()
    with simulator.limits(seconds=3) as inside:
        assert inside.seconds == 3 and launch_limits.current_limits() == inside
    assert launch_limits.current_limits() == before
    with pytest.raises(TypeError), simulator.limits(minutes=3):
        pass


def test_limits_and_seeds_may_be_numbers_of_numpy() -> None:
    numbers = {
        "seconds": np.float32(20),
        "memory_bytes": np.int64(1 << 28),
        "processes": np.int8(1),
        "stack_bytes": np.uint32(1 << 17),
    }
    with simulator.limits(**numbers), simulator.record(checked=True, seed=np.int64(3)):  # type: ignore[arg-type]
        assert run(DOUBLE).tolist() == run(DOUBLE).tolist()
        assert repr(launch_limits.current_limits()) == (
            "Limits(seconds=20.0, memory_bytes=268435456, processes=1, stack_bytes=131072)"
        )


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"seconds": 0}, "seconds: expected a number above 0, up to a million, but got 0"),
        ({"seconds": "9"}, "seconds: expected a number above 0, up to a million, but got '9'"),
        ({"seconds": float("nan")}, "seconds: expected a number above 0, up to a million, but got"),
        ({"memory_bytes": -1}, "memory_bytes: expected an integer from 0 to 4611686018427387904"),
        ({"processes": 1.5}, "processes: expected an integer from 0 to 65536, but got 1.5"),
        ({"stack_bytes": 0}, "stack_bytes: expected an integer from 1 to 1099511627776, but got 0"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_name(limit: dict[str, Any], message: str) -> None:
    before = launch_limits.current_limits()
    with pytest.raises(ArgumentError) as caught, simulator.limits(**limit):
        pass
    assert str(caught.value).startswith(message)
    assert launch_limits.current_limits() == before


@pytest.mark.parametrize("seed", [-1, 1 << 64, "a", True])
def test_a_seed_that_cannot_be_is_refused_by_name(seed: Any) -> None:
    with pytest.raises(ArgumentError, match="^seed: expected an integer from 0 to 184467440737"):
        simulator.record(checked=True, seed=seed).__enter__()


def test_every_error_of_the_simulator_is_a_metalgen_error() -> None:
    from metalgen.errors import MetalgenError

    assert issubclass(SimulatorError, MetalgenError)
    with pytest.raises(MetalgenError):
        run("out[0] = nothing;")


def test_a_missing_ziglang_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import sys, mlx.core as mx\n"
        "sys.modules['ziglang'] = None\n"
        "from metalgen import simulator\n"
        "from metalgen.simulator.errors import MissingToolchain\n"
        "k = simulator.metal_kernel(name='k', input_names=['x'], output_names=['o'],\n"
        "  source='o[thread_position_in_grid.x] = 12345;')\n"
        "try:\n"
        "  k(inputs=[mx.zeros(9)], output_shapes=[(9,)], output_dtypes=[mx.float32],\n"
        "    grid=(9, 1, 1), threadgroup=(9, 1, 1))\n"
        "except MissingToolchain as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "ziglang" in done.stdout and "metalgen[simulator]" in done.stdout, done.stderr


def test_a_child_that_has_loaded_many_kernels_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "MOST_LIBRARIES", 1)
    executor._pool.close()
    with simulator.limits(processes=1):
        run(DOUBLE)
        assert executor._pool.idle == []
        assert run(DOUBLE).tolist() == [2.0 * i for i in range(64)]
