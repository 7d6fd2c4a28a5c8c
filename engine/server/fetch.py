"""Images and videos from http(s) URLs, fetched so that a client cannot reach into this machine's network.

For each address, the one in the request and each one it redirects to: the URL is taken apart strictly, the name is
resolved once, all its addresses are judged (`addresses.judge`), and the connection goes to one of them by number, so a
name that resolves differently the second time changes nothing. TLS still checks the certificate against the name.
Nothing of the environment (proxies, cookies, .netrc) is used. Messages for clients hold neither addresses nor the
reason why one was refused; both go to the log.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urljoin

from ..provider.errors import InvalidRequestError
from .addresses import Target, judge, listed, parse_url

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

CHUNK = 1 << 18
_OVERHEAD = 8 << 20  # http.client takes up to 100 header lines of 64 KiB
_REDIRECTS = (301, 302, 303, 307, 308)
_TEXTS = ("text/", "application/json", "application/xml", "application/xhtml+xml")
_DOWNLOAD = "Download the {kind} and send it as a 'data:' URI."
_PREFIXES = ("PIXANO_EDGE_MEDIA_", "PIXANO_INFERENCE_MEDIA_")

Resolved = tuple[int, tuple[Any, ...]]
"""Address family and socket address, as `socket.getaddrinfo` gives them."""
Resolver = Callable[[str, int], Sequence[Resolved]]


def resolve(host: str, port: int) -> list[Resolved]:
    """Addresses of a host, from the system's resolver; raises OSError where there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(int(family), address) for family, _, _, _, address in found]


@dataclass(frozen=True)
class FetchPolicy:
    """Which URLs are fetched, and within which limits. Each field is a setting ``PIXANO_EDGE_MEDIA_<FIELD>``.

    Attributes:
        allow_url: Fetch at all.
        url_hosts: Hosts that may be named; empty: every public host. ``*.example.org`` takes every name below it.
        url_host_allowlist: Hosts whose addresses may be private, as in pixano-inference (where it has this meaning,
            and does not limit the other hosts).
        allow_private_ips: Every host's addresses may be private. Any client can then read images from any web server
            that this machine reaches.
        max_redirects: Redirects followed; each one passes every check again.
        connect_timeout_s: Longest wait for the name's addresses, for each connection and for the TLS handshake.
        read_timeout_s: Longest wait for the next bytes.
        total_timeout_s: Longest time for an image, all in all.
        video_timeout_s: Longest time for a video, all in all.
        ca_file: Certificates (PEM) to trust instead of the system's.
        resolver: Looks up addresses; for tests.
    """

    allow_url: bool = True
    url_hosts: tuple[str, ...] = ()
    url_host_allowlist: tuple[str, ...] = ()
    allow_private_ips: bool = False
    max_redirects: int = 3
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    total_timeout_s: float = 60.0
    video_timeout_s: float = 300.0
    ca_file: str | None = None
    resolver: Resolver = field(default=resolve, repr=False, compare=False)


def fetch(url: str, policy: FetchPolicy, max_bytes: int, kind: str, allowance: Allowance | None = None) -> bytes:
    """The content behind an http(s) URL. Blocks: call it in a thread.

    Args:
        url: From a request; not trusted.
        policy: What is allowed.
        max_bytes: Most bytes of content; checked on the announced length and again while reading.
        kind: ``image`` or ``video``: for messages, and for the total time. The content is not looked at.
        allowance: Shared with the other fetches of the same request.

    Raises:
        InvalidRequestError: Refused, unreachable, too slow, too large, compressed, truncated, or an answer other than
            200. The message is safe to show to the client.
    """
    hint = _DOWNLOAD.format(kind=kind)
    if not policy.allow_url:
        raise InvalidRequestError(f"{kind.capitalize()}s are not fetched from URLs by this server.", hint)
    allowance = allowance or Allowance(1, max_bytes)
    total = policy.video_timeout_s if kind == "video" else policy.total_timeout_s
    deadline = _Deadline(total, policy.read_timeout_s, allowance)
    target = parse_url(url)
    for _ in range(policy.max_redirects + 1):
        answer = _get(target, policy, max_bytes, kind, deadline, allowance)
        if isinstance(answer, bytes):
            return answer
        following = parse_url(answer)
        if target.scheme == "https" and following.scheme == "http":
            raise InvalidRequestError(f"'{target.host}' redirects from https:// to http://.", hint)
        target = following
    raise InvalidRequestError(f"The URL redirects more than {policy.max_redirects} times.", "Use the final URL.")


def policy_from_environ(environ: Mapping[str, str] | None = None) -> FetchPolicy:
    """The policy that the environment asks for: ``PIXANO_EDGE_MEDIA_<FIELD>``, then ``PIXANO_INFERENCE_MEDIA_<FIELD>``.

    Raises:
        InvalidRequestError: A value of the wrong kind; names the variable.
    """
    env = os.environ if environ is None else environ
    readers: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("allow_url", "allow_private_ips"), _flag),
        **dict.fromkeys(("url_hosts", "url_host_allowlist"), _names),
        **dict.fromkeys(("connect_timeout_s", "read_timeout_s", "total_timeout_s", "video_timeout_s"), _seconds),
        "max_redirects": _count,
        "ca_file": str,
    }
    found: dict[str, Any] = {}
    for name, reader in readers.items():
        for variable in (prefix + name.upper() for prefix in _PREFIXES):
            if text := env.get(variable, "").strip():
                try:
                    found[name] = reader(text)
                except ValueError as error:
                    raise InvalidRequestError(f"{variable} is {text!r}, not {error}.", "Correct it.") from error
                break
    return FetchPolicy(**found)


class Allowance:
    """What the fetches of one request may take together. Safe to use from several threads.

    Args:
        urls: Addresses at most.
        nbytes: Bytes of content at most, over all of them.
    """

    def __init__(self, urls: int, nbytes: int) -> None:
        self._most = (urls, nbytes)
        self._urls, self._nbytes = urls, nbytes
        self._lock = threading.Lock()
        self._stopped = False

    def begin(self, urls: int) -> None:
        """Counts addresses before any of them is asked; raises InvalidRequestError when there are too many."""
        with self._lock:
            self._urls -= urls
            if self._urls < 0:
                raise InvalidRequestError(
                    f"The request names more than {self._most[0]} URLs.",
                    "Send the media as files or 'data:' URIs, split the request, or raise media_max_urls.",
                )

    def take(self, nbytes: int) -> None:
        """Counts content that came; raises InvalidRequestError when it is too much, or nobody waits for it any more."""
        with self._lock:
            if self._stopped:
                raise InvalidRequestError("The request ended before its media were fetched.", "Send it again.")
            self._nbytes -= nbytes
            if self._nbytes < 0:
                raise InvalidRequestError(
                    f"The media behind the request's URLs have more than {self._most[1]} bytes together.",
                    "Send smaller ones, split the request, or raise media_max_fetched_bytes.",
                )

    def stop(self) -> None:
        """Ends what is being fetched at its next bytes, and what has not begun at once."""
        with self._lock:
            self._stopped = True


class _Deadline:
    """Time left for a whole fetch; bounds each wait on a socket, and ends it where the request has ended."""

    def __init__(self, total: float, wait: float, allowance: Allowance) -> None:
        self._allowance = allowance
        self._end = time.monotonic() + total
        self._wait = wait

    def wait(self, longest: float | None = None) -> float:
        """Seconds that the next operation may take; raises TimeoutError when none are left."""
        self._allowance.take(0)
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the total time is over")
        return min(left, self._wait if longest is None else longest)


class _Raw(io.RawIOBase):
    """A socket's bytes, each wait bounded by the deadline: a peer that sends a byte now and then gains nothing.

    At most `budget` bytes come through: http.client reads to the end, in one piece, for a chunk of the length -1.
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline, budget: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._budget = budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.wait())
        count = self._sock.recv_into(buffer)
        self._budget -= count
        if self._budget < 0:
            raise OSError("more bytes than any valid answer has")
        return count


class _Socket:
    """What http.client asks of a socket."""

    def __init__(self, sock: socket.socket, deadline: _Deadline, budget: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._budget = budget

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(self._deadline.wait())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Raw(self._sock, self._deadline, self._budget), 1 << 16)

    def close(self) -> None:
        """Left to `_get`, which owns the socket."""


def _get(
    target: Target, policy: FetchPolicy, max_bytes: int, kind: str, deadline: _Deadline, allowance: Allowance
) -> bytes | str:
    """One request: the content, or the URL that it redirects to."""
    host, hint = target.host, _DOWNLOAD.format(kind=kind)
    if policy.url_hosts and not listed(host, policy.url_hosts):
        raise InvalidRequestError(f"This server does not fetch from '{host}'.", hint)
    private = policy.allow_private_ips or listed(host, policy.url_host_allowlist)
    if target.port < 1024 and target.port not in (80, 443) and not private:
        raise InvalidRequestError(f"Port {target.port} belongs to another service than the web.", hint)
    addresses = _addresses(target, private, policy, deadline, hint)
    try:
        with _connect(target, addresses, policy, deadline) as sock:
            # No connection of its own making: `sock` is set, and one request is all it is used for.
            connection = http.client.HTTPConnection(host, target.port)
            connection.auto_open = 0
            connection.default_port = 443 if target.scheme == "https" else 80
            connection.sock = _Socket(sock, deadline, 2 * max_bytes + _OVERHEAD)
            headers = {"Accept": f"{kind}/*, */*;q=0.5", "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("GET", target.path, headers={**headers, "User-Agent": "pixano-edge"})
            response = connection.getresponse()
            if response.status in _REDIRECTS and (location := response.getheader("Location")):
                authority = f"[{host}]" if ":" in host else host
                return urljoin(f"{target.scheme}://{authority}:{target.port}{target.path}", location)
            _check_head(response, host, max_bytes, kind, hint)
            return _body(response, host, max_bytes, kind, allowance)
    except ssl.SSLCertVerificationError as error:
        _LOG.info("fetch: certificate of %s: %s", host, error)
        message = f"The certificate of '{host}' is not valid for it, or not from an authority this server trusts."
        raise InvalidRequestError(message, hint) from error
    except TimeoutError as error:
        _LOG.info("fetch: %s: %s", host, error)
        raise InvalidRequestError(f"'{host}' took too long.", hint) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        _LOG.info("fetch: %s: %s: %s", host, type(error).__name__, error)
        message = f"The {kind} could not be fetched from '{host}': the connection failed or its answer is malformed."
        raise InvalidRequestError(message, f"Check the URL. {hint}") from error


def _addresses(target: Target, private: bool, policy: FetchPolicy, deadline: _Deadline, hint: str) -> list[Resolved]:
    """The target's addresses, all of them judged; one that must not be reached refuses the host as a whole."""
    # One message for unknown names and for private ones: else a client could map the names of this network.
    unknown = InvalidRequestError(f"'{target.host}' is not a host that this server can fetch from.", hint)
    try:
        if target.address is not None:
            family = int(socket.AF_INET if target.address.version == 4 else socket.AF_INET6)
            found: Sequence[Resolved] = [(family, (str(target.address), target.port))]
        else:
            found = _in_time(lambda: policy.resolver(target.host, target.port), deadline.wait(policy.connect_timeout_s))
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        _LOG.info("fetch: %s cannot be resolved: %s", target.host, error)
        raise unknown from error
    for family, sockaddr in found:
        try:
            reason = judge(ipaddress.ip_address(sockaddr[0]), private) if family in _FAMILIES else "of no known kind"
        except ValueError:
            reason = "malformed"
        if reason:
            _LOG.warning("fetch: refused %s: %s is %s", target.host, sockaddr[0], reason)
            raise unknown
    if not found:
        raise unknown
    return list(found)


_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def _connect(target: Target, addresses: Sequence[Resolved], policy: FetchPolicy, deadline: _Deadline) -> socket.socket:
    """A connection to the first of the addresses that answers, with TLS where the scheme asks for it."""
    last: OSError = OSError("no address")
    for family, sockaddr in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline.wait(policy.connect_timeout_s))
            sock.connect(sockaddr)
            if target.scheme == "https":
                sock.settimeout(deadline.wait(policy.connect_timeout_s))
                return _tls(policy.ca_file).wrap_socket(sock, server_hostname=target.host)
            return sock
        except ssl.SSLCertVerificationError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
    raise last


@functools.lru_cache(maxsize=4)
def _tls(ca_file: str | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def _check_head(response: http.client.HTTPResponse, host: str, max_bytes: int, kind: str, hint: str) -> None:
    if response.status != 200:
        raise InvalidRequestError(
            f"'{host}' answered {response.status} instead of the {kind}.", f"Check the URL. {hint}"
        )
    if response.getheader("Content-Encoding", "identity").strip().lower() not in ("identity", ""):
        raise InvalidRequestError(f"'{host}' sends the {kind} compressed, unasked.", hint)
    if response.getheader("Content-Type", "").strip().lower().startswith(_TEXTS):
        raise InvalidRequestError(
            f"'{host}' answered with a page or a text, not with the {kind}.", f"Use the URL of the file itself. {hint}"
        )
    if response.length is not None and response.length > max_bytes:
        raise _too_large(max_bytes, kind)


def _body(response: http.client.HTTPResponse, host: str, max_bytes: int, kind: str, allowance: Allowance) -> bytes:
    announced = response.length
    content, size = io.BytesIO(), 0
    while chunk := response.read(min(CHUNK, max_bytes + 1 - size)):
        content.write(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes, kind)
        allowance.take(len(chunk))
    if announced is not None and size != announced:
        raise InvalidRequestError(f"'{host}' broke off after {size} of {announced} bytes.", "Try again.")
    return content.getvalue()


def _too_large(max_bytes: int, kind: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The {kind} behind the URL has more than {max_bytes} bytes.", f"Use a smaller {kind}, or raise the limit."
    )


def _in_time(work: Callable[[], _T], seconds: float) -> _T:
    """Runs `work`, which has no time limit of its own, and stops waiting for it after `seconds` (TimeoutError)."""
    done: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            done.put((None, error))

    threading.Thread(target=run, name="fetch-resolver", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("the name server did not answer") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def _names(text: str) -> tuple[str, ...]:
    names = text.strip("[]").replace('"', "").split(",") if text.startswith("[") else text.split(",")
    return tuple(name.strip() for name in names if name.strip())


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise ValueError("seconds above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number")
    return int(text)
