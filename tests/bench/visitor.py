"""A visitor on bare sockets, for what wrk and curl do not measure. Prints what it has seen as JSON.

python tests/bench/visitor.py requests ADDRESS PORT HOST PATH SECONDS PAUSE    milliseconds of each request
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time

TIMEOUT = 60.0  # seconds to wait for anything


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


if __name__ == "__main__":
    print(json.dumps({"requests": requests}[sys.argv[1]](*sys.argv[2:])))
