"""The data files and the command are there in a wheel, an editable install and a checkout."""

from __future__ import annotations

import email.message
import email.parser
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from metalgen import resources
from metalgen._version import __version__

CHECKOUT = Path(__file__).resolve().parents[2]

PROBE = """
import json, metalgen
from metalgen._version import __version__
from metalgen.resources import templates_dir, tuning_db_dir
folders = [metalgen.__path__[0], templates_dir(), tuning_db_dir()]
print(json.dumps([__version__, *map(str, folders)]))
"""


def files(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, but for Python's own caches."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_install_finds_the_templates_and_records_of_the_checkout(install):
    version, package, templates, tuning_db = json.loads(install.run("-c", PROBE))
    assert version == __version__
    assert files(Path(templates)) == files(CHECKOUT / "templates")
    assert files(Path(tuning_db)) == files(CHECKOUT / "tuning_db")
    if install.name == "wheel":
        assert Path(package).is_relative_to(install.folder)
        assert Path(templates).parent == Path(tuning_db).parent == Path(package)
    else:
        assert Path(package).parent == Path(templates).parent == CHECKOUT


def test_the_command_runs_in_every_install(install):
    assert install.run("-m", "metalgen", "--version").split()[-1] == __version__


ATTENTION = """
import mlx.core as mx, metalgen
x = mx.random.normal((1, 1, 20, 16), key=mx.random.key(0))
config = metalgen.AttentionConfig(16, "float32", causal=True)
kernel = metalgen.get_kernel(config, heads=1, q_len=20, device="simulator")
own = mx.fast.scaled_dot_product_attention(x, x, x, scale=0.25, mask="causal")
print(kernel.backend, mx.abs(kernel(x, x, x) - own).max().item() < 1e-5)
"""


def test_every_install_renders_compiles_and_executes_a_kernel(install):
    assert install.run("-c", ATTENTION).split() == ["metalgen", "True"]


def test_an_installed_package_brings_the_console_script(install):
    script = install.python.with_name("metalgen")
    assert script.exists() == (install.name != "checkout")


def test_the_wheel_carries_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = {
            name.removeprefix("metalgen/"): hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if name.startswith("metalgen/")
        }
    expected = files(CHECKOUT / "metalgen")
    for folder in ("templates", "tuning_db"):
        expected |= {f"{folder}/{name}": sha for name, sha in files(CHECKOUT / folder).items()}
    assert carried == expected
    assert {"py.typed", "templates/families/forward.jinja"} <= carried.keys()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.BytesParser().parsebytes(archive.read(name))


def required(metadata: email.message.Message, extra: str, platform: str) -> dict[str, str]:
    """What an extra adds on a platform: each requirement's name, extras and versions."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    environment = {"extra": extra, "sys_platform": platform}
    return {
        "".join([r.name, *(f"[{e}]" for e in sorted(r.extras))]): str(r.specifier)
        for r in requirements
        if r.marker is not None and r.marker.evaluate(environment)
    }


def test_back_ends_are_extras_that_add_nothing_on_macos(metadata):
    for extra in ("cpu", "cuda13"):
        assert required(metadata, extra, "linux") == {f"mlx[{extra}]": ">=0.32.4"}
        assert required(metadata, extra, "darwin") == {}


def test_mlx_has_a_lower_bound_and_no_upper_one(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    always = {r.name: str(r.specifier) for r in requirements if r.marker is None}
    assert always["mlx"] == ">=0.32.4"
    assert always.keys() == {
        "click", "jinja2", "mlx", "numpy", "optuna", "platformdirs", "rich", "sqlite-utils",
    }  # fmt: skip


def test_the_simulators_compiler_is_pinned_in_an_extra_of_its_own(metadata):
    assert required(metadata, "simulator", "linux")["ziglang"] == "==0.17.0"
    assert "ziglang" not in required(metadata, "cpu", "linux")


def test_an_incomplete_installation_says_which_folder_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "metalgen" / "resources.py"))
    (tmp_path / "templates").mkdir()  # beside the package, but this is no checkout
    resources._find.cache_clear()
    try:
        with pytest.raises(resources.MissingResource, match=r"templates: expected a folder at .*"):
            resources.templates_dir()
    finally:
        resources._find.cache_clear()


CONSUMER = """
import mlx.core as mx
import metalgen
from metalgen import AttentionConfig, get_kernel

x = mx.zeros((1, 1, 20, 16))
reveal_type(metalgen.attention(x, x, x, causal=True))
reveal_type(metalgen.attention(x, x, x, return_lse=True))
reveal_type(get_kernel(AttentionConfig(16, "float32"), heads=1, q_len=20))
metalgen.attention(x, x, x, softcap="50")
AttentionConfig(16, dtype="float32", unknown=True)
"""


def test_a_consumers_type_checker_sees_the_types_of_a_wheel(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "consumer.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stdout.splitlines() if "Possible" not in line]
    types = [line.split('"')[1] for line in said if "Revealed type" in line]
    assert types == [
        "mlx.core.array", "tuple[mlx.core.array, mlx.core.array]", "metalgen.calls.kernel.Kernel",
    ]  # fmt: skip
    errors = [line.split(": ")[0] for line in said if ": error: " in line]
    assert errors == ["consumer.py:10", "consumer.py:11"], done.stdout + done.stderr
