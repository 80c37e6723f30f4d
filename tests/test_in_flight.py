"""What is in flight: a session over a simulated path. The link is busy, the queue in front of it short.

Time is an argument, so that a minute of a link takes a moment, and no result depends on this machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest

import pytunnel
from pytunnel import ASK, END, Frame, FrameDecoder, FrameType, InFlight, Kind, Session

MBIT = 1e6 / 8  # bytes a second
REQUEST, RESPONSE = b"GET\0/", b"200\0OK"


class Seen(NamedTuple):
    """What became of some seconds."""

    busy: float  # share of the link's rate that was content
    queue: float  # seconds that a message has waited in front of the link: nineteen in twenty less
    largest: int  # bytes of a message


class Path:
    """A client sends a body that never ends; what it sends waits in a queue for the link, then it travels.

    The receiver may take its time for what it gets, and its answers may come late by any time up to `jitter`.
    """

    def __init__(self, rate: float, round_trip: float, *, jitter: float = 0.0, receiver: float = float("inf")) -> None:
        self.rate, self.round_trip, self.jitter, self.receiver = rate, round_trip, jitter, receiver
        self.has_more = True  # to send
        self.now = 0.0
        self.got = 0  # bytes of content
        self.small: dict[int, float] = {}  # stream -> when its small response was written
        self.took: list[float] = []  # seconds until it was there
        self._random = random.Random(0)
        self._events: list[tuple[float, int, Callable[..., None], tuple[bytes, ...]]] = []
        self._number = itertools.count()
        self._free_at = self._taken_at = self._answered_at = 0.0
        self._waited: list[float] = []
        self._largest = 0
        self.client, self.server = Session(is_server=False), Session(is_server=True)
        for session in (self.client, self.server):
            session.resume(0, 0.0)
        self.large = self.server.open_stream(0, Kind.HTTP, REQUEST, end=True)
        self._hear(self.server.data_to_send())

    def ask_for_little(self) -> None:
        self.server.open_stream(0, Kind.HTTP, REQUEST, end=True)
        self._answer()

    def run(self, seconds: float) -> Seen:
        """Let time pass."""
        until, got = self.now + seconds, self.got
        self._waited, self._largest = [0.0], 0
        self._send()
        while self._events and self._events[0][0] < until:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
            for session in (self.client, self.server):
                assert not session.handle_timeout(self.now), "the link counts as dead"
            self._answer()
            self._send()
            if not self._events:
                self._at(max(self.now, self.server.next_deadline()), lambda: None)
        self.now = until
        queue = sorted(self._waited)[len(self._waited) * 95 // 100]
        return Seen((self.got - got) / (self.rate * seconds), queue, self._largest)

    def _at(self, time: float, act: Callable[..., None], *arguments: bytes) -> None:
        heapq.heappush(self._events, (time, next(self._number), act, arguments))

    def _send(self) -> None:
        while True:
            stream = self.client._streams[self.large]
            while self.has_more and stream.buffered <= pytunnel.SEND_BUFFER:
                self.client.send_data(self.large, bytes(2 * pytunnel.SEND_BUFFER))
            message = self.client.data_to_send(now=self.now)
            if not message:
                return
            start = max(self.now, self._free_at)
            self._waited.append(start - self.now)
            self._largest = max(self._largest, len(message))
            self._free_at = start + len(message) / self.rate
            self._at(self._free_at + self.round_trip / 2, self._arrive, message)

    def _arrive(self, message: bytes) -> None:
        self._taken_at = max(self.now, self._taken_at) + len(message) / self.receiver
        self._at(self._taken_at, self._receive, message)

    def _receive(self, message: bytes) -> None:
        for frame in self.server.receive_data(message, self.now):
            if frame.type == FrameType.DATA:
                self.got += len(frame.payload)
                self.server.acknowledge_received_data(frame.stream_id, len(frame.payload))
                if frame.flags & END:
                    self.took.append(self.now - self.small.pop(frame.stream_id))

    def _answer(self) -> None:
        if message := self.server.data_to_send(now=self.now):
            late = self._random.random() * self.jitter
            self._answered_at = max(self._answered_at, self.now + self.round_trip / 2 + late)
            self._at(self._answered_at, self._hear, message)

    def _hear(self, message: bytes) -> None:
        for frame in self.client.receive_data(message, self.now):
            self.client.send_head(frame.stream_id, RESPONSE)
            if frame.stream_id != self.large:
                self.small[frame.stream_id] = self.now
                self.client.send_data(frame.stream_id, bytes(1000), end=True)


def wanted(round_trip: float, rate: float) -> float:
    """Seconds of queue that are all right: twice the aim, and three of the smallest turns."""
    return 2 * max(pytunnel.QUEUE_TIME, round_trip / 8) + 3 * (pytunnel.MIN_TURN + 50) / rate


ROUND_TRIPS = [0.0005, 0.001, 0.02, 0.1, 0.3]
RATES = [1 * MBIT, 20 * MBIT, 100 * MBIT]


@pytest.mark.parametrize("round_trip", ROUND_TRIPS)
@pytest.mark.parametrize("rate", RATES)
def test_the_link_is_busy_and_its_queue_short(rate: float, round_trip: float) -> None:
    path = Path(rate, round_trip)
    path.run(10.0)
    seen = path.run(9.0)  # with the probe that comes every ten seconds, or without
    assert seen.busy > (0.97 if rate > MBIT else 0.92)  # two turns of MIN_TURN are long there
    assert seen.queue < wanted(round_trip, rate)
    assert seen.largest <= max(pytunnel.MIN_TURN, 3 * pytunnel.TURN_TIME * rate) + 100


@pytest.mark.parametrize("round_trip", [0.0005, 0.02, 0.1])
def test_a_fast_link_is_full_soon(round_trip: float) -> None:
    path = Path(100 * MBIT, round_trip)
    path.run(0.1 + 10 * round_trip)
    assert path.run(1.0).busy > 0.85


def test_a_very_fast_link_is_not_held_back() -> None:
    """As on one machine, where the receiver is what takes time."""
    path = Path(100_000 * MBIT, 0.0003, receiver=500e6)
    path.run(1.0)
    assert path.run(2.0).busy * path.rate > 0.85 * path.receiver
    assert path.client._in_flight.limit >= pytunnel.FAST_CAP


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("jitter", [0.002, 0.01, 0.03])
def test_acks_that_are_late_now_and_then_do_not_make_the_link_idle(jitter: float, round_trip: float) -> None:
    path = Path(20 * MBIT, round_trip, jitter=jitter)
    path.run(10.0)
    seen = path.run(20.0)
    assert seen.busy > 0.92
    assert seen.queue < wanted(round_trip, path.rate) + 3 * jitter


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.1])
def test_a_link_that_becomes_slower_and_faster(round_trip: float) -> None:
    path = Path(100 * MBIT, round_trip)
    path.run(5.0)
    path.rate = 10 * MBIT
    path.run(6.0)
    seen = path.run(4.0)
    assert seen.busy > 0.95 and seen.queue < wanted(round_trip, path.rate)
    path.rate = 100 * MBIT
    path.run(2.0)
    seen = path.run(4.0)
    assert seen.busy > 0.95 and seen.queue < wanted(round_trip, path.rate)


def test_a_path_that_becomes_longer_and_shorter() -> None:
    path = Path(20 * MBIT, 0.02)
    path.run(5.0)
    path.round_trip = 0.12
    path.run(3.0)
    assert path.run(1.0).busy > 0.8, "it is found out quickly"
    path.run(3.0)
    seen = path.run(5.0)
    assert seen.busy > 0.95 and seen.queue < wanted(0.12, path.rate) + 0.02
    path.round_trip = 0.02
    path.run(11.0)
    seen = path.run(5.0)
    assert seen.busy > 0.95 and seen.queue < wanted(0.02, path.rate) + 0.01


def test_a_pause_does_not_make_a_link_look_slow() -> None:
    path = Path(20 * MBIT, 0.02)
    path.run(5.0)
    assert 0.9 < path.client._in_flight.rate / path.rate < 1.1
    path.has_more = False
    path.run(5.0)
    path.has_more = True
    for _ in range(50):
        path.run(0.02)
        assert path.client._in_flight.rate > 0.8 * path.rate
    assert path.run(1.0).busy > 0.95


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.1])
def test_a_receiver_that_is_the_slowest_has_little_waiting(round_trip: float) -> None:
    path = Path(100 * MBIT, round_trip, receiver=40 * MBIT)
    path.run(5.0)
    seen = path.run(4.0)
    assert seen.busy * path.rate > 0.95 * path.receiver
    limit = path.receiver * (round_trip + 3 * wanted(round_trip, path.receiver))
    assert path.client._in_flight.bytes < limit


@pytest.mark.parametrize("rate", [3_000, 6_000, 16_000])
def test_a_very_slow_link_holds(rate: float) -> None:
    """Only whole messages are a sign of life: `run` fails when one takes too long."""
    path = Path(rate, 0.3)
    path.run(60.0)
    seen = path.run(60.0)
    assert seen.busy > 0.9
    assert seen.largest < pytunnel.MIN_TURN + 100
    assert seen.queue < 2.0


@pytest.mark.parametrize("rate", [5 * MBIT, 20 * MBIT])
def test_a_small_response_overtakes_what_waits_for_room(rate: float) -> None:
    path = Path(rate, 0.001)
    path.run(2.0)
    for _ in range(100):
        path.ask_for_little()
        path.run(0.0501)
    assert len(path.took) >= 99
    assert max(path.took) < wanted(0.001, rate) + 0.005
    assert path.run(1.0).busy > 0.95, "and the large one went on"


def test_small_responses_without_an_end_do_not_stop_a_large_one() -> None:
    path = Path(5 * MBIT, 0.001)
    path.run(2.0)
    path.took.clear()
    got = path.got
    for _ in range(2000):  # twice as much as the link carries
        if path.server.streams < pytunnel.MAX_STREAMS:
            path.ask_for_little()
        path.run(0.0008)
    assert path.got - got - 1000 * len(path.took) > 0.2 * 1.6 * path.rate


# What the sender does


def flows(flight: InFlight, seconds: float, size: int, round_trip: float) -> None:
    """Send so much every round trip, with an answer each."""
    frames, now = 0, 0.0
    while now < seconds:
        frames += 1
        asks = flight.wants_ack(size)
        flight.send(size)
        if asks:
            flight.ask(frames, now)
        now += round_trip
        flight.acknowledge(frames, size, now)


def test_what_is_not_limited_by_the_link_tells_nothing_about_it() -> None:
    flight = InFlight()
    flows(flight, 60.0, 1000, 0.1)
    assert flight.limit == pytunnel.FIRST_CAP
    assert flight.has_room and flight.bytes == 0


def sender() -> Session:
    """A client with much to send and all the credit it wants."""
    session = Session(is_server=False, send_window=2**30)
    session.resume(0, 0.0)
    session.receive_data(pytunnel.encode_frame(FrameType.OPEN, END, 1, b"\0\0\0\0\0\0\0GET\0/"), 0.0)
    session.send_head(1, RESPONSE)
    session.send_data(1, bytes(10 * 1024 * 1024))
    return session


def sent(session: Session, now: float = 0.0) -> list[Frame]:
    return FrameDecoder().feed(session.data_to_send(now=now))


def until_full(session: Session) -> list[Frame]:
    frames: list[Frame] = []
    while session.has_data_to_send:
        frames += sent(session)
    assert sent(session) == []
    return [frame for frame in frames if frame.type not in pytunnel.LINK_LEVEL]


def ack(count: int) -> bytes:
    return pytunnel.encode_frame(FrameType.ACK, 0, 0, count.to_bytes(8, "big"))


def test_data_waits_for_an_ack_that_it_has_asked_for_and_control_frames_do_not() -> None:
    session = sender()
    frames = until_full(session)
    size = sum(len(frame.payload) + pytunnel.FRAME_HEADER.size for frame in frames)
    assert pytunnel.FIRST_CAP <= size <= pytunnel.FIRST_CAP + pytunnel.FIRST_CAP // 4 + 100
    assert frames[-1].flags & ASK
    assert not session.is_flushed
    session.send_goaway(pytunnel.ErrorCode.SHUTDOWN, "")
    assert [frame.type for frame in sent(session)] == [FrameType.GOAWAY]
    session.receive_data(ack(len(frames) // 2), 0.1)
    assert session.has_data_to_send
    assert {frame.type for frame in sent(session)} == {FrameType.DATA}


def test_a_link_is_dead_when_nothing_is_acknowledged_that_was_asked_for() -> None:
    session = sender()
    until_full(session)
    now = pytunnel.WRITE_TIMEOUT - 0.1
    session.receive_data(pytunnel.encode_frame(FrameType.PONG, 0, 0, bytes(8)) + ack(0), now)
    assert session.next_deadline() <= pytunnel.WRITE_TIMEOUT
    assert not session.handle_timeout(now)
    session.receive_data(ack(5), now)
    now += pytunnel.WRITE_TIMEOUT
    session.receive_data(pytunnel.encode_frame(FrameType.PONG, 0, 0, bytes(8)), now - 0.2)
    assert not session.handle_timeout(now - 0.1)
    assert session.handle_timeout(now) == "nothing was acknowledged for 10 s"
    session.suspend()
    session.resume(5, now)
    assert not session.handle_timeout(now)


def test_what_is_sent_again_is_bounded_and_asked_for_as_well() -> None:
    session = sender()
    session._in_flight.limit = 2**40
    with mock.patch.object(InFlight, "wants_ack", lambda flight, n: False):
        for _ in range(1000):
            sent(session)
    everything = session._unacked_bytes
    session.suspend()
    session.resume(0, 1.0)
    again = until_full(session)
    assert session._in_flight.bytes < 2 * pytunnel.FIRST_CAP < everything
    assert sum(frame.flags & ASK > 0 for frame in again) >= 4
    received, now = 0, 1.0
    while session._replay:
        received += len(again)
        now += 0.05
        session.receive_data(ack(received), now)
        again = until_full(session)
        assert now < 10.0
    assert session._in_flight.bytes == session._unacked_bytes


def test_who_is_asked_acknowledges_at_once() -> None:
    session = Session(is_server=False)
    session.resume(0, 0.0)
    session.receive_data(pytunnel.encode_frame(FrameType.OPEN, 0, 1, b"\0\0\0\0\0\0\0GET\0/"), 0.0)
    session.receive_data(pytunnel.encode_frame(FrameType.DATA, 0, 1, b"x"), 0.0)
    assert not session.has_data_to_send
    session.receive_data(pytunnel.encode_frame(FrameType.DATA, ASK, 1, b"x"), 0.0)
    assert session.data_to_send() == ack(3)


def test_a_peer_who_acknowledges_in_no_time_or_never_changes_no_bound() -> None:
    session = sender()
    for _ in range(500):
        until_full(session)
        session.receive_data(ack(session._acked + len(session._unacked)), 0.0)
        assert pytunnel.MIN_CAP <= session._in_flight.limit <= pytunnel.MAX_UNACKED
        session.send_data(1, bytes(4 * 1024 * 1024))
    until_full(session)
    assert session._unacked_bytes < pytunnel.MAX_UNACKED + pytunnel.MAX_TURN + 100


def test_heads_ask_for_an_ack_too() -> None:
    """Else they alone could be all that may be in flight, and content would wait until the peer's ACK_DELAY is over."""
    session = Session(is_server=True)
    session.resume(0, 0.0)
    head = pytunnel.RequestHead(b"GET", b"/" + b"x" * 8000, []).encode()
    frames: list[Frame] = []
    while session._in_flight.bytes < session._in_flight.limit:
        session.open_stream(0, Kind.HTTP, head)
        frames += sent(session)
    assert all(frame.type == FrameType.OPEN for frame in frames) and any(frame.flags & ASK for frame in frames)
    assert session._in_flight.ack_deadline < math.inf
