"""Where web hooks may go: which URLs are taken, and which addresses are connected to.

A hook makes this service send requests to where a user says, so its own network must be out of reach. The name of a
URL is looked up once, every address that it has must be a public one, and the sender connects to an address that was
checked here, never to the name. Nothing here opens a connection.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from cffa_core.errors import CffaError, InvalidSettings, InvalidSpec, Problem
from cffa_core.settings import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Lookup = Callable[[str, int], list[str]]
"""All addresses of a host name; raises ``OSError`` if there is none."""

LONGEST_URL = 2000
_DEFAULT_PORTS = {"https": 443, "http": 80}
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
)


def _networks(*named: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(name) for name in named)


# The IANA registries of special-purpose addresses (RFC 6890 and its updates), written out: what Python's `is_global`
# knows depends on its patch version.
_NOT_PUBLIC = _networks(
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
    *("2001::/23", "2001:db8::/32", "3fff::/20"),
)
# Not even where an operator named a network around them: this network itself, link-local addresses (where clouds keep
# their metadata), multicast, and metadata servers that live elsewhere (Azure, Alibaba, Oracle, AWS and Google on IPv6).
_NEVER = _networks(
    *("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32", "::/128", "fe80::/10", "ff00::/8"),
    *("168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32", "fd00:ec2::254/128", "fd20:ce::254/128"),
)
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(CffaError):
    """A host without an address that a web hook may be sent to; which, or why, is not told."""

    code = "address_refused"


@dataclass(frozen=True)
class Target:
    """A URL that was taken apart. ``host`` is a name or a literal address without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header: the name as the URL has it, never the address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Policy:
    """What the operator allows: http besides https, ranges of ports, networks that count as public."""

    allow_http: bool = False
    ports: tuple[tuple[int, int], ...] = ((80, 80), (443, 443), (1024, 65535))
    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The policy of ``CFFA_WEBHOOK_*``; raises :class:`InvalidSettings` for what is no port or network."""
        try:
            ports = tuple(_range(item) for item in settings.webhook_ports.split(",") if item.strip())
            named = tuple(
                ipaddress.ip_network(item.strip())
                for item in settings.webhook_allow_networks.split(",")
                if item.strip()
            )
        except ValueError as error:
            raise InvalidSettings(
                "CFFA_WEBHOOK_PORTS takes ports and ranges (443,8000-8100), CFFA_WEBHOOK_ALLOW_NETWORKS networks "
                f"(10.1.2.0/24): {error}"
            ) from error
        return cls(settings.webhook_allow_http, ports, named)

    def target(self, url: str) -> Target:
        """Take ``url`` apart; raises :class:`InvalidSpec` (pointer ``/url``) for one that is never sent to."""
        if len(url) > LONGEST_URL or _VISIBLE.fullmatch(url) is None or "\\" in url:
            raise _refused(f"write it in at most {LONGEST_URL} visible ASCII characters (names as xn--...), without \\")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise _refused(str(error)) from error
        if parts.scheme not in (("https", "http") if self.allow_http else ("https",)):
            raise _refused("it must begin with https://" + (" or http://" if self.allow_http else ""))
        if "@" in parts.netloc or parts.fragment:
            raise _refused("it may hold neither a user, a password nor a fragment; what is secret goes into the path")
        host = host.removesuffix(".")
        port = _DEFAULT_PORTS[parts.scheme] if port is None else port
        if not any(first <= port <= last for first, last in self.ports):
            raise _refused(f"web hooks are not sent to port {port}")
        literal = _literal(host)
        if "%" in host or ("[" in parts.netloc) != isinstance(literal, ipaddress.IPv6Address):
            raise _refused("it names no host")
        if literal is not None and not self.may_connect(literal):
            raise _refused("its address is not a public one")
        if literal is None and (_NAME.fullmatch(host) is None or _looks_numeric(host)):
            raise _refused("it names no host")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(parts.scheme, host, port, path)

    def addresses(self, target: Target, lookup: Lookup) -> tuple[str, ...]:
        """Addresses of ``target``, of one look-up; raises :class:`AddressRefused` unless every one is allowed."""
        try:
            found = list(dict.fromkeys([target.host] if _literal(target.host) else lookup(target.host, target.port)))
        except (OSError, UnicodeError):
            found = []
        # One answer for a name that does not exist and one that is not public: nobody learns names of an inner network.
        if not found or not all((address := _literal(item)) and self.may_connect(address) for item in found):
            raise AddressRefused("the host has no public address")
        return tuple(found)

    def may_connect(self, address: Address) -> bool:
        """Whether one address is public, or in a network that the operator named."""
        if isinstance(address, ipaddress.IPv6Address) and (inner := _inner(address)) is not None:
            return self.may_connect(inner)
        if any(address in network for network in _NEVER):
            return False
        if any(address in network for network in self.networks):
            return True
        if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST_V6:
            return False
        return address.is_global and not any(address in network for network in _NOT_PUBLIC)


def system_lookup(host: str, port: int) -> list[str]:
    """All addresses that the system knows of a name, as text."""
    return [str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to: mapped, 6to4, NAT64."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _looks_numeric(host: str) -> bool:
    """Whether a resolver may take it for an IPv4 address in an old notation: 2130706433, 0x7f.1, 127.1, 0177.0.0.1."""
    last = host.rpartition(".")[2]
    return re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last) is not None


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    low, high = int(first), int(last if dash else first)
    if not 0 < low <= high <= 65535:
        raise ValueError(f"{text.strip()!r} is no range of ports")
    return low, high


def _refused(why: str) -> InvalidSpec:
    problem = Problem("/url", "bad_url", why)
    return InvalidSpec(f"a web hook cannot have this URL: {why}", problems=(problem,))
