"""The commands that find the photos worth keeping among those that are scored, without a cluster."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from picinspector.cli.options import BundleRef, Json, StorageOptions, Table, Where, bundle_path, parse_options
from picinspector.cli.words import complain, curated_text, groups_text, ranking_text, report_text
from picinspector.errors import UsageError
from picinspector.text import one_line

if TYPE_CHECKING:
    import pyarrow as pa

    from picinspector.actions import Action
    from picinspector.selection import Selection
    from picinspector.tables import Destination


class Per(StrEnum):
    """What photos are ranked within."""

    album = "album"
    scene = "scene"


Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many; with --per, of each.")]
By = Annotated[
    str, typer.Option(metavar="MEASURE", help="quality_score, an attribute, or a mix: quality_score=2,sharpness=1.")
]
Scene = Annotated[str | None, typer.Option(help="Only photos of this scene.")]
PerOption = Annotated[Per | None, typer.Option(help="Rank each album (folder, prefix) or scene by itself.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print the result as CSV.")]
TableOut = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE", help="Write it to a .parquet or .csv file instead.")
]

BestCount = Annotated[int, typer.Option(min=1, metavar="N", help="How many photos to keep.")]
Diverse = Annotated[bool, typer.Option("--diverse", help="Weigh likeness to what is chosen already against quality.")]
Diversity = Annotated[float | None, typer.Option(min=0, max=1, help="How much, 0 to 1; default with --diverse: 0.5.")]
Quota = Annotated[
    list[str] | None, typer.Option(metavar="SCENE=N", help="At most N of a scene; *=N of every other. May be repeated.")
]
Duplicates = Annotated[bool, typer.Option("--duplicates", help="Also photos of which a better one is in their group.")]
Nearness = Annotated[
    float, typer.Option(metavar="COSINE", min=0.01, max=1, help="Of two embeddings that may be near-duplicates.")
]
NearBits = Annotated[int, typer.Option(metavar="BITS", min=0, max=64, help="Of 64 by which their hashes may differ.")]
BurstSeconds = Annotated[
    float, typer.Option(metavar="S", min=0, max=3600, help="Between two frames of a burst; 0: no bursts.")
]
BurstLikeness = Annotated[
    float, typer.Option(metavar="COSINE", min=0, max=1, help="Of the embeddings of two frames of a burst.")
]
ReportOut = Annotated[str | None, typer.Option("--out", "-o", metavar="HTML", help="The page; default in DEST.")]
Photos = Annotated[int, typer.Option(min=1, metavar="N", help="Photos on the page, at most.")]
MaxPage = Annotated[float, typer.Option(metavar="MB", min=1, max=1000, help="Size of the page; thumbnails give way.")]
Title = Annotated[str, typer.Option(help="Of the page.")]


class Naming(StrEnum):
    """How a photo's sidecar is called."""

    appended = "appended"
    replaced = "replaced"


class Link(StrEnum):
    """How chosen photos are linked."""

    hard = "hard"
    symbolic = "symbolic"


def _ranker(name: str, worst: bool, text: str) -> Callable[..., int]:
    """The command that ranks from this end."""

    def command(
        dest: Table,
        count: Count = 20,
        by: By = "quality_score",
        scene: Scene = None,
        where: Where = None,
        per: PerOption = None,
        as_json: Json = False,
        as_csv: Csv = False,
        out: TableOut = None,
        storage_options: StorageOptions = None,
    ) -> int:
        from picinspector.rank import Ranking, rank

        ranking = Ranking(count, worst, by, scene, where, per.value if per else None)
        rows = rank(_destination(dest, storage_options), ranking)
        _show(rows, as_json, as_csv, out, storage_options)
        return 0

    command.__name__, command.__doc__ = name, text
    return command


top = _ranker("top", False, "Rank the photos of DEST, best first, by the newest committed score of each.")
bottom = _ranker("bottom", True, "Rank the photos of DEST, worst first.")


def _show(
    rows: pa.Table, as_json: bool, as_csv: bool, out: str | None = None, storage_options: str | None = None
) -> None:
    """Print photos, or write them to `out`."""
    if out is not None:
        from picinspector.export import write_table

        write_table(rows, out, parse_options(storage_options))
        print(f"{rows.num_rows:,} photos written to {out}", file=sys.stderr)
    elif as_json:
        print(json.dumps(rows.to_pylist(), indent=2))
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, rows.column_names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.to_pylist())
    else:
        print(ranking_text(rows.to_pylist()))


def groups(
    dest: Table,
    near_similarity: Nearness = 0.75,
    near_bits: NearBits = 10,
    burst_seconds: BurstSeconds = 3.0,
    burst_similarity: BurstLikeness = 0.8,
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Group the photos of DEST: exact copies, near-duplicates, bursts; and say which of each group to keep."""
    from picinspector.groups import Ties, describe, make, save

    tables = _destination(dest, storage_options)
    found = make(tables, Ties(near_similarity, near_bits, burst_seconds, burst_similarity))
    save(tables, found)
    said = describe(found)
    print(json.dumps(said, indent=2) if as_json else groups_text(said))
    return 0


def select(
    dest: Table,
    best: BestCount = 500,
    by: By = "quality_score",
    scene: Scene = None,
    where: Where = None,
    diverse: Diverse = False,
    diversity: Diversity = None,
    quota: Quota = None,
    duplicates: Duplicates = False,
    copy_to: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Copy them below another prefix or folder.")
    ] = None,
    link_to: Annotated[str | None, typer.Option(metavar="FOLDER", help="Link them into a folder.")] = None,
    link: Annotated[Link | None, typer.Option(help="The kind of link; default symbolic.")] = None,
    list_to: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="Write their URIs: .txt, .csv or .parquet.")
    ] = None,
    xmp: Annotated[
        Naming | None,
        typer.Option(help="Write sidecars, photo.jpg.xmp or photo.xmp, for ALL photos the filter leaves."),
    ] = None,
    reject_label: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Of rejects in sidecars; empty for none; default Red.")
    ] = None,
    overwrite_ratings: Annotated[
        bool, typer.Option("--overwrite-ratings", help="Also ratings and labels that a person gave.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show each file to be made; make none, nor groups.")
    ] = False,
    as_json: Json = False,
    as_csv: Csv = False,
    out: TableOut = None,
    storage_options: StorageOptions = None,
) -> int:
    """Choose the photos of DEST to keep: the best, one of each group, diverse if asked; list, copy, link, mark them."""
    from picinspector import export, sidecar
    from picinspector import selection as choosing
    from picinspector.curate import marks
    from picinspector.rank import outermost

    if copy_to is not None and link_to is not None:
        raise UsageError("give --copy-to or --link-to, not both")
    if link is not None and link_to is None:
        raise UsageError("--link says how to link: say where to, with --link-to FOLDER")
    if xmp is None and (overwrite_ratings or reject_label is not None):
        raise UsageError("--overwrite-ratings and --reject-label are of sidecars: say which, with --xmp appended")
    if list_to is not None:
        export.check_suffix(list_to, lists=True)
    if out is not None:
        export.check_suffix(out)
    options, tables = parse_options(storage_options), _destination(dest, storage_options)
    if diversity is None:
        diversity = 0.5 if diverse else 0.0
    wanted = _selection(best, by, scene, where, diversity, quota, duplicates)
    chosen = choosing.select(tables, wanted, keep=not dry_run)
    uris, etags = (chosen.column(name).to_pylist() for name in ("uri", "etag"))
    actions: list[Action] = []
    if copy_to is not None:
        _warn_of_libraries(tables, copy_to)
        actions += export.plan_copy(uris, copy_to, options, outermost(tables), etags)
    if link_to is not None:
        _warn_of_libraries(tables, link_to)
        actions += export.plan_links(uris, link_to, link.value if link else "symbolic", outermost(tables), etags)
    if xmp is not None:
        label = "Red" if reject_label is None else reject_label or None
        said = marks(tables, wanted, label, keep=not dry_run)
        actions += sidecar.plan(said, xmp.value, overwrite_ratings, options)
    for file in (list_to, out) if dry_run else ():
        if file is not None:
            print(f"write {one_line(file)} ({len(uris):,} photos)", file=sys.stderr)
    if list_to is not None and not dry_run:
        export.write_list(uris, list_to, options)
    _show(chosen, as_json, as_csv, None if dry_run else out, storage_options)
    return _carry_out(actions, dry_run)


def _warn_of_libraries(dest: Destination, target: str) -> None:
    from picinspector.export import lies_within
    from picinspector.plan import libraries_of

    for library in sorted(one for one in libraries_of(dest) if lies_within(target, one)):
        print(
            f"note: {one_line(target)} lies in the library {one_line(library)}, whose next run will score the copies",
            file=sys.stderr,
        )


def _carry_out(actions: list[Action], dry_run: bool) -> int:
    """Do these, or say what would be done: each action on a line of stderr, as it is known."""
    from picinspector.actions import carry_out, count, describe

    done = []
    for action in actions if dry_run else carry_out(actions):
        done.append(action)
        if dry_run or action.state == "refused" or action.note:
            print(describe(action), file=sys.stderr)
    if done:
        counts = count(done)
        said = ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)
        print(f"{'dry run: ' if dry_run else ''}{said}", file=sys.stderr)
        if counts["refused"]:
            return complain(f"{counts['refused']:,} files were refused, for the reasons above", 1)
    return 0


def search(
    dest: Table,
    text: Annotated[str | None, typer.Argument(help='What is to be seen, like "night street with neon".')] = None,
    like: Annotated[str | None, typer.Option(metavar="PHOTO", help="A photo that they look like.")] = None,
    count: Count = 20,
    where: Where = None,
    bundle: BundleRef = "builtin",
    as_json: Json = False,
    as_csv: Csv = False,
    out: TableOut = None,
    storage_options: StorageOptions = None,
) -> int:
    """Find photos of DEST by words, where the bundle understands words, or by a photo that they look like."""
    from picinspector.bundle import open_bundle
    from picinspector.search import nearest, text_embedding
    from picinspector.vectors import COLUMN

    if (text is None) == (like is None):
        raise UsageError('say what to look for: words, like "night street with neon", or --like PHOTO')
    opened, options = open_bundle(bundle_path(bundle)), parse_options(storage_options)
    if text is not None:
        query, column = text_embedding(opened, text), "clip_embedding"
    else:
        from picinspector.errors import PhotoError
        from picinspector.stages.single import embed_bytes, fetch_photo

        assert like is not None
        data = fetch_photo(like, options)
        if isinstance(data, PhotoError):
            raise UsageError(f"{one_line(like)}: {data.kind.value}: {data.message}; give another photo")
        query, column = embed_bytes(data, like, opened)[COLUMN], COLUMN
    rows = nearest(_destination(dest, storage_options), opened, query, column, count, where)
    _show(rows, as_json, as_csv, out, storage_options)
    return 0


def report(
    dest: Table,
    out: ReportOut = None,
    photos: Photos = 2000,
    max_megabytes: MaxPage = 25.0,
    title: Title = "Photo report",
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Write a page about DEST that needs no server: the best, the worst, the groups, what went wrong."""
    from picinspector import report as page
    from picinspector.groups import current
    from picinspector.report.digest import Sections

    tables = _destination(dest, storage_options)
    current(tables)
    options = page.Options(
        Sections(photos=photos), max_megabytes, title=title, storage_options=parse_options(storage_options)
    )
    said = page.write(tables, out or tables.url_of("report.html"), options)
    print(json.dumps(said, indent=2) if as_json else report_text(said))
    return 0


def curate(
    dest: Table,
    best: BestCount = 500,
    by: By = "quality_score",
    scene: Scene = None,
    where: Where = None,
    diversity: Annotated[
        float, typer.Option(min=0, max=1, help="How much likeness counts: 0 only quality, 1 only likeness.")
    ] = 0.3,
    quota: Quota = None,
    out: ReportOut = None,
    photos: Photos = 2000,
    max_megabytes: MaxPage = 25.0,
    title: Title = "Photo report",
    as_json: Json = False,
    storage_options: StorageOptions = None,
) -> int:
    """Group the photos of DEST, choose those worth keeping, and write the report."""
    from picinspector import curate as curating
    from picinspector import report as page
    from picinspector.report.digest import Sections

    options = curating.Options(
        _selection(best, by, scene, where, diversity, quota, False),
        out,
        page.Options(Sections(photos=photos), max_megabytes, title=title),
        parse_options(storage_options),
    )
    said = curating.curate(_destination(dest, storage_options), options)
    print(json.dumps(said, indent=2) if as_json else curated_text(said))
    return 0


def _destination(dest: str, storage_options: str | None) -> Destination:
    from picinspector.tables import Destination

    return Destination(dest, parse_options(storage_options))


def _selection(
    best: int, by: str, scene: str | None, where: str | None, diversity: float, quota: list[str] | None, all_: bool
) -> Selection:
    from picinspector.selection import Selection

    quotas: dict[str, int] = {}
    for text in quota or []:
        name, _, number = text.partition("=")
        if not number.isdecimal():
            raise UsageError(f"--quota {one_line(text)}: write it like --quota landscape=50")
        quotas[name] = int(number)
    return Selection(best, by, scene, where, diversity, all_, quotas)
