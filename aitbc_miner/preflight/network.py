"""How the coordinator and inputs will be reached: what can be told beforehand, and what a look tells.

`check` asks nobody. `doctor` looks, in a child that is not root: whoever is root reads no network.
"""

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator import aitbc_wire as wire
from aitbc_miner.coordinator.connect import proxy_of
from aitbc_miner.coordinator.diagnosis import diagnosis
from aitbc_miner.errors import MinerError
from aitbc_miner.identity.credentials import Credential, CredentialError, read_credential
from aitbc_miner.util.system import drop_privileges

_VARIABLES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
LOOK_S = 60.0
NOBODY = 65534  # Debian's user nobody


def network_warnings(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """Say what may be meant so, and what it means."""
    there = config.coordinator
    if text := unused_proxy(config, environ):
        yield text
    if config.inputs.proxy:
        yield (
            "inputs.proxy: the proxy looks up where inputs come from, so this node cannot refuse addresses of"
            " your own network: the proxy must"
        )
    if there.dialect == "aitbc-v1" and not urlsplit(there.base_url).path.endswith("/v1"):
        yield (
            f"coordinator.base_url: {there.base_url} does not end in /v1, as the address of an AITBC"
            f" coordinator does; try {there.base_url}/v1"
        )


def unused_proxy(config: Config, environ: Mapping[str, str]) -> str:
    """Say so if the environment has a proxy and the configuration has not."""
    name = next((one for one in _VARIABLES if environ.get(one)), None)
    if name is None or config.coordinator.proxy:
        return ""
    # It need not be a URL, and may begin with user and password without a scheme, too.
    head, _, rest = environ[name].partition("://")
    where = (rest or head).rpartition("@")[2].partition("/")[0]
    shown = f"{head if rest and head.isalnum() else 'http'}://{where}"
    return (
        f"the environment has a proxy ({name}), which is not used: if the coordinator is behind it, set"
        f" coordinator.proxy: {shown} (and inputs.proxy for the inputs of jobs)"
    )


def refused_later(config: Config, credential: Credential) -> str | None:
    """Say why the coordinator will not accept a credential, as far as it shows that itself."""
    there = config.coordinator
    if there.dialect != "aitbc-v1":
        return None
    said = wire.fault_of(credential.reveal(), there.auth_scheme)
    return f"the credential from {credential.source} {said}" if said else None


def proxy_faults(config: Config, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give the key of each proxy's credential that cannot be read, and why."""
    sources = {
        "coordinator.proxy_auth": config.coordinator.proxy_auth,
        "inputs.proxy_auth": config.inputs.proxy_auth,
    }
    for key, source in sources.items():
        # systemd shows a credential to the service alone.
        if source is None or (source.startswith("credential:") and "CREDENTIALS_DIRECTORY" not in environ):
            continue
        try:
            if ":" not in read_credential(source, environ).reveal():
                yield key, f"{source} holds no USER:PASSWORD, which a proxy wants; write that"
        except CredentialError as error:
            yield key, str(error)


def look(config: Config, environ: Mapping[str, str]) -> str | None:
    """Look at the coordinator from a child; what is probably set wrongly, or None."""
    there = config.coordinator
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def be_child() -> None:
        proxy = proxy_of(there.proxy, there.proxy_auth, environ)
        if os.geteuid() == 0:
            drop_privileges(NOBODY, NOBODY)
        try:
            theirs.send_bytes((diagnosis(there, proxy) or "").encode())
        except MinerError as error:
            theirs.send_bytes(str(error).encode())

    child = context.Process(target=be_child)
    child.start()
    theirs.close()
    said = ""
    with ours:
        try:
            if ours.poll(LOOK_S):
                said = ours.recv_bytes(4096).decode()
        except (EOFError, OSError):
            said = ""
    child.kill()
    child.join()
    return said or None
