"""What is in deploy/ is accepted by Kubernetes, KubeRay, cron and Ray's job API, and says what it is meant to."""

from __future__ import annotations

import ast
import copy
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

import picinspector
from picinspector.cli import app
from tests.ray_head import Head

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.30"

# The part of KubeRay's schema that deploy/ uses, written after the definitions of its release v1.7.0
# (ray-operator/config/crd/bases/ray.io_rayjobs.yaml and ray.io_raycronjobs.yaml) and the checks that its operator makes
# beyond them (ray-operator/controllers/ray/utils/validation.go). What is not here is refused: look it up there first.
# Pods are checked by Kubernetes' own schema.
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
POD_TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object", "required": ["containers"]}},
    "additionalProperties": False,
}
START_PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER = {
    "type": "object",
    "required": ["rayVersion", "headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {
            "type": "object",
            "properties": {"mode": {"enum": ["disabled", "token"]}, "secretName": {"type": "string"}},
            "additionalProperties": False,
        },
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "type": "object",
            "properties": {"version": {"enum": ["v1", "v2"]}, "idleTimeoutSeconds": COUNT},
            "additionalProperties": False,
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "properties": {"rayStartParams": START_PARAMS, "template": POD_TEMPLATE},
            "additionalProperties": False,
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": START_PARAMS,
                    "template": POD_TEMPLATE,
                },
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}
JOB = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec"],
    "properties": {
        "entrypoint": {"type": "string"},
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": {**COUNT, "minimum": 1},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "rayClusterSpec": CLUSTER,
    },
    "additionalProperties": False,
    # The operator: a time to live is one of a cluster that is shut down.
    "if": {"required": ["ttlSecondsAfterFinished"]},
    "then": {"required": ["shutdownAfterJobFinishes"], "properties": {"shutdownAfterJobFinishes": {"const": True}}},
}
NIGHTLY = {"type": "string", "pattern": r"^[0-5]?\d ([01]?\d|2[0-3]) \* \* \*$"}
CRON_JOB = {
    "type": "object",
    "required": ["schedule", "jobTemplate"],
    "properties": {
        "schedule": NIGHTLY,
        "timeZone": {"type": "string", "minLength": 1},
        "suspend": {"type": "boolean"},
        "jobTemplate": JOB,
    },
    "additionalProperties": False,
}


def resource(kind: str, spec: dict[str, Any], longest: int) -> dict[str, Any]:
    """A resource of KubeRay; the length of its name leaves room for what the operator adds."""
    name = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": longest}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"type": "object", "required": ["name"], "properties": {"name": name}},
            "spec": spec,
        },
        "additionalProperties": False,
    }


KUBERAY = {
    "RayJob": resource("RayJob", JOB, 47),
    "RayCronJob": resource("RayCronJob", CRON_JOB, 36),
    "RayCluster": resource("RayCluster", CLUSTER, 50),
}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return loaded


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The spec of the RayCluster that one of these is, or makes."""
    spec: dict[str, Any] = manifest["spec"]
    if manifest["kind"] == "RayCluster":
        return spec
    job = spec if manifest["kind"] == "RayJob" else spec["jobTemplate"]
    cluster: dict[str, Any] = job["rayClusterSpec"]
    return cluster


def groups_of(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = cluster_of(manifest)
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def check(manifest: dict[str, Any]) -> None:
    """What the cluster would check.

    Raises:
        ValidationError: of jsonschema or of kubernetes_validate.
    """
    if manifest["kind"] not in KUBERAY:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, KUBERAY[manifest["kind"]])
    for name, group in groups_of(manifest).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "raycluster.yaml", "cronjob.yaml"])
def test_its_schema_accepts_it(name: str) -> None:
    check(load(name))


def test_the_service_is_accepted_and_starts_as_it_says() -> None:
    deployment, service, policy = yaml.safe_load_all((DEPLOY / "api.yaml").read_text())
    for manifest in (deployment, service, policy):
        check(manifest)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert {port["name"] for port in container["ports"]} == {service["spec"]["ports"][0]["targetPort"]}
    assert policy["spec"]["podSelector"] == deployment["spec"]["selector"]
    assert policy["spec"]["ingress"] == [{"ports": [{"port": container["ports"][0]["name"]}]}]
    program, *arguments = [*container["command"], *container["args"]]
    command: Any = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    given = command.make_context(command.name, arguments[1:]).params
    assert (program, given["port"]) == ("picinspector", container["ports"][0]["containerPort"])
    assert not given["public"] and "PICINSPECTOR_TOKEN" in {variable["name"] for variable in container["env"]}
    before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= before_s + 2 * (given["timeout"] + 5), (
        "what is under way is finished"
    )
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["timeoutSeconds"] > 5, "so long it may take to ask Ray"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("rayjob.yaml", "spec.backofflimit", 1),
        ("rayjob.yaml", "spec.backoffLimit", "1"),
        ("rayjob.yaml", "spec.shutdownAfterJobFinishes", False),
        ("rayjob.yaml", "spec.activeDeadlineSeconds", 0),
        ("rayjob.yaml", "spec.concurrencyPolicy", "Forbid"),
        ("rayjob.yaml", "metadata.name", "picinspector-nightly-with-far-too-long-a-name-for-a-job"),
        ("rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.template.spec.serviceAccountname", "me"),
        ("rayjob.yaml", "spec.rayClusterSpec.workerGroupSpecs.1.template.spec.containers.0.resource", {}),
        ("rayjob.yaml", "spec.rayClusterSpec.workerGroupSpecs.1.maxReplicas", -1),
        ("raycronjob.yaml", "spec.schedule", "30 25 * * *"),
        ("raycronjob.yaml", "spec.concurrencyPolicy", "Forbid"),
        ("raycronjob.yaml", "spec.jobTemplate.entryPoint", "python"),
        ("cronjob.yaml", "spec.concurrencypolicy", "Forbid"),
        ("cronjob.yaml", "spec.jobTemplate.spec.backoff", 1),
        ("cronjob.yaml", "spec.jobTemplate.spec.template.spec.restartPolicy", ["Never"]),
    ],
)
def test_the_check_sees_mistakes(name: str, path: str, value: Any) -> None:
    manifest = copy.deepcopy(load(name))
    *folders, last = path.split(".")
    place: Any = manifest
    for key in folders:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_every_night_is_the_one_that_can_be_tried_by_hand() -> None:
    assert load("raycronjob.yaml")["spec"]["jobTemplate"] == load("rayjob.yaml")["spec"]


def test_the_cluster_that_stands_is_the_one_that_comes_and_goes() -> None:
    standing = load("raycluster.yaml")
    assert cluster_of(standing) == cluster_of(load("rayjob.yaml"))
    (container,) = load("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert f"http://{standing['metadata']['name']}-head-svc:8265" in container["args"][0]
    secret = next(variable for variable in container["env"] if variable["name"] == "RAY_AUTH_TOKEN")
    assert secret["valueFrom"]["secretKeyRef"]["name"] == standing["metadata"]["name"]


def test_the_image_is_one_and_a_linter_accepts_it() -> None:
    """hadolint, with no rule turned off; the same name everywhere, which the version of the package ends."""
    linted = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", ROOT / "Dockerfile"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert linted.returncode == 0, linted.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert "hadolint ignore" not in text
    for manifest in DEPLOY.glob("*.yaml"):
        images = set(re.findall(r"image: (\S+)", manifest.read_text()))
        assert images == {f"picinspector:{picinspector.__version__}"}, manifest.name
        assert images == set(re.findall(r"build -t (\S+)", text))
    launcher = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    plain, gpu = (node["docker"]["worker_image"] for node in (launcher, launcher["available_node_types"]["gpu"]))
    assert f"FROM {plain}${{FLAVOUR}}" in text and f"ARG FLAVOUR={gpu.removeprefix(plain)}" in text, "the launcher's"


def test_the_nodes_are_those_of_the_launcher() -> None:
    groups, launcher = groups_of(load("rayjob.yaml")), yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert groups["head"]["rayStartParams"] | {"num-cpus": "0", "num-gpus": "0"} == groups["head"]["rayStartParams"]
    for name in ("cpu", "gpu"):
        node, group = launcher["available_node_types"][name], groups[name]
        assert (group["minReplicas"], group["maxReplicas"]) == (node["min_workers"], node["max_workers"])
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))) == (
            node["resources"]["CPU"],
            node["resources"].get("GPU", 0),
        )
    for group in groups.values():
        (mount,) = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert group["rayStartParams"]["object-spilling-directory"] == mount["mountPath"]


def test_a_night_ends_before_the_next() -> None:
    day = 24 * 3600
    job = load("rayjob.yaml")["spec"]
    assert (1 + job["backoffLimit"]) * job["activeDeadlineSeconds"] < day, "the operator counts it for each try"
    cron = load("cronjob.yaml")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid" and cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] < day
    assert cron["jobTemplate"]["spec"]["backoffLimit"] == 0, "a second pod's submission would be refused"


def test_ray_is_that_of_the_constraints() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster_of(load("rayjob.yaml"))["rayVersion"] == pinned[1]
    for file in ("Dockerfile", "cluster.yaml"):
        assert set(re.findall(r"rayproject/ray:([\d.]+)-", (ROOT / file).read_text())) == {pinned[1]}


@pytest.mark.parametrize("name", sorted(path.name for path in DEPLOY.iterdir()))
def test_no_credential_is_in_it(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|[0-9a-f]{32}|(SECRET|PASSWORD|TOKEN)[A-Z_]*\s*[=:]\s*[^\s,}$]", text)


# --- commands ---------------------------------------------------------------------------------------------------------


def cron_command() -> str:
    """The crontab's command as cron gives it to the shell: up to the first bare %, `\\%` made %."""
    (line,) = [line for line in (DEPLOY / "crontab").read_text().splitlines() if "ray job submit" in line]
    assert not line.startswith("#")
    minute, hour, *days, command = line.split(maxsplit=5)
    jsonschema.validate(" ".join([minute, hour, *days]), NIGHTLY)
    return re.split(r"(?<!\\)%", command)[0].replace("\\%", "%")


def cronjob_command() -> str:
    (container,) = load("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-c"]
    (command,) = container["args"]
    assert not re.search(r"\$\([A-Za-z_][\w.-]*\)", command), "Kubernetes would put a variable there"
    return str(command)


COMMANDS = {"crontab": cron_command, "cronjob.yaml": cronjob_command}


def in_shell(command: str) -> list[str]:
    """The words of `ray job submit` as a shell makes them, without running it."""
    _, found, submit = command.partition("ray job submit ")
    assert found, command
    done = subprocess.run(
        ["/bin/sh", "-c", f'printf "%s\\n" {submit}'], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.splitlines()


def entrypoint(words: list[str]) -> list[str]:
    return words[words.index("--") + 1 :]


def today() -> str:
    return subprocess.run(["date", "-u", "+%F"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_submission_id_is_the_day(name: str) -> None:
    before, words, after = today(), in_shell(COMMANDS[name]()), today()
    assert words[words.index("--submission-id") + 1] in {f"picinspector-nightly-{day}" for day in (before, after)}


def test_all_run_the_same_job() -> None:
    job = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    assert job[0] == "python" and job[1].endswith("/jobs/nightly.py")
    for command in COMMANDS.values():
        python, script, *arguments = entrypoint(in_shell(command()))
        assert (python, arguments) == ("python", job[2:])
        assert script in {"jobs/nightly.py", job[1]}
    assert f"jobs/ {job[1].removesuffix('nightly.py')}" in (ROOT / "Dockerfile").read_text()


def test_the_job_takes_its_arguments() -> None:
    _, script, *arguments = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    command: Any = typer.main.get_command(app).commands[Path(script).stem]  # type: ignore[attr-defined]
    given = command.make_context(command.name, list(arguments)).params  # raises on what it does not know
    assert (given["library"], given["out"]) == ("s3://bucket/photos", "s3://bucket/tables")
    gpus = groups_of(load("rayjob.yaml"))["gpu"]["maxReplicas"]
    assert given["encoders"] * given["gpus_per_encoder"] == gpus, "a job cannot see what may come"
    assert given["keep_days"] == 30
    with pytest.raises(Exception, match="No such option"):
        command.make_context(command.name, [*arguments, "--keep-day", "3"])


def test_a_job_takes_its_scripts_along_and_no_weights(head: Head) -> None:
    """`--working-dir .` uploads what .rayignore leaves of the repository; the package is the node's own."""
    look = "import os, picinspector; print(sorted(os.listdir('.')), picinspector.__file__)"
    done = head.submit("python", "-c", look)
    assert done.returncode == 0, done.stdout[-2000:]
    (listed,) = re.findall(r"^(\[.*\]) ", done.stdout, re.MULTILINE)
    there = set(ast.literal_eval(listed))
    assert {"jobs", "training", "pyproject.toml"} <= there
    assert not there & {"picinspector", "tests", "docs", "benchmarks", "demo", ".venv", ".git"}
    assert str(ROOT / "picinspector") in done.stdout, "the installed one, here this checkout"


def test_ray_refuses_the_day_a_second_time(head: Head) -> None:
    """The crontab's own line, with the address of a head that is there and a job that is over at once."""
    words = in_shell(cron_command())
    words[words.index("--address") + 1] = head.jobs_url
    submit = ["ray", "job", "submit", *words[: words.index("--")], "--", "true"]
    submit[submit.index("--working-dir") + 1] = str(DEPLOY)
    done, deadline = [], time.monotonic() + 90
    while len(done) < 2:
        last = subprocess.run(submit, env=head.environment, timeout=120, capture_output=True, text=True, check=False)
        # A head answers before its job agent is up, and says so.
        if "No available agent" not in last.stdout + last.stderr or time.monotonic() > deadline:
            done.append(last)
    assert done[0].returncode == 0, done[0].stdout[-2000:] + done[0].stderr[-2000:]
    assert done[1].returncode != 0
    assert "already exists" in done[1].stdout + done[1].stderr
