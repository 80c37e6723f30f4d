"""Two machines on this one: a network namespace each for home and server, and the router's program between them.

    home 10.77.0.1 -- [router] -- 10.77.0.2 server

The home uplink lets 20 Mbit/s out and has a queue of 300 KB, as cheap routers do; the other way nothing is held up.
The long path takes 50 ms each way and carries 100 Mbit/s. Both need root. A namespace lives as long as a process in
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
def _network(congestion: str, up: dict[str, float], down: dict[str, float]) -> Iterator[tuple[Side, Side]]:
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> tuple[subprocess.Popen[bytes], str]:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
            stack.callback(end, process)
            assert process.stdout
            return process, process.stdout.readline().decode()

        holders = {
            name: start("unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity")[0] for name in ADDRESSES
        }
        program = str(Path(__file__).with_name("router.py"))
        devices = start(sys.executable, program, json.dumps(up), json.dumps(down))[1].split()
        sides = {}
        for (name, address), device in zip(ADDRESSES.items(), devices, strict=True):
            pid = holders[name].pid
            sides[name] = Side(address, ("nsenter", f"--net=/proc/{pid}/ns/net"))
            peer = next(other for other in ADDRESSES.values() if other != address)
            subprocess.run(["ip", "link", "set", device, "netns", str(pid)], check=True)
            commands = [
                "ip link set lo up",
                f"ip addr add {address} dev {device}",
                f"ip link set {device} mtu 1500 txqueuelen 10000 up",
                # Locked: a program that asks for another one does not get it, which tells what it is without.
                f"ip route add {peer} dev {device} src {address} congctl lock {congestion}",
            ]
            subprocess.run([*sides[name].prefix, "sh", "-ec", "\n".join(commands)], check=True)
        yield sides["home"], sides["server"]


def available() -> list[str]:
    """The congestion controls that this kernel has, of those that are measured."""
    found = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return [name for name in ("bbr", "cubic") if name in found]


def used(side: Side, peer: str) -> list[str]:
    """The congestion controls of a side's connections to a peer, one each."""
    text = subprocess.run([*side.prefix, "ss", "-tinH", "dst", peer], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in text.splitlines() if line[:1].isspace()]
