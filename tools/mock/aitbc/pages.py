"""The page of the double of the AITBC coordinator for people, and its JSON for programs."""

import json
from datetime import datetime

from tools.mock.aitbc.ledger import AitbcLedger
from tools.mock.bootstrap.pages import table, tables_reply
from tools.mock.faults import Faults
from tools.mock.http import Reply


def state_reply(ledger: AitbcLedger, faults: Faults) -> Reply:
    """Return the whole state as JSON, without keys and tokens."""
    shown = {
        "jobs": list(ledger.jobs().values()),
        "miners": [
            {**vars(miner), "heartbeats": len(miner.heartbeats), "last_heartbeat": miner.heartbeats[-1:]}
            for miner in ledger.miners().values()
        ],
        "strays": ledger.strays(),
        "faults": faults.as_list(),
        "calls": len(ledger.calls()),
    }
    return Reply(200, json.dumps(shown, default=_plain).encode())


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else vars(value)


def page(ledger: AitbcLedger) -> Reply:
    """Return the page for people."""
    miners = [
        (
            miner.miner_id,
            miner.status,
            f"{miner.inflight} of {miner.concurrency or 'any number'}",
            f"{miner.reputation:.3f}",
            len(miner.registrations),
            len(miner.heartbeats),
        )
        for miner in ledger.miners().values()
    ]
    jobs = [
        (
            job.job_id,
            job.state,
            job.assigned_miner_id or "",
            len(job.results),
            len(job.fails),
            job.error or "",
            json.dumps(job.payload),
            "" if job.result is None else json.dumps(job.result),
        )
        for job in ledger.jobs().values()
    ]
    about = ("miner", "status", "in flight", "reputation", "registered", "heartbeats")
    of_jobs = ("job", "state", "miner", "results", "failures", "error", "payload", "result")
    return tables_reply(table("Miners", about, miners), table("Jobs", of_jobs, jobs))
