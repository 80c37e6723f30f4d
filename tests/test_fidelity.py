"""HTTP through the tunnel, byte for byte, with real processes: what a visitor writes is what the local service reads,
what the service answers is what the visitor gets, and nothing that either of them sends can become another message.

Tables share one tunnel and report each row as a subtest. An origin's answer is chosen by the request's target.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard
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
    chunk,
    free_port,
    parse_response_head,
    pattern,
    reset,
    response,
)

KiB = 1024
MiB = 1024 * KiB
HOST = (b"Host", b"web.localhost")
CHUNKED = (b"Transfer-Encoding", b"chunked")
CLOSE = (b"Connection", b"close")
CANARY = b"GET /canary HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n"
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
NOISE = ("Traceback", "never retrieved", "never awaited", "Warning", "a bug in pytunnel")

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Play = Callable[[RawRequest, Reader, Writer], Awaitable[None]]


# ---------------------------------------------------------------------------------------- The two ends


@contextlib.asynccontextmanager
async def served(
    handler: Handler | bytes, *, env: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[tuple[RawOrigin, Tunnel]]:
    """An origin and a tunnel to it, whose processes then end in order and have written nothing alarming."""
    async with RawOrigin(handler, **options) as origin, Tunnel(origin.port, env=env) as tunnel:
        yield origin, tunnel
        await tunnel.settle()
        for process in (*tunnel.clients, tunnel.server):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0, process.output()
            assert_quiet(process)


def assert_quiet(process: Process) -> None:
    """What strangers send is no reason for a traceback, and nothing was left lying about."""
    assert not [line for line in process.stderr if any(word in line for word in NOISE)], process.output()
    assert not [line for line in process.stdout if any(word in line for word in NOISE)], process.output()


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


def head(start: bytes, *fields: Header) -> bytes:
    return b"".join([start, b"\r\n", *(b"%b: %b\r\n" % pair for pair in fields), b"\r\n"])


def forwarded(host: bytes = HOST[1]) -> list[Header]:
    """What the tunnel adds to a request from this machine."""
    return [(b"X-Forwarded-For", b"127.0.0.1"), (b"X-Forwarded-Proto", b"http"), (b"X-Forwarded-Host", host)]


def without_date(got: RawResponse) -> bytes:
    """The head without a Date at its very end, where the tunnel puts one when the service sent none."""
    return re.sub(rb"\r\nDate: [A-Z][a-z]{2}, [^\r]{20} GMT\r\n\r\n$", b"\r\n\r\n", got.head)


def problem(got: RawResponse) -> tuple[int, bytes | None]:
    """What went wrong, as the visitor is told."""
    return got.status, got.value(b"x-pytunnel-error")


async def assert_untouched(origin: RawOrigin, tunnel: Tunnel, *allowed: bytes) -> None:
    """The origin has seen no request for anything but `allowed`.

    The link keeps its order, so what had been on its way to the origin was there before this later request.
    """
    assert (await tunnel.get(b"/marker")).status == 200
    targets = [seen.target for seen in origin.requests]
    origin.requests.clear()
    assert targets[-1] == b"/marker"
    assert [target for target in targets[:-1] if target not in allowed] == []


async def assert_rejected(
    tunnel: Tunnel, raw: bytes, statuses: Iterable[int], *, behind: bytes = CANARY
) -> RawResponse:
    """The raw request, with a canary behind it, gets one answer and the end of the connection."""
    async with tunnel.visitor() as visitor:
        await visitor.send(raw + behind)
        got = await visitor.read_response()
        assert got.status in statuses, got.head
        assert got.clean
        assert await visitor.read_until_close() == b"", "something was answered after the rejection"
        return got


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


async def test_methods_arrive_or_are_rejected(subtests: pytest.Subtests) -> None:
    async with served(response(b"real")) as (origin, tunnel):
        for method in ("OPTIONS", "PROPFIND", "QUERY", "PATCH", "REPORT", "DELETE", "PUT", "POST", "GET"):
            with subtests.test(method):
                origin.requests.clear()
                assert (await tunnel.fetch(method)).body == b"real"
                assert origin.requests[0].head == head(method.encode() + b" / HTTP/1.1", HOST, *forwarded())
        with subtests.test("OPTIONS *"):
            origin.requests.clear()
            assert (await tunnel.fetch("OPTIONS", b"*")).body == b"real"
            assert origin.requests[0].target == b"*"
        origin.requests.clear()
        for method in ("get", "FOO-BAR", "X" * 200, "G@T", ""):
            with subtests.test(f"rejects {method[:10]!r}"):
                await assert_rejected(tunnel, head(method.encode() + b" / HTTP/1.1", HOST), (400, 501))
                await assert_untouched(origin, tunnel)
        for method, target in (("CONNECT", b"web.localhost:80"), ("CONNECT", b"/"), ("TRACE", b"/")):
            with subtests.test(f"refuses {method} {target!r}"):
                got = await assert_rejected(tunnel, tunnel.request(method, target), (405,))
                assert problem(got) == (405, b"method")
                await assert_untouched(origin, tunnel)


FIELDS: list[Header] = [
    (b"x-lower", b"1"),
    (b"X-A", b"1"),
    (b"x-a", b"2"),
    (b"X-A", b"1"),
    (b"COOKIE", b"a=1; b=2"),
    (b"Cookie", b"c=3"),
    (b"Empty", b""),
    (b"X-Tab", b"a\tb \t c"),
    (b"X-Latin", b"caf\xe9 \xff\x80"),
    (b"X-Utf8", "žluťoučký 🐎".encode()),
    (b"X-Long", b"v" * 8192),
    (b"!#$%&'*+-.^_`|~1", b'"quoted\\", (comment); =?x?='),
    (b"Accept", b"*/*"),
    (b"accept-encoding", b"identity"),
    (b"User-Agent", b"raw"),
    (b"CF-Connecting-IP", b"192.0.2.9"),
    (b"X_Custom", b"underscores are fine"),
    (b"Via", b"1.1 other"),
    (b"Date", b"whenever"),
    (b"Authorization", b"Basic eA=="),
]


async def test_the_head_of_a_request_is_passed_on_whole() -> None:
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        await tunnel.get(b"/x", FIELDS)
        await tunnel.fetch("POST", b"/y", FIELDS, b"body")
        # Host need not come first, and optional whitespace around values is no part of them.
        raw = b"GET /z HTTP/1.1\r\nA:1\r\nB: \t 2 \t \r\nhOsT:web.localhost\r\nC:\r\nD: \t\r\n\r\n"
        async with tunnel.visitor() as visitor:
            await visitor.send(raw)
            await visitor.read_response()
        get, post, spaced = origin.requests
        assert get.head == head(b"GET /x HTTP/1.1", HOST, *FIELDS, *forwarded())
        assert post.head == head(b"POST /y HTTP/1.1", HOST, *FIELDS, (b"Content-Length", b"4"), *forwarded())
        assert post.body == b"body"
        fields = [(b"A", b"1"), (b"B", b"2"), (b"hOsT", b"web.localhost"), (b"C", b""), (b"D", b"")]
        assert spaced.head == head(b"GET /z HTTP/1.1", *fields, *forwarded())
        received = sorted(bytes(connection) for connection in origin.connections)
        assert b"".join(received).count(b"HTTP/1.1\r\n") == 3
        assert sum(map(len, received)) == sum(len(seen.head) + len(seen.body) for seen in origin.requests)


HOP_BY_HOP: list[Header] = [
    (b"Keep-Alive", b"timeout=5"),
    (b"Proxy-Connection", b"keep-alive"),
    (b"Proxy-Authenticate", b"Basic"),
    (b"Proxy-Authorization", b"Basic eA=="),
    (b"TE", b"trailers"),
    (b"Trailer", b"X-T"),
    (b"Upgrade", b"foo/1"),
]
KEPT: list[Header] = [(b"A", b"1"), (b"X-Foo2", b"2"), (b"B", b"3")]


async def test_hop_by_hop_fields_end_at_the_tunnel_both_ways(subtests: pytest.Subtests) -> None:
    nominating = [(b"Connection", b"keep-alive, X-Foo"), (b"CONNECTION", b" x-bar ,,")]
    dropped: list[Header] = [(b"x-foo", b"1"), (b"X-Bar", b"2"), (b"X-FOO", b"3")]
    mixed = [KEPT[0], *nominating, *HOP_BY_HOP, KEPT[1], *dropped, KEPT[2]]
    async with served(response(b"real", headers=mixed)) as (origin, tunnel):
        got = await tunnel.get(headers=mixed)
        with subtests.test("request"):
            assert origin.requests[0].head == head(b"GET / HTTP/1.1", HOST, *KEPT, *forwarded())
        with subtests.test("response"):
            assert without_date(got) == head(b"HTTP/1.1 200 OK", *KEPT, (b"Content-Length", b"4"))
            assert got.body == b"real"


async def test_connection_cannot_take_away_what_the_tunnel_owes(subtests: pytest.Subtests) -> None:
    nominated = (b"Connection", b"X-Forwarded-For, X-Forwarded-Host, Host, Authorization, Content-Length, close")
    answer = response(b"real", headers=[(b"Connection", b"Content-Length, Date"), (b"Date", b"now")])
    async with served(answer, read_body=True) as (origin, tunnel):
        fields = [nominated, (b"X-Forwarded-For", b"6.6.6.6"), (b"Authorization", b"Basic eA==")]
        got = await tunnel.fetch("POST", b"/", fields, CANARY)
        with subtests.test("request"):
            length = (b"Content-Length", b"%d" % len(CANARY))
            assert origin.requests[0].head == head(b"POST / HTTP/1.1", HOST, length, *forwarded())
            assert origin.requests[0].body == CANARY
        with subtests.test("response"):
            assert got.values(b"content-length") == [b"4"]
            assert len(got.values(b"date")) == 1
            assert got.body == b"real"
        with subtests.test("chunked request"):
            async with tunnel.visitor() as visitor:
                fields = [HOST, CHUNKED, (b"Connection", b"Transfer-Encoding")]
                await visitor.send(head(b"POST /chunked HTTP/1.1", *fields) + chunk(CANARY) + chunk(b""))
                assert (await visitor.read_response()).body == b"real"
            assert origin.requests[-1].head == head(b"POST /chunked HTTP/1.1", HOST, *forwarded(), CHUNKED)
            assert origin.requests[-1].body == CANARY


async def test_forwarding_fields_tell_what_the_server_saw() -> None:
    forged = [
        (b"X-Forwarded-For", b"6.6.6.6"),
        (b"x-forwarded-for", b"7.7.7.7"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-FORWARDED-HOST", b"evil.example"),
        (b"Forwarded", b"for=6.6.6.6"),
        (b"X-Real-IP", b"6.6.6.6"),
        (b"X_Forwarded_For", b"6.6.6.6"),
        (b"X-Forwarded_Proto", b"https"),
        (b"x_real-ip", b"6.6.6.6"),
        (b"Transfer_Encoding", b"chunked"),
        (b"Content_Length", b"5"),
        (b"X_Other", b"kept"),
    ]
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        await tunnel.fetch("POST", b"/", forged, b"body")
        kept = [HOST, (b"X_Other", b"kept"), (b"Content-Length", b"4"), *forwarded()]
        assert origin.requests[0].head == head(b"POST / HTTP/1.1", *kept)
        assert origin.requests[0].body == b"body"


# ---------------------------------------------------------------------------------------- Host and tunnel


async def test_host_chooses_the_tunnel(subtests: pytest.Subtests) -> None:
    async with served(response(b"real")) as (origin, tunnel):
        port = b"%d" % tunnel.port
        for host in (b"WEB.LocalHost", b"web.localhost.", b"web.localhost:" + port, b"web.localhost.:8443"):
            with subtests.test(f"found {host!r}"):
                async with tunnel.visitor() as visitor:
                    await visitor.send(head(b"GET / HTTP/1.1", (b"Host", host)))
                    assert (await visitor.read_response()).body == b"real"
                assert origin.requests[-1].head == head(b"GET / HTTP/1.1", (b"Host", host), *forwarded(host))
        origin.requests.clear()
        bodies = set()
        for host in (
            b"nope.localhost", b"x.web.localhost", b"web.web.localhost", b"xn--80ak6aa92e.localhost", b"localhost",
            b"localhost:" + port, b"127.0.0.1", b"[::1]", b"[::1]:" + port, b"web.example.com", b"web", b"weblocalhost",
        ):  # fmt: skip
            with subtests.test(f"unknown {host!r}"):
                async with tunnel.visitor() as visitor:
                    await visitor.send(head(b"GET / HTTP/1.1", (b"Host", host)))
                    got = await visitor.read_response()
                assert problem(got) == (404, b"unknown-tunnel")
                bodies.add(got.body)
                await assert_untouched(origin, tunnel)
        assert len(bodies) == 1, "whether a name exists can be told from the page"


async def test_a_host_that_is_none_is_rejected(subtests: pytest.Subtests) -> None:
    hosts = [
        b"web.localhost,b", b"web.localhost b", b"a@web.localhost", b"web.localhost/", b"web.localhost/b", b"",
        b"web.localhost:80:90", b"web.localhost:80x", b"web.localhost:99999", b"web.localhost:-1", b".", b"..localhost",
        b".localhost", b"web..localhost", b"%77eb.localhost", "wéb.localhost".encode(), b"w\xe9b.localhost",
        b"web\x00.localhost", b"web.localhost\x00", b"w" * 64 + b".localhost", b"a." * 150 + b"localhost", b"[::1",
        b"[web.localhost]", b"[::1]x", b"web.localhost?", b"web.localhost#", b"\\web.localhost", b"web.localhost\t1",
    ]  # fmt: skip
    async with served(response(b"real")) as (origin, tunnel):
        for host in hosts:
            with subtests.test(f"{host[:40]!r}"):
                async with tunnel.visitor() as visitor:
                    await visitor.send(head(b"GET / HTTP/1.1", (b"Host", host)))
                    assert (await visitor.read_response()).status == 400
                await assert_untouched(origin, tunnel)
        for name, fields in {
            "no Host": b"A: b\r\n",
            "no fields": b"",
            "two Hosts": b"Host: web.localhost\r\nHost: other.localhost\r\n",
            "the same Host twice": b"Host: web.localhost\r\nhost: web.localhost\r\n",
            "a Host after a space": b"Host: web.localhost\r\n Host: other.localhost\r\n",
            "no Host under HTTP/1.0": b"",
        }.items():
            with subtests.test(name):
                async with tunnel.visitor() as visitor:
                    await visitor.send(b"GET / HTTP/1.%d\r\n%b\r\n" % ("1.0" not in name, fields))
                    assert (await visitor.read_response()).status == 400
                await assert_untouched(origin, tunnel)


async def test_an_absolute_target_is_where_a_request_goes(subtests: pytest.Subtests) -> None:
    async with served(response(b"real")) as (origin, tunnel):
        for target, seen in {
            b"http://web.localhost/p?q": b"/p?q",
            b"http://web.localhost": b"/",
            b"HTTP://web.localhost?q": b"/?q",
            b"http://web.localhost//a/../b": b"//a/../b",
        }.items():
            with subtests.test(f"{target!r}"):
                async with tunnel.visitor() as visitor:
                    await visitor.send(head(b"GET %b HTTP/1.1" % target, (b"A", b"1"), (b"HOST", b"other.localhost")))
                    assert (await visitor.read_response()).body == b"real"
                fields = [(b"A", b"1"), (b"HOST", b"web.localhost"), *forwarded()]
                assert origin.requests[-1].head == head(b"GET %b HTTP/1.1" % seen, *fields)
        origin.requests.clear()
        for target, status in {
            b"http://other.localhost/": 404,
            b"http://user@web.localhost/": 400,
            b"http://user:pw@web.localhost/": 400,
            b"http://web.localhost:80:90/": 400,
            b"http:///p": 400,
            b"http://": 400,
            b"ftp://web.localhost/": 400,
            b"web.localhost/": 400,
            b"*": 400,
            "/caf\u00e9".encode(): 400,
            b"/a b": 400,
            b"/p#frag": 400,
            b"/\x01": 400,
            b"/\x7f": 400,
        }.items():
            with subtests.test(f"{target!r}"):
                async with tunnel.visitor() as visitor:
                    await visitor.send(tunnel.request(target=target))
                    assert (await visitor.read_response()).status == status
                await assert_untouched(origin, tunnel)


# ---------------------------------------------------------------------------------------- Request smuggling

POST = b"POST /first HTTP/1.1\r\nHost: web.localhost\r\n"
LENGTHS = [
    b"+1", b"-1", b"1_0", b"0x1", b"1e1", b"9" * 23, b"", b"1, 1", b"1,2", b"1;", b"1 1", b"1.0", b"\xa01",
    "١".encode(), b"\x0b1", b"'1'", b"1\x00",
]  # fmt: skip
CODINGS = [
    b"xchunked", b"chunked, identity", b"chunked, chunked", b"\x0bchunked", b'"chunked"', b"chunked;q=1", b"identity",
    b"chunkedx", b"gzip", b"gzip, chunked", b"", b"chunked\x00", b"chunked\xa0",
]  # fmt: skip
REJECTED = {
    "length and chunked": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two equal lengths": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 0\r\n\r\nhello",
    "two codings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked under HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "tab before name": POST + b"\tTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "NUL in name": POST + b"Transfer-Encoding\x00: chunked\r\n\r\n0\r\n\r\n",
    "bare CR": POST + b"X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare LF": POST + b"X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\nHost: web.localhost\n\n",
    "obs-fold": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "obs-fold of any field": POST + b"X: y\r\n z\r\n\r\n",
    "space before the first field": b"GET / HTTP/1.1\r\n Host: web.localhost\r\n\r\n",
    "no colon": POST + b"nonsense\r\n\r\n",
    "empty name": POST + b": x\r\n\r\n",
    "control in a value": POST + b"X: \x01\r\n\r\n",
    "DEL in a value": POST + b"X: \x7f\r\n\r\n",
    "space in a name": POST + b"X Y: 1\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS ClientHello": bytes.fromhex("16030100a5010000a10303") + bytes(range(128)),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9, said": b"GET / HTTP/0.9\r\nHost: web.localhost\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: web.localhost\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: web.localhost\r\n\r\n",
    "http/1.1": b"GET / http/1.1\r\nHost: web.localhost\r\n\r\n",
    "129 fields": POST + b"A: b\r\n" * 129 + b"\r\n",
    "a field of 64 KiB": POST + b"A: " + b"b" * 65536 + b"\r\n\r\n",
    "an empty coding beside a length": POST + b"Transfer-Encoding:\r\nContent-Length: 5\r\n\r\nhello",
    **{f"Content-Length: {v!r}": POST + b"Content-Length: " + v + b"\r\n\r\nhello" for v in LENGTHS},
    **{f"Transfer-Encoding: {v!r}": POST + b"Transfer-Encoding: " + v + b"\r\n\r\n0\r\n\r\n" for v in CODINGS},
}


OTHER_STATUSES = {
    "a field of 64 KiB": (431,),
    "129 fields": (400, 431),
    "Transfer-Encoding: b'gzip, chunked'": (501,),  # RFC 9112, 6.1
    **dict.fromkeys(("HTTP/2 preface", "HTTP/0.9, said", "HTTP/1.2", "HTTP/2.0"), (400, 505)),
}


async def test_an_ambiguous_request_ends_the_connection(subtests: pytest.Subtests) -> None:
    async with served(response(b"real")) as (origin, tunnel):
        for name, raw in REJECTED.items():
            with subtests.test(name):
                try:
                    await assert_rejected(tunnel, raw, OTHER_STATUSES.get(name, (400,)))
                    await assert_rejected(tunnel, raw, OTHER_STATUSES.get(name, (400,)), behind=b"")
                finally:
                    await assert_untouched(origin, tunnel)


async def test_what_is_not_http_costs_one_line_of_the_log_at_most() -> None:
    """Whoever wants to fill a disk has to send as much, and nothing of it reaches the terminal as it is."""
    strangers = ["HTTP/2 preface", "TLS ClientHello", "HTTP/0.9", "HTTP/1.2", "control in a value", "a field of 64 KiB"]
    escapes = b"GET /\x1b[2J\xe2\x80\xae HTTP/1.1\r\nHost: web.localhost\r\nA\x1b[31m: b\r\n\r\n"
    async with RawOrigin(response(b"real")) as origin, Tunnel(origin.port, serve_args=["-v"]) as tunnel:
        await tunnel.server.stderr_line("web: connected")
        before = len(tunnel.server.stderr)
        raws = [*(REJECTED[name] for name in strangers), escapes]
        for raw in raws:
            await assert_rejected(tunnel, raw, (400, 431, 505))
        await tunnel.server.stderr_line("bad request from 127.0.0.1")
        for process in (tunnel.client, tunnel.server):
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        lines = tunnel.server.stderr[before:]
        assert sum("bad request" in line for line in lines) <= len(raws)
        assert len(lines) <= len(raws) + 2, "and two about the end of client and server"
        assert all(line.isprintable() and len(line) < 300 for line in lines)


async def test_a_line_without_end_is_not_waited_for(subtests: pytest.Subtests) -> None:
    """In small segments, none of which is too long by itself."""
    async with served(response(b"real")) as (origin, tunnel):
        for name, start in {"target": b"GET /", "field": b"GET / HTTP/1.1\r\nHost: web.localhost\r\nA: "}.items():
            with subtests.test(name):
                async with tunnel.visitor() as visitor:
                    with contextlib.suppress(ConnectionError):
                        await visitor.send(start)
                        for _ in range(100):
                            await visitor.send(b"x" * 700)
                    assert (await visitor.read_response()).status in (414, 431)
                    assert await visitor.read_until_close() == b""
                await assert_untouched(origin, tunnel)


BAD_CHUNKS = {
    "0x5": b"0x5\r\nhello\r\n0\r\n\r\n",
    "space": b"5 \r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"5_0\r\nhello\r\n0\r\n\r\n",
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "17 digits, huge": b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\n0\n\n",
    "bare CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "no CRLF after data": b"5\r\nhello0\r\n\r\n",
    "too much data": b"5\r\nhello!\r\n0\r\n\r\n",
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "not a number": b"g\r\nhello\r\n0\r\n\r\n",
}


async def test_a_bad_chunk_is_no_end_of_a_body(subtests: pytest.Subtests) -> None:
    """The origin may have seen the head by then. It never sees a complete request, and its connection ends.

    "17 digits" is the one that a parser may also read as what it says, a five with zeros before it.
    """
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        for (name, body), apart in itertools.product(BAD_CHUNKS.items(), (False, True)):
            with subtests.test(f"{name}, {'after' if apart else 'with'} the head"):
                origin.requests.clear()
                before = len(origin.connections)
                start = POST + b"Transfer-Encoding: chunked\r\n\r\n"
                async with tunnel.visitor() as visitor:
                    if apart:
                        await visitor.send(start)
                        await origin.wait_for(lambda: origin.requests)
                    await visitor.send(start * (not apart) + body + CANARY)
                    got = await visitor.read_until_close()
                assert got.count(b"HTTP/1.1 ") == 1, got
                if name == "17 digits" and got.startswith(b"HTTP/1.1 200"):
                    assert [(seen.body, seen.complete) for seen in origin.requests] == [(b"hello", True)]
                    continue
                assert got.startswith(b"HTTP/1.1 400 "), got
                assert not any(seen.complete for seen in origin.requests)
                await origin.wait_for(lambda before=before: not any(c.open for c in origin.connections[before:]))
                await assert_untouched(origin, tunnel, b"/first")


async def test_lengths_with_leading_zeros_are_decimal() -> None:
    async with served(response(b"real"), read_body=True) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(POST + b"Content-Length: 010\r\n\r\n" + b"0123456789" + CANARY)
        first = await visitor.read_response()
        if first.status != 400:  # allowed as well, and then nothing follows
            assert (await visitor.read_response()).body == b"real"
            assert [(seen.target, seen.body) for seen in origin.requests] == [
                (b"/first", b"0123456789"),
                (b"/canary", b""),
            ]


async def test_a_body_cut_short_by_the_visitor_is_never_complete(subtests: pytest.Subtests) -> None:
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        for number, (name, raw) in enumerate(
            {
                "length": POST + b"Content-Length: 10\r\n\r\nhalf",
                "chunked": POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"half"),
                "inside a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"half")[:-3],
            }.items()
        ):
            with subtests.test(name):
                async with tunnel.visitor() as visitor:
                    await visitor.send(raw)
                    await origin.wait_for(lambda n=number: len(origin.requests) > n and b"hal" in origin.connections[n])
                    visitor.write_eof()
                    await origin.wait_for(lambda: not origin.open_connections)
                    assert not origin.requests[number].complete
                    assert b"0\r\n\r\n" not in origin.connections[number]
                    assert b"200" not in await visitor.read_until_close()


async def test_only_what_is_safe_is_sent_again(subtests: pytest.Subtests) -> None:
    """A service may close an idle connection just as a request goes out (RFC 9110, 9.2.2)."""
    calls: dict[str, int] = {}

    async def closing(request: RawRequest, reader: Reader, writer: Writer) -> None:
        number = calls[request.method.decode()] = calls.get(request.method.decode(), 0) + 1
        if number == 1:
            reset(writer)
        else:
            writer.write(response(b"again"))

    async def beginning(request: RawRequest, reader: Reader, writer: Writer) -> None:
        calls["begun"] = calls.get("begun", 0) + 1
        writer.write(b"HTTP/1.1 2")
        await writer.drain()
        writer.close()

    answers: dict[bytes, bytes | Play] = {b"/closing": closing, b"/beginning": beginning}
    async with served(answering(answers), read_body=True) as (_, tunnel):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            with subtests.test(method):
                assert (await tunnel.get(b"/idle")).body == b"real"
                got = await tunnel.fetch(method, b"/closing", body=None if method == "GET" else b"x")
                if method == "GET":
                    assert (calls[method], got.body) == (2, b"again")
                else:
                    assert (calls[method], problem(got)) == (1, (502, b"local-reset"))
        with subtests.test("GET with content"):
            calls.clear()
            assert (await tunnel.get(b"/idle")).body == b"real"
            got = await tunnel.fetch("GET", b"/closing", body=b"x")
            assert (calls["GET"], problem(got)) == (1, (502, b"local-reset"))
        with subtests.test("GET that was answered by a byte"):
            assert (await tunnel.get(b"/idle")).body == b"real"
            assert problem(await tunnel.get(b"/beginning")) == (502, b"local-reset")
            assert calls["begun"] == 1


async def test_a_connection_that_was_used_before_is_as_good_as_a_new_one(subtests: pytest.Subtests) -> None:
    """Its answers may come whole or in pieces, make no sense, or never come before the visitor leaves."""
    release, big = asyncio.Event(), pattern(0, 3 * MiB)

    async def halves(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(b"halves")[:-3])
        await release.wait()
        writer.write(b"ves")

    async def never(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await reader.read()
        writer.close()

    answers = {b"/halves": halves, b"/never": never, b"/big": response(big), b"/bad": b"HTTP/1.1 200 OK\r\nA\r\n\r\n"}
    async with served(answering(answers)) as (origin, tunnel):
        with subtests.test("whole"):
            for _ in range(3):
                assert (await tunnel.get()).body == b"real"
            assert len(origin.connections) == 1
        with subtests.test("in pieces"):
            async with tunnel.visitor() as visitor:
                await visitor.send(tunnel.request(target=b"/halves"))
                await visitor.read_until(b"hal")
                release.set()
                await visitor.read_until(b"ves")
        with subtests.test("big"):
            assert (await tunnel.get(b"/big")).body == big
        with subtests.test("used all the time"):
            assert len(origin.connections) == 1
        with subtests.test("the visitor leaves"):
            async with tunnel.visitor() as visitor:
                await visitor.send(tunnel.request(target=b"/never"))
                await origin.wait_for(lambda: origin.requests[-1].target == b"/never")
            await origin.wait_for(lambda: not origin.open_connections)
        with subtests.test("makes no sense"):
            assert (await tunnel.get()).body == b"real"
            assert problem(await tunnel.get(b"/bad")) == (502, b"local-invalid")
            await origin.wait_for(lambda: not origin.open_connections)
            assert len(origin.connections) == 2


async def test_pipelined_requests_are_answered_in_order() -> None:
    release = asyncio.Event()

    async def echo(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/0":
            await release.wait()
        writer.write(response(request.target))

    async with served(echo) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(b"".join(tunnel.request(target=b"/%d" % i) for i in range(33)))
        await origin.wait_requests(1)
        assert [seen.target for seen in origin.requests] == [b"/0"]
        release.set()
        for i in range(33):
            assert (await visitor.read_response()).body == b"/%d" % i
        assert [seen.target for seen in origin.requests] == [b"/%d" % i for i in range(33)]


@pytest.mark.parametrize("size", [1, 8000])
async def test_requests_behind_a_slow_one_are_not_read_without_end(size: int) -> None:
    """The visitor comes to a halt: a few requests wait in the server, the others stay where they come from."""
    release = asyncio.Event()

    async def slow(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await release.wait()
        writer.write(response(b"late"))

    async with served(answering({b"/slow": slow})) as (origin, tunnel), tunnel.visitor(sndbuf=64 * KiB) as visitor:
        await tunnel.get()
        before = tunnel.server.rss()
        await visitor.send(tunnel.request(target=b"/slow"))
        await origin.wait_for(lambda: origin.requests[-1].target == b"/slow")
        batch = b"".join([tunnel.request(headers=[(b"X", b"y" * size)])] * (256 * KiB // size))
        sent = 0

        async def flood() -> None:
            nonlocal sent
            with contextlib.suppress(ConnectionError):
                while True:
                    await visitor.socket.send(batch[: 64 * KiB])
                    sent += 64 * KiB

        flooding = asyncio.create_task(flood())
        unchanged = 0
        while unchanged < 20:
            assert sent < 64 * MiB, "it is never made to wait"
            seen = sent
            assert (await tunnel.get()).body == b"real"
            unchanged = unchanged + 1 if seen == sent > 0 else 0
        assert tunnel.server.rss() - before < 8 * MiB
        assert [seen.target for seen in origin.requests].count(b"/slow") == 1
        visitor.abort()
        await flooding
        release.set()


# ---------------------------------------------------------------------------------------- Request bodies


async def test_request_bodies_arrive_untouched(subtests: pytest.Subtests) -> None:
    big, zipped = pattern(0, 3 * MiB), gzip.compress(b"hello " * 1000)
    packed = [(b"Content-Encoding", b"gzip"), (b"Content-Type", b"text/plain")]
    async with served(response(b"real"), read_body=True) as (origin, tunnel), tunnel.visitor() as visitor:
        for method in ("POST", "PUT", "GET", "DELETE", "HEAD", "PATCH", "OPTIONS"):
            for name, body, fields in (
                ("small", b"hello", []),
                ("empty", b"", []),
                ("like a request", CANARY, []),
                ("gzip", zipped, packed),
                ("big", big, []),
            ):
                with subtests.test(f"{method}, {name}, length"):
                    await visitor.send(tunnel.request(method, b"/", fields, body))
                    assert (await visitor.read_response(method)).status == 200
                    length = (b"Content-Length", b"%d" % len(body))
                    seen = origin.requests[-1]
                    assert seen.head == head(b"%b / HTTP/1.1" % method.encode(), HOST, *fields, length, *forwarded())
                    assert seen.body == body
                with subtests.test(f"{method}, {name}, chunked"):
                    start = b"%b / HTTP/1.1" % method.encode()
                    pieces = [body[i : i + 100_000] for i in range(0, len(body), 100_000)]
                    async with tunnel.visitor() as other:
                        await other.send(head(start, HOST, CHUNKED, *fields))
                        await other.send(b"".join(map(chunk, pieces)) + chunk(b""))
                        assert (await other.read_response(method)).status == 200
                    seen = origin.requests[-1]
                    assert seen.head == head(start, HOST, *fields, *forwarded(), CHUNKED)
                    assert seen.body == body
                    assert seen.complete


async def test_chunk_extensions_are_not_content(subtests: pytest.Subtests) -> None:
    body = b'5;a;b=c;d="e;\\"f"\r\nhello\r\n6;x\r\n world\r\n0;last=1\r\n\r\n'
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        with subtests.test("a few"):
            async with tunnel.visitor() as visitor:
                await visitor.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body)
                assert (await visitor.read_response()).body == b"real"
            assert origin.requests[0].head == head(b"POST /first HTTP/1.1", HOST, *forwarded(), CHUNKED)
            assert (origin.requests[0].body, origin.requests[0].complete) == (b"hello world", True)
        with subtests.test("much of it, and little content"):
            before = tunnel.server.rss() + tunnel.client.rss()
            body = (b"1;" + b"x" * 8000 + b"\r\n!\r\n") * 1000 + chunk(b"")
            origin.requests.clear()
            async with tunnel.visitor() as visitor:
                with contextlib.suppress(ConnectionError):  # it need not be read to its end
                    await visitor.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body)
                assert (await visitor.read_response()).status == 400
            assert not any(seen.complete for seen in origin.requests)  # it may have been given up before it got there
            assert tunnel.server.rss() + tunnel.client.rss() - before < 4 * MiB
        with subtests.test("chunks of one byte"):
            async with tunnel.visitor() as visitor:
                raw = b"".join(chunk(bytes([i & 255])) for i in range(100_000)) + chunk(b"")
                await visitor.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + raw)
                assert (await visitor.read_response()).body == b"real"
            assert origin.requests[-1].body == bytes(i & 255 for i in range(100_000))
            wire = origin.connections[origin.requests[-1].connection].total
            assert wire < 200_000, "small chunks are not passed on one by one when many are there"


@pytest.mark.parametrize("together", [True, False], ids=["pipelined", "afterwards"])
async def test_trailers_never_become_fields(together: bool, subtests: pytest.Subtests) -> None:
    """Neither of their own request nor of the next one, whose sender may be somebody else behind the same proxy."""
    canary = b"GET /canary HTTP/1.1\r\nHost: web.localhost\r\nCookie: mine\r\nConnection: close\r\n\r\n"
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        for trailers in (
            b"X-T: 1\r\n",
            b"X-T: 1\r\nCookie: evil\r\n",
            b"Cookie: evil\r\nX-T: 1\r\n",
            b"Authorization: evil\r\n",
            b"X-Forwarded-For: 6.6.6.6\r\n",
            b"Host: evil.localhost\r\n",
            b"Content-Length: 3\r\n",
            b"Transfer-Encoding: gzip\r\n",
            b"Connection: upgrade, cookie\r\n",
            b"Upgrade: foo\r\n",
        ):
            with subtests.test(f"{trailers!r}"):
                origin.requests.clear()
                fields = b"Transfer-Encoding: chunked\r\nTrailer: X-T, Cookie\r\n\r\n"
                raw = POST + fields + chunk(b"hello") + b"0\r\n" + trailers + b"\r\n"
                async with tunnel.visitor() as visitor:
                    await visitor.send(raw + (canary if together else b""))
                    status = (await visitor.read_response()).status
                    if not together:
                        with contextlib.suppress(ConnectionError):
                            await visitor.send(canary)
                    await visitor.read_until_close()  # that the canary is not answered any more is fine
                assert status in (200, 400)
                for seen in origin.requests:
                    expected = head(b"POST /first HTTP/1.1", HOST, *forwarded(), CHUNKED)
                    if seen.target == b"/canary":
                        expected = head(b"GET /canary HTTP/1.1", HOST, (b"Cookie", b"mine"), *forwarded())
                    assert seen.head == expected
                    assert set(seen.trailers) <= {(b"X-T", b"1")}


async def test_trailers_have_bounds(subtests: pytest.Subtests) -> None:
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        before = tunnel.server.rss()
        for name, trailers in {"many": b"A: b\r\n" * 5_000_000, "a long one": b"A: " + b"b" * 32 * MiB}.items():
            with subtests.test(name):
                origin.requests.clear()
                async with tunnel.visitor() as visitor:
                    with contextlib.suppress(ConnectionError):
                        await visitor.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"x") + b"0\r\n")
                        await visitor.send(trailers + b"\r\n\r\n" + CANARY)
                    assert (await visitor.read_response()).status in (400, 431)
                    assert await visitor.read_until_close() == b""
                assert not any(seen.complete for seen in origin.requests)
                await assert_untouched(origin, tunnel, b"/first")
        assert tunnel.server.rss() - before < 16 * MiB


# ---------------------------------------------------------------------------------------- Responses


async def test_the_head_of_a_response_is_passed_on_whole(subtests: pytest.Subtests) -> None:
    cookies = [(b"Set-Cookie", b"a=1; Path=/"), (b"set-cookie", b"b=2; HttpOnly"), (b"Set-Cookie", b"a=3")]
    fields = [*cookies, *FIELDS[:-2], cookies[0], (b"WWW-Authenticate", b"Basic"), (b"Server", b"origin/1")]
    length = (b"Content-Length", b"4")
    dated = (b"DATE", b"Tue, 29 Feb 2000 00:00:00 GMT")
    answers: dict[bytes, tuple[bytes, bytes]] = {}
    for name, start, sent in (
        (b"/all", b"HTTP/1.1 200 OK", [*fields, length]),
        (b"/dated", b"HTTP/1.1 200 OK", [dated, *fields, length]),
        (b"/bare", b"HTTP/1.1 200 OK", [length]),
        (b"/reason", "HTTP/1.1 418 žádný čaj".encode(), [length]),
        (b"/noreason", b"HTTP/1.1 200 ", [length]),
        (b"/unknown", b"HTTP/1.1 299 Whatever", [length]),
        (b"/redirect", b"HTTP/1.1 302 Found", [(b"Location", b"http://localhost:1/a/../b?%zz"), length]),
        (b"/error", b"HTTP/1.1 503 Busy", [(b"Retry-After", b"1"), length]),
        (b"/old", b"HTTP/1.1 200 OK", [length]),
    ):
        answers[name] = (head(start, *sent) + b"real", head(start, *sent))
    raw = {name: answer for name, (answer, _) in answers.items()}
    raw[b"/old"] = raw[b"/old"].replace(b"HTTP/1.1", b"HTTP/1.0")
    raw[b"/noreason2"] = b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\nreal"
    answers[b"/noreason2"] = (b"", b"HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\n")
    async with served(answering(raw)) as (_, tunnel), tunnel.visitor() as visitor:
        for target, (_, expected) in answers.items():
            with subtests.test(target.decode()):
                await visitor.send(tunnel.request(target=target))
                got = await visitor.read_response()
                assert (got.head if target == b"/dated" else without_date(got)) == expected
                assert got.values(b"date"), "RFC 9110, 6.6.1"
                assert got.body == b"real"


async def test_response_bodies_arrive_untouched(subtests: pytest.Subtests) -> None:
    big, zipped = pattern(0, 3 * MiB), gzip.compress(b"hello " * 1000)
    ok = b"HTTP/1.1 200 OK"
    kind = (b"Content-Type", b"text/html")
    packed: dict[bytes, list[Header]] = {c: [kind, (b"Content-Encoding", c)] for c in (b"gzip", b"zstd", b"br")}
    bodies = {b"small": b"hello", b"like": EVIL, b"big": big, b"gzip": zipped, b"empty": b""}
    bodies |= {b"zstd": zstandard.compress(b"hello " * 1000), b"br": b"\x0b\x02\x80hello\x03"}
    answers: dict[bytes, bytes | Play] = {}
    for name, body in bodies.items():
        fields = packed.get(name, [])
        pieces = [body[i : i + 100_000] for i in range(0, len(body), 100_000)]
        answers[b"/length/" + name] = response(body, headers=fields)
        answers[b"/chunked/" + name] = head(ok, *fields, CHUNKED) + b"".join(map(chunk, [*pieces, b""]))
        answers[b"/close/" + name] = head(ok, *fields, CLOSE) + body
        answers[b"/old/" + name] = head(b"HTTP/1.0 200 OK", *fields, CLOSE) + body
    async with served(answering(answers)) as (origin, tunnel), tunnel.visitor() as visitor:
        for target in answers:
            framing, body = target.split(b"/")[1], bodies[target.split(b"/")[2]]
            with subtests.test(target.decode()):
                await visitor.send(tunnel.request(target=target))
                got = await visitor.read_response()
                assert got.body == body
                assert got.clean
                frame = (b"Content-Length", b"%d" % len(body)) if framing == b"length" else CHUNKED
                if body or framing == b"length":
                    assert without_date(got) == head(ok, *packed.get(target.split(b"/")[2], []), frame)
                assert origin.requests[-1].values(b"accept-encoding") == []
        for target in answers:
            framing, body = target.split(b"/")[1], bodies[target.split(b"/")[2]]
            with subtests.test(f"{target.decode()} under HTTP/1.0"):
                async with tunnel.visitor() as old:
                    await old.send(head(b"GET %b HTTP/1.0" % target, HOST))
                    got = await old.read_response()
                    assert not got.values(b"transfer-encoding")
                    assert got.body == body
                    assert got.clean
                    assert await old.read_until_close() == b""
                    assert old.ended == "fin"


async def test_response_extensions_and_trailers_are_not_content() -> None:
    body = b'5;a="b;c"\r\nhello\r\n6;x\r\n world\r\n0;y\r\n'
    body += b"Content-Length: 3\r\nSet-Cookie: evil=1\r\nX-T: 1\r\n\r\n"
    answers: dict[bytes, bytes | Play] = {b"/": head(b"HTTP/1.1 200 OK", CHUNKED, (b"Trailer", b"X-T")) + body}
    async with served(answering(answers)) as (_, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request() + tunnel.request(target=b"/next"))
        got = await visitor.read_response()
        assert without_date(got) == head(b"HTTP/1.1 200 OK", CHUNKED)
        assert got.body == b"hello world"
        assert got.trailers in ([], [(b"X-T", b"1")])
        assert (await visitor.read_response()).body == b"real"


BODILESS = {
    b"/204": (b"GET", b"HTTP/1.1 204 No Content", [(b"Content-Length", b"%d" % len(EVIL))], []),
    b"/204chunked": (b"GET", b"HTTP/1.1 204 No Content", [CHUNKED], []),
    b"/204bare": (b"DELETE", b"HTTP/1.1 204 No Content", [(b"A", b"1")], [(b"A", b"1")]),
    b"/304": (
        b"GET",
        b"HTTP/1.1 304 Not Modified",
        [(b"ETag", b'"x"'), (b"Content-Length", b"42")],
        [(b"ETag", b'"x"'), (b"Content-Length", b"42")],
    ),
    b"/304chunked": (b"GET", b"HTTP/1.1 304 Not Modified", [(b"ETag", b'"x"'), CHUNKED], [(b"ETag", b'"x"')]),
    b"/head": (b"HEAD", b"HTTP/1.1 200 OK", [(b"Content-Length", b"42")], [(b"Content-Length", b"42")]),
    b"/headexact": (b"HEAD", b"HTTP/1.1 200 OK", *[[(b"Content-Length", b"%d" % len(EVIL))]] * 2),
    b"/head404": (b"HEAD", b"HTTP/1.1 404 Not Found", *[[(b"Content-Type", b"a/b"), (b"Content-Length", b"9")]] * 2),
}


async def test_a_response_without_content_ends_with_its_head(subtests: pytest.Subtests) -> None:
    """Whatever the service sends after such a head: a body there would be read as the next response."""
    extras = {b"": b"", b"?response": EVIL, b"?chunk": chunk(EVIL) + chunk(b"")}
    answers: dict[bytes, bytes | Play] = {
        target + query: head(start, *sent) + extra
        for target, (_, start, sent, _) in BODILESS.items()
        for query, extra in extras.items()
    }
    async with served(answering(answers)) as (_, tunnel), tunnel.visitor() as visitor:
        for target in answers:
            method, start, _, kept = BODILESS[target.partition(b"?")[0]]
            with subtests.test(target.decode()):
                await visitor.send(tunnel.request(method.decode(), target) + tunnel.request(target=b"/next"))
                got = await visitor.read_response(method.decode())
                assert without_date(got) == head(start, *kept)
                assert (await visitor.read_response()).body == b"real"


async def test_head_of_a_chunked_resource_has_no_body() -> None:
    answer = head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"evil") + chunk(b"")
    async with served(answering({b"/": answer})) as (_, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request("HEAD") + tunnel.request(target=b"/next"))
        got = await visitor.read_response("HEAD")
        assert not got.values(b"content-length"), "nothing is known of the length"
        assert (await visitor.read_response()).body == b"real"


async def test_bytes_after_a_response_are_not_the_next_one(subtests: pytest.Subtests) -> None:
    answers: dict[bytes, bytes | Play] = {
        b"/length": response(b"hello") + EVIL,
        b"/chunked": head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"hello") + chunk(b"") + EVIL,
        b"/zero": response(b"") + EVIL,
    }
    async with served(answering(answers)) as (origin, tunnel), tunnel.visitor() as visitor:
        for target in answers:
            with subtests.test(target.decode()):
                await visitor.send(tunnel.request(target=target) + tunnel.request(target=b"/next"))
                assert (await visitor.read_response()).body == (b"" if target == b"/zero" else b"hello")
                assert (await visitor.read_response()).body == b"real"
                first, second = origin.requests[-2:]
                assert first.connection != second.connection, "a connection with left-over bytes was used again"


async def test_a_local_connection_is_used_again() -> None:
    async with served(response(b"real")) as (origin, tunnel), tunnel.visitor() as visitor:
        for _ in range(5):
            await visitor.send(tunnel.request())
            assert (await visitor.read_response()).body == b"real"
        assert [seen.connection for seen in origin.requests] == [0] * 5


async def test_connection_close_is_for_the_hop_that_says_it() -> None:
    answers: dict[bytes, bytes | Play] = {b"/closing": response(b"bye", headers=[CLOSE])}
    async with served(answering(answers)) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request(target=b"/closing"))
        got = await visitor.read_response()
        assert (got.body, got.values(b"connection")) == (b"bye", [])
        await visitor.send(tunnel.request(headers=[CLOSE]))
        got = await visitor.read_response()
        assert (got.body, got.values(b"connection")) == (b"real", [b"close"])
        assert await visitor.read_until_close() == b""
        assert visitor.ended == "fin"
        assert (await tunnel.get()).body == b"real"
        first, second, third = origin.requests
        assert not second.values(b"connection")
        assert (first.connection, second.connection) == (0, third.connection)


# ---------------------------------------------------------------------------------------- Interim responses


async def test_interim_responses_arrive_before_the_final_one(subtests: pytest.Subtests) -> None:
    seen_by_visitor = asyncio.Semaphore(0)
    interim = {b"1": b"100 Continue", b"2": b"103 Early Hints", b"3": b"102 Processing", b"4": b"103 Early Hints"}
    links = [(b"Link", b"</a.css>; rel=preload"), (b"link", b"</b.js>")]

    async def hinting(request: RawRequest, reader: Reader, writer: Writer) -> None:
        for number, start in interim.items():
            writer.write(head(b"HTTP/1.1 " + start, *links, (b"N", number), (b"Connection", b"x")))
            await seen_by_visitor.acquire()
        writer.write(response(b"final", headers=[(b"N", b"5")]))

    async with served(answering({b"/": hinting})) as (_, tunnel):
        with subtests.test("HTTP/1.1"):
            async with tunnel.visitor() as visitor:
                await visitor.send(tunnel.request())
                for number, start in interim.items():
                    expected = head(b"HTTP/1.1 " + start, *links, (b"N", number))
                    assert (await visitor.read_head()).head == expected
                    seen_by_visitor.release()
                assert without_date(got := await visitor.read_response()) == head(
                    b"HTTP/1.1 200 OK", (b"N", b"5"), (b"Content-Length", b"5")
                )
                assert got.body == b"final"
                await visitor.send(tunnel.request(target=b"/next"))
                assert (await visitor.read_response()).body == b"real"
        with subtests.test("HTTP/1.0 knows none"):
            async with tunnel.visitor() as visitor:
                await visitor.send(head(b"GET / HTTP/1.0", HOST))
                for _ in interim:
                    seen_by_visitor.release()
                got = await visitor.read_response()
                assert (got.status, got.interim, got.body) == (200, [], b"final")


async def test_expect_continue_is_the_local_services_to_answer(subtests: pytest.Subtests) -> None:
    origin: RawOrigin

    async def willing(request: RawRequest, reader: Reader, writer: Writer) -> None:
        assert bytes(origin.connections[request.connection]) == request.head, "content before the 100"
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b"".join([piece async for piece in origin.iter_body(request, reader)])
        writer.write(response(b"got " + body))

    async def silent(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(b"got " + b"".join([piece async for piece in origin.iter_body(request, reader)])))

    refused = response(b"no", 417, reason=b"Expectation Failed")
    denied = response(b"who?", 401, [(b"WWW-Authenticate", b"Basic")], b"Unauthorized")
    answers: dict[bytes, bytes | Play] = {b"/willing": willing, b"/silent": silent, b"/417": refused, b"/401": denied}
    async with served(answering(answers)) as (origin, tunnel):
        for framing in ((b"Content-Length", b"5"), CHUNKED):
            with subtests.test(f"100, {framing[0].decode()}"):
                async with tunnel.visitor() as visitor:
                    fields = [framing, (b"Expect", b"100-Continue")]
                    await visitor.send(tunnel.request("POST", b"/willing", fields))
                    assert (await visitor.read_head()).head == b"HTTP/1.1 100 Continue\r\n\r\n"
                    await visitor.send(b"hello" if framing != CHUNKED else chunk(b"hello") + chunk(b""))
                    got = await visitor.read_response()
                    assert (got.status, got.body) == (200, b"got hello")
                    assert origin.requests[-1].values(b"expect") == [b"100-Continue"]
        with subtests.test("no answer"):  # nobody else says 100 in its place; the visitor goes on when it likes
            async with tunnel.visitor() as visitor:
                fields = [(b"Content-Length", b"5"), (b"Expect", b"100-continue")]
                await visitor.send(tunnel.request("POST", b"/silent", fields))
                await origin.wait_for(lambda: origin.requests[-1].target == b"/silent")
                assert (await tunnel.get()).body == b"real"
                assert not visitor.buffered
                await visitor.send(b"hello")
                got = await visitor.read_response()
                assert (got.status, got.body, got.interim) == (200, b"got hello", [])
        for target, status in {b"/417": 417, b"/401": 401}.items():
            with subtests.test(f"{status}"):
                async with tunnel.visitor() as visitor:
                    fields = [(b"Content-Length", b"%d" % len(CANARY)), (b"Expect", b"100-continue")]
                    await visitor.send(tunnel.request("POST", target, fields))
                    got = await visitor.read_response()
                    assert (got.status, got.interim) == (status, [])
                    assert not origin.requests[-1].complete
                    # The next bytes may be the body or a request: only closing is safe (RFC 9110, 10.1.1).
                    assert [value.lower() for value in got.values(b"connection")] == [b"close"]
        for value in (b"x", b"100-continue, x", b""):
            with subtests.test(f"Expect: {value.decode()}"):
                origin.requests.clear()
                fields = [(b"Content-Length", b"%d" % len(CANARY)), (b"Expect", value)]
                async with tunnel.visitor() as visitor:
                    await visitor.send(tunnel.request("POST", b"/x", fields))
                    assert (await visitor.read_response()).status == 417
                await assert_untouched(origin, tunnel)


# ---------------------------------------------------------------------------------------- Bad local services

OK = b"HTTP/1.1 200 OK\r\n"
INVALID = {
    "two equal lengths": OK + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nevil",
    "two lengths": OK + b"Content-Length: 4\r\nContent-Length: 0\r\n\r\nevil",
    "a list of lengths": OK + b"Content-Length: 4, 4\r\n\r\nevil",
    "length and chunked": OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": OK + b"Transfer-Encoding: identity\r\nConnection: close\r\n\r\nevil",
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked under HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    **{
        f"length {v!r}": OK + b"Content-Length: " + v + b"\r\n\r\nevil"
        for v in (b"+4", b"-4", b"", b"0x4", b"4_0", b"4.0", b"1e1", b"9" * 23, "٤".encode(), b"\xa04")
    },
    "NUL in a value": OK + b"A: b\0c\r\nContent-Length: 4\r\n\r\nevil",
    "CR in a value": OK + b"A: b\rSet-Cookie: evil\r\nContent-Length: 4\r\n\r\nevil",
    "LF in a value": OK + b"A: b\nSet-Cookie: evil\r\nContent-Length: 4\r\n\r\nevil",
    "ESC in a value": OK + b"A: \x1b[2J\r\nContent-Length: 4\r\n\r\nevil",
    "0x01 in a value": OK + b"A: \x01\r\nContent-Length: 4\r\n\r\nevil",
    "DEL in a value": OK + b"A: \x7f\r\nContent-Length: 4\r\n\r\nevil",
    "NUL in a name": OK + b"A\0: b\r\nContent-Length: 4\r\n\r\nevil",
    "space in a name": OK + b"A B: b\r\nContent-Length: 4\r\n\r\nevil",
    "space before colon": OK + b"Content-Length : 4\r\n\r\nevil",
    "no name": OK + b": b\r\nContent-Length: 4\r\n\r\nevil",
    "no colon": OK + b"nonsense\r\nContent-Length: 4\r\n\r\nevil",
    "obs-fold": OK + b"A: b\r\n c\r\nContent-Length: 4\r\n\r\nevil",
    "bare LFs": b"HTTP/1.1 200 OK\nContent-Length: 4\n\nevil\r\n\r\n",
    "no status line": b"hello\r\n\r\n",
    "an SSH banner": b"SSH-2.0-OpenSSH_9.9\r\n",
    "a TLS alert": bytes.fromhex("15030100020228"),
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "HTTP/1.11": b"HTTP/1.11 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    **{
        f"status {v!r}": b"HTTP/1.1 " + v + b" X\r\nContent-Length: 4\r\n\r\nevil"
        for v in (b"20", b"2000", b"99", b"099", b"600", b"999", b"000", b"+20", b"abc", b"", "٢٠٠".encode())
    },
    "an unsolicited 101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n" + EVIL,
    "eleven interim": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 11 + response(b"evil"),
    "a body after 103": b"HTTP/1.1 103 Early Hints\r\nContent-Length: 4\r\n\r\nevil" + EVIL,
    "129 fields": OK + b"A: b\r\n" * 129 + b"Content-Length: 4\r\n\r\nevil",
    "70 KiB of fields": OK + (b"A: " + b"b" * 7000 + b"\r\n") * 10 + b"Content-Length: 4\r\n\r\nevil",
    "a line without end": OK + b"A: " + b"b" * 70_000,
    "a bad chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n0x4\r\nevil\r\n0\r\n\r\n",
}


async def test_an_answer_that_is_not_http_is_a_502(subtests: pytest.Subtests) -> None:
    answers: dict[bytes, bytes | Play] = {b"/%d" % i: raw for i, raw in enumerate(INVALID.values())}
    async with served(answering(answers)) as (origin, tunnel), tunnel.visitor() as visitor:
        for number, name in enumerate(INVALID):
            with subtests.test(name):
                async with tunnel.visitor() as visitor:
                    await visitor.send(tunnel.request(target=b"/%d" % number) + tunnel.request(target=b"/next"))
                    got = await visitor.read_response()
                    while got.status == 103:
                        got = await visitor.read_response()
                    assert problem(got) == (502, b"local-invalid"), got.head
                    assert b"evil" not in got.head + got.body
                    assert (await visitor.read_response()).body == b"real", "the connection goes on"
                bad = next(seen for seen in reversed(origin.requests) if seen.target == b"/%d" % number)
                await origin.wait_for(lambda bad=bad: not origin.connections[bad.connection].open, 5, "the end of it")


async def test_a_reason_that_may_not_be_there_is_dropped(subtests: pytest.Subtests) -> None:
    reasons = [b"\x1b[2J", b"a\x01b", b"\x7f", b"a\0b"]
    answers: dict[bytes, bytes | Play] = {b"/%d" % i: response(b"hi", reason=r) for i, r in enumerate(reasons)}
    async with served(answering(answers)) as (_, tunnel):
        for target in answers:
            with subtests.test(f"{reasons[int(target[1:])]!r}"):
                assert without_date(got := await tunnel.get(target)) == b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n"
                assert got.body == b"hi"


def breaking(sent: bytes, *, how: str) -> Play:
    """Send this and break off."""

    async def play(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(sent)
        await writer.drain()
        if how == "reset":
            reset(writer)
        else:
            writer.close()

    return play


async def test_a_service_that_breaks_off_before_its_head_is_a_502(subtests: pytest.Subtests) -> None:
    starts = {
        "nothing": b"",
        "version": b"HTTP/1.1",
        "status": b"HTTP/1.1 200 OK\r\n",
        "fields": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n",
        "almost": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r",
        "interim": b"HTTP/1.1 103 Early Hints\r\n\r\n",
    }
    answers: dict[bytes, bytes | Play] = {
        f"/{name}/{how}".encode(): breaking(sent, how=how)
        for name, sent in starts.items()
        for how in ("close", "reset")
    }
    async with served(answering(answers), keep_alive=False) as (origin, tunnel), tunnel.visitor() as visitor:
        for target in answers:
            for method in ("GET", "POST"):
                with subtests.test(f"{method} {target.decode()}"):
                    origin.requests.clear()
                    await visitor.send(tunnel.request(method, target, body=b"x" if method == "POST" else None))
                    got = await visitor.read_response()
                    assert problem(got) == (502, b"local-reset")
                    assert [seen.target for seen in origin.requests] == [target], "it was sent twice"
                    origin.requests.clear()
                    await visitor.send(tunnel.request("POST", b"/next", body=b"x"))
                    assert (await visitor.read_response()).body == b"real"


CUT_SHORT = {
    "in a length": head(b"HTTP/1.1 200 OK", (b"Content-Length", b"10")) + b"half",
    "before a length's first byte": head(b"HTTP/1.1 200 OK", (b"Content-Length", b"10")),
    "in a chunk": head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"half") + b"5\r\nha",
    "after a chunk's size": head(b"HTTP/1.1 200 OK", CHUNKED) + b"5\r\n",
    "between chunks": head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"half"),
    "in the last chunk": head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"half") + b"0\r\n",
    "in the trailers": head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"half") + b"0\r\nA: b\r\n",
    "by a bad chunk": head(b"HTTP/1.1 200 OK", CHUNKED) + chunk(b"half") + b"zz\r\n",
    "by a long chunk": head(b"HTTP/1.1 200 OK", CHUNKED) + b"4\r\nhalf!\r\n" + chunk(b""),
}


@pytest.mark.parametrize("old", [False, True], ids=["HTTP/1.1", "HTTP/1.0"])
async def test_a_body_cut_short_by_the_service_is_cut_short_for_the_visitor(
    old: bool, subtests: pytest.Subtests
) -> None:
    """The head is on its way before the cut, so there is no taking it back."""
    head_seen = asyncio.Event()

    def cutting(raw: bytes, how: str) -> Play:
        async def play(request: RawRequest, reader: Reader, writer: Writer) -> None:
            start, _, rest = raw.partition(b"\r\n\r\n")
            writer.write(start + b"\r\n\r\n")
            await head_seen.wait()
            await breaking(rest, how=how)(request, reader, writer)

        return play

    table = {f"{name}, {how}": cutting(raw, how) for name, raw in CUT_SHORT.items() for how in ("close", "reset")}
    table["of what ends with the connection, reset"] = cutting(head(b"HTTP/1.1 200 OK", CLOSE) + b"half", "reset")
    answers: dict[bytes, bytes | Play] = {b"/%d" % i: play for i, play in enumerate(table.values())}
    async with served(answering(answers)) as (_, tunnel):
        for number, name in enumerate(table):
            with subtests.test(name):
                head_seen.clear()
                async with tunnel.visitor() as visitor:
                    await visitor.send(head(b"GET /%d HTTP/1.%d" % (number, not old), HOST))
                    got = await visitor.read_head()
                    assert got.status == 200
                    head_seen.set()
                    body = b""
                    with pytest.raises(Truncated):
                        async for piece in visitor.iter_body(got):
                            body += piece
                    assert b"halfhalf".startswith(body)
                    if old and got.framing() == "close":
                        assert visitor.ended == "reset", "a FIN would be a clean end"


async def test_nothing_listening_is_a_502_until_something_does() -> None:
    async with served(response(b"before")) as (origin, tunnel), tunnel.visitor() as visitor:
        for _ in range(2):
            await visitor.send(tunnel.request())
            assert (await visitor.read_response()).body == b"before"
        await origin.aclose()
        for method in ("GET", "POST"):
            await visitor.send(tunnel.request(method, body=b"x"))
            got = await visitor.read_response()
            assert problem(got) == (502, b"local-refused")
            assert b"local" in got.body
        async with RawOrigin(response(b"after"), port=origin.port):
            await visitor.send(tunnel.request())
            assert (await visitor.read_response()).body == b"after"
        assert not [event for event in tunnel.client.events if event["event"] == "disconnected"]


# ---------------------------------------------------------------------------------------- Error pages


async def test_error_pages_speak_the_visitors_language(subtests: pytest.Subtests) -> None:
    browser = b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    async with served(response(b"real")) as (origin, tunnel):
        await origin.aclose()
        for host, code, status in (
            (b"nope.localhost", b"unknown-tunnel", 404),
            (b"web.localhost", b"local-refused", 502),
        ):
            for accept, kind in {
                browser: b"text/html; charset=utf-8",
                b"application/json": b"application/json",
                b"application/problem+json": b"application/json",
                b"*/*": b"text/plain; charset=utf-8",
                b"": b"text/plain; charset=utf-8",
                b"\xff<script>": b"text/plain; charset=utf-8",
            }.items():
                with subtests.test(f"{code.decode()}, Accept: {accept!r}"):
                    fields = [(b"Host", host), (b"Accept", accept)]
                    async with tunnel.visitor() as visitor:
                        await visitor.send(head(b"GET /<b>x HTTP/1.1", *fields))
                        got = await visitor.read_response()
                        await visitor.send(head(b"HEAD /<b>x HTTP/1.1", *fields))
                        assert (await visitor.read_response("HEAD")).headers[:-1] == got.headers[:-1]
                    assert problem(got) == (status, code)
                    assert got.value(b"content-type") == kind
                    assert got.values(b"server") == []
                    assert code in got.body
                    assert b"<b>x" not in got.body
                    assert b"<script>" not in got.body
                    assert (b"<h1>" in got.body) == kind.startswith(b"text/html")
                    if kind == b"application/json":
                        assert json.loads(got.body)["error"] == code.decode()


# ---------------------------------------------------------------------------------------- Where to forward


@contextlib.asynccontextmanager
async def one_more_client(tunnel: Tunnel, *targets: str, name: str | None = "more") -> AsyncIterator[Process]:
    """A client of the tunnel's server for these targets, ready for visitors."""
    args = ["connect", *targets, "--server", tunnel.server_url, "--token", tunnel.token, "--json"]
    async with await Process.start(*args, *(["--name", name] if name else [])) as client:
        for _ in targets:
            await client.event("ready")
        yield client
        assert_quiet(client)


async def ask(tunnel: Tunnel, name: bytes, target: bytes = b"/", body: bytes | None = None) -> RawResponse:
    """One request to the tunnel of that name."""
    fields = [(b"Host", name + b".localhost")]
    if body is not None:
        fields.append((b"Content-Length", b"%d" % len(body)))
    async with tunnel.visitor() as visitor:
        await visitor.send(head(b"%b %b HTTP/1.1" % (b"GET" if body is None else b"POST", target), *fields))
        await visitor.send(body or b"")
        return await visitor.read_response()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_localhost_is_either_loopback(address: str, subtests: pytest.Subtests) -> None:
    bracketed = f"[{address}]" if ":" in address else address
    async with served(response(b"other")) as (_, tunnel), RawOrigin(response(b"real"), host=address) as origin:
        for target in (
            f"{origin.port}", f"localhost:{origin.port}", f"http://localhost:{origin.port}/",
            f"{bracketed}:{origin.port}", f"http://{bracketed}:{origin.port}",
        ):  # fmt: skip
            with subtests.test(target):
                async with one_more_client(tunnel, target):
                    assert (await ask(tunnel, b"more")).body == b"real"
                    assert (await ask(tunnel, b"more")).body == b"real"
                    assert (await ask(tunnel, b"web")).body == b"other"


async def test_two_targets_in_one_process(subtests: pytest.Subtests) -> None:
    async with contextlib.AsyncExitStack() as stack:
        web, tunnel = await stack.enter_async_context(served(response(b"web")))
        api = await stack.enter_async_context(RawOrigin(response(b"api")))
        targets = (f"one={web.port}", f"two=127.0.0.1:{api.port}")
        async with one_more_client(tunnel, *targets, name=None):
            for _ in range(3):
                assert (await ask(tunnel, b"one")).body == b"web"
                assert (await ask(tunnel, b"two")).body == b"api"
            with subtests.test("one of them down"):
                await api.aclose()
                assert problem(await ask(tunnel, b"two")) == (502, b"local-refused")
                assert (await ask(tunnel, b"one")).body == b"web"


async def small_service(reader: Reader, writer: Writer) -> None:
    """A service where RawOrigin cannot be one: echoes bodies; /close ends its response with the connection."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            got = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\nContent-Length: ([0-9]+)\r\n", got)
            body = await reader.readexactly(int(length[1])) if length else got
            if got.startswith(b"GET /close "):
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
                break
            writer.write(response(body))
            await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def complaining(_: Reader, writer: Writer) -> None:
    """A service that takes a TLS handshake for a bad request."""
    writer.write(response(b"what?", 400, [CLOSE], b"Bad Request"))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def assert_serves(tunnel: Tunnel, name: bytes) -> None:
    host = name + b".localhost"
    for target in (b"/", b"/again", b"/close"):
        expected = head(b"GET %b HTTP/1.1" % target, (b"Host", host), *forwarded(host))
        assert (await ask(tunnel, name, target)).body == expected
    body = pattern(0, 2 * MiB)
    assert (await ask(tunnel, name, b"/big", body)).body == body


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_https_target_with_a_self_signed_certificate(host: str, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "this test makes its certificate with the openssl command"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subjects = ["-subj", "/CN=somebody else", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, [openssl, *make, *subjects], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with served(response(b"plain")) as (_, tunnel):
        service = await asyncio.start_server(small_service, "127.0.0.1", 0, ssl=context)
        async with service:
            port = service.sockets[0].getsockname()[1]
            async with one_more_client(tunnel, f"https://{host}:{port}"):
                await assert_serves(tunnel, b"more")
            async with one_more_client(tunnel, f"http://{host}:{port}"):  # which wants TLS
                assert (await ask(tunnel, b"more")).status == 502
        plain = await asyncio.start_server(complaining, "127.0.0.1", 0)
        async with plain:
            port = plain.sockets[0].getsockname()[1]
            async with one_more_client(tunnel, f"https://{host}:{port}"):  # which speaks no TLS
                assert (await ask(tunnel, b"more")).status == 502


async def test_unix_target(tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    async with served(response(b"tcp")) as (_, tunnel), one_more_client(tunnel, f"unix:{path}"):
        assert problem(await ask(tunnel, b"more")) == (502, b"local-refused")
        async with await asyncio.start_unix_server(small_service, path):
            await assert_serves(tunnel, b"more")


# ---------------------------------------------------------------------------------------- Out of step


@pytest.mark.parametrize("framing", [(b"Content-Length", b"%d" % 2**40), CHUNKED], ids=["length", "chunked"])
async def test_an_early_error_ends_an_upload(framing: Header) -> None:
    """The visitor gets the whole answer although it still sends; then it is not listened to for ever."""
    answer = head(b"HTTP/1.1 413 Content Too Large", CLOSE, (b"Content-Length", b"3")) + b"big"
    async with served(answering({b"/up": answer})) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request("POST", b"/up", [framing]))
        piece = pattern(0, 64 * KiB)
        piece = piece if framing != CHUNKED else chunk(piece)
        await visitor.send(piece)
        got = await visitor.read_response()
        assert (got.status, got.body) == (413, b"big")
        assert [value.lower() for value in got.values(b"connection")] == [b"close"]
        await origin.wait_for(lambda: not origin.open_connections)
        assert (await tunnel.get()).body == b"real", "others are not affected"
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 64 * MiB:
                await visitor.send(piece)
                sent += len(piece)
        assert origin.bytes_received < MiB
        assert not origin.requests[0].complete


async def test_a_visitor_who_writes_everything_first_gets_the_early_error() -> None:
    """Closing at once would break off its writing, and many would never come to read."""
    size = 8 * MiB
    answer = head(b"HTTP/1.1 413 Content Too Large", CLOSE, (b"Content-Length", b"3")) + b"big"
    async with served(answering({b"/up": answer})) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request("POST", b"/up", [(b"Content-Length", b"%d" % size)]) + b"x")
        await origin.wait_for(lambda: origin.connections and not origin.open_connections)
        await visitor.socket.readable()  # the response is there
        await visitor.send(b"x" * (size - 1))
        got = await visitor.read_response()
        assert (got.status, got.body) == (413, b"big")
        assert await visitor.read_until_close() == b""


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_early_answer_does_not_end_the_upload(framing: str) -> None:
    size, half = 4 * MiB, 2 * MiB
    checked = PatternChecker()
    origin: RawOrigin

    async def early(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(b"thanks"))
        await writer.drain()
        async for piece in origin.iter_body(request, reader):
            checked.feed(piece)

    async with served(early) as (origin, tunnel), tunnel.visitor() as visitor:
        field = CHUNKED if framing == "chunked" else (b"Content-Length", b"%d" % size)
        wrap = chunk if framing == "chunked" else bytes
        await visitor.send(tunnel.request("POST", b"/", [field]) + wrap(pattern(0, half)))
        got = await visitor.read_response()
        assert (got.status, got.body) == (200, b"thanks")
        assert not origin.requests[0].complete
        await visitor.send(wrap(pattern(half, half)) + (chunk(b"") if framing == "chunked" else b""))
        await origin.wait_requests(1)
        assert checked.offset == size


@pytest.mark.parametrize("how", ["abort", "close", "write_eof"])
async def test_the_local_service_sees_the_visitor_go(how: str, subtests: pytest.Subtests) -> None:
    async def hold(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/download":
            writer.write(head(b"HTTP/1.1 200 OK", CHUNKED))
            while True:
                writer.write(chunk(pattern(0, 64 * KiB)))
                await writer.drain()
        while await reader.read(64 * KiB):
            pass

    answers: dict[bytes, bytes | Play] = dict.fromkeys((b"/upload", b"/download", b"/wait"), hold)
    async with served(answering(answers)) as (origin, tunnel):
        for target in answers:
            with subtests.test(target.decode()):
                origin.requests.clear()
                async with tunnel.visitor() as visitor:
                    if target == b"/upload":
                        await visitor.send(tunnel.request("POST", target, [(b"Content-Length", b"%d" % MiB)]) + b"half")
                    else:
                        await visitor.send(tunnel.request(target=target))
                    await origin.wait_for(lambda: origin.requests)
                    connection = origin.connections[origin.requests[0].connection]
                    await origin.wait_for(
                        lambda c=connection, t=target: c.endswith(b"half" if t == b"/upload" else b"\r\n\r\n")
                    )
                    if target == b"/download":
                        assert (await visitor.read_head()).status == 200
                        await visitor.read_exactly(MiB)
                    assert connection.open
                    getattr(visitor, how)()
                    await origin.wait_for(lambda c=connection: not c.open, 5, "the end of the origin's connection")
                    if how == "write_eof":
                        await visitor.read_until_close()
                assert (await tunnel.get(b"/next")).body == b"real"


async def test_a_visitor_who_half_closes_is_answered_or_cut_off() -> None:
    async with served(response(b"real")) as (_, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        visitor.write_eof()
        got = await visitor.read_until_close()
        assert got == b"" or parse_response_head(got.partition(b"\r\n\r\n")[0] + b"\r\n\r\n").status == 200
        assert (await tunnel.get()).body == b"real"


async def test_a_port_without_a_service_is_no_reason_not_to_start() -> None:
    port = free_port()
    async with Tunnel(port) as tunnel:
        assert problem(await tunnel.get()) == (502, b"local-refused")


async def test_a_visitor_may_send_and_receive_one_byte_at_a_time() -> None:
    async with served(response(b"real"), read_body=True) as (origin, tunnel):
        async with RawVisitor(tunnel.port, rcvbuf=2048) as visitor:
            for byte in tunnel.request("POST", b"/slow", [(b"A", b"1")], b"hello"):
                await visitor.send(bytes([byte]))
            assert (await visitor.read_response()).body == b"real"
        expected = head(b"POST /slow HTTP/1.1", HOST, (b"A", b"1"), (b"Content-Length", b"5"), *forwarded())
        assert (origin.requests[0].head, origin.requests[0].body) == (expected, b"hello")
