"""Reading JSON and tables that a user may have given."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ge2hist_core.files import MAX_DEPTH, parse_json, separator_line
from ge2hist_core.types import BadInput, check_sha256, check_text

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(plain, lambda part: st.lists(part) | st.dictionaries(st.text(), part), max_leaves=20)


@given(values, st.sampled_from(["text", "utf-8", "utf-16", "utf-32"]))
def test_json_gives_what_was_written(value: object, form: str) -> None:
    text = json.dumps(value)
    assert parse_json(text if form == "text" else text.encode(form), "x", "y") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The file is not valid JSON (Expecting value"),
        (b"\xff\xfe\x00", "The file is not valid JSON ("),
        (b'"\xff"', "The file is not valid JSON ("),
        ("1" * 5000, "The file has a whole number of thousands of digits: write it again."),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "The file is nested more than 50 deep: write it again."),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "The file is nested more than 50 deep"),
        ("[" * 100_000, "The file is nested more than 50 deep: write it again."),
    ],
)
def test_what_is_no_json_is_one_sentence(text: str | bytes, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_json(text, "The file", "write it again")
    assert str(caught.value).startswith(message) and str(caught.value).endswith(": write it again.")


def test_the_deepest_that_is_read() -> None:
    assert json.dumps(parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x", "y")) == "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize(
    ("line", "separator"),
    [
        ("sep=;", ";"),
        ("SEP=,\r\n", ","),
        ('"sep=|"', "|"),
        ("sep=\t", "\t"),
        ("sep=", None),
        ("sep=;;", None),
        ("sep;log2FC", None),
        ("", None),
    ],
)
def test_a_line_that_states_the_separator(line: str, separator: str | None) -> None:
    assert separator_line(line) == separator


def test_text_and_hashes_are_checked() -> None:
    check_text("name", "\U0001f600 =1+1")
    with pytest.raises(BadInput, match=r"^name holds 'a.ud83d': half of a surrogate pair is no text, leave it out.$"):
        check_text("name", "a\ud83d")
    with pytest.raises(BadInput, match=r"^name is None: give text.$"):
        check_text("name", None)
    check_sha256("model", "0f" * 32)
    for bad in ("0F" * 32, "0f", "0f" * 32 + "\n", 5, None):
        with pytest.raises(BadInput, match="^model is .*: give the 64 hexadecimal digits of a SHA-256.$"):
            check_sha256("model", bad)
