"""How the node becomes known to the coordinator, and the node token that it gets for it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.connect import connect
from aitbc_miner.coordinator.interface import (
    Coordinator,
    CoordinatorError,
    Heartbeat,
    Refused,
    Unauthorized,
    UnknownNode,
)
from aitbc_miner.errors import MinerError
from aitbc_miner.identity.credentials import Credential, CredentialError, read_credential
from aitbc_miner.probe.machine import SlotCapability
from aitbc_miner.telemetry.metrics import Metrics
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.web import Proxy


class RegistrationError(MinerError):
    """The operator has something to mend before this node can be known, so there is no hurry to try again."""


class Registration:
    """Our standing with the coordinator: the node token, the client that uses it, and what was told of us.

    `connect` reads the operator's credential and makes a client with it, anew for each registration, so that
    a credential that was exchanged is taken up. `look` says what may be wrong with the coordinator's address.
    `stamp` gives another value when the credential's file was replaced.
    """

    def __init__(
        self,
        connect: Callable[[], Coordinator],
        mask: Callable[[str], None],
        metrics: Metrics,
        look: Callable[[], str | None] = lambda: None,
        stamp: Callable[[], object | None] = lambda: None,
    ) -> None:
        self._look = look
        self._guessed: tuple[str, str | None] = ("", None)
        self._connect = connect
        self._mask = mask
        self._metrics = metrics
        self._client: Coordinator | None = None
        self.token: str | None = None
        self.told: list[SlotCapability] | None = None
        self.at = -math.inf
        self._stamp, self._stamped = stamp, stamp()

    def credential_replaced(self) -> bool:
        """Whether there is another credential since this was last asked: all is to be told anew with it."""
        before, self._stamped = self._stamped, self._stamp() or self._stamped
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
            client = self._connect()
            token = client.register(payload)
            sent = True
        except (CredentialError, Unauthorized, Refused) as error:
            raise RegistrationError(str(error)) from error
        finally:
            self._metrics.count_registration(sent=sent)
        self._mask(token)
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
            self._guessed = (told, self._look())
        return self._guessed[1]

    def leave(self) -> None:
        """Say that this node is gone, as far as that can be said now."""
        if self._client is None:
            return
        try:
            self._client.leave()
        except CoordinatorError as error:
            events("heartbeat").warning("not signed off", error=str(error))


def connector(
    config: Config,
    environ: Mapping[str, str],
    mask: Callable[[str], None],
    early: Credential | None = None,
    proxy: Proxy | None = None,
) -> Callable[[], Coordinator]:
    """Give the `connect` of a Registration: reads the configured credential, and makes a client with it.

    `early` is one that was read before, while it could be.
    """

    def make() -> Coordinator:
        try:
            credential = read_credential(config.coordinator.auth_token, environ)
        except CredentialError:
            if early is None:
                raise
            credential = early
        mask(credential.reveal())
        return connect(config, credential, proxy)

    return make
