"""Damaged photos without end: `python -m benchmarks.fuzz --seed 0 [--files N]`.

Every awkward file of `tests.awkward`, its hazards and a camera raw, each changed in about a hundred ways: bits flipped
at several rates, in the head and everywhere; cut off at every 5 %; lengths, counts and dimensions that lie; another
format's magic; junk behind the end; stretches of zeros. The read stage decodes each in a child process with a bound on
its memory, and on its time on the processor, which other programs may be using too. Exit code 1 if one crashes, hangs,
or ends in anything but a photo or an error kind.
"""

from __future__ import annotations

import argparse
import itertools
import os
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from picinspector.errors import ErrorKind, PhotoError
from picinspector.photo import CropSpec, Limits
from picinspector.stages import peak_memory_bytes
from picinspector.stages.guard import Guard
from picinspector.stages.read import read_photo
from tests.awkward import dng, hazards, make_corpus

TIMEOUT_S = 10.0
MEMORY_BYTES = 6 * 1024**3
CROPS = {
    "clip_crop": CropSpec(224, 224),
    "dinov2_crop": CropSpec(256, 224, "bilinear", "squash"),
    "captioner_crop": CropSpec(384, 192, mode="foveated"),
}

_HEAD_BYTES = 512
#: What a decoder may compute with, or set memory aside for.
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_MAGIC = (
    b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    b"GIF89a",
    b"BM",
    b"II*\x00\x08\x00\x00\x00",
    b"MM\x00*\x00\x00\x00\x08",
    b"RIFF\x40\x00\x00\x00WEBPVP8 ",
    b"RIFF\x40\x00\x00\x00WEBPVP8X",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
    b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1miaf",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        name: of the file it was made from, and the change.
        verdict: `scored`, or an error kind; `crash`, `hang`, or what else was raised.
        seconds: of processor time, for decoding.
        memory_bytes: the most that its process has had until then.
        message: of the error.
    """

    name: str
    verdict: str
    seconds: float
    memory_bytes: int
    message: str = ""

    @property
    def bad(self) -> bool:
        """Neither a photo nor a row's error."""
        return self.verdict != "scored" and self.verdict not in {kind.value for kind in ErrorKind}


def originals() -> dict[str, bytes]:
    """The files before any change, by name."""
    with tempfile.TemporaryDirectory() as folder:
        files = {case.name: case.path.read_bytes() for case in make_corpus(Path(folder))}
    return files | hazards() | {"camera.dng": dng(6)}


def mutants(seed: int, files: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Changed files by name (the original's, and the change), the same for the same seed; a sample of so many."""
    makers = [(name, change, make) for name, data in originals().items() for change, make in _changes(data)]
    picks = np.arange(len(makers))
    if files is not None and files < len(makers):
        picks = np.sort(np.random.default_rng(seed).permutation(len(makers))[:files])
    for name, change, make in (makers[pick] for pick in picks):
        rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{change}".encode())])
        yield f"{name}/{change}", make(rng)


_Make = Callable[[np.random.Generator], bytes]


def _changes(data: bytes) -> Iterator[tuple[str, _Make]]:
    yield "as is", lambda _: data
    if not data:
        return
    for percent in range(5, 100, 5):
        yield f"cut at {percent} %", lambda _, keep=percent: data[: len(data) * keep // 100]
    for rate, reach, number in itertools.product((1e-4, 1e-3, 1e-2, 0.1), (_HEAD_BYTES, len(data)), range(3)):
        yield f"flip {rate:g} of {reach} {number}", lambda rng, r=rate, n=reach: _flip(data, r, n, rng)
    for number in range(8):
        yield f"one bit of the head {number}", lambda rng: _flip(data, 0.0, 64, rng)
    for number in range(24):
        yield f"lie {number}", lambda rng: _lie(data, rng)
    for number in range(8):
        yield f"lie about a field {number}", lambda rng: _lie_about_field(data, rng)
    for number, magic in enumerate(_MAGIC):
        yield f"magic {number}", lambda _, start=magic: start + data[len(start) :]
    for number in range(3):
        yield f"junk behind {number}", lambda rng: data + rng.bytes(int(rng.integers(1, 200_000)))
    for number, share in itertools.product(range(3), (0.01, 0.1, 0.5)):
        yield f"zeros {share:g} {number}", lambda rng, part=share: _blank(data, part, rng)


def _flip(data: bytes, rate: float, reach: int, rng: np.random.Generator) -> bytes:
    """Bits changed in the first `reach` bytes: each with this probability, one at least."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    stop = min(8 * reach, len(bits))
    bits[:stop] ^= rng.random(stop) < rate
    bits[int(rng.integers(stop))] ^= 1
    return np.packbits(bits).tobytes()


def _lie(data: bytes, rng: np.random.Generator) -> bytes:
    """One number near the start exchanged for an extreme one, of two or four bytes, in either order of bytes."""
    kind = [">H", "<H", ">I", "<I"][int(rng.integers(4))]
    size = struct.calcsize(kind)
    if len(data) <= size:
        return data
    changed = bytearray(data)
    value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] & (2 ** (8 * size) - 1)
    struct.pack_into(kind, changed, int(rng.integers(min(len(data), _HEAD_BYTES) - size + 1)), value)
    return bytes(changed)


def _lie_about_field(data: bytes, rng: np.random.Generator) -> bytes:
    """A length, a count or a dimension of the format, exchanged for an extreme one; a PNG's checksum is mended."""
    fields = _fields(data)
    if not fields:
        return _lie(data, rng)
    place, kind = fields[int(rng.integers(len(fields)))]
    size = struct.calcsize(kind)
    changed = bytearray(data)
    value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] & (2 ** (8 * size) - 1)
    if place + size <= len(changed):
        struct.pack_into(kind, changed, place, value)
    if data.startswith(b"\x89PNG") and changed[12:16] == b"IHDR":
        struct.pack_into(">I", changed, 29, zlib.crc32(changed[12:29]))
    return bytes(changed)


def _fields(data: bytes) -> list[tuple[int, str]]:
    """Where a format keeps its lengths, counts and dimensions: offset, and how they are written."""
    if data.startswith(b"\x89PNG"):
        fields, place = [(16, ">I"), (20, ">I")], 8
        while place + 8 <= len(data) and len(fields) < 40:
            fields.append((place, ">I"))
            place += 12 + int.from_bytes(data[place : place + 4], "big")
        return fields
    if data.startswith(b"\xff\xd8"):
        fields, place = [], 2
        while place + 4 <= len(data) and data[place] == 0xFF:
            marker = data[place + 1]
            fields.append((place + 2, ">H"))
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                fields += [(place + 5, ">H"), (place + 7, ">H"), (place + 8, ">H")] * 2
            if data[place + 4 : place + 8] == b"Exif":
                fields += [(place + 10 + step, "<I") for step in range(4, 120, 6)]
            if marker == 0xDA:
                break
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        return fields
    if data[:2] in (b"II", b"MM"):
        order = "<" if data[:2] == b"II" else ">"
        directory = struct.unpack_from(f"{order}I", data, 4)[0] if len(data) >= 8 else 0
        count = struct.unpack_from(f"{order}H", data, directory)[0] if directory + 2 <= len(data) else 0
        entries = range(directory + 2, min(directory + 2 + 12 * count, len(data)), 12)
        kinds = ((0, "H"), (2, "H"), (4, "I"), (8, "I"))  # tag, type, count, value
        fields = [(entry + step, order + kind) for entry in entries for step, kind in kinds]
        return [*fields, (4, f"{order}I"), (directory, f"{order}H"), (directory + 2 + 12 * count, f"{order}I")]
    if data[4:8] == b"ftyp":
        names = (
            b"ispe",
            b"pixi",
            b"iloc",
            b"iinf",
            b"iref",
            b"ipma",
            b"ipco",
            b"hvcC",
            b"av1C",
            b"mdat",
            b"irot",
            b"meta",
        )
        places = [data.find(name) for name in names]
        return [(place + step, ">I") for place in places if place > 0 for step in (-4, 4, 8, 12)]
    if data.startswith(b"RIFF"):
        return [(4, "<I"), (16, "<I"), (20, "<I"), (24, "<H"), (26, "<H"), (27, "<H")]
    if data.startswith(b"GIF8"):
        return [(6, "<H"), (8, "<H"), (10, ">H"), (13, "<H")]
    if data.startswith(b"BM"):
        return [(step, "<I") for step in (2, 10, 14, 18, 22, 28, 30, 34, 46)]
    return []


def _blank(data: bytes, share: float, rng: np.random.Generator) -> bytes:
    size = max(1, int(len(data) * share))
    start = int(rng.integers(0, len(data) - size + 1))
    return data[:start] + bytes(size) + data[start + size :]


# --- decoding ---------------------------------------------------------------------------------------------------------


def examine(data: bytes, suffix: str) -> tuple[str, str, float, int]:
    """In the child: verdict, message, seconds, and the most memory of the process so far."""
    started = time.process_time()
    row = read_photo(data, CROPS, Limits(), suffix)
    seconds = time.process_time() - started
    return row.get("error_kind") or "scored", row.get("error_message") or "", seconds, peak_memory_bytes()


def decode_all(files: Iterator[tuple[str, bytes]], workers: int) -> Iterator[Outcome]:
    """What becomes of each file, in any order of finishing within a worker."""
    lock = threading.Lock()

    def work() -> list[Outcome]:
        outcomes = []
        with Guard(examine, TIMEOUT_S, MEMORY_BYTES) as guard:
            while True:
                with lock:
                    name, data = next(files, ("", b""))
                if not name:
                    return outcomes
                outcomes.append(_outcome(guard, name, data))

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            yield from future.result()


def _outcome(guard: Guard[tuple[str, str, float, int]], name: str, data: bytes) -> Outcome:
    try:
        verdict, message, seconds, memory = guard(data, Path(name.partition("/")[0]).suffix)
        return Outcome(name, verdict, seconds, memory, message)
    except PhotoError as error:
        verdict = "hang" if "takes longer" in error.message else "crash"
        return Outcome(name, verdict, TIMEOUT_S if verdict == "hang" else 0.0, 0, error.message)
    except Exception as error:  # what `read_photo` must not raise
        return Outcome(name, type(error).__name__, 0.0, 0, str(error)[:200])


def main() -> int:
    """Decode, report, and say by the exit code whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, help="a sample of so many (default: all)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, help="write the files that are not well here")
    arguments = parser.parse_args()
    started = time.perf_counter()
    outcomes = list(decode_all(mutants(arguments.seed, arguments.files), arguments.workers))
    bad = [outcome for outcome in outcomes if outcome.bad]
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:5]
    print(f"{len(outcomes)} files, seed {arguments.seed}, {time.perf_counter() - started:.0f} s")
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    print(f"crashes {verdicts['crash']}, hangs over {TIMEOUT_S:g} s {verdicts['hang']}, without a verdict "
          f"{len(bad) - verdicts['crash'] - verdicts['hang']}")  # fmt: skip
    print(f"peak memory of a child {max(outcome.memory_bytes for outcome in outcomes) / 1024**2:.0f} MiB")
    print("slowest: " + ", ".join(f"{outcome.name} {outcome.seconds:.2f} s" for outcome in slowest))
    for outcome in bad:
        print(f"NOT WELL {outcome.name}: {outcome.verdict}: {outcome.message}", file=sys.stderr)
    if arguments.keep is not None and bad:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        names = {outcome.name for outcome in bad}
        for name, data in mutants(arguments.seed, arguments.files):
            if name in names:
                (arguments.keep / name.replace("/", "_")).write_bytes(data)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
