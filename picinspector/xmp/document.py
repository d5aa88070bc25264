"""Editing an XMP sidecar: our marks go in, a person's stay, and so does everything else.

XMP Specification Part 1 (ISO 16684-1): `xmp:Rating`, `xmp:Label` and the bag `dc:subject`. What we wrote is remembered
beside it in a namespace of our own, so that the next edit knows ours from a person's.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lxml import etree

from picinspector.errors import ErrorKind, PhotoError
from picinspector.xmp import NAMESPACE

#: Larger ones are left alone. Sidecars have a few kB; those with many brush strokes some hundred.
MAX_BYTES = 1024**2

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"
_DC = "http://purl.org/dc/elements/1.1/"
_DESCRIPTION, _LI, _BAG = f"{{{_RDF}}}Description", f"{{{_RDF}}}li", f"{{{_RDF}}}Bag"
_CONTAINERS = (_BAG, f"{{{_RDF}}}Seq", f"{{{_RDF}}}Alt")
_RATING, _LABEL, _SUBJECT = f"{{{_XMP}}}Rating", f"{{{_XMP}}}Label", f"{{{_DC}}}subject"
# Not `Rating`: programs that look for a name in any namespace would take ours for the rating.
_WRITTEN_RATING, _WRITTEN_LABEL = f"{{{NAMESPACE}}}WrittenRating", f"{{{NAMESPACE}}}WrittenLabel"
_WRITTEN_KEYWORDS, _QUALITY = f"{{{NAMESPACE}}}WrittenKeywords", f"{{{NAMESPACE}}}QualityScore"
_PREFIXES = {"xmp": _XMP, "dc": _DC, "picinspector": NAMESPACE}
for _prefix, _namespace in _PREFIXES.items():
    etree.register_namespace(_prefix, _namespace)

_EMPTY = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="%s"><rdf:Description rdf:about="" xmlns:xmp="%s" xmlns:dc="%s" xmlns:picinspector="%s"/>'
    b"</rdf:RDF></x:xmpmeta>\n" % tuple(namespace.encode() for namespace in (_RDF, _XMP, _DC, NAMESPACE))
)
#: What XML 1.0 cannot hold (section 2.2).
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

#: Before the root: a byte order mark, white space, processing instructions and comments.
_PROLOG = re.compile(r"(?:[\s\ufeff]|<\?.*?\?>|<!--.*?-->)*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Mark:
    """What a photo's sidecar is to say. What is None or not named, and was written by us before, is taken out again.

    Attributes:
        uri: of the photo.
        rating: 1 to 5 stars, -1 rejected.
        label: a word or a colour; programs have their own (`Red`, `Reject`).
        keywords: added to those of `dc:subject`.
        quality_score: 1-10, in our own namespace, to two decimals.
    """

    uri: str
    rating: int | None = None
    label: str | None = None
    keywords: tuple[str, ...] = ()
    quality_score: float | None = None

    def __post_init__(self) -> None:
        if self.rating not in (None, -1, 1, 2, 3, 4, 5):
            raise ValueError(f"rating {self.rating} of {self.uri}: expected 1 to 5, -1 or None")


@dataclass(frozen=True, slots=True)
class Edit:
    """What became of a sidecar.

    Attributes:
        content: all of it; None if nothing is to change.
        notes: what changes, and what of the mark was not written and why.
    """

    content: bytes | None
    notes: tuple[str, ...] = ()


def edit(
    data: bytes | None,
    mark: Mark,
    rated_elsewhere: bool = False,
    labelled_elsewhere: bool = False,
    overwrite: bool = False,
) -> Edit:
    """Put a mark into a sidecar. A photo that a person rated, here or elsewhere, gets no label of ours.

    Args:
        data: the sidecar; None makes a new one.
        mark: what it is to say.
        rated_elsewhere: a person's rating is in the photo or in another sidecar: this one, which would speak before it,
            gets none of ours.
        labelled_elsewhere: the same of a person's label.
        overwrite: a person's rating and label give way.

    Raises:
        PhotoError: it is no well-formed XMP, has a DTD, or is too large; to be left alone.
    """
    tree, rdf = _parse(_EMPTY if data is None else data)
    before = etree.tostring(tree)
    description = rdf.find(_DESCRIPTION)
    if description is None:
        description = etree.SubElement(rdf, _DESCRIPTION, {f"{{{_RDF}}}about": ""})
    rating = None if mark.rating is None else str(mark.rating)
    label = _clean(mark.label or "") or None
    notes = []
    if not overwrite:
        rated = rated_elsewhere or _stands(rdf, (_RATING, _WRITTEN_RATING), _number).persons
        kept_out = ["no rating of ours"] * (rated_elsewhere and rating is not None)
        kept_out += ["no label of ours"] * ((rated or labelled_elsewhere) and label is not None)
        if kept_out:
            notes.append(f"a person {'rated' if rated else 'labelled'} it already: {', '.join(kept_out)}")
        rating = None if rated_elsewhere else rating
        label = None if rated or labelled_elsewhere else label
    notes += _put(rdf, description, "rating", (_RATING, _WRITTEN_RATING), rating, overwrite, _number)
    notes += _put(rdf, description, "label", (_LABEL, _WRITTEN_LABEL), label, overwrite, str)
    notes += _put_keywords(rdf, description, list(dict.fromkeys(filter(None, map(_clean, mark.keywords)))))
    _set(rdf, description, _QUALITY, None if mark.quality_score is None else f"{mark.quality_score:.2f}")
    if etree.tostring(tree) == before:
        return Edit(None, tuple(notes))
    if data is None:
        etree.indent(tree)
    return Edit(_serialise(tree, _EMPTY if data is None else data), tuple(notes))


def _parse(data: bytes) -> tuple[etree._ElementTree, etree._Element]:
    """A document and its rdf:RDF."""
    if len(data) > MAX_BYTES:
        raise PhotoError(ErrorKind.TOO_MANY_BYTES, f"its sidecar has more than {MAX_BYTES >> 20} MB; left alone")
    if b"<!DOCTYPE" in data.replace(b"\0", b""):  # in UTF-16 too; before any parser sees what it declares
        raise PhotoError(ErrorKind.CORRUPT, "its sidecar has a DTD, which XMP has not; left alone")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError, LookupError) as error:
        raise PhotoError(ErrorKind.CORRUPT, f"its sidecar is no well-formed XML ({error}); left alone") from error
    tree = root.getroottree()
    if tree.docinfo.doctype:
        raise PhotoError(ErrorKind.CORRUPT, "its sidecar has a DTD, which XMP has not; left alone")
    rdf = next(root.iter(f"{{{_RDF}}}RDF"), None)
    if rdf is None:
        raise PhotoError(ErrorKind.CORRUPT, f"its sidecar is no XMP but <{etree.QName(root).localname}>; left alone")
    return tree, rdf


def _serialise(tree: etree._ElementTree, data: bytes) -> bytes:
    """The document in its encoding, with all that it had before and after its root: packet wrappers, padding, BOM."""
    root, encoding = tree.getroot(), tree.docinfo.encoding or "UTF-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "UTF-16"  # which the mark alone may say
    try:
        text = data.decode(encoding)
        name = f"{root.prefix}:" * bool(root.prefix) + etree.QName(root).localname
        prolog = _PROLOG.match(text)
        end = text.index(">", text.rindex(f"</{name}")) + 1
        whole = (prolog[0] if prolog else "") + etree.tostring(root, encoding="unicode", with_tail=False) + text[end:]
        content: bytes = whole.encode(encoding, errors="xmlcharrefreplace")
        same = etree.tostring(_parse(content)[0]) == etree.tostring(tree)
    except (LookupError, ValueError, PhotoError):
        same = False
    if not same:
        raise PhotoError(ErrorKind.CORRUPT, f"its sidecar in {encoding} cannot be written back as it was; left alone")
    return content


def _clean(text: str) -> str:
    """Text that XML can hold, on one line."""
    return " ".join(_FORBIDDEN.sub("", text).split())


# --- simple properties ------------------------------------------------------------------------------------------------


class _Standing(NamedTuple):
    """A property as it stands: its value, the one that we last wrote, and whose it is."""

    current: str | None
    written: str | None
    blank: bool
    ours: bool

    @property
    def persons(self) -> bool:
        return not (self.blank or self.ours)


def _stands(rdf: etree._Element, names: tuple[str, str], value_of: Callable[[str], object]) -> _Standing:
    current, written = (_get(rdf, name) for name in names)
    blank = current is None or not value_of(current)  # programs write rating 0 and an empty label for none
    ours = current is not None and written is not None and value_of(current) == value_of(written)
    return _Standing(current, written, blank, ours)


def _put(
    rdf: etree._Element,
    description: etree._Element,
    what: str,
    names: tuple[str, str],
    wanted: str | None,
    overwrite: bool,
    value_of: Callable[[str], object],
) -> list[str]:
    """Set or remove a property unless it is a person's, and remember what we wrote; what changed or was left."""
    name, remembered = names
    standing = _stands(rdf, names, value_of)
    current, written, blank, ours = standing
    if not (overwrite and wanted is not None):
        if standing.persons:
            _set(rdf, description, remembered, None)
            return [f"a person's {what} {current} stays"] * (wanted is not None and wanted != current)
        if blank and written is not None:
            return [f"a person took our {what} back"] * (wanted is not None)
    if wanted is None and not ours:
        return []
    _set(rdf, description, name, wanted)
    _set(rdf, description, remembered, wanted)
    if wanted is None:
        return [f"our {what} {current} goes"]
    return [f"{what} {wanted}"] * (wanted != current)


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _get(rdf: etree._Element, name: str) -> str | None:
    """The value of a simple property, in whichever rdf:Description and form it is; None without one."""
    for description in rdf.findall(_DESCRIPTION):
        if (value := description.get(name)) is not None:
            return str(value).strip()
        if (child := description.find(name)) is not None:
            return "".join(child.itertext("{*}*")).strip()
    return None


def _set(rdf: etree._Element, description: etree._Element, name: str, value: str | None) -> None:
    """Change a simple property in the form that it has, add it as an attribute, or remove it."""
    found = False
    for place in rdf.findall(_DESCRIPTION):
        if name in place.attrib:
            found = True
            if value is None:
                del place.attrib[name]
            else:
                place.set(name, value)
        for child in place.findall(name):
            found = True
            if value is None:
                _remove(child)
            elif (child.text or "").strip() != value or len(child):
                child[:] = []
                child.attrib.clear()
                child.text = value
    if not found and value is not None:
        description.set(name, value)


def _remove(element: etree._Element) -> None:
    """Remove an element and the white space before it."""
    parent, previous = element.getparent(), element.getprevious()
    if previous is not None:
        previous.tail = element.tail
    else:
        parent.text = element.tail
    parent.remove(element)


# --- keywords ---------------------------------------------------------------------------------------------------------


def _put_keywords(rdf: etree._Element, description: etree._Element, wanted: list[str]) -> list[str]:
    """Add ours, remove those of ours that no longer apply; a person's stay, and what a person removed stays away."""
    bags, written_bags = _bags(rdf, _SUBJECT), _bags(rdf, _WRITTEN_KEYWORDS)
    if bags is None or written_bags is None:
        return ["its keywords are no list; left alone"] * bool(wanted)
    present, written = _items(bags), _items(written_bags)
    added = [word for word in wanted if word not in present and word not in written]
    _change(bags, description, _SUBJECT, added, {word for word in written if word not in wanted})
    ours = {word for word in wanted if word in written} | set(added)
    _change(written_bags, description, _WRITTEN_KEYWORDS, added, {word for word in written if word not in ours})
    back = [word for word in wanted if word in written and word not in present]
    gone = [word for word in present if word in written and word not in wanted]
    told = (("keywords ", added, ""), ("our keywords ", gone, " go"), ("a person took our keywords ", back, " back"))
    return [f"{before}{', '.join(words)}{after}" for before, words, after in told if words]


def _bags(rdf: etree._Element, name: str) -> list[etree._Element] | None:
    """The containers that hold a list; None if it is something else."""
    found = []
    for description in rdf.findall(_DESCRIPTION):
        if name in description.attrib:
            return None
        for child in description.findall(name):
            if (bag := next(child.iterchildren(*_CONTAINERS), None)) is None:
                return None
            found.append(bag)
    return found


def _items(bags: list[etree._Element]) -> dict[str, None]:
    return {(item.text or "").strip(): None for bag in bags for item in bag.findall(_LI)}


def _change(
    bags: list[etree._Element], description: etree._Element, name: str, added: list[str], removed: set[str]
) -> None:
    for bag in bags:
        for item in bag.findall(_LI):
            if (item.text or "").strip() in removed:
                _remove(item)
                if bag.find(_LI) is None and not added:
                    _remove(bag.getparent())
                    break
    if not added:
        return
    bag = bags[0] if bags else etree.SubElement(etree.SubElement(description, name), _BAG)
    for word in added:
        last = bag[-1] if len(bag) else None
        item = etree.SubElement(bag, _LI)
        item.text = word
        if last is not None:  # in line with the others
            item.tail, last.tail = last.tail, bag.text
