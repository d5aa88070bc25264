"""A scorer for one person's taste: from the stars they gave photos of a scored library to a bundle of their own."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema, xmp
from picinspector.bundle import Bundle, open_bundle, seal
from picinspector.conformal import Intervals, calibrate
from picinspector.duplicates import content_groups
from picinspector.errors import UsageError
from picinspector.metrics import agreement, bootstrap
from picinspector.recipe import Fit, Recipe
from picinspector.scorer import Scorer, feature_matrix, to_array, write_scorer
from picinspector.storage import open_filesystem, redact
from picinspector.tables import Destination
from picinspector.taste import FOLDS, WAYS, Photos, out_of_fold

#: Fewer leave nothing to check the result with: folds of five, and an interval that could not promise 90 %. Takes of
#: one scene count once.
MIN_RATINGS = 30
_COVERAGE = 0.9
#: Unrated photos that the ridge regression rates for LightGBM, at most: seconds of training, and what was measured on
#: BIQ2021 (docs/training-scorer.md) grew little from 1,500 to 5,000 for tastes that the default scorer does not share.
_UNRATED = 10_000


# --- ratings ----------------------------------------------------------------------------------------------------------


def read_csv(path: str, options: Mapping[str, Any] | None = None) -> dict[str, float]:
    """`uri` (or what it ends with) -> rating, of a CSV with these two columns. A photo rated twice gets the mean.

    Raises:
        UsageError: the file or a column is missing, or a rating is no number.
    """
    import csv
    import io

    filesystem, name = open_filesystem(path, options)
    try:
        text = filesystem.cat_file(name).decode("utf-8-sig")
    except Exception as error:  # a store has errors of its own kinds, and their texts may hold signed URLs
        raise UsageError(
            f"cannot read {redact(path)}: {redact(str(error))}; give a CSV with the columns uri and rating"
        ) from error
    reader = csv.DictReader(io.StringIO(text))
    for column in ("uri", "rating"):
        if column not in (reader.fieldnames or []):
            raise UsageError(f"{redact(path)} has no column {column!r}; it has {list(reader.fieldnames or [])}")
    given: dict[str, list[float]] = {}
    for row in reader:
        try:
            rating = float(row["rating"])
        except (TypeError, ValueError):
            rating = np.nan
        if not np.isfinite(rating) or not row["uri"]:
            said = row["uri"], row["rating"]
            raise UsageError(
                f"{redact(path)}, line {reader.line_num}: {said} is no uri and number; correct or remove it"
            )
        given.setdefault(row["uri"].strip(), []).append(rating)
    return {uri: float(np.mean(ratings)) for uri, ratings in given.items()}


def match(given: Mapping[str, float], uris: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Ratings by the uris of a library, and the names that are not in it. Two names of one photo give their mean.

    Args:
        given: name -> rating; a name is a uri, or the last parts of one, from the file name up.
        uris: of the library.

    Raises:
        UsageError: a name fits several photos.
    """
    known = set(uris)
    by_file: dict[str, list[str]] = {}
    for uri in uris:
        by_file.setdefault(posixpath.basename(uri), []).append(uri)
    found: dict[str, list[float]] = {}
    missing = []
    for name, rating in given.items():
        if name in known:
            found.setdefault(name, []).append(rating)
            continue
        tail = "/" + re.sub(r"^(\.{0,2}/)+", "", posixpath.normpath(name))
        fitting = [uri for uri in by_file.get(posixpath.basename(tail), []) if f"/{uri}".endswith(tail)]
        if len(fitting) > 1:
            raise UsageError(
                f"rating of {name!r} fits {len(fitting)} photos, {fitting[0]} and {fitting[1]}: write more of its path"
            )
        if fitting:
            found.setdefault(fitting[0], []).append(rating)
        else:
            missing.append(name)
    return {uri: float(np.mean(ratings)) for uri, ratings in found.items()}, missing


# --- the whole way ----------------------------------------------------------------------------------------------------


def train(
    dest: str,
    out: str | os.PathLike[str],
    ratings: str | None = None,
    bundle: str = "builtin",
    rating_range: tuple[float, float] | None = None,
    name: str = "personal",
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a scorer on ratings of a scored library and write a bundle with it.

    Args:
        dest: the tables of the library, made with this bundle's encoders.
        out: folder of the new bundle; must not exist.
        ratings: CSV with `uri` and `rating`; None reads `xmp:Rating` from the library's photos and their sidecars.
        bundle: which one to copy; its scorer is replaced.
        rating_range: worst and best rating; None takes those of the data, or of XMP 0 (rejected) or 1 to 5.
        name: of the new bundle.
        seed: of everything random.
        storage_options: fsspec options.

    Returns:
        what was found and how well it agrees, for printing; see `picinspector train scorer --json`.

    Raises:
        UsageError: too few ratings, or they, the tables and the bundle do not fit.
    """
    opened, target, destination = open_bundle(bundle), Path(out), Destination(dest, storage_options)
    if not opened.has("scorer"):
        raise UsageError(f"bundle {opened.name} has no scorer and no attributes to go with one; take another --bundle")
    if _RATED in opened.version:
        raise UsageError(
            f"bundle {opened.name} {opened.version} was trained on ratings, and its opinion would give them away: "
            "give the --bundle that it was made from"
        )
    if target.exists():
        raise UsageError(f"{target} exists; give a new folder for the bundle")
    latest = _latest(destination, opened)
    uris, unreadable = latest.column("uri").to_pylist(), 0
    if ratings is not None:
        rated, missing = match(read_csv(ratings, storage_options), uris)
    else:
        rated, unreadable = xmp.read_ratings(uris, storage_options)
        missing = []
        rejected = any(value == xmp.REJECTED for value in rated.values())
        rated = {uri: max(value, 0.0) for uri, value in rated.items()}  # rejected is one worse than one star
        rating_range = rating_range or (0.0 if rejected else 1.0, 5.0)
    source = redact(ratings) if ratings is not None else "XMP"
    low, high = _check(rated, rating_range, source, len(missing), destination.url)

    photos = _load(destination, latest, rated, opened, seed)
    different = len(np.unique(photos.groups))
    if different < MIN_RATINGS:
        raise UsageError(
            f"{source}: {len(rated)} rated photos are in {destination.url}, near-duplicates counted once {different}; "
            f"rate {MIN_RATINGS} different ones at least"
        )
    recipe = Recipe(label_range=(low, high), seed=seed).without("early_stopping")
    held_out = {way: out_of_fold(photos, way, recipe) for way in WAYS}
    figures = {way: agreement(predicted, photos.ratings) for way, predicted in held_out.items()}
    way = max(figures, key=lambda name: np.nan_to_num(figures[name]["srcc"], nan=-1.0))
    final = WAYS[way](photos, np.arange(len(rated)), recipe)
    intervals = calibrate(final.from_mos(held_out[way]), final.from_mos(photos.ratings), _COVERAGE)
    report = {
        "ratings": source,
        "rated": len(rated),
        "different_photos": different,
        "missing": len(missing),
        "missing_examples": missing[:3],
        "unreadable": unreadable,
        "rating_range": [low, high],
        "method": way,
        "srcc": _round(figures[way]["srcc"]),
        "srcc_low_high": [
            _round(value) for value in bootstrap(held_out[way], photos.ratings, seed=seed, groups=photos.groups)["srcc"]
        ],
        "plcc": _round(figures[way]["plcc"]),
        "rmse": _round(figures[way]["rmse"]),
        "srcc_of": {name: _round(found["srcc"]) for name, found in figures.items()},
        "default_srcc": _round(agreement(photos.default[: len(rated)], photos.ratings)["srcc"]),
        "default_bundle": f"{opened.name} {opened.version}",
    }
    made = _write(opened, target, name, final, photos.features, intervals, report)
    return report | {"bundle": str(target), "name": made.name, "version": made.version, "destination": destination.url}


def _check(
    rated: Mapping[str, float], rating_range: tuple[float, float] | None, source: str, missing: int, dest: str
) -> tuple[float, float]:
    """The range of the ratings, if they can be learnt from."""
    values = list(rated.values())
    if len(values) < MIN_RATINGS:
        lost = f" ({missing} more are not in {dest})" if missing else ""
        raise UsageError(f"{source}: {len(values)} rated photos are in {dest}{lost}; rate {MIN_RATINGS} at least")
    low, high = rating_range or (min(values), max(values))
    if not high > low or min(values) == max(values):
        raise UsageError(f"{source}: all {len(values)} ratings are {values[0]:g}; there is nothing to tell apart")
    if min(values) < low or max(values) > high:
        raise UsageError(
            f"{source}: ratings from {min(values):g} to {max(values):g}, outside of the range {low:g} to {high:g}"
        )
    return low, high


def _round(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


# --- the library ------------------------------------------------------------------------------------------------------


#: How the version of a bundle ends that this module has written.
_RATED = "-ratings"


def _latest(destination: Destination, bundle: Bundle) -> pa.Table:
    """uri and run_id of the newest good embeddings, all of this bundle's encoders."""
    latest = destination.latest("embeddings", ["uri", "run_id", "encoder_fingerprint", "error_kind"])
    good = latest.filter(pc.is_null(latest.column("error_kind")))
    other = pc.sum(pc.not_equal(good.column("encoder_fingerprint"), bundle.encoder_fingerprint), min_count=0).as_py()
    if other:
        raise UsageError(
            f"{destination.url}: {other} of {good.num_rows} photos were embedded by other encoders than those of "
            f"bundle {bundle.name} {bundle.version}; give the --bundle they were scored with"
        )
    return good.select(["uri", "run_id"])


def _load(destination: Destination, latest: pa.Table, rated: Mapping[str, float], bundle: Bundle, seed: int) -> Photos:
    """Features of the rated photos and of a seeded sample of the others, ordered by uri."""
    scorer = Scorer(bundle.piece("scorer"))
    features = tuple(dict.fromkeys((*scorer.features, *schema.MEASUREMENT_FIELDS.names)))
    uris = sorted(latest.column("uri").to_pylist())
    others = [uri for uri in uris if uri not in rated]
    sample = np.random.default_rng(seed).permutation(len(others))[:_UNRATED]
    wanted = {*rated, *(others[index] for index in sample)}
    run_of = dict(zip(latest.column("uri").to_pylist(), latest.column("run_id").to_pylist(), strict=True))
    parts = []
    for run_id in sorted({run_of[uri] for uri in wanted}):
        scanner = destination.scan("embeddings", [run_id], ["uri", "phash", *features])
        assert scanner is not None
        keep = pa.array([uri for uri in wanted if run_of[uri] == run_id], pa.string())
        parts += [
            table
            for batch in scanner.to_batches()
            if (table := pa.table(batch).filter(pc.is_in(batch.column("uri"), value_set=keep))).num_rows
        ]
    table = pa.concat_tables(parts).sort_by("uri")
    is_rated = np.array([uri in rated for uri in table.column("uri").to_pylist()])
    table = table.take(pa.array(np.argsort(~is_rated, kind="stable")))
    columns = {name: to_array(table.column(name)) for name in features}
    widths = tuple(1 if columns[name].ndim == 1 else columns[name].shape[1] for name in features)
    ratings = np.array([rated[uri] for uri in table.column("uri").to_pylist()[: len(rated)]], dtype=np.float64)
    groups = content_groups(table.column("phash").slice(0, len(rated)).combine_chunks().to_numpy())
    quality = scorer.predict(columns).quality_score
    return Photos(features, widths, feature_matrix(columns, features), ratings, groups, quality)


# --- the new bundle ---------------------------------------------------------------------------------------------------


def _write(
    base: Bundle,
    target: Path,
    name: str,
    fitted: Fit,
    features: tuple[str, ...],
    intervals: Intervals,
    report: Mapping[str, Any],
) -> Bundle:
    """A copy of a bundle with this scorer, sealed; whole or not at all."""
    base.verify()  # sealing again would make damage look whole
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for path in base.files:
            if not path.startswith("scorer/"):
                (building / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base.folder / path, building / path)
        write_scorer(
            building / "scorer", fitted.booster, features, fitted.label_min, fitted.label_max, fitted.scaled, intervals
        )
        card = building / "README.md"
        said = card.read_text("utf-8").rstrip() if card.is_file() else f"# {name}"
        card.write_text(f"{said}\n\n{_card(base, report)}", "utf-8")
        seal(building, name, f"{base.version}+{report['rated']}{_RATED}")
        building.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_bundle(target)


def _card(base: Bundle, report: Mapping[str, Any]) -> str:
    """What the new scorer is, for the bundle's card."""
    low, high = report["srcc_low_high"]
    worst, best = report["rating_range"]
    others = ", ".join(f"{way} {srcc}" for way, srcc in report["srcc_of"].items())
    return f"""## The scorer of this bundle: a person's ratings

What the card above says of the quality score is about bundle {base.name} {base.version}, of which this is a copy with
another scorer. `quality_score` here is what one person would say, from 1 (their {worst:g}) to 10 (their {best:g}).

- Trained on {report["rated"]} ratings; near-duplicates counted once, of {report["different_photos"]} photos. No photo
  and no rating is in the bundle.
- Cross-validated on them ({FOLDS} folds, near-duplicates by perceptual hash in one fold): SRCC {report["srcc"]} (95 %
  bootstrap interval {low} to {high}), PLCC {report["plcc"]}, RMSE {report["rmse"]} in the ratings' scale. The scorer of
  {base.name} {base.version}: SRCC {report["default_srcc"]}.
- These figures are for photos that no part of the training saw. Unrated photos of the library took part without a
  rating, and are judged better than that.
- Method: {report["method"]}, the better of two by the same cross-validation ({others}), which flatters it a little.
- `quality_low` and `quality_high` hold {_COVERAGE:.0%} of such ratings, from the errors out of fold.
"""
