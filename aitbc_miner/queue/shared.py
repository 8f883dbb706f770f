"""Opens the queue of a fleet as the configuration says."""

import hashlib
from collections.abc import Mapping

from aitbc_miner.config.settings import Config
from aitbc_miner.identity.credentials import Credential, read_credential
from aitbc_miner.queue.interface import RetryQueue
from aitbc_miner.queue.redis import RedisQueue
from aitbc_miner.util import log


def open_shared(
    config: Config, environ: Mapping[str, str], early: Credential | None = None
) -> RetryQueue | None:
    """Open the queue of the fleet; None if this node is in no fleet. `early`: the password, if read before.

    Raises:
        CredentialError: the node cannot read the password.
        QueueError: `queue.url` is not the URL of a Redis server.
    """
    queue = config.queue
    if queue.backend != "redis" or queue.url is None:
        return None
    password = None
    if queue.password is not None:
        password = (early or read_credential(queue.password, environ)).reveal()
        log.mask(password)
    # Nodes of different coordinators may use the same server, but must not see each other's jobs.
    fleet = hashlib.sha256(config.coordinator.base_url.encode()).hexdigest()[:12]
    return RedisQueue(queue.url, password, f"aitbc-miner:{fleet}")
