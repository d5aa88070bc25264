"""cluster.yaml is one that Ray's own launcher accepts, and says what it is meant to say."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job import job_supervisor
from ray.data._internal.datasource_v2.formats.parquet import footer_file_indexer
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def start_arguments(commands: list[str]) -> dict[str, str]:
    """The options of the `ray start` among these commands, by name; a flag has the value ''."""
    (line,) = [command for command in commands if "ray start" in command]
    words = shlex.split(line)
    assert words[:2] == ["ray", "start"]
    pairs = (word.removeprefix("--").partition("=") for word in words[2:])
    return {name: value for name, _, value in pairs}


def test_rays_schema_accepts_it(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_rays_launcher_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # Nothing of Ray's defaults comes through: they install a nightly build and start a head that works.
    node_types = prepared["available_node_types"]
    assert set(node_types) == {"head", "cpu", "gpu"}
    assert prepared["setup_commands"] == cluster["setup_commands"]
    assert prepared["head_start_ray_commands"] == cluster["head_start_ray_commands"]
    assert not re.search("ray-wheels|ray:latest", json.dumps(prepared))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_workers": "many"}, "many"),
        ({"gpus": 3}, "gpus"),
        ({"head_node_type": "nobody"}, "head_node_type"),
    ],
)
def test_the_check_sees_mistakes(cluster: dict[str, Any], change: dict[str, Any], complaint: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError), match=complaint):
        validate_config(prepare_config(cluster | change))


def test_the_head_does_no_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    arguments = start_arguments(cluster["head_start_ray_commands"])
    assert (arguments["num-cpus"], arguments["num-gpus"]) == ("0", "0")


def test_both_kinds_of_worker_come_and_go(cluster: dict[str, Any]) -> None:
    node_types = cluster["available_node_types"]
    assert node_types["gpu"]["resources"]["GPU"] == 1 and "GPU" not in node_types["cpu"]["resources"]
    for name in ("cpu", "gpu"):
        assert node_types[name]["min_workers"] == 0 < node_types[name]["max_workers"]
    assert sum(node_types[name]["max_workers"] for name in ("cpu", "gpu")) <= cluster["max_workers"]
    assert 0 < cluster["idle_timeout_minutes"] <= 15


def test_every_node_may_reach_storage_and_has_a_current_image(cluster: dict[str, Any]) -> None:
    """Ray gives workers no profile of its own accord, and an image whose driver is older than PyTorch's CUDA."""
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["IamInstanceProfile"]["Name"].startswith("picinspector-")
        assert node_type["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/")


def test_every_node_spills_to_a_disk_that_is_large_enough(cluster: dict[str, Any]) -> None:
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert start_arguments(cluster[commands])["object-spilling-directory"] == "/spill"
    assert "--volume /var/spill:/spill" in cluster["docker"]["run_options"]
    assert any("/var/spill" in command for command in cluster["initialization_commands"])
    for node_type in cluster["available_node_types"].values():
        (disk,) = node_type["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 200


def test_ray_start_knows_every_option(cluster: dict[str, Any]) -> None:
    known = {option.lstrip("-") for parameter in ray_start.params for option in parameter.opts}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert start_arguments(cluster[commands]).keys() <= known


def test_the_images_have_the_ray_of_the_constraints(cluster: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == ray.__version__, "the environment is not the one of constraints.txt"
    images = re.findall(r"rayproject/ray:([\d.]+)-", (ROOT / "cluster.yaml").read_text())
    assert images == [pinned[1]] * 3


def test_every_node_asks_for_the_token_and_none_is_in_the_file(cluster: dict[str, Any]) -> None:
    options = " ".join(cluster["docker"]["run_options"])
    assert "--env RAY_AUTH_MODE=token" in options
    token_path = re.search(r"--env RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert token_path is not None and token_path[1] in cluster["file_mounts"]
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|RAY_AUTH_TOKEN=|[0-9a-f]{32}", text)


def test_nodes_from_the_image_have_the_same_settings() -> None:
    launcher, image = (
        set(re.findall(r"(RAY_\w+)=(\d+)$", (ROOT / file).read_text(), re.MULTILINE))
        for file in ("cluster.yaml", "Dockerfile")
    )
    assert launcher == image and len(launcher) == 4
    readers = "".join(Path(str(module.__file__)).read_text() for module in (footer_file_indexer, job_supervisor))
    for name, _ in launcher:
        assert hasattr(ray._config, name.removeprefix("RAY_")) or f'"{name}"' in readers, name
