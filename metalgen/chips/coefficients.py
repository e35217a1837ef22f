"""The named coefficients of the chip model: what a kernel's parts cost, where no chip says so.

None is tied to a kernel, a config, a schedule or a chip. Those in `FITTED` were fitted by
``metalgen chips fit`` to a table of published measurements (docs/chip-model.md tells which, and how
well they predict what they were not fitted to); what is written here is their value before any fit,
from elsewhere, towards which the fit is drawn. ``measured`` ones come from the source named in
their comment, ``set`` ones were chosen by hand so that the model agrees roughly with a published
measurement, and ``guessed`` ones nobody outside Apple knows. Issue cycles are per instruction of
a simdgroup on one of a core's schedulers.
"""

from __future__ import annotations

from typing import NamedTuple

from metalgen.chips.fitted import VALUES

FITTED = (
    "matrix_wide",
    "alu",
    "page",
    "barrier",
    "spill",
    "spill_dynamic",
    "in_step",
    "leak",
    "saturation",
    "stage_wait",
    "parallel_issue",
)
"""The coefficients that a fit may change."""


class Coefficients(NamedTuple):
    """Units in brackets; docs/chip-model.md explains each."""

    # [cycles] 8x8x8 multiply-accumulate. Measured: 16 is the peak, 17 to 20 were seen in loops with
    # their loads (metal-benchmarks). What float32 operands take on top.
    matrix: float = 16.0
    matrix_wide: float = 1.0
    # [cycles] any other arithmetic. Measured: 1 for float, up to 4 for some integer.
    alu: float = 1.0
    # [cycles] to load or store a fragment straight from or to device memory each pass.
    page: float = 3.0
    # [cycles] of a simdgroup for the barriers of a staged slice.
    barrier: float = 15.0
    # [bytes a cycle] at which a core loads registers that live in memory and were pushed out of
    # what is near: about the bandwidth of the SLC (metal-benchmarks). And on chips that hand out
    # registers as they are needed, where all of them share one memory with threadgroup memory and
    # the stack (Apple), from which they push each other.
    spill: float = 17.5
    spill_dynamic: float = 4.0
    # [bytes] of such memory that holds a stack. Set: on an M4 a value in memory costs what the
    # core's bandwidth allows up to some 50 KiB a core, and many times that from 100 on.
    near: float = 65536.0
    # [share] of every resource's busy time but the busiest's that is not overlapped.
    leak: float = 0.05
    # [share] of a core's register file below which latency cannot be hidden. Measured: arithmetic
    # saturates near 24 simdgroups a core (metal-benchmarks), where 32 of a kernel that uses 52
    # 32-bit registers fill the file.
    saturation: float = 0.75
    # [cycles] that a threadgroup idles a staged slice, between asking for it and having it, with
    # one buffer; with two it is guessed. About the latency of a device read.
    stage_wait: float = 300.0
    stage_wait_two: float = 150.0
    # [cycles] exp2, on a unit of its own beside arithmetic. Measured (metal-benchmarks).
    exp2: float = 4.0
    # [cycles] simdgroup shuffle. Measured (metal-benchmarks).
    shuffle: float = 2.0
    # [share] of the instructions other than products that a chip with parallel issue hides beneath
    # them. Set: MLX's kernel on an M3 Max runs at 83 % of peak, on an M1 Max at 69 %.
    parallel_issue: float = 0.7
    # [cycles] that a simdgroup idles for a fragment read directly when it misses. Guessed: less
    # than for a staged slice, because compilers ask for some of it ahead.
    direct_wait: float = 300.0
    # [share] of repeated device reads that hit because groups that read the same keys run nearly
    # in step: staged reads in the L2; direct ones in the core's data cache, on chips whose
    # published kernels read directly. Guessed before the fit: kernels bound by no cache on an M1
    # Max and an M4 take about half. And in kernels without a barrier, whose simdgroups drift apart.
    # Set: on an M4 a kernel that caches its queries, and so needs no barrier, is about 10 % slower.
    in_step: float = 0.6
    adrift: float = 0.39
    # [share] of a thread's most registers that it holds on average, where a chip hands them out as
    # they are needed. Set: kernels of 128 32-bit registers a thread on an M4 lose no residency.
    live_registers: float = 0.25
    # [bytes] of an instruction, on average; and the share that an instruction costs on top when it
    # is not in the instruction cache. Measured for code of Mesa's compiler; guessed.
    instruction_bytes: float = 8.0
    fetch: float = 0.3
    # [share] of the last wave's tail that remains where groups differ in length and the longest
    # start first. Guessed.
    uneven_tail: float = 0.1
    # [share] of the vendor's memory bandwidth that a kernel reaches. Measured: 0.80 (M5 STREAM
    # copy, michaelstinkerings.org) to 0.86 (530 of 614 GB/s, M5 Max decode).
    dram: float = 0.8
    # [seconds] a launch. Set: 38 to 41 us a queued call of MLX on an M3 Max where there is hardly
    # any work (ml-explore/mlx PR 1610). The same for every kernel, so it ranks nothing.
    launch: float = 35e-6


PRIOR = Coefficients()
"""Before any fit."""
DEFAULT = PRIOR._replace(**VALUES)
"""What predictions use: the fitted values over the prior ones."""
