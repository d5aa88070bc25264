"""The photos to keep: the best of each group, no two much alike, so many of each scene at most.

With `diversity` photos are chosen one by one for maximal marginal relevance (Carbonell & Goldstein 1998): each time the
one with the highest (1 - d) * relevance - d * likeness, where relevance is its percentile, 0-1, and likeness that to
the most similar photo chosen so far. The cosine of two embeddings becomes a likeness by this library's own scale:
0 for the median pair of photos, 1 for the same picture. Encoders differ in where unrelated photos lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema
from picinspector.errors import UsageError
from picinspector.groups import Ties, current
from picinspector.rank import Ranking, rank
from picinspector.tables import Destination, database
from picinspector.vectors import load as load_vectors

#: Diverse photos are chosen among the best so many times their number; lower ones would not be chosen for quality.
_POOL = 20
_LEAST_POOL = 2000
_SAMPLED_PAIRS = 20_000


@dataclass(frozen=True, slots=True)
class Selection:
    """What to keep.

    Attributes:
        best: photos at most.
        by, scene, where: as in `rank.Ranking`.
        diversity: 0 takes the best, 1 what is least alike; between, both count.
        duplicates: keep photos that are not the best of their group too.
        quotas: scene -> photos of it at most; `*` of every other.
        ties: what makes a group; None: as those that are there were made.
    """

    best: int = 500
    by: str = "quality_score"
    scene: str | None = None
    where: str | None = None
    diversity: float = 0.0
    duplicates: bool = False
    quotas: Mapping[str, int] = field(default_factory=dict)
    ties: Ties | None = None


def select(dest: Destination, selection: Selection = Selection(), keep: bool = True) -> pa.Table:
    """Choose; the same photos each time.

    Args:
        dest: where they were scored.
        selection: what to keep.
        keep: write groups that have to be made anew.

    Returns:
        the chosen in the order they were chosen: the columns of `rank.rank`, where `rank` is the place here, with
        `etag`, `group_id`, `group_kind`, `group_size` and `reason`.

    Raises:
        UsageError: a diversity or quota that makes no sense; see `rank.rank` and `groups.make` for others.
    """
    considered = consider(dest, selection, keep)
    kept = considered if selection.duplicates else considered.filter(considered.column("is_best"))
    if not selection.diversity:
        rows = _fill(kept, selection)
    else:
        kept = _pool(kept, selection)
        rows = _diverse(kept, load_vectors(dest, kept), selection)
    chosen = kept.take(pa.array(rows, pa.int64()))
    place = pa.array(np.arange(1, chosen.num_rows + 1))
    return chosen.set_column(chosen.column_names.index("rank"), "rank", place).drop_columns(["embeddings_run_id"])


def save(dest: Destination, chosen: pa.Table) -> str:
    """Keep what `select` chose in the destination, in place of what was kept before; returns the file's URL."""
    chosen = chosen.replace_schema_metadata({b"as_of": dest.newest().encode()})
    dest.write_parquet(f"{dest.root}/groups/selection.parquet", chosen)
    return f"{dest.url.rstrip('/')}/groups/selection.parquet"


def load(dest: Destination) -> pa.Table | None:
    """The selection that was kept last, columns of `select`; None where there is none.

    Its metadata say `as_of`: the newest run it knew.

    Raises:
        StorageError: it is damaged.
    """
    return dest.read_parquet(f"{dest.root}/groups/selection.parquet")


def consider(dest: Destination, selection: Selection, keep: bool = True) -> pa.Table:
    """All photos of which `select` chooses, best first: its columns, `is_best` and `embeddings_run_id`."""
    if not 0 <= selection.diversity <= 1:
        raise UsageError(f"--diversity {selection.diversity}: give a number from 0 (the best) to 1 (the least alike)")
    for scene, count in selection.quotas.items():
        if scene not in (*schema.SCENES, "*") or count < 0:
            raise UsageError(f"--quota {scene}={count}: give SCENE=N, with a scene of {', '.join(schema.SCENES)}")
    groups = current(dest, selection.ties, keep)
    ranked = rank(dest, Ranking(None, by=selection.by, scene=selection.scene, where=selection.where), ["etag"])
    with database(ranked=ranked, groups=groups) as connection:
        dest.load_latest(connection, "seen", "embeddings", ["image_id", "run_id"])
        rows = connection.sql(
            "SELECT ranked.*, group_id, group_kind, group_size, rank_in_group, is_best, reason, "
            "seen.run_id AS embeddings_run_id "
            "FROM ranked JOIN groups USING (image_id) JOIN seen USING (image_id) ORDER BY rank"
        ).to_arrow_table()
    # Where a filter leaves out the best of a group, the next one stands for it.
    first = np.zeros(rows.num_rows, bool)
    order = pc.sort_indices(rows, [("group_id", "ascending"), ("rank_in_group", "ascending")]).to_numpy()
    ids = rows.column("group_id").to_numpy(zero_copy_only=False)[order]
    first[order[np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])]] = True
    return rows.set_column(rows.column_names.index("is_best"), "is_best", pa.array(first))


class _Quotas:
    """What may still be chosen of each scene."""

    def __init__(self, photos: pa.Table, selection: Selection) -> None:
        of_any = selection.quotas.get("*", selection.best)
        self._scenes = photos.column("scene").to_pylist()
        self._left = {scene: selection.quotas.get(scene, of_any) for scene in schema.SCENES}

    def open(self, row: int) -> bool:
        return self._left[self._scenes[row]] > 0

    def take(self, row: int) -> str | None:
        """Choose a photo; the scene that is now full, if it is."""
        scene = str(self._scenes[row])
        self._left[scene] -= 1
        return scene if not self._left[scene] else None


def _fill(photos: pa.Table, selection: Selection) -> list[int]:
    quotas, chosen = _Quotas(photos, selection), []  # type: _Quotas, list[int]
    for row in range(photos.num_rows):
        if len(chosen) == selection.best:
            break
        if quotas.open(row):
            quotas.take(row)
            chosen.append(row)
    return chosen


def _pool(photos: pa.Table, selection: Selection) -> pa.Table:
    """Those of which diverse ones are chosen: the best of all, and the best of each scene that has a quota."""
    size = max(_POOL * selection.best, _LEAST_POOL)
    if not selection.quotas or photos.num_rows <= size:
        return photos.slice(0, size)
    scenes, rows = photos.column("scene").to_numpy(zero_copy_only=False), [np.arange(size)]
    for scene in schema.SCENES:
        quota = selection.quotas.get(scene, selection.quotas.get("*", 0))
        most = max(_POOL * min(quota, selection.best), _LEAST_POOL) if quota else 0
        rows.append(np.flatnonzero(scenes == scene)[:most])
    return photos.take(pa.array(np.unique(np.concatenate(rows))))


def _diverse(photos: pa.Table, vectors: np.ndarray, selection: Selection) -> list[int]:
    """Greedy: `selection.best` products of the pool's embeddings with one of them."""
    relevance = photos.column("library_percentile").to_numpy() / 100
    wide = vectors.astype(np.float32)
    zero = _unrelated(wide)
    scenes = photos.column("scene").to_numpy(zero_copy_only=False)
    quotas = _Quotas(photos, selection)
    likeness = np.zeros(len(wide), np.float32)  # to the nearest of those chosen; of the first all are equally unlike
    possible = np.array([quotas.open(row) for row in range(len(wide))], bool)
    chosen: list[int] = []
    while len(chosen) < selection.best and possible.any():
        gain = (1 - selection.diversity) * relevance - selection.diversity * likeness
        row = int(np.argmax(np.where(possible, gain, -np.inf)))  # of equals the first, which ranks higher
        chosen.append(row)
        possible[row] = False
        if full := quotas.take(row):
            possible &= scenes != full
        like = (wide @ wide[row] - zero) / (1 - zero)
        likeness = np.maximum(likeness, like) if len(chosen) > 1 else like
    return chosen


def _unrelated(vectors: np.ndarray) -> float:
    """The median cosine of two photos, by a seeded sample."""
    if len(vectors) < 2:
        return 0.0
    left, right = np.random.default_rng(0).integers(0, len(vectors), (2, _SAMPLED_PAIRS))
    pairs = left != right
    cosine = np.einsum("nd,nd->n", vectors[left[pairs]], vectors[right[pairs]])
    return float(min(0.99, np.median(cosine)))
