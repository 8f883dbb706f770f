"""The state machine of a slot. Pure: no clock, no process, no file.

`step(slot, event, now)` gives the slot's next value and the actions for the supervisor.
"""

from collections.abc import Callable
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.errors import IllegalMove
from aitbc_miner.jobs import EndReason, State


class SlotState(StrEnum):
    """The states of a slot; `MOVES` lists the legal next states of each."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    IDLE = "IDLE"
    BUSY = "BUSY"
    CANCELLING = "CANCELLING"
    ADOPTED = "ADOPTED"  # a worker of an earlier run of the node finishes its job
    BACKOFF = "BACKOFF"
    QUARANTINED = "QUARANTINED"


_DEATH = frozenset({SlotState.BACKOFF, SlotState.QUARANTINED, SlotState.STOPPED})

MOVES: dict[SlotState, frozenset[SlotState]] = {
    SlotState.STOPPED: frozenset({SlotState.STARTING, SlotState.ADOPTED}),
    SlotState.STARTING: _DEATH | {SlotState.IDLE},
    SlotState.IDLE: _DEATH | {SlotState.BUSY},
    SlotState.BUSY: _DEATH | {SlotState.CANCELLING, SlotState.IDLE},
    SlotState.CANCELLING: _DEATH | {SlotState.IDLE},
    SlotState.ADOPTED: frozenset({SlotState.STARTING, SlotState.STOPPED}),
    SlotState.BACKOFF: frozenset({SlotState.STARTING, SlotState.STOPPED}),
    SlotState.QUARANTINED: frozenset({SlotState.STARTING, SlotState.STOPPED}),
}
SLOT_REMEDY = "the node tries again by itself; if this repeats, see `journalctl -u aitbc-miner`"


class SlotTiming(Struct, frozen=True):
    """The delays of a slot, in seconds."""

    start_timeout: float = 30.0
    cancel_timeout: float = 60.0
    restart_min: float = 0.5
    restart_max: float = 30.0
    deaths_allowed: int = 5
    deaths_within: float = 600.0
    quarantine_min: float = 60.0
    quarantine_max: float = 3600.0


class Slot(Struct, frozen=True):
    """A slot's state.

    deadline: the time when the worker ends the job. cancelled_at: the time of the first request to an adopted
    worker to end its job. deaths: the times of recent deaths of workers. retry_at: the time of the next start
    of a worker. retiring: the slot gets no further worker.
    """

    name: str
    state: SlotState = SlotState.STOPPED
    since: float = 0.0
    job_id: str | None = None
    job_state: State | None = None
    job_pid: int | None = None
    deadline: float | None = None
    cancelled_at: float | None = None
    retiring: bool = False
    reason: str | None = None
    deaths: tuple[float, ...] = ()
    quarantines: int = 0
    retry_at: float = 0.0
    timing: SlotTiming = SlotTiming()


class Event(Struct, frozen=True):
    """Base of the events that `step` takes."""


class Begin(Event, frozen=True):
    """The node is up: the slot may have its worker."""


class Ready(Event, frozen=True):
    """The worker has set the slot up."""


class Unusable(Event, frozen=True):
    """The worker cannot use the slot, for this reason."""

    reason: str


class Assign(Event, frozen=True):
    """The supervisor has chosen a job for the slot."""

    job_id: str


class JobStepped(Event, frozen=True):
    """The job has reached a state; `deadline` is the time when the worker ends the job."""

    job_id: str
    state: State
    pid: int | None = None
    deadline: float | None = None


class Cancel(Event, frozen=True):
    """The job must end, for this reason."""

    why: EndReason
    detail: str = ""


class Ended(Event, frozen=True):
    """The job's outcome is on disk; `clean` is False if processes survive, and `remains` names them."""

    job_id: str
    clean: bool = True
    remains: str = ""


class Died(Event, frozen=True):
    """The worker's process has ended; `how` says how."""

    how: str


class Adopt(Event, frozen=True):
    """A worker of an earlier run still runs this job, and ends the job at `deadline`."""

    job_id: str
    state: State
    deadline: float | None = None


class Retire(Event, frozen=True):
    """The slot or the node must end: the slot finishes its job, if any, and starts no other."""


class Unretire(Event, frozen=True):
    """The slot is needed again after all."""


class RetryNow(Event, frozen=True):
    """The operator may have mended the slot's fault: try again now."""


class Tick(Event, frozen=True):
    """Time has passed."""


class Action(Struct, frozen=True):
    """Base of the actions that `step` gives."""


class SpawnWorker(Action, frozen=True):
    """Start the slot's worker."""


class KillWorker(Action, frozen=True):
    """Kill the worker; `Died` follows."""


class KillJob(Action, frozen=True):
    """Kill all processes of the job in the slot's group."""


class BeginJob(Action, frozen=True):
    """Tell the worker to run the job."""

    job_id: str


class EndJob(Action, frozen=True):
    """Tell the worker to end the job; `why` and `detail` as in `Cancel`."""

    job_id: str
    why: EndReason
    detail: str = ""


class TerminateAdopted(Action, frozen=True):
    """Ask an adopted worker, which has no channel to us, to end its job; `why` as in `Cancel`."""

    why: str = "cancel"


class KillAdopted(Action, frozen=True):
    """Kill an adopted worker; `Died` follows."""


class Settle(Action, frozen=True):
    """Tell the agent that no worker has the job any longer."""

    job_id: str
    why: str = ""


Result = tuple[Slot, list[Action]]


def transition(slot: Slot, to: SlotState, now: float, reason: str | None = None) -> Slot:
    """Move the slot, or raise IllegalMove; the new state forgets the job unless it has one."""
    if to not in MOVES[slot.state]:
        raise IllegalMove(f"slot {slot.name}: {slot.state} -> {to}")
    moved = replace(slot, state=to, since=now, reason=reason)
    if to in {SlotState.BUSY, SlotState.CANCELLING, SlotState.ADOPTED}:
        return moved
    return replace(moved, job_id=None, job_state=None, job_pid=None, deadline=None, cancelled_at=None)


def step(slot: Slot, event: Event, now: float) -> Result:
    """Give the slot's next value and the actions; an event without meaning in this state changes nothing."""
    handler: Callable[[Slot, Event, float], Result] = _HANDLERS[type(event)]
    return handler(slot, event, now)


def _begin(slot: Slot, _event: Begin, now: float) -> Result:
    if slot.state is not SlotState.STOPPED or slot.retiring:
        return slot, []
    return transition(slot, SlotState.STARTING, now), [SpawnWorker()]


def _ready(slot: Slot, _event: Ready, now: float) -> Result:
    if slot.state is not SlotState.STARTING:
        return slot, []
    return transition(slot, SlotState.IDLE, now), []


def _unusable(slot: Slot, event: Unusable, now: float) -> Result:
    if slot.state is not SlotState.STARTING:
        return slot, []
    return _quarantine(slot, event.reason, now), [KillWorker()]


def _assign(slot: Slot, event: Assign, now: float) -> Result:
    if slot.state is not SlotState.IDLE:
        return slot, []
    busy = replace(transition(slot, SlotState.BUSY, now), job_id=event.job_id, job_state=State.PREP)
    return busy, [BeginJob(event.job_id)]


def _step(slot: Slot, event: JobStepped, _now: float) -> Result:
    if slot.job_id != event.job_id:
        return slot, []
    return replace(
        slot,
        job_state=event.state,
        job_pid=event.pid or slot.job_pid,
        deadline=event.deadline if event.state is State.RUNNING else None,
    ), []


def _cancel(slot: Slot, event: Cancel, now: float) -> Result:
    if slot.state is SlotState.ADOPTED:
        first = now if slot.cancelled_at is None else slot.cancelled_at
        return replace(slot, cancelled_at=first), [TerminateAdopted(event.why)]
    if slot.job_id is None:
        return slot, []
    end = EndJob(slot.job_id, event.why, event.detail)
    if slot.state is SlotState.CANCELLING and event.why == "shutdown":
        # The worker may be waiting for space on a full disk to write the job's outcome: tell it to stop.
        return slot, [end]
    if slot.state is not SlotState.BUSY:
        return slot, []
    return transition(slot, SlotState.CANCELLING, now, event.detail or event.why), [end]


def _ended(slot: Slot, event: Ended, now: float) -> Result:
    if slot.state not in {SlotState.BUSY, SlotState.CANCELLING} or slot.job_id != event.job_id:
        return slot, []
    if slot.retiring:
        stopped = transition(slot, SlotState.STOPPED, now)
        return stopped, [Settle(event.job_id)] if event.clean else [Settle(event.job_id), KillWorker()]
    if event.clean:
        # A finished job proves that the slot works: earlier deaths no longer count.
        return replace(transition(slot, SlotState.IDLE, now), deaths=(), quarantines=0), [
            Settle(event.job_id)
        ]
    reason = event.remains or f"a process of job {event.job_id} could not be killed"
    return _quarantine(slot, reason, now), [Settle(event.job_id), KillWorker()]


def _died(slot: Slot, event: Died, now: float) -> Result:
    if slot.state in {SlotState.STOPPED, SlotState.BACKOFF, SlotState.QUARANTINED}:
        return slot, []
    actions: list[Action] = [KillJob()]
    if slot.job_id is not None:
        actions.append(Settle(slot.job_id, f"the worker of slot {slot.name} {event.how}"))
    if slot.retiring:
        return transition(slot, SlotState.STOPPED, now, f"its worker {event.how}"), actions
    if slot.state is SlotState.ADOPTED:
        return transition(slot, SlotState.STARTING, now), [*actions, SpawnWorker()]
    timing = slot.timing
    deaths = (*(death for death in slot.deaths if death > now - timing.deaths_within), now)
    slot = replace(slot, deaths=deaths)
    if len(deaths) >= timing.deaths_allowed:
        reason = f"the worker died {len(deaths)} times within {timing.deaths_within:.0f} s; last: {event.how}"
        return replace(_quarantine(slot, reason, now), deaths=()), actions
    pause = min(timing.restart_max, timing.restart_min * 2 ** (len(deaths) - 1))
    how = f"its worker {event.how}"
    return replace(transition(slot, SlotState.BACKOFF, now, how), retry_at=now + pause), actions


def _adopt(slot: Slot, event: Adopt, now: float) -> Result:
    if slot.state is not SlotState.STOPPED or slot.retiring:
        return slot, []
    adopted = transition(slot, SlotState.ADOPTED, now)
    return replace(adopted, job_id=event.job_id, job_state=event.state, deadline=event.deadline), []


def _retire(slot: Slot, _event: Retire, now: float) -> Result:
    slot = replace(slot, retiring=True)
    # A running job goes on: its worker finishes it, and the next start of the node reads its directory.
    if slot.state is SlotState.STOPPED or slot.job_id is not None:
        return slot, []
    return transition(slot, SlotState.STOPPED, now), []


def _unretire(slot: Slot, _event: Unretire, _now: float) -> Result:
    return replace(slot, retiring=False), []


def _retry(slot: Slot, _event: RetryNow, now: float) -> Result:
    return replace(slot, retry_at=now), []


def _tick(slot: Slot, _event: Tick, now: float) -> Result:
    waited = now - slot.since
    if slot.state in {SlotState.BACKOFF, SlotState.QUARANTINED} and now >= slot.retry_at:
        return transition(slot, SlotState.STARTING, now), [SpawnWorker()]
    if slot.state is SlotState.STARTING and waited > slot.timing.start_timeout:
        return slot, [KillWorker()]
    return _tick_with_job(slot, now)


def _tick_with_job(slot: Slot, now: float) -> Result:
    """Make sure that an overdue or cancelled job ends, whether its worker is alive or not."""
    patience = slot.timing.cancel_timeout
    if slot.job_state is State.COLLECTING:
        # The program has ended, and reading large output takes time: do not throw finished work away.
        return slot, []
    overdue = slot.deadline is not None and now > slot.deadline + patience
    if slot.state is SlotState.BUSY and overdue:
        return _cancel(slot, Cancel("timeout", "the worker did not end the job in time"), now)
    if slot.state is SlotState.CANCELLING and now - slot.since > patience:
        return slot, [KillWorker()]
    asked = slot.cancelled_at
    if slot.state is SlotState.ADOPTED and asked is not None and now - asked > patience:
        return slot, [KillAdopted(), KillJob()]
    if slot.state is SlotState.ADOPTED and overdue:
        # Spare the worker: it may have ended the job long ago, and be collecting the output.
        return slot, [KillJob()]
    return slot, []


def _quarantine(slot: Slot, reason: str, now: float) -> Slot:
    pause = min(slot.timing.quarantine_max, slot.timing.quarantine_min * 2**slot.quarantines)
    moved = transition(slot, SlotState.QUARANTINED, now, reason)
    return replace(moved, quarantines=min(slot.quarantines + 1, 16), retry_at=now + pause)


_HANDLERS: dict[type, Callable[..., Result]] = {
    Begin: _begin,
    Ready: _ready,
    Unusable: _unusable,
    Assign: _assign,
    JobStepped: _step,
    Cancel: _cancel,
    Ended: _ended,
    Died: _died,
    Adopt: _adopt,
    Retire: _retire,
    Unretire: _unretire,
    RetryNow: _retry,
    Tick: _tick,
}
