"""Taste: ratings found in files and tables, and a scorer that learns what the default one does not have."""

from __future__ import annotations

import io
import json
import posixpath
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from picinspector import ratings, schema, xmp
from picinspector.bundle import open_bundle, seal
from picinspector.cli import main
from picinspector.errors import UsageError
from picinspector.metrics import agreement
from picinspector.scorer import Scorer, feature_matrix
from picinspector.stages.score import Score
from picinspector.tables import Destination
from tests.s3_server import S3Server

# --- xmp:Rating -------------------------------------------------------------------------------------------------------


def packet(description: str, prefix: str = "xmp", namespace: str = "http://ns.adobe.com/xap/1.0/") -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:{prefix}="{namespace}" {description}</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


STARS = {
    "attribute": (packet('xmp:Rating="4"/>'), 4),
    "element": (packet("><xmp:Rating>3</xmp:Rating></rdf:Description>"), 3),
    "single quotes and space": (packet("xmp:Rating = '5' />"), 5),
    "rejected": (packet('xmp:Rating="-1"/>'), -1),
    "decimal": (packet('xmp:Rating="2.5"/>'), 2.5),
    "other prefix": (packet('xap:Rating="2"/>', prefix="xap"), 2),
    "taken back": (packet('xmp:Rating="0"/>'), 0),
    "without": (packet('xmp:Label="Red"/>'), None),
    "percent of another namespace": (
        packet('MicrosoftPhoto:Rating="75"/>', "MicrosoftPhoto", "http://ns.microsoft.com/photo/1.0/"),
        None,
    ),
    "out of range": (packet('xmp:Rating="75"/>'), None),
    "commented out": (packet('/><!-- <a xmp:Rating="4"/> -->'), None),
    "no packet": (b'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"', None),
    "an entity": (packet("><xmp:Rating>&five;</xmp:Rating></rdf:Description>"), None),
    "UTF-16": (packet('xmp:Rating="4"/>').decode().encode("utf-16"), 4),
    "nothing": (b"", None),
}


def test_stars_taken_back_beside_the_photo_are_not_those_in_it(tmp_path: Path) -> None:
    photo = tmp_path / "a.jpg"
    photo.write_bytes(packet('xmp:Rating="5"/>'))
    assert xmp.read_ratings([str(photo)]) == ({str(photo): 5}, 0)
    (tmp_path / "a.jpg.xmp").write_bytes(packet('xmp:Rating="0"/>'))
    assert xmp.read_ratings([str(photo)]) == ({}, 0)


@pytest.mark.parametrize("name", STARS)
def test_a_rating_is_read_from_a_packet(name: str) -> None:
    data, expected = STARS[name]
    assert xmp.find_rating(data) == expected


def photo(path: Path, rating: int | None = None) -> str:
    """A photo file, as Pillow writes XMP into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {} if rating is None else {"xmp": packet(f'xmp:Rating="{rating}"/>')}
    if rating is not None and path.suffix == ".png":
        extra = {"pnginfo": PngInfo()}
        extra["pnginfo"].add_itxt("XML:com.adobe.xmp", packet(f'xmp:Rating="{rating}"/>').decode())
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, **extra)
    return str(path)


def test_ratings_come_from_sidecars_before_photos(tmp_path: Path) -> None:
    inside = [photo(tmp_path / f"a/inside.{kind}", stars) for kind, stars in (("jpg", 2), ("webp", 3), ("png", 4))]
    lightroom = photo(tmp_path / "a/lightroom.jpg", 1)
    (tmp_path / "a/lightroom.xmp").write_bytes(packet('xmp:Rating="5"/>'))
    darktable = photo(tmp_path / "b/darktable.JPG", 1)
    (tmp_path / "b/darktable.JPG.XMP").write_bytes(packet('xmp:Rating="-1"/>'))
    unrated_beside = photo(tmp_path / "b/both.jpg", 3)  # a sidecar with nothing to say about it
    (tmp_path / "b/both.xmp").write_bytes(packet('xmp:Label="Red"/>'))
    without, gone = photo(tmp_path / "b/without.jpg"), str(tmp_path / "c/gone.jpg")

    found, unreadable = xmp.read_ratings([*inside, lightroom, darktable, unrated_beside, without, gone])
    assert found == dict(zip(inside, (2, 3, 4), strict=True)) | {lightroom: 5, darktable: -1, unrated_beside: 3}
    assert unreadable == 1


def test_ratings_come_from_object_storage(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    import fsspec

    options = s3_server.storage_options
    filesystem = fsspec.filesystem("s3", **options)
    for name, stars in (("one", 2), ("two", None)):
        filesystem.pipe_file(f"{s3_bucket}/p/{name}.jpg", Path(photo(tmp_path / f"{name}.jpg", stars)).read_bytes())
    filesystem.pipe_file(f"{s3_bucket}/p/two.xmp", packet('xmp:Rating="5"/>'))
    uris = [f"s3://{s3_bucket}/p/{name}.jpg" for name in ("one", "two")]
    assert xmp.read_ratings(uris, options) == (dict(zip(uris, (2, 5), strict=True)), 0)


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_names_find_their_photos() -> None:
    library = ["/photos/a/one.jpg", "/photos/b/one.jpg", "/photos/b/two.jpg", "s3://bucket/three.jpg", "/p/.x.jpg"]
    given = {"/photos/a/one.jpg": 1.0, "b/one.jpg": 2.0, "./two.jpg": 3.0, "three.jpg": 4.0, ".x.jpg": 5.0, "wo.jpg": 0}
    found, missing = ratings.match(given, library)
    assert ratings.match({library[0]: 1.0, posixpath.basename(library[0]): 3.0}, library[:1]) == ({library[0]: 2.0}, [])
    assert found == dict(zip(library, (1, 2, 3, 4, 5), strict=True))
    assert missing == ["wo.jpg"], "not two.jpg"
    with pytest.raises(
        UsageError, match=r"'one.jpg' fits 2 photos, /photos/a/one.jpg and /photos/b/one.jpg: write more"
    ):
        ratings.match({"one.jpg": 1.0}, library)


def test_a_csv_of_ratings(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("\ufeffname,uri,rating\nx,a.jpg,2\ny,b.jpg,4.5\nz,a.jpg,3\n", "utf-8")
    assert ratings.read_csv(str(path)) == {"a.jpg": 2.5, "b.jpg": 4.5}
    for text, complaint in (
        ("uri,stars\na,1\n", "has no column 'rating'; it has ['uri', 'stars']"),
        ("uri,rating\na,1\nb,good\n", "line 3: ('b', 'good') is no uri and number"),
        ("uri,rating\na,nan\n", "line 2: ('a', 'nan')"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(UsageError) as caught:
            ratings.read_csv(str(path))
        assert complaint in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UsageError, match=r"cannot read .*gone\.csv"):
        ratings.read_csv(str(tmp_path / "gone.csv"))


# --- taste ------------------------------------------------------------------------------------------------------------

COUNT = 420
RATED = 140


def photos(count: int, seed: int, fingerprint: str) -> list[dict[str, Any]]:
    """Rows of the embeddings table of photos that never were."""
    rng = np.random.default_rng(seed)
    clip, dinov2 = rng.normal(size=(count, 32)) * np.linspace(2, 0.3, 32), rng.normal(size=(count, 48))
    phash = np.random.default_rng([seed, 1]).integers(0, 2**64, count, dtype=np.uint64)
    return [
        {
            "image_id": f"{seed}{number:031x}",
            "uri": f"/photos/{number:03}.jpg",
            "phash": int(phash[number]),
            "clip_embedding": (clip[number] / np.linalg.norm(clip[number])).astype(np.float16),
            "dinov2_embedding": (dinov2[number] / np.linalg.norm(dinov2[number])).astype(np.float16),
            "encoder_fingerprint": fingerprint,
            **{f"measured_{name}": float(rng.uniform()) for name in schema.MEASUREMENTS},
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def library(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A destination with embeddings in two runs that overlap, and one photo that could not be read."""
    fingerprint = open_bundle(tiny).encoder_fingerprint
    rows = photos(COUNT, 0, fingerprint)
    rows.append(
        {"image_id": "f" * 32, "uri": "/photos/broken.jpg", "encoder_fingerprint": fingerprint}
        | {"error_kind": "corrupt", "error_message": "no photo"}
    )
    dest = Destination(tmp_path_factory.mktemp("taste"))
    for run_id, part in (("20260101T000000.000Z-a", rows[:300]), ("20260102T000000.000Z-b", rows[200:])):
        folder = Path(dest.table_path("embeddings", run_id))
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(part, schema=schema.embeddings(32, 48)), folder / "0.parquet")
        dest.commit({"run_id": run_id, "counts": {}})
    return Path(dest.root)


def stored(library: Path) -> pa.Table:
    """All good embeddings by uri, each once."""
    files = [pq.read_table(path, partitioning=None) for path in sorted(library.glob("embeddings/*/*.parquet"))]
    table = pa.concat_tables([files[0].slice(0, 200), files[1]])
    return table.filter(pa.compute.is_null(table.column("error_kind"))).sort_by("uri")


def taste(table: pa.Table) -> np.ndarray:
    """Likes dark photos, and a direction of the embedding: nothing that the tiny bundle's scorer was trained for."""
    embedding = np.array(table.column("clip_embedding").to_pylist(), dtype=np.float64)
    dark = 1 - np.array(table.column("measured_brightness").to_pylist())
    return 2 * dark + 3 * embedding[:, 1] - 2 * embedding[:, 3]


def stars_of(table: pa.Table) -> np.ndarray:
    """1 to 5 stars, a fifth of the photos each, with a person's inconsistency."""
    liking = taste(table) + np.random.default_rng(1).normal(size=table.num_rows) * 0.3
    return 1.0 + np.digitize(liking, np.quantile(liking, [0.2, 0.4, 0.6, 0.8]))


def held_out_srcc(bundle: Path, table: pa.Table) -> float:
    """Agreement with the taste itself on photos without stars, as a rescore would find it."""
    scored = Score(str(bundle))(table)
    quality = scored.column("quality_score").to_numpy()[RATED:]
    assert (scored.column("quality_low").to_numpy()[RATED:] <= quality).all()
    assert (quality <= scored.column("quality_high").to_numpy()[RATED:]).all()
    return agreement(quality, taste(table)[RATED:])["srcc"]


@pytest.fixture(scope="module")
def csv_of_stars(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stars of the first photos by file name, of one that is gone, and of one that is broken."""
    table = stored(library)
    path = tmp_path_factory.mktemp("stars") / "ratings.csv"
    names = [Path(uri).name for uri in table.column("uri").to_pylist()[:RATED]]
    lines = [f"{name},{stars:g}" for name, stars in zip(names, stars_of(table), strict=False)]
    path.write_text("\n".join(["uri,rating", *lines, "gone.jpg,3", "broken.jpg,1"]) + "\n", "utf-8")
    return path


def test_a_scorer_learns_a_taste_that_the_default_has_not(
    tiny: Path, library: Path, csv_of_stars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "mine", stored(library)
    command = ["train", "scorer", "--ratings", str(csv_of_stars), "--tables", str(library), "--out", str(out)]
    assert main([*command, "--bundle", str(tiny), "--range", "1", "5", "--name", "mine"]) == 0
    said = capsys.readouterr().out
    assert f"{RATED} rated photos of {library}" in said
    assert "2 ratings of photos that are not in these tables, left out: gone.jpg, broken.jpg" in said
    assert said.splitlines()[-1] == f"picinspector rescore {library} --bundle {out}"

    made, base = open_bundle(out), open_bundle(tiny)
    made.verify()
    assert (made.name, made.version) == ("mine", f"0.0.1+{RATED}-ratings")
    assert made.encoder_fingerprint == base.encoder_fingerprint and made.scorer_fingerprint != base.scorer_fingerprint
    changed = {path for path in made.files if made.files[path] != base.files.get(path)}
    assert changed == {"README.md", "scorer/model.txt", "scorer/scorer.json"}
    assert f"Trained on {RATED} ratings" in (out / "README.md").read_text("utf-8")

    before, after = held_out_srcc(tiny, table), held_out_srcc(out, table)
    assert abs(before) < 0.4
    assert after > 0.75 and after > before + 0.4
    # What it says of itself is what photos say that are not even in the tables, within the noise of 140 stars.
    claimed = float(said.split("SRCC")[1].split("\n")[1].split()[0])
    new = pa.Table.from_pylist(photos(600, 1, base.encoder_fingerprint), schema=schema.embeddings(32, 48))
    found = agreement(Scorer(out / "scorer").predict(columns_of(out, new)).quality_score, stars_of(new))["srcc"]
    assert claimed == pytest.approx(found, abs=0.15)


def columns_of(bundle: Path, table: pa.Table) -> dict[str, np.ndarray]:
    return {name: np.array(table.column(name).to_pylist()) for name in Scorer(bundle / "scorer").features}


def test_the_same_ratings_give_the_same_scorer_and_intervals_hold(
    tiny: Path, library: Path, csv_of_stars: Path, tmp_path: Path
) -> None:
    reports = [ratings.train(str(library), tmp_path / name, str(csv_of_stars), str(tiny)) for name in ("a", "b")]
    assert open_bundle(tmp_path / "a").files == open_bundle(tmp_path / "b").files
    assert reports[0]["srcc"] == max(reports[0]["srcc_of"].values()) > reports[0]["default_srcc"]
    low, high = reports[0]["srcc_low_high"]
    assert low < reports[0]["srcc"] < high
    table = pa.Table.from_pylist(photos(600, 1, "f"), schema=schema.embeddings(32, 48))
    scored = Scorer(tmp_path / "a/scorer").predict(columns_of(tmp_path / "a", table))
    stars = 1 + 9 * (stars_of(table) - 1) / 4
    inside = (scored.quality_low <= stars) & (stars <= scored.quality_high)
    assert 0.82 <= inside.mean() <= 0.97
    assert (scored.quality_high - scored.quality_low).mean() < 8
    assert feature_matrix(columns_of(tmp_path / "a", table), Scorer(tmp_path / "a/scorer").features).shape[1] == 39


BURSTS, TAKES = 50, 5


def write_bursts(dest: Destination, stars: Path, fingerprint: str, alike: bool) -> None:
    """Tables of 50 bursts of five takes and of 100 other photos, and stars that the takes of a burst share.

    Embeddings and measurements of takes differ little; their hashes by two bits at most where `alike`, else as those of
    different photos do.
    """
    rng = np.random.default_rng(0)
    rows = photos(BURSTS + 100, 2, fingerprint)
    rating = stars_of_little_taste(rows[:BURSTS])
    takes, lines = [], []
    for number, row in enumerate(rows):
        for take in range(TAKES if number < BURSTS else 1):
            vector = row["clip_embedding"] + rng.normal(size=32) * 0.01
            copy = row | {"uri": f"/photos/{number:03}-{take}.jpg", "image_id": f"{number:016x}{take:016x}"}
            copy["clip_embedding"] = (vector / np.linalg.norm(vector)).astype(np.float16)
            copy |= {f"measured_{name}": row[f"measured_{name}"] + rng.normal() * 0.01 for name in schema.MEASUREMENTS}
            copy["phash"] = row["phash"] ^ (1 << take) if alike else int(rng.integers(0, 2**64, dtype=np.uint64))
            takes.append(copy)
            if number < BURSTS:
                lines.append(f"{number:03}-{take}.jpg,{rating[number]:g}")
    folder = Path(dest.table_path("embeddings", "r"))
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(takes, schema=schema.embeddings(32, 48)), folder / "0.parquet")
    dest.commit({"run_id": "r", "counts": {}})
    stars.write_text("\n".join(["uri,rating", *lines]) + "\n", "utf-8")


def stars_of_little_taste(rows: list[dict[str, Any]]) -> np.ndarray:
    """1 to 5 stars that are more whim than taste: nobody can guess those of a photo never seen well."""
    liking = taste(pa.Table.from_pylist(rows, schema=schema.embeddings(32, 48)))
    liking = liking + np.random.default_rng(3).normal(size=len(rows)) * 2 * liking.std()
    return 1.0 + np.digitize(liking, np.quantile(liking, [0.2, 0.4, 0.6, 0.8]))


def test_takes_of_a_burst_do_not_vouch_for_each_other(tiny: Path, tmp_path: Path) -> None:
    """By photo, cross-validation asks for stars that the model has seen on another take; by content it does not."""
    fingerprint, reports = open_bundle(tiny).encoder_fingerprint, {}
    for name, alike in (("by content", True), ("by photo", False)):
        dest, stars = Destination(tmp_path / name), tmp_path / f"{name}.csv"
        write_bursts(dest, stars, fingerprint, alike)
        reports[name] = ratings.train(dest.root, tmp_path / f"{name} bundle", str(stars), str(tiny))
    assert {name: report["different_photos"] for name, report in reports.items()} == {
        "by content": BURSTS,
        "by photo": BURSTS * TAKES,
    }
    new = photos(1000, 3, fingerprint)
    truth = stars_of_little_taste(new)
    columns = columns_of(tmp_path / "by content bundle", pa.Table.from_pylist(new, schema=schema.embeddings(32, 48)))
    found = {
        name: agreement(Scorer(tmp_path / f"{name} bundle/scorer").predict(columns).quality_score, truth)["srcc"]
        for name in reports
    }
    assert reports["by photo"]["srcc"] > 0.9 > found["by photo"] + 0.5
    assert reports["by content"]["srcc"] == pytest.approx(found["by content"], abs=0.2)
    low, high = reports["by content"]["srcc_low_high"]
    assert low < found["by content"] < high and high - low > 0.3, "50 bursts say little, however many takes"


def test_ratings_that_cannot_be_learnt_from_are_refused(
    tiny: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "r.csv", tmp_path / "mine"

    def complaint(rows: list[str], *more: str) -> str:
        path.write_text("\n".join(["uri,rating", *rows]) + "\n", "utf-8")
        command = ["train", "scorer", "--ratings", str(path), "--tables", str(library), "--out", str(out)]
        assert main([*command, "--bundle", str(tiny), *more]) == 2
        assert not out.exists() and not list(tmp_path.glob(".mine*"))
        return capsys.readouterr().err

    few = [f"{number:03}.jpg,{number % 5}" for number in range(29)]
    assert "29 rated photos are in" in complaint([*few, "gone.jpg,1"]) and "(1 more are not in" in complaint(
        [*few, "gone.jpg,1"]
    )
    assert "all 40 ratings are 3" in complaint([f"{number:03}.jpg,3" for number in range(40)])
    many = [f"{number:03}.jpg,{number % 5}" for number in range(40)]
    bursts, stars = Destination(tmp_path / "bursts"), tmp_path / "stars.csv"
    write_bursts(bursts, stars, open_bundle(tiny).encoder_fingerprint, alike=True)
    takes = stars.read_text("utf-8").splitlines()[1 : 1 + 29 * TAKES]
    assert "145 rated photos are in" in (said := complaint(takes, "--tables", bursts.root))
    assert "near-duplicates counted once 29; rate 30 different ones" in said
    assert "ratings from 0 to 4, outside of the range 1 to 5" in complaint(many, "--range", "1", "5")
    assert "give either --ratings CSV or --xmp" in complaint(many, "--xmp")
    assert "were embedded by other encoders" in complaint(many, "--bundle", "builtin")
    personal = tmp_path / "personal"
    shutil.copytree(tiny, personal)
    seal(personal, "personal", "1+40-ratings")
    assert "was trained on ratings" in complaint(many, "--bundle", str(personal))
    out.mkdir()
    path.write_text("uri,rating\n", "utf-8")
    assert main(["train", "scorer", "--ratings", str(path), "--tables", str(library), "--out", str(out)]) == 2
    assert "exists; give a new folder" in capsys.readouterr().err


def test_stars_in_the_photos_train_a_scorer(
    tiny: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tables, moved to where photos with stars lie; a rejected photo is worse than one star."""
    table, dest = stored(library), Destination(tmp_path / "tables")
    stars = stars_of(table)
    moved = []
    for number, (row, rating) in enumerate(zip(table.to_pylist(), stars, strict=True)):
        where = tmp_path / f"photos/{number:03}.jpg"
        if number < 60:
            data = io.BytesIO()
            Image.new("RGB", (8, 8)).save(data, "JPEG", xmp=packet(f'xmp:Rating="{int(rating)}"/>'))
            where.parent.mkdir(exist_ok=True)
            where.write_bytes(data.getvalue())
        moved.append(row | {"uri": str(where)})
    (tmp_path / "photos/000.xmp").write_bytes(packet('xmp:Rating="-1"/>'))
    folder = Path(dest.table_path("embeddings", "r"))
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(moved[:70], schema=schema.embeddings(32, 48)), folder / "0.parquet")
    dest.commit({"run_id": "r", "counts": {}})
    command = [
        "train",
        "scorer",
        "--xmp",
        "--tables",
        dest.root,
        "--out",
        str(tmp_path / "mine"),
        "--bundle",
        str(tiny),
    ]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rated"], report["unreadable"], report["rating_range"]) == (60, 10, [0, 5])
    assert report["bundle"] == str(tmp_path / "mine")
