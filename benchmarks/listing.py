"""Listing a large library on a real S3 server: `python -m benchmarks.listing [--keys 50000 200000]`.

Ceph's radosgw on loopback, as the tests start it, with empty objects under sixteen prefixes, named as cameras name
photos. In turns, each in a process of its own:

- ours: `manifest.list_library`, streamed: manifest tables with image ids;
- s3fs: `S3FileSystem.find(..., detail=True)`: a dict of infos, and no image ids.

Server and client share the machine's cores here, so the CPU seconds of the client alone are told too: they carry over
to a server elsewhere. Memory is the peak of the client process over what it had before the first request.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from benchmarks import ratios
from picinspector.stages import peak_memory_bytes
from tests import s3_server

TARGET = 2.0
PREFIXES = 16
_PUTTERS = 8


def put_keys(server: s3_server.S3Server, keys: int) -> str:
    """A bucket of so many empty objects. Anybody may write to it: a signature would cost more than the request."""
    bucket = server.make_bucket()
    server.client().put_bucket_acl(Bucket=bucket, ACL="public-read-write")
    address = urlsplit(server.endpoint_url).netloc

    def put(part: int) -> None:
        connection = http.client.HTTPConnection(address)
        for number in range(part, keys, _PUTTERS):
            connection.request("PUT", f"/{bucket}/{name_of(number)}", headers={"Content-Length": "0"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"PUT answered {answer.status}")
        connection.close()

    with ThreadPoolExecutor(_PUTTERS) as pool:
        list(pool.map(put, range(_PUTTERS)))
    return bucket


def name_of(number: int) -> str:
    """Where a photo lies: `2011/IMG_00000001.jpg`."""
    return f"{2010 + number % PREFIXES}/IMG_{number:08}.jpg"


def list_all(how: str, bucket: str, options: dict[str, Any]) -> dict[str, float]:
    """One listing in this process: seconds, CPU seconds and memory of the client, from the first request on."""
    import s3fs

    from picinspector.manifest import list_library

    filesystem = s3fs.S3FileSystem(**options)
    filesystem.ls("")  # a connection, and the model of the API, which botocore takes a second to read
    before, times, started = peak_memory_bytes(), os.times(), time.perf_counter()
    if how == "ours":
        keys = sum(table.num_rows for table in list_library(f"s3://{bucket}", options))
    else:
        keys = len(filesystem.find(bucket, detail=True))
    seconds, after = time.perf_counter() - started, os.times()
    cpu_s = after.user + after.system - times.user - times.system
    return {"keys": keys, "seconds": seconds, "cpu_s": cpu_s, "memory_mb": (peak_memory_bytes() - before) / 1e6}


def main() -> None:
    """Put the keys, list them in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(list_all(**arguments.step)))
        return
    os.environ.update(s3_server.ENVIRONMENT)
    rows: list[ratios.Row] = []
    with s3_server.start() as server:
        for keys in arguments.keys:
            started = time.perf_counter()
            bucket = put_keys(server, keys)
            each_ms = 1000 * (time.perf_counter() - started) / keys
            print(f"  put {keys:,} keys on {server.kind}, {each_ms:.2f} ms each", file=sys.stderr, flush=True)
            rows += _compare(server, bucket, keys, arguments.rounds)
    ratios.show(f"listing, {server.kind}", rows)


def _compare(server: s3_server.S3Server, bucket: str, keys: int, rounds: int) -> list[ratios.Row]:
    found: dict[str, list[dict[str, float]]] = {"ours": [], "s3fs": []}

    def alone(how: str) -> float:
        step = {"how": how, "bucket": bucket, "options": server.storage_options}
        command = [sys.executable, "-m", "benchmarks.listing", "--step", json.dumps(step)]
        found[how].append(ratios.run_alone(command).answer)
        if found[how][-1]["keys"] != keys:
            raise RuntimeError(f"{how} found {found[how][-1]['keys']} of {keys} keys")
        return keys / found[how][-1]["seconds"]

    measured = ratios.take_turns({how: lambda how=how: alone(how) for how in found}, rounds)  # type: ignore[misc]
    cpu = [theirs["cpu_s"] / ours["cpu_s"] for ours, theirs in zip(found["ours"], found["s3fs"], strict=True)]

    def middle(how: str, name: str) -> float:
        return statistics.median(one[name] for one in found[how])

    return [
        ratios.Row(f"{keys:,} keys: keys/s to s3fs.find", ratios.over(measured, "ours", "s3fs"), TARGET, figures=
                   f"{statistics.median(measured['ours']):,.0f} and {statistics.median(measured['s3fs']):,.0f} keys/s"),
        ratios.Row(f"{keys:,} keys: CPU of s3fs.find to ours", cpu, figures=
                   f"{middle('s3fs', 'cpu_s'):.1f} and {middle('ours', 'cpu_s'):.1f} s of the client's"),
        ratios.Row(f"{keys:,} keys: memory to s3fs.find", [
                   ours["memory_mb"] / theirs["memory_mb"]
                   for ours, theirs in zip(found["ours"], found["s3fs"], strict=True)], figures=
                   f"{middle('ours', 'memory_mb'):.0f} and {middle('s3fs', 'memory_mb'):.0f} MB over the start"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
