"""webchannels: browser-server messaging over WebSockets, in one file with no dependency.

    from webchannels import *

    @route("/")
    def index():
        return channels_support() + "<h1>Live</h1>"

    @channel("/____/echo")
    def echo():
        return f"Received: {params('payload')}"

    up()                              # http://127.0.0.1:8000

`route()` maps HTTP paths to handlers, and `channel()` maps WebSocket messages to handlers in the
same way: `/____/echo` is the message `echo` on the channel `____`. `channels_support()` puts the
browser client into the page, `broadcast()` pushes to every subscriber of a channel, and
`connected_clients()` lists who is there. Handlers are `def` or `async def`; they take nothing and
ask `params()`, or take what they need by name: `def echo(payload, client)`.

The rooms of this file, in the order in which data flows: config, router, http, websocket,
messages, clients, bus, app, default app, channels.js, demo.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import codecs
import collections
import concurrent.futures
import contextlib
import contextvars
import email.utils
import errno
import functools
import hashlib
import html
import http.client
import inspect
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import signal
import socket
import ssl as ssl_module
import sys
import threading
import time
import urllib.parse
import weakref
import webbrowser
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence, TypeVar, Union

__version__ = "1.0.0"
__all__ = [
    "Bus", "ChannelClient", "ChannelError", "Config", "HTTPError", "Request", "Response",
    "WebChannels", "broadcast", "channel", "channels_script", "channels_support", "config",
    "connected_clients", "disconnected_clients", "down", "on_connect", "on_disconnect", "params",
    "route", "serve",
    "subscribe", "subscriptions", "unsubscribe", "unsubscribe_client",
    "unsubscribe_disconnected_clients", "up",
]
logger = logging.getLogger("webchannels")
H = TypeVar("H", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------- config


@dataclass
class Config:
    """Settings for `up()`: sizes in bytes, times in seconds. Example: Config(server_port=8080)"""

    server_host: str = "127.0.0.1"  # what up() listens on when it is not told
    server_port: int = 8000  # the same; 0 picks a free port
    websockets_server: bool = True  # False: every WebSocket handshake is answered 404
    websockets_path: str = "/"  # where the WebSocket lives; a page may have the same path
    base_path: str = ""  # the prefix that a reverse proxy strips, "/live", or a whole URL
    default_channel: str = "____"  # the channel of channels_support()
    # Whose pages may connect and post. None: same origin only; ["https://example.com"]; "*": any.
    allowed_origins: str | Sequence[str] | None = None
    # The Host names that are answered. None: on a loopback address only loopback names (this
    # stops DNS rebinding), elsewhere any; or a list, such as ["example.com"].
    allowed_hosts: Sequence[str] | None = None
    max_header_size: int = 16 * 1024  # of a request's head; past it 431, or 414
    max_body_size: int = 1024 * 1024  # of a request; past it 413
    max_message_size: int = 1024 * 1024  # of a WebSocket message, inflated; past it close 1009
    max_clients: int = 10_000  # WebSockets, and as many HTTP connections; past it 503
    max_subscriptions: int = 1000  # channels for each client
    max_threads: int = 32  # for threaded=True handlers; when all are busy, the next one waits
    max_send_buffer: int = 1024 * 1024  # a client this far behind is closed (1013)
    handshake_timeout: float = 10  # for a request, a frame or a closing handshake to arrive
    keep_alive_timeout: float = 75  # for an HTTP connection to be idle
    ping_interval: float = 20  # a client silent for so long is sent a ping; 0: never
    ping_timeout: float = 20  # and dropped when it is silent for so long after it
    shutdown_timeout: float = 5  # for handlers to finish and clients to close
    disconnected_ttl: float = 60  # for which disconnected_clients() lists a client that left
    compression: bool = True  # permessage-deflate (RFC 7692), without context takeover
    compression_threshold: int = 1024  # shorter messages are sent as they are
    json_default: Callable[[Any], Any] | None = None  # as in json.dumps(default=…)
    # redis://[[user]:password@]host[:port][/name], or rediss:// for TLS: broadcasts reach all
    # processes with this Redis (6 or later) and this name or number; see RedisBus.
    redis_url: str | None = field(default=None, repr=False)
    bus: Bus | None = None  # what carries broadcasts in place of Redis


# ------------------------------------------------------------------------------------- router

# What `:name::int` and the others match, most specific first: the order in which they are tried.
# ASCII digits only: int() and float() would also take "1_0", " 1" and other scripts' digits.
_SEGMENTS: dict[type, re.Pattern[str]] = {
    int: re.compile(r"-?[0-9]{1,300}"),
    float: re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?"),
    str: re.compile(r".+", re.DOTALL),
}


def _parse_segment(segment: str) -> tuple[str, type]:
    name, _, kind = segment[1:].partition("::")
    for known in _SEGMENTS:
        if name.isidentifier() and known.__name__ == (kind or "str"):
            return name, known
    raise ValueError(f"{segment!r} is not :name, :name::int, :name::float or :name::str")


# From Python 3.14 on, inspect evaluates annotations, which may name what does not exist yet.
_UNEVALUATED: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    import annotationlib
    _UNEVALUATED["annotation_format"] = annotationlib.Format.FORWARDREF


class Endpoint:
    """A handler, the names that it takes, and whether it runs in a thread."""

    def __init__(self, handler: Callable[..., Any], path: str = "/", threaded: bool = False,
                 supplied: Iterable[str] | None = None) -> None:
        """`supplied` are the names that a call will have; None: not known. Raises as `route()`."""
        self.handler, self.threaded = handler, threaded
        self.name: str = getattr(handler, "__qualname__", repr(handler))
        self.path_names = [_parse_segment(part)[0] for part in path.split("/") if part[:1] == ":"]
        if not path.startswith("/") or len(set(self.path_names)) < len(self.path_names):
            raise ValueError(f"a path starts with a slash and has no name twice, not {path!r}")
        called = (handler, type(handler).__call__)  # an object may be the handler
        if threaded and any(map(inspect.iscoroutinefunction, called)):
            raise TypeError(f"{self.name} is async: it cannot be threaded=True as well")
        parameters = inspect.signature(handler, **_UNEVALUATED).parameters.values()
        self.takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        named = [each for each in parameters if not each.kind.name.startswith("VAR_")]
        self.takes = [each.name for each in named]
        self.required = [each.name for each in named if each.default is each.empty]
        known = {*self.path_names, *(self.required if supplied is None else supplied)}
        for each in named:
            if each.kind is each.POSITIONAL_ONLY or each.name in {*self.required} - known:
                raise TypeError(f"{self.name} asks for {each.name!r} ({each.kind.description}), "
                                f"but it can ask for {', '.join(sorted(known))}, by name")

    def __call__(self, given: dict[str, Any]) -> Any:
        """Call the handler with what it takes of `given`."""
        if not self.takes_any:
            given = {name: given[name] for name in self.takes if name in given}
        try:
            return self.handler(**given)
        except StopIteration as error:  # before Python 3.12 no future can hold it
            raise RuntimeError(f"{self.name} raised StopIteration") from error


Found = tuple[dict[str, Endpoint], tuple[Any, ...]]


class Router:
    """Maps paths such as `/a/:name` and `/a/:n::int` to endpoints, for routes and for channels.

    Static paths are one dict look-up, others are found in a tree by segments. Static segments win
    over typed ones, int over float over str. Each method under a path may have its own endpoint.
    """

    def __init__(self) -> None:
        self._static: dict[str, Found] = {}
        self._tree: dict[Any, Any] = {}  # by segment or type; the endpoints are under None

    def add(self, path: str, endpoint: Endpoint, method: str = "") -> None:
        """Register `endpoint` in place of any that is there."""
        node = self._tree
        for part in path.split("/")[1:]:
            node = node.setdefault(_parse_segment(part)[1] if part[:1] == ":" else part, {})
        endpoints = node[None] = {**node.get(None, {}), method: endpoint}  # seen as a whole
        if not endpoint.path_names:
            self._static[path] = (endpoints, ())

    def find(self, path: str, decode: bool = False) -> Found | None:
        """The endpoints at `path`, by method, and the values of its typed segments.

        `decode`: the path is percent-encoded. Raises UnicodeDecodeError if that is not UTF-8.
        """
        if path in self._static:
            return self._static[path]
        segments = path.split("/")[1:]
        if decode and "%" in path:  # by segments: %2F must not become a separator
            segments = [urllib.parse.unquote(segment, errors="strict") for segment in segments]
        return self._walk(self._tree, segments, 0, ())

    def _walk(self, node: Any, segments: list[str], at: int, values: Any) -> Found | None:
        if at == len(segments):
            return (node[None], values) if None in node else None
        segment = segments[at]
        found = self._walk(node[segment], segments, at + 1, values) if segment in node else None
        for kind, pattern in _SEGMENTS.items():
            if found is None and kind in node and pattern.fullmatch(segment):
                found = self._walk(node[kind], segments, at + 1, (*values, kind(segment)))
        return found


# --------------------------------------------------------------------------------------- http

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_TEXT = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")  # a field's value
# Field lines (RFC 9112, 5); neither folded ones nor white space before the colon match.
_FIELDS = re.compile(rf"(?:\r\n{_TOKEN.pattern}:{_TEXT.pattern})*")
_HEAD = re.compile(rf"({_TOKEN.pattern}) ([!-\"$-~]+) HTTP/([0-9])\.([0-9])({_FIELDS.pattern})")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]{1,18}")  # no sign, no space, not two of them
_CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:[ \t]*;{_TEXT.pattern})?")
_BAD_LINE_END = re.compile(rb"\r(?=[^\n])|(?<!\r)\n")
_parse_form = functools.partial(urllib.parse.parse_qsl, keep_blank_values=True, errors="strict",
                                max_num_fields=1000)
_date = functools.lru_cache(maxsize=2)(functools.partial(email.utils.formatdate, usegmt=True))


class HTTPError(Exception):
    """An answer for a handler to raise; `text` has a default. Example: raise HTTPError(401)"""

    def __init__(self, status: int, text: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.text = http.client.responses.get(status, "").capitalize() if text is None else text
        self.response = Response(self.text, status, headers, "text/plain; charset=utf-8")
        super().__init__(f"{status} {self.text}")


class Request:
    """An HTTP request: `.method .target .path .query .headers .body .address .cookies`.

    `path` and `query` are percent-encoded, as they came; `headers` has lower-case names, repeated
    fields are joined (RFC 9110, 5.3); `body` is bytes; `address` is the peer's IP address.
    Example: def index(request: Request): return request.address
    """

    __slots__ = ("address", "body", "headers", "http_1_0", "method", "path", "query", "target")

    def __init__(self, head: str) -> None:
        """`head` is the request line and the header fields. Raises HTTPError."""
        match = _HEAD.fullmatch(head)
        if not match:
            raise HTTPError(400, "Bad request line or header field")
        self.method, self.target, major, minor, fields = match.groups()
        if major != "1":
            raise HTTPError(505)
        self.body, self.address, self.http_1_0 = b"", "", minor == "0"
        self.headers: dict[str, str] = {}
        for line in fields.split("\r\n")[1:]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
        hosts = [self.headers.get("host", "none" if self.http_1_0 else "")]
        if self.target.startswith(("http://", "https://")):  # RFC 9112, 3.2.2: its host counts
            self.headers["host"], slash, rest = self.target.partition("://")[2].partition("/")
            hosts.append(self.headers["host"])
            self.target = slash + rest or "/"
        elif self.target[0] != "/" and (self.method, self.target) != ("OPTIONS", "*"):
            raise HTTPError(501 if self.method == "CONNECT" else 400, "Bad request target")
        # RFC 9112, 3.2: exactly one valid Host (two are joined by a comma); HTTP/1.0 may have none.
        if not all(map(_HOST.fullmatch, hosts)):
            raise HTTPError(400, "One valid Host is needed")
        self.path, _, self.query = str(self.target).partition("?")

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target} from {self.address}>"

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies by name, without quotes around them. Example: request.cookies.get("user")"""
        pairs = [each.partition("=") for each in self.headers.get("cookie", "").split(";")]
        return {name.strip(): value.strip(' "') for name, _, value in pairs if name.strip()}

    def members(self, name: str) -> list[str]:
        """A list-based field's members (RFC 9110, 5.6.1). Example: request.members("accept")"""
        return [each.strip(" \t") for each in self.headers.get(name, "").lower().split(",")]

    def params(self) -> dict[str, Any]:
        """What query, form and JSON body say; `payload` is the JSON body as a whole.

        Raises HTTPError 400 for what cannot be read. Example: request.params()
        """
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            found: dict[str, Any] = dict(_parse_form(self.query) if self.query else ())
            if kind == "application/x-www-form-urlencoded":
                found.update(_parse_form(self.body.decode()))
            elif self.body and (kind == "application/json" or kind.endswith("+json")):
                payload = _decoder.decode(self.body.decode())
                found.update(payload if isinstance(payload, dict) else {}, payload=payload)
        except (ValueError, RecursionError):
            raise HTTPError(400, "The parameters cannot be read") from None
        return found


class Response:
    """An HTTP answer. `body` is str (HTML), bytes, or anything that JSON knows.

    `headers` is a mapping, or pairs where a field comes more than once. Raises ValueError for a
    header that would break out of its line or that the server sets, TypeError for a bad body.
    Example: Response("a,b", headers={"X-A": "b"}, content_type="text/csv")
    """

    def __init__(self, body: Any = "", status: int = 200,
                 headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
                 content_type: str | None = None, *,
                 json_default: Callable[[Any], Any] | None = None) -> None:
        if isinstance(body, str):
            self.body, kind = body.encode(), "text/html; charset=utf-8"
        elif isinstance(body, (bytes, bytearray, memoryview)):
            self.body, kind = bytes(body), "application/octet-stream"
        else:
            self.body, kind = dump_json(body, json_default).encode(), "application/json"
        given: Any = headers or ()
        pairs = list(given.items() if hasattr(given, "items") else given)
        if self.body and "content-type" not in [name.lower() for name, _ in pairs]:
            pairs.append(("Content-Type", content_type or kind))
        for name, value in pairs:
            if (not _TOKEN.fullmatch(name) or not _TEXT.fullmatch(value) or name.lower() in
                    ("connection", "content-length", "date", "transfer-encoding")):
                raise ValueError(f"not a header, or one that the server sets: {name!r}: {value!r}")
        if not 200 <= status <= 599:
            raise ValueError(f"the status of an answer is 200 to 599, not {status}")
        self.status, self.headers = status, tuple(pairs)  # nothing is added behind the check

    def encode(self, head_only: bool = False, close: bool = False) -> bytes:
        """The answer as bytes; `close`: the connection ends with it. Example: response.encode()"""
        has_body = self.status not in (204, 304)  # RFC 9110, 6.4.1
        head = "".join([
            f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, '')}\r\n"
            f"Date: {_date(int(time.time()))}\r\nX-Content-Type-Options: nosniff\r\n",
            *[f"{name}: {value}\r\n" for name, value in self.headers],
            f"Content-Length: {len(self.body)}\r\n" if has_body else "",
            "Connection: close\r\n\r\n" if close else "\r\n"]).encode("latin-1", "replace")
        return head + self.body if has_body and not head_only else head


def read_requests(buffer: bytearray, settings: Config) -> Iterator[Request | bytes | None]:
    """Read HTTP/1.1 requests (RFC 9112) from `buffer`, to which bytes are added between the steps.

    Yields None while no request has begun, what to send (mostly nothing) while one is incomplete,
    then the Request. Raises HTTPError; then nothing more may be read. It does no I/O.
    What two readers might understand differently is refused, never repaired.
    """
    def take(size: int) -> Any:
        while len(buffer) < size:
            yield b""
        part = bytes(buffer[:size])
        del buffer[:size]
        return part

    def until(end: bytes, limit: int, status: int) -> Any:
        """Take the text before `end`. Raises 431 past the limit, or `status` if it is one line."""
        seen = 0
        while (at := buffer.find(end, seen, limit)) < 0:
            if _BAD_LINE_END.search(buffer, seen, limit):
                raise HTTPError(400, "Bad line ending")
            if len(buffer) >= limit:
                raise HTTPError(431 if b"\n" in buffer[:limit] else status)
            seen = max(len(buffer) - 3, 0)  # `end` may have begun there
            yield b""
        return (yield from take(at)).decode("latin-1")

    def chunks() -> Any:
        """Take a chunked body (RFC 9112, 7.1)."""
        body = bytearray()
        size = -1
        while size:
            match = _CHUNK_SIZE.fullmatch((yield from until(b"\r\n", 256, 400)))
            if not match:
                raise HTTPError(400, "Bad chunk size")
            size = int(match[1], 16)
            if len(body) + size > settings.max_body_size:
                raise HTTPError(413)
            if size:
                chunk = yield from take(2 + size + 2)  # with the line ends around it
                if not chunk.endswith(b"\r\n"):
                    raise HTTPError(400, "Bad chunk")
                body += chunk[2:-2]
        if not _FIELDS.fullmatch((yield from until(b"\r\n\r\n", settings.max_header_size, 431))):
            raise HTTPError(400, "Bad trailer")
        del buffer[:4]
        return bytes(body)

    while True:
        while bytes(buffer[:2]) in (b"", b"\r", b"\r\n"):  # RFC 9112, 2.2: empty lines
            if len(buffer) < 2:
                yield None
            else:
                del buffer[:2]
        request = Request((yield from until(b"\r\n\r\n", settings.max_header_size, 414)))
        del buffer[:4]
        length = request.headers.get("content-length", "0")
        chunked = "transfer-encoding" in request.headers
        if not _LENGTH.fullmatch(length):
            raise HTTPError(400, "Bad Content-Length")
        if chunked:  # RFC 9112, 6.3
            codings = request.members("transfer-encoding")
            if "content-length" in request.headers or request.http_1_0 or "chunked" in codings[:-1]:
                raise HTTPError(400, "Bad Transfer-Encoding")
            if codings != ["chunked"]:
                raise HTTPError(501, "Only chunked is implemented")
        size = int(length)
        if size > settings.max_body_size:
            raise HTTPError(413)
        if size or chunked:
            expect = request.headers.get("expect", "").lower()
            if expect == "100-continue" and not (request.http_1_0 or buffer):
                yield b"HTTP/1.1 100 Continue\r\n\r\n"
            request.body = yield from chunks() if chunked else take(size)
        yield request


# ---------------------------------------------------------------------------------- websocket

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes: RFC 6455, 5.2
FAIL = -1  # the event of a broken rule; no opcode
# The close codes that may be on the wire (RFC 6455, 7.4, and the IANA registry).
CLOSE_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
SUBPROTOCOL = "webchannels.v1"
_KEY_SUFFIX = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
# A parameter of permessage-deflate, and its value without quotes (RFC 7692, 7.1).
_PARAMETER = re.compile(r"\s*((?:server|client)_(?:no_context_takeover|max_window_bits))"
                        r"(?:(?<=bits)\s*=\s*(\"?)([89]|1[0-5])\2)?\s*")
# What RFC 7692, 7.2.2 puts behind a message, and an empty final block: if that is not understood
# as such, the message ended in the middle of a block.
_DEFLATE_TAIL = b"\0\0\xff\xff" b"\1\0\0\xff\xff"
_BLOCK = 4096  # XOR of large integers is quickest in pieces that stay in the nearest cache
_from_bytes = int.from_bytes  # looking it up takes nearly as long as calling it

# (TEXT, str), (BINARY, PING or PONG, bytes), or (CLOSE or FAIL, (code, reason)).
Event = tuple[int, Any]  # a plain tuple, since there is one for each message
# Whether the client speaks webchannels.v1, and the window bits of what it is sent (0: plain).
Dialect = tuple[bool, int]


class ProtocolError(Exception):
    """The peer broke a rule of RFC 6455 or 7692; `args` are the close code and the reason."""


def accept_handshake(request: Request, compression: bool) -> tuple[bytes, Dialect]:
    """The head of a 101 and what it agrees on (RFC 6455, 4.2), or HTTPError 400, 405 or 426."""
    headers = request.headers
    if request.method != "GET":
        raise HTTPError(405, headers={"Allow": "GET"})
    if request.http_1_0 or request.body or "upgrade" not in request.members("connection"):
        raise HTTPError(400, "A WebSocket needs HTTP/1.1, Connection: Upgrade and no body")
    if headers.get("sec-websocket-version") != "13":
        raise HTTPError(426, headers={"Sec-WebSocket-Version": "13", "Upgrade": "websocket"})
    key = headers.get("sec-websocket-key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", key):
        raise HTTPError(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    accept = base64.b64encode(hashlib.sha1((key + _KEY_SUFFIX).encode()).digest()).decode()
    offered = headers.get("sec-websocket-protocol", "").split(",")
    v1 = SUBPROTOCOL in map(str.strip, offered)  # compared as it stands: case matters
    offers = headers.get("sec-websocket-extensions", "") if compression else ""
    agreed, bits = negotiate_deflate(offers)
    fields = {"Accept": accept, "Protocol": SUBPROTOCOL if v1 else "", "Extensions": agreed}
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
             *(f"Sec-WebSocket-{k}: {v}" for k, v in fields.items() if v), "", ""]
    return "\r\n".join(lines).encode(), (v1, bits)


def negotiate_deflate(header: str) -> tuple[str, int]:
    """The answer to the first offer that can be met, and the server's window bits; or ("", 0).

    Neither side takes over context (RFC 7692, 7.1.1): an idle client then costs no zlib state,
    and a broadcast is deflated once for all. An offer with a parameter that is unknown, repeated
    or out of range is declined (7.1), and so is a server window of 8 bits: zlib has none.
    """
    for offer in header.split(","):
        name, *parts = offer.split(";")
        found = {match[1]: match[3] for match in map(_PARAMETER.fullmatch, parts) if match}
        bits = found.get("server_max_window_bits", "15")
        if (name.strip().lower() == "permessage-deflate" and len(found) == len(parts)
                and bits not in (None, "8")):
            agreed = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
            return agreed + "".join(f"; {k}={v}" for k, v in found.items() if v), int(bits)
    return "", 0


def unmask(data: bytes, mask: bytes) -> bytes:
    """Undo (or do) the masking of RFC 6455, 5.3."""
    size = len(data)
    if size <= _BLOCK:
        key = _from_bytes((mask * (size // 4 + 1))[:size], "little")
        return (_from_bytes(data, "little") ^ key).to_bytes(size, "little")
    key = _from_bytes(mask * (_BLOCK // 4), "little")
    end = size - size % _BLOCK
    blocks = [(_from_bytes(data[at:at + _BLOCK], "little") ^ key).to_bytes(_BLOCK, "little")
              for at in range(0, end, _BLOCK)]
    return b"".join([*blocks, unmask(data[end:], mask)])


class FrameReader:
    """Reads a client's frames (RFC 6455, 5): bytes in, events out, no I/O, no clock.

    Text is checked and messages are inflated as their bytes arrive, so that what is bad or too
    long is refused at its first byte. After a Close frame or a failure everything is ignored.
    """

    __slots__ = ("_final", "_head", "_inflate", "_left", "_mask", "_max", "_message", "frames",
                 "more", "unfinished")

    def __init__(self, max_message_size: int, inflate: bool = False) -> None:
        """`inflate`: was permessage-deflate agreed on?"""
        self._max, self._inflate = max_message_size, inflate
        self.frames = 0  # how many were begun
        self.unfinished = 0  # the size of the frame that has not fully arrived; 0: there is none
        self.more = False  # is there more to come of what has arrived, by receive(b"")?
        # What waits: part of a header, part of a control frame, or `more`. None: it is over.
        self._head: bytes | None = b""
        self._left = 0  # how much is to come of a data frame's payload
        self._message: _Message | None = None  # the one that has not fully arrived

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer, and return what they complete."""
        events: list[Event] = []
        if self._head is None:
            return events
        data = self._head + data
        at, end = 0, len(data)
        self.more = False
        most = self.frames + 1000  # of tiny frames a chunk holds tens of thousands
        try:
            if self._message and self._left:
                at = self._payload(self._message, data, 0, events)
            while end - at >= 2 and self.frames < most and not self.more:
                size = data[at + 1] - 128
                start = at + 6
                # The common frame: a short text message, masked and in one piece.
                if (data[at] == 0x81 and 0 <= size <= 125 and size <= self._max
                        and start + size <= end and not self._message):
                    self.frames += 1
                    at = start + size
                    events.append((TEXT, unmask(data[start:at], data[start - 4:start]).decode()))
                else:
                    stop = self._frame(data, at, events)
                    if stop == at:
                        break
                    at = stop
        except ProtocolError as error:
            events.append((FAIL, error.args))
        except (UnicodeDecodeError, zlib.error) as error:
            events.append((FAIL, (1007, str(error))))
        self.more = at < end and (self.more or self.frames == most)
        self._head = data[at:]
        if not self._left:
            self.unfinished = len(self._head)
        if events and events[-1][0] in (FAIL, CLOSE):
            self._head, self._message, self.unfinished, self.more = None, None, 0, False
        return events

    def _frame(self, data: bytes, at: int, events: list[Event]) -> int:
        """Take what there is of a frame (RFC 6455, 5; RFC 7692, 6); return where it stops."""
        first, length, message = data[at], data[at + 1] & 127, self._message
        opcode, final, compressed = first & 15, first >= 128, first & 0x70 == 0x40
        if data[at + 1] < 128:
            raise ProtocolError(1002, "frame not masked")
        if first & 0x70 and not (compressed and self._inflate and opcode in (TEXT, BINARY)):
            raise ProtocolError(1002, "reserved bit set")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError(1002, "reserved opcode")
        if opcode >= CLOSE and (not final or length > 125):
            raise ProtocolError(1002, "control frame fragmented or too long")
        if opcode < CLOSE and bool(opcode) == bool(message):
            raise ProtocolError(1002, "message inside another" if opcode else "nothing to continue")
        start = at + 6
        if length > 125:
            least, size = (126, 2) if length == 126 else (65536, 8)
            start += size
            length = int.from_bytes(data[at + 2:at + 2 + size], "big")
            if start - 4 <= len(data) and (length < least or length >> 63):
                raise ProtocolError(1002, "length not minimal, or too large")  # 5.2
        stop = start + length
        if (start if opcode < CLOSE else stop) > len(data):
            return at  # too little; it is looked at again when there is more
        self.frames += 1
        self._mask = data[start - 4:start]
        if opcode < CLOSE and not (message.inflater if message else compressed):
            if length + (message.size if message else 0) > self._max:
                raise ProtocolError(1009, "message too long")
        if opcode and final and not compressed and stop <= len(data):  # all in one piece
            payload = unmask(data[start:stop], self._mask)
            if opcode == CLOSE:
                code = int.from_bytes(payload[:2], "big") if payload else 1005  # none: 7.1.5
                if payload and code not in CLOSE_CODES:
                    raise ProtocolError(1002, "bad close code")
                events.append((CLOSE, (code, payload[2:].decode())))
                return len(data)
            events.append((opcode, payload.decode() if opcode == TEXT else payload))
            return stop
        self._message = message or _Message(opcode, compressed, self._max)
        self._final = final
        self._left = self.unfinished = length
        return self._payload(self._message, data, start, events)

    def _payload(self, message: _Message, data: bytes, start: int, events: list[Event]) -> int:
        """Take what has arrived of a data frame's payload; return where it stops."""
        part = data[start:start + self._left]
        self._left -= len(part)
        last = self._final and not self._left
        whole = message.add(unmask(part, self._mask), last)
        self._mask = (self._mask * 2)[len(part) & 3:][:4]  # where the next part begins in it
        if last:
            events.append((message.opcode, whole))
            self._message = None
            self.more = bool(message.inflater)  # a chunk can hold hundreds of bombs: one at a time
        return start + len(part)


class _Message:
    """A text or binary message of which not everything has arrived."""

    def __init__(self, opcode: int, compressed: bool, max_size: int) -> None:
        self.opcode, self.max_size = opcode, max_size
        self.size = self.final_blocks = 0
        self.parts: list[Any] = []  # of str, if it is text, or of bytes
        self.join: Any = ("" if opcode == TEXT else b"").join
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.inflater: Any = zlib.decompressobj(-15) if compressed else None

    def add(self, data: bytes, last: bool) -> Any:
        """Inflate, within the greatest size, and check; return the message after its last part."""
        if last and self.inflater:
            data += _DEFLATE_TAIL
        while data:
            part, data = data, b""
            if self.inflater:
                if self.inflater.eof:  # a final block that is not the last: RFC 7692, 7.2.3.4
                    self.inflater = zlib.decompressobj(-15)
                    self.final_blocks += 1
                    if self.final_blocks > 16:  # a flood of them would take long
                        raise ProtocolError(1007, "too many final blocks")
                part = self.inflater.decompress(part, self.max_size - self.size + 1)
                data = self.inflater.unused_data
            self.size += len(part)
            if self.size > self.max_size:
                raise ProtocolError(1009, "message too long")
            self.parts.append(self.decoder.decode(part) if self.opcode == TEXT else part)
            # Python's decoder refuses whatever else is bad at its first bad byte, but surrogates
            # (ED A0 to ED BF) only at their third.
            if b"\xed\xa0" <= self.decoder.getstate()[0] < b"\xee":
                raise ProtocolError(1007, "text is not UTF-8")
        if len(self.parts) > 1000:  # of tiny fragments each costs 60 bytes
            self.parts = [self.join(self.parts)]
        if not last:
            return None
        if self.inflater and not self.inflater.eof:
            raise ProtocolError(1007, "deflate data cut short")
        self.decoder.decode(b"", True)
        return self.join(self.parts)


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """One unfragmented frame, unmasked as a server's are (RFC 6455, 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def encode_message(opcode: int, body: bytes, bits: int, threshold: int) -> bytes:
    """The frame of a message; deflated by itself (RFC 7692, 7.2.1) where that is of use."""
    if bits and len(body) >= threshold:
        deflater = zlib.compressobj(wbits=-bits)
        packed = deflater.compress(body) + deflater.flush(zlib.Z_SYNC_FLUSH)
        if len(packed) - 4 < len(body):
            return encode_frame(0x40 | opcode, packed[:-4])  # RSV1
    return encode_frame(opcode, body)


# ----------------------------------------------------------------------------------- messages


class ChannelError(Exception):
    """Raised by a channel's handler: the sender is told. Example: raise ChannelError("Full")"""


# int() raises ValueError: for NaN and the infinities, which are no JSON, and for integers of over
# 4,300 digits, whose cost is quadratic; old Pythons have to be told.
_decoder = json.JSONDecoder(
    parse_constant=int, parse_int=None if hasattr(sys, "set_int_max_str_digits") else
    lambda text: int(text if len(text) <= 4300 else ""))
_json = functools.partial(json.JSONEncoder, ensure_ascii=False, separators=(",", ":"))
_encoder = _json()
_quote = _encoder.encode


def dump_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON as JavaScript's own makes it: NaN and the infinities become null.

    Raises TypeError for what JSON does not know, ValueError for what is circular or too deep.
    """
    encoder = _encoder if default is None else _json(default=default)
    try:
        text = encoder.encode(value)
        if "NaN" in text or "Infinity" in text:  # or a string has the word, and stays as it is
            text = _quote(json.loads(text, parse_constant=lambda name: None))
        return text
    except RecursionError:
        raise ValueError("the payload is circular or nested too deep") from None
    except TypeError as error:
        raise TypeError(f"{error}: set config.json_default to what converts it") from None


def read_envelope(data: str | bytes) -> dict[str, Any] | None:
    """The JSON object with a "channel" that this is, or None."""
    text = data.lstrip(" \t\r\n") if isinstance(data, str) else ""
    if text[:1] != "{":
        return None
    try:
        envelope, end = _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if "channel" not in envelope or end < len(text) and text[end:].strip(" \t\r\n"):
        return None
    return envelope  # type: ignore[no-any-return]


class Push:
    """A message to clients: checked once, and encoded once for each dialect."""

    def __init__(self, settings: Config, channel: str, message: str | bytes,
                 payload: Any = None) -> None:
        """Raises TypeError or ValueError for what cannot be sent."""
        self._opcode, self._threshold = TEXT, settings.compression_threshold
        self._frames: dict[Dialect, bytes] = {}
        if isinstance(message, str):
            body = f'{{"channel":{_quote(channel)},"message":{_quote(message)}'
            if payload is not None:
                body += f',"payload":{dump_json(payload, settings.json_default)}'
            enveloped = f"{body}}}".encode()
            # Without the subprotocol a plain string travels as it is.
            self._bodies = (message.encode() if payload is None else enveloped, enveloped)
        elif isinstance(message, (bytes, bytearray, memoryview)) and payload is None:
            self._opcode, self._bodies = BINARY, (bytes(message),) * 2
        else:
            raise TypeError("a message is str or bytes; anything else is the payload of a str")
        check_size(settings, self._bodies[1])

    def size(self) -> int:
        """Bytes that it holds."""
        return sum(map(len, self._bodies))

    def frame(self, dialect: Dialect) -> bytes:
        """The frame for clients of this dialect."""
        frame = self._frames.get(dialect)
        if frame is None:
            frame = self._frames[dialect] = encode_message(
                self._opcode, self._bodies[dialect[0]], dialect[1], self._threshold)
        return frame


def check_size(settings: Config, body: bytes) -> None:
    """Raises ValueError for what no client could be sent."""
    if len(body) > settings.max_send_buffer:
        raise ValueError(f"{len(body):,} bytes are more than config.max_send_buffer")


# ------------------------------------------------------------------------------------ clients

# Where a message came from: the channel, the message and the ref, which the reply will have.
Origin = tuple[str, str, Any]
_READ_AHEAD = 64 * 1024  # bytes taken while a handler is busy, before reading stops
_SLOWEST = 16384  # bytes/s: what is slower is cut when its time is over
# What the handler that is running may ask for.
_params: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "webchannels_params", default=None)


def _on_loop(method: H) -> H:
    """Run a method in the thread of its app's event loop, where all state is changed."""
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        app: WebChannels = getattr(self, "_app", self)
        if app._here():
            return method(self, *args, **kwargs)
        return app._call(functools.partial(method, self, *args, **kwargs))
    return call  # type: ignore[return-value]


def half_close(transport: Any) -> bool:
    """Send no more, but read on: a reset could overtake what was sent. False: TLS cannot."""
    possible = bool(transport.can_write_eof())
    if possible:
        with contextlib.suppress(OSError):  # the peer is gone already
            transport.write_eof()
    return possible


class ChannelClient(asyncio.Protocol):
    """A browser, or whatever else opened a WebSocket.

    `.id`: str, unlike every other's, also of other processes. `.address`: the peer's IP address.
    `.request`: the Request of the handshake. `.channels`: the names of the channels subscribed to.
    `.data`: a dict for the program's own use. `.connected`: bool.
    Example: def who(client: ChannelClient): return client.address
    """

    __slots__ = ("_app", "_behind", "_closing", "_corked", "_deadline", "_dialect", "_ended",
                 "_frame_mark", "_frames", "_heard", "_held", "_pending", "_pinged", "_queue",
                 "_queued", "_reading", "_since", "_task", "_transport", "_writer", "address",
                 "channels", "connected", "data", "id", "request")

    def __init__(self, app: WebChannels, request: Request, dialect: Dialect,
                 head: bytes) -> None:
        self._app, self._dialect = app, dialect
        self.id = secrets.token_hex(8)
        self.request, self.address = request, request.address
        self.channels: set[str] = set()
        self.data: dict[Any, Any] = {}
        self.connected = False
        self._transport: Any = None  # an asyncio.Transport, once the handshake is over
        self._writer: asyncio.StreamWriter | None = None  # its finaliser closes the transport
        # Incoming: events that wait for the handler before them.
        self._frames = FrameReader(app.config.max_message_size, inflate=dialect[1] > 0)
        self._pending: collections.deque[Event] = collections.deque()
        self._task: asyncio.Future[None] | None = None  # the handler that is awaited
        self._held = 0  # bytes that arrived meanwhile
        self._reading = True
        # Outgoing: frames stay here while messages are handled (they are then written at once),
        # and while the transport is full (here they can be counted), or not there yet.
        self._queue: list[bytes] = [head]
        self._queued = 0
        self._corked = False
        self._behind = True
        # Life and death. The sweep looks at these.
        self._heard = True
        self._since = 0.0  # when the sweep last found that something had been heard
        self._pinged = False
        self._frame_mark = (-1, 0.0)  # the unfinished frame that the sweep saw first, and when
        self._closing = False  # a Close frame was sent, or never will be
        self._ended = False  # the peer sends no more
        self._deadline = math.inf  # when the connection is cut, if it is not over by then

    def __repr__(self) -> str:
        return (f"<ChannelClient {self.id} {self.address} "
                f"{'connected' if self.connected else 'disconnected'} {sorted(self.channels)}>")

    def send(self, message: str | bytes, payload: Any = None, *,
             channel: str | None = None) -> bool:
        """Push to this client alone; False if it is gone.

        `channel` is the one that the page sees: by default that of the message being handled, or
        `config.default_channel`. Raises TypeError or ValueError for what cannot be sent, and
        TimeoutError as `broadcast()` does. Example: client.send("tick", {"n": 1})
        """
        given = _params.get() or {}
        if channel is None and given.get("client") is self:
            channel = given.get("channel")
        settings = self._app.config
        push = Push(settings, channel or settings.default_channel, message, payload)
        there = self.connected or not self._transport
        if self._app._here():
            return there and self._push(push)
        return there and self._app._give(functools.partial(self._push, push), push.size())

    @_on_loop
    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection, after what was sent before.

        `code` is 1000 to 1003, 1007 to 1014 or 3000 to 4999 (RFC 6455, 7.4); `reason` is at most
        123 bytes. Raises ValueError for others, and TimeoutError as `subscribe()` does.
        Example: client.close(1008, "Not you")
        """
        if code not in CLOSE_CODES or len(reason.encode()) > 123:
            raise ValueError(f"not a close code and reason: {code!r} {reason!r}")
        self._close(code, reason)

    def _attach(self, writer: asyncio.StreamWriter) -> None:
        """Take over the connection: from now on its bytes are frames."""
        self._app._sockets[self] = None
        self.connected = not self._closing  # by on_connect
        self._writer = writer
        self._transport = writer.transport
        self._transport.set_protocol(self)
        self.resume_writing()
        self._transport.resume_reading()

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        self._heard = self._corked = True  # pongs leave together
        for event in self._frames.receive(data):
            kind = event[0]
            if kind == PING:
                self._write(encode_frame(PONG, event[1]))
            elif kind == TEXT and not event[1] and self._dialect[0]:
                self._write(encode_frame(TEXT, b""))  # a keep-alive, also while a handler is busy
            elif kind != PONG:
                self._pending.append(event)
                if kind == CLOSE:
                    self._ended = True
                    self._leave()
        self._work()
        if self._pending or self._frames.more:
            self._held += len(data)
            if self._held > _READ_AHEAD or self._frames.more:
                self._reading = False
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The peer sends no more; what it asked for before is still answered."""
        self._ended = True
        self._leave()
        self._deadline = time.monotonic() + self._app.config.handshake_timeout
        self._work()
        # TLS has no half-closed connections.
        return not self._transport.is_closing() and bool(self._transport.can_write_eof())

    def connection_lost(self, exc: BaseException | None) -> None:
        self._writer = None  # it is large, and disconnected_clients() may list this for a while
        self._behind = False
        self._leave()
        self._work()  # what arrived before is handled still

    def pause_writing(self) -> None:
        """The transport is full."""
        self._behind = True

    def resume_writing(self) -> None:
        """The transport has room again."""
        self._behind = False
        self._flush()
        self._app._soon(self._work)  # later: it may close the transport, which is writing now

    # Messages are handled in order.

    def _work(self) -> None:
        """Handle what is pending, until a handler must be awaited or the peer must read first."""
        self._corked = True
        pending = self._pending
        try:
            for _ in range(256):  # then others have their turn
                if not pending or self._task or self._behind:
                    break
                kind, data = pending.popleft()
                if kind == TEXT or kind == BINARY:
                    if not self._closing:
                        self._app._message(self, data)
                elif kind == FAIL:
                    logger.warning("%r broke the protocol: %s %s", self, *data)
                    self._close(*data)
                    self._flush()
                    if not half_close(self._transport):  # RFC 6455, 7.1.7
                        self._ended = True
                else:
                    self._close(*data)
                if self._queued > _READ_AHEAD:
                    self._flush()
            else:
                self._app._soon(self._work)
        finally:
            self._corked = False
            self._flush()
        if pending or self._task or self._behind:
            return
        self._held = 0  # all that arrived is handled
        if self._frames.more:
            self._app._soon(self.data_received, b"")
        elif not self._writer:  # until now it counted against config.max_clients
            self._app._sockets.pop(self, None)
        elif self._ended:
            self._transport.close()
        elif not self._reading:
            self._reading = True
            self._transport.resume_reading()

    # What is sent.

    def _push(self, push: Push) -> bool:
        self._write(push.frame(self._dialect))
        return not self._closing

    def _reply(self, origin: Origin, result: Any) -> None:
        """Send what the handler returned. Raises TypeError or ValueError if it cannot be sent."""
        channel, message, ref = origin
        self._app._here()  # what the handler's threads sent comes before
        settings, (v1, bits) = self._app.config, self._dialect
        text = result if isinstance(result, str) and not v1 else None
        if text is None:
            if isinstance(result, (bytes, bytearray, memoryview)):
                self._push(Push(settings, "", bytes(result)))
                result = None  # a binary frame has no place for the ref
            if v1 and ref is not None:
                text = f'{{"ref":{ref},"payload":{dump_json(result, settings.json_default)}}}'
            elif result is None:
                return
            elif not (v1 or channel or message):
                text = dump_json(result, settings.json_default)
            else:
                name, payload = (result, None) if isinstance(result, str) else (message, result)
                self._push(Push(settings, channel or settings.default_channel, name, payload))
                return
        body = text.encode()
        check_size(settings, body)
        self._write(encode_message(TEXT, body, bits, settings.compression_threshold))

    def _reply_later(self, origin: Origin, result: asyncio.Future[Any]) -> None:
        """Send what the handler will return; the client's other messages wait until then."""
        def done(result: asyncio.Future[Any]) -> None:
            self._task = None
            try:
                self._reply(origin, result.result())
            except BaseException as error:
                self._fail(origin, error)
            self._work()
        self._task = result
        result.add_done_callback(done)

    def _fail(self, origin: Origin, error: BaseException) -> None:
        """Tell the sender; and the log, with a traceback where it is the program's fault."""
        channel, message, ref = origin
        path = f"/{channel}/{message}" if message else "/"
        text = "ERROR : 500 - Internal error"
        if isinstance(error, ChannelError):
            text = str(error)
        elif isinstance(error, HTTPError):
            text = f"ERROR : {error.status} - {error.text}"
            logger.info("%r: %s: %s", self, path, text)
        else:
            logger.error("the handler of %s failed", path, exc_info=error)
        if self._dialect[0]:
            about = {"channel": channel, "message": message}
            text = _quote({"error": text, **(about if ref is None else {"ref": ref})})
        self._write(encode_frame(TEXT, text.encode("utf-8", "replace")))

    def _write(self, frame: bytes) -> None:
        if self._closing:  # RFC 6455, 5.5.1: nothing follows a Close frame
            return
        if self._corked or self._behind:
            self._queue.append(frame)
            self._queued += len(frame)
            if not self._corked:
                self._flush()
        elif not self._transport.is_closing():  # and the queue is empty
            self._transport.write(frame)

    def _flush(self) -> None:
        if self._behind and (self._queued <= self._app.config.max_send_buffer or self._closing):
            return
        data = b"".join(self._queue)
        del self._queue[0 if self._transport else 1:]  # the head of the 101 stays
        self._queued = 0
        if self._behind:
            logger.warning("%r is more than config.max_send_buffer behind: closed", self)
            self._close(1013, "too slow")
        elif data and not self._transport.is_closing():
            self._transport.write(data)

    # The end.

    def _leave(self) -> None:
        if self.connected:
            self.connected = False
            self._app._left(self)

    def _close(self, code: int, reason: str) -> None:
        """Send the Close frame, if none was (RFC 6455, 7.1.2); the sweep cuts the deaf."""
        if not self._closing:
            payload = b"" if code == 1005 else code.to_bytes(2, "big") + reason.encode()
            self._write(encode_frame(CLOSE, payload))
            self._closing = True
            self._deadline = time.monotonic() + self._app.config.handshake_timeout
        self._leave()

    def _shut(self) -> None:
        """The server goes down: close after the handler that is running."""
        self._leave()
        self._pending.clear()
        self._pending.append((CLOSE, (1001, "server going down")))
        self._work()

    def _abort(self, why: str) -> None:
        logger.info("%r dropped: %s", self, why)
        self._transport.abort()

    def _check(self, now: float, settings: Config) -> None:
        """Called by the sweep: is the peer alive, and does it finish what it began?"""
        if not self._writer:
            return
        if self._heard or self._task and not self._reading:
            self._heard = self._pinged = False
            self._since = now
        silent = now - self._since
        size = self._frames.unfinished if self._reading else 0
        frame = self._frames.frames if size else -1
        if frame != self._frame_mark[0]:
            self._frame_mark = (frame, now)
        if now >= self._deadline:
            self._abort("it did not close in time")
        elif size and now - self._frame_mark[1] > settings.handshake_timeout + size / _SLOWEST:
            self._close(1013, "frame not finished in time")
        elif settings.ping_interval and silent >= settings.ping_interval + settings.ping_timeout:
            self._abort("no answer to a ping")
        elif settings.ping_interval and silent >= settings.ping_interval and not self._pinged:
            self._pinged = True
            self._write(encode_frame(PING, b""))


# ---------------------------------------------------------------------------------------- bus

_PATIENCE = 5.0  # seconds for Redis to answer
_RETRY = 0.5  # seconds: the longest pause before it is tried again
_RESP = re.compile(rb"\$(\d{1,10})\r\n|[+:_#,*%~>][^\r\n]*\r\n")  # no errors, which begin with "-"


class Bus:
    """Carries broadcasts between processes; `config.bus` may be one with an engine of your own.

    The app calls these methods in its event loop; they must not block it. What other processes
    publish they hand to `self.deliver(channel, data)`, from any thread; what comes back of their
    own is ignored there. This one carries nothing: a process by itself. Example: config.bus = Bus()
    """

    deliver: Callable[[str, bytes], None]

    async def start(self) -> None:
        """Connect. What this raises, `up()` raises. Example: await bus.start()"""

    async def stop(self) -> None:
        """Disconnect. Example: await bus.stop()"""

    def publish(self, channel: str, data: bytes) -> None:
        """Carry `data` to all who listen to `channel`, in order. Example: bus.publish("a", b"x")"""

    def listen(self, channel: str, wanted: bool) -> None:
        """Has the channel subscribers here, from now on? Example: bus.listen("room", True)"""


class RedisBus(Bus):
    """Redis 6 or later: with RESP3 one connection can publish and subscribe.

    While it is away, the last `limit` bytes of broadcasts are held. What was under way may be lost.
    """

    def __init__(self, url: str, limit: int) -> None:
        match = re.fullmatch(r"(rediss?)://(?:([^:@/]*):([^@/]*)@)?([^:@/[\]]+|\[[\w:.]+\])"
                             r"(?::(\d{1,5}))?/?([\w-]*)", url)
        if not match:  # the URL may have a password, and is not shown
            raise ValueError("config.redis_url is not redis[s]://[user:password@]host[:port][/name]"
                             ", with %-escapes in the user and the password")
        scheme, user, self._secret, host, port, name = map(urllib.parse.unquote, match.groups(""))
        self._where, self._limit = (host.strip("[]"), int(port or 6379)), limit
        self._ssl = ssl_module.create_default_context() if scheme == "rediss" else None
        self._prefix = f"webchannels/{name or 0}/".encode()  # for PUBLISH, all databases are one
        self._login = [_command(b"HELLO", b"3")]
        if self._secret:  # not in HELLO: an old Redis would quote what it does not understand
            auth = [word.encode() for word in ("AUTH", user, self._secret) if word]
            self._login.insert(0, _command(*auth))
        self._writer: asyncio.StreamWriter | None = None  # while there is a connection

    async def start(self) -> None:
        self._channels: set[bytes] = set()  # by their names at Redis
        self._queue: collections.deque[bytes] = collections.deque()
        self._held, self._dropped, self._ready = 0, 0, False
        await self._connect()
        self._ready = True
        self._keeping = asyncio.ensure_future(self._keep())

    async def stop(self) -> None:
        self._keeping.cancel()
        self._write(b"QUIT", behind=math.inf)  # when Redis has read all, it ends the connection
        await asyncio.wait([self._reading], timeout=0.5)
        self._abort()

    def publish(self, channel: str, data: bytes) -> None:
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._write)
        self._queue.append(_command(b"PUBLISH", self._name(channel), data))
        self._held += len(self._queue[-1])
        if self._held > _READ_AHEAD:
            self._write()
        while self._held > self._limit:
            self._held -= len(self._queue.popleft())
            self._dropped += 1

    def listen(self, channel: str, wanted: bool) -> None:
        (self._channels.add if wanted else self._channels.discard)(self._name(channel))
        self._write(b"SUBSCRIBE" if wanted else b"UNSUBSCRIBE", self._name(channel))

    def _name(self, channel: str) -> bytes:
        return self._prefix + channel.encode("utf-8", "surrogatepass")

    def _write(self, *command: bytes, behind: float = _READ_AHEAD) -> None:
        """Write what is held, unless Redis is so many bytes behind; then a command."""
        if not self._writer or self._writer.transport.is_closing():
            return
        unsent = self._writer.transport.get_write_buffer_size()
        if self._queue and self._ready and unsent < behind:
            self._writer.write(b"".join(self._queue))
            if self._dropped:
                logger.warning("%d broadcasts for Redis were dropped, the oldest", self._dropped)
            self._queue.clear()
            self._held = self._dropped = 0
        if command:
            self._writer.write(_command(*command))

    async def _connect(self) -> None:
        """Log in, and subscribe to what is wanted. Raises ConnectionError."""
        self._silent = True
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(*self._where, ssl=self._ssl), _PATIENCE)
            self._writer = writer  # from here on, listen() writes behind this
            writer.writelines(
                [*self._login, *(_command(b"SUBSCRIBE", name) for name in self._channels)])
            for _ in self._login:
                line = await asyncio.wait_for(reader.readline(), _PATIENCE)
                if line[:1] not in (b"+", b"%"):
                    said = line.rstrip().decode("utf-8", "replace")
                    said = said.replace(self._secret or "\n", "***")[:200]
                    raise ConnectionError(f"it said {said!r}")
            self._silent = False
            self._reading = asyncio.ensure_future(self._read(reader))  # HELLO's map, too
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            why = str(error) or "no answer"
            raise ConnectionError("no Redis at %s:%d: %s" % (*self._where, why)) from None
        finally:
            if self._silent:
                self._abort()

    async def _keep(self) -> None:
        """Ping; when the connection is lost, come back."""
        while True:
            while not (await asyncio.wait([self._reading], timeout=_PATIENCE))[0]:
                if self._silent:
                    self._reading.cancel()
                self._silent = True
                self._write(b"PING")
            why = "no answer" if self._reading.cancelled() else self._reading.result()
            logger.warning("lost Redis at %s:%d (%s): up to %d bytes of broadcasts wait",
                           *self._where, why, self._limit)
            self._ready, pause = False, _RETRY / 8
            while not self._ready:
                self._abort()
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _RETRY)
                with contextlib.suppress(ConnectionError):
                    await self._connect()
                    # What is held waits until the other processes are back, too.
                    await asyncio.wait([self._reading], timeout=2 * _RETRY)
                    self._ready = not self._reading.done()
            logger.warning("Redis at %s:%d is back", *self._where)
            self._write()

    async def _read(self, reader: asyncio.StreamReader) -> str:
        """Deliver what comes: three strings in a row, the first "message". Returns why it ends."""
        data = b""
        words: list[bytes] = []
        with contextlib.suppress(OSError):
            while more := await reader.read(_READ_AHEAD):
                data, at, self._silent = data + more, 0, False
                while match := _RESP.match(data, at):
                    start = end = match.end()
                    if match[1]:
                        end += int(match[1]) + 2
                    if end > len(data):
                        break
                    at = end
                    words = [*words[-2:], data[start:end - 2]] if match[1] else []
                    if len(words) == 3 and words[0] == b"message" and words[1] in self._channels:
                        name = words[1][len(self._prefix):].decode("utf-8", "surrogatepass")
                        self.deliver(name, words[2])
                data = data[at:]
                if len(data) > (self._limit if match else 9999) or not match and b"\r\n" in data:
                    return f"it said {data[:200]!r}"
                self._write()  # Redis has read: there may be room again
        return "it hung up"

    def _abort(self) -> None:
        if self._writer:
            self._writer.transport.abort()
        self._writer = None


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(
        [b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


# ---------------------------------------------------------------------------------------- app

_SLOW = 0.1  # seconds for which a `def` handler may hold the event loop unremarked
# What other threads hand over to the loop: see Handover.
_AHEAD = 64 * 1024  # bytes; a thread that is so far ahead takes a nap with each call
_NAP = 0.0005  # seconds
_STUCK = 5.0  # seconds without a move, after which a thread does not wait any longer
_HELD = f"a handler has held the event loop for {_STUCK:.0f} s, or the loop was stopped"
_LINGER = 2.0  # seconds for a refused peer to read the answer, before the connection is cut
# From Python 3.12 on, an answer that awaits nothing is there at once, not in the loop's next turn.
_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
_MESSAGE_NAMES = {"payload", "client", "request", "channel", "message"}
_CLIENT_NAMES = {"client", "request"}
Clients = Union[ChannelClient, str, Iterable[Union[ChannelClient, str]]]


class Handover:
    """Calls that other threads hand over to an event loop, in order, with one wake-up for many.

    Nobody waits for the loop here: it may wait for a lock that the thread holds. But a thread that
    is ahead is slowed down, so that the loop catches up; and at the limit it waits a while.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop, self._limit = loop, limit
        # Its methods are atomic, and suffice: a signal handler that interrupts the holder of a lock
        # may wait for the loop, which then must not wait for that lock.
        self._calls: collections.deque[tuple[int, Callable[[], Any]]] = collections.deque()
        self._moved = 0.0  # when the loop was woken, or made a call
        self._woken = self._taking = self._over = False

    def _waiting(self) -> int:
        return sum([size for size, _ in self._calls.copy()])

    def give(self, call: Callable[[], Any], size: int = 0) -> bool:
        """Have the loop make this call, which holds so many bytes. Raises TimeoutError.

        False: it is over, and nobody knows whether the call was still made.
        """
        if self._over or self._loop.is_closed():
            return False
        if size and self._waiting() > _AHEAD:
            time.sleep(_NAP)
            while self._waiting() > self._limit:
                if time.monotonic() > self._moved + _STUCK:
                    raise TimeoutError(_HELD)
                time.sleep(_NAP)
        self._calls.append((size + 1000, call))  # bytes, about, of what holds it
        if not self._woken:
            self._woken, self._moved = True, time.monotonic()
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self.take)
        return not self._over

    def take(self) -> None:
        """Make the calls, in the thread of the loop."""
        self._woken = False  # first: whoever comes later wakes it again
        if self._taking:
            return
        self._taking = True
        for _ in range(len(self._calls)):
            call = self._calls.popleft()[1]
            try:
                call()
            except Exception:
                logger.exception("what a thread handed over failed")
            self._moved = time.monotonic()
        self._taking = False

    def end(self) -> None:
        """Make the last calls."""
        self._over, self._taking = True, False
        self.take()


class HTTPConnection(asyncio.Protocol):
    """A connection, from its first byte to its end, or until it becomes a WebSocket."""

    def __init__(self, app: WebChannels, writer: asyncio.StreamWriter) -> None:
        self._app = app
        self._writer = writer  # its finaliser closes the transport
        self.transport: Any = writer.transport
        peer = self.transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._buffer = bytearray()
        self._requests = read_requests(self._buffer, app.config)
        self._begun = False  # a part of a request is here
        self._behind = False  # the peer must read first
        self._half_closed = False  # the peer sends no more
        self._ended = False  # nothing more is answered
        self.task: asyncio.Task[None] | None = None  # the answer that is awaited
        self._wait(app.config.keep_alive_timeout)
        app._http.add(self)
        self.transport.set_protocol(self)
        if len(app._http) > app.config.max_clients:
            self._refuse(HTTPError(503, headers={"Retry-After": "5"}))

    def _wait(self, seconds: float, size: int = 0) -> None:
        """Set when the sweep will end what is waited for, which is of `size` bytes."""
        self.deadline = time.monotonic() + seconds + size / _SLOWEST

    def data_received(self, data: bytes) -> None:
        if not self._ended:
            self._buffer += data
            self.deadline += len(data) / _SLOWEST
            self.work()
            if (self.task or self._behind) and len(self._buffer) > _READ_AHEAD:
                self.transport.pause_reading()

    def eof_received(self) -> bool:
        self._half_closed = True  # what the peer asked for before is still answered
        self.work()
        return not self._ended and bool(self.transport.can_write_eof())  # TLS cannot

    def connection_lost(self, exc: BaseException | None) -> None:
        self._ended = True
        if not self.task:
            self._app._http.discard(self)

    def pause_writing(self) -> None:
        self._behind = True

    def resume_writing(self) -> None:
        self._behind = False
        self._app._soon(self.work)

    def work(self) -> None:
        """Answer the next request, if it has arrived and the peer reads its answers."""
        if self._app._stopping and not (self.task or self._begun):
            self._end()
        if self.task or self._behind or self._ended:
            return
        self.transport.resume_reading()
        try:
            found = next(self._requests)
        except HTTPError as error:
            self._refuse(error)
            return
        if isinstance(found, Request):
            found.address = self._address
            self._begun, self.deadline = False, math.inf
            task: Any = asyncio.Task(self._answer(found), loop=self._app._loop, **_EAGER)
            self.task = None if task.done() else task
        elif self._half_closed:
            self._end()
        elif found is not None:
            self.transport.write(found)
            if not self._begun:
                self._begun = True
                self._wait(self._app.config.handshake_timeout, len(self._buffer))

    async def _answer(self, request: Request) -> None:
        """Send the answer, or become a WebSocket."""
        answer = await self._app._answer(request)
        self.task = None
        upgraded = isinstance(answer, ChannelClient)
        if self._ended or upgraded and self._half_closed:
            self._app._http.discard(self)  # the peer is gone
            self.transport.abort()
        elif upgraded and (self._app._stopping
                           or len(self._app._sockets) >= self._app.config.max_clients):
            self._refuse(HTTPError(503, headers={"Retry-After": "5"}))
        elif isinstance(answer, ChannelClient):
            self._ended = True  # as an HTTP connection: a work() that is still due does nothing
            self._app._http.discard(self)
            answer._attach(self._writer)
            answer.data_received(bytes(self._buffer))  # it arrived behind the request
        else:
            self._ended = (request.http_1_0 or self._app._stopping
                           or "close" in request.members("connection"))  # RFC 9112, 9.3
            self._wait(self._app.config.keep_alive_timeout, len(answer.body))
            self.transport.write(answer.encode(request.method == "HEAD", self._ended))
            if self._ended:
                self.transport.close()
            elif self._buffer or self._half_closed:
                self._app._soon(self.work)  # not now: others have their turn

    def _refuse(self, error: HTTPError) -> None:
        logger.warning("refused %s: %s", self._address, error)
        self._begun, self._ended = False, True
        self._wait(_LINGER)
        self.transport.write(error.response.encode(close=True))
        if not half_close(self.transport):
            self.transport.close()

    def _end(self) -> None:
        self._ended = True
        self.transport.close()

    def expire(self) -> None:
        """Called by the sweep when the deadline is over."""
        if self._behind or self._ended:
            self.transport.abort()
        elif self._begun:
            self._refuse(HTTPError(408))
        else:
            self._end()


class WebChannels:
    """An app: its routes, channels, clients and server.

    The module-level functions are the methods of one default app; two apps may serve side by side
    in one process. Every public method may be called from any thread. Example: WebChannels().up(0)
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self._routes, self._channels = Router(), Router()
        self._open: set[str] = set()  # channels that anyone may subscribe to
        self._on_connect: dict[str, Endpoint] = {}
        self._on_disconnect: dict[str, Endpoint] = {}
        self._lock = threading.Lock()  # of the start
        self._context = contextvars.copy_context()  # in which serving began
        self._thread = 0  # in which it serves, or did last
        self._done = threading.Event()  # the last serving is over
        self._done.set()
        self._reset()
        _apps.add(self)

    def _reset(self) -> None:
        """Forget what belongs to one time of serving."""
        self.url, self.port = "", 0  # where it serves, such as "http://127.0.0.1:8000"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handover: Handover | None = None  # while it serves
        self._jobs: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._idle = 0  # threads that wait for jobs
        self._stop: asyncio.Future[BaseException | None] | None = None
        self._stopping = False
        self._warned: dict[str, float] = {}  # of what, and when
        self._local_only = False
        self._servers: list[asyncio.AbstractServer] = []
        self._listening: Sequence[Any] = ()
        self._ssl: ssl_module.SSLContext | None = None
        self._http: set[HTTPConnection] = set()
        self._sockets: dict[ChannelClient, None] = {}  # whose connections are not yet gone
        self._left_at: dict[ChannelClient, float] = {}  # those that left, and when
        self._subscribers: dict[str, dict[ChannelClient, None]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()
        self._bus: Bus | None = None
        self._name = secrets.token_hex(8).encode()  # of this process, among those on the bus

    # What a program registers.

    def route(self, path: str, handler: Callable[..., Any] | None = None, *,
              method: str = "GET", threaded: bool = False) -> Callable[[H], H]:
        """Answer requests for `path` with what `handler` returns; a decorator or a plain call.

        `/a/:name` matches one segment, `/a/:n::int` converts it (int, float, str). Registering the
        same path and method again replaces the handler, also while serving. The handler returns
        str (HTML), bytes, dict or list (JSON), a Response, or None (204). `threaded=True` runs a
        `def` handler in a thread. Raises TypeError or ValueError for what cannot work.
        Example: route("/hello/:name", lambda name: f"Hello, {html.escape(name)}!")
        """
        if not _TOKEN.fullmatch(method):
            raise ValueError(f"not an HTTP method: {method!r}")
        return self._register(self._routes, method.upper(), path, handler, threaded)

    def channel(self, path: str, handler: Callable[..., Any] | None = None, *,
                threaded: bool = False) -> Callable[[H], H]:
        """Handle messages: `/____/echo` is the message `echo` on the channel `____`; as `route()`.

        The handler may take `payload`, `client`, `channel`, `message`, `request` (the handshake)
        and the path's parameters. What it returns is the reply to the sender; None is none.
        `channel("/")` gets what is not a JSON object with a "channel", as it came, and replies raw.
        A handler for the message `subscribe` guards a channel: it may raise ChannelError, or
        `subscribe(client, channel)`. Example: channel("/____/echo", lambda payload: payload)
        """
        return self._register(self._channels, "", path, handler, threaded, _MESSAGE_NAMES)

    def _register(self, router: Router, method: str, path: str, handler: Any,
                  *about: Any) -> Callable[[H], H]:
        if not isinstance(path, str):
            raise TypeError(f"first comes the path, as in @route('/path'), not {path!r}")

        def register(handler: H) -> H:
            router.add(path, Endpoint(handler, path, *about), method)
            return handler
        if handler is not None:
            register(handler)
        return register

    def on_connect(self, handler: H) -> H:
        """Call `handler` before a WebSocket handshake is accepted; a decorator.

        It may take `client` and `request`, and refuse: `raise HTTPError(401)`. It may already
        `client.send()`, but the client is not connected yet, so it cannot be subscribed. A function
        of the same name replaces it. Example: on_connect(lambda client: client.send("Welcome"))
        """
        endpoint = Endpoint(handler, supplied=_CLIENT_NAMES)
        self._on_connect[endpoint.name] = endpoint
        return handler

    def on_disconnect(self, handler: H) -> H:
        """Call `handler` when a client has left, as `on_connect()`. Example: on_disconnect(log)"""
        endpoint = Endpoint(handler, supplied=_CLIENT_NAMES)
        self._on_disconnect[endpoint.name] = endpoint
        return handler

    def params(self, key: str | None = None, default: Any = None) -> Any:
        """The parameters of the request or message being handled: all, as a dict, or one.

        Raises RuntimeError outside a handler, the tasks that it starts, and asyncio.to_thread(): in
        what has no copy of its context. Example: params("name", "nobody")
        """
        given = _params.get()
        if given is None:
            raise RuntimeError("params() works only in a handler, and the tasks that it starts")
        return given if key is None else given.get(key, default)

    def channels_script(self) -> str:
        """The browser client, as bare JavaScript. Example: channels_script()"""
        return CHANNELS_JS

    def channels_support(self, channel: str | None = None, *, nonce: str | None = None,
                         src: str | None = None) -> str:
        """The `<script>` element that makes a page live on `channel` (`config.default_channel`).

        Anyone may then subscribe to it, unless there is a handler for its message `subscribe`.
        `nonce` is for a Content-Security-Policy. `src` loads the client from there, not inline; a
        path of this server is served if it has no route. Register channels other than the default
        one when the program starts, too: an open page may come back to a restarted server. Raises
        ValueError for a bad channel name. Example: channels_support("room", src="/channels.js")
        """
        channel = self.config.default_channel if channel is None else channel
        if not channel or channel.strip("/") != channel:
            raise ValueError(f"not a channel's name: {channel!r}")
        self._open.add(channel)
        base = self.config.base_path.rstrip("/")
        attributes = {"data-channel": channel, "data-path": base + self.config.websockets_path,
                      "nonce": nonce, "src": src}
        if src and src.startswith("/") and not src.startswith("//"):
            attributes["src"] = base + src
            path = src.partition("?")[0]
            if self._routes.find(path) is None:
                kind = "text/javascript; charset=utf-8"
                self.route(path, lambda: Response(CHANNELS_JS, content_type=kind))
        text = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items()
                       if value is not None)
        return f"<script{text}>{CHANNELS_JS if src is None else ''}</script>"

    # The registry.

    def broadcast(self, channels: str | Iterable[str], message: str | bytes, payload: Any = None,
                  *, exclude: Clients = (), only: Clients | None = None) -> bool:
        """Push to every subscriber of one channel or several, once for each.

        `exclude` and `only` are clients, or their ids, also those of other processes. True if
        anyone in this process was there to be sent it. It does not wait for the event loop; but a
        thread that is ahead of it is slowed down. Raises TypeError or ValueError for what cannot be
        sent, before anything is; TimeoutError if over `8 * config.max_send_buffer` bytes wait for
        a loop that has not moved for 5 seconds. Example: broadcast("room", "tick", {"n": 1})
        """
        names = [channels] if isinstance(channels, str) else list(channels)
        pushes = [(name, Push(self.config, name, message, payload)) for name in names]
        without, among = _ids(exclude), None if only is None else _ids(only)
        if self._here():
            return self._spread(pushes, without, among)
        there = any(self._meant(name, without, among) for name in names)
        if there or self._bus:
            size = sum(push.size() for _, push in pushes)
            spread = functools.partial(self._spread, pushes, without, among)
            there = self._give(spread, size) and there
        return there

    def _spread(self, pushes: list[tuple[str, Push]], without: set[str],
                among: set[str] | None) -> bool:
        there = False
        for name, push in pushes:
            there = self._send(name, push, without, among) or there
            if self._bus:  # a line of JSON; then the plain text (kind 0), the envelope, or bytes
                plain, body = push._bodies
                kind = push._opcode if plain is body else 0
                head = dump_json([kind, [*without], None if among is None else [*among]])
                self._bus.publish(name, b"%b%b\n%b" % (self._name, head.encode(), plain))
        return there

    def _meant(self, channel: str, without: set[str],
               among: set[str] | None) -> list[ChannelClient]:
        clients = list(self._subscribers.get(channel, ()))  # at once: other threads read, too
        if without or among is not None:
            clients = [client for client in clients if client.id not in without
                       and (among is None or client.id in among)]
        return clients

    def _send(self, channel: str, push: Push, without: set[str], among: set[str] | None) -> bool:
        there = False
        for client in self._meant(channel, without, among):
            there = client._push(push) or there
        return there

    def _deliver(self, channel: str, data: bytes) -> None:
        """A broadcast came over the bus. From any thread, but without waiting: others may wait."""
        if not self._here():
            self._give(functools.partial(self._deliver, channel, data))
        elif not data.startswith(self._name):  # else it is our own
            try:
                head, body = data[len(self._name):].split(b"\n", 1)
                kind, without, among = _decoder.decode(head.decode())
                text = "" if kind == BINARY else body.decode()  # no browser could read other bytes
                push = Push(self.config, channel, body if kind else text)
                push._opcode = BINARY if kind == BINARY else TEXT
                self._send(channel, push, set(without), None if among is None else set(among))
            except (TypeError, ValueError, RecursionError) as error:
                logger.warning("not a broadcast of ours, on channel %r: %s", channel, error)

    # What reads it may run in any thread at any time: list() and copy() are atomic.

    def connected_clients(self, channel: str | None = None) -> list[ChannelClient]:
        """Every open client, or the subscribers of `channel`. Example: connected_clients("a")"""
        if channel is None:
            return [each for each in list(self._sockets) if each.connected]
        return list(self._subscribers.get(channel, ()))

    def disconnected_clients(self, channel: str | None = None) -> list[ChannelClient]:
        """Who left within `config.disconnected_ttl`. Example: disconnected_clients("room")"""
        return [each for each in list(self._left_at) if channel is None or channel in each.channels]

    @_on_loop
    def unsubscribe_disconnected_clients(self, channel: str | None = None) -> list[ChannelClient]:
        """Forget who left, return who is here. Example: unsubscribe_disconnected_clients("room")"""
        for client in self.disconnected_clients(channel):
            del self._left_at[client]
        return self.connected_clients(channel)

    @_on_loop
    def subscribe(self, client: ChannelClient, channel: str) -> bool:
        """Subscribe `client` to `channel`; False if it is gone.

        From another thread this waits for the event loop, as do `unsubscribe()`, what forgets
        clients, and `client.close()`: hold no lock that a `def` handler wants. Raises TimeoutError
        after 5 seconds without a move of it, and ChannelError past `config.max_subscriptions`.
        Example: subscribe(client, "room")
        """
        if client.connected and channel not in client.channels:
            if len(client.channels) >= self.config.max_subscriptions:
                raise ChannelError("Too many subscriptions")
            if channel not in self._subscribers and self._bus:
                self._bus.listen(channel, True)
            client.channels.add(channel)
            self._subscribers.setdefault(channel, {})[client] = None
        return client.connected

    @_on_loop
    def unsubscribe(self, client: ChannelClient, channel: str) -> bool:
        """Unsubscribe; False if it was not subscribed. Raises TimeoutError as `subscribe()` does.

        Example: unsubscribe(client, "room")
        """
        subscribed = channel in client.channels
        client.channels.discard(channel)
        subscribers = self._subscribers.get(channel, {})
        subscribers.pop(client, None)
        if not subscribers and self._subscribers.pop(channel, None) is not None and self._bus:
            try:
                self._bus.listen(channel, False)
            except Exception:  # the client is gone nevertheless
                logger.exception("the bus did not let go of channel %r", channel)
        return subscribed

    @_on_loop
    def unsubscribe_client(self, client: ChannelClient) -> None:
        """Unsubscribe `client` from all its channels. Example: unsubscribe_client(client)"""
        for channel in list(client.channels):
            self.unsubscribe(client, channel)

    def subscriptions(self) -> dict[str, list[ChannelClient]]:
        """The subscribers of each channel that has any. Example: len(subscriptions()["room"])"""
        return {name: list(clients) for name, clients in self._subscribers.copy().items()}

    def _left(self, client: ChannelClient) -> None:
        """The client has just gone."""
        async def notify(endpoint: Endpoint) -> None:
            try:
                await self._invoke(endpoint, {"client": client, "request": client.request})
            except asyncio.CancelledError:
                raise
            except BaseException:  # told in the log: the client is gone, nobody waits
                logger.exception("%s failed for %r", endpoint.name, client)

        channels = [*client.channels]
        self.unsubscribe_client(client)
        client.channels.update(channels)  # for disconnected_clients()
        self._left_at[client] = time.monotonic()
        if len(self._left_at) > self.config.max_clients:
            del self._left_at[next(iter(self._left_at))]  # who left first
        for endpoint in list(self._on_disconnect.values()):
            task = asyncio.ensure_future(notify(endpoint))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # Calling handlers.

    def _start(self, endpoint: Endpoint, given: dict[str, Any]) -> Any:
        """Call a handler in a context of its own; what comes back is its result, or a future."""
        context = self._context.copy()
        context.run(_params.set, given)
        if endpoint.threaded:
            threaded = self._in_thread(lambda: context.run(endpoint, given))
            return asyncio.ensure_future(self._await(threaded))
        begun = time.perf_counter()
        try:
            result = context.run(endpoint, given)
        except (SystemExit, KeyboardInterrupt) as error:
            raise self._exit(error) from error
        held = time.perf_counter() - begun
        if held > _SLOW:
            logger.warning("%s held the event loop for %d ms: make it `async def`, or register "
                           "it with threaded=True", endpoint.name, held * 1000)
        if result.__class__ is not str and inspect.isawaitable(result):
            return context.run(asyncio.ensure_future, self._await(result))
        return result

    async def _await(self, result: Any) -> Any:
        try:
            return await result
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:  # asyncio has its own ideas
            raise self._exit(error) from error

    def _exit(self, error: BaseException) -> Exception:
        """A handler ends the program: `serve()` raises it, when all is closed. The sender's is 500.
        """
        if not isinstance(error, GeneratorExit):
            self._end(error)
        return RuntimeError(f"a handler raised {error!r}")

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        """The result of `call`. (Its threads are daemons: no process waits for them at its end.)"""
        if self._threads.locked():
            self._warn("handlers wait for a thread: config.max_threads are busy")
        await self._threads.acquire()
        handover, future = self._handover, asyncio.get_running_loop().create_future()

        def run() -> bool:
            try:
                tell, outcome = future.set_result, call()
            except BaseException as error:
                tell, outcome = future.set_exception, error
            # It comes behind what the handler handed over.
            return handover is not None and handover.give(lambda: done(tell, outcome))

        def done(tell: Callable[[Any], None], outcome: Any) -> None:
            self._threads.release()
            self._idle += 1
            if not future.done():  # it is still wanted
                tell(outcome)

        if self._idle:
            self._idle -= 1
        else:
            threading.Thread(target=_work, args=(self._jobs,), name="webchannels",
                             daemon=True).start()
        self._jobs.put(run)
        return await future

    async def _invoke(self, endpoint: Endpoint, given: dict[str, Any]) -> Any:
        result = self._start(endpoint, given)
        return await result if isinstance(result, asyncio.Future) else result

    def _message(self, client: ChannelClient, data: str | bytes) -> None:
        """Handle a message; never raises for what it or its handler does."""
        origin: Origin = "", "", None
        path = "/"  # of what is not an envelope
        payload: Any = data
        try:
            envelope = read_envelope(data)
            if envelope is not None:
                channel, message = envelope["channel"], envelope.get("message")
                payload, ref = envelope.get("payload"), envelope.get("ref")
                exact = ref is None or type(ref) in (int, float) and abs(ref) <= 2 ** 53
                origin = "", "", ref if exact else None
                # A slash in the message could make it another channel's: /a + b/c is not /a/b + c.
                if (not exact or type(channel) is not str or type(message) is not str
                        or "/" in message):
                    raise HTTPError(400, "Bad message")
                origin = channel, message, ref
                path = f"/{channel}/{message}"
            found = self._channels.find(path)
            if found:
                endpoint = found[0][""]
                given = {"payload": payload, "client": client, "request": client.request,
                         "channel": origin[0], "message": origin[1]}
                if endpoint.path_names:
                    given = {**dict(zip(endpoint.path_names, found[1])), **given}
                result = self._start(endpoint, given)
            elif data == "":  # a keep-alive
                return
            else:
                result = self._default(client, *origin[:2])
            if isinstance(result, asyncio.Future):
                client._reply_later(origin, result)
            else:
                client._reply(origin, result)
        except BaseException as error:
            client._fail(origin, error)

    def _default(self, client: ChannelClient, channel: str, message: str) -> str:
        """What a message does for which the program has no handler."""
        if message == "subscribe" and channel in self._open:
            self.subscribe(client, channel)
            return "Subscription: OK"
        if message == "unsubscribe" and (channel in self._open or channel in client.channels):
            self.unsubscribe(client, channel)
            return "Unsubscription: OK"
        raise HTTPError(404)

    # HTTP.

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._stopping or self._loop is None:  # its TLS handshake took until now
            writer.transport.abort()
        else:
            HTTPConnection(self, writer)  # it needs no streams: they would cost half of the speed

    async def _answer(self, request: Request) -> Response | ChannelClient:
        """The answer to a request, or the client that it becomes; never raises for its faults."""
        try:
            self._check_host(request)
            upgrade = "websocket" in request.members("upgrade")
            if upgrade or request.method not in ("GET", "HEAD", "OPTIONS"):
                self._check_origin(request)
            return await (self._upgrade if upgrade else self._respond)(request)
        except HTTPError as error:
            logger.info("%r: %s", request, error)
            return error.response
        except BaseException as error:
            if self._stopping and isinstance(error, asyncio.CancelledError):
                raise
            logger.exception("%r failed", request)
            return HTTPError(500).response

    async def _respond(self, request: Request) -> Response:
        """What the route's handler answers. Raises HTTPError, and whatever the handler raises."""
        method = request.method
        try:
            endpoints, values = self._routes.find(request.path, decode=True) or ({}, ())
        except UnicodeDecodeError:
            raise HTTPError(400, "The path is not UTF-8") from None
        endpoint = endpoints.get(method) or endpoints.get("GET" if method == "HEAD" else "")
        if endpoint is None:
            known = {"OPTIONS", *endpoints, *(["HEAD"] if "GET" in endpoints else [])}
            allow = {"Allow": ", ".join(sorted(METHODS if request.path == "*" else known))}
            if method == "OPTIONS" and (endpoints or request.path == "*"):
                return Response(status=204, headers=allow)
            if method not in METHODS:
                raise HTTPError(501)
            raise HTTPError(405, headers=allow) if endpoints else HTTPError(404)
        given = {**request.params(), **dict(zip(endpoint.path_names, values)), "request": request}
        for name in endpoint.required:
            if name not in given:
                raise HTTPError(400, f"The parameter {name} is missing")
        result = await self._invoke(endpoint, given)
        if result is None:
            return Response(status=204)
        if isinstance(result, (str, bytes, bytearray, memoryview, dict, list)):
            return Response(result, json_default=self.config.json_default)
        if isinstance(result, Response) and not isinstance(result.body, bytes):
            raise TypeError(f"the body of {endpoint.name}'s Response was set to what is not bytes")
        if not isinstance(result, Response):
            raise TypeError(f"{endpoint.name} returned {type(result).__name__}; a route returns "
                            "str, bytes, dict, list, Response or None")
        return result

    async def _upgrade(self, request: Request) -> ChannelClient:
        """The client that the connection becomes. Raises HTTPError, or what a handler raises."""
        if not self.config.websockets_server or request.path != self.config.websockets_path:
            raise HTTPError(404)
        head, dialect = accept_handshake(request, self.config.compression)
        client = ChannelClient(self, request, dialect, head)
        for endpoint in list(self._on_connect.values()):
            await self._invoke(endpoint, {"client": client, "request": request})
        return client

    def _check_host(self, request: Request) -> None:
        """Is this server meant (DNS rebinding)? Raises HTTPError 403."""
        host = request.headers.get("host", "localhost").lower()
        name = re.sub(":[0-9]+$", "", host)
        allowed = self.config.allowed_hosts
        if not (any(each.lower() in (name, host, "*") for each in allowed) if allowed is not None
                else is_loopback(name) or not self._local_only):
            raise HTTPError(403, f"Host {host!r} is not allowed: see config.allowed_hosts")

    def _check_origin(self, request: Request) -> None:
        """Is its page allowed (RFC 6455, 10.2), if a browser sent it? Raises HTTPError 403."""
        text = request.headers.get("origin")
        allowed = self.config.allowed_origins
        if allowed is None:
            allowed = [f"{re.split('[+:]', self.url)[0]}://{request.headers.get('host')}"]
        if text is not None and allowed != "*":
            origin = parse_origin(text)
            if origin is None or origin not in map(parse_origin, allowed):
                raise HTTPError(403, f"Origin {text!r} is not allowed: see config.allowed_origins")

    # Start and stop.

    def up(self, port: int | None = None, host: str | None = None, *, block: bool | None = None,
           ssl: ssl_module.SSLContext | None = None, sock: socket.socket | None = None,
           reuse_port: bool = False, open_browser: bool = False) -> str:
        """Serve from a background thread; return the address, such as "http://127.0.0.1:8000".

        In a script it blocks until Ctrl+C, SIGTERM or `down()`; in a REPL or notebook it returns
        at once; `block` overrides. `port` and `host` are those of `config` by default; port 0
        picks a free one; `sock` is a listening socket instead of both. `ssl` is a context with a
        certificate. `reuse_port` lets processes share the port (ValueError where the system does
        not). Raises OSError for a port that cannot be had, RuntimeError if the app serves already;
        and SystemExit, when it blocks, if a handler raises that.
        Example: up(0, "localhost", open_browser=True)
        """
        ready: concurrent.futures.Future[str] = concurrent.futures.Future()
        done, failures = threading.Event(), []

        def run() -> None:
            try:
                asyncio.run(self._serve(ready, done, port, host, ssl, sock, reuse_port))
            except BaseException as error:
                if not ready.done():
                    ready.set_exception(error)
                elif block:
                    failures.append(error)
                else:
                    raise
            finally:
                done.set()

        if block is None:
            block = not hasattr(sys, "ps1") and not sys.flags.interactive  # is nobody typing?
            with contextlib.suppress(RuntimeError):  # no loop runs here
                asyncio.get_running_loop()
                block = False  # as in a notebook
        threading.Thread(target=contextvars.copy_context().run, args=(run,), name="webchannels",
                         daemon=True).start()
        url = ready.result()
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        if block:
            ours = (threading.current_thread() is threading.main_thread()
                    and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
            if ours:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                print(f"Serving at {url} (Ctrl+C stops)", flush=True)
                while not done.wait(1):  # Windows does not interrupt a longer wait
                    pass
            except KeyboardInterrupt:
                with contextlib.suppress(KeyboardInterrupt):  # a second one ends the wait
                    self.down()
            finally:
                if ours:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if failures:
                raise failures[0]
        return url

    async def serve(self, port: int | None = None, host: str | None = None, *,
                    ssl: ssl_module.SSLContext | None = None, sock: socket.socket | None = None,
                    reuse_port: bool = False) -> None:
        """As `up()`, in the event loop that runs; cancel it to stop. Example: await serve(8080)"""
        done = threading.Event()
        try:
            await self._serve(concurrent.futures.Future(), done, port, host, ssl, sock, reuse_port)
        finally:
            done.set()

    async def _serve(self, ready: concurrent.futures.Future[str], done: threading.Event,
                     *where: Any) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError(f"this app serves already at {self.url}; call down() first")
            self._reset()  # a loop that was closed before its time leaves things behind
            self._loop, self._thread, self._done = loop, threading.get_ident(), done
            self._stop, self._context = loop.create_future(), contextvars.copy_context()
            self._threads = asyncio.Semaphore(self.config.max_threads)
            self._handover = Handover(loop, 8 * self.config.max_send_buffer)
        # Once glibc has freed a block of this size, it keeps freed memory for the next message. It
        # gave it back before, and took it again page by page: a third of the time of 1 MiB echoed.
        bytes(4 * 1024 * 1024)
        async with contextlib.AsyncExitStack() as ending:  # what is added last ends first
            ending.callback(self._finish)
            self._open.add(self.config.default_channel)
            if loop.get_exception_handler() is None:
                ending.callback(lambda: loop.get_exception_handler() == self._on_loop_error
                                and loop.set_exception_handler(None))
                loop.set_exception_handler(self._on_loop_error)
            bus = self.config.bus
            if self.config.redis_url and not bus:
                bus = RedisBus(self.config.redis_url, 8 * self.config.max_send_buffer)
            if bus:
                bus.deliver = self._deliver
                await bus.start()
                ending.push_async_callback(bus.stop)
                self._bus = bus
            await self._listen(*where)
            ending.callback(asyncio.ensure_future(self._keep_sweeping()).cancel)
            ending.push_async_callback(self._cut)
            ending.push_async_callback(self._shut_down)
            ending.callback(lambda: [each.close() for each in self._servers])
            if sys.platform != "win32":  # those just accepted have their turn before it is closed
                ending.push_async_callback(asyncio.sleep, 0)
                for each in self._listening:
                    ending.callback(loop.remove_reader, each)
            await self._servers[0].start_serving()
            ready.set_result(self.url)
            logger.info("serving at %s", self.url)
            try:
                error = await self._stop
            except GeneratorExit:  # nobody will ever run this loop again; another may serve
                ending.pop_all()
                raise
            if error:
                raise error

    def _finish(self) -> None:
        if self._handover:
            self._handover.end()
        for _ in range(self._idle):
            self._jobs.put(lambda: False)
        self._reset()

    def _end(self, error: BaseException | None = None) -> None:
        """Have `_serve()` end, if it serves; with this error, which a handler raised."""
        if self._stop and not self._stop.done():
            self._stop.set_result(error)

    async def _listen(self, port: int | None, host: str | None, ssl: ssl_module.SSLContext | None,
                      sock: socket.socket | None, reuse_port: bool) -> None:
        port = self.config.server_port if port is None else port
        host = self.config.server_host if host is None else host
        where: dict[str, Any] = {"sock": sock} if sock else {
            "host": host, "port": port, "reuse_port": reuse_port}
        try:
            server = await asyncio.start_server(  # start_serving: a cancel now would leak it
                self._accept, backlog=1024, start_serving=False, ssl=ssl,
                ssl_handshake_timeout=self.config.handshake_timeout if ssl else None, **where)
        except OSError as error:
            hint = f"cannot serve on port {port} of {host}: {error}"
            if error.errno == errno.EADDRINUSE:
                hint = (f"port {port} on {host} is taken: stop what has it, or choose another: "
                        f"up({port + 1}), or a free one: up(0)")
            raise OSError(error.errno or errno.EADDRNOTAVAIL, hint) from None
        self._servers, self._listening, self._ssl = [server], server.sockets, ssl
        names = [each.getsockname() for each in server.sockets]
        self._local_only = all(isinstance(name, tuple) and is_loopback(name[0]) for name in names)
        scheme = "https" if ssl else "http"
        if not isinstance(names[0], tuple):  # a Unix socket's path, or bytes if it is abstract
            self.url = f"{scheme}+unix://{urllib.parse.quote(names[0], safe='')}"
            return
        address, self.port = names[0][:2]
        shown = "localhost" if address in ("0.0.0.0", "::") else address
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"{scheme}://{shown}:{self.port}"

    async def _listen_again(self, sock: Any) -> None:
        self._servers.append(await asyncio.start_server(
            self._accept, backlog=1024, sock=sock, ssl=self._ssl))

    def down(self) -> None:
        """Stop: no new connections, a Close 1001 to every client, answers in flight finished.

        Returns when that is done, within `config.shutdown_timeout`; in a handler, or on the event
        loop, at once. Calling it again, or without `up()`, does nothing. Example: down()
        """
        done, timeout = self._done, self.config.shutdown_timeout + 2
        alive = self._give(self._end) or self._loop is None  # not in a loop that was closed
        waits = alive and threading.get_ident() != self._thread and _params.get() is None
        if waits and not done.wait(min(timeout, threading.TIMEOUT_MAX)):
            logger.warning("a handler holds the event loop: the server could not stop")

    async def _shut_down(self) -> None:
        """Let what runs finish within the time for it; then end it."""
        self._stopping = True
        for connection in list(self._http):
            connection.work()
        for client in list(self._sockets):
            client._shut()
        end = time.monotonic() + self.config.shutdown_timeout
        while (self._http or self._sockets or self._tasks) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def _cut(self) -> None:
        """End what did not end by itself, also when `_shut_down()` was cancelled."""
        tasks: list[Any] = [*self._tasks, *[each.task for each in self._http if each.task],
                            *[each._task for each in self._sockets if each._task]]
        if tasks:
            logger.warning("%d handlers did not end within config.shutdown_timeout", len(tasks))
        for client in list(self._sockets):
            client._close(1001, "server going down")  # also behind a handler that does not end
            client._abort("the server goes down")
        for connection in list(self._http):
            connection.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0)), *tasks], timeout=1)

    async def _keep_sweeping(self) -> None:
        while True:
            try:
                await self._sweep()
            except Exception as error:
                logger.error("the sweep fails: is a field of config of the wrong type? %r", error)
                await asyncio.sleep(10)

    async def _sweep(self) -> None:
        """One timer for all: deadlines, pings, and those that left long ago."""
        while True:
            settings = self.config
            times = (settings.handshake_timeout, settings.keep_alive_timeout, settings.ping_timeout,
                     settings.ping_interval or 4, settings.disconnected_ttl, 4)
            await asyncio.sleep(max(min(times) / 4, 0.02))
            now = time.monotonic()
            self._here()  # in case that a thread was interrupted before it could wake the loop
            for client in list(self._sockets):
                client._check(now, settings)
            for connection in list(self._http):
                if now >= connection.deadline:
                    connection.expire()
            self._left_at = {client: left for client, left in self._left_at.items()
                             if now - left < settings.disconnected_ttl}

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio tells of each of many failed accepts, with a traceback; now and then will do."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self._warn(f"{error.strerror}: accepting pauses")
        elif context["message"] == "Accept failed on a socket" and not self._stopping:
            self._warn(f"{error}: listening again")  # on Windows asyncio is about to close it
            asyncio.ensure_future(self._listen_again(context["socket"].dup()))
        elif not (self._stopping and "_start_serving" in context["message"]):  # though closed
            loop.default_exception_handler(context)

    def _warn(self, text: str) -> None:
        """Log what could come often, now and then."""
        now = time.monotonic()
        if now > self._warned.get(text, -math.inf) + 10:
            self._warned[text] = now
            logger.warning(text)

    # Threads and forks.

    def _soon(self, call: Callable[..., Any], *values: Any) -> None:
        if self._loop:
            self._loop.call_soon(call, *values)

    def _here(self) -> bool:
        """Is this the loop's thread? Then what others handed over before comes before."""
        here = threading.get_ident() == self._thread
        if here and self._handover:
            self._handover.take()
        return here

    def _give(self, call: Callable[[], Any], size: int = 0) -> bool:
        """Hand this over to the loop; False if nobody serves. Raises TimeoutError."""
        handover = self._handover
        return handover is not None and handover.give(call, size)

    def _call(self, call: Callable[[], Any]) -> Any:
        """Run `call` in the loop's thread, and wait for it; if there is none, here.

        Raises TimeoutError, and then it does not run.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
        if self._give(run):
            concurrent.futures.wait([future], _STUCK)
            if future.cancel():
                raise TimeoutError(_HELD)
        elif future.cancel():
            return call()
        return future.result()

    def _forked(self) -> None:
        """In a forked child: let go of the parent's connections, which open copies keep alive.

        The null device takes their place: objects still take the numbers for theirs.
        """
        writers = [getattr(each, "_writer", None)
                   for each in (*self._http, *self._sockets, self._bus)]
        sockets = [writer.get_extra_info("socket") for writer in writers if writer]
        with open(os.devnull) as null:
            for each in [*self._listening, *sockets]:
                if each.fileno() >= 0:
                    os.dup2(null.fileno(), each.fileno(), inheritable=False)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._done.set()
        self._reset()


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Does this name or address mean the machine itself?"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")  # RFC 6761, 6.3


@functools.lru_cache(maxsize=256)
def parse_origin(text: str) -> tuple[str, str, int] | None:
    """An origin's scheme, host and port (RFC 6454), or None: "null" is nobody's."""
    match = re.fullmatch(f"(https?)://{_HOST.pattern}", text.lower())
    if not match:
        return None
    return match[1], match[2], int(match[3] or (443 if match[1] == "https" else 80))


def _work(jobs: queue.SimpleQueue[Callable[[], bool]]) -> None:
    while jobs.get()():  # holding nothing meanwhile
        pass


def _ids(given: Clients) -> set[str]:
    some = [given] if isinstance(given, (ChannelClient, str)) else given or ()
    return {each if isinstance(each, str) else each.id for each in some}


_apps: weakref.WeakSet[WebChannels] = weakref.WeakSet()
atexit.register(lambda: [*map(WebChannels.down, [*_apps])])
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [*map(WebChannels._forked, [*_apps])])

# -------------------------------------------------------------------------------- default app

app = WebChannels()
config, params, route, channel = app.config, app.params, app.route, app.channel
on_connect, on_disconnect, up, serve = app.on_connect, app.on_disconnect, app.up, app.serve
down, broadcast, subscriptions = app.down, app.broadcast, app.subscriptions
channels_support, channels_script = app.channels_support, app.channels_script
connected_clients, disconnected_clients = app.connected_clients, app.disconnected_clients
subscribe, unsubscribe, unsubscribe_client = app.subscribe, app.unsubscribe, app.unsubscribe_client
unsubscribe_disconnected_clients = app.unsubscribe_disconnected_clients


# -------------------------------------------------------------------------------- channels.js

# A copy of the file of that name: `python3 test_webchannels.py --embed` makes it.
CHANNELS_JS: str = r"""// channels.js: the browser's side of webchannels.py. MIT License.
// One WebSocket carries all channels: bytes, and JSON (subprotocol webchannels.v1).
//   {channel, message, payload?, ref?}    to the server
//   {channel, message, payload?}          from the server
//   {ref, payload} or {ref, error}        its reply to a ref
//   {error, channel, message}             an error without ref
//   an empty message                      a keep-alive, answered by another

// A second copy in the page finds the first. (Object(x) is x, of any type.)
var WebChannels = /** @type {undefined} */ (Object(window).WebChannels) || (() => {
  const TICK = 5000           // ms
  const ASK = 5               // silent ticks until a keep-alive
  const DEAD = 7              // silent ticks until the connection counts as lost
  const DELAY = [1000, 30000] // ms within which to reconnect: at first, at most
  const QUEUE = [2048, 2**20] // messages and bytes that may wait for a connection

  const page = Object(window)
  const path = document.currentScript?.dataset.path || '/'
  const base = location.href // at first: the page may change it

  let state = /** @type {'connecting' | 'open' | 'reconnecting' | 'closed'} */ ('closed')
  let socket = /** @type {WebSocket | null} */ (null) // the only one
  let timer = 0     // to the next tick
  let silent = 0    // ticks since the server was heard
  let failures = 0  // in a row
  let lastRef = 0
  // An item is {data, ref, promise, resolve, reject}: of the reply or, without ref, the sending.
  const queue = new Map()         // items not sent yet -> bytes
  const pending = new Map()       // ref -> item not answered yet
  const subscriptions = new Map() // channel -> item

  /** False if a listener prevents the default. @param {string} type  @param {any} [detail] */
  const emit = (type, detail) =>
    client.dispatchEvent(new CustomEvent(type, { detail, cancelable: true }))

  const complain = (/** @type {object} */ detail) =>
    emit('error', detail) && console.error('WebChannels:', detail)

  const become = (/** @type {typeof state} */ next) => {
    document.documentElement.dataset.webchannels = state = next
    emit('state', next)
  }

  // ---- The connection, and what goes through it ----

  const connect = () => {
    silent = ASK // the handshake has a deadline, too
    try {
      socket = new WebSocket(new URL(path, base).href.replace('http', 'ws'), 'webchannels.v1')
    } catch (error) { // no URL, or one that this page may not use: trying again is no help
      complain({ error: String(error) })
      return end(1000)
    }
    socket.binaryType = 'arraybuffer'
    socket.onopen = opened
    socket.onmessage = received
    socket.onclose = ({ target, code, reason }) => target === socket && end(code, reason)
  }

  // Silence is counted, not timed: a hidden tab ticks late, a frozen one not at all, but each hears
  // what the server said before it ticks twice.
  const tick = () => {
    clearTimeout(timer)
    timer = setTimeout(tick, TICK)
    if (!socket) return connect()
    if (++silent >= DEAD) return end()
    if (socket.readyState !== WebSocket.OPEN) return
    failures = 0 // not before: a server may let us in and drop us
    if (silent === ASK) socket.send('')
  }

  /** Connects or asks the server now, unless that is under way. */
  const wake = () => {
    if (state === 'closed') return
    failures = 0
    if (socket && silent >= ASK) return
    silent = ASK - 1
    tick()
  }

  const opened = () => {
    silent = 0
    subscriptions.forEach(renew)
    for (const item of queue.keys()) send(item)
    queue.clear()
    become('open')
    emit('open')
  }

  const received = (/** @type {MessageEvent} */ { data }) => {
    silent = 0
    if (data === '') return
    const m = typeof data === 'string' ? JSON.parse(data) : { message: data }
    const item = pending.get(m.ref) // if it is still wanted
    const detail = 'payload' in m ? m : m.message
    if ('error' in m) m.ref ? item?.reject(new Error(m.error)) : complain(m)
    else if (m.ref) item?.resolve(m.payload)
    else if (emit('message', detail)) page.parse_payload(detail)
  }

  const end = (code = 1006, reason = '') => {
    const wasOpen = state === 'open'
    const next = code === 1000 || code === 1008 ? 'closed' : 'reconnecting' // the server's will
    clearTimeout(timer)
    socket?.close()
    socket = null
    for (const { reject } of pending.values()) reject(new DOMException('Lost', 'NetworkError'))
    if (next === 'closed') {
      for (const { reject } of queue.keys()) reject(new DOMException('Closed', 'AbortError'))
      queue.clear()
    } else {
      // Full jitter: a restarted server has all its clients coming, hidden tabs on the full second.
      const most = Math.min(DELAY[1], DELAY[0] * (document.hidden ? 10 : 1) * 2 ** failures++)
      timer = setTimeout(tick, Math.random() * most)
    }
    become(next) // last, for listeners may open() or close()
    if (wasOpen) emit('close', { code, reason })
  }

  const deferred = (/** @type {any} */ item) => {
    item.promise = new Promise((resolve, reject) => Object.assign(item, { resolve, reject }))
    return item
  }

  const send = (/** @type {any} */ item) => {
    if (socket?.readyState === WebSocket.OPEN) { // a closing one swallows it
      socket.send(item.data)
      if (item.ref) pending.set(item.ref, item)
      else item.resolve()
    } else if (state === 'closed') item.reject(new DOMException('Closed', 'AbortError'))
    else {
      const copy = new Blob([item.data]) // the caller may reuse its buffer
      if (typeof item.data !== 'string') item.data = copy
      const bytes = [...queue.values()].reduce((sum, size) => sum + size, copy.size)
      if (queue.size < QUEUE[0] && bytes <= QUEUE[1]) queue.set(item, copy.size)
      else item.reject(new DOMException('Queue full', 'QuotaExceededError'))
    }
    return item.promise
  }

  const renew = (/** @type {any} */ { resolve, reject }, /** @type {string} */ channel) =>
    client.request(channel, 'subscribe', undefined, { timeout: Infinity }).then(resolve)
      .then(() => emit('subscribed', channel), error => {
        if (error instanceof DOMException) return // lost: the next connection renews it
        subscriptions.delete(channel)
        reject(error)
        complain({ error: error.message, channel, message: 'subscribe' })
      })

  // ---- What the page uses ----

  /** Events and their `detail`: 'state', the new one; 'open'; 'close' {code, reason}; 'subscribed',
   * the channel; 'message', what parse_payload gets; 'error' {error, channel, message}. */
  class Client extends EventTarget {
    /** Also in `<html data-webchannels="...">`. */
    get state() { return state }

    /** Resolves when handed over; rejects when too much waits, or on close(). A reply is a push.
     * @param {string} channel  @param {string} message  @param {any} [payload] */
    async sendMessageTo(channel, message, payload) {
      return send(deferred({ data: JSON.stringify({ channel, message, payload }) }))
    }

    /** The same for bytes, to channel("/"). @param {BufferSource | Blob} data */
    async sendBinary(data) { return send(deferred({ data })) }

    /** Resolves with the reply. Rejects with the server's error, or a DOMException: TimeoutError,
     * AbortError, NetworkError (connection lost: nobody knows whether it ran).
     * @param {string} channel  @param {string} message  @param {any} [payload]
     * @param {{ timeout?: number, signal?: AbortSignal }} [options]  timeout in ms, or Infinity */
    async request(channel, message, payload, { timeout = 30000, signal } = {}) {
      signal?.throwIfAborted()
      const ref = ++lastRef
      const item = deferred({ ref, data: JSON.stringify({ channel, message, payload, ref }) })
      const late = setTimeout(item.reject, Math.min(timeout, 2e9),
        new DOMException('No reply in time', 'TimeoutError'))
      const abort = () => item.reject(signal?.reason)
      signal?.addEventListener('abort', abort)
      return send(item).finally(() => {
        clearTimeout(late)
        signal?.removeEventListener('abort', abort)
        queue.delete(item)
        pending.delete(ref)
      })
    }

    /** Gives pushes with a payload to `handler`, not to parse_payload, until the result is called.
     * @param {string} path  '/channel/message', where `:name` stands for any segment
     * @param {(payload: any, info: any) => void} handler  info: channel, message, the `:name`s */
    channel(path, handler) {
      const segments = path.split('/').map(segment => segment[0] === ':'
        ? `(?<${segment.split(':')[1]}>[^/]+)` : segment.replace(/\W/g, '\\$&'))
      const pattern = RegExp(`^${segments.join('/')}$`)
      const listener = (/** @type {any} */ event) => {
        const { channel, message, payload } = event.detail
        const match = pattern.exec(`/${channel}/${message}`)
        if (!match || payload === undefined) return
        event.preventDefault()
        handler(payload, { ...match.groups, channel, message })
      }
      client.addEventListener('message', listener)
      return () => client.removeEventListener('message', listener)
    }

    /** Lasts over reconnects. Resolves when the server confirms it, rejects when it refuses.
     * @param {string} channel  @returns {Promise<any>} */
    subscribe(channel) {
      if (subscriptions.has(channel)) return subscriptions.get(channel).promise
      const item = deferred({})
      item.promise.catch(() => { }) // renew() complains
      subscriptions.set(channel, item)
      if (state === 'open') renew(item, channel)
      return item.promise
    }

    /** @param {string} channel */
    async unsubscribe(channel) {
      subscriptions.get(channel)?.reject(new DOMException('Unsubscribed', 'AbortError'))
      subscriptions.delete(channel)
      if (state === 'open') return client.request(channel, 'unsubscribe')
    }

    /** Connects, at once. */
    open() {
      if (state === 'closed') become('connecting')
      wake()
    }

    /** Stays away until open(). Rejects what waits. */
    close() { end(1000) }
  }

  const client = new Client()
  // Captured, because 'resume' goes to the document.
  for (const type of ['online', 'offline', 'pageshow', 'resume']) addEventListener(type, wake, true)
  document.addEventListener('visibilitychange', () => document.hidden || wake())
  addEventListener('pagehide', e => e.persisted && state !== 'closed' && end()) // for the bfcache

  page.Genie = { ...page.Genie, WebChannels: client }
  page.parse_payload ||= (/** @type {any} */ payload) => {
    console.log(payload)
    console.log('Overwrite window.parse_payload to handle messages from the server')
  }

  client.open()
  return client
})()

WebChannels.subscribe(document.currentScript?.dataset.channel || '____')
  .then(() => console.log('Subscription ready'), () => { })
"""


# --------------------------------------------------------------------------------------- demo

DEMO_PAGE: str = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>webchannels</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --accent: light-dark(#0b736d, #4fd0c5) }
body { max-width: 1200px; margin: auto; padding: 1em; font: 1em/1.5 system-ui, sans-serif }
main { display: grid; gap: 1em; grid: auto / repeat(auto-fit, minmax(min(30em, 100%), 1fr)) }
section { padding: 1em; border-radius: 9px; background: light-dark(#eef3f5, #1c2229) }
header, form { display: flex; gap: 1em; align-items: center } canvas { width: 100% }
h1, h2 { flex: 1; margin: 0; font-size: 1.2em } form input { flex: 1; min-width: 0 }
b, canvas, button { color: var(--accent) } canvas, pre { height: 200px; overflow: auto }
pre { display: flex; flex-flow: column-reverse; white-space: pre-wrap; overflow-wrap: anywhere }
form * { padding: 6px 9px; border: 1px solid; border-radius: 9px; font: inherit; background: none }
</style>
<header><h1>webchannels</h1><b id="state" role="status">WebSocket connecting</b></header>
<p>A page and its server, talking. Open a second tab. Stop the server, and start it again.</p>
<label><input id="live" type="checkbox" checked autocomplete="off"> live</label>
<canvas id="plot" height="400" role="img" aria-label="A curve that moves with each push"></canvas>
<main><section><h2>Chat makes waves</h2><p>You are <b id="me">new</b>. Here: <b id="people"></b></p>
<pre id="chat" role="log" aria-label="Chat" tabindex="0"></pre>
<form id="say" method="dialog"><input id="text" aria-label="Message" required><button>Send</button>
</form></section><section><h2>On the wire</h2><p id="answer" role="status">Without the wave</p>
<pre id="wire" role="log" aria-live="off" aria-label="Frames" tabindex="0"></pre>
<form id="echo" method="dialog"><input id="payload" aria-label="Payload"><button>Echo</button>
</form></section></main><script nonce="NONCE">
// To show what is on the wire. A page that shows no such thing needs nothing of this.
const show = (arrow, frame) => frame.includes('"message":"tick"') || wire.append(arrow, frame, '\n')
window.WebSocket = class extends WebSocket {
  constructor (...given) { super(...given).addEventListener('message', e => show('↓ ', e.data)) }
  send (frame) { show('↑ ', frame); super.send(frame) }
}
</script>SUPPORT<script nonce="NONCE">
WebChannels.addEventListener('state', e => { state.textContent = `WebSocket ${e.detail}` })
WebChannels.subscribe('chat')
WebChannels.channel('/chat/name', name => { me.textContent = name })
WebChannels.channel('/chat/people', names => { people.textContent = names.join(', ') })
WebChannels.channel('/chat/said', line => chat.append(line, '\n')) // as text, never as HTML
say.onsubmit = () => WebChannels.sendMessageTo('chat', 'say', text.value).then(() => say.reset())
echo.onsubmit = async () => {
  const start = performance.now()
  const reply = await WebChannels.request('____', 'echo', payload.value).catch(String)
  answer.textContent = `${reply} (${(performance.now() - start).toFixed(1)} ms)`
}
const pen = plot.getContext('2d'), heights = Array(300).fill(0)
WebChannels.channel('/wave/tick', height => { heights.copyWithin(0, 1)[299] = height })
live.onchange = () => WebChannels[live.checked ? 'subscribe' : 'unsubscribe']('wave')
setInterval(() => {
  plot.width = 2 * plot.clientWidth // this clears it
  Object.assign(pen, { lineWidth: 4, strokeStyle: getComputedStyle(plot).color })
  heights.forEach((height, i) => pen.lineTo(i * plot.width / 299, 200 - 180 * height))
  pen.stroke()
}, matchMedia('(prefers-reduced-motion: reduce)').matches ? 1000 : 50)
</script>
"""


def demo_app() -> WebChannels:
    """The app behind `python3 webchannels.py`: a new one, so that importing registers nothing."""
    app = WebChannels()
    app.channel("/____/echo", lambda payload: payload)
    template = DEMO_PAGE.replace("SUPPORT", app.channels_support("wave", nonce="NONCE"))
    said_at = 0.0

    @app.route("/")
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        return Response(template.replace("NONCE", nonce), headers={
            "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
            f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; base-uri 'none'"})

    @app.on_disconnect
    def show_people() -> None:
        app.broadcast("chat", "people", [one.data["name"] for one in app.connected_clients("chat")])

    @app.channel("/chat/subscribe")
    def enter(client: ChannelClient) -> None:
        client.data["name"] = f"{secrets.choice(('Otter', 'Heron', 'Raven'))} {client.id[:2]}"
        app.subscribe(client, "chat")
        client.send("name", client.data["name"])
        show_people()

    @app.channel("/chat/say")
    def say(client: ChannelClient, payload: Any) -> None:
        nonlocal said_at
        said_at = time.monotonic()
        text = str(payload)[:500].encode("utf-8", "replace").decode()  # half a pair is not sent
        app.broadcast("chat", "said", f"{client.data.get('name', 'Somebody')}: {text}")

    def wave() -> None:
        while True:
            time.sleep(0.05)
            age = time.monotonic() - said_at
            app.broadcast("wave", "tick", math.sin(6 * age) * (0.1 + 0.9 * math.exp(-age / 2)))

    threading.Thread(target=wave, daemon=True).start()
    return app


def main() -> None:
    """The command line: serves the demo."""
    parser = argparse.ArgumentParser(prog="webchannels", description="Serve the webchannels demo.")
    parser.add_argument("--host", default="127.0.0.1", help="the address (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (%(default)s)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--version", action="version", version=f"webchannels {__version__}")
    options = parser.parse_args()
    try:
        demo_app().up(options.port, options.host, block=True, open_browser=options.open)
    except (OSError, OverflowError) as error:
        sys.exit(f"webchannels: {getattr(error, 'strerror', None) or error}")


if __name__ == "__main__":
    main()
