"""Fetch a page from the web at an address that is not trusted.

The address is written by a model, perhaps at the wish of a page it read, so it is treated as hostile:

- http and https only, and no address of a private network, of this machine (a public one too, if one of its interfaces
  has it), or of a cloud's metadata service. A name is resolved once, every address it has is checked, and the
  connection is made to a checked address: a name that resolves differently the second time gains nothing. Each
  redirect is checked like the first address.
- One deadline covers connecting, handshake, headers, body and redirects, also against a server that sends a byte now
  and then. The page is cut at a size, which is counted after decompression.

What this module does NOT do: keep cookies, go through a proxy (the addresses could not be checked), or bound the time
that the system takes to resolve a name.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.error
import zlib
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from ...execution.errors import TransientToolError
from ...execution.retries import is_transient, retry_after

_USER_AGENT = "Mozilla/5.0 (compatible; arpo-trl)"
_MOST_REDIRECTS = 5
HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("application/json", "application/xml")
# IANA's special-purpose address registries, whole, so that no Python version decides; and what clouds use besides.
# https://www.iana.org/assignments/iana-ipv4-special-registry
# https://www.iana.org/assignments/iana-ipv6-special-registry
_NOT_PUBLIC_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by the customers of a provider; a cloud's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a service inside one cloud
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast tunnels
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
# Of IPv6 only 2000::/3 is given out; the rest is loopback, private, link-local, multicast or reserved
_GIVEN_OUT_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, with Teredo, which carries any IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]
# Their last 32 bits are an IPv4 address that the system or a translator connects to instead
_MAPPED_V4 = [ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")]
# ISATAP: an interface identifier, behind any prefix, that carries an IPv4 address
_ISATAP = (0x00005EFE, 0x02005EFE)


class Page(NamedTuple):
    """What a server sent for a page.

    Args:
        content_type (`str`): Media type, lower case and without parameters; empty if the server named none.
        charset (`str`, *optional*): Charset that the server named.
        body (`bytes`): The page, decompressed.
        cut (`bool`): Whether the page is longer than `body`.
    """

    content_type: str
    charset: str | None
    body: bytes
    cut: bool


def fetch(
    url: str,
    timeout: float = 20.0,
    max_bytes: int = 2_000_000,
    allow_private: bool = False,
    ssl_context: ssl.SSLContext | None = None,
) -> Page:
    """Download a page.

    Args:
        url (`str`): Its address.
        timeout (`float`): Seconds that it may take, redirects (up to five) included.
        max_bytes (`int`): Bytes that are read, counted after decompression; the rest is left out.
        allow_private (`bool`): Whether this machine and private networks may be reached.
        ssl_context ([`ssl.SSLContext`], *optional*): Certificates to trust; defaults to those of the system.

    Returns:
        `Page`: What the server sent.

    Raises:
        ValueError: If the address is not one of the web.
        PermissionError: If it leads to a private network.
        TransientToolError: If the server failed in a way that may pass.
        RuntimeError: If it has no such page, or none that is text.
    """
    deadline = time.monotonic() + timeout
    tls = ssl_context or ssl.create_default_context()
    for _ in range(_MOST_REDIRECTS + 1):
        answer = _request(url, deadline, max_bytes, allow_private, tls)
        if isinstance(answer, Page):
            return answer
        url = urljoin(url, answer)
    raise RuntimeError(f"The page redirects more than {_MOST_REDIRECTS} times.")


def _request(url: str, deadline: float, max_bytes: int, allow_private: bool, tls: ssl.SSLContext) -> Page | str:
    """One request; the page, or where it redirects to."""
    scheme, host, port, target, host_header = split_url(url)
    addresses = resolve(host, port, allow_private)
    headers = {
        "Host": host_header,
        "User-Agent": _USER_AGENT,
        "Accept": "text/html, text/plain;q=0.9, */*;q=0.1",
        "Accept-Encoding": "gzip",
        "Connection": "close",
    }
    connection = http.client.HTTPConnection(host, port)
    connection.auto_open = 0  # it must never connect by name
    try:
        with _connected(addresses, deadline, tls if scheme == "https" else None, host) as connection.sock:
            connection.request("GET", target, headers=headers)
            with connection.getresponse() as response:
                answer = _read(url, response, max_bytes)
        if _is_over(deadline):
            raise TimeoutError  # where the length is unknown, a connection that was cut off looks like a whole page
        return answer
    except (OSError, http.client.HTTPException, zlib.error) as error:
        if _is_over(deadline):
            raise TransientToolError(f"{host} did not send the page in time.") from error
        status, what = None, f"failed: {str(error) or type(error).__name__}"
        if isinstance(error, urllib.error.HTTPError):
            status, what = error.code, f"answered {error.code} {error.reason}"
        if _may_pass(error):
            raise TransientToolError(f"{host} {what}.", status, retry_after(error) or None) from error
        raise RuntimeError(f"{host} {what}.") from error


def _read(url: str, response: http.client.HTTPResponse, max_bytes: int) -> Page | str:
    """The page, or where it redirects to."""
    if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
        # http.client reads headers as Latin-1; many servers write UTF-8
        return response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace")
    if not 200 <= response.status < 300:
        raise urllib.error.HTTPError(url, response.status, response.reason, response.headers, None)
    content_type = response.headers.get_content_type() if response.headers["Content-Type"] else ""
    if content_type == "application/pdf":
        raise RuntimeError("The page is a PDF; only HTML and plain text can be read.")
    if content_type and content_type not in HTML + _PLAIN and not content_type.startswith("text/"):
        raise RuntimeError(f"The page is of type {content_type}; only HTML and plain text can be read.")
    encoding = (response.headers["Content-Encoding"] or "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise RuntimeError(f"The page is compressed as {encoding}, which was not asked for.")
    body, cut = read_body(response, max_bytes, compressed=encoding != "identity")
    return Page(content_type, response.headers.get_content_charset(), body, cut)


def split_url(url: str) -> tuple[str, str, int, str, str]:
    """Take an address apart.

    Args:
        url (`str`): The address.

    Returns:
        `tuple[str, str, int, str, str]`: Scheme, host to resolve (ASCII), port, request target, `Host` header.

    Raises:
        ValueError: If it is not an address of the web.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be one string, not {type(url).__name__}.")
    url = url.strip().replace(" ", "%20")
    if re.search(r"[\x00-\x1f\x7f\\]", url):
        raise ValueError(f"url must hold no control characters or backslashes: {url!r}.")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"url is malformed: {url!r} ({error}).") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"url must start with http:// or https://, not {url!r}.")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"url must not hold a user name: {url!r}.")
    if not host or host.startswith("."):
        raise ValueError(f"url names no host: {url!r}.")
    default = 443 if parts.scheme == "https" else 80
    bracketed = f"[{host}]" if ":" in host else host
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
        f"?{quote(parts.query, safe='/?%:@!$&()*+,;=~[]')}" if parts.query else ""
    )
    header = bracketed if port in (None, default) else f"{bracketed}:{port}"
    return parts.scheme, host, default if port is None else port, target, header


def resolve(host: str, port: int, allow_private: bool = False) -> list[tuple]:
    """Resolve a host and check every address that it has.

    Args:
        host (`str`): Name or address, in any spelling that the system understands.
        port (`int`): Port.
        allow_private (`bool`): Whether to skip the check.

    Returns:
        `list[tuple]`: What `socket.getaddrinfo` returned: connect to nothing else.

    Raises:
        PermissionError: If one of the addresses is not public.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is too long or empty
        raise ValueError(f"{host!r} is no host name: {error}.") from None
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise TransientToolError(f"{host} could not be looked up: {error.strerror}.") from error
        raise RuntimeError(f"There is no host {host}: {error.strerror}.") from error
    if not allow_private and not all(is_public(str(address[4][0])) for address in addresses):
        raise PermissionError(f"{host} is in a private network or is this machine, which may not be browsed.")
    return addresses


@contextlib.contextmanager
def _connected(
    addresses: list[tuple], deadline: float, tls: ssl.SSLContext | None, host: str
) -> Iterator[socket.socket]:
    """A connection to the first address that answers, cut off at the deadline whatever it is doing."""
    sock = _open(addresses, deadline)
    try:
        if tls is not None:
            # the name is checked against the certificate; the address was checked before
            sock = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        # a socket's own time-out starts anew with every byte, and http.client reads on until a line is complete
        cut_off = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [sock])
        cut_off.daemon = True
        cut_off.start()
        try:
            sock.settimeout(None)
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            yield sock
        finally:
            cut_off.cancel()
    finally:
        sock.close()


def _open(addresses: list[tuple], deadline: float) -> socket.socket:
    failure: OSError = OSError("the host has no address")
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            # an address that swallows packets must leave time for the next
            sock.settimeout(max(0.01, (deadline - time.monotonic()) / (len(addresses) - i)))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _shut_down(sock: socket.socket) -> None:
    # of the plain socket, also under TLS: the thread that reads is inside the TLS layer
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _is_over(deadline: float) -> bool:
    return time.monotonic() > deadline - 0.01


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return is_transient(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, OSError | http.client.IncompleteRead)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and to another machine than this.

    Args:
        address (`str`): IPv4 or IPv6 address.

    Returns:
        `bool`: `False` for loopback, private, shared, link-local, multicast, reserved and metadata addresses, also
        where an IPv6 address carries such an IPv4 address, and for the addresses of this machine's own interfaces.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    return not is_special(ip) and not is_own(ip)


def is_special(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is set aside for something else than the public internet."""
    if isinstance(ip, ipaddress.IPv4Address):
        return any(ip in network for network in _NOT_PUBLIC_V4)
    carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in network for network in _MAPPED_V4):
        return is_special(carried) or is_own(carried)
    if ip not in _GIVEN_OUT_V6 or any(ip in network for network in _NOT_PUBLIC_V6):
        return True
    return int(ip) >> 32 & 0xFFFFFFFF in _ISATAP and (is_special(carried) or is_own(carried))


def is_own(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of this machine's: the system would talk to it from that address itself."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    # No packet is sent: connecting a datagram socket only chooses a route
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(ip), 9))
        return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == ip
    return False


def read_body(response: http.client.HTTPResponse, max_bytes: int, compressed: bool) -> tuple[bytes, bool]:
    """Read the body of an answer up to a size.

    Args:
        response (`http.client.HTTPResponse`): The answer.
        max_bytes (`int`): Most bytes to read, and to unpack.
        compressed (`bool`): Whether the body is gzip.

    Returns:
        `tuple[bytes, bool]`: The body, and whether there was more of it.
    """
    promised = response.length  # `None` if the answer is chunked or lasts until the connection closes
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if compressed else None
    body, received = bytearray(), 0
    while len(body) <= max_bytes and received <= max_bytes:
        piece = response.read(1 << 14)
        received += len(piece)
        if not piece:
            # http.client raises this for `read()` alone, and takes headers that break off for complete ones
            broken = not received if promised is None and not response.chunked else received < (promised or 0)
            if broken or unpack and not unpack.eof:
                raise http.client.IncompleteRead(bytes(body))
            break
        # one byte more than wanted, to see whether there is more; a bomb is never unpacked further
        body += unpack.decompress(piece, max_bytes + 1 - len(body)) if unpack else piece
        if unpack and unpack.eof:
            break
    return bytes(body[:max_bytes]), len(body) > max_bytes or received > max_bytes
