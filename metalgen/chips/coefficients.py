"""The named coefficients of the chip model: what a kernel's parts cost, where no chip says so.

None is tied to a config, a schedule or a chip. ``measured`` ones come from the source named in
their comment, ``set`` ones were chosen by hand so that the model agrees roughly with a published
measurement, and ``guessed`` ones nobody outside Apple knows. Issue cycles are per instruction of
a simdgroup on one of a core's schedulers.
"""

from __future__ import annotations

from typing import NamedTuple


class Coefficients(NamedTuple):
    """Units in brackets; docs/chip-model.md explains each."""

    # [cycles] 8x8x8 multiply-accumulate with 16-bit and with float32 operands. 16 is the peak, 17
    # to 20 were seen in loops (metal-benchmarks). Set: MLX's kernel on an M1 Max takes 23 in all,
    # of which 6 to 7 are other instructions; metal-flash-attention takes 3 more in float32.
    matrix: float = 16.0
    matrix_wide: float = 19.0
    # [cycles] any other arithmetic. Measured: 1 for float, up to 4 for some integer.
    alu: float = 1.0
    # [cycles] exp2, on a unit of its own beside arithmetic. Measured (metal-benchmarks).
    exp2: float = 4.0
    # [cycles] simdgroup shuffle. Measured (metal-benchmarks).
    shuffle: float = 2.0
    # [share] of the instructions other than products that a chip with parallel issue hides beneath
    # them. Set: MLX's kernel on an M3 Max runs at 83 % of peak, on an M1 Max at 69 %.
    parallel_issue: float = 0.7
    # [share] of every resource's busy time but the busiest's that is not overlapped. Guessed.
    leak: float = 0.05
    # [simdgroups a core] at which latency within a simdgroup costs half of the time. Guessed; the
    # only evidence is that arithmetic saturates near 24 simdgroups (metal-benchmarks).
    latency: float = 0.2
    # [share] of the time of a simdgroup whose rows are all masked, and which waits for the others
    # of its threadgroup, that its scheduler loses when no other threadgroup is there. Guessed.
    masked: float = 0.2
    # [cycles] that a threadgroup idles a staged slice, between asking for it and having it, with
    # one buffer and with two. Guessed from the latency of a device read.
    stage_wait: float = 400.0
    stage_wait_two: float = 150.0
    # [cycles] that a simdgroup idles for a fragment read directly when it misses. Guessed: less
    # than for a staged slice, because compilers ask for some of it ahead.
    direct_wait: float = 300.0
    # [share] of a threadgroup's redundant device reads that the core's data cache serves, on chips
    # whose published kernels read K and V directly and on others. Guessed, on the careful side:
    # simdgroups that stage nothing do not wait for each other either, and drift apart.
    shared_hits: float = 0.0
    shared_hits_direct: float = 0.25
    # [share] of a thread's most registers that it holds on average, where a chip hands them out as
    # they are needed. Guessed.
    live_registers: float = 0.75
    # [cycles] to store and load again a 16-bit register that does not fit. Guessed, carefully.
    spill: float = 8.0
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


DEFAULT = Coefficients()
