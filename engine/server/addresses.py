"""Which URLs and which network addresses a request may make this machine read from (guard against SSRF).

A client that names a URL makes *this* machine open a connection, from inside its network. So a URL is taken apart
strictly, its host is resolved once, every address of the answer is judged, and the connection goes to a judged address
(see `fetch`), never to the name a second time.

Sources: the IANA registries of special-purpose IPv4 and IPv6 addresses; RFC 6052 (NAT64), RFC 3056 (6to4), RFC 4380
(Teredo); the host parser of the WHATWG URL standard ("ends in a number").
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urlsplit

from ..provider.errors import InvalidRequestError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL = 8192
_PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# Services of cloud providers that hand out credentials to whoever asks from this machine. Never fetched, whatever the
# settings: opening private networks is meant for file servers.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        *("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
    )
)

# Not left to `is_private` alone: what that covers differs between the versions of Python that this package runs on.
_SPECIAL_4 = tuple(
    ipaddress.IPv4Network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
)
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_6 = tuple(
    # Protocol assignments with Teredo and ORCHID, documentation, 6to4, documentation.
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"))
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What a trusted private network may consist of; tunnels, mapped, reserved and documentation addresses are not among it.
_PRIVATE = tuple(
    ipaddress.ip_network(net)
    for net in (
        *("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"),
        *("::1/128", "fc00::/7", "fe80::/10"),
    )
)


@dataclass(frozen=True)
class Target:
    """A URL taken apart.

    Attributes:
        scheme: ``http`` or ``https``.
        host: Lower case, without brackets or a final dot.
        port: The URL's own, or that of the scheme.
        path: Path and query as sent in the request line.
        address: The host where it is written as an address, otherwise None.
    """

    scheme: str
    host: str
    port: int
    path: str
    address: Address | None


def parse_url(url: str) -> Target:
    """Takes an http(s) URL apart.

    Raises:
        InvalidRequestError: Another scheme, credentials, a host in disguise (a number such as ``2130706433``,
            ``0x7f.1`` or ``0177.0.0.1``; letters outside ASCII; a zone), a bad port, white space or control
            characters, too long.
    """
    if len(url) > MAX_URL:
        raise _refused(f"The URL has {len(url)} characters, at most {MAX_URL} are accepted.", "Send the file instead.")
    # urlsplit drops tabs and line ends silently, and browsers take a backslash for a slash.
    if any(c <= " " or c in "\x7f\\" or not c.isprintable() for c in url):
        raise _refused("The URL holds white space, a backslash or a control character.", "Percent-encode it.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _refused("The URL cannot be read: its host or port is malformed.", "Correct the URL.") from error
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise _refused("Only http:// and https:// URLs are fetched.", "Download the file and send it as a 'data:' URI.")
    if "@" in parts.netloc:
        raise _refused("The URL holds a user name or a password.", "Use a URL without them, or send the file itself.")
    if port == 0:
        raise _refused("The URL has the port 0.", "Correct the URL.")
    host, address = _host(parts)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(parts.query, safe='/?%:@!$&()*+,;=~-._[]')}" if parts.query else ""
    return Target(scheme, host, port or _PORTS[scheme], path + query, address)


def listed(host: str, names: Iterable[str]) -> bool:
    """Whether a host is in a list of names; ``*.example.org`` stands for every name below example.org."""
    for name in names:
        wanted = name.strip().lower().strip("[]").rstrip(".")
        if host == wanted or (wanted.startswith("*.") and len(wanted) > 2 and host.endswith(wanted[1:])):
            return True
    return False


def judge(address: Address, private: bool) -> str:
    """Why this machine must not connect to an address for a client; empty where it may.

    Args:
        address: As resolved, or as written in the URL.
        private: Private, loopback and link-local addresses are allowed. Cloud metadata services, multicast, unspecified
            and reserved addresses and tunnels are refused all the same.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            address = ipaddress.IPv6Address(int(address))
        if address in _NAT64:  # the way to public IPv4 hosts from networks without IPv4: its target is what counts
            return judge(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF), private)
    if address in _METADATA:
        return "a cloud metadata service"
    if private and any(address.version == net.version and address in net for net in _PRIVATE):
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        special = any(address in net for net in _SPECIAL_4)
    else:  # IPv4-mapped and -compatible addresses, fc00::/7, fe80::/10 and ff00::/8 lie outside of 2000::/3
        special = address not in _GLOBAL_6 or any(address in net for net in _SPECIAL_6)
        special = special or (int(address) >> 32) & 0xFCFFFFFF == 0x5EFE  # ISATAP: an IPv4 address inside
    if special or not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return "not a public address"
    return ""


def _host(parts: SplitResult) -> tuple[str, Address | None]:
    host = (parts.hostname or "").removesuffix(".")
    if parts.netloc.startswith("["):
        try:
            return host, ipaddress.IPv6Address(host) if "%" not in host else _raise(ValueError(host))
        except ValueError as error:
            raise _refused("The URL's host is not an IPv6 address without a zone.", "Correct the URL.") from error
    labels = host.split(".")
    if not host.isascii():
        raise _refused("The URL's host has letters outside ASCII.", "Write it in its ASCII form, xn--...")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refused("The URL has no host, or not a valid one.", "Correct the URL.")
    if _NUMBER.fullmatch(labels[-1]):
        try:  # four decimal numbers without leading zeros, or nothing: other spellings exist to get around checks
            return host, ipaddress.IPv4Address(host)
        except ValueError as error:
            raise _refused("The URL's host is a number.", "Write an address as four decimal numbers.") from error
    return host, None


def _raise(error: ValueError) -> Address:
    raise error


def _refused(message: str, action: str) -> InvalidRequestError:
    return InvalidRequestError(message, action)
