"""Every family and feature of the CUDA target once, small, for compute-sanitizer:

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize_cuda

The tools racecheck and synccheck likewise.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices import get_device
from metalgen.schedule import default_schedule
from metalgen.verify import verify

CONFIGS = (
    AttentionConfig(64, "bfloat16", causal=True, return_lse=True),
    AttentionConfig(128, "float16", heads_per_kv=2),
    AttentionConfig(72, "float16", value_head_dim=20, causal=True),
    AttentionConfig(9, "bfloat16"),
    AttentionConfig(64, "float16", causal=True, window_left=20),
    AttentionConfig(64, "bfloat16", softcap=20.0),
    AttentionConfig(256, "float16"),
    AttentionConfig(64, "float32", causal=True),
)


def main() -> None:
    device = get_device("cuda")
    for config in CONFIGS:
        for family in ("forward", "decode"):
            default = default_schedule(config, device.limits, family)
            for schedule in {default, dataclasses.replace(default, buffers=3, bk=16)}:
                result = verify(device, config, schedule, family=family)
                print(config, family, schedule, "ok" if result.ok else result.detail, flush=True)
                mx.clear_cache()


if __name__ == "__main__":
    main()
