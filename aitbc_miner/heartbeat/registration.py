"""Registers the node with the coordinator and holds the node token that the coordinator issues."""

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.connect import connect
from aitbc_miner.coordinator.diagnosis import likely_cause
from aitbc_miner.coordinator.interface import (
    Coordinator,
    CoordinatorError,
    Heartbeat,
    Refused,
    Unauthorized,
    UnknownNode,
)
from aitbc_miner.errors import MinerError
from aitbc_miner.identity.credentials import Credential, CredentialError, read_credential, stamp
from aitbc_miner.probe.machine import SlotCapability
from aitbc_miner.telemetry.metrics import Metrics
from aitbc_miner.util import clock, log
from aitbc_miner.util.log import events
from aitbc_miner.util.web import Proxy


class RegistrationError(MinerError):
    """The node cannot register until the operator changes something, so the next attempt has time."""


class Access(Struct, frozen=True):
    """The configured access to the coordinator; `early` is the credential if root has read it already."""

    config: Config
    environ: Mapping[str, str]
    early: Credential | None = None
    proxy: Proxy | None = None

    def connect(self) -> Coordinator:
        """Make a client with the operator's present credential, which may have been replaced.

        Raises:
            CredentialError: the credential cannot be read.
        """
        try:
            credential = read_credential(self.config.coordinator.auth_token, self.environ)
        except CredentialError:
            if self.early is None:
                raise
            credential = self.early
        return connect(self.config, credential, self.proxy)

    def likely_cause(self) -> str | None:
        """Guess a mistake in the coordinator's address."""
        return likely_cause(self.config.coordinator, self.proxy)

    def stamp(self) -> object | None:
        """Give a value that changes when the credential's file is replaced."""
        return stamp(self.config.coordinator.auth_token, self.environ)


class Registration:
    """The registration: the node token, the client that uses the token, and the registered slots (`told`)."""

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self._access = access
        self._guessed: tuple[str, str | None] = ("", None)
        self._metrics = metrics
        self._client: Coordinator | None = None
        self.token: str | None = None
        self.told: list[SlotCapability] | None = None
        self.at = -math.inf
        self._stamped = access.stamp()

    def credential_replaced(self) -> bool:
        """Whether the credential has changed since the last call; if so, the node must register again."""
        before, self._stamped = self._stamped, self._access.stamp() or self._stamped
        if self._stamped == before:
            return False
        self.told = None
        return True

    def register(self, payload: dict[str, Any], slots: list[SlotCapability]) -> str:
        """Register the node with this payload, which describes `slots`; give the new node token.

        Raises:
            RegistrationError: the operator must change something; the node keeps an old token.
            CoordinatorError: the call failed for now.
        """
        try:
            with self._metrics.counted("registrations"):
                client = self._access.connect()
                token = client.register(payload)
        except (CredentialError, Unauthorized, Refused) as error:
            raise RegistrationError(str(error)) from error
        log.mask(token)
        self._client, self.token, self.told, self.at = client, token, slots, clock.now()
        return token

    def heartbeat(self, report: Heartbeat) -> None:
        """Send a heartbeat.

        Raises:
            Unauthorized, UnknownNode: the coordinator rejected the node token, which is dropped.
            CoordinatorError: the call failed for now.
        """
        if self._client is None:
            raise UnknownNode("cannot send a heartbeat: not registered")
        try:
            with self._metrics.counted("heartbeats"):
                self._client.heartbeat(report)
        except (Unauthorized, UnknownNode):
            self.token = None
            raise

    def guess(self, error: MinerError) -> str | None:
        """Guess the wrong setting behind an error; None after a first registration, or without a guess.

        The same error again gets the same guess, without further calls.
        """
        if self.at > -math.inf or isinstance(error.__cause__, CredentialError):
            return None
        if (told := str(error)) != self._guessed[0]:
            self._guessed = (told, self._access.likely_cause())
        return self._guessed[1]

    def leave(self) -> None:
        """Tell the coordinator that this node is gone; log a failure."""
        if self._client is None:
            return
        try:
            self._client.leave()
        except CoordinatorError as error:
            events("heartbeat").warning("cannot sign off", error=str(error))
