"""The Python servers to measure: `servers.py PEER PORT MODE PATH CHANNELS`.

MODE `json`: parse {"channel", "message", "payload"}, look the handler up, send what it returns.
MODE `raw`: echo. Both without compression and access log, and with limits raised; and one page.
PATH is that of webchannels.py; CHANNELS is a number of further channels to register there.
"""
import asyncio
import base64
import hashlib
import importlib.util
import json
import sys
import threading
from typing import Any, Callable, List, Optional, Set

from load import BURST, CLOSE, GREETING, PAGE, frame

HOST, LIMIT = "127.0.0.1", 16 << 20
everyone: Set[Any] = set()
broadcast: Callable[[str], Any]  # each peer has its own


def subscribe(client: Any, payload: Any) -> str:
    everyone.add(client)
    return "Subscription: OK"


def echo(client: Any, payload: Any) -> str:
    return f"Received: {payload}"


def shout(client: Any, payload: Any) -> None:
    broadcast(payload)


def burst(client: Any, payload: Any) -> None:
    """Broadcasts from a thread that is not the loop's."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        for _ in range(BURST):
            loop.call_soon_threadsafe(broadcast, payload)
    threading.Thread(target=run).start()


HANDLERS = {("____", handler.__name__): handler for handler in (subscribe, echo, shout, burst)}


def dispatch(client: Any, text: Any) -> Optional[str]:
    data = json.loads(text)
    return HANDLERS[data["channel"], data["message"]](client, data.get("payload"))


async def webchannels(port: int, path: str, channels: int) -> None:
    spec = importlib.util.spec_from_file_location("webchannels", path)
    assert spec and spec.loader
    wc: Any = importlib.util.module_from_spec(spec)
    sys.modules["webchannels"] = wc
    spec.loader.exec_module(wc)
    wc.config.max_message_size = wc.config.max_send_buffer = LIMIT
    wc.route("/page", PAGE.decode)

    def echo() -> str:
        return f"Received: {wc.params('payload')}"

    def shout() -> None:
        wc.broadcast(wc.params("channel"), wc.params("payload"))

    def burst() -> None:
        for _ in range(BURST):
            wc.broadcast("____", wc.params("payload"))

    def raw(payload: Any) -> Any:
        return payload

    wc.channel("/____/burst", burst, threaded=True)
    for path, handler in (("/____/echo", echo), ("/____/shout", shout), ("/", raw)):
        wc.channel(path, handler)
    for number in range(channels):
        wc.channel(f"/room{number}/echo", echo)
    if hasattr(wc, "keep"):  # older ones are measured, too
        wc.keep("kept", 100)
        wc.channels_support("kept")
        wc.channel("/kept/shout", shout)
    await wc.serve(port=port)


async def websockets(port: int, raw: bool) -> None:
    import websockets.exceptions
    from websockets.asyncio import server

    async def handle(client: Any) -> None:
        try:
            async for text in client:
                reply = text if raw else dispatch(client, text)
                if reply is not None:
                    await client.send(reply)
        except websockets.exceptions.ConnectionClosed:
            pass
        finally:
            everyone.discard(client)

    global broadcast
    broadcast = lambda text: server.broadcast(everyone, text)  # noqa: E731
    await server.serve(handle, HOST, port, compression=None, max_size=LIMIT, ping_interval=None)


async def aiohttp(port: int, raw: bool) -> None:
    from aiohttp import WSMsgType, web

    async def page(request: Any) -> Any:
        return web.Response(text=PAGE.decode(), content_type="text/html")

    async def socket(request: Any) -> Any:
        client = web.WebSocketResponse(compress=False, max_msg_size=LIMIT)
        await client.prepare(request)
        try:
            async for message in client:
                if message.type is WSMsgType.TEXT:
                    reply = message.data if raw else dispatch(client, message.data)
                    if reply is not None:
                        await client.send_str(reply)
        finally:
            everyone.discard(client)
        return client

    async def send_all(text: str) -> None:
        payload = text.encode()
        for client in list(everyone):
            await client.send_frame(payload, WSMsgType.TEXT)

    global broadcast
    broadcast = lambda text: asyncio.ensure_future(send_all(text))  # noqa: E731
    app = web.Application()
    app.add_routes([web.get("/page", page), web.get("/", socket)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port, backlog=1024).start()


async def tornado(port: int, raw: bool) -> None:
    import tornado.web
    import tornado.websocket

    class Socket(tornado.websocket.WebSocketHandler):  # type: ignore[misc]
        def open(self) -> None:
            self.set_nodelay(True)  # as the others do unasked

        def on_message(self, text: Any) -> None:
            reply = text if raw else dispatch(self, text)
            if reply is not None:
                self.write_message(reply)

        def on_close(self) -> None:
            everyone.discard(self)

    def shout(text: str) -> None:
        for client in everyone:
            client.write_message(text)

    global broadcast
    broadcast = shout
    tornado.web.Application(
        [("/", Socket)], log_function=lambda handler: None, websocket_max_message_size=LIMIT,
    ).listen(port, HOST, backlog=1024)


async def picows(port: int, raw: bool) -> None:
    from picows import WSListener, WSMsgType, ws_create_server
    text_type, close_type = WSMsgType.TEXT, WSMsgType.CLOSE

    class Listener(WSListener):  # type: ignore[misc]
        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            if frame.msg_type == text_type and raw:
                transport.send(text_type, frame.get_payload_as_bytes())
            elif frame.msg_type == text_type:
                reply = dispatch(transport, frame.get_payload_as_utf8_text())
                if reply is not None:
                    transport.send(text_type, reply.encode())
            elif frame.msg_type == close_type:
                transport.send_close(frame.get_close_code(), frame.get_close_message())
                transport.disconnect()

        def on_ws_disconnected(self, transport: Any) -> None:
            everyone.discard(transport)

    def shout(text: str) -> None:
        payload = text.encode()
        for client in everyone:
            client.send(text_type, payload)

    global broadcast
    broadcast = shout
    await ws_create_server(lambda request: Listener(), HOST, port, max_frame_size=LIMIT,
                           backlog=1024)


class Ceiling(asyncio.Protocol):
    """The least that any asyncio server must do: understands one message, then answers unseen."""
    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer, self.upgraded = transport, b"", False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.upgraded:
            self.message()
        elif b"\r\n\r\n" in self.buffer:
            head, self.buffer = self.buffer, b""
            key = head.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
            if key:
                self.upgraded = True
                digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
                self.transport.write(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade"
                    b"\r\nSec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n")
            else:
                self.can([self.transport], len(head), b"HTTP/1.1 200 OK\r\nContent-Length: %d"
                         b"\r\n\r\n%b" % (len(PAGE), PAGE))

    def message(self) -> None:
        data, bits = self.buffer, self.buffer[1] & 127
        start = {126: 8, 127: 14}.get(bits, 6)  # RFC 6455 section 5.2
        size = int.from_bytes(data[2:start - 4], "big") if start > 6 else bits
        if len(data) < start + size:
            return
        self.buffer = b""
        key = int.from_bytes((data[start - 4:start] * (size // 4 + 1))[:size], "big")
        payload = (int.from_bytes(data[start:], "big") ^ key).to_bytes(size, "big")
        if data[0] & 15 == CLOSE:
            self.transport.write(frame(payload, masked=False, opcode=CLOSE))
            self.transport.close()
        elif b'"subscribe"' in payload:
            everyone.add(self.transport)
            self.transport.write(frame(b"Subscription: OK", masked=False))
        elif b'"shout"' in payload:
            answer = json.loads(payload)["payload"].encode()
            self.can(list(everyone), len(data), frame(answer, masked=False))
        else:
            answer = GREETING if payload.startswith(b"{") else payload
            self.can([self.transport], len(data), frame(answer, masked=False))

    def can(self, transports: List[Any], size: int, answer: bytes) -> None:
        canned = Canned([transport.write for transport in transports], size, answer)
        self.transport.set_protocol(canned)
        canned.data_received(bytes(size))


class Canned(asyncio.Protocol):
    def __init__(self, writes: List[Any], size: int, answer: bytes) -> None:
        self.writes, self.size, self.answer, self.rest = writes, size, answer, 0

    def data_received(self, data: bytes) -> None:
        count, self.rest = divmod(self.rest + len(data), self.size)
        if count:
            answer = self.answer * count
            for write in self.writes:
                write(answer)


async def ceiling(port: int, raw: bool) -> None:
    await asyncio.get_running_loop().create_server(Ceiling, HOST, port, backlog=1024)


def bottle(port: int) -> None:
    import wsgiref.simple_server

    import bottle

    class Server(wsgiref.simple_server.WSGIServer):
        request_queue_size = 1024  # with its default of 5, connections would have to be retried

    bottle.route("/page")(PAGE.decode)
    bottle.run(server="wsgiref", host=HOST, port=port, quiet=True, server_class=Server)


async def main(peer: str, port: str, mode: str, path: str, channels: str) -> None:
    if peer == "webchannels":
        await webchannels(int(port), path, int(channels))
    else:
        await globals()[peer](int(port), mode == "raw")
        await asyncio.Event().wait()


if __name__ == "__main__":
    peer, _, loop = sys.argv[1].partition("+")
    if peer == "bottle":
        bottle(int(sys.argv[2]))
    elif loop == "uvloop":
        import uvloop
        uvloop.run(main(peer, *sys.argv[2:]))
    else:
        asyncio.run(main(peer, *sys.argv[2:]))
