"""Checks of kernels against the reference, and what follows from them for measurements."""

from __future__ import annotations

import functools
from typing import Any

from metalgen.database.errors import explained
from metalgen.database.file import DatabaseFile
from metalgen.database.layout import STATUSES
from metalgen.database.measurement import check_field, finite, host, now
from metalgen.database.protocol import Check
from metalgen.errors import ArgumentError
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig

_KERNEL = ("family", "config", "schedule", "template_hash", "device")


class KeepsChecks(DatabaseFile):
    """The methods of a store that are about checks."""

    def record_check(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        template_hash: str,
        device: str,
        status: str,
        *,
        error: float | None = None,
        tolerance: float | None = None,
        shape: str = "",
        detail: str = "",
        family: str = "forward",
        source_hash: str = "",
    ) -> None:
        """Commit the outcome of a check, and what follows for the measurements of that kernel.

        Passed: its rows become verified, unless the check failed on another device. Failed: its
        rows that were ``ok`` take the check's status, and cannot win. An earlier outcome on the
        same device is replaced. An error or tolerance that is not finite, as of a kernel that gives
        NaN, counts as none, for no record may hold one.

        Raises:
            ArgumentError: a status, device, template hash, detail or number that cannot be.
        """
        told = (("device", device), ("template_hash", template_hash), ("detail", detail))
        for name, value in told:
            check_field(name, value)
        if status not in STATUSES:
            raise ArgumentError("status", f"one of {', '.join(STATUSES)}", status)
        error, tolerance = finite("error", error), finite("tolerance", tolerance)
        with self.writing():
            row = {
                "family": family,
                "config": config.key,
                "schedule": schedule.key,
                "template_hash": template_hash,
                "device": device,
                "source_hash": source_hash,
                "status": status,
                "error": error,
                "tolerance": tolerance,
                "shape": shape,
                "detail": detail,
                **host(),
                "created": now(),
            }
            changed = ", ".join(f"{name} = excluded.{name}" for name in row if name not in _KERNEL)
            self.insert(
                "checks", row, f"ON CONFLICT ({', '.join(_KERNEL)}) DO UPDATE SET {changed}"
            )
            where = (template_hash, schedule.key, config.key, family)
            checks = self._checks(family, config.key, schedule.key, template_hash)
            if status != "ok":
                self._fail(status, error, detail, where)
            elif all(found == "ok" for found, _ in checks):
                self.db.execute(
                    f"UPDATE measurements SET verified = 1, error = ? WHERE {_OK_ROWS}",
                    [error, *where],
                )
        kernel = (config, schedule, template_hash, device, status)
        found: dict[str, Any] = {"error": error, "tolerance": tolerance, "shape": shape}
        found |= {"detail": detail, "family": family, "source_hash": source_hash}
        self.remember(functools.partial(self.record_check, *kernel, **found))

    def settle(self, family: str, config: str, schedule: str, template_hash: str) -> None:
        """Let rows of a kernel follow its checks, whichever came first; within a transaction."""
        where = (template_hash, schedule, config, family)
        checks = self.db.execute(
            "SELECT status, error, detail FROM checks WHERE template_hash = ? AND schedule = ? "
            "AND config = ? AND family = ? ORDER BY status = 'ok', created DESC",
            where,
        ).fetchall()
        if checks and checks[0][0] != "ok":
            status, error, detail = checks[0]
            self._fail(status, error, detail, where)
        elif checks:
            error = max((e for _, e, _ in checks if isinstance(e, float)), default=None)
            self.db.execute(
                "UPDATE measurements SET verified = 1, error = coalesce(error, ?) "
                f"WHERE {_OK_ROWS}",
                [error, *where],
            )

    def _fail(
        self, status: str, error: float | None, detail: str, where: tuple[str, str, str, str]
    ) -> None:
        self.db.execute(
            "UPDATE measurements SET status = ?, verified = 0, error = ?, detail = ? "
            f"WHERE {_OK_ROWS}",
            [status, error, detail, *where],
        )

    def find_check(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        template_hash: str,
        device: str | None = None,
        *,
        family: str = "forward",
    ) -> Check | None:
        """The check of a kernel on `device`; with None on any, a failed one before a passed one."""
        with explained(self.path):
            rows = self.db.execute(
                "SELECT device, status, error, tolerance, shape, detail, created FROM checks "
                "WHERE config = ? AND family = ? AND schedule = ? AND template_hash = ? "
                "AND device = coalesce(?, device) ORDER BY status = 'ok'",
                [config.key, family, schedule.key, template_hash, device],
            ).fetchall()
        for place, status, error, tolerance, shape, detail, created in rows:
            numbers = all(x is None or isinstance(x, float) for x in (error, tolerance))
            if numbers and status in STATUSES:  # otherwise someone edited the file
                outcome = (status, error, tolerance, str(shape), str(detail))
                kernel = (config, schedule, template_hash, str(place))
                return Check(*kernel, *outcome, family=family, created=str(created))
        return None

    def _checks(
        self, family: str, config: str, schedule: str, template_hash: str
    ) -> list[tuple[str, float | None]]:
        """Status and error of every check of a kernel, on any device."""
        return self.db.execute(
            "SELECT status, error FROM checks WHERE config = ? AND family = ? AND schedule = ? "
            "AND template_hash = ?",
            [config, family, schedule, template_hash],
        ).fetchall()


_OK_ROWS = (
    "status = 'ok' AND template_hash = ? AND schedule = (SELECT id FROM schedules WHERE key = ?) "
    "AND problem IN (SELECT id FROM problems WHERE config = ? AND family = ?)"
)
