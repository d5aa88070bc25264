"""The command that answers over HTTP."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from picinspector.cli.options import Address, BundleRef, Captions, Describe, bundle_path, limits
from picinspector.errors import UsageError


def serve(
    bundle: BundleRef = "builtin",
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Holds the bearer token; default PICINSPECTOR_TOKEN.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--allow-public-without-token", help="Let others in without a token.")
    ] = False,
    captions: Describe = Captions.none,
    replicas: Annotated[
        str | None, typer.Option(metavar="MIN/MAX", help="Replicas at least and at most; default from the cluster.")
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each, may be a fraction; 0 works on the CPU.")
    ] = None,
    queue: Annotated[int, typer.Option(min=8, help="Photos that may wait; more are turned away.")] = 64,
    max_megapixels: Annotated[float, typer.Option(min=0, help="Refuse photos with more pixels.")] = 100.0,
    max_megabytes: Annotated[float, typer.Option(min=0, help="Refuse larger files.")] = 32.0,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds for a request.")] = 30.0,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch URLs from private and loopback addresses too.")
    ] = False,
    name: Annotated[str, typer.Option(help="Of the application; another for each service on a cluster.")] = (
        "picinspector"
    ),
    address: Address = None,
) -> int:
    """Score single photos over HTTP, until SIGTERM: POST /v1/score, a page at /."""
    from picinspector import serve as service
    from picinspector.serve.settings import Rules, Settings, is_loopback, token_from

    token = token_from(token_file)
    rules = Rules(
        token=token,
        limits=limits(max_megapixels, max_megabytes),
        timeout_s=timeout,
        local_only=token is None and not public and is_loopback(host),
        allow_private=allow_private,
    )
    settings = Settings(
        bundle=bundle_path(bundle),
        host=host,
        port=port,
        rules=rules,
        public=public,
        captions=captions is Captions.all,
        replicas=_read_replicas(replicas),
        gpus=gpus_per_replica,
        queue=queue,
        name=name,
        address=address,
    )
    service.run(settings, lambda url: print(f"picinspector: listening on {url}", file=sys.stderr, flush=True))
    return 0


def _read_replicas(text: str | None) -> tuple[int, int] | None:
    """`2/8`, or `2` for two of them always."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,4})(?:/(\d{1,4}))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(f"--replicas {text}: write it like 1/4, at least 1 and at most 4")
    return low, high
