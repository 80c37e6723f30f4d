"""A router between two networks, in user space: it has a rate, a drop-tail queue and a delay in each direction.

    python tests/bench/router.py '{"rate": 20e6, "queue": 300000}' '{}'

It makes two TUN devices, prints their names, and forwards each packet that one of them sends to the other: the
first argument is for packets of the first device. No kernel module is needed, and real TCP on both sides sees
packets of 1,500 bytes, a queue that fills, and losses when it is full.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import gc
import json
import math
import os
import select
import struct
import sys
import time

PACKET = 65536  # bytes; a TUN device of the usual MTU sends at most 1,500
BATCH = 64  # packets taken from one side before the other one has its turn
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


class Way:
    """One direction: a queue of at most `queue` bytes, a link of `rate` bits a second behind it, and a `delay`.

    Time is an argument. The link sends one packet after another; a packet's bytes are those of IP.
    """

    def __init__(self, rate: float = math.inf, queue: float = math.inf, delay: float = 0.0) -> None:
        self.rate, self.queue, self.delay = rate, queue, delay
        self.dropped = 0  # packets
        self._free_at = 0.0  # when the link will have sent what it has
        self._under_way: collections.deque[tuple[float, bytes]] = collections.deque()

    def put(self, packet: bytes, now: float) -> None:
        """Take a packet, or drop it when the queue has no room for it."""
        starts = max(now, self._free_at)
        if (waiting := starts - now) and waiting * self.rate / 8 + len(packet) > self.queue:
            self.dropped += 1
            return
        self._free_at = starts + len(packet) * 8 / self.rate
        self._under_way.append((self._free_at + self.delay, packet))

    def take(self, now: float) -> bytes | None:
        """The next packet that has arrived at the far end by now."""
        if self._under_way and self._under_way[0][0] <= now:
            return self._under_way.popleft()[1]
        return None

    @property
    def due(self) -> float:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else math.inf


def open_tun() -> tuple[int, str]:
    """A new TUN device: its file descriptor, and its name."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    made = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"bench%d", IFF_TUN | IFF_NO_PI))
    return fd, made[:16].rstrip(b"\0").decode()


def forward(near: int, far: int, there: Way, back: Way) -> None:
    """Forward for ever."""
    ways = ((near, there, far), (far, back, near))
    while True:
        now = time.monotonic()
        for _, way, out in ways:
            while packet := way.take(now):
                with contextlib.suppress(OSError):  # EIO: the far end is down
                    os.write(out, packet)
        wait = min(there.due, back.due) - time.monotonic()
        ready = select.select([near, far], [], [], None if wait == math.inf else max(0.0, wait))[0]
        for source, way, _ in ways:
            if source in ready:
                _read(source, way)


def _read(source: int, way: Way) -> None:
    now = time.monotonic()
    try:
        for _ in range(BATCH):
            way.put(os.read(source, PACKET), now)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EBADFD):  # EBADFD: the device's network namespace is gone
            raise


if __name__ == "__main__":
    devices = [open_tun(), open_tun()]
    print(*(name for _, name in devices), flush=True)
    gc.disable()  # a packet makes no cycles
    forward(devices[0][0], devices[1][0], *(Way(**json.loads(argument)) for argument in sys.argv[1:3]))
