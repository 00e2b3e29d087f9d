"""What the admin API tells of usage, as rows, sums and CSV, and of logged envelopes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from gproxyd.store.errors import Unavailable
from gproxyd.types import Answer
from tests.test_admin_api import Desk, at_desk
from tests.test_store_ledger import NOON, record

DAY = 86_400.0

RECORDS = [
    record(id="1", request_id="r1", at=NOON),
    record(id="2", request_id="r2", at=NOON + 1, status=500, cost_nanousd=None, output_tokens=None),
    record(id="3", request_id="r3", at=NOON + DAY, user="bob", key="phone", provider="anthropic-main", model="opus"),
    record(id="4", request_id="r4", at=NOON + 2, key="ci", endpoint="POST /v1/embeddings", cost_nanousd=1),
    record(id="5", request_id="r5", at=NOON + 3, user=None, key=None, status=401, cost_nanousd=None, input_tokens=None),
]


async def ids(at: Desk, query: str, **who: str) -> str:
    path = "/v1/me/usage" if who else "/admin/usage"
    return "".join(row["id"] for row in (await at.json("GET", f"{path}?{query}", **who))["data"])


async def whole(answer: Answer) -> str:
    if isinstance(answer.body, bytes):
        return answer.body.decode()
    return b"".join([piece async for piece in answer.body]).decode()


def test_filters_are_all_obeyed(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        for query, wanted in {
            "": "35421",
            "user=alice": "421",
            "key=laptop": "21",
            "key=alice/ci": "4",
            "user=bob&key=alice/ci": "",
            "provider=anthropic-main": "3",
            "model=gpt-4.1-mini": "5421",
            "endpoint=POST /v1/embeddings": "4",
            "status=500": "2",
            "since=2027-01-16": "3",
            "since=2027-01-15T12:00:02Z&until=2027-01-15T12:00:03Z": "4",
            "until=2027-01-15T13:00:01%2B01:00".replace("%2B", "+"): "1",
            "user=alice&status=500": "2",
        }.items():
            assert await ids(at, query) == wanted, query

    at_desk(tmp_path, work)


def test_a_page_leads_to_the_next(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        seen, target = "", "/admin/usage?limit=2"
        while True:
            page = await at.json("GET", target)
            seen += "".join(row["id"] for row in page["data"])
            if page["next"] is None:
                break
            target = f"/admin/usage?limit=2&cursor={page['next']}"
        assert seen == "35421"

    at_desk(tmp_path, work)


def test_a_record_shows_times_and_money_as_text_and_unknown_prices_as_null(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        rows = {row["id"]: row for row in (await at.json("GET", "/admin/usage"))["data"]}
        assert rows["1"]["at"] == "2027-01-15T12:00:00Z"
        assert (rows["1"]["cost_nanousd"], rows["1"]["cost_usd"]) == (56_000, "0.000056")
        assert (rows["2"]["cost_nanousd"], rows["2"]["cost_usd"], rows["2"]["output_tokens"]) == (None, None, None)
        assert rows["1"]["stream"] is True
        assert rows["1"]["request_id"] == "r1"

    at_desk(tmp_path, work)


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        ("user", {"alice": 3, "bob": 1, None: 1}),
        ("key", {"alice/laptop": 2, "alice/ci": 1, "bob/phone": 1, None: 1}),
        ("provider", {"openai-main": 4, "anthropic-main": 1}),
        ("model", {"gpt-4.1-mini": 4, "opus": 1}),
        ("day", {"2027-01-15": 4, "2027-01-16": 1}),
    ],
)
def test_usage_is_summed_by(by: str, wanted: dict[str | None, int], tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        told = await at.json("GET", f"/admin/usage?group_by={by}")
        assert {row["key"]: row["requests"] for row in told["data"]} == wanted
        assert told["next"] is None
        assert set(told["data"][0]) >= {
            "key", "requests", "errors", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
            "reasoning_tokens", "cost_usd",
        }  # fmt: skip

    at_desk(tmp_path, work)


def test_sums_count_errors_and_money(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        row = (await at.json("GET", "/admin/usage?group_by=user&user=alice"))["data"][0]
        assert (row["requests"], row["errors"], row["unpriced"], row["cost_usd"]) == (3, 1, 1, "0.000056001")

    at_desk(tmp_path, work)


@pytest.mark.parametrize("asked", ["user=free", "user=free&since=2027-01-15T12:00:00Z"], ids=["totals", "rows"])
def test_a_sum_of_which_no_price_is_known_is_null_and_one_of_which_some_are_is_their_sum(
    asked: str, tmp_path: Path
) -> None:
    async def work(at: Desk) -> None:
        await at.book(
            record(user="free", model="dark", cost_nanousd=None),
            record(user="free", model="dark", cost_nanousd=None),
            record(user="free", model="dark", cost_nanousd=0, status=429, input_tokens=None, output_tokens=None),
            record(user="free", model="dim", cost_nanousd=None),
            record(user="free", model="dim", cost_nanousd=1),
            record(user="free", model="gift", cost_nanousd=0),
        )
        rows = (await at.json("GET", f"/admin/usage?group_by=model&{asked}"))["data"]
        assert [(row["key"], row["requests"], row["unpriced"], row["cost_usd"]) for row in rows] == [
            ("dim", 2, 1, "0.000000001"),
            ("dark", 3, 2, None),
            ("gift", 1, 0, "0.00"),
        ]
        text = await whole(await at.answer("GET", f"/admin/usage?format=csv&group_by=model&{asked}"))
        costs = [row["cost_usd"] for row in csv.DictReader(io.StringIO(text, newline=""))]
        assert costs == ["0.000000001", "", "0.00"]

    at_desk(tmp_path, work)


def test_sums_can_be_paged(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        first = await at.json("GET", "/admin/usage?group_by=key&limit=3")
        rest = await at.json("GET", f"/admin/usage?group_by=key&limit=3&cursor={first['next']}")
        assert (len(first["data"]), len(rest["data"]), rest["next"]) == (3, 1, None)

    at_desk(tmp_path, work)


def test_callers_see_their_own_usage_only_whatever_they_ask(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS, record(id="6", user="filed", key="ci", at=NOON))
        who = {"user": "filed", "key": "ci"}
        for query, wanted in {
            "": "6",
            "key=ci": "6",
            "key=alice/ci": "",
            "key=bob/phone": "",
            "status=500": "",
        }.items():
            assert await ids(at, query, **who) == wanted, query
        told = await at.json("GET", "/v1/me/usage?group_by=user", user="filed", key="ci")
        assert [row["key"] for row in told["data"]] == ["filed"]
        assert (await at.refused("GET", "/v1/me/usage", user=None, key=None)).status == 404

    at_desk(tmp_path, work)


def test_csv_holds_every_record_however_many(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*(record(id=str(number), at=NOON + number) for number in range(2500)))
        answer = await at.answer("GET", "/admin/usage?format=csv&user=alice")
        assert answer.content_type == "text/csv; charset=utf-8"
        assert "usage.csv" in answer.headers["Content-Disposition"]
        assert not isinstance(answer.body, bytes)
        rows = list(csv.DictReader(io.StringIO(await whole(answer), newline="")))
        assert [row["id"] for row in rows] == [str(number) for number in reversed(range(2500))]
        assert (rows[0]["cost_usd"], rows[0]["stream"], rows[0]["cache_write_tokens"]) == ("0.000056", "true", "")
        few = await whole(await at.answer("GET", "/admin/usage?format=csv&limit=10"))
        assert few.count("\r\n") == 11

    at_desk(tmp_path, work)


def test_csv_of_sums(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*RECORDS)
        text = await whole(await at.answer("GET", "/admin/usage?format=csv&group_by=day"))
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [(row["key"], row["requests"]) for row in rows] == [("2027-01-15", "4"), ("2027-01-16", "1")]

    at_desk(tmp_path, work)


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", 'a"b,c', "a\nb"])
def test_no_cell_of_csv_is_a_formula_or_breaks_its_row(name: str, tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(record(requested_model=name))
        text = await whole(await at.answer("GET", "/admin/usage?format=csv"))
        (row,) = csv.DictReader(io.StringIO(text, newline=""))
        assert row["requested_model"] == (name if name[0] == "a" else f"'{name}")
        assert row["model"] == "gpt-4.1-mini"

    at_desk(tmp_path, work)


def test_csv_that_cannot_be_finished_is_no_whole_answer(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        await at.book(*(record(at=NOON + number) for number in range(1500)))
        answer = await at.answer("GET", "/admin/usage?format=csv")
        assert at.house.database is not None
        await at.house.database.close()
        with pytest.raises(Unavailable):
            await whole(answer)
        assert (await at.refused("GET", "/admin/usage?format=csv")).status == 503

    at_desk(tmp_path, work)


def test_envelopes_are_listed_without_and_shown_with_their_bodies(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        logs = at.house.logs
        assert logs is not None
        for number, status in enumerate((200, 500, 200)):
            logs.put(
                {
                    "request_id": f"req_{number}",
                    "at": NOON + number,
                    "user": "alice",
                    "status": status,
                    "request_headers": [["accept", "*/*"]],
                    "request_body": '{"größe": 1}'.encode(),
                    "response_body": b"\xff\x00",
                }
            )
        await logs.stop()
        listed = await at.json("GET", "/admin/requests?limit=2")
        assert [row["request_id"] for row in listed["data"]] == ["req_2", "req_1"]
        assert "request_body" not in listed["data"][0]
        assert listed["data"][0]["at"] == "2027-01-15T12:00:02Z"
        rest = await at.json("GET", f"/admin/requests?limit=2&cursor={listed['next']}")
        assert [row["request_id"] for row in rest["data"]] == ["req_0"]
        failed = await at.json("GET", "/admin/requests?status=500&user=alice")
        assert [row["request_id"] for row in failed["data"]] == ["req_1"]
        shown = await at.json("GET", "/admin/requests/req_1")
        assert shown["request_body"] == '{"größe": 1}'
        assert shown["response_body"] == {"base64": "/wA="}
        assert shown["request_headers"] == [["accept", "*/*"]]
        assert (await at.refused("GET", "/admin/requests/req_7")).status == 404

    at_desk(tmp_path, work)


def test_where_no_envelopes_are_kept_the_list_is_empty(tmp_path: Path) -> None:
    async def work(at: Desk) -> None:
        at.house.logs = None
        assert await at.json("GET", "/admin/requests") == {"data": [], "next": None}
        assert (await at.refused("GET", "/admin/requests/req_1")).status == 404

    at_desk(tmp_path, work)
