"""Frames and flow control: the bytes on the wire, every rule of theirs, and the arithmetic of credit."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import sliced

import pytunnel
from pytunnel import (
    ASK,
    BLOCKED,
    END,
    INTERIM,
    MAX_WINDOW,
    ZSTD,
    ErrorCode,
    Frame,
    FrameDecoder,
    FrameType,
    ProtocolError,
    ReceiveWindow,
    SendWindow,
    decode_reason,
    encode_frame,
    encode_reason,
)

HEADER = 9
MAX_ID = 2**31 - 1

# The wire format, spelled out: (frame, its bytes in hex: length, type, flags, stream id, payload).
WIRE = [
    (Frame(FrameType.DATA, 0, 1, b"hi"), "000002 00 00 00000001 6869"),
    (Frame(FrameType.DATA, END, 2, b""), "000000 00 01 00000002"),
    (Frame(FrameType.DATA, BLOCKED, 3, b"all"), "000003 00 04 00000003 616c6c"),
    (Frame(FrameType.DATA, ASK, 3, b"all"), "000003 00 10 00000003 616c6c"),
    (Frame(FrameType.DATA, 0, 3, bytes(256)), "000100 00 00 00000003" + "00" * 256),
    (Frame(FrameType.DATA, ZSTD | END, 3, bytes(9)), "000009 00 09 00000003" + "00" * 9),
    (Frame(FrameType.HEAD, 0, 3, b"200\0OK"), "000006 01 00 00000003 323030 00 4f4b"),
    (Frame(FrameType.HEAD, END, 3, b"204"), "000003 01 01 00000003 323034"),
    (Frame(FrameType.HEAD, INTERIM, 3, b"103"), "000003 01 02 00000003 313033"),
    (Frame(FrameType.OPEN, 0, 4, b"\0\2\1\0\0\0\x09GET\0/"), "00000c 02 00 00000004 0002 01 00000009 474554 00 2f"),
    (Frame(FrameType.OPEN, END, MAX_ID, bytes(7)), "000007 02 01 7fffffff 0000 00 00000000"),
    (Frame(FrameType.RESET, 0, 5, b"\x00\x08bye"), "000005 03 00 00000005 0008 627965"),
    (Frame(FrameType.PING, 0, 0, b"12345678"), "000008 06 00 00000000 3132333435363738"),
    (Frame(FrameType.GOAWAY, 0, 0, b"\x00\x21"), "000002 07 00 00000000 0021"),
    (Frame(FrameType.WINDOW, 0, 6, b"\x00\x02\x00\x00"), "000004 08 00 00000006 00020000"),
    (Frame(FrameType.ACK, 0, 0, b"\0\0\0\0\0\0\1\0"), "000008 09 00 00000000 0000000000000100"),
    (Frame(FrameType.PONG, 0, 0, b"12345678"), "000008 0a 00 00000000 3132333435363738"),
]

# What the header of each type may say: payload from, to, flags, whether it is about a stream.
RULES: dict[FrameType, tuple[int, int, int, bool]] = {
    FrameType.DATA: (0, 262_144, 0x1D, True),
    FrameType.HEAD: (1, 65_536, 0x13, True),
    FrameType.OPEN: (7, 65_536, 0x11, True),
    FrameType.RESET: (2, 1024, 0, True),
    FrameType.PING: (8, 8, 0, False),
    FrameType.GOAWAY: (2, 1024, 0, False),
    FrameType.WINDOW: (4, 4, 0, True),
    FrameType.ACK: (8, 8, 0, False),
    FrameType.PONG: (8, 8, 0, False),
}


def raw_header(length: int, type_: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes, made without the code under test."""
    return length.to_bytes(3, "big") + bytes([type_, flags]) + stream_id.to_bytes(4, "big")


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    type_ = draw(st.sampled_from(FrameType))
    low, high, allowed, on_stream = RULES[type_]
    flags = draw(st.sampled_from([bits for bits in range(32) if not bits & ~allowed]))
    stream_id = draw(st.integers(1, MAX_ID)) if on_stream else 0
    return Frame(type_, flags, stream_id, draw(st.binary(min_size=low, max_size=min(high, 300))))


# Encoding


def test_every_type_is_in_the_tables() -> None:
    assert {frame.type for frame, _ in WIRE} == set(RULES) == set(FrameType) == set(pytunnel.FRAME_RULES)


@pytest.mark.parametrize(("frame", "wire"), WIRE, ids=lambda v: str(v)[:40])
def test_wire_bytes(frame: Frame, wire: str) -> None:
    data = bytes.fromhex(wire)
    assert encode_frame(*frame) == data
    assert encode_frame(*frame[:3], memoryview(frame.payload)) == data
    assert FrameDecoder().feed(data) == [frame]


def test_rules_are_the_documented_ones() -> None:
    assert {type_: tuple(rule) for type_, rule in pytunnel.FRAME_RULES.items()} == RULES


def test_constants_of_the_wire_format() -> None:
    """A change of one of these is a new version of the protocol."""
    assert pytunnel.FRAME_HEADER.size == HEADER
    assert (END, INTERIM, BLOCKED, ZSTD, ASK, pytunnel.FIRST_EXTENSION) == (1, 2, 4, 8, 16, 128)
    assert pytunnel.MAX_STREAM_ID == MAX_WINDOW == MAX_ID
    assert (pytunnel.MAX_DATA, pytunnel.MAX_HEAD, pytunnel.MAX_CONTROL) == (262_144, 65_536, 1024)
    assert pytunnel.INITIAL_WINDOW == 262_144  # not announced: both sides have to agree
    assert (pytunnel.SUBPROTOCOL, pytunnel.LINK_PATH) == ("pytunnel.1", "/_pytunnel/link")
    assert pytunnel.PROTOCOL_VERSION == 1
    assert {FrameType.PING, FrameType.PONG, FrameType.ACK} == pytunnel.LINK_LEVEL
    assert {type_.name: int(type_) for type_ in FrameType} == {
        "DATA": 0, "HEAD": 1, "OPEN": 2, "RESET": 3, "PING": 6, "GOAWAY": 7, "WINDOW": 8, "ACK": 9, "PONG": 10,
    }  # fmt: skip
    assert {code.name: int(code) for code in ErrorCode} == {
        "NO_ERROR": 0, "PROTOCOL": 1, "INTERNAL": 2, "FLOW_CONTROL": 3, "STREAM_CLOSED": 5, "FRAME_SIZE": 6,
        "REFUSED": 7, "CANCEL": 8, "LOCAL_REFUSED": 16, "LOCAL_RESET": 17, "LOCAL_TIMEOUT": 18,
        "LOCAL_INVALID": 19, "LINK_LOST": 20, "REPLACED": 32, "SHUTDOWN": 33,
    }  # fmt: skip
    assert {kind.name: int(kind) for kind in pytunnel.Kind} == {"HTTP": 0, "UPGRADE": 1, "TCP": 2}


def test_limits_fit_together() -> None:
    """What one limit promises, another one must not break."""
    assert pytunnel.MIN_TURN < pytunnel.FIRST_CAP // 4 < pytunnel.MAX_TURN <= pytunnel.MAX_DATA
    assert 2 * pytunnel.MIN_TURN <= pytunnel.MIN_CAP  # one turn may be on its way while the other is acknowledged
    assert pytunnel.MAX_TURN <= pytunnel.MAX_BATCH
    assert 2 * pytunnel.TURN_TIME <= pytunnel.QUEUE_TIME < pytunnel.ACK_DELAY
    assert pytunnel.FIRST_CAP < pytunnel.MAX_UNACKED
    assert 2 * (pytunnel.FIRST_CAP // 4) / 3000 < pytunnel.PING_INTERVAL + pytunnel.PING_TIMEOUT  # at 3 KB/s
    largest = max(pytunnel.MAX_DATA, pytunnel.MAX_HEAD) + HEADER
    beside = (pytunnel.MAX_PENDING_PONGS + 2) * (HEADER + 8) + pytunnel.MAX_CONTROL + HEADER
    assert pytunnel.MAX_BATCH + largest + beside <= pytunnel.MAX_MESSAGE
    assert pytunnel.ACK_BYTES * 2 <= pytunnel.MAX_UNACKED
    assert pytunnel.PING_INTERVAL + pytunnel.PING_TIMEOUT < 60 < pytunnel.GRACE  # 60: nginx
    assert pytunnel.INITIAL_WINDOW >= pytunnel.SEND_BUFFER
    assert pytunnel.INITIAL_WINDOW < pytunnel.MAX_STREAM_WINDOW <= pytunnel.MAX_WIDENED
    assert pytunnel.MAX_STREAM_WINDOW >= 2 * pytunnel.MAX_UNACKED  # it is not what limits a stream


def test_str_is_one_line() -> None:
    assert str(Frame(FrameType.DATA, END, 7, b"abc")) == "DATA stream=7 flags=0x1 3 bytes"
    assert str(Frame(200, 0, 7, b"")) == "type 200 stream=7 flags=0x0 0 bytes"


@given(st.sampled_from(ErrorCode), st.text(max_size=2000))
def test_reason_round_trip(code: ErrorCode, reason: str) -> None:
    payload = encode_reason(code, reason)
    assert 2 <= len(payload) <= pytunnel.MAX_CONTROL
    got_code, got_reason = decode_reason(payload)
    assert got_code is code
    if len(reason) < 250:
        assert got_reason == reason
    else:
        assert reason.startswith(got_reason.rstrip("\ufffd"))


def test_a_lone_surrogate_in_a_reason_is_replaced() -> None:
    assert decode_reason(encode_reason(ErrorCode.CANCEL, "a\udc80b")) == (ErrorCode.CANCEL, "a?b")


@given(st.binary(min_size=2, max_size=1024))
def test_any_reason_is_read(payload: bytes) -> None:
    code, reason = decode_reason(payload)
    known = int.from_bytes(payload[:2], "big") in [int(c) for c in ErrorCode]
    assert code == (int.from_bytes(payload[:2], "big") if known else ErrorCode.INTERNAL)
    reason.encode()


# Decoding


@given(
    st.lists(frames(), max_size=12),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.binary(max_size=8),
)
def test_any_slicing_gives_the_same_frames(wanted: list[Frame], sizes: list[int], rest: bytes) -> None:
    data = b"".join(encode_frame(*frame) for frame in wanted)
    whole = FrameDecoder()
    assert whole.feed(data) == wanted
    assert whole.buffered == 0

    for pieces in (sliced(data, [1]), sliced(data, sizes)):
        decoder = FrameDecoder()
        assert [frame for piece in pieces for frame in decoder.feed(piece)] == wanted
        assert decoder.buffered == 0

    trailing = FrameDecoder()
    assert trailing.feed(data + rest) == wanted
    assert trailing.buffered == len(rest)


@given(st.lists(frames(), max_size=12), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_nothing_is_kept_of_a_view(wanted: list[Frame], sizes: list[int]) -> None:
    """Its memory is used again as soon as the decoder has had it."""
    decoder, got = FrameDecoder(), []
    for piece in sliced(b"".join(encode_frame(*frame) for frame in wanted), sizes):
        buffer = bytearray(piece)
        got += decoder.feed(memoryview(buffer))
        buffer[:] = b"\xff" * len(buffer)
    assert got == wanted


@pytest.mark.parametrize(("frame", "wire"), WIRE, ids=lambda v: str(v)[:40])
def test_a_frame_comes_with_its_last_byte(frame: Frame, wire: str) -> None:
    data = bytes.fromhex(wire)
    for cut in range(len(data)):
        decoder = FrameDecoder()
        assert decoder.feed(data[:cut]) == []
        assert decoder.buffered == cut
        assert decoder.feed(b"") == []
        assert decoder.feed(data[cut:] + data) == [frame, frame]


def test_the_longest_of_each_type() -> None:
    for type_, (low, high, _, on_stream) in RULES.items():
        for size in (low, high):
            frame = Frame(type_, 0, int(on_stream), bytes(size))
            decoder = FrameDecoder()
            assert [f for p in sliced(encode_frame(*frame), [70_000]) for f in decoder.feed(p)] == [frame]


def test_the_slices_of_a_long_frame_are_joined_once() -> None:
    """When the last one is here; until then they are kept as they came, and nothing is copied."""
    frame = Frame(FrameType.DATA, 0, 1, bytes(pytunnel.MAX_DATA))
    slices, decoder = list(sliced(encode_frame(*frame), [1000])), FrameDecoder()
    tracemalloc.start()
    try:
        for piece in slices[:-1]:
            assert decoder.feed(piece) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000
    assert decoder.feed(slices[-1]) == [frame]


def test_payloads_are_the_callers_to_keep() -> None:
    """No view of a buffer that is used again."""
    decoder = FrameDecoder()
    data = encode_frame(FrameType.DATA, 0, 1, b"first") + encode_frame(FrameType.DATA, 0, 1, b"other")
    got = [frame for piece in sliced(data, [3]) for frame in decoder.feed(piece)]
    assert [frame.payload for frame in got] == [b"first", b"other"]
    assert all(type(frame.payload) is bytes for frame in got)


def _violations() -> Iterator[tuple[str, bytes, ErrorCode]]:
    for type_, (low, high, flags, on_stream) in RULES.items():
        stream_id = int(on_stream)
        if low:
            yield f"{type_.name}-too-short", raw_header(low - 1, type_, 0, stream_id), ErrorCode.FRAME_SIZE
        yield f"{type_.name}-too-long", raw_header(high + 1, type_, 0, stream_id), ErrorCode.FRAME_SIZE
        yield f"{type_.name}-longest", raw_header(2**24 - 1, type_, 0, stream_id), ErrorCode.FRAME_SIZE
        for bit in range(8):
            if not 1 << bit & flags:
                yield (
                    f"{type_.name}-flag-{bit}",
                    raw_header(low, type_, 1 << bit, stream_id),
                    ErrorCode.PROTOCOL,
                )
        for wrong in (0, MAX_ID + 1, 2**32 - 1) if on_stream else (1, MAX_ID, MAX_ID + 1):
            yield f"{type_.name}-on-{wrong}", raw_header(low, type_, 0, wrong), ErrorCode.PROTOCOL
    for unknown in sorted(set(range(128)) - {int(type_) for type_ in FrameType}):
        yield f"type-{unknown}", raw_header(0, unknown, 0, 1), ErrorCode.PROTOCOL


@pytest.mark.parametrize(("data", "code"), [pytest.param(d, c, id=name) for name, d, c in _violations()])
def test_each_rule_is_kept(data: bytes, code: ErrorCode) -> None:
    """By the header alone: what follows it would not even be buffered."""
    with pytest.raises(ProtocolError) as caught:
        FrameDecoder().feed(data)
    assert caught.value.code is code
    decoder = FrameDecoder()
    assert decoder.feed(data[:-1]) == []
    with pytest.raises(ProtocolError):
        decoder.feed(data[-1:])
    with pytest.raises(ProtocolError):
        FrameDecoder().feed(encode_frame(FrameType.PING, 0, 0, bytes(8)) + data)


@given(
    st.integers(128, 255),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=1024),
    st.integers(1, 50),
)
def test_extensions_are_ignored(type_: int, flags: int, stream_id: int, payload: bytes, size: int) -> None:
    ping = encode_frame(FrameType.PING, 0, 0, b"abcdefgh")
    data = ping + raw_header(len(payload), type_, flags, stream_id) + payload + ping
    decoder = FrameDecoder()
    got = [frame for piece in sliced(data, [size]) for frame in decoder.feed(piece)]
    assert [frame.type for frame in got] == [FrameType.PING, FrameType.PING]
    assert decoder.buffered == 0


def test_a_long_extension_is_refused() -> None:
    with pytest.raises(ProtocolError):
        FrameDecoder().feed(raw_header(1025, 128, 0, 0))


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_random_bytes_raise_only_protocol_error(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                low, high, flags, on_stream = RULES[FrameType(frame.type)]
                assert low <= len(frame.payload) <= high and not frame.flags & ~flags
                assert bool(frame.stream_id) == on_stream
            assert decoder.buffered < HEADER + pytunnel.MAX_DATA
    except ProtocolError as error:
        assert error.code in (ErrorCode.PROTOCOL, ErrorCode.FRAME_SIZE)


@given(
    st.lists(st.one_of(frames(), st.integers(128, 255)), min_size=1, max_size=10),
    st.lists(st.integers(1, 500), min_size=1, max_size=5),
)
def test_at_most_one_frame_is_buffered(items: list[Frame | int], sizes: list[int]) -> None:
    """At each moment the decoder holds what has arrived of the one frame that is not complete, and no more."""
    whole = [encode_frame(*i) if isinstance(i, Frame) else raw_header(5, i, 255, 2**32 - 1) + b"later" for i in items]
    ends = list(itertools.accumulate(len(data) for data in whole))
    decoder, fed = FrameDecoder(), 0
    for piece in sliced(b"".join(whole), sizes):
        decoder.feed(piece)
        fed += len(piece)
        assert decoder.buffered == fed - max((end for end in ends if end <= fed), default=0)


# Flow control


def test_send_window() -> None:
    window = SendWindow(10)
    window.take(0)
    window.take(10)
    assert window.credit == 0
    window.add(3)
    assert window.credit == 3


@pytest.mark.parametrize(
    ("credit", "n"),
    [(0, 0), (5, 0), (5, -1), (1, MAX_WINDOW), (MAX_WINDOW, 1), (0, MAX_WINDOW + 1), (0, 2**32 - 1)],
)
def test_window_of_nothing_or_too_much_is_refused(credit: int, n: int) -> None:
    window = SendWindow(credit)
    with pytest.raises(ProtocolError) as caught:
        window.add(n)
    assert caught.value.code is ErrorCode.FLOW_CONTROL
    assert window.credit == credit


@pytest.mark.parametrize("credit", [0, 1, MAX_WINDOW - 1])
def test_window_may_reach_its_maximum(credit: int) -> None:
    window = SendWindow(credit)
    window.add(MAX_WINDOW - credit)
    assert window.credit == MAX_WINDOW


def test_rule_1_deduct_on_receipt() -> None:
    window = ReceiveWindow(100)
    window.receive(30, 0.0)
    assert (window.credit, window.unread) == (70, 30)


def test_rule_2_credit_for_what_was_consumed_in_steps_of_half_a_window() -> None:
    window = ReceiveWindow(100)
    window.receive(100, 0.0)
    assert window.consume(49, 0.0) == 0
    assert (window.credit, window.unread) == (0, 51)
    assert window.consume(1, 0.0) == 50
    assert (window.credit, window.unread) == (50, 50)
    assert window.consume(50, 0.0) == 50
    assert (window.credit, window.unread) == (100, 0)


@pytest.mark.parametrize(("received", "excess"), [(0, 101), (100, 1), (60, 41)])
def test_rule_3_refuse_a_byte_more(received: int, excess: int) -> None:
    window = ReceiveWindow(100)
    window.receive(received, 0.0)
    with pytest.raises(ProtocolError) as caught:
        window.receive(excess, 0.0)
    assert caught.value.code is ErrorCode.FLOW_CONTROL
    assert window.credit == 100 - received
    window.receive(excess - 1, 0.0)  # what was granted is still taken


def starving(size: int = 100, seconds: float = pytunnel.MIN_STARVED) -> ReceiveWindow:
    """A window whose reader has had nothing to read for that long, while the sender had no credit."""
    window = ReceiveWindow(size)
    window.receive(size, 0.0, is_blocked=True)
    window.consume(size, 0.0)
    assert window.receive(1, seconds) is (seconds >= pytunnel.MIN_STARVED)
    return window


def test_rule_4_a_window_is_too_small_when_reader_and_sender_wait_for_each_other() -> None:
    window = starving()
    window.widen(100)
    assert (window.size, window.credit, window.unread, window.widened) == (200, 199, 1, 100)
    assert not window.receive(1, 20.0), "the reader has not read what came before"


def test_rule_4_no_window_is_too_small_where_the_wait_is_none() -> None:
    starving(seconds=pytunnel.MIN_STARVED / 2)


@pytest.mark.parametrize(("is_blocked", "read"), [(False, 100), (True, 99), (True, 0)])
def test_rule_4_nothing_for_a_sender_with_credit_or_a_reader_who_lags(is_blocked: bool, read: int) -> None:
    window = ReceiveWindow(200)
    window.receive(100, 0.0, is_blocked=is_blocked)
    window.consume(read, 0.0)
    assert not window.receive(1, 60.0)


def test_rules_5_and_6_a_window_shrinks_while_its_reader_lags() -> None:
    window = starving()
    window.widen(300)
    window.consume(1, 11.0)
    window.receive(399, 11.0)
    assert window.consume(100, 11.0) == 0
    assert (window.size, window.unread) == (299, 299)
    for _ in range(3):
        window.consume(50, 11.0)
    assert (window.size, window.credit, window.unread) == (149, 0, 149)
    assert window.consume(50, 11.0) == 0
    assert (window.size, window.widened, window.unread) == (100, 0, 99)
    assert window.consume(99, 11.0) == 100


def test_rule_5_a_window_shrinks_when_memory_is_short() -> None:
    window = starving()
    window.widen(100)
    assert window.consume(1, 11.0, shrink=True) == 0
    assert window.size == 199
    window.receive(198, 11.0)
    assert window.consume(198, 11.0, shrink=True) == 99
    assert (window.size, window.credit) == (100, 100)


@given(st.integers(1, 5000), st.data())
def test_credit_is_conserved(size: int, data: st.DataObject) -> None:
    """Both ends of one direction: whatever happens, credit is neither lost nor made."""
    sender, receiver = SendWindow(size), ReceiveWindow(size)
    wire, grants, consumed, sent, largest = 0, 0, 0, 0, size
    for _ in range(data.draw(st.integers(0, 30))):
        action = data.draw(st.sampled_from(["send", "arrive", "read", "grant", "widen"]))
        if action == "send":
            n = data.draw(st.integers(0, sender.credit))
            sender.take(n)
            wire, sent = wire + n, sent + n
        elif action == "arrive":
            n = data.draw(st.integers(0, wire))
            receiver.receive(n, 0.0)
            wire -= n
        elif action == "read":
            n = data.draw(st.integers(0, receiver.unread))
            step = receiver.consume(n, 0.0, shrink=data.draw(st.booleans()))
            assert step == 0 or step >= size // 2
            grants, consumed = grants + step, consumed + n
        elif action == "widen":
            more = data.draw(st.integers(1, 5000))
            receiver.widen(more)
            grants, largest = grants + more, largest + more
        elif grants:
            sender.add(grants)
            grants = 0
        assert 0 <= sender.credit <= largest and 0 <= receiver.credit <= receiver.size
        assert 0 <= receiver.unread <= receiver.size
        assert size <= receiver.size <= largest
        assert receiver.credit == sender.credit + wire + grants  # what was granted and has not arrived yet
        assert sent <= largest + consumed  # nothing is sent that no reader has made room for
    # When all that was sent is read, a sender without credit is never left without a grant on its way.
    receiver.receive(wire, 0.0)
    grants += receiver.consume(receiver.unread, 0.0)
    assert sender.credit + grants > 0
