"""Session: states, flow control, fair sending, acknowledgement and resume, keepalive, limits, hostile peers."""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pytunnel
from pytunnel import (
    BLOCKED,
    END,
    INITIAL_WINDOW,
    INTERIM,
    MAX_BATCH,
    MAX_INTERIM,
    MAX_PENDING,
    MAX_PENDING_PONGS,
    MAX_STREAM_WINDOW,
    MAX_UNACKED,
    MAX_WIDENED,
    TRANSITIONS,
    ErrorCode,
    Frame,
    FrameDecoder,
    FrameType,
    Input,
    Kind,
    ProtocolError,
    RequestHead,
    ResponseHead,
    Session,
    StreamReset,
    StreamState,
    encode_frame,
    encode_reason,
)

HEADER = pytunnel.FRAME_HEADER.size
REQUEST = b"GET\0/"
RESPONSE = b"200\0OK"
INFINITY = float("inf")
SMALL = 100  # bytes of window
TURN = 64 * 1024  # bytes of a turn on a link that is fast enough


# What a peer may say, as bytes


def head(stream_id: int = 1, flags: int = 0, payload: bytes = RESPONSE) -> bytes:
    return encode_frame(FrameType.HEAD, flags, stream_id, payload)


def data(stream_id: int = 1, content: bytes = b"x", flags: int = 0) -> bytes:
    return encode_frame(FrameType.DATA, flags, stream_id, content)


def open_(stream_id: int = 1, flags: int = 0) -> bytes:
    return encode_frame(FrameType.OPEN, flags, stream_id, b"\0\0\0" + REQUEST)


def reset(stream_id: int = 1, code: ErrorCode = ErrorCode.CANCEL) -> bytes:
    return encode_frame(FrameType.RESET, 0, stream_id, encode_reason(code, ""))


def window(stream_id: int = 1, credit: int = 1) -> bytes:
    return encode_frame(FrameType.WINDOW, 0, stream_id, credit.to_bytes(4, "big"))


def ack(count: int) -> bytes:
    return encode_frame(FrameType.ACK, 0, 0, count.to_bytes(8, "big"))


def ping(payload: bytes = bytes(8)) -> bytes:
    return encode_frame(FrameType.PING, 0, 0, payload)


def goaway(code: ErrorCode = ErrorCode.SHUTDOWN, reason: str = "") -> bytes:
    return encode_frame(FrameType.GOAWAY, 0, 0, encode_reason(code, reason))


# Sessions to talk to


class Unlimited(pytunnel.InFlight):
    """As if the link were known to be fast; test_in_flight.py is about those that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.turn = 2**40, TURN

    def wants_ack(self, n: int) -> bool:
        return False

    def acknowledge(self, frames: int, n: int, now: float) -> None:
        pass


def connected(*, is_server: bool, size: int = INITIAL_WINDOW, max_streams: int = 512) -> Session:
    session = Session(is_server=is_server, send_window=size, receive_window=size, max_streams=max_streams)
    session.resume(0, 0.0)
    session._in_flight = Unlimited()
    return session


def server_with_stream(*, size: int = INITIAL_WINDOW, end: bool = False) -> Session:
    """A server whose stream 1 has sent its OPEN."""
    session = connected(is_server=True, size=size)
    assert session.open_stream(0, Kind.HTTP, REQUEST, end=end) == 1
    assert types(session) == ["OPEN"]
    return session


def client_with_stream(*, size: int = INITIAL_WINDOW, end: bool = False) -> Session:
    """A client whose stream 1 has been opened."""
    session = connected(is_server=False, size=size)
    session.receive_data(open_(1, END if end else 0), 0.0)
    return session


def sent(session: Session, limit: int = MAX_BATCH, now: float = 0.0) -> list[Frame]:
    """What one message holds."""
    return FrameDecoder().feed(session.data_to_send(limit, now))


def types(session: Session, now: float = 0.0) -> list[str]:
    return [FrameType(frame.type).name for frame in sent(session, now=now)]


def state_of(session: Session, stream_id: int = 1) -> StreamState:
    stream = session._streams.get(stream_id)
    return stream.state if stream else StreamState.CLOSED


class Pair:
    """A server and a client, and what is on its way between them. Time moves only when told."""

    def __init__(self, **options: int) -> None:
        self.server = Session(is_server=True, **options)
        self.client = Session(is_server=False, **options)
        self.now = 0.0
        self.wires = {self.server: bytearray(), self.client: bytearray()}  # by who reads it
        self.link()

    def peer(self, session: Session) -> Session:
        return self.client if session is self.server else self.server

    def link(self) -> None:
        """A new connection, whose handshake tells each side what the other one has received."""
        received = self.server.received, self.client.received
        self.server.resume(received[1], self.now)
        self.client.resume(received[0], self.now)

    def cut(self) -> None:
        """The connection is gone, with what was on its way."""
        for session, wire in self.wires.items():
            session.suspend()
            wire.clear()

    def send(self, session: Session, limit: int = MAX_BATCH) -> int:
        message = session.data_to_send(limit, self.now)
        self.wires[self.peer(session)] += message
        return len(message)

    def deliver(self, session: Session, n: int | None = None) -> list[Frame]:
        wire = self.wires[session]
        piece = bytes(wire[:n])
        del wire[:n]
        return session.receive_data(piece, self.now) if piece else []

    def exchange(self) -> tuple[list[Frame], list[Frame]]:
        """Let both talk until both are silent; return the events at the server and at the client."""
        events: tuple[list[Frame], list[Frame]] = ([], [])
        while self.send(self.server) + self.send(self.client):
            events[0].extend(self.deliver(self.server))
            events[1].extend(self.deliver(self.client))
        return events


def content(events: Iterable[Frame], stream_id: int = 1) -> bytes:
    return b"".join(f.payload for f in events if f.type == FrameType.DATA and f.stream_id == stream_id)


# One exchange


def test_a_request_and_its_response() -> None:
    pair = Pair()
    stream = pair.server.open_stream(3, Kind.UPGRADE, REQUEST)
    assert pair.server.send_data(stream, b"up") == 2
    pair.server.send_data(stream, b"load", end=True)
    at_server, at_client = pair.exchange()
    assert at_server == []
    assert at_client == [
        Frame(FrameType.OPEN, 0, stream, b"\0\3\1\0\0\0\0" + REQUEST),
        Frame(FrameType.DATA, END, stream, b"upload"),
    ]
    pair.client.send_head(stream, b"103\0Early", interim=True)
    pair.client.send_head(stream, RESPONSE)
    pair.client.send_data(stream, b"down", end=True)
    at_server, at_client = pair.exchange()
    assert at_client == []
    assert at_server == [
        Frame(FrameType.HEAD, INTERIM, stream, b"103\0Early"),
        Frame(FrameType.HEAD, 0, stream, RESPONSE),
        Frame(FrameType.DATA, END, stream, b"down"),
    ]
    assert pair.server.streams == pair.client.streams == 0


def test_a_response_may_end_before_its_request() -> None:
    pair = Pair()
    stream = pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.exchange()
    pair.client.send_head(stream, RESPONSE, end=True)
    assert [f.flags for f in pair.exchange()[0]] == [END]
    assert pair.server.streams == pair.client.streams == 1
    pair.server.send_data(stream, b"late", end=True)
    assert content(pair.exchange()[1]) == b"late"
    assert pair.server.streams == pair.client.streams == 0


def test_ids_grow_and_are_not_used_again() -> None:
    session = connected(is_server=True)
    ids = []
    for _ in range(5):
        ids.append(session.open_stream(0, Kind.HTTP, REQUEST))
        session.send_reset(ids[-1], ErrorCode.CANCEL)
    assert ids == [1, 2, 3, 4, 5]
    assert session.streams == 0


def test_nothing_is_sent_without_a_link() -> None:
    session = Session(is_server=True)
    stream = session.open_stream(0, Kind.HTTP, REQUEST)
    session.send_data(stream, b"body")
    assert session.data_to_send() == b""
    assert session.next_deadline() == INFINITY
    assert not session.handle_timeout(1e9)
    session.resume(0, 0.0)
    assert types(session) == ["OPEN", "DATA"]


# The states


def _send(session: Session) -> None:
    if session.is_server:
        session.send_data(1, b"x")
        session.data_to_send()
    else:
        session.send_head(1, RESPONSE)


def _send_end(session: Session) -> None:
    if session.is_server:
        session.send_data(1, b"x", end=True)
        session.data_to_send()
    else:
        session.send_head(1, RESPONSE, end=True)


INPUTS: dict[Input, Callable[[Session], object]] = {
    Input.OPEN: lambda s: s.open_stream(0, Kind.HTTP, REQUEST) if s.is_server else s.receive_data(open_(), 0),
    Input.SEND: _send,
    Input.SEND_END: _send_end,
    Input.RECEIVE: lambda s: s.receive_data(head() if s.is_server else data(), 0.0),
    Input.RECEIVE_END: lambda s: s.receive_data(head(flags=END) if s.is_server else data(flags=END), 0.0),
    Input.RESET: lambda s: s.receive_data(reset(), 0.0),
}
PATHS = {
    StreamState.IDLE: [],
    StreamState.OPEN: [Input.OPEN],
    StreamState.HALF_CLOSED_LOCAL: [Input.OPEN, Input.SEND_END],
    StreamState.HALF_CLOSED_REMOTE: [Input.OPEN, Input.RECEIVE_END],
    StreamState.CLOSED: [Input.OPEN, Input.RESET],
}
RECEIVED = {Input.RECEIVE, Input.RECEIVE_END, Input.RESET}


def in_state(state: StreamState, *, is_server: bool) -> Session:
    session = connected(is_server=is_server)
    for input_ in PATHS[state]:
        INPUTS[input_](session)
        session.data_to_send()
    return session


def test_the_table_says_what_the_diagram_does() -> None:
    S, I = StreamState, Input  # noqa: E741
    assert TRANSITIONS == {
        (S.IDLE, I.OPEN): S.OPEN,
        (S.OPEN, I.SEND): S.OPEN,
        (S.OPEN, I.SEND_END): S.HALF_CLOSED_LOCAL,
        (S.OPEN, I.RECEIVE): S.OPEN,
        (S.OPEN, I.RECEIVE_END): S.HALF_CLOSED_REMOTE,
        (S.OPEN, I.RESET): S.CLOSED,
        (S.HALF_CLOSED_LOCAL, I.RECEIVE): S.HALF_CLOSED_LOCAL,
        (S.HALF_CLOSED_LOCAL, I.RECEIVE_END): S.CLOSED,
        (S.HALF_CLOSED_LOCAL, I.RESET): S.CLOSED,
        (S.HALF_CLOSED_REMOTE, I.SEND): S.HALF_CLOSED_REMOTE,
        (S.HALF_CLOSED_REMOTE, I.SEND_END): S.CLOSED,
        (S.HALF_CLOSED_REMOTE, I.RESET): S.CLOSED,
    }


@pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("input_", Input, ids=lambda i: i.name)
@pytest.mark.parametrize("state", StreamState, ids=lambda s: s.name)
def test_all_states_and_inputs(state: StreamState, input_: Input, is_server: bool) -> None:
    session = in_state(state, is_server=is_server)
    if state is not StreamState.IDLE:
        assert state_of(session) is state
    wanted = TRANSITIONS.get((state, input_))
    act = INPUTS[input_]
    if wanted is not None:
        act(session)
        assert state_of(session) is wanted
        assert session.streams == (wanted is not StreamState.CLOSED)
    elif input_ is Input.OPEN and is_server:
        assert act(session) == 2  # always a new stream; the old one stays as it is
        assert state_of(session) is state
    elif state is StreamState.CLOSED and input_ in RECEIVED:
        assert act(session) == []  # it was on its way
        assert session.streams == 0
    elif state in (StreamState.IDLE, StreamState.CLOSED) and input_ not in RECEIVED and input_ is not Input.OPEN:
        with pytest.raises(StreamReset):
            act(session)
    else:
        # A peer that does this ends the session; a caller of ours that does it has a bug, which must not
        # reach the peer.
        with pytest.raises((ProtocolError, AssertionError)):
            act(session)


@pytest.mark.parametrize("input_", [Input.SEND, Input.SEND_END], ids=lambda i: i.name)
def test_a_caller_that_sends_after_its_end_is_stopped_at_once(input_: Input) -> None:
    """Not in data_to_send, where the session of all the other streams would pay for it."""
    session = connected(is_server=True)
    stream = session.open_stream(0, Kind.HTTP, REQUEST, end=True)
    with pytest.raises((AssertionError, StreamReset)):
        session.send_data(stream, b"x", end=input_ is Input.SEND_END)


# Flow control


@pytest.mark.parametrize("size", [1, 1000, INITIAL_WINDOW])
def test_a_sender_stops_at_the_window_and_goes_on_with_credit(size: int) -> None:
    session = server_with_stream(size=size)
    session.send_data(1, bytes(size + 10), end=True)
    assert sum(len(sent(session)[0].payload) for _ in range(max(1, size // TURN))) == size
    assert session.data_to_send() == b""
    session.receive_data(window(1, 4), 0.0)
    assert [(f.flags, len(f.payload)) for f in sent(session) if f.type == FrameType.DATA] == [(BLOCKED, 4)]
    session.receive_data(window(1, 100), 0.0)
    assert [(f.flags, len(f.payload)) for f in sent(session) if f.type == FrameType.DATA] == [(END, 6)]


def test_an_end_needs_no_credit() -> None:
    session = server_with_stream(size=3)
    session.send_data(1, b"abc")
    session.data_to_send()
    session.send_data(1, b"", end=True)
    assert sent(session) == [Frame(FrameType.DATA, END, 1, b"")]


def test_credit_is_returned_for_what_is_read() -> None:
    session = client_with_stream(size=100)
    session.receive_data(data(1, bytes(100)), 0.0)
    session.acknowledge_received_data(1, 49)
    assert "WINDOW" not in types(session)
    assert session.acknowledge_received_data(1, 1) == 50
    assert session.acknowledge_received_data(1, 50) == 50
    assert [f for f in sent(session) if f.type == FrameType.WINDOW] == [
        Frame(FrameType.WINDOW, 0, 1, (100).to_bytes(4, "big"))
    ]


def test_credit_that_arrives_after_the_end_is_of_no_use() -> None:
    """The reader of an upload may still be reading when its writer has sent the END long ago."""
    pair = Pair()
    stream = pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.server.send_data(stream, bytes(INITIAL_WINDOW), end=True)
    pair.exchange()
    pair.client.acknowledge_received_data(stream, INITIAL_WINDOW)
    assert pair.exchange() == ([], [])
    assert state_of(pair.server) is StreamState.HALF_CLOSED_LOCAL
    pair.client.send_head(stream, RESPONSE, end=True)
    assert [event.flags for event in pair.exchange()[0]] == [END]
    assert pair.server.streams == 0


def test_no_credit_for_a_closed_stream() -> None:
    session = client_with_stream(size=100)
    session.receive_data(data(1, bytes(100)), 0.0)
    session.acknowledge_received_data(1, 60)
    session.receive_data(reset(), 0.0)
    assert session.acknowledge_received_data(1, 40) == 0
    assert "WINDOW" not in types(session)


def test_one_reader_who_stopped_holds_up_nobody_else() -> None:
    pair = Pair()
    slow, quick = (pair.server.open_stream(0, Kind.HTTP, REQUEST) for _ in range(2))
    pair.server.send_data(slow, bytes(2 * INITIAL_WINDOW))
    pair.server.send_data(quick, bytes(2 * INITIAL_WINDOW))
    got = {slow: 0, quick: 0}
    for _ in range(10):
        for event in pair.exchange()[1]:
            if event.type == FrameType.DATA:
                got[event.stream_id] += len(event.payload)
                if event.stream_id == quick:
                    pair.client.acknowledge_received_data(quick, len(event.payload))
    assert got == {slow: INITIAL_WINDOW, quick: 2 * INITIAL_WINDOW}


class Download:
    """Streams of a client over a path with a round trip, whose readers at the server keep up, or do not read at all."""

    def __init__(self, streams: int, *, reads: bool, round_trip: float = 0.1) -> None:
        self.pair, self.reads, self.round_trip = Pair(), reads, round_trip
        self.pair.client._in_flight = Unlimited()
        self.got = dict.fromkeys((self.pair.server.open_stream(0, Kind.HTTP, REQUEST) for _ in range(streams)), 0)
        self.pair.exchange()
        for stream_id in self.got:
            self.pair.client.send_head(stream_id, RESPONSE)
            self.pair.client.send_data(stream_id, bytes(100 * 1024 * 1024))

    def go_round(self) -> None:
        """Send all that may be sent; credit and data take a round trip."""
        while self.pair.send(self.pair.client):
            for event in self.pair.deliver(self.pair.server):
                if event.type == FrameType.DATA:
                    self.got[event.stream_id] += len(event.payload)
                    if self.reads:
                        self.pair.server.acknowledge_received_data(event.stream_id, len(event.payload))
        self.pair.now += self.round_trip
        self.pair.send(self.pair.server)
        self.pair.deliver(self.pair.client)

    @property
    def sizes(self) -> list[int]:
        return [stream.receive.size for stream in self.pair.server._streams.values()]


def test_a_window_grows_on_a_long_path_while_its_reader_keeps_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytunnel, "MAX_UNACKED", 2 * MAX_STREAM_WINDOW)
    download = Download(1, reads=True)
    sizes = []
    for _ in range(15):
        download.go_round()
        sizes += download.sizes
    assert sizes[:6] == [INITIAL_WINDOW * factor for factor in (1, 2, 2, 4, 4, 8)], "it is used before it grows again"
    assert sizes[-1] == MAX_STREAM_WINDOW


@pytest.mark.parametrize(("reads", "round_trip"), [(False, 0.1), (True, pytunnel.MIN_STARVED / 2)])
def test_no_window_grows_for_a_stopped_reader_or_on_a_short_path(reads: bool, round_trip: float) -> None:
    download = Download(3, reads=reads, round_trip=round_trip)
    for _ in range(10):
        download.go_round()
    assert download.sizes == [INITIAL_WINDOW] * 3
    assert reads or download.got == dict.fromkeys(download.got, INITIAL_WINDOW)


def test_windows_grow_within_the_bound_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytunnel, "MAX_UNACKED", 2 * MAX_WIDENED)
    download = Download(20, reads=True)
    for _ in range(20):
        download.go_round()
        assert sum(download.sizes) <= 20 * INITIAL_WINDOW + MAX_WIDENED
    assert sum(download.sizes) == 20 * INITIAL_WINDOW + MAX_WIDENED
    for stream_id in list(download.got)[:10]:
        download.pair.server.send_reset(stream_id, ErrorCode.CANCEL)
    for _ in range(20):
        download.go_round()
    assert sum(download.sizes) == 10 * INITIAL_WINDOW + MAX_WIDENED, "what is left goes to the others"


def test_windows_shrink_while_memory_is_short() -> None:
    download = Download(2, reads=True)
    for _ in range(4):
        download.go_round()
    assert min(download.sizes) > INITIAL_WINDOW
    download.pair.server.is_short_of_memory = True
    for _ in range(4):
        download.go_round()
    download.pair.server._widen(download.pair.server._streams[1])
    assert download.sizes == [INITIAL_WINDOW] * 2


def test_a_sender_who_claims_to_be_blocked_gets_no_more_than_any_other() -> None:
    session = client_with_stream()
    now = 0.0
    for _ in range(2000):
        now += 1.0
        stream = session._streams[1]
        session.receive_data(data(1, bytes(min(stream.receive.credit, 100_000)), BLOCKED), now)
        session.acknowledge_received_data(1, stream.receive.unread)
        session.receive_data(ack(session._acked + len(session._unacked)), now)
        session.data_to_send()
    assert stream.receive.size == MAX_STREAM_WINDOW
    assert session.buffered < 1000


def test_drained_names_the_writers_that_may_go_on() -> None:
    session = server_with_stream(size=2**20)
    assert session.send_data(1, bytes(pytunnel.SEND_BUFFER)) == pytunnel.SEND_BUFFER
    session.data_to_send()
    assert session.drained == []  # it was not told to wait
    assert session.send_data(1, bytes(pytunnel.SEND_BUFFER + TURN + 1)) > pytunnel.SEND_BUFFER
    while session._streams[1].buffered:
        assert session.drained == []  # what is left of a chunk keeps all of it
        session.data_to_send(1)
    assert session.drained == [1]


# Fair sending


def test_control_frames_go_first() -> None:
    session = client_with_stream()
    session.receive_data(open_(2) + data(2, bytes(INITIAL_WINDOW)) + ping(), 0.0)
    session.send_head(1, RESPONSE)
    session.send_data(1, bytes(1000))
    session.acknowledge_received_data(2, INITIAL_WINDOW)
    session.send_head(2, RESPONSE)
    assert types(session) == ["PONG", "HEAD", "HEAD", "WINDOW", "DATA", "ACK"]


def big_streams(n: int, size: int) -> Session:
    """A client that answers `n` requests with `size` bytes each and has all the credit it wants."""
    session = connected(is_server=False, size=2**30)
    for stream_id in range(1, n + 1):
        session.receive_data(open_(stream_id, END), 0.0)
        session.send_head(stream_id, RESPONSE)
        session.send_data(stream_id, bytes(size), end=True)
    while session._control:  # the heads are gone before the race
        session.data_to_send(1)
    return session


@pytest.mark.parametrize("busy", [1, 2, 7])
def test_a_small_response_waits_for_one_turn_of_each_other_stream(busy: int) -> None:
    session = big_streams(busy, 10 * 1024 * 1024)
    session.data_to_send(MAX_BATCH)
    session.receive_data(open_(100, END), 0.0)
    session.send_head(100, RESPONSE)
    session.send_data(100, b"small", end=True)
    before = 0
    for frame in itertools.chain.from_iterable(sent(session) for _ in range(20)):
        if frame == Frame(FrameType.DATA, END, 100, b"small"):
            break
        before += len(frame.payload) if frame.type == FrameType.DATA else 0
    else:
        pytest.fail("the small response has not been sent")
    assert before <= busy * TURN
    assert 100 not in session._streams


@pytest.mark.parametrize("limit", [1, 10_000, MAX_BATCH])
def test_streams_take_turns(limit: int) -> None:
    session = big_streams(20, 4 * TURN)
    turns = dict.fromkeys(range(1, 21), 0)
    for _ in range(1000):
        for frame in sent(session, limit):
            assert frame.type == FrameType.DATA
            assert len(frame.payload) <= TURN
            turns[frame.stream_id] += 1
            assert max(turns.values()) - min(turns.values()) <= 1
    assert set(turns.values()) == {4}
    assert session.streams == 0


def test_a_message_is_about_one_turn_long() -> None:
    session = big_streams(9, 1024 * 1024)
    for limit in (1, TURN, 100_000, MAX_BATCH):
        size = len(session.data_to_send(limit))
        assert min(limit, TURN) <= size <= TURN + HEADER


def test_has_data_to_send_says_whether_a_call_is_worth_it() -> None:
    session = connected(is_server=True, size=SMALL)
    occasions: list[Callable[[], object]] = [
        lambda: session.open_stream(0, Kind.HTTP, REQUEST),
        lambda: session.send_data(1, bytes(SMALL + 1)),
        lambda: session.receive_data(window(1, 1), 0.0),
        lambda: session.receive_data(ping(), 0.0),
        lambda: session.receive_data(head() + data(1, bytes(SMALL)), 0.0),
        lambda: session.acknowledge_received_data(1, SMALL),
        lambda: session.handle_timeout(pytunnel.PING_INTERVAL),
        lambda: (session.suspend(), session.resume(0, 0.0)),
    ]
    for act in occasions:
        assert session.data_to_send() == b""
        assert not session.has_data_to_send
        act()
        if not session.has_data_to_send:  # only an ACK is due, later
            assert session.data_to_send() == b""
            session.handle_timeout(pytunnel.ACK_DELAY)
        assert session.has_data_to_send
        assert session.data_to_send()


# Acknowledgement and resume


def test_lost_frames_are_sent_again_once() -> None:
    pair = Pair()
    stream = pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.exchange()
    pair.server.send_data(stream, b"arrives ")
    pair.send(pair.server)
    got = pair.deliver(pair.client)
    pair.server.send_data(stream, b"is lost ")
    pair.send(pair.server)
    pair.cut()
    pair.server.send_data(stream, b"waits", end=True)
    assert pair.server.data_to_send() == b""
    pair.link()
    again = sent(pair.server)
    assert [f.payload for f in again] == [b"is lost ", b"waits"]
    got += pair.client.receive_data(b"".join(encode_frame(*f) for f in again), 0.0)
    assert content(got) == b"arrives is lost waits"
    assert pair.server.data_to_send() == b""
    # A second loss brings nothing back that has arrived.
    pair.cut()
    pair.link()
    assert pair.server.data_to_send() == b""


def test_half_a_frame_is_lost_with_its_link() -> None:
    pair = Pair()
    stream = pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.exchange()
    pair.server.send_data(stream, b"abcdef")
    pair.send(pair.server)
    assert pair.deliver(pair.client, HEADER + 3) == []
    assert not pair.client.between_frames
    pair.cut()
    pair.link()
    assert pair.client.between_frames
    assert content(pair.exchange()[1]) == b"abcdef"


def test_link_level_frames_are_not_sent_again() -> None:
    pair = Pair()
    pair.client.receive_data(ping(), 0.0)
    pair.now = pytunnel.PING_INTERVAL
    pair.server.handle_timeout(pair.now)
    assert types(pair.client) == ["PONG"]
    assert types(pair.server) == ["PING"]
    pair.client.receive_data(ping(), pair.now)
    pair.server.receive_data(head(1)[:3], pair.now)
    pair.cut()
    pair.link()
    assert types(pair.client) == types(pair.server) == []


def test_a_replay_keeps_the_order_and_comes_before_anything_new() -> None:
    pair = Pair()
    streams = [pair.server.open_stream(0, Kind.HTTP, b"GET\0/%d" % n) for n in range(50)]
    pair.send(pair.server)
    pair.cut()
    late = pair.server.open_stream(0, Kind.HTTP, b"GET\0/late")
    pair.link()
    seen = []
    while message := sent(pair.server, 100):
        seen += [frame.stream_id for frame in message]
    assert seen == [*streams, late]


def test_a_replay_that_is_cut_starts_again_where_the_peer_is() -> None:
    pair = Pair()
    for n in range(10):
        pair.server.open_stream(0, Kind.HTTP, b"GET\0/%d" % n)
    pair.send(pair.server)
    pair.cut()
    pair.link()
    pair.send(pair.server, 50)  # three of the ten
    assert [event.stream_id for event in pair.deliver(pair.client)] == [1, 2, 3]
    pair.send(pair.server, 50)
    pair.cut()
    pair.link()
    assert [event.stream_id for event in pair.exchange()[1]] == [4, 5, 6, 7, 8, 9, 10]
    assert pair.server._replay == pair.client._replay == type(pair.server._replay)()


@pytest.mark.parametrize("count", [2, 10, 2**63, 2**64 - 1])
def test_ack_of_what_was_never_sent_is_refused(count: int) -> None:
    session = server_with_stream()
    with pytest.raises(ProtocolError):
        session.receive_data(ack(count), 0.0)


def test_ack_that_goes_back_is_refused() -> None:
    session = server_with_stream()
    session.receive_data(ack(1), 0.0)
    session.receive_data(ack(1), 0.0)
    with pytest.raises(ProtocolError):
        session.receive_data(ack(0), 0.0)


@pytest.mark.parametrize("received", [-1, 0, 3])
def test_resume_out_of_range_is_refused_and_changes_nothing(received: int) -> None:
    assert pytunnel.Session(is_server=True).may_resume(received) == (received == 0)
    session = server_with_stream()
    session.open_stream(0, Kind.HTTP, REQUEST)
    session.data_to_send()
    session.receive_data(ack(1), 0.0)
    session.suspend()
    assert not session.may_resume(received)
    assert session.may_resume(1) and session.may_resume(2)
    with pytest.raises(ProtocolError):
        session.resume(received, 0.0)
    assert not session.connected
    session.resume(1, 0.0)
    assert [frame.stream_id for frame in sent(session)] == [2]


def test_an_ack_waits_for_company_but_not_long() -> None:
    session = client_with_stream()
    assert session.next_deadline() == pytunnel.ACK_DELAY
    assert session.data_to_send() == b""
    session.handle_timeout(pytunnel.ACK_DELAY - 0.001)
    assert session.data_to_send() == b""
    session.handle_timeout(pytunnel.ACK_DELAY)
    assert session.data_to_send() == ack(1)
    assert session.data_to_send() == b""
    assert session.next_deadline() == pytunnel.PING_INTERVAL


def test_an_ack_goes_with_what_is_sent_anyway() -> None:
    """But for a moment after the last one."""
    session = client_with_stream(size=1000)
    session.send_head(1, RESPONSE)
    assert sent(session)[-1] == Frame(FrameType.ACK, 0, 0, (1).to_bytes(8, "big"))
    session.handle_timeout(1.0)
    assert session.data_to_send() == b""
    for at, expected in ((pytunnel.ACK_PAUSE / 2, ["DATA"]), (pytunnel.ACK_PAUSE, ["DATA", "ACK"])):
        session.receive_data(data(1, b"more"), at)
        session.send_data(1, b"data")
        assert types(session, at) == expected


def test_an_ack_is_sent_at_once_after_many_bytes() -> None:
    session = client_with_stream(size=2**20)
    session.data_to_send()
    piece = bytes(pytunnel.ACK_BYTES // 4 - HEADER)
    for _ in range(3):
        session.receive_data(data(1, piece), 0.0)
        assert session.data_to_send() == b""
    session.receive_data(data(1, piece), 0.0)
    assert session.data_to_send() == ack(5)


def test_acks_are_not_acknowledged() -> None:
    """Else two idle sessions would never be silent."""
    pair = Pair()
    pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.exchange()
    rounds = 0
    while any(session._ack_deadline is not None for session in pair.wires):
        pair.now += pytunnel.ACK_DELAY
        for session in pair.wires:
            session.handle_timeout(pair.now)
        pair.exchange()
        rounds += 1
        assert rounds <= 2
    assert len(pair.server._unacked) == 0


def test_a_whole_chunk_is_kept_as_it_is_and_a_part_of_one_by_itself() -> None:
    """A copy of the one would take time; a view of the other would keep all of it in memory."""
    session = server_with_stream(size=1000)
    session.data_to_send()
    first, second = bytes(900), bytes(range(250))
    session.send_data(1, first)
    assert any(piece is first for piece in session.frames_to_send())
    session.send_data(1, second)
    assert session.frames_to_send()[-1] == second[:100]
    kept = [content for _, content in session._unacked]
    assert kept[-2:] == [first, second[:100]] and all(type(content) is bytes for content in kept)


def test_data_stops_at_max_unacked_and_goes_on_after_an_ack() -> None:
    session = big_streams(3, MAX_UNACKED)
    heads = len(session._unacked)
    frames = []
    while message := sent(session):
        frames += message
    total = sum(len(frame.payload) + HEADER for frame in frames)
    assert MAX_UNACKED - TURN < total <= MAX_UNACKED + TURN + HEADER
    session.send_goaway(ErrorCode.SHUTDOWN, "")
    assert types(session) == ["GOAWAY"]  # control frames still pass
    session.receive_data(ack(heads + 2), 0.0)
    assert types(session) + types(session) + types(session) == ["DATA"] * 2


def test_requests_are_refused_while_too_much_is_not_acknowledged() -> None:
    session = Session(is_server=True)  # without a link
    big = b"GET\0/" + b"x" * 60_000
    with pytest.raises(StreamReset) as caught:
        for _ in range(MAX_PENDING // len(big) + 2):
            session.open_stream(0, Kind.HTTP, big)
    assert caught.value.code is ErrorCode.REFUSED
    assert session._control_bytes <= MAX_PENDING + len(big) + 100


def test_a_peer_that_never_acknowledges_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    session = connected(is_server=True)
    for _ in range(10):
        session.send_reset(session.open_stream(0, Kind.HTTP, REQUEST), ErrorCode.CANCEL)
    monkeypatch.setattr(pytunnel, "MAX_UNACKED_FRAMES", 10)
    with pytest.raises(ProtocolError, match="10 frames"):
        session.data_to_send()


def test_no_stream_is_opened_towards_a_peer_that_does_not_acknowledge(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an honest one, which is only slow, never gets as far as the limit above."""
    monkeypatch.setattr(pytunnel, "MAX_UNACKED_FRAMES", 40)
    session = connected(is_server=True)
    with pytest.raises(StreamReset, match="congested"):
        for _ in range(20):
            session.send_reset(session.open_stream(0, Kind.HTTP, REQUEST), ErrorCode.CANCEL)
            session.data_to_send()
    assert len(session._unacked) == 12  # past a quarter
    session.receive_data(ack(12), 0.0)
    session.open_stream(0, Kind.HTTP, REQUEST)


# Keepalive


def test_a_ping_after_silence_and_death_without_an_answer() -> None:
    session = connected(is_server=True)
    now = pytunnel.PING_INTERVAL
    assert session.next_deadline() == now
    assert not session.handle_timeout(now - 0.01)
    assert session.data_to_send() == b""
    assert not session.handle_timeout(now)
    assert types(session) == ["PING"]
    assert session.next_deadline() == now + pytunnel.PING_TIMEOUT
    assert not session.handle_timeout(now + pytunnel.PING_TIMEOUT - 0.01)
    assert session.data_to_send() == b""  # one PING at a time
    assert session.handle_timeout(now + pytunnel.PING_TIMEOUT)


@pytest.mark.parametrize("answer", [encode_frame(FrameType.PONG, 0, 0, bytes(8)), ping(), head()[:1]])
def test_any_byte_is_a_sign_of_life(answer: bytes) -> None:
    session = connected(is_server=True)
    session.handle_timeout(pytunnel.PING_INTERVAL)
    session.data_to_send()
    now = pytunnel.PING_INTERVAL + pytunnel.PING_TIMEOUT - 0.01
    session.receive_data(answer, now)
    assert not session.handle_timeout(now + 0.02)
    assert session.next_deadline() == now + pytunnel.PING_INTERVAL


def test_no_ping_while_bytes_arrive() -> None:
    session = client_with_stream()
    now = 0.0
    for _ in range(10):
        now += pytunnel.PING_INTERVAL - 0.1
        session.receive_data(ping(), now)
        assert not session.handle_timeout(now)
        assert "PING" not in types(session)


def test_a_session_that_only_sends_still_asks() -> None:
    """What we send says nothing about what arrives: a link may be dead in one direction."""
    session = server_with_stream()
    session.send_data(1, b"x")
    session.data_to_send()
    session.handle_timeout(pytunnel.PING_INTERVAL)
    assert types(session) == ["PING"]


def test_a_pong_repeats_the_ping_and_tells_the_round_trip() -> None:
    pair = Pair()
    assert pair.server.round_trip is None
    pair.now = pytunnel.PING_INTERVAL
    pair.server.handle_timeout(pair.now)
    pair.send(pair.server)
    pair.now += 0.25
    pair.deliver(pair.client)
    pair.send(pair.client)
    pair.now += 0.5
    pair.deliver(pair.server)
    assert pair.server.round_trip == 0.75
    pair.client.receive_data(ping(b"12345678"), pair.now)
    assert sent(pair.client) == [Frame(FrameType.PONG, 0, 0, b"12345678")]


def test_a_new_link_is_not_as_dead_as_the_old_one() -> None:
    session = connected(is_server=True)
    session.handle_timeout(pytunnel.PING_INTERVAL)
    session.suspend()
    assert not session.handle_timeout(1e6)
    session.resume(0, 1000.0)
    assert session.data_to_send() == b""
    assert session.next_deadline() == 1000.0 + pytunnel.PING_INTERVAL
    assert not session.handle_timeout(1000.0)


# Limits


def test_a_server_opens_no_more_than_max_streams() -> None:
    session = connected(is_server=True, max_streams=2)
    session.open_stream(0, Kind.HTTP, REQUEST)
    session.open_stream(0, Kind.HTTP, REQUEST)
    with pytest.raises(StreamReset) as caught:
        session.open_stream(0, Kind.HTTP, REQUEST)
    assert caught.value.code is ErrorCode.REFUSED
    session.send_reset(1, ErrorCode.CANCEL)
    assert session.open_stream(0, Kind.HTTP, REQUEST) == 3


def test_a_client_refuses_more_than_max_streams_and_lives() -> None:
    session = connected(is_server=False, max_streams=1)
    assert [e.stream_id for e in session.receive_data(open_(1) + open_(2) + data(2), 0.0)] == [1]
    refusal = next(frame for frame in sent(session) if frame.type == FrameType.RESET)
    assert refusal.stream_id == 2
    assert pytunnel.decode_reason(refusal.payload)[0] is ErrorCode.REFUSED
    assert session.streams == 1
    assert [e.stream_id for e in session.receive_data(reset(1) + open_(3), 0.0)] == [1, 3]


@pytest.mark.parametrize("kind", [3, 255])
def test_a_client_refuses_an_unknown_kind_and_lives(kind: int) -> None:
    """A newer server may ask for what this client does not know."""
    session = client_with_stream()
    asked = encode_frame(FrameType.OPEN, 0, 2, bytes([0, 0, kind]) + REQUEST)
    assert [event.stream_id for event in session.receive_data(asked + data(2) + open_(3), 0.0)] == [3]
    refusal = next(frame for frame in sent(session) if frame.type == FrameType.RESET)
    assert refusal.stream_id == 2
    assert pytunnel.decode_reason(refusal.payload)[0] is ErrorCode.REFUSED


def test_both_sides_count_alike() -> None:
    """A server at its limit is never refused by a client with the same one, whatever ends a stream."""
    pair = Pair(max_streams=3)
    ends: list[Callable[[int], None]] = [
        lambda i: pair.server.send_reset(i, ErrorCode.CANCEL),
        lambda i: pair.client.send_reset(i, ErrorCode.CANCEL),
        lambda i: (pair.client.send_head(i, RESPONSE, end=True), pair.server.send_data(i, b"", end=True))[1],
    ]
    rng = random.Random(1)
    for _ in range(300):
        while pair.server.streams < 3:
            pair.server.open_stream(0, Kind.HTTP, REQUEST)
        for event in itertools.chain.from_iterable(pair.exchange()):
            if event.type == FrameType.RESET:
                assert pytunnel.decode_reason(event.payload)[0] is ErrorCode.CANCEL
        rng.choice(ends)(rng.choice(sorted(pair.server._streams)))
        if rng.random() < 0.5:
            pair.exchange()


def test_pings_up_to_the_limit_are_answered() -> None:
    session = connected(is_server=True)
    session.receive_data(ping() * MAX_PENDING_PONGS, 0.0)
    assert types(session) == ["PONG"] * MAX_PENDING_PONGS
    session.receive_data(ping(), 0.0)
    assert types(session) == ["PONG"]


def test_ids_are_used_up() -> None:
    session = connected(is_server=True)
    session._last_id = pytunnel.MAX_STREAM_ID - 1
    assert session.open_stream(0, Kind.HTTP, REQUEST) == pytunnel.MAX_STREAM_ID
    for _ in range(2):
        with pytest.raises(StreamReset) as caught:
            session.open_stream(0, Kind.HTTP, REQUEST)
        assert caught.value.code is ErrorCode.SHUTDOWN
    assert session.leaving
    assert types(session) == ["OPEN", "GOAWAY"]
    assert session.streams == 1  # what runs goes on


def test_interims_up_to_the_limit() -> None:
    session = server_with_stream()
    session.receive_data(head(flags=INTERIM) * MAX_INTERIM + head(), 0.0)
    with pytest.raises(ProtocolError):
        server_with_stream().receive_data(head(flags=INTERIM) * (MAX_INTERIM + 1), 0.0)


# Hostile peers

HOSTILE: dict[str, tuple[str, bytes, ErrorCode | None]] = {
    # name: who is attacked (with stream 1 open), what comes, what it is called; None: any code
    "data_past_window": ("client", data(1, bytes(SMALL + 1)), ErrorCode.FLOW_CONTROL),
    "data_past_window_in_pieces": ("client", data(1, bytes(SMALL)) + data(1), ErrorCode.FLOW_CONTROL),
    "data_past_window_with_end": ("client", data(1, bytes(SMALL + 1), END), ErrorCode.FLOW_CONTROL),
    "response_past_window": ("server", head() + data(1, bytes(SMALL + 1)), ErrorCode.FLOW_CONTROL),
    "first_data_past_window": ("client", open_(2) + data(2, bytes(SMALL + 1)), ErrorCode.FLOW_CONTROL),
    "data_after_end": ("client", data(1, flags=END) + data(), ErrorCode.STREAM_CLOSED),
    "end_twice": ("client", data(1, b"", END) * 2, ErrorCode.STREAM_CLOSED),
    "response_data_after_end": ("server", head() + data(1, flags=END) + data(), ErrorCode.STREAM_CLOSED),
    "data_after_head_with_end": ("server", head(flags=END) + data(), ErrorCode.STREAM_CLOSED),
    "data_before_head": ("server", data(), ErrorCode.PROTOCOL),
    "data_between_interim_and_head": ("server", head(flags=INTERIM) + data(), ErrorCode.PROTOCOL),
    "empty_data": ("client", data(1, b""), ErrorCode.PROTOCOL),
    "empty_response_data": ("server", head() + data(1, b""), ErrorCode.PROTOCOL),
    "second_head": ("server", head() + head(), ErrorCode.PROTOCOL),
    "interim_after_head": ("server", head() + head(flags=INTERIM), ErrorCode.PROTOCOL),
    "interim_with_end": ("server", head(flags=INTERIM | END), ErrorCode.PROTOCOL),
    "too_many_interims": ("server", head(flags=INTERIM) * (MAX_INTERIM + 1), ErrorCode.PROTOCOL),
    "head_by_the_server": ("client", head(), ErrorCode.PROTOCOL),
    "open_by_the_client": ("server", open_(2), ErrorCode.PROTOCOL),
    "open_with_used_id": ("client", open_(1), ErrorCode.PROTOCOL),
    "open_with_closed_id": ("client", reset() + open_(1), ErrorCode.PROTOCOL),
    "open_with_lower_id": ("client", open_(9) + open_(8), ErrorCode.PROTOCOL),
    "data_on_idle": ("client", data(2), ErrorCode.PROTOCOL),
    "head_on_idle": ("server", head(2), ErrorCode.PROTOCOL),
    "reset_on_idle": ("client", reset(2), ErrorCode.PROTOCOL),
    "window_on_idle": ("server", window(2), ErrorCode.PROTOCOL),
    "window_of_nothing": ("server", window(1, 0), ErrorCode.FLOW_CONTROL),
    "window_overflow": ("server", window(1, 2**31 - SMALL), ErrorCode.FLOW_CONTROL),
    "window_overflow_in_steps": ("server", window(1, 2**30) * 2, ErrorCode.FLOW_CONTROL),
    "window_of_4_gib": ("server", window(1, 2**32 - 1), ErrorCode.FLOW_CONTROL),
    "ack_of_the_future": ("server", ack(2), ErrorCode.PROTOCOL),
    "ack_of_nothing_sent": ("client", ack(1), ErrorCode.PROTOCOL),
    "ping_flood": ("client", ping() * (MAX_PENDING_PONGS + 1), ErrorCode.PROTOCOL),
    "unknown_type": ("client", encode_frame(5, 0, 1), ErrorCode.PROTOCOL),
    "unknown_flag": ("client", data(1, b"x", 0x80), ErrorCode.PROTOCOL),
    "huge_frame": ("client", bytes.fromhex("ffffff 00 00 00000001"), ErrorCode.FRAME_SIZE),
}
IGNORED: dict[str, tuple[str, bytes]] = {
    # frames that were on their way when stream 1 was closed
    "data_after_reset": ("client", data()),
    "data_past_window_after_reset": ("client", data(1, bytes(SMALL + 1))),
    "end_after_reset": ("client", data(1, b"", END)),
    "reset_after_reset": ("client", reset()),
    "window_after_reset": ("client", window()),
    "window_of_nothing_after_reset": ("client", window(1, 0)),
    "head_after_reset": ("server", head()),
    "response_data_after_reset": ("server", data()),
    "response_reset_after_reset": ("server", reset()),
    "response_window_after_reset": ("server", window()),
}


def attacked(role: str) -> Session:
    return server_with_stream(size=SMALL) if role == "server" else client_with_stream(size=SMALL)


@pytest.mark.parametrize(("role", "message", "code"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_peer(role: str, message: bytes, code: ErrorCode | None) -> None:
    with pytest.raises(ProtocolError) as caught:
        attacked(role).receive_data(message, 0.0)
    assert caught.value.code is code
    session = attacked(role)
    with pytest.raises(ProtocolError):
        for byte in message:
            session.receive_data(bytes([byte]), 0.0)
    for stream in session._streams.values():
        assert stream.receive.unread <= stream.receive.size


@pytest.mark.parametrize("closed_by", ["us", "peer"])
@pytest.mark.parametrize(("role", "message"), IGNORED.values(), ids=IGNORED)
def test_frames_for_a_closed_stream_are_ignored(role: str, message: bytes, closed_by: str) -> None:
    session = attacked(role)
    if closed_by == "us":
        session.send_reset(1, ErrorCode.CANCEL)
    else:
        session.receive_data(reset(), 0.0)
    session.data_to_send()
    received = session.received
    assert session.receive_data(message, 0.0) == []
    assert session.received == received + 1  # ignored, but counted: the peer counts it too
    assert session.streams == 0
    session.handle_timeout(1.0)
    assert types(session) == ["ACK"]


def test_an_open_flood_without_reading_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytunnel, "MAX_UNACKED_FRAMES", 50)
    session = connected(is_server=False, max_streams=1)
    with pytest.raises(ProtocolError):
        for stream_id in range(1, 100):
            session.receive_data(open_(stream_id), 0.0)
    assert len(session._control) <= 51


def test_an_open_and_reset_flood_leaves_nothing_behind() -> None:
    session = connected(is_server=False)
    for stream_id in range(1, 2000):
        session.receive_data(open_(stream_id) + data(stream_id) + reset(stream_id), 0.0)
    assert session.streams == 0
    assert not session._credits and not session._ready and not session._control
    assert types(session) == ["ACK"] or session._ack_deadline is not None


def test_extension_frames_do_not_count() -> None:
    session = client_with_stream()
    received = session.received
    session.receive_data(encode_frame(200, 255, 77, b"from the future"), 0.0)
    assert session.received == received


# Reset


@pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])
def test_send_reset_drops_what_is_queued(is_server: bool) -> None:
    session = server_with_stream() if is_server else client_with_stream()
    session.send_data(1, b"queued")
    session.send_reset(1, ErrorCode.CANCEL, "enough")
    assert session.streams == 0
    frames = [frame for frame in sent(session) if frame.type not in pytunnel.LINK_LEVEL]
    assert [(f.type, f.stream_id) for f in frames] == [(FrameType.RESET, 1)]
    assert pytunnel.decode_reason(frames[0].payload) == (ErrorCode.CANCEL, "enough")
    session.send_reset(1, ErrorCode.CANCEL)
    session.acknowledge_received_data(1, 1)
    with pytest.raises(StreamReset):
        session.send_data(1, b"more")
    assert session.data_to_send() == b""


def test_send_reset_with_flush_sends_what_is_queued_first() -> None:
    session = server_with_stream(size=TURN + 10)
    session.send_data(1, bytes(TURN + 20))
    session.send_reset(1, ErrorCode.LOCAL_RESET, "broke", flush=True)
    assert [(f.type, len(f.payload)) for f in sent(session)] == [(FrameType.DATA, TURN)]
    assert [(f.type, len(f.payload)) for f in sent(session)] == [(FrameType.DATA, 10)]
    assert session.streams == 1  # 10 bytes wait for credit
    session.receive_data(window(1, 10), 0.0)
    frames = [frame for frame in sent(session) if frame.type != FrameType.ACK]
    assert [(f.type, f.flags) for f in frames] == [(FrameType.DATA, BLOCKED), (FrameType.RESET, 0)]
    assert pytunnel.decode_reason(frames[1].payload) == (ErrorCode.LOCAL_RESET, "broke")
    assert session.streams == 0


@pytest.mark.parametrize("body", [b"", b"all of it"])
def test_send_reset_with_flush_comes_after_the_end(body: bytes) -> None:
    """A response that is complete stays so when the rest of its request is not wanted (RFC 9113 section 8.1)."""
    session = server_with_stream()
    session.send_data(1, body, end=True)
    session.send_reset(1, ErrorCode.NO_ERROR, flush=True)
    assert [(f.type, f.flags) for f in sent(session)] == [(FrameType.DATA, END), (FrameType.RESET, 0)]
    assert session.streams == 0


def test_send_reset_with_flush_is_not_needed_when_the_end_closes_the_stream() -> None:
    session = client_with_stream(end=True)
    session.send_head(1, RESPONSE)
    session.send_data(1, b"all of it", end=True)
    session.send_reset(1, ErrorCode.NO_ERROR, flush=True)
    assert types(session) == ["HEAD", "DATA", "ACK"]
    assert session.streams == 0


def test_send_reset_with_flush_and_nothing_queued_is_sent_at_once() -> None:
    session = server_with_stream()
    session.send_reset(1, ErrorCode.CANCEL, flush=True)
    assert session.streams == 0
    assert types(session) == ["RESET"]


def test_a_flushing_stream_may_be_reset_at_once() -> None:
    session = server_with_stream(size=5)
    session.send_data(1, b"too much")
    session.send_reset(1, ErrorCode.CANCEL, flush=True)
    session.send_reset(1, ErrorCode.CANCEL)
    assert types(session) == ["RESET"]


def test_a_reset_by_the_peer_is_an_event_and_frees_the_queue() -> None:
    session = client_with_stream()
    session.send_head(1, RESPONSE)
    session.send_data(1, b"queued")
    stream = session._streams[1]
    assert [e.type for e in session.receive_data(reset(), 0.0)] == [FrameType.RESET]
    assert session.streams == 0
    assert not stream.pending
    assert "DATA" not in types(session)


# Going away


def test_goaway_by_the_server() -> None:
    pair = Pair()
    stream = pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.server.send_goaway(ErrorCode.SHUTDOWN, "maintenance")
    with pytest.raises(StreamReset) as caught:
        pair.server.open_stream(0, Kind.HTTP, REQUEST)
    assert caught.value.code is ErrorCode.SHUTDOWN
    assert [FrameType(event.type) for event in pair.exchange()[1]] == [FrameType.OPEN, FrameType.GOAWAY]
    assert pair.client.goaway == (ErrorCode.SHUTDOWN, "maintenance")
    pair.client.send_head(stream, RESPONSE)
    pair.client.send_data(stream, b"the rest finishes", end=True)
    assert content(pair.exchange()[0]) == b"the rest finishes"


def test_goaway_by_the_client() -> None:
    pair = Pair()
    pair.server.open_stream(0, Kind.HTTP, REQUEST)
    pair.exchange()
    pair.client.send_goaway(ErrorCode.REPLACED, "")
    crossing = pair.server.open_stream(0, Kind.HTTP, REQUEST)  # both are on their way at once
    at_server, at_client = pair.exchange()
    assert at_client == []
    refusals = [event for event in at_server if event.type == FrameType.RESET]
    assert [event.stream_id for event in refusals] == [crossing]
    assert pytunnel.decode_reason(refusals[0].payload)[0] is ErrorCode.SHUTDOWN
    assert pair.server.goaway == (ErrorCode.REPLACED, "")
    with pytest.raises(StreamReset) as caught:
        pair.server.open_stream(0, Kind.HTTP, REQUEST)
    assert caught.value.code is ErrorCode.SHUTDOWN
    assert pair.server.streams == pair.client.streams == 1


def test_accepts_streams() -> None:
    session = Session(is_server=True)
    assert not session.accepts_streams  # no link yet
    session.resume(0, 0.0)
    assert session.accepts_streams
    session.suspend()
    assert not session.accepts_streams
    for leave in (lambda s: s.send_goaway(ErrorCode.SHUTDOWN, ""), lambda s: s.receive_data(goaway(), 0.0)):
        session = connected(is_server=True)
        leave(session)
        assert not session.accepts_streams


def test_goaway_with_an_unknown_code() -> None:
    session = connected(is_server=False)
    event = encode_frame(FrameType.GOAWAY, 0, 0, b"\xff\xffwhy")
    assert len(session.receive_data(event, 0.0)) == 1
    assert session.goaway == (ErrorCode.INTERNAL, "why")


# Bytes that nobody has thought of


def consume_everything(session: Session, pieces: Iterable[bytes]) -> None:
    """What the layers above do with a peer's bytes. ProtocolError is the only way out."""
    now = 0.0
    try:
        for piece in pieces:
            now += 0.2
            for event in session.receive_data(piece, now):
                if event.type == FrameType.OPEN:
                    RequestHead.decode(event.payload[pytunnel.OPEN_HEADER.size :])
                elif event.type == FrameType.HEAD:
                    ResponseHead.decode(event.payload)
                elif event.type == FrameType.DATA:
                    session.acknowledge_received_data(event.stream_id, len(event.payload))
                else:
                    pytunnel.decode_reason(event.payload)
            session.handle_timeout(now)
            FrameDecoder().feed(session.data_to_send())
    except ProtocolError:
        pass
    assert session.streams <= session.max_streams


def busy(*, is_server: bool) -> Session:
    """A session in the midst of things."""
    if not is_server:
        session = client_with_stream(size=SMALL)
        session.receive_data(open_(2, END), 0.0)
        session.send_head(2, RESPONSE)
        session.send_data(2, bytes(2 * SMALL))
        return session
    session = connected(is_server=True, size=SMALL)
    for end in (False, True):
        session.open_stream(0, Kind.HTTP, REQUEST, end=end)
    session.send_data(1, bytes(2 * SMALL))
    session.data_to_send()
    return session


@given(st.booleans(), st.lists(st.binary(max_size=60), max_size=6))
def test_random_bytes_raise_only_protocol_error(is_server: bool, pieces: list[bytes]) -> None:
    consume_everything(busy(is_server=is_server), pieces)


def likely_payload(type_: FrameType) -> st.SearchStrategy[bytes]:
    number = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
    if type_ is FrameType.WINDOW:
        return number.map(lambda n: n.to_bytes(4, "big"))
    if type_ in (FrameType.ACK, FrameType.PING, FrameType.PONG):
        return number.map(lambda n: n.to_bytes(8, "big"))
    heads = st.sampled_from([RESPONSE, b"\0\0\0" + REQUEST, b"\0\1\1GET\0/\0Host\0a", b"103\0", b"\xff" * 9])
    return st.one_of(heads, st.binary(min_size=3, max_size=SMALL)) if type_ else st.binary(max_size=SMALL)


@st.composite
def likely_frames(draw: st.DrawFn) -> bytes:
    """Frames that keep to FRAME_RULES, on few streams, so that a conversation gets somewhere."""
    type_ = draw(st.sampled_from(FrameType))
    on_stream = pytunnel.FRAME_RULES[type_].on_stream
    flags = draw(st.sampled_from([0, 0, END, INTERIM])) & pytunnel.FRAME_RULES[type_].flags
    stream_id = draw(st.integers(1, 5)) if on_stream else 0
    return encode_frame(type_, flags, stream_id, draw(likely_payload(type_)))


@settings(max_examples=300)
@given(st.booleans(), st.lists(likely_frames(), max_size=15))
def test_random_frames_raise_only_protocol_error(is_server: bool, messages: list[bytes]) -> None:
    consume_everything(busy(is_server=is_server), messages)


@functools.cache
def recorded() -> tuple[list[bytes], list[bytes]]:
    """The frames of one conversation, those to the client and those to the server."""
    pair = Pair(send_window=SMALL, receive_window=SMALL)
    to: tuple[list[bytes], list[bytes]] = ([], [])

    def talk() -> None:
        for session, frames in ((pair.server, to[0]), (pair.client, to[1])):
            message = session.data_to_send()
            frames.extend(encode_frame(*frame) for frame in FrameDecoder().feed(message))
            for event in pair.peer(session).receive_data(message, 0.0):
                if event.type == FrameType.DATA:
                    pair.peer(session).acknowledge_received_data(event.stream_id, len(event.payload))

    for n in range(3):
        stream = pair.server.open_stream(n, Kind.HTTP, REQUEST)
        pair.server.send_data(stream, bytes(150), end=True)
        talk()
        pair.client.send_head(stream, b"103\0", interim=True)
        pair.client.send_head(stream, RESPONSE)
        pair.client.send_data(stream, bytes(250), end=n < 2)
        talk()
        talk()
    pair.client.send_reset(stream, ErrorCode.LOCAL_RESET, "broke")
    pair.server.send_goaway(ErrorCode.SHUTDOWN, "done")
    talk()
    assert len(to[0]) > 10 and len(to[1]) > 10
    return to


def listener(*, is_server: bool) -> Session:
    """A session that can be told one half of the recorded conversation."""
    session = connected(is_server=is_server, size=SMALL)
    session._unacked.extend([(b"", b"")] * 100)  # as if it had answered, so that the recorded ACKs fit
    if is_server:
        for n in range(3):
            session.send_data(session.open_stream(n, Kind.HTTP, REQUEST), bytes(150), end=True)
        session.data_to_send()
    return session


@settings(max_examples=300)
@given(st.booleans(), st.data())
def test_mutated_conversations_raise_only_protocol_error(is_server: bool, draw: st.DataObject) -> None:
    frames = list(recorded()[is_server])
    session = listener(is_server=is_server)
    place = st.integers(0, len(frames) - 1)
    for _ in range(draw.draw(st.integers(0, 3))):
        here, there = draw.draw(place), draw.draw(place)
        change = draw.draw(st.sampled_from(["swap", "drop", "double"]))
        if change == "swap":
            frames[here], frames[there] = frames[there], frames[here]
        else:
            frames[here] = b"" if change == "drop" else frames[here] * 2
    stream = bytearray(b"".join(frames))
    for _ in range(draw.draw(st.integers(0, 4)) if stream else 0):
        stream[draw.draw(st.integers(0, len(stream) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    size = draw.draw(st.integers(1, 300))
    consume_everything(session, (bytes(stream[i : i + size]) for i in range(0, len(stream), size)))


def test_the_recorded_conversation_itself_is_fine() -> None:
    """Else the test above would stop at its first frame."""
    for is_server, size in ((False, 150), (True, 250)):
        session, got = listener(is_server=is_server), []
        for frame in recorded()[is_server]:
            for event in session.receive_data(frame, 0.0):
                got.append(event)
                if event.type == FrameType.DATA:
                    session.acknowledge_received_data(event.stream_id, len(event.payload))
            session.data_to_send()
        assert [content(got, stream_id) for stream_id in (1, 2)] == [bytes(size)] * 2
        assert got[-1].type == (FrameType.RESET if is_server else FrameType.GOAWAY)


# The big one: two sessions and a bad network

SCALED = {
    "MIN_TURN": 32, "MAX_TURN": 64, "FIRST_CAP": 256, "MIN_CAP": 64, "SEND_BUFFER": 100, "MAX_BATCH": 256,
    "MAX_UNACKED": 2000, "MAX_PENDING": 4000, "ACK_BYTES": 300, "MAX_STREAM_WINDOW": 1500, "MAX_WIDENED": 2000,
    "MIN_COMPRESSED": 1, "MAX_DATA": 500,
}  # fmt: skip
BLOCK = random.Random(0).randbytes(4096)
TEXT = BLOCK.translate(b"ab" * 128)  # compresses


class Half:
    """One direction of one stream: what went in and what came out."""

    def __init__(self) -> None:
        self.put = bytearray()
        self.got = bytearray()
        self.consumed = 0
        self.ended = False  # by the writer
        self.finished = False  # at the reader


class Conversation:
    """Two sessions, a network that slices, delays and cuts, and the readers and writers of all streams.

    Checks as it goes that what comes out of each stream is what went in. Nothing but a StreamReset for a closed
    stream may be raised.
    """

    def __init__(self, window: int, max_streams: int = 6, *, compress: bool = False) -> None:
        self.window, self.largest, self.compress = window, max(window, SCALED["MAX_STREAM_WINDOW"]), compress
        self.turn = SCALED["MAX_DATA"] if compress else SCALED["MAX_TURN"]
        self.pair = Pair(send_window=window, receive_window=window, max_streams=max_streams, compress=compress)
        self.halves: dict[tuple[Session, int], Half] = {}  # by who reads
        self.at_client: set[int] = set()  # streams whose OPEN has arrived
        self.headed: set[int] = set()  # streams whose final HEAD has been sent
        self.heads_got: dict[int, list[bytes]] = {}
        self.heads_put: dict[int, list[bytes]] = {}
        self.reset: set[int] = set()  # streams that somebody has reset

    @property
    def sessions(self) -> tuple[Session, Session]:
        return self.pair.server, self.pair.client

    def open(self, end: bool) -> None:
        server = self.pair.server
        if server.streams >= server.max_streams:
            return
        try:
            stream_id = server.open_stream(0, Kind.HTTP, REQUEST, end=end, compress=True)
        except StreamReset as error:
            assert error.code is ErrorCode.REFUSED and "congested" in error.reason
            return
        for session in self.sessions:
            self.halves[session, stream_id] = Half()
        self.halves[self.pair.client, stream_id].ended = end
        self.heads_put[stream_id], self.heads_got[stream_id] = [], []

    def answer(self, stream_id: int, interim: bool, end: bool) -> None:
        client = self.pair.client
        if stream_id not in self.at_client or stream_id in self.headed or stream_id not in client._streams:
            return
        puts = self.heads_put[stream_id]
        if interim and len(puts) >= MAX_INTERIM:
            return
        puts.append(b"%d\0%d" % (103 if interim else 200, len(puts)))
        client.send_head(stream_id, puts[-1], interim=interim, end=end and not interim, compress=True)
        if not interim:
            self.headed.add(stream_id)
            self.halves[self.pair.server, stream_id].ended = end

    def write(self, writer: Session, stream_id: int, size: int, end: bool) -> None:
        reader = self.pair.peer(writer)
        half = self.halves.get((reader, stream_id))
        if half is None or half.ended or (writer is self.pair.client and stream_id not in self.headed):
            return
        start = len(half.put) % 1000 + stream_id
        piece = (TEXT if self.compress and stream_id % 3 else BLOCK)[start : start + min(size, 20 * self.window)]
        try:
            queued = writer.send_data(stream_id, piece, end=end)
        except StreamReset:
            assert stream_id in self.reset
            return
        assert queued <= len(half.put) + len(piece) - len(half.got)
        half.put += piece
        half.ended = end

    def read(self, reader: Session, stream_id: int, size: int) -> None:
        half = self.halves[reader, stream_id]
        size = min(size, len(half.got) - half.consumed)
        half.consumed += size
        reader.acknowledge_received_data(stream_id, size)

    def send_reset(self, session: Session, stream_id: int, flush: bool) -> None:
        known = self.at_client if session is self.pair.client else self.heads_put
        if stream_id in known and stream_id in session._streams:
            self.reset.add(stream_id)
            session.send_reset(stream_id, ErrorCode.CANCEL, flush=flush)
            for half in (self.halves[s, stream_id] for s in self.sessions):
                half.ended = True

    def send(self, session: Session, limit: int) -> None:
        worth_it = session.has_data_to_send
        size = self.pair.send(session, limit)
        assert size <= limit + self.turn + 400  # a turn, and the link's own small frames
        assert worth_it or not size

    def deliver(self, reader: Session, n: int | None) -> None:
        for event in self.pair.deliver(reader, n):
            self.take(reader, event)

    def take(self, reader: Session, event: Frame) -> None:
        if event.type == FrameType.OPEN:
            assert event.stream_id not in self.at_client  # none twice, and in order
            assert event.stream_id == max(self.at_client, default=0) + 1
            self.at_client.add(event.stream_id)
            if event.flags & END:
                self.halves[reader, event.stream_id].finished = True
            return
        half = self.halves[reader, event.stream_id]
        assert not half.finished or event.type == FrameType.RESET
        if event.type == FrameType.RESET:
            assert event.stream_id in self.reset
            return
        if event.type == FrameType.DATA:
            half.got += event.payload
            assert half.put.startswith(half.got)
            # Rules 1 to 3 seen from outside: no byte arrives that no reader has made room for.
            stream = reader._streams.get(event.stream_id)
            assert len(half.got) - half.consumed <= (stream.receive.size if stream else self.largest)
        else:
            got = self.heads_got[event.stream_id]
            got.append(event.payload)
            assert got == self.heads_put[event.stream_id][: len(got)]
        if event.flags & END:
            half.finished = True
            assert half.ended and half.got == half.put

    def pass_time(self, seconds: float) -> None:
        self.pair.now += seconds
        dead = [session.handle_timeout(self.pair.now) for session in self.sessions]
        assert not any(session.connected and session.next_deadline() < 0 for session in self.sessions)
        if any(dead):
            self.pair.cut()

    def check(self) -> None:
        for session in self.sessions:
            for stream in session._streams.values():
                assert 0 <= stream.send.credit <= self.largest
                assert 0 <= stream.receive.credit <= stream.receive.size
                assert 0 <= stream.receive.unread <= stream.receive.size
                assert self.window <= stream.receive.size <= self.largest
                assert stream.buffered == sum(map(len, stream.pending))
            assert sum(stream.receive.widened for stream in session._streams.values()) <= SCALED["MAX_WIDENED"]
            # DATA stops at the bound; OPENs, HEADs, RESETs and WINDOWs of six streams may come on top.
            assert session._unacked_bytes == sum(len(part) for frame in session._unacked for part in frame)
            others = 40 * (len(self.heads_put) + 6)
            assert session._unacked_bytes <= SCALED["MAX_UNACKED"] + self.turn + others
            assert session._control_bytes == sum(map(len, session._control))
            assert set(session._credits) <= set(session._streams)
            assert session.streams <= session.max_streams

    def settle(self) -> None:
        """Everybody finishes what he has begun, over a link that holds; nothing is left."""
        if not self.pair.server.connected:
            self.pair.link()
        for stream_id in self.heads_put:
            self.write(self.pair.server, stream_id, 10, end=True)
        left = sum(len(half.put) - half.consumed for half in self.halves.values())
        rounds = 50 + 10 * len(self.halves) + 4 * left // self.window
        for round_ in itertools.count():
            for stream_id in sorted(self.at_client):
                self.answer(stream_id, interim=False, end=False)
                self.write(self.pair.client, stream_id, 10, end=True)
            if not any(session.streams for session in self.sessions):
                break
            assert round_ < rounds, "a stream starves"
            for session in self.sessions:
                self.send(session, 256)
                self.deliver(self.pair.peer(session), None)
            for reader, stream_id in self.halves:
                self.read(reader, stream_id, self.window)
            self.pass_time(pytunnel.ACK_DELAY)
            self.check()
        for _ in range(3):
            self.pass_time(pytunnel.ACK_DELAY)
            for session in self.sessions:
                self.send(session, 256)
                self.deliver(self.pair.peer(session), None)
        for (_, stream_id), half in self.halves.items():
            if stream_id not in self.reset:
                assert half.finished and half.got == half.put
                assert self.heads_got[stream_id] == self.heads_put[stream_id]
        for session in self.sessions:
            assert session.streams == 0
            assert session.received == self.pair.peer(session)._acked
            leftovers = session._unacked, session._replay, session._control, session._credits, session._ready
            assert not any(leftovers), leftovers
            assert session._unacked_bytes == session._control_bytes == 0
            assert self.compress or not session.saved


class TwoSessions(RuleBasedStateMachine):
    """Every step is one thing that an application or a network does."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = mock.patch.multiple(pytunnel, **SCALED)
        self.slow = mock.patch.object(pytunnel.InFlight, "rate", 1.0)  # so that what may be compressed is
        self.scaled.start()
        self.slow.start()
        self.talk: Conversation

    @initialize(window=st.sampled_from([2, 7, 50, 200, 1000]), compress=st.booleans())
    def begin(self, window: int, compress: bool) -> None:
        self.talk = Conversation(window, compress=compress)

    def side(self, server: bool) -> Session:
        return self.talk.sessions[not server]

    def stream(self, choice: int) -> int:
        """One of the streams; the new ones are the likeliest."""
        return max(1, len(self.talk.heads_put) - choice)

    @rule(end=st.booleans())
    def open(self, end: bool) -> None:
        self.talk.open(end)

    @precondition(lambda self: self.talk.at_client)
    @rule(choice=st.integers(0, 6), interim=st.booleans(), end=st.booleans())
    def answer(self, choice: int, interim: bool, end: bool) -> None:
        self.talk.answer(self.stream(choice), interim, end and not interim)

    @precondition(lambda self: self.talk.heads_put)
    @rule(server=st.booleans(), choice=st.integers(0, 6), size=st.integers(0, 700), end=st.booleans())
    def write(self, server: bool, choice: int, size: int, end: bool) -> None:
        self.talk.write(self.side(server), self.stream(choice), size, end)

    @precondition(lambda self: self.talk.heads_put)
    @rule(server=st.booleans(), choice=st.integers(0, 6), size=st.integers(1, 2000))
    def read(self, server: bool, choice: int, size: int) -> None:
        self.talk.read(self.side(server), self.stream(choice), size)

    @precondition(lambda self: self.talk.heads_put)
    @rule(server=st.booleans(), choice=st.integers(0, 6), flush=st.booleans())
    def reset(self, server: bool, choice: int, flush: bool) -> None:
        self.talk.send_reset(self.side(server), self.stream(choice), flush)

    @rule(server=st.booleans(), limit=st.sampled_from([1, 60, 256, 2000]))
    def send(self, server: bool, limit: int) -> None:
        self.talk.send(self.side(server), limit)

    @rule(server=st.booleans(), n=st.one_of(st.none(), st.integers(1, 200)))
    def deliver(self, server: bool, n: int | None) -> None:
        self.talk.deliver(self.side(server), n)

    @rule(rounds=st.integers(1, 4))
    def flow(self, rounds: int) -> None:
        """A good moment of the network."""
        for session in self.talk.sessions * rounds:
            self.talk.send(session, 256)
            self.talk.deliver(self.talk.pair.peer(session), None)

    @rule()
    def cut(self) -> None:
        self.talk.pair.cut()

    @precondition(lambda self: not self.talk.pair.server.connected)
    @rule()
    def link(self) -> None:
        self.talk.pair.link()

    @rule(server=st.booleans())
    def memory_gets_short_or_enough(self, server: bool) -> None:
        self.side(server).is_short_of_memory = not self.side(server).is_short_of_memory

    @rule(seconds=st.sampled_from([0.05, 0.1, 5.0, 10.0, 15.0]))
    def pass_time(self, seconds: float) -> None:
        self.talk.pass_time(seconds)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "talk"):
            self.talk.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "talk") and sys.exc_info()[0] is None:  # else a step has failed already
                self.talk.settle()
        finally:
            self.slow.stop()
            self.scaled.stop()


TestTwoSessions = TwoSessions.TestCase
TestTwoSessions.settings = settings(max_examples=500, stateful_step_count=60)


@pytest.mark.parametrize("seed", range(3))
def test_megabytes_over_links_that_do_not_hold(seed: int) -> None:
    """The same with the real limits: uploads and downloads, a cut every few messages."""
    rng = random.Random(seed)
    pair = Pair()
    bodies = {n: rng.randbytes(rng.randrange(3_000_000)) for n in range(1, 7)}
    got = {session: {n: bytearray() for n in bodies} for session in pair.wires}
    ended = {session: set() for session in pair.wires}
    for n, body in bodies.items():
        assert pair.server.open_stream(0, Kind.HTTP, REQUEST) == n
        pair.server.send_data(n, body, end=True)
    cuts = 0
    while not all(len(done) == len(bodies) for done in ended.values()):
        for session in pair.wires:
            pair.send(session)
            for event in pair.deliver(session, rng.choice([None, rng.randrange(1, 200_000)])):
                if event.type == FrameType.OPEN:
                    session.send_head(event.stream_id, RESPONSE)
                    session.send_data(event.stream_id, bodies[event.stream_id][::-1], end=True)
                elif event.type == FrameType.DATA:
                    got[session][event.stream_id] += event.payload
                    session.acknowledge_received_data(event.stream_id, len(event.payload))
                if event.flags & END:
                    ended[session].add(event.stream_id)
        if rng.random() < 0.1:
            pair.cut()
            pair.link()
            cuts += 1
        pair.now += 0.01
        for session in pair.wires:
            session.handle_timeout(pair.now)
        assert pair.now < 100
    assert cuts
    assert got[pair.client] == bodies
    assert got[pair.server] == {n: body[::-1] for n, body in bodies.items()}
