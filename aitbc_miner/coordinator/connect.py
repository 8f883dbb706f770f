"""Makes the client for the configured coordinator; the one place that knows all dialects."""

from aitbc_miner.config import Config
from aitbc_miner.coordinator import Coordinator
from aitbc_miner.coordinator.aitbc import LIMITS, AitbcCoordinator, Profile
from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.http import HttpClient
from aitbc_miner.coordinator.limits import Limits
from aitbc_miner.credentials import Credential
from aitbc_miner.probe import cuda_toolkits
from aitbc_miner.services import ServiceBook


def connect(config: Config, credential: Credential | None) -> Coordinator:
    """Make a client. Without a credential it cannot register, and is given a node token instead."""
    settings = config.coordinator
    verify = str(settings.ca_file) if settings.ca_file else settings.tls_verify
    http = HttpClient(settings.base_url, settings.timeout_s, verify=verify, auth_scheme=settings.auth_scheme)
    token = credential.reveal() if credential else ""
    source = credential.source if credential else settings.auth_token
    if settings.dialect == "aitbc-v1":
        profile = Profile(
            config.node_id,
            source,
            settings.auth_scheme,
            region=settings.region,
            price=settings.price,
            cuda=cuda_toolkits(),
            receipt_keys=settings.receipt_keys,
            max_job_kb=settings.max_manifest_kb,
        )
        limits = Limits(config.queue.path.with_name("calls.json"), LIMITS, settings.share)
        return AitbcCoordinator(http, profile, token, ServiceBook(config.services_dir), limits)
    return BootstrapCoordinator(
        http,
        node_id=config.node_id,
        credential=token,
        source=source,
        max_manifest_kb=settings.max_manifest_kb,
    )
