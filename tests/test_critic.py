"""The remote critic, against a server that misbehaves in each way: a row a photo, the right reason, no secret."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from picinspector import critic, schema
from picinspector.chat import GIVE_UP_AFTER, KEY_VARIABLE, Endpoint, Prices
from picinspector.cli import main
from picinspector.errors import UsageError
from picinspector.manifest import image_id
from picinspector.tables import Destination
from picinspector.wording import tell
from tests.critic_server import COLOURS, CRITIQUE, CriticServer, serve

KEY = "sk-this-is-the-secret-key-0123456789"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def server() -> Iterator[CriticServer]:
    with serve() as running:
        yield running


def make_tables(folder: Path, names: Mapping[str, str]) -> Destination:
    """Committed scores of plain photos, name -> colour, the first the best. Each has EXIF with a place and a camera."""
    rows: list[dict[str, Any]] = []
    for number, (name, colour) in enumerate(names.items()):
        path = folder / f"{name}.jpg"
        exif = Image.Exif()
        exif[0x0110] = "Secret Camera"
        exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
        Image.new("RGB", (1000, 500), COLOURS[colour]).save(path, exif=exif, comment=b"Secret comment")
        values = {f"attribute_{part}": 50.0 for part in schema.ATTRIBUTES}
        values |= {f"scene_{part}": float(part == "night") for part in schema.SCENES}
        row = {"image_id": image_id(str(path), "1"), "uri": str(path), "etag": "1", "scorer_fingerprint": "f"}
        rows.append({**row, **values, "quality_score": 9.0 - number / 8, "scene": "night", "scorer_kind": "lightgbm"})
    dest = Destination(folder / "tables")
    scores = Path(dest.table_path("scores", "20260101T000000.000Z-a"))
    scores.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.SCORES), scores / "0.parquet")
    dest.commit({"run_id": "20260101T000000.000Z-a", "counts": {"to_do": len(rows)}})
    return dest


def colours(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def ask(
    server: CriticServer,
    dest: Destination,
    prices: Prices = Prices(),
    again: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Criticise all photos of a table, and check what holds whatever happened: rows in = rows out, and no secret."""
    endpoint = Endpoint(server.url, "tester", KEY, **{"timeout_s": 2.0, "retries": 1, **settings})
    rows = critic.select(dest, where="true")
    record = critic.critique(dest, rows, endpoint, prices, again)
    stored = table_of(dest)
    written = [row for row in stored if row["critique_id"] == record["critique_id"]]
    assert sorted(row["uri"] for row in written) == sorted(row["uri"] for row in record["rows"])
    if not record["counts"]["unchanged"]:
        assert [row["uri"] for row in record["rows"]] == [row["uri"] for row in rows]
    for row in written:
        assert (row["error_kind"] is None) == (row["critic_score"] is not None) == (row["description"] is not None)
        assert (row["error_kind"] is None) == (row["error_message"] is None)
    assert_no_secret(json.dumps([record, stored], default=str), server)
    return record


def table_of(dest: Destination) -> list[dict[str, Any]]:
    """All critiques, as DuckDB reads them."""
    if not list(Path(dest.root).glob("critiques/**/*.parquet")):
        return []
    return duckdb.sql(f"FROM '{dest.root}/critiques/**/*.parquet'").to_arrow_table().to_pylist()


def assert_no_secret(text: str, server: CriticServer) -> None:
    assert KEY not in text
    assert "base64" not in text
    for request in server.requests:
        url = request.body["messages"][1]["content"][1]["image_url"]["url"]
        assert url[30:70] not in text


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {Path(row["uri"]).stem: row for row in record["rows"]}


# --- what is sent and what comes back ---------------------------------------------------------------------------------


def test_a_critique_is_a_row_with_its_cost(server: CriticServer, tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red", "green"))
    record = ask(server, dest, Prices(2.0, 10.0))
    row = by_name(record)["red"]
    assert row["description"] == CRITIQUE["description"] and row["problems"] == CRITIQUE["problems"]
    assert (row["critic_score"], row["model"], row["tokens_in"], row["tokens_out"]) == (3.5, "tester", 1000, 100)
    assert row["cost_usd"] == pytest.approx(1000 * 2e-6 + 100 * 10e-6)  # $0.003
    assert record["cost_usd"] == record["cost_counted_usd"] == pytest.approx(0.006)
    assert record["counts"] == {
        "selected": 2, "unchanged": 0, "critiqued": 2, "failed": 0, "failed_transient": 0, "errors_by_kind": {},
    }  # fmt: skip
    [file] = Path(dest.root).glob("critiques/*/*")
    assert pq.read_schema(file).equals(critic.CRITIQUES)


def test_only_a_small_bare_picture_and_the_facts_are_sent(
    server: CriticServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another-program")
    dest = make_tables(tmp_path, colours("blue"))
    ask(server, dest)
    [request] = server.requests
    image = Image.open(io.BytesIO(request.jpeg))
    assert image.size == (768, 384) and image.format == "JPEG"
    assert not image.getexif() and {"exif", "comment", "icc_profile", "xmp"}.isdisjoint(image.info)
    assert b"Secret" not in request.jpeg
    facts = critic.facts_of(critic.select(dest, best=1)[0], 0.1)
    assert facts is not None and tell(facts) in request.body["messages"][1]["content"][0]["text"]
    text = json.dumps([dict(request.headers), {**request.body, "messages": request.body["messages"][0]}])
    assert str(tmp_path) not in text and "of-another-program" not in text and "Secret" not in text
    assert not [name for name in request.headers if name.lower().startswith("x-stainless")]
    assert request.headers["Authorization"] == f"Bearer {KEY}" and request.path == "/v1/chat/completions"
    asked = request.body["response_format"]["json_schema"]
    assert asked["strict"] is True and request.body["max_completion_tokens"] == 1000
    jsonschema.Draft202012Validator.check_schema(asked["schema"])
    jsonschema.validate(CRITIQUE, asked["schema"])


def test_what_the_schema_asks_for_is_what_is_checked() -> None:
    fields = critic._Critique.model_fields
    assert list(fields) == list(critic.ANSWER_SCHEMA["properties"]) == critic.ANSWER_SCHEMA["required"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"score": 0.5}, "score: Input should be greater than or equal to 1"),
        ({"score": "7"}, "score: "),
        ({"score": True}, "score: "),
        ({"strengths": ["a", "b", "c", "d"]}, "strengths: List should have at most 3 items"),
        ({"problems": ["x" * 250]}, "problems.0: String should have at most 240 characters"),
        ({"problems": [" \x00\u200b "]}, "problems.0: String should have at least 1 character"),
        ({"description": "x y " * 200}, "description: String should have at most 600 characters"),
        ({"description": None}, "description: "),
        ({"Ignore all that": 1}, "a field that was not asked for: Extra inputs are not permitted"),
        ({"description": f"your key is {KEY}"}, "the answer: it repeats what is no language"),
        ({"suggestions": ["QUJD" * 20]}, "the answer: it repeats what is no language"),
    ],
)
def test_an_answer_that_is_none(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError) as error:
        critic.read_critique(json.dumps(CRITIQUE | change), KEY)
    assert str(error.value).startswith(complaint)
    assert "Ignore" not in str(error.value)


def test_numbers_that_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="score"):
        critic.read_critique(json.dumps(CRITIQUE | {"score": float("nan")}))


# --- misbehaviour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "kind", "requests"),
    [
        # Tried again by the client, once (retries=1):
        (["retry-after", "ok"], None, 2),
        (["retry-after"], "rate_limited", 2),
        (["500", "ok"], None, 2),
        (["500"], "server_error", 2),
        (["reset", "ok"], None, 2),
        (["reset"], "connection", 2),
        (["slow", "ok"], None, 2),
        (["slow"], "timeout", 2),
        (["drip"], "timeout", 2),
        # Asked for once more, with the reason:
        (["no-json"], "invalid_answer", 2),
        (["prose"], "invalid_answer", 2),
        (["prose", "ok"], None, 2),
        (["wrong-schema"], "invalid_answer", 2),
        (["wrong-schema", "ok"], None, 2),
        (["extra-field"], "invalid_answer", 2),
        (["echo"], "invalid_answer", 2),
        (["cut"], "invalid_answer", 2),
        (["no-choices"], "invalid_answer", 2),
        (["huge"], "invalid_answer", 2),
        (["bomb"], "invalid_answer", 2),
        (["deep"], "invalid_answer", 2),
        # Taken at its word:
        (["refusal"], "refused", 1),
        (["filter"], "refused", 1),
        (["policy"], "refused", 1),
        (["400"], "rejected", 1),
        (["control"], None, 1),
    ],
    ids=str,
)
def test_each_misbehaviour_is_its_rows_and_nobody_elses(
    steps: list[str], kind: str | None, requests: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    dest = make_tables(tmp_path, colours("red", "green"))
    started = time.monotonic()
    with serve({"red": steps}) as server:
        patience_s = 2.0 if steps[0] in ("slow", "drip") else 10.0
        rows = by_name(ask(server, dest, timeout_s=patience_s))
        # Two whole answers, a pause (Retry-After: 1 s), and what a busy machine adds; `slow` alone would take 60 s.
        assert time.monotonic() - started < 2 * patience_s + 15
        assert rows["red"]["error_kind"] == kind, rows["red"]["error_message"]
        assert rows["green"]["error_kind"] is None
        assert len(server.asked("red")) == requests and len(server.asked("green")) == 1
        if steps[0] == "retry-after":
            first, second = server.asked("red")
            assert second.at - first.at >= 1.0
        assert_no_secret(caplog.text, server)


def test_a_second_asking_names_what_was_wrong(tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red"))
    with serve({"red": ["wrong-schema", "ok"]}) as server:
        row = by_name(ask(server, dest, Prices(1.0, 1.0)))["red"]
        first, second = (request.body["messages"] for request in server.requests)
    assert second[:2] == first and len(second) == 3
    assert "score: Input should be less than or equal to 10" in second[2]["content"]
    assert (row["tokens_in"], row["tokens_out"], row["cost_usd"]) == (2000, 200, pytest.approx(0.0022))


def test_control_characters_do_not_arrive(tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red"))
    with serve({"red": ["control"]}) as server:
        row = by_name(ask(server, dest))["red"]
    assert row["description"] == "[31mA photo gnp.exe end 2J"
    assert row["strengths"] == row["suggestions"] == ["[31mx gnp.exe end 2J"]


@pytest.mark.parametrize("step", ["401", "402", "403", "404", "no-quota", "elsewhere"])
def test_what_no_photo_can_change_ends_the_command(step: str, tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red", "green", "blue"))
    with serve({"green": [step]}) as server:
        endpoint = Endpoint(server.url, "tester", KEY, retries=0, concurrency=1)
        with pytest.raises(UsageError, match=r"^the critic at http://127.0.0.1:\d+/v1 .*HTTP \d{3}") as error:
            critic.critique(dest, critic.select(dest, best=3), endpoint)
        assert_no_secret(str(error.value), server)
        assert "\n" not in str(error.value)
        assert [request.colour for request in server.requests] == ["red", "green"]  # and no redirect followed
    [kept] = table_of(dest)  # what was paid for is kept
    assert Path(kept["uri"]).stem == "red"


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with serve() as server:
        pass
    record = ask(server, make_tables(tmp_path, colours("red")), retries=0)
    assert record["counts"]["errors_by_kind"] == {"connection": 1} and record["counts"]["failed_transient"] == 1


def test_a_dead_endpoint_is_given_up(server: CriticServer, tmp_path: Path) -> None:
    server.default = "500"
    dest = make_tables(tmp_path, {f"red{number}": "red" for number in range(16)})
    record = ask(server, dest, retries=0, concurrency=2)
    assert record["counts"]["errors_by_kind"] == {"server_error": 16}
    assert GIVE_UP_AFTER <= len(server.requests) <= GIVE_UP_AFTER + 1  # one more was on its way
    assert record["rows"][-1]["error_message"].startswith("not asked")


def test_photos_that_cannot_be_read_are_rows(server: CriticServer, tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red", "green", "blue"))
    (tmp_path / "red.jpg").unlink()
    (tmp_path / "green.jpg").write_bytes(b"no photo")
    rows = by_name(ask(server, dest))
    kinds = {name: row["error_kind"] for name, row in rows.items()}
    assert kinds == {"red": "not_found", "green": "unknown_format", "blue": None}
    assert len(server.requests) == 1


# --- money ------------------------------------------------------------------------------------------------------------

#: An answer of the server costs $0.10 at these: 1,000 prompt tokens at $90 and 100 answer tokens at $100 per million.
DEAR = {"per_million_in": 90.0, "per_million_out": 100.0}


def test_the_ceiling_is_not_exceeded(server: CriticServer, tmp_path: Path) -> None:
    dest = make_tables(tmp_path, {f"red{number}": "red" for number in range(5)})
    record = ask(server, dest, Prices(**DEAR, max_cost_usd=2.0), max_tokens=100, concurrency=8)
    # Before the first answer one may cost 32,000 x $90 = $2.88: nothing is asked.
    assert record["counts"]["errors_by_kind"] == {"cost_ceiling": 5} and not server.requests
    server.default = "lag"
    record = ask(server, dest, Prices(**DEAR, max_cost_usd=3.0), max_tokens=100, concurrency=8)
    # Then four times 1,000 prompt tokens and 100 answer tokens: $0.37, and all fit.
    assert record["counts"]["critiqued"] == 5 and record["cost_counted_usd"] == pytest.approx(0.5)


def test_the_rest_beyond_the_ceiling_are_rows_and_done_by_a_rerun(server: CriticServer, tmp_path: Path) -> None:
    server.default = "lag"
    dest = make_tables(tmp_path, {f"red{number}": "red" for number in range(30)})
    prices = Prices(**DEAR, max_cost_usd=3.0)
    record = ask(server, dest, prices, max_tokens=100, concurrency=8)
    # One may cost $0.37, so the last is asked with at most $2.63 spent: the 27th.
    assert record["counts"]["critiqued"] == len(server.requests) == 27
    assert record["counts"]["errors_by_kind"] == {"cost_ceiling": 3} and record["counts"]["failed_transient"] == 0
    assert record["cost_counted_usd"] == pytest.approx(2.7)
    record = ask(server, dest, prices, max_tokens=100, concurrency=8)
    assert (record["counts"]["unchanged"], record["counts"]["critiqued"]) == (27, 3)


@pytest.mark.parametrize("step", ["no-usage", "negative-usage", "reset", "slow", "huge"])
def test_what_is_not_reported_counts_as_the_most_it_can_cost(step: str, server: CriticServer, tmp_path: Path) -> None:
    server.default = step
    dest = make_tables(tmp_path, {f"red{number}": "red" for number in range(6)})
    # One may cost $2.89, so only two fit, and a third or a second try of either does not.
    record = ask(
        server, dest, Prices(**DEAR, max_cost_usd=6.0), max_tokens=100, concurrency=3, retries=5, timeout_s=0.5
    )
    assert len(server.requests) == 2
    assert record["cost_counted_usd"] == pytest.approx(5.78) and record["cost_usd"] == 0.0
    assert record["counts"]["errors_by_kind"]["cost_ceiling"] >= 4


@pytest.mark.parametrize(
    "prices",
    [
        {"max_cost_usd": 1.0},
        {"max_cost_usd": 1.0, "per_million_in": 1.0},
        {"per_million_out": 1.0},
        {"per_million_in": -1.0, "per_million_out": 1.0},
        {"per_million_in": float("nan"), "per_million_out": 1.0},
    ],
)
def test_prices_that_cannot_be_reckoned_with(prices: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="price"):
        Prices(**prices)


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_rerun_does_what_is_left(tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red", "green", "blue"))
    with serve({"green": ["500"], "blue": ["refusal"]}) as server:
        assert ask(server, dest, retries=0)["counts"]["failed"] == 2
    with serve() as server:
        record = ask(server, dest)
        assert [request.colour for request in server.requests] == ["green"]  # a refusal would be one again
        assert record["counts"]["unchanged"] == 2 and record["counts"]["critiqued"] == 1
        record = ask(server, dest)
        assert record["critique_id"] is None and record["rows"] == [] and len(server.requests) == 1
        assert ask(server, dest, again=True)["counts"]["critiqued"] == 3
        other = Endpoint(server.url, "another-model", KEY)
        assert critic.critique(dest, critic.select(dest, best=1), other)["counts"]["critiqued"] == 1


def test_another_prompt_is_another_critique(
    server: CriticServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = make_tables(tmp_path, colours("red"))
    ask(server, dest)
    monkeypatch.setattr(critic, "PROMPT_VERSION", "another")
    assert ask(server, dest)["counts"]["critiqued"] == 1


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red", "green", "blue"))
    with serve({"blue": ["slow"]}) as server:
        command = [sys.executable, "-m", "picinspector", "critique", str(dest.root), "--best", "3"]
        command += ["--critic-url", server.url, "--critic-model", "tester", "--concurrency", "1"]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {KEY_VARIABLE: KEY})
        deadline = time.monotonic() + 120
        while not server.asked("blue") and time.monotonic() < deadline:
            time.sleep(0.05)
        interrupted = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
        assert child.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
        assert time.monotonic() - interrupted < 15  # it did not wait for the 60 s of the answer
        assert_no_secret(stderr, server)
    assert sorted(Path(row["uri"]).stem for row in table_of(dest)) == ["green", "red"]
    with serve() as server:
        assert ask(server, dest)["counts"]["unchanged"] == 2
        assert [request.colour for request in server.requests] == ["blue"]


def test_many_photos_are_files_of_whole_rows(server: CriticServer, tmp_path: Path) -> None:
    dest = make_tables(tmp_path, {f"red{number}": "red" for number in range(25)})
    ask(server, dest, concurrency=8)
    files = sorted(Path(dest.root).glob("critiques/*/*"))
    assert [file.name for file in files] == ["part-000000.parquet", "part-000001.parquet"]
    assert [pq.read_metadata(file).num_rows for file in files] == [20, 5]


# --- which photos -----------------------------------------------------------------------------------------------------


def test_selections(tmp_path: Path) -> None:
    dest = make_tables(tmp_path, colours("red", "green", "blue", "white"))

    def names(**selection: Any) -> list[str]:
        return [Path(row["uri"]).stem for row in critic.select(dest, **selection)]

    assert names(best=2) == ["red", "green"]
    assert names(worst=2) == ["white", "blue"]
    assert names(where="quality_score < 9 -- not the best") == ["green", "blue", "white"]
    assert names(where="scene = 'night' OR true", best=1) == ["red"]
    assert names(where="scene = 'human'") == []
    for wrong in (
        {},
        {"best": 1, "worst": 1},
        {"where": "no such"},
        {"where": "absent = 1"},
        {"where": "1); SELECT 1"},
    ):
        with pytest.raises(UsageError) as error:
            critic.select(dest, **wrong)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("api.openai.com/v1", ""),
        ("ftp://x/v1", ""),
        ("https://", ""),
        ("https://me:secret@x/v1", ""),
        ("https://x/v1?api_key=secret", ""),
        ("https://x/v1", "two secret words"),
        ("https://x/v1", "secret\nX-Header: 1"),
        ("https://x/v1", "sécret"),
    ],
)
def test_endpoints_that_are_none(url: str, key: str) -> None:
    with pytest.raises(UsageError) as error:
        Endpoint(url, "m", key)
    assert "secret" not in str(error.value) and "sécret" not in str(error.value)
    assert KEY not in repr(Endpoint("https://x/v1", "m", KEY))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(
    server: CriticServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = make_tables(tmp_path, colours("red", "green"))
    arguments = ["critique", dest.root, "--critic-url", server.url, "--critic-model", "tester"]
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\n")  # as from a file
    assert main([*arguments, "--best", "1", "--max-cost", "1"]) == 2
    assert "--price-in" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--best N" in capsys.readouterr().err
    assert main([*arguments, "--best", "1", "--max-cost", "1", "--price-in", "1", "--price-out", "5"]) == 0
    shown = capsys.readouterr().out
    assert " 3.5  " in shown and "> Put a subject into it." in shown and "$0.0015" in shown
    server.scripts["green"] = ["500"]
    assert main([*arguments, "--worst", "1", "--retries", "0", "--json"]) == 3
    record = json.loads(capsys.readouterr().out)
    assert record["counts"]["errors_by_kind"] == {"server_error": 1} and record["rows"][0]["tokens_in"] is None
    server.scripts["green"] = ["401"]
    assert main([*arguments, "--worst", "1"]) == 2
    complaint = capsys.readouterr().err
    assert KEY_VARIABLE in complaint and KEY not in complaint
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}


def test_without_the_package(
    server: CriticServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = make_tables(tmp_path, colours("red"))
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["critique", dest.root, "--critic-url", server.url, "--critic-model", "m", "--best", "1"]) == 2
    assert "pip install 'picinspector[critic]'" in capsys.readouterr().err
    assert not table_of(dest)
