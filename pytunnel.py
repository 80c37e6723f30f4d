# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.1,<4", "zstandard>=0.23", "platformdirs>=4"]
# ///
"""A personal tunnel: gives a service on this machine a public URL.

    visitor ──HTTP──▶ server (pytunnel serve) ◀══ one WebSocket ══ client (pytunnel connect) ──HTTP──▶ local service
                      web.t.example.com            the link         your laptop                        localhost:3000

The client dials out, so nothing has to be opened at home. Everything between server and client travels in
binary frames over one WebSocket at a time; when that connection is lost, the next one goes on where it stopped.

Words
-----
visitor        whoever calls the public URL: a browser, a webhook sender, curl
server         `pytunnel serve`, on a host that visitors can reach
client         `pytunnel connect`, on the machine of the person who shares something
local service  what the client forwards to
tunnel         a name on the server (`web` in `web.t.example.com`) that belongs to a token
session        the conversation of one client process with the server; it outlives its links
link           one WebSocket connection; a session uses one link after another
stream         one exchange's bytes in a session, both directions, with its own windows
exchange       one request and its response
public URL     what a visitor opens

Wire format, version 1
----------------------
A link is a WebSocket at `GET /_pytunnel/link`, subprotocol `pytunnel.1`. The handshake is four JSON text messages
(hello, challenge, proof, ready or refused; see Handshake). Then every message is binary: one or more whole frames.

    +----------------+---------+----------+---------------+----------------------+
    |  length (24)   | type (8)| flags (8)| stream id (32)|  payload (length)    |
    +----------------+---------+----------+---------------+----------------------+

    type        payload                                flags               counted
    0 DATA      a chunk, at most 256 KiB               END                 yes
    1 HEAD      status, reason, name, value, ...       END, INTERIM        yes
    2 OPEN      tunnel index (16 bits), kind (8 bits), END                 yes
                method, target, name, value, ...
    3 RESET     code (16 bits), reason                                     yes
    6 PING      8 opaque bytes, link-level                                 no
    7 GOAWAY    code (16 bits), reason: no new streams                     yes
    8 WINDOW    credit in bytes (32 bits)                                  yes
    9 ACK       count of counted frames received (64 bits), link-level     no
    10 PONG     the PING's 8 bytes, link-level                             no
    128..255    reserved for extensions: ignored                           no

Heads are byte strings joined by NUL. Only the server opens streams; ids grow and are never reused. Both sides count
the counted frames. A new link states in its handshake how many each side has received, and what is missing is sent
again: no frame is lost and none is delivered twice.

Sections, in order; each uses only what stands above it, and those before State do no I/O
----------------------------------------------------------------------------------------
Imports and version
Limits and defaults
Safe text
Errors
Frames
Flow control
Session
HTTP/1.1 messages
Handshake
Exchanges
State
Link
Registry
Visitors
Server
Local service
Forwarding
Client
Demo
Settings
Command line
"""

# ---- Imports and version --------------------------------------------------------------------------------------------
# The standard library only: aiohttp takes a quarter of a second to import, so the functions that need it import it
# themselves, and `--help` is there at once. The check for Python 3.8 to 3.10 stands before what those cannot run.

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("error: pytunnel needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try python3.11")

import argparse
import asyncio
import base64
import collections
import contextlib
import email.utils
import enum
import hashlib
import hmac
import html
import http
import ipaddress
import itertools
import json
import logging
import os
import platform
import queue
import random
import re
import secrets
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

    WebSocket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse

__version__ = "0.1.0"
__all__ = ["Session", "TunnelClient", "TunnelServer", "main"]

log = logging.getLogger("pytunnel")

# ---- Limits and defaults --------------------------------------------------------------------------------------------
# Every number that a peer or a visitor could push is bounded here, once, with its unit and its reason.
# A session's worst case on either side is MAX_STREAMS x INITIAL_WINDOW of unread bodies (128 MiB), MAX_INTERIM + 1
# heads of each of these streams, and MAX_UNACKED of frames kept for resume; it takes that many stopped readers.

KiB = 1024
MiB = 1024 * KiB

MAX_DATA = 256 * KiB  # bytes of a DATA frame; one read of asyncio's transports, so a fast link moves whole reads
MAX_HEAD = 64 * KiB  # bytes of a head; HAProxy allows 16 KiB, nginx 32 KiB, real cookies need more than 8
MAX_FIELDS = 128  # header fields of one head (HAProxy 101, aiohttp 128)
MAX_CONTROL = 1 * KiB  # bytes of a RESET's or GOAWAY's payload
MAX_MESSAGE = 1 * MiB  # bytes of one WebSocket message: a batch and the frame that reached over its limit
MAX_BATCH = 256 * KiB  # bytes that one message collects before it goes out
TURN = 64 * KiB  # bytes a stream sends before the next one has its turn
INITIAL_WINDOW = 256 * KiB  # bytes of credit for a new stream (yamux uses the same)
MAX_WINDOW = 2**31 - 1  # bytes of credit a peer may ever add up to (RFC 9113 section 6.9.1)
SEND_BUFFER = 64 * KiB  # bytes a stream may queue before its writer waits
MAX_UNACKED = 8 * MiB  # bytes kept for resume; at this bound no more DATA is taken
MAX_UNACKED_FRAMES = 65536  # frames kept for resume; a peer that reads but never acknowledges is cut here
ACK_BYTES = 256 * KiB  # bytes received before an acknowledgement is sent at once
ACK_DELAY = 0.1  # seconds an acknowledgement may wait for company
MAX_STREAMS = 512  # streams of one session at a time
MAX_STREAM_ID = 2**31 - 1  # RFC 9113 section 5.1.1; a session that used it up is replaced by a fresh one
MAX_INTERIM = 10  # 1xx responses before a final one
MAX_PENDING_PONGS = 16  # PINGs not yet answered; more is a flood

PING_INTERVAL = 15.0  # seconds of silence before a PING: below nginx's 60 s and Cloudflare's 100 s
PING_TIMEOUT = 10.0  # seconds to answer; a dead link is noticed within the sum of both
WRITE_TIMEOUT = 10.0  # seconds one message may wait for room in the transport before the link counts as lost
HANDSHAKE_TIMEOUT = 10.0  # seconds for the whole handshake
MAX_HANDSHAKES = 128  # links at a time that have not shown their token yet
MAX_HELLO = 16 * KiB  # bytes of a handshake message
MAX_TUNNELS = 64  # tunnels of one session
MAX_NAMES = 100  # names one token may own on a server; those unused the longest make room for new ones
MAX_ZONES = 16  # hosts under which clients have dialled this server; each serves tunnels below it
MAX_ITERATIONS = 100_000  # PBKDF2 rounds a server may ask a client for
ITERATIONS = 4096  # PBKDF2 rounds, the least RFC 7677 allows: our tokens are random, not memorable

GRACE = 120.0  # seconds a session outlives its link: a sleep in the train tunnel, not one over lunch
HOLD = 30.0  # seconds a request waits for a client that is away
MAX_HELD = 128  # requests that wait for one tunnel's client at a time
DRAIN = 30.0  # seconds the server lets running exchanges finish after SIGTERM
GOODBYE = 5.0  # seconds the client lets them finish after SIGINT or SIGTERM
LINGER = 10.0  # seconds an upload may go on after an error response (nginx lingering_time is 30)
MAX_DISCARD = 16 * MiB  # bytes of it that are read and thrown away, so that the visitor gets to see the response

DIAL_TIMEOUT = 10.0  # seconds for one dial with its handshake; the first one may take no longer, retries included
BACKOFF_MIN = 0.2  # seconds; doubled to the maximum, with jitter
BACKOFF_MAX = 30.0
STABLE = 2.0  # seconds a link must hold before its loss is answered by a dial at once
CLOCK_JUMP = 5.0  # seconds between the wall and the monotonic clock that mean this machine has slept

MAX_LINES = 1000  # lines of output that wait for a slow reader

LOCAL_CONNECT_TIMEOUT = 5.0  # seconds to connect to the local service
LOCAL_IDLE = 4.0  # seconds an idle local connection is kept: Node.js closes its own after 5
MAX_LOCAL_IDLE = 64  # idle local connections kept per target
READ_BUFFER = 128 * KiB  # bytes a local connection reads ahead of its stream
VISITOR_KEEPALIVE = 75.0  # seconds an idle visitor connection is kept (nginx keepalive_timeout)
MAX_FIELD = 16 * KiB  # bytes of one visitor header field, and of the request line (HAProxy's 16 KiB)

DEFAULT_PORT = 8080
DEFAULT_PORTS = {"http": 80, "https": 443}  # of URLs that name none
LINK_PATH = "/_pytunnel/link"
SUBPROTOCOL = "pytunnel.1"
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
RESERVED_NAMES = frozenset({"www", "mail", "localhost", "pytunnel"})  # names a visitor would take for the host itself

# ---- Safe text ------------------------------------------------------------------------------------------------------
# Text from the network may hold terminal escapes or direction marks; nothing of it reaches a terminal or log as it is.


def escape(text: str | bytes, limit: int = 200) -> str:
    """Return `text` fit for one line of a terminal or log: unprintable characters as escapes, at most `limit` long."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if not (text.isascii() and text.isprintable()):
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object from a peer or a file. Raises ValueError, whatever else is wrong with the text."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


# ---- Errors ---------------------------------------------------------------------------------------------------------
# What can go wrong on purpose; anything else that is raised is a bug.
#
#     TunnelError               one line for the user, with an exit status
#     ├── UsageError            the command line or the environment is wrong
#     ├── Unreachable           the server cannot be reached
#     └── Refused               the server said no in the handshake
#     ProtocolError             the peer broke the wire protocol; the session ends
#     MessageError              an HTTP message breaks RFC 9110 or 9112
#     StreamReset               one stream ended early; the others go on
#     Unserved                  a visitor gets one of PROBLEMS for an answer


class ExitStatus(enum.IntEnum):
    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    TOKEN_REFUSED = 3
    NAME_REFUSED = 4
    UNREACHABLE = 5
    LOCAL_DOWN = 6
    INTERRUPTED = 130


class ErrorCode(enum.IntEnum):
    """Why a stream or a session ended; the first ones are HTTP/2's numbers (RFC 9113 section 7)."""

    NO_ERROR = 0
    PROTOCOL = 1
    INTERNAL = 2
    FLOW_CONTROL = 3
    STREAM_CLOSED = 5
    FRAME_SIZE = 6
    REFUSED = 7
    CANCEL = 8
    LOCAL_REFUSED = 16
    LOCAL_RESET = 17
    LOCAL_TIMEOUT = 18
    LOCAL_INVALID = 19
    LINK_LOST = 20
    REPLACED = 32
    SHUTDOWN = 33

    @classmethod
    def _missing_(cls, value: object) -> ErrorCode:
        return cls.INTERNAL  # a newer peer's code


class TunnelError(Exception):
    """What a command ends with; `str()` is one line for the user that says what to do next."""

    exit_status = ExitStatus.UNEXPECTED
    code = "error"


class UsageError(TunnelError):
    exit_status = ExitStatus.USAGE
    code = "usage"


class Unreachable(TunnelError):
    exit_status = ExitStatus.UNREACHABLE
    code = "unreachable"


class Refused(TunnelError):
    """The server refused the handshake with `code`; `retry` tells whether trying again makes sense."""

    def __init__(self, code: str, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.code, self.retry = code, retry
        if code == "token":
            self.exit_status = ExitStatus.TOKEN_REFUSED
        elif code in ("name", "replaced"):
            self.exit_status = ExitStatus.NAME_REFUSED


class ProtocolError(Exception):
    """The peer sent what the wire protocol does not allow. The only exception that bytes from a peer can cause."""

    def __init__(self, reason: str, code: ErrorCode = ErrorCode.PROTOCOL) -> None:
        super().__init__(reason)
        self.code = code


class MessageError(Exception):
    """An HTTP message is not what RFC 9110 and 9112 allow; `status` is what a visitor deserves for sending it."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class StreamReset(Exception):
    """A stream ended before its end, by either side."""

    def __init__(self, code: ErrorCode, reason: str = "") -> None:
        super().__init__(f"{code.name}: {reason}" if reason else code.name)
        self.code, self.reason = code, reason


class Unserved(Exception):
    """A visitor's request that cannot be served; `str()` is a key of PROBLEMS."""


# ---- Frames ---------------------------------------------------------------------------------------------------------
# bytes <-> Frame. Everything that can be judged by looking at one frame alone is judged here, and a length is refused
# when its header arrives, not after it has been buffered. Knows nothing of streams.


class FrameType(enum.IntEnum):
    DATA = 0
    HEAD = 1
    OPEN = 2
    RESET = 3
    PING = 6
    GOAWAY = 7
    WINDOW = 8
    ACK = 9
    PONG = 10


END = 0x1  # DATA, HEAD, OPEN: the sender's last frame on this stream
INTERIM = 0x2  # HEAD: a 1xx response, another HEAD follows

FRAME_HEADER = struct.Struct(">IBI")  # length << 8 | type, flags, stream id (RFC 9113 section 4.1)
FIRST_EXTENSION = 128  # types from here on are ignored, so that a newer peer may use them


class _Rule(NamedTuple):
    min_length: int
    max_length: int
    flags: int
    on_stream: bool


FRAME_RULES: dict[int, _Rule] = {
    FrameType.DATA: _Rule(0, MAX_DATA, END, True),
    FrameType.HEAD: _Rule(1, MAX_HEAD, END | INTERIM, True),
    FrameType.OPEN: _Rule(3, MAX_HEAD, END, True),
    FrameType.RESET: _Rule(2, MAX_CONTROL, 0, True),
    FrameType.PING: _Rule(8, 8, 0, False),
    FrameType.GOAWAY: _Rule(2, MAX_CONTROL, 0, False),
    FrameType.WINDOW: _Rule(4, 4, 0, True),
    FrameType.ACK: _Rule(8, 8, 0, False),
    FrameType.PONG: _Rule(8, 8, 0, False),
}
LINK_LEVEL = frozenset({FrameType.PING, FrameType.PONG, FrameType.ACK})  # not counted, not sent again


class Frame(NamedTuple):
    """One frame; `payload` is the caller's to keep."""

    type: int
    flags: int
    stream_id: int
    payload: bytes

    def __str__(self) -> str:
        name = FrameType(self.type).name if self.type in FRAME_RULES else f"type {self.type}"
        return f"{name} stream={self.stream_id} flags={self.flags:#x} {len(self.payload)} bytes"


def encode_frame(type_: int, flags: int, stream_id: int, payload: bytes | memoryview = b"") -> bytes:
    """Return the frame's bytes. The caller keeps to FRAME_RULES."""
    return FRAME_HEADER.pack(len(payload) << 8 | type_, flags, stream_id) + payload


def encode_reason(code: ErrorCode, reason: str) -> bytes:
    """Return the payload of a RESET or GOAWAY; a long reason is cut."""
    return code.to_bytes(2, "big") + reason.encode("utf-8", "replace")[: MAX_CONTROL - 2]


def decode_reason(payload: bytes) -> tuple[ErrorCode, str]:
    """Return code and reason of a RESET's or GOAWAY's payload; an unknown code is INTERNAL."""
    return ErrorCode(int.from_bytes(payload[:2], "big")), payload[2:].decode("utf-8", "replace")


class FrameDecoder:
    """Turns bytes, sliced anyhow, into frames. Holds at most one frame."""

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def buffered(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes. Raises ProtocolError; the decoder is of no use after that."""
        data = self._buffer + data  # mostly nothing and whole frames, which makes no copy
        frames, start = [], 0
        while len(data) - start >= FRAME_HEADER.size:
            word, flags, stream_id = FRAME_HEADER.unpack_from(data, start)
            length, type_ = word >> 8, word & 0xFF
            self._check(type_, flags, stream_id, length)
            begin = start + FRAME_HEADER.size
            if len(data) - begin < length:
                break
            start = begin + length
            if type_ < FIRST_EXTENSION:
                frames.append(Frame(type_, flags, stream_id, data[begin:start]))
        self._buffer = data[start:]
        return frames

    @staticmethod
    def _check(type_: int, flags: int, stream_id: int, length: int) -> None:
        if type_ >= FIRST_EXTENSION:
            if length > MAX_CONTROL:
                raise ProtocolError(f"extension frame of {length} bytes, MAX_CONTROL is {MAX_CONTROL}")
            return
        rule = FRAME_RULES.get(type_)
        if rule is None:
            raise ProtocolError(f"unknown frame type {type_}")
        if not rule.min_length <= length <= rule.max_length:
            reason = f"{FrameType(type_).name} of {length} bytes, allowed {rule.min_length} to {rule.max_length}"
            raise ProtocolError(reason, ErrorCode.FRAME_SIZE)
        if flags & ~rule.flags:
            raise ProtocolError(f"{FrameType(type_).name} with flags {flags:#x}, allowed {rule.flags:#x}")
        if (stream_id != 0) != rule.on_stream or stream_id > MAX_STREAM_ID:
            raise ProtocolError(f"{FrameType(type_).name} on stream {stream_id}")


# ---- Flow control ---------------------------------------------------------------------------------------------------
# Credit arithmetic and nothing else, in bytes. The rules: (1) the receiver deducts on receipt, (2) returns credit only
# for what its reader has consumed, in steps of half a window, (3) and refuses a byte more than it has granted.


class SendWindow:
    """What may still be sent."""

    def __init__(self, size: int) -> None:
        self.credit = size

    def take(self, n: int) -> None:
        """Spend `n` bytes, at most `credit`."""
        assert 0 <= n <= self.credit
        self.credit -= n

    def add(self, n: int) -> None:
        """Add what a WINDOW frame granted. Raises ProtocolError for nothing, or for more than MAX_WINDOW in all."""
        if not 0 < n <= MAX_WINDOW - self.credit:
            raise ProtocolError(f"WINDOW of {n} on top of {self.credit}", ErrorCode.FLOW_CONTROL)
        self.credit += n


class ReceiveWindow:
    """What the peer may still send."""

    def __init__(self, size: int) -> None:
        self.size = self.credit = size
        self._consumed = 0

    @property
    def unread(self) -> int:
        """Bytes received that no reader has consumed."""
        return self.size - self.credit - self._consumed

    def receive(self, n: int) -> None:
        """Deduct what arrived. Raises ProtocolError when it is more than was granted."""
        if n > self.credit:
            raise ProtocolError(f"{n} bytes past a window of {self.credit}", ErrorCode.FLOW_CONTROL)
        self.credit -= n

    def consume(self, n: int) -> int:
        """Note that the reader took `n` bytes; return the credit to grant now, mostly 0."""
        assert 0 <= n <= self.unread
        self._consumed += n
        if self._consumed < self.size // 2:
            return 0
        granted, self._consumed = self._consumed, 0
        self.credit += granted
        return granted


# ---- Session --------------------------------------------------------------------------------------------------------
# One conversation, whatever connection carries it: bytes and the time go in, frames and bytes come out. Everything that
# affects what is sent, in which order, and when a link counts as dead lives here.
#
# A stream is opened by the server; the client answers with interim HEADs, one HEAD, then DATA (RFC 9113 section 5.1):
#
#                       IDLE
#                        │ OPEN
#                        ▼
#        send END       OPEN       receive END
#      ┌───────────────────────────────────────┐
#      ▼                                       ▼
#  HALF_CLOSED_LOCAL                  HALF_CLOSED_REMOTE
#      │ receive END                  send END │
#      └──────────────▶ CLOSED ◀───────────────┘         a RESET, either way, closes at once
#
# Sending: link-level frames first, then what a lost link swallowed, then control frames, then DATA, where streams that
# have data and credit take turns of TURN bytes. A small response waits for some turns at the most, never for a file.


StreamState = enum.Enum("StreamState", "IDLE OPEN HALF_CLOSED_LOCAL HALF_CLOSED_REMOTE CLOSED")
Input = enum.Enum("Input", "OPEN SEND SEND_END RECEIVE RECEIVE_END RESET")

TRANSITIONS = {  # what is missing here is a protocol error
    (StreamState.IDLE, Input.OPEN): StreamState.OPEN,
    (StreamState.OPEN, Input.SEND): StreamState.OPEN,
    (StreamState.OPEN, Input.RECEIVE): StreamState.OPEN,
    (StreamState.OPEN, Input.SEND_END): StreamState.HALF_CLOSED_LOCAL,
    (StreamState.OPEN, Input.RECEIVE_END): StreamState.HALF_CLOSED_REMOTE,
    (StreamState.OPEN, Input.RESET): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_LOCAL, Input.RECEIVE): StreamState.HALF_CLOSED_LOCAL,
    (StreamState.HALF_CLOSED_LOCAL, Input.RECEIVE_END): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_LOCAL, Input.RESET): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_REMOTE, Input.SEND): StreamState.HALF_CLOSED_REMOTE,
    (StreamState.HALF_CLOSED_REMOTE, Input.SEND_END): StreamState.CLOSED,
    (StreamState.HALF_CLOSED_REMOTE, Input.RESET): StreamState.CLOSED,
}


class Kind(enum.IntEnum):
    """What a stream carries, from its OPEN."""

    HTTP = 0
    UPGRADE = 1  # HTTP; a raw byte pipe after a 101


OPEN_HEADER = struct.Struct(">HB")  # tunnel index, Kind; the request head follows


class _SessionStream:
    def __init__(self, id_: int, send_window: int, receive_window: int, *, headed: bool) -> None:
        self.id = id_
        self.state = StreamState.IDLE
        self.send = SendWindow(send_window)
        self.receive = ReceiveWindow(receive_window)
        self.pending: collections.deque[bytes | memoryview] = collections.deque()
        self.buffered = 0  # bytes in pending
        self.ending = False  # END goes out with the last of pending
        self.reset: bytes | None = None  # the payload of a RESET, which goes out after that
        self.ready = False  # is in the queue of those that may send
        self.headed = headed  # DATA may arrive
        self.interims = 0

    def take(self, limit: int) -> bytes | memoryview:
        """Remove and return up to `limit` bytes of what is pending."""
        limit = min(limit, self.send.credit)
        chunks: list[bytes | memoryview] = []
        while self.pending and limit > 0:
            chunk = self.pending.popleft()
            if len(chunk) > limit:
                view = memoryview(chunk)
                self.pending.appendleft(view[limit:])
                chunk = view[:limit]
            limit -= len(chunk)
            chunks.append(chunk)
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.send.take(len(data))
        self.buffered -= len(data)
        return data


class Session:
    """The state of one end of a session; the I/O around it is Link's.

    `receive_data` returns the OPEN, HEAD, DATA, RESET and GOAWAY frames that passed all checks, as events. Times are
    seconds of any one clock that never goes back. A session starts without a link: call `resume` when it has one.
    `send_*` raise StreamReset for a stream that is closed; ProtocolError means that the session is over.
    """

    def __init__(
        self,
        *,
        is_server: bool,
        send_window: int = INITIAL_WINDOW,
        receive_window: int = INITIAL_WINDOW,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self.is_server = is_server
        self.max_streams = max_streams
        self.connected = False
        self.received = 0  # counted frames, stated to the peer on resume
        self.goaway: tuple[ErrorCode, str] | None = None  # the peer's
        self.leaving = False  # we sent a GOAWAY
        self.round_trip: float | None = None  # seconds, of the last PING
        self.drained: list[int] = []  # streams whose writers may go on; the caller empties it
        self._peer_window, self._window = send_window, receive_window
        self._streams: dict[int, _SessionStream] = {}
        self._last_id = 0
        self._decoder = FrameDecoder()
        self._control: collections.deque[bytes] = collections.deque()
        self._control_bytes = 0
        self._credits: dict[int, int] = {}  # stream id -> bytes to grant
        self._ready: collections.deque[_SessionStream] = collections.deque()
        self._unacked: collections.deque[bytes] = collections.deque()  # counted frames sent and not acknowledged
        self._unacked_bytes = 0
        self._acked = 0  # counted frames that the peer acknowledged
        self._replay: collections.deque[bytes] = collections.deque()  # of those, what this link has still to carry
        self._pings: list[bytes] = []  # PONGs and a PING to send
        self._bytes_to_ack = 0  # from ACK_BYTES on, an ACK is due
        self._ack_deadline: float | None = None
        self._heard_at = self._pinged_at = 0.0  # the PING is not answered while its time is the later one

    # Streams

    @property
    def accepts_streams(self) -> bool:
        """Whether there is a link, and neither end has said that it leaves."""
        return self.connected and not self.goaway and not self.leaving

    @property
    def streams(self) -> int:
        """Number of streams that are not closed."""
        return len(self._streams)

    def open_stream(self, tunnel: int, kind: Kind, head: bytes, *, end: bool = False) -> int:
        """Open a stream with a request head and return its id. Raises StreamReset when there is no room for it."""
        assert self.is_server
        if self._last_id >= MAX_STREAM_ID and not self.leaving:
            self.send_goaway(ErrorCode.SHUTDOWN, "stream ids are used up")
        if self.goaway or self.leaving:
            raise StreamReset(ErrorCode.SHUTDOWN, "the session is ending")
        if len(self._streams) >= self.max_streams:
            raise StreamReset(ErrorCode.REFUSED, f"{self.max_streams} streams are open")
        if self._unacked_bytes + self._control_bytes > MAX_UNACKED:
            raise StreamReset(ErrorCode.REFUSED, "the link is congested")
        stream = self._add_stream(self._last_id + 1)
        payload = OPEN_HEADER.pack(tunnel, kind) + head
        self._send_control(FrameType.OPEN, END if end else 0, stream.id, payload)
        if end:
            self._transition(stream, Input.SEND_END)
        return stream.id

    def send_head(self, stream_id: int, head: bytes, *, interim: bool = False, end: bool = False) -> None:
        stream = self._stream(stream_id)
        assert not self.is_server and not stream.pending
        self._transition(stream, Input.SEND_END if end else Input.SEND)
        flags = (END if end else 0) | (INTERIM if interim else 0)
        self._send_control(FrameType.HEAD, flags, stream_id, head)

    def send_data(self, stream_id: int, data: bytes, *, end: bool = False) -> int:
        """Queue body bytes; return how many are queued now. The caller waits while that is more than SEND_BUFFER."""
        stream = self._stream(stream_id)
        assert not stream.ending and (stream.state, Input.SEND) in TRANSITIONS
        if data:
            stream.pending.append(data)
            stream.buffered += len(data)
        stream.ending = end
        self._make_ready(stream)
        return stream.buffered

    def send_reset(self, stream_id: int, code: ErrorCode, reason: str = "", *, flush: bool = False) -> None:
        """End both directions: at once, or with `flush` after what is queued has been sent. No effect when closed."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        payload = encode_reason(code, reason)
        if flush and (stream.pending or stream.ending):
            stream.reset = payload
        else:
            self._transition(stream, Input.RESET)
            self._send_control(FrameType.RESET, 0, stream_id, payload)

    def acknowledge_received_data(self, stream_id: int, n: int) -> int:
        """Note that the reader consumed `n` bytes of DATA; return the credit that is granted for it, mostly 0."""
        stream = self._streams.get(stream_id)
        granted = stream.receive.consume(n) if stream else 0
        if granted:
            self._credits[stream_id] = self._credits.get(stream_id, 0) + granted
        return granted

    def send_goaway(self, code: ErrorCode, reason: str) -> None:
        """Announce that this end wants no new streams."""
        self.leaving = True
        self._send_control(FrameType.GOAWAY, 0, 0, encode_reason(code, reason))

    # Links

    def may_resume(self, peer_received: int) -> bool:
        """Whether this end still has what a peer that received so many frames is missing."""
        return 0 <= peer_received - self._acked <= len(self._unacked)

    def resume(self, peer_received: int, now: float) -> None:
        """Start to use a new link, whose peer has received `peer_received` counted frames in all."""
        self._acknowledge(peer_received)
        self._replay = self._unacked.copy()
        self._decoder = FrameDecoder()
        self._pings.clear()
        self._bytes_to_ack, self._ack_deadline = 0, None  # the handshake has told it
        self._heard_at = now
        self.connected = True

    def suspend(self) -> None:
        """The link is lost; streams wait for the next one."""
        self.connected = False

    def next_deadline(self) -> float:
        """The time at which `handle_timeout` wants to be called; infinity without a link."""
        if not self.connected:
            return float("inf")
        asked = self._pinged_at > self._heard_at
        silence = self._pinged_at + PING_TIMEOUT if asked else self._heard_at + PING_INTERVAL
        return silence if self._ack_deadline is None else min(silence, self._ack_deadline)

    def handle_timeout(self, now: float) -> bool:
        """Do what is due; True says that the link is dead. A call too early does nothing."""
        if not self.connected:
            return False
        if self._ack_deadline is not None and now >= self._ack_deadline:
            self._bytes_to_ack, self._ack_deadline = ACK_BYTES, None
        if self._pinged_at > self._heard_at:
            return now >= self._pinged_at + PING_TIMEOUT
        if now >= self._heard_at + PING_INTERVAL:
            self._pings.append(encode_frame(FrameType.PING, 0, 0, bytes(8)))
            self._pinged_at = now
        return False

    # Bytes

    def data_to_send(self, limit: int = MAX_BATCH) -> bytes:
        """Return whole frames to send now as one message: about `limit` bytes at the most, none when nothing is due."""
        if not self.connected:
            return b""
        out, self._pings = self._pings, []
        room = limit
        while self._replay and room > 0:
            frame = self._replay.popleft()
            out.append(frame)
            room -= len(frame)
        if not self._replay:
            room = self._take_control(out, room)
            self._take_data(out, room)
        if self._bytes_to_ack >= ACK_BYTES or (out and self._ack_deadline is not None):
            out.append(encode_frame(FrameType.ACK, 0, 0, self.received.to_bytes(8, "big")))
            self._bytes_to_ack, self._ack_deadline = 0, None
        return b"".join(out)

    def receive_data(self, data: bytes, now: float) -> list[Frame]:
        """Take bytes from the link and return the frames for the layer above. Raises ProtocolError."""
        self._heard_at, events = now, []
        for frame in self._decoder.feed(data):
            if frame.type in LINK_LEVEL:
                self._receive_link_level(frame)
                continue
            self.received += 1
            self._bytes_to_ack += FRAME_HEADER.size + len(frame.payload)
            if self._receive(frame):
                events.append(frame)
        if 0 < self._bytes_to_ack < ACK_BYTES and self._ack_deadline is None:
            self._ack_deadline = now + ACK_DELAY
        return events

    @property
    def has_data_to_send(self) -> bool:
        """Whether `data_to_send` is worth a call."""
        waiting = self._control or self._ready or self._credits or self._replay or self._pings
        return bool(waiting) or self._bytes_to_ack >= ACK_BYTES

    @property
    def between_frames(self) -> bool:
        """Whether all bytes received so far made whole frames, as every message must."""
        return not self._decoder.buffered

    # What is sent

    def _take_control(self, out: list[bytes], room: int) -> int:
        while self._control and room > 0:
            frame = self._control.popleft()
            self._control_bytes -= len(frame)
            room -= self._count(out, frame)
        while self._credits and room > 0:
            stream_id, credit = self._credits.popitem()
            if stream_id in self._streams:
                room -= self._count(out, encode_frame(FrameType.WINDOW, 0, stream_id, credit.to_bytes(4, "big")))
        return room

    def _take_data(self, out: list[bytes], room: int) -> None:
        ready = self._ready
        while ready and room > 0 and self._unacked_bytes < MAX_UNACKED and len(self._unacked) < MAX_UNACKED_FRAMES // 2:
            stream = ready.popleft()
            stream.ready = False
            if stream.id not in self._streams:
                continue
            was_full = stream.buffered > SEND_BUFFER
            data = stream.take(TURN)
            end = stream.ending and not stream.pending
            if data or end:
                room -= self._count(out, encode_frame(FrameType.DATA, END if end else 0, stream.id, data))
            if end:
                stream.ending = False
                self._transition(stream, Input.SEND_END)
            if stream.reset and not stream.pending and stream.id in self._streams:
                room -= self._count(out, encode_frame(FrameType.RESET, 0, stream.id, stream.reset))
                self._transition(stream, Input.RESET)
            self._make_ready(stream)
            if was_full and stream.buffered <= SEND_BUFFER:
                self.drained.append(stream.id)

    def _send_control(self, type_: FrameType, flags: int, stream_id: int, payload: bytes) -> None:
        frame = encode_frame(type_, flags, stream_id, payload)
        self._control.append(frame)
        self._control_bytes += len(frame)

    def _count(self, out: list[bytes], frame: bytes) -> int:
        if len(self._unacked) >= MAX_UNACKED_FRAMES:
            raise ProtocolError(f"{MAX_UNACKED_FRAMES} frames without an ACK")
        out.append(frame)
        self._unacked.append(frame)
        self._unacked_bytes += len(frame)
        return len(frame)

    def _make_ready(self, stream: _SessionStream) -> None:
        can_send = stream.send.credit > 0 if stream.pending else stream.ending or stream.reset is not None
        if can_send and not stream.ready and stream.id in self._streams:
            stream.ready = True
            self._ready.append(stream)

    # The streams' states

    def _add_stream(self, stream_id: int) -> _SessionStream:
        stream = _SessionStream(stream_id, self._peer_window, self._window, headed=not self.is_server)
        self._last_id = stream_id
        self._streams[stream_id] = stream
        self._transition(stream, Input.OPEN)
        return stream

    def _stream(self, stream_id: int) -> _SessionStream:
        try:
            return self._streams[stream_id]
        except KeyError:
            raise StreamReset(ErrorCode.STREAM_CLOSED) from None

    def _transition(self, stream: _SessionStream, input_: Input) -> None:
        state = TRANSITIONS.get((stream.state, input_))
        if state is None:
            reason = f"{input_.name} on stream {stream.id}, which is {stream.state.name}"
            raise ProtocolError(reason, ErrorCode.STREAM_CLOSED)
        stream.state = state
        if state is StreamState.CLOSED:
            del self._streams[stream.id]
            self._credits.pop(stream.id, None)
            stream.pending.clear()

    def _acknowledge(self, received: int) -> None:
        if not self.may_resume(received):
            raise ProtocolError(f"ACK of {received} frames, sent {self._acked + len(self._unacked)}")
        for _ in range(received - self._acked):
            self._unacked_bytes -= len(self._unacked.popleft())
        self._acked = received

    # What is received

    def _receive_link_level(self, frame: Frame) -> None:
        if frame.type == FrameType.ACK:
            self._acknowledge(int.from_bytes(frame.payload, "big"))
        elif frame.type == FrameType.PING:
            if len(self._pings) >= MAX_PENDING_PONGS:
                raise ProtocolError(f"{MAX_PENDING_PONGS} PINGs at once")
            self._pings.append(encode_frame(FrameType.PONG, 0, 0, frame.payload))
        elif self._pinged_at:
            self.round_trip = self._heard_at - self._pinged_at

    def _receive(self, frame: Frame) -> bool:
        """Take a counted frame; return whether it is an event for the layer above."""
        if frame.type == FrameType.OPEN:
            return self._receive_open(frame)
        if frame.type == FrameType.GOAWAY:
            self.goaway = decode_reason(frame.payload)
            return True
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            if frame.stream_id > self._last_id:
                raise ProtocolError(f"{frame} before its OPEN")
            return False  # closed, and the frame was still on its way
        if frame.type == FrameType.WINDOW:
            stream.send.add(int.from_bytes(frame.payload, "big"))
            self._make_ready(stream)
            return False
        if frame.type == FrameType.RESET:
            self._transition(stream, Input.RESET)
            return True
        if frame.type == FrameType.HEAD:
            self._check_head(stream, frame)
        elif not stream.headed:
            raise ProtocolError(f"DATA before the HEAD on stream {stream.id}")
        elif not frame.payload and not frame.flags & END:
            raise ProtocolError(f"empty DATA on stream {stream.id}")
        self._transition(stream, Input.RECEIVE_END if frame.flags & END else Input.RECEIVE)
        if frame.type == FrameType.DATA:
            stream.receive.receive(len(frame.payload))
        return True

    def _receive_open(self, frame: Frame) -> bool:
        if self.is_server or frame.stream_id <= self._last_id:
            raise ProtocolError(f"OPEN of stream {frame.stream_id} after {self._last_id}")
        unknown = frame.payload[2] not in Kind.__members__.values()  # what a newer peer may ask for
        if unknown or self.leaving or len(self._streams) >= self.max_streams:
            self._last_id = frame.stream_id
            code = ErrorCode.SHUTDOWN if self.leaving else ErrorCode.REFUSED
            refusal = encode_reason(code, "unknown kind" if unknown else "no more streams")
            self._send_control(FrameType.RESET, 0, frame.stream_id, refusal)
            if len(self._control) > MAX_UNACKED_FRAMES:
                raise ProtocolError("more streams than answers to them are read")
            return False
        stream = self._add_stream(frame.stream_id)
        if frame.flags & END:
            self._transition(stream, Input.RECEIVE_END)
        return True

    @staticmethod
    def _check_head(stream: _SessionStream, frame: Frame) -> None:
        if stream.headed:
            raise ProtocolError(f"HEAD on stream {stream.id} where none may come")
        if frame.flags & INTERIM:
            stream.interims += 1
            if stream.interims > MAX_INTERIM or frame.flags & END:
                raise ProtocolError(f"interim response {stream.interims} of {MAX_INTERIM}")
        else:
            stream.headed = True


# ---- HTTP/1.1 messages ----------------------------------------------------------------------------------------------
# Heads in frames and on the wire, a strict parser for what a local service answers, and the framing of what a visitor
# gets (RFC 9110, 9112). Bytes stay bytes: names keep their case, fields their order and duplicates, targets their
# spelling. Whatever a head is decoded from, the checks are these, so no field can smuggle another message.

Headers = list[tuple[bytes, bytes]]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TOKENS = re.compile(rb"%b(?:\0%b)*" % (_TOKEN, _TOKEN))
_METHOD = re.compile(_TOKEN)
_STATUS = re.compile(rb"[1-5][0-9][0-9]")
_FIELD_TEXT = re.compile(rb"[\0\t\x20-\x7e\x80-\xff]*")  # the NULs are our own separators
_TARGET = re.compile(rb"[\x21\x22\x24-\x7e\x80-\xff]+")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\r\n]*))?")
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"(?:((?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63})\.?|\[([0-9a-f:.]+)\])(?::([0-9]{0,5}))?")

HOP_BY_HOP = frozenset(  # RFC 9110 section 7.6.1
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade http2-settings".split()
)
NEVER_NOMINATED = frozenset({b"host", b"content-length"})  # a Connection field may not take these away
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
OUR_FORWARDED = (b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host")
FORWARDED = frozenset({b"forwarded", b"x-real-ip", *(name.lower() for name in OUR_FORWARDED)})


def check_fields(parts: list[bytes]) -> Headers:
    """Return the fields of a list of name, value, name, value, whose bytes are all allowed. Raises MessageError."""
    if len(parts) % 2 or len(parts) > 2 * MAX_FIELDS:
        raise MessageError(f"{len(parts) / 2:g} fields, MAX_FIELDS is {MAX_FIELDS}", 431)
    names, values = b"\0".join(parts[::2]), b"\0".join(parts[1::2])
    if (parts and not _TOKENS.fullmatch(names)) or not _FIELD_TEXT.fullmatch(values):
        raise MessageError("a field with a byte that may not be there")
    return list(zip(parts[::2], parts[1::2], strict=True))


def field_values(headers: Headers, name: bytes) -> list[bytes]:
    """Return the values of all fields called `name` (lower case)."""
    return [value for key, value in headers if key.lower() == name]


def field_tokens(headers: Headers, name: bytes) -> set[bytes]:
    """Return the members of a comma-separated field, in lower case."""
    return {token.strip().lower() for value in field_values(headers, name) for token in value.split(b",")}


def end_to_end(headers: Headers, *, keep_upgrade: bool = False) -> Headers:
    """Return the fields that a proxy passes on (RFC 9110 section 7.6.1), in their order."""
    drop = HOP_BY_HOP | field_tokens(headers, b"connection") - NEVER_NOMINATED
    if keep_upgrade:
        drop -= {b"upgrade"}
    return [(name, value) for name, value in headers if name.lower() not in drop]


def forwarded(headers: Headers, peer: str, scheme: str, host: bytes, *, trusted: bool) -> Headers:
    """Return `headers` with what a proxy owes: who called, how, and which host.

    What the visitor itself wrote into these fields is replaced, unless the peer is a `trusted` proxy. Names that turn
    into one of them, or into framing, where a local service folds `_` to `-`, are dropped.
    """
    ours = dict(zip(OUR_FORWARDED, (peer.encode("ascii", "replace"), scheme.encode(), host), strict=True))
    if trusted:
        for name in OUR_FORWARDED:
            theirs = field_values(headers, name.lower())
            if theirs:
                ours[name] = b", ".join([*theirs, ours[name]]) if name == b"X-Forwarded-For" else theirs[-1]
    replaced = FORWARDED - {b"forwarded", b"x-real-ip"} if trusted else FORWARDED
    kept = []
    for name, value in headers:
        lower = name.lower()
        folded = lower.replace(b"_", b"-")
        imitates = folded != lower and folded in FORWARDED | FRAMING
        if lower not in replaced and not imitates:
            kept.append((name, value))
    return [*kept, *ours.items()]


def _encode_head(*start: bytes, headers: Headers) -> bytes:
    if len(headers) > MAX_FIELDS:
        raise MessageError(f"{len(headers)} fields, MAX_FIELDS is {MAX_FIELDS}", 431)
    parts = [*start, *itertools.chain.from_iterable(headers)]
    payload = b"\0".join(parts)
    if payload.count(b"\0") != len(parts) - 1:
        raise MessageError("NUL in a head")
    if len(payload) > MAX_HEAD - OPEN_HEADER.size:
        raise MessageError(f"a head of {len(payload)} bytes, MAX_HEAD is {MAX_HEAD}", 431)
    return payload


def _decode_head(payload: bytes, one: re.Pattern[bytes], two: re.Pattern[bytes]) -> tuple[bytes, bytes, Headers]:
    """Return the two parts of a start line, which match their patterns, and the fields. Raises ProtocolError."""
    first, _, rest = payload.partition(b"\0")
    second, *fields = rest.split(b"\0")
    if not one.fullmatch(first) or not two.fullmatch(second):
        raise ProtocolError("a head without its start line")
    try:
        return first, second, check_fields(fields)
    except MessageError as error:
        raise ProtocolError(f"a head with {error}") from None


def _wire_head(start_line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    lines = [start_line, *(b"%b: %b" % pair for pair in headers), b"", b""]
    return b"\r\n".join(lines)


@dataclass(slots=True)
class RequestHead:
    """A request's start line and fields; what it holds has passed the checks of this section."""

    method: bytes
    target: bytes
    headers: Headers

    def encode(self) -> bytes:
        """Return the bytes for an OPEN. Raises MessageError when they are too many."""
        return _encode_head(self.method, self.target, headers=self.headers)

    @classmethod
    def decode(cls, payload: bytes) -> RequestHead:
        """Read what `encode` made. Raises ProtocolError."""
        return cls(*_decode_head(payload, _METHOD, _TARGET))

    def to_wire(self, *, chunked: bool, upgrade: bool) -> bytes:
        """Return the head for the local service; the body's framing is made anew (RFC 9112 section 6)."""
        hop: Headers = [(b"Connection", b"Upgrade")] if upgrade else []
        if chunked:
            hop.append((b"Transfer-Encoding", b"chunked"))
        return _wire_head(b"%b %b HTTP/1.1" % (self.method, self.target), [*self.headers, *hop])


@dataclass(slots=True)
class ResponseHead:
    """A response's status line and fields; what it holds has passed the checks of this section."""

    status: int
    reason: bytes
    headers: Headers

    def encode(self) -> bytes:
        """Return the bytes for a HEAD. Raises MessageError when they are too many."""
        return _encode_head(b"%d" % self.status, self.reason, headers=self.headers)

    @classmethod
    def decode(cls, payload: bytes) -> ResponseHead:
        """Read what `encode` made. Raises ProtocolError."""
        status, reason, headers = _decode_head(payload, _STATUS, _FIELD_TEXT)
        return cls(int(status), reason, headers)

    @property
    def interim(self) -> bool:
        """Whether another head follows (RFC 9110 section 15.2); after a 101 none does."""
        return self.status < 200 and self.status != 101

    def has_body(self, method: bytes) -> bool:
        """Whether content follows in answer to `method` (RFC 9112 section 6.3)."""
        return not (self.status < 200 or self.status in (204, 304) or method == b"HEAD")

    def content_length(self) -> int | None:
        """Return the Content-Length, None without one. Raises MessageError when it is not one plain number."""
        values = field_values(self.headers, b"content-length")
        if not values:
            return None
        if len(values) > 1 or not _CONTENT_LENGTH.fullmatch(values[0]):
            raise MessageError("Content-Length is not one number", 502)
        return int(values[0])

    def passed_on(self) -> ResponseHead:
        """Return the head as a proxy sends it on, without the framing that is made anew for the visitor."""
        headers = end_to_end(self.headers, keep_upgrade=self.status in (101, 426))
        if self.status < 200 or self.status == 204:
            headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        return ResponseHead(self.status, self.reason, headers)


class ResponseParser:
    """Reads one response of a local service, with its interim ones, from bytes sliced anyhow (RFC 9112).

    Strict: obs-fold, bare LF, two lengths or a length beside chunked are errors. Other exceptions are bugs.
    """

    def __init__(self, method: bytes) -> None:
        self.head: ResponseHead | None = None  # the final one
        self.done = False  # the response is complete; after a 101, what follows is not HTTP
        self.keep_alive = False  # another request may follow on this connection
        self.excess = b""  # bytes not read yet; once done, those that came after the end
        self._start = 0  # of those that are left
        self._until_close = False
        self._method = method
        self._events: list[ResponseHead | bytes] = []
        self._reading = self._read()

    def receive_data(self, data: bytes) -> list[ResponseHead | bytes]:
        """Return the heads and the body's bytes, without framing, that `data` brings. Raises MessageError."""
        self._events = []
        self.excess += data
        next(self._reading, None)
        self.excess, self._start = self.excess[self._start :], 0
        self.keep_alive = self.keep_alive and not (self.done and self.excess)
        return self._events

    def receive_eof(self) -> None:
        """The connection ended. Raises ConnectionError when the response is not complete."""
        self.done = self.done or self._until_close
        if not self.done:
            raise ConnectionError("the connection ended inside the response" if self.head else "no response")

    # A generator that is suspended wherever bytes are missing

    def _read(self) -> Generator[None]:
        for _ in range(MAX_INTERIM + 1):
            head, http11 = yield from self._read_head()
            self._events.append(head)
            if not head.interim:
                break
        else:
            raise MessageError(f"more than {MAX_INTERIM} interim responses", 502)
        self.head = head
        encodings = field_values(head.headers, b"transfer-encoding")
        length = head.content_length()
        if encodings and (length is not None or not http11 or [e.lower() for e in encodings] != [b"chunked"]):
            raise MessageError("Transfer-Encoding is not just chunked", 502)
        self.keep_alive = http11 and b"close" not in field_tokens(head.headers, b"connection") and head.status != 101
        if head.has_body(self._method):
            if encodings:
                yield from self._read_chunks()
            elif length is not None:
                yield from self._read_content(length)
            else:
                self.keep_alive, self._until_close = False, True
                while True:
                    yield from self._read_content(len(self.excess) - self._start)
                    yield
        self.done = True

    def _read_head(self) -> Generator[None, None, tuple[ResponseHead, bool]]:
        while b"HTTP/1.".startswith(self.excess[self._start :]):  # anything else is refused without waiting for its end
            yield
        if not self.excess.startswith(b"HTTP/1.", self._start):
            raise MessageError("not an HTTP/1 response", 502)
        status_line, *lines = (yield from self._read_until(b"\r\n\r\n", MAX_HEAD, "response head")).split(b"\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if not match or any(b"\0" in line for line in lines):
            raise MessageError("not an HTTP/1 response", 502)
        parts: list[bytes] = []
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise MessageError("a header line without a colon", 502)
            parts += (name, value.strip(b" \t"))
        reason = match[3] or b""
        if not _FIELD_TEXT.fullmatch(reason) or b"\0" in reason:
            reason = b""
        return ResponseHead(int(match[2]), reason, check_fields(parts)), match[1] == b"1"

    def _read_chunks(self) -> Generator[None]:
        size = None
        while size != 0:
            match = _CHUNK_SIZE.fullmatch((yield from self._read_until(b"\r\n", MAX_CONTROL, "chunk size")))
            if not match:
                raise MessageError("not a chunk size", 502)
            size = int(match[1], 16)
            if size:
                yield from self._read_content(size)
                yield from self._read_until(b"\r\n", 0, "chunk's end")
        # Trailers are dropped (RFC 9110 section 6.5.1 allows it); they never become header fields.
        for _ in range(MAX_FIELDS):
            if not (yield from self._read_until(b"\r\n", MAX_CONTROL, "trailer")):
                return
        raise MessageError(f"more than {MAX_FIELDS} trailers", 502)

    def _read_content(self, length: int) -> Generator[None]:
        while True:
            content = self.excess[self._start : self._start + length]
            self._start += len(content)
            length -= len(content)
            if content:
                self._events.append(content)
            if not length:
                return
            yield

    def _read_until(self, mark: bytes, limit: int, what: str) -> Generator[None, None, bytes]:
        while True:
            end = self.excess.find(mark, self._start)
            least = end if end >= 0 else len(self.excess) - len(mark) + 1
            if least - self._start > limit:
                raise MessageError(f"a {what} over {limit} bytes", 502)
            if end >= 0:
                break
            yield
        start, self._start = self._start, end + len(mark)
        return self.excess[start:end]


class ResponseEncoder:
    """Frames one response for a visitor: nothing that the client or the local service says can produce another one."""

    def __init__(self, method: bytes, *, http11: bool, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.started = False  # the final head has been encoded
        self.until_close = False  # only the connection's end tells the visitor where the content ends
        self._method, self._http11 = method, http11
        self._body = True
        self._chunked = False
        self._remaining: int | None = None

    def head(self, head: ResponseHead, date: bytes, *, end: bool = False) -> bytes:
        """Return the head on the wire; `end` says that no content will come. Raises MessageError."""
        head = head.passed_on()
        status_line = b"HTTP/1.1 %d %b" % (head.status, head.reason)
        if head.interim:
            return _wire_head(status_line, head.headers) if self._http11 else b""
        hop: Headers = []
        if head.status in (101, 426):
            hop.append((b"Connection", b"Upgrade"))
        self._body = head.has_body(self._method)
        self._remaining = head.content_length()
        if self._body and self._remaining is None:
            if end:
                self._remaining = 0
                hop.append((b"Content-Length", b"0"))
            elif self._http11:
                self._chunked = True
                hop.append((b"Transfer-Encoding", b"chunked"))
            else:
                self.keep_alive, self.until_close = False, True
        if head.status == 101:
            self.keep_alive = False
        elif not self.keep_alive:
            hop.append((b"Connection", b"close"))
        elif not self._http11:
            hop.append((b"Connection", b"keep-alive"))
        if head.status >= 200 and not field_values(head.headers, b"date"):
            hop.append((b"Date", date))  # RFC 9110 section 6.6.1
        self.started = True
        return _wire_head(status_line, [*head.headers, *hop])

    def data(self, data: bytes) -> bytes:
        """Return content on the wire. Raises MessageError when it is more than the head announced."""
        if not self._body or not data:
            return b""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if self._remaining is not None:
            self._remaining -= len(data)
            if self._remaining < 0:
                raise MessageError("more content than Content-Length", 502)
        return data

    def end(self) -> bytes:
        """Return what ends the content. Raises MessageError when some is missing."""
        if self._body and self._remaining:
            raise MessageError(f"content ended {self._remaining} bytes before its Content-Length", 502)
        return b"0\r\n\r\n" if self._chunked else b""


def parse_host(text: str) -> tuple[str, int | None]:
    """Return host (lower case, no dot at its end, an IPv6 address in brackets) and port. Raises MessageError."""
    match = _HOST.fullmatch(text.lower()) if text.isascii() else None
    if not match or len(text) > 255 or int(match[3] or 0) > 65535:
        raise MessageError("Host is not a host name")
    if match[2]:
        try:
            ipaddress.IPv6Address(match[2])
        except ValueError:
            raise MessageError("Host is not an address") from None
    return match[1] or f"[{match[2]}]", int(match[3]) if match[3] else None


def check_framing(headers: Headers) -> None:
    """Check that a request's content can end in one place only (RFC 9112 section 6.3). Raises MessageError."""
    encodings = field_values(headers, b"transfer-encoding")
    if encodings and (len(encodings) > 1 or field_values(headers, b"content-length")):
        raise MessageError("Transfer-Encoding beside another length")
    if encodings and encodings[0].lower() != b"chunked":
        raise MessageError("Transfer-Encoding is not just chunked", 501)


def split_target(method: bytes, target: bytes, headers: Headers) -> tuple[bytes, bytes]:
    """Return the target in origin-form and the host it is for (RFC 9112 section 3.2). Raises MessageError."""
    hosts = field_values(headers, b"host")
    if len(hosts) != 1:
        raise MessageError(f"{len(hosts)} Host fields")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute:
        hosts = [absolute[1]]
        path = absolute[2]
        target = b"*" if method == b"OPTIONS" and not path else path if path.startswith(b"/") else b"/" + path
    if not (target.startswith(b"/") or (target == b"*" and method == b"OPTIONS")) or not _TARGET.fullmatch(target):
        raise MessageError("not a request target")
    return target, hosts[0]


# ---- Handshake ------------------------------------------------------------------------------------------------------
# What the two ends say before the first frame, and who is who: SCRAM-SHA-256's exchange (RFC 5802, 7677), where both
# prove that they know the token, it never crosses the wire, and what the server keeps would not let a thief of it in.
#
#     client  hello       version, key (a short hash of the token), nonce, what was dialled, tunnels, session to resume
#     server  challenge   nonce, salt, iterations
#     client  proof       ClientProof over the texts of hello and challenge
#     server  ready       ServerSignature, session, tunnels, how much was received   or   refused: code, reason, retry

PROTOCOL_VERSION = 1
_T = TypeVar("_T")


def key_id(token: str) -> str:
    """Return the short public name of a token."""
    return hashlib.sha256(b"pytunnel key " + token.encode()).hexdigest()[:16]


def _digest(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _keys(token: str, salt: bytes, iterations: int) -> tuple[bytes, bytes, bytes]:
    """Return ClientKey, StoredKey and ServerKey (RFC 5802 section 3); takes some milliseconds."""
    salted = hashlib.pbkdf2_hmac("sha256", token.encode(), salt, iterations)
    client_key = _digest(salted, b"Client Key")
    return client_key, hashlib.sha256(client_key).digest(), _digest(salted, b"Server Key")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=False))


class Verifier(NamedTuple):
    """What a server keeps of a token (RFC 5802 section 3)."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes

    @classmethod
    def from_token(cls, token: str, salt: bytes, iterations: int = ITERATIONS) -> Verifier:
        _, stored_key, server_key = _keys(token, salt, iterations)
        return cls(salt, iterations, stored_key, server_key)

    def accepts(self, proof: bytes, auth_message: bytes) -> bool:
        """Whether the proof's maker knows the token."""
        client_key = _xor(proof, _digest(self.stored_key, auth_message))
        return hmac.compare_digest(hashlib.sha256(client_key).digest(), self.stored_key)

    def signature(self, auth_message: bytes) -> bytes:
        return _digest(self.server_key, auth_message)


def client_proof(token: str, salt: bytes, iterations: int, auth_message: bytes) -> tuple[bytes, bytes]:
    """Return ClientProof and the ServerSignature to expect."""
    client_key, stored_key, server_key = _keys(token, salt, iterations)
    return _xor(client_key, _digest(stored_key, auth_message)), _digest(server_key, auth_message)


def encode_message(type_: str, **fields: object) -> str:
    return json.dumps({"type": type_, **fields}, separators=(",", ":"))


class Message:
    """A handshake message of the peer; fields it does not know are ignored, so that a newer peer may send them."""

    def __init__(self, text: str) -> None:
        """Parse it. Raises ProtocolError for what is not one short JSON object."""
        if len(text) > MAX_HELLO:
            raise ProtocolError(f"a handshake message over {MAX_HELLO} characters")
        try:
            self._fields = parse_object(text)
        except ValueError as error:
            raise ProtocolError(f"a handshake message that is not JSON: {error}") from None
        self.text = text

    def get(self, name: str, type_: type[_T], default: _T | None = None) -> _T:
        """Return a field of that type. Raises ProtocolError when it has another, or is missing without a default."""
        value = self._fields.get(name, default)
        if not isinstance(value, type_) or (type_ is int and isinstance(value, bool)):
            raise ProtocolError(f"handshake field {name!r} is not {type_.__name__}")
        if isinstance(value, str) and not value.isprintable():
            raise ProtocolError(f"handshake field {name!r} is not plain text")
        return value

    def bytes(self, name: str) -> bytes:
        """Return a field that is in base64."""
        try:
            return base64.b64decode(self.get(name, str), validate=True)
        except ValueError:
            raise ProtocolError(f"handshake field {name!r} is not base64") from None

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return an integer field, which must lie in the range."""
        value = self.get(name, int, default)
        if not low <= value <= high:
            raise ProtocolError(f"handshake field {name!r} is not within {low} to {high}")
        return value


def check_name(name: str) -> str:
    """Return a tunnel's name. Raises Refused when it is not a plain DNS label that visitors can rely on."""
    if not NAME_PATTERN.fullmatch(name) or name.startswith("xn--") or name in RESERVED_NAMES:
        raise Refused("name", f"{escape(name, 70)!r} is not allowed as a name: use a-z, 0-9 and hyphens, like web-1")
    return name


def default_name(token: str, machine: str, target: str) -> str:
    """Return the stable name of a tunnel that has not asked for one: 50 bits that strangers cannot guess."""
    digest = _digest(token.encode(), f"name\0{machine}\0{target}".encode(errors="surrogateescape"))
    return base64.b32encode(digest).decode()[:10].lower()


class Origin(NamedTuple):
    """The public side of a server: tunnels are at `scheme://NAME.zone:port/`."""

    scheme: str
    zone: str
    port: int | None

    @classmethod
    def from_url(cls, url: str) -> Origin:
        """Derive it from what a client dialled. Raises MessageError."""
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower()
        if scheme not in ("http", "https"):
            raise MessageError("not an http or https URL")
        host, port = parse_host(rest.partition("/")[0])
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(host.strip("[]"))  # has no names below it; sslip.io lends its own
            dashed = str(address).replace(".", "-").replace(":", "-")
            dashed = "0" * dashed.startswith("-") + dashed + "0" * dashed.endswith("-")  # `::` at an end
            host = "localhost" if address.is_loopback else f"{dashed}.sslip.io"
        return cls(scheme, host, port if port != DEFAULT_PORTS[scheme] else None)

    def url(self, name: str) -> str:
        return f"{self.scheme}://{name}.{self.zone}{'' if self.port is None else f':{self.port}'}"


def tunnel_name(host: str, zones: Iterable[str]) -> str | None:
    """Return the tunnel that a visitor's host (from parse_host) means, None when it is the server's own host."""
    label, _, zone = host.partition(".")
    return label if zone and zone in zones and host not in zones else None


# ---- Exchanges ------------------------------------------------------------------------------------------------------
# One request and its response, as whoever watches sees it: a record to read, which never holds up the traffic.


@dataclass(slots=True)
class Exchange:
    """Sizes are bytes of content, times seconds of the monotonic clock."""

    tunnel: str
    method: str
    target: str
    started: float
    status: int | None = None  # what the visitor gets; None: nothing
    bytes_in: int = 0
    bytes_out: int = 0
    error: str = ""
    ended: float | None = None

    @property
    def duration(self) -> float:
        """Seconds from the request's arrival to the response's end."""
        return (self.ended or self.started) - self.started

    def line(self) -> str:
        """Return it as one line for a terminal."""
        outcome = str(self.status) if self.status else "---"
        error = f"  {escape(self.error)}" if self.error else ""
        return f"{outcome} {self.method:<7} {escape(self.target, 80)}  {self.duration * 1000:.0f} ms{error}"


# ==== Everything below does I/O ======================================================================================

# ---- State ----------------------------------------------------------------------------------------------------------
# What is kept on disk between runs: a few small private files in one directory.


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; only its owner may read it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def read_or_make(path: Path, make: Callable[[], str]) -> str:
    """Return a file's one line, which is made and kept when it is not there."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        text = make()
        write_private(path, text + "\n")
    return text


# ---- Link -----------------------------------------------------------------------------------------------------------
# Runs a session over one WebSocket after another, and gives each stream asyncio's verbs. One task reads and never waits
# for a consumer (windows bound what it may have to keep); one task writes, and whatever became ready in one turn of the
# event loop goes out as one message.


async def receive_message(ws: WebSocket) -> Message:
    """Return the peer's next handshake message. Raises ProtocolError, or ConnectionError when there is none."""
    from aiohttp import WSMsgType

    received = await ws.receive()
    if received.type is WSMsgType.BINARY:
        raise ProtocolError("a binary message in the handshake")
    if received.type is not WSMsgType.TEXT:
        raise ConnectionResetError("the connection was closed in the handshake")
    return Message(received.data)


class Stream:
    """One stream; whoever has it must close it.

    Reading and writing are independent, one task each. All verbs raise StreamReset once either side has reset the
    stream or its session is over; what had arrived before that is read first.
    """

    def __init__(
        self, link: Link, stream_id: int, tunnel: int, kind: Kind, head: bytes, *, ended: bool, finished: bool = False
    ) -> None:
        self.id, self.tunnel, self.kind, self.head = stream_id, tunnel, kind, head
        self.on_reset: Callable[[ErrorCode], object] = lambda code: None  # called when the peer resets the stream
        self._link = link
        self.has_content = not ended  # from the peer, even if none of it came
        self.finished = finished  # our direction has been ended
        self._ended = ended  # and the peer's
        self._error: StreamReset | None = None
        self._heads: collections.deque[bytes] = collections.deque()
        self._chunks: collections.deque[bytes] = collections.deque()
        self._readable = asyncio.Event()
        self.writable = asyncio.Event()  # set by the link when the queue has room again

    def close(self) -> None:
        """Reset what is not finished, and forget the stream. May be called again."""
        if self.finished and not self._ended and not self._link.session.is_server:
            self.abort(ErrorCode.NO_ERROR, flush=True)  # RFC 9113 section 8.1: the rest of the request is not wanted
        elif not (self.finished and self._ended):
            self.abort(ErrorCode.CANCEL)
        self._link.forget(self)

    # Reading

    @property
    def at_eof(self) -> bool:
        """Whether the peer has ended its direction and all of it has been read."""
        return self._ended and not self._chunks

    @property
    def readable(self) -> bool:
        """Whether `read` would return at once."""
        return bool(self._chunks) or self._ended or self._error is not None

    async def read_head(self) -> bytes:
        """Return the next response head; only the server's streams have them."""
        while not self._heads:
            self._check()
            if self._ended:
                raise StreamReset(ErrorCode.LOCAL_INVALID, "the stream ended without a final head")
            self._readable.clear()
            await self._readable.wait()
        return self._heads.popleft()

    async def read(self) -> bytes:
        """Return the next chunk, or b"" after the last one. Reading is what gives the peer new credit."""
        while not self._chunks:
            if self._ended:
                return b""
            self._check()
            self._readable.clear()
            await self._readable.wait()
        data = self._chunks.popleft()
        if self._link.session.acknowledge_received_data(self.id, len(data)):
            self._link.wake()
        return data

    # Writing

    def write_head(self, head: ResponseHead, *, end: bool = False) -> None:
        """Send a response head; `end` says that no content follows."""
        self._check()
        self._link.session.send_head(self.id, head.encode(), interim=head.interim, end=end)
        self.finished = end
        self._link.wake()

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Send a chunk; waits while more than SEND_BUFFER bytes are queued. `end` says that it is the last one."""
        self._check()
        queued = self._link.session.send_data(self.id, data, end=end)
        self.finished = end
        self._link.wake()
        if queued > SEND_BUFFER and not end:
            self.writable.clear()
            await self.writable.wait()
            self._check()

    def abort(self, code: ErrorCode, reason: str = "", *, flush: bool = False) -> None:
        """End both directions: at once, or with `flush` after what is queued. No effect on a finished stream."""
        if self._error is None:
            self._link.session.send_reset(self.id, code, reason, flush=flush)
            self._link.wake()
            self.fail(StreamReset(code, reason))

    # Called by the link

    def feed(self, frame: Frame) -> None:
        """Take a frame that the session let through."""
        if frame.type == FrameType.RESET:
            return self.fail(StreamReset(*decode_reason(frame.payload)), by_peer=True)
        if frame.type == FrameType.HEAD:
            self._heads.append(frame.payload)
        elif self._chunks and len(self._chunks[-1]) + len(frame.payload) < MAX_HEAD:
            self._chunks[-1] += frame.payload  # many small chunks would take more memory than the window counts
        elif frame.payload:
            self._chunks.append(frame.payload)
        self._ended = self._ended or bool(frame.flags & END)
        self._readable.set()

    def fail(self, error: StreamReset, *, by_peer: bool = False) -> None:
        """The stream is over; wake whoever waits."""
        self._error = self._error or error
        self._readable.set()
        self.writable.set()
        if by_peer:
            self.on_reset(error.code)

    def _check(self) -> None:
        if self._error:
            raise StreamReset(self._error.code, self._error.reason)


class Link:
    """Carries one session; `run` it over each WebSocket in turn, `end` it once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.on_stream: Callable[[Stream], None] = lambda stream: stream.close()
        self.on_goaway: Callable[[ErrorCode, str], None] = lambda code, reason: None
        self._streams: dict[int, Stream] = {}
        self._wakeup = asyncio.Event()
        self._closed = asyncio.Event()  # some stream has been
        self._lost: asyncio.Future[str] | None = None  # of the WebSocket in use, or the last one
        self._free = asyncio.Event()
        self._free.set()
        self._finishing = False
        self._timer: asyncio.TimerHandle  # fires early at worst

    async def run(self, ws: WebSocket, peer_received: int) -> str:
        """Use `ws` until it is lost or finished, and return why; the caller closes it. Raises ProtocolError."""
        loop = asyncio.get_running_loop()
        self.session.resume(peer_received, loop.time())
        self._free.clear()
        self._set_timer()
        self._lost = loop.create_future()
        ends = [asyncio.ensure_future(self._read(ws)), asyncio.ensure_future(self._write(ws)), self._lost]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return next(end for end in ends if end.done()).result()
        finally:
            self.session.suspend()
            self._timer.cancel()
            for end in ends:
                end.cancel()
            try:
                await asyncio.gather(*ends, return_exceptions=True)
            finally:  # cancelled here, too, when the connection ends while it is being given up
                self._free.set()

    async def detach(self, reason: str) -> None:
        """Give up the WebSocket in use, if any, so that another may be used."""
        while not self._free.is_set():  # again, when somebody else who waited here was faster
            self.lose(reason)
            await self._free.wait()

    def lose(self, reason: str) -> None:
        """Make `run` return; the session stays."""
        if self._lost and not self._lost.done():
            self._lost.set_result(reason)

    def finish(self) -> None:
        """Make `run` return as soon as everything queued has been sent."""
        self._finishing = True
        self.wake()

    def end(self, error: StreamReset) -> None:
        """The session is over: all streams fail."""
        for stream in list(self._streams.values()):
            stream.fail(error, by_peer=True)

    def open(self, tunnel: int, kind: Kind, head: RequestHead, *, end: bool) -> Stream:
        """Open a stream. Raises StreamReset when the session takes no more."""
        payload = head.encode()
        id_ = self.session.open_stream(tunnel, kind, payload, end=end)
        self.wake()
        self._streams[id_] = Stream(self, id_, tunnel, kind, payload, ended=False, finished=end)
        return self._streams[id_]

    def forget(self, stream: Stream) -> None:
        """A stream's owner is done with it."""
        self._streams.pop(stream.id, None)
        self._closed.set()

    async def wait_no_streams(self) -> None:
        """Return when all streams have ended and their owners are done with them."""
        while self._streams or self.session.streams:
            self._closed.clear()
            await self._closed.wait()

    def wake(self) -> None:
        self._wakeup.set()

    async def _read(self, ws: WebSocket) -> str:
        from aiohttp import WSMsgType

        loop, session = asyncio.get_running_loop(), self.session
        while True:
            message = await ws.receive()
            if message.type is WSMsgType.BINARY:
                for frame in session.receive_data(message.data, loop.time()):
                    self._dispatch(frame)
                if not session.between_frames:
                    raise ProtocolError("a message that ends inside a frame")
                if session.has_data_to_send:
                    self.wake()
                if session.next_deadline() < self._timer_at:
                    self._timer.cancel()
                    self._set_timer()
            elif message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                return "the connection was closed"
            elif message.type is WSMsgType.ERROR:
                return f"the connection broke: {message.data}"
            else:
                raise ProtocolError("a text message after the handshake")

    async def _write(self, ws: WebSocket) -> str:
        session = self.session
        while True:
            data = session.data_to_send()
            if not data:
                if self._finishing:
                    return "finished"
                self._wakeup.clear()
                await self._wakeup.wait()
                continue
            try:
                async with asyncio.timeout(WRITE_TIMEOUT):
                    await ws.send_bytes(data)
            except TimeoutError:
                return f"nothing could be written for {WRITE_TIMEOUT:g} s"
            except ConnectionError as error:
                return str(error)
            for stream_id in session.drained:
                if stream_id in self._streams:
                    self._streams[stream_id].writable.set()
            session.drained.clear()
            if not session.streams:
                self._closed.set()
            await asyncio.sleep(0)  # let others add to the next message, and the reader see ACKs

    def _dispatch(self, frame: Frame) -> None:
        log.debug("< %s", frame)
        if frame.type == FrameType.OPEN:
            tunnel, kind = OPEN_HEADER.unpack_from(frame.payload)
            head, ended = frame.payload[OPEN_HEADER.size :], bool(frame.flags & END)
            self._streams[frame.stream_id] = Stream(self, frame.stream_id, tunnel, Kind(kind), head, ended=ended)
            self.on_stream(self._streams[frame.stream_id])
        elif frame.type == FrameType.GOAWAY:
            self.on_goaway(*decode_reason(frame.payload))
        elif frame.stream_id in self._streams:
            self._streams[frame.stream_id].feed(frame)

    def _set_timer(self) -> None:
        self._timer_at = self.session.next_deadline()
        self._timer = asyncio.get_running_loop().call_at(self._timer_at, self._tick)

    def _tick(self) -> None:
        if self.session.handle_timeout(asyncio.get_running_loop().time()):
            self.lose(f"no answer for {PING_TIMEOUT:g} s")
        else:
            self.wake()
            self._set_timer()


# ---- Registry -------------------------------------------------------------------------------------------------------
# Who has which name: the sessions of clients, and the names they serve. Entries end with their session, for whatever
# reason it ends; whose a name is outlives the server.


class Registration:
    """A client's session in the registry: a link that comes and goes, and the names it serves."""

    def __init__(self, key: str, names: list[str], session: Session) -> None:
        self.id = secrets.token_hex(16)
        self.key, self.names = key, names
        self.link = Link(session)
        self.expiry: asyncio.TimerHandle | None = None


class TunnelRegistry:
    def __init__(self, path: Path, *, grace: float, hold: float) -> None:
        self.sessions: dict[str, Registration] = {}
        self.zones: list[str] = []
        self.draining = False
        self._path, self._grace, self._hold = path, grace, hold
        self._tunnels: dict[str, Registration] = {}
        self._owners: dict[str, str] = {}
        self._latest: dict[str, str] = {}  # name -> the last session that had it, even when it is over
        self.replaced: collections.deque[str] = collections.deque(maxlen=1024)
        self._held: collections.Counter[str] = collections.Counter()  # requests that wait
        self._changed = asyncio.Event()  # a fresh one after each change that they may wait for
        try:
            saved = parse_object(path.read_text())
            self._owners = {str(name): str(key) for name, key in saved["names"].items()}
            self.zones = [str(zone) for zone in saved["zones"]]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TunnelError(f"{path} is damaged; move it away to start with no names taken") from None
        now = asyncio.get_running_loop().time()
        self._last_seen = dict.fromkeys(self._owners, now)  # their clients are about to come back

    def claim(self, key: str, names: list[str]) -> None:
        """Check that a token may have these names, and note that it does. Raises Refused."""
        for name in names:
            if self._owners.get(name, key) != key:
                raise Refused("name", f"the name {name!r} belongs to another token; choose another one with --name")
        fresh = [name for name in names if name not in self._owners]
        for name in names:
            self._owners[name] = self._owners.pop(name, key)  # to the end: the first ones are those unused the longest
        unused = [name for name, owner in self._owners.items() if owner == key and name not in {*self._tunnels, *names}]
        for name in unused[: max(0, sum(owner == key for owner in self._owners.values()) - MAX_NAMES)]:
            del self._owners[name]
        if fresh:
            self._save()

    def bind(self, session: Registration, previous: str) -> None:
        """Give a new session its names. Whoever had one last is replaced, unless it was the same client: `previous`."""
        self.replaced.extend({self._latest.get(name, previous) for name in session.names} - {previous})
        self._latest.update(dict.fromkeys(session.names, session.id))
        for other in {self._tunnels[name] for name in session.names if name in self._tunnels}:
            other.link.session.send_goaway(ErrorCode.REPLACED, "another client with the same token took the name")
            other.link.finish()
            self.end(other, StreamReset(ErrorCode.REPLACED, "replaced by another client"))
        self.sessions[session.id] = session
        self._tunnels.update(dict.fromkeys(session.names, session))

    def connected(self, session: Registration) -> None:
        if session.expiry:
            session.expiry.cancel()
        self._wake()

    def drain(self) -> None:
        """Let no request wait any more."""
        self.draining = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def disconnected(self, session: Registration) -> None:
        """A session has lost its link; it is over after the grace, or now when its client said goodbye."""
        if session.id not in self.sessions or session.link.session.connected:
            return
        loop = asyncio.get_running_loop()
        self._last_seen.update(dict.fromkeys(session.names, loop.time()))
        lost = StreamReset(ErrorCode.LINK_LOST, "the client is gone")
        if session.link.session.goaway or session.link.session.leaving:
            self.end(session, lost)
        else:
            session.expiry = loop.call_later(self._grace, self.end, session, lost)

    def end(self, session: Registration, error: StreamReset) -> None:
        """Forget a session, for whatever reason; its streams fail."""
        for name in session.names:
            if self._tunnels.get(name) is session:
                del self._tunnels[name]
        self.sessions.pop(session.id, None)
        if session.expiry:
            session.expiry.cancel()
        session.link.end(error)

    async def find(self, name: str) -> Registration:
        """Return the session that serves a tunnel; waits for a client that is away for a moment. Raises Unserved."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._hold
        while not ((session := self._tunnels.get(name)) and session.link.session.accepts_streams):
            if self.draining:
                raise Unserved("shutting-down")
            if name not in self._owners:
                raise Unserved("unknown-tunnel")
            until = deadline if session else min(deadline, self._last_seen.get(name, -self._hold) + self._hold)
            if until <= loop.time():
                raise Unserved("tunnel-offline")
            if self._held[name] >= MAX_HELD:
                raise Unserved("busy")
            self._held[name] += 1
            try:
                async with asyncio.timeout_at(until):
                    await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                self._held[name] -= 1
        return session

    def learn_zone(self, zone: str) -> None:
        """Serve tunnels below a host under which a client, who proved to know a token, dialled."""
        if zone not in self.zones:
            self.zones = [*self.zones, zone][-MAX_ZONES:]
            self._save()

    def _save(self) -> None:
        try:
            write_private(self._path, json.dumps({"names": self._owners, "zones": self.zones}, indent=1))
        except OSError as error:
            log.warning("names are not kept: %s", error)


# ---- Visitors -------------------------------------------------------------------------------------------------------
# One request of a visitor and its response. aiohttp reads what visitors send, strictly; what they get is written here,
# so that its framing is ours, and nothing that fails half-way can look complete.

PROBLEMS = {  # X-Pytunnel-Error -> status, and one sentence that names the broken hop and what to do
    "unknown-tunnel": (404, "This server has no tunnel of this name. Check the address, or start pytunnel connect."),
    "tunnel-offline": (503, "The tunnel's client is not connected to this server. Start it again, or try again soon."),
    "local-refused": (502, "The tunnel works, but its local service cannot be reached. Start it, or see the client."),
    "local-reset": (502, "The local service closed the connection before it answered. Its log should say why."),
    "local-timeout": (504, "The local service did not accept the connection in time. See whether it hangs."),
    "local-invalid": (502, "The local service's answer is not valid HTTP. See its log, or try curl -v on the spot."),
    "link-lost": (502, "The tunnel's client went away while it handled the request. Try again when it is back."),
    "busy": (503, "Too many requests are open on this tunnel. Try again soon."),
    "shutting-down": (503, "The server is restarting. Try again soon."),
    "bad-request": (400, "The request is not valid HTTP."),
    "too-large": (431, "The request's header fields are too large."),
    "forbidden": (403, "This address is for pytunnel's client, not for web pages."),
    "not-a-link": (426, f"This address is for pytunnel's client, which speaks {SUBPROTOCOL}."),
    "method": (405, "This method is not for tunnels."),
    "transfer-encoding": (501, "The only transfer coding known here is chunked."),
    "expectation": (417, "The only expectation known here is 100-continue."),
    "internal": (500, "The server made a mistake; its log says which."),
}
PROBLEM_OF = {
    ErrorCode.LOCAL_REFUSED: "local-refused",
    ErrorCode.LOCAL_RESET: "local-reset",
    ErrorCode.LOCAL_TIMEOUT: "local-timeout",
    ErrorCode.LOCAL_INVALID: "local-invalid",
    ErrorCode.LINK_LOST: "link-lost",
    ErrorCode.REPLACED: "link-lost",
    ErrorCode.REFUSED: "busy",
    ErrorCode.SHUTDOWN: "tunnel-offline",
    ErrorCode.CANCEL: "bad-request",
    ErrorCode.PROTOCOL: "local-invalid",
    ErrorCode.INTERNAL: "local-invalid",
}


def _date() -> bytes:
    return email.utils.formatdate(usegmt=True).encode()


def problem_page(problem: str, accept: str, encoder: ResponseEncoder) -> bytes:
    """Return the answer to a request that could not be served: HTML, JSON or text, without a word of the request."""
    status, sentence = PROBLEMS[problem]
    if "text/html" in accept:
        kind = b"text/html; charset=utf-8"
        title = f"{status} {problem}"
        text = f"<!doctype html><title>{title}</title><h1>{title}</h1><p>{html.escape(sentence)}</p>\n"
    elif "json" in accept:
        kind = b"application/json"
        text = json.dumps({"error": problem, "status": status, "message": sentence}) + "\n"
    else:
        kind = b"text/plain; charset=utf-8"
        text = f"{status} {problem}: {sentence}\n"
    body = text.encode()
    headers = [(b"Content-Type", kind), (b"Content-Length", b"%d" % len(body)), (b"X-Pytunnel-Error", problem.encode())]
    if status == 503:
        headers.append((b"Retry-After", b"5"))
    if status == 426:
        headers.append((b"Upgrade", b"websocket"))
    head = ResponseHead(status, http.HTTPStatus(status).phrase.encode(), headers)
    return encoder.head(head, _date()) + encoder.data(body) + encoder.end()


class Delivered:
    """What a handler returns to aiohttp: the response has been written already."""

    def __init__(self, *, keep_alive: bool = False) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to write."""

    async def write_eof(self) -> None:
        """Nor to end."""


class RawPipe(asyncio.StreamReader):
    """Takes a visitor connection's bytes from aiohttp once they are not HTTP any more."""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:  # type: ignore[override]
        """Answer as aiohttp's parsers do: not at the end, nothing left over."""
        super().feed_data(data)
        return False, b""


class Visitor:
    def __init__(self, request: web.BaseRequest, *, keep_alive: bool) -> None:
        message = request._message  # the raw head; its public accessor is deprecated in favour of parsed fields
        self.request = request
        self.method = message.method.encode()
        self.target = message.path.encode("utf-8", "surrogateescape")
        self.headers: Headers = [(name, value) for name, value in message.raw_headers]
        http11 = message.version >= (1, 1)
        asks = http11 and b"upgrade" in field_tokens(self.headers, b"connection")
        self.upgrade = b", ".join(field_values(self.headers, b"upgrade")).lower() if asks else b""
        self.has_body = request.body_exists
        # aiohttp (3.14.5) hands the last trailer of a chunked request to the next request on the connection, as a field
        # of its head. Behind a front that may be somebody else's, so there is no next one.
        keep_alive = keep_alive and http11 and not message.should_close and not message.chunked
        self.encoder = ResponseEncoder(self.method, http11=http11, keep_alive=keep_alive)

    @property
    def unread(self) -> bool:
        """Whether some of the request's content has not been read."""
        return self.has_body and not self.request.content.is_eof()

    async def relay(self, stream: Stream) -> None:
        """Send the request's content to a stream and its response to the visitor; nothing is left running."""
        upload: asyncio.Future[None] | None = None
        if self.has_body:
            upload = asyncio.ensure_future(self._upload(stream, self.request.content.readany))
            stream.on_reset = lambda _: upload and upload.cancel()
        try:
            while (head := ResponseHead.decode(await stream.read_head())).interim:
                self.write(self.encoder.head(head, b""))
            if head.status == 101:
                pipe = self._switch_protocols(head)
                upload = asyncio.ensure_future(self._upload(stream, lambda: pipe.read(SEND_BUFFER)))
                return await self._pipe(stream, upload)
            if upload and not upload.done():
                self.encoder.keep_alive = False  # said in the head: the rest of the request may never be read
            await self._respond(stream, head)
            if upload and not upload.done():
                await asyncio.wait([upload], timeout=LINGER if head.status >= 400 else None)
        finally:
            if upload:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)

    async def fail(self, problem: str) -> None:
        """Answer with an error page, or break the connection off when a response has begun."""
        transport, encoder = self.request.transport, self.encoder
        if encoder.started or transport is None or self.unread:
            encoder.keep_alive = False
        if transport and not encoder.started:
            transport.write(problem_page(problem, self.request.headers.get("Accept", ""), encoder))
        elif transport:
            if encoder.until_close:  # an orderly end would look like a complete response
                linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()

    async def discard(self) -> None:
        """Read on a little when the response came before the request's end: closing at once would swallow it."""
        content, left = self.request.content, MAX_DISCARD
        with contextlib.suppress(Exception):  # aiohttp has several for content that breaks off or breaks the rules
            async with asyncio.timeout(LINGER):
                while left > 0 and (data := await content.readany()):
                    left -= len(data)

    def write(self, data: bytes) -> None:
        """Send bytes of the response as they are. Raises ConnectionError when the visitor is gone."""
        transport = self.request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the visitor is gone")
        if data:
            transport.write(data)

    @staticmethod
    async def _upload(stream: Stream, read: Callable[[], Awaitable[bytes]]) -> None:
        try:
            while data := await read():
                await stream.write(data)
            await stream.write(b"", end=True)
        except StreamReset:
            pass  # the response tells why
        except Exception as error:  # aiohttp has several for content that breaks off or breaks the rules
            stream.abort(ErrorCode.CANCEL, f"the visitor's request broke off: {type(error).__name__}")

    async def _respond(self, stream: Stream, head: ResponseHead) -> None:
        out = self.encoder.head(head, _date(), end=stream.at_eof)
        while head.has_body(self.method) and not stream.at_eof:  # without a body there is no end to wait for
            if not stream.readable or len(out) > SEND_BUFFER:
                self.write(out)
                out = b""
                await self.request.writer.drain()
            try:
                out += self.encoder.data(await stream.read())
            except StreamReset:
                self.write(out)  # what did come, although the connection will break off after it
                raise
        self.write(out + self.encoder.end())
        await self._flush()

    async def _flush(self) -> None:
        """Wait until the kernel has it all, so that nothing is lost when the server stops."""
        transport = self.request.transport
        if transport and transport.get_write_buffer_size():
            transport.set_write_buffer_limits(0)
            await self.request.writer.drain()
            transport.set_write_buffer_limits()

    def _switch_protocols(self, head: ResponseHead) -> RawPipe:
        if not self.upgrade:
            raise MessageError("101 without an Upgrade", 502)
        self.write(self.encoder.head(head, b""))
        pipe = RawPipe(SEND_BUFFER)
        self.request.protocol.set_parser(pipe)  # type: ignore[arg-type]
        assert self.request.transport
        pipe.set_transport(self.request.transport)  # after it: aiohttp resumes reading in there, behind the pipe's back
        return pipe

    async def _pipe(self, stream: Stream, upload: asyncio.Future[None]) -> None:
        try:
            while data := await stream.read():
                self.write(data)
                await self.request.writer.drain()
            await self._flush()
        except asyncio.CancelledError:  # the visitor has closed the connection; what it sent before that still counts
            await asyncio.wait([upload], timeout=LINGER)
            stream.abort(ErrorCode.NO_ERROR, flush=True)
            raise


def _visitor_server(handler: Callable[[web.BaseRequest], Awaitable[Any]]) -> web.Server:
    """Return aiohttp's low-level server, with our own answer to what is not HTTP."""
    from aiohttp import http_exceptions, http_parser, web

    if not http_parser.HttpRequestParser.__module__.endswith("_http_parser"):
        raise TunnelError("aiohttp lacks its C parser, and its other one is not strict; reinstall aiohttp from a wheel")

    class VisitorProtocol(web.RequestHandler):
        __slots__ = ()

        def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: Any = None) -> Any:
            log.info("bad request from %s: %s", request.remote, escape(str(message or exc).splitlines()[0]))
            problem = "too-large" if isinstance(exc, http_exceptions.LineTooLong) else "bad-request"
            encoder = ResponseEncoder(b"GET", http11=True, keep_alive=False)
            if request.transport:
                request.transport.write(problem_page("internal" if status == 500 else problem, "", encoder))
            return Delivered()

    class VisitorServer(web.Server):
        def __call__(self) -> web.RequestHandler:
            return VisitorProtocol(self, loop=asyncio.get_running_loop(), **self._kwargs)

    return VisitorServer(
        handler,
        handler_cancellation=True,
        keepalive_timeout=VISITOR_KEEPALIVE,
        lingering_time=0,
        read_bufsize=SEND_BUFFER,
        max_line_size=MAX_FIELD,
        max_field_size=MAX_FIELD,
        max_headers=MAX_FIELDS,
        auto_decompress=False,
        access_log=None,
    )


# ---- Server ---------------------------------------------------------------------------------------------------------
# Visitors on one side, links of clients on the other: the handshake, and where each request goes.

HEALTHY = ResponseHead(200, b"OK", [(b"Content-Type", b"text/plain"), (b"Content-Length", b"3")])


class TunnelServer:
    """`pytunnel serve`: gives clients who know a token tunnels under names below this host."""

    def __init__(
        self,
        *,
        tokens: Iterable[str],
        state: Path,
        host: str | None = None,
        port: int = DEFAULT_PORT,
        domain: Origin | None = None,
        trusted_proxies: Iterable[str] = (),
        grace: float = GRACE,
        hold: float = HOLD,
    ) -> None:
        self._salt = secrets.token_bytes(16)
        self._verifiers = {key_id(token): Verifier.from_token(token, self._salt) for token in tokens}
        self._fake_secret = secrets.token_bytes(32)
        self._state, self._grace, self._hold = state, grace, hold
        self._host, self.port, self._domain = host, port, domain
        self._trusted = [ipaddress.ip_network(cidr) for cidr in trusted_proxies]
        self._handshakes = self._exchanges = 0
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Listen; `port` is then the real one. Raises TunnelError when the address cannot be had."""
        self._registry = TunnelRegistry(self._state / "names.json", grace=self._grace, hold=self._hold)
        if self._domain:
            self._registry.zones = [self._domain.zone]
        self._http = _visitor_server(self._handle)
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._http, self._host, self.port, backlog=1024)
        except OSError as error:
            where = f"{self._host or '*'}:{self.port}"
            raise TunnelError(f"cannot listen on {where}: {error.strerror}; choose another with --listen") from None
        self.port = self._listener.sockets[0].getsockname()[1]

    async def drain(self) -> None:
        """Take no new visitors or streams, send the clients away, and return when what runs has finished."""
        self._registry.drain()
        self._listener.close()
        for session in self._registry.sessions.values():
            session.link.session.send_goaway(ErrorCode.SHUTDOWN, "the server is restarting")
            session.link.wake()
        while self._exchanges:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """End everything that is left, at once."""
        self._listener.close()
        for session in list(self._registry.sessions.values()):
            self._registry.end(session, StreamReset(ErrorCode.LINK_LOST, "the server stops"))
            session.link.finish()
        await self._http.shutdown(0.2)

    # Requests

    async def _handle(self, request: web.BaseRequest) -> Any:
        visitor = Visitor(request, keep_alive=not self._registry.draining)
        try:
            if (response := await self._route(visitor)) is not None:
                return response
        except Unserved as error:
            await visitor.fail(str(error))
        except StreamReset as error:
            await visitor.fail(PROBLEM_OF.get(error.code, "internal"))
        except MessageError as error:
            visitor.encoder.keep_alive = visitor.encoder.keep_alive and error.status == 502
            problems = {400: "bad-request", 431: "too-large", 501: "transfer-encoding"}
            await visitor.fail(problems.get(error.status, "local-invalid"))
        except ProtocolError:
            await visitor.fail("local-invalid")  # a client that makes up heads
        except ConnectionError:
            visitor.encoder.keep_alive = False
        except Exception:
            log.exception("a request failed")
            await visitor.fail("internal")
        if visitor.unread:
            await visitor.discard()
        return Delivered(keep_alive=visitor.encoder.keep_alive)

    async def _route(self, visitor: Visitor) -> Any:
        check_framing(visitor.headers)
        target, host_field = split_target(visitor.method, visitor.target, visitor.headers)
        host, _ = parse_host(host_field.decode("latin-1"))
        name = tunnel_name(host, self._registry.zones)
        if name is not None:
            visitor.target = target
            await self._forward(visitor, name, host_field)
        elif target == LINK_PATH.encode():
            return await self._serve_link(visitor.request)
        elif target == b"/healthz":
            visitor.write(visitor.encoder.head(HEALTHY, _date()) + visitor.encoder.data(b"ok\n"))
        else:
            raise Unserved("unknown-tunnel")
        return None

    async def _forward(self, visitor: Visitor, name: str, host: bytes) -> None:
        if visitor.method in (b"CONNECT", b"TRACE"):
            raise Unserved("method")
        if self._registry.draining:
            raise Unserved("shutting-down")
        if any(value.lower() != b"100-continue" for value in field_values(visitor.headers, b"expect")):
            raise Unserved("expectation")
        if visitor.upgrade and visitor.has_body:
            raise Unserved("bad-request")
        if b"h2c" in visitor.upgrade:
            visitor.upgrade = b""
        head = self._request_head(visitor, host)
        kind = Kind.UPGRADE if visitor.upgrade else Kind.HTTP
        end = not (visitor.upgrade or visitor.has_body)
        self._exchanges += 1
        try:
            session = await self._registry.find(name)
            with contextlib.closing(session.link.open(session.names.index(name), kind, head, end=end)) as stream:
                await visitor.relay(stream)
        finally:
            self._exchanges -= 1
            self._idle.set()

    def _request_head(self, visitor: Visitor, host: bytes) -> RequestHead:
        headers = end_to_end(visitor.headers, keep_upgrade=bool(visitor.upgrade))
        if field_values(headers, b"host") != [host]:  # absolute-form: the target wins
            headers = [(name, host if name.lower() == b"host" else value) for name, value in headers]
        peer = visitor.request.remote or ""
        trusted = any(ipaddress.ip_address(peer) in network for network in self._trusted)
        headers = forwarded(headers, peer, visitor.request.scheme, host, trusted=trusted)
        return RequestHead(visitor.method, visitor.target, headers)

    # Links

    async def _serve_link(self, request: web.BaseRequest) -> Any:
        from aiohttp import web

        if "Origin" in request.headers:
            raise Unserved("forbidden")
        offered = [name.strip() for name in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        if SUBPROTOCOL not in offered or "Upgrade" not in request.headers:
            raise Unserved("not-a-link")
        if self._handshakes >= MAX_HANDSHAKES or self._registry.draining:
            raise Unserved("shutting-down" if self._registry.draining else "busy")
        ws = web.WebSocketResponse(protocols=(SUBPROTOCOL,), compress=False, max_msg_size=MAX_MESSAGE, timeout=1.0)
        ws.headers["Server"] = "pytunnel"
        transport = request.transport
        assert transport
        self._handshakes += 1
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await ws.prepare(request)
                hello, key, signature = await self._handshake(ws)
            origin = self._domain or Origin.from_url(hello.get("server", str))
            self._registry.learn_zone(origin.zone)
            session, received = await self._session_for(hello, key)
        except (Refused, ProtocolError, MessageError) as error:
            log.info("refused a link from %s: %s", request.remote, escape(str(error)))
            code, retry = (error.code, error.retry) if isinstance(error, Refused) else ("protocol", False)
            with contextlib.suppress(ConnectionError):
                await ws.send_str(encode_message("refused", code=code, reason=str(error), retry=retry))
            return ws
        except (TimeoutError, ConnectionError):
            transport.abort()
            return ws
        except web.HTTPException:
            raise Unserved("not-a-link") from None
        finally:
            self._handshakes -= 1
        ready = encode_message(
            "ready",
            signature=base64.b64encode(signature).decode(),
            session=session.id,
            resumed=session.id == hello.get("session", str, ""),
            received=session.link.session.received,
            tunnels=[{"name": name, "url": origin.url(name)} for name in session.names],
            window=INITIAL_WINDOW,
            streams=MAX_STREAMS,
            agent=f"pytunnel/{__version__}",
        )
        await self._run_link(ws, transport, session, ready, received)
        return ws

    async def _run_link(
        self, ws: web.WebSocketResponse, transport: asyncio.Transport, session: Registration, ready: str, received: int
    ) -> None:
        """Serve a client until its link is lost; the session is suspended or ended then."""
        reason, names = "the connection was closed", ", ".join(session.names)
        try:
            await ws.send_str(ready)
            self._registry.connected(session)
            log.info("%s: connected%s", names, " again" * bool(received))
            reason = await session.link.run(ws, received)
        except ProtocolError as error:
            reason = f"refused: {error}"
            self._registry.end(session, StreamReset(ErrorCode.LINK_LOST, reason))
        finally:
            self._registry.disconnected(session)
            if reason != "finished":
                transport.abort()
            stopped = session.link.session.goaway is not None
            log.info("%s: %s", names, "its client stopped" if stopped else escape(reason))

    async def _handshake(self, ws: web.WebSocketResponse) -> tuple[Message, str, bytes]:
        """Return hello, key and our signature, once the client has proved that it knows the token."""
        hello = await receive_message(ws)
        if hello.get("version", int) != PROTOCOL_VERSION:
            raise Refused("version", f"this server (pytunnel {__version__}) speaks version {PROTOCOL_VERSION} only")
        key = hello.get("key", str)
        seed = _digest(self._fake_secret, key.encode())  # accepts nothing: an unknown key looks like a wrong token
        verifier = self._verifiers.get(key) or Verifier(self._salt, ITERATIONS, seed, seed)
        challenge = encode_message(
            "challenge",
            nonce=hello.get("nonce", str) + secrets.token_urlsafe(18),
            salt=base64.b64encode(verifier.salt).decode(),
            iterations=verifier.iterations,
        )
        await ws.send_str(challenge)
        proof = (await receive_message(ws)).bytes("proof")
        auth_message = f"{hello.text}\n{challenge}".encode()
        if not verifier.accepts(proof, auth_message):
            raise Refused("token", "the server does not know this token; see what `pytunnel serve` printed")
        return hello, key, verifier.signature(auth_message)

    async def _session_for(self, hello: Message, key: str) -> tuple[Registration, int]:
        """Return the session that a hello asks for, and how many of its frames the client has received."""
        previous = hello.get("session", str, "")
        if previous in self._registry.replaced:
            raise Refused("replaced", "another client with the same token has taken the name since")
        session = self._registry.sessions.get(previous)
        if session and session.key == key:
            await session.link.detach("its client came back on another connection")
            received = hello.number("received", 0, 2**63)
            if session.id in self._registry.sessions and session.link.session.may_resume(received):
                return session, received
        names = [check_name(str(name)) for name in hello.get("tunnels", list)]
        if not 0 < len(names) <= MAX_TUNNELS or len(set(names)) != len(names):
            raise ProtocolError(f"{len(names)} tunnels, allowed 1 to {MAX_TUNNELS} with different names")
        state = Session(
            is_server=True,
            send_window=hello.number("window", 1, MAX_WINDOW, INITIAL_WINDOW),
            max_streams=min(MAX_STREAMS, hello.number("streams", 1, MAX_WINDOW, MAX_STREAMS)),
        )
        self._registry.claim(key, names)
        session = Registration(key, names, state)
        self._registry.bind(session, previous)
        return session, 0


# ---- Local service --------------------------------------------------------------------------------------------------
# Where a tunnel leads on this machine, and connections to it. Only what the user named is ever dialled.


def _describe(error: BaseException | None) -> str:
    """Return an exception as a few words for a user."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if status := getattr(error, "status", None):  # of aiohttp's WSServerHandshakeError
        return f"the answer was HTTP status {status}"
    error = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error  # aiohttp wraps them
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS; is it http://?"
    if isinstance(error, socket.gaierror):
        return "no such host"
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0).lower()
    return escape(str(error) or type(error).__name__)


class Target(NamedTuple):
    """A local service: where it is, and how the user wrote it."""

    text: str
    host: str  # or the path of a Unix socket
    port: int  # 0 for a Unix socket
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `3000`, `host:port`, `http://…`, `https://…` or `unix:/path`. Raises UsageError."""
        if text.startswith("unix:/"):
            return cls(text, text.removeprefix("unix:"), 0)
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = "http", text
        if re.fullmatch(r"[0-9]{1,5}", rest) and not separator:
            rest = f"localhost:{rest}"
        try:
            host, port = parse_host(rest.removesuffix("/"))
        except MessageError:
            host, port = "", None
        if scheme not in ("http", "https") or not host or port == 0 or not (port or separator):
            forms = "a port like 3000, host:port, http://host:port, https://host:port or unix:/path"
            raise UsageError(f"{escape(text)!r} is not a target: give {forms}")
        return cls(text, host.strip("[]"), port or DEFAULT_PORTS[scheme], scheme == "https")

    @property
    def addresses(self) -> list[str]:
        """What to connect to, in order: `localhost` means both loopbacks, wherever the service listens."""
        return ["127.0.0.1", "::1"] if self.host == "localhost" else [self.host]

    @property
    def is_loopback(self) -> bool:
        """Whether the connection never leaves this machine."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


class LocalConnection(asyncio.Protocol):
    """One connection to a local service, with back-pressure both ways; one reader, one writer."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.idle_since = 0.0
        self._transport: asyncio.Transport
        self._chunks: collections.deque[bytes] = collections.deque()
        self._buffered = 0
        self._eof = False
        self._error: Exception | None = None
        self._readable, self._writable = asyncio.Event(), asyncio.Event()
        self._writable.set()

    # The user's side

    @property
    def reusable(self) -> bool:
        """Whether nothing has come, not even an end, since the last response."""
        return not (self._eof or self._chunks or self.closed.is_set())

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end. Raises ConnectionError."""
        while not self._chunks:
            if self._error:
                raise ConnectionResetError(str(self._error))
            if self._eof:
                return b""
            self._readable.clear()
            await self._readable.wait()
        data = self._chunks.popleft()
        if self._buffered > READ_BUFFER >= self._buffered - len(data):
            self._transport.resume_reading()
        self._buffered -= len(data)
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the service does not take them. Raises ConnectionError."""
        if self.closed.is_set():
            raise ConnectionResetError("the local service closed the connection")
        self._transport.write(data)
        await self._writable.wait()

    def write_eof(self) -> None:
        """Half-close, where the transport can."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        if self._buffered <= READ_BUFFER < self._buffered + len(data):
            self._transport.pause_reading()
        self._buffered += len(data)
        self._readable.set()

    def eof_received(self) -> bool:
        self._eof = True
        self._readable.set()
        return self._transport.can_write_eof()  # the other direction stays open, where there are two

    def connection_lost(self, exc: Exception | None) -> None:
        self._eof, self._error = True, exc
        self.closed.set()
        self._readable.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


class LocalService:
    """Connections to one target, kept for the next request while they are fresh."""

    def __init__(self, target: Target, *, insecure: bool) -> None:
        self.target = target
        self._idle: list[LocalConnection] = []
        self._pruning: asyncio.TimerHandle | None = None
        self._address = target.addresses[0]
        self._tls: ssl.SSLContext | None = None
        if target.tls:
            self._tls = ssl.create_default_context()
            if insecure or target.is_loopback:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE

    def take_idle(self) -> LocalConnection | None:
        """Return a connection that was used before, the freshest one, if there is any."""
        oldest = asyncio.get_running_loop().time() - LOCAL_IDLE
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    def give_back(self, connection: LocalConnection) -> None:
        """Keep a connection whose response is complete."""
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if len(self._idle) > MAX_LOCAL_IDLE:
            self._idle.pop(0).abort()
        if self._pruning is None:
            self._pruning = loop.call_later(LOCAL_IDLE, self._prune)

    def _prune(self) -> None:
        oldest = asyncio.get_running_loop().time() - LOCAL_IDLE
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.pop(0).abort()
        again = self._idle and asyncio.get_running_loop().call_at(self._idle[0].idle_since + LOCAL_IDLE, self._prune)
        self._pruning = again or None

    async def connect(self) -> LocalConnection:
        """Return a new connection. Raises StreamReset with the code for the visitor."""
        loop = asyncio.get_running_loop()
        error: OSError | None = None
        for address in sorted(self.target.addresses, key=lambda address: address != self._address):
            try:
                async with asyncio.timeout(LOCAL_CONNECT_TIMEOUT):
                    if self.target.port:
                        _, connection = await loop.create_connection(
                            LocalConnection,
                            address,
                            self.target.port,
                            ssl=self._tls,
                            server_hostname=self.target.host if self._tls else None,
                        )
                    else:
                        _, connection = await loop.create_unix_connection(LocalConnection, self.target.host)
            except TimeoutError:
                kind = "TLS connection" if self._tls else "connection"
                reason = f"no {kind} to {self.target.text} within {LOCAL_CONNECT_TIMEOUT:g} s"
                raise StreamReset(ErrorCode.LOCAL_TIMEOUT, reason) from None
            except OSError as failure:
                error = error or failure
            else:
                self._address = address
                return connection
        raise StreamReset(ErrorCode.LOCAL_REFUSED, f"cannot connect to {self.target.text}: {_describe(error)}")

    def close(self) -> None:
        """Drop the idle connections."""
        if self._pruning:
            self._pruning.cancel()
        while self._idle:
            self._idle.pop().abort()


# ---- Forwarding -----------------------------------------------------------------------------------------------------
# One exchange from its stream to the local service and back. HTTP/1.1 is spoken here and not by a client library:
# those are no relays, they merge, drop and re-quote.


class Forwarding:
    """One exchange on its way from a stream to the local service and back."""

    def __init__(self, stream: Stream, service: LocalService, head: RequestHead, exchange: Exchange) -> None:
        self._stream, self._service, self._head, self._exchange = stream, service, head, exchange
        self._parser = ResponseParser(head.method)
        self._has_body = stream.has_content and stream.kind is Kind.HTTP
        self._chunked = self._has_body and not field_values(head.headers, b"content-length")
        self._received = False  # any byte of a response

    async def run(self) -> None:
        """Carry the exchange to its end. Raises StreamReset when it has none."""
        safe = self._head.method in (b"GET", b"HEAD", b"OPTIONS") and not self._has_body
        connection = self._service.take_idle() if safe and self._stream.kind is Kind.HTTP else None
        if connection:
            try:
                return await self._attempt(connection)
            except StreamReset:
                if self._received:
                    raise
            # It closed the idle connection just as the request went out. Nothing was answered, and the method is safe
            # (RFC 9110 section 9.2.2): once more. Other methods never use a connection that may be about to close.
        await self._attempt(await self._service.connect())

    async def _attempt(self, connection: LocalConnection) -> None:
        upload, kept = None, False
        try:
            await connection.write(self._head.to_wire(chunked=self._chunked, upgrade=self._stream.kind is Kind.UPGRADE))
            if self._has_body:
                upload = asyncio.ensure_future(self._upload(connection, chunked=self._chunked))
            await self._respond(connection)
            assert self._parser.head
            if self._parser.head.status == 101:
                upload = asyncio.ensure_future(self._upload(connection, chunked=False))
                upload.add_done_callback(lambda _: connection.write_eof())
                await self._pipe(connection)
            elif upload and not upload.done():
                await self._finish_upload(connection, upload, self._parser.head.status)
            if self._parser.keep_alive and (upload is None or (upload.done() and upload.result())):
                self._service.give_back(connection)
                kept = True
        except ConnectionError as error:
            raise StreamReset(ErrorCode.LOCAL_RESET, f"{self._service.target.text}: {_describe(error)}") from None
        except MessageError as error:
            raise StreamReset(ErrorCode.LOCAL_INVALID, f"{self._service.target.text}: {error}") from None
        finally:
            if not kept:
                connection.abort()  # first, because the wait below may be cancelled
            if upload:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)

    async def _respond(self, connection: LocalConnection) -> None:
        parser = self._parser
        while not parser.done:
            data = await connection.read()
            if data:
                self._received = True
                events = parser.receive_data(data)
            else:
                parser.receive_eof()
                events = []
            body = []
            for event in events:
                if isinstance(event, bytes):
                    body.append(event)
                else:
                    self._write_head(event, end=parser.done and event is events[-1])
            await self._write_body(b"".join(body))

    def _write_head(self, head: ResponseHead, *, end: bool) -> None:
        if head.status == 101 and self._stream.kind is not Kind.UPGRADE:
            raise MessageError("101 without an Upgrade", 502)
        if not head.interim:
            self._exchange.status = head.status
        self._stream.write_head(head, end=end and head.status != 101)

    async def _write_body(self, data: bytes) -> None:
        head = self._parser.head
        if head is None or head.status == 101:
            return
        self._exchange.bytes_out += len(data)
        if not self._stream.finished and (data or self._parser.done):
            await self._stream.write(data, end=self._parser.done)

    async def _upload(self, connection: LocalConnection, *, chunked: bool) -> bool:
        """Send the request's content, or a pipe's bytes; True says that all of it went out."""
        try:
            while data := await self._stream.read():
                self._exchange.bytes_in += len(data)
                await connection.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if chunked:
                await connection.write(b"0\r\n\r\n")
            return True
        except (ConnectionError, StreamReset):
            return False  # the response, or its absence, tells the rest

    async def _finish_upload(self, connection: LocalConnection, upload: asyncio.Future[bool], status: int) -> None:
        """The response came early. The service may still want the rest; after an error it has LINGER seconds for it."""
        closed: asyncio.Future[bool] = asyncio.ensure_future(connection.closed.wait())
        try:
            timeout = LINGER if status >= 400 else None
            await asyncio.wait([upload, closed], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()

    async def _pipe(self, connection: LocalConnection) -> None:
        """Move the local service's bytes after a 101, whatever they are, until it ends."""
        data = self._parser.excess
        while data or (data := await connection.read()):
            self._exchange.bytes_out += len(data)
            await self._stream.write(data)
            data = b""
        await self._stream.write(b"", end=True)


# ---- Client ---------------------------------------------------------------------------------------------------------
# Dials the server, for ever, and hands each stream to its local service.


def backoff() -> Iterator[float]:
    """Seconds to wait before each dial: none at first, then doubling, half of each random."""
    yield 0.0
    delay = BACKOFF_MIN
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, BACKOFF_MAX)


class Tunnel(NamedTuple):
    """What one tunnel of this client is called and leads to."""

    name: str
    target: Target


class TunnelClient:
    """`pytunnel connect`: one session with a server, and the local services behind its tunnels."""

    def __init__(
        self,
        server: str,
        token: str,
        tunnels: list[Tunnel],
        *,
        insecure: bool = False,
        on_event: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self.server = server
        self.urls: list[str] = []
        self._token, self._tunnels, self._emit = token, tunnels, on_event
        self._services = [LocalService(tunnel.target, insecure=insecure) for tunnel in tunnels]
        self._session_id = ""
        self._link: Link | None = None
        self._forwarding: set[asyncio.Task[None]] = set()
        self._stopping, self._hurrying = asyncio.Event(), asyncio.Event()
        self._fatal: TunnelError | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._give_up_at = self._connected_at = float("inf")
        self._redial: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Serve until `stop`. Raises TunnelError when there is no point in going on."""
        clock = asyncio.ensure_future(self._watch_clock())
        running = asyncio.ensure_future(self._keep_connected())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                await self._say_goodbye(running)
            if running.done():
                running.result()
        finally:
            for task in (clock, running, stopping):
                task.cancel()
            await asyncio.gather(clock, running, stopping, return_exceptions=True)
            await self._end_session(StreamReset(ErrorCode.LINK_LOST, "the client stops"))
            for service in self._services:
                service.close()
            await asyncio.sleep(0)  # one more turn, in which the transports that were aborted close

    def stop(self) -> None:
        """Finish: running exchanges get GOODBYE seconds; a second call ends them."""
        (self._hurrying if self._stopping.is_set() else self._stopping).set()

    @property
    def active(self) -> int:
        """Number of exchanges in flight."""
        return len(self._forwarding)

    # The link

    async def _say_goodbye(self, running: asyncio.Future[None]) -> None:
        link = self._link
        if link and link.session.connected:
            link.session.send_goaway(ErrorCode.NO_ERROR, "goodbye")
            link.wake()
            waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(link.wait_no_streams())]
            waits.append(asyncio.ensure_future(self._hurrying.wait()))
            await asyncio.wait([*waits, running], timeout=GOODBYE, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            link.finish()
            await asyncio.wait([running], timeout=1.0)

    async def _keep_connected(self) -> None:
        import aiohttp

        loop = asyncio.get_running_loop()
        delays = backoff()
        self._give_up_at = loop.time() + DIAL_TIMEOUT
        while True:
            self._connected_at = float("inf")
            try:
                reason = await self._connect()
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                reason = _describe(error)
            except ProtocolError as error:
                reason = f"the server broke the protocol: {error}"
                await self._end_session(StreamReset(ErrorCode.PROTOCOL, reason))
            except Refused as error:
                if not error.retry:
                    raise
                reason = str(error)
            if self._fatal:
                raise self._fatal
            if self._stopping.is_set():
                return
            if loop.time() - self._connected_at > STABLE:
                delays = backoff()
            delay = next(delays) if self.urls else min(next(delays), 1.0)
            if not self.urls and loop.time() + delay + BACKOFF_MIN > self._give_up_at:
                raise Unreachable(f"no server at {self.server}: {reason}; check the address, or start pytunnel serve")
            self._emit("disconnected", reason=reason, retry_in=round(delay, 1))
            await self._pause(delay)

    async def _pause(self, delay: float) -> None:
        self._redial = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._redial

    async def _connect(self) -> str:
        """Dial, shake hands, and use the link until it is lost; return why."""
        loop = asyncio.get_running_loop()
        until = loop.time() + DIAL_TIMEOUT if self.urls else self._give_up_at
        async with self._dial(until) as ws:
            async with asyncio.timeout_at(until):
                ready = await self._handshake(ws)
            link = await self._enter_session(ready)
            self._connected_at = loop.time()
            return await link.run(ws, ready.number("received", 0, 2**63))

    @contextlib.asynccontextmanager
    async def _dial(self, until: float) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        import aiohttp

        sockets: list[socket.socket] = []  # of all addresses that were tried

        async def refuse_redirect(*_: object) -> NoReturn:
            raise aiohttp.ClientError("the server redirects; dial the address that it redirects to")

        def make_socket(info: Any) -> socket.socket:
            sockets.append(socket.socket(*info[:3]))
            return sockets[-1]

        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(refuse_redirect)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=make_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            trace_configs=[trace],
            trust_env=True,
            headers={"User-Agent": f"pytunnel/{__version__}"},
        ) as http_session:
            async with asyncio.timeout_at(until):
                ws = await http_session.ws_connect(
                    self.server + LINK_PATH,
                    protocols=(SUBPROTOCOL,),
                    compress=0,
                    max_msg_size=MAX_MESSAGE,
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                )
            try:
                yield ws
            finally:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        await ws.close()
                for sock in sockets:  # whatever state it is in, so that nothing waits for a dead peer
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    async def _handshake(self, ws: aiohttp.ClientWebSocketResponse) -> Message:
        """Return the server's ready, once both ends have proved that they know the token. Raises Refused."""
        nonce = secrets.token_urlsafe(18)
        link = self._link
        hello = encode_message(
            "hello",
            version=PROTOCOL_VERSION,
            key=key_id(self._token),
            nonce=nonce,
            server=self.server,
            tunnels=[tunnel.name for tunnel in self._tunnels],
            session=self._session_id,
            received=link.session.received if link else 0,
            window=INITIAL_WINDOW,
            streams=MAX_STREAMS,
            agent=f"pytunnel/{__version__}",
        )
        await ws.send_str(hello)
        challenge = await self._answer(ws)
        if not challenge.get("nonce", str).startswith(nonce):
            raise ProtocolError("the server's nonce is not ours")
        auth_message = f"{hello}\n{challenge.text}".encode()
        iterations = challenge.number("iterations", 1, MAX_ITERATIONS)
        proof, signature = client_proof(self._token, challenge.bytes("salt"), iterations, auth_message)
        await ws.send_str(encode_message("proof", proof=base64.b64encode(proof).decode()))
        ready = await self._answer(ws)
        if not hmac.compare_digest(ready.bytes("signature"), signature):
            raise Refused("token", "the server does not know this token itself; is this the right server?")
        return ready

    @staticmethod
    async def _answer(ws: aiohttp.ClientWebSocketResponse) -> Message:
        message = await receive_message(ws)
        if message.get("type", str) == "refused":
            code, reason = message.get("code", str), escape(message.get("reason", str))
            raise Refused(code, reason, retry=message.get("retry", bool))
        return message

    async def _enter_session(self, ready: Message) -> Link:
        """Return the link to run: of the session that goes on, or of a new one."""
        urls = [escape(str(tunnel.get("url"))) for tunnel in ready.get("tunnels", list) if isinstance(tunnel, dict)]
        resumed = ready.get("resumed", bool)
        if not resumed or not self._link:
            if self._link:
                await self._end_session(StreamReset(ErrorCode.LINK_LOST, "the server has forgotten the session"))
            session = Session(
                is_server=False,
                send_window=ready.number("window", 1, MAX_WINDOW),
                max_streams=min(MAX_STREAMS, ready.number("streams", 1, MAX_WINDOW)),
            )
            self._link = Link(session)
            self._link.on_stream, self._link.on_goaway = self._on_stream, self._on_goaway
            self._session_id = ready.get("session", str)
        if urls == self.urls:
            self._emit("reconnected", resumed=resumed)
        else:
            self.urls = urls
            for tunnel, url in zip(self._tunnels, urls, strict=False):
                self._emit("ready", url=url, name=tunnel.name, target=tunnel.target.text)
        return self._link

    async def _end_session(self, error: StreamReset) -> None:
        if self._renewal:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None
        if self._link:
            self._link.end(error)
            self._link = None
            self._session_id = ""
        for task in self._forwarding:
            task.cancel()
        await asyncio.gather(*self._forwarding, return_exceptions=True)

    def _on_goaway(self, code: ErrorCode, reason: str) -> None:
        link = self._link
        assert link
        if code is ErrorCode.REPLACED:
            self._fatal = Refused("replaced", escape(reason))
            link.lose(reason)
        elif not self._renewal:
            self._renewal = asyncio.ensure_future(self._renew(link, reason))

    async def _renew(self, link: Link, reason: str) -> None:
        """The server ends this session: go to a new one as soon as what runs has finished."""
        self._session_id = ""
        await link.wait_no_streams()
        link.lose(escape(reason))

    async def _watch_clock(self) -> None:
        """Redial at once when this machine has slept: the link is dead by then, and a delay is pointless."""
        offset = time.time() - time.monotonic()
        while True:
            await asyncio.sleep(2.0)
            now = time.time() - time.monotonic()
            if abs(now - offset) > CLOCK_JUMP:
                if self._link:
                    self._link.lose("this machine has slept")
                if self._redial and not self._redial.done():
                    self._redial.set_result(None)
            offset = now

    # Streams

    def _on_stream(self, stream: Stream) -> None:
        task = asyncio.ensure_future(self._forward(stream))
        self._forwarding.add(task)

        def reset(code: ErrorCode) -> None:
            # NO_ERROR: the visitor has left, but what it sent before is still to be delivered
            if code is ErrorCode.NO_ERROR and len(self._forwarding) <= MAX_STREAMS:
                asyncio.get_running_loop().call_later(LINGER, task.cancel)
            else:
                task.cancel()

        stream.on_reset = reset

        def done(task: asyncio.Task[None]) -> None:  # not in `_forward`, which a RESET may cancel before it starts
            stream.close()
            self._forwarding.discard(task)

        task.add_done_callback(done)

    async def _forward(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        exchange = Exchange("", "", "", started=loop.time())
        try:
            head = RequestHead.decode(stream.head)
            tunnel, service = self._tunnels[stream.tunnel], self._services[stream.tunnel]
            exchange.tunnel, exchange.method = tunnel.name, head.method.decode()
            exchange.target = head.target.decode("utf-8", "backslashreplace")
            await Forwarding(stream, service, head, exchange).run()
        except StreamReset as error:
            if error.code is not ErrorCode.NO_ERROR:
                exchange.error = error.reason or error.code.name
                exchange.status = exchange.status or PROBLEMS[PROBLEM_OF.get(error.code, "internal")][0]
            stream.abort(error.code, error.reason, flush=True)
        except (ProtocolError, IndexError) as error:
            exchange.error = str(error)
            stream.abort(ErrorCode.PROTOCOL, "a request that makes no sense")
        except asyncio.CancelledError:
            exchange.error = "" if exchange.status == 101 else "the visitor went away"
        except Exception:
            exchange.error = "a bug in pytunnel"
            stream.abort(ErrorCode.INTERNAL)
            log.exception("a request failed")
        finally:
            exchange.ended = loop.time()
            self._emit("request", exchange=exchange)


# ---- Demo -----------------------------------------------------------------------------------------------------------
# A small local service to try a tunnel with: a page, an event stream, a WebSocket and an upload.

DEMO_PAGE = """<!doctype html><meta charset="utf-8"><title>pytunnel demo</title>
<style>body{font:16px/1.5 system-ui;margin:2rem auto;max-width:40rem;padding:0 1rem;color-scheme:light dark}</style>
<h1>It works</h1>
<p>This page came through a pytunnel. So do an <b>event stream</b>: <output id="events">…</output></p>
<p>a <b>WebSocket</b>: <input id="say" value="hello" aria-label="message"> <output id="echo">…</output></p>
<p>and an <b>upload</b>: <input id="file" type="file" aria-label="file"> <output id="upload">none yet</output></p>
<script>
const $ = id => document.getElementById(id)
new EventSource("/events").onmessage = e => $("events").textContent = e.data
const ws = new WebSocket(location.origin.replace("http", "ws") + "/ws")
ws.onopen = $("say").oninput = () => ws.send($("say").value)
ws.onmessage = e => $("echo").textContent = e.data
$("file").onchange = async () => {
  const response = await fetch("/upload", {method: "POST", body: $("file").files[0]})
  $("upload").textContent = await response.text()
}
</script>
"""


@contextlib.asynccontextmanager
async def demo_service() -> AsyncIterator[int]:
    """Run the sample service on a free port of 127.0.0.1, which is what the context gives."""
    from aiohttp import WSMsgType, web

    async def page(_: web.Request) -> web.Response:
        return web.Response(text=DEMO_PAGE, content_type="text/html")

    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        for count in itertools.count(1):
            await response.write(f"data: event {count} at {time.strftime('%H:%M:%S')}\n\n".encode())
            await asyncio.sleep(1.0)
        return response

    async def echo(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            if message.type is WSMsgType.TEXT:
                await ws.send_str(f"echo: {message.data}")
        return ws

    async def upload(request: web.Request) -> web.Response:
        digest, size = hashlib.sha256(), 0
        async for chunk in request.content.iter_any():
            digest.update(chunk)
            size += len(chunk)
        return web.Response(text=f"{size} bytes, SHA-256 {digest.hexdigest()}\n")

    app = web.Application()
    app.add_routes([web.get("/", page), web.get("/events", events), web.get("/ws", echo), web.post("/upload", upload)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


# ---- Settings -------------------------------------------------------------------------------------------------------
# Where values come from: a flag, else the environment, else what a former run remembered, else a default.


def state_directory() -> Path:
    """Return the directory for what is kept between runs: $PYTUNNEL_STATE_DIR, systemd's, or the user's own."""
    for variable in ("PYTUNNEL_STATE_DIR", "STATE_DIRECTORY"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    import platformdirs

    return Path(platformdirs.user_state_dir("pytunnel"))


def make_token() -> str:
    """Return a fresh token of 160 bits."""
    return secrets.token_hex(20)


def check_token(token: str, advice: str = "leave it out, and serve makes one") -> str:
    """Return a token the user gave. Raises UsageError when it could be guessed."""
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"a token has at least 16 letters and digits; {advice}")
    return token


def stored_token(path: Path) -> str:
    """Return the token that serve keeps; it is made at the first start. Raises TunnelError when the file is damaged."""
    try:
        return check_token(read_or_make(path, make_token))
    except (UsageError, UnicodeDecodeError):
        raise TunnelError(f"{path} does not hold a token; remove it, and serve makes a new one") from None
    except OSError as error:
        raise TunnelError(f"{path}: {_describe(error)}; choose another directory with PYTUNNEL_STATE_DIR") from None


def parse_server(text: str) -> str:
    """Return a server's URL from what a user wrote: a host means https, an address or localhost http and port 8080."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    rest = rest.removesuffix("/")
    try:
        host, port = parse_host(rest)
        bare = host == "localhost" or Origin.from_url(f"http://{rest}").zone != host
    except MessageError:
        raise UsageError(f"{escape(text)!r} is not a server: give its URL, like https://t.example.com") from None
    if not scheme:
        scheme = "http" if bare else "https"
        port = port or (DEFAULT_PORT if bare else None)
    if scheme not in ("http", "https"):
        raise UsageError(f"{escape(text)!r} is not a server: the URL begins with https:// or http://")
    return f"{scheme}://{host}" + (f":{port}" if port else "")


def parse_listen(text: str) -> tuple[str | None, int]:
    """Return host and port of `HOST:PORT`, `:PORT` or `PORT`; no host means all addresses. Raises UsageError."""
    host, _, port = text.rpartition(":")
    bare = host.strip("[]")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or (":" in host and host != f"[{bare}]"):
        raise UsageError(f"{escape(text)!r} is not an address to listen on: give HOST:PORT, like 127.0.0.1:8080")
    return bare or None, int(port)


class Memory:
    """What the client remembers of servers it was connected to."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "client.json"
        self.directory = directory
        self.server = ""
        self.tokens: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            saved = parse_object(self._path.read_text())
            self.server = str(saved["server"])
            self.tokens = {str(server): str(token) for server, token in saved["tokens"].items()}

    def remember(self, server: str, token: str) -> None:
        """Keep what worked. A disk that does not let us is no reason to stop."""
        if (self.server, self.tokens.get(server)) != (server, token):
            self.server, self.tokens[server] = server, token
            with contextlib.suppress(OSError):
                write_private(self._path, json.dumps({"server": server, "tokens": self.tokens}, indent=1))

    def token_for(self, server: str) -> str:
        """Return the token for a server: the one that worked, on this machine else the one that serve keeps."""
        if server not in self.tokens and Origin.from_url(server).zone == "localhost":
            with contextlib.suppress(OSError, UnicodeDecodeError):
                return (self.directory / "token").read_text().strip()
        return self.tokens.get(server, "")

    def machine(self) -> str:
        """Return what tells this machine from the user's others, so that its tunnels' names stay."""
        try:
            return read_or_make(self.directory / "machine", lambda: secrets.token_hex(8))
        except (OSError, UnicodeDecodeError):
            return platform.node()


def client_settings(options: argparse.Namespace, memory: Memory) -> tuple[str, str, list[Tunnel]]:
    """Return server, token and tunnels. Raises UsageError or Refused."""
    server = parse_server(options.server or os.environ.get("PYTUNNEL_SERVER") or memory.server or "localhost")
    token = options.token or os.environ.get("PYTUNNEL_TOKEN") or memory.token_for(server)
    if not token:
        raise UsageError(f"no token for {server}: add --token with what `pytunnel serve` printed there")
    check_token(token, "copy the whole of what `pytunnel serve` printed")
    if len(options.name) > 1:
        raise UsageError("--name was given twice; write NAME=TARGET for each, like web=3000 api=8080")
    name = options.name[0] if options.name else os.environ.get("PYTUNNEL_NAME", "")
    tunnels = []
    for text in options.targets:
        label, separator, rest = text.partition("=") if not text.startswith("unix:") else ("", "", "")
        target = Target.parse(rest if separator else text)
        if name and (separator or len(options.targets) > 1):
            raise UsageError("--name and PYTUNNEL_NAME are for one target; write NAME=TARGET, like web=3000 api=8080")
        wanted = label if separator else name
        if wanted:
            check_name(wanted)
        tunnels.append(Tunnel(wanted or default_name(token, memory.machine(), target.text), target))
    if len({tunnel.name for tunnel in tunnels}) < len(tunnels):
        raise UsageError("two targets with one name; give each its own, like web=3000 api=8080")
    return server, token, tunnels


# ---- Command line ---------------------------------------------------------------------------------------------------
# Parse, wire things together, turn signals into stops and errors into one line and an exit status.
# stdout is for programs: the public URL on a line of its own, or with --json one object a line. stderr is for people.

EXAMPLES = {
    "": """\
  pytunnel serve                      on a host that visitors can reach; prints the line to paste at home
  pytunnel connect 3000               at home: gives localhost:3000 a public URL
  pytunnel connect web=3000 api=8080  two tunnels, with names of your choice
  pytunnel demo                       all of it on this machine, with a sample page
""",
    "serve": """\
  pytunnel serve                           port 8080, URLs from the address that clients dial
  pytunnel serve --domain t.example.com    tunnels at NAME.t.example.com, whatever they dial
  pytunnel serve --listen 127.0.0.1:8080 --domain https://t.example.com --trusted-proxy 127.0.0.1
                                           behind Caddy or nginx on the same host
""",
    "connect": """\
  pytunnel connect 3000                            localhost:3000, under a name that stays the same
  pytunnel connect 3000 --name web                 https://web.t.example.com
  pytunnel connect web=3000 api=https://10.0.0.7   two tunnels
  pytunnel connect unix:/run/app.sock              a Unix socket
  pytunnel connect 3000 >url &                     stdout is the URL, when it works, and nothing else
""",
    "demo": """\
  pytunnel demo                        a server, a sample page and a tunnel to it, on this machine alone
  pytunnel demo --listen 127.0.0.1:80  on another port
""",
}


class CommandParser(argparse.ArgumentParser):
    """argparse, with examples before everything else and errors in one line."""

    def format_help(self) -> str:
        """Return the examples, then what argparse has to say."""
        _, _, rest = super().format_help().partition(f"{self.description}\n\n")
        return f"{self.description}\n\n{EXAMPLES[self.prog.partition(' ')[2]]}\n{self.format_usage()}\n{rest}"

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(ExitStatus.USAGE, f"error: {message}; see {self.prog} --help\n")


def _parser() -> CommandParser:
    common = CommandParser(add_help=False)
    common.add_argument("--json", action="store_true", help="events on stdout, one JSON object a line")
    common.add_argument("-v", "--verbose", action="store_true", help="more about links on stderr")
    common.add_argument("--debug", action="store_true", help="frames that arrive, and tracebacks")
    parser = CommandParser(prog="pytunnel", description="A public URL for a service on your machine.")
    parser.add_argument("--version", action="version", version=f"pytunnel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str) -> CommandParser:
        what = summary[0].lower() + summary[1:]
        return commands.add_parser(name, parents=[common], help=what, description=f"{summary}.")

    serve = add("serve", "Serve visitors and tunnels")
    serve.add_argument("--listen", default=f":{DEFAULT_PORT}", metavar="HOST:PORT", help="default: 8080, everywhere")
    serve.add_argument("--domain", metavar="D", help="tunnels are at NAME.D; default: below what clients dial")
    serve.add_argument("--token", metavar="T", help="default: one that is made once and kept")
    serve.add_argument("--trusted-proxy", action="append", default=[], metavar="CIDR", help="believe its X-Forwarded-*")
    serve.add_argument("--grace", type=float, default=GRACE, metavar="S", help=f"sessions outlive links by {GRACE:g} s")
    serve.add_argument("--hold", type=float, default=HOLD, metavar="S", help=f"requests wait {HOLD:g} s for a client")
    serve.add_argument("--drain", type=float, default=DRAIN, metavar="S", help=f"exchanges get {DRAIN:g} s on SIGTERM")
    connect = add("connect", "Give local services public URLs")
    connect.add_argument("targets", nargs="+", metavar="TARGET", help="[NAME=] port, host:port, URL or unix:/path")
    connect.add_argument("--server", metavar="URL", help="default: the last one that worked, else localhost:8080")
    connect.add_argument("--token", metavar="T", help="default: the one remembered for that server")
    connect.add_argument("--name", action="append", default=[], metavar="N", help="default: one that stays the same")
    connect.add_argument("--insecure", action="store_true", help="do not verify a local service's certificate")
    demo = add("demo", "Try it on this machine")
    demo.add_argument("--listen", metavar="HOST:PORT", help=f"default: 127.0.0.1:{DEFAULT_PORT}, or a free port")
    return parser


class Output(threading.Thread):
    """Writes lines to a file descriptor, from a thread of its own: a pipe that is full or closed holds up nobody."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LINES)
        self.start()

    def write(self, line: str | None) -> None:
        """Queue a line; it is dropped when too many wait already. None is the last one."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def run(self) -> None:
        """Write until the last line, or until nobody can read any more."""
        with contextlib.suppress(OSError):
            while (line := self._lines.get()) is not None:
                os.write(self._descriptor, f"{line}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        """Give what is queued a moment to go out."""
        self.write(None)
        self.join(1.0)


class Console:
    """Tells programs and people what happens."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self.stdout, self.stderr = Output(1), Output(2)
        self._last_line = ""

    def emit(self, event: str, **fields: Any) -> None:
        """Report an event."""
        exchange = fields.pop("exchange", None)
        if exchange and self._json:
            fields = {
                "name": exchange.tunnel,
                "method": exchange.method,
                "path": exchange.target,
                "status": exchange.status,
                "ms": round(exchange.duration * 1000, 1),
                "bytes_in": exchange.bytes_in,
                "bytes_out": exchange.bytes_out,
                "error": exchange.error or None,
            }
        line = exchange.line() if exchange else self._line(event, fields)
        if self._json:
            self.stdout.write(json.dumps({"event": event, **fields}))
        else:
            if event == "ready":
                self.stdout.write(fields["url"])
            if line and line != self._last_line:  # an outage is reported once, not at every dial
                self.stderr.write(line)
            self._last_line = line if event == "disconnected" else ""

    def fail(self, error: TunnelError) -> None:
        """Report what a command ends with."""
        if self._json:
            self.emit("error", code=error.code, message=str(error))
        self.stderr.write(f"error: {error}")

    def close(self) -> None:
        """Let everything out."""
        self.stdout.close()
        self.stderr.close()

    @staticmethod
    def _line(event: str, fields: dict[str, Any]) -> str:
        if event == "ready":
            return f"{fields['url']} -> {fields['target']}"
        if event == "disconnected":
            return f"not connected: {escape(fields['reason'])}; trying again"
        if event == "reconnected":
            return "connected again, " + ("nothing lost" if fields["resumed"] else "but what was running is lost")
        return ""


@contextlib.contextmanager
def _signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on SIGINT, SIGTERM, and when the terminal is closed."""
    loop = asyncio.get_running_loop()
    caught = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        caught.append(signal.SIGHUP)
    for number in caught:
        try:
            loop.add_signal_handler(number, handler)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(handler))
    try:
        yield
    finally:
        for number in caught:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)


async def _serve(options: argparse.Namespace, console: Console) -> int:
    state = state_directory()
    host, port = parse_listen(options.listen)
    given = options.token or os.environ.get("PYTUNNEL_TOKEN")
    token = check_token(given) if given else stored_token(state / "token")
    domain = None
    if options.domain:
        domain = Origin.from_url(parse_server(options.domain))
    try:
        server = TunnelServer(
            tokens=[token],
            state=state,
            host=host,
            port=port,
            domain=domain,
            trusted_proxies=options.trusted_proxy,
            grace=options.grace,
            hold=options.hold,
        )
    except ValueError as error:
        raise UsageError(f"--trusted-proxy: {error}; give an address or a network, like 10.0.0.0/8") from None
    await server.start()
    signals: asyncio.Queue[None] = asyncio.Queue()
    with _signals(lambda: signals.put_nowait(None)):
        console.emit("listening", host=host or "*", port=server.port)
        if not options.json:
            console.stderr.write(_invitation(host, server.port, domain, token if not given else "", state / "token"))
        await signals.get()
        log.info("stopping; running requests have %g s, a second signal ends them", options.drain)
        drained = asyncio.ensure_future(server.drain())
        again = asyncio.ensure_future(signals.get())
        await asyncio.wait([drained, again], timeout=options.drain, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, again):
            task.cancel()
        await asyncio.gather(drained, again, return_exceptions=True)
    await server.close()
    return ExitStatus.OK


def _invitation(host: str | None, port: int, domain: Origin | None, token: str, kept: Path) -> str:
    """Return the one line to paste. A log is no place for a token, so it stands there only on a terminal."""
    if domain:
        url = f"{domain.scheme}://{domain.zone}" + (f":{domain.port}" if domain.port else "")
    else:
        url = f"http://{_dialled(host, _own_address())}:{port}"
    secret = f" --token {token}" if token and sys.stderr.isatty() else ' --token "…"'
    where = f"   (the token is in {kept})" if token and not sys.stderr.isatty() else ""
    line = f"pytunnel connect 3000 --server {url}{secret}{where}"
    where = "" if domain else " (or with another address of this host that visitors can reach)"
    return f"listening on port {port}; on the machine with your service, run{where}:\n\n  {line}\n"


def _dialled(host: str | None, everywhere: str) -> str:
    """Return the host of a URL that reaches what listens on `host`; `everywhere` stands for all addresses."""
    if host in (None, "0.0.0.0", "::"):
        return everywhere
    return f"[{host}]" if ":" in host else host


def _own_address() -> str:
    """Return the address that this machine has towards the internet; nothing is sent to find out."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1: connecting a datagram socket only chooses a route
        return str(probe.getsockname()[0])
    return "localhost"


async def _run_client(client: TunnelClient, console: Console) -> int:
    def stop() -> None:
        if client.active:
            console.stderr.write(f"finishing what still runs ({client.active}); once more to stop now")
        client.stop()

    with _signals(stop):
        await client.run()
    console.emit("closed")
    return ExitStatus.OK if client.urls else ExitStatus.INTERRUPTED


async def _connect(options: argparse.Namespace, console: Console) -> int:
    memory = Memory(state_directory())
    server, token, tunnels = client_settings(options, memory)

    def emit(event: str, **fields: Any) -> None:
        if event == "ready":
            memory.remember(server, token)
        console.emit(event, **fields)

    if server.startswith("http:") and Origin.from_url(server).zone != "localhost":
        console.stderr.write("warning: the link is not encrypted; put Caddy or nginx in front of serve and use https://")
    return await _run_client(TunnelClient(server, token, tunnels, insecure=options.insecure, on_event=emit), console)


async def _demo(options: argparse.Namespace, console: Console) -> int:
    import tempfile

    token = make_token()
    host, port = parse_listen(options.listen or f"127.0.0.1:{DEFAULT_PORT}")
    with tempfile.TemporaryDirectory(prefix="pytunnel-demo-") as directory:
        server = TunnelServer(tokens=[token], state=Path(directory), host=host, port=port)
        try:
            await server.start()
        except TunnelError:
            if options.listen:
                raise
            server.port = 0
            await server.start()
        try:
            async with demo_service() as local:
                tunnel = Tunnel("demo", Target.parse(f"127.0.0.1:{local}"))
                url = f"http://{_dialled(host, '127.0.0.1')}:{server.port}"
                client = TunnelClient(url, token, [tunnel], on_event=console.emit)
                return await _run_client(client, console)
        finally:
            await server.close()


def _run(command: Callable[[argparse.Namespace, Console], Any], options: argparse.Namespace, console: Console) -> int:
    """Run a command on uvloop when it is installed, else on asyncio's own loop. Raises TunnelError."""
    factory = None
    if os.environ.get("PYTUNNEL_LOOP") != "asyncio":
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return int(runner.run(command(options, console)))
    except ModuleNotFoundError as error:
        packages = "aiohttp zstandard platformdirs"
        raise TunnelError(f"the package {error.name} is missing; run: python3 -m pip install {packages}") from error
    except OSError as error:
        raise TunnelError(f"{_describe(error)}: {error.filename or ''}".rstrip(": ")) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog = f"pytunnel {options.command}"
        parser.error(f"unrecognized arguments: {escape(' '.join(unknown))}")
    console = Console(as_json=options.json)
    handler = logging.Handler()
    handler.emit = lambda record: console.stderr.write(handler.format(record))  # type: ignore[method-assign]
    logging.basicConfig(handlers=[handler], format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    chatty = options.verbose or options.command == "serve"
    log.setLevel(logging.DEBUG if options.debug else logging.INFO if chatty else logging.WARNING)
    try:
        return _run({"serve": _serve, "connect": _connect, "demo": _demo}[options.command], options, console)
    except TunnelError as error:
        log.debug("stopped", exc_info=True)
        console.fail(error)
        return error.exit_status
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    finally:
        console.close()


if __name__ == "__main__":
    sys.exit(main())
