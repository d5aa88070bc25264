"""How long a library of so many photos takes on a cluster of such a size, and what holds it up.

    python -m benchmarks.projection                               # the tables of docs/scaling.md
    python -m benchmarks.projection --photos 5e7 --nodes 20 --cores 32 --gpus 1 --gpu-photos-per-s 112

Arithmetic with the costs below, each measured by a command of this repository on two cores of an AMD EPYC
(AVX512-BF16); other processors differ by a factor. Every step takes as long as its busiest resource; steps follow one
another as in a run. What is not known is not in it: object stores that throttle, nodes that are lost, and Ray Data's
driver beyond the million photos that were tried.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

#: Seconds of one process for each photo, however large the cluster.
LIST_S = 1 / 20_800  # benchmarks.listing, 200,000 keys
PLAN_S, PLAN_BYTES = 3.9e-6, 280  # benchmarks.planning, 10 million
GROUP_S, GROUP_BYTES = 426e-6, 4_900  # benchmarks.grouping, 1 million, two cores
#: Seconds of a core.
READ_S = {"12mp": 0.045, "2mp": 0.016}  # benchmarks/README.md, what paid
PHOTO_BYTES = {"12mp": 2_700_000, "2mp": 460_000}  # benchmarks/libraries.py
ENCODE_S = {
    "builtin": 0.038,
    "full": 1.67,
}  # the same; benchmarks.pipeline --bundle full-size, 1.2 photos/s of two cores
ORCHESTRATE_S = 2 * 0.91e-3  # benchmarks.scaling, both cores
CAPTION_S = 2 / 15  # training.caption_report, 14-17 captions/s of two cores
SCORE_S = 2 / 18_300  # benchmarks.rescore, the job from first batch to last
#: `runs.size_scorers`: more actors would take longer to start than to work, up to tens of millions of photos.
MOST_SCORERS = 4
#: Bytes of a row in all tables; of 12,000 rows of the builtin bundle, with 576 float16 more for DINOv2-base.
ROW_BYTES = {"builtin": 2_250, "full": 2_250 + 2 * 576}

_HOUR_S = 3600.0


@dataclass(frozen=True)
class Cluster:
    """What there is to work with.

    Attributes:
        nodes: that work.
        cores: of each.
        gpus: of each; 0 encodes on the cores.
        gpu_photos_per_s: of one GPU, both encoders.
        gbit_per_s: of each node, from the object store.
        price_per_hour: of a node, in any currency; 0 if it does not matter.
    """

    nodes: int = 8
    cores: int = 16
    gpus: int = 0
    gpu_photos_per_s: float = 0.0
    gbit_per_s: float = 10.0
    price_per_hour: float = 0.0


@dataclass(frozen=True)
class Projection:
    """What a first run over a library comes to.

    Attributes:
        hours: by step, in order: list, plan, embed, score; and, beside the run, caption, rescore, group.
        bottleneck: of the run: the step that takes longest, and of what.
        storage_gb: of the tables, 10^9 bytes.
        group_gb: memory of grouping, in one process.
        price: of the nodes while the run lasts.
    """

    hours: dict[str, float]
    bottleneck: str
    storage_gb: float
    group_gb: float
    price: float

    @property
    def run_hours(self) -> float:
        """Of the run: list, plan, embed, score."""
        return sum(self.hours[step] for step in ("list", "plan", "embed", "score"))


def project(photos: float, cluster: Cluster, bundle: str = "builtin", size: str = "12mp") -> Projection:
    """Hours, bytes and the bottleneck.

    Args:
        photos: how many.
        cluster: what works on them.
        bundle: a key of `ENCODE_S`.
        size: a key of `READ_S`.
    """
    cores = cluster.nodes * cluster.cores
    on_cores = READ_S[size] + ORCHESTRATE_S + (0.0 if cluster.gpus else ENCODE_S[bundle])
    embed = {
        "cores": photos * on_cores / cores,
        "network": photos * PHOTO_BYTES[size] * 8 / (cluster.nodes * cluster.gbit_per_s * 1e9),
    }
    if cluster.gpus:
        embed["GPUs"] = photos / (cluster.nodes * cluster.gpus * cluster.gpu_photos_per_s)
    busiest = max(embed, key=lambda name: embed[name])
    seconds = {
        "list": photos * LIST_S,
        "plan": photos * PLAN_S,
        "embed": embed[busiest],
        "score": photos * SCORE_S / min(MOST_SCORERS, cores),
        "caption": photos * CAPTION_S / cores,
        "rescore": photos * (PLAN_S + SCORE_S / min(MOST_SCORERS, cores)),
        "group": photos * GROUP_S,
    }
    held_up = {"list": "one listing process", "plan": "one planning process", "embed": busiest,
               "score": f"{MOST_SCORERS} scoring actors"}  # fmt: skip
    longest = max(held_up, key=lambda step: seconds[step])
    run_s = sum(seconds[step] for step in held_up)
    return Projection(
        {step: value / _HOUR_S for step, value in seconds.items()},
        f"{longest}: {held_up[longest]}",
        photos * ROW_BYTES[bundle] / 1e9,
        photos * GROUP_BYTES / 1e9,
        cluster.price_per_hour * cluster.nodes * run_s / _HOUR_S,
    )


def table(counts: list[float], cluster: Cluster, bundle: str, size: str) -> str:
    """A Markdown table, a row for each number of photos."""
    head = ["photos", "list", "plan", "embed", "score", "the run", "held up by", "tables", "caption all", "rescore"]
    head += ["group"] + (["price"] if cluster.price_per_hour else [])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for photos in counts:
        found = project(photos, cluster, bundle, size)
        hours = found.hours
        cells = [f"{photos:,.0f}", *(_duration(hours[step]) for step in ("list", "plan", "embed", "score"))]
        cells += [_duration(found.run_hours), found.bottleneck, f"{found.storage_gb:,.0f} GB"]
        cells += [_duration(hours["caption"]), _duration(hours["rescore"])]
        cells += [f"{_duration(hours['group'])}, {found.group_gb:,.0f} GB"]
        cells += [f"{found.price:,.0f}"] if cluster.price_per_hour else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"


def main() -> None:
    """Print a table for each size of photo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Cluster()
    parser.add_argument("--photos", type=float, nargs="+", default=[1e7, 1e8, 1e9])
    parser.add_argument("--nodes", type=int, default=default.nodes)
    parser.add_argument("--cores", type=int, default=default.cores)
    parser.add_argument("--gpus", type=int, default=default.gpus, help="of each node")
    parser.add_argument("--gpu-photos-per-s", type=float, default=0.0, help="of one GPU: measure it (benchmarks.gpu)")
    parser.add_argument("--gbit-per-s", type=float, default=default.gbit_per_s, help="of each node")
    parser.add_argument("--price-per-hour", type=float, default=0.0, help="of a node")
    parser.add_argument("--bundle", choices=list(ENCODE_S), default="builtin")
    parser.add_argument("--size", choices=list(READ_S), nargs="+", default=list(READ_S))
    given = parser.parse_args()
    if given.gpus and not given.gpu_photos_per_s > 0:
        parser.error("--gpus needs --gpu-photos-per-s, as measured by `python -m benchmarks.gpu` on such a GPU")
    cluster = replace(
        default, nodes=given.nodes, cores=given.cores, gpus=given.gpus, gpu_photos_per_s=given.gpu_photos_per_s,
        gbit_per_s=given.gbit_per_s, price_per_hour=given.price_per_hour,
    )  # fmt: skip
    for size in given.size:
        print(f"\n{size}, {given.bundle} bundle, {given.nodes} nodes of {given.cores} cores\n")
        print(table(given.photos, cluster, given.bundle, size))


if __name__ == "__main__":
    main()
