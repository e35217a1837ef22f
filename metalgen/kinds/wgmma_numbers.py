"""Numbers of warp groups, tiles and registers that schedules and plans of `wgmma` share."""

GROUP_ROWS = 64
"""Rows that a warp group multiplies at once."""
GROUP_WARPS = 4
"""Warps of a group, which all take part in a product."""
DEPTH = 16
"""Columns, or rows of a pass, that one instruction contracts."""
PANEL_BYTES = 128
"""Bytes of a row of a panel; eight such rows are what a swizzle permutes."""
CHUNK_BYTES = 16
"""Bytes that are moved at once."""
BARRIER_BYTES = 8
"""Bytes of an mbarrier."""
COPYING_THREADS = 128
"""Threads that copy: another warp group."""
REGISTERS = {1: (56, 240), 2: (40, 232), 3: (32, 160)}
"""Registers of a thread that copies and of one that multiplies, by the number of groups that do.

Multiples of 8; all together are at most 65,536. A kernel starts with as many for each thread.
"""
