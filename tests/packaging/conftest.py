"""Real installations of metalgen: from its wheel, editable, and none at all (a checkout)."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Install:
    """One way to have metalgen: its interpreter, and the environment to run it in."""

    name: str
    python: Path
    environment: dict[str, str]
    folder: Path

    def run(self, *arguments: str) -> str:
        """Standard output of this interpreter run outside the checkout."""
        return _run([str(self.python), *arguments], self.folder, self.environment)


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _new_environment(folder: Path) -> Path:
    """A virtual environment without pip that sees the dependencies of this interpreter."""
    venv.create(folder, with_pip=False)
    site = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    # A .pth file is enough to share the dependencies; it does not follow their .pth files, so an
    # editable metalgen among them stays unseen. Read last, it yields to what is installed here.
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def _clean_environment() -> dict[str, str]:
    drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "METALGEN_DB")
    return {name: value for name, value in os.environ.items() if name not in drop}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "-o", str(folder), "."], CHECKOUT)
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    """The wheel."""
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session", params=["wheel", "editable", "checkout"])
def install(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Each way to have metalgen in turn, in a virtual environment of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    python = _new_environment(folder / "venv")
    environment = _clean_environment() | {"METALGEN_DB": str(folder / "tuning.db")}
    if request.param == "checkout":
        environment["PYTHONPATH"] = str(CHECKOUT)
    else:
        source = (
            [str(request.getfixturevalue("wheel"))]
            if request.param == "wheel"
            else ["--no-build-isolation", "--editable", str(CHECKOUT)]
        )
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        _run([*pip, "--no-deps", "--no-index", *source], folder, environment)
    return Install(request.param, python, environment, folder)
