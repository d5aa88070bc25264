"""The commands about models: bundles, and training from ratings."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from picinspector.cli.options import BundleArgument, BundleRef, Json, StorageOptions, bundle_path, parse_options
from picinspector.cli.words import ratings_text
from picinspector.errors import UsageError

bundle_app = typer.Typer(no_args_is_help=True, help="The models of a run: show, verify, fetch.", rich_markup_mode=None)
train_app = typer.Typer(no_args_is_help=True, help="Models of your own.", rich_markup_mode=None)


@bundle_app.command("show")
def bundle_show(bundle: BundleArgument = "builtin") -> int:
    """Print a bundle's pieces, fingerprints and card."""
    from picinspector.bundle import open_bundle

    opened = open_bundle(bundle)
    size = sum((opened.folder / path).stat().st_size for path in opened.files)
    print(f"{opened.name} {opened.version}  {size / 1e6:.1f} MB  {opened.folder}")
    print(f"pieces: {', '.join(opened.pieces)}    scorer: {opened.scorer_kind}")
    print(f"encoder fingerprint {opened.encoder_fingerprint}, scorer fingerprint {opened.scorer_fingerprint}")
    card = opened.folder / "README.md"
    if card.is_file():
        print(f"\n{card.read_text('utf-8').rstrip()}")
    return 0


@bundle_app.command("verify")
def bundle_verify(bundle: BundleArgument = "builtin") -> int:
    """Check the hash of every file of a bundle."""
    from picinspector.bundle import open_bundle

    opened = open_bundle(bundle)
    opened.verify()
    print(f"{opened.name} {opened.version}: {len(opened.files)} files, all as sealed")
    return 0


@bundle_app.command("fetch")
def bundle_fetch(
    name: Annotated[str, typer.Argument(help="full (builtin is in the package).")] = "full",
    to: Annotated[str | None, typer.Option(help="Folder to put it in; default the user's cache.")] = None,
    clip: Annotated[str | None, typer.Option(help="Local copy of the CLIP folder, instead of the hub.")] = None,
    dinov2: Annotated[str | None, typer.Option(help="Local copy of the DINOv2 folder, instead of the hub.")] = None,
    captioner: Annotated[str | None, typer.Option(help="Local copy of the SmolVLM folder, instead of the hub.")] = None,
    captions: Annotated[bool, typer.Option(help="With the captioner, or without.")] = True,
) -> int:
    """Put the full bundle together from the Hugging Face hub at pinned revisions, or from local copies."""
    from picinspector.bundle import fetch_full

    if name != "full":
        raise UsageError(f"nothing to fetch for bundle {name!r}: `full` is fetched, `builtin` is in the package")
    opened = fetch_full(to, clip, dinov2, captioner, captions)
    print(f"{opened.name} {opened.version}: {len(opened.files)} files in {opened.folder}")
    return 0


@train_app.callback()
def train_models() -> None:
    """Models of your own."""  # a callback keeps `scorer` a command of its own while it is the only one


@train_app.command("scorer")
def train_scorer(
    tables: Annotated[str, typer.Option(metavar="DEST", help="The tables of the library that was rated.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the new bundle goes.")],
    ratings: Annotated[
        str | None, typer.Option(metavar="CSV", help="Columns uri (or the end of one) and rating.")
    ] = None,
    use_xmp: Annotated[bool, typer.Option("--xmp", help="Take xmp:Rating of the photos and their sidecars.")] = False,
    rating_range: Annotated[
        tuple[float, float] | None, typer.Option("--range", help="Worst and best rating; default from the data.")
    ] = None,
    bundle: BundleRef = "builtin",
    name: Annotated[str, typer.Option(help="Name of the new bundle.")] = "personal",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Train a scorer on your own ratings of scored photos, and write a bundle with it; reads no photo but for --xmp."""
    from picinspector import ratings as learn

    if (ratings is None) != use_xmp:
        raise UsageError("give either --ratings CSV or --xmp")
    report = learn.train(
        tables, out, ratings, bundle_path(bundle), rating_range, name, seed, parse_options(storage_options)
    )
    print(json.dumps(report, indent=2) if as_json else ratings_text(report))
    return 0
