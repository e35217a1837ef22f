"""Each modification runs, agrees with plain MLX, and draws a picture."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

MODS = Path(__file__).parents[2] / "examples" / "mods"
GALLERY = MODS.parents[1] / "docs" / "gallery"
HEADS = {"alibi": 4, "dilated": 4, "relative_bias": 4}
SKIPPED = {
    "causal": 6 / 16,
    "window": 9 / 16,
    "document_packing": 8 / 16,
    "gpt_oss": 9 / 16,
}
"""Share of the 4 x 4 blocks that the mask empties, counted by hand."""


@pytest.mark.parametrize("name", sorted(p.stem for p in MODS.glob("[a-z]*.py")))
def test_a_modification_runs_and_draws(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    env = os.environ | {
        "METALGEN_DB": str(tmp_path / "tuning.db"),
        "PYTHONPATH": os.pathsep.join([str(MODS.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(MODS / f"{name}.py"), str(picture)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(e) for e in re.findall(r"relative error (\S+) against", done.stdout)]
    assert errors and all(0 < error < 2e-3 for error in errors), done.stdout
    if name in SKIPPED:
        assert f"{SKIPPED[name]:.0%} of the blocks skipped" in done.stdout
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    shown = (GALLERY / f"{name}.png").read_bytes()
    assert pixels(data) == pixels(shown), f"draw docs/gallery/{name}.png again"
    heads = HEADS.get(name, 1)
    assert struct.unpack(">II", data[16:24]) == (heads * 384 + (heads - 1) * 8, 384)


def pixels(png: bytes) -> bytes:
    """The rows of a PNG file whose image is one IDAT chunk, behind its header of 33 bytes."""
    (length,) = struct.unpack(">I", png[33:37])
    assert png[37:41] == b"IDAT"
    return zlib.decompress(png[41 : 41 + length])


def test_the_gallery_shows_each_with_the_functions_of_its_script() -> None:
    page = (GALLERY.parent / "gallery.md").read_text(encoding="utf-8")
    sections = page.split("\n### ")[1:]
    shown = {}
    for section in sections:
        (script,) = set(re.findall(r"\]\(\.\./examples/mods/(\w+)\.py\)", section))
        assert f"](gallery/{script}.png)" in section
        shown[script] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert set(shown) == {p.stem for p in MODS.glob("[a-z]*.py")}
    for script, blocks in shown.items():
        source = " ".join((MODS / f"{script}.py").read_text(encoding="utf-8").split())
        assert blocks
        for function in "".join(blocks).split("\n\n\n"):
            assert " ".join(function.split()) in source, script


def test_there_is_one_for_each_that_the_documentation_names() -> None:
    page = (MODS.parents[1] / "docs" / "flex-attention.md").read_text()
    named = set(re.findall(r"examples/mods/([a-z]\w*)\.py", page))
    assert named == {p.stem for p in MODS.glob("[a-z]*.py")}


def test_the_example_of_the_page_gives_what_plain_mlx_does() -> None:
    page = (MODS.parents[1] / "docs" / "flex-attention.md").read_text()
    block, _ = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/flex-attention.md", "exec"), names)
    i, j = mx.arange(512)[:, None], mx.arange(512)
    bias = -names["slopes"][:, None, None] * (i - j)
    bias = mx.where(i >= j, bias, -mx.inf).astype(mx.float16)
    own = mx.fast.scaled_dot_product_attention(
        names["q"], names["k"], names["v"], scale=64**-0.5, mask=bias
    )
    error = mx.linalg.norm((names["out"] - own).astype(mx.float32)) / mx.linalg.norm(
        own.astype(mx.float32)
    )
    assert error.item() < 2e-3
