"""HTTP/1.1 messages: heads in frames and on the wire, the response parser, the response encoder, header rules."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import EMPTY_PAYLOAD, HttpVersion11
from hypothesis import assume, given
from hypothesis import strategies as st
from support import sliced

import pytunnel
from pytunnel import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_INTERIM,
    MAX_REMEMBERED,
    MAX_REMEMBERED_HEAD,
    Exchange,
    Fields,
    Headers,
    MessageError,
    ProtocolError,
    RequestHead,
    ResponseEncoder,
    ResponseHead,
    ResponseParser,
    end_to_end,
    fields_of,
    forwarded,
    own_cookies,
    parse_host,
    split_target,
    tunnel_name,
)

DATE = b"Thu, 01 Jan 1970 00:00:00 GMT"
TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TEXT_BYTES = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))


def from_alphabet(alphabet: bytes, min_size: int, max_size: int) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(alphabet), min_size=min_size, max_size=max_size).map(bytes)


names = from_alphabet(TOKEN_BYTES, 1, 12)
values = from_alphabet(TEXT_BYTES, 0, 20)
fields = st.lists(st.tuples(names, values), max_size=8)
targets = from_alphabet(bytes(set(range(0x21, 0x100)) - {0x23, 0x7F}), 1, 30)


# Heads in frames


@given(names, targets, fields)
def test_request_heads_survive_a_frame(method: bytes, target: bytes, headers: Headers) -> None:
    head = RequestHead(method, target, headers)
    assert RequestHead.decode(head.encode()) == head


@given(st.integers(100, 599), values, fields)
def test_response_heads_survive_a_frame(status: int, reason: bytes, headers: Headers) -> None:
    head = ResponseHead(status, reason, headers)
    assert ResponseHead.decode(head.encode()) == head


def test_order_case_and_duplicates_are_kept() -> None:
    headers = [
        (b"X-A", b"1"),
        (b"x-a", b"2"),
        (b"Cookie", b"a"),
        (b"B", b""),
        (b"Cookie", b"b"),
        (b"L", b"\xe9\xff\t"),
    ]
    assert RequestHead.decode(RequestHead(b"GET", b"/", headers).encode()).headers == headers
    assert ResponseHead.decode(ResponseHead(200, b"", headers).encode()).headers == headers


def test_payloads_are_the_documented_ones() -> None:
    assert RequestHead(b"GET", b"/a?b", [(b"A", b"1"), (b"a", b"")]).encode() == b"GET\0/a?b\0A\x001\0a\0"
    assert ResponseHead(204, b"", []).encode() == b"204\0"


BAD_FIELDS = {
    "empty name": b"\0value",
    "empty name after another": b"A\0b\0\0value",
    "no value": b"A",
    "space in name": b"A b\0c",
    "colon in name": b"A:\0c",
    "latin-1 in name": b"\xe9\0c",
    "CR in name": b"A\r\0c",
    "LF in value": b"A\0b\nc",
    "CR in value": b"A\0b\rc",
    "CRLF in value": b"A\0b\r\nTransfer-Encoding: chunked",
    "escape in value": b"A\0\x1b[2J",
    "DEL in value": b"A\0\x7f",
    "too many": b"\0".join([b"A\0b"] * (MAX_FIELDS + 1)),
}
BAD_REQUESTS = {
    "nothing": b"",
    "no target": b"GET",
    "empty target": b"GET\0",
    "empty method": b"\0/",
    "space in method": b"G T\0/",
    "CRLF in method": b"GET\r\n\0/",
    "space in target": b"GET\0/ HTTP/1.1",
    "CRLF in target": b"GET\0/\r\nX: y",
    "fragment": b"GET\0/#a",
    "control in target": b"GET\0/\x01",
    **{name: b"GET\0/\0" + bad for name, bad in BAD_FIELDS.items()},
}
BAD_RESPONSES = {
    "nothing": b"",
    "status 99": b"99\0",
    "status 099": b"099\0",
    "status 600": b"600\0",
    "status 2000": b"2000\0",
    "status 20": b"20\0",
    "status +20": b"+20\0",
    "Arabic digits": "\u0662\u0660\u0660".encode() + b"\0",
    "CRLF in reason": b"200\0OK\r\nA: b",
    "escape in reason": b"200\0\x1b[2J",
    **{name: b"200\0OK\0" + bad for name, bad in BAD_FIELDS.items()},
}


@pytest.mark.parametrize("payload", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_heads(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        RequestHead.decode(payload)


@pytest.mark.parametrize("payload", BAD_RESPONSES.values(), ids=BAD_RESPONSES)
def test_bad_response_heads(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseHead.decode(payload)


@given(st.one_of(st.binary(max_size=60), st.lists(st.one_of(names, values), max_size=7).map(b"\0".join)))
def test_any_payload_is_a_head_or_a_protocol_error(payload: bytes) -> None:
    try:
        request = RequestHead.decode(payload)
    except ProtocolError:
        pass
    else:
        assert request.encode() == payload
        wire = request.to_wire(chunked=False, upgrade=False)
        assert wire.count(b"\r\n") == wire.count(b"\n") == wire.count(b"\r") == len(request.headers) + 2
    for prefix in (b"", b"200\0"):
        try:
            response = ResponseHead.decode(prefix + payload)
        except ProtocolError:
            continue
        assert response.headers == ResponseHead.decode(response.encode()).headers
        assert all(name and name.strip(TOKEN_BYTES) == b"" for name, _ in response.headers)


def test_a_nul_cannot_be_encoded() -> None:
    for head in (RequestHead(b"GET", b"/", [(b"a", b"b\0c")]), ResponseHead(200, b"a\0", [])):
        with pytest.raises(MessageError):
            head.encode()


def test_heads_up_to_the_limit() -> None:
    fits = b"x" * (MAX_HEAD - pytunnel.OPEN_HEADER.size - len(b"200\0\0a\0"))
    assert len(ResponseHead(200, b"", [(b"a", fits)]).encode()) + pytunnel.OPEN_HEADER.size == MAX_HEAD
    with pytest.raises(MessageError) as caught:
        ResponseHead(200, b"", [(b"a", fits + b"x")]).encode()
    assert caught.value.status == 431
    most = [(b"a", b"")] * MAX_FIELDS
    assert RequestHead.decode(RequestHead(b"GET", b"/", most).encode()).headers == most


def test_requests_on_the_wire() -> None:
    head = RequestHead(b"POST", b"/%7Eu?a=1&&b", [(b"Host", b"a"), (b"X-a", b"\xe9"), (b"x-A", b"")])
    plain = b"POST /%7Eu?a=1&&b HTTP/1.1\r\nHost: a\r\nX-a: \xe9\r\nx-A: \r\n"
    assert head.to_wire(chunked=False, upgrade=False) == plain + b"\r\n"
    assert head.to_wire(chunked=True, upgrade=False) == plain + b"Transfer-Encoding: chunked\r\n\r\n"
    assert head.to_wire(chunked=False, upgrade=True) == plain + b"Connection: Upgrade\r\n\r\n"


# The response parser: good responses

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class Parsed:
    """What a parser made of a response."""

    def __init__(self, method: bytes, pieces: Iterable[bytes], *, eof: bool = False) -> None:
        self.parser = ResponseParser(method)
        events = [event for piece in pieces for event in self.parser.receive_data(piece)]
        if eof:
            self.parser.receive_eof()
        self.heads = [event for event in events if isinstance(event, ResponseHead)]
        self.body = b"".join(event for event in events if isinstance(event, bytes))
        assert all(events), "an empty piece of content"
        if self.heads and not self.heads[-1].interim:
            assert self.parser.head is self.heads[-1]

    @property
    def outcome(self) -> tuple[list[int], bytes, bool, bool, bytes]:
        """Statuses, body, done, keep_alive, excess."""
        parser = self.parser
        return [head.status for head in self.heads], self.body, parser.done, parser.keep_alive, parser.excess


# name: (method, bytes, (statuses, body, done, keep_alive, excess)), without the end of the connection
GOOD: dict[str, tuple[bytes, bytes, tuple[list[int], bytes, bool, bool, bytes]]] = {
    "length": (b"GET", OK + b"Content-Length: 5\r\n\r\nhello", ([200], b"hello", True, True, b"")),
    "length, part": (b"GET", OK + b"Content-Length: 5\r\n\r\nhel", ([200], b"hel", False, True, b"")),
    "no content": (b"GET", OK + b"content-length:0\r\n\r\n", ([200], b"", True, True, b"")),
    "leading zero": (
        b"GET",
        OK + b"Content-Length: 010\r\n\r\n0123456789",
        ([200], b"0123456789", True, True, b""),
    ),
    "excess": (b"GET", OK + b"Content-Length: 2\r\n\r\nhiHTTP/1.1", ([200], b"hi", True, False, b"HTTP/1.1")),
    "chunked": (
        b"GET",
        CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
        ([200], b"hello world", True, True, b""),
    ),
    "chunked, empty": (b"GET", CHUNKED + b"0\r\n\r\n", ([200], b"", True, True, b"")),
    "chunked, case": (
        b"GET",
        OK + b"transfer-ENCODING: Chunked\r\n\r\nA\r\n0123456789\r\n000\r\n\r\n",
        ([200], b"0123456789", True, True, b""),
    ),
    "chunk extensions": (
        b"GET",
        CHUNKED + b'2;a=b;c="d;\xe9"\r\nhi\r\n1 ; x\r\n!\r\n0;last\r\n\r\n',
        ([200], b"hi!", True, True, b""),
    ),
    "trailers": (
        b"GET",
        CHUNKED + b"2\r\nhi\r\n0\r\nContent-Length: 9\r\nX: y\r\n\r\n",
        ([200], b"hi", True, True, b""),
    ),
    "chunked, excess": (b"GET", CHUNKED + b"0\r\n\r\nHTTP", ([200], b"", True, False, b"HTTP")),
    "chunked, part": (b"GET", CHUNKED + b"0\r\n", ([200], b"", False, True, b"")),
    "content like a head": (
        b"GET",
        CHUNKED + b"1d\r\nHTTP/1.1 500 No\r\n\r\n0\r\n\r\n0\r\n\r\n"[:33] + b"\r\n0\r\n\r\n",
        ([200], b"HTTP/1.1 500 No\r\n\r\n0\r\n\r\n0\r\n\r\n"[:29], True, True, b""),
    ),
    "until close": (b"GET", OK + b"A: b\r\n\r\nhello\r\n", ([200], b"hello\r\n", False, False, b"")),
    "HEAD with length": (b"HEAD", OK + b"Content-Length: 42\r\n\r\n", ([200], b"", True, True, b"")),
    "HEAD, chunked": (b"HEAD", CHUNKED, ([200], b"", True, True, b"")),
    "HEAD without framing": (b"HEAD", OK + b"\r\n", ([200], b"", True, True, b"")),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", ([204], b"", True, True, b"")),
    "204 with content": (b"GET", b"HTTP/1.1 204 \r\n\r\nhello", ([204], b"", True, False, b"hello")),
    "304 with length": (
        b"GET",
        b"HTTP/1.1 304 X\r\nContent-Length: 7\r\n\r\n",
        ([304], b"", True, True, b""),
    ),
    "interim": (
        b"GET",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2 + OK + b"Content-Length: 1\r\n\r\nx",
        ([103, 103, 200], b"x", True, True, b""),
    ),
    "interim with length": (
        b"GET",
        b"HTTP/1.1 100 Continue\r\nContent-Length: 9\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\nx",
        ([100, 200], b"x", True, True, b""),
    ),
    "most interim": (
        b"GET",
        b"HTTP/1.1 102\r\n\r\n" * MAX_INTERIM + b"HTTP/1.1 204\r\n\r\n",
        ([102] * MAX_INTERIM + [204], b"", True, True, b""),
    ),
    "101": (b"GET", b"HTTP/1.1 101 S\r\nUpgrade: x\r\n\r\n\0raw", ([101], b"", True, False, b"\0raw")),
    "101 after 100": (
        b"GET",
        b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 101 S\r\n\r\n",
        ([100, 101], b"", True, False, b""),
    ),
    "HTTP/1.0": (b"GET", b"HTTP/1.0 200 OK\r\n\r\nhello", ([200], b"hello", False, False, b"")),
    "HTTP/1.0 with length": (
        b"GET",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        ([200], b"hi", True, False, b""),
    ),
    "no reason": (b"GET", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", ([200], b"", True, True, b"")),
    "close": (
        b"GET",
        OK + b"Connection: x, Close\r\nContent-Length: 0\r\n\r\n",
        ([200], b"", True, False, b""),
    ),
    "status 599": (b"GET", b"HTTP/1.1 599 ?\r\nContent-Length: 0\r\n\r\n", ([599], b"", True, True, b"")),
}


@pytest.mark.parametrize(("method", "data", "outcome"), GOOD.values(), ids=GOOD)
def test_good_responses(method: bytes, data: bytes, outcome: tuple) -> None:
    assert Parsed(method, [data]).outcome == outcome
    assert Parsed(method, sliced(data, [1])).outcome == outcome
    for cut in range(len(data)):
        assert Parsed(method, [data[:cut], b"", data[cut:]]).outcome == outcome


@given(st.sampled_from(sorted(GOOD)), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_good_responses_sliced_anyhow(name: str, sizes: list[int]) -> None:
    method, data, outcome = GOOD[name]
    assert Parsed(method, sliced(data, sizes)).outcome == outcome


@pytest.mark.parametrize("name", GOOD)
def test_the_end_of_the_connection(name: str) -> None:
    """It ends content without framing, and nothing else."""
    method, data, (statuses, body, done, keep_alive, excess) = GOOD[name]
    if done or name in ("until close", "HTTP/1.0"):
        assert Parsed(method, [data], eof=True).outcome == (statuses, body, True, keep_alive, excess)
    else:
        with pytest.raises(ConnectionError):
            Parsed(method, [data], eof=True)


@pytest.mark.parametrize(
    "data",
    [b"", b"HTT", OK, OK + b"A: b\r\n\r", b"HTTP/1.1 100 C\r\n\r\n", CHUNKED, CHUNKED + b"5", CHUNKED + b"5\r\nhel",
     CHUNKED + b"5\r\nhello", CHUNKED + b"5\r\nhello\r\n", CHUNKED + b"0\r\nA: b\r\n",
     OK + b"Content-Length: 1\r\n\r\n"],
)  # fmt: skip
def test_a_response_that_breaks_off(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        Parsed(b"GET", [data], eof=True)


def test_heads_are_kept_as_they_are() -> None:
    data = b"HTTP/1.1 200 \xe9t\xe9\r\nX-B:\t a  b \r\nx-b:\r\nSet-Cookie: 1\r\nX: \xff\tz\r\nSet-Cookie: 2\r\n\r\n"
    head = Parsed(b"HEAD", [data]).heads[0]
    assert head.reason == b"\xe9t\xe9"
    assert head.headers == [
        (b"X-B", b"a  b"),
        (b"x-b", b""),
        (b"Set-Cookie", b"1"),
        (b"X", b"\xff\tz"),
        (b"Set-Cookie", b"2"),
    ]


@pytest.mark.parametrize("reason", [b"\x01", b"\x1b[2J", b"a\0b", b"\x7f"])
def test_a_reason_that_may_not_be_is_dropped(reason: bytes) -> None:
    assert Parsed(b"HEAD", [b"HTTP/1.1 200 " + reason + b"\r\n\r\n"]).heads[0].reason == b""


def test_content_comes_as_soon_as_it_is_there() -> None:
    parser = ResponseParser(b"GET")
    assert [type(event) for event in parser.receive_data(CHUNKED)] == [ResponseHead]
    assert parser.receive_data(b"a\r\nhel") == [b"hel"]
    assert parser.receive_data(b"lo") == [b"lo"]
    assert not parser.done


@pytest.mark.parametrize("first", [0, 1, 40])
def test_content_until_close_comes_whole_whatever_came_with_the_head(first: int) -> None:
    content = bytes(range(256)) * 4
    parsed = Parsed(b"GET", [OK + b"\r\n" + content[:first], content[first:]], eof=True)
    assert parsed.outcome == ([200], content, True, False, b"")


# The response parser: bad responses

# fmt: off
BAD: dict[str, bytes] = {
    "CL and TE": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "TE and CL": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    "two CL": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "two equal CL": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
    **{
        f"CL {value!r}": OK + b"Content-Length: " + value + b"\r\n\r\n"
        for value in (
            b"", b"1, 1", b"+1", b"-1", b"1_0", b"0x1", b"1e1", b"1.0", b"1 1", b"9" * 23, b"\xa01", b"\xd9\xa1", b"a",
        )
    },
    **{
        f"TE {value!r}": OK + b"Transfer-Encoding: " + value + b"\r\n\r\n"
        for value in (
            b"xchunked", b"identity", b"gzip", b"gzip, chunked", b"chunked, identity", b"chunked, chunked",
            b"chunked;q=1",
            b"\x0bchunked", b'"chunked"', b"", b"chunked,", b"chunked\0", b"ch unked",
        )
    },
    "two TE": OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n",
    "TE in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    **{
        f"chunk size {value!r}": CHUNKED + value + b"\r\nhello\r\n"
        for value in (
            b"", b"0x5", b"-5", b"+5", b"5_0", b"g", b"f" * 17, b" 5", b"5\r", b"5;\0", b"5,", b"5 5", b"\xd9\xa5",
            b"5;\x01",
        )
    },
    "chunk size after a bare LF": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"4\r\nhello\r\n0\r\n\r\n",
    "chunk with LF only": CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "chunk without CRLF": CHUNKED + b"5\r\nhello0\r\n\r\n",
    "chunk extension without end": CHUNKED + b"5;" + b"a" * 2000,
    "long chunk extension": CHUNKED + b"5;" + b"a" * 2000 + b"\r\nhello\r\n",
    "too many trailers": CHUNKED + b"0\r\n" + b"A: b\r\n" * (MAX_FIELDS + 1),
    "long trailer": CHUNKED + b"0\r\nA: " + b"b" * 2000,
    "NUL in name": OK + b"A\0B: c\r\n\r\n",
    "NUL in value": OK + b"A: b\0c\r\n\r\n",
    "NUL makes a CL": OK + b"A: b\0Content-Length\0005\r\n\r\n",
    "CR in value": OK + b"A: b\rc\r\n\r\n",
    "CR makes a TE": OK + b"A: b\rTransfer-Encoding: chunked\r\n\r\n",
    "bare LF": OK + b"A: b\nC: d\r\n\r\n",
    "only bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n\r\n\r\n",
    "bare LF after the status": b"HTTP/1.1 200 OK\nA: b\r\n\r\n",
    "control in value": OK + b"A: \x01\r\n\r\n",
    "DEL in value": OK + b"A: \x7f\r\n\r\n",
    "escape in name": OK + b"\x1b[2J: a\r\n\r\n",
    "space before colon": OK + b"Content-Length : 5\r\n\r\n",
    "tab before name": OK + b"\tTransfer-Encoding: chunked\r\n\r\n",
    "obs-fold": OK + b"A: b\r\n c\r\n\r\n",
    "obs-fold with colon": OK + b"A: b\r\n c: d\r\n\r\n",
    "space before first field": OK + b" A: b\r\n\r\n",
    "no colon": OK + b"A\r\n\r\n",
    "empty name": OK + b": a\r\n\r\n",
    "empty name beside another": OK + b"A: b\r\n: a\r\n\r\n",
    "latin-1 in name": OK + b"\xe9: a\r\n\r\n",
    "no status line": b"hello\r\n\r\n",
    "no status line at all": b"\r\n\r\n",
    "HTML": b"<!doctype html>",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    "empty line first": b"\r\n" + OK + b"\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/1.10": b"HTTP/1.10 200 OK\r\n\r\n",
    "http/1.1": b"http/1.1 200 OK\r\n\r\n",
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    **{
        f"status {status!r}": b"HTTP/1.1 " + status + b" OK\r\n\r\n"
        for status in (
            b"99", b"099", b"600", b"999", b"20", b"2000", b"2x0", b"-20", b" 200", b"", b"\xd9\xa2\xd9\xa0\xd9\xa0",
        )
    },
    "too many interim": b"HTTP/1.1 102 P\r\n\r\n" * (MAX_INTERIM + 1),
    "head without end": OK + b"A: b\r\n" * (MAX_HEAD // 6),
    "long head": OK + b"A: " + b"b" * MAX_HEAD + b"\r\n\r\n",
    "long status line": b"HTTP/1.1 200 " + b"O" * MAX_HEAD,
    "too many fields": OK + b"A: b\r\n" * (MAX_FIELDS + 1) + b"\r\n",
}
# fmt: on


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_bad_responses(data: bytes) -> None:
    with pytest.raises(MessageError):
        Parsed(b"GET", [data])
    with pytest.raises(MessageError):
        Parsed(b"GET", sliced(data, [1] if len(data) < 5000 else [997]))


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
@pytest.mark.parametrize("name", ["CL and TE", "two CL", "CL b'+1'", "TE b'gzip'", "NUL in value", "CR in value"])
def test_bad_heads_are_bad_without_content_too(name: str, method: bytes) -> None:
    data = BAD[name] if method == b"HEAD" else BAD[name].replace(b"200 OK", b"304 Not Modified")
    with pytest.raises(MessageError):
        Parsed(method, [data])


def test_most_fields() -> None:
    headers = Parsed(b"HEAD", [OK + b"A: b\r\n" * MAX_FIELDS + b"\r\n"]).heads[0].headers
    assert headers == [(b"A", b"b")] * MAX_FIELDS


@pytest.mark.parametrize(
    "data",
    [
        OK + b"A: " + b"b" * (MAX_HEAD - len(OK) - 3) + b"\r\n\r\n",
        CHUNKED + b"1;" + b"a" * (pytunnel.MAX_CONTROL - 2) + b"\r\nx\r\n0\r\n\r\n",
        CHUNKED + b"0\r\n" + b"A" * pytunnel.MAX_CONTROL + b"\r\n\r\n",
    ],
    ids=["head", "chunk size", "trailer"],
)
def test_a_line_of_just_the_limit_may_be_cut_anywhere(data: bytes) -> None:
    """What is accepted in one piece is accepted in two."""
    method = b"GET" if data.startswith(CHUNKED) else b"HEAD"
    whole = Parsed(method, [data]).outcome
    assert whole[2]
    for cut in range(len(data) - 20, len(data)):
        assert Parsed(method, [data[:cut], data[cut:]]).outcome == whole
    for cut in range(data.index(b"\r\n", len(CHUNKED)) - 1, min(data.index(b"\r\n", len(CHUNKED)) + 4, len(data))):
        assert Parsed(method, [data[:cut], data[cut:]]).outcome == whole


@given(st.sampled_from([b"", b"HTTP/1.1 ", OK, CHUNKED, OK + b"Content-Length: 3\r\n\r\n"]), st.data())
def test_random_bytes_raise_only_message_error(start: bytes, draw: st.DataObject) -> None:
    parser = ResponseParser(draw.draw(st.sampled_from([b"GET", b"HEAD"])))
    lines = st.sampled_from([b"\r\n", b"0\r\n", b"5\r\nhello\r\n", b"A: b\r\n", b"HTTP/1.1 100 \r\n\r\n", b"\0", b"\r"])
    pieces = [start, *draw.draw(st.lists(st.one_of(st.binary(max_size=20), lines), max_size=8))]
    try:
        for piece in pieces:
            for event in parser.receive_data(piece):
                if isinstance(event, ResponseHead):
                    assert ResponseHead.decode(event.encode()) == event
        parser.receive_eof()
    except (MessageError, ConnectionError):
        return
    assert parser.done


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_mutated_responses_raise_only_message_error(name: str, draw: st.DataObject) -> None:
    method, data, _ = GOOD[name]
    mutant = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        place = draw.draw(st.integers(0, len(mutant) - 1))
        mutant[place : place + draw.draw(st.integers(0, 2))] = draw.draw(st.binary(max_size=2))
        assume(mutant)
    outcomes = []
    for sizes in ([len(mutant)], [draw.draw(st.integers(1, 9))]):
        try:
            outcomes.append(Parsed(method, sliced(bytes(mutant), sizes)).outcome)
        except MessageError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]  # bad or good, it does not depend on how the bytes were cut


# What is remembered


def copy(data: bytes) -> bytes:
    """The same bytes in another place."""
    return bytes(bytearray(data))


def test_what_comes_again_is_remembered_unless_it_is_long() -> None:
    short, long = b"A\0".ljust(MAX_REMEMBERED_HEAD, b"x"), b"A\0".ljust(MAX_REMEMBERED_HEAD + 1, b"x")
    first, second, third = (fields_of(copy(short)) for _ in range(3))
    assert first is not second is third
    assert first == second == [(b"A", short[2:])]
    fields_of(long), fields_of(copy(long))
    assert fields_of(long) is not fields_of(copy(long))
    assert fields_of(long) == [(b"A", long[2:])]


def test_so_much_is_remembered_and_no_more() -> None:
    cells = [cell.cell_contents for cell in fields_of.__closure__ or ()]
    (kept,), (seen,) = ([cell for cell in cells if isinstance(cell, kind)] for kind in (dict, set))
    for number in range(9 * MAX_REMEMBERED):
        first, again = fields_of(b"X-So-Much\0%d" % number), fields_of(b"X-So-Much\0%d" % number)
        assert first is not again is fields_of(b"X-So-Much\0%d" % number)
        assert len(kept) <= MAX_REMEMBERED
        assert len(seen) <= 8 * MAX_REMEMBERED
    size = len(kept)
    fields_of(b"X-Once\0")
    assert len(kept) == size


def test_what_is_not_remembered_goes_without_the_garbage_collector() -> None:
    """Heads of 64 KiB would pile up until it comes."""
    head = ResponseHead.decode(b"200\0OK\0X-Goes\0at once")
    encoder = ResponseEncoder(b"GET", http11=True, keep_alive=True)
    gc.disable()
    try:
        encoder.head(head, DATE)
        fields = weakref.ref(head.headers)
        del head
        assert fields() is None
    finally:
        gc.enable()


def test_fields_with_a_nul_are_not_taken_for_others() -> None:
    """Nobody lets one in; and where somebody did, it would not become what two fields were remembered as."""
    asked = [Fields([(b"A", b"1"), (b"B", b"2")]), Fields([(b"A", b"1\0B\x002")])]
    assert asked[0].payload == asked[1].payload
    rest = "192.0.2.1", "http", b"a", False, False, True
    for _ in range(3):
        for fields in asked:
            assert pytunnel._request_fields(fields, *rest)[: len(fields)] == fields


@pytest.mark.parametrize("wrong", [b"A\0b\0C", b"A\0b\0", b"\0b", b"A b\0c", b"A\0b\n"])
def test_a_head_that_is_wrong_is_so_each_time(wrong: bytes) -> None:
    for _ in range(3):
        with pytest.raises(ProtocolError):
            RequestHead.decode(b"GET\0/\0" + copy(wrong))
        with pytest.raises(ProtocolError):
            ResponseHead.decode(b"200\0OK\0" + copy(wrong))


ASKED = [(b"Host", b"web.t"), (b"Connection", b"Upgrade"), (b"Upgrade", b"x"), (b"Authorization", b"Basic eDp5"),
         (b"X-Forwarded-For", b"203.0.113.9"), (b"X-Forwarded-Proto", b"https")]  # fmt: skip


@pytest.mark.parametrize("headers", [ASKED, ASKED[:1], ASKED[3:]], ids=len)
def test_what_is_remembered_of_a_request_is_for_the_same_visitor_host_and_tunnel(headers: Headers) -> None:
    """All that is asked for in turn gives what it gives by itself."""
    peers, schemes, hosts = ("192.0.2.1", "192.0.2.2"), ("http", "https"), (b"web.t", b"api.t")
    for _ in range(3):
        for peer, scheme, host, *flags in itertools.product(peers, schemes, hosts, *[(False, True)] * 3):
            trusted, upgrade, takes = flags
            expected = end_to_end(headers, keep_upgrade=upgrade)
            expected = [pair for pair in expected if takes or pair[0] != b"Authorization"]
            expected = forwarded(expected, peer, scheme, host, trusted=trusted)
            got = pytunnel._request_fields(Fields(headers), peer, scheme, host, trusted, upgrade, takes)
            assert got == expected


@given(names, targets, fields, st.integers(200, 599), st.booleans())
def test_what_is_remembered_stays_as_it_was(
    method: bytes, target: bytes, headers: Headers, status: int, chunked: bool
) -> None:
    """Whatever is done with it: it is the same, and what is made of it, too, as without any memory."""
    request, response = RequestHead(method, target, headers), ResponseHead(status, b"", headers)
    for _ in range(3):
        again = RequestHead.decode(copy(request.encode()))
        assert (again, again.encode()) == (request, request.encode())
        wires = [head.to_wire(chunked=chunked, upgrade=not chunked) for head in (again, request)]
        assert wires[0] == wires[1]
        answer = ResponseHead.decode(copy(response.encode()))
        assert (answer, answer.encode(), answer.passed_on()) == (response, response.encode(), response.passed_on())
        with contextlib.suppress(MessageError):
            encoder = ResponseEncoder(b"GET", http11=True, keep_alive=False)
            encoder.head(answer, DATE)
        own_cookies(answer.headers, "web.t")
        forwarded(end_to_end(again.headers), "192.0.2.1", "http", b"web.t", trusted=True)


def test_a_record_of_a_request_is_nobody_elses() -> None:
    """A script may change what it was given, as to replay it with another field."""
    payload = RequestHead(b"GET", b"/", [(b"Host", b"a"), (b"Cookie", b"b=1")]).encode()
    record = Exchange("web", "GET", "/", 0.0, request_head=payload, response_head=b"200\0OK\0A\0b")
    for headers in (record.request_headers, record.response_headers) * 3:
        assert isinstance(headers, list)
        headers.append((b"X-Debug", b"1"))
    wire = RequestHead.decode(payload).to_wire(chunked=False, upgrade=False)
    assert wire == b"GET / HTTP/1.1\r\nHost: a\r\nCookie: b=1\r\n\r\n"
    assert ResponseHead.decode(record.response_head).headers == [(b"A", b"b")]


@pytest.mark.parametrize("value", [b"1\0Content-Length\0005", b"1\0005"])
def test_a_nul_in_a_visitors_field_does_not_make_another_field(tmp_path: Path, value: bytes) -> None:
    """aiohttp refuses it; nobody relies on that."""
    server = pytunnel.TunnelServer(tokens=[], state=tmp_path)
    raw = ((b"Host", b"a"), (b"X", value))
    message: Any = SimpleNamespace(
        method="GET", path="/", raw_headers=raw, headers={}, version=HttpVersion11, should_close=False, chunked=False
    )
    protocol = SimpleNamespace(address="127.0.0.1", ssl_context=None, caller=None, no_content=EMPTY_PAYLOAD)
    visitor = pytunnel.Visitor(message, EMPTY_PAYLOAD, protocol, server._gate, keep_alive=True)
    with pytest.raises(MessageError, match="NUL"):
        server._request_head(visitor, b"a", pytunnel.EVERYBODY).encode()


# What a proxy passes on


def test_end_to_end_drops_what_is_for_the_next_hop_only() -> None:
    kept = [
        (b"Host", b"a"),
        (b"X-A", b"1"),
        (b"x-a", b"2"),
        (b"Content-Length", b"5"),
        (b"Authorization", b"s"),
    ]
    hop = [
        (name, b"x")
        for name in (
            b"Keep-Alive", b"proxy-connection", b"Proxy-Authenticate", b"Proxy-Authorization", b"TE", b"Trailer",
            b"Transfer-Encoding", b"UPGRADE", b"Connection",
        )
    ]  # fmt: skip
    mixed = list(itertools.chain.from_iterable(zip(hop, itertools.cycle(kept), strict=False)))
    assert end_to_end([*hop, *kept]) == kept
    assert end_to_end(kept) == kept
    assert [field for field in end_to_end(mixed) if field in hop] == []


def test_end_to_end_drops_what_connection_names() -> None:
    headers = [
        (b"Connection", b"close, X-Foo"),
        (b"X-Foo", b"1"),
        (b"x-foo", b"2"),
        (b"connection", b" x-bar\t,,keep-alive"),
        (b"X-BAR", b"3"),
        (b"X-Baz", b"4"),
    ]
    assert end_to_end(headers) == [(b"X-Baz", b"4")]


def test_connection_cannot_take_away_host_and_length() -> None:
    headers = [
        (b"Connection", b"Host, Content-Length, cookie"),
        (b"Host", b"a"),
        (b"Content-Length", b"1"),
        (b"Cookie", b""),
    ]
    assert end_to_end(headers) == [(b"Host", b"a"), (b"Content-Length", b"1")]
    assert {b"host", b"content-length"} == pytunnel.NEVER_NOMINATED


def test_upgrade_is_kept_on_demand() -> None:
    headers = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"TE", b"trailers")]
    assert end_to_end(headers, keep_upgrade=True) == [(b"Upgrade", b"websocket")]
    assert end_to_end(headers) == []


@pytest.mark.parametrize("status", [101, 426])
def test_responses_that_speak_of_an_upgrade_keep_it(status: int) -> None:
    head = ResponseHead(status, b"S", [(b"Upgrade", b"websocket"), (b"Connection", b"upgrade")])
    assert head.passed_on() == ResponseHead(status, b"S", [(b"Upgrade", b"websocket")])
    assert ResponseHead(200, b"", [(b"Upgrade", b"h2c")]).passed_on().headers == []


@pytest.mark.parametrize(
    ("status", "kept"), [(100, False), (103, False), (101, False), (204, False), (200, True), (304, True)]
)
def test_content_length_is_kept_where_it_may_be(status: int, kept: bool) -> None:
    head = ResponseHead(status, b"", [(b"content-Length", b"0"), (b"A", b"b")])
    assert ((b"content-Length", b"0") in head.passed_on().headers) == kept
    assert (b"A", b"b") in head.passed_on().headers


OURS = [(b"X-Forwarded-For", b"192.0.2.1"), (b"X-Forwarded-Proto", b"https"), (b"X-Forwarded-Host", b"web.t")]


def proxied(headers: Headers, *, trusted: bool = False) -> Headers:
    return forwarded(headers, "192.0.2.1", "https", b"web.t", trusted=trusted)


def test_forwarded_adds_what_a_proxy_owes() -> None:
    assert proxied([(b"Host", b"web.t"), (b"A", b"b")]) == [(b"Host", b"web.t"), (b"A", b"b"), *OURS]


@pytest.mark.parametrize(
    "name",
    [
        b"X-Forwarded-For", b"x-forwarded-proto", b"X-FORWARDED-HOST", b"Forwarded", b"X-Real-IP",
        b"X_Forwarded_For", b"X-Forwarded_For", b"x_real_ip", b"X_FORWARDED_PROTO", b"X_Forwarded-Host",
        b"X-Forwarded-Port", b"X-Forwarded-Prefix", b"x-forwarded-user", b"X_Forwarded_Ssl",
        b"Content_Length", b"transfer_encoding", b"Transfer_Encoding",
    ],
)  # fmt: skip
def test_forwarded_replaces_what_the_visitor_made_up(name: bytes) -> None:
    assert proxied([(b"A", b"b"), (name, b"6.6.6.6"), (name, b"chunked"), (b"A_b", b"c")]) == [
        (b"A", b"b"),
        (b"A_b", b"c"),
        *OURS,
    ]


@pytest.mark.parametrize(
    "name", [b"X_Forwarded_For", b"x_real_ip", b"Content_Length", b"Transfer_Encoding", b"X_Forwarded_User"]
)
def test_underscore_twins_go_even_behind_a_trusted_proxy(name: bytes) -> None:
    assert proxied([(name, b"6.6.6.6")], trusted=True) == OURS


def test_a_trusted_proxy_is_believed_about_address_and_scheme() -> None:
    """What else it sends may be the visitor's own, as nginx passes on what it is not told to set."""
    theirs = [
        (b"X-Forwarded-For", b"203.0.113.9, 198.51.100.1"),
        (b"x-forwarded-for", b"198.51.100.2"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Proto", b"http"),
        (b"X-Forwarded-Proto", b"made up"),
        (b"X-Forwarded-Host", b"shop.example.com"),
        (b"Forwarded", b"for=203.0.113.9"),
        (b"X-Real-IP", b"203.0.113.9"),
        (b"X-Forwarded-User", b"ann"),
    ]
    assert proxied(theirs, trusted=True) == [
        (b"X-Forwarded-User", b"ann"),
        (b"X-Forwarded-For", b"203.0.113.9, 198.51.100.1, 198.51.100.2, 192.0.2.1"),
        (b"X-Forwarded-Proto", b"http"),
        (b"X-Forwarded-Host", b"web.t"),
    ]
    assert proxied([], trusted=True) == OURS


@given(fields, st.booleans())
def test_forwarded_keeps_everything_else(headers: Headers, trusted: bool) -> None:
    known = pytunnel.FORWARDED | pytunnel.FRAMING
    folded = [name.lower().replace(b"_", b"-") for name, _ in headers]
    assume(not any(name in known or name.startswith(b"x-forwarded-") for name in folded))
    assert proxied(headers, trusted=trusted) == [*headers, *OURS]


# The response encoder


def encoded(method: bytes, head: ResponseHead, *pieces: bytes, http11: bool = True, keep_alive: bool = True) -> bytes:
    encoder = ResponseEncoder(method, http11=http11, keep_alive=keep_alive)
    return encoder.head(head, DATE) + b"".join(map(encoder.data, pieces)) + encoder.end()


def test_content_with_a_length() -> None:
    head = ResponseHead(200, b"OK", [(b"content-length", b"5"), (b"A", b"b")])
    assert encoded(b"GET", head, b"hel", b"", b"lo") == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nA: b\r\nDate: " + DATE + b"\r\n\r\nhello"
    )


def test_content_without_a_length_is_chunked() -> None:
    assert encoded(b"GET", ResponseHead(200, b"", [(b"Date", b"x")]), b"hello", b"", b"world" * 4) == (
        b"HTTP/1.1 200 \r\nDate: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n14\r\n"
        + b"world" * 4
        + b"\r\n0\r\n\r\n"
    )


def test_content_without_a_length_ends_with_an_http10_connection() -> None:
    encoder = ResponseEncoder(b"GET", http11=False, keep_alive=True)
    assert encoder.head(ResponseHead(200, b"", [(b"Date", b"x")]), DATE) == (
        b"HTTP/1.1 200 \r\nDate: x\r\nConnection: close\r\n\r\n"
    )
    assert encoder.data(b"hello") + encoder.end() == b"hello"
    assert not encoder.keep_alive


@pytest.mark.parametrize(
    ("method", "status", "headers", "http11", "wanted"),
    [
        (b"GET", 200, [], False, True),
        (b"GET", 200, [], True, False),
        (b"GET", 200, [(b"Content-Length", b"5")], False, False),
        (b"HEAD", 200, [], False, False),
        (b"GET", 304, [], False, False),
    ],
)
def test_until_close(method: bytes, status: int, headers: Headers, http11: bool, wanted: bool) -> None:
    encoder = ResponseEncoder(method, http11=http11, keep_alive=True)
    encoder.head(ResponseHead(status, b"", headers), DATE)
    assert encoder.until_close is wanted


def test_connection_fields() -> None:
    head = ResponseHead(200, b"", [(b"Content-Length", b"0"), (b"Date", b"x")])
    wire = b"HTTP/1.1 200 \r\nContent-Length: 0\r\nDate: x\r\n"
    assert encoded(b"GET", head) == wire + b"\r\n"
    assert encoded(b"GET", head, keep_alive=False) == wire + b"Connection: close\r\n\r\n"
    assert encoded(b"GET", head, http11=False) == wire + b"Connection: keep-alive\r\n\r\n"
    assert encoded(b"GET", head, http11=False, keep_alive=False) == wire + b"Connection: close\r\n\r\n"


def test_an_end_with_the_head_needs_no_chunks() -> None:
    encoder = ResponseEncoder(b"GET", http11=True, keep_alive=True)
    wire = encoder.head(ResponseHead(200, b"", [(b"Date", b"x")]), DATE, end=True)
    assert wire == b"HTTP/1.1 200 \r\nDate: x\r\nContent-Length: 0\r\n\r\n"
    assert encoder.end() == b""
    with pytest.raises(MessageError):
        encoder.data(b"x")


FAKE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    ("method", "status", "headers"),
    [
        (b"HEAD", 200, []),
        (b"HEAD", 200, [(b"Content-Length", b"42")]),
        (b"HEAD", 404, [(b"Content-Length", b"0")]),
        (b"GET", 204, []),
        (b"GET", 304, []),
        (b"GET", 304, [(b"Content-Length", b"42")]),
        (b"GET", 101, []),
    ],
)
@pytest.mark.parametrize("http11", [True, False])
def test_no_content_where_none_may_be(method: bytes, status: int, headers: Headers, http11: bool) -> None:
    """A visitor would read it as the next response."""
    encoder = ResponseEncoder(method, http11=http11, keep_alive=True)
    wire = encoder.head(ResponseHead(status, b"", headers), DATE)
    assert encoder.data(FAKE) == encoder.data(b"x") == encoder.end() == b""
    assert wire.endswith(b"\r\n\r\n") and wire.count(b"\r\n\r\n") == 1
    for name, value in headers:
        assert b"%b: %b\r\n" % (name, value) in wire
    assert b"transfer-encoding" not in wire.lower()


def test_too_much_content() -> None:
    encoder = ResponseEncoder(b"GET", http11=True, keep_alive=True)
    encoder.head(ResponseHead(200, b"", [(b"Content-Length", b"5")]), DATE)
    assert encoder.data(b"hello") == b"hello"
    with pytest.raises(MessageError):
        encoder.data(b"!")
    whole = ResponseEncoder(b"GET", http11=True, keep_alive=True)
    whole.head(ResponseHead(200, b"", [(b"Content-Length", b"5")]), DATE)
    with pytest.raises(MessageError):
        whole.data(FAKE)


@pytest.mark.parametrize("http11", [True, False])
def test_too_little_content(http11: bool) -> None:
    encoder = ResponseEncoder(b"GET", http11=http11, keep_alive=True)
    encoder.head(ResponseHead(200, b"", [(b"Content-Length", b"5")]), DATE)
    encoder.data(b"hell")
    with pytest.raises(MessageError):
        encoder.end()


@pytest.mark.parametrize("value", [b"+5", b"5, 5", b"", b"-1", b"5a"])
def test_a_length_that_is_none(value: bytes) -> None:
    """Heads come from the client; it may say anything."""
    with pytest.raises(MessageError):
        ResponseEncoder(b"GET", http11=True, keep_alive=True).head(
            ResponseHead(200, b"", [(b"Content-Length", value)]), DATE
        )


@pytest.mark.parametrize("headers", [[(b"Date", b"x")], [(b"dAtE", b"x"), (b"A", b"b")], []])
def test_date_is_there_once(headers: Headers) -> None:
    head = ResponseHead(200, b"", [*headers, (b"Content-Length", b"0")])
    wire = encoded(b"GET", head).lower()
    assert wire.count(b"\r\ndate: ") == 1
    assert (b"date: x\r\n" in wire) == bool(headers)


@pytest.mark.parametrize("status", [100, 102, 103])
def test_interim_heads(status: int) -> None:
    head = ResponseHead(status, b"Hints", [(b"Link", b"</a>")])
    encoder = ResponseEncoder(b"GET", http11=True, keep_alive=True)
    wire = b"HTTP/1.1 %d Hints\r\nLink: </a>\r\n\r\n" % status
    assert encoder.head(head, DATE) == encoder.head(head, DATE) == wire
    assert not encoder.started
    assert encoder.head(ResponseHead(204, b"", [(b"Date", b"x")]), DATE) == b"HTTP/1.1 204 \r\nDate: x\r\n\r\n"
    assert encoder.started
    assert ResponseEncoder(b"GET", http11=False, keep_alive=True).head(head, DATE) == b""  # RFC 9110 section 15.2


def test_switching_protocols() -> None:
    encoder = ResponseEncoder(b"GET", http11=True, keep_alive=True)
    wire = encoder.head(ResponseHead(101, b"S", [(b"Upgrade", b"websocket")]), DATE)
    assert wire == b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    assert not encoder.keep_alive


def test_upgrade_required() -> None:
    head = ResponseHead(426, b"U", [(b"Upgrade", b"websocket"), (b"Content-Length", b"0"), (b"Date", b"x")])
    assert encoded(b"GET", head) == (
        b"HTTP/1.1 426 U\r\nUpgrade: websocket\r\nContent-Length: 0\r\nDate: x\r\nConnection: Upgrade\r\n\r\n"
    )


def plain(headers: Headers) -> bool:
    ours = pytunnel.HOP_BY_HOP | {b"content-length", b"date"}
    return not any(name.lower() in ours for name, _ in headers)


@given(
    st.sampled_from([b"GET", b"HEAD", b"POST"]),
    st.sampled_from([200, 201, 204, 206, 301, 304, 404, 426, 500, 599]),
    values,
    fields.filter(plain),
    st.lists(st.binary(max_size=30), max_size=5),
    st.sampled_from(["length", "chunked", "end"]),
    st.tuples(st.booleans(), st.booleans()),
    st.integers(1, 50),
)
def test_parse_what_you_encode(
    method: bytes,
    status: int,
    reason: bytes,
    headers: Headers,
    pieces: list[bytes],
    framing: str,
    flags: tuple[bool, bool],
    size: int,
) -> None:
    """What the encoder says, the parser understands; a visitor who keeps the connection finds its next byte."""
    http11, keep_alive = flags
    pieces = [] if framing == "end" else pieces
    body = b"".join(pieces)
    length = [(b"Content-Length", b"%d" % len(body))] if framing == "length" and status != 204 else []
    head = ResponseHead(status, reason, [*headers, *length])
    encoder = ResponseEncoder(method, http11=http11, keep_alive=keep_alive)
    wire = b"".join([encoder.head(head, DATE, end=framing == "end"), *map(encoder.data, pieces), encoder.end()])

    parsed = Parsed(method, sliced(wire, [size]), eof=not encoder.keep_alive)
    got = parsed.heads[0]
    assert (got.status, got.reason) == (status, reason)
    stripped = [(name, value.strip(b" \t")) for name, value in [*headers, *length]]
    assert got.headers[: len(stripped)] == stripped
    assert parsed.body == (body if head.has_body(method) else b"")
    assert parsed.parser.done
    assert parsed.parser.excess == b""
    assert parsed.parser.keep_alive == encoder.keep_alive
    assert keep_alive or not encoder.keep_alive


hostile_fields = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"Content-Length",
                b"transfer-encoding",
                b"Connection",
                b"Keep-Alive",
                b"Upgrade",
                b"Trailer",
                b"A",
            ]
        ),
        st.sampled_from(
            [b"0", b"5", b"40", b"chunked", b"Chunked", b"gzip, chunked", b"close", b"keep-alive", b"upgrade"]
        ),
    ),
    max_size=4,
)


@given(
    st.sampled_from([b"GET", b"HEAD"]),
    st.sampled_from([200, 204, 304, 404, 426]),
    hostile_fields,
    st.lists(st.sampled_from([b"0\r\n\r\n", FAKE, b"x", b""]), max_size=3),
    st.booleans(),
)
def test_no_client_can_frame_a_response(
    method: bytes, status: int, headers: Headers, pieces: list[bytes], http11: bool
) -> None:
    """Heads and content come from a client that may be anybody's: a visitor still reads one response."""
    encoder = ResponseEncoder(method, http11=http11, keep_alive=True)
    try:
        wire = encoder.head(ResponseHead(status, b"", headers), DATE, end=not pieces)
        wire += b"".join(map(encoder.data, pieces)) + encoder.end()
    except MessageError:
        return  # the connection is broken off
    parsed = Parsed(method, [wire], eof=not encoder.keep_alive)
    framing = [name.lower() for name, _ in parsed.heads[0].headers if name.lower() in pytunnel.FRAMING]
    assert len(framing) <= 1
    assert status not in (204, 304) or b"transfer-encoding" not in framing  # RFC 9112 section 6.1
    assert status != 204 or not framing  # RFC 9110 section 8.6
    assert parsed.parser.done and parsed.parser.excess == b""
    assert parsed.body == (b"".join(pieces) if parsed.heads[0].has_body(method) else b"")


# Hosts and targets


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("a", "a", None),
        ("A.Zone", "a.zone", None),
        ("a.zone.", "a.zone", None),
        ("a.zone:8443", "a.zone", 8443),
        ("a.zone.:8443", "a.zone", 8443),
        ("a:", "a", None),
        ("a:65535", "a", 65535),
        ("192.0.2.1:80", "192.0.2.1", 80),
        ("[::1]", "[::1]", None),
        ("[2001:DB8::1]:8080", "[2001:db8::1]", 8080),
        ("[::ffff:192.0.2.1]", "[::ffff:192.0.2.1]", None),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", None),
        ("a_b.c", "a_b.c", None),
        ("x" * 63 + ".y", "x" * 63 + ".y", None),
    ],
)
def test_good_hosts(text: str, host: str, port: int | None) -> None:
    assert parse_host(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "a..b", ".a", "a,b", "a b", " a", "a ", "a\n", "a@b", "user:pw@b", "a/b", "a?b", "a#b",
        "a\\b", "a%b",
        "%61.zone", "a:80:90", "a:80x", "a:99999", "a:123456", "a:-1", "a:+1", "a:\u0661", ":80", "b\xfccher.de",
        "a\0b",
        "\u2100.com", "*", "[", "[]", "[::1", "::1", "[::1]x", "[x]", "[1.2.3.4]", "[::1%25eth0]", "[:::]", "x" * 64,
        "x" * 64 + ".y", ".".join(["x" * 60] * 5), "a" * 100_000, "a." * 100_000,
    ],
)  # fmt: skip
def test_bad_hosts(text: str) -> None:
    with pytest.raises(MessageError):
        parse_host(text)


@given(st.text(max_size=40))
def test_any_host_is_parsed_or_refused(text: str) -> None:
    try:
        host, port = parse_host(text)
    except MessageError:
        return
    assert host == host.lower() and host.isascii() and host.strip(".")
    assert parse_host(host) == (host, None)
    assert port is None or 0 <= port <= 65535


HOST = [(b"Host", b"a.zone")]


@pytest.mark.parametrize(
    "target",
    [
        b"/", b"/a/../b/./c", b"/%2e%2e/", b"//e//f", b"/a%2Fb", b"/%zz", b"/%7Eu", b"/\\", b"/;p=1", b"/?",
        b"/?a=1&a=2&b",
        b'/?x=[1]|"', b"/%C3%A9", b"/%255F", b"/a%0Ab", b"/%00", b"/%0d%0aX:", b"/\xc3\xa9", b"/http://b", b"/*",
    ],
)  # fmt: skip
def test_targets_are_not_touched(target: bytes) -> None:
    assert split_target(b"GET", target, HOST) == (target, b"a.zone")


@pytest.mark.parametrize(
    ("method", "target", "wanted"),
    [
        (b"GET", b"http://b.zone/p", (b"/p", b"b.zone")),
        (b"GET", b"HTTPS://B.zone:8/p?q", (b"/p?q", b"B.zone:8")),
        (b"GET", b"http://b.zone", (b"/", b"b.zone")),
        (b"GET", b"http://b.zone?q=/", (b"/?q=/", b"b.zone")),
        (b"GET", b"http://b.zone//x", (b"//x", b"b.zone")),
        (b"OPTIONS", b"*", (b"*", b"a.zone")),
        (b"OPTIONS", b"http://b.zone", (b"*", b"b.zone")),
        (b"OPTIONS", b"http://b.zone/", (b"/", b"b.zone")),
        (b"OPTIONS", b"http://b.zone?q", (b"/?q", b"b.zone")),
    ],
)
def test_other_forms_of_targets(method: bytes, target: bytes, wanted: tuple[bytes, bytes]) -> None:
    assert split_target(method, target, HOST) == wanted


@pytest.mark.parametrize("target", [b"http://u@b.zone/", b"http://u:p@b.zone/", b"http:///p", b"http://b,c/"])
def test_hosts_of_absolute_targets_are_checked_like_others(target: bytes) -> None:
    with pytest.raises(MessageError):
        parse_host(split_target(b"GET", target, HOST)[1].decode("latin-1"))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (b"GET", b""), (b"GET", b"*"), (b"GET", b"a"), (b"GET", b"?a"), (b"GET", b"ftp://b/"), (b"GET", b"http:/b"),
        (b"GET", b"/ b"), (b"GET", b"/#a"), (b"GET", b"http://b/#a"), (b"GET", b"/\n"), (b"GET", b"/\0"),
        (b"GET", b"\\a"),
        (b"CONNECT", b"b.zone:443"), (b"GET", b"/\x7f"), (b"GET", b"http://b/ c"), (b"GET", b"//b\r\nX: y"),
    ],
)  # fmt: skip
def test_bad_targets(method: bytes, target: bytes) -> None:
    with pytest.raises(MessageError):
        split_target(method, target, HOST)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], None),
        ([(b"Content-Length", b"5")], None),
        ([(b"Transfer-Encoding", b"chunked")], None),
        ([(b"transfer-encoding", b"Chunked"), (b"A", b"b")], None),
        ([(b"Transfer-Encoding", b"chunked"), (b"content-length", b"5")], 400),
        ([(b"Content-Length", b"5"), (b"Transfer-Encoding", b"gzip")], 400),
        ([(b"Transfer-Encoding", b"chunked"), (b"TRANSFER-ENCODING", b"chunked")], 400),
        ([(b"Transfer-Encoding", b"gzip, chunked")], 501),
        ([(b"Transfer-Encoding", b"chunked, chunked")], 501),
        ([(b"Transfer-Encoding", b"identity")], 501),
        ([(b"Transfer-Encoding", b"")], 501),
        ([(b"Transfer-Encoding", b"chunked;q=1")], 501),
    ],
)
def test_the_framing_of_requests(headers: Headers, status: int | None) -> None:
    try:
        pytunnel.check_framing(headers)
    except MessageError as error:
        assert error.status == status
    else:
        assert status is None


@pytest.mark.parametrize("headers", [[], [*HOST, *HOST], [(b"host", b"a"), (b"HOST", b"b")], [(b"Hosts", b"a")]])
def test_one_host_field(headers: Headers) -> None:
    for target in (b"/", b"http://b.zone/"):
        with pytest.raises(MessageError):
            split_target(b"GET", target, headers)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("web.t.example.com", "web"),
        ("t.example.com", None),
        ("x.web.t.example.com", None),
        ("example.com", None),
        ("web.example.com", None),
        ("webt.example.com", None),
        ("web.t.example.com.evil.com", None),
        ("t.example.com.evil.com", None),
        ("web.localhost", "web"),
        ("localhost", None),
        ("web", None),
        ("[::1]", None),
        ("192.0.2.1", None),
        ("web.203-0-113-7.sslip.io", "web"),
        ("203-0-113-7.sslip.io", None),
        ("deep.t.example.com", None),
        ("web.deep.t.example.com", "web"),
    ],
)
def test_tunnel_name(host: str, name: str | None) -> None:
    zones = ["t.example.com", "localhost", "203-0-113-7.sslip.io", "deep.t.example.com"]
    assert tunnel_name(host, zones) == name
    assert tunnel_name(host, []) is None
