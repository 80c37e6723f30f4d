"""Compressed chunks: what a zstd frame of a peer may be, what it costs to find out, and which types are worth it."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import pytunnel
from pytunnel import MAX_DATA, ProtocolError, compress, content_length, decompress

HEAD = b"\x28\xb5\x2f\xfd"  # a zstd frame's first bytes (RFC 8878 section 3.1.1)
SINGLE = 0xA0  # its descriptor: one segment, 4 bytes of content length


def rle_frame(length: int, *blocks: int) -> bytes:
    """A frame that claims `length` bytes and has blocks of that many zeros each: 4 bytes for up to 128 KiB."""
    words = [(size << 3 | 1 << 1 | (i == len(blocks) - 1)).to_bytes(3, "little") for i, size in enumerate(blocks)]
    return HEAD + bytes([SINGLE]) + struct.pack("<I", length) + b"".join(word + b"\0" for word in words)


# Round trips


@given(st.binary(min_size=1, max_size=3000) | st.text(min_size=1, max_size=3000).map(str.encode))
def test_any_content_comes_back(content: bytes) -> None:
    payload = compress(content)
    assert compress(memoryview(content)) == payload
    assert content_length(payload) == len(content)
    assert decompress(payload) == content


@pytest.mark.parametrize("content", [b"\0", bytes(MAX_DATA), random.Random(1).randbytes(MAX_DATA)], ids=len)
def test_any_length_up_to_the_limit_comes_back(content: bytes) -> None:
    assert decompress(compress(content)) == content


@given(st.binary(min_size=1, max_size=500), st.binary(min_size=1, max_size=500))
def test_a_chunk_has_the_same_size_whatever_was_compressed_before(secret: bytes, content: bytes) -> None:
    before = compress(content)
    compress(secret + content)
    assert compress(content) == before


def test_text_gets_smaller() -> None:
    page = Path(pytunnel.__file__).read_bytes()[:65_536]
    assert len(compress(page)) < len(page) / 2.5


# What a peer may send


def test_the_frames_made_here_are_what_they_seem() -> None:
    assert decompress(rle_frame(200_000, 131_072, 68_928)) == bytes(200_000)


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
        struct.pack("<II", 0x184D2A50, 5) + b"1 2 3",  # skippable: RFC 8878 section 3.1.2
        struct.pack("<II", 0x184D2A50, 5) + b"1 2 3" + compress(b"1 2 3"),
        rle_frame(5, 4),
        rle_frame(5, 6),
        rle_frame(2**32 - 1, 131_072),
        rle_frame(MAX_DATA, *[131_072] * 3),
        HEAD + b"\x80\x68" + struct.pack("<I", 3) + b"\x19\0\0abc",  # 3 bytes, and a window of 8 MiB
        HEAD + b"\xa3" + struct.pack("<II", 77, 3) + b"\x19\0\0abc",  # with dictionary 77
    ],
    ids=lambda payload: payload[:12].hex(),
)
def test_anything_but_one_whole_frame_of_a_known_length_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decompress(payload)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_or_short(data: bytes, with_head: bool) -> None:
    try:
        assert len(decompress(HEAD * with_head + data)) <= MAX_DATA
    except ProtocolError:
        pass


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_a_frame_with_wrong_bytes_is_refused_or_as_long_as_it_says(content: bytes, data: st.DataObject) -> None:
    payload = bytearray(compress(content))
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    try:
        assert len(decompress(bytes(payload))) == content_length(bytes(payload))
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
        try:
            pytunnel.decompress(payload)
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
