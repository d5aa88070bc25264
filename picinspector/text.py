"""Names that others gave, on one line of a terminal or a page: they may hold whatever a file name may."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Without control characters and those that turn the direction of writing: each is a � instead."""
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def escaped(text: str) -> str:
    """The same, but each is an escape sequence of Python: two names that differ look different."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
