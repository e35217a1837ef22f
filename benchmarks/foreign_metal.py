"""How many kernels of other projects' Metal sources the simulator compiles.

    python benchmarks/foreign_metal.py [--all] CHECKOUT...

Each CHECKOUT is a folder with Metal sources, of ggml or llama.cpp, vllm-metal, MLX, candle or
mistral.rs; its commit is named if it is a checkout of git, or as CHECKOUT=COMMIT. Sources that
need the tensor units (`nax`) are left out. Without `--all`, one instantiation of each template of
kernels is compiled, and every kernel that is no template. Kernels that are refused by name
(textures) count as not compiled. What is compiled is the language stage, in which the source is
read; `--code N` makes machine code of every N-th kernel as well.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from metalgen.errors import MetalgenError
from metalgen.simulator.checking import KernelCheck, check_source
from metalgen.simulator.compiler import compile_metal

# Sources that a host joins before it compiles them, by the folder that they lie in.
JOINED = {
    "vllm_metal/metal/kernels_v2": (
        "float8 utils turboquant reshape_and_cache pagedattention pagedattention_tiled",
        "utils gdn_linear_attention gdn_state_scatter",
        "utils mla",
        "utils copy_blocks",
        "float8 utils gather_kv_cache",
        "float8 utils kv_scale_update",
    )
}
# What their hosts define; lines count as in the file.
DEFINED = (
    "#define VLLM_METAL_PARTITION_SIZE 512\n#define VLLM_METAL_PA_WINDOW_ROWS 2\n"
    "#define GGML_METAL_HAS_BF16 1\n#line 1\n"
)


def units(root: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Name, text and include folders of each translation unit below `root`."""
    joined = {root / folder: parts for folder, parts in JOINED.items() if (root / folder).is_dir()}
    for folder, parts in joined.items():
        for names in parts:
            texts = [(folder / f"{name}.metal").read_text() for name in names.split()]
            text = re.sub(r'#include\s+"[^"]*"', "", "\n".join(texts))
            yield names.split()[-1], DEFINED + text, [folder]
    for path in sorted(root.glob("**/*.metal")):
        if "nax" not in path.name and path.parent not in joined:
            above = [p for p in path.parents if p.is_relative_to(root)]
            yield str(path.relative_to(root)), DEFINED + path.read_text(), above


def coded(text: str, kernel: str, folders: list[Path]) -> str:
    """Why a kernel cannot be made to machine code, "" if it can."""
    try:
        compile_metal(text, kernel, include_dirs=folders)
    except MetalgenError as error:
        return str(error)
    return ""


def compiled(
    root: Path, every: bool, step: int | None
) -> tuple[int, int, list[tuple[str, KernelCheck]]]:
    """How many kernels there are, how many were coded, and those that fail, with their unit."""
    total, code = 0, 0
    bad: list[tuple[str, KernelCheck]] = []
    for name, text, folders in units(root):
        check = check_source(text, include_dirs=folders, lints=False, every=every)
        if check.error:
            total += 1
            bad.append((name, KernelCheck("(whole file)", check.error)))
            continue
        bad += [(name, each) for each in check.kernels if each.error]
        for each in check.kernels:
            total += 1
            if step and total % step == 0 and not each.error:
                code += 1
                if error := coded(text, each.name, folders):
                    bad.append((name, KernelCheck(each.name, f"machine code: {error}")))
    return total, code, bad


def commit_of(root: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), "log", "-1", "--format=%H %cs"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown commit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs="+")
    parser.add_argument("--all", action="store_true", help="Every instantiation.")
    parser.add_argument("--code", type=int, metavar="N", help="Machine code of every N-th kernel.")
    given = parser.parse_args()
    kernels = wrong = 0
    for checkout in given.checkouts:
        text, _, commit = checkout.partition("=")
        root = Path(text).resolve()
        start = time.perf_counter()
        total, code, bad = compiled(root, given.all, given.code)
        seconds = time.perf_counter() - start
        kernels, wrong = kernels + total, wrong + len(bad)
        print(
            f"{root.name} ({commit or commit_of(root)}): {total - len(bad)} of {total} kernels "
            f"compile, {code} made to machine code ({seconds:.0f} s)",
            flush=True,
        )
        for name, each in bad:
            print(f"  {name}: {each.name}: {each.error.splitlines()[0]}", flush=True)
    share = 100 * (kernels - wrong) / max(1, kernels)
    print(f"together: {kernels - wrong} of {kernels} ({share:.1f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
