"""The checks of a tuning run: each kernel once, the outcome on record."""

from __future__ import annotations

from metalgen.calls.check import CannotCheck, Verify, record_check, run_check, source_hash_of
from metalgen.database.protocol import Check, TuningStore
from metalgen.devices import Device
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hash


class Checker:
    """Checks kernels on one device and records the outcome; asks the store first.

    Args:
        store: where checks are kept.
        device: what executes the kernels, or None: nothing can be checked here.
        verify: `metalgen.calls.verify.verify`; another one for tests.
    """

    def __init__(
        self,
        store: TuningStore,
        device: Device | None,
        verify: Verify | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self._verify = verify
        self.checked = 0

    def source_hash(self, config: AttentionConfig, schedule: Schedule) -> str:
        """What a kernel is; empty if it is none."""
        return source_hash_of(config, schedule)

    def known(self, config: AttentionConfig, schedule: Schedule) -> Check | None:
        """The check on record: a failed one on any device, else one on this device, or None."""
        kernel = (config, schedule, template_hash(schedule))
        found = self.store.find_check(*kernel, family=schedule.family)
        if found is None or not found.ok or self.device is None or not self.device.is_gpu:
            return found
        return self.store.find_check(*kernel, self.device.name, family=schedule.family)

    def error(self, config: AttentionConfig, schedule: Schedule) -> float | None:
        """The relative error that is on record of a kernel."""
        found = self.known(config, schedule)
        return found.error if found else None

    def check(self, config: AttentionConfig, schedule: Schedule) -> Check:
        """The check of a kernel: the one on record, or a new one, which is recorded.

        Raises:
            CannotCheck: there is none on record and the device cannot make one.
        """
        found = self.known(config, schedule)
        if found is not None:
            return found
        if self.device is None:
            raise CannotCheck("no device here executes kernels")
        found = run_check(self.device, config, schedule, self._verify)
        self.checked += 1
        record_check(self.store, found)
        kernel = (config, schedule, found.template_hash)
        kept = self.store.find_check(*kernel, self.device.name, family=schedule.family)
        assert kept is not None, "it was recorded"
        return kept  # what is on record counts
