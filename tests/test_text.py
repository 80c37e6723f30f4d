"""Text from the network on its way to a terminal, a log or a JSON reader."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytunnel import Exchange, escape, one_line, parse_object


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain text", "plain text"),
        ("Grüße 漢字", "Grüße 漢字"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("left\u202eright\u200b", "left\\u202eright\\u200b"),  # direction mark, zero width
        ("\ud800", "\\ud800"),
        (b"latin \xe9", "latin \\xe9"),
        (b"utf-8 \xc3\xa9", "utf-8 é"),
        ("", ""),
    ],
)
def test_escape(text: str | bytes, safe: str) -> None:
    assert escape(text) == safe


@given(st.one_of(st.text(alphabet=st.characters()), st.binary()), st.integers(1, 50))
def test_escape_is_short_and_printable(text: str | bytes, limit: int) -> None:
    safe = escape(text, limit)
    assert len(safe) <= limit
    assert all(unicodedata.category(c)[0] != "C" for c in safe)


def test_escape_cuts_with_a_mark() -> None:
    assert escape("x" * 201) == "x" * 199 + "…"
    assert escape("x" * 200) == "x" * 200


@given(st.text())
def test_parse_object_raises_nothing_but_value_error(text: str) -> None:
    try:
        assert parse_object(text) == json.loads(text)
    except ValueError:
        pass


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null", "", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_what_is_no_object(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_object(text)


def test_an_exchange_as_a_line() -> None:
    exchange = Exchange("web", "GET", "/\x1b[2J", started=10.0, status=200, ended=10.25)
    assert one_line(exchange.summary()) == "200 GET     /\\x1b[2J  250 ms"
    exchange = Exchange("web", "POST", "/", started=10.0, ended=10.0, error="nobody \x07 there")
    assert one_line(exchange.summary()) == "--- POST    /  0 ms  nobody \\x07 there"
