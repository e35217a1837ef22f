"""mlx-lm's models give the same logits with metalgen's attention in the place of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# mlx-lm is installed without what its `load` needs, so its models are imported around its top.
RUN = """
import importlib.util, runpy, sys, types
package = types.ModuleType("mlx_lm")
package.__path__ = importlib.util.find_spec("mlx_lm").submodule_search_locations
sys.modules["mlx_lm"] = package
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "examples" / "patch_mlx_lm.py"
    return subprocess.run(
        [sys.executable, *words[:-1], str(script), words[-1]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])},
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None,
    reason="mlx-lm is not installed (pip install --no-deps mlx-lm==0.32.2)",
)
def test_logits_over_each_cache_agree_with_mlx_lms_own(device: str, own_database: Path) -> None:
    done = run("-c", RUN, device)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = dict(re.findall(r"^(\w+): .*, (\S+) from mlx-lm's own", done.stdout, re.MULTILINE))
    assert list(errors) == ["KVCache", "RotatingKVCache", "QuantizedKVCache"]
    assert all(0 < float(error) < 5e-3 for error in errors.values()), errors


MIXED = """
import importlib.util, sys, types
package = types.ModuleType("mlx_lm")
package.__path__ = importlib.util.find_spec("mlx_lm").submodule_search_locations
sys.modules["mlx_lm"] = package
import mlx.core as mx
from mlx_lm.models import phi

model = phi.Model(phi.ModelArgs(hidden_size=64, num_attention_heads=2, num_key_value_heads=2,
                                num_hidden_layers=2, intermediate_size=64, vocab_size=64))
model.set_dtype(mx.bfloat16)
tokens = mx.arange(20)[None]
own = model(tokens)
mx.eval(own)
import metalgen.mlx_lm
metalgen.mlx_lm.patch(device=sys.argv[2])
patched = model(tokens)
error = float(mx.linalg.norm(patched - own) / mx.linalg.norm(own))
print(error, patched.dtype, metalgen.mlx_lm.stats().calls)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None,
    reason="mlx-lm is not installed (pip install --no-deps mlx-lm==0.32.2)",
)
def test_a_model_with_float32_queries_and_bfloat16_keys_runs(
    device: str, own_database: Path
) -> None:
    done = run("-c", MIXED, device)
    assert done.returncode == 0, done.stdout + done.stderr
    error, dtype, calls = done.stdout.split()
    assert float(error) < 1e-2 and dtype == "mlx.core.bfloat16"
    assert calls == "2"


def test_without_mlx_lm_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mlx_lm.py").write_text("import huggingface_hub_that_is_not_there")
    words = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[1:]; "
    done = run("-c", words + "runpy.run_path(sys.argv[0], run_name='__main__')", "simulator")
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-lm and what it needs are not installed (No module named ")
