"""LightGBM on several processes or machines at once: Ray Train's LightGBMTrainer, one tree from everybody's rows."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import ray
import ray.train
import ray.train.lightgbm

from picinspector.recipe import Begun, Recipe, Rows, boost
from training.claims import FAILURES, carry_out
from training.folders import Folder
from training.scorer_data import Labelled, gather

_NETWORK = re.compile(r"^\[(?:machines|local_listen_port|num_machines): .*\]\n", re.MULTILINE)
#: In a checkpoint: a `Begun`, or the whole model.
_BEGUN, _WHOLE = "begun.json", "model.txt"


class Workers:
    """A group of processes that train together."""

    def __init__(self, data: Labelled, count: int, cpus: int, out: Folder, checkpoint_rounds: int = 500) -> None:
        """Plan for `count` processes of `cpus` cores each; 0 trains in this one.

        Checkpoints go to `out/checkpoints`, after every so many rounds and at the end: a group that lost a node, or a
        job that is run again, goes on from the newest one, and does not train twice what is there whole.
        """
        self._data, self._count, self._cpus = data, count, cpus
        self._out, self._every = out.under("checkpoints"), checkpoint_rounds
        # Every worker watches all validation rows: on a part each, they would stop after different rounds.
        self._validation = (data.matrix("validation"), data.labels[data.rows("validation")])

    def boost(self, splits: tuple[str, ...], rows: Rows, recipe: Recipe) -> lightgbm.Booster:
        """One model from the photos of these splits, in the order of `Labelled.rows`.

        The same data, recipe and number of workers give the same model, unless a node was lost on the way.
        """
        if not self._count:
            matrix = self._data.matrix(*splits)
            booster = boost(matrix, rows, recipe, self._validation, {"num_threads": self._cpus})
            return lightgbm.Booster(model_str=booster.model_to_string())
        config = {
            "numbers": ray.put(self._data.rows(*splits)),
            "rows": ray.put(asdict(rows)),
            "validation": ray.put(self._validation),
            "recipe": asdict(recipe),
            "threads": self._cpus,
            "every": self._every,
        }
        name = self._name(splits, rows, recipe)
        result = carry_out(lambda: self._trainer(config, name), self._out.under(name))
        return lightgbm.Booster(model_str=result.return_value)

    def _trainer(self, config: dict[str, Any], name: str) -> ray.train.lightgbm.LightGBMTrainer:
        return ray.train.lightgbm.LightGBMTrainer(
            _train_on_worker,
            train_loop_config=config,
            datasets={"photos": self._data.features_of},
            # Whole to everybody, who takes every n-th photo: Ray's own split drops rows to make parts equal, and gives
            # them to whoever asks first.
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
            scaling_config=ray.train.ScalingConfig(num_workers=self._count, resources_per_worker={"CPU": self._cpus}),
            run_config=ray.train.RunConfig(
                name=name,
                **self._out.for_ray,
                failure_config=FAILURES,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )

    def _name(self, splits: tuple[str, ...], rows: Rows, recipe: Recipe) -> str:
        """Of a training: the same for the same data, recipe and workers."""
        told = [splits, asdict(recipe), self._count, self._data.fingerprint, lightgbm.__version__]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for part in (rows.target, rows.weight, rows.repeats):
            digest.update(part.tobytes())
        return digest.hexdigest()[:16]


def _train_on_worker(config: dict[str, Any]) -> str:
    """Train with the others on this worker's share of the photos; the model as text."""
    begun = _restore()
    if isinstance(begun, str):
        return begun
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    numbers, rows = ray.get(config["numbers"]), Rows(**ray.get(config["rows"]))
    mine = np.arange(rank, len(numbers), world)
    shard = ray.train.get_dataset_shard("photos")
    matrix = gather(shard.iter_batches(batch_size=4096, batch_format="pyarrow"), numbers[mine])
    own = Rows(rows.target[mine], rows.weight[mine], rows.repeats[mine], rows.label_min, rows.label_max)
    together = {"tree_learner": "data", "pre_partition": True, **ray.train.lightgbm.get_network_params()}
    params = {"num_threads": config["threads"], **(together if world > 1 else {})}

    def keep(state: Callable[[], Begun], rounds: int) -> None:
        def content() -> str:
            begun = state()
            return json.dumps(asdict(replace(begun, model=_NETWORK.sub("", begun.model))))

        if rounds % config["every"] == 0:
            _report(rank, _BEGUN, content)

    recipe = Recipe(**config["recipe"])
    booster = boost(matrix, own, recipe, ray.get(config["validation"]), params, begun, keep)
    # LightGBM writes addresses and ports of the workers into the model: nobody's business, and never the same.
    model = _NETWORK.sub("", booster.model_to_string())
    _report(rank, _WHOLE, lambda: model)
    return model


def _report(rank: int, name: str, content: Callable[[], str]) -> None:
    """A checkpoint of one file; the first worker speaks for all."""
    if rank:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(content(), "utf-8")
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _restore() -> Begun | str | None:
    """What the newest checkpoint holds: a training that is under way, or a whole model."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        whole, begun = Path(folder) / _WHOLE, Path(folder) / _BEGUN
        return whole.read_text("utf-8") if whole.is_file() else Begun(**json.loads(begun.read_text("utf-8")))
