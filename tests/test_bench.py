"""The benchmark's parts that measure nothing: what it reads, what it prints, and its router."""

from __future__ import annotations

import configparser
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench import contenders, loads, origin, report, router, rows, texts, where

import pytunnel

BENCH = Path(report.__file__).parent

WRK = """\
Running 1s test @ http://127.0.0.1:8080/small
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   380.41us  512.08us  12.31ms   92.11%
    Req/Sec    74.80k     3.12k   79.04k    70.00%
  Latency Distribution
     50%  371.00us
     75%  420.00us
     90%    1.02ms
     99%    1.50s
  82051 requests in 1.10s, 92.71MB read
"""
RATE = "Requests/sec:  74575.93\nTransfer/sec:     84.27MB\n"

# ---------------------------------------------------------------------------------------- Command


def run(*args: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark's command with that PATH."""
    env = {"PATH": path, "COLUMNS": "1000"}
    return subprocess.run([sys.executable, str(BENCH), *args], capture_output=True, text=True, env=env)


def test_the_help_names_every_row() -> None:
    text = run("--help", path=os.environ["PATH"]).stdout
    for name in (*rows.LOOPBACK, *rows.MEMORY, *rows.UPLINK, *rows.TEXTS, *rows.LONG_UPLOAD, *rows.LONG):
        assert f"{name}," in text or f"{name}\n" in text, name


def test_it_says_in_one_line_which_packages_are_missing() -> None:
    done = run("--short", path="/nonexistent")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: programs are missing: apt-get install [a-z2 -]*curl [a-z2 -]*wrk\n", done.stderr)


def test_a_row_that_is_not_there_is_an_error() -> None:
    done = run("--only", "nothing", path=os.environ["PATH"])
    assert done.returncode == 2
    assert "no such row; there are small-1, " in done.stderr


# ---------------------------------------------------------------------------------------- Load


def test_the_report_of_wrk_is_read() -> None:
    assert loads.parse_wrk(WRK + RATE) == loads.Wrk(74575.93, 0.371, 1500.0, 0)


@pytest.mark.parametrize(
    "said, milliseconds", [("12.31ms", 12.31), ("900.00us", 0.9), ("2.00s", 2000.0), ("1.10m", 66e3)]
)
def test_the_times_of_wrk_have_units(said: str, milliseconds: float) -> None:
    assert loads.parse_wrk(WRK.replace("1.50s", said) + RATE).p99 == pytest.approx(milliseconds)


def test_what_wrk_failed_at_is_counted() -> None:
    errors = "  Socket errors: connect 1, read 2, write 30, timeout 400\n  Non-2xx or 3xx responses: 5000\n"
    assert loads.parse_wrk(WRK + errors + RATE).failed == 5433


@pytest.mark.parametrize("text", ["", WRK, RATE, "unable to connect to 127.0.0.1:1 Connection refused"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a report of wrk"):
        loads.parse_wrk(text)


# ---------------------------------------------------------------------------------------- Report


def results() -> report.Results:
    """Two lines, one of them of what should be little."""
    made = report.Results()
    for rate, wait in ((100.0, 4.0), (90.0, 8.0), (120.0, 5.0)):
        made.add("ssh -R", "requests", "requests/s", rate)
        made.add("pytunnel", "requests", "requests/s", 3 * rate)
        made.add("ssh -R", "wait & <see>", "ms", wait, less=True)
        made.add("pytunnel", "wait & <see>", "ms", wait / 2, less=True)
    made.add("pytunnel", "late", "ms", 5.0, less=True)
    return made


def test_ratios_tell_how_much_better() -> None:
    lines = results().lines
    assert lines["requests"].ratio("pytunnel") == 3.0
    assert lines["wait & <see>"].ratio("pytunnel") == 2.0
    assert lines["late"].ratio("pytunnel") is None
    assert lines["requests"].ratio("frp") is None


def test_the_table_has_medians_spreads_and_ratios() -> None:
    table = report.table(results().lines.values(), ["ssh -R", "frp", "pytunnel"], ["pytunnel"], {"frp": "not found"})
    assert table.splitlines() == [
        "|  | unit | ssh -R | frp | pytunnel | pytunnel : ssh -R |",
        "| --- | --- | --: | --: | --: | --: |",
        "| requests | requests/s | 100 ±20% | not found | 300 ±20% | 3.00 × |",
        "| wait & <see> | ms | 5.00 ±60% | not found | 2.50 ±60% | 2.00 × |",
        "| late | ms |  | not found | 5.00 |  |",
    ]


@pytest.mark.parametrize("value, text", [(0.1234, "0.12"), (12.345, "12.3"), (123.4, "123"), (45678.9, "45,679")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_plot_is_well_formed_and_has_a_bar_for_each_ratio() -> None:
    made = results()
    root = ElementTree.fromstring(report.plot(made.lines.values(), ["pytunnel"], "Times better"))
    space = "{http://www.w3.org/2000/svg}"
    said = [element.text for element in root.iter(f"{space}text")]
    assert {"Times better", "pytunnel", "requests", "wait & <see>", "3.00 ×", "2.00 ×"} <= set(said)
    assert "late" not in said  # there is no ratio
    background, legend, *bars = [float(element.get("width", "")) for element in root.iter(f"{space}rect")]
    assert background == float(root.get("width", "")) and legend == 11
    assert bars[0] / bars[1] == pytest.approx(math.log(3) / math.log(2), rel=0.01)


def test_a_plot_without_any_ratio_is_a_plot() -> None:
    ElementTree.fromstring(report.plot([], [], "Nothing"))


def test_a_quantile_is_the_bound_below_which_it_lies() -> None:
    buckets = {0.001: 90, 0.005: 98, 0.02: 99, math.inf: 100}
    assert [report.quantile(buckets, share) for share in (0.5, 0.95, 0.99, 1.0)] == [0.001, 0.005, 0.02, math.inf]


# ---------------------------------------------------------------------------------------- Router


def arrivals(way: router.Way, times: list[float]) -> list[tuple[float, bytes]]:
    """What has arrived at each of these times."""
    found = []
    for now in times:
        while packet := way.take(now):
            found.append((now, packet))
    return found


def test_a_link_sends_one_packet_after_another_at_its_rate_and_after_its_delay() -> None:
    way = router.Way(rate=8000, delay=1.0)  # 1,000 bytes a second
    for name in (b"a", b"b"):
        way.put(name * 500, 10.0)
    assert way.due == 11.5
    assert arrivals(way, [11.25, 11.5, 11.75, 12.0]) == [(11.5, b"a" * 500), (12.0, b"b" * 500)]
    way.put(b"c" * 250, 20.0)  # the link has been idle, which earns nothing
    assert way.due == 21.25


def test_the_queue_drops_what_does_not_fit_and_no_more() -> None:
    way = router.Way(rate=8000, queue=1000)
    for name in (b"a", b"b", b"c"):
        way.put(name * 500, 0.0)
    assert way.dropped == 1
    way.put(b"d" * 500, 0.5)  # half of what waits has been sent
    assert way.dropped == 1
    assert [packet[:1] for _, packet in arrivals(way, [9.0])] == [b"a", b"b", b"d"]


def test_a_packet_always_fits_on_an_idle_link() -> None:
    way = router.Way(rate=8000, queue=100)
    way.put(b"x" * 1500, 0.0)
    assert not way.dropped


def test_a_way_without_limits_holds_nothing_up() -> None:
    way = router.Way()
    for number in range(1000):
        way.put(b"%d" % number, 5.0)
    assert [packet for _, packet in arrivals(way, [5.0])] == [b"%d" % number for number in range(1000)]
    assert way.due == math.inf


# ---------------------------------------------------------------------------------------- Origin


class Written(bytearray):
    """A transport that keeps what is written."""

    def write(self, data: bytes) -> None:
        self += data


def talk(size: int, *parts: bytes) -> bytes:
    """What the app answers to these parts when each comes in pieces of `size`."""
    app, transport = origin.App(), Written()
    made: Any = transport
    app.connection_made(made)
    for part in parts:
        for start in range(0, len(part), size):
            piece = part[start : start + size]
            app.get_buffer(-1)[: len(piece)] = piece
            app.buffer_updated(len(piece))
    return bytes(transport)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_the_app_answers_an_upload_once_it_has_come(size: int) -> None:
    before = origin.App.received
    head = b"PUT /upload HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    assert talk(size, head + b"x" * 999) == b""
    assert talk(size, head + b"x" * 1000) == origin.HEAD
    assert origin.App.received - before == 1999


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_the_app_sends_messages_back(size: int) -> None:
    upgrade = b"GET /ws HTTP/1.1\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    messages = [bytes([65 + n]) * origin.MESSAGE for n in range(5)]
    frames = b"".join(bytes([0x82, 0x80 | origin.MESSAGE, 0, 0, 0, 0]) + message for message in messages)
    head, _, rest = talk(size, upgrade, frames).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ") and head.endswith(b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    assert rest == b"".join(origin.SERVER_HEAD + message for message in messages)


def test_the_small_answer_is_a_kilobyte_of_json() -> None:
    assert len(contenders.small_json()) == 1024
    assert json.loads(contenders.small_json())["items"]


def test_the_texts_are_the_same_each_time_and_of_the_size_that_is_asked_for() -> None:
    answer = texts.api_answer(100_000)
    assert answer == texts.api_answer(100_000)
    assert 100_000 <= len(answer) < 110_000
    assert len(json.loads(answer)["data"]) > 50
    assert len(texts.page(50_000)) == 50_000


# ---------------------------------------------------------------------------------------- frp


def test_frp_is_told_the_same_in_both_of_its_languages() -> None:
    tunnels = {"files": 3000, "app": 3001}
    new = tomllib.loads(contenders._frpc_toml("10.0.0.1", 7000, tunnels))
    assert (new["serverAddr"], new["serverPort"]) == ("10.0.0.1", 7000)
    old = configparser.ConfigParser()
    old.read_string(contenders._frpc_ini("10.0.0.1", 7000, tunnels))
    assert dict(old["common"]) == {"server_addr": "10.0.0.1", "server_port": "7000", "login_fail_exit": "false"}
    assert new["loginFailExit"] is False
    for proxy in new["proxies"]:
        section = old[proxy["name"]]
        assert (proxy["type"], section["type"]) == ("http", "http")
        assert str(proxy["localPort"]) == section["local_port"] == str(tunnels[proxy["name"]])
        assert proxy["customDomains"] == [section["custom_domains"]] == [f"{proxy['name']}.bench"]


# ---------------------------------------------------------------------------------------- Where the microseconds go

PAGE = (BENCH.parent.parent / "README.md").read_text(encoding="utf-8").partition("### Where the microseconds go\n")[2]
TABLES = [
    [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()[2:]]
    for text in re.findall(r"(?:^\|.*\n)+", re.split(r"^##", PAGE, flags=re.MULTILINE)[0], re.MULTILINE)
]


@pytest.mark.parametrize("name", sorted({name for step in where.SMALL + where.DOWNLOAD for name in step.functions}))
def test_what_a_step_names_is_there(name: str) -> None:
    assert callable(where.function(name))
    assert f"\n# ---- {where.section(name)} ---" in Path(pytunnel.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("number, steps", list(enumerate((where.SMALL, where.DOWNLOAD))), ids=["small", "download"])
def test_the_page_has_the_steps_that_are_measured(number: int, steps: tuple[where.Step, ...]) -> None:
    rows = [row[:2] for row in TABLES[number] if not row[0].startswith("**")]
    assert rows == [[step.name, where.place(step)] for step in steps]


async def test_every_step_is_measured_on_the_sides_that_the_page_has() -> None:
    measured = await where.measure(2)
    for watch, lines, steps in zip(measured, TABLES, (where.SMALL, where.DOWNLOAD), strict=True):
        on_page = {
            (side, step)
            for step, line in zip(steps, lines, strict=False)
            for side, cell in zip(where.SIDES, line[2:], strict=True)
            if cell
        }
        assert set(watch.microseconds()) == on_page
