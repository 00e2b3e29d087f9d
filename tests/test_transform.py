"""What a response passes through: every byte stays but the model's name, wherever the bytes are cut."""

from __future__ import annotations

import gzip
import random
import time
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.errors import WireError
from gproxyd.wire import sse, transform
from gproxyd.wire.transform import Events, Identity, Inflate, Json, Transform
from tests.support.streams import (
    CUTS,
    EVENT_STREAMS,
    JSON_BODIES,
    LINE_ENDS,
    STREAMS,
    Stream,
    at_cuts,
    boundaries,
    byte_by_byte,
    cuttings,
    events_of,
    law,
    pieces,
    random_pieces,
    windows,
)

SHOWN = b"chat-default"
ERROR = b'event: error\ndata: {"error":{}}\n\n'

RECORDED = [stream.with_line_ends(style) for stream in EVENT_STREAMS for style in LINE_ENDS]


def events_for(stream: Stream) -> Events:
    return Events(DIALECTS[stream.dialect].places, b'"%b"' % SHOWN)


def passed(through: Transform, parts: Iterable[bytes]) -> bytes:
    return b"".join([through.feed(part) for part in parts]) + through.finish()


def named(streams: list[Stream]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stream", streams, ids=lambda stream: stream.name.replace(" ", "-"))


def offsets_near(stream: Stream, reach: int = 3) -> list[int]:
    """Every offset near an event's end, and some in between."""
    ends, size = boundaries(stream.upstream), len(stream.upstream)
    near = {at for end in ends for at in range(end - reach, end + reach) if 0 <= at < size}
    return sorted(near | set(range(0, size, 17)))


# The law.


@named(RECORDED)
def test_a_stream_cut_anywhere_keeps_every_byte_but_the_model(stream: Stream) -> None:
    upstream, expected = stream.upstream, stream.shown(SHOWN)
    assert expected != upstream
    for how, parts in cuttings(upstream):
        assert passed(events_for(stream), parts) == expected, how


@named(EVENT_STREAMS)
def test_a_stream_cut_at_every_single_offset(stream: Stream) -> None:
    upstream, expected = stream.upstream, stream.shown(SHOWN)
    for cut in range(len(upstream)):
        assert passed(events_for(stream), (upstream[:cut], upstream[cut:])) == expected, cut


@pytest.mark.parametrize("style", ["CRLF", "mixed"])
@named(EVENT_STREAMS)
def test_a_few_events_cut_at_every_single_offset(stream: Stream, style: str) -> None:
    """Three events at a time, so that every offset of every stream can be had with two more kinds of line end."""
    for few in windows(stream):
        part = few.with_line_ends(style)
        upstream, expected = part.upstream, part.shown(SHOWN)
        for cut in range(len(upstream)):
            assert passed(events_for(stream), (upstream[:cut], upstream[cut:])) == expected, (few.name, cut)


@named(RECORDED)
def test_the_client_sees_the_same_events(stream: Stream) -> None:
    """The plain reader finds them; the line ends of the upstream make no difference to it."""
    plain = Stream("", stream.dialect, "events", stream.template.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    assert len(events_of(stream.upstream)) > 1
    assert events_of(passed(events_for(stream), [stream.upstream])) == events_of(plain.shown(SHOWN))


@named(RECORDED)
def test_without_places_every_byte_stays(stream: Stream) -> None:
    for how, parts in cuttings(stream.upstream):
        assert passed(Events(), parts) == stream.upstream, how


@named(JSON_BODIES)
def test_a_json_body_cut_anywhere_keeps_every_byte_but_the_model(stream: Stream) -> None:
    places = DIALECTS[stream.dialect].places
    for how, parts in cuttings(stream.upstream):
        assert passed(Json(places, b'"%b"' % SHOWN), parts) == stream.shown(SHOWN), how
    half = Json(places, b'"x"')
    half.feed(stream.upstream[:50])
    assert not half.at_rest
    assert half.fail(ERROR) == b""


@pytest.mark.parametrize("coding", [b"", *sorted(transform.INFLATABLE)])
@named(STREAMS)
def test_all_at_once_is_the_same_as_piece_by_piece(stream: Stream, coding: bytes) -> None:
    inner = (Events if stream.kind == "events" else Json)(DIALECTS[stream.dialect].places, b'"%b"' % SHOWN)
    through = Inflate(coding, inner) if coding else inner
    assert through.whole(squeezed(coding, stream.upstream)) == stream.shown(SHOWN)


def test_identity() -> None:
    assert passed(Identity(), [b"a", b"", b"\xff"]) == b"a\xff"
    assert not Identity().at_rest
    assert Identity().fail(ERROR) == b""


# Lines and events.


@law(300)
@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"data: x", b"\xe2\x80\xa8"]), max_size=12).map(b"".join))
def test_the_last_event_ends_where_the_plain_reader_says(text: bytes) -> None:
    """Behind it there may be blank lines, of which no event is made, but no other event's end."""
    text = b"a" + text
    end = sse.end_of_events(text)
    assert end in [0, *boundaries(text)]
    assert end or not boundaries(text)
    assert not boundaries(text[end:].lstrip(b"\r\n"))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\0"])
def test_other_separators_are_data(separator: str) -> None:
    text = f'data: {{"a":"{separator * 2}data: x","model":"m"}}\n\n'.encode()
    for how, parts in cuttings(text):
        assert passed(Events(((b"model",),), b'"s"'), parts) == text.replace(b'"m"', b'"s"'), how


@pytest.mark.parametrize(
    ("upstream", "client"),
    [
        (b'data: {"a":\nid: 1\ndata: "model":"m","b":{}}\n\n', b'data: {"a":\nid: 1\ndata: "model":"m","b":{}}\n\n'),
        (b'data: {\nid: 1\ndata: "model":"m","b":{}}\n\n', b'data: {\nid: 1\ndata: "model":"s","b":{}}\n\n'),
        (b'data: {\n:\n: x\ndata: "model":"m"}\n\n', b'data: {\n:\n: x\ndata: "model":"s"}\n\n'),
        (b'data: {"a":[{\nid: 1\ndata: "model":"m"}\nid: 2\ndata: ]}\n\n',) * 2,
        (b'data: {"a":\ndata\ndata: 1,"model":"m"}\n\n', b'data: {"a":\ndata\ndata: 1,"model":"s"}\n\n'),
        (b'data: {"model":"m"}\nid: 1\n\ndata: {}\n\n', b'data: {"model":"s"}\nid: 1\n\ndata: {}\n\n'),
    ],
)  # fmt: skip
def test_the_data_lines_of_one_event_are_one_text(upstream: bytes, client: bytes) -> None:
    """Also with other fields between them."""
    for style, ends in LINE_ENDS.items():
        for how, parts in cuttings(ends(upstream)):
            assert passed(Events(((b"model",),), b'"s"'), parts) == ends(client), (style, how)


# Holding and failing.


@named(RECORDED)
def test_an_unfinished_event_is_held_and_a_failure_stands_alone(stream: Stream) -> None:
    """What has passed ends where an event ends, and the error event is all that follows it."""
    upstream, shown = stream.upstream, events_of(stream.shown(SHOWN))
    for cut in offsets_near(stream):
        through = events_for(stream)
        out = through.feed(upstream[:cut])
        whole = max([0, *boundaries(upstream[:cut])])
        assert out.rstrip(b"\r\n") == passed(events_for(stream), [upstream[:whole]]).rstrip(b"\r\n"), cut
        assert not upstream[whole:cut].strip(b"\r\n") or not through.at_rest, cut
        assert through.fail(ERROR) == ERROR
        seen = events_of(out + ERROR)
        assert seen == [*shown[: len(seen) - 1], ("error", b'{"error":{}}')], cut
        assert len(seen) - 1 == len(events_of(upstream[:whole])), cut


@named(RECORDED)
def test_nothing_is_put_inside_an_event(stream: Stream) -> None:
    """Byte by byte: rest is claimed only where an event has ended, be it between a CR and its LF."""
    through, ends, upstream = events_for(stream), {0, *boundaries(stream.upstream)}, stream.upstream
    for at in range(len(upstream)):
        half = upstream[at - 1 : at + 1] == b"\r\n" and at + 1 in ends
        assert at in ends or half or not through.at_rest, at
        through.feed(upstream[at : at + 1])


@pytest.mark.parametrize("style", sorted(LINE_ENDS))
def test_after_every_event_there_is_rest(style: str) -> None:
    """However it was cut, between CR and LF as well: a silence then gets its pings."""
    text = LINE_ENDS[style](b": x\n\n\ndata: a\n\n\n\nevent: y\ndata: b\n\n")
    for how, parts in cuttings(text):
        through, at = Events(), 0
        assert through.at_rest
        for part in parts:
            through.feed(part)
            at += len(part)
            if at in boundaries(text):
                assert through.at_rest, (how, at)


@named(RECORDED)
def test_pings_between_events_change_none(stream: Stream) -> None:
    ping = DIALECTS[stream.dialect].ping
    through, out = events_for(stream), []
    for at in range(len(stream.upstream)):
        out.append(through.feed(stream.upstream[at : at + 1]))
        if at % 3 == 0 and through.at_rest:
            out.append(ping)
    out.append(through.finish())
    seen = [event for event in events_of(b"".join(out)) if event != ("ping", b'{"type": "ping"}')]
    expected = [event for event in events_of(stream.shown(SHOWN)) if event[0] != "ping"]
    assert seen == expected


# Events too large to hold.


@named(RECORDED)
def test_large_events_pass_piece_by_piece(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = stream.upstream
    for limit in (0, 1, 40):
        monkeypatch.setattr(transform, "MAX_HELD", limit)
        for how, parts in cuttings(upstream, rounds=3):
            assert passed(events_for(stream), parts) == stream.shown(SHOWN), (limit, how)
            assert passed(Events(), parts) == upstream, (limit, how)


@named(EVENT_STREAMS)
def test_no_more_than_the_limit_is_held(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "MAX_HELD", 30)
    through, out = Events(), 0
    for at, byte in enumerate(byte_by_byte(stream.upstream)):
        out += len(through.feed(byte))
        assert at + 1 - out <= 30


def test_a_break_inside_a_large_event_ends_its_line_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "MAX_HELD", 10)
    through = Events(((b"model",),), b'"s"')
    out = through.feed(b'data: {"a":1}\n\n') + through.feed(b'data: {"model":"m","a":"bcdefg')
    assert out == b'data: {"a":1}\n\ndata: {"model":"s","a":"bcdefg'
    assert not through.at_rest
    assert events_of(out + through.fail(ERROR))[-1] == ("error", b'{"error":{}}')


def test_after_a_large_event_small_ones_are_held_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "MAX_HELD", 10)
    through = Events(((b"model",),), b'"s"')
    assert through.feed(b'data: {"model":"m"') == b'data: {"model":"s"'
    assert through.feed(b"}\n\n") == b"}\n\n"
    assert through.at_rest
    assert through.feed(b"data: {") == b""
    assert through.fail(ERROR) == ERROR


@pytest.mark.parametrize("places", [(), ((b"model",),)])
def test_a_late_bom_before_a_large_event_loses_nothing(places: tuple[()], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform, "MAX_HELD", 10)
    text = b"data: a\n\n\xef\xbb\xbfdata: bcdefghijk"
    assert passed(Events(places, b'"s"'), [text]) == text


def _steps(size: int, step: int) -> float:
    """CPU seconds for one event of `size` bytes that comes in steps, the best of three."""
    text = b'data: {"model":"m","a":"' + b"x" * size + b'"}\n\n'
    parts, best = pieces(text, range(0, size, step)), float("inf")
    for _ in range(3):
        start = time.process_time()
        assert len(passed(Events(((b"model",),), b'"s"'), parts)) == len(text)
        best = min(best, time.process_time() - start)
    return best


def test_time_grows_with_a_giant_event_and_not_faster() -> None:
    assert _steps(2**23, 2**16) <= 4.5 * _steps(2**21, 2**16) + 0.05


def test_a_stream_of_many_events_takes_time_in_proportion() -> None:
    def cost(count: int) -> float:
        parts = random_pieces(EVENT_STREAMS[0].upstream * count, seed=1, most=100)
        start = time.process_time()
        passed(events_for(EVENT_STREAMS[0]), parts)
        return time.process_time() - start

    assert min(cost(800) for _ in range(3)) <= 4.5 * min(cost(200) for _ in range(3)) + 0.05


# Any bytes at all.

TOKENS = st.sampled_from(
    [
        b"data:", b"data: ", b"data", b"event: x", b": c", b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n",
        b'{"model":"m"}', b'{"model":', b'"m"}', b"{", b"}", b'"', b"\\", b'"model"', b"\xef\xbb\xbf", b"\xff",
        b"[DONE]", b"id: 1",
    ]
)  # fmt: skip


@law(250)
@given(st.lists(TOKENS, max_size=25).map(b"".join), CUTS, st.sampled_from([5, 1024]))
def test_any_bytes_cut_anywhere_come_out_the_same(text: bytes, cuts: list[int], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "MAX_HELD", limit)
        whole = passed(Events(((b"model",),), b'"shown"'), [text])
        assert whole.replace(b'"shown"', b'"m"') == text or b'"model"' in text.replace(b'"m"', b"")
        assert passed(Events(((b"model",),), b'"shown"'), at_cuts(text, cuts)) == whole
        assert passed(Events(((b"model",),), b'"shown"'), byte_by_byte(text)) == whole
        assert passed(Events(), at_cuts(text, cuts)) == text


# Content codings.


def squeezed(coding: bytes, data: bytes) -> bytes:
    if not coding:
        return data
    return gzip.compress(data, mtime=0) if coding == b"gzip" else zlib.compress(data)


@pytest.mark.parametrize("coding", sorted(transform.INFLATABLE))
@named(STREAMS)
def test_a_coded_stream_is_read_through_its_coding(stream: Stream, coding: bytes) -> None:
    def inner() -> Transform:
        places = DIALECTS[stream.dialect].places
        return (Events if stream.kind == "events" else Json)(places, b'"%b"' % SHOWN)

    half = len(stream.upstream) // 2
    members = squeezed(coding, stream.upstream[:half]) + squeezed(coding, stream.upstream[half:])
    for coded in (squeezed(coding, stream.upstream), members, squeezed(coding, b"") + members):
        for how, parts in cuttings(coded, rounds=4):
            assert passed(Inflate(coding, inner()), parts) == stream.shown(SHOWN), how


def test_what_was_flushed_arrives_at_once() -> None:
    stream = EVENT_STREAMS[0]
    packer, through = zlib.compressobj(wbits=31), Inflate(b"gzip", Events())
    for event in stream.upstream.split(b"\n\n")[:-1]:
        assert through.feed(packer.compress(event + b"\n\n") + packer.flush(zlib.Z_SYNC_FLUSH)) == event + b"\n\n"
        assert through.at_rest
    through.feed(packer.compress(b"data: half") + packer.flush(zlib.Z_SYNC_FLUSH))
    assert not through.at_rest
    assert through.fail(ERROR) == ERROR


@pytest.mark.parametrize("coding", sorted(transform.INFLATABLE))
@pytest.mark.parametrize("broken", [b"data: plain\n\n", b"\x1f\x8b\x08\xff" + b"\xff" * 30, b"\0" * 20, b"<html>"])
def test_a_broken_coding_is_an_error_that_tells_nothing(coding: bytes, broken: bytes) -> None:
    with pytest.raises(WireError, match=r"^the response's content coding is broken$"):
        Inflate(coding, Identity()).feed(broken)


@pytest.mark.parametrize("coding", sorted(transform.INFLATABLE))
def test_damage_and_junk_behind_a_good_beginning_are_errors(coding: bytes) -> None:
    rng = random.Random(7)
    text = bytes(rng.choices(b"abcdefgh \n", k=3000))
    coded = squeezed(coding, text)
    for damaged in (
        coded[:-1] + bytes((coded[-1] ^ 1,)),
        coded + b"junk",
        coded[:500] + b"\xff\xff\xff\xff" + coded[504:],
    ):
        through = Inflate(coding, Identity())
        with pytest.raises(WireError):
            passed(through, [damaged])


@pytest.mark.parametrize("coding", sorted(transform.INFLATABLE))
def test_a_coding_that_stops_short_is_not_complete(coding: bytes) -> None:
    """Whatever the HTTP framing says: half a body must not end as if it were whole."""
    coded = squeezed(coding, b"data: x\n\n" * 50)
    for cut in range(1, len(coded)):
        through = Inflate(coding, Identity())
        through.feed(coded[:cut])
        with pytest.raises(WireError):
            through.finish()


@pytest.mark.parametrize("coding", sorted(transform.INFLATABLE))
def test_nothing_at_all_is_an_empty_body(coding: bytes) -> None:
    assert passed(Inflate(coding, Identity()), []) == b""
    assert passed(Inflate(coding, Identity()), [b""]) == b""
    assert passed(Inflate(coding, Identity()), [squeezed(coding, b"")]) == b""


@pytest.mark.parametrize("coding", sorted(transform.INFLATABLE))
def test_a_bomb_is_not_blown_up(coding: bytes) -> None:
    class Counter(Identity):
        most = 0

        def feed(self, data: bytes) -> bytes:
            self.most += len(data)
            return b""

    inner = Counter()
    bomb = squeezed(coding, b"\0" * (80 * 1024 * 1024))
    with pytest.raises(WireError, match="beyond all bounds"):
        Inflate(coding, inner).feed(bomb)
    assert inner.most <= 64 * 1024 * 1024
