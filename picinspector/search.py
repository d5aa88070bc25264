"""Photos like words or like a photo: the nearest by the cosine of their embeddings, all of which are looked at."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from picinspector.bundle import Bundle
from picinspector.errors import UsageError
from picinspector.rank import Ranking, rank
from picinspector.tables import Destination, database
from picinspector.vectors import stream

#: Of CLIP's byte pair encoding (Radford et al. 2021), which open_clip brings.
_CLIP_TOKENS = 49_408


def text_embedding(bundle: Bundle, text: str) -> np.ndarray:
    """Words as CLIP sees them, float32 (D,).

    Raises:
        UsageError: the bundle's CLIP has no text tower.
    """
    if not has_text_tower(bundle):
        raise UsageError(
            f"bundle {bundle.name} {bundle.version} has no text tower, so it cannot search by words: score the library "
            "with --bundle full, or search with --like PHOTO"
        )
    from picinspector.clip import encode_texts

    return np.asarray(encode_texts(bundle.piece("clip"), [text])[0])


def nearest(dest: Destination, bundle: Bundle, query: np.ndarray, column: str, count: int = 20,
            where: str | None = None) -> pa.Table:  # fmt: skip
    """The photos whose embeddings have the highest cosine with a query.

    Args:
        dest: where they were scored.
        bundle: the one they were embedded with, and the query.
        query: float (D,), L2-normalised.
        column: of the embeddings table: `clip_embedding` or `dinov2_embedding`.
        count: photos at most.
        where: only of those for which this SQL condition holds, see `rank.Ranking`.

    Returns:
        the columns of `rank.rank`, with `similarity`, most alike first; `rank` is the place here.

    Raises:
        UsageError: no photo here was embedded with this bundle.
    """
    ranked = rank(dest, Ranking(None, where=where))
    with database(ranked=ranked) as connection:
        dest.load_latest(connection, "seen", "embeddings", ["image_id", "run_id", "encoder_fingerprint"])
        photos = connection.sql(
            "SELECT ranked.*, seen.run_id AS embeddings_run_id FROM ranked JOIN seen USING (image_id) "
            f"WHERE encoder_fingerprint = '{bundle.encoder_fingerprint}' ORDER BY uri"
        ).to_arrow_table()
    if ranked.num_rows and not photos.num_rows:
        raise UsageError(
            f"{dest.url}: none of its photos was embedded with bundle {bundle.name} {bundle.version}; name the one "
            "they were scored with (--bundle)"
        )
    similarity = np.full(photos.num_rows, -np.inf, np.float32)
    for position, vectors in stream(dest, photos, column):
        similarity[position] = vectors.astype(np.float32) @ query.astype(np.float32)
    order = np.argsort(-similarity, kind="stable")[:count]
    order = order[np.isfinite(similarity[order])]
    found = photos.take(pa.array(order)).drop_columns(["embeddings_run_id"])
    found = found.set_column(found.column_names.index("rank"), "rank", pa.array(np.arange(1, len(order) + 1)))
    return found.append_column("similarity", pa.array(similarity[order]))


def has_text_tower(bundle: Bundle) -> bool:
    """True if the bundle's CLIP takes words; the builtin bundle's has eight tokens, because open_clip wants some."""
    config = json.loads((bundle.piece("clip") / "open_clip_config.json").read_text("utf-8"))
    text = config["model_cfg"].get("text_cfg", {})
    return "hf_tokenizer_name" in text or int(text.get("vocab_size", _CLIP_TOKENS)) >= _CLIP_TOKENS
