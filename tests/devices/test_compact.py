"""What MLX is given of a CUDA source: the same code, and no more than that."""

from __future__ import annotations

import dataclasses
import re

import pytest

from metalgen.devices.compact import compact
from metalgen.families import Limits, default_schedule, get_family
from metalgen.families.append import append_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.source.digests import code_of
from metalgen.source.render import KernelSource, render

LIMITS = Limits(232448, 1024, "cuda")
CONFIGS = (
    AttentionConfig(64, "bfloat16", causal=True),
    AttentionConfig(64, "float32", softcap=20.0, sinks=True),
    AttentionConfig(64, "float16", page_size=16, kv_bits=4, rope="half", dropout=0.1),
)


def rendered(config: AttentionConfig, family: str) -> KernelSource:
    shape = "decode" if family == "combine" else family
    schedule = default_schedule(config, LIMITS, shape)
    steps = {step.name: step for step in get_family(shape).steps(schedule)}
    return render(config, schedule, steps[family])


@pytest.mark.parametrize("family", ["forward", "decode", "combine"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_code_is_the_same(config: AttentionConfig, family: str) -> None:
    source = rendered(config, family)
    short = compact(source)
    assert code_of(short.source) == code_of(source.source)
    assert dataclasses.replace(short, source="", header="") == dataclasses.replace(
        source, source="", header=""
    )
    left = code_of(source.header).splitlines()
    for line in code_of(short.header).splitlines():  # in its order, with gaps
        while left.pop(0) != line:
            pass


@pytest.mark.parametrize("family", ["forward", "decode", "combine"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_helper_that_is_called_is_there_and_no_other(
    config: AttentionConfig, family: str
) -> None:
    short = compact(rendered(config, family))
    defined = set(re.findall(r"^__device__.*?(mg_\w+)\(", short.header, re.MULTILINE))
    structs = set(re.findall(r"^struct (mg_\w+)", short.header, re.MULTILINE))
    text = short.header + short.source
    assert set(re.findall(r"\bmg_\w+", text)) == defined | structs
    for name in defined:
        assert len(re.findall(rf"\b{name}\b", text)) > 1, name


def test_the_append_kernel_keeps_all_of_its_code() -> None:
    source = render(AttentionConfig(64, kv_bits=8, rope="half"), append_schedule(language="cuda"))
    short = compact(source)
    assert len(short.source) < len(source.source)
    assert code_of(short.source) == code_of(source.source)
    assert code_of(short.header) == code_of(source.header)


def test_what_looks_like_a_comment_in_a_text_stays() -> None:
    source = rendered(CONFIGS[0], "combine")
    body = 'asm("// kept" : : "n"(1));  // gone\n\n    /* gone,\n  too */ int  x;\n'
    short = compact(dataclasses.replace(source, header="", source=body))
    assert short.source == 'asm("// kept" : : "n"(1));\nint  x;\n'


def test_a_combine_step_brings_little() -> None:
    """Two kernels a call: MLX hashes both texts each time."""
    source = rendered(CONFIGS[0], "combine")
    short = compact(source)
    assert len(short.header + short.source) < len(source.header + source.source) / 4
