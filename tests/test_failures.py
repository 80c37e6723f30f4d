"""Networks that fail, machines that are full, clocks that jump: what is lost then, and that it comes back.

Deadlines are shrunk by `with_limits`, so that what takes half a minute in real life takes a second here. Nothing
waits for a time to pass: each step waits for what the program reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support import (
    NO_DEBUG,
    ROOT,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Relay,
    Truncated,
    Tunnel,
    chunk,
    eventually,
    pattern,
    request,
    response,
    with_limits,
)

import pytunnel
from pytunnel import ErrorCode, Grant, Refused, Registration, Session, StreamReset, Target, TunnelClient, TunnelRegistry

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

KIB, MIB = 1024, 1024 * 1024
TOKEN = "test-token-0123456789abcdef0123456789abcdef"
DIALS = 20  # of one client, during an outage; waits that double make 12 of them take 40 s, or more
BACK = 3  # times what 200 clients cost their server at first, for it to have them back; seen about 1.2
AWAY = 20.0  # seconds within which a client is back after an outage of a moment
GROWTH = 16 * MIB  # resident bytes that a process may have more, after an outage, than before
HALF = MIB  # bytes of each half that Halves sends

QUICK = with_limits(PING_INTERVAL=0.5, PING_TIMEOUT=0.5, BACKOFF_MAX=0.3)
NOTICED = pytunnel.DIAL_TIMEOUT - 1.0  # seconds: with QUICK a dead link is noticed long before any other deadline


def with_code(code: str, **limits: float) -> list[str]:
    """The command of the program, with other limits, after it has run some Python."""
    *start, program = with_limits(**limits)
    return [*start, f"{code}\n{program}"]


class Halves:
    """A local service: /halves comes in two halves, the second when the test releases it, /never never."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, asked: RawRequest, reader: Reader, writer: Writer) -> None:
        if asked.target == b"/never":
            await asyncio.Event().wait()
        elif asked.target == b"/halves":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (2 * HALF) + pattern(0, HALF))
            await self.release.wait()
            writer.write(pattern(HALF, HALF))
        else:
            writer.write(response(b"hello"))


class HalfWay:
    """A visitor who has read the first half of /halves."""

    def __init__(self, visitor: RawVisitor, halves: Halves) -> None:
        self._visitor, self._halves = visitor, halves
        self._checker = PatternChecker()

    async def begin(self, data: bytes) -> None:
        await self._visitor.send(data)
        assert (await self._visitor.read_head()).status == 200
        self._checker.feed(await self._visitor.read_exactly(HALF))

    async def finish(self) -> None:
        """Read the second half, of which nothing may be missing or wrong."""
        self._halves.release.set()
        self._checker.feed(await self._visitor.read_exactly(HALF))


@contextlib.asynccontextmanager
async def half_way(**options: Any) -> AsyncIterator[tuple[Tunnel, HalfWay]]:
    """A tunnel, over a relay if not asked for another way, with a visitor in the middle of a download."""
    halves = Halves()
    async with (
        RawOrigin(halves) as origin,
        Tunnel(origin.port, **{"relay": True, "command": QUICK, **options}) as tunnel,
        tunnel.visitor(timeout=AWAY) as visitor,
    ):
        download = HalfWay(visitor, halves)
        await download.begin(tunnel.request(target=b"/halves"))
        yield tunnel, download


async def back(client: Process) -> None:
    """Wait until a client's session goes on over a new link."""
    assert (await client.event("reconnected", timeout=AWAY))["resumed"] is True


def soft_limit(process: Process, kind: int, value: int) -> None:
    """Change a running process's limit; the hard one stays, so that it can be raised again."""
    resource.prlimit(process.pid, kind, (value, resource.prlimit(process.pid, kind)[1]))


# ---------------------------------------------------------------------------------------- Links that fall silent


@pytest.mark.parametrize("hole", ["both", "up", "down"])
async def test_both_sides_notice_a_link_that_has_fallen_silent(hole: str) -> None:
    """Wholly, or in one direction only; what ran goes on afterwards."""
    async with half_way() as (tunnel, download):
        await tunnel.server.stderr_line("web: connected")
        began = time.monotonic()
        if hole == "both":
            tunnel.relay.set_mode("blackhole")
        else:
            tunnel.relay.set_mode("half-blackhole", hole)  # type: ignore[arg-type]
        await asyncio.gather(
            tunnel.client.event("disconnected", timeout=NOTICED), tunnel.server.stderr_line("web: ", timeout=NOTICED)
        )
        print(f"\n{hole}: both have noticed after {time.monotonic() - began:.2f} s")
        tunnel.relay.set_mode("pass")
        await back(tunnel.client)
        await download.finish()


@pytest.mark.parametrize("stuck", ["client", "server"])
async def test_a_peer_that_takes_nothing_more_loses_its_link(stuck: str) -> None:
    """The keepalive is out of the way here: what notices is that nothing is acknowledged."""
    streams, size = 28, 400 * KIB  # 7 MiB of windows: more than the sockets on the way hold
    limits = with_limits(WRITE_TIMEOUT=2.0, BACKOFF_MAX=0.3)

    async def serve(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(asked.body or pattern(0, size)))

    async with (
        RawOrigin(serve, read_body=True, record_limit=0) as origin,
        Tunnel(origin.port, relay=Relay(0, buffer=16 * KIB), command=limits) as tunnel,
    ):
        tunnel.relay.set_mode("half-blackhole", "up" if stuck == "client" else "down")
        body = pattern(0, size) if stuck == "server" else None
        fetches = [asyncio.create_task(tunnel.fetch("PUT", body=body, timeout=60.0)) for _ in range(streams)]
        if stuck == "client":
            line = await tunnel.client.event("disconnected", timeout=NOTICED)
            # Or the server is the first to notice: that its requests are acknowledged does not get through either.
            assert line["reason"] in ("nothing was acknowledged for 2 s", "the connection was closed")
        else:
            await tunnel.server.stderr_line("web: nothing was acknowledged for 2 s", timeout=NOTICED)
        tunnel.relay.set_mode("pass")
        await back(tunnel.client)
        for answer in await asyncio.gather(*fetches):
            assert (answer.status, answer.clean, answer.body == pattern(0, size)) == (200, True, True)
        assert len(origin.requests) == streams


async def test_logins_while_older_links_are_silent_are_quick_and_leave_nothing() -> None:
    """A network that forgets connections: 20 times in a row, each with a request under way; nobody's deadline ends."""
    async with (
        RawOrigin(Halves()) as origin,
        Tunnel(origin.port, relay=True) as tunnel,
        contextlib.AsyncExitStack() as stack,
    ):
        before = tunnel.server.rss(), tunnel.server.fd_count()
        seconds, clients, running = [], list[TunnelClient](), list[asyncio.Task[None]]()

        async def log_in() -> None:
            ready = asyncio.Event()
            client = TunnelClient(
                tunnel.server_url,
                TOKEN,
                [pytunnel.Tunnel("web", Target.parse(str(origin.port)))],
                on_event=lambda event, **_: ready.set() if event == "ready" else None,
            )
            began = time.monotonic()
            clients.append(client)
            running.append(asyncio.create_task(client.run()))
            async with asyncio.timeout(AWAY):
                await ready.wait()
            seconds.append(time.monotonic() - began)

        try:
            for _ in range(20):
                visitor = await stack.enter_async_context(tunnel.visitor())
                seen = len(origin.requests)
                await visitor.send(tunnel.request(target=b"/never"))
                await origin.wait_for(lambda seen=seen: len(origin.requests) > seen, AWAY)  # type: ignore[misc]
                assert await tunnel.relay.cut("silence") == 1
                await log_in()
                got = await visitor.read_response()
                assert (got.status, got.value(b"X-Pytunnel-Error")) == (502, b"link-lost")
                visitor.close()
            print(f"\nlogins: slowest {max(seconds):.2f} s")
            assert max(seconds) < pytunnel.WRITE_TIMEOUT / 2, "none has waited for an older session"
            tunnel.client.send_signal(signal.SIGKILL)  # the first one, a process, would need half a minute to notice
            for client in clients[:-1]:
                assert client._link
                client._link.lose("its owner has noticed")
            errors = await asyncio.wait_for(asyncio.gather(*running[:-1], return_exceptions=True), AWAY)
            assert [isinstance(error, Refused) and error.code for error in errors] == ["replaced"] * 19
            assert (await tunnel.get()).body == b"hello"
            await eventually(lambda: tunnel.server.fd_count() <= before[1], 10, "the descriptors of older links")
            assert tunnel.server.rss() - before[0] < GROWTH
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


# ---------------------------------------------------------------------------------------- Sleep and clocks


async def test_a_laptop_that_sleeps_past_the_ping_goes_on_when_it_wakes() -> None:
    async with half_way() as (tunnel, download):
        tunnel.client.send_signal(signal.SIGSTOP)
        await tunnel.server.stderr_line("web: no answer for 0.5 s", timeout=NOTICED)
        tunnel.client.send_signal(signal.SIGCONT)
        began = time.monotonic()
        await back(tunnel.client)
        print(f"\nback {time.monotonic() - began:.2f} s after it woke")
        assert time.monotonic() - began < 5.0
        await download.finish()
        assert (await tunnel.get()).body == b"hello"


CLOCK = """
import signal, time
jumped, real = [0.0], time.time
time.time = lambda: real() + jumped[0]
signal.signal(signal.SIGUSR1, lambda *_: jumped.__setitem__(0, jumped[0] + 86400))
signal.signal(signal.SIGUSR2, lambda *_: jumped.__setitem__(0, jumped[0] - 3600))
"""
JUMPS = [signal.SIGUSR1, signal.SIGUSR2]


async def test_after_a_sleep_a_silent_link_is_given_up_before_its_ping_is_due() -> None:
    """The network has forgotten the connection meanwhile, so nothing comes back that would tell."""
    async with half_way(command=with_code(CLOCK)) as (tunnel, download):
        assert await tunnel.relay.cut("silence") == 1
        began = time.monotonic()
        tunnel.client.send_signal(signal.SIGUSR1)
        assert (await tunnel.client.event("disconnected"))["reason"] == "this machine has slept"
        await back(tunnel.client)
        seconds = time.monotonic() - began
        print(f"\nback after {seconds:.2f} s")
        assert seconds < pytunnel.PING_INTERVAL / 2
        await download.finish()


async def test_clocks_that_jump_lose_nothing() -> None:
    """A day forth and an hour back, on either side: the client looks at its link once more, the server at nothing."""
    async with half_way(command=with_code(CLOCK)) as (tunnel, download):
        for number in JUMPS:
            tunnel.server.send_signal(number)
            tunnel.client.send_signal(number)
            await back(tunnel.client)
            assert (await tunnel.get()).body == b"hello"
        lines = [line.split(" ", 1)[1] for line in tunnel.server.stderr]
        again = [line for line in lines if line.startswith("web: connected again (")]
        assert len(again) == len(JUMPS), "each jump costs one link"
        await download.finish()


async def test_a_request_waits_for_its_client_as_long_by_any_clock() -> None:
    """Neither a day forth nor an hour back ends the hold early, or never."""
    hold = 1.0
    async with (
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, command=with_code(CLOCK), serve_args=["--hold", f"{hold}"]) as tunnel,
        tunnel.visitor() as visitor,
    ):
        began = time.monotonic()  # the hold counts from the client's end
        tunnel.client.send_signal(signal.SIGTERM)
        await tunnel.server.stderr_line("its client stopped")
        await visitor.send(tunnel.request())
        for number in JUMPS:
            tunnel.server.send_signal(number)
        assert (await visitor.read_response()).status == 503
        assert time.monotonic() - began > hold * 0.9


# ---------------------------------------------------------------------------------------- Networks that change


class Network:
    """A network namespace for a client: one cable to the server, which changes, and one to its local service."""

    def __init__(self) -> None:
        self.name, pid = f"pytunnel{os.getpid()}", os.getpid()
        self.cable = f"ptc{pid}"
        net = f"10.231.{pid % 250}"
        self.server, self.service = f"{net}.1", f"{net}.129"
        self.client, self.other = f"{net}.2/25", f"{net}.3/25"
        self._ends = {
            self.cable: (f"{self.server}/25", self.client),
            f"ptl{pid}": (f"{self.service}/25", f"{net}.130/25"),
        }

    def __enter__(self) -> Network:
        self._ip("netns", "add", self.name)
        try:
            for cable, (ours, theirs) in self._ends.items():
                self._ip("link", "add", cable, "type", "veth", "peer", "name", cable, "netns", self.name)
                self._ip("address", "add", ours, "dev", cable)
                self._ip("link", "set", cable, "up")
                self.within("address", "add", theirs, "dev", cable)
                self.within("link", "set", cable, "up")
            self.within("link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for cable in self._ends:  # at once; those of a namespace go some time after it
            subprocess.run(["ip", "link", "delete", cable], check=False, capture_output=True)
        self._ip("netns", "delete", self.name)

    def within(self, *words: str) -> None:
        """Change something inside."""
        self._ip("-n", self.name, *words)

    @staticmethod
    def _ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


CHANGES = ["another address", "the cable is out for a while"] if os.geteuid() == 0 else []  # needs root


@pytest.mark.parametrize("change", CHANGES)
async def test_a_client_whose_network_changes_goes_on(change: str) -> None:
    halves = Halves()
    with Network() as network:
        serve = ["serve", "--listen", f"{network.server}:0", "--token", TOKEN, "--json"]
        async with (
            RawOrigin(halves, host=network.service) as origin,
            await Process.start(*serve, command=QUICK) as server,
        ):
            port = (await server.event("listening"))["port"]
            words = ["connect", f"{network.service}:{origin.port}", "--server", f"http://{network.server}:{port}"]
            words += ["--token", TOKEN, "--name", "web", "--json"]
            command = ["ip", "netns", "exec", network.name, *QUICK]
            async with (
                await Process.start(*words, command=command) as client,
                RawVisitor(port, host=network.server, timeout=AWAY) as visitor,
            ):
                host = urlsplit((await client.event("ready"))["url"]).hostname
                download = HalfWay(visitor, halves)
                await download.begin(request(target=b"/halves", host=str(host).encode()))
                if change == "another address":
                    network.within("address", "delete", network.client, "dev", network.cable)
                    network.within("address", "add", network.other, "dev", network.cable)
                else:
                    network.within("link", "set", network.cable, "down")
                await client.event("disconnected", timeout=NOTICED)
                await server.stderr_line("web: no answer for 0.5 s", timeout=NOTICED)
                network.within("link", "set", network.cable, "up")
                await back(client)
                await download.finish()


async def test_a_far_and_bumpy_network_is_no_dead_one() -> None:
    """A round trip of 0.3 s, and stalls of 0.5 s that are shorter than the ping's timeout: the link holds."""
    relay = Relay(0, delay_up=0.15, delay_down=0.15)

    async def serve(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(asked.body))

    async with (
        RawOrigin(serve, read_body=True) as origin,
        Tunnel(origin.port, relay=relay, command=with_limits(PING_INTERVAL=0.3, PING_TIMEOUT=2.0)) as tunnel,
    ):
        for size in (1, 64 * KIB, 192 * KIB):
            passed = relay.bytes_up
            answer = asyncio.create_task(tunnel.fetch("PUT", body=pattern(0, size), timeout=AWAY))
            await relay.wait_for(lambda passed=passed: relay.bytes_up > passed)  # type: ignore[misc]
            relay.set_mode("blackhole")
            await asyncio.wait([answer], timeout=0.5)  # the stall itself
            relay.set_mode("pass")
            assert (await answer).body == pattern(0, size)
        assert relay.accepted == 1, "one link was enough"


# ---------------------------------------------------------------------------------------- Servers that are away


STORM = f"""
import asyncio, contextvars, json, socket, sys
sys.path.insert(0, {str(ROOT)!r})
import pytunnel

address = contextvars.ContextVar("address", default="")

class Bound(socket.socket):  # each client has an address of its own, as clients in real life have
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if address.get() and self.family == socket.AF_INET and self.type == socket.SOCK_STREAM:
            self.bind((address.get(), 0))

async def main(server, token, target, count):
    state, dials, waiting = dict(), [0] * count, asyncio.Queue()

    def watch(number):
        def on_event(event, **fields):
            if event in ("ready", "reconnected", "disconnected"):
                state[number] = event != "disconnected"
                dials[number] += event == "disconnected"
                waiting.put_nowait(None)
        return on_event

    async def tell(event, wanted):
        while len(state) < count or any(up is not wanted for up in state.values()):
            await waiting.get()
        print(json.dumps(dict(event=event, urls=[client.url for client in clients], dials=max(dials))), flush=True)

    clients, tasks = [], []
    socket.socket = Bound
    for number in range(count):
        tunnel = pytunnel.Tunnel(f"web{{number}}", pytunnel.Target.parse(target))
        clients.append(pytunnel.TunnelClient(server, token, [tunnel], on_event=watch(number)))
        address.set(f"127.0.{{1 + number // 200}}.{{1 + number % 200}}")
        tasks.append(asyncio.create_task(clients[-1].run()))
    address.set("")
    await tell("up", True)
    await tell("down", False)
    await tell("up", True)
    await asyncio.gather(*tasks)

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
"""


async def test_two_hundred_clients_are_back_after_a_restart() -> None:
    """Each with its own name: visitors find behind each what they found before."""
    count = 200

    async def tell_host(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(asked.value(b"Host") or b""))

    async with RawOrigin(tell_host) as origin, Tunnel(origin.port) as tunnel:
        tunnel.client.send_signal(signal.SIGTERM)
        await tunnel.client.wait()
        words = [tunnel.server_url, TOKEN, str(origin.port), str(count)]
        async with await Process.start(*words, command=[sys.executable, "-c", STORM], env=NO_DEBUG) as clients:
            first = await clients.event("up", timeout=60.0)
            cpu = tunnel.server.cpu_seconds()
            await tunnel.stop_server(signal.SIGKILL)
            await clients.event("down", timeout=AWAY)
            late = ["connect", "1", "--server", tunnel.server_url, "--token", TOKEN]
            async with await Process.start(*late, command=with_limits(DIAL_TIMEOUT=6.0)) as newcomer:
                assert await newcomer.wait() == 5  # after six seconds, in which others dial now and then
            server, began = await tunnel.start_server(), time.monotonic()
            again = await clients.event("up", timeout=60.0)
            used, dials = server.cpu_seconds(), again["dials"]
            print(f"\nback after {time.monotonic() - began:.1f} s; {dials} dials, {used} s of the processor, was {cpu}")
            assert dials < DIALS
            assert used < BACK * cpu
            assert again["urls"] == first["urls"]
            assert len(set(first["urls"])) == count
            async with tunnel.visitor() as visitor:
                for number in range(count):
                    host = tunnel.host.replace(b"web", b"web%d" % number)
                    await visitor.send(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
                    assert (await visitor.read_response()).body == host


def test_delays_between_dials_grow_to_their_maximum_and_are_never_all_the_same() -> None:
    delays = pytunnel.backoff()
    assert next(delays) == 0.0
    ceiling = pytunnel.BACKOFF_MIN
    for delay, _ in zip(delays, range(20), strict=False):
        assert ceiling / 2 <= delay <= ceiling
        ceiling = min(2 * ceiling, pytunnel.BACKOFF_MAX)
    assert ceiling == pytunnel.BACKOFF_MAX == 30.0
    assert len({next(delays) for _ in range(10)}) > 1, "clients of one server do not come back all at once"


async def test_a_server_that_is_away_for_long_costs_nothing_and_is_found_again() -> None:
    limits = with_limits(BACKOFF_MIN=0.05, BACKOFF_MAX=0.4)
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, command=limits) as tunnel:
        await tunnel.stop_server()
        cpu, began = tunnel.client.cpu_seconds(), time.monotonic()
        delays = [(await tunnel.client.event("disconnected", timeout=AWAY))["retry_in"] for _ in range(10)]
        used, seconds = tunnel.client.cpu_seconds() - cpu, time.monotonic() - began
        print(f"\n{len(delays)} dials in {seconds:.1f} s took {used:.2f} s of the processor; delays {delays}")
        assert delays[0] == 0.0
        assert all(0.2 <= delay <= 0.4 for delay in delays[-5:])
        assert used < seconds / 2
        await tunnel.start_server()
        await tunnel.client.event("reconnected", timeout=AWAY)
        assert (await tunnel.get()).body == b"hello"


NO_NAMES = """
import socket
real, lookups = socket.getaddrinfo, [0]
def fail_twice(host, *args, **options):
    if host == "localhost":
        lookups[0] += 1
        if lookups[0] in (1, 2, 4):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return real(host, *args, **options)
socket.getaddrinfo = fail_twice
"""


async def test_a_name_server_that_fails_is_asked_again() -> None:
    """At the start and after a loss; the third and the fifth answer are right."""
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        words = ["connect", str(origin.port), "--server", f"http://localhost:{tunnel.port}", "--token", TOKEN]
        env = {"PYTUNNEL_LOOP": "asyncio"}
        command = with_code(NO_NAMES)
        async with await Process.start(*words, "--name", "other", "--json", env=env, command=command) as client:
            for _ in range(2):
                assert (await client.event("disconnected"))["reason"] == "no such host"
            await client.event("ready")
            await tunnel.restart_server(signal.SIGKILL)
            await client.event("disconnected", reason="no such host")
            await client.event("reconnected", timeout=AWAY)


async def test_a_version_that_the_server_does_not_speak_is_the_end() -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, relay=True) as tunnel:
        words = ["connect", "1", "--server", tunnel.server_url, "--token", TOKEN, "--name", "newer", "--json"]
        async with await Process.start(*words, command=with_limits(PROTOCOL_VERSION=2)) as client:
            assert await client.wait() == 1
            assert (await client.event("error"))["code"] == "version"
            assert len(client.stderr) == 1 and "speaks version 1 only" in client.stderr[0]
        assert tunnel.relay.accepted == 2, "one dial each, and no second one"


# ---------------------------------------------------------------------------------------- Full disks


NO_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


async def test_names_that_a_full_disk_does_not_take_are_kept_when_there_is_room() -> None:
    """One warning, tunnels for everybody, and at the next change all names are on the disk."""
    async with (
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, name="one", command=with_code(NO_FILES)) as tunnel,
    ):
        await (await tunnel.start_client(name="two", home="two")).event("ready")
        assert (await tunnel.get()).body == b"hello"
        state = tunnel._home / "server" / "state"
        assert files_below(state) == [], "nothing of what did not fit is left"
        assert "File too large" in await tunnel.server.stderr_line("names are not kept")
        soft_limit(tunnel.server, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        await (await tunnel.start_client(name="two", home="two")).event("ready")  # a name that is not new
        assert set(json.loads((state / "names.json").read_text())["names"]) == {"one", "two"}
        soft_limit(tunnel.server, resource.RLIMIT_FSIZE, 0)
        await (await tunnel.start_client(name="three", home="three")).event("ready")
        assert set(json.loads((state / "names.json").read_text())["names"]) == {"one", "two"}, "and not half a file"
        assert files_below(state) == ["names.json"]
        await tunnel.server.stderr_line("names are not kept")
        assert len([line for line in tunnel.server.stderr if "not kept" in line]) == 2, "one each time"


async def test_a_client_on_a_full_disk_warns_once_and_serves(tmp_path: Path) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        client = await Process.start(
            *("connect", str(origin.port), "--server", tunnel.server_url, "--token", TOKEN, "--name", "web"),
            home=tmp_path,
            command=with_code(NO_FILES),
        )
        async with client:
            assert await client.stdout_line("http://") == tunnel.ready["url"]
            assert (await tunnel.get()).body == b"hello"
            await client.stderr_line("server and token are not kept")
            assert files_below(tmp_path) == []
            client.send_signal(signal.SIGTERM)
            assert await client.wait() == 0
            assert len([line for line in client.stderr if "not kept" in line]) == 1
            assert "Traceback" not in client.output()


async def test_a_token_that_cannot_be_kept_is_one_line(tmp_path: Path) -> None:
    """A server whose token nobody can look up would be of no use."""
    words = ["serve", "--listen", "127.0.0.1:0"]
    async with await Process.start(*words, home=tmp_path, command=with_code(NO_FILES)) as server:
        assert await server.wait() == 1
        assert len(server.stderr) == 1 and "PYTUNNEL_STATE_DIR" in server.stderr[0]
        assert files_below(tmp_path) == []


async def test_a_log_on_a_full_disk_stops_nothing_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import os, resource, sys
if "serve" in sys.argv:
    os.dup2(os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
"""
    command = with_code(code, BACKOFF_MAX=0.3)
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, relay=True, command=command) as tunnel:

        async def another_line() -> None:
            assert await tunnel.relay.cut("reset") == 1
            await back(tunnel.client)
            assert (await tunnel.get()).body == b"hello"

        while log.stat().st_size < 200:
            await another_line()
        for _ in range(2):
            await another_line()
        full = log.read_bytes()
        assert len(full) == 200
        soft_limit(tunnel.server, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        await another_line()
        lines = await eventually(lambda: log.read_bytes()[200:].count(b"\n") >= 3 and log.read_text().splitlines())
        assert "web: connected again (" in lines[-1]
        torn = full.splitlines()[-1].decode()
        assert torn in lines or full.endswith(b"\n"), "the next line does not stand behind half of another"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE, errno.EIO, errno.EBADF])
def test_lines_come_again_unless_nobody_can_read_them(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def write(descriptor: int, data: bytes) -> int:
        if data.startswith(b"first") and not written:
            written.append(b"fi")  # half of it, as a disk does that becomes full
            return 2
        if data.startswith(b"rst"):
            raise OSError(error, os.strerror(error))
        written.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", write)
    output = pytunnel.Output(2)
    for line in ("first", "second", "third"):
        output.write(line)
    output.close()
    ended = error in (errno.EPIPE, errno.EIO, errno.EBADF)
    assert b"".join(written) == (b"fi" if ended else b"fi\nsecond\nthird\n")


async def test_a_pipe_that_does_not_block_gets_every_line() -> None:
    """As a program in another language may have made it: a full one says EAGAIN, and that is no end."""
    async with (
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, command=with_code("import os; os.set_blocking(1, False)")) as tunnel,
    ):
        transport: Any = tunnel.client._process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        transport.pause_reading()
        count, long = 24, b"/" + b"x" * (8 * KIB)
        for number in range(count):  # a pipe holds 64 KiB
            assert (await tunnel.get(b"%b%d" % (long, number))).body == b"hello"
        transport.resume_reading()
        for number in range(count):
            assert (await tunnel.client.event("request"))["path"] == f"{long.decode()}{number}"


# ---------------------------------------------------------------------------------------- No descriptors


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_server_without_descriptors_says_so_now_and_then_and_recovers(loop: str) -> None:
    settles = loop == "asyncio"  # libuv's spare descriptor is another one afterwards; the baseline below counts it
    env = {"PYTUNNEL_LOOP": loop}
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, env=env, settles=settles) as tunnel:
        server = tunnel.server
        assert (await tunnel.get()).body == b"hello"
        for _ in range(2):
            few = server.fd_count() + 3
            usual = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0]
            seen, cpu, began = len(server.stderr), server.cpu_seconds(), time.monotonic()
            soft_limit(server, resource.RLIMIT_NOFILE, few)
            async with contextlib.AsyncExitStack() as stack:
                crowd = [await stack.enter_async_context(tunnel.visitor(timeout=AWAY)) for _ in range(30)]
                answers = [asyncio.create_task(_served(visitor, tunnel)) for visitor in crowd]
                await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                if loop == "asyncio":  # the kernel keeps them until there is room; uvloop closes them
                    for _ in range(2):
                        await server.stderr_line("out of system resource")
                else:
                    await asyncio.wait(answers[10:])
                used, seconds = server.cpu_seconds() - cpu, time.monotonic() - began
                soft_limit(server, resource.RLIMIT_NOFILE, usual)
                served = await asyncio.gather(*answers)
            print(f"\n{loop}: {served.count(True)} of 30 served, {used:.2f} s of the processor in {seconds:.1f} s")
            assert any(served) and (loop == "uvloop" or all(served))
            lines = server.stderr[seen:]
            assert len(lines) <= seconds + 3, lines
            assert used < 0.3 + seconds / 2
            assert (await tunnel.get()).body == b"hello"
            await eventually(lambda few=few: server.fd_count() <= few, what="descriptors at the baseline")  # type: ignore[misc]
        assert "Traceback" not in server.output()
        assert tunnel.client.returncode is None and not [e for e in tunnel.client.events if e["event"] != "request"]


async def _served(visitor: RawVisitor, tunnel: Tunnel) -> bool:
    try:
        await visitor.send(tunnel.request())
        return (await visitor.read_response()).body == b"hello"
    except (ConnectionError, Truncated):
        return False


async def test_a_client_without_descriptors_serves_and_dials_again_when_it_has_some() -> None:
    async with (
        RawOrigin(response(b"hello", headers=[(b"Connection", b"close")])) as origin,
        Tunnel(origin.port, relay=True, command=with_limits(BACKOFF_MAX=0.3)) as tunnel,
    ):
        client = tunnel.client
        assert (await tunnel.get()).body == b"hello"
        usual = resource.prlimit(client.pid, resource.RLIMIT_NOFILE)[0]
        soft_limit(client, resource.RLIMIT_NOFILE, 3)  # all that it has stays open
        got = await tunnel.get()
        assert (got.status, got.value(b"X-Pytunnel-Error")) == (502, b"local-refused")
        assert (await client.event("request", status=502))["error"].endswith("too many open files")
        await tunnel.relay.cut("reset")
        cpu = client.cpu_seconds()
        for _ in range(4):
            line = await client.event("disconnected", timeout=AWAY)
        assert line["reason"] == "too many open files"
        assert client.cpu_seconds() - cpu < 1.0
        soft_limit(client, resource.RLIMIT_NOFILE, usual)
        await back(client)
        assert (await tunnel.get()).body == b"hello"
        assert "Traceback" not in client.output()


def test_what_only_the_event_loop_sees_is_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    class Loop:
        now = 0.0

        def time(self) -> float:
            return self.now

        def is_running(self) -> bool:
            return True

    handle, loop = pytunnel._failure_handler(), Loop()
    context = {"message": "no descriptor", "exception": OSError(24, "Too many\x1b open files")}
    for _ in range(1000):
        loop.now += 0.002
        handle(loop, context)  # type: ignore[arg-type]
    handle(loop, {"message": "another one"})  # type: ignore[arg-type]
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [r"no descriptor: [Errno 24] Too many\x1b open files"] * 2 + ["another one"]
    assert not any(record.exc_info for record in caplog.records)


# ---------------------------------------------------------------------------------------- Shutdown


async def test_a_server_that_stops_ends_an_event_stream_late_and_a_download_not_at_all() -> None:
    """The download is complete within the drain; the event stream is cut when it is over, and does not look whole."""
    halves = Halves()

    async def serve(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        if asked.target != b"/events":
            return await halves(asked, reader, writer)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(chunk(b"data: 1\n\n"))
        await asyncio.Event().wait()

    async with (
        RawOrigin(serve) as origin,
        Tunnel(origin.port, serve_args=["--drain", "4"], command=with_limits(BACKOFF_MAX=0.3)) as tunnel,
        tunnel.visitor() as watcher,
        tunnel.visitor() as visitor,
    ):
        await watcher.send(tunnel.request(target=b"/events"))
        events = watcher.iter_body(await watcher.read_head())
        assert await anext(events) == b"data: 1\n\n"
        download = HalfWay(visitor, halves)
        await download.begin(tunnel.request(target=b"/halves"))
        server = tunnel.server
        server.send_signal(signal.SIGTERM)
        await server.stderr_line("stopping")
        await download.finish()
        assert server.returncode is None, "the event stream still has its time"
        with pytest.raises(Truncated):
            await anext(events)
        assert await server.wait() == 0
        await tunnel.start_server()
        await tunnel.client.event("reconnected", timeout=AWAY)
        assert (await tunnel.get()).body == b"hello"


AHEAD = """
import signal, time
ahead, real = [0.0], time.monotonic
time.monotonic = lambda: real() + ahead[0]
signal.signal(signal.SIGUSR1, lambda *_: ahead.__setitem__(0, ahead[0] + 110))
signal.signal(signal.SIGUSR2, lambda *_: ahead.__setitem__(0, ahead[0] + 10))
"""


async def test_a_drain_of_two_minutes_takes_two_minutes() -> None:
    """By the server's clock, which a signal puts forward by 110 seconds, and another by the last 10."""
    halves = Halves()
    async with (
        RawOrigin(halves) as origin,
        Tunnel(
            origin.port,
            serve_args=["--drain", "120"],
            command=with_code(AHEAD, PING_INTERVAL=1000.0),
            env={"PYTUNNEL_LOOP": "asyncio"},  # uvloop has a clock of its own
            settles=False,  # the client keeps what runs, for a server that is not started again here
        ) as tunnel,
        tunnel.visitor() as visitor,
        tunnel.visitor() as endless,
    ):
        await endless.send(tunnel.request(target=b"/never"))
        await origin.wait_for(lambda: origin.requests)
        download = HalfWay(visitor, halves)
        await download.begin(tunnel.request(target=b"/halves"))
        server = tunnel.server
        server.send_signal(signal.SIGTERM)
        await server.stderr_line("stopping; running requests have 120 s")  # with which they begin
        server.send_signal(signal.SIGUSR1)
        await download.finish()
        assert server.returncode is None and not endless.buffered
        server.send_signal(signal.SIGUSR2)
        got = await endless.read_response()
        assert (got.status, got.value(b"X-Pytunnel-Error")) == (502, b"link-lost")
        assert await server.wait() == 0


async def test_a_server_that_stops_waits_until_a_slow_visitor_has_it_all() -> None:
    """The response has ended by then, as far as the local service and the tunnel are concerned."""
    halves = Halves()
    halves.release.set()
    async with RawOrigin(halves) as origin, Tunnel(origin.port) as tunnel, tunnel.visitor(rcvbuf=4 * KIB) as visitor:
        await visitor.send(tunnel.request(target=b"/halves"))
        head = await visitor.read_head()
        tunnel.server.send_signal(signal.SIGTERM)
        await tunnel.server.stderr_line("stopping")
        checker = PatternChecker()
        async for piece in visitor.iter_body(head):
            checker.feed(piece)
        assert checker.offset == 2 * HALF
        assert await tunnel.server.wait() == 0


async def test_a_server_that_is_killed_is_missed_at_once_and_its_port_is_free() -> None:
    command = with_limits(BACKOFF_MAX=0.3)
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, command=command) as tunnel:
        tunnel.server.send_signal(signal.SIGKILL)
        await tunnel.client.event("disconnected", timeout=pytunnel.PING_INTERVAL / 2)  # long before a ping is due
        await tunnel.server.wait()
        await tunnel.start_server()  # on the same port
        await tunnel.client.event("reconnected", timeout=AWAY)


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_client_in_the_middle_of_its_handshake_exits_at_once(number: int) -> None:
    """The server has upgraded the connection, and then says nothing."""

    async def upgrade(asked: RawRequest, reader: Reader, writer: Writer) -> None:
        import base64
        import hashlib

        key = (asked.value(b"Sec-WebSocket-Key") or b"") + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key).digest())
        writer.write(SWITCH + b"Sec-WebSocket-Accept: %b\r\nSec-WebSocket-Protocol: pytunnel.1\r\n\r\n" % accept)
        await writer.drain()
        await reader.read()

    async with RawOrigin(upgrade) as server:
        words = ["connect", "1", "--server", f"http://127.0.0.1:{server.port}", "--token", TOKEN, "--json"]
        async with await Process.start(*words) as client:
            await server.wait_for(lambda: server.bytes_received and b'"hello"' in _unmasked(server), AWAY, "the hello")
            began = time.monotonic()
            client.send_signal(number)
            assert await client.wait() == 130
            print(f"\nstopped after {time.monotonic() - began:.2f} s")
            assert time.monotonic() - began < 3.0
            assert "Traceback" not in client.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_client_that_waits_for_its_next_dial_does_not_wait_it_out(number: int) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, command=with_limits(BACKOFF_MIN=20.0)) as t:
        await t.stop_server(signal.SIGKILL)
        while (await t.client.event("disconnected"))["retry_in"] < 10.0:
            pass
        t.client.send_signal(number)
        assert await t.client.wait(5.0) == 0


def _unmasked(server: RawOrigin) -> bytes:
    """The payload of the one WebSocket message that a connection to the server has brought."""
    frame = bytes(server.connections[0]).partition(b"\r\n\r\n")[2]
    mask, data = frame[4:8], frame[8:]
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(data)) if mask else b""


# ---------------------------------------------------------------------------------------- Names


async def test_of_two_clients_that_race_for_a_name_exactly_one_has_it(tmp_path: Path) -> None:
    """A thousand times: they log in, lose their links, say goodbye and come back, in any order."""
    registry = TunnelRegistry(tmp_path / "names.json", grace=60.0, hold=0.0)
    grant = Grant.from_token("both", TOKEN)
    registry.admit([grant])
    chance = random.Random(1)
    rounds = 1000
    newest: Registration | None = None
    gone: list[Registration] = []

    def check() -> None:
        owners = [session for session in registry.sessions.values() if "web" in session.names]
        assert len(owners) <= 1
        assert registry._tunnels.get("web") is (owners[0] if owners else None)
        if owners:
            assert owners[0] is newest, "whoever bound it last"
        assert not any(session.id in registry.sessions for session in gone)

    async def client(number: int) -> None:
        nonlocal newest
        previous = ""
        for _ in range(rounds // 2):
            registry.claim(grant.key, ["web"])
            session = Registration(grant.key, ["web"], Session(is_server=True))
            if newest and newest.id in registry.sessions:
                gone.append(newest)
            registry.bind(session, previous if chance.random() < 0.5 else "")
            newest = session
            check()
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
                check()
            if chance.random() < 0.3:
                registry.disconnected(session)
            if chance.random() < 0.3:
                registry.end(session, StreamReset(ErrorCode.LINK_LOST))
                gone.append(session)
            check()
            previous = session.id

    async def visitor() -> None:
        while not all(task.done() for task in clients):
            with contextlib.suppress(pytunnel.Unserved):
                assert await registry.find("web") is newest
            await asyncio.sleep(0)

    clients = [asyncio.create_task(client(number)) for number in range(2)]
    await asyncio.gather(*clients, asyncio.create_task(visitor()))
    assert len(gone) > rounds // 4
