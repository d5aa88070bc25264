"""Groups of photos of which one is enough: exact copies, near-duplicates, bursts. And which of them, and why.

Ties between two photos, from the firmest to the loosest:

- exact: the same bytes, by their hash.
- near: alike by their embeddings and confirmed by the perceptual hash: a re-encoding, a smaller copy, an edit of the
  tones, or two frames that hardly differ.
- burst: shot by one camera within seconds, and alike by their embeddings.

What hangs together by such ties and looks like the best of it is a group: a series in which each frame resembles the
next, but not the first the last, is several. A group's kind is the loosest tie that is needed to hold it.

The groups lie in `<dest>/groups/groups.parquet`, one row for each scored photo, replaced as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from picinspector import schema
from picinspector.duplicates import MAX_DISTANCE_BITS
from picinspector.neighbours import alike
from picinspector.tables import Destination, database
from picinspector.vectors import load as load_vectors

#: Scores this close are no reason to prefer a smaller picture: model noise between an original and a copy of it.
#: A quarter of a point is a fourth of the half-width of the builtin scorer's 90 % interval.
_SAME_QUALITY = 0.25
#: What a photo has to be ahead in an attribute (0-100) to be told apart by it.
_AHEAD = 3.0
#: Photos whose facts are Python objects at a time.
_ROWS_AT_ONCE = 20_000
#: Of the similarity of neighbours: others of their group, darker or softer, are less like its best.
_LIKE_THE_BEST = 0.8
#: Frames after each that may be of its burst.
_BURST_FRAMES = 8
_BEST_IN = {
    "sharpness": "sharpest",
    "noisiness": "cleanest",
    "brightness": "best exposed",
    "contrast": "best contrast",
    "colorfulness": "best colour",
}
_BEHIND_IN = {
    "sharpness": "less sharp",
    "noisiness": "noisier",
    "brightness": "worse exposed",
    "contrast": "less contrast",
    "colorfulness": "less colour",
}


@dataclass(frozen=True, slots=True)
class Ties:
    """What ties two photos together.

    Cosines were measured with the builtin bundle (2026-11): of 150 photos no two that have nothing
    to do with each other came to more than 0.76, and re-encodings, smaller copies and frames moved by a few percent to
    0.9 and more; changes of the tones to 0.7 and more. Other encoders find unrelated photos more alike; there the hash
    and the time decide.

    Attributes:
        near_similarity: cosine of near-duplicates, at least.
        near_bits: bits of 64 by which their perceptual hashes differ, at most.
        burst_s: seconds between two frames of a burst, at most; 0 looks for none.
        burst_similarity: their cosine, at least.
    """

    near_similarity: float = 0.75
    near_bits: int = MAX_DISTANCE_BITS
    burst_s: float = 3.0
    burst_similarity: float = 0.8


def make(dest: Destination, ties: Ties = Ties()) -> pa.Table:
    """Group the newest committed rows of all scored photos: `schema.GROUPS`, whose metadata say of what and how.

    Raises:
        UsageError: nothing has been scored here, or with two bundles.
    """
    as_of = dest.newest()
    photos = _photos(dest)
    groups = find(photos, load_vectors(dest, photos), ties)
    said = {"as_of": as_of, "ties": asdict(ties)}
    return groups.replace_schema_metadata({b"picinspector": json.dumps(said).encode()})


def save(dest: Destination, groups: pa.Table) -> None:
    """Keep groups in the destination, in place of those that were there.

    Raises:
        StorageError: they cannot be written.
    """
    dest.write_parquet(f"{dest.root}/groups/groups.parquet", groups)


def load(dest: Destination) -> pa.Table | None:
    """The groups as they were written last, `schema.GROUPS`; None where there are none.

    Raises:
        StorageError: they are damaged.
    """
    return dest.read_parquet(f"{dest.root}/groups/groups.parquet")


def current(dest: Destination, ties: Ties | None = None, keep: bool = True) -> pa.Table:
    """The groups; made anew where there are none of these ties, or a run has been committed since.

    Args:
        dest: where photos were scored.
        ties: None: those of the groups that are there.
        keep: write groups that were made anew.
    """
    found = load(dest)
    said = _said(found) if found is not None else {}
    wanted = ties or (Ties(**said["ties"]) if "ties" in said else Ties())
    if found is None or (said.get("as_of"), said.get("ties")) != (dest.newest(), asdict(wanted)):
        found = make(dest, wanted)
        if keep:
            save(dest, found)
    return found


def _said(groups: pa.Table) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((groups.schema.metadata or {}).get(b"picinspector", b"{}"))
    return said


def describe(groups: pa.Table) -> dict[str, Any]:
    """Counts of groups, and of the photos in them, by kind; and what `make` has noted.

    Returns:
        `photos`, `groups` and `photos_in_groups` by kind, `largest`, `superfluous` (photos that are not the best of
        theirs), `as_of` (the newest run it saw), `ties`.
    """
    with database(groups=groups) as connection:
        rows = connection.sql(
            "SELECT group_kind, count(*) FILTER (is_best), count(*), max(group_size) FROM groups GROUP BY 1"
        ).fetchall()
    kinds = {kind: (count, photos, largest) for kind, count, photos, largest in rows}
    shared = {kind: kinds.get(kind, (0, 0, 0)) for kind in schema.GROUP_KINDS[:-1]}
    return {
        "photos": groups.num_rows,
        "groups": {kind: count for kind, (count, _, _) in shared.items()},
        "photos_in_groups": {kind: photos for kind, (_, photos, _) in shared.items()},
        "largest": max((largest for _, _, largest in shared.values()), default=0),
        "superfluous": sum(photos - count for count, photos, _ in shared.values()),
        **_said(groups),
    }


def _photos(dest: Destination) -> pa.Table:
    """What groups are made of, of the newest row of each scored photo, by uri."""
    facts = ["width", "height", "captured_at", "camera", "phash", "content_hash"]
    judged = ["quality_score", "scorer_kind", *(f"attribute_{name}" for name in schema.ATTRIBUTES)]
    with database() as connection:
        dest.load_latest(connection, "seen", "embeddings", ["image_id", "uri", "run_id", *facts])
        dest.load_latest(connection, "scored", "scores", ["image_id", "uri", *judged])
        rows = connection.sql(
            f"SELECT image_id, uri, seen.run_id AS embeddings_run_id, {', '.join((*facts, *judged))} "
            "FROM scored JOIN seen USING (image_id, uri) "
            "WHERE quality_score IS NOT NULL AND NOT isnan(quality_score) ORDER BY uri"
        )
        return rows.to_arrow_table()


# --- ties -------------------------------------------------------------------------------------------------------------


def find(photos: pa.Table, vectors: np.ndarray, ties: Ties = Ties()) -> pa.Table:
    """The groups among photos.

    Args:
        photos: `image_id`, `uri`, `content_hash`, `phash`, `width`, `height`, `captured_at`, `camera`,
            `quality_score`, `scorer_kind` and the attributes.
        vectors: float16 (N, D), their embeddings; zeros where there is none.
        ties: see there.

    Returns:
        `schema.GROUPS`, in the order of the photos.
    """
    exact = _same_bytes(photos)
    near = _near(photos, vectors, ties)
    burst = _bursts(photos, vectors, ties)
    levels = [_components(photos.num_rows, edges) for edges in (exact, [*exact, *near], [*exact, *near, *burst])]
    # Burst frames are tied by their own measure, which may be the looser one.
    similarity = min(ties.near_similarity, ties.burst_similarity) if ties.burst_s else ties.near_similarity
    rank = _rank(photos, levels[-1])
    group = _part(levels[-1], rank, levels[0], vectors, _LIKE_THE_BEST * similarity)
    return _judge(photos, levels, group, rank)


_Edges = list[np.ndarray]


def _same_bytes(photos: pa.Table) -> _Edges:
    hashes = photos.column("content_hash").combine_chunks().dictionary_encode()
    code = np.asarray(pc.fill_null(hashes.indices, -1))
    known = np.flatnonzero(code >= 0)
    order = known[np.argsort(code[known], kind="stable")]
    same = code[order][1:] == code[order][:-1]
    return [np.stack([order[:-1][same], order[1:][same]], axis=1)]


def _near(photos: pa.Table, vectors: np.ndarray, ties: Ties) -> _Edges:
    phash = photos.column("phash").to_numpy()

    def confirmed(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.asarray(np.bitwise_count(phash[left] ^ phash[right]) <= ties.near_bits)

    return [alike(vectors, ties.near_similarity, confirmed)[0]]


def _bursts(photos: pa.Table, vectors: np.ndarray, ties: Ties) -> _Edges:
    """Frames of one camera, each tied to those of the next seconds that look like it."""
    if not ties.burst_s:
        return []
    timed = np.flatnonzero(np.asarray(pc.and_(pc.is_valid(photos["captured_at"]), pc.is_valid(photos["camera"]))))
    camera = np.asarray(photos["camera"].combine_chunks().dictionary_encode().indices.take(pa.array(timed)))
    shot = photos["captured_at"].take(pa.array(timed)).to_numpy().astype("datetime64[us]")
    order = np.lexsort((timed, shot, camera))
    timed, camera, shot = timed[order], camera[order], shot[order]
    gap, edges = np.timedelta64(timedelta(seconds=ties.burst_s)), []
    for step in range(1, _BURST_FRAMES + 1):
        close = (camera[step:] == camera[:-step]) & (shot[step:] - shot[:-step] <= gap)
        pairs = np.stack([timed[:-step][close], timed[step:][close]], axis=1)
        cosine = np.einsum("nd,nd->n", *(vectors[pairs[:, side]].astype(np.float32) for side in (0, 1)))
        edges.append(pairs[cosine >= ties.burst_similarity])
    return edges


def _components(count: int, edges: _Edges) -> np.ndarray:
    joined = np.concatenate([*edges, np.empty((0, 2), np.int64)])
    graph = coo_array((np.ones(len(joined), bool), (joined[:, 0], joined[:, 1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component, np.int64)


def _part(whole: np.ndarray, rank: np.ndarray, copies: np.ndarray, vectors: np.ndarray, least: float) -> np.ndarray:
    """What hangs together, parted until all of a group look like the best of it, or are copies of one that does.

    Like the leader algorithm of clustering (Hartigan 1975), with the best photo that is left as the next leader.

    Args:
        whole: component of each photo.
        rank: in its component, from 1.
        copies: component of photos with the same bytes.
        vectors: float16 (N, D).
        least: cosine to the best, at least.
    """
    group, numbers = whole.copy(), int(whole.max(initial=-1)) + 1
    several = np.flatnonzero(np.bincount(whole)[whole] > 2)
    several = several[np.lexsort((rank[several], whole[several]))]
    for rows in np.split(several, np.flatnonzero(np.diff(whole[several])) + 1):
        wide, left = vectors[rows].astype(np.float32), np.arange(len(rows))
        while len(left):
            like = wide[left] @ wide[left[0]] >= least
            like[0] = True
            like |= np.isin(copies[rows[left]], copies[rows[left[like]]])
            group[rows[left[like]]] = numbers
            numbers, left = numbers + 1, left[~like]
    return np.unique(group, return_inverse=True)[1]


# --- the pick ---------------------------------------------------------------------------------------------------------


def _judge(photos: pa.Table, levels: list[np.ndarray], group: np.ndarray, rank: np.ndarray) -> pa.Table:
    size = np.bincount(group)[group]
    kind = np.full(len(group), schema.GROUP_KINDS.index("single"))
    for index in reversed(range(len(levels))):
        whole = _distinct(group, levels[index]) == 1
        kind = np.where((size > 1) & whole[group], index, kind)
    order = np.lexsort((rank, group))
    rank = _number(order, group)
    ids = np.asarray(photos.column("image_id").to_pylist(), dtype=object)
    named = np.full(group.max(initial=-1) + 1, None, dtype=object)
    for row in np.flatnonzero(size > 1).tolist():
        if named[group[row]] is None or ids[row] < named[group[row]]:
            named[group[row]] = ids[row]
    reasons = np.full(len(group), None, dtype=object)
    for members, rows in _members(photos, order[size[order] > 1], size):
        reasons[members] = _reasons(rows)
    columns = {
        "image_id": photos.column("image_id"),
        "uri": photos.column("uri"),
        "group_id": pa.array(np.where(size > 1, named[group], ids), pa.string()),
        "group_kind": pa.array(np.array(schema.GROUP_KINDS, dtype=object)[kind], pa.string()),
        "group_size": pa.array(size, pa.int32()),
        "rank_in_group": pa.array(rank, pa.int32()),
        "is_best": pa.array(rank == 1),
        "reason": pa.array(reasons, pa.string()),
    }
    return pa.table(columns).cast(schema.GROUPS)


def _distinct(group: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """How many of the inner components each group has; (G,)."""
    pairs = np.unique(np.stack([group, inner], axis=1), axis=0)
    return np.bincount(pairs[:, 0])


def _rank(photos: pa.Table, group: np.ndarray) -> np.ndarray:
    """Each photo's rank among those of its group, from 1.

    The highest score wins. Among those within `_SAME_QUALITY` of it, and so on downwards, the larger picture does.
    """
    quality = photos.column("quality_score").to_numpy()
    best = np.full(group.max(initial=-1) + 1, -np.inf)
    np.maximum.at(best, group, quality)
    steps = np.floor((best[group] - quality) / _SAME_QUALITY)
    pixels = np.asarray(pc.multiply(photos["width"].cast(pa.int64()), photos["height"].cast(pa.int64())))
    uris = np.argsort(np.argsort(photos.column("uri").to_numpy(zero_copy_only=False), kind="stable"))
    length = np.asarray(pc.utf8_length(photos.column("uri")))  # "a.jpg" before "a copy.jpg"
    return _number(np.lexsort((uris, length, -quality, -pixels, steps, group)), group)


def _number(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Places within groups, from 1, of rows that `order` has by group."""
    place = np.empty(len(group), np.int64)
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    place[order] = np.arange(len(group)) - np.repeat(starts, np.diff([*starts, len(group)])) + 1
    return place


def _members(
    photos: pa.Table, grouped: np.ndarray, size: np.ndarray
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Each group's rows and what is known of them, best first; `grouped` has them by group."""
    start = 0
    while start < len(grouped):
        end = start
        while end < len(grouped) and end - start < _ROWS_AT_ONCE:  # whole groups
            end += int(size[grouped[end]])
        rows = photos.take(pa.array(grouped[start:end])).to_pylist()
        while start < end:
            count = int(size[grouped[start]])
            yield grouped[start : start + count], rows[len(rows) - (end - start) :][:count]
            start += count


def _reasons(members: list[dict[str, Any]]) -> list[str]:
    """Why the first is the pick, and what it has before each of the others."""
    pick, others = members[0], members[1:]
    return [_why(pick, others), *(_why_not(other, pick) for other in others)]


def _why(pick: dict[str, Any], others: list[dict[str, Any]]) -> str:
    count, different = len(others) + 1, [other for other in others if not _is_copy(other, pick)]
    if not different:
        return f"One of {count} identical files"
    ahead = [
        word
        for name, word in _told_by(_BEST_IN, pick).items()
        if pick[f"attribute_{name}"] >= max(other[f"attribute_{name}"] for other in different) + _AHEAD
    ]
    score, highest = pick["quality_score"], max(other["quality_score"] for other in different)
    rivals = [_pixels(other) for other in different if other["quality_score"] >= score]
    if rivals and _pixels(pick) > max(rivals):  # not by its score, then by its size
        words = [f"largest ({_megapixels(pick)} MP) of those that score alike"]
    elif rivals:
        words = [f"as good as the next ({score:.2f})"]
    elif score - highest >= _SAME_QUALITY:
        words = [f"highest score ({score:.2f}, next {highest:.2f})"]
    else:
        words = [f"highest score ({score:.2f}) by a little"]
    said = ", ".join([*ahead, *words])
    return f"{said[0].upper()}{said[1:]}, of {count}"


def _told_by(words: dict[str, str], photo: dict[str, Any]) -> dict[str, str]:
    """Without `brightness` where it is no quality of the exposure: a zero-shot bundle's is luminance."""
    return {name: word for name, word in words.items() if photo["scorer_kind"] != "zero_shot" or name != "brightness"}


def _why_not(other: dict[str, Any], pick: dict[str, Any]) -> str:
    if _is_copy(other, pick):
        return "same file as the pick"
    words = []
    if _pixels(other) < 0.9 * _pixels(pick):
        words.append(f"smaller ({_megapixels(other)} of {_megapixels(pick)} MP)")
    told = _told_by(_BEHIND_IN, pick)
    behind = {name: pick[f"attribute_{name}"] - other[f"attribute_{name}"] for name in told}
    words += [
        f"{told[name]} (-{behind[name]:.0f})"
        for name in sorted(behind, key=lambda name: -behind[name])[:2]
        if behind[name] >= _AHEAD
    ]
    if (lower := pick["quality_score"] - other["quality_score"]) >= 0.005:
        words.append(f"scores {lower:.2f} lower")
    return ", ".join(words) or "as good as the pick"


def _is_copy(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["content_hash"] is not None and one["content_hash"] == other["content_hash"]


def _pixels(photo: dict[str, Any]) -> int:
    return int(photo["width"] * photo["height"])


def _megapixels(photo: dict[str, Any]) -> str:
    return f"{_pixels(photo) / 1e6:.2g}"
