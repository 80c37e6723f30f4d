"""The part of the origin that nginx cannot play: uploads, events and WebSockets, as lean as Python can be.

    python tests/bench/origin.py ADDRESS PORT

/empty answers at once; PUT /upload answers when the content is in, /received tells how much of that has come; /events
sends an event every 5 ms, which holds the time; /quiet is an event stream on which nothing happens; /ws sends back
each frame of MESSAGE bytes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import sys
import time
from typing import cast

MESSAGE = 32  # bytes in a WebSocket message
CLIENT_FRAME = 2 + 4 + MESSAGE  # bytes; the mask is zero, so that nobody has to compute
SERVER_HEAD = bytes([0x82, MESSAGE])
EVERY = 0.005  # seconds between two events
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class App(asyncio.BufferedProtocol):
    """One connection. What comes is read into one buffer, which heads and frames never fill."""

    received = 0  # bytes of uploads, of all connections

    def __init__(self) -> None:
        self._buffer = bytearray(1024 * 1024)
        self._kept = 0  # bytes at the buffer's start that are no whole head or frame yet
        self._content = 0  # bytes of an upload still to come
        self._websocket = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._kept :]

    def buffer_updated(self, n: int) -> None:
        if self._content:
            self._take(n)
        elif self._websocket:
            self._echo(self._kept + n)
        else:
            self._request(self._kept + n)

    def _take(self, n: int) -> None:
        App.received += n
        self._content -= n
        if not self._content:
            self._transport.write(HEAD)

    def _echo(self, size: int) -> None:
        whole = size - size % CLIENT_FRAME
        content = (self._buffer[i + 6 : i + CLIENT_FRAME] for i in range(0, whole, CLIENT_FRAME))
        if whole:
            self._transport.write(SERVER_HEAD + SERVER_HEAD.join(content))
        self._buffer[: size - whole] = self._buffer[whole:size]
        self._kept = size - whole

    def _request(self, size: int) -> None:
        end = self._buffer.find(b"\r\n\r\n", 0, size)
        self._kept = size if end < 0 else 0
        if end < 0:
            return
        head = bytes(self._buffer[:end])
        if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
            self._content = int(length[1])
            self._take(size - end - 4)
        elif b" /events " in head or b" /quiet " in head:
            self._transport.write(EVENTS)
            self._event(repeat=b" /events " in head)
        elif key := re.search(rb"(?i)\r\nsec-websocket-key: *(\S+)", head):
            accept = base64.b64encode(hashlib.sha1(key[1] + _GUID).digest())
            fields = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept
            self._transport.write(b"HTTP/1.1 101 Switching Protocols\r\n" + fields + b"\r\n\r\n")
            self._websocket = True
        elif b" /received " in head:
            number = b"%d" % App.received
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(number), number))
        else:
            self._transport.write(HEAD)

    def _event(self, repeat: bool) -> None:
        event = b"data: %d\n\n" % time.monotonic_ns()
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if repeat:
            self._timer = asyncio.get_running_loop().call_later(EVERY, self._event, True)


async def serve(address: str, port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(App, address, port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2])))
