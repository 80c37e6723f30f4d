"""The bytes of WebSocket messages: what we send, what we take from a peer however it is sliced, and what we refuse."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import sliced

import pytunnel
from pytunnel import (
    MAX_CONTROL,
    MAX_FRAMES,
    MAX_MESSAGE,
    ErrorCode,
    MessageDecoder,
    MessagePart,
    Opcode,
    ProtocolError,
    encode_message_frame,
    mask_payload,
    message_frame,
)

KEY = bytes.fromhex("37fa213d")  # of the examples in RFC 6455 section 5.7
TEXT, BINARY, PING = Opcode.TEXT, Opcode.BINARY, Opcode.PING


def content(size: int) -> bytes:
    """So many bytes, in which no two of those near each other are the same."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def xor(payload: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key_byte for byte, key_byte in zip(payload, itertools.cycle(key), strict=False))


def header(opcode: int, size: int, *, final: bool = True, masked: bool = False) -> bytes:
    """A frame's bytes before its key, made without the code under test."""
    length, n = (size, 0) if size < 126 else (126, 2) if size < 1 << 16 else (127, 8)
    return bytes([final << 7 | opcode, masked << 7 | length]) + size.to_bytes(8, "big")[8 - n :]


def frame(opcode: int, payload: bytes, *, final: bool = True, key: bytes = b"") -> bytes:
    masked = xor(payload, key) if key else payload
    return header(opcode, len(payload), final=final, masked=bool(key)) + key + masked


def parts_of(decoder: MessageDecoder, pieces: Iterable[bytes]) -> Iterator[MessagePart]:
    for piece in pieces:
        yield from decoder.feed(piece)
        while decoder.has_more:
            yield from decoder.feed(b"")


def parts_of_views(decoder: MessageDecoder, pieces: Iterable[bytes]) -> Iterator[MessagePart]:
    """The same through one buffer, which has something else in it when a piece has been dealt with."""
    for piece in pieces:
        buffer = bytearray(piece)
        parts = decoder.feed(memoryview(buffer))
        yield from [part._replace(data=bytes(part.data)) for part in parts]
        buffer[:] = b"\xff" * len(buffer)
        while decoder.has_more:
            yield from decoder.feed(b"")


Event = tuple[int, bytes, int]  # opcode, content, and how much of a message had come before a control message


def events(parts: Iterable[MessagePart]) -> list[Event]:
    """What a reader sees who puts messages together."""
    found: list[Event] = []
    opcode, text = None, b""
    for part in parts:
        if part.opcode >= Opcode.CLOSE:
            assert part.end
            found.append((part.opcode, bytes(part.data), len(text)))
            continue
        assert opcode in (None, part.opcode), "each part has the opcode of its message"
        opcode, text = part.opcode, text + part.data
        if part.end:
            found.append((opcode, text, 0))
            opcode, text = None, b""
    assert opcode is None, "a message has no end"
    return found


# Encoding

HEADERS = {0: "82 00", 1: "82 01", 125: "82 7d", 126: "82 7e 007e", 256: "82 7e 0100", 65535: "82 7e ffff"}
HEADERS |= {65536: "82 7f 0000000000010000"}


@pytest.mark.parametrize("size", HEADERS)
def test_each_size_of_length(size: int) -> None:
    expected, payload = bytes.fromhex(HEADERS[size]), content(size)
    assert encode_message_frame(BINARY, payload) == expected + payload
    masked = encode_message_frame(BINARY, payload, KEY)
    assert masked == bytes([expected[0], expected[1] | 0x80]) + expected[2:] + KEY + xor(payload, KEY)
    assert list(parts_of(MessageDecoder(masked=True), [masked])) == [(BINARY, payload, True)]


@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "masked"])
def test_a_message_made_of_pieces_is_the_same(key: bytes) -> None:
    large = content(pytunnel.SEND_BUFFER)
    for payload in ([], [b"a", b"bc"], [b"a", large], [large, b"a", large]):
        whole = encode_message_frame(BINARY, b"".join(payload), key)
        pieces = message_frame(BINARY, payload, key)
        assert b"".join(pieces) == whole
        if key or large not in payload:
            continue
        assert [piece for piece in pieces if piece is large] == [large] * payload.count(large), "without a copy"
    assert len(message_frame(BINARY, [b"a", b"bc"], key)) == 1, "a small one is written in one piece"


# RFC 6455 section 5.7: whether it is masked, the bytes, and what they are.
EXAMPLES = [
    (False, "81 05 48656c6c6f", [(TEXT, b"Hello", True)]),
    (True, "81 85 37fa213d 7f9f4d5158", [(TEXT, b"Hello", True)]),
    (False, "01 03 48656c 80 02 6c6f", [(TEXT, b"Hel", False), (TEXT, b"lo", True)]),
    (False, "89 05 48656c6c6f", [(PING, b"Hello", True)]),
    (True, "8a 85 37fa213d 7f9f4d5158", [(Opcode.PONG, b"Hello", True)]),
    (False, "82 7e 0100" + content(256).hex(), [(BINARY, content(256), True)]),
    (False, "82 7f 0000000000010000" + content(65536).hex(), [(BINARY, content(65536), True)]),
]


@pytest.mark.parametrize(("masked", "wire", "parts"), EXAMPLES, ids=lambda v: str(v)[:30])
def test_the_standards_examples(masked: bool, wire: str, parts: list[tuple[Opcode, bytes, bool]]) -> None:
    data = bytes.fromhex(wire)
    assert MessageDecoder(masked=masked).feed(data) == parts
    if len(parts) == 1:
        opcode, payload, _ = parts[0]
        assert encode_message_frame(opcode, payload, KEY if masked else b"") == data


# Masking


@pytest.fixture
def fresh_masker() -> Iterator[None]:
    """What was found out about aiohttp is found out anew, before and after."""
    pytunnel._masker.cache_clear()
    yield
    pytunnel._masker.cache_clear()


@pytest.mark.usefixtures("fresh_masker")
@pytest.mark.parametrize("without", [False, True], ids=["with aiohttp's", "without"])
@pytest.mark.parametrize("size", [*range(10), 125, *range(MAX_CONTROL - 1, MAX_CONTROL + 6), 65536, 65537])
def test_masking_is_exclusive_or_with_the_key(monkeypatch: pytest.MonkeyPatch, size: int, without: bool) -> None:
    if without:
        monkeypatch.setitem(sys.modules, "aiohttp._websocket.helpers", None)
    payload = content(size)
    masked = mask_payload(KEY, payload)
    assert masked == xor(payload, KEY)
    assert mask_payload(KEY, bytes(masked)) == payload == content(size)


@pytest.mark.usefixtures("fresh_masker")
def test_what_is_long_is_masked_by_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[int] = []
    monkeypatch.setattr("aiohttp._websocket.helpers.websocket_mask", lambda key, data: masked.append(len(data)))
    for size in (MAX_CONTROL, MAX_CONTROL + 1):
        mask_payload(KEY, bytes(size))
    assert masked == [MAX_CONTROL + 1]


@given(st.binary(max_size=3000), st.binary(min_size=4, max_size=4))
def test_masking_twice_is_nothing(payload: bytes, key: bytes) -> None:
    masked = mask_payload(key, payload)
    assert masked == xor(payload, key)
    assert mask_payload(key, bytes(masked)) == payload


# Decoding


@st.composite
def messages(draw: st.DrawFn, largest: int) -> list[tuple[int, bytes, bool]]:
    """Frames: messages in fragments, and control messages between these; opcode, payload, whether it is final."""
    sizes = [size for size in (0, 1, 4, 125, 126, 1023, 1029, 65535, 65536) if size <= largest]
    payloads = st.one_of(st.binary(max_size=20), st.sampled_from(sizes).map(content))
    controls = st.lists(st.tuples(st.sampled_from([PING, Opcode.PONG, Opcode.CLOSE]), st.binary(max_size=125)))
    frames: list[tuple[int, bytes, bool]] = []
    for opcode in draw(st.lists(st.sampled_from([TEXT, BINARY]), max_size=4)):
        fragments = draw(st.lists(payloads, min_size=1, max_size=4))
        for number, payload in enumerate(fragments):
            frames += [(control, data, True) for control, data in draw(controls)[:2]]
            frames.append((Opcode.CONTINUATION if number else opcode, payload, number == len(fragments) - 1))
    return frames


def expected_events(frames: list[tuple[int, bytes, bool]]) -> list[Event]:
    found: list[Event] = []
    opcode, text = 0, b""
    for code, payload, final in frames:
        if code >= Opcode.CLOSE:
            found.append((code, payload, len(text)))
            continue
        opcode, text = code or opcode, text + payload
        if final:
            found.append((opcode, text, 0))
            text = b""
    return found


def check_slicing(frames: list[tuple[int, bytes, bool]], keys: list[bytes], sizes: list[int]) -> None:
    key = itertools.cycle(keys or [b""])
    data = b"".join(frame(opcode, payload, final=final, key=next(key)) for opcode, payload, final in frames)
    for pieces in ([data], sliced(data, sizes)):
        decoder = MessageDecoder(masked=bool(keys))
        assert events(parts_of(decoder, pieces)) == expected_events(frames)
    decoder = MessageDecoder(masked=bool(keys))
    assert events(parts_of_views(decoder, sliced(data, sizes))) == expected_events(frames)


KEYS = st.lists(st.binary(min_size=4, max_size=4), max_size=3)  # none: the frames are not masked


@given(messages(largest=300), KEYS, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_any_slicing_of_any_fragments_gives_the_same_messages(
    frames: list[tuple[int, bytes, bool]], keys: list[bytes], sizes: list[int]
) -> None:
    check_slicing(frames, keys, [1])
    check_slicing(frames, keys, sizes)


@pytest.mark.parametrize("keys", [[], [KEY, b"\0\xff\1\2"]], ids=["plain", "masked"])
def test_any_slicing_of_what_is_long_gives_the_same_messages(keys: list[bytes]) -> None:
    frames = [(BINARY, content(65536), False), (PING, b"1", True), (0, content(1029), False), (0, b"", False)]
    frames += [(0, content(70_001), True), (TEXT, b"", True), (BINARY, content(65535), True)]
    for sizes in ([1021], [1022, 1], [1023, 4096, 3], [1500], [65537, 2], [1 << 18]):
        check_slicing(frames, keys, sizes)


# What is refused: by what of it, as soon as its last byte is here; whether our peer has to mask, and why.


def _violations() -> Iterator[tuple[str, bytes, bool, str]]:
    for masked in (False, True):
        key, who = KEY if masked else b"", "client's" if masked else "server's"
        for bit in (0x40, 0x20, 0x10):
            yield f"{who}-bit-{bit:#x}", bytes([0x80 | bit | BINARY, masked << 7]), masked, "that begins with"
        for opcode in (*range(3, 8), *range(11, 16)):
            yield f"{who}-opcode-{opcode}", header(opcode, 0, masked=masked), masked, "that begins with"
        not_this = header(BINARY, 1, masked=not masked)
        yield f"{who}-mask", not_this, masked, "is not masked" if masked else "is masked"
        for control in (Opcode.CLOSE, PING, Opcode.PONG):
            for size in (126, 65536):
                yield f"{who}-{control.name}-{size}", header(control, size, masked=masked)[:2], masked, "is long"
            not_final = header(control, 1, final=False, masked=masked)
            yield f"{who}-{control.name}-not-final", not_final, masked, "in fragments"
        rest = header(0, 1, masked=masked) + key
        yield f"{who}-rest-of-none", rest, masked, "the rest of none"
        yield f"{who}-rest-after-the-end", frame(TEXT, b"x", key=key) + rest, masked, "the rest of none"
        begun = frame(TEXT, b"x", final=False, key=key)
        yield f"{who}-inside-another", begun + header(BINARY, 1, masked=masked) + key, masked, "inside another"
        empty = frame(TEXT, b"", final=False, key=key)
        yield f"{who}-inside-an-empty-one", empty + header(BINARY, 0, masked=masked) + key, masked, "inside another"
        for size in (MAX_MESSAGE + 1, 1 << 32, 1 << 63, (1 << 64) - 1):
            yield f"{who}-of-{size}", header(BINARY, size, masked=masked) + key, masked, "over 1048576 bytes"
        rest = header(0, MAX_MESSAGE, masked=masked) + key
        yield f"{who}-fragments", begun + rest, masked, "over 1048576 bytes"
        yield f"{who}-fragment-of-2^64-1", begun + header(0, 2**64 - 1, masked=masked) + key, masked, "over 1048576"


@pytest.mark.parametrize(
    ("data", "masked", "reason"), [pytest.param(d, m, r, id=name) for name, d, m, r in _violations()]
)
def test_each_rule_is_kept(data: bytes, masked: bool, reason: str) -> None:
    """By the header alone: nothing of what follows it is waited for."""
    for pieces in ([data[:-1], data[-1:]], [bytes([byte]) for byte in data]):
        decoder = MessageDecoder(masked=masked)
        for piece in pieces[:-1]:
            decoder.feed(piece)
        with pytest.raises(ProtocolError, match=reason) as caught:
            decoder.feed(pieces[-1])
        assert caught.value.code is (ErrorCode.FRAME_SIZE if "over" in reason else ErrorCode.PROTOCOL)
    with pytest.raises(ProtocolError, match=reason):
        MessageDecoder(masked=masked).feed(data + bytes(200))


def test_a_close_may_be_that_of_a_front() -> None:
    """Caddy 2.6, as it stops, writes one without a mask to both ends: the connection is over, and nobody to blame."""
    data = frame(BINARY, b"x", key=KEY) + frame(Opcode.CLOSE, b"\x03\xe9")
    expected = [(BINARY, b"x", 0), (Opcode.CLOSE, b"\x03\xe9", 0)]
    for pieces in ([data], sliced(data, [1])):
        assert events(parts_of(MessageDecoder(masked=True), pieces)) == expected
    with pytest.raises(ProtocolError, match="is masked"):
        MessageDecoder(masked=False).feed(frame(Opcode.CLOSE, b"\x03\xe9", key=KEY))


def test_the_longest_messages_one_after_the_other() -> None:
    """The limit is each message's own, and a message of several frames may have as much."""
    whole, half = content(MAX_MESSAGE), content(MAX_MESSAGE // 2)
    data = frame(BINARY, whole) * 2 + frame(BINARY, half, final=False) + frame(PING, bytes(125))
    data += frame(0, half) + frame(BINARY, whole)
    expected = [(BINARY, whole, 0)] * 2 + [(PING, bytes(125), len(half)), (BINARY, half * 2, 0), (BINARY, whole, 0)]
    assert events(parts_of(MessageDecoder(masked=False), sliced(data, [100_000]))) == expected


# Bounds


def test_many_messages_of_one_read_come_in_turns() -> None:
    decoder, ping = MessageDecoder(masked=True), frame(PING, b"x", key=KEY)
    sizes = [len(decoder.feed(ping * (2 * MAX_FRAMES + 1)))]
    while decoder.has_more:
        sizes.append(len(decoder.feed(b"")))
    assert sizes == [MAX_FRAMES, MAX_FRAMES, 1]
    assert len(decoder.feed(ping * MAX_FRAMES)) == MAX_FRAMES
    assert not decoder.has_more


def test_what_comes_while_there_is_more_comes_after_it() -> None:
    decoder, numbers = MessageDecoder(masked=False), range(MAX_FRAMES + 2)
    data = b"".join(frame(BINARY, b"%d" % number) for number in numbers)
    got = decoder.feed(data[:-2])
    assert decoder.has_more
    got += decoder.feed(data[-2:-1])
    assert not decoder.has_more
    got += decoder.feed(data[-1:])
    assert events(got) == [(BINARY, b"%d" % number, 0) for number in numbers]


def test_after_the_last_of_a_turn_there_may_be_less_than_a_header() -> None:
    decoder = MessageDecoder(masked=False)
    assert len(decoder.feed(frame(PING, b"") * MAX_FRAMES + b"\x82")) == MAX_FRAMES
    assert decoder.feed(b"") == []
    assert not decoder.has_more
    assert decoder.feed(b"\x01x") == [(BINARY, b"x", True)]


@pytest.mark.parametrize("key", [b"", KEY], ids=["plain", "masked"])
def test_nothing_is_kept_of_a_message_that_has_partly_come(key: bytes) -> None:
    payload = content(MAX_MESSAGE)
    data, decoder, got = frame(BINARY, payload, key=key), MessageDecoder(masked=bool(key)), b""
    begin = len(data) - len(payload)
    assert not b"".join(part.data for part in decoder.feed(data[:begin]))
    for piece in sliced(data[begin:], [50_001]):
        parts = decoder.feed(piece)
        assert sum(len(part.data) for part in parts) == len(piece)
        assert len(pickle.dumps(decoder)) < 500, "that is, all of its state"
        got += b"".join(part.data for part in parts)
    assert got == payload and parts[-1].end


def test_a_control_message_comes_whole() -> None:
    data = frame(PING, content(125), key=KEY)
    decoder = MessageDecoder(masked=True)
    assert not any(decoder.feed(bytes([byte])) for byte in data[:-1])
    assert decoder.feed(data[-1:]) == [(PING, content(125), True)]


@given(st.booleans(), st.lists(st.binary(max_size=40), max_size=8))
def test_random_bytes_raise_only_protocol_error(masked: bool, pieces: list[bytes]) -> None:
    decoder = MessageDecoder(masked=masked)
    try:
        for part in parts_of(decoder, pieces):
            assert part.opcode in set(Opcode) - {Opcode.CONTINUATION}
    except ProtocolError as error:
        assert error.code in (ErrorCode.PROTOCOL, ErrorCode.FRAME_SIZE)


def test_the_numbers_of_the_standard() -> None:
    names = {"CONTINUATION": 0, "TEXT": 1, "BINARY": 2, "CLOSE": 8, "PING": 9, "PONG": 10}
    assert {opcode.name: int(opcode) for opcode in Opcode} == names
    assert {code.name: int(code) for code in pytunnel.CloseCode} == {"OK": 1000, "PROTOCOL_ERROR": 1002}
