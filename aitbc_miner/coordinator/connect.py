"""Makes the client for the configured coordinator; no other module knows all dialects."""

from collections.abc import Mapping

from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.aitbc import LIMITS, AitbcCoordinator, Profile
from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.http import HttpClient
from aitbc_miner.coordinator.interface import Coordinator
from aitbc_miner.coordinator.rate_limits import Limits
from aitbc_miner.coordinator.services import ServiceBook
from aitbc_miner.identity.credentials import Credential, credential_of_root, read_credential
from aitbc_miner.probe.machine import cuda_toolkits
from aitbc_miner.util.web import Proxy


def proxy_of(url: str | None, source: str | None, environ: Mapping[str, str]) -> Proxy | None:
    """Make a proxy from its address and the source of its credential; None without an address.

    The proxy reads its credential at each use. A credential that only root can read is read here.
    """
    if url is None or source is None:
        return Proxy(url) if url else None
    early = credential_of_root(source, environ)

    def reveal() -> str:
        return (early or read_credential(source, environ)).reveal()

    return Proxy(url, reveal)


def connect(config: Config, credential: Credential | None, proxy: Proxy | None = None) -> Coordinator:
    """Make the client. Without a credential it cannot register, and needs a node token (`use_token`)."""
    settings = config.coordinator
    http = HttpClient(
        settings.base_url,
        settings.timeout_s,
        connect_s=settings.connect_timeout_s,
        verify=settings.tls_verify,
        ca_file=settings.ca_file,
        auth_scheme=settings.auth_scheme,
        proxy=proxy,
    )
    token = credential.reveal() if credential else ""
    source = credential.source if credential else settings.auth_token
    if settings.dialect == "aitbc-v1":
        profile = Profile(config.node_id, source, settings, cuda_toolkits())
        limits = Limits(config.queue.path.with_name("calls.json"), LIMITS, settings.share)
        return AitbcCoordinator(http, profile, token, ServiceBook(config.services_dir), limits)
    return BootstrapCoordinator(
        http,
        node_id=config.node_id,
        credential=token,
        source=source,
        max_manifest_kb=settings.max_manifest_kb,
    )
