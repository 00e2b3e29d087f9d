"""The form scanner: one model, where it stands, however the form is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.errors import Refusal
from gproxyd.wire import multipart
from gproxyd.wire.multipart import FormScanner, boundary
from tests.support.streams import CUTS, at_cuts, byte_by_byte, cuttings, law, pieces

BOUNDARY = b"XbX"


@dataclass(frozen=True)
class Seen:
    """What a scanner makes of a form; `value` is None where there is no model."""

    refused: bool
    value: str | None = None
    span: tuple[int, int] = (0, 0)


REFUSED = Seen(refused=True)


def scan(parts: Iterable[bytes], delimiter: bytes = BOUNDARY) -> Seen:
    scanner = FormScanner(delimiter)
    try:
        for part in parts:
            scanner.feed(part)
        scanner.finish()
    except Refusal as refusal:
        assert refusal.status == 400  # noqa: PT017
        return REFUSED
    return Seen(False, scanner.value, scanner.span)


def part(name: bytes, body: bytes, head: bytes = b"") -> bytes:
    return b'--XbX\r\nContent-Disposition: form-data; name="%b"\r\n%b\r\n%b\r\n' % (name, head, body)


END = b"--XbX--\r\n"
MODEL = part(b"model", b"whisper-1")
FILE = part(b'file"; filename="a.wav', b"RIFF\0\0\r\n--Xb\r\n--XBX\r\n\r\n--", b"Content-Type: audio/wav\r\n")


def found(form: bytes, value: bytes) -> Seen:
    """The model as it stands in the form, at the one place where it does."""
    assert form.count(value) == 1
    at = form.index(value)
    return Seen(False, value.decode(), (at, at + len(value)))


def assert_everywhere(form: bytes, expected: Seen) -> None:
    """However the form is cut."""
    for how, parts in cuttings(form, rounds=20):
        assert scan(parts) == expected, how
    for cut in range(len(form)):
        assert scan(pieces(form, [cut])) == expected, cut


NO_MODEL = Seen(refused=False)

FORMS = {
    "model alone": (MODEL + END, b"whisper-1"),
    "model first": (MODEL + FILE + END, b"whisper-1"),
    "model last": (FILE + part(b"language", b"en") + MODEL + END, b"whisper-1"),
    "no end of line behind the last boundary": (MODEL + b"--XbX--", b"whisper-1"),
    "an epilogue": (MODEL + END + part(b"model", b"other"), b"whisper-1"),
    "a preamble": (b"This is a form.\r\n--Xb\r\n" + MODEL + END, b"whisper-1"),
    "spaces behind a boundary": (MODEL.replace(b"XbX\r\n", b"XbX \t\r\n") + END, b"whisper-1"),
    "capitals": (part(b"model", b"m-1", b"CONTENT-TYPE: text/plain\r\n").replace(b"Dispo", b"DISPO") + END, b"m-1"),
    "the type first": (b'--XbX\r\nA: b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm-1\r\n' + END, b"m-1"),
    "unquoted": (MODEL.replace(b'"', b"") + END, b"whisper-1"),
    "more parameters": (MODEL.replace(b'"model"', b'"model"; x=y') + END, b"whisper-1"),
    "no space": (MODEL.replace(b"; name", b";name") + END, b"whisper-1"),
    "the longest": (part(b"model", b"m" * multipart.MAX_VALUE) + END, b"m" * multipart.MAX_VALUE),
    "not ASCII": (part(b"model", "ü\U0001f600".encode()) + END, "ü\U0001f600".encode()),
    "line ends inside": (part(b"model", b"a\r\nb\n") + END, b"a\r\nb\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_model_is_found_where_it_stands(name: str) -> None:
    form, value = FORMS[name]
    assert_everywhere(form, found(form, value))


@pytest.mark.parametrize(
    "form",
    [
        END,
        FILE + END,
        part(b"models", b"x") + part(b"amodel", b"x") + part(b"mode", b"x") + part(b"Model", b"x") + END,
        part(b"a", b'Content-Disposition: form-data; name="model"\r\n\r\nx') + END,
        part(b"a", b"x", b'X-Content-Disposition: form-data; name="model"\r\n') + END,
        part(b"a", b"x", b'Content-Type: text/plain; name="model"\r\n') + END,
        part(b'a"; filename="name=model', b"x") + END,
        part(b'a"; filename="; name=model', b"x") + END,
        part(b'a"; filename=" name=model ', b"x") + END,
        part(b"a", b"x") + END + MODEL,
    ],
)
def test_what_only_resembles_the_field_is_not_it(form: bytes) -> None:
    assert_everywhere(form, NO_MODEL)


def test_an_empty_value_is_a_value() -> None:
    form = part(b"model", b"") + END
    at = form.index(b"\r\n\r\n") + 4
    assert_everywhere(form, Seen(False, "", (at, at)))


BROKEN = {
    "nothing": b"",
    "another boundary": MODEL.replace(b"XbX", b"YbY") + END.replace(b"XbX", b"YbY"),
    "no end": MODEL,
    "no end of the value": MODEL[:-2],
    "half an end": MODEL + b"--XbX-",
    "no blank line": b'--XbX\r\nContent-Disposition: form-data; name="model"\r\n' + END,
    "two models": MODEL + FILE + part(b"model", b"other") + END,
    "the same twice": MODEL + MODEL + END,
    "two models, one unquoted": MODEL + part(b"model", b"other").replace(b'"', b"") + END,
    "a boundary with a tail": b"--XbXtail\r\n" + MODEL + END,
    "an endless boundary line": b"--XbX" + b" " * 300 + b"\r\n" + MODEL + END,
    "a boundary where the value should begin": MODEL.replace(b"whisper-1\r\n", b"") + END,
    "a boundary where the value should begin, and more": MODEL.replace(b"whisper-1\r\n", b"") + FILE + END,
    "a long model": part(b"model", b"m" * (multipart.MAX_VALUE + 1)) + END,
    "an endless model": part(b"model", b"m" * 5000) + END,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_forms_are_refused(name: str) -> None:
    assert_everywhere(BROKEN[name], REFUSED)


@pytest.mark.parametrize(
    "form",
    [
        part(b"a", b"x") * (multipart.MAX_PARTS + 1) + END,
        part(b"a", b"x", b"X: " + b"y" * (multipart.MAX_PART_HEAD + 1) + b"\r\n") + END,
        b"--XbX\r\nX: " + b"y" * (2 * multipart.MAX_PART_HEAD),
    ],
    ids=["parts", "head", "endless head"],
)
def test_limits(form: bytes) -> None:
    assert scan([form]) == scan(pieces(form, range(0, len(form), 777))) == REFUSED


def test_as_many_parts_as_there_may_be() -> None:
    form = part(b"a", b"x") * (multipart.MAX_PARTS - 1) + MODEL + END
    assert scan([form]) == found(form, b"whisper-1")


@pytest.mark.parametrize(
    "line",
    [
        b'Content-Disposition: form-data;\r\n name="model"',
        b'Content-Disposition: form-data; name = "model"',
        b'Content-Disposition: form-data; name="mo\\del"',
        b"Content-Disposition: form-data; name*=UTF-8''model",
        b'Content-Disposition : form-data; name="model"',
        b'Content-Disposition: form-data; name="x"; name="model"',
    ],
)
def test_a_head_that_another_reader_could_take_for_the_model_does_not_pass_beside_one(line: bytes) -> None:
    """Two readers of the form must not see two different models."""
    second = b"--XbX\r\n%b\r\n\r\nother\r\n" % line
    assert scan([MODEL + second + END]) == REFUSED


TEXTS = (
    st.lists(
        st.sampled_from(
            [b"\r\n", b"--", b"--XbX", b"XbX", b"\r", b"\n", b"a", b"\0\xff", b"\r\n--Xb", b'name="model"', b"\r\n\r\n"]
        ),
        max_size=8,
    )
    .map(b"".join)
    .filter(lambda text: b"\r\n--XbX" not in b"\r\n" + text + b"\r\n--Xb")
)


@law(300)
@given(
    st.lists(st.tuples(st.sampled_from([b"file", b"a", b"models", b'f"; filename="x'])), max_size=3),
    st.lists(TEXTS, min_size=3, max_size=3),
    st.none() | TEXTS,
    st.integers(0, 3),
    CUTS,
)
def test_any_form_cut_anywhere(
    names: list[tuple[bytes]], texts: list[bytes], model: bytes | None, place: int, cuts: list[int]
) -> None:
    parts = [part(name, text) for (name,), text in zip(names, texts, strict=False)]
    expected = NO_MODEL
    if model is not None:
        place = min(place, len(parts))
        head = part(b"model", b"")[:-2]
        start = sum(map(len, parts[:place])) + len(head)
        expected = Seen(False, model.decode("utf-8", "replace"), (start, start + len(model)))
        parts.insert(place, part(b"model", model))
    form = b"".join(parts) + END
    assert scan([form]) == expected
    assert scan(at_cuts(form, cuts)) == expected
    assert scan(byte_by_byte(form)) == expected


FRAGMENTS = st.lists(
    st.sampled_from([b"--XbX", b"--", b"\r\n", b"\r\n\r\n", b'Content-Disposition: form-data; name="model"', b"x"]),
    max_size=14,
).map(b"".join)


@law(300)
@given(FRAGMENTS, CUTS)
def test_any_bytes_are_read_one_way(form: bytes, cuts: list[int]) -> None:
    whole = scan([form])
    assert scan(at_cuts(form, cuts)) == whole
    assert scan(byte_by_byte(form)) == whole


def test_what_follows_a_model_is_still_checked_but_its_value_is_there_at_once() -> None:
    scanner = FormScanner(BOUNDARY)
    scanner.feed(MODEL + b"--XbX")
    assert (scanner.value, scanner.ended) == ("whisper-1", False)
    with pytest.raises(Refusal):
        scanner.finish()
    scanner.feed(b"--")
    scanner.finish()


def test_a_large_file_is_not_held() -> None:
    scanner = FormScanner(BOUNDARY)
    scanner.feed(part(b"file", b"")[:-2])
    for _ in range(100):
        scanner.feed(b"\r\n--Xb" * 1000)
        assert len(scanner._buffer) < 100


# The boundary.


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'multipart/form-data; boundary="a b:c"', b"a b:c"),
        (b"Multipart/Form-Data;BOUNDARY=abc; charset=utf-8", b"abc"),
        (b"multipart/form-data; charset=utf-8; boundary=----WebKitForm7MA4YWxk ", b"----WebKitForm7MA4YWxk"),
        (b"multipart/form-data; boundary=" + b"x" * 70, b"x" * 70),
        (b"multipart/form-data; boundary=_'+-./:=?", b"_'+-./:=?"),
    ],
)  # fmt: skip
def test_boundaries(content_type: bytes, expected: bytes) -> None:
    assert boundary(content_type) == expected


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (b"", 415),
        (b"application/json", 415),
        (b"multipart/mixed; boundary=abc", 415),
        (b"multipart/form-data", 400),
        (b"multipart/form-data; boundary=", 400),
        (b'multipart/form-data; boundary=""', 400),
        (b'multipart/form-data; boundary="abc', 400),
        (b'multipart/form-data; boundary="a\\"b"', 400),
        (b"multipart/form-data; boundary=" + b"x" * 71, 400),
        (b"multipart/form-data; boundary=a b", 400),
        (b"multipart/form-data; xboundary=abc", 400),
        (b"multipart/form-data; boundary=abc; boundary=xyz", 400),
        (b"multipart/form-data; boundary=abc; boundary=abc", 400),
    ],
)
def test_bad_boundaries(content_type: bytes, status: int) -> None:
    with pytest.raises(Refusal) as caught:
        boundary(content_type)
    assert caught.value.status == status
