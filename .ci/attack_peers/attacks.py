"""The attacks of .ci/attack: what each connection sends, and what is expected of the server."""
from __future__ import annotations

import base64
import itertools
import random
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable

KIB, MIB = 1024, 1024 * 1024
TEXT, BINARY, CONTINUATION, CLOSE, PING = 1, 2, 0, 8, 9
WEBSOCKETS, HTTP = ("websockets", "aiohttp", "ws"), ("aiohttp", "ws")


def frame(opcode: int, payload: bytes, fin: bool = True, deflated: bool = False) -> bytes:
    """As a client sends it, with a mask of zeros."""
    size = len(payload)
    head = bytes([fin << 7 | deflated << 6 | opcode])
    if size < 126:
        return head + bytes([128 | size]) + bytes(4) + payload
    wide = 2 if size < 65536 else 8
    return head + bytes([128 | (126 if wide == 2 else 127)]) + size.to_bytes(wide, "big") \
        + bytes(4) + payload


def deflated(data: str | bytes, opcode: int = TEXT, fin: bool = True) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    deflater = zlib.compressobj(9, wbits=-15)
    packed = deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return frame(opcode, packed[:-4], fin, deflated=True)


def say(message: str, payload: str = '"x"', channel: str = "____") -> str:
    return f'{{"channel":"{channel}","message":"{message}","payload":{payload}}}'


def handshake(*fields: str) -> bytes:
    return request("GET / HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade",
                   "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                   *fields)


def request(line: str, *fields: str, body: bytes = b"") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([line, "Host: localhost", *fields, *length, "", ""]).encode() + body


OFFER = "Sec-WebSocket-Extensions: permessage-deflate"
GET = request("GET / HTTP/1.1")
V1 = "Sec-WebSocket-Protocol: webchannels.v1"
PLAIN, DEFLATE = handshake(), handshake(OFFER)
EMOJI = "\N{GRINNING FACE}"  # one of them makes CPython keep four bytes for each character
JUNK = ["".join(each) + ": x" for each in itertools.product("abcdefghijklm", repeat=3)][:1800]
FORM = "Content-Type: application/x-www-form-urlencoded"
IS_JSON = "Content-Type: application/json"
WIDE = "a" * (MIB - 9) + EMOJI
TEXT_BOMB = deflated(WIDE)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def bomb(ratio: int) -> bytes:
    """1 MiB of JSON that costs much, deflated to so many times less, with what is not deflated."""
    filler = base64.b64encode(random.Random(1).randbytes(MIB // ratio)).decode()
    lists = ",[]" * ((MIB - len(filler) - 99) // 3)
    return deflated(say("echo", f'["{filler}"{lists}]'))


def offers(n: int) -> bytes:
    """A handshake, of the nth of 14 kinds: what is deflated for one is of no use to another."""
    window = f"{OFFER}; server_max_window_bits={9 + n % 7}"
    return handshake(window, *([V1] if n // 7 % 2 else []))


@dataclass
class Attack:
    """What each connection sends: `first` once, then `send`: "again" and again, or once to "stay"
    or to "leave". Functions are given a number, of the connection or of what is sent."""

    about: str
    send: bytes | Callable[[int], bytes] = b""
    first: bytes | Callable[[int], bytes] = b""  # a handshake, whose answer is awaited
    then: str = "again"
    reads: bool = True
    window: int = 0  # bytes that its kernel takes, where it does not read; 0: as many as it likes
    begun: bool = False  # it stays unfinished: the server is to end the connection in time
    peers: tuple[str, ...] = ()
    many: int = 100  # connections
    quick: int = 100  # connections of the short form; 0: it is left out
    together: bool = False  # it needs them all, to make others wait
    everywhere: bool = False  # to be tried on every Python: they differ
    cpu: bool = True  # False: what it costs is the program's own work, or that of connecting
    given: int = 0  # bytes for each connection that are the program's own: a payload, an answer
    settings: dict[str, Any] = field(default_factory=dict)


ATTACKS = {
    # What stays.
    "fragment": Attack("1 MiB of text with an emoji, deflated, never ended",
                       deflated(WIDE, fin=False), DEFLATE, "stay", begun=True, peers=WEBSOCKETS),
    "fragment-visits": Attack("such a text, by clients that leave at once",
                              deflated(WIDE, fin=False), DEFLATE, "leave", many=20, quick=20,
                              peers=WEBSOCKETS),
    "plain-fragment": Attack("1 MiB of text with an emoji, never ended", frame(
        TEXT, WIDE.encode(), fin=False), PLAIN, "stay", peers=WEBSOCKETS),
    "declared": Attack("a deflated frame that declares 2**62 bytes", b"\xc1\xff\x40" + bytes(11),
                       DEFLATE, "stay", begun=True, peers=WEBSOCKETS),
    "closing": Attack("frames that break the protocol, and the Close is not answered",
                      frame(3, b""), PLAIN, "stay", begun=True),
    "headers": Attack("handshakes with 16 KB of tiny header fields, and stay", b"",
                      handshake(*JUNK), "stay", many=200, quick=0),
    "header-visits": Attack("such handshakes, by clients that leave at once", b"", handshake(*JUNK),
                            "leave", many=20, quick=20),
    "bodies": Attack("1 MiB of JSON posted, and the connection kept", request(
        "POST / HTTP/1.1", IS_JSON, body=b'"%s"' % (b"a" * (MIB - 2))), then="stay", peers=HTTP),
    "pages": Attack("pages that call channels_support(), for long names", lambda n: request(
        f"GET /page/{n}{'a' * 15_000}%F0%9F%98%80 HTTP/1.1"), quick=1),
    "more-pages": Attack("pages that call channels_support(), for many names", lambda n: request(
        f"GET /page/{n}{'a' * 200}%F0%9F%98%80 HTTP/1.1"), quick=1),
    "names": Attack("subscriptions to names of 1 MiB, deflated", lambda n: deflated(
        say("subscribe", channel=f"{n}{'a' * (MIB - 99)}{EMOJI}")), DEFLATE, quick=1),
    "more-names": Attack("1,000 subscriptions to names of 250 characters", lambda n: b"".join(
        frame(TEXT, say("subscribe", channel=f"{n}-{each}-{'a' * 240}{EMOJI}").encode())
        for each in range(1000)), PLAIN, "stay", many=20, quick=20),  # with more, malloc keeps it
    "tls": Attack("TLS handshakes that never begin, 500 where 50 are let in", then="stay",
                  begun=True, many=500, quick=500, settings={"max_clients": 50}),
    "busy": Attack("1 MiB of text with an emoji, deflated, again while a handler waits",
                   lambda n: TEXT_BOMB, DEFLATE + frame(TEXT, say("nap").encode())),
    "objects": Attack("1 MiB of JSON, all empty objects, to a handler that waits", frame(
        TEXT, say("nap", "[" + ",".join(["{}"] * 349_000) + "]").encode()), PLAIN, "stay",
        many=20, quick=20, given=25 * MIB),
    "unread": Attack("echoes that nobody reads", frame(
        TEXT, say("echo", '"%s"' % ("a" * 900)).encode()), PLAIN, reads=False, peers=WEBSOCKETS),
    "large": Attack("answers of 6 MB that nobody reads", request("GET /large HTTP/1.1"),
                    then="stay", reads=False, window=4096, cpu=False, given=6_000_000),
    "pipeline": Attack("requests without an end on one connection", GET, quick=1, peers=HTTP),
    "pipeline-unread": Attack("such requests, and the answers are not read", GET, reads=False,
                              peers=HTTP),
    # What takes long.
    "bombs": Attack("1 MiB of JSON deflated to 2 KB", bomb(500), DEFLATE, quick=1,
                     peers=WEBSOCKETS),
    "bombs-100": Attack("1 MiB of JSON deflated to 10 KB", bomb(100), DEFLATE, quick=1,
                         peers=WEBSOCKETS),
    "bombs-20": Attack("1 MiB of JSON deflated to 50 KB", bomb(20), DEFLATE, quick=1,
                        peers=WEBSOCKETS),
    "nested": Attack("JSON nested 100,000 deep", frame(TEXT, say("echo", nested(100_000)).encode()),
                     PLAIN, quick=0, peers=WEBSOCKETS),
    "nested-less": Attack("JSON nested as deep as it may be decoded, and encoded", lambda n: frame(
        TEXT, say("echo", nested(500 + 97 * n % 10_000)).encode()), PLAIN, quick=1, everywhere=True,
        peers=WEBSOCKETS),
    "nested-post": Attack("such JSON, posted", lambda n: request(
        "POST / HTTP/1.1", IS_JSON, body=nested(500 + 97 * n % 10_000).encode()), quick=1,
        peers=HTTP),
    "numbers": Attack("JSON of integers with 4,300 digits", frame(
        TEXT, say("echo", "[" + ",".join(["9" * 4300] * 200) + "]").encode()), PLAIN, quick=1,
        peers=WEBSOCKETS),
    "work": Attack("messages whose handler computes for 5 ms", frame(TEXT, say("work").encode()),
                   PLAIN, quick=1, cpu=False),
    "form": Attack("1 MiB of %, and a letter that is not ASCII, as a form", request(
        "POST / HTTP/1.1", FORM, body=b"%" * (MIB - 2) + "é".encode()), quick=1, peers=HTTP),
    "form-unasked": Attack("such a form, with GET", request(
        "GET / HTTP/1.1", FORM, body=b"%" * (MIB - 2) + "é".encode()), quick=0),
    "chunks": Attack("a body in chunks of one byte", request(
        "POST / HTTP/1.1", "Transfer-Encoding: chunked") + b"1\r\na\r\n" * 43_000 + b"0\r\n\r\n",
        quick=1, peers=HTTP),
    "tiny-deflated": Attack("empty messages, deflated", deflated(""), DEFLATE, quick=1,
                            peers=WEBSOCKETS),
    "tiny-fragments": Attack("messages in fragments of one byte", frame(TEXT, b"a", fin=False)
                             + frame(CONTINUATION, b"a", fin=False) * 9000
                             + frame(CONTINUATION, b"a"), PLAIN, quick=1, peers=WEBSOCKETS),
    "dialects": Attack("clients that want the same broadcast of 900 KB in 14 ways", b"",
                       lambda n: offers(n) + frame(TEXT, say("subscribe", channel="news").encode()),
                       "stay", many=14, quick=14, cpu=False, together=True),
    # What there is much of.
    "messages": Attack("small valid messages", frame(TEXT, say("echo").encode()), PLAIN, quick=1,
                       peers=WEBSOCKETS),
    "empty": Attack("empty messages", frame(TEXT, b""), PLAIN, quick=0, peers=WEBSOCKETS),
    "unknown": Attack("deflated messages of 20 KB to a channel that is none", deflated(
        say("x", channel="\\u001b[2J\\n" * 1700)), handshake(OFFER, V1), quick=1,
                      settings={"log": "INFO"}),
    "missing": Attack("requests for a page that is not there", request(
        f"GET /{'a' * 99} HTTP/1.1"), quick=1, settings={"log": "INFO"}),
    "pings": Attack("pings", frame(PING, b""), PLAIN, quick=1, peers=WEBSOCKETS),
    "after-close": Attack("frames behind a Close frame", frame(CLOSE, b"\x03\xe8")
                          + frame(PING, b"") * 10_000, PLAIN, reads=False, peers=WEBSOCKETS),
    "subscriptions": Attack("subscriptions that come and go", frame(
        TEXT, say("subscribe").encode()) + frame(TEXT, say("unsubscribe").encode()), PLAIN,
        quick=0),
    "repeated": Attack("requests with 3,900 times the same field", request(
        "GET / HTTP/1.1", *["a:"] * 3900), quick=0),
    "extensions": Attack("handshakes that offer 16 KB of extensions", b"", handshake(
        OFFER + "; a" * 5400), "leave", many=20, quick=0),
    "malformed": Attack("requests that are none", b"GET / HTTP/9.9\r\n\r\n", then="leave", many=20,
                        quick=20, cpu=False),
    "frames-that-fail": Attack("frames that break the protocol", frame(3, b""), PLAIN, "leave",
                               many=20, quick=20, cpu=False),
}
