"""Text without secrets: passwords, signatures and keys, by how they look and by what they are known to be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

#: How names end whose values are secret, in storage options, query strings, headers and what libraries print of them.
_NAME = (
    r"(?:secret|token|passwd|password|credential|signature|authorization|(?:api|account|access|private)[_-]?key"
    r"|connection[_-]?string)(?:[_-]?(?:key|id))?s?|\b(?:key|pwd|sas|sig)"
)
_SECRET_NAME = re.compile(rf"(?:{_NAME})$", re.IGNORECASE)
#: Shorter values of options are not looked for: they would cut holes into ordinary words.
_SHORTEST = 8
#: What the clients of object stores take from the environment.
_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING")

#: Each is linear in the length of the text: an error's may be long.
_PATTERNS = (
    (re.compile(r"\b(\w+://)[^@/\s]+@"), r"\1"),
    (re.compile(r"\b(\w+://[^\s?'\"]{0,4096})\?[^\s'\"]*"), r"\1?…"),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?)[^'\"\r\n]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"\b(bearer)\s+[\w.~+/=-]{12,}", re.IGNORECASE), r"\1 …"),
    (re.compile(r"\b(x-(?:amz|goog)-[\w-]{1,40}=)[^&\s'\"]+", re.IGNORECASE), r"\1…"),
    # 'secret': '…' as Python and JSON print it; lower case only, because `Key` names an object in S3's own messages.
    (re.compile(rf"((?:{_NAME})['\"]\s*:\s*b?(['\"]))(?:(?!\2).)*"), r"\1…"),
    (re.compile(rf"((?!\bkey=)(?:{_NAME})=)(?:'[^']*'|\"[^\"]*\"|[^\s'\",;&)\]}}]+)", re.IGNORECASE), r"\1…"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}\b"), r"\1…"),
)

_hidden: set[str] = set()


def hide(options: Mapping[str, Any] | None) -> None:
    """From now on keep the secret values of these storage options out of all redacted text of this process."""
    for name, value in (options or {}).items():
        if isinstance(value, Mapping):
            hide(value)
        elif isinstance(value, str) and len(value) >= _SHORTEST and _SECRET_NAME.search(name):
            _hidden.update((value, quote(value, safe="")))


def redact(text: str) -> str:
    """Text without what `hide` was told, the environment's keys, passwords and query strings of URLs, and headers."""
    known = _hidden.union(os.environ.get(name, "") for name in _VARIABLES)
    for value in sorted(known, key=len, reverse=True):  # the longer first: one may hold another
        if len(value) >= _SHORTEST:
            text = text.replace(value, "…")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def scrub(value: Any) -> Any:
    """JSON-like data with every text redacted, and texts under the name of a secret gone altogether."""
    if isinstance(value, Mapping):
        return {
            name: "…" if isinstance(part, str) and _SECRET_NAME.search(str(name)) else scrub(part)
            for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(part) for part in value]
    return redact(value) if isinstance(value, str) else value
