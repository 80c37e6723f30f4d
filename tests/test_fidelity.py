"""HTTP through the tunnel, byte for byte, with real processes: what a visitor writes is what the local service reads,
what the service answers is what the visitor gets, and nothing that either of them sends can become another message.

Tables share one tunnel and report each row as a subtest. An origin's answer is chosen by the request's target.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import json
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from support import (
    Handler,
    Header,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawResponse,
    RawVisitor,
    Truncated,
    Tunnel,
    WaitFailed,
    chunk,
    free_port,
    parse_response_head,
    pattern,
    reset,
    response,
)

KiB = 1024
MiB = 1024 * KiB
CANARY = b"GET /canary HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
CHUNKED = (b"Transfer-Encoding", b"chunked")
LAST_CHUNK = b"0\r\n\r\n"
NOISE = ("Traceback", "never retrieved", "never awaited", "Warning", "a bug in pytunnel")

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Play = Callable[[RawRequest, Reader, Writer], Any]


# ---------------------------------------------------------------------------------------- The two ends


@contextlib.asynccontextmanager
async def served(handler: Handler | bytes, **options: Any) -> AsyncIterator[tuple[RawOrigin, Tunnel]]:
    """An origin and a tunnel to it, whose processes then end in order and have written nothing alarming."""
    noisy = {"PYTHONWARNINGS": "default::ResourceWarning,default::RuntimeWarning"}
    async with RawOrigin(handler, **options) as origin, Tunnel(origin.port, env=noisy) as tunnel:
        yield origin, tunnel
        processes = [*tunnel.clients, tunnel.server]
        for process in processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0, process.output()
        for process in processes:
            assert not [line for line in process.stderr if any(word in line for word in NOISE)], process.output()


def answering(answers: Mapping[bytes, bytes | Play]) -> Handler:
    """A handler that looks the target up: bytes are written, and a function plays the service itself.

    What is not in the table is answered with "real". Bytes that say `Connection: close` close.
    """

    async def handler(request: RawRequest, reader: Reader, writer: Writer) -> None:
        answer = answers.get(request.target, response(b"real"))
        if not isinstance(answer, bytes):
            await answer(request, reader, writer)
            return
        writer.write(answer)
        if re.search(rb"\r\nconnection:[ \t]*close", answer.partition(b"\r\n\r\n")[0].lower()):
            writer.close()

    return handler


def head(start: bytes, fields: Iterable[Header]) -> bytes:
    return b"".join([start, b"\r\n", *(b"%b: %b\r\n" % pair for pair in fields), b"\r\n"])


def forwarded(host: bytes = b"web.localhost") -> list[Header]:
    """What the tunnel adds to a request from this machine."""
    return [(b"X-Forwarded-For", b"127.0.0.1"), (b"X-Forwarded-Proto", b"http"), (b"X-Forwarded-Host", host)]


def without_date(got: RawResponse) -> bytes:
    """The head without a Date at its very end, where the tunnel puts one that the service did not send."""
    return re.sub(rb"\r\nDate: [A-Z][a-z]{2}, [^\r]{21} GMT\r\n\r\n$", b"\r\n\r\n", got.head)


def error_code(got: RawResponse) -> bytes | None:
    return got.value(b"x-pytunnel-error")


async def nothing_reached(origin: RawOrigin, tunnel: Tunnel) -> None:
    """Whatever was on its way to the origin has arrived before this later request; there was nothing."""
    before = len(origin.requests)
    assert (await tunnel.get(b"/marker")).status == 200
    assert [seen.target for seen in origin.requests[before:]] == [b"/marker"]
    del origin.requests[before:]
    assert not origin.requests, origin.requests


class Opener(Protocol):
    async def __call__(self) -> None: ...


# ---------------------------------------------------------------------------------------- Request heads

TARGETS = [
    b"/", b"/?", b"/a/../%2e%2e//b?x=%3a", b"/a/../b/./c", b"/%2e%2e/", b"//e//f", b"/a%2Fb", b"/a%2fb", b"/%zz", b"/%",
    b"/%7Eu", b"/~u", b"/a\\b", b"/;p=1", b"/a;p=1/b", b"/?a=1&a=2&b", b'/?x=[1]|"', b"/%C3%A9", b"/%c3%a9", b"/%255F",
    b"/a%0Ab", b"/%00", b"/%0d%0aX:", b"/?a?b??", b"/?x={}^`<>", b"/a+b?c+d%20e", b"/@:!$&'()*,=", b"/http://other/",
    b"/_pytunnel/link", b"/_pytunnel/", b"/healthz", b"/." * 100, b"/" + b"x" * 8000, b"/?" + b"%41" * 2600,
]  # fmt: skip


async def test_targets_arrive_as_they_were_written() -> None:
    async with served(response(b"real")) as (origin, tunnel), tunnel.visitor() as visitor:
        for target in TARGETS:
            await visitor.send(tunnel.request(target=target))
            assert (await visitor.read_response()).body == b"real", target
        assert [seen.target for seen in origin.requests] == TARGETS
        assert {seen.method for seen in origin.requests} == {b"GET"}


@pytest.mark.parametrize("method", ["OPTIONS", "PROPFIND", "QUERY", "PATCH", "REPORT", "DELETE", "PUT"])
async def test_known_methods_arrive(method: str, tunnel_and_origin: tuple[RawOrigin, Tunnel]) -> None:
    origin, tunnel = tunnel_and_origin
    assert (await tunnel.fetch(method)).body == b"real"
    assert origin.requests[0].head == head(
        b"%b / HTTP/1.1" % method.encode(), [(b"Host", b"web.localhost"), *forwarded()]
    )


@pytest.fixture
async def tunnel_and_origin() -> AsyncIterator[tuple[RawOrigin, Tunnel]]:
    async with served(response(b"real"), read_body=True) as both:
        yield both
