"""What the service answers, typed: the fields of the scores table, the facts and the measurements, from their schemas.

Nothing is written twice: a column that `schema.SCORES` gains is a field of the next answer, and of the OpenAPI.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, create_model

from picinspector import schema

_KINDS: dict[pa.DataType, Any] = {
    pa.string(): str,
    pa.int32(): int,
    pa.int64(): int,
    pa.uint64(): int,
    pa.float32(): float,
    pa.timestamp("us"): datetime,
    pa.timestamp("us", tz="UTC"): datetime,
    pa.list_(pa.string()): list[str],
}
#: What a column says of a photo that came with the request.
_UPLOADED = {
    "image_id": "hash of (uri, etag), 32 hex digits",
    "uri": "the URL that was fetched, without secrets; or the name that the upload gave, which may be empty",
    "etag": "SHA-256 of the file, its first 32 hex digits",
    "last_modified": "always null",
}


def _fields(columns: Iterable[pa.Field], prefix: str = "") -> dict[str, Any]:
    """Pydantic's fields for columns of a table, without the beginning of their names."""
    return {
        column.name.removeprefix(prefix): (
            _KINDS[column.type] | None if column.nullable else _KINDS[column.type],
            Field(description=_UPLOADED.get(column.name, column.metadata[b"description"].decode())),
        )
        for column in columns
    }


Facts = create_model("Facts", __doc__="What the file says of the photo.", **_fields(schema.FACTS))
Measurements = create_model(
    "Measurements", __doc__="Taken of the pixels.", **_fields(schema.MEASUREMENT_FIELDS, "measured_")
)
Photo = create_model(
    "Photo",
    __doc__="A row of the scores table, with the facts and the measurements of the embeddings table beside it.",
    **_fields(schema.SCORES),
    facts=(Facts, ...),
    measurements=(Measurements, ...),
)
Photos = create_model(
    "Photos",
    __doc__="One for each photo of the request, in its order; one that could not be judged has an error_kind.",
    photos=(list[Photo], ...),  # type: ignore[valid-type]
)


class Problem(BaseModel):
    """Why there is no answer."""

    error_kind: str = Field(description="for programs: a kind of the tables' error_kind, or of the service's own")
    error_message: str = Field(description="one line for people")


class State(BaseModel):
    """Whether the service is alive, or ready."""

    status: str = Field(description="ok, or starting")


class Models(BaseModel):
    """The bundle that judges."""

    name: str
    version: str
    pieces: list[str] = Field(description="the models it holds")
    scorer_kind: str = Field(description="lightgbm, or zero_shot where the bundle has no trained scorer")
    encoder_fingerprint: str = Field(description="hash of all that determines the embeddings")
    scorer_fingerprint: str = Field(description="hash of all that determines the scores")
    caption_fingerprint: str | None = Field(description="hash of all that determines a caption; null without one")
    card: str = Field(description="what it was made from and what it is good for, Markdown")


class Reference(BaseModel):
    """A photo by its address, or in the request: one of `url` and `base64`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str | None = Field(None, max_length=2048, description="http or https; fetched from public addresses only")
    base64: str | None = Field(None, description="the file itself")
    name: str = Field("", max_length=255, description="what to call it; its extension tells camera raw from TIFF")
