"""The handshake: proofs, messages that may say anything, names, and the public side of a server."""

from __future__ import annotations

import base64
import json
import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pytunnel
from pytunnel import (
    ITERATIONS,
    MAX_HELLO,
    MAX_NESTING,
    ExitStatus,
    Message,
    MessageError,
    Origin,
    ProtocolError,
    Refused,
    Verifier,
    check_name,
    client_proof,
    default_name,
    encode_message,
    key_id,
)

# The example of RFC 7677 section 3: user "user", password "pencil".
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
NONCE = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
AUTH_MESSAGE = f"n=user,r=rOprNGfwEbeRWgbNEkqO,r={NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,c=biws,r={NONCE}".encode()
PROOF = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
SERVER_SIGNATURE = base64.b64decode("6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")


# Proofs


def test_the_example_of_rfc_7677() -> None:
    assert client_proof("pencil", SALT, 4096, AUTH_MESSAGE) == (PROOF, SERVER_SIGNATURE)
    verifier = Verifier.from_token("pencil", SALT, 4096)
    assert verifier.accepts(PROOF, AUTH_MESSAGE)
    assert verifier.signature(AUTH_MESSAGE) == SERVER_SIGNATURE


def test_the_right_token_is_accepted_both_ways() -> None:
    verifier = Verifier.from_token("secret", b"salt")
    assert (verifier.salt, verifier.iterations) == (b"salt", ITERATIONS)
    proof, signature = client_proof("secret", verifier.salt, verifier.iterations, b"message")
    assert verifier.accepts(proof, b"message")
    assert verifier.signature(b"message") == signature


@pytest.mark.parametrize(
    ("token", "salt", "iterations", "message"),
    [
        ("Secret", b"salt", 4096, b"message"),
        ("", b"salt", 4096, b"message"),
        ("secret", b"pepper", 4096, b"message"),
        ("secret", b"salt", 4097, b"message"),
        ("secret", b"salt", 4096, b"another message"),
        ("secret", b"salt", 4096, b""),
    ],
)
def test_anything_else_is_refused_both_ways(token: str, salt: bytes, iterations: int, message: bytes) -> None:
    verifier = Verifier.from_token("secret", b"salt")
    proof, signature = client_proof(token, salt, iterations, message)
    assert not verifier.accepts(proof, b"message")
    assert verifier.signature(b"message") != signature


@pytest.mark.parametrize("damage", [b"", PROOF[:31], PROOF[1:], bytes(32), PROOF[::-1], SERVER_SIGNATURE, bytes(1000)])
def test_damaged_proofs_are_refused(damage: bytes) -> None:
    assert not Verifier.from_token("pencil", SALT).accepts(damage, AUTH_MESSAGE)


def test_what_a_server_keeps_makes_no_proof() -> None:
    """RFC 5802 section 9: a stolen file of verifiers does not let its thief in."""
    verifier = Verifier.from_token("pencil", SALT)
    signature = pytunnel._digest(verifier.stored_key, AUTH_MESSAGE)
    for guess in (verifier.stored_key, verifier.server_key):
        assert not verifier.accepts(bytes(a ^ b for a, b in zip(guess, signature, strict=True)), AUTH_MESSAGE)
    assert b"pencil" not in b"".join(part for part in verifier if isinstance(part, bytes))


def test_key_ids() -> None:
    assert key_id("token") == key_id("token")
    assert re.fullmatch(r"[0-9a-f]{16}", key_id("token"))
    assert len({key_id(f"token{n}") for n in range(1000)}) == 1000
    assert "token" not in key_id("token")


# Messages


def test_messages_round_trip() -> None:
    text = encode_message("hello", version=1, key="a\u00fc\0\ud800", tunnels=["a"], deep={"a": [None]})
    assert "\n" not in text and text.isascii()
    message = Message(text)
    assert message.text == text
    assert message.get("type", str) == "hello"
    assert message.number("version", 1, 1) == 1
    assert message.get("tunnels", list) == ["a"]
    assert message.get("deep", dict) == {"a": [None]}


def nested(depth: int) -> str:
    """So many objects and lists in each other, an even number."""
    return '{"a":[' * (depth // 2) + "1" + "]}" * (depth // 2)


def test_messages_are_nested_so_deeply() -> None:
    assert Message(nested(MAX_NESTING)).get("a", list)


def test_unknown_and_missing_fields() -> None:
    message = Message('{"type":"hello","from the future":{"a":[1e400,NaN]}}')
    assert message.get("session", str, "") == ""
    assert message.number("received", 0, 9, 5) == 5
    for read in (
        lambda: message.get("key", str),
        lambda: message.number("n", 0, 9),
        lambda: message.bytes("salt"),
    ):
        with pytest.raises(ProtocolError):
            read()


BAD_MESSAGES = {
    "empty": "",
    "blank": "  ",
    "not JSON": "hello",
    "half": '{"a":',
    "two": "{}{}",
    "list": "[]",
    "string": '"a"',
    "number": "1",
    "null": "null",
    "NaN": "NaN",
    "deeper by one": '{"a":' + nested(MAX_NESTING) + "}",
    "deep list": "[" * (MAX_HELLO - 1),
    "deep, closed": "[" * 8000 + "]" * 8000,
    "deep object": '{"a":' * 3000,
    "deep in an object": '{"a":' + "[" * 8000 + "]" * 8000 + "}",
    "huge integer": '{"a":' + "9" * 5000 + "}",
    "huge negative integer": '{"a":-' + "9" * 5000 + "}",
    "too long": '{"a":"' + "x" * MAX_HELLO + '"}',
    "control in string": '{"a":"\x01"}',
    "single quotes": "{'a':1}",
    "comment": "{}//",
    "byte order mark": "\ufeff{}",
}


@pytest.mark.parametrize("text", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages(text: str) -> None:
    with pytest.raises(ProtocolError):
        Message(text)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (str, "1"), (str, "null"), (str, "[]"), (str, "true"), (int, '"1"'), (int, "true"), (int, "false"),
        (int, "1.0"),
        (int, "1e3"), (int, "NaN"), (int, "Infinity"), (int, "null"), (list, "{}"), (list, '"a"'), (dict, "[]"),
        (bool, "1"),
    ],
)  # fmt: skip
def test_wrong_types(type_: type, value: str) -> None:
    message = Message('{"a":' + value + "}")
    with pytest.raises(ProtocolError):
        message.get("a", type_)
    with pytest.raises(ProtocolError):
        message.get("a", type_, type_())


@pytest.mark.parametrize("value", ["-1", "11", "9" * 4000, "-" + "9" * 4000, "5.0", '"5"', "true", "null", "[5]"])
def test_numbers_out_of_range(value: str) -> None:
    with pytest.raises(ProtocolError):
        Message('{"a":' + value + "}").number("a", 0, 10, 5)


@pytest.mark.parametrize(("value", "wanted"), [("0", 0), ("10", 10), ("-0", 0)])
def test_numbers_within_their_range(value: str, wanted: int) -> None:
    assert Message('{"a":' + value + "}").number("a", 0, 10) == wanted


@pytest.mark.parametrize(
    "value",
    ["a", "ab=", "a===", "!!!!", "YQ==\\n", " YQ==", "Y-_=", "\\u00e9", "\\ud800", "YQ", "=", "YQ==YQ=="],
)
def test_bad_base64(value: str) -> None:
    with pytest.raises(ProtocolError):
        Message('{"a":"' + value + '"}').bytes("a")


@given(st.binary(max_size=100))
def test_base64_round_trip(data: bytes) -> None:
    assert Message(encode_message("proof", proof=base64.b64encode(data).decode())).bytes("proof") == data


@pytest.mark.parametrize("value", ["\\ud800", "\\udfff", "a\\udc80b", "\\ud83dx", "\\udc00\\ud800"])
def test_lone_surrogates_do_not_get_past_a_message(value: str) -> None:
    """They are no text: whoever hashes, logs or sends them would fail."""
    with pytest.raises(ProtocolError):
        Message('{"key":"' + value + '"}').get("key", str)


def test_surrogate_pairs_are_text() -> None:
    assert Message('{"key":"\\ud83d\\ude00"}').get("key", str) == "\N{GRINNING FACE}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["key", "received", "proof", "tunnels"])


@given(st.one_of(st.text(max_size=80), json_values.map(json.dumps), st.dictionaries(keys, json_values).map(json.dumps)))
def test_any_text_is_a_message_or_a_protocol_error(text: str) -> None:
    try:
        message = Message(text)
    except ProtocolError:
        return
    for read in (
        lambda: message.get("key", str).encode(),
        lambda: message.get("tunnels", list, []),
        lambda: message.number("received", 0, 2**63, 0).to_bytes(8, "big"),
        lambda: message.bytes("proof"),
    ):
        try:
            read()
        except ProtocolError:
            pass


# Names


@pytest.mark.parametrize("name", ["a", "7", "web", "web-1", "a--b", "x" * 63, "0-0", "abcdefghij"])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", "-", "-a", "a-", "A", "Web", "a.b", "a_b", "a b", " a", "a\n", "a/b", "b\xfccher", "\u0430pple", "x" * 64,
        "xn--bcher-kva", "xn--", "*", "a\0", "\ud800", "\x1b[2J", "\uff41", *sorted(pytunnel.RESERVED_NAMES),
    ],
)  # fmt: skip
def test_bad_names(name: str) -> None:
    with pytest.raises(Refused) as caught:
        check_name(name)
    assert caught.value.code == "name" and not caught.value.retry
    assert caught.value.exit_status is ExitStatus.NAME_REFUSED
    assert str(caught.value).isprintable()


def test_names_that_stay_reserved() -> None:
    assert {"www", "localhost", "pytunnel"} <= pytunnel.RESERVED_NAMES


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_default_names_are_stable_and_allowed(token: str, machine: str, target: str) -> None:
    name = default_name(token, machine, target)
    assert name == default_name(token, machine, target)
    assert check_name(name) == name
    assert len(name) == 10  # of 32 letters each: 50 bits


def test_default_names_differ_by_token_machine_and_target() -> None:
    names = [
        default_name(token, machine, target)
        for token in ("token", "other", "")
        for machine in ("laptop", "desk", "")
        for target in ("3000", "localhost:3000", "/srv", "")
    ]
    assert len(set(names)) == len(names) == 36
    assert default_name("t", "a", "b") == "cynlsmeu47"  # pinned: a new version may not rename anybody's tunnel


# The public side of a server


@pytest.mark.parametrize(
    ("url", "origin", "public"),
    [
        ("https://t.example.com", ("https", "t.example.com", None), "https://web.t.example.com"),
        ("https://T.Example.COM.:443/x?y", ("https", "t.example.com", None), "https://web.t.example.com"),
        ("HTTPS://t.example.com:8443", ("https", "t.example.com", 8443), "https://web.t.example.com:8443"),
        ("http://t.example.com:80", ("http", "t.example.com", None), "http://web.t.example.com"),
        ("http://t.example.com:443", ("http", "t.example.com", 443), "http://web.t.example.com:443"),
        ("https://t.example.com:80", ("https", "t.example.com", 80), "https://web.t.example.com:80"),
        (
            "http://203.0.113.7:8080",
            ("http", "203-0-113-7.sslip.io", 8080),
            "http://web.203-0-113-7.sslip.io:8080",
        ),
        ("http://[2001:db8::7]", ("http", "2001-db8--7.sslip.io", None), "http://web.2001-db8--7.sslip.io"),
        ("http://localhost:8080", ("http", "localhost", 8080), "http://web.localhost:8080"),
        ("http://127.0.0.1:8080", ("http", "localhost", 8080), "http://web.localhost:8080"),
        ("http://127.9.9.9", ("http", "localhost", None), "http://web.localhost"),
        ("http://[::1]:8080", ("http", "localhost", 8080), "http://web.localhost:8080"),
        ("http://raspberrypi", ("http", "raspberrypi", None), "http://web.raspberrypi"),
    ],
)
def test_origins(url: str, origin: tuple[str, str, int | None], public: str) -> None:
    assert Origin.from_url(url) == origin
    assert Origin.from_url(url).url("web") == public


@pytest.mark.parametrize(
    "url",
    [
        "", "t.example.com", "t.example.com:8080", "//t.example.com", "ftp://t.example.com", "ws://t.example.com",
        "http://",
        "http:///x", "https:t.example.com", "http://u@t.example.com", "http://u:p@t.example.com", "http://a b",
        "http://a,b",
        "http://a:99999", "http://a:x", "http://a..b", "http://b\xfccher.de", "http://[::1", "http://::1]",
        "http://[x]/",
        "http://[1.2.3.4]", "http://\u2100.com", "http://a\uff0fb", "http://[::1]a", "http://[v1.x]",
    ],
)  # fmt: skip
def test_bad_origins(url: str) -> None:
    with pytest.raises(MessageError):
        Origin.from_url(url)


@given(st.text(max_size=30), st.booleans())
def test_any_url_is_an_origin_or_refused(text: str, prefix: bool) -> None:
    try:
        origin = Origin.from_url("http://" + text if prefix else text)
    except MessageError:
        return
    public = origin.url("web")
    assert public.isascii() and public.startswith(f"{origin.scheme}://web.{origin.zone}")
    assert Origin.from_url(public).zone == f"web.{origin.zone}"


def is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except OSError:
            continue
        return True
    return False


@given(st.ip_addresses())
def test_addresses_get_names_below_which_there_is_room(address: object) -> None:
    text = f"[{address}]" if ":" in str(address) else str(address)
    origin = Origin.from_url(f"http://{text}:8080")
    assert origin.zone == "localhost" or origin.zone.endswith(".sslip.io")
    assert not is_address(origin.zone)
    label = origin.zone.removesuffix(".sslip.io")
    assert is_address(label.replace("-", ".")) or is_address(label.replace("-", ":")) or label == "localhost"
