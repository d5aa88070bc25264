"""LightGBM on several processes or machines at once: Ray Train's LightGBMTrainer, one tree from everybody's rows."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import lightgbm
import numpy as np
import ray
import ray.train
import ray.train.lightgbm

from picinspector.recipe import Recipe, Rows, boost
from training.scorer_data import Labelled, gather

_NETWORK = re.compile(r"^\[(?:machines|local_listen_port|num_machines): .*\]\n", re.MULTILINE)


class Workers:
    """A group of processes that train together."""

    def __init__(self, data: Labelled, count: int, cpus: int, storage: str | None) -> None:
        """Plan for `count` processes of `cpus` cores each; 0 trains in this one.

        `storage` is where Ray Train keeps its state.
        """
        self._data, self._count, self._cpus = data, count, cpus
        self._storage = storage
        # Every worker watches all validation rows: on a part each, they would stop after different rounds.
        self._validation = (data.matrix("validation"), data.labels[data.rows("validation")])

    def boost(self, splits: tuple[str, ...], rows: Rows, recipe: Recipe) -> lightgbm.Booster:
        """One model from the photos of these splits, in the order of `Labelled.rows`.

        The same data, recipe and number of workers give the same model.
        """
        if not self._count:
            matrix = self._data.matrix(*splits)
            booster = boost(matrix, rows, recipe, self._validation, {"num_threads": self._cpus})
            return lightgbm.Booster(model_str=booster.model_to_string())
        trainer = ray.train.lightgbm.LightGBMTrainer(
            _train_on_worker,
            train_loop_config={
                "numbers": ray.put(self._data.rows(*splits)),
                "rows": ray.put(asdict(rows)),
                "validation": ray.put(self._validation),
                "recipe": asdict(recipe),
                "threads": self._cpus,
            },
            datasets={"photos": self._data.features_of},
            # Whole to everybody, who takes every n-th photo: Ray's own split drops rows to make parts equal, and gives
            # them to whoever asks first.
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
            scaling_config=ray.train.ScalingConfig(num_workers=self._count, resources_per_worker={"CPU": self._cpus}),
            run_config=ray.train.RunConfig(storage_path=self._storage),
        )
        return lightgbm.Booster(model_str=trainer.fit().return_value)


def _train_on_worker(config: dict[str, Any]) -> str:
    """Train with the others on this worker's share of the photos; the model as text."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    numbers, rows = ray.get(config["numbers"]), Rows(**ray.get(config["rows"]))
    mine = np.arange(rank, len(numbers), world)
    shard = ray.train.get_dataset_shard("photos")
    matrix = gather(shard.iter_batches(batch_size=4096, batch_format="pyarrow"), numbers[mine])
    own = Rows(rows.target[mine], rows.weight[mine], rows.repeats[mine], rows.label_min, rows.label_max)
    together = {"tree_learner": "data", "pre_partition": True, **ray.train.lightgbm.get_network_params()}
    params = {"num_threads": config["threads"], **(together if world > 1 else {})}
    booster = boost(matrix, own, Recipe(**config["recipe"]), ray.get(config["validation"]), params)
    # LightGBM writes addresses and ports of the workers into the model: nobody's business, and never the same.
    return _NETWORK.sub("", booster.model_to_string())
