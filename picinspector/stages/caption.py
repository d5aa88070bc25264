"""Between encoding and scoring, where asked for: the photo in words, held against what the heads see.

The captioner is shown the photo and told what the heads see in it: they know its sharpness better than a language model
does. What it says is checked all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from picinspector import schema
from picinspector.attributes import AttributeHead
from picinspector.bundle import open_bundle
from picinspector.captioner import Captioner
from picinspector.photo import CropSpec, Limits
from picinspector.scorer import to_array
from picinspector.stages import Report, count_kinds, describe_batch
from picinspector.stages.encode import to_pixels, within_memory
from picinspector.stages.read import read_photos
from picinspector.storage import StorageOptions
from picinspector.wording import Facts, check, compose, is_fluent, tell

#: Of the second try.
_BEAMS = 4

#: The captioner has batches of its own, of one size, so that a photo gets the same words in any company.
_ADVICE = (
    "let no other model share its GPU (--gpus-per-encoder 1), or caption in a run of its own (picinspector caption)"
)


def describe(captioner: Captioner, crops: np.ndarray, facts: Sequence[Facts] | None) -> tuple[list[str], list[str]]:
    """Captions that do not contradict the heads.

    A caption that does, or that is no whole sentence, is looked for once more among more candidates (beam search); if
    that fails too, it is composed from the facts.

    Args:
        captioner: sees the crops.
        crops: uint8 (B, S, S, 3).
        facts: of each photo; None where no head is trained: nothing is told, and nothing checked.

    Returns:
        a text for each, and where its words are from, one of `schema.CAPTION_SOURCES`.
    """
    if facts is None:
        return captioner.caption(crops), ["model"] * len(crops)
    told = [tell(fact) for fact in facts]
    texts = captioner.caption(crops, told)
    sources = ["model"] * len(texts)
    again = [row for row, text in enumerate(texts) if not _is_true(text, facts[row])]
    if again:
        others = captioner.caption(crops[again], [told[row] for row in again], beams=_BEAMS)
        for row, text in zip(again, others, strict=True):
            good = _is_true(text, facts[row])
            texts[row], sources[row] = (text, "model_retry") if good else (compose(facts[row]), "composed")
    return texts, sources


def _is_true(text: str, facts: Facts) -> bool:
    return is_fluent(text) and not check(text, facts).contradictions


def facts_of(head: AttributeHead, columns: Mapping[str, np.ndarray], luma: np.ndarray) -> list[Facts]:
    """What the head sees in N photos, as facts to speak of.

    Args:
        head: of the bundle that embedded them.
        columns: its features, (N,) or (N, D) each.
        luma: `measured_brightness`, (N,).
    """
    attributes, scenes = head.predict(columns)
    return [
        Facts(
            dict(zip(schema.ATTRIBUTES, map(float, attributes[row]), strict=True)),
            dict(zip(schema.SCENES, map(float, scenes[row]), strict=True)),
            float(luma[row]),
        )
        for row in range(len(attributes))
    ]


class Caption:
    """The captioner on one device: crops and embeddings in, captions beside the embeddings. One instance an actor."""

    def __init__(
        self,
        bundle: str,
        column: str,
        threads: int | None = None,
        report: Report | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Load the captioner, and the attribute head where the bundle has one.

        Args:
            bundle: name or folder of the bundle on this machine.
            column: of the captioner's crops.
            threads: for the CPU; None leaves torch's own choice.
            report: called after each batch.
            fingerprint: of the captions of the driver's bundle; another one here is another bundle.

        Raises:
            BundleError: the bundle cannot be used, or is another than the driver's.
            UsageError: in a call: the device's memory is too small.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        opened = open_bundle(bundle)
        opened.expect(caption=fingerprint)
        self._captioner = Captioner(opened.piece("captioner"))
        self._head = AttributeHead(opened.piece("attributes")) if opened.has("attributes") else None
        self._column, self._fingerprint, self._report = column, opened.caption_fingerprint, report

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows of the embeddings table with a column of crops, to the same rows with captions and without it.

        A photo that has embeddings but no crop, because it could not be read again, is described from the facts.
        """
        started = time.perf_counter()
        crops, plain = rows.column(self._column), rows.drop_columns([self._column])
        good = np.asarray(pc.is_null(rows.column("error_kind")))
        seen = np.asarray(pc.is_valid(crops)) & good
        texts = np.full(len(good), None, dtype=object)
        sources = np.full(len(good), None, dtype=object)
        facts = self._facts(rows.filter(pa.array(good))) if good.any() else None
        if facts is not None:
            texts[good], sources[good] = [compose(fact) for fact in facts], "unread"
        if seen.any():
            told = None if facts is None else [facts[row] for row in np.flatnonzero(seen[good])]
            pixels = to_pixels(crops.filter(pa.array(seen)), self._captioner.crop.crop_px)

            def describe_part(part: slice) -> tuple[list[str], list[str]]:
                return describe(self._captioner, pixels[part], None if told is None else told[part])

            parts = within_memory(describe_part, len(pixels), _ADVICE)
            texts[seen] = [text for part, _ in parts for text in part]
            sources[seen] = [source for _, part in parts for source in part]
        made = [self._fingerprint if text is not None else None for text in texts]
        columns: dict[str, Any] = {
            "caption": pa.array(texts, pa.string()),
            "caption_source": pa.array(sources, pa.string()),
            "caption_fingerprint": pa.array(made, pa.string()),
        }
        for name, values in columns.items():
            plain = plain.set_column(plain.schema.get_field_index(name), plain.schema.field(name), values)
        if self._report is not None:
            errors = count_kinds(plain.column("error_kind")) - count_kinds(rows.column("error_kind"))
            self._report(describe_batch("caption", rows.num_rows, errors, started))
        return plain

    def _facts(self, rows: pa.Table) -> list[Facts] | None:
        if self._head is None:
            return None
        columns = {name: to_array(rows.column(name)) for name in self._head.features}
        return facts_of(self._head, columns, to_array(rows.column("measured_brightness")))


def read_again(
    rows: pa.Table,
    crops: Mapping[str, CropSpec],
    limits: Limits,
    storage_options: StorageOptions | None = None,
    is_retry: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> pa.Table:
    """Rows of the embeddings table, with the captioner's crop of each photo read once more (as `read_photos` does).

    A photo that cannot be read any more, or is another by now, keeps its embeddings; `caption_error` says why there is
    no crop: an error kind, or `changed`, and a message.
    """
    started = time.perf_counter()
    [(column, _)] = crops.items()
    good = pc.is_null(rows.column("error_kind"))
    wanted = rows.filter(good)
    read = read_photos(wanted.select(schema.MANIFEST.names), crops, limits, storage_options, is_retry)
    same = np.ones(wanted.num_rows, dtype=bool)
    for name in ("phash", "width", "height"):
        same &= np.asarray(pc.fill_null(pc.equal(read.column(name), wanted.column(name)), False))
    position = pa.array(np.cumsum(np.asarray(good)) - 1, pa.int64(), mask=~np.asarray(good))
    error = pc.if_else(
        pc.is_valid(read.column("error_kind")),
        pc.binary_join_element_wise(read.column("error_kind"), read.column("error_message"), ": "),
        pc.if_else(pa.array(same), None, "changed: not the photo that was scored; score it again"),
    )
    index = rows.schema.get_field_index("caption_error")
    rows = rows.set_column(index, rows.schema.field(index), error.take(position))
    if report is not None:
        kinds = pc.list_element(pc.split_pattern(error.drop_null(), ":"), 0)
        report(describe_batch("read", rows.num_rows, count_kinds(kinds), started))
    crop = pc.if_else(pa.array(same), read.column(column), pa.scalar(None, pa.large_binary()))
    return rows.append_column(column, crop.take(position))
