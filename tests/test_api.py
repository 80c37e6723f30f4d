"""The Python API in one event loop, what changes on the way, the hint, the log's bounds, and the views of a record."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import datetime
import gc
import gzip
import itertools
import json
import random
import resource
import struct
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from support import Header, RawOrigin, RawRequest, RawResponse, RawVisitor, eventually, pattern, request, response
from test_cli import OTHER_TOKEN, TOKEN

import pytunnel
from pytunnel import (
    MAX_EXCHANGES,
    MAX_LOG,
    MAX_NOTE,
    MAX_NOTES,
    MAX_PREFIX,
    MAX_VIEW,
    EventReader,
    Exchange,
    ExchangeLog,
    KiB,
    MessageError,
    MiB,
    Refused,
    ResponseHead,
    Settings,
    TunnelClient,
    UsageError,
    WebSocketReader,
    as_curl,
    as_har,
    body_view,
    human_size,
    indent_json,
    mask,
    mask_headers,
)


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the user's own counts here, and nothing is left there."""
    for name in ("PYTUNNEL_SERVER", "PYTUNNEL_TOKEN", "PYTUNNEL_NAME", "PYTUNNEL_AUTH", "PYTUNNEL_LOOP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTUNNEL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PYTUNNEL_CONFIG", str(tmp_path / "config.toml"))


@contextlib.asynccontextmanager
async def connected(*targets: int | str, **options: Any) -> AsyncIterator[TunnelClient]:
    """A server and a client in this event loop."""
    options.setdefault("name", "web" if len(targets) == 1 else "")
    async with (
        pytunnel.serve() as server,
        pytunnel.connect(*targets, server=server.url, token=server.token, **options) as tunnel,
    ):
        yield tunnel


async def fetch(
    url: str, method: str = "GET", target: bytes = b"/", headers: Iterable[Header] = (), body: bytes | None = None
) -> RawResponse:
    """One request to a public URL."""
    parts = urlsplit(url)
    async with RawVisitor(parts.port or 0) as visitor:
        await visitor.send(request(method, target, parts.netloc.encode(), headers, body))
        return await visitor.read_response(method)


@pytest.fixture
async def local() -> AsyncIterator[RawOrigin]:
    async with RawOrigin(response(b"hello"), read_body=True) as origin:
        yield origin


# ---------------------------------------------------------------------------------------- connect and serve


async def test_connect_and_serve_last_as_long_as_their_blocks(local: RawOrigin) -> None:
    before = asyncio.all_tasks()
    async with pytunnel.serve() as server:
        assert server.url.startswith("http://127.0.0.1:") and len(server.token) >= 16
        async with pytunnel.connect(local.port, server=server.url, token=server.token, name="web") as tunnel:
            url = tunnel.url
            assert (url, tunnel.urls) == (f"http://web.localhost:{urlsplit(server.url).port}", [url])
            assert (await fetch(url)).body == b"hello"
        async with pytunnel.connect(f"web={local.port}", server=server.url, token=server.token) as again:
            assert (again.url, (await fetch(again.url)).body) == (url, b"hello")
    assert asyncio.all_tasks() == before
    with pytest.raises(ConnectionRefusedError):
        await fetch(url)


async def test_several_tunnels_and_a_folder(local: RawOrigin, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.html").write_text("a page")
    async with connected(f"a={local.port}", f"b={tmp_path}/dist", spa=True) as tunnel:
        assert [urlsplit(url).netloc.partition(".")[0] for url in tunnel.urls] == ["a", "b"]
        html = [(b"Accept", b"text/html")]
        bodies = [(await fetch(url, target=b"/some/path", headers=html)).body for url in tunnel.urls]
        assert bodies == [b"hello", b"a page"]


def test_two_threads_have_a_tunnel_each() -> None:
    """What one of them reads does not get into what the other one has just read."""

    async def download(byte: bytes) -> None:
        async with RawOrigin(response(byte * MiB)) as origin, connected(origin.port) as tunnel:
            for _ in range(20):
                assert (await fetch(tunnel.url)).body == byte * MiB

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(asyncio.run, download(byte)) for byte in (b"a", b"z")]:
            done.result()


async def test_a_request_leaves_nothing_for_the_garbage_collector(local: RawOrigin) -> None:
    """Else what has left the log is kept beside it for as long as the collector waits."""
    async with connected(local.port) as tunnel:
        parts = urlsplit(tunnel.url)
        async with RawVisitor(parts.port or 0) as visitor:

            async def get() -> None:
                await visitor.send(request("GET", b"/", parts.netloc.encode()))
                assert (await visitor.read_response("GET")).body == b"hello"
                await eventually(lambda: not tunnel.log.in_flight, what="its end")

            await get()
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    await get()
                kinds = (pytunnel.Stream, pytunnel.Forwarding, pytunnel.ResponseParser)
                assert [type(kept) for kept in gc.get_objects() if isinstance(kept, kinds)] == []
            finally:
                gc.enable()


async def test_the_api_remembers_nothing(local: RawOrigin, tmp_path: Path) -> None:
    """A test suite must not change what `pytunnel connect` does tomorrow."""
    async with connected(local.port):
        pass
    assert not (tmp_path / "state" / "client.json").exists()
    assert not (tmp_path / "state" / "run").exists()


async def test_a_state_directory_keeps_names(local: RawOrigin, tmp_path: Path) -> None:
    """A name belongs to the token that first used it, in the same directory."""
    state = tmp_path / "server"
    async with (
        pytunnel.serve(token=TOKEN, state=state) as server,
        pytunnel.connect(local.port, server=server.url, token=TOKEN, name="web"),
    ):
        pass
    async with pytunnel.serve(token=OTHER_TOKEN, state=state) as server:
        with pytest.raises(Refused) as caught:
            async with pytunnel.connect(local.port, server=server.url, token=OTHER_TOKEN, name="web"):
                pass
        assert caught.value.exit_status == 4


async def test_refusals_raise(local: RawOrigin) -> None:
    before = asyncio.all_tasks()
    async with pytunnel.serve() as server:
        table: list[tuple[type[Exception], dict[str, Any]]] = [
            (Refused, {"token": OTHER_TOKEN}),
            (Refused, {"name": "-a"}),
            (UsageError, {"token": ""}),
            (UsageError, {"header": ["no colon"]}),
            (UsageError, {"route": ["api=3000"]}),
            (UsageError, {"host_header": "a b"}),
        ]
        for error, options in table:
            with pytest.raises(error):
                async with pytunnel.connect(local.port, **{"server": server.url, "token": server.token, **options}):
                    pytest.fail(f"entered with {options}")
    with pytest.raises(UsageError):
        async with pytunnel.serve(token="short"):
            pass
    assert asyncio.all_tasks() == before


async def test_an_error_in_the_block_goes_through(local: RawOrigin) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        async with connected(local.port):
            raise ZeroDivisionError
    assert asyncio.all_tasks() == before


async def test_a_session_lost_for_good_raises_at_the_end(local: RawOrigin) -> None:
    async with pytunnel.serve() as server:
        options: dict[str, Any] = {"server": server.url, "token": server.token, "name": "web"}
        with pytest.raises(Refused) as caught:
            async with pytunnel.connect(local.port, **options), pytunnel.connect(local.port, **options) as second:
                assert (await fetch(second.url)).body == b"hello"
        assert (caught.value.code, caught.value.exit_status) == ("replaced", 4)


async def test_an_error_in_the_block_is_not_replaced_by_a_lost_session(local: RawOrigin) -> None:
    before = asyncio.all_tasks()
    async with pytunnel.serve() as server:
        options: dict[str, Any] = {"server": server.url, "token": server.token, "name": "web"}
        with pytest.raises(ZeroDivisionError):
            async with pytunnel.connect(local.port, **options) as first:
                async with pytunnel.connect(local.port, **options):
                    await eventually(lambda: first._fatal, what="the first one's end")
                raise ZeroDivisionError
    assert asyncio.all_tasks() == before


async def test_a_response_on_its_way_is_complete_when_the_context_is_left() -> None:
    body, leaving = pattern(0, 2 * MiB), asyncio.Event()

    async def answer(_: RawRequest, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:1000])
        await leaving.wait()
        writer.write(body[1000:])
        await writer.drain()

    async with RawOrigin(answer) as local, pytunnel.serve() as server:
        async with pytunnel.connect(local.port, server=server.url, token=server.token) as tunnel:
            visiting = asyncio.ensure_future(fetch(tunnel.url))
            await eventually(lambda: tunnel.log.bytes_out == 1000, what="its first bytes")
            leaving.set()
        answered = await visiting
        assert answered.clean and answered.body == body


async def test_a_server_that_gives_other_tunnels_than_asked_for(
    local: RawOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One link, no crash, and a reason that says what is wrong."""
    encode, given = pytunnel.encode_message, 0

    def lie(type_: str, **fields: Any) -> str:
        if type_ == "ready":
            fields["tunnels"] = (fields["tunnels"] * 2)[:given]
        return encode(type_, **fields)

    monkeypatch.setattr(pytunnel, "encode_message", lie)
    async with pytunnel.serve() as server:
        for given in (0, 1, 3):
            settings = Settings({"server": server.url, "token": server.token})
            tunnels = settings.from_targets([f"a={local.port}", f"b={local.port}"])
            client = TunnelClient(server.url, server.token, tunnels, max_retries=0)
            with pytest.raises(pytunnel.Unreachable, match=f"{given} tunnels, asked for were 2"):
                await client.run()
            assert client.urls == []


async def test_leaving_ends_what_still_runs(tmp_path: Path) -> None:
    """At once: a test suite has no time to wait for a response that never ends."""

    async def never(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await writer.drain()
        await reader.read()

    async with RawOrigin(never) as local, pytunnel.serve() as server:
        async with pytunnel.connect(local.port, server=server.url, token=server.token) as tunnel:
            parts = urlsplit(tunnel.url)
            visitor = await RawVisitor(parts.port or 0).__aenter__()
            await visitor.send(request("GET", b"/", parts.netloc.encode()))
            await visitor.read_until(b"half")
            left = time.monotonic()
        assert time.monotonic() - left < 4, "less than what running exchanges get on the command line"
        assert await visitor.read_until_close() == b""
        visitor.close()


# ---------------------------------------------------------------------------------------- wait_for


async def test_wait_for_what_has_come_and_what_will(local: RawOrigin) -> None:
    async with connected(f"web={local.port}", f"api={local.port}") as tunnel:
        web, api = tunnel.urls
        await fetch(web, "POST", b"/hook/1?x=1", body=b"one")
        await fetch(api, "POST", b"/hook/2", body=b"two")

        async def ids(**wanted: Any) -> int:
            return (await tunnel.wait_for(timeout=5, **wanted)).id

        assert await ids() == 1
        assert await ids(method="post", path="/hook/?") == 1
        assert await ids(path="/hook/*", count=2) == 2
        assert await ids(tunnel="api") == 2
        assert await ids(after=1) == 2
        first = await tunnel.wait_for(path="/hook/1")
        assert (first.method, first.target, first.request_body, first.status) == ("POST", "/hook/1?x=1", b"one", 200)

        for wanted in ({"after": 2}, {"path": "/hook/[12]"}, {"method": "GET"}, {"path": "/hook"}, {"count": 3}):
            waiting = asyncio.ensure_future(tunnel.wait_for(timeout=None, **wanted))
            await asyncio.sleep(0)
            assert not waiting.done(), wanted
            with pytest.raises(TimeoutError):
                await tunnel.wait_for(timeout=0.01, **wanted)
            waiting.cancel()

        waits = [
            asyncio.ensure_future(tunnel.wait_for(path="/later", timeout=5)),
            asyncio.ensure_future(tunnel.wait_for(path="/*", count=4, timeout=5)),
            asyncio.ensure_future(tunnel.wait_for(after=3, timeout=5)),
        ]
        await asyncio.sleep(0)
        await fetch(web, target=b"/later")
        assert (await waits[0]).id == 3
        assert not waits[1].done() and not waits[2].done()
        await fetch(web, target=b"/last")
        assert [(await wait).id for wait in waits] == [3, 4, 4]


async def test_wait_for_waits_for_the_end_of_an_exchange() -> None:
    go_on = asyncio.Event()

    async def slow(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        await go_on.wait()
        writer.write(b"half")

    async with RawOrigin(slow) as local, connected(local.port) as tunnel:
        visiting = asyncio.ensure_future(fetch(tunnel.url))
        waiting = asyncio.ensure_future(tunnel.wait_for(timeout=5))
        await eventually(lambda: tunnel.log.exchanges and tunnel.log.exchanges[1].bytes_out == 4, what="half of it")
        assert not waiting.done()
        go_on.set()
        assert (await waiting).response_body == b"halfhalf"
        await visiting


async def test_wait_for_finds_an_event_stream_that_is_still_open() -> None:
    async def stream(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await reader.read()

    async with RawOrigin(stream) as local, connected(local.port) as tunnel:
        visiting = asyncio.ensure_future(fetch(tunnel.url, target=b"/events"))
        found = await tunnel.wait_for(path="/events", timeout=5)
        assert (found.status, found.ended, tunnel.log.in_flight) == (200, None, 1)
        with pytest.raises(TimeoutError):  # it is one, also when more of it comes
            await tunnel.wait_for(path="/events", count=2, timeout=0)
        await local.aclose()
        await visiting


async def test_wait_for_misses_nothing_in_a_flood(local: RawOrigin) -> None:
    """2,000 other requests, which is four times what the log keeps: those that are wanted are seen as they pass."""
    asyncio.get_running_loop().set_debug(False)  # it would take most of the time of so many requests
    async with connected(local.port) as tunnel:
        wanted = asyncio.ensure_future(tunnel.wait_for(path="/wanted/*", count=10, timeout=60))
        parts = urlsplit(tunnel.url)

        async def visit(number: int) -> None:
            async with RawVisitor(parts.port or 0) as visitor:
                for i in range(201):
                    target = b"/wanted/%d" % number if i == 20 * number else b"/other"
                    await visitor.send(request("GET", target, parts.netloc.encode()))
                    assert (await visitor.read_response()).status == 200

        async with asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(visit(number))
        assert (await wanted).path.startswith("/wanted/")
        assert tunnel.log.total == 2010
        assert len(tunnel.log.exchanges) == MAX_EXCHANGES


# ---------------------------------------------------------------------------------------- replay


async def test_replay_with_and_without_edits(local: RawOrigin) -> None:
    async with connected(local.port, header=["X-Put: 1"]) as tunnel:
        await fetch(tunnel.url, "POST", b"/hook?x=%20", [(b"X-One", b"1"), (b"x-one", b"2")], b"\0body")
        recorded = await tunnel.wait_for()
        again = await tunnel.replay(recorded)
        assert (again.id, again.replay_of, again.status, again.response_body) == (2, 1, 200, b"hello")
        first, second = local.requests
        assert (first.method, first.target, first.body) == (second.method, second.target, second.body)
        assert sorted(first.headers) == sorted(second.headers)

        edits: list[dict[str, Any]] = [
            {"method": "PUT"},
            {"target": "/other"},
            {"body": b"longer than before"},
            {"body": b""},
            {"headers": [(b"Host", b"x"), (b"A", b"b"), (b"Content-Length", b"999"), (b"Connection", b"close")]},
        ]
        for edit in edits:
            await tunnel.replay(recorded, **edit)
        put, other, longer, empty, bare = local.requests[2:]
        assert (put.method, put.target, put.body) == (b"PUT", b"/hook?x=%20", b"\0body")
        assert (other.method, other.target, other.body) == (b"POST", b"/other", b"\0body")
        assert (longer.body, longer.value(b"Content-Length")) == (b"longer than before", b"18")
        assert (empty.body, empty.value(b"Content-Length")) == (b"", b"0")
        assert dict(bare.headers) == {b"X-Put": b"1", b"Host": b"x", b"A": b"b", b"Content-Length": b"5"}
        assert bare.body == b"\0body"
        assert recorded.request_headers[0][0] == b"Host" and recorded.status == 200, "the record stays as it was"


@pytest.mark.parametrize(
    "edits",
    [
        {"method": "A B"}, {"method": ""}, {"target": "/a b"}, {"target": "x"}, {"target": "http://other/"},
        {"target": "/\r\nX: y"}, {"headers": [(b"a b", b"")]}, {"headers": [(b"X", b"a\r\nY: b")]},
        {"target": "/" + "x" * 70_000},
    ],
    ids=lambda edits: repr(edits)[:30],
)  # fmt: skip
async def test_replay_of_no_request_raises_and_sends_nothing(local: RawOrigin, edits: dict[str, Any]) -> None:
    async with connected(local.port) as tunnel:
        await fetch(tunnel.url)
        recorded = await tunnel.wait_for()
        with pytest.raises(MessageError):
            await tunnel.replay(recorded, **edits)
        assert len(local.requests) == 1 and tunnel.log.total == 1


async def test_replay_needs_the_whole_content(local: RawOrigin) -> None:
    async with connected(local.port) as tunnel:
        await fetch(tunnel.url, "POST", body=bytes(MAX_PREFIX + 1))
        recorded = await tunnel.wait_for()
        with pytest.raises(MessageError, match=f"only {MAX_PREFIX} bytes of its content were kept"):
            await tunnel.replay(recorded)
        again = await tunnel.replay(recorded, body=b"short")
        assert (again.status, local.requests[-1].body) == (200, b"short")


async def test_replay_to_a_service_that_is_down() -> None:
    local = RawOrigin(response(b"hello"))
    async with local, connected(local.port) as tunnel:
        await fetch(tunnel.url)
        await local.aclose()
        again = await tunnel.replay(await tunnel.wait_for())
        assert (again.status, again.error) == (502, f"cannot connect to {local.port}: connection refused")


# ---------------------------------------------------------------------------------------- What changes on the way


async def test_fields_of_requests_and_responses() -> None:
    fields = [(b"Server", b"s/1"), (b"X-Frame-Options", b"ALLOW"), (b"Set-Cookie", b"a=1"), (b"set-cookie", b"b")]
    async with (
        RawOrigin(response(b"hello", headers=fields)) as local,
        connected(
            local.port,
            header=["X-New: a: b", "Accept: text/x"],
            remove_header=["cookie", "X-Gone"],
            response_header=["X-Frame-Options: DENY", "Access-Control-Allow-Origin: *"],
            remove_response_header=["SERVER"],
        ) as tunnel,
    ):
        sent = [(b"Accept", b"*/*"), (b"Cookie", b"1"), (b"COOKIE", b"2"), (b"x-gone", b"3"), (b"X-Kept", b"4")]
        answer = await fetch(tunnel.url, target=b"/x", headers=sent)
        (seen,) = local.requests
        assert seen.values(b"X-New") == [b"a: b"] and seen.values(b"Accept") == [b"text/x"]
        assert not seen.values(b"Cookie") and not seen.values(b"X-Gone") and seen.values(b"X-Kept") == [b"4"]
        assert answer.values(b"X-Frame-Options") == [b"DENY"] and not answer.values(b"Server")
        assert answer.values(b"Access-Control-Allow-Origin") == [b"*"]
        assert answer.values(b"Set-Cookie") == [b"a=1", b"b"]
        recorded = await tunnel.wait_for()
        assert (b"Cookie", b"1") in recorded.request_headers, "the record has what the visitor sent"
        assert (b"X-Frame-Options", b"DENY") in recorded.response_headers, "and what the visitor got"


@pytest.mark.parametrize(
    ("option", "host"), [("", "web.localhost:{server}"), ("rewrite", "localhost:{local}"), ("app.test", "app.test")]
)
async def test_the_host_that_the_local_service_sees(local: RawOrigin, option: str, host: str) -> None:
    async with connected(local.port, host_header=option) as tunnel:
        await fetch(tunnel.url)
        expected = host.format(server=urlsplit(tunnel.url).port, local=local.port).encode()
        assert local.requests[0].values(b"Host") == [expected]
        public = urlsplit(tunnel.url).netloc.encode()
        assert local.requests[0].values(b"X-Forwarded-Host") == [public]


async def test_routes_lead_to_their_services(local: RawOrigin) -> None:
    async with (
        RawOrigin(response(b"api")) as api,
        RawOrigin(response(b"v2")) as v2,
        connected(local.port, route=[f"/api={api.port}", f"/api/v2={v2.port}"], host_header="rewrite") as tunnel,
    ):
        table = {
            b"/": b"hello", b"/api": b"api", b"/api/x?y": b"api", b"/apix": b"hello", b"/api/v2/x": b"v2",
            b"/api/v22": b"api", b"/x/api": b"hello",
        }  # fmt: skip
        assert {target: (await fetch(tunnel.url, target=target)).body for target in table} == table
        assert [r.target for r in v2.requests] == [b"/api/v2/x"], "the prefix stays"
        assert v2.requests[0].value(b"Host") == f"localhost:{v2.port}".encode()
        await api.aclose()
        down = await fetch(tunnel.url, target=b"/api")
        assert (down.status, down.value(b"X-Pytunnel-Error")) == (502, b"local-refused")
        assert (await fetch(tunnel.url)).body == b"hello"


async def test_an_upgraded_connection_is_edited_in_its_heads_alone() -> None:
    """A WebSocket: its Host is rewritten, its 101 loses a field and gets one, its bytes pass as they are."""

    async def echo(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = [b"HTTP/1.1 101 Switching Protocols", b"Connection: Upgrade", b"Upgrade: websocket", b"X-Secret: 1"]
        writer.write(b"\r\n".join([*head, b"", b""]) + b"\x81\x05first")
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    options: dict[str, Any] = {"remove_response_header": ["x-secret"], "response_header": ["X-New: 2"]}
    async with RawOrigin(echo) as local, connected(local.port, host_header="rewrite", **options) as tunnel:
        parts = urlsplit(tunnel.url)
        async with RawVisitor(parts.port or 0) as visitor:
            fields = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13")]
            await visitor.send(request("GET", b"/ws", parts.netloc.encode(), fields))
            head = await visitor.read_response()
            assert head.status == 101
            assert (head.values(b"X-Secret"), head.values(b"X-New")) == ([], [b"2"])
            assert (head.value(b"Upgrade"), head.value(b"Connection")) == (b"websocket", b"Upgrade")
            assert await visitor.read_exactly(7) == b"\x81\x05first"
            frame = b"\x82\x83\x01\x02\x03\x04\x01\x02\x03"
            for byte in frame:
                await visitor.send(bytes([byte]))
            assert await visitor.read_exactly(len(frame)) == frame
            assert local.requests[0].values(b"Host") == [f"localhost:{local.port}".encode()]
            visitor.write_eof()
            assert await visitor.read_until_close() == b""
        exchange = await tunnel.wait_for()
        notes = [(note.from_visitor, note.kind, note.size, note.data) for note in exchange.notes]
        assert sorted(notes) == [
            (False, "binary", 3, b"\0\0\0"), (False, "text", 5, b"first"), (True, "binary", 3, b"\0\0\0"),
        ]  # fmt: skip
        assert (exchange.status, exchange.bytes_in, exchange.bytes_out, exchange.error) == (101, 9, 16, "")


# ---------------------------------------------------------------------------------------- The hint

REFUSALS = {
    "Vite": (403, b'Blocked request. This host ("web.localhost") is not allowed.\nTo allow this host, add '
             b'"web.localhost" to `server.allowedHosts` in vite.config.js.'),
    "webpack": (403, b"Invalid Host header"),
    "webpack 4": (200, b"Invalid Host header"),
    "Django": (400, b"<title>DisallowedHost at /</title> <pre>Invalid HTTP_HOST header: &#x27;web.localhost&#x27;."),
    "Rails": (403, b"<h1>Blocked hosts: web.localhost:8080</h1>"),
    "Rails 6": (403, b"<h1>Blocked host: web.localhost</h1>"),
}  # fmt: skip
NO_REFUSALS = {
    "another 403": (403, b"Forbidden: you may not read this"),
    "another 400": (400, b"Bad Request"),
    "a page about it": (200, b"<h1>What does Invalid Host header mean?</h1>"),
    "a page of that length": (200, b"x" * len(b"Invalid Host header")),
    "a failure about it": (500, b"DisallowedHost"),
    "no body": (403, b""),
}
HINT = "the local service refuses this host name; add --host-header rewrite"


@contextlib.asynccontextmanager
async def watched(port: int) -> AsyncIterator[tuple[TunnelClient, list[tuple[str, dict[str, Any]]]]]:
    """A client whose events are listed."""
    events: list[tuple[str, dict[str, Any]]] = []
    async with pytunnel.serve() as server:
        tunnels = Settings({"server": server.url, "token": server.token, "name": "web"}).from_targets([str(port)])
        client = TunnelClient(
            server.url, server.token, tunnels, on_event=lambda event, **fields: events.append((event, fields))
        )
        running = asyncio.ensure_future(client.run())
        await eventually(lambda: client.urls, what="the tunnel")
        try:
            yield client, events
        finally:
            client.stop()
            await running


@pytest.mark.parametrize(("status", "body"), [*REFUSALS.values(), *NO_REFUSALS.values()], ids=[*REFUSALS, *NO_REFUSALS])
async def test_a_refused_host_is_hinted_at_once(status: int, body: bytes) -> None:
    hints = [("hint", {"message": HINT})] if (status, body) in REFUSALS.values() else []
    async with RawOrigin(response(body, status)) as local, watched(local.port) as (client, events):
        for _ in range(3):
            await fetch(client.urls[0])
        await client.wait_for(count=3)
        assert [event for event in events if event[0] == "hint"] == hints


# ---------------------------------------------------------------------------------------- The log's bounds


def head_of(fields: list[Header]) -> bytes:
    return pytunnel.RequestHead(b"GET", b"/", fields).encode()


def begun(log: ExchangeLog, headers: list[Header] | None = None) -> Exchange:
    exchange = Exchange("web", "GET", "/", started=0.0, request_head=head_of(headers or []))
    log.begin(exchange)
    return exchange


def answered(log: ExchangeLog, exchange: Exchange, head: ResponseHead) -> None:
    log.respond(exchange, head, head.encode())


def kept(log: ExchangeLog) -> int:
    """Bytes of heads and bodies, counted from scratch."""
    return sum(
        len(e.request_body) + len(e.response_body) + len(e.request_head) + len(e.response_head)
        for e in log.exchanges.values()
    )


def test_the_log_keeps_the_last_exchanges() -> None:
    log = ExchangeLog()
    for _ in range(MAX_EXCHANGES + 10):
        log.finish(begun(log), 1.0)
    assert list(log.exchanges) == list(range(11, MAX_EXCHANGES + 11))
    assert (log.total, log.in_flight) == (MAX_EXCHANGES + 10, 0)


@pytest.mark.parametrize(
    ("head", "sent", "received"),
    [(60 * KiB, 0, 0), (0, MAX_PREFIX, 0), (0, 0, MAX_PREFIX), (1000, MAX_PREFIX * 3, MAX_PREFIX // 3), (0, 100, 7)],
)
def test_the_log_keeps_so_many_bytes(head: int, sent: int, received: int) -> None:
    """However they come, the exchanges that are open included; what was dropped is not kept on with."""
    log = ExchangeLog()
    fields = [(b"x" * 10, b"y" * (head - 10))] if head else []
    exchanges = []
    for number in range(700):
        exchange = begun(log, fields)
        exchanges.append(exchange)
        answered(log, exchange, ResponseHead(200, b"OK", fields))
        for data in (bytes(sent // 2), bytes(sent - sent // 2)):
            log.send(exchange, data, 0.0)
            log.receive(exchange, bytes(received // 2), 0.0)
        if number % 2:
            log.finish(exchange, 1.0)
        assert len(log.exchanges) <= MAX_EXCHANGES and kept(log) <= MAX_LOG
    heads = len(exchanges[-1].request_head) + len(exchanges[-1].response_head)
    size = heads + min(sent, MAX_PREFIX) + min(received // 2 * 2, MAX_PREFIX)
    assert len(log.exchanges) == min(MAX_EXCHANGES, MAX_LOG // size)
    assert exchanges[-1].bytes_out == sent and len(exchanges[-1].response_body) == min(sent, MAX_PREFIX)
    dropped = next(exchange for exchange in exchanges if exchange.id not in log.exchanges)
    before = len(dropped.response_body)
    log.send(dropped, bytes(1000), 0.0)
    assert len(dropped.response_body) == before, "it is no longer in the log"
    log.finish(exchanges[0], 1.0)
    assert log.in_flight == 349

    log.clear()
    assert (log.exchanges, log.total) == ({}, 700)
    log.send(exchanges[-2], bytes(1000), 0.0)
    for _ in range(100):
        log.send(begun(log), bytes(MAX_PREFIX), 0.0)
    assert len(log.exchanges) == 100, "what was cleared does not count"


def test_the_log_keeps_the_last_notes() -> None:
    log = ExchangeLog()
    exchange = begun(log)
    answered(log, exchange, ResponseHead(200, b"OK", [(b"Content-Type", b"text/event-stream; charset=utf-8")]))
    for number in range(MAX_NOTES + 5):
        log.send(exchange, b"data: %d %b\n\n" % (number, bytes(MAX_NOTE)), float(number))
    assert len(exchange.notes) == MAX_NOTES
    assert exchange.notes[0].data.startswith(b"data: 5 ") and len(exchange.notes[0].data) == MAX_NOTE
    assert [note.at for note in exchange.notes] == [float(n) for n in range(5, MAX_NOTES + 5)]
    log.finish(exchange, 99.0)
    log.send(exchange, b"data: late\n\n", 99.0)
    assert len(exchange.notes) == MAX_NOTES and exchange.notes[-1].at == MAX_NOTES + 4


def test_an_exchange_that_runs_outlasts_those_that_have_ended() -> None:
    log = ExchangeLog()
    running = begun(log)
    for _ in range(2 * MAX_EXCHANGES):
        log.finish(begun(log), 1.0)
    assert next(iter(log.exchanges.values())) is running and len(log.exchanges) == MAX_EXCHANGES


def test_of_a_websocket_only_its_messages_are_kept() -> None:
    log = ExchangeLog()
    exchange = begun(log)
    answered(log, exchange, ResponseHead(101, b"", [(b"Upgrade", b"WebSocket"), (b"Connection", b"Upgrade")]))
    frame = b"\x82\x7f" + (MAX_PREFIX * 8).to_bytes(8)
    for data in (frame, *[bytes(MAX_PREFIX)] * 8, b"\x89\x00"):
        log.send(exchange, data, 0.0)
    assert exchange.response_body == b""
    assert [(note.kind, note.size, len(note.data)) for note in exchange.notes] == [
        ("binary", MAX_PREFIX * 8, MAX_NOTE), ("ping", 0, 0),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- Readers


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces, cut at these places."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def frame_of(opcode: int, payload: bytes, mask: bytes | None, flags: int, wide: int) -> bytes:
    """A WebSocket frame; `wide` asks for a longer length than is needed."""
    size, bit = len(payload), 0x80 if mask else 0
    if size > 0xFFFF or wide == 2:
        length = struct.pack(">BQ", bit | 127, size)
    elif size > 125 or wide == 1:
        length = struct.pack(">BH", bit | 126, size)
    else:
        length = bytes([bit | size])
    if mask:
        payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return bytes([flags | opcode]) + length + (mask or b"") + payload


FRAMES = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 8, 9, 10, 3]),
        st.binary(max_size=200) | st.integers(0, 1500).map(lambda size: pattern(0, size)),
        st.none() | st.binary(min_size=4, max_size=4),
        st.sampled_from([0x80, 0]),
        st.integers(0, 2),
    ),
    max_size=6,
)


@given(FRAMES, st.lists(st.integers(0, 10_000), max_size=12))
def test_websocket_frames_are_read_in_any_slices(frames: list[tuple[Any, ...]], places: list[int]) -> None:
    kinds = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong", 3: "reserved"}
    expected = [
        (f"close {int.from_bytes(payload[:2])}", len(payload), payload[:MAX_NOTE][2:])
        if opcode == 8 and len(payload) >= 2
        else (kinds[opcode], len(payload), payload[:MAX_NOTE])
        for opcode, payload, *_ in frames
    ]
    data = b"".join(frame_of(*frame) for frame in frames)
    for pieces in ([data], cut(data, places), [data[i : i + 1] for i in range(len(data))]):
        reader = WebSocketReader()
        assert [note for piece in pieces for note in reader.feed(piece)] == expected


@pytest.mark.parametrize("mask", [None, b"\x11\x22\x33\x44"], ids=["server", "visitor"])
@pytest.mark.parametrize(
    ("payload", "note"),
    [
        (b"", ("close", 0, b"")),
        (b"\x03", ("close", 1, b"\x03")),
        (b"\x03\xe8", ("close 1000", 2, b"")),
        (b"\x03\xe9going away", ("close 1001", 12, b"going away")),
        (b"\x0f\xa0own", ("close 4000", 5, b"own")),
    ],
)
def test_a_websocket_s_close_frame_has_its_code(
    payload: bytes, note: tuple[str, int, bytes], mask: bytes | None
) -> None:
    assert list(WebSocketReader().feed(frame_of(8, payload, mask, 0x80, 0))) == [note]


@given(st.binary(max_size=100), st.lists(st.integers(0, 100), max_size=5))
def test_what_is_no_websocket_is_read_without_an_error(data: bytes, places: list[int]) -> None:
    whole, sliced = WebSocketReader(), WebSocketReader()
    pieces = cut(data, places)
    assert list(whole.feed(data)) == [note for piece in pieces for note in sliced.feed(piece)]


EVENTS = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"\n\n", b"data: x", b"\xc3\xa4", b":"]), max_size=20)


@given(EVENTS, st.lists(st.integers(0, 100), max_size=8))
@example([b"a", b"\r\n", b"\r\n", b"b", b"\n\n"], [2, 3, 4])
def test_events_are_read_in_any_slices(parts: list[bytes], places: list[int]) -> None:
    data = b"".join(parts)
    whole, sliced, bytewise = EventReader(), EventReader(), EventReader()
    expected = list(whole.feed(data))
    assert [note for piece in cut(data, places) for note in sliced.feed(piece)] == expected
    assert [note for i in range(len(data)) for note in bytewise.feed(data[i : i + 1])] == expected


def test_events() -> None:
    reader = EventReader()
    pieces = [b"data: 1\n", b"\ndata: 2\r\n\r", b"\n\n\n:", b"x\r\r", b"rest"]
    notes = [note for piece in pieces for note in reader.feed(piece)]
    assert notes == [("event", 7, b"data: 1"), ("event", 7, b"data: 2"), ("event", 2, b":x")]
    long = b"data: " + pattern(0, 3000).replace(b"\n", b"").replace(b"\r", b"")
    assert list(reader.feed(b"\n\n" + long + b"\n\n")) == [("event", 4, b"rest"), ("event", len(long), long[:MAX_NOTE])]


# ---------------------------------------------------------------------------------------- JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=8,
)


@given(JSON, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_indented_json_means_the_same(value: Any, ascii: bool, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    out = indent_json(text)
    assert json.loads(out) == json.loads(text)
    assert indent_json(out) == out
    assert out.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "").replace("\t", "")


@given(JSON, st.integers(0, 200))
def test_half_a_json_text_is_shown(value: Any, size: int) -> None:
    text = json.dumps(value)[:size]
    assert indent_json(text).replace("\n", "").replace(" ", "") == text.replace(" ", "")


@given(st.text(alphabet='[]{}",:\\ \n\tabc01ä\u2028', max_size=60))
def test_any_text_is_indented_without_an_error(text: str) -> None:
    assert "".join(indent_json(text).split()) == "".join(text.split())


def test_indented_json() -> None:
    text = '{"a":[1,2.50,{"b":"x\\"[{:,"}],"c":{},"d":[ ],"big":12345678901234567890,"e":1E400}{"next":null}'
    assert indent_json(text).splitlines() == [
        "{", '  "a": [', "    1,", "    2.50,", "    {", '      "b": "x\\"[{:,"', "    }", "  ],", '  "c": {},',
        '  "d": [],', '  "big": 12345678901234567890,', '  "e": 1E400', "}", "{", '  "next": null', "}",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a":' * 20_000, "[" * 1000 + "1," * 50_000, "]" * 10_000])
def test_deep_json_is_shown_in_bounds(text: str) -> None:
    started = time.process_time()
    assert len(indent_json(text)) < 5 * MAX_VIEW
    assert time.process_time() - started < 2


# ---------------------------------------------------------------------------------------- Bodies

BOMB = 64 * MiB


def bomb(name: str) -> tuple[bytes, bytes]:
    """The coding and the bytes of a body that unpacks to very much."""
    if name == "brackets":
        return b"gzip", gzip.compress(b"[" * (2 * MiB))
    packer = zlib.compressobj(9, zlib.DEFLATED, 31) if name == "gzip" else zstandard.ZstdCompressor().compressobj()
    return name.encode(), b"".join(packer.compress(b"a" * MiB) for _ in range(BOMB // MiB)) + packer.flush()


@pytest.mark.parametrize("name", ["gzip", "zstd", "brackets"])
def test_a_bomb_is_unpacked_no_further_than_can_be_seen(name: str) -> None:
    coding, data = bomb(name)
    assert len(data) < MAX_PREFIX
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    view = body_view([(b"Content-Encoding", coding)], data, len(data))
    assert time.process_time() - started < 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KiB < 48 * MiB
    assert 0 < len(view.text) <= 6 * MAX_VIEW
    if name != "brackets":
        assert (view.kind, len(view.text)) == ("text", MAX_VIEW)


@pytest.mark.parametrize("coding", [b"gzip", b"x-gzip", b"deflate", b"zstd", b"identity", b""])
def test_a_body_is_unpacked_as_far_as_it_was_kept(coding: bytes) -> None:
    text = "".join(f"{number}: Grüße\n" for number in range(3000))
    data = text.encode()
    if b"gzip" in coding:
        data = gzip.compress(data, mtime=0)
    elif coding == b"deflate":
        data = zlib.compress(data)
    elif coding == b"zstd":
        data = zstandard.compress(data)
    headers = [(b"content-encoding", coding), (b"Content-Type", b"text/plain")]
    whole = body_view(headers, data, len(data))
    assert (whole.kind, whole.text) == ("text", text)
    half = body_view(headers, data[: len(data) // 2], len(data))
    assert half.kind == "text"
    if coding != b"zstd":  # a block of it is all or nothing
        assert text.startswith(half.text) and len(half.text) > 100
    size = human_size(len(data) // 2), human_size(len(data))
    assert f"the first {size[0]} of {size[1]}" in half.note


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"zstd", b"br", b"\x1b[31m", b"compress"])
def test_a_body_that_cannot_be_unpacked_is_shown_as_it_is(coding: bytes) -> None:
    view = body_view([(b"Content-Encoding", coding)], b"not packed \xff\0", 13)
    assert view.kind == "hex" and view.text.startswith("00000000  6e 6f 74 20")
    assert view.note and view.note.isprintable()


@given(st.binary(max_size=300), st.sampled_from([b"gzip", b"deflate", b"zstd", b"br", b"gzip, zstd", b""]))
def test_any_body_has_a_view(data: bytes, coding: bytes) -> None:
    kinds = {"json", "form", "text", "image", "hex", "empty"}
    for kind in (b"", b"application/json", b"application/x-www-form-urlencoded", b"image/png"):
        headers = [(b"Content-Encoding", coding), (b"Content-Type", kind)]
        assert body_view(headers, data, len(data) + 5).kind in kinds


def test_kinds_of_bodies() -> None:
    table = [
        (b"application/json", b'{"a":1}', "json", '{\n  "a": 1\n}'),
        (b"", b" [1]", "json", "[\n  1\n]"),
        (b"application/x-www-form-urlencoded", b"a=1&b=%20x+y&token=12345", "form", "a = 1\nb =  x y\ntoken = •••"),
        (b"image/png", b"\x89PNG\0", "image", ""),
        (b"text/plain", b"", "empty", ""),
        (b"text/plain", "ä漢".encode()[:-1], "text", "ä"),
        (b"text/plain", b"a\0b", "hex", "00000000  61 00 62                                          a.b"),
    ]
    for content_type, data, kind, text in table:
        view = body_view([(b"Content-Type", content_type)], data, len(data))
        assert (view.kind, view.text.rstrip()) == (kind, text), content_type


# ---------------------------------------------------------------------------------------- curl

UNICODE, QUOTES = "Grüße 漢字 🎉".encode(), b'it\'s "quoted" `x` $HOME \\n %s !x\nnew line\ttab'
REQUESTS: dict[str, tuple[str, bytes, list[Header], bytes]] = {
    "plain": ("GET", b"/", [], b""),
    "query": ("GET", b"/a%20b/c?d=1&e=%C3%A4#", [], b""),
    "brackets": ("GET", b"/a[1-3]{x,y}?z[]=1", [], b""),
    "dots": ("GET", b"/a/../b/./c", [], b""),
    "shell": ("GET", b"/$HOME/`x`/'y'?!z&*;(a)|\"<>", [], b""),
    "HEAD": ("HEAD", b"/x", [], b""),
    "DELETE": ("DELETE", b"/x", [], b""),
    "custom": ("PROPFIND", b"/x", [(b"Depth", b"1")], b""),
    "fields": ("GET", b"/", [(b"X-Quote", b"it's \"x\" $HOME @y"), (b"X-Utf8", UNICODE), (b"X-Two", b"1"),
                             (b"x-two", b"2"), (b"Cookie", b"a=b; c=d"), (b"Accept", b"text/html")], b""),
    "empty field": ("GET", b"/", [(b"X-Empty", b"")], b""),
    "form": ("POST", b"/", [(b"Content-Type", b"application/x-www-form-urlencoded")], b"a=1&b=%20"),
    "quotes": ("POST", b"/", [(b"Content-Type", b"text/plain")], QUOTES),
    "unicode": ("PUT", b"/", [(b"Content-Type", b"text/plain")], UNICODE),
    "at": ("POST", b"/", [(b"Content-Type", b"text/plain")], b"@/etc/hostname"),
    "dash": ("POST", b"/", [(b"Content-Type", b"text/plain")], b"-v --help"),
    "crlf": ("POST", b"/", [(b"Content-Type", b"text/plain")], b"\r\na\r\n\r\n"),
    "binary": ("POST", b"/", [(b"Content-Type", b"a/b")], bytes(range(256)) * 3),
    "zero": ("PATCH", b"/", [(b"Content-Type", b"a/b")], b"\0"),
    "no type": ("POST", b"/", [], b"{}"),
    "GET with content": ("GET", b"/", [(b"Content-Type", b"a/b")], b"x"),
    "long text": ("POST", b"/", [(b"Content-Type", b"a/b")], b"0123456789abcde\n" * 12_000),
    "long binary": ("POST", b"/", [(b"Content-Type", b"a/b")], pattern(0, MAX_PREFIX)),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_curl_command_sends_the_same_request(local: RawOrigin, tmp_path: Path, name: str) -> None:
    method, target, headers, body = REQUESTS[name]
    fields = [(b"Host", b"web.example"), (b"Content-Length", b"1"), (b"X-Forwarded-For", b"1.2.3.4"), *headers]
    exchange = Exchange("web", method, target.decode(), 0.0, request_head=head_of(fields), bytes_in=len(body))
    exchange.request_body += body
    command = as_curl(exchange, f"http://127.0.0.1:{local.port}", reveal=True)
    (tmp_path / "command.sh").write_text(command)
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "command.sh", cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    _, stderr = await process.communicate()
    assert process.returncode == 0, (command[:500], stderr)
    (seen,) = await local.wait_requests(1)
    assert (seen.method, seen.target, seen.body) == (method.encode(), target.partition(b"#")[0], body)
    given = {key.lower() for key, _ in headers}
    own = {b"host", b"content-length", b"user-agent", b"accept", b"expect"} - given
    assert [(key, value) for key, value in seen.headers if key.lower() not in own] == headers, command[:500]


def test_the_curl_command_masks_and_tells_what_is_missing() -> None:
    fields = [(b"Authorization", b"Bearer abc"), (b"Cookie", b"abc"), (b"X-Plain", b"abc")]
    exchange = Exchange("web", "POST", "/x?token=abc&y=1", 0.0, request_head=head_of(fields), bytes_in=10)
    exchange.request_body += b"012"
    masked, plain = as_curl(exchange, "http://h"), as_curl(exchange, "http://h", reveal=True)
    assert masked.count("abc") == 1 and masked.count("•••") == 3 and "X-Plain: abc" in masked
    assert plain.count("abc") == 4
    assert masked.endswith("  # only the first 3 bytes of its content")


# ---------------------------------------------------------------------------------------- HAR


def check(value: Any, shape: Any, where: str = "har") -> None:
    """Compare with a shape: types, lists of one shape, and dictionaries whose `?` keys need not be there."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        required = {key for key in shape if not key.startswith("?")}
        allowed = {key.removeprefix("?") for key in shape}
        assert required <= value.keys(), (where, required - value.keys())
        assert {key for key in value if not key.startswith("_")} <= allowed, (where, value.keys() - allowed)
        for key, inner in value.items():
            if not key.startswith("_"):
                check(inner, shape.get(key, shape.get(f"?{key}")), f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, shape[0], f"{where}[{number}]")
    else:
        assert isinstance(value, shape) and not isinstance(value, bool), (where, value)


NAMED = {"name": str, "value": str, "?comment": str}
POSTED = {"mimeType": str, "?params": list, "text": str, "?comment": str}
HAR = {  # http://www.softwareishard.com/blog/har-12-spec/
    "log": {
        "version": str,
        "creator": {"name": str, "version": str, "?comment": str},
        "?browser": dict,
        "?pages": list,
        "entries": [
            {
                "?pageref": str,
                "startedDateTime": str,
                "time": (int, float),
                "request": {
                    "method": str, "url": str, "httpVersion": str, "cookies": [dict], "headers": [NAMED],
                    "queryString": [NAMED], "?postData": POSTED, "headersSize": int, "bodySize": int, "?comment": str,
                },
                "response": {
                    "status": int, "statusText": str, "httpVersion": str, "cookies": [dict], "headers": [NAMED],
                    "content": {"size": int, "?compression": int, "mimeType": str, "?text": str, "?encoding": str},
                    "redirectURL": str, "headersSize": int, "bodySize": int, "?comment": str,
                },
                "cache": {},
                "timings": {
                    "?blocked": (int, float), "?dns": (int, float), "?connect": (int, float), "send": (int, float),
                    "wait": (int, float), "receive": (int, float), "?ssl": (int, float), "?comment": str,
                },
                "?serverIPAddress": str, "?connection": str, "?comment": str,
            }
        ],
        "?comment": str,
    }
}  # fmt: skip


async def test_a_har_has_the_shape_that_the_format_asks_for(local: RawOrigin) -> None:
    async with connected(local.port) as tunnel:
        await fetch(
            tunnel.url, "POST", b"/x?a=1&token=abc", [(b"Cookie", b"abc"), (b"Content-Type", b"a/b")], b"\xff\0"
        )
        await fetch(tunnel.url, "POST", b"/y", [(b"Content-Type", b"text/plain")], "ä".encode())
        await fetch(tunnel.url, "HEAD", b"/z?&=&b")
        await tunnel.wait_for(count=3)
        running = Exchange("web", "GET", "/", 0.0, time=1.5)
        har = as_har([*tunnel.log.exchanges.values(), running], {"web": tunnel.url})
    check(har, HAR)
    text = json.dumps(har, allow_nan=False)
    assert "abc" not in text, "secrets are masked"
    assert har["log"]["version"] == "1.2"
    first, second, third, fourth = har["log"]["entries"]
    assert (first["request"]["method"], first["request"]["url"]) == ("POST", f"{tunnel.url}/x?a=1&token=•••")
    assert first["request"]["queryString"] == [{"name": "a", "value": "1"}, {"name": "token", "value": "•••"}]
    assert base64.b64decode(first["request"]["postData"]["text"]) == b"\xff\0"
    assert second["request"]["postData"]["text"] == "ä"
    assert first["response"]["content"] == {"size": 5, "mimeType": "", "text": "hello"}
    assert (third["request"]["bodySize"], "postData" in third["request"]) == (0, False)
    assert (fourth["response"]["status"], fourth["timings"]["wait"] >= 0) == (0, True)
    for entry in har["log"]["entries"]:
        assert datetime.datetime.fromisoformat(entry["startedDateTime"]).tzinfo is not None
        parts = [value for value in entry["timings"].values() if value >= 0]
        assert abs(entry["time"] - sum(parts)) < 0.01


# ---------------------------------------------------------------------------------------- What differs


def test_a_diff_compares_so_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 KB of JSON each, in which all lines differ: the time of a comparison goes with their product."""
    compared: list[int] = []
    unified_diff = pytunnel.difflib.unified_diff

    def compare(old: list[str], new: list[str], *names: str, **options: Any) -> Iterable[str]:
        compared.extend([len(old), len(new)])
        return unified_diff(old, new, *names, **options)

    monkeypatch.setattr(pytunnel.difflib, "unified_diff", compare)
    log = ExchangeLog()
    exchanges = []
    for number in range(2):
        exchange = begun(log)
        answered(log, exchange, ResponseHead(200, b"OK", [(b"Content-Type", b"application/json")]))
        body = json.dumps([{"id": n, "value": f"{number} {n}"} for n in range(6500)]).encode()
        assert 200_000 < len(body) < MAX_PREFIX
        log.send(exchange, body, 0.0)
        exchanges.append(exchange)
    lines = pytunnel.diff(*exchanges)
    assert compared == [pytunnel.MAX_DIFF] * 2
    assert 0 < len(lines) <= 2 * pytunnel.MAX_DIFF + 10
    assert pytunnel.diff(exchanges[0], exchanges[0]) == []


def test_a_diff_leaves_the_date_out() -> None:
    log = ExchangeLog()
    exchanges = [begun(log), begun(log)]
    for number, exchange in enumerate(exchanges):
        answered(log, exchange, ResponseHead(200, b"OK", [(b"DATE", b"%d" % number), (b"X-Same", b"1")]))
    assert pytunnel.diff(*exchanges) == []


# ---------------------------------------------------------------------------------------- Masks and sizes


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("/x?token=abc", "/x?token=•••"),
        ("/x?a=1&access_token=abc&b=2", "/x?a=1&access_token=•••&b=2"),
        ("/x?API_KEY=abc#top", "/x?API_KEY=•••#top"),
        ("/x?apikey=a&password=b&secret=c", "/x?apikey=•••&password=•••&secret=•••"),
        ("token=abc&x=1", "token=•••&x=1"),
        ("/cb?code=abc&sig=def&key=ghi", "/cb?code=•••&sig=•••&key=•••"),
        ("/x?X-Amz-Signature=abc", "/x?X-Amz-Signature=•••"),
        ("/x?token=", "/x?token="),
        ("/x?monkey=abc&barcode=1&author=2", "/x?monkey=abc&barcode=1&author=2"),
        ("/token=abc", "/token=abc"),
        ("/x?user[password]=abc&y=1", "/x?user[password]=•••&y=1"),
        ("/x?user%5Bpassword%5D=abc", "/x?user%5Bpassword%5D=•••"),
        ("/x?oauth2_token=abc&jwt=def&session_id=ghi", "/x?oauth2_token=•••&jwt=•••&session_id=•••"),
        ("/x?auth=abc&auth_key=def&client_secret=ghi", "/x?auth=•••&auth_key=•••&client_secret=•••"),
        ("/x?pwd=abc&passwd=def&my.credentials=ghi", "/x?pwd=•••&passwd=•••&my.credentials=•••"),
        ('{"access_token":"abc","user":"jo"}', '{"access_token":"•••","user":"jo"}'),
        ('{"user": {"password" : "a\\"b", "name": "c"}}', '{"user": {"password" : "•••", "name": "c"}}'),
        ('{"jwt":"cut in the mid', '{"jwt":"•••"'),
        ('{"author":"jo","monkey":"x","is":"token"}', '{"author":"jo","monkey":"x","is":"token"}'),
        ('{"token":""}', '{"token":"•••"}'),
        ("/x?a=token", "/x?a=token"),
    ],
)
def test_mask_target(text: str, masked: str) -> None:
    assert mask(text) == masked


@given(st.text(alphabet='token=&?/ab":{\\', max_size=40))
@example('"token":"a"token":"b"')
def test_masking_twice_is_masking_once(text: str) -> None:
    assert mask(mask(text)) == mask(text)


@pytest.mark.parametrize(
    "word", ["token", "Secret", "passwd", "pwd", "api_key", "ſignature", "sıg", "SIG", "key", "\u212aey", "jwt", "code",
             "AUTH", "author", "monkey", "%5Bkey%5D", "é"]
)  # fmt: skip
@pytest.mark.parametrize("text", ["/x?a=b&{}=1", '{{"{}": 1}}', "{}=1", "/x?my{}s=1&é", "/{}"])
def test_a_quick_look_finds_all_that_may_be_masked(text: str, word: str) -> None:
    """Whatever the case, and letters that fold to one of those."""
    text = text.format(word)
    parameters = pytunnel._SECRET_PARAMETER.sub(rf"\1{pytunnel.MASK}", text)
    assert mask(text) == pytunnel._SECRET_MEMBER.sub(rf'\1"{pytunnel.MASK}"', parameters)


def test_mask_headers() -> None:
    names = [b"Authorization", b"PROXY-AUTHORIZATION", b"cookie", b"Set-Cookie", b"X-Api-Key", b"x-auth-token"]
    headers = [*((name, b"secret") for name in names), (b"X-Plain", b"kept"), (b"Cookie2", b"kept")]
    mask = "•••".encode()
    assert mask_headers(headers) == [*((name, mask) for name in names), (b"X-Plain", b"kept"), (b"Cookie2", b"kept")]
    assert headers[0] == (b"Authorization", b"secret")


@pytest.mark.parametrize(
    "name",
    ["X-Gitlab-Token", "Private-Token", "X-Access-Token", "Api-Key", "X-Amz-Security-Token", "X-Hub-Secret",
     "X-Vault-Token", "apikey", "X-Goog-Credential", "X-Custom-Authorization"],
)  # fmt: skip
def test_fields_are_secret_by_parts_of_their_names(name: str) -> None:
    masked = [(name.encode(), "•••".encode())]
    assert mask_headers([(name.encode(), b"secret")]) == masked
    assert mask_headers([(name.lower().encode(), b"secret")]) == [(name.lower().encode(), "•••".encode())]


@pytest.mark.parametrize("name", [b"Author", b"X-Monkey", b"Cookie-Policy", b"Idempotency-Key", b"X-Request-Id"])
def test_fields_that_are_no_secrets(name: bytes) -> None:
    assert mask_headers([(name, b"plain")]) == [(name, b"plain")]


HOSTILE = {
    "a word": "token" * 50_000,
    "separators": "&" * 200_000,
    "names without a value": "&token" * 40_000,
    "long names": ("&" + "token" * 25) * 2000,
    "open quotes": '"token' * 40_000,
    "quotes": '"' * 200_000,
    "colons": '"token":' * 30_000,
    "spaces": '"token"        ' * 16_000,
    "backslashes": '"token":"' + "\\" * 250_000,
    "one value": "token=" + "x" * 250_000,
    "many values": 'token=x "token":"x" ' * 12_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_masking_takes_time_as_the_text_is_long(name: str) -> None:
    """No wall clock: four times the text takes four times the time, where a quadratic search would take sixteen."""

    def seconds(text: str) -> float:
        started = time.thread_time()
        mask(text)
        return time.thread_time() - started

    text = HOSTILE[name]
    pairs = [(seconds(text), seconds(text[: len(text) // 4])) for _ in range(5)]
    whole, quarter = min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)
    assert whole < 9 * quarter + 0.002


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.0 KiB"), (1024, "1.0 KiB"), (10 * KiB, "10.0 KiB"),
        (100 * KiB, "100 KiB"), (999 * KiB, "999 KiB"), (1000 * KiB, "1.0 MiB"), (3.1 * MiB, "3.1 MiB"),
        (5 * 1024 * MiB, "5.0 GiB"), (1024**4, "1.0 TiB"), (10**18, "909495 TiB"),
    ],
)  # fmt: skip
def test_human_size(size: float, text: str) -> None:
    assert human_size(size) == text


@example(102_349)  # rounded, it has three digits before the point
@given(st.integers(0, 999 * 1024**4))
def test_a_size_has_few_characters(size: int) -> None:
    assert len(human_size(size)) <= 8


def test_compressed_websocket_messages_are_read_until_one_is_too_long() -> None:
    squeeze = zlib.compressobj(wbits=-15)

    def message(text: bytes) -> bytes:
        data = (squeeze.compress(text) + squeeze.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")
        return b"\xc1" + (bytes([len(data)]) if len(data) < 126 else b"\x7e" + len(data).to_bytes(2)) + data

    reader = WebSocketReader()
    first, second = message(b"hello, hello"), message(b"hello again")  # which refers to the first
    assert [note for byte in first + second for note in reader.feed(bytes([byte]))] == [
        ("text", len(first) - 2, b"hello, hello"),
        ("text", len(second) - 2, b"hello again"),
    ]
    long = message(random.Random(1).randbytes(pytunnel.MAX_INFLATE + 1))
    assert [note[0] for note in reader.feed(long)] == ["text, compressed"]
    assert [note[0] for note in reader.feed(message(b"hello"))] == ["text, compressed"]


def test_a_websocket_bomb_is_not_unpacked() -> None:
    squeeze = zlib.compressobj(9, wbits=-15)
    data = squeeze.compress(bytes(8 * pytunnel.MiB)) + squeeze.flush(zlib.Z_SYNC_FLUSH)
    bomb = b"\xc2\x7e" + len(data).to_bytes(2) + data
    ((kind, size, kept),) = WebSocketReader().feed(bomb)
    assert (kind, size, len(kept)) == ("binary, compressed", len(data), pytunnel.MAX_NOTE)
