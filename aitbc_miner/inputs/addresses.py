"""Decides from which addresses a job may have the node fetch: never from this machine or its own networks.

The tables of addresses are our own: `ipaddress.is_private` changes with the version of Python. The kernel's
routing table tells our own public addresses, and neighbours with public addresses.
"""

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# Forbidden even if private addresses are allowed: the unspecified address, link-local, multicast, and the
# metadata services of clouds outside link-local (Alibaba, Oracle, Azure, AWS and Google on IPv6).
_NEVER = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/32", "169.254.0.0/16", "224.0.0.0/4", "::/128", "fe80::/10", "ff00::/8"),
        *("100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254"),
    )
]
# IANA's registries of special-purpose addresses, as of 2026.
_PRIVATE = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "240.0.0.0/4", "2001::/23", "2001:db8::/32", "3fff::/20"),
    )
]
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
# IPv6 networks with an IPv4 address in the last 32 bits. The first means nothing but the IPv4 address.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_WRAPPED = (_NAT64, ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))

# A route with a prefix of at most so many bits leads to the Internet and not to neighbours. The absence of a
# gateway does not tell: on a point-to-point link, the route to the Internet has no gateway either.
_WORLD = {4: 7, 6: 16}

# <linux/netlink.h>, <linux/rtnetlink.h>
_RTM_GETROUTE, _NLM_F_REQUEST, _NLMSG_ERROR, _RTM_F_FIB_MATCH = 26, 1, 2, 0x2000
_RTA_DST, _RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA = 1, 5, 9, 18
_RTN_UNICAST, _RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST = 1, 2, 3, 4
_HEADER, _ROUTE, _ATTRIBUTE, _HOP = (struct.Struct(f"={form}") for form in ("IHHII", "8BI", "HH", "HBBI"))
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL}


def forbidden(address: str, *, allow_private: bool) -> bool:
    """Whether the node may fetch nothing from an address; `%` and a scope may follow the address.

    Raises:
        OSError: the kernel does not tell the route to the address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner, alone = _unwrapped(ip)
    if any(one in network for one in (ip, inner) if one for network in _NEVER):
        return True
    if allow_private:
        return False
    meant = inner if inner and alone else ip
    return _is_private(meant) or any(_is_near(one) for one in {ip, meant})


def _unwrapped(ip: IP) -> tuple[ipaddress.IPv4Address | None, bool]:
    """Give the IPv4 address inside an IPv6 address, and whether the IPv6 address means nothing else."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None, False
    if inner := ip.sixtofour or ip.ipv4_mapped or (ip.teredo and ip.teredo[1]):
        return inner, True
    network = next((one for one in _WRAPPED if ip in one), None)
    return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if network else None), network == _NAT64


def _is_private(ip: IP) -> bool:
    return (ip.version == 6 and ip not in _PUBLIC_V6) or any(ip in network for network in _PRIVATE)


def _is_near(ip: IP) -> bool:
    """Whether the routing table has the address as our own, or as directly connected to this machine."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as kernel:
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        bits = ip.max_prefixlen
        asked = _ROUTE.pack(family, bits, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
        asked += _ATTRIBUTE.pack(_ATTRIBUTE.size + bits // 8, _RTA_DST) + ip.packed
        kernel.settimeout(5)
        kernel.send(_HEADER.pack(_HEADER.size + len(asked), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + asked)
        reply = kernel.recv(65536)
    _, kind, _, _, _ = _HEADER.unpack_from(reply)
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", reply, _HEADER.size)[0]
        if number in _NO_WAY:
            return False  # no route: connecting to the address will fail
        raise OSError(number, "cannot ask the routing table for the route to the address")
    _, prefix, _, _, _, _, _, route, _ = _ROUTE.unpack_from(reply, _HEADER.size)
    if route in {_RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST}:
        return True
    if route != _RTN_UNICAST or prefix <= _WORLD[ip.version]:
        return False
    return not _has_gateway(reply[_HEADER.size + _ROUTE.size :])


def _has_gateway(attributes: bytes) -> bool:
    """Whether the route uses a gateway; a route with several hops must use a gateway in each."""
    for kind, value in _split(attributes, _ATTRIBUTE):
        if kind in {_RTA_GATEWAY, _RTA_VIA}:
            return True
        if kind == _RTA_MULTIPATH:
            return all(_has_gateway(hop) for _, hop in _split(value, _HOP))
    return False


def _split(data: bytes, header: struct.Struct) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the content of each attribute, or the flags and the attributes of each hop."""
    while len(data) >= header.size:
        size, kind = header.unpack_from(data)[:2]
        yield kind & 0x3FFF, data[header.size : size]
        data = data[max(size + 3 & ~3, header.size) :]
