"""The heartbeat process: registers the node, sends heartbeats, serves /healthz and /metrics.

The process holds the node token and sends the token to the agent over a private line.
"""

import math
import os
import random
import select
from collections.abc import Callable, Mapping
from typing import Any

import psutil
from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.interface import (
    Busy,
    CoordinatorError,
    Heartbeat,
    Unauthorized,
    UnknownNode,
    Unreachable,
)
from aitbc_miner.errors import MinerError
from aitbc_miner.gpu.reader import GpuReader
from aitbc_miner.heartbeat.registration import Registration, RegistrationError
from aitbc_miner.heartbeat.status_report import capability_of, remedy_for, rest_after, slot_report
from aitbc_miner.identity.credentials import Credential, CredentialError, digest
from aitbc_miner.ipc.channel import Channel, ChannelError
from aitbc_miner.ipc.messages import (
    Beaten,
    BeatWanted,
    CoordinatorView,
    Counted,
    Inventory,
    JobDone,
    Load,
    NodeToken,
    NodeView,
    PrivateLine,
    Slots,
    Starved,
    Stop,
    ToHeartbeat,
    TokenWanted,
    Troubles,
)
from aitbc_miner.probe.machine import capabilities, probe_machine
from aitbc_miner.runners.task_catalogue import TaskWatch
from aitbc_miner.slots.state import SlotState
from aitbc_miner.telemetry.metrics import Metrics, Snapshot, Upkeep
from aitbc_miner.telemetry.pages import Served
from aitbc_miner.telemetry.sampling import GpuWatch, Sampler, inventory
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff, BeatSchedule
from aitbc_miner.util.log import events
from aitbc_miner.util.web import Proxy

log = events("heartbeat")

CREDENTIAL_S = 1.0
"""While the node is not registered, the process checks the credential's file this often."""
UNSETTLED = frozenset({SlotState.STOPPED, SlotState.STARTING})


class HeartbeatTiming(Struct, frozen=True):
    """The delays without a configuration key, in seconds.

    slots_wait: the first registration waits at most this long for the slots to be set up. settle: the node
    registers changed slots after this delay. sample: the period of sampling the slots and of saving the
    counters. between_beats: the least time between two heartbeats, however often the agent asks for them.
    """

    slots_wait: float = 10.0
    settle: float = 1.0
    sample: float = 5.0
    between_beats: float = 0.7


class HeartbeatProcess:
    """The main loop and its state. Only HTTP calls block the loop, and each has a time-out."""

    def __init__(
        self,
        channel: Channel[ToHeartbeat],
        line: Channel[PrivateLine],
        config: Config,
        registration: Registration,
        metrics: Metrics,
        gpus: GpuWatch,
        tasks: TaskWatch,
        timing: HeartbeatTiming,
    ) -> None:
        self._channel, self._line, self._config, self._tasks = channel, line, config, tasks
        self._registration, self._metrics, self._gpus, self._timing = registration, metrics, gpus, timing
        self._started = clock.now()
        rng = random.Random()  # noqa: S311  # spreads load, protects nothing
        beat, pause = config.heartbeat, config.heartbeat.backoff
        backoff = Backoff(pause.min_s, pause.max_s, rng)
        self._schedule = BeatSchedule(beat.interval_s, beat.jitter_pct, backoff, rng, self._started)
        self._sampler = Sampler()
        self._sample_due = self._started
        self._inventory: Inventory | None = None
        self._view: CoordinatorView | None = None
        self._troubles = Troubles()
        self._load = 0
        self._beat_wanted = False
        self._beaten_at = -math.inf
        self._stopping = False
        self._leave = False

    def run(self, tend: Callable[[], None] = lambda: None) -> None:
        """Run until the supervisor sends Stop; call `tend` before each sample.

        Raises:
            ChannelError: the supervisor or the agent is gone.
        """
        while not self._stopping:
            now = clock.now()
            if now >= self._sample_due:
                tend()
                self._sample(now)
            if self._registration.credential_replaced():
                self._schedule.again(now)
            due = self._schedule.due
            if not self._may_register():
                due = max(due, self._started + self._timing.slots_wait)
            if now >= due:
                self._beat()
            # Even if the next heartbeat is due already, the loop reads the messages first.
            until = min(due, self._sample_due)
            self._wait(min(until - clock.now(), math.inf if self._registration.token else CREDENTIAL_S))
        if self._leave:
            self._registration.leave()

    # --- messages from the other processes -----------------------------------------------------------------

    def _wait(self, timeout_s: float) -> None:
        ends = {end.fileno(): end for end in (self._channel, self._line)}
        poller = select.poll()
        for fileno, end in ends.items():
            poller.register(fileno, select.POLLIN | (select.POLLOUT if end.has_unsent else 0))
        poller.register(self._tasks.fileno(), select.POLLIN)
        for fileno, events_ready in poller.poll(math.ceil(max(0.0, timeout_s) * 1000)):
            if fileno == self._tasks.fileno():
                self._tasks.seen()
                self._registration.told = None
                self._hurry_if_stale()
                continue
            if events_ready & select.POLLOUT:
                ends[fileno].flush()
            if events_ready & ~select.POLLOUT:
                for message in ends[fileno].receive():
                    self._take(message)

    def _take(self, message: ToHeartbeat | PrivateLine) -> None:
        match message:
            case Slots(slots=slots, queued=queued, accepting=accepting):
                self._show(slots=tuple(slots), queued=len(queued), accepting=accepting)
                self._hurry_if_stale()
            case JobDone():
                self._metrics.count_job(message.code, message.timings)
            case Counted():
                self._metrics.counters.count(message.name, message.label, message.n)
            case Starved():
                self._show(starved_since=message.since)
            case NodeView():
                self._show(node=message)
            case TokenWanted():
                self._give_token(message.refused)
            case Load():
                self._load = message.inflight
            case BeatWanted():
                self._beat_wanted = True
                soonest = max(clock.now(), self._beaten_at + self._timing.between_beats)
                self._schedule.hurry(soonest, answered=True)
            case Stop():
                self._stopping, self._leave = True, message.leave

    def _hurry_if_stale(self) -> None:
        if self._registration.token and self._stale():
            self._schedule.hurry(clock.now() + self._timing.settle)

    def _give_token(self, refused: str | None) -> None:
        token = self._registration.token
        if token is None:
            return  # `_register` sends the token once the node has one
        if refused == digest(token):
            log.warning("node token refused", of="agent")
            self._registration.token = None
            # A coordinator may refuse each token that it has just issued: the pause bounds the registrations.
            pause_s = self._config.heartbeat.backoff.min_s
            self._schedule.hurry(max(clock.now(), self._registration.at + pause_s), answered=True)
        else:
            self._line.send(NodeToken(token))

    # --- samples, registrations, heartbeats ----------------------------------------------------------------

    def _show(self, **changes: Any) -> None:
        self._metrics.snapshot = replace(self._metrics.snapshot, **changes)

    def _sample(self, now: float) -> None:
        self._sample_due = now + self._timing.sample
        slots, found = self._metrics.snapshot.slots, self._gpus.found
        self._show(
            uses=self._sampler.sample(slots),
            gpu_uses={view.offer.name: use for view in slots if (use := self._gpus.use_of(view.gpu))},
            gpu_error=None if found.missing else found.error,
        )
        metrics = self._metrics
        troubles = Troubles(
            [error[:2000] for error in (metrics.listen_error, metrics.textfile_error) if error]
        )
        if troubles != self._troubles:
            self._channel.send(troubles)
            self._troubles = troubles
        if (seen := inventory(found)) != self._inventory:
            self._channel.send(seen)
            self._inventory, self._registration.told = seen, None

    def _settled(self) -> bool:
        slots = self._metrics.snapshot.slots
        return bool(slots) and all(view.state not in UNSETTLED for view in slots)

    def _may_register(self) -> bool:
        return self._registration.at > -math.inf or (self._settled() and self._tasks.told is not None)

    def _stale(self) -> bool:
        """Whether the slots or GPUs have changed since the last registration."""
        return self._settled() and self._registration.told != capability_of(self._metrics.snapshot.slots)

    def _beat(self) -> None:
        """Send a heartbeat, register first if necessary, and plan the next heartbeat."""
        pause = self._config.heartbeat
        error: MinerError | None = None
        try:
            self._try_beat()
        except RegistrationError as caught:
            error = caught
            self._schedule.failed(clock.now(), pause.backoff.max_s)
        except CoordinatorError as caught:
            error = caught
            if isinstance(caught, Busy) and caught.status == 429:
                self._metrics.counters.count("rate_limited", "heartbeat")
            self._schedule.failed(clock.now(), rest_after(caught, pause.interval_s))
        else:
            now = clock.now()
            self._schedule.succeeded(now)
            self._show(last_heartbeat=now)
            self._beaten_at = now
            if self._beat_wanted:
                self._beat_wanted = False
                self._line.send(Beaten())
        self._report(error)

    def _try_beat(self) -> None:
        fresh = self._registration.token is None
        if fresh:
            self._register()
        elif self._stale():
            self._register_anew()
        try:
            self._registration.heartbeat(self._heartbeat())
        except (Unauthorized, UnknownNode) as error:
            if fresh:
                raise
            log.warning("registering again", cause=str(error))
            self._register(forgotten=isinstance(error, UnknownNode))
            self._registration.heartbeat(self._heartbeat())

    def _register_anew(self) -> None:
        try:
            self._register()
        except RegistrationError as error:
            # The node token may be valid for longer than the operator's token, so heartbeats go on.
            log.warning("slot change not registered", error=str(error))
            self._registration.told = capability_of(self._metrics.snapshot.slots)

    def _register(self, *, forgotten: bool = False) -> None:
        slots = capability_of(self._metrics.snapshot.slots)
        payload = capabilities(
            self._metrics.snapshot.node_id,
            probe_machine(self._config.workspace.root),
            self._gpus.found,
            slots,
            sorted({runner for slot in slots for runner in slot.runners}),
            tasks=self._tasks.told or (),
        )
        token = self._registration.register(payload, slots)
        log.info("registered", slots=len(slots))
        self._line.send(NodeToken(token, forgotten))

    def _heartbeat(self) -> Heartbeat:
        snapshot = self._metrics.snapshot
        return Heartbeat(
            node_id=snapshot.node_id,
            load=os.getloadavg()[0],
            free_mb=psutil.virtual_memory().available >> 20,
            gpu_free=sum(view.free and view.offer.kind == "gpu" for view in snapshot.slots),
            slots=[slot_report(snapshot, view) for view in snapshot.slots],
            # After its start the agent may not have counted the running jobs yet.
            inflight=max(self._load, sum(view.job_id is not None for view in snapshot.slots)),
            accepting=snapshot.accepting and any(view.offers for view in snapshot.slots),
        )

    def _report(self, error: MinerError | None) -> None:
        """Send the supervisor the state of the coordinator, if the state has changed."""
        before, source = self._view, self._config.coordinator.auth_token
        told = str(error) if error else None
        if isinstance(error and error.__cause__, CredentialError):
            # Without a credential the node made no call, so the coordinator's last known state still holds.
            reachable = before is not None and before.reachable
            told = told if reachable else f"not asked yet: {told}"
        else:
            reachable = not isinstance(error, Unreachable)
        view = CoordinatorView(
            reachable=reachable,
            since_wall=before.since_wall if before and before.reachable == reachable else clock.wall(),
            registered=self._registration.token is not None,
            error=told,
            remedy=self._registration.guess(error) or remedy_for(error, source) if error else None,
        )
        if view == before:
            return
        self._view = view
        self._channel.send(view)
        self._show(reachable=reachable, registered=view.registered, error=view.error, remedy=view.remedy)
        # One outage causes several errors (refused, reset, 502): the log gets one warning for each remedy.
        known = before is not None and before.error and before.remedy == view.remedy
        if error and known:
            log.debug("coordinator in trouble", error=view.error)
        elif error:
            log.warning("coordinator in trouble", error=view.error, remedy=view.remedy)
        else:
            log.info("coordinator reachable")


def run_heartbeat(
    channel: Channel[ToHeartbeat],
    line: Channel[PrivateLine],
    config: Config,
    environ: Mapping[str, str],
    *,
    early: Credential | None = None,
    proxy: Proxy | None = None,
    timing: HeartbeatTiming | None = None,
) -> None:
    """Run the heartbeat process after the fork, until Stop arrives or the supervisor or agent is gone.

    `channel` leads to the supervisor, `line` to the agent. The credential may be a variable in `environ`;
    `early` is the credential if root has read it already.
    """
    timing = timing or HeartbeatTiming()
    interval_s = config.heartbeat.interval_s
    snapshot = Snapshot(config.node_id, config.coordinator.base_url, interval_s, started=clock.now())
    metrics = Metrics(snapshot, config.queue.path.parent)
    registration = Registration(config, environ, metrics, early=early, proxy=proxy)
    gpus = GpuWatch(GpuReader(environ=environ), timing.sample)
    tasks = TaskWatch(config.runners.python)
    process = HeartbeatProcess(channel, line, config, registration, metrics, gpus, tasks, timing)
    upkeep = Upkeep(metrics, timing.sample, config.telemetry.textfile, interval_s)
    try:
        with upkeep, Served(config.telemetry.listen, metrics) as served:
            process.run(served.tend)
    except ChannelError as error:
        log.info("heartbeat process ends", cause=str(error))
    finally:
        gpus.stop()
