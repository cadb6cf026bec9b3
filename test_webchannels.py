"""The tests of webchannels: `python3 test_webchannels.py [-v] [Class.test]`. Standard library only.

`python3 test_webchannels.py --embed` copies channels.js into webchannels.py; `--release` makes a
release of what is being worked on.
"""

from __future__ import annotations

import array
import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import email.utils
import errno
import functools
import gc
import hashlib
import html.parser
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import random
import re
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import warnings
import weakref
import zlib
from pathlib import Path
from random import Random
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence, TypeVar
from unittest import mock
from urllib.parse import unquote, urlsplit

import webchannels
from webchannels import (
    ChannelClient,
    ChannelError,
    Config,
    HTTPError,
    Request,
    Response,
    WebChannels,
)

try:
    import pty
except ImportError:  # on Windows
    pty = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
JsonObject = dict[str, Any]
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
NO_HANDLER = "ERROR : 404 - Not found: no handler for the message "
BAD_MESSAGE = ("ERROR : 400 - Bad message: a channel as in 'room', a message as in 'say', without "
               "a slash, each of at most 256 characters")

# ---- HTTP over a real socket ---------------------------------------------------------------------

INSECURE = ssl.create_default_context()  # for the self-signed certificate of `certificate()`
INSECURE.check_hostname = False
INSECURE.verify_mode = ssl.CERT_NONE
AnyConnection = TypeVar("AnyConnection", bound="Connection")


class Reply(NamedTuple):
    """An HTTP response. Header names are in lower case, repeated ones joined by a comma."""

    status: int
    headers: dict[str, str]
    body: bytes
    head: bytes


class Connection:
    """A blocking connection to a URL, over TLS for https: and wss:. Times are in seconds."""

    def __init__(self, url: str, *, tls: ssl.SSLContext = INSECURE, timeout: float = 10) -> None:
        parts = urlsplit(url)
        secure = parts.scheme in ("https", "wss")
        self.host = parts.netloc
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        address = (parts.hostname or "", parts.port or (443 if secure else 80))
        self.sock: socket.socket = socket.create_connection(address, timeout)
        if secure:
            self.sock = tls.wrap_socket(self.sock, server_hostname=parts.hostname)
        self.buffer = bytearray()

    def __enter__(self: AnyConnection) -> AnyConnection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a reset in place of an end of stream."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def send_raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def fill(self, size: int) -> None:
        """Read on until `size` bytes are buffered. A time-out loses nothing: call again."""
        while len(self.buffer) < size:
            chunk = self.sock.recv(1 << 16)
            if not chunk:
                raise EOFError(f"the peer closed after {bytes(self.buffer[:200])!r}")
            self.buffer += chunk

    def take(self, size: int) -> bytes:
        self.fill(size)
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def response(self, method: str = "GET") -> Reply:
        """Exactly one response; what follows it stays for the next call."""
        while b"\r\n\r\n" not in self.buffer:
            self.fill(len(self.buffer) + 1)
        head = self.take(self.buffer.index(b"\r\n\r\n") + 4)
        status, *lines = head.decode("latin-1").rstrip().split("\r\n")
        code, body = int(status.split(" ")[1]), b""
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if method != "HEAD" and code >= 200 and code not in (204, 304):
            body = self.take(int(headers["content-length"])) if "content-length" in headers \
                else self.rest()
        return Reply(code, headers, body, head)

    def rest(self, timeout: float | None = None) -> bytes:
        """Everything up to the end of the stream (raises socket.timeout when it does not end)."""
        if timeout is not None:
            self.sock.settimeout(timeout)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                self.fill(len(self.buffer) + 1)
        return self.take(len(self.buffer))


def http(url: str, raw: bytes, method: str = "GET") -> Reply:
    """Send these bytes as they are, return the first response."""
    with Connection(url) as connection:
        connection.send_raw(raw)
        return connection.response(method)


def request(method: str, url: str, headers: Mapping[str, str] | None = None,
            body: bytes = b"") -> Reply:
    with Connection(url) as connection:
        fields = {"Host": connection.host, "Connection": "close", **(headers or {})}
        if body:
            fields.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {connection.target} HTTP/1.1", *map(": ".join, fields.items()), "", ""]
        connection.send_raw("\r\n".join(lines).encode("latin-1") + body)
        return connection.response(method)


# ---- WebSocket client (RFC 6455, RFC 7692) -------------------------------------------------------


class Refused(Exception):
    """The handshake was answered with `reply` in place of 101."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.status} {reply.body[:200]!r}")
        self.reply = reply


class Closed(Exception):
    """The peer sent a close frame (1005: without a code)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code, self.reason = code, reason


class Frame(NamedTuple):
    fin: bool
    rsv: int
    opcode: int
    payload: bytes


class WebSocketClient(Connection):
    """A blocking client that can also misbehave: `send_frame` and `send_raw` check nothing.

    With `auto_reply` it answers pings and the close; without, `recv()` hands out the pings.
    `deflate` offers permessage-deflate; a string offers just that.
    """

    def __init__(self, url: str, *, subprotocol: str = "", origin: str = "",
                 headers: Mapping[str, str] | None = None, deflate: bool | str = False,
                 tls: ssl.SSLContext = INSECURE, timeout: float = 10,
                 auto_reply: bool = True) -> None:
        super().__init__(url, tls=tls, timeout=timeout)
        self.auto_reply, self.timeout, self.parts = auto_reply, timeout, b""
        self.message = Frame(True, 0, TEXT, b"")  # the first frame of the one being assembled
        self.inflater = zlib.decompressobj(-15)
        key = base64.b64encode(os.urandom(16)).decode()
        fields = {"Host": self.host, "Upgrade": "websocket", "Connection": "Upgrade",
                  "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13",
                  "Sec-WebSocket-Protocol": subprotocol, "Origin": origin,
                  "Sec-WebSocket-Extensions": deflate if isinstance(deflate, str)
                  else "permessage-deflate" if deflate else "", **(headers or {})}
        lines = [f"{name}: {value}" for name, value in fields.items() if value]
        self.send_raw("\r\n".join([f"GET {self.target} HTTP/1.1", *lines, "", ""]).encode())
        self.reply = self.response()
        if self.reply.status != 101:
            self.close()
            raise Refused(self.reply)
        accept = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        assert self.reply.headers["sec-websocket-accept"] == base64.b64encode(accept).decode()
        self.subprotocol = self.reply.headers.get("sec-websocket-protocol", "")
        self.extensions = self.reply.headers.get("sec-websocket-extensions", "")

    def send_frame(self, opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0,
                   mask: bool = True) -> None:
        size, bit, key = len(payload), 128 if mask else 0, os.urandom(4) if mask else b""
        head = bytes([fin << 7 | rsv << 4 | opcode])
        head += bytes([bit | size]) if size < 126 else struct.pack("!BH", bit | 126, size) \
            if size < 65536 else struct.pack("!BQ", bit | 127, size)
        if mask and size:
            keys = (key * (size // 4 + 1))[:size]
            masked = int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")
            payload = masked.to_bytes(size, "big")
        self.send_raw(head + key + payload)

    def send_message(self, opcode: int, data: bytes) -> None:
        if not self.extensions:
            return self.send_frame(opcode, data)
        bits = re.search(r"client_max_window_bits=(\d+)", self.extensions)
        deflater = zlib.compressobj(6, zlib.DEFLATED, -int(bits[1]) if bits else -15)
        data = deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)
        self.send_frame(opcode, data[:-4], rsv=4)  # RFC 7692 section 7.2.1

    def send_text(self, text: str) -> None:
        self.send_message(TEXT, text.encode())

    def send_binary(self, data: bytes) -> None:
        self.send_message(BINARY, data)

    def send_json(self, value: Any, payload: bytes | None = None) -> None:
        """An envelope; with bytes for its payload as webchannels.v1 has them."""
        text = json.dumps(value)
        if payload is None:
            self.send_text(text)
        else:
            self.send_binary(text.encode() + b"\n" + payload)

    def send_close(self, code: int = 1000, reason: str = "") -> None:
        self.send_frame(CLOSE, struct.pack("!H", code) + reason.encode())

    def recv_frame(self, timeout: float | None = None) -> Frame:
        self.sock.settimeout(self.timeout if timeout is None else timeout)
        self.fill(2)
        size, start = self.buffer[1], 2
        assert size < 128, "a server must not mask (RFC 6455 section 5.1)"
        if size >= 126:
            start = 4 if size == 126 else 10
            self.fill(start)
            size = int.from_bytes(self.buffer[2:start], "big")
        self.fill(start + size)
        frame = self.take(start + size)
        return Frame(frame[0] >= 128, frame[0] >> 4 & 7, frame[0] & 15, frame[start:])

    def recv(self, timeout: float | None = None) -> tuple[int, bytes]:
        """(opcode, payload) of a message or pong. Raises Closed, EOFError or socket.timeout."""
        while True:
            frame = self.recv_frame(timeout)
            if frame.opcode == CLOSE:
                if self.auto_reply:
                    with contextlib.suppress(OSError):
                        self.send_frame(CLOSE, frame.payload[:2])
                code = int.from_bytes(frame.payload[:2], "big") if frame.payload else 1005
                raise Closed(code, frame.payload[2:].decode())
            if frame.opcode == PING and self.auto_reply:
                self.send_frame(PONG, frame.payload)
            elif frame.opcode >= CLOSE:
                return frame.opcode, frame.payload
            else:
                if frame.opcode != CONTINUATION:
                    self.message, self.parts = frame, b""
                self.parts += frame.payload
                if frame.fin:
                    return self.message.opcode, self.inflated() if self.message.rsv else self.parts

    def inflated(self) -> bytes:
        if "server_no_context_takeover" in self.extensions:
            self.inflater = zlib.decompressobj(-15)
        return self.inflater.decompress(self.parts + b"\0\0\xff\xff")  # RFC 7692 section 7.2.2

    def recv_text(self, timeout: float | None = None) -> str:
        opcode, payload = self.recv(timeout)
        assert opcode == TEXT, (opcode, payload)
        return payload.decode()

    def recv_json(self, timeout: float | None = None) -> Any:
        return json.loads(self.recv_text(timeout))

    def recv_envelope(self, timeout: float | None = None) -> Any:
        """The same, also of a binary message of webchannels.v1: its payload is bytes."""
        opcode, data = self.recv(timeout)
        head, *payload = data.split(b"\n", 1) if opcode == BINARY else [data]
        assert opcode == TEXT or payload, data
        return {**json.loads(head), **({"payload": payload[0]} if payload else {})}

    def recv_close(self, timeout: float | None = None) -> tuple[int, str]:
        """Skip messages up to the close frame; (1006, "") when the stream just ends."""
        try:
            while True:
                self.recv(timeout)
        except Closed as closed:
            return closed.code, closed.reason
        except (EOFError, ConnectionError):
            return 1006, ""


# ---- Browsers: Chromium over the DevTools protocol, Firefox over WebDriver BiDi ------------------


class BrowserError(Exception):
    """The browser refused a command, or a script in the page threw."""


def logged_text(values: list[JsonObject]) -> str:
    """The arguments of console.log(); objects come as a description only."""
    return " ".join(str(v.get("value", v.get("description", v["type"]))) for v in values)


class Chromium:
    """One headless browser, driven over one WebSocket. Firefox below overrides what differs."""

    names: tuple[str, ...] = ("chromium", "chromium-browser", "google-chrome")
    arguments: tuple[str, ...] = (
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--user-data-dir={profile}")

    def __init__(self) -> None:
        program, self.profile = self.program(), tempfile.mkdtemp(prefix="webchannels-")
        assert program, f"{self.names[0]} is not there"
        self.pages: dict[str, Page] = {}
        self.replies: dict[int, JsonObject] = {}
        self.commands = 0
        self.process = subprocess.Popen(
            [program, *(argument.format(profile=self.profile) for argument in self.arguments),
             "--headless", "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        guard = threading.Timer(60, self.process.kill)
        guard.start()
        pipe = self.process.stderr
        assert pipe
        found = None
        while not found:
            line = pipe.readline()
            assert line, f"{program} did not start"
            found = re.search(r"listening on (ws:\S+)", line)
        guard.cancel()
        self.drain = threading.Thread(target=lambda: (pipe.read(), pipe.close()))
        self.drain.start()  # a full pipe would stop the browser
        self.socket = self.connect(found[1])

    @classmethod
    def program(cls) -> str | None:
        return next(filter(None, map(shutil.which, cls.names)), None)

    def connect(self, url: str) -> WebSocketClient:
        return WebSocketClient(url)

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.drain.join(10)  # its last process has ended then, too
        shutil.rmtree(self.profile, ignore_errors=True)

    def command(self, method: str, params: JsonObject | None = None, **extra: str) -> Any:
        self.commands += 1
        number = self.commands
        self.socket.send_json({"id": number, "method": method, "params": params or {}, **extra})
        self.wait(lambda: number in self.replies, 60, method)
        reply = self.replies.pop(number)
        if "error" in reply:
            raise BrowserError(f"{method}: {reply.get('message') or reply['error']}")
        return reply["result"]

    def wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Handle what the browser reports until `done()`."""
        deadline = time.monotonic() + timeout
        while not done():
            try:
                message = self.socket.recv_json(max(deadline - time.monotonic(), 0.001))
            except socket.timeout:
                raise AssertionError(f"{what}: not after {timeout} s") from None
            if "id" in message:
                self.replies[message["id"]] = message
            else:
                self.event(message["method"], message["params"], message.get("sessionId", ""))

    def event(self, method: str, params: JsonObject, key: str) -> None:
        page = self.pages.get(key)
        if page and method == "Page.loadEventFired":
            page.loads += 1
        elif page and method == "Runtime.consoleAPICalled":
            page.log(params["type"], logged_text(params["args"]))
        elif page and method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            page.log("error", details.get("exception", {}).get("description") or details["text"])
        elif page and method == "Log.entryAdded" and (  # other servers may have no icon
                not params["entry"].get("url", "").endswith("/favicon.ico")):
            page.log(params["entry"]["level"], params["entry"]["text"])

    def new_page(self, url: str = "about:blank") -> Page:
        target = self.command("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.command("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = self.pages[session["sessionId"]] = Page(self, session["sessionId"], target)
        for domain in "Page", "Runtime", "Log", "Network":
            page.command(f"{domain}.enable")
        page.command("Security.setIgnoreCertificateErrors", {"ignore": True})
        page.navigate(url)
        return page


class Page:
    """One tab. `console` has all that the page logged, `errors` those lines that are errors."""

    def __init__(self, browser: Chromium, key: str, target: str = "") -> None:
        self.browser, self.key, self.target, self.loads = browser, key, target, 0
        self.console: list[str] = []
        self.errors: list[str] = []

    def log(self, level: str, text: str) -> None:
        self.console.append(text)
        if level == "error":
            self.errors.append(text)

    def evaluate(self, expression: str, await_promise: bool = True) -> Any:
        """The value, by way of JSON, of one expression (it may use await)."""
        value = f"await ({expression})" if await_promise else f"void ({expression})"
        outcome = json.loads(self.run(
            f"(async () => {{ try {{ return JSON.stringify({{value: {value}}}) }} "
            "catch (error) { return JSON.stringify({error: String(error)}) } })()"))
        if "error" in outcome:
            raise BrowserError(outcome["error"])
        return outcome.get("value")

    def wait_for(self, condition: str, timeout: float = 20) -> Any:
        """Poll inside the page until the expression is true; return its value."""
        return self.evaluate(
            "(async () => { for (const end = Date.now() + %d;;) { const value = await (%s);"
            " if (value) return value; if (Date.now() > end) throw new Error(%s);"
            " await new Promise(done => setTimeout(done, 20)) } })()"
            % (timeout * 1000, condition, json.dumps(f"not after {timeout} s: {condition}")))

    def wait_console(self, text: str, timeout: float = 20) -> str:
        """The first logged line with this text; it and the lines before it are consumed."""
        self.browser.wait(lambda: any(text in line for line in self.console), timeout,
                          f"{text!r} in {self.console}")
        index = next(i for i, line in enumerate(self.console) if text in line)
        line = self.console[index]
        del self.console[:index + 1]
        return line

    def command(self, method: str, params: JsonObject | None = None) -> Any:
        return self.browser.command(method, params, sessionId=self.key)

    def run(self, script: str) -> str:
        """The string that the promise of this script comes to."""
        result = self.command("Runtime.evaluate", {
            "expression": script, "awaitPromise": True, "returnByValue": True})
        if "exceptionDetails" in result:
            raise BrowserError(result["result"].get("description"))
        return str(result["result"]["value"])

    def load(self, method: str, params: JsonObject | None = None) -> None:
        before = self.loads
        error = self.command(method, params).get("errorText")
        if error:
            raise BrowserError(error)
        self.browser.wait(lambda: self.loads > before, 30, method)

    def navigate(self, url: str) -> None:
        self.load("Page.navigate", {"url": url})

    def reload(self) -> None:
        self.load("Page.reload")

    def activate(self) -> None:
        """Bring the tab to the front; a newer one hides it, and hidden pages have slow timers."""
        self.command("Page.bringToFront")

    def close(self) -> None:
        if self.browser.pages.pop(self.key, None):
            self.browser.command("Target.closeTarget", {"targetId": self.target})

    def offline(self, offline: bool) -> None:
        self.command("Network.emulateNetworkConditions", {
            "offline": offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})

    def freeze(self, frozen: bool) -> None:
        self.command("Page.setWebLifecycleState", {"state": "frozen" if frozen else "active"})

    def screenshot(self, path: Path, width: int = 1280, height: int = 800, *, dark: bool = False,
                   mobile: bool = False) -> None:
        self.activate()
        self.command("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})
        self.command("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))


class Firefox(Chromium):
    names = ("firefox-esr", "firefox")
    arguments = ("--no-remote", "--profile", "{profile}")

    def connect(self, url: str) -> WebSocketClient:
        self.socket = WebSocketClient(f"{url}/session")
        insecure = {"alwaysMatch": {"acceptInsecureCerts": True}}
        self.command("session.new", {"capabilities": insecure})
        self.command("session.subscribe", {"events": ["log.entryAdded"]})
        return self.socket

    def event(self, method: str, params: JsonObject, key: str) -> None:
        page = self.pages.get(params.get("source", {}).get("context", ""))
        if page and method == "log.entryAdded":
            page.log(params["level"], logged_text(params.get("args", [])) or params["text"])

    def new_page(self, url: str = "about:blank") -> Page:
        key = self.command("browsingContext.create", {"type": "tab"})["context"]
        page = self.pages[key] = FirefoxPage(self, key)
        page.navigate(url)
        return page


class FirefoxPage(Page):
    def command(self, method: str, params: JsonObject | None = None) -> Any:
        return self.browser.command(method, {"context": self.key, **(params or {})})

    def run(self, script: str) -> str:
        outcome = self.browser.command("script.evaluate", {
            "expression": script, "awaitPromise": True, "target": {"context": self.key}})
        if outcome["type"] == "exception":
            raise BrowserError(outcome["exceptionDetails"]["text"])
        return str(outcome["result"]["value"])

    def navigate(self, url: str) -> None:
        self.command("browsingContext.navigate", {"url": url, "wait": "complete"})

    def reload(self) -> None:
        self.command("browsingContext.reload", {"wait": "complete"})

    def activate(self) -> None:
        self.command("browsingContext.activate")

    def close(self) -> None:
        if self.browser.pages.pop(self.key, None):
            self.command("browsingContext.close")

    def offline(self, offline: bool) -> None:
        conditions = {"type": "offline"} if offline else None
        self.browser.command("emulation.setNetworkConditions", {
            "networkConditions": conditions, "contexts": [self.key]})


# ---- Fixtures ------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(app: WebChannels, **options: Any) -> Iterator[str]:
    """Serve from a background thread on a free port; the value is the URL."""
    url = app.up(**{"port": 0, **options}, block=False)
    try:
        yield url
    finally:
        app.down()


BROWSERS: dict[type[Chromium], Chromium] = {}


def browser(kind: type[Chromium]) -> Chromium:
    """One process of each kind, shared by all tests of the module."""
    if not kind.program():
        raise unittest.SkipTest(f"needs {' or '.join(kind.names)}")
    if kind not in BROWSERS:
        BROWSERS[kind] = kind()
        unittest.addModuleCleanup(BROWSERS[kind].close)
    return BROWSERS[kind]


def certificate(folder: Path) -> Path:
    """A new self-signed certificate for localhost and 127.0.0.1, with its key, in one PEM file."""
    if not shutil.which("openssl"):
        raise unittest.SkipTest("needs openssl")
    path = folder / "localhost.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-keyout", path, "-out", folder / "cert.pem", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
                   check=True, capture_output=True)
    with path.open("ab") as pem:
        pem.write((folder / "cert.pem").read_bytes())
    return path


class Terminal:
    """A program on a pseudo-terminal of its own: type a line, expect a text."""

    def __init__(self, *command: str, cwd: Path = HERE, **environment: str) -> None:
        if not pty:
            raise unittest.SkipTest("needs pseudo-terminals")
        self.fd, child = pty.openpty()
        # sh opens the terminal once more, which makes it the controlling one: Ctrl+C works.
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(child), *command], cwd=cwd,
            stdin=child, stdout=child, stderr=child, start_new_session=True,
            env={**os.environ, "TERM": "dumb", **environment})
        os.close(child)
        self.output = ""  # what `expect()` has not consumed

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(signal.SIGKILL)
        os.close(self.fd)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str, timeout: float = 20) -> re.Match[str]:
        """Read up to the regular expression; what follows it is for the next call."""
        deadline = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.output)
            if found:
                self.output = self.output[found.end():]
                return found
            if not self.read_on(deadline):
                raise AssertionError(f"no {pattern!r} in {timeout} s or at all: {self.output!r}")

    def read_on(self, deadline: float) -> bool:
        """Add to the output; False at its end, and when it is late."""
        if not select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False
        data = b""
        with contextlib.suppress(OSError):  # the end, as Linux tells it
            data = os.read(self.fd, 65536)
        self.output += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def end(self, timeout: float = 20) -> tuple[int, str]:
        """Wait for the program's end: the exit status, and what it said that nobody expected."""
        deadline = time.monotonic() + timeout
        while self.read_on(deadline):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 0.1)), self.output

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Send the signal; the exit status (negative: the signal that ended it)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


def run_python(*arguments: str, cwd: Path = HERE, timeout: float = 60,
               **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, timeout=timeout, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True,
                          env={**os.environ, **environment})


def setUpModule() -> None:
    """A shell's background jobs ignore SIGINT, and so would every program that is started here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- channels.js inside webchannels.py -----------------------------------------------------------


def embedded() -> str:
    """webchannels.py as it is with today's channels.js in it."""
    module = (HERE / "webchannels.py").read_text(encoding="utf-8")
    head, begin, rest = module.partition('\nCHANNELS_JS: str = r"""')
    _, end, tail = rest.partition('"""\n')
    assert begin and end, "webchannels.py has no CHANNELS_JS"
    client = (HERE / "channels.js").read_text(encoding="utf-8")
    assert '"""' not in client, 'three quotes in channels.js would end the Python string'
    return head + begin + client + end + tail


class EmbeddedClient(unittest.TestCase):
    def test_this_file_can_be_imported_on_windows(self) -> None:
        done = run_python("-c", "import sys; sys.modules['pty'] = None; import test_webchannels")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_webchannels_py_has_the_channels_js_beside_it(self) -> None:
        client = (HERE / "channels.js").read_text(encoding="utf-8")
        self.assertTrue(webchannels.CHANNELS_JS == client,
                        "they differ: run `python3 test_webchannels.py --embed`")


# ---- Paths ---------------------------------------------------------------------------------------


class RouterTest(unittest.TestCase):
    def found(self, router: webchannels.Router, path: str) -> Any:
        found = router.find(path, decode=True)
        return found and (found[0][""].handler(), *found[1])

    def test_paths(self) -> None:
        router = webchannels.Router()
        for path in ("/", "/a", "/a/:x", "/a/:x/b", "/a/b", "/n/:n::int", "/n/:f::float", "/n/:s",
                     "/:one/:two", "/deep/:a/:b::int/c"):
            router.add(path, webchannels.Endpoint(lambda path=path: path, path))
        for path, expected in {
                "/": ("/",), "/a": ("/a",), "/a/": None, "/b": None, "/a/b": ("/a/b",),
                "/a/c": ("/a/:x", "c"), "/a/b/b": ("/a/:x/b", "b"), "/a/b/c": None,
                "/n/5": ("/n/:n::int", 5), "/n/-5": ("/n/:n::int", -5), "/n/007": ("/n/:n::int", 7),
                "/n/5.5": ("/n/:f::float", 5.5), "/n/1_0": ("/n/:s", "1_0"),
                "/n/%205": ("/n/:s", " 5"), "/n/+5": ("/n/:s", "+5"), "/n/x": ("/n/:s", "x"),
                "/n/\u0665": ("/n/:s", "\u0665"), "/n/nan": ("/n/:s", "nan"),
                "/n/1e999": ("/n/:s", "1e999"), "/n/": None, "/x/y": ("/:one/:two", "x", "y"),
                "/a%2Fb/c": None, "/a%5cb/c": ("/:one/:two", "a\\b", "c"), "/%61": ("/a",),
                "//y": None, "/caf%C3%A9/z": ("/:one/:two", "caf\u00e9", "z"), "/deep/q/7/c": (
                    "/deep/:a/:b::int/c", "q", 7), "/deep/q/r/c": None}.items():
            with self.subTest(path):
                self.assertEqual(self.found(router, path), expected)
        self.assertEqual(router.find("/a%2Fb/c")[1], ("a%2Fb", "c"))  # type: ignore[index]
        with self.assertRaises(UnicodeDecodeError):
            router.find("/%ff/x", decode=True)

    def test_replacing(self) -> None:
        router = webchannels.Router()
        for path, other in (("/a", "/a"), ("/:x/y", "/:other/y")):
            router.add(path, webchannels.Endpoint(lambda: "old", path))
            router.add(other, webchannels.Endpoint(lambda: "new", other))
            self.assertEqual(self.found(router, "/a" if path == "/a" else "/q/y")[0], "new")

    def test_a_path_is_found_with_its_endpoint_or_not_at_all(self) -> None:
        router, seen = webchannels.Router(), []

        class Method(str):
            def __hash__(self) -> int:
                found = router.find("/a/x")  # as another thread may, at any time
                seen.append(found and len(found[0]))
                return str.__hash__(self)
        for path in ("/a/x", "/a/:y"):
            router.add(path, webchannels.Endpoint(lambda y=0: None, path), Method("GET"))
        self.assertTrue(seen)
        self.assertNotIn(0, seen)

    def test_a_name_is_not_a_path(self) -> None:
        router = webchannels.Router()
        router.add("/:x", webchannels.Endpoint(lambda: "any", "/:x"))
        self.assertEqual(self.found(router, "/:x"), ("any", ":x"))

    def test_what_handlers_take(self) -> None:
        def wrapped(handler: Callable[..., Any]) -> Callable[..., Any]:
            return functools.wraps(handler)(lambda **given: handler(**given))

        given = {"payload": 1, "client": 2, "room": 3, "admin": 4}
        taken: list[tuple[Callable[..., Any], Any]] = [
            (lambda: "nothing", "nothing"), (lambda payload, room: (payload, room), (1, 3)),
            (lambda client, other=5: (client, other), (2, 5)), (lambda *rest: rest, ()),
            (lambda room: room, 3), (wrapped(lambda room: room), 3), (lambda *, room: room, 3),
            (lambda room, **more: (room, more), (3, {"payload": 1, "client": 2})),
            (functools.partial(lambda room, client: (room, client), client=9), (3, 9)),
            (functools.partial(lambda room, **more: (room, more), payload=9),
             (3, {"payload": 9, "client": 2})),
            (wrapped(functools.partial(lambda room, admin=True: (room, admin), admin=False)),
             (3, False))]
        for handler, expected in taken:
            for threaded in (False, True):
                endpoint = webchannels.Endpoint(handler, "/:room/x", threaded,
                                                {"payload", "client"})
                if endpoint.takes_any:
                    del given["admin"]
                self.assertEqual(contextvars.copy_context().run(endpoint.run, given), expected)
                given["admin"] = 4
                self.assertEqual(endpoint.threaded, threaded)
        self.assertFalse(webchannels.Endpoint(self.found).threaded)
        self.assertEqual(webchannels.Endpoint(self.found).name, "RouterTest.found")
        nameless = functools.partial(lambda: None)
        self.assertEqual(webchannels.Endpoint(nameless).name, repr(nameless))

    def test_annotations_may_name_what_is_not_defined(self) -> None:
        source = "def handler(payload: Undefined) -> Undefined: return payload"
        names: dict[str, Any] = {}  # before Python 3.14, annotations are evaluated at once
        exec(compile(source, "x", "exec", 0, sys.version_info >= (3, 14)), names)
        endpoint = webchannels.Endpoint(names["handler"], supplied={"payload"})
        self.assertEqual(contextvars.copy_context().run(endpoint.run, {"payload": 5}), 5)

    def test_bad_registrations(self) -> None:
        app = WebChannels()
        for path in ("a", "", "/:", "/:1", "/:n::complex", "/:n/:n", "/:n::"[:-1]):
            for register in (app.route, app.channel):
                with self.subTest(path), self.assertRaisesRegex(ValueError, re.escape(
                        repr(path if path[:1] != "/" or path.count("/") > 1 else path[1:]))):
                    register(path, lambda: None)
        with self.assertRaisesRegex(TypeError, "asks for 'nobody'.*can ask for channel, client, "):
            app.channel("/____/x", lambda nobody: None)
        with self.assertRaisesRegex(TypeError, "a handler is a function"):
            app.route("/", 5)  # type: ignore[arg-type]
        with self.assertRaisesRegex(ValueError, "method"):
            app.route("/", lambda: "", method="G ET")
        with self.assertRaisesRegex(TypeError, "async"):
            async def handler() -> None: ...
            app.route("/", handler, threaded=True)

        class Callable_:
            async def __call__(self) -> None: ...
        with self.assertRaisesRegex(TypeError, "async"):
            app.route("/", Callable_(), threaded=True)
        for register in (app.route, app.channel):
            with self.assertRaisesRegex(TypeError, "first comes the path"):
                @register  # type: ignore[arg-type]
                def bare() -> None: ...
        with self.assertRaisesRegex(TypeError, "asks for 'payload'"):
            app.on_connect(lambda payload: None)
        for register in (app.route, app.channel):
            with self.assertRaisesRegex(TypeError, "asks for 'payload' .positional-only"):
                register("/____/x", lambda payload, /: None)
        for register in (app.route, app.channel):
            with self.assertRaisesRegex(TypeError, "anyone could give what channels_support"):
                register("/____/x", app.channels_support)
        app.channel("/:room/x", lambda room, payload, other=1, *rest, **more: None)
        for name in ("", "/a", "a/", "/", "x" * 257):
            with self.assertRaisesRegex(ValueError, "name has 1 to 256"):
                app.channels_support(name)


# ---- Frames: bytes in, events out ----------------------------------------------------------------

HELLO = "H\u00e9llo \u20ac \U0001f600"


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, length: int = -1,
          mask: bytes = b"\x37\xfa\x21\x3d") -> bytes:
    """A client's frame; `length` claims another length than the payload's."""
    size = len(payload) if length < 0 else length
    head = bytes([fin << 7 | rsv << 4 | opcode])
    head += bytes([128 | size]) if size < 126 else struct.pack("!BH", 254, size) \
        if size < 65536 else struct.pack("!BQ", 255, size)
    return head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


def packed(data: bytes, final: bool = False) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    if final:  # RFC 7692, 7.2.3.4
        return deflater.compress(data) + deflater.flush() + b"\0"
    return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def events(chunks: Sequence[bytes], limit: int = 1 << 20, inflate: int = 0,
           masked: bool = True) -> list[Any]:
    """What a FrameReader makes of these chunks; a failure comes as its close code."""
    found: list[Any] = []
    for short in (True, False):  # whether the short way is tried first
        reader, before, found = webchannels.FrameReader(limit, inflate, masked), found, []
        for chunk in chunks:
            text = reader.receive_short(chunk) if short and masked else None
            found += reader.receive(chunk) if text is None else [(TEXT, text)]
            while reader.more:
                more = reader.receive(b"")
                assert more or not reader.more, "more was promised, none came"
                found += more
        assert short or found == before, "the short way comes elsewhere"
    for kind, data in found:  # what the Close frame says
        assert kind != webchannels.FAIL or 0 < len(data[1].encode()) <= 123, data
    return [(kind, data[0] if kind == webchannels.FAIL else data) for kind, data in found]


class FrameReaderTest(unittest.TestCase):
    def test_messages_and_round_trips_at_every_length_boundary(self) -> None:
        limit = 70000
        for size in (0, 1, 4, 125, 126, 127, 4095, 4096, 4097, 65535, 65536, limit):
            data = os.urandom(size)
            text = "x" * size
            stream = frame(BINARY, data) + frame(TEXT, text.encode())
            self.assertEqual(events([stream], limit), [(BINARY, data), (TEXT, text)])
            encoded = webchannels.encode_frame(BINARY, data)
            plain = encoded + webchannels.encode_frame(TEXT, text.encode())
            for step in 7, 1 << 20:
                chunks = [plain[at:at + step] for at in range(0, len(plain), step)]
                self.assertEqual(events(chunks, limit, masked=False),  # as a client reads it
                                 [(BINARY, data), (TEXT, text)])
            self.assertEqual(events([frame(TEXT, text.encode())], limit, masked=False),
                             [(webchannels.FAIL, 1002)])
            start = {True: 2, False: 4}[size < 126] if size < 65536 else 10
            self.assertEqual(encoded[start:], data)
            masked = bytes([encoded[0], encoded[1] | 128]) + encoded[2:start] + bytes(4) + data
            self.assertEqual(events([masked], limit), [(BINARY, data)])
        for opcode in (TEXT, BINARY):
            for parts in ([frame(opcode, b"x" * (limit + 1))],
                          [frame(opcode, b"x" * limit, fin=False) + frame(CONTINUATION, b"x")]):
                self.assertEqual(events(parts, limit), [(webchannels.FAIL, 1009)])
            parts = [frame(opcode, b"x" * 30000, fin=False), frame(CONTINUATION, b"x" * 30000,
                                                                  fin=False)]
            self.assertEqual(events([*parts, frame(CONTINUATION, b"x" * 10001)], limit),
                             [(webchannels.FAIL, 1009)])
        # The limit is that of each message.
        self.assertEqual(events([frame(TEXT, b"12345") * 3], 5), [(TEXT, "12345")] * 3)
        # Refused by the header alone, before the payload.
        self.assertEqual(events([frame(TEXT, b"1234", fin=False),
                                 frame(CONTINUATION, length=limit - 3)], limit), [(-1, 1009)])
        self.assertEqual(events([frame(TEXT, b"1234", fin=False),
                                 frame(CONTINUATION, length=limit - 4)], limit), [])
        # Close may come inside of a message.
        self.assertEqual(events([frame(TEXT, b"1", fin=False) + frame(CLOSE, b"\x03\xe8bye")], 9),
                         [(CLOSE, (1000, "bye"))])
        # Control frames do not count, and of what is deflated only what it inflates to.
        full = frame(TEXT, b"12345", fin=False)
        for control in frame(PING, b"a"), frame(CLOSE, b"\x03\xe8"):
            self.assertEqual(len(events([full, control], 5)), 1)
            self.assertNotEqual(events([full, control], 5)[0][0], webchannels.FAIL)
        data = os.urandom(100)
        deflated = packed(data)
        self.assertGreater(len(deflated), 100)
        self.assertEqual(events([frame(BINARY, deflated[:60], fin=False, rsv=4),
                                 frame(CONTINUATION, deflated[60:])], 100, inflate=20),
                         [(BINARY, data)])
        self.assertEqual(events([frame(BINARY, length=limit + 1)], limit), [(-1, 1009)])
        for size in (6, 200):
            self.assertEqual(events([frame(TEXT, b"x" * size)], size - 1), [(-1, 1009)])

    def test_what_a_reader_tells_about_itself(self) -> None:
        reader = webchannels.FrameReader(1 << 20)

        def state() -> tuple[int, bool, bool]:
            return reader.frames, any(reader.unfinished()), reader.more

        self.assertEqual((reader.frames, reader.unfinished(), reader.more), (0, (0, 0), False))
        for data, frames, unfinished in (
                (b"", 0, False), (frame(TEXT, b"a") * 2, 2, False), (frame(PING)[:3], 2, True),
                (frame(PING)[3:], 3, False), (frame(BINARY, bytes(300), fin=False)[:9], 4, True),
                (bytes(298), 4, True), (b"x", 4, True), (frame(PING), 5, True),
                (frame(CONTINUATION), 6, False), (frame(CONTINUATION), 6, False)):
            reader.receive(data)
            self.assertEqual(state(), (frames, unfinished, False), data)
        reader = webchannels.FrameReader(1 << 20)
        for data, frames, unfinished in (
                (frame(BINARY, bytes(70_000))[:5], 0, True), (frame(BINARY, bytes(70_000))[5:], 1,
                False), (b"\x82\xff", 1, True), (b"\xff" * 8, 1, False), (frame(TEXT), 1, False)):
            reader.receive(data)
            self.assertEqual(state(), (frames, unfinished, False), data[:99])
        # Without an agreement nothing is inflated.
        reader = webchannels.FrameReader(1 << 20)
        self.assertEqual([kind for kind, _ in reader.receive(frame(TEXT, packed(b"a"), rsv=4))],
                         [webchannels.FAIL])
        reader = webchannels.FrameReader(1 << 20, True)
        self.assertEqual(reader.receive(frame(TEXT, packed(b"a"), rsv=4)), [(TEXT, "a")])
        self.assertEqual(state(), (1, False, False))

    def test_a_short_message_in_a_chunk_of_its_own(self) -> None:
        hello = frame(TEXT, HELLO.encode())
        for chunk, limit, text in (
                (hello, 99, HELLO), (frame(TEXT, b"a"), 1, "a"), (frame(TEXT, b"a"), 0, None),
                (frame(TEXT, b"x" * 125), 125, "x" * 125), (frame(TEXT, b"x" * 125), 124, None),
                (frame(TEXT), 9, None), (b"", 9, None), (b"\x81", 9, None), (hello[:-1], 99, None),
                (hello + b"\x81", 99, None), (frame(TEXT, b"a", fin=False), 9, None),
                (frame(TEXT, b"a", rsv=4), 9, None), (frame(BINARY, b"a"), 9, None),
                (frame(TEXT, b"\xff"), 9, None), (b"\x81\1" + bytes(5), 9, None),
                # As long as their second bytes were, if these were not those of longer frames.
                (b"\x81\xfe" + bytes(130), 999, None), (b"\x81\xff" + bytes(131), 999, None)):
            reader = webchannels.FrameReader(limit, 20)
            self.assertEqual(reader.receive_short(chunk), text, chunk)
            self.assertEqual(reader.frames, text is not None)
            # Not inside of a message or a frame, and not after the end.
            for before in (frame(BINARY, fin=False), frame(BINARY, b"a")[:5], frame(CLOSE)):
                reader = webchannels.FrameReader(999, 20)
                reader.receive(before)
                self.assertIsNone(reader.receive_short(chunk))

    def test_the_frames_of_a_chunk_come_a_thousand_at_a_time(self) -> None:
        for each, event in ((frame(TEXT, b"a"), (TEXT, "a")), (frame(PING), (PING, b""))):
            reader = webchannels.FrameReader(1 << 20)
            found = [reader.receive(each * 4321 + each[:4])]
            while reader.more:
                found.append(reader.receive(b""))
            self.assertEqual([len(part) for part in found], [1000] * 4 + [321])
            self.assertTrue(sum(found, []) == [event] * 4321)  # a diff would take minutes
            self.assertEqual(reader.receive(each[4:]), [event])

    def test_what_is_held_is_read_later(self) -> None:
        reader, data = webchannels.FrameReader(100), frame(TEXT, b"a") + frame(BINARY, b"b")
        reader.hold(data[:9])
        self.assertTrue(reader.more)
        reader.hold(data[9:])
        self.assertEqual(reader.unfinished(), (1, len(data)))
        self.assertEqual(reader.receive(b""), [(TEXT, "a"), (BINARY, b"b")])
        self.assertFalse(reader.more)
        reader.stop()
        reader.hold(data)  # is ignored, as all that comes
        self.assertFalse(reader.more)
        self.assertEqual(reader.receive(b""), [])

    def test_failures_that_are_told_apart(self) -> None:
        reasons = set()
        for stream in (frame(CONTINUATION), frame(TEXT, fin=False) + frame(TEXT), frame(3)):
            [(kind, (code, reason))] = webchannels.FrameReader(9).receive(stream)
            self.assertEqual((kind, code), (webchannels.FAIL, 1002))
            reasons.add(reason)
        self.assertEqual(len(reasons), 3)

    def test_encoding_messages(self) -> None:
        for opcode in (TEXT, BINARY):
            for body, bits, threshold, deflated in (
                    (b"", 15, 0, False), (b"a" * 99, 15, 99, True), (b"a" * 99, 15, 100, False),
                    (b"a" * 99, 0, 0, False), (b"a" * 99, 9, 99, True), (b"abc", 15, 0, False),
                    (bytes(range(64)) * 900, 9, 0, True), (b"a" * 200_000, 15, 0, True),
                    (b"a" * 65_536, 9, 0, True), (b"a" * 65_537, 9, 0, False),
                    (os.urandom(3000), 15, 0, False)):
                encoded = webchannels.encode_message(opcode, body, bits, threshold)
                self.assertEqual(encoded[0], (0xC0 if deflated else 0x80) | opcode)
                size = encoded[1]
                start = 2 if size < 126 else 4 if size == 126 else 10
                self.assertEqual(len(encoded) - start,
                                 int.from_bytes(encoded[2:start], "big") if start > 2 else size)
                payload = encoded[start:]
                if deflated:
                    self.assertLess(len(payload), len(body))
                    # A window that is larger than agreed on would be refused here.
                    payload = zlib.decompressobj(-bits).decompress(payload + b"\0\0\xff\xff")
                self.assertEqual(payload, body)
        for tail in range(40):  # deflated if that is shorter, be it by one byte
            body = bytes(range(100)) + b"a" * tail
            shorter = min(body, packed(body), key=len)
            self.assertEqual(webchannels.encode_message(BINARY, body, 15, 0)[-len(shorter):],
                             shorter)

    SEQUENCES: dict[str, tuple[bytes, list[Any]]] = {
        "fragments with control frames between": (
            frame(TEXT, b"a", fin=False) + frame(PING, b"p") + frame(CONTINUATION, b"", fin=False)
            + frame(PONG) + frame(CONTINUATION, b"b") + frame(BINARY, b"c"),
            [(PING, b"p"), (PONG, b""), (TEXT, "ab"), (BINARY, b"c")]),
        "characters across fragments": (
            b"".join(frame(TEXT if not i else CONTINUATION, bytes([b]), fin=False)
                     for i, b in enumerate(HELLO.encode())) + frame(CONTINUATION),
            [(TEXT, HELLO)]),
        "nothing behind a close": (
            frame(TEXT, b"a") + frame(CLOSE, b"\x03\xe8bye") + frame(TEXT, b"b") + b"\xff\xff",
            [(TEXT, "a"), (CLOSE, (1000, "bye"))]),
        "more than 125 bytes": (
            frame(BINARY, b"a" * 126, fin=False) + frame(CONTINUATION, b"a" * 130)
            + frame(TEXT, HELLO.encode() * 9), [(BINARY, b"a" * 256), (TEXT, HELLO * 9)]),
        "more than 125 bytes that are not UTF-8": (
            frame(TEXT, b"a" * 150 + b"\xff"), [(-1, 1007)]),
        "a close without a code": (frame(CLOSE), [(CLOSE, (1005, ""))]),
        "messages before the error": (
            frame(TEXT, b"a") + frame(3) + frame(TEXT, b"b"), [(TEXT, "a"), (-1, 1002)]),
        "an unmasked frame": (b"\x81\x01a", [(-1, 1002)]),
        "an unmasked control frame": (b"\x89\x00", [(-1, 1002)]),
        "nothing to continue": (frame(CONTINUATION, b"a"), [(-1, 1002)]),
        "a message inside a message": (
            frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), [(-1, 1002)]),
        "a binary one inside a message": (
            frame(TEXT, b"a", fin=False) + frame(BINARY, b"b"), [(-1, 1002)]),
        "a fragmented ping": (frame(PING, b"a", fin=False), [(-1, 1002)]),
        "a fragmented close": (frame(CLOSE, fin=False), [(-1, 1002)]),
        "a long ping": (frame(PING, bytes(126)), [(-1, 1002)]),
        "a long close": (frame(CLOSE, b"\x03\xe8" + bytes(124)), [(-1, 1002)]),
        "the longest ping": (frame(PING, bytes(125)), [(PING, bytes(125))]),
        "the longest close": (frame(CLOSE, b"\x03\xe8" + bytes(123)),
                              [(CLOSE, (1000, "\0" * 123))]),
        "a length in 16 bits behind a short frame": (
            frame(TEXT, b"a") + frame(BINARY, bytes(300)), [(TEXT, "a"), (BINARY, bytes(300))]),
        "the largest length that there is": (
            frame(PING) + b"\x82\xff" + struct.pack("!Q", (1 << 63) - 1) + b"mask",
            [(PING, b""), (-1, 1009)]),
        "a length that fits 7 bits in 16": (b"\x82\xfe\0\x7d", [(-1, 1002)]),
        "a length that fits 16 bits in 64": (b"\x82\xff" + struct.pack("!Q", 65535), [(-1, 1002)]),
        "a length with the top bit set": (b"\x82\xff" + struct.pack("!Q", 1 << 63), [(-1, 1002)]),
        "text that is not UTF-8": (frame(TEXT, b"a\xff"), [(-1, 1007)]),
        "text cut in a character": (frame(TEXT, b"a\xe2\x82"), [(-1, 1007)]),
        "a close reason that is not UTF-8": (frame(CLOSE, b"\x03\xe8\xff"), [(-1, 1007)]),
        "half a close code": (frame(CLOSE, b"\x03"), [(-1, 1002)]),
        **{f"reserved opcode {opcode}": (frame(opcode), [(-1, 1002)])
           for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
        **{f"reserved bits {rsv}": (frame(TEXT, b"a", rsv=rsv), [(-1, 1002)])
           for rsv in range(1, 8)},
    }
    DEFLATED: dict[str, tuple[bytes, list[Any]]] = {
        "one message": (frame(TEXT, packed(b"hello" * 9), rsv=4), [(TEXT, "hello" * 9)]),
        "an empty one": (frame(TEXT, packed(b""), rsv=4), [(TEXT, "")]),
        "a plain one": (frame(TEXT, b"a"), [(TEXT, "a")]),
        "several": (frame(TEXT, packed(b"a"), rsv=4) + frame(BINARY, packed(b"b"), rsv=4)
                    + frame(TEXT, b"c"), [(TEXT, "a"), (BINARY, b"b"), (TEXT, "c")]),
        "in fragments": (
            frame(BINARY, packed(b"abc" * 50)[:5], fin=False, rsv=4) + frame(PING)
            + frame(CONTINUATION, packed(b"abc" * 50)[5:]), [(PING, b""), (BINARY, b"abc" * 50)]),
        "with a final block": (frame(TEXT, packed(b"abc", final=True), rsv=4), [(TEXT, "abc")]),
        "with two final blocks": (
            frame(TEXT, packed(b"abc", final=True)[:-1] + packed(b"def"), rsv=4),
            [(TEXT, "abcdef")]),
        "with many": (frame(TEXT, b"\x03\x00" * 16 + b"\0", rsv=4), [(TEXT, "")]),
        "with a flood of them": (frame(TEXT, b"\x03\x00" * 17 + b"\0", rsv=4), [(-1, 1007)]),
        "not deflate": (frame(TEXT, b"\xff\xff\xff", rsv=4), [(-1, 1007)]),
        "cut short": (frame(BINARY, packed(os.urandom(99))[:50], rsv=4), [(-1, 1007)]),
        "text in it that is not UTF-8": (frame(TEXT, packed(b"a\xff"), rsv=4), [(-1, 1007)]),
        "a surrogate in it": (frame(TEXT, packed(b"\xed\xa0\x80"), rsv=4), [(-1, 1007)]),
        "rsv1 on a continuation": (
            frame(TEXT, b"a", fin=False) + frame(CONTINUATION, b"b", rsv=4), [(-1, 1002)]),
        "rsv1 on a ping": (frame(PING, rsv=4), [(-1, 1002)]),
        "rsv2": (frame(TEXT, b"a", rsv=2), [(-1, 1002)]),
    }

    def test_sequences_split_at_every_point(self) -> None:
        for inflate, sequences in ((0, self.SEQUENCES), (20, self.DEFLATED)):
            for name, (stream, expected) in sequences.items():
                with self.subTest(name):
                    self.assertEqual(events([stream], inflate=inflate), expected)
                    for at in range(1, len(stream)):
                        self.assertEqual(events([stream[:at], stream[at:]], inflate=inflate),
                                         expected, at)
                    self.assertEqual(events([bytes([b]) for b in stream], inflate=inflate),
                                     expected)

    def test_random_splits_and_random_damage(self) -> None:
        """Whatever arrives, every way of splitting it gives the same, and nothing is raised."""
        random = Random(6455)
        sequences = [(stream, inflate) for inflate, table in
                     ((0, self.SEQUENCES), (20, self.DEFLATED))
                     for stream, _ in table.values()]
        failures = 0
        for _ in range(4000):
            stream, inflate = random.choice(sequences)
            data = bytearray(random.choice(sequences)[0] + stream)
            for _ in range(random.randrange(4)):
                data[random.randrange(len(data))] = random.randrange(256)
            cuts = sorted(random.sample(range(len(data) + 1), min(5, len(data))))
            chunks = [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)])]
            whole = events([bytes(data)], 1000, inflate)
            failures += bool(whole and whole[-1][0] == webchannels.FAIL)
            self.assertEqual(events(chunks, 1000, inflate), whole, chunks)
        self.assertTrue(500 < failures < 3900, failures)

    def test_close_codes(self) -> None:
        good = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
        for code in [*range(0, 1100), 1999, 2000, 2999, *range(3000, 5100, 99), 4999, 5000, 65535]:
            expected = (CLOSE, (code, "")) if code in good else (-1, 1002)
            self.assertEqual(events([frame(CLOSE, struct.pack("!H", code))]), [expected])

    def test_bad_utf_8_is_refused_at_its_first_bad_byte(self) -> None:
        """Every prefix of up to three bytes, by Python's own strict decoder as the judge."""
        def judge(data: bytes) -> bool:
            """Can this still become UTF-8?"""
            tails = [first + rest for first in (b"", b"\x80", b"\x90", b"\xa0")
                     for rest in (b"", b"\x80", b"\x80\x80")]
            for tail in tails:
                with contextlib.suppress(UnicodeDecodeError):
                    return bool((data + tail).decode()) or True
            return False

        firsts = [0x00, 0x7f, 0x80, 0xbf, *range(0xc0, 0x100)]
        seconds = [0x00, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff]
        prefixes = [bytes([a]) for a in firsts] + [bytes([a, b]) for a in firsts for b in seconds]
        prefixes += [bytes([a, b, c]) for a in firsts for b in seconds for c in seconds]
        for prefix in prefixes:
            expected = [] if judge(prefix) else [(-1, 1007)]
            # A frame whose end has not arrived, with nothing, or a fragment, before it.
            self.assertEqual(events([frame(TEXT, prefix, length=50)]), expected, prefix)
            self.assertEqual(events([frame(TEXT, prefix[:1], fin=False)
                                     + frame(CONTINUATION, prefix[1:], length=50)]), expected)
            deflated = frame(TEXT, packed(b"ok" + prefix), rsv=4, fin=False)
            self.assertEqual(events([deflated], inflate=20), expected)

    def test_a_deflate_bomb_costs_no_more_than_the_limit(self) -> None:
        limit = 1 << 20
        bomb = frame(BINARY, packed(bytes(200 << 20)), rsv=4)
        self.assertLess(len(bomb), limit)
        fits = frame(BINARY, packed(bytes(limit)), rsv=4)
        tracemalloc.start()
        self.assertEqual(events([bomb], limit, 2000), [(-1, 1009)])
        reader = webchannels.FrameReader(limit, 2000)
        self.assertEqual([kind for kind, _ in reader.receive(fits * 100)], [BINARY])
        self.assertTrue(reader.more)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 6 * limit)

    def test_a_bomb_behind_a_full_message_costs_next_to_nothing(self) -> None:
        limit, deflater = 1 << 20, zlib.compressobj(wbits=-15)
        full = deflater.compress(bytes(limit)) + deflater.flush(zlib.Z_SYNC_FLUSH)
        bomb = deflater.compress(bytes(50 << 20)) + deflater.flush(zlib.Z_SYNC_FLUSH)
        reader = webchannels.FrameReader(limit, 2000)
        self.assertEqual(reader.receive(frame(BINARY, full, rsv=4, fin=False)), [])
        second = frame(CONTINUATION, bomb)
        # The same in one frame, behind a final block: there the full message is held, too.
        both = frame(BINARY, packed(bytes(limit), final=True)[:-1] + packed(bytes(50 << 20)), rsv=4)
        for each, data, most in ((reader, second, limit // 2),
                                 (webchannels.FrameReader(limit, 2000), both, limit * 7 // 2)):
            tracemalloc.start()
            [(kind, (code, _))] = each.receive(data)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.assertEqual((kind, code), (webchannels.FAIL, 1009))
            self.assertLess(peak, most)

    def test_how_much_a_message_may_inflate(self) -> None:
        def inflating(to: int, opcode: int = TEXT) -> bytes:
            return frame(opcode, packed(bytes(to)), rsv=4)

        small, large = inflating(16_000), inflating(70_000)
        self.assertEqual(events([small] * 4 + [frame(TEXT)], 1 << 20, 1), [
            *[(TEXT, "\0" * 16_000)] * 4, (TEXT, "")])
        self.assertEqual(events([small] * 5, 1 << 20, 1)[-1], (-1, 1009))  # all together
        self.assertEqual(events([large], 1 << 20, 1), [(-1, 1009)])
        self.assertEqual(events([large] * 9, 1 << 20, 2000), [(TEXT, "\0" * 70_000)] * 9)
        # In parts: as soon as it is too much.
        parts = [frame(TEXT, packed(bytes(70_000))[:-1], rsv=4, fin=False)]
        self.assertEqual(events(parts, 1 << 20, 1), [(-1, 1009)])
        # What shrinks little gives back what the others took.
        text = base64.b64encode(os.urandom(30_000))
        stored = frame(TEXT, packed(text), rsv=4)
        self.assertEqual(events([small, stored] * 9, 1 << 20, 2), [
            (TEXT, "\0" * 16_000), (TEXT, text.decode())] * 9)
        reader = webchannels.FrameReader(1 << 20, 1)
        for _ in range(9):
            self.assertEqual(reader.receive(small), [(TEXT, "\0" * 16_000)])
            reader.refill()
        # Bytes may be all zeros, as a silent sound is, or an empty picture.
        silence = inflating(1 << 20, BINARY)
        self.assertEqual(events([silence] * 3, 1 << 20, 1), [(BINARY, bytes(1 << 20))] * 3)
        self.assertEqual(events([inflating(1 << 20, BINARY)], (1 << 20) - 1, 1), [(-1, 1009)])

    def test_a_deflated_frame_cannot_be_much_longer_than_a_message(self) -> None:
        for opcode, more in ((BINARY, b""), (CONTINUATION, frame(BINARY, b"\0", rsv=4, fin=False))):
            self.assertEqual(events([more + frame(opcode, rsv=0 if more else 4, length=5000)],
                                    1000, 20), [(-1, 1009)])
        self.assertEqual(events([frame(BINARY, rsv=4, length=1050)], 1000, 20), [])

    def test_unfinished_text_is_held_as_bytes(self) -> None:
        text = "\U0001f600" + "a" * 500_000
        for inflate, data in (0, text.encode()), (2000, packed(text.encode())):
            reader = webchannels.FrameReader(1 << 20, inflate)
            part = frame(TEXT, data, rsv=4 if inflate else 0, fin=False)
            tracemalloc.start()
            self.assertEqual(reader.receive(part), [])
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            self.assertLess(held, 700_000)
            self.assertEqual(reader.receive(frame(CONTINUATION)), [(TEXT, text)])

    def test_tiny_fragments_cost_no_more_than_twice_the_message(self) -> None:
        reader = webchannels.FrameReader(1 << 20)
        reader.receive(frame(TEXT, b"a", fin=False))
        chunk = frame(CONTINUATION, "\u20ac".encode(), fin=False) * 1000
        tracemalloc.start()
        for _ in range(50):
            self.assertEqual(reader.receive(chunk), [])
        (_, peak), size = tracemalloc.get_traced_memory(), 50 * 1000 * 3
        tracemalloc.stop()
        self.assertLess(peak, 2 * size + 200_000)
        self.assertEqual(reader.receive(frame(CONTINUATION)), [(TEXT, "a" + "\u20ac" * 50_000)])

    def test_what_is_unfinished(self) -> None:
        """A message keeps the number of its first frame, and only its own bytes count."""
        reader = webchannels.FrameReader(1 << 20)
        for data, expected in (
                (frame(TEXT, b"a"), (0, 0)), (frame(BINARY, bytes(300))[:5], (2, 5)),
                (frame(BINARY, bytes(300))[5:58], (2, 50)), (bytes(250), (0, 0)),
                (frame(PING, b"ping")[:7], (3, 7)), (b"\0\0\0", (0, 0)),
                (frame(BINARY, bytes(50_000), fin=False), (4, 50_000)),
                (frame(PING, bytes(99)), (4, 50_000)), (frame(PING)[:3], (4, 50_000)),
                (frame(PING)[3:] + frame(CONTINUATION, b"abc")[:-1], (4, 50_002)),
                (b"a" + frame(CONTINUATION, length=1 << 21), (0, 0))):
            reader.receive(data)
            self.assertEqual(reader.unfinished(), expected)

    def test_negotiation(self) -> None:
        answer = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        for offer, expected in {
                "": ("", 0), "permessage-deflate": (answer, 15), "x-webkit-deflate": ("", 0),
                "permessage-deflate; client_max_window_bits": (answer, 15),
                "Permessage-Deflate;client_max_window_bits=10": (
                    answer + "; client_max_window_bits=10", 15),
                "permessage-deflate; client_max_window_bits=8": (
                    answer + "; client_max_window_bits=8", 15),
                'permessage-deflate; server_max_window_bits="9"': (
                    answer + "; server_max_window_bits=9", 9),
                "permessage-deflate; server_no_context_takeover; client_no_context_takeover": (
                    answer, 15),
                "permessage-deflate; server_max_window_bits=8, permessage-deflate": (answer, 15),
                "permessage-deflate; client_max_window_bits=11; server_max_window_bits=10": (
                    answer + "; client_max_window_bits=11; server_max_window_bits=9", 9),
                "foo, bar; x=1, permessage-deflate; server_max_window_bits=12": (
                    answer + "; server_max_window_bits=9", 9),
                **{f"permessage-deflate; {parameter}": ("", 0) for parameter in (
                    "unknown", "server_max_window_bits", "server_max_window_bits=7",
                    "server_max_window_bits=8", "server_max_window_bits=16",
                    "server_max_window_bits=09", "client_max_window_bits=7",
                    'client_max_window_bits=""', "client_max_window_bits=1000000",
                    "server_no_context_takeover=1", "client_max_window_bits=; x", "",
                    "client_no_context_takeover; client_no_context_takeover",
                    "server_max_window_bits=10; server_max_window_bits=10")}}.items():
            with self.subTest(offer):
                self.assertEqual(webchannels.negotiate_deflate(offer), expected)


# ---- The server, over real sockets ---------------------------------------------------------------


class ServerTest(unittest.TestCase):
    """An app of its own for each test; `self.url` is where it serves."""

    def setUp(self) -> None:
        self.app = WebChannels()
        self.app.channel("/____/echo", lambda payload: payload)
        self.enterContext_(quiet())
        self.configure(self.app)
        self.url = self.enterContext_(serve(self.app))

    def configure(self, app: WebChannels) -> None:
        """Overridden by what needs other settings or handlers."""

    def enterContext_(self, manager: Any) -> Any:  # unittest has it from Python 3.11 on
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def connect(self, **options: Any) -> WebSocketClient:
        client = WebSocketClient(self.url, **options)
        self.addCleanup(client.close)
        return client

    def subscribed(self, channel: str = "____", **options: Any) -> WebSocketClient:
        """A client of webchannels.v1, subscribed to the channel."""
        client = self.connect(**{"subprotocol": "webchannels.v1", **options})
        client.send_json({"channel": channel, "message": "subscribe", "ref": 1})
        self.assertEqual(client.recv_json(), {"ref": 1, "payload": "Subscription: OK"})
        return client

    def until(self, condition: Callable[[], Any], timeout: float = 10) -> Any:
        """Wait for what no event tells of."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.005)
        self.fail("it did not happen")

    def raw(self, data: bytes) -> Reply:
        return http(self.url, data)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what tests provoke on purpose out of the output."""
    logger = logging.getLogger("webchannels")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # which, unlike the attribute, empties a cache
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def no_logs(name: str) -> Iterator[None]:
    """Fail if this logger is told of anything (unittest has it from Python 3.10 on)."""
    test = unittest.TestCase()
    with test.assertLogs(name, "INFO") as logs:
        yield
        logging.getLogger(name).info("none but this", extra={"kind": None})
    test.assertEqual(logs.output, [f"INFO:{name}:none but this"])


class HttpTest(ServerTest):
    def configure(self, app: WebChannels) -> None:
        self.times = 0
        app.config.max_header_size = 2000
        app.config.max_body_size = 1000
        app.route("/", lambda: "index")
        app.route("/bytes", lambda: b"\0\1")
        app.route("/dict", lambda: {"a": float("nan"), "b": "\u00e9"})
        app.route("/list", lambda: [1])
        app.route("/none", lambda: None)
        app.route("/wrong", lambda: 5)
        app.route("/boom", lambda: 1 / 0)
        app.route("/error", self.error)
        app.route("/bad-error", self.bad_error)
        app.route("/bad-status", lambda: Response(status=99))
        app.route("/set-body", self.changed(body="text"))
        app.route("/set-headers", self.changed(headers={"Content-Type": "text/x"}))
        app.route("/set-bad", self.changed(headers={"X": "a\r\nSet-Cookie: b"}))
        app.route("/set-status", self.changed(status="200"))
        app.route("/mute", self.mute)
        app.route("/response", lambda: Response("x", 201, [("X-A", "1"), ("X-A", "2")], "text/x"))
        app.route("/hi/:name/:n::int", lambda name, n, q="-": {"name": name, "n": n, "q": q})
        app.route("/needs", lambda who: who)
        app.route("/thread", lambda: threading.current_thread().name, threaded=True)
        app.route("/async", self.asynchronous)
        app.route("/cookies", lambda request: request.cookies)
        app.route("/much", self.much)
        app.route("/later", self.later)
        app.route("/cancel", self.cancel)
        app.route("/split", lambda: Response("", headers={"X": "a\r\nSet-Cookie: b"}))
        app.route("/late/:name", lambda: self.app.params("name") + self.app.params("q"))
        app.route("/any/:name", lambda **given: sorted(given))
        app.route("/blind", lambda request: f"{len(request.body)}", method="POST")
        app.route("/who", lambda who="nobody": who, method="POST")
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            app.route("/data", self.data, method=method)

    def changed(self, **values: Any) -> Callable[[], Response]:
        def handler() -> Response:
            response = Response("x")
            for name, value in values.items():
                setattr(response, name, value)
            return response
        return handler

    def mute(self) -> None:
        raise Mute

    def bad_error(self) -> None:
        raise HTTPError(404, headers={"X": "a\r\nb"})

    def error(self) -> None:
        raise HTTPError(418, "short and stout", {"X-Pot": "tea"})

    async def asynchronous(self, request: Request) -> str:
        await asyncio.sleep(0)
        return f"{request.method} {request.headers['user-agent']} {self.app.params('q')}"

    def much(self) -> bytes:
        self.times += 1
        return bytes(20_000_000)  # more than any buffer between

    async def cancel(self) -> None:
        raise asyncio.CancelledError

    async def later(self) -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)

    def data(self, request: Request) -> dict[str, Any]:
        given = {key: value for key, value in self.app.params().items() if key != "request"}
        return {**given, "size": len(request.body), "method": request.method}

    def test_what_handlers_return(self) -> None:
        for path, status, kind, body in (
                ("/", 200, "text/html; charset=utf-8", b"index"),
                ("/bytes", 200, "application/octet-stream", b"\0\1"),
                ("/dict", 200, "application/json", '{"a":null,"b":"\u00e9"}'.encode()),
                ("/list", 200, "application/json", b"[1]"), ("/none", 204, None, b""),
                ("/wrong", 500, "text/plain; charset=utf-8", b"Internal server error"),
                ("/boom", 500, "text/plain; charset=utf-8", b"Internal server error"),
                ("/cancel", 500, "text/plain; charset=utf-8", b"Internal server error"),
                ("/bad-error", 500, None, b"Internal server error"),
                ("/bad-status", 500, None, b"Internal server error"),
                ("/set-body", 200, None, b"text"), ("/set-headers", 200, "text/x", b"x"),
                ("/set-bad", 500, None, b"Internal server error"),
                ("/set-status", 500, None, b"Internal server error"),
                ("/mute", 500, None, b"Internal server error"),
                ("/split", 500, "text/plain; charset=utf-8", b"Internal server error"),
                ("/error", 418, "text/plain; charset=utf-8", b"short and stout"),
                ("/response", 201, "text/x", b"x"),
                ("/nope", 404, None, b"Not found: no handler for the route /nope"),
                ("/favicon.ico", 204, None, b""),
                ("/hi/bob/5?q=a%20b&x", 200, None, b'{"name":"bob","n":5,"q":"a b"}'),
                ("/hi/b%2Fb/5", 404, None, b"Not found: no handler for the route /hi/b%2Fb/5"),
                ("/hi/bob/x", 404, None, None), ("/hi/%ff/5", 400, None, None),
                ("/late/bob?name=eve&q=1", 200, None, b"bob1"),
                ("/any/bob?q=1", 200, None, b'["name","q","request"]'),
                ("/needs", 400, None,
                 b"The parameter who of /needs is missing, and has no default (a body counts if "
                 b"its Content-Type is that of a form, or of JSON)"),
                ("/needs?who=me", 200, None, b"me"), ("/needs?%ff=%ff", 400, None, None),
                ("/needs?who=1&who=2", 200, None, b"2")):
            with self.subTest(path):
                reply = request("GET", self.url + path)
                self.assertEqual(reply.status, status)
                if body is not None:
                    self.assertEqual(reply.body, body)
                if kind:
                    self.assertEqual(reply.headers["content-type"], kind)
                self.assertEqual(reply.headers.get("content-length"),
                                 None if status == 204 else str(len(reply.body)))
                self.assertNotIn(b"Traceback", reply.body)
                self.assertNotIn("server", reply.headers)
                self.assertRegex(reply.headers["date"], " GMT$")  # RFC 9110, 5.6.7
                self.assertLess(abs(email.utils.parsedate_to_datetime(
                    reply.headers["date"]).timestamp() - time.time()), 5)
        self.assertIn("webchannels", request("GET", self.url + "/thread").body.decode())
        self.assertEqual(request("GET", self.url + "/async?q=7", {"User-Agent": "me"}).body,
                         b"GET me 7")
        self.assertEqual(request("GET", self.url + "/response").headers["x-a"], "1, 2")
        self.assertEqual(request("GET", self.url + "/error").headers["x-pot"], "tea")
        self.assertEqual(request("GET", self.url + "/cookies",
                                 {"Cookie": "a=1; odd[]=x=y; b=\"2\"; nothing; ="}).body,
                         b'{"a":"1","odd[]":"x=y","b":"2","nothing":""}')
        self.assertEqual(request("GET", self.url + "/cookies").body, b"{}")
        with self.assertRaises(AttributeError):  # they were checked
            Response().headers.append(("X", "a\r\nb"))  # type: ignore[attr-defined]

    def test_headers_that_the_server_sets(self) -> None:
        for name in ("connection", "Content-Length", "DATE", "Transfer-Encoding"):
            with self.assertRaisesRegex(ValueError, "that the server sets"):
                Response("", headers={name: "1"})

    def test_what_a_response_says_of_its_body(self) -> None:
        for response, body, kind in (
                (Response(), b"", None), (Response(status=201), b"", None),
                (Response("x", headers={"content-TYPE": "text/x"}), b"x", "text/x"),
                (Response("", content_type="text/x"), b"", None),
                (Response(bytearray(b"x")), b"x", "application/octet-stream"),
                (Response(memoryview(b"x"), content_type="a/b"), b"x", "a/b"),
                (Response({"a": {1}}, json_default=list), b'{"a":[1]}', "application/json"),
                (Response(None), b"null", "application/json")):
            self.app.route("/", lambda response=response: response)
            reply = request("GET", self.url)
            self.assertEqual((reply.body, reply.headers.get("content-type")), (body, kind))
        for status in 204, 304:  # these have none: RFC 9110, 6.4.1
            self.app.route("/", lambda status=status: Response("x", status))
            with Connection(self.url) as connection:
                connection.send_raw(b"GET / HTTP/1.1\r\nHost: a.localhost\r\n\r\n"
                                    b"GET /list HTTP/1.1\r\nHost: a.localhost\r\n\r\n")
                self.assertNotIn("content-length", connection.response().headers)
                reply = connection.response()
                self.assertEqual((reply.head[:5], reply.body), (b"HTTP/", b"[1]"))
        head = Response("x", headers={"X-A": "\xe9\u20ac"}).encode()
        self.assertIn(b"X-A: \xe9?\r\n", head)  # latin-1, or "?"
        self.assertNotIn(b"Connection:", head)
        self.assertEqual(Response("x").encode()[-5:], b"\r\n\r\nx")

    def test_targets(self) -> None:
        self.app.route("/a", lambda request: [request.target, request.path, request.query])
        self.app.route("/", lambda request: [request.target, request.path, request.query])
        for target, found in (
                ("/a?b=c?d", ["/a?b=c?d", "/a", "b=c?d"]), ("/a?", ["/a?", "/a", ""]),
                ("http://localhost/a?b=/c", ["/a?b=/c", "/a", "b=/c"]),
                ("https://localhost:1/a", ["/a", "/a", ""]), ("http://localhost", ["/", "/", ""])):
            reply = self.raw(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            self.assertEqual(json.loads(reply.body), found)

    def test_past_max_clients_503_is_answered(self) -> None:
        self.app.config.max_clients = 2
        with Connection(self.url) as first, Connection(self.url) as second:
            for each in (first, second):
                each.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self.assertEqual(each.response().status, 200)
            reply = request("GET", self.url)
            self.assertEqual((reply.status, reply.headers["retry-after"]), (503, "5"))
            second.close()
            self.until(lambda: request("GET", self.url).status == 200)

    def test_what_futures_and_tasks_do_not_hold(self) -> None:
        class Odd(BaseException):
            """Some programs derive from it what nobody should catch."""

        async def odd() -> None:
            raise Odd

        self.app.route("/stop", lambda: next(iter(())), threaded=True)
        self.app.route("/odd", odd)
        self.app.channel("/____/stop", lambda: next(iter(())), threaded=True)
        for path in ("/stop", "/odd", "/odd"):
            self.assertEqual(request("GET", self.url + path).status, 500)
        client = self.connect()
        client.send_json({"channel": "____", "message": "stop"})
        self.assertEqual(client.recv_text(), "ERROR : 500 - Internal error")

    def test_an_answer_that_is_being_read_is_not_cut_by_down(self) -> None:
        app = WebChannels()
        app.route("/big", lambda: bytes(1_000_000))
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with serve(app, sock=sock) as url, Connection(url) as connection:
            connection.send_raw(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
            select.select([connection.sock], [], [], 10)
            thread = threading.Thread(target=app.down)
            thread.start()
            self.until(lambda: app._stopping)
            self.assertEqual(len(connection.response().body), 1_000_000)
            thread.join()

    def test_requests_wait_while_the_answers_before_them_are_not_read(self) -> None:
        with Connection(self.url) as connection:
            connection.send_raw(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5)
            for _ in range(20):  # meanwhile the server does its best
                self.assertEqual(request("GET", self.url).status, 200)
            self.assertEqual(self.times, 1)
            for _ in range(5):
                self.assertEqual(len(connection.response().body), 20_000_000)

    def test_a_half_closed_peer_gets_its_answers(self) -> None:
        asked = b"GET /async?q=%d HTTP/1.1\r\nHost: localhost\r\nUser-Agent: me\r\n\r\n"
        for count in (0, 1, 2):
            with Connection(self.url) as connection:
                connection.send_raw(b"".join(asked % number for number in range(count)) + b"GET")
                connection.sock.shutdown(socket.SHUT_WR)
                for number in range(count):
                    self.assertEqual(connection.response().body, b"GET me %d" % number)
                self.assertEqual(connection.rest(), b"")

    def test_who_is_still_sending_can_read_why_it_is_refused(self) -> None:
        with Connection(self.url) as connection:
            connection.send_raw(b"POST /data HTTP/1.1\r\nHost: localhost\r\n"
                                b"Content-Length: 20000000\r\n\r\n" + bytes(20_000_000))
            self.assertEqual(connection.response().status, 413)

    def test_what_fails_on_the_loop_beside_the_server_is_logged_as_ever(self) -> None:
        with self.assertLogs("asyncio", "ERROR") as logs:
            request("GET", self.url + "/later")
        self.assertIn("ZeroDivisionError", logs.output[0])

    def test_a_failing_handler_is_logged_with_its_traceback(self) -> None:
        logging.getLogger("webchannels").level = logging.NOTSET
        with self.assertLogs("webchannels", "ERROR") as logs:
            request("GET", self.url + "/boom")
        self.assertIn("ZeroDivisionError", logs.output[0])

    def test_methods(self) -> None:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            reply = request(method, self.url + "/data?q=1", {}, b"abc")
            self.assertEqual(json.loads(reply.body), {"q": "1", "size": 3, "method": method})
        with Connection(self.url + "/") as connection:
            connection.send_raw(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = connection.response("HEAD")
            self.assertEqual((reply.status, reply.headers["content-length"]), (200, "5"))
            connection.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertEqual(connection.response().body, b"index")
        for method, path, status, allow in (
                ("POST", "/", 405, "GET, HEAD, OPTIONS"),
                ("OPTIONS", "/", 204, "GET, HEAD, OPTIONS"),
                ("GET", "/data", 405, "DELETE, OPTIONS, PATCH, POST, PUT"),
                ("OPTIONS", "/nope", 404, None), ("TRACE", "/", 501, None),
                ("BREW", "/", 501, None),
                ("BREW", "/nope", 501, None), ("CONNECT", "/", 501, None)):
            reply = request(method, self.url + path)
            self.assertEqual((reply.status, reply.headers.get("allow")), (status, allow), method)
        reply = self.raw(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertEqual(reply.headers["allow"], "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT")

    def test_bodies(self) -> None:
        for kind, body, expected in (
                ("application/x-www-form-urlencoded", b"a=1&b=%C3%A9&c=&q=2",
                 {"a": "1", "b": "\u00e9", "c": "", "q": "2"}),
                ("application/json", b'{"a":[1],"q":2}',
                 {"a": [1], "q": 2, "payload": {"a": [1], "q": 2}}),
                ("application/vnd.x+json; charset=utf-8", b"[1]", {"payload": [1], "q": "0"}),
                ("text/plain", b"a=1", {"q": "0"})):
            reply = request("POST", self.url + "/data?q=0", {"Content-Type": kind}, body)
            self.assertEqual(json.loads(reply.body),
                             {**expected, "size": len(body), "method": "POST"})
        for kind, body in (("application/json", b"{"), ("application/json", b'{"a":NaN}'),
                           ("application/json", b"[" * 900), ("application/json", b"\xff"),
                           ("application/x-www-form-urlencoded", b"a=%ff"),
                           ("application/x-www-form-urlencoded", b"\xff=1"),
                           ("application/x-www-form-urlencoded", b"a=\xc3\xa9"),
                           ("application/x-www-form-urlencoded", b"a=1%"),
                           ("application/x-www-form-urlencoded", b"a=%4g")):
            if body == b"[" * 900:
                self.app.config.max_body_size = 1 << 20
                body = b"[" * 200_000
            fields = {"Content-Type": kind}
            self.assertEqual(request("POST", self.url + "/data", fields, body).status, 400, body)
            self.assertEqual(request("POST", self.url + "/who", fields, body).status, 400, body)
            # What nobody asks for is not read.
            reply = request("POST", self.url + "/blind?q=1", fields, body)
            self.assertEqual((reply.status, reply.body), (200, str(len(body)).encode()))
            reply = request("GET", self.url + "/needs?who=me", fields, body)
            self.assertEqual((reply.status, reply.body), (200, b"me"))
        self.app.config.max_body_size = 10_000
        for count, status in ((1000, 200), (1001, 400)):
            reply = request("POST", self.url + "/data", {
                "Content-Type": "application/x-www-form-urlencoded"}, b"&".join([b"a=1"] * count))
            self.assertEqual(reply.status, status)
        self.app.config.max_body_size = 1000

    def test_chunked_and_continue_and_pipelining(self) -> None:
        with Connection(self.url) as connection:
            connection.send_raw(
                b"POST /data HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: Chunked\r\n\r\n"
                b"3\r\nabc\r\n00A;ext=\"1\"\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
                b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
                b"\r\nGET /list HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertEqual(json.loads(connection.response().body)["size"], 13)
            self.assertEqual(connection.response().body, b"index")
            self.assertEqual(connection.response().body, b"[1]")
            connection.send_raw(b"POST /data HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n"
                                b"Expect: 100-continue\r\n\r\n")
            self.assertEqual(connection.response().status, 100)
            connection.send_raw(b"abc")
            self.assertEqual(json.loads(connection.response().body)["size"], 3)

    def test_keep_alive(self) -> None:
        for head, kept in ((b"HTTP/1.1\r\nHost: localhost\r\n", True),
                           (b"HTTP/1.1\r\nHost: localhost\r\nConnection: x, Close\r\n", False),
                           (b"HTTP/1.0\r\nConnection: keep-alive\r\n", False)):
            with Connection(self.url) as connection:
                connection.send_raw(b"GET / " + head + b"\r\n")
                reply = connection.response()
                self.assertEqual(reply.body, b"index")
                if kept:
                    self.assertNotIn("connection", reply.headers)
                    connection.send_raw(b"GET / " + head + b"\r\n")
                    self.assertEqual(connection.response().body, b"index")
                else:
                    self.assertEqual(reply.headers["connection"], "close")
                    self.assertEqual(connection.rest(), b"")

    REQUESTS: list[tuple[int, bytes]] = [
        (200, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (200, b"GET http://localhost/ HTTP/1.1\r\nHost: other.example\r\n\r\n"),
        (200, b"GET / HTTP/1.0\r\n\r\n"),
        (200, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1960 + b"\r\n\r\n"),
        (200, b"GET / HTTP/1.1\r\nhost:localhost:80  \r\nX-Empty:\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\n\r\n"),
        (400, b"GET http://localhost/ HTTP/1.1\r\n\r\n"),
        (400, b"GET http://localhost/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        (400, b"GET http://user@localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: user@localhost\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost/x\r\n\r\n"),
        (400, b"GET / HTTP/1.1\nHost: localhost\n\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n"),
        (400, b"GET / HTTP/1.1\rHost: localhost\r\r"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x01b\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n\tfolded\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\n: empty\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nX\xff: y\r\n\r\n"),
        (400, b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET / HTTP/1.1 \r\nHost: localhost\r\n\r\n"),
        (400, b" GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET / http/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET /\r\nHost: localhost\r\n\r\n"),
        (400, b"G@T / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET nope HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET /#x HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"\x16\x03\x01\x00\xa5\x01\r\n\r\n"),
        (505, b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n"),
        (505, b"PRI * HTTP/2.0\r\n\r\n"),
        (501, b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (200, b"POST /data HTTP/1.1\r\nHost: localhost\r\nExpect: magic\r\n\r\n"),
        (400, b"G" * 3000),
        (400, b"G" * 3000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (200, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 99 + b"\r\n"),
        (431, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100 + b"\r\n"),
        (414, b"GET /" + b"a" * 3000),
        (414, b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3000),
        (431, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 500),
    ]
    BODIES: list[tuple[int, bytes]] = [
        (200, b"Content-Length: 3\r\n\r\nabc"),
        (200, b"Content-Length: 003\r\n\r\nabc"),
        (200, b"Content-Length: 1000\r\n\r\n" + b"a" * 1000),
        (200, b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"a" * 1000 + b"\r\n0\r\n\r\n"),
        (200, b"Transfer-Encoding: chunked\r\n\r\n" + 2 * (b"1F4\r\n" + b"a" * 500 + b"\r\n")
         + b"0\r\n\r\n"),
        (200, b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
        (200, b"Transfer-Encoding: chunked\r\n\r\n3 ; x\r\nabc\r\n000\r\nA: b\r\n\r\n"),
        (200, b'Transfer-Encoding: chunked\r\n\r\n3;a;b="c;\\"\xe9" ; d\t= e\r\nabc\r\n0\r\n\r\n'),
        (200, b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 999 + b"0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;bad[=x\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;a=\r\nabc\r\n0\r\n\r\n"),
        (400, b'Transfer-Encoding: chunked\r\n\r\n3;a="b\r\nabc\r\n0\r\n\r\n'),
        (400, b'Transfer-Encoding: chunked\r\n\r\n3;a="b"c\r\nabc\r\n0\r\n\r\n'),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;a b\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n"),
        (400, b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n"),
        (400, b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        (400, b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
        (400, b"Content-Length: 3, 4\r\n\r\nabcd"), (400, b"Content-Length: +3\r\n\r\nabc"),
        (400, b"Content-Length: -3\r\n\r\nabc"), (400, b"Content-Length: 3 3\r\n\r\nabc"),
        (400, b"Content-Length: 0x3\r\n\r\nabc"), (400, b"Content-Length: 3_0\r\n\r\nabc"),
        (400, b"Content-Length:\r\n\r\n"), (400, b"Content-Length: \xb2\r\n\r\nabc"),
        (400, b"Content-Length : 3\r\n\r\nabc"),
        (400, b"Content-Length: 9" + b"9" * 99 + b"\r\n\r\n"),
        (413, b"Content-Length: 1001\r\n\r\n"), (413, b"Content-Length: 999999999999\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
        (501, b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
        (501, b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (501, b"Transfer-Encoding: identity\r\n\r\n"), (501, b"Transfer-Encoding: gzip\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcXX0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n 3\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;\nabc\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;a\rb\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n3;" + b"a" * 300),
        (400, b"Transfer-Encoding: chunked\r\n\r\n000000003\r\nabc\r\n0\r\n\r\n"),
        (400, b"Transfer-Encoding: chunked\r\n\r\n0\r\nbad trailer\r\n\r\n"),
        (431, b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 500),
        (413, b"Transfer-Encoding: chunked\r\n\r\n3E9\r\n"),
        (413, b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n"),
        (413, b"Transfer-Encoding: chunked\r\n\r\n3E8\r\n" + b"a" * 1000 + b"\r\n1\r\n"),
        (413, b"Transfer-Encoding: chunked\r\n\r\n200\r\n" + b"a" * 512 + b"\r\n200\r\n"),
    ]

    def test_requests_without_ambiguity(self) -> None:
        """RFC 9112: what two readers could understand differently is refused, with a close."""
        table = self.REQUESTS + [
            (status, b"POST /data HTTP/1.1\r\nHost: localhost\r\n" + rest)
            for status, rest in self.BODIES]
        table.append((400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
        for status, data in table:
            with self.subTest(data[:120]), Connection(self.url) as connection:
                # Were anything read behind an error, the second request would be answered, too.
                again = b"GET /list HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                ended = status == 200 or data.endswith(b"\n")
                connection.send_raw(data + (again if ended else b""))
                reply = connection.response()
                self.assertEqual(reply.status, status)
                if status == 200:
                    connection.rest() if b"HTTP/1.0" in data else self.assertEqual(
                        connection.response().body, b"[1]")
                else:
                    self.assertEqual(reply.headers.get("connection"), "close")
                    self.assertEqual(connection.rest(), b"")

    def test_many_tiny_chunks_are_refused(self) -> None:
        self.app.config.max_body_size = 60_000
        for chunk, count, status in ((b"1\r\nx\r\n", 1000, 200), (b"1\r\nx\r\n", 1100, 400),
                                     (b"14\r\n" + b"x" * 20 + b"\r\n", 3000, 200)):
            reply = self.raw(b"POST /data HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
                             b"\r\n\r\n" + chunk * count + b"0\r\n\r\n")
            self.assertEqual(reply.status, status)

    def test_what_is_refused_of_a_head_has_no_body(self) -> None:
        for status, rest in (
                (400, b" / HTTP/1.1\r\n\r\n"), (400, b" / HTTP/1.1\nHost: a\n"),
                (414, b" /" + b"a" * 3000), (413, b" / HTTP/1.1\r\nHost: localhost\r\n"
                                             b"Content-Length: 2000\r\n\r\n"),
                (400, b" / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc"),
                (400, b" / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")):
            with self.subTest(rest), Connection(self.url) as connection:
                connection.send_raw(b"HEAD" + rest)
                reply = connection.response("HEAD")
                self.assertEqual(reply.status, status)
                self.assertNotEqual(reply.headers["content-length"], "0")
                self.assertEqual(connection.rest(), b"")

    def test_cookies(self) -> None:
        def cookies(*fields: str) -> dict[str, str]:
            lines = ["GET / HTTP/1.1", "Host: a", *(f"Cookie: {each}" for each in fields)]
            return Request("\r\n".join(lines)).cookies

        self.assertEqual(cookies("\xa0__Host-a=1;\t\x85b\xa0=\x85\xa02\xa0 ;c=3"),
                         {"\xa0__Host-a": "1", "\x85b\xa0": "\x85\xa02\xa0", "c": "3"})
        self.assertEqual(cookies("a=1, 2", "b=3"), {"a": "1, 2", "b": "3"})
        self.assertEqual(Request("GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nx: 2").headers["x"], "1, 2")

    def test_half_of_a_surrogate_pair(self) -> None:
        """It has no UTF-8. In JSON it is escaped, as JSON.stringify() does."""
        for path, handler, body in (("/list", lambda: ["\ud83d"], b'["\\ud83d"]'),
                                    ("/", lambda: "<p>\ud83d", b"<p>\\ud83d")):
            self.app.route(path, handler)
            reply = request("GET", self.url + path)
            self.assertEqual((reply.status, reply.body), (200, body))

    def test_every_split_of_a_request_gives_the_same(self) -> None:
        def read(chunks: Sequence[bytes]) -> list[Any]:
            buffer, found = bytearray(), []
            reader = webchannels.read_requests(buffer, limits)
            for chunk in chunks:
                buffer += chunk
                try:
                    while isinstance(request := next(reader), Request):
                        found.append((request.method, request.target, request.body,
                                      dict(request.headers)))
                except HTTPError as error:
                    return [*found, error.status]
            return found

        limits = Config(max_header_size=200, max_body_size=50)
        self.assertEqual(read([b"GET / HTTP/1.1\nHost: a\n\n"]), [400])  # without waiting for more
        head = (b"POST / HTTP/1.%d\r\nHost: a\r\nContent-Length: %d\r\n"
                b"Expect: 100-Continue\r\n\r\n%b")
        for minor, size, behind, told in (  # RFC 9110, 10.1.1: HTTP/1.0 does not know 100
                (0, 3, b"", False), (1, 3, b"", True), (1, 3, b"a", False), (1, 0, b"", None)):
            buffer = bytearray(head % (minor, size, behind))
            reader = webchannels.read_requests(buffer, limits)
            found = next(reader)
            self.assertEqual(found if size else None,
                             b"HTTP/1.1 100 Continue\r\n\r\n" if told else b"" if size else None)
            self.assertEqual(next(reader), b"" if size else None)  # it is told once
        for chunks in ([b"\r\n"], [b"\r", b"\n"]):  # an empty line is not a request begun
            buffer = bytearray()
            reader = webchannels.read_requests(buffer, limits)
            for chunk in chunks:
                buffer += chunk
                self.assertIsNone(next(reader))
            buffer += b"G"
            self.assertEqual(next(reader), b"")
        streams = [data for _, data in self.REQUESTS] + [
            b"POST /data HTTP/1.1\r\nHost: a\r\n" + data for _, data in self.BODIES]
        statuses = set()
        for stream in streams:
            stream = stream[:400] + b"GET /2 HTTP/1.1\r\nHost: b\r\n\r\n"
            whole = read([stream])
            statuses |= {each for each in whole if isinstance(each, int)}
            for at in range(1, len(stream)):
                self.assertEqual(read([stream[:at], stream[at:]]), whole, stream)
            self.assertEqual(read([bytes([b]) for b in stream]), whole, stream)
        self.assertGreater(len(statuses), 5)


class FilesTest(ServerTest):
    """Files of a folder, and what handlers return as a Path."""

    TEN = b"0123456789"

    def configure(self, app: WebChannels) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="webchannels-")).resolve()
        self.addCleanup(shutil.rmtree, self.folder)
        self.www = self.folder / "www"
        for name, text in {
                "www/index.html": "index", "www/a b/\u00e9.txt": "e", "www/ten.txt": "0123456789",
                "www/empty": "", "www/sub/index.html": "sub", "www/sub/.git/config": "secret",
                "www/.secret": "secret", "www/.well-known/x": "secret", "www/route": "file",
                "www/channels.js": "file", "www/con.txt": "con", "secret.txt": "secret",
                "www2/index.html": "secret", "other/index.html": "other"}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        app.static("/", self.www)
        app.static("/files/deep/", str(self.folder / "other"))
        app.route("/route", lambda: "route")
        app.route("/only/:name", lambda name: name)
        app.route("/path", lambda: self.www / "ten.txt")
        app.route("/gone", lambda: self.www / "gone.txt")
        app.route("/zero", lambda name="\0": self.www / name)
        app.route("/folder", lambda: self.www)
        app.route("/page-404", lambda: Response(self.www / "ten.txt", 404))
        app.route("/none", lambda: Response(self.www / "ten.txt", 204))
        app.route("/same", lambda: Response(self.www / "ten.txt", 304))
        app.route("/posted", lambda: self.www / "ten.txt", method="POST")
        app.route("/download", lambda: Response(
            self.www / "ten.txt", content_type="text/x", headers={
                "Content-Disposition": "attachment", "ETag": '"Mine"',
                "cache-control": "max-age=5"}))

    def big(self, size: int = 20_000_000) -> Path:
        """More than any buffer between."""
        path = self.www / "big"
        path.write_bytes(os.urandom(1 << 20) * (size >> 20) + b"end")
        return path

    def ask(self, connection: Connection, target: str = "/big", fields: str = "") -> None:
        connection.send_raw(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode())

    def begin(self, connection: Connection, target: str = "/big", fields: str = "") -> Any:
        """Ask for a file, and wait until its sending waits for us; the server's side of it."""
        self.ask(connection, target, fields)
        select.select([connection.sock], [], [], 10)
        return self.until(lambda: next((each for each in list(self.app._http)
                                        if each._left and each._behind), None))

    def test_a_folder(self) -> None:
        for path, body in (
                ("/", b"index"), ("/index.html", b"index"), ("/a%20b/%C3%A9.txt", b"e"),
                ("/ten.txt?x=1", self.TEN), ("/empty", b""), ("/sub/", b"sub"),
                ("/files/deep/", b"other"), ("/files/deep/index.html", b"other"),
                ("/%74en.txt", self.TEN), ("/route", b"route"), ("/only/x", b"x"),
                ("/channels.js", webchannels.CHANNELS_JS.encode())):
            with self.subTest(path):
                reply = request("GET", self.url + path)
                self.assertEqual((reply.status, reply.body), (200, body))
        self.app.static("/", self.folder / "other")
        self.assertEqual(request("GET", self.url).body, b"other")

    def test_nothing_else_is_served(self) -> None:
        up, folder = "../" * 12, str(self.folder)
        for path in (
                "/nope", "/sub/nope", "/ten.txt/", "/ten.txt/x", "/.secret", "/sub/.git/config",
                "/.well-known/x", "/a%20b/", "/..", "/../secret.txt", "/../www2/index.html",
                "/sub/../ten.txt", "/./ten.txt", "/%2e%2e/secret.txt", "/%2E%2E%2Fsecret.txt",
                "/..%2fsecret.txt", "/..%5csecret.txt", "/..\\secret.txt", "/sub%2findex.html",
                "/sub%5cindex.html", "/%252e%252e/secret.txt", "/%c0%ae%c0%ae/secret.txt",
                "/..%00/secret.txt", "/ten.txt%00", "/ten.txt%0a", "//ten.txt", "/sub//index.html",
                "//etc/passwd", "/%2fetc%2fpasswd", f"/{up}etc/passwd", f"/{folder}/secret.txt",
                f"/{folder.replace('/', '%2f')}%2fsecret.txt", "/C:/Windows/win.ini", "/c%3a/",
                "/ten.txt::$DATA", "/" + "a" * 300, "/" + "a/" * 5000, "/files", "/files/",
                "/files/deep/nope", "/files/deepindex.html", "/%ed%a0%80", "/index.html/../ten.txt",
                "/~/secret.txt", "/..;/secret.txt", "/....//secret.txt", "/*", "/ten.tx?"):
            with self.subTest(path):
                reply = request("GET", self.url + path)
                self.assertIn(reply.status, (400, 404))
                self.assertNotIn(b"secret", reply.body)
        for method, status in ("POST", 405), ("PUT", 405), ("DELETE", 405), ("BREW", 501):
            reply = request(method, self.url + "/ten.txt")
            self.assertEqual(reply.status, status)
            if status == 405:
                self.assertEqual(reply.headers["allow"], "GET, HEAD, OPTIONS")

    def test_links(self) -> None:
        links: dict[str, str | Path] = {
            "out": self.folder / "secret.txt", "up": self.folder, "in": self.www / "sub",
            "hidden": self.www / ".secret", "git": self.www / "sub" / ".git", "loop": "loop",
            "ten": "ten.txt", "gone": "nowhere", "abs": "/etc"}
        try:
            for name, target in links.items():
                (self.www / name).symlink_to(target)
        except OSError as error:
            self.skipTest(str(error))
        self.assertEqual(request("GET", self.url + "/in/").body, b"sub")
        self.assertEqual(request("GET", self.url + "/ten").body, self.TEN)
        for path in ("/out", "/up", "/up/", "/up/secret.txt", "/up/www2/", "/hidden", "/git",
                     "/git/config", "/loop", "/loop/", "/gone", "/abs", "/abs/", "/abs/passwd",
                     "/in/.git/config"):
            self.assertEqual(request("GET", self.url + path).status, 404, path)
        link = self.folder / "link"  # the folder itself may be one
        link.symlink_to(self.www)
        self.app.static("/link", link)
        self.assertEqual(request("GET", self.url + "/link/ten.txt").body, self.TEN)

    def test_names_that_windows_makes_something_else_of(self) -> None:
        names = re.compile(f"(?s:{webchannels._NOT_ON_WINDOWS})")
        with mock.patch.object(webchannels, "_NO_NAME", names):
            for name in ("con.txt", "CON", "nul", "Aux.tar.gz", "com1", "LPT9.txt", "com\u00b9.js",
                         "con .txt", "conin$", "a:b", "c:", "index.html.", "index.html ",
                         "ten.txt::$DATA", "ten.t?t", "*"):
                if os.name != "nt":
                    (self.www / name).write_text("it is there")
                path = "/%" + name.encode().hex("-").replace("-", "%")
                self.assertEqual(request("GET", self.url + path).status, 404, name)
            for path in "/", "/ten.txt", "/a%20b/%C3%A9.txt", "/sub/":
                self.assertEqual(request("GET", self.url + path).status, 200, path)
        reply = request("GET", self.url + "/con.txt")
        self.assertEqual(reply.status, 404 if os.name == "nt" else 200)

    def test_what_is_no_file_is_not_waited_for(self) -> None:
        if not hasattr(os, "mkfifo"):
            self.skipTest("needs FIFOs")
        os.mkfifo(self.www / "fifo")
        self.app.route("/null", lambda: Path("/dev/null"))
        for path in "/fifo", "/null", "/folder", "/gone", "/zero":
            self.assertEqual(request("GET", self.url + path).status, 404, path)

    def test_a_file_of_the_program_that_is_not_there_is_told(self) -> None:
        logging.getLogger("webchannels").level = logging.NOTSET
        with self.assertLogs("webchannels", "WARNING") as logs:
            for path in "/nope", "/gone":
                self.assertEqual(request("GET", self.url + path).status, 404)
        self.assertEqual(len(logs.output), 1)
        self.assertIn(str(self.www / "gone.txt"), logs.output[0])

    def test_a_folders_path_gets_a_slash(self) -> None:
        for path, place in (("/sub", "./sub/"), ("/sub?a=//b", "./sub/?a=//b"),
                            ("/files/deep", "./deep/"), ("/%73ub", "./%73ub/")):
            for method in "GET", "HEAD":
                reply = request(method, self.url + path)
                self.assertEqual((reply.status, reply.headers["location"]), (302, place))
        (self.www / "evil.example").mkdir()
        for path in "//evil.example", "/%2fevil.example", "/\\evil.example", "/%5cevil.example":
            self.assertEqual(request("GET", self.url + path).status, 404, path)

    def test_types(self) -> None:
        for name, kind in {
                "a.html": "text/html; charset=utf-8", "a.css": "text/css; charset=utf-8",
                "a.js": "text/javascript; charset=utf-8", "a.txt": "text/plain; charset=utf-8",
                "A.WOFF2": "font/woff2", "a.json": "application/json",
                "a.csv": "text/csv; charset=utf-8", "a.svg": "image/svg+xml", "a.png": "image/png",
                "a.webp": "image/webp", "a.avif": "image/avif", "a.woff2": "font/woff2",
                "a.wasm": "application/wasm", "a.mp4": "video/mp4", "a.webm": "video/webm",
                "a.map": "application/json", "a.ico": "image/x-icon",
                "a.tar.gz": "application/gzip", "a.tgz": "application/gzip",
                "a.bz2": "application/octet-stream",
                "a": "application/octet-stream", "a.odd": "application/octet-stream",
                "html": "application/octet-stream",
                "a.pdf": "application/pdf", "a.jpg": "image/jpeg", "a.md": "text/markdown; "
                "charset=utf-8", "a.wav": "audio/wav"}.items():
            with self.subTest(name):
                (self.www / name).write_bytes(b"x")
                self.app.route("/typed", functools.partial(self.www.joinpath, name))
                reply = request("GET", self.url + "/typed")
                self.assertEqual(reply.headers["content-type"], kind)
                self.assertEqual(reply.headers["x-content-type-options"], "nosniff")
                self.assertNotIn("content-encoding", reply.headers)

    def test_what_handlers_return(self) -> None:
        reply = request("GET", self.url + "/path")
        self.assertEqual((reply.status, reply.body), (200, self.TEN))
        self.assertEqual(reply.headers["cache-control"], "no-cache")
        reply = request("GET", self.url + "/download")
        self.assertEqual((reply.headers["content-disposition"], reply.headers["cache-control"],
                          reply.headers["etag"], reply.headers["content-type"]),
                         ("attachment", "max-age=5", '"Mine"', "text/x"))
        self.app.route("/weak", lambda: Response(
            self.www / "ten.txt", headers={"ETag": 'W/"Mine"'}))
        for name, status in ("If-Match", 412), ("If-None-Match", 304), ("If-Range", 200):
            reply = request("GET", self.url + "/weak", {name: 'W/"Mine"', "Range": "bytes=1-2"})
            self.assertEqual(reply.status, status)
        for tag, status in ('"Mine"', 304), ('"mine"', 200), ('W/"Mine"', 304):
            reply = request("GET", self.url + "/download", {"If-None-Match": tag})
            self.assertEqual(reply.status, status)
        for path, method, status in ("/page-404", "GET", 404), ("/posted", "POST", 200):
            reply = request(method, self.url + path, {
                "If-None-Match": "*", "If-Match": '"x"', "Range": "bytes=1-2"})
            self.assertEqual((reply.status, reply.body), (status, self.TEN))

    def test_head(self) -> None:
        with Connection(self.url) as connection:
            connection.send_raw(b"HEAD /ten.txt HTTP/1.1\r\nHost: localhost\r\n"
                                b"Range: bytes=1-2\r\n\r\n")
            reply = connection.response("HEAD")
            self.assertEqual((reply.status, reply.headers["content-length"]), (200, "10"))
            self.assertEqual(reply.headers["accept-ranges"], "bytes")
            self.ask(connection, "/ten.txt")
            whole = connection.response()
        self.assertEqual({**reply.headers, "date": ""}, {**whole.headers, "date": ""})

    def test_conditions(self) -> None:
        """RFC 9110, 13.2.2, in its order."""
        path = self.www / "ten.txt"
        os.utime(path, (1_000_000_000, 1_000_000_000))
        reply = request("GET", self.url + "/ten.txt")
        tag, then = reply.headers["etag"], "Sun, 09 Sep 2001 01:46:40 GMT"
        self.assertRegex(tag, '^"[^"]+"$')
        self.assertEqual(reply.headers["last-modified"], then)
        before, after = then.replace("40 GMT", "39 GMT"), then.replace("40 GMT", "41 GMT")
        for fields, status in (
                ({"If-None-Match": tag}, 304), ({"If-None-Match": f"W/{tag}"}, 304),
                ({"If-None-Match": f'"a,b", W/"c",{tag}'}, 304), ({"If-None-Match": "*"}, 304),
                ({"If-None-Match": '"x"'}, 200), ({"If-None-Match": tag[1:-1]}, 200),
                ({"If-None-Match": '"x"', "If-Modified-Since": then}, 200),
                ({"If-None-Match": tag, "If-Modified-Since": before}, 304),
                ({"If-Modified-Since": then}, 304), ({"If-Modified-Since": after}, 304),
                ({"If-Modified-Since": before}, 200), ({"If-Modified-Since": "yesterday"}, 200),
                ({"If-Modified-Since": "Sunday, 09-Sep-01 01:46:40 GMT"}, 304),
                ({"If-Modified-Since": "Sun Sep  9 01:46:40 2001"}, 304),
                ({"If-Modified-Since": "Sun Sep  9 01:46:39 2001"}, 200),
                ({"If-Modified-Since": "Sun, 99 Foo 99999999999 99:99:99 GMT"}, 200),
                ({"If-Match": tag}, 200), ({"If-Match": "*"}, 200), ({"If-Match": f"W/{tag}"}, 412),
                ({"If-Match": f'"x", {tag}'}, 200), ({"If-Match": '"x"'}, 412),
                ({"If-Match": tag, "If-Unmodified-Since": before}, 200),
                ({"If-Match": '"x"', "If-None-Match": tag}, 412),
                ({"If-Match": tag, "If-None-Match": tag}, 304),
                ({"If-Unmodified-Since": then}, 200), ({"If-Unmodified-Since": before}, 412),
                ({"If-Unmodified-Since": "x"}, 200),
                ({"If-Unmodified-Since": before, "If-None-Match": tag}, 412),
                ({"Range": "bytes=1-2", "If-None-Match": tag}, 304),
                ({"Range": "bytes=99-", "If-None-Match": tag}, 304),
                ({"Range": "bytes=99-", "If-Match": '"x"'}, 412),
                ({"Range": "bytes=1-2", "If-Match": tag}, 206),
                ({"Range": "bytes=1-2", "If-Range": tag}, 206),
                ({"Range": "bytes=1-2", "If-Range": f"W/{tag}"}, 200),
                ({"Range": "bytes=1-2", "If-Range": '"x"'}, 200),
                ({"Range": "bytes=99-", "If-Range": '"x"'}, 200),
                ({"Range": "bytes=1-2", "If-Range": before}, 200),
                ({"If-Range": '"x"'}, 200)):
            for method in "GET", "HEAD":
                with self.subTest(fields, method=method):
                    reply = request(method, self.url + "/ten.txt", fields)
                    expected = 200 if (method, status) == ("HEAD", 206) else status
                    self.assertEqual(reply.status, expected)
                    if status != 412:
                        self.assertEqual(reply.headers["etag"], tag)
                    if status == 200 and method == "GET":
                        self.assertEqual(reply.body, self.TEN)
        path.write_bytes(self.TEN[::-1])  # of the same size
        reply = request("GET", self.url + "/ten.txt", {"If-None-Match": tag})
        self.assertEqual((reply.status, reply.body), (200, self.TEN[::-1]))
        for odd in -5, 2 ** 33:  # Last-Modified is no date that is still to come (8.8.2.1)
            os.utime(path, (odd, odd))
            reply = request("GET", self.url + "/ten.txt")
            told = email.utils.parsedate_to_datetime(reply.headers["last-modified"])
            self.assertLessEqual(told, email.utils.parsedate_to_datetime(reply.headers["date"]))

    def test_ranges(self) -> None:
        for asked, start, stop in (
                ("bytes=0-0", 0, 1), ("bytes=1-3", 1, 4), ("bytes=5-", 5, 10), ("bytes=0-", 0, 10),
                ("bytes=9-", 9, 10), ("bytes=-3", 7, 10), ("bytes=-99", 0, 10),
                ("BYTES= 2-3 ", 2, 4), ("bytes=2-99999999999999999999999", 2, 10)):
            reply = request("GET", self.url + "/ten.txt", {"Range": asked})
            self.assertEqual((reply.status, reply.body), (206, self.TEN[start:stop]), asked)
            self.assertEqual(reply.headers["content-range"], f"bytes {start}-{stop - 1}/10")
        for asked in ("bytes=10-", "bytes=99-100", "bytes=-0", "bytes=9999999999999999999999-"):
            reply = request("GET", self.url + "/ten.txt", {"Range": asked})
            self.assertEqual((reply.status, reply.headers["content-range"]), (416, "bytes */10"))
        for asked in ("bytes=0-0,-1", "bytes=0-1, 3-4", "bytes=3-1", "bytes=-", "bytes=a-b",
                      "bytes=", "lines=1-2", "bytes 1-2", "bytes=--1", "bytes=+1-2", "bytes=1-2-3",
                      "1-2", "bytes=\xb2-3", "bytes=" + "9" * 1500 + "-", "bytes=1-2,"):
            reply = request("GET", self.url + "/ten.txt", {"Range": asked})
            self.assertEqual((reply.status, reply.body), (200, self.TEN), asked)
        for asked in ("bytes=0-", "bytes=-5", "bytes=0-0"):
            reply = request("GET", self.url + "/empty", {"Range": asked})
            self.assertEqual((reply.status, reply.body), (200, b""), asked)

    def test_a_large_file_takes_little_memory(self) -> None:
        path = self.big()
        data, room = path.read_bytes(), bytearray(1 << 20)
        with Connection(self.url) as connection:
            self.ask(connection)  # once, for what is allocated only once
            self.assertEqual(connection.response().body, data)
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.begin(connection, fields="Range: bytes=1000000-\r\n")
            got = 0
            while got < len(data) - 1_000_000:
                got += connection.sock.recv_into(room)
            self.assertLess(tracemalloc.get_traced_memory()[1], 2 << 20)

    def test_a_file_that_becomes_shorter_is_cut(self) -> None:
        logging.getLogger("webchannels").level = logging.NOTSET
        path = self.big()
        with Connection(self.url) as connection, self.assertLogs("webchannels", "WARNING") as logs:
            self.begin(connection)
            os.truncate(path, 15_000_000)
            with self.assertRaises((EOFError, ConnectionError)):
                connection.response()
            self.until(lambda: logs.output)
        self.assertIn(str(path), logs.output[0])
        self.assertEqual(len(logs.output), 1)

    def test_a_connection_ends_once(self) -> None:
        """asyncio may be writing when it tells that there is room, and must not be closed then."""
        path = self.big()
        with no_logs("asyncio"):
            for fields in "", "Connection: close\r\n":
                for _ in range(2):
                    with Connection(self.url) as connection:
                        side = self.begin(connection, fields=fields)
                        if not fields:
                            os.truncate(path, side._unsent.tell())
                        with contextlib.suppress(EOFError, ConnectionError):
                            connection.response()
                            self.assertTrue(fields)
                        self.until(lambda: not self.app._http)
                    path = self.big()

    def test_a_file_that_vanishes_or_grows_is_sent_as_it_was(self) -> None:
        path = self.big()
        data = path.read_bytes()
        with Connection(self.url) as connection:
            self.begin(connection)
            with path.open("ab") as file:
                file.write(b"more")
            if os.name != "nt":
                path.unlink()
            self.assertEqual(connection.response().body, data)

    def test_a_file_is_open_only_while_it_is_sent(self) -> None:
        self.big()
        for leave in Connection.close, Connection.reset:
            connection = Connection(self.url)
            side = self.begin(connection)
            file = side._unsent
            self.assertFalse(file.closed)
            leave(connection)
            self.until(functools.partial(getattr, file, "closed"))
        with Connection(self.url) as connection:
            file = self.begin(connection)._unsent
            connection.response()
            self.until(lambda: file.closed)
            self.ask(connection, "/ten.txt")
            self.assertEqual(connection.response().body, self.TEN)

    def test_a_status_without_a_body_has_none(self) -> None:
        with Connection(self.url) as connection:
            for target, status in ("/none", 204), ("/same", 304), ("/ten.txt", 200):
                self.ask(connection, target)
                self.assertEqual(connection.response().status, status)

    def test_requests_behind_a_file_wait_for_it(self) -> None:
        data = self.big().read_bytes()
        with Connection(self.url) as connection:
            for target in "/big", "/ten.txt", "/big", "/nope":
                self.ask(connection, target)
            self.assertEqual(connection.response().body, data)
            self.assertEqual(connection.response().body, self.TEN)
            self.assertEqual(connection.response().body, data)
            self.assertEqual(connection.response().status, 404)

    def test_who_sends_no_more_gets_the_file(self) -> None:
        data = self.big().read_bytes()
        for fields in "", "Connection: close\r\n":
            with Connection(self.url) as connection:
                side = self.begin(connection, fields=fields)
                connection.sock.shutdown(socket.SHUT_WR)
                self.until(functools.partial(getattr, side, "_peer_done"))
                self.assertEqual(connection.response().body, data)
                self.assertEqual(connection.rest(), b"")

    def test_a_file_that_nobody_reads_is_given_up(self) -> None:
        self.big()
        self.app.config.handshake_timeout = 0.3
        with Connection(self.url) as connection, \
                mock.patch.object(webchannels, "_SLOWEST", 1 << 20):
            side = self.begin(connection)
            self.until(lambda: side._transport is None)
            self.assertTrue(side._unsent.closed)
            with self.assertRaises((EOFError, ConnectionError)):
                connection.response()

    def test_down_waits_for_a_file(self) -> None:
        data = self.big().read_bytes()
        for patience in 60, 0.1:
            self.app.down()
            self.app.config.shutdown_timeout = patience
            with serve(self.app) as self.url, Connection(self.url) as connection:
                side = self.begin(connection)
                file = side._unsent
                thread = threading.Thread(target=self.app.down)
                thread.start()
                self.until(lambda: not self.app.url or self.app._stopping)
                if patience == 60:
                    self.assertEqual(connection.response().body, data)
                    self.assertEqual(connection.rest(), b"")
                else:
                    with self.assertRaises((EOFError, ConnectionError)):
                        thread.join()
                        connection.response()
                thread.join()
                self.assertTrue(file.closed)

    def test_over_tls(self) -> None:
        data = self.big().read_bytes()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate(self.folder))
        self.app.down()
        with serve(self.app, ssl=context) as url, Connection(url) as connection:
            for target, body in (("/big", data), ("/ten.txt", self.TEN), ("/big", data)):
                self.ask(connection, target)
                self.assertEqual(connection.response().body, body)
            side = self.begin(connection)
            self.assertLess(side._transport.get_write_buffer_size(), 400_000)
            self.assertEqual(connection.response().body, data)
            with no_logs("asyncio"):  # it would warn of each piece that nobody gets any more
                for _ in range(20):
                    with Connection(url) as leaving:
                        self.ask(leaving)
                        leaving.sock.recv(1000)
                self.until(lambda: len(self.app._http) == 1)

    def test_folders_that_cannot_be(self) -> None:
        for prefix, folder, error in (
                ("/", self.folder / "nope", NotADirectoryError), ("files", self.www, ValueError),
                ("/", self.www / "ten.txt", NotADirectoryError), ("/:name", self.www, ValueError)):
            with self.assertRaises(error):
                self.app.static(prefix, folder)

    def test_channels_js_is_always_there(self) -> None:
        app = WebChannels()
        app.route("/:name", lambda name: name)
        with serve(app) as url:
            reply = request("GET", url + "/channels.js")
            self.assertEqual(reply.body, webchannels.CHANNELS_JS.encode())
            self.assertEqual(reply.headers["content-type"], "text/javascript; charset=utf-8")
            app.route("/channels.js", lambda: "mine")
            app.channels_support(src="/channels.js")
            self.assertEqual(request("GET", url + "/channels.js").body, b"mine")


class TimeLimitsTest(ServerTest):
    def configure(self, app: WebChannels) -> None:
        app.config.handshake_timeout = 0.3
        app.config.keep_alive_timeout = 0.4
        app.config.ping_interval = 0.3
        app.config.ping_timeout = 0.3
        app.config.disconnected_ttl = 0.2
        app.route("/", lambda: "index")
        app.route("/", lambda request: str(len(request.body)), method="POST")
        app.channel("/____/slow", self.slow)
        app.channel("/____/note", lambda: self.noted.set())
        self.noted = threading.Event()

    async def slow(self) -> str:
        await asyncio.sleep(1)
        return "slept"

    def test_slow_requests(self) -> None:
        begun = time.monotonic()
        for part in (b"G", b"GET / HT", b"GET / HTTP/1.1\r\nHost: local", b"POST / HTTP/1.1\r\n"
                     b"Host: localhost\r\nContent-Length: 10\r\n\r\nabc", b"POST / HTTP/1.1\r\n"
                     b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"):
            with self.subTest(part), Connection(self.url) as connection:
                connection.send_raw(part)
                self.assertEqual(connection.response().status, 408)
                self.assertEqual(connection.rest(), b"")
        self.assertGreater(time.monotonic() - begun, 1.4)

    def test_a_begun_request_has_the_time_of_a_request_not_of_an_idle_connection(self) -> None:
        self.app.config.keep_alive_timeout = 60
        whole, part = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HT"
        for before, then in ((b"", part), (whole, part), (whole + part, b"")):
            with self.subTest(before), Connection(self.url) as connection:
                connection.send_raw(before)
                if before:
                    self.assertEqual(connection.response().status, 200)
                connection.send_raw(then)
                self.assertEqual(connection.response().status, 408)

    def test_a_request_may_begin_late(self) -> None:
        self.app.config.keep_alive_timeout = 5
        with Connection(self.url) as connection:
            time.sleep(0.6)  # longer than a request may take
            for part in (b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n\r\n"):
                connection.send_raw(part)
                time.sleep(0.15)
            self.assertEqual(connection.response().status, 200)

    def test_a_large_upload_may_take_its_time(self) -> None:
        for head, chunk in ((b"Content-Length: 40960", b"%b"),
                            (b"Transfer-Encoding: chunked", b"2000\r\n%b\r\n")):
            with Connection(self.url) as connection:
                connection.send_raw(b"POST / HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
                for _ in range(5):
                    time.sleep(0.12)
                    connection.send_raw(chunk % bytes(8192))
                if b"chunked" in head:
                    connection.send_raw(b"0\r\n\r\n")
                self.assertEqual(connection.response().body, b"40960")

    def test_idle_connections_end_without_a_word(self) -> None:
        for data in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with Connection(self.url) as connection:
                connection.send_raw(data)
                if data:
                    connection.response()
                self.assertEqual(connection.rest(), b"")

    def test_answers_that_nobody_reads_are_given_up(self) -> None:
        """Whether they stop the connection's requests, or remain when it is over."""
        small = socket.create_server(("127.0.0.1", 0))
        small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        app = WebChannels(Config(handshake_timeout=0.3, max_clients=1))
        app.route("/", lambda: bytes(8192))
        ask = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        with small, serve(app, sock=small) as url:
            for last, count in ((ask, 50), (ask + b"Connection: close\r\n", 5)):
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
                    sock.connect((urlsplit(url).hostname, urlsplit(url).port))
                    sock.sendall((ask + b"\r\n") * (count - 1) + last + b"\r\n")
                    select.select([sock], [], [], 10)
                    self.until(lambda: request("GET", url).status == 200)  # it counts no more
                    got = b""
                    with contextlib.suppress(ConnectionError):
                        while part := sock.recv(65536):
                            got += part
                    self.assertTrue(0 < len(got) < count * 8192, len(got))

    def test_a_silent_client_is_pinged_then_dropped(self) -> None:
        client = self.connect(auto_reply=False)
        for _ in range(3):
            self.assertEqual(client.recv(), (PING, b""))
            client.send_frame(PONG)
        self.assertEqual(client.recv(), (PING, b""))
        with self.assertRaises((EOFError, ConnectionError)):
            client.recv()
        self.until(lambda: not self.app.connected_clients())

    def test_a_frame_must_be_finished(self) -> None:
        client = self.connect()
        client.send_json({"channel": "____", "message": "slow"})
        for _ in range(2):  # more than is read while a handler is busy
            client.send_frame(BINARY, bytes(500_000))
        self.assertEqual([client.recv_text() for _ in range(3)],
                         ["slept", *[NO_HANDLER + "/"] * 2])
        client.send_raw(frame(BINARY, b"abc", length=50))
        for _ in range(4):
            time.sleep(0.1)
            client.send_raw(b"x")
        self.assertEqual(client.recv_close(), (1013, "message not finished in time"))

    def test_a_silent_client_is_dropped_though_its_handler_is_busy(self) -> None:
        async def wait() -> None:
            await asyncio.sleep(60)

        self.app.channel("/____/wait", wait)
        self.app.config.shutdown_timeout = 0.2
        client = self.connect(auto_reply=False)
        client.send_json({"channel": "____", "message": "wait"})
        self.assertEqual(client.recv(), (PING, b""))
        with self.assertRaises((EOFError, ConnectionError)):
            client.recv()

    def test_who_is_refused_and_stays_is_cut(self) -> None:
        self.app.config.keep_alive_timeout = self.app.config.handshake_timeout = 60
        self.app.config.max_clients = 1
        with Connection(self.url) as connection:
            connection.send_raw(b"nonsense\r\n\r\n")
            self.assertEqual(connection.response().status, 400)
            self.assertEqual(connection.rest(), b"")
            self.assertEqual(request("GET", self.url).status, 503)  # it is still there
            self.until(lambda: request("GET", self.url).status == 200)

    def test_who_is_always_in_the_middle_of_a_frame_may_stay(self) -> None:
        self.app.config.handshake_timeout = 0.6
        client = self.connect()
        whole, count = frame(TEXT, b'{"channel":"____","message":"echo","payload":"x"}'), 8
        client.send_raw(whole[:9])
        for _ in range(count):  # twice the time that one frame has
            time.sleep(0.15)
            client.send_raw(whole[9:] + whole[:9])
        self.assertEqual([client.recv_text() for _ in range(count)], ["x"] * count)
        client.send_raw(whole[9:])
        self.assertEqual(client.recv_text(), "x")

    def test_who_waits_for_long_is_given_signs_of_life(self) -> None:
        """A page cannot see pongs, and what it asks with may wait behind what is not read."""
        waiting: list[asyncio.Event] = []

        async def wait() -> str:
            waiting.append(asyncio.Event())
            await waiting[0].wait()
            return "waited"

        self.app.channel("/____/wait", wait)
        client = self.connect(subprotocol="webchannels.v1")
        client.send_raw(frame(TEXT, b'{"channel":"____","message":"nothing"}')[:20])
        self.assertEqual(client.recv_text(), "")
        client.send_raw(frame(TEXT, b'{"channel":"____","message":"nothing"}')[20:])
        client.send_json({"channel": "____", "message": "wait", "ref": 1})
        for size in (1, 500_000):  # more than is read while a handler is busy
            client.send_frame(BINARY, bytes(size))
        said: list[str] = []
        while said.count("") < 4:
            said.append(client.recv_text())
        loop: Any = self.app._loop
        loop.call_soon_threadsafe(waiting[0].set)
        while said[-1] != '{"ref":1,"payload":"waited"}':
            said.append(client.recv_text())

    def test_a_close_that_is_not_answered(self) -> None:
        client = self.connect(auto_reply=False)
        self.app.config.ping_interval = 0
        self.app.connected_clients()[0].close(3000, "bye")
        with self.assertRaises(Closed) as closed:
            client.recv()
        self.assertEqual((closed.exception.code, closed.exception.reason), (3000, "bye"))
        self.assertEqual(client.rest(5), b"")

    def test_a_half_closed_peer_is_not_answered_for_ever(self) -> None:
        self.app.config.ping_interval = 0
        self.app.config.abandoned_timeout = 0.1
        client = self.connect()
        client.send_json({"channel": "____", "message": "slow"})
        client.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(client.rest(5), b"")

    def test_a_busy_client_is_not_silent(self) -> None:
        client = self.connect(subprotocol="webchannels.v1", auto_reply=False)
        client.send_json({"channel": "____", "message": "slow", "ref": 1})
        for size in (1, 500_000):  # more than is read while a handler is busy
            client.send_frame(BINARY, bytes(size))
        opcode, data = client.recv()
        while opcode == PING or not data:  # no answer to these
            opcode, data = client.recv()
        self.assertEqual(json.loads(data), {"ref": 1, "payload": "slept"})

    def test_a_client_that_left_is_not_dropped_while_its_handler_runs(self) -> None:
        client = self.connect()
        with no_logs("webchannels"):
            client.send_json({"channel": "____", "message": "slow"})
            client.send_json({"channel": "____", "message": "note"})
            client.send_frame(PING, b"there?")
            self.assertEqual(client.recv(), (PONG, b"there?"))  # what was sent before is there, too
            client.reset()
            self.assertTrue(self.noted.wait(10))

    def test_those_that_left_are_forgotten(self) -> None:
        self.connect().close()
        self.until(lambda: len(self.app.disconnected_clients()) == 1)
        self.until(lambda: not self.app.disconnected_clients())


class BoundsTest(ServerTest):
    """What one peer can hold: memory, places, the others' time."""

    def configure(self, app: WebChannels) -> None:
        app.config.handshake_timeout = 0.3
        app.config.abandoned_timeout = 0.1
        app.config.ping_interval = app.config.ping_timeout = 0.3
        app.route("/", lambda: "index")
        app.route("/", lambda request: str(len(request.body)), method="POST")
        app.route("/wait", self.wait)
        app.channel("/____/wait", self.wait)
        app.channel("/____/echo", lambda payload: payload)
        self.begun, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)

    async def wait(self) -> None:
        self.begun.release()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.cancelled.release()

    def held(self, action: Callable[[], Any]) -> tuple[int, int]:
        """What more is allocated after `action`, and at its peak, in bytes."""
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            action()
            gc.collect()
            after, peak = tracemalloc.get_traced_memory()
            return after - before, peak - before
        finally:
            tracemalloc.stop()

    def test_nothing_holds_who_left_long_ago(self) -> None:
        self.app.config.disconnected_ttl = 0.1
        client = self.subscribed()
        there = weakref.ref(self.app.connected_clients()[0])
        client.close()
        self.until(lambda: (gc.collect(), there())[1] is None)

    def test_requests_that_wait_are_not_read(self) -> None:
        """Neither while one is answered, nor while the answers are many."""
        ask = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 8000 + b"\r\n\r\n"
        count, room = 2000, bytearray(65536)
        with Connection(self.url) as connection:
            def send() -> None:
                for _ in range(count):
                    connection.sock.sendall(ask)
                connection.sock.shutdown(socket.SHUT_WR)

            def flood() -> None:
                sender = threading.Thread(target=send)
                sender.start()
                answers = 0
                while got := connection.sock.recv_into(room):
                    answers += room[:got].count(b"HTTP/1.1 200")
                sender.join()
                self.assertGreater(answers, count * 0.99)  # some are cut by the pieces they come in

            _, peak = self.held(flood)
        self.assertLess(peak, 2 << 20)
        with Connection(self.url) as connection:
            connection.send_raw(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(self.begun.acquire(timeout=10))

            def push() -> None:
                connection.sock.settimeout(0.1)
                with contextlib.suppress(OSError):
                    for _ in range(count):
                        connection.sock.sendall(ask)

            _, peak = self.held(push)
        self.assertLess(peak, 2 << 20)

    def test_an_idle_connection_has_let_go_of_its_request(self) -> None:
        with Connection(self.url) as connection:
            def post() -> None:
                connection.send_raw(b"POST / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 15_000
                                    + b"\r\nContent-Length: 900000\r\n\r\n" + bytes(900_000))
                self.assertEqual(connection.response().body, b"900000")
                request("GET", self.url)  # by now the server has done with that

            post()
            after, _ = self.held(post)
        self.assertLess(after, 20_000)

    def test_an_unfinished_message_ends_though_pings_are_answered(self) -> None:
        client = self.connect()
        client.send_frame(TEXT, b"x" * 2000, fin=False)
        for _ in range(3):
            client.send_frame(PING, b"x" * 100)
        self.assertEqual(client.recv_close(), (1013, "message not finished in time"))

    def test_a_deflated_frame_that_declares_much(self) -> None:
        client = self.connect(deflate=True)
        client.send_raw(frame(BINARY, length=1 << 62, rsv=4))
        self.assertEqual(client.recv_close()[0], 1009)

    def test_who_has_left_holds_next_to_nothing(self) -> None:
        text = "\U0001f600" + "a" * 900_000
        deflated = packed(text.encode())

        def visit() -> None:
            client = WebSocketClient(self.url, deflate=True, headers={"X": "x" * 15_000})
            client.send_frame(TEXT, deflated, rsv=4, fin=False)
            client.send_frame(PING)
            self.assertEqual(client.recv()[0], PONG)
            client.reset()
            self.until(lambda: not self.app.connected_clients())

        def visits() -> None:
            for _ in range(10):
                visit()
            self.until(lambda: not any(one.request.headers
                                       for one in self.app.disconnected_clients()))

        self.app.config.max_inflation = 2000
        visit()
        after, _ = self.held(visits)
        self.assertEqual(len(self.app.disconnected_clients()), 11)
        self.assertLess(after, 10 * 4096)

    def test_text_that_waits_is_held_as_bytes(self) -> None:
        """As str, each character could take four. Behind a handler, and behind its message."""
        self.app.config.max_inflation = 2000
        call = frame(TEXT, json.dumps({"channel": "____", "message": "wait"}).encode())
        large = frame(TEXT, packed(("\U0001f600" + "a" * 900_000).encode()), rsv=4)

        def wait(first: bytes, then: bytes) -> None:
            client.send_raw(first)
            self.assertTrue(self.begun.acquire(timeout=10))
            client.send_raw(then)
            self.until(lambda: any(one._pending for one in self.app.connected_clients()))

        for parts in (call, large), (call + large, b""):
            client = self.connect(deflate=True)
            after, _ = self.held(functools.partial(wait, *parts))
            self.assertGreater(after, 900_000)
            self.assertLess(after, 1_000_000)
            client.close()
            self.until(lambda: not self.app.connected_clients())

    def test_what_waits_counts_as_it_is_held(self) -> None:
        """Inflated: of bytes, 64 KiB could be 60 MiB."""
        for opcode, size in (BINARY, 1_000_000), (TEXT, 66_000):
            client = self.connect(deflate=True)
            client.send_json({"channel": "____", "message": "wait"})
            self.assertTrue(self.begun.acquire(timeout=10))
            client.send_raw(frame(opcode, packed(bytes(size)), rsv=4))
            self.until(lambda: any(one._pending and not one._reading
                                   for one in self.app.connected_clients()))
            client.close()
            self.until(lambda: not self.app.connected_clients())

    def test_the_channels_of_who_has_left(self) -> None:
        @self.app.channel("/rooms/:room/subscribe")
        def enter(client: ChannelClient, channel: str) -> None:
            self.app.subscribe(client, channel)
        few, many = self.connect(), self.connect()
        for client, count in (few, 3), (many, 100):
            for number in range(count):
                client.send_json({"channel": f"rooms/{number:050d}", "message": "subscribe"})
            client.send_json({"channel": "____", "message": "echo", "payload": "done"})
            self.assertEqual(client.recv_text(), "done")
            client.close()
        self.until(lambda: len(self.app.disconnected_clients()) == 2)
        self.until(lambda: sum(len("".join(one.channels))
                               for one in self.app.disconnected_clients()) < 3000)
        self.assertEqual(sorted(len(one.channels) for one in self.app.disconnected_clients())[0], 3)

    def test_what_fails_in_its_turn_leaves_the_others_theirs(self) -> None:
        work, failing = webchannels.ChannelClient._work, [True]

        def fail_once(client: ChannelClient, my_turn: bool = False, data: bytes = b"") -> None:
            client._app._stand_still()  # so what is large must wait in line
            if my_turn and failing:
                raise OSError(failing.pop())
            work(client, my_turn, data)

        self.app.config.ping_interval = 0
        message = {"channel": "____", "message": "echo", "payload": "x" * 10_000}
        first, second = self.connect(), self.connect()
        with mock.patch.object(webchannels.ChannelClient, "_work", fail_once), \
                self.assertLogs("asyncio", "ERROR"):
            first.send_json(message)
            self.until(lambda: not failing)
            second.send_json(message)
            self.assertEqual(len(second.recv_text()), 10_000)

    def test_a_loss_that_is_told_late_is_the_clients(self) -> None:
        """TLS tells it to the protocol of a turn ago, which has become a client meanwhile."""
        connections: list[Any] = []
        self.app.config.ping_interval = 0
        self.app.on_connect(lambda: connections.extend(self.app._http))
        self.connect()
        self.until(self.app.connected_clients)
        writer, loop = self.app.connected_clients()[0]._writer, self.app._loop
        assert writer and loop
        loop.call_soon_threadsafe(connections[0].connection_lost, None)
        self.until(lambda: not self.app.connected_clients() and not self.app._sockets)
        loop.call_soon_threadsafe(writer.close)  # here, nothing was lost

    def test_a_transport_that_cannot_read_any_more_is_no_error(self) -> None:
        """So it is with TLS before Python 3.11, when the socket is lost and it is not yet told."""
        transport = mock.Mock(resume_reading=mock.Mock(side_effect=AttributeError))
        connection = webchannels.Connection(self.app)
        connection._transport, connection._reading = transport, False
        connection._read(True)
        transport.resume_reading.assert_called_once_with()

    def test_half_a_tls_handshake_counts(self) -> None:
        app = WebChannels(Config(max_clients=2, handshake_timeout=60))
        app.route("/", lambda: "index")
        with tempfile.TemporaryDirectory() as folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(Path(folder)))
        with serve(app, ssl=context) as url:
            address = ("127.0.0.1", app.port)
            with socket.create_connection(address), socket.create_connection(address) as second:
                with self.assertRaises(OSError):
                    request("GET", url)
                second.close()

                def served() -> bool:
                    with contextlib.suppress(OSError):
                        return request("GET", url).body == b"index"
                    return False

                self.until(served)

    def test_an_answer_must_be_read(self) -> None:
        self.app.route("/large", lambda: bytes(30_000_000))
        self.app.config.max_clients = 1
        with Connection(self.url) as connection, \
                mock.patch.object(webchannels, "_SLOWEST", 1 << 20):
            connection.send_raw(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            select.select([connection.sock], [], [], 10)
            self.until(lambda: request("GET", self.url).status == 200)

    def test_a_long_answer_leaves_in_pieces(self) -> None:
        data = os.urandom(3_000_001)
        self.app.route("/large", lambda: data)
        for _ in range(2):
            self.assertEqual(request("GET", f"{self.url}/large").body, data)
        with Connection(self.url) as connection:
            for _ in range(2):
                connection.send_raw(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
            self.assertEqual([connection.response().body == data for _ in range(4)], [True] * 4)

    def test_handlers_whose_client_has_left_are_cancelled(self) -> None:
        self.app.config.max_clients = 1
        with Connection(self.url) as connection:
            connection.send_raw(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(self.begun.acquire(timeout=10))
        with no_logs("asyncio"):
            self.assertTrue(self.cancelled.acquire(timeout=10))
            for leave in (WebSocketClient.close, WebSocketClient.reset, WebSocketClient.send_close):
                client: Any = self.until(self.came)
                client.send_json({"channel": "____", "message": "wait"})
                self.assertTrue(self.begun.acquire(timeout=10))
                leave(client)
                self.assertTrue(self.cancelled.acquire(timeout=10))
            client = self.until(self.came)  # reading has stopped, so its end is not seen
            client.send_json({"channel": "____", "message": "wait"})
            client.send_frame(BINARY, bytes(500_000))
            self.assertTrue(self.begun.acquire(timeout=10))
            client.close()
            self.assertTrue(self.cancelled.acquire(timeout=10))
            self.until(self.came)

    def test_over_tls_too_a_client_that_leaves_unread_is_missed(self) -> None:
        """From Python 3.11 on, TLS does not tell it while reading is paused, nor fails to write."""
        app = WebChannels(Config(abandoned_timeout=0.1, ping_interval=0.3, ping_timeout=0.3))
        app.channel("/____/wait", self.wait)
        with tempfile.TemporaryDirectory() as folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(Path(folder)))
        with serve(app, ssl=context) as url:
            with WebSocketClient(url) as client:
                client.send_json({"channel": "____", "message": "wait"})
                self.assertTrue(self.begun.acquire(timeout=10))
                for _ in range(10):
                    client.send_frame(BINARY, bytes(10_000))
                self.until(lambda: not any(one._reading for one in app.connected_clients()))
            self.assertTrue(self.cancelled.acquire(timeout=10))
            self.until(lambda: not app._sockets)

    def came(self) -> WebSocketClient | None:
        with contextlib.suppress(Refused, OSError):
            return self.connect()
        return None

    def test_what_is_large_stands_in_line(self) -> None:
        """One turn of the loop handles one large message, or one large body."""
        turns, turn, both = [], [0], threading.Barrier(2)

        def large() -> str:
            turns.append(turn[0])
            return "done"

        def tick() -> None:
            turn[0] += 1
            if len(turns) < 4:
                asyncio.get_running_loop().call_soon(tick)

        def block() -> None:
            both.wait(10)
            both.wait(10)
            tick()

        self.app.channel("/____/large", large)
        self.app.route("/large", large, method="POST")
        self.app.channel("/____/block", block)
        blocker, *clients = [self.connect() for _ in range(4)]
        message = {"channel": "____", "message": "large", "payload": "x" * 9000}
        with mock.patch.object(webchannels, "_TURN", 0), Connection(self.url) as connection:
            blocker.send_json({"channel": "____", "message": "block"})
            both.wait(10)  # the loop stands still, so all the others arrive in one turn
            for client in clients:
                client.send_json(message)
            connection.send_raw(b"POST /large HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000"
                                b"\r\n\r\n" + bytes(9000))
            both.wait(10)
            self.assertEqual([client.recv_text() for client in clients], ["done"] * 3)
            self.assertEqual(connection.response().body, b"done")
        self.assertEqual(len(set(turns)), 4, turns)

    def test_after_what_took_long_the_others_have_as_long(self) -> None:
        """Also if it did not stand in line."""
        both = threading.Barrier(2)
        times: list[float] = []

        def large() -> None:
            if not times:
                both.wait(10)
                both.wait(10)
            time.sleep(0.05)
            times.append(time.monotonic())

        self.app.channel("/____/large", large)
        first, second = self.connect(), self.connect()
        message = {"channel": "____", "message": "large", "payload": "x" * 9000}
        first.send_json(message)
        both.wait(10)  # the loop stands still
        second.send_json(message)
        both.wait(10)
        self.until(lambda: len(times) == 2)
        self.assertGreater(times[1] - times[0], 0.1)

    def test_what_stands_in_line_is_held_as_it_came(self) -> None:
        """Inflated, it could take 50 times as much, in each of all connections."""
        next_turns, both, held = WebChannels._next_turns, threading.Barrier(2), []

        def look(app: Any) -> None:
            held.extend([(one._reading, len(one._frames._rest)) for one in app._line
                         if not one._pending])
            next_turns(app)

        def block() -> None:
            both.wait(10)
            both.wait(10)

        self.app.channel("/____/block", block)
        self.app.config.max_inflation = 2000
        first, second = self.connect(), self.connect(deflate=True)
        message = {"channel": "____", "message": "echo",
                   "payload": base64.b64encode(os.urandom(15_000)).decode() + "a" * 500_000}
        with mock.patch.object(WebChannels, "_next_turns", look):
            first.send_json({**message, "message": "block"})
            both.wait(10)  # the loop stands still
            second.send_json(message)
            both.wait(10)
            self.assertEqual(second.recv_text(), message["payload"])
        self.assertEqual([reading for reading, _ in held], [False])
        self.assertLess(held[0][1], 25_000)

    def test_a_broadcast_is_not_deflated_for_each_window(self) -> None:
        clients = [self.subscribed(subprotocol=subprotocol,
                                   deflate=f"permessage-deflate; server_max_window_bits={bits}")
                   for bits in range(9, 16) for subprotocol in ("webchannels.v1",)]
        for bits in range(9, 16):
            clients.append(self.connect(
                deflate=f"permessage-deflate; server_max_window_bits={bits}"))
            clients[-1].send_json({"channel": "____", "message": "subscribe"})
            self.assertEqual(clients[-1].recv_text(), "Subscription: OK")
        text = "x" * 5000
        with mock.patch.object(zlib, "compressobj", wraps=zlib.compressobj) as deflate:
            self.app.broadcast("____", text)
            for client in clients:
                self.assertIn(text, client.recv_text())
            self.assertEqual(deflate.call_count, 4)
            self.app.broadcast("____", "text", text)
            for client in clients:
                self.assertEqual(client.recv_json()["payload"], text)
            self.assertEqual(deflate.call_count, 6)


class HandshakeTest(ServerTest):
    def configure(self, app: WebChannels) -> None:
        app.route("/", lambda: "page")
        app.config.websockets_path = "/socket"
        app.on_connect(self.come)
        self.came: list[Request] = []

    def come(self, client: ChannelClient, request: Request) -> bool | None:
        self.came.append(request)
        client.send("welcome")
        if "refuse" in request.query:
            raise HTTPError(int(request.query[-3:]), "Go away")
        if "fail" in request.query:
            raise RuntimeError("secret")
        return False if "false" in request.query else None

    HEAD = {"Host": "localhost", "Connection": "Upgrade", "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}

    def shake(self, line: str = "GET /socket HTTP/1.1", **changes: str | None) -> Reply:
        fields = {**self.HEAD, **{k.replace("_", "-"): v for k, v in changes.items()}}
        lines = [line, *(f"{k}: {v}" for k, v in fields.items() if v is not None), "", ""]
        return self.raw("\r\n".join(lines).encode())

    def test_the_handshake_point_by_point(self) -> None:
        reply = self.shake()
        self.assertEqual((reply.status, reply.headers["sec-websocket-accept"]),
                         (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="))  # the example of RFC 6455, 1.3
        self.assertNotIn("sec-websocket-protocol", reply.headers)
        for status, changes in (
                (101, {"Connection": "keep-alive, UPGRADE", "Upgrade": "h2c, WebSocket"}),
                (101, {"Sec_WebSocket_Protocol": "other, x"}),
                (400, {"Connection": "keep-alive"}), (400, {"Connection": None}),
                (426, {"Sec_WebSocket_Version": "8"}), (426, {"Sec_WebSocket_Version": "13, 8"}),
                (426, {"Sec_WebSocket_Version": None}), (400, {"Sec_WebSocket_Key": None}),
                (400, {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ"}),
                (400, {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25j"}),
                (400, {"Sec_WebSocket_Key": "!GhlIHNhbXBsZSBub25jZQ=="}),
                (400, {"Sec_WebSocket_Key": "a, b"}), (400, {"Host": None}),
                (400, {"Content_Length": "0", "Transfer_Encoding": "chunked"})):
            with self.subTest(changes):
                reply = self.shake("GET /socket HTTP/1.1", **changes)
                self.assertEqual(reply.status, status)
                if status == 426:
                    self.assertEqual(reply.headers["sec-websocket-version"], "13")
        for status, line in ((405, "POST /socket HTTP/1.1"), (400, "GET /socket HTTP/1.0"),
                             (404, "GET / HTTP/1.1"), (404, "GET /other HTTP/1.1")):
            self.assertEqual(self.shake(line).status, status, line)
        self.assertEqual(self.shake("GET / HTTP/1.1", Upgrade="h2c").body, b"page")
        reply = self.shake(Sec_WebSocket_Protocol="x, webchannels.v1")
        self.assertEqual(reply.headers["sec-websocket-protocol"], "webchannels.v1")
        self.app.config.websockets_server = False
        self.assertEqual(self.shake().status, 404)

    def test_bytes_right_behind_the_handshake(self) -> None:
        lines = ["GET /socket HTTP/1.1", *(f"{k}: {v}" for k, v in self.HEAD.items()), "", ""]
        message = json.dumps({"channel": "____", "message": "echo", "payload": "x" * 99}).encode()
        for extra in (100, 5000):
            with Connection(self.url) as connection:
                connection.send_raw("\r\n".join(lines).encode() + frame(TEXT, message) * extra)
                self.assertEqual(connection.response().status, 101)
                self.assertEqual(connection.take(9), b"\x81\x07welcome")
                for _ in range(extra):
                    self.assertEqual(connection.take(101), b"\x81c" + b"x" * 99)

    def test_on_connect(self) -> None:
        for status in (401, 403, 503):
            with self.assertRaises(Refused) as refused:
                self.connect_to(f"/socket?refuse={status}")
            self.assertEqual((refused.exception.reply.status, refused.exception.reply.body),
                             (status, b"Go away"))
        with self.assertLogs("webchannels", "WARNING") as logs, \
                self.assertRaises(Refused) as refused:
            self.connect_to("/socket?false")
        self.assertEqual(refused.exception.reply.status, 403)
        self.assertIn(" refused 127.0.0.1: 403 Forbidden", logs.output[0])
        with self.assertRaises(Refused) as refused:
            self.connect_to("/socket?fail")
        self.assertEqual(refused.exception.reply.status, 500)
        self.assertNotIn(b"secret", refused.exception.reply.body)
        client = self.connect_to("/socket?x=1")
        self.assertEqual(client.recv_text(), "welcome")
        self.assertEqual(self.app.connected_clients()[0].request.query, "x=1")
        self.assertEqual(len(self.app.connected_clients()), 1)

    def connect_to(self, path: str, **options: Any) -> WebSocketClient:
        client = WebSocketClient(self.url + path, **options)
        self.addCleanup(client.close)
        return client


class WhoMayComeInTest(ServerTest):
    def configure(self, app: WebChannels) -> None:
        app.route("/", lambda: "page")
        app.route("/", lambda: "posted", method="POST")

    def shake(self, origin: str | None, host: str = "localhost:8000") -> int:
        fields = {**HandshakeTest.HEAD, "Host": host}
        if origin is not None:
            fields["Origin"] = origin
        lines = ["GET / HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
        return self.raw("\r\n".join(lines).encode()).status

    def test_origins(self) -> None:
        same = "http://localhost:8000"
        good = [None, same, "HTTP://LOCALHOST:8000"]
        bad = ["null", "", "http://localhost", "https://localhost:8000", "http://localhost:80000",
               "http://localhost:8000.evil.example", "http://evil.example", "http://127.0.0.1:8000",
               "http://localhost:8000@evil.example", "http://xlocalhost:8000", "localhost:8000",
               "http://localhost:8000/", "file://", f"{same}, http://evil.example", "http://"]
        for origin in good + bad:
            with self.subTest(origin):
                self.assertEqual(self.shake(origin), 101 if origin in good else 403)
                fields = {"Host": "localhost:8000"} | ({} if origin is None else {"Origin": origin})
                self.assertEqual(request("POST", self.url, fields).status,
                                 200 if origin in good else 403)
                for method, status in ("GET", 200), ("HEAD", 200), ("OPTIONS", 204):
                    self.assertEqual(request(method, self.url, fields).status, status)
        self.assertEqual(self.shake("http://localhost", "localhost:80"), 101)
        self.app.config.allowed_origins = ["https://example.com", "http://example.com:8080"]
        for origin, status in (("https://example.com", 101), ("https://example.com:443", 101),
                               ("http://example.com:8080", 101), ("http://example.com", 403),
                               ("https://www.example.com", 403), ("https://example.com.evil", 403),
                               (same, 403), ("null", 403), (None, 101)):
            self.assertEqual(self.shake(origin), status, origin)
        self.app.config.allowed_origins = "*"
        self.assertEqual(self.shake("null"), 101)

    def test_hosts(self) -> None:
        def statuses(host: str) -> tuple[int, int]:
            return request("GET", self.url, {"Host": host}).status, self.shake(None, host)

        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:80",
                     "app.localhost", "[::1]"):
            self.assertEqual(statuses(host), (200, 101), host)
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example",
                     "xlocalhost",
                     "0.0.0.0", "192.168.0.1", "127.1", "2130706433", "[::ffff:10.0.0.1]",
                     "localhost.", "evil.example:127"):
            self.assertEqual(statuses(host), (403, 403), host)
        reply = request("GET", self.url, {"Host": "evil.example"})
        self.assertIn(b"config.allowed_hosts", reply.body)
        self.app.config.allowed_hosts = ["Example.com", "[::1]", "a.example:8080"]
        for host, status in (("example.com", 200), ("example.com:99", 200), ("[::1]:5", 200),
                             ("a.example:8080", 200), ("a.example", 403), ("localhost", 403),
                             ("xexample.com", 403), ("example.com.evil.example", 403)):
            self.assertEqual(statuses(host)[0], status, host)
        self.app.config.allowed_hosts = ["*"]
        self.assertEqual(statuses("any.example")[0], 200)

    def test_without_a_host_nobody_has_the_same_origin(self) -> None:
        for origin, status in ((b"", 200), (b"Origin: http://none\r\n", 403),
                               (b"Origin: http://None\r\n", 403),
                               (b"Origin: http://localhost\r\n", 403)):
            self.assertEqual(self.raw(b"POST / HTTP/1.0\r\n" + origin + b"\r\n").status, status)

    def test_handlers_of_on_connect_add_up(self) -> None:
        asked: list[str] = []

        def made(name: str) -> Callable[[], None]:
            def check() -> None:
                asked.append(name)
            return check

        def decorated(handler: Callable[[], None]) -> Callable[[], None]:
            return functools.wraps(handler)(lambda: handler())

        def defined(name: str, module: str = "one", qualname: str = "check") -> Callable[[], None]:
            check = made(name)
            check.__module__, check.__qualname__ = module, qualname
            return check

        class Methods(NamedTuple):
            name: str

            def check(self) -> None:
                asked.append(self.name)

        app = self.app
        for handler in (
                made("a"), made("b"), lambda: asked.append("c"), lambda: asked.append("d"),
                decorated(defined("e")), decorated(defined("f")), functools.partial(made("g")),
                defined("old"), defined("i", "two"), defined("j", "one", "Class.check"),
                Methods("k").check, Methods("l").check):
            with no_logs("webchannels"):
                app.on_connect(handler)
        with self.assertLogs("webchannels", "WARNING") as logs:
            app.on_connect(defined("h"))
        self.assertEqual(len(logs.output), 1)
        self.assertIn("check takes its own place", logs.output[0])
        self.connect()
        self.assertEqual("".join(asked), "abcdefghijkl")

    def test_a_second_on_connect_does_not_let_in_whom_the_first_refuses(self) -> None:
        def refuse() -> None:
            raise HTTPError(401)

        self.app.on_connect(functools.wraps(self.connect)(lambda **given: refuse()))
        self.app.on_connect(functools.wraps(self.connect)(lambda **given: None))
        with self.assertRaises(Refused) as refused:
            self.connect()
        self.assertEqual(refused.exception.reply.status, 401)

    def test_a_handler_that_opens_channels(self) -> None:
        app = self.app
        app.channel("/rooms/:room/subscribe", lambda: "guarded")
        app.route("/page/:name", lambda name: app.channels_support(name))
        app.channels_support("known")
        with no_logs("webchannels"):
            app.channels_support("later")
            for path in ("known", "____"):
                self.assertEqual(request("GET", f"{self.url}/page/{path}").status, 200)
        with self.assertLogs("webchannels", "WARNING") as logs:
            for number in range(5):
                request("GET", f"{self.url}/page/{number}")
        self.assertEqual(len(logs.output), 1)
        self.assertIn("a handler opened the channel '0'", logs.output[0])
        with mock.patch.object(webchannels, "_MAX_OPEN", len(app._open)):
            self.assertEqual(request("GET", self.url + "/page/more").status, 500)
            self.assertEqual(request("GET", self.url + "/page/1").status, 200)
            app.channels_support("rooms/any")  # it is guarded, and takes no place
        # What is decoded has no slash: it could be a channel that the guard does not know.
        self.assertEqual(request("GET", self.url + "/page/rooms%2Fa%2Fb").status, 404)

    def test_names_have_a_bound(self) -> None:
        app = self.app
        app.channel("/:name/subscribe",
                    lambda name, client, channel: app.subscribe(client, channel))
        client = self.connect()
        for size, answer in ((256, "true"), (257, BAD_MESSAGE),
                             (100_000, BAD_MESSAGE)):
            client.send_json({"channel": "x" * size, "message": "subscribe"})
            reply = client.recv_text()
            self.assertEqual(json.loads(reply)["payload"] if size == 256 else reply,
                             True if size == 256 else answer)
            client.send_json({"channel": "____", "message": "y" * size})
            self.assertEqual(client.recv_text(), f"{NO_HANDLER}/____/{'y' * 256}" if size == 256
                             else BAD_MESSAGE)
        self.assertEqual([*app.subscriptions()], ["x" * 256])
        with self.assertRaisesRegex(ValueError, "name has 1 to 256"):
            app.subscribe(app.connected_clients()[0], "x" * 257)

    def test_elsewhere_any_host_is_answered(self) -> None:
        app = WebChannels()
        app.route("/", lambda: "page")
        with serve(app, host="0.0.0.0") as url:
            self.assertTrue(url.startswith("http://localhost:"))
            self.assertEqual(request("GET", url, {"Host": "any.example"}).status, 200)

    def test_guarded_channels(self) -> None:
        app = self.app
        app.channels_support("open")

        def guard(client: ChannelClient, channel: str, room: str) -> str:
            if client.request.cookies.get("who") != room:
                raise ChannelError("Not for you")
            app.subscribe(client, channel)
            return "Welcome"

        app.channel("/rooms/:room/subscribe", guard)
        app.channels_support("rooms/bob")  # opens nothing that is guarded
        client = self.connect(headers={"Cookie": "who=bob"})

        def ask(channel: Any, message: Any = "subscribe") -> str:
            client.send_json({"channel": channel, "message": message})
            return client.recv_text()

        self.assertEqual(ask("rooms/bob"), "Welcome")
        self.assertEqual(ask("rooms/eve"), "Not for you")
        self.assertEqual(ask("open"), "Subscription: OK")
        for channel, message in (("nope", "subscribe"), ("rooms", "eve/subscribe"),
                                 ("rooms/eve/", "subscribe"), ("rooms//eve", "subscribe"),
                                 ("rooms/%65ve", "x"), ("", "subscribe"), ("/open", "subscribe")):
            self.assertRegex(ask(channel, message), "ERROR : 40[04]", (channel, message))
        self.assertEqual(set(app.subscriptions()), {"rooms/bob", "open"})
        for _ in range(2):
            self.assertEqual(ask("rooms/bob", "unsubscribe"), "Unsubscription: OK")
        self.assertEqual(set(app.subscriptions()), {"open"})

    def test_max_clients_and_subscriptions(self) -> None:
        self.app.config.max_clients = 2
        self.app.config.max_subscriptions = 1
        self.app.channels_support("other")
        first, second = self.subscribed(), self.connect()
        with self.assertRaises(Refused) as refused:
            self.connect()
        self.assertEqual(refused.exception.reply.status, 503)
        self.assertIn("retry-after", refused.exception.reply.headers)
        first.send_json({"channel": "other", "message": "subscribe", "ref": 2})
        self.assertEqual(first.recv_json(), {"ref": 2, "error": "Too many subscriptions"})
        second.close()
        self.until(lambda: len(self.app.connected_clients()) == 1)
        self.connect()


class LogTest(ServerTest):
    """What a peer can make the log say."""

    def configure(self, app: WebChannels) -> None:
        app.config.shutdown_timeout = 0.1

    def test_a_second_copy_of_the_file_filters_no_line_for_ever(self) -> None:
        spec: Any = importlib.util.spec_from_file_location("second_copy", webchannels.__file__)
        copy = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {"second_copy": copy}):
            spec.loader.exec_module(copy)
        for _ in range(2):
            copy.logger.warning("what each copy may say")
            webchannels.sparing.tell_counts()
        self.assertEqual(self.said(), ["WARNING what each copy may say"] * 2)

    EVIL = "a\r\nERROR:root:forged\x1b[2J\u2028\u202e\ud800"

    def setUp(self) -> None:
        super().setUp()
        logger = logging.getLogger("webchannels")
        logger.setLevel(logging.INFO)
        self.file = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")
        handler = logging.StreamHandler(self.file)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        self.enterContext_(mock.patch.object(logger, "propagate", False))
        self.complaints = self.enterContext_(mock.patch.object(sys, "stderr", io.StringIO()))

    def said(self) -> list[str]:
        """The lines of the log, which are harmless."""
        self.assertEqual(self.complaints.getvalue(), "")  # a record was lost
        self.file.seek(0)
        text = self.file.read()
        self.assertTrue(text.replace("\n", "").isprintable(), text)
        self.assertLess(max(map(len, text.split("\n"))), 700)
        return text.splitlines()

    def test_what_is_unknown_is_told_once_then_counted(self) -> None:
        client = self.subscribed()
        for number in range(50):
            client.send_json({"channel": "____", "message": self.EVIL + "x" * 100 * number})
            self.assertIn("404" if number < 3 else "400", client.recv_json()["error"])
        self.app.down()
        said = self.said()
        evil = r"/____/a\\r\\nERROR:root:forged\\x1b\[2J\\u2028\\u202e\\ud800"
        lines = [line for line in said if "ERROR : 40" in line]
        self.assertEqual(len(lines), 2, lines)
        self.assertRegex(lines[0], f"^INFO <ChannelClient .*{evil}: {NO_HANDLER}{evil}$")
        self.assertEqual(lines[1], f"INFO 49 more like this: {lines[0][5:]}")
        lines = [line for line in said if line.startswith("WARNING")]
        self.assertEqual(len(lines), 4, lines)
        self.assertRegex(lines[0], f"^WARNING Not found: no handler for the message {evil}$")
        self.assertTrue(lines[1].startswith("WARNING Bad message: "), lines)
        self.assertEqual(lines[2:], [f"WARNING {count} more like this: {line[8:]}"
                                     for count, line in ((2, lines[0]), (46, lines[1]))])

    def test_each_failure_is_told_once_then_counted(self) -> None:
        def one(payload: Any) -> None:
            raise ValueError(payload)

        def two(payload: Any) -> None:
            raise ValueError(payload)

        self.app.channel("/____/one", one)
        self.app.channel("/____/two", two)
        client = self.connect()
        for _ in range(20):
            for name in ("one", "two"):
                client.send_json({"channel": "____", "message": name,
                                  "payload": f"{self.EVIL}\n" * 100 + "x" * 5000})
                self.assertIn("500", client.recv_text())
        self.app.down()
        lines = self.said()
        for name in ("one", "two"):
            self.assertEqual(
                [line for line in lines if f"/{name} failed" in line],
                [f"ERROR the handler of /____/{name} failed",
                 f"ERROR 19 more like this: the handler of /____/{name} failed"])
        self.assertIn("  Traceback (most recent call last):", lines)
        self.assertFalse([line for line in lines if line[:6] not in ("ERROR ", "INFO <")
                          and line[:2] != "  "], lines)
        self.assertLess(len(lines), 250)

    def test_who_is_refused_is_told_again_after_a_while(self) -> None:
        self.app.config.handshake_timeout = 0.1  # how often the sweep looks
        with mock.patch.object(webchannels, "_TELL_AGAIN", 0.2):
            for number in range(1, 3):
                for _ in range(10):
                    self.assertEqual(self.raw(b"G@T / HTTP/1.1\r\n\r\n").status, 400)
                self.until(lambda number=number: "".join(  # type: ignore[misc]
                    self.said()).count("more like this") >= number)
        refused = [line for line in self.said() if "refused 127.0.0.1" in line]
        self.assertEqual(sum(int(line.split()[1]) if "more" in line else 1 for line in refused),
                         20)
        self.assertLess(len(refused), 10)


class MistakesTest(ServerTest):
    """The program's own: it is told what is wrong, and what to do."""

    def setUp(self) -> None:
        super().setUp()
        webchannels.sparing.tell_counts()  # what was told is told again

    @contextlib.contextmanager
    def told(self, *texts: str) -> Iterator[None]:
        """The log has these texts, in warnings, and no more."""
        with self.assertLogs("webchannels", "WARNING") as logs:
            yield
        self.assertEqual(len(logs.output), len(texts), logs.output)
        for line, text in zip(logs.output, texts):
            self.assertIn(text, line)

    def ask(self, message: str, channel: str = "____", **options: Any) -> Any:
        with WebSocketClient(self.url, subprotocol="webchannels.v1", **options) as client:
            client.send_json({"channel": channel, "message": message, "ref": 1})
            reply = client.recv_json()
            return reply.get("error", reply.get("payload"))

    def raises(self, kind: type[Exception], *texts: str) -> Any:
        return self.assertRaisesRegex(kind, "(?s)" + ".*".join(map(re.escape, texts)))

    def test_origins_that_are_none(self) -> None:
        for origin in "example.com", "https://example.com/", "*.example.com", "null":
            app = WebChannels()
            app.config.allowed_origins = origin
            with self.raises(ValueError, "'https://example.com', or '*'", repr(origin)):
                app.up(0, block=False)

    def test_hosts_that_are_none(self) -> None:
        for host in "https://example.com", "::1", "*.example.com", "":
            app = WebChannels()
            app.config.allowed_hosts = host
            with self.raises(ValueError, "'example.com', '[::1]', or '*'", repr(host)):
                app.up(0, block=False)

    def test_the_address_is_one_that_is_answered(self) -> None:
        for allowed, host in ((["*", "live.example"], "live.example"), (["*"], "localhost"),
                              (["a.example:8443"], "a.example"), (["[::1]"], "[::1]")):
            app = WebChannels()
            app.config.allowed_hosts = allowed
            with serve(app, host="0.0.0.0") as url:
                self.assertEqual(url, f"http://{host}:{app.port}")

    def test_fields_of_config(self) -> None:
        wrong: list[tuple[str, Any, type[Exception], str]] = [
            ("port", 9000, AttributeError, "config has no port: is it server_port"),
            ("allowed_origin", "*", AttributeError, "is it allowed_origins or allowed_hosts?"),
            ("x", 1, AttributeError, "is it server_host or server_port or websockets_server or "),
            ("server_port", "9000", TypeError, "config.server_port is int, not '9000'"),
            ("max_clients", None, TypeError, "config.max_clients is int, not None"),
            ("ping_interval", "1", TypeError, "config.ping_interval is float, not '1'"),
            ("compression", "no", TypeError, "config.compression is bool, not 'no'"),
            ("allowed_origins", 5, TypeError, "is str | Sequence[str] | None, not 5"),
            ("json_default", 5, TypeError, "is Callable[[Any], Any] | None, not 5"),
            ("redis_url", b"x", TypeError, "config.redis_url is str | None, not b'x'"),
            ("bus", "redis", TypeError, "config.bus is Bus | None, not 'redis'"),
            ("base_path", "live/", ValueError, "begins with a slash: '/live/'"),
            ("websockets_path", "ws", ValueError, "config.websockets_path begins with a slash")]
        for name, value, kind, text in wrong:
            with self.subTest(name), self.raises(kind, text):
                setattr(self.app.config, name, value)
            if kind is not AttributeError:
                with self.subTest(name), self.raises(kind, text):
                    Config(**{name: value})
        self.assertEqual(vars(self.app.config), vars(Config()))
        right: dict[str, Any] = {
            "ping_interval": 1, "allowed_hosts": ("a", "b"), "json_default": str, "bus": None,
            "base_path": "https://example.com/live", "websockets_path": "/ws"}
        self.assertEqual({**vars(Config()), **right}, vars(Config(**right)))

        for any_kind in "str", str:  # a field of the program's own
            more: Any = dataclasses.make_dataclass(
                "More", [("title", any_kind, "")], bases=(Config,))
            self.assertEqual(more(title="x").title, "x")

    def test_one_origin_or_host_is_a_list_of_it(self) -> None:
        config, origin = self.app.config, "http://a.example"
        for value in origin, "*", ["*"]:
            config.allowed_origins, config.allowed_hosts = value, "localhost"
            with WebSocketClient(self.url, origin=origin, headers={"Host": "localhost"}):
                pass
        config.allowed_hosts = "local"  # which is not "localhost", nor any of its letters
        with self.assertRaises(Refused):
            self.connect(headers={"Host": "l"})

    def test_what_has_no_handler(self) -> None:
        text = "Not found: no handler for the message /____/ecko"
        with self.told(text):
            for _ in range(3):
                self.assertEqual(self.ask("ecko"), f"ERROR : 404 - {text}")
        text = "Not found: call channels_support('room'), or guard it"
        with self.told(text):
            self.assertEqual(self.ask("subscribe", "room"), f"ERROR : 404 - {text}")
        text = "Not found: no handler for the route /nope"
        with self.told(text):
            request("GET", self.url + "/favicon.ico")  # which a browser asks for, not the program
            self.assertEqual(request("GET", self.url + "/nope").body.decode(), text)

    def test_a_websocket_that_does_not_get_here(self) -> None:
        self.app.config.websockets_path = "/ws"
        cases: list[tuple[str, dict[str, str], int, str]] = [
            ("/", {}, 404, "No WebSocket at /, but at config.websockets_path"),
            ("/ws", {"Origin": "http://a.example"}, 403,
             "Origin 'http://a.example' is not in config.allowed_origins"),
            ("/ws", {"Host": "a.example"}, 403, "Host 'a.example' is not in config.allowed_hosts"),
            ("/ws", {"Upgrade": "", "Connection": "close"}, 400, "does a proxy hand on both?")]
        for path, fields, status, text in cases:
            with self.subTest(text), self.told(text):
                head = {**HandshakeTest.HEAD, "Host": "localhost", **fields}
                reply = request("GET", self.url + path, {k: v for k, v in head.items() if v})
                self.assertEqual(reply.status, status)
                self.assertIn(text, reply.body.decode())

    def test_a_guard_that_does_not_subscribe(self) -> None:
        app = self.app
        app.channel("/room/:name/subscribe", lambda name, client, channel:
                    app.subscribe(client, channel) if name == "good" else None)

        @app.channel("/late/subscribe")
        async def late() -> None: ...
        text = "/room/bad/subscribe did not call subscribe(client, channel)"
        with self.told(text):
            self.assertEqual(self.ask("subscribe", "room/bad"), f"ERROR : 403 - {text}")
            self.assertEqual(self.ask("subscribe", "room/good"), True)
            self.assertEqual(self.ask("subscribe", "late"), f"ERROR : 403 - {text}".replace(
                "room/bad", "late"))

    def test_broadcasts_to_nobody(self) -> None:
        app = self.app
        app.channel("/guarded/:name/subscribe", lambda: None)
        app.channels_support("open")
        self.subscribed("open")
        with no_logs("webchannels"):
            for name, there in (("____", False), ("open", True), ("guarded/x", False)):
                self.assertEqual(app.broadcast(name, "x"), there)
        early = WebChannels()
        early.channels_support("open")
        for each, name in (early, "open"), (early, "____"), (app, "room"):
            webchannels.sparing.tell_counts()
            with self.told(f"broadcast() to '{name}', where nobody can be: first come up(), and "
                           f"channels_support('{name}') or a handler of /{name}/subscribe"):
                for _ in range(3):
                    self.assertFalse(each.broadcast(name, "x"))
        app.channel("/____/join", lambda client: app.subscribe(client, "joined"))
        with self.subscribed() as client:
            client.send_json({"channel": "____", "message": "join", "ref": 2})
            self.assertEqual(client.recv_json()["payload"], True)
        self.until(lambda: not app.connected_clients("joined"))
        webchannels.sparing.tell_counts()
        with no_logs("webchannels"):  # the program may let others come in
            self.assertFalse(app.broadcast("joined", "x"))
        with self.raises(ValueError, "no slash, as in 'room': not '/____'"):
            app.broadcast(["open", "/____"], "x")
        with self.raises(TypeError, "first comes the channel, or several, not 5"):
            app.broadcast(5, "x")  # type: ignore[arg-type]

    def test_params_that_no_message_has(self) -> None:
        app = self.app
        app.channel("/____/x", lambda: [app.params(each, 5) for each in ("payload", "paylod")])
        app.route("/x", lambda: f"{app.params('page')}")
        names = "payload, client, request, channel, message"
        with self.told(f"params('paylod'): there is only {names}"):
            self.assertEqual(self.ask("x"), [None, 5])
            self.assertEqual(request("GET", self.url + "/x").body, b"None")

    def test_a_route_that_returns_nothing(self) -> None:
        def one() -> None: ...
        def two() -> None: ...
        self.app.route("/one", one)
        self.app.route("/two", two)
        self.app.route("/one", one, method="POST")
        text = "returned None, so a browser stays where it was (204): is a return missing?"
        with self.told(f"one {text}", f"two {text}"):
            for path in "/one", "/one", "/two", "/one":
                for method in "POST", "GET":
                    request(method, self.url + path)
                    webchannels.sparing.tell_counts()

    def test_what_holds_the_loop(self) -> None:
        async def first() -> str:
            time.sleep(0.15)
            await asyncio.sleep(0)
            return "done"

        async def last() -> str:
            await asyncio.sleep(0.15)  # which holds nothing
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.sleep(5), 0.01)
            time.sleep(0.15)
            raise ChannelError("done")
        for handler in first, last:
            self.app.channel("/____/x", handler)
            with self.told(f"{handler.__name__} held the event loop for 1"):
                self.assertEqual(self.ask("x"), "done")

    def test_bodies_and_messages_that_are_too_large(self) -> None:
        self.app.config.max_body_size = self.app.config.max_message_size = 10
        for fields in {"Content-Length": "11"}, {"Transfer-Encoding": "chunked"}:
            webchannels.sparing.tell_counts()
            with self.told("413 Body too large (config.max_body_size)"), \
                    Connection(self.url) as connection:
                lines = [f"{name}: {value}" for name, value in fields.items()]
                connection.send_raw("\r\n".join(["POST / HTTP/1.1", "Host: localhost", *lines, "",
                                                 "b", "x" * 11]).encode())
                self.assertEqual(connection.response().body,
                                 b"Body too large (config.max_body_size)")
        with self.told("1009 message too long (config.max_message_size)"):
            client = self.connect()
            client.send_text("x" * 11)
            self.assertEqual(client.recv_close(),
                             (1009, "message too long (config.max_message_size)"))

    def test_paths_that_nothing_would_meet(self) -> None:
        app = self.app
        for path, rule in (("/<name>", "has :name, :name::int or :name::float for what varies"),
                           ("/a/{name}/b", "has :name"), ("/static/*", "has :name"),
                           ("/a?x=1", "has no query: ask for its names"), ("/a#b", "no query"),
                           ("echo", "begins with a slash"), ("/:a/:a", "has no name twice")):
            with self.subTest(path), self.raises(ValueError, "a path ", rule, f"not {path!r}"):
                app.route(path, lambda: "")
        for path in "/echo", "/:x":
            with self.subTest(path), self.raises(ValueError, "of a message is /channel/message"):
                app.channel(path, lambda: "")
        app.channel("/room/ready?", lambda: "yes")
        client = self.connect()
        client.send_json({"channel": "room", "message": "ready?"})
        self.assertEqual(client.recv_text(), "yes")

    def test_a_handler_that_would_take_the_place_of_ours(self) -> None:
        names: dict[str, Any] = {}
        exec("from webchannels import *\napp = WebChannels()", names)
        for name in "up", "broadcast", "Request":
            for decorator in "route('/x')", "channel('/x/y')", "on_connect":
                with self.raises(ValueError, f"the handler {name} would take", "another name"):
                    exec(f"@app.{decorator}\ndef {name}(): return 'mine'", names)
                self.assertIs(names[name], getattr(webchannels, name))
        exec("import webchannels\nclass Mine:\n  def up(self): return 'mine'\n"
             "webchannels.WebChannels().route('/up', Mine().up)\ndel up\n"
             "@app.route('/up')\ndef up(): return 'mine'", names)

    def test_what_is_of_the_wrong_kind(self) -> None:
        app = self.app
        any_: Any = app
        text: Any = "404"
        wrong: list[tuple[Callable[[], Any], str]] = [
            (lambda: any_.route("/", "hello"), "a handler is a function (and"),
            (lambda: any_.channel("/a/b", "hello"), "a handler is a function (and"),
            (lambda: any_.on_connect(), "@on_connect has no parentheses"),
            (lambda: any_.on_disconnect(), "has no parentheses"),
            (lambda: any_.subscribe("room", None), "first comes the client, then the channel"),
            (lambda: any_.channels_support(5), "a channel's name is a str, not 5"),
            (lambda: HTTPError(text), "the status of an answer is an int, not '404'"),
            (lambda: Response("x", text), "the status of an answer is an int"),
            (lambda: any_.up("0.0.0.0", block=False), "up(8000, '0.0.0.0'), not '0.0.0.0'"),
            (lambda: any_.up(0.0, block=False), "the port is an int"),
            (lambda: any_.up(0, ssl="cert.pem", block=False), "load_cert_chain('cert.pem', ")]
        app.down()
        for call, text in wrong:
            with self.subTest(text), self.raises(TypeError, text):
                call()
        with self.raises(ValueError, "the last no slash, as in 'room': not '/room'"):
            app.channels_support("/room")
        with self.raises(TypeError, f"not '{'x' * 79}") as raised:
            any_.subscribe("x" * 1000, "room")
        self.assertLess(len(str(raised.exception)), 150)


class MessagesTest(ServerTest):
    def configure(self, app: WebChannels) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        app.channel("/____/dict", lambda: {"a": 1})
        app.channel("/____/none", lambda: None)
        app.channel("/____/bytes", lambda: b"\0\1")
        app.channel("/____/object", lambda: object())
        app.channel("/____/boom", lambda: 1 / 0)
        app.channel("/____/told", self.told)
        app.channel("/____/http", self.http)
        app.channel("/____/later", self.later)
        app.channel("/____/hold", self.hold)
        app.channel("/____/release", lambda: self.release.set())
        app.channel("/____/cancel", self.cancel)
        app.channel("/____/thread", self.threaded, threaded=True)
        app.channel("/math/:op/:a::int/:b::int", self.math)
        app.channel("/____/all", lambda **given: sorted(given))

    def told(self) -> None:
        raise ChannelError("You may not\n\"\u20ac\"")

    def http(self) -> None:
        raise HTTPError(403)

    async def later(self, payload: Any) -> Any:
        await asyncio.sleep(payload)
        return f"{self.app.params('message')} {self.app.params('payload')}"

    async def hold(self) -> str:
        self.entered.set()
        await asyncio.get_running_loop().run_in_executor(None, self.release.wait, 10)
        return "released"

    async def cancel(self) -> None:
        raise asyncio.CancelledError

    def connect_at_last(self) -> None:
        """Connect when the server takes one more client."""
        def taken() -> bool:
            with contextlib.suppress(Refused):
                return bool(self.connect())
            return False

        self.until(taken)

    def test_a_handler_of_a_client_that_left_counts_until_it_is_done(self) -> None:
        self.app.config.max_clients = 1
        self.app.config.shutdown_timeout = 0.2
        client = self.connect()
        client.send_json({"channel": "____", "message": "hold"})
        self.assertTrue(self.entered.wait(10))
        client.reset()
        self.until(lambda: self.app.disconnected_clients())
        with self.assertRaises(Refused):
            self.connect()
        self.release.set()
        self.connect_at_last()

    def test_who_leaves_during_the_handshake_leaves_nothing_behind(self) -> None:
        entered, release = threading.Event(), threading.Event()

        async def come() -> None:
            entered.set()
            await asyncio.get_running_loop().run_in_executor(None, release.wait)

        self.app.on_connect(come)
        self.app.config.max_clients = 1
        with Connection(self.url) as connection:
            head = "".join(f"{k}: {v}\r\n" for k, v in HandshakeTest.HEAD.items())
            connection.send_raw(f"GET / HTTP/1.1\r\n{head}\r\n".encode())
            self.assertTrue(entered.wait(10))
            connection.reset()
        release.set()
        self.connect_at_last()
        self.assertEqual(len(self.app.connected_clients()), 1)

    def threaded(self) -> str:
        return f"{threading.current_thread().name[:11]} {self.app.params('payload')}"

    def math(self, op: str, a: int, b: int) -> int:
        return {"add": a + b}[op]

    CASES: list[tuple[Any, Any, Any, Any]] = [
        # what, the plain answer, the one of webchannels.v1 without a ref, and with one
        ("echo", "hi", {"channel": "____", "message": "hi"}, {"payload": "hi"}),
        ("dict", {"channel": "____", "message": "dict", "payload": {"a": 1}},
         {"channel": "____", "message": "dict", "payload": {"a": 1}}, {"payload": {"a": 1}}),
        ("none", None, None, {"payload": None}),
        ("bytes", b"\0\1", {"channel": "____", "message": "bytes", "payload": b"\0\1"},
         {"payload": b"\0\1"}),
        ("boom", "ERROR : 500 - Internal error", {
            "error": "ERROR : 500 - Internal error", "channel": "____", "message": "boom"},
         {"error": "ERROR : 500 - Internal error"}),
        ("object", "ERROR : 500 - Internal error", {
            "error": "ERROR : 500 - Internal error", "channel": "____", "message": "object"},
         {"error": "ERROR : 500 - Internal error"}),
        ("cancel", "ERROR : 500 - Internal error", {
            "error": "ERROR : 500 - Internal error", "channel": "____", "message": "cancel"},
         {"error": "ERROR : 500 - Internal error"}),
        ("told", "You may not\n\"\u20ac\"", {
            "error": "You may not\n\"\u20ac\"", "channel": "____", "message": "told"},
         {"error": "You may not\n\"\u20ac\""}),
        ("http", "ERROR : 403 - Forbidden", {
            "error": "ERROR : 403 - Forbidden", "channel": "____", "message": "http"},
         {"error": "ERROR : 403 - Forbidden"}),
        ("nope", NO_HANDLER + "/____/nope", {
            "error": NO_HANDLER + "/____/nope", "channel": "____", "message": "nope"},
         {"error": NO_HANDLER + "/____/nope"}),
        ("thread", "webchannels hi", {"channel": "____", "message": "webchannels hi"},
         {"payload": "webchannels hi"}),
        ("all", {"channel": "____", "message": "all", "payload": [
            "channel", "client", "message", "payload", "request"]}, {
                "channel": "____", "message": "all", "payload": [
                    "channel", "client", "message", "payload", "request"]},
         {"payload": ["channel", "client", "message", "payload", "request"]}),
    ]

    def test_replies_in_both_dialects(self) -> None:
        plain, v1 = self.connect(), self.connect(subprotocol="webchannels.v1")
        for deflating in (False, True):
            if deflating:
                self.app.config.compression_threshold = 0
                plain = self.connect(deflate=True)
                v1 = self.connect(deflate=True, subprotocol="webchannels.v1")
            for name, bare, pushed, answered in self.CASES:
                message = {"channel": "____", "message": name, "payload": "hi"}
                for client, ref, expected in (
                        (plain, None, bare), (plain, 5, bare), (v1, None, pushed),
                        (v1, 5, answered), (v1, 1.5, answered)):
                    if isinstance(expected, dict) and expected is answered:
                        expected = {**expected, "ref": ref}
                    with self.subTest(name, ref=ref):
                        client.send_json({**message, **({"ref": ref} if ref else {})})
                        if isinstance(expected, dict):
                            self.assertEqual(client.recv_envelope(), expected)
                        elif expected is not None:
                            opcode, data = client.recv()
                            self.assertEqual(
                                data if opcode == BINARY else data.decode(), expected)
        plain.send_json({"channel": "math/add/2", "message": "3"})
        self.assertEqual(plain.recv_json(), {"channel": "math/add/2", "message": "3", "payload": 5})

    def test_what_is_no_envelope(self) -> None:
        plain, v1 = self.connect(), self.connect(subprotocol="webchannels.v1")
        nothing = NO_HANDLER + "/"
        plain.send_text("")  # a keep-alive
        for text in ("hello", "[1]", "{", '{"channel":', '{"channel":"____",}', '{"a":1}',
                     '{"channel"}', "{\"channel\":NaN}", "null"):
            plain.send_text(text)
            self.assertEqual(plain.recv_text(), nothing, text)
        plain.send_binary(b"{}")
        self.assertEqual(plain.recv_text(), nothing)
        for bad in ({"channel": 5, "message": "echo"}, {"channel": "____"},
                    {"channel": "____", "message": ["echo"]}, {"channel": None, "message": "echo"},
                    {"channel": "____", "message": "echo", "ref": "x"},
                    {"channel": "____", "message": "echo", "ref": True},
                    {"channel": "____", "message": "echo", "ref": 10 ** 30},
                    {"channel": "____", "message": "e/cho"}):
            plain.send_json(bad)
            self.assertEqual(plain.recv_text(), BAD_MESSAGE, bad)
            about: JsonObject = {"ref": 7}  # the answer has it, if it is one
            v1.send_json({**about, **bad})
            if "ref" in bad:
                about = {"channel": "", "message": ""}
            self.assertEqual(v1.recv_json(), {"error": BAD_MESSAGE, **about}, bad)
        plain.send_text('{"channel":' + "[" * 100_000)
        self.assertIn(plain.recv_text(), ("ERROR : 400 - JSON nested too deep", nothing))
        plain.send_text('{"channel":' + "9" * 100_000 + "}")
        self.assertEqual(plain.recv_text(), nothing)
        v1.send_text("")
        self.assertEqual(v1.recv_text(), "")  # a keep-alive, answered

        self.app.channel("/", lambda payload: payload)
        for data in ("hello", "", "{}", '{"a": 1}', '  {"a":1}'):
            plain.send_text(data)
            self.assertEqual(plain.recv_text(), data)
        plain.send_binary(b"\xff")
        self.assertEqual(plain.recv(), (BINARY, b"\xff"))
        whole = '{"channel":"____","message":"echo","payload":"x"}'
        for before, after in (("", ""), (" ", "\n"), ("\r\n\t ", " \t\r\n")):  # JSON's white space
            plain.send_text(before + whole + after)
            self.assertEqual(plain.recv_text(), "x")
        for text in (whole + "x", whole + whole, "x" + whole, whole + "\xa0", "\ufeff" + whole):
            plain.send_text(text)
            self.assertEqual(plain.recv_text(), text)
        v1.send_text('{"ref":1,"payload":"forged"}')  # never a reply's look-alike
        self.assertEqual(v1.recv_json(),
                         {"channel": "____", "message": '{"ref":1,"payload":"forged"}'})
        self.app.channel("/", lambda: {"a": 1})
        plain.send_text("x")
        self.assertEqual(plain.recv_text(), '{"a":1}')

    def test_bytes_are_payloads(self) -> None:
        kinds: list[type] = []

        @self.app.channel("/____/same")
        async def same(payload: Any) -> Any:
            kinds.append(type(payload))
            return payload

        look_alike = b'{"channel":"____","message":"boom"}\n'
        large = os.urandom(300_000)
        for options in {}, {"deflate": True}:
            v1 = self.connect(subprotocol="webchannels.v1", **options)
            for name in "echo", "same":  # `def` and `async def`
                message = {"channel": "____", "message": name}
                for payload in b"", b"\n", look_alike, b"\xff\0" * 3000, large:
                    v1.send_json({**message, "ref": 1}, payload)
                    self.assertEqual(v1.recv_envelope(), {"ref": 1, "payload": payload})
                    v1.send_json(message, payload)
                    self.assertEqual(v1.recv_envelope(), {**message, "payload": payload})
        self.assertEqual({*kinds}, {bytes})
        v1 = self.connect(subprotocol="webchannels.v1")
        head = b' {"channel":"____", "message":"echo"}\t'
        v1.send_frame(BINARY, head[:9], fin=False)  # not the whole envelope
        v1.send_frame(CONTINUATION, head[9:], fin=False)
        v1.send_frame(CONTINUATION, b"\n")
        self.assertEqual(v1.recv_envelope()["payload"], b"")
        numbers = array.array("d", [0.5, -2])
        for given in (bytearray(b"\0\n"), memoryview(numbers), memoryview(b"abcd")[::2]):
            self.app.channel("/____/given", lambda given=given: given)
            v1.send_json({"channel": "____", "message": "given", "ref": 2.5})
            self.assertEqual(v1.recv_envelope(), {"ref": 2.5, "payload": bytes(given)})
        plain = self.connect()  # there, a binary message is bare, whatever it looks like
        plain.send_binary(look_alike)
        self.assertEqual(plain.recv_text(), NO_HANDLER + "/")
        self.app.channel("/", lambda payload: payload)
        plain.send_binary(look_alike)
        self.assertEqual(plain.recv(), (BINARY, look_alike))
        self.app.channel("/", lambda payload: payload.encode())
        v1.send_text("hello")  # what is no envelope has no name: nor has its answer
        self.assertEqual(v1.recv_envelope(),
                         {"channel": "____", "message": "", "payload": b"hello"})

    def test_binary_messages_without_a_good_envelope(self) -> None:
        self.app.channel("/", lambda: "it gets none of these")
        v1 = self.connect(subprotocol="webchannels.v1")
        logging.getLogger("webchannels").setLevel(logging.INFO)
        good = b'{"channel":"____","message":"echo","ref":1}'
        what = "ERROR : 400 - A binary message is an envelope, a line feed, and bytes"
        with self.assertLogs("webchannels", "INFO") as logs:
            for data in (b"", b"\n", b"\n" + good, good, good[:-1] + b"\n", b"x" + good + b"\n",
                         good + b"x\nabc", good.replace(b"echo", b"ech\xff") + b"\nabc",
                         b"\xef\xbb\xbf" + good + b"\n", good.replace(b",", b",\n", 1) + b"\nabc",
                         b"[1]\nabc", b'"a"\nabc', b'{"a":1}\nabc', b"{" * 2000 + b"\nabc",
                         good[:-1] + b',"payload":null}\nabc', bytes(100_000),
                         good[:-1] + b',"x":"' + b"x" * 9000 + b'"}\nabc'):
                v1.send_binary(data)
                self.assertEqual(
                    v1.recv_json(), {"error": what, "channel": "", "message": ""}, data)
            for bad in ({"channel": 5, "message": "echo"}, {"channel": "____", "message": "e/cho"},
                        {"channel": "x" * 257, "message": "a"}, {"channel": "____"},
                        {"channel": "____", "message": "x" * 257}):
                v1.send_json({**bad, "ref": 7}, b"abc")
                self.assertEqual(v1.recv_json(), {"error": BAD_MESSAGE, "ref": 7})
        self.assertEqual(len(logs.output), 2, logs.output)  # one of each kind
        v1.send_json(json.loads(good), b"abc")
        self.assertEqual(v1.recv_envelope(), {"ref": 1, "payload": b"abc"})

    def test_a_reply_of_too_many_bytes(self) -> None:
        self.app.channel("/____/much", lambda payload: bytes(payload))
        self.app.config.max_send_buffer = 5000
        v1, plain = self.connect(subprotocol="webchannels.v1"), self.connect()
        message = {"channel": "____", "message": "much", "ref": 1}
        for size, fits in (5000 - len('{"ref":1}\n'), True), (5000 - len('{"ref":1}'), False):
            v1.send_json({**message, "payload": size})
            self.assertEqual(v1.recv_envelope(), {
                "ref": 1, **({"payload": bytes(size)} if fits
                             else {"error": "ERROR : 500 - Internal error"})})
        plain.send_json({**message, "payload": 5001})
        self.assertEqual(plain.recv_text(), "ERROR : 500 - Internal error")

    def test_integers_of_very_many_digits(self) -> None:
        """Their cost is quadratic: Python refuses them, but old ones must be told."""
        message = '{"channel":"____","message":"echo","payload":%s}'
        spec = importlib.util.spec_from_file_location("old_webchannels", HERE / "webchannels.py")
        assert spec
        loader: Any = spec.loader
        old: Any = importlib.util.module_from_spec(spec)
        limit = getattr(sys, "set_int_max_str_digits", None)
        try:
            if limit:
                del sys.set_int_max_str_digits
            with mock.patch.dict(sys.modules, {"old_webchannels": old}):
                loader.exec_module(old)
        finally:
            if limit:
                sys.set_int_max_str_digits = limit
                self.addCleanup(limit, sys.get_int_max_str_digits())
        app = old.WebChannels()
        app.channel("/____/echo", lambda payload: len(str(payload)))
        self.app.channel("/____/echo", lambda payload: len(str(payload)))
        for url, digits in (self.url, 4300), (self.enterContext_(serve(app)), 0):
            if limit:
                limit(digits)
            with WebSocketClient(url) as client:
                client.send_text(message % ("9" * 4300))
                self.assertEqual(client.recv_json()["payload"], 4300)
                client.send_text(message % ("9" * 4301))
                self.assertEqual(client.recv_text(), NO_HANDLER + "/")  # it is no JSON

    def test_half_of_a_surrogate_pair(self) -> None:
        """It has no UTF-8. In JSON it is escaped, as JSON.stringify() does."""
        plain, v1 = self.connect(), self.connect(subprotocol="webchannels.v1")
        with no_logs("webchannels"):
            for client, ref in ((plain, None), (v1, None), (v1, 1)):
                for payload in ("\ud83d", {"\udc00": "\ud83d"}):
                    client.send_json({"channel": "____", "message": "echo", "payload": payload,
                                      "ref": ref})
                    text = client.recv_text()
                    self.assertIn("\\ud83d", text)
                    if client is v1:
                        reply = json.loads(text)
                        self.assertEqual(reply.get("payload", reply.get("message")), payload)
        v1 = self.subscribed()
        self.app.broadcast("____", "\ud83d", ["\ud83d"])
        self.app.broadcast("____", "\ud83d")
        pushed = {"channel": "____", "message": "\ud83d"}
        self.assertEqual(v1.recv_json(), {**pushed, "payload": ["\ud83d"]})
        self.assertEqual(v1.recv_json(), pushed)

    def test_errors_are_bounded_and_deflated(self) -> None:
        def fail() -> None:
            raise ChannelError("x" * 100_000)

        self.app.channel("/____/fail", fail)
        v1 = self.connect(subprotocol="webchannels.v1", deflate=True)
        v1.send_json({"channel": "____", "message": "fail", "ref": 1})
        frame = v1.recv_frame()
        self.assertLess(len(frame.payload), 200)
        v1.message, v1.parts = frame, frame.payload
        self.assertEqual(json.loads(v1.inflated()), {"ref": 1, "error": "x" * 8192})
        plain = self.connect()
        plain.send_json({"channel": "____", "message": "fail"})
        self.assertEqual(plain.recv_text(), "x" * 8192)

    def test_messages_are_handled_in_order_one_at_a_time(self) -> None:
        client, other = self.connect(), self.connect()
        client.send_json({"channel": "____", "message": "hold"})
        client.send_json({"channel": "____", "message": "thread", "payload": 2})
        client.send_json({"channel": "____", "message": "later", "payload": 0})
        client.send_json({"channel": "____", "message": "echo", "payload": "last"})
        client.send_frame(PING, b"now")
        self.assertEqual(client.recv(), (PONG, b"now"))
        other.send_json({"channel": "____", "message": "echo", "payload": "others do not wait"})
        self.assertEqual(other.recv_text(), "others do not wait")
        self.assertFalse(self.release.is_set())
        other.send_json({"channel": "____", "message": "release"})
        self.assertEqual([client.recv_text() for _ in range(4)],
                         ["released", "webchannels 2", "later 0", "last"])

    def test_what_has_waited_is_what_was_sent(self) -> None:
        self.app.channel("/____/slow", lambda: asyncio.sleep(0.05))
        self.app.channel("/", lambda payload: payload)
        client, sent = self.connect(), [(TEXT, "é".encode()), (BINARY, b"\xff"), (TEXT, b"plain")]
        for each in [(TEXT, b'{"channel": "____", "message": "slow"}'), *sent]:
            client.send_frame(*each)
        self.assertEqual([client.recv() for _ in sent], sent)

    def test_answers_come_before_the_close(self) -> None:
        for end, code in ((frame(CLOSE, b"\x03\xe8"), 1000), (frame(3), 1002),
                          (frame(TEXT, b"\xff"), 1007), (frame(CLOSE), 1005)):
            client = self.connect()
            for name in ("later", "echo"):
                client.send_json({"channel": "____", "message": name, "payload": 0.1})
            client.send_raw(end)
            self.assertEqual(client.recv_text(), "later 0.1")
            self.assertEqual(client.recv_json()["payload"], 0.1)
            self.assertEqual(client.recv_close()[0], code)
            self.assertEqual(client.rest(), b"")

    def test_a_half_closed_peer_gets_its_answers(self) -> None:
        client = self.connect()
        client.send_json({"channel": "____", "message": "later", "payload": 0.1})
        client.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(client.recv_text(), "later 0.1")
        self.assertEqual(client.rest(), b"")
        self.app.config.handshake_timeout = 60
        client = self.connect()
        client.sock.shutdown(socket.SHUT_WR)  # nothing is owed
        self.assertEqual(client.rest(5), b"")

    def test_who_is_still_sending_can_read_why_it_is_closed(self) -> None:
        client = self.connect()
        client.send_raw(frame(3))
        self.assertEqual(client.recv_close()[0], 1002)
        self.assertEqual(client.rest(), b"")
        for _ in range(100):  # a reset would make this fail
            client.send_raw(b"x" * 1000)

    def test_a_half_closed_peer_that_broke_the_protocol_is_not_waited_for(self) -> None:
        self.app.config.max_clients, self.app.config.handshake_timeout = 1, 60
        client = self.connect()
        client.send_json({"channel": "____", "message": "hold"})
        self.assertTrue(self.entered.wait(10))
        client.send_raw(frame(3))
        client.sock.shutdown(socket.SHUT_WR)
        self.until(lambda: not self.app.connected_clients())  # the end has arrived
        self.release.set()
        self.assertEqual(client.recv_text(), "released")
        self.assertEqual(client.recv_close()[0], 1002)
        self.connect_at_last()

    def test_a_half_closed_peer_gets_all_that_is_queued(self) -> None:
        self.app.config.max_send_buffer = 64 << 20
        client = self.subscribed()
        for _ in range(300):  # 30 MB: more than any buffer between
            self.assertTrue(self.app.broadcast("____", "x" * 100_000))
        client.sock.shutdown(socket.SHUT_WR)
        self.until(lambda: not self.app.connected_clients())  # the end has arrived
        for _ in range(300):
            self.assertEqual(len(client.recv_json()["message"]), 100_000)
        self.assertEqual(client.rest(), b"")

    def test_a_half_closed_peer_gets_what_waited_for_it_to_read(self) -> None:
        size = 30_000_000  # more than any buffer between
        self.app.config.max_send_buffer = 64 << 20
        self.app.channel("/____/much", lambda: bytes(size))
        client = self.connect()
        client.send_json({"channel": "____", "message": "much"})
        for number in range(3):
            client.send_json({"channel": "____", "message": "echo", "payload": str(number)})
        client.sock.shutdown(socket.SHUT_WR)
        self.until(lambda: not self.app.connected_clients())  # the end has arrived
        self.assertEqual(len(client.recv()[1]), size)
        self.assertEqual([client.recv_text() for _ in range(3)], ["0", "1", "2"])
        self.assertEqual(client.rest(), b"")

    def test_what_arrived_before_a_reset_is_handled(self) -> None:
        handled: list[Any] = []
        self.app.channel("/____/note", lambda payload: handled.append(payload))
        client = self.connect()
        client.send_json({"channel": "____", "message": "hold"})
        for number in range(3):
            client.send_json({"channel": "____", "message": "note", "payload": number})
        client.send_frame(PING)
        self.assertEqual(client.recv(), (PONG, b""))  # what was sent before is there, too
        client.reset()
        self.until(lambda: self.app.disconnected_clients())
        self.release.set()
        self.until(lambda: len(handled) == 3)
        self.assertEqual(handled, [0, 1, 2])

    def test_what_waited_for_the_peer_to_read_is_handled_after_a_reset(self) -> None:
        handled: list[Any] = []
        self.app.channel("/____/note", lambda payload: handled.append(payload))
        self.app.config.max_send_buffer = 64 << 20
        self.app.channel("/____/much", lambda: bytes(30_000_000))  # more than any buffer between
        client = self.connect()
        client.send_json({"channel": "____", "message": "much"})
        for number in range(3):
            client.send_json({"channel": "____", "message": "note", "payload": number})
        client.sock.shutdown(socket.SHUT_WR)
        self.until(lambda: self.app.disconnected_clients())  # all of it has arrived
        self.assertEqual(handled, [])
        client.reset()
        self.until(lambda: len(handled) == 3)
        self.assertEqual(handled, [0, 1, 2])

    def test_what_waited_behind_the_servers_close_is_not_handled_after_a_reset(self) -> None:
        handled: list[Any] = []
        self.app.channel("/____/note", lambda payload: handled.append(payload))
        client = self.connect()
        client.send_json({"channel": "____", "message": "hold"})
        client.send_json({"channel": "____", "message": "note", "payload": 1})
        client.send_frame(PING)
        self.assertEqual(client.recv(), (PONG, b""))  # what was sent before is there, too
        self.app.config.max_clients = 1
        self.app.connected_clients()[0].close(4000)
        client.reset()
        self.release.set()
        self.connect_at_last()
        self.assertEqual(handled, [])

    def test_many_messages_of_one_client_let_others_have_their_turn(self) -> None:
        handled, turns, count = [0], [], 600

        def note() -> None:
            handled[0] += 1
            if handled[0] == 1:
                asyncio.get_running_loop().call_soon(lambda: turns.append(handled[0]))

        self.app.channel("/____/note", note)
        client = self.connect()
        with mock.patch.object(webchannels, "_TURN", 0):  # seconds
            client.send_raw(frame(TEXT, b'{"channel":"____","message":"note"}') * count)
            self.until(lambda: handled[0] == count)
        self.assertLessEqual(turns[0], 2)

    def test_reading_stops_while_a_handler_is_busy(self) -> None:
        self.app.channel("/____/wait", self.wait)
        self.app.config.shutdown_timeout = 0.2
        client, other = self.connect(), self.connect()
        client.send_json({"channel": "____", "message": "hold"})
        for _ in range(20):
            client.send_text("x" * 20_000)
        other.send_json({"channel": "____", "message": "release"})
        self.assertEqual(client.recv_text(), "released")
        for _ in range(20):  # it is read again
            self.assertEqual(client.recv_text(), NO_HANDLER + "/")
        self.release.clear()
        client.send_json({"channel": "____", "message": "hold"})
        for name in b"1", b"2":  # and noticed while it is busy again
            client.send_json({"channel": "____", "message": "none"})
            client.send_frame(PING, name)
            self.assertEqual(client.recv(), (PONG, name))
        self.release.set()
        self.assertEqual(client.recv_text(), "released")
        client.send_json({"channel": "____", "message": "wait"})
        message = json.dumps({"channel": "____", "message": "echo", "payload": "x" * 9000})
        client.sock.settimeout(1)
        sent = 0
        with self.assertRaises(socket.timeout):
            while sent < 10_000:  # 90 MB: more than any buffer between
                client.send_text(message)
                sent += 1
        self.assertGreater(sent, 5)

    async def wait(self) -> None:
        await asyncio.sleep(60)

    def test_a_message_in_a_chunk_of_its_own(self) -> None:
        """It is handled where it was read, but not before what waits."""
        handled: list[Any] = []

        def note(payload: Any) -> None:
            handled.append(payload)

        def slow(payload: Any) -> None:
            time.sleep(2 * webchannels._TURN)
            handled.append(payload)

        async def later(payload: Any) -> None:
            handled.append(payload)

        for handler in note, slow, later:
            self.app.channel(f"/____/{handler.__name__}", handler)
        for _ in range(2):
            self.connect()
        self.until(lambda: len(self.app.connected_clients()) == 2)
        one, other = self.app.connected_clients()

        def said(message: str, payload: Any) -> bytes:
            envelope = {"channel": "____", "message": message, "payload": payload}
            return frame(TEXT, json.dumps(envelope).encode())

        def arrive(*chunks: tuple[ChannelClient, bytes]) -> list[Any]:
            """What is handled when these chunks come, in one turn of the loop."""
            handled.clear()
            for client, data in chunks:
                client.data_received(data)
            return handled.copy()

        def check(at_once: list[Any], then: list[Any],
                  *chunks: tuple[ChannelClient, bytes]) -> None:
            self.assertEqual(self.app._call(functools.partial(arrive, *chunks)), at_once)
            self.until(lambda: len(handled) == len(then))
            self.assertEqual(handled, then)

        check([1], [1], (one, said("note", 1)))
        check([1, 2], [1, 2], (one, said("note", 1)), (one, said("note", 2)))
        # The second has used up its turn, and waits in line; or a task is awaited.
        check([1], [1, 2, 3], (one, said("slow", 1) + said("note", 2)), (one, said("note", 3)))
        check([], [1, 2], (one, said("later", 1)), (one, said("note", 2)))
        # After what took long, nothing large is begun.
        check([1], [1, 9000 * "x"], (one, said("slow", 1)), (other, said("note", 9000 * "x")))
        self.app._call(one.pause_writing)  # the peer must read first
        check([], [], (one, said("note", 1)))
        self.app._call(one.resume_writing)
        self.until(lambda: handled == [1])
        self.app._now = 0.0  # that nothing came for long is not the handler's fault
        with no_logs("webchannels"):
            check([1], [1], (one, said("note", 1)))
        one.close()
        check([2], [2], (one, said("note", 1)), (other, said("note", 2)))

    def test_what_one_message_has_sent_leaves_at_once(self) -> None:
        def answer(client: ChannelClient) -> str:
            client.send("first", 1)
            client.send("second", 2)
            return "third"

        self.app.channel("/____/answer", answer)
        client = self.connect()
        [there] = self.until(self.app.connected_clients)
        transport = there._transport
        written: list[bytes] = []
        there._transport = mock.Mock(wraps=transport, write=written.append)
        client.send_json({"channel": "____", "message": "answer"})
        self.until(lambda: written)
        there._transport = transport
        [data] = written
        self.assertEqual([data.count(each) for each in (b"first", b"second", b"third")], [1] * 3)

    def test_closing_from_both_sides(self) -> None:
        client = self.connect()
        client.send_close(4001, "bye")
        self.assertEqual(client.recv_close(), (4001, "bye"))
        self.assertEqual(client.rest(), b"")
        client = self.connect()
        self.until(lambda: len(self.app.connected_clients()) == 1)
        there = self.app.connected_clients()[0]
        self.assertTrue(there.send("first"))
        there.close(4000, "enough")
        self.assertFalse(there.send("too late"))
        self.assertEqual(client.recv_text(), "first")
        self.assertEqual(client.recv_close(), (4000, "enough"))
        self.assertEqual(client.rest(), b"")
        self.app.channel("/____/kick", lambda client: client.close(1008, "kicked") or "bye")
        client = self.connect(subprotocol="webchannels.v1")
        client.send_json({"channel": "____", "message": "kick", "ref": 1})
        with self.assertRaises(Closed):  # and no reply behind it (RFC 6455, 5.5.1)
            client.recv()
        self.assertEqual(client.rest(), b"")
        for code, reason in ((1005, ""), (1006, ""), (999, ""), (5000, ""), (1000, "x" * 124),
                             (1000, "\u20ac" * 42)):
            with self.assertRaises(ValueError):
                there.close(code, reason)
        client = self.connect()
        there = self.until(self.app.connected_clients)[0]
        there.close(1000, "\u20ac" * 41)  # 123 bytes
        self.assertEqual(client.recv_close(), (1000, "\u20ac" * 41))

    def test_the_channel_of_what_a_handler_sends(self) -> None:
        def tell(client: ChannelClient) -> None:
            for each in self.app.connected_clients():
                each.send("here", client is each)
            client.send("there", channel="other")

        async def later(client: ChannelClient) -> None:
            await asyncio.sleep(0)
            tell(client)

        self.app.channel("/room/now", tell)
        self.app.channel("/room/later", later)
        self.app.channel("/room/thread", lambda client: tell(client), threaded=True)
        self.app.channel("/", tell)
        self.app.config.default_channel = "default"
        client, other = (self.connect(subprotocol="webchannels.v1") for _ in range(2))
        for name, channel in (("now", "room"), ("later", "room"), ("thread", "room"),
                              ("", "default")):
            client.send_text(json.dumps({"channel": "room", "message": name}) if name else "raw")
            self.assertEqual([client.recv_json(), client.recv_json()], [
                {"channel": channel, "message": "here", "payload": True},
                {"channel": "other", "message": "there"}])
            self.assertEqual(other.recv_json(),  # it sent no message: the default one
                             {"channel": "default", "message": "here", "payload": False})

    def test_what_arrives_behind_the_servers_close_is_not_handled(self) -> None:
        handled: list[Any] = []
        self.app.channel("/____/kick", lambda client: client.close(4000))
        self.app.channel("/____/note", lambda payload: handled.append(payload))
        client = self.connect()
        client.send_raw(b"".join(
            frame(TEXT, json.dumps({"channel": "____", "message": name, "payload": 1}).encode())
            for name in ("note", "kick", "note")))
        self.assertEqual(client.recv_close()[0], 4000)
        self.assertEqual(client.rest(), b"")
        self.assertEqual(handled, [1])

    def test_writing_stops_at_a_reset(self) -> None:
        """Or asyncio would warn: "socket.send() raised exception"."""
        entered, release = threading.Event(), threading.Event()

        def hold() -> None:  # the event loop, until the reset is there
            entered.set()
            release.wait(10)
            for _ in range(20):
                self.app.broadcast("____", "x")

        self.app.route("/hold", hold)
        client = self.subscribed()
        with no_logs("asyncio"), Connection(self.url) as other:
            other.send_raw(b"GET /hold HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(entered.wait(10))
            client.reset()
            release.set()
            self.assertEqual(other.response().status, 204)

    def test_messages_past_the_limits(self) -> None:
        self.app.config.max_message_size = 1000
        client = self.connect()
        client.send_text("x" * 1001)
        self.assertEqual(client.recv_close()[0], 1009)
        client = self.connect(deflate=True)
        client.send_text("x" * 100_000)
        self.assertEqual(client.recv_close()[0], 1009)

    def test_a_handler_that_holds_the_loop_is_named(self) -> None:
        def sleepy() -> None:
            time.sleep(0.15)

        self.app.channel("/____/sleepy", sleepy)
        logging.getLogger("webchannels").level = logging.NOTSET
        client = self.connect(subprotocol="webchannels.v1")
        with self.assertLogs("webchannels", "WARNING") as logs:
            client.send_json({"channel": "____", "message": "sleepy", "ref": 1})
            client.recv_json()
        self.assertRegex(logs.output[0], "sleepy held the event loop.*threaded=True")

    def test_handlers_are_replaced_while_serving(self) -> None:
        client = self.connect()
        for word in ("one", "two"):
            self.app.channel("/____/word", lambda word=word: word)
            client.send_json({"channel": "____", "message": "word"})
            self.assertEqual(client.recv_text(), word)


class RegistryTest(ServerTest):
    def configure(self, app: WebChannels) -> None:
        app.channels_support("room")
        self.left: list[ChannelClient] = []
        app.on_disconnect(self.note)

    def note(self, client: ChannelClient) -> None:
        self.left.append(client)
        raise RuntimeError("on purpose")

    def test_on_connect_that_sends_too_much_or_closes(self) -> None:
        self.app.on_connect(lambda client: [client.send("x" * 600_000) for _ in range(2)])
        client = self.connect()
        self.assertEqual(client.recv_close(), (1013, "too slow"))
        app = WebChannels()
        app.on_connect(lambda client: client.close(3000, "not now"))
        client = WebSocketClient(self.enterContext_(serve(app)), auto_reply=False)
        self.assertEqual(client.recv_close(), (3000, "not now"))
        self.assertEqual(app.connected_clients(), [])
        client.close()
        self.assertEqual(self.left, [])

    def test_exactly_as_much_as_may_be_sent(self) -> None:
        most = self.app.config.max_send_buffer = 10_000
        head = len('{"channel":"____","message":""}')
        client = self.subscribed()
        self.assertTrue(self.app.broadcast("____", "x" * (most - head)))
        self.assertEqual(len(client.recv_text()), most)
        for more, reply in ((0, "x" * (most - 22)), (1, None)):
            client.send_json({"channel": "____", "message": "echo", "ref": 7,
                              "payload": "x" * (most - 22 + more)})
            answer = client.recv_json()
            self.assertEqual(answer.get("payload"), reply)
            self.assertEqual(answer.get("error"), "ERROR : 500 - Internal error" if more else None)
        self.app.channel("/", lambda payload: payload)
        raw = self.connect()
        for opcode in TEXT, BINARY:  # without the subprotocol they travel as they are
            raw.send_frame(opcode, b"x" * most)
            self.assertEqual(raw.recv(), (opcode, b"x" * most))
        sizes: list[int] = []
        self.app.on_connect(lambda client: [client.send(bytes(size)) for size in sizes])
        for sizes[:] in ([4996, 4996], [4996, 4997]):  # and 4 bytes each for a frame's head
            client = self.connect()
            if sum(sizes) + 8 <= most:
                self.assertEqual([len(client.recv()[1]) for _ in sizes], sizes)
            else:
                self.assertEqual(client.recv_close(), (1013, "too slow"))

    def test_max_clients_while_on_connect_is_awaited(self) -> None:
        waiting: list[asyncio.Future[None]] = []
        self.app.config.max_clients = 2
        self.connect()

        @self.app.on_connect
        async def slow() -> None:
            waiting.append(asyncio.get_running_loop().create_future())
            if len(waiting) == 2:  # both are admitted in one turn of the loop
                for each in waiting:
                    each.set_result(None)
            await waiting[-1]
        with Connection(self.url) as one, Connection(self.url) as two:
            for each in (one, two):
                each.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                              b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                              b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
            self.assertEqual({one.response().status, two.response().status}, {101, 503})

    def test_who_is_there(self) -> None:
        app = self.app
        one, two = self.subscribed(), self.subscribed("room")
        first, second = app.connected_clients()
        self.assertEqual(app.connected_clients("____"), [first])
        self.assertEqual(app.subscriptions(), {"____": [first], "room": [second]})
        self.assertEqual((first.connected, first.channels, first.address),
                         (True, {"____"}, "127.0.0.1"))
        self.assertRegex(repr(first), "ChannelClient [0-9a-f]{16} 127.0.0.1 connected \\['____'\\]")
        first.data["name"] = "one"
        self.assertTrue(app.subscribe(first, "room"))
        self.assertTrue(app.broadcast("room", "both"))
        for client in (one, two):
            self.assertEqual(client.recv_json(), {"channel": "room", "message": "both"})
        self.assertTrue(app.unsubscribe(first, "room"))
        self.assertFalse(app.unsubscribe(first, "room"))
        app.unsubscribe_client(second)
        self.assertEqual(app.subscriptions(), {"____": [first]})
        self.assertFalse(app.broadcast("room", "nobody"))
        one.send_json({"channel": "____", "message": "unsubscribe", "ref": 2})
        self.assertEqual(one.recv_json(), {"ref": 2, "payload": "Unsubscription: OK"})
        self.assertEqual(app.subscriptions(), {})
        app.subscribe(first, "room")
        one.close()
        self.until(lambda: app.disconnected_clients() == [first])
        self.assertEqual(self.until(lambda: self.left), [first])
        self.assertFalse(first.connected or first.send("x") or app.subscribe(first, "room"))
        self.assertFalse(app.subscribe(first, "later"))
        self.assertEqual(app.subscriptions(), {})
        self.assertEqual(app.disconnected_clients("later"), [])
        self.assertEqual(app.disconnected_clients("room"), [first])
        self.assertEqual(app.disconnected_clients("____"), [])
        self.assertEqual(app.connected_clients(), [second])
        self.assertEqual(app.unsubscribe_disconnected_clients("____"), [])
        self.assertEqual(app.disconnected_clients(), [first])
        self.assertEqual(app.unsubscribe_disconnected_clients(), [second])
        self.assertEqual(app.disconnected_clients(), [])

    def test_broadcasts(self) -> None:
        app = self.app
        clients = [self.subscribed(), self.subscribed(), self.subscribed(deflate=True)]
        plain = self.connect()
        plain.send_json({"channel": "____", "message": "subscribe"})
        plain.recv_text()
        a, b, c, d = app.connected_clients()
        big = "\u20ac" * 2000
        none = webchannels._NO_PAYLOAD
        for message, payload, text, value in (
                ("Hey!", none, "Hey!", {"channel": "____", "message": "Hey!"}),
                ("Hey!", None, None, {"channel": "____", "message": "Hey!", "payload": None}),
                (big, none, big, {"channel": "____", "message": big}),
                ("tick", {"n": [1, None]}, None,
                 {"channel": "____", "message": "tick", "payload": {"n": [1, None]}}),
                ("tick", [float("nan"), float("inf"), (1.5,), {"a": -float("inf")}], None,
                 {"channel": "____", "message": "tick",
                  "payload": [None, None, [1.5], {"a": None}]}),
                ("tick", [-float("inf")], None,
                 {"channel": "____", "message": "tick", "payload": [None]}),
                ("tick", ["NaN", {"-Infinity": float("nan")}, '"NaN"\\', '\\"Infinity', "\1\0"],
                 None, {"channel": "____", "message": "tick", "payload": [
                     "NaN", {"-Infinity": None}, '"NaN"\\', '\\"Infinity', "\1\0"]}),
                ('{"ref":1}', none, '{"ref":1}', {"channel": "____", "message": '{"ref":1}'})):
            self.assertTrue(app.broadcast("____", message, payload))
            for client in clients:
                self.assertEqual(client.recv_json(), value)
            received = plain.recv_text()
            if text:
                self.assertEqual(received, text)
            else:
                self.assertEqual(json.loads(received), value)
        look_alike, large = b'{"channel":"____","message":"x"}\n', bytes(range(256)) * 1000
        for data in b"\0\1", b"", b"\n", look_alike, bytearray(b"\0\n"), memoryview(large)[1::3]:
            given: Any
            for given in ("tick", data), ("a\nb", data), (data,):
                self.assertTrue(app.broadcast("____", *given))
                name: Any = {"message": given[0]} if given[1:] else {}  # no handler's, without one
                for client in clients:
                    self.assertEqual(client.recv_envelope(),
                                     {"channel": "____", **name, "payload": bytes(data)})
                self.assertEqual(plain.recv(), (BINARY, bytes(data)))
        self.assertIn("payload: 'Any' = <none>", str(inspect.signature(app.broadcast)))
        app.subscribe(a, "room")
        self.assertTrue(app.broadcast(["room", "____", "nobody's"], "x", exclude=[b, c]))
        self.assertEqual([clients[0].recv_json()["channel"] for _ in range(2)], ["room", "____"])
        self.assertEqual(plain.recv_text(), "x")
        self.assertTrue(app.broadcast("____", "y", only=b, exclude=a))
        self.assertEqual(clients[1].recv_json()["message"], "y")
        self.assertFalse(app.broadcast("____", "z", only=[]))
        self.assertFalse(app.broadcast("____", "z", exclude=[a, b, c, d]))
        self.assertFalse(app.broadcast([], "z"))
        a.send("last")
        a.send("last", None)
        d.send("last", {"a": 1}, channel="room")
        d.send("last", None, channel="room")
        c.send("last", b"\n", channel="room")
        c.send(b"\n")
        d.send("last", b"\n")
        self.assertEqual([clients[2].recv_envelope() for _ in range(2)], [
            {"channel": "room", "message": "last", "payload": b"\n"},
            {"channel": "____", "payload": b"\n"}])
        last = {"channel": "____", "message": "last"}
        self.assertEqual([clients[0].recv_json() for _ in range(2)],
                         [last, {**last, "payload": None}])
        self.assertEqual([plain.recv_json() for _ in range(2)], [
            {"channel": "room", "message": "last", "payload": value} for value in ({"a": 1}, None)])
        self.assertEqual(plain.recv(), (BINARY, b"\n"))
        app.broadcast("____", "tick", b"only", only=[a.id], exclude=b)
        app.broadcast("____", "tick", b"not to her", exclude=[a.id, d])
        app.broadcast("____", "end", b"")
        self.assertEqual([[each.recv_envelope()["payload"] for _ in range(2)] for each in clients],
                         [[b"only", b""], *[[b"not to her", b""]] * 2])
        self.assertEqual(plain.recv(), (BINARY, b""))

    def test_a_broadcast_is_deflated_once_for_all(self) -> None:
        clients = [self.subscribed(deflate=True) for _ in range(3)]
        with mock.patch("zlib.compressobj", wraps=zlib.compressobj) as deflater:
            self.app.broadcast("____", "x" * 5000)
            for client in clients:
                self.assertEqual(client.recv_json()["message"], "x" * 5000)
            self.app.broadcast("____", "x", b"x" * 5000)
            for client in clients:
                frame = client.recv_frame()
                client.parts = frame.payload
                self.assertEqual((frame.rsv, frame.opcode), (4, BINARY))
                self.assertEqual(client.inflated(),
                                 b'{"channel":"____","message":"x"}\n' + b"x" * 5000)
        self.assertEqual(deflater.call_count, 2)

    def test_values_that_cannot_be_sent_raise_before_anything_is(self) -> None:
        client = self.subscribed()
        there = self.app.connected_clients()[0]
        circle: list[Any] = []
        circle.append(circle)
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        self.app.config.max_send_buffer = 10_000
        cases: list[tuple[Any, Any, type[Exception]]] = [
                ("x", object(), TypeError), ("x", {1, 2}, TypeError), ("x", circle, ValueError),
                ({"a": 1}, None, TypeError), (5, None, TypeError), (b"x", 1, TypeError),
                (b"x", None, TypeError),
                ("x" * 10_001, None, ValueError), ("x", "y" * 10_001, ValueError),
                ("x", bytes(10_001), ValueError), ("x", {"a": b"b"}, TypeError),
                ("x", deep, ValueError)]
        for message, payload, error in cases:
            for send in (there.send, functools.partial(self.app.broadcast, ["____", "room"])):
                with self.subTest(message), self.assertRaises(error):
                    send(message, payload)
        with self.assertRaisesRegex(TypeError, "config.json_default"):
            self.app.broadcast("____", "x", object())
        self.app.config.json_default = lambda value: {"it": float("nan"),
                                                      "is": type(value).__name__}
        self.app.broadcast("____", "x", object())
        self.assertEqual(client.recv_json()["payload"], {"it": None, "is": "object"})
        while deep:  # taken apart in a loop: its own destructor is recursive
            deep = deep[0]

    def test_a_slow_client_costs_only_itself(self) -> None:
        self.app.config.max_send_buffer = 100_000
        slow, quick = self.subscribed(), self.subscribed()
        count, text = 300, "x" * 30_000
        received: list[str] = []

        def read() -> None:
            for _ in range(count):
                received.append(quick.recv_json()["message"])

        reader = threading.Thread(target=read)
        reader.start()
        left = self.left
        for i in range(count):
            self.assertTrue(self.app.broadcast("____", f"{i} {text}"))
            self.until(lambda: len(received) > i)  # noqa: B023 - it is called at once
        reader.join()
        self.assertEqual([each.split()[0] for each in received], [str(i) for i in range(count)])
        self.assertEqual(len(left), 1)
        texts = []
        with self.assertRaises(Closed) as closed:  # what it gets is in order, and then the reason
            while True:
                texts.append(int(slow.recv_json()["message"].split()[0]))
        self.assertEqual(texts, list(range(len(texts))))
        self.assertEqual(closed.exception.code, 1013)

    def test_a_client_that_does_not_read_its_answers_is_not_read_either(self) -> None:
        self.app.config.max_send_buffer = 200_000
        client = self.connect()
        message = json.dumps({"channel": "____", "message": "echo", "payload": "x" * 50_000})
        count = 400

        def write() -> None:
            for _ in range(count):
                client.send_text(message)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(count):
            self.assertEqual(len(client.recv_text(20)), 50_000)
        writer.join()

    def test_threads(self) -> None:
        client = self.subscribed()
        threads, each = 8, 200

        def send(who: int) -> None:
            for i in range(each):
                self.app.broadcast("____", f"{who} {i}")

        started = [threading.Thread(target=send, args=(who,)) for who in range(threads)]
        for thread in started:
            thread.start()
        seen: dict[str, list[int]] = {str(who): [] for who in range(threads)}
        for _ in range(threads * each):
            who, _, number = client.recv_json()["message"].partition(" ")
            seen[who].append(int(number))
        for thread in started:
            thread.join()
        self.assertEqual(seen, {str(who): list(range(each)) for who in range(threads)})


class KeptTest(ServerTest):
    """What keep() promises, at the server."""

    def configure(self, app: WebChannels) -> None:
        app.channels_support("a")
        app.keep("a", 5)
        app.channels_support("b")

    def ask(self, channel: str = "a", since: Any = None,
            **options: Any) -> tuple[WebSocketClient, JsonObject]:
        """A client, and what confirms its subscription."""
        client = self.connect(**{"subprotocol": "webchannels.v1", **options})
        return client, self.ask_again(client, channel, since)

    def ask_again(self, client: WebSocketClient, channel: str = "a",
                  since: Any = None) -> JsonObject:
        asked = {"channel": channel, "message": "subscribe", "ref": 1}
        client.send_json(asked if since is None else {**asked, "since": since})
        reply: JsonObject = client.recv_json()
        self.assertEqual(reply.get("ref"), 1)
        return reply

    def tell(self, *payloads: Any, channel: str = "a", **options: Any) -> None:
        for payload in payloads:
            self.app.broadcast(channel, "m", payload, **options)

    def all(self, client: WebSocketClient) -> list[JsonObject]:
        """What it is sent, until nothing is due any more."""
        pushes: list[JsonObject] = []
        end = json.dumps({"channel": "____", "message": "echo", "ref": 99, "payload": "end"})
        client.send_text(end)
        while True:
            push = client.recv_json()
            if push.get("ref") == 99:
                if not any(kept.readers for kept in self.app._history.kept.values()):
                    return pushes
                client.send_text(end)
            else:
                pushes.append(push)

    def payloads(self, client: WebSocketClient) -> list[Any]:
        return [push["payload"] for push in self.all(client) if "payload" in push]

    def test_only_the_confirmation_tells_the_position(self) -> None:
        self.app.keep("told")
        self.app.channels_support("told")
        self.app.channel("/told/say", lambda: "said")
        client = self.connect(subprotocol="webchannels.v1")
        client.send_json({"channel": "told", "message": "subscribe", "ref": 1})
        self.assertIn("at", client.recv_json())
        client.send_json({"channel": "told", "message": "say", "ref": 2})
        self.assertEqual(client.recv_json(), {"ref": 2, "payload": "said"})

    def test_a_position_that_is_none_is_not_held(self) -> None:
        """While Redis is asked what it has, which may take seconds, anyone may send long ones."""
        self.ask()
        kept = self.app._history.kept["a"]
        kept.fetching = 1
        for since in "x" * 100_000, ["x"], "abc.7":
            self.ask(since=since)
        self.assertEqual([each.since for each in kept.readers.values()], [".0", ".0", "abc.7"])

    def test_who_comes_back_gets_what_it_missed(self) -> None:
        client, reply = self.ask()
        epoch, _, number = reply["at"].partition(".")
        self.assertEqual((reply, number), ({"ref": 1, "payload": "Subscription: OK", "channel": "a",
                                            "at": f"{epoch}.0"}, "0"))
        self.tell("x", None)
        self.app.broadcast("a", "text")
        pushes = [{"n": 1, "channel": "a", "message": "m", "payload": "x"},
                  {"n": 2, "channel": "a", "message": "m", "payload": None},
                  {"n": 3, "channel": "a", "message": "text"}]
        self.assertEqual([client.recv_json() for _ in pushes], pushes)
        client.close()
        for seen in range(4):  # in the middle of a replay, too, its position is that of a push
            client, reply = self.ask(since=f"{epoch}.{seen}")
            self.assertEqual((reply["at"], "missed" in reply), (f"{epoch}.{seen}", False))
            self.assertEqual(self.all(client), pushes[seen:])
        self.tell("live")
        self.assertEqual(client.recv_json()["n"], 4)

    def test_who_is_new_gets_what_is_kept(self) -> None:
        self.app.keep("b", 5, rewind=False)
        self.tell(*range(7))
        self.tell(*range(7), channel="b")
        client, reply = self.ask()
        self.assertRegex(reply["at"], "[.]2$")
        self.assertEqual(self.payloads(client), [2, 3, 4, 5, 6])
        client, reply = self.ask("b")
        self.assertRegex(reply["at"], "[.]7$")
        self.tell("live", channel="b")
        self.assertEqual(self.payloads(client), ["live"])
        self.assertEqual(self.payloads(self.ask("b", reply["at"])[0]), ["live"])

    def test_what_cannot_be_whole_is_missed(self) -> None:
        self.app.keep("b", 2, rewind=False)
        for channel in ("a", "b"):
            at = self.ask(channel)[1]["at"]
            epoch = at.partition(".")[0]
            self.tell(*range(9), channel=channel)
            forged: list[Any] = [
                at, f"{epoch}.3", f"{epoch}.10", f"{epoch}.-1", "00000000.9", "", "9", 9,
                f"{epoch}.{10 ** 30}", f"{epoch}.9\n", f"{epoch}.9 ", epoch, [at], {}, False,
                f"{epoch}.\u0669", "." * 10_000]
            for since in forged:
                client, reply = self.ask(channel, since)
                self.assertIs(reply["missed"], True, since)
                kept = [4, 5, 6, 7, 8] if channel == "a" else []
                self.assertEqual(reply["at"], f"{epoch}.{9 - len(kept)}")
                self.assertEqual(self.payloads(client), kept)

    def test_an_exclusion_is_no_gap(self) -> None:
        client, reply = self.ask()
        [sender] = self.app.connected_clients()
        other = self.ask()[0]
        self.tell("its own", exclude=sender)
        self.tell("not kept", only=sender)
        self.tell("to all")
        self.assertEqual(self.payloads(other), ["its own", "to all"])
        self.assertEqual([(push.get("n"), push.get("payload")) for push in self.all(client)],
                         [(1, None), (None, "not kept"), (2, "to all")])
        epoch = reply["at"].partition(".")[0]
        client.close()
        client, reply = self.ask(since=f"{epoch}.1")
        self.assertEqual((self.payloads(client), "missed" in reply), (["to all"], False))

    def test_all_kinds_of_guards(self) -> None:
        app = self.app
        app.keep("g/:name", 9)

        def enter(client: ChannelClient, channel: str) -> str:
            app.subscribe(client, channel)
            self.tell("meanwhile", channel=channel)
            return "in"

        @app.channel("/g/awaited/subscribe")
        async def enter_later(client: ChannelClient, channel: str) -> str:
            enter(client, channel)
            await asyncio.sleep(0)
            self.tell("later", channel=channel)
            await asyncio.sleep(0.01)
            return "in"
        app.channel("/g/plain/subscribe", enter)
        app.channel("/g/threaded/subscribe", enter, threaded=True)
        for name in ("plain", "threaded", "awaited"):
            channel = f"g/{name}"
            later = ["later"] if name == "awaited" else []
            client, reply = self.ask(channel)
            self.assertEqual(reply, {"ref": 1, "payload": "in", "channel": channel,
                                     "at": reply["at"]})
            self.assertEqual(self.payloads(client), ["meanwhile", *later])
            client, again = self.ask(channel, reply["at"])
            self.assertEqual((again["at"], "missed" in again), (reply["at"], False))
            self.assertEqual(self.payloads(client), 2 * ["meanwhile", *later])

    def test_a_guard_lets_in_the_second_time_or_elsewhere(self) -> None:
        app, tries = self.app, itertools.count()

        @app.channel("/door/subscribe")
        def enter(client: ChannelClient) -> None:
            if not next(tries) % 2:
                raise ChannelError("Knock again")
            app.subscribe(client, "a")
        self.tell("secret")
        client, reply = self.ask("door", "00000000.0")
        self.assertEqual((reply["error"], self.all(client)), ("Knock again", []))
        self.assertEqual(self.ask_again(client, "door", "00000000.0"), {"ref": 1, "payload": None})
        at = client.recv_json()  # `since` was that of another channel
        self.assertEqual(at, {"channel": "a", "at": at["at"]})
        self.assertEqual(self.payloads(client), ["secret"])

    def test_subscribed_from_outside_a_message(self) -> None:
        client = self.connect(subprotocol="webchannels.v1")
        plain = self.connect()
        self.tell(1, 2)
        for each in self.until(lambda: len(both := self.app.connected_clients()) == 2 and both):
            self.assertTrue(self.app.subscribe(each, "a"))
        pushes = self.all(client)
        self.assertEqual(pushes[0], {"channel": "a", "at": pushes[0]["at"]})
        self.assertEqual([push["payload"] for push in pushes[1:]], [1, 2])
        for number in (1, 2):
            self.assertEqual(plain.recv_json(),
                             {"channel": "a", "message": "m", "payload": number})

    def test_who_has_no_subprotocol(self) -> None:
        self.app.broadcast("a", "text")
        self.tell(1)
        self.app.broadcast("a", b"bytes")
        client = self.connect()
        client.send_json({"channel": "a", "message": "subscribe", "since": "00000000.1"})
        self.assertEqual([client.recv_text() for _ in range(2)], ["Subscription: OK", "text"])
        self.assertEqual(client.recv_json(), {"channel": "a", "message": "m", "payload": 1})
        self.assertEqual(client.recv(), (BINARY, b"bytes"))
        self.tell("none", exclude=self.app.connected_clients())
        self.tell("live")
        self.assertEqual(client.recv_json()["payload"], "live")

    def test_bytes_are_kept(self) -> None:
        client, reply = self.ask()
        self.app.broadcast("a", b"bytes")
        self.app.broadcast("a", "trace", b"\n" * 2000)
        for each in (client, self.ask(since=reply["at"])[0], self.ask(deflate=True)[0]):
            self.assertEqual(each.recv(), (BINARY, b'{"n":1,"channel":"a"}\nbytes'))
            opcode, data = each.recv()
            self.assertEqual((opcode, data), (BINARY, b'{"n":2,"channel":"a","message":"trace"}\n'
                                              + b"\n" * 2000))

    def test_unsubscribed_and_subscribed_again(self) -> None:
        client, reply = self.ask()
        self.tell(1)
        at = reply["at"].replace(".0", ".1")
        self.assertEqual(client.recv_json()["n"], 1)
        client.send_json({"channel": "a", "message": "unsubscribe", "ref": 1})
        client.recv_json()
        self.tell(2)
        self.assertEqual(self.ask_again(client, "a", at)["at"], at)
        self.assertEqual(self.payloads(client), [2])
        self.assertEqual(self.ask_again(client, "a", at)["at"], at.replace(".1", ".2"))
        self.assertEqual(self.all(client), [])  # it was subscribed, and had it all

    def test_a_replay_of_more_than_the_send_buffer(self) -> None:
        app, count = self.app, 400
        app.keep("a", count)
        app.config.max_send_buffer, app.config.max_kept = 1 << 16, 1 << 26
        client = self.connect(subprotocol="webchannels.v1", timeout=30)
        text = random_text(50_000)
        self.tell(*[[number, text] for number in range(count)])
        self.ask_again(client)
        self.until(lambda: all(each._behind for each in app.connected_clients()))
        app.keep("a", count + 1)
        self.tell("live")  # while it has not read the rest
        self.assertEqual([client.recv_json()["payload"][0] for _ in range(count)],
                         [*range(count)])
        self.assertEqual(client.recv_json()["payload"], "live")

    def test_who_is_too_slow_misses_something_but_stays(self) -> None:
        app = self.app
        client, reply = self.ask()
        epoch = reply["at"].partition(".")[0]
        text = random_text(500_000)
        for number in range(40):  # 20 MB, of which 5 pieces are kept
            self.tell([number, text])
        self.until(lambda: [each for each in app.connected_clients() if each._behind])
        seen, told = 0, []
        while seen < 40:
            push = client.recv_json()
            if "at" in push:
                self.assertEqual(push, {"channel": "a", "at": push["at"], "missed": True})
                self.assertGreater(int(push["at"].partition(".")[2]), seen)
                seen = int(push["at"].partition(".")[2])
                told.append(push["at"])
            else:
                seen += 1
                self.assertEqual((push["n"], push["payload"][0]), (seen, seen - 1))
        self.assertEqual(told, [f"{epoch}.35"])

    def test_bounds(self) -> None:
        app, history = self.app, self.app._history
        app.keep("b", 1000)
        app.config.max_kept = 50_000

        def kept(channel: str = "b") -> list[Any]:
            return self.payloads(self.ask(channel)[0])
        with self.assertLogs("webchannels", "WARNING") as logs:
            logging.getLogger("webchannels").setLevel(logging.WARNING)
            self.tell(*range(200), channel="b")
        self.assertIn("max_kept does not suffice to keep 1000 messages", logs.output[0])
        logging.getLogger("webchannels").setLevel(logging.CRITICAL + 1)
        numbers = kept()
        self.assertEqual(numbers, [*range(200 - len(numbers), 200)])
        self.assertLess(50, len(numbers))
        app.keep("b", 3)  # while it serves
        self.assertEqual(kept(), [197, 198, 199])
        app.config.kept_ttl = 0.1
        at = self.ask("b")[1]["at"].replace(".197", ".200")
        time.sleep(0.15)
        client, reply = self.ask("b", at)  # nothing was lost, however old it is
        self.assertNotIn("missed", reply)
        self.assertEqual((kept(), kept()), ([], []))
        self.assertEqual({*history.kept}, {"b"})
        client.close()
        for each in app.connected_clients():
            each.close()
        self.until(lambda: not history.kept)  # nobody has used it for long
        self.assertEqual(history._weight, 0)
        self.assertIs(self.ask("b", at)[1]["missed"], True)

    def test_all_channels_have_a_bound(self) -> None:
        app, history = self.app, self.app._history
        app.keep(":room", 10)
        client, reply = self.ask()
        self.tell("first")
        app.config.max_kept_total = 200_000
        for number in range(1000):
            self.tell("x" * 100, channel=f"room{number}")
            self.assertLessEqual(history._weight, 200_000)
        self.until(lambda: "room999" in history.kept)
        self.assertEqual(history._weight, sum(
            each.weight + (0 if name == "a" else webchannels._POSITION)
            for name, each in history.kept.items()))
        self.assertNotIn("room1", history.kept)
        self.assertIs(self.ask("a", reply["at"])[1]["missed"], True)
        self.tell("next")  # it has a subscriber, and goes on
        self.assertEqual([push["n"] for push in self.all(client)], [1, 2])

    def test_missed_is_told_once(self) -> None:
        self.app.keep("a", 200)
        self.tell(*200 * [random_text(50_000)])  # more than is sent before it asks again
        client = self.ask(since="00000000.1")[0]
        client.send_json({"channel": "a", "message": "subscribe", "ref": 2})
        numbers, push = [0], client.recv_json()
        while "ref" not in push:
            numbers.append(push["n"])
            push = client.recv_json()
        self.assertEqual((push["at"].split(".")[1], "missed" in push), (str(numbers[-1]), False))

    def test_channels_that_clients_name_leave_room_for_the_others(self) -> None:
        app, history = self.app, self.app._history
        app.keep("rooms/:room", 5)
        app.channel("/rooms/:room/subscribe",
                    lambda client, channel: app.subscribe(client, channel))
        app.config.max_kept_total = 100_000
        self.tell(1)
        client, stays = self.connect(subprotocol="webchannels.v1"), self.ask()[0]
        for message in ("subscribe", "unsubscribe", "subscribe"):
            for number in range(200):
                client.send_json({"channel": f"rooms/{number}", "message": message, "ref": 1})
                self.assertNotIn("error", client.recv_json())
            self.tell(2)
            self.assertLessEqual(history._weight, 100_000)
        self.assertEqual([push["payload"] for push in self.all(stays)], [1, 2, 2, 2])
        client.close()
        self.until(lambda: len(app.connected_clients()) == 1)
        self.assertEqual(self.payloads(self.ask()[0]), [1, 2, 2, 2])
        self.assertEqual(history._weight, sum(
            each.weight + (0 if name == "a" else webchannels._POSITION)
            for name, each in history.kept.items()))
        self.assertLess(len(history.kept), 80)

    def test_kept_before_it_serves_and_from_any_thread(self) -> None:
        app = WebChannels(Config(shutdown_timeout=0.1))
        app.keep("____", 10)
        self.assertFalse(app.broadcast("____", "early"))
        with serve(app) as url:
            self.assertFalse(app.broadcast("____", "nobody is there"))
            self.url = url
            client, reply = self.ask("____")
            self.assertEqual([client.recv_json()["message"] for _ in range(2)],
                             ["early", "nobody is there"])
        app.broadcast("____", "late")
        with serve(app) as self.url:
            client, again = self.ask("____", reply["at"].replace(".0", ".1"))
            self.assertNotIn("missed", again)
            self.assertEqual([client.recv_json()["message"] for _ in range(2)],
                             ["nobody is there", "late"])

    def test_kept_from_now_on(self) -> None:
        client, reply = self.ask("b")
        self.assertEqual(reply, {"ref": 1, "payload": "Subscription: OK"})
        self.app.keep("b")
        self.tell(1, channel="b")
        at, push = client.recv_json(), client.recv_json()
        self.assertEqual((at["at"][-2:], push["n"]), (".0", 1))
        self.tell(2, channel="b")
        self.assertEqual(self.payloads(self.ask("b", at["at"])[0]), [1, 2])

    def test_threads_broadcast_while_many_come_back(self) -> None:
        app, threads, each, pages = self.app, 8, 150, 60
        app.keep("a", threads * each)

        def flood(thread: int) -> None:
            for number in range(each):
                app.broadcast("a", "m", [thread, number])
                time.sleep(0.001)
        at = self.ask()[1]["at"]
        flooding = [threading.Thread(target=flood, args=(number,)) for number in range(threads)]
        for one in flooding:
            one.start()
        got: list[dict[int, Any]] = []
        for page in range(pages):
            seen: dict[int, Any] = {}
            since: str = at
            for _ in range(3):
                client, reply = self.ask(since=since)
                self.assertEqual((reply["at"], "missed" in reply), (since, False))
                for _ in range(5 if page < pages - 1 else threads * each):
                    if len(seen) < threads * each:
                        push = client.recv_json()
                        self.assertEqual(push["n"], len(seen) + 1)
                        seen[push["n"]] = push["payload"]
                since = f"{at.partition('.')[0]}.{len(seen)}"
                client.close()
            got.append(seen)
        for one in flooding:
            one.join()
        whole = got[-1]
        self.assertEqual([len(whole), *(whole[n] for n in got[0])],
                         [threads * each, *got[0].values()])
        for thread in range(threads):
            self.assertEqual([n for t, n in whole.values() if t == thread], [*range(each)])

    def test_any_schedule(self) -> None:
        for seed in (1, random.randrange(1 << 32)):
            with self.subTest(seed=seed):
                self.any_schedule(random.Random(seed), f"c{seed}")

    def any_schedule(self, chance: random.Random, channel: str) -> None:
        """Random steps; beside them, what the rules alone say of each number and position."""
        app, settings = self.app, self.app.config
        settings.max_send_buffer, settings.shutdown_timeout = 1 << 16, 0.05
        app.channels_support(channel)
        app.channel("/____/id", lambda client: client.id)
        log: list[tuple[Any, set[str], int]] = [("", set(), 0)]  # by number; the last is a weight
        before, count, rewind, epoch = 0, 9, True, ""  # numbers up to `before` are not kept
        app.keep(channel, count)
        pages = [KeptPage() for _ in range(4)]

        def trim() -> None:
            nonlocal before
            while before < len(log) - 1 and (
                    len(log) - 1 - before > count
                    or sum(each[2] for each in log[before + 1:]) > settings.max_kept):
                before += 1

        def ask(page: KeptPage, about: str, message: str, **more: Any) -> JsonObject:
            page.client.send_json({"channel": about, "message": message, "ref": 1, **more})
            while True:
                push: JsonObject = page.client.recv_envelope()
                if push.get("ref") == 1:
                    return push
                take(page, push)

        def take(page: KeptPage, push: JsonObject) -> None:
            if push.get("payload") == "not kept":
                self.assertNotIn("n", push)
                return
            self.assertTrue(page.there, push)
            at = int(page.at or -1)
            if "at" in push:  # it was too slow
                self.assertEqual((push["missed"], push["at"][:8]), (True, epoch))
                page.at = push["at"][9:]
                self.assertTrue(at < int(page.at) < len(log), (at, push, before))
                return
            self.assertEqual(push["n"], at + 1)
            page.at = str(push["n"])
            data, without, _ = log[push["n"]]
            self.assertEqual(push.get("payload"), None if page.id in without else data)

        def come(page: KeptPage) -> None:
            nonlocal epoch
            if not page.id:
                page.client = self.connect(subprotocol="webchannels.v1")
                page.id = ask(page, "____", "id")["payload"]
            since: Any = page.at and f"{epoch}.{page.at}"
            if page.there:
                self.assertEqual(ask(page, channel, "subscribe", since=since)["at"],
                                 f"{epoch}.{page.at}")
                return
            trim()
            last = len(log) - 1
            known = [f"{epoch}.{number}" for number in range(before, last + 1)] if epoch else []
            since = chance.choice(3 * [since or None] + 3 * known + [
                None, f"{epoch}.{before - 1}", f"{epoch}.{last + 1}", f"{epoch}.{10 ** 30}",
                f"{'f' * 8}.{last}", "", [1], f"{epoch}.-1"])
            reply = ask(page, channel, "subscribe", **({} if since is None else {"since": since}))
            epoch = epoch or reply["at"][:8]
            place = before if rewind else max(before, last)
            at = since if since in known else f"{epoch}.{place}"
            self.assertEqual((reply["at"], "missed" in reply),
                             (at, since is not None and since not in known), since)
            page.at, page.there = at[9:], True

        def leave(page: KeptPage) -> None:
            if page.id:
                page.client.close()
                self.until(lambda: page.id not in {each.id for each in app.connected_clients()})
            page.id, page.there = "", False

        def unsubscribe(page: KeptPage) -> None:
            if page.id:
                ask(page, channel, "unsubscribe")
                page.there = False

        def read(page: KeptPage) -> None:
            if page.id:
                ask(page, "____", "echo")

        def broadcast() -> None:
            for _ in range(chance.choice([1, 1, 1, 1, 1, 1, 50])):
                text = random_text(chance.choice([4, 400, 30_000]))
                data: Any = chance.choice([text, text.encode()])
                without = {each.id for each in chance.sample(pages, chance.randrange(3))}
                app.broadcast(channel, "m", data, exclude=without)
                app.broadcast(channel, "m", "not kept", only=[pages[0].id])
                note(data, without)
            app._call(lambda: None)  # all that has been done

        def note(data: Any, without: set[str]) -> None:
            nonlocal before
            head = len(f'{{"channel":"{channel}","message":"m"}}')
            size = 2 * (head + 13 + len(data)) if isinstance(data, str) else (
                head + 1 + 2 * len(data))
            log.append((data, without, webchannels._WEIGHT + size))
            trim()

        def keep() -> None:
            nonlocal count, rewind
            count, rewind = chance.choice([1, 3, 9, 40]), chance.random() < 0.7
            app.keep(channel, count, rewind=rewind)

        def limit() -> None:
            settings.max_kept = chance.choice([1000, 200_000, 1 << 22])

        def grow_old() -> None:
            nonlocal before
            with mock.patch.object(settings, "kept_ttl", -1):
                app._call(lambda: app._history.trim(app._history.kept[channel]))
            before = len(log) - 1

        def restart() -> None:
            app.down()
            for page in pages:
                leave(page)
            app.broadcast(channel, "m", "away")
            note("away", set())
            listening = socket.create_server(("127.0.0.1", 0))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)  # as all it accepts
            self.url = app.up(sock=listening, block=False)

        broadcast()
        restart()
        for _ in range(200):
            chance.choice([*30 * [broadcast], keep, keep, limit, grow_old, restart])()
            page = chance.choice(pages)
            chance.choice([come, come, come, read, read, leave, unsubscribe])(page)
        for page in pages:
            while page.there and page.at != str(len(log) - 1):
                read(page)
            leave(page)

    def test_the_clock_is_set(self) -> None:
        at = self.ask()[1]["at"]
        self.tell(1)
        with mock.patch("time.time", lambda: 4e9):
            self.tell(2)
            self.assertEqual(self.payloads(self.ask(since=at)[0]), [1, 2])

    def test_another_server_in_its_place(self) -> None:
        at = self.ask()[1]["at"]
        app = WebChannels(Config(shutdown_timeout=0.1))
        app.keep("a")
        app.channels_support("a")
        with serve(app) as self.url:
            self.assertIs(self.ask(since=at)[1]["missed"], True)

    def test_a_bus_of_ones_own(self) -> None:
        class Wire(webchannels.Bus):
            def __init__(self) -> None:
                self.wanted: set[str] = set()
                self.peers: list[Wire] = []

            def publish(self, channel: str, data: bytes) -> None:
                for peer in self.peers:
                    if channel in peer.wanted:
                        peer.deliver(channel, data)

            def listen(self, channel: str, wanted: bool) -> None:
                (self.wanted.add if wanted else self.wanted.remove)(channel)
        wires = [Wire(), Wire()]
        apps = [WebChannels(Config(bus=wire, shutdown_timeout=0.1)) for wire in wires]
        for app, wire in zip(apps, wires):
            wire.peers = [each for each in wires if each is not wire]
            app.channels_support("a")
            app.channel("/____/echo", lambda payload: payload)
            app.keep("a", 5)
        apps[0].broadcast("a", "m", "early")
        with serve(apps[0]) as self.url, serve(apps[1]) as other:
            self.app = apps[0]
            self.until(lambda: "a" in wires[0].wanted)
            apps[1].broadcast("a", "m", 1)
            self.until(lambda: apps[0]._history.kept["a"].last == 2)
            client, reply = self.ask()
            self.assertEqual(self.payloads(client), ["early", 1])
            at = reply["at"].replace(".0", ".2")
            client.close()
            self.until(lambda: not apps[0].connected_clients())
            apps[1].broadcast("a", "m", 2)  # while nobody is subscribed there
            self.until(lambda: apps[0]._history.kept["a"].last == 3)
            client, reply = self.ask(since=at)
            self.assertEqual((reply["at"], self.payloads(client)), (at, [2]))
            wires[0].missed()
            told = client.recv_json()
            self.assertEqual((told["missed"], told["at"][-2:]), (True, ".0"))
            self.assertNotEqual(told["at"][:8], at[:8])
            self.assertEqual(self.payloads(client), ["early", 1, 2])
            self.assertIs(self.ask(since=at)[1]["missed"], True)
            self.url, self.app = other, apps[1]
            self.assertIs(self.ask(since=at)[1]["missed"], True)  # each numbers for itself
            for app in apps:
                app.config.kept_ttl = 0.02
                for each in app.connected_clients():
                    each.close()
            self.until(lambda: not wires[0].wanted and not wires[1].wanted)

    def test_what_cannot_be_kept_is_an_error(self) -> None:
        for channel in ("", "/a", "a/", "x" * 300, "a/:b::bool"):
            with self.assertRaises(ValueError):
                self.app.keep(channel)
        with self.assertRaises(ValueError):
            self.app.keep("a", 0)
        with self.assertRaises(TypeError):
            self.app.keep("a", "5")  # type: ignore[arg-type]


def random_text(size: int) -> str:
    """What nobody can compress by much."""
    return base64.b64encode(Random(1).randbytes(size * 3 // 4)).decode()


class ThreadsTest(ServerTest):
    """What other threads call: nothing waits for ever, whatever locks are held."""

    def configure(self, app: WebChannels) -> None:
        self.lock, self.entered = threading.Lock(), threading.Event()
        app.config.shutdown_timeout = 0.5
        app.config.max_threads = 2
        app.channel("/____/hold", self.hold)
        app.channel("/____/wait", self.wait, threaded=True)
        self.waiting = threading.Event()

    def hold(self) -> str:
        """Hold the event loop until the lock is free."""
        self.entered.set()
        with self.lock:
            return "held"

    def wait(self, payload: float) -> None:
        self.entered.set()
        self.waiting.wait(payload)

    def in_thread(self, call: Callable[[], Any], timeout: float = 10) -> Any:
        """What it returns or raises in a thread; the test fails if it takes too long."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        threading.Thread(target=run, daemon=True).start()
        return future.result(timeout)

    def held(self, client: WebSocketClient) -> contextlib.ExitStack:
        """Have a handler wait for the lock, which is released at the end of the block."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.lock)
        client.send_json({"channel": "____", "message": "hold"})
        self.assertTrue(self.entered.wait(10))
        return stack

    def test_a_lock_that_a_handler_wants(self) -> None:
        app, one, two = self.app, self.subscribed(), self.subscribed()
        first, second = app.connected_clients()

        def call() -> Any:
            sent = [app.broadcast("____", str(i)) for i in range(100)]
            return [*sent, app.broadcast("none", "x"), first.send("last"),
                    app.connected_clients(), app.connected_clients("____"),
                    app.disconnected_clients(), app.subscriptions()]
        with self.held(two):
            there = [first, second]
            self.assertEqual(self.in_thread(call), [
                *[True] * 100, False, True, there, there, [], {"____": there}])
        got = [one.recv_json()["message"] for _ in range(101)]
        self.assertEqual(got, [*map(str, range(100)), "last"])

    def test_a_log_handler_that_broadcasts(self) -> None:
        class Broadcasts(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                in_emit.set()
                entered.wait(10)  # until a handler wants to log, too
                app.broadcast("____", record.getMessage())
        log, in_emit = logging.getLogger("webchannels-test"), threading.Event()
        app, entered, handler = self.app, self.entered, Broadcasts()
        log.addHandler(handler)
        self.addCleanup(log.removeHandler, handler)

        @self.app.channel("/____/log")
        def tell() -> None:
            self.entered.set()
            log.warning("from a handler")
        client = self.subscribed()

        def first() -> None:
            log.warning("from a thread")
        thread = threading.Thread(target=first, daemon=True)
        thread.start()
        self.assertTrue(in_emit.wait(10))
        client.send_json({"channel": "____", "message": "log"})
        self.assertEqual([client.recv_json()["message"] for _ in range(2)],
                         ["from a thread", "from a handler"])

    def test_a_lock_that_a_call_among_those_handed_over_wants(self) -> None:
        """As that of a log handler which broadcasts, when the loop tells of a slow client."""
        client = self.subscribed()

        def call() -> None:
            for _ in range(3):
                self.app.broadcast("____", "x" * 90_000)
        with mock.patch.object(webchannels, "_STUCK", 60), self.lock:
            self.app._give(self.hold)
            self.assertTrue(self.entered.wait(10))
            self.in_thread(call)
        for _ in range(3):
            self.assertEqual(len(client.recv_json()["message"]), 90_000)

    def test_a_thread_far_ahead_of_a_loop_that_is_held_is_told(self) -> None:
        self.app.config.max_send_buffer = 100_000
        app = WebChannels(self.app.config)
        app.channel("/____/hold", self.hold)
        app.channels_support("____")
        self.url = self.enterContext_(serve(app))
        one, two = self.subscribed(), self.subscribed()
        count = 0

        def flood() -> None:
            nonlocal count
            while count < 1000:
                app.broadcast("____", "x" * 90_000)
                count += 1
        with mock.patch.object(webchannels, "_STUCK", 0.2), self.held(two):
            with self.assertRaisesRegex(TimeoutError, "held the event loop"):
                self.in_thread(flood)
            self.assertLess(count, 20)  # of 90,000 bytes, within 800,000; or twice that
        self.until(lambda: app.broadcast("____", "on") or True)
        for _ in range(count):
            self.assertEqual(len(one.recv_json()["message"]), 90_000)

    def test_what_must_wait_for_the_loop_gives_up(self) -> None:
        client = self.subscribed()
        there = self.app.connected_clients()[0]
        with mock.patch.object(webchannels, "_STUCK", 0.1), self.held(client):
            for call in (lambda: self.app.subscribe(there, "room"), there.close):
                with self.assertRaisesRegex(TimeoutError, "held the event loop"):
                    self.in_thread(call)
        client.send_json({"channel": "____", "message": "echo", "payload": "x", "ref": 1})
        while client.recv_json().get("ref") != 1:
            pass
        self.assertEqual((there.channels, there.connected), ({"____"}, True))

    def test_two_apps_whose_handlers_call_each_other(self) -> None:
        other = WebChannels()
        both = threading.Barrier(2)

        def call(app: WebChannels) -> str:
            both.wait(10)
            return f"{app.broadcast('____', 'x')} {app.connected_clients()}"
        self.app.route("/call", lambda: call(other))
        other.route("/call", lambda: call(self.app))
        with serve(other) as url, Connection(url) as one, Connection(self.url) as two:
            for each in (one, two):
                each.send_raw(b"GET /call HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for each in (one, two):
                self.assertEqual(each.response().body, b"False []")

    def test_what_a_handlers_threads_send_comes_before_its_reply(self) -> None:
        client = self.subscribed()

        @self.app.channel("/____/work")
        def work(client: ChannelClient) -> str:
            def send() -> None:
                for i in range(100):
                    client.send(str(i))
            thread = threading.Thread(target=send)
            thread.start()
            thread.join(5)
            self.app.broadcast("____", "100")
            return "done"

        @self.app.channel("/____/work-threaded", threaded=True)
        def threaded(client: ChannelClient) -> str:
            for i in range(101):
                client.send(str(i))
            return "done"
        for name in ("work", "work-threaded"):
            client.send_json({"channel": "____", "message": name})
            self.assertEqual([client.recv_json()["message"] for _ in range(102)],
                             [*map(str, range(101)), "done"])

    def test_a_subscription_is_confirmed_before_anything_is_pushed(self) -> None:
        @self.app.channel("/room/subscribe")
        def guard(client: ChannelClient) -> str:
            self.app.subscribe(client, "room")
            thread = threading.Thread(target=self.app.broadcast, args=("room", "push"))
            thread.start()
            thread.join(5)
            return "Subscription: OK"
        self.assertEqual(self.subscribed("room").recv_json()["message"], "push")

    def test_down_sends_what_was_handed_over_before(self) -> None:
        client = self.subscribed()
        with self.held(client):
            for i in range(200):
                self.assertTrue(self.app.broadcast("____", str(i)))
            thread = threading.Thread(target=self.app.down)
            thread.start()
            self.until(lambda: len(self.app._handover.calls) > 200)  # type: ignore[union-attr]
        self.assertEqual([client.recv_json()["message"] for _ in range(201)],
                         [*map(str, range(200)), "held"])
        self.assertEqual(client.recv_close()[0], 1001)
        thread.join(10)

    def test_what_threads_have_sent_meanwhile_leaves_at_once(self) -> None:
        client = self.subscribed()
        [there] = self.app.connected_clients()
        transport = there._transport
        written: list[bytes] = []
        with self.held(self.connect()):
            there._transport = mock.Mock(wraps=transport, write=written.append)
            for i in range(50):
                self.app.broadcast("____", str(i))
            self.app.broadcast("____", "x" * webchannels._READ_AHEAD)  # what is much does not wait
            there.send("last")
            there.send("over")
        self.until(lambda: any(b"over" in each for each in written))
        there._transport = transport
        self.assertEqual([each.count(b"channel") for each in written], [50, 1, 2])
        self.assertFalse(there._corked)
        self.app.broadcast("____", "now")
        self.assertEqual(client.recv_json()["message"], "now")

    def test_a_log_handler_that_broadcasts_of_slow_clients(self) -> None:
        depths: list[int] = []

        def tell(*_: Any) -> None:
            depths.append(len(inspect.stack(0)))
            self.app.broadcast("____", "one is closed")
            self.in_thread(lambda: self.app.broadcast("____", "from a thread"))
        pages = [self.subscribed() for _ in range(4)]
        *slow, _ = self.app.connected_clients()
        with mock.patch.object(webchannels.logger, "warning", tell):
            with self.held(self.connect()):
                self.app.config.max_send_buffer = 1000
                for each in slow:
                    each._behind = True
                for text in "ab":
                    self.app.broadcast("____", text * 600)
            got = [pages[3].recv_json()["message"][:13] for _ in range(8)]
        self.assertEqual(got[:5], ["a" * 13, "b" * 13, *3 * ["one is closed"]])
        self.assertEqual(got[5:], 3 * ["from a thread"])
        self.assertEqual(len({*depths}), 1)
        for each, page in zip(slow, pages):
            self.app._give(each.resume_writing)
            self.assertEqual(page.recv_close()[0], 1013)

    def test_what_threads_hand_over_leaves_turns_to_others(self) -> None:
        async def main() -> list[str]:
            loop = asyncio.get_running_loop()
            order: list[str] = []
            handover = webchannels.Handover(loop, 10 ** 9)

            def ours() -> None:
                time.sleep(0.001)
                order.append("ours")
            for _ in range(50):
                handover.give(ours)
            loop.call_soon(order.append, "another's")
            while len(order) < 51:
                await asyncio.sleep(0)
            return order
        self.assertLess(asyncio.run(main()).index("another's"), 50)

    def test_a_thread_that_is_ahead_waits_while_the_loop_catches_up(self) -> None:
        async def main() -> int:
            most, loop = 0, asyncio.get_running_loop()
            handover = webchannels.Handover(loop, 10 ** 9)

            def flood() -> None:
                nonlocal most
                for _ in range(100):
                    handover.give(lambda: time.sleep(0.002), 20_000)
                    most = max(most, len(handover.calls))
            await loop.run_in_executor(None, flood)
            return most
        self.assertLess(asyncio.run(main()), 10)  # of 20,000 bytes, not much more than _AHEAD

    def test_a_wake_up_that_never_came(self) -> None:
        client = self.subscribed()
        assert self.app._handover
        self.app._handover._woken = True  # Ctrl+C came before the thread could wake the loop
        self.app.broadcast("____", "x")
        self.assertEqual(client.recv_json()["message"], "x")

    def test_ctrl_c_among_what_threads_hand_over(self) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt
        made: list[int] = []
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            handover = webchannels.Handover(loop, 10 ** 9)
            handover.give(interrupt)
            with self.assertRaises(KeyboardInterrupt):
                handover.take()
            handover.give(lambda: made.append(1))
            handover.take()  # a notebook's loop goes on
        self.assertEqual(made, [1])

    def test_ctrl_c_while_what_threads_have_sent_leaves(self) -> None:
        left: list[Any] = []

        class Page:
            def _flush(self) -> None:
                left.append(self)
                if len(left) == 1:
                    raise KeyboardInterrupt
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            handover = webchannels.Handover(loop, 10 ** 9)
            handover.give(lambda: handover.written.extend([Page(), Page()]))  # type: ignore
            with self.assertRaises(KeyboardInterrupt):
                handover.take()
            handover.take()
        self.assertEqual((len({*left}), handover.taking), (2, False))

    def test_a_signal_handler_that_sends_while_the_loop_sends(self) -> None:
        """A trace function stands for it, which comes at every line."""
        sent = itertools.count()

        def tracer(frame: types.FrameType, event: str, value: Any) -> Any:
            if frame.f_code is not ChannelClient._flush.__code__:
                return None
            if event == "line":
                self.app.broadcast("____", f"from a signal handler: {next(sent)}")
            return tracer
        self.app.channel("/____/trace", lambda: sys.settrace(tracer))

        @self.app.channel("/____/stop")
        def stop() -> int:
            sys.settrace(None)
            return next(sent)
        client = self.subscribed()
        client.send_json({"channel": "____", "message": "trace"})
        for _ in range(5):
            client.send_json({"channel": "____", "message": "echo", "payload": "x" * 70_000})
        client.send_json({"channel": "____", "message": "stop", "ref": 1})
        got: list[int] = []
        while (reply := client.recv_json()).get("ref") != 1:
            if "signal" in reply["message"]:
                got.append(int(reply["message"].rpartition(" ")[2]))
        self.assertGreater(reply["payload"], 9)
        self.assertEqual(sorted(got), [*range(reply["payload"])])

    def test_json_is_encoded_in_the_callers_thread(self) -> None:
        encoded_in: list[int] = []
        self.app.config.json_default = lambda value: encoded_in.append(threading.get_ident())
        client = self.subscribed()
        self.app.broadcast("____", "x", object())
        self.app.connected_clients()[0].send("x", object())
        self.assertEqual(encoded_in, [threading.get_ident()] * 2)
        for _ in range(2):
            self.assertEqual(client.recv_json()["payload"], None)

    def test_a_system_that_has_no_more_threads(self) -> None:
        client = self.subscribed()
        message = {"channel": "____", "message": "wait", "payload": 0, "ref": 1}
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("none")):
            for _ in range(3):  # more than max_threads
                client.send_json(message)
                self.assertIn("500", client.recv_json()["error"])
        client.send_json(message)
        self.assertEqual(client.recv_json(), {"ref": 1, "payload": None})

    def test_threaded_handlers_wait_for_a_thread(self) -> None:
        clients = [self.subscribed() for _ in range(4)]
        with self.assertLogs("webchannels", "WARNING") as logs:
            logging.getLogger("webchannels").setLevel(logging.WARNING)
            for client in clients:
                client.send_json({"channel": "____", "message": "wait", "payload": 10, "ref": 1})
            self.until(lambda: logs.output)
            self.assertIn("config.max_threads are busy", logs.output[0])
            self.until(lambda: all(each._task for each in self.app._sockets))
        self.assertEqual(len(logs.output), 1)
        names = [each.name for each in threading.enumerate() if each.name == "webchannels"]
        self.assertEqual(len(names), 3)  # the server's, and two
        self.waiting.set()
        for client in clients:
            self.assertEqual(client.recv_json(), {"ref": 1, "payload": None})
        self.until(lambda: self.app._idle == 2)
        self.app.down()
        self.until(lambda: "webchannels" not in [each.name for each in threading.enumerate()])


class Large:
    """What can be weakly referenced."""


LARGE: contextvars.ContextVar[Large] = contextvars.ContextVar("LARGE")


class ContextTest(ServerTest):
    """Each handler runs in a context of its own, and nothing that it raises harms others."""

    SEEN: contextvars.ContextVar[str] = contextvars.ContextVar("SEEN", default="nothing")

    def configure(self, app: WebChannels) -> None:
        token = self.SEEN.set("from up()")
        self.addCleanup(self.SEEN.reset, token)

        def sync(payload: Any = "route") -> str:
            seen, _ = self.SEEN.get(), self.SEEN.set(str(payload))
            return seen

        async def asynchronous(payload: Any = "route") -> str:
            await asyncio.sleep(0)
            return sync(payload)
        for name, handler, threaded in (("def", sync, False), ("threaded", sync, True),
                                        ("async", asynchronous, False)):
            app.channel(f"/____/{name}", handler, threaded=threaded)
            app.route(f"/{name}", handler, threaded=threaded)
        for error in (GeneratorExit("x"), asyncio.CancelledError("x"), Unusual("x"), Mute(),
                      Untold()):
            self.raises(type(error).__name__, error)

    def raises(self, name: str, error: BaseException) -> None:
        def sync() -> None:
            raise error

        async def asynchronous() -> None:
            await asyncio.sleep(0)
            raise error
        for kind, handler, threaded in (("def", sync, False), ("threaded", sync, True),
                                        ("async", asynchronous, False)):
            self.app.channel(f"/____/{name}-{kind}", handler, threaded=threaded)
            self.app.route(f"/{name}-{kind}", handler, threaded=threaded)

    def test_a_context_of_its_own(self) -> None:
        client = self.connect()
        for name in ("def", "threaded", "async"):
            for _ in range(2):
                client.send_json({"channel": "____", "message": name, "payload": "leak"})
                self.assertEqual(client.recv_text(), "from up()")
                self.assertEqual(request("GET", f"{self.url}/{name}").body, b"from up()")

    def test_a_client_that_was_behind_has_no_context_of_anothers(self) -> None:
        @self.app.channel("/____/fill")
        def fill(client: ChannelClient) -> None:
            self.SEEN.set("leak")
            for each in self.app.connected_clients():
                if each is not client:
                    each.send("x" * 20_000_000)  # more than the system takes
        self.app.config.max_send_buffer = 40_000_000
        one, two = self.connect(), self.connect()
        for _ in range(2):
            one.send_json({"channel": "____", "message": "fill"})
            one.send_json({"channel": "____", "message": "def", "payload": "x"})
            self.assertEqual(one.recv_text(), "from up()")
            two.send_json({"channel": "____", "message": "def", "payload": "x"})
            self.assertEqual(len(two.recv_text()), 20_000_000)
            self.assertEqual(two.recv_text(), "from up()")

    def set_large(self) -> weakref.ref[Large]:
        """Set a variable of the context; what it holds can be watched."""
        LARGE.set(Large())
        return weakref.ref(LARGE.get())

    def test_what_a_handler_set_does_not_stay_with_another_client(self) -> None:
        left: list[weakref.ref[Large]] = []

        @self.app.channel("/____/fill")
        def fill(client: ChannelClient) -> None:
            left.append(self.set_large())
            for each in self.app.connected_clients():
                if each is not client:
                    each.send("x" * 20_000_000)  # more than the system takes
        self.app.config.max_send_buffer = 40_000_000
        one, two = self.connect(), self.connect()
        other = self.until(lambda: len(self.app._sockets) == 2 and [*self.app._sockets][1])
        one.send_json({"channel": "____", "message": "fill"})
        one.send_json({"channel": "____", "message": "echo", "payload": "x"})
        self.assertEqual(one.recv_text(), "x")
        for _ in range(5):
            two.send_json({"channel": "____", "message": "echo", "payload": "x" * 20_000})
        self.until(lambda: not other._reading)  # it is behind
        gc.collect()
        self.assertIsNone(left[0]())
        for _ in range(6):
            two.recv_text()
        self.until(lambda: other._reading)
        gc.collect()
        self.assertIsNone(left[0]())

    def test_what_a_handler_set_does_not_stay_with_whom_a_thread_has_sent_to(self) -> None:
        left: list[weakref.ref[Large]] = []

        @self.app.channel("/____/fill")
        def fill(client: ChannelClient) -> None:
            left.append(self.set_large())
            [other] = [each for each in self.app.connected_clients() if each is not client]
            thread = threading.Thread(target=other.send, args=["x" * 20_000_000])
            thread.start()
            thread.join(10)
            client.send("sent")  # after what the thread handed over
        self.app.config.max_send_buffer = 40_000_000
        one, two = self.connect(), self.connect()
        self.until(lambda: len(self.app.connected_clients()) == 2)
        one.send_json({"channel": "____", "message": "fill"})
        one.send_json({"channel": "____", "message": "echo", "payload": "x"})
        self.assertEqual([one.recv_text(), one.recv_text()], ["sent", "x"])
        gc.collect()
        self.assertIsNone(left[0]())
        self.assertEqual(len(two.recv_text()), 20_000_000)

    def test_threads_of_a_handler_that_ask_for_parameters_at_once(self) -> None:
        both, read = threading.Barrier(2), webchannels.Request.params

        def params(request: webchannels.Request) -> dict[str, Any]:
            both.wait(10)
            return read(request)

        @self.app.route("/threads")
        async def threads() -> list[Any]:
            with mock.patch.object(webchannels.Request, "params", params):
                asks = [asyncio.to_thread(self.app.params, "a") for _ in range(2)]
                return [*await asyncio.gather(*asks), None in self.app.params()]
        reply = request("GET", f"{self.url}/threads?a=b")
        self.assertEqual(reply.body, b'["b","b",false]')

    def test_base_exceptions(self) -> None:
        client = self.connect()
        for name in ("GeneratorExit", "CancelledError", "Unusual", "Mute", "Untold"):
            for kind in ("def", "threaded", "async"):
                with self.subTest(name, kind=kind):
                    client.send_json({"channel": "____", "message": f"{name}-{kind}"})
                    self.assertEqual(client.recv_text(), "ERROR : 500 - Internal error")
                    self.assertEqual(request("GET", f"{self.url}/{name}-{kind}").status, 500)
        client.send_json({"channel": "____", "message": "echo", "payload": "on"})
        self.assertEqual(client.recv_text(), "on")

    def test_an_exit_ends_the_server_and_its_error_comes_out_of_serve(self) -> None:
        for kind in ("def", "threaded", "async"):
            for error in (SystemExit(3), KeyboardInterrupt()):
                with self.subTest(kind, error=error):
                    self.raises("exit", error)
                    got: list[BaseException] = []

                    async def main(got: list[BaseException] = got) -> None:
                        try:
                            await self.app.serve(0)
                        except BaseException as raised:
                            got.append(raised)
                    self.app.down()
                    thread = threading.Thread(target=asyncio.run, args=(main(),))
                    thread.start()
                    self.url = self.until(lambda: self.app.url)
                    client, other = self.connect(), self.connect()
                    client.send_json({"channel": "____", "message": f"exit-{kind}"})
                    self.assertEqual(client.recv_text(), "ERROR : 500 - Internal error")
                    for each in (client, other):
                        self.assertEqual(each.recv_close(), (1001, "server going down"))
                    thread.join(10)
                    self.assertEqual(got, [error])


class Unusual(BaseException):
    """As pytest's outcomes are."""


class Mute(HTTPError):
    """It has none of an HTTPError's attributes."""

    def __init__(self) -> None:
        pass


class Untold(ChannelError):
    def __str__(self) -> str:
        raise ValueError("it has no text")


class PageTest(unittest.TestCase):
    def test_channels_support(self) -> None:
        app = WebChannels()
        text = app.channels_support()
        self.assertTrue(text.startswith('<script data-channel="____" data-path="/">'))
        self.assertTrue(text.endswith("</script>"))
        self.assertIn(app.channels_script(), text)
        # The inlined client cannot end its element, nor can a name.
        self.assertNotRegex(app.channels_script().lower(), "</script|<!--|<script")
        for evil in ('"><script>alert(1)</script>', "</script><b>", "a b='", "\"\u20ac<!--"):
            page = app.channels_support(evil, nonce=evil, src="https://cdn.example/" + evil)
            parser = Elements()
            parser.feed(page)
            self.assertEqual(parser.found, [("script", {
                "data-channel": evil, "data-path": "/", "nonce": evil,
                "src": "https://cdn.example/" + evil})])
        app.config.base_path = "/live/"
        app.config.websockets_path = "/socket"
        self.assertIn('data-path="/live/socket" nonce="n"', app.channels_support(nonce="n"))
        with quiet(), serve(app) as url:
            text = app.channels_support(src="/channels.js?v=1")
            self.assertIn('src="/live/channels.js?v=1"', text)
            reply = request("GET", url + "/channels.js?v=1")
            self.assertEqual((reply.headers["content-type"], reply.body.decode()),
                             ("text/javascript; charset=utf-8", app.channels_script()))


class Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


class UpAndDownTest(unittest.TestCase):
    def setUp(self) -> None:
        manager = quiet()
        manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)

    def app(self, word: str = "page", shutdown_timeout: float = 0.5) -> WebChannels:
        app = WebChannels(Config(shutdown_timeout=shutdown_timeout))
        app.route("/", lambda: word)
        app.channel("/____/echo", lambda payload: payload)
        app.channel("/____/down", lambda: app.down())
        app.channel("/____/down-thread", lambda: app.down(), threaded=True)
        app.channel("/____/sleep", self.sleep)
        app.route("/sleep", self.sleep)
        return app

    async def sleep(self, payload: float = 0.3) -> str:
        await asyncio.sleep(payload)
        return "slept"

    def test_two_apps_and_again(self) -> None:
        one, two = self.app("one"), self.app("two")
        with serve(one) as first, serve(two) as second:
            self.assertEqual((request("GET", first).body, request("GET", second).body),
                             (b"one", b"two"))
            self.assertEqual(first, one.url)
            self.assertEqual(first, f"http://127.0.0.1:{one.port}")
            with self.assertRaisesRegex(RuntimeError, "serves already.*down"):
                one.up(0, block=False)
        one.down()
        with self.assertRaises(ConnectionRefusedError):
            request("GET", first)
        port = int(first.rpartition(":")[2])
        for _ in range(2):  # the port is free at once, also with a client that was there
            with serve(one, port=port) as again:
                client = WebSocketClient(again)
                self.assertEqual(again, first)
                self.assertEqual(request("GET", again).body, b"one")
            self.assertEqual(client.recv_close(), (1001, "server going down"))
            client.close()
        self.assertEqual((one.connected_clients(), one.subscriptions(), one.broadcast("____", "x")),
                         ([], {}, False))

    def test_a_taken_port(self) -> None:
        with serve(self.app()) as url:
            port = int(url.rpartition(":")[2])
            other = self.app()
            with self.assertRaisesRegex(OSError, f"port {port} on 127.0.0.1 is taken.*up\\(0\\)"):
                other.up(port, block=False)
            other.up(0, block=False)
            other.down()
            with self.assertRaisesRegex(OSError, "cannot serve on port 0 of 203.0.113.1: ") as got:
                other.up(0, "203.0.113.1", block=False)  # RFC 5737: nobody's
            self.assertEqual(got.exception.errno, errno.EADDRNOTAVAIL)

    def test_a_system_that_cannot_share_a_port(self) -> None:
        if hasattr(socket, "SO_REUSEPORT"):
            self.addCleanup(setattr, socket, "SO_REUSEPORT", socket.SO_REUSEPORT)
            del socket.SO_REUSEPORT
        with self.assertRaisesRegex(ValueError, "reuse_port"):
            self.app().up(0, block=False, reuse_port=True)

    def test_what_vanishes_over_tls_leaves_nothing(self) -> None:
        app, started = self.app(), threading.Event()
        app.config.max_clients = 1

        @app.route("/slow")
        async def slow() -> str:
            started.set()
            await asyncio.sleep(0.1)
            return "late"
        with tempfile.TemporaryDirectory() as folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(Path(folder)))
        with serve(app, ssl=context) as url:
            with Connection(url) as connection:
                connection.send_raw(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self.assertTrue(started.wait(10))
            end = time.monotonic() + 10
            body = b""
            while not body and time.monotonic() < end:
                with contextlib.suppress(OSError):  # nobody else is let in before
                    body = request("GET", url).body
            self.assertEqual(body, b"page")

        async def late() -> bytes:
            serving = asyncio.ensure_future(app.serve(0, ssl=context))
            while not app.url:
                await asyncio.sleep(0)
            with socket.create_connection(("127.0.0.1", app.port), 10) as sock:
                for _ in range(9):  # turns of the loop, in which it is accepted
                    await asyncio.sleep(0)
                app.down()
                await serving
                return await asyncio.get_running_loop().run_in_executor(None, ask, sock)

        def ask(sock: socket.socket) -> bytes:
            with contextlib.suppress(OSError), INSECURE.wrap_socket(sock) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return connection.recv(99)
            return b""
        self.assertEqual(asyncio.run(late()), b"")  # its handshake ends when nobody serves

    def test_ipv6_and_tls(self) -> None:
        with serve(self.app(), host="::1") as url:
            self.assertTrue(url.startswith("http://[::1]:"))
            self.assertEqual(request("GET", url).body, b"page")
            WebSocketClient(url, origin=url).close()
        with tempfile.TemporaryDirectory() as folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(Path(folder)))
            with serve(self.app(), ssl=context) as url:
                self.assertTrue(url.startswith("https://127.0.0.1:"))
                self.assertEqual(request("GET", url).body, b"page")
                with WebSocketClient(url, origin=url, deflate=True) as client:
                    client.send_json({"channel": "____", "message": "echo",
                                      "payload": os.urandom(150_000).hex()})
                    self.assertEqual(len(client.recv_text()), 300_000)
                    client.send_frame(3)
                    self.assertEqual(client.recv_close()[0], 1002)
                with self.assertRaises(Refused):
                    WebSocketClient(url, origin=url.replace("https", "http"))
                with mock.patch.object(webchannels, "_LINGER", 60), no_logs("asyncio"), \
                        Connection(url) as connection:  # closed at once: TLS has no half-close
                    connection.send_raw(b"nonsense\r\n\r\n")
                    self.assertEqual(connection.response().status, 400)
                    self.assertEqual(connection.rest(), b"")

    def test_a_tls_handshake_has_a_deadline(self) -> None:
        app = self.app()
        app.config.handshake_timeout = 0.3
        with tempfile.TemporaryDirectory() as folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(Path(folder)))
        with serve(app, ssl=context) as url:
            for data in b"", b"\x16\x03\x01\x02\x00\x01":
                with Connection(url.replace("https:", "http:")) as connection:
                    connection.send_raw(data)
                    self.assertEqual(connection.rest(), b"")
            self.assertEqual(request("GET", url).body, b"page")

    def test_a_socket_of_ones_own_and_reuse_port(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            with serve(self.app(), sock=sock) as url:
                self.assertEqual(url, f"http://127.0.0.1:{sock.getsockname()[1]}")
                self.assertEqual(request("GET", url).body, b"page")
        if hasattr(socket, "SO_REUSEPORT"):
            with serve(self.app(), reuse_port=True) as url:
                port = int(url.rpartition(":")[2])
                with serve(self.app(), port=port, reuse_port=True) as second:
                    self.assertEqual(url, second)

    def test_down_lets_what_runs_finish(self) -> None:
        app = self.app(shutdown_timeout=60)
        url = app.up(0, block=False)
        with WebSocketClient(url) as client, Connection(url + "/sleep") as http, \
                Connection(url) as unused, Connection(url) as begun, WebSocketClient(url) as idle:
            http.send_raw(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n\r\n")
            begun.send_raw(b"GET / HTTP/1.1\r\n")
            client.send_json({"channel": "____", "message": "echo", "payload": "a"})
            client.send_json({"channel": "____", "message": "sleep", "payload": 0.2})
            self.assertEqual(client.recv_text(), "a")
            threads = [threading.Thread(target=app.down) for _ in range(3)]
            for thread in threads:
                thread.start()
            self.assertEqual(idle.recv_close(), (1001, "server going down"))
            self.assertEqual(client.recv_text(), "slept")
            self.assertEqual(client.recv_close(), (1001, "server going down"))
            reply = http.response()
            self.assertEqual((reply.body, reply.headers["connection"]), (b"slept", "close"))
            self.assertEqual(unused.rest(), b"")
            begun.send_raw(b"Host: localhost\r\n\r\n")
            reply = begun.response()
            self.assertEqual((reply.body, reply.headers["connection"]), (b"page", "close"))
            for thread in threads:
                thread.join(10)
                self.assertFalse(thread.is_alive())

    def test_down_returns_at_once_where_nothing_runs(self) -> None:
        """Also where clients came and went, and `on_disconnect` ran for them."""
        app = self.app(shutdown_timeout=2)
        left = threading.Event()

        @app.on_disconnect
        async def leave() -> None:
            await asyncio.sleep(0)
            left.set()

        def quick() -> float:
            with serve(app) as url:
                WebSocketClient(url).close()
                self.assertEqual(request("GET", url).status, 200)
                self.assertTrue(left.wait(10))
                begun = time.monotonic()
            return time.monotonic() - begun
        self.assertLess(min(quick() for _ in range(3)), 0.4)  # a busy machine is slow now and then

    def test_down_waits_for_who_is_told_that_a_client_left(self) -> None:
        app, entered, told = self.app(shutdown_timeout=60), threading.Event(), []

        @app.on_disconnect
        async def leave() -> None:
            entered.set()
            await asyncio.sleep(0.2)
            told.append("left")
        with serve(app) as url:
            WebSocketClient(url).close()
            self.assertTrue(entered.wait(10))
        self.assertEqual(told, ["left"])

    def test_down_does_not_wait_for_ever(self) -> None:
        app = self.app()
        app.config.shutdown_timeout = 0.2
        url = app.up(0, block=False)
        entered = threading.Event()

        async def sleep() -> None:
            entered.set()
            await asyncio.sleep(3600)

        app.route("/sleep", sleep)
        with WebSocketClient(url, auto_reply=False), WebSocketClient(url) as client, \
                Connection(url) as http:
            client.send_json({"channel": "____", "message": "sleep", "payload": 3600})
            http.send_raw(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(entered.wait(10))
            begun = time.monotonic()
            app.down()
            self.assertLess(time.monotonic() - begun, 5)
            self.assertEqual(http.rest(), b"")

    def test_down_does_not_wait_for_a_handler_that_holds_the_loop(self) -> None:
        app = self.app()
        app.config.shutdown_timeout = -1.5  # to which `down()` adds 2
        entered, release = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            release.wait(10)

        app.route("/hold", hold)
        with serve(app) as url, Connection(url) as connection:
            connection.send_raw(b"GET /hold HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertTrue(entered.wait(10))
            with self.assertLogs("webchannels", "WARNING") as logs:
                app.down()
            self.assertIn("holds the event loop", logs.output[0])
            release.set()
            app.down()

    def test_calls_from_threads_while_it_starts_and_stops(self) -> None:
        app, over = self.app(), threading.Event()

        def call() -> None:
            while not over.is_set():
                app.broadcast("____", "x")

        threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with serve(app):
                pass
        over.set()
        for thread in threads:
            thread.join(10)
            self.assertFalse(thread.is_alive())

    def test_calls_made_just_before_the_end_are_run_before_it(self) -> None:
        app, seen, made = self.app(), [], threading.Event()
        thread = threading.Thread(target=lambda: app._call(lambda: seen.append(app.url)))

        class Last(webchannels.Bus):
            async def stop(self) -> None:
                loop = asyncio.get_running_loop()
                schedule = loop.call_soon_threadsafe

                def tell(call: Callable[..., Any], *given: Any) -> asyncio.Handle:
                    made.set()
                    return schedule(call, *given)
                with mock.patch.object(loop, "call_soon_threadsafe", tell):
                    thread.start()
                    made.wait(10)

        app.config.bus = Last()
        with serve(app) as url:
            pass
        thread.join(10)
        self.assertEqual(seen, [url])

    def test_a_handshake_that_ends_while_it_goes_down_is_refused(self) -> None:
        app, entered = self.app(), threading.Event()

        @app.on_connect
        async def slow() -> None:
            entered.set()
            while not app._stopping:
                await asyncio.sleep(0)
        with serve(app) as url, Connection(url) as connection:
            head = "".join(f"{k}: {v}\r\n" for k, v in HandshakeTest.HEAD.items())
            connection.send_raw(f"GET / HTTP/1.1\r\n{head}\r\n".encode())
            self.assertTrue(entered.wait(10))
            app.down()
            self.assertEqual(connection.response().status, 503)

    def test_down_from_a_handler(self) -> None:
        for message in ("down", "down-thread"):
            app = self.app()
            url = app.up(0, block=False)
            with WebSocketClient(url, subprotocol="webchannels.v1") as client:
                client.send_json({"channel": "____", "message": message, "ref": 1})
                self.assertEqual(client.recv_json(), {"ref": 1, "payload": None})
                self.assertEqual(client.recv_close()[0], 1001)
            app.down()
            with self.assertRaises(ConnectionRefusedError):
                request("GET", url)

    def test_serve_in_a_loop_of_ones_own(self) -> None:
        app = self.app()

        async def main() -> bytes:
            serving = asyncio.ensure_future(app.serve(port=0))
            while not app.url:
                await asyncio.sleep(0.01)
            url = app.url
            loop = asyncio.get_running_loop()
            body = (await loop.run_in_executor(None, request, "GET", url)).body
            client = await loop.run_in_executor(None, WebSocketClient, url)
            serving.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await serving
            self.assertEqual(await loop.run_in_executor(None, client.recv_close),
                             (1001, "server going down"))
            client.close()
            serving = asyncio.ensure_future(app.serve(port=0))
            while not app.url:
                await asyncio.sleep(0.01)
            app.down()
            await serving
            self.assertIsNone(loop.get_exception_handler())  # the loop is as it was
            return body

        self.assertEqual(asyncio.run(main()), b"page")

    def test_an_idle_server_sleeps(self) -> None:
        """Also with a setting of 0, which means never."""
        waits: list[float] = []

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> Any:
                waits.append(timeout or 0)
                return super().select(timeout)

        for settings in (Config(), Config(ping_interval=0)):
            app = WebChannels(settings)
            loop = asyncio.SelectorEventLoop(Selector())
            thread = threading.Thread(target=loop.run_until_complete, args=(app.serve(0),))
            thread.start()
            end = time.monotonic() + 10
            while time.monotonic() < end and not (app.url and max(waits) > 0.5):
                time.sleep(0.01)
            app.down()
            thread.join()
            loop.close()
            self.assertGreater(max(waits), 0.5)
            waits.clear()

    def test_serve_cancelled_twice_closes_all(self) -> None:
        app = self.app(shutdown_timeout=60)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            serving = asyncio.ensure_future(app.serve(port=0))
            while not app.url:
                await asyncio.sleep(0.01)
            with await loop.run_in_executor(None, WebSocketClient, app.url) as client, \
                    Connection(app.url) as http:
                client.send_json({"channel": "____", "message": "sleep", "payload": 60})
                http.send_raw(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n")
                while not app._http or not any(each._task for each in app._sockets):
                    await asyncio.sleep(0.01)
                for _ in range(2):
                    serving.cancel()
                    await asyncio.sleep(0.05)
                with self.assertRaises(asyncio.CancelledError):
                    await serving
                self.assertEqual((app.url, app.connected_clients()), ("", []))
                self.assertEqual(await loop.run_in_executor(None, http.rest, 5), b"")
                self.assertEqual(await loop.run_in_executor(None, client.recv_close, 5),
                                 (1001, "server going down"))
        asyncio.run(main())

    def test_serve_cancelled_while_it_starts_leaves_no_socket(self) -> None:
        app = self.app()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        async def main(turns: int) -> None:
            serving = asyncio.ensure_future(app.serve(port))
            for _ in range(turns):
                await asyncio.sleep(0)
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
        for turns in range(6):
            asyncio.run(main(turns))

    def test_a_loop_that_was_closed_does_not_serve(self) -> None:
        app, loop = self.app(), asyncio.new_event_loop()
        log = logging.getLogger("asyncio")  # it tells of tasks that were destroyed
        self.addCleanup(setattr, log, "disabled", log.disabled)
        log.disabled = True
        serving = loop.create_task(app.serve(port=0))
        while not app.url:
            loop.run_until_complete(asyncio.sleep(0.01))
        with loop.run_until_complete(loop.run_in_executor(None, WebSocketClient, app.url)):
            while not app.connected_clients():
                loop.run_until_complete(asyncio.sleep(0.01))
            client = app.connected_clients()[0]
            app.subscribe(client, "____")
            loop.close()
            app._thread = 0  # as in another thread
            self.assertFalse(app.broadcast("____", "x") or client.send("x"))
            app.unsubscribe(client, "____")
            app.down()
            with warnings.catch_warnings(), serve(app) as url:
                warnings.simplefilter("ignore", ResourceWarning)  # nobody closed anything
                del serving, client
                gc.collect()
                self.assertEqual(request("GET", url).body, b"page")
                self.assertEqual(app.connected_clients(), [])

    def test_what_connects_while_it_stops_is_closed(self) -> None:
        async def main(turns: int) -> None:
            app = self.app()
            serving = asyncio.ensure_future(app.serve(port=0))
            while not app.url:
                await asyncio.sleep(0.01)
            with contextlib.ExitStack() as stack:
                for _ in range(20):
                    stack.enter_context(Connection(app.url))
                for _ in range(turns):
                    await asyncio.sleep(0)
                app.down()
                await serving
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for turns in range(6):
                asyncio.run(main(turns))
            gc.collect()
        self.assertEqual([], told)

    def test_it_listens_again_when_an_accept_has_failed(self) -> None:
        for secure in (False, True):
            app, context = self.app(), None
            if secure:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                with tempfile.TemporaryDirectory() as folder:
                    context.load_cert_chain(certificate(Path(folder)))

            def fail(app: WebChannels = app) -> None:  # as asyncio.proactor_events on Windows
                assert app._loop
                app._loop.call_exception_handler({
                    "message": "Accept failed on a socket", "exception": OSError(64, "x"),
                    "socket": app._listening[0]})
                app._loop.remove_reader(app._listening[0])  # it closes it, too
            with serve(app, ssl=context) as url:
                with self.assertLogs("webchannels", "WARNING") as logs:
                    app._call(fail)
                self.assertIn("listening again", logs.output[0])
                self.assertEqual(request("GET", url).body, b"page")
            with self.assertRaises(ConnectionRefusedError):
                request("GET", url)

    def test_the_loops_exception_handler(self) -> None:
        app, told = self.app(), []

        def mine(loop: Any, context: Any) -> None:
            told.append(context["exception"])

        async def main() -> None:
            loop = asyncio.get_running_loop()
            serving = asyncio.ensure_future(app.serve(port=0))
            while not app.url:
                await asyncio.sleep(0.01)
            loop.default_exception_handler = (  # type: ignore[method-assign]
                lambda context: mine(loop, context))
            app._stopping = True
            for error in (ValueError("of somebody else's"), OSError(5, "x")):
                loop.call_exception_handler({"message": "x", "exception": error})
                self.assertEqual(told.pop(), error)
            loop.set_exception_handler(mine)
            app.down()
            await serving
            self.assertEqual(loop.get_exception_handler(), mine)
        asyncio.run(main())

    def test_what_cannot_be_served_with_is_told_and_can_be_changed(self) -> None:
        app = self.app()

        async def main() -> None:
            app.config.max_threads = -1
            with self.assertRaises(ValueError):
                await app.serve(port=0)
            app.config.max_threads = 1
            serving = asyncio.ensure_future(app.serve(port=0))
            while not app.url and not serving.done():
                await asyncio.sleep(0.01)
            app.down()
            await serving
        asyncio.run(main())

    def test_a_shutdown_timeout_without_end(self) -> None:
        with serve(self.app(shutdown_timeout=float("inf"))) as url:
            self.assertEqual(request("GET", url).body, b"page")

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    def test_unix_sockets(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        addresses = [f"{folder}/a b"]
        if sys.platform == "linux":
            addresses.append(f"\0{folder}")
        for address in addresses:
            with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client:
                sock.bind(address)
                with serve(self.app(), sock=sock) as url:
                    path = urlsplit(url).netloc
                    self.assertEqual((url[:12], unquote(path)), ("http+unix://", address))
                    client.connect(address)
                    client.sendall(b"GET / HTTP/1.0\r\nHost: a\r\nOrigin: http://a\r\n\r\n")
                    self.assertIn(b" 200 OK", client.recv(999))

    def test_a_config_value_of_the_wrong_type_is_told(self) -> None:
        app = self.app()
        vars(app.config)["disconnected_ttl"] = "1"
        with self.assertLogs("webchannels", "ERROR") as logs, serve(app) as url:
            end = time.monotonic() + 10
            while not logs.output and time.monotonic() < end:
                time.sleep(0.01)
            self.assertEqual(request("GET", url).body, b"page")
        self.assertRegex(logs.output[0], "is a field of config of the wrong type.*TypeError")

    def test_up_blocks_also_in_another_thread_until_down(self) -> None:
        app, said = self.app(), io.StringIO()
        with contextlib.redirect_stdout(said):
            thread = threading.Thread(target=app.up, args=(0,), kwargs={"block": True})
            thread.start()
            while thread.is_alive() and "Serving at" not in said.getvalue():
                thread.join(0.01)
        self.assertEqual(request("GET", app.url).body, b"page")
        self.assertTrue(thread.is_alive())
        app.down()
        thread.join(10)
        self.assertFalse(thread.is_alive())

    def test_up_in_a_loop_that_runs_returns(self) -> None:
        app = self.app()
        guard = threading.Timer(10, app.down)  # or it would block for ever

        async def main() -> bytes:
            url = app.up(0)
            loop = asyncio.get_running_loop()
            return (await loop.run_in_executor(None, request, "GET", url)).body

        guard.start()
        self.addCleanup(guard.cancel)
        self.addCleanup(app.down)
        with self.assertLogs("webchannels", "WARNING") as logs:
            self.assertEqual(asyncio.run(main()), b"page")
        self.assertIn("up() does not block an event loop: await serve()", logs.output[0])
        app.down()
        with mock.patch.object(sys, "ps1", ">>> ", create=True), \
                self.assertLogs("webchannels", "INFO") as logs:
            self.assertEqual(asyncio.run(main()), b"page")
        self.assertNotIn("await serve()", str(logs.output))

    def test_a_cell_of_a_notebook_is_run_again(self) -> None:
        app = self.app()
        self.addCleanup(app.down)
        with mock.patch.object(sys, "ps1", ">>> ", create=True):
            url = app.up(0)
            self.assertEqual((app.up(0), request("GET", url).body), (url, b"page"))
            others: list[dict[str, Any]] = [
                {"port": app.port}, {"port": 0, "host": "0.0.0.0"}, {"port": 0, "block": True}]
            for other in others:
                with self.assertRaisesRegex(RuntimeError, f"already at {url}; call down"):
                    app.up(**other)
            app.down()
            self.assertEqual(request("GET", app.up(0)).body, b"page")

    def test_the_address_in_the_network_is_printed_too(self) -> None:
        def said(host: str, *allowed: str) -> str:
            app, out = self.app(), io.StringIO()
            app.config.allowed_hosts = allowed or None
            with contextlib.redirect_stdout(out), \
                    mock.patch.object(webchannels, "find_address", lambda: "192.0.2.7"):
                threading.Thread(target=stop, args=(app, out)).start()
                app.up(0, host, block=True)
            return re.sub(r":\d+", ":80", out.getvalue())

        def stop(app: WebChannels, out: io.StringIO) -> None:
            while not out.getvalue().endswith("\n"):
                time.sleep(0.01)
            app.down()
        ends = " (Ctrl+C stops)\n"
        both = f"Serving at http://localhost:80 and http://192.0.2.7:80{ends}"
        for allowed in (), ("*",), ("localhost", "192.0.2.7"):
            self.assertEqual(said("0.0.0.0", *allowed), both, allowed)
        for name in "localhost", "app.localhost":
            self.assertEqual(said("0.0.0.0", name), f"Serving at http://{name}:80{ends}")
        self.assertEqual(said("127.0.0.1"), f"Serving at http://127.0.0.1:80{ends}")
        self.assertRegex(webchannels.find_address(), r"^(localhost|\d+\.\d+\.\d+\.\d+)$")
        with mock.patch.object(socket.socket, "connect", side_effect=OSError):
            self.assertEqual(webchannels.find_address(), "localhost")

    SCRIPT = """
import sys, time, os
from webchannels import *
config.shutdown_timeout = 0.5
@route("/")
def index(): return "page"
@route("/stuck")
def stuck():
    print("stuck", flush=True)
    while True: time.sleep(0.01)
"""

    def script(self, more: str) -> Terminal:
        terminal = Terminal(sys.executable, "-c", self.SCRIPT + more)
        self.addCleanup(terminal.__exit__)
        return terminal

    def test_a_script_blocks_until_a_signal(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            terminal = self.script("up(0)\nprint('after')")
            url = terminal.expect(r"Serving at (http://127.0.0.1:\d+) \(Ctrl\+C stops\)\n")[1]
            with WebSocketClient(url) as client:
                terminal.process.send_signal(number)
                self.assertEqual(client.recv_close(), (1001, "server going down"))
            self.assertEqual(terminal.end(), (0, "after\n"))  # no traceback

    def test_a_handler_of_ones_own_for_sigterm_stays(self) -> None:
        terminal = self.script("""
import signal
def mine(*_):
    print("mine", flush=True)
    down()
signal.signal(signal.SIGTERM, mine)
up(0)
print(signal.getsignal(signal.SIGTERM) is mine)""")
        terminal.expect("Serving at ")
        terminal.process.send_signal(signal.SIGTERM)
        terminal.expect("(?s)mine.*True\n")
        self.assertEqual(terminal.end()[0], 0)

    def test_ctrl_c_twice_ends_a_handler_that_never_does(self) -> None:
        terminal = self.script("up(0)\nprint('after')")
        url = terminal.expect(r"Serving at (http://127.0.0.1:\d+) ")[1]
        with Connection(url) as connection:
            connection.send_raw(b"GET /stuck HTTP/1.1\r\nHost: localhost\r\n\r\n")
            terminal.expect("stuck")
            terminal.type("\x03")
            time.sleep(0.3)
            terminal.type("\x03")
            terminal.expect("after")
            self.assertEqual(terminal.process.wait(10), 0)

    def test_a_handler_in_a_thread_that_never_returns_lets_the_program_end(self) -> None:
        for block, number in ((True, signal.SIGTERM), (False, None)):
            terminal = self.script("""
@route("/never", threaded=True)
def never():
    print("stuck", flush=True)
    while True: time.sleep(0.01)
""" + ("up(0)" if block else "print(up(0, block=False)); sys.stdin.readline()"))
            url = terminal.expect(r"(http://127.0.0.1:\d+)[ \n]")[1]
            with Connection(url) as connection:
                connection.send_raw(b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n")
                terminal.expect("stuck\n")
                if number:
                    terminal.process.send_signal(number)
                else:
                    terminal.type("\n")
                self.assertEqual(terminal.end(10)[0], 0)

    def test_an_exit_in_a_handler_ends_the_program_with_its_code(self) -> None:
        for decorator, handler in (("@route('/exit')", "def"), ("@route('/exit')", "async def"),
                                   ("@route('/exit', threaded=True)", "def")):
            terminal = self.script(f"""
{decorator}
{handler} end(): sys.exit(3)
up(0)
print("after")
""")
            url = terminal.expect(r"Serving at (http://127.0.0.1:\d+) ")[1]
            with WebSocketClient(url) as client:
                self.assertEqual(request("GET", url + "/exit").status, 500)
                self.assertEqual(client.recv_close(), (1001, "server going down"))
            status, said = terminal.end()
            self.assertEqual(status, 3)
            self.assertNotIn("after", said)
            self.assertIn("a handler raised SystemExit(3)", said)

    def test_down_waits_for_the_end_of_the_loop(self) -> None:
        app, ended, started = self.app(), threading.Event(), threading.Event()
        tasks: list[asyncio.Future[None]] = []

        async def last() -> None:
            try:
                started.set()
                await asyncio.sleep(60)
            finally:  # asyncio.run() cancels it, and waits for it
                await asyncio.sleep(0.1)
                ended.set()

        @app.route("/start")
        async def start() -> None:
            tasks.append(asyncio.ensure_future(last()))
        with serve(app) as url:
            self.assertEqual(request("GET", url + "/start").status, 204)
            self.assertTrue(started.wait(10))
        self.assertTrue(ended.is_set())

    def test_down_in_a_signal_handler_that_interrupts_a_broadcast(self) -> None:
        app = self.app()
        app.up(0, block=False)
        self.addCleanup(app.down)
        client = WebSocketClient(app.url)
        self.addCleanup(client.close)
        client.send_json({"channel": "____", "message": "subscribe"})
        self.assertEqual(client.recv_text(), "Subscription: OK")
        loop: Any = app._loop
        schedule = loop.call_soon_threadsafe

        def interrupted(*call: Any) -> Any:
            loop.call_soon_threadsafe = schedule
            app.down()
            return schedule(*call)
        with mock.patch.object(loop, "call_soon_threadsafe", interrupted), \
                self.assertLogs("webchannels", "INFO") as logs:
            app.broadcast("____", "x")
        self.assertNotIn("could not stop", "".join(logs.output))
        self.assertEqual(app.url, "")

    def test_down_in_a_signal_handler_while_it_starts(self) -> None:
        app, start = self.app(), threading.Thread.start

        def interrupted(thread: threading.Thread) -> None:
            app.down()
            start(thread)
        with mock.patch.object(threading.Thread, "start", interrupted):
            app.up(0, block=False)
        self.addCleanup(app.down)
        self.assertEqual(app.url, "")

    def test_down_in_a_signal_handler_that_interrupts_down(self) -> None:
        terminal = self.script("""
import signal
def trace(frame, event, value):
    sys.settrace(None)  # and never in what it interrupts with
    if event == "line":
        signal.raise_signal(signal.SIGTERM)
    sys.settrace(trace)
    return trace
signal.signal(signal.SIGTERM, lambda *_: down())
for _ in range(3):
    up(0, block=False)
    sys.settrace(trace)
    down()
    sys.settrace(None)
print("ended")""")
        terminal.expect("ended")
        self.assertEqual(terminal.end()[0], 0)

    def test_the_page_opens_in_a_browser(self) -> None:
        terminal = Terminal(sys.executable, "-c", self.SCRIPT + "up(0, open_browser=True)",
                            BROWSER="echo opened %s")
        self.addCleanup(terminal.__exit__)
        said = terminal.expect(  # in either order
            r"(?s)(?=.*Serving at (http://127.0.0.1:\d+) )(?=.*opened (\S+)\n)")
        self.assertEqual(said[1], said[2])
        self.assertEqual(terminal.stop(signal.SIGTERM), 0)

    def test_the_interpreter_ends_while_serving(self) -> None:
        terminal = self.script("print(up(0, block=False)); sys.stdin.readline()")
        url = terminal.expect(r"(http://127.0.0.1:\d+)\n")[1]
        with WebSocketClient(url) as client:
            terminal.type("\n")
            self.assertEqual(client.recv_close(), (1001, "server going down"))
        self.assertEqual(terminal.end(), (0, "\n"))  # the echo of what was typed, no traceback

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_a_forked_child_lets_go_of_the_connections(self) -> None:
        terminal = self.script("""
class Engine(Bus):
    _writer = "its own"
config.bus = Engine()
url = up(0, block=False)
print(url)
sys.stdin.readline()
done, tell = os.pipe()
import warnings
warnings.simplefilter("ignore")  # of a fork beside threads, since Python 3.12
child = os.fork()
if not child:
    print("child", connected_clients(), broadcast("____", "x"), up(0, block=False) != url)
    down()
    os.write(tell, b"!")
    sys.stdin.readline()
    os._exit(0)
os.read(done, 1)
print("parent", len(connected_clients()))
connected_clients()[0].close()
down()
print("down")
os.wait()
""")
        url = terminal.expect(r"(http://127.0.0.1:\d+)\n")[1]
        with WebSocketClient(url) as client, Connection(url) as other:
            other.send_raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertEqual(other.response().body, b"page")
            terminal.type("\n")
            terminal.expect(r"child \[\] False True")
            terminal.expect("parent 1")
            self.assertEqual(client.recv_close()[0], 1000)
            self.assertEqual(client.rest(5), b"")  # the child holds no copy of it
            self.assertEqual(other.rest(5), b"")
            terminal.expect("down")
            with self.assertRaises(ConnectionRefusedError):
                request("GET", url)
            terminal.type("\n")
        self.assertEqual(terminal.process.wait(10), 0)

    def test_json_of_any_depth_is_an_answer_on_a_small_stack(self) -> None:
        terminal = self.script("""
import threading
channel("/____/echo", lambda payload: payload)
channel("/", lambda payload: "none")
route("/json", lambda payload: [payload], method="POST")

def deep():
    circle = []
    circle += [circle, circle]
    try:
        broadcast("____", "x", circle)
    except ValueError as error:
        print(error)
threading.stack_size(512 * 1024)
print(up(0, block=False))
thread = threading.Thread(target=deep)
sys.stdin.readline()
thread.start()
thread.join()
print("done")
""")
        url = terminal.expect(r"(http://127.0.0.1:\d+)\n")[1]
        client = WebSocketClient(url)
        self.addCleanup(client.close)
        for begin, end in (("[", "]"), ('{"a":', "}"), ('{"a":["]]}}\\\\",', "]}"),
                           ('["\\"]",{"a":', "}]")):
            size = begin.count("[") + begin.count("{")
            for depth in (100, 450 // size, 520 // size, 10_000, 1_000_000 // len(begin)):
                ends = "" if depth > 10_000 else "0" + end * depth
                with self.subTest(begin, depth=depth):
                    reply = request("POST", url + "/json", {"Content-Type": "application/json"},
                                    (begin * depth + ends).encode())
                    fine = depth * size < 500
                    self.assertEqual(reply.status, 200 if fine else 400)
                    client.send_text('{"channel":"____","message":"echo","payload":'
                                     + begin * depth + ends + "}")
                    self.assertIn(begin * depth if fine else "none", client.recv_text())
        # Many, and in strings, are not deep.
        values: list[Any] = [[[[[]]]] * 5000, ["[{" * 5000, '\\"[{\\\\' * 5000]]
        for value in values:
            client.send_json({"channel": "____", "message": "echo", "payload": value})
            self.assertEqual(client.recv_json()["payload"], value)
        terminal.type("\n")
        terminal.expect("(?i)circular.*\ndone\n")
        terminal.type("\n")

    def test_without_free_descriptors_accepting_pauses(self) -> None:
        terminal = self.script("""
import asyncio, resource
@channel("/____/slow")
async def slow():
    await asyncio.sleep(1.5)
config.shutdown_timeout = 5
url = up(0, block=False)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(url)
sys.stdin.readline()
down()
print("down")
""")
        url = terminal.expect(r"(http://127.0.0.1:\d+)\n")[1]
        client = WebSocketClient(url)
        self.addCleanup(client.close)
        for _ in range(2):
            opened = [Connection(url) for _ in range(60)]
            for connection in opened:
                connection.close()
            self.assertEqual(request("GET", url).body, b"page")
        terminal.expect("Too many open files: accepting pauses\n")
        opened = [Connection(url) for _ in range(60)]
        # It goes down while accepting pauses; and that has an end, for which the handler waits.
        client.send_json({"channel": "____", "message": "slow"})
        terminal.type("\n")
        said = terminal.expect("(?s)(.*)down\n")[1]  # the log told it once, and no traceback
        self.assertRegex(said, r"^\n*(\d+ more like this: Too many open files: .*\n)?\n*$")
        self.assertEqual(terminal.end(), (0, ""))
        for connection in opened:
            connection.close()

    def test_params_outside_a_handler(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "only in a handler"):
            webchannels.params()

    def test_public_names(self) -> None:
        """The docstrings are the manual: each ends with an example, which is Python."""
        kinds = [each for each in vars(webchannels).values() if inspect.isclass(each)
                 and each.__name__ in webchannels.__all__]
        public = {name: getattr(webchannels, name) for name in webchannels.__all__}
        del public["config"]
        for kind in kinds:
            for name, value in vars(kind).items():
                if callable(value) or isinstance(value, property):
                    if not name.startswith("_") and not hasattr(asyncio.Protocol, name):
                        public[f"{kind.__name__}.{name}"] = value
        self.assertIn("ChannelClient.send", public)
        for name, value in public.items():
            with self.subTest(name):
                _, label, example = (inspect.getdoc(value) or "").rpartition("Example: ")
                self.assertTrue(label, "no example")
                self.assertIn(name.rpartition(".")[2], example)
                compile(example, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for name in vars(WebChannels):
            if not name.startswith("_"):
                self.assertIn(name, webchannels.__all__)

    def test_the_defaults_of_config(self) -> None:
        text = (HERE / "README.md").read_text(encoding="utf-8")
        table = text.partition("\n### Config\n")[2].partition("\n#")[0]
        told: dict[str, Any] = {}
        for names, values in re.findall(r"(?m)^\| (`.*?`) \| (.*?) \|", table):
            for name, value in zip(names.split(", "), values.split(", ")):
                number, _, unit = value.strip("`").replace(",", "").partition(" ")
                default = ast.literal_eval(number)
                self.assertRegex(inspect.getdoc(Config) or "",  # which pydoc shows
                                 rf"(?m)^[\w, ]*\b{name.strip('`')}\b[\w, ]*: ")
                told[name.strip("`")] = default * {"KiB": 1024, "MiB": 1024 ** 2}[unit] \
                    if unit else default
        self.assertEqual(told, vars(Config()))


class DemoTest(unittest.TestCase):
    """`python3 webchannels.py`."""

    def test_chat_and_wave(self) -> None:
        with Terminal(sys.executable, "webchannels.py", "--port", "0") as demo:
            url = demo.expect(r"Serving at (http://127\.0\.0\.1:\d+) ")[1]
            reply = request("GET", url)
            nonce = re.search("script-src 'nonce-([^']+)'",
                              reply.headers["content-security-policy"])
            assert nonce
            self.assertEqual(reply.body.count(f'nonce="{nonce[1]}"'.encode()), 3)
            with WebSocketClient(url, subprotocol="webchannels.v1") as one, \
                    WebSocketClient(url, subprotocol="webchannels.v1") as two:
                def tell(client: WebSocketClient, message: str, payload: Any) -> None:
                    client.send_json({"channel": "chat", "message": message, "payload": payload})

                def push(client: WebSocketClient, message: str) -> Any:
                    """The payload of the next push of this name."""
                    while True:
                        found = client.recv_json()
                        if found.get("message") == message:
                            return found["payload"]

                tell(one, "subscribe", None)
                tell(two, "say", "Hi \ud800")
                self.assertEqual(push(one, "said"), "Hi ?")
                tell(one, "say", 501 * "x")
                self.assertEqual(push(one, "said"), 500 * "x")
                tell(two, "subscribe", None)
                self.assertEqual([push(two, "said"), push(two, "said")], ["Hi ?", 500 * "x"])
                one.send_json({"channel": "wave", "message": "subscribe"})
                for _ in range(3):
                    at, height = push(one, "tick")
                    self.assertLess(abs(at - time.time()), 20)
                    self.assertLess(abs(height), 1.1)
            demo.type("\x03")
            self.assertEqual(demo.end(), (0, "(Ctrl+C stops)\n^C"))  # and no traceback

    def test_the_command_line(self) -> None:
        version = run_python("webchannels.py", "--version")
        self.assertEqual(version.stdout,
                         f"webchannels {webchannels.__version__}\nSHA-256 {sha256()}\n")
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
            for taken, said in ((port, f"webchannels: port {port} on 127.0.0.1 is taken: "
                                 f".*: --port {port + 1}, or a free one: --port 0"),
                                (99999, "webchannels: .*port must be 0-65535.*")):
                done = run_python("webchannels.py", "--port", str(taken))
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, f"^{said}\n$")


# ---- connect(): the client in Python -------------------------------------------------------------


class Impostor:
    """A server that answers one WebSocket handshake after the other, and then does as it is told.

    `handle(peer, key)` runs in a thread for each connection, which it may read and write.
    """

    def __init__(self, handle: Callable[[Connection, str], None]) -> None:
        self.handle, self.failures = handle, []  # type: ignore[var-annotated]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *error: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)
        if self.failures and error[0] is None:
            raise self.failures[0]

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer = Connection.__new__(Connection)
                peer.sock, peer.buffer = self.listener.accept()[0], bytearray()
                peer.sock.settimeout(10)
                try:
                    with peer:
                        while b"\r\n\r\n" not in peer.buffer:
                            peer.fill(len(peer.buffer) + 1)
                        head = peer.take(peer.buffer.index(b"\r\n\r\n") + 4).decode()
                        found = re.search("Sec-WebSocket-Key: (.*)\r\n", head)
                        self.handle(peer, found[1] if found else "")
                except (EOFError, ConnectionError):
                    pass
                except Exception as error:
                    self.failures.append(error)


def accepted(key: str, fields: str = "Sec-WebSocket-Protocol: webchannels.v1\r\n") -> bytes:
    digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return (f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: x, upgrade\r\n"
            f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n{fields}\r\n").encode()


def masked_frame(peer: Connection) -> tuple[int, bytes, bytes]:
    """The opcode (with RSV and FIN), the mask and the payload of a client's frame."""
    first, size = peer.take(2)
    assert size >= 128, "a client's frame is masked"
    size -= 128
    if size >= 126:
        size = int.from_bytes(peer.take(2 if size == 126 else 8), "big")
    mask = peer.take(4)
    keys = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return first, mask, (int.from_bytes(peer.take(size), "big") ^ keys).to_bytes(size, "big")


def sent(value: Any, opcode: int = TEXT) -> bytes:
    """A server's frame."""
    return webchannels.encode_frame(
        opcode, value if isinstance(value, bytes) else json.dumps(value).encode())


class ClientTest(ServerTest):
    """connect(), with real servers, and with those that break rules."""

    def configure(self, app: WebChannels) -> None:
        app.config.shutdown_timeout = 0.3  # for clients that nobody asks for anything

    def client(self, url: str = "", **options: Any) -> webchannels.ClientConnection:
        connection = webchannels.connect(url or self.url, **options)
        self.addCleanup(connection.close)
        return connection

    def assert_lost(self, why: str, call: Callable[..., Any], *given: Any, **options: Any) -> None:
        with self.assertRaisesRegex(ConnectionError, f"^{why}"):
            call(*given, **options)

    def test_messages_of_all_kinds_and_an_end(self) -> None:
        self.app.channels_support("room")

        @self.app.channel("/room/say")
        def say(payload: Any, client: ChannelClient) -> None:
            self.app.broadcast("room", "said", payload)
            self.app.broadcast("room", payload)

        @self.app.channel("/room/leave")
        def leave(client: ChannelClient) -> None:
            asyncio.get_running_loop().call_soon(client.close)  # behind the reply

        for scheme in "http", "ws":
            with self.client(self.url.replace("http", scheme)) as server:
                self.assertEqual(server.subscribe("room"), "Subscription: OK")
                server.send("room", "say", "Hello")
                for payload in (42, None, {"a": [1.5, "é"]}, b"\0\n\xff", b""):
                    self.assertEqual(server.request("____", "echo", payload), payload)
                server.send("room", "say", b"\1")
                with self.assertRaisesRegex(ChannelError, "^ERROR : 404 - Not found: no handler"):
                    server.request("____", "nothing")
                pushes = [server.receive(10) for _ in range(4)]
                self.assertEqual([push[1:3] for push in pushes], [
                    ("said", "Hello"), (None, "Hello"), ("said", b"\1"), (None, b"\1")])
                with self.assertRaises(TimeoutError):
                    server.receive(timeout=0.01)
                server.send("room", "say", "x")
                server.send("room", "leave")
                found = list(server)
                self.assertEqual(found, [("room", "said", "x", False), ("room", None, "x", False)])
                self.assert_lost("1000$", server.receive)
                self.assert_lost("1000$", server.send, "room", "say", 1)
        bad: list[tuple[Any, ...]] = [("/a", "b"), ("a", "b", object()), ("a", 1)]
        server = self.client()
        for wrong in bad:
            with self.assertRaises((TypeError, ValueError)):
                server.send(*wrong)

    def test_pushes_that_come_before_a_reply_are_kept_in_order(self) -> None:
        @self.app.channel("/____/burst")
        def burst(client: ChannelClient) -> str:
            for number in range(300):
                client.send("number", number)
            return "done"

        server = self.client()
        self.assertEqual([server.request("____", "burst") for _ in range(3)], ["done"] * 3)
        self.assertEqual([server.receive(5).payload for _ in range(900)], [*range(300)] * 3)
        late = threading.Event()
        self.app.channel("/____/late", lambda: late.wait(10), threaded=True)
        with self.assertRaisesRegex(TimeoutError, "sent nothing in time"):
            server.request("____", "late", timeout=0.01)
        late.set()
        self.assertEqual(server.request("____", "echo", 1), 1)  # the late reply came before
        self.app.connected_clients()[0].send("one", 1)
        self.until(lambda: server._inbox)
        self.assertEqual(server.receive(timeout=0).payload, 1)  # it need not wait for that
        with self.assertRaises(TimeoutError):
            server.receive(timeout=0)

    def test_an_end_that_is_not_normal_is_an_error_after_the_last_push(self) -> None:
        @self.app.channel("/____/leave")
        def leave(client: ChannelClient) -> None:
            client.send("last", 1)
            client.close(4000, "because")

        server, found = self.client(), []
        self.assert_lost("4000 because$", server.send, "____", "leave")
        with self.assertRaisesRegex(ConnectionError, "^4000 because$"):
            for push in server:
                found.append(push.payload)
        self.assertEqual(found, [1])
        server.close()
        self.assert_lost("4000 because$", server.receive)  # it stays the reason
        server = self.client()
        self.app.down()
        self.assert_lost("1001 server going down$", server.receive)
        self.assert_lost("1006 ConnectionRefusedError", self.client)

    def test_what_the_server_is_told_and_refuses(self) -> None:
        seen: list[Request] = []

        @self.app.on_connect
        def check(request: Request) -> None:
            seen.append(request)
            if request.cookies.get("session") != "1":
                raise HTTPError(401, "Who are you?\n\x1b")

        self.assert_lost(r"401 Unauthorized Who are you\?\\n\\x1b$", self.client)
        self.assert_lost("404 Not Found No WebSocket at /x", self.client, self.url + "/x")
        self.client(self.url + "/?a=1#b", headers={"Cookie": "session=1", "X-Y": "z"})
        self.assertEqual((seen[-1].target, seen[-1].headers["x-y"]), ("/?a=1", "z"))
        self.assertNotIn("origin", seen[-1].headers)
        for url in ("127.0.0.1:8000", "localhost:8000", "ftp://a", "http://", "http://a:x", "/",
                    f"{self.url}/a b", f"{self.url}/é", self.url.replace("://", "://ada:pw@"),
                    f"{self.url}\r\nA: b"):
            with self.assertRaises(ValueError, msg=url):
                self.client(url)
        for headers in {"a": "b\r\nc: d"}, {"a b": "c"}, {"a": "\u20ac"}:
            with self.assertRaises(ValueError, msg=str(headers)):
                self.client(headers=headers)
        with self.assertRaises(TypeError):
            self.client(max_size=1)
        with self.assertRaisesRegex(ValueError, "a URL begins with .*: not <webchannels.WebCh"):
            self.client(self.app)  # type: ignore[arg-type]

    def test_handshakes_that_are_no_good(self) -> None:
        extension = "Sec-WebSocket-Extensions: permessage-deflate; "
        no = "1006 .* no server of webchannels.v1 answers so: HTTP"
        for why, answer in (
                ("302 Found http://b/$",
                 b"HTTP/1.1 302 Found\r\nLocation: http://b/\r\nContent-Length: 0\r\n\r\n"),
                ("503 later$", b"HTTP/1.1 503 \r\nContent-Length: 5\r\n\r\nlater"),
                ("404 File not found$", b"HTTP/1.0 404 File not found\r\n\r\n"),
                ("1006 HTTPError: .*header field", b"HTTP/1.1 503 Later\r\nBad header: x\r\n\r\n"),
                ("1006 .* answers so: SSH-2.0", b"SSH-2.0\r\n\r\n"),
                ("1006 the server hung up$", b"HTTP/1.1 101"),
                ("1006 LimitOverrun", b"HTTP/1.1 101 x\r\n" + b"a: b\r\n" * 19999),
                (no, accepted("of another key")),
                *((no, (old, new)) for old, new in (
                    (": WebSocket", ": x"), ("upgrade", "close"), ("101", "100"),
                    ("webchannels.v1", "webchannels.v2"), ("Sec-WebSocket-Protocol", "X"),
                    ("\r\n\r\n", "\r\nSec-WebSocket-Extensions: x\r\n\r\n"),
                    *(("\r\n\r\n", f"\r\n{extension}{each}\r\n\r\n") for each in (
                        "client_no_context_takeover", "server_no_context_takeover; x",
                        "server_no_context_takeover; client_max_window_bits=8"))))):
            def handle(peer: Connection, key: str, answer: Any = answer) -> None:
                if isinstance(answer, tuple):
                    old, new = [each.encode() for each in answer]
                    answer = accepted(key).replace(old, new)
                peer.send_raw(answer)

            with self.subTest(answer=str(answer)[:80]), Impostor(handle) as server:
                self.assert_lost(why, self.client, server.url)

        def agree(peer: Connection, key: str) -> None:
            agreed = f"{extension}server_no_context_takeover; client_max_window_bits=9\r\n\r\n"
            peer.send_raw(accepted(key)[:-2] + agreed.encode())
            got.append(masked_frame(peer))
            peer.send_raw(sent({"ref": 1}))

        got: list[Any] = []
        with Impostor(agree) as server:
            self.client(server.url).send("a", "b", json.dumps([*range(9000)]))
            self.assert_lost(no, self.client, server.url, compression=False)
        self.assertEqual(got[0][0], 0xc1)
        inflated = zlib.decompressobj(-9).decompress(got[0][2] + b"\0\0\xff\xff")
        self.assertIn(b"8999", inflated)

    def test_tls(self) -> None:
        folder = Path(self.enterContext_(tempfile.TemporaryDirectory()))
        pem = certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        app = WebChannels()
        app.channel("/____/echo", lambda payload: payload)
        with serve(app, ssl=context) as url:
            self.assert_lost("1006 .*certificate", self.client, url)
            with self.assertRaisesRegex(ValueError, "ssl"):
                self.client(url.replace("https", "ws"), ssl=ssl.create_default_context())
            with self.client(url, ssl=ssl.create_default_context(cafile=str(pem))) as server:
                for size in 1, 100_000, 900_000:
                    data = os.urandom(size)
                    self.assertEqual(server.request("____", "echo", data), data)

    def test_every_frame_has_a_mask_of_its_own(self) -> None:
        frames = []

        def handle(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key))
            for ref in range(1, 5):
                frames.append(masked_frame(peer))
                peer.send_raw(sent({"ref": ref}) * 2)  # the second one has no effect
            peer.send_raw(sent(b"\x03\xe8", CLOSE))
            frames.append(masked_frame(peer))

        with Impostor(handle) as impostor:
            server = self.client(impostor.url)
            for _ in range(3):
                server.send("a", "b", "c" * 200)
            server.send("a", "b", bytes(70_000))
            self.assertEqual(list(server), [])
        head = '{"ref":%d,"channel":"a","message":"b"'
        self.assertEqual([payload for _, _, payload in frames], [
            *((head % ref + ',"payload":"' + "c" * 200 + '"}').encode() for ref in (1, 2, 3)),
            (head % 4).encode() + b"}\n" + bytes(70_000), b"\x03\xe8"])
        self.assertEqual([first for first, _, _ in frames], [0x81] * 3 + [0x82, 0x88])
        self.assertEqual(len({mask for _, mask, _ in frames}), 5)

    def test_a_server_that_breaks_the_rules_is_told(self) -> None:
        for data, code, reason in (
                (frame(TEXT, b"{}"), 1002, "frame masked"), (b"\x83\0", 1002, ".*opcode"),
                (frame(TEXT, b"x" * 200), 1002, "frame masked"), (b"\xc1\0", 1002, "reserved bit"),
                (b"\x81\1\xff", 1007, ".*invalid"),
                (b"\x88\0", 1005, ""), (b"\x88\1a", 1002, ".*close code"),
                (b"\x82\x7f\0\0\0\0\1\0\0\0", 1009, ".*too long")):
            told: list[Any] = []

            def handle(peer: Connection, key: str, data: bytes = data,
                       told: list[Any] = told) -> None:
                peer.send_raw(accepted(key) + data)
                told.append(masked_frame(peer))

            with self.subTest(data=data[:20]), Impostor(handle) as impostor:
                self.assert_lost(f"{code} ?{reason}", self.client(impostor.url).receive, 10)
            [(first, _, payload)] = told
            code_sent = b"" if code == 1005 else code.to_bytes(2, "big")
            self.assertEqual((first, payload[:2]), (0x88, code_sent))
        for data, reason in (
                (sent(b"{"), "JSONDecodeError"), (sent([]), "'list'"), (sent({"ref": []}), "list"),
                (sent({"channel": 5, "message": "a"}), "a channel is a str, not 5"),
                (sent({"message": [], "payload": 1}), "a message is a str"),
                (sent(b"\xff\n", BINARY), "utf-8"), (sent(b"[" * 600), "nested too deep")):
            def other(peer: Connection, key: str, data: bytes = data) -> None:
                peer.send_raw(accepted(key) + data)
                peer.rest(10)

            with self.subTest(data=data[:20]), Impostor(other) as impostor:
                self.assert_lost(f"1006 .*{reason}", self.client(impostor.url).receive, 10)

    def test_a_server_that_is_gone_is_noticed(self) -> None:
        asked, silent = [], threading.Event()

        def handle(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key))
            for _ in range(2):
                asked.append(masked_frame(peer)[0])
                peer.send_raw(sent(b"", PONG))
            silent.wait(10)

        with Impostor(handle) as impostor:
            server = self.client(impostor.url, ping_interval=0.05, ping_timeout=0.1)
            self.assert_lost("1006 .*no answer to a ping", server.receive)
            silent.set()
        self.assertEqual(asked, [0x89, 0x89])

    def test_a_server_that_answers_nothing(self) -> None:
        silent = threading.Event()
        with Impostor(lambda peer, key: (silent.wait(10), None)[1]) as impostor:
            self.assert_lost("1006 no answer in time$", self.client, impostor.url,
                             handshake_timeout=0.05)
            silent.set()

    def test_to_close_ends_it_even_if_the_server_does_not_hear(self) -> None:
        heard, silent = [], threading.Event()

        def handle(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key))
            heard.append(silent.wait(10))

        settings: tuple[dict[str, Any], ...] = (
            {"handshake_timeout": 0.5}, {"ping_interval": 0.02, "ping_timeout": 0.02})
        for each in settings:
            with Impostor(handle) as impostor, mock.patch("random.random", lambda: 0.0):
                server = self.client(impostor.url, reconnect=True, **each)
                server.close()
                server._thread.join(10)
                self.assertFalse(server._thread.is_alive())
                self.assert_lost("1000$", server.receive)
                silent.set()
            silent.clear()
        self.assertEqual(heard, [True, True])

    def test_to_close_ends_a_pause(self) -> None:
        server = self.client(reconnect=True)
        with mock.patch("random.random", lambda: 20.0), \
                self.assertLogs("webchannels", "WARNING") as logs:
            self.app.connected_clients()[0].close(4000)
            self.until(lambda: logs.output)
        self.assertRegex(logs.output[0], "4000: the next attempt is in 20.0 s$")
        server.close()
        server._thread.join(10)
        self.assertFalse(server._thread.is_alive())

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork()")
    def test_a_thread_that_is_not_there_is_not_waited_for(self) -> None:
        with mock.patch("asyncio.run", lambda main: main.close()):  # as without descriptors
            self.assert_lost("1006 .*thread", self.client)
        done = run_python("-c", f"""if True:
            import os, webchannels
            with webchannels.connect({self.url!r}) as server:
                if os.fork() == 0:
                    try:
                        server.request("____", "echo", 1)
                    except ConnectionError as error:
                        print(error)
                else:
                    os.wait()
                    print(server.request("____", "echo", 2))""", timeout=10)
        self.assertRegex(done.stdout, r"^1006 .*fork\(\)\?\n2\n$")

    def test_ctrl_c_while_it_waits_for_a_server(self) -> None:
        threads = {*threading.enumerate()}
        with mock.patch.object(webchannels.ClientConnection, "_wait",
                               side_effect=[SystemExit, None]), \
                mock.patch("random.random", lambda: 0.0):
            with self.assertRaises(SystemExit):  # of a signal's handler; or KeyboardInterrupt
                self.client("http://127.0.0.1:1", reconnect=True)
            for thread in {*threading.enumerate()} - threads:
                thread.join(10)
                self.assertFalse(thread.is_alive())

    def test_what_came_before_a_reset_is_received(self) -> None:
        async def read() -> tuple[bytes, bytes]:
            reader = webchannels._Reader()
            reader.feed_data(b"x")
            reader.set_exception(ConnectionResetError())  # as asyncio's protocol does
            return await reader.read(9), await reader.read(9)

        self.assertEqual(asyncio.run(read()), (b"x", b""))

    def test_pings_are_answered_whatever_the_program_does(self) -> None:
        pongs: list[Any] = []
        asked = threading.Event()

        def handle(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key) + sent(b"", PONG) * 5000 + sent(b"") + sent(b"1", PING))
            pongs.append(masked_frame(peer))
            peer.send_raw(sent({"channel": "a", "message": "b", "payload": 1}) * 3)
            asked.wait(10)
            peer.send_raw(sent(b"2", PING))
            pongs.append(masked_frame(peer))
            peer.send_raw(sent(b"\x03\xe8", CLOSE))

        with Impostor(handle) as impostor:
            server = self.client(impostor.url)
            self.assertEqual(server.receive(10).payload, 1)
            asked.set()
            self.until(lambda: len(pongs) == 2)  # while the program does other things
            self.assertEqual([push.payload for push in server], [1, 1])
        self.assertEqual([(first, payload) for first, _, payload in pongs],
                         [(0x8a, b"1"), (0x8a, b"2")])

    def test_compression(self) -> None:
        self.app.channel("/____/size", lambda payload: [len(payload), "y" * 100_000])
        for compression in True, False:
            with self.client(compression=compression) as server:
                self.assertEqual(server._bits > 0, compression)
                text = json.dumps([*range(9000)])
                for payload in (text, "x" * 1_000_000):  # which the server would not inflate
                    self.assertEqual(server.request("____", "size", payload),
                                     [len(payload), "y" * 100_000])

    def test_threads(self) -> None:
        """One thread iterates, others ask, and others send much."""
        self.app.channels_support("room")

        @self.app.channel("/room/say")
        def broadcast(payload: bytes) -> None:
            self.app.broadcast("room", "say", payload)

        server = self.client(max_message_size=4 * 2 ** 20)
        server.subscribe("room")
        got: list[Any] = []

        def iterate() -> None:
            for push in server:
                got.append(push.payload)
                if len(got) == 40:
                    return

        def ask(number: int) -> list[Any]:
            return [server.request("____", "echo", [number, each]) for each in range(200)]

        def say(number: int) -> None:
            for _ in range(20):
                server.send("room", "say", bytes([number]) * 500_000)

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            iterating = pool.submit(iterate)
            asking = [pool.submit(ask, number) for number in range(6)]
            saying = [pool.submit(say, number) for number in range(2)]
            for number, future in enumerate(asking):
                self.assertEqual(future.result(60), [[number, each] for each in range(200)])
            for said in saying:
                said.result(60)
            iterating.result(60)
        self.assertEqual(sorted(got), sorted([bytes([n]) * 500_000 for n in range(2)] * 20))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:  # close() ends what they wait for
            waiting = [pool.submit(server.receive) for _ in range(3)]
            server.close()
            for each in waiting:
                with self.assertRaisesRegex(ConnectionError, "^1000$"):
                    each.result(10)

    def test_what_is_called_back_may_use_the_connection_or_is_told_why_not(self) -> None:
        def convert(value: Any) -> Any:
            return server.request("____", "echo", 5)

        server = self.client(json_default=convert, reconnect=True)
        self.assertEqual(server.request("____", "echo", {1}), 5)

        class Shipping(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                try:
                    server.send("____", "echo")
                except RuntimeError as error:
                    told.append(str(error))

        told: list[str] = []
        with mock.patch("random.random", lambda: 0.0), self.assertLogs("webchannels", "WARNING"):
            logging.getLogger("webchannels").addHandler(Shipping())
            self.app.connected_clients()[0].close(4000)
            self.until(lambda: told)
        self.assertRegex(told[0], "own thread")

    def test_to_close_while_it_connects(self) -> None:
        handshakes: list[str] = []
        connected, closed = threading.Event(), threading.Event()

        def handle(peer: Connection, key: str) -> None:
            handshakes.append(key)
            peer.send_raw(accepted(key) if len(handshakes) == 1 else b"")
            if len(handshakes) == 1:
                connected.wait(10)  # and hangs up
            else:
                closed.wait(10)
                peer.send_raw(accepted(key))
                self.assertEqual(peer.rest(10), b"")  # it has gone without a word

        with Impostor(handle) as impostor, concurrent.futures.ThreadPoolExecutor(1) as pool, \
                mock.patch("random.random", lambda: 0.0):
            server = self.client(impostor.url, reconnect=True)
            connected.set()
            receiving = pool.submit(server.receive)
            self.until(lambda: len(handshakes) == 2)
            server.close()
            with self.assertRaisesRegex(ConnectionError, "^1000$"):
                receiving.result(10)
            closed.set()
            server._thread.join(10)
            self.assertFalse(server._thread.is_alive())

    def test_what_nobody_takes_is_bounded(self) -> None:
        @self.app.channel("/____/flood")
        def flood(client: ChannelClient, payload: int) -> None:
            for _ in range(payload):
                client.send("data", "x" * 1000)

        server = self.client(max_message_size=5000)
        for _ in range(5):
            server.send("____", "flood", 20)
            self.assertEqual(len([server.receive(5) for _ in range(20)]), 20)
        self.assert_lost(r"1008 over 8 \* max_message_size", server.send, "____", "flood", 100)
        found = []
        with self.assertRaisesRegex(ConnectionError, "^1008 "):
            for push in server:
                found.append(push)
        self.assertLess(25, len(found))  # 40,000 bytes, and what came with them

        def handle(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key) + sent({"channel": "x" * 5000, "missed": True}) * 20)
            told.append(masked_frame(peer)[2][:2])

        told: list[bytes] = []
        with Impostor(handle) as impostor:
            with self.assertRaisesRegex(ConnectionError, "^1008 "):
                list(self.client(impostor.url, max_message_size=6000, ping_interval=5))
        self.assertEqual(told, [(1008).to_bytes(2, "big")])

    def test_it_comes_back(self) -> None:
        refused = False
        busy: list[int] = []

        def guard(app: WebChannels) -> None:
            @app.channel("/room/subscribe")
            def admit(client: ChannelClient) -> None:
                if busy:
                    raise HTTPError(busy.pop(), "The database is not there yet")
                app.subscribe(client, "room")

            @app.channel("/secret/subscribe")
            def check(client: ChannelClient) -> None:
                if refused:
                    raise ChannelError("No more")
                app.subscribe(client, "secret")

        guard(self.app)
        port = self.app.port
        server = self.client(reconnect=True)
        plain = self.client()
        server.subscribe("room")
        server.subscribe("secret")
        server.subscribe("____")
        server.unsubscribe("____")
        refused, busy = True, [500, 503]
        self.app.down()
        self.assert_lost("1001 ", plain.receive)
        app = self.other()
        guard(app)
        with self.assertRaises(TimeoutError):
            server.receive(0.01)
        with self.assertRaises(TimeoutError):
            server.request("____", "echo", 1, timeout=0.01)
        with mock.patch("random.random", lambda: 0.0), serve(app, port=port):
            with self.assertLogs("webchannels", "WARNING") as logs:
                self.assertEqual(server.request("____", "echo", 2), 2)
                self.until(lambda: "No more" in "".join(logs.output))
            self.assertRegex("".join(logs.output), "subscription to secret is refused: .*No more")
            self.until(lambda: app.connected_clients("room"))
            app.broadcast("room", "tick", 3)
            self.assertEqual(server.receive(5).payload, 3)
            [client] = app.connected_clients()
            self.assertEqual(client.channels, {"room"})
            self.assertEqual(server._channels, {"room"})
            client.close(1008, "Not you")
            self.assert_lost("1008 Not you", server.receive)

    def test_it_waits_for_a_server_that_is_not_there_yet_unless_it_refuses(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = f"ws://127.0.0.1:{port}"
        with concurrent.futures.ThreadPoolExecutor(1) as pool, \
                mock.patch("random.random", lambda: 0.01):
            with self.assertLogs("webchannels", "WARNING") as logs:
                connecting = pool.submit(self.client, url, reconnect=True)
                self.until(lambda: len(logs.output) == 3)
            self.assertRegex(logs.output[1], r"Refused.*: the next attempt is in 0\.0 s$")
            with serve(self.other(), port=port):
                self.assertEqual(connecting.result(10).request("____", "echo", 1), 1)
        self.assert_lost("404 ", self.client, self.url + "/x", reconnect=True)

        def busy(peer: Connection, key: str) -> None:
            peer.send_raw(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n")
            impostor.handle = later

        def later(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key))
            masked_frame(peer)

        with Impostor(busy) as impostor, mock.patch("random.random", lambda: 0.0):
            self.client(impostor.url, reconnect=True).close()  # it tries again

    def test_pauses_grow_until_a_message_comes(self) -> None:
        handshakes: list[str] = []

        def handle(peer: Connection, key: str) -> None:
            handshakes.append(key)
            peer.send_raw(accepted(key) + (sent(b"") if len(handshakes) == 4 else b""))

        with Impostor(handle) as impostor, mock.patch("random.random", lambda: 0.1), \
                self.assertLogs("webchannels", "WARNING") as logs:
            server = self.client(impostor.url, reconnect=True)
            self.until(lambda: len(logs.output) == 5)
            server.close()
        pauses = [float(line.split()[-2]) for line in logs.output[:5]]
        self.assertEqual(pauses, [each / 10 for each in (1, 2, 4, 1, 2)])
        for kind, _ in webchannels.sparing._kinds:  # without a server, nobody lets go of them
            self.assertNotIsInstance(kind, logging.LogRecord)

    def other(self) -> WebChannels:
        app = WebChannels(Config(shutdown_timeout=0.3))
        app.channel("/____/echo", lambda payload: payload)
        return app

    def test_a_request_that_is_lost_is_an_error_and_not_sent_again(self) -> None:
        count = 0

        def handle(peer: Connection, key: str) -> None:
            nonlocal count
            peer.send_raw(accepted(key))
            while masked_frame(peer)[0] != 0x88:
                count += 1
                if count < 2:
                    return
                peer.send_raw(sent({"ref": 2, "payload": "second"}))

        with Impostor(handle) as impostor, mock.patch("random.random", lambda: 0.0):
            server = self.client(impostor.url, reconnect=True)
            self.assert_lost("1006 ", server.request, "a", "b")
            self.assertEqual(server.request("a", "b", timeout=10), "second")
            self.assertEqual(count, 2)
            server.close()

    def test_restarts_under_many_messages(self) -> None:
        """Nothing comes twice, or out of order; what is in doubt is an error."""
        handled: list[int] = []
        port, restarts, doubtful = self.app.port, 3, []
        self.app.down()
        stop = threading.Event()

        def serve_often() -> None:
            for number in range(restarts + 1):
                app = self.other()
                app.channel("/____/take", lambda payload: handled.append(payload))
                with serve(app, port=port):
                    enough = len(handled) + 1000
                    while not stop.wait(0.005) and (len(handled) < enough or number == restarts):
                        pass

        thread = threading.Thread(target=serve_often)
        with mock.patch("random.random", lambda: 0.01):
            thread.start()
            try:
                server = self.client(reconnect=True)
                for number in range(10_000):
                    try:
                        server.send("____", "take", number)
                    except ConnectionError:
                        doubtful.append(number)
            finally:
                stop.set()
                thread.join()
        self.assertEqual(handled, sorted(set(handled)))
        self.assertLessEqual(len(doubtful), restarts)
        self.assertLessEqual({*range(10_000)} - {*handled}, {*doubtful})

    def test_kept_channels_are_resumed(self) -> None:
        for app in self.app, self.other():
            app.keep("room", 5)
            app.keep("state", 1)
            for name in "room", "state":
                app.channels_support(name)
        port, server = self.app.port, self.client(reconnect=True)
        self.app.broadcast("room", "n", 1)
        server.subscribe("room")
        self.assertEqual(server.receive(5), ("room", "n", 1, False))
        self.app.broadcast("room", "n", 2)
        with mock.patch("random.random", lambda: 0.0):
            for first, lost in (3, False), (6, True):
                [client] = self.app.connected_clients()

                def leave(client: ChannelClient = client, first: int = first,
                          last: int = first + 3 + 3 * lost) -> None:
                    client.close(4000)
                    for number in range(first, last):
                        self.app.broadcast("room", "n", number)

                self.app._call(leave)  # it cannot come back before that is over
                if first == 3:
                    self.assertEqual([server.receive(5).payload for _ in range(4)], [2, 3, 4, 5])
                else:
                    self.assertEqual(server.receive(5), ("room", None, None, True))
                    self.assertEqual([server.receive(5).payload for _ in range(5)], [*range(7, 12)])
            self.app.broadcast("room", "n", 12, exclude=self.app.connected_clients())
            self.app.broadcast("room", b"13")
            self.assertEqual(server.receive(5), ("room", None, b"13", False))
            # Another server begins anew.
            self.app.down()
            app.broadcast("room", "n", 1)
            with serve(app, port=port):
                self.assertEqual(server.receive(5), ("room", None, None, True))
                self.assertEqual(server.receive(5).payload, 1)

    def test_where_it_is_in_a_kept_channel(self) -> None:
        asked: list[Any] = []

        def handle(peer: Connection, key: str) -> None:
            peer.send_raw(accepted(key))
            asked.append(json.loads(masked_frame(peer)[2]))
            if len(asked) == 1:
                peer.send_raw(sent({"ref": 1, "payload": "OK", "channel": "a", "at": "0e.5"}))
                for number in 6, 6, 5, 7:  # those that it knows are no news
                    peer.send_raw(sent({"n": number, "channel": "a", "message": "m",
                                        "payload": number}))
                peer.send_raw(sent({"n": 8, "channel": "a"}))  # for others
            else:
                peer.send_raw(sent({"channel": "nobody's", "at": "ff.3"}) +
                              sent({"channel": "a", "at": "ff.3", "missed": True}) +
                              sent(b'{"n":4,"channel":"a"}\nx', BINARY))
                masked_frame(peer)

        with Impostor(handle) as impostor, mock.patch("random.random", lambda: 0.0):
            server = self.client(impostor.url, reconnect=True)
            self.assertEqual(server.subscribe("a"), "OK")
            self.assertEqual([server.receive(5) for _ in range(4)], [
                ("a", "m", 6, False), ("a", "m", 7, False), ("a", None, None, True),
                ("a", None, b"x", False)])
            self.assertEqual(server._places, {"a": ("ff", 4)})
            server.close()
        self.assertEqual(asked, [{"channel": "a", "message": "subscribe", "ref": 1}, {
            "channel": "a", "message": "subscribe", "ref": 2, "since": "0e.8"}])


# ---- Several processes, over Redis ---------------------------------------------------------------


class Redis:
    """A redis-server of its own on a port that is free; over TLS with the certificate in `pem`."""

    def __init__(self, *options: str, pem: Path | None = None, port: int = 0) -> None:
        self.port = port or self.free_port()
        self.command = ["redis-server", "--bind", "127.0.0.1", "--save", "", *options]
        self.command += ["--port", str(self.port)] if not pem else [
            "--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no",
            "--tls-cert-file", str(pem), "--tls-key-file", str(pem), "--tls-ca-cert-file", str(pem)]
        self.start()

    def free_port(self) -> int:
        """Not one of those that the system gives to connections, which could take it meanwhile."""
        while True:
            port = random.randrange(15_000, 30_000)
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                return port

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE)
        assert self.process.stdout
        while b"Ready to accept connections" not in self.process.stdout.readline():
            assert self.process.poll() is None, self.command

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def ask(self, *words: str) -> list[str]:
        """The lines of the answer, without those of lengths."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as sock:
            sock.sendall(" ".join([*words, "\r\nQUIT\r\n"]).encode())
            text = b"".join(iter(lambda: sock.recv(65536), b"")).decode(errors="replace")
        return [line for line in text.split("\r\n")[:-2] if line[:1] not in ("*", "$")]


class Lines(logging.Handler):
    """What is logged meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


class RedisTest(ServerTest):
    PROGRAM = """
import asyncio, sys
from webchannels import *
config.redis_url = sys.argv[1]

@channel("/____/flood")
async def flood(payload):
    for number in range(payload):
        broadcast("____", sys.argv[2], number)
        if number % 100 == 99:
            await asyncio.sleep(0)

@channel("/____/who")
def who():
    return sys.argv[2]

print(up(int(sys.argv[3]), block=False, reuse_port=True), flush=True)
sys.stdin.read()
"""

    def setUp(self) -> None:
        if not shutil.which("redis-server"):
            self.skipTest("needs redis-server")
        self.folder = Path(self.enterContext_(tempfile.TemporaryDirectory()))
        self.redis = self.redis_server()
        self.log = Lines()
        logger = logging.getLogger("webchannels")
        logger.addHandler(self.log)
        self.addCleanup(logger.removeHandler, self.log)
        self.addCleanup(setattr, logger, "propagate", logger.propagate)
        logger.propagate = False

    def redis_server(self, *options: str, pem: Path | None = None) -> Redis:
        redis = Redis("--dir", str(self.folder), *options, pem=pem)
        self.addCleanup(redis.kill)
        return redis

    def patient(self, seconds: float) -> None:
        self.addCleanup(setattr, webchannels, "_PATIENCE", webchannels._PATIENCE)
        webchannels._PATIENCE = seconds

    def new_app(self, url: str = "", **settings: Any) -> WebChannels:
        url = url or f"redis://127.0.0.1:{self.redis.port}"
        app = WebChannels(Config(redis_url=url, shutdown_timeout=0.1, **settings))
        app.channels_support("a")
        app.channels_support("b")
        app.channels_support("k")
        app.keep("k", 1000)
        return app

    def serving(self, url: str = "", **settings: Any) -> tuple[WebChannels, str]:
        app = self.new_app(url, **settings)
        return app, self.enterContext_(serve(app))

    def client(self, url: str, *channels: str, redis: bool = True,
               **options: Any) -> WebSocketClient:
        """A client that is subscribed; at Redis, too, as the first of its process."""
        client = WebSocketClient(url, **options)
        self.addCleanup(client.close)
        before = {channel: self.subscribers(channel) for channel in channels if redis}
        for channel in channels:
            client.send_json({"channel": channel, "message": "subscribe"})
            self.assertIn("Subscription: OK", client.recv_text())
        self.until(lambda: all(self.subscribers(each) > count for each, count in before.items()))
        return client

    def subscribers(self, channel: str, name: str = "0") -> int:
        """How many processes have subscribed to it at Redis."""
        return int(self.redis.ask("PUBSUB", "NUMSUB", f"webchannels/{name}/{channel}")[1][1:])

    def connections(self) -> int:
        """How many Redis has, besides the one that asks."""
        return str(self.redis.ask("CLIENT", "LIST")).count(" addr=") - 1

    def child(self, name: str, port: int = 0) -> tuple[subprocess.Popen[str], str]:
        """A process of its own, and its URL."""
        process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, f"redis://127.0.0.1:{self.redis.port}", name,
             str(port)], cwd=HERE, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        assert process.stdout
        return process, process.stdout.readline().strip()

    def test_all_that_a_broadcast_can_be_reaches_other_processes(self) -> None:
        read = WebSocketClient.recv_envelope
        (one, first), (two, second) = self.serving(), self.serving()
        stranger = self.client(self.serving(self.url_of("other"))[1], "a", redis=False)
        self.until(lambda: self.subscribers("a", "other"))
        here = self.client(first, "a", subprotocol="webchannels.v1")
        there = self.client(second, "a", "b", subprotocol="webchannels.v1", deflate=True)
        plain = self.client(second, "a", redis=False)
        other = next(client for client in two.connected_clients("b"))
        self.assertTrue(one.broadcast("a", "text"))
        self.assertFalse(one.broadcast("b", "b has nobody here"))
        one.broadcast(["a", "b"], "several", {"n": float("nan"), "long": "é" * 5000})
        one.broadcast("a", "nan", float("nan"))
        one.broadcast("a", "nan", None)
        one.broadcast("a", b"\x00\xff\n")
        one.broadcast("a", "bytes", b"\n\xff" * 5000)
        one.broadcast("a", "")
        one.broadcast("a", "not to there", exclude=other)
        one.broadcast("a", "not to there either", exclude=[other.id])
        one.broadcast("a", "only to there", only=other.id)
        one.broadcast("a", "to nobody", only=[])
        one.broadcast("a", "last")
        several = {"message": "several", "payload": {"n": None, "long": "é" * 5000}}
        text, nan = {"channel": "a", "message": "text"}, {"channel": "a", "message": "nan",
                                                          "payload": None}
        empty, last = {"channel": "a", "message": ""}, {"channel": "a", "message": "last"}
        bare = {"channel": "a", "payload": b"\x00\xff\n"}
        named = {"channel": "a", "message": "bytes", "payload": b"\n\xff" * 5000}
        self.assertEqual([read(there) for _ in range(11)], [
            text, {"channel": "b", "message": "b has nobody here"}, {"channel": "a", **several},
            {"channel": "b", **several}, nan, nan, bare, named, empty,
            {"channel": "a", "message": "only to there"}, last])
        self.assertEqual([read(here) for _ in range(10)], [
            text, {"channel": "a", **several}, nan, nan, bare, named, empty,
            {"channel": "a", "message": "not to there"},
            {"channel": "a", "message": "not to there either"}, last])
        self.assertEqual(plain.recv_text(), "text")
        self.assertEqual(plain.recv_json()["channel"], "a")
        self.assertEqual([plain.recv_json(), plain.recv_json()], [nan, nan])
        self.assertEqual(plain.recv(), (BINARY, b"\x00\xff\n"))
        self.assertEqual(plain.recv(), (BINARY, b"\n\xff" * 5000))
        self.assertEqual([plain.recv_text() for _ in range(4)],
                         ["", "not to there", "not to there either", "last"])
        with self.assertRaises(socket.timeout):
            stranger.recv(0.05)
        with self.assertRaisesRegex(ValueError, "max_send_buffer"):
            one.broadcast("a", "x" * (1 << 20))

    def url_of(self, name: str) -> str:
        return f"redis://127.0.0.1:{self.redis.port}/{name}"

    def test_only_what_has_subscribers_is_subscribed_to(self) -> None:
        app, url = self.serving()

        def known() -> list[str]:
            return self.redis.ask("PUBSUB", "CHANNELS")
        self.assertEqual(known(), [])
        one, two = self.client(url, "a"), self.client(url)
        two.send_json({"channel": "a", "message": "subscribe"})
        two.recv_text()
        self.assertEqual(known(), ["webchannels/0/a"])
        one.close()
        self.until(lambda: len(app.connected_clients()) == 1)
        app.broadcast("a", "still")
        self.assertEqual((two.recv_text(), known()), ("still", ["webchannels/0/a"]))
        two.send_json({"channel": "a", "message": "unsubscribe"})
        two.recv_text()
        self.until(lambda: known() == [])
        [client] = app.connected_clients()
        app.subscribe(client, "\ud800")  # no UTF-8 has it
        self.until(lambda: known() != [])
        two.close()
        self.until(lambda: known() == [])
        self.assertEqual(self.log.lines, [])

    def test_many_broadcasts_of_one_turn_are_one_write(self) -> None:
        app, url = self.serving()
        writes: list[bytes] = []
        client = self.client(self.serving()[1], "a")

        def burst() -> None:
            bus: Any = app._bus
            original = bus._writer.write

            def write(data: bytes) -> None:
                writes.append(data)
                original(data)
            bus._writer.write = write
            for number in range(100):
                app.broadcast("a", str(number))
        app._call(burst)
        self.assertEqual([client.recv_text() for _ in range(100)], [*map(str, range(100))])
        self.assertEqual(len(writes), 1)

    def test_a_lone_broadcast_goes_at_once(self) -> None:
        self.patient(60)  # until a PING, with which it would go at last
        (one, _), (_, second) = self.serving(), self.serving()
        there = self.client(second, "a")
        for _ in range(2):
            one.broadcast("a", "alone")
            self.assertEqual(there.recv_text(), "alone")

    def test_a_burst_of_more_than_is_held_is_written_meanwhile(self) -> None:
        one, _ = self.serving(max_send_buffer=1 << 16)
        there, count = self.client(self.serving()[1], "a"), 60

        @one.channel("/____/burst")
        def burst() -> None:
            for number in range(count):  # of over 8 * max_send_buffer bytes
                one.broadcast("a", "number", [number, "x" * 10_000])

        with WebSocketClient(one.url) as client:
            client.send_json({"channel": "____", "message": "burst"})
            self.assertEqual([there.recv_json()["payload"][0] for _ in range(count)],
                             [*range(count)])
        self.assertEqual([each for each in self.log.lines if "held the event" not in each], [])

    def once_and_in_order(self, count: int, each: int) -> None:
        """Each of `count` processes broadcasts the numbers below `each`, all at the same time."""
        urls = [self.child(str(number))[1] for number in range(count)]
        clients = [self.client(url, "____") for url in urls]
        for client in clients:
            client.send_json({"channel": "____", "message": "flood", "payload": each})
        for client in clients:
            got: dict[str, list[int]] = {str(number): [] for number in range(count)}
            for _ in range(count * each):
                push = client.recv_json()
                got[push["message"]].append(push["payload"])
            for numbers in got.values():
                self.assertEqual(numbers, list(range(each)))

    def test_two_processes_get_each_broadcast_once_and_in_order(self) -> None:
        self.once_and_in_order(2, 5000)

    def test_four_processes_get_each_broadcast_once_and_in_order(self) -> None:
        self.once_and_in_order(4, 2500)

    def test_a_process_is_killed_and_replaced(self) -> None:
        app, url = self.serving()
        client = self.client(url, "____")
        for number in range(2):
            process, there = self.child(str(number))
            other = self.client(there, "____")
            app.broadcast("____", f"to {number}")
            self.assertEqual([each.recv_text() for each in (client, other)], [f"to {number}"] * 2)
            other.send_json({"channel": "____", "message": "flood", "payload": 1})
            self.assertEqual(client.recv_json()["message"], str(number))
            process.kill()
            self.until(lambda: self.subscribers("____") == 1)
        self.assertEqual(self.log.lines, [])

    def test_several_processes_on_one_port(self) -> None:
        if not hasattr(socket, "SO_REUSEPORT"):
            self.skipTest("needs SO_REUSEPORT")
        url = self.child("0")[1]
        for number in range(1, 4):
            self.assertEqual(self.child(str(number), int(url.rpartition(":")[2]))[1], url)
        clients: dict[str, WebSocketClient] = {}
        for _ in range(500):  # the system spreads them by a hash of their ports
            client = self.client(url)
            client.send_json({"channel": "____", "message": "who"})
            clients.setdefault(client.recv_text(), client)
            if len(clients) == 4:
                break
        for client in clients.values():
            client.send_json({"channel": "____", "message": "subscribe"})
            client.recv_text()
        self.until(lambda: self.subscribers("____") == 4)
        clients["0"].send_json({"channel": "____", "message": "flood", "payload": 1})
        for client in clients.values():
            self.assertEqual(client.recv_json()["message"], "0")

    def test_a_system_that_cannot_share_a_port(self) -> None:
        if hasattr(socket, "SO_REUSEPORT"):
            self.addCleanup(setattr, socket, "SO_REUSEPORT", socket.SO_REUSEPORT)
            del socket.SO_REUSEPORT
        with self.assertRaisesRegex(ValueError, "reuse_port"):
            self.new_app().up(0, reuse_port=True, block=False)
        self.until(lambda: self.connections() == 0)

    # Faults.

    def test_redis_is_killed_and_comes_back(self) -> None:
        (one, first), (two, second) = self.serving(), self.serving()
        here, there = self.client(first, "a"), self.client(second, "a")
        sent = 0

        def send(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                sent += 1
                self.assertTrue(one.broadcast("a", str(sent)))
        send(1000)
        got = [int(there.recv_text()) for _ in range(1000)]
        send(1000)
        self.redis.kill()  # in the middle of these
        send(1000)
        self.until(lambda: self.log.count("lost Redis") == 2)
        away = sent
        send(1000)
        here.timeout = 1  # at once
        self.assertEqual([here.recv_text() for _ in range(sent)], [*map(str, range(1, sent + 1))])
        self.client(second, "b", redis=False)  # is to be subscribed to when Redis is back
        bus: Any = two._bus
        where, bus._where = bus._where, ("127.0.0.1", 9)  # it comes back later than the sender
        self.redis.start()
        self.until(lambda: self.connections() == 1)
        bus._where = where
        self.until(lambda: self.log.count("is back") == 2)
        send(1)
        one.broadcast("b", "b")
        while got[-1] != sent:
            got.append(int(there.recv_text()))
        self.assertEqual(got, sorted(set(got)))  # in order, none twice
        self.assertEqual((got[0], got[999], got[-1001], got[-1]), (1, 1000, away + 1, sent))
        self.until(lambda: self.subscribers("b"))
        self.assertEqual(len(self.log.lines), 4, self.log.lines)

    def test_a_bus_may_start_again(self) -> None:
        (one, _), (_, url) = self.serving(), self.serving()
        there = self.client(url, "a")
        one.config.bus = webchannels.RedisBus(f"redis://127.0.0.1:{self.redis.port}", 9999)
        for number in range(2):
            one.down()
            one.up(0, block=False)
            one.broadcast("a", str(number))
            self.assertEqual(there.recv_text(), str(number))
        self.redis.kill()
        self.until(lambda: self.log.count("lost Redis") == 2)
        self.redis.start()
        self.until(lambda: self.log.count("is back") == 2)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_forked_child_lets_go_of_redis(self) -> None:
        app, _ = self.serving()
        self.assertEqual(self.connections(), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the child only waits
            child = os.fork()
        if not child:
            signal.pause()
        self.addCleanup(os.waitpid, child, 0)
        self.addCleanup(os.kill, child, signal.SIGKILL)
        bus: Any = app._bus
        app._call(bus._writer.transport.abort)
        self.until(lambda: self.log.count("is back"))
        self.assertEqual(self.connections(), 1)

    def test_a_redis_that_stalls_is_noticed(self) -> None:
        self.patient(0.2)
        (one, first), (_, second) = self.serving(), self.serving()
        here, there = self.client(first, "a"), self.client(second, "a")
        self.redis.process.send_signal(signal.SIGSTOP)
        self.until(lambda: self.log.count("(no answer)") == 2)
        self.assertTrue(one.broadcast("a", "meanwhile"))
        self.assertEqual(here.recv_text(), "meanwhile")
        with self.assertRaisesRegex(ConnectionError, "no answer"):
            self.new_app().up(0, block=False)
        self.redis.process.send_signal(signal.SIGCONT)
        self.assertEqual(there.recv_text(), "meanwhile")
        self.assertEqual(self.log.count("lost Redis"), 2)

    def test_a_redis_that_lags_gets_what_was_held_when_it_reads_again(self) -> None:
        self.patient(60)  # until a PING, with which it would go at last
        (one, _), (_, second) = (self.serving(max_send_buffer=1 << 24) for _ in range(2))
        there, count = self.client(second, "a"), 150
        self.redis.process.send_signal(signal.SIGSTOP)
        for _ in range(count):  # 15 MB: more than any buffer between
            one.broadcast("a", "x" * 100_000)
        self.redis.process.send_signal(signal.SIGCONT)
        for _ in range(count):
            self.assertEqual(len(there.recv_text()), 100_000)
        self.assertEqual(self.log.lines, [])

    def test_down_returns_at_once(self) -> None:
        def quick() -> float:
            with serve(self.new_app()) as url:
                self.client(url, "a").close()
                begun = time.monotonic()
            return time.monotonic() - begun
        self.assertLess(min(quick() for _ in range(3)), 0.4)  # a busy machine is slow now and then

    def test_a_quiet_redis_is_not_lost(self) -> None:
        self.patient(0.02)
        self.serving()
        self.until(lambda: "calls=5" in str(self.redis.ask("INFO", "commandstats")
                                            ).partition("cmdstat_ping:")[2])
        self.assertEqual(self.log.lines, [])

    def test_past_the_bound_the_oldest_are_dropped(self) -> None:
        (one, _), (_, second) = self.serving(max_send_buffer=2048), self.serving()
        there = self.client(second, "a")
        self.redis.kill()
        self.until(lambda: self.log.count("lost Redis") == 2)
        for number in range(1000):
            one.broadcast("a", f"{number:0100}")
        bus: Any = one._bus
        self.assertLess(sum(len(each.data) for each in bus._queue), 8 * 2048)
        self.redis.start()
        first_kept = int(there.recv_text())
        self.assertEqual([int(there.recv_text()) for _ in range(first_kept + 1, 1000)],
                         [*range(first_kept + 1, 1000)])
        one.down()
        said = "the oldest broadcast that waited for Redis is dropped"
        self.assertEqual([line for line in self.log.lines if said in line],
                         [said, f"{first_kept - 1} more like this: {said}"])

    def test_a_broadcast_right_before_the_end_gets_through(self) -> None:
        app = self.new_app()
        there = self.client(self.serving(max_send_buffer=1 << 24)[1], "a")
        app.up(0, block=False)
        self.redis.process.send_signal(signal.SIGSTOP)
        app._call(lambda: [app.broadcast("a", "x" * 10_000) for _ in range(700)])
        bus: Any = app._bus
        ending = threading.Thread(target=app.down)
        ending.start()
        self.until(lambda: bus._keeping.done())
        self.redis.process.send_signal(signal.SIGCONT)
        for _ in range(700):
            self.assertEqual(len(there.recv_text()), 10_000)
        ending.join()
        self.assertEqual(self.log.lines, [])

    def test_without_redis_a_script_ends_at_once(self) -> None:
        self.redis.kill()
        done = run_python("-c", self.PROGRAM, f"redis://:secret@127.0.0.1:{self.redis.port}", "",
                          "0", timeout=10)
        self.assertNotEqual(done.returncode, 0)
        self.assertRegex(done.stderr.splitlines()[-1],
                         f"ConnectionError: no Redis at 127.0.0.1:{self.redis.port}: .*111|refused")
        self.assertNotIn("secret", done.stderr)

    def test_tls_and_passwords(self) -> None:
        pem, secret = certificate(self.folder), "p:a/s@s wörd"
        redis = self.redis_server("--requirepass", f"{secret}!", "--user", "b@b", "on",
                                  f">{secret}", "&*", "+@all", pem=pem)
        quoted = "".join(f"%{byte:02x}" for byte in secret.encode())
        url = f"rediss://{{}}@localhost:{redis.port}/tls"

        def refused(url: str) -> str:
            with self.assertRaises(ConnectionError) as caught:
                self.serving(url)
            self.assertIn(f":{redis.port}: ", str(caught.exception))
            return str(caught.exception)
        self.assertIn("CERTIFICATE_VERIFY_FAILED", refused(url.format(f":{quoted}")))
        before = os.environ.get("SSL_CERT_FILE")
        self.addCleanup(lambda: os.environ.pop("SSL_CERT_FILE") if before is None else
                        os.environ.update(SSL_CERT_FILE=before))
        os.environ["SSL_CERT_FILE"] = str(self.folder / "cert.pem")
        for login in f":{quoted}!", f"default:{quoted}!", f"b%40b:{quoted}":
            one, _ = self.serving(url.format(login))
            _, second = self.serving(url.format(login))
            there = self.client(second, "a", redis=False)
            while not select.select([there.sock], [], [], 0.01)[0]:  # until Redis knows of it
                one.broadcast("a", "x" * 100_000)
            self.assertEqual(len(there.recv_text()), 100_000)
            self.assertNotIn(secret, f"{one.config} {vars(one)}")
        self.assertIn("WRONGPASS", refused(url.format("default:wrong")))
        self.assertIn("NOAUTH", refused(url.format("@").replace("@@", "")))
        with self.assertRaises(ConnectionError):
            self.serving(url.replace("rediss", "redis").format(f":{quoted}"))
        for bad in (f"redis://:{secret}@localhost", f"http://:{secret}@x", "redis://",
                    "redis://x:y", f"redis://localhost?password={secret}"):
            self.assertNotIn(secret, repr(Config(redis_url=bad)))
            with self.assertRaisesRegex(ValueError, "config.redis_url is not") as caught:
                self.new_app(bad).up(0, block=False)
            self.assertNotIn(secret, str(caught.exception))
        self.assertEqual(self.log.lines, [])

    GREETING = b"%1\r\n$5\r\nproto\r\n:3\r\n"

    def fake(self, *answers: bytes, echo: bool = False) -> str:
        """The URL of a server that gives each connection these answers, one for each read."""
        server = socket.create_server(("127.0.0.1", 0))

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as sock:
                        for answer in answers:
                            data = sock.recv(65536)
                            sock.sendall(data if echo else answer)
                        while sock.recv(65536):
                            pass
        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(server.close)
        self.addCleanup(server.shutdown, socket.SHUT_RDWR)
        return f"redis://:secret@127.0.0.1:{server.getsockname()[1]}"

    def test_what_is_no_redis(self) -> None:
        self.patient(0.3)
        for answer, why in (
                (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it said 'HTTP/1.1 400 Bad Request'"),
                (b"-DENIED Redis is running in protected mode\r\n", "it said '-DENIED Redis is"),
                (b"+OK\r\n-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n",
                 "it said '-ERR unknown command"),
                (b"-ERR what does secret mean\r\n", "what does \\*\\*\\* mean"),
                (b"-ERR " + 192 * b"x" + b" secret\r\n", "x \\*\\*'"),
                (b"\x15\x03\x03\x00\x02", "no answer"), (b"x" * 200_000, "chunk|limit"),
                (b"", "no answer")):
            with self.subTest(why), self.assertRaisesRegex(ConnectionError, why) as caught:
                self.new_app(self.fake(answer)).up(0, block=False)
            self.assertNotIn("secret", str(caught.exception))
        with self.assertRaisesRegex(ConnectionError, "it said '\\*2'"):
            self.new_app(self.fake(b"", echo=True)).up(0, block=False)

    def test_replies_that_are_malformed_or_too_large(self) -> None:
        for answer, why in (
                (b"-NOPERM this user may not\r\n", "it said b'-NOPERM this user may not"),
                (b">3\r\n$7\r\nmessage\r\n$15\r\nwebchannels/0/\xff\r\n$1\r\nx\r\nhello\r\n",
                 "it said b'hello"),  # after a message on a channel that nobody asked for
                (b"$7\r\nmessageXY\r\n", r"it said b'\\r\\n'"),
                (b"$99999999999\r\n", "it said b'\\$99999999999"),
                (b"$-1\r\n", "it said b'\\$-1"), (b"hello\r\n", "it said b'hello"),
                (b"$30000\r\n" + b"x" * 30000, "it said b'\\$30000"),
                (b"+" + b"x" * 30000, "it said b'\\+xxx")):
            with self.subTest(why):
                app, url = self.serving(self.fake(b"+OK\r\n" + self.GREETING, answer),
                                        max_send_buffer=2048)
                self.client(url, "a", redis=False)  # the fake answers to the subscription
                self.until(lambda: self.log.lines)
                self.assertRegex(self.log.lines[0], why)
                app.down()
                self.log.lines.clear()

    def test_messages_that_are_none(self) -> None:
        app, url = self.serving(max_send_buffer=2048)
        client = self.client(url, "a", subprotocol="webchannels.v1")
        sender = "0123456789abcdef"
        texts = [
            "garbage", "x" * 40, sender + "[1]\n", sender + "[1,2,null]\n{}",
            sender + "[1,[]]\n{}", sender + "[1,[[]],null]\nx",
            *(f"{sender}[{opcode},[],null]\n{body}" for opcode in (0, 1, 3, '"x"') for body in (
                '{"ref":1,"payload":"spoofed"}', '[1]', '"a"', "{", "[" * 2000, "",
                '{"error":"spoofed","message":"x"}', '{"channel":"b","message":"x","payload":1}',
                '{"channel":"a","payload":{}}', '{"channel":"a","message":1,"payload":1}',
                '{"channel":"a","message":"x","payload":NaN}', '{"channel":"a"}\n',
                '{"channel":"a","message":"%s"}' % ("x" * 3000))),
            *(f"{sender}[2,[],null]\n{body}" for body in (
                '{"channel":"a"}', "abc", "\n", '{"channel":"b"}\n', '{"channel":"a","ref":1,\n',
                '{"channel":"a","message":1}\n', '{"channel":"a","payload":1}\nx',
                '{"channel":"a"}\n' + "x" * 3000))]
        for text in texts:
            self.redis.ask("PUBLISH", "webchannels/0/a", json.dumps(text))
        for opcode in 1, 2:  # no UTF-8
            for body in r'{\"channel\":\"a\",\"message\":\"\xff\"}\n', r"\xff":
                text = f'"{sender}[{opcode},[],null]\\n{body}"'
                self.redis.ask("PUBLISH", "webchannels/0/a", text)
        for fine, sent in (
                ('[1,[],null]\n{"channel":"a","message":"x","payload":{"ref":1},"ref":2}',
                 {"channel": "a", "message": "x", "payload": {"ref": 1}}),  # made anew
                ('[2,[],null]\n{"channel":"a","message":"x","ref":2}\n{"ref":1}',
                 {"channel": "a", "message": "x", "payload": b'{"ref":1}'})):
            self.redis.ask("PUBLISH", "webchannels/0/a", json.dumps(sender + fine))
            self.assertEqual(client.recv_envelope(), sent)
        app.down()
        count = len(texts) + 3  # one of them was told
        self.assertEqual(self.log.count(f"{count} more like this: not a broadcast of ours"), 1)

    # Other engines.

    def test_an_engine_of_ones_own(self) -> None:
        class Nearby(webchannels.Bus):
            """Between the apps of one process."""

            everyone: list[Nearby] = []

            async def start(self) -> None:
                self.wanted: set[str] = set()
                self.everyone.append(self)

            async def stop(self) -> None:
                self.everyone.remove(self)

            def publish(self, channel: str, data: bytes) -> None:
                for bus in self.everyone:  # itself, too
                    if channel in bus.wanted:
                        bus.deliver(channel, data)  # into other threads, which do the same

            def listen(self, channel: str, wanted: bool) -> None:
                (self.wanted.add if wanted else self.wanted.remove)(channel)

        class Broken(webchannels.Bus):
            async def start(self) -> None:
                raise RuntimeError("no engine")

        class Deaf(webchannels.Bus):
            def listen(self, channel: str, wanted: bool) -> None:
                if channel == "a" or not wanted:
                    raise RuntimeError("on purpose")

        app = WebChannels(Config(bus=Deaf(), shutdown_timeout=0.1))
        app.channels_support("a")
        client = self.client(self.enterContext_(serve(app)), "____", redis=False)
        for _ in range(2):  # and it stays an error
            client.send_json({"channel": "a", "message": "subscribe"})
            self.assertEqual(client.recv_text(), "ERROR : 500 - Internal error")
        client.close()
        self.until(app.disconnected_clients)
        self.assertEqual(self.log.count("the bus did not let go of channel '____'"), 1)

        apps = [WebChannels(Config(bus=Nearby(), shutdown_timeout=0.1)) for _ in range(3)]
        clients = [self.client(self.enterContext_(serve(app)), "____", redis=False)
                   for app in apps]
        self.assertTrue(apps[0].broadcast("____", "first"))
        self.assertEqual([client.recv_text() for client in clients], ["first"] * 3)
        clients[2].close()
        self.until(lambda: not Nearby.everyone[2].wanted)

        def burst(app: WebChannels) -> None:
            for number in range(100):
                app.broadcast("____", "number", number)
        threads = [threading.Thread(target=app._call, args=(functools.partial(burst, app),))
                   for app in apps]
        for thread in threads:
            thread.start()
        for client in clients[:2]:
            got = [client.recv_json()["payload"] for _ in range(300)]
            self.assertEqual(sorted(got), sorted([*range(100)] * 3))
        for thread in threads:
            thread.join()
        for app in apps:
            app.down()
        self.assertEqual(Nearby.everyone, [])
        with self.assertRaisesRegex(RuntimeError, "no engine"):
            WebChannels(Config(bus=Broken())).up(0, block=False)
        apps[0].config.bus = webchannels.Bus()
        with serve(apps[0]) as url:
            client = self.client(url, "____", redis=False)
            apps[0].broadcast("____", "alone")
            self.assertEqual(client.recv_text(), "alone")

    # What is kept.

    def page(self, url: str, since: str = "") -> KeptClient:
        page = KeptClient(url, since)
        self.addCleanup(page.client.close)
        return page

    def test_redis_numbers_what_is_kept(self) -> None:
        (one, first), (two, second) = self.serving(), self.serving()
        here, there = self.page(first), self.page(second)
        for page in (here, there):
            self.until(lambda page=page: page.read(0.05) or page.at)  # type: ignore[misc]
            self.assertRegex(page.at, "[.]0$")  # told although nothing was ever sent
        sender = one.connected_clients()[0]
        for number in range(20):
            (one, two)[number % 2].broadcast("k", "m", number)
        here.read_to(20)
        there.read_to(20)
        self.assertFalse(one.broadcast("k", "m", "its own", exclude=sender))
        self.assertTrue(one.broadcast("k", b"bytes"))
        two.broadcast("k", "m", "not kept", only=sender)
        here.read_to(22)
        there.read_to(22)
        self.assertEqual(sorted(map(str, there.got[:20])), sorted(map(str, range(20))))
        self.assertEqual([got for got in here.got if got != "not kept"],
                         [got for got in there.got if got != "its own"])
        for since in (there.places[10], there.at):  # elsewhere, and after all were restarted
            for url in (first, self.serving()[1]):
                page = self.page(url, since)
                page.read_to(22)
                self.assertEqual((page.got, page.missed),
                                 (there.got[there.places.index(since) + 1:], 0))
        page = self.page(first, there.at.replace(".22", ".23"))  # nobody has told it that
        page.read_to(22)
        self.assertEqual((len(page.got), page.missed), (22, 1))
        [key] = self.redis.ask("KEYS", "*")
        self.assertEqual(key, "webchannels/0/k")
        self.assertEqual(self.log.lines, [])

    def test_kept_while_redis_is_away(self) -> None:
        self.redis.kill()
        self.redis = self.redis_server("--appendonly", "yes", "--appendfsync", "always")
        (one, first), (two, second) = self.serving(), self.serving()
        here, there = self.page(first), self.page(second)
        one.broadcast("k", "m", 0)
        here.read_to(1)
        there.read_to(1)
        self.redis.kill()
        self.until(lambda: all(app._redis and app._redis._away for app in (one, two)))
        self.assertTrue(one.broadcast("k", "m", 1))
        self.assertEqual(here.read(), {"channel": "k", "message": "m", "payload": 1})
        late, came_back = self.page(first), self.page(first, here.at)
        one.broadcast("k", "m", 2)
        for page in (here, late, came_back):
            self.until(lambda page=page: page.read() and page.got[-1] == 2)  # type: ignore[misc]
        two.broadcast("k", "m", 3)
        there.read()
        self.redis.start()
        for page in (here, there, late, came_back):
            page.read_to(4)
        self.assertEqual(there.got.index(1) + 1, there.got.index(2))
        self.assertEqual(here.got[:3], [0, 1, 2])
        for page in (here, there, late, came_back):
            self.assertEqual((sorted(page.got), page.missed),
                             ([1, 2, 3] if page is came_back else [0, 1, 2, 3], 0))
        new = self.page(first)
        new.read_to(4)
        one.broadcast("k", "m", "live")
        for page in (here, there, late, came_back, new):
            page.read_to(5)
            self.assertEqual(page.got[-1], "live")

    def test_kept_in_a_redis_that_has_lost_all(self) -> None:
        one, url = self.serving()
        page = self.page(url)
        one.broadcast("k", "m", 0)
        page.read_to(1)
        epoch = page.at
        self.redis.kill()
        self.until(lambda: one._redis and one._redis._away)
        one.broadcast("k", "m", 1)
        self.redis.start()
        page.until(lambda: page.at.endswith(".1") and page.at != epoch)
        self.assertEqual((page.got, page.missed), ([0, 1], 1))

    def test_kept_while_connections_to_redis_are_cut(self) -> None:
        (one, first), (two, second) = self.serving(), self.serving()
        pages = [self.page(first), self.page(second)]
        for page in pages:
            page.until(lambda page=page: page.at)  # type: ignore[misc]
        for number in range(300):
            (one, two)[number % 2].broadcast("k", "m", number)
            if number % 50 == 20:
                self.redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
            time.sleep(0.001)
        for page in pages:
            page.read_to(300)
            self.assertEqual((sorted(page.got), page.missed), ([*range(300)], 0))
            self.assertEqual([each for each in page.got if each % 2], [*range(1, 300, 2)])
        self.assertEqual(pages[0].got, pages[1].got)

    def test_kept_what_has_no_answer_is_sent_again_but_kept_once(self) -> None:
        one, url = self.serving()
        page = self.page(url)
        bus: Any = one._redis
        original = bus._put
        commands: list[Any] = []

        def put(command: Any) -> None:
            commands.append(command)
            original(command)
        bus._put = put
        for number in range(3):
            one.broadcast("k", "m", number)
        page.read_to(3)
        one._call(commands[0].show)  # it has come back already
        page.client.close()
        self.until(lambda: not one.subscriptions())
        page = self.page(url)
        page.read_to(3)
        one._call(commands[0].show)  # and this page was not there
        one._call(lambda: bus._sent.extend(commands))  # as if the answers had been lost
        self.redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
        one.broadcast("k", "m", "next")
        page.read_to(4)
        self.assertEqual((page.got, page.missed), ([0, 1, 2, "next"], 0))
        one.keep("k", 1)
        one.broadcast("k", "m", "last but one")
        one.broadcast("k", "m", "last")
        page.read_to(6)
        one._call(lambda: bus._sent.append(commands[-2]))  # now nobody can tell
        self.redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
        self.until(lambda: self.log.count("it may be missing"))
        one.broadcast("k", "m", "end")
        page.read_to(7)
        self.assertEqual(page.got, [0, 1, 2, "next", "last but one", "last", "end"])

    def test_kept_what_is_sent_again_is_not_sought_in_all_that_is_kept(self) -> None:
        one, _ = self.serving()
        bus: Any = one._redis
        for number in range(300):
            one.broadcast("k", "m", number)
        self.until(lambda: self.redis.ask("LLEN", "webchannels/0/k") == [":300"])
        self.redis.ask("CONFIG", "RESETSTAT")
        with mock.patch.object(bus, "_put", lambda command: bus._sent.append(command)):
            for number in range(300, 400):
                one.broadcast("k", "m", number)  # as if these had been on their way
            one._call(lambda: None)
        self.redis.ask("CLIENT", "KILL", "TYPE", "normal")
        self.until(lambda: self.redis.ask("LLEN", "webchannels/0/k") == [":400"])
        calls = {command: int(many) for command, many in re.findall(
            r"cmdstat_(\w+):calls=(\d+)", " ".join(self.redis.ask("INFO", "commandstats")))}
        self.assertNotIn("lrange", calls)
        self.assertLess(calls["lindex"], 1000)

    def test_kept_when_redis_is_full(self) -> None:
        (one, first), (_, second) = self.serving(), self.serving()
        pages = [self.page(first), self.page(second)]
        one.broadcast("k", "m", "kept")
        for page in pages:
            page.read_to(1)
        other = self.client(second, "b")
        self.redis.ask("CONFIG", "SET", "maxmemory", "1")
        one.broadcast("k", "m", "live")
        one.broadcast("b", "not to be kept")
        self.assertEqual(other.recv_text(), "not to be kept")
        for page in pages:
            self.assertEqual(page.read(), {"channel": "k", "message": "m", "payload": "live"})
        new = self.page(first)
        new.read_to(1)
        self.redis.ask("CONFIG", "SET", "maxmemory", "0")
        one.broadcast("k", "m", "kept again")
        for page in [*pages, new]:
            page.read_to(2)
        self.assertEqual([pages[0].got, new.got],
                         [["kept", "live", "kept again"], ["kept", "kept again"]])
        [line] = self.log.lines
        self.assertRegex(line, "^Redis does not keep what is broadcast: .*maxmemory")

    def test_kept_when_redis_answers_with_errors_only(self) -> None:
        self.redis.ask(*"ACL SETUSER live on >x ~* &* +@all -eval".split())
        one, url = self.serving(f"redis://live:x@127.0.0.1:{self.redis.port}")
        page = self.page(url)
        for number in range(3):
            one.broadcast("k", "m", number)
            self.assertEqual(page.read(), {"channel": "k", "message": "m", "payload": number})
        self.assertIn("no permissions to run the 'eval' command", self.log.lines[0])

    def test_kept_a_gap_is_filled(self) -> None:
        (one, _), (two, second) = self.serving(), self.serving()
        page = self.page(second)
        deliver = two._bus.deliver if two._bus else None
        assert deliver and two._bus
        two._bus.deliver = lambda channel, data: None if b".3 " in data[:20] and data[:1] == b"#" \
            else deliver(channel, data)
        for number in range(1, 7):
            one.broadcast("k", "m", number)
        page.read_to(6)
        self.assertEqual((page.got, page.missed), ([1, 2, 3, 4, 5, 6], 0))

    def test_kept_more_than_is_fetched_at_once(self) -> None:
        one, _ = self.serving()
        text = "x" * 100_000
        for number in range(40):
            one.broadcast("k", "m", [number, text])
        two, second = self.serving()
        page, other = self.page(second), self.page(second)
        one.broadcast("k", "m", ["live"])
        for each in (page, other):
            each.read_to(41)
            self.assertEqual([got[0] for got in each.got], [*range(40), "live"])

    def test_kept_has_bounds_at_redis(self) -> None:
        def length() -> int:
            return int(self.redis.ask("LLEN", "webchannels/0/k")[0][1:])
        one, url = self.serving(max_kept=100_000)
        one.keep("k", 7)
        for number in range(20):
            one.broadcast("k", "m", number)
        self.until(lambda: length() == 7)
        self.assertGreater(int(self.redis.ask("TTL", "webchannels/0/k")[0][1:]), 86_400)
        page = self.page(url)
        page.read_to(20)
        self.assertEqual(page.got, [*range(13, 20)])
        for number in range(3):
            one.broadcast("k", "m", [number, "x" * 40_000])
        page.read_to(23)
        self.assertEqual(length(), 2)
        one.config.kept_ttl = 0.2
        page = self.page(url, page.at)
        time.sleep(0.3)
        one.broadcast("k", "m", "new")
        page.read_to(24)
        self.assertEqual((page.got, page.missed, length()), (["new"], 0, 1))

    def test_kept_before_it_serves_goes_to_redis(self) -> None:
        app = self.new_app()
        app.broadcast("k", "m", "early")
        two, second = self.serving()
        with serve(app) as url:
            for each in (url, second):
                page = self.page(each)
                page.read_to(1)
                self.assertEqual(page.got, ["early"])

    def test_kept_new_without_rewind(self) -> None:
        one, url = self.serving()
        one.keep("k", 1000, rewind=False)
        one.broadcast("k", "m", "before")
        self.until(lambda: self.redis.ask("LLEN", "webchannels/0/k") == [":1"])
        page = self.page(url)
        one.broadcast("k", "m", "after")
        page.read_to(2)
        self.assertEqual(page.got, ["after"])
        page.client.close()
        self.until(lambda: not one.subscriptions())
        bus: Any = one._redis
        bus._fetches[0] = [b"PING"]  # as if another one was under way
        page = self.page(url)
        one.broadcast("k", "m", "meanwhile")
        self.until(lambda: one._history.kept["k"].heard)
        one._call(lambda: bus.fetched(0))
        page.read_to(3)
        self.assertEqual(page.got, ["meanwhile"])

    def test_kept_a_page_that_knows_more_than_what_is_being_fetched(self) -> None:
        one, url = self.serving()
        page, bus = self.page(url), one._redis
        assert bus
        one.broadcast("k", "m", 1)
        page.read_to(1)
        kept = one._history.kept["k"]
        bus._fetches[0] = [b"PING"]  # as if it was under way
        one._call(lambda: one._fetch(kept))
        with mock.patch.object(bus, "fetch", wraps=bus.fetch) as fetch:
            other = self.page(url, page.at.replace(".1", ".2"))
            self.assertTrue(kept.behind)
            one._call(lambda: bus.fetched(0))
            other.until(lambda: other.missed)  # Redis does not know that number
            self.assertEqual(fetch.call_count, 1)
        self.assertEqual(page.missed, 0)

    def test_kept_while_all_that_can_break_does(self) -> None:
        if not hasattr(socket, "SO_REUSEPORT"):
            self.skipTest("needs several processes on a port")
        wrong, figures = asyncio.run(roam(self.redis, 12, 3, 5, 0.01, 0.7))
        self.assertEqual(wrong, [], figures)

    def test_the_commands_that_a_user_of_redis_needs(self) -> None:
        text = (HERE / "README.md").read_text(encoding="utf-8")
        match = re.search(r"ACL SETUSER [^`]*", text)
        assert match
        words = match[0].replace("\n", " ").replace(">secret", ">x").split()
        self.assertEqual(self.redis.ask(*words), ["+OK"])
        app, url = self.serving(f"redis://{words[2]}:x@127.0.0.1:{self.redis.port}")
        page = self.page(url)
        app.broadcast("k", "m", 1)
        page.read_to(1)
        self.client(url, "a")
        self.assertEqual((self.log.lines, page.got), ([], [1]))


class KeptPage:
    """A page on a kept channel, as `KeptTest.any_schedule()` knows it."""

    client: WebSocketClient
    id = at = ""  # while it is connected; the number that it had last
    there = False  # is it subscribed?


class KeptClient:
    """What a page does with a kept channel."""

    def __init__(self, url: str, since: str = "") -> None:
        self.client = WebSocketClient(url, subprotocol="webchannels.v1")
        self.at, self.missed = since, 0
        self.got: list[Any] = []
        self.places: list[str] = []  # after each of these
        self.client.send_json({"channel": "k", "message": "subscribe", "ref": 1,
                               **({"since": since} if since else {})})
        assert self.read()["payload"] == "Subscription: OK"

    def read(self, timeout: float | None = None) -> JsonObject:
        try:
            opcode, data = self.client.recv(timeout)
        except socket.timeout:
            if timeout is None:
                raise
            return {}
        text, _, binary = data.partition(b"\n")
        push: JsonObject = json.loads(text)
        assert push.get("n", 1e9) > int(self.at.partition(".")[2] or 0), (push, self.at)
        if "at" in push:
            self.missed += bool(self.at and self.at != push["at"])
            assert push.get("missed", False) == bool(self.at and self.at != push["at"]), push
            self.at = push["at"]
        elif "n" in push:
            epoch, _, last = self.at.partition(".")
            assert push["n"] == int(last) + 1, (push, self.at)
            self.at = f"{epoch}.{push['n']}"
        if "message" in push or opcode == BINARY:
            self.got.append(push.get("payload", binary.decode()))
            self.places.append(self.at)
        return push

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            self.read()

    def read_to(self, number: int) -> None:
        self.until(lambda: self.at.endswith(f".{number}"))

ROAMED = """
import asyncio, itertools, os, sys, threading, time
from webchannels import *
config.redis_url, config.shutdown_timeout = sys.argv[1], 0.2
for name in "abc":
    keep(name, 100_000)
channels_support("a")

@channel("/b/subscribe")
async def enter(client):
    await asyncio.sleep(0.002)
    subscribe(client, "b")
    await asyncio.sleep(0.002)

@channel("/c/subscribe", threaded=True)
def enter_from_a_thread(client):
    subscribe(client, "c")

def flood():
    for number in itertools.count():
        if over.is_set():
            break
        broadcast("abc"[number % 3], "n", [os.getpid(), number])
        time.sleep(float(sys.argv[3]))
    print("over", flush=True)

over = threading.Event()
up(int(sys.argv[2]), block=False, reuse_port=True)
print("up", flush=True)
threading.Thread(target=flood).start()
sys.stdin.readline()
over.set()
sys.stdin.read()
"""


class Roamer:
    """A page on kept channels that comes back whenever its connection is cut."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.places = dict.fromkeys("abc", "")
        self.got: dict[str, list[Any]] = {channel: [] for channel in "abc"}
        self.faults: list[Any] = []
        self.connections = 0
        self.writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        while True:
            try:
                await self.stay()
            except (OSError, EOFError):
                pass
            finally:
                self.cut()
            await asyncio.sleep(random.random() / 10)

    def cut(self) -> None:
        if self.writer:
            self.writer.transport.abort()

    async def stay(self) -> None:
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Protocol: webchannels.v1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        self.connections += 1
        for channel, place in self.places.items():
            since = {"since": place} if place else {}
            text = json.dumps({"channel": channel, "message": "subscribe", "ref": 1, **since})
            self.writer.write(struct.pack("!BBxxxx", 0x80 | TEXT, 0x80 | len(text)) + text.encode())
        while True:
            opcode, size = await reader.readexactly(2)
            if size > 125:
                size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
            data = await reader.readexactly(size)
            if opcode == 0x80 | TEXT and data:
                self.take(json.loads(data))
            if random.random() < 0.001:
                await asyncio.sleep(random.random() / 2)

    def take(self, push: JsonObject) -> None:
        place = self.places.get(push["channel"], "") if "channel" in push else ""
        epoch, _, last = place.partition(".")
        if "at" in push:
            right = not place or place == push["at"]
            self.places[push["channel"]] = push["at"]
        elif "ref" in push:
            right = "error" not in push
        else:
            right = push.get("n") == int(last or -1) + 1
            self.places[push["channel"]] = f"{epoch}.{push['n']}"
            self.got[push["channel"]].append(push["payload"])
        if not right or "missed" in push:
            self.faults.append((place, push))


async def roam(redis: Redis, pages: int, processes: int, seconds: float, pause: float,
               cut: float) -> tuple[list[Any], str]:
    """Pages roam over processes that are killed, on connections that are cut, while all broadcast.

    A process is replaced each second; each loses Redis each `cut` seconds. Returns what is wrong.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]

    async def start() -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ROAMED, f"redis://127.0.0.1:{redis.port}", str(port), str(pause),
            cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout and await process.stdout.readline() == b"up\n"
        return process

    async def replace() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(1)
            at = random.randrange(processes)
            running[at].kill()
            await running[at].wait()
            running[at] = await start()

    async def cut_pages() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(random.random() * 6 / pages)
            random.choice(roamers).cut()

    async def cut_redis() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(cut)
            await loop.run_in_executor(None, redis.ask, "CLIENT", "KILL", "TYPE", "pubsub")

    def lists() -> dict[str, list[Any]]:
        """What Redis has kept."""
        answers = {each: redis.ask("LRANGE", f"webchannels/0/{each}", "0", "-1") for each in "abc"}
        return {each: [json.loads(line.split("\n")[-1])["payload"] for line in lines
                       if "payload" in line] for each, lines in answers.items()}

    loop = asyncio.get_running_loop()
    running = list(await asyncio.gather(*[start() for _ in range(processes)]))
    roamers = [Roamer(port) for _ in range(pages)]
    end = time.monotonic() + seconds
    roaming = [asyncio.ensure_future(each.run()) for each in roamers]
    try:
        await asyncio.gather(replace(), cut_pages(), cut_redis())
        for process in running:
            assert process.stdin and process.stdout
            process.stdin.write(b"over\n")
            assert await process.stdout.readline() == b"over\n"
        end = time.monotonic() + 30
        while any(each.got != lists() for each in roamers) and time.monotonic() < end:
            await asyncio.sleep(0.2)
        whole = lists()
        assert not any(each.done() for each in roaming), roaming
    finally:
        for each in roaming:
            each.cancel()
        await asyncio.gather(*roaming, return_exceptions=True)
        for process in running:
            process.kill()
            await process.wait()
        reserved.close()
    wrong = [fault for each in roamers for fault in each.faults]
    wrong += [each.places for each in roamers if each.got != whole]
    for channel, got in whole.items():
        for process_id in {each[0] for each in got}:  # of each, none is twice, missing, or late
            numbers = [number for id, number in got if id == process_id]
            if numbers != [*range(numbers[0], numbers[-1] + 1, 3)]:
                wrong.append((channel, process_id, numbers))
    connections = sum(each.connections for each in roamers)
    return wrong, f"{sum(map(len, whole.values()))} broadcasts, {connections} connections"


# ---- In browsers ---------------------------------------------------------------------------------

RECORD = "<script>got = []; parse_payload = payload => got.push(payload)</script>"
# Leaves only the shortest timers, so what happens is not due to a timer of the reconnect logic.
NO_TIMERS = """(Math.random = () => 0.99, window.realTimeout = setTimeout,
    window.setTimeout = (f, ms, ...rest) => ms > 100 ? 0 : realTimeout(f, ms, ...rest), true)"""
OPEN = "WebChannels.state === 'open'"
ANSWERED = "WebChannels.request('____', 'echo', true).catch(() => false)"
SHOWN = "document.documentElement.dataset.webchannels"
AWAY = "WebChannels.state === 'reconnecting'"

SERVER = """
import asyncio, sys
from webchannels import *
route("/", lambda: channels_support())
channel("/____/echo", lambda payload: payload)
@channel("/____/slow")
async def slow():
    print("slow has begun")
    await asyncio.sleep(60)
up(int(sys.argv[1]))
"""

COUNTING = """
import os, sys, time
from webchannels import *
config.redis_url = sys.argv[2] or None
keep("____", 100_000)
route("/", lambda: "<script>got = []</script>" + channels_support() + '''<script>
WebChannels.channel('/____/n', value => got.push(value))
WebChannels.addEventListener('missed', () => got.push('missed'))
Math.random = () => 0.05</script>''')
print(up(int(sys.argv[1]), block=False), flush=True)
number = 0
while True:
    broadcast("____", "n", [os.getpid(), number])
    number += 1
    time.sleep(0.005)
"""

NGINX = """
pid {folder}/pid;
error_log {folder}/log;
events {{ }}
http {{
    access_log off;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{front} ssl;
        ssl_certificate {pem};
        ssl_certificate_key {pem};
        location /live/ {{
            proxy_pass http://127.0.0.1:{back}/;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
        }}
        location = /favicon.ico {{ return 204; }}
    }}
}}
"""


class BrowserTest(unittest.TestCase):
    """What the tests below share."""

    kind: type[Chromium] = Chromium

    def setUp(self) -> None:
        browser(self.kind)
        self.app = WebChannels()
        self.seen: list[tuple[float, ChannelClient]] = []  # when who connected
        self.left = threading.Event()
        self.app.on_connect(self.came)
        self.app.on_disconnect(self.went)
        self.app.channel("/____/echo", self.echo)
        self.echoed: list[Any] = []

    def came(self, client: ChannelClient) -> None:
        self.seen.append((time.monotonic(), client))

    def went(self) -> None:
        self.left.set()

    def echo(self, payload: Any) -> Any:
        self.echoed.append(payload)
        return payload

    def page(self, url: str) -> Page:
        page = browser(self.kind).new_page(url)
        self.addCleanup(page.close)
        return page

    def live_page(self, url: str, html: str = RECORD) -> Page:
        """A page that has subscribed to the default channel."""
        self.app.route("/", lambda: html + self.app.channels_support())
        page = self.page(url)
        page.wait_console("Subscription ready")
        return page

    def lose(self, page: Page) -> None:
        """End the only connection from the server's side, and wait until both sides know it."""
        page.evaluate("(window.away = new Promise(done => WebChannels.addEventListener("
                      "'close', () => done(true), {once: true})), 0)")
        self.left.clear()
        [client] = self.app.connected_clients()
        client.close(1012)
        self.assertTrue(self.left.wait(10))
        page.evaluate("away")

    def heard(self, page: Page, message: str) -> None:
        """A broadcast arrives, once."""
        page.evaluate("WebChannels.request('____', 'echo', 0)")  # what was sent before is done
        self.assertTrue(self.app.broadcast("____", message))
        page.wait_for(f"got.includes({json.dumps(message)})")
        self.assertEqual(page.evaluate("got").count(message), 1)


class InChromium(BrowserTest):
    """What a page does in every engine."""

    kept = "true"  # is a page with a connection kept in the back/forward cache?

    def test_the_walkthrough(self) -> None:
        app = self.app
        app.route("/", lambda: app.channels_support())
        with serve(app) as url:
            page = self.page(url)
            page.wait_console("Subscription ready")
            [client] = app.connected_clients()
            self.assertEqual(set(client.channels), {"____"})
            self.assertEqual(app.connected_clients("____"), [client])
            self.assertIs(app.broadcast("____", "Hey!"), True)
            page.wait_console("Hey!")
            page.wait_console("Overwrite window.parse_payload to handle messages from the server")

            app.route("/", lambda: app.channels_support() + """<script>
                window.parse_payload = payload => console.log("Got this payload: " + payload)
                </script>""")
            page.reload()
            page.wait_console("Subscription ready")
            self.assertIs(app.broadcast("____", "Hey!"), True)
            page.wait_console("Got this payload: Hey!")

            app.channel("/____/echo", lambda: f"Received: {app.params('payload')}")
            page.evaluate("Genie.WebChannels.sendMessageTo('____', 'echo', 'Hello!')")
            page.wait_console("Got this payload: Received: Hello!")
            self.assertEqual(page.errors, [])

            [client] = app.connected_clients()
            app.unsubscribe_disconnected_clients()  # that of the page before the reload
            self.left.clear()
            page.close()
            self.assertTrue(self.left.wait(10))
            self.assertEqual(app.connected_clients(), [])
            self.assertEqual(app.disconnected_clients(), [client])
            self.assertIs(app.broadcast("____", "Hey!"), False)
            self.assertEqual(app.unsubscribe_disconnected_clients(), [])
            self.assertEqual(app.disconnected_clients(), [])

    def test_comes_back_to_a_server_that_was_killed(self) -> None:
        with Terminal(sys.executable, "-c", SERVER, "0") as server:
            port = server.expect(r"127\.0\.0\.1:(\d+)")[1]
            page = self.page(f"http://127.0.0.1:{port}/")
            page.wait_console("Subscription ready")
            page.evaluate("(window.lost = WebChannels.request('____', 'slow').catch("
                          "error => error.name), 0)")
            server.expect("slow has begun")
            server.stop(9)
        self.assertEqual(page.evaluate("lost"), "NetworkError")
        page.wait_for(AWAY)
        page.evaluate("(window.late = WebChannels.request('____', 'echo', 'late'), 0)")
        with Terminal(sys.executable, "-c", SERVER, port) as server:
            page.wait_for(OPEN, 40)
            self.assertEqual(page.evaluate("late"), "late")
            self.assertEqual(page.evaluate("WebChannels.request('____', 'echo', 'x')"), "x")

    def test_comes_back_at_once_when_the_network_does(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate(NO_TIMERS)
            page.offline(True)
            page.wait_for("!navigator.onLine")
            self.lose(page)
            page.offline(False)
            page.wait_for(OPEN)
            self.heard(page, "again")
            self.assertEqual(len(self.app.connected_clients()), 1)

    def test_comes_back_at_once_when_the_tab_becomes_visible(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            self.page("about:blank")  # in front of it
            page.wait_for("document.hidden")
            page.evaluate(NO_TIMERS)
            self.lose(page)
            page.activate()
            page.wait_for(OPEN)
            self.heard(page, "again")

    def test_back_and_forward(self) -> None:
        html = RECORD + """<script>addEventListener('pageshow', event =>
            console.log(`shown ${location.pathname} persisted: ${event.persisted}`))</script>"""
        self.app.route("/other", lambda: html + self.app.channels_support())
        with serve(self.app) as url:
            page = self.live_page(url, html)
            page.navigate(f"{url}/other")
            page.wait_console("Subscription ready")
            for move, path in ("back", "/"), ("forward", "/other"), ("back", "/"):
                page.evaluate(f"history.{move}()", False)
                page.wait_console(f"shown {path} persisted: {self.kept}")
                page.wait_for(OPEN)
                self.heard(page, f"after {len(self.seen)} connections")
                self.assertEqual(len(self.app.connected_clients()), 1)

    def test_what_is_sent_while_away_arrives_once_and_in_order(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            port = self.app.port
            self.app.down()
            page.wait_for(AWAY)
            page.evaluate("""(window.sent = Promise.all(Array.from({length: 1000}, (_, i) =>
                WebChannels.sendMessageTo('____', 'echo', i))).then(() => 'all sent'), 0)""")
            self.app.up(port, block=False)
            self.assertEqual(page.evaluate("sent"), "all sent")
            page.wait_for("got.length >= 1000")
            self.lose(page)
            page.evaluate("WebChannels.request('____', 'echo', 1000)")
            self.assertEqual(self.echoed, list(range(1001)))
            self.assertEqual(page.evaluate("got.map(push => push.payload)"), list(range(1000)))

    def test_back_and_forward_on_a_kept_channel(self) -> None:
        self.app.keep("____")
        self.app.route("/other", lambda: RECORD + self.app.channels_support())
        with serve(self.app) as url:
            page = self.live_page(url)
            for number, move in enumerate(("location = '/other'", "history.back()",
                                           "history.forward()", "history.back()")):
                self.app.broadcast("____", f"before {number}")
                page.wait_for(f"globalThis.got?.at(-1) === 'before {number}'")
                self.left.clear()
                page.evaluate(move, False)
                self.assertTrue(self.left.wait(10))
                self.app.broadcast("____", f"after {number}")
                page.wait_for(f"globalThis.got?.at(-1) === 'after {number}'")
                expected = [f"{when} {each}" for each in range(number + 1)
                            for when in ("before", "after")]
                self.assertEqual(page.evaluate("got"), expected)

    def kept_page(self, url: str) -> Page:
        """A page that notes, in `got`, what it is sent on the kept channel, and `missed`."""
        self.app.keep("____", 100)
        page = self.live_page(url, RECORD + self.app.channels_support("other") + """<script>
            WebChannels.channel('/:channel/n', n => got.push(n))
            WebChannels.addEventListener('missed', ({ detail }) => got.push('missed ' + detail))
            </script>""")
        page.evaluate("WebChannels.request('____', 'echo', 0)")
        return page

    def test_what_is_broadcast_while_away_comes_once_and_in_order(self) -> None:
        numbers = iter(range(1000))

        def tell(count: int) -> None:
            for _ in range(count):
                self.app.broadcast("____", "n", next(numbers))
        self.app.keep("____")
        with serve(self.app) as url:
            tell(3)  # which a page that is new gets, too
            page = self.kept_page(url)
            page.evaluate(NO_TIMERS)
            for _ in range(3):  # the second time, it has heard nothing since
                self.lose(page)
                tell(7)
                page.evaluate("dispatchEvent(new Event('online'))")
                page.wait_for(OPEN)
                self.lose(page)
                page.evaluate("dispatchEvent(new Event('online'))")
                page.wait_for(OPEN)
                tell(2)
            page.evaluate("WebChannels.unsubscribe('____')")
            tell(2)
            page.evaluate("WebChannels.subscribe('____')")
            client = next(each for each in self.app.connected_clients())
            next(numbers)
            self.app.broadcast("____", "n", "not for it", exclude=client)
            self.lose(page)
            page.evaluate("dispatchEvent(new Event('online'))")
            page.wait_for(OPEN)
            self.app.broadcast("____", b"bytes")
            self.app.broadcast("____", "end")
            page.wait_for("got.at(-1) === 'end'")
            self.assertEqual(page.evaluate("got.filter(each => !(each instanceof ArrayBuffer))"),
                             [*range(3 + 3 * 9 + 2), "end"])
            self.assertEqual(page.evaluate("got.length"), 3 + 3 * 9 + 4)
            self.assertEqual(page.errors, [])

    def kill_and_start_again(self, times: int, redis: str) -> list[Any]:
        """What a page has got after so many servers, which counted at 200/s, were killed."""
        port, page = "0", self.page("about:blank")
        got: list[Any] = []
        for number in range(times + 1):
            with Terminal(sys.executable, "-c", COUNTING, port, redis) as server:
                port = server.expect(r"127\.0\.0\.1:(\d+)")[1]
                if not number:
                    page.navigate(f"http://127.0.0.1:{port}/")
                    page.evaluate("last = 0")
                page.wait_for("got.at(-1)?.[0] !== last", 40)
                page.evaluate("length = got.length")
                page.wait_for("got.length > length + 50")
                page.evaluate("last = got.at(-1)[0]")
                if number < times:
                    server.stop((15, 9)[number % 2])
                else:
                    got = page.evaluate("got")
        return got

    def in_order(self, got: list[Any]) -> None:
        """Each number of each process once, and none is left out."""
        for process in dict.fromkeys(process for process, _ in got):
            numbers = [number for each, number in got if each == process]
            self.assertEqual(numbers, [*range(numbers[0], numbers[0] + len(numbers))])

    def test_servers_are_killed_and_started_again(self, times: int = 3) -> None:
        got = self.kill_and_start_again(times, "")
        self.assertEqual(got.count("missed"), times)
        for _ in range(times):
            self.in_order(got[:got.index("missed")])
            del got[:got.index("missed") + 1]
        self.in_order(got)
        self.assertEqual(got[0][1], 0)  # what is kept comes to it as to a new page

    def test_servers_are_killed_and_started_again_with_redis(self, times: int = 3) -> None:
        if not shutil.which("redis-server"):
            self.skipTest("needs redis-server")
        folder = tempfile.mkdtemp(prefix="webchannels-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        redis = Redis("--dir", folder)
        self.addCleanup(redis.kill)
        got = self.kill_and_start_again(times, f"redis://127.0.0.1:{redis.port}")
        self.assertNotIn("missed", got)
        self.in_order(got)
        self.assertEqual({number for _, number in got[:1]}
                         | {got[at][1] for at in range(1, len(got))
                            if got[at][0] != got[at - 1][0]}, {0})
        self.assertEqual(len({process for process, _ in got}), times + 1)

    def test_missed_comes_before_what_is_kept(self) -> None:
        with serve(self.app) as url:
            page = self.kept_page(url)
            page.evaluate(NO_TIMERS)
            for number in range(150):
                if number == 20:
                    self.lose(page)
                self.app.broadcast("____", "n", number)
            page.evaluate("dispatchEvent(new Event('online'))")
            page.wait_for("got.at(-1) === 149")
            kept = [*range(50, 150)]
            self.assertEqual(page.evaluate("got"), [*range(20), "missed ____", *kept])
            self.app._history.kept.clear()  # as if it was another process
            self.lose(page)
            page.evaluate("(got.length = 0, dispatchEvent(new Event('online')))")
            page.wait_for("got.length")
            self.app.broadcast("____", "n", "live")
            page.wait_for("got.length > 1")
            self.assertEqual(page.evaluate("got"), ["missed ____", "live"])

    def test_a_guard_subscribes_it_to_another_channel(self) -> None:
        self.app.keep("other", 3)
        self.app.channel("/door/subscribe", lambda client: self.app.subscribe(client, "other"))
        with serve(self.app) as url:
            page = self.kept_page(url)
            page.evaluate("WebChannels.unsubscribe('other')")
            page.evaluate(NO_TIMERS)
            for number in range(2):
                self.app.broadcast("other", "n", number)
            page.evaluate("WebChannels.subscribe('door')")
            page.wait_for("got.length > 1")
            self.lose(page)
            page.evaluate("dispatchEvent(new Event('online'))")
            page.wait_for("got.length > 4")  # nobody knows what it has of it: it begins anew
            self.assertEqual(page.evaluate("got"), [0, 1, "missed other", 0, 1])

    def test_past_its_bound_the_queue_rejects(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            port = self.app.port
            self.app.down()
            page.wait_for(AWAY)
            page.evaluate("""(window.sent = Promise.allSettled(Array.from({length: 20000}, (_, i) =>
                WebChannels.sendMessageTo('____', 'echo', i))), 0)""")
            self.app.up(port, block=False)
            taken = page.evaluate("sent.then(all => all.filter("
                                  "one => one.status === 'fulfilled').length)")
            page.wait_for(f"got.length >= {taken}")
            self.assertTrue(1000 <= taken < 20000, taken)
            self.assertEqual(self.echoed, list(range(taken)))

    def test_content_security_policy_with_a_nonce(self) -> None:
        policy = ("default-src 'none'; img-src 'self'; script-src 'nonce-abc123'; "
                  "connect-src 'self'")
        self.app.route("/", lambda: Response(
            "<!doctype html>" + RECORD.replace("<script", "<script nonce=abc123")
            + self.app.channels_support(nonce="abc123"),
            headers={"Content-Security-Policy": policy}))
        with serve(self.app) as url:
            page = self.page(url)
            page.wait_console("Subscription ready")
            self.heard(page, "hello")
            self.assertEqual(page.errors, [])

    def test_content_security_policy_with_src(self) -> None:
        policy = "default-src 'none'; img-src 'self'; script-src 'self'; connect-src 'self'"
        self.app.route("/client.js", lambda: Response(
            self.app.channels_script(), content_type="text/javascript"))
        self.app.route("/", lambda: Response(
            "<!doctype html>" + self.app.channels_support(src="/client.js"),
            headers={"Content-Security-Policy": policy}))
        with serve(self.app) as url:
            page = self.page(url)
            page.wait_console("Subscription ready")
            self.app.broadcast("____", "hello")
            page.wait_console("hello")
            self.assertEqual(page.errors, [])

    def test_behind_a_prefix_of_nginx_with_tls(self) -> None:
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if not nginx:
            self.skipTest("needs nginx")
        folder = Path(tempfile.mkdtemp(prefix="webchannels-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            front = free.getsockname()[1]
        self.app.config.base_path = "/live"
        self.app.config.allowed_origins = [f"https://127.0.0.1:{front}"]
        with serve(self.app):
            (folder / "nginx.conf").write_text(NGINX.format(
                folder=folder, front=front, back=self.app.port, pem=certificate(folder)))
            command = [nginx, "-p", str(folder), "-c", "nginx.conf", "-e", "log"]
            subprocess.run(command, check=True)
            self.addCleanup(subprocess.run, [*command, "-s", "stop"])
            page = self.live_page(f"https://127.0.0.1:{front}/live/")
            self.heard(page, "hello")
            self.assertEqual(page.evaluate("WebChannels.request('____', 'echo', 'x')"), "x")
            self.assertEqual(page.errors, [])

    def test_a_text_that_imitates_an_envelope_arrives_as_it_is(self) -> None:
        texts = ['{"channel": "____", "message": "m", "payload": 1}', '{"ref": 1, "payload": "x"}',
                 '{"ref": 1, "error": "x"}', "ERROR : 500 - Internal error", "Subscription: OK",
                 "window.Genie", "", "null", "</script><script>got.push('injected')</script>"]
        with serve(self.app) as url:
            page = self.live_page(url)
            for text in texts:
                self.assertTrue(self.app.broadcast("____", text))
            page.wait_for(f"got.length >= {len(texts)}")
            self.assertEqual(page.evaluate("got"), texts)

    def test_embedded_twice_it_has_one_socket(self) -> None:
        with serve(self.app) as url:
            support = self.app.channels_support
            page = self.live_page(url, RECORD + support() + support("room"))
            page.wait_for("WebChannels.request('____', 'echo', 'x')")
            self.assertEqual(len(self.seen), 1)
            [client] = self.app.connected_clients()
            self.assertEqual(set(client.channels), {"____", "room"})
            self.heard(page, "hello")

    def test_a_channel_name_cannot_break_out_of_the_script(self) -> None:
        name = """a"b'c</script><!--<script>&lt;\\u2028\u2028`${1}"""
        self.app.route("/", lambda: RECORD + self.app.channels_support(name) + "<h1>end</h1>")
        with quiet(), serve(self.app) as url:
            page = self.page(url)
            page.wait_console("Subscription ready")
            self.assertEqual(page.evaluate("document.body.innerText.trim()"), "end")
            self.assertTrue(self.app.broadcast(name, "hello"))
            page.wait_for("got.includes('hello')")

    def test_what_the_client_offers(self) -> None:
        app = self.app
        app.channels_support("room")
        @app.channel("/____/fail")
        def fail() -> None:
            raise ChannelError("no such luck")

        @app.channel("/____/slow")
        async def slow() -> None:
            await asyncio.sleep(0.5)

        with serve(app) as url:
            page = self.live_page(url)
            for call, outcome in (
                    ("request('____', 'echo', {a: [1, 'é', null]})", {"a": [1, "é", None]}),
                    ("request('____', 'fail').catch(error => error.message)", "no such luck"),
                    ("request('____', 'slow', 0, {timeout: 100}).catch(error => error.name)",
                     "TimeoutError"),
                    ("request('____', 'slow', 0, {signal: AbortSignal.abort()})"
                     ".catch(error => error.name)", "AbortError")):
                self.assertEqual(page.evaluate(f"WebChannels.{call}"), outcome)

            page.evaluate("""(window.ticks = [], WebChannels.subscribe('room').then(() => {
                WebChannels.channel('/room/tick', () => { throw new Error('of this handler') })
                WebChannels.channel('/r.om/tick', payload => ticks.push(['no pattern', payload]))
                WebChannels.channel('/room/:n/tick', payload => ticks.push(['longer', payload]))
                window.off = WebChannels.channel('/:where/tick',
                    (payload, {where}) => ticks.push([where, payload])) }))""")
            app.broadcast("room", "tick", {"n": 1})
            page.wait_for("ticks.length")
            page.wait_console("of this handler")
            page.evaluate("off()")
            app.broadcast("room", "tick", {"n": 2})
            page.wait_console("of this handler")
            self.assertEqual(page.evaluate("ticks"), [["room", {"n": 1}]])
            page.evaluate("WebChannels.unsubscribe('room')")
            self.assertFalse(app.broadcast("room", "tick", {"n": 3}))

            page.evaluate("WebChannels.close()")
            self.assertEqual(page.evaluate(SHOWN), "closed")
            page.evaluate("WebChannels.open()")
            page.wait_for(OPEN)
            self.heard(page, "hello")
            app.connected_clients()[0].close(1008, "not you")  # it means it
            page.wait_for("WebChannels.state === 'closed'")
            self.assertEqual(page.evaluate(SHOWN), "closed")

    # Bytes.

    BYTES = RECORD + """<script>
        shown = bytes => bytes instanceof ArrayBuffer ? `${new Uint8Array(bytes)}` : 'no bytes'
        noise = (first, size) => Uint8Array.from(
            {length: size}, (_, i) => i ? Math.random() * 256 : first)
        </script><iframe></iframe>"""

    def test_bytes_are_payloads(self) -> None:
        look_alike = b'{"channel":"____","message":"trace","payload":1}\n{"ref":1}'
        with serve(self.app) as url, quiet():
            page = self.live_page(url, self.BYTES + """<script>
                addEventListener('load', () => {
                    heard = [], handled = []
                    WebChannels.addEventListener('message', event => heard.push(event.channel))
                    for (const path of ['/____/trace', '/:where/:what', '/____/undefined',
                                        '/____/null', '/____/[object ArrayBuffer]'])
                        WebChannels.channel(path, (payload, info) => handled.push(
                            [path, shown(payload), info.channel, info.message])) })
                </script>""")
            for data in b"", b"\n", bytes(range(256)), look_alike:
                page.evaluate("handled = [], got = [], heard = []")
                self.app.broadcast("____", "trace", data)
                self.app.broadcast("____", data)  # without a name it reaches no handler
                page.wait_for("heard.length === 2")
                text = ",".join(map(str, data))
                self.assertEqual(page.evaluate("handled"), [
                    ["/____/trace", text, "____", "trace"],
                    ["/:where/:what", text, "____", "trace"]])
                self.assertEqual(page.evaluate("got.map(shown)"), [text])
                self.assertEqual(page.evaluate("heard"), ["____", "____"])
            self.assertEqual(page.errors, [])

            page.evaluate("frames[0].eval('buffer = new Uint8Array([7, 10]).buffer') && 0")
            for made, data in (
                    ("new Uint8Array([1, 10, 255]).buffer", b"\1\n\xff"),
                    ("new ArrayBuffer(0)", b""),
                    ("new Uint8Array([1, 2, 3, 4]).subarray(1, 3)", b"\2\3"),
                    ("new Uint16Array([1, 2])", b"\1\0\2\0"),
                    ("new DataView(new ArrayBuffer(4), 1, 2)", b"\0\0"),
                    ("new Blob(['é'])", "é".encode()), ("new File(['{}'], 'name')", b"{}"),
                    ("frames[0].buffer", b"\7\n"), ("new ArrayBuffer(30000)", bytes(30_000))):
                self.assertEqual(page.evaluate(
                    f"WebChannels.request('____', 'echo', {made}).then(shown)"),
                    ",".join(map(str, data)), made)
                self.assertEqual(self.echoed.pop(), data, made)
            # Without a ref, the reply is a push.
            page.evaluate("(handled = [], WebChannels.sendMessageTo("
                          "'____', 'echo', new Uint8Array([7, 8])))")
            page.wait_for("handled.length")
            self.assertEqual(page.evaluate("handled"), [["/:where/:what", "7,8", "____", "echo"]])
            self.assertEqual(page.evaluate("WebChannels.request('____', 'no', new Blob(['x']))"
                                           ".catch(error => `${error}`)"),
                             f"ChannelError: {NO_HANDLER}/____/no")

    def test_bytes_keep_their_place_among_other_messages(self) -> None:
        send = """Promise.all([new Blob([noise(1, 500000)]), 'text', buffer = noise(2, 9), 'more',
            new Blob([noise(3, 9)])].map(payload => WebChannels.request('____', 'echo', payload)),
            buffer.fill(255)).then(all => all.map(reply => reply.byteLength ?? reply))"""
        sizes = [500_000, "text", 9, "more", 9]
        with serve(self.app) as url:
            page = self.live_page(url, self.BYTES)
            for before in "", "WebChannels.close(), WebChannels.open(),":
                with self.subTest(before):
                    self.echoed.clear()
                    self.assertEqual(page.evaluate(f"({before} {send})"), sizes)
                    self.assertEqual([len(each) if isinstance(each, bytes) else each
                                      for each in self.echoed], sizes)
                    self.assertEqual([self.echoed[at][0] for at in (0, 2, 4)], [1, 2, 3])
                    self.assertNotEqual(self.echoed[2][1:], b"\xff" * 8)  # it was used again

    def test_bytes_that_wait_are_counted(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url, self.BYTES)
            port = self.app.port
            self.app.down()
            page.wait_for(AWAY)
            self.assertEqual(page.evaluate(
                "WebChannels.request('____', 'echo', noise(9, 800000), {timeout: 50})"
                ".catch(error => error.name)"), "TimeoutError")  # and makes room
            page.evaluate("""(window.sent = Promise.all([400000, 600000, 60000, 40000].map(
                (size, i) => WebChannels.sendMessageTo('____', 'echo', i % 2 ? noise(i, size)
                    : new Blob([noise(i, size)])).then(() => size, error => error.name))), 0)""")
            self.app.up(port, block=False)
            self.assertEqual(page.evaluate("sent"),
                             [400_000, 600_000, "QuotaExceededError", 40_000])
            page.evaluate("WebChannels.request('____', 'echo', 'x')")
            self.assertEqual([*map(len, self.echoed)], [400_000, 600_000, 40_000, 1])
            self.assertEqual([each[0] for each in self.echoed], [0, 1, 3, "x"])

    def test_an_address_that_is_none_is_told_and_not_tried_again(self) -> None:
        self.app.route("/", lambda: f'<script data-path="{self.app.params("path")}">'
                                    f'{self.app.channels_script()}</script>')
        with serve(self.app) as url:
            for path in "http://[", "ftp://localhost/":
                page = self.page(f"{url}/?path={path}")
                self.assertEqual(page.evaluate(SHOWN), "closed")
                self.assertEqual(page.evaluate(
                    "WebChannels.request('____', 'echo', 'x').catch(error => error.name)"),
                    "AbortError")
                [error] = page.errors  # of console.error(): nothing was uncaught
                self.assertTrue(error.startswith("WebChannels:"), error)

    # What could lose the client, hijack it or confuse it.

    def test_elements_of_the_page_do_not_stand_in_its_way(self) -> None:
        evil = 'name=currentScript data-path="http://evil.invalid/" data-channel=evil'
        elements = [f"<img {evil}>", "<form id=parse_payload></form>", "<a id=Genie></a>",
                    "<a id=WebChannels></a>", "<iframe name=documentElement></iframe>",
                    "<img name=addEventListener><img name=hidden><img name=dispatchEvent>"]
        self.app.route("/client.js", lambda: Response(
            self.app.channels_script(), content_type="text/javascript"))
        self.app.route("/:n::int/module", lambda n: (
            elements[n] + "<script type=module src=/client.js></script>"))
        self.app.route("/:n::int/script", lambda n: elements[n] + self.app.channels_support())
        with serve(self.app) as url:
            for number, element in enumerate(elements):
                for kind in "script", "module":
                    with self.subTest(element, kind=kind):
                        page = self.page(f"{url}/{number}/{kind}")
                        page.wait_console("Subscription ready")
                        self.app.broadcast("____", "Hey!")
                        page.wait_console("Hey!")
                        self.assertEqual(page.evaluate("Genie.WebChannels.state"), "open")
                        self.assertEqual(page.errors, [])
                        page.close()
        self.assertEqual(len(self.seen), 2 * len(elements))

    def test_what_is_in_the_prototype_of_all_objects_is_no_address(self) -> None:
        self.app.route("/client.js", lambda: Response(
            self.app.channels_script(), content_type="text/javascript"))
        for kind in "text/javascript", "module":
            self.app.route(f"/{kind}", lambda kind=kind: f"""<script>
                Object.prototype.path = 'http://127.0.0.1:9/', Object.prototype.channel = 'evil'
                </script><script type={kind} src=/client.js></script>""")
        with serve(self.app) as url:
            for kind in "text/javascript", "module":
                with self.subTest(kind):
                    page = self.page(f"{url}/{kind}")
                    self.assertEqual(page.evaluate("WebChannels.address"),
                                     f"{url.replace('http', 'ws')}/")
                    page.wait_console("Subscription ready")
                    self.assertTrue(self.app.broadcast("____", "Hey!"))

    def test_a_page_without_its_root_element(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + "<script>Math.random = () => 0.01</script>")
            page.evaluate("(window.root = document.documentElement, root.remove())")
            self.lose(page)
            page.wait_for(OPEN)
            self.heard(page, "again")
            self.assertEqual(page.errors, [])

    def test_as_a_module(self) -> None:
        self.app.route("/channels.js", lambda: Response(
            self.app.channels_script(), content_type="text/javascript"))
        self.app.route("/", lambda: RECORD + """<script type=module>
            import '/channels.js'
            window.found = [WebChannels === window.WebChannels, Genie.WebChannels === WebChannels]
            window.worker = new Promise(done => {
                new Worker('/channels.js').onerror = event => done(event.message) })
            </script>""")
        with serve(self.app) as url:
            page = self.page(url)
            page.wait_console("Subscription ready")
            self.assertEqual(page.evaluate("found"), [True, True])
            self.heard(page, "hello")
            self.assertIn("channels.js works in pages only", page.evaluate("worker"))

    def test_a_second_address_on_the_page_is_told(self) -> None:
        other = WebChannels(Config(base_path="http://127.0.0.1:1"))
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + self.app.channels_support() + """<script>
                errors = []
                WebChannels.addEventListener('error', event => errors.push(event.detail.error))
                </script>""" + other.channels_support("room") + other.channels_support())
            [error, second] = page.evaluate("errors")
            self.assertIn("ws://127.0.0.1:1/", error)
            self.assertIn(f"{url.replace('http', 'ws')}/", error)
            self.assertEqual(error, second)
            self.assertEqual(len(page.errors), 2, page.errors)
            page.evaluate("WebChannels.request('____', 'echo', 0)")
            [client] = self.app.connected_clients()
            self.assertEqual(client.channels, {"____"})

    def test_in_pages_without_an_address(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + "<iframe></iframe><iframe></iframe>")
            inner = json.dumps(self.app.channels_support())
            page.evaluate(f"""(frames[0].frameElement.srcdoc = {inner},
                frames[1].frameElement.src = URL.createObjectURL(
                    new Blob([{inner}], {{type: 'text/html'}})), 0)""")
            for frame in "frames[0]", "frames[1]":
                page.wait_for(f"{frame}.WebChannels?.state === 'open'")
                self.assertEqual(page.evaluate(
                    f"{frame}.WebChannels.request('____', 'echo', 'x')"), "x")

    def test_a_sandboxed_page_is_told_why_and_does_not_hurry(self) -> None:
        policy = {"Content-Security-Policy": "sandbox allow-scripts"}
        self.app.route("/", lambda: Response(
            "<script>Math.random = () => 0.99; ends = [], errors = []</script>"
            + self.app.channels_support() + """<script>
            WebChannels.addEventListener('close', event => ends.push(event.detail))
            WebChannels.addEventListener('error', event => errors.push(event.detail.error))
            </script>""",
            headers=policy))
        with serve(self.app) as url, quiet():
            page = self.page(url)
            page.wait_for("ends.length")
            self.assertGreater(page.evaluate("ends[0].wait"), 9000)
            [error] = page.evaluate("errors")
            self.assertIn("allowed_origins", error)
            self.app.config.allowed_origins = "*"
            page.evaluate("WebChannels.open()")
            page.wait_for(OPEN)

    def test_a_page_from_a_file_is_told_why(self) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".html") as file:
            file.write("<script>console.error = (...said) => { window.said = said }</script>"
                       + self.app.channels_support())
            file.flush()
            page = self.page(Path(file.name).as_uri())
            self.assertEqual(page.wait_for("window.said")[1], {
                "error": "file:///: see config.base_path, allowed_origins"})

    def test_a_policy_that_forbids_the_connection_is_told_and_final(self) -> None:
        self.app.route("/", lambda: Response(self.app.channels_support(nonce="a"), headers={
            "Content-Security-Policy": "script-src 'nonce-a'; connect-src 'none'"}))
        with serve(self.app) as url:
            page = self.page(url)
            page.wait_for(f"{SHOWN} === 'closed'")
            self.assertTrue(any(each.startswith("WebChannels:") for each in page.errors))
            self.assertEqual(page.evaluate("WebChannels.subscribe('a').catch(String)"),
                             "AbortError: Closed")

    def test_a_wrapper_of_websocket_without_its_constants(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + """<script>
                window.WebSocket = (real => function (...given) { return new real(...given) })(
                    WebSocket)</script>""")
            self.heard(page, "hello")
            self.assertEqual(page.evaluate("WebChannels.request('____', 'echo', 'x')"), "x")

    # Subscriptions.

    def guarded(self, *outcomes: Any) -> None:
        """A channel "room" whose guard raises these in turn, the last for ever, or lets in."""
        left = list(outcomes)
        self.asked: list[Any] = []

        @self.app.channel("/room/subscribe")
        async def guard(client: ChannelClient) -> None:
            outcome = left.pop(0) if len(left) > 1 else left[0]
            self.asked.append(outcome)
            if outcome == "wait":
                await asyncio.Event().wait()
            elif outcome:
                raise outcome
            self.app.subscribe(client, "room")

    def in_room(self, page: Page) -> bool:
        page.evaluate("WebChannels.request('____', 'echo', 0)")  # what was sent before is done
        return bool(self.app.connected_clients("room"))

    def test_a_late_refusal_is_not_that_of_a_newer_subscription(self) -> None:
        self.guarded(ChannelError("no"), None)
        with serve(self.app) as url:
            page = self.live_page(url)
            outcomes = page.evaluate("""Promise.allSettled([
                WebChannels.subscribe('room'), WebChannels.unsubscribe('room'),
                WebChannels.subscribe('room')]).then(all => all.map(one => one.status))""")
            self.assertEqual(outcomes, ["rejected", "fulfilled", "fulfilled"])
            self.assertTrue(self.in_room(page))
            self.lose(page)
            page.wait_for(OPEN)
            self.assertTrue(self.in_room(page))

    def test_unsubscribing_while_the_connection_closes_undoes_nothing_later(self) -> None:
        self.guarded(None)
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + """<script>
                window.WebSocket = class extends WebSocket {
                    constructor (...given) { super(...given); window.socket = this } }</script>""")
            page.evaluate("WebChannels.subscribe('room')")
            page.evaluate("""(WebChannels.addEventListener('close', () => {
                window.again = WebChannels.subscribe('room') }, {once: true}),
                socket.close(), WebChannels.unsubscribe('room'))""")
            page.wait_for("window.again && again.then(() => true)")
            self.assertTrue(self.in_room(page))

    def test_a_transient_error_does_not_end_a_subscription(self) -> None:
        self.guarded(HTTPError(500), None, HTTPError(500), HTTPError(503), None, HTTPError(403))
        with serve(self.app) as url, quiet():
            page = self.live_page(url, RECORD)
            page.evaluate("""(window.errors = [], window.waits = [], window.confirmed = 0,
                WebChannels.addEventListener('error', event => errors.push(event.detail)),
                WebChannels.addEventListener('debug', event => event.detail.channel
                    && waits.push(event.detail)),
                WebChannels.addEventListener('subscribed', event => {
                    confirmed += event.detail === 'room' }), 0)""")
            self.assertEqual(page.evaluate("WebChannels.subscribe('room').catch(String)"),
                             "ChannelError: ERROR : 500 - Internal server error")
            page.evaluate("WebChannels.subscribe('room')")
            self.lose(page)
            page.wait_for("confirmed === 2")
            self.assertTrue(self.in_room(page))
            first, second = page.evaluate("waits")
            self.assertLess(first["wait"], 1000)
            self.assertLess(second["wait"], 2000)
            self.lose(page)
            page.wait_for("errors.length === 4")
            self.assertEqual([error["error"][:11] for error in page.evaluate("errors")],
                             ["ERROR : 500", "ERROR : 500", "ERROR : 503", "ERROR : 403"])
            self.lose(page)
            page.wait_for(OPEN)
            self.assertFalse(self.in_room(page))
            self.assertEqual(len(self.asked), 6)  # not again after that

    def test_what_becomes_of_a_subscription_is_told(self) -> None:
        self.guarded(None, "wait", None)
        self.app.config.shutdown_timeout = 0.1
        self.app.channel("/room/unsubscribe", lambda client: client.close(1012))
        with quiet(), serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate("""(window.confirmed = [], WebChannels.addEventListener('subscribed',
                event => confirmed.push(event.detail)), WebChannels.subscribe('room').catch(
                    error => error), WebChannels.unsubscribe('room'))""")  # succeeds: it is gone
            page.wait_for("confirmed.includes('____')")
            self.assertEqual(page.evaluate("confirmed"), ["____"])
            self.assertFalse(self.in_room(page))
            page.evaluate("(window.outcome = WebChannels.subscribe('room').catch(String), 0)")
            page.evaluate("(WebChannels.close(), outcome)")
            self.assertEqual(page.evaluate("outcome"), "AbortError: Closed: 1000")
            for channel in "room", "____":
                self.assertEqual(page.evaluate(
                    f"WebChannels.subscribe('{channel}').catch(String)"), "AbortError: Closed")
            page.evaluate("(confirmed = [], WebChannels.open(), WebChannels.subscribe('room'))")
            self.assertTrue(self.in_room(page))
            self.assertEqual(sorted(page.evaluate("confirmed")), ["____", "room"])

    # The connection.

    def test_texts_that_wait_cost_no_blobs(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate("(WebChannels.addEventListener('close', () => WebChannels.close()), 0)")
            page.evaluate("""(window.made = 0, window.Blob = class extends Blob {
                constructor (...given) { super(...given); made++ } },
                NO_TIMERS)""".replace("NO_TIMERS", NO_TIMERS))
            page.evaluate("""(WebChannels.close(), WebChannels.open(), window.sent = Promise.all(
                Array.from({length: 2000}, (_, i) => WebChannels.sendMessageTo('____', 'echo', i))),
                sent.then(() => 0))""")
            self.assertEqual(page.evaluate("WebChannels.request('____', 'echo', 'x')"), "x")
            self.assertEqual((page.evaluate("made"), len(self.echoed)), (0, 2001))

    def test_what_was_rejected_is_not_sent_later(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            self.assertEqual(page.evaluate("""(WebChannels.close(), WebChannels.open(),
                window.outcome = WebChannels.sendMessageTo('____', 'echo', 0).catch(String),
                WebChannels.close(), outcome)"""), "AbortError: Closed: 1000")
            self.assertEqual(page.evaluate("""(async () => {
                const leaving = new AbortController()
                WebChannels.open()
                const reply = WebChannels.request('____', 'echo', 'left', leaving)
                leaving.abort()
                return reply.catch(error => error.name) })()"""), "AbortError")
            self.assertEqual(page.evaluate("WebChannels.request('____', 'echo', 'x')"), "x")
            self.assertEqual(self.echoed, ["x"])

    def test_a_listener_may_reconnect_while_what_waited_is_sent(self) -> None:
        closed = "Closed: 1000"
        with serve(self.app) as url, quiet():
            for word, first in ("subscribe", closed), ("echo", "sent"):
                page = self.live_page(url)
                page.evaluate("""(window.sent = [], window.refused = [], window.word = 'WORD',
                    window.send = payload => sent.push(WebChannels.sendMessageTo(
                        '____', 'echo', payload).then(() => 'sent', error => error.message)),
                    WebChannels.close(), WebChannels.open(), send(0), send(1),
                    WebChannels.addEventListener('debug', ({ detail }) => {
                        if (!word || !detail.out?.includes(word)) return
                        word = ''
                        WebChannels.close()
                        WebChannels.open()
                        send(2)
                        WebChannels.subscribe('room').catch(error => refused.push(error.message))
                    }), 0)""".replace("WORD", word))
                page.wait_for("sent.length === 3")
                self.assertEqual(page.evaluate("Promise.all(sent)"), [first, closed, "sent"])
                page.evaluate("WebChannels.request('____', 'echo', 3)")
                self.assertEqual([each for each in self.echoed if each], [2, 3])
                self.assertEqual(page.evaluate("refused"), [
                    "ERROR : 404 - Not found: call channels_support('room'), or guard it"])
                self.echoed.clear()

    def test_nothing_is_written_to_a_connection_that_closes(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + """<script>
                written = []
                window.WebSocket = class extends WebSocket {
                    constructor (...given) { super(...given); window.socket = this }
                    send (frame) { written.push(this.readyState); super.send(frame) } }</script>""")
            page.evaluate("(socket.close(), WebChannels.open())")  # which asks for a sign of life
            page.wait_for(ANSWERED)
            self.assertEqual(set(page.evaluate("written")), {1})
            self.assertEqual(page.errors, [])

    def test_a_send_that_vanishes_is_noticed_within_three_ticks(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url, RECORD + """<script>
                realTimeout = setTimeout
                setTimeout = (f, ms, ...rest) => ms === 5000 ? (tick = f, 0)
                    : realTimeout(f, ms, ...rest)
                sent = [], deaf = false
                window.WebSocket = class extends WebSocket {
                    send (frame) { sent.push(frame); deaf || super.send(frame) } }</script>""")
            page.evaluate("WebChannels.request('____', 'echo', 0)")
            for _ in range(4):  # nothing waits for an answer: for a while, nothing is asked
                page.evaluate("tick()")
            self.assertNotIn("", page.evaluate("sent"))
            page.evaluate("tick()")
            page.evaluate("WebChannels.request('____', 'echo', 0)")  # the answer is here, too
            self.assertEqual(page.evaluate("sent").count(""), 1)
            page.evaluate("(deaf = true, sent = [],"
                          " window.lost = WebChannels.request('____', 'echo', 1).catch(String),"
                          " tick(), WebChannels.state)")
            self.assertEqual(page.evaluate("sent[1]"), "")
            page.evaluate("tick()")
            self.assertEqual(page.evaluate("WebChannels.state"), "open")
            page.evaluate("tick()")
            self.assertEqual(page.evaluate("lost"), "NetworkError: Lost: 1006 no sign of life")
            page.evaluate("(deaf = false, WebChannels.open())")
            page.wait_for(ANSWERED)

    def test_errors_say_why(self) -> None:
        @self.app.channel("/____/fail")
        def fail() -> None:
            raise ChannelError("no such luck")

        self.app.config.max_message_size = 1000
        with serve(self.app) as url, quiet():
            page = self.live_page(url)
            page.evaluate("""(window.ends = [], window.errors = [], Math.random = () => 0.1,
                WebChannels.addEventListener('error', event => errors.push(event.detail.error)),
                WebChannels.addEventListener('close', event => ends.push(event.detail)), 0)""")
            for call, outcome in (
                    ("'fail'", "ChannelError: no such luck"),
                    ("'echo', 'x'.repeat(2000)",
                     "NetworkError: Lost: 1009 message too long (config.max_message_size)"),
                    *[(f"'echo', 0, {{timeout: {each}}}",
                       f"RangeError: a timeout is above 0 ms, not {each}")
                      for each in ("0", "null", "NaN")]):
                self.assertEqual(page.evaluate(
                    f"WebChannels.request('____', {call}).catch(String)"), outcome)
            page.wait_for(OPEN)
            [error] = page.evaluate("errors")
            self.assertTrue(error.endswith(": message too long (config.max_message_size)"), error)
            port = self.app.port
            self.app.down()
            page.wait_for("ends.length >= 4")
            self.assertEqual(page.evaluate("ends.slice(0, 4)"), [
                {"code": 1009, "reason": "message too long (config.max_message_size)",
                 "opened": True, "wait": 100},
                {"code": 1001, "reason": "server going down", "opened": True, "wait": 200},
                {"code": 1006, "reason": "", "opened": False, "wait": 400},
                {"code": 1006, "reason": "", "opened": False, "wait": 800}])
            self.app.up(port, block=False)
            page.wait_for(OPEN)
            page.evaluate("WebChannels.close()")
            self.assertEqual(page.evaluate("ends.at(-1)"),
                             {"code": 1000, "reason": "", "opened": True})

    def test_each_state_is_told_once_and_in_order(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            port = self.app.port
            page.evaluate("""(window.told = [], Math.random = () => 0, ['state', 'open', 'close']
                .forEach(type => WebChannels.addEventListener(type, ({ type, detail }) =>
                    told.push(type === 'state' ? detail : type))), 0)""")
            self.app.down()
            page.wait_for("told.filter(word => word === 'close').length >= 4")
            self.app.up(port, block=False)
            page.wait_for(OPEN)
            told = page.evaluate("told")
            self.assertEqual([word for word in told if word != "close"],
                             ["reconnecting", "open", "open"])
            page.evaluate("""(told = [], ['open', 'state'].forEach(type =>
                WebChannels.addEventListener(type, () => WebChannels.state === 'open'
                    && WebChannels.close())), WebChannels.close(), WebChannels.close(),
                WebChannels.open())""")
            page.wait_for("told.length >= 6")
            self.assertEqual(page.evaluate("told"), [
                "close", "closed", "connecting", "open", "close", "closed"])

    def test_debug_shows_what_goes_out_and_comes_in_and_the_waits(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate("(window.shown = [], WebChannels.addEventListener('debug', "
                          "event => shown.push(event.detail)), 0)")
            page.evaluate("WebChannels.request('____', 'echo', 'x')")
            out, back = page.evaluate("shown")
            self.assertEqual(json.loads(out["out"])["payload"], "x")
            self.assertEqual(json.loads(back["in"])["payload"], "x")
            self.lose(page)
            page.wait_for("shown.some(({ wait }) => wait > 0)")

    # Pushes.

    def test_which_pushes_a_handler_gets(self) -> None:
        channels = ["room", "room/x", "room:1"]
        for channel in channels:
            self.app.channels_support(channel)
        with serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate("""(window.taken = [], window.from = [], window.calls = 0,
                WebChannels.channel('/room/:n::int', (_, { n }) => taken.push(['int', n])),
                WebChannels.channel('/room/:x::float', (_, { x }) => taken.push(['float', x])),
                WebChannels.channel('/room/x/:what::str', (_, { what }) => taken.push(['x', what])),
                WebChannels.channel('/room/x/y', payload => taken.push(['y', payload])),
                WebChannels.channel('/room:1/.*', payload => taken.push(['.*', payload])),
                WebChannels.addEventListener('message', event => from.push(event.channel)),
                Promise.all(%s.map(channel => WebChannels.subscribe(channel))))""" % channels)
            for channel, message in (("room", "7"), ("room", "-1.5"), ("room", "text"),
                                     ("room", "x/y"), ("room/x", "y"), ("room:1", ".*")):
                self.app.broadcast(channel, message, 1)
            self.app.broadcast("room", "7")
            self.app.broadcast("room/x", "plain")
            page.wait_for("got.includes('plain')")
            self.assertEqual(page.evaluate("taken"), [
                ["int", 7], ["float", 7], ["float", -1.5], ["y", 1], ["x", "y"], [".*", 1]])
            self.assertEqual(page.evaluate("got.map(push => push.message ?? push)"),
                             ["text", "x/y", "7", "plain"])
            self.assertEqual(page.evaluate("from"), [*["room"] * 4, "room/x", "room:1", "room",
                                                     "room/x"])
            for call in "'job/x', print", "'', print", "'/job', print", "'/job/', print", \
                        "'/job/x'", "'/job/:n::complex', print", "'/job/:', print", "5, print":
                with self.subTest(call), self.assertRaisesRegex(BrowserError, "TypeError: not a"):
                    page.evaluate(f"WebChannels.channel({call})")
            page.evaluate("""(window.real = RegExp.prototype.exec, window.calls = 0,
                [...Array(1000).keys()].forEach(i => WebChannels.channel(`/room/${i}`, () => {
                    window.done = calls })),
                RegExp.prototype.exec = function (text) {
                    calls++
                    return real.call(this, text)
                }, 0)""")
            self.app.broadcast("room", "999", 1)
            page.wait_for("window.done")
            self.assertLess(page.evaluate("done"), 10)

    def test_a_plain_text_never_reaches_a_handler_but_a_payload_of_none_does(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate("""(window.taken = [], window.warned = [],
                console.warn = text => warned.push(text),
                WebChannels.channel('/____/start', payload => taken.push(payload)),
                WebChannels.channel('/:channel/:message', payload => taken.push(payload)), 0)""")
            for _ in range(2):
                self.app.broadcast("____", "start")
            self.app.broadcast("____", "other")
            self.app.broadcast("____", "start", None)
            page.wait_for("taken.length >= 2")
            self.assertEqual(page.evaluate("taken"), [None, None])
            self.assertEqual(page.evaluate("got"), ["start", "start", "other"])
            [warning] = page.evaluate("warned")
            self.assertIn("/____/start", warning)
            self.assertIn("payload", warning)

    def test_twenty_tabs_do_not_come_back_in_one_instant(self) -> None:
        self.app.route("/", lambda: self.app.channels_support())
        with serve(self.app) as url:
            pages = [self.page(url) for _ in range(20)]
            for page in pages:
                page.wait_console("Subscription ready")
            self.seen.clear()
            port = self.app.port
            self.app.down()
            self.app.up(port, block=False)
            for page in pages:
                page.wait_for(ANSWERED, 40)
            times = [at for at, _ in self.seen]
            self.assertEqual(len(times), 20)
            crowd = max(sum(at <= other < at + 0.3 for other in times) for at in times)
            self.assertLess(crowd, 10, [round(at - times[0], 3) for at in times])

    def test_the_demo_alone_in_an_empty_folder(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="webchannels-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        shutil.copy(HERE / "webchannels.py", folder)
        with Terminal(sys.executable, "-I", "-S", "webchannels.py", "--port", "0",
                      cwd=folder) as demo:
            url = demo.expect(r"http://127\.0\.0\.1:\d+")[0]
            policy = request("GET", url).headers["content-security-policy"]
            self.assertTrue(policy.startswith("default-src 'none';"), policy)
            self.assertNotIn("unsafe", policy)
            page, other = self.page(url), self.page(url)
            for each in page, other:
                each.wait_for(OPEN)
                each.wait_for("state.textContent === 'connected'")
            other.evaluate("(text.value = '<b id=bold>Hi', say.requestSubmit())")
            page.wait_for("chat.textContent.includes('<b id=bold>Hi')")
            self.assertFalse(page.evaluate("!!document.getElementById('bold')"))
            other.wait_for("text.value === ''")
            self.assertRegex(page.evaluate("wire.textContent"), (
                r'↓ \{"n":1,"channel":"chat","message":"said",'
                r'"payload":"Otter \d+: <b id=bold>Hi"\}\n'))
            self.assertNotIn("tick", page.evaluate("wire.textContent"))
            page.wait_for("curve.getTotalLength() > 1")
            page.wait_for("/^-?0\\.\\d\\d$/.test(reading.textContent)")
            self.assertEqual(page.evaluate(
                "[...document.querySelectorAll('input')].filter(input => !input.labels.length"
                " && !input.getAttribute('aria-label')).map(input => input.id)"), [])
            self.assertEqual(page.evaluate(
                "[document.title, document.documentElement.lang,"
                " document.querySelector('[name=viewport]').content]"),
                ["webchannels", "en", "width=device-width, initial-scale=1"])
            self.assertEqual(page.evaluate(
                "performance.getEntriesByType('resource').map(entry => entry.name)"), [])
            self.assertEqual([page.errors, other.errors], [[], []])
            demo.type("\x03")
            self.assertEqual(demo.process.wait(20), 0)
        page.wait_for(AWAY)
        name = page.evaluate("me.textContent")
        page.evaluate("(before = points.at(-1), text.value = 'while away', say.requestSubmit())")
        page.wait_for("gaps.getTotalLength() > 0.5")  # seconds
        port = url.rpartition(":")[2]
        with Terminal(sys.executable, "-I", "-S", "webchannels.py", "--port", port, cwd=folder):
            page.wait_for(OPEN, 40)
            page.wait_for("chat.textContent === "
                          f"'(The server was restarted.)\\n{name}: while away\\n'")
            page.wait_for("points.at(-1)[0] > before[0]")
            page.wait_for("gaps.getTotalLength() > 0.5")  # and it stays for a while
            self.assertEqual(page.evaluate("me.textContent"), name)

    def test_a_folder_of_files(self) -> None:
        """A page, a style, a module, channels.js, and a sound that is sought in by ranges."""
        folder = Path(tempfile.mkdtemp(prefix="webchannels-"))
        self.addCleanup(shutil.rmtree, folder)
        (folder / "live").mkdir()
        rate, seconds = 8000, 600
        sound = struct.pack(
            "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + rate * seconds, b"WAVE", b"fmt ", 16,
            1, 1, rate, rate, 1, 8, b"data", rate * seconds)
        for name, text in {
                "index.html": "<!doctype html><link rel=stylesheet href=style.css><h1>Files</h1>"
                "<audio src=sound.wav preload=metadata></audio><script src=/channels.js></script>"
                "<script type=module src=app.mjs></script>",
                "style.css": "h1 { color: rgb(1, 2, 3) }", "app.mjs": "import './more.js'",
                "more.js": "window.more = true; await WebChannels.subscribe('____')"}.items():
            (folder / "live" / name).write_text(text)
        (folder / "live" / "sound.wav").write_bytes(sound + bytes([128]) * rate * seconds)
        self.app.static("/", folder)
        with serve(self.app) as url:
            page = self.page(f"{url}/live")  # there it gets a slash
            page.wait_console("Subscription ready")
            page.wait_for("window.more")
            self.assertEqual(page.evaluate("location.pathname"), "/live/")
            self.assertEqual(page.evaluate(
                "getComputedStyle(document.querySelector('h1')).color"), "rgb(1, 2, 3)")
            self.assertEqual(page.evaluate("""new Promise((done, failed) => {
                const audio = document.querySelector('audio')
                audio.onerror = failed
                audio.onseeked = () => done([audio.duration, audio.currentTime])
                const seek = () => { audio.currentTime = 500 }
                audio.readyState ? seek() : audio.onloadedmetadata = seek })"""), [600, 500])
            self.assertEqual(page.evaluate(
                "fetch('sound.wav', { headers: { Range: 'bytes=0-3' } }).then(async answer => "
                "[answer.status, await answer.text()])"), [206, "RIFF"])
            page.reload()
            page.wait_console("Subscription ready")
            self.assertEqual(page.errors, [])


class InFirefox(InChromium):
    kind = Firefox
    kept = "false"  # Firefox decides before the page can close its connection (on pagehide)


class OnlyInChromium(BrowserTest):
    def test_a_frozen_tab_thaws(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            page.freeze(True)  # Chromium also ends the connections of a page that it freezes
            page.freeze(False)
            self.assertTrue(self.left.wait(20))
            page.wait_for(ANSWERED)
            self.heard(page, "again")
            self.assertEqual(len(self.app.connected_clients()), 1)

    def test_a_frozen_tab_misses_nothing_that_is_kept(self) -> None:
        self.app.keep("____")
        with serve(self.app) as url:
            page = self.live_page(url)
            for number in range(3):
                page.freeze(True)
                self.assertTrue(self.left.wait(10))
                self.left.clear()
                self.app.broadcast("____", f"frozen {number}")
                page.freeze(False)
                page.wait_for(OPEN)
                self.app.broadcast("____", f"thawed {number}")
            page.wait_for("got.length >= 6")
            self.assertEqual(page.evaluate("got"), [f"{how} {number}" for number in range(3)
                                                    for how in ("frozen", "thawed")])

    def test_a_frozen_tab_lets_go_and_comes_back_at_once(self) -> None:
        with serve(self.app) as url:
            page = self.live_page(url)
            page.evaluate(NO_TIMERS)
            page.freeze(True)
            self.assertTrue(self.left.wait(10))
            self.assertFalse(self.app.broadcast("____", "into the void"))
            page.freeze(False)
            page.wait_for(OPEN)
            self.heard(page, "again")

    def test_the_walkthrough_typed_at_the_prompt(self) -> None:
        with Terminal(sys.executable, "-i", "-q") as repl:
            def enter(line: str, answer: str = "") -> str:
                repl.expect(">>> ")
                repl.type(line + "\n")
                repl.expect(re.escape(line))  # the terminal's echo
                return repl.expect(answer)[0]
            enter("from webchannels import *")
            enter('route("/", lambda: channels_support())')
            enter('on_disconnect(lambda: print("somebody", "left")) and None')
            page = self.page(enter("up(0)", r"http://127\.0\.0\.1:\d+"))
            page.wait_console("Subscription ready")
            enter("connected_clients()", r"\[<ChannelClient .*____.*\]")
            enter('broadcast("____", "Hey!")', "True")
            page.wait_console("Hey!")
            enter('script = "parse_payload = p => console.log(`Got this payload: ${p}`)"')
            enter('page = channels_support() + f"<script>{script}</script>"')
            enter('route("/", lambda: page)')
            repl.expect(">>> ")
            page.reload()
            repl.expect("somebody left")
            page.wait_console("Subscription ready")
            repl.type('broadcast("____", "Hey!")\n')
            page.wait_console("Got this payload: Hey!")
            repl.type('@channel("/____/echo")\ndef echo():\n    text = f"Received: '
                      '{params(\'payload\')}"\n    print(text)\n    return text\n\n1 + 1\n')
            repl.expect("\n2\n")
            page.evaluate("Genie.WebChannels.sendMessageTo('____', 'echo', 'Hello!')")
            repl.expect("Received: Hello!")
            page.wait_console("Got this payload: Received: Hello!")
            page.close()
            repl.expect("somebody left")
            repl.type("connected_clients(), len(disconnected_clients())\n")
            repl.expect(r"\(\[\], 2\)")
            repl.type("unsubscribe_disconnected_clients(), disconnected_clients()\n")
            repl.expect(r"\(\[\], \[\]\)")
            repl.type("exit()\n")
            self.assertEqual(repl.process.wait(20), 0)


# ---- The files as somebody has them who has no others --------------------------------------------

HASHES = "| release | SHA-256 of `webchannels.py` |\n|---|---|\n"  # in README.md, the newest first
NOT_YET = "not released yet"  # in place of a date in CHANGELOG.md


def sha256() -> str:
    return hashlib.sha256((HERE / "webchannels.py").read_bytes()).hexdigest()


def release() -> None:
    """What is being worked on gets its version, its hash in README.md, its date in CHANGELOG.md."""
    def replace(name: str, old: str, new: str) -> None:
        text = (HERE / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has not one {old!r}"
        (HERE / name).write_text(text.replace(old, new), encoding="utf-8")

    version = webchannels.__version__.replace(".dev0", "")
    replace(".github/CHANGELOG.md", f"## {version}, {NOT_YET}\n",
            f"## {version}, {time.strftime('%Y-%m-%d', time.gmtime())}\n")
    replace("webchannels.py", f'__version__ = "{version}.dev0"\n', f'__version__ = "{version}"\n')
    replace("README.md", HASHES, f"{HASHES}| {version} | `{sha256()}` |\n")


class VendoringTest(unittest.TestCase):
    def test_the_docstring_names_the_rooms_in_their_order(self) -> None:
        module = (HERE / "webchannels.py").read_text(encoding="utf-8")
        told = " ".join((webchannels.__doc__ or "").split()).partition("data flows: ")[2]
        self.assertEqual(told.rstrip(".").split(", "), re.findall(r"(?m)^# -{9,} (.+)$", module))

    def test_a_release_is_the_file_that_the_readme_names(self) -> None:
        readme = (HERE / "README.md").read_text(encoding="utf-8").partition(HASHES)[2]
        hashes = dict(re.findall(r"(?m)^\| ([\d.]+) \| `([0-9a-f]{64})` \|$", readme))
        version, between, _ = webchannels.__version__.partition(".dev0")
        if not between:
            self.assertEqual(
                hashes.get(version), sha256(), f"this is not the file that is called {version} in "
                f"README.md: begin the next version, as in __version__ = '{version}.dev0'; "
                "`python3 test_webchannels.py --release` will name its hash")
        elif version in hashes:
            self.fail(f"{version} is released: the next version has another number")

    def test_the_newest_changes_are_of_this_version(self) -> None:
        if not (HERE / ".github").is_dir():
            self.skipTest("needs the repository")
        readme = (HERE / "README.md").read_text(encoding="utf-8").partition(HASHES)[2]
        changes = (HERE / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
        version, between, _ = webchannels.__version__.partition(".dev0")
        told = re.findall(r"(?m)^## (.+), (.+)$", changes)
        self.assertEqual(told[0][0], version)
        self.assertEqual(told[0][1] == NOT_YET, bool(between))
        for name, date in told[bool(between):]:
            self.assertRegex(date, r"^\d{4}-\d\d-\d\d$")
            self.assertIn(f"\n| {name} | `", f"\n{readme}")

    def test_each_has_its_notice(self) -> None:
        notice = (HERE / "LICENSE").read_text(encoding="utf-8").partition("\n\n")[2].split()
        module = (HERE / "webchannels.py").read_text(encoding="utf-8")
        plain = re.sub(r"(?m)^# ?(SPDX-License-Identifier: MIT$)?", "", module)
        self.assertIn(" ".join(notice), " ".join(plain.split()))
        client = (HERE / "channels.js").read_text(encoding="utf-8")
        for text, mark in (module, "# "), (client, "// "):
            self.assertRegex(text, rf"(?m)^{mark}.*\bSPDX-License-Identifier: MIT$")
        self.assertIn(" ".join(notice[2:5]), client.partition("\n")[0])


# ---- README.md -----------------------------------------------------------------------------------

TYPED_FIRST = "import webchannels; webchannels.config.server_port = {}\n"
NGINX_HTTP = """pid {0}/pid; error_log {0}/log; events {{ }} http {{ access_log off;
client_body_temp_path {0}; proxy_temp_path {0}; fastcgi_temp_path {0}; uwsgi_temp_path {0};
scgi_temp_path {0}; {1} }}"""
PROGRAMS = {  # what becomes true in their pages
    "First program": "(globalThis.alert = text => { said = text }, globalThis.said ??= '',"
        " who.value = 'Ada', who.onchange(), said === 'Hello, Ada!')"
        " && clock.textContent.includes(':')",
    "A progress bar for a long-running script": "document.querySelector('progress').value > 0",
    "A live chart of a sensor, or of a training loop":
        "values.length > 9 && document.querySelector('#curve').getTotalLength() > 9",
    "Inside an asyncio program of your own":
        "document.querySelector('h1').textContent.includes(':')"}


class ReadmeTest(BrowserTest):
    """Every block of Python and JavaScript, as it stands but for the ports."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(tempfile.mkdtemp(prefix="webchannels-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.blocks: dict[str, list[tuple[str, str]]] = {}  # (language, text) by heading
        heading, text = "", (HERE / "README.md").read_text(encoding="utf-8")
        for title, language, block in re.findall(r"(?ms)^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", text):
            heading = title or heading
            if language:
                self.blocks.setdefault(heading, []).append((language, block))
        self.ports: dict[str, int] = {}
        for port in "8000", "5000", "443", "6379", "8001", "8002", "8003", "8004":
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.ports[port] = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.ports['8000']}"

    def texts(self, heading: str, language: str) -> list[str]:
        return [text for each, text in self.blocks[heading] if each == language]

    def with_ports(self, text: str) -> str:
        return re.sub(r"\b(800[0-4]|5000|443|6379)\b",
                      lambda match: str(self.ports[match[0]]), text)

    def start(self, heading: str, *options: str, then: str = "", port: str = "8000",
              arguments: Sequence[str] = ()) -> Terminal:
        """Run the heading's Python as one program, until it serves."""
        source = "".join([*self.texts(heading, "python"), then])
        (self.folder / "app.py").write_text(
            TYPED_FIRST.format(self.ports["8000"]) + self.with_ports(source))
        program = Terminal(sys.executable, *options, "app.py", *arguments, cwd=self.folder,
                           BROWSER="true", PYTHONPATH=os.pathsep.join(
                               [str(HERE), os.environ.get("PYTHONPATH", "")]))
        for _ in range(200):
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.connect(("127.0.0.1", self.ports[port]))
                return program
            time.sleep(0.1)
        program.expect("(?!)", 0)  # shows what it said
        raise AssertionError

    def open(self, url: str = "") -> Page:
        page = self.page(url or self.url)
        page.wait_console("Subscription ready")
        self.assertEqual(page.errors, [])
        return page

    def test_no_block_is_left_out(self) -> None:
        tests = Path(__file__).read_text(encoding="utf-8")
        for heading, blocks in self.blocks.items():
            if {language for language, _ in blocks} & {"python", "js", "nginx", "sh"}:
                self.assertTrue(f'"{heading}"' in tests, heading)

    def test_links(self) -> None:
        if not (HERE / ".github").is_dir():
            self.skipTest("needs the repository")
        text = (HERE / "README.md").read_text(encoding="utf-8")
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                   for title in re.findall("(?m)^#+ (.+)$", text)}
        for link in re.findall(r'(?:\]\(|="(?=\.))(?!https:)([^)"\s]+)', text):
            if link.startswith("#"):
                self.assertIn(link[1:], anchors)
            else:
                path = re.sub(r"^\.\./\.\./actions/(.*\.yml)(/badge\.svg)?$", r".github/\1", link)
                self.assertTrue((HERE / path).is_file(), link)

    def test_the_docstring_has_the_first_program_and_the_browser_too(self) -> None:
        told = webchannels.__doc__ or ""
        [program] = self.texts("First program", "python")
        self.assertIn(textwrap.indent(program, "    "), told)
        text = (HERE / "README.md").read_text(encoding="utf-8")
        tables = text.partition("\n### Browser\n")[2].partition("\n#")[0]
        for names in re.findall(r"(?m)^\| (`.*?`) \|", tables):
            for name in re.findall(r"`(\w+)", names):
                self.assertRegex(told.partition("In the page")[2], rf"`{name}\b")

    def test_the_commands(self) -> None:
        self.assertEqual(self.texts("Start", "sh"), ["python3 webchannels.py\n"])
        self.assertEqual(self.texts("Development", "sh"), ["python3 test_webchannels.py\n"])
        if shutil.which("sha256sum"):
            said = subprocess.check_output(self.texts("Vendoring", "sh")[0], shell=True, cwd=HERE)
            self.assertEqual(said.count(sha256().encode()), 2)
        shutil.copy(HERE / "webchannels.py", self.folder)
        with Terminal(sys.executable, "webchannels.py", "--port", "0", cwd=self.folder) as demo:
            self.open(demo.expect(r"http://[\d.:]+")[0])

    def test_the_walkthrough(self) -> None:
        page, values = None, []
        with Terminal(sys.executable, "-i", "-q") as repl:
            repl.type(TYPED_FIRST.format(self.ports["8000"]))
            for number, (language, block) in enumerate(self.blocks["Walkthrough"]):
                if page and block == "connected_clients()\n":
                    page.close()
                    repl.type("import time; time.sleep(1)\n")
                if language == "python":
                    repl.type(f"{block}print('typed', {number})\n")
                    said = repl.expect(rf"(?s)(.*)\ntyped {number}\n")[1]
                    self.assertNotIn("Traceback", said)
                    values += re.findall(r"(?m)^(?:>>> |\.\.\. )*(\[.*\]|True|'http.*')$", said)
                    if not re.match("from|PAGE|@", block):
                        self.assertEqual(len(ast.parse(block).body), 1)  # a prompt shows the last
                if "@route" in block:
                    if page:
                        page.reload()
                    page = page or self.page(self.url)
                    page.evaluate("WebChannels.subscribe('____')")
                assert page
                if language == "js":
                    page.evaluate(f"({block})")
                    repl.expect("Received: Hello!\n")
                for line in block.splitlines() if language == "text" else ():
                    page.wait_console(line)
        url, connected, first, again, nobody, left, remain = values
        self.assertEqual(url, repr(self.url))
        self.assertRegex(connected, r"^\[<ChannelClient [0-9a-f]{16} 127\.0\.0\.1 connected "
                                    r"\['____'\]>\]$")
        self.assertEqual((first, again, nobody, remain), ("True", "True", "[]", "[]"))
        self.assertEqual(left.count(" disconnected "), 2)

    def test_programs(self) -> None:
        for heading, condition in PROGRAMS.items():
            with self.subTest(heading), self.start(heading) as program:
                program.expect(self.url)
                page = self.open()
                page.wait_for(condition)
                page.close()  # it would come back to the next program
                if "asyncio" in heading:
                    program.type("\x03")
                    self.assertEqual(program.end(), (0, "\n^C"))  # and no traceback

    def test_a_folder_of_files(self) -> None:
        heading = "Your own folder of files"
        (self.folder / "www").mkdir()
        for language, name in ("html", "index.html"), ("js", "page.js"), ("css", "style.css"):
            [text] = self.texts(heading, language)
            (self.folder / "www" / name).write_text(text)
        with self.start(heading):
            page = self.open()
            page.wait_for(r"/\d\d:\d\d:\d\d/.test(document.querySelector('h1').textContent)")
            self.assertEqual(page.evaluate(
                "getComputedStyle(document.body).display"), "grid")

    def test_files(self) -> None:
        with self.start("Files", then="up()\n"):
            self.assertEqual(request("GET", self.url + "/report").status, 404)
            (self.folder / "report.csv").write_text("a,b\n")
            for path in "/report", "/download":
                self.assertEqual(request("GET", self.url + path).body, b"a,b\n")

    def test_buttons_and_sliders(self) -> None:
        with self.start("Buttons and sliders that call Python") as program:
            page, other = self.open(), self.open()
            for name, number, text, kind in (
                    ("slider", 30, "Set to 30 %", ""),
                    ("slider", 90, "Above 80 % it gets too hot", "error"),
                    ("blink", 30, "ERROR : 500 - Internal error", "error"),
                    ("off", 0, "Set to 0 %", "")):
                page.evaluate("(slider.value = 90, slider.oninput())" if number == 90 else
                              "(slider.value = 30, slider.oninput())" if name == "slider" else
                              f"document.querySelector('[name={name}]').click()")
                page.wait_for(f"answer.textContent === {text!r} && answer.className === {kind!r}")
                if not kind:
                    other.wait_for(f"slider.valueAsNumber === {number}")
            program.expect("RuntimeError: the page must not see this")

    def test_upload_and_download(self) -> None:
        with self.start("Upload and download"):
            page = self.open()
            page.evaluate("""(async () => {
                const files = new DataTransfer()
                for (const name of ['a b.txt', '.hidden']) files.items.add(new File(['Hi'], name))
                const input = document.querySelector('input')
                input.files = files.files
                await input.onchange({ target: input })
            })()""")
            page.wait_for("answer.textContent === '.hidden: Give it a plain name'")
            page.wait_for("document.querySelector('li').textContent === 'a b.txt'")
            self.assertEqual(page.evaluate(
                "fetch(document.querySelector('a').href).then(reply => reply.text())"), "Hi")
            self.assertEqual([path.name for path in (self.folder / "uploads").iterdir()],
                             ["a b.txt"])

    def test_unit_tests(self) -> None:
        [tests] = self.texts("Unit tests of your own handlers", "python")
        (self.folder / "test_app.py").write_text(tests)
        done = run_python("-m", "unittest", cwd=self.folder, PYTHONPATH=str(HERE))
        self.assertRegex(done.stderr, r"(?s)^\.\.\n-+\nRan 2 tests in .*\n\nOK\n$")

    def test_another_machine(self) -> None:
        heading = "On another machine: `ssh -L`, JupyterHub"
        hub = {"Host": "hub.example.com"}
        with mock.patch.dict(os.environ, JUPYTERHUB_SERVICE_PREFIX="/user/ada/"), \
                self.start(heading):
            path = f"/user/ada/proxy/{self.ports['8000']}/"
            self.assertIn(f'data-path="{path}"'.encode(), request("GET", self.url, hub).body)
            WebSocketClient(self.url, headers=hub, origin="https://hub.example.com").close()

    def test_rooms(self) -> None:
        heading = "A chat with rooms, where a cookie decides who may subscribe"
        with self.start(heading) as program, WebSocketClient(self.url) as stranger:
            for message in "subscribe", "say":
                stranger.send_json({"channel": "rooms/tea", "message": message, "payload": "x"})
                self.assertEqual(stranger.recv_text(), "ERROR : 403 - This is not your room")
            program.expect(self.url)
            page = self.page(self.url)
            page.evaluate("(document.forms[0][0].value = 'bob', document.forms[0].requestSubmit())")
            page.wait_console("Subscription ready")
            page.evaluate("(say[0].value = '<b>Hi', say.requestSubmit())")
            page.wait_for(r"said.textContent === 'bob: <b>Hi\n' && say[0].value === ''")
            self.assertEqual(page.evaluate("fetch('/lab').then(answer => answer.status)"), 403)
            page.reload()
            page.wait_for(r"said.textContent === 'bob: <b>Hi\n'")

    def test_a_notebook(self) -> None:
        with self.start("A notebook that pushes to a tab", "-i") as notebook:
            page = self.open()
            notebook.type('broadcast("____", "result", {"loss": 0.125})\n')
            page.wait_for("document.querySelector('pre').textContent.includes('0.125')")

    def test_a_device(self) -> None:
        heading = "A device that sends its readings"
        with self.start(heading):  # up() blocks: what follows is not reached
            page = self.open()
            (self.folder / "device.py").write_text(
                self.with_ports(self.texts(heading, "python")[1]))
            with Terminal(sys.executable, "device.py", cwd=self.folder, PYTHONPATH=str(HERE)):
                page.wait_for(r"/^\d\d\.\d °C$/.test(document.querySelector('h1').textContent)")
            with webchannels.connect(self.url) as stranger, self.assertRaisesRegex(
                    ChannelError, "Only the device"):
                stranger.request("lab", "celsius", 0)

    def test_tests_of_handlers(self) -> None:
        [program] = self.texts("Tests of your own handlers", "python")
        (self.folder / "test_app.py").write_text(program)
        said = run_python("test_app.py", cwd=self.folder, PYTHONPATH=str(HERE))
        self.assertRegex(said.stderr, r"Ran 2 tests in [\d.]+s\n\nOK\n$")

    def test_the_client_in_python(self) -> None:
        [program] = self.texts("Client in Python", "python")
        self.app.channels_support("room")

        @self.app.channel("/____/echo")
        def echo(payload: int, client: ChannelClient) -> int:
            asyncio.get_running_loop().call_soon(client.close)  # behind the reply
            return payload

        @self.app.channel("/room/say")
        def say(payload: str) -> None:
            self.app.broadcast("room", "said", payload)

        with serve(self.app) as url:
            (self.folder / "client.py").write_text(program.replace("http://127.0.0.1:8000", url))
            said = run_python("client.py", cwd=self.folder, PYTHONPATH=str(HERE))
        self.assertEqual((said.stdout, said.stderr), ("42\nroom said Hello\n", ""))

    def test_beside_flask(self) -> None:
        if not importlib.util.find_spec("flask"):
            self.skipTest("needs Flask")
        with self.start("Beside Flask or FastAPI, on another port", port="5000"):
            page = self.open(f"http://127.0.0.1:{self.ports['5000']}")
            page.evaluate("document.querySelector('button').click()")
            page.wait_for("said.textContent.startsWith('Saved')")

    def test_the_handlers(self) -> None:
        pages = {"/hello/%3CAda": b"Hello, &lt;Ada!", "/add/1/2?times=3": b'{"sum":9}',
                 "/report": b"a,b\n1,2\n"}
        with self.start("Server", then="up()\n"):
            for path, body in pages.items():
                self.assertEqual(request("GET", self.url + path).body, body)
            with self.assertRaises(Refused):
                WebSocketClient(self.url, headers={"User-Agent": "Robot"})
            with WebSocketClient(self.url) as client:
                client.send_text("raw")
                client.send_json({"channel": "room/tea", "message": "say", "payload": 1})
                self.assertEqual([client.recv_text(), client.recv_text()], ["raw", "said"])

    def test_the_browser(self) -> None:
        self.app.channels_support("room")
        with serve(self.app) as url, quiet():
            for block in self.texts("Browser", "js"):
                page = self.live_page(url)
                page.evaluate(f"(async () => {{ {block} }})()")
                if "// ERROR" in block:
                    page.wait_console(block.partition("// ")[2].partition("\n")[0])
                self.assertEqual(page.errors, [])
        with self.start("Browser", then="up()\n"):
            for path in "/inline", "/file":
                self.open(self.url + path)

    def test_kept_channels(self) -> None:
        heading = "Kept channels"
        then = """route("/", lambda: channels_support("train"))
broadcast("train", "early")
up()
"""
        with self.start(heading, then=then):
            page = self.open()
            page.wait_console("early")
            page.evaluate(f"({{}}, {self.texts(heading, 'js')[0].strip()}, 0)")
            page.evaluate("WebChannels.dispatchEvent(new CustomEvent('missed', {detail: 'train'}))")
            page.wait_console("anew: train")

    def test_from_genie(self) -> None:
        with self.start("From Genie"), WebSocketClient(self.url) as client:
            client.send_json({"channel": "____", "message": "subscribe", "payload": {}})
            self.assertEqual(client.recv_text(), "Subscription: OK")
            client.send_json({"channel": "____", "message": "keepalive",
                              "payload": {"payload": {"timestamp": 1}}})
            self.assertEqual(client.recv_json()["message"], "keepalive")

    def test_on_the_network(self) -> None:
        pem = certificate(self.folder)
        for name in "fullchain.pem", "privkey.pem":
            shutil.copy(pem, self.folder / name)
        with self.start("On the network", port="443"):
            url = f"https://127.0.0.1:{self.ports['443']}"
            self.assertEqual(request("GET", url, {"Host": "live.example.com"}).status, 200)
            self.assertEqual(request("GET", url).status, 403)

    def start_nginx(self, nginx: str, http: str) -> None:
        (self.folder / "nginx.conf").write_text(NGINX_HTTP.format(self.folder, http))
        command = [nginx, "-p", str(self.folder), "-c", "nginx.conf", "-e", "log"]
        subprocess.run(command, check=True)
        self.addCleanup(subprocess.run, [*command, "-s", "stop"])

    def test_behind_nginx(self) -> None:
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if not nginx:
            self.skipTest("needs nginx")
        heading, pem = "Behind nginx, with TLS, under a prefix", certificate(self.folder)
        server = re.sub(r"/etc/ssl/\w+\.pem", str(pem), self.texts(heading, "nginx")[0])
        self.start_nginx(nginx, self.with_ports(server))
        url, host = f"https://127.0.0.1:{self.ports['443']}/live/", {"Host": "example.com"}
        with self.start(heading):
            self.assertIn(b'data-path="/live/"', request("GET", url, host).body)
            WebSocketClient(url, headers=host, origin="https://example.com").close()
            with self.assertRaises(Refused):
                WebSocketClient(url, headers=host, origin="https://example.org")

    def test_several_processes(self) -> None:
        if not shutil.which("redis-server"):
            self.skipTest("needs redis-server")
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if not nginx:
            self.skipTest("needs nginx")
        heading = "Several processes"
        redis = Redis("--dir", str(self.folder), port=self.ports["6379"])
        self.addCleanup(redis.kill)
        [unit] = self.texts(heading, "ini")
        self.assertIn("ExecStart=/usr/bin/python3 app.py 8000\n", unit)
        for names in ["8000"] * 2, ["8001", "8002", "8003", "8004"]:
            with contextlib.ExitStack() as stack:
                for name in names:
                    stack.enter_context(self.start(heading, port=name, arguments=[
                        str(self.ports[name])])).expect("Serving at")
                if names[0] == "8001":
                    server = self.with_ports(self.texts(heading, "nginx")[0])
                    above = self.texts("Behind nginx, with TLS, under a prefix", "nginx")[0]
                    self.start_nginx(nginx, above[:above.index("server {")] + server)
                clients = []
                for _ in range(20):
                    client = stack.enter_context(WebSocketClient(self.url, origin=self.url))
                    client.send_json({"channel": "____", "message": "subscribe"})
                    self.assertEqual(client.recv_text(), "Subscription: OK")
                    clients.append(client)
                known, end = ["webchannels/live/____", f":{len(names)}"], time.monotonic() + 10
                while redis.ask("PUBSUB", "NUMSUB", known[0]) != known:
                    self.assertLess(time.monotonic(), end)
                clients[0].send_json({"channel": "____", "message": "say", "payload": "Hi"})
                self.assertEqual({client.recv_text() for client in clients}, {"Hi"})

    def test_another_engine(self) -> None:
        with self.start("Another engine than Redis", "-i", port="5000") as program:
            clients = [WebSocketClient(f"http://127.0.0.1:{self.ports[port]}")
                       for port in ("8000", "5000")]
            for client in clients:
                self.addCleanup(client.close)
                client.send_json({"channel": "____", "message": "subscribe"})
                self.assertEqual(client.recv_text(), "Subscription: OK")
            program.type('apps[0].broadcast("____", "Hi")\n')
            self.assertEqual([client.recv_text() for client in clients], ["Hi", "Hi"])


if __name__ == "__main__":
    if sys.argv[1:] == ["--embed"]:
        (HERE / "webchannels.py").write_text(embedded(), encoding="utf-8")
    elif sys.argv[1:] == ["--release"]:
        release()
    else:
        unittest.main()
