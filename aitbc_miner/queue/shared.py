"""The queue that a fleet shares, as the configuration has it."""

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
    """Open it; None when this node is on its own. `early` is a password that was read before.

    Raises:
        CredentialError: the password cannot be read. QueueError: the address is none.
    """
    queue = config.queue
    if queue.backend != "redis" or queue.url is None:
        return None
    password = None
    if queue.password is not None:
        password = (early or read_credential(queue.password, environ)).reveal()
        log.mask(password)
    # A node of another coordinator that uses the same server has nothing to do with our jobs.
    fleet = hashlib.sha256(config.coordinator.base_url.encode()).hexdigest()[:12]
    return RedisQueue(queue.url, password, f"aitbc-miner:{fleet}")
