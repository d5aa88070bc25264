"""The commands that look at photos or at what a destination holds, without a cluster."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from picinspector import errors
from picinspector.cli.options import (
    Best,
    BundleRef,
    Json,
    StorageOptions,
    Table,
    Where,
    Worst,
    bundle_path,
    parse_options,
)
from picinspector.cli.words import complain, critique_text, drift_text, judgement_text, verified_text
from picinspector.errors import UsageError
from picinspector.text import one_line

_DRIFTED = 4


def diff(
    dest: Table,
    runs: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Ids of two runs, or their beginnings; default the two newest that scored."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Risers and fallers to name.")] = 10,
    fail_over: Annotated[
        float | None,
        typer.Option(metavar="PSI", min=0, help="Exit with 4 where a distribution shifted by more; 0.25 is customary."),
    ] = None,
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Compare the scores of DEST as of two runs: which photos moved, how far the distributions shifted."""
    from picinspector import drift
    from picinspector.tables import Destination

    destination = Destination(dest, parse_options(storage_options))
    report = drift.compare(destination, *drift.run_pair(destination, runs or ()), count)
    report["warnings"] = drift.warnings(report, drift.PSI_THRESHOLD if fail_over is None else fail_over)
    print(json.dumps(report, indent=2) if as_json else drift_text(report))
    return _DRIFTED if fail_over is not None and report["warnings"] else 0


def verify(
    dest: Table,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read footers, ids, errors and fingerprints only, not all values.")
    ] = False,
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Check that the tables of DEST are whole: files, rows, schema, fingerprints, values. 1 if they are not."""
    from picinspector.tables import Destination
    from picinspector.verify import verify as verify_tables

    report = verify_tables(Destination(dest, parse_options(storage_options)), quick)
    print(json.dumps(report.to_json(), indent=2) if as_json else verified_text(report.to_json()))
    return 0 if report.whole else 1


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
        raise UsageError(f"--plot {one_line(plot)}: it is written as PNG; give a name that ends in .png")
    data = fetch_photo(photo, parse_options(storage_options), allow_private)
    row = judge_bytes(data, photo, bundle_path(bundle))
    if as_json:
        print(json.dumps(row, indent=2, default=str))
    elif row["error_kind"]:
        complain(one_line(f"{row['uri']}: {row['error_kind']}: {row['error_message']}"), 1)
    else:
        print(judgement_text(row))
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
        raise UsageError(f"{one_line(path)}: cannot be written ({error.strerror}); give another place") from error


def critique(
    dest: Table,
    critic_url: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible API, like https://api.openai.com/v1.")
    ],
    critic_model: Annotated[str, typer.Option(metavar="NAME", help="A model of it that sees pictures.")],
    best: Best = None,
    worst: Worst = None,
    where: Where = None,
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

    options = parse_options(storage_options)
    prices = chat.Prices(price_in, price_out, max_cost)
    key = chat.key_from_environment()
    endpoint = chat.Endpoint(critic_url, critic_model, key, timeout, retries, concurrency, max_tokens)
    destination = Destination(dest, options)
    rows = critic.select(destination, best, worst, where)

    def show(done: int, to_do: int) -> None:
        if sys.stderr.isatty():
            print(f"\rcritique: {done:,} of {to_do:,} photos", end="\n" if done == to_do else "", file=sys.stderr)

    record = critic.critique(destination, rows, endpoint, prices, again, options, on_row=show)
    print(json.dumps(record, indent=2, default=str) if as_json else critique_text(record))
    return 3 if record["counts"]["failed_transient"] else 0
