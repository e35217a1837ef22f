"""How a worker shows that it is alive: a counter in its running trials."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

BEAT = "beat"
"""The attribute of a trial that is counted up."""


class Heart:
    """A thread that counts in a worker's trials for as long as the process lives.

    Args:
        storage: where the trials are.
        seconds: between two counts.
    """

    def __init__(self, storage: BaseStorage, seconds: float) -> None:
        self._storage = storage
        self._seconds = seconds
        self._trials: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metalgen-heart", daemon=True)
        self._thread.start()

    def watch(self, trials: set[int]) -> None:
        """The ids of the trials that are running now."""
        self._trials = trials

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self._seconds):
            count += 1
            for trial in sorted(self._trials):
                # Finished meanwhile, or the server is away: the worker itself will hear of it.
                with contextlib.suppress(Exception):
                    self._storage.set_trial_user_attr(trial, BEAT, count)
