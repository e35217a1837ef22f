"""``metalgen tune``: find the fastest schedules for a chip."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.choosing import choosing_options
from metalgen.cli.measuring import Measuring, measuring_options
from metalgen.cli.options import (
    chip_option,
    duration,
    echo_table,
    json_option,
    milliseconds,
    print_json,
    problem_cells,
    problem_fields,
    ratio,
)
from metalgen.cli.sharing import Sharing, sharing_options, shown
from metalgen.errors import ArgumentError
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.chips import Chip
    from metalgen.devices import Device
    from metalgen.tuning.presets import Preset
    from metalgen.tuning.progress import Outcome, Report


@dataclass(frozen=True)
class Plan:
    """What a run will use.

    ``device`` measures, and is None where the chip model predicts; ``checker`` executes kernels
    against the reference, and is None, for the reason ``no_checker``, where nothing can.
    """

    chip: Chip
    device: Device | None
    checker: Device | None
    no_checker: str = ""
    is_here: bool = False

    @property
    def headline(self) -> str:
        """The chip, and where its times come from."""
        if self.device:
            return f"{self.chip.name} ({self.chip}): measured on this machine's GPU."
        if self.is_here:
            return f"{self.chip.name} ({self.chip}), not measured as asked: {self._modelled}."
        return f"{self.chip.name} ({self.chip}) is not this machine: {self._modelled}."

    @property
    def _modelled(self) -> str:
        checks = (
            f"kernels are checked on device {self.checker.name!r}"
            if self.checker
            else f"NOTHING CAN BE CHECKED: {self.no_checker}"
        )
        return f"times are MODELLED by the chip model, not measured; {checks}"


@click.command()
@chip_option("The chip to tune for, such as M3Max or M3Max-30. Default: this machine's.")
@choosing_options
@click.option("--trials", type=int, metavar="N", help="Schedules to try for each problem.")
@click.option("--budget", type=float, metavar="SECONDS", help="Stop after this many seconds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
@click.option(
    "--device",
    "device_name",
    type=click.Choice(["metal", "cuda", "simulator"]),
    help="metal or cuda: measure on this machine. simulator: predict, and check "
    "kernels on this CPU.",
)
@measuring_options
@sharing_options
@click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    chip: str | None,
    chosen: Preset,
    trials: int | None,
    budget: float | None,
    seed: int,
    device_name: str | None,
    measuring: Measuring,
    sharing: Sharing,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find the fastest schedules for a chip, and keep them.

    Tunes a preset, or one shape of your own (--head-dim, --causal, --q-len and so on).

    On that chip its GPU's clock decides. Anywhere else the chip model predicts times, every row is
    marked as modelled, and kernels are executed on the simulator. Each winner is checked against
    the float64 reference. Ctrl-C keeps everything; the same command goes on from there.
    """
    from metalgen.families import AttentionFamily, get_family
    from metalgen.tuning.runner import check_arguments, tune

    check_arguments(trials, budget, seed)
    plan = make_plan(chip, device_name)
    measuring.check(plan.device)
    families = (get_family(problem.family) for problem in chosen.problems)
    if plan.device is None and not all(isinstance(f, AttentionFamily) for f in families):
        expected = "a device that measures: the chip model does not predict backward kernels"
        raise ArgumentError("backward", expected, plan.chip.name)
    chosen = chosen.within(plan.device.limits if plan.device else plan.chip.limits)
    share = sharing.arguments(plan.device)
    if dry_run:
        _dry_run(plan, chosen, trials, as_json)
        return
    from metalgen.cli.live import observer
    from metalgen.database.store import Store

    with Store.open() as store:
        if not as_json:
            click.echo(plan.headline)
        with observer(as_json) as observe:
            report = tune(
                chosen.problems,
                plan.chip,
                store,
                device=plan.device,
                checker=plan.checker,
                trials=trials,
                budget=budget,
                seed=seed,
                observe=observe,
                **measuring.arguments(plan.device),
                **share,
            )
    if as_json:
        found = {"database": str(store.path), "notices": store.notices}
        print_json(_document(plan, chosen, report) | found)
    else:
        _print_report(plan, report, str(store.path))
        if chosen.models and report.outcomes:
            click.echo(changes(chosen, report))
        for notice in store.notices:
            click.echo(notice)
    if report.stopped == "interrupted":
        again = shlex.join(["metalgen", *_again(ctx)])
        click.echo(
            f"metalgen: interrupted; everything that was finished is kept. To continue: {again}",
            err=True,
        )
        ctx.exit(130)
    if any(outcome.winner is None for outcome in report.outcomes):
        ctx.exit(1)


def make_plan(chip_name: str | None, device_name: str | None) -> Plan:
    """Which chip, what measures and what checks.

    Raises:
        ArgumentError: an unknown chip, none named where none is known, or a device that is not
            this chip.
        DeviceError: the device that was asked for is not available.
    """
    from metalgen import chips
    from metalgen.devices import all_devices, get_device

    here, gpu = local_gpu()
    chip = chips.get_chip(chip_name) if chip_name else here
    if chip is None:
        why = "this machine has no known GPU"
        if gpu is not None:  # nothing is known of it that its records could be filed under
            why = "this machine's GPU is not on record (CONTRIBUTING.md says how one is added)"
        raise ArgumentError(
            "chip", f"--chip NAME (such as M3Max; `metalgen chips` lists all), because {why}", None
        )
    is_here = here is not None and gpu is not None and here.name == chip.name
    devices = {device.name: device for device in all_devices()}
    if device_name is not None and devices[device_name].is_gpu:
        get_device(device_name)
        if not is_here or gpu is None or gpu.name != device_name:
            where = here.name if here else "unknown"
            raise ArgumentError(
                "device", f"simulator, for this machine's chip is {where}", device_name
            )
    if is_here and device_name != "simulator":
        return Plan(chip, gpu, gpu, is_here=True)
    if chip.kind != "apple":
        raise ArgumentError("chip", "an Apple chip, or to be run on that GPU itself", chip.name)
    _require_model(chip)
    if device_name == "simulator":
        return Plan(chip, None, get_device("simulator"), is_here=is_here)
    candidates = [own for own in devices.values() if own.language == chip.limits.language]
    usable = [device for device in candidates if device.unavailable() is None]
    if usable:
        return Plan(chip, None, usable[0])
    return Plan(chip, None, None, f"device 'simulator': {devices['simulator'].unavailable()}")


def _require_model(chip: Chip) -> None:
    """Raise `IncompleteChip` where the chip model cannot predict for a chip."""
    from metalgen.chips.model import predict
    from metalgen.families import default_schedule
    from metalgen.families.sizes import Problem
    from metalgen.problem.config import AttentionConfig

    config = AttentionConfig(head_dim=64)
    predict(Problem(config, 1, 1, 1), default_schedule(config), chip)


def local_gpu() -> tuple[Chip | None, Device | None]:
    """This machine's chip and the device that runs on it; None for what is not known."""
    from metalgen import chips
    from metalgen.devices import default_device

    device = default_device()
    return chips.detect(), device if device.is_gpu else None


def _dry_run(plan: Plan, chosen: Preset, trials: int | None, as_json: bool) -> None:
    from metalgen.database.layout import user_database
    from metalgen.families import enumerate_valid

    limits = plan.device.limits if plan.device else plan.chip.limits
    modes = ("safe", "fast") if plan.device else ("safe",)
    valid = {p: len(enumerate_valid(p.config, limits, p.family, modes)) for p in chosen.problems}
    if as_json:
        print_json(
            {
                "dry_run": True,
                "chip": plan.chip.name,
                "provenance": "measured" if plan.device else "modelled",
                "checker": plan.checker.name if plan.checker else None,
                "preset": chosen.name,
                "trials": trials,
                "problems": [problem_fields(p) | {"valid": n} for p, n in valid.items()],
                "database": str(user_database()),
            }
        )
        return
    click.echo(plan.headline)
    click.echo(
        f"Would tune {counted(len(valid), 'problem')} into {user_database()}; nothing was written:"
    )
    lines = [
        (*problem_cells(p), counted(n, "valid schedule"), ", ".join(chosen.models.get(p.key, ())))
        for p, n in valid.items()
    ]
    echo_table(lines, "  ")


def _print_report(plan: Plan, report: Report, path: str) -> None:
    header = ("problem", "sizes", "best", "default", "gain", "schedule")
    rows = [(*problem_cells(o.problem), *_cells(o)) for o in report.outcomes]
    if rows:
        echo_table([header, *rows])
    for outcome in report.outcomes:
        for r in outcome.rejected:
            click.echo(f"rejected for {outcome.problem}: {r.schedule}: {r.status} ({r.detail})")
    tuned = [outcome for outcome in report.outcomes if outcome.winner]
    click.echo(
        f"{counted(len(tuned), 'problem')} {report.provenance} in {duration(report.seconds)}, "
        f"{counted(report.checks, 'kernel')} checked against float64 in this run. Kept in {path}"
    )
    if report.kept:
        kept = counted(report.kept, "row")
        click.echo(f"Carried over {kept} from older templates (kernel source unchanged).")
    if report.provenance == "modelled":
        click.echo(
            "These times are predictions. They choose schedules; on a GPU, MLX's own attention "
            "keeps the call until ours is measured there as faster."
        )
        for note in dict.fromkeys(o.note for o in report.outcomes if o.winner and o.note):
            click.echo(f"Note: {note} for some of these problems.")
    else:
        for outcome in tuned:
            if outcome.note:
                click.echo(f"Note on {outcome.problem}: {outcome.note}.")
    if report.stopped == "budget":
        click.echo("The budget is spent; the same command continues from here.")
    if len(tuned) < len(report.outcomes) and plan.checker is None:
        click.echo(f"No winner was checked ({plan.no_checker}), so none will be dispatched.")


def changes(chosen: Preset, report: Report) -> str:
    """What a run changes for which model: mean speed over the default schedule, in one line."""
    gains: dict[str, dict[str, list[float]]] = {}
    for outcome in report.outcomes:
        if not (outcome.winner and outcome.winner.seconds and outcome.default_seconds):
            continue
        phase = "decode" if outcome.problem.q_len == 1 else "prefill"
        gain = outcome.default_seconds / outcome.winner.seconds
        labels = chosen.models[outcome.problem.key]
        for model in dict.fromkeys(label.partition(" ")[0] for label in labels):
            gains.setdefault(model, {}).setdefault(phase, []).append(gain)
    changed, same = [], []
    for model, phases in gains.items():
        means = {phase: statistics.geometric_mean(found) for phase, found in phases.items()}
        words = [f"{phase} {mean:.2f}x" for phase, mean in sorted(means.items(), reverse=True)]
        if any(round(mean, 2) > 1 for mean in means.values()):
            changed.append(f"{model} {' and '.join(words)}")
        else:
            same.append(model)
    parts = ["; ".join(changed)] if changed else []
    parts += [f"unchanged: {', '.join(same)}"] if same else []
    found = "; ".join(parts) or "nothing"
    return f"By model, over the default schedule ({report.provenance}): {found}."


def _cells(outcome: Outcome) -> tuple[str, str, str, str]:
    winner = outcome.winner
    if winner is None:
        return "-", milliseconds(outcome.default_seconds), "-", outcome.note
    return (
        milliseconds(winner.seconds),
        milliseconds(outcome.default_seconds),
        ratio(outcome.default_seconds, winner.seconds),
        str(winner.schedule),
    )


def _document(plan: Plan, chosen: Preset, report: Report) -> dict[str, Any]:
    return {
        "chip": plan.chip.name,
        "cores": plan.chip.cores,
        "provenance": report.provenance,
        "checker": plan.checker.name if plan.checker else None,
        "preset": chosen.name,
        "run": report.run,
        "template_hashes": sorted(report.template_hashes),
        "stopped": report.stopped,
        "seconds": round(report.seconds, 3),
        "checks": report.checks,
        "kept": report.kept,
        "problems": [problem_fields(o.problem) | _outcome_fields(o) for o in report.outcomes],
    }


def _outcome_fields(outcome: Outcome) -> dict[str, Any]:
    winner = outcome.winner
    return {
        "valid": outcome.valid,
        "tried": outcome.tried,
        "new": outcome.new,
        "default_seconds": outcome.default_seconds,
        "winner": winner
        and {
            "schedule": winner.schedule.to_dict(),
            "seconds": winner.seconds,
            "spread": winner.spread,
            "mlx_seconds": winner.mlx_seconds,
            "provenance": winner.provenance,
            "error": winner.error,
        },
        "rejected": [
            {"schedule": r.schedule.to_dict(), "status": r.status, "detail": r.detail}
            for r in outcome.rejected
        ],
        "note": outcome.note,
    }


def _again(ctx: click.Context) -> list[str]:
    """The arguments that the user gave, so that the run can go on."""
    words = ["tune"]
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        value: Any = ctx.params.get(parameter.name or "")
        if source == click.core.ParameterSource.COMMANDLINE:
            for one in value if parameter.multiple else (value,):
                names = parameter.secondary_opts if one is False else parameter.opts
                words.append(names[0])
                if not getattr(parameter, "is_flag", False):
                    words.append(shown(str(one)) if parameter.name == "storage" else str(one))
    return words
