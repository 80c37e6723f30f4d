"""A visitor on bare sockets, for what wrk and curl do not measure. Prints what it has seen as JSON.

python tests/bench/visitor.py requests ADDRESS PORT HOST PATH SECONDS PAUSE    milliseconds of each request
    python tests/bench/visitor.py events ADDRESS PORT HOST SECONDS                 milliseconds of each event
    python tests/bench/visitor.py websockets ADDRESS PORT HOST SECONDS CONNECTIONS IN_FLIGHT
                                                                                   messages there and back a second
    python tests/bench/visitor.py hold ADDRESS PORT HOST PATH COUNT                requests whose answers nobody reads
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time

from origin import CLIENT_FRAME, MESSAGE, SERVER_HEAD

TIMEOUT = 60.0  # seconds to wait for anything
RECEIVE = 64 * 1024  # bytes that the kernel may keep for a visitor who does not read


def connect(address: str, port: str) -> socket.socket:
    """A connection to a contender."""
    sock = socket.create_connection((address, int(port)), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """An answer's head, and what came after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise SystemExit(f"error: the connection ended after {data!r}")
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def requests(address: str, port: str, host: str, path: str, seconds: str, pause: str) -> list[float]:
    """Send one request after another for so many seconds, with a pause before each."""
    message = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    found = []
    with connect(address, port) as sock:
        deadline = time.monotonic() + float(seconds)
        while time.monotonic() < deadline:
            time.sleep(float(pause))
            began = time.monotonic()
            sock.sendall(message)
            head, body = read_head(sock)
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            if length is None or b" 200 " not in head:
                raise SystemExit(f"error: an answer without a length: {head!r}")
            missing = int(length[1]) - len(body)
            while missing:
                missing -= len(sock.recv(missing)) or sys.exit("error: the connection ended in an answer")
            found.append((time.monotonic() - began) * 1e3)
    return found


def events(address: str, port: str, host: str, seconds: str) -> list[float]:
    """Read an event stream for so many seconds: how long each event took from the local service's write."""
    found: list[float] = []
    with connect(address, port) as sock:
        sock.sendall(f"GET /events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        rest = read_head(sock)[1]
        deadline = time.monotonic() + float(seconds)
        while (now := time.monotonic()) < deadline:
            rest += sock.recv(65536) or sys.exit("error: the connection ended in an event stream")
            now = time.monotonic_ns()
            *whole, rest = rest.split(b"\n\n")
            found += [(now - int(event.rpartition(b" ")[2])) / 1e6 for event in whole]
    return found


def websockets(address: str, port: str, host: str, seconds: str, connections: str, in_flight: str) -> float:
    """Keep so many messages under way on each connection, and count those that come back."""
    message = bytes([0x82, 0x80 | MESSAGE, 0, 0, 0, 0]) + b"x" * MESSAGE
    answer = len(SERVER_HEAD) + MESSAGE
    assert len(message) == CLIENT_FRAME
    fields = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    upgrade = f"GET /ws HTTP/1.1\r\nHost: {host}\r\n{fields}\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    selector = selectors.DefaultSelector()
    for _ in range(int(connections)):
        sock = connect(address, port)
        sock.sendall(upgrade.encode())
        head = read_head(sock)[0]
        if b" 101 " not in head:
            raise SystemExit(f"error: no WebSocket: {head!r}")
        selector.register(sock, selectors.EVENT_READ, [0])  # bytes of a message that has not come whole
        sock.sendall(message * int(in_flight))
    done, began = 0, time.monotonic()
    while (elapsed := time.monotonic() - began) < float(seconds):
        for key, _ in selector.select(TIMEOUT):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            size = key.data[0] + len(sock.recv(65536) or sys.exit("error: a WebSocket ended"))
            whole, key.data[0] = divmod(size, answer)
            done += whole
            if whole:
                sock.sendall(message * whole)
    return done / elapsed


def hold(address: str, port: str, host: str, path: str, count: str) -> str:
    """Wait for the answer's head on each of so many connections, print a line, and read nothing until stdin ends."""
    held = []
    for _ in range(int(count)):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE)
        sock.settimeout(TIMEOUT)
        sock.connect((address, int(port)))
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        held.append(sock)
    for sock in held:
        while b"\r\n\r\n" not in sock.recv(1024, socket.MSG_PEEK):
            pass
    print("held", flush=True)
    sys.stdin.read()
    return "let go"


if __name__ == "__main__":
    what = {"requests": requests, "events": events, "websockets": websockets, "hold": hold}
    print(json.dumps(what[sys.argv[1]](*sys.argv[2:])))
