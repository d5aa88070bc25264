"""Fixtures that more than one test file needs, and the list of services at the end of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import ray_head, services
from tests import s3_server as s3

if TYPE_CHECKING:
    from tests import several_nodes

# Before anything imports pyarrow.fs or botocore: both read these once.
os.environ.update(s3.ENVIRONMENT)
# Ray's workers would starve beside tests that compute, and idle OpenMP threads would spin on the others' cores.
os.environ |= {"RAY_worker_niceness": "0", "OMP_WAIT_POLICY": "passive"}
for inherited in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
    os.environ.pop(inherited, None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.S3Server]:
    """A running S3 server: Ceph radosgw where it is installed, else moto's."""
    with s3.start() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: s3.S3Server) -> str:
    """An empty bucket of this test's own."""
    return s3_server.make_bucket()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine, as a training without an address starts it; stopped when the session ends."""
    import ray

    from picinspector import runs

    os.environ.pop("RAY_ADDRESS", None)
    runs.connect(dashboard=True)
    yield
    ray.shutdown()


@pytest.fixture
def light_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that this process drives encode without torch: for tests of what happens around the encoders."""
    from tests.light_encoder import Encode

    monkeypatch.setattr("picinspector.stages.encode.Encode", Encode)


@pytest.fixture(scope="session")
def captioned_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle as `tiny`, with a captioner that babbles."""
    from picinspector import bundle
    from tests.bundles import tiny_bundle, write_captioner

    folder = tmp_path_factory.mktemp("bundles") / "captioned"
    tiny_bundle(folder)
    write_captioner(folder / "captioner")
    return bundle.seal(folder, "tiny", "0.0.1").folder


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_head.Head]:
    """A Ray head of its own that takes jobs; stopped when the session ends."""
    with ray_head.start(tmp_path_factory.mktemp("head") / "log") as started:
        yield started


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle with tiny random models."""
    from tests.bundles import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny").folder


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, s3_server: s3.S3Server, tiny: Path, captioned_bundle: Path
) -> Iterator[several_nodes.Cluster]:
    """A cluster of several machines, with both bundles in the image of its nodes; stopped when the session ends."""
    from tests import several_nodes

    with several_nodes.start(tmp_path_factory.mktemp("nodes"), s3_server, [tiny, captioned_bundle]) as started:
        yield started


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `clip` (ViT-L-14-quickgelu) and `dinov2` (base): random weights in the published formats."""
    import open_clip

    from tests.bundles import DINOV2_BASE, halve, write_clip, write_dinov2

    folder = tmp_path_factory.mktemp("full-size")
    write_clip(folder / "clip", open_clip.get_model_config("ViT-L-14-quickgelu"))
    write_dinov2(folder / "dinov2", DINOV2_BASE, resize_px=256, crop_px=224)
    halve(folder / "clip" / "open_clip_model.safetensors")
    halve(folder / "dinov2" / "model.safetensors")
    yield folder
    shutil.rmtree(folder)


#: In one line what goes to one process, because it shares what takes long to make. The lines that take longest come
#: first, so that no process is left alone with one of them at the end.
_LONGEST_FIRST = (
    ("test_pipeline.py",),
    ("test_resume.py",),
    ("test_full_size.py", "test_parity.py"),  # models of full size
    ("test_deploy.py", "test_jobs.py", "test_training_jobs.py"),  # a Ray head, which idles until the end of the session
    ("test_several_nodes.py", "test_training_nodes.py"),  # a cluster, the first as it is when it starts
    ("test_faults_workers.py",),
    ("test_sharing.py",),
    ("test_autoscaling.py",),
    ("test_train_attributes.py",),
    ("test_faults_s3.py",),
    ("test_train_captioner.py",),
    ("test_serve.py",),
    ("test_captions_job.py",),
    ("test_readme.py",),
    ("test_docs.py",),
    ("test_nightly.py",),
    ("test_verify.py",),
    ("test_notebook.py",),
    ("test_observability.py",),
    ("test_train_scorer.py",),
    ("test_odd_names.py",),
    ("test_prune.py",),
)
_PLACE = {name: place for place, names in enumerate(_LONGEST_FIRST) for name in names}


def pytest_configure(config: pytest.Config) -> None:
    """Keep xdist from taking files with many tests for those that take longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    items.sort(key=lambda item: _PLACE.get(item.path.name, len(_PLACE)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadfile`, with files of one line as if they were one file."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return str(_PLACE.get(Path(file).name, file))

    return Together(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the services of one of several processes to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["services"] = services.USED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take them."""
    services.USED.extend(line for line in node.workeroutput["services"] if line not in services.USED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what stood behind each service, so that a green run with a mock does not read like one with a server."""
    for line in services.USED:
        terminalreporter.write_line(line)
