"""The Python servers to attack: `servers.py PEER PORT PATH SETTINGS`.

Each serves a page at `/`, reads what is posted there, and answers the message `echo`. They have
their own defaults, but the same limit for a message, and compression. PATH is that of
webchannels.py; SETTINGS are those of its Config in JSON, `log`, a level, and
`certificate`, a file's name.
"""
import asyncio
import importlib.util
import json
import logging
import ssl
import sys
import threading
import time
from typing import Any, Dict

HOST, LIMIT, PAGE = "127.0.0.1", 1 << 20, "<h1>Hello</h1>"


def dispatch(text: Any) -> str:
    """What a program does that its author took care of: bad input is an answer."""
    try:
        data = json.loads(text)
        return json.dumps(data["payload"] if data["message"] == "echo" else "not found")
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        return f"error: {type(error).__name__}"


def webchannels(port: int, path: str, settings: Dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("webchannels", path)
    assert spec and spec.loader
    wc: Any = importlib.util.module_from_spec(spec)
    sys.modules["webchannels"] = wc
    spec.loader.exec_module(wc)
    logging.basicConfig(level=settings.pop("log", "WARNING"))
    certificate, context = settings.pop("certificate", ""), None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    app = wc.WebChannels(wc.Config(**settings))

    def post() -> str:
        app.params("name")  # the form, or the JSON
        return "thanks"

    def page(name: str) -> str:
        try:
            return app.channels_support(name)
        except Exception:  # too long, or too many
            return "There is no such page"

    def work() -> None:
        end = time.perf_counter() + 0.005
        while time.perf_counter() < end:
            pass

    async def nap() -> None:
        await asyncio.sleep(0.5)

    def guard(client: Any, channel: str) -> None:
        app.subscribe(client, channel)

    def tell() -> None:
        news = str([number * number % 99991 for number in range(128_000)])  # about 900 KB
        while True:
            time.sleep(0.5)
            if app.connected_clients("news"):
                app.broadcast("news", news)

    app.route("/", lambda: PAGE)
    app.route("/", post, method="POST")
    app.route("/large", lambda: b"x" * 6_000_000)
    app.route("/page/:name", page)
    for path, handler in (("/____/echo", lambda payload: payload), ("/____/work", work),
                          ("/____/nap", nap), ("/:room/subscribe", guard)):
        app.channel(path, handler)
    app.channels_support("____")
    threading.Thread(target=tell, daemon=True).start()
    threading.stack_size(512 * 1024)  # the smallest that is promised to do, and less than musl's
    app.up(port, HOST, block=True, ssl=context)


async def websockets(port: int) -> None:
    import websockets.exceptions
    from websockets.asyncio import server

    def page(client: Any, request: Any) -> Any:
        return None if "Upgrade" in request.headers else client.respond(200, PAGE)

    async def handle(client: Any) -> None:
        try:
            async for text in client:
                await client.send(dispatch(text))
        except websockets.exceptions.ConnectionClosed:
            pass

    await server.serve(handle, HOST, port, process_request=page, max_size=LIMIT)
    await asyncio.Event().wait()


async def aiohttp(port: int) -> None:
    from aiohttp import WSMsgType, web

    async def answer(request: Any) -> Any:
        if "Upgrade" not in request.headers:
            return web.Response(text=PAGE, content_type="text/html")
        client = web.WebSocketResponse(max_msg_size=LIMIT)
        await client.prepare(request)
        async for message in client:
            if message.type is WSMsgType.TEXT:
                await client.send_str(dispatch(message.data))
        return client

    async def post(request: Any) -> Any:
        try:
            await (request.json() if "json" in request.content_type else request.post())
        except (RecursionError, ValueError):
            return web.Response(status=400)
        return web.Response(text="thanks")

    app = web.Application(client_max_size=LIMIT + 1)
    app.add_routes([web.get("/", answer), web.post("/", post)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    peer, port = sys.argv[1], int(sys.argv[2])
    if peer == "webchannels":
        webchannels(port, sys.argv[3], json.loads(sys.argv[4]))
    else:
        asyncio.run(globals()[peer](port))
