"""How the node becomes known to the coordinator, and the node token that it gets for it."""

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
    """The operator has something to mend before this node can be known, so there is no hurry to try again."""


class Access(Struct, frozen=True):
    """The configured way to the coordinator; `early` is a credential that was read while it could be."""

    config: Config
    environ: Mapping[str, str]
    early: Credential | None = None
    proxy: Proxy | None = None

    def connect(self) -> Coordinator:
        """Make a client with the operator's credential as it is now: it may have been exchanged.

        Raises:
            CredentialError: it cannot be read.
        """
        try:
            credential = read_credential(self.config.coordinator.auth_token, self.environ)
        except CredentialError:
            if self.early is None:
                raise
            credential = self.early
        log.mask(credential.reveal())
        return connect(self.config, credential, self.proxy)

    def likely_cause(self) -> str | None:
        """Say what may be wrong with the coordinator's address."""
        return likely_cause(self.config.coordinator, self.proxy)

    def stamp(self) -> object | None:
        """Give another value when the credential's file was replaced."""
        return stamp(self.config.coordinator.auth_token, self.environ)


class Registration:
    """Our standing with the coordinator: the node token, the client that uses it, and what was told of us."""

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
        """Whether there is another credential since this was last asked: all is to be told anew with it."""
        before, self._stamped = self._stamped, self._access.stamp() or self._stamped
        if self._stamped == before:
            return False
        self.told = None
        return True

    def register(self, payload: dict[str, Any], slots: list[SlotCapability]) -> str:
        """Make the node known with this payload, which tells of these slots; gives the new token.

        Raises:
            RegistrationError: it is for the operator to do something; an old token is kept.
            CoordinatorError: it may work later.
        """
        sent = False
        try:
            client = self._access.connect()
            token = client.register(payload)
            sent = True
        except (CredentialError, Unauthorized, Refused) as error:
            raise RegistrationError(str(error)) from error
        finally:
            self._metrics.count_registration(sent=sent)
        log.mask(token)
        self._client, self.token, self.told, self.at = client, token, slots, clock.now()
        return token

    def heartbeat(self, report: Heartbeat) -> None:
        """Send one.

        Raises:
            Unauthorized, UnknownNode: the token is void now.
            CoordinatorError: it may work later.
        """
        if self._client is None:
            raise UnknownNode("cannot send a heartbeat: not registered")
        sent = False
        try:
            self._client.heartbeat(report)
            sent = True
        except (Unauthorized, UnknownNode):
            self.token = None
            raise
        finally:
            self._metrics.count_heartbeat(sent=sent)

    def guess(self, error: MinerError) -> str | None:
        """Say what is probably set wrongly; nothing is asked twice for one error, nor once it has worked."""
        if self.at > -math.inf or isinstance(error.__cause__, CredentialError):
            return None
        if (told := str(error)) != self._guessed[0]:
            self._guessed = (told, self._access.likely_cause())
        return self._guessed[1]

    def leave(self) -> None:
        """Say that this node is gone, as far as that can be said now."""
        if self._client is None:
            return
        try:
            self._client.leave()
        except CoordinatorError as error:
            events("heartbeat").warning("not signed off", error=str(error))
