"""The clients of .ci/attack: the attacker, and the bystander whose patience is measured."""
from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Any

from attacks import GET, MIB, PLAIN, TEXT, Attack, frame, say

STOP = 1024 * MIB  # an attack ends when it has made the server so much larger
LOST = 30.0  # seconds: so long counts a visit that was in vain


def bystand(port: int, pipe: Any) -> None:
    """Ask for the page on a new connection, and for an echo on one that lasts, and time both, each
    time from one message of the pipe to the next."""
    ask = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    def dial() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=LOST)

    def page() -> bytes:
        got = b""
        with dial() as sock:
            sock.sendall(ask)
            while more := sock.recv(65536):
                got += more
        return got

    def echo() -> bytes:
        client.sendall(frame(TEXT, say("echo").encode()))
        return client.recv(65536)

    with contextlib.suppress(EOFError, OSError), dial() as client:
        client.sendall(PLAIN)
        client.recv(65536)
        while pipe.recv():
            waits: dict[str, list[float]] = {"page": [], "echo": []}
            while not pipe.poll(0.005):
                for name, visit in ("page", page), ("echo", echo):
                    begun, got = time.perf_counter(), b""
                    with contextlib.suppress(OSError):
                        got = visit()
                    answered = b"Hello" in got if name == "page" else b"x" in got
                    waits[name].append(time.perf_counter() - begun if answered else LOST)
            pipe.recv()
            pipe.send(waits)


class Load:
    """The attacker: so many connections, and what they send."""

    def __init__(self, attack: Attack, server: Any, count: int, rate: float) -> None:
        self.attack, self.server, self.count, self.rate = attack, server, count, rate
        self.sent = self.connections = self.open = self.number = 0
        self.due = time.monotonic()

    async def run(self, seconds: float) -> None:
        """Attack for so long, or until the server has grown too large."""
        self.loop = asyncio.get_running_loop()
        base, end = self.server.memory(), time.monotonic() + seconds
        tasks = [asyncio.ensure_future(self.connection(n)) for n in range(self.count)]
        while time.monotonic() < end and self.server.memory() - base < STOP \
                and self.server.process.poll() is None:
            await asyncio.sleep(0.02)
        while self.attack.begun and self.open and time.monotonic() < end + 2:
            await asyncio.sleep(0.02)  # the last began late
        self.received = max(0, self.sent - self.server.queued())
        self.still_open = self.open
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def write(self, sock: socket.socket, data: bytes) -> None:
        """Send, not faster than all connections together may."""
        for at in range(0, len(data), 65536):
            part = data[at:at + 65536]
            if self.rate:
                self.due = max(self.due, time.monotonic()) + len(part) / self.rate
                await asyncio.sleep(self.due - len(part) / self.rate - time.monotonic())
            while part:
                try:
                    size = sock.send(part)
                except BlockingIOError:
                    await self.room(sock)
                else:
                    self.sent += size
                    part = part[size:]
                await asyncio.sleep(0)  # the others

    async def room(self, sock: socket.socket) -> None:
        there = asyncio.Event()
        self.loop.add_writer(sock, there.set)
        try:
            await there.wait()
        finally:
            self.loop.remove_writer(sock)

    async def drain(self, sock: socket.socket) -> None:
        """Read until the server ends the connection."""
        with contextlib.suppress(OSError):
            while await self.loop.sock_recv(sock, 1 << 18):
                pass

    async def connection(self, number: int) -> None:
        """One after the other."""
        while True:
            with socket.socket() as sock, contextlib.suppress(OSError):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.attack.window:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.attack.window)
                await self.loop.sock_connect(sock, ("127.0.0.1", self.server.port))
                self.connections += 1
                self.open += 1
                try:
                    await self.converse(sock, number)
                finally:
                    self.open -= 1
            if self.attack.begun:
                return
            await asyncio.sleep(0)

    async def converse(self, sock: socket.socket, number: int) -> None:
        attack = self.attack
        first = attack.first(number) if callable(attack.first) else attack.first
        if first:
            await self.write(sock, first)
            head = b""
            while b"\r\n\r\n" not in head:
                more = await self.loop.sock_recv(sock, 65536)
                if not more:
                    return
                head += more
        reading = asyncio.ensure_future(self.drain(sock)) if attack.reads else None
        try:
            while not (reading and reading.done()):
                self.number += 1
                data = attack.send(self.number) if callable(attack.send) else attack.send
                if attack.then == "again" and not callable(attack.send):
                    data *= max(1, (1000 if self.rate else 65536) // len(data))
                await self.write(sock, data)
                if attack.then == "leave":
                    sock.shutdown(socket.SHUT_WR)
                    if reading:
                        await asyncio.wait([reading], timeout=1)
                    return
                if attack.then == "stay":
                    await (reading or asyncio.sleep(3600))
        finally:
            if reading:
                reading.cancel()
