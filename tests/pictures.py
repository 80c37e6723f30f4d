"""The pictures of the README, made from sample data: `python tests/pictures.py`."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytunnel
from pytunnel import Exchange, Headers, Inspector, RequestHead, ResponseHead, Target, Tunnel, TunnelClient

NOON = 1_767_269_520.0  # when the samples happened, in seconds since 1970
AGENT = b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
INVOICE = {
    "id": "evt_1Q7fXr",
    "type": "invoice.paid",
    "livemode": False,
    "created": 1767269519,
    "data": {
        "object": {
            "id": "in_0001",
            "amount_paid": 4200,
            "currency": "eur",
            "customer_email": "jo@example.com",
            "lines": ["Basic plan × 3", "Discount"],
            "paid": True,
        }
    },
}


def png(width: int, height: int) -> bytes:
    """Return a picture of a sunset, in true colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = bytearray()
    for y in range(height):
        rows.append(0)
        for x in range(width):
            sun = (x - width * 0.62) ** 2 + (y - height * 0.55) ** 2 < (height * 0.2) ** 2
            rows += bytes((255, 214, 120) if sun else (40 + 190 * y // height, 40 + 70 * y // height, 120))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def frame(kind: int, payload: bytes, mask: bytes = b"") -> bytes:
    """Return a short WebSocket frame (RFC 6455 section 5.2), masked when it is the visitor's."""
    head = bytes([0x80 | kind, len(payload) | (0x80 if mask else 0)]) + mask
    return head + bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload)) if mask else head + payload


class Samples:
    """Fills a client's log with exchanges, as if they had come over the link; the clock goes as the samples say."""

    def __init__(self, client: TunnelClient) -> None:
        self.client, self.log = client, client.log
        self.now = 1000.0

    def begin(self, method: str, target: str, headers: Headers | None = None, body: bytes = b"") -> Exchange:
        """A request arrives."""
        self.now += 1.7
        fields = [(b"Host", b"web.t.example.com"), (b"User-Agent", AGENT), (b"Accept", b"*/*"), *(headers or [])]
        exchange = Exchange(self.client.tunnels[0].name, method, target, self.now, time=NOON + self.now)
        exchange.request_head, exchange.round_trip = RequestHead(b"", b"", fields).encode(), 0.023
        self.log.begin(exchange)
        if body:
            self.log.receive(exchange, body, self.now)
        return exchange

    def respond(
        self, e: Exchange, status: int, kind: bytes = b"", seconds: float = 0.018, *rest: tuple[bytes, bytes]
    ) -> None:
        """The local service answers."""
        headers = [(b"Content-Type", kind)] if kind else []
        e.answered = e.started + seconds
        head = ResponseHead(status, pytunnel.http.HTTPStatus(status).phrase.encode(), [*headers, *rest])
        self.log.respond(e, head, head.encode())

    def add(
        self,
        method: str,
        target: str,
        status: int,
        kind: bytes = b"",
        body: bytes = b"",
        *,
        seconds: float = 0.018,
        headers: Headers | None = None,
        sent: bytes = b"",
        fields: Headers | None = None,
    ) -> Exchange:
        """A whole exchange."""
        exchange = self.begin(method, target, headers, sent)
        self.respond(exchange, status, kind, seconds, *(fields or []))
        if body:
            self.log.send(exchange, body, self.now)
        self.log.finish(exchange, exchange.started + seconds + 0.004)
        return exchange

    def fill(self) -> dict[str, Exchange]:
        """What the pictures show, by what is special about each."""
        as_json, html = b"application/json", b"text/html; charset=utf-8"
        self.add("GET", "/", 200, html, b"<!doctype html><title>Shop</title>" + b" " * 4100, seconds=0.031)
        self.add("GET", "/assets/app-3f9c21.js", 200, b"text/javascript", b"export {}\n" * 5000, seconds=0.009)
        self.add("GET", "/assets/app-3f9c21.css", 200, b"text/css", b"body{}\n" * 900, seconds=0.007)
        image = self.add("GET", "/assets/sunset.png", 200, b"image/png", png(480, 270), seconds=0.012)
        self.add("GET", "/favicon.ico", 404, b"text/plain", b"not found\n", seconds=0.003)
        form = self.add(
            "POST",
            "/login?next=%2Faccount",
            303,
            sent=b"email=jo%40example.com&password=hunter2&remember=on",
            headers=[(b"Content-Type", b"application/x-www-form-urlencoded"), (b"Cookie", b"session=3b1f")],
            fields=[(b"Location", b"/account"), (b"Set-Cookie", b"session=9c0e; HttpOnly; Path=/")],
            seconds=0.212,
        )
        self.add("GET", "/account", 200, html, b"<!doctype html><title>Account</title>" + b" " * 9000, seconds=0.044)
        socket = self.begin("GET", "/live", [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")])
        self.respond(socket, 101, b"", 0.004, (b"Upgrade", b"websocket"), (b"Connection", b"Upgrade"))
        for n, (up, down) in enumerate([("subscribe orders", "ok"), ("ping", "pong")]):
            self.log.receive(socket, frame(1, up.encode(), b"\x11\x22\x33\x44"), socket.started + 0.2 + n)
            self.log.send(socket, frame(1, down.encode()), socket.started + 0.21 + n)
        self.log.send(socket, frame(1, b'{"order": 1041, "state": "paid"}'), socket.started + 3.4)
        events = self.begin("GET", "/events", [(b"Accept", b"text/event-stream")])
        self.respond(events, 200, b"text/event-stream", 0.006)
        self.log.send(events, b"event: tick\ndata: 1\n\nevent: tick\ndata: 2\n\n", events.started + 1.0)
        failed = self.add("GET", "/api/report?year=2025", 502, b"text/plain", b"", seconds=0.001)
        failed.error = "localhost:3000: the connection was refused"
        binary = self.add("GET", "/export.bin", 200, b"application/octet-stream", bytes(range(256)) * 3, seconds=0.02)
        self.add(
            "PATCH",
            "/api/cart/7",
            422,
            as_json,
            b'{"error":"quantity must be positive"}',
            seconds=0.015,
            headers=[(b"Content-Type", as_json)],
            sent=b'{"quantity":-1}',
        )
        self.add("GET", "/api/products?page=2&sort=price", 304, seconds=0.011)
        self.add("DELETE", "/api/cart/7", 204, seconds=0.022)
        error = self.add(
            "POST",
            "/api/checkout",
            500,
            as_json,
            b'{"error":"KeyError: \'vat\'","trace":"a3f1"}',
            seconds=0.388,
            headers=[(b"Content-Type", as_json)],
            sent=b'{"cart":7}',
        )
        hook = self.add(
            "POST",
            "/hooks/payments?token=whsec_4f2a",
            200,
            as_json,
            b'{"received":true}',
            seconds=0.064,
            headers=[
                (b"Content-Type", as_json),
                (b"Authorization", b"Bearer sk_test_51H"),
                (b"Idempotency-Key", b"5c0f6f0e-8d57-4f0a"),
            ],
            sent=json.dumps(INVOICE, ensure_ascii=False).encode(),
            fields=[(b"Server", b"uvicorn"), (b"X-Request-Id", b"8f14e45fceea")],
        )
        return {
            "image": image,
            "form": form,
            "socket": socket,
            "events": events,
            "failed": failed,
            "binary": binary,
            "error": error,
            "json": hook,
        }


@contextlib.asynccontextmanager
async def inspector(port: int = 0, target: str = "localhost:3000") -> AsyncIterator[tuple[Inspector, TunnelClient]]:
    """Run an inspector of a client that looks connected."""
    client = TunnelClient("http://localhost", "token", [Tunnel("web", Target.parse(target))])
    client.urls, client.problem = ["https://web.t.example.com"], ""
    page = Inspector(client, port=port, on_stop=client.stop)
    await page.start()
    try:
        yield page, client
    finally:
        await page.close()


async def inspector_png(path: Path) -> None:
    """Draw the inspector with sample data."""
    from playwright.async_api import async_playwright

    async with inspector() as (page, client), async_playwright() as playwright:
        samples = Samples(client).fill()
        chromium = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = await browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        await tab.goto(f"{page.url}/#{samples['json'].id}")
        await tab.get_by_role("heading", name="Body").nth(1).wait_for()
        await tab.screenshot(path=path)
        await browser.close()


LIGHTS = "#ff5f57", "#febc2e", "#28c840"
SVG_STYLES = {  # of the terminal's codes, on a dark theme
    **{"": "", "1": "font-weight:600;fill:#fff", "2": "fill:#8b949e", "1;36": "font-weight:600;fill:#56d4dd"},
    **{"31": "fill:#ff7b72", "32": "fill:#56d364", "33": "fill:#e3b341", "35": "fill:#bc8cff", "36": "fill:#56d4dd"},
    "7": "fill:#0d1117",
}


def terminal_svg(path: Path, width: int = 96, height: int = 22) -> None:
    """Draw the terminal view with sample data, as a window."""
    from test_terminal import show, snapshot

    lines = show(snapshot(colours=16), width, height, *["down"] * 3)
    cell, line_height, left, top = 8.4, 19, 14, 52
    across, down = width * cell + 2 * left, height * line_height + top + 8
    font = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:g} {down}" font-family="{font}" font-size="14">',
        "<title>The terminal view of pytunnel connect</title>",
        "<style>text{white-space:pre;fill:#c9d1d9}</style>",
        f'<rect width="{across:g}" height="{down}" rx="10" fill="#0d1117"/>',
        *(f'<circle cx="{20 * n}" cy="20" r="6" fill="{c}"/>' for n, c in zip((1, 2, 3), LIGHTS, strict=True)),
        f'<text x="{across / 2:g}" y="25" text-anchor="middle" style="fill:#8b949e">pytunnel connect 3000</text>',
    ]
    for row, line in enumerate(lines):
        y, column, code = top + row * line_height, 0, ""
        for sgr, text in re.findall(r"(\x1b\[[0-9;]*m)|([^\x1b]+)", line):
            if sgr:
                code = sgr[2:-1]
                continue
            cells = pytunnel.width_of(text)
            x, wide = left + column * cell, cells * cell
            if code == "7":
                box = f'x="{x:g}" y="{y - 14}" width="{wide:g}" height="{line_height}"'
                parts.append(f'<rect {box} rx="3" fill="#c9d1d9"/>')
            if text.strip():
                style = f' style="{SVG_STYLES[code]}"' if code else ""
                fit = f'textLength="{wide:g}" lengthAdjust="spacingAndGlyphs"'
                parts.append(f'<text x="{x:g}" y="{y}" {fit}{style}>{html.escape(text)}</text>')
            column += cells
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    pictures = Path(__file__).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    terminal_svg(pictures / "terminal.svg")
    asyncio.run(inspector_png(pictures / "inspector.png"))
