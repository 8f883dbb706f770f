"""Runs a program of the allowlist with arguments that its entry permits, never through a shell."""

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from aitbc_miner.allowlist.entries import Allowlist
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import ExitStatus, InputUrl, Manifest
from aitbc_miner.runners.interface import JobPaths, Launch, Verdict, ended_badly, job_env, shortest
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.task import Report


class CliRunner:
    """The runner `cli`."""

    name = "cli"

    def __init__(self, allowlist: Allowlist) -> None:
        self.allowlist = allowlist

    def plan(self, manifest: Manifest, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        """Find the program, and check the job's arguments and environment.

        Raises:
            JobError: E_DENY, with the rejected argument or variable; E_MANIFEST, no command is named.
        """
        if not manifest.command:
            raise JobError(ErrorCode.E_MANIFEST, "cannot run the job: its manifest names no command")
        entry = self.allowlist.permit(manifest.command, manifest.args, input_names(manifest), slot.kind)
        allowed = [name for name in entry.env if name in slot.env]
        output_mb = entry.max_output_mb
        return Launch(
            argv=[entry.command.path, *entry.leading, *manifest.args],
            env=job_env(manifest, paths, slot, gpu_env, allowed),
            max_runtime_s=shortest(manifest.timeout_s, entry.max_runtime_s, slot.max_runtime_s),
            max_output_bytes=None if output_mb is None else int(output_mb * 2**20),
            binds=tuple(entry.binds),
        )

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002, ARG002
        """Judge the job by its exit status; programs of the allowlist send no reports."""
        return ended_badly(exit, log_tail) or Verdict(None)


def input_names(manifest: Manifest) -> list[str]:
    """Name the inputs in work/ when the job's program starts.

    An input without a name gets the last part of its URL's path. Names that no file can have made the job
    fail before.
    """
    urls = (InputUrl(item) if isinstance(item, str) else item for item in manifest.input.urls)
    named = [_last_part(item.url) if item.name is None else item.name for item in urls]
    return [*manifest.input.inline, *named]


def _last_part(url: str) -> str:
    try:
        return unquote(urlsplit(url).path.rpartition("/")[2], errors="surrogateescape")
    except ValueError:
        return ""
