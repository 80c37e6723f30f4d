"""Whom a tunnel lets in: passwords and networks, which the server enforces before a byte reaches the client."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    Header,
    Process,
    RawOrigin,
    RawSocket,
    RawVisitor,
    Tunnel,
    request,
    response,
    with_limits,
)
from test_api import connected, fetch
from test_cli import TOKEN, run
from test_security import assert_calm, dialled, serving

import pytunnel
from pytunnel import (
    MAX_CREDENTIALS,
    MAX_HELLO,
    MAX_NETWORKS,
    MAX_TUNNELS,
    Access,
    Message,
    MessageError,
    Settings,
    Target,
    TunnelClient,
    UsageError,
    as_curl,
    basic_credentials,
    encode_message,
    visitor_address,
)

SALT = bytes(range(16))
ANN, BOB = "ann:correct-horse", "bob:pässwörd:with:colons"
UPGRADE: list[Header] = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the user's own counts here, and nothing is left there."""
    for name in ("PYTUNNEL_SERVER", "PYTUNNEL_TOKEN", "PYTUNNEL_NAME", "PYTUNNEL_AUTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTUNNEL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PYTUNNEL_CONFIG", str(tmp_path / "config.toml"))


def basic(credentials: str | bytes, scheme: bytes = b"Basic") -> Header:
    """What a browser sends when this was typed."""
    data = credentials if isinstance(credentials, bytes) else credentials.encode()
    return b"Authorization", scheme + b" " + base64.b64encode(data)


def access(*auth: str, allow: Iterable[str] = (), pass_auth: bool = False) -> Access:
    return Access.parse(list(allow), auth, pass_auth, SALT)


class VisitorFrom(RawVisitor):
    """A visitor whose address is another one of loopback's."""

    def __init__(self, port: int, source: str) -> None:
        super().__init__(port)
        self._source = source

    async def __aenter__(self) -> Self:
        sock = socket.socket()
        sock.bind((self._source, 0))
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        self._socket = RawSocket(sock)
        return self


async def status_from(tunnel: Tunnel, source: str, *headers: Header) -> tuple[int, bytes | None]:
    """What a visitor of that address gets: the status, and the problem."""
    async with VisitorFrom(tunnel.port, source) as visitor:
        await visitor.send(tunnel.request(headers=headers))
        got = await visitor.read_response()
        return got.status, got.value(b"X-Pytunnel-Error")


# ---------------------------------------------------------------------------------------- What a visitor says

GIVEN = {
    "as browsers write it": (b"Basic YW5uOnNlY3JldA==", b"ann:secret"),
    "lower case": (b"basic YW5uOnNlY3JldA==", b"ann:secret"),
    "upper case": (b"BASIC YW5uOnNlY3JldA==", b"ann:secret"),
    "more spaces": (b"Basic   YW5uOnNlY3JldA==", b"ann:secret"),
    "UTF-8": (b"Basic " + base64.b64encode(BOB.encode()), BOB.encode()),
    "no UTF-8": (b"Basic YTr/", b"a:\xff"),
    "no user": (b"Basic OmE=", b":a"),
    "no password": (b"Basic YTo=", b"a:"),
    "a colon": (b"Basic Og==", b":"),
    "very long": (b"Basic " + base64.b64encode(b"a:" + bytes(12000)), b"a:" + bytes(12000)),
    "no colon": (b"Basic YW5u", None),
    "no padding": (b"Basic YW5uOnNlY3JldA", None),
    "too much padding": (b"Basic YW5uOnNlY3JldA===", None),
    "padding within": (b"Basic YW==uOnNlY3JldA", None),
    "URL's alphabet": (b"Basic YTr_", None),
    "not base64": (b"Basic ann:secret", None),
    "not ASCII": (b"Basic \xff\xff\xff\xff", None),
    "a word after it": (b"Basic YW5uOnNlY3JldA== x", None),
    "a word before it": (b"x Basic YW5uOnNlY3JldA==", None),
    "two schemes": (b"Basic YW5uOnNlY3JldA==, Basic YW5uOnNlY3JldA==", None),
    "a tab": (b"Basic\tYW5uOnNlY3JldA==", None),
    "a line's end": (b"Basic YW5uOnNlY3JldA==\n", None),
    "nothing after it": (b"Basic ", None),
    "the scheme alone": (b"Basic", None),
    "no space": (b"BasicYW5uOnNlY3JldA==", None),
    "another scheme": (b"Bearer YW5uOnNlY3JldA==", None),
    "a longer scheme": (b"Basics YW5uOnNlY3JldA==", None),
    "nothing": (b"", None),
}


@pytest.mark.parametrize(("value", "wanted"), GIVEN.values(), ids=GIVEN)
def test_credentials_are_read_as_rfc_7617_writes_them(value: bytes, wanted: bytes | None) -> None:
    assert basic_credentials([(b"Host", b"web.t"), (b"aUTHORIZATION", value)]) == wanted


def test_other_fields_are_no_credentials() -> None:
    assert basic_credentials([]) is None
    assert basic_credentials([(b"Proxy-Authorization", basic(ANN)[1]), (b"X-Authorization", basic(ANN)[1])]) is None


@pytest.mark.parametrize("second", [basic(ANN), basic(BOB), (b"authorization", b""), (b"AUTHORIZATION", b"Bearer a")])
def test_two_authorization_fields_are_a_bad_request(second: Header) -> None:
    for headers in ([basic(ANN), second], [second, basic(ANN)]):
        with pytest.raises(MessageError) as caught:
            basic_credentials(headers)
        assert caught.value.status == 400
        assert "ann" not in str(caught.value)


@given(st.binary(max_size=200))
def test_whatever_has_a_colon_comes_out_as_it_was(data: bytes) -> None:
    assert basic_credentials([basic(data)]) == (data if b":" in data else None)


@given(st.binary(max_size=60))
def test_no_authorization_field_is_too_odd(value: bytes) -> None:
    found = basic_credentials([(b"Authorization", value)])
    assert found is None or b":" in found


# ---------------------------------------------------------------------------------------- Rules


@pytest.mark.parametrize(
    ("auth", "given", "wanted"),
    [
        ([ANN], ANN, True),
        ([ANN, BOB], ANN, True),
        ([ANN, BOB], BOB, True),
        ([ANN, ANN], ANN, True),
        ([ANN], BOB, False),
        ([ANN], ANN + " ", False),
        ([ANN], ANN[:-1], False),
        ([ANN], ANN.upper(), False),
        ([ANN], ":correct-horse", False),
        ([ANN], "ann:", False),
        ([ANN], "", False),
        (["a b: c "], "a b: c ", True),
        (["a:u\u0308"], "a:\u00fc", True),  # the same letter in Unicode's two spellings (RFC 7617 section 2.1)
        ([], ANN, False),
    ],
)
def test_a_password_is_right_or_wrong(auth: list[str], given: str, wanted: bool) -> None:
    assert access(*auth).accepts(given.encode()) is wanted


@pytest.mark.parametrize("given", ["u0:p0", "u2:p2", "u4:p4", "u9:p9"])
def test_every_password_is_compared_in_constant_time(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither how much of one is right, nor which one it is, shows in the time."""
    rules = access(*(f"u{n}:p{n}" for n in range(5)))
    compare, seen = pytunnel.hmac.compare_digest, []

    def see(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(pytunnel.hmac, "compare_digest", see)
    assert rules.accepts(given.encode()) is (given != "u9:p9")
    assert [other for _, other in seen] == list(rules.digests)
    assert len({one for one, _ in seen}) == 1


@pytest.mark.parametrize(
    ("allow", "address", "wanted"),
    [
        ([], "192.0.2.1", True),
        ([], "", True),
        (["192.0.2.1"], "192.0.2.1", True),
        (["192.0.2.1"], "192.0.2.2", False),
        (["192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.3.0", False),
        (["10.0.0.0/8", "192.0.2.0/24"], "192.0.2.1", True),
        (["0.0.0.0/0"], "192.0.2.1", True),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["::/0"], "2001:db8::1", True),
        (["::/0"], "192.0.2.1", False),
        (["::/0"], "::ffff:192.0.2.1", False),
        (["192.0.2.0/24"], "::ffff:192.0.2.1", True),
        (["192.0.2.0/24"], "::ffff:192.0.3.1", False),
        (["::ffff:192.0.2.0/120"], "192.0.2.7", True),
        (["::ffff:192.0.2.0/120"], "192.0.3.7", False),
        (["::ffff:192.0.2.1"], "::ffff:c000:201", True),
        (["2001:db8::/32"], "2001:db8:ffff::1", True),
        (["2001:db8::/32"], "2001:db9::1", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["10.0.0.0/8"], "fe80::1%eth0", False),
        (["0.0.0.0/0", "::/0"], "", False),
        (["0.0.0.0/0", "::/0"], "unknown", False),
        (["0.0.0.0/0", "::/0"], "192.0.2.1:80", False),
    ],
)
def test_an_address_is_allowed_or_not(allow: list[str], address: str, wanted: bool) -> None:
    rules = access(allow=allow)
    assert rules.allows(address) is wanted
    assert Access.decode(Message(json.dumps(rules.encode()))).allows(address) is wanted


def test_a_proxy_that_is_written_as_ipv6_is_the_same_proxy() -> None:
    """Else it would be the visitor, and within a network of proxies that is allowed, everybody."""
    trusted = [pytunnel.parse_network("10.0.0.0/8")]
    headers = [(b"X-Forwarded-For", b"6.6.6.6, ::ffff:203.0.113.9, ::ffff:10.0.0.2")]
    assert visitor_address("10.0.0.1", headers, trusted) == "203.0.113.9"


@pytest.mark.parametrize(
    ("member", "address"),
    [
        ("203.0.113.9", "203.0.113.9"),
        (" 203.0.113.9:5555 ", "203.0.113.9"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("unknown", ""),
        ("_hidden", ""),
        ("203.0.113", ""),
        ("203.0.113.9:port", ""),
        ("203.0.113.9, , ", "203.0.113.9"),
    ],
)
def test_what_a_proxy_writes_about_its_visitor_is_never_about_itself(member: str, address: str) -> None:
    headers = [(b"X-Forwarded-For", f"127.0.0.1, {member}".encode())]
    trusted = [pytunnel.parse_network("127.0.0.0/8")]
    assert visitor_address("127.0.0.1", headers, trusted) == address
    assert Access(networks=trusted).allows(address) is False


BAD_RULES: dict[str, tuple[dict[str, Any], str]] = {
    "no colon": ({"auth": ["secret-word"]}, "USER:PASS"),
    "no user": ({"auth": [":secret-word"]}, "USER:PASS"),
    "no password, as of an unset variable": ({"auth": ["ann:"]}, "USER:PASS"),
    "nothing": ({"auth": [""]}, "USER:PASS"),
    "a line's end": ({"auth": ["ann:secret-word\n"]}, "control characters"),
    "a NUL": ({"auth": ["ann:secret-\0word"]}, "control characters"),
    "a tab in the user": ({"auth": ["an\tn:secret-word"]}, "control characters"),
    "DEL": ({"auth": ["ann:secret-word\x7f"]}, "control characters"),
    "C1": ({"auth": ["ann:secret-word\x9b"]}, "control characters"),
    "not UTF-8": ({"auth": ["ann:secret-word\udcff"]}, "USER:PASS"),
    "the second one": ({"auth": [ANN, "secret-word"]}, "USER:PASS"),
    "one text for a list": ({"auth": "ann:secret-word"}, "USER:PASS"),
    "a name": ({"allow": ["office"]}, "10.0.0.0/8"),
    "no network": ({"allow": [""]}, "10.0.0.0/8"),
    "host bits": ({"allow": ["10.0.0.1/8"]}, "10.0.0.0/8"),
    "too long a prefix": ({"allow": ["10.0.0.0/33"]}, "10.0.0.0/8"),
    "two in one": ({"allow": ["10.0.0.0/8,10.0.0.1"]}, "10.0.0.0/8"),
    "escapes": ({"allow": ["\x1b[31m"]}, r"\\x1b"),
    "one network for a list": ({"allow": "10.0.0.0/8"}, "10.0.0.0/8"),
    "only pass-auth": ({"pass_auth": True}, "--auth"),
    "too many passwords": ({"auth": [ANN] * (MAX_CREDENTIALS + 1)}, str(MAX_CREDENTIALS)),
    "too many networks": ({"allow": ["10.0.0.0/8"] * (MAX_NETWORKS + 1)}, str(MAX_NETWORKS)),
}


@pytest.mark.parametrize(("rules", "hint"), BAD_RULES.values(), ids=BAD_RULES)
def test_rules_that_are_none_are_one_line_without_the_password(rules: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings({"token": TOKEN, **rules}).from_targets(["3000"])
    text = str(caught.value)
    assert hint in text and "\n" not in text and text.isprintable()
    assert "secret" not in text and "correct" not in text


def test_a_flag_counts_before_the_environment_and_that_before_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = 'target = 3000\nauth = ["file:f", "file:g"]\nallow = ["::1"]\npass-auth = true\n'
    (tmp_path / "pytunnel.toml").write_text(f'token = "{TOKEN}"\n[tunnels.web]\n{text}')

    def accepted(tunnel: pytunnel.Tunnel) -> set[str]:
        return {text for text in ("flag:f", "env:e", "file:f", "file:g") if tunnel.access.accepts(text.encode())}

    from_file = Settings({}, project=True).from_file("web")
    assert accepted(from_file) == {"file:f", "file:g"}
    assert from_file.access.pass_auth and not from_file.access.allows("127.0.0.1")
    monkeypatch.setenv("PYTUNNEL_AUTH", "env:e")
    assert accepted(Settings({}, project=True).from_file("web")) == {"env:e"}
    assert accepted(Settings({"token": TOKEN}).from_targets(["3000"])[0]) == {"env:e"}
    assert accepted(Settings({"token": TOKEN, "auth": ["flag:f"]}).from_targets(["3000"])[0]) == {"flag:f"}
    monkeypatch.setenv("PYTUNNEL_AUTH", "")  # a secret that is missing must not open the tunnel
    with pytest.raises(UsageError, match="USER:PASS"):
        Settings({"token": TOKEN}).from_targets(["3000"])


def test_a_file_with_a_bad_rule_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytunnel.toml").write_text(f'token = "{TOKEN}"\n[tunnels.web]\ntarget = 3000\nauth = ["secret"]')
    with pytest.raises(UsageError, match=r"^pytunnel.toml: tunnel web: auth is not USER:PASS") as caught:
        Settings({}, project=True).from_file("web")
    assert "secret" not in str(caught.value)


def test_nothing_that_is_kept_or_sent_holds_the_password() -> None:
    tunnels = [Settings({"token": TOKEN, "auth": [ANN]}).from_targets(["3000"])[0] for _ in range(2)]
    client = TunnelClient("http://localhost", TOKEN, tunnels[:1])
    everything = repr(tunnels) + encode_message("", access=client._access) + repr(vars(client))
    for secret in (ANN, "correct-horse", base64.b64encode(ANN.encode()).decode()):
        assert secret not in everything
    one, other = (tunnel.access for tunnel in tunnels)
    assert one.salt != other.salt and len(one.salt) >= 16  # of each run of a client
    assert one.digests != other.digests


# ---------------------------------------------------------------------------------------- Hello

RULES = access(ANN, BOB, allow=["10.0.0.0/8", "2001:db8::/32"], pass_auth=True).encode()
DIGEST = base64.b64encode(bytes(32)).decode()
BAD_HELLOS: dict[str, object] = {
    "no object": [RULES],
    "a number for a tunnel": {"web": 1},
    "a list for a tunnel": {"web": [RULES]},
    "nothing for a tunnel": {"web": {}},
    "null for a tunnel": {"web": None},
    "a tunnel that it has not": {"web": RULES, "other": RULES},
    **{f"no {name}": {"web": {key: value for key, value in RULES.items() if key != name}} for name in RULES},
    **{f"null for {name}": {"web": {**RULES, name: None}} for name in RULES},
    "a text for networks": {"web": {**RULES, "allow": "10.0.0.0/8"}},
    "a network that is none": {"web": {**RULES, "allow": ["10.0.0.1/8"]}},
    "a number for a network": {"web": {**RULES, "allow": [1]}},
    "an object for a network": {"web": {**RULES, "allow": [{}]}},
    "too many networks": {"web": {**RULES, "allow": ["::1"] * (MAX_NETWORKS + 1)}},
    "salt that is not base64": {"web": {**RULES, "salt": "!"}},
    "digests that are not base64": {"web": {**RULES, "digests": "!"}},
    "half a digest": {"web": {**RULES, "digests": DIGEST[:20]}},
    "too many digests": {"web": {**RULES, "digests": base64.b64encode(bytes(32 * (MAX_CREDENTIALS + 1))).decode()}},
    "a list of digests": {"web": {**RULES, "digests": [DIGEST]}},
    "a number for pass": {"web": {**RULES, "pass": 1}},
}


@pytest.mark.parametrize(
    "rules",
    [
        access(ANN),
        access(ANN, BOB, pass_auth=True),
        access(allow=["10.0.0.0/8", "::1"]),
        access(*(f"u{n}:p" for n in range(MAX_CREDENTIALS)), allow=[f"10.0.0.{n}" for n in range(MAX_NETWORKS)]),
    ],
)
def test_rules_round_trip(rules: Access) -> None:
    ((name, member),) = Message(encode_message("hello", access={"web": rules.encode()})).members("access")
    assert (name, Access.decode(member)) == ("web", rules)


async def test_a_hello_with_bad_rules_is_refused() -> None:
    """A rule that the server does not understand must not become no rule."""
    deep = '{"a":' * 11 + "{}" + "}" * 11
    async with serving() as (server, port):
        for case, rules in {**BAD_HELLOS, "deep": {"web": {**RULES, "allow": [json.loads(deep)]}}}.items():
            async with dialled(port) as peer:
                await peer.prove(await peer.hello(access=rules))
                answer = await peer.answer()
                assert (answer.get("type", str), answer.get("code", str)) == ("refused", "protocol"), case
        async with dialled(port) as peer:
            ready = await peer.shake_hands(access={"web": {**RULES, "from the future": 1}})
            assert ready.get("enforced", list) == ["allow", "auth"]
        assert_calm(server)


@pytest.mark.parametrize("before", [{}, {"web": RULES}], ids=["without", "with"])
@pytest.mark.parametrize("after", [{}, {"web": RULES}], ids=["without", "with"])
async def test_a_session_goes_on_with_its_own_rules_only(before: dict[str, object], after: dict[str, object]) -> None:
    async with serving() as (server, port):
        async with dialled(port) as peer:
            await peer.shake_hands(access=before)
            session = peer.session
        async with dialled(port) as peer:
            await peer.shake_hands(session=session, access=after)
            assert peer.resumed is (before == after)
            answer = asyncio.ensure_future(fetch(f"http://web.localhost:{port}"))
            if after:
                assert (await answer).status == 403
            else:
                stream, _ = await peer.opened()
                await peer.head(stream, b"204", b"No Content", flags=pytunnel.END)
                assert (await answer).status == 204
        assert_calm(server)


def test_a_hello_holds_what_a_client_may_ask_for() -> None:
    names = [f"{n:063}" for n in range(MAX_TUNNELS)]
    client = TunnelClient("http://localhost", TOKEN, [named(name, access(ANN)) for name in names])
    hello = encode_message("hello", tunnels=names, access=client._access)
    assert len(hello) + 1024 < MAX_HELLO  # with room for the other fields
    most = access(*[ANN] * MAX_CREDENTIALS, allow=[f"2001:db8:0:{n:x}::/64" for n in range(MAX_NETWORKS)])
    TunnelClient("http://localhost", TOKEN, [named(name, most) for name in names[:4]])
    with pytest.raises(UsageError, match="start several"):
        TunnelClient("http://localhost", TOKEN, [named(name, most) for name in names])


def named(name: str, rules: Access) -> pytunnel.Tunnel:
    return pytunnel.Tunnel(name, Target.parse("3000"), access=rules)


# ---------------------------------------------------------------------------------------- Passwords


async def test_a_tunnel_with_passwords_is_for_those_who_know_one() -> None:
    """On one connection, whatever the request; nothing of a refused one reaches the client."""
    asked = [("GET", b"/"), ("HEAD", b"/favicon.ico"), ("OPTIONS", b"*"), ("OPTIONS", b"/x"), ("DELETE", b"/.env")]
    refused: list[tuple[Header, ...]] = [
        (),
        (basic(BOB[:-1]),),
        (basic(ANN, b"Bearer"),),
        ((b"Authorization", b"Basic " + ANN.encode()),),
        ((b"Proxy-Authorization", basic(ANN)[1]),),
        (basic("ann:wrong"), (b"Proxy-Authorization", basic(ANN)[1])),
        ((b"Connection", b"Authorization"),),
    ]
    async with (
        RawOrigin(response()) as origin,
        Tunnel(origin.port, connect_args=["--auth", ANN, "--auth", BOB]) as t,
        t.visitor() as visitor,
    ):
        for method, target in asked:
            for headers in refused:
                await visitor.send(t.request(method, target, headers))
                got = await visitor.read_response(method)
                assert (got.status, got.value(b"X-Pytunnel-Error")) == (401, b"unauthorized"), (method, headers)
                assert got.value(b"WWW-Authenticate") == b'Basic realm="pytunnel", charset="UTF-8"'
                assert got.value(b"Connection") is None
        assert origin.connections == []
        for method, target in asked:
            for right in (basic(ANN), basic(BOB, b"bASIC")):
                await visitor.send(t.request(method, target, [(b"X-One", b"1"), right, (b"X-Two", b"2")]))
                assert (await visitor.read_response(method)).status == 200
                seen = origin.requests[-1]
                assert (seen.method, seen.target) == (method.encode(), target)
                assert seen.values(b"Authorization") == []
                assert [value for _, value in seen.headers[1:3]] == [b"1", b"2"]
        assert len(origin.requests) == 2 * len(asked)
        assert not [event for event in t.client.events if event.get("status") == 401]


async def test_a_refused_request_leaves_the_connection_right() -> None:
    async with RawOrigin(response(), read_body=True) as origin, Tunnel(origin.port, connect_args=["--auth", ANN]) as t:
        async with t.visitor() as visitor:  # two Authorization fields: one that is right does not help
            await visitor.send(t.request(headers=[basic(ANN), basic(ANN)]))
            got = await visitor.read_response()
            assert (got.status, got.value(b"X-Pytunnel-Error")) == (400, b"bad-request")
        async with t.visitor() as visitor:  # content that nobody reads is no next request
            await visitor.send(t.request("POST", headers=[(b"Content-Length", b"1000")]))
            got = await visitor.read_response()
            assert (got.status, got.value(b"Connection")) == (401, b"close")
            await visitor.send(t.request(headers=[basic(ANN)]).ljust(1000))
            assert await visitor.read_until_close() == b""
        assert origin.connections == []
        async with t.visitor() as visitor:  # a client that asks first is not told to go on
            expect = [(b"Expect", b"100-continue"), (b"Content-Length", b"3")]
            await visitor.send(t.request("PUT", headers=expect))
            got = await visitor.read_response()
            assert (got.status, got.interim) == (401, [])
        assert origin.connections == []
        assert (await t.fetch("POST", headers=[basic(ANN)], body=b"abc")).status == 200
        assert origin.requests[0].body == b"abc"


async def test_the_page_suits_its_reader_and_does_not_repeat_the_request() -> None:
    async with RawOrigin(response()) as origin, Tunnel(origin.port, connect_args=["--auth", ANN]) as t:
        page = await t.get(b"/<script>", [(b"Accept", b"text/html"), basic("ann:guess")])
        assert b"<h1>401 unauthorized</h1>" in page.body and b"script" not in page.body and b"guess" not in page.body
        problem = json.loads((await t.get(b"/", [(b"Accept", b"application/json")])).body)
        assert (problem["error"], problem["status"]) == ("unauthorized", 401)


async def test_no_password_in_any_output() -> None:
    """Of both sides, with every line that they can write, when it is right, wrong, or part of a broken request."""
    given = [basic(ANN), basic("ann:hunter2-guess"), (b"Authorization", b"Basic \x01hunter2-guess")]
    secrets = [ANN, "correct-horse", "hunter2-guess"]
    secrets += [base64.b64encode(text.encode()).decode() for text in (ANN, "ann:hunter2-guess")]
    async with (
        RawOrigin(response()) as origin,
        Tunnel(origin.port, serve_args=["--debug"], connect_args=["--debug"], env={"PYTUNNEL_AUTH": ANN}) as t,
    ):
        assert [(await t.get(b"/", [field])).status for field in given] == [200, 401, 400]
        assert (await t.get(b"/", given[:2])).status == 400
        await t.client.event("request")
        t.client.send_signal(signal.SIGTERM)
        await t.client.wait()
        await t.stop_server()
        output = t.server.output() + t.client.output()
        for secret in secrets:
            assert secret not in output
        assert "a wrong password from 127.0.0.1" in output


@pytest.mark.parametrize("pass_auth", [False, True])
async def test_what_inspector_and_replay_see_of_the_password(pass_auth: bool) -> None:
    async with RawOrigin(response()) as origin, connected(origin.port, auth=[ANN], pass_auth=pass_auth) as tunnel:
        assert (await fetch(tunnel.url)).status == 401
        assert (await fetch(tunnel.url, headers=[basic(ANN)])).status == 200
        exchange = await tunnel.wait_for(timeout=5)
        assert list(tunnel.log.exchanges.values()) == [exchange]
        await tunnel.replay(exchange)
        kept = [basic(ANN)[1]] if pass_auth else []
        assert [seen.values(b"Authorization") for seen in origin.requests] == [kept, kept]
        assert pytunnel.field_values(exchange.request_headers, b"authorization") == kept
        assert basic(ANN)[1].decode() not in as_curl(exchange, tunnel.url)


async def test_without_a_password_of_its_own_a_tunnel_leaves_authorization_alone() -> None:
    fields = [basic("someone:else"), basic("twice:even")]
    async with RawOrigin(response()) as origin, connected(origin.port, allow=["127.0.0.0/8"]) as tunnel:
        assert (await fetch(tunnel.url, headers=fields)).status == 200
        assert origin.requests[0].values(b"Authorization") == [value for _, value in fields]


async def test_who_guesses_passwords_has_to_wait_and_nobody_else() -> None:
    """Even the right one is not compared any more: the answer is what a guesser is after."""
    limits = with_limits(MAX_GUESSES=2, GUESS_RATE=0.0)
    async with RawOrigin(response()) as origin, Tunnel(origin.port, connect_args=["--auth", ANN], command=limits) as t:
        for field in ((b"X", b"1"), basic(ANN), basic(ANN, b"Bearer"), basic("a:1"), basic("a:2")):  # two are guesses
            assert (await t.get(headers=[field])).status == (200 if field == basic(ANN) else 401)
        answer = await t.get(headers=[basic(ANN)])
        assert (answer.status, answer.value(b"X-Pytunnel-Error")) == (429, b"too-many-requests")
        assert (await t.get()).status == 401
        async with t.visitor(source="127.0.0.2") as other:
            await other.send(t.request(headers=[basic(ANN)]))
            assert (await other.read_response()).status == 200
        await t.server.stderr_line("a wrong password from 127.0.0.1 for web")
        assert "a:1" not in t.server.output()


async def test_websockets_need_the_password() -> None:
    async def echo(_: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SWITCH)
        writer.write(await reader.readexactly(5))

    async with RawOrigin(echo) as origin, Tunnel(origin.port, connect_args=["--auth", ANN]) as t:
        for fields in ([], [basic("ann:wrong")]):
            async with t.visitor() as visitor:
                await visitor.send(t.request(headers=[*UPGRADE, *fields]))
                got = await visitor.read_response()
                assert (got.status, got.value(b"X-Pytunnel-Error")) == (401, b"unauthorized")
        assert origin.connections == []
        async with t.visitor() as visitor:
            await visitor.send(t.request(headers=[*UPGRADE, basic(ANN)]) + b"hello")
            assert (await visitor.read_response()).status == 101
            assert await visitor.read_exactly(5) == b"hello"
            assert origin.requests[0].values(b"Authorization") == []


# ---------------------------------------------------------------------------------------- Networks


async def test_a_tunnel_with_networks_is_for_visitors_from_there() -> None:
    """The address counts first: a stranger learns nothing of passwords, and guesses none."""
    rules = ["--allow", "127.0.0.2", "--allow", "127.9.0.0/16", "--auth", ANN]
    async with RawOrigin(response()) as origin, Tunnel(origin.port, connect_args=rules) as t:
        for source in ("127.0.0.1", "127.0.0.3", "127.8.255.255"):
            for fields in ([], [basic(ANN)], [basic("ann:wrong")], [basic(ANN), basic(ANN)], UPGRADE):
                assert await status_from(t, source, *fields) == (403, b"not-allowed")
            claims = [(name, b"127.0.0.2") for name in (b"X-Forwarded-For", b"X-Real-IP", b"True-Client-IP")]
            assert await status_from(t, source, basic(ANN), *claims) == (403, b"not-allowed")
        assert origin.connections == []
        assert "password" not in t.server.output()
        for source in ("127.0.0.2", "127.9.1.2"):
            assert await status_from(t, source) == (401, b"unauthorized")
            assert await status_from(t, source, basic(ANN)) == (200, None)


async def test_behind_a_front_the_address_is_the_one_that_it_tells() -> None:
    rules = ["--allow", "198.51.100.0/24", "--allow", "2001:db8::1"]
    front = ["--trusted-proxy", "127.0.0.1/32", "--trusted-proxy", "10.0.0.0/8"]
    told = {
        b"198.51.100.7": 200,
        b"2001:db8::1": 200,
        b"::ffff:198.51.100.7": 200,
        b"198.51.100.7, 10.0.0.2": 200,  # two proxies
        b"198.51.100.7, ::ffff:10.0.0.2": 200,
        b"203.0.113.9": 403,
        b"198.51.100.7, 203.0.113.9": 403,  # what the visitor wrote itself, and what the front added
        b"198.51.100.7, 203.0.113.9, 10.0.0.2": 403,
        b"198.51.100.7, unknown": 403,
        b"198.51.100.7,": 200,  # empty members are none
        b"unknown": 403,
        b"": 403,
        b"10.0.0.2": 403,
    }
    async with RawOrigin(response()) as origin, Tunnel(origin.port, serve_args=front, connect_args=rules) as t:
        for value, status in told.items():
            got, _ = await status_from(t, "127.0.0.1", (b"X-Forwarded-For", value))
            assert got == status, value
        fields = [(b"X-Forwarded-For", b"203.0.113.9"), (b"X-Forwarded-For", b"198.51.100.7")]
        assert (await status_from(t, "127.0.0.1", *fields))[0] == 200
        assert (await status_from(t, "127.0.0.1", *reversed(fields)))[0] == 403
        assert (await status_from(t, "127.0.0.1"))[0] == 403
        allowed = len(origin.requests)
        assert await status_from(t, "127.0.0.2", (b"X-Forwarded-For", b"198.51.100.7")) == (403, b"not-allowed")
        assert len(origin.requests) == allowed


# ---------------------------------------------------------------------------------------- Sessions


async def test_rules_outlive_a_lost_link() -> None:
    """While the client is away strangers are turned away at once, and others wait for it."""
    async with RawOrigin(response()) as origin, Tunnel(origin.port, relay=True, connect_args=["--auth", ANN]) as t:
        t.relay.refuse = True
        assert await t.relay.cut("reset") == 1
        await t.client.event("disconnected")
        async with t.visitor() as waiting:
            await waiting.send(t.request(headers=[basic(ANN)]))
            assert (await t.get()).status == 401
            assert (await t.get(b"/", [basic("ann:wrong")])).status == 401
            assert waiting.buffered == b"" and origin.requests == []
            t.relay.refuse = False
            assert (await t.client.event("reconnected", timeout=20))["resumed"] is True
            assert (await waiting.read_response()).status == 200
        assert (await t.get()).status == 401
        assert (await t.get(b"/", [basic(ANN)])).status == 200
        assert len(origin.requests) == 2


async def test_strangers_do_not_take_up_the_room_of_those_who_wait() -> None:
    command = with_limits(MAX_HELD=1)
    async with (
        RawOrigin(response()) as origin,
        Tunnel(origin.port, relay=True, connect_args=["--auth", ANN], command=command) as t,
    ):
        t.relay.refuse = True
        await t.relay.cut("reset")
        await t.client.event("disconnected")
        for _ in range(3):
            assert (await t.get()).status == 401
        async with t.visitor() as first, t.visitor() as second:
            await first.send(t.request(headers=[basic(ANN)]))
            await second.send(t.request(headers=[basic(ANN)]))
            reads = [asyncio.ensure_future(visitor.read_response()) for visitor in (first, second)]
            done, (other,) = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            assert [read.result().value(b"X-Pytunnel-Error") for read in done] == [b"busy"]
            t.relay.refuse = False
            assert (await other).status == 200


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
async def test_a_request_that_waited_meets_the_rules_of_the_client_that_comes(end: int) -> None:
    async with RawOrigin(response()) as origin, Tunnel(origin.port, connect_args=["--auth", ANN]) as t:
        t.client.send_signal(end)
        await t.client.wait()
        t.connect_args = ["--auth", BOB, "--allow", "127.0.0.1"]
        async with t.visitor() as visitor:
            await visitor.send(t.request(headers=[basic(ANN)]))  # which was right for the client before
            await t.start_client()
            assert (await visitor.read_response()).status == 401
        assert origin.connections == []
        assert (await t.get(b"/", [basic(ANN)])).status == 401
        assert (await t.get(b"/", [basic(BOB)])).status == 200


async def test_a_client_that_takes_the_name_brings_its_rules() -> None:
    async with RawOrigin(response()) as origin, Tunnel(origin.port) as t:
        assert (await t.get()).status == 200
        for rules, field in ((["--auth", ANN], basic(ANN)), (["--auth", BOB], basic(BOB))):
            t.connect_args = rules
            client = await t.start_client()
            await client.event("ready")
            before = len(origin.requests)
            for fields, status in (([], 401), ([basic("ann:wrong")], 401), ([field], 200)):
                assert (await t.get(b"/", fields)).status == status
            assert len(origin.requests) == before + 1
        assert (await t.get(b"/", [basic(ANN)])).status == 401
        t.connect_args = []
        await (await t.start_client()).event("ready")
        assert (await t.get()).status == 200


async def test_two_tunnels_of_one_client_have_rules_of_their_own(tmp_path: Path) -> None:
    async with RawOrigin(response()) as origin, serving() as (_, port):
        (tmp_path / "pytunnel.toml").write_text(
            f'server = "http://127.0.0.1:{port}"\ntoken = "{TOKEN}"\n'
            f"[tunnels.open]\ntarget = {origin.port}\n"
            f'[tunnels.ann]\ntarget = {origin.port}\nauth = ["{ANN}"]\n'
            f'[tunnels.bob]\ntarget = {origin.port}\nauth = ["{BOB}"]\npass-auth = true\n'
            f'[tunnels.far]\ntarget = {origin.port}\nallow = ["203.0.113.0/24"]\n'
        )
        start = ("start", "--all", "--json")
        async with await Process.start(*start, home=tmp_path) as client, RawVisitor(port) as visitor:
            for _ in range(4):
                await client.event("ready")

            async def status(name: str, *headers: Header) -> int:
                await visitor.send(request("GET", b"/", f"{name}.localhost:{port}".encode(), headers))
                return (await visitor.read_response()).status

            fields = [[], [basic(ANN)], [basic(BOB)]]
            found = {name: [await status(name, *given) for given in fields] for name in ("open", "ann", "bob", "far")}
            assert found == {"open": [200] * 3, "ann": [401, 200, 401], "bob": [401, 401, 200], "far": [403] * 3}
            kept = [seen.value(b"Authorization") for seen in origin.requests]
            assert kept == [None, basic(ANN)[1], basic(BOB)[1], None, basic(BOB)[1]]
        finished = await run("config", home=tmp_path)
        assert finished.status == 0 and "tunnels.ann" in "".join(finished.stdout)
        assert "correct-horse" not in "".join(finished.stdout + finished.stderr)


OLD = with_limits(ENFORCED=())  # type: ignore[arg-type]


@pytest.mark.parametrize("rules", [["--auth", ANN], ["--allow", "127.0.0.1"]])
async def test_a_server_that_does_not_enforce_rules_gets_no_tunnel(rules: list[str]) -> None:
    listen = ("serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--json")
    async with RawOrigin(response()) as origin, await Process.start(*listen, command=OLD) as server:
        port = (await server.event("listening"))["port"]
        link = ["--server", f"http://127.0.0.1:{port}", "--token", TOKEN]
        finished = await run("connect", str(origin.port), "--name", "web", *link, *rules)
        assert (finished.status, finished.stdout) == (1, [])
        assert finished.error == "error: this server is too old for --auth and --allow; upgrade it"
        async with await Process.start("connect", str(origin.port), "--name", "web", "--json", *link) as client:
            await client.event("ready")  # without rules it is good enough


async def test_a_server_that_grew_old_ends_the_client() -> None:
    async with RawOrigin(response()) as origin, Tunnel(origin.port, connect_args=["--auth", ANN]) as t:
        t._command = OLD
        await t.restart_server()
        assert await t.client.wait() == 1
        assert t.client.stderr[-1] == "error: this server is too old for --auth and --allow; upgrade it"
        assert origin.connections == []


# ---------------------------------------------------------------------------------------- Command line


@pytest.mark.parametrize(
    ("args", "env", "hint"),
    [
        (["--auth", "hunter2"], {}, "USER:PASS"),
        (["--auth", ":hunter2"], {}, "USER:PASS"),
        (["--auth", "ann:hunter2\x1b[31m"], {}, "control characters"),
        ([], {"PYTUNNEL_AUTH": "hunter2"}, "USER:PASS"),
        ([], {"PYTUNNEL_AUTH": ""}, "USER:PASS"),
        (["--allow", "office"], {}, "10.0.0.0/8"),
        (["--pass-auth"], {}, "--auth"),
    ],
)
async def test_bad_rules_on_the_command_line(args: list[str], env: dict[str, str], hint: str) -> None:
    finished = await run("connect", "3000", "--token", TOKEN, "--server", "localhost:1", *args, env=env)
    assert (finished.status, finished.stdout, len(finished.stderr)) == (2, [], 1), finished
    assert hint in finished.error and "hunter2" not in finished.error


async def test_a_client_in_the_background_keeps_its_rules(tmp_path: Path) -> None:
    async with RawOrigin(response()) as origin, serving() as (_, port):
        link = ["--server", f"http://127.0.0.1:{port}", "--token", TOKEN, "--name", "web"]
        started = await run("connect", str(origin.port), *link, "--detach", "--auth", ANN, home=tmp_path)
        try:
            assert (started.status, started.stdout) == (0, [f"http://web.localhost:{port}"]), started
            assert (await fetch(started.stdout[0])).status == 401
            assert (await fetch(started.stdout[0], headers=[basic(ANN)])).status == 200
        finally:
            assert (await run("stop", home=tmp_path)).status == 0
