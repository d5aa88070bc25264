"""The same photos by several tools: `python -m benchmarks.peers [--size 12mp|2mp] [--photos N] [--rounds R]`.

The contenders are in `benchmarks/contenders/`; what they share and what is on their clock stands there. Each runs in a
process of its own over a large library and over a small one of the same photos, in turns. Of the two come:

- photos/s: the large library, start-up included;
- steady photos/s: the slope between the two, which is what a library of any size comes to in the end;
- peak memory, of the process and all its descendants, over the large library.

Daft wants an older pyarrow than this project does. It lies in a folder of its own, which `--daft` names and which only
its contender sees; without one Daft is left out::

    pip install --no-deps --target FOLDER daft==0.7.26 'pyarrow<26'

Their embeddings are compared, and it ends with an error where they disagree: other work would be no comparison.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import libraries, ratios

#: By contender: what it is, and what `ours` is to reach against it, in photos/s.
PEERS = {
    "plain_ray": ("plain Ray Data", 2.0),
    "daft_batch": ("Daft", 1.5),
    "dataloader": ("torch DataLoader, two workers", 1.2),
    "one_by_one": ("one by one, fp32", 5.0),
}
OURS = "ours"
#: What `ours` may have of plain Ray Data's peak memory.
_MEMORY_TARGET = 0.5
#: Photos of the small library: two batches of the default, so that two workers work. And what one_by_one is spared.
_SMALL, _PART_ONE_BY_ONE = 2 / 5, 1 / 4
#: Two decoders, two resizers and two precisions on the way to one embedding; measured: 0.99 and more.
_LEAST_COSINE = 0.98
#: Ray gives its workers a lower priority than their neighbours on the machine have; the others' workers keep theirs.
_ENVIRONMENT = {"RAY_worker_niceness": "0"}
#: By contender: a folder with packages that only it sees.
_OWN_PACKAGES: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a contender did in a round.

    Attributes:
        small, large: photos of the two libraries.
        small_s, large_s: seconds they took, from the first work to the table written.
        peak_bytes: of memory, over the large library.
    """

    small: int
    large: int
    small_s: float
    large_s: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Photos/s of the large library, start-up included."""
        return self.large / self.large_s


def steady_rates(outcomes: Sequence[Outcome]) -> list[float]:
    """Photos/s once it runs, one a round: of the photos and the seconds that the large library has more.

    Start-up varies by more than a few photos take, so the small library's seconds are the median of all rounds.

    Raises:
        RuntimeError: a large library took no longer than the small one: too short, or the machine too busy, to tell.
    """
    small_s = statistics.median(outcome.small_s for outcome in outcomes)
    if any(outcome.large_s <= small_s for outcome in outcomes):
        raise RuntimeError(
            "the large library took no longer than the small one: use more --photos, or a quieter machine"
        )
    return [(outcome.large - outcome.small) / (outcome.large_s - small_s) for outcome in outcomes]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=libraries.SIZES, default="12mp", help="of the photos (default 12mp)")
    parser.add_argument("--photos", type=int, default=128, help="in the large library (default 128)")
    parser.add_argument("--rounds", type=int, default=3, help="the medians count (default 3)")
    parser.add_argument("--only", nargs="+", choices=[OURS, *PEERS], help="contenders (default all)")
    parser.add_argument("--daft", type=Path, help="the folder with Daft and its pyarrow")
    parser.add_argument("--scratch", type=Path, help="where libraries and tables go; default a temporary folder")
    arguments = parser.parse_args()
    names = arguments.only or [OURS, *PEERS]
    if arguments.daft is not None:
        _OWN_PACKAGES["daft_batch"] = str(arguments.daft.absolute())
    elif "daft_batch" in names:
        names.remove("daft_batch")
        print("without Daft: --daft names the folder it is in, see --help", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="peers-") as scratch:
        outcomes = measure(names, arguments.size, arguments.photos, arguments.rounds, Path(scratch))
    title = f"{arguments.photos} photos of {arguments.size}, {arguments.rounds} rounds"
    ratios.show(title, rows(outcomes))
    print(figures(outcomes))


def measure(names: Sequence[str], size: str, photos: int, rounds: int, scratch: Path) -> dict[str, list[Outcome]]:
    """Let contenders take turns.

    Returns:
        outcomes by contender, one a round.

    Raises:
        RuntimeError: one failed, left photos out, or has other embeddings than the rest.
    """
    libraries.make(scratch / "photos", photos, size)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for turn in range(rounds):
        tables = {}
        for name in list(names[turn % len(names) :]) + list(names[: turn % len(names)]):
            count = photos if name != "one_by_one" else max(2, int(photos * _PART_ONE_BY_ONE))
            outcome, tables[name] = race(name, scratch, count)
            outcomes[name].append(outcome)
            print(f"  round {turn + 1}: {name} {outcome}", file=sys.stderr, flush=True)
        check_same(tables)
    return outcomes


def race(name: str, scratch: Path, photos: int) -> tuple[Outcome, dict[str, dict[str, np.ndarray]]]:
    """Let one contender do a small and a large library of the photos in `scratch`.

    Returns:
        what it did; the embeddings of the large library, see `read_embeddings`.

    Raises:
        RuntimeError: it failed or left photos out.
    """
    seconds, peak_bytes, small = {}, 0, max(1, int(photos * _SMALL))
    for count in (small, photos):
        library, out = sample(scratch / "photos", scratch / f"photos-{count}", count), scratch / "out" / name
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", f"benchmarks.contenders.{name}", str(library), str(out)]
        packages = {"PYTHONPATH": _OWN_PACKAGES[name]} if name in _OWN_PACKAGES else {}
        finished = ratios.run_alone(command, _ENVIRONMENT | packages)
        if finished.answer["photos"] != count:
            raise RuntimeError(f"{name} did {finished.answer['photos']} of {count} photos")
        seconds[count], peak_bytes = finished.answer["seconds"], finished.peak_bytes
    return Outcome(small, photos, seconds[small], seconds[photos], peak_bytes), read_embeddings(out)


def sample(photos: Path, folder: Path, count: int) -> Path:
    """A folder of the first so many photos; the same files, under other names."""
    if not folder.is_dir():
        folder.mkdir()
        for path in sorted(photos.iterdir())[:count]:
            (folder / path.name).hardlink_to(path)
    return folder


def read_embeddings(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """By column and file name: the embeddings in a contender's table, float64, L2-normalised."""
    embeddings: dict[str, dict[str, np.ndarray]] = {"clip_embedding": {}, "dinov2_embedding": {}}
    folder = out / "embeddings" if (out / "embeddings").is_dir() else out  # our runs have other tables beside it
    for path in sorted(folder.rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        names = [Path(uri).name for uri in table.column("uri" if "uri" in table.column_names else "path").to_pylist()]
        for column, found in embeddings.items():
            values = np.array(table.column(column).to_pylist(), np.float64)
            found |= dict(zip(names, values / np.linalg.norm(values, axis=1, keepdims=True), strict=True))
    return embeddings


def check_same(tables: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """See that contenders embedded the same photos alike: close by cosine, and no other photo closer.

    Args:
        tables: by contender, see `read_embeddings`. One may have fewer photos than another.

    Raises:
        RuntimeError: they did not.
    """
    (first, reference), *others = tables.items()
    for name, table in others:
        for column in reference:
            names = sorted(reference[column].keys() & table[column].keys())
            if len(names) != min(len(reference[column]), len(table[column])):
                raise RuntimeError(f"{first} and {name} embedded other photos")
            a, b = (np.stack([one[column][photo] for photo in names]) for one in (reference, table))
            cosines = a @ b.T
            same = cosines.diagonal()
            # Copies of a photo are as close as the photo itself, but for rounding.
            if same.min() < _LEAST_COSINE or (cosines.max(axis=1) - same).max() > 1e-3:
                raise RuntimeError(
                    f"{column} of {first} and {name}: cosine {same.min():.3f} at least, where {_LEAST_COSINE} was "
                    f"expected; another photo is closer by {(cosines.max(axis=1) - same).max():.3f} at most"
                )


def rows(outcomes: Mapping[str, Sequence[Outcome]]) -> list[ratios.Row]:
    """The ratios of `ours` to each peer that was measured."""
    peers = {name: peer for name, peer in PEERS.items() if name in outcomes} if OURS in outcomes else {}
    steady = {name: steady_rates(rounds) for name, rounds in outcomes.items()} if peers else {}
    rates = {name: [outcome.rate for outcome in rounds] for name, rounds in outcomes.items()}
    memory = {name: [outcome.peak_bytes / 1e9 for outcome in rounds] for name, rounds in outcomes.items()}
    found = []
    for measured, words in ((steady, ""), (rates, ", start-up included")):
        for name, (title, target) in peers.items():
            of = f"{statistics.median(measured[OURS]):.2f} / {statistics.median(measured[name]):.2f} photos/s"
            found.append(
                ratios.Row(f"photos/s over {title}{words}", ratios.over(measured, OURS, name), target, figures=of)
            )
    for name, (title, _) in peers.items():
        of, target = f"{statistics.median(memory[OURS]):.2f} / {statistics.median(memory[name]):.2f} GB", None
        if name == "plain_ray":
            target = _MEMORY_TARGET
        found.append(ratios.Row(f"peak memory over {title}", ratios.over(memory, OURS, name), target, True, of))
    return found


def figures(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """What each contender did: medians, as Markdown."""
    lines = ["\n| contender | steady photos/s | photos/s | start-up s | peak GB |", "|---|---|---|---|---|"]
    for name, rounds in outcomes.items():
        steady, small_s = (
            statistics.median(steady_rates(rounds)),
            statistics.median([outcome.small_s for outcome in rounds]),
        )
        rate, peak = (
            statistics.median([outcome.rate for outcome in rounds]),
            statistics.median([one.peak_bytes for one in rounds]),
        )
        start_s = small_s - rounds[0].small / steady
        lines.append(f"| {name} | {steady:.2f} | {rate:.2f} | {start_s:.1f} | {peak / 1e9:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
