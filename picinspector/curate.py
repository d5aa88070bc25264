"""From scores to the photos worth keeping: groups, a selection, a report; and marks for photographers' tools."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from picinspector import groups, report
from picinspector.selection import Selection, consider, save, select
from picinspector.tables import Destination
from picinspector.xmp.document import Mark

#: Library percentile from which a photo has so many stars: a pyramid as culling photographers build it, few at the top.
STARS = ((95.0, 5), (80.0, 4), (50.0, 3), (20.0, 2), (0.0, 1))
#: A photo below this percentile is a reject.
_REJECTED_BELOW = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """What `curate` makes.

    Attributes:
        selection: what to keep.
        out: where the page goes; None is `<dest>/report.html`.
        page: what it shows.
        storage_options: of the photos and of the report.
    """

    selection: Selection = field(default_factory=lambda: Selection(diversity=0.3))
    out: str | None = None
    page: report.Options = field(default_factory=report.Options)
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)


def curate(dest: Destination, options: Options = Options()) -> dict[str, Any]:
    """Group the photos, choose among them, and write the report.

    The selection is kept in the destination (`selection.save`), where the report finds it.

    Returns:
        `groups`, see `groups.describe`; `selected`, how many; `selection`, where; `report`, see `report.write`;
        `seconds` of each.

    Raises:
        UsageError: nothing has been scored here; see `selection.select` for others.
        StorageError: something cannot be written.
    """
    seconds, started = {}, time.monotonic()
    grouped = groups.describe(groups.current(dest, options.selection.ties))
    seconds["groups"] = time.monotonic() - started
    chosen = select(dest, options.selection)
    kept_in = save(dest, chosen)
    seconds["selection"] = time.monotonic() - started - seconds["groups"]
    page = replace(options.page, storage_options=options.storage_options or options.page.storage_options)
    out = options.out or dest.url_of("report.html")
    shown = report.write(dest, out, page)
    seconds["report"] = time.monotonic() - started - sum(seconds.values())
    return {
        "groups": grouped,
        "selected": chosen.num_rows,
        "selection": kept_in,
        "report": shown,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def marks(dest: Destination, selection: Selection, reject_label: str | None = "Red", keep: bool = True) -> list[Mark]:
    """What the sidecars of all photos say of which `selection` chooses: stars, a label for rejects, the scene.

    Stars are those of the library percentile (`STARS`). Rejects are photos in the lowest twentieth, and those of a
    group that has a better one, unless those are kept too (`Selection.duplicates`).

    Args:
        dest: where they were scored.
        selection: its filter, order and groups count, not its number.
        reject_label: of rejects; None labels none.
        keep: write groups that have to be made anew.
    """
    photos: pa.Table = consider(dest, selection, keep)
    percentile = photos.column("library_percentile").to_numpy()
    kept = np.asarray(photos.column("is_best")) | selection.duplicates
    uris, scenes, scores = (photos.column(name).to_pylist() for name in ("uri", "scene", "quality_score"))
    return [
        Mark(
            uris[row],
            next(stars for least, stars in STARS if percentile[row] >= least),
            reject_label if percentile[row] < _REJECTED_BELOW or not kept[row] else None,
            (scenes[row],),
            scores[row],
        )
        for row in range(photos.num_rows)
    ]
