"""The terminal view: what it shows, as text; its keys; and in a real terminal, which it leaves as it was."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import PROGRAM, RawOrigin, Tunnel, WaitFailed, eventually
from wcwidth import wcwidth

import pytunnel
from pytunnel import (
    PALETTES,
    Exchange,
    ExchangeLog,
    KeyReader,
    Note,
    ResponseHead,
    Screen,
    Snapshot,
    Terminal,
    TunnelClient,
    colours,
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
        exchange.request_head = b"\0".join([b"", b"", b"Host", b"web.t.example.com", b"Authorization", b"Bearer abc"])
        log.begin(exchange)
        if method == "POST":
            log.receive(exchange, b'{"id":"evt_1","type":"invoice.paid","data":{"amount":4200}}', exchange.started)
        if status:
            headers = [(b"Content-Type", b"application/json"), (b"Set-Cookie", b"session=secret")]
            exchange.answered = exchange.started + seconds * 0.8
            head = ResponseHead(status, b"OK" if status == 200 else b"", headers)
            log.respond(exchange, head, head.encode())
            log.send(exchange, b'{"ok":true}'.ljust(size)[:size], exchange.started)
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


TWO = [("web", "https://web.t.example.com", "localhost:3000"), ("api", "https://api.t.example.com", "localhost:8080")]
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


# Golden screens, without colours

TABLE_80x24 = """\
 ● connected  23 ms                             inspector http://127.0.0.1:4040
 https://web.t.example.com → localhost:3000

 11 requests  1 in flight   2xx 6  3xx 1  4xx 1  5xx 2   p50 31 ms  p90 1.31 s
 in 59 B  out 208 KiB

 Time      Status  Method   Duration      Size  Path
 10:19:14  500     GET        402 ms   2.0 KiB  /api/search?q=caf%C3%A9
 10:19:09  …       PUT        8.00 s       0 B  /api/files/holiday.mp4
 10:19:05  200     GET        1.31 s  50.8 KiB  /日本語/ページ
 10:18:56  502     GET          0 ms       0 B  /api/report  nothing listens on…
 10:18:47  204     DELETE      22 ms       0 B  /api/users/17
 10:18:32  200     GET         83 ms   9.0 KiB  /api/users?page=2&per_page=50
 10:18:16  200     POST       187 ms      15 B  /webhooks/stripe?token=•••
 10:17:43  404     GET          6 ms     153 B  /favicon.ico
 10:17:42  304     GET          4 ms       0 B  /static/style.css
 10:17:42  200     GET         31 ms   145 KiB  /static/app.js
 10:17:42  200     GET         12 ms   1.8 KiB  /





 q quit   ↵ open   / filter   r replay   c copy URL   e export   ↑↓ select
"""

TABLE_40x10 = """\
 ● reconnecting in 3 s: no route to host
 https://web.t.example.com → localhost:…
 11 requests  1 in flight
 500    GET       402 ms /api/search?q=…
 …      PUT       8.00 s /api/files/hol…
 200    GET       1.31 s /日本語/ページ
 502    GET         0 ms /api/r…  nothi…
 204    DELETE     22 ms /api/users/17
 200    GET        83 ms /api/users?pag…
 q quit   ↵ open   / filter   r replay
"""

TABLE_120x30 = """\
 ● connected  23 ms                                                                     inspector http://127.0.0.1:4040
 https://web.t.example.com → localhost:3000
 https://api.t.example.com → localhost:8080

 11 requests  1 in flight   2xx 6  3xx 1  4xx 1  5xx 2   p50 31 ms  p90 1.31 s   in 59 B  out 208 KiB

 Time      Status  Method   Duration      Size  Tunnel        Path
 10:19:14  500     GET        402 ms   2.0 KiB  web           /api/search?q=caf%C3%A9
 10:19:09  …       PUT        8.00 s       0 B  web           /api/files/holiday.mp4
 10:19:05  200     GET        1.31 s  50.8 KiB  web           /日本語/ページ
 10:18:56  502     GET          0 ms       0 B  web           /api/report  nothing listens on localhost:3000
 10:18:47  204     DELETE      22 ms       0 B  web           /api/users/17
 10:18:32  200     GET         83 ms   9.0 KiB  web           /api/users?page=2&per_page=50
 10:18:16  200     POST       187 ms      15 B  web           /webhooks/stripe?token=•••
 10:17:43  404     GET          6 ms     153 B  web           /favicon.ico
 10:17:42  304     GET          4 ms       0 B  web           /static/style.css
 10:17:42  200     GET         31 ms   145 KiB  web           /static/app.js
 10:17:42  200     GET         12 ms   1.8 KiB  web           /











 q quit   ↵ open   / filter   r replay   c copy URL   e export   ↑↓ select   s secrets
"""

DETAILS_80x24 = """\
 200 OK  POST /webhooks/stripe?token=•••
 Info  Headers  Body  Response

 URL       https://web.t.example.com/webhooks/stripe?token=•••
 Target    web → localhost:3000
 Time      2025-07-22 10:18:16
 Number    5
 Content   request 59 B, response 15 B
 Duration  187 ms
   server        0 ms
   link         23 ms  ██████
   local       150 ms  ████████████████████████████████████████
   content      37 ms  ██████████










 q back   tab next   ↑↓ scroll   r replay   c copy as curl   e export
"""

HEADERS_40x10 = """\
 200 OK  POST /webhooks/stripe?token=•••
 Info  Headers  Body  Response

 Request
 Host           web.t.example.com
 Authorization  •••

 Response
 Content-Type  application/json
 q back   tab next   ↑↓ scroll
"""


@pytest.mark.parametrize(
    ("golden", "width", "height", "keys", "fields"),
    [
        (TABLE_80x24, 80, 24, [], {}),
        (TABLE_40x10, 40, 10, ["down"] * 3, {"problem": "no route to host", "retry_at": NOW + 2.2}),
        (TABLE_120x30, 120, 30, [], {"tunnels": TWO}),
        (DETAILS_80x24, 80, 24, [*["down"] * 6, "enter"], {}),
        (HEADERS_40x10, 40, 10, [*["down"] * 6, "enter", "right"], {}),
    ],
)
@pytest.mark.parametrize("number", sorted(PALETTES))
def test_golden_screens(
    golden: str, width: int, height: int, keys: list[str], fields: dict[str, Any], number: int
) -> None:
    text = plain(show(snapshot(colours=number, **fields), width, height, *keys))
    assert text.rstrip("\n") + "\n" == golden


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (0, " 10:17:43  404     GET          6 ms     153 B  /favicon.ico"),
        (16, " ^[2m10:17:43^[m  ^[33m404   ^[m  GET          6 ms  ^[2m   153 B^[m  /favicon.ico"),
        (256, " ^[38;5;244m10:17:43^[m  ^[38;5;166m404   ^[m  GET          6 ms  ^[38;5;244m   153 B^[m  /favicon.ico"),
    ],
)
def test_a_line_in_each_number_of_colours(number: int, line: str) -> None:
    assert line.replace("^", "\x1b") in show(snapshot(colours=number))


def test_the_selected_line_is_reversed_whatever_the_colours() -> None:
    for number in PALETTES:
        selected = [line for line in show(snapshot(colours=number)) if line.startswith("\x1b[7m")]
        assert [SGR.sub("", line).split()[-1] for line in selected] == ["/api/search?q=caf%C3%A9"]
        assert cells(SGR.sub("", selected[0])) == 80


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




def heads(*names: bytes) -> st.SearchStrategy[bytes]:
    """Encoded heads with fields of these names and any values."""
    values = st.binary(max_size=50).map(lambda value: value.replace(b"\0", b" "))
    fields = st.lists(st.tuples(st.sampled_from(names), values), max_size=3)
    return fields.map(lambda fields: b"\0".join([b"", b"", *itertools.chain.from_iterable(fields)]))


EXCHANGES = st.builds(
    Exchange,
    tunnel=st.just("web"),
    method=TEXT,
    target=TEXT,
    started=st.floats(0, 1000),
    time=st.floats(0, 4e9),
    request_head=heads(b"Cookie", b"X-A"),
    response_head=heads(b"Content-Type"),
    request_body=st.binary(max_size=100).map(bytearray),
    response_body=(st.binary(max_size=100) | TEXT.map(lambda text: text.encode("utf-8", "replace"))).map(bytearray),
    status=st.none() | st.integers(100, 599),
    reason=TEXT,
    bytes_in=st.integers(0, 10**15),
    bytes_out=st.integers(0, 10**15),
    error=TEXT,
    answered=st.none() | st.floats(1000, 2000),  # after the start, before the end: the clock is monotonic
    ended=st.none() | st.floats(2000, 1e7),
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


def test_no_character_takes_more_cells_than_it_is_given() -> None:
    every = filter(str.isprintable, map(chr, range(sys.maxunicode + 1)))
    assert [char for char in every if cells(char) > pytunnel.width_of(char)] == []


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
    assert not list(reader.flush())


def test_an_escape_alone_is_a_key_once_nothing_follows() -> None:
    reader = KeyReader()
    assert list(reader.feed(b"\x1b")) == []
    assert list(reader.flush()) == ["escape"]
    assert list(reader.feed(b"\x1b[")) == []
    assert list(reader.flush()) == []
    assert list(reader.feed(b"A")) == ["A"]


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader_and_it_keeps_little(data: bytes) -> None:
    reader = KeyReader()
    for key in [*reader.feed(data), *reader.flush()]:
        assert key
    assert not list(reader.flush())


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


@pytest.mark.parametrize("how", [["enter", "escape"], ["escape"], ["enter", "down", "escape"], [*["backspace"] * 3]])
def test_after_a_filter_the_newest_is_selected(how: list[str]) -> None:
    """Also those that come then: who has cleared a filter watches what happens."""
    snap = snapshot()
    show(snap, 80, 24, "end", "/", *"2xx", "down", *how)
    assert snap.screen.filter == ""
    assert snap.screen.exchange is snap.exchanges[-1]
    more(snap.log, 3)
    snap = snap._replace(exchanges=list(snap.log.exchanges.values()))
    text = shown(snap)
    assert snap.screen.exchange is snap.exchanges[-1] and snap.screen.following
    assert " new ↑" not in text


def test_s_shows_the_secrets_of_a_body() -> None:
    """Of a form and of JSON, sent and received, and hides them again."""
    log = ExchangeLog()
    fields = [b"Content-Type", b"application/x-www-form-urlencoded"]
    exchange = Exchange("web", "POST", "/login", started=NOW, request_head=b"\0".join([b"", b"", *fields]))
    log.begin(exchange)
    log.receive(exchange, b"email=jo&user%5Bpassword%5D=hunter2", NOW)
    head = ResponseHead(200, b"OK", [(b"Content-Type", b"application/json")])
    log.respond(exchange, head, head.encode())
    log.send(exchange, b'{"access_token":"hush","name":"Jo"}', NOW)
    log.finish(exchange, NOW)
    snap = snapshot(log)
    text = shown(snap, "enter", "3")
    assert "email = jo" in text and "user[password] = •••" in text and "hunter2" not in text
    assert "user[password] = hunter2" in shown(snap, "s")
    assert '"access_token": "hush"' in shown(snap, "4")
    text = shown(snap, "s")
    assert '"access_token": "•••"' in text and '"name": "Jo"' in text and "hush" not in text
    assert "hunter2" not in shown(snap, "3")


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
    assert "local       150 ms" in text
    headers = shown(snap, "right")
    assert re.search(r"Authorization +•••\n", headers)
    assert re.search(r"Set-Cookie +•••\n", headers)
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


def test_the_messages_of_a_websocket() -> None:
    log = ExchangeLog()
    exchange = Exchange("web", "GET", "/ws", started=NOW)
    log.begin(exchange)
    exchange.notes = Note(0.25, True, "text", 5, b"hello"), Note(1.5, False, "close 1001", 2, b"")
    text = shown(snapshot(log), "enter", "4")
    assert "    250 ms →      5 B  hello\n" in text
    assert "    1.50 s ←      2 B  close 1001" in text


def test_a_replay_is_selected_and_opens_where_details_are_open() -> None:
    snap = snapshot()
    show(snap, 80, 24, "end", "enter")
    snap.screen.select(snap.exchanges[4])
    assert "/webhooks/stripe" in shown(snap)


# In a real terminal: tmux

DRIVER = """
import asyncio, sys, pytunnel
from pytunnel import Target, Terminal, Tunnel, TunnelClient

server, token, target, crash = sys.argv[1:]
draw = pytunnel.render

def render(snapshot, *size):
    if crash == "view" and snapshot.log.total:
        raise RuntimeError("the view breaks")
    return draw(snapshot, *size)

def on_event(event, **fields):
    if crash == "loop" and event == "request":
        main.cancel("the program breaks")
    if crash == "exit" and event == "request":
        sys.exit("the program breaks off")

async def run():
    global main
    client = TunnelClient(server, token, [Tunnel("web", Target.parse(target))], on_event=on_event)
    async with Terminal(client, client.stop, inspector_url="http://127.0.0.1:4040"):
        with pytunnel._signals(lambda *_: client.stop()):
            main = asyncio.ensure_future(client.run())
            await main

pytunnel.render = render
asyncio.run(run())
"""


class Tmux:
    """A terminal of its own, with a shell in it."""

    def __init__(self, directory: Path, width: int = 80, height: int = 24) -> None:
        self._command = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        self._environment = {
            **{"PATH": os.environ["PATH"], "HOME": str(directory), "PS1": "shell$ ", "LC_ALL": "C.UTF-8"},
            **{"PYTHONPATH": str(PROGRAM.parent), "TERM": "xterm-256color", "HISTFILE": ""},
        }
        self._directory = directory
        size = ["-x", str(width), "-y", str(height)]
        self.run("new-session", "-d", *size, "bash", "--norc", "--noprofile", "-i")

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [*self._command, *words], env=self._environment, cwd=self._directory, capture_output=True, timeout=20
        )
        assert not done.returncode, done.stderr
        return done.stdout.decode()

    def keys(self, *names: str) -> None:
        """Press keys by tmux's names."""
        self.run("send-keys", *names)

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", text)

    def text(self) -> str:
        return self.run("capture-pane", "-p")

    async def until(self, predicate: Callable[[str], object]) -> str:
        """Return the text on the screen, once it is as it should be."""
        last = ""

        def look() -> bool:
            nonlocal last
            last = self.text()
            return bool(predicate(last))

        try:
            await eventually(look, timeout=20.0)
        except WaitFailed as error:
            error.add_note(last)
            raise
        return last

    async def sees(self, text: str) -> str:
        return await self.until(lambda screen: text in screen)

    def modes(self) -> str:
        """Alternate screen, cursor, mouse and wrapping."""
        return self.run("display", "-p", "#{alternate_on} #{cursor_flag} #{mouse_any_flag} #{wrap_flag}").strip()

    async def restored(self) -> str:
        """Wait for the shell, with a terminal as it was before; return what it shows."""
        await eventually(lambda: self.modes() == "0 1 0 1", timeout=20.0, what="the terminal's modes")
        await self.sees("shell$")
        self.type("clear; stty -a\n")
        settings = await self.sees("icanon")
        assert not {"-icanon", "-echo", "-isig", "-ixon", "-opost"} & set(settings.split())
        return settings


@pytest.fixture
def tmux() -> Iterator[Tmux]:
    # not tmp_path: a socket's path may not be long; and the shell may still write when its terminal goes
    with tempfile.TemporaryDirectory(prefix="pytunnel-test-", ignore_cleanup_errors=True) as directory:
        terminal = Tmux(Path(directory))
        yield terminal
        terminal.run("kill-server")


class Shown:
    """A tunnel whose client has its view in a tmux."""

    def __init__(self, tunnel: Tunnel, tmux: Tmux, origin: RawOrigin) -> None:
        self.tunnel, self.tmux, self.origin = tunnel, tmux, origin

    def start(self, crash: str = "", before: str = "") -> None:
        words = [sys.executable, "-c", DRIVER, self.tunnel.server_url, self.tunnel.token]
        words += [f"127.0.0.1:{self.origin.port}", crash]
        script = self.tmux._directory / "start"
        script.write_text(f"{before}\nexec {shlex.join(words)}\n")
        self.tmux.type(f"clear; sh {script}\n")

    async def get(self, path: str = "/", status: int = 200) -> None:
        response = await self.tunnel.get(path.encode())
        assert response.status == status


@pytest.fixture
async def view(tmux: Tmux) -> AsyncIterator[Shown]:
    body = b'{"hello": "world"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n"
    async with RawOrigin(answer + body) as origin, Tunnel(origin.port) as tunnel:
        tunnel.client.send_signal(signal.SIGTERM)
        await tunnel.client.wait()
        shown = Shown(tunnel, tmux, origin)
        yield shown


async def started(view: Shown, crash: str = "", before: str = "") -> Tmux:
    view.start(crash, before)
    await view.tmux.sees("● connected")
    return view.tmux


async def test_the_view_from_start_to_end(view: Shown) -> None:
    tmux = await started(view)
    assert "no requests yet" in await tmux.sees("http://web.")
    assert tmux.modes() == "1 0 1 0"
    for number in range(40):
        await view.get(f"/{number}")
    assert "40 requests" in await tmux.sees("/39")
    tmux.keys("Down", "Enter")
    await tmux.sees("/38")
    tmux.keys("4")
    await tmux.sees('"hello": "world"')
    tmux.keys("Escape")
    assert "/39" in await tmux.sees("q quit")
    await view.get("/new")
    assert "/new" not in await tmux.sees("1 new ↑")
    tmux.keys("End")
    assert "/39" not in await tmux.until(lambda text: "  /0\n" in text)
    tmux.keys("Home")
    await tmux.sees("/new")
    tmux.type("/30")
    await tmux.sees("/30")
    tmux.keys("Enter")
    assert "/31" not in await tmux.sees("1 found, esc clears")
    tmux.keys("Escape")
    await tmux.sees("/new")
    tmux.keys("q")
    await tmux.restored()


async def test_the_mouse_wheel_and_text_of_all_the_world_in_the_filter(view: Shown) -> None:
    tmux = await started(view)
    for number in range(40):
        await view.get(f"/{number}")
    await tmux.sees("/39")
    tmux.type("\x1b[<65;10;5M" * 13)
    await tmux.sees("  /0\n")
    tmux.type("\x1b[<64;10;5M" * 13)
    await tmux.sees("/39")
    tmux.type("/grün漢")
    await tmux.until(lambda text: "/grün漢" in text and "nothing fits" in text)


@pytest.mark.parametrize(("width", "height"), [(40, 10), (120, 30), (20, 5), (1, 1)])
async def test_sizes(view: Shown, width: int, height: int) -> None:
    tmux = await started(view)
    await view.get("/first")
    await tmux.sees("/first")
    tmux.run("resize-window", "-x", str(width), "-y", str(height))
    if width >= 40:
        await tmux.until(lambda text: text.count("\n") == height and "q quit" in text.splitlines()[-1])
    await view.get("/second")
    tmux.run("resize-window", "-x", "80", "-y", "24")
    await tmux.until(lambda text: "/second" in text and "inspector http://127.0.0.1:4040\n" in text.splitlines(True)[0])
    tmux.keys("q")
    await tmux.restored()


async def test_control_backslash_leaves_the_terminal_sound(view: Shown) -> None:
    """Its signal would end the process on the spot, with the terminal in disorder."""
    tmux = await started(view)
    tmux.keys("C-\\", "C-\\")
    await view.get("/after")
    await tmux.sees("/after")
    assert tmux.modes() == "1 0 1 0"
    tmux.keys("q")
    settings = await tmux.restored()
    assert "quit = ^\\" in settings


def typed(view: Shown, *words: str, before: str = "") -> None:
    """Have the shell run the command line's `connect`, by a program that starts it."""
    target = f"127.0.0.1:{view.origin.port}"
    flags = ["--server", view.tunnel.server_url, "--token", view.tunnel.token, "--name", "plain"]
    script = view.tmux._directory / "start"
    script.write_text(f"{before}\nexec {shlex.join([sys.executable, *words, 'connect', target, *flags])}\n")
    view.tmux.type(f"clear; sh {script}\n")


async def visit_plain(view: Shown, path: str) -> None:
    view.tunnel.host = b"plain.localhost"
    await view.get(path)


@pytest.mark.parametrize("before", ["TERM=dumb; export TERM", "CI=1; export CI"])
async def test_where_no_view_can_be_are_plain_lines(view: Shown, before: str) -> None:
    typed(view, str(PROGRAM), before=before)
    tmux = view.tmux
    await tmux.until(lambda text: text.count("http://plain.localhost:") == 2)  # stdout's and stderr's
    await visit_plain(view, "/line")
    await tmux.sees("200 GET     /line")
    assert tmux.modes() == "0 1 0 1"
    assert not set(re.findall(r"\x1b\[([0-9;]*)m", tmux.run("capture-pane", "-e", "-p")))
    tmux.keys("C-c")
    await tmux.restored()


BROKEN_VIEW = """
import sys, pytunnel
draw = pytunnel.render
def render(snapshot, *size):
    if snapshot.log.total:
        raise RuntimeError("the view breaks")
    return draw(snapshot, *size)
pytunnel.render = render
sys.exit(pytunnel.main())
"""


async def test_a_view_that_fails_gives_its_lines_back(view: Shown) -> None:
    """The tunnel goes on, and tells on stderr what the view would have shown."""
    script = view.tmux._directory / "broken.py"
    script.write_text(BROKEN_VIEW)
    typed(view, str(script))
    tmux = view.tmux
    await tmux.sees("● connected")
    await visit_plain(view, "/breaks")
    await tmux.sees("RuntimeError: the view breaks")
    assert tmux.modes() == "0 1 0 1"
    await visit_plain(view, "/next")
    await tmux.sees("200 GET     /next")
    view.origin._handler = lambda *_: asyncio.Event().wait()  # type: ignore
    slow = asyncio.ensure_future(visit_plain(view, "/slow"))
    await view.origin.wait_for(lambda: [r for r in view.origin.requests if r.target == b"/slow"])
    tmux.keys("C-c")
    await tmux.sees("finishing what still runs (1); once more to stop now")
    tmux.keys("C-c")
    await tmux.restored()
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


async def test_a_lost_link_and_the_way_back(view: Shown) -> None:
    tmux = await started(view)
    await view.tunnel.stop_server()
    await tmux.sees("reconnecting in")
    await view.tunnel.start_server()
    await tmux.sees("● connected")


@pytest.mark.parametrize("how", ["C-c", "SIGTERM", "SIGHUP"])
async def test_signals_leave_the_terminal_as_it_was(view: Shown, how: str) -> None:
    tmux = await started(view)
    if how == "C-c":
        tmux.keys(how)
    else:
        tmux.run("run-shell", f"kill -{how[3:]} $(ps -o pid= --ppid #{{pane_pid}})")
    await tmux.restored()


@pytest.mark.parametrize("crash", ["loop", "view"])
async def test_a_crash_leaves_the_terminal_as_it_was(view: Shown, crash: str) -> None:
    tmux = await started(view, crash)
    await view.get()
    await tmux.sees("breaks")
    if crash == "view":  # but the tunnel goes on
        assert tmux.modes() == "0 1 0 1"
        await view.get("/still")
        tmux.keys("C-z")
        await tmux.restored()
        tmux.type("clear; fg\n")
        await tmux.sees("start\n")
        await view.get("/still")
        assert tmux.modes() == "0 1 0 1"
        tmux.keys("C-c")
    await tmux.restored()


async def test_an_exit_in_the_middle_leaves_the_terminal_as_it_was(view: Shown) -> None:
    tmux = await started(view, "exit")
    visit = asyncio.ensure_future(view.get())
    await tmux.restored()
    visit.cancel()
    await asyncio.gather(visit, return_exceptions=True)


async def test_suspended_and_continued(view: Shown) -> None:
    tmux = await started(view)
    tmux.keys("C-z")
    await tmux.restored()
    tmux.type("fg\n")
    await tmux.sees("● connected")
    assert tmux.modes() == "1 0 1 0"
    tmux.keys("C-z")
    await tmux.restored()
    tmux.type("clear; bg\n")  # it runs, and leaves the terminal alone
    await tmux.sees("start &")
    await view.get("/behind")
    assert tmux.modes() == "0 1 0 1"
    tmux.type("fg\n")
    await tmux.sees("/behind")
    tmux.keys("q")
    await tmux.restored()


async def test_the_end_waits_for_what_still_runs_until_q_comes_again(view: Shown) -> None:
    view.origin._handler = lambda *_: asyncio.Event().wait()  # type: ignore
    tmux = await started(view)
    visit = asyncio.ensure_future(view.get("/slow"))
    await tmux.sees("/slow")
    tmux.keys("q")
    await tmux.sees("finishing what still runs (1); q again to stop now")
    tmux.keys("q")
    await tmux.restored()
    visit.cancel()
    await asyncio.gather(visit, return_exceptions=True)


async def test_replay(view: Shown) -> None:
    tmux = await started(view)
    await view.get("/first")
    await view.get("/second")
    await tmux.sees("/second")
    tmux.keys("Down", "r")
    await tmux.sees("↻ /first")
    assert [request.target for request in view.origin.requests] == [b"/first", b"/second", b"/first"]


async def test_the_clipboard(view: Shown) -> None:
    tmux = view.tmux
    tmux.run("set", "-s", "set-clipboard", "on")
    await started(view)
    tmux.keys("c")
    await tmux.sees("copied http")
    await eventually(lambda: tmux.run("list-buffers"))
    assert tmux.run("show-buffer").startswith("http://web.")
    await view.tunnel.get(b"/secret?token=abc", [(b"Cookie", b"a=b")])
    await tmux.sees("/secret")
    tmux.keys("Enter", "c")
    await tmux.sees("copied as curl, without secrets")
    command = await eventually(lambda: (text := tmux.run("show-buffer")).startswith("curl") and text)
    assert "'Cookie: •••'" in str(command)
    assert "abc" not in str(command)


async def test_the_export(view: Shown) -> None:
    tmux = await started(view)
    for path in ("/one", "/two", "/three"):
        await view.get(path)
    await tmux.sees("/three")
    tmux.keys("e")
    await tmux.sees("exported 3 to pytunnel-")
    tmux.type("/two\n")
    await tmux.sees("1 found")
    tmux.keys("e")
    await tmux.sees("exported 1 to pytunnel-")
    files = sorted(tmux._directory.glob("pytunnel-*.har"), key=lambda path: path.stat().st_mtime_ns)
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]
    entries = [json.loads(file.read_text())["log"]["entries"] for file in files]
    assert [[entry["request"]["url"].rpartition("/")[2] for entry in each] for each in entries] == [
        ["one", "two", "three"],
        ["two"],
    ]


async def test_no_colours(view: Shown) -> None:
    tmux = await started(view, before="export NO_COLOR=1")
    await view.get("/first")
    await tmux.sees("/first")
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", tmux.run("capture-pane", "-e", "-p")))
    assert codes <= {"", "0", "1", "7", "39", "49"}


# When it draws


class Recorder:
    """Stands in for the terminal."""

    poll = None
    foreground = True

    def __init__(self, on_input: Callable[[bytes], None], on_ready: Callable[[], None]) -> None:
        self.press, self.drained = on_input, on_ready
        self.active, self.ready = False, True
        self.writes: list[tuple[float, str]] = []

    def size(self) -> os.terminal_size:
        return os.terminal_size((80, 24))

    def enter(self) -> None:
        self.active = True

    def leave(self) -> None:
        self.active = False

    close = leave

    def write(self, text: str) -> None:
        self.writes.append((asyncio.get_running_loop().time(), text))


def asleep(terminal: Terminal) -> bool:
    """Whether it waits for a change, and for no time."""
    timers = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]  # type: ignore
    return bool(terminal._wake._waiters) and not terminal._wake.is_set() and not timers  # type: ignore


@pytest.fixture
async def recorded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Terminal, Recorder, TunnelClient]]:
    monkeypatch.setattr(pytunnel, "TerminalDevice", Recorder)
    client = TunnelClient("http://127.0.0.1:1", "token", [pytunnel.Tunnel("web", pytunnel.Target.parse("3000"))])
    async with Terminal(client, client.stop) as terminal:
        yield terminal, cast(Recorder, terminal._device), client


async def idle(terminal: Terminal) -> None:
    await eventually(lambda: asleep(terminal))


async def test_nothing_is_drawn_and_no_timer_runs_when_nothing_changes(
    recorded: tuple[Terminal, Recorder, TunnelClient],
) -> None:
    terminal, device, client = recorded
    await idle(terminal)
    assert len(device.writes) == 1
    client.log.touch()  # but nothing that shows has changed
    await idle(terminal)
    assert len(device.writes) == 1
    exchange = Exchange("web", "GET", "/", started=asyncio.get_running_loop().time())
    client.log.begin(exchange)
    assert terminal._until_next() == 1.0  # the time of what is in flight goes on
    count = len(device.writes)
    await eventually(lambda: len(device.writes) > count + 1)
    client.log.finish(exchange, asyncio.get_running_loop().time())
    client.retry_at = asyncio.get_running_loop().time() + 60.0
    assert terminal._until_next() == 1.0  # as does a countdown
    client.retry_at = None
    await idle(terminal)


async def test_nothing_of_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytunnel, "TerminalDevice", Recorder)
    client = TunnelClient("http://127.0.0.1:1", "token", [pytunnel.Tunnel("web", pytunnel.Target.parse("3000"))])
    numbers = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
    before = set(client.log.listeners), [signal.getsignal(number) for number in numbers], asyncio.all_tasks()
    async with Terminal(client, client.stop):
        assert client.log.listeners != before[0]
    after = set(client.log.listeners), [signal.getsignal(number) for number in numbers], asyncio.all_tasks()
    assert after == before


async def test_ten_frames_a_second_at_most(recorded: tuple[Terminal, Recorder, TunnelClient]) -> None:
    _, device, client = recorded
    while len(device.writes) < 5:
        client.log.begin(Exchange("web", "GET", "/", started=0.0))
        await asyncio.sleep(0)
    times = [at for at, _ in device.writes]
    assert min(after - before for before, after in itertools.pairwise(times)) >= 0.1


async def test_nothing_is_drawn_while_the_terminal_does_not_read(
    recorded: tuple[Terminal, Recorder, TunnelClient],
) -> None:
    terminal, device, client = recorded
    await idle(terminal)
    device.ready = False
    for _ in range(3):
        client.log.begin(Exchange("web", "GET", "/late", started=0.0))
        client.log.finish(client.log.exchanges[client.log.total], 0.0)
        device.press(b"j")
        await idle(terminal)
    assert len(device.writes) == 1
    device.ready = True
    device.drained()
    await idle(terminal)
    assert len(device.writes) == 2
    assert "3 requests" in SGR.sub("", device.writes[1][1])


async def test_a_notice_goes_by_itself(recorded: tuple[Terminal, Recorder, TunnelClient]) -> None:
    terminal, device, _ = recorded
    await idle(terminal)
    terminal.notice("look\x1b[2J")
    await eventually(lambda: "look\\x1b[2J" in device.writes[-1][1])
    wait = terminal._until_next()
    assert wait is not None
    assert wait <= pytunnel.NOTICE
    terminal._notice_until = 0.0  # instead of waiting for it
    terminal._wake.set()
    await idle(terminal)
    assert len(device.writes) == 3
    assert "q quit" in SGR.sub("", device.writes[-1][1])


async def test_escape_alone_and_a_sequence_in_two_reads(
    recorded: tuple[Terminal, Recorder, TunnelClient],
) -> None:
    terminal, device, client = recorded
    for _ in range(3):
        client.log.begin(exchange := Exchange("web", "GET", "/", started=0.0))
        client.log.finish(exchange, 0.0)
    await idle(terminal)
    device.press(b"\x1b")
    device.press(b"[B\r")
    await idle(terminal)
    assert terminal._screen.opened is client.log.exchanges[2]
    device.press(b"\x1b")
    await idle(terminal)
    assert terminal._screen.opened is None


async def test_a_terminal_that_stops_reading_stops_neither_traffic_nor_end(view: Shown) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    words = [sys.executable, "-c", DRIVER, view.tunnel.server_url, view.tunnel.token]
    words += [f"127.0.0.1:{view.origin.port}", ""]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROGRAM.parent), "TERM": "xterm"}
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 200, 200, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *words, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.set_blocking(master, False)
    shown = bytearray()

    def reads(test: Callable[[bytes], bool]) -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(master, 65536))
        return test(shown)

    try:
        await eventually(lambda: reads(lambda text: b"connected" in text), timeout=20.0)
        shown.clear()
        process.send_signal(signal.SIGTSTP)  # which does nothing where no shell could continue it
        for number in range(300):  # some hundred kilobytes on the screen; nobody reads a byte of it
            await view.get(f"/{'x' * 150}/{number}")
        process.terminate()
        async with asyncio.timeout(20.0):
            assert await process.wait() == 0
        await eventually(lambda: reads(lambda text: text.endswith(b"\x1b[?1049l")))
        assert len(shown) < 60_000
        assert termios.tcgetattr(slave) == before
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(master)
        os.close(slave)


# Colours


def contrast(rgb: tuple[int, ...]) -> float:
    """The lower of the contrasts to black and to white (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb)]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05)


def test_colours_are_readable_on_dark_and_light() -> None:
    for code in PALETTES[256].values():
        if match := re.fullmatch(r"38;5;(\d+)", code):
            index = int(match[1])
            levels = (0, 95, 135, 175, 215, 255)
            cube = index - 16
            grey = (8 + 10 * (index - 232),) * 3
            rgb = grey if index >= 232 else (levels[cube // 36], levels[cube // 6 % 6], levels[cube % 6])
            assert contrast(rgb) > 3.8, code


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"TERM": "xterm"}, 16),
        ({"TERM": "xterm-256color"}, 256),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, 256),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, 0),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, 256),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, 0),
        ({}, 16),
    ],
)
def test_how_many_colours(environment: dict[str, str], number: int) -> None:
    assert colours(environment) == number
