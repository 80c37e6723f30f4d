"""Compressed content: what a zstd frame of a peer may be, which chunks a session compresses, and of which types."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import random
import re
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support import TIMEOUT, Handler, RawOrigin, RawRequest, Relay, Tunnel, chunk, request, response
from test_session import REQUEST, RESPONSE, Pair, content, data, head, reset, sent, server_with_stream

import pytunnel
from pytunnel import (
    ASK,
    COMPRESS_RATE,
    END,
    HISTORY,
    INITIAL_WINDOW,
    MAX_BATCH,
    MAX_DATA,
    MIN_COMPRESSED,
    SLOW_LEVEL,
    SLOW_RATE,
    ZSTD,
    ZSTD_LEVEL,
    ErrorCode,
    Frame,
    FrameType,
    InFlight,
    Kind,
    ProtocolError,
    Session,
    compress,
    compressible,
    content_length,
    decompress,
    encode_frame,
    next_history,
)

TEXT = Path(pytunnel.__file__).read_bytes()[: 4 * MAX_DATA]
TURN = pytunnel.FIRST_CAP // 4
NOISE = random.Random(1).randbytes(MAX_DATA)
HISTORIES = [
    b"",
    b"x",
    TEXT[:HISTORY],
    NOISE[:1000],
    b"\x37\xa4\x30\xec" + NOISE[:1000],  # as dictionaries of zstd begin (RFC 8878 section 5)
    zstandard.train_dictionary(2000, [TEXT[at : at + 500] for at in range(0, 200_000, 500)]).as_bytes(),
]
HEAD = b"\x28\xb5\x2f\xfd"  # a zstd frame's first bytes (RFC 8878 section 3.1.1)
SINGLE = 0xA0  # its descriptor: one segment, 4 bytes of content length


def rle_blocks(*sizes: int) -> bytes:
    """The blocks of a frame, of so many zeros each: 4 bytes for up to 128 KiB (RFC 8878 section 3.1.1.2)."""
    words = [(size << 3 | 1 << 1 | (i == len(sizes) - 1)).to_bytes(3, "little") for i, size in enumerate(sizes)]
    return b"".join(word + b"\0" for word in words)


def rle_frame(length: int, *blocks: int) -> bytes:
    """A frame that claims `length` bytes and has blocks of that many zeros each."""
    return HEAD + bytes([SINGLE]) + struct.pack("<I", length) + rle_blocks(*blocks)


# Round trips


@given(st.binary(min_size=1, max_size=3000) | st.text(min_size=1, max_size=3000).map(str.encode))
def test_any_content_comes_back(content: bytes) -> None:
    payload = compress(content)
    assert compress(memoryview(content)) == payload
    assert content_length(payload) == len(content)
    assert decompress(payload) == content


@pytest.mark.parametrize("content", [b"\0", bytes(MAX_DATA), NOISE], ids=len)
def test_any_length_up_to_the_limit_comes_back(content: bytes) -> None:
    assert decompress(compress(content)) == content


@given(st.lists(st.binary(min_size=1, max_size=200).map(lambda part: part * 7), max_size=8), st.sampled_from(HISTORIES))
def test_any_chunks_come_back_with_their_history(parts: list[bytes], history: bytes) -> None:
    sent = got = history
    for part in parts:
        payload = compress(memoryview(part), sent)
        assert decompress(payload, got) == part
        sent, got = next_history(sent, memoryview(part)), next_history(got, part)
    assert sent == got == (history + b"".join(parts))[-HISTORY:]


def test_a_chunk_may_refer_to_its_history() -> None:
    words, more = TEXT[:50_000], TEXT[40_000:60_000]
    assert len(compress(more, words)) < 0.7 * len(compress(more))


@given(st.binary(min_size=1, max_size=500), st.binary(min_size=1, max_size=500))
def test_a_chunk_has_the_same_size_whatever_was_compressed_before(secret: bytes, content: bytes) -> None:
    before = compress(content)
    compress(secret + content)
    assert compress(content) == before


def test_text_gets_smaller() -> None:
    assert len(compress(TEXT[:65_536])) < 65_536 / 2.5


# What a peer may send


def test_the_frames_made_here_are_what_they_seem() -> None:
    assert decompress(rle_frame(200_000, 131_072, 68_928)) == bytes(200_000)
    assert decompress(HEAD + b"\x80\0" + struct.pack("<I", 2048) + rle_blocks(1024, 1024)) == bytes(2048)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        HEAD[:3],
        HEAD,
        b"not a frame",
        compress(b"content")[:-1],
        compress(b"content") + b"\0",
        compress(b"one") + compress(b"two"),
        compress(b""),
        compress(bytes(MAX_DATA + 1)),
        zstandard.ZstdCompressor(write_content_size=False).compress(b"of unknown length"),
        struct.pack("<II", 0x184D2A50, 5) + b"1 2 3",
        struct.pack("<II", 0x184D2A50, 5) + b"1 2 3" + compress(b"1 2 3"),
        rle_frame(5, 4),
        rle_frame(5, 6),
        rle_frame(2**32 - 1, 131_072),
        rle_frame(MAX_DATA, *[131_072] * 3),
        HEAD + b"\x80\0" + struct.pack("<I", 264 * 1024) + rle_blocks(*[1024] * 264),  # small blocks, small window
        HEAD + b"\x80\x68" + struct.pack("<I", 3) + b"\x19\0\0abc",  # 3 bytes, and a window of 8 MiB
        HEAD + b"\xa3" + struct.pack("<II", 77, 3) + b"\x19\0\0abc",  # with dictionary 77
    ],
    ids=lambda payload: payload[:12].hex(),
)
def test_anything_but_one_whole_frame_of_a_known_length_is_refused(payload: bytes) -> None:
    for history in HISTORIES:
        with pytest.raises(ProtocolError):
            decompress(payload, history)


def test_a_skippable_frame_has_no_content() -> None:
    """It has a length where others have theirs (RFC 8878 section 3.1.2)."""
    with pytest.raises(ProtocolError):
        content_length(struct.pack("<II", 0x184D2A50, 5) + b"1 2 3")


@given(st.binary(max_size=200), st.booleans(), st.sampled_from(HISTORIES))
def test_any_bytes_are_refused_or_short(data: bytes, with_head: bool, history: bytes) -> None:
    try:
        assert len(decompress(HEAD * with_head + data, history)) <= MAX_DATA
    except ProtocolError:
        pass


@given(st.binary(min_size=1, max_size=2000), st.sampled_from(HISTORIES), st.sampled_from(HISTORIES), st.data())
def test_a_frame_with_wrong_bytes_is_refused_or_as_long_as_it_says(
    content: bytes, one: bytes, other: bytes, data: st.DataObject
) -> None:
    payload = bytearray(compress(content, one))
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    try:
        assert len(decompress(bytes(payload), other)) == content_length(bytes(payload))
    except ProtocolError:
        pass


BOMBS = f"""
import resource, struct, pytunnel
head = {HEAD!r} + bytes([{SINGLE}])
zeros = (131072 << 3 | 2).to_bytes(3, "little") + bytes(1)
bombs = [head + struct.pack("<I", length) + zeros * 65000 for length in (2**32 - 1, 2**28, pytunnel.MAX_DATA, 1000)]
bombs.append({HEAD!r} + bytes([0x80, 0xA8]) + struct.pack("<I", pytunnel.MAX_DATA) + zeros * 65000)  # a window of 2 GiB
pytunnel.decompress(pytunnel.compress(bytes(pytunnel.MAX_DATA)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in bombs:
    for payload in (bomb, bomb[:-1], bomb + pytunnel.compress(b"more")):
        for history in (b"", bytes(range(256)) * 256):
            try:
                pytunnel.decompress(payload, history)
            except pytunnel.ProtocolError:
                continue
            raise SystemExit("not refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_of_8_gib_take_no_memory() -> None:
    """In a process of its own, whose memory has never been more than this took."""
    command = [sys.executable, "-c", BOMBS]
    result = subprocess.run(command, cwd=Path(pytunnel.__file__).parent, capture_output=True, text=True, timeout=60)
    assert not result.stderr, result.stderr
    assert int(result.stdout) < 2048, "KiB"


# Which chunks are compressed


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The link is known to be slow; a turn is 16 KiB of it."""
    monkeypatch.setattr(InFlight, "rate", 1.0)
    monkeypatch.setattr(pytunnel, "MIN_TURN", TURN)
    monkeypatch.setattr(pytunnel, "MAX_TURN", TURN)
    return monkeypatch


def answering(*, agreed: bool = True, fits: bool = True) -> tuple[Pair, int]:
    """Two sessions, and a stream whose response has begun."""
    pair = Pair(compress=agreed)
    stream = pair.server.open_stream(0, Kind.HTTP, REQUEST, compress=fits)
    pair.exchange()
    pair.client.send_head(stream, RESPONSE, compress=fits)
    pair.exchange()
    return pair, stream


def chunks(session: Session, limit: int = MAX_BATCH) -> list[Frame]:
    return [frame for frame in sent(session, limit) if frame.type == FrameType.DATA]


@pytest.mark.parametrize(
    ("agreed", "fits", "rate", "compressed"),
    [
        (True, True, 1.0, True),
        (True, True, COMPRESS_RATE - 1, True),
        (True, True, COMPRESS_RATE, False),
        (True, True, float("inf"), False),
        (False, True, 1.0, False),
        (True, False, 1.0, False),
    ],
)
@pytest.mark.parametrize("upload", [False, True])
def test_what_is_compressed(
    slow: pytest.MonkeyPatch, agreed: bool, fits: bool, rate: float, compressed: bool, upload: bool
) -> None:
    slow.setattr(InFlight, "rate", rate)
    pair, stream = answering(agreed=agreed, fits=fits)
    sender = pair.server if upload else pair.client
    sender.send_data(stream, TEXT[: TURN + 1])
    frame = chunks(sender)[0]
    assert bool(frame.flags & ZSTD) is compressed
    length = TURN + compressed
    assert (decompress(frame.payload) if compressed else frame.payload) == TEXT[:length]
    assert sender.saved == length - len(frame.payload)


@pytest.mark.parametrize(("size", "compressed"), [(MIN_COMPRESSED, True), (MIN_COMPRESSED - 1, False)])
def test_a_short_chunk_is_compressed_when_it_has_to_wait(size: int, compressed: bool) -> None:
    pair, stream = answering()
    other = pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.exchange()
    pair.client.send_head(other, RESPONSE)
    pair.client.send_data(stream, TEXT[:size])
    assert not chunks(pair.client)[0].flags & ZSTD, "the link has nothing else to do"
    pair.client.send_data(other, NOISE[:TURN])
    assert len(pair.client.data_to_send()) > TURN
    pair.client.send_data(stream, TEXT[:size])
    assert bool(chunks(pair.client)[0].flags & ZSTD) is compressed


class Route:
    """Frames of 1 KB on their way, 20 ms there and back, and what is in flight among them."""

    def __init__(self) -> None:
        self.flight, self.now, self.sent, self.acked, self.idle_at = InFlight(), 0.0, 0, 0, 0.0
        self.acks: collections.deque[tuple[float, int]] = collections.deque()

    def carry(self, rate: float) -> float:
        """Send what may be sent at that many bytes a second, take an ACK, and return the rate that is known then."""
        flight = self.flight
        while flight.has_room:
            asks = flight.wants_ack(1000)
            flight.send(1000)
            self.sent, self.idle_at = self.sent + 1, max(self.now, self.idle_at) + 1000 / rate
            if asks:
                flight.ask(self.sent, self.now)
                self.acks.append((self.idle_at + 0.02, self.sent))
        self.now, frames = self.acks.popleft()
        flight.acknowledge(frames, 1000 * (frames - self.acked), self.now)
        self.acked = frames
        return flight.rate


def test_a_link_is_slow_once_it_has_a_queue_and_until_it_carries_more(slow: pytest.MonkeyPatch) -> None:
    slow.undo()
    path = Route()
    while path.carry(1e6) == float("inf"):
        assert path.now < 0.5
    while path.now < 1.0:
        assert 0.5e6 < path.carry(1e6) < 1.5e6
    while path.carry(2e9) < COMPRESS_RATE:  # so fast that no queue ever shows
        assert path.now < 5.0


def test_a_fast_link_is_never_taken_for_a_slow_one(slow: pytest.MonkeyPatch) -> None:
    slow.undo()
    path = Route()
    while path.now < 2.0:
        assert path.carry(50e6) > COMPRESS_RATE


def test_the_other_end_gets_what_was_sent() -> None:
    pair, stream = answering()
    for sender in pair.wires:
        sender.send_data(stream, TEXT[:100_000])
        sender.send_data(stream, b"short", end=True)
    events = pair.exchange()
    assert [content(got) for got in events] == [TEXT[:100_000] + b"short"] * 2
    assert not any(frame.flags & ZSTD for got in events for frame in got)
    assert pair.server.saved == pair.client.saved > 100_000


def test_a_stream_does_not_tell_by_its_sizes_what_another_one_carried() -> None:
    sizes = []
    for before in (NOISE, TEXT):
        pair, stream = answering()
        pair.client.send_data(stream, before[:30_000], end=True)
        other = pair.server.open_stream(0, Kind.HTTP, REQUEST)
        pair.exchange()
        pair.client.send_head(other, RESPONSE, compress=True)
        pair.client.send_data(other, TEXT[:20_000])
        sizes.append(len(chunks(pair.client)[0].payload))
    assert sizes[0] == sizes[1] < 10_000


def test_a_history_ends_with_its_direction() -> None:
    pair, stream = answering()
    for sender in pair.wires:
        sender.send_data(stream, TEXT[:30_000])
    pair.exchange()
    pair.client.send_data(stream, b"the end", end=True)
    pair.exchange()
    client, server = (session._streams[stream] for session in (pair.client, pair.server))
    assert client.packed_history == server.unpacked_history == b""
    assert server.packed_history == client.unpacked_history == TEXT[:30_000]


def test_plain_and_compressed_chunks_take_turns(slow: pytest.MonkeyPatch) -> None:
    pair, stream = answering()
    saved, got = [0], b""
    for start in range(0, 200_000, 20_000):
        slow.setattr(InFlight, "rate", start % 40_000 * COMPRESS_RATE)
        pair.client.send_data(stream, TEXT[start : start + 20_000])
        got += content(pair.exchange()[0])
        saved.append(pair.client.saved)
        pair.server.acknowledge_received_data(stream, 20_000)
    assert [after > before for before, after in itertools.pairwise(saved)] == [True, False] * 5
    assert got == TEXT[:200_000]


def test_credit_is_for_content() -> None:
    pair, stream = answering()
    pair.client.send_data(stream, bytes(INITIAL_WINDOW + 1))
    events, _ = pair.exchange()
    assert content(events) == bytes(INITIAL_WINDOW)
    assert pair.client._streams[stream].send.credit == pair.server._streams[stream].receive.credit == 0
    assert pair.server.buffered == INITIAL_WINDOW + HISTORY
    pair.server.acknowledge_received_data(stream, INITIAL_WINDOW)
    events, _ = pair.exchange()
    assert content(events) == bytes(1)


def test_a_chunk_is_as_long_as_it_may_be_for_a_turn_of_the_link() -> None:
    """What the last one was compressed to tells how much the next one takes."""
    pair, stream = answering()
    pair.client.send_data(stream, TEXT[:200_000])
    first, second = (chunks(pair.client, 1)[0] for _ in range(2))
    assert content_length(first.payload) == 2 * TURN
    assert len(first.payload) < TURN and not first.flags & ASK, "what counts on the link is what it carries"
    ratio = content_length(first.payload) / len(first.payload)
    assert content_length(second.payload) == min(200_000 - 2 * TURN, int(TURN * ratio)) > TURN
    assert len(second.payload) < 1.2 * TURN
    pair, stream = answering()
    pair.client.send_data(stream, bytes(TURN))
    assert len(chunks(pair.client)) == 1
    pair.client._streams[stream].send.add(MAX_DATA)
    pair.client.send_data(stream, bytes(2 * MAX_DATA))
    expected = min(MAX_DATA, int(pytunnel.MAX_RATIO * TURN))
    assert content_length(chunks(pair.client, 1)[0].payload) <= expected, "what comes after zeros may be noise"


def test_a_message_holds_the_event_loop_no_longer_than_plain_ones() -> None:
    pair, _ = answering()
    streams = [pair.server.open_stream(0, Kind.HTTP, REQUEST) for _ in range(9)]
    pair.exchange()
    for stream in streams:
        pair.client.send_head(stream, RESPONSE, compress=True)
    pair.exchange()
    for stream in streams:
        pair.client.send_data(stream, bytes(INITIAL_WINDOW))
    for _ in streams:
        assert [content_length(frame.payload) for frame in chunks(pair.client)] == [2 * TURN]


def test_what_is_encoded_already_is_tried_once() -> None:
    pair, stream = answering()
    pair.client._streams[stream].packed_history = TEXT[:100]
    pair.client.send_data(stream, NOISE)
    with mock.patch.object(pytunnel, "compress", wraps=compress) as tried:
        events, _ = pair.exchange()
    assert content(events) == NOISE and tried.call_count == 1
    assert pair.client._streams[stream].packed_history == b""
    assert pair.client.saved == pair.server.saved == 0


def test_an_end_without_content_is_plain() -> None:
    pair, stream = answering()
    pair.client.send_data(stream, b"", end=True)
    assert chunks(pair.client) == [Frame(FrameType.DATA, END, stream, b"")]


@pytest.mark.parametrize(("rate", "level"), [(SLOW_RATE - 1, SLOW_LEVEL), (SLOW_RATE, ZSTD_LEVEL)])
def test_a_slower_link_leaves_time_for_a_higher_level(slow: pytest.MonkeyPatch, rate: float, level: int) -> None:
    slow.setattr(InFlight, "rate", rate)
    pair, stream = answering()
    pair.client.send_data(stream, TEXT[:20_000])
    assert chunks(pair.client)[0].payload == compress(TEXT[:20_000], level=level)
    assert compress(TEXT[:20_000], level=ZSTD_LEVEL) != compress(TEXT[:20_000], level=SLOW_LEVEL)


def test_a_chunk_that_is_sent_again_has_the_same_bytes(slow: pytest.MonkeyPatch) -> None:
    pair, stream = answering()
    pair.client.send_data(stream, TEXT[:100_000], end=True)
    lost = pair.client.data_to_send()
    pair.cut()
    slow.setattr(InFlight, "rate", float("inf"))  # the next link is fast
    pair.link()
    assert pair.client.data_to_send().startswith(lost)
    assert pair.client._streams[stream].ratio > 1
    pair.cut()
    pair.link()
    events, _ = pair.exchange()
    assert content(events) == TEXT[:100_000]


# What a session takes


def zstd(payload: bytes, flags: int = 0) -> bytes:
    return data(1, payload, ZSTD | flags)


@pytest.mark.parametrize(
    "payload", [b"", b"plain", compress(b""), compress(bytes(MAX_DATA + 1)), compress(b"whole")[:-1], rle_frame(5, 6)]
)
@pytest.mark.parametrize("flags", [0, END])
def test_a_broken_chunk_is_a_protocol_error(payload: bytes, flags: int) -> None:
    session = server_with_stream()
    with pytest.raises(ProtocolError):
        session.receive_data(head() + zstd(payload, flags), 0.0)


def test_a_broken_chunk_for_a_closed_stream_is_ignored() -> None:
    session = server_with_stream()
    assert len(session.receive_data(head() + reset() + zstd(b"broken"), 0.0)) == 2


def test_nothing_is_unpacked_that_is_past_the_window() -> None:
    session = server_with_stream(size=1000)
    assert content(session.receive_data(head() + zstd(compress(bytes(600))), 0.0)) == bytes(600)
    with mock.patch.object(pytunnel, "decompress") as unpacked, pytest.raises(ProtocolError) as caught:
        session.receive_data(zstd(compress(bytes(401))), 0.0)
    assert caught.value.code is ErrorCode.FLOW_CONTROL
    assert not unpacked.called


def test_many_compressed_chunks_leave_others_their_turn() -> None:
    """Unpacking takes longer than what the bytes of a message let expect."""
    session = server_with_stream()
    session.receive_data(head(), 0.0)
    before, got = session.work, [len(session.receive_data(zstd(compress(bytes(1000))) * 200, 0.0))]
    while session.has_more:
        got.append(len(session.receive_data(b"", 0.0)))
    assert sum(got) == 200 and max(got) <= pytunnel.MAX_FRAMES / 30 + 1
    assert session.work - before > 5 * pytunnel.MAX_FRAMES


@given(st.binary(max_size=60), st.booleans(), st.integers(0, 15))
def test_any_bytes_of_a_chunk_raise_only_protocol_error(payload: bytes, with_head: bool, flags: int) -> None:
    session = server_with_stream()
    try:
        session.receive_data(head() + encode_frame(FrameType.DATA, ZSTD | flags, 1, HEAD * with_head + payload), 0.0)
    except ProtocolError:
        pass


# Types


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("Content-Type: text/html; charset=utf-8", True),
        ("Content-Type: TEXT/CSS", True),
        ("content-type: text/event-stream", True),
        ("Content-Type: application/json", True),
        ("Content-Type:  application/json ;charset=utf-8", True),
        ("Content-Type: application/problem+json", True),
        ("Content-Type: image/svg+xml", True),
        ("Content-Type: application/wasm", True),
        ("Content-Type: application/x-ndjson", True),
        ("Content-Type: application/x-www-form-urlencoded", True),
        ("Content-Type: application/json\nContent-Encoding: identity", True),
        ("Content-Type: application/json\nCache-Control: no-transform", True),
        ("Content-Type: application/json\nContent-Encoding: gzip", False),
        ("Content-Type: application/json\ncontent-encoding: identity, BR", False),
        ("Content-Type: text/html\nContent-Type: image/png", False),
        ("Content-Type: image/png\nContent-Type: text/html", False),
        ("Content-Type: text/html\nContent-Type: text/html\nContent-Type: text/html", False),
        ("Content-Type: image/png", False),
        ("Content-Type: application/jsonx", False),
        ("Content-Type: application/octet-stream", False),
        ("Content-Type: application/zip", False),
        ("Content-Type: multipart/form-data; boundary=text/html", False),
        ("Content-Type: ", False),
        ("X-Content-Type: text/html", False),
        ("", False),
    ],
)
def test_types_that_compress(fields: str, expected: bool) -> None:
    pairs = [line.encode().split(b": ", 1) for line in fields.splitlines()]
    assert compressible([(name, value) for name, value in pairs]) is expected


# Real processes and a slow link

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
RATE = 2e6  # bytes a second
PAGE = TEXT[:400_000]


@contextlib.asynccontextmanager
async def slow_link(handler: Handler, *args: str) -> AsyncIterator[Tunnel]:
    """A tunnel over a link that is known to be slow, both ways."""

    async def answer(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        if asked.target == b"/warm-up":
            writer.write(response(NOISE * 3))
        else:
            await handler(asked, reader, writer)

    async with (
        RawOrigin(answer, read_body=True) as origin,
        Tunnel(origin.port, relay=Relay(0, rate_up=RATE, rate_down=RATE, buffer=65536), connect_args=args) as tunnel,
    ):
        assert (await tunnel.fetch("POST", b"/warm-up", body=NOISE * 3)).body == NOISE * 3
        yield tunnel


async def page(asked: RawRequest, reader: Reader, writer: Writer) -> None:
    """Answer with the page; the target names its type, its coding if it has one, and how often it comes."""
    type_, coding, times = asked.target[1:].split(b"?")
    fields = [(b"Content-Type", type_), *([(b"Content-Encoding", coding)] if coding else [])]
    writer.write(response(PAGE * int(times), headers=fields))


async def saved(tunnel: Tunnel) -> float:
    """The bytes that compression has saved, as the server says."""
    async with tunnel.visitor() as visitor:
        await visitor.send(request("GET", b"/metrics", b"127.0.0.1:%d" % tunnel.port))
        text = (await visitor.read_response()).body.decode()
    return float(re.search(r"^pytunnel_saved_bytes_total (.*)", text, re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("target", "args", "smaller"),
    [
        (b"/text/html??1", [], True),
        (b"/application/json?identity?1", [], True),
        (b"/image/png??1", [], False),
        (b"/text/html?gzip?1", [], False),
        (b"/text/html??1", ["--no-compress"], False),
    ],
)
async def test_a_download(target: bytes, args: list[str], smaller: bool) -> None:
    async with slow_link(page, *args) as tunnel:
        before = tunnel.relay.bytes_up
        assert (await tunnel.get(target)).body == PAGE
        assert (tunnel.relay.bytes_up - before < len(PAGE) / 2) is smaller
        assert (await saved(tunnel) > len(PAGE) / 2) is smaller


@pytest.mark.parametrize(
    ("type_", "args", "smaller"),
    [
        (b"application/json", [], True),
        (b"image/png", [], False),
        (b"application/json", ["--no-compress"], False),
    ],
)
async def test_an_upload(type_: bytes, args: list[str], smaller: bool) -> None:
    got: list[bytes] = []

    async def take(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        got.append(asked.body)
        writer.write(response())

    async with slow_link(take, *args) as tunnel:
        before = tunnel.relay.bytes_down
        await tunnel.fetch("POST", b"/", [(b"Content-Type", type_)], PAGE)
        assert got == [PAGE]
        assert (tunnel.relay.bytes_down - before < len(PAGE) / 2) is smaller


async def test_what_is_no_text_arrives_as_it_was_whatever_its_type_says() -> None:
    async def noise(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(NOISE, headers=[(b"Content-Type", b"text/plain")]))

    async with slow_link(noise) as tunnel:
        assert (await tunnel.get()).body == NOISE


async def test_events_arrive_at_once_although_they_are_compressed() -> None:
    events = [b"data: %d " % n + TEXT[n * 30_000 :][:30_000].replace(b"\n", b" ") + b"\n\n" for n in range(20)]
    arrived = asyncio.Semaphore(0)

    async def stream(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            writer.write(chunk(event))
            async with asyncio.timeout(TIMEOUT):
                await arrived.acquire()
        writer.write(chunk(b""))

    async with slow_link(stream) as tunnel, tunnel.visitor() as visitor:
        before = tunnel.relay.bytes_up
        await visitor.send(tunnel.request())
        body = visitor.iter_body(await visitor.read_head())
        for event in events:
            got = b""
            while len(got) < len(event):
                got += await anext(body)
            assert got == event
            arrived.release()
        assert [piece async for piece in body] == []
        assert tunnel.relay.bytes_up - before < sum(map(len, events)) / 2


async def test_cuts_in_the_middle_of_what_is_compressed() -> None:
    """The frames that are sent again are the same; and what follows does not depend on them."""
    async with slow_link(page) as tunnel:
        relay = tunnel.relay
        before, fetched = relay.bytes_up, asyncio.ensure_future(tunnel.get(b"/text/html??20"))
        for cut in range(1, 5):
            await relay.wait_for(lambda at=before + cut * 400_000: relay.bytes_up > at)
            accepted = relay.accepted
            await relay.cut("reset")
            await relay.wait_accepted(accepted + 1)
        assert (await fetched).body == PAGE * 20
        assert await saved(tunnel) > 5 * len(PAGE)


async def test_a_pipe_is_not_compressed() -> None:
    async def switch(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Type: text/html\r\n\r\n"
        )
        writer.write(PAGE)
        await writer.drain()
        writer.close()

    async with slow_link(switch) as tunnel, tunnel.visitor() as visitor:
        before = tunnel.relay.bytes_up
        await visitor.send(tunnel.request(headers=[(b"Connection", b"Upgrade"), (b"Upgrade", b"x")]))
        assert (await visitor.read_head()).status == 101
        assert await visitor.read_until_close() == PAGE
        assert tunnel.relay.bytes_up - before > len(PAGE)
