"""Features as declarations: what a config, a call and a kernel read off them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.devices import get_device
from metalgen.errors import ArgumentError
from metalgen.families import default_schedule
from metalgen.families.attention import extra_inputs
from metalgen.families.sizes import Problem
from metalgen.features import FEATURES, FIELDS, INPUTS, register, unregister
from metalgen.features.arrays import per_head, vector
from metalgen.features.base import Feature, Field, Hooks, OptionalInput, Site
from metalgen.features.checks import integer, switch
from metalgen.features.fields import Fields
from metalgen.features.sampler import Sampler
from metalgen.problem.config import BASE, AttentionConfig
from metalgen.problem.inputs import Inputs, check_call
from metalgen.problem.samples import sample_call
from metalgen.source.render import render


def test_each_field_of_a_config_is_declared_once_with_its_default() -> None:
    declared = BASE | FIELDS
    own = {field.name: field.default for field in dataclasses.fields(Fields)}
    del own["others"]
    assert len(declared) == len(BASE) + len(FIELDS)
    assert {*declared} == {*own}
    del own["head_dim"]  # which has none
    assert {name: declared[name].default for name in own} == own


def test_each_array_of_a_call_is_declared_once() -> None:
    others = {"score", "mask", "blocks", "others", "options"}
    assert [f.name for f in dataclasses.fields(Inputs) if f.name not in others] == [*INPUTS]


def test_a_plain_config_uses_no_feature() -> None:
    assert AttentionConfig(64, heads_per_kv=4, dtype="bfloat16").features == ()


class Heat:
    """Macros in Python: a tenth of `heat` times a head's degree times a key's place is added.

    That is half of it, for kernels add to half of a score.
    """

    @staticmethod
    def state(head: str) -> str:
        return f"degrees[{head}] * 0.05f * HEAT"

    @staticmethod
    def add(i: str, j: str, state: str, dense: bool) -> str:
        return f"{state} * float({j})"


def degrees(sampler: Sampler) -> mx.array:
    return sampler.normal((sampler.heads,))


class Heated(Feature):
    name = "heated"
    adds = True
    fields = (Field("heat", integer(1, 9)), Field("boils", switch, False))
    inputs = (
        OptionalInput("degrees", ("float32",), vector(per_head), sample=degrees, cut="heads"),
    )

    def excludes(self, config: Fields) -> dict[str, str]:
        return {"softcap": "None beside heat"}

    def hooks(self, config: Any, site: Site) -> Hooks:
        return Hooks(adds={"heated": Heat()}, constants={"HEAT": config.heat})


@pytest.fixture
def heated() -> Iterator[None]:
    register(Heated())
    try:
        yield
    finally:
        unregister("heated")


@pytest.mark.usefixtures("heated")
def test_a_field_from_outside_is_kept_checked_and_named_like_any_other() -> None:
    config = AttentionConfig.from_dict({"head_dim": 64, "heat": np.int64(3)})
    assert config.heat == 3 and config.boils is False
    assert config.key == '{"dtype":"float16","head_dim":64,"heat":3}'
    assert str(config) == "D64 float16 heated"
    assert AttentionConfig.from_json(config.key) == config == AttentionConfig(64, heat=3)  # type: ignore[call-arg]
    assert dataclasses.replace(config, causal=True).heat == 3
    cold = dataclasses.replace(config, heat=None)  # type: ignore[call-arg]
    assert cold == AttentionConfig(64) and hash(cold) == hash(AttentionConfig(64))
    assert Problem(config, 8, 100, 100).key != Problem(cold, 8, 100, 100).key
    with pytest.raises(ArgumentError, match="^heat: expected an integer from 1 to 9, but got 10"):
        AttentionConfig.from_dict({"head_dim": 64, "heat": 10})
    with pytest.raises(ArgumentError, match="^softcap: expected None beside heat, but got 2.0"):
        AttentionConfig.from_dict({"head_dim": 64, "heat": 1, "softcap": 2})


def test_a_field_of_no_feature_is_refused() -> None:
    with pytest.raises(ArgumentError, match="^config: expected a field among .* but got 'heat'"):
        AttentionConfig.from_dict({"head_dim": 64, "heat": 3})
    with pytest.raises(TypeError, match="heat"):
        AttentionConfig(64, heat=3)  # type: ignore[call-arg]


def test_a_name_is_given_to_one_feature_alone() -> None:
    class Again(Feature):
        name = "again"
        fields = (Field("causal", switch, False),)

    with pytest.raises(ValueError, match="causal"):
        register(Again())
    assert "again" not in FEATURES


def test_arrays_without_four_axes_are_refused_by_name() -> None:
    q, rows = mx.zeros((1, 1, 4, 32), mx.float16), mx.zeros((1, 4, 32), mx.float16)
    config = AttentionConfig(32)
    for name, arrays in {"q": (rows, q, q), "k": (q, rows, q), "v": (q, q, rows)}.items():
        message = rf"^{name}.shape: expected 4 axes \(B, H, L, D\), but got \(1, 4, 32\)"
        with pytest.raises(ArgumentError, match=message):
            check_call(config, *arrays)


@pytest.mark.usefixtures("heated")
def test_an_input_from_outside_is_made_up_checked_and_bound() -> None:
    config = AttentionConfig.from_dict({"head_dim": 16, "dtype": "float32", "heat": 5})
    q, k, v, inputs = sample_call(config, kv_heads=3, q_len=9, kv_len=11)
    check_call(config, q, k, v, inputs)
    assert extra_inputs(config) == ["degrees"] == [*inputs.named]
    with pytest.raises(ArgumentError, match=r"^degrees.shape: expected \(3,\), but got \(2,\)"):
        check_call(config, q, k, v, inputs.having({"degrees": mx.zeros((2,))}))
    with pytest.raises(ArgumentError, match="^degrees: expected an mlx.core.array, as the config"):
        check_call(config, q, k, v, Inputs())
    with pytest.raises(ArgumentError, match="^degrees: expected None, as the config says"):
        check_call(AttentionConfig(16, dtype="float32"), q, k, v, inputs)


@pytest.mark.usefixtures("heated")
def test_a_feature_from_outside_is_in_the_kernel_and_computes_what_it_says() -> None:
    config = AttentionConfig.from_dict({"head_dim": 16, "dtype": "float32", "heat": 5})
    schedule = default_schedule(config)
    assert "constexpr int HEAT = 5;" in render(config, schedule).source
    device = get_device("simulator")
    if reason := device.unavailable():
        pytest.skip(reason)
    q, k, v, inputs = sample_call(config, kv_heads=3, q_len=9, kv_len=11)
    out, _ = device.build(config, schedule)(q, k, v, 0.25, inputs)
    a, b, c, d = (np.array(x, np.float64) for x in (q, k, v, inputs["degrees"]))
    scores = 0.25 * a @ b.swapaxes(2, 3) + 0.5 * d[:, None, None] * np.arange(11)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    expected = weights @ c / weights.sum(axis=3, keepdims=True)
    assert np.abs(np.array(out) - expected).max() < 1e-5
