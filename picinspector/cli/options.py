"""The arguments and options that more than one command takes, and how their texts are read."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from picinspector.errors import UsageError

if TYPE_CHECKING:
    from picinspector.photo import Limits

Library = Annotated[str, typer.Argument(help="s3:// prefix, folder, photo, or a .parquet/.csv/.txt list of photos.")]
Table = Annotated[str, typer.Argument(metavar="DEST", help="Where the tables are: s3:// prefix or folder.")]
Out = Annotated[str, typer.Option("--out", "-o", metavar="DEST", help="Where the tables go: s3:// prefix or folder.")]
BundleArgument = Annotated[str, typer.Argument(help="builtin, full, or a folder.")]
BundleRef = Annotated[str, typer.Option(help="builtin, full, or the folder of a bundle.")]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help='fsspec options, e.g. {"endpoint_url": "..."}; keys are better in the environment.'
    ),
]
Encoders = Annotated[int | None, typer.Option(min=1, help="Encoder actors; default from the cluster.")]
GpusPerEncoder = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each, may be a fraction; 0 encodes on the CPU.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Photos of one encoder call.")]
MaxCpus = Annotated[
    int | None, typer.Option(min=1, help="CPUs that the run holds at once, at most; default all of the cluster.")
]
KeepDays = Annotated[float, typer.Option(min=0, help="Every state of the last so many days stays.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Do at most this many photos.")]
MaxMegapixels = Annotated[float, typer.Option(min=0, help="Refuse photos with more pixels.")]
MaxMegabytes = Annotated[float, typer.Option(min=0, help="Refuse larger files.")]
Best = Annotated[int | None, typer.Option(min=1, metavar="N", help="The N best photos.")]
Worst = Annotated[int | None, typer.Option(min=1, metavar="N", help="The N worst photos.")]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="SQL",
        help="Of the photos for which this holds: DuckDB's SQL over the scores, e.g. \"scene = 'human'\".",
    ),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else Ray on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress line.")]


class RetryFailed(StrEnum):
    """Which photos that failed before are done again."""

    transient = "transient"
    all = "all"
    none = "none"


class Captions(StrEnum):
    """Which photos are described."""

    all = "all"
    none = "none"


Retry = Annotated[
    RetryFailed, typer.Option(help="Failed photos to do again: those whose failure may pass, all, or none.")
]
Describe = Annotated[Captions, typer.Option(help="Describe every photo, or none.")]

#: Defaults of `MaxMegapixels` and `MaxMegabytes`.
MAX_MEGAPIXELS, MAX_MEGABYTES = 300.0, 512.0


def limits(max_megapixels: float, max_megabytes: float) -> Limits:
    """What a photo may cost, from the units of the command line."""
    from picinspector.photo import Limits

    return Limits(max_bytes=int(max_megabytes * 1024**2), max_pixels=int(max_megapixels * 1e6))


def parse_options(text: str | None) -> dict[str, Any] | None:
    """The object that `--storage-options` spells.

    Raises:
        UsageError: it spells none.
    """
    if text is None:
        return None
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UsageError(f'--storage-options is not JSON ({error}); write it like {{"anon": true}}') from error
    if not isinstance(options, dict):
        raise UsageError('--storage-options must be a JSON object, like {"anon": true}')
    return options


def bundle_path(ref: str) -> str:
    """A bundle as workers find it too."""
    # Workers start in other folders: a relative path would be another bundle there.
    return ref if ref in ("builtin", "full") else os.path.abspath(ref)  # noqa: PTH100
