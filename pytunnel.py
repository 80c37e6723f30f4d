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
    0 DATA      a chunk, at most 256 KiB; with ZSTD    END, BLOCKED, ZSTD, yes
                one zstd frame that states the length  ASK
                of such a chunk (RFC 8878)
    1 HEAD      status, reason, name, value, ...       END, INTERIM, ASK   yes
    2 OPEN      tunnel index (16 bits), kind (8 bits), END, ASK            yes
                ms waited on the server (32 bits),
                method, target, name, value, ...;
                of kind TCP: `TCP`, visitor's address
    3 RESET     code (16 bits), reason                                     yes
    6 PING      8 opaque bytes, link-level                                 no
    7 GOAWAY    code (16 bits), reason: no new streams                     yes
    8 WINDOW    credit in bytes (32 bits)                                  yes
    9 ACK       count of counted frames received (64 bits), link-level     no
    10 PONG     the PING's 8 bytes, link-level                             no
    128..255    reserved for extensions: ignored                           no

Heads are byte strings joined by NUL. Only the server opens streams; ids grow and are never reused. Both sides count
the counted frames. A new link states in its handshake how many each side has received, and what is missing is sent
again: no frame is lost and none is delivered twice. Who breaks these rules gets a GOAWAY that says how, and close code
1002; the session is over.

Sections, in order; each uses only what stands above it, and those before State do no I/O
----------------------------------------------------------------------------------------
Imports and version
Limits and defaults
Safe text
Errors
WebSocket
Frames
Flow control
Compression
Session
HTTP/1.1 messages
Handshake
Callers
Metrics
Exchanges
Views
Screen
State
Tokens
Link
Connections
Registry
Certificates
ACME
Visitors
Server
Local service
Forwarding
Client
Files
Inspector
Terminal
Demo
Settings
Running clients
Python API
Doctor
Console
Commands
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
import atexit
import base64
import codecs
import collections
import contextlib
import datetime
import difflib
import email.utils
import enum
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import html
import http
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import queue
import random
import re
import secrets
import select
import shlex
import signal
import socket
import ssl
import stat
import struct
import subprocess
import textwrap
import threading
import time
import tomllib
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    TypeVarTuple,
    cast,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Generator

    import aiohttp
    import zstandard
    from aiohttp import web
    from aiohttp.http_parser import RawRequestMessage

__version__ = "0.1.0"
__all__ = ["Exchange", "Session", "TunnelClient", "TunnelError", "TunnelServer", "connect", "main", "serve"]

log = logging.getLogger("pytunnel")

# ---- Limits and defaults --------------------------------------------------------------------------------------------
# Every number that a peer or a visitor could push is bounded here, once, with its unit and its reason.
# A session's worst case on either side is MAX_STREAMS x INITIAL_WINDOW + MAX_WIDENED of unread bodies (144 MiB),
# MAX_INTERIM + 1 heads and twice HISTORY of each of these streams, and MAX_PENDING of other frames; it takes that many
# stopped readers.

KiB = 1024
MiB = 1024 * KiB

MAX_DATA = 256 * KiB  # bytes of a DATA frame; one read of asyncio's transports, so a fast link moves whole reads
MIN_COMPRESSED = 1 * KiB  # bytes of a chunk that is worth compressing: a packet carries less at no cost
FIRST_RATIO = 2.0  # what a stream is expected to have before its first chunk, for the length of that
MAX_RATIO = 8.0  # of the same that the next chunk is expected to have, which may not compress at all: 8 turns at most
MIN_RATIO = 1.1  # of content to what is sent for it; a stream whose chunk saves less is not compressed any more
COMPRESS_RATE = 12.5e6  # bytes a second, 100 Mbit/s; compressing for a faster link would take half of a core and more
ZSTD_LEVEL = 3  # 1 takes three fifths of the time for 6 to 8 % more bytes
SLOW_RATE, SLOW_LEVEL = 4e6, 6  # bytes a second that leave time for twice as much of it, for 5 to 13 % fewer bytes
HISTORY = 64 * KiB  # bytes before a chunk that it may refer to; kept at both ends, for each stream and way that has any
MAX_HEAD = 64 * KiB  # bytes of a head; HAProxy allows 16 KiB, nginx 32 KiB, real cookies need more than 8
MAX_FIELDS = 128  # header fields of one head (HAProxy 101, aiohttp 128)
MAX_CONTROL = 1 * KiB  # bytes of a RESET's or GOAWAY's payload
MAX_MESSAGE = 1 * MiB  # bytes of one WebSocket message: a batch and the frame that reached over its limit
MAX_BATCH = 256 * KiB  # bytes that one message collects before it goes out
LINK_BUFFER = MAX_BATCH + 1 * KiB  # bytes read from a link at a time: a message with a chunk and what goes along
MAX_WOKEN = 16  # times that something became ready to be sent before a message goes out within the turn
MAX_FRAMES = 1000  # frames taken before others have their turn of the event loop: 5 ms, where a message may hold 80,000
ZSTD_FRAMES = 30  # of these that a compressed one counts for: its content takes up to 0.3 ms to unpack
TURN_TIME = 0.0025  # seconds of the link that a stream has before it is the next one's turn, and that a message takes:
MIN_TURN = 2 * KiB  # bytes at least, which 1 KB/s carries well within PING_TIMEOUT,
MAX_TURN = MAX_DATA  # and at most
QUEUE_TIME = 0.005  # seconds that what we have sent may wait in the queues on the way: two turns
FIRST_CAP = 64 * KiB  # bytes in flight on a new link; five times of what TCP starts with (RFC 6928)
FAST_RATE = 32 * MiB  # bytes a second of a path that is no home's uplink; what waits there waits for a busy process,
FAST_CAP = 4 * MiB  # so that it may have so much in flight at least
MIN_CAP = 2 * MIN_TURN  # bytes in flight at least: one turn on its way while the other is acknowledged
MIN_ROUND = 0.1  # seconds in which the smallest of several round trips is free of jitter
PROBE_INTERVAL = 10.0  # seconds that a round trip counts as the smallest (as BBR does)
PROBE_DELAY = 1.0  # seconds after which a queue that does not shrink with what we send is the path's own
INITIAL_WINDOW = 256 * KiB  # bytes of credit for a new stream (yamux uses the same)
MAX_STREAM_WINDOW = 16 * MiB  # bytes one stream's window may grow to; MAX_UNACKED makes of it 500 Mbit/s over 130 ms
MAX_WIDENED = 16 * MiB  # bytes that the windows of a session have grown by, all together; an eighth of the initial ones
MIN_STARVED = 0.0001  # seconds without anything to read before a window counts as too small: a round trip of loopback
MAX_WINDOW = 2**31 - 1  # bytes of credit a peer may ever add up to (RFC 9113 section 6.9.1)
SEND_BUFFER = 64 * KiB  # bytes a stream may queue before its writer waits
MAX_UNACKED = 8 * MiB  # bytes kept for resume; at this bound no more DATA is taken
MAX_UNACKED_FRAMES = 65536  # frames kept for resume, or waiting; a peer that never acknowledges, or reads, is cut here
MAX_PENDING = 16 * MiB  # bytes of frames kept for resume and of control frames waiting; past it no stream is opened
ACK_BYTES = 256 * KiB  # bytes received before an acknowledgement is sent at once
ACK_DELAY = 0.1  # seconds an acknowledgement may wait for company,
ACK_PAUSE = 0.002  # and those from one in company to the next: thousands of messages a second need no ACK each
HTTP_SHARE = 8  # one of so many streams is for HTTP, where a session has both: TCP connections may be idle for days
MAX_STREAMS = 512  # streams of one session at a time, and requests of one token with a label, as above
MAX_STREAM_ID = 2**31 - 1  # RFC 9113 section 5.1.1; a session that used it up is replaced by a fresh one
MAX_CHUNKING = 16  # bytes of framing per byte of chunked content, beyond MAX_HEAD; Go's net/http allows as much
MAX_INTERIM = 10  # 1xx responses before a final one
MAX_PENDING_PONGS = 16  # PINGs not yet answered; more is a flood

PING_INTERVAL = 15.0  # seconds of silence before a PING: below nginx's 60 s and Cloudflare's 100 s
PING_TIMEOUT = 10.0  # seconds to answer; a dead link is noticed within the sum of both
WRITE_TIMEOUT = 10.0  # seconds without room in the transport, or an ACK that was asked for; then the link is lost
HANDSHAKE_TIMEOUT = 10.0  # seconds for the whole handshake
MAX_HANDSHAKES = 1024  # links at a time that have not shown their token yet,
MAX_HANDSHAKES_EACH = 32  # and of these, of one address
MAX_NESTING = 16  # objects and lists of JSON inside each other
MAX_HELLO = 32 * KiB  # bytes of a handshake message: MAX_TUNNELS names take 4 KiB of it, twice; and MAX_RULES
MAX_RULES = 22 * KiB  # bytes of a hello that tell whom its tunnels let in; a password for each of MAX_TUNNELS takes 12
MAX_CREDENTIALS = 32  # users with passwords of one tunnel; a visitor's is compared with each
MAX_NETWORKS = 64  # networks of one tunnel
MAX_TUNNELS = 64  # tunnels of one session, and of one token with a label unless `token add` says otherwise
MAX_NAMES = 100  # names one token may own on a server; those unused the longest make room for new ones
MAX_TCP_PORTS = 1000  # ports of a server for TCP tunnels; each takes two listening sockets, IPv4 and IPv6
MAX_REVOKED = 1000  # revoked tokens whose names a server still frees when it sees them
MAX_ZONES = 16  # host names by which who runs it has dialled this server; each serves tunnels below it
MAX_REPLACED = 64  # sessions of one token that were replaced, and must not take their names back
MAX_ITERATIONS = 100_000  # PBKDF2 rounds a server may ask a client for
ITERATIONS = 4096  # PBKDF2 rounds, the least RFC 7677 allows: our tokens are random, not memorable, and a server
# that asks a client for fewer is after its proof, to try tokens on

GRACE = 120.0  # seconds a session outlives its link: a sleep in the train tunnel, not one over lunch
HOLD = 30.0  # seconds a request waits for a client that is away
MAX_HELD = 128  # requests that wait for one tunnel's client at a time
DRAIN = 30.0  # seconds the server lets running exchanges finish after SIGTERM
GOODBYE = 5.0  # seconds the client lets them finish after SIGINT or SIGTERM
LAST_WORD = 1.0  # seconds a peer that broke the protocol has to take our GOAWAY before its connection is cut
LINGER = 10.0  # seconds an upload may go on after an error response (nginx lingering_time is 30)
MAX_DISCARD = 16 * MiB  # bytes of it that are read and thrown away, so that the visitor gets to see the response

DIAL_TIMEOUT = 10.0  # seconds for one dial with its handshake; the first one may take no longer, retries included
BACKOFF_MIN = 0.2  # seconds; doubled to the maximum, with jitter
BACKOFF_MAX = 30.0
STABLE = 2.0  # seconds a link must hold before its loss is answered by a dial at once
CLOCK_JUMP = 5.0  # seconds between the wall and the monotonic clock that mean this machine has slept

ACME_TIMEOUT = 20.0  # seconds for an answer of a certificate authority
ORDER_TIMEOUT = 90.0  # seconds for its look at us, and for the certificate after that
ACME_BACKOFF = 60.0  # seconds until an order that has failed is tried again; doubled to
ACME_BACKOFF_MAX = 86400.0  # at the most: Let's Encrypt bears 5 failures of a name at once, and 5 an hour after that
ACME_WEEK = 7 * 86400.0  # seconds in which no more than
MAX_NEW_HOSTS = 40  # hosts get their first certificate: Let's Encrypt allows 50 below a domain
MAX_ORDERS, ORDER_RATE = 100, 150 / (3 * 3600)  # orders at once, and a second after that: Let's Encrypt allows 300 new
# ones in 3 hours, and all that fail count as well
RENEWAL_SHARE = 1 / 3  # of a certificate's lifetime that is left when it is renewed
KEEP_EXPIRED = 30 * 86400.0  # seconds that a certificate has been expired when its file is removed: clocks go wrong
ACME_TICK = 3600.0  # seconds at most between two looks at what is due, whatever a clock that is set does

CHECK_TIMEOUT = 5.0  # seconds for each of doctor's checks
MAX_SKEW = 60.0  # seconds between this machine's clock and the server's before doctor minds
EXPIRES_SOON = 7 * 86400.0  # seconds that a certificate is still good for when doctor and serve begin to mind
REMIND = 86400.0  # seconds between two lines about that in serve's log
RELOAD = 60.0  # seconds until a bad certificate is read again although its file is the same: the clock may be set

MAX_LINES = 1000  # lines of output that wait for a slow reader
GATHER = 0.02  # seconds in which lines of output wait for company, after the first
MAX_EXCHANGES = 500  # exchanges the client's log keeps
MAX_PREFIX = 256 * KiB  # bytes of each body that are kept with them
MAX_LOG = 32 * MiB  # bytes of heads and bodies in the log; the oldest exchanges make room
MAX_NOTE = 512  # bytes kept of a WebSocket message or an event
MAX_INFLATE = 16 * KiB  # bytes of a compressed WebSocket message that is unpacked
MAX_NOTES = 64  # of these in one exchange, the last ones
MAX_DIFF = 1000  # lines of a response that are compared with another's: the time goes with their product
MAX_VIEW = 1 * MiB  # bytes of a body that are unpacked for a person to see, whatever a bomb holds
MAX_MARKS = 3  # combining marks shown on one character; Vietnamese needs 2, a flood brings a thousand
MAX_SHOWN = 5000  # lines of a body in the terminal view
FRAME = 0.1  # seconds between two frames of the terminal view, at least
ESCAPE = 0.05  # seconds until an ESC that nothing follows is the key
NOTICE = 5.0  # seconds a notice shows
MAX_CLIPBOARD = 100_000  # characters of base64 that go to the terminal: many take no more at a time
REPLAY_TIMEOUT = 30.0  # seconds a replayed request may take: an event stream would take for ever

LOCAL_CONNECT_TIMEOUT = 5.0  # seconds to connect to the local service
LOCAL_IDLE = 4.0  # seconds an idle local connection is kept: Node.js closes its own after 5
MAX_LOCAL_IDLE = 64  # idle local connections kept per target
READ_BUFFER = 256 * KiB  # bytes a local connection reads at a time,
MAX_LARGE_READS = 16  # streams at the most that read so much; with more of them, each reads SEND_BUFFER
VISITOR_KEEPALIVE = 75.0  # seconds an idle visitor connection is kept (nginx keepalive_timeout)
HEAD_TIMEOUT = 10.0  # seconds for a request's whole head, from its first byte or from the connection on
BODY_TIMEOUT = 60.0  # seconds without a byte of a request's content before it counts as given up (nginx: 60)
STALL_TIMEOUT = 60.0  # seconds in which a visitor takes not one byte of its response (nginx send_timeout: 60)
TCP_STALL_TIMEOUT = 600.0  # the same for a TCP tunnel's, where it may be on purpose (nginx proxy_timeout: 600)
GUARD_INTERVAL = 5.0  # seconds between two looks at whether the other end of one is still there, and takes anything
TCP_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds of silence, and between probes
REFUSAL_LINGER = 1.0  # seconds in which a visitor may read why its connection is closed
VISITOR_BACKLOG = 1024  # connections on a port of the server that wait to be accepted
MAX_VISITORS = 10_000  # connections of visitors and clients; less where there are not so many file descriptors
RESERVED_FILES = 32  # file descriptors that are not for them
MAX_EACH = 256  # connections of one address at a time: half of MAX_STREAMS, or 40 browsers behind one NAT
MAX_CALLERS = 10_000  # addresses that are remembered at a time
MAX_ABORTS, ABORT_RATE = 500, 50.0  # requests that an address may abort at once, and a second after that (Envoy: 500)
MAX_GUESSES, GUESS_RATE = 20, 1 / 3  # wrong tokens or passwords of an address at once, and a second after that
MAX_GUESSED = 256  # matters about which an address has been wrong lately, before those that are forgiven are forgotten
MAX_CALLER_LINES, CALLER_LINE_RATE = 1, 1.0  # lines in the log about an address at once, and a second after that
MAX_BUFFERED = 256 * MiB  # bytes that all sessions of a server keep; at this bound no more requests are taken
SHORT_OF_MEMORY = MAX_BUFFERED // 2  # bytes of these from which on no window is larger than at first
TICK = 0.5  # seconds between two looks at that, at how late the event loop is, and at files of tokens and certificates
INSPECTOR_PORTS = 20  # ports from INSPECTOR_PORT on that are tried
MAX_POLL = 25.0  # seconds the inspector's page waits for something new: below what browsers and proxies allow
MAX_CLIENT_HELLO = 32 * KiB  # bytes of a TLS ClientHello with its framing; browsers send 2, post-quantum keys included
MAX_HELLO_RECORDS = 16  # records that it may be cut into, as all are looked at again whenever more of it comes
MAX_EMPTY, EMPTY_RATE = 32, 0.1  # TLS records of a connection that hold no data, at once and a second after that: those
# of a handshake, and KeyUpdates, each of which takes as long as 20 KiB of data (Go: 16 in a row, BoringSSL: 32)
MAX_SECURED, SECURE_RATE = 500, 50.0  # TLS handshakes of an address at once, and a second after that: each takes up to
# 2 ms, so that one address has a tenth of a core at the most
MAX_HOSTS = 256  # Host fields whose reading is remembered; a browser sends the same one again and again,
MAX_REMEMBERED = 128  # as it does with most other fields: heads that came again and are remembered, with what follows
MAX_REMEMBERED_HEAD = 4 * KiB  # from them; longer ones are not. Who makes them up takes 12 MiB of a process at the most
MAX_FIELD = 16 * KiB  # bytes of one visitor header field, and of the request line (HAProxy's 16 KiB)

HSTS_AGE = 365 * 86400.0  # seconds; what browsers ask of sites for their list of those that are https only
DEFAULT_PORT = 8080
INSPECTOR_PORT = 4040
DEFAULT_PORTS = {"http": 80, "https": 443}  # of URLs that name none
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
LINK_PATH = "/_pytunnel/link"
SUBPROTOCOL = "pytunnel.1"
LABEL_PATTERN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,63}")  # of a token; a hyphen in front would be a flag
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
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):  # Python's own bound depends on its version, and on who calls
        inner = itertools.chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        level = [one for one in inner if isinstance(one, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return value


# ---- Errors ---------------------------------------------------------------------------------------------------------
# What can go wrong on purpose; anything else that is raised is a bug.
#
#     TunnelError               one line for the user, with an exit status
#     ├── UsageError            the command line or the environment is wrong
#     ├── Unreachable           the server cannot be reached
#     ├── LocalDown             the local service did not come up
#     ├── NotRun                the command after `--` cannot be run
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
    NOT_RUN = 127
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

    exit_status, code = ExitStatus.UNEXPECTED, "error"


class UsageError(TunnelError):
    exit_status, code = ExitStatus.USAGE, "usage"


class Unreachable(TunnelError):
    exit_status, code = ExitStatus.UNREACHABLE, "unreachable"


class LocalDown(TunnelError):
    exit_status, code = ExitStatus.LOCAL_DOWN, "local-down"


class NotRun(TunnelError):
    exit_status, code = ExitStatus.NOT_RUN, "not-run"


class Refused(TunnelError):
    """The server refused the handshake with `code`; `retry` tells whether trying again makes sense."""

    def __init__(self, code: str, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.code, self.retry = code, retry
        if code == "token":
            self.exit_status = ExitStatus.TOKEN_REFUSED
        elif code in ("name", "limit", "port", "replaced"):
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
    def __init__(self, code: ErrorCode, reason: str = "") -> None:
        super().__init__(f"{code.name}: {reason}" if reason else code.name)
        self.code, self.reason = code, reason


class Unserved(Exception):
    """A visitor's request that cannot be served; `str()` is a key of PROBLEMS."""


# ---- WebSocket ------------------------------------------------------------------------------------------------------
# bytes <-> the parts of a link's messages (RFC 6455 section 5). A message is passed on as it comes, and not kept until
# it is whole, so that what is large costs no memory and what is slow is seen to be alive.


class Opcode(enum.IntEnum):
    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


OPCODES = frozenset(Opcode)
_CONTINUATION, _FIRST_CONTROL = Opcode.CONTINUATION, Opcode.CLOSE  # Python 3.11 takes long for a member of an enum


class CloseCode(enum.IntEnum):
    """Why a WebSocket is closed (RFC 6455 section 7.4.1)."""

    OK = 1000
    PROTOCOL_ERROR = 1002


class MessagePart(NamedTuple):
    """Some bytes of a message; control messages come whole."""

    opcode: int  # of the message
    data: bytes | bytearray | memoryview  # a view: of what was fed
    end: bool  # they are its last ones


@functools.cache
def _masker() -> Callable[[bytes, bytearray], None] | None:
    """Return what masks in place; aiohttp does it 80 times as fast, but promises nobody that it will."""
    with contextlib.suppress(ImportError):
        from aiohttp._websocket.helpers import websocket_mask

        return websocket_mask
    return None


def mask_payload(key: bytes, *pieces: bytes | memoryview) -> bytes | bytearray:
    """Return a payload, in pieces, masked or unmasked with a key of four bytes (section 5.3)."""
    payload = bytearray().join(pieces)
    n = len(payload)
    if n > MAX_CONTROL and (mask := _masker()):
        mask(key, payload)
        return payload
    return (int.from_bytes(payload) ^ int.from_bytes((key * (n // 4 + 1))[:n])).to_bytes(n)


def encode_message_frame(opcode: Opcode, payload: bytes, key: bytes = b"") -> bytes:
    """Return a whole message as one WebSocket frame; a client's are masked with a new key each (section 5.3)."""
    return b"".join(message_frame(opcode, [payload], key))


def message_frame(opcode: Opcode, payload: Sequence[bytes], key: bytes = b"") -> Sequence[bytes | bytearray]:
    """Return the same, of a payload in pieces: in one piece, or in several where it is large, to save a copy."""
    size, masked = sum(map(len, payload)), 0x80 if key else 0
    if size < 126:
        header = bytes((0x80 | opcode, masked | size))
    elif size < 1 << 16:
        header = struct.pack(">BBH", 0x80 | opcode, masked | 126, size)
    else:
        header = struct.pack(">BBQ", 0x80 | opcode, masked | 127, size)
    pieces = [header + key, mask_payload(key, *payload)] if key else [header, *payload]
    return pieces if size > SEND_BUFFER else [b"".join(pieces)]


class MessageDecoder:
    """Turns bytes, sliced anyhow, into parts of messages of at most MAX_MESSAGE bytes, MAX_FRAMES parts at a time."""

    def __init__(self, *, masked: bool) -> None:
        """`masked` is what the peer's frames have to be."""
        self._masked = masked
        self._buffer = b""  # the beginning of a frame's header, or of a control message; with `has_more`, all the rest
        self.has_more = False  # MAX_FRAMES was reached; feed nothing to go on
        self._opcode: int | None = None  # of the message that goes on
        self._size = 0  # bytes of it so far
        self._left = 0  # bytes of the frame's payload that are still to come
        self._final = True  # and that is the message's last frame
        self._key = b""

    def feed(self, data: bytes | memoryview) -> list[MessagePart]:
        """Return what `data` brings. Raises ProtocolError; the decoder is of no use after that.

        A view's memory may change when all parts have been dealt with.
        """
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        parts: list[MessagePart] = []
        start, end = 0, len(data)
        while start < end and len(parts) < MAX_FRAMES:
            if not self._left:
                header = self._header(data, start)
                if header is None:
                    break
                start, whole = header
                if whole:
                    parts.append(whole)
                    continue
            piece = data[start : start + self._left]
            start += len(piece)
            self._left -= len(piece)
            if self._key:
                parts.append(self._part(mask_payload(self._key, piece)))
                if self._left:
                    turn = len(piece) % 4
                    self._key = self._key[turn:] + self._key[:turn]
            else:
                parts.append(self._part(piece))
        self.has_more = start < end and len(parts) >= MAX_FRAMES
        if start < end:
            self._buffer = bytes(data[start:])
        return parts

    def _part(self, data: bytes | bytearray | memoryview) -> MessagePart:
        opcode, ended = self._opcode, self._final and not self._left
        assert opcode is not None
        if ended:
            self._opcode = None
        return MessagePart(opcode, data, ended)

    def _header(self, data: bytes | memoryview, start: int) -> tuple[int, MessagePart | None] | None:
        """Read a frame's header; return where its payload begins, None when it is not all there.

        A control message is read whole, and so is an empty frame: it is returned, too, and the next one begins there.
        """
        if len(data) - start < 2:
            return None
        first, second = data[start], data[start + 1]
        size, opcode = second & 0x7F, first & 0x0F
        if first & 0x70 or opcode not in OPCODES:
            raise ProtocolError(f"a WebSocket frame that begins with {first:#x}")
        masked = bool(second & 0x80)
        if masked is not self._masked and (masked or opcode != Opcode.CLOSE):  # Caddy 2.6 stops with a Close of its own
            raise ProtocolError("a WebSocket frame that is " + ("masked" if masked else "not masked"))
        begin = start + (2 if size < 126 else 4 if size == 126 else 10)
        control = opcode >= _FIRST_CONTROL
        if control and (size > 125 or not first & 0x80):
            raise ProtocolError("a control message that is long or in fragments")
        if len(data) < begin + 4 * masked + control * size:
            return None
        if size > 125:
            size = int.from_bytes(data[start + 2 : begin])
        key = bytes(data[begin : begin + 4]) if masked else b""
        begin += len(key)
        if control:
            payload = bytes(data[begin : begin + size])
            return begin + size, MessagePart(opcode, mask_payload(key, payload) if key else payload, True)
        goes_on = opcode == _CONTINUATION
        if goes_on != (self._opcode is not None):
            raise ProtocolError("a message inside another, or the rest of none")
        self._size = size + (self._size if goes_on else 0)
        if self._size > MAX_MESSAGE:
            raise ProtocolError(f"a message over {MAX_MESSAGE} bytes", ErrorCode.FRAME_SIZE)
        if not goes_on:
            self._opcode = opcode
        self._left, self._final, self._key = size, bool(first & 0x80), key
        return begin, None if size else self._part(b"")


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
BLOCKED = 0x4  # DATA: it took the last of the sender's credit, who may have more (RFC 9000 section 4.1)
ZSTD = 0x8  # DATA: the chunk is compressed
ASK = 0x10  # DATA, HEAD, OPEN: an ACK is wanted at once

FRAME_HEADER = struct.Struct(">IBI")  # length << 8 | type, flags, stream id (RFC 9113 section 4.1)
FIRST_EXTENSION = 128  # types from here on are ignored, so that a newer peer may use them


class _Rule(NamedTuple):
    min_length: int
    max_length: int
    flags: int
    on_stream: bool


FRAME_RULES: dict[int, _Rule] = {
    FrameType.DATA: _Rule(0, MAX_DATA, END | BLOCKED | ZSTD | ASK, True),
    FrameType.HEAD: _Rule(1, MAX_HEAD, END | INTERIM | ASK, True),
    FrameType.OPEN: _Rule(7, MAX_HEAD, END | ASK, True),
    FrameType.RESET: _Rule(2, MAX_CONTROL, 0, True),
    FrameType.PING: _Rule(8, 8, 0, False),
    FrameType.GOAWAY: _Rule(2, MAX_CONTROL, 0, False),
    FrameType.WINDOW: _Rule(4, 4, 0, True),
    FrameType.ACK: _Rule(8, 8, 0, False),
    FrameType.PONG: _Rule(8, 8, 0, False),
}
# Python 3.11 takes 0.1 us for a member of an enum; those that each frame is compared with have names of their own.
_DATA, _HEAD, _OPEN = FrameType.DATA, FrameType.HEAD, FrameType.OPEN
_RESET, _GOAWAY, _WINDOW = FrameType.RESET, FrameType.GOAWAY, FrameType.WINDOW
_NO_RULE = _Rule(1, 0, 0, False)  # no length is right
MAY_ASK = frozenset({FrameType.DATA, FrameType.HEAD, FrameType.OPEN})
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


def with_ask(frame: bytes) -> bytes:
    """Return an encoded frame with the flag ASK."""
    return frame[:4] + bytes((frame[4] | ASK,)) + frame[5:]


def encode_reason(code: ErrorCode, reason: str) -> bytes:
    """Return the payload of a RESET or GOAWAY; a long reason is cut."""
    return code.to_bytes(2, "big") + reason.encode("utf-8", "replace")[: MAX_CONTROL - 2]


def decode_reason(payload: bytes) -> tuple[ErrorCode, str]:
    """Return code and reason of a RESET's or GOAWAY's payload; an unknown code is INTERNAL."""
    return ErrorCode(int.from_bytes(payload[:2], "big")), payload[2:].decode("utf-8", "replace")


class FrameDecoder:
    """Turns bytes, sliced anyhow, into frames, MAX_FRAMES at a time. Holds what it has not come to yet."""

    def __init__(self) -> None:
        self._parts: list[bytes | bytearray] = []
        self._missing = 0  # bytes until the frame that they are the beginning of is whole, or its header
        self.buffered = 0  # bytes of frames that were not returned yet
        self.has_more = False  # MAX_FRAMES was reached; feed nothing to go on

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Return frames that `data` completes. Raises ProtocolError; the decoder is of no use after that.

        It keeps what is no view, and copies of views.
        """
        if self._parts:
            self._parts.append(bytes(data) if isinstance(data, memoryview) else data)
            self.buffered += len(data)
            if self.buffered < self._missing:  # joined once, however many slices a large frame comes in
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        frames, start, end, room, self.has_more = [], 0, len(data), MAX_FRAMES, False
        source, header = data if isinstance(data, bytes) else memoryview(data), FRAME_HEADER.size
        self._missing = header
        while end - start >= header:
            if room <= 0:
                self.has_more = True
                self._missing = 0
                break
            word, flags, stream_id = FRAME_HEADER.unpack_from(data, start)
            length, type_ = word >> 8, word & 0xFF
            least, most, known, on_stream = FRAME_RULES.get(type_, _NO_RULE)  # `_check`, at a glance
            is_usual = least <= length <= most and not flags & ~known and stream_id <= MAX_STREAM_ID
            if not is_usual or (stream_id != 0) != on_stream:
                self._check(type_, flags, stream_id, length)
            begin = start + header
            if end - begin < length:
                self._missing = header + length
                break
            start = begin + length
            room -= ZSTD_FRAMES if flags & ZSTD else 1
            if type_ < FIRST_EXTENSION:
                frames.append(Frame(type_, flags, stream_id, bytes(source[begin:start])))
        self.buffered = end - start
        if self.buffered:
            rest = data[start:]
            self._parts.append(bytes(rest) if isinstance(rest, memoryview) else rest)
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
# for what its reader has consumed, in steps of half an initial window, (3) and refuses a byte more than it has granted.
# A window that is too small for its path (4) doubles: that is when the sender had used up its credit, the reader all
# that came, and time passed until there was more. It (5) shrinks by what is consumed while its reader lags half of it
# behind, or memory is short, (6) never below its initial size. Who sends to a stopped reader gains nothing by rule 4.


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
    """What the peer may still send. Times are seconds of any one clock."""

    def __init__(self, size: int) -> None:
        self.size = self.credit = self._initial_size = size
        self._consumed = 0  # and not granted again
        self._is_blocked = False  # the peer, when it sent the last of what came
        self._unproven = 0  # bytes that may come before the peer knows of the last widening
        self._starved_since: float | None = None

    @property
    def unread(self) -> int:
        """Bytes received that no reader has consumed."""
        return self.size - self.credit - self._consumed

    @property
    def widened(self) -> int:
        """Bytes that the window is larger than at first."""
        return self.size - self._initial_size

    def receive(self, n: int, now: float, *, is_blocked: bool = False) -> bool:
        """Deduct what arrived; return whether the window is too small for the path.

        Raises ProtocolError when it is more than was granted.
        """
        if n > self.credit:
            raise ProtocolError(f"{n} bytes past a window of {self.credit}", ErrorCode.FLOW_CONTROL)
        self.credit -= n
        starved = self._starved_since is not None and now - self._starved_since >= MIN_STARVED
        self._unproven -= n
        self._is_blocked, self._starved_since = is_blocked and self._unproven < 0, None
        return starved

    def consume(self, n: int, now: float, *, shrink: bool = False) -> int:
        """Note that the reader took `n` bytes; return the credit to grant now, mostly 0."""
        assert 0 <= n <= self.unread
        self._consumed += n
        if self._is_blocked and not self.unread:
            self._starved_since = now
        if self.widened and (shrink or self.unread > self.size // 2):
            kept = min(self._consumed, self.widened)
            self._consumed -= kept
            self.size -= kept
        if self._consumed < self._initial_size // 2:
            return 0
        granted, self._consumed = self._consumed, 0
        self.credit += granted
        return granted

    def widen(self, n: int) -> None:
        """Grant `n` bytes on top of what is consumed."""
        self._unproven = self.credit
        self.size += n
        self.credit += n


class _Asked(NamedTuple):
    frames: int  # sent so far, the last of them asks for an ACK
    sent_at: float
    bytes: int  # in flight then
    is_full: bool  # as much as was allowed
    is_probe: bool


class InFlight:
    """Congestion control: bounds the bytes on their way, so that no more than QUEUE_TIME waits in queues.

    What TCP does below fills the queue of a home router; a small response behind it would take a tenth of a second.
    A round is the time until something that was sent in it is acknowledged. From the smallest round trip of a round
    follows how long the queue is, and how much the path holds without (as TCP Vegas and FAST reckon). It begins with
    rounds that double, as long as that makes the link faster. Every PROBE_INTERVAL a part of the path is left empty, so
    that the smallest round trip is one without our queue. A fast path is left to TCP: there, a round trip is long
    because a process is busy. Times are seconds of any one clock.
    """

    def __init__(self) -> None:
        self.bytes = 0  # sent and not acknowledged
        self.limit = self._cap = FIRST_CAP
        self.turn = MIN_TURN  # so that the first round trip tells of the path, and not of what we send
        self._unasked = 0
        self._asked: collections.deque[_Asked] = collections.deque()
        self._progress_at = 0.0  # when something was acknowledged, or asked for
        self._smallest = math.inf  # round trip, in seconds
        self._measured_at = 0.0  # when that was measured
        self._jitter = 0.0  # seconds that a round trip takes longer than the smallest of its round, as a rule
        self._short_at = 0.0  # when the queue was last about as short as it should be
        self._is_starting, self._is_probing = True, False
        self._settled_at = 0.0  # when the path was filled again after a probe
        self._best_rate, self._plateau = 0.0, 0  # bytes a second of the best round, rounds since then
        self._round_at, self._round_bytes = 0.0, 0
        self._round_trips: list[float] = []  # of what was sent while the link was full
        self._path_rate = math.inf
        self._fast_until = 0.0  # what was in flight has been acknowledged so soon, a moment ago, that the path is fast

    @property
    def has_room(self) -> bool:
        return self.bytes < self.limit

    @property
    def rate(self) -> float:
        """Bytes a second that the path carries; infinity until a queue shows that it carries no more."""
        return self._path_rate

    @property
    def ack_deadline(self) -> float:
        """When the peer must have acknowledged something; infinity when it was not asked to."""
        return self._progress_at + WRITE_TIMEOUT if self._asked else math.inf

    def send(self, n: int) -> None:
        """Count what is sent."""
        self.bytes += n
        self._unasked += n

    def wants_ack(self, n: int) -> bool:
        """Whether a frame of `n` bytes has to ask for an ACK."""
        return self._unasked + n >= self.turn

    def ask(self, frames: int, now: float) -> None:
        """Note that the last of all `frames` sent asks for an ACK."""
        if not self._asked:
            self._progress_at = now
        is_full = self.bytes >= self.limit - self.limit // 8
        self._asked.append(_Asked(frames, now, self.bytes, is_full, self._is_probing))
        if self.bytes <= self._unasked:  # a round begins after any pause
            self._round_at, self._round_bytes, self._round_trips = now, 0, []
        self._unasked = 0
        if self._smallest == math.inf:
            self.turn = FIRST_CAP // 4

    def acknowledge(self, frames: int, n: int, now: float) -> None:
        """Take an ACK of `frames` in all, which is for `n` bytes more than before."""
        self.bytes = max(0, self.bytes - n)
        self._round_bytes += n
        if n:
            self._progress_at = now
        sent_at = -1.0
        if not self._asked:
            return
        while self._asked and self._asked[0].frames <= frames:
            asked = self._asked.popleft()
            sent_at = asked.sent_at
            round_trip = now - sent_at
            if asked.bytes > FAST_RATE * round_trip:
                self._fast_until = now + PROBE_INTERVAL
            if round_trip <= self._smallest or (asked.is_probe and self._is_probing):
                if self._is_probing:
                    self._settled_at = now + round_trip
                self._smallest, self._measured_at, self._is_probing = round_trip, now, False
                self._set_limit(self._cap)
            if asked.is_full and sent_at >= self._settled_at:
                self._round_trips.append(round_trip)
        if sent_at >= self._round_at and (self._is_starting or now - self._round_at >= MIN_ROUND):
            self._end_round(now)

    def _end_round(self, now: float) -> None:
        rate = self._round_bytes / max(now - self._round_at, 1e-6)
        round_trips = self._round_trips
        self._round_at, self._round_bytes, self._round_trips = now, 0, []
        if not round_trips or self._is_probing:  # it does not tell what the path holds
            return
        round_trip = max(min(round_trips), 1e-6)
        smallest, aim = self._smallest, self._smallest + self._queue_time
        path = self._cap * smallest / round_trip  # bytes that it holds without a queue
        is_fast = now < self._fast_until
        self._path_rate = max(rate, FAST_RATE) if is_fast else rate if round_trip > aim else max(rate, self._path_rate)
        factor = max(0.25, min(2.0, aim / round_trip))
        if round_trip < smallest + self._queue_time / 4:
            factor = max(factor, 1.25)
        if round_trip < smallest + 3 * self._queue_time:
            self._short_at = now
            if not self._is_starting:
                self._jitter += (sum(round_trips) / len(round_trips) - round_trip - self._jitter) / 4
        has_changed = now - self._short_at >= max(PROBE_DELAY, 4 * smallest)
        is_due = has_changed or now - self._measured_at >= PROBE_INTERVAL
        if self._is_starting:
            self._plateau = 0 if rate > 1.25 * self._best_rate else self._plateau + 1
            self._best_rate = max(self._best_rate, rate)
            self._is_starting = self._plateau < (2 if round_trip > aim else 4)
            is_due, self._short_at = not self._is_starting, now
            if self._is_starting:
                factor = min(1.0 if round_trip > aim else 2.0, 2.5 * rate * aim / self._cap)
        self._cap = max(FAST_CAP if is_fast else MIN_CAP, min(round(self._cap * factor), MAX_UNACKED))
        self._set_limit(self._cap)
        if is_due and not is_fast:
            self._short_at, self._is_probing = now, True
            self._set_limit(0.8 * path)
            if has_changed:
                self._is_starting, self._best_rate, self._plateau = True, 0.0, 0

    @property
    def _queue_time(self) -> float:
        """Seconds of queue to aim at: on a long path so many that a faster link is seen in some rounds."""
        return max(QUEUE_TIME, self._smallest / 8, self._jitter)

    def _set_limit(self, limit: float) -> None:
        self.limit = max(MIN_CAP, min(round(limit), self._cap))
        turn = min(self.limit / 2, self._cap * TURN_TIME / (self._smallest + self._queue_time))
        self.turn = max(MIN_TURN, min(round(turn), MAX_TURN))


# ---- Compression ----------------------------------------------------------------------------------------------------
# zstd, a chunk at a time: each is a whole frame (RFC 8878) that says how long its content is, so that a bomb is refused
# by its header, nothing waits for what follows, and any chunk may go as it is. It may refer to its history: the last of
# what was compressed before it in the same stream and direction, and nothing else, so no stream learns of another from
# sizes. (A context of zstd for each stream would take half the time, and 2 MB at both ends together for 128 KiB.)


def compress(content: bytes | memoryview, history: bytes = b"", level: int = ZSTD_LEVEL) -> bytes:
    """Return a chunk as a zstd frame, which is longer where nothing can be saved. Takes 2 ms for MAX_DATA, or 4."""
    import zstandard

    return zstandard.ZstdCompressor(level=level, dict_data=_dictionary(history)).compress(content)


def content_length(payload: bytes) -> int:
    """Return how long the content of a zstd frame will be. Raises ProtocolError unless that is 1 to MAX_DATA bytes."""
    import zstandard

    if not payload.startswith(zstandard.FRAME_HEADER):  # a skippable frame, too, has a length, but no content
        raise ProtocolError("compressed DATA that is no zstd frame")
    try:
        header = zstandard.get_frame_parameters(payload)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"compressed DATA with a bad header: {error}") from None
    length, window = header.content_size, header.window_size
    if not 0 < length <= MAX_DATA or window > MAX_DATA:
        raise ProtocolError(f"compressed DATA of {length} bytes, window {window}: MAX_DATA is {MAX_DATA}")
    return length


def decompress(payload: bytes, history: bytes = b"") -> bytes:
    """Return the content of one zstd frame, and never more than its `content_length`. Raises ProtocolError."""
    import zstandard

    content_length(payload)
    try:
        unpacker = zstandard.ZstdDecompressor(dict_data=_dictionary(history))
        return unpacker.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"compressed DATA that is broken: {error}") from None


def next_history(history: bytes, content: bytes | memoryview) -> bytes:
    """Return what the chunk after `content` may refer to."""
    return b"".join((history, content))[-HISTORY:]


def _dictionary(history: bytes) -> zstandard.ZstdCompressionDict | None:
    import zstandard

    kind = zstandard.DICT_TYPE_RAWCONTENT  # also when it begins like another one
    return zstandard.ZstdCompressionDict(history, dict_type=kind) if history else None


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
# have data and credit take turns of TURN_TIME. Those that had nothing to send and have less than a turn now come first,
# up to a turn in all between two of the others (as the new queues of RFC 8290), and need not wait for an ACK: a small
# response waits for what is in flight, and never for a file.


StreamState = enum.IntEnum("StreamState", "IDLE OPEN HALF_CLOSED_LOCAL HALF_CLOSED_REMOTE CLOSED")
Input = enum.IntEnum("Input", "OPEN SEND SEND_END RECEIVE RECEIVE_END RESET")

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


_CLOSED = StreamState.CLOSED


class Kind(enum.IntEnum):
    """What a stream carries, from its OPEN."""

    HTTP = 0
    UPGRADE = 1  # HTTP; a raw byte pipe after a 101
    TCP = 2  # a visitor's connection: bytes both ways; its HEAD, a 101, says that the local service has accepted


KINDS = frozenset(Kind)
OPEN_HEADER = struct.Struct(">HBI")  # tunnel index, Kind, ms waited on the server; the request head follows


class _SessionStream:
    def __init__(self, id_: int, send_window: int, receive_window: int, *, headed: bool) -> None:
        self.id = id_
        self.state = StreamState.IDLE
        self.send = SendWindow(send_window)
        self.receive = ReceiveWindow(receive_window)
        self.pending: collections.deque[bytes | memoryview] = collections.deque()
        self.buffered = 0  # bytes in pending
        self.ending = False  # END goes out with the last of pending
        self.full = False  # its writer waits until pending is empty
        self.reset: bytes | None = None  # the payload of a RESET, which goes out after that
        self.ready = False  # is in a queue of those that may send
        self.headed = headed  # DATA may arrive
        self.interims = 0
        self.ratio = 0.0  # of content to what was sent for it, last; 0: nothing is compressed
        self.packed_history = self.unpacked_history = b""

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
        compress: bool = False,
    ) -> None:
        self.is_server = is_server
        self.max_streams = max_streams
        self.compress = compress  # both ends have said that content may be
        self.saved = 0  # bytes of content that the link did not have to carry, either way
        self.connected = False
        self.received = 0  # counted frames, stated to the peer on resume
        self.goaway: tuple[ErrorCode, str] | None = None  # the peer's
        self.leaving = False  # we sent a GOAWAY
        self.round_trip: float | None = None  # seconds, of the last PING
        self.is_short_of_memory = False  # then no window is larger than at first; the caller sets it
        self.work = 0  # messages and frames that were received, for a reader who wants to be fair
        self.drained: list[int] = []  # streams whose writers may go on; the caller empties it
        self._peer_window, self._window = send_window, receive_window
        self._streams: dict[int, _SessionStream] = {}
        self._last_id = 0
        self._decoder = FrameDecoder()
        self._control: collections.deque[bytes] = collections.deque()
        self._control_bytes = 0
        self._credits: dict[int, int] = {}  # stream id -> bytes to grant
        self._fresh: collections.deque[_SessionStream] = collections.deque()  # those with little to send
        self._ready: collections.deque[_SessionStream] = collections.deque()  # all others
        self._favour = 0  # bytes of the fresh since the last turn of the others
        self._in_flight = InFlight()  # of this link
        # Counted frames that were sent and not acknowledged: encoded, or a header and the payload.
        self._unacked: collections.deque[tuple[bytes, bytes]] = collections.deque()
        self._unacked_bytes = 0
        self._acked = 0  # counted frames that the peer acknowledged
        self._replay = self._unacked.copy()  # of those, what this link has still to carry
        self._pings: list[bytes] = []  # PONGs and a PING to send
        self._bytes_to_ack = 0  # from ACK_BYTES on, an ACK is due
        self._ack_deadline: float | None = None
        self._acked_at = -math.inf  # when the last ACK was sent
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

    @property
    def unfinished(self) -> int:
        """Number of streams that are not closed, or of which the peer may miss frames."""
        return len(self._streams.keys() | {FRAME_HEADER.unpack_from(frame)[2] for frame, _ in self._unacked} - {0})

    @property
    def buffered(self) -> int:
        """Bytes kept here until they are sent, acknowledged or read."""
        streams = self._streams.values()
        unread = sum(stream.buffered + stream.receive.unread for stream in streams)
        unread += sum(len(stream.packed_history) + len(stream.unpacked_history) for stream in streams)
        return unread + self._control_bytes + self._unacked_bytes

    def open_stream(
        self, tunnel: int, kind: Kind, head: bytes, *, end: bool = False, waited: float = 0.0, compress: bool = False
    ) -> int:
        """Open a stream with a request head and return its id. Raises StreamReset when there is no room for it.

        `waited` tells the client how many seconds the request has been on the server. `compress` says that the content
        is of a type that compresses.
        """
        assert self.is_server
        if self.goaway or self.leaving:
            raise StreamReset(ErrorCode.SHUTDOWN, "the session is ending")
        if len(self._streams) >= self.max_streams:
            raise StreamReset(ErrorCode.REFUSED, f"{self.max_streams} streams are open")
        if self._congested:
            raise StreamReset(ErrorCode.REFUSED, "the link is congested")
        stream = self._add_stream(self._last_id + 1)
        stream.ratio = FIRST_RATIO if compress else 0.0
        payload = OPEN_HEADER.pack(tunnel, kind, round(waited * 1000)) + head
        self._send_control(FrameType.OPEN, END if end else 0, stream.id, payload)
        if end:
            self._transition(stream, Input.SEND_END)
        if stream.id >= MAX_STREAM_ID:
            self.send_goaway(ErrorCode.SHUTDOWN, "stream ids are used up")
        return stream.id

    def send_head(
        self, stream_id: int, head: bytes, *, interim: bool = False, end: bool = False, compress: bool = False
    ) -> None:
        """Send a response head; `compress` says that the content is of a type that compresses."""
        stream = self._stream(stream_id)
        assert not self.is_server and not stream.pending
        stream.ratio = FIRST_RATIO if compress else 0.0
        self._transition(stream, Input.SEND_END if end else Input.SEND)
        flags = (END if end else 0) | (INTERIM if interim else 0)
        self._send_control(FrameType.HEAD, flags, stream_id, head)

    def credit(self, stream_id: int) -> int:
        """Return how many bytes the peer takes now, those included that are queued; 0 when the stream is closed."""
        stream = self._streams.get(stream_id)
        return stream.send.credit if stream else 0

    def send_data(self, stream_id: int, data: bytes, *, end: bool = False) -> int:
        """Queue body bytes; return how many are queued now.

        When that is more than SEND_BUFFER the caller waits until the stream is `drained`, which is when all went out:
        what is left of a chunk would keep all of it in memory.
        """
        stream = self._stream(stream_id)
        assert not stream.ending and (stream.state, Input.SEND) in TRANSITIONS
        if data:
            stream.pending.append(data)
            stream.buffered += len(data)
            stream.full = stream.buffered > SEND_BUFFER
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
        if stream is None:
            return 0
        granted = stream.receive.consume(n, self._heard_at, shrink=self.is_short_of_memory)
        if granted:
            self._grant(stream, granted)
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
        self._replay, self._in_flight = self._unacked.copy(), InFlight()
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
        silence = min(silence, self._in_flight.ack_deadline)
        return silence if self._ack_deadline is None else min(silence, self._ack_deadline)

    def handle_timeout(self, now: float) -> str:
        """Do what is due; return why the link is dead, mostly nothing. A call too early does nothing."""
        if not self.connected:
            return ""
        if self._ack_deadline is not None and now >= self._ack_deadline:
            self._bytes_to_ack, self._ack_deadline = ACK_BYTES, None
        if now >= self._in_flight.ack_deadline:
            return f"nothing was acknowledged for {WRITE_TIMEOUT:g} s"
        if self._pinged_at > self._heard_at:
            return f"no answer for {PING_TIMEOUT:g} s" if now >= self._pinged_at + PING_TIMEOUT else ""
        if now >= self._heard_at + PING_INTERVAL:
            self._pings.append(encode_frame(FrameType.PING, 0, 0, bytes(8)))
            self._pinged_at = now
        return ""

    # Bytes

    def data_to_send(self, limit: int = MAX_BATCH, now: float = 0.0) -> bytes:
        """Return whole frames to send now as one message: about `limit` bytes at the most, none when nothing is due."""
        return b"".join(self.frames_to_send(limit, now))

    def frames_to_send(self, limit: int = MAX_BATCH, now: float = 0.0) -> list[bytes]:
        """Return the same in pieces."""
        if not self.connected:
            return []
        now = max(now, self._heard_at)
        out, self._pings = self._pings, []
        if self._replay:
            self._take_replay(out, limit, now)
        if not self._replay:
            room = self._take_control(out, limit, now)
            if self._fresh or self._ready:
                self._take_data(out, min(room, self._in_flight.turn), now)
        goes_along = out and self._ack_deadline is not None and now >= self._acked_at + ACK_PAUSE
        if self._bytes_to_ack >= ACK_BYTES or goes_along:
            out.append(encode_frame(FrameType.ACK, 0, 0, self.received.to_bytes(8, "big")))
            self._bytes_to_ack, self._ack_deadline, self._acked_at = 0, None, now
        return out

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> list[Frame]:
        """Take bytes from the link and return the frames for the layer above. Raises ProtocolError.

        With `has_more` there are others in them: call it again, with nothing.
        """
        self._heard_at, events = now, []
        frames = self._decoder.feed(data)
        self.work += 1 + len(frames)
        for frame in frames:
            type_, flags, _, payload = frame
            if type_ in LINK_LEVEL:
                self._receive_link_level(frame)
                continue
            self.received += 1
            self._bytes_to_ack += FRAME_HEADER.size + len(payload)
            if flags & ASK:
                self._bytes_to_ack += ACK_BYTES
            if event := self._receive(frame):
                events.append(event)
        if 0 < self._bytes_to_ack < ACK_BYTES and self._ack_deadline is None:
            self._ack_deadline = now + ACK_DELAY
        if len(self._control) > MAX_UNACKED_FRAMES:  # an honest peer has stopped to open streams long before
            raise ProtocolError(f"over {MAX_UNACKED_FRAMES} replies that are not read")
        return events

    @property
    def has_data_to_send(self) -> bool:
        """Whether `data_to_send` is worth a call."""
        if self._pings or self._bytes_to_ack >= ACK_BYTES:
            return True
        if self._replay:
            return self._in_flight.has_room
        if self._control or self._credits:
            return True
        return bool(self._fresh or self._ready) and self._next_turn() is not None

    @property
    def is_flushed(self) -> bool:
        """Whether nothing waits to be sent, not even for room in flight."""
        return not (self._pings or self._replay or self._control or self._credits or self._fresh or self._ready)

    @property
    def has_more(self) -> bool:
        """Whether `receive_data` has left frames for another call."""
        return self._decoder.has_more

    @property
    def between_frames(self) -> bool:
        """Whether all bytes received so far made whole frames, as every message must."""
        return not self._decoder.buffered

    # What is sent

    @property
    def _congested(self) -> bool:
        """Whether what waits for the peer, or for its ACK, is too much for another stream to add to it.

        A quarter of the frames that end a session: refusing the streams of a peer that does not read takes frames, too.
        """
        frames = len(self._unacked) + len(self._control)
        return self._unacked_bytes + self._control_bytes > MAX_PENDING or frames > MAX_UNACKED_FRAMES // 4

    def _take_replay(self, out: list[bytes], room: int, now: float) -> None:
        room = min(room, self._in_flight.turn)
        while self._replay and room > 0 and self._in_flight.has_room:
            frame, content = self._replay.popleft()
            size = len(frame) + len(content)
            asks = self._asks(frame, size)
            out.append(with_ask(frame) if asks else frame)
            if content:
                out.append(content)
            self._in_flight.send(size)
            if asks:
                self._in_flight.ask(self._acked + len(self._unacked) - len(self._replay), now)
            room -= size

    def _asks(self, frame: bytes, size: int) -> bool:
        return frame[3] in MAY_ASK and self._in_flight.wants_ack(size)

    def _take_control(self, out: list[bytes], room: int, now: float) -> int:
        while self._control and room > 0:
            frame = self._control.popleft()
            self._control_bytes -= len(frame)
            # Else heads could fill what may be in flight, and content wait for ACK_DELAY.
            asks = self._asks(frame, len(frame))
            room -= self._count(out, with_ask(frame) if asks else frame)
            if asks:
                self._in_flight.ask(self._acked + len(self._unacked), now)
        while self._credits and room > 0:
            stream_id, credit = self._credits.popitem()
            if stream_id in self._streams:
                frame = encode_frame(FrameType.WINDOW, 0, stream_id, credit.to_bytes(4, "big"))
                room -= self._count(out, frame)
        return room

    def _next_turn(self) -> collections.deque[_SessionStream] | None:
        """Return the queue whose first stream may send DATA now."""
        flight = self._in_flight
        if self._unacked_bytes >= MAX_UNACKED or len(self._unacked) >= MAX_UNACKED_FRAMES // 2:
            return None
        is_favoured = flight.bytes < flight.limit + flight.turn and (self._favour < flight.turn or not self._ready)
        if self._fresh and is_favoured:
            return self._fresh
        return self._ready if self._ready and flight.has_room else None

    def _take_data(self, out: list[bytes], room: int, now: float) -> None:
        flight = self._in_flight
        while room > 0 and (self._fresh or self._ready) and (turn := self._next_turn()) is not None:
            stream = turn.popleft()
            stream.ready = False
            if stream.id not in self._streams:
                continue
            compresses = self._should_compress(stream)
            data = stream.take(min(int(flight.turn * stream.ratio), MAX_DATA) if compresses else flight.turn)
            end = stream.ending and not stream.pending
            if data or end:
                payload = self._packed(stream, data) if compresses else data
                flags = END if end else 0 if stream.send.credit else BLOCKED
                if payload is not data:
                    flags |= ZSTD
                if asks := flight.wants_ack(len(payload)):
                    flags |= ASK
                header = FRAME_HEADER.pack(len(payload) << 8 | FrameType.DATA, flags, stream.id)
                self._count(out, header, bytes(payload))  # no copy of a whole chunk; a view would keep its chunk
                room -= FRAME_HEADER.size + len(data)  # as it was: the time of the event loop counts, too
                if asks:
                    flight.ask(self._acked + len(self._unacked), now)
                if data:
                    self._favour = self._favour + len(payload) if turn is self._fresh else 0
            if end:
                stream.ending, stream.packed_history = False, b""
                self._transition(stream, Input.SEND_END)
            if stream.reset and not stream.pending and stream.id in self._streams:
                room -= self._count(out, encode_frame(FrameType.RESET, 0, stream.id, stream.reset))
                self._transition(stream, Input.RESET)
            if turn is self._fresh and self._ready and stream.id in self._streams:
                stream.ready = True  # it is fresh again when the others had their turn
                self._ready.append(stream)
            else:
                self._make_ready(stream, turn)
            if stream.full and not stream.buffered:
                stream.full = False
                self.drained.append(stream.id)

    def _should_compress(self, stream: _SessionStream) -> bool:
        """Whether the link is what the stream's content waits for: it has more to do than one turn."""
        if not stream.ratio or not self.compress:
            return False
        flight = self._in_flight
        return flight.bytes + stream.buffered > flight.turn and flight.rate < COMPRESS_RATE

    def _packed(self, stream: _SessionStream, data: bytes | memoryview) -> bytes | memoryview:
        """Return a chunk compressed, or as it is where that is not worth it."""
        if len(data) < MIN_COMPRESSED:
            return data
        level = SLOW_LEVEL if self._in_flight.rate < SLOW_RATE else ZSTD_LEVEL
        payload = compress(data, stream.packed_history, level)
        stream.ratio = min(len(data) / len(payload), 2 * stream.ratio, MAX_RATIO)
        if stream.ratio < MIN_RATIO:  # encoded already, whatever its type says: do not try again
            stream.ratio, stream.packed_history = 0.0, b""
            return data
        stream.packed_history = next_history(stream.packed_history, data)
        self.saved += len(data) - len(payload)
        return payload

    def _send_control(self, type_: FrameType, flags: int, stream_id: int, payload: bytes) -> None:
        frame = encode_frame(type_, flags, stream_id, payload)
        self._control.append(frame)
        self._control_bytes += len(frame)

    def _count(self, out: list[bytes], frame: bytes, content: bytes = b"") -> int:
        """Send a frame; a large one in two parts, which are joined where they are copied anyway."""
        if len(self._unacked) >= MAX_UNACKED_FRAMES:
            raise ProtocolError(f"{MAX_UNACKED_FRAMES} frames without an ACK")
        out += (frame, content) if content else (frame,)
        self._unacked.append((frame, content))
        size = len(frame) + len(content)
        self._unacked_bytes += size
        self._in_flight.send(size)
        return size

    def _grant(self, stream: _SessionStream, credit: int) -> None:
        self._credits[stream.id] = self._credits.get(stream.id, 0) + credit

    def _make_ready(self, stream: _SessionStream, turn: collections.deque[_SessionStream] | None = None) -> None:
        """Put a stream that may send into its queue; `turn` is the one it comes from."""
        can_send = stream.send.credit > 0 if stream.pending else stream.ending or stream.reset is not None
        if can_send and not stream.ready and stream.id in self._streams:
            stream.ready = True
            is_fresh = turn is None and stream.buffered <= self._in_flight.turn
            (self._fresh if is_fresh else self._ready).append(stream)

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
        if state is _CLOSED:
            del self._streams[stream.id]
            self._credits.pop(stream.id, None)
            stream.pending.clear()

    def _acknowledge(self, received: int) -> None:
        if not self.may_resume(received):
            raise ProtocolError(f"ACK of {received} frames, sent {self._acked + len(self._unacked)}")
        before = self._unacked_bytes
        for _ in range(received - self._acked):
            frame, content = self._unacked.popleft()
            self._unacked_bytes -= len(frame) + len(content)
        self._acked = received
        self._in_flight.acknowledge(received, before - self._unacked_bytes, self._heard_at)

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

    def _receive(self, frame: Frame) -> Frame | None:
        """Take a counted frame; return it, unpacked, when it is an event for the layer above."""
        type_, flags, stream_id, payload = frame
        if type_ == _OPEN:
            return frame if self._receive_open(frame) else None
        if type_ == _GOAWAY:
            self.goaway = decode_reason(payload)
            return frame
        stream = self._streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id:
                raise ProtocolError(f"{frame} before its OPEN")
            return None  # closed, and the frame was still on its way
        if type_ == _WINDOW:
            stream.send.add(int.from_bytes(payload, "big"))
            self._make_ready(stream)
            return None
        if type_ == _RESET:
            self._transition(stream, Input.RESET)
            return frame
        if type_ == _HEAD:
            self._check_head(stream, frame)
        elif not stream.headed:
            raise ProtocolError(f"DATA before the HEAD on stream {stream_id}")
        elif not payload and not flags & END:
            raise ProtocolError(f"empty DATA on stream {stream_id}")
        self._transition(stream, Input.RECEIVE_END if flags & END else Input.RECEIVE)
        if type_ == _DATA:  # the credit comes first: nothing is unpacked that is past the window
            length = content_length(payload) if flags & ZSTD else len(payload)
            starved = stream.receive.receive(length, self._heard_at, is_blocked=bool(flags & BLOCKED))
            if starved and not flags & END:
                self._widen(stream)
        if flags & ZSTD:
            frame = self._unpacked(stream, frame)
        if flags & END:
            stream.unpacked_history = b""
        return frame

    def _unpacked(self, stream: _SessionStream, frame: Frame) -> Frame:
        content = decompress(frame.payload, stream.unpacked_history)
        stream.unpacked_history = next_history(stream.unpacked_history, content)
        self.work += ZSTD_FRAMES
        self.saved += len(content) - len(frame.payload)
        return frame._replace(flags=frame.flags & ~ZSTD, payload=content)

    def _widen(self, stream: _SessionStream) -> None:
        if not self.is_short_of_memory:
            size = stream.receive.size
            left = MAX_WIDENED - sum(stream.receive.widened for stream in self._streams.values())
            if (more := min(size, MAX_STREAM_WINDOW - size, left)) > 0:
                stream.receive.widen(more)
                self._grant(stream, more)

    def _receive_open(self, frame: Frame) -> bool:
        if self.is_server or frame.stream_id <= self._last_id:
            raise ProtocolError(f"OPEN of stream {frame.stream_id} after {self._last_id}")
        unknown = frame.payload[2] not in KINDS  # what a newer peer may ask for
        if unknown or self.leaving or len(self._streams) >= self.max_streams or self._congested:
            self._last_id = frame.stream_id
            code = ErrorCode.SHUTDOWN if self.leaving else ErrorCode.REFUSED
            refusal = encode_reason(code, "unknown kind" if unknown else "no more streams")
            self._send_control(FrameType.RESET, 0, frame.stream_id, refusal)
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

Headers = Sequence[tuple[bytes, bytes]]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
FIELD = re.compile(rb"%b\0%b" % (_TOKEN, _TEXT))
_FIELDS = re.compile(rb"%b(?:\0%b)*" % (FIELD.pattern, FIELD.pattern))
_REASON = re.compile(_TEXT)
_TARGET = re.compile(rb"[\x21\x22\x24-\x7e\x80-\xff]+")
_REQUEST_START = re.compile(rb"(%b)\0(%b)(?=\0|\Z)" % (_TOKEN, _TARGET.pattern))  # in a frame
_RESPONSE_START = re.compile(rb"([1-5][0-9][0-9])\0(%b)(?=\0|\Z)" % _TEXT)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\r\n]*))?(?=\r\n|\Z)")
_FIELD_LINE = re.compile(rb"\r\n(%b):(%b)(?=\r\n|\Z)" % (_TOKEN, _TEXT))
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_COMPRESSIBLE = re.compile(
    rb"[ \t]*(?:text/|(?:application/(?:ecmascript|graphql|javascript|json|rtf|sql|toml|wasm|xml|yaml|x-javascript|"
    rb"x-ndjson|x-www-form-urlencoded|x-yaml)|font/[ot]tf|image/(?:bmp|vnd\.microsoft\.icon|x-icon)|"
    rb"[^;]+\+(?:json|xml))[ \t]*(?:;|\Z))",
    re.IGNORECASE,
)
_BASIC = re.compile(rb"basic +([A-Za-z0-9+/]+={0,2})", re.IGNORECASE)
_HOST = re.compile(r"(?:((?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63})\.?|\[([0-9a-f:.]+)\])(?::([0-9]{0,5}))?")

HOP_BY_HOP = frozenset(  # RFC 9110 section 7.6.1
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade http2-settings".split()
)
NEVER_NOMINATED = frozenset({b"host", b"content-length"})  # a Connection field may not take these away
FRAMING = frozenset({b"content-length", b"transfer-encoding"})
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
OUR_FORWARDED = (b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host")
FORWARDED = frozenset({b"forwarded", b"x-real-ip", *(name.lower() for name in OUR_FORWARDED)})


def accept_key(key: bytes) -> bytes:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())


_Head = TypeVar("_Head", bytes, "Fields")
_Rest = TypeVarTuple("_Rest")
_Result = TypeVar("_Result")


def remembered(function: Callable[[_Head, *_Rest], _Result]) -> Callable[[_Head, *_Rest], _Result]:
    """Keep the results for heads that come again, unless they are long: who asks often asks alike.

    What comes once is not kept: that would cost more than it saves. Results are shared; nobody changes them.
    """
    kept: dict[Any, _Result] = {}
    seen: set[int] = set()

    @functools.wraps(function)
    def remembering(head: _Head, *rest: *_Rest) -> _Result:
        payload = head.payload if isinstance(head, Fields) else head
        key = payload, len(head), rest  # of fields the number, too: none of them has a NUL where another has none
        if (known := kept.get(key)) is not None:
            return known
        result, mark = function(head, *rest), hash(key)
        if mark not in seen:
            if len(seen) >= 8 * MAX_REMEMBERED:
                seen.clear()
            seen.add(mark)
        elif len(payload) <= MAX_REMEMBERED_HEAD:
            if len(kept) >= MAX_REMEMBERED:
                kept.clear()
            kept[key] = result
        return result

    return remembering


class _Once(Generic[_Result]):
    """As functools.cached_property, which takes a lock up to Python 3.11."""

    def __init__(self, function: Callable[[Any], _Result]) -> None:
        self._function = function

    def __get__(self, instance: Any, owner: type) -> _Result:
        result = instance.__dict__[self._function.__name__] = self._function(instance)
        return result


class Fields(list[tuple[bytes, bytes]]):
    """A head's fields, in their order, and what is worked out from them once; nobody changes them."""

    _looked = 0  # how often a name was looked for

    @classmethod
    def of(cls, headers: Headers) -> Fields:
        return headers if isinstance(headers, Fields) else cls(headers)

    @_Once
    def payload(self) -> bytes:
        """The fields in a head's frame: names and values, with a NUL between any two."""
        return b"\0".join(itertools.chain.from_iterable(self))

    @_Once
    def is_valid(self) -> bool:
        """Whether they may be in a head."""
        return _FIELDS.fullmatch(self.payload) is not None

    @_Once
    def wire(self) -> bytes:
        """The lines of a head on the wire, each with the end of the one before it."""
        return b"\r\n".join([b"", *[b": ".join(pair) for pair in self]])

    @_Once
    def passed_on(self) -> Fields:
        """Those of a response that a proxy passes on, as a rule."""
        return Fields(end_to_end(self))  # a copy: it must not hold itself, which only the garbage collector would end

    @_Once
    def _by_name(self) -> dict[bytes, list[bytes]]:
        values: dict[bytes, list[bytes]] = {}
        for name, value in self:
            values.setdefault(name.lower(), []).append(value)
        return values

    def values_of(self, name: bytes) -> list[bytes]:
        """Return the values of all fields called `name` (lower case)."""
        if self._looked < 8:  # an index takes as long as to go through them a few times
            self._looked += 1
            return [value for key, value in self if key.lower() == name]
        return self._by_name.get(name, [])


@remembered
def fields_of(payload: bytes) -> Fields:
    """Return what has this payload, which has an even number of parts; whether it may be in a head is not checked."""
    parts = payload.split(b"\0") if payload else []
    fields = Fields(zip(parts[::2], parts[1::2], strict=True))
    fields.__dict__["payload"] = payload
    return fields


def _checked_fields(payload: bytes) -> Fields:
    """Return the fields of a head that came over a link. Raises ProtocolError."""
    count, odd = divmod(payload.count(b"\0") + 1, 2)
    if count > MAX_FIELDS:
        raise ProtocolError(f"a head with {count} fields, MAX_FIELDS is {MAX_FIELDS}")
    if odd or not (fields := fields_of(payload)).is_valid:
        raise ProtocolError("a head with a field that may not be there")
    return fields


def field_values(headers: Headers, name: bytes) -> list[bytes]:
    """Return the values of all fields called `name` (lower case)."""
    if isinstance(headers, Fields):
        return headers.values_of(name)
    return [value for key, value in headers if key.lower() == name]


def field_tokens(headers: Headers, name: bytes) -> set[bytes]:
    """Return the members of a comma-separated field, in lower case."""
    return {token.strip().lower() for value in field_values(headers, name) for token in value.split(b",")}


def compressible(headers: Headers) -> bool:
    """Whether a message's content is of a type that compresses, and has not been encoded.

    `Cache-Control: no-transform` does not matter on a hop inside the tunnel: after it the content is what it was.
    """
    types, encodings = field_values(headers, b"content-type"), field_values(headers, b"content-encoding")
    encoded = any(value.lower() != b"identity" for value in encodings)
    return len(types) == 1 and not encoded and _COMPRESSIBLE.match(types[0]) is not None


def end_to_end(headers: Headers, *, keep_upgrade: bool = False) -> Headers:
    """Return the fields that a proxy passes on (RFC 9110 section 7.6.1), in their order."""
    if HOP_BY_HOP.isdisjoint([name.lower() for name, _ in headers]):  # Connection is one of them
        return headers
    drop = HOP_BY_HOP | field_tokens(headers, b"connection") - NEVER_NOMINATED
    if keep_upgrade:
        drop -= {b"upgrade"}
    return [(name, value) for name, value in headers if name.lower() not in drop]


def forwarded(headers: Headers, peer: str, scheme: str, host: bytes, *, trusted: bool) -> Headers:
    """Return `headers` with what a proxy owes: who called, how, and which host.

    What is claimed about that in the request is replaced or dropped. Of a `trusted` proxy the address and the scheme
    count, and other X-Forwarded fields stay: it is there to know better. Names that turn into one of these, or into
    framing, where a local service folds `_` to `-`, are dropped.
    """
    address, proto = peer.encode("ascii", "replace"), scheme.encode()
    if trusted:
        address = b", ".join([*field_values(headers, b"x-forwarded-for"), address])
        schemes = [value for value in field_values(headers, b"x-forwarded-proto") if value in (b"http", b"https")]
        proto = [proto, *schemes][-1]
    ours = zip(OUR_FORWARDED, (address, proto, host), strict=True)
    names = b"\0".join([name for name, _ in headers]).lower()
    if b"_" not in names and b"forwarded" not in names and b"x-real-ip" not in names:  # as most are
        return [*headers, *ours]
    kept: list[tuple[bytes, bytes]] = []
    for pair in headers:
        lower = pair[0].lower()
        folded = lower.replace(b"_", b"-")
        claims = folded in FORWARDED or (folded.startswith(b"x-forwarded-") and not (trusted and folded == lower))
        if not claims and (folded == lower or folded not in FRAMING):
            kept.append(pair)
    return [*kept, *ours]


_FORWARDED_NODE = re.compile(  # RFC 7239 section 6, as X-Forwarded-For has it: an address, maybe with a port
    r"\s*(?:([0-9.]+)(?::\d+)?|\[([0-9a-fA-F:.]+)\](?::\d+)?|([0-9a-fA-F:.]+))\s*"
)
_COOKIE_DOMAIN = re.compile(rb"(?i)[ \t]*domain[ \t]*=")
_PLAIN_HOST = re.compile(r"[a-z0-9._-]*")


def own_cookies(headers: Headers, host: str) -> Headers:
    """Return a response's fields with no cookie for more than `host`: another tunnel would get it.

    A Domain that browsers might read as a parent of the host is left out; the cookie is the host's own then (RFC 6265
    section 5.3).
    """

    def allowed(attribute: bytes) -> bool:
        if not _COOKIE_DOMAIN.match(attribute):
            return True
        domain = attribute.partition(b"=")[2].strip(b" \t").lower().decode("latin-1").lstrip(".")
        below = domain == host or domain.endswith(f".{host}")
        return below or bool(domain and _PLAIN_HOST.fullmatch(domain) and not host.endswith(f".{domain.rstrip('.')}"))

    kept = []
    for name, value in headers:
        if name.lower() == b"set-cookie" and b"domain" in value.lower():
            cookie, *attributes = value.split(b";")
            value = b";".join([cookie, *filter(allowed, attributes)])
        kept.append((name, value))
    return kept


Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


def parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return an address or network, and IPv4 for one that is IPv4 written as IPv6. Raises ValueError."""
    network = ipaddress.ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def within(address: str, networks: Networks) -> bool:
    """Whether an address lies in one of these networks; what is no address lies in none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in network for network in networks)


def visitor_address(peer: str, headers: Headers, trusted: Networks) -> str:
    """Return who calls: the peer, or behind `trusted` proxies the last in X-Forwarded-For that is none of them.

    "" is who cannot be told. Some proxies write ports, too.
    """
    if not trusted:
        return peer
    members = (member for value in field_values(headers, b"x-forwarded-for") for member in value.split(b","))
    before = [member for member in members if member.strip()]  # RFC 9110 section 5.6.1: empty ones are none
    while before and within(peer, trusted):
        match = _FORWARDED_NODE.fullmatch(before.pop().decode("latin-1"))
        try:
            address = ipaddress.ip_address(match[match.lastindex or 0] if match else "")
        except ValueError:
            return ""  # somebody, but not the proxy
        peer = str(getattr(address, "ipv4_mapped", None) or address)
    return peer


def basic_credentials(headers: Headers) -> bytes | None:
    """Return the `user:password` that a visitor gives (RFC 7617), None without one. Raises MessageError for two."""
    values = field_values(headers, b"authorization")
    if len(values) > 1:
        raise MessageError(f"{len(values)} Authorization fields")
    match = _BASIC.fullmatch(values[0]) if values else None
    try:
        credentials = base64.b64decode(match[1], validate=True) if match else b""
    except ValueError:
        return None
    return credentials if b":" in credentials else None


def _encode_head(first: bytes, second: bytes, headers: Headers) -> bytes:
    if len(headers) > MAX_FIELDS:
        raise MessageError(f"{len(headers)} fields, MAX_FIELDS is {MAX_FIELDS}", 431)
    start = b"%b\0%b" % (first, second)
    payload = b"%b\0%b" % (start, Fields.of(headers).payload) if headers else start
    if payload.count(b"\0") != 2 * len(headers) + 1:
        raise MessageError("NUL in a head")
    if len(payload) > MAX_HEAD - OPEN_HEADER.size:
        raise MessageError(f"a head of {len(payload)} bytes, MAX_HEAD is {MAX_HEAD}", 431)
    return payload


def _decode_head(payload: bytes, start: re.Pattern[bytes]) -> tuple[bytes, bytes, Fields]:
    """Return the two parts of the start line, and the fields, of a head that fits. Raises ProtocolError."""
    match = start.match(payload)
    if not match:
        raise ProtocolError("a head with a start line that may not be there")
    end = match.end()
    return match[1], match[2], _checked_fields(payload[end + 1 :]) if end < len(payload) else Fields()


def fields_of_head(payload: bytes) -> Fields:
    """Return the fields of a head that was checked before."""
    return fields_of(b"".join(payload.split(b"\0", 2)[2:]))


class RequestHead(NamedTuple):
    """A request's start line and fields; what it holds has passed the checks of this section."""

    method: bytes
    target: bytes
    headers: Headers

    def encode(self) -> bytes:
        """Return the bytes for an OPEN. Raises MessageError when they are too many."""
        return _encode_head(self.method, self.target, self.headers)

    @classmethod
    def decode(cls, payload: bytes) -> RequestHead:
        """Read what `encode` made. Raises ProtocolError."""
        return cls(*_decode_head(payload, _REQUEST_START))

    def to_wire(self, *, chunked: bool, upgrade: bool) -> bytes:
        """Return the head for the local service; the body's framing is made anew (RFC 9112 section 6)."""
        hop = b"\r\nConnection: Upgrade" if upgrade else b""
        if chunked:
            hop += b"\r\nTransfer-Encoding: chunked"
        return b"%b %b HTTP/1.1%b%b\r\n\r\n" % (self.method, self.target, Fields.of(self.headers).wire, hop)


class ResponseHead(NamedTuple):
    """A response's status line and fields; what it holds has passed the checks of this section."""

    status: int
    reason: bytes
    headers: Headers

    def encode(self) -> bytes:
        """Return the bytes for a HEAD. Raises MessageError when they are too many."""
        return _encode_head(b"%d" % self.status, self.reason, self.headers)

    @classmethod
    def decode(cls, payload: bytes) -> ResponseHead:
        """Read what `encode` made. Raises ProtocolError."""
        status, reason, headers = _decode_head(payload, _RESPONSE_START)
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
        if self.status in (101, 426):
            headers = end_to_end(self.headers, keep_upgrade=True)
        else:
            headers = Fields.of(self.headers).passed_on
        if self.status < 200 or self.status == 204:
            headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        return ResponseHead(self.status, self.reason, headers)


class _Framed(NamedTuple):
    """A response's head, and what it says about its content and the connection."""

    head: ResponseHead
    keep_alive: bool
    length: int | None
    is_chunked: bool


@remembered
def _parse_head(text: bytes) -> _Framed:
    """Read a response's head, without its end. Raises MessageError."""
    match = _STATUS_LINE.match(text)
    if not match:
        raise MessageError("not an HTTP/1 response", 502)
    headers = Fields([(name, value.strip(b" \t")) for name, value in _FIELD_LINE.findall(text)])
    if len(headers) != text.count(b"\r\n"):
        raise MessageError("a header line that is no field", 502)
    if len(headers) > MAX_FIELDS:
        raise MessageError(f"{len(headers)} fields, MAX_FIELDS is {MAX_FIELDS}", 502)
    minor, status, reason = match.groups(b"")
    if not _REASON.fullmatch(reason):
        reason = b""
    head, http11 = ResponseHead(int(status), reason, headers), minor == b"1"
    if head.interim:
        return _Framed(head, False, None, False)
    encodings = field_values(headers, b"transfer-encoding")
    length = head.content_length()
    if encodings and (length is not None or not http11 or [e.lower() for e in encodings] != [b"chunked"]):
        raise MessageError("Transfer-Encoding is not just chunked", 502)
    keep_alive = http11 and b"close" not in field_tokens(headers, b"connection") and head.status != 101
    return _Framed(head, keep_alive, length, bool(encodings))


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
            head, keep_alive, length, is_chunked = yield from self._read_head()
            self._events.append(head)
            if not head.interim:
                break
        else:
            raise MessageError(f"more than {MAX_INTERIM} interim responses", 502)
        self.head, self.keep_alive = head, keep_alive
        if head.has_body(self._method):
            if is_chunked:
                yield from self._read_chunks()
            elif length is not None:
                yield from self._read_content(length)
            else:
                self.keep_alive, self._until_close = False, True
                while True:
                    yield from self._read_content(len(self.excess) - self._start)
                    yield
        self.done = True

    def _read_head(self) -> Generator[None, None, _Framed]:
        while b"HTTP/1.".startswith(self.excess[self._start :]):  # anything else is refused without waiting for its end
            yield
        if not self.excess.startswith(b"HTTP/1.", self._start):
            raise MessageError("not an HTTP/1 response", 502)
        text = yield from self._read_until(b"\r\n\r\n", MAX_HEAD, "response head")
        return _parse_head(text)

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

    def __init__(self, method: bytes, *, http11: bool, keep_alive: bool, hsts: bytes = b"") -> None:
        """`hsts` is the Strict-Transport-Security of a response that has none of its own."""
        self.keep_alive = keep_alive
        self._hsts = hsts
        self.started = False  # the final head has been encoded
        self.until_close = False  # only the connection's end tells the visitor where the content ends
        self._method, self._http11 = method, http11
        self._body = True
        self._chunked = False
        self._remaining: int | None = None

    def head(self, head: ResponseHead, date: bytes, *, end: bool = False) -> bytes:
        """Return the head on the wire; `end` says that no content will come. Raises MessageError."""
        head = head.passed_on()
        start = b"HTTP/1.1 %d %b%b" % (head.status, head.reason, Fields.of(head.headers).wire)
        if head.interim:
            return start + b"\r\n\r\n" if self._http11 else b""
        hop = b""
        options = [b"Upgrade"] if head.status in (101, 426) else []
        self._body = head.has_body(self._method)
        self._remaining = head.content_length()
        if self._body and self._remaining is None:
            if end:
                self._remaining = 0
                hop += b"\r\nContent-Length: 0"
            elif self._http11:
                self._chunked = True
                hop += b"\r\nTransfer-Encoding: chunked"
            else:
                self.keep_alive, self.until_close = False, True
        if head.status == 101:
            self.keep_alive = False
        elif not self.keep_alive:
            options.append(b"close")
        elif not self._http11:
            options.append(b"keep-alive")
        if options:
            hop += b"\r\nConnection: " + b", ".join(options)
        if head.status >= 200 and not field_values(head.headers, b"date"):
            hop += b"\r\nDate: " + date  # RFC 9110 section 6.6.1
        if self._hsts and not field_values(head.headers, b"strict-transport-security"):
            hop += b"\r\nStrict-Transport-Security: " + self._hsts
        self.started = True
        return b"%b%b\r\n\r\n" % (start, hop)

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


@functools.lru_cache(MAX_HOSTS)
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


def check_framing(headers: Headers, version: tuple[int, int] = (1, 1)) -> None:
    """Check that a request's content can end in one place only (RFC 9112 section 6.3). Raises MessageError."""
    if version not in ((1, 0), (1, 1)):
        raise MessageError("not HTTP/1.0 or 1.1")
    encodings = field_values(headers, b"transfer-encoding")
    if encodings and version == (1, 0):
        raise MessageError("Transfer-Encoding under HTTP/1.0")  # section 6.1: its framing is faulty
    if encodings and (len(encodings) > 1 or field_values(headers, b"content-length")):
        raise MessageError("Transfer-Encoding beside another length")
    if encodings and encodings[0].lower() != b"chunked":
        raise MessageError("Transfer-Encoding is not just chunked", 501)


def split_target(method: bytes, target: bytes, headers: Headers) -> tuple[bytes, bytes]:
    """Return the target in origin-form and the host it is for (RFC 9112 section 3.2). Raises MessageError."""
    hosts = field_values(headers, b"host")
    if len(hosts) != 1:
        raise MessageError(f"{len(hosts)} Host fields")
    if not target.startswith(b"/") and (absolute := _ABSOLUTE.fullmatch(target)):
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
#     client  hello       version, key (a short hash of the token), nonce, what was dialled, tunnels, session to resume,
#                         whom the tunnels let in, which are for TCP, whether content may be compressed
#     server  challenge   nonce, salt, iterations
#     client  proof       ClientProof over the texts of hello and challenge
#     server  ready       ServerSignature, session, tunnels, how much was received   or   refused: code, reason, retry
#
# A hello that has rules (Access) is for a server that enforces them: its ready says so, or the client leaves. So it
# does when a ready has another URL than tcp:// for a tunnel that is for TCP.

PROTOCOL_VERSION = 1
UNKNOWN_TOKEN = "the server does not know this token, or not any more; `pytunnel serve` or pytunnel token add gives one"
ENFORCED = ("allow", "auth")  # what a ready lists
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

    def members(self, name: str) -> Iterator[tuple[str, Message]]:
        """Yield the members of a field, which are objects; none without it."""
        for key, value in self.get(name, dict, {}).items():
            member = Message("{}")
            if not isinstance(value, dict):
                raise ProtocolError(f"handshake field {name!r} is not of objects")
            member._fields = value
            yield key, member

    def numbers(self, name: str, high: int) -> dict[str, int]:
        """Return the members of a field, which are integers from 0 to `high`; none without it."""
        values = self.get(name, dict, {})
        if any(type(value) is not int or not 0 <= value <= high for value in values.values()):
            raise ProtocolError(f"handshake field {name!r} is not of numbers within 0 to {high}")
        return values

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return an integer field, which must lie in the range."""
        value = self.get(name, int, default)
        if not low <= value <= high:
            raise ProtocolError(f"handshake field {name!r} is not within {low} to {high}")
        return value


class Access(NamedTuple):
    """Which visitors a tunnel lets in: those from `networks` who know one of the passwords; without any, everybody.

    Of passwords there are salted digests only: neither end keeps them, and they do not cross the wire.
    """

    networks: Networks = ()
    salt: bytes = b""
    digests: tuple[bytes, ...] = ()
    pass_auth: bool = False  # the local service sees the visitor's Authorization, too

    @classmethod
    def parse(cls, allow: Sequence[str], auth: Sequence[str], pass_auth: bool, salt: bytes) -> Access:
        """Read networks and `user:password`s. Raises UsageError, which never repeats a password."""
        if len(allow) > MAX_NETWORKS or len(auth) > MAX_CREDENTIALS:
            raise UsageError(f"a tunnel may have {MAX_NETWORKS} times allow and {MAX_CREDENTIALS} times auth")
        if pass_auth and not auth:
            raise UsageError("pass-auth is nothing without auth; add --auth USER:PASS")
        networks = []
        for text in allow:
            try:
                networks.append(parse_network(text))
            except ValueError:
                forms = "203.0.113.7, 10.0.0.0/8 or 2001:db8::/32"
                raise UsageError(f"{escape(text)!r} is no address or network to allow: write it like {forms}") from None
        for text in auth:
            if not re.fullmatch(r"[^:]+:.+", text) or re.search(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]", text):
                raise UsageError("auth is not USER:PASS: give a user, a colon and a password, no control characters")
        digests = [_digest(salt, unicodedata.normalize("NFC", text).encode()) for text in auth]
        return cls(networks, salt, tuple(digests), pass_auth) if networks or digests else cls()

    def encode(self) -> dict[str, object]:
        """Return the members of a hello."""
        salt, digests = base64.b64encode(self.salt).decode(), base64.b64encode(b"".join(self.digests)).decode()
        return {"allow": list(map(str, self.networks)), "salt": salt, "digests": digests, "pass": self.pass_auth}

    @classmethod
    def decode(cls, message: Message) -> Access:
        """Read what `encode` made. Raises ProtocolError."""
        allow, digests = message.get("allow", list), message.bytes("digests")
        if len(allow) > MAX_NETWORKS or len(digests) > 32 * MAX_CREDENTIALS or len(digests) % 32:
            raise ProtocolError(f"{len(allow)} networks and {len(digests)} bytes of digests for a tunnel")
        try:
            networks = [parse_network(str(text)) for text in allow]
        except ValueError:
            raise ProtocolError("not a network that a tunnel could allow") from None
        each = tuple(digests[start : start + 32] for start in range(0, len(digests), 32))
        return cls(networks, message.bytes("salt"), each, message.get("pass", bool))

    def allows(self, address: str) -> bool:
        """Whether a visitor may come from there."""
        return not self.networks or within(address, self.networks)

    def accepts(self, credentials: bytes) -> bool:
        """Whether this is one of the passwords; that takes the same time whichever it is, or none."""
        digest = _digest(self.salt, credentials)
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0

    @property
    def takes_authorization(self) -> bool:
        """Whether the Authorization of a request is for the local service."""
        return self.pass_auth or not self.digests


EVERYBODY = Access()


def check_name(name: str) -> str:
    """Return a tunnel's name. Raises Refused when it is not a plain DNS label that visitors can rely on."""
    if not NAME_PATTERN.fullmatch(name) or name.startswith("xn--") or name in RESERVED_NAMES:
        raise Refused("name", f"{escape(name, 70)!r} is not allowed as a name: use a-z, 0-9 and hyphens, like web-1")
    return name


def default_name(token: str, machine: str, target: str) -> str:
    """Return the stable name of a tunnel that has not asked for one: 50 bits that strangers cannot guess."""
    digest = _digest(token.encode(), f"name\0{machine}\0{target}".encode(errors="surrogateescape"))
    return base64.b32encode(digest).decode()[:10].lower()


ADDRESS_ZONE = re.compile(r"localhost|[0-9a-f-]+\.sslip\.io")  # what an address lends for names below it


def _ends_in_number(host: str) -> bool:
    """Whether a host can only be an IPv4 address (WHATWG URL section 3.5), whatever it looks like."""
    return host.rpartition(".")[2].isdecimal()


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
        if _ends_in_number(host):
            raise MessageError("neither a host name nor an address")
        return cls(scheme, host, port if port != DEFAULT_PORTS[scheme] else None)

    def url(self, name: str) -> str:
        return f"{self.scheme}://{name}.{self.zone}{'' if self.port is None else f':{self.port}'}"


def tcp_url(server: str, port: int) -> str:
    """Return the public URL of a TCP tunnel on the host that a client has dialled. Raises MessageError."""
    return f"tcp://{parse_host(server.partition('://')[2].partition('/')[0])[0]}:{port}"


def tunnel_name(host: str, zones: Iterable[str]) -> str | None:
    """Return the tunnel that a visitor's host (from parse_host) means, None when it is the server's own host."""
    label, _, zone = host.partition(".")
    return label if zone and zone in zones and host not in zones and not _ends_in_number(host) else None


# ---- Callers --------------------------------------------------------------------------------------------------------
# What one address may do until it has to wait: be here so many times, and so much of what only trouble has much of.
# Nobody else waits with it. Times are seconds of any one clock.


class Allowance:
    """`burst` at once, and `rate` a second after that (a token bucket)."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, burst: float, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self._left, self._at = burst, 0.0

    def left(self, now: float) -> int:
        """Return how many there are."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return int(self._left)

    def take(self, now: float) -> bool:
        """Use one up; False when there is none."""
        if not self.left(now):
            return False
        self._left -= 1
        return True


class Caller:
    """An address from which visitors or clients call."""

    __slots__ = ("_guesses", "aborts", "handshakes", "lines", "open", "proved", "secured", "unsaid")

    def __init__(self) -> None:
        self.open = 0  # connections; of a visitor behind a trusted proxy, requests
        self.handshakes = 0  # of these, links that have not shown their token yet
        self.aborts = Allowance(MAX_ABORTS, ABORT_RATE)  # requests that it did not wait for
        self.secured = Allowance(MAX_SECURED, SECURE_RATE)  # TLS handshakes
        self.proved: set[str] = set()  # keys of the tokens that it has shown
        self._guesses: dict[str, Allowance] = {}
        self.lines = Allowance(MAX_CALLER_LINES, CALLER_LINE_RATE)  # in the log
        self.unsaid = 0  # lines that were left out since the last one

    def guesses(self, what: str, now: float) -> Allowance:
        """Return how often it may be wrong about tokens, or about a tunnel's password; each is a matter of its own."""
        if len(self._guesses) > MAX_GUESSED:
            self._guesses = {key: left for key, left in self._guesses.items() if left.left(now) < MAX_GUESSES}
        return self._guesses.setdefault(what, Allowance(MAX_GUESSES, GUESS_RATE))

    def line(self, text: str, now: float) -> str:
        """Return the line that the log gets about it, "" when there were too many."""
        if not self.lines.take(now):
            self.unsaid += 1
            return ""
        more, self.unsaid = self.unsaid, 0
        return f"{text} ({more} more of this address were left out)" if more else text


class Callers:
    """By address: of IPv6 by the /64, which is the least that anybody gets."""

    def __init__(self) -> None:
        self._callers: dict[str, Caller] = {}

    def __getitem__(self, address: str) -> Caller:
        if ":" in address:
            with contextlib.suppress(ValueError):
                ipv6 = ipaddress.IPv6Address(address)
                address = str(ipv6.ipv4_mapped or f"{int(ipv6) >> 64:x}::/64")
        caller = self._callers.get(address)
        if caller is None:
            if len(self._callers) >= MAX_CALLERS:  # those that are here stay, and they are bounded elsewhere
                here = {key: caller for key, caller in self._callers.items() if caller.open or caller.handshakes}
                self._callers = here
            caller = self._callers[address] = Caller()
        return caller


# ---- Metrics --------------------------------------------------------------------------------------------------------
# What a server counts, as Prometheus reads it: a name, or name{label="value"}, and a number.

METRICS = {  # name -> type, help
    "pytunnel_sessions": ("gauge", "Sessions of clients, with a link or waiting for one."),
    "pytunnel_links": ("gauge", "Links in use."),
    "pytunnel_streams": ("gauge", "Requests that are open in sessions."),
    "pytunnel_visitors": ("gauge", "Connections of visitors and clients."),
    "pytunnel_buffered_bytes": ("gauge", "Bytes that sessions keep until they are sent, acknowledged or read."),
    "pytunnel_tasks": ("gauge", "Tasks of the event loop."),
    "pytunnel_received_bytes_total": ("counter", "Content of visitors' requests, and what they sent after a 101."),
    "pytunnel_sent_bytes_total": ("counter", "Content of responses, and what visitors got after a 101."),
    "pytunnel_saved_bytes_total": ("counter", "Content that links did not have to carry, because it was compressed."),
    "pytunnel_responses_total": ("counter", "Responses to visitors by class of status, our own pages included."),
    "pytunnel_refusals_total": ("counter", "Requests and connections that got a page of our own, by X-Pytunnel-Error."),
    "pytunnel_tcp_connections_total": ("counter", "Connections of visitors to TCP tunnels."),
    "pytunnel_aborts_total": ("counter", "Requests whose visitor went away."),
    "pytunnel_handshakes_total": ("counter", "Handshakes of clients by result."),
    "pytunnel_tls_handshakes_total": ("counter", "TLS handshakes by result."),
    "pytunnel_certificate_seconds": ("gauge", "Until the first certificate in use expires."),
    "pytunnel_resumes_total": ("counter", "Links that went on with a session."),
    "pytunnel_event_loop_lag_seconds": ("histogram", "How late the event loop ran what was due."),
    "process_open_fds": ("gauge", "File descriptors in use."),
    "process_resident_memory_bytes": ("gauge", "Resident memory."),
}
RESPONSES_TOTAL = [f'pytunnel_responses_total{{class="{digit}xx"}}' for digit in range(6)]
LAG_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf)  # seconds


class Metrics(collections.Counter[str]):
    """Samples by name and labels."""

    def observe_lag(self, seconds: float) -> None:
        """Count how late the event loop was."""
        name = "pytunnel_event_loop_lag_seconds"
        for bound in LAG_BUCKETS:
            self[f'{name}_bucket{{le="{"+Inf" if bound == math.inf else f"{bound:g}"}"}}'] += seconds <= bound
        self[f"{name}_sum"] += seconds  # type: ignore[assignment]
        self[f"{name}_count"] += 1

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return everything in Prometheus's text format 0.0.4."""
        samples: dict[str, list[str]] = {name: [] for name in METRICS}
        for key, value in {**self, **gauges}.items():
            name = re.sub(r"(_bucket|_sum|_count)?(\{.*)?\Z", "", key)
            samples[name].append(f"{key} {value:.15g}\n")
        blocks = (
            f"# HELP {name} {text}\n# TYPE {name} {type_}\n{''.join(samples[name])}"
            for name, (type_, text) in METRICS.items()
            if samples[name]
        )
        return "".join(blocks)


# ---- Exchanges ------------------------------------------------------------------------------------------------------
# One request and its response, as whoever watches sees it. Terminal view, inspector, scripts and the Python API read
# this one log; nothing here holds up the traffic, and it is bounded in number and bytes.

# A parameter, member of JSON or field is secret by its name. Its parts are bounded, so that no text takes long.
_SECRET = r"token|secret|passw(?:or)?d|pwd|api_?key|signature|session|credential|jwt|auth(?![a-z])"
_SECRET_PARAMETER = re.compile(
    rf"(?i)(?<![^?&\s])((?:[\w.%\[\]-]{{0,64}}(?:{_SECRET})[\w.%\[\]-]{{0,64}}|sig|key|code)=)[^&#\s\"]+"
)
_SECRET_MEMBER = re.compile(
    rf'(?i)("[^"\n]{{0,64}}(?:{_SECRET})[^"\n]{{0,64}}"\s{{0,8}}:\s{{0,8}})(?:"(?:[^"\\]|\\.)*"?|-?\w[\w.+-]*)'
)
_SECRET_PART = re.compile(rf"{_SECRET}|sig|key|code")  # quick to tell, and in all that these find
_SECRET_FIELD = re.compile(rb"(?i).*(?:token|secret|password|api-?key|authorization|cookie\Z|credential)")
MASK = "•••"


def mask(text: str) -> str:
    """Return a target or a body with the values of parameters and JSON members that look like secrets masked."""
    if "=" not in text and ":" not in text:  # most targets are just a path
        return text
    if text.isascii() and not _SECRET_PART.search(text.lower()):
        return text
    return _SECRET_MEMBER.sub(rf'\1"{MASK}"', _SECRET_PARAMETER.sub(rf"\1{MASK}", text))


def mask_headers(headers: Headers) -> Headers:
    """Return header fields with the values of those that carry secrets masked."""
    masked = []
    for name, value in headers:
        if _SECRET_FIELD.match(name):
            value = MASK.encode()
        elif name.lower() in (b"location", b"referer"):
            value = mask(value.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        masked.append((name, value))
    return masked


class Note(NamedTuple):
    """A WebSocket message's frame, or an event of an event stream, in an exchange that goes on."""

    at: float  # seconds since the exchange began
    from_visitor: bool
    kind: str
    size: int
    data: bytes  # its first MAX_NOTE bytes


class WebSocketReader:
    """Reads the frames of one direction of a WebSocket, sliced anyhow (RFC 6455 section 5.2), for people to see."""

    KINDS: ClassVar = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0  # bytes of a long payload that are not kept
        self._inflate: Any = zlib.decompressobj(-15)  # None once a compressed frame could not be followed

    def feed(self, data: bytes) -> Iterator[tuple[str, int, bytes]]:
        """Yield kind, size and first bytes of each frame."""
        buffer = self._buffer
        buffer += data
        while True:
            skipped = min(self._skip, len(buffer))
            del buffer[:skipped]
            self._skip -= skipped
            if self._skip or len(buffer) < 2:
                return
            size, extended = buffer[1] & 0x7F, {126: 2, 127: 8}.get(buffer[1] & 0x7F, 0)
            start = 2 + extended + (4 if buffer[1] & 0x80 else 0)
            if extended:
                size = int.from_bytes(buffer[2 : 2 + extended])
            kept = min(size, MAX_INFLATE if buffer[0] & 0x40 and self._inflate else MAX_NOTE)
            if len(buffer) < start + kept:
                return
            payload = bytes(buffer[start : start + kept])
            if buffer[1] & 0x80:
                masking_key = (bytes(buffer[start - 4 : start]) * (kept // 4 + 1))[:kept]
                payload = (int.from_bytes(payload) ^ int.from_bytes(masking_key)).to_bytes(kept)
            kind = self.KINDS.get(buffer[0] & 0x0F, "reserved")
            if buffer[0] & 0x40:
                text = self._inflated(payload if kept == size and buffer[0] & 0x80 else None)
                kind, payload = (kind, text) if text is not None else (f"{kind}, compressed", payload)
            elif kind == "close" and kept >= 2:
                kind, payload = f"close {int.from_bytes(payload[:2])}", payload[2:]
            del buffer[: start + kept]
            self._skip = size - kept
            yield kind, size, payload[:MAX_NOTE]

    def _inflated(self, payload: bytes | None) -> bytes | None:
        """Return what a compressed message holds (RFC 7692 section 7.2.2); None from the first that is not whole."""
        if self._inflate and payload is not None:
            with contextlib.suppress(zlib.error):
                text: bytes = self._inflate.decompress(payload + b"\0\0\xff\xff", MAX_DATA)
                if not self._inflate.unconsumed_tail:
                    return text
        self._inflate = None
        return None


class EventReader:
    """Reads an event stream's events, sliced anyhow (WHATWG HTML section 9.2)."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[tuple[str, int, bytes]]:
        """Yield kind, size and first bytes of each event."""
        *events, rest = re.split(rb"\r\n\r\n|\n\n|\r\r", self._buffer + data)
        self._buffer = rest[-MAX_DATA:]
        yield from (("event", len(event), event[:MAX_NOTE]) for event in events if event)


@dataclass(slots=True, eq=False)
class Exchange:
    """Sizes are bytes of content, times seconds of the monotonic clock; bodies are prefixes of MAX_PREFIX bytes.

    The request is as the visitor sent it, the response as the visitor gets it.
    """

    tunnel: str
    method: str
    target: str
    started: float
    time: float = 0.0  # when it started, in seconds since 1970
    id: int = 0  # counts from 1
    request_head: bytes = b""  # as in OPEN and HEAD: one object, where a list of fields would be dozens
    response_head: bytes = b""
    request_body: bytearray = field(default_factory=bytearray)
    response_body: bytearray = field(default_factory=bytearray)
    notes: collections.deque[Note] | tuple[Note, ...] = ()  # the last MAX_NOTES
    status: int | None = None  # what the visitor gets; None: nothing
    reason: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    error: str = ""
    waited: float = 0.0  # seconds on the server before it was sent on, as while the client was away
    round_trip: float | None = None  # seconds, of the link
    answered: float | None = None  # when the local service's response began
    ended: float | None = None
    replay_of: int | None = None
    version: int = 0  # the log's, when this was last changed
    kept: int = 0  # bytes of heads and bodies
    readers: tuple[WebSocketReader | EventReader | None, WebSocketReader | EventReader | None] = (None, None)

    @property
    def duration(self) -> float:
        """Seconds from the request's arrival to the response's end."""
        return (self.ended or self.started) - self.started

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def is_tcp(self) -> bool:
        """Whether it is a connection to a TCP tunnel; its target is the visitor's address."""
        return self.method == "TCP"

    @property
    def request_headers(self) -> Headers:
        return list(fields_of_head(self.request_head))

    @property
    def response_headers(self) -> Headers:
        """The fields of the response, none before it has a head."""
        return list(fields_of_head(self.response_head))

    def summary(self) -> dict[str, Any]:
        """Return it as a program sees it: JSON values, secrets masked, sizes in bytes, `ms` None while it runs."""
        return {
            "id": self.id,
            "name": self.tunnel,
            "method": self.method,
            "path": mask(self.target),
            "status": self.status,
            "ms": round(self.duration * 1000, 1) if self.ended else None,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "error": self.error or None,
        }

    def matches(self, query: str) -> bool:
        """Whether each word of a filter is found: `5xx`, `404`, `post`, `body:text`, or a part of what a list shows."""
        status = str(self.status or "---")
        line = " ".join((self.method, self.target, self.tunnel, self.error)).lower()

        def found(word: str) -> bool:
            if word.startswith("body:") and (text := word[5:].encode()):
                return text in self.request_body.lower() or text in self.response_body.lower()
            if re.fullmatch(r"[1-5](xx|[0-9]{2})", word):
                return word in (status, status[0] + "xx")
            return word in line

        return all(map(found, query.lower().split()))


def one_line(summary: Mapping[str, Any]) -> str:
    """Return an exchange's summary as a line for a terminal."""
    error = f"  {escape(summary['error'])}" if summary["error"] else ""
    start = f"{summary['status'] or '---'} {escape(summary['method']):<7} {escape(summary['path'], 80)}"
    if summary["method"] == "TCP":
        start += f"  {summary['bytes_in']} bytes in, {summary['bytes_out']} out"
    return f"{start}  {summary['ms'] or 0:.0f} ms{error}"


class ExchangeLog:
    """The last exchanges of a client, at most MAX_EXCHANGES of them and MAX_LOG bytes; those ended first make room."""

    def __init__(self) -> None:
        # By id, the oldest first; a plain dict looks through all that was removed to find its first key.
        self.exchanges: collections.OrderedDict[int, Exchange] = collections.OrderedDict()
        self.listeners: set[Callable[[], object]] = set()  # called at each change; they return at once
        self.version = 0  # counts changes
        self.total = self.in_flight = self.bytes_in = self.bytes_out = 0
        self.totals: collections.Counter[str] = collections.Counter()  # by tunnel
        self.classes = dict.fromkeys((1, 2, 3, 4, 5), 0)  # how many responses of each class of status
        self._kept = 0

    def begin(self, exchange: Exchange) -> None:
        """Take up an exchange, whose request's head is known."""
        self.total += 1
        self.totals[exchange.tunnel] += 1
        self.in_flight += 1
        exchange.id = self.total
        self.exchanges[exchange.id] = exchange
        self._keep(exchange, len(exchange.request_head))
        self.touch(exchange)

    def respond(self, exchange: Exchange, head: ResponseHead, payload: bytes) -> None:
        """Note the head that the visitor gets, and the same as in its HEAD."""
        exchange.status, exchange.reason = head.status, head.reason.decode("latin-1")
        exchange.response_head = payload
        content_type = b"".join(field_values(head.headers, b"content-type")).lower()
        if head.status == 101 and field_tokens(head.headers, b"upgrade") == {b"websocket"}:
            exchange.readers = WebSocketReader(), WebSocketReader()
        elif content_type.startswith(b"text/event-stream"):
            exchange.readers = None, EventReader()
        if exchange.readers[1]:
            exchange.notes = collections.deque(maxlen=MAX_NOTES)
        self._keep(exchange, len(payload))
        self.touch(exchange)

    def receive(self, exchange: Exchange, data: bytes, now: float) -> None:
        """Note bytes of the request's content, or a visitor's in a connection that was upgraded."""
        exchange.bytes_in += len(data)
        self.bytes_in += len(data)
        self._record(exchange, exchange.request_body, data, now, from_visitor=True)

    def send(self, exchange: Exchange, data: bytes, now: float) -> None:
        """Note bytes of the response's content, or of the local service in a connection that was upgraded."""
        exchange.bytes_out += len(data)
        self.bytes_out += len(data)
        self._record(exchange, exchange.response_body, data, now, from_visitor=False)

    def finish(self, exchange: Exchange, now: float) -> None:
        """The exchange is over, well or not."""
        exchange.ended = now
        exchange.readers = None, None
        self.in_flight -= 1
        if exchange.status:
            self.classes[exchange.status // 100] += 1
        self.touch(exchange)

    def touch(self, exchange: Exchange | None = None) -> None:
        """Something has changed: in an exchange, or in the link that they come over."""
        self.version += 1
        if exchange:
            exchange.version = self.version
        for listener in self.listeners:
            listener()

    def since(self, version: int) -> list[Exchange]:
        """Return the exchanges that have changed since the log had this version."""
        return [exchange for exchange in self.exchanges.values() if exchange.version > version]

    def clear(self) -> None:
        """Forget all exchanges; the counts stay."""
        self.exchanges.clear()
        self._kept = 0
        self.touch()

    def percentiles(self) -> tuple[float, float] | None:
        """Return p50 and p90 of the durations of those that have ended, in seconds; None without any."""
        ended = sorted(e.duration for e in list(self.exchanges.values()) if e.ended is not None and e.status != 101)
        return (ended[len(ended) // 2], ended[len(ended) * 9 // 10]) if ended else None

    def _record(self, exchange: Exchange, body: bytearray, data: bytes, now: float, *, from_visitor: bool) -> None:
        if reader := exchange.readers[0 if from_visitor else 1]:
            at = now - exchange.started
            notes = cast(collections.deque[Note], exchange.notes)
            notes.extend(Note(at, from_visitor, *note) for note in reader.feed(data))
        room = 0 if isinstance(reader, WebSocketReader) or exchange.is_tcp else MAX_PREFIX - len(body)
        if room > 0 and exchange.id in self.exchanges:
            body += data[:room]
            self._keep(exchange, min(len(data), room))
        self.touch(exchange)

    def _keep(self, exchange: Exchange, size: int) -> None:
        if exchange.id in self.exchanges:
            exchange.kept += size
            self._kept += size
        while len(self.exchanges) > MAX_EXCHANGES or self._kept > MAX_LOG:
            ended = (e.id for e in self.exchanges.values() if e.ended is not None)
            self._kept -= self.exchanges.pop(next(ended, next(iter(self.exchanges)))).kept


# ---- Views ----------------------------------------------------------------------------------------------------------
# What terminal view, inspector and scripts make of a recorded exchange: bodies by type, a curl command, a HAR, a diff.

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\],:]|[^\s{}\[\],:"]+')


class View(NamedTuple):
    """A body as a person reads it: `text`, not yet escaped for a terminal; `note` says what is missing."""

    kind: str  # json, form, text, image, hex or empty
    text: str = ""
    note: str = ""


def human_size(size: float) -> str:
    """Return a number of bytes in a few characters, like `3.1 MiB`."""
    step = 0
    while size >= 1000 and step < 4:
        size, step = size / 1024, step + 1
    return f"{size:.{0 if size >= 99.95 or not step else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"


def indent_json(text: str) -> str:
    """Return JSON with a line for each member; tokens stay as they were written, and half a text is no error."""
    out: list[str] = []
    depth, before, room = 0, "", 4 * MAX_VIEW
    for token in _JSON_TOKEN.findall(text):
        if token in ("}", "]"):
            depth = max(0, depth - 1)
            new_line = before not in ("{", "[")
        else:
            new_line = before in ("{", "[", ",") or (before != "" and not depth)  # at depth 0 another document begins
        if new_line:
            room -= 2 * depth
            out.append("\n" + "  " * depth if room > 0 else "")  # else a text of brackets only would fill memory
        elif before == ":":
            out.append(" ")
        out.append(token)
        depth += token in ("{", "[")
        before = token
    return "".join(out)


def hex_dump(data: bytes) -> str:
    """Return the first 4 KiB as offset, 16 bytes in hexadecimal, and the printable ones of them."""
    rows = []
    for at in range(0, min(len(data), 4 * KiB), 16):
        row = data[at : at + 16]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        rows.append(f"{at:08x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  {shown}")
    return "\n".join(rows)


def unpack(coding: bytes, data: bytes) -> bytes:
    """Undo a content coding, up to MAX_VIEW bytes and as far as `data` goes. Raises ValueError when it cannot."""
    try:
        if coding in (b"gzip", b"x-gzip", b"deflate"):
            return zlib.decompressobj(47).decompress(data, MAX_VIEW)
        if coding == b"zstd":
            import zstandard

            return zstandard.ZstdDecompressor(max_window_size=8 * MiB).stream_reader(data).read(MAX_VIEW)
    except Exception as error:  # zlib.error, zstandard.ZstdError
        raise ValueError(f"not {coding.decode()}: {error}") from None
    raise ValueError(f"{escape(coding)} cannot be unpacked here")


def _text(data: bytes | bytearray, *, cut: bool = False) -> str | None:
    """Return what UTF-8 says, None when it is something else; with `cut` the end may lie inside a character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=not cut)
    except UnicodeDecodeError:
        return None


def body_view(headers: Headers, body: bytes | bytearray, size: int, *, reveal: bool = False) -> View:
    """Return what to show of a body of `size` bytes, of which `body` is the kept beginning."""
    data, notes = bytes(body), []
    if not body:
        return View("empty")
    if size > len(data):
        notes.append(f"the first {human_size(len(data))} of {human_size(size)}")
    content_type = b"".join(field_values(headers, b"content-type")[:1]).lower()
    try:
        for coding in field_tokens(headers, b"content-encoding") - {b"identity", b""}:
            data = unpack(coding, data)
            notes.append(f"unpacked from {escape(coding)}")
        text = _text(data, cut=True)
    except ValueError as error:
        notes.append(str(error))
        text = None
    note = ", ".join(notes)
    if text is None or "\0" in text:
        is_image = content_type.startswith(b"image/") and size <= len(body)
        return View("image", "", note) if is_image else View("hex", hex_dump(data), note)
    text = text if reveal else mask(text)
    if b"json" in content_type or text.lstrip()[:1] in ("{", "["):
        return View("json", indent_json(text), note)
    if content_type.startswith(b"application/x-www-form-urlencoded"):
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True)
        return View("form", "\n".join(f"{name} = {value}" for name, value in pairs), note)
    return View("text", text, note)


def text_fields(headers: Headers, *, reveal: bool = False) -> list[tuple[str, str]]:
    """Return header fields as text; secrets are masked unless `reveal`."""
    shown = headers if reveal else mask_headers(headers)
    return [(name.decode(), value.decode("utf-8", "replace")) for name, value in shown]


def timings(exchange: Exchange) -> dict[str, float | None]:
    """Return seconds: waiting on the server, over the link and back, until the local service answered, its content."""
    answered, ended = exchange.answered, exchange.ended
    return {
        "server": exchange.waited,
        "link": exchange.round_trip,
        "local": (answered or ended or exchange.started) - exchange.started if answered or ended else None,
        "content": ended - answered if ended is not None and answered is not None else None,
    }


def as_curl(exchange: Exchange, url: str, *, reveal: bool = False) -> str:
    """Return a shell command that sends the request to its tunnel at `url`; secrets are masked unless `reveal`.

    For a connection to a TCP tunnel it is one that makes another.
    """
    if exchange.is_tcp:
        at = urllib.parse.urlsplit(url)
        return shlex.join(["nc", at.hostname or "", str(at.port or "")])
    target = exchange.target if reveal else mask(exchange.target)
    words = ["curl", "--globoff"] if set(target) & set("[]{}") else ["curl"]
    if "/." in target:
        words.append("--path-as-is")
    body = bytes(exchange.request_body)
    if exchange.method != "GET" or body:
        words += ["--head"] if exchange.method == "HEAD" else ["-X", exchange.method]
    skipped = {"host", "content-length", *(name.decode().lower() for name in OUR_FORWARDED)}
    for name, value in text_fields(exchange.request_headers, reveal=reveal):
        if name.lower() not in skipped:
            words += ["-H", f"{name}: {value}" if value else f"{name};"]
    if body and not field_values(exchange.request_headers, b"content-type"):
        words += ["-H", "Content-Type:"]
    before, text = "", _text(body)
    text = text if reveal or not text else mask(text)
    if text and "\0" not in text and len(body) < 100 * KiB:  # an argument that a kernel takes
        words += ["--data-raw", text]
    elif body:
        before = f"echo {base64.b64encode(body).decode()} | base64 -d | "
        words += ["--data-binary", "@-"]
    cut = f"  # only the first {len(body)} bytes of its content" if exchange.bytes_in > len(body) else ""
    return before + shlex.join([*words, url + target]) + cut


def as_har(exchanges: Iterable[Exchange], urls: Mapping[str, str], *, reveal: bool = False) -> dict[str, Any]:
    """Return an HTTP archive (HAR 1.2); `urls` are those of the tunnels by name, secrets are masked unless `reveal`."""

    def named(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
        return [{"name": name, "value": value} for name, value in pairs]

    def message(headers: Headers, size: int) -> dict[str, Any]:
        fields = named(text_fields(headers, reveal=reveal))
        return {"httpVersion": "HTTP/1.1", "cookies": [], "headers": fields, "headersSize": -1, "bodySize": size}

    def content(headers: Headers, body: bytearray) -> dict[str, Any]:
        mime, text = b"".join(field_values(headers, b"content-type")[:1]).decode("latin-1"), _text(body)
        if text is None:
            return {"mimeType": mime, "text": base64.b64encode(body).decode(), "encoding": "base64"}
        return {"mimeType": mime, "text": text if reveal else mask(text)}

    def entry(e: Exchange) -> dict[str, Any]:
        target = e.target if reveal else mask(e.target)
        request = {
            "method": e.method,
            "url": urls.get(e.tunnel, "") + target,
            "queryString": named(urllib.parse.parse_qsl(target.partition("?")[2], keep_blank_values=True)),
            **message(e.request_headers, e.bytes_in),
        }
        if e.request_body:
            posted = content(e.request_headers, e.request_body)
            request["postData"] = {"_encoding" if name == "encoding" else name: posted[name] for name in posted}
        got = message(e.response_headers, e.bytes_out)
        response = {
            "status": e.status or 0,
            "statusText": e.reason,
            "content": {"size": e.bytes_out, **content(e.response_headers, e.response_body)},
            "redirectURL": "".join(field["value"] for field in got["headers"] if field["name"].lower() == "location"),
            **got,
        }
        ms = {name: round(1000 * (value or 0.0), 3) for name, value in timings(e).items()}
        return {
            "startedDateTime": datetime.datetime.fromtimestamp(e.time, datetime.UTC).isoformat(),
            "time": sum(ms.values()),
            "request": request,
            "response": response,
            "cache": {},
            "timings": {"blocked": ms["server"], "send": ms["link"], "wait": ms["local"], "receive": ms["content"]},
            "comment": e.error,
        }

    entries = [entry(e) for e in exchanges if not e.is_tcp]
    return {"log": {"version": "1.2", "creator": {"name": "pytunnel", "version": __version__}, "entries": entries}}


def diff(before: Exchange, after: Exchange) -> list[str]:
    """Return what differs between two responses, as lines of a unified diff; none when nothing does."""

    def lines(e: Exchange) -> list[str]:
        shown = text_fields(e.response_headers)
        fields = [f"{name}: {value}" for name, value in shown if name.lower() != "date"]  # which always differs
        body = body_view(e.response_headers, e.response_body, e.bytes_out)
        return [f"{e.status} {e.reason}", *fields, "", *body.text.splitlines(), *filter(None, [body.note])]

    names = f"#{before.id}", f"#{after.id}"
    old, new = lines(before)[:MAX_DIFF], lines(after)[:MAX_DIFF]
    return list(difflib.unified_diff(old, new, *names, lineterm=""))


# ---- Screen ---------------------------------------------------------------------------------------------------------
# What the terminal view shows: a snapshot in, lines out; keys in, actions out. Text from the network goes through
# `printable`, and what may run from right to left, the path, stands last in its row: nothing takes another's place.

Span = tuple[str, str]  # a style and a text
Spans = list[Span]
Action = Literal["quit", "replay", "copy", "export"]

PALETTES: dict[int, dict[str, str]] = {  # by number of colours: SGR codes that both dark and light backgrounds bear
    0: {"bold": "1", "key": "1", "selected": "7", "cursor": "7"},
    16: {"muted": "2", "link": "1;36", "1xx": "35", "2xx": "32", "3xx": "36", "4xx": "33", "5xx": "31"},
    256: {"muted": "38;5;244", "1xx": "38;5;97", "2xx": "38;5;28", "3xx": "38;5;31", "4xx": "38;5;166"},
}
PALETTES[16] = PALETTES[0] | PALETTES[16]
PALETTES[256] = PALETTES[16] | PALETTES[256]

_VARIANTS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # on these, terminals differ about the width
_WIDENED = re.compile(  # allow for both: wide since Unicode 16; a flag's two letters share two cells, or have two each
    "[\u2630-\u2637\u268a-\u268f\u4dc0-\u4dff\U0001d300-\U0001d37f\U0001f1e6-\U0001f1ff]"
)

_KEYS = {"\r": "enter", "\n": "enter", "\t": "right", "\x1b": "escape", "\x7f": "backspace", "\b": "backspace"}
_SEQUENCES = {
    **{"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end", "Z": "left"},
    **{"1~": "home", "4~": "end", "5~": "page up", "6~": "page down", "7~": "home", "8~": "end"},
    **{"<64M": "wheel up", "<65M": "wheel down"},
}
_SEQUENCE = re.compile(r"\x1b(?:\[([0-9:;<=>?]{0,32})([@-~])|O([A-Z]))")
_BEGINNING = re.compile(r"\x1b(?:\[[0-9:;<=>?]{0,32}|O)?")


class KeyReader:
    """Bytes from a terminal in, names of keys out, sliced anyhow."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the keys; a character is its own name."""
        self._text += self._decoder.decode(data)
        while self._text and not _BEGINNING.fullmatch(self._text):
            match = _SEQUENCE.match(self._text)
            if match:
                parameters, final = match[1] or "", match[2] or match[3]
                first = "" if final.isalpha() and final not in "Mm" else parameters.partition(";")[0]
                key = _SEQUENCES.get(first + final, "")
            else:
                key = _KEYS.get(self._text[0], self._text[0])
            self._text = self._text[match.end() if match else 1 :]
            if key:
                yield key

    def flush(self) -> Iterator[str]:
        """No more has come: an escape that stands alone is the key; the beginning of a sequence is nothing."""
        alone, self._text = self._text == "\x1b", ""
        yield from ["escape"] if alone else []


def _cells(char: str) -> int:
    """Return how many cells of a terminal a printable character takes, at the most."""
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" or _WIDENED.match(char) else 1


def width_of(text: str) -> int:
    """Return how many cells a printable text takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def printable(text: str | bytes, limit: int = MAX_FIELD) -> str:
    """Return text from the network for a screen: escaped, and with few marks on a character, none on one of ours."""
    text = escape(text, limit)
    if text.isascii():
        return text
    kept, marks = [], MAX_MARKS
    for char in _VARIANTS.sub("", text):
        marks = 0 if _cells(char) else marks + 1
        if marks <= MAX_MARKS:
            kept.append(char)
    return "".join(kept)


def wrap(text: str, width: int) -> Iterator[str]:
    """Cut a printable text into lines of at most `width` cells."""
    if text.isascii():
        yield from (text[at : at + width] for at in range(0, len(text) or 1, width))
        return
    start = used = 0
    for at, char in enumerate(text):
        cells = _cells(char)
        if used + cells > width and at > start:
            yield text[start:at]
            start, used = at, 0
        used += cells
    yield text[start:]


def fit(text: str, width: int) -> str:
    """Cut a printable text to `width` cells, with a mark."""
    if width_of(text) <= width:
        return text
    head = next(wrap(text, width - 1)) if width > 1 else ""
    return (head if width_of(head) < width else "") + "…"[: max(0, width)]


def paint(spans: Spans, width: int, palette: Mapping[str, str], *, selected: bool = False) -> str:
    """Return a line of at most `width` cells; a selected one is filled and has one style."""
    line = ""
    for style, text in [*spans, ("", " " * width)] if selected else spans:
        text = text[:width] if text.isspace() else fit(text, width)
        code = "" if selected else palette.get(style, "")
        line += f"\x1b[{code}m{text}\x1b[m" if code and text else text
        width -= width_of(text)
    return f"\x1b[{palette['selected']}m{line}\x1b[m" if selected else line


def _flow(groups: Iterable[Spans], width: int, gap: str = "   ") -> list[Spans]:
    """Lay groups of spans out on as few lines as `width` allows."""
    lines: list[Spans] = []
    left = 0
    for group in groups:
        size = sum(width_of(text) for _, text in group)
        if not lines or left < size + len(gap):
            lines.append([("", " "), *group])
            left = width - 1 - size
        else:
            lines[-1] += [("", gap), *group]
            left -= size + len(gap)
    return lines


def human_time(seconds: float) -> str:
    """Return a duration in a few characters, like `12 ms` or `1:03 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    minutes, unit = (seconds / 60, "min") if seconds < 3600 else (seconds / 3600, "h")
    return f"{int(minutes)}:{int(minutes % 1 * 60):02} {unit}"


class Snapshot(NamedTuple):
    """All that the view shows at one moment."""

    screen: Screen
    now: float  # in the time of the exchanges and of `retry_at`
    tunnels: list[tuple[str, str, str]]  # name, public URL ("" before it is known) and local target
    inspector_url: str
    problem: str  # why there is no link; "" while there is one
    retry_at: float | None
    round_trip: float | None
    log: ExchangeLog
    exchanges: list[Exchange]  # the oldest first
    colours: int = 16  # 0, 16, or 256
    utc_offset: float = 0.0  # seconds of the local time


class Screen:
    """What the user has chosen to see. Keys change it, and `arrange` fits it to what there is."""

    TABS = ("Info", "Headers", "Body", "Response")
    MOVES: ClassVar = {  # rows, pages
        **{"up": (-1, 0), "k": (-1, 0), "wheel up": (-3, 0), "page up": (0, -1), "home": (0, -9999), "g": (0, -9999)},
        **{"down": (1, 0), "j": (1, 0), "wheel down": (3, 0), "page down": (0, 1), "end": (0, 9999), "G": (0, 9999)},
    }
    ACTIONS: ClassVar[dict[str, Action]] = {"q": "quit", "r": "replay", "c": "copy", "e": "export"}

    def __init__(self) -> None:
        self.filter, self.typing = "", False
        self.opened: Exchange | None = None  # whose details show
        self.tab = self.scroll = 0  # of the details
        self.reveal = False  # secrets
        self.notice = ""
        self.shown: list[Exchange] = []  # that the filter lets through, the newest first
        self.selected = self.first = self.seen = 0  # ids: under the cursor, in the first row, the newest that was seen
        self.following = True  # the cursor stays on the newest
        self.rows = 1  # that fit
        self.lines: list[Spans] = []  # of the details

    @property
    def cursor(self) -> int:
        """The index of the selected exchange, or of the one before it when that is gone."""
        return self._index(self.selected)

    @property
    def exchange(self) -> Exchange | None:
        """What actions are about."""
        return self.opened or (self.shown[self.cursor] if self.shown else None)

    @property
    def unseen(self) -> int:
        """How many exchanges have come above the first row."""
        return sum(exchange.id > self.seen for exchange in self.shown)

    def select(self, exchange: Exchange, *, opened: bool = False) -> None:
        """Go to an exchange, and into its details when those of another one are open."""
        self.selected, self.following = exchange.id, False
        if opened or self.opened:
            self.opened, self.scroll = exchange, 0

    def key(self, name: str) -> Action | None:
        """Take a key; return what it asks for beyond the screen."""
        self.notice = ""
        if self.typing:
            self._type(name)
        elif name in self.MOVES:
            rows, pages = self.MOVES[name]
            self._move(rows + pages * max(1, self.rows - 1))
        elif name == "s":
            self.reveal = not self.reveal
        elif self.opened and name in ("q", "escape", "enter"):  # q as in a pager: it does not mean to end the tunnel
            self.opened = None
        elif self.opened and name in ("left", "right"):
            self.tab, self.scroll = (self.tab + (1 if name == "right" else -1)) % len(self.TABS), 0
        elif self.opened and name in ("1", "2", "3", "4"):
            self.tab, self.scroll = int(name) - 1, 0
        elif name in self.ACTIONS:
            return self.ACTIONS[name]
        elif name == "enter" and self.exchange:
            self.select(self.exchange, opened=True)
        elif name == "/" and not self.opened:
            self.typing = True
        elif name == "escape":
            self.filter, self.following = "", True
        return None

    def arrange(self, snapshot: Snapshot, width: int, height: int) -> None:
        """Fit it to what there is to show, and to the size; `render` comes next."""
        self.shown = [e for e in reversed(snapshot.exchanges) if e.matches(self.filter)]
        self.rows = max(1, height - len(_head(snapshot, width, height)) - 1)
        if self.opened:
            self.lines = list(_details(snapshot, self.opened, width))
            self.scroll = max(0, min(self.scroll, len(self.lines) - self.rows))
        elif self.shown:
            if self.following:
                self.selected = self.shown[0].id
            top = min(self._index(self.first), self.cursor, max(0, len(self.shown) - self.rows))
            self.first = self.shown[max(top, self.cursor - self.rows + 1)].id
            self.seen = max(self.seen, self.first)

    @property
    def above(self) -> int:
        """How many of those shown stand above the first row."""
        return self._index(self.first)

    def _index(self, id_: int) -> int:
        return min(sum(exchange.id > id_ for exchange in self.shown), max(0, len(self.shown) - 1))

    def _move(self, rows: int) -> None:
        if self.opened:
            self.scroll = max(0, self.scroll + rows)
        elif self.shown:
            index = max(0, min(self.cursor + rows, len(self.shown) - 1))
            self.selected, self.following = self.shown[index].id, index == 0

    def _type(self, name: str) -> None:
        self.following = True
        if name in ("enter", "escape"):
            self.typing = False
        if name == "escape":
            self.filter = ""
        elif name == "backspace":
            self.filter = self.filter[:-1]
        elif len(name) == 1 and name.isprintable() and len(self.filter) < 100:
            self.filter += name


def render(snapshot: Snapshot, width: int, height: int) -> list[str]:
    """Return `height` lines of at most `width` cells, with no control characters but our own colours."""
    screen, palette = snapshot.screen, PALETTES[snapshot.colours]
    lines = [paint(spans, width, palette) for spans in _head(snapshot, width, height)]
    if screen.opened:
        lines += [paint(spans, width, palette) for spans in screen.lines[screen.scroll :][: screen.rows]]
    else:
        for exchange in screen.shown[screen.above :][: screen.rows]:
            selected = exchange is screen.exchange
            lines.append(paint(_row(snapshot, exchange, width), width, palette, selected=selected))
        if not screen.shown:
            text = " nothing fits the filter" if snapshot.exchanges else " no requests yet"
            lines += ["", paint([("muted", text)], width, palette)]
    lines = lines[: height - 1]
    return [*lines, *[""] * (height - 1 - len(lines)), paint(_foot(screen, width), width, palette)][-height:]


def _style(exchange: Exchange) -> str:
    return f"{exchange.status // 100}xx" if exchange.status else "5xx" if exchange.ended else "1xx"


def _target(snapshot: Snapshot, exchange: Exchange, limit: int = MAX_FIELD) -> str:
    return printable(exchange.target if snapshot.screen.reveal else mask(exchange.target), limit)


def _link_state(snapshot: Snapshot) -> Spans:
    if not snapshot.problem:
        measured = f"  {human_time(snapshot.round_trip)}" if snapshot.round_trip is not None else ""
        return [("2xx", "● "), ("bold", "connected"), ("muted", measured)]
    if snapshot.retry_at is None:
        return [("4xx", "● "), ("bold", printable(snapshot.problem))]
    left = math.ceil(snapshot.retry_at - snapshot.now)
    when = f"reconnecting in {left} s" if left > 0 else "reconnecting"
    return [("5xx", "● "), ("bold", when), ("", f": {printable(snapshot.problem)}")]


def _counts(snapshot: Snapshot) -> Iterator[Spans]:
    """Yield groups of numbers, the most important ones first."""
    log = snapshot.log
    running = [("1xx", f"  {log.in_flight} in flight")] if log.in_flight else []
    yield [("bold", str(log.total)), ("muted", " request" if log.total == 1 else " requests"), *running]
    classes = [(number, count) for number, count in log.classes.items() if count or number > 1]
    yield [(f"{n}xx" if count else "muted", f"{'  ' * (n > classes[0][0])}{n}xx {count}") for n, count in classes]
    if percentiles := log.percentiles():
        p50, p90 = map(human_time, percentiles)
        yield [("muted", "p50 "), ("", p50), ("muted", "  p90 "), ("", p90)]
    sizes = human_size(log.bytes_in), human_size(log.bytes_out)
    yield [("muted", "in "), ("", sizes[0]), ("muted", "  out "), ("", sizes[1])]


def _head(snapshot: Snapshot, width: int, height: int) -> list[Spans]:
    """Return what stands above the table, or above the details."""
    screen = snapshot.screen
    if e := screen.opened:
        outcome = f"{e.status or '---'} {printable(e.reason)}".strip() if e.status or e.ended else "in flight"
        request = [("bold", f"  {printable(e.method)}"), ("", f" {_target(snapshot, e, 1000)}")]
        tabs = [("selected" if n == screen.tab else "muted", f" {tab} ") for n, tab in enumerate(screen.TABS)]
        tabs.append(("muted", "  secrets shown" if screen.reveal else ""))
        return [[("", " "), (_style(e), outcome), *request], tabs, []]
    tunnels = [
        [("", " "), ("link", printable(url or name)), ("muted", " → "), ("", printable(target))]
        for name, url, target in snapshot.tunnels[: max(1, height // 8)]
    ]
    inspector = [("muted", "inspector "), ("", snapshot.inspector_url)] if snapshot.inspector_url else []
    status = [("", " "), *_link_state(snapshot)]
    if height < 16:
        return [status, *tunnels, *_flow(_counts(snapshot), width)[:1]]
    gap = width - sum(width_of(text) for _, text in [*status, *inspector]) - 1
    top = [[*status, ("", " " * gap), *inspector]] if gap > 2 else [status, [("", " "), *inspector]]
    titles = [("muted", title) for title, _, _ in COLUMNS]
    return [*top, *tunnels, [], *_flow(_counts(snapshot), width)[:3], [], _columns(snapshot, titles, width)]


COLUMNS = (  # title, cells (to the right when negative), the least width of the screen
    *(("Time", 8, 60), ("Status", 6, 0), ("Method", 7, 0), ("Duration", -8, 0), ("Size", -8, 70)),
    *(("Tunnel", 12, 100), ("Path", 0, 0)),
)


def _columns(snapshot: Snapshot, values: Spans, width: int) -> Spans:
    spans: Spans = []
    for (title, cells, least), (style, text) in zip(COLUMNS, values, strict=True):
        if width >= least and (title != "Tunnel" or len(snapshot.tunnels) > 1):
            text = fit(text, abs(cells)) if cells else text
            padding = " " * (abs(cells) - width_of(text))
            spans.append((style, padding + text if cells < 0 else text + padding))
            spans.append(("", "  " if width >= 60 else " "))
    return [("", " "), *spans[:-1]]


def _row(snapshot: Snapshot, exchange: Exchange, width: int) -> Spans:
    e, style, running = exchange, _style(exchange), exchange.ended is None
    second = int(e.time + snapshot.utc_offset)
    values = [
        ("muted", f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"),
        (style, str(e.status) if e.status else "…" if running else "---"),
        ("", printable(e.method)),
        ("1xx" if running else "", human_time(snapshot.now - e.started if running else e.duration)),
        ("muted", human_size(e.bytes_out)),
        ("muted", e.tunnel),
    ]
    spans = _columns(snapshot, [*values, ("", "")], width)
    room = width - sum(width_of(text) for _, text in spans)
    error = printable(e.error)
    path = ("↻ " if e.replay_of else "") + _target(snapshot, e, 1000)
    path = fit(path, max(room // 2, room - len(error) - 2)) if error else path
    return [*spans, ("", path), ("5xx", f"  {error}" if error else "")]


def _foot(screen: Screen, width: int) -> Spans:
    """Return the last line: a notice, the filter, or as much of the help as fits."""
    if screen.typing:
        room = max(1, width - 4)
        tail = next(wrap(screen.filter[::-1], room))[::-1]
        return [("key", " /"), ("", tail), ("cursor", " "), ("muted", "  5xx  post  body:text" if not tail else "")]
    if screen.notice:
        return [("bold", f" {printable(screen.notice)}")]
    groups: list[Spans] = []
    if screen.opened:
        words = ["q back", "tab next", "↑↓ scroll", "r replay", "c copy as curl", "e export", "s secrets"]
    else:
        words = ["q quit", "↵ open", "/ filter", "r replay", "c copy URL", "e export", "↑↓ select", "s secrets"]
        if screen.unseen:
            groups.append([("1xx", f"{screen.unseen} new ↑")])
        if screen.filter:
            groups.append([("key", f"/{fit(screen.filter, 20)} "), ("muted", f"{len(screen.shown)} found, esc clears")])
    keys = [word.partition(" ") for word in words]
    return next(iter(_flow([*groups, *([("key", key), ("muted", f" {what}")] for key, _, what in keys)], width)))


def _labelled(rows: Iterable[tuple[str, str]], width: int) -> Iterator[Spans]:
    """Yield rows of a label and a text, which goes on below itself."""
    for label, text in rows:
        label = fit(f" {label}  ", width // 2)
        for number, line in enumerate(wrap(text, max(1, width - width_of(label)))):
            yield [("muted", " " * width_of(label) if number else label), ("", line)]


def _details(snapshot: Snapshot, exchange: Exchange, width: int) -> Iterator[Spans]:
    """Yield all lines of the tab that is open."""
    e, screen = exchange, snapshot.screen
    tab = screen.TABS[screen.tab]
    if tab == "Info":
        url, local = next(((url, local) for name, url, local in snapshot.tunnels if name == e.tunnel), ("", ""))
        moment = datetime.datetime.fromtimestamp(e.time + snapshot.utc_offset, datetime.UTC)
        duration = snapshot.now - e.started if e.ended is None else e.duration
        rows = {
            "URL": printable(url) + ("" if e.is_tcp else _target(snapshot, e)),
            "Visitor": _target(snapshot, e) if e.is_tcp else "",
            "Target": f"{e.tunnel} → {printable(local)}",
            "Time": f"{moment:%Y-%m-%d %H:%M:%S}",
            "Number": f"{e.id}" + (f", a replay of {e.replay_of}" if e.replay_of else ""),
            "Content": f"request {human_size(e.bytes_in)}, response {human_size(e.bytes_out)}",
            "Error": printable(e.error),
            "Duration": human_time(duration) + (" so far" if e.ended is None else ""),
        }
        yield from _labelled(((f"{label:<8}", text) for label, text in rows.items() if text), width)
        longest, parts = max(0, width - 24), timings(e)
        total = max(1e-6, sum(seconds or 0.0 for seconds in parts.values()))
        for name, seconds in parts.items():
            if seconds is not None:
                bar = "█" * round(seconds / total * longest)
                yield from _labelled([(f"  {name:<8}", f"{human_time(seconds):>8}  {bar}")], width)
    elif tab == "Headers":
        for title, headers in (" Request", e.request_headers), ("", []), (" Response", e.response_headers):
            yield [("bold", title)]
            fields = text_fields(headers, reveal=screen.reveal)
            across = min(20, width // 3, max((len(name) for name, _ in fields), default=0))
            yield from _labelled(((printable(name).ljust(across), printable(value)) for name, value in fields), width)
    elif tab == "Response" and e.notes:
        for note in list(e.notes):
            head = f"{human_time(note.at):>9} {'→' if note.from_visitor else '←'} {human_size(note.size):>8}"
            kind = "" if note.kind in ("text", "event") else f"{note.kind} "
            yield from _labelled([(head, kind + printable(note.data))], width)
    else:
        yield from _body(e, tab == "Body", e.bytes_in if tab == "Body" else e.bytes_out, width, screen.reveal)


@functools.lru_cache(maxsize=4)  # what has not changed is not read again; sizes only grow
def _body(exchange: Exchange, of_request: bool, size: int, width: int, reveal: bool) -> list[Spans]:
    e = exchange
    headers, body = (e.request_headers, e.request_body) if of_request else (e.response_headers, e.response_body)
    view = body_view(headers, bytes(body), size, reveal=reveal)
    lines = (printable(line.rstrip("\r").expandtabs(4), len(view.text) * 10) for line in view.text.split("\n"))
    wrapped = (line for text in lines for line in wrap(text, max(1, width - 2)))
    found: list[Spans] = [[("", f" {line}")] for line in itertools.islice(wrapped, MAX_SHOWN)] if view.text else []
    note = ", ".join(filter(None, ["" if view.text else view.kind, view.note]))
    return [[("muted", f" {note}")], [], *found] if note else found


# ==== Everything below does I/O ======================================================================================

# ---- State ----------------------------------------------------------------------------------------------------------
# What is kept on disk between runs: a few small private files in one directory.


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; only its owner may read it. What root writes belongs to the directory's owner."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # never through a link that somebody else has laid there
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            if os.name == "posix" and os.geteuid() == 0:  # a server with a user of its own must be able to read it
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(text)
        os.replace(temporary, path)
    except BaseException:  # a full disk keeps what it had, and not a half of this
        temporary.unlink()
        raise


def read_private(path: Path) -> str:
    """Return the text of a file with a secret. Raises TunnelError when other users have access to it."""
    with open(path, encoding="utf-8") as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
            raise TunnelError(f"other users have access to {path}; run: chmod 600 {shlex.quote(str(path))}")
        return file.read()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Have a directory to oneself while the context lasts; others who ask for that wait."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if sys.platform == "win32":
        import msvcrt

        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
        with contextlib.suppress(OSError):  # NFS locks no directories
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def read_or_make(path: Path, make: Callable[[], str]) -> str:
    """Return a file's one line, which is made and kept when it is not there."""
    if not path.exists():
        own = path.with_name(f".{path.name}.{os.getpid()}.new")
        write_private(own, make() + "\n")
        with contextlib.suppress(FileExistsError):  # another process was faster, and what it made counts
            os.link(own, path)
        own.unlink()
    return path.read_text(encoding="utf-8").strip()


def file_limit() -> int:
    """Return how many files this process may have open."""
    if os.name != "posix":
        return MAX_VISITORS + RESERVED_FILES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else MAX_VISITORS + RESERVED_FILES


def raise_file_limit() -> None:
    """Let this process have as many files open as it needs, and as it may take."""
    if os.name == "posix":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_VISITORS + RESERVED_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


# ---- Tokens ---------------------------------------------------------------------------------------------------------
# Who may use a server. Of a token with a label a file keeps what tells whether somebody knows it, and not the token, so
# a thief of that file cannot log in. Beside it lies `default`, the token that serve makes where there is no other.


def make_token() -> str:
    """Return a fresh token of 160 bits."""
    return secrets.token_hex(20)


def check_token(token: str, advice: str = "leave it out, and serve makes one") -> str:
    """Return a token the user gave. Raises UsageError when it could be guessed."""
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"a token has at least 16 letters and digits; {advice}")
    return token


class Grant(NamedTuple):
    """A token as its server knows it: how it is proved, and what it may do. None is no limit."""

    label: str
    key: str
    verifier: Verifier
    names: tuple[str, ...] = ()  # the only ones that it may use, and that nobody else may; without: any that is free
    max_tunnels: int | None = None  # at a time, in all of its sessions
    max_requests: int | None = None  # the same
    made: str = ""  # when, in ISO 8601

    @classmethod
    def from_token(cls, label: str, token: str, **permissions: Any) -> Grant:
        return cls(label, key_id(token), Verifier.from_token(token, secrets.token_bytes(16)), **permissions)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Grant:
        """Return what `as_json` has made. Raises ValueError, KeyError or TypeError for anything else."""
        fields = ("salt", "stored_key", "server_key")
        salt, stored_key, server_key = (base64.b64decode(saved[name], validate=True) for name in fields)
        label, key, names, made = str(saved["label"]), str(saved["key"]), saved["names"], str(saved["made"])
        limits = ("iterations", "max_tunnels", "max_requests")
        iterations, max_tunnels, max_requests = numbers = [saved[name] for name in limits]
        if any(type(number) is not int or number < 1 for number in numbers) or type(names) is not list:
            raise ValueError
        if not LABEL_PATTERN.fullmatch(label) or not all(map(NAME_PATTERN.fullmatch, names)):
            raise ValueError
        if len(stored_key) != 32 or len(server_key) != 32:
            raise ValueError
        verifier = Verifier(salt, iterations, stored_key, server_key)
        return cls(label, key, verifier, tuple(names), max_tunnels, max_requests, made)

    def as_json(self) -> dict[str, Any]:
        """Return what is kept of it. Nothing in there helps to log in."""
        verifier = {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in self.verifier._asdict().items()
        }
        return {"label": self.label, "key": self.key, **verifier, **self.permissions()}

    def permissions(self) -> dict[str, Any]:
        """Return what it may do, and when it was made."""
        limits = {"max_tunnels": self.max_tunnels, "max_requests": self.max_requests}
        return {"names": list(self.names), **limits, "made": self.made}


class Tokens:
    """The tokens that a server's directory keeps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.default_path = directory / "token"
        self._path = directory / "tokens.json"
        self.labelled: dict[str, Grant] = {}
        self.revoked: list[str] = []  # keys; the names that belong to them are free again

    def read(self) -> None:
        """Read those with labels. Raises TunnelError when their file is damaged; then nothing has changed."""
        try:
            saved = parse_object(read_private(self._path))
            grants = [Grant.from_json(entry) for entry in saved["tokens"]]
            revoked = [str(key) for key in saved["revoked"]]
        except FileNotFoundError:
            grants, revoked = [], []
        except OSError as error:
            raise self._unusable(self._path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TunnelError(f"{self._path} is damaged; move it away, and add its tokens again") from None
        self.labelled, self.revoked = {grant.label: grant for grant in grants}, revoked

    def default(self) -> str:
        """Return the token that serve has made for itself, "" when there is none. Raises TunnelError."""
        try:
            return check_token(read_private(self.default_path).strip())
        except FileNotFoundError:
            return ""
        except (UsageError, UnicodeDecodeError):
            advice = "remove it, and serve makes a new one"
            raise TunnelError(f"{self.default_path} does not hold a token; {advice}") from None
        except OSError as error:
            raise self._unusable(self.default_path, error) from None

    def make_default(self) -> None:
        """Make a token for a server that has none yet. Raises TunnelError."""
        self.read()
        if self.labelled:
            return
        try:
            read_or_make(self.default_path, make_token)
        except UnicodeDecodeError:
            pass  # what is wrong is told when it is read to be used
        except OSError as error:
            raise self._unusable(self.default_path, error) from None

    def default_grant(self) -> list[Grant]:
        """Return the token that serve has made for itself, if any. Raises TunnelError."""
        token = self.default()
        return [Grant.from_token("default", token)] if token else []

    def stamp(self) -> list[object]:
        """Return what is another thing after each change of the files."""
        stamps: list[object] = []
        for path in (self._path, self.default_path):
            with contextlib.suppress(OSError):
                status = path.stat()
                stamps.append((path, status.st_ino, status.st_mtime_ns, status.st_mode))
        return stamps

    def add(self, label: str, names: Sequence[str], max_tunnels: int, max_requests: int) -> str:
        """Make a token with a label, and return it; it is not kept. Raises UsageError when label or name is taken."""
        with locked(self.directory):
            self.read()
            if label == "default":
                raise UsageError("the label 'default' is for the token that serve makes itself; choose another one")
            if label in self.labelled:
                raise UsageError(f"there is a token {label!r}; choose another label, or revoke that one first")
            for grant in self.labelled.values():
                for name in set(names).intersection(grant.names):
                    raise UsageError(f"the name {name!r} is reserved for the token {grant.label!r}; choose another one")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            token, unique = make_token(), tuple(dict.fromkeys(names))
            permissions = {"names": unique, "max_tunnels": max_tunnels, "max_requests": max_requests, "made": now}
            self.labelled[label] = Grant.from_token(label, token, **permissions)
            self._write()
        return token

    def revoke(self, label: str) -> None:
        """Make a token useless. Raises UsageError when there is none with this label."""
        with locked(self.directory):
            self.read()
            known = ["default"] * self.default_path.exists() + list(self.labelled)
            if label not in known:
                advice = f"there are: {', '.join(known)}" if known else f"there is none in {self.directory}"
                raise UsageError(f"no token is called {escape(label, 70)!r}; {advice}")
            key = self.labelled.pop(label).key if label in self.labelled else key_id(self.default())
            self.revoked = [*self.revoked, key][-MAX_REVOKED:]
            self._write()
            if label == "default":
                self.default_path.unlink()

    @staticmethod
    def _unusable(path: Path, error: OSError) -> TunnelError:
        reason = (error.strerror or str(error)).lower()
        return TunnelError(f"{path}: {reason}; choose another directory with PYTUNNEL_STATE_DIR")

    def _write(self) -> None:
        tokens = [grant.as_json() for grant in self.labelled.values()]
        write_private(self._path, json.dumps({"tokens": tokens, "revoked": self.revoked}, indent=1))


# ---- Link -----------------------------------------------------------------------------------------------------------
# Runs a session over one WebSocket after another, and gives each stream asyncio's verbs. What arrives is dispatched
# where it arrives and never waits for a consumer (windows bound what has to be kept); whatever became ready in one turn
# of the event loop goes out as one message. No task, queue or copy stands between the transport and the session, whose
# clock is `time.monotonic`: uvloop's own has whole milliseconds.


CLOSED = "the connection was closed"


class _ReadBuffer(threading.local):
    """What connections are read into: one for all of a thread, as its event loop fills it and hands it over in one go.

    It does that without Python's lock, so that another thread may do the same meanwhile.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(LINK_BUFFER))


_read_buffer = _ReadBuffer()


class WebSocket(asyncio.BufferedProtocol):
    """A connection that has been upgraded, taken over from the HTTP library that did so.

    In the handshake messages are asked for one by one; then `start` has everything passed on as it comes.
    """

    def __init__(self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol, *, is_server: bool) -> None:
        """Take over the transport from `protocol`, which is told only when the connection is lost."""
        self.transport = transport
        self.closed = ""  # why, once the peer has closed it or it is lost
        self.writable = True
        self._before, self._is_server = protocol, is_server
        self._buffer = _read_buffer.view
        self._room = 3 * MAX_HELLO if is_server else math.inf  # bytes until the token has been shown
        self._paused = False
        self._gathers = type(transport).__module__.startswith("uvloop")  # asyncio's: up to 3.13.1 it pauses nobody
        self._decoder = MessageDecoder(masked=is_server)
        self._parts: collections.deque[MessagePart] = collections.deque()  # what has come and was not looked at
        self._error: ProtocolError | None = None  # what the peer did wrong
        self._link: Link | None = None
        self._changed = asyncio.Event()
        self._tune(transport.get_extra_info("socket"))
        transport.set_protocol(self)

    @staticmethod
    def _tune(sock: socket.socket | None) -> None:
        """Ask for BBR, to which a loss is no congestion; a kernel that has none, or does not let us, has its own."""
        with contextlib.suppress(OSError, AttributeError):
            cast(Any, sock).setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")

    async def receive_message(self) -> Message:
        """Return the peer's next handshake message. Raises ProtocolError, or ConnectionError when there is none."""
        text = b""
        while True:
            while not self._parts:
                if self._error:
                    raise self._error
                if self.closed:
                    raise ConnectionResetError("the connection was closed in the handshake")
                await self._wait()
            part = self._parts.popleft()
            if self._is_control(part):
                continue
            if part.opcode != Opcode.TEXT:
                raise ProtocolError("a binary message in the handshake")
            text += part.data
            if len(text) > MAX_HELLO:
                raise ProtocolError(f"a handshake message over {MAX_HELLO} bytes")
            if part.end:
                return Message(text.decode("utf-8", "replace"))

    def send_message(self, text: str) -> None:
        """Send a handshake message."""
        self.send(Opcode.TEXT, text.encode())

    def start(self, link: Link) -> None:
        """Pass everything on to a link from now on, what has come already first."""
        self._link, self._room = link, math.inf
        if self._error or self.closed:
            link.lose(self._error or self.closed)
        self._pump()

    def stop(self) -> None:
        """Pass nothing on any more."""
        self._link = None

    def send(self, opcode: Opcode, *payload: bytes) -> None:
        """Send a whole message; the transport takes it, whether or not this is `writable`."""
        if not self.transport.is_closing():
            key = b"" if self._is_server else os.urandom(4)
            pieces = message_frame(opcode, payload, key)
            if len(pieces) > 1 and self._gathers:
                self.transport.writelines(pieces)
            else:
                self.transport.write(b"".join(pieces))

    async def close(self, code: CloseCode = CloseCode.OK) -> None:
        """Close it, and return when the peer has done so as well; the caller bounds the wait."""
        self._link = None
        if not self.closed:
            self.send(Opcode.CLOSE, code.to_bytes(2))
        while not self.closed:
            if any(part.opcode == Opcode.CLOSE for part in self._parts):
                return self._end(CLOSED)
            self._parts.clear()  # what still comes is of no interest
            await self._wait()

    async def _wait(self) -> None:
        """Return when more has come; what the decoder still has comes before anything is read."""
        self._changed.clear()
        if self._decoder.has_more and not self._error:
            asyncio.get_running_loop().call_soon(self._pump)
        else:
            self._resume_reading()
        await self._changed.wait()

    # asyncio's side

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = self._buffer[:nbytes]
        self.data_received(data if nbytes > SEND_BUFFER else bytes(data))

    def data_received(self, data: bytes | memoryview) -> None:
        """Take bytes; a view's memory may change after this."""
        self._room -= len(data)
        if self._room < 0:
            return self.transport.abort()
        self._pump(data)

    def _pump(self, data: bytes | memoryview = b"") -> None:
        """Look at what has come: at so much of it that others have their turn of the event loop."""
        if self._error:
            return  # uvloop reads several times in one turn
        link, parts, room = self._link, self._parts, MAX_FRAMES
        try:
            if data or self._decoder.has_more:
                parts.extend(self._decoder.feed(data))
            while link and room > 0 and (parts or link.session.has_more):
                if link.session.has_more:
                    room -= link.receive(b"")
                    continue
                part = parts.popleft()
                room -= 1
                if not self._is_control(part):
                    if part.opcode != Opcode.BINARY:
                        raise ProtocolError("a text message after the handshake")
                    room -= link.receive(part.data, end=part.end)
        except ProtocolError as error:
            self._error = error
            parts.clear()
            if link:
                link.lose(error)
        if parts and isinstance(data, memoryview):
            self._parts = collections.deque(part._replace(data=bytes(part.data)) for part in parts)
        self._changed.set()
        if self.closed or self._error:
            return
        if link and (parts or link.session.has_more or self._decoder.has_more):
            self._pause_reading()
            asyncio.get_running_loop().call_soon(self._pump)
        elif link:
            self._resume_reading()
        elif parts:
            self._pause_reading()  # until the next message is asked for

    def _is_control(self, part: MessagePart) -> bool:
        """Deal with a control message; False for any other part."""
        if part.opcode == Opcode.PING:
            if self.writable:  # section 5.5.3: it is enough to answer the last one
                self.send(Opcode.PONG, bytes(part.data))
        elif part.opcode == Opcode.CLOSE:
            self.send(Opcode.CLOSE, bytes(part.data[:2]))
            self._end(CLOSED)
        return part.opcode >= Opcode.CLOSE

    def _pause_reading(self) -> None:
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def eof_received(self) -> None:
        self._end(CLOSED)

    def pause_writing(self) -> None:
        self.writable = False
        if self._link:
            self._link.watch_room()

    def resume_writing(self) -> None:
        self.writable = True
        if self._link:
            self._link.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        why = str(getattr(exc, "strerror", None) or exc).lower()  # without [Errno 104]
        self._end(f"the connection broke: {why}" if exc else CLOSED)
        self._before.connection_lost(exc)

    def _end(self, reason: str) -> None:
        self.closed = self.closed or reason
        self._changed.set()
        if self._link:
            self._link.lose(self.closed)


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and return when they have ended, however they do."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter and not waiter.done():
        waiter.set_result(None)


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
        self.waited = 0.0  # seconds on the server, before it was opened
        self.has_content = not ended  # from the peer, even if none of it came
        self.finished = finished  # our direction has been ended
        self._ended = ended  # and the peer's
        self._error: StreamReset | None = None
        self._heads: collections.deque[bytes] = collections.deque()
        self._chunks: collections.deque[bytes | bytearray] = collections.deque()
        self._taken = 0  # bytes that were read and may still be in the reader's hands
        self._reader: asyncio.Future[None] | None = None  # who waits for something to read
        self._writer: asyncio.Future[None] | None = None  # and for room in the queue

    def close(self) -> None:
        """Reset what is not finished, and forget the stream. May be called again."""
        if self.finished and not self._ended and not self._link.session.is_server:
            self.abort(ErrorCode.NO_ERROR, flush=True)  # RFC 9113 section 8.1: the rest of the request is not wanted
        elif not (self.finished and self._ended):
            self.abort(ErrorCode.CANCEL)
        self.on_reset = lambda code: None  # who listens has the stream: no cycle is left for the garbage collector
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
            await self._more()
        return self._heads.popleft()

    async def read(self) -> bytes:
        """Return the next chunk, or b"" after the last one.

        To read on is what gives the peer new credit: whoever does that is done with what it read before.
        """
        if self._taken:
            if self._link.session.acknowledge_received_data(self.id, self._taken):
                self._link.wake()
            self._taken = 0
        while not self._chunks:
            if self._ended:
                return b""
            self._check()
            await self._more()
        data = bytes(self._chunks.popleft())  # no copy of what is bytes already
        self._taken = len(data)
        return data

    # Writing

    def write_head(self, payload: bytes, *, interim: bool = False, end: bool = False, compress: bool = False) -> None:
        """Send a response head, encoded; `end` says that no content follows, `compress` that it is of a type for it."""
        self._check()
        self._link.session.send_head(self.id, payload, interim=interim, end=end, compress=compress)
        self.finished = end
        self._link.wake(more=not end)

    def send(self, data: bytes, *, end: bool = False) -> None:
        """Send a chunk; who has others waits for `drain` first. `end`: it is the last."""
        self._check()
        queued = self._link.session.send_data(self.id, data, end=end)
        self.finished = end
        if queued > SEND_BUFFER and not end:
            self._writer = asyncio.get_running_loop().create_future()  # before `wake`, which may send it all at once
        self._link.wake(more=False)

    async def drain(self) -> None:
        """Return when all went out, if there were more than SEND_BUFFER bytes queued."""
        if self._writer:
            try:
                await self._writer
            finally:
                self._writer = None  # one that was cancelled, too
            self._check()

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Send a chunk, and drain."""
        self.send(data, end=end)
        await self.drain()

    @property
    def room(self) -> int:
        """How many bytes to read for the next `write`: few where they may have to wait, and where there are many."""
        if self._link.session.streams > MAX_LARGE_READS:
            return SEND_BUFFER
        return max(SEND_BUFFER, min(READ_BUFFER, self._link.session.credit(self.id)))

    def abort(self, code: ErrorCode, reason: str = "", *, flush: bool = False) -> None:
        """End both directions: at once, or with `flush` after what is queued. No effect on a finished stream."""
        if self._error is None:
            self._link.session.send_reset(self.id, code, reason, flush=flush)
            self._link.wake()
            self.fail(StreamReset(code, reason))

    def cancel(self) -> None:
        """Drop what an `abort` with `flush` has not sent yet: the peer does not take it."""
        self._link.session.send_reset(self.id, ErrorCode.CANCEL)
        self._link.wake()

    @property
    def is_cancelled(self) -> bool:
        """Whether it was reset, and what came before that is not wanted either."""
        return self._error is not None and self._error.code is not ErrorCode.NO_ERROR

    @property
    def problem(self) -> str:
        """Why it was reset, as the peer or this end says; mostly nothing."""
        return self._error.reason if self._error else ""

    # Called by the link

    def feed(self, frame: Frame) -> None:
        """Take a frame that the session let through."""
        if frame.type == _RESET:
            return self.fail(StreamReset(*decode_reason(frame.payload)), by_peer=True)
        if frame.type == _HEAD:
            if self.kind is not Kind.TCP:  # there, nobody reads it
                self._heads.append(frame.payload)
        elif self._chunks and len(self._chunks[-1]) + len(frame.payload) < MAX_HEAD:
            # Many small chunks would take more memory than the window counts; bytes would be copied for each of them.
            if isinstance(self._chunks[-1], bytes):
                self._chunks[-1] = bytearray(self._chunks[-1])
            self._chunks[-1] += frame.payload
        elif frame.payload:
            self._chunks.append(frame.payload)
        self._ended = self._ended or bool(frame.flags & END)
        _wake(self._reader)

    def fail(self, error: StreamReset, *, by_peer: bool = False) -> None:
        """The stream is over; wake whoever waits."""
        self._error = self._error or error
        _wake(self._reader)
        _wake(self._writer)
        if by_peer:
            self.on_reset(error.code)

    def drained(self) -> None:
        """All that was queued went out."""
        _wake(self._writer)

    def _more(self) -> asyncio.Future[None]:
        """Return what ends when there is more to read."""
        self._reader = asyncio.get_running_loop().create_future()  # an Event would cost three times as much
        return self._reader

    def _check(self) -> None:
        if self._error:
            raise StreamReset(self._error.code, self._error.reason)


class Link:
    """Carries one session; `run` it over each WebSocket in turn, `end` it once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.on_stream: Callable[[Stream], None] = lambda stream: stream.close()
        self.on_goaway: Callable[[ErrorCode, str], None] = lambda code, reason: None
        self.broken: ProtocolError | None = None  # `run` raises it, unless the peer goes away while it is told
        self._streams: dict[int, Stream] = {}
        self._closed = asyncio.Event()  # some stream has been
        self._ws: WebSocket | None = None  # in use
        self._lost: asyncio.Future[str] | None = None  # of the WebSocket in use, or the last one
        self._free = asyncio.Event()
        self._free.set()
        self._between_messages = True
        self._finishing = False
        self._flushing = False  # is about to
        self._woken = 0  # how often it was said that there is something to send, since then
        self._timer: asyncio.TimerHandle  # fires early at worst
        self._stalled: asyncio.TimerHandle | None = None  # while the transport has no room

    async def run(self, ws: WebSocket, peer_received: int) -> str:
        """Use `ws` until it is lost or finished, and return why; the caller closes it.

        Raises ProtocolError, which ends the session, after the peer has been told.
        """
        loop = asyncio.get_running_loop()
        self.session.resume(peer_received, time.monotonic())
        self._free.clear()
        self._ws, self._lost = ws, loop.create_future()
        self._between_messages = True
        self._set_timer()
        try:
            ws.start(self)
            self.wake()
            if not ws.writable:
                self.watch_room()
            reason, told = await self._lost, self.session.goaway
            return f"{reason}: {escape(told[1])}" if told and reason == CLOSED else reason
        except ProtocolError as error:
            self.broken = error
            self.session.suspend()
            await self._refuse(ws, error)
            raise
        finally:
            self.session.suspend()
            self._timer.cancel()
            if self._stalled:
                self._stalled.cancel()
            self._ws = None
            ws.stop()
            self._free.set()

    @staticmethod
    async def _refuse(ws: WebSocket, error: ProtocolError) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD):
                ws.send(Opcode.BINARY, encode_frame(FrameType.GOAWAY, 0, 0, encode_reason(error.code, str(error))))
                await ws.close(CloseCode.PROTOCOL_ERROR)

    async def detach(self, reason: str) -> None:
        """Give up the WebSocket in use, if any, so that another may be used."""
        while not self._free.is_set():  # again, when somebody else who waited here was faster
            self.lose(reason)
            await self._free.wait()

    def lose(self, reason: str | ProtocolError) -> None:
        """Make `run` return, or raise; the session stays."""
        if self._lost and not self._lost.done():
            if isinstance(reason, ProtocolError):
                self._lost.set_exception(reason)
            else:
                self._lost.set_result(reason)

    def finish(self) -> None:
        """Make `run` return as soon as everything queued has been sent."""
        self._finishing = True
        self.wake()

    def end(self, error: StreamReset) -> None:
        """The session is over: all streams fail."""
        for stream in list(self._streams.values()):
            stream.fail(error, by_peer=True)

    def open(self, tunnel: int, kind: Kind, head: RequestHead, *, end: bool, waited: float) -> Stream:
        """Open a stream for a request that came `waited` seconds ago. Raises StreamReset when the session is full."""
        payload = head.encode()
        compress = not end and kind is Kind.HTTP and compressible(head.headers)
        id_ = self.session.open_stream(tunnel, kind, payload, end=end, waited=waited, compress=compress)
        stream = self._streams[id_] = Stream(self, id_, tunnel, kind, payload, ended=False, finished=end)
        self.wake(more=False)
        return stream

    def forget(self, stream: Stream) -> None:
        """A stream's owner is done with it."""
        self._streams.pop(stream.id, None)
        self._closed.set()

    async def wait_no_streams(self) -> None:
        """Return when all streams have ended and their owners are done with them."""
        while self._streams or self.session.streams:
            self._closed.clear()
            await self._closed.wait()

    def wake(self, *, more: bool = True) -> None:
        """Send what there is to send when this turn of the event loop ends, together with what others add in it.

        At once, when no `more` is to come from the caller, and there are no others or it has become much: else two ends
        that have a hundred requests between them would wait for each other, and not work side by side.
        """
        if self._ws and self._ws.writable:
            self._woken += 1
            if not more and (self._woken >= MAX_WOKEN or len(self._streams) <= 1):
                self._flush()
            elif not self._flushing:
                self._flushing = True
                asyncio.get_running_loop().call_soon(self._flush_last)

    # Called by the WebSocket

    def receive(self, data: bytes | bytearray | memoryview, *, end: bool = False) -> int:
        """Take bytes of a message, or with none what was left; return how much work that was, in frames.

        `end` says that they are its last ones. Raises ProtocolError.
        """
        session, before = self.session, self.session.work
        if not data and not session.has_more:
            if end and self._between_messages:
                raise ProtocolError("an empty message")
        else:
            for frame in session.receive_data(data, time.monotonic()):
                self._dispatch(frame)
        self._between_messages = end or (self._between_messages and not data)
        if self._between_messages and not session.has_more and not session.between_frames:
            raise ProtocolError("a message that ends inside a frame")
        if session.has_data_to_send:
            self.wake()
        self._check_timer()
        return session.work - before

    def watch_room(self) -> None:
        """The transport has no room: it must take something within WRITE_TIMEOUT, and again and again."""
        loop = asyncio.get_running_loop()

        def look(before: int) -> None:
            if self._ws and not self._ws.writable:
                unsent = self._ws.transport.get_write_buffer_size()
                if unsent >= before:
                    return self.lose(f"nothing could be written for {WRITE_TIMEOUT:g} s")
                self._stalled = loop.call_later(WRITE_TIMEOUT, look, unsent)

        if self._stalled:
            self._stalled.cancel()
        if self._ws:
            self._stalled = loop.call_later(WRITE_TIMEOUT, look, self._ws.transport.get_write_buffer_size())

    def _flush_last(self) -> None:
        if self._flushing:
            self._flush()

    def _flush(self) -> None:
        self._flushing, self._woken = False, 0
        ws, session = self._ws, self.session
        if ws is None or not ws.writable:
            return
        try:
            frames = session.frames_to_send(now=time.monotonic())
        except ProtocolError as error:
            return self.lose(error)
        if frames:
            ws.send(Opcode.BINARY, *frames)
            self._check_timer()
        for stream_id in session.drained:
            if stream_id in self._streams:
                self._streams[stream_id].drained()
        session.drained.clear()
        if not session.streams:
            self._closed.set()
        if frames and session.has_data_to_send:
            self.wake()  # the next message is for the next turn, in which others may add to it
        elif self._finishing and session.is_flushed:
            self.lose("finished")

    def _dispatch(self, frame: Frame) -> None:
        log.debug("< %s", frame)
        if frame.type == _OPEN:
            tunnel, kind, waited = OPEN_HEADER.unpack_from(frame.payload)
            head, ended = frame.payload[OPEN_HEADER.size :], bool(frame.flags & END)
            stream = Stream(self, frame.stream_id, tunnel, Kind(kind), head, ended=ended)
            stream.waited = waited / 1000
            self._streams[stream.id] = stream
            self.on_stream(stream)
        elif frame.type == _GOAWAY:
            self.on_goaway(*decode_reason(frame.payload))
        elif frame.stream_id in self._streams:
            self._streams[frame.stream_id].feed(frame)

    def _check_timer(self) -> None:
        if self.session.next_deadline() < self._timer_at:
            self._timer.cancel()
            self._set_timer()

    def _set_timer(self) -> None:
        self._timer_at = self.session.next_deadline()
        delay = max(0.0, self._timer_at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        if reason := self.session.handle_timeout(time.monotonic()):
            self.lose(reason)
        else:
            self.wake()
            self._set_timer()


# ---- Connections ----------------------------------------------------------------------------------------------------
# TCP connections that are read and written as they are: to local services, and of a TCP tunnel's visitors.


class Connection(asyncio.BufferedProtocol):
    """One connection to a local service, or of a TCP tunnel's visitor; one reader, one writer, back-pressure both ways.

    What is large comes when it is asked for; of what is small, one read at the most waits for the reader.
    """

    def __init__(self) -> None:
        self._buffer = _read_buffer.view
        self.closed = asyncio.Event()
        self.idle_since = 0.0  # 0 while it is in use
        self._transport: asyncio.Transport
        self._chunks: collections.deque[bytes] = collections.deque()
        self._limit = SEND_BUFFER
        self._paused = False
        self._eof = False
        self._error: Exception | None = None
        self._on_readable: Callable[[], object] | None = None  # called once
        self._writable = asyncio.Event()
        self._writable.set()
        self._guard: asyncio.TimerHandle | None = None
        self._stall_timeout = math.inf
        self._written = self._taken = 0  # bytes, and those of them that the other end has taken
        self._taken_at = 0.0  # when it has last taken some, or all

    # The user's side

    @property
    def reusable(self) -> bool:
        """Whether nothing has come, not even an end, since the last response."""
        return not (self._eof or self._chunks or self.closed.is_set())

    async def read(self, limit: int = SEND_BUFFER) -> bytes:
        """Return the next bytes, about `limit` of them at the most, b"" at the end. Raises ConnectionError."""
        self._limit = limit
        while not (data := self.take()) and not self._eof:
            readable = asyncio.get_running_loop().create_future()
            self._on_readable = functools.partial(_wake, readable)
            await readable
        if self._error and not data:
            raise ConnectionResetError(str(self._error))
        return data

    def watch(self, limit: int, on_readable: Callable[[], object]) -> None:
        """Have it called, once, when there is something to read; a `read` takes its place."""
        self._limit, self._on_readable = limit, on_readable

    def take(self) -> bytes:
        """Return the next bytes, b"" when there are none yet, or none any more."""
        if not self._chunks:
            return b""
        data = self._chunks.popleft()
        if self._paused and not self._chunks:
            self._paused = False
            self._transport.resume_reading()
        return data

    def send(self, data: bytes) -> None:
        """Send bytes that are few, like a head; whether they could be sent is seen by who reads."""
        if not self.closed.is_set():  # uvloop minds
            self._transport.write(data)

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the other end does not take them. Raises ConnectionError."""
        if self.closed.is_set():
            raise ConnectionResetError(CLOSED)
        self._written += len(data)
        self.send(data)
        if not self._writable.is_set():
            await self._writable.wait()

    def write_eof(self) -> None:
        """Half-close, where the transport can; whether it is still connected is seen by who reads."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            try:
                self._transport.write_eof()
            except OSError as error:  # asyncio's, when the other end has reset it; uvloop tells connection_lost
                self._fail(error)

    async def close(self) -> None:
        """Close it in good order, and wait until the other end has taken what was sent."""
        self._transport.close()
        await self.closed.wait()

    def abort(self) -> None:
        self._transport.abort()

    def reset(self) -> None:
        """End it so that the other end sees no orderly end. No effect on one that is closed."""
        if not self.closed.is_set():
            _reset(self._transport)

    def guard(self, stall_timeout: float = math.inf) -> None:
        """From now on, end it soon after the other end is gone, or has taken nothing for so many seconds.

        Nobody else notices while nothing is read: the event loop watches the socket for what is asked for only.
        """
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it has been reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_KEEPALIVE.items():
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._stall_timeout = stall_timeout
        self._look()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if (self._eof or self._paused) and (error := _find_error(self._transport)):
            return self._fail(error)
        before, self._taken = self._taken, self._written
        if before < self._written:
            self._taken -= _unsent(self._transport)
        if self._taken > before or self._taken == self._written:
            self._taken_at = loop.time()
        elif loop.time() - self._taken_at >= self._stall_timeout:
            return _reset(self._transport)
        self._guard = loop.call_later(GUARD_INTERVAL, self._look)

    def _fail(self, error: OSError) -> None:
        self._error = error
        self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[: self._limit]

    def buffer_updated(self, nbytes: int) -> None:
        self._chunks.append(bytes(self._buffer[:nbytes]))
        busy = self._on_readable is None  # with what came before
        if not self._paused and (busy or nbytes >= SEND_BUFFER):
            self._paused = True
            self._transport.pause_reading()
        self._tell_reader()

    def eof_received(self) -> bool:
        self._eof = True
        self._tell_reader()
        return self._transport.can_write_eof() and not self.idle_since  # nothing more to say on an idle one: close it

    def connection_lost(self, exc: Exception | None) -> None:
        plain = self._transport.get_extra_info("sslcontext") is None
        if exc and plain and not self._eof:  # a write has failed; what came before, maybe an answer, is still there
            with contextlib.suppress(OSError):
                self._chunks.append(os.read(self._transport.get_extra_info("socket").fileno(), READ_BUFFER))
        self._eof, self._error = True, self._error or exc
        if self._guard:
            self._guard.cancel()
        self.closed.set()
        self._tell_reader()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _tell_reader(self) -> None:
        if on_readable := self._on_readable:
            self._on_readable = None
            on_readable()


def _unsent(transport: asyncio.WriteTransport) -> int:
    """Return how many bytes the other end has not taken; those in the kernel, maybe megabytes, count on Linux only."""
    unsent = transport.get_write_buffer_size()
    if sys.platform == "linux":
        import fcntl
        import termios

        with contextlib.suppress(OSError, ValueError):
            answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            unsent += int.from_bytes(answer, sys.byteorder)
    return unsent


def _find_error(transport: asyncio.BaseTransport) -> OSError | None:
    """Return what has ended a connection, if that was no orderly end."""
    sock = transport.get_extra_info("socket")
    try:
        if sys.platform == "linux" and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\7":  # TCP_CLOSE
            return None  # what SO_ERROR tells of one that lives on would be a hint, like an ICMP message
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError as error:
        return error
    return OSError(number, os.strerror(number)) if number else None


def _reset(transport: asyncio.WriteTransport) -> None:
    """End a connection with a TCP reset: whatever the kernel has not sent is dropped."""
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    with contextlib.suppress(OSError):  # it has been closed in this turn of the event loop
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


@contextlib.contextmanager
def cut_when_stalled(transport: asyncio.WriteTransport, seconds: float) -> Iterator[None]:
    """Reset a connection whose other end takes nothing for so long, while the context lasts."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look(before: int) -> None:
        nonlocal timer
        if (unsent := _unsent(transport)) < before:
            timer = loop.call_later(seconds, look, unsent)
        else:
            _reset(transport)

    timer = loop.call_later(seconds, look, _unsent(transport))
    try:
        yield
    finally:
        timer.cancel()


async def pipe(
    connection: Connection, stream: Stream, receive: Callable[[bytes], object], send: Callable[[bytes], object]
) -> None:
    """Move bytes both ways, whatever they are, until each way has ended; then close the connection.

    Each chunk is told to `receive` (from the stream) or `send` (to it) first. An end is passed on, and the other way
    goes on. What does not end well is reset, so that nobody takes a part for the whole. Raises StreamReset, or
    ConnectionError when it was the connection.
    """

    async def to_stream() -> None:
        while data := await connection.read(stream.room):
            send(data)
            await stream.write(data)
        await stream.write(b"", end=True)

    async def from_stream() -> None:
        while data := await stream.read():
            receive(data)
            await connection.write(data)
        connection.write_eof()

    ways = [asyncio.ensure_future(to_stream()), asyncio.ensure_future(from_stream())]
    over = asyncio.ensure_future(asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION))
    lost = asyncio.ensure_future(connection.closed.wait())
    try:
        await asyncio.wait([over, lost], return_when=asyncio.FIRST_COMPLETED)
        # The other way has still to read what came before one cannot write any more.
        if connection.closed.is_set():
            await asyncio.wait(ways[:1], timeout=LINGER)
        elif ways[0].done() and isinstance(ways[0].exception(), StreamReset):
            await asyncio.wait(ways[1:], timeout=LINGER)
        for way in ways:
            if way.done():
                way.result()
        if not all(way.done() for way in ways):
            raise ConnectionResetError("the connection was reset")
        await connection.close()
    finally:
        connection.reset()
        await end_tasks(*ways, over, lost)


Address = tuple[socket.AddressFamily, Any]  # what getaddrinfo tells; the port is given later


async def find_addresses(host: str | None) -> list[Address]:
    """Return the addresses of this machine that a host means, without one all. Raises OSError when it has none."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found: list[Address] = []
    problem = OSError(errno.EADDRNOTAVAIL, "no such address")
    for address in dict.fromkeys((family, address) for family, _, _, _, address in infos):
        try:
            bind_socket(address, 0).close()
            found.append(address)
        except OSError as error:  # most likely, this machine has no IPv6
            problem = error
    if not found:
        raise problem
    return found


def bind_socket(address: Address, port: int) -> socket.socket:
    """Return a socket that listens on a port. Raises OSError."""
    family, (host, _, *scope) = address
    return socket.create_server((host, port, *scope), family=family, backlog=VISITOR_BACKLOG)


# ---- Registry -------------------------------------------------------------------------------------------------------
# Who has which name: the sessions of clients, and the names they serve. Entries end with their session, for whatever
# reason it ends; whose a name is outlives the server, until its token is revoked.


class Registration:
    """A client's session in the registry: a link that comes and goes, and the names it serves."""

    def __init__(
        self,
        key: str,
        names: list[str],
        session: Session,
        access: Mapping[str, Access] = {},
        ports: Mapping[str, int] = {},
    ) -> None:
        self.id = secrets.token_hex(16)
        self.key, self.names, self.access = key, names, access
        self.ports = ports  # of those names that are TCP tunnels
        self.tcp_streams = 0
        self.link = Link(session)
        self.expiry: asyncio.TimerHandle | None = None


class TunnelRegistry:
    def __init__(self, path: Path, *, grace: float, hold: float, tcp_ports: range = range(0)) -> None:
        self.sessions: dict[str, Registration] = {}
        self.zones: list[str] = []  # host names below which tunnels are
        self.by_address = True  # and below what addresses lend (see Origin)
        self.draining = False
        self.saved = 0  # bytes by compression, in sessions that are over
        self.ports: dict[str, int] = {}  # name -> port, of those that are TCP tunnels, or were
        self.grants: dict[str, Grant] = {}  # by key: the tokens that are good
        self._reserved: dict[str, str] = {}  # name -> key of the only token that may use it
        self._requests: collections.Counter[str] = collections.Counter()  # open now, by key
        self._path, self._grace, self._hold, self._tcp_ports = path, grace, hold, tcp_ports
        self._unsaved = False  # the disk did not take the names
        self._tunnels: dict[str, Registration] = {}
        self._owners: dict[str, str] = {}
        self._latest: dict[str, str] = {}  # name -> the last session that had it, even when it is over
        self.replaced: dict[str, list[str]] = {}  # by key: sessions that others have replaced
        self._held: collections.Counter[str] = collections.Counter()  # requests that wait
        self._changed = asyncio.get_running_loop().create_future()  # a fresh one after each change they may wait for
        try:
            saved = parse_object(path.read_text())
            self._owners = {str(name): str(key) for name, key in saved["names"].items()}
            self.zones = [str(zone) for zone in saved["zones"]]
            self.ports = {str(name): int(port) for name, port in saved.get("ports", {}).items()}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TunnelError(f"{path} is damaged; move it away to start with no names taken") from None
        now = asyncio.get_running_loop().time()
        self._last_seen = dict.fromkeys(self._owners, now)  # their clients are about to come back
        self._left: set[str] = set()  # names whose clients have said goodbye since

    def admit(self, grants: Iterable[Grant], revoked: Iterable[str] = ()) -> None:
        """Let these tokens in, and no others: sessions that are not allowed any more end at once.

        The names of revoked tokens are free again. Their token cannot come back to use them, so they would be lost;
        and whoever may have them next has a token from the same person.
        """
        self.grants = {grant.key: grant for grant in grants}
        self._reserved = {name: grant.key for grant in self.grants.values() for name in grant.names}
        for session in list(self.sessions.values()):
            try:
                self._check(session.key, session.names)
            except Refused as error:
                self.end(session, StreamReset(ErrorCode.LINK_LOST, str(error)))
                session.link.finish()  # if its handshake is only just over
                session.link.lose(f"cut off: {error}")
        gone = set(revoked) - self.grants.keys()
        freed = [name for name, owner in self._owners.items() if owner in gone]
        self._free(freed)
        if freed:
            self._save()
        self._wake()

    def _check(self, key: str, names: list[str]) -> None:
        """Check that a token is good, and may use these names. Raises Refused."""
        if key not in self.grants:
            raise Refused("token", UNKNOWN_TOKEN)
        own = self.grants[key].names
        for name in names:
            if own and name not in own:
                raise Refused("name", f"this token is only for --name {' or --name '.join(own)}; not for {name!r}")
            if self._reserved.get(name, key) != key:
                raise Refused("name", f"the name {name!r} is reserved for another token; choose another with --name")

    def claim(self, key: str, names: list[str]) -> None:
        """Check that a token may have these names, and note that it does. Raises Refused."""
        self._check(key, names)
        for name in names:
            if self._owners.get(name, key) != key and name not in self._reserved:
                raise Refused("name", f"the name {name!r} belongs to another token; choose another one with --name")
        most = self.grants[key].max_tunnels
        if most is not None:
            others = [session for session in self.sessions.values() if session.key == key]
            taken = [name for session in others if not set(names) & set(session.names) for name in session.names]
            if len(taken) + len(names) > most:
                has = f"it has {', '.join(taken[:5])} now" if taken else f"these are {len(names)}"
                raise Refused("limit", f"this token may have {most} tunnel{'s' * (most > 1)} at a time, and {has}")
        fresh = [name for name in names if self._owners.get(name) != key]
        for name in names:
            self._owners.pop(name, None)
            self._owners[name] = key  # at the end: the first ones are those unused the longest
        own, used = [name for name, owner in self._owners.items() if owner == key], {*self._tunnels, *names}
        if len(own) > MAX_NAMES:
            self._free([name for name in own if name not in used][: len(own) - MAX_NAMES])
        if fresh or self._unsaved:
            self._save()

    def _free(self, names: Iterable[str]) -> None:
        for name in names:
            for kept in (self._owners, self._latest, self._last_seen, self.ports):
                kept.pop(name, None)
            self._left.discard(name)

    def ports_for(self, name: str, wanted: int, avoid: Collection[int] = ()) -> list[int]:
        """Return the ports that a tunnel, whose name its token has, may have: only the wanted one, or the best first.

        Those are the one that it had, the free ones, and those of names that are not in use, the longest first. Those
        in `avoid` cannot be had. Raises Refused when there are none.
        """
        ports, owner = self._tcp_ports, {port: name for name, port in self.ports.items()}
        if not ports:
            advice = "start it with serve --tcp-ports, like 20000-20100"
            raise Refused("port", f"this server has no ports for TCP tunnels; {advice}")
        unused = [other for other in self._owners if other in self.ports and not self._needs_port(other)]
        if wanted:
            if wanted not in ports:
                reason = f"port {wanted} is none for TCP tunnels, those are {ports[0]} to {ports[-1]}"
                raise Refused("port", f"{reason}; choose one of them with --remote-port")
            its = owner.get(wanted, name)
            if wanted in avoid or (its != name and not (its in unused and self._owners[its] == self._owners[name])):
                raise Refused("port", f"port {wanted} belongs to another tunnel; choose another --remote-port")
            return [wanted]
        unused.sort(key=lambda other: self._last_seen.get(other, -math.inf))
        start = zlib.crc32(name.encode()) % len(ports)  # so that a server that lost its file chooses the same
        free = (port for port in [*ports[start:], *ports[:start]] if port not in owner)
        candidates = [self.ports.get(name, 0), *free, *(self.ports[other] for other in unused)]
        if not (some := [port for port in candidates if port in ports and port not in avoid]):
            taken = f"all of this server's ports, {ports[0]} to {ports[-1]}, are taken"
            raise Refused("port", f"{taken}; give it more of them")
        return some

    def keep_ports(self, ports: Mapping[str, int]) -> None:
        """Note these tunnels' ports, which are nobody else's from now on."""
        if not ports.items() <= self.ports.items():
            others = {name: port for name, port in self.ports.items() if port not in ports.values()}
            self.ports = others | dict(ports)
            self._save()

    def _needs_port(self, name: str) -> bool:
        """Whether nobody else may have a TCP tunnel's port: its client is there, or about to come back."""
        if session := self._tunnels.get(name):
            return name in session.ports
        last_seen = self._last_seen.get(name, -math.inf)
        return name not in self._left and last_seen + self._grace > asyncio.get_running_loop().time()

    def listens(self, name: str) -> bool:
        """Whether a TCP tunnel's port has to be open: its client is there, or may be expected."""
        if session := self._tunnels.get(name):
            return name in session.ports
        last_seen = self._last_seen.get(name, -math.inf)
        return last_seen + self._hold > asyncio.get_running_loop().time()

    @property
    def open_ports(self) -> set[int]:
        """The ports that have to be open."""
        return {port for name, port in self.ports.items() if port in self._tcp_ports and self.listens(name)}

    def tunnel_at(self, port: int) -> str:
        """Return the name of the tunnel that has a port, "" when none has it."""
        return next((name for name, its in self.ports.items() if its == port), "")

    def bind(self, session: Registration, previous: str) -> None:
        """Give a new session its names. Whoever had one last is replaced, unless it was the same client: `previous`."""
        replaced = {self._latest.get(name, previous) for name in session.names} - {previous}
        self.replaced[session.key] = [*self.replaced.get(session.key, []), *replaced][-MAX_REPLACED:]
        self._latest.update(dict.fromkeys(session.names, session.id))
        self._left.difference_update(session.names)
        for other in {self._tunnels[name] for name in session.names if name in self._tunnels}:
            other.link.session.send_goaway(ErrorCode.REPLACED, "another client with the same token took the name")
            other.link.finish()
            self.end(other, StreamReset(ErrorCode.REPLACED, "replaced by another client"))
        self.sessions[session.id] = session
        self._tunnels.update(dict.fromkeys(session.names, session))

    @contextlib.contextmanager
    def tcp_stream(self, session: Registration) -> Iterator[None]:
        """Count a connection as one of its token's and its session's. Raises Unserved when there are too many."""
        spared = session.link.session.max_streams // HTTP_SHARE if len(session.ports) < len(session.names) else 0
        if session.tcp_streams >= session.link.session.max_streams - spared:
            raise Unserved("busy")
        self.begin_request(session.key)
        session.tcp_streams += 1
        try:
            yield
        finally:
            session.tcp_streams -= 1
            self.end_request(session.key)

    def begin_request(self, key: str) -> None:
        """Count a request as one of its token's. Raises Unserved when there are too many."""
        most = self.grants[key].max_requests
        if most is not None and self._requests[key] >= most:
            raise Unserved("busy")
        self._requests[key] += 1

    def end_request(self, key: str) -> None:
        """It is over."""
        self._requests[key] -= 1

    def connected(self, session: Registration) -> None:
        if session.expiry:
            session.expiry.cancel()
        self._wake()

    def drain(self) -> None:
        """Let no request wait any more."""
        self.draining = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def disconnected(self, session: Registration) -> None:
        """A session has lost its link; it is over after the grace, or now when its client said goodbye."""
        if session.id not in self.sessions or session.link.session.connected:
            return
        loop = asyncio.get_running_loop()
        self._last_seen.update(dict.fromkeys(session.names, loop.time()))
        lost = StreamReset(ErrorCode.LINK_LOST, "the client is gone")
        if session.link.session.goaway or session.link.session.leaving:
            self._left.update(session.names)
            self.end(session, lost)
        else:
            session.expiry = loop.call_later(self._grace, self.end, session, lost)

    def end(self, session: Registration, error: StreamReset) -> None:
        """Forget a session, for whatever reason; its streams fail."""
        for name in session.names:
            if self._tunnels.get(name) is session:
                del self._tunnels[name]
        if self.sessions.pop(session.id, None):
            self.saved += session.link.session.saved
        if session.expiry:
            session.expiry.cancel()
        session.link.end(error)

    @property
    def names(self) -> list[str]:
        """The names of the tunnels that there are now."""
        return list(self._tunnels)

    def current(self, name: str) -> Registration | None:
        """Return the session that has a tunnel's name, wherever its client is."""
        return self._tunnels.get(name)

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
                await asyncio.wait([self._changed], timeout=until - loop.time())  # `asyncio.timeout` would need a task
            finally:
                self._held[name] -= 1
                if not self._held[name]:
                    del self._held[name]
        return session

    def tunnel_name(self, host: str) -> str | None:
        """Return the tunnel that a visitor's host means, None when it is the server's own."""
        zone = host.partition(".")[2]
        lent = zone not in self.zones and self.by_address and ADDRESS_ZONE.fullmatch(zone)
        return tunnel_name(host, [*self.zones, zone] if lent else self.zones)

    def learn_zone(self, zone: str, key: str) -> None:
        """Serve tunnels below the host that a client, who proved to know a token, has dialled. Raises Refused.

        An address lends its names, and anybody may dial that. A host name is another matter: it could be a tunnel's,
        or the parent of somebody's site. Only who runs the server may bring one, not a token with a label.
        """
        self._check(key, [])
        if zone in self.zones or (self.by_address and ADDRESS_ZONE.fullmatch(zone)):
            return
        if self.grants[key].max_tunnels is not None or self.tunnel_name(zone) in self._owners:
            raise Refused("domain", f"this server has no tunnels below {zone}; start it with serve --domain {zone}")
        self.zones = [*self.zones, zone][-MAX_ZONES:]
        self._save()

    def _save(self) -> None:
        kept = {"names": self._owners, "zones": self.zones, "ports": self.ports}
        try:
            write_private(self._path, json.dumps(kept))  # with an indent, it would take ten times as long
            self._unsaved = False
        except OSError as error:
            if not self._unsaved:
                log.warning("names are not kept, which goes on until they can be: %s", error)
            self._unsaved = True


# ---- Certificates ---------------------------------------------------------------------------------------------------
# Which certificate a visitor gets to see, and TLS between a connection and who speaks HTTP on it. Each listener takes
# both TLS and plain connections: the first byte tells them apart. A certificate is used only after a handshake with
# itself, which shows that its key fits, that it has not expired, and its names.

_LEAF = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def server_name(data: bytes) -> str | None:
    """Return the name that a TLS ClientHello asks for, "" for none (RFC 8446 section 4.1.2, RFC 6066 section 3).

    It is None as long as some of the message has to come. What is wrong with it is for OpenSSL to say.
    """
    message, at = b"", 0
    for _ in range(MAX_HELLO_RECORDS):  # a message may be cut into records anywhere
        kind, length = data[at : at + 2], int.from_bytes(data[at + 3 : at + 5])
        message += data[at + 5 : at + 5 + length]
        if not b"\x16\x03".startswith(kind) or length > 16 * KiB or not b"\1".startswith(message[:1]):
            return ""
        at += 5 + length
        if len(message) >= 4 and len(message) >= (end := 4 + int.from_bytes(message[1:4])):
            break
        if len(data) <= at:
            return None
    else:
        return ""
    at = 4 + 2 + 32  # after version and random
    for size in (1, 2, 1):  # session id, cipher suites, compression methods
        at += size + int.from_bytes(message[at : at + size])
    at += 2
    while at < end:
        extension, length = int.from_bytes(message[at : at + 2]), int.from_bytes(message[at + 2 : at + 4])
        if extension == 0:
            size = int.from_bytes(message[at + 7 : at + 9])
            name = message[at + 9 : at + 9 + size].decode("ascii", "replace")
            return name.lower().removesuffix(".") if name.isascii() and name.isprintable() else ""
        at += 4 + length
    return ""


class Certificate(NamedTuple):
    """A certificate that is fit for visitors."""

    names: tuple[str, ...]  # DNS names that it is for, in lower case; `*.` may stand for a label
    begins: float  # seconds since the epoch
    expires: float  # the same
    context: ssl.SSLContext

    @classmethod
    def load(cls, chain: Path, key: Path | None = None) -> Certificate:
        """Read PEM files: certificate with chain, and its key, which may stand in the same file. Raises TunnelError."""
        key = key or chain

        def password() -> str:
            raise TunnelError(f"{key} is encrypted; write it without a passphrase: openssl pkey -in {key} -out FILE")

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2")  # of TLS 1.2; those of 1.3 are all modern
        context.set_alpn_protocols(["http/1.1"])
        context.options |= ssl.OP_NO_RENEGOTIATION
        try:
            leaf = _LEAF.search(chain.read_text("latin-1"))
            key.read_bytes()  # so that the error tells which of them cannot be read
            if not leaf:
                raise TunnelError(f"{chain} holds no certificate; give a PEM file that begins with the server's own")
            context.load_cert_chain(chain, key, password)
            said = _introduce(context, leaf[0])
        except ssl.SSLCertVerificationError as error:
            raise TunnelError(f"{chain} is not good: {error.verify_message}; renew it") from None
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TunnelError(f"the key in {key} is not that of the certificate in {chain}") from None
            if "PRIVATE KEY-----" not in key.read_text("latin-1"):
                advice = "give the file that has it with --key" if key == chain else "give the one that has it"
                raise TunnelError(f"{key} holds no private key; {advice}") from None
            reason = (error.reason or "not PEM").lower().replace("_", " ")
            raise TunnelError(f"{chain} with the key in {key} cannot be used: {reason}") from None
        except OSError as error:
            raise TunnelError(f"cannot read {error.filename}: {(error.strerror or str(error)).lower()}") from None
        names = tuple(str(name).lower() for kind, name in said.get("subjectAltName", ()) if kind == "DNS")
        begins, expires = (ssl.cert_time_to_seconds(said[end]) for end in ("notBefore", "notAfter"))
        return cls(names, begins, expires, context)


def _introduce(context: ssl.SSLContext, leaf: str) -> Any:
    """Return what a server's certificate says to a client that trusts this one only. Raises ssl.SSLError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=leaf)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    visitor, server = client.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    for end in (visitor, server, visitor, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return visitor.getpeercert()


class Certificates:
    """The certificates of a server by name: of given pairs of files, and those that are put here meanwhile."""

    def __init__(self, pairs: Iterable[tuple[Path, Path | None]] = ()) -> None:
        """Read the pairs: certificate with chain, and its key. Raises TunnelError."""
        self._pairs = list(pairs)
        self._stamps = [self._stamp(pair) for pair in self._pairs]
        self._given = [Certificate.load(*pair) for pair in self._pairs]
        self._bad: list[tuple[list[object], int]] = [([], 0)] * len(self._pairs)  # stamps, and how often they were so
        self._again_at = [0.0] * len(self._pairs)  # when such a pair is tried again, in seconds since the epoch
        self._remind_at = 0.0  # seconds since the epoch
        self._obtained: dict[str, Certificate] = {}
        self._expected: dict[str, asyncio.Future[None]] = {}
        self._index()

    @property
    def names(self) -> list[str]:
        """All names that there is a certificate for, those of the first pair first."""
        return list(dict.fromkeys(name for certificate in self._all() for name in certificate.names))

    @property
    def expires(self) -> float:
        """When the first of them expires, in seconds since the epoch."""
        return min((certificate.expires for certificate in self._all()), default=math.inf)

    def find(self, name: str) -> Certificate | None:
        """Return the certificate for a name, without the one that stands in where there is none.

        It is one that has not expired where there is any, of the very name before `*.`, a given one before others.
        """
        found = [*self._by_name.get(name, ()), *self._by_name.get("*." + name.partition(".")[2], ())]
        now = time.time()
        return next((one for one in found if one.expires > now), found[0] if found else None)

    def is_given(self, name: str) -> bool:
        """Whether one of the given certificates is for a name, and has not expired."""
        wild, now = "*." + name.partition(".")[2], time.time()
        return any(one.expires > now and (name in one.names or wild in one.names) for one in self._given)

    def context(self, name: str) -> ssl.SSLContext | None:
        """Return what a visitor gets who asks for this name, "" for none; None is a refusal."""
        certificate = self.find(name) or next(iter(self._given), None)
        return certificate.context if certificate else None

    def put(self, certificate: Certificate) -> None:
        """Add a certificate, or replace the one for the same names, from now on."""
        self._obtained.update(dict.fromkeys(certificate.names, certificate))
        self._index()

    def prune(self, wanted: Collection[str], now: float) -> None:
        """Take out what was put here, has expired, and is for none of the wanted names."""
        kept = {name: one for name, one in self._obtained.items() if name in wanted or one.expires > now}
        if len(kept) < len(self._obtained):
            self._obtained = kept
            self._index()

    @contextlib.contextmanager
    def expected(self, name: str) -> Iterator[None]:
        """While the context lasts, visitors who ask for a name without a certificate wait: its first is on the way."""
        done = self._expected.setdefault(name, asyncio.get_running_loop().create_future())
        try:
            yield
        finally:
            if self._expected.pop(name, None):
                done.set_result(None)

    def awaited(self, name: str) -> asyncio.Future[None] | None:
        """Return what is done when it is no use any more to wait for a name's certificate."""
        certificate = self.find(name)
        return None if certificate and certificate.expires > time.time() else self._expected.get(name)

    def reload(self) -> None:
        """Read again what has changed; of what is no good now the old one stays in use, which is told once.

        Call it often. It tells as well what expires soon.
        """
        for number, pair in enumerate(self._pairs):
            (bad, times), now = self._bad[number], time.time()
            if (stamp := self._stamp(pair)) == self._stamps[number]:
                continue
            if stamp == bad and now < self._again_at[number] < now + 2 * RELOAD:  # else the clock was set
                continue
            try:
                self._given[number] = certificate = Certificate.load(*pair)
            except TunnelError as error:  # maybe half of a pair was replaced so far; then it is well the next time
                times = times + 1 if stamp == bad else 1
                self._bad[number] = stamp, times
                self._again_at[number] = now + RELOAD if times > 1 else 0.0
                if times == 2:
                    log.warning("the certificate of %s stays as it was: %s", pair[0], escape(str(error), 400))
                continue
            self._stamps[number], self._bad[number] = stamp, ([], 0)
            self._index()
            log.info("the certificate of %s is new (%s)", pair[0], escape(", ".join(certificate.names)))
        if (now := time.time()) >= self._remind_at:
            self._remind_at = now + REMIND
            for pair, certificate in zip(self._pairs, self._given, strict=True):
                if (left := certificate.expires - now) < EXPIRES_SOON:
                    ends = f"expires in {left / 86400:.1f} days" if left > 0 else "has expired"
                    advice = "put a new one there, which is used within a second"
                    log.warning("the certificate of %s %s; %s", pair[0], ends, advice)

    def _all(self) -> list[Certificate]:
        return [*self._given, *self._obtained.values()]

    def _index(self) -> None:
        self._by_name: dict[str, list[Certificate]] = {}
        for certificate in dict.fromkeys(self._all()):
            for name in certificate.names:
                self._by_name.setdefault(name, []).append(certificate)

    @staticmethod
    def _stamp(pair: tuple[Path, Path | None]) -> list[object]:
        stamps: list[object] = []
        for path in filter(None, pair):
            with contextlib.suppress(OSError):
                status = path.stat()
                stamps.append((path, status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode))
        return stamps


class SecureTransport(asyncio.Transport, asyncio.Protocol):
    """A connection on which a visitor speaks TLS or not: a protocol to the event loop, a transport to who speaks HTTP.

    asyncio's own would keep 256 KiB for each connection, does not know what has not been sent, and half-closes nothing.
    """

    def __init__(self, protocol: Any, certificates: Certificates, metrics: Metrics) -> None:
        super().__init__()
        self._protocol, self._certificates, self._metrics = protocol, certificates, metrics
        self._hello = b""  # what came before it was clear who is to read it
        self._plain = False
        self._tls: ssl.SSLObject | None = None
        self._secure = False  # the handshake is over
        self._early = b""  # an answer to who has not said anything
        self._eof = False
        self._header, self._missing = b"", 0  # of the record that comes: what there is of its header, bytes to come
        self._empty = Allowance(MAX_EMPTY, EMPTY_RATE)
        self._cutting = contextlib.ExitStack()  # what cuts it off when its last bytes are not taken

    # The event loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._protocol.connection_made(self)

    def data_received(self, data: bytes) -> None:
        if self._tls:
            return self._receive(data)
        self._hello += data
        if self._hello[0] == 0x16:  # the type of a record with a handshake message, and no letter
            self._begin()
        else:
            self._plain = True
            self._raw.set_protocol(self._protocol)  # it reads for itself from now on
            if self._early:
                self._raw.write(self._early)
            if self._eof:
                self._raw.write_eof()
            self._protocol.data_received(self._hello)

    def eof_received(self) -> bool | None:
        keep: bool | None = self._protocol.eof_received()
        if self._tls:
            self._close()
        return keep and not self._tls

    def connection_lost(self, exc: Exception | None) -> None:
        self._cutting.close()
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def _begin(self) -> None:
        name = server_name(self._hello)
        if self._early or len(self._hello) > MAX_CLIENT_HELLO:
            return self._raw.abort()  # a handshake only to refuse it would be too dear
        if name is None:
            return
        if awaited := self._certificates.awaited(name):
            self._raw.pause_reading()
            self._protocol.expect_head(HOLD)
            awaited.add_done_callback(lambda _: self._go_on(name))
        elif not self._protocol.may_secure():
            self._raw.abort()
        elif context := self._certificates.context(name):
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
            self._receive(self._hello)
        else:
            self._fail("unknown-name", b"\x15\x03\x03\x00\x02\x02\x70")  # unrecognized_name (RFC 6066 section 3)

    def _go_on(self, name: str) -> None:
        if not self._tls and not self._raw.is_closing():
            self._raw.resume_reading()
            self._protocol.expect_head(HEAD_TIMEOUT)
            self._begin()

    def _fail(self, result: str, alert: bytes) -> None:
        self._metrics[f'pytunnel_tls_handshakes_total{{result="{result}"}}'] += 1
        if alert:
            self._raw.write(alert)
        self._close()

    def _receive(self, data: bytes) -> None:
        """Go on with the handshake, and hand on what has come: never more than the event loop reads at a time.

        OpenSSL is given one record at a time: of those without data it would take any number at once.
        """
        assert self._tls
        parts, ended, broken = [], False, False
        for record in self._records(data):
            self._incoming.write(record)
            try:
                if self._secure:
                    parts.append(self._tls.read(16 * KiB))  # all of the record
                    if not (ended := not parts[-1]):
                        continue
                else:
                    self._tls.do_handshake()
                    self._hello, self._secure = b"", True
                    self._metrics['pytunnel_tls_handshakes_total{result="done"}'] += 1
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:  # the end, after ours
                ended = True
            except ssl.SSLError as error:
                if not self._secure:
                    peer = (self._raw.get_extra_info("peername") or ("",))[0]
                    log.debug("a TLS handshake with %s failed: %s", peer, error.reason)
                    return self._fail("failed", self._outgoing.read())
                broken = True
            if not self._missing and not self._empty.take(asyncio.get_running_loop().time()):
                broken = True
            if ended or broken:
                break
        self._flush()
        if data := b"".join(parts):
            self._deliver(data)
        if broken and not self._raw.is_closing():
            self._raw.abort()
        elif ended and not self._raw.is_closing() and not self._protocol.eof_received():
            self.close()

    def _records(self, data: bytes) -> Iterator[memoryview]:
        """Cut where a record ends (RFC 8446 section 5.1); `_missing` tells how much of the last one is to come."""
        rest = memoryview(self._header + data if self._header else data)
        while len(rest) >= (1 if self._missing else 5):
            length = self._missing or 5 + int.from_bytes(rest[3:5])
            record, rest = rest[:length], rest[length:]
            self._missing = length - len(record)
            yield record
        self._header = bytes(rest)

    def _deliver(self, data: bytes) -> None:
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(data)
            return
        rest = memoryview(data)
        while rest:
            buffer = memoryview(protocol.get_buffer(len(rest)))
            size = min(len(rest), len(buffer))
            buffer[:size] = rest[:size]
            protocol.buffer_updated(size)
            rest = rest[size:]

    def _flush(self) -> None:
        if (data := self._outgoing.read()) and not self._raw.is_closing():
            self._raw.write(data)

    def _close(self) -> None:
        """Close when all is sent, or when the peer takes nothing any more."""
        if not self._raw.is_closing():
            self._raw.close()
            if self._raw.get_write_buffer_size() and not self._plain:
                self._cutting.enter_context(cut_when_stalled(self._raw, STALL_TIMEOUT))

    # The protocol's side

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._tls.context if self._tls else default
        return self._raw.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        if self._plain:
            self._raw.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def close(self) -> None:
        self._say_goodbye()
        self._close()

    def abort(self) -> None:
        self._raw.abort()

    def pause_reading(self) -> None:
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._raw.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._plain:
            self._raw.write(data)
        elif not self._secure:
            self._early += data
        elif data and not self._eof and not self._raw.is_closing():
            assert self._tls
            try:
                self._tls.write(data)
            except ssl.SSLError:  # the peer broke the protocol
                return self._raw.abort()
            self._flush()

    def write_eof(self) -> None:
        self._say_goodbye()
        self._eof = True
        if self._plain or self._secure:
            self._raw.write_eof()

    def can_write_eof(self) -> bool:
        return True

    def _say_goodbye(self) -> None:
        """Tell a TLS peer that nothing comes after this: else it could not tell that from a cut."""
        if self._secure and not self._eof and not self._raw.is_closing():
            assert self._tls
            with contextlib.suppress(ssl.SSLError):  # it wants to read the peer's, for which nobody waits
                self._tls.unwrap()
            self._flush()


# ---- ACME -----------------------------------------------------------------------------------------------------------
# Certificates from an authority (RFC 8555), for the hosts that are wanted: one order at a time, proved by HTTP-01. The
# authority's limits are kept whatever happens here: each try is noted on disk before it is made, so that a server that
# is started again and again does not ask again and again. certbot's library blocks, so it has a thread.


async def in_thread(work: Callable[[], _T]) -> _T:
    """Run what blocks. Unlike asyncio.to_thread's, the thread does not keep a process that is about to end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():  # whoever waited has been cancelled
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        outcome: tuple[_T | None, Exception | None]
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="in_thread", daemon=True).start()
    return await future


class Acme:
    """Obtains the certificates that a server wants, renews them, and keeps them in a directory."""

    def __init__(
        self, certificates: Certificates, state: Path, email: str, url: str, clock: Callable[[], float] = time.time
    ) -> None:
        """`url` is an authority's directory. Raises TunnelError when certbot's library is missing."""
        try:
            import acme.client  # noqa: F401
            import cryptography  # noqa: F401
        except ImportError:
            pip = f"{shlex.quote(sys.executable)} -m pip install acme cryptography"
            raise TunnelError(f"--acme needs certbot's library; run: {pip}") from None
        self._directory = state / "acme" / re.sub(r"[^A-Za-z0-9.-]+", "_", url.partition("://")[2])  # one for each
        self._certificates, self._email, self._url, self._clock = certificates, email, url, clock
        self._wanted: Callable[[], Iterable[str]] = list
        self._challenges: dict[str, bytes] = {}  # path -> what the authority wants to see there
        self._renewals: dict[str, float] = {}  # host that has a certificate from here -> when it is to be renewed
        self._failed: dict[str, tuple[int, float]] = {}  # host -> how often in a row, and when it is tried again
        self._issued: dict[str, float] = {}  # host -> when its first certificate came, of the last week
        self._expected: dict[str, contextlib.ExitStack] = {}  # hosts whose visitors wait for a first certificate
        self._ordering = ""  # the host whose order is under way
        self._orders = Allowance(MAX_ORDERS, ORDER_RATE)
        self._too_many = False  # of them were to be made
        self._full = False  # the week's certificates are used up
        self._woken = asyncio.Event()
        self._running: asyncio.Future[None] | None = None

    def load(self) -> None:
        """Use the certificates that are kept; those that are over for long are removed. Raises TunnelError."""
        path = self._directory / "orders.json"
        for directory in reversed(self._directory.parents[:2]):  # what `write_private` would make for everybody
            with contextlib.suppress(OSError):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            saved = parse_object(read_private(path))
            self._failed = {str(host): (int(count), float(until)) for host, (count, until) in saved["failed"].items()}
            self._issued = {str(host): float(when) for host, when in saved["issued"].items()}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TunnelError(f"{path} is damaged; move it away") from None
        for path in self._directory.glob("*.pem"):
            try:
                self._use(path.stem, path)
            except TunnelError as error:  # maybe only because the clock is wrong, or for now
                is_over = self._is_over(path)
                log.info("%s is %s: %s", path.name, "removed" if is_over else "not used", escape(str(error), 400))
                if is_over:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def start(self, wanted: Callable[[], Iterable[str]]) -> None:
        """Order what is due, of the hosts that `wanted` returns whenever it is asked, until `close`."""
        self._wanted = wanted
        self.wake()
        self._running = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stop at once, whatever an authority does."""
        if self._running:
            await end_tasks(self._running)
        self._wanted = list
        self._expect()

    def wake(self) -> None:
        """What is wanted has changed: visitors of a new host wait from now on, and it is ordered next."""
        self._expect()
        self._woken.set()

    def challenge(self, path: str) -> bytes | None:
        """Return the answer to an authority's look at us, None for any other request."""
        return self._challenges.get(path)

    def _hosts(self) -> list[str]:
        """Return what is wanted, without the hosts that a given certificate is for."""
        return [host for host in self._wanted() if not self._certificates.is_given(host)]

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            self._expect()
            wanted = set(self._wanted())
            self._certificates.prune(wanted, self._clock())
            renewals = self._renewals.items()
            self._renewals = {host: due for host, due in renewals if host in wanted or self._certificates.find(host)}
            dues = [(host, self._due(host)) for host in self._hosts()]
            host, due = min(dues, key=lambda one: one[1], default=("", math.inf))  # the first of those that are equal
            if (left := due - self._clock()) <= 0:
                if self._orders.take(time.monotonic()):
                    self._too_many = False
                    await self._obtain(host)
                    continue
                left = 1 / ORDER_RATE
                if not self._too_many:
                    log.warning("too many orders of certificates: one is made every %g s now (%s)", left, host)
                self._too_many = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, ACME_TICK)):
                    await self._woken.wait()

    def _due(self, host: str) -> float:
        """Return when a host's next order is to be made."""
        now = self._clock()
        due = self._renewals.get(host)
        if due is None:
            self._issued = {name: when for name, when in self._issued.items() if now - ACME_WEEK < when}
            full = len(self._issued) >= MAX_NEW_HOSTS
            due = min(now, *self._issued.values()) + ACME_WEEK if full else 0.0  # the clock may be wrong, then or now
            if full and not self._full:
                until = f"until {datetime.datetime.fromtimestamp(due):%Y-%m-%d %H:%M}"
                log.warning("no more new certificates %s: %d came within a week (%s)", until, MAX_NEW_HOSTS, host)
            self._full = full
        retry = self._failed[host][1] if host in self._failed else 0.0
        return max(due, retry if retry < now + 2 * ACME_BACKOFF_MAX else 0.0)  # else the clock was wrong then

    def _expect(self) -> None:
        """Let visitors wait for the hosts whose first certificate is about to come, and for no others."""
        now = self._clock()
        first = [host for host in self._hosts() if host not in self._renewals]
        may_order = self._orders.left(time.monotonic()) > 0
        soon = {host for host in first if host == self._ordering or (may_order and self._due(host) <= now)}
        for host in self._expected.keys() - soon:
            self._expected.pop(host).close()
        for host in soon - self._expected.keys():
            self._expected[host] = contextlib.ExitStack()
            self._expected[host].enter_context(self._certificates.expected(host))

    async def _obtain(self, host: str) -> None:
        is_new, failures = host not in self._renewals, self._failed.get(host, (0, 0.0))[0] + 1
        self._ordering = host
        try:
            self._put_off(host, failures)  # also when we are stopped meanwhile: the authority counts it all the same
            self._save()
            text = await in_thread(lambda: self._order(host))
            if is_new:
                self._issued[host] = self._clock()
            path = self._directory / f"{host}.pem"
            fresh = path.with_suffix(".new")
            write_private(fresh, text)
            self._use(host, fresh)
            os.replace(fresh, path)
            self._put_off(host, 0)
        except Exception as error:  # the library does not say which ones it raises for what an authority sends
            left = self._put_off(host, failures)
            trace = error if log.isEnabledFor(logging.DEBUG) else None
            again = f"the next try is in {left:.0f} s"
            log.warning("no certificate for %s: %s; %s", host, self._reason(error), again, exc_info=trace)
        finally:
            self._ordering = ""
            with contextlib.suppress(OSError):  # it could be written before
                self._save()

    def _put_off(self, host: str, failures: int) -> float:
        """Return in how many seconds a host's order may be made again. After a success, too: it may be due at once."""
        left = min(ACME_BACKOFF * 2.0 ** min(max(failures - 1, 0), 32), ACME_BACKOFF_MAX) * random.uniform(0.75, 1.25)
        self._failed[host] = failures, self._clock() + left
        return left

    def _use(self, host: str, path: Path) -> None:
        """Let visitors of a host see the certificate in a file. Raises TunnelError when it is no good."""
        certificate = Certificate.load(path)
        if host not in certificate.names:
            raise TunnelError(f"the certificate is for {', '.join(certificate.names) or 'no host'}, not for {host}")
        self._certificates.put(certificate)
        end, life = certificate.expires, certificate.expires - certificate.begins
        self._renewals[host] = end - life * RENEWAL_SHARE * random.uniform(1.0, 1.1)
        until = datetime.datetime.fromtimestamp(end).isoformat(" ", "minutes")
        log.info("the certificate for %s is good until %s", host, until)

    def _is_over(self, path: Path) -> bool:
        """Whether a file surely is no use any more: its certificate expired long ago, or is for another host."""
        from cryptography import x509

        with contextlib.suppress(ValueError, OSError, x509.ExtensionNotFound):
            leaf = x509.load_pem_x509_certificate(path.read_bytes())
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            is_ours = path.stem in names.get_values_for_type(x509.DNSName)
            return not is_ours or leaf.not_valid_after_utc.timestamp() < self._clock() - KEEP_EXPIRED
        return False

    def _save(self) -> None:
        now = self._clock()
        self._failed = {host: one for host, one in self._failed.items() if one[1] > now - ACME_WEEK}
        text = json.dumps({"failed": self._failed, "issued": self._issued}, indent=1)
        write_private(self._directory / "orders.json", text)

    # In the thread

    def _order(self, host: str) -> str:
        """Return private key and chain of a fresh certificate. Raises many things."""
        from acme import challenges, messages
        from acme.client import ClientNetwork, ClientV2
        from acme.crypto_util import make_csr
        from josepy.jwa import ES256
        from josepy.jwk import JWK

        account = JWK.load(read_or_make(self._directory / "account.key", self._make_key).encode())
        trusted = cast(Any, os.environ.get("SSL_CERT_FILE") or True)  # as for everything else here
        agent = f"pytunnel/{__version__}"
        net = ClientNetwork(account, alg=ES256, verify_ssl=trusted, user_agent=agent, timeout=cast(Any, ACME_TIMEOUT))
        paths: list[str] = []
        try:
            client = ClientV2(ClientV2.get_directory(self._url, net), net)
            self._register(client)
            own_key = self._make_key()
            order = client.new_order(make_csr(own_key.encode(), [host]))
            for authorization in order.authorizations:
                if authorization.body.status == messages.STATUS_VALID:  # from an order before
                    continue
                for challenge in authorization.body.challenges:
                    if isinstance(challenge.chall, challenges.HTTP01):
                        response, validation = challenge.response_and_validation(account)
                        paths.append(challenge.path)
                        self._challenges[challenge.path] = validation.encode()
                        client.answer_challenge(challenge, response)
            deadline = datetime.datetime.now() + datetime.timedelta(seconds=ORDER_TIMEOUT)
            return own_key + client.poll_and_finalize(order, deadline).fullchain_pem
        finally:
            for path in paths:
                del self._challenges[path]
            net.session.close()

    def _register(self, client: Any) -> None:
        """Make an account for our key, or find the one that there is. Raises many things."""
        from acme import errors, messages

        if client.external_account_required():
            raise TunnelError("this authority wants an account that was made on its site, which pytunnel cannot use")
        wanted = messages.NewRegistration.from_data(email=self._email, terms_of_service_agreed=True)
        try:
            client.new_account(wanted)
        except errors.ConflictError as known:
            client.net.account = messages.RegistrationResource(uri=known.location, body=messages.Registration())

    @staticmethod
    def _make_key() -> str:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ec.generate_private_key(ec.SECP256R1())
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def _reason(self, error: Exception) -> str:
        """Return in one line why an order has failed, in the words of the authority when it has any."""
        import requests
        from acme import errors, messages

        problem: Any = error
        if isinstance(error, errors.ValidationError):
            looks = [look for authorization in error.failed_authzrs for look in authorization.body.challenges]
            problem = next((look.error for look in looks if look.error), error)
        elif isinstance(error, errors.IssuanceError):
            problem = error.error
        if isinstance(problem, messages.Error):
            return escape(f"{self._url} says: {problem.detail or problem.typ}", 400)
        if isinstance(error, errors.TimeoutError):
            return f"{self._url} has not finished the order within {ORDER_TIMEOUT:g} s"
        if isinstance(error, requests.Timeout):
            return f"{self._url} does not answer"
        if isinstance(error, requests.ConnectionError):
            cause: BaseException = error
            while inner := cause.__cause__ or cause.__context__:
                cause = inner
            return escape(f"{self._url} cannot be reached: {getattr(cause, 'strerror', None) or cause}", 400)
        if isinstance(error, errors.ClientError) and error.args and isinstance(error.args[0], requests.Response):
            return escape(f"{self._url} answers with HTTP status {error.args[0].status_code}; is it a directory?", 400)
        if isinstance(error, TunnelError | ValueError | OSError):
            return escape(str(error), 400)
        return escape(f"{self._url}: {type(error).__name__}: {error}", 400)


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
    "server-full": (503, "The server has as much to do as it can take. Try again soon."),
    "too-many-requests": (429, "Too many connections, aborted requests or wrong passwords of this address. Try later."),
    "request-timeout": (408, "The request did not arrive in time."),
    "content-too-large": (413, "The request's content is larger than this server takes."),
    "uri-too-long": (414, "The request's target is too long."),
    "shutting-down": (503, "The server is restarting. Try again soon."),
    "bad-request": (400, "The request is not valid HTTP."),
    "too-large": (431, "The request's header fields are too large."),
    "not-http": (404, "The tunnel of this name is for TCP; its client tells the address, which is no web page."),
    "unauthorized": (401, "This tunnel is for those who have a user name and password for it. Ask its owner for them."),
    "not-allowed": (403, "This tunnel is not open to the network you come from. Ask its owner to allow your address."),
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

STATUS_FIELDS: dict[int, Headers] = {  # what an answer with a status owes besides its page
    401: [(b"WWW-Authenticate", b'Basic realm="pytunnel", charset="UTF-8"')],
    426: [(b"Upgrade", b"websocket")],
    429: [(b"Retry-After", b"5")],
    503: [(b"Retry-After", b"5")],
}


_date_now = 0, b""  # the second it was made for, and the field's value


def _date() -> bytes:
    """Return a Date field's value; it is made once a second."""
    global _date_now
    now = int(time.time())
    if now != _date_now[0]:
        _date_now = now, email.utils.formatdate(now, usegmt=True).encode()
    return _date_now[1]


def problem_page(problem: str, accept: str, encoder: ResponseEncoder, fields: Headers = []) -> bytes:  # noqa: B006
    """Return the answer to a request that could not be served: HTML, JSON or text, without a word of the request."""
    status, sentence = PROBLEMS[problem]
    if "text/html" in accept:
        kind = b"text/html; charset=utf-8"
        title = f"{status} {problem}"
        style = "font:16px/1.5 system-ui;margin:3rem auto;max-width:40rem;padding:0 1rem;color-scheme:light dark"
        start = f'<!doctype html><html lang="en" style="{style}"><meta name="viewport" content="width=device-width">'
        text = f"{start}<title>{title}</title><h1>{title}</h1><p>{html.escape(sentence)}</p>\n"
    elif "json" in accept:
        kind = b"application/json"
        text = json.dumps({"error": problem, "status": status, "message": sentence}) + "\n"
    else:
        kind = b"text/plain; charset=utf-8"
        text = f"{status} {problem}: {sentence}\n"
    body = text.encode()
    headers = [(b"Content-Type", kind), (b"Content-Length", b"%d" % len(body)), (b"X-Pytunnel-Error", problem.encode())]
    headers += [*fields, *STATUS_FIELDS.get(status, [])]
    head = ResponseHead(status, http.HTTPStatus(status).phrase.encode(), headers)
    return encoder.head(head, _date()) + encoder.data(body) + encoder.end()


class Delivered:
    """What a handler returns to aiohttp: the response has been written already."""

    def __init__(self, *, keep_alive: bool = False) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None: ...  # nothing is left to write
    async def write_eof(self) -> None: ...  # nor to end


class RawPipe(asyncio.StreamReader):
    """Takes a visitor connection's bytes from aiohttp once they are not HTTP any more."""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:  # type: ignore[override]
        """Answer as aiohttp's parsers do: not at the end, nothing left over."""
        super().feed_data(data)
        return False, b""


class Gate:
    """Who is connected, and who may connect: so many of one address, and so many in all."""

    def __init__(self, *, each: int = MAX_VISITORS, total: int = MAX_VISITORS, trusted: Networks = ()) -> None:
        self.each, self.total, self.trusted = each, total, trusted
        self.hsts = b""  # Strict-Transport-Security of responses over TLS; others must have none (RFC 6797 section 7.2)
        self.open = 0  # connections
        self.callers = Callers()
        self.metrics = Metrics()

    def is_trusted(self, peer: str) -> bool:
        """Whether a peer is a proxy whose forwarding fields count."""
        return bool(self.trusted) and within(peer, self.trusted)

    def page(self, problem: str, accept: str, encoder: ResponseEncoder, fields: Headers) -> bytes:
        """Return problem_page's answer, counted."""
        self.metrics[RESPONSES_TOTAL[PROBLEMS[problem][0] // 100]] += 1
        self.metrics[f'pytunnel_refusals_total{{reason="{problem}"}}'] += 1
        return problem_page(problem, accept, encoder, fields)

    def log(self, caller: Caller, text: str) -> None:
        """Log a line about an address, or count it where there were too many."""
        if line := caller.line(text, time.monotonic()):
            log.info("%s", line)


class Visitor:
    def __init__(
        self, message: RawRequestMessage, content: aiohttp.StreamReader, protocol: Any, gate: Gate, *, keep_alive: bool
    ) -> None:
        """Take a head and its content from aiohttp's `protocol`, which is _visitor_server's."""
        self.protocol, self.content, self.fields = protocol, content, message.headers
        self.peer: str = protocol.address
        self.scheme = "https" if protocol.ssl_context else "http"
        self.method = message.method.encode()
        self.target = message.path.encode("utf-8", "surrogateescape")
        self.headers = Fields(message.raw_headers)
        self.address = visitor_address(self.peer, self.headers, gate.trusted)  # the peer's, or behind a proxy its own
        self.proxied = self.address != self.peer
        self.caller: Caller = gate.callers[self.address] if self.proxied else protocol.caller
        self.host = ""  # that it asks for
        self.max_body: float = math.inf
        self.answering = False  # the response has begun, and not ended
        self.switched = False  # it was a 101
        self._gate, self._metrics = gate, gate.metrics
        self.problem = ""  # why its content was not read to the end
        self.version = (message.version.major, message.version.minor)
        http11 = self.version >= (1, 1)
        self.upgrade = b""
        if "Upgrade" in message.headers and http11 and b"upgrade" in field_tokens(self.headers, b"connection"):
            self.upgrade = b", ".join(field_values(self.headers, b"upgrade")).lower()
        self.has_body = content is not protocol.no_content
        # aiohttp (3.14.5) hands the last trailer of a chunked request to the next request on the connection, as a field
        # of its head. Behind a front that may be somebody else's, so there is no next one.
        keep_alive = keep_alive and http11 and not message.should_close and not message.chunked
        hsts = gate.hsts if protocol.ssl_context else b""
        self.encoder = ResponseEncoder(self.method, http11=http11, keep_alive=keep_alive, hsts=hsts)

    @property
    def unread(self) -> bool:
        """Whether some of the request's content has not been read."""
        return self.has_body and not self.content.is_eof()

    @property
    def transport(self) -> asyncio.Transport | None:
        """Where the response goes; None once the visitor is gone."""
        return cast("asyncio.Transport | None", self.protocol.transport)

    async def relay(self, stream: Stream) -> None:
        """Send the request's content to a stream and its response to the visitor; nothing is left running."""
        upload: asyncio.Future[None] | None = None
        if self.has_body:
            upload = asyncio.ensure_future(self._upload(stream, self._read_content))
            stream.on_reset = lambda _: upload and upload.cancel()
        try:
            while (head := await self._read_head(stream)).interim:
                self.write(self.encoder.head(head, b""))
                await self._drain()
            self._metrics[RESPONSES_TOTAL[head.status // 100]] += 1
            if head.status == 101:
                pipe = self._switch_protocols(head)
                upload = asyncio.ensure_future(self._upload(stream, lambda: pipe.read(SEND_BUFFER)))
                return await self._pipe(stream, upload)
            if upload and not upload.done():
                self.encoder.keep_alive = False  # said in the head: the rest of the request may never be read
            self.answering = True
            await self._respond(stream, head)
            self.answering = False
            if upload and not upload.done():
                await asyncio.wait([upload], timeout=LINGER if head.status >= 400 else None)
        finally:
            if upload:
                await end_tasks(upload)

    async def fail(self, problem: str) -> None:
        """Answer with an error page, or break the connection off when a response has begun."""
        transport, encoder, problem = self.transport, self.encoder, self.problem or problem
        if encoder.started or transport is None or self.unread:
            encoder.keep_alive = False
        if transport and not encoder.started:
            transport.write(self._gate.page(problem, self.fields.get("Accept", ""), encoder, []))
        elif transport:
            if encoder.until_close:  # an orderly end would look like a complete response
                _reset(transport)
            transport.abort()

    async def discard(self) -> None:
        """Read on a little when the response came before the request's end: closing at once would swallow it."""
        left = MAX_DISCARD
        with contextlib.suppress(Exception):  # aiohttp has several for content that breaks off or breaks the rules
            async with asyncio.timeout(LINGER):
                while left > 0 and (data := await self.content.readany()):
                    left -= len(data)

    def write(self, data: bytes) -> None:
        """Send bytes of the response as they are. Raises ConnectionError when the visitor is gone."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the visitor is gone")
        if data:
            transport.write(data)

    async def _read_head(self, stream: Stream) -> ResponseHead:
        payload = await stream.read_head()
        head = ResponseHead.decode(payload)
        if b"domain" in payload.lower():
            return ResponseHead(head.status, head.reason, own_cookies(head.headers, self.host))
        return head

    async def _read_content(self) -> bytes:
        """Return the next bytes of the request's content. Raises Unserved when there are too many, or none for long."""
        while True:
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    data = await self.content.readany()
            except TimeoutError:
                if self.answering:  # a request and a response that go on side by side may both have pauses
                    continue
                self.problem = "request-timeout"
                raise Unserved(self.problem) from None
            self.max_body -= len(data)
            if self.max_body < 0:
                self.problem = "content-too-large"
                raise Unserved(self.problem)
            return data

    async def _upload(self, stream: Stream, read: Callable[[], Awaitable[bytes]]) -> None:
        try:
            while data := await read():
                self._metrics["pytunnel_received_bytes_total"] += len(data)
                await stream.write(data)
            await stream.write(b"", end=True)
        except StreamReset:
            pass  # the response tells why
        except Exception as error:  # aiohttp has several for content that breaks off or breaks the rules
            broken = f"the visitor's request broke off: {type(error).__name__}"
            stream.abort(ErrorCode.CANCEL, f"the server answered {self.problem}" if self.problem else broken)

    async def _respond(self, stream: Stream, head: ResponseHead) -> None:
        out = self.encoder.head(head, _date(), end=stream.at_eof)
        while head.has_body(self.method) and not stream.at_eof:  # without a body there is no end to wait for
            if not stream.readable or len(out) > SEND_BUFFER:
                self.write(out)
                out = b""
                await self._drain()
            try:
                data = await stream.read()
                self._metrics["pytunnel_sent_bytes_total"] += len(data)
                out += self.encoder.data(data)
            except StreamReset:
                self.write(out)  # what did come, although the connection will break off after it
                raise
        self.write(out + self.encoder.end())
        await self.flush()

    async def flush(self) -> None:
        """Wait until the kernel has it all, so that nothing is lost when the server stops."""
        transport = self.transport
        if transport and transport.get_write_buffer_size():
            transport.set_write_buffer_limits(0)
            await self._drain()
            transport.set_write_buffer_limits()

    async def _drain(self) -> None:
        """Wait until there is room to write; a visitor who takes nothing for STALL_TIMEOUT is cut off."""
        transport = self.transport
        if transport is None or not self.protocol.writing_paused:
            return
        with cut_when_stalled(transport, STALL_TIMEOUT):
            await self.protocol._drain_helper()

    def _switch_protocols(self, head: ResponseHead) -> RawPipe:
        if not self.upgrade:
            raise MessageError("101 without an Upgrade", 502)
        self.switched = True
        self.write(self.encoder.head(head, b""))
        pipe = RawPipe(SEND_BUFFER)
        self.protocol.set_parser(pipe)
        assert self.transport
        pipe.set_transport(self.transport)  # after it: aiohttp resumes reading in there, behind the pipe's back
        return pipe

    async def _pipe(self, stream: Stream, upload: asyncio.Future[None]) -> None:
        try:
            while data := await stream.read():
                self._metrics["pytunnel_sent_bytes_total"] += len(data)
                self.write(data)
                await self._drain()
            await self.flush()
        except asyncio.CancelledError:  # the visitor has closed the connection; what it sent before that still counts
            await asyncio.wait([upload], timeout=LINGER)
            if upload.done():
                stream.abort(ErrorCode.NO_ERROR, flush=True)
            else:  # the local service does not take it, maybe for ever
                stream.abort(ErrorCode.CANCEL, "the visitor has left")
            raise


class TcpVisitor(Connection):
    """A visitor's connection to the port of a TCP tunnel; `serve` is told of it, unless the gate is shut."""

    headers: ClassVar[Headers] = []  # as a Visitor has them
    proxied = False

    def __init__(self, gate: Gate, serve: Callable[[TcpVisitor], object]) -> None:
        super().__init__()
        self.on_lost: Callable[[], object] = lambda: None  # called when the connection is closed
        self._gate, self._serve = gate, serve

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername") or ("", 0)  # uvloop has none once the peer has reset it
        self.address = peer[0]
        self.peer = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        self.caller, gate = self._gate.callers[self.address], self._gate
        self.caller.open += 1
        gate.open += 1
        gate.metrics["pytunnel_tcp_connections_total"] += 1
        self.guard(TCP_STALL_TIMEOUT)
        if gate.open > gate.total:
            self.reset()
        elif self.caller.open > gate.each:
            gate.log(self.caller, f"refused a connection from {self.address}: it has {gate.each} already")
            self.reset()
        else:
            self._serve(self)

    def connection_lost(self, exc: Exception | None) -> None:
        # That we have cut it off is no end of what the visitor had to say.
        super().connection_lost(exc if exc or self._eof else ConnectionAbortedError("cut off"))
        self._gate.open -= 1
        self.caller.open -= 1
        self.on_lost()


class TcpListener:
    """A port that is listened on from now on, for visitors of TCP tunnels. Raises OSError."""

    def __init__(self, addresses: Iterable[Address], port: int, protocol: Callable[[], TcpVisitor]) -> None:
        self._servers: list[asyncio.Server] = []
        with contextlib.ExitStack() as stack:
            self._sockets = [stack.enter_context(bind_socket(address, port)) for address in addresses]
            stack.pop_all()
        self._serving = asyncio.ensure_future(self._serve(protocol))

    async def _serve(self, protocol: Callable[[], TcpVisitor]) -> None:
        for sock in self._sockets:
            server = await asyncio.get_running_loop().create_server(
                protocol, sock=sock, backlog=VISITOR_BACKLOG, start_serving=False
            )
            self._servers.append(server)  # before anything is waited for: `close` may come then
            await server.start_serving()

    def close(self) -> None:
        self._serving.cancel()
        for server in self._servers:
            server.close()
        for sock in self._sockets:
            sock.close()


class Begun:
    """A coroutine that has been begun without a task; whoever awaits this carries it on."""

    def __init__(self, coroutine: Coroutine[Any, None, Any]) -> None:
        self.coroutine = coroutine
        self.waits_for: asyncio.Future[Any] | None = None  # none: just for its turn, as in asyncio.sleep(0)
        self._tidying: asyncio.Future[None] | None = None  # a reference to what else nobody has

    def go_on(self) -> None:
        """Run it until it waits for something. Raises StopIteration with its result, and what it raises."""
        self.waits_for = self.coroutine.send(None)

    def cancel(self) -> None:
        """End it, as a task's `cancel` does; what it does then may take longer."""
        if self.waits_for:
            self.waits_for.cancel()  # it has been seen, if it is done
        with contextlib.suppress(StopIteration, asyncio.CancelledError):
            self.waits_for = self.coroutine.throw(asyncio.CancelledError())
            self._tidying = asyncio.ensure_future(self)

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            while True:
                try:
                    yield self.waits_for
                except BaseException as error:
                    self.waits_for = self.coroutine.throw(error)
                else:
                    self.go_on()
        except StopIteration as stop:
            return stop.value


def _visitor_server(
    handler: Callable[[web.BaseRequest], Coroutine[Any, None, Any]],
    gate: Gate,
    fields: Headers | None = None,
    begin: Callable[[RawRequestMessage, aiohttp.StreamReader, Any], Coroutine[Any, None, Any]] | None = None,
) -> web.Server:
    """Return aiohttp's low-level server with deadlines and limits for what is no request yet.

    `fields` are in our own answers to that. `begin` handles a request without content and Upgrade instead of `handler`;
    it may run without a task, and so it has no timeouts.
    """
    from aiohttp import EMPTY_PAYLOAD, http_exceptions, http_parser, web

    if not http_parser.HttpRequestParser.__module__.endswith("_http_parser"):
        raise TunnelError("aiohttp lacks its C parser, and its other one is not strict; reinstall aiohttp from a wheel")
    if not hasattr(http_parser.HttpRequestParser, "message_consumed"):  # of 3.14; another one may count otherwise
        begin = None

    class VisitorProtocol(web.RequestHandler):
        __slots__ = (
            "_begun",
            "_busy",
            "_chunked_bytes",
            "_content",
            "_counted",
            "_head_bytes",
            "_head_timer",
            "_line_bytes",
            "_line_ended",
            "_message",
            "_rest",
            "address",
            "caller",
        )
        no_content = EMPTY_PAYLOAD

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            address = (transport.get_extra_info("peername") or ("",))[0]  # uvloop has none once the peer has reset it
            self.address = address
            self.caller = gate.callers[address]
            self._counted = not gate.is_trusted(address)
            self.caller.open += self._counted
            gate.open += 1
            self._busy = False  # a request's head is complete, and the rest of it or its response is not
            self._content: aiohttp.StreamReader = EMPTY_PAYLOAD  # of the last head that was complete
            self._head_bytes = self._line_bytes = self._chunked_bytes = 0
            self._line_ended = False
            self._begun: Begun | None = None  # the handling of a request that has no task, unless it turns out long,
            self._message: Any = None  # what aiohttp has of that request,
            self._rest: Begun | None = None  # and its rest, for the task
            self._head_timer: asyncio.TimerHandle | None = self._loop.call_later(HEAD_TIMEOUT, self._head_is_late)
            if gate.open > gate.total + RESERVED_FILES // 4:
                self.force_close()  # even a page of our own takes too much now
            elif gate.open > gate.total:
                self._refuse("server-full")
            elif self._counted and self.caller.open > gate.each:
                gate.log(self.caller, f"refused a connection from {address}: it has {gate.each} already")
                self._refuse("too-many-requests")

        def connection_lost(self, exc: BaseException | None) -> None:
            super().connection_lost(exc)
            for begun in filter(None, (self._begun, self._rest)):
                begun.cancel()
            self._begun = self._rest = None
            gate.open -= 1
            self.uncount()
            self._end_head()

        def uncount(self) -> None:
            """Do not count this connection among those of its address any more: it is a client's link."""
            self.caller.open -= self._counted
            self._counted = False

        def may_secure(self) -> bool:
            """Whether its address may have another TLS handshake, which takes much more of us than of a peer."""
            if not self._counted or self.caller.secured.take(time.monotonic()):
                return True
            gate.log(self.caller, f"refused a TLS handshake with {self.address}: it had {MAX_SECURED} of them")
            return False

        def expect_head(self, seconds: float) -> None:
            """Wait that long for a request's head, from now on."""
            self._end_head()
            self._head_timer = self._loop.call_later(seconds, self._head_is_late)

        def data_received(self, data: bytes) -> None:
            in_head = not self._upgraded and (not self._busy or self._content.is_eof())
            self._hand_over()
            queued = len(self._messages)
            if in_head and not self._line_ended:
                end = data.find(b"\n")
                self._line_ended = end >= 0
                self._line_bytes += end if self._line_ended else len(data)
            waiter, self._waiter = self._waiter, None  # so that aiohttp does not wake its task, which may not be needed
            try:
                super().data_received(data)
            finally:
                self._waiter = waiter
            if self._busy or len(self._messages) > 1:
                self._check_content(len(data))
            if len(self._messages) > queued:
                self._busy, self._content = True, self._messages[-1][1]
                self._end_head()
                waits = self._request_count == 1 if waiter is None else not waiter.done()  # or has not even begun to
                if waits and not self._begin() and waiter:
                    waiter.set_result(None)
            elif in_head and (self._head_bytes or data.strip(b"\r\n")):  # RFC 9112 section 2.2: ignore empty lines
                self._head_bytes += len(data)
                self._check_head()

        def _check_head(self) -> None:
            """Bound a head that has begun and is not complete: at once, or when the response before it has ended."""
            if not self._busy and self._head_bytes and not self._force_close:
                if self._head_bytes > MAX_HEAD:
                    self._refuse("too-large")
                elif self._head_timer is None:
                    self._head_timer = self._loop.call_later(HEAD_TIMEOUT, self._head_is_late)

        def _check_content(self, size: int) -> None:
            """Let the reader of a request's content know when that broke the rules, or is framing for the most part."""
            # aiohttp (3.14.5) queues its error behind the request whose content it is, which goes on waiting for more.
            request = self._current_request
            error = getattr(self._messages[-1][0], "exc", None) if self._messages else None
            contents = [content for message, content in self._messages if not hasattr(message, "exc")]
            content = contents[-1] if contents else request.content if request else None
            if request and request._message.chunked and not contents and content:  # the last one of its connection
                self._chunked_bytes += size
                if self._chunked_bytes > MAX_HEAD + (1 + MAX_CHUNKING) * content.total_bytes:
                    error = MessageError("more chunk framing than content")
            if isinstance(error, Exception) and content and not content.is_eof():
                content.set_exception(error)

        # Most requests have no content, and their response comes whole. For them aiohttp's task need not wake, nor
        # start another one: they are begun as they come, and go on when the first thing that they wait for is there, as
        # a rule the response. What waits again, or has others behind it, is handed over to that task.

        def _begin(self) -> bool:
            """Begin to handle the request that has come, if that needs no task."""
            message, content = cast(Any, self._messages[0])
            alone = len(self._messages) == 1 and content is EMPTY_PAYLOAD and not hasattr(message, "exc")
            if begin is None or not alone or "Upgrade" in message.headers or self._close or self._force_close:
                return False
            self._message = self._messages.popleft()
            self._begun = Begun(self.handle(begin(message, content, self), content))
            self._go_on()
            return True

        def _go_on(self, ended: asyncio.Future[Any] | None = None) -> None:
            if (begun := self._begun) is None or begun.waits_for is not ended:  # it is in other hands, or over
                return
            self._begun = None
            try:
                begun.go_on()
            except StopIteration as stop:
                self._message = None
                cast(Any, self._parser).message_consumed()
                if not stop.value.keep_alive or self._close:
                    return self.force_close()
                self._keepalive, due = True, self._loop.time() + VISITOR_KEEPALIVE
                self._next_keepalive_close_time = due
                if self._keepalive_handle is None:
                    self._keepalive_handle = self._loop.call_at(due, self._process_keepalive)
            except Exception as error:
                self.handle_error(None, 500, error)
                self.force_close()
            else:
                self._begun = begun
                if ended or begun.waits_for is None:
                    return self._hand_over()
                begun.waits_for.add_done_callback(self._go_on)

        def _hand_over(self) -> None:
            """Leave the rest of what has begun to aiohttp's task."""
            begun, waiter, self._begun = self._begun, self._waiter, None
            if begun:
                if begun.waits_for:
                    begun.waits_for.remove_done_callback(self._go_on)
                if waiter and waiter.done():  # the task has been cancelled
                    return begun.cancel()
                self._messages.append(self._message)
                self._rest, self._message = begun, None
                if waiter:
                    waiter.set_result(None)

        def _process_keepalive(self) -> None:
            self._hand_over()  # that it does not look idle
            super()._process_keepalive()

        def resume(self, request: web.BaseRequest) -> Awaitable[Any]:
            """Return what is left to be done for a request."""
            rest, self._rest = self._rest, None
            return rest or self.handle(handler(request), request.content)

        async def handle(self, handling: Awaitable[Any], content: aiohttp.StreamReader) -> Any:
            self._busy = True
            try:
                return await handling
            finally:
                self._busy = bool(self._messages) or not content.is_eof()
                self._line_bytes, self._line_ended = 0, False
                if not self._upgraded:
                    self._check_head()

        def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: Any = None) -> Any:
            reason = escape((str(message or exc).splitlines() or [type(exc).__name__])[0])
            gate.log(self.caller, f"bad request from {self.address}: {reason}")
            problem = "internal" if status == 500 else "bad-request"
            if "Too many headers" in str(message or exc):
                problem = "too-large"
            elif isinstance(exc, http_exceptions.LineTooLong):
                problem = "uri-too-long" if self._line_bytes > MAX_FIELD else "too-large"
            self._write_page(problem)
            return Delivered()

        def _end_head(self) -> None:
            self._head_bytes = 0
            if self._head_timer:
                self._head_timer.cancel()
                self._head_timer = None

        def _head_is_late(self) -> None:
            if self._head_bytes:
                self._refuse("request-timeout")
            else:
                self.force_close()

        def _refuse(self, problem: str) -> None:
            """Answer what is no request yet, and hang up as soon as the visitor can have read that."""
            self._write_page(problem)
            self._force_close = True  # aiohttp reads no more of it
            if self._waiter:
                self._waiter.cancel()
            if self.transport:
                self.transport.write_eof()
                self._loop.call_later(REFUSAL_LINGER, self.transport.abort)

        def _write_page(self, problem: str) -> None:
            if self.transport:
                encoder = ResponseEncoder(b"GET", http11=True, keep_alive=False)
                self.transport.write(gate.page(problem, "", encoder, fields or []))

    class VisitorServer(web.Server):
        def __call__(self) -> web.RequestHandler:
            return VisitorProtocol(self, loop=asyncio.get_running_loop(), **self._kwargs)

    return VisitorServer(
        lambda request: cast(VisitorProtocol, request.protocol).resume(request),
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


def find_crowded(kept: collections.Counter[str]) -> set[str]:
    """Return those who keep more bytes than their share, when all of them keep too much.

    Who keeps little is content, and leaves the rest of its share to others (max-min fairness).
    """
    most = kept.most_common()
    left = MAX_BUFFERED
    while most and most[-1][1] * len(most) <= left:
        left -= most.pop()[1]
    return {key for key, _ in most}


def _dialled(host: str | None, everywhere: str) -> str:
    """Return the host of a URL that reaches what listens on `host`; `everywhere` stands for all addresses."""
    if host in (None, "0.0.0.0", "::"):
        return everywhere
    return f"[{host}]" if ":" in host else host


@remembered
def _request_fields(
    fields: Fields, peer: str, scheme: str, host: bytes, trusted: bool, upgrade: bool, authorization: bool
) -> Fields:
    """Return a request's fields as they go into a tunnel."""
    headers = end_to_end(fields, keep_upgrade=upgrade)
    if not authorization:
        headers = [(name, value) for name, value in headers if name.lower() != b"authorization"]
    return Fields(forwarded(headers, peer, scheme, host, trusted=trusted))


class TunnelServer:
    """`pytunnel serve`: gives clients who know a token tunnels under names below this host.

    Good are the tokens with labels that `state` keeps, now or later, and `tokens`; without these, `default` in there.
    """

    def __init__(
        self,
        *,
        tokens: Iterable[str],
        state: Path,
        listen: Sequence[tuple[str | None, int]] = ((None, DEFAULT_PORT),),
        domain: Origin | None = None,
        certificates: Certificates | None = None,
        acme: Acme | None = None,
        hsts: float | None = None,
        trusted_proxies: Iterable[str] = (),
        grace: float = GRACE,
        hold: float = HOLD,
        max_body: float = math.inf,
        max_each: int = MAX_EACH,
        metrics_public: bool = False,
        tcp_ports: range = range(0),
        tcp_host: str | None = None,
    ) -> None:
        self._given = [Grant.from_token("given", token) for token in tokens]
        self._tokens = Tokens(state)
        self._default: list[Grant] = []  # the token that serve has made for itself
        self._fake_secret = secrets.token_bytes(32)
        self._state, self._grace, self._hold = state, grace, hold
        self._listen = listen  # hosts and ports; no host means all addresses
        self.ports: list[int] = []  # the real ones, in this order
        self.certificates = certificates  # with any, even none yet, visitors and clients have to use TLS
        self._domain = domain._replace(scheme="https") if domain and certificates else domain
        self._acme = acme  # which brings certificates; it takes a domain
        self._gate = Gate(
            each=max_each,
            total=max(1, min(MAX_VISITORS, file_limit() - RESERVED_FILES - 2 * len(tcp_ports))),
            trusted=[ipaddress.ip_network(cidr) for cidr in trusted_proxies],
        )
        if hsts is not None:
            self._gate.hsts = b"max-age=%d" % hsts
        self.metrics = self._gate.metrics
        self._max_body, self._metrics_public = max_body, metrics_public
        self._handshakes = self._exchanges = 0
        self._idle = asyncio.Event()
        self._crowded: set[str] = set()  # keys of tokens whose sessions keep too much
        self._tcp_ports, self._tcp_host = tcp_ports, tcp_host
        self._tcp_addresses: list[Address] = []
        self._tcp_listeners: dict[int, TcpListener] = {}  # by port
        self._tcp_visitors: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; `ports` are known then. Raises TunnelError when an address or the state cannot be had."""
        import zstandard  # noqa: F401 - it is missed here, where it is missing, and not in the middle of a response

        self._registry = TunnelRegistry(
            self._state / "names.json", grace=self._grace, hold=self._hold, tcp_ports=self._tcp_ports
        )
        if self._domain:
            self._registry.zones, self._registry.by_address = [self._domain.zone], False
        self._stamp = self._tokens.stamp()
        self._read_tokens()
        self._http = _visitor_server(
            lambda request: self._handle(request._message, request.content, request.protocol),  # public, but deprecated
            self._gate,
            begin=self._handle,
        )
        if self._acme:
            self._acme.load()
        self._listeners: list[asyncio.Server] = []
        for host, port in self._listen:
            try:
                loop = asyncio.get_running_loop()
                listener = await loop.create_server(self._protocol, host, port, backlog=VISITOR_BACKLOG)
            except OSError as error:
                self._stop_listening()
                where = f"{_dialled(host, '*')}:{port}"
                reason = os.strerror(error.errno or 0).lower()
                advice = "choose another with --listen"
                if error.errno == errno.EACCES:
                    advice += ", or see the README's systemd unit for how to have it without being root"
                raise TunnelError(f"cannot listen on {where}: {reason}; {advice}") from None
            self._listeners.append(listener)
            self.ports.append(listener.sockets[0].getsockname()[1])
        if self._tcp_ports:
            files, limit = 2 * len(self._tcp_ports), file_limit()
            if files > limit // 2:
                self._stop_listening()
                takes = f"{len(self._tcp_ports)} TCP ports take {files} of the {limit} files that may be open"
                raise TunnelError(f"{takes}, and leave too few for visitors; give fewer of them, or raise ulimit -n")
            try:
                self._tcp_addresses = await find_addresses(self._tcp_host)
            except OSError as error:
                self._stop_listening()
                unknown = isinstance(error, socket.gaierror)
                reason = "no such host" if unknown else os.strerror(error.errno or 0).lower()
                advice = "choose another HOST in --tcp-ports"
                raise TunnelError(f"cannot listen on {self._tcp_host or '*'}: {reason}; {advice}") from None
        for port in self._registry.open_ports:  # their clients are about to come back
            with contextlib.suppress(OSError):
                self._listen_tcp(port)
        self._watching = asyncio.ensure_future(self._watch())
        if self._acme:
            self._acme.start(self._secured_hosts)

    async def drain(self) -> None:
        """Take no new visitors or streams, send the clients away, and return when what runs has finished."""
        self._registry.drain()
        self._stop_listening()
        for session in self._registry.sessions.values():
            session.link.session.send_goaway(ErrorCode.SHUTDOWN, "the server is restarting")
            session.link.wake()
        while self._exchanges:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """End everything that is left, at once."""
        self._stop_listening()
        await end_tasks(self._watching)
        if self._acme:
            await self._acme.close()
        for session in list(self._registry.sessions.values()):
            self._registry.end(session, StreamReset(ErrorCode.LINK_LOST, "the server stops"))
            session.link.finish()
        await end_tasks(*self._tcp_visitors)
        await self._http.shutdown(0.2)

    @property
    def port(self) -> int:
        """The first one it listens on."""
        return self.ports[0]

    def _secured_hosts(self) -> list[str]:
        """Return the hosts that need a certificate: our own, which clients dial, and those of tunnels for HTTP."""
        assert self._domain
        registry = self._registry
        names = [name for name in registry.names if (session := registry.current(name)) and name not in session.ports]
        return [self._domain.zone, *(f"{name}.{self._domain.zone}" for name in names)]

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        for port in self._tcp_listeners.values():
            port.close()
        self._tcp_listeners.clear()

    def _protocol(self) -> asyncio.BaseProtocol:
        """Return what an accepted connection gets."""
        protocol = self._http()
        return SecureTransport(protocol, self.certificates, self.metrics) if self.certificates else protocol

    async def _watch(self) -> None:
        """See how late the event loop is, whether the sessions keep too much, and what has become of the files.

        Tokens that cannot be read are tried again, so that no revocation is missed.
        """
        loop, problem = asyncio.get_running_loop(), ""
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            self.metrics.observe_lag(max(0.0, loop.time() - due))
            kept = self._buffered()
            short = kept.total() > SHORT_OF_MEMORY
            for registration in self._registry.sessions.values():
                registration.link.session.is_short_of_memory = short
            before, self._crowded = self._crowded, find_crowded(kept)
            for key in self._crowded - before:
                label = self._registry.grants[key].label if key in self._registry.grants else "revoked"
                log.warning("token %s: its sessions keep too much, and get no new requests until that is less", label)
            if self.certificates:
                self.certificates.reload()
            self._close_ports()
            if (stamp := self._tokens.stamp()) != self._stamp:
                try:
                    self._read_tokens()
                    self._stamp, problem = stamp, ""
                except TunnelError as error:
                    if str(error) != problem:
                        log.warning("the tokens stay as they were: %s", error)
                    problem = str(error)

    def _read_tokens(self) -> None:
        """Take the tokens as the files are now. Raises TunnelError; those that could be read count all the same."""
        self._tokens.read()
        try:
            if not self._given:
                self._default = self._tokens.default_grant()
        finally:  # where `default` cannot be read, it stays as it was, and a revocation of another counts
            grants = [*self._given, *self._default, *self._tokens.labelled.values()]
            self._registry.admit(grants, self._tokens.revoked)

    def _buffered(self) -> collections.Counter[str]:
        """Return how much the sessions of each token keep."""
        kept: collections.Counter[str] = collections.Counter()
        for session in self._registry.sessions.values():
            kept[session.key] += session.link.session.buffered
        return +kept

    def _metrics_text(self) -> bytes:
        sessions = [session.link.session for session in self._registry.sessions.values()]
        gauges: dict[str, float] = {
            "pytunnel_sessions": len(sessions),
            "pytunnel_links": sum(session.connected for session in sessions),
            "pytunnel_streams": sum(session.streams for session in sessions),
            "pytunnel_visitors": self._gate.open,
            "pytunnel_buffered_bytes": self._buffered().total(),
            "pytunnel_tasks": len(asyncio.all_tasks()),
            "pytunnel_saved_bytes_total": self._registry.saved + sum(session.saved for session in sessions),
        }
        if self.certificates and self.certificates.names:
            gauges["pytunnel_certificate_seconds"] = self.certificates.expires - time.time()
        with contextlib.suppress(OSError):  # Linux
            gauges["process_open_fds"] = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            gauges["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        return self.metrics.text(gauges).encode()

    def _may_see_metrics(self, visitor: Visitor, host: str) -> bool:
        """Whether a request was made on this machine, and not by a front that forwards a stranger's."""
        claims = FORWARDED | {b"via"}
        forwards = not visitor.proxied and any(name.lower() in claims for name, _ in visitor.headers)
        with contextlib.suppress(ValueError):
            local = ipaddress.ip_address(visitor.address).is_loopback and not forwards
            return local and (host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback)
        return False

    # Requests

    async def _handle(
        self, message: RawRequestMessage, content: aiohttp.StreamReader, protocol: web.RequestHandler
    ) -> Any:
        visitor = Visitor(message, content, protocol, self._gate, keep_alive=not self._registry.draining)
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
        if visitor.unread and visitor.problem != "request-timeout":
            await visitor.discard()
        with contextlib.suppress(ConnectionError):
            await visitor.flush()  # else pages for who does not read them would pile up
        return Delivered(keep_alive=visitor.encoder.keep_alive)

    async def _route(self, visitor: Visitor) -> Any:
        if visitor.method in (b"CONNECT", b"TRACE"):
            visitor.encoder.keep_alive = False  # what follows a CONNECT may be meant for the other end of a tunnel
            raise Unserved("method")
        check_framing(visitor.headers, visitor.version)
        target, host_field = split_target(visitor.method, visitor.target, visitor.headers)
        if target is not visitor.target:  # absolute-form: what it says counts (RFC 9112 section 3.2.2)
            hosts = [(name, host_field if name.lower() == b"host" else value) for name, value in visitor.headers]
            visitor.target, visitor.headers = target, Fields(hosts)
        host, port = parse_host(host_field.decode("latin-1"))
        visitor.host = host
        name = self._registry.tunnel_name(host)
        if self._acme and (answer := self._acme.challenge(target.decode("latin-1"))):
            fields = [(b"Content-Type", b"application/octet-stream"), (b"Content-Length", b"%d" % len(answer))]
            head = visitor.encoder.head(ResponseHead(200, b"OK", fields), _date())
            visitor.write(head + visitor.encoder.data(answer))
        elif self.certificates and self._must_redirect(visitor, name, host, target):
            self._redirect(visitor, host, port, target)
        elif name is not None:
            await self._forward(visitor, name, host_field)
        elif target == LINK_PATH.encode():
            return await self._serve_link(visitor)
        elif target == b"/metrics" and (self._metrics_public or self._may_see_metrics(visitor, host)):
            text = self._metrics_text()
            fields = [(b"Content-Type", b"text/plain; version=0.0.4"), (b"Content-Length", b"%d" % len(text))]
            head = visitor.encoder.head(ResponseHead(200, b"OK", fields), _date())
            visitor.write(head + visitor.encoder.data(text))
        elif target == b"/healthz":
            visitor.write(visitor.encoder.head(HEALTHY, _date()) + visitor.encoder.data(b"ok\n"))
        else:
            raise Unserved("unknown-tunnel")
        return None

    def _must_redirect(self, visitor: Visitor, name: str | None, host: str, target: bytes) -> bool:
        """Whether a request should have come over TLS: a front's need not, nor those about the server's health."""
        if visitor.scheme == "https" or self._gate.is_trusted(visitor.peer):
            return False
        health = target == b"/healthz" or (target == b"/metrics" and self._may_see_metrics(visitor, host))
        return name is not None or not health

    def _redirect(self, visitor: Visitor, host: str, port: int | None, target: bytes) -> None:
        """Send a visitor to the same place over TLS: on the port that was asked for, as each takes both.

        That need not be ours: who runs the server may have another one led here. Port 80, which goes without saying,
        becomes that of the domain.
        """
        if port in (None, 80):
            port = self._domain.port if self._domain else None
        where = host.encode() + (b"" if port in (None, 443) else b":%d" % port)
        location = b"https://%b%b" % (where, target if target.startswith(b"/") else b"/")
        visitor.encoder.keep_alive = False
        fields = [(b"Location", location), (b"Content-Length", b"0")]
        self.metrics[RESPONSES_TOTAL[3]] += 1
        visitor.write(visitor.encoder.head(ResponseHead(308, b"Permanent Redirect", fields), _date()))

    async def _forward(self, visitor: Visitor, name: str, host: bytes) -> None:
        if self._registry.draining:
            raise Unserved("shutting-down")
        expects = field_values(visitor.headers, b"expect") if "Expect" in visitor.fields else ()
        if any(value.lower() != b"100-continue" for value in expects):
            raise Unserved("expectation")
        if b"h2c" in visitor.upgrade:
            visitor.upgrade = b""
        if visitor.upgrade and visitor.has_body:
            raise Unserved("bad-request")
        visitor.max_body = self._max_body
        if visitor.has_body and int(b"".join(field_values(visitor.headers, b"content-length")) or 0) > self._max_body:
            raise Unserved("content-too-large")
        arrived = time.monotonic()
        self._check_load(visitor, arrived)
        kind = Kind.UPGRADE if visitor.upgrade else Kind.HTTP
        end = not (visitor.upgrade or visitor.has_body)
        self._exchanges += 1
        visitor.caller.open += visitor.proxied
        try:
            session = await self._find(visitor, name)
            if name in session.ports:
                raise Unserved("not-http")
            head = self._request_head(visitor, host, session.access.get(name, EVERYBODY))
            tunnel, waited = session.names.index(name), time.monotonic() - arrived
            if session.key in self._crowded:
                raise Unserved("server-full")
            self._registry.begin_request(session.key)
            try:
                stream = session.link.open(tunnel, kind, head, end=end, waited=waited)
                try:
                    await visitor.relay(stream)
                finally:
                    stream.close()
            finally:
                self._registry.end_request(session.key)
        except (asyncio.CancelledError, ConnectionError):
            if not visitor.switched:  # a WebSocket that ends is none that was aborted
                self.metrics["pytunnel_aborts_total"] += 1
                visitor.caller.aborts.take(time.monotonic())
            raise
        finally:
            visitor.caller.open -= visitor.proxied
            self._exchanges -= 1
            self._idle.set()

    def _check_load(self, visitor: Visitor | TcpVisitor, now: float) -> None:
        """Raise Unserved when the visitor's address has too much open."""
        caller, problem = visitor.caller, ""
        if not caller.aborts.left(now):
            problem = f"it aborted {MAX_ABORTS} requests"
        elif visitor.proxied and caller.open >= self._gate.each:
            problem = f"it has {caller.open} open"
        if problem:
            self._gate.log(caller, f"refused a request from {visitor.address}: {problem}")
            raise Unserved("too-many-requests")

    async def _find(self, visitor: Visitor | TcpVisitor, name: str) -> Registration:
        """Return the session that serves a tunnel, once it is clear that it lets this visitor in. Raises Unserved."""
        before = self._registry.current(name)
        if before:  # so that no stranger takes up the room of those who wait for its client
            self._check_access(visitor, before, name)
            if before.link.session.accepts_streams:
                return before
        session = await self._registry.find(name)
        if session is not before:  # its client may have started again with other rules
            self._check_access(visitor, session, name)
        return session

    def _check_access(self, visitor: Visitor | TcpVisitor, session: Registration, name: str) -> None:
        """Check that a tunnel lets this visitor in. Raises Unserved."""
        access = session.access.get(name, EVERYBODY)
        if not access.allows(visitor.address):
            front = not visitor.proxied and field_values(visitor.headers, b"x-forwarded-for")
            hint = "; it forwards for others: is it a --trusted-proxy?" if front else ""
            self._gate.log(visitor.caller, f"{visitor.address} is not allowed for {name}{hint}")
            raise Unserved("not-allowed")
        if access.digests:
            credentials = basic_credentials(visitor.headers)
            if credentials is None:
                raise Unserved("unauthorized")
            now, caller = time.monotonic(), visitor.caller
            guesses = caller.guesses(f"the password of {name}", now)
            if not guesses.left(now):  # whether it is right is what a guesser wants to know
                raise Unserved("too-many-requests")
            if not access.accepts(credentials):
                guesses.take(now)
                self._gate.log(caller, f"a wrong password from {visitor.address} for {name}")
                raise Unserved("unauthorized")

    def _request_head(self, visitor: Visitor, host: bytes, access: Access) -> RequestHead:
        peer, trusted, upgrade = visitor.peer, self._gate.is_trusted(visitor.peer), bool(visitor.upgrade)
        headers, takes = visitor.headers, access.takes_authorization
        fields = _request_fields(headers, peer, visitor.scheme, host, trusted, upgrade, takes)
        return RequestHead(visitor.method, visitor.target, fields)

    # Connections to TCP tunnels

    def _open_ports(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Listen for these tunnels, each on the port it wants or on one that is chosen, and return those.

        Raises Refused. What has been opened in vain is for `_close_ports`.
        """
        ports: dict[str, int] = {}
        for name, port in wanted.items():
            problem = ""
            for chosen in self._registry.ports_for(name, port, ports.values()):
                try:
                    self._listen_tcp(chosen)
                except OSError as error:
                    problem = f"the server cannot listen on port {chosen}: {os.strerror(error.errno or 0).lower()}"
                    if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                        break
                else:
                    ports[name] = chosen
                    break
            if name not in ports:
                raise Refused("port", problem + ("; choose another --remote-port" if port else ""))
        return ports

    def _listen_tcp(self, port: int) -> None:
        if port not in self._tcp_listeners:
            serve = functools.partial(self._on_tcp_visitor, port)
            self._tcp_listeners[port] = TcpListener(self._tcp_addresses, port, lambda: TcpVisitor(self._gate, serve))

    def _close_ports(self) -> None:
        """Close those that no tunnel needs any more."""
        for port in self._tcp_listeners.keys() - self._registry.open_ports:
            self._tcp_listeners.pop(port).close()

    def _on_tcp_visitor(self, port: int, visitor: TcpVisitor) -> None:
        task = asyncio.ensure_future(self._serve_tcp(self._registry.tunnel_at(port), visitor))
        visitor.on_lost = task.cancel  # until its stream is there, where that is seen
        self._tcp_visitors.add(task)
        task.add_done_callback(self._tcp_visitors.discard)

    async def _serve_tcp(self, name: str, visitor: TcpVisitor) -> None:
        """Move a visitor's bytes to a tunnel and back; what cannot be served, or does not end well, is reset."""
        arrived, metrics = time.monotonic(), self.metrics
        self._exchanges += 1
        try:
            self._check_load(visitor, arrived)
            session = await self._find(visitor, name)
            if name not in session.ports:  # it is for HTTP now
                raise Unserved("unknown-tunnel")
            if session.key in self._crowded:
                raise Unserved("server-full")
            tunnel, waited = session.names.index(name), time.monotonic() - arrived
            head = RequestHead(b"TCP", visitor.peer.encode(), [])
            opening = functools.partial(session.link.open, tunnel, Kind.TCP, head, end=False, waited=waited)
            with self._registry.tcp_stream(session), contextlib.closing(opening()) as stream:
                visitor.on_lost = lambda: None
                try:
                    await pipe(
                        visitor,
                        stream,
                        receive=lambda data: metrics.update(pytunnel_sent_bytes_total=len(data)),
                        send=lambda data: metrics.update(pytunnel_received_bytes_total=len(data)),
                    )
                except ConnectionError:  # what came before that still counts
                    stream.abort(ErrorCode.NO_ERROR, "the visitor went away", flush=True)
                    asyncio.get_running_loop().call_later(LINGER, stream.cancel)
                    metrics["pytunnel_aborts_total"] += 1
                    visitor.caller.aborts.take(time.monotonic())
        except Unserved as error:
            self._refuse(name, visitor, str(error))
        except StreamReset as error:
            if error.code is ErrorCode.REFUSED:
                self._refuse(name, visitor, "busy")  # of others the client has a line
        except Exception:
            log.exception("a connection failed")
        finally:
            visitor.reset()
            self._exchanges -= 1
            self._idle.set()

    def _refuse(self, name: str, visitor: TcpVisitor, problem: str) -> None:
        self.metrics[f'pytunnel_refusals_total{{reason="{problem}"}}'] += 1
        if problem in ("busy", "server-full"):  # others have a line
            self._gate.log(visitor.caller, f"refused a connection from {visitor.address} to {name}: {problem}")

    # Links

    async def _serve_link(self, visitor: Visitor) -> None:
        caller, fields = visitor.caller, visitor.fields
        if "Origin" in fields:
            raise Unserved("forbidden")
        offered = [name.strip() for name in fields.get("Sec-WebSocket-Protocol", "").split(",")]
        keys = field_values(visitor.headers, b"sec-websocket-key")
        upgrades = visitor.method == b"GET" and visitor.upgrade == b"websocket" and len(keys) == 1
        if not upgrades or SUBPROTOCOL not in offered or fields.get("Sec-WebSocket-Version") != "13":
            raise Unserved("not-a-link")
        if self._registry.draining:
            raise Unserved("shutting-down")
        if self._handshakes >= MAX_HANDSHAKES:
            raise Unserved("server-full")
        if caller.handshakes >= MAX_HANDSHAKES_EACH:
            raise Unserved("too-many-requests")
        transport, protocol = visitor.transport, visitor.protocol
        assert transport
        accept = [(b"Sec-WebSocket-Accept", accept_key(keys[0])), (b"Sec-WebSocket-Protocol", SUBPROTOCOL.encode())]
        switch = ResponseHead(101, b"Switching Protocols", [(b"Upgrade", b"websocket"), *accept])
        visitor.write(visitor.encoder.head(switch, b""))
        ws = WebSocket(transport, protocol, is_server=True)
        self._handshakes += 1
        caller.handshakes += 1
        result = "broken"
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                hello, key, signature = await self._handshake(ws, caller)
            origin = self._domain or Origin.from_url(hello.get("server", str))
            self._registry.learn_zone(origin.zone, key)
            session, received = await self._session_for(hello, key)
            host = f"tcp://{self._domain.zone}" if self._domain else hello.get("server", str)
            urls = {name: tcp_url(host, port) for name, port in session.ports.items()}
            result = "ready"
            protocol.uncount()
        except (Refused, ProtocolError, MessageError) as error:
            self._gate.log(caller, f"refused a link from {visitor.address}: {escape(str(error))}")
            code, retry = (error.code, error.retry) if isinstance(error, Refused) else ("protocol", False)
            result = code
            ws.send_message(encode_message("refused", code=code, reason=str(error), retry=retry))
            return await self._close(ws)
        except (TimeoutError, ConnectionError):
            return transport.abort()
        finally:
            self._handshakes -= 1
            caller.handshakes -= 1
            self.metrics[f'pytunnel_handshakes_total{{result="{result}"}}'] += 1
        resumed = session.id == hello.get("session", str, "")
        self.metrics["pytunnel_resumes_total"] += resumed
        ready = encode_message(
            "ready",
            signature=base64.b64encode(signature).decode(),
            session=session.id,
            resumed=resumed,
            received=session.link.session.received,
            compress=session.link.session.compress,
            tunnels=[{"name": name, "url": urls.get(name) or origin.url(name)} for name in session.names],
            window=INITIAL_WINDOW,
            streams=MAX_STREAMS,
            enforced=ENFORCED,
            agent=f"pytunnel/{__version__}",
        )
        if not session.names:  # it only wanted to know whether its token is good
            self._registry.end(session, StreamReset(ErrorCode.LINK_LOST))
            ws.send_message(ready)
            return await self._close(ws)
        grant = self._registry.grants.get(key)
        who = f"{visitor.address}, token {grant.label if grant else 'revoked'}"
        await self._run_link(ws, session, ready, received, who)

    @staticmethod
    async def _close(ws: WebSocket) -> None:
        """Close a link after its handshake."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD):
                await ws.close()
        ws.transport.close()

    async def _run_link(
        self,
        ws: WebSocket,
        session: Registration,
        ready: str,
        received: int,
        who: str,
    ) -> None:
        """Serve a client until its link is lost; the session is suspended or ended then."""
        reason, names = CLOSED, ", ".join(session.names)
        try:
            ws.send_message(ready)
            self._registry.connected(session)
            log.info("%s: connected%s (%s)", names, " again" * bool(received), who)
            reason = await session.link.run(ws, received)
        except ProtocolError:
            pass
        finally:
            if session.link.broken:
                reason = f"refused: {session.link.broken}"
                self._registry.end(session, StreamReset(ErrorCode.LINK_LOST, reason))
            self._registry.disconnected(session)
            if reason == "finished":
                await self._close(ws)
            ws.transport.abort()
            stopped = session.link.session.goaway and session.link.session.goaway[0] is ErrorCode.NO_ERROR
            log.info("%s: %s (%s)", names, "its client stopped" if stopped else escape(reason), who)

    async def _handshake(self, ws: WebSocket, caller: Caller) -> tuple[Message, str, bytes]:
        """Return hello, key and our signature, once the client has proved that it knows the token."""
        hello = await ws.receive_message()
        if hello.get("version", int) != PROTOCOL_VERSION:
            raise Refused("version", f"this server (pytunnel {__version__}) speaks version {PROTOCOL_VERSION} only")
        key = hello.get("key", str)
        grant, seed = self._registry.grants.get(key), _digest(self._fake_secret, key.encode())
        # A token that has been shown from there goes on working whatever somebody else there does. Of any other, even
        # whether it would be good is what a guesser wants to know.
        now = time.monotonic()
        guesses = caller.guesses(key if key in caller.proved else "", now)
        if not guesses.left(now):
            raise Refused("throttled", "too many wrong tokens came from this address; it has to wait", retry=True)
        # What accepts nothing stands in for an unknown key, which looks like a wrong token then.
        verifier = grant.verifier if grant else Verifier(seed[:16], ITERATIONS, seed, seed)
        challenge = encode_message(
            "challenge",
            nonce=hello.get("nonce", str) + secrets.token_urlsafe(18),
            salt=base64.b64encode(verifier.salt).decode(),
            iterations=verifier.iterations,
        )
        ws.send_message(challenge)
        proof = (await ws.receive_message()).bytes("proof")
        auth_message = f"{hello.text}\n{challenge}".encode()
        if not verifier.accepts(proof, auth_message):
            guesses.take(now)
            raise Refused("token", UNKNOWN_TOKEN)
        caller.proved.add(key)
        return hello, key, verifier.signature(auth_message)

    async def _session_for(self, hello: Message, key: str) -> tuple[Registration, int]:
        """Return the session that a hello asks for, and how many of its frames the client has received."""
        previous = hello.get("session", str, "")
        if previous in self._registry.replaced.get(key, ()):
            raise Refused("replaced", "another client with the same token has taken the name since")
        access = {name: Access.decode(rules) for name, rules in hello.members("access")}
        session = self._registry.sessions.get(previous)
        if session and session.key == key and session.access == access:
            await session.link.detach("its client came back on another connection")
            received = hello.number("received", 0, 2**63)
            if session.id in self._registry.sessions and session.link.session.may_resume(received):
                return session, received
        names = [check_name(str(name)) for name in hello.get("tunnels", list)]
        if len(names) > MAX_TUNNELS or len(set(names)) != len(names) or not access.keys() <= set(names):
            raise ProtocolError(f"{len(names)} tunnels, allowed are {MAX_TUNNELS} with different names")
        tcp = hello.numbers("tcp", 65535)
        if not tcp.keys() <= set(names) or any(name in tcp and access[name].digests for name in access):
            raise ProtocolError("a TCP tunnel that is none of the tunnels, or has passwords")
        state = Session(
            is_server=True,
            send_window=hello.number("window", 1, MAX_WINDOW, INITIAL_WINDOW),
            receive_window=INITIAL_WINDOW,  # as ready will say
            max_streams=min(MAX_STREAMS, hello.number("streams", 1, MAX_WINDOW, MAX_STREAMS)),
            compress=hello.get("compress", bool, False),
        )
        if self._registry.draining:
            raise Refused("shutting-down", "the server is restarting", retry=True)
        # Nothing waits from here on: what is checked holds until the session has its names and ports, all or none.
        self._registry.claim(key, names)
        try:
            ports = self._open_ports(tcp)
            self._registry.keep_ports(ports)
            session = Registration(key, names, state, access, ports)
            self._registry.bind(session, previous)
        finally:
            self._close_ports()
        if self._acme:
            self._acme.wake()
        return session, 0


# ---- Local service --------------------------------------------------------------------------------------------------
# Where a tunnel leads on this machine, and connections to it. Only what the user named is ever dialled.


_UNKNOWN_ISSUER = (18, 19, 20, 21)  # OpenSSL's codes for a certificate whose issuer, itself or another, is not known


def _describe(error: BaseException | None) -> str:
    """Return an exception as a few words for a user."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if status := getattr(error, "status", None):  # of aiohttp's WSServerHandshakeError
        return f"the answer was HTTP status {status}"
    error = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error  # aiohttp wraps them
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = "; SSL_CERT_FILE=ca.pem in front trusts an authority of your own"
        is_unknown = error.verify_code in _UNKNOWN_ISSUER
        return f"its certificate is not trusted ({error.verify_message}){advice * is_unknown}"
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
    folder: bool = False  # `host` is its path
    tcp: bool = False  # it need not speak HTTP

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `3000`, `host:port`, `http://…`, `https://…`, `tcp:…`, `unix:/path` or a folder. Raises UsageError."""
        if text.startswith((".", "/", "~")) or (not text.isdecimal() and os.path.isdir(text)):
            path = os.path.abspath(os.path.expanduser(text))
            if not os.path.isdir(path):
                raise UsageError(f"there is no folder {escape(path)}")
            return cls(path, path, 0, folder=True)
        if text.startswith("unix:/"):
            return cls(text, text.removeprefix("unix:"), 0)
        scheme, separator, rest = text.partition("://")
        if tcp := text.startswith("tcp:"):
            scheme, separator, rest = "tcp", "", text.removeprefix("tcp:").removeprefix("//")
        elif not separator:
            scheme, rest = "http", text
        if re.fullmatch(r"[0-9]{1,5}", rest) and not separator:
            rest = f"localhost:{rest}"
        try:
            host, port = parse_host(rest.removesuffix("/"))
        except MessageError:
            host, port = "", None
        if scheme not in ("http", "https", "tcp") or not host or port == 0 or not (port or separator):
            if re.fullmatch(r"(tcp:)?0*([0-9]{1,9})", text):
                raise UsageError(f"{text} is not a target: a port is within 1 to 65535")
            forms = "a port like 3000, host:port, http:// or https://host:port, tcp:22, unix:/path or a folder (./dist)"
            raise UsageError(f"{escape(text)!r} is not a target: give {forms}")
        return cls(text, host.strip("[]"), port or DEFAULT_PORTS[scheme], scheme == "https", tcp=tcp)

    @property
    def authority(self) -> str:
        """What a client that dials it writes into Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host if self.port else "localhost"
        default = self.port in (0, DEFAULT_PORTS["https" if self.tls else "http"])
        return host if default else f"{host}:{self.port}"

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


class Edits(NamedTuple):
    """What changes in the fields of a head: those in `put` replace others of their name, those in `drop` go."""

    put: Headers = []  # noqa: RUF012
    drop: frozenset[bytes] = frozenset()  # in lower case

    @classmethod
    def parse(cls, put: Iterable[str], drop: Iterable[str]) -> Edits:
        """Read `Name: value` lines, and names. Raises UsageError."""
        fields: list[tuple[bytes, bytes]] = []
        for line in put:
            name, colon, value = line.partition(":")
            fields.append((os.fsencode(name.strip()), os.fsencode(value.strip())))
            if not colon:
                raise UsageError(f"{escape(line)!r} is not a header field: write it like 'Name: value'")
        names = [os.fsencode(name.strip()) for name in drop]
        every = [*fields, *((name, b"") for name in names)]
        if len(every) > MAX_FIELDS:
            raise UsageError(f"{len(every)} header fields are too many, at most {MAX_FIELDS} go into a head")
        for known, text in every:
            if not FIELD.fullmatch(known + b"\0" + text):
                raise UsageError("a header field's name or value has characters that may not be there")
            if known.lower() in FRAMING | HOP_BY_HOP:
                raise UsageError(f"{escape(known)} belongs to the connection; it is made anew on each side")
        return cls(fields, frozenset(name.lower() for name in names))

    def apply(self, headers: Headers) -> Headers:
        """Return the fields as they go on."""
        if not (self.put or self.drop):
            return headers
        drop = self.drop.union(name.lower() for name, _ in self.put)
        return [*self.put, *(pair for pair in headers if pair[0].lower() not in drop)]


class LocalService:
    """Connections to one target, kept for the next request while they are fresh."""

    def __init__(self, target: Target, *, insecure: bool) -> None:
        self.target = target
        self._idle: list[Connection] = []
        self._pruning: asyncio.TimerHandle | None = None
        self._address = target.addresses[0]
        self._tls: ssl.SSLContext | None = None
        if target.tls:
            self._tls = ssl.create_default_context()
            if insecure or target.is_loopback:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE

    def take_idle(self) -> Connection | None:
        """Return a connection that was used before, the freshest one, if there is any."""
        oldest = asyncio.get_running_loop().time() - LOCAL_IDLE
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since >= oldest:
                connection.idle_since = 0.0
                return connection
            connection.abort()
        return None

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose response is complete."""
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if len(self._idle) > MAX_LOCAL_IDLE:
            self._idle.pop(0).abort()
        if self._pruning is None:
            self._pruning = loop.call_later(LOCAL_IDLE, self._prune)

    def _prune(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since <= loop.time() - LOCAL_IDLE:
            self._idle.pop(0).abort()
        self._pruning = loop.call_at(self._idle[0].idle_since + LOCAL_IDLE, self._prune) if self._idle else None

    async def connect(self) -> Connection:
        """Return a new connection. Raises StreamReset with the code for the visitor."""
        loop, target, tls, error = asyncio.get_running_loop(), self.target, self._tls, None
        name = target.host if tls else None
        for address in sorted(target.addresses, key=lambda address: address != self._address):
            if target.port:
                dial = loop.create_connection(Connection, address, target.port, ssl=tls, server_hostname=name)
            else:
                dial = loop.create_unix_connection(Connection, address)
            try:
                async with asyncio.timeout(LOCAL_CONNECT_TIMEOUT):
                    _, connection = await dial
            except TimeoutError:
                kind = "TLS connection" if tls else "connection"
                reason = f"no {kind} to {target.text} within {LOCAL_CONNECT_TIMEOUT:g} s"
                raise StreamReset(ErrorCode.LOCAL_TIMEOUT, reason) from None
            except OSError as failure:
                error = error or failure
            else:
                self._address = address
                return connection
        raise StreamReset(ErrorCode.LOCAL_REFUSED, f"cannot connect to {target.text}: {_describe(error)}")

    def close(self) -> None:
        if self._pruning:
            self._pruning.cancel()
        while self._idle:
            self._idle.pop().abort()


# ---- Forwarding -----------------------------------------------------------------------------------------------------
# One exchange from its stream to the local service and back. HTTP/1.1 is spoken here and not by a client library:
# those are no relays, they merge, drop and re-quote.


class Route(NamedTuple):
    """Where the requests of a tunnel below `prefix` go, and what changes in their heads and in those of responses."""

    prefix: str
    service: LocalService
    request: Edits
    response: Edits

    def takes(self, path: str) -> bool:
        """Whether a path is the prefix, or below it; "" takes all."""
        return not self.prefix or (path.startswith(self.prefix) and path[len(self.prefix) :][:1] in ("", "/", "?"))


class Replay:
    """Stands in for the stream when a recorded request is sent again: nobody gets the answer, but the log has it."""

    kind, finished, is_cancelled, problem, room = Kind.HTTP, False, False, "", READ_BUFFER

    def __init__(self, content: bytes) -> None:
        self.has_content = bool(content)
        self._chunks = [content] if content else []

    async def read(self) -> bytes:
        return self._chunks.pop() if self._chunks else b""

    def write_head(
        self, payload: bytes, *, interim: bool = False, end: bool = False, compress: bool = False
    ) -> None: ...
    def send(self, data: bytes, *, end: bool = False) -> None: ...
    async def drain(self) -> None: ...
    async def write(self, data: bytes, *, end: bool = False) -> None: ...
    def abort(self, code: ErrorCode, reason: str = "", *, flush: bool = False) -> None: ...


class TcpForwarding:
    """A connection of a TCP tunnel's visitor, from its stream to the local service."""

    def __init__(self, stream: Stream, service: LocalService, exchange: Exchange, log: ExchangeLog) -> None:
        self._stream, self._service, self._exchange, self._log = stream, service, exchange, log
        self._time = asyncio.get_running_loop().time

    def start(self, on_answer: Callable[[], object]) -> bool:
        """As Forwarding's; there is nothing to send at once."""
        return False

    def answer(self) -> bool:
        """As Forwarding's, which nobody calls."""
        return False

    async def run(self) -> None:
        """Carry it to its end. Raises StreamReset when that is none in good order."""
        if self._stream.is_cancelled:  # in the message that opened it
            raise asyncio.CancelledError
        connection = await self._service.connect()
        connection.guard()
        exchange, head = self._exchange, ResponseHead(101, b"", [])
        exchange.answered = self._time()
        try:
            payload = head.encode()
            self._log.respond(exchange, head, payload)
            self._stream.write_head(payload)
        except BaseException:
            connection.reset()
            raise
        try:
            await pipe(
                connection,
                self._stream,
                receive=lambda data: self._log.receive(exchange, data, self._time()),
                send=lambda data: self._log.send(exchange, data, self._time()),
            )
        except ConnectionError as error:
            raise StreamReset(ErrorCode.LOCAL_RESET, f"{self._service.target.text}: {_describe(error)}") from None


class Forwarding:
    def __init__(
        self, stream: Stream | Replay, route: Route, head: RequestHead, exchange: Exchange, log: ExchangeLog
    ) -> None:
        self._stream, self._service, self._exchange, self._log = stream, route.service, exchange, log
        self._head = RequestHead(head.method, head.target, route.request.apply(head.headers))
        self._edits = route.response
        self._time = asyncio.get_running_loop().time
        self._parser = ResponseParser(head.method)
        self._has_body = stream.has_content and stream.kind is Kind.HTTP
        self._chunked = self._has_body and not field_values(head.headers, b"content-length")
        self._idle: Connection | None = None  # one that was used before, on which the request has gone out
        self._failure: Exception | None = None  # for `run` to raise

    def start(self, on_answer: Callable[[], object]) -> bool:
        """Send the request at once where a connection waits for it; whether `on_answer` will be called for `answer`."""
        safe = self._head.method in (b"GET", b"HEAD", b"OPTIONS") and not self._has_body
        if safe and self._stream.kind is Kind.HTTP and (connection := self._service.take_idle()):
            connection.send(self._wire_head())
            connection.watch(self._stream.room, on_answer)
            self._idle = connection
        return self._idle is not None

    def answer(self) -> bool:
        """Pass on what has come; whether that was all, as it mostly is. Else `run` goes on, or fails for both."""
        connection = cast(Connection, self._idle)
        if not (data := connection.take()):
            return False
        try:
            self._pass_on(data)
        except Exception as error:
            self._failure = error
            return False
        if self._parser.done and not self._give_back(connection):
            connection.abort()
        return self._parser.done

    async def run(self) -> None:
        """Carry the exchange to its end. Raises StreamReset when it has none."""
        if self._idle:
            try:
                return await self._attempt(self._idle)
            except StreamReset:
                if self._exchange.answered is not None:
                    raise
            # It closed the idle connection just as the request went out. Nothing was answered, and the method is safe
            # (RFC 9110 section 9.2.2): once more. Other methods never use a connection that may be about to close.
        if self._stream.is_cancelled:  # in the message that opened it
            raise asyncio.CancelledError
        connection = await self._service.connect()
        connection.send(self._wire_head())
        await self._attempt(connection)

    def _wire_head(self) -> bytes:
        return self._head.to_wire(chunked=self._chunked, upgrade=self._stream.kind is Kind.UPGRADE)

    async def _attempt(self, connection: Connection) -> None:
        """Carry on once the head has been sent."""
        upload, kept = None, False
        try:
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
            kept = (upload is None or (upload.done() and upload.result())) and self._give_back(connection)
        except ConnectionError as error:
            raise StreamReset(ErrorCode.LOCAL_RESET, f"{self._service.target.text}: {_describe(error)}") from None
        except MessageError as error:
            raise StreamReset(ErrorCode.LOCAL_INVALID, f"{self._service.target.text}: {error}") from None
        finally:
            if not kept:
                connection.abort()  # first, because the wait below may be cancelled
            if upload:
                await end_tasks(upload)

    def _give_back(self, connection: Connection) -> bool:
        """Keep a connection for others, if it can be used again."""
        kept = self._parser.keep_alive and connection.reusable
        if kept:
            self._service.give_back(connection)
        return kept

    async def _respond(self, connection: Connection) -> None:
        if self._failure:
            raise self._failure
        while not self._parser.done:
            await self._stream.drain()
            self._pass_on(await connection.read(self._stream.room))

    def _pass_on(self, data: bytes) -> None:
        """Send what the next bytes of the local service, or with none their end, make of the response."""
        parser, events = self._parser, []
        if data:
            if self._exchange.answered is None:
                self._exchange.answered = self._time()
            events = parser.receive_data(data)
        else:
            parser.receive_eof()
        for event in events:
            if isinstance(event, ResponseHead):
                self._write_head(event, end=parser.done and event is events[-1])
        if parser.head and parser.head.status != 101:
            body = b"".join([event for event in events if isinstance(event, bytes)])
            try:
                if not self._stream.finished and (body or parser.done):
                    self._stream.send(body, end=parser.done)
            finally:
                self._log.send(self._exchange, body, self._time())

    def _write_head(self, head: ResponseHead, *, end: bool) -> None:
        if head.status == 101:
            self._check_switch(head)
        if (headers := self._edits.apply(head.headers)) is not head.headers:
            head = ResponseHead(head.status, head.reason, headers)
        payload = head.encode()
        if not head.interim:
            self._log.respond(self._exchange, head, payload)
        end = end and head.status != 101
        # What follows a 101 goes as it is: messages are small, often deflated, and no business of ours.
        compress = not end and head.status >= 200 and compressible(head.headers)
        self._stream.write_head(payload, interim=head.interim, end=end, compress=compress)

    def _check_switch(self, head: ResponseHead) -> None:
        if self._stream.kind is not Kind.UPGRADE:
            raise MessageError("101 without an Upgrade", 502)
        keys = field_values(self._head.headers, b"sec-websocket-key")
        if field_values(head.headers, b"sec-websocket-accept") != list(map(accept_key, keys)):
            raise MessageError("101 with a Sec-WebSocket-Accept that is not the key's", 502)

    async def _upload(self, connection: Connection, *, chunked: bool) -> bool:
        """Send the request's content, or a pipe's bytes; True says that all of it went out."""
        try:
            while data := await self._stream.read():
                self._log.receive(self._exchange, data, self._time())
                await connection.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if chunked:
                await connection.write(b"0\r\n\r\n")
            return True
        except (ConnectionError, StreamReset):
            return False  # the response, or its absence, tells the rest

    async def _finish_upload(self, connection: Connection, upload: asyncio.Future[bool], status: int) -> None:
        """The response came early. The service may still want the rest; after an error it has LINGER seconds for it."""
        closed: asyncio.Future[bool] = asyncio.ensure_future(connection.closed.wait())
        try:
            timeout = LINGER if status >= 400 else None
            await asyncio.wait([upload, closed], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()

    async def _pipe(self, connection: Connection) -> None:
        """Move the local service's bytes after a 101, whatever they are, until it ends."""
        data = self._parser.excess
        while data or (data := await connection.read(self._stream.room)):
            self._log.send(self._exchange, data, self._time())
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
    """What one tunnel of this client is called and leads to; `host` is `rewrite`, a fixed Host, or nothing."""

    name: str
    target: Target
    routes: tuple[tuple[str, Target], ...] = ()  # other local services for the paths below a prefix
    host: str = ""
    request: Edits = Edits()
    response: Edits = Edits()
    insecure: bool = False  # do not verify the certificate of a service that is not on this machine
    spa: bool = False  # of a folder: its index.html for paths that are no file
    access: Access = EVERYBODY  # whom the server lets in
    port: int = 0  # of a TCP tunnel: the one on the server that it wants; 0: any

    @property
    def targets(self) -> list[Target]:
        return [self.target, *(target for _, target in self.routes)]

    def open(self) -> list[Route]:
        """Return the routes with their local services, the longest prefix first."""
        routes = []
        for prefix, target in sorted([*self.routes, ("", self.target)], key=lambda route: -len(route[0])):
            host = target.authority if self.host == "rewrite" else self.host
            put = [(b"Host", host.encode()), *self.request.put] if host else self.request.put
            request = Edits(put, self.request.drop)
            routes.append(Route(prefix, LocalService(target, insecure=self.insecure), request, self.response))
        return routes


def all_targets(tunnels: Iterable[Tunnel]) -> Iterator[Target]:
    """Return the local services of all these tunnels."""
    return itertools.chain.from_iterable(tunnel.targets for tunnel in tunnels)


REFUSED_HOST = re.compile(  # what development servers answer to a Host they do not know
    rb"Blocked request\. This host|Invalid Host header|Blocked hosts?:|DisallowedHost|Invalid HTTP_HOST header"
)


class TunnelClient:
    """`pytunnel connect`: one session with a server, and the local services behind its tunnels."""

    def __init__(
        self,
        server: str,
        token: str,
        tunnels: list[Tunnel],
        *,
        max_retries: int | None = None,
        compress: bool = True,
        on_event: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self.server, self.tunnels = server, tunnels
        self.urls: list[str] = []
        self.log = ExchangeLog()
        self.problem = "connecting"  # why there is no link; "" while there is one
        self.retry_at: float | None = None  # when the next dial is, in the event loop's time
        self._token, self._on_event, self._max_retries, self._compress = token, on_event, max_retries, compress
        self._access = {tunnel.name: tunnel.access.encode() for tunnel in tunnels if tunnel.access != EVERYBODY}
        if len(encode_message("", access=self._access)) > MAX_RULES:
            raise UsageError("more networks and passwords than a server takes from one client; start several")
        self._routes = [tunnel.open() for tunnel in tunnels]
        self._changed = asyncio.Event()
        self.log.listeners.add(self._changed.set)
        self._hinted = False
        self._round_trip: float | None = None
        self._session_id = ""
        self._link: Link | None = None
        self._lost_streams = 0  # of sessions that are over, since the last one began
        self._forwarding: set[asyncio.Task[None]] = set()
        self._stopping, self._hurrying = asyncio.Event(), asyncio.Event()
        self._fatal: TunnelError | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._give_up_at = self._connected_at = float("inf")
        self._redial: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Serve until `stop`. Raises TunnelError when there is no point in going on."""
        import zstandard  # noqa: F401 - as in TunnelServer.start

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
            await end_tasks(clock, running, stopping)
            await self._end_session(StreamReset(ErrorCode.LINK_LOST, "the client stops"))
            for route in itertools.chain.from_iterable(self._routes):
                route.service.close()
            await asyncio.sleep(0)  # one more turn, in which the transports that were aborted close

    def stop(self) -> None:
        """Finish: running exchanges get GOODBYE seconds; a second call ends them."""
        (self._hurrying if self._stopping.is_set() else self._stopping).set()

    @property
    def url(self) -> str:
        """The public URL of the first tunnel; "" before it is known."""
        return self.urls[0] if self.urls else ""

    @property
    def urls_by_name(self) -> dict[str, str]:
        """The public URL of each tunnel; "" before it is known."""
        urls = itertools.chain(self.urls, itertools.repeat(""))
        return {tunnel.name: url for tunnel, url in zip(self.tunnels, urls, strict=False)}

    @property
    def round_trip(self) -> float | None:
        """Seconds to the server and back, when last measured: by a PING, else in the handshake."""
        return (self._link and self._link.session.round_trip) or self._round_trip

    async def wait_changed(self, version: int) -> None:
        """Return when the log is no longer of this version; a change of the link counts, too."""
        while self.log.version == version:
            self._changed.clear()
            await self._changed.wait()

    async def wait_for(
        self,
        *,
        method: str = "",
        path: str = "",
        tunnel: str = "",
        count: int = 1,
        after: int = 0,
        timeout: float | None = 60.0,
    ) -> Exchange:
        """Return the `count`th exchange that fits and has ended, or is an event stream or a WebSocket that has begun.

        Those that are in the log already count, too.

        `path` is without the query, `*` and `?` in it are wildcards; `after` is the id of an exchange to start behind.
        Raises TimeoutError after `timeout` seconds.
        """
        found: dict[int, Exchange] = {}
        version, pattern = 0, path.replace("[", "[[]") or "*"
        async with asyncio.timeout(timeout):
            while True:
                changed, version = self.log.since(version), self.log.version
                for e in changed:
                    arrived = e.id > after and e.replay_of is None and (e.ended is not None or any(e.readers))
                    fits = method.upper() in ("", e.method) and tunnel in ("", e.tunnel)
                    if arrived and fits and fnmatch.fnmatchcase(e.path, pattern):
                        found[e.id] = e
                if len(found) >= count:
                    return list(found.values())[count - 1]
                await self.wait_changed(version)

    async def replay(self, exchange: Exchange, **edits: Any) -> Exchange:
        """Send a recorded request to the local service once more, and return the new exchange when it has ended.

        `edits` are `method`, `target` (str), `headers` and `body` (bytes) that differ. Raises MessageError when they
        make no request, or when the content is longer than what was kept.
        """
        body = edits.get("body")
        if exchange.is_tcp:
            raise MessageError("a TCP connection cannot be replayed")
        if body is None:
            if exchange.status == 101:
                raise MessageError("a WebSocket cannot be replayed")
            if exchange.bytes_in > len(exchange.request_body):
                raise MessageError(f"only {len(exchange.request_body)} bytes of its content were kept")
            body = bytes(exchange.request_body)
        headers: Headers = edits.get("headers", exchange.request_headers)
        headers = [pair for pair in headers if pair[0].lower() not in FRAMING | HOP_BY_HOP]
        if body or field_values(exchange.request_headers, b"content-length"):
            headers.append((b"Content-Length", b"%d" % len(body)))
        method, target = edits.get("method", exchange.method), edits.get("target", exchange.target)
        index = [tunnel.name for tunnel in self.tunnels].index(exchange.tunnel)
        try:
            payload = RequestHead(method.encode(), target.encode(), headers).encode()
            head = RequestHead.decode(payload)
        except ProtocolError as error:
            raise MessageError(str(error)) from None
        if not target.startswith("/"):
            raise MessageError("a target begins with /")
        again = self._exchange_of(index, head, payload, replay_of=exchange.id)
        self.log.begin(again)
        nobody = Replay(body)
        task = asyncio.ensure_future(self._exchange(self._forward(nobody, index, head, again), nobody, again))
        self._forwarding.add(task)
        task.add_done_callback(self._forwarding.discard)
        try:
            await asyncio.wait([task], timeout=REPLAY_TIMEOUT)
        finally:  # also when whoever asked for it has gone away
            in_time = not task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not in_time:
            again.error = f"no end within {REPLAY_TIMEOUT:g} s"
            self.log.touch(again)
        return again

    def _emit(self, event: str, **fields: Any) -> None:
        self._on_event(event, **fields)
        self.log.touch()

    async def log_in(self) -> None:
        """Shake hands with the server once, and leave. Raises Unreachable or Refused."""
        import aiohttp

        until = asyncio.get_running_loop().time() + DIAL_TIMEOUT
        try:
            async with self._dial(until) as ws, asyncio.timeout_at(until):
                await self._handshake(ws)
        except (OSError, aiohttp.ClientError, TimeoutError, ProtocolError) as error:
            raise Unreachable(f"no server at {self.server}: {_describe(error)}; check the address") from None

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
        delays, retries = backoff(), 0
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
            if self._connected_at < float("inf"):
                retries = 0
            if self._max_retries is not None and retries >= self._max_retries:
                raise Unreachable(f"no server at {self.server}: {reason}; --max-retries {retries} are used up")
            retries += 1
            delay = next(delays) if self.urls else min(next(delays), 1.0)
            if not self.urls and loop.time() + delay + BACKOFF_MIN > self._give_up_at:
                advice = "check the address, or start pytunnel serve"
                if "certificate" in reason:
                    advice = "check the address, or see what renews it"
                raise Unreachable(f"no server at {self.server}: {reason}; {advice}")
            self.problem, self.retry_at = reason, loop.time() + delay
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
            received = ready.number("received", 0, 2**63)  # before anybody is told that there is a session
            link = await self._enter_session(ready)
            self._connected_at = loop.time()
            return await link.run(ws, received)

    @contextlib.asynccontextmanager
    async def _dial(self, until: float) -> AsyncIterator[WebSocket]:
        import aiohttp

        sockets: list[socket.socket] = []  # of all addresses that were tried

        def make_socket(info: Any) -> socket.socket:
            sockets.append(socket.socket(*info[:3]))
            return sockets[-1]

        key = base64.b64encode(secrets.token_bytes(16))
        fields = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        fields |= {"Sec-WebSocket-Key": key.decode(), "Sec-WebSocket-Protocol": SUBPROTOCOL}
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=make_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=True,
            headers={"User-Agent": f"pytunnel/{__version__}"},
        ) as http_session:
            url = self.server + LINK_PATH
            async with asyncio.timeout_at(until):
                response = await http_session.get(url, headers=fields, allow_redirects=False, read_until_eof=False)
            try:
                ws = self._switch(response, accept_key(key).decode())
                try:
                    yield ws
                finally:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await ws.close()
            finally:
                response.close()
                for sock in sockets:  # whatever state it is in, so that nothing waits for a dead peer
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _switch(response: aiohttp.ClientResponse, accept: str) -> WebSocket:
        """Return the connection on which a server has agreed to speak WebSocket. Raises ClientError when it has not."""
        import aiohttp

        if response.status in (301, 302, 303, 307, 308):
            raise aiohttp.ClientError("the server redirects; dial the address that it redirects to")
        agreed = response.headers.get("Sec-WebSocket-Accept"), response.headers.get("Sec-WebSocket-Protocol")
        if response.status != 101 or agreed != (accept, SUBPROTOCOL) or not response.connection:
            raise aiohttp.WSServerHandshakeError(response.request_info, (), status=response.status)
        transport, protocol = response.connection.transport, response.connection.protocol
        assert transport is not None and protocol is not None  # the latter counts as empty
        return WebSocket(transport, protocol, is_server=False)

    async def _handshake(self, ws: WebSocket) -> Message:
        """Return the server's ready, once both ends have proved that they know the token. Raises Refused."""
        nonce = secrets.token_urlsafe(18)
        link = self._link
        hello = encode_message(
            "hello",
            version=PROTOCOL_VERSION,
            key=key_id(self._token),
            nonce=nonce,
            server=self.server,
            tunnels=[tunnel.name for tunnel in self.tunnels],
            access=self._access,
            tcp={tunnel.name: tunnel.port for tunnel in self.tunnels if tunnel.target.tcp},
            session=self._session_id,
            received=link.session.received if link else 0,
            compress=self._compress,
            window=INITIAL_WINDOW,
            streams=MAX_STREAMS,
            agent=f"pytunnel/{__version__}",
        )
        sent = time.monotonic()
        ws.send_message(hello)
        challenge = await self._answer(ws)
        self._round_trip = time.monotonic() - sent
        if not challenge.get("nonce", str).startswith(nonce):
            raise ProtocolError("the server's nonce is not ours")
        auth_message = f"{hello}\n{challenge.text}".encode()
        iterations = challenge.number("iterations", ITERATIONS, MAX_ITERATIONS)
        proof, signature = client_proof(self._token, challenge.bytes("salt"), iterations, auth_message)
        ws.send_message(encode_message("proof", proof=base64.b64encode(proof).decode()))
        ready = await self._answer(ws)
        if not hmac.compare_digest(ready.bytes("signature"), signature):
            raise Refused("token", "the server does not know this token itself; is this the right server?")
        if self._access and any(rule not in ready.get("enforced", list, []) for rule in ENFORCED):
            raise Refused("access", "this server is too old for --auth and --allow; upgrade it")
        return ready

    @staticmethod
    async def _answer(ws: WebSocket) -> Message:
        message = await ws.receive_message()
        if message.get("type", str) == "refused":
            code, reason = message.get("code", str), escape(message.get("reason", str))
            raise Refused(code, reason, retry=message.get("retry", bool))
        return message

    async def _enter_session(self, ready: Message) -> Link:
        """Return the link to run: of the session that goes on, or of a new one."""
        urls = [escape(str(tunnel.get("url"))) for tunnel in ready.get("tunnels", list) if isinstance(tunnel, dict)]
        if len(urls) != len(self.tunnels):
            raise ProtocolError(f"{len(urls)} tunnels, asked for were {len(self.tunnels)}")
        pairs = zip(self.tunnels, urls, strict=True)
        if any(tunnel.target.tcp and not url.startswith("tcp://") for tunnel, url in pairs):
            raise Refused("port", "this server is too old for TCP tunnels; upgrade it")
        resumed = ready.get("resumed", bool)
        if not resumed or not self._link:
            if self._link:
                await self._end_session(StreamReset(ErrorCode.LINK_LOST, "the server has forgotten the session"))
            session = Session(
                is_server=False,
                send_window=ready.number("window", 1, MAX_WINDOW),
                receive_window=INITIAL_WINDOW,  # as the hello said
                max_streams=min(MAX_STREAMS, ready.number("streams", 1, MAX_WINDOW)),
                compress=ready.get("compress", bool, False),
            )
            self._link = Link(session)
            self._link.on_stream, self._link.on_goaway = self._on_stream, self._on_goaway
            self._session_id = ready.get("session", str)
        self.problem, self.retry_at = "", None
        if urls == self.urls:
            self._emit("reconnected", resumed=resumed, lost=self._lost_streams)
        else:
            self.urls = urls
            for tunnel, url in zip(self.tunnels, urls, strict=False):
                self._emit("ready", url=url, name=tunnel.name, target=tunnel.target.text)
        self._lost_streams = 0
        return self._link

    async def _end_session(self, error: StreamReset) -> None:
        if self._renewal:
            await end_tasks(self._renewal)
            self._renewal = None
        if self._link:
            self._lost_streams += self._link.session.unfinished
            self._link.end(error)
            self._link = None
            self._session_id = ""
        await asyncio.sleep(0)  # all of them have begun then, and end what was started for them
        await end_tasks(*self._forwarding)

    def _on_goaway(self, code: ErrorCode, reason: str) -> None:
        link = self._link
        assert link
        if code is ErrorCode.REPLACED:
            names = ", ".join(tunnel.name for tunnel in self.tunnels)
            self._fatal = Refused("replaced", f"{names}: {escape(reason)}; give this client another --name")
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
        if self.log.in_flight >= MAX_STREAMS:  # those that linger, or are about to end, count as well
            with contextlib.closing(stream):
                return stream.abort(ErrorCode.REFUSED, "no more streams")
        try:
            head, tcp = RequestHead.decode(stream.head), stream.kind is Kind.TCP
            if tcp != (head.method == b"TCP") or tcp != self.tunnels[stream.tunnel].target.tcp:
                raise ProtocolError("a stream of the wrong kind")
            if not tcp and split_target(head.method, head.target, head.headers)[0] != head.target:
                raise ProtocolError("a request to a proxy")
            if head.method in (b"CONNECT", b"TRACE"):  # the server has sorted these out
                raise ProtocolError("a method that is not for tunnels")
            exchange = self._exchange_of(stream.tunnel, head, stream.head, waited=stream.waited)
        except (ProtocolError, MessageError, IndexError):
            with contextlib.closing(stream):
                return stream.abort(ErrorCode.PROTOCOL, "a request that makes no sense")
        forwarding: Forwarding | TcpForwarding
        if tcp:
            forwarding = TcpForwarding(stream, self._routes[stream.tunnel][0].service, exchange, self.log)
        else:
            forwarding = self._forward(stream, stream.tunnel, head, exchange)
        task: asyncio.Task[None] | None = None  # none while the answer is all that there is to wait for

        def run() -> asyncio.Task[None]:
            nonlocal task
            if task is None:
                task = asyncio.ensure_future(self._exchange(forwarding, stream, exchange))
                self._forwarding.add(task)
                task.add_done_callback(done)
            return task

        def answer() -> None:
            if task is None and forwarding.answer():
                stream.close()
                self._end(exchange)
            else:
                run()

        def reset(code: ErrorCode) -> None:
            loop, task = asyncio.get_running_loop(), run()
            # NO_ERROR: the visitor has left, but what it sent before is still to be delivered
            if code is ErrorCode.NO_ERROR and self.log.in_flight <= MAX_STREAMS // 2:  # leaves room for new ones
                loop.call_later(LINGER, task.cancel)
            else:
                loop.call_soon(task.cancel)  # not before it has begun: it has to end what was started above

        def done(task: asyncio.Task[None]) -> None:
            stream.close()
            self._forwarding.discard(task)

        stream.on_reset = reset
        has_begun = forwarding.start(answer)
        self.log.begin(exchange)  # the local service works meanwhile
        if not has_begun:
            run()

    def _forward(self, stream: Stream | Replay, tunnel: int, head: RequestHead, exchange: Exchange) -> Forwarding:
        route = next(route for route in self._routes[tunnel] if route.takes(exchange.target))
        return Forwarding(stream, route, head, exchange, self.log)

    def _exchange_of(self, tunnel: int, head: RequestHead, payload: bytes, **fields: Any) -> Exchange:
        return Exchange(
            self.tunnels[tunnel].name,
            head.method.decode(),
            head.target.decode("utf-8", "backslashreplace"),
            started=asyncio.get_running_loop().time(),
            time=time.time(),
            request_head=payload,
            round_trip=self.round_trip,
            **fields,
        )

    async def _exchange(
        self, forwarding: Forwarding | TcpForwarding, stream: Stream | Replay, exchange: Exchange
    ) -> None:
        try:
            await forwarding.run()
        except StreamReset as error:
            if error.code is not ErrorCode.NO_ERROR:
                exchange.error = error.reason or error.code.name
                exchange.status = exchange.status or PROBLEMS[PROBLEM_OF.get(error.code, "internal")][0]
            stream.abort(error.code, error.reason, flush=True)
        except asyncio.CancelledError:
            exchange.error = "" if exchange.status == 101 else escape(stream.problem) or "the visitor went away"
        except Exception:
            exchange.error = "a bug in pytunnel"
            stream.abort(ErrorCode.INTERNAL)
            log.exception("a request failed")
        finally:
            self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        self.log.finish(exchange, asyncio.get_running_loop().time())
        self._on_event("request", exchange=exchange)
        suspect = exchange.status in (400, 403) or exchange.bytes_out == len("Invalid Host header")  # webpack's 200
        if suspect and not self._hinted and REFUSED_HOST.search(exchange.response_body):
            self._hinted = True
            self._emit("hint", message="the local service refuses this host name; add --host-header rewrite")


# ---- Files ----------------------------------------------------------------------------------------------------------
# A folder as a local service. Nothing is served but what lies in it: a target is cut at its slashes before it is
# decoded, its names are checked, and what they lead to is checked again, symbolic links followed.

FILE_NAME = re.compile(r"[^./\\\0][^/\\\0]*")  # dotfiles (.env, .git) are nobody's business, and `..` is one of them
LISTING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%(title)s</title>
<style>
body{font:16px/1.7 system-ui;margin:2rem auto;max-width:50rem;padding:0 1rem;color-scheme:light dark}
h1{font-size:1.2rem}table{width:100%%}td{overflow-wrap:anywhere}
td:last-child{text-align:right;font-variant-numeric:tabular-nums}
</style>
<h1>%(title)s</h1>
<table>%(rows)s
</table>
"""


class Found(NamedTuple):
    """A file or folder that may be served."""

    path: Path
    status: os.stat_result
    is_folder: bool


def _find(root: Path, names: list[str]) -> Found | None:
    """Return what the names lead to, None when it does not exist or is not to be served; `root` is resolved already."""
    if not all(map(FILE_NAME.fullmatch, names)):
        return None
    try:
        path = root.joinpath(*names).resolve(strict=True)
        status = path.stat()
    except (OSError, RuntimeError):  # the latter for a loop of links, before Python 3.13
        return None
    inside = path.is_relative_to(root) and all(map(FILE_NAME.fullmatch, path.relative_to(root).parts))
    found = Found(path, status, stat.S_ISDIR(status.st_mode))
    return found if inside and (found.is_folder or stat.S_ISREG(status.st_mode)) else None  # no FIFO, no device


def _listing(root: Path, names: list[str]) -> str:
    """Return a folder's page. Raises OSError."""
    entries = [(name, found) for name in os.listdir(root.joinpath(*names)) if (found := _find(root, [*names, name]))]
    rows = ['\n<tr><td><a href="../">../</a><td>'] if names else []
    for name, found in sorted(entries, key=lambda entry: (not entry[1].is_folder, entry[0].casefold(), entry[0])):
        slash, size = ("/", "") if found.is_folder else ("", f"{found.status.st_size:,}")
        link = "./" + urllib.parse.quote(os.fsencode(name)) + slash
        rows.append(f'\n<tr><td><a href="{link}">{html.escape(escape(name, 255))}{slash}</a><td>{size}')
    return LISTING % {"title": html.escape(escape("/".join(["", *names, ""]))), "rows": "".join(rows)}


@contextlib.asynccontextmanager
async def _running(app: web.Application) -> AsyncIterator[int]:
    """Run an application on a free port of 127.0.0.1, which is what the context gives."""
    from aiohttp import http_exceptions, web

    logger = log.getChild("files")  # aiohttp has a traceback for each request that is not HTTP
    logger.filters = [lambda r: not (r.exc_info and isinstance(r.exc_info[1], http_exceptions.HttpProcessingError))]
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=logger,
        shutdown_timeout=0.1,
        handler_cancellation=True,
        max_line_size=MAX_FIELD,
        max_field_size=MAX_FIELD,
        max_headers=MAX_FIELDS + len(OUR_FORWARDED),
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def folder_service(root: Path, *, spa: bool = False) -> contextlib.AbstractAsyncContextManager[int]:
    """Serve a folder on a free port of 127.0.0.1, which is what the context gives.

    With `spa`, a browser gets the root's index.html for each path that has no file.
    """
    from aiohttp import web, web_fileresponse

    root = root.resolve()
    fresh = {"Cache-Control": "no-cache"}  # kept, but asked about each time: what is being worked on changes

    class FileResponse(web.FileResponse):
        """aiohttp's, which knows ranges and conditions, without two of its habits."""

        def __init__(self, found: Found) -> None:
            super().__init__(found.path, headers=fresh)
            self.validator = f'"{found.status.st_mtime_ns:x}-{found.status.st_size:x}"'  # the ETag that aiohttp makes
            self.content_type = web_fileresponse.CONTENT_TYPES.guess_type(found.path)[0] or "application/octet-stream"
            if self.content_type.startswith("text/") or self.content_type.endswith("javascript"):
                self.charset = "utf-8"

        async def prepare(self, request: web.BaseRequest) -> Any:
            # It would send a sibling `.gz`, however old, to who accepts that, and a Range whatever ETag If-Range has.
            conditions = ("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range", "Range")
            headers = {name: request.headers[name] for name in conditions if request.headers.get(name, "é").isascii()}
            if '"' in headers.get("If-Range", "") and headers["If-Range"] != self.validator:
                headers.pop("Range", None)
            return await super().prepare(request.clone(headers=headers))

    def answer(request: web.Request) -> web.StreamResponse:
        path, mark, query = request.raw_path.partition("?")
        names = [urllib.parse.unquote(name, errors="surrogateescape") for name in path.split("/")[1:]]
        if slash := names[-1:] == [""]:
            names.pop()
        found = _find(root, names)
        if found and found.is_folder:
            index = _find(root, [*names, "index.html"])
            if not slash and (index or not spa):
                raise web.HTTPFound(path + "/" + mark + query)
            if not index and not spa:
                return web.Response(text=_listing(root, names), content_type="text/html", headers=fresh)
            found = index
        elif slash:
            found = None
        wants_page = spa and "text/html" in request.headers.get("Accept", "") and all(map(FILE_NAME.fullmatch, names))
        if not found and wants_page:
            found = _find(root, ["index.html"])
        if not found or found.is_folder:
            raise web.HTTPNotFound
        return FileResponse(found)

    async def serve(request: web.Request) -> web.StreamResponse:
        try:
            return await asyncio.to_thread(answer, request)
        except OSError:
            raise web.HTTPForbidden from None

    app = web.Application()
    app.router.add_get("/{path:(?s:.*)}", serve)  # which answers 405 to other methods
    return _running(app)


# ---- Inspector ------------------------------------------------------------------------------------------------------
# The client's log as a page in the developer's browser. What it shows was written by strangers, so it is only ever set
# as text; and every other page in that browser can reach its port, so each request has to show that it is our own.

INSPECTOR_PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="token" content="%TOKEN%">
<title>pytunnel</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><path
 d='M2 14V8a6 6 0 0 1 12 0v6h-3V8a3 3 0 0 0-6 0v6z' fill='%236366f1'/></svg>">
<style>
:root {
  --back: light-dark(#fff, #0f0f12); --raised: light-dark(#f6f6f8, #18181c); --tint: light-dark(#eef0ff, #22233a);
  --line: light-dark(#e3e3e8, #2b2b32); --edge: light-dark(#8b8b96, #6c6c78); --text: light-dark(#17171c, #ececf1);
  --soft: light-dark(#595964, #a3a3af); --accent: light-dark(#4338ca, #a5b4fc); --good: light-dark(#116932, #6ee7a0);
  --moved: light-dark(#1d5fae, #8ec5ff); --warn: light-dark(#8a4b08, #fbbf60); --bad: light-dark(#b3261e, #ff9a92);
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color-scheme: light dark; color: var(--text); background: var(--back); font: 14px/1.5 system-ui, sans-serif;
}
* { box-sizing: border-box; margin: 0; padding: 0; font-size: inherit }
[hidden] { display: none !important }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
a { color: var(--accent); text-underline-offset: 3px }
li { list-style: none }
pre, code, kbd, td, tbody th, h2, textarea, input, #notes, .fields { font: 12.5px/1.6 var(--mono) }
pre, td, tbody a, h2, textarea, input, li span, dd { unicode-bidi: plaintext }
button, input, textarea, kbd { color: inherit; background: var(--back) }
button, input, textarea, kbd { border: 1px solid var(--edge); border-radius: 6px }
button { font: 13px system-ui, sans-serif; border-color: var(--line); padding: 0 10px; min-height: 30px }
button:hover { background: var(--raised); border-color: var(--edge) }
button[aria-pressed=true] { color: var(--accent); background: var(--tint); border-color: var(--accent) }
button.main { color: var(--back); background: var(--accent); font-weight: 600 }
.small button, button.small { min-height: 26px; padding: 0 8px; font-size: 12px }
input, textarea { color: var(--text); width: 100%; padding: 5px 10px; resize: vertical; display: block }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.soft, dt, thead th, label { color: var(--soft); font-weight: 400 }
.row, dl.row > div { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 8px }
.last { margin-left: auto }
.grid { display: grid; gap: 12px; align-items: start }
.grid > * { min-width: 0 }
.box, pre { padding: 10px 12px; background: var(--raised); border: 1px solid var(--line); border-radius: 8px }
dl.row, #facts { gap: 2px 18px; font-variant-numeric: tabular-nums }

body > header { padding: 10px 16px; gap: 4px 20px; border-bottom: 1px solid var(--line) }
#state::before, #legend dt::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 8px }
#state::before { background: var(--good); border-radius: 50% }
#state[data-bad]::before { background: none; box-shadow: inset 0 0 0 2px var(--bad) }
.tools { position: sticky; top: 0; padding: 10px 16px; background: var(--back); border-bottom: 1px solid var(--line) }
table { width: 100%; table-layout: fixed; border-collapse: collapse; font-variant-numeric: tabular-nums }
tr > * { padding: 6px 8px; text-align: left; overflow: hidden; white-space: nowrap; text-overflow: ellipsis }
tr > .status { padding-left: 16px; width: 70px }
tr > .method { width: 66px }
tr > .time, tr > .size, tr > .at { width: 84px; text-align: right }
tr > :last-child { padding-right: 16px; width: 92px }
thead th { font-size: 12px; border-bottom: 1px solid var(--line) }
tbody tr { cursor: pointer }
tbody tr:hover { background: var(--raised) }
tr:has([aria-current]) { background: var(--tint); box-shadow: inset 3px 0 var(--accent) }
tr a { display: block; overflow: hidden; text-overflow: ellipsis; color: inherit; text-decoration: none }
td.status, span.status { font-weight: 600 }
.s1, .s3 { color: var(--moved) }
.s2, .down, .string { color: var(--good) }
.s4, .atom { color: var(--warn) }
.s5, .error { color: var(--bad) }
.key, .up { color: var(--accent) }
.empty { padding: 48px 16px; place-items: center; text-align: center }
#more { display: block; margin: 12px auto }

#list, #detail { container-type: inline-size; min-width: 0 }
#detail { padding: 14px 16px 32px; overflow-wrap: anywhere; outline-offset: -2px }
h2 { font-size: 16px; font-weight: 600 }
#bar { display: flex; height: 8px }
#bar span, #legend dt::before { border-radius: 2px; background: var(--part) }
.server { --part: light-dark(#a5a5b1, #6b6b78) }
.link { --part: light-dark(#0e8a8a, #4fd1c5) }
.local { --part: light-dark(#4338ca, #818cf8) }
.content { --part: light-dark(#c2650c, #f0a95b) }
.fields { display: grid; grid-template-columns: minmax(80px, max-content) 1fr; gap: 2px 14px }
.fields dt { max-width: 20ch }
pre { white-space: pre-wrap; overflow: auto; max-height: 60vh }
pre.hex { white-space: pre }
img { max-width: 100%; max-height: 50vh; margin: auto }
#notes { max-height: 50vh; overflow: auto }
#notes li { display: grid; grid-template-columns: 1em 7ch minmax(8ch, auto) 1fr; gap: 12px; line-height: 1.9 }
#diff span { display: block; min-height: 1.6em }
#diff .add { color: var(--good); background: light-dark(#e2f4e8, #12291c) }
#diff .del { color: var(--bad); background: light-dark(#fdeceb, #331a1a) }
#toast { position: fixed; inset: auto 16px 16px; width: fit-content; margin-left: auto; padding: 8px 14px;
  color: var(--back); background: var(--text); border-radius: 8px; overflow-wrap: anywhere }
#toast:empty { visibility: hidden }
dialog { margin: auto; padding: 20px; color: inherit; background: var(--back); border: 1px solid var(--edge) }
dialog .fields { margin: 12px 0 }
kbd { padding: 1px 6px }

@container (max-width: 600px) { tr > .at { display: none } tr > .size { padding-right: 16px } }
@container (max-width: 480px) { tr > .size { display: none } tr > .time { padding-right: 16px } }
@container (min-width: 720px) { .sides:not(:has(.hex)) { grid-template-columns: 1fr 1fr; gap: 20px } }
@media (max-width: 899px) {
  .open #list, .open #stats, body:not(.open) #detail { display: none }
  #stats { margin: 0; font-size: 13px }
}
@media (min-width: 900px) {
  body { display: flex; flex-direction: column; height: 100vh }
  main { flex: 1; min-height: 0; display: grid; grid-template-columns: 9fr 11fr }
  #list, #detail { overflow-y: auto }
  #list { border-right: 1px solid var(--line) }
  #back { display: none }
}
</style>
<header class="row">
  <h1>pytunnel</h1>
  <p><span id="state" role="status" data-bad>Connecting</span> <span id="retry" class="soft"></span></p>
  <div id="tunnels" class="row"></div>
  <dl id="stats" class="row last"></dl>
</header>
<main>
  <section id="list" aria-label="Exchanges">
    <div class="tools grid">
      <input id="filter" type="search" aria-label="Filter" aria-keyshortcuts="/" placeholder="5xx post /path body:text">
      <div class="row">
        <div id="chips" class="row small" role="group" aria-label="Quick filters"></div>
        <div class="row last">
          <button id="pause" aria-pressed="false" aria-keyshortcuts="p">Pause</button> <button id="clear">Clear</button>
          <button id="export">Export HAR</button> <button id="ask" aria-label="Help" aria-keyshortcuts="?">?</button>
        </div>
      </div>
    </div>
    <table>
      <caption class="unseen">Requests and their responses, the newest first</caption>
      <thead><tr><th class="status">Status<th class="method">Method<th>Path
        <th class="time">Time<th class="size">Size<th class="at">At</thead>
      <tbody id="rows"></tbody>
    </table>
    <div id="none" class="empty grid" hidden></div>
    <button id="more" hidden>Show older ones</button>
  </section>
  <section id="detail" aria-labelledby="title" tabindex="-1">
    <p id="nothing" class="empty soft">Choose an exchange to see its header fields, bodies and timings.</p>
    <div id="exchange" class="grid" hidden>
      <div class="row">
        <button id="back">← All</button>
        <button id="replay" class="main" aria-keyshortcuts="r">Replay</button>
        <button id="change" aria-keyshortcuts="e" aria-expanded="false" aria-controls="edit">Edit and replay</button>
        <button id="curl">Copy as curl</button> <button id="har">HAR</button>
        <button id="reveal" aria-pressed="false">Show secrets</button>
      </div>
      <h2 id="title"></h2>
      <div id="facts" class="row soft"></div>
      <form id="edit" class="box grid" hidden>
        <label>Method <input name="method" required></label>
        <label>Target <input name="target" required></label>
        <label>Header fields, one a line <textarea name="headers" rows="6" spellcheck="false"></textarea></label>
        <label>Body <textarea name="body" rows="6" spellcheck="false"></textarea></label>
        <div class="row"><button class="main">Send</button> <button id="cancel" type="button">Cancel</button></div>
      </form>
      <section id="result" class="grid" aria-label="Replay" hidden></section>
      <div id="bar"></div> <dl id="legend" class="row" aria-label="Timings"></dl>
      <section id="messages" class="grid" aria-label="Messages" hidden>
        <h3>Messages</h3> <ol id="notes" class="box" tabindex="0" aria-label="The last messages"></ol>
      </section>
      <div class="sides grid">
        <section id="request" class="grid" aria-label="Request"></section>
        <section id="response" class="grid" aria-label="Response"></section>
      </div>
    </div>
  </section>
</main>
<p id="news" class="unseen" role="status"></p>
<output id="toast"></output>
<dialog id="help" aria-labelledby="keys">
  <h2 id="keys">Keyboard</h2>
  <dl class="fields">
    <dt><kbd>j</kbd> <kbd>k</kbd> or arrows<dd>next and previous <dt><kbd>Enter</kbd><dd>open <dt><kbd>Esc</kbd><dd>back
    <dt><kbd>/</kbd><dd>filter: <code>404 5xx post body:text</code> or part of a path
    <dt><kbd>r</kbd> <kbd>e</kbd><dd>replay as it was, or edited <dt><kbd>p</kbd><dd>pause, and go on
  </dl>
  <form method="dialog"><button class="main">Close</button></form>
</dialog>
<script>
"use strict"
const $ = id => document.getElementById(id)
const STEP = 100, PACE = 500  // rows shown at first and added each time; milliseconds from one poll to the next
let token = document.querySelector("meta[name=token]").content
let version = 0, limit = STEP, selected = 0, loaded = 0, exchange, status, retryAt = 0
let paused = false, reveal = "", abort = new AbortController(), wake = () => {}

// Strangers wrote this text: control and direction characters in it are shown as escapes, and it never becomes markup.
const unprintable = /\r(?!\n)|[^\P{C}\r\n\t\u200d]/gu
const visible = text => String(text).replace(unprintable, c => `\\u{${c.codePointAt(0).toString(16)}}`)
const put = (node, ...parts) => node.replaceChildren(...parts.map(part => part instanceof Node ? part : visible(part)))
function h(tag, properties, ...parts) {
  const node = Object.assign(document.createElement(tag), properties)
  put(node, ...parts)
  return node
}
const span = (className, ...parts) => h("span", {className}, ...parts)
const pair = (className, name, value) => h("div", {className}, h("dt", {}, name), h("dd", {}, value))
const changed = (node, data) => node.shown !== (node.shown = JSON.stringify(data))
const seconds = s => s === null ? "–" : s < 1 ? `${(s * 1000).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(2)} s`
const clock = time => new Date(time * 1000).toLocaleTimeString([], {hour12: false})
const duration = e => e.ms === null ? "…" : seconds(e.ms / 1000)
const outcome = e => e.status ?? (e.ms === null ? "…" : "none")
const kindOf = e => e.status ? "status s" + String(e.status)[0] : "status error"
function size(n) {
  let unit = 0
  for (; n >= 1000 && unit < 4; unit++) n /= 1024
  return `${n.toFixed(unit && n < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`
}
function toast(text) {
  put($("toast"), text)
  clearTimeout(toast.timer)
  toast.timer = setTimeout(() => put($("toast")), 4000)
}
async function copy(text) {
  await navigator.clipboard.writeText(text)
  toast("Copied")
}
async function api(path, options) {
  const response = await fetch("/api/" + path, {...options, headers: {"X-Pytunnel-Token": token}})
  if (response.ok) return response
  throw Object.assign(Error((await response.json()).error), {status: response.status})
}
const json = async (path, options) => (await api(path, options)).json()
const bodyOf = (e, which) => api(`exchanges/${e.id}/body?which=${which}`)
async function save(path, name) {
  const link = h("a", {href: URL.createObjectURL(await (await api(path)).blob()), download: name})
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 1000)
}

// What is new, about twice a second at the most; nothing while nobody looks

const sleep = ms => new Promise(resolve => { wake = resolve; if (ms !== undefined) setTimeout(resolve, ms) })
async function poll() {
  for (;;) {
    while (document.hidden || paused && version) await sleep()
    const {signal} = abort = new AbortController()
    const query = {since: version, filter: $("filter").value, limit, id: selected, wait: version ? 20 : 0}
    const started = performance.now()
    try {
      const news = await json("exchanges?" + new URLSearchParams(query), {signal})
      if (signal.aborted) continue
      update(news)
      const pace = news.exchanges.length < limit ? PACE : 2 * PACE  // nobody can read a whole list that fast
      await sleep(started + pace - performance.now())
    } catch (error) {
      if (!signal.aborted) await lost(error)
    }
  }
}
const pollNow = (since = version) => { version = since; abort.abort(); wake() }
const restart = () => { put($("rows")); pollNow(0) }
async function lost(error) {
  showState(error.status ? error.message : "The client has ended; this page waits for the next one")
  await sleep(2000)
  if (error.status !== 403) return
  const page = await fetch("/").then(response => response.text(), () => "")  // of another client, with its own token
  token = /name="token" content="([^"]*)"/.exec(page)?.[1] ?? token
  restart()
}
function update(news) {
  status = news
  version = news.version
  const rows = $("rows")
  for (const e of news.exchanges.reverse()) putRow(e)
  for (let last; (last = rows.lastChild) && (rows.rows.length > limit || last.number < news.oldest);) last.remove()
  if (rows.firstChild && !tabStop()) rove(linkOf(rows.firstChild))
  $("more").hidden = rows.rows.length < limit
  retryAt = news.retry_in && performance.now() + news.retry_in * 1000
  showState(news.problem && `Reconnecting: ${news.problem}`)
  showHeader(news)
  showNone()
  if (selected && news.selected > loaded) load()
}
function showState(problem) {
  $("state").toggleAttribute("data-bad", problem)
  if (changed($("state"), problem)) put($("state"), problem || "Connected")
  countDown()
}
function countDown() {
  const left = Math.max(0, Math.ceil((retryAt - performance.now()) / 1000))
  if (changed($("retry"), left)) put($("retry"), left ? `again in ${left} s` : "")
}
function showHeader({tunnels, total, in_flight, p50, p90, bytes_in, bytes_out}) {
  if (changed($("tunnels"), tunnels)) {
    put($("tunnels"), ...tunnels.map(publicLink))
    document.title = visible(`${tunnels[0].name} · pytunnel`)
  }
  const facts = {Requests: total, Running: in_flight, p50: seconds(p50), p90: seconds(p90), In: size(bytes_in),
    Out: size(bytes_out)}
  put($("stats"), ...Object.entries(facts).map(([name, value]) => pair("", name, value)))
}
function publicLink({url, name, target}) {
  if (!/^https?:\/\//.test(url)) return span("soft", name)
  const link = h("a", {href: url, target: "_blank", rel: "noreferrer"}, url)
  const button = h("button", {className: "small", ariaLabel: `Copy ${url}`, onclick: () => copy(url)}, "Copy")
  return span("row", link, button, span("soft", `→ ${target}`))
}

// The list

const linkOf = row => row.querySelector("a")
function putRow(e) {
  let row = $("rows").firstChild
  while (row && row.number > e.id) row = row.nextSibling
  if (row?.number !== e.id) {
    const names = ["status", "method", "path", "time", "size", "at"]
    const cells = names.map(className => h(className === "path" ? "th" : "td", {className}))
    put(cells[2], h("a", {href: "#" + e.id, tabIndex: -1, ariaCurrent: e.id === selected ? "true" : null}))
    row = $("rows").insertBefore(h("tr", {number: e.id}, ...cells), row)
  }
  const texts = [outcome(e), e.method, e.path, duration(e), size(e.bytes_out), clock(e.time)]
  texts.forEach((text, n) => put(row.cells[n].querySelector("a") ?? row.cells[n], text))
  row.cells[0].className = kindOf(e)
  row.title = visible(e.error ?? e.path)
}
function showNone() {
  const words = $("filter").value, none = $("none")
  none.hidden = $("rows").rows.length > 0
  if (none.hidden || !changed(none, [words, status.tunnels])) return
  const all = h("button", {onclick: () => setFilter("")}, "Show all")
  const hint = words ? [all] : ["Open this address, or have it called:", ...status.tunnels.map(publicLink)]
  put(none, h("strong", {}, words ? `Nothing matches “${words}”` : "Waiting for the first request"), ...hint)
}
function setFilter(words) {
  $("filter").value = words
  for (const chip of $("chips").children) chip.ariaPressed = chip.words === words.trim()
  restart()
}
const tabStop = () => $("rows").querySelector("[tabindex='0']")
function rove(link) {  // the list is one stop of the Tab key, at the link that was used last
  if (tabStop()) tabStop().tabIndex = -1
  link.tabIndex = 0
  return link
}
function move(step) {
  const links = [...$("rows").querySelectorAll("a")], stop = tabStop()
  const link = links[links.indexOf(stop) + (selected || document.activeElement === stop ? step : 0)]
  if (link) rove(link).focus()
  if (link && selected) location.replace(link.href)
}

// One exchange: its number is the address's fragment, so that the browser's Back leads to the list

function choose() {
  const left = selected
  selected = Number(location.hash.slice(1)) || 0
  loaded = 0
  showEdit(false)
  $("result").hidden = true
  $("nothing").hidden = selected
  if (!selected) $("exchange").hidden = true
  document.body.classList.toggle("open", selected)
  for (const row of $("rows").rows) {
    linkOf(row).ariaCurrent = row.number === selected ? "true" : null
    if (row.number === (selected || left)) rove(linkOf(row))
  }
  if (selected) load()
  else if (left) tabStop()?.focus()
}
async function load() {
  const number = selected
  const e = await json(`exchanges/${number}?${reveal}`).catch(error => {
    if (error.status === 404) actions.back()
    throw error
  })
  if (number !== selected) return
  $("exchange").hidden = false
  exchange = e
  loaded = e.version
  put($("title"), `${e.method} ${e.target}`)
  const facts = [duration(e), `${size(e.bytes_in)} in, ${size(e.bytes_out)} out`, `#${e.id} at ${clock(e.time)}`]
  put($("facts"), span(kindOf(e), `${outcome(e)} ${e.reason}`), ...facts.map(fact => span("", fact)))
  if (e.error) $("facts").append(span("error", e.error))
  if (e.replay_of) $("facts").append(h("a", {href: "#" + e.replay_of}, `replay of #${e.replay_of}`))
  const names = {server: "wait on the server", link: "link", local: "local service", content: "content"}
  const times = Object.entries(e.timings)
  put($("bar"), ...times.map(([name]) => span(name)))
  times.forEach(([, value], n) => { $("bar").children[n].style.flexGrow = value * 1000 })
  put($("legend"), ...times.map(([name, value]) => pair(name, names[name], seconds(value))))
  $("messages").hidden = !e.notes.length
  if (changed($("notes"), e.notes)) put($("notes"), ...e.notes.map(showNote))
  for (const which of ["request", "response"]) if (changed($(which), [e.id, e[which]])) showSide(which, e)
}
function showNote({from_visitor, at, kind, size, data}) {
  const arrow = h("span", {role: "img", className: from_visitor ? "up" : "down"}, from_visitor ? "↑" : "↓")
  arrow.ariaLabel = from_visitor ? "from the visitor" : "to the visitor"
  const text = span("", data, size > 512 ? ` … ${size} bytes` : "")
  return h("li", {}, arrow, span("soft", `${at.toFixed(2)} s`), span("soft", kind), text)
}
function showSide(which, e) {
  const {headers, body, kept} = e[which], name = which[0].toUpperCase() + which.slice(1)
  const fields = headers.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])
  put($(which), h("h3", {}, name), h("dl", {className: "fields"}, ...fields))
  if (!kept || e.status === 101) return  // what follows a 101 are the messages
  const download = h("button", {className: "small last"}, "Download")
  download.onclick = () => save(`exchanges/${e.id}/body?which=${which}`, `${which}-${e.id}`)
  const kind = span("soft", [body.kind, body.note].filter(Boolean).join(", "))
  $(which).append(h("div", {className: "row"}, h("h3", {}, "Body"), kind, download), showBody(which, e))
}
function showBody(which, e) {
  const {headers, body} = e[which], ariaLabel = `Body of the ${which}`
  if (body.kind === "image") {
    const image = h("img", {alt: ariaLabel}), type = headers.find(([name]) => /^content-type$/i.test(name))[1]
    bodyOf(e, which).then(response => response.arrayBuffer()).then(bytes => {
      image.src = URL.createObjectURL(new Blob([bytes], {type}))
      image.onload = image.onerror = () => URL.revokeObjectURL(image.src)
    })
    return h("div", {className: "box grid"}, image)
  }
  const parts = body.kind === "json" && body.text.length < 50000 ? paint(body.text) : [body.text]
  return h("pre", {className: body.kind, tabIndex: 0, role: "region", ariaLabel}, ...parts)
}
function paint(json) {
  const tokens = json.split(/("(?:[^"\\]|\\.)*"(?::)?|[\w.+-]+)/)  // those at odd places are not punctuation
  const kind = token => token.endsWith(":") ? "key" : token[0] === '"' ? "string" : "atom"
  return tokens.map((token, n) => n % 2 ? span(kind(token), token) : token)
}

// Replay

async function replay(edits = {}) {
  const {id} = exchange
  toast("Replaying…")
  const again = await json(`exchanges/${id}/replay`, {method: "POST", body: JSON.stringify(edits)})
  toast(`Replayed as #${again.id}: ${again.diff.length ? "the response differs" : "the same response"}`)
  if (id !== selected) return
  showEdit(false)
  const lines = again.diff.slice(2).map(line => span({"+": "add", "-": "del", "@": "soft"}[line[0]] ?? "", line))
  put($("result"), h("h3", {}, "Replayed as ", h("a", {href: "#" + again.id}, `#${again.id}`),
    lines.length ? ", whose response differs:" : ", with the same response"))
  const diff = h("pre", {id: "diff", tabIndex: 0, role: "region", ariaLabel: "Differences"}, ...lines)
  if (lines.length) $("result").append(diff)
  $("result").hidden = false
}
async function openEdit() {
  const {method, target, request} = exchange, fields = $("edit").elements
  const values = {method, target, headers: request.headers.map(field => field.join(": ")).join("\n"), body: ""}
  const bytes = await (await bodyOf(exchange, "request")).arrayBuffer()
  fields.body.disabled = request.size > request.kept
  try {
    values.body = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(bytes)
  } catch {
    fields.body.disabled = true  // not text: it is sent as it was
  }
  for (const name in values) {
    fields[name].value = values[name]
    fields[name].before = fields[name].value  // with the line ends of a form
  }
  showEdit(true)
  fields.method.focus()
}
function showEdit(open) {
  if (!open && $("edit").contains(document.activeElement)) $("change").focus()
  $("edit").hidden = !open
  $("change").ariaExpanded = open
}
function sendEdit() {
  const changed = [...$("edit").elements].filter(field => field.name && field.value !== field.before)
  const edits = Object.fromEntries(changed.map(field => [field.name, field.value]))
  const lines = edits.headers?.split("\n").filter(line => line.trim())
  if (lines) edits.headers = lines.map(line => [line.split(":")[0], line.slice(line.split(":")[0].length + 1).trim()])
  replay(edits)
}

// Buttons and keys

const har = query => save(`har?${query}&${reveal}`, `pytunnel${query.replace("id=", "-")}.har`)
const actions = {
  pause: () => { $("pause").ariaPressed = paused = !paused; pollNow() },
  clear: () => api("clear", {method: "POST"}).then(restart),
  export: () => har(""),
  ask: () => $("help").showModal(),
  more: () => { limit += STEP; pollNow(0) },
  back: () => { location.hash = "" },
  replay: () => replay(),
  change: () => $("edit").hidden ? openEdit() : showEdit(false),
  cancel: () => showEdit(false),
  curl: () => copy(exchange.curl),
  har: () => har(`id=${selected}`),
  reveal: () => { reveal = reveal ? "" : "reveal=1"; $("reveal").ariaPressed = reveal !== ""; load() },
  rows: event => { location.hash = event.target.closest("tr").number },
}
for (const id in actions) $(id).onclick = actions[id]
for (const words of ["", "2xx", "3xx", "4xx", "5xx", "101"]) {
  const properties = {words, ariaPressed: !words, onclick: () => setFilter(words)}
  $("chips").append(h("button", properties, {"": "All", 101: "WebSocket"}[words] ?? words))
}
$("filter").oninput = () => setFilter($("filter").value)
$("edit").onsubmit = event => { event.preventDefault(); sendEdit() }
onkeydown = event => {
  const {key, target} = event
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return
  if (key === "Escape" && !$("edit").hidden) showEdit(false)
  else if (key === "Escape" && target === $("filter") && target.value) setFilter("")
  else if (key === "Escape" && selected) actions.back()
  if (target.matches("input, textarea")) return
  const step = {j: 1, k: -1, ...$("detail").contains(target) ? {} : {ArrowDown: 1, ArrowUp: -1}}[key]
  const control = [...document.querySelectorAll("[aria-keyshortcuts]")].find(node => node.ariaKeyShortcuts === key)
  if (step) move(step)
  else if (!control?.checkVisibility()) return
  else if (control === $("filter")) control.focus()
  else control.click()
  event.preventDefault()
}
onunhandledrejection = event => { event.preventDefault(); toast(event.reason.message) }
document.onvisibilitychange = () => pollNow()
onhashchange = choose
setInterval(countDown, 1000)
setInterval(() => { if (status && changed($("news"), status.total)) put($("news"), `${status.total} requests`) }, 10000)
choose()
poll()
</script>
"""


def _source_hash(tag: str) -> str:
    """Return the page's only script or style as a source that a content security policy allows."""
    source = INSPECTOR_PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


INSPECTOR_FIELDS = {  # of every response: nobody else may frame it, read it, keep it, or take it for something else
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src blob: data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'; "
    f"script-src {_source_hash('script')}; style-src {_source_hash('style')}",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Inspector:
    """Shows a client's log at `url`, and lets those who know `token` replay, clear and stop."""

    def __init__(self, client: TunnelClient, *, port: int = INSPECTOR_PORT, on_stop: Callable[[], None]) -> None:
        self.port = port
        self.token = secrets.token_urlsafe(32)
        self._client, self._log, self._on_stop = client, client.log, on_stop
        self._http: web.Server
        self._listeners: list[asyncio.Server] = []

    async def start(self) -> None:
        """Listen: on `port`, else on one of the next ones, else on any; `port` is then the real one."""
        loop = asyncio.get_running_loop()
        fields = [(name.encode(), value.encode()) for name, value in INSPECTOR_FIELDS.items()]
        self._http = _visitor_server(self._handle, Gate(), fields)
        theirs = {target.port for target in all_targets(self._client.tunnels)}  # also when nothing listens there yet
        for port in [*(port for port in range(self.port, self.port + INSPECTOR_PORTS) if port not in theirs), 0]:
            with contextlib.suppress(OSError):
                listener = socket.create_server(("127.0.0.1", port))
                break
        self._listeners.append(await loop.create_server(self._http, sock=listener))
        self.port = listener.getsockname()[1]
        with contextlib.suppress(OSError):  # for browsers that take localhost for ::1
            self._listeners.append(await loop.create_server(self._http, "::1", self.port))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        """Stop listening, and end the requests that wait for something to show."""
        for listener in self._listeners:
            listener.close()
        if self._listeners:
            await self._http.shutdown(0.2)

    # Requests

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        from aiohttp import web

        try:
            self._admit(request)
            answer = await self._answer(request)
            if isinstance(answer, web.Response):
                response = answer
            else:  # in a thread, as all views of large bodies: the traffic has the event loop
                text = await asyncio.to_thread(json.dumps, answer)
                response = web.Response(text=text, content_type="application/json")
        except (MessageError, web.HTTPRequestEntityTooLarge) as error:
            response = web.json_response({"error": str(error)}, status=error.status)
        except Exception:
            log.exception("the inspector failed")
            response = web.json_response({"error": "a bug in pytunnel"}, status=500)
        for name, value in INSPECTOR_FIELDS.items():
            response.headers.setdefault(name, value)
        return response

    def _admit(self, request: web.BaseRequest) -> None:
        """Let only our own page and command in. Raises MessageError.

        A foreign page shows by its Origin or Sec-Fetch-Site, one whose name was pointed here (DNS rebinding) by Host.
        """
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1:
            raise MessageError("not one Host")
        host, port = parse_host(hosts[0])
        if host not in ("127.0.0.1", "localhost", "[::1]") or (port or 80) != self.port:
            raise MessageError("not this host", 403)
        if request.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            raise MessageError("not from this page", 403)
        if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise MessageError("not from another page", 403)
        if any(name.lower().encode() in FORWARDED | {b"via"} for name in request.headers):
            raise MessageError("not through a tunnel", 403)
        token = request.headers.get("X-Pytunnel-Token", "").encode()
        if request.path != "/" and not hmac.compare_digest(token, self.token.encode()):
            raise MessageError("not without the token", 403)

    async def _answer(self, request: web.BaseRequest) -> web.Response | dict[str, Any]:
        from aiohttp import web

        query, reveal = request.query, "reveal" in request.query
        what = f"{request.method} {re.sub('/[0-9]{1,15}', '/ID', request.path, count=1)}"
        if what == "GET /":
            return web.Response(text=INSPECTOR_PAGE.replace("%TOKEN%", self.token), content_type="text/html")
        acts = {"GET /api/status": lambda: None, "POST /api/clear": self._log.clear, "POST /api/stop": self._on_stop}
        if what in acts:
            acts[what]()
            return self._status()
        if what == "GET /api/exchanges":
            return await self._changes(query)
        if what == "GET /api/har":
            exchanges = [self._find(query["id"])] if "id" in query else list(self._log.exchanges.values())
            return await asyncio.to_thread(as_har, exchanges, self._client.urls_by_name, reveal=reveal)
        if what == "GET /api/wait":
            return await self._wait(query)
        exchange = self._find(re.findall("/([0-9]{1,15})|$", request.path)[0])
        if what == "GET /api/exchanges/ID":
            return await asyncio.to_thread(self._detail, exchange, reveal=reveal)
        if what == "POST /api/exchanges/ID/replay":
            return await self._replay(exchange, await request.read())
        if what == "GET /api/exchanges/ID/body":
            which = "request" if query.get("which") == "request" else "response"
            fields = {"Content-Disposition": f'attachment; filename="{which}-{exchange.id}"'}
            fields["Content-Security-Policy"] = "default-src 'none'; sandbox"
            body = bytes(exchange.request_body if which == "request" else exchange.response_body)
            return web.Response(body=body, content_type="application/octet-stream", headers=fields)
        raise MessageError("nothing here", 404)

    def _find(self, number: str) -> Exchange:
        exchange = self._log.exchanges.get(int(number)) if re.fullmatch("[0-9]{1,15}", number) else None
        if exchange is None:
            raise MessageError("no such exchange: it was cleared, or it made room for newer ones", 404)
        return exchange

    def _status(self) -> dict[str, Any]:
        client, log, urls, totals = self._client, self._log, self._client.urls_by_name, self._log.totals
        retry_in = (client.retry_at or 0.0) - asyncio.get_running_loop().time()
        p50, p90 = log.percentiles() or (None, None)
        return {
            "tunnels": [
                {"name": t.name, "url": urls[t.name], "target": t.target.text, "requests": totals[t.name]}
                for t in client.tunnels
            ],
            "problem": client.problem,
            "retry_in": max(0.0, retry_in) if client.problem else None,
            "round_trip": client.round_trip,
            **{name: getattr(log, name) for name in ("total", "in_flight", "classes", "bytes_in", "bytes_out")},
            "p50": p50,
            "p90": p90,
            "version": log.version,
            "pid": os.getpid(),
            "pytunnel": __version__,
        }

    async def _changes(self, query: Mapping[str, str]) -> dict[str, Any]:
        """What is newer than version `since`, the newest first; waits up to `wait` seconds until there is something."""
        since, words = int(_number(query, "since", 0, 2**53)), query.get("filter", "")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_number(query, "wait", 0, MAX_POLL)):
                await self._client.wait_changed(since)
        changed = (e for e in reversed(self._log.since(since)) if e.matches(words))
        rows = itertools.islice(changed, int(_number(query, "limit", MAX_EXCHANGES, MAX_EXCHANGES)))
        selected = self._log.exchanges.get(int(_number(query, "id", 0, 2**53)))
        return {
            **self._status(),
            "exchanges": [self._row(exchange) for exchange in rows],
            "oldest": next(iter(self._log.exchanges), self._log.total + 1),  # those before it are gone
            "selected": selected and selected.version,
        }

    @staticmethod
    def _row(exchange: Exchange) -> dict[str, Any]:
        summary = exchange.summary()
        return {**summary, "path": summary["path"][:MAX_NOTE], "time": exchange.time, "replay_of": exchange.replay_of}

    def _detail(self, e: Exchange, *, reveal: bool) -> dict[str, Any]:
        def message(headers: Headers, body: bytearray, size: int) -> dict[str, Any]:
            fields, view = text_fields(headers, reveal=reveal), body_view(headers, body, size, reveal=reveal)
            return {"headers": fields, "body": view._asdict(), "size": size, "kept": len(body)}

        return {
            **self._row(e),
            "version": e.version,
            "target": e.target if reveal else mask(e.target),
            "reason": e.reason,
            "timings": timings(e),
            "request": message(e.request_headers, e.request_body, e.bytes_in),
            "response": message(e.response_headers, e.response_body, e.bytes_out),
            "notes": [{**n._asdict(), "data": n.data.decode("utf-8", "backslashreplace")} for n in list(e.notes)],
            "curl": as_curl(e, self._client.urls_by_name[e.tunnel], reveal=reveal),
        }

    async def _wait(self, query: Mapping[str, str]) -> dict[str, Any]:
        wanted = {name: query.get(name, "") for name in ("method", "path", "tunnel")}
        count, after = int(_number(query, "count", 1, 2**53)), int(_number(query, "after", 0, 2**53))
        try:
            timeout = _number(query, "timeout", 60, 2**31)
            return self._row(await self._client.wait_for(**wanted, count=max(count, 1), after=after, timeout=timeout))
        except TimeoutError:
            what = " ".join(filter(None, wanted.values())) or "requests"
            raise MessageError(f"fewer than {count} {what} within {timeout:g} s", 408) from None

    async def _replay(self, exchange: Exchange, text: bytes) -> dict[str, Any]:
        try:
            edits = _edits(exchange, parse_object(text.decode()))
            again = await self._client.replay(exchange, **edits)
        except (AttributeError, TypeError, ValueError) as error:
            raise MessageError(f"not a request: {error}") from None
        return {**self._row(again), "diff": await asyncio.to_thread(diff, exchange, again)}


def _number(query: Mapping[str, str], name: str, default: float, most: float) -> float:
    """Return a parameter between 0 and `most`. Raises MessageError."""
    try:
        return max(0.0, min(float(query.get(name, default)), most))
    except ValueError:
        raise MessageError(f"{name} is not a number") from None


def _edits(exchange: Exchange, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what `replay` takes of an edited request. What was left as it was shown, masked or not, stays as it was.

    Raises ValueError or TypeError.
    """
    edits: dict[str, Any] = {name: str(wanted[name]) for name in ("method", "target") if name in wanted}
    if edits.get("target") == mask(exchange.target):
        del edits["target"]
    new = [edits.get("target", "")]
    if "headers" in wanted:
        headers = exchange.request_headers
        left = list(zip(headers, text_fields(headers), text_fields(headers, reveal=True), strict=True))
        edits["headers"] = []
        for name, value in wanted["headers"]:
            same = next((item for item in left if (name, value) in item[1:]), None)
            if same:
                left.remove(same)
            else:
                new.append(value)
            edits["headers"].append(same[0] if same else (name.encode(), value.encode()))
    if MASK in "".join(new):
        raise ValueError(f"it holds {MASK}, show the secrets before you edit them")
    if "body" in wanted:
        edits["body"] = str(wanted["body"]).encode()
    return edits


# ---- Terminal -------------------------------------------------------------------------------------------------------
# The screen on a real terminal, through a descriptor of its own that never blocks: one that stopped reading holds up
# neither the traffic nor the end. The terminal gets back what it was, whatever happens; Ctrl-Z included.

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[?1000h\x1b[?1006h\x1b[?2004l"  # other screen, no cursor, no wrapping, mouse
_LEAVE = "\x18\x1b[?2026l\x1b[m\x1b[?1006l\x1b[?1000l\x1b[?7h\x1b[?25h\x1b[?1049l"  # CAN ends a frame that was cut


def colours(environment: Mapping[str, str]) -> int:
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return 0
    many = "256" in environment.get("TERM", "") or environment.get("COLORTERM") in ("truecolor", "24bit")
    return 256 if many or "WT_SESSION" in environment else 16


if sys.platform == "win32":

    class TerminalDevice:
        """A Windows console in its ANSI mode; by Microsoft's documentation, no test of ours runs it."""

        poll: ClassVar[float | None] = 1.0  # seconds; nobody tells when the size changes

        def __init__(self, on_input: Callable[[bytes], None], on_ready: Callable[[], None]) -> None:
            import ctypes

            self._on_input, self._on_ready, self._loop = on_input, on_ready, asyncio.get_running_loop()
            self._kernel, self._number = ctypes.windll.kernel32, ctypes.c_ulong
            self._buffer, self._pointer = ctypes.create_unicode_buffer(256), ctypes.byref
            self._in, self._out = (self._kernel.GetStdHandle(number) for number in (-10, -11))
            self._saved = self._number(), self._number()
            self._frames: queue.Queue[str] = queue.Queue()
            self.active = False
            for handle, mode in zip((self._in, self._out), self._saved, strict=True):
                self._kernel.GetConsoleMode(handle, ctypes.byref(mode))
            for work in (self._read, self._write):
                threading.Thread(target=work, daemon=True).start()

        foreground, ready = True, property(lambda self: self.active and self._frames.empty())

        def size(self) -> os.terminal_size:
            return os.get_terminal_size(1)

        def enter(self) -> None:
            self._kernel.SetConsoleMode(self._in, 0x0281)  # processed, extended flags, virtual terminal input
            self._kernel.SetConsoleMode(self._out, 0x000D)  # processed, virtual terminal, no newline at the edge
            self.active = True
            self.write(_ENTER)

        def leave(self) -> None:
            if self.active:
                self.active = False
                self._put(_LEAVE)
                for handle, mode in zip((self._in, self._out), self._saved, strict=True):
                    self._kernel.SetConsoleMode(handle, mode)

        close = leave

        def write(self, text: str) -> None:
            self._frames.put(text)

        def _read(self) -> None:
            count = self._number()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                while self._kernel.ReadConsoleW(self._in, self._buffer, 200, self._pointer(count), None):
                    data = "".join(self._buffer[: count.value]).encode(errors="replace")
                    self._loop.call_soon_threadsafe(self._on_input, data)

        def _write(self) -> None:
            with contextlib.suppress(RuntimeError):
                while text := self._frames.get():
                    self._put(text)
                    self._loop.call_soon_threadsafe(self._on_ready)

        def _put(self, text: str) -> None:
            units = len(text.encode("utf-16-le")) // 2
            self._kernel.WriteConsoleW(self._out, text, units, self._pointer(self._number()), None)

else:

    class TerminalDevice:
        """The terminal of standard input, opened once more, so that not blocking is a matter of this descriptor."""

        poll: ClassVar[float | None] = None

        def __init__(self, on_input: Callable[[bytes], None], on_ready: Callable[[], None]) -> None:
            import termios

            try:
                path = os.ttyname(0)
            except OSError:  # in a container, whose terminal is from outside
                path = "/dev/tty"
            self._on_input, self._on_ready, self._loop = on_input, on_ready, asyncio.get_running_loop()
            self._termios = termios
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
            self._saved = termios.tcgetattr(self._fd)
            self._unsent = b""
            self.active = False

        @property
        def foreground(self) -> bool:
            """Whether the shell lets this process use the terminal."""
            try:
                return os.tcgetpgrp(self._fd) == os.getpgrp()
            except OSError:  # it is not the one that sends us signals
                return True

        @property
        def ready(self) -> bool:
            """Whether the last frame has gone out."""
            return self.active and not self._unsent

        def size(self) -> os.terminal_size:
            return os.get_terminal_size(self._fd)

        def enter(self) -> None:
            """Take the terminal: keys come one by one, Ctrl-C and Ctrl-Z stay signals, Ctrl-S stops nothing."""
            mode = self._termios.tcgetattr(self._fd)
            mode[0] &= ~self._termios.IXON
            mode[3] &= ~(self._termios.ICANON | self._termios.ECHO)
            mode[6][self._termios.VMIN], mode[6][self._termios.VTIME] = 1, 0
            mode[6][self._termios.VQUIT] = b"\0"  # would end the process on the spot
            self._termios.tcsetattr(self._fd, self._termios.TCSANOW, mode)
            self.active = True
            self._loop.add_reader(self._fd, self._read)
            self.write(_ENTER)

        def leave(self) -> None:
            """Give it back as it was. What it has not read yet is thrown away: it may never read again."""
            if not self.active:
                return
            self.active, self._unsent = False, b""
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
                self._loop.remove_writer(self._fd)
            with contextlib.suppress(OSError, self._termios.error):  # it is gone
                self._termios.tcsetattr(self._fd, self._termios.TCSANOW, self._saved)
                self._termios.tcflush(self._fd, self._termios.TCOFLUSH)
                os.write(self._fd, _LEAVE.encode())

        def close(self) -> None:
            self.leave()
            os.close(self._fd)

        def write(self, text: str) -> None:
            """Write, now and as soon as it can be."""
            self._unsent += text.encode()
            self._flush()

        def _flush(self) -> None:
            try:
                self._unsent = self._unsent[os.write(self._fd, self._unsent) :]
            except BlockingIOError:
                pass
            except OSError:  # it is gone, and SIGHUP on its way
                self._unsent = b""
            if self._unsent:
                self._loop.add_writer(self._fd, self._flush)
            else:
                self._loop.remove_writer(self._fd)
                self._on_ready()

        def _read(self) -> None:
            try:
                data = os.read(self._fd, 4096)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._on_input(data)
            else:
                self._loop.remove_reader(self._fd)


class Terminal:
    """Shows a client on this process's terminal while its context lasts; `stop` is what the key q calls."""

    def __init__(
        self,
        client: TunnelClient,
        stop: Callable[[], None],
        *,
        inspector_url: str = "",
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._stop, self._inspector_url, self._on_failure = client, stop, inspector_url, on_failure
        self._screen, self._reader = Screen(), KeyReader()
        self._keys: list[str] = []
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._device = TerminalDevice(self._receive, self._wake.set)
        self._drawn: list[str] = []
        self._size = os.terminal_size((0, 0))
        self._notice_until = 0.0
        self._escape: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        handlers = {"SIGWINCH": self._wake.set, "SIGTSTP": self._suspend, "SIGCONT": self._resume}
        self._signals = {getattr(signal, name): handlers[name] for name in handlers if hasattr(signal, name)}

    async def __aenter__(self) -> Terminal:
        atexit.register(self._device.leave)
        self._client.log.listeners.add(self._wake.set)
        for number, handler in self._signals.items():
            self._loop.add_signal_handler(number, handler)
        self._resume()
        self._own(self._show())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()
        self._device.close()
        await end_tasks(*self._tasks)

    def _end(self) -> None:
        self._device.leave()
        atexit.unregister(self._device.leave)
        self._client.log.listeners.discard(self._wake.set)
        for number in self._signals:
            self._loop.remove_signal_handler(number)

    def notice(self, text: str) -> None:
        """Show a line at the bottom for NOTICE seconds."""
        self._screen.notice, self._notice_until = text, self._loop.time() + NOTICE
        self._wake.set()

    # Frames

    async def _show(self) -> None:
        try:
            while True:
                self._wake.clear()
                if not self._device.active:
                    self._resume()  # a shell does not tell when `fg` takes it from the background
                if self._keys or self._device.ready:
                    await self._draw()
                await asyncio.sleep(FRAME)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_next()):
                        await self._wake.wait()
        except Exception:
            self._end()  # the tunnel goes on without a view
            self._on_failure()
            log.exception("the terminal view failed")

    def _until_next(self) -> float | None:
        """Return seconds until something changes by itself."""
        if not self._device.active:
            return 1.0
        waits = [self._notice_until - self._loop.time()] if self._screen.notice else []
        if self._client.log.in_flight or self._client.retry_at is not None:
            waits.append(1.0)
        return min(waits, default=self._device.poll)

    async def _draw(self) -> None:
        """Take the keys and bring the terminal up to date. Bodies and filters may be large: a thread arranges them."""
        size, client, screen = self._device.size(), self._client, self._screen
        if size != self._size:
            self._size, self._drawn = size, []
        if self._loop.time() >= self._notice_until:
            screen.notice = ""
        urls = client.urls_by_name
        snapshot = Snapshot(
            screen,
            now=self._loop.time(),
            tunnels=[(t.name, urls[t.name], t.target.text) for t in client.tunnels],
            inspector_url=self._inspector_url,
            problem=client.problem,
            retry_at=client.retry_at,
            round_trip=client.round_trip,
            log=client.log,
            exchanges=list(client.log.exchanges.values()),
            colours=colours(os.environ),
            utc_offset=time.localtime().tm_gmtoff,
        )
        width, height = size.columns or 80, size.lines or 24
        await asyncio.to_thread(screen.arrange, snapshot, width, height)
        while self._keys:
            self._act(screen.key(self._keys.pop(0)))
            await asyncio.to_thread(screen.arrange, snapshot, width, height)
        lines = await asyncio.to_thread(render, snapshot, width, height)
        pairs = zip(lines, self._drawn or [""] * height, strict=True)
        changed = [] if self._drawn else ["\x1b[2J"]
        changed += [f"\x1b[{row};1H\x1b[2K{line}" for row, (line, old) in enumerate(pairs, 1) if line != old]
        if changed and self._device.ready:  # or it shows with what comes next
            self._device.write(f"\x1b[?2026h{''.join(changed)}\x1b[?2026l")
            self._drawn = lines

    # Keys and signals

    def _receive(self, data: bytes) -> None:
        if self._escape:
            self._escape.cancel()
        self._press(self._reader.feed(data))
        self._escape = self._loop.call_later(ESCAPE, lambda: self._press(self._reader.flush()))

    def _press(self, keys: Iterator[str]) -> None:
        self._keys += keys
        self._wake.set()

    def _suspend(self) -> None:
        self._device.leave()
        self._loop.remove_signal_handler(signal.SIGTSTP)
        signal.raise_signal(signal.SIGTSTP)  # not SIGSTOP: where no shell could continue it, this one does nothing
        self._loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        self._resume()

    def _resume(self) -> None:
        if self._device.foreground:
            self._device.enter()
            self._drawn = []
            self._wake.set()

    # Actions

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _act(self, action: Action | None) -> None:
        exchange = self._screen.exchange
        if action == "quit":
            if running := self._client.log.in_flight:
                self.notice(f"finishing what still runs ({running}); q again to stop now")
            self._stop()
        elif action == "copy":
            self._copy()
        elif action == "replay" and exchange:
            self._own(self._replay(exchange))
        elif action == "export" and self._screen.shown:
            self._own(self._export([self._screen.opened] if self._screen.opened else self._screen.shown[::-1]))

    async def _replay(self, exchange: Exchange) -> None:
        try:
            self._screen.select(await self._client.replay(exchange))
        except MessageError as error:
            self.notice(f"not replayed: {error}")
        self._wake.set()

    def _copy(self) -> None:
        """Put a text into the clipboard, through the terminal (OSC 52), and through tmux when it is there."""
        text, exchange, reveal = self._client.url, self._screen.opened, self._screen.reveal
        if exchange:
            text = as_curl(exchange, self._client.urls_by_name[exchange.tunnel], reveal=reveal)
        encoded = base64.b64encode(text.encode()).decode()
        if not text or len(encoded) > MAX_CLIPBOARD:
            return self.notice(f"{human_size(len(text))} are too long for the clipboard" if text else "no URL yet")
        command = f"\x1b]52;c;{encoded}\x07"
        self._device.write(command + (f"\x1bPtmux;\x1b{command}\x1b\\" if "TMUX" in os.environ else ""))
        self.notice(f"copied {text}" if not exchange else f"copied as curl, {'with' if reveal else 'without'} secrets")

    async def _export(self, exchanges: list[Exchange]) -> None:
        reveal = self._screen.reveal

        def write() -> str:
            for number in itertools.count():
                path = f"pytunnel-{time.strftime('%Y%m%d-%H%M%S')}{f'-{number}' if number else ''}.har"
                with contextlib.suppress(FileExistsError):
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                    with open(descriptor, "w", encoding="utf-8") as file:
                        json.dump(as_har(exchanges, self._client.urls_by_name, reveal=reveal), file)
                    return path
            raise AssertionError

        try:
            path = await asyncio.to_thread(write)
        except OSError as error:
            return self.notice(f"not exported: {_describe(error)}")
        self.notice(f"exported {len(exchanges)} to {path}, {'with' if reveal else 'without'} secrets")


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


def demo_service() -> contextlib.AbstractAsyncContextManager[int]:
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
    return _running(app)


# ---- Settings -------------------------------------------------------------------------------------------------------
# Where values come from, and what is remembered between runs.


def state_directory() -> Path:
    """Return the directory for what is kept between runs: $PYTUNNEL_STATE_DIR, systemd's, or the user's own."""
    for variable in ("PYTUNNEL_STATE_DIR", "STATE_DIRECTORY"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    return user_directory("state")


def user_directory(kind: str) -> Path:
    """Return this user's directory for `state` or `config`. Raises UsageError when there is no home."""
    import platformdirs

    try:
        return Path(getattr(platformdirs, f"user_{kind}_dir")("pytunnel"))
    except RuntimeError:
        variables = "HOME, or PYTUNNEL_STATE_DIR and PYTUNNEL_CONFIG"
        raise UsageError(f"this user has no home directory; set {variables}") from None


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


def parse_ports(text: str) -> tuple[str | None, range]:
    """Return host and ports of `HOST:FIRST-LAST`, `FIRST-LAST` or one port; see `parse_listen`. Raises UsageError."""
    match = re.fullmatch(r"(.*?)([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    what = f"--tcp-ports {escape(text)}"
    if not match or (match[1] and not match[1].endswith(":")):
        raise UsageError(f"{what}: give FIRST-LAST, like 20000-20100")
    ports = range(int(match[2]), int(match[3] or match[2]) + 1)
    if not ports:
        raise UsageError(f"{what}: the first port comes first, like 20000-20100")
    if ports[0] == 0 or ports[-1] > 65535:
        raise UsageError(f"{what}: ports are within 1 to 65535")
    if len(ports) > MAX_TCP_PORTS:
        raise UsageError(f"{what}: these are {len(ports)}; give {MAX_TCP_PORTS} at most")
    host, _ = parse_listen(f"{match[1]}{ports[0]}")
    return host, ports


def read_token(path: str, source: str) -> str:
    """Return the first line of a file, `-` is stdin. Raises UsageError, which does not tell what `path` is: a token?"""
    line = b""
    try:
        with open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-") as file:
            while len(line) < MAX_HELLO and (byte := file.read(1)) not in (b"\n", b"", None):
                line += byte  # one by one: what follows on stdin is for somebody else
        if token := line.decode().strip():
            return token
    except OSError as error:
        raise UsageError(f"{source}: {_describe(error)}; give a file with the token, or - for stdin") from None
    except ValueError:
        pass
    raise UsageError(f"{source}: its first line is no token; write one there")


def given_tokens(flags: Mapping[str, Any]) -> Iterator[tuple[str | None, str]]:
    """Yield the tokens of flags and environment, and where each comes from. Raises UsageError."""
    yield flags.get("token"), "--token"
    if flags.get("token_file"):
        yield read_token(flags["token_file"], "--token-file"), "--token-file"
    yield os.environ.get("PYTUNNEL_TOKEN"), "$PYTUNNEL_TOKEN"
    if os.environ.get("PYTUNNEL_TOKEN_FILE"):
        yield read_token(os.environ["PYTUNNEL_TOKEN_FILE"], "$PYTUNNEL_TOKEN_FILE"), "$PYTUNNEL_TOKEN_FILE"


def without_flags(words: Iterable[str], flags: Collection[str]) -> list[str]:
    """Return a command line without these flags and their values."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in flags:
            next(rest, None)
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def hide_flags(flags: Iterable[str]) -> list[str]:
    """Overwrite the values of these flags in what `ps` shows of this process; return the flags that it goes on to show.

    Linux shows the memory in which the process was given its arguments; elsewhere it is a copy.
    """
    line = b"\0".join(map(os.fsencode, sys.orig_argv)).partition(b"\0--\0")[0]  # what follows is COMMAND's
    names = b"|".join(re.escape(flag.encode()) for flag in flags)
    found = list(re.finditer(rb"\0(%b)[=\0]([^\0]+)" % names, line))
    try:
        for match in found:
            start = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[45])  # arg_start, see proc(5)
            with open("/proc/self/mem", "r+b", buffering=0) as memory:
                memory.seek(start + match.start(2))
                if memory.read(len(match[2])) != match[2]:
                    raise ValueError
                memory.seek(start + match.start(2))
                memory.write(b"*" * len(match[2]))
    except (OSError, ValueError, IndexError):
        return [match[1].decode() for match in found]
    return []


class Memory:
    """What the client remembers of servers it was connected to."""

    def __init__(self, directory: Path) -> None:
        """Read it; what is damaged is no memory. Raises TunnelError when other users have access to it."""
        self._path = directory / "client.json"
        self.directory = directory
        self.server = ""
        self.tokens: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            saved = parse_object(read_private(self._path))
            self.server = str(saved["server"])
            self.tokens = {str(server): str(token) for server, token in saved["tokens"].items()}

    def remember(self, server: str, token: str) -> None:
        """Keep what worked. A disk that does not let us is no reason to stop."""
        if (self.server, self.tokens.get(server)) != (server, token):
            self.server, self.tokens[server] = server, token
            try:
                write_private(self._path, json.dumps({"server": server, "tokens": self.tokens}, indent=1))
            except OSError as error:
                log.warning("server and token are not kept, so give them again next time: %s", error)

    def machine(self) -> str:
        """Return what tells this machine from the user's others, so that its tunnels' names stay."""
        try:
            return read_or_make(self.directory / "machine", lambda: secrets.token_hex(8))
        except (OSError, UnicodeDecodeError):
            return platform.node()


class Setting(NamedTuple):
    """A value, and where it comes from."""

    value: str
    source: str

    @classmethod
    def first(cls, candidates: Iterable[tuple[str | None, str]]) -> Setting:
        """Return the first of the candidates that has a value, else nothing from nowhere; later ones are not made."""
        return next((cls(value, source) for value, source in candidates if value), cls("", "not set"))


SETTINGS = {"server": str, "token": str, "tunnels": dict}  # of a settings file
TUNNEL_FLAGS = {  # of `connect`, and settings of each tunnel in a file: type, what stands for the value, help
    "route": (list, "P=TARGET", "where requests below a path go"),
    "host-header": (str, "H", "the Host for the local service; `rewrite`: its own"),
    "header": (list, "'K: V'", "put a field into each request"),
    "remove-header": (list, "K", "drop a field from each request"),
    "response-header": (list, "'K: V'", "the same for responses"),
    "remove-response-header": (list, "K", "the same for responses"),
    "auth": (list, "USER:PASS", "let in only visitors who know the password"),
    "allow": (list, "CIDR", "let in only visitors from this network or address"),
    "pass-auth": (bool, "", "the local service gets the visitor's password, too"),
    "remote-port": (int, "N", "tcp: this port on the server"),
    "spa": (bool, "", "a folder: its index.html for pages that are no file"),
    "insecure": (bool, "", "do not verify a local service's certificate"),
}
TUNNEL_SETTINGS = {"target": str, **{name: type_ for name, (type_, _, _) in TUNNEL_FLAGS.items()}}


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a settings file (TOML) says, {} when there is none. Raises UsageError that says what is wrong."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {escape(str(error))}") from None
    _check_settings(settings, SETTINGS, f"{path}: ")
    try:
        parse_server(settings.get("server", "localhost"))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    for name, tunnel in settings.get("tunnels", {}).items():
        where = f"{path}: tunnel {escape(name)}: "
        if not isinstance(tunnel, dict):
            raise UsageError(f'{where}it is not a table; write [tunnels.{escape(name)}] and below it target = "3000"')
        if type(tunnel.get("target")) is int:  # a port needs no quotes
            tunnel["target"] = str(tunnel["target"])
        _check_settings(tunnel, TUNNEL_SETTINGS, where)
        if "target" not in tunnel:
            raise UsageError(f'{where}it has no target; add one, like target = "3000"')
    return settings


def _check_settings(settings: dict[str, Any], known: Mapping[str, type], where: str) -> None:
    for key, value in settings.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise UsageError(f"{where}unknown setting {escape(key)!r}; did you mean {nearest!r}?")
        items = value if isinstance(value, list) else []
        if type(value) is not known[key] or any(not isinstance(item, str) for item in items):
            kinds = {str: "text in quotes", list: "a list of texts", bool: "true or false", dict: "a table"}
            kind = kinds.get(known[key], "a whole number")
            example = f'; write {key} = ["…"]' if known[key] is list else ""
            raise UsageError(f"{where}{key} is not {kind}{example}")


class Settings:
    """What a client uses: a flag, else the environment, else a file, else what worked before, else a default."""

    def __init__(self, flags: Mapping[str, Any], *, project: bool = False) -> None:
        """Read them; `project` says that ./pytunnel.toml counts. Raises UsageError."""
        self._flags = flags
        self.memory = Memory(state_directory())
        own = os.environ.get("PYTUNNEL_CONFIG") or user_directory("config") / "config.toml"
        self.files = {path: read_settings(path) for path in [Path("pytunnel.toml")] * project + [Path(own)]}
        kept = [(file.get("server"), str(path)) for path, file in self.files.items()]
        last = (self.memory.server, "the last one that worked"), ("localhost", "default")
        server, source = Setting.first([*self._given("server", "PYTUNNEL_SERVER"), *kept, *last])
        try:
            self.server = Setting(parse_server(server), source)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
        self.token = Setting.first(itertools.chain(given_tokens(flags), self._kept_tokens()))

    def _given(self, key: str, variable: str) -> list[tuple[str | None, str]]:
        return [(self._flags.get(key), f"--{key}"), (os.environ.get(variable), f"${variable}")]

    def _kept_tokens(self) -> Iterator[tuple[str | None, str]]:
        for path, file in self.files.items():
            if parse_server(file.get("server") or self.server.value) == self.server.value:  # else it is another's
                yield file.get("token"), str(path)
        yield self.memory.tokens.get(self.server.value), "the one that worked for this server"
        if Origin.from_url(self.server.value).zone == "localhost":
            with contextlib.suppress(OSError, UnicodeDecodeError):
                path = Tokens(self.memory.directory).default_path
                yield read_private(path).strip(), str(path)

    def checked_token(self) -> str:
        """Return the token. Raises UsageError when there is none."""
        if not self.token.value:
            advice = f"run pytunnel login {self.server.value} with what `pytunnel serve` printed there"
            raise UsageError(f"no token for {self.server.value}: {advice}, or set PYTUNNEL_TOKEN")
        return check_token(self.token.value, f"copy the whole of what `pytunnel serve` printed ({self.token.source})")

    def from_targets(self, texts: Sequence[str]) -> list[Tunnel]:
        """Return the tunnels of targets like `3000` or `web=3000`. Raises UsageError or Refused."""
        name = Setting.first(self._given("name", "PYTUNNEL_NAME")).value
        tunnels = []
        for text in texts:
            label, separator, rest = text.partition("=") if re.match(r"[^:/\\]+=", text) else ("", "", text)
            if name and (separator or len(texts) > 1):
                raise UsageError("--name and PYTUNNEL_NAME are for one target; write NAME=TARGET, like web=3000")
            if self._flags.get("remote_port") and len(texts) > 1:
                raise UsageError("--remote-port is for one target; for each its own, use pytunnel.toml and start")
            tunnels.append(self._tunnel(label if separator else name, rest, self._flags))
        if len({tunnel.name for tunnel in tunnels}) < len(tunnels):
            raise UsageError("two targets with one name; give each its own, like web=3000 api=8080")
        return tunnels

    def named(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return the tunnels of the files by name: which file, and what it says. ./pytunnel.toml counts first."""
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for path, file in self.files.items():
            for name, table in file.get("tunnels", {}).items():
                found.setdefault(name, (str(path), table))
        return found

    def from_file(self, name: str) -> Tunnel:
        """Return one of these tunnels. Raises UsageError with its file and name."""
        path, table = self.named()[name]
        try:
            return self._tunnel(name, table["target"], {key.replace("-", "_"): value for key, value in table.items()})
        except UsageError as error:
            raise UsageError(f"{path}: tunnel {escape(name)}: {error}") from None

    def _tunnel(self, name: str, target: str, options: Mapping[str, Any]) -> Tunnel:
        parsed = Target.parse(target)
        routes = []
        for text in options.get("route") or ():
            prefix, separator, rest = text.partition("=")
            if not separator or not prefix.startswith("/"):
                raise UsageError(f"{escape(text)!r} is not a route: write PATH=TARGET, like /api=8080")
            routes.append((prefix.rstrip("/"), Target.parse(rest)))
        host = options.get("host_header") or ""
        if host and host != "rewrite":
            try:
                parse_host(host)
            except MessageError:
                raise UsageError(f"{escape(host)!r} is not a host; give one, or `rewrite` for the target's") from None
        for key in ("auth", "allow"):
            if options.get(key) == []:
                raise UsageError(f"{key} is an empty list, which would let everybody in; leave it out, or fill it")
        given = os.environ["PYTUNNEL_AUTH"].split("\n") if "PYTUNNEL_AUTH" in os.environ else []  # "" is an error
        auth = self._flags.get("auth") or given or options.get("auth") or ()
        self._check_kind(parsed, {**options, "auth": auth})
        if any(target.tcp for _, target in routes):
            raise UsageError("a route leads to HTTP, not to TCP")
        return Tunnel(
            check_name(name) if name else default_name(self.checked_token(), self.memory.machine(), parsed.text),
            parsed,
            tuple(routes),
            host,
            Edits.parse(options.get("header") or (), options.get("remove_header") or ()),
            Edits.parse(options.get("response_header") or (), options.get("remove_response_header") or ()),
            bool(options.get("insecure")),
            bool(options.get("spa")),
            Access.parse(options.get("allow") or (), auth, bool(options.get("pass_auth")), secrets.token_bytes(16)),
            options.get("remote_port") or 0,
        )

    @staticmethod
    def _check_kind(target: Target, options: Mapping[str, Any]) -> None:
        """Check that a tunnel has no options of the other kind. Raises UsageError."""
        for key in TUNNEL_FLAGS:
            if key != "allow" and options.get(key.replace("-", "_")) and target.tcp != (key == "remote-port"):
                is_http = f"--{key} is for HTTP, and {target.text} is TCP, which may have --allow and --remote-port"
                raise UsageError(is_http if target.tcp else f"--{key} is for TCP; write tcp:{target.text}")
        if not 0 <= (options.get("remote_port") or 0) <= 65535:
            raise UsageError(f"--remote-port {options['remote_port']} is no port; it must be within 1 to 65535")


# ---- Running clients ------------------------------------------------------------------------------------------------
# A client leaves a private note of itself, so that other commands find it and talk to it through its inspector.


class Run:
    """A client that runs on this machine: its tunnels, and the way to its inspector."""

    def __init__(self, path: Path, note: Mapping[str, Any]) -> None:
        self.path, self.tunnels = path, list(note["tunnels"])  # of each: name, url, target
        self.pid, self.inspector, self._token = int(note["pid"]), str(note["inspector"]), str(note["token"])

    @staticmethod
    @contextlib.contextmanager
    def noted(inspector: Inspector) -> Iterator[Callable[[TunnelClient], None]]:
        """Give a function that leaves the note of a client; it is removed when the context ends."""
        path = state_directory() / "run" / f"{os.getpid()}.json"

        def leave(client: TunnelClient) -> None:
            urls = client.urls_by_name
            tunnels = [{"name": t.name, "url": urls[t.name], "target": t.target.text} for t in client.tunnels]
            note = {"pid": os.getpid(), "inspector": inspector.url, "token": inspector.token, "tunnels": tunnels}
            with contextlib.suppress(OSError):  # a full disk is no reason to stop
                write_private(path, json.dumps(note))

        try:
            yield leave
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # unless there is more in them
                path.parent.rmdir()
                path.parent.parent.rmdir()

    @classmethod
    def all(cls) -> list[Run]:
        """Return the clients that run here; what killed ones have left is removed."""
        runs = []
        for path in sorted((state_directory() / "run").glob("*.json")):
            try:
                run = cls(path, parse_object(path.read_text(encoding="utf-8")))
                try:
                    if run.ask("/api/status", within=2.0)["pid"] != run.pid:
                        raise LookupError("another one has this port now")
                except Unreachable:  # it is stopped, or busy, or it was killed and something silent has its port
                    if os.name == "posix":
                        os.kill(run.pid, 0)
                runs.append(run)
            except (OSError, ValueError, LookupError, TypeError, TunnelError):
                path.unlink(missing_ok=True)
        return runs

    @classmethod
    def find(cls, name: str | None) -> Run:
        """Return the client that has a tunnel of this name, without one the only client. Raises TunnelError."""
        runs = cls.all()
        fitting = [run for run in runs if not name or name in run.names]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(name for run in runs for name in run.names)
        if not runs:
            raise TunnelError("no client runs here; start one with pytunnel connect")
        raise TunnelError(f"which tunnel? these run here: {escape(names)}")

    @property
    def names(self) -> list[str]:
        return [str(tunnel["name"]) for tunnel in self.tunnels]

    def ask(self, path: str, /, *, post: bool = False, within: float = 10.0, **query: object) -> Any:
        """Return the inspector's answer: an object, or bytes that are no JSON.

        Raises TunnelError with its reason, Unreachable when it does not answer in time.
        """
        import http.client
        import urllib.request

        url = self.inspector + path + ("?" + urllib.parse.urlencode(query) if query else "")
        request = urllib.request.Request(url, b"{}" if post else None, {"X-Pytunnel-Token": self._token})
        request.add_header("Content-Type", "application/json")
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=within) as response:
                kind = response.headers.get_content_type()
                if kind not in ("application/json", "application/octet-stream"):
                    raise ValueError("something else answers there")
                data: bytes = response.read(MAX_LOG)
                return parse_object(data.decode()) if kind == "application/json" else data
        except urllib.error.HTTPError as error:
            with error, contextlib.suppress(ValueError):
                raise TunnelError(escape(str(parse_object(error.read().decode()).get("error")))) from None
            raise TunnelError(f"the client answered with HTTP status {error.code}") from None
        except TimeoutError:
            raise Unreachable(f"process {self.pid} does not answer") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise TunnelError(f"no client at {self.inspector}: {_describe(error)}") from None


# ---- Python API -----------------------------------------------------------------------------------------------------
# What the commands do, for a test suite or a notebook.


@contextlib.asynccontextmanager
async def open_folders(tunnels: Iterable[Tunnel]) -> AsyncIterator[list[Tunnel]]:
    """Serve the folders among the targets while the context lasts, and give the tunnels that lead there."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(target: Target, spa: bool) -> Target:
            if not target.folder:
                return target
            port = await stack.enter_async_context(folder_service(Path(target.host), spa=spa))
            return target._replace(host="127.0.0.1", port=port, folder=False)

        yield [
            tunnel._replace(
                target=await opened(tunnel.target, tunnel.spa),
                routes=tuple([(prefix, await opened(target, tunnel.spa)) for prefix, target in tunnel.routes]),
            )
            for tunnel in tunnels
        ]


@contextlib.asynccontextmanager
async def connect(
    *targets: int | str,
    server: str = "",
    token: str = "",
    name: str = "",
    host_header: str = "",
    header: Sequence[str] = (),
    remove_header: Sequence[str] = (),
    response_header: Sequence[str] = (),
    remove_response_header: Sequence[str] = (),
    route: Sequence[str] = (),
    auth: Sequence[str] = (),
    allow: Sequence[str] = (),
    pass_auth: bool = False,
    remote_port: int = 0,
    spa: bool = False,
    insecure: bool = False,
) -> AsyncIterator[TunnelClient]:
    """Give local services public URLs while the context lasts; it is entered when they work.

    The arguments are those of the command line, like `connect(3000, name="web")`, `connect("web=3000", "api=8080")`
    or `connect("./dist", spa=True)`. The client has `url` and `urls`, `wait_for`, `replay`, and the exchanges in its
    `log`. Raises TunnelError, also at the end when the session was lost for good.
    """
    settings = Settings(locals())
    async with open_folders(settings.from_targets([str(target) for target in targets])) as tunnels:
        live = asyncio.Event()
        token, on_event = settings.checked_token(), lambda event, **_: live.set() if event == "ready" else None
        client = TunnelClient(settings.server.value, token, tunnels, on_event=on_event)
        running, waiting = asyncio.ensure_future(client.run()), asyncio.ensure_future(live.wait())
        try:
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            yield client
            client.stop()
            await asyncio.wait([running], timeout=1.0)  # for responses that are on their way
            if running.done():
                running.result()
        finally:
            waiting.cancel()
            client.stop()
            client.stop()
            await asyncio.gather(waiting, running, return_exceptions=True)


class Served(NamedTuple):
    """A server that runs, and what a client needs to use it."""

    url: str
    token: str
    server: TunnelServer

    def __repr__(self) -> str:
        return f"Served({self.url!r})"  # test reports show it


@contextlib.asynccontextmanager
async def serve(
    listen: str = "127.0.0.1:0", *, token: str = "", state: Path | None = None, tcp_ports: str = ""
) -> AsyncIterator[Served]:
    """Run a server while the context lasts, with `url` and `token` for clients. Raises TunnelError.

    Which name belongs to which token is kept in the directory `state`, else nowhere. `tcp_ports` are for TCP tunnels,
    like `127.0.0.1:20000-20100`.
    """
    import tempfile

    address = parse_listen(listen)
    token = check_token(token or make_token())
    with tempfile.TemporaryDirectory(prefix="pytunnel-") as directory:
        kept, tcp = state or Path(directory), parse_ports(tcp_ports) if tcp_ports else (None, range(0))
        server = TunnelServer(tokens=[token], state=kept, listen=[address], tcp_host=tcp[0], tcp_ports=tcp[1])
        await server.start()
        try:
            yield Served(f"http://{_dialled(address[0], '127.0.0.1')}:{server.port}", token, server)
        finally:
            await server.close()


# ---- Doctor ---------------------------------------------------------------------------------------------------------
# The way from here to the server and a visitor's way back, checked one step after another: what was found, and what to
# do about it. No check raises, and none takes longer than CHECK_TIMEOUT.

Verdict = tuple[bool | None, str, str]  # of a check: all but the first field of a Finding, in order
UPGRADE_ADVICE = {  # what stands in front, as its Server or Via field says -> how WebSockets get through it
    "cloudflare": "Turn on WebSockets in Cloudflare's dashboard, under Network.",
    "caddy": """Caddy passes WebSockets on when nothing else in the site's block is in the way of this:
    reverse_proxy 127.0.0.1:8080 {
        flush_interval 10ms
    }""",
    "": """What stands in front has to pass Upgrade on. In nginx that takes a map, and three lines in the location:
map $http_upgrade $connection_upgrade {
    default upgrade;
    ''      '';
}
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;""",
}
SERVER_ADVICE = "See that pytunnel serve runs there, and that the firewall and what stands in front lead to its port."
CERTIFICATE_ADVICE = "Renew it; or when its authority is your own, put that one's certificate into SSL_CERT_FILE."
HOST_ADVICE = """What stands in front has to pass Host on as it is. Caddy does; in nginx's location that takes:
        proxy_set_header Host $http_host;"""
IDLE_ADVICE = f"""What stands in front has to bear {PING_INTERVAL:g} s of silence. In nginx's location that takes:
        proxy_read_timeout 1d;
        proxy_send_timeout 1d;"""


class Finding(NamedTuple):
    """What a check has found: `ok` is None when it cannot tell, or when what it found may be on purpose."""

    what: str
    ok: bool | None
    detail: str
    advice: str  # a sentence, and below it what to write into a configuration; or nothing


class Doctor:
    """The checks of a server, to be made in this order, as later ones go by what earlier ones have found."""

    def __init__(self, server: str, token: str, http: aiohttp.ClientSession, stack: contextlib.AsyncExitStack) -> None:
        self._server, self._token, self._http, self._stack = server, token, http, stack
        self._at = urllib.parse.urlsplit(server)
        self._url = Origin.from_url(server).url(f"doctor-{secrets.token_hex(4)}")  # until the login gives a real one
        self.through = self._front = self._date = ""  # the proxy on this side; what stands in front on the other
        self._addresses: set[str] = set()
        self.client: TunnelClient | None = None

    async def proxy(self) -> Verdict:
        import urllib.request

        if not urllib.request.proxy_bypass(str(self._at.hostname)):
            self.through = urllib.request.getproxies().get(self._at.scheme, "")
        if not self.through:
            return True, "none on the way to this server", ""
        detail = f"{self.through.rpartition('@')[2]}, as {self._at.scheme.upper()}_PROXY says"
        if self.through.startswith("http://"):
            return True, detail, ""
        return False, detail, "Only a proxy at http:// can be used; or name the server's host in NO_PROXY."

    async def address(self) -> Verdict:
        host = str(self._at.hostname)
        self._addresses = await self._resolve(host)
        if not self._addresses:
            advice = f"Check the spelling, or add a DNS record for {host} with the server's address."
            return None if self.through else False, f"{host} has no address", advice
        return True, f"{host} is at {', '.join(sorted(self._addresses))}", ""

    async def certificate(self) -> Verdict:
        host, context = self._at.hostname, ssl.create_default_context()
        _, writer = await asyncio.open_connection(host, self._at.port or 443, ssl=context, server_hostname=host)
        certificate = writer.get_extra_info("peercert")
        writer.transport.abort()
        left = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
        names = ", ".join(name for _, name in certificate.get("subjectAltName", ()))
        advice = "See why nothing has renewed it: `certbot renew`, or Caddy's log." if left < EXPIRES_SOON else ""
        return None if advice else True, f"trusted until {certificate['notAfter']}, for {names}", advice

    async def answers(self) -> Verdict:
        status, headers = await self._get(self._server)
        self._front = f"{headers.get('Server', '')} {headers.get('Via', '')}".strip()
        self._date, problem, location = (headers.get(name, "") for name in ("Date", "X-Pytunnel-Error", "Location"))
        if problem == "not-a-link":
            return True, f"pytunnel answers{' through ' * bool(self._front)}{self._front}", ""
        if problem:
            return False, f"pytunnel answers {status} {problem}", "Dial the server's own host, not a tunnel's."
        if location:
            location = location.removesuffix(LINK_PATH)
            return False, f"a redirect to {location}", "Give --server the address that it leads to."
        return False, f"something else answers: status {status}, {self._front or 'with no Server field'}", SERVER_ADVICE

    async def clock(self) -> Verdict:
        ahead = time.time() - email.utils.parsedate_to_datetime(self._date).timestamp()
        if abs(ahead) <= MAX_SKEW:
            return True, "this machine and the server agree", ""
        detail = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server"
        return False, detail, "Set the one that is wrong, as by `timedatectl set-ntp true`: certificates depend on it."

    async def upgrade(self) -> Verdict:
        import aiohttp

        url, patience = self._server + LINK_PATH, aiohttp.ClientWSTimeout(ws_close=1.0)
        try:
            async with self._http.ws_connect(url, protocols=(SUBPROTOCOL,), compress=0, timeout=patience) as ws:
                if ws.protocol == SUBPROTOCOL:
                    return True, "gets through", ""
        except aiohttp.WSServerHandshakeError as error:
            advice = next(text for front, text in UPGRADE_ADVICE.items() if front in self._front.lower())
            return False, f"refused with status {error.status}", advice
        return False, f"opened, but without {SUBPROTOCOL}", "Sec-WebSocket-Protocol has to be passed on, too."

    async def login(self) -> Verdict:
        """From here on there is a tunnel, to where nothing listens, so that visitors get to hear just that."""
        name = default_name(self._token, platform.node(), "doctor")  # one and the same, for the server keeps names
        tunnel = connect("127.0.0.1:1", server=self._server, token=self._token, name=name)
        self._stack.enter_context(contextlib.suppress(TunnelError))  # at the end, of a session that was lost for good
        try:
            self.client = await self._stack.enter_async_context(tunnel)
        except Refused as error:
            if error.code not in ("name", "limit"):
                raise
            return None, f"the server knows the token, but gives no tunnel to try: {error}", ""
        self._url = self.client.url
        return True, "the server knows the token, and gives tunnels", ""

    async def names(self) -> Verdict:
        host = str(urllib.parse.urlsplit(self._url).hostname)
        wildcard = f"*.{host.partition('.')[2]}"
        records = "".join(f"\n    {wildcard}. {'AAAA' if ':' in ip else 'A'} {ip}" for ip in sorted(self._addresses))
        found = await self._resolve(host)
        if not found:
            advice = f"Add the DNS record that leads all names to the server:{records}"
            if host.endswith(".sslip.io"):
                advice = "Your resolver does not answer for sslip.io: use another one, or a domain of your own."
            return None if self.through else False, f"{host} has no address", advice
        if self._addresses and not self._addresses & found:
            advice = f"If that is not on purpose, change the DNS record:{records}"
            return None, f"{wildcard} is elsewhere, at {', '.join(sorted(found))}", advice
        return True, f"{wildcard} is in the same place", ""

    async def visitor(self) -> Verdict:
        import aiohttp

        name = urllib.parse.urlsplit(self._url).netloc
        wildcard = f"*.{name.partition('.')[2]}"
        try:
            status, headers = await self._get(self._url)
        except aiohttp.ClientSSLError as error:
            advice = f"It takes a certificate for {wildcard}, or a --name that has one; a Caddyfile lists them."
            return None, f"{name}: {_describe(error)}", advice
        problem = headers.get("X-Pytunnel-Error", "")
        if problem.startswith("local-") or (problem == "unknown-tunnel" and not self.client):
            return True, f"a request to {name} arrives {'here' if self.client else 'at the server'}", ""
        if problem == "not-a-link":  # so it is the server's own host that the server has seen
            return False if self.client else None, f"Host is not {name} any more when it arrives", HOST_ADVICE
        advice = f"What stands in front has to take {wildcard} as well; in nginx server_name says so."
        if "caddy" in headers.get("Server", "").lower():
            advice = f"When the Caddyfile lists names instead of {wildcard}, see that yours are among them."
        return False, f"something else answers {name}: status {status} {problem or headers.get('Server', '')}", advice

    async def _resolve(self, host: str) -> set[str]:
        """Return a host's addresses; `*.localhost`, which browsers know and resolvers may not, is the server's."""
        if host.endswith(".localhost"):
            host = str(self._at.hostname)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except socket.gaierror:
            return set()
        return {str(address[0]) for *_, address in found}

    async def _get(self, url: str) -> tuple[int, Mapping[str, str]]:
        """Return status and headers of LINK_PATH, which tells the server's own host from a tunnel."""
        at = urllib.parse.urlsplit(url)
        url = (self._server if str(at.hostname).endswith(".localhost") else url) + LINK_PATH
        name = at.hostname if at.scheme == "https" else None  # that the certificate has to be for
        options: Any = {"allow_redirects": False, "server_hostname": name}
        async with self._http.get(url, headers={"Host": at.netloc}, **options) as response:
            return response.status, response.headers


async def check_idle(client: TunnelClient, seconds: float) -> Verdict:
    """Whether a link that carries nothing is left alone."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not client.problem:
                await client.wait_changed(client.log.version)
        return False, f"lost: {client.problem}", IDLE_ADVICE
    return True, f"left alone for {seconds:g} s", ""


async def check_target(target: Target) -> Verdict:
    """Whether a local service listens, at which of localhost's addresses, and speaks HTTP if it has to."""
    ok, details = False, []
    head = RequestHead(b"GET", b"/", [(b"Host", b"localhost"), (b"Connection", b"close")])
    for address in target.addresses:
        service, exchange = LocalService(target._replace(host=address), insecure=True), Exchange("", "GET", "/", 0.0)
        route, detail = Route("", service, Edits(), Edits()), ""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT / len(target.addresses)):
                if target.tcp:
                    (await service.connect()).abort()
                    ok, detail = True, "connected"
                else:
                    await Forwarding(Replay(b""), route, head, exchange, ExchangeLog()).run()
        except StreamReset as error:
            detail = error.reason.removeprefix(f"{target.text}: ")
        except TimeoutError as error:
            detail = f"connected, but {_describe(error)}"
        finally:
            service.close()
        if exchange.status:  # the rest of the answer need not come
            ok, detail = True, f"HTTP status {exchange.status}"
        details.append(f"{address}: {detail}")
    return ok, "; ".join(details), "" if ok else "Start the service, or see which port it says it listens on."


async def _checked(what: str, verdict: Awaitable[Verdict], advice: str = "", *, extra: float = 0) -> Finding:
    """Return what a check found, or what kept it from finding anything, with this advice."""
    import aiohttp

    try:
        return Finding(what, *await asyncio.wait_for(verdict, CHECK_TIMEOUT + extra))
    except (OSError, aiohttp.ClientError, TunnelError, ValueError) as error:
        return Finding(what, False, _describe(error), advice)


async def diagnose(server: str, token: str, targets: list[Target], *, idle: float = 0) -> AsyncGenerator[Finding, None]:
    """Check everything between visitors and local services, one thing after another; `idle` is in seconds."""
    import aiohttp

    http = aiohttp.ClientSession(trust_env=True, headers={"User-Agent": f"pytunnel/{__version__}"})
    async with http, contextlib.AsyncExitStack() as stack:
        checks = Doctor(server, token, http, stack)
        yield await _checked("proxy", checks.proxy())
        yield (address := await _checked("address", checks.address()))
        if address.ok and server.startswith("https:") and not checks.through:
            yield await _checked("certificate", checks.certificate(), CERTIFICATE_ADVICE)
        if address.ok is not False:
            yield (answers := await _checked("server", checks.answers(), SERVER_ADVICE))
            if answers.ok:
                yield await _checked("clock", checks.clock())
                yield (upgrade := await _checked("WebSocket", checks.upgrade()))
                if upgrade.ok:
                    yield await _checked("login", checks.login())
            yield await _checked("names", checks.names())
            if answers.ok:
                yield await _checked("visitor", checks.visitor())
            if checks.client and idle:
                yield await _checked("idle link", check_idle(checks.client, idle), extra=idle)
    for target in targets:
        yield await _checked(f"local service {target.text}", check_target(target), extra=1)


def _doctor_lines(finding: Finding) -> Iterator[str]:
    """Render a finding for a terminal; what is in it may come from the network."""
    mark = {True: "ok", False: "no", None: "??"}[finding.ok]
    wrapper = textwrap.TextWrapper(100, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
    for line in [f"{mark}  {finding.what}: {finding.detail}", *textwrap.indent(finding.advice, "      ").splitlines()]:
        yield from wrapper.wrap(escape(line, 1000))


async def doctor(
    server: str,
    token: str,
    targets: list[Target],
    idle: float,
    write: Callable[[str], None],
    render: Callable[[Finding], Iterable[str]] = _doctor_lines,
) -> int:
    """Write down what is found, as it is found; return 0 when nothing is wrong, else 1."""
    status = ExitStatus.OK
    async with contextlib.aclosing(diagnose(server, token, targets, idle=idle)) as findings:
        async for finding in findings:
            for line in render(finding):
                write(line)
            if finding.ok is False:
                status = ExitStatus.UNEXPECTED
    return status


# ---- Console --------------------------------------------------------------------------------------------------------
# stdout is for programs: the public URL on a line of its own, or with --json one object a line. stderr is for people.


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a disk says that may have room again


class Output(threading.Thread):
    """Writes lines to a file descriptor, from a thread of its own: a full pipe or disk holds up nobody.

    What comes within GATHER of each other is written at once: waking a thread for each line costs what a request does.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self._descriptor = descriptor
        self._lines: collections.deque[str | None] = collections.deque()
        self._ready = threading.Event()
        self.start()

    def write(self, line: str | None) -> None:
        """Queue a line; it is dropped when too many wait already. None is the last one."""
        if len(self._lines) < MAX_LINES or line is None:
            self._lines.append(line)
        if not self._ready.is_set():
            self._ready.set()

    def run(self) -> None:
        """Write until the last line, or until nobody can read any more. What a full disk does not take is lost."""
        torn = ended = False  # a part of a line went out; the last one has come
        while not ended:
            self._ready.wait()
            self._ready.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            ended = None in lines
            data = "".join(f"{line}\n" for line in lines if line is not None).encode(errors="backslashreplace")
            if torn and data:
                data = b"\n" + data
            while data:
                try:
                    written = os.write(self._descriptor, data)
                    torn = not data.endswith(b"\n", 0, written)
                    data = data[written:]
                except BlockingIOError:  # whoever started us has made the pipe non-blocking
                    select.select([], [self._descriptor], [])
                except OSError as error:
                    if error.errno not in FULL:
                        return
                    rest = data.lstrip(b"\n").partition(b"\n")[2]
                    data = b"\n" + rest if torn and rest else rest
            if not ended:
                time.sleep(GATHER)

    def close(self) -> None:
        """Give what is queued a moment to go out."""
        self.write(None)
        self.join(1.0)


class JsonLines(logging.Formatter):
    """A log line as an object for a program."""

    def format(self, record: logging.LogRecord) -> str:
        """Return it as JSON: time (RFC 3339), level, message, and a traceback where there is one."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        fields = {"time": at, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class Console:
    """Tells programs and people what happens."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Report as the options say: `json`, `run`, and for clients `format` and `detached`."""
        self.as_json: bool = options.json
        self.format: str = getattr(options, "format", None) or ("" if options.run else "{url}")  # stdout is COMMAND's
        self.quiet = bool(getattr(options, "detached", False))  # about requests
        self.stdout, self.stderr = Output(1), Output(2)
        self.say: Callable[[str], None] = self.stderr.write  # a line for people; the terminal view takes its place
        self.log_as_json = getattr(options, "log_format", None) == "json"
        if self.log_as_json:
            self.say = log.info
        self._last_line = ""

    def emit(self, event: str, **fields: Any) -> None:
        """Report an event of a client or server; `exchange` stands for the fields of its summary."""
        exchange = fields.pop("exchange", None)
        if exchange:
            if self.quiet and not self.as_json:
                return
            fields = exchange.summary()
        if self.as_json:
            return self.stdout.write(json.dumps({"event": event, **fields}))
        if event == "ready" and self.format:
            self.stdout.write(self.format.format(**fields))
        line = one_line(fields) if exchange else self._line(event, fields)
        if line and line != self._last_line:
            self.say(line)
        self._last_line = line if event == "disconnected" else ""  # an outage is reported once, not at every dial

    def fail(self, error: TunnelError) -> None:
        if self.as_json:
            self.emit("error", code=error.code, message=str(error))
        if self.log_as_json:
            return log.error("%s", error)
        self.say(f"error: {error}")

    def close(self) -> None:
        self.stdout.close()
        self.stderr.close()

    @staticmethod
    def _line(event: str, fields: dict[str, Any]) -> str:
        if event == "ready":
            return f"{fields['url']} -> {fields['target']}"
        if event == "disconnected":
            return f"not connected: {escape(fields['reason'])}; trying again"
        if event == "reconnected":
            what = "nothing lost" if fields["resumed"] else "in a new session"
            return f"connected again, {'but what was running is lost' if fields['lost'] else what}"
        if event == "hint":
            return f"hint: {fields['message']}"
        return ""


# ---- Commands -------------------------------------------------------------------------------------------------------
# Each subcommand wires things together, turns signals into stops, and returns an exit status, None for OK.


@contextlib.contextmanager
def _signals(handler: Callable[[int], object]) -> Iterator[None]:
    """Call `handler` on SIGINT, SIGTERM, and when the terminal is closed."""
    loop = asyncio.get_running_loop()
    caught = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        caught.append(signal.SIGHUP)
    for number in caught:
        try:
            loop.add_signal_handler(number, handler, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(handler, number))
    try:
        yield
    finally:
        for number in caught:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)


PACKAGES = "aiohttp zstandard platformdirs"


def _failure_handler() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return what reports failures that only the event loop sees, like no descriptor left for a visitor.

    asyncio's own handler writes a traceback for each, and a lack of descriptors is a thousand of them a second.
    """
    last, silent_until = "", 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last, silent_until
        message, now = context["message"], loop.time()
        if message != last or now >= silent_until:
            last, silent_until = message, now + 1.0
            error = context.get("exception")
            trace = error if log.isEnabledFor(logging.DEBUG) else None
            log.error("%s%s", escape(message), f": {escape(str(error))}" if error else "", exc_info=trace)

    return handle


def _run(command: Coroutine[Any, Any, _T]) -> _T:
    """Run a command on uvloop when it is installed, else on asyncio's own loop."""
    factory = None
    if os.environ.get("PYTUNNEL_LOOP") != "asyncio":
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    gc.freeze()  # modules and classes stay; to look through them again and again takes milliseconds
    gc.set_threshold(10_000, 20, 50)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.get_loop().set_exception_handler(_failure_handler())
        return runner.run(command)


SECRET_VARIABLES = ("PYTUNNEL_TOKEN", "PYTUNNEL_TOKEN_FILE", "PYTUNNEL_AUTH")  # not for a service that the world sees


class Command:
    """What `connect … -- COMMAND` runs, in a process group of its own that has the terminal meanwhile."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, environment: Mapping[str, str]) -> None:
        """Run it with these variables, too. Raises NotRun."""
        group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {"creationflags": 0x200}
        try:
            ours = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
            self._process = subprocess.Popen(self._words, env={**ours, **environment}, **group)
        except OSError as error:
            raise NotRun(f"cannot run {escape(self._words[0])}: {_describe(error)}") from None

    async def wait(self) -> int:
        """Return its exit status, as a shell tells it; what it has started ends with it."""
        assert self._process
        wait = self._wait if os.name == "posix" else self._process.wait
        waiting = asyncio.ensure_future(asyncio.to_thread(wait))
        try:
            status = await asyncio.shield(waiting)
        finally:
            self.send_signal(signal.SIGTERM)
            if not waiting.done():
                await asyncio.wait([waiting], timeout=GOODBYE)
                if not waiting.done():
                    self.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                    await waiting
        return status if status >= 0 else 128 - status

    def send_signal(self, number: int) -> bool:
        """Pass a signal on to its process group; False before there is one."""
        if self._process:
            with contextlib.suppress(OSError):
                if os.name == "posix":
                    os.killpg(self._process.pid, number)
                else:
                    self._process.terminate()
        return self._process is not None

    def _wait(self) -> int:
        assert self._process
        group, own_group = self._process.pid, os.getpgrp()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # of this thread; else it may not take it back
        while True:
            terminal = _foreground_group()
            if terminal == own_group:
                os.tcsetpgrp(0, group)
            if terminal:
                self.send_signal(signal.SIGCONT)  # it may have been stopped when it read, or together with us
            _, status = os.waitpid(group, os.WUNTRACED if terminal else 0)
            if _foreground_group() == group:
                os.tcsetpgrp(0, own_group)
            if not os.WIFSTOPPED(status):
                self._process.returncode = os.waitstatus_to_exitcode(status)
                return self._process.returncode
            signal.raise_signal(signal.SIGSTOP)  # Ctrl-Z is for both, and so are the shell's `fg` and `bg`


def _foreground_group() -> int:
    """Return the process group that has our terminal, 0 when stdin is none."""
    with contextlib.suppress(OSError):
        return os.tcgetpgrp(0)
    return 0


async def _serve(options: argparse.Namespace, console: Console) -> None:
    state = state_directory()
    raise_file_limit()
    uses_tls = options.cert or options.key or options.acme
    certificates = Certificates(_pairs(options.cert, options.key)) if uses_tls else None
    if options.hsts is not None and not certificates:
        advice = "give a certificate with --cert, or --acme; a front that has TLS sends the field itself"
        raise UsageError(f"--hsts is about TLS; {advice}")
    default = [":80", ":443"] if certificates else [f":{DEFAULT_PORT}"]
    listen = [parse_listen(text) for text in options.listen or default]
    given, kept = Setting.first(given_tokens(vars(options))).value, Tokens(state)
    if given:
        check_token(given)
    else:
        kept.make_default()
    scheme = "https://" * bool(certificates and options.domain and "://" not in options.domain)  # an address, too
    domain = Origin.from_url(parse_server(scheme + options.domain)) if options.domain else None
    acme = _acme(options, certificates, state)
    tcp_host, tcp_ports = parse_ports(options.tcp_ports) if options.tcp_ports else (None, range(0))
    try:
        server = TunnelServer(
            tokens=[given] if given else [],
            state=state,
            listen=listen,
            domain=domain,
            certificates=certificates,
            acme=acme,
            hsts=options.hsts,
            trusted_proxies=options.trusted_proxy,
            grace=options.grace,
            hold=options.hold,
            max_body=options.max_body,
            max_each=options.max_per_address,
            metrics_public=options.metrics_public,
            tcp_host=tcp_host,
            tcp_ports=tcp_ports,
        )
    except ValueError as error:
        raise UsageError(f"--trusted-proxy: {error}; give an address or a network, like 10.0.0.0/8") from None
    await server.start()
    if domain and certificates and not acme and not certificates.find(f"any.{domain.zone}"):
        named = ", ".join(certificates.names) or "none"
        log.warning("no certificate is for *.%s: browsers warn of tunnels but of those named: %s", domain.zone, named)
    if acme and 80 not in server.ports:
        log.warning("--acme takes port 80, which is not among --listen: the authority looks there; let it lead here")
    if domain and certificates and 443 not in server.ports and not re.search(r":[0-9]+/?$", options.domain):
        zone, port = domain.zone, server.port
        advice = f"lead that here, or give --domain {zone}:{port}, or {zone}:443 when it is led here"
        log.warning("public URLs are on port 443, and the server listens on %d; %s", port, advice)
    signals: asyncio.Queue[int] = asyncio.Queue()
    with _signals(signals.put_nowait):
        for (host, _), port in zip(listen, server.ports, strict=True):
            console.emit("listening", host=host or "*", port=port)
        if not options.json:
            token, tcp = "" if given else kept.default(), options.tcp_ports or ""
            console.say(_invitation(listen[0][0], server, domain, token, kept.default_path, tcp))
        await signals.get()
        drained, again = asyncio.ensure_future(server.drain()), asyncio.ensure_future(signals.get())
        await asyncio.sleep(0)  # they have begun: whoever reads the line finds a server that takes nothing new
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(options.drain):
                log.info("stopping; running requests have %g s, a second signal ends them", options.drain)
                await asyncio.wait([drained, again], return_when=asyncio.FIRST_COMPLETED)
        await end_tasks(drained, again)
    await server.close()


def _pairs(certs: Sequence[str], keys: Sequence[str]) -> list[tuple[Path, Path | None]]:
    """Return what --cert and --key name together. Raises UsageError."""
    if keys and len(keys) != len(certs):
        numbers = f"there are {len(certs)} of --cert and {len(keys)} of --key"
        raise UsageError(f"{numbers}; give a key for each, or none where each --cert file has its key, too")
    return [(Path(cert), Path(key) if key else None) for cert, key in itertools.zip_longest(certs, keys)]


def _acme(options: argparse.Namespace, certificates: Certificates | None, state: Path) -> Acme | None:
    """Return what --acme asks for. Raises UsageError."""
    if not options.acme:
        if options.acme_directory:
            raise UsageError("--acme-directory is about --acme; give that, too, like --acme you@example.com")
        return None
    directory = options.acme_directory or LETS_ENCRYPT
    if "@" not in options.acme:
        raise UsageError(f"{escape(options.acme)!r} is no e-mail address: give yours, like --acme you@example.com")
    if not directory.startswith("https://"):
        raise UsageError(f"{escape(directory)!r} is no authority's directory: its URL begins with https://")
    if not options.domain:
        advice = "or the address of this host, which then gets names from sslip.io"
        raise UsageError(f"--acme needs to know for what: add --domain with your domain, {advice}")
    assert certificates
    return Acme(certificates, state, options.acme, directory)


def _invitation(host: str | None, server: TunnelServer, domain: Origin | None, token: str, kept: Path, tcp: str) -> str:
    """Return the one line to paste. A log is no place for a token, so it stands there only on a terminal."""
    tls = server.certificates
    port = 443 if tls and 443 in server.ports else server.port
    if domain:
        url = f"{'https' if tls else domain.scheme}://{domain.zone}" + (f":{domain.port}" if domain.port else "")
    elif tls:
        name = next((name for name in tls.names if not name.startswith("*.")), _dialled(host, _own_address()))
        url = f"https://{name}" + (f":{port}" if port != 443 else "")
    else:
        url = f"http://{_dialled(host, _own_address())}:{port}"
    secret = shlex.quote(token) if token and sys.stderr.isatty() else "…"
    where = f"   (the token is in {kept})" if token and not sys.stderr.isatty() else ""
    line = f"PYTUNNEL_TOKEN={secret} pytunnel connect 3000 --server {url}{where}"
    where = "" if domain else " (or with another address of this host that visitors can reach)"
    ports = " and ".join(map(str, server.ports))
    if tcp:
        ports += f", and on {tcp} for TCP tunnels"
    return f"listening on port {ports}; on the machine with your service, run{where}:\n\n  {line}\n"


def _own_address() -> str:
    """Return the address that this machine has towards the internet; nothing is sent to find out."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1: connecting a datagram socket only chooses a route
        return str(probe.getsockname()[0])
    return "localhost"


def _typed_token(server: str) -> str:
    """Return the token that the user types on the terminal, "" when it is none."""
    import getpass

    with contextlib.suppress(EOFError):
        return getpass.getpass(f"token for {server}: ").strip()
    return ""


def _ask_token(settings: Settings) -> None:
    if not settings.token.value and os.isatty(0) and os.isatty(2):
        settings.token = Setting(_typed_token(settings.server.value), "typed")


def _connect(options: argparse.Namespace, console: Console) -> int:
    if len(options.name) > 1:
        raise UsageError("--name was given twice; write NAME=TARGET for each, like web=3000 api=8080")
    settings = Settings({**vars(options), "name": "".join(options.name)})
    _ask_token(settings)
    return _share(settings, settings.from_targets(options.targets), options, console)


def _start(options: argparse.Namespace, console: Console) -> int:
    settings = Settings(vars(options), project=True)
    tunnels = settings.named()
    if not tunnels:
        raise UsageError(f"no tunnels are set up in {' or '.join(map(str, settings.files))}; see pytunnel start --help")
    names = list(tunnels) if options.all or (len(tunnels) == 1 and not options.names) else dict.fromkeys(options.names)
    for name in names:
        if name not in tunnels:
            nearest = difflib.get_close_matches(name, tunnels, 1, 0.0)[0]
            raise UsageError(f"no tunnel is called {escape(name)!r}; did you mean {nearest!r}?")
    if not names:
        raise UsageError(f"which tunnel? give --all, or some of: {', '.join(tunnels)}")
    _ask_token(settings)
    return _share(settings, list(map(settings.from_file, names)), options, console)


def _share(settings: Settings, tunnels: list[Tunnel], options: argparse.Namespace, console: Console) -> int:
    server, token = settings.server.value, settings.checked_token()
    try:
        console.format.format(url="", name="", target="")
    except (LookupError, ValueError, AttributeError):
        raise UsageError(f"--format {escape(console.format)!r} has other fields than url, name and target") from None
    inspectors = {urllib.parse.urlsplit(run.inspector).port for run in Run.all()}
    for target in all_targets(tunnels):
        if target.is_loopback and target.port in inspectors:
            raise UsageError(f"port {target.port} is a pytunnel inspector; it stays on this machine")
    if options.url_file and os.path.exists(options.url_file) and not os.path.isfile(options.url_file):
        raise UsageError(f"--url-file {escape(options.url_file)} is there, and not a file; give another path")
    if options.detach and not options.detached:
        return _detach(options, console, token)
    remember = functools.partial(settings.memory.remember, server, token)
    return _run(_share_here(server, token, tunnels, options, console, remember))


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def write_url(path: Path, urls: Iterable[str]) -> None:
    """Write public URLs, a line for each, in one step. Raises TunnelError, as only a TunnelError ends the client."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text("\n".join(urls) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TunnelError(f"cannot write {path}: {_describe(error)}") from None


LIVE = b"\0"  # what ends stdout of a client in the background, when its tunnels are live


def _detach(options: argparse.Namespace, console: Console, token: str) -> int:
    """Run the same command in the background; return when its tunnels are live, or when it has failed."""
    path = state_directory() / "run" / f"{secrets.token_hex(8)}.log"
    write_private(path, "")
    arguments = without_flags(options.argv, ("--token", "--token-file", "--auth"))
    words = [sys.executable, os.path.abspath(__file__), *arguments, "--detached", str(path)]
    environment = {**os.environ, "PYTUNNEL_TOKEN": token}
    if passwords := getattr(options, "auth", None):
        environment["PYTUNNEL_AUTH"] = "\n".join(passwords)
    with open(path, "ab") as errors:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert process.stdout
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.default_int_handler)
    try:
        with process.stdout:
            output, live, _ = process.stdout.read().partition(LIVE)
    except KeyboardInterrupt:
        process.terminate()
        raise
    for line in output.decode().splitlines():
        console.stdout.write(line)
    if live:
        process.returncode = 0  # it goes on without us
        return ExitStatus.OK
    status = process.wait()
    for problem in path.read_text(encoding="utf-8", errors="replace").splitlines():
        console.say(problem)
    path.unlink(missing_ok=True)
    return status if status >= 0 else 128 - status


async def _share_here(
    server: str,
    token: str,
    tunnels: list[Tunnel],
    options: argparse.Namespace,
    console: Console,
    on_live: Callable[[], None] = lambda: None,
) -> int:
    """Run a client with all that the command line offers around it."""
    if server.startswith("http:") and Origin.from_url(server).zone != "localhost":
        console.say("warning: the link is not encrypted; give serve a certificate (--acme, --cert) and dial https://")
    if options.wait_local is not None:
        await _wait_local(tunnels, options.wait_local)
    live = asyncio.Event()

    def emit(event: str, **fields: Any) -> None:
        if event == "ready" and fields["url"] == client.urls[-1]:
            on_live()
            leave_note(client)
            if options.url_file:
                write_url(Path(options.url_file), client.urls)
            live.set()
        console.emit(event, **fields)
        if live.is_set() and options.detached and console.stdout.is_alive():
            console.stdout.write(LIVE.decode())
            console.stdout.close()
            with open(os.devnull, "wb") as nowhere:  # nobody will read on
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            _remove(options.detached)

    async with contextlib.AsyncExitStack() as stack:
        tunnels = await stack.enter_async_context(open_folders(tunnels))
        retries, compress = options.max_retries, not options.no_compress
        client = TunnelClient(server, token, tunnels, max_retries=retries, compress=compress, on_event=emit)
        inspector = Inspector(client, on_stop=client.stop)
        await inspector.start()
        stack.push_async_callback(inspector.close)
        leave_note = stack.enter_context(Run.noted(inspector))
        if options.url_file:
            _remove(options.url_file)  # what a killed client has left
            stack.callback(_remove, options.url_file)
        if options.run:
            command = Command(options.run)

            async def run_command() -> int:
                await live.wait()
                command.start({"PYTUNNEL_URL": client.url})
                return await command.wait()

            return await _run_client(client, console, run_command(), command.send_signal)
        plain = options.no_tui or options.json or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
        streams = sys.stdin, sys.stdout, sys.stderr
        if not plain and all(stream is not None and stream.isatty() for stream in streams):
            stack.callback(setattr, console, "say", console.say)

            def without_view() -> None:
                console.say, console.quiet = console.stderr.write, False

            view = Terminal(client, client.stop, inspector_url=inspector.url, on_failure=without_view)
            console.say, console.format, console.quiet = view.notice, "", True
            await stack.enter_async_context(view)
        return await _run_client(client, console)


async def _wait_local(tunnels: Iterable[Tunnel], seconds: float) -> None:
    """Return when all local services take connections. Raises LocalDown."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    for target in all_targets(tunnels):
        while not target.folder:
            try:
                (await LocalService(target, insecure=True).connect()).abort()
                break
            except StreamReset as error:
                if loop.time() > until:
                    raise LocalDown(f"{error.reason}; it did not come up within {seconds:g} s") from None
            await asyncio.sleep(0.1)


async def _run_client(
    client: TunnelClient,
    console: Console,
    companion: Coroutine[Any, Any, int] | None = None,
    on_signal: Callable[[int], bool] = lambda number: False,
) -> int:
    """Run a client until it is stopped, or until its companion ends, whose result is the exit status then."""

    def stop(number: int) -> None:
        if not on_signal(number):
            if client.log.in_flight:
                console.say(f"finishing what still runs ({client.log.in_flight}); once more to stop now")
            client.stop()

    running = asyncio.ensure_future(client.run())
    tasks: list[asyncio.Future[Any]] = [running, *([asyncio.ensure_future(companion)] if companion else [])]
    with _signals(stop):
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                client.stop()
            await running
        finally:
            await end_tasks(*tasks)
    console.emit("closed")
    if companion and not tasks[1].cancelled():
        return int(tasks[1].result())
    return ExitStatus.OK if client.urls else ExitStatus.INTERRUPTED


async def _demo(options: argparse.Namespace, console: Console) -> int:
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = await stack.enter_async_context(serve(options.listen or f"127.0.0.1:{DEFAULT_PORT}"))
        except TunnelError:
            if options.listen:
                raise
            server = await stack.enter_async_context(serve())
        local = await stack.enter_async_context(demo_service())
        tunnel = Tunnel("demo", Target.parse(f"127.0.0.1:{local}"))
        return await _share_here(server.url, server.token, [tunnel], options, console)


def _status(options: argparse.Namespace, console: Console) -> None:
    runs = Run.all()
    for run in runs:
        try:
            status = run.ask("/api/status", within=2.0)
        except TunnelError as error:
            status = {"problem": str(error), "tunnels": []}
        totals = {tunnel["name"]: tunnel.get("requests", 0) for tunnel in status["tunnels"]}
        for tunnel in run.tunnels:
            requests = totals.get(tunnel["name"], 0)
            state = status["problem"] or "connected"
            if options.json:
                fields = {"connected": not status["problem"], "requests": requests, "inspector": run.inspector}
                console.stdout.write(json.dumps({**tunnel, **fields, "pid": run.pid}))
            else:
                line = f"{tunnel['url']} -> {tunnel['target']}  {state}, {requests} requests  {run.inspector}"
                console.stdout.write(escape(f"{tunnel['name']}  {line}", 500))
    if not runs:
        console.say("no client runs here")


def _stop(options: argparse.Namespace, console: Console) -> None:
    for run in Run.all() if options.all else [Run.find(options.name)]:
        run.ask("/api/stop", post=True)
        until = time.monotonic() + 2 * GOODBYE
        while run.path.exists():
            if time.monotonic() > until:
                raise TunnelError(f"process {run.pid} does not stop; end it with kill {run.pid}")
            time.sleep(0.02)
        console.say(f"stopped {', '.join(run.names)}")


def _expect(options: argparse.Namespace, console: Console) -> None:
    run = Run.find(options.name)
    wanted = {"method": options.method.upper(), "path": options.path, "tunnel": options.name or ""}
    wanted |= {"count": options.count, "timeout": options.timeout}
    summary = run.ask("/api/wait", within=options.timeout + 10.0, **wanted)
    if options.save:
        body = run.ask(f"/api/exchanges/{summary['id']}/body", which="request")
        if len(body) < summary["bytes_in"]:
            raise TunnelError(f"only {len(body)} of its {summary['bytes_in']} bytes were kept")
        Path(options.save).write_bytes(body)
    console.stdout.write(json.dumps(summary) if options.json else one_line(summary))


def _replay(options: argparse.Namespace, console: Console) -> int:
    run, failed = Run.find(options.name), False
    for _ in range(options.times):
        summary = run.ask(f"/api/exchanges/{options.id}/replay", post=True, within=REPLAY_TIMEOUT + 10.0)
        summary.pop("diff")
        console.stdout.write(json.dumps(summary) if options.json else one_line(summary))
        failed = failed or bool(summary["error"]) or (summary["status"] or 500) >= 500
    return ExitStatus.UNEXPECTED if failed else ExitStatus.OK


def _config(options: argparse.Namespace, console: Console) -> None:
    settings = Settings(vars(options), project=True)
    token = settings.token
    if token.value:
        token = Setting(f"{token.value[:4]}…", token.source)
    rows = {"server": settings.server, "token": token}
    rows |= {f"tunnels.{name}": Setting(table["target"], path) for name, (path, table) in settings.named().items()}
    for key, setting in rows.items():
        fields = {"setting": key, "value": setting.value or None, "source": setting.source}
        line = escape(f"{key} = {setting.value}  ({setting.source})", 1000)
        console.stdout.write(json.dumps(fields) if options.json else line)


def _login(options: argparse.Namespace, console: Console) -> None:
    server = parse_server(options.server)
    token = Setting.first(given_tokens(vars(options))).value
    if not token:
        token = _typed_token(server) if os.isatty(0) else os.read(0, MAX_HELLO).decode(errors="replace").strip()
    if not token:
        raise UsageError("no token was given: type it, write it to stdin, or give --token-file")
    check_token(token, "copy the whole of what `pytunnel serve` printed")
    _run(TunnelClient(server, token, []).log_in())
    Memory(state_directory()).remember(server, token)
    used = Settings({})
    if (used.server.value, used.token.value) == (server, token):
        console.say(f"{server} knows this token; from now on `pytunnel connect 3000` uses both")
    else:
        console.say(f"{server} knows this token; both are kept, but {used.server.source} counts before them")


def _token(options: argparse.Namespace, console: Console) -> None:
    tokens, label, write = Tokens(state_directory()), options.label or "", console.stdout.write
    if options.action != "add" and (options.name or options.max_tunnels or options.max_requests):
        raise UsageError("--name and --max-… are for token add; to change a token, revoke it and add one")
    if options.action == "list":
        if label:
            raise UsageError("token list shows all tokens; leave the label out")
        tokens.read()
        grants = list(tokens.labelled.values())
        if tokens.default_path.exists():
            made = datetime.datetime.fromtimestamp(tokens.default_path.stat().st_mtime, datetime.UTC)
            verifier = Verifier(b"", 0, b"", b"")  # it is not about to be used
            grants.insert(0, Grant("default", "", verifier, made=made.isoformat(timespec="seconds")))
        for grant in grants:
            fields = {"label": grant.label, **grant.permissions()}
            limits = f"{grant.max_tunnels} tunnels, {grant.max_requests} requests" if grant.max_tunnels else "no limits"
            line = f"{grant.label}  {', '.join(grant.names) or 'any name'}  {limits}  made {grant.made[:10]}"
            write(json.dumps(fields) if options.json else line)
        if not grants:
            console.say(f"no tokens in {tokens.directory}; `pytunnel serve` makes one, and so does pytunnel token add")
    elif not label:
        raise UsageError(f"which token? write pytunnel token {options.action} LABEL; see pytunnel token --help")
    elif options.action == "revoke":
        tokens.revoke(label)
        console.say(f"revoked {label}; a server that runs ends its sessions now, and its names are free")
    elif not LABEL_PATTERN.fullmatch(label):
        raise UsageError(f"{escape(label, 70)!r} is not a label: use up to 64 letters, digits, hyphens, dots and _")
    else:
        names = list(map(check_name, options.name))
        token = tokens.add(label, names, options.max_tunnels or MAX_TUNNELS, options.max_requests or MAX_STREAMS)
        write(json.dumps({"label": label, "token": token}) if options.json else token)
        console.say(f"this is the token {label}, shown only now; {tokens.directory} keeps what proves it")
        console.say("where the service is, run: PYTUNNEL_TOKEN=… pytunnel connect 3000 --server URL")


def _doctor(options: argparse.Namespace, console: Console) -> int:
    settings = Settings(vars(options))
    targets = [target for text in options.targets if not (target := Target.parse(text)).folder]
    server, token, write = settings.server.value, settings.token.value, console.stdout.write
    if options.json:
        return _run(doctor(server, token, targets, options.idle, write, lambda found: [json.dumps(found._asdict())]))
    return _run(doctor(server, token, targets, options.idle, write))


# ---- Command line ---------------------------------------------------------------------------------------------------
# Flags, help and exit statuses.

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
  pytunnel serve --cert fullchain.pem --key privkey.pem --domain t.example.com
                                           https on port 443, and from port 80 to there
  pytunnel serve --domain t.example.com --acme you@example.com
                                           https on ports 80 and 443, with certificates from Let's Encrypt
  pytunnel serve --listen 127.0.0.1:8080 --domain https://t.example.com --trusted-proxy 127.0.0.1
                                           behind Caddy or nginx on the same host
  pytunnel serve --tcp-ports 20000-20100   takes TCP tunnels, too; open these ports in the firewall
""",
    "connect": """\
  pytunnel connect 3000                            localhost:3000, under a name that stays the same
  pytunnel connect 3000 --name web                 https://web.t.example.com
  pytunnel connect web=3000 api=https://10.0.0.7   two tunnels
  pytunnel connect 3000 --route /api=8080          one tunnel, /api goes to another port
  pytunnel connect ./dist --spa                    a folder
  pytunnel connect ssh=tcp:22                      TCP, on a port of the server (serve --tcp-ports)
  pytunnel connect 5173 --host-header rewrite      for a development server that refuses unknown hosts
  pytunnel connect 3000 -- npm test                run a command with $PYTUNNEL_URL, exit with its status
  URL=$(pytunnel connect 3000 --detach)            go on in the background; see status, stop, expect
""",
    "start": """\
  pytunnel start            the only tunnel of ./pytunnel.toml or of your config.toml
  pytunnel start web api    some of them
  pytunnel start --all      all, in one process

  pytunnel.toml:            server = "https://t.example.com"

                            [tunnels.web]
                            target = "5173"
                            host-header = "rewrite"
""",
    "token": """\
  pytunnel token add laptop                   makes a token for somebody or something, and prints it this once
  pytunnel token add ci --name ci --name pr   it may use only these names, and no other token may
  pytunnel token list                         labels, names, limits; never a token
  pytunnel token revoke laptop                its clients are cut off within seconds, its names are free
""",
    "status": "  pytunnel status           a line for each tunnel of this machine\n",
    "stop": """\
  pytunnel stop             the only client of this machine
  pytunnel stop web         the client that has the tunnel web, with all its tunnels
""",
    "expect": """\
  pytunnel expect --method POST --path /hook          wait until such a request has arrived; earlier ones count
  pytunnel expect --path '/hook/*' --count 3 --timeout 10
  pytunnel expect --path /hook --save body.json       keep its content
""",
    "replay": "  pytunnel replay 12        send request 12 to the local service again\n",
    "login": """\
  pytunnel login https://t.example.com             asks for the token and keeps it
  pytunnel login https://t.example.com <token.txt  in a script
""",
    "config": "  pytunnel config           the values in force for `start`, and where each comes from\n",
    "doctor": """\
  pytunnel doctor           the server used last, and the way there
  pytunnel doctor 3000 --server https://t.example.com
""",
    "demo": "  pytunnel demo             a server, a sample page and a tunnel to it, on this machine alone\n",
}


SECRET_FLAGS = {  # what `ps` must not show, and what to do instead
    "--token": "use PYTUNNEL_TOKEN or --token-file",
    "--auth": "use PYTUNNEL_AUTH, or auth in a settings file",
}


class CommandParser(argparse.ArgumentParser):
    """argparse, with examples before everything else and errors in one line. No flag may be shortened."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def format_help(self) -> str:
        """Return the examples, then what argparse has to say."""
        _, _, rest = super().format_help().partition(f"{self.description}\n\n")
        return f"{self.description}\n\n{EXAMPLES[self.prog.partition(' ')[2]]}\n{self.format_usage()}\n{rest}"

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(ExitStatus.USAGE, f"error: {message}; see {self.prog} --help\n")


def seconds(text: str) -> float:
    """Read a flag's duration."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < 1e8:
            return value
    raise argparse.ArgumentTypeError(f"{escape(text)!r} is no number of seconds, like 30")


def filled(text: str) -> str:
    """Read a flag's value that must not be empty, as a variable is that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave the flag out")
    return text


def size(text: str) -> int:
    """Read a flag's number of bytes, like `10M`."""
    match = re.fullmatch(r"([1-9][0-9]{0,14})([KMGT]?)i?B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{escape(text)!r} is no size: write bytes, or 500K, 10M, 2G (1K is 1024)")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def count(text: str) -> int:
    """Read a flag's number of things."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{escape(text)!r} is no whole number from 1 on")


def _parser() -> CommandParser:
    common = CommandParser(add_help=False)
    common.add_argument("--json", action="store_true", help="for programs: one JSON object a line on stdout")
    common.add_argument("-v", "--verbose", action="store_true", help="more about links on stderr")
    common.add_argument("--debug", action="store_true", help="frames that arrive, and tracebacks")
    parser = CommandParser(prog="pytunnel", description="A public URL for a service on your machine.")
    parser.add_argument("--version", action="version", version=f"pytunnel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, *parents: CommandParser) -> CommandParser:
        what = summary[0].lower() + summary[1:]
        return commands.add_parser(name, parents=[*parents, common], help=what, description=f"{summary}.")

    link = CommandParser(add_help=False)
    link.add_argument("--server", metavar="URL", help="default: the last one that worked, else localhost:8080")
    secret = CommandParser(add_help=False)
    token = secret.add_mutually_exclusive_group()
    token.add_argument("--token", type=filled, metavar="T", help="better: PYTUNNEL_TOKEN; default: one that is kept")
    token.add_argument("--token-file", type=filled, metavar="FILE", help="a file whose first line it is; - is stdin")
    client = CommandParser(add_help=False)
    client.add_argument("--detach", action="store_true", help="go on in the background once the tunnels work")
    client.add_argument("--detached", help=argparse.SUPPRESS)  # what --detach starts; the file its stderr goes to
    client.add_argument("--no-tui", action="store_true", help="plain lines, also on a terminal")
    what = "first wait for the local service, 60 s or =S"
    client.add_argument("--wait-local", type=seconds, metavar="S", nargs="?", const=60.0, help=what)
    client.add_argument("--max-retries", type=int, metavar="N", help="give up after N dials; default: never")
    client.add_argument("--no-compress", action="store_true", help="send everything as it is, also over a slow link")
    client.add_argument("--url-file", metavar="FILE", help="write the public URL there while it works")
    client.add_argument("--format", metavar="F", help="what stdout gets instead of the URL, like 'url={url}'")

    serve = add("serve", "Serve visitors and tunnels", secret)
    what = "again for more; default: 8080, with TLS 80 and 443"
    serve.add_argument("--listen", action="append", default=[], metavar="HOST:PORT", help=what)
    what = "TLS with this certificate and chain; again for more"
    serve.add_argument("--cert", action="append", default=[], metavar="FILE", help=what)
    what = "its key, unless FILE has that, too"
    serve.add_argument("--key", action="append", default=[], metavar="FILE", help=what)
    what = "tell browsers to use https only, for a year or =S"
    serve.add_argument("--hsts", type=seconds, metavar="S", nargs="?", const=HSTS_AGE, help=what)
    what = "get certificates, with this address in the account; needs --domain"
    serve.add_argument("--acme", type=filled, metavar="EMAIL", help=what)
    what = "of another authority than Let's Encrypt, or of its staging"
    serve.add_argument("--acme-directory", type=filled, metavar="URL", help=what)
    serve.add_argument("--domain", metavar="D", help="tunnels are at NAME.D; default: below what clients dial")
    for flag, default, what in (
        ("--grace", GRACE, f"sessions outlive links by {GRACE:g} s"),
        ("--hold", HOLD, f"requests wait {HOLD:g} s for a client"),
        ("--drain", DRAIN, f"exchanges get {DRAIN:g} s on SIGTERM"),
    ):
        serve.add_argument(flag, type=seconds, default=default, metavar="S", help=what)
    what = "content of a request at most, like 10M; default: any"
    serve.add_argument("--max-body", type=size, default=math.inf, metavar="SIZE", help=what)
    what = f"connections of one address at a time; default: {MAX_EACH}"
    serve.add_argument("--max-per-address", type=count, default=MAX_EACH, metavar="N", help=what)
    what = "ports for TCP tunnels, like 20000-20100; default: none"
    serve.add_argument("--tcp-ports", type=filled, metavar="[HOST:]A-B", help=what)
    serve.add_argument("--metrics-public", action="store_true", help="/metrics for everybody, not only this machine")
    serve.add_argument("--log-format", choices=("text", "json"), help="json: an object a line on stderr")
    serve.add_argument("--trusted-proxy", action="append", default=[], metavar="CIDR", help="believe its X-Forwarded-*")
    connect = add("connect", "Give local services public URLs", link, secret, client)
    connect.usage = "pytunnel connect [OPTION...] TARGET... [-- COMMAND...]"
    what = "[NAME=] port, host:port, URL, tcp:port, unix:/path or ./folder"
    connect.add_argument("targets", nargs="+", metavar="TARGET", help=what)
    connect.add_argument("--name", action="append", default=[], metavar="N", help="default: one that stays the same")
    for flag, (type_, metavar, what) in TUNNEL_FLAGS.items():
        action = {str: "store", int: "store", list: "append", bool: "store_true"}[type_]
        value: dict[str, Any] = {"metavar": metavar} if metavar else {}
        if type_ is int:
            value["type"] = count
        connect.add_argument(f"--{flag}", action=action, help=what, **value)
    start = add("start", "Start tunnels that are set up in a file", link, secret, client)
    start.add_argument("names", nargs="*", metavar="NAME", help="default: the only one there is")
    start.add_argument("--all", action="store_true", help="all of them")
    tokens = add("token", "Say who may use the server whose state is on this machine")
    tokens.usage = "pytunnel token {add LABEL [OPTION...], list, revoke LABEL}"
    tokens.add_argument("action", choices=("add", "list", "revoke"), help="add prints a token; see the examples")
    tokens.add_argument("label", nargs="?", metavar="LABEL", help="whose it is, like laptop")
    tokens.add_argument("--name", action="append", default=[], metavar="N", help="it may use only this; again for more")
    what = f"tunnels at a time; default: {MAX_TUNNELS}"
    tokens.add_argument("--max-tunnels", type=count, metavar="N", help=what)
    what = f"requests open at a time; default: {MAX_STREAMS}"
    tokens.add_argument("--max-requests", type=count, metavar="N", help=what)
    add("status", "Show the tunnels of this machine")
    stop = add("stop", "Stop a client")
    stop.add_argument("name", nargs="?", metavar="NAME", help="one of its tunnels; default: the only client")
    stop.add_argument("--all", action="store_true", help="all clients of this machine")
    running = CommandParser(add_help=False)
    running.add_argument("--name", metavar="N", help="the tunnel; default: those of the only client")
    expect = add("expect", "Wait until a request has arrived", running)
    expect.add_argument("--method", default="", metavar="M", help="default: any")
    expect.add_argument("--path", default="", metavar="P", help="* and ? are wildcards; default: any")
    expect.add_argument("--count", type=count, default=1, metavar="N", help="this many of them; default: 1")
    expect.add_argument("--timeout", type=seconds, default=60.0, metavar="S", help="default: 60 s")
    expect.add_argument("--save", metavar="FILE", help="write the content of the last one there")
    replay = add("replay", "Send a recorded request to the local service again", running)
    what = "its number in the inspector, in the terminal view's details, or in --json"
    replay.add_argument("id", type=int, metavar="ID", help=what)
    replay.add_argument("--times", type=count, default=1, metavar="N", help="this often; default: once")
    login = add("login", "Keep a server's token", secret)
    login.add_argument("server", metavar="SERVER", help="its URL")
    add("config", "Show which values are in force, and where they come from", link, secret)
    doctor = add("doctor", "Find out what is wrong on the way", link, secret)
    doctor.add_argument("targets", nargs="*", metavar="TARGET", help="local services to look at, too")
    doctor.add_argument("--idle", type=seconds, default=0.0, metavar="S", help="does an idle link last this long?")
    demo = add("demo", "Try it on this machine")
    demo.add_argument("--listen", metavar="HOST:PORT", help=f"default: 127.0.0.1:{DEFAULT_PORT}, or a free port")
    demo.add_argument("--no-tui", action="store_true", help="plain lines, also on a terminal")
    demo.set_defaults(wait_local=None, max_retries=None, no_compress=False, url_file=None, detached=None)
    return parser


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int | None]] = {
    "serve": lambda options, console: _run(_serve(options, console)),
    "connect": _connect,
    "start": _start,
    "token": _token,
    "status": _status,
    "stop": _stop,
    "expect": _expect,
    "replay": _replay,
    "login": _login,
    "config": _config,
    "doctor": _doctor,
    "demo": lambda options, console: _run(_demo(options, console)),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else a socket could become the stdout that was closed
    os.close(number)
    shown = hide_flags(SECRET_FLAGS) if argv is None else []
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    known = ["--wait-local=60" if word == "--wait-local" else word for word in words[:end]]  # its value needs a `=`
    options, unknown = parser.parse_known_args(known)
    parser.prog = f"pytunnel {options.command}"
    if unknown:
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]  # values may be secrets
        parser.error(f"unrecognized arguments: {escape(' '.join(flags or unknown))}")
    options.argv, options.run = words, words[end + 1 :]
    if options.run and (options.command not in ("connect", "start") or options.detach):
        parser.error("a command after -- is for connect and start, without --detach")
    console = Console(options)
    handler = logging.Handler()
    text = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if console.log_as_json else text)
    to = console.stderr.write if console.log_as_json else lambda line: console.say(line)
    handler.emit = lambda record: to(handler.format(record))  # type: ignore[method-assign]
    logging.basicConfig(handlers=[handler])
    chatty = options.verbose or options.command == "serve"
    log.setLevel(logging.DEBUG if options.debug else logging.INFO if chatty else logging.WARNING)
    for flag in shown:
        console.say(f"warning: other users of this machine can see the value of {flag}; {SECRET_FLAGS[flag]}")
    try:
        return COMMANDS[options.command](options, console) or ExitStatus.OK
    except TunnelError as error:
        log.debug("stopped", exc_info=True)
        console.fail(error)
        return error.exit_status
    except ModuleNotFoundError as error:
        console.fail(TunnelError(f"the package {error.name} is missing; run: python3 -m pip install {PACKAGES}"))
    except OSError as error:
        log.debug("stopped", exc_info=True)
        console.fail(TunnelError(f"{_describe(error)}: {error.filename or ''}".rstrip(": ")))
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    finally:
        console.close()
    return ExitStatus.UNEXPECTED


if __name__ == "__main__":
    sys.exit(main())
