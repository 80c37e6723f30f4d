"""The harness alone, so that a failing test of the program can be trusted to be the program's fault."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import support
from support import (
    BadMessage,
    Handler,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawResponse,
    RawVisitor,
    Relay,
    Signal,
    TokenBucket,
    Truncated,
    Tunnel,
    WaitFailed,
    Way,
    chunk,
    eventually,
    free_port,
    parse_response_head,
    pattern,
    request,
    reset,
    response,
)

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

MIB = 1024 * 1024
GET = request()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def ask(port: int, data: bytes = GET, method: str = "GET") -> RawResponse:
    """One request on a connection of its own."""
    async with RawVisitor(port) as visitor:
        await visitor.send(data)
        return await visitor.read_response(method)


async def answered(raw: bytes, method: str = "GET") -> RawResponse:
    """What a visitor makes of these bytes followed by FIN."""
    async with RawOrigin(raw, keep_alive=False) as origin:
        return await ask(origin.port, request(method), method)


def holding(release: asyncio.Event, before: bytes = b"") -> Handler:
    """A handler that writes `before`, waits for the event and answers."""

    async def handler(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(before)
        await release.wait()
        writer.write(response(b"released"))

    return handler


# ---------------------------------------------------------------------------------------- Waiting


async def test_signal_wakes_every_waiter_whose_predicate_holds() -> None:
    change, seen = Signal(), [0]

    async def reaches(n: int) -> None:
        await change.wait_for(lambda: seen[0] >= n, 5)

    waits = [asyncio.create_task(reaches(n)) for n in (1, 2)]
    await asyncio.sleep(0)
    seen[0] = 1
    change.notify()
    await waits[0]
    assert not waits[1].done()
    seen[0] = 2
    change.notify()
    await waits[1]


async def test_waits_fail_at_their_deadline_and_say_for_what() -> None:
    with pytest.raises(WaitFailed, match="the moon"):
        await Signal().wait_for(lambda: False, 0.01, "the moon")
    with pytest.raises(WaitFailed, match="the sun"):
        await eventually(lambda: False, 0.01, "the sun")


# ---------------------------------------------------------------------------------------- Patterns


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 1), (MIB - 3, 7), (5, 3 * MIB), (7 * MIB, MIB)])
def test_pattern_is_the_same_stream_however_it_is_sliced(offset: int, size: int) -> None:
    whole = pattern(0, offset + size)
    assert pattern(offset, size) == whole[offset:]
    checker = PatternChecker()
    for start in range(0, len(whole), 65_521):
        checker.feed(whole[start : start + 65_521])
    assert checker.offset == len(whole)


def test_pattern_has_no_piece_twice() -> None:
    data = pattern(0, 8 * MIB)
    pieces = {data[start : start + 16] for start in range(0, len(data), 16)}
    assert len(pieces) == len(data) // 16


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("lost", lambda data: data[:2_000_000] + data[2_000_001:]),
        ("repeated", lambda data: data[:2_000_000] + data[1_999_999:]),
        ("changed", lambda data: data[:2_000_000] + bytes([data[2_000_000] ^ 1]) + data[2_000_001:]),
        ("blocks swapped", lambda data: data[:MIB] + data[2 * MIB : 3 * MIB] + data[MIB : 2 * MIB]),
    ],
)
def test_checker_finds_what_is(name: str, spoil: Callable[[bytes], bytes]) -> None:
    data = pattern(0, 3 * MIB)
    with pytest.raises(AssertionError, match="wrong byte at"):
        PatternChecker().feed(spoil(data))


# ---------------------------------------------------------------------------------------- Strict reading


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 200 O\x1bK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n A: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\nB: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\rB: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nnocolon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: empty\r\n\r\n",
    ],
)
def test_a_wrong_response_head_is_refused(head: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_response_head(head)


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 1\r\nContent-Length: 1\r\n",
        b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: +1\r\n",
        b"Content-Length: 1, 1\r\n",
        b"Content-Length:\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
    ],
)
async def test_a_response_framed_wrongly_is_refused(fields: bytes) -> None:
    with pytest.raises(BadMessage):
        await answered(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\nx")


@pytest.mark.parametrize("status", [b"103", b"204"])
@pytest.mark.parametrize("name", [b"Content-Length: 0", b"Transfer-Encoding: chunked"])
async def test_framing_where_none_may_be_is_refused(status: bytes, name: bytes) -> None:
    with pytest.raises(BadMessage, match=status.decode()):
        await answered(b"HTTP/1.1 %b x\r\n%b\r\n\r\n" % (status, name))


@pytest.mark.parametrize(
    "body",
    [b"0x1\r\nx\r\n0\r\n\r\n", b"1 \r\nx\r\n", b"-1\r\n", b"\r\n", b"1\r\nxy\r\n", b"0\r\nbad\r\n\r\n"],
)
async def test_a_wrong_chunk_is_refused(body: bytes) -> None:
    with pytest.raises(BadMessage):
        await answered(CHUNKED + body)


async def test_head_is_kept_byte_for_byte_and_in_order() -> None:
    head = b"HTTP/1.1 299 \xe9t\xe9\r\nX-A: 1\r\nx-a:2  \r\nEmpty:\r\nX-A:\t\xff\r\nContent-Length: 0\r\n\r\n"
    got = await answered(head)
    assert (got.head, got.version, got.status, got.reason) == (head, b"HTTP/1.1", 299, b"\xe9t\xe9")
    assert got.headers[:4] == [(b"X-A", b"1"), (b"x-a", b"2"), (b"Empty", b""), (b"X-A", b"\xff")]
    assert got.values(b"x-A") == [b"1", b"2", b"\xff"]
    assert got.value(b"content-length") == b"0"
    assert got.value(b"absent") is None
    with pytest.raises(AssertionError, match="3 fields"):
        got.value(b"x-a")


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (response(b"hello"), b"hello"),
        (CHUNKED + chunk(b"he") + chunk(b"llo") + chunk(b""), b"hello"),
        (CHUNKED + b'5;ext="q"\r\nhello\r\n00\r\n\r\n', b"hello"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\n", b""),
    ],
)
async def test_a_whole_body_is_clean(raw: bytes, body: bytes) -> None:
    got = await answered(raw)
    assert (got.body, got.clean) == (body, True)


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", b""),
        (CHUNKED + chunk(b"hello"), b"hello"),
        (CHUNKED + b"6\r\nhello", b"hello"),
        (CHUNKED + b"5\r\nhello", b"hello"),
        (CHUNKED + chunk(b"hello") + b"0\r\n", b"hello"),
        (CHUNKED + chunk(b"hello") + b"0\r\nA: b\r\n", b"hello"),
        (CHUNKED, b""),
    ],
)
async def test_a_body_cut_short_is_not_clean(raw: bytes, body: bytes) -> None:
    got = await answered(raw)
    assert (got.body, got.clean, got.ended) == (body, False, "fin")


async def test_a_close_delimited_body_that_ends_with_rst_is_not_clean() -> None:
    arrived = asyncio.Event()

    async def handler(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await arrived.wait()
        reset(writer)

    async with RawOrigin(handler) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET)
        head = await visitor.read_head()
        pieces = visitor.iter_body(head)
        assert await anext(pieces) == b"half"
        arrived.set()
        with pytest.raises(Truncated, match="reset"):
            await anext(pieces)


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 200 OK\r\nContent-Le"])
async def test_a_head_cut_short_raises_with_what_came(cut: bytes) -> None:
    with pytest.raises(Truncated) as caught:
        await answered(cut)
    assert (caught.value.data, caught.value.ended) == (cut, "fin")


async def test_bodies_that_may_not_be_are_left_on_the_connection() -> None:
    raw = b"HTTP/1.1 %d x\r\n%b\r\ncanary"
    cases = [
        ("HEAD", raw % (200, b"Content-Length: 42\r\n"), 200),
        ("HEAD", raw % (200, b"Transfer-Encoding: chunked\r\n"), 200),
        ("GET", raw % (304, b"Content-Length: 42\r\n"), 304),
        ("GET", raw % (204, b""), 204),
        ("GET", raw % (101, b"Upgrade: x\r\n"), 101),
    ]
    for method, answer, status in cases:
        async with RawOrigin(answer, keep_alive=False) as origin, RawVisitor(origin.port) as visitor:
            await visitor.send(request(method))
            got = await visitor.read_response(method)
            assert (got.status, got.body, got.clean) == (status, b"", True)
            assert await visitor.read_until_close() == b"canary"


async def test_interim_responses_come_before_the_final_one() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
    got = await answered(b"HTTP/1.1 100 Continue\r\n\r\n" + early + response(b"x"))
    assert [(r.status, r.values(b"link")) for r in got.interim] == [(100, []), (103, [b"a"])]
    assert (got.status, got.body) == (200, b"x")


async def test_trailers_and_sink() -> None:
    pieces: list[bytes] = []
    raw = CHUNKED + chunk(b"ab") + b"0\r\nX-Sum: 1\r\n\r\n"
    async with RawOrigin(raw) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET)
        got = await visitor.read_response(sink=pieces.append)
    assert (pieces, got.body, got.trailers) == ([b"ab"], b"", [(b"X-Sum", b"1")])


async def test_responses_one_after_another_on_one_connection() -> None:
    async with RawOrigin(response(b"one")) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET + GET + GET)
        assert [(await visitor.read_response()).body for _ in range(3)] == [b"one"] * 3
        assert visitor.buffered == b""
        assert len(origin.connections) == 1


async def test_body_arrives_piece_by_piece() -> None:
    more: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(CHUNKED)
        while data := await more.get():
            writer.write(chunk(data))
        writer.write(chunk(b""))

    async with RawOrigin(handler) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET)
        pieces = visitor.iter_body(await visitor.read_head())
        for data in (b"first", b"second"):
            more.put_nowait(data)
            assert await anext(pieces) == data
        more.put_nowait(b"")
        assert [piece async for piece in pieces] == []


async def test_reads_fail_at_their_deadline_and_lose_nothing() -> None:
    release = asyncio.Event()
    async with (
        RawOrigin(holding(release, b"HTT")) as origin,
        RawVisitor(origin.port) as visitor,
    ):
        await visitor.send(GET)
        assert await visitor.read_exactly(1) == b"H"
        visitor.timeout = 0.05
        with pytest.raises(WaitFailed, match="bytes to read"):
            await visitor.read_exactly(5)
        assert await visitor.read_exactly(2) == b"TT"
        visitor.timeout = 5
        release.set()
        assert (await visitor.read_response()).body == b"released"


async def test_closing_wakes_a_read_that_waits() -> None:
    async with RawOrigin(holding(asyncio.Event())) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET)
        waiting = asyncio.create_task(visitor.read_some())
        await origin.wait_requests(1)
        visitor.close()
        with pytest.raises(ConnectionAbortedError):
            await waiting


# ---------------------------------------------------------------------------------------- Origin


async def test_origin_records_exact_bytes_and_order() -> None:
    raw = b'GET /a/../%zz?x=[1]|" HTTP/1.1\r\nhOsT:x\r\nX-A:  1 \r\nx-a: 2\r\nE:\r\n\r\n'
    async with RawOrigin(response()) as origin:
        await ask(origin.port, raw)
        (seen,) = origin.requests
        assert (seen.head, bytes(origin.connections[0])) == (raw, raw)
        assert (seen.method, seen.target) == (b"GET", b'/a/../%zz?x=[1]|"')
        assert seen.headers == [(b"hOsT", b"x"), (b"X-A", b"1"), (b"x-a", b"2"), (b"E", b"")]
        assert seen.complete


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_origin_decodes_a_body(framing: str) -> None:
    if framing == "length":
        raw = request("POST", body=b"hello")
    else:
        raw = request("POST", headers=[(b"Transfer-Encoding", b"chunked")])
        raw += chunk(b"hel") + chunk(b"lo") + b"0\r\nT: 1\r\n\r\n"
    async with RawOrigin(response(b"ok"), read_body=True) as origin:
        assert (await ask(origin.port, raw + raw, "POST")).body == b"ok"
        (first, second) = await origin.wait_requests(2)
        assert (first.body, second.body) == (b"hello", b"hello")
        assert first.trailers == ([] if framing == "length" else [(b"T", b"1")])
        assert bytes(origin.connections[0]) == raw + raw


async def test_an_upload_cut_short_is_never_complete() -> None:
    async with RawOrigin(response(), read_body=True) as origin:
        async with RawVisitor(origin.port) as visitor:
            await visitor.send(request("POST", headers=[(b"Content-Length", b"10")]) + b"half")
            visitor.write_eof()
            assert await visitor.read_until_close() == b""
            assert visitor.ended == "fin"
        await origin.wait_for(lambda: origin.open_connections == 0)
        assert [seen.complete for seen in origin.requests] == [False]


async def test_origin_does_not_take_an_unread_body_for_a_request() -> None:
    async with RawOrigin(response()) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(request("POST", body=GET))
        await visitor.read_response("POST")
        assert await visitor.read_until_close() == b""
        assert len(origin.requests) == 1


@pytest.mark.parametrize("how", ["abort", "close", "write_eof"])
async def test_origin_sees_the_visitor_go(how: str) -> None:
    async with RawOrigin(holding(asyncio.Event())) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET)
        await origin.wait_for(lambda: origin.requests)
        assert origin.open_connections == 1
        getattr(visitor, how)()
        await origin.wait_for(lambda: origin.open_connections == 0)
        (seen,) = origin.connections
        assert (seen.eof, seen.reset) == ((False, True) if how == "abort" else (True, False))


async def test_origin_holds_an_uploader_back_until_it_reads() -> None:
    release = asyncio.Event()
    size = 32 * MIB
    origin: RawOrigin

    async def handler(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await release.wait()
        checker = PatternChecker()
        async for piece in origin.iter_body(request, reader):
            checker.feed(piece)
        writer.write(response(b"%d" % checker.offset))

    origin = RawOrigin(handler, limit=16 * 1024, rcvbuf=16 * 1024, record_limit=1000)
    async with origin, RawVisitor(origin.port, sndbuf=16 * 1024) as visitor:
        await visitor.send(request("POST", headers=[(b"Content-Length", b"%d" % size)]))
        sending = asyncio.create_task(visitor.send(pattern(0, size)))
        await origin.wait_for(lambda: origin.bytes_received > 32 * 1024)
        with pytest.raises(WaitFailed):
            await origin.wait_for(lambda: origin.bytes_received >= MIB, 0.3)
        assert not sending.done()
        release.set()
        await sending
        assert (await visitor.read_response("POST")).body == b"%d" % size
        assert len(origin.connections[0]) == 1000


async def test_an_error_in_a_handler_is_raised_when_the_origin_closes() -> None:
    async def handler(request: RawRequest, reader: Reader, writer: Writer) -> None:
        raise AssertionError("the handler's own")

    with pytest.raises(AssertionError, match="the handler's own"):
        async with RawOrigin(handler) as origin, RawVisitor(origin.port) as visitor:
            await visitor.send(GET)
            assert await visitor.read_until_close() == b""


async def test_closing_the_origin_ends_its_connections_and_frees_the_port() -> None:
    async with RawOrigin(holding(asyncio.Event())) as origin, RawVisitor(origin.port) as visitor:
        await visitor.send(GET)
        await origin.wait_for(lambda: origin.requests)
        await origin.aclose()
        assert await visitor.read_until_close() == b""
        assert visitor.ended == "reset"
        with pytest.raises(ConnectionRefusedError):
            await ask(origin.port)
        async with RawOrigin(response(b"again"), port=origin.port):
            assert (await ask(origin.port)).body == b"again"


# ---------------------------------------------------------------------------------------- Relay


@pytest.fixture
async def origin() -> AsyncIterator[RawOrigin]:
    async with RawOrigin(response(b"hello"), read_body=True) as origin:
        yield origin


async def test_relay_passes_both_ways_and_counts(origin: RawOrigin) -> None:
    async with Relay(origin.port) as relay:
        got = await ask(relay.port)
        assert got.body == b"hello"
        assert (relay.bytes_up, relay.bytes_down) == (len(GET), len(response(b"hello")))
        await relay.wait_accepted(1)
        await relay.wait_for(lambda: relay.connections == 0)
        assert relay.accepted == 1


async def test_relay_keeps_every_byte_of_a_large_exchange() -> None:
    size = 24 * MIB
    origin: RawOrigin

    async def handler(request: RawRequest, reader: Reader, writer: Writer) -> None:
        up = PatternChecker()
        async for piece in origin.iter_body(request, reader):
            up.feed(piece)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for start in range(0, size, MIB):
            writer.write(pattern(start, MIB))
            await writer.drain()

    origin = RawOrigin(handler, record_limit=0)
    async with (
        origin,
        Relay(origin.port, delay_up=0.01, delay_down=0.01) as relay,
        RawVisitor(relay.port) as visitor,
    ):
        await visitor.send(request("POST", body=pattern(0, size)))
        checker = PatternChecker()
        assert (await visitor.read_response("POST", sink=checker.feed)).clean
        assert checker.offset == size


async def test_relay_passes_fin_and_rst_on(origin: RawOrigin) -> None:
    async with Relay(origin.port) as relay:
        async with RawVisitor(relay.port) as visitor:
            await visitor.send(GET)
            await visitor.read_response()
            visitor.write_eof()
            assert await visitor.read_until_close() == b""
            assert (visitor.ended, origin.connections[0].eof) == ("fin", True)
        async with RawVisitor(relay.port) as visitor:
            await visitor.send(GET)
            await visitor.read_response()
            visitor.abort()
            await origin.wait_for(lambda: len(origin.connections) == 2 and origin.connections[1].reset)
        async with RawVisitor(relay.port) as visitor:
            await visitor.send(GET)
            await visitor.read_response()
            origin.abort_connections()
            await visitor.read_until_close()
            assert visitor.ended == "reset"


async def test_relay_to_a_dead_port_resets() -> None:
    async with Relay(free_port()) as relay:
        with contextlib.suppress(ConnectionResetError):
            async with RawVisitor(relay.port) as visitor:
                await visitor.read_until_close()
                assert visitor.ended == "reset"
        await relay.wait_for(lambda: relay.accepted == 1 and relay.connections == 0)


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_cut_in_the_middle_of_a_body(how: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    async with (
        RawOrigin(holding(asyncio.Event(), head)) as origin,
        Relay(origin.port) as relay,
        RawVisitor(relay.port) as visitor,
    ):
        await visitor.send(GET)
        pieces = visitor.iter_body(await visitor.read_head())
        assert await anext(pieces) == b"half"
        assert await relay.cut("reset" if how == "reset" else "close") == 1
        with pytest.raises(Truncated):
            await anext(pieces)
        assert visitor.ended == ("reset" if how == "reset" else "fin")
        await origin.wait_for(lambda: origin.open_connections == 0)
        (seen,) = origin.connections
        assert (seen.eof, seen.reset) == ((False, True) if how == "reset" else (True, False))
        assert relay.connections == 0


async def test_cut_close_discards_what_comes_later_and_never_resets(origin: RawOrigin) -> None:
    async with Relay(origin.port) as relay, RawVisitor(relay.port) as visitor:
        await visitor.send(GET)
        await visitor.read_response()
        await relay.cut("close")
        assert await visitor.read_until_close() == b""
        assert visitor.ended == "fin"
        for _ in range(200):  # the second would meet an RST if the relay had closed instead
            await visitor.send(GET)
        assert len(origin.requests) == 1


async def test_cut_silence_holds_the_sockets_and_spares_new_connections(origin: RawOrigin) -> None:
    async with Relay(origin.port) as relay, RawVisitor(relay.port) as visitor:
        await visitor.send(GET)
        await visitor.read_response()
        assert await relay.cut("silence") == 1
        await visitor.send(GET)
        visitor.timeout = 0.1  # only from here on: to connect and to send may take longer
        with pytest.raises(WaitFailed):
            await visitor.read_some()
        assert (await ask(relay.port)).body == b"hello"
        assert [seen.connection for seen in origin.requests] == [0, 1]
        assert origin.connections[0].open
        relay.mode = "pass"
        with pytest.raises(WaitFailed):
            await visitor.read_some()
        visitor.abort()
        assert relay.silenced == 1
        assert origin.connections[0].open


async def test_blackhole_loses_nothing_when_it_ends(origin: RawOrigin) -> None:
    async with Relay(origin.port) as relay, RawVisitor(relay.port) as visitor:
        await visitor.send(GET)
        await visitor.read_response()
        counted = (relay.bytes_up, relay.bytes_down)
        relay.mode = "blackhole"
        await visitor.send(GET)
        async with RawVisitor(relay.port) as other:
            await other.send(GET)
            await relay.wait_accepted(2)
            visitor.timeout = other.timeout = 0.1
            with pytest.raises(WaitFailed):
                await other.read_some()
            with pytest.raises(WaitFailed):
                await visitor.read_some()
            assert (relay.bytes_up, relay.bytes_down, relay.buffered) == (*counted, 0)
            assert (len(origin.connections), relay.accepted, relay.connections) == (1, 2, 2)
            visitor.timeout = other.timeout = 5
            relay.mode = "pass"
            assert (await visitor.read_response()).body == b"hello"
            assert (await other.read_response()).body == b"hello"


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_half_blackhole_swallows_one_direction(origin: RawOrigin, direction: str) -> None:
    async with Relay(origin.port) as relay, RawVisitor(relay.port) as visitor:
        await visitor.send(GET)
        await visitor.read_response()
        up, down = relay.bytes_up, relay.bytes_down
        relay.set_mode("half-blackhole", "up" if direction == "up" else "down")
        await visitor.send(GET)
        if direction == "down":
            await origin.wait_requests(2)
        visitor.timeout = 0.1
        with pytest.raises(WaitFailed):
            await visitor.read_some()
        assert len(origin.requests) == (1 if direction == "up" else 2)
        assert relay.bytes_up == (up if direction == "up" else 2 * up)
        assert relay.bytes_down == down
        visitor.timeout = 5
        relay.mode = "pass"
        assert (await visitor.read_response()).body == b"hello"


async def test_refuse_resets_at_once_and_ends(origin: RawOrigin) -> None:
    async with Relay(origin.port) as relay:
        relay.refuse = True
        for _ in range(3):
            with contextlib.suppress(ConnectionResetError):  # already in connect, if the RST is that fast
                async with RawVisitor(relay.port) as visitor:
                    assert await visitor.read_until_close() == b""
                    assert visitor.ended == "reset"
        await relay.wait_accepted(3)
        assert (relay.accepted, relay.refused, len(origin.connections)) == (3, 3, 0)
        relay.refuse = False
        assert (await ask(relay.port)).body == b"hello"


async def test_relay_keeps_back_pressure() -> None:
    size = 64 * MIB
    written = 0

    async def handler(_: RawRequest, reader: Reader, writer: Writer) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for start in range(0, size, MIB // 16):
            writer.write(pattern(start, MIB // 16))
            await writer.drain()
            written = start + MIB // 16

    small = 32 * 1024
    async with (
        RawOrigin(handler, sndbuf=small) as origin,
        Relay(origin.port, buffer=small) as relay,
        RawVisitor(relay.port, rcvbuf=small) as visitor,
    ):
        await visitor.send(GET)
        head = await visitor.read_head()
        visitor.stop_reading()
        checker = PatternChecker()
        reading = asyncio.create_task(drain(visitor, head, checker))
        await relay.wait_for(lambda: relay.bytes_down > small)
        with pytest.raises(WaitFailed):
            await relay.wait_for(lambda: written >= 8 * MIB, 0.3)
        assert written > 0
        assert not reading.done()
        visitor.start_reading()
        await reading
        assert checker.offset == size


def has_received(origin: RawOrigin, n: int) -> bool:
    return origin.bytes_received >= n


async def drain(visitor: RawVisitor, head: RawResponse, checker: PatternChecker) -> None:
    async for piece in visitor.iter_body(head):
        checker.feed(piece)


def test_token_bucket_grants_no_more_than_rate_and_burst_allow() -> None:
    now, granted = 100.0, 0
    bucket = TokenBucket(10_000, now)
    for step in (0.0, 0.001, 0.013, 0.5, 0.002, 0.0, 3.0):
        now += step
        while took := bucket.take(30, now):
            granted += took
        assert granted <= bucket.burst + 10_000 * (now - 100.0)
        assert 0 < bucket.wait(30) <= 0.003
    assert granted >= 300  # idle time is not saved up: seven bursts of 100 bytes at the most
    assert granted <= 800
    bucket.give_back(50)
    assert bucket.take(50, now) == 50
    assert TokenBucket(0, now).wait(1) > 0


def test_a_way_without_a_rate_grants_everything() -> None:
    way = Way()
    assert (way.rate, way.take(10**9), way.wait(1)) == (None, 10**9, 0.0)


async def test_pacing_never_passes_more_than_the_rate_allows() -> None:
    rate, size = 200_000, 8 * MIB
    upload = request("POST", body=pattern(0, size))
    async with (
        RawOrigin(response(b"ok"), read_body=True) as origin,
        Relay(origin.port) as relay,
        RawVisitor(relay.port) as visitor,
    ):
        started = time.monotonic()
        relay.up.rate = rate
        sending = asyncio.create_task(visitor.send(upload))
        for mark in (1, 10_000, 20_000, 30_000):
            await origin.wait_for(functools.partial(has_received, origin, mark))
            assert relay.bytes_up <= rate / 100 + rate * (time.monotonic() - started) + 1
        relay.up.rate = 0
        stopped = relay.bytes_up
        await origin.wait_for(lambda: origin.bytes_received == stopped)
        relay.up.rate = None
        await sending
        assert (await visitor.read_response("POST")).body == b"ok"
        assert origin.requests[0].body == pattern(0, size)
        assert relay.bytes_up == len(upload)


async def test_delay_holds_bytes_back_and_keeps_their_order(origin: RawOrigin) -> None:
    async with Relay(origin.port, delay_up=0.05, delay_down=0.1) as relay:
        started = time.monotonic()
        assert (await ask(relay.port, GET + GET)).body == b"hello"
        assert time.monotonic() - started >= 0.15
        assert len(origin.requests) == 2


# ---------------------------------------------------------------------------------------- Process


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_events_are_taken_once_and_lines_in_order() -> None:
    code = """
import json, sys
for event in ("ready", "request", "request", "closed"):
    print(json.dumps({"event": event, "name": event[0], "path": "\\u2028"}), flush=True)
print("not json {", "{broken", sep="\\n")
print("error: one", "error: two", file=sys.stderr, sep="\\n")
sys.exit(7)
"""
    async with await Process.start(command=python(code)) as process:
        assert (await process.event("closed"))["name"] == "c"
        assert (await process.event("ready", name="r"))["path"] == "\u2028"
        assert [event["event"] for event in process.events] == ["request", "request"]
        await process.event("request")
        await process.event("request")
        assert await process.stderr_line("error") == "error: one"
        assert await process.stderr_line("error") == "error: two"
        assert await process.wait() == 7
        assert process.stdout[-2:] == ["not json {", "{broken"]
        with pytest.raises(WaitFailed, match=r"(?s)output ended.*'request'.*exit status 7.*error: two"):
            await process.event("request")


async def test_a_wait_that_fails_tells_the_output() -> None:
    code = "import sys, time; print('some output', flush=True); time.sleep(60)"
    async with await Process.start(command=python(code)) as process:
        await process.stdout_line("some")
        with pytest.raises(WaitFailed, match=r"(?s)'ready'.*running.*some output"):
            await process.event("ready", timeout=0.05)
        with pytest.raises(WaitFailed, match=r"(?s)no exit.*some output"):
            await process.wait(timeout=0.05)


async def test_a_process_that_writes_much_is_never_blocked() -> None:
    code = "import sys; [print('x' * 1000, file=f) for f in (sys.stdout, sys.stderr) for _ in range(5000)]"
    async with await Process.start(command=python(code)) as process:
        assert await process.wait() == 0
        assert (len(process.stdout), len(process.stderr)) == (5000, 5000)


async def test_the_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "http_proxy", "PYTUNNEL_TOKEN", "PYTHONDEVMODE", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    code = """
import json, os, sys
print(json.dumps({"event": "env", "env": dict(os.environ), "stdin": sys.stdin.read()}))
"""
    async with await Process.start(env={"EXTRA": "2"}, command=python(code)) as process:
        event = await process.event("env")
        environment, home = event["env"], Path(event["env"]["HOME"])
        assert set(environment) - {"LC_CTYPE"} == {"PATH", "HOME", "PYTUNNEL_STATE_DIR", "EXTRA", *support.DEBUG}
        assert Path(environment["PYTUNNEL_STATE_DIR"]).parent == home
        assert event["stdin"] == ""
        assert os.listdir(home) == []
    with pytest.raises(FileNotFoundError):
        os.listdir(home)


async def test_signals_resources_and_killing_what_is_left() -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    async with await Process.start(command=python(code)) as process:
        await process.stdout_line("up")
        assert 3 <= process.fd_count() <= 16
        assert process.peak_rss() >= process.rss() > 2 * MIB
        assert process.cpu_seconds() >= 0
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == -signal.SIGTERM
    async with await Process.start(command=python(code)) as process:
        await process.stdout_line("up")
        assert process.returncode is None
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


COMPLAINTS = {
    "Traceback": "1 / 0",
    "was never awaited": "sleep(1)",
    "was never retrieved": "loop.create_future().set_exception(OSError())",
    "Task was destroyed": "tasks = [loop.create_task(forever())]; await sleep(0); tasks.clear()",
    "ResourceWarning": "socket.socket()",
    "Unclosed": "aiohttp.ClientSession()",
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
async def test_a_process_that_complains_fails_unless_it_is_expected_to(complaint: str) -> None:
    code = f"""
import aiohttp, asyncio, gc, socket
from asyncio import sleep

async def forever():
    await asyncio.get_running_loop().create_future()

async def main():
    loop = asyncio.get_running_loop()
    {COMPLAINTS[complaint]}
    gc.collect()

asyncio.run(main())
"""
    with pytest.raises(AssertionError, match=f"on stderr: .*{complaint}"):
        async with await Process.start(command=python(code)) as process:
            await process.wait()
    async with await Process.start(command=python(code)) as process:
        process.expected_complaint = f"{complaint}|Traceback|Unclosed|ResourceWarning"  # each tells more than one
        await process.wait()


async def test_a_process_may_be_slow() -> None:
    code = """
import asyncio, sys, time
async def main():
    time.sleep(0.2)
    print("after", file=sys.stderr)
asyncio.run(main())
"""
    async with await Process.start(command=python(code)) as process:
        assert await process.wait() == 0
        assert process.stderr == ["after"]


# ---------------------------------------------------------------------------------------- Tunnel

# The smallest program that keeps the command line contract: the client tells the server its target in
# one line, and the server pipes every visitor straight to that port.
STAND_IN = """
import argparse, asyncio, json
from urllib.parse import urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("command")
parser.add_argument("target", nargs="?")
for name in ("listen", "server", "token", "name", "extra"):
    parser.add_argument("--" + name)
parser.add_argument("--json", action="store_true")
args = parser.parse_args()
target = None
kept = []  # what it should have let go

def emit(**event):
    print(json.dumps(event), flush=True)

async def pipe(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()

async def on_connection(reader, writer):
    global target
    first = await reader.readline()
    if first.startswith(b"LINK "):
        target = int(first.split()[1])
        writer.write(b"ok\\n")
        return await pipe(reader, writer)
    if first.startswith((b"GET /keep-", b"GET /metrics ")):
        what = first.split()[1]
        kept.append(open(__file__) if what == b"/keep-file" else writer if what == b"/keep-connection" else what)
        body = b"# of a stand-in\\npytunnel_streams %d\\n" % kept.count(b"/keep-stream")
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
        return None if what == b"/keep-connection" else writer.close()
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
    far_writer.write(first)
    await asyncio.gather(pipe(reader, far_writer), pipe(far_reader, writer))

async def serve():
    host, port = args.listen.rsplit(":", 1)
    server = await asyncio.start_server(on_connection, host, int(port))
    emit(event="listening", host=host, port=server.sockets[0].getsockname()[1], extra=args.extra)
    await server.serve_forever()

async def link(url):
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"LINK %d\\n" % int(args.target))
    if not await reader.readline():
        raise ConnectionError
    return reader, writer

async def connect():
    url = urlsplit(args.server)
    reader, writer = await link(url)
    if args.extra == "links":
        kept.append(await link(url))
    if args.extra == "requests":
        kept.append(await asyncio.open_connection("127.0.0.1", int(args.target)))
    emit(event="ready", url=f"http://{args.name}.localhost:{url.port}/", name=args.name, target=args.target)
    while True:
        try:
            await reader.read()
        except ConnectionError:
            pass
        emit(event="disconnected")
        writer.close()
        while True:
            try:
                reader, writer = await link(url)
                break
            except ConnectionError:
                await asyncio.sleep(0.01)
        emit(event="reconnected")

asyncio.run(serve() if args.command == "serve" else connect())
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    return [sys.executable, str(program)]


async def test_tunnel_without_a_relay(origin: RawOrigin, stand_in: list[str]) -> None:
    async with Tunnel(origin.port, name="app", serve_args=["--extra", "e"], command=stand_in) as tunnel:
        assert tunnel.host == b"app.localhost"
        assert tunnel.ready["url"] == f"http://app.localhost:{tunnel.port}/"
        got = await tunnel.get(b"/x", [(b"X-A", b"1")])
        assert (got.status, got.body) == (200, b"hello")
        assert (await tunnel.fetch("POST", body=b"data")).status == 200
        get, post = origin.requests
        assert get.head == b"GET /x HTTP/1.1\r\nHost: app.localhost\r\nX-A: 1\r\n\r\n"
        assert post.body == b"data"
        with pytest.raises(AssertionError, match="no relay"):
            _ = tunnel.relay
        async with RawOrigin(response(b"other")) as other:
            await (await tunnel.start_client(origin_port=other.port)).event("ready")
            assert (await tunnel.get()).body == b"other"
            assert len(tunnel.clients) == 2
    assert all(client.returncode is not None for client in tunnel.clients)
    assert tunnel.server.returncode is not None


async def test_tunnel_with_a_relay_survives_a_cut_and_a_restart(
    origin: RawOrigin, stand_in: list[str]
) -> None:
    async with Tunnel(origin.port, relay=True, command=stand_in) as tunnel:
        assert tunnel.relay.connections == 1
        assert tunnel.server_url.endswith(f":{tunnel.relay.port}")
        await tunnel.relay.cut("reset")
        await tunnel.client.event("disconnected")
        await tunnel.client.event("reconnected")
        assert (await tunnel.get()).body == b"hello"
        first, port = tunnel.server, tunnel.port
        await tunnel.restart_server(signal.SIGKILL)
        await tunnel.client.event("disconnected")
        await tunnel.client.event("reconnected")
        assert (await tunnel.get()).body == b"hello"
        assert (tunnel.port, first.returncode) == (port, -signal.SIGKILL)
        assert tunnel.server is not first


@pytest.mark.parametrize(
    ("target", "extra", "excess"),
    [
        (b"/keep-file", "", "server .*stand_in.py"),
        (b"/keep-connection", "", "server .*whose other end is gone"),
        (b"/keep-stream", "", "pytunnel_streams 1, not 0"),
        (b"/", "links", "client .*a second link"),
        (b"/", "requests", "client .*in use"),
    ],
)
async def test_a_tunnel_whose_processes_keep_what_they_should_let_go_fails(
    origin: RawOrigin, stand_in: list[str], monkeypatch: pytest.MonkeyPatch, target: bytes, extra: str, excess: str
) -> None:
    monkeypatch.setattr(support, "REST", 0.2)
    with pytest.raises(WaitFailed, match=excess) as caught:
        async with Tunnel(origin.port, command=stand_in, connect_args=["--extra", extra]) as tunnel:
            assert (await tunnel.get(target)).status == 200
    assert any("listening" in note for note in caught.value.__notes__)
    async with Tunnel(origin.port, command=stand_in, connect_args=["--extra", extra], settles=False) as tunnel:
        assert (await tunnel.get(target)).status == 200


async def test_what_visitors_and_local_services_keep_open_is_no_fault_of_a_tunnel(
    origin: RawOrigin, stand_in: list[str]
) -> None:
    async with contextlib.AsyncExitStack() as stack, Tunnel(origin.port, command=stand_in) as tunnel:
        visitor = await stack.enter_async_context(tunnel.visitor())
        await visitor.send(tunnel.request(target=b"/keep-connection"))
        assert (await visitor.read_response()).status == 200
        visitor.write_eof()


async def test_a_tunnel_whose_processes_complain_fails(origin: RawOrigin, tmp_path: Path) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN.replace("kept = []", "import sys; print('Unclosed', file=sys.stderr); kept = []"))
    command = [sys.executable, str(program)]
    with pytest.raises(AssertionError, match="on stderr: Unclosed"):
        async with Tunnel(origin.port, command=command):
            pass
    async with Tunnel(origin.port, command=command) as tunnel:
        tunnel.server.expected_complaint = tunnel.client.expected_complaint = "Unclosed"


async def test_a_tunnel_that_does_not_start_tells_every_output(stand_in: list[str]) -> None:
    with pytest.raises(WaitFailed) as caught:
        async with Tunnel(1, connect_args=["--no-such-flag"], command=stand_in):
            pass
    assert any("listening" in note for note in caught.value.__notes__)
    assert "unrecognized arguments" in str(caught.value)


# ---------------------------------------------------------------------------------------- What a test leaves behind

LEAVING = """
import asyncio, conftest, gc, logging, pytest, socket
from asyncio import create_task, sleep

conftest.REST = 0.2
kept = []

async def fail():
    raise ValueError

def test_a_descriptor():
    kept.append(socket.socket())

async def test_a_descriptor_of_an_async_test():
    kept.append(socket.socket())

async def test_a_task():
    kept.append(create_task(sleep(100)))

@pytest.mark.asyncio(loop_scope="module")
async def test_a_task_on_the_loop_of_the_module():
    kept.append(create_task(sleep(100)))

def test_never_closed():
    cycle = [socket.socket()]
    cycle.append(cycle)

async def test_never_awaited():
    cycle = [fail()]
    cycle.append(cycle)

async def test_never_retrieved():
    cycle = [create_task(fail())]
    cycle.append(cycle)
    await sleep(0)

async def test_a_destroyed_task():
    create_task(asyncio.Event().wait())
    await sleep(0)

async def test_a_failed_callback():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await sleep(0)
"""
LEAVING_NOTHING = """
@pytest.fixture
async def server():
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    task = create_task(sleep(100))
    yield
    server.close()
    task.cancel()

@pytest.fixture(scope="module")
def of_the_module():
    with socket.socket() as sock:
        yield sock

async def test_clean_fixtures(server, of_the_module):
    assert asyncio.get_running_loop().get_debug()

async def test_clean_in_time():
    asyncio.get_running_loop().call_later(0.05, socket.socket().close)

async def test_clean_and_slow():
    logging.getLogger("asyncio").warning("Executing a callback took a second")

def test_clean_and_sync(of_the_module):
    pass
"""


async def test_a_test_that_leaves_something_behind_fails_and_no_other_one(tmp_path: Path) -> None:
    (tmp_path / "test_leaving.py").write_text(LEAVING + LEAVING_NOTHING)
    options = ["-c", str(support.ROOT / "pyproject.toml"), "-p", "conftest", "-q", "-rA", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", str(tmp_path)]
    env = {"PYTHONPATH": str(support.ROOT / "tests"), **support.NO_DEBUG}
    async with await Process.start(command=command, env=env) as process:
        process.expected_complaint = "ResourceWarning"  # what is kept to the very end, in `kept`
        assert await process.wait(60) == 1, process.output()
    results = re.findall(r"^(PASSED|FAILED|ERROR) \S+::(test_\w+)", "\n".join(process.stdout), re.MULTILINE)
    unclean = {name for result, name in results if result != "PASSED"}
    assert unclean == set(re.findall(r"test_\w+(?=\()", LEAVING)), process.output()
    assert {name for _, name in results} - unclean == set(re.findall(r"test_clean\w+", LEAVING_NOTHING))
