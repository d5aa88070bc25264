"""The page at `/`: choose a photo, see what the service says of it. One HTML file that asks nobody but the service.

What the service answers is not trusted: the script makes text nodes only. By the page's Content-Security-Policy no
script runs and no style applies but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from picinspector import __version__, schema


class Page(NamedTuple):
    """The page, and the headers it needs."""

    content: bytes
    headers: dict[str, str]


def render(wants_token: bool, scorer_kind: str) -> Page:
    """The page.

    Args:
        wants_token: whether the service has a token to type.
        scorer_kind: decides what the attributes are called.
    """
    style, script = _source("page.css"), _source("page.js")
    labels = schema.labels_of(scorer_kind)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    content = environment.from_string(_source("page.html")).render(
        style=Markup(style),
        script=Markup(script),
        version=__version__,
        wants_token=wants_token,
        attributes=json.dumps({name: labels[name] for name in schema.ATTRIBUTES}),
    )
    policy = (
        f"default-src 'none'; img-src blob: data:; connect-src 'self'; style-src '{_sha256(style)}'; "
        f"script-src '{_sha256(script)}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return Page(content.encode(), {"content-security-policy": policy})


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _source(name: str) -> str:
    return resources.files("picinspector.serve").joinpath(name).read_text("utf-8")
