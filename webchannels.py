"""webchannels: browser-server messaging over WebSockets, in one file with no dependency.

    import time
    from webchannels import *

    PAGE = '''<!doctype html><meta name="viewport" content="width=device-width"><h1 id=clock></h1>
    <input id=who placeholder="Your name">''' + channels_support("room") + '''<script>
    WebChannels.channel('/room/time', text => { clock.textContent = text })
    who.onchange = () => WebChannels.request('room', 'hi', who.value).then(alert)</script>'''
    route("/", lambda: PAGE)
    channel("/room/hi", lambda payload: f"Hello, {payload}!")
    print(up(block=False))            # http://127.0.0.1:8000
    while True:
        broadcast("room", "time", time.strftime("%X"))
        time.sleep(1)

`route()` maps HTTP paths to handlers, and `channel()` maps WebSocket messages to handlers in the
same way: `/room/hi` is the message `hi` on the channel `room`. Both are decorators, too. Handlers
are `def` or `async def`; they take nothing and ask `params()`, or take what they need by name:
`def hi(payload, client)`. `channels_support()` puts the browser client into the page, `broadcast()`
pushes to every subscriber of a channel, `keep()` lets those that were away have what they missed,
and `connected_clients()` lists who is there. `connect()` is a client in Python.

In the page, `WebChannels` has `sendMessageTo(channel, message, payload)`, `request()` with the
same and `{timeout, signal}` for the reply, `channel("/room/:name", (payload, {name}) => …)` for
what is broadcast with a payload, `subscribe(channel)`, `unsubscribe(channel)`, `open()`,
`close()`, `state` and `address`, and the events `state`, `open`, `close`, `subscribed`, `missed`,
`message`, `error` and `debug`. A broadcast without a payload goes to `window.parse_payload(text)`.

The rooms of this file, in the order in which data flows: config, log, router, messages, http,
websocket, connections, history, bus, app, client, default app, channels.js, demo.
"""

# Copyright (c) 2026 webchannels contributors
# SPDX-License-Identifier: MIT
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software
# and associated documentation files (the "Software"), to deal in the Software without
# restriction, including without limitation the rights to use, copy, modify, merge, publish,
# distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
# Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
# BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

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
import http
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import queue
import random
import re
import secrets
import signal
import socket
import ssl as ssl_module
import stat
import sys
import threading
import time
import traceback
import types
import typing
import urllib.parse
import weakref
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence, TypeVar, Union

__version__ = "1.1.0.dev0"
__all__ = [
    "Bus", "ChannelClient", "ChannelError", "ClientConnection", "Config", "HTTPError", "Received",
    "Request", "Response", "WebChannels", "broadcast", "channel", "channels_script",
    "channels_support", "config", "connect", "connected_clients", "disconnected_clients", "down",
    "keep", "on_connect", "on_disconnect", "params", "route", "serve", "static", "subscribe",
    "subscriptions", "unsubscribe", "unsubscribe_client", "unsubscribe_disconnected_clients", "up",
]
H = TypeVar("H", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------- config


def expect(value: Any, kinds: Any, rule: str) -> None:
    """Raises TypeError, with the rule, for a value of another kind."""
    if not isinstance(value, kinds):
        raise TypeError(f"{rule}, not {value!r:.80}")


@dataclass
class Config:
    """Settings for `up()`: sizes in bytes, times in seconds.

    server_host, server_port: what up() listens on when it is not told; port 0 picks a free one.
    websockets_server: False: every WebSocket handshake is answered 404.
    websockets_path: where the WebSocket lives; a page may have the same path.
    base_path: the prefix that a reverse proxy strips, "/live", or a whole URL.
    default_channel: the channel of channels_support().
    allowed_origins: whose pages may connect and post. None: same origin only;
        "https://example.com", or several; "*": any.
    allowed_hosts: the Host names that are answered. None: any, but on a loopback address loopback
        names only (DNS rebinding).
    max_header_size, max_body_size: of a request; past them 431 or 414, and 413.
    max_message_size: of a WebSocket message, inflated; past it close 1009.
    max_inflation: times a text may inflate (and 64 KiB a second); past it close 1009.
    max_clients: WebSockets, and as many HTTP connections; past it 503.
    max_subscriptions: channels for each client.
    max_threads: for threaded=True handlers; when all are busy, the next one waits.
    max_send_buffer: a client this far behind is closed (1013).
    handshake_timeout: for a request, a message or a closing handshake to arrive.
    keep_alive_timeout: for an HTTP connection to be idle.
    ping_interval, ping_timeout: a client silent for so long is sent a ping (0: never), and dropped
        if it is silent for so long after it.
    shutdown_timeout: for handlers to finish and clients to close.
    abandoned_timeout: for handlers whose client has left; then they are cancelled.
    disconnected_ttl: for which disconnected_clients() lists a client that left.
    kept_ttl: for which keep() keeps a message.
    max_kept, max_kept_total: of what is kept of a channel, with what holds it in memory; and of all
        channels: past it, the least used are forgotten.
    compression, compression_threshold: permessage-deflate (RFC 7692), without context takeover;
        shorter messages are sent as they are.
    json_default: as in json.dumps(default=...).
    redis_url: redis[s]://[[user]:password@]host[:port][/name]: broadcasts reach all processes that
        share it.
    bus: what carries broadcasts in place of Redis.
    Example: Config(server_port=8080)
    """

    server_host: str = "127.0.0.1"
    server_port: int = 8000
    websockets_server: bool = True
    websockets_path: str = "/"
    base_path: str = ""
    default_channel: str = "____"
    allowed_origins: str | Sequence[str] | None = None
    allowed_hosts: Sequence[str] | None = None
    max_header_size: int = 16 * 1024
    max_body_size: int = 1024 * 1024
    max_message_size: int = 1024 * 1024
    max_inflation: int = 50
    max_clients: int = 10_000
    max_subscriptions: int = 1000
    max_threads: int = 32
    max_send_buffer: int = 1024 * 1024
    handshake_timeout: float = 10
    keep_alive_timeout: float = 75
    ping_interval: float = 20
    ping_timeout: float = 20
    shutdown_timeout: float = 5
    abandoned_timeout: float = 10
    disconnected_ttl: float = 60
    kept_ttl: float = 86_400
    max_kept: int = 16 * 1024 * 1024
    max_kept_total: int = 64 * 1024 * 1024
    compression: bool = True
    compression_threshold: int = 1024
    json_default: Callable[[Any], Any] | None = None
    redis_url: str | None = field(default=None, repr=False)
    bus: Bus | None = None

    if not typing.TYPE_CHECKING:  # type checkers would take any name for a field
        def __setattr__(self, name: str, value: Any) -> None:
            fields = self.__dataclass_fields__
            if name not in fields:
                import difflib
                near = difflib.get_close_matches(name, fields, 3, 0.4)
                raise AttributeError(f"config has no {name}: is it {' or '.join(near or fields)}?")
            rule = str(fields[name].type)  # such as "str | None"
            if "Sequence" in rule and isinstance(value, str):
                value = [value]
            kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "Bus": Bus,
                     "None": type(None), "Sequence": (list, tuple, set), "Callable": Callable}
            found = [kinds.get(each.partition("[")[0], object) for each in rule.split(" | ")]
            expect(value, tuple(found), f"config.{name} is {rule}")
            if name.endswith("_path") and not re.match("/|https?://|$", value):
                raise ValueError(f"config.{name} begins with a slash: {'/' + value!r}")
            super().__setattr__(name, value)


# ---------------------------------------------------------------------------------------- log

_TELL_AGAIN = 10.0  # seconds


def printable(text: str, size: int = 500) -> str:
    """`text` without its middle if it is longer; what could forge a line is escaped."""
    if len(text) > size:
        text = f"{text[:size // 2]} ... {text[-size // 2:]}"
    return "".join([each if each.isprintable() else repr(each)[1:-1] for each in text])


class Sparing:
    """Lets a kind of line into the log once in `_TELL_AGAIN` seconds, and counts the others.

    A kind is what `extra={"kind": ...}` says (None: each is its own), or else the line's template,
    and with a traceback the places that it went through. What a peer sends is in the arguments.
    """

    def __init__(self) -> None:
        # Of each kind: how many lines were kept back; when one was told, its level and text.
        self._kinds: dict[Any, list[Any]] = {}

    def keeps_back(self, kind: Any) -> bool:
        """Was such a line told lately? Then it is counted."""
        known = self._kinds.get(kind)
        if known:
            known[0] += 1
        return known is not None

    def filter(self, record: logging.LogRecord) -> bool:
        kind = getattr(record, "kind", str(record.msg)) or record
        trace = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
        places = frozenset([(frame.f_code, number) for frame, number in trace])
        kind = kind, places if len(self._kinds) < 1000 else None
        if self.keeps_back(kind):
            return False
        text = record.getMessage()
        line = printable(text)
        if line != text:
            record.msg, record.args = line, None
        if kind[0] is not record:  # which has no like
            self._kinds[kind] = [0, time.monotonic(), record.levelno, line]
        if record.exc_info:  # logging makes a text of it only where there is none
            lines = logging.Formatter().formatException(record.exc_info).split("\n")
            lines = [*lines[:50], *lines[50:][-50:]]
            record.exc_text = "\n".join([f"  {printable(each)}" for each in lines])
        return True

    def tell_counts(self, now: float = math.inf) -> None:
        """Tell how many lines were kept back, where it is time for it; without `now`, of all."""
        for kind, (kept_back, told, level, line) in list(self._kinds.items()):
            if now >= told + _TELL_AGAIN:
                self._kinds.pop(kind, None)  # unless another app's thread has done so
                if kept_back:
                    logger.log(level, "%d more like this: %s", kept_back, line, extra=ALWAYS)


ALWAYS: dict[str, Any] = {"kind": None}  # the `extra` of lines that no peer can cause
logger = logging.getLogger("webchannels")
# A second copy of this file, or a reload, has the same logger, and so the same filter.
_filtering: Any = [getattr(each, "__self__", None) for each in logger.filters]
sparing: Sparing = next((each for each in _filtering if hasattr(each, "keeps_back")), Sparing())
logger.addFilter(sparing.filter)


# ------------------------------------------------------------------------------------- router

# What `:name::int` and the others match, most specific first: the order in which they are tried.
# ASCII digits only: int() and float() would also take "1_0", " 1" and other scripts' digits.
_SEGMENTS: dict[type, re.Pattern[str]] = {
    int: re.compile(r"-?[0-9]{1,300}"),
    float: re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?"),
    str: re.compile(r"[^/]+"),  # %2F must not get past what guards `/a/:b`
}
Found = tuple[dict[str, Any], tuple[Any, ...]]  # by method; the values in the path


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
        expect(handler, Callable, "a handler is a function (and @on_connect has no parentheses)")
        self.handler, self.threaded = handler, threaded
        self.told = False  # that it returned None
        self.name: str = getattr(handler, "__qualname__", repr(handler))
        self.path_names = [_parse_segment(part)[0] for part in path.split("/") if part[:1] == ":"]
        for rule, broken in {
                "begins with a slash": path[:1] != "/",
                "has no name twice": len(set(self.path_names)) < len(self.path_names),
                "has :name, :name::int or :name::float for what varies": re.search("/[<{*]", path),
                "has no query: ask for its names": supplied is None and re.search("[?#]", path),
                "of a message is /channel/message": supplied and re.fullmatch("/[^/]+", path),
        }.items():
            if broken:
                raise ValueError(f"a path {rule}: not {path!r}")
        if (inspect.isfunction(handler) and self.name in __all__
                and handler.__globals__.get(self.name) is globals()[self.name]):
            raise ValueError(f"the handler {self.name} would take the place of {self.name}() of "
                             "webchannels: give it another name")
        called = (handler, type(handler).__call__)  # an object may be the handler
        if threaded and any(map(inspect.iscoroutinefunction, called)):
            raise TypeError(f"{self.name} is async: it cannot be threaded=True as well")
        parameters = inspect.signature(handler, **_UNEVALUATED).parameters.values()
        self.takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        named = [each for each in parameters if not each.kind.name.startswith("VAR_")]
        self.bound: set[str] = set()  # what functools.partial() binds is the program's alone
        inner: Any = handler
        while inner is not None:
            partial = isinstance(inner, functools.partial)
            self.bound.update(inner.keywords if partial else ())
            inner = inner.func if partial else getattr(inner, "__wrapped__", None)
        self.takes = [each.name for each in named if each.name not in self.bound]
        self.required = [each.name for each in named if each.default is each.empty]
        known = {*self.path_names, *(self.required if supplied is None else supplied)}
        self.takes_more = self.takes_any or bool({*self.takes} - {*self.path_names, "request"})
        # A single name that each call has can be given by position, which is twice as fast; but a
        # decorator's function may take, by name alone, what the function in it takes.
        code = handler.__code__ if inspect.isfunction(handler) else None
        self.single = (self.takes[0] if len(named) == len(known.intersection(self.takes)) == 1
                       and code and code.co_varnames[:code.co_argcount] == (*self.takes,)
                       and not self.takes_any else None)
        for each in named:
            if each.kind is each.POSITIONAL_ONLY or each.name in {*self.required} - known:
                raise TypeError(f"{self.name} asks for {each.name!r} ({each.kind.description}), "
                                f"but it can ask for {', '.join(sorted(known))}, by name")

    def run(self, given: dict[str, Any]) -> Any:
        """Call the handler with what it takes of `given`, all of which params() has."""
        _params.set(given)  # in a context of its own
        names = {*given} - self.bound if self.takes_any else self.takes
        try:
            if self.single:
                return self.handler(given[self.single])
            if not names:
                return self.handler()
            return self.handler(**{name: given[name] for name in names if name in given})
        except StopIteration as error:  # before Python 3.12 no future can hold it
            raise RuntimeError(f"{self.name} raised StopIteration") from error

    def tell_slow(self, seconds: float) -> None:
        """It held the event loop for so long."""
        logger.warning("%s held the event loop for %d ms: make it a `def` with threaded=True, or "
                       "let it await what takes long", self.name, seconds * 1000,
                       extra={"kind": self.name})

    @types.coroutine
    def steps(self, coroutine: Any) -> Any:
        """Await a coroutine, and tell of a step that held the event loop."""
        step, value = coroutine.send, None
        while True:
            begun = time.monotonic()
            try:
                awaited = step(value)
            except StopIteration as end:
                return end.value
            finally:
                value = None  # an error that stayed would hold this frame, which holds it
                if (seconds := time.monotonic() - begun) > _SLOW:
                    self.tell_slow(seconds)
            try:
                step, value = coroutine.send, (yield awaited)
            except BaseException as error:
                step, value = coroutine.throw, error


def split_path(path: str) -> list[str]:
    """A request's path by segments, decoded: %2F is no separator. Raises UnicodeDecodeError."""
    segments = path.split("/")[1:]
    if "%" in path:
        segments = [urllib.parse.unquote(segment, errors="strict") for segment in segments]
    return segments


class Router:
    """Maps paths such as `/a/:name` and `/a/:n::int`: for routes, for channels, for what is kept.

    Static paths are one dict look-up, others are found in a tree by segments. Static segments win
    over typed ones, int over float over str. Each method under a path may have its own endpoint.
    """

    def __init__(self) -> None:
        self._static: dict[str, Found] = {}
        self._tree: dict[Any, Any] = {}  # by segment or type; the endpoints are under None

    def add(self, path: str, endpoint: Any, method: str = "") -> None:
        """Register `endpoint` in place of any that is there."""
        node = self._tree
        for part in path.split("/")[1:]:
            node = node.setdefault(_parse_segment(part)[1] if part[:1] == ":" else part, {})
        endpoints = node[None] = {**node.get(None, {}), method: endpoint}  # seen as a whole
        if "/:" not in path:
            self._static[path] = (endpoints, ())

    def find(self, path: str, decode: bool = False) -> Found | None:
        """What is at `path`, which may have to be decoded. Raises UnicodeDecodeError."""
        if path in self._static:
            return self._static[path]
        segments = split_path(path) if decode else path.split("/")[1:]
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


# ----------------------------------------------------------------------------------- messages

_MAX_NAME = 256  # characters of a channel's or a message's name
_MAX_DEPTH = 500  # arrays and objects inside each other; a stack of 512 KiB takes 2,000
# What a bracket does to the depth: 1, or 255, which as a signed byte is -1.
_STEPS, _NO_STEPS = bytes.maketrans(b"[]{}", b"\1\xff\1\xff"), bytes({*range(256)} - {*b'"[]{}'})
_BYTES = (bytes, bytearray, memoryview)
_PLAIN = {str, dict, list, int, float, bool, type(None)}  # sooner found than what it is not


class ChannelError(Exception):
    """For handlers: the sender is told it, up to 8,192 characters.

    Example: raise ChannelError("Full")
    """


# int() raises ValueError: for NaN and the infinities, which are no JSON, and for integers of over
# 4,300 digits, whose cost is quadratic; old Pythons have to be told.
_decoder: Any = json.JSONDecoder(
    parse_constant=int, parse_int=None if hasattr(sys, "set_int_max_str_digits") else
    lambda text: int(text if len(text) <= 4300 else ""))
_json = functools.partial(json.JSONEncoder, ensure_ascii=False, separators=(",", ":"))
_encoder = _json()
_quote = json.encoder.encode_basestring  # a string; what is not ASCII stays as it is


def dump_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON, with null for NaN and the infinities as in JavaScript. Raises TypeError, ValueError."""
    if value.__class__ is str:
        return _quote(value)
    encoder = _encoder if default is None else _json(default=default)
    try:
        text = encoder.encode(value)
        if "NaN" in text or "Infinity" in text:  # or a string has the word, and stays as it is
            # Quicker than reading it. No text of the encoder has a NUL or an SOH.
            parts = text.replace("\\\\", "\0").replace('\\"', "\1").split('"')
            outside = '"'.join(parts[::2]).replace("-Infinity", "null")
            parts[::2] = outside.replace("Infinity", "null").replace("NaN", "null").split('"')
            text = '"'.join(parts).replace("\1", '\\"').replace("\0", "\\\\")
        return text
    except RecursionError:
        raise ValueError("the payload is circular or nested too deep") from None
    except TypeError as error:
        raise TypeError(f"{error}: set config.json_default to what converts it") from None


def to_utf8(text: str) -> bytes:
    """UTF-8; half of a surrogate pair, which has none, as JSON's escape for it: `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace")


def check_name(channel: str) -> None:
    """Raises ValueError for what no channel can be called."""
    expect(channel, str, "a channel's name is a str")
    if not channel or len(channel) > _MAX_NAME or channel.strip("/") != channel:
        raise ValueError(f"a channel's name has 1 to {_MAX_NAME} characters, the first and the "
                         f"last no slash, as in 'room': not {printable(channel, 40)!r}")


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, or is nested too deep."""
    check_depth(text)
    return _decoder.decode(text)


def check_depth(text: str) -> None:
    """Raises ValueError past `_MAX_DEPTH`, where the decoder, recursive C, might crash."""
    if text.find("[", _MAX_DEPTH) < 0 and text.find("{", _MAX_DEPTH) < 0:
        return
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        data = text.replace(r"\\", "").replace(r'\"', "").encode("ascii", "ignore")
        data = data.translate(_STEPS, _NO_STEPS).replace(b'""', b"")  # most strings are gone
        steps = b"".join(data.split(b'"')[::2]).replace(b"\1\xff", b"")  # 1 and -1 cancel out
        if max(itertools.accumulate(memoryview(steps).cast("b")), default=0) > _MAX_DEPTH:
            raise ValueError("JSON nested too deep")


def read_envelope(data: str | bytes) -> dict[str, Any] | None:
    """The JSON object with a "channel" that this is, or None; of bytes, that with its payload."""
    try:
        text = data if isinstance(data, str) else data[:data.index(b"\n", 0, 8192)].decode()
        if not text.startswith("{"):
            text = text.lstrip(" \t\r\n")
            if not text.startswith("{"):
                return None
        if len(text) > _MAX_DEPTH:  # most are shorter, and there are many
            check_depth(text)
        envelope, end = _decoder.scan_once(text, 0)  # raw_decode() is slower
    except (ValueError, RecursionError, StopIteration):
        return None
    if "channel" not in envelope or end < len(text) and text[end:].strip(" \t\r\n"):
        return None
    if isinstance(data, bytes):
        payload = data[data.index(b"\n") + 1:]
        if envelope.setdefault("payload", payload) is not payload:
            return None  # it has two
    return envelope  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------- http

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_TEXT = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")  # a field's value
# Field lines (RFC 9112, 5); neither folded ones nor white space before the colon match.
_FIELDS = re.compile(rf"(?:\r\n{_TOKEN.pattern}:{_TEXT.pattern})*")
_HEAD = re.compile(rf"({_TOKEN.pattern}) ([!-\"$-~]+) HTTP/([0-9])\.([0-9])({_FIELDS.pattern})")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]{1,18}")  # no sign, no space, not two of them
_QUOTED = r'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*"'  # RFC 9110, 5.6.4
_EXTENSION = rf"[ \t]*;[ \t]*{_TOKEN.pattern}(?:[ \t]*=[ \t]*(?:{_TOKEN.pattern}|{_QUOTED}))?"
_CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:{_EXTENSION})*".encode("latin-1"))
_BAD_LINE_END = re.compile(rb"\r(?=[^\n])|(?<!\r)\n")
_MAX_FIELDS = 100  # of a request's header
_TOO_LARGE = "Body too large (config.max_body_size)"
# No browser sends these in a form; to make sense of a million of them takes half a second.
_NOT_IN_A_FORM = re.compile(rb"[^\x00-\x7f]|%(?![0-9A-Fa-f]{2})")
_parse_form = functools.partial(urllib.parse.parse_qsl, keep_blank_values=True, errors="strict",
                                max_num_fields=1000)
_PHRASES = {each.value: each.phrase for each in http.HTTPStatus}
_date = functools.lru_cache(maxsize=100)(functools.partial(email.utils.formatdate, usegmt=True))
_RANGE = re.compile(r"(?i:bytes)=[ \t]*(?:([0-9]{1,30})-([0-9]{0,30})|-([0-9]{1,30}))[ \t]*")
_TAG = re.compile(r'(?:W/)?"[^"]*"')  # RFC 9110, 8.8.3
# Segments of a path that name no file: none, hidden ones, "..", and what has a separator in it; on
# Windows also streams, drives, wildcards, devices, and ends that the system would not look at.
_NOT_ON_WINDOWS = (r"|.*[:*?\"<>|].*|.*[. ]"
                   r"|(?i:con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?")
_NO_NAME = re.compile(
    r"(?s:|\..*|.*[/\\\x00-\x1f].*" + (_NOT_ON_WINDOWS if os.name == "nt" else "") + ")")
# A FIFO is not waited for, and a terminal does not become ours.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
# What old Pythons do not know, or call by another name than new ones.
_TYPES = {
    ".avif": "image/avif", ".flac": "audio/flac", ".ico": "image/x-icon", ".js": "text/javascript",
    ".m4a": "audio/mp4", ".map": "application/json", ".md": "text/markdown",
    ".mjs": "text/javascript", ".ogg": "audio/ogg", ".ogv": "video/ogg", ".opus": "audio/ogg",
    ".otf": "font/otf", ".ttf": "font/ttf", ".vtt": "text/vtt", ".wav": "audio/wav",
    ".webp": "image/webp", ".woff": "font/woff", ".woff2": "font/woff2",
}


class HTTPError(Exception):
    """An answer for a handler to raise; `text` has a default. Example: raise HTTPError(401)"""

    def __init__(self, status: int, text: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.text = _PHRASES.get(status, "").capitalize() if text is None else text
        self.response = Response(self.text, status, headers, "text/plain; charset=utf-8")
        super().__init__(f"{status} {self.text}")


def mistaken(status: int, text: str, *values: Any) -> HTTPError:
    """An answer to what may be the program's own mistake, of which the log warns."""
    if not sparing.keeps_back((text, frozenset())):  # in a flood that is quicker than to log it
        logger.warning(text, *values)
    return HTTPError(status, text % values)


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
        if fields.count("\r\n") > _MAX_FIELDS:
            raise HTTPError(431)
        for line in fields.split("\r\n")[1:]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if name in self.headers:  # RFC 9113, 8.2.3: a cookie may hold a comma
                value = f"{self.headers[name]}{'; ' if name == 'cookie' else ', '}{value}"
            self.headers[name] = value
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
        # RFC 6265, 5.2: spaces and tabs only, or "\xa0__Host-a" would become "__Host-a".
        pairs = [each.partition("=") for each in self.headers.get("cookie", "").split(";")]
        return {key: value.strip(" \t").strip('"') for name, _, value in pairs
                if (key := name.strip(" \t"))}

    def members(self, name: str) -> list[str]:
        """A list-based field's members (RFC 9110, 5.6.1). Example: request.members("accept")"""
        value = self.headers.get(name)
        return [each.strip(" \t") for each in value.lower().split(",")] if value else []

    def params(self) -> dict[str, Any]:
        """What query, form and JSON body say; `payload` is the JSON body as a whole.

        Not the body of a GET (RFC 9110, 9.3.1). Raises HTTPError 400. Example: request.params()
        """
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not self.body or self.method == "GET":
            kind = ""
        try:
            found: dict[str, Any] = dict(_parse_form(self.query) if self.query else ())
            if kind == "application/x-www-form-urlencoded":
                if _NOT_IN_A_FORM.search(self.body):
                    raise HTTPError(400, "A form is ASCII, with % only before two digits")
                found.update(_parse_form(self.body.decode()))
            elif kind == "application/json" or kind.endswith("+json"):
                payload = load_json(self.body.decode())
                found.update(payload if isinstance(payload, dict) else {}, payload=payload)
        except ValueError:
            raise HTTPError(400, "The parameters cannot be read") from None
        return found


class Response:
    """An HTTP answer. `body` is str (HTML), bytes, a pathlib.Path, or anything that JSON knows.

    A Path is sent as that file, with its type and what a browser needs to keep it; 404 if it is no
    file. `headers` is a mapping, or pairs where a field comes more than once. Raises ValueError for
    a header that would break out of its line or that the server sets, TypeError for a bad body.
    Example: Response("a,b", headers={"X-A": "b"}, content_type="text/csv")
    """

    def __init__(self, body: Any = "", status: int = 200,
                 headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
                 content_type: str | None = None, *,
                 json_default: Callable[[Any], Any] | None = None) -> None:
        self.body: bytes | Path
        self._part: tuple[io.FileIO, int] | None = None  # the file that has so much of a body
        if isinstance(body, str):
            self.body, kind = to_utf8(body), "text/html; charset=utf-8"
        elif isinstance(body, Path):
            self.body, kind = body, guess_type(body.suffix.lower())
        elif isinstance(body, (bytes, bytearray, memoryview)):
            self.body, kind = bytes(body), "application/octet-stream"
        else:
            self.body, kind = to_utf8(dump_json(body, json_default)), "application/json"
        given: Any = headers or ()
        pairs = list(given.items() if hasattr(given, "items") else given)
        if self.body and "content-type" not in [name.lower() for name, _ in pairs]:
            pairs.append(("Content-Type", content_type or kind))
        for name, value in pairs:
            if (not _TOKEN.fullmatch(name) or not _TEXT.fullmatch(value) or name.lower() in
                    ("connection", "content-length", "date", "transfer-encoding")):
                raise ValueError(f"not a header, or one that the server sets: {name!r}: {value!r}")
        expect(status, int, "the status of an answer is an int")
        if not 200 <= status <= 599:
            raise ValueError(f"the status of an answer is 200 to 599, not {status}")
        self.status, self.headers = status, tuple(pairs)  # nothing is added behind the check

    def encode(self, head_only: bool = False, close: bool = False) -> bytes:
        """The answer as bytes; `close`: the connection ends with it. Example: response.encode()"""
        has_body = self.status not in (204, 304)  # RFC 9110, 6.4.1
        body = self.body if isinstance(self.body, bytes) else b""
        size = self._part[1] if self._part else len(body)
        head = "".join([
            f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, '')}\r\n"
            f"Date: {_date(int(time.time()))}\r\nX-Content-Type-Options: nosniff\r\n",
            *[f"{name}: {value}\r\n" for name, value in self.headers],
            f"Content-Length: {size}\r\n" if has_body else "",
            "Connection: close\r\n\r\n" if close else "\r\n"]).encode("latin-1", "replace")
        return head + body if has_body and not head_only else head


@functools.lru_cache(maxsize=256)
def guess_type(suffix: str) -> str:
    """The media type of files with this suffix, on every system the same."""
    # MimeTypes() asks no system; of Windows' registry, a script may be text/plain.
    kind, coding = mimetypes.MimeTypes().guess_type(f"x{suffix}")
    if coding:
        return "application/gzip" if coding == "gzip" else "application/octet-stream"
    kind = _TYPES.get(suffix, kind) or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


@functools.lru_cache(maxsize=32)
def parse_date(text: str) -> float:
    """A date (RFC 9110, 5.6.7) in seconds; NaN, which compares as false, for what is none."""
    try:
        return email.utils.mktime_tz(email.utils.parsedate_tz(text))  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError, OverflowError):
        return math.nan


def is_known(request: Request, tag: str, modified: str) -> bool:
    """Has the client this version already? Raises HTTPError 412 (RFC 9110, 13.2.2)."""
    asked, date = request.headers, parse_date(modified)
    if "if-match" in asked:
        met = asked["if-match"] == "*" or tag[:1] == '"' and tag in _TAG.findall(asked["if-match"])
    else:
        met = not date > parse_date(asked.get("if-unmodified-since", ""))
    if not met:
        raise HTTPError(412)
    if "if-none-match" in asked:  # here a weak tag will do
        tags = asked["if-none-match"].replace('W/"', '"')
        return tags == "*" or tag.replace("W/", "") in _TAG.findall(tags)
    return date <= parse_date(asked.get("if-modified-since", ""))


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Where a single range (RFC 9110, 14.1.2) of so many bytes starts and stops; None: ignore it.

    Raises HTTPError 416 for a range that is behind the end.
    """
    match = _RANGE.fullmatch(text)
    if not match or not size:
        return None
    first, last, suffix = match.groups()
    start = int(first) if first else max(size - int(suffix), 0)
    if last and int(last) < start:
        return None
    if start >= size:
        raise HTTPError(416, headers={"Content-Range": f"bytes */{size}"})
    return start, min(int(last) + 1, size) if last else size


def answer_file(request: Request, given: Response, path: Path) -> Response:
    """`given` with the file at `path`, or as much of it as is asked for (RFC 9110, 14.2).

    Raises HTTPError 404, 412 or 416, and OSError if too many files are open.
    """
    with contextlib.ExitStack() as opened:
        try:
            def opener(name: str, flags: int) -> int:
                return os.open(name, flags | _NO_WAIT)
            file = opened.enter_context(open(path, "rb", buffering=0, opener=opener))
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"not a file: {str(path)!r}")
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise
            logger.warning("no file for %r: %s", request, error)
            raise HTTPError(404) from None
        status, headers, size = given.status, list(given.headers), about.st_size
        known = {name.lower(): value for name, value in headers}
        for name, value in {
                "ETag": f'"{about.st_mtime_ns:x}-{size:x}"', "Cache-Control": "no-cache",
                "Last-Modified": _date(max(0, int(min(about.st_mtime, time.time())))),
                "Accept-Ranges": "bytes"}.items():
            if name.lower() not in known:
                headers.append((name, value))
                known[name.lower()] = value
        start, stop, tag = 0, size, known["etag"]
        if status == 200 and request.method in ("GET", "HEAD"):
            if is_known(request, tag, known["last-modified"]):
                return Response(status=304, headers=headers)
            # A date would not be exact enough for If-Range (8.8.2.2), and a range may be ignored.
            same = request.headers.get("if-range", tag) == tag and tag[:1] == '"'
            wanted = request.headers.get("range", "") if same and request.method == "GET" else ""
            part = parse_range(wanted, size)
            if part:
                (start, stop), status = part, 206
                headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
        answer = Response(status=status, headers=headers)
        answer._part = file, stop - start
        if request.method != "HEAD" and status not in (204, 304):  # which have no body
            file.seek(start)
            opened.pop_all()  # the connection closes it
        return answer


def find_file(folder: str, names: Sequence[str], request: Request) -> Path | Response:
    """The file that `names` lead to: below `folder` and not hidden, else HTTPError 404.

    A folder's path gets a slash at its end, by a redirect that can lead nowhere else.
    """
    names = [*names[:-1], names[-1] or "index.html"] if names else []
    path, below = os.path.join(folder, *names), os.path.join(folder, "")
    with contextlib.suppress(OSError, ValueError):
        if not any(map(_NO_NAME.fullmatch, names)):
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
            path = os.path.realpath(path)
            parts = path[len(below):].split(os.sep) if names else []
            if (path + os.sep).startswith(below) and not any(map(_NO_NAME.fullmatch, parts)):
                if not is_folder:
                    return Path(path)
                query = f"?{request.query}" if request.query else ""
                place = f"./{request.path.rpartition('/')[2]}/{query}"
                return Response(status=302, headers={"Location": place})
    if request.path == "/favicon.ico":  # as in _respond()
        return Response(status=204)
    raise HTTPError(404)


def read_requests(buffer: bytearray, settings: Config) -> Iterator[Request | bytes | None]:
    """Read HTTP/1.1 requests (RFC 9112) from `buffer`, to which bytes are added between the steps.

    Yields None while no request has begun, what to send (mostly nothing) while one is incomplete,
    then the Request. Raises HTTPError, which ends it: what might mean two things is refused.
    """
    def until(end: bytes, limit: int, status: int) -> Any:
        """Wait for `end`; return where it is. Raises 431 past the limit; on one line, `status`."""
        seen = 0
        while (at := buffer.find(end, seen, limit)) < 0:
            if _BAD_LINE_END.search(buffer, seen, limit):
                raise HTTPError(400, "Bad line ending")
            if len(buffer) >= limit:
                begin = bytes(buffer[:limit])
                raise HTTPError(431 if b"\n" in begin else status if b" " in begin else 400)
            seen = max(len(buffer) - 3, 0)  # `end` may have begun there
            yield b""
        return at

    def chunks() -> Any:
        """Take a chunked body (RFC 9112, 7.1)."""
        body, end = bytearray(), 0
        for count in itertools.count(1):
            if count > 1000 + len(body) // 16:  # the work is in their number
                raise HTTPError(400, "Too many tiny chunks")
            end = yield from until(b"\r\n", 256, 400)
            match = _CHUNK_SIZE.fullmatch(bytes(buffer[:end]))
            if not match:
                raise HTTPError(400, "Bad chunk size")
            size = int(match[1], 16)
            if len(body) + size > settings.max_body_size:
                raise HTTPError(413, _TOO_LARGE)
            if not size:
                break
            del buffer[:end + 2]
            while len(buffer) < size + 2:
                yield b""
            if buffer[size:size + 2] != b"\r\n":
                raise HTTPError(400, "Bad chunk")
            body += buffer[:size]
            del buffer[:size + 2]
        del buffer[:end]  # the trailer's fields begin with a line end
        end = yield from until(b"\r\n\r\n", settings.max_header_size, 431)
        if not _FIELDS.fullmatch(buffer[:end].decode("latin-1")):
            raise HTTPError(400, "Bad trailer")
        del buffer[:end + 4]
        return bytes(body)

    def request() -> Any:
        """Take a request."""
        while bytes(buffer[:2]) in (b"", b"\r", b"\r\n"):  # RFC 9112, 2.2: empty lines
            if len(buffer) < 2:
                yield None
            else:
                del buffer[:2]
        end = yield from until(b"\r\n\r\n", settings.max_header_size, 414)
        request = Request(buffer[:end].decode("latin-1"))
        length = request.headers.get("content-length", "0")
        if not _LENGTH.fullmatch(length):
            raise HTTPError(400, "Bad Content-Length")
        size = int(length)
        chunked = "transfer-encoding" in request.headers
        if chunked:  # RFC 9112, 6.3
            codings = request.members("transfer-encoding")
            if "content-length" in request.headers or request.http_1_0 or "chunked" in codings[:-1]:
                raise HTTPError(400, "Bad Transfer-Encoding")
            if codings != ["chunked"]:
                raise HTTPError(501, "Only chunked is implemented")
        if size > settings.max_body_size:
            raise HTTPError(413, _TOO_LARGE)
        if request.method == "HEAD" and (size or chunked):  # RFC 9110, 9.3.2
            raise HTTPError(400, "HEAD has no body")
        del buffer[:end + 4]  # not before: of a failed request it tells that it was a HEAD
        if (size or chunked) and not (request.http_1_0 or buffer):
            if request.headers.get("expect", "").lower() == "100-continue":
                yield b"HTTP/1.1 100 Continue\r\n\r\n"
        if chunked:
            request.body = yield from chunks()
        elif size:
            while len(buffer) < size:
                yield b""
            request.body = bytes(buffer[:size])
            del buffer[:size]
        return request

    while True:
        yield (yield from request())  # and nothing of it stays here


# ---------------------------------------------------------------------------------- websocket

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes: RFC 6455, 5.2
FAIL, HELD = -1, -2  # events of a broken rule, and of a text that waits; no opcodes
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
_TOO_LONG = (1009, "message too long (config.max_message_size)")
_CREDIT = 64 * 1024  # bytes that one client's messages may inflate to, however little arrived
_BLOCK = 4096  # XOR of large integers is quickest in pieces that stay in the nearest cache
_from_bytes = int.from_bytes  # looking it up takes nearly as long as calling it

# (TEXT, str), (BINARY, PING or PONG, bytes), or (CLOSE or FAIL, (code, reason)).
Event = tuple[int, Any]  # a plain tuple, since there is one for each message
# Whether the client speaks webchannels.v1, and the window bits of what it is sent (0: plain).
Dialect = tuple[bool, int]


class ProtocolError(Exception):
    """The peer broke a rule of RFC 6455 or 7692, or refuses; `args`: the code and the reason."""


def accept_handshake(request: Request, compression: bool) -> tuple[bytes, Dialect]:
    """The head of a 101 and what it agrees on (RFC 6455, 4.2), or HTTPError 400, 405 or 426."""
    headers = request.headers
    if request.method != "GET":
        raise HTTPError(405, headers={"Allow": "GET"})
    if request.http_1_0 or request.body or "upgrade" not in request.members("connection"):
        raise mistaken(400, "A WebSocket needs HTTP/1.1, Connection: Upgrade and no body: does a "
                       "proxy hand on both?")
    if headers.get("sec-websocket-version") != "13":
        raise HTTPError(426, headers={"Sec-WebSocket-Version": "13", "Upgrade": "websocket"})
    key = headers.get("sec-websocket-key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", key):
        raise HTTPError(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    offered = headers.get("sec-websocket-protocol", "").split(",")
    v1 = SUBPROTOCOL in map(str.strip, offered)  # compared as it stands: case matters
    offers = headers.get("sec-websocket-extensions", "") if compression else ""
    agreed, bits = negotiate_deflate(offers)
    fields = {"Accept": accept_key(key), "Protocol": SUBPROTOCOL if v1 else "",
              "Extensions": agreed}
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
             *(f"Sec-WebSocket-{k}: {v}" for k, v in fields.items() if v), "", ""]
    return "\r\n".join(lines).encode(), (v1, bits)


def accept_key(key: str) -> str:
    """What proves that a server has read the client's key (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1((key + _KEY_SUFFIX).encode()).digest()).decode()


def negotiate_deflate(header: str) -> tuple[str, int]:
    """The answer to the first offer that can be met, and the server's window bits; or ("", 0).

    Neither side takes over context (RFC 7692, 7.1.1): an idle client costs no zlib state, and a
    broadcast is deflated once for all. Or twice: who asks for a smaller window gets the smallest,
    and what is large as it is.
    What is unknown, repeated or out of range is declined (7.1), and so are 8 bits: zlib has none.
    """
    for offer in header.split(","):
        name, *parts = offer.split(";")
        found = {match[1]: match[3] for match in map(_PARAMETER.fullmatch, parts) if match}
        bits = found.get("server_max_window_bits", "15")
        if (name.strip().lower() == "permessage-deflate" and len(found) == len(parts)
                and bits not in (None, "8")):
            if bits != "15":
                found["server_max_window_bits"] = bits = "9"
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
    """Reads a peer's frames (RFC 6455, 5): bytes in, events out, no I/O, no clock.

    Text is checked and messages are inflated as their bytes arrive, so that what is bad or too
    long is refused at its first byte. After a Close frame or a failure everything is ignored.
    """

    __slots__ = ("_credit", "_final", "_key_size", "_left", "_mask", "_max", "_max_inflation",
                 "_message", "_rest", "_short", "frames", "inflated", "more")

    def __init__(self, max_message_size: int, max_inflation: int = 0, masked: bool = True) -> None:
        """`max_inflation`: see Config; 0: permessage-deflate was not agreed on.

        `masked`: as a client's frames must be, and a server's must not (5.1).
        """
        self._max, self._max_inflation = max_message_size, max_inflation
        self._key_size = 4 if masked else 0
        self._short = min(125, max_message_size) if masked else -1  # bytes of the common frame
        self.frames = 0  # how many were begun
        self.more = False  # is there more to come of what has arrived, by receive(b"")?
        # What waits: part of a header, part of a control frame, or `more`. None: it is over.
        self._rest: bytes | None = b""
        self._left = 0  # how much is to come of a data frame's payload
        self._message: _Message | None = None  # the one that has not fully arrived
        self.inflated = 0  # bytes, by this call of receive()
        self.refill()

    def refill(self) -> None:
        """From time to time, messages may inflate by more than `max_inflation`, together so far."""
        self._credit = _CREDIT

    def unfinished(self) -> tuple[int, int]:
        """The number of the frame that began what is incomplete, and its size so far; or (0, 0)."""
        if self._message:
            return self._message.number, self._message.arrived
        return (self.frames + 1, len(self._rest)) if self._rest else (0, 0)

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer, and return what they complete."""
        events: list[Event] = []
        if self._rest is None:
            return events
        data = self._rest + data
        at, end = 0, len(data)
        self.inflated = 0
        most = self.frames + 1000  # of tiny frames a chunk holds tens of thousands
        try:
            if self._message and self._left:
                at = self._payload(self._message, data, 0, events)
            while end - at >= 2 and self.frames < most and self.inflated < _CREDIT:
                size = data[at + 1] - 128
                start = at + 6
                # The common frame of a client: a short text message, masked and in one piece.
                if (data[at] == 0x81 and 0 <= size <= self._short and start + size <= end
                        and not self._message):
                    self.frames += 1
                    at = start + size
                    events.append((TEXT, unmask(data[start:at], data[start - 4:start]).decode()))
                else:
                    stop = self._frame(data, at, events)
                    if stop == at:
                        break
                    at = stop
            self.more = at < end and (self.frames == most or self.inflated >= _CREDIT)
        except ProtocolError as error:
            events.append((FAIL, error.args))
        except (UnicodeDecodeError, zlib.error) as error:
            events.append((FAIL, (1007, str(error))))
        self._rest = data[at:]
        if events and events[-1][0] in (FAIL, CLOSE):
            self.stop()
        return events

    def receive_short(self, data: bytes) -> str | None:
        """The text, if these bytes are a short message in one piece; else they are not taken."""
        if (6 < len(data) <= 131 and len(data) == data[1] - 122 <= self._max + 6
                and data[0] == 0x81 and self._rest == b"" and not self._message):
            try:
                text = unmask(data[6:], data[2:6]).decode()
            except UnicodeDecodeError:
                return None  # receive() will tell why
            self.frames += 1
            return text
        return None

    def hold(self, data: bytes) -> None:
        """Take bytes from the peer, for a later receive(b"")."""
        if self._rest is not None:
            self._rest += data
            self.more = True

    def stop(self) -> None:
        """Ignore all that comes, and let go of what came."""
        self._rest, self._message, self.more = None, None, False

    def _frame(self, data: bytes, at: int, events: list[Event]) -> int:
        """Take what there is of a frame (RFC 6455, 5; RFC 7692, 6); return where it stops."""
        first, length, message = data[at], data[at + 1] & 127, self._message
        opcode, final, compressed = first & 15, first >= 128, first & 0x70 == 0x40
        key_size = self._key_size
        if data[at + 1] >> 7 != key_size >> 2:
            raise ProtocolError(1002, "frame not masked" if key_size else "frame masked")
        if first & 0x70 and not (compressed and self._max_inflation and opcode in (TEXT, BINARY)):
            raise ProtocolError(1002, "reserved bit set")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError(1002, "reserved opcode")
        if opcode >= CLOSE and (not final or length > 125):
            raise ProtocolError(1002, "control frame fragmented or too long")
        if opcode < CLOSE and bool(opcode) == bool(message):
            raise ProtocolError(1002, "message inside another" if opcode else "nothing to continue")
        start = at + 2 + key_size
        if length > 125:
            least, size = (126, 2) if length == 126 else (65536, 8)
            start += size
            length = int.from_bytes(data[at + 2:at + 2 + size], "big")
            if start - key_size <= len(data) and (length < least or length >> 63):
                raise ProtocolError(1002, "length not minimal, or too large")  # 5.2
        stop = start + length
        if (start if opcode < CLOSE else stop) > len(data):
            return at  # too little; it is looked at again when there is more
        self.frames += 1
        self._mask = data[start - key_size:start]
        if opcode < CLOSE:
            most = self._max
            if message.inflater if message else compressed:
                most += most // 8 + 1024  # what deflate cannot shrink it may lengthen
            if length + (message.arrived if message else 0) > most:
                raise ProtocolError(*_TOO_LONG)
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
        self._message = message or _Message(opcode, compressed, self.frames)
        self._final = final
        self._left = length
        return self._payload(self._message, data, start, events)

    def _payload(self, message: _Message, data: bytes, start: int, events: list[Event]) -> int:
        """Take what has arrived of a data frame's payload; return where it stops."""
        part = data[start:start + self._left]
        self._left -= len(part)
        last = self._final and not self._left
        message.arrived += len(part)
        credit = self._max  # of bytes: inflating them takes little, making sense of a text much
        if message.opcode == TEXT:
            credit = self._credit + self._max_inflation * message.arrived
        before = message.size
        whole = message.add(unmask(part, self._mask), last, self._max, credit)
        self._mask = (self._mask * 2)[len(part) & 3:][:4]  # where the next part begins in it
        if message.inflater:
            self.inflated += message.size - before
        if last:
            if message.inflater and message.opcode == TEXT:
                self._credit = min(credit - message.size, _CREDIT)
            events.append((message.opcode, whole))
            self._message = None
        return start + len(part)


class _Message:
    """A text or binary message of which not everything has arrived."""

    def __init__(self, opcode: int, compressed: bool, number: int) -> None:
        self.opcode, self.number = opcode, number  # that of its first frame
        self.arrived = self.size = 0  # bytes, before and after they are inflated
        self.inflater: Any = zlib.decompressobj(-15) if compressed else None
        self._final_blocks = 0
        self._body = bytearray()  # text, too: as str it could take four times as much
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, data: bytes, last: bool, most: int, credit: int) -> Any:
        """Inflate, within both limits, and check; return the message after its last part."""
        if last and self.inflater:
            data += _DEFLATE_TAIL
        while data:
            part, data = data, b""
            if self.inflater:
                if self.inflater.eof:  # a final block that is not the last: RFC 7692, 7.2.3.4
                    self.inflater = zlib.decompressobj(-15)
                    self._final_blocks += 1
                    if self._final_blocks > 16:  # a flood of them would take long
                        raise ProtocolError(1007, "too many final blocks")
                part = self.inflater.decompress(part, min(most, credit) - self.size + 1)
                data = self.inflater.unused_data
            self.size += len(part)
            if self.size > most:
                raise ProtocolError(*_TOO_LONG)
            if self.inflater and self.size > credit:
                raise ProtocolError(1009, "inflates too much (config.max_inflation)")
            self._body += part
            if self.opcode == TEXT and (data or not last):  # else it is decoded at once
                self._decoder.decode(part)
                # It refuses all that is bad at its first bad byte, but surrogates (ED A0 to ED BF)
                # only at their third.
                if b"\xed\xa0" <= self._decoder.getstate()[0] < b"\xee":
                    raise ProtocolError(1007, "text is not UTF-8")
        if not last:
            return None
        if self.inflater and not self.inflater.eof:
            raise ProtocolError(1007, "deflate data cut short")
        return self._body.decode() if self.opcode == TEXT else bytes(self._body)


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
    # Level 3 takes half of the time, or less, for a tenth more bytes. Small windows are slow.
    if bits and threshold <= len(body) <= (_CREDIT if bits < 15 else len(body)):
        deflater = zlib.compressobj(3, wbits=-bits)
        packed = deflater.compress(body) + deflater.flush(zlib.Z_SYNC_FLUSH)
        if len(packed) - 4 < len(body):
            return encode_frame(0x40 | opcode, packed[:-4])  # RSV1
    return encode_frame(opcode, body)


class _NoPayload:
    def __repr__(self) -> str:
        return "<none>"  # in pydoc


_NO_PAYLOAD: Any = _NoPayload()  # None is one: null


class Push:
    """A message to clients: checked once, and encoded once for each dialect."""

    __slots__ = ("_bodies", "_frames", "_opcode", "_threshold", "number")

    def __init__(self, settings: Config, channel: str, message: str | bytes,
                 payload: Any = _NO_PAYLOAD) -> None:
        """Raises TypeError or ValueError for what cannot be sent."""
        self._threshold = settings.compression_threshold
        self._frames: dict[Dialect, bytes] = {}
        self.number = 0  # among what is kept of the channel; webchannels.v1 has it in its envelope
        fields = f'"channel":{_quote(channel)}'
        if isinstance(message, str):
            fields += f',"message":{_quote(message)}'
        elif isinstance(message, _BYTES) and payload is _NO_PAYLOAD:
            payload = message  # without a name: no handler of the page gets it
        else:
            raise TypeError("a message is str or bytes; anything else is the payload of a str")
        self._opcode, enveloped = encode_envelope(fields, payload, settings.json_default)
        check_size(settings, enveloped)
        plain = enveloped  # without the subprotocol plain strings and bytes travel as they are
        if self._opcode == BINARY:
            plain = bytes(payload)
        elif isinstance(message, str) and payload is _NO_PAYLOAD:
            plain = to_utf8(message)
        self._bodies = (plain, enveloped)

    def size(self) -> int:
        """Bytes that it holds."""
        return sum(map(len, self._bodies))

    def frame(self, dialect: Dialect) -> bytes:
        """The frame for clients of this dialect."""
        frame = self._frames.get(dialect)
        if frame is None:
            body, bits = self._bodies[dialect[0]], dialect[1]
            same = (body is self._bodies[True], bits)  # with a payload, both bodies are one
            if self.number:
                same = dialect
                body = add_fields(body, b'"n":%d' % self.number) if dialect[0] else body
            frame = self._frames.get(same) or encode_message(
                self._opcode, body, bits, self._threshold)
            self._frames[same] = self._frames[dialect] = frame
        return frame


def encode_envelope(fields: str, payload: Any,
                    default: Callable[[Any], Any] | None) -> tuple[int, bytes]:
    """The opcode and the body of a message of webchannels.v1. Raises TypeError or ValueError."""
    if payload is _NO_PAYLOAD:
        text = f"{{{fields}}}"
    elif payload.__class__ not in _PLAIN and isinstance(payload, _BYTES):
        return BINARY, to_utf8(f"{{{fields}}}\n") + bytes(payload)
    else:
        text = f'{{{fields},"payload":{dump_json(payload, default)}}}'
    return TEXT, text.encode("utf-8", "backslashreplace")


def add_fields(body: bytes, fields: bytes) -> bytes:
    """An envelope with more fields, which come first."""
    return b"{%b,%b" % (fields, body[1:])


def check_size(settings: Config, body: bytes) -> None:
    """Raises ValueError for what no client could be sent."""
    if len(body) > settings.max_send_buffer:
        raise ValueError(f"{len(body):,} bytes are more than config.max_send_buffer")


# -------------------------------------------------------------------------------- connections

# Where a message came from: the channel, the message and the ref, which the reply will have.
Origin = tuple[str, str, Any]
_READ_AHEAD = 64 * 1024  # bytes taken while something must wait, before reading stops
_PIECE = 128 * 1024  # bytes of a long answer that are handed to the transport at once
_SLOWEST = 16384  # bytes/s: what is slower is cut when its time is over
_LINGER = 2.0  # seconds for a refused peer to read the answer, before the connection is cut
_TURN = 0.001  # seconds for which a connection goes on before it stands in line
_LONG = 0.01  # seconds: after what took longer, the line stands still for as long
_LARGE = 8192  # bytes: what is larger may take long, and stands in line if there is one
# From Python 3.12 on, an answer that awaits nothing is there at once, not in the loop's next turn.
_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
# What the handler that is running may ask for.
_params: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
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
        with contextlib.suppress(OSError, RuntimeError):  # the peer is gone already
            transport.write_eof()
    return possible


class Connection(asyncio.Protocol):
    """What an HTTP connection and a WebSocket share.

    Its two halves are `_done` (we have sent our last) and `_peer_done` (the peer has). It is
    `_behind` while the peer must read first, and lost when it has no `_transport` any more.
    """

    __slots__ = ("_app", "_behind", "_deadline", "_done", "_in_line", "_peer_done", "_reading",
                 "_task", "_transport", "_writer", "__weakref__")

    def __init__(self, app: WebChannels) -> None:
        self._app = app
        self._transport: Any = None  # an asyncio.Transport, while there is one
        self._writer: asyncio.StreamWriter | None = None  # its finaliser closes the transport
        self._done = self._peer_done = self._behind = self._in_line = False
        self._reading = True
        self._task: asyncio.Future[None] | None = None  # the handler that is awaited
        self._deadline = math.inf  # when what has begun must be over, by time.monotonic()

    def _wait(self, seconds: float, size: int = 0) -> None:
        """Set when the sweep will end what is waited for, which is of `size` bytes."""
        self._deadline = time.monotonic() + seconds + size / _SLOWEST

    def _read(self, wanted: bool) -> None:
        if self._transport and wanted != self._reading:
            self._reading = wanted
            with contextlib.suppress(AttributeError):  # TLS before 3.11, where it is just lost
                (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def pause_writing(self) -> None:
        """The transport is full."""
        self._behind = True

    def resume_writing(self) -> None:
        """The transport has room again."""
        self._behind = False
        self._work_soon()  # not now: it may close the transport, which is writing

    def _work_soon(self) -> None:
        if self._app._loop:
            # In the context of what was written, a handler's, whatever reads would keep it.
            self._app._loop.call_soon(self._work, context=self._app._context.copy())

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = self._writer = None
        self._peer_done, self._behind = True, False
        self._app._freed = True
        self._wait(self._app.config.abandoned_timeout)

    def _abort(self, why: str) -> None:
        """End the connection at once, if there is one."""
        if self._transport:
            logger.info("%r dropped: %s", self, why)
            self._transport.abort()

    def _abandon(self) -> None:
        """The peer has left, and its handler did not end: cancel it, and let go of it."""
        task, self._task = self._task, None
        if task:
            logger.info("%r has left: its handler is cancelled", self)
            self._app._track(task)  # down() waits for it still
            task.cancel()

    def _work(self, my_turn: bool = False) -> None:
        """Go on with what has arrived, until something must be waited for."""

    def _shut(self) -> None:
        """The server goes down: end, after what has begun."""

    def _check(self, now: float, seconds: float) -> None:
        """The sweep asks, `seconds` after the last time: is anything over its deadline?"""


class HTTPConnection(Connection):
    """A connection, from its first byte to its end, or until it becomes a WebSocket."""

    __slots__ = ("_address", "_begun", "_buffer", "_client", "_hungry", "_left", "_requests",
                 "_unsent")

    def __init__(self, app: WebChannels, writer: asyncio.StreamWriter) -> None:
        super().__init__(app)
        self._writer, self._transport = writer, writer.transport
        peer = self._transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._buffer = bytearray()
        self._requests = read_requests(self._buffer, app.config)
        self._hungry = True  # does it wait for more bytes?
        self._begun = False  # a part of a request is here
        # Of an answer: what has the rest of it, and how many bytes that are.
        self._unsent: Any = io.BytesIO()
        self._left = 0
        self._client: ChannelClient | None = None  # what it has become
        full = len(app._http) >= app.config.max_clients
        app._http.add(self)
        self._wait(app.config.keep_alive_timeout)
        if app._ssl and full:
            self._gone()
            self._transport.abort()
        elif app._ssl:
            self._done = True  # nothing is answered yet
            self._task = asyncio.ensure_future(self._secure(app._ssl))
        else:
            self._transport.set_protocol(self)
        if full:
            self._refuse(HTTPError(503, headers={"Retry-After": "5"}))

    def __repr__(self) -> str:
        return f"<HTTPConnection {self._address}>"

    async def _secure(self, context: ssl_module.SSLContext) -> None:
        """Shake hands. (If the server did it, connections without a handshake were not counted.)"""
        loop, settings = asyncio.get_running_loop(), self._app.config
        self._deadline = math.inf
        try:
            self._transport = await loop.start_tls(
                self._transport, self, context, server_side=True,
                ssl_handshake_timeout=settings.handshake_timeout)
        except Exception as error:  # event loops differ in which
            logger.info("no TLS handshake with %s: %s", self._address, error)
            self._transport = None
        self._task = None
        if self._transport is None or self._peer_done:
            self._gone()
        else:
            self._transport.set_write_buffer_limits(_READ_AHEAD)  # since 3.11: eight times that
            self._done = False
            self._wait(settings.keep_alive_timeout)
            self._work()

    def data_received(self, data: bytes) -> None:
        if self._done and not self._task:
            return
        self._buffer += data
        self._deadline += len(data) / _SLOWEST
        self._work()
        if not self._hungry and len(self._buffer) > _READ_AHEAD:
            self._read(False)
            if self._task:  # from now on nobody sees that the peer leaves
                self._wait(self._app.config.keep_alive_timeout)

    def eof_received(self) -> bool:
        self._peer_done = True  # what the peer asked for before is still answered
        if self._task:
            self._wait(self._app.config.abandoned_timeout)
        self._work()
        wanted = not self._done or self._left > 0
        return wanted and bool(self._transport.can_write_eof())  # TLS cannot

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._client:  # TLS tells whoever had it a turn of the loop ago
            self._client.connection_lost(exc)
        super().connection_lost(exc)
        self._done = True
        self._buffer.clear()
        self._left = 0
        self._unsent.close()
        if not self._task:
            self._gone()

    def _gone(self) -> None:
        """It no longer counts against config.max_clients."""
        self._done = True
        self._app._http.discard(self)

    def resume_writing(self) -> None:
        self._behind = False
        self._app._line_up(self)  # not now: the transport is writing, and others have their turn

    def _work(self, my_turn: bool = False) -> None:
        """Answer the next request, if it has arrived and the peer reads its answers."""
        if my_turn and self._transport:
            self._send()
        if self._task or self._behind or self._left or self._done or self._in_line:
            return
        if self._app._stopping and not self._begun:
            self._end()
            return
        large = len(self._buffer) > _LARGE
        if large and self._app._moving and not my_turn:
            self._hungry = False
            self._app._line_up(self)
            return
        begun = time.monotonic() if large else math.inf
        try:
            found = next(self._requests)
        except HTTPError as error:
            self._refuse(error)
            return
        self._hungry = not isinstance(found, Request)
        if isinstance(found, Request):
            found.address = self._address
            self._begun, self._deadline = False, math.inf
            if self._peer_done:
                self._wait(self._app.config.abandoned_timeout)
            task: Any = asyncio.Task(self._answer(found), loop=self._app._loop, **_EAGER)
            self._task = None if task.done() else task
            took = time.monotonic() - begun
            if took > _TURN:
                self._app._stand_still(took)
        elif self._peer_done:
            self._end()
        else:
            self._read(True)
            if found is not None:
                self._transport.write(found)
                if not self._begun:
                    self._begun = True
                    self._wait(self._app.config.handshake_timeout, len(self._buffer))

    async def _answer(self, request: Request) -> None:
        """Send the answer, or become a WebSocket."""
        answer = await self._app._answer(request, self)
        self._task = None
        upgraded = isinstance(answer, ChannelClient)
        if self._done or upgraded and self._peer_done:  # the peer is gone
            self._gone()
            self._abort("it has left")
        elif upgraded and (self._app._stopping
                           or len(self._app._sockets) >= self._app.config.max_clients):
            self._refuse(HTTPError(503, headers={"Retry-After": "5"}))
        elif isinstance(answer, ChannelClient):
            self._gone()  # as an HTTP connection: what is still due does nothing
            self._client = answer
            answer._attach(self._writer, self._transport, self._reading)
            if self._buffer:  # it arrived behind the request
                answer.data_received(bytes(self._buffer))
        else:
            last = (request.http_1_0 or self._app._stopping
                    or "close" in request.members("connection"))  # RFC 9112, 9.3
            data = answer.encode(request.method == "HEAD", last)
            self._done = last
            if len(data) > _PIECE:
                self._unsent, self._left = io.BytesIO(data), len(data)
            elif not self._transport.is_closing():
                self._transport.write(data)
            if answer._part and not answer._part[0].closed:
                self._unsent, self._left = answer._part
            self._send()
            if self._buffer or self._peer_done or not self._reading:
                self._app._line_up(self)  # not now: others have their turn

    def _send(self) -> None:
        """Send a piece of the answer, if the peer has room for it: it must go on reading."""
        if self._left and not (self._behind or self._transport.is_closing()):
            try:
                piece = self._unsent.read(min(_PIECE, self._left))
                self._left -= len(piece)
                if not piece:
                    raise OSError("it has become shorter")
            except OSError as error:  # its length was told: there is no other way to tell of this
                logger.warning("%s was not sent to its end: %s", self._unsent.name, error)
                self._transport.abort()
                return
            self._transport.write(piece)
            if self._left and not self._behind:
                self._app._line_up(self)  # not now: others have their turn
        settings = self._app.config
        if self._done or self._behind:
            self._wait(settings.handshake_timeout, _PIECE)
        elif not self._begun:
            self._wait(settings.keep_alive_timeout)
        if not self._left:
            self._unsent.close()  # and let go of it
            if self._done:
                self._transport.close()

    def _refuse(self, error: HTTPError) -> None:
        logger.warning("refused %s: %s", self._address, error)
        self._begun, self._done = False, True
        self._wait(_LINGER)
        self._transport.write(error.response.encode(self._buffer.startswith(b"HEAD "), close=True))
        if not half_close(self._transport):
            self._transport.close()

    def _end(self) -> None:
        self._done = True
        self._transport.close()

    def _shut(self) -> None:
        if self._done and self._task:
            self._abort("it was shaking hands")
        self._work()

    def _check(self, now: float, seconds: float) -> None:
        if now < self._deadline or self._in_line:
            return
        if self._task:
            self._abandon()
            self._done = True
        if self._transport is None:
            self._gone()
        elif self._behind or self._done:
            self._transport.abort()
        elif self._begun:
            self._refuse(HTTPError(408))
        else:
            self._end()


class ChannelClient(Connection):
    """A browser, or whatever else opened a WebSocket.

    `.id`: str, unlike every other's, also of other processes. `.address`: the peer's IP address.
    `.request`: the Request of the handshake. `.channels`: the names of the channels subscribed to.
    `.data`: a dict for the program's own use. `.connected`: bool.
    Example: def who(client: ChannelClient): return client.address
    """

    __slots__ = ("_asks", "_begun", "_corked", "_dialect", "_frames", "_held", "_let_in",
                 "_pending", "_queue", "_queued", "_reads", "_silence", "address", "channels",
                 "connected", "data", "id", "request")

    def __init__(self, app: WebChannels, request: Request, dialect: Dialect,
                 head: bytes) -> None:
        super().__init__(app)
        self._dialect = dialect
        self.id = secrets.token_hex(8)
        self.request, self.address = request, request.address
        self.channels: set[str] = set()
        self.data: dict[Any, Any] = {}
        self.connected = False
        # Incoming: events that wait for the handler before them.
        self._frames = FrameReader(app.config.max_message_size,
                                   app.config.max_inflation if dialect[1] else 0)
        self._pending: list[Event] = []
        self._held = 0  # bytes that arrived meanwhile, and to which they inflated
        # Outgoing: frames stay here while messages are handled (they are then written at once),
        # and while the transport is full (here they can be counted), or not there yet.
        self._queue: list[bytes] = [head]
        self._queued = 0
        self._corked = False
        self._behind = True
        self._asks: tuple[str, Any] | None = None  # for what channel, and since when, just now
        self._let_in = False  # has a handler subscribed it since, to that channel or another?
        self._reads: dict[str, Kept] | None = None  # what it must get before it gets what is live
        # Life and death. The sweep looks at these.
        self._silence = 0.0  # seconds for which nothing was heard, while we listened
        self._begun = 0  # the frame that began what the deadline is for

    def __repr__(self) -> str:
        return (f"<ChannelClient {self.id} {self.address} "
                f"{'connected' if self.connected else 'disconnected'} {sorted(self.channels)}>")

    def send(self, message: str | bytes, payload: Any = _NO_PAYLOAD, *,
             channel: str | None = None) -> bool:
        """Push to this client alone; False if it is gone.

        With a `payload`, None too, the page's handler for the message gets it; without, text or
        bytes go to parse_payload. `channel` is the one that the page sees: by default that of the
        message being handled, or `config.default_channel`. Raises TypeError or ValueError for what
        cannot be sent, and TimeoutError as `broadcast()` does.
        Example: client.send("tick", {"n": 1})
        """
        given = _params.get() or {}
        if channel is None and given.get("client") is self:
            channel = given.get("channel")
        settings = self._app.config
        push = Push(settings, channel or settings.default_channel, message, payload)
        there = not (self._done or self._peer_done)
        if self._app._here():
            return there and self._app._context.copy().run(self._push, push)
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

    def _attach(self, writer: asyncio.StreamWriter | None, transport: Any, reading: bool) -> None:
        """Take over the connection: from now on its bytes are frames."""
        self._app._sockets[self] = None
        self.connected = not self._done  # by on_connect
        self._writer, self._transport, self._reading = writer, transport, reading
        transport.set_protocol(self)
        self._behind = False
        self._flush()
        self._read(True)

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        self._silence = 0.0
        free = not (self._pending or self._task or self._behind or self._done)
        text = self._frames.receive_short(data) if free else None
        if text is not None:  # most are so, and take a fifth less time like this
            self._handle(text)
            return
        if self._app._moving and len(data) > _LARGE:  # unmasked and inflated when it is its turn
            self._frames.hold(data)
            self._app._line_up(self)
        else:
            self._work(False, data)
        if self._pending or self._frames.more:
            self._held += len(data) + self._frames.inflated
            if self._held > _READ_AHEAD or self._frames.more:
                self._read(False)

    def _handle(self, text: str) -> None:
        """A message for which nothing has to wait."""
        app = self._app
        begun = app._now = time.monotonic()
        self._corked = True
        try:
            app._message(self, text)
        finally:
            self._corked = False
            if self._queue:
                self._flush()
        if self._asks and not self._task:
            self._asks = None
        if app._now - begun > _TURN:
            app._stand_still(app._now - begun)

    def _take(self, data: bytes) -> None:
        """Answer pings, also while a handler is busy; what is to be handled goes to `_pending`."""
        for event in self._frames.receive(data):
            kind, content = event
            if kind == TEXT and content:
                self._pending.append(event)
            elif kind == PING:
                self._write(encode_frame(PONG, content))
            elif kind == TEXT and self._dialect[0]:
                self._write(encode_frame(TEXT, b""))  # a keep-alive
            elif kind != PONG:
                self._pending.append(event)
                if kind == CLOSE:
                    self._peer_done = True
                    self._leave()

    def eof_received(self) -> bool:
        """The peer sends no more; what it asked for before is still answered."""
        self._peer_done = True
        self._leave()
        self._work()
        transport = self._transport  # TLS has no half-closed connections
        return transport and not transport.is_closing() and bool(transport.can_write_eof())

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._leave()
        self._work()  # what arrived before is handled still

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flush()

    # Messages are handled in order.

    def _work(self, my_turn: bool = False, data: bytes = b"") -> None:
        """Handle what is pending, until a handler must be awaited or the peer must read first."""
        app, pending, handled, waited = self._app, self._pending, 0, len(self._pending)
        self._corked = True  # pongs and replies leave together
        try:
            if data or my_turn and self._frames.more and not pending:
                self._take(data)
            begun = app._now = time.monotonic()
            for kind, content in pending:
                if self._task or self._behind or self._in_line:
                    break
                if app._moving and len(content) > _LARGE and not my_turn:
                    app._line_up(self)
                    break
                handled += 1
                if kind == TEXT or kind == BINARY or kind == HELD:
                    if not self._done:
                        app._message(self, content.decode() if kind == HELD else content)
                        if self._asks and not self._task:
                            self._asks = None
                elif kind == FAIL:
                    logger.warning("%r broke the protocol: %s %s", self, *content)
                    self._close(*content)
                    self._flush()
                    if self._transport and not half_close(self._transport):  # RFC 6455, 7.1.7
                        self._peer_done = True
                else:
                    self._close(*content)
                if app._now > begun + _TURN:
                    app._stand_still(app._now - begun)
                    if handled < len(pending):
                        app._line_up(self)
        finally:
            del pending[:handled]
            if pending:  # what waits is held as bytes: as str it could take four times as much
                new = max(0, waited - handled)
                pending[new:] = [(HELD, event[1].encode()) if event[0] == TEXT else event
                                 for event in pending[new:]]
            self._corked = False
            self._flush()
        if self._reads:
            self._read_on(self._reads)
        if pending or self._task or self._behind:
            return
        self._held = 0  # all that arrived is handled
        if self._frames.more:
            self._app._line_up(self)
        elif not self._transport:
            self._gone()
        elif self._peer_done:
            self._transport.close()
        else:
            self._read(True)

    # What is sent.

    def _push(self, push: Push) -> bool:
        self._write(push.frame(self._dialect))
        return not self._done

    def _reply(self, origin: Origin, result: Any) -> None:
        """Send what the handler returned. Raises TypeError or ValueError if it cannot be sent."""
        channel, message, ref = origin
        settings, handover, (v1, bits) = self._app.config, self._app._handover, self._dialect
        if message != "subscribe":  # which is confirmed before anything is pushed
            if handover and handover.calls:
                handover.take()  # what the handler's threads sent comes before
        elif self.connected and not (self._let_in or channel in self.channels):
            raise mistaken(403, "/%s/subscribe did not call subscribe(client, channel)", channel)
        opcode = TEXT
        if v1 and ref is not None:
            opcode, body = encode_envelope(f'"ref":{ref}', result, settings.json_default)
            kept = self._app._history.kept.get(channel) if self._asks else None
            if kept and kept.knows(self):
                body = add_fields(body, kept.tell(self))  # it confirms a subscription
        elif not v1 and isinstance(result, str):
            body = to_utf8(result)
        elif not v1 and isinstance(result, _BYTES):
            opcode, body = BINARY, bytes(result)
        elif result is None:
            return
        elif v1 or channel or message:
            pushed: Any = (result,) if isinstance(result, str) else (message, result)
            self._push(Push(settings, channel or settings.default_channel, *pushed))
            return
        else:
            body = to_utf8(dump_json(result, settings.json_default))
        check_size(settings, body)
        self._write(encode_message(opcode, body, bits, settings.compression_threshold))

    def _reply_later(self, origin: Origin, result: asyncio.Future[Any]) -> None:
        """Send what the handler will return; the client's other messages wait until then."""
        def done(result: asyncio.Future[Any]) -> None:
            abandoned = self._task is not result
            if not abandoned:
                self._task = None
            try:
                self._reply(origin, result.result())
            except BaseException as error:
                if not (abandoned and isinstance(error, asyncio.CancelledError)):
                    self._fail(origin, error)
            self._asks = None
            self._work()
        self._task = result
        result.add_done_callback(done)

    def _fail(self, origin: Origin, error: BaseException) -> None:
        """Tell the sender; and the log, with a traceback where it is the program's fault."""
        channel, message, ref = origin
        path = f"/{channel}/{message}" if message else "/"
        text = None
        with contextlib.suppress(Exception):  # of a subclass without super().__init__(), for one
            if isinstance(error, ChannelError):
                text = str(error)
            elif isinstance(error, HTTPError):
                text = f"ERROR : {error.status} - {error.text}"
                logger.info("%r: %s: %s", self, path, text)
        if text is None:
            text = "ERROR : 500 - Internal error"
            logger.error("the handler of %s failed", path, exc_info=error)
        text = text[:8192]
        if self._dialect[0]:
            about = {"channel": channel, "message": message}
            text = dump_json({"error": text, **(about if ref is None else {"ref": ref})})
        self._write(encode_message(TEXT, to_utf8(text), self._dialect[1],
                                   self._app.config.compression_threshold))

    def _write(self, frame: bytes) -> None:
        if self._done:  # RFC 6455, 5.5.1: nothing follows a Close frame
            return
        handover = self._app._handover
        if handover and handover.taking and not self._corked:
            self._corked = True
            handover.written.append(self)
        if self._corked or self._behind:
            self._queue.append(frame)
            self._queued += len(frame)
            if not self._corked or self._queued > _READ_AHEAD:
                self._flush()
        elif self._transport and not self._transport.is_closing():  # and the queue is empty
            self._transport.write(frame)

    def _read_on(self, reads: dict[str, Kept]) -> None:
        """Send what is kept, but no more than the peer reads; it is never too slow for that."""
        for channel, kept in [*reads.items()]:
            if self._behind or self._done:
                break
            if (kept.readers[self].at is None and kept.fetching  # nobody knows where it is
                    or self._task and self._asks and self._asks[0] == channel):
                continue  # the confirmation comes first
            self._write(kept.read(self))
            if self in kept.readers:
                self._app._line_up(self)
            else:
                del reads[channel]

    def _flush(self) -> None:
        if self._behind and (self._queued <= self._app.config.max_send_buffer or self._done):
            return
        # At once: in this thread, a finaliser or a signal handler may send between any two steps.
        queue, self._queue, self._queued = self._queue, [], 0
        if self._behind:
            logger.warning("%r is more than config.max_send_buffer behind: closed", self)
            if not (self._transport or self._peer_done):
                self._queue.append(queue[0])  # the 101's head
            self._close(1013, "too slow")
        elif queue and self._transport and not self._transport.is_closing():
            if len(queue) > 1 and len(queue[-1]) > _READ_AHEAD:
                self._transport.write(b"".join(queue[:-1]))
                del queue[:-1]  # what is large is not joined: all clients share it, without a copy
            self._transport.write(b"".join(queue))

    # The end.

    def _leave(self) -> None:
        if self.connected:
            self.connected = False
            self._wait(self._app.config.abandoned_timeout)
            self._app._left(self)

    def _close(self, code: int, reason: str) -> None:
        """Send the Close frame, if none was (RFC 6455, 7.1.2); the sweep cuts the deaf."""
        if not self._done:
            payload = b"" if code == 1005 else code.to_bytes(2, "big") + reason.encode()
            self._write(encode_frame(CLOSE, payload))
            self._done = True
        self._leave()
        self._wait(self._app.config.handshake_timeout)

    def _shut(self) -> None:
        self._leave()
        self._pending[:] = [(CLOSE, (1001, "server going down"))]
        self._work()

    def _gone(self) -> None:
        """It no longer counts against config.max_clients."""
        self._frames.stop()
        self._app._sockets.pop(self, None)

    def _let_go(self) -> None:
        """Of a client that has left, disconnected_clients() tells little: nothing large stays."""
        self.request = Request("GET / HTTP/1.0")
        self.request.address = self.address
        room = 2048
        for name in list(self.channels):
            room -= 100 + len(name)
            if room < 0:
                self.channels.discard(name)

    def _check(self, now: float, seconds: float) -> None:
        settings = self._app.config
        if not self.connected:
            if now >= self._deadline:
                if self._pending:
                    logger.info("%r has left: %d messages are dropped", self, len(self._pending))
                self._pending.clear()
                self._abandon()
                self._abort("it did not close in time")
                self._gone()
            return
        self._frames.refill()
        if not self._reading:  # TLS tells only those who read that the peer has left
            self._read(True)
            self._read(False)
        begun, arrived = self._frames.unfinished() if self._reading else (0, 0)
        if self._dialect[0] and (begun or not self._reading):  # no message tells it otherwise
            self._write(encode_frame(TEXT, b""))
        if begun != self._begun:
            self._begun = begun
            self._wait(settings.handshake_timeout)
        if begun and now >= self._deadline + arrived / _SLOWEST:
            self._close(1013, "message not finished in time")
        elif settings.ping_interval:
            before, self._silence = self._silence, self._silence + seconds
            if self._silence >= settings.ping_interval + settings.ping_timeout:
                self._silence = 0.0
                if self._reading:  # else it is we who do not listen
                    self._abort("no answer to a ping")
            elif before < settings.ping_interval <= self._silence:
                self._write(encode_frame(PING, b""))


# ------------------------------------------------------------------------------------ history

_SINCE = re.compile(r"([0-9a-f]{1,32})\.([0-9]{1,15})")  # a position: epoch and number
_WEIGHT = 800  # bytes, about, of what holds a message in memory
_POSITION = 2 * _WEIGHT  # the same, of what holds a channel
_REMEMBERED = 10  # times config.kept_ttl: then the position in a channel without use is forgotten


@dataclass
class Rule:
    """What `keep()` was told."""

    count: int
    rewind: bool


class Message(NamedTuple):
    """A broadcast that is kept."""

    push: Push
    came: float  # when, by time.monotonic()
    without: set[str]  # the ids of those who do not see it
    shown: int  # who joined before this number saw it at once: Redis was away
    weight: int  # bytes, about, with its frames


class Reader:
    """Where a subscriber is that must get what is kept before it gets what is live."""

    __slots__ = ("at", "missed", "since", "told")

    def __init__(self, since: Any = None, at: int | None = None) -> None:
        # Where it says it was: anyone may forge it, and make it long. None: it is new.
        self.since = None if since is None else "{}.{}".format(*parse_position(since))
        self.at = at  # the number of the last message that it got, when that is known
        self.missed, self.told = False, at is not None  # does it know where it is?


def new_epoch() -> str:
    """Under it, numbers mean what they mean nowhere else."""
    return secrets.token_hex(4)


def parse_position(since: Any) -> tuple[str, int]:
    """Epoch and number; or an epoch that none is."""
    match = _SINCE.fullmatch(since) if isinstance(since, str) else None
    return (match[1], int(match[2])) if match else ("", 0)


class Kept:
    """What is kept of a channel. Numbers have no gap; others than its own have another epoch."""

    def __init__(self, channel: str, rule: Rule) -> None:
        self.channel, self.rule = channel, rule
        self.epoch = new_epoch()
        self.last = 0  # the number of the last message; those that are kept are the last ones
        self.messages: collections.deque[Message] = collections.deque()
        self.weight = 0  # of the messages, in bytes
        self.used = time.monotonic()  # when it was last sent to, or its last subscriber left
        self.readers: dict[ChannelClient, Reader] = {}
        # With Redis, which numbers:
        self.fetching = 0  # the number of the fetch that is under way
        self.heard = 0  # the first number that came meanwhile
        self.behind = False  # is there more than it will bring?
        self.joined: dict[ChannelClient, int] = {}  # the number of our broadcasts until then
        self.ours = 0  # the last of our broadcasts that came back

    def follow(self, client: ChannelClient, reader: Reader) -> None:
        """From now on it gets what is kept."""
        if reader.at is None and not self.fetching:
            self.place(reader)
        self.readers[client] = reader
        client._reads = client._reads or {}
        client._reads[self.channel] = self

    def place(self, reader: Reader) -> int:
        """Who has missed something begins as if new: it cannot tell what it has from the rest."""
        before, reader.told = self.last - len(self.messages), False
        epoch, number = parse_position(reader.since)
        if epoch == self.epoch and before <= number <= self.last:
            reader.at = number
        else:
            last = self.heard - 1 if self.heard else self.last
            reader.at = before if self.rule.rewind else max(before, last)
            reader.missed = reader.since is not None
        reader.since = None
        return reader.at

    def knows(self, client: ChannelClient) -> bool:
        """Where it is?"""
        reader = self.readers.get(client)
        return reader.at is not None if reader else self.channel in client.channels

    def tell(self, client: ChannelClient) -> bytes:
        """The members of a JSON object that tell a subscriber where it is."""
        reader = self.readers.get(client) or Reader(at=self.last)
        missed = ',"missed":true' if reader.missed else ""
        reader.told, reader.missed = True, False
        return to_utf8(f'"channel":{_quote(self.channel)},"at":"{self.epoch}.{reader.at}"{missed}')

    def read(self, client: ChannelClient) -> bytes:
        """The next frames for a subscriber, which after the last of them gets what is live."""
        reader = self.readers[client]
        before = self.last - len(self.messages)
        at = self.place(reader) if reader.at is None else reader.at
        if at < before:  # it was too slow
            reader.since = f"{self.epoch}.{at}"
            at = self.place(reader)
        frames = []
        if client._dialect[0] and not reader.told:
            frames.append(encode_frame(TEXT, b"{%b}" % self.tell(client)))
        size = 0
        for message in itertools.islice(self.messages, at - before, None):
            reader.at = message.push.number
            frames.append(self.frame(client, message))
            size += len(frames[-1])
            if size > _READ_AHEAD:
                break
        if reader.at == self.last:
            del self.readers[client]
        return b"".join(frames)

    def frame(self, client: ChannelClient, message: Message) -> bytes:
        """What a subscriber gets of a message: itself, or only its number."""
        if client.id not in message.without and message.shown <= self.joined.get(client, 0):
            return message.push.frame(client._dialect)
        number = f'{{"n":{message.push.number},"channel":{_quote(self.channel)}}}'
        return encode_frame(TEXT, to_utf8(number)) if client._dialect[0] else b""


class History:
    """What is kept of all channels of an app."""

    def __init__(self, app: WebChannels) -> None:
        self._app = app
        self.rules: Router | None = None  # if there are any
        self.kept: dict[str, Kept] = {}
        # In bytes, of all messages, and of channels without subscribers, which have other bounds.
        self._weight = 0
        self._swept = 0.0  # when, by time.monotonic()

    def keep(self, channel: str, rule: Rule) -> None:
        """As `WebChannels.keep()`."""
        self.rules = self.rules or Router()
        self.rules.add(f"/{channel}", rule)
        for kept in [*self.kept.values()]:
            kept.rule = self.rule(kept.channel) or kept.rule

    def rule(self, channel: str) -> Rule | None:
        """How the channel is kept, if it is."""
        found = self.rules and self.rules.find(f"/{channel}")
        return found[0][""] if found else None

    def find(self, channel: str) -> Kept | None:
        """What is kept of the channel, from now on; None if nothing is to be."""
        kept = self.kept.get(channel)
        if kept is None and self.rules and (rule := self.rule(channel)):
            if channel not in self._app._subscribers:
                self._weigh(_POSITION)
            kept = self.kept[channel] = Kept(channel, rule)
            self._app._begin_to_keep(kept)
        return kept

    def clear(self) -> list[Kept]:
        """Let go of all; return what it was."""
        every = [*self.kept.values()]
        self.kept.clear()
        self._weight = 0
        return every

    def add(self, kept: Kept, push: Push, without: set[str], age: float = 0,
            shown: int = 0) -> Message:
        """Number a broadcast, and keep it."""
        kept.last = push.number = kept.last + 1
        kept.used = time.monotonic()
        weight = _WEIGHT + push.size()  # about: a body and a frame
        message = Message(push, kept.used - age, without, shown, weight)
        kept.messages.append(message)
        kept.weight += weight
        self._weight += weight
        self.trim(kept)
        self._weigh(0)
        return message

    def jump(self, kept: Kept, epoch: str, last: int) -> None:
        """What comes next does not follow what is here: who had that is behind."""
        for client in kept.joined:
            reader = kept.readers.get(client) or Reader(at=kept.last)
            if reader.told:
                reader.since, reader.at = f"{kept.epoch}.{reader.at}", None
                kept.follow(client, reader)
        self._empty(kept)
        kept.epoch, kept.last = epoch, last

    def trim(self, kept: Kept) -> None:
        """Let go of what is past the bounds."""
        settings, messages = self._app.config, kept.messages
        count, oldest = kept.rule.count, time.monotonic() - settings.kept_ttl
        if kept.weight > settings.max_kept and len(messages) <= count:
            logger.warning("config.max_kept does not suffice to keep %d messages of a channel such "
                           "as %r", count, kept.channel)
        while messages and (len(messages) > count or messages[0].came < oldest
                            or kept.weight > settings.max_kept):
            weight = messages.popleft().weight
            kept.weight -= weight
            self._weight -= weight

    def _weigh(self, more: int) -> None:
        limit, self._weight = self._app.config.max_kept_total, self._weight + more
        if self._weight <= limit:
            return
        logger.warning("config.max_kept_total is reached: the channels used least are not kept")
        for kept in sorted(self.kept.values(), key=lambda each: (each.last > 0, each.used)):
            if self._weight > limit - limit // 8:
                self.forget(kept)

    def _empty(self, kept: Kept) -> None:
        self._weight -= kept.weight
        kept.weight = 0
        kept.messages.clear()

    def forget(self, kept: Kept) -> None:
        """Let go of all messages; of the position, too, if nobody needs it."""
        self._empty(kept)
        if self._app._end_keeping(kept):
            del self.kept[kept.channel]
            self._weight -= _POSITION

    def rest(self, kept: Kept) -> None:
        """Its last subscriber has left."""
        if self._app._redis:  # which has it all
            self._weight += _POSITION
            self.forget(kept)
        else:
            self._weigh(_POSITION)

    def sweep(self) -> None:
        """Let go of what is old."""
        now, ttl = time.monotonic(), self._app.config.kept_ttl
        if now > self._swept + min(ttl / 4, 60):
            self._swept = now
            for kept in [*self.kept.values()]:
                self.trim(kept)
                if kept.used < now - _REMEMBERED * ttl:
                    self.forget(kept)


# ---------------------------------------------------------------------------------------- bus

_PATIENCE = 5.0  # seconds for Redis to answer
_RETRY = 0.5  # seconds: the longest pause before it is tried again
# Numbers and keeps a broadcast, and publishes it. A channel's key is a list of what is kept. Before
# the line feed of each are epoch.number, a time in milliseconds, and the size of all until then.
_HEADER = """
local key, time = KEYS[1], redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function header(entry)
  return string.match(entry or '', '^#(%w+)%.(%d+) (%d+) (%d+)\\n()')
end
local last = redis.call('LINDEX', key, -1)
local epoch, number, _, total = header(last)
"""
_KEEP = _HEADER + """
local data, fresh, ttl, forget, count, most, again = unpack(ARGV)
if again + 0 > 0 then  -- seconds since it was sent, without an answer
  local pattern, first = '^(%x+)[^\\n]-(%d+)%]\\n', 1
  local sender, serial = string.match(data, pattern)
  for place = -1, -redis.call('LLEN', key), -1 do
    local entry = redis.call('LINDEX', key, place)
    local _, n, came, _, start = header(entry)
    local who, other = string.match(entry, pattern, start)
    if who == sender and other == serial then return redis.status_reply('KEPT') end
    first = n + 0
    -- Behind what is older, or what the same process sent before, it is not.
    if came + 0 < now - again * 1000 or who == sender and other + 0 < serial + 0 then
      first = 1
      break
    end
  end
  if first > 1 then return redis.status_reply('LOST') end
end
number = (number or 0) + 1
total = (total or 0) + #data + 100
local entry = string.format('#%s.%d %d %d\\n', epoch or fresh, number, now, total) .. data
local said = redis.pcall('RPUSH', key, entry)
if type(said) == 'table' then  -- it is full, or its disk is: at least who is there gets it
  redis.call('PUBLISH', key, data)
  return redis.status_reply('FULL ' .. said.err)
end
while redis.call('LLEN', key) > 1 do
  local oldest = redis.call('LINDEX', key, 0)
  local _, _, came, size = header(oldest)
  local kept = total - size + #oldest
  local many = redis.call('LLEN', key) > count + 0
  if not many and kept <= most + 0 and now - came <= ttl + 0 then break end
  redis.call('LPOP', key)
end
redis.call('EXPIRE', key, forget)
redis.call('PUBLISH', key, entry)
return redis.status_reply('KEPT')
"""
# What is kept behind a position, at most about 1 MiB, in a row as if it was published, but with its
# age and `id` at its head; then one that is empty, at whose head is whether there is more.
_FETCH = _HEADER + """
local id, after, at, fresh, ttl, forget = unpack(ARGV)
if not last then
  epoch, number = fresh, 0
  redis.pcall('RPUSH', key, string.format('#%s.0 %d 0\\n', epoch, now))
  redis.pcall('EXPIRE', key, forget)
end
local reply, size, more, reached = {}, 0, 0, number
local _, first = header(redis.call('LINDEX', key, 0))
local start = epoch == after and math.max(at + 1 - first, 0) or 0
for _, entry in ipairs(redis.call('LRANGE', key, start, -1)) do
  local _, n, came, _, from = header(entry)
  if size > 1048576 then more = 1 break end
  reached = n
  if n + 0 > 0 and now - came <= ttl + 0 then
    local age = string.format('=%s.%d %d %d\\n', epoch, n, math.max(now - came, 0), id)
    for _, each in ipairs({'message', key, age .. string.sub(entry, from)}) do
      reply[#reply + 1] = each
    end
    size = size + #entry
  end
end
local last = string.format('=%s.%d %d %d\\n', epoch, reached, more, id)
for _, each in ipairs({'message', key, last}) do reply[#reply + 1] = each end
return reply
"""
_RESP = re.compile(rb"\$(\d{1,10})\r\n|[+:_#,*%~>][^\r\n]*\r\n")  # no errors, which begin with "-"


class Bus:
    """Carries broadcasts between processes; `config.bus` may be one with an engine of your own.

    The app calls these methods in its event loop; they must not block it. What other processes
    publish they hand to `self.deliver(channel, data)`, from any thread; what comes back of their
    own is ignored there. When something may have been lost, because they were away, they call
    `self.missed()`, from any thread: the pages are told, on channels that are kept. This one
    carries nothing: a process by itself. Example: config.bus = Bus()
    """

    deliver: Callable[[str, bytes], None]
    missed: Callable[[], None]

    async def start(self) -> None:
        """Connect. What this raises, `up()` raises. Example: await bus.start()"""

    async def stop(self) -> None:
        """Disconnect. Example: await bus.stop()"""

    def publish(self, channel: str, data: bytes) -> None:
        """Carry `data` to all who listen to `channel`, in order. Example: bus.publish("a", b"x")"""

    def listen(self, channel: str, wanted: bool) -> None:
        """Has the channel subscribers here, from now on? Example: bus.listen("room", True)"""


class Command(NamedTuple):
    """What is to be sent to Redis."""

    data: bytes
    show: Callable[[], Any] | None = None  # to our own pages, what is to be kept
    came: float = 0  # when, by time.monotonic()


class RedisBus(Bus):
    """Redis 6 or later: with RESP3 one connection can publish and subscribe.

    While it is away, the last `limit` bytes of broadcasts are held. What was under way may be lost,
    but not what is to be kept: to that, Redis gives an answer.
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
        self._queue: collections.deque[Command] = collections.deque()
        self._keeps: collections.deque[Command] = collections.deque()  # those that have a `show`
        self._sent: collections.deque[Command] = collections.deque()  # of these, without an answer
        self._fetches: dict[int, list[bytes]] = {}  # the words of commands, by numbers
        self._ids = itertools.count(1)
        self._held, self._ready, self._away = 0, True, False
        await self._connect()
        self._keeping = asyncio.ensure_future(self._keep())

    async def stop(self) -> None:
        self._keeping.cancel()
        self._write(b"QUIT", behind=math.inf)  # when Redis has read all, it ends the connection
        await asyncio.wait([self._reading], timeout=0.5)
        self._abort()

    def publish(self, channel: str, data: bytes) -> None:
        self._put(Command(_command(b"PUBLISH", self._name(channel), data)))

    def keep(self, channel: str, data: bytes, count: int, settings: Config,
             show: Callable[[], Any]) -> None:
        """Have Redis number, keep and publish it; `show` it to our own pages if Redis is away."""
        words = [data, *_times(settings), b"%d" % count, b"%d" % settings.max_kept, b"%08d" % 0]
        command = _command(b"EVAL", _KEEP.encode(), b"1", self._name(channel), *words)
        self._put(Command(command, show, time.monotonic()))

    def fetch(self, channel: str, epoch: str, number: int, settings: Config) -> int:
        """Have all delivered that is kept behind this position; with an id, which it returns."""
        id = next(self._ids)
        where = [b"%d" % id, epoch.encode(), b"%d" % number]
        self._fetches[id] = [b"EVAL", _FETCH.encode(), b"1", self._name(channel), *where,
                             *_times(settings)]
        if len(self._fetches) == 1:  # one at a time: it may be much
            self._write(*self._fetches[id])
        return id

    def fetched(self, id: int) -> None:
        """That was all: the next, please."""
        self._fetches.pop(id, None)
        for words in [*self._fetches.values()][:1]:
            self._write(*words)

    def _put(self, command: Command) -> None:
        if not self._held:
            asyncio.get_running_loop().call_soon(self._write)
        queue = self._keeps if command.show else self._queue
        queue.append(_shown(command) if self._away else command)
        self._held += len(command.data)
        if self._held > _READ_AHEAD:
            self._write()
        while self._held > self._limit:
            oldest = self._queue or self._keeps
            self._held -= len(oldest.popleft().data)
            logger.warning("the oldest broadcast that waited for Redis is dropped")

    def _lose(self) -> None:
        """What Redis has not answered is sent again, with the time for which it waits."""
        self._abort()
        self._ready, now = False, time.monotonic()
        for each in reversed(self._sent):
            data = b"%b%08d\r\n" % (each.data[:-10], now - each.came + 1)
            self._keeps.appendleft(each._replace(data=data))
            self._held += len(data)
        self._sent.clear()

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
        if self._held and unsent < behind and not self._reading.done():
            due = [*self._keeps, *(self._queue if self._ready else ())]
            self._writer.write(b"".join([each.data for each in due]))
            self._held -= sum([len(each.data) for each in due])
            self._sent += self._keeps
            self._keeps.clear()
            if self._ready:
                self._queue.clear()
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
                    self._abort()
                self._silent = True
                self._write(b"PING")
            logger.warning("lost Redis at %s:%d (%s): up to %d bytes of broadcasts wait",
                           *self._where, self._reading.result(), self._limit, extra=ALWAYS)
            pause, refused = _RETRY / 8, False
            while not self._ready or self._reading.done():
                self._lose()
                if refused:  # until it is back, our own pages see all at once
                    self._away = True
                    self._keeps = collections.deque(map(_shown, self._keeps))
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _RETRY)
                try:
                    await self._connect()
                except ConnectionError:
                    refused = True
                    continue
                self._away = False
                self._fetches.clear()
                self.missed()
                self._write()
                # What is not to be kept waits until the other processes are back, too.
                await asyncio.wait([self._reading], timeout=2 * _RETRY)
                self._ready = True
                refused = self._reading.done() and self._reading.result().startswith("it said")
            logger.warning("Redis at %s:%d is back", *self._where, extra=ALWAYS)
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
                    said = match[0][:5]
                    if said in (b"+KEPT", b"+LOST", b"+FULL") and self._sent:
                        command = self._sent.popleft()
                        if said == b"+FULL":
                            _shown(command)
                            logger.warning("Redis does not keep what is broadcast: %s",
                                           match[0][6:-2].decode("utf-8", "replace"))
                        if said == b"+LOST":
                            logger.warning("a broadcast was under way when Redis was lost, and so "
                                           "many came after it: it may be missing")
                    if (len(words) == 3 and words[0] == b"message"
                            and (words[1] in self._channels or words[2][:1] == b"=")):
                        name = words[1][len(self._prefix):].decode("utf-8", "surrogatepass")
                        self.deliver(name, words[2])
                data = data[at:]
                if len(data) > (self._limit if match else 9999) or not match and b"\r\n" in data:
                    return f"it said {data[:200]!r}"
                self._write()  # Redis has read: there may be room again
        return "no answer" if self._silent else "it hung up"

    def _abort(self) -> None:
        if self._writer:
            self._writer.transport.abort()
        self._writer = None


def _shown(command: Command) -> Command:
    """Our own pages have seen what is to be kept."""
    if command.show:
        command.show()
    return command._replace(show=None)


def _times(settings: Config) -> list[bytes]:
    """For a script: the epoch of a new channel; the time to keep in ms, and to remember in s."""
    kept = min(settings.kept_ttl, 1e8)
    return [new_epoch().encode(), b"%d" % (kept * 1000), b"%d" % max(_REMEMBERED * kept, 1)]


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(
        [b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


# ---------------------------------------------------------------------------------------- app

_MAX_OPEN = 10_000  # channels that anyone may subscribe to
_TRIM = 1.0  # seconds from one time to the next that freed memory is given back
_SLOW = 0.1  # seconds for which a `def` handler may hold the event loop unremarked
# What other threads hand over to the loop: see Handover.
_AHEAD = 128 * 1024  # bytes; a thread that is so far ahead waits, while the loop makes its calls
_NAP = 0.0002  # seconds
_HOLD = 0.02  # seconds after the last call, from which on a handler seems to hold the loop
_LONG_CALL = 0.5  # the same within a call, such as one to send to thousands: it may want a lock
_STUCK = 5.0  # seconds without a move, after which a thread does not wait any longer
_HELD = f"a handler has held the event loop for {_STUCK:.0f} s, or the loop was stopped"
# The head of what Redis has numbered: epoch, number, time or age in ms, size or id.
_NUMBERED = re.compile(rb"([#=])([0-9a-f]+)\.([0-9]+) ([0-9]+) ([0-9]+)\n")
_MESSAGE_NAMES = {"payload", "client", "request", "channel", "message"}
_CLIENT_NAMES = {"client", "request"}
Clients = Union[ChannelClient, str, Iterable[Union[ChannelClient, str]]]


class Handover:
    """Calls that other threads hand over to an event loop, in order, with one wake-up for many.

    A thread that is ahead waits, as long as the loop catches up. It does not wait for a handler,
    which may want a lock that the thread holds; but at the limit it does, for a while.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop, self._limit = loop, limit
        # Its methods are atomic, and suffice: a signal handler that interrupts the holder of a lock
        # may wait for the loop, which then must not wait for that lock.
        self.calls: collections.deque[Callable[[], Any]] = collections.deque()
        self._sizes: collections.deque[int] = collections.deque()  # of these, in bytes
        self._moved = self._woken_at = 0.0  # when the loop made a call, and when it was told to
        self._woken = self.taking = self._over = False
        self.written: list[ChannelClient] = []  # whose frames leave together

    def give(self, call: Callable[[], Any], size: int = 0) -> bool:
        """Have the loop make this call, which holds so many bytes. Raises TimeoutError.

        False: it is over, and nobody knows whether the call was still made.
        """
        if self._over or self._loop.is_closed():
            return False
        while size and (ahead := sum(self._sizes.copy())) > _AHEAD:
            time.sleep(_NAP)  # in which the loop may begin
            stood = time.monotonic() - max(self._moved, self._woken_at)
            if ahead > self._limit and stood > _STUCK:
                raise TimeoutError(_HELD)
            if ahead <= self._limit and stood > (_LONG_CALL if self.taking else _HOLD):
                break
        self._sizes.append(size + 1000)  # about, with what holds it
        self.calls.append(call)
        if not self._woken:
            self._woken, self._woken_at = True, time.monotonic()
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self.take, _TURN)
        return not self._over

    def take(self, turn: float = math.inf) -> None:
        """Make the calls, in the thread of the loop; after so many seconds others have theirs."""
        self._woken = False  # first: whoever comes later wakes it again
        if self.taking:
            return
        self.taking, ends = True, time.monotonic() + turn
        try:
            for _ in range(len(self.calls)):
                call = self.calls.popleft()
                self._sizes.popleft()
                try:
                    call()
                except Exception:  # of one call: the others must still be made, and the log has it
                    logger.exception("what a thread handed over failed")
                self._moved = time.monotonic()
                if self._moved > ends and self.calls:
                    self._woken = True
                    self._loop.call_soon(self.take, _TURN)
                    break
        finally:  # Ctrl+C may come here, and a notebook's loop goes on
            try:
                while self.written:  # to which others may come: a log handler may send
                    client = self.written.pop()
                    client._corked = False
                    client._flush()
            finally:
                self.taking = False

    def end(self) -> None:
        """Make the last calls."""
        self._over, self.taking = True, False
        self.take()


class WebChannels:
    """An app: its routes, channels, clients and server.

    The module-level functions are the methods of one default app; two apps may serve side by side
    in one process. Every public method may be called from any thread. Example: WebChannels().up(0)
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self._routes, self._channels = Router(), Router()
        # The segments of a prefix, and what serves its folder; long prefixes first.
        self._folders: list[tuple[tuple[str, ...], dict[str, Endpoint]]] = []
        self._open: set[str] = set()  # channels that anyone may subscribe to
        self._lets_in = False  # the program, by subscribe(), to channels that nobody can ask for
        self._history = History(self)
        self._on_connect: list[Endpoint] = []
        self._on_disconnect: list[Endpoint] = []
        self._lock = threading.Lock()  # of the start
        self._context = contextvars.copy_context()  # in which serving began
        self._thread = 0  # in which it serves, or did last
        self._wanted = False  # up() was called, and no down() since
        self._done = threading.Event()  # the last serving is over
        self._done.set()
        self._reset()
        _apps.add(self)
        self._serve_script("/channels.js")

    def _reset(self) -> None:
        """Forget what belongs to one time of serving."""
        self.url, self.port = "", 0  # where it serves, such as "http://127.0.0.1:8000"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handover: Handover | None = None  # while it serves
        self._jobs: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._idle = 0  # threads that wait for jobs
        self._stop: asyncio.Future[BaseException | None] | None = None
        self._stopping = self._paused = False
        self._local_only = False
        self._servers: list[asyncio.AbstractServer] = []
        self._listening: Sequence[Any] = ()
        self._ssl: ssl_module.SSLContext | None = None
        self._http: set[HTTPConnection] = set()
        self._sockets: dict[ChannelClient, None] = {}  # whose connections are not yet gone
        self._left_at: dict[ChannelClient, float] = {}  # those that left, and when
        self._subscribers: dict[str, dict[ChannelClient, None]] = {}
        self._line: collections.deque[Connection] = collections.deque()  # these wait for a turn
        self._now = 0.0  # when the loop had last done with a handler, by time.monotonic()
        self._moving = False  # someone has a turn, or will have one
        self._freed = False  # may the system get memory back?
        self._tasks: set[asyncio.Future[Any]] = set()
        self._bus: Bus | None = None
        self._redis: RedisBus | None = None  # the same, if it numbers what is kept
        self._serial = 0  # of the last broadcast that Redis was to keep
        # From which to which our pages saw them without a number, since Redis was away.
        self._shown: collections.deque[list[int]] = collections.deque(maxlen=100)
        self._name = secrets.token_hex(8).encode()  # of this process, among those on the bus

    # What a program registers.

    def route(self, path: str, handler: Callable[..., Any] | None = None, *,
              method: str = "GET", threaded: bool = False) -> Callable[[H], H]:
        """Answer requests for `path` with what `handler` returns; a decorator or a plain call.

        `/a/:name` matches one segment, `/a/:n::int` converts it (int, float, str); no value has a
        slash. Registering the same path and method again replaces the handler, also while serving.
        What functools.partial() binds, no request can give. The handler returns str (HTML), bytes,
        dict or list (JSON), a pathlib.Path (that file), a Response, or None (204). `threaded=True`
        runs a `def` handler in a thread. Raises TypeError or ValueError for what cannot work.
        Example: route("/hello/:name", lambda name: f"Hello, {html.escape(name)}!")
        """
        if not _TOKEN.fullmatch(method):
            raise ValueError(f"not an HTTP method: {method!r}")
        return self._register(self._routes, method.upper(), path, handler, threaded)

    def static(self, prefix: str, folder: str | os.PathLike[str]) -> None:
        """Serve the files below `folder` at `prefix`, where no route is: `/` is its `index.html`.

        Nothing else is served: no hidden file (`.git`), no list, and no link that leads out of the
        folder. The same prefix again replaces the folder, and a longer one goes before a shorter
        one. Raises NotADirectoryError if there is no such folder, ValueError for a bad prefix.
        Example: static("/", "www")
        """
        if not prefix.startswith("/") or "/:" in prefix:
            raise ValueError(f"a prefix starts with a slash and has no names, not {prefix!r}")
        top = os.path.realpath(folder)
        if not os.path.isdir(top):
            raise NotADirectoryError(errno.ENOTDIR, "there is no such folder", top)
        endpoint = Endpoint(functools.partial(find_file, top), "/:names")
        segments = tuple(filter(None, prefix.split("/")))
        folders = {**dict(self._folders), segments: {"GET": endpoint}}
        self._folders = sorted(folders.items(), key=lambda each: -len(each[0]))

    def channel(self, path: str, handler: Callable[..., Any] | None = None, *,
                threaded: bool = False) -> Callable[[H], H]:
        """Handle messages: `/____/echo` is the message `echo` on the channel `____`; as `route()`.

        The handler may take `payload`, `client`, `channel`, `message`, `request` (the handshake)
        and the path's parameters. What it returns is the reply to the sender; None is none. Bytes
        are a payload like any other, both ways. `channel("/")` gets what is not a JSON object with
        a "channel", as it came, and replies raw; of webchannels.v1 it gets no bytes. A handler for
        the message `subscribe` guards a channel: it may raise ChannelError, or
        `subscribe(client, channel)`. Example: channel("/____/echo", lambda payload: payload)
        """
        return self._register(self._channels, "", path, handler, threaded, _MESSAGE_NAMES)

    def _register(self, router: Router, method: str, path: str, handler: Any,
                  *about: Any) -> Callable[[H], H]:
        expect(path, str, "first comes the path, as in @route('/path')")

        def register(handler: H) -> H:
            if getattr(handler, "__func__", None) in vars(WebChannels).values():
                raise TypeError(f"anyone could give what {handler.__name__}() takes, by a query: "
                                "register a function that calls it")
            router.add(path, Endpoint(handler, path, *about), method)
            return handler
        if handler is not None:
            register(handler)
        return register

    def on_connect(self, handler: H = None) -> H:  # type: ignore[assignment]
        """Call `handler` before a WebSocket handshake is accepted; a decorator.

        It may take `client` and `request`, and refuse by HTTPError, or False (403). It may already
        `client.send()`, but the client is not connected yet, so it cannot be subscribed. Handlers
        add up, and are called in order; a function that is defined again takes its own place.
        Example: on_connect(lambda client: client.send("Welcome"))
        """
        return self._add(self._on_connect, handler)

    def on_disconnect(self, handler: H = None) -> H:  # type: ignore[assignment]
        """Call `handler` when a client has left, as `on_connect()`. Example: on_disconnect(log)"""
        return self._add(self._on_disconnect, handler)

    def _add(self, endpoints: list[Endpoint], handler: H) -> H:
        added = Endpoint(handler, supplied=_CLIENT_NAMES)
        for at, known in enumerate(endpoints):
            if is_redefined(known.handler, handler):
                logger.warning("%s takes its own place: it is defined again", added.name,
                               extra=ALWAYS)
                endpoints[at] = added
                break
        else:
            endpoints.append(added)
        return handler

    def params(self, key: str | None = None, default: Any = None) -> Any:
        """The parameters of the request or message being handled: all, as a dict, or one.

        Raises RuntimeError outside a handler, the tasks that it starts, and asyncio.to_thread(): in
        what has no copy of its context; HTTPError 400 if a form or JSON cannot be read.
        Example: params("name", "nobody")
        """
        given = _params.get()
        if given is None:
            raise RuntimeError("params() works only in a handler, and the tasks that it starts")
        if key is not None and key in given:
            return given[key]
        if request := given.get(None):  # see _respond(); threads of a handler may come at once
            for name, value in request.params().items():
                given.setdefault(name, value)
            given.pop(None, None)
        if key is not None and key not in given and "client" in given:
            logger.warning("params(%r): there is only %s", key, ", ".join(given))
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
        ValueError for a bad channel name, and for the 10,001st.
        Example: channels_support("room", src="/channels.js")
        """
        channel = self.config.default_channel if channel is None else channel
        check_name(channel)
        if channel not in self._open and not self._guarded(channel):
            if len(self._open) >= _MAX_OPEN:
                raise ValueError(f"{_MAX_OPEN:,} channels are open: guard others with a handler")
            if _params.get() is not None:
                logger.warning("a handler opened the channel %r by channels_support(): call that "
                               "when the program starts, or guard the channel with a handler for "
                               "its message subscribe", channel)
            self._open.add(channel)
        base = self.config.base_path.rstrip("/")
        attributes = {"data-channel": channel, "data-path": base + self.config.websockets_path,
                      "nonce": nonce, "src": src}
        if src and src.startswith("/") and not src.startswith("//"):
            attributes["src"] = base + src
            self._serve_script(src.partition("?")[0])
        text = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items()
                       if value is not None)
        return f"<script{text}>{CHANNELS_JS if src is None else ''}</script>"

    def _serve_script(self, path: str) -> None:
        if self._routes.find(path) is None:
            kind = "text/javascript; charset=utf-8"
            self.route(path, lambda: Response(CHANNELS_JS, content_type=kind))

    def keep(self, channel: str, count: int = 100, *, rewind: bool = True) -> None:
        """Keep the last `count` broadcasts of a channel: a page that was away gets what it missed.

        With `rewind`, a page that is new gets what is kept. `channel` may have names in it, as in
        `route()`: each channel that matches is kept by itself. Calling it again changes the count.
        The bounds are `config.max_kept`, `config.max_kept_total` and `config.kept_ttl`. What a page
        is told if it cannot have all is in the README. Raises TypeError or ValueError for a bad
        channel or count. Example: keep("rooms/:room", 50)
        """
        check_name(channel)
        if not isinstance(count, int):
            raise TypeError(f"the count of messages to keep is an int, not {count!r}")
        if count < 1:
            raise ValueError(f"at least 1 message is kept, not {count}")
        self._history.keep(channel, Rule(count, rewind))

    # The registry.

    def broadcast(self, channels: str | Iterable[str], message: str | bytes,
                  payload: Any = _NO_PAYLOAD, *, exclude: Clients = (),
                  only: Clients | None = None) -> bool:
        """Push to every subscriber of one channel or several, once for each.

        With a `payload`, None too, the page's handler for the message gets it; without, text or
        bytes go to parse_payload. `exclude` and `only` are clients, or their ids, also those of
        other processes. True if anyone in this process was there to be sent it. It does not wait
        for the event loop; but a thread that is ahead of it is slowed down. Raises TypeError or
        ValueError for what cannot be sent, before anything is; TimeoutError if over
        `8 * config.max_send_buffer` bytes wait for a loop that has not moved for 5 seconds.
        Example: broadcast("room", "tick", {"n": 1})
        """
        expect(channels, Iterable, "first comes the channel, or several")
        names = [channels] if isinstance(channels, str) else list(channels)
        for name in names:
            check_name(name)
            if not (name in self._subscribers or self._bus or self._lets_in
                    or self._history.rule(name)
                    or self._thread and (name in self._open or self._guarded(name))):
                logger.warning("broadcast() to %r, where nobody can be: first come up(), and "
                               "channels_support(%r) or a handler of /%s/subscribe", *3 * [name])
        pushes = [(name, Push(self.config, name, message, payload)) for name in names]
        without, among = _ids(exclude), None if only is None else _ids(only)
        if self._here():
            return self._context.copy().run(self._spread, pushes, without, among)
        count = sum(len(self._meant(name, without, among)) for name in names)
        kept = (among is None and bool(self._history.rules)
                and any(map(self._history.rule, names)))
        if not (count or self._bus or kept):
            return False
        size = sum(push.size() for _, push in pushes) + 10 * count  # with a place in each queue
        spread = functools.partial(self._spread, pushes, without, among)
        given = self._give(spread, size)
        if kept and not given:
            with self._lock:  # nobody serves, or will begin to
                spread()
        return given and count > 0

    def _spread(self, pushes: list[tuple[str, Push]], without: set[str],
                among: set[str] | None) -> bool:
        there = False
        for name, push in pushes:
            rule = self._history.rule(name) if self._redis and among is None else None
            if rule is None:
                there = self._hand_out(name, push, without, among) or there
            if self._bus:  # a line of JSON; then what clients of webchannels.v1 get
                head: list[Any] = [push._opcode, [*without], None if among is None else [*among]]
                if rule:
                    self._serial += 1
                    head.append(self._serial)
                data = b"%b%b\n%b" % (self._name, dump_json(head).encode(), push._bodies[True])
                if rule and self._redis:  # it comes back to our own pages, too
                    there = bool(self._meant(name, without, None)) or there
                    show = functools.partial(self._show, name, push, without, self._serial)
                    self._redis.keep(name, data, rule.count, self.config, show)
                else:
                    self._bus.publish(name, data)
        return there

    def _show(self, channel: str, push: Push, without: set[str], serial: int) -> None:
        """Redis is away, and will number it later."""
        if self._shown and self._shown[-1][1] == serial - 1:
            self._shown[-1][1] = serial
        else:
            self._shown.append([serial, serial])
        kept = self._history.kept.get(channel)
        if kept and serial > kept.ours:
            for client in self._meant(channel, without, None):
                if kept.joined.get(client, serial) < serial:
                    client._push(push)

    def _meant(self, channel: str, without: set[str],
               among: set[str] | None) -> list[ChannelClient]:
        clients = list(self._subscribers.get(channel, ()))  # at once: other threads read, too
        if without or among is not None:
            clients = [client for client in clients if client.id not in without
                       and (among is None or client.id in among)]
        return clients

    def _hand_out(self, channel: str, push: Push, without: set[str],
                  among: set[str] | None) -> bool:
        """Send it to the subscribers here; keep it, if that is to be."""
        if self._history.rules and among is None and not self._redis:
            kept = self._history.find(channel)
            if kept:
                return self._hand_out_kept(kept, push, without)
        there = False
        for client in self._meant(channel, without, among):
            there = client._push(push) or there
        return there

    def _hand_out_kept(self, kept: Kept, push: Push, without: set[str], age: float = 0,
                       shown: int = 0) -> bool:
        there = False
        channel = kept.channel
        message = self._history.add(kept, push, without, age, shown)
        for client in self._meant(channel, set(), None):
            there = there or not client._done and client.id not in without
            if client in kept.readers:
                pass  # it will come to it
            elif client._behind:  # better that than to fill its queue
                kept.follow(client, Reader(at=kept.last - 1))
            else:
                client._write(kept.frame(client, message))
        return there

    def _begin_to_keep(self, kept: Kept) -> None:
        """Hear of it also while nobody is subscribed; who is subscribed begins to read."""
        subscribers = self._subscribers.get(kept.channel, ())
        if self._bus and not subscribers:
            self._bus.listen(kept.channel, True)
        if self._redis:
            kept.epoch = ""  # it has one there
            self._fetch(kept)
        for client in list(subscribers):
            self._follow(kept, client, None)

    def _follow(self, kept: Kept, client: ChannelClient, since: Any) -> None:
        """A subscriber has come that was at `since`; None: it is new."""
        if self._redis:
            kept.joined[client] = self._serial
            epoch, number = parse_position(since)
            if epoch and (epoch != kept.epoch or number > kept.last):
                kept.behind = True  # another process has told it more
                if not kept.fetching:
                    self._fetch(kept)
        kept.follow(client, Reader(since))
        client._work_soon()

    def _end_keeping(self, kept: Kept) -> bool:
        """False if there are subscribers."""
        used = kept.channel in self._subscribers
        if self._bus and not used:
            self._unlisten(kept.channel)
        return not used

    def _deliver(self, channel: str, data: bytes) -> None:
        """A broadcast came over the bus. From any thread, but without waiting: others may wait."""
        if not self._here():
            self._give(functools.partial(self._deliver, channel, data))
        elif not data.startswith(self._name):  # else it is our own
            try:
                numbered = _NUMBERED.match(data) if self._redis else None
                if numbered:
                    self._deliver_kept(channel, numbered, data[numbered.end():])
                else:
                    push, without, among, _ = self._read_broadcast(channel, data)
                    self._hand_out(channel, push, without, among)
            except (TypeError, ValueError) as error:
                logger.warning("not a broadcast of ours, on channel %r: %s", channel, error)

    def _read_broadcast(self, channel: str, data: bytes) -> tuple[
            Push, set[str], set[str] | None, int]:
        """What the bus has carried. Raises TypeError or ValueError for what is none."""
        head, body = data[len(self._name):].split(b"\n", 1)
        opcode, without, among, *serial = load_json(head.decode())
        envelope = read_envelope(body if opcode == BINARY else body.decode())
        if envelope is None or envelope["channel"] != channel:
            raise ValueError("not an envelope of this channel")
        given = [envelope[each] for each in ("message", "payload") if each in envelope]
        push = Push(self.config, channel, *given)
        return push, set(without), None if among is None else set(among), sum(serial)

    def _deliver_kept(self, channel: str, numbered: re.Match[bytes], data: bytes) -> None:
        """Redis has numbered it; it comes as it was broadcast ("#"), or since we fetched it."""
        kept = self._history.find(channel) if channel in self._subscribers else None
        epoch, number, age, id = numbered[2].decode(), *map(int, numbered.groups()[2:])
        if numbered[1] == b"#":
            if kept and kept.fetching:
                kept.heard = kept.heard or number  # what is fetched will have it, too
            elif kept and (epoch, number) != (kept.epoch, kept.last + 1):
                self._fetch(kept)
            elif kept:
                self._keep(kept, data)
            return
        if kept and kept.fetching == id:
            if epoch != kept.epoch or number > kept.last + bool(data):
                self._history.jump(kept, epoch, number - bool(data))
            if data and number == kept.last + 1:
                self._keep(kept, data, age / 1000)
        if not data and self._redis:
            self._redis.fetched(id)
            if kept and kept.fetching == id and (age or kept.behind):
                self._fetch(kept)
            elif kept and kept.fetching == id:
                kept.fetching = 0
                for client, reader in kept.readers.items():
                    if reader.at is None:
                        kept.place(reader)
                    client._work_soon()

    def _keep(self, kept: Kept, data: bytes, age: float = 0) -> None:
        push, without, _, serial = self._read_broadcast(kept.channel, data)
        shown = 0
        if data.startswith(self._name):
            kept.ours = serial
            if any(first <= serial <= last for first, last in self._shown):
                shown = serial
        self._hand_out_kept(kept, push, without, age, shown)

    def _fetch(self, kept: Kept) -> None:
        if self._redis:
            kept.heard, kept.behind = 0, False
            kept.fetching = self._redis.fetch(kept.channel, kept.epoch, kept.last, self.config)

    def _missed(self) -> None:
        """The bus was away: what others broadcast may be missing. From any thread."""
        if not self._here():
            self._give(self._missed)
            return
        for kept in [*self._history.kept.values()]:
            if self._redis:
                self._fetch(kept)
                continue
            kept.epoch = new_epoch()
            for client in self._meant(kept.channel, set(), None):
                kept.follow(client, Reader("missed"))
                client._work_soon()

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
        after 5 seconds without a move of it, ChannelError past `config.max_subscriptions`, and
        ValueError for a bad channel name.
        Example: subscribe(client, "room")
        """
        expect(client, ChannelClient, "first comes the client, then the channel")
        check_name(channel)
        client._let_in = True
        if client.connected and channel not in client.channels:
            if len(client.channels) >= self.config.max_subscriptions:
                raise ChannelError("Too many subscriptions")
            kept = self._history.find(channel)
            if channel not in self._subscribers:
                if kept:
                    self._history._weight -= _POSITION
                elif self._bus:
                    self._bus.listen(channel, True)
            client.channels.add(channel)
            self._lets_in |= not (channel in self._open or self._guarded(channel))
            self._subscribers.setdefault(channel, {})[client] = None
            if kept:
                self._history.trim(kept)
                asks, since = client._asks or ("", None)
                self._follow(kept, client, since if asks == channel else None)
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
        kept = self._history.kept.get(channel)
        if kept and subscribed:
            kept.used = time.monotonic()
            kept.readers.pop(client, None)
            kept.joined.pop(client, None)
            if client._reads:
                client._reads.pop(channel, None)
        if not subscribers and self._subscribers.pop(channel, None) is not None:
            if kept is None:
                self._unlisten(channel)
            else:
                self._history.rest(kept)
        return subscribed

    def _unlisten(self, channel: str) -> None:
        try:
            if self._bus:
                self._bus.listen(channel, False)
        except Exception:  # the client is gone nevertheless
            logger.exception("the bus did not let go of channel %r", channel)

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
        for endpoint in list(self._on_disconnect):
            self._track(asyncio.ensure_future(notify(endpoint)))

    def _track(self, task: asyncio.Future[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Turns: what takes long is done bit by bit, so that nobody waits for long.

    def _stand_still(self, took: float = 0) -> None:
        """Nothing large is begun in this turn of the loop; after what was long, not for as long."""
        if self._loop and not self._moving:
            self._moving = True
            self._loop.call_later(took if took > _LONG else 0, self._next_turns,
                                  context=self._context.copy())  # not that of a handler

    def _line_up(self, connection: Connection) -> None:
        """It goes on when it is its turn."""
        if not connection._in_line:
            connection._in_line = True
            self._line.append(connection)
            self._stand_still()

    def _next_turns(self) -> None:
        """Those at the head of the line go on; then the loop does other things, too."""
        self._freed, waited = True, bool(self._line)
        begun = now = time.monotonic()
        try:
            for _ in range(len(self._line)):  # not those that line up again
                if now > begun + _TURN:
                    break
                connection = self._line.popleft()
                connection._in_line = False
                connection._work(my_turn=True)
                now = time.monotonic()
        finally:  # whatever happens to one, the others have their turns
            self._moving = False
            if waited:
                self._stand_still(now - begun)

    # Calling handlers.

    def _start(self, endpoint: Endpoint, given: dict[str, Any]) -> Any:
        """Call a handler in a context of its own; what comes back is its result, or a future."""
        context = self._context.copy()
        if endpoint.threaded:
            call: Any = functools.partial(context.run, endpoint.run, given)
            return asyncio.ensure_future(self._await(self._in_thread(call)))
        try:
            result = context.run(endpoint.run, given)
        except (SystemExit, KeyboardInterrupt) as error:
            raise self._exit(error) from error
        begun, self._now = self._now, time.monotonic()
        if self._now - begun > _SLOW:
            endpoint.tell_slow(self._now - begun)
        if result.__class__ not in _PLAIN and inspect.isawaitable(result):
            steps = endpoint.steps(result) if inspect.iscoroutine(result) else result
            return context.run(asyncio.ensure_future, self._await(steps))
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
            logger.warning("handlers wait for a thread: config.max_threads are busy")
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
            try:
                threading.Thread(target=_work, args=(self._jobs,), name="webchannels",
                                 daemon=True).start()
            except RuntimeError:  # the system has no more threads, for now
                self._threads.release()
                raise
        self._jobs.put(run)
        return await future

    async def _invoke(self, endpoint: Endpoint, given: dict[str, Any]) -> Any:
        self._now = time.monotonic()
        result = self._start(endpoint, given)
        return await result if isinstance(result, asyncio.Future) else result

    def _message(self, client: ChannelClient, data: str | bytes) -> None:
        """Handle a message; never raises for what it or its handler does."""
        origin: Origin = "", "", None
        path = "/"  # of what is not an envelope
        payload: Any = data
        try:
            is_text = isinstance(data, str)
            bare = not (is_text or client._dialect[0])  # bytes without an envelope
            envelope = None if bare else read_envelope(data)
            if envelope is not None:
                channel, message = envelope["channel"], envelope.get("message")
                payload, ref = envelope.get("payload"), envelope.get("ref")
                exact = ref is None or type(ref) in (int, float) and abs(ref) <= 2 ** 53
                # A slash in the message could make it another channel's: /a + b/c is not /a/b + c.
                if (not exact or type(channel) is not str or type(message) is not str
                        or "/" in message or len(channel) > _MAX_NAME or len(message) > _MAX_NAME):
                    origin = "", "", ref if exact else None
                    raise mistaken(400, "Bad message: a channel as in 'room', a message as in "
                                   "'say', without a slash, each of at most %d characters",
                                   _MAX_NAME)
                origin = channel, message, ref
                path = f"/{channel}/{message}"
                if message == "subscribe":
                    client._asks, client._let_in = (channel, envelope.get("since")), False
            elif not (bare or is_text):
                raise HTTPError(400, "A binary message is an envelope, a line feed, and bytes")
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
                self._now = time.monotonic()
                result = self._default(client, path, *origin[:2])
            if result.__class__ not in _PLAIN and isinstance(result, asyncio.Future):
                client._reply_later(origin, result)
            else:
                client._reply(origin, result)
        except BaseException as error:
            self._now = time.monotonic()
            client._fail(origin, error)

    def _default(self, client: ChannelClient, path: str, channel: str, message: str) -> str:
        """What a message does for which the program has no handler."""
        if message == "subscribe" and channel in self._open:
            self.subscribe(client, channel)
            return "Subscription: OK"
        if message == "unsubscribe" and (channel in self._open or channel in client.channels
                                         or self._guarded(channel)):
            self.unsubscribe(client, channel)
            return "Unsubscription: OK"
        if message == "subscribe":
            raise mistaken(404, "Not found: call channels_support(%r), or guard it", channel)
        raise mistaken(404, "Not found: no handler for the message %s", path)

    def _guarded(self, channel: str) -> bool:
        return self._channels.find(f"/{channel}/subscribe") is not None

    # HTTP.

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._stopping or self._loop is None:  # its TLS handshake took until now
            writer.transport.abort()
        else:
            HTTPConnection(self, writer)  # it needs no streams: they would cost half of the speed

    async def _answer(self, request: Request,
                      connection: HTTPConnection) -> Response | ChannelClient:
        """The answer to a request, or the client that it becomes; never raises for its faults."""
        try:
            self._check_host(request)
            lost = "sec-websocket-key" in request.headers and "upgrade" not in request.headers
            upgrade = lost or "websocket" in request.members("upgrade")
            if upgrade or request.method not in ("GET", "HEAD", "OPTIONS"):
                self._check_origin(request)
            if upgrade:
                return await self._upgrade(request)
            answer = await self._respond(request)
            if isinstance(answer.body, Path) and not connection._done:  # who would close it?
                answer = answer_file(request, answer, answer.body)
            return answer
        except BaseException as error:
            refusal = getattr(error, "response", None)
            if isinstance(refusal, Response):  # an HTTPError's, unless it has no super().__init__()
                logger.info("%r: %s", request, error)
                return refusal
            gone = self._stopping or connection._done
            if gone and isinstance(error, asyncio.CancelledError):
                raise
            logger.exception("%r failed", request)
            return HTTPError(500).response

    async def _respond(self, request: Request) -> Response:
        """What the route's handler answers. Raises HTTPError, and whatever the handler raises."""
        method = request.method
        try:
            endpoints, values = self._find(request.path) or ({}, ())
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
            if endpoints:
                raise HTTPError(405, headers=allow)
            if request.path == "/favicon.ico":  # browsers ask for it, and their consoles tell a 404
                return Response(status=204)
            raise mistaken(404, "Not found: no handler for the route %s", request.path)
        given: dict[Any, Any] = {**dict(zip(endpoint.path_names, values)), "request": request}
        if endpoint.takes_more:
            given = {**request.params(), **given}
        else:
            given[None] = request  # its parameters are read when the handler asks for them
        for name in endpoint.required:
            if name not in given:
                raise mistaken(400, "The parameter %s of %s is missing, and has no default (a body "
                               "counts if its Content-Type is that of a form, or of JSON)", name,
                               request.path)
        result = await self._invoke(endpoint, given)
        if result is None:
            if method == "GET" and not endpoint.told:
                endpoint.told = True
                logger.warning("%s returned None, so a browser stays where it was (204): is a "
                               "return missing?", endpoint.name, extra=ALWAYS)
            return Response(status=204)
        if isinstance(result, (str, bytes, bytearray, memoryview, dict, list, Path)):
            return Response(result, json_default=self.config.json_default)
        if isinstance(result, Response):  # what was set after it was made is checked, too
            return Response(result.body, result.status, result.headers,
                            json_default=self.config.json_default)
        raise TypeError(f"{endpoint.name} returned {type(result).__name__}; a route returns "
                        "str, bytes, dict, list, Path, Response or None")

    def _find(self, path: str) -> Found | None:
        """The route at `path`, or the folder with the longest prefix. Raises UnicodeDecodeError."""
        found, folders = self._routes.find(path, decode=True), self._folders
        names = tuple(split_path(path)) if folders and not found else ()
        for prefix, endpoints in folders:
            if found is None and names[:len(prefix)] == prefix:
                found = endpoints, (names[len(prefix):],)
        return found

    async def _upgrade(self, request: Request) -> ChannelClient:
        """The client that the connection becomes. Raises HTTPError, or what a handler raises."""
        if not self.config.websockets_server or request.path != self.config.websockets_path:
            raise mistaken(404, "No WebSocket at %s, but at config.websockets_path", request.path)
        head, dialect = accept_handshake(request, self.config.compression)
        client = ChannelClient(self, request, dialect, head)
        for endpoint in list(self._on_connect):
            try:
                if await self._invoke(endpoint, {"client": client, "request": request}) is False:
                    raise HTTPError(403)
            except HTTPError as error:
                logger.warning("%s refused %s: %s", endpoint.name, request.address, error)
                raise
        return client

    def _check_host(self, request: Request) -> None:
        """Is this server meant (DNS rebinding)? Raises HTTPError 403."""
        host = request.headers.get("host", "localhost").lower()
        allowed = self.config.allowed_hosts
        if allowed is None:
            fine = not self._local_only or is_loopback(host)
        else:
            name = re.sub(":[0-9]+$", "", host)
            fine = any(each.lower() in (name, host, "*") for each in allowed)
        if not fine:
            raise mistaken(403, "Host %r is not in config.allowed_hosts", host)

    def _check_origin(self, request: Request) -> None:
        """Is its page allowed (RFC 6455, 10.2), if a browser sent it? Raises HTTPError 403."""
        text = request.headers.get("origin")
        allowed = self.config.allowed_origins
        if allowed is None:  # same origin; a request of HTTP/1.0 may have no host
            host = request.headers.get("host")
            allowed = [f"{re.split('[+:]', self.url)[0]}://{host}"] if host else []
        if text is not None and "*" not in allowed:
            origin = parse_origin(text)
            if origin is None or origin not in map(parse_origin, allowed):
                raise mistaken(403, "Origin %r is not in config.allowed_origins", text)

    # Start and stop.

    def up(self, port: int | None = None, host: str | None = None, *, block: bool | None = None,
           ssl: ssl_module.SSLContext | None = None, sock: socket.socket | None = None,
           reuse_port: bool = False, open_browser: bool = False) -> str:
        """Serve from a background thread; return the address, such as "http://127.0.0.1:8000".

        In a script it blocks until Ctrl+C, SIGTERM or `down()`; in a REPL or notebook it returns
        at once, also when the same call is made again; `block` overrides. `port` and `host` are
        those of `config` by default; port 0 picks a free one; `sock` is a listening socket instead
        of both. `ssl` is a context with a certificate. `reuse_port` lets processes share the port
        (ValueError where the system does not). Raises OSError for a port that cannot be had,
        RuntimeError if the app serves already; and SystemExit, when it blocks, if a handler does.
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

        repl = hasattr(sys, "ps1") or bool(sys.flags.interactive)
        if repl and not block and self.url and self._where == (port, host, ssl, sock, reuse_port):
            return self.url  # a notebook's cell is run again
        if block is None:
            block = not repl
            with contextlib.suppress(RuntimeError):  # no loop runs here
                asyncio.get_running_loop()
                block = False  # as in a notebook
                if not repl:
                    logger.warning("up() does not block an event loop: await serve()", extra=ALWAYS)
        self._wanted = True
        threading.Thread(target=contextvars.copy_context().run, args=(run,), name="webchannels",
                         daemon=True).start()
        url = ready.result()
        if not self._wanted:
            self.down()  # once more: when it was called, nothing was there to stop
        if open_browser:
            import webbrowser  # it takes 3 ms, and few want it
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        if block:
            ours = (threading.current_thread() is threading.main_thread()
                    and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
            if ours:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                near = find_address()
                if not {near, "*"}.intersection(self.config.allowed_hosts or "*"):
                    near = "localhost"  # asked by the address, it would refuse
                urls = dict.fromkeys([url, url.replace("//localhost:", f"//{near}:")])
                print(f"Serving at {' and '.join(urls)} (Ctrl+C stops)", flush=True)
                while not done.is_set():  # as in down()
                    time.sleep(0.1)
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
        for origin in self.config.allowed_origins or ():
            if origin != "*" and not parse_origin(origin):
                raise ValueError("config.allowed_origins are as in 'https://example.com', or '*': "
                                 f"not {origin!r}")
        for name in self.config.allowed_hosts or ():
            if name != "*" and not _HOST.fullmatch(name):
                raise ValueError("config.allowed_hosts are as in 'example.com', '[::1]', or '*': "
                                 f"not {name!r}")
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError(f"this app serves already at {self.url}; call down() first")
            self._reset()  # a loop that was closed before its time leaves things behind
            self._threads = asyncio.Semaphore(self.config.max_threads)  # this may raise
            handover = Handover(loop, 8 * self.config.max_send_buffer)
            self._loop, self._thread, self._done = loop, threading.get_ident(), done
            self._where = where
            self._stop, self._context = loop.create_future(), contextvars.copy_context()
            self._handover = handover
        # Once glibc has freed a block of this size, it keeps freed memory for the next message. It
        # gave it back before, and took it again page by page: a third of the time of 1 MiB echoed.
        bytes(4 * 1024 * 1024)
        async with contextlib.AsyncExitStack() as ending:  # what is added last ends first
            ending.callback(self._finish)
            self._open.add(self.config.default_channel)
            if loop.get_exception_handler() is None:
                # asyncio may still try to accept for a second, after it has paused: see there.
                ending.callback(lambda: loop.call_later(2, self._let_go_of, loop) if self._paused
                                else self._let_go_of(loop))
                loop.set_exception_handler(self._on_loop_error)
            bus = self.config.bus
            if self.config.redis_url and not bus:
                bus = RedisBus(self.config.redis_url, 8 * self.config.max_send_buffer)
            if bus:
                bus.deliver, bus.missed = self._deliver, self._missed
                await bus.start()
                ending.push_async_callback(bus.stop)
                self._begin_on(bus)
            await self._listen(*where)
            ending.callback(asyncio.ensure_future(self._sweep()).cancel)
            ending.push_async_callback(self._cut)
            ending.push_async_callback(self._shut_down)
            ending.callback(lambda: [each.close() for each in self._servers])
            if sys.platform != "win32":  # those just accepted have their turn before it is closed
                ending.push_async_callback(asyncio.sleep, 0)
                for each in self._listening:
                    ending.callback(loop.remove_reader, each)
            await self._servers[0].start_serving()
            ready.set_result(self.url)
            logger.info("serving at %s", self.url, extra=ALWAYS)
            try:
                error = await self._stop
            except GeneratorExit:  # nobody will ever run this loop again; another may serve
                ending.pop_all()
                raise
            if error:
                raise error

    def _begin_on(self, bus: Bus) -> None:
        """From now on the bus carries broadcasts; what was kept until now is not all there was."""
        self._bus, self._redis = bus, bus if isinstance(bus, RedisBus) else None
        if self._redis:
            for kept in self._history.clear():
                for message in kept.messages:
                    self._spread([(kept.channel, message.push)], message.without, None)
            return
        self._missed()
        for channel in self._history.kept:
            bus.listen(channel, True)

    def _finish(self) -> None:
        if self._handover:
            self._handover.end()
        sparing.tell_counts()
        for _ in range(self._idle):
            self._jobs.put(lambda: False)
        if self._redis:
            self._history.clear()
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
        if isinstance(self._loop, asyncio.BaseEventLoop):
            self._ssl = ssl  # HTTPConnection shakes hands
        elif ssl:  # others, such as uvloop, read before they can be told not to
            where.update(ssl=ssl, ssl_handshake_timeout=self.config.handshake_timeout)
        expect(port, int, "the port is an int, and comes first: up(8000, '0.0.0.0')")
        expect(ssl, (ssl_module.SSLContext, type(None)), "ssl is an ssl.SSLContext, which has "
               "load_cert_chain('cert.pem', 'key.pem')")
        try:
            server = await asyncio.start_server(  # start_serving: a cancel now would leak it
                self._accept, backlog=1024, start_serving=False, **where)
        except OSError as error:
            hint = f"cannot serve on port {port} of {host}: {error}"
            if error.errno == errno.EADDRINUSE:
                hint = (f"port {port} on {host} is taken: stop what has it, or choose another: "
                        f"up({port + 1}), or a free one: up(0)")
            raise OSError(error.errno or errno.EADDRNOTAVAIL, hint) from None
        self._servers, self._listening = [server], server.sockets
        names = [each.getsockname() for each in server.sockets]
        self._local_only = all(isinstance(name, tuple) and is_loopback(name[0]) for name in names)
        scheme = "https" if ssl else "http"
        if not isinstance(names[0], tuple):  # a Unix socket's path, or bytes if it is abstract
            self.url = f"{scheme}+unix://{urllib.parse.quote(names[0], safe='')}"
            return
        address, self.port = names[0][:2]
        if address in ("0.0.0.0", "::"):
            hosts = filter(None, map(_HOST.fullmatch, self.config.allowed_hosts or ()))
            address = [*(each[1].strip("[]") for each in hosts), "localhost"][0]
        shown = f"[{address}]" if ":" in address else address
        self.url = f"{scheme}://{shown}:{self.port}"

    async def _listen_again(self, sock: Any) -> None:
        self._servers.append(await asyncio.start_server(self._accept, backlog=1024, sock=sock))

    def down(self) -> None:
        """Stop: no new connections, a Close 1001 to every client, answers in flight finished.

        Returns when that is done, within `config.shutdown_timeout`; in a handler, or on the event
        loop, at once. Calling it again, or without `up()`, does nothing. Example: down()
        """
        self._wanted = False
        done, end = self._done, time.monotonic() + self.config.shutdown_timeout + 2
        alive = self._give(self._end) or self._loop is None  # not in a loop that was closed
        waits = alive and threading.get_ident() != self._thread and _params.get() is None
        while waits and not done.is_set():  # no lock: a signal handler may interrupt this by down()
            if time.monotonic() > end:
                logger.warning("a handler holds the event loop: the server could not stop")
                break
            time.sleep(0.005)

    async def _shut_down(self) -> None:
        """Let what runs finish within the time for it; then end it."""
        self._stopping = True
        for connection in (*self._http, *self._sockets):
            connection._shut()
        end = time.monotonic() + self.config.shutdown_timeout
        while (self._http or self._sockets or self._tasks) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def _cut(self) -> None:
        """End what did not end by itself, also when `_shut_down()` was cancelled."""
        handlers = [each._task for each in (*self._http, *self._sockets)]
        tasks: list[Any] = [*self._tasks, *filter(None, handlers)]
        if tasks:
            logger.warning("%d handlers did not end within config.shutdown_timeout", len(tasks))
        for client in list(self._sockets):
            client._close(1001, "server going down")  # also behind a handler that does not end
        for connection in (*self._http, *self._sockets):
            connection._abort("the server goes down")
        for task in tasks:
            task.cancel()
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0)), *tasks], timeout=1)

    async def _sweep(self) -> None:
        """One timer for all: deadlines, pings, and those that left long ago."""
        trim_at = 0.0
        while True:
            try:
                settings = self.config
                times = (settings.handshake_timeout, settings.keep_alive_timeout, 4,
                         settings.ping_timeout, settings.ping_interval or 4,
                         settings.disconnected_ttl, settings.kept_ttl)
                pause = max(min(times) / 4, 0.02)
                await asyncio.sleep(pause)
                now = time.monotonic()
                self._here()  # in case that a thread was interrupted before it could wake the loop
                sparing.tell_counts(now)
                self._history.sweep()
                self._check(now, pause)
                if self._freed and now >= trim_at:
                    self._freed, trim_at = False, now + _TRIM
                    trim_memory()
            except Exception as error:
                logger.error("the sweep fails: is a field of config of the wrong type? %r", error)
                await asyncio.sleep(10)

    def _check(self, now: float, seconds: float) -> None:
        """All that the sweep asks. (It sleeps with no client in its hand.)"""
        for connection in (*self._http, *self._sockets):
            connection._check(now, seconds)
        for client, left in [*self._left_at.items()]:
            if now - left >= self.config.disconnected_ttl:
                del self._left_at[client]
                self._freed = True
            elif (now - left > self.config.abandoned_timeout and client.request.headers
                    and client not in self._sockets):
                client._let_go()
                self._freed = True

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio tells of each of many failed accepts, with a traceback; now and then will do."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self._paused = True
            logger.warning("%s: accepting pauses", error.strerror)
        elif context["message"] == "Accept failed on a socket" and not self._stopping:
            logger.warning("%s: listening again", error)  # on Windows asyncio is about to close it
            asyncio.ensure_future(self._listen_again(context["socket"].dup()))
        elif not ("_start_serving" in context["message"]  # though closed
                  and (self._stopping or self._loop is not loop)):
            loop.default_exception_handler(context)

    def _let_go_of(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave the loop as it was found, unless it serves again, or somebody else changed it."""
        if loop.get_exception_handler() == self._on_loop_error and not (
                self._loop is loop and not self._stopping):
            loop.set_exception_handler(None)

    # Threads and forks.

    def _here(self) -> bool:
        """Is this the loop's thread? Then what others handed over before comes before."""
        here = threading.get_ident() == self._thread
        if here and self._handover and self._handover.calls:
            self._context.copy().run(self._handover.take)  # not in that of a handler
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
        writers = [each._writer for each in (*self._http, *self._sockets)]
        if isinstance(self._bus, RedisBus):
            writers.append(self._bus._writer)
        sockets = [writer.get_extra_info("socket") for writer in writers if writer]
        with open(os.devnull) as null:
            for each in [*self._listening, *sockets]:
                if each.fileno() >= 0:
                    os.dup2(null.fileno(), each.fileno(), inheritable=False)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._done.set()
        self._history.clear()  # the parent goes on with its numbers
        self._reset()


def is_redefined(old: Any, new: Any) -> bool:
    """Is `new` a later definition of the same function?

    Lambdas, methods, and what is decorated or made by another function share their names.
    """
    return (inspect.isfunction(old) and inspect.isfunction(new) and "<" not in new.__qualname__
            and (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
            and not hasattr(old, "__wrapped__") and not hasattr(new, "__wrapped__"))


def trim_memory() -> None:
    """Have glibc return to the system what is free: from a peak, it could keep all for ever."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):  # another C library
            import ctypes
            ctypes.CDLL(None).malloc_trim(0)


def find_address() -> str:
    """This machine's address in its network, or "localhost"."""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's; and nothing is sent
        return str(probe.getsockname()[0])
    return "localhost"


@functools.lru_cache(maxsize=32)  # of what a peer sends, which may be long
def is_loopback(host: str) -> bool:
    """Does this name or address, as a Host field or without brackets, mean the machine itself?"""
    match = _HOST.fullmatch(host)
    host = match[1] if match else host
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")  # RFC 6761, 6.3


@functools.lru_cache(maxsize=32)
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

# ------------------------------------------------------------------------------------- client

# What the client asks for, and what may be answered (RFC 7692, 7.1).
_OFFER = "permessage-deflate; server_no_context_takeover; client_max_window_bits"
_AGREED = re.compile(
    r"permessage-deflate; server_no_context_takeover(?:; (?:client_no_context_takeover"
    r"|server_max_window_bits=[0-9]+|client_max_window_bits=(9|1[0-5])))*")
_MOST_INFLATION = 1032  # times: deflate has no more, so that only the size of a message counts
_FINAL = re.compile(r"(?:1000|1008|(?!429)[34][0-9]{2}) ")  # it is closed, or refused, for good


class _Reader(asyncio.StreamReader):
    def set_exception(self, exc: BaseException) -> None:
        self.feed_eof()  # what came before a reset is still read


class Received(NamedTuple):
    """What a server has pushed to a client of `connect()`.

    Without a payload, `.message` is None, and `.payload` the text or the bytes: what users type is
    no name. `.missed`: pushes of a kept channel were lost; what a new client gets comes next.
    Example: Received("room", "say", "Hello").payload
    """

    channel: str
    message: str | None
    payload: Any
    missed: bool = False


class ClientConnection:
    """A connection to a server, for a script, a device or a test; `connect()` is its short name.

    `url` is that of the WebSocket: http://, https://, ws:// or wss://. `headers` are for the
    handshake; `ssl` is a context by which to check the certificate. With `reconnect`, it waits for
    the server and comes back as a page does, after random delays of up to 30 seconds, unless it was
    closed with 1000 or 1008, or refused (3xx, 4xx, but not 429). `settings` are fields of Config.
    Raises ConnectionError with the close code, or the HTTP status, and the reason; and ValueError
    for a bad URL or header. All methods wait, and any thread may call them. Pings are answered
    meanwhile. Iterating gives each push, and ends when the connection is closed with 1000.
    Example: server: ClientConnection = connect("http://127.0.0.1:8000", reconnect=True)
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None,
                 ssl: ssl_module.SSLContext | None = None, reconnect: bool = False,
                 **settings: Any) -> None:
        self.url, self._reconnect, self._settings = url, reconnect, Config(**settings)
        match = re.fullmatch(r"(?:http|ws)(s?)://([^/?#]+)[!-~]*", str(url), re.IGNORECASE)
        if not match or not _HOST.fullmatch(match[2]) or ssl and not match[1]:
            raise ValueError("a URL begins with http://, https://, ws:// or wss://, has no user, "
                             f"no space, only ASCII, and an s for `ssl`: not {url!r}")
        parts, secure = urllib.parse.urlsplit(url), bool(match[1])
        self._where = parts.hostname or "", parts.port or (443 if secure else 80)
        self._context = (ssl or ssl_module.create_default_context()) if secure else None
        fields = {"Host": parts.netloc, "Upgrade": "websocket", "Connection": "Upgrade",
                  "Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": SUBPROTOCOL,
                  **dict(Response(headers=headers).headers)}  # which are checked by that
        if self._settings.compression:
            fields["Sec-WebSocket-Extensions"] = _OFFER
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        head = [f"GET {target} HTTP/1.1", *map(": ".join, fields.items())]
        self._head = "\r\n".join(head).encode("latin-1")
        self._changed = threading.Condition()  # has the lock of all that follows
        self._transport: Any = None  # that of the last attempt
        self._frames: Any = None  # a FrameReader, since the first handshake
        self._open = False  # can messages be sent?
        self._ended = False  # will it not come back?
        self._why = "1006 no thread: was there a fork()?"  # or its end: a code, a space, a reason
        self._failures = 0
        self._refs = itertools.count(1)
        self._replies: dict[int, Any] = {}  # that are waited for; or an error
        self._channels: set[str] = set()  # subscribed to
        self._renewals: dict[int, str] = {}  # the refs by which they were renewed
        self._places: dict[str, tuple[str, int]] = {}  # in channels that were asked for
        self._inbox: collections.deque[tuple[int, Received]] = collections.deque()  # with sizes
        self._waiting = 0  # bytes in it
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        self._thread.start()
        try:
            with self._changed:
                self._wait(lambda: self._frames)
        except BaseException:  # Ctrl+C, or what else a signal's handler raises
            self.close()
            raise

    def __enter__(self) -> ClientConnection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Received]:
        try:
            while True:
                yield self.receive()
        except ConnectionError:
            if not self._why.startswith("1000 "):
                raise

    def send(self, channel: str, message: str, payload: Any = _NO_PAYLOAD) -> None:
        """Send a message, and wait until its handler is done, however long; else as `request()`.

        Example: server.send("room", "say", "Hello")
        """
        self.request(channel, message, payload, timeout=None)

    def request(self, channel: str, message: str, payload: Any = _NO_PAYLOAD, *,
                timeout: float | None = 30) -> Any:
        """Send a message with what JSON knows, or bytes; return what its handler replies.

        With `reconnect`, it waits for the connection first. Raises ChannelError for an error of the
        server, TimeoutError after so many seconds (None: never), ConnectionError if the connection
        is lost meanwhile: then nobody knows whether the handler ran, and nothing is sent twice.
        TypeError or ValueError for what cannot be sent. Example: server.request("____", "echo", 42)
        """
        ref = next(self._refs)
        body = self._encode(channel, message, ref, payload)
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        with self._changed:
            self._wait(lambda: self._open, end)
            self._write(*body)
            self._replies[ref] = None
            try:
                self._wait(lambda: self._replies[ref], end)
            finally:
                reply = self._replies.pop(ref)
        if isinstance(reply, Exception):
            raise reply
        return reply.get("payload")

    def subscribe(self, channel: str, *, timeout: float | None = 30) -> Any:
        """Subscribe, also when the connection comes back; the log tells if that is refused.

        Returns the reply; raises as `request()`. Example: server.subscribe("room")
        """
        with self._changed:  # nothing comes between
            reply = self.request(channel, "subscribe", timeout=timeout)
            self._channels.add(channel)
        return reply

    def unsubscribe(self, channel: str, *, timeout: float | None = 30) -> Any:
        """Unsubscribe; as `subscribe()`. Example: server.unsubscribe("room")"""
        with self._changed:
            self._channels.discard(channel)  # also if the connection is lost
            return self.request(channel, "unsubscribe", timeout=timeout)

    def receive(self, timeout: float | None = None) -> Received:
        """The next push.

        Raises TimeoutError after so many seconds (None: never), and ConnectionError when it has
        ended and all pushes are taken; it is closed when over 8 * max_message_size bytes wait.
        Example: server.receive(timeout=5)
        """
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        with self._changed:
            self._wait(lambda: self._inbox, end)
            size, push = self._inbox.popleft()
            self._waiting -= size
        return push

    def close(self) -> None:
        """Close politely, and end what other threads wait for. Example: server.close()"""
        with self._changed:
            self._reconnect = False
            if not (self._open or self._ended):  # what is under way finds that nobody wants it
                self._why, self._ended = "1000 ", True
                self._changed.notify_all()
            self._finish(1000, "")
            with contextlib.suppress(ConnectionError):
                self._wait(lambda: False)  # until it has ended

    def _wait(self, ready: Callable[[], Any], end: float = math.inf) -> None:
        """Wait, with the lock. Raises TimeoutError, and ConnectionError if it has ended before."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the connection's own thread, which logs, cannot wait for it")
        while not ready():
            left = end - time.monotonic()
            if self._ended or not self._thread.is_alive():
                raise self._error()
            if left <= 0:
                raise TimeoutError(f"{self.url} sent nothing in time")
            self._changed.wait(min(left, 1))  # on Windows, Ctrl+C ends no wait

    def _error(self) -> ConnectionError:
        return ConnectionError(printable(self._why.strip()))

    def _encode(self, channel: str, message: str, ref: int,
                payload: Any = _NO_PAYLOAD) -> tuple[int, bytes]:
        check_name(channel)
        expect(message, str, "a message is a str")
        fields = f'"ref":{ref},"channel":{_quote(channel)},"message":{_quote(message)}'
        if message == "subscribe":
            epoch, number = self._places.setdefault(channel, ("", 0))
            fields += f',"since":"{epoch}.{number}"' if epoch else ""  # else it is not kept
        return encode_envelope(fields, payload, self._settings.json_default)

    def _write(self, opcode: int, body: bytes) -> None:
        """Send a frame, masked by what nobody can know before (RFC 6455, 5.3), if it is open."""
        settings, bits = self._settings, self._bits if opcode < CLOSE else 0
        frame = encode_message(opcode, body, bits, settings.compression_threshold)
        if len(frame) * settings.max_inflation < len(body):  # a server would not inflate it
            frame = encode_frame(opcode, body)
        start, key = {126: 4, 127: 10}.get(frame[1], 2), os.urandom(4)
        head = bytes((frame[0], 128 | frame[1])) + frame[2:start]
        if self._open:
            self._loop.call_soon_threadsafe(
                self._transport.write, head + key + unmask(frame[start:], key))

    def _finish(self, code: int, reason: str) -> None:
        """Send a Close frame; then the server hangs up, or is cut (RFC 6455, 7.1.1)."""
        if self._open:
            self._write(CLOSE, b"" if code == 1005 else code.to_bytes(2, "big") + reason.encode())
            self._open, self._why = False, f"{code} {reason}"
            self._frames.stop()
            self._loop.call_soon_threadsafe(
                self._loop.call_later, self._settings.handshake_timeout, self._transport.abort)

    # What follows runs in the connection's own thread.

    async def _run(self) -> None:
        """Connect, and come back, until the end."""
        self._loop = asyncio.get_running_loop()
        while not self._ended:
            why = ""
            try:
                await self._talk()
            except asyncio.TimeoutError:
                why = "1006 no answer in time"
            except EOFError:
                why = "1006 the server hung up"
            except Exception as error:  # whatever it is, those who wait are told
                refused = isinstance(error, ProtocolError)
                why = "%s %s" % error.args if refused else f"1006 {type(error).__name__}: {error}"
            if self._transport:
                self._transport.abort()
            with self._changed:
                self._open = False
                if not self._ended:
                    self._why = why or self._why
                    self._ended = not self._reconnect or bool(_FINAL.match(self._why))
                for ref, reply in self._replies.items():
                    self._replies[ref] = reply or self._error()
                self._changed.notify_all()
            if not self._ended:
                pause = random.random() * min(30, 2 ** self._failures)  # as in channels.js
                self._failures = min(self._failures + 1, 5)
                self._log("%s: the next attempt is in %.1f s", self._error(), pause)
                for _ in range(30):
                    if not self._ended:  # by close()
                        await asyncio.sleep(pause / 30)

    def _log(self, text: str, *values: object) -> None:
        """When nothing is locked; and an error of the program's own logging does no harm there."""
        self._loop.call_soon(functools.partial(
            logger.warning, f"%s: {text}", self.url, *values, extra=ALWAYS))

    async def _talk(self) -> None:
        """Connect, and take what comes until the server hangs up."""
        reader = await asyncio.wait_for(self._dial(), self._settings.handshake_timeout)
        with self._changed:
            if self._ended:
                return
            self._open, self._renewals = True, {}
            for channel in self._channels:
                self._renew(channel)
            self._changed.notify_all()
        data = b""
        while self._frames.more or (data := await self._read(reader)):
            with self._changed:
                for kind, content in self._frames.receive(b"" if self._frames.more else data):
                    if kind in (TEXT, BINARY):
                        self._take(kind, content)
                    elif kind in (CLOSE, FAIL):
                        self._finish(*content)
                    elif kind == PING and self._transport.get_write_buffer_size() < _READ_AHEAD:
                        self._write(PONG, content)  # else it hears of us anyhow
                self._changed.notify_all()
        if self._open:
            raise EOFError

    def _renew(self, channel: str) -> None:
        """Ask for a subscription again, if it is still wanted."""
        with self._changed:
            if self._open and channel in self._channels:
                ref = next(self._refs)
                self._renewals[ref] = channel
                self._write(*self._encode(channel, "subscribe", ref))

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """What comes next; none: the server hung up. If it is silent it is sent a ping."""
        for seconds in self._settings.ping_interval, self._settings.ping_timeout:
            try:
                return await asyncio.wait_for(reader.read(_READ_AHEAD), seconds or None)
            except asyncio.TimeoutError:
                with self._changed:
                    self._write(PING, b"")
        if self._open:
            raise ConnectionError("no answer to a ping")
        return b""  # it was closed, for another reason

    async def _dial(self) -> asyncio.StreamReader:
        """Connect, and shake hands (RFC 6455, 4.1). Raises all kinds of errors."""
        reader = _Reader(_READ_AHEAD)
        self._transport, _ = await self._loop.create_connection(
            lambda: asyncio.StreamReaderProtocol(reader), *self._where, ssl=self._context)
        key = base64.b64encode(os.urandom(16))
        self._transport.write(self._head + b"\r\nSec-WebSocket-Key: %b\r\n\r\n" % key)
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1")
        status, end, rest = head.partition("\r\n")
        answer = Request(f"GET / HTTP/1.0{end}{rest}")  # it has the same fields
        refused = re.match(r"HTTP/1\.[01] ([2-5][0-9]{2}) ?(.*)", status)
        if refused:
            text = await reader.read(max(0, int(answer.headers.get("content-length", "0"))))
            words = refused[2], answer.headers.get("location"), text.decode("utf-8", "replace")
            raise ProtocolError(refused[1], " ".join(filter(None, words)))
        agreed = answer.headers.get("sec-websocket-extensions", "")
        deflate = _AGREED.fullmatch(agreed)
        if not (status.startswith("HTTP/1.1 101 ") and answer.members("upgrade") == ["websocket"]
                and "upgrade" in answer.members("connection")
                and answer.headers.get("sec-websocket-accept") == accept_key(key.decode())
                and answer.headers.get("sec-websocket-protocol", "") == SUBPROTOCOL
                and (not agreed or self._settings.compression and deflate)):
            raise ConnectionError(f"no server of {SUBPROTOCOL} answers so: {head}")
        self._bits = int(deflate[1] or 15) if deflate else 0
        self._frames = FrameReader(self._settings.max_message_size,
                                   _MOST_INFLATION if agreed else 0, masked=False)
        return reader

    def _take(self, opcode: int, data: Any) -> None:
        """A message has come. Raises all kinds of errors for what is not of webchannels.v1."""
        self._failures = 0  # not before: a server may let us in and drop us
        if data == "":
            return  # a keep-alive
        text, _, payload = (data, "", "") if opcode == TEXT else data.partition(b"\n")
        frame = load_json(text if opcode == TEXT else text.decode())
        if opcode == BINARY:
            frame["payload"] = payload
        ref, channel, message = frame.get("ref"), frame.get("channel", ""), frame.get("message")
        expect(channel, str, "a channel is a str")
        expect(message, (str, type(None)), "a message is a str")
        pushes = [Received(channel, None, None, True)] if "missed" in frame else []
        epoch, last = self._places.get(channel, ("", 0))
        if epoch and "n" in frame:
            if frame["n"] <= last:
                return  # it comes twice
            self._places[channel] = epoch, frame["n"]
        if "at" in frame and channel in self._places:
            self._places[channel] = parse_position(frame["at"])
        if ref in self._replies:
            self._replies[ref] = ChannelError(frame["error"]) if "error" in frame else frame
        elif ref in self._renewals and "error" in frame:
            channel = self._renewals.pop(ref)
            if frame["error"].startswith("ERROR : 5"):  # not for good, as in channels.js
                self._loop.call_later(random.random() * 30, self._renew, channel)
            else:
                self._channels.discard(channel)
            self._log("the subscription to %s is refused: %s", channel, frame["error"])
        elif ref is None and ("payload" in frame or message is not None):
            named = (message, frame["payload"]) if "payload" in frame else (None, message)
            pushes.append(Received(channel, *named))
        for push in pushes:
            size = len(data) + 500  # about, with what holds it
            self._inbox.append((size, push))
            self._waiting += size
            if self._waiting > 8 * self._settings.max_message_size:
                self._finish(1008, "over 8 * max_message_size bytes wait for receive()")


connect = ClientConnection


# -------------------------------------------------------------------------------- default app

app = WebChannels()
config, params, route, channel = app.config, app.params, app.route, app.channel
on_connect, on_disconnect, up, serve = app.on_connect, app.on_disconnect, app.up, app.serve
down, broadcast, keep, subscriptions = app.down, app.broadcast, app.keep, app.subscriptions
channels_support, channels_script, static = app.channels_support, app.channels_script, app.static
connected_clients, disconnected_clients = app.connected_clients, app.disconnected_clients
subscribe, unsubscribe, unsubscribe_client = app.subscribe, app.unsubscribe, app.unsubscribe_client
unsubscribe_disconnected_clients = app.unsubscribe_disconnected_clients


# -------------------------------------------------------------------------------- channels.js

# A copy of the file of that name: `python3 test_webchannels.py --embed` makes it.
CHANNELS_JS: str = r"""// (c) 2026 webchannels contributors. SPDX-License-Identifier: MIT
var parse_payload = /** @type {(payload: any) => void} */ (Object(globalThis).parse_payload)
var Genie = /** @type {{ WebChannels: typeof WebChannels }} */ (Object(globalThis).Genie)
var WebChannels = (() => {
  if (typeof document === 'undefined') throw new Error('channels.js works in pages only')

  const TICK = 5000 // ms
  const TRUST = 5   // ticks without a word until the server is asked; it has two to answer

  const page = Object(window)
  const { origin } = page
  // Elements with a name hide what the document has.
  const ofDocument = (name = '') => Reflect.get(Document.prototype, name, document)
  const script = { __proto__: null, ...ofDocument('currentScript')?.dataset } // its own only
  const base = origin === 'null' ? location.href : origin // about:srcdoc is no base
  let address = script.path || '/'
  try { address = new URL(address, base).href.replace(/^http/, 'ws') } catch { } // connect() tells

  let state = /** @type {'connecting' | 'open' | 'reconnecting' | 'closed'} */ ('closed')
  let socket = /** @type {any} */ (null)
  let trust = 0 // ticks until the server is asked for a word; below 0: ticks since then
  let timer = 0, failures = 0, lastRef = 0, hinted = 0
  // {data, ref, promise, resolve, reject}: of the reply or, without ref, the sending
  const queue = new Set()    // not sent yet
  const requests = new Map() // by ref: not answered yet
  // {channel, promise, resolve, reject, timer, failures (once confirmed)}
  const subscriptions = new Map() // by channel: what the page wants of each connection
  const places = new Map() // by channel that is kept: 'epoch.number' of what the page has

  // ---- To the page: its listeners may open() or close() ----
  // False: a listener prevented it.
  const emit = (type = '', detail = /** @type {any} */ (null), channel = '') => client
    .dispatchEvent(Object.assign(new CustomEvent(type, { detail, cancelable: true }), { channel }))
  const complain = (/** @type {any} */ detail) =>
    emit('error', detail) && console.error('WebChannels:', detail)

  const enter = (/** @type {any} */ next, type = '', detail = {}) => {
    const before = state
    state = next
    ofDocument('documentElement')?.setAttribute('data-webchannels', next)
    if (type) emit(type, detail)
    if (before !== next && state === next) emit('state', next)
  }

  const deliver = (/** @type {any} */ push) => {
    const { channel, message, payload } = push
    const detail = payload === undefined ? message : push
    let untaken = emit('message', detail, channel)
    // No slash in the message: /a + b/c is not /a/b + c.
    for (const type of /\//.test(message) ? [] : [`/${channel}/${message}`, '/:'])
      untaken = emit(type, push) && untaken
    if (untaken) page.parse_payload(detail)
  }

  // ---- The connection ----
  const canSend = () => socket?.readyState === 1 // wrappers of WebSocket have no OPEN
  // Full jitter: a restarted server has them all coming.
  const delay = (failures = 0) => Math.random() * Math.min(
    30000, 1000 * (ofDocument('hidden') || origin === 'null' ? 10 : 1) * 2 ** failures) // ms

  const connect = () => {
    trust = 0 // the handshake asks, too
    try {
      const opening = socket = new WebSocket(address, 'webchannels.v1')
      opening.binaryType = 'arraybuffer'
      opening.onopen = opened
      opening.onmessage = received
      opening.onclose = ({ code, reason }) => opening === socket && disconnect(code, reason)
    } catch (error) { disconnect(1000, String(error)) }
  }

  // Ticks, not times: hidden tabs tick late, frozen ones never, but hear before they tick.
  const tick = () => {
    clearTimeout(timer)
    timer = setTimeout(tick, TICK)
    if (!socket) return connect()
    if (canSend()) failures = 0 // not before: a server may let us in and drop us
    if (--trust === 0 && canSend()) transmit('')
    if (trust < -1) disconnect(1006, 'no sign of life')
  }

  const wake = () => {
    failures = 0
    if (state === 'closed' || socket && trust <= 0) return // it is under way
    trust = 1
    tick()
  }

  const opened = () => {
    trust = TRUST
    subscriptions.forEach(renew)
    for (const frame of queue) if (canSend() && queue.delete(frame)) send(frame)
    if (canSend()) enter('open', 'open')
  }

  const received = (/** @type {any} */ { data }) => {
    trust = TRUST
    emit('debug', { in: data })
    if (data === '') return
    const end = data.byteLength && new Uint8Array(data).indexOf(10) // where its envelope ends
    const frame = JSON.parse(end ? new TextDecoder().decode(data.slice(0, end)) : data)
    const { channel, message, ref, error, at, n } = frame
    const place = places.get(channel)
    if (n <= place?.split('.')[1]) return // it comes twice
    if (at || n) places.set(channel, at || place?.replace(/\d+$/, n))
    if (at && place && place !== at) emit('missed', channel)
    if (end) frame[channel && message == null ? 'message' : 'payload'] = data.slice(end + 1)
    const request = requests.get(ref) // if it is still wanted
    if (!ref) error == null ? 'message' in frame && deliver(frame) : complain(frame)
    else if (error == null) request?.resolve(frame.payload)
    else request?.reject(Object.assign(Error(error), { name: 'ChannelError' }))
  }

  const disconnect = (code = 1006, reason = '') => {
    if (state === 'closed') return
    const final = code === 1000 || code === 1008 // the will of the page or the server
    const opened = state === 'open'
    const wait = final ? undefined : delay(failures++)
    clearTimeout(timer)
    if (!final) timer = setTimeout(tick, wait)
    socket?.close()
    socket = null
    for (const { reject } of requests.values())
      reject(failure(`Lost: ${code} ${reason}`, 'NetworkError'))
    if (final) {
      for (const { reject } of [...queue, ...subscriptions.values()])
        reject(failure(`Closed: ${code} ${reason}`))
      subscriptions.forEach(deferred) // open() asks for them again
      queue.clear()
    }
    enter(final ? 'closed' : 'reconnecting', 'close', { code, reason, opened, wait })
    if (!final) emit('debug', { wait })
    const why = origin === 'null' && !opened && failures < 2 // a sandbox or a file
      ? 'see config.base_path, allowed_origins' : (final || code > 1006) && reason
    if (why) complain({ error: `${address}: ${why}` })
  }

  const transmit = (/** @type {any} */ out) => {
    trust = Math.min(trust, 1) // then the next tick asks
    socket.send(out)
    emit('debug', { out })
  }
  const failure = (why = '', name = 'AbortError') => new DOMException(why.trim(), name)
  const deferred = (/** @type {any} */ more) => {
    more.promise = new Promise((resolve, reject) => Object.assign(more, { resolve, reject }))
    more.promise.catch(() => { }) // renew() complains
    return more
  }

  const framed = (/** @type {any} */ envelope, /** @type {any} */ payload) => deferred({
    ref: envelope.ref,
    data: ArrayBuffer.isView(payload) || /(Blob|File|yBuffer)]/.test({}.toString.call(payload))
      ? new Blob([JSON.stringify(envelope), '\n', payload]) // a copy
      : JSON.stringify({ ...envelope, payload })
  })
  const send = (/** @type {any} */ frame) => {
    if (canSend()) {
      if (frame.ref) requests.set(frame.ref, frame)
      else frame.resolve()
      transmit(frame.data)
    } else if (state === 'closed') frame.reject(failure('Closed'))
    else {
      let total = 0
      for (const { data } of [frame, ...queue]) total += data.size ?? data.length
      if (queue.size < 2048 && total <= 2**20) queue.add(frame)
      else frame.reject(failure('Queue full', 'QuotaExceededError'))
    }
    return frame.promise
  }

  const renew = (/** @type {any} */ subscription) => {
    if (!canSend()) return
    const { channel } = subscription
    const wanted = () => subscriptions.get(channel) === subscription
    clearTimeout(subscription.timer)
    client.request(channel, 'subscribe', undefined, { timeout: Infinity }).then(reply => {
      if (!wanted()) return
      Object.assign(subscription, { failures: 0 }).resolve(reply)
      emit('subscribed', channel)
    }, error => {
      if (!wanted() || error instanceof DOMException) return // lost: opened() renews it
      if (subscription.failures >= 0 && /^ERROR : 5/.test(error.message)) {
        const wait = delay(subscription.failures++)
        subscription.timer = setTimeout(() => wanted() && renew(subscription), wait)
        emit('debug', { wait, channel })
      } else if (subscriptions.delete(channel)) subscription.reject(error)
      complain({ error: error.message, channel, message: 'subscribe' })
    })
  }

  /** @typedef {(type: string, listener: (event: CustomEvent & { channel: string }) => void,
   *   options?: any) => void} Listen
   * @typedef {{ addEventListener: Listen, removeEventListener: Listen } & EventTarget} Target */
  class Client extends /** @type {new () => Target} */ (EventTarget) {
    get address() { return address }
    get state() { return state }

    /** @param {string} channel  @param {string} message  @param {any} [payload] */
    async sendMessageTo(channel, message, payload) {
      return send(framed({ channel, message }, payload))
    }

    /** @param {string} channel  @param {string} message  @param {any} [payload]
     * @param {{ timeout?: number, signal?: AbortSignal }} [options]  timeout in ms, or Infinity */
    async request(channel, message, payload, { timeout = 30000, signal } = {}) {
      if (!(timeout > 0)) throw new RangeError(`a timeout is above 0 ms, not ${timeout}`)
      signal?.throwIfAborted()
      const since = message === 'subscribe' ? places.get(channel) : undefined
      const frame = framed({ channel, message, ref: ++lastRef, since }, payload)
      const timer = setTimeout(
        frame.reject, Math.min(timeout, 2e9), failure('No reply in time', 'TimeoutError'))
      const abort = () => frame.reject(signal?.reason)
      signal?.addEventListener('abort', abort)
      return send(frame).finally(() => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', abort)
        queue.delete(frame)
        requests.delete(frame.ref)
      })
    }

    /** Gives pushes with a payload to `handler` until the result is called.
     * @param {string} path  '/channel/message', with `:name`, `:n::int`, `:x::float`
     * @param {(payload: any, info: any) => void} handler  info: channel, message, the `:name`s */
    channel(path, handler) {
      if (!/^(\/(:\w+(::(int|float|str))?|[^:/][^/]*)){2,}$/.test(path)
        || typeof handler !== 'function')
        throw new TypeError(`not a path '/channel/message' and a handler: ${path}, ${handler}`)
      const kinds = Object({ int: '-?\\d+', float: '-?\\d+(\\.\\d+)?' })
      const pattern = RegExp(`^${path.replace(/\/:(\w+)(?:::(\w+))?|\W/g, (text, name, kind) =>
        name ? `/(?<${name}>${kinds[kind] ?? '[^/]+'})` : `\\${text}`)}$`)
      const listener = (/** @type {any} */ event) => {
        const { channel, message, payload } = event.detail
        const match = pattern.exec(`/${channel}/${message}`)
        if (match && payload !== undefined) {
          const info = /** @type {any} */ ({ ...match.groups })
          for (const [, name] of path.matchAll(/\/:(\w+)::[if]/g)) info[name] = Number(info[name])
          event.preventDefault()
          handler(payload, { ...info, channel, message })
        } else if (!path.includes('/:') && !hinted++)
          console.warn(`${path} went to parse_payload: give it a payload, None will do`)
      }
      const type = path.includes('/:') ? '/:' : path
      client.addEventListener(type, listener)
      return () => client.removeEventListener(type, listener)
    }

    /** Lasts over reconnects. @param {string} channel  @returns {Promise<any>} */
    subscribe(channel) {
      let subscription = subscriptions.get(channel)
      if (!subscription) {
        subscriptions.set(channel, subscription = deferred({ channel }))
        renew(subscription)
      }
      return state === 'closed' ? Promise.reject(failure('Closed')) : subscription.promise
    }
    /** @param {string} channel */
    async unsubscribe(channel) {
      subscriptions.get(channel)?.reject(failure('Unsubscribed'))
      subscriptions.delete(channel)
      if (canSend()) await client.request(channel, 'unsubscribe', undefined, { timeout: Infinity })
        .catch(error => { if (!(error instanceof DOMException)) throw error }) // lost: it succeeded
    }

    open() {
      if (state === 'closed') enter('connecting')
      wake()
    }
    close() { disconnect(1000) }
  }

  const first = Object.hasOwn(page, 'WebChannels') && page.WebChannels // of a copy before this
  const client = /** @type {Client} */ (first || new Client())
  if (!first) {
    for (const type of ['online', 'offline', 'pageshow', 'resume'])
      addEventListener(type, wake, true) // some go to the document
    addEventListener('visibilitychange', () => ofDocument('hidden') || wake(), true)
    // In the bfcache a page hears nothing.
    for (const type of ['freeze', 'pagehide']) addEventListener(type, event => {
      if (socket && Object(event).persisted !== false) disconnect(1006, type)
    }, true)
    addEventListener('securitypolicyviolation', ({ blockedURI, disposition }) => {
      if (blockedURI && address.startsWith(blockedURI) && disposition === 'enforce' && !canSend())
        disconnect(1000, 'forbidden by the Content-Security-Policy')
    }, true)
    page.WebChannels = client
    page.Genie = { ...page.Genie, WebChannels: client }
    if (typeof page.parse_payload !== 'function') page.parse_payload = (payload = '') => {
      console.log(payload)
      console.log('Overwrite window.parse_payload to handle messages from the server')
    }
    client.open()
  }
  if (client.address === address) client.subscribe(script.channel || '____')
    .then(() => console.log('Subscription ready'), () => { })
  else complain({ error: `connected to ${client.address}, so not to ${address}` })
  return client
})()
"""


# --------------------------------------------------------------------------------------- demo

DEMO_PAGE: str = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>webchannels</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --live: light-dark(#0b736d, #4fd0c5) }
[data-webchannels=reconnecting] { --live: var(--gone) } * { --gone: light-dark(#b54708, #f9a94b) }
body { max-width: 75em; margin: auto; padding: 1em; font: 1em/1.5 system-ui, sans-serif }
main { display: grid; gap: 1em; grid: auto / repeat(auto-fit, minmax(min(28em, 100%), 1fr)) }
section { display: flex; flex-flow: column; padding: 1em; border-radius: 9px; background: #8882 }
header, form { display: flex; gap: 1em; align-items: baseline } form input { flex: 1; min-width: 0 }
h1, h2 { flex: 1; margin: 0; font-size: 1.2em } b, button { color: var(--live) }
section:first-child { grid-column: 1 / -1 } svg { width: 100%; height: 120px }
path { transform: translate(100%, 50%) scale(40, 60); vector-effect: non-scaling-stroke }
#curve { fill: none; stroke: var(--live); stroke-width: 2 }
#gaps { stroke: var(--gone); stroke-width: 2; stroke-dasharray: 9 }
pre { display: flex; flex-flow: column-reverse; flex: 0 0 clamp(9rem, 100vh - 30rem, 40rem);
  overflow: auto; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere }
#wire { flex-grow: 1; font: .8em/1.6 ui-monospace, monospace; word-break: break-all }
input, button { padding: 6px; border: 1px solid; border-radius: 9px; font: inherit; background: 0 }
</style>
<header><h1>webchannels</h1><b id="state" role="status">connecting …</b></header>
<p>A page and its server, talking. Open a second tab. Stop the server, and start it again.</p>
<main><section><header><h2>A curve from the server</h2><b id="reading"></b></header>
<svg role="img" aria-label="Its last seconds"><path id="curve"/><path id="gaps"/></svg></section>
<section><header><h2>Chat</h2>Each message makes a wave</header>
<pre id="chat" role="log" aria-label="Chat" tabindex="0"></pre>
<form id="say" method="dialog"><b id="me"></b><input id="text" required autocomplete="off"
aria-label="Message" placeholder="Say something"><button>Send</button></form></section>
<section><header><h2>On the wire</h2>Everything but the curve</header>
<pre id="wire" role="log" aria-live="off" aria-label="Frames" tabindex="0"></pre>
</section></main>SUPPORT<script nonce="NONCE">
const on = (type, listener) => WebChannels.addEventListener(type, event => listener(event.detail))
const show = (arrow, frame) =>
  frame && !frame.includes('"message":"tick"') && wire.append(arrow, frame, '\n')
on('debug', frame => { show('↑ ', frame.out); show('↓ ', frame.in) })
on('state', now => { state.textContent = now === 'open' ? 'connected' : `${now} …` })
on('missed', channel => channel === 'chat' && chat.replaceChildren('(The server was restarted.)\n'))
WebChannels.subscribe('chat')
WebChannels.channel('/chat/said', line => chat.append(line, '\n')) // as text, never as HTML
me.textContent = sessionStorage.me ??= `Otter ${Date.now() % 1000}` // each tab is another
say.onsubmit = () => WebChannels.sendMessageTo('chat', 'say', `${me.textContent}: ${text.value}`)
  .then(() => say.reset())
let points = [], ahead = -Infinity // seconds by which the server's clock is
WebChannels.channel('/wave/tick', ([time, height]) => {
  ahead = Math.max(ahead, time - Date.now() / 1000)
  points = [...points.slice(-600), [time, height]]
  reading.textContent = height.toFixed(2)
})
setInterval(() => {
  const now = ahead + Date.now() / 1000, lines = { curve: '', gaps: '' }
  points.forEach(([time, height], i) => {
    const next = points[i + 1] ?? [now, height], gone = next[0] - time > 0.5
    lines[gone ? 'gaps' : 'curve'] += `M${time - now},${-height}L${next[0] - now},${-next[1]}`
  })
  for (const id in lines) document.getElementById(id).setAttribute('d', lines[id])
}, matchMedia('(prefers-reduced-motion: reduce)').matches ? 1000 : 40)
</script>
"""


def demo_app() -> WebChannels:
    """The app behind `python3 webchannels.py`: a new one, so that importing registers nothing."""
    app = WebChannels()
    app.keep("chat", 100)
    app.keep("wave", 600)
    app.channels_support("chat")
    template = DEMO_PAGE.replace("SUPPORT", app.channels_support("wave", nonce="NONCE"))
    said_at = 0.0

    @app.route("/")
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        return Response(template.replace("NONCE", nonce), headers={
            "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
            f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; base-uri 'none'"})

    @app.channel("/chat/say")
    def say(payload: Any) -> None:
        nonlocal said_at
        said_at = time.monotonic()
        text = str(payload)[:500].encode("utf-8", "replace").decode()  # half a pair is not sent
        app.broadcast("chat", "said", text)

    def wave() -> None:
        while True:
            time.sleep(0.05)
            now, age = time.time(), time.monotonic() - said_at
            height = 0.2 * math.sin(2 * now) + 0.1 * math.sin(5 * now)
            height += 0.7 * math.sin(8 * age) * math.exp(-age)
            app.broadcast("wave", "tick", [round(now, 2), round(height, 3)])

    threading.Thread(target=wave, daemon=True).start()
    return app


def main() -> None:
    """The command line: serves the demo."""
    parser = argparse.ArgumentParser(prog="webchannels", description="Serve the webchannels demo.")
    parser.add_argument("--host", default="127.0.0.1", help="the address (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (%(default)s)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--version", action="store_true", help="tell it, and this file's SHA-256")
    options = parser.parse_args()
    if options.version:
        with open(__file__, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        print(f"webchannels {__version__}\nSHA-256 {digest}")
        return
    try:
        demo_app().up(options.port, options.host, block=True, open_browser=options.open)
    except (OSError, OverflowError) as error:
        text = f"webchannels: {getattr(error, 'strerror', None) or error}"
        sys.exit(re.sub(r"up\((\d+)\)", r"--port \1", text))


if __name__ == "__main__":
    main()
