"""What `check` and `doctor` say of the way to the coordinator."""

from typing import Any

import pytest

from aitbc_miner.preflight import doctor
from aitbc_miner.preflight.network import unused_proxy
from aitbc_miner.sandbox.users import Identity, group_of
from tests.unit.coordinator.test_aitbc import token
from tests.unit.test_main import Site, fault_texts, findings, run, site
from tools.mock.aitbc.coordinator import MockAitbc

__all__ = ["site"]

PROXY = "http://proxy.test:3128"


def test_check_says_that_a_proxy_of_the_environment_is_not_used(site: Site) -> None:
    environ: dict[str, Any] = {"MINER_AUTH": "t", "https_proxy": "http://user:hidden@proxy.test:3128/"}
    (said,) = [one for one in site.checker(**environ).warnings if "proxy" in one]
    assert said == (
        "the node ignores the proxy in the environment (https_proxy): if the coordinator is behind the"
        f" proxy, set coordinator.proxy: {PROXY} (and inputs.proxy for the inputs of jobs)"
    )
    site.keys["coordinator"] |= {"proxy": PROXY, "allow_http": True}
    assert not [one for one in site.checker(**environ).warnings if "proxy" in one]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("proxy.test:3128", "http://proxy.test:3128"),
        ("user:hidden@proxy.test:3128", "http://proxy.test:3128"),
        ("user:hid://den@proxy.test:3128", "http://proxy.test:3128"),
        ("https://user:hid/d@en@proxy.test", "https://proxy.test"),
        ("http://[::1", "http://[::1"),
    ],
)
def test_a_proxy_of_the_environment_is_named_without_its_password(site: Site, text: str, shown: str) -> None:
    said = unused_proxy(site.config(), {"ALL_PROXY": text})
    assert f"set coordinator.proxy: {shown} (" in said
    assert "hid" not in said


def test_check_says_what_a_proxy_for_inputs_means(site: Site) -> None:
    site.keys["inputs"] = {"proxy": PROXY, "proxy_auth": "env:PROXY"}
    checker = site.checker(MINER_AUTH="t")
    (said,) = [one for one in checker.warnings if one.startswith("inputs.proxy: ")]
    assert "the node cannot refuse addresses of your own network; configure the proxy" in said
    assert "inputs.proxy_auth: cannot read the credential env:PROXY: the variable is not set" in fault_texts(
        checker
    )
    assert "has no colon; write USER:PASSWORD" in fault_texts(site.checker(MINER_AUTH="t", PROXY="secret"))
    assert site.checker(MINER_AUTH="t", PROXY="user:secret").faults == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("proxy", "http://user:pass@proxy.test", "must be http://HOST:PORT or https://HOST:PORT"),
        ("proxy", "socks5://proxy.test", "must be http://HOST:PORT or https://HOST:PORT"),
        ("proxy", "http://proxy.test/path", "must be http://HOST:PORT or https://HOST:PORT"),
        ("proxy_auth", "env:X", "has no effect without proxy"),
    ],
)
def test_proxies_that_are_none(site: Site, key: str, value: str, said: str) -> None:
    site.keys["coordinator"][key] = value
    done = run("check", "--config", str(site.write()))
    assert done.returncode == 78
    assert said in done.stderr
    assert "user:pass" not in done.stderr


def test_a_proxy_makes_of_loopback_another_machine(site: Site) -> None:
    site.keys["coordinator"]["proxy"] = PROXY
    done = run("check", "--config", str(site.write()))
    assert done.returncode == 78
    assert "which sends the token unencrypted" in done.stderr


@pytest.mark.parametrize(
    ("scheme", "credential", "said"),
    [
        ("bearer", token(exp=1e9), "expired at 2001-09-09 01:46 UTC; ask for a new token"),
        ("bearer", token(role="client"), "has the role 'client'; ask for a token with the role 'miner'"),
        ("bearer", "plain-key", "is no JSON web token; for an API key set coordinator.auth_scheme: api_key"),
        ("api_key", token(), "is a JSON web token; set coordinator.auth_scheme: bearer"),
        ("bearer", token(), ""),
        ("api_key", "plain-key", ""),
    ],
)
def test_check_finds_tokens_that_will_be_refused(site: Site, scheme: str, credential: str, said: str) -> None:
    site.keys["coordinator"] |= {
        "dialect": "aitbc-v1",
        "auth_scheme": scheme,
        "base_url": "http://127.0.0.1/v1",
    }
    texts = fault_texts(site.checker(MINER_AUTH=credential))
    assert texts.endswith(
        f"coordinator.auth_token: the credential from env:MINER_AUTH {said}" if said else ""
    )
    assert bool(texts) == bool(said)
    assert credential not in texts


def test_check_misses_the_v1_of_an_aitbc_coordinator(site: Site) -> None:
    site.keys["coordinator"] |= {"dialect": "aitbc-v1", "auth_scheme": "api_key"}
    said = "coordinator.base_url: http://127.0.0.1:9/api does not end in /v1"
    assert any(one.startswith(said) for one in site.checker(MINER_AUTH="k").warnings)
    site.keys["coordinator"]["base_url"] = "http://127.0.0.1:9/api/v1"
    assert not any("/v1" in one for one in site.checker(MINER_AUTH="k").warnings)


def test_a_group_that_is_not_there_is_named_by_its_number() -> None:
    assert group_of(Identity(60600, 60600, "aitbc")) == "60600"
    assert group_of(Identity(0, 0, "root")) == "root"


# doctor


def seen(site: Site, **coordinator: Any) -> tuple[bool, str, str]:
    site.keys["coordinator"] |= coordinator
    found = findings(site, site.config())["coordinator"]
    assert not found.required
    return found.there, found.detail, found.remedy


def test_doctor_guesses_the_likely_cause(site: Site) -> None:
    with MockAitbc() as mock:
        origin = "/".join(mock.url.split("/")[:3])
        there, detail, remedy = seen(site, base_url=f"{origin}/v1")
        assert (there, detail) == (False, "an AITBC coordinator answers there")
        assert remedy.startswith("set coordinator.dialect: aitbc-v1")
        there, detail, _ = seen(site, dialect="aitbc-v1", auth_scheme="api_key")
        assert (there, detail) == (True, f"{origin}/v1 answers")


def test_doctor_tells_why_nobody_can_be_reached(site: Site) -> None:
    there, detail, remedy = seen(site)
    assert (there, detail, remedy) == (
        False,
        "cannot reach the coordinator: connection refused by 127.0.0.1:9",
        "check coordinator.base_url and this machine's network",
    )
    _, detail, _ = seen(site, base_url="https://coordinator.example")
    assert detail == "https://coordinator.example is an example, not a real address"


def test_doctor_keeps_the_cause_of_an_error_and_its_remedy_apart(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "cannot reach the coordinator: c did not answer the TLS handshake; for http, see coordinator.base_url"
    )
    monkeypatch.setattr(doctor, "look", lambda *_: said)
    assert "; ".join(seen(site)[1:]) == said


def test_doctor_says_that_a_proxy_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "proxy.test:3128")
    found = findings(site, site.config())["proxy"]
    assert found.detail == "the node ignores the proxy in the environment (ALL_PROXY)"
    assert "coordinator.proxy: " in found.remedy
