"""Photos, degraded copies of them, and what a bundle's heads see in each: what a captioner is trained on.

`python -m training.caption_data --labels LABELS.parquet --out CACHE` decodes every photo once, makes copies with one or
two faults of random strength, judges all of them with a bundle, and writes

::

    CACHE/crops.npy      uint8 (N, S, S, 3), cut as the captioner wants them
    CACHE/facts.parquet  row (of crops.npy), uri, split, kind, severity, attribute_*, scene_*, measured_*

`--builtin-cache` takes crops and embeddings from the cache that `training.train_builtin` has filled, in a minute.

The texts themselves are composed from the facts while training (`picinspector.wording`), so that no wording is seen
twice. `--texts TABLE` takes a person's own instead: CSV, Parquet or JSON lines of `uri`, `text` and, where there is
one, `split`; then there are no copies and no facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from picinspector.bundle import open_bundle
from picinspector.degrade import DEGRADATIONS
from picinspector.duplicates import content_groups
from picinspector.errors import PhotoError, PicInspectorError, UsageError
from picinspector.photo import CropSpec, Photo, decode, foveate
from picinspector.preprocess import captioner_preprocess
from picinspector.schema import ATTRIBUTES, MEASUREMENTS, SCENES
from picinspector.storage import fetch
from training.builtin.cache import Rows, read
from training.builtin.labels import KINDS
from training.captioner_model import PREPROCESS
from training.datasets import LabelledPhoto, absolute_uri, read_biq2021, read_labels
from training.judge import Judge
from training.ladders import png
from training.sheets import local_folder
from training.splits import cut_validation

_BATCH = 64
_MIN_SEVERITY = 0.15
#: Share of the copies with a second fault, as real photos have them.
_SECOND_FAULT = 0.3


def fill(
    photos: Sequence[LabelledPhoto], bundle: str, spec: CropSpec, out: Path, copies: int = 1, seed: int = 0
) -> None:
    """Fill a cache folder: each photo as it is, then `copies` degraded copies of it.

    Args:
        photos: those of split `test` are left out; a tenth of the others, by whole content groups, is `validation`.
        bundle: whose heads say what is to be seen.
        spec: the captioner's crop.
        out: the folder; about S * S * 3 bytes a crop.
        copies: degraded copies of each photo.
        seed: of the split, of the faults and their strengths.

    Raises:
        UsageError: a photo cannot be read; the message names it.
    """
    photos = [photo for photo in photos if photo.split != "test"]
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge(open_bundle(bundle))
    crops = np.lib.format.open_memmap(
        out / "crops.npy", "w+", np.uint8, (len(photos) * (1 + copies), spec.crop_px, spec.crop_px, 3)
    )
    facts: list[pa.Table] = []
    hashes: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        for start, batch in _batches(photos):
            for number in range(1 + copies):
                rng = np.random.default_rng((seed, start, number))
                kinds, severities = _faults(rng, len(batch), number > 0)
                names = [photo.uri for photo in photos[start : start + len(batch)]]
                files = list(pool.map(_degrade, names, batch, kinds, severities, range(start, start + len(batch))))
                cut = list(pool.map(_decode, names, files, [spec] * len(files)))
                if number == 0:
                    hashes += [int(photo.facts["phash"]) for photo in cut]
                rows = np.arange(start, start + len(batch)) + number * len(photos)
                crops[rows] = np.stack([photo.crops[0] for photo in cut])
                facts.append(_facts(judge, files, photos[start : start + len(batch)], kinds, severities, rows))
            if start // _BATCH % 10 == 0:
                print(f"caption_data: {start + len(batch)} of {len(photos)} photos", flush=True)
    table = pa.concat_tables(facts).sort_by("row")
    parts = cut_validation(["train"] * len(photos), content_groups(np.array(hashes, dtype=np.uint64)), seed=seed)
    table = table.append_column("split", pa.array(parts * (1 + copies)))
    crops.flush()
    pq.write_table(table, out / "facts.parquet")  # last: its presence says that the crops are complete


def from_builtin_cache(photos: Sequence[LabelledPhoto], cache: Path, bundle: str, out: Path, seed: int = 0) -> None:
    """As `fill`, of the train photos and copies in the cache of `training.train_builtin`, for the small captioner.

    Args:
        photos: all of the dataset, in the order the cache was filled in.
        cache: the cache, filled by all steps.
        bundle: built from it.
        out: the folder to fill.
        seed: of the split.
    """
    rows = Rows.load(cache)
    use = np.flatnonzero(~rows.test)
    columns = {f"{name}_embedding": read(cache, name)[use] for name in ("clip", "dinov2")}
    measured = read(cache, "measured")[use]
    columns |= {f"measured_{name}": measured[:, index] for index, name in enumerate(MEASUREMENTS)}
    judge = Judge(open_bundle(bundle))
    # The photos are dealt out, their copies follow.
    originals, squares = use[rows.kind[use] < 0], read(cache, "crops")
    parts = cut_validation(["train"] * len(originals), np.load(cache / "groups.npy")[originals], seed=seed)
    part_of = dict(zip(originals.tolist(), parts, strict=True))
    table = {
        "row": np.arange(len(use)),
        "uri": [photos[original].uri for original in rows.original[use]],
        "split": [part_of[original] for original in rows.original[use].tolist()],
        "kind": [KINDS[kind] if kind >= 0 else "" for kind in rows.kind[use]],
        "severity": pa.array([[s] if s > 0 else [] for s in rows.severity[use].tolist()], pa.list_(pa.float32())),
        **_judged(judge, columns),
    }
    out.mkdir(parents=True, exist_ok=True)
    side = PREPROCESS.crop.crop_px
    crops = np.lib.format.open_memmap(out / "crops.npy", "w+", np.uint8, (len(use), side, side, 3))
    for index, row in enumerate(use.tolist()):
        crops[index] = foveate(np.asarray(squares[row]), side)
    crops.flush()
    pq.write_table(pa.table(table), out / "facts.parquet")


def from_texts(path: Path, spec: CropSpec, out: Path, seed: int = 0) -> None:
    """Fill a cache folder with a person's own texts: `text` instead of facts.

    Args:
        path: table of `uri`, `text` and perhaps `split`.
        spec: the captioner's crop.
        out: the folder to fill.
        seed: of the split, where the table has none: by content, a tenth for validation.

    Raises:
        UsageError: a column is missing, a text is empty, or a photo cannot be read; the message names it.
    """
    table = _read_texts(path)
    uris = [absolute_uri(uri, path) for uri in table.column("uri").to_pylist()]
    texts = [" ".join(text.split()) if isinstance(text, str) else "" for text in table.column("text").to_pylist()]
    if "" in texts:
        raise UsageError(f"{path}: no text for {uris[texts.index('')]}; write one or take the row out")
    out.mkdir(parents=True, exist_ok=True)
    side = spec.crop_px
    crops = np.lib.format.open_memmap(out / "crops.npy", "w+", np.uint8, (len(uris), side, side, 3))
    hashes = np.empty(len(uris), dtype=np.uint64)
    for start in range(0, len(uris), _BATCH):
        for row, data in enumerate(fetch(uris[start : start + _BATCH]), start):
            try:
                if isinstance(data, PhotoError):
                    raise data
                photo = decode(data, [spec])
            except PhotoError as error:
                raise UsageError(f"{uris[row]}: {error.message}; take it out of {path.name}") from error
            crops[row], hashes[row] = photo.crops[0], photo.facts["phash"]
    crops.flush()
    if "split" in table.column_names:
        split = table.column("split").to_pylist()
    else:
        split = cut_validation(["train"] * len(uris), content_groups(hashes), seed=seed)
    columns = {"row": np.arange(len(uris)), "uri": uris, "split": split, "text": texts}
    pq.write_table(pa.table(columns), out / "facts.parquet")


def _read_texts(path: Path) -> pa.Table:
    readers = {".parquet": pq.read_table, ".csv": pyarrow.csv.read_csv}
    try:
        table = readers.get(path.suffix.lower(), pyarrow.json.read_json)(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: cannot be read as a table ({reason}); give CSV, Parquet or JSON lines") from error
    if missing := [name for name in ("uri", "text") if name not in table.column_names]:
        raise UsageError(f"{path}: no column {missing[0]}; it has {', '.join(table.column_names)}")
    return table


def _judged(judge: Judge, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of attributes, scenes and measurements, float32 (N,) each, from columns of embeddings."""
    judged = judge.score(columns)
    return {
        **{f"attribute_{name}": judged.attributes[:, i].astype(np.float32) for i, name in enumerate(ATTRIBUTES)},
        **{f"scene_{name}": judged.scenes[:, i].astype(np.float32) for i, name in enumerate(SCENES)},
        **{f"measured_{name}": columns[f"measured_{name}"] for name in MEASUREMENTS},
    }


def _batches(photos: Sequence[LabelledPhoto]) -> Iterator[tuple[int, list[bytes]]]:
    for start in range(0, len(photos), _BATCH):
        uris = [photo.uri for photo in photos[start : start + _BATCH]]
        files = []
        for uri, data in zip(uris, fetch(uris), strict=True):
            if isinstance(data, PhotoError):
                raise UsageError(f"{uri}: {data.message}; take it out of the labels")
            files.append(data)
        yield start, files


def _faults(
    rng: np.random.Generator, count: int, faulty: bool
) -> tuple[list[tuple[str, ...]], list[tuple[float, ...]]]:
    """For each photo the names and severities of its faults; none at all unless `faulty`."""
    if not faulty:
        return [()] * count, [()] * count
    names = list(DEGRADATIONS)
    kinds, severities = [], []
    for _ in range(count):
        number = 2 if rng.random() < _SECOND_FAULT else 1
        kinds.append(tuple(names[index] for index in rng.permutation(len(names))[:number]))
        severities.append(tuple(float(s) for s in rng.uniform(_MIN_SEVERITY, 1.0, number)))
    return kinds, severities


def _decode(uri: str, data: bytes, spec: CropSpec) -> Photo:
    try:
        return decode(data, [spec])
    except PhotoError as error:
        raise UsageError(f"{uri}: {error.message}; take it out of the labels") from error


def _degrade(uri: str, data: bytes, kinds: tuple[str, ...], severities: tuple[float, ...], seed: int) -> bytes:
    if not kinds:
        return data
    # In full, where `decode` would give the working image; OpenCV knows fewer formats.
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise UsageError(f"{uri}: copies are made of JPEG, PNG, WebP, TIFF and BMP; take it out, or use --copies 0")
    image = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    for kind, severity in zip(kinds, severities, strict=True):
        image = DEGRADATIONS[kind](image, severity, seed=seed)
    return png(image)


def _facts(
    judge: Judge,
    files: list[bytes],
    photos: Sequence[LabelledPhoto],
    kinds: list[tuple[str, ...]],
    severities: list[tuple[float, ...]],
    rows: np.ndarray,
) -> pa.Table:
    table = {
        "row": rows,
        "uri": [photo.uri for photo in photos],
        "kind": ["+".join(kind) for kind in kinds],
        "severity": pa.array([list(values) for values in severities], pa.list_(pa.float32())),
        **_judged(judge, judge.embed(files)),
    }
    return pa.table(table)


def main() -> None:
    """Parse the command line and fill the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--biq2021", type=Path, help="BIQ2021 checkout: its train split")
    source.add_argument("--texts", type=Path, help="a person's own texts: CSV, Parquet or JSON lines of uri, text")
    source.add_argument("--labels", type=Path, help="a labels table of training.datasets: all but its test split")
    parser.add_argument("--builtin-cache", type=Path, help="with --biq2021: train_builtin's cache, instead of decoding")
    parser.add_argument("--bundle", default="builtin", help="whose heads say what is to be seen")
    parser.add_argument("--captioner", type=Path, help="captioner folder to cut for (default: the small one)")
    parser.add_argument("--copies", type=int, default=1, help="degraded copies of each photo (default: 1)")
    parser.add_argument("--limit", type=int, help="only the first so many photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=local_folder, required=True, help="the cache folder")
    args = parser.parse_args()
    try:
        spec = captioner_preprocess(args.captioner).crop if args.captioner is not None else PREPROCESS.crop
        if args.texts is not None:
            from_texts(args.texts, spec, args.out, args.seed)
            return
        photos = read_biq2021(args.biq2021) if args.biq2021 is not None else read_labels(args.labels)
        if args.builtin_cache is not None:
            from_builtin_cache(photos, args.builtin_cache, args.bundle, args.out, args.seed)
            return
        fill(photos[: args.limit], args.bundle, spec, args.out, args.copies, args.seed)
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
