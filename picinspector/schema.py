"""Names and Arrow schemas of the tables: manifest, embeddings, scores; and of the marks of photos that are gone.

One row is one image in each of them. A row that has no values has `error_kind` and `error_message` instead. `run_id` is
no column of the files: it is their hive partition (`scores/run_id=.../*.parquet`), which every reader adds by itself.
"""

from __future__ import annotations

import pyarrow as pa

#: The six quality attributes, SPAQ's names and order (Fang et al. 2020). 0-100, and HIGH IS GOOD in each: `noisiness`
#: is high for a CLEAN photo, `brightness` is the quality of the exposure, not its luminance (which it is where
#: `scorer_kind` is zero_shot).
ATTRIBUTES: tuple[str, ...] = ("mos", "brightness", "colorfulness", "contrast", "noisiness", "sharpness")

_LABELS = {
    "mos": "overall",
    "brightness": "exposure",
    "colorfulness": "colour",
    "contrast": "contrast",
    "noisiness": "noise-free",
    "sharpness": "sharpness",
}


def labels_of(scorer_kind: str) -> dict[str, str]:
    """What to call the attributes before people, so that high is good in each by its name too.

    Args:
        scorer_kind: with `zero_shot`, brightness is luminance.
    """
    return _LABELS | ({"brightness": "brightness"} if scorer_kind == "zero_shot" else {})


#: SPAQ's nine scene classes, in the order of the head's logits.
SCENES: tuple[str, ...] = (
    "animal",
    "cityscape",
    "human",
    "indoor",
    "landscape",
    "night",
    "plant",
    "still_life",
    "other",
)

#: Pixel measurements taken by `measure`, each a float32 column `measured_<name>` of the embeddings table.
MEASUREMENTS: tuple[str, ...] = (
    "sharpness",
    "noise",
    "brightness",
    "contrast",
    "colorfulness",
    "clipped_highlights",
    "clipped_shadows",
)

_UTC = pa.timestamp("us", tz="UTC")


def _field(name: str, kind: pa.DataType, text: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable, metadata={"description": text})


MANIFEST = pa.schema(
    [
        _field("image_id", pa.string(), "hash of (uri, etag), 32 hex digits; a changed object is a new image", False),
        _field("uri", pa.string(), "where the photo is; any fsspec URL, or an absolute path", False),
        _field("etag", pa.string(), "the store's version tag, else size and mtime in ns; null if it is missing"),
        _field("size_bytes", pa.int64(), "size of the file, bytes"),
        _field("last_modified", _UTC, "when the file was last written"),
    ]
)

_ERROR = [
    _field("error_kind", pa.string(), "why this photo has no values; null where it has"),
    _field("error_message", pa.string(), "one line saying what was wrong with the photo"),
]

FACTS = pa.schema(
    [
        _field("width", pa.int32(), "upright width, px"),
        _field("height", pa.int32(), "upright height, px"),
        _field("format", pa.string(), "container format by content, e.g. JPEG, PNG, HEIF"),
        _field("captured_at", pa.timestamp("us"), "EXIF DateTimeOriginal, camera's local time"),
        _field("camera", pa.string(), "EXIF Make and Model"),
        _field("lens", pa.string(), "EXIF LensModel"),
        _field("iso", pa.int32(), "EXIF ISO speed"),
        _field("exposure_s", pa.float32(), "EXIF exposure time, s"),
        _field("f_number", pa.float32(), "EXIF f-number"),
        _field("focal_length_mm", pa.float32(), "EXIF focal length, mm"),
        _field("content_hash", pa.string(), "SHA-256 of the file, its first 32 hex digits; equal for exact copies"),
        _field("phash", pa.uint64(), "64-bit DCT perceptual hash; compare by Hamming distance"),
    ]
)

_MEASURED = {
    "sharpness": "variance of the Laplacian of luma 0-255 (LAPV of Pertuz et al. 2013)",
    "noise": "noise sigma of luma 0-255 (Immerkaer 1996)",
    "brightness": "mean luma, 0-1",
    "contrast": "RMS contrast: standard deviation of luma, 0-1 (Peli 1990)",
    "colorfulness": "M3 of Hasler and Suesstrunk (2003), about 0-110",
    "clipped_highlights": "share of pixels with any channel >= 254, 0-1",
    "clipped_shadows": "share of pixels with every channel <= 1, 0-1",
}
MEASUREMENT_FIELDS = pa.schema([_field(f"measured_{name}", pa.float32(), _MEASURED[name]) for name in MEASUREMENTS])


#: Whose words a caption is: the model's; its second try's, with more candidates; composed from the facts, because both
#: contradicted them, or (`unread`) because the photo could not be read again.
CAPTION_SOURCES = ("model", "model_retry", "composed", "unread")
CAPTION = pa.schema(
    [
        _field("caption", pa.string(), "the photo's quality in one to three sentences; null where none was asked for"),
        _field("caption_source", pa.string(), f"where its words are from: {', '.join(CAPTION_SOURCES)}"),
    ]
)


def embeddings(clip_dim: int, dinov2_dim: int) -> pa.Schema:
    """Schema of the embeddings table for encoders of these output widths."""
    return pa.schema(
        [
            *MANIFEST,
            *FACTS,
            *MEASUREMENT_FIELDS,
            _field("clip_embedding", pa.list_(pa.float16(), clip_dim), "CLIP image embedding, L2-normalised"),
            _field("dinov2_embedding", pa.list_(pa.float16(), dinov2_dim), "DINOv2 embedding, L2-normalised"),
            _field("encoder_fingerprint", pa.string(), "hash of all that determines the embeddings", False),
            *CAPTION,
            _field("caption_error", pa.string(), "why the captioner could not see the photo again; null where it did"),
            _field("caption_fingerprint", pa.string(), "hash of all that determines the caption; null without one"),
            *_ERROR,
        ]
    )


SCORES = pa.schema(
    [
        *MANIFEST,
        _field("quality_score", pa.float32(), "perceived quality, 1 (bad) to 10 (excellent)"),
        _field("quality_low", pa.float32(), "lower end of the interval that holds the label, 1-10; null without one"),
        _field("quality_high", pa.float32(), "upper end of that interval, 1-10; null without one"),
        _field("predicted_mos", pa.float32(), "the scorer's estimate in its training scale"),
        _field("scorer_kind", pa.string(), "lightgbm, or zero_shot where the bundle has no trained scorer"),
        *[_field(f"attribute_{name}", pa.float32(), f"SPAQ {name}, 0-100, high is good") for name in ATTRIBUTES],
        _field("scene", pa.string(), "the most probable of nine scenes"),
        *[_field(f"scene_{name}", pa.float32(), f"probability of {name}, 0-1") for name in SCENES],
        *CAPTION,
        _field("suggestions", pa.list_(pa.string()), "what would raise the score most, each with its evidence; 0 to 3"),
        _field("scorer_fingerprint", pa.string(), "hash of all that determines the scores", False),
        *_ERROR,
    ]
)

#: Columns that came after the first release of the tables. What has to be there is not among them.
_ADDED = frozenset(
    {
        "content_hash",
        *CAPTION.names,
        "caption_error",
        "caption_fingerprint",
        "suggestions",
        "quality_low",
        "quality_high",
    }
)


def optional(table: str) -> pa.Schema:
    """The columns of a table that readers take for nulls in files of a version that did not write them yet."""
    fields: pa.Schema = {"embeddings": embeddings(1, 1), "scores": SCORES}.get(table, pa.schema([]))
    return pa.schema([field for field in fields if field.name in _ADDED])


#: How the photos of a group are one: the same bytes; the same picture; frames of one moment. `single`: by itself.
GROUP_KINDS = ("exact", "near", "burst", "single")
#: One row for each scored photo that is not gone.
GROUPS = pa.schema(
    [
        _field("image_id", pa.string(), "of the image, as in the other tables", False),
        _field("uri", pa.string(), "where the photo is", False),
        _field("group_id", pa.string(), "the smallest image_id of the group", False),
        _field("group_kind", pa.string(), "exact, near, burst, by the loosest tie that holds it; or single", False),
        _field("group_size", pa.int32(), "photos in the group", False),
        _field("rank_in_group", pa.int32(), "1 is the one to keep", False),
        _field("is_best", pa.bool_(), "rank_in_group = 1: true for a single photo too", False),
        _field("reason", pa.string(), "why it is the pick, or what the pick has before it; null for a single photo"),
    ]
)

#: What is no longer in the library, or is again: the newest mark of an image counts, and none where a newer row is.
GONE = pa.schema(
    [
        _field("image_id", pa.string(), "of the image as it was last committed", False),
        _field("gone", pa.bool_(), "true where it had left the library, false where it came back", False),
        _field("scorer_fingerprint", pa.string(), "the scorer of the run that marked it", False),
    ]
)
