"""The mock coordinator's HTTP side: one method for each call of the `bootstrap` dialect."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs

from tools.mock.bootstrap.ledger import Ledger
from tools.mock.bootstrap.pages import file_reply, page, state_reply
from tools.mock.bootstrap.records import Progress, Report, Verdict
from tools.mock.exchange import Desk, Exchange
from tools.mock.http import Form, Refusal, Reply, Sending, json_object, json_reply, receive_form, text_member

ROOT = "/api/v1"


@dataclass(frozen=True, kw_only=True)
class BootstrapDesk(Desk):
    """The state that requests of this dialect need: the token for registrations, and the directories."""

    ledger: Ledger
    bootstrap_token: str
    files_dir: Path | None
    out_dir: Path
    cut: set[str] = field(default_factory=set)


class Handler(Exchange):
    """A connection."""

    desk: BootstrapDesk

    def _route(self, method: str, target: SplitResult) -> tuple[str, Callable[[], Reply]]:
        posts = {
            f"{ROOT}/nodes/register": self._register,
            f"{ROOT}/nodes/heartbeat": self._heartbeat,
            f"{ROOT}/jobs/pull": self._pull,
            f"{ROOT}/jobs/ack": self._ack,
            f"{ROOT}/jobs/progress": self._progress,
            f"{ROOT}/jobs/result": self._result,
            f"{ROOT}/jobs/fail": self._fail,
            "/_faults": self._faults,
            "/elsewhere": self._elsewhere,
        }
        gets = {
            "/": lambda: page(self.desk.ledger),
            "/state.json": lambda: state_reply(self.desk.ledger, self.desk.faults),
            "/redirect": self._redirect,
            "/elsewhere": self._elsewhere,
        }
        path = target.path
        call = (posts if method == "POST" else gets).get(path)
        if call:
            return path.rsplit("/", 1)[-1] or "page", call
        if method == "GET" and path.startswith(("/files/", "/flaky/")):
            return "files", self._file
        return "unknown", self._unknown

    # What requests have in common.

    def _node(self, named: object = None) -> str:
        """Return the calling node, by its token; a node in the body must be the same."""
        node_id = self.desk.ledger.node_of(self._bearer() or "")
        if node_id is None:
            raise Refusal(401, "bad_token", "this call needs the node token of a registration")
        if named not in {None, node_id}:
            raise Refusal(403, "other_node", "the token is another node's")
        return node_id

    # The calls.

    def _register(self) -> Reply:
        if not secrets.compare_digest((self._bearer() or "").encode(), self.desk.bootstrap_token.encode()):
            raise Refusal(401, "bad_token", "registration needs the bootstrap token")
        payload = self._json()
        node_id = text_member(payload, "node_id")
        return json_reply({"node_token": self.desk.ledger.register(node_id, payload)})

    def _heartbeat(self) -> Reply:
        node_id = self._node()
        payload = self._json()
        named = text_member(payload, "node_id")
        if named not in self.desk.ledger.nodes():
            raise Refusal(404, "unknown_node", f"node {named[:128]!r} is not registered")
        self._node(named)
        self.desk.ledger.heartbeat(node_id, payload, self.arrived)
        return json_reply({})

    def _pull(self) -> Reply:
        self._node()
        asked = self._json()
        filters = asked.get("filters") or {}
        _check_filters(filters)
        job = self.desk.ledger.pull(self._node(text_member(asked, "node_id")), filters)
        return Reply(200, job.reply) if job else json_reply({"job": None})

    def _ack(self) -> Reply:
        self._node()
        asked = self._json()
        query = {name: values[-1] for name, values in parse_qs(self.target.query).items()}
        for name in ("job_id", "node_id"):
            if query.get(name) != text_member(asked, name):
                raise Refusal(400, "bad_request", f"{name} must be the same in the body and the query string")
        holder = asked.get("from")
        holder = holder if isinstance(holder, str) else None
        self.desk.ledger.ack(asked["job_id"], self._node(asked["node_id"]), holder)
        return json_reply({})

    def _progress(self) -> Reply:
        node_id = self._node()
        asked = self._json()
        pct, note = asked.get("pct"), asked.get("note")
        if isinstance(pct, bool) or not isinstance(pct, int | float) or not isinstance(note, str | None):
            raise Refusal(400, "bad_request", "pct must be a number, note a string or null")
        progress = Progress(self.arrived, pct, note or "", self.headers.get("Idempotency-Key"))
        cancelled = self.desk.ledger.note_progress(text_member(asked, "job_id"), node_id, progress)
        return json_reply({"cancel": True} if cancelled else {})

    def _result(self) -> Reply:
        node_id = self._node()
        form = receive_form(self.body, self.headers.get("Content-Type", ""), self.desk.out_dir)
        keep = False
        try:
            self._node(text_member(form.fields, "node_id"))
            job_id = text_member(form.fields, "job_id")
            metadata = json_object(form.fields.get("metadata", ""), "field 'metadata'")
            verdict = self._report("result", job_id, node_id, metadata, form)
            keep = verdict is Verdict.ACCEPTED
        finally:
            if not keep:
                form.discard()
        return json_reply({verdict.value: True})

    def _fail(self) -> Reply:
        node_id = self._node()
        body = self._json()
        text_member(body, "error_code")
        text_member(body, "error_msg")
        job_id = body.get("job_id")
        verdict = self._report("fail", job_id if isinstance(job_id, str) else "", node_id, body, None)
        return json_reply({verdict.value: True})

    def _report(
        self, kind: Any, job_id: str, node_id: str, body: dict[str, Any], form: Form | None
    ) -> Verdict:
        report = Report(
            kind,
            job_id,
            node_id,
            self.headers.get("Idempotency-Key"),
            body,
            self.arrived,
            tuple(form.artifacts) if form else (),
            complaint=_complaint(form, body) if form else "",
        )
        return self.desk.ledger.report(report)

    # Beside the dialect.

    def _file(self) -> Reply:
        _, kind, name = self.target.path.split("/", 2)
        reply = file_reply(self.desk.files_dir, name, self.headers.get("Range"), self.headers.get("If-Range"))
        if kind == "flaky" and name not in self.desk.cut:
            self.desk.cut.add(name)
            return Reply(reply.status, reply.body, reply.content_type, reply.headers, Sending.HALF)
        return reply

    def _redirect(self) -> Reply:
        to = parse_qs(self.target.query).get("to", [""])[-1]
        if not to.isascii() or not to.isprintable():
            raise Refusal(400, "bad_request", "`to` must be printable ASCII")
        return Reply(302, headers={"Location": to})

    def _unknown(self) -> Reply:
        raise Refusal(404, "not_found", f"nothing at {self.target.path[:128]!r}")


def _check_filters(filters: object) -> None:
    shape = isinstance(filters, dict) and isinstance(filters.get("known", []), list)
    slots = filters.get("slots", []) if isinstance(filters, dict) else None
    if not shape or not isinstance(slots, list) or not all(isinstance(slot, dict) for slot in slots):
        raise Refusal(
            400, "bad_request", "filters must be an object with lists `slots` (of objects) and `known`"
        )


def _complaint(form: Form, metadata: dict[str, Any]) -> str:
    """Compare the uploaded files with the metadata; empty if they agree."""
    if not form.artifacts:
        return "a result needs at least one part named 'artifact'"
    sent = {each.path: (each.bytes, each.sha256) for each in form.artifacts}
    if len(sent) != len(form.artifacts):
        return "two artifacts have the same path"
    told = metadata.get("artifacts")
    if told is None:
        return ""
    if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
        return "metadata.artifacts must be a list of objects"
    promised = {each.get("path"): (each.get("bytes"), each.get("sha256")) for each in told}
    wrong = sorted(
        str(path) for path in promised.keys() | sent.keys() if promised.get(path) != sent.get(path)
    )
    return f"artifacts differ from metadata.artifacts: {', '.join(wrong)}" if wrong else ""
