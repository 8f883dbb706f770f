"""Registers the node with the coordinator and holds the node token that the coordinator issues."""

import math
from collections.abc import Mapping
from typing import Any

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


class Registration:
    """The registration: the node token, the client that uses the token, and the registered slots (`told`).

    `early` is the operator's credential if root has read it already.
    """

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        metrics: Metrics,
        *,
        early: Credential | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self._config, self._environ, self._early, self._proxy = config, environ, early, proxy
        self._guessed: tuple[str, str | None] = ("", None)
        self._metrics = metrics
        self._client: Coordinator | None = None
        self.token: str | None = None
        self.told: list[SlotCapability] | None = None
        self.at = -math.inf
        self._stamped = self._stamp()

    def credential_replaced(self) -> bool:
        """Whether the credential has changed since the last call; if so, the node must register again."""
        before, self._stamped = self._stamped, self._stamp() or self._stamped
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
                client = self._connect()
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
            self._guessed = (told, likely_cause(self._config.coordinator, self._proxy))
        return self._guessed[1]

    def leave(self) -> None:
        """Tell the coordinator that this node is gone; log a failure."""
        if self._client is None:
            return
        try:
            self._client.leave()
        except CoordinatorError as error:
            events("heartbeat").warning("cannot sign off", error=str(error))

    def _connect(self) -> Coordinator:
        """Make a client with the operator's present credential, which may have been replaced.

        Raises:
            CredentialError: the credential cannot be read.
        """
        try:
            credential = read_credential(self._config.coordinator.auth_token, self._environ)
        except CredentialError:
            if self._early is None:
                raise
            credential = self._early
        return connect(self._config, credential, self._proxy)

    def _stamp(self) -> object | None:
        """Give a value that changes when the credential's file is replaced."""
        return stamp(self._config.coordinator.auth_token, self._environ)
