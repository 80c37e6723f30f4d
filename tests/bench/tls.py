"""Measures what TLS costs a server: a handshake, a visitor who is idle, and what many handshakes do to others.

    python tests/bench/tls.py [--quick]

A real server (on uvloop where it is installed) and the visitors are two processes on loopback. CPU is the server's, of
a handshake with all that belongs to a connection: accepting it, a request for /healthz, and its end; of plain ones the
same without. Memory is how much larger the server is with many idle connections, by each. The last table has the
time of others' requests, one after another on a connection that stays, while there are 1,000 new TLS connections a
minute, and then as many as one address may make.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter

TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(TESTS)  # not this directory: its modules are those of a package
    sys.path.insert(1, str(TESTS.parent))

from support import NO_DEBUG, Process, request  # noqa: E402

HOST = "localhost"
KEYS = {
    "ECDSA P-256": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
    "RSA 2048": ("-newkey", "rsa:2048"),
}
TOKEN = "test-token-0123456789abcdef0123456789abcdef"
ASK = request("GET", b"/healthz", HOST.encode())
CLOSE = request("GET", b"/healthz", HOST.encode(), [(b"Connection", b"close")])


def make_certificate(directory: Path, kind: tuple[str, ...]) -> tuple[Path, Path]:
    chain, key = directory / "chain.pem", directory / "key.pem"
    name = ("-subj", "/CN=test", "-addext", f"subjectAltName=DNS:{HOST}")
    command = ["openssl", "req", "-x509", *kind, "-nodes", "-days", "2", *name, "-keyout", str(key), "-out", str(chain)]
    subprocess.run(command, check=True, capture_output=True)
    return chain, key


@contextlib.asynccontextmanager
async def server(*flags: str) -> AsyncIterator[tuple[Process, int]]:
    """Visitors are those of a --trusted-proxy, so that one address may do as much as it likes."""
    free = ("--trusted-proxy", "127.0.0.1") if "--free" in flags else ()
    rest = [flag for flag in flags if flag != "--free"]
    words = ["serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--json", *free, *rest]
    async with await Process.start(*words, env=NO_DEBUG) as process:
        yield process, (await process.event("listening"))["port"]


async def visit(port: int, context: ssl.SSLContext | None) -> None:
    name = HOST if context else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    writer.write(CLOSE)
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def cost(process: Process, port: int, context: ssl.SSLContext | None, count: int) -> float:
    """Return the CPU time of one connection with one request, in seconds."""
    for _ in range(count // 10):
        await visit(port, context)
    before = process.cpu_seconds()
    for _ in range(count):
        await visit(port, context)
    return (process.cpu_seconds() - before) / count


async def memory(process: Process, port: int, context: ssl.SSLContext | None, count: int) -> float:
    """Return the bytes of one connection that has had one request and stays."""
    await visit(port, context)
    before = process.rss()
    writers = []
    for _ in range(count):
        name = HOST if context else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
        writer.write(ASK)
        await reader.readuntil(b"ok\n")
        writers.append(writer)
    each = (process.rss() - before) / count
    for writer in writers:
        writer.transport.abort()
    return each


async def others(port: int, context: ssl.SSLContext, rate: float, seconds: float) -> tuple[float, float, float, int]:
    """Return median, p99 and maximum of others' requests in seconds, and how many new connections there were."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=HOST)
    code = f"import asyncio; from bench import tls; asyncio.run(tls.knock({port}, {rate}, {seconds}))"
    path = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]; "
    knocking = None
    if rate:
        knocking = await asyncio.create_subprocess_exec(sys.executable, "-c", path + code, stdout=subprocess.PIPE)
        assert knocking.stdout
        await knocking.stdout.readline()
    times = []
    end = perf_counter() + seconds
    while (start := perf_counter()) < end:
        writer.write(ASK)
        await reader.readuntil(b"ok\n")
        times.append(perf_counter() - start)
        await asyncio.sleep(0.005)
    made = int((await knocking.communicate())[0]) if knocking else 0
    writer.transport.abort()
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.99)], times[-1], made


async def knock(port: int, rate: float, seconds: float) -> None:
    """Open `rate` TLS connections a second, whether or not those before have been served; print how many were."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    start, tasks = loop.time(), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(start + number / rate - loop.time())
        tasks.append(asyncio.ensure_future(visit(port, context)))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    print(sum(result is None for result in results))


async def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what TLS costs a server.")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    quick = parser.parse_args().quick
    count, idle, seconds = (50, 100, 3.0) if quick else (500, 1000, 30.0)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        print("| connection | CPU of one | idle, memory of one |\n|---|---|---|")
        async with server("--free") as (process, port):
            cpu, each = await cost(process, port, None, count), await memory(process, port, None, idle)
            print(f"| plain | {cpu * 1000:.2f} ms | {each / 1024:.0f} KiB |", flush=True)
        for name, kind in KEYS.items():
            chain, key = make_certificate(Path(directory), kind)
            context = ssl.create_default_context(cafile=str(chain))
            async with server("--cert", str(chain), "--key", str(key), "--free") as (process, port):
                cpu, each = await cost(process, port, context, count), await memory(process, port, context, idle)
                print(f"| TLS, {name} | {cpu * 1000:.2f} ms | {each / 1024:.0f} KiB |", flush=True)
        print("\n| new TLS connections (RSA 2048) | median | p99 | longest of others |\n|---|---|---|---|")
        async with server("--cert", str(chain), "--key", str(key), "--free") as (_, port):
            for rate in (0.0, 1000 / 60, 50.0, 200.0):
                median, p99, longest, made = await others(port, context, rate, seconds)
                what = f"{made / seconds * 60:,.0f} a minute" if rate else "none"
                shown = " | ".join(f"{number * 1000:.2f} ms" for number in (median, p99, longest))
                print(f"| {what} | {shown} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
