"""The runners that the configuration enables, with the current allowlist."""

from aitbc_miner.allowlist.entries import Allowlist, load_allowlist
from aitbc_miner.config.document import Fault
from aitbc_miner.config.dropins import stamp_of
from aitbc_miner.config.settings import RunnersSection
from aitbc_miner.runners.cli import CliRunner
from aitbc_miner.runners.interface import Runner
from aitbc_miner.runners.interpreter import Interpreter
from aitbc_miner.runners.python import PythonRunner
from aitbc_miner.util.log import events


class RunnerSet:
    """Makes the runners for each job. It reads a changed allowlist again, and ignores a faulty allowlist."""

    def __init__(self, config: RunnersSection, interpreter: Interpreter | None = None) -> None:
        self._config = config
        self._interpreter = interpreter
        self._allowlist = Allowlist()
        self._stamp: object = None

    def current(self) -> dict[str, Runner]:
        """Give the enabled runners by name, after reading the allowlist again if its files changed."""
        runners: dict[str, Runner] = {}
        if self._config.cli.enable:
            self._refresh()
            runners["cli"] = CliRunner(self._allowlist)
        if self._config.python.enable:
            python = self._config.python
            runners["python"] = PythonRunner(python.task_paths, self._interpreter, python.preload)
        return runners

    def _refresh(self) -> None:
        stamp = stamp_of(self._config.cli.allowlist_dirs)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        faults: list[Fault] = []
        allowlist = load_allowlist(self._config.cli.allowlist_dirs, faults, [])
        for fault in faults:
            events("worker").error(
                "allowlist rejected", fault=str(fault), note="the last allowlist without faults stays in use"
            )
        if not faults:
            self._allowlist = allowlist
