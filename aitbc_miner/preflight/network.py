"""Checks the way to the coordinator and to inputs.

`check` makes no connection. `doctor` connects in a child that is not root: root reads no network.
"""

import contextlib
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
    """Yield the settings of the network that may be a mistake, with their consequences."""
    there = config.coordinator
    if text := unused_proxy(config, environ):
        yield text
    if config.inputs.proxy:
        yield (
            "inputs.proxy: the proxy resolves the addresses of inputs, so the node cannot refuse addresses of"
            " your own network; configure the proxy to refuse them"
        )
    if there.dialect == "aitbc-v1" and not urlsplit(there.base_url).path.endswith("/v1"):
        yield (
            f"coordinator.base_url: {there.base_url} does not end in /v1 like the address of an AITBC"
            f" coordinator; try {there.base_url}/v1"
        )


def unused_proxy(config: Config, environ: Mapping[str, str]) -> str:
    """Give a warning if the environment has a proxy and the configuration has none; else an empty text."""
    name = next((one for one in _VARIABLES if environ.get(one)), None)
    if name is None or config.coordinator.proxy:
        return ""
    # The value may lack a scheme, and may begin with user and password.
    head, _, rest = environ[name].partition("://")
    where = (rest or head).rpartition("@")[2].partition("/")[0]
    shown = f"{head if rest and head.isalnum() else 'http'}://{where}"
    return (
        f"the node ignores the proxy in the environment ({name}): if the coordinator is behind the proxy, set"
        f" coordinator.proxy: {shown} (and inputs.proxy for the inputs of jobs)"
    )


def refused_later(config: Config, credential: Credential) -> str | None:
    """Give the fault for which the coordinator will refuse a credential, if the credential shows a fault."""
    there = config.coordinator
    if there.dialect != "aitbc-v1":
        return None
    said = wire.fault_of(credential.reveal(), there.auth_scheme)
    return f"the credential from {credential.source} {said}" if said else None


def proxy_faults(config: Config, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give key and fault of each proxy credential that cannot be used."""
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
                yield key, f"{source} has no colon; write USER:PASSWORD for the proxy"
        except CredentialError as error:
            yield key, str(error)


def look(config: Config, environ: Mapping[str, str]) -> str | None:
    """Connect to the coordinator from a child; gives the probable fault of the settings, or None."""
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
    with ours, contextlib.suppress(EOFError, OSError):
        if ours.poll(LOOK_S):
            said = ours.recv_bytes(4096).decode()
    child.kill()
    child.join()
    return said or None
