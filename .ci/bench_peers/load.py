"""The load generator: raw sockets and epoll, frames masked beforehand, replies counted in bytes.

`load.py '{"work": "echo", "port": 8000, "server_pid": 123, …}'` prints one line of JSON. The first
reply to each client is compared byte for byte: all servers are seen to do the same work. Where
"compiled" names load.c, compiled, that does what is repeated, and compares all the other replies.
"""
import ctypes
import gc
import json
import os
import re
import resource
import select
import socket
import struct
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

Work = Callable[[float], int]  # works until then, and returns how much was done
MASK = b"\x37\xfa\x21\x3d"
TEXT, CLOSE = 1, 8
HANDSHAKE = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1:{0}\r\nOrigin: http://127.0.0.1:{0}\r\n"
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
HTTP_GET = "GET /page HTTP/1.1\r\nHost: 127.0.0.1:{0}\r\nAccept: text/html\r\n\r\n"
GREETING = b"Received: Hello!"
NEWS = "news " * 10
BURST = 1000  # broadcasts of a thread
PAGE = b"<h1>Hello</h1>\n" * 20


def frame(payload: bytes, masked: bool = True, opcode: int = TEXT) -> bytes:
    """One final frame (RFC 6455 section 5.2)."""
    size, bit = len(payload), 0x80 if masked else 0
    if size < 126:
        head = bytes((0x80 | opcode, bit | size))
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, bit | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, bit | 127, size)
    if not masked:
        return head + payload
    key = int.from_bytes((MASK * (size // 4 + 1))[:size], "big")
    return head + MASK + (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")


def message(name: str, payload: str, channel: str = "____") -> bytes:
    return frame(json.dumps({"channel": channel, "message": name, "payload": payload},
                            separators=(",", ":")).encode())


class Job(ctypes.Structure):
    """`struct job` of load.c."""
    _fields_ = [("request", ctypes.c_char_p), ("reply", ctypes.c_char_p),
                ("request_size", ctypes.c_long), ("reply_size", ctypes.c_long),
                ("unchecked", ctypes.c_long), ("count", ctypes.c_long),
                ("until", ctypes.c_double), ("busy", ctypes.c_double), ("since", ctypes.c_double)]


def repeat(step: Callable[[], int]) -> Work:
    def work(until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            count += step()
        return count
    return work


class Load:
    def __init__(self, job: Dict[str, Any]) -> None:
        self.job = job
        self.compiled = (ctypes.CDLL(job["compiled"], use_errno=True) if job.get("compiled")
                        else None)
        self.handshake = HANDSHAKE.format(job["port"]).encode()
        self.poll = select.epoll()
        self.spins, self.busy = 0, 0.0
        self.kept: List[socket.socket] = []

    def dial(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel's own time-out: a stuck server ends the run, and recv stays one system call.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 20, 0))
        sock.connect(("127.0.0.1", self.job["port"]))
        return sock

    def upgrade(self, sock: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(4096) or b"(closed)\r\n\r\n"
        if b" 101 " not in head[:16]:
            raise SystemExit(f"no upgrade: {head!r}")

    def client(self, request: bytes, expected: bytes) -> socket.socket:
        """A connection that was upgraded and has had the expected reply to a request."""
        sock = self.dial()
        sock.sendall(self.handshake)
        self.upgrade(sock)
        sock.sendall(request)
        reply = b""
        while len(reply) < len(expected):
            reply += sock.recv(len(expected) - len(reply)) or b"(closed)" * len(expected)
        if reply != expected:
            raise SystemExit(f"expected {expected[:99]!r}, got {reply[:99]!r}")
        self.kept.append(sock)
        return sock

    def subscriber(self) -> socket.socket:
        channel = self.job.get("channel", "____")
        return self.client(message("subscribe", "", channel),
                           frame(b"Subscription: OK", masked=False))

    def ready(self) -> List[Tuple[int, int]]:
        """The connections that have something. To sleep would make the server pay for waking us."""
        while True:
            found = self.poll.poll(0)
            if found:
                return found
            self.spins += 1

    def native(self, name: str, request: bytes, reply: bytes, *more: int, size: int = 0,
               unchecked: int = 0, count: int = 1) -> Work:
        """A function of load.c; `size` is that of one request, where there are several."""
        job = Job(request, reply, size or len(request), len(reply), unchecked, count)
        function, at = getattr(self.compiled, name), (ctypes.c_long * (1 << 16))()
        function.restype = ctypes.c_long

        def work(until: float) -> int:
            job.until, job.busy, job.since = until, 0, 0
            done: int = function(self.poll.fileno(), at, ctypes.byref(job), *more)
            if done < 0:
                raise SystemExit(["", "the server closed a connection", "not the expected reply",
                                  os.strerror(ctypes.get_errno())][-done])
            self.busy = job.busy
            return done
        return work

    # The works. Each prepares its clients and returns what they do.

    def echo(self) -> Work:
        """Each client sends a message for each reply; `idle` others are just subscribed."""
        job = self.job
        if job.get("raw"):
            payload = b"x" * job["size"] if "size" in job else b"Hello!"
            request, reply = frame(payload), frame(payload, masked=False)
        else:
            request = message("echo", "Hello!", job.get("channel", "____"))
            reply = frame(GREETING, masked=False)
        for _ in range(job.get("idle", 0)):
            self.subscriber()
        return self.pump(lambda: self.client(request, reply), request, reply)

    def http(self) -> Work:
        """Each connection asks for the page again and again."""
        request, reply = HTTP_GET.format(self.job["port"]).encode(), b""
        with self.dial() as sock:
            sock.sendall(request)
            while not reply.endswith(PAGE):
                reply += sock.recv(65536) or b"(closed)" + PAGE
        if not re.match(rb"HTTP/1\.[01] 200 .*\r\n\r\n<h1>", reply, re.S) or b"(closed)" in reply:
            raise SystemExit(f"unexpected answer: {reply[:999]!r}")
        return self.pump(self.dial, request, reply, unchecked=len(reply) - len(PAGE),
                         keep_alive=b"HTTP/1.1" in reply)

    def pump(self, dial: Callable[[], socket.socket], request: bytes, reply: bytes,
             unchecked: int = 0, keep_alive: bool = True) -> Work:
        """`clients` connections, with `window` requests in flight on each."""
        buffer, window = bytearray(1 << 20), self.job.get("window", 1)
        burst, size = memoryview(request * window), len(request)
        connections: Dict[int, Tuple[socket.socket, Any, Any]] = {}
        surplus: Dict[int, int] = {}  # bytes of a reply that has not fully arrived

        def add() -> None:
            sock = dial()
            fd = sock.fileno()
            connections[fd], surplus[fd] = (sock, sock.recv_into, sock.sendall), 0
            self.poll.register(fd, select.EPOLLIN)
            sock.sendall(burst)

        def step() -> int:
            total = 0
            for fd, _ in self.ready():
                sock, receive, send = connections[fd]
                got = receive(buffer)
                if not got:
                    if keep_alive:
                        raise SystemExit("the server closed a connection")
                    self.poll.unregister(fd)
                    sock.close()
                    add()
                count, surplus[fd] = divmod(surplus[fd] + got, len(reply))
                total += count
                if count and keep_alive:
                    send(burst[:count * size])
            return total
        for _ in range(self.job["clients"]):
            add()
        if self.compiled and keep_alive:
            self.kept += [sock for sock, *_ in connections.values()]
            return self.native("pump", bytes(burst), reply, size=size, unchecked=unchecked)
        return repeat(step)

    def fanout(self) -> Work:
        """One subscriber asks for a broadcast, or for BURST of them from a thread; the next round
        begins when all have it.
        """
        thread = self.job.get("thread", False)
        shout = message("burst" if thread else "shout", NEWS, self.job.get("channel", "____"))
        news = frame(NEWS.encode(), masked=False)
        receive = {}
        for _ in range(self.job["clients"]):
            sock = self.subscriber()
            self.poll.register(sock, select.EPOLLIN)
            receive[sock.fileno()] = sock.recv
        count = len(receive) * (BURST if thread else 1)
        if self.compiled:
            return self.native("fanout", shout, news, self.kept[0].fileno(), count=count)

        def step() -> int:
            self.kept[0].sendall(shout)
            missing = count * len(news)
            while missing:
                for fd, _ in self.ready():
                    missing -= len(receive[fd](65536))
            return count
        return repeat(step)

    def connect(self) -> Work:
        """`clients` at a time: connect, upgrade, closing handshake, end of the stream."""
        farewell = frame(struct.pack("!H", 1000), opcode=CLOSE)
        if self.compiled:
            return self.native("churn", self.handshake, farewell, self.job["port"],
                               count=self.job["clients"])

        def step() -> int:
            socks = [self.dial() for _ in range(self.job["clients"])]
            for sock in socks:
                sock.sendall(self.handshake)
            for sock in socks:
                self.upgrade(sock)
                sock.sendall(farewell)
            for sock in socks:
                while sock.recv(4096):
                    pass
                sock.close()
            return len(socks)
        return repeat(step)

    def resume(self) -> Work:
        """`clients` at once: connect, upgrade, subscribe, and get the 100 broadcasts missed."""
        v1 = b"Sec-WebSocket-Protocol: webchannels.v1\r\n\r\n"
        self.handshake = self.handshake[:-2] + v1
        ask = {"channel": "kept", "message": "subscribe", "ref": 1}

        def come(since: str) -> bytes:
            given = {**ask, "since": since} if since else ask
            return self.handshake + frame(json.dumps(given).encode())

        def read(sock: socket.socket, end: bytes) -> bytes:
            data = b""
            while end not in data:
                data += sock.recv(65536) or end + b"(closed)"
            return data
        first = self.dial()
        self.kept.append(first)
        first.sendall(come(""))
        at = read(first, b'.0"').rpartition(b'"at":"')[2].partition(b'"')[0].decode()
        first.sendall(message("shout", NEWS, "kept") * 100)
        read(first, b'"n":100')
        came = self.dial()
        came.sendall(come(at))
        expected = read(came, b'"n":100')
        expected += came.recv(65536) if not expected.endswith(b"}") else b""
        came.close()

        def step() -> int:
            left = {}
            for _ in range(self.job["clients"]):
                sock = self.dial()
                self.poll.register(sock, select.EPOLLIN)
                sock.sendall(come(at))
                left[sock.fileno()] = [len(expected), sock]
            while left:
                for fd, _ in self.ready():
                    got = len(left[fd][1].recv(65536))
                    left[fd][0] -= got
                    if not got:
                        raise SystemExit("the server closed a connection")
                    if left[fd][0] <= 0:
                        left.pop(fd)[1].close()
            return int(self.job["clients"])
        return repeat(step)

    def memory(self) -> Dict[str, float]:
        """Bytes of resident memory for each of `clients` subscribers, beyond the first 1,000."""
        sizes = []
        for count in (1000, self.job["clients"]):
            for _ in range(count):
                self.subscriber()
            time.sleep(0.5)
            with open(f"/proc/{self.job['server_pid']}/statm") as statm:
                sizes.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return {"rate": (sizes[1] - sizes[0]) / self.job["clients"]}

    def run(self) -> Dict[str, float]:
        if self.job["work"] == "memory":
            return self.memory()
        work: Work = getattr(self, self.job["work"])()
        gc.disable()
        idle, start = select.epoll(), time.process_time()
        for _ in range(1000):
            idle.poll(0)
        spin = (time.process_time() - start) / 1000
        for seconds in (self.job["seconds"] * 0.4, self.job["seconds"]):  # the first warms up
            self.spins, used, start = 0, self.cpu_seconds(), time.perf_counter()
            count = work(start + seconds)
        span = time.perf_counter() - start
        load, server, others = ((b - a) / span for a, b in zip(used, self.cpu_seconds()))
        return {"rate": count / span, "server_cpu": server,  # to poll in vain is not to be busy
                "load_cpu": (load * self.busy / span if self.busy else
                             load - min(load, self.spins * spin / span)),
                "foreign_cpu": max(0.0, others - load - server)}

    def cpu_seconds(self) -> Tuple[float, float, float]:
        """Used by this process, by the server, and by all: user, nice, system and stolen time."""
        with open(f"/proc/{self.job['server_pid']}/stat") as stat:
            own = stat.read().rpartition(")")[2].split()
        with open("/proc/stat") as stat:
            machine = [int(field) for field in stat.readline().split()[1:]]
        tick = os.sysconf("SC_CLK_TCK")
        return (time.process_time(), (int(own[11]) + int(own[12])) / tick,
                (sum(machine[:3]) + machine[7]) / tick)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(Load(json.loads(sys.argv[1])).run()))
