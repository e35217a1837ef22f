"""Plain MLX operations, wherever MLX runs."""

from __future__ import annotations

import mlx.core as mx

from metalgen.devices.base import Device, Runner
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference import attention_mlx, config_features


class ReferenceDevice(Device):
    """No kernel at all: the definition, in float32."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def build(self, config: AttentionConfig, schedule: Schedule | None = None) -> Runner:
        features = config_features(config)

        def run(
            q: mx.array,
            k: mx.array,
            v: mx.array,
            scale: float,
            inputs: Inputs = NOTHING,
        ) -> tuple[mx.array, mx.array | None]:
            out, lse = attention_mlx(q, k, v, scale=scale, **features, inputs=inputs)
            return out, lse if config.return_lse else None

        return run
