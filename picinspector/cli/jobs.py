"""The commands that run on Ray and commit a run."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from picinspector.cli.options import (
    MAX_MEGABYTES,
    MAX_MEGAPIXELS,
    Address,
    Best,
    BundleRef,
    Json,
    Library,
    Limit,
    MaxMegabytes,
    MaxMegapixels,
    Out,
    Quiet,
    StorageOptions,
    Table,
    Where,
    Worst,
    bundle_path,
    limits,
    parse_options,
)
from picinspector.cli.words import plan_text, record_text


class RetryFailed(StrEnum):
    """Which photos that failed before `score` does again."""

    transient = "transient"
    all = "all"
    none = "none"


class Captions(StrEnum):
    """Which photos `score` describes."""

    all = "all"
    none = "none"


def score(
    library: Library,
    out: Out,
    bundle: BundleRef = "builtin",
    captions: Annotated[Captions, typer.Option(help="Describe every photo, or none.")] = Captions.none,
    retry_failed: Annotated[
        RetryFailed, typer.Option(help="Failed photos to do again: those whose failure may pass, all, or none.")
    ] = RetryFailed.transient,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    encoders: Annotated[int | None, typer.Option(min=1, help="Encoder actors; default from the cluster.")] = None,
    gpus_per_encoder: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each, may be a fraction; 0 encodes on the CPU.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Photos of one encoder call.")] = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    max_megabytes: MaxMegabytes = MAX_MEGABYTES,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Embed and score every photo of LIBRARY that DEST does not have yet."""
    from picinspector import pipeline

    options = pipeline.Options(
        bundle=bundle_path(bundle),
        storage_options=parse_options(storage_options),
        limit=limit,
        retry_failed=retry_failed.value,
        limits=limits(max_megapixels, max_megabytes),
        captions=captions is Captions.all,
        encoders=encoders,
        gpus_per_encoder=gpus_per_encoder,
        batch_size=batch_size,
        address=address,
        show_progress=not quiet,
    )
    if dry_run:
        plan = pipeline.plan_score(library, out, options)
        print(json.dumps(plan, indent=2) if as_json else plan_text(plan))
        return 0
    return _report(pipeline.score(library, out, options), as_json)


def rescore(
    dest: Table,
    bundle: BundleRef = "builtin",
    as_json: Json = False,
    quiet: Quiet = False,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Score the stored embeddings of DEST again with another scorer; reads no photo."""
    from picinspector import pipeline

    options = pipeline.Options(
        bundle=bundle_path(bundle),
        storage_options=parse_options(storage_options),
        address=address,
        show_progress=not quiet,
    )
    return _report(pipeline.rescore(dest, options), as_json)


def caption(
    dest: Table,
    best: Best = None,
    worst: Worst = None,
    where: Where = None,
    bundle: BundleRef = "builtin",
    as_json: Json = False,
    quiet: Quiet = False,
    captioners: Annotated[int | None, typer.Option(min=1, help="Captioner actors; default from the cluster.")] = None,
    gpus_per_captioner: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each, may be a fraction; 0 works on the CPU.")
    ] = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    max_megabytes: MaxMegabytes = MAX_MEGABYTES,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Describe photos of DEST in words: all that are scored, or a choice of them. Reads their pixels again."""
    from picinspector import pipeline
    from picinspector.choice import Choice

    options = pipeline.Options(
        bundle=bundle_path(bundle),
        storage_options=parse_options(storage_options),
        limits=limits(max_megapixels, max_megabytes),
        encoders=captioners,
        gpus_per_encoder=gpus_per_captioner,
        address=address,
        show_progress=not quiet,
    )
    return _report(pipeline.caption(dest, Choice(best, worst, where), options), as_json)


def _report(record: dict[str, Any], as_json: bool) -> int:
    from picinspector.runs import exit_code

    print(json.dumps(record, indent=2) if as_json else record_text(record))
    return exit_code(record)
