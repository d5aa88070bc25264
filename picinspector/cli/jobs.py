"""The commands that run on Ray and commit a run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from picinspector.cli.options import (
    MAX_MEGABYTES,
    MAX_MEGAPIXELS,
    Address,
    BatchSize,
    Best,
    BundleRef,
    Captions,
    Describe,
    Encoders,
    GpusPerEncoder,
    Json,
    KeepDays,
    Library,
    Limit,
    MaxCpus,
    MaxMegabytes,
    MaxMegapixels,
    Out,
    Quiet,
    Retry,
    RetryFailed,
    StorageOptions,
    Table,
    Where,
    Worst,
    bundle_path,
    limits,
    parse_options,
)
from picinspector.cli.words import night_text, plan_text, prune_text, record_text


def score(
    library: Library,
    out: Out,
    bundle: BundleRef = "builtin",
    captions: Describe = Captions.none,
    retry_failed: Retry = RetryFailed.transient,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    encoders: Encoders = None,
    gpus_per_encoder: GpusPerEncoder = None,
    batch_size: BatchSize = None,
    max_cpus: MaxCpus = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    max_megabytes: MaxMegabytes = MAX_MEGABYTES,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Embed and score what is new or changed in LIBRARY since DEST was written; finish a run that was cut short."""
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
        max_cpus=max_cpus,
        address=address,
        show_progress=not quiet,
    )
    if dry_run:
        plan = pipeline.plan_score(library, out, options)
        print(json.dumps(plan, indent=2) if as_json else plan_text(plan))
        return 0
    return _report(pipeline.score(library, out, options), as_json)


def nightly(
    library: Library,
    out: Out,
    bundle: BundleRef = "builtin",
    captions: Describe = Captions.none,
    retry_failed: Retry = RetryFailed.transient,
    keep_days: KeepDays = 30.0,
    drift_threshold: Annotated[
        float, typer.Option(min=0, metavar="PSI", help="Warn of shifts beyond this population stability index.")
    ] = 0.25,
    hook: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Run at the end, with the night's record as JSON on stdin.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    encoders: Encoders = None,
    gpus_per_encoder: GpusPerEncoder = None,
    batch_size: BatchSize = None,
    max_cpus: MaxCpus = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    max_megabytes: MaxMegabytes = MAX_MEGABYTES,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Keep DEST fresh: rescore if the scorer is new, score what is new or changed, compare, report, prune."""
    from picinspector import nightly as night
    from picinspector import pipeline

    options = pipeline.Options(
        bundle=bundle_path(bundle),
        storage_options=parse_options(storage_options),
        retry_failed=retry_failed.value,
        limits=limits(max_megapixels, max_megabytes),
        captions=captions is Captions.all,
        encoders=encoders,
        gpus_per_encoder=gpus_per_encoder,
        batch_size=batch_size,
        max_cpus=max_cpus,
        address=address,
        show_progress=not quiet,
    )
    record = night.run(library, out, options, keep_days, drift_threshold, hook)
    print(json.dumps(record, indent=2) if as_json else night_text(record))
    return 3 if record["score"]["counts"]["failed_transient"] else 0


def prune(
    dest: Table,
    keep_days: KeepDays = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    max_cpus: MaxCpus = None,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Remove what newer runs have superseded from DEST, and put small files together."""
    from picinspector import pipeline

    options = pipeline.Options(
        storage_options=parse_options(storage_options),
        max_cpus=max_cpus,
        address=address,
        show_progress=not quiet,
    )
    report = pipeline.prune(dest, options, keep_days, dry_run)
    print(json.dumps(report, indent=2) if as_json else prune_text(report, dry_run))
    return 0


def rescore(
    dest: Table,
    bundle: BundleRef = "builtin",
    as_json: Json = False,
    quiet: Quiet = False,
    max_cpus: MaxCpus = None,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Score the stored embeddings of DEST again with another scorer; reads no photo."""
    from picinspector import pipeline

    options = pipeline.Options(
        bundle=bundle_path(bundle),
        storage_options=parse_options(storage_options),
        max_cpus=max_cpus,
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
    max_cpus: MaxCpus = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    max_megabytes: MaxMegabytes = MAX_MEGABYTES,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Describe photos of DEST in words: all that are scored, or a choice of them. Reads their pixels again."""
    from picinspector import pipeline
    from picinspector.rank import Choice

    options = pipeline.Options(
        bundle=bundle_path(bundle),
        storage_options=parse_options(storage_options),
        limits=limits(max_megapixels, max_megabytes),
        encoders=captioners,
        gpus_per_encoder=gpus_per_captioner,
        max_cpus=max_cpus,
        address=address,
        show_progress=not quiet,
    )
    return _report(pipeline.caption(dest, Choice(best, worst, where), options), as_json)


def _report(record: dict[str, Any], as_json: bool) -> int:
    from picinspector.runs import exit_code

    print(json.dumps(record, indent=2) if as_json else record_text(record))
    return exit_code(record)
