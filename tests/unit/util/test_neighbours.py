"""Which addresses inputs come from: by our own table, and by a routing table in a network of its own."""

import socket
import subprocess
import sys

import pytest

from aitbc_miner.inputs import addresses
from aitbc_miner.inputs.addresses import forbidden


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "169.254.0.1", "fe80::1%eth0", "100.100.100.200", "168.63.129.16"),
        *("192.0.0.192", "fd00:ec2::254", "fd20:ce::254", "0.0.0.0", "::", "224.0.0.1", "ff02::1"),
        *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1"),
        *("::ffff:0.0.0.0", "::169.254.169.254", "2001:0:1:2:3:4:5601:5601"),
    ],
)
def test_addresses_that_are_never_reached(address: str) -> None:
    assert forbidden(address, allow_private=True)
    assert forbidden(address, allow_private=False)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1"),
        *("240.0.0.1", "255.255.255.255", "::1", "fc00::1", "fd12::1", "fec0::1", "::127.0.0.1"),
        *("::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::", "2001:db8::1"),
        # About these, releases of Python differ.
        *("192.0.0.8", "192.0.0.9", "192.0.0.10", "192.88.99.1", "192.0.2.7", "203.0.113.7", "0.1.2.3"),
        *("2001:2::1", "2001:20::1", "2001:1::1", "3fff::1", "5f00::1", "100::1", "2001:0:1:2:3:4:f5ff:fffe"),
        *("4000::1", "64:ff9b:1::808:808"),
    ],
)
def test_addresses_that_must_be_allowed(address: str) -> None:
    assert forbidden(address, allow_private=False)
    assert not forbidden(address, allow_private=True)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "8.8.8.8",
            "1.1.1.1",
            "11.0.0.1",
            "100.128.0.1",
            "172.32.0.1",
            "2606:4700::1111",
            "2620:4f:8000::1",
        ),
        *("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2001:0:1:2:3:4:f7f7:f7f7"),
    ],
)
def test_public_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_is_near", lambda _: False)  # whatever this machine's networks are
    assert not forbidden(address, allow_private=False)


ROUTES = """
set -e
ip link set lo up
ip link add lan type veth peer name lan2
ip link set lan up; ip link set lan2 up
ip addr add 198.41.0.5/24 dev lan
ip -6 addr add 2a00:1450::5/64 dev lan nodad
ip route add 193.0.0.0/21 dev lan
ip link add ppp type veth peer name ppp2
ip link set ppp up; ip link set ppp2 up
ip addr add 9.9.9.9 peer 9.9.9.10 dev ppp
ip route add default dev ppp
ip -6 route add default via 2a00:1450::1 dev lan
ip route add 20.0.0.0/16 via 198.41.0.1
ip route add 21.0.0.0/16 nexthop via 198.41.0.1 nexthop dev ppp
ip route add 22.0.0.0/16 nexthop via 198.41.0.1 nexthop via 198.41.0.2
ip route add unreachable 23.0.0.0/16
ip route add 24.0.0.0/16 dev lan table 77
ip rule add to 24.0.0.0/16 lookup 77
ip route add 25.0.0.0/16 via inet6 2a00:1450::1 dev lan
"""
PROGRAM = """
import subprocess, sys
subprocess.run(["sh", "-c", sys.argv[1]], check=True)
from aitbc_miner.inputs.addresses import forbidden
for address in sys.argv[2:]:
    print(address, forbidden(address, allow_private=False), forbidden(address, allow_private=True))
"""


@pytest.mark.needs("iproute2")
def test_what_the_routing_table_calls_local_or_directly_connected() -> None:
    near = [
        *("198.41.0.5", "198.41.0.77", "198.41.0.1", "198.41.0.255", "193.0.6.139", "9.9.9.9", "9.9.9.10"),
        *("2a00:1450::5", "2a00:1450::77", "2a00:1450::1", "::ffff:198.41.0.5", "64:ff9b::c629:5"),
        *("2002:c629:5::1", "21.0.0.1", "24.0.0.1"),
    ]
    far = ["8.8.8.8", "198.41.1.1", "20.0.0.1", "22.0.0.1", "23.0.0.1", "25.0.0.1", "2a00:1450:0:1::1"]
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-c", PROGRAM, ROUTES, *near, *far]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wanted = [f"{one} True False" for one in near] + [f"{one} False False" for one in far]
    assert done.stdout.splitlines() == wanted


def test_a_kernel_that_does_not_tell_permits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute:
        def __init__(self, *_: object) -> None:
            raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", Mute)
    with pytest.raises(OSError, match="not supported"):
        forbidden("8.8.8.8", allow_private=False)
    assert forbidden("10.0.0.1", allow_private=False)
