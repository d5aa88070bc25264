"""What a store that answers late costs: `python -m benchmarks.latency [--ms 50] [--photos 600]`.

The job over photos in a folder, and over the same photos in a real S3 server (Ceph radosgw, on the same cores), behind
a proxy that passes requests on at once, and one that holds each back. The ratio of the last two is what latency alone
costs; against the folder the server's own work and the proxy's count too. Start-up is left out as in
`benchmarks.pipeline`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import libraries, ratios
from benchmarks.pipeline import job, paths
from picinspector import pipeline, runs
from tests import s3_server
from tests.fault_proxy import Fault, FaultProxy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=float, default=50.0, help="that each request waits")
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--size", default="2mp", choices=list(libraries.SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the library is made, and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, s3_server.start() as server:
        scratch = arguments.scratch or Path(temporary)
        files = paths(
            libraries.make(scratch / f"{arguments.size}-{arguments.photos}", arguments.photos, arguments.size)
        )
        files, bucket = files[: arguments.photos], server.make_bucket()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: server.client().upload_file(path, bucket, Path(path).name), files))
        late = Fault("late", rf"GET /{bucket}/", seconds=arguments.ms / 1000)
        runs.connect()
        options = pipeline.Options(show_progress=False)
        with FaultProxy(server.endpoint_url) as plain, FaultProxy(server.endpoint_url, [late]) as held:
            few, uris = len(files) // 5, [f"s3://{bucket}/{Path(path).name}" for path in files]
            contenders = {"folder": job(files, few, len(files), options, scratch)}
            for name, proxy in (("s3", plain), ("s3 late", held)):
                remote = dataclasses.replace(options, storage_options=proxy.storage_options(server))
                contenders[name] = job(uris, few, len(files), remote, scratch)
            measured = ratios.take_turns(contenders, arguments.rounds)
    rates = ", ".join(f"{name} {statistics.median(values):.1f}/s" for name, values in measured.items())
    rows = [
        ratios.Row(f"S3 with {arguments.ms:g} ms over S3", ratios.over(measured, "s3 late", "s3"), 0.90, figures=rates),
        ratios.Row(f"S3 with {arguments.ms:g} ms over a folder", ratios.over(measured, "s3 late", "folder"), 0.90),
    ]
    ratios.show(f"latency, {arguments.size}, {few} and {len(files)} photos, {arguments.rounds} rounds", rows)


if __name__ == "__main__":
    main()
