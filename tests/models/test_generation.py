"""mlx-lm's ways to generate: in steps, with drafts, in batches, over saved prompt caches."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import zoo

from metalgen.mlx_lm import make_prompt_cache, patch, stats, unpatch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs pip install mlx-lm==0.32.2, with its dependencies",
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], list(range(40))]
COUNT = 6


def generate() -> Any:
    return importlib.import_module("mlx_lm.generate")


def single(built: Any, prompt: list[int], **options: Any) -> list[int]:
    steps = generate().generate_step(mx.array(prompt), built, max_tokens=COUNT, **options)
    return [int(token) for token, _ in steps]


def together(built: Any, caches: Any = None) -> list[list[int]]:
    batch = generate().BatchGenerator(built, max_tokens=COUNT, prefill_batch_size=2)
    found: dict[int, list[int]] = {u: [] for u in batch.insert(PROMPTS, caches=caches)}
    while responses := batch.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    batch.close()
    return list(found.values())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_the_same_tokens_alone_and_in_a_batch(name: str, own_database: Path) -> None:
    built = zoo.model(name)
    own = [single(built, prompt) for prompt in PROMPTS]
    patch(device="reference")
    assert [single(built, prompt) for prompt in PROMPTS] == own
    assert together(built) == own
    assert stats().boolean_masks == 0 and stats().own == {}


def test_drafts_are_checked_by_several_queries_at_once(own_database: Path) -> None:
    built, draft = zoo.model("llama"), zoo.model("llama", seed=1)

    def drafted() -> list[int]:
        steps = generate().speculative_generate_step(
            mx.array(PROMPTS[2]), built, draft, num_draft_tokens=9, max_tokens=COUNT
        )
        return [int(token) for token, *_ in steps]

    own = single(built, PROMPTS[2])
    patch(device="reference")
    assert drafted() == own


@pytest.mark.parametrize("bits", [4, 8])
def test_caches_are_quantized_on_the_way_and_in_batches(bits: int, own_database: Path) -> None:
    built = zoo.model("gemma3_text")
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": 0}
    with pytest.raises(NotImplementedError):
        single(built, PROMPTS[2], **options)
    patch(device="reference")
    alone = [
        single(built, p, prompt_cache=make_prompt_cache(built, kv_bits=bits, group_size=32))
        for p in PROMPTS
    ]
    assert len(single(built, PROMPTS[2], **options)) == COUNT
    held = [make_prompt_cache(built, kv_bits=bits, group_size=32) for _ in PROMPTS]
    assert together(built, held) == alone


def test_a_prompt_cache_is_saved_by_mlx_lm_and_goes_on_patched(
    tmp_path: Path, own_database: Path
) -> None:
    built = zoo.model("gemma3_text")
    module: Any = importlib.import_module("mlx_lm.models.cache")
    held = zoo.caches(built, "own")
    built(mx.array([PROMPTS[2][:30]]), cache=held)
    module.save_prompt_cache(str(tmp_path / "prompt.safetensors"), held)
    own = single(built, PROMPTS[2][30:], prompt_cache=held)
    patch(device="reference")
    loaded = module.load_prompt_cache(str(tmp_path / "prompt.safetensors"))
    assert single(built, PROMPTS[2][30:], prompt_cache=loaded) == own
    assert unpatch()
