"""Which addresses a stranger may have us fetch from: none of this machine's, nor of the networks around it.

The table is our own, since what `ipaddress` calls private or global changes with the version of Python. What
it cannot know, our own public addresses and the neighbours that have such, the kernel's routing table does.
"""

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# Not even where private addresses are allowed: this network, link-local, multicast, and the metadata services
# of clouds that are elsewhere (Alibaba, Oracle, Azure, AWS and Google on IPv6).
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
_6TO4 = ipaddress.IPv6Network("2002::/16")
_TEREDO = ipaddress.IPv6Network("2001::/32")
# IPv4 in the last 32 bits. The first two are nothing but the address within.
_MAPPED, _NAT64 = ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")
_WRAPPED = (_MAPPED, _NAT64, ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))

# A prefix no longer than this is the way to the world, and no network of neighbours: on a point-to-point link
# that way has no gateway either.
_WORLD = {4: 7, 6: 16}

# <linux/netlink.h>, <linux/rtnetlink.h>
_RTM_GETROUTE, _NLM_F_REQUEST, _NLMSG_ERROR, _RTM_F_FIB_MATCH = 26, 1, 2, 0x2000
_RTA_DST, _RTA_GATEWAY, _RTA_MULTIPATH, _RTA_VIA = 1, 5, 9, 18
_RTN_UNICAST, _RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST = 1, 2, 3, 4
_HEADER, _ROUTE, _ATTRIBUTE, _HOP = (struct.Struct(f"={form}") for form in ("IHHII", "8BI", "HH", "HBBI"))
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL}


def forbidden(address: str, *, allow_private: bool) -> bool:
    """Whether nothing may be fetched from this address, whose scope may follow a `%`.

    Raises:
        OSError: the kernel does not tell where it leads.
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
    """Give the IPv4 address within an IPv6 one, and whether that is all that the latter stands for."""
    number = int(ip)
    if ip.version == 4:
        return None, False
    if ip in _6TO4:
        return ipaddress.IPv4Address(number >> 80 & 0xFFFFFFFF), True
    if ip in _TEREDO:
        return ipaddress.IPv4Address(~number & 0xFFFFFFFF), True
    network = next((one for one in _WRAPPED if ip in one), None)
    return (ipaddress.IPv4Address(number & 0xFFFFFFFF) if network else None), network in {_MAPPED, _NAT64}


def _is_private(ip: IP) -> bool:
    return (ip.version == 6 and ip not in _PUBLIC_V6) or any(ip in network for network in _PRIVATE)


def _is_near(ip: IP) -> bool:
    """Whether the routing table has it as an address of this machine, or as one directly connected to it."""
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
            return False  # nobody is there, and connecting will say so
        raise OSError(number, "cannot ask the routing table where the address leads")
    _, prefix, _, _, _, _, _, route, _ = _ROUTE.unpack_from(reply, _HEADER.size)
    if route in {_RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST}:
        return True
    wide = prefix <= _WORLD[ip.version]
    return route == _RTN_UNICAST and not wide and not _has_gateway(reply[_HEADER.size + _ROUTE.size :])


def _has_gateway(attributes: bytes) -> bool:
    """Whether a gateway leads there: of several ways, all must."""
    for kind, value in _split(attributes):
        if kind in {_RTA_GATEWAY, _RTA_VIA}:
            return True
        if kind == _RTA_MULTIPATH:
            return all(_has_gateway(hop) for hop in _hops(value))
    return False


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : size]
        data = data[max(size + 3 & ~3, _ATTRIBUTE.size) :]


def _hops(data: bytes) -> Iterator[bytes]:
    while len(data) >= _HOP.size:
        size = _HOP.unpack_from(data)[0]
        yield data[_HOP.size : size]
        data = data[max(size + 3 & ~3, _HOP.size) :]
