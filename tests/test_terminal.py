"""The terminal view: what it shows, as text; its keys; and in a real terminal, which it leaves as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wcwidth import wcwidth

from pytunnel import (
    PALETTES,
    Exchange,
    ExchangeLog,
    KeyReader,
    ResponseHead,
    Screen,
    Snapshot,
    printable,
    render,
    wrap,
)

START = 1_753_179_557.0  # 2025-07-22 10:19:17 UTC
NOW = 1000.0

SAMPLE = [  # seconds ago, method, target, status, seconds it took, bytes out
    (95.0, "GET", "/", 200, 0.012, 1843),
    (94.2, "GET", "/static/app.js", 200, 0.031, 148_213),
    (94.1, "GET", "/static/style.css", 304, 0.004, 0),
    (93.7, "GET", "/favicon.ico", 404, 0.006, 153),
    (61.0, "POST", "/webhooks/stripe?token=abc123", 200, 0.187, 15),
    (44.5, "GET", "/api/users?page=2&per_page=50", 200, 0.083, 9_214),
    (30.0, "DELETE", "/api/users/17", 204, 0.022, 0),
    (21.0, "GET", "/api/report", 502, 0.0, 0),
    (12.0, "GET", "/日本語/ページ", 200, 1.31, 52_000),
    (8.0, "PUT", "/api/files/holiday.mp4", None, None, 0),
    (3.0, "GET", "/api/search?q=caf%C3%A9", 500, 0.402, 2_048),
]


def sample() -> ExchangeLog:
    """Some exchanges as a morning brings them."""
    log = ExchangeLog()
    for ago, method, target, status, seconds, size in SAMPLE:
        exchange = Exchange("web", method, target, started=NOW - ago, time=START - ago, round_trip=0.023)
        exchange.request_headers = [(b"Host", b"web.t.example.com"), (b"Authorization", b"Bearer abc")]
        log.begin(exchange)
        if method == "POST":
            log.receive(exchange, b'{"id":"evt_1","type":"invoice.paid","data":{"amount":4200}}', exchange.started)
        if status:
            headers = [(b"Content-Type", b"application/json"), (b"Set-Cookie", b"session=secret")]
            exchange.answered = exchange.started + seconds * 0.8
            log.respond(exchange, ResponseHead(status, b"OK" if status == 200 else b"", headers))
            log.send(exchange, b'{"ok":true}'.ljust(size), exchange.started)
            exchange.error = "nothing listens on localhost:3000" if status == 502 else ""
            log.finish(exchange, exchange.started + seconds)
    return log


def snapshot(log: ExchangeLog | None = None, **fields: Any) -> Snapshot:
    log = log or sample()
    given = {
        "screen": Screen(),
        "now": NOW,
        "tunnels": [("web", "https://web.t.example.com", "localhost:3000")],
        "inspector_url": "http://127.0.0.1:4040",
        "problem": "",
        "retry_at": None,
        "round_trip": 0.0234,
        "log": log,
        "exchanges": list(log.exchanges.values()),
        "colours": 0,
    }
    return Snapshot(**given | fields)


SGR = re.compile(r"\x1b\[[0-9;]*m")


def plain(lines: list[str]) -> str:
    """The lines without colours, as a person sees them."""
    return "\n".join(SGR.sub("", line).rstrip() for line in lines)


def cells(text: str) -> int:
    """How many cells a terminal needs for it, by another's tables."""
    return sum(max(0, wcwidth(char)) for char in text)


def show(snap: Snapshot, width: int = 80, height: int = 24, *keys: str) -> list[str]:
    snap.screen.arrange(snap, width, height)
    for key in keys:
        snap.screen.key(key)
        snap.screen.arrange(snap, width, height)
    return render(snap, width, height)


# Text from the network


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x9b2J", "\\x1b[31mred\\x9b2J"),
        ("e\u0301" + "\u0301" * 1000 + "x", "e" + "\u0301" * 3 + "x"),  # a flood of marks
        ("\u0301x", "x"),  # a mark may not sit on what stands before the text
        ("\u2764\ufe0f\u200d", "\u2764\\u200d"),  # a variation selector, a joiner
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),  # direction marks
        ("\u05d0\u05d1", "\u05d0\u05d1"),
        (b"\xff\xc3\xa9", "\\xff\u00e9"),
    ],
)
def test_text_from_the_network(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


TEXT = st.text(st.characters(), max_size=60) | st.text("a \x1b[]\u0301\u65e5\u05d0\u202e\ufe0f\U0001f600\t\r\n\x9b")


@given(TEXT, st.integers(1, 30))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    text = printable(text)
    lines = list(wrap(text, width))
    assert "".join(lines) == text
    assert all(cells(line) <= width or len(line) == 1 for line in lines)


EXCHANGES = st.builds(
    Exchange,
    tunnel=st.just("web"),
    method=TEXT,
    target=TEXT,
    started=st.floats(0, 1000),
    time=st.floats(0, 4e9),
    request_headers=st.lists(st.tuples(st.sampled_from([b"Cookie", b"X-A"]), st.binary(max_size=50)), max_size=3),
    response_headers=st.lists(st.tuples(st.just(b"Content-Type"), st.binary(max_size=50)), max_size=2),
    request_body=st.binary(max_size=100).map(bytearray),
    response_body=(st.binary(max_size=100) | TEXT.map(lambda text: text.encode("utf-8", "replace"))).map(bytearray),
    status=st.none() | st.integers(100, 599),
    reason=TEXT,
    bytes_in=st.integers(0, 10**15),
    bytes_out=st.integers(0, 10**15),
    error=TEXT,
    ended=st.none() | st.floats(1000, 1e7),
    answered=st.none() | st.floats(0, 1e7),
    round_trip=st.none() | st.floats(0, 100),
)
KEYS = st.lists(
    st.sampled_from([*Screen.MOVES, "enter", "escape", "right", "left", "1", "2", "3", "4", "s", "q", "/", "backspace"])
    | st.characters(),
    max_size=8,
)


@given(
    st.lists(EXCHANGES, max_size=4),
    KEYS,
    st.integers(1, 130) | st.just(40),
    st.integers(1, 40) | st.just(10),
    st.sampled_from(sorted(PALETTES)),
    TEXT,
)
def test_whatever_comes_the_screen_keeps_its_size_and_only_our_escapes_are_in_it(
    exchanges: list[Exchange], keys: list[str], width: int, height: int, colours: int, text: str
) -> None:
    log = ExchangeLog()
    for exchange in exchanges:
        log.begin(exchange)
    snap = snapshot(log, colours=colours, problem=text, retry_at=NOW + 3, tunnels=[("web", text, text)] * 2)
    snap.screen.notice = text
    lines = show(snap, width, height)
    for key in keys:
        assert len(lines) == height
        for line in lines:
            bare = SGR.sub("", line)
            assert bare.isprintable(), line
            assert cells(bare) <= width
        lines = show(snap, width, height, key)


# Keys


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"\x1b[A\x1bOB\x1b[1;5C", ["up", "down", "right"]),
        (b"\x1b[5~\x1b[6~\x1b[1~\x1b[F", ["page up", "page down", "home", "end"]),
        (b"\x1b[<64;10;5M\x1b[<65;1;1M\x1b[<0;1;1M\x1b[<0;1;1m", ["wheel up", "wheel down"]),
        (b"\r\n\t\x7f", ["enter", "enter", "right", "backspace"]),
        ("/é漢".encode(), ["/", "é", "漢"]),
        (b"\x1bq", ["escape", "q"]),
        (b"\x1b\x1b[A", ["escape", "up"]),
        (b"\x1b[999z\x1b[200~x", ["x"]),  # sequences that nobody knows
        (b"\xffx", ["\ufffd", "x"]),
    ],
)
def test_keys_sliced_anyhow(data: bytes, keys: list[str]) -> None:
    assert list(KeyReader().feed(data)) == keys
    reader = KeyReader()
    assert [key for byte in data for key in reader.feed(bytes([byte]))] == keys
    assert not reader.waiting


def test_an_escape_alone_is_a_key_once_nothing_follows() -> None:
    reader = KeyReader()
    assert list(reader.feed(b"\x1b")) == []
    assert reader.waiting
    assert list(reader.flush()) == ["escape"]
    assert list(reader.feed(b"\x1b[")) == []
    assert list(reader.flush()) == []
    assert list(reader.feed(b"A")) == ["A"]


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader_and_it_keeps_little(data: bytes) -> None:
    reader = KeyReader()
    for key in [*reader.feed(data), *reader.flush()]:
        assert key
    assert not reader.waiting


# What the user chooses


def shown(snap: Snapshot, *keys: str, width: int = 80, height: int = 24) -> str:
    return plain(show(snap, width, height, *keys))


def more(log: ExchangeLog, count: int) -> None:
    for _ in range(count):
        log.begin(Exchange("web", "GET", "/", started=NOW, time=START))


def test_new_exchanges_come_on_top_until_the_user_scrolls() -> None:
    log = ExchangeLog()
    more(log, 50)
    snap = snapshot(log)
    screen = snap.screen
    show(snap)
    assert screen.selected == 50
    more(log, 1)
    snap = snap._replace(exchanges=list(log.exchanges.values()))
    show(snap)
    assert screen.selected == 51
    show(snap, 80, 24, "down")
    rows = plain(render(snap, 80, 24)).splitlines()
    more(log, 7)
    snap = snap._replace(exchanges=list(log.exchanges.values()))
    assert "7 new ↑" in shown(snap)
    assert screen.selected == 50
    assert plain(render(snap, 80, 24)).splitlines()[8:-1] == rows[8:-1]  # nothing has moved
    show(snap, 80, 24, "home")
    assert screen.selected == 58
    assert "new" not in shown(snap)
    assert screen.following


def test_moving_by_rows_and_pages_stays_within_what_there_is() -> None:
    log = ExchangeLog()
    more(log, 50)
    snap = snapshot(log)
    show(snap)
    rows = snap.screen.rows
    for keys, cursor in [
        (["end"], 49),
        (["down"], 49),
        (["page up"], 49 - rows + 1),
        (["up", "k", "j"], 49 - rows),
        (["home"], 0),
        (["wheel down"], 3),
        (["wheel up"], 0),
        (["up"], 0),
        (["page down", "page down"], 2 * (rows - 1)),
    ]:
        show(snap, 80, 24, *keys)
        assert snap.screen.cursor == cursor, keys
        assert snap.screen.above <= cursor < snap.screen.above + rows


def test_an_exchange_that_made_room_leaves_the_cursor_where_it_was() -> None:
    log = ExchangeLog()
    more(log, 50)
    snap = snapshot(log)
    show(snap, 80, 24, "end")
    gone = snap._replace(exchanges=snap.exchanges[10:])
    show(gone)
    assert gone.screen.cursor == 39
    show(snap._replace(exchanges=[]))
    assert snap.screen.exchange is None
    assert [snap.screen.key(key) for key in ("up", "down", "enter", "end")] == [None] * 4


def test_the_filter() -> None:
    snap = snapshot()
    text = shown(snap, "/", *"5xq", "backspace", "x")
    assert "/5xx" in text
    assert "/favicon" not in text
    assert "/api/report" in text
    assert "2 found, esc clears" in shown(snap, "enter")
    assert "/favicon" in shown(snap, "escape")
    assert "nothing fits the filter" in shown(snap, "/", *"no such")
    assert "/favicon" in shown(snap, "escape")
    assert "é" in shown(snap, "/", *"éq", "\x00")
    assert shown(snap, *["backspace"] * 9).splitlines()[-1].startswith(" /   5xx")


def test_what_keys_ask_for() -> None:
    snap = snapshot()
    show(snap)
    assert [snap.screen.key(key) for key in "qrce"] == ["quit", "replay", "copy", "export"]
    show(snap, 80, 24, "enter")
    assert [snap.screen.key(key) for key in "rceq"] == ["replay", "copy", "export", None]
    assert snap.screen.opened is None
    show(snap, 80, 24, "/")
    assert [snap.screen.key(key) for key in "qrce"] == [None] * 4
    assert snap.screen.filter == "qrce"


def test_the_details_and_their_tabs() -> None:
    snap = snapshot()
    text = shown(snap, *["down"] * 6, "enter")
    assert "https://web.t.example.com/webhooks/stripe?token=•••" in text
    assert "local service   150 ms" in text
    headers = shown(snap, "right")
    assert "Authorization: •••" in headers
    assert "Set-Cookie: •••" in headers
    assert "Bearer abc" in shown(snap, "s")
    assert "token=abc123" in shown(snap)
    assert '"type": "invoice.paid"' in shown(snap, "right")
    assert '"ok": true' in shown(snap, "4")
    assert "URL" in shown(snap, "right")
    assert "requests" in shown(snap, "escape")


def test_details_scroll_and_stay_open_when_their_exchange_makes_room() -> None:
    log = ExchangeLog()
    exchange = Exchange("web", "POST", "/", started=NOW)
    log.begin(exchange)
    log.receive(exchange, b"".join(b"line %d\n" % n for n in range(100)), NOW)
    snap = snapshot(log)
    assert "line 0\n" in shown(snap, "enter", "3") + "\n"
    assert "line 99" in shown(snap, "end")
    last = snap.screen.scroll
    assert "line 99" in shown(snap, "down", "down")
    assert snap.screen.scroll == last
    assert "line 99" not in shown(snap, "up", "up")
    assert "line 0\n" in shown(snap._replace(exchanges=[]), "home")


def test_a_replay_is_selected_and_opens_where_details_are_open() -> None:
    snap = snapshot()
    show(snap, 80, 24, "end", "enter")
    snap.screen.select(snap.exchanges[4])
    assert "/webhooks/stripe" in shown(snap)
