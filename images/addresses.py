"""Which urls may be asked for, and which addresses may be dialled: pure functions of text, no network.

`ipaddress.is_global` alone is no guard: it passes multicast, the NAT64, 6to4 and IPv4-compatible forms of private addresses, and two
metadata services that clouds keep at addresses of public ranges.
"""

import ipaddress
import re
from typing import NamedTuple

import httpx

from shards.errors import BadData

MAX_URL_CHARS = 8192
PUBLIC_PORTS = frozenset({80, 443, 8080, 8443})
"""Where images are served in public. Others are services that no list of images should reach."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


def _networks(*texts: str) -> _Networks:
    return tuple(ipaddress.ip_network(text) for text in texts)


_PRIVATE = _networks(
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"
)
_METADATA = _networks("100.100.100.200/32", "168.63.129.16/32", "fd00:ec2::/32")
"""Alibaba's, Azure's and Amazon's (IPv6) services that hand out a machine's secrets; the others' are link-local."""

_NEVER_PUBLIC = _networks(
    "0.0.0.0/8",
    *("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    "224.0.0.0/3",
    # Of 2000::/3, outside which nothing is public: Teredo, ORCHID and other protocols; documentation; 6to4.
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})


class Target(NamedTuple):
    """A url taken apart: `host` is ASCII (punycode), lower case, without brackets or a final dot; `path` is percent-encoded."""

    scheme: str
    host: str
    port: int
    path: bytes

    @property
    def host_header(self) -> str:
        """`host`, with the brackets of IPv6 and a port that is not the scheme's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.path.decode('ascii')}"


_SHAPE = re.compile(r"(https?)://([^/?#]*)(?:[/?#].*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s@:\[\]%\\]+)(?::([0-9]{0,5}))?", re.IGNORECASE)
_CONTROL_OR_BACKSLASH = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def parse_url(url: str) -> Target:
    """Take an http or https url apart. The fragment is dropped.

    Raises BadData `bad_url`: another scheme, credentials, a control character or backslash, no host or one that is no name, a zone
    id, a number that is no dotted IPv4 address (`2130706433`, `0x7f.1`, `127.1`: resolvers read them as 127.0.0.1), over 8,192
    characters.
    """
    if len(url) > MAX_URL_CHARS:
        raise BadData("bad_url", f"{len(url)} characters, the limit is {MAX_URL_CHARS}")
    if _CONTROL_OR_BACKSLASH.search(url):
        raise BadData("bad_url", "holds a control character or a backslash")
    shape = _SHAPE.fullmatch(url)
    if shape is None:
        raise BadData("bad_url", "not of the form http(s)://host/path")
    authority = _AUTHORITY.fullmatch(shape[2])
    if authority is None:
        raise BadData("bad_url", "no host, or credentials, a zone id or another oddity beside it")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii").removesuffix(".")
        path = parsed.raw_path
    except (httpx.InvalidURL, ValueError) as error:
        raise BadData("bad_url", " ".join(str(error).split())[:200]) from None
    last = host.rpartition(".")[2]
    if authority[1].startswith("[") or _NUMBER.fullmatch(last):
        if literal_address(host) is None:
            raise BadData("bad_url", "the host is a number, and no dotted IPv4 address")
    elif not _HOST_NAME.fullmatch(host):
        raise BadData("bad_url", "the host is no name")
    scheme = shape[1].lower()
    port = parsed.port if parsed.port is not None else {"http": 80, "https": 443}[scheme]
    if not 0 < port < 65536:
        raise BadData("bad_url", f"port {port}")
    return Target(scheme, host, port, path)


def literal_address(host: str) -> IpAddress | None:
    """The address that a host is, None where it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to a mapped or NAT64 address reach."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None


def _in(address: IpAddress, networks: _Networks) -> bool:
    return any(address in network for network in networks)


def may_dial(address: IpAddress, allow_private: bool) -> bool:
    """Whether connections to an address are allowed.

    Public unicast is. With `allow_private` so are loopback, RFC 1918, shared (100.64/10) and unique local addresses; never link-local,
    metadata services, multicast, unspecified, broadcast or reserved ones. IPv4-mapped and NAT64 (64:ff9b::/96) forms count as the
    IPv4 address in them; every other embedding (IPv4-compatible, 6to4, Teredo, ISATAP of a private one) is refused.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded(address)
        if inner is not None:
            return may_dial(inner, allow_private)
        if address.scope_id is not None:
            return False
    if _in(address, _METADATA):
        return False
    if allow_private and _in(address, _PRIVATE):
        return True
    if _in(address, _NEVER_PUBLIC) or address.is_multicast or not address.is_global:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return True
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return may_dial(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF), False)
    return address in _GLOBAL_UNICAST


def checked_addresses(found: list[str], allow_private: bool) -> tuple[str, ...]:
    """The addresses of a host in the order found, each once. Raises BadData `address_blocked` where any of them may not be dialled.

    One bad answer condemns all: a name that leads to both public and private addresses is a trick or a mistake.
    """
    checked: dict[str, None] = {}
    for text in found:
        address = literal_address(text)
        if address is None or not may_dial(address, allow_private):
            raise BadData("address_blocked", f"leads to {text}, which is not a public address")
        checked[str(address)] = None
    return tuple(checked)
