"""Plain MLX operations, wherever MLX runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices.base import Device, Runner
from metalgen.reference import attention_mlx, config_features
from metalgen.schedule import Schedule

if TYPE_CHECKING:
    from metalgen.dsl.inputs import FunctionInputs


class ReferenceDevice(Device):
    """No kernel at all: the definition, in float32."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def build(
        self, config: AttentionConfig, schedule: Schedule | None = None, family: str = "forward"
    ) -> Runner:
        features = config_features(config)

        def run(
            q: mx.array,
            k: mx.array,
            v: mx.array,
            scale: float,
            inputs: FunctionInputs | None = None,
        ) -> tuple[mx.array, mx.array | None]:
            out, lse = attention_mlx(q, k, v, scale=scale, **features, inputs=inputs)
            return out, lse if config.return_lse else None

        return run
