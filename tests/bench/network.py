"""Networks on this machine: a network namespace each for home and server, and the router's program between them.

    home 10.77.0.1 -- [router] -- 10.77.0.2 server

The home uplink lets 20 Mbit/s out and has a queue of 300 KB, as cheap routers do; the other way nothing is held up.
The long path takes 50 ms each way and carries 100 Mbit/s. All take root. A namespace lives as long as a process in
it does, so nothing is left behind, however the benchmark ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .contenders import Side, end

ADDRESSES = {"home": "10.77.0.1", "server": "10.77.0.2"}
UPLINK = 20e6  # bits a second
UPLINK_QUEUE = 300_000  # bytes
LONG_PATH = 100e6  # bits a second
LONG_DELAY = 0.05  # seconds each way
LONG_QUEUE = 1_250_000  # bytes: as much as the path holds, so that cubic can fill it


@contextlib.contextmanager
def uplink(congestion: str, delay: float = 0.0) -> Iterator[tuple[Side, Side]]:
    """Home and server with the home uplink between them; `delay` seconds each way come on top."""
    way = {"rate": UPLINK, "queue": UPLINK_QUEUE, "delay": delay}
    with _network(congestion, way, {"delay": delay}) as sides:
        yield sides


@contextlib.contextmanager
def long_path(congestion: str) -> Iterator[tuple[Side, Side]]:
    """Home and server with the long path between them."""
    way = {"rate": LONG_PATH, "queue": LONG_QUEUE, "delay": LONG_DELAY}
    with _network(congestion, way, way) as sides:
        yield sides


@contextlib.contextmanager
def one_machine(congestion: str = "cubic") -> Iterator[tuple[Side, Side]]:
    """Home and server in one namespace, which has its own loopback interface and nothing else.

    The congestion control is Linux's usual one, whatever this machine has been told: BBR, which paces, takes half of
    the rate away there. A program may choose another one.
    """
    with contextlib.ExitStack() as stack:
        side = Side("127.0.0.1", _namespace(stack))
        route = "table local proto kernel scope host src 127.0.0.1"
        _configure(
            side,
            "ip link set lo up",
            *(
                f"ip route replace local {to} dev lo {route} congctl {congestion}"
                for to in ("127.0.0.0/8", "127.0.0.1")
            ),
        )
        yield side, side


@contextlib.contextmanager
def _network(congestion: str, up: dict[str, float], down: dict[str, float]) -> Iterator[tuple[Side, Side]]:
    with contextlib.ExitStack() as stack:
        sides = {name: Side(address, _namespace(stack)) for name, address in ADDRESSES.items()}
        program = str(Path(__file__).with_name("router.py"))
        devices = _start(stack, sys.executable, program, json.dumps(up), json.dumps(down))[1].split()
        peers = dict(zip(ADDRESSES.values(), reversed(ADDRESSES.values()), strict=True))
        for side, device in zip(sides.values(), devices, strict=True):
            namespace = side.prefix[1].removeprefix("--net=")
            subprocess.run(["ip", "link", "set", device, "netns", namespace.split("/")[2]], check=True)
            _configure(
                side,
                "ip link set lo up",
                f"ip addr add {side.address} dev {device}",
                f"ip link set {device} mtu 1500 txqueuelen 10000 up",
                # Locked: a program that asks for another one does not get it, which tells what it is without.
                f"ip route add {peers[side.address]} dev {device} src {side.address} congctl lock {congestion}",
            )
        yield sides["home"], sides["server"]


def _namespace(stack: contextlib.ExitStack) -> tuple[str, ...]:
    """Make a network namespace; return the command that runs another one in it."""
    holder, _ = _start(stack, "unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity")
    return "nsenter", f"--net=/proc/{holder.pid}/ns/net"


def _start(stack: contextlib.ExitStack, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a program that ends with the stack; return it, and the line with which it says that it works."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
    stack.callback(end, process)
    assert process.stdout
    return process, process.stdout.readline().decode()


def _configure(side: Side, *commands: str) -> None:
    subprocess.run([*side.prefix, "sh", "-ec", "\n".join(commands)], check=True)


def available() -> list[str]:
    """The congestion controls that this kernel has, of those that are measured."""
    found = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return [name for name in ("bbr", "cubic") if name in found]


def used(side: Side, peer: str) -> list[str]:
    """The congestion controls of a side's connections to a peer, one each."""
    text = subprocess.run([*side.prefix, "ss", "-tinH", "dst", peer], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in text.splitlines() if line[:1].isspace()]
