"""Search by a photo and by words, with a whole (tiny) bundle: the nearest are those of the embeddings themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from picinspector import schema
from picinspector.bundle import Bundle, open_bundle
from picinspector.cli import main
from picinspector.clip import encode_texts
from picinspector.errors import UsageError
from picinspector.search import has_text_tower, nearest, text_embedding
from picinspector.stages.single import embed_bytes
from picinspector.tables import Destination
from tests.bundles import tiny_bundle
from tests.test_groups import RUN

SIGHTS = ("sky", "grass", "noise")


def picture(sight: str, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (96, 128, 3), np.uint8)
    if sight != "noise":
        pixels = pixels // 16 + np.array({"sky": [60, 120, 230], "grass": [40, 160, 30]}[sight], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Destination:
    """Three sights, each twice."""
    dest = Destination(tmp_path_factory.mktemp("search") / "tables")
    identity, embedded, scored = [], [], []
    for sight in SIGHTS:
        for seed in (0, 1):
            row = {"image_id": f"{sight}{seed}", "uri": f"/lib/{sight}{seed}.png"}
            vectors = embed_bytes(picture(sight, seed), row["uri"], bundle)
            identity.append(row)
            fingerprint = {"encoder_fingerprint": bundle.encoder_fingerprint}
            embedded.append(row | {name: list(vector) for name, vector in vectors.items()} | fingerprint)
            judged = {"quality_score": 5.0, "scene": "night", "scorer_kind": "lightgbm", "scorer_fingerprint": "s"}
            scored.append(row | judged)
    for table, rows, columns in (
        ("embeddings", embedded, schema.embeddings(32, 48)),
        ("scores", scored, schema.SCORES),
    ):
        dest.write_parquet(f"{dest.root}/{table}/run_id={RUN}/0.parquet", pa.Table.from_pylist(rows, schema=columns))
    dest.commit({"run_id": RUN, "kind": "score", "counts": {"to_do": len(identity)}})
    return dest


def test_a_photo_finds_itself_and_then_those_like_it(
    dest: Destination, bundle: Bundle, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "query.png").write_bytes(picture("grass", 1))
    command = ["search", dest.url, "--like", str(tmp_path / "query.png"), "--bundle", str(bundle.folder)]
    assert main([*command, "-n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["rank"], row["uri"]) for row in found] == [(1, "/lib/grass1.png"), (2, "/lib/grass0.png")]
    assert found[0]["similarity"] == pytest.approx(1, abs=2e-3)
    assert main([*command, "--where", "uri NOT LIKE '%grass%'"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def test_words_are_held_against_the_clip_embeddings(dest: Destination, bundle: Bundle) -> None:
    query = text_embedding(bundle, "a blue sky")
    assert np.allclose(query, encode_texts(bundle.folder / "clip", ["a blue sky"])[0])
    found = nearest(dest, bundle, query, "clip_embedding", 6)
    expected = {
        f"/lib/{sight}{seed}.png": float(
            embed_bytes(picture(sight, seed), "x.png", bundle)["clip_embedding"].astype(np.float32) @ query
        )
        for sight in SIGHTS
        for seed in (0, 1)
    }
    similarity = dict(zip(found.column("uri").to_pylist(), found.column("similarity").to_pylist(), strict=True))
    assert similarity == pytest.approx(expected, abs=2e-3)
    assert found.column("similarity").to_pylist() == sorted(similarity.values(), reverse=True)


def test_the_builtin_bundle_has_no_words() -> None:
    assert not has_text_tower(open_bundle("builtin"))
    with pytest.raises(UsageError, match=r"bundle builtin .* has no text tower.*--bundle full, or search with --like"):
        text_embedding(open_bundle("builtin"), "neon")


def test_a_query_of_another_bundle_is_refused(dest: Destination, capsys: Any, tmp_path: Path) -> None:
    other = tiny_bundle(tmp_path / "other")
    (other.folder / "clip" / "note.txt").write_text("another encoder")
    from picinspector.bundle import seal

    sealed = seal(other.folder, "other", "1")
    with pytest.raises(UsageError, match="none of its photos was embedded with bundle other 1"):
        nearest(dest, sealed, np.zeros(32), "clip_embedding")


def test_what_is_no_photo_is_told_in_one_line(dest: Destination, bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "letter.jpg").write_text("Dear diary")
    for like, reason in (("letter.jpg", "unknown_format"), ("nowhere.jpg", "not_found")):
        assert main(["search", dest.url, "--like", str(tmp_path / like), "--bundle", str(bundle.folder)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert reason in line
