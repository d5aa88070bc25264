"""The stages on one photo, in this process: the same values as in a run, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from picinspector import schema
from picinspector.bundle import Bundle, open_bundle
from picinspector.errors import PhotoError, UsageError
from picinspector.feedback import suggest
from picinspector.photo import Limits, decode
from picinspector.stages.read import caption_crop, crops_of, read_photo, to_table
from picinspector.storage import fetch, is_local, local_path, redact, to_uri
from picinspector.web import fetch_url, is_web_url
from picinspector.wording import Facts, compose

_PLAIN = ("quality_score", "quality_low", "quality_high", "predicted_mos", "scorer_kind", "scene")


def judge(
    uri: str,
    bundle: str = "builtin",
    storage_options: Mapping[str, Any] | None = None,
    allow_private: bool = False,
) -> dict[str, Any]:
    """Everything a run would find out about one photo: `judge_bytes` of what `fetch_photo` gives."""
    return judge_bytes(fetch_photo(uri, storage_options, allow_private), uri, bundle)


def fetch_photo(
    uri: str, storage_options: Mapping[str, Any] | None = None, allow_private: bool = False
) -> bytes | PhotoError:
    """The bytes of one photo, or what was wrong with fetching them.

    Args:
        uri: a path, an http(s) URL (fetched behind the guard of `picinspector.web`) or any other fsspec URL.
        storage_options: fsspec options; http(s) goes without.
        allow_private: fetch http(s) URLs from addresses that are not public too.

    Raises:
        UsageError: an http(s) URL that may not be fetched.
    """
    if is_web_url(uri):
        try:
            return fetch_url(uri, allow_private=allow_private)
        except PhotoError as error:
            return error
    if not is_local(uri) and any(is_web_url(part) for part in uri.split("::")[1:]):
        raise UsageError(f"{redact(uri)}: fsspec would fetch this URL unguarded; give the http(s) URL alone")
    return fetch([uri], storage_options, Limits().max_bytes)[0]


def judge_bytes(data: bytes | PhotoError, uri: str, bundle: str = "builtin") -> dict[str, Any]:
    """Everything a run would find out about the photo in these bytes.

    Args:
        data: the whole file; or why it is not there, which comes back as the row's error.
        uri: what to call it; its extension tells camera raw from TIFF.
        bundle: name or folder.

    Returns:
        `uri` (without secrets); `caption` and `caption_source`, one of `schema.CAPTION_SOURCES`; `quality_score`,
        `quality_low`, `quality_high`, `predicted_mos`, `scorer_kind`; `attributes`, 0-100 by name; `scene`,
        `scene_probability` and `scenes`, all probabilities by name; `suggestions`, each a `feedback.Suggestion` as a
        dictionary with its `text`; `facts`, `measurements`; `error_kind`, `error_message`. None where there is none.

    Raises:
        BundleError: the bundle cannot be used.
    """
    opened, shown = open_bundle(bundle), _shown(uri)
    crops = crops_of(opened, opened.has("captioner"))
    manifest = pa.Table.from_pylist([{"image_id": "", "uri": shown}], schema=schema.MANIFEST)
    photo = to_table(manifest, [read_photo(data, crops, Limits(), _suffix(uri))], tuple(crops))
    [seen] = photo.drop_columns(list(crops)).to_pylist()
    row: dict[str, Any] = {"uri": shown, **dict.fromkeys((*schema.CAPTION.names, *_PLAIN, "scene_probability"))}
    row |= {"attributes": dict.fromkeys(schema.ATTRIBUTES), "scenes": dict.fromkeys(schema.SCENES), "suggestions": []}
    row["facts"] = {name: seen[name] for name in schema.FACTS.names}
    row["measurements"] = {name: seen[f"measured_{name}"] for name in schema.MEASUREMENTS}
    row |= {name: seen[name] for name in ("error_kind", "error_message")}
    if row["error_kind"] is None:  # else there is nothing to load models for
        scored = _score(opened, photo)
        row |= {name: scored[name] for name in (*_PLAIN, *schema.CAPTION.names)}
        row["attributes"] = {name: scored[f"attribute_{name}"] for name in schema.ATTRIBUTES}
        row["scenes"] = {name: scored[f"scene_{name}"] for name in schema.SCENES}
        row["scene_probability"] = row["scenes"][row["scene"]]
        if opened.has("scorer"):
            row |= _in_words(row)
    return row


def embed_bytes(data: bytes, uri: str, bundle: Bundle) -> dict[str, np.ndarray]:
    """The embeddings of the photo in these bytes, by their column of the embeddings table; float16 (D,).

    Raises:
        UsageError: it cannot be decoded.
    """
    crops, shown = crops_of(bundle), _shown(uri)
    manifest = pa.Table.from_pylist([{"image_id": "", "uri": shown}], schema=schema.MANIFEST)
    photo = to_table(manifest, [read_photo(data, crops, Limits(), _suffix(uri))], tuple(crops))
    [failed] = photo.select(["error_kind", "error_message"]).to_pylist()
    if failed["error_kind"] is not None:
        raise UsageError(f"{shown}: {failed['error_kind']}: {failed['error_message']}; give another photo")
    from picinspector.stages.encode import Encode

    rows = Encode(os.fspath(bundle.folder))(photo)
    return {
        name: rows.column(name).combine_chunks().flatten().to_numpy() for name in ("clip_embedding", "dinov2_embedding")
    }


def pixels_of(data: bytes, uri: str) -> np.ndarray:
    """The photo to look at: uint8 sRGB (H, W, 3), upright, shorter side 512 px or less.

    Raises:
        PhotoError: it cannot be decoded.
    """
    return decode(data, (), Limits(), _suffix(uri)).working


def _score(opened: Bundle, photo: pa.Table) -> dict[str, Any]:
    # Models and the libraries they stand on take seconds to load, and a photo that cannot be read needs none.
    from picinspector.stages.encode import Encode
    from picinspector.stages.score import Score

    folder, column = os.fspath(opened.folder), next(iter(caption_crop(opened))) if opened.has("captioner") else None
    rows = Encode(folder, keep=column)(photo)
    if column is not None:
        from picinspector.stages.caption import Caption

        rows = Caption(folder, column)(rows)
    scored: dict[str, Any] = Score(folder)(rows).to_pylist()[0]
    return scored


def _in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    """Suggestions with all they are made of; and a caption from the facts, where the bundle has no captioner."""
    found = suggest(row["attributes"], row["measurements"], row["facts"], row["scene"])
    words: dict[str, Any] = {"suggestions": [{**asdict(one), "text": one.text} for one in found]}
    if row["caption"] is None:
        facts = Facts(row["attributes"], row["scenes"], row["measurements"]["brightness"])
        words |= {"caption": compose(facts), "caption_source": "composed"}
    return words


def _shown(uri: str) -> str:
    if is_local(uri):
        return to_uri(fsspec.filesystem("file"), local_path(uri))
    return redact(uri)


def _suffix(uri: str) -> str:
    path = uri.partition("#")[0].partition("?")[0] if is_web_url(uri) else uri
    return os.path.splitext(path)[1]  # noqa: PTH122
