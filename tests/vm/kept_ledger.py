"""A coordinator that goes down with the machine and knows afterwards all that it has ever said."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from aitbc_miner.util import fs
from aitbc_miner.util.clock import now
from tools.mock.bootstrap.ledger import Ledger
from tools.mock.bootstrap.records import Rules, State


class KeptLedger(Ledger):
    """A ledger that is on the disk, flushed, before anybody is told what has changed in it.

    The boot-time clock begins anew with each boot; a lease that ran begins anew as well.
    """

    def __init__(self, rules: Rules, file: Path) -> None:
        super().__init__(rules)
        self._file = file
        if not file.exists():
            return
        jobs, self._keys, self._strays = pickle.loads(file.read_bytes())
        for job in jobs.values():
            if job.state is State.QUEUED:
                self._add(job)
                continue
            if job.state is State.LEASED:
                job = replace(job, lease_ends=now() + rules.lease_s)  # noqa: PLW2901
            self._jobs[job.job_id] = job
            if job.state in {State.LEASED, State.ACKED}:
                self._out.add(job.job_id)

    @contextmanager
    def _change(self) -> Iterator[None]:
        with super()._change():
            before = dict(self._jobs), len(self._strays)
            try:
                yield
            finally:
                if (self._jobs, len(self._strays)) != before:
                    self._keep()

    def _keep(self) -> None:
        data = pickle.dumps((self._jobs, self._keys, self._strays))
        with fs.directory(self._file.parent) as directory:
            fs.write_durably(directory, self._file.name, data)
