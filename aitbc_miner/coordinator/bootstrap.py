"""The dialect `bootstrap`: bearer tokens, JSON calls below /nodes and /jobs, results as multipart uploads."""

import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace
from requests_toolbelt import MultipartEncoder

from aitbc_miner.coordinator.answers import BOOTSTRAP, answer, check, confirm
from aitbc_miner.coordinator.broken_json import find_text
from aitbc_miner.coordinator.http import HttpClient, HttpReply, clean
from aitbc_miner.coordinator.interface import (
    ArtifactChanged,
    Assignments,
    Heartbeat,
    PulledJob,
    PullFilters,
    Standing,
    Told,
    Unauthorized,
    Unreachable,
)
from aitbc_miner.coordinator.job_failure import log_of, message_of
from aitbc_miner.coordinator.service_result import LOG, FileChanged, encodable, opened, unsendable
from aitbc_miner.errors import LocalError, MinerError
from aitbc_miner.jobs import Artifact, Manifest, ManifestError, Outcome, decode_manifest
from aitbc_miner.util import fs
from aitbc_miner.util.forgiving import too_deep

ENVELOPE = 4096  # bytes around the manifest in the reply to a pull
NODE_TOKEN = "the node token"  # noqa: S105  # a text for messages, not a token

_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(; ?[\w.+-]+=[\w.+-]+)*", re.ASCII)


class BootstrapCoordinator:
    """A coordinator that speaks `bootstrap`; `Coordinator` documents each method.

    `credential` is the operator's bootstrap token, and `source` its source, such as `env:MINER_AUTH`.
    """

    slowest = 1.0

    def __init__(
        self, http: HttpClient, *, node_id: str, credential: str, source: str, max_manifest_kb: int
    ) -> None:
        self._http = http
        self._node_id = node_id
        self._credential = credential
        self._source = source
        self._max_manifest = max_manifest_kb * 1024

    def use_token(self, token: str) -> None:
        """Use another process's node token. Raises MinerError if no header can carry the token."""
        self._http.set_token(token)

    def register(self, capabilities: dict[str, Any]) -> str:
        """POST /nodes/register with the bootstrap token."""
        doing, used = "register this node", f"the credential from {self._source}"
        try:
            bearer = self._http.authorization(self._credential)
        except MinerError as error:
            raise Unauthorized(f"cannot {doing}: {used}: {error}; see coordinator.auth_token") from None
        reply = self._http.call("POST", "/nodes/register", capabilities, doing=doing, headers=bearer)
        body = self._answer("register", reply, doing, f"{used}, coordinator.auth_token")
        token = str(body["node_token"])
        try:
            self._http.set_token(token)
        except MinerError as error:
            raise Unreachable(f"cannot {doing}: garbage reply: no usable node_token") from error
        return token

    def leave(self) -> None:
        """Do nothing: this coordinator drops nodes that send no heartbeats."""

    def assignments(self) -> Assignments | None:
        """Give None: this dialect cancels jobs in its replies to progress reports."""
        return None

    def why_idle(self, _standing: Standing) -> list[str]:
        """Give no reasons: each pull describes the free slots to this coordinator."""
        return []

    def heartbeat(self, report: Heartbeat) -> None:
        """POST /nodes/heartbeat."""
        doing = "send a heartbeat"
        payload = {
            name: getattr(report, name) for name in ("node_id", "load", "free_mb", "gpu_free", "slots")
        }
        reply = self._http.call("POST", "/nodes/heartbeat", payload, doing=doing)
        self._answer("heartbeat", reply, doing)

    def pull(self, filters: PullFilters) -> PulledJob | None:
        """POST /jobs/pull."""
        doing = "pull a job"
        reply = self._http.call(
            "POST",
            "/jobs/pull",
            {"node_id": self._node_id, "filters": _filters(filters)},
            doing=doing,
            max_bytes=self._max_manifest + ENVELOPE,
        )
        check(reply, BOOTSTRAP.calls["pull"], BOOTSTRAP, doing, NODE_TOKEN)
        return None if reply.status == 204 else _read_job(reply, self._max_manifest, doing)

    def ack(self, job_id: str, holder: str | None = None) -> None:
        """POST /jobs/ack with the ids in body and query, because some coordinators read only one of them."""
        doing = f"accept job {clean(job_id, 128)}"
        ids = {"job_id": job_id, "node_id": self._node_id} | ({"from": holder} if holder else {})
        key = _key(f"ack:{self._node_id}:{job_id}")
        reply = self._http.call("POST", "/jobs/ack", ids, doing=doing, params=ids, headers=key)
        self._answer("ack", reply, doing)

    def progress(self, job_id: str, pct: float, note: str) -> bool:
        """POST /jobs/progress without Idempotency-Key: a cached reply would hide a later cancellation."""
        doing = f"report the progress of job {clean(job_id, 128)}"
        payload = {"job_id": job_id, "pct": pct, "note": note}
        reply = self._http.call("POST", "/jobs/progress", payload, doing=doing)
        return self._answer("progress", reply, doing).get("cancel") is True

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:  # noqa: ARG002  # the key suffices
        """POST /jobs/result: ids and metadata, then the artifacts as streams, always with the log."""
        doing = f"deliver the result of job {clean(job_id, 128)}"
        if all(artifact.file != LOG for artifact in outcome.artifacts):
            outcome = replace(outcome, artifacts=[_log(root), *outcome.artifacts])
        files = []
        for artifact in outcome.artifacts:
            file = _CollectedFile(root, artifact.file, artifact.bytes)
            media = artifact.type if _MEDIA_TYPE.fullmatch(artifact.type) else "application/octet-stream"
            files.append(("artifact", (encodable(artifact.path), file, media)))
        fields = [
            ("job_id", job_id),
            ("node_id", self._node_id),
            ("metadata", msgspec.json.encode(_metadata(outcome)).decode()),
        ]
        form = MultipartEncoder(fields=[*fields, *files])
        try:
            reply = self._http.call("POST", "/jobs/result", form, doing=doing, headers=_key(key))
        finally:
            for _, (_, file, _) in files:
                file.close()
        self._answer("result", reply, doing)
        return Told()

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:  # noqa: ARG002
        """POST /jobs/fail."""
        doing = f"report the failure of job {clean(job_id, 128)}"
        payload = {
            "job_id": job_id,
            "node_id": self._node_id,
            "error_code": outcome.code,
            "error_msg": clean(message_of(outcome), 2000),
            "logs_ref": LOG,
            "metrics": {**_measured(outcome), "log_tail": encodable(log_of(outcome)[-4096:])},
        }
        reply = self._http.call("POST", "/jobs/fail", payload, doing=doing, headers=_key(key))
        self._answer("fail", reply, doing)
        return Told()

    def _answer(
        self, call: str, reply: HttpReply, doing: str, credential: str = NODE_TOKEN
    ) -> dict[str, Any]:
        return answer(reply, BOOTSTRAP.calls[call], BOOTSTRAP, doing, credential)


def _key(key: str) -> dict[str, str]:
    # The key contains the job's id. A hostile id may have line breaks, which no header can carry.
    return {"Idempotency-Key": quote(encodable(key), safe=":._-/")}


def _filters(filters: PullFilters) -> dict[str, Any]:
    """Add a summary of the free slots, for coordinators that ignore the single slots.

    `free` counts slots by kind; `vram_mb` and `memory_mb` are those of the largest slot.
    """
    kinds = [str(slot.get("kind", "")) for slot in filters.slots]
    return {
        "slots": filters.slots,
        "known": filters.known,
        "free": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "vram_mb": max((slot.get("vram_mb") or 0 for slot in filters.slots), default=0),
        "memory_mb": max((slot.get("memory_mb") or 0 for slot in filters.slots), default=0),
        "runners": sorted({runner for slot in filters.slots for runner in slot.get("runners") or ()}),
    }


def _measured(outcome: Outcome) -> dict[str, Any]:
    return {
        "exit": outcome.exit,
        "usage": outcome.usage,
        "slot": outcome.slot,
        "timings": outcome.timings,
        "versions": outcome.versions,
        "log": {"bytes": outcome.log.bytes, "dropped": outcome.log.dropped},
        "enforced": outcome.enforced,
    }


def _metadata(outcome: Outcome) -> dict[str, Any]:
    artifacts = [
        {"path": encodable(one.path), "type": encodable(one.type), "bytes": one.bytes, "sha256": one.sha256}
        for one in outcome.artifacts
    ]
    left_out = {"left_out": outcome.left_out} if outcome.left_out else {}
    return {**_measured(outcome), "artifacts": artifacts, **left_out, "result": outcome.result}


class _PullReply(Struct):
    job: Raw = Raw(b"")
    error: Any = None


def _read_job(reply: HttpReply, bound: int, doing: str) -> PulledJob | None:
    """Read the reply to a pull. A bad job gets an error; if its id is unreadable too, raises Unreachable."""
    try:
        said = msgspec.json.decode(reply.body, type=_PullReply) if reply.complete else _PullReply()
        raw = bytes(said.job)
        if raw == b"null":
            confirm(BOOTSTRAP.calls["pull"], {"error": said.error}, doing)
            return None
        if not reply.complete or len(raw) > bound:
            return _unreadable(reply, f"it is larger than {bound // 1024} KiB", doing)
        if not raw:
            raise Unreachable(f"cannot {doing}: garbage reply: no job")
        value = msgspec.json.decode(raw)
        if too_deep(value):
            return _unreadable(reply, "it is nested too deeply", doing)
        manifest: Manifest = decode_manifest(value)
    except RecursionError:
        return _unreadable(reply, "it is nested too deeply", doing)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _unreadable(reply, clean(str(error), 100), doing)
    except ManifestError as error:
        if error.job_id is None:
            raise Unreachable(f"cannot {doing}: garbage reply: {clean(str(error), 200)}") from error
        return PulledJob(raw, error=error)
    return PulledJob(raw, manifest)


def _unreadable(reply: HttpReply, why: str, doing: str) -> PulledJob:
    job_id = find_text(reply.body, ("job", "job_id"))
    if job_id is None:
        raise Unreachable(f"cannot {doing}: garbage reply: {why}")
    return PulledJob(b"", error=ManifestError(f"cannot read the manifest: {why}", job_id))


class _CollectedFile:
    """A file of the job for the upload; `len` is the number of bytes left to read.

    `read` opens the file, so that ten thousand artifacts need one descriptor.
    """

    def __init__(self, root: Path, file: str, size: int) -> None:
        self.len = size
        self._root = root
        self._file = file
        self._fd: int | None = None

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes. Raises ArtifactChanged if the file has changed."""
        try:
            if self._fd is None:
                self._fd = self._open()
            data = os.read(self._fd, self.len if size < 0 else min(size, self.len))
        except OSError as error:
            cause = unsendable(self._file, error)
            raise (
                cause if isinstance(cause, LocalError) else self._changed(error.strerror or str(error))
            ) from error
        if self.len and size and not data:
            raise self._changed(f"the file is {self.len} bytes shorter than at its collection")
        self.len -= len(data)
        if not self.len:
            self.close()
        return data

    def close(self) -> None:
        """Close the file if it is open."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        with fs.directory(self._root) as folder:
            fd = fs.open_below(folder, self._file)
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size == self.len:
            return fd
        os.close(fd)
        raise self._changed(f"it has {status.st_size} bytes instead of {self.len}, or is no plain file")

    def _changed(self, why: str) -> ArtifactChanged:
        return ArtifactChanged(f"cannot send {clean(encodable(self._file), 200)}: {why}")


def _log(root: Path) -> Artifact:
    """Describe the log of a job whose log was not collected; an empty artifact if the log is missing."""
    size, digest = 0, hashlib.sha256()
    with suppress(FileChanged), opened(root, LOG) as file:
        size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256")
    return Artifact(LOG, LOG, size, digest.hexdigest(), "text/plain")
