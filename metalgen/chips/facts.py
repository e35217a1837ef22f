"""What is published about each chip: figures as data, each with the source that it came from.

A figure is written ``(value, source)``; a source is a key of `SOURCES`, and a key that ends in
``?`` says that the value is an estimate which that source only suggests. Sources are quoted from
stored copies of public material (autumn 2026); nothing here was measured by this project.
"""

from __future__ import annotations

SOURCES = {
    "apple": "Apple's technical specifications of the Macs with this chip",
    "metal-api": "Apple, Metal feature set tables: limits of a threadgroup, families Apple7 to 10",
    "metal-benchmarks": "philipturner/metal-benchmarks: README, microbenchmarks of M1 and M2",
    "mfa": "philipturner/metal-flash-attention: README and tables of tiles",
    "mfa-tiles": "philipturner/metal-flash-attention: groups of 8 KiB run 8 to a core on an "
    "M1 Max; metal-benchmarks says about 60 KiB",
    "mfa-rate": "philipturner/metal-flash-attention: rate of 3580 GFLOP/s that its tables of "
    "the M4 assume; 1578 MHz is the top state in powermetrics of Macs with an M4",
    "scaled": "extrapolated from the same tier of an earlier generation; not published",
    "m3-dvfs": "1380 MHz is the top state of an M3 Pro's own frequency table (public run log)",
    "m4-dvfs": "1578 MHz is the top state in powermetrics of M4, M4 Pro and M4 Max (public logs; "
    "hoakley, eclecticlight.co, January 2025, for the M4 Pro)",
    "m5-roofline": "michaelstinkerings.org: Apple M5 GPU roofline analysis (1578 MHz sustained, "
    "32 MB system level cache)",
    "m5-dvfs": "feedback-assistant/reports issue 830: 1620 MHz in powermetrics of an M5 Max",
    "mlx": "ml-explore/mlx: the tiles of its attention kernels, by generation",
    "mlx-m5": "ml-explore/mlx PR 3211: 58 to 60 TFLOP/s in float16 matrix products on an M5 Max",
    "nvidia": "NVIDIA: data sheets of these GPUs, Hopper tuning guide",
    "ptx": "NVIDIA: PTX ISA, target notes of wgmma.mma_async",
    "cuda": "NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability",
}

KIB, MIB = 1024, 1024 * 1024

Figure = tuple[float, str]

GENERATIONS: dict[str, dict[str, Figure]] = {
    # Per core. Register file: metal-benchmarks gives about 208 KiB in one table and implies
    # 384 KiB in another, so residency is uncertain by a factor of 2; the smaller is taken.
    "M1": {
        "lanes": (128, "metal-benchmarks"),
        "schedulers": (4, "metal-benchmarks"),
        "resident_threads": (3072, "metal-benchmarks"),
        "register_bytes": (208 * KIB, "metal-benchmarks"),
        "core_threadgroup_bytes": (64 * KIB, "mfa-tiles?"),
        "threadgroup_bytes": (32 * KIB, "metal-api"),
        "threads": (1024, "metal-api"),
        "data_cache_bytes": (8 * KIB, "metal-benchmarks"),
        "instruction_cache_bytes": (12 * KIB, "metal-benchmarks"),
        "on_core_bytes_per_cycle": (64, "metal-benchmarks"),
        "l2_bytes_per_cycle": (32, "metal-benchmarks"),
        "slc_bytes_per_cycle": (17.5, "metal-benchmarks"),
        "dynamic_registers": (0, "metal-benchmarks"),
        "parallel_issue": (0, "metal-benchmarks"),
        "direct_reads": (0, "mfa"),
        "neural_accelerators": (0, "apple"),
        "warp_group_products": (0, "metal-api"),
    },
    # Apple, WWDC and A17/M3 talks: registers, threadgroup memory and the data cache share one
    # on-chip memory, handed out dynamically; float, half and integer pipes issue side by side.
    "M3": {
        "register_bytes": (208 * KIB, "scaled?"),
        "core_threadgroup_bytes": (64 * KIB, "scaled?"),
        "data_cache_bytes": (8 * KIB, "scaled?"),
        "instruction_cache_bytes": (12 * KIB, "scaled?"),
        "on_core_bytes_per_cycle": (64, "scaled?"),
        "l2_bytes_per_cycle": (32, "scaled?"),
        "slc_bytes_per_cycle": (17.5, "scaled?"),
        "dynamic_registers": (1, "apple"),
        "parallel_issue": (1, "apple"),
        "direct_reads": (1, "mfa"),
    },
    "M5": {
        "direct_reads": (1, "mlx"),
        "neural_accelerators": (1, "apple"),
    },
}
GENERATIONS["M2"] = dict(GENERATIONS["M1"])
GENERATIONS["M3"] = GENERATIONS["M2"] | GENERATIONS["M3"]
GENERATIONS["M4"] = dict(GENERATIONS["M3"])
GENERATIONS["M5"] = GENERATIONS["M4"] | GENERATIONS["M5"]

# (generation, tier): the full chip's GPU cores and the binned ones, then its own figures.
APPLE_CHIPS: dict[tuple[str, str], tuple[tuple[int, ...], dict[str, Figure]]] = {
    ("M1", ""): (
        (8, 7),
        {
            "clock_ghz": (1.278, "metal-benchmarks"),
            "dram_gbs": (68, "apple"),
            "l2_bytes": (768 * KIB, "metal-benchmarks"),
            "slc_bytes": (8 * MIB, "metal-benchmarks"),
        },
    ),
    ("M1", "Pro"): (
        (16, 14),
        {
            "clock_ghz": (1.296, "metal-benchmarks"),
            "dram_gbs": (200, "apple"),
            "l2_bytes": (256 * KIB, "metal-benchmarks"),
            "slc_bytes": (24 * MIB, "metal-benchmarks"),
        },
    ),
    ("M1", "Max"): (
        (32, 24),
        {
            "clock_ghz": (1.296, "metal-benchmarks"),
            "dram_gbs": (400, "apple"),
            "l2_bytes": (512 * KIB, "metal-benchmarks"),
            "slc_bytes": (48 * MIB, "metal-benchmarks"),
        },
    ),
    ("M1", "Ultra"): (
        (64, 48),
        {
            "clock_ghz": (1.296, "metal-benchmarks"),
            "dram_gbs": (800, "apple"),
            "l2_bytes": (1 * MIB, "metal-benchmarks"),
            "slc_bytes": (96 * MIB, "metal-benchmarks"),
        },
    ),
    ("M2", ""): (
        (10, 8),
        {
            "clock_ghz": (1.398, "metal-benchmarks"),
            "dram_gbs": (100, "apple"),
            "l2_bytes": (1536 * KIB, "metal-benchmarks?"),
            "slc_bytes": (8 * MIB, "metal-benchmarks"),
        },
    ),
    ("M2", "Pro"): (
        (19, 16),
        {
            "clock_ghz": (1.398, "metal-benchmarks"),
            "dram_gbs": (200, "apple"),
            "l2_bytes": (512 * KIB, "metal-benchmarks?"),
            "slc_bytes": (24 * MIB, "metal-benchmarks"),
        },
    ),
    ("M2", "Max"): (
        (38, 30),
        {
            "clock_ghz": (1.398, "metal-benchmarks"),
            "dram_gbs": (400, "apple"),
            "l2_bytes": (1 * MIB, "metal-benchmarks?"),
            "slc_bytes": (48 * MIB, "metal-benchmarks"),
        },
    ),
    ("M2", "Ultra"): (
        (76, 60),
        {
            "clock_ghz": (1.398, "metal-benchmarks"),
            "dram_gbs": (800, "apple"),
            "l2_bytes": (2 * MIB, "scaled?"),
            "slc_bytes": (96 * MIB, "metal-benchmarks?"),
        },
    ),
    ("M3", ""): (
        (10, 8),
        {
            "clock_ghz": (1.38, "m3-dvfs?"),
            "dram_gbs": (100, "apple"),
            "l2_bytes": (1536 * KIB, "scaled?"),
            "slc_bytes": (8 * MIB, "scaled?"),
        },
    ),
    ("M3", "Pro"): (
        (18, 14),
        {
            "clock_ghz": (1.38, "m3-dvfs"),
            "dram_gbs": (150, "apple"),
            "l2_bytes": (512 * KIB, "scaled?"),
            "slc_bytes": (12 * MIB, "scaled?"),
        },
    ),
    ("M3", "Max"): (
        (40, 30),
        {
            "clock_ghz": (1.38, "m3-dvfs?"),
            "dram_gbs": (400, "apple"),
            "l2_bytes": (1 * MIB, "scaled?"),
            "slc_bytes": (48 * MIB, "scaled?"),
        },
    ),
    ("M3", "Ultra"): (
        (80, 60),
        {
            "clock_ghz": (1.38, "m3-dvfs?"),
            "dram_gbs": (819, "apple"),
            "l2_bytes": (2 * MIB, "scaled?"),
            "slc_bytes": (96 * MIB, "scaled?"),
        },
    ),
    ("M4", ""): (
        (10, 8),
        {
            "clock_ghz": (1.398, "mfa-rate?"),
            "dram_gbs": (120, "apple"),
            "l2_bytes": (1536 * KIB, "scaled?"),
            "slc_bytes": (8 * MIB, "scaled?"),
        },
    ),
    ("M4", "Pro"): (
        (20, 16),
        {
            "clock_ghz": (1.578, "m4-dvfs"),
            "dram_gbs": (273, "apple"),
            "l2_bytes": (512 * KIB, "scaled?"),
            "slc_bytes": (24 * MIB, "scaled?"),
        },
    ),
    ("M4", "Max"): (
        (40, 32),
        {
            "clock_ghz": (1.578, "m4-dvfs"),
            "dram_gbs": (546, "apple"),
            "l2_bytes": (1 * MIB, "scaled?"),
            "slc_bytes": (48 * MIB, "scaled?"),
        },
    ),
    ("M5", ""): (
        (10, 8),
        {
            "clock_ghz": (1.578, "m5-roofline"),
            "dram_gbs": (153, "apple"),
            "l2_bytes": (1536 * KIB, "scaled?"),
            "slc_bytes": (32 * MIB, "m5-roofline"),
        },
    ),
    ("M5", "Pro"): (
        (20, 16),
        {
            "clock_ghz": (1.62, "m5-dvfs?"),
            "dram_gbs": (307, "apple"),
            "l2_bytes": (512 * KIB, "scaled?"),
            "slc_bytes": (32 * MIB, "scaled?"),
        },
    ),
    ("M5", "Max"): (
        (40, 32),
        {
            "clock_ghz": (1.62, "m5-dvfs"),
            "dram_gbs": (614, "apple"),
            "l2_bytes": (1 * MIB, "scaled?"),
            "slc_bytes": (48 * MIB, "scaled?"),
            "neural_tflops": (58, "mlx-m5"),
        },
    ),
    ("M5", "Ultra"): (
        (80, 64),
        {
            "clock_ghz": (1.62, "m5-dvfs?"),
            "dram_gbs": (1200, "apple"),
            "l2_bytes": (2 * MIB, "scaled?"),
            "slc_bytes": (96 * MIB, "scaled?"),
        },
    ),
}

BINNED: dict[str, dict[str, Figure]] = {
    # Where a binned chip differs in more than its cores.
    "M3Max-30": {"dram_gbs": (300, "apple")},
    "M4Max-32": {"dram_gbs": (410, "apple")},
    "M5Max-32": {"dram_gbs": (460, "apple"), "neural_tflops": (46, "mlx-m5?")},
    # The PCIe card, slower in all.
    "H100-114": {"clock_ghz": (1.755, "nvidia"), "dram_gbs": (2000, "nvidia")},
}

CAPABILITIES: dict[str, dict[str, Figure]] = {
    # Of a streaming multiprocessor and a block, by compute capability: the same table as
    # `metalgen.devices.cuda.SHARED_MEMORY`. In 8.0 the lanes are 64, elsewhere 128.
    capability: {
        "lanes": (lanes, "cuda"),
        "schedulers": (4, "cuda"),
        "resident_threads": (resident, "cuda"),
        "register_bytes": (256 * KIB, "cuda"),
        "core_threadgroup_bytes": ((shared + 1) * KIB, "cuda"),
        "threadgroup_bytes": (shared * KIB, "cuda"),
        "threads": (1024, "cuda"),
        "neural_accelerators": (0, "cuda"),
        "dynamic_registers": (0, "cuda"),
        "parallel_issue": (0, "cuda"),
        "direct_reads": (0, "cuda"),
        "warp_group_products": (int(capability == "9.0"), "ptx"),
    }
    for capability, lanes, resident, shared in (
        ("8.0", 64, 2048, 163),
        ("8.6", 128, 1536, 99),
        ("8.9", 128, 1536, 99),
        ("9.0", 128, 2048, 227),
        ("12.0", 128, 1536, 99),
    )
}

NVIDIA_CHIPS: dict[str, tuple[str, str, tuple[int, ...], dict[str, Figure]]] = {
    # name: (generation, compute capability, streaming multiprocessors as sold, the full chip
    # first, figures of its own). Limits and peaks only: the model does not cover these chips.
    "A100": ("Ampere", "8.0", (108,), {"clock_ghz": (1.41, "nvidia")}),
    "A40": ("Ampere GA10x", "8.6", (84,), {"dram_gbs": (696, "nvidia")}),
    "RTXA6000": ("Ampere GA10x", "8.6", (84,), {"dram_gbs": (768, "nvidia")}),
    "A10": ("Ampere GA10x", "8.6", (72,), {"dram_gbs": (600, "nvidia")}),
    "RTX3090": ("Ampere GA10x", "8.6", (82,), {"dram_gbs": (936, "nvidia")}),
    "L40S": ("Ada", "8.9", (142,), {"dram_gbs": (864, "nvidia")}),
    "L40": ("Ada", "8.9", (142,), {"dram_gbs": (864, "nvidia")}),
    "L4": ("Ada", "8.9", (58,), {"dram_gbs": (300, "nvidia")}),
    "RTX4090": ("Ada", "8.9", (128,), {"dram_gbs": (1008, "nvidia")}),
    **{
        name: (
            *("Hopper", "9.0", counts),
            {
                "clock_ghz": (1.98, "nvidia"),
                "l2_bytes": (50 * MIB, "nvidia"),
                "dram_gbs": (dram, "nvidia"),
            },
        )
        for name, counts, dram in (("H100", (132, 114), 3350), ("H200", (132,), 4800))
    },
    "RTX5090": ("Blackwell", "12.0", (170,), {"dram_gbs": (1792, "nvidia")}),
}
