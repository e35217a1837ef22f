"""The ``metalgen`` command: lists its commands without importing them, and ends errors in one line.

A command is a module of this package with a click command named ``command``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from metalgen._version import __version__
from metalgen.errors import MetalgenError

COMMANDS = {
    "tune": "Find the fastest schedules for a chip, and keep them.",
    "lm": "Run mlx-lm's programs with metalgen's attention.",
    "render": "Print the Metal source of a kernel.",
    "check": "Execute a kernel on the simulator, check it for defects and count its work.",
    "show": "Show what the tuning database holds.",
    "db": "Export, import, merge, check, compare, refresh and prune databases; pin a schedule.",
    "share": "Make a contribution of what this machine measured.",
    "report": "Write one HTML page about what was tuned.",
    "explain": "Say which kernel a call gets, and why.",
    "chips": "List the chips that metalgen knows, or the facts of one.",
    "bench": "Measure attention on this machine, against MLX's own and others.",
    "verify": "Prove this installation on a device, against float64.",
    "doctor": "Say what runs on this machine, and what to do next.",
}


class _PipeClosed(Exception):
    """The reader of standard output has seen enough."""


class Commands(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"metalgen.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(
                f"command: expected one of {', '.join(COMMANDS)}, but got {args[0]!r}", ctx
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would make an exit code of 1 of it
            raise _PipeClosed from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The database is METALGEN_DB, or a file in your data directory: see `metalgen doctor`.",
)
@click.version_option(__version__, prog_name="metalgen", message="%(prog)s %(version)s")
@click.pass_context
def metalgen(ctx: click.Context) -> None:
    """Write, tune and dispatch fused attention kernels for MLX."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see `metalgen.cli.main`."""
    try:
        code = metalgen.main(
            args=None if arguments is None else list(arguments),
            prog_name="metalgen",
            standalone_mode=False,
        )
    except click.Abort:
        return _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:  # a group without a command
        assert error.ctx is not None
        click.echo(error.ctx.get_help())
        return 0
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx else "metalgen"
        return _fail(f"{error.format_message()} (see {name} --help)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except MetalgenError as error:
        return _fail(str(error))
    except _PipeClosed:
        _drop_output()
        return 0
    except OSError as error:  # a full disk, a file that may not be read
        _drop_output()
        return _fail(str(error))
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """Send what standard output cannot take any more to nowhere, or Python's exit complains."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = 2) -> int:
    click.echo(f"metalgen: {' '.join(message.split())}", err=True)
    return code
