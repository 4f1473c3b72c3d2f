"""The wire format: encoding, decoding, and rejection of invalid messages."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gamebear_tasks.runner.protocol.wire import (
    MAX_BODY,
    MAX_DEPTH,
    MAX_HEADER,
    MAX_NUMBER,
    CutOff,
    WireError,
    decode,
    encode,
)

numbers = st.integers(-MAX_NUMBER, MAX_NUMBER) | st.floats(-float(MAX_NUMBER), float(MAX_NUMBER))

values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

headers = st.dictionaries(st.text().filter("body".__ne__), values, max_size=4)


def decoded(data: bytes) -> tuple[Mapping[str, object], int] | None:
    return decode(io.BytesIO(data).read)


def message(text: str | bytes) -> bytes:
    """Return a message with this header, valid or not."""
    content = text if isinstance(text, bytes) else text.encode()
    return struct.pack(">I", len(content)) + content


@given(headers, st.integers(0, MAX_BODY))
def test_a_message_is_decoded_as_it_was_encoded(header: dict[str, object], body: int) -> None:
    assert decoded(encode(header, body)) == ({**header, "body": body} if body else header, body)
    assert decoded(encode(header)) == (header, 0)


@given(headers)
def test_a_message_has_the_documented_form(header: dict[str, object]) -> None:
    data = encode(header, 7)
    assert data[:4] == (len(data) - 4).to_bytes(4, "big")
    assert json.loads(data[4:].decode("utf-8")) == {**header, "body": 7}
    assert encode({"op": "hello", "n": [1, 2]}) == b'\0\0\0\x18{"op":"hello","n":[1,2]}'


def test_messages_follow_each_other() -> None:
    stream = io.BytesIO(encode({"a": 1}) + encode({"b": 2}, 3) + b"xyz" + encode({}))
    assert decode(stream.read) == ({"a": 1}, 0)
    assert decode(stream.read) == ({"b": 2, "body": 3}, 3)
    assert stream.read(3) == b"xyz"
    assert decode(stream.read) == ({}, 0)
    assert decode(stream.read) is None


@given(headers, st.data())
def test_a_stream_that_ends_within_a_message_is_cut_off(header: dict[str, object], data: st.DataObject) -> None:
    whole = encode(header)
    end = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(CutOff):
        decoded(whole[:end])


def test_a_header_has_a_maximum_length() -> None:
    longest = {"a": "x" * (MAX_HEADER - len('{"a":""}'))}
    assert decoded(encode(longest)) == (longest, 0)
    with pytest.raises(WireError):
        encode({"a": longest["a"] + "x"})
    asked: list[int] = []

    def read(count: int) -> bytes:
        asked.append(count)
        return struct.pack(">I", MAX_HEADER + 1)

    with pytest.raises(WireError):
        decode(read)
    assert asked == [4], "nothing is read of it"
    with pytest.raises(CutOff):
        decoded(struct.pack(">I", MAX_HEADER))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", "null", '"x"', "[[" * 100_000, b"\xff", b'{"\xff": 1}', "{'a': 1}"]
)
def test_a_message_that_is_not_a_json_object_is_rejected(text: str | bytes) -> None:
    with pytest.raises(WireError) as caught:
        decoded(message(text))
    assert not isinstance(caught.value, CutOff)


@given(st.lists(st.booleans(), min_size=MAX_DEPTH - 1, max_size=MAX_DEPTH - 1))
def test_a_header_has_a_maximum_depth(kinds: list[bool]) -> None:
    value: object = 1
    for is_list in kinds:
        value = [0, value] if is_list else {"a": "", "b": value}
    assert decoded(encode({"x": value})) == ({"x": value}, 0)
    for deeper in ([value], {"a": value}):
        with pytest.raises(WireError):
            decoded(encode({"x": deeper}))


@given(st.integers() | st.integers(MAX_NUMBER - 2, MAX_NUMBER + 2) | st.integers(-MAX_NUMBER - 2, 2 - MAX_NUMBER))
def test_integers_are_clamped(number: int) -> None:
    found = decoded(message(f'{{"n": {number}}}'))
    assert found == ({"n": max(-MAX_NUMBER, min(number, MAX_NUMBER))}, 0)


def test_an_integer_of_a_million_digits_is_clamped() -> None:
    text = "9" * 1_000_000
    assert decoded(message(f'{{"a": {text}, "b": -{text}}}')) == ({"a": MAX_NUMBER, "b": -MAX_NUMBER}, 0)
    assert 1 < MAX_NUMBER.bit_length() <= 64


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.5", 0.5),
        ("-1e3", -1000.0),
        ("1e300", float(MAX_NUMBER)),
        ("-1e300", -float(MAX_NUMBER)),
        ("1e999", float(MAX_NUMBER)),
        ("Infinity", float(MAX_NUMBER)),
        ("-Infinity", -float(MAX_NUMBER)),
    ],
)
def test_other_numbers_are_clamped(text: str, number: float) -> None:
    assert decoded(message(f'{{"n": {text}}}')) == ({"n": number}, 0)


def test_nan_is_decoded_as_nan() -> None:
    found = decoded(message('{"n": NaN}'))
    assert found is not None
    number = found[0]["n"]
    assert isinstance(number, float) and math.isnan(number)


@pytest.mark.parametrize("body", ["-1", str(MAX_BODY + 1), "1.0", "true", "false", '"1"', "null", "[]", "NaN"])
def test_a_body_with_an_invalid_length_is_rejected(body: str) -> None:
    with pytest.raises(WireError):
        decoded(message(f'{{"body": {body}}}'))


@pytest.mark.parametrize("body", [0, 1, MAX_BODY])
def test_a_body_may_have_each_length_up_to_the_limit(body: int) -> None:
    assert decoded(message(f'{{"body": {body}}}')) == ({"body": body}, body)
