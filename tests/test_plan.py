"""What there is to do, night after night: new, changed, stale, retried, unmodified, gone, back again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picinspector import schema
from picinspector.bundle import Bundle
from picinspector.errors import UsageError
from picinspector.manifest import image_id
from picinspector.plan import Plan, Retry, _inside, libraries_of, stale
from picinspector.tables import Destination, new_run_id

Library = dict[str, str]  # uri -> etag


class FakeBundle(Bundle):
    """A bundle of two fingerprints and nothing else."""

    def __init__(self, encoder: str = "e1", scorer: str = "s1") -> None:
        super().__init__(Path(), "fake", "1", {})
        object.__setattr__(self, "fingerprints", (encoder, scorer))

    @property
    def encoder_fingerprint(self) -> str:
        return self.fingerprints[0]  # type: ignore[attr-defined]

    @property
    def scorer_fingerprint(self) -> str:
        return self.fingerprints[1]  # type: ignore[attr-defined]


def manifest_of(library: Library) -> pa.Table:
    rows = [
        {"image_id": image_id(uri, etag), "uri": uri, "etag": etag, "size_bytes": 10} for uri, etag in library.items()
    ]
    return pa.Table.from_pylist(rows, schema=schema.MANIFEST)


class Nights:
    """A destination, and what a run of each kind writes into it, without encoders and without Ray."""

    def __init__(self, folder: Path) -> None:
        self.dest = Destination(folder)

    def plan(self, library: Library, bundle: Bundle, inside: str = "true", **options: Any) -> tuple[Plan, pa.Table]:
        plan = Plan(iter([manifest_of(library)]), self.dest, bundle, inside, **options)
        return plan, pa.concat_tables([schema.MANIFEST.empty_table(), *plan.shards()])

    def score(
        self,
        library: Library,
        errors: dict[str, str] | None = None,
        bundle: Bundle | None = None,
        name: str = "l",
        **options: Any,
    ) -> tuple[dict[str, int], set[str]]:
        """A committed run; its counts and the photos it did."""
        bundle = bundle or FakeBundle()
        plan, work = self.plan(library, bundle, **options)
        run_id = self.dest.new_run_id()
        if work.num_rows:
            kinds = pa.array([(errors or {}).get(uri) for uri in work.column("uri").to_pylist()], pa.string())
            for table, fingerprint in (
                ("embeddings", bundle.encoder_fingerprint),
                ("scores", bundle.scorer_fingerprint),
            ):
                column = "encoder_fingerprint" if table == "embeddings" else "scorer_fingerprint"
                rows = work.append_column(column, pa.array([fingerprint] * work.num_rows)).append_column(
                    "error_kind", kinds
                )
                self.dest.write_parquet(f"{self.dest.table_path(table, run_id)}/0.parquet", rows)  # type: ignore[arg-type]
        if plan.marks:
            self.dest.write_parquet(f"{self.dest.table_path('gone', run_id)}/0.parquet", pa.concat_tables(plan.marks))
        self.commit(run_id, bundle, name)
        return plan.counts, set(work.column("uri").to_pylist())

    def commit(self, run_id: str, bundle: Bundle, library: str = "l") -> None:
        fingerprints, libraries = {"scorer_fingerprint": bundle.scorer_fingerprint}, {*libraries_of(self.dest), library}
        record = {"run_id": run_id, "kind": "score", "library": library, "libraries": sorted(libraries)}
        self.dest.commit(record | {"bundle": fingerprints})

    def latest(self) -> Library:
        rows = self.dest.latest("scores", ["uri", "etag"]).to_pylist()
        return {row["uri"]: row["etag"] for row in rows}


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path / "dest")


def some(counts: dict[str, int]) -> dict[str, int]:
    """The counts that say anything, without bytes."""
    return {name: count for name, count in counts.items() if count and not name.endswith("bytes")}


def test_new_changed_unmodified_gone_and_back(nights: Nights) -> None:
    counts, done = nights.score({"/a": "1", "/b": "1", "/c": "1"})
    assert some(counts) == {"listed": 3, "to_do": 3, "new": 3}
    assert (counts["listed_bytes"], counts["to_do_bytes"]) == (30, 30)

    counts, done = nights.score({"/a": "1", "/b": "2", "/d": "1"})
    assert some(counts) == {"listed": 3, "to_do": 2, "new": 1, "changed": 1, "unmodified": 1, "gone": 1}
    assert done == {"/b", "/d"}
    assert nights.latest() == {"/a": "1", "/b": "2", "/d": "1"}

    counts, done = nights.score({"/a": "1", "/b": "2", "/d": "1"})  # gone is said once
    assert some(counts) == {"listed": 3, "unmodified": 3}

    counts, done = nights.score({"/a": "1", "/b": "2", "/c": "1", "/d": "1"})  # its rows were kept
    assert (some(counts), done) == ({"listed": 4, "unmodified": 4, "returned": 1}, set())
    assert nights.latest() == {"/a": "1", "/b": "2", "/c": "1", "/d": "1"}

    assert some(nights.score({"/a": "1"})[0])["gone"] == 3
    counts, done = nights.score({"/a": "1", "/c": "2"})  # back as another image
    assert (some(counts), done) == ({"listed": 2, "to_do": 1, "changed": 1, "unmodified": 1}, {"/c"})
    assert nights.latest() == {"/a": "1", "/c": "2"}


def test_as_of_an_earlier_run(nights: Nights) -> None:
    nights.score({"/a": "1", "/b": "1"})
    nights.score({"/a": "2"})
    [first, second] = [record["run_id"] for record in nights.dest.runs()]
    uris = [
        sorted(nights.dest.latest("scores", ["uri"], as_of=run).column("uri").to_pylist()) for run in (first, second)
    ]
    assert uris == [["/a", "/b"], ["/a"]]


@pytest.mark.parametrize(
    ("retry", "expected"),
    [("transient", {"/t"}), ("all", {"/t", "/c"}), ("none", set())],
    ids=["transient", "all", "none"],
)
def test_which_failed_photos_are_done_again(nights: Nights, retry: Retry, expected: set[str]) -> None:
    library = {"/t": "1", "/c": "1", "/good": "1"}
    nights.score(library, errors={"/t": "timeout", "/c": "corrupt"})
    counts, done = nights.score(library, retry=retry)
    assert done == expected
    assert (counts["retried"], counts["unmodified"]) == (len(expected), 3 - len(expected))


def test_other_encoders_make_all_stale(nights: Nights) -> None:
    nights.score({"/a": "1", "/b": "1"}, errors={"/b": "corrupt"})
    other = FakeBundle("e2", "s2")
    counts, done = nights.score({"/a": "1", "/b": "1", "/c": "1"}, bundle=other, limit=2)
    assert (counts["to_do"], counts["left_for_later"], len(done)) == (2, 1, 2)
    counts, rest = nights.score({"/a": "1", "/b": "1", "/c": "1"}, bundle=other)
    assert done | rest == {"/a", "/b", "/c"} and not done & rest


def test_another_scorer_has_to_rescore_first(nights: Nights) -> None:
    nights.score({"/a": "1", "/b": "1"})
    with pytest.raises(UsageError, match="2 photos were scored by another scorer"):
        nights.plan({"/a": "1", "/b": "1"}, FakeBundle(scorer="s2"))
    with pytest.raises(UsageError, match="2 photos were scored by another scorer"):
        nights.plan({"/new": "1"}, FakeBundle(scorer="s2"), inside="false")  # of another library in the same ranking


def test_one_who_comes_back_after_a_new_scorer_is_done_again(nights: Nights) -> None:
    nights.score({"/a": "1", "/b": "1"})
    nights.score({"/a": "1"})
    other, run_id = FakeBundle(scorer="s2"), nights.dest.new_run_id()
    counts: dict[str, int] = {}
    work = pa.concat_tables(stale(nights.dest, other, counts))
    assert (counts, work.column("uri").to_pylist()) == (
        {"listed": 1, "other_encoders": 0},
        ["/a"],
    )  # of what is gone nothing is scored
    assert work.column("source_run_id").to_pylist() == [nights.dest.runs()[0]["run_id"]]
    rows = work.drop_columns(["source_run_id"]).append_column("scorer_fingerprint", pa.array(["s2"]))
    nights.dest.write_parquet(f"{nights.dest.table_path('scores', run_id)}/0.parquet", rows)
    nights.commit(run_id, other)
    assert list(stale(nights.dest, other, counts)) == []
    counts, done = nights.score({"/a": "1", "/b": "1"}, bundle=other)
    assert (some(counts), done) == ({"listed": 2, "to_do": 1, "stale": 1, "unmodified": 1}, {"/b"})


def test_what_is_elsewhere_is_not_gone(nights: Nights, tmp_path: Path) -> None:
    """Two libraries in one destination: a run over one says nothing of the other."""
    folder = tmp_path / "it's"
    for name in ("x", "x2"):
        (folder / name).mkdir(parents=True)
    first, second = {str(folder / "x" / "1.jpg"): "1"}, {str(folder / "x2" / "1.jpg"): "1"}
    inside = [_inside(str(folder / name), nights.dest, None) for name in ("x", "x2", "")]
    nights.score(first, inside=inside[0])
    assert "gone" not in some(nights.score(second, inside=inside[1])[0])
    assert some(nights.score(second, inside=inside[2])[0])["gone"] == 1
    assert nights.latest() == second


def test_of_a_list_all_that_is_not_listed_is_gone_unless_others_were_scored_too(nights: Nights, tmp_path: Path) -> None:
    photos = tmp_path / "l.csv"
    photos.write_text("uri\n")
    nights.score({"/a": "1"}, name=str(photos))
    with contextlib.chdir(tmp_path):
        assert _inside("l.csv", nights.dest, None) == _inside(photos.as_uri(), nights.dest, None) == "true"
    nights.score({"/a": "1"}, name="/another.csv")
    nights.score({"/a": "1"}, name=str(photos))
    for run in nights.dest.runs()[:2]:  # a library outlives its first runs
        nights.dest.delete(nights.dest.run_path(run["run_id"]))
    assert _inside(str(photos), nights.dest, None) == "false"


def test_names_that_are_not_utf8_are_inside_their_folder(nights: Nights, tmp_path: Path) -> None:
    uri = (tmp_path / "library" / "a.jpg").as_uri().replace("a.jpg", "%FF.jpg")
    inside = _inside(str(tmp_path / "library"), nights.dest, None)
    nights.score({uri: "1", str(tmp_path / "library" / "b.jpg"): "1"}, inside=inside)
    assert some(nights.score({uri: "1"}, inside=inside)[0])["gone"] == 1
    assert some(nights.score({str(tmp_path / "library" / "b.jpg"): "1"}, inside=inside)[0])["gone"] == 1


def test_run_ids_sort_after_all_others_whatever_the_clock_says(nights: Nights) -> None:
    """A machine whose clock is behind must not write rows that are older than those they replace."""
    nights.commit("20991231T235959.999Z-abcdef", FakeBundle())
    fresh = nights.dest.new_run_id()
    assert fresh > "20991231T235959.999Z-ffffff" and fresh.startswith("21000101T000000.000Z-")
    assert new_run_id("not a run id") < fresh


def test_a_run_that_was_planned_last_is_the_one_to_resume(nights: Nights) -> None:
    def begin(plan: bool) -> str:
        run_id = nights.dest.new_run_id()
        nights.dest.write_manifest(run_id, [manifest_of({"/a": "1"})])
        if plan:
            nights.dest.plan({"run_id": run_id})
        return run_id

    assert nights.dest.cut_short() is None
    planned = begin(plan=True)
    begin(plan=False)  # was killed while it listed: nothing is known of it
    assert nights.dest.cut_short() == {"run_id": planned}
    nights.score({"/a": "1"})  # what it had planned may be out of date now
    assert nights.dest.cut_short() is None
    assert planned in nights.dest.uncommitted()


@settings(max_examples=40, deadline=None)
@given(
    nights_=st.lists(
        st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from("12"), min_size=1), min_size=1, max_size=5
    ),
    failing=st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from(["timeout", "corrupt"])),
)
def test_the_latest_view_is_the_library(
    nights_: list[Library], failing: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever came, changed, failed and left: after each night the latest view is the library, row for row."""
    nights, seen = Nights(tmp_path_factory.mktemp("nights")), set[tuple[str, str]]()
    for library in nights_:
        counts, done = nights.score(library, errors=failing)
        assert nights.latest() == library
        assert counts["new"] + counts["changed"] + counts["retried"] + counts["unmodified"] == counts["listed"]
        assert {uri for uri in library if (uri, library[uri]) not in seen} <= done
        seen |= set(library.items())
        again, nothing = nights.score(library, errors=failing)
        assert nothing == {uri for uri in library if failing.get(uri) == "timeout"}
        assert again["gone"] == again["returned"] == 0


def test_an_empty_library_is_a_mistake(nights: Nights) -> None:
    """A prefix that is misspelt must not have all its photos marked as gone."""
    nights.score({"/a": "1"})
    with pytest.raises(UsageError, match="no photos there"):
        nights.score({})
    assert nights.latest() == {"/a": "1"}


def test_a_listing_that_breaks_off_marks_nothing(nights: Nights) -> None:
    nights.score({"/a": "1", "/b": "1"})

    def listing() -> Iterable[pa.Table]:
        yield manifest_of({"/a": "1"})
        raise OSError("the store went away")

    plan = Plan(iter(listing()), nights.dest, FakeBundle(), "true")
    with pytest.raises(OSError, match="the store went away"):
        list(plan.shards())


def test_neither_waits_for_the_other(nights: Nights) -> None:
    """Part of a library done with new encoders, then a new scorer: rescoring does its own and leaves the rest."""
    nights.score({"/a": "1", "/b": "1"})
    nights.score({"/a": "1", "/b": "1"}, bundle=FakeBundle("e2", "s2"), limit=1)
    counts: dict[str, int] = {}
    rows = pa.concat_tables(stale(nights.dest, FakeBundle("e2", "s3"), counts))
    assert (counts, rows.num_rows) == ({"listed": 2, "other_encoders": 1}, 1)
    with pytest.raises(UsageError, match="2 of 2 photos were embedded by other encoders"):
        list(stale(nights.dest, FakeBundle("e3", "s3"), counts))
