"""What `make demo` runs: a small library of real photos and their ruins, scored, ranked, grouped, shown.

The photos are the ones scikit-image and scikit-learn carry in their wheels; none of them was trained on. Each is joined
by controlled degradations of itself, and a few broken files lie among them.
"""

from __future__ import annotations

import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image, ImageDraw, ImageOps

from picinspector.cli import main
from picinspector.degrade import DEGRADATIONS
from picinspector.rank import Ranking, failures, rank
from picinspector.tables import Destination

#: Severities of `picinspector.degrade`.
SEVERITIES = {"mild": 0.4, "strong": 1.0}

_THUMBNAIL_PX = 190


def real_photos() -> dict[str, np.ndarray]:
    """Name -> uint8 RGB (H, W, 3): seven photographs from the wheels, no network."""
    photos = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    photos["hubble"] = skimage.data.hubble_deep_field()
    for name in ("china", "flower"):
        photos[name] = sklearn.datasets.load_sample_image(f"{name}.jpg")
    return photos


def build_library(folder: Path) -> None:
    """Write `<photo>/pristine.jpg`, `<photo>/<degradation>-<severity>.jpg`, and `broken/*`."""
    for name, pixels in real_photos().items():
        (folder / name).mkdir(parents=True)
        _save(pixels, folder / name / "pristine.jpg")
        for kind, degrade in DEGRADATIONS.items():
            for word, severity in SEVERITIES.items():
                _save(degrade(pixels, severity), folder / name / f"{kind}-{word}.jpg")
    broken = folder / "broken"
    broken.mkdir()
    whole = (folder / "coffee" / "pristine.jpg").read_bytes()
    (broken / "empty.jpg").write_bytes(b"")
    (broken / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "letter.jpg").write_text("Dear diary, this is not a photograph.\n")
    (broken / "bomb.png").write_bytes(_bomb())


def _bomb() -> bytes:
    """A sound PNG header that promises 30,000 x 30,000 pixels, and next to no data."""
    header = (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    )


def _save(pixels: np.ndarray, path: Path) -> None:
    # Barely compressed: what ranks low must do so for the degradation, not for how it was stored.
    Image.fromarray(pixels).save(path, quality=96, subsampling=0)


def pairs_won(scores: dict[str, float], severity: str = "strong") -> tuple[int, int]:
    """How many pristine photos outrank their own degradation of this severity, of how many pairs.

    Args:
        scores: `<photo>/<version>` -> `quality_score`.
        severity: a key of `SEVERITIES`.
    """
    pairs = [
        (scores[f"{name.split('/')[0]}/pristine"], score)
        for name, score in scores.items()
        if name.endswith(f"-{severity}")
    ]
    return sum(pristine > ruined for pristine, ruined in pairs), len(pairs)


def scores_by_name(dest: Destination) -> dict[str, float]:
    """`<photo>/<version>` -> `quality_score` of everything scored in the demo's library."""
    rows = rank(dest, Ranking(None)).to_pylist()
    return {"/".join(Path(row["uri"]).with_suffix("").parts[-2:]): row["quality_score"] for row in rows}


def draw_gallery(rows: list[dict[str, object]], path: Path, columns: int = 6) -> None:
    """A contact sheet of these photos, in order, each with its score."""
    cell = _THUMBNAIL_PX + 22
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * _THUMBNAIL_PX, lines * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        x, y = index % columns * _THUMBNAIL_PX, index // columns * cell
        with Image.open(str(row["uri"])) as photo:
            sheet.paste(ImageOps.pad(photo.convert("RGB"), (_THUMBNAIL_PX - 6, _THUMBNAIL_PX), color="white"), (x, y))
        label = f"{row['quality_score']:.2f}  {'/'.join(Path(str(row['uri'])).with_suffix('').parts[-2:])}"
        pen.text((x + 4, y + _THUMBNAIL_PX + 4), label, fill="black")
    sheet.save(path, quality=88)


def run(root: Path) -> int:
    """Build, score, rank, curate, show; everything below `root`, which is made anew."""
    shutil.rmtree(root, ignore_errors=True)
    library, tables = root / "library", root / "tables"
    build_library(library)
    count = sum(path.is_file() for path in library.rglob("*"))
    print(f"built a library of {count} files in {library}; scoring it on a local Ray cluster\n", flush=True)
    code = main(["score", str(library), "--out", str(tables)])
    if code:
        return code
    dest = Destination(tables)
    print("\nthe ranking (picinspector top demo/tables -n 15)", flush=True)
    main(["top", str(tables), "-n", "15"])
    rows = rank(dest, Ranking(None)).to_pylist()
    print("\nthe last five")
    for row in rows[-5:]:
        print(f"      {row['quality_score']:>7.2f}  {row['scene']:<10}  {row['uri']}")
    print("\nnot scored, and why")
    for row in failures(dest):
        print(f"      {Path(row['uri']).name:<11} {row['error_kind']}: {row['error_message']}")
    won, pairs = pairs_won(scores_by_name(dest))
    print(
        f"\nthe photo as it was taken outranks its own strong degradation in {won} of {pairs} pairs ({won / pairs:.0%})"
    )
    print("\nthose worth keeping (picinspector curate demo/tables --best 12)", flush=True)
    report = root / "report.html"
    code = main(["curate", str(tables), "--best", "12", "--title", "PicInspector demo", "-o", str(report)])
    if code:
        return code
    gallery = root / "ranking.jpg"
    draw_gallery(rows, gallery)
    print(f"\nreport                {report}   (open it in a browser)")
    print(f"gallery, best first   {gallery}")
    print(f"scores                {tables}/scores/**/*.parquet")
    print(f"embeddings            {tables}/embeddings/**/*.parquet")
    return 0


if __name__ == "__main__":
    sys.exit(run(Path("demo").absolute()))
