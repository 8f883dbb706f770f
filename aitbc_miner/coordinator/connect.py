"""Makes the client for the configured coordinator; the one place that knows all dialects."""

from aitbc_miner.config import Config
from aitbc_miner.coordinator import Coordinator
from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.http import HttpClient
from aitbc_miner.credentials import Credential


def connect(config: Config, credential: Credential | None) -> Coordinator:
    """Make a client. Without a credential it cannot register, and is given a node token instead."""
    settings = config.coordinator
    verify = str(settings.ca_file) if settings.ca_file else settings.tls_verify
    http = HttpClient(settings.base_url, settings.timeout_s, verify=verify, auth_scheme=settings.auth_scheme)
    return BootstrapCoordinator(
        http,
        node_id=config.node_id,
        credential=credential.reveal() if credential else "",
        source=credential.source if credential else settings.auth_token,
        max_manifest_kb=settings.max_manifest_kb,
    )
