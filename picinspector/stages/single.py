"""The three stages on one photo, in this process: the same values as in a run, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.manifest import stat_uris
from picinspector.photo import Limits
from picinspector.stages.encode import Encode
from picinspector.stages.read import crops_of, read_photos
from picinspector.stages.score import Score
from picinspector.storage import StorageOptions


def judge(uri: str, bundle: str = "builtin", storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything a run would find out about one photo.

    Args:
        uri: a path or any fsspec URL.
        bundle: name or folder.
        storage_options: fsspec options.

    Returns:
        `uri`, `quality_score`, `predicted_mos`, `scorer_kind`, `attributes`, `scene`, `scenes`, `facts`,
        `measurements`, `error_kind`, `error_message`.

    Raises:
        BundleError: the bundle cannot be used.
    """
    manifest, crops = stat_uris([uri], storage_options), crops_of(open_bundle(bundle))
    photo = read_photos(manifest, crops, Limits(), StorageOptions(storage_options))
    embedded = Encode(bundle)(photo)
    scored = Score(bundle)(embedded).to_pylist()[0]
    seen = embedded.select([*schema.FACTS.names, *schema.MEASUREMENT_FIELDS.names]).to_pylist()[0]
    plain = ("uri", "quality_score", "predicted_mos", "scorer_kind", "scene", "error_kind", "error_message")
    return {
        **{name: scored[name] for name in plain},
        "attributes": {name: scored[f"attribute_{name}"] for name in schema.ATTRIBUTES},
        "scenes": {name: scored[f"scene_{name}"] for name in schema.SCENES},
        "facts": {name: seen[name] for name in schema.FACTS.names},
        "measurements": {name: seen[f"measured_{name}"] for name in schema.MEASUREMENTS},
    }
