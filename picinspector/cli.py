"""The command line: parses, calls one function of the library, prints. stdout is the result, stderr everything else.

Exit codes: 0 done, 1 crashed, 2 wrong usage, 3 done but transient failures remain, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from enum import StrEnum
from typing import Annotated, Any

import typer

import picinspector
from picinspector import errors
from picinspector.errors import PicInspectorError, UsageError
from picinspector.storage import redact

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Score a bucket of photos: quality, attributes and scenes as Parquet tables.",
)  # fmt: skip
bundle_app = typer.Typer(no_args_is_help=True, help="The models of a run: show, verify, fetch.", rich_markup_mode=None)
app.add_typer(bundle_app, name="bundle")
train_app = typer.Typer(no_args_is_help=True, help="Models of your own.", rich_markup_mode=None)
app.add_typer(train_app, name="train")

Library = Annotated[str, typer.Argument(help="s3:// prefix, folder, photo, or a .parquet/.csv/.txt list of photos.")]
Table = Annotated[str, typer.Argument(metavar="DEST", help="Where the tables are: s3:// prefix or folder.")]
Out = Annotated[str, typer.Option("--out", "-o", metavar="DEST", help="Where the tables go: s3:// prefix or folder.")]
BundleRef = Annotated[str, typer.Option(help="builtin, full, or the folder of a bundle.")]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help='fsspec options, e.g. {"endpoint_url": "..."}; keys are better in the environment.'
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Do at most this many photos.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else Ray on this machine.")]
_INTERRUPTED = 130
_TEXT_WIDTH = 100


class Captions(StrEnum):
    """Which photos `score` describes."""

    all = "all"
    none = "none"


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress line.")]


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    debug = bool(os.environ.get("PICINSPECTOR_DEBUG"))
    try:
        result = app(args=arguments, prog_name="picinspector", standalone_mode=False)
        if result == _INTERRUPTED:  # how Typer reports Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _complain("interrupted; nothing is lost: run the same command again", _INTERRUPTED)
    except PicInspectorError as error:
        # Ray wraps what a worker raised in a subclass whose text is a traceback; the cause has the one line.
        cause = getattr(error, "cause", error)
        return _complain(str(cause), cause.exit_code)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own: usage, abort
            error.show()
            return int(error.exit_code)
        if debug:
            raise
        cause = getattr(error, "cause", None) or error
        reason = (str(cause).strip().splitlines() or [""])[-1]
        # An actor that died while starting leaves nothing but its traceback's text.
        if found := re.match(r"picinspector\.errors\.(\w+): (.*)", reason):
            return _complain(found[2], int(getattr(errors, found[1]).exit_code))
        return _complain(f"{type(cause).__name__}: {reason} (PICINSPECTOR_DEBUG=1 shows where)", 1)


def entry_point() -> None:
    """The `picinspector` command."""
    code = main()
    if code == _INTERRUPTED:
        # Ray Data's threads are in the middle of something; taking Python down around them was seen to crash (SIGSEGV).
        # A local Ray ends by itself when its driver is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(message: str, exit_code: int) -> int:
    print(f"picinspector: {redact(message)}", file=sys.stderr)
    return exit_code


# --- jobs -------------------------------------------------------------------------------------------------------------


@app.command()
def score(
    library: Library,
    out: Out,
    bundle: BundleRef = "builtin",
    captions: Annotated[Captions, typer.Option(help="Describe every photo, or none.")] = Captions.none,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    encoders: Annotated[int | None, typer.Option(min=1, help="Encoder actors; default from the cluster.")] = None,
    gpus_per_encoder: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each, may be a fraction; 0 encodes on the CPU.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Photos of one encoder call.")] = None,
    max_megapixels: Annotated[float, typer.Option(min=0, help="Refuse photos with more pixels.")] = 300.0,
    max_megabytes: Annotated[float, typer.Option(min=0, help="Refuse larger files.")] = 512.0,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Embed and score every photo of LIBRARY that DEST does not have yet."""
    from picinspector import pipeline
    from picinspector.photo import Limits

    options = pipeline.Options(
        bundle=_bundle_path(bundle),
        storage_options=_parse_options(storage_options),
        limit=limit,
        limits=Limits(max_bytes=int(max_megabytes * 1024**2), max_pixels=int(max_megapixels * 1e6)),
        captions=captions is Captions.all,
        encoders=encoders,
        gpus_per_encoder=gpus_per_encoder,
        batch_size=batch_size,
        address=address,
        show_progress=not quiet,
    )
    if dry_run:
        plan = pipeline.plan_score(library, out, options)
        print(json.dumps(plan, indent=2) if as_json else _plan_text(plan))
        return 0
    return _report(pipeline.score(library, out, options), as_json)


@app.command()
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
        bundle=_bundle_path(bundle),
        storage_options=_parse_options(storage_options),
        address=address,
        show_progress=not quiet,
    )
    return _report(pipeline.rescore(dest, options), as_json)


@app.command()
def caption(
    dest: Table,
    best: Annotated[int | None, typer.Option(min=1, help="So many of the best photos.")] = None,
    worst: Annotated[int | None, typer.Option(min=1, help="So many of the worst photos.")] = None,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="Condition over the scores, DuckDB's SQL.")] = None,
    bundle: BundleRef = "builtin",
    as_json: Json = False,
    quiet: Quiet = False,
    captioners: Annotated[int | None, typer.Option(min=1, help="Captioner actors; default from the cluster.")] = None,
    gpus_per_captioner: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each, may be a fraction; 0 works on the CPU.")
    ] = None,
    max_megapixels: Annotated[float, typer.Option(min=0, help="Refuse photos with more pixels.")] = 300.0,
    max_megabytes: Annotated[float, typer.Option(min=0, help="Refuse larger files.")] = 512.0,
    storage_options: StorageOptions = None,
    address: Address = None,
) -> int:
    """Describe photos of DEST in words: all that are scored, or a choice of them. Reads their pixels again."""
    from picinspector import pipeline
    from picinspector.photo import Limits
    from picinspector.tables import Choice

    options = pipeline.Options(
        bundle=_bundle_path(bundle),
        storage_options=_parse_options(storage_options),
        limits=Limits(max_bytes=int(max_megabytes * 1024**2), max_pixels=int(max_megapixels * 1e6)),
        encoders=captioners,
        gpus_per_encoder=gpus_per_captioner,
        address=address,
        show_progress=not quiet,
    )
    return _report(pipeline.caption(dest, Choice(best, worst, where), options), as_json)


def _report(record: dict[str, Any], as_json: bool) -> int:
    from picinspector.runs import exit_code

    print(json.dumps(record, indent=2) if as_json else _record_text(record))
    return exit_code(record)


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command()
def top(
    dest: Table,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many.")] = 20,
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Print the best photos of DEST, the newest committed score of each."""
    from picinspector.tables import Destination, best

    rows = best(Destination(dest, _parse_options(storage_options)), count)
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'rank':>4}  {'quality':>7}  {'scene':<10}  photo")
    for rank, row in enumerate(rows, 1):
        print(f"{rank:>4}  {row['quality_score']:>7.2f}  {row['scene']:<10}  {_one_line(row['uri'])}")
    return 0


@app.command()
def inspect(
    photo: Annotated[str, typer.Argument(help="A path, an http(s) URL, or any other fsspec URL.")],
    bundle: BundleRef = "builtin",
    as_json: Json = False,
    plot: Annotated[str | None, typer.Option(metavar="PNG", help="Draw the photo beside a radar chart.")] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch URLs from private and loopback addresses too.")
    ] = False,
    storage_options: StorageOptions = None,
) -> int:
    """Judge one photo, without a cluster: description, score, attributes, scene, suggestions, facts."""
    from picinspector.stages.single import fetch_photo, judge_bytes, pixels_of

    if plot is not None and not plot.lower().endswith(".png"):
        raise UsageError(f"--plot {_one_line(plot)}: it is written as PNG; give a name that ends in .png")
    data = fetch_photo(photo, _parse_options(storage_options), allow_private)
    row = judge_bytes(data, photo, _bundle_path(bundle))
    if as_json:
        print(json.dumps(row, indent=2, default=str))
    elif row["error_kind"]:
        _complain(_one_line(f"{row['uri']}: {row['error_kind']}: {row['error_message']}"), 1)
    else:
        print(_judgement_text(row))
    if row["error_kind"]:
        return 3 if row["error_kind"] in errors.TRANSIENT_KINDS else 1
    if plot is not None and isinstance(data, bytes):
        from picinspector.plot import draw

        _write(plot, draw(row, pixels_of(data, photo)))
    return 0


def _write(path: str, content: bytes) -> None:
    try:
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(content)
    except OSError as error:
        raise UsageError(f"{_one_line(path)}: cannot be written ({error.strerror}); give another place") from error


@app.command()
def critique(
    dest: Table,
    critic_url: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible API, like https://api.openai.com/v1.")
    ],
    critic_model: Annotated[str, typer.Option(metavar="NAME", help="A model of it that sees pictures.")],
    best: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N best photos.")] = None,
    worst: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N worst photos.")] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Of the photos for which this holds, e.g. \"scene = 'human'\".")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(metavar="USD", help="Stop before this is exceeded.")] = None,
    price_in: Annotated[float | None, typer.Option(metavar="USD", help="Per million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(metavar="USD", help="Per million answer tokens.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer; models that think first need more.")] = 1000,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds for one answer.")] = 60.0,
    retries: Annotated[int, typer.Option(min=0, max=10, help="After failures that may pass.")] = 2,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 4,
    again: Annotated[bool, typer.Option("--again", help="Also photos that this model has criticised.")] = False,
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Have a remote model criticise some photos of DEST; sends them there. The key is in PICINSPECTOR_CRITIC_KEY."""
    from picinspector import chat, critic
    from picinspector.tables import Destination

    options = _parse_options(storage_options)
    prices = chat.Prices(price_in, price_out, max_cost)
    key = chat.key_from_environment()
    endpoint = chat.Endpoint(critic_url, critic_model, key, timeout, retries, concurrency, max_tokens)
    destination = Destination(dest, options)
    rows = critic.select(destination, best, worst, where)

    def show(done: int, to_do: int) -> None:
        if sys.stderr.isatty():
            print(f"\rcritique: {done:,} of {to_do:,} photos", end="\n" if done == to_do else "", file=sys.stderr)

    record = critic.critique(destination, rows, endpoint, prices, again, options, on_row=show)
    print(json.dumps(record, indent=2, default=str) if as_json else _critique_text(record))
    return 3 if record["counts"]["failed_transient"] else 0


# --- bundles ----------------------------------------------------------------------------------------------------------


@bundle_app.command("show")
def bundle_show(bundle: Annotated[str, typer.Argument(help="builtin, full, or a folder.")] = "builtin") -> int:
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
def bundle_verify(bundle: Annotated[str, typer.Argument(help="builtin, full, or a folder.")] = "builtin") -> int:
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


# --- training ---------------------------------------------------------------------------------------------------------


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
        tables, out, ratings, _bundle_path(bundle), rating_range, name, seed, _parse_options(storage_options)
    )
    print(json.dumps(report, indent=2) if as_json else _ratings_text(report))
    return 0


@app.command()
def version() -> int:
    """Print the version."""
    print(picinspector.__version__)
    return 0


# --- words ------------------------------------------------------------------------------------------------------------


def _parse_options(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UsageError(f'--storage-options is not JSON ({error}); write it like {{"anon": true}}') from error
    if not isinstance(options, dict):
        raise UsageError('--storage-options must be a JSON object, like {"anon": true}')
    return options


def _bundle_path(ref: str) -> str:
    # Workers start in other folders: a relative path would be another bundle there.
    return ref if ref in ("builtin", "full") else os.path.abspath(ref)  # noqa: PTH100


def _plan_text(plan: dict[str, Any]) -> str:
    return (
        f"{plan['library']}: {plan['listed']:,} photos, {plan['listed_bytes'] / 1e6:,.1f} MB\n"
        f"to do: {plan['to_do']:,} photos, {plan['to_do_bytes'] / 1e6:,.1f} MB, with bundle {plan['bundle']}"
        f" ({plan['scorer_kind']}) into {plan['destination']}\n"
        "dry run: nothing was written"
    )


def _record_text(record: dict[str, Any]) -> str:
    counts = record["counts"]
    lines = [
        f"{counts['scored']:,} photos scored, {counts['failed']:,} failed, {counts['unchanged']:,} unchanged "
        f"in {record['seconds']['total']:,.1f} s ({record['photos_per_s']:,.1f}/s)",
        *(f"  {kind}: {number:,}" for kind, number in counts["errors_by_kind"].items()),
    ]
    if unread := counts["unread_by_kind"]:
        lines.append("could not be read again: " + ", ".join(f"{number:,} {kind}" for kind, number in unread.items()))
    if captions := counts["captions_by_source"]:
        lines.append("captions: " + ", ".join(f"{number:,} {source}" for source, number in captions.items()))
    if record["bundle"]["scorer_kind"] == "zero_shot":
        lines.append("scores are zero-shot (scorer_kind = zero_shot): no scorer has been trained for this bundle")
    if counts["failed_transient"]:
        lines.append(f"{counts['failed_transient']:,} failures may pass: run the same command again")
    lines.append(f"run {record['run_id']} committed to {record['destination']}")
    return "\n".join(lines)


def _ratings_text(report: dict[str, Any]) -> str:
    low, high = report["srcc_low_high"]
    lines = [f"{report['rated']:,} rated photos of {report['destination']}"]
    if report["missing"]:
        examples = ", ".join(_one_line(name) for name in report["missing_examples"])
        lines.append(f"{report['missing']:,} ratings of photos that are not in these tables, left out: {examples}")
    if report["unreadable"]:
        lines.append(f"{report['unreadable']:,} photos could not be read for their rating")
    if report["different_photos"] < report["rated"]:
        lines.append(f"near-duplicates counted once, {report['different_photos']:,}; the check keeps them together")
    lines += [
        "agreement with the ratings (SRCC; 1 is the same order, 0 none)",
        f"  {report['srcc']!s:>6}  the new scorer, cross-validated ({low} to {high}); from {report['method']}",
        f"  {report['default_srcc']!s:>6}  the scorer of {report['default_bundle']}",
        f"bundle {report['name']} {report['version']} in {_one_line(report['bundle'])}; to use it:",
        f"picinspector rescore {report['destination']} --bundle {_one_line(report['bundle'])}",
    ]
    return "\n".join(lines)


def _judgement_text(row: dict[str, Any]) -> str:
    from picinspector.schema import labels_of

    lines = [_one_line(row["uri"])]
    if row["caption"]:
        lines += ["", *textwrap.wrap(_one_line(row["caption"]), _TEXT_WIDTH), ""]
    likely = "" if row["quality_low"] is None else f", likely {row['quality_low']:.1f} to {row['quality_high']:.1f}"
    lines.append(f"quality  {row['quality_score']:.2f} of 10{likely} ({row['scorer_kind']})")
    lines.append(f"scene    {row['scene'].replace('_', ' ')} ({row['scene_probability']:.0%})")
    labels = labels_of(row["scorer_kind"])
    lines += [f"  {labels[name]:<11}{value:5.1f}" for name, value in row["attributes"].items()]
    if row["suggestions"]:
        lines.append("suggestions")
        for suggestion in row["suggestions"]:
            lines += textwrap.wrap(suggestion["text"], _TEXT_WIDTH, initial_indent="  - ", subsequent_indent="    ")
    facts = [f"{name} {value}" for name, value in row["facts"].items() if value is not None and name != "phash"]
    lines.append(f"facts    {_one_line(', '.join(facts))}")
    lines.append("measured " + ", ".join(f"{name} {value:.3g}" for name, value in row["measurements"].items()))
    return "\n".join(lines)


def _critique_text(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        if row["error_kind"]:
            lines.append(f"   -  {_one_line(row['uri'])}: {row['error_kind']}: {row['error_message']}\n")
            continue
        lines.append(f"{row['critic_score']:>4.1f}  {_one_line(row['uri'])}\n      {row['description']}")
        for sign, name in (("+", "strengths"), ("-", "problems"), (">", "suggestions")):
            lines += [f"    {sign} {text}" for text in row[name]]
        lines.append("")
    counts, cost = record["counts"], record["cost_usd"]
    lines.append(
        f"{counts['critiqued']:,} photos criticised by {record['model']}, {counts['failed']:,} failed, "
        f"{counts['unchanged']:,} done before, in {record['seconds']:,.1f} s"
    )
    lines += [f"  {kind}: {number:,}" for kind, number in counts["errors_by_kind"].items()]
    price = "" if cost is None else f", ${cost:,.4f}"
    lines.append(f"{record['tokens_in']:,} prompt and {record['tokens_out']:,} answer tokens{price}")
    if record["critique_id"]:
        lines.append(f"written to {record['destination']}/critiques/critique_id={record['critique_id']}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """A file name as it may be shown in a terminal: no line breaks, no escape sequences."""
    return "".join(character if character.isprintable() else "�" for character in text)
