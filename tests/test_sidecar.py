"""Sidecars: what goes in, what stays, and that another program (exiftool) agrees."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from PIL import Image

from picinspector import actions, sidecar, xmp
from picinspector.errors import PhotoError
from picinspector.sidecar import Mark
from picinspector.xmp.document import edit
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import S3Server

NS = {
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "pi": "http://picinspector.org/ns/1.0/",
}
OURS = {f"{{{NS['xmp']}}}Rating", f"{{{NS['xmp']}}}Label", f"{{{NS['dc']}}}subject"}

LIGHTROOM = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0-c000 1.000000, 0000/00/00-00:00:00        ">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
   xmp:CreatorTool="Adobe Lightroom Classic 14.0 (Macintosh)"
   xmp:Rating="0"
   crs:Version="17.0"
   crs:Exposure2012="+0.45"
   crs:HasSettings="True">
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Oma &amp; Opa</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>Family|Oma &amp; Opa</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <crs:ToneCurvePV2012>
    <rdf:Seq>
     <rdf:li>0, 0</rdf:li>
     <rdf:li>255, 255</rdf:li>
    </rdf:Seq>
   </crs:ToneCurvePV2012>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
                                                                                \n\
<?xpacket end="w"?>""".encode()

DARKTABLE = b"""\
<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
    xmlns:darktable="http://darktable.sf.net/"
   exif:DateTimeOriginal="2024:05:01 10:00:00.000"
   xmp:Rating="1"
   xmpMM:DerivedFrom="photo.nef"
   darktable:xmp_version="5"
   darktable:history_end="1">
   <!-- kept -->
   <darktable:history>
    <rdf:Seq>
     <rdf:li
      darktable:num="0"
      darktable:operation="exposure"
      darktable:params="0000000000000000e0d0c0b0"/>
    </rdf:Seq>
   </darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""


def exiftool(*arguments: str) -> str:
    program = shutil.which("exiftool")
    assert program, "exiftool is missing; on Debian: apt-get install libimage-exiftool-perl"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seen_by_exiftool(path: Path) -> dict[str, Any]:
    [found] = json.loads(exiftool("-j", "-a", "-G1", "-XMP:all", "-Warning", str(path)))
    assert not any("Warning" in name or "Error" in name for name in found), found
    found.pop("SourceFile")
    return dict(found)


def simple(name: str, value: str) -> bytes:
    """A sidecar with one attribute (`xmp:Rating="4"`) or several."""
    declared = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in NS.items())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {declared} {name}>{value}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def values(data: bytes) -> dict[str, Any]:
    """`Rating`, `WrittenRating` and so on -> text or list, of attributes and elements of our names."""
    found: dict[str, Any] = {}
    for element in etree.fromstring(data).iter("{*}Description"):
        for name, value in element.attrib.items():
            if name in OURS or NS["pi"] in name:
                found[etree.QName(name).localname] = value
        for child in element:
            if child.tag in OURS or NS["pi"] in str(child.tag):
                items = [item.text for item in child.iter("{*}li")]
                found[etree.QName(child).localname] = items or child.text
    return found


def others(data: bytes) -> list[Any]:
    """All of a sidecar that is not ours to change, in order."""
    root = etree.fromstring(data)
    for element in root.iter("{*}Description"):
        for child in list(element):
            if child.tag in OURS or NS["pi"] in str(child.tag):
                element.remove(child)
    return [
        (
            str(element.tag),
            sorted(
                (name, value) for name, value in element.attrib.items() if name not in OURS and NS["pi"] not in name
            ),
            (element.text or "").strip(),
        )
        for element in root.iter()
    ]


def content_of(data: bytes | None, mark: Mark, **how: bool) -> bytes:
    content = edit(data, mark, **how).content
    assert content is not None
    return content


def jpeg(rating: int | None = None, label: str | None = None) -> bytes:
    buffer = io.BytesIO()
    said = f'xmp:Rating="{rating}"' * (rating is not None) + f' xmp:Label="{label}"' * (label is not None)
    extra = {"xmp": simple(said, "")} if said else {}
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", **extra)
    return buffer.getvalue()


def run(marks: list[Mark], naming: sidecar.Naming = "appended", **how: Any) -> list[actions.Action]:
    return list(actions.carry_out(sidecar.plan(marks, naming, **how)))


# --- one document -----------------------------------------------------------------------------------------------------


def test_a_new_sidecar_says_what_it_was_told() -> None:
    content = content_of(None, Mark("a.jpg", 4, "Red", ("night", "a & b"), 7.316))
    assert values(content) == {
        "Rating": "4",
        "Label": "Red",
        "subject": ["night", "a & b"],
        "WrittenRating": "4",
        "WrittenLabel": "Red",
        "WrittenKeywords": ["night", "a & b"],
        "QualityScore": "7.32",
    }
    assert xmp.find_rating(content) == xmp.find_written_rating(content) == 4
    assert xmp.find_persons_rating(content) is None


def test_exiftool_reads_a_new_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "a.xmp"
    path.write_bytes(content_of(None, Mark("a.jpg", -1, "Reject é", ("night", 'a, <b> & "c"', "写真"), 7.0)))
    found = seen_by_exiftool(path)
    assert found["XMP-xmp:Rating"] == -1
    assert found["XMP-xmp:Label"] == "Reject é"
    assert found["XMP-dc:Subject"] == ["night", 'a, <b> & "c"', "写真"]
    assert found["XMP-picinspector:QualityScore"] == 7.0


@pytest.mark.parametrize(
    ("before", "wanted", "after", "note"),
    [
        ("", 4, {"Rating": "4", "WrittenRating": "4"}, "rating 4"),
        ('xmp:Rating="0"', 4, {"Rating": "4", "WrittenRating": "4"}, "rating 4"),
        ('xmp:Rating="3" pi:WrittenRating="3"', 4, {"Rating": "4", "WrittenRating": "4"}, "rating 4"),
        ('xmp:Rating="3.0" pi:WrittenRating="3"', 4, {"Rating": "4", "WrittenRating": "4"}, "rating 4"),
        ('xmp:Rating="3" pi:WrittenRating="3"', None, {}, "our rating 3 goes"),
        # A person's: never overwritten, and no longer remembered as ours.
        ('xmp:Rating="5"', 4, None, "a person's rating 5 stays"),
        ('xmp:Rating="-1"', 4, None, "a person's rating -1 stays"),
        ('xmp:Rating="5"', None, None, ""),
        ('xmp:Rating="4"', 4, None, ""),
        ('xmp:Rating="five"', 4, None, "a person's rating five stays"),
        ('xmp:Rating="5" pi:WrittenRating="3"', 4, {"Rating": "5"}, "a person's rating 5 stays"),
        ('xmp:Rating="5" pi:WrittenRating="3"', None, {"Rating": "5"}, ""),
        # Taken back: what a person removed stays away.
        ('xmp:Rating="0" pi:WrittenRating="3"', 4, None, "a person took our rating back"),
        ('pi:WrittenRating="3"', 4, None, "a person took our rating back"),
        ('xmp:Label="Green"', 4, {"Label": "Green", "Rating": "4", "WrittenRating": "4"}, "rating 4"),
    ],
)
def test_whose_rating_it_is(before: str, wanted: int | None, after: dict[str, str] | None, note: str) -> None:
    data = simple(before, "")
    edited = edit(data, Mark("a.jpg", wanted))
    assert (values(edited.content) if edited.content else None) == after
    assert "; ".join(edited.notes) == note


def test_a_rating_is_overwritten_when_told_so() -> None:
    for before in ('xmp:Rating="5"', 'xmp:Rating="0" pi:WrittenRating="3"', 'pi:WrittenRating="3"'):
        content = content_of(simple(before, ""), Mark("a.jpg", 4), overwrite=True)
        assert values(content) == {"Rating": "4", "WrittenRating": "4"}
    assert edit(simple('xmp:Rating="5"', ""), Mark("a.jpg"), overwrite=True).content is None  # nothing to put there
    assert values(content_of(None, Mark("a.jpg", 4), rated_elsewhere=True, overwrite=True))["Rating"] == "4"


def test_a_rating_elsewhere_keeps_ours_out() -> None:
    edited = edit(None, Mark("a.jpg", 4, keywords=("night",)), rated_elsewhere=True)
    assert edited.content is not None
    assert values(edited.content) == {"subject": ["night"], "WrittenKeywords": ["night"]}
    assert edited.notes == ("a person rated it already: no rating of ours", "keywords night")
    ours = simple('xmp:Rating="4" pi:WrittenRating="4"', "")
    assert values(content_of(ours, Mark("a.jpg", 4), rated_elsewhere=True)) == {}


@pytest.mark.parametrize(
    ("before", "elsewhere", "note"),
    [
        ('xmp:Rating="5"', {}, "a person's rating 5 stays; a person rated it already: no label of ours"),
        ("", {"rated_elsewhere": True}, "a person rated it already: no rating of ours, no label of ours"),
        ("", {"labelled_elsewhere": True}, "a person labelled it already: no label of ours; rating 4"),
    ],
)
def test_a_photo_that_a_person_rated_or_labelled_gets_no_label(before: str, elsewhere: Any, note: str) -> None:
    edited = edit(simple(before, ""), Mark("a.jpg", 4, "Red"), **elsewhere)
    assert "Label" not in values(edited.content or b"<x/>")
    assert sorted("; ".join(edited.notes).split("; ")) == sorted(note.split("; "))
    ours = simple(f'{before} xmp:Label="Red" pi:WrittenLabel="Red"', "")
    assert "Label" not in values(content_of(ours, Mark("a.jpg", 4, "Red"), **elsewhere))  # ours of before goes
    persons = simple(f'{before} xmp:Label="Green"', "")
    assert values(edit(persons, Mark("a.jpg", 4, "Red"), **elsewhere).content or persons)["Label"] == "Green"
    assert values(content_of(persons, Mark("a.jpg", 4, "Red"), overwrite=True, **elsewhere))["Label"] == "Red"


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        ("", "Red", {"Label": "Red", "WrittenLabel": "Red"}),
        ('xmp:Label=""', "Red", {"Label": "Red", "WrittenLabel": "Red"}),
        ('xmp:Label="Blue"', "Red", None),
        ('xmp:Label="Blue" pi:WrittenLabel="Blue"', "Red", {"Label": "Red", "WrittenLabel": "Red"}),
        ('xmp:Label="Blue" pi:WrittenLabel="Blue"', None, {}),
        ('pi:WrittenLabel="Blue"', "Red", None),
    ],
)
def test_whose_label_it_is(before: str, wanted: str | None, after: dict[str, str] | None) -> None:
    content = edit(simple(before, ""), Mark("a.jpg", label=wanted)).content
    assert (values(content) if content else None) == after


def test_an_element_stays_an_element() -> None:
    content = content_of(simple("", "<xmp:Rating>0</xmp:Rating>"), Mark("a.jpg", 2))
    assert b"<xmp:Rating>2</xmp:Rating>" in content
    assert xmp.find_rating(content) == 2
    assert values(content_of(content, Mark("a.jpg"))) == {}


def bag(name: str, *words: str) -> str:
    return f"<{name}><rdf:Bag>{''.join(f'<rdf:li>{word}</rdf:li>' for word in words)}</rdf:Bag></{name}>"


def test_keywords_of_a_person_stay_and_ours_come_and_go() -> None:
    first = content_of(simple("", bag("dc:subject", "Oma", "night")), Mark("a.jpg", keywords=("night", "best")))
    assert values(first) == {"subject": ["Oma", "night", "best"], "WrittenKeywords": ["best"]}
    second = content_of(first, Mark("a.jpg", keywords=("plant",)))
    assert values(second) == {"subject": ["Oma", "night", "plant"], "WrittenKeywords": ["plant"]}
    assert edit(second, Mark("a.jpg", keywords=("plant",))).content is None
    removed = second.replace(b"<rdf:li>plant</rdf:li>", b"", 1)  # by a person, from dc:subject
    edited = edit(removed, Mark("a.jpg", keywords=("plant",)))
    assert edited.content is None
    assert edited.notes == ("a person took our keywords plant back",)
    assert values(content_of(second, Mark("a.jpg"))) == {"subject": ["Oma", "night"]}
    alone = content_of(None, Mark("a.jpg", keywords=("night",)))
    assert values(content_of(alone, Mark("a.jpg"))) == {}


def test_keywords_in_an_unknown_form_are_left_alone() -> None:
    for data in (simple('dc:subject="night"', ""), simple("", "<dc:subject>night</dc:subject>")):
        edited = edit(data, Mark("a.jpg", keywords=("best",)))
        assert edited.content is None
        assert edited.notes == ("its keywords are no list; left alone",)


@pytest.mark.parametrize("data", [LIGHTROOM, DARKTABLE], ids=["lightroom", "darktable"])
def test_everything_else_stays(data: bytes, tmp_path: Path) -> None:
    content = content_of(data, Mark("a.jpg", 4, "Red", ("best",), 8.0), overwrite=True)
    assert others(content) == others(data)
    root = rb"<x:xmpmeta.*</x:xmpmeta>"
    assert re.split(root, content, flags=re.DOTALL) == re.split(root, data, flags=re.DOTALL)  # wrappers and padding
    assert (b"<!-- kept -->" in content) == (b"<!-- kept -->" in data)
    assert content.count(b'xmp:Rating="4"') == 1  # in the place that it had
    (tmp_path / "before.xmp").write_bytes(data)
    (tmp_path / "after.xmp").write_bytes(content)
    before, after = seen_by_exiftool(tmp_path / "before.xmp"), seen_by_exiftool(tmp_path / "after.xmp")
    persons = ["Oma & Opa"] if data is LIGHTROOM else []
    assert after == before | {
        "XMP-xmp:Rating": 4,
        "XMP-xmp:Label": "Red",
        "XMP-dc:Subject": [*persons, "best"] if persons else "best",
        "XMP-picinspector:WrittenRating": 4,
        "XMP-picinspector:WrittenLabel": "Red",
        "XMP-picinspector:WrittenKeywords": "best",
        "XMP-picinspector:QualityScore": 8.0,
    }
    back = content_of(content, Mark("a.jpg"))
    assert others(back) == others(data)
    assert values(back) == ({"subject": persons} if persons else {})


def test_what_exiftool_wrote_is_read_and_edited_and_what_we_wrote_it_edits(tmp_path: Path) -> None:
    path = tmp_path / "a.xmp"
    exiftool("-o", str(path), "-XMP-xmp:Rating=4", "-XMP-dc:Subject=mine", "-XMP-dc:Title=Hello")
    assert xmp.find_rating(path.read_bytes()) == 4
    edited = edit(path.read_bytes(), Mark("a.jpg", 2, "Red", ("best",)))
    assert edited.content is not None
    assert edited.notes == (
        "a person rated it already: no label of ours",
        "a person's rating 4 stays",
        "keywords best",
    )
    path.write_bytes(edited.content)
    found = seen_by_exiftool(path)
    assert (found["XMP-xmp:Rating"], found["XMP-dc:Subject"], found["XMP-dc:Title"]) == (4, ["mine", "best"], "Hello")

    path.write_bytes(content_of(None, Mark("a.jpg", 2, "Red", ("best",))))
    exiftool("-overwrite_original", "-XMP-xmp:Label=Blue", "-XMP-dc:Subject+=mine", str(path))  # a person's label
    data = path.read_bytes()
    assert xmp.find_persons_rating(data) is None  # still ours, in the form that exiftool gave it
    content = content_of(data, Mark("a.jpg", 3, "Red"))
    assert values(content) == {"Rating": "3", "WrittenRating": "3", "Label": "Blue", "subject": ["mine"]}


TEXT = st.text(max_size=30)
MARKS = st.builds(
    Mark,
    uri=st.just("a.jpg"),
    rating=st.sampled_from([None, -1, 1, 2, 3, 4, 5]),
    label=st.none() | TEXT,
    keywords=st.lists(TEXT, max_size=4).map(tuple),
    quality_score=st.none() | st.floats(1, 10),
)


@given(data=st.sampled_from([None, LIGHTROOM, simple("", "")]), marks=st.lists(MARKS, min_size=1, max_size=4))
def test_any_marks_one_after_the_other(data: bytes | None, marks: list[Mark]) -> None:
    """The last mark counts, a second run changes nothing, and what is a person's is there at the end."""
    start = data
    for mark in marks:
        data = edit(data, mark).content or data
    last = marks[-1]
    if data is None:
        assert (last.rating, last.quality_score) == (None, None)
        return
    assert edit(data, last).content is None
    assert xmp.find_rating(data) == last.rating or (last.rating is None and not xmp.find_rating(data))
    words = {" ".join(word.split()) for word in last.keywords if word.isprintable()} - {""}
    assert words <= set(values(data).get("subject") or [])
    if start is LIGHTROOM:
        assert others(data) == others(LIGHTROOM)
        assert "Oma & Opa" in values(data)["subject"]


def test_a_keyword_stands_in_line_with_the_others() -> None:
    content = content_of(LIGHTROOM, Mark("a.jpg", keywords=("best", "night")))
    before = b"     <rdf:li>Oma &amp; Opa</rdf:li>\n"
    assert before + b"     <rdf:li>best</rdf:li>\n     <rdf:li>night</rdf:li>\n    </rdf:Bag>" in content


def test_text_that_xml_cannot_hold_is_cleaned() -> None:
    content = content_of(
        None, Mark("a.jpg", label="a\x00b\ud800\n c", keywords=("\x1b[31m", " x ", "x", "\ufffe", "]]>"))
    )
    assert values(content)["Label"] == "ab c"
    assert values(content)["subject"] == ["[31m", "x", "]]>"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "iso-8859-1", "utf-8-sig", "utf-16 undeclared"])
def test_encodings_stay(encoding: str) -> None:
    text = simple('xmp:Rating="2" pi:WrittenRating="2"', bag("dc:subject", "Käse")).decode()
    if encoding == "utf-16-be":
        data = b"\xfe\xff" + f'<?xml version="1.0" encoding="UTF-16"?>\n{text}'.encode(encoding)
    elif encoding == "utf-16 undeclared":
        data = text.encode("utf-16")
    else:
        name = encoding.removesuffix("-sig").upper()
        data = f'<?xml version="1.0" encoding="{name}"?>\n{text}\n'.encode(encoding)
    content = content_of(data, Mark("a.jpg", 4, keywords=("写真",)))
    assert values(content)["subject"] == ["Käse", "写真"]
    assert xmp.find_rating(content) == 4
    assert edit(content, Mark("a.jpg", 4, keywords=("写真",))).content is None
    assert content[:2] in (data[:2], b"\xff\xfe")  # UTF-16 of either order has its mark


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 9)) + "]>"
BROKEN = {
    "empty": b"",
    "no XML": b"\xff\xd8\xff\xe0 a JPEG",
    "cut short": LIGHTROOM[:600],
    "another XML": b"<html><body/></html>",
    "billion laughs": LAUGHS.encode() + simple("", "&a8;"),
    "an entity from outside": b'<!DOCTYPE x SYSTEM "file:///etc/passwd">' + simple("", ""),
    "a DTD in UTF-16": ("\ufeff<!DOCTYPE x [<!ENTITY a 'b'>]>" + simple("", "").decode()).encode("utf-16-le"),
    "a DTD in UTF-7": b'<?xml version="1.0" encoding="UTF-7"?>+ADwAIQ-DOCTYPE x+AD4-' + simple("", ""),
    "an unknown entity": simple("", "<xmp:Label>&five;</xmp:Label>"),
    "an unknown encoding": b'<?xml version="1.0" encoding="klingon"?>' + simple("", ""),
    "too large": simple("", " " * 1024**2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_xmp_is_left_alone(name: str, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="left alone"):
        edit(BROKEN[name], Mark("a.jpg", 4), overwrite=True)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.jpg.xmp").write_bytes(BROKEN[name])
    [action] = run([Mark(f"{tmp_path}/a.jpg", 4)])
    assert action.state == "refused"
    assert "left alone" in action.note
    assert "\n" not in action.note
    assert (tmp_path / "a.jpg.xmp").read_bytes() == BROKEN[name]


@pytest.mark.parametrize("name", ["billion laughs", "an entity from outside", "a DTD in UTF-16"])
def test_no_parser_sees_a_dtd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etree, "fromstring", None)
    with pytest.raises(PhotoError, match="its sidecar has a DTD"):
        edit(BROKEN[name], Mark("a.jpg", 4))


# --- files ------------------------------------------------------------------------------------------------------------


def test_both_namings_and_a_rerun_that_changes_no_byte(tmp_path: Path) -> None:
    marks = []
    for name in ("a.jpg", "b.JPG", "c"):
        (tmp_path / name).write_bytes(jpeg())
        marks.append(Mark(f"{tmp_path}/{name}", 3, quality_score=5.0))
    planned = sidecar.plan(marks, "replaced")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.JPG", "c"]  # a plan changes nothing
    done = list(actions.carry_out(planned))
    assert [(action.state, action.kind, action.note) for action in done] == [("done", "new sidecar", "rating 3")] * 3
    written = {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    assert {path.name for path in written} == {"a.jpg", "b.JPG", "c", "a.xmp", "b.xmp", "c.xmp"}
    again = run(marks, "replaced") + run(marks, "appended")  # never a second sidecar beside the first
    assert actions.count(again) == {"todo": 0, "done": 0, "already": 6, "refused": 0}
    assert written == {
        path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()
    }
    shutil.copy(tmp_path / "a.jpg", tmp_path / "new.jpg")
    run([Mark(f"{tmp_path}/new.jpg", 3)], "appended")
    assert (tmp_path / "new.jpg.xmp").exists()


def test_a_rating_inside_of_the_photo_is_a_persons(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(5))
    (tmp_path / "b.jpg").write_bytes(jpeg(0))
    done = run([Mark(f"{tmp_path}/{name}.jpg", 3, keywords=("night",)) for name in "ab"])
    assert [action.note for action in done] == [
        "a person rated it already: no rating of ours; keywords night",
        "rating 3; keywords night",
    ]
    assert values((tmp_path / "a.jpg.xmp").read_bytes()) == {"subject": ["night"], "WrittenKeywords": ["night"]}
    assert xmp.read_ratings([f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]) == ({f"{tmp_path}/a.jpg": 5}, 0)
    run([Mark(f"{tmp_path}/a.jpg", 3)], overwrite_ratings=True)
    assert xmp.find_rating((tmp_path / "a.jpg.xmp").read_bytes()) == 3


def test_a_rating_that_a_person_puts_into_the_photo_later_takes_the_place_of_ours(tmp_path: Path) -> None:
    photo, beside = tmp_path / "a.jpg", tmp_path / "a.jpg.xmp"
    photo.write_bytes(jpeg())
    run([Mark(str(photo), 2, "Red")])
    assert values(beside.read_bytes())["Rating"] == "2"
    photo.write_bytes(jpeg(5))  # as Lightroom does
    [action] = run([Mark(str(photo), 3, "Red")])
    assert action.state == "done"
    assert values(beside.read_bytes()) == {}
    assert xmp.read_ratings([str(photo)]) == ({str(photo): 5}, 0)
    [again] = run([Mark(str(photo), 3, "Red")])
    assert again.state == "already"


def test_a_photo_is_read_only_where_a_person_has_not_said_all_in_its_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person's rating and label in the sidecar, or ours that a person took back, settle it."""
    said = {
        "both": 'xmp:Rating="5" xmp:Label="Green"',
        "back": 'pi:WrittenRating="2" pi:WrittenLabel="Red"',
        "ours": 'xmp:Rating="2" pi:WrittenRating="2" xmp:Label="Red" pi:WrittenLabel="Red"',
        "ours and theirs": 'xmp:Rating="5" xmp:Label="Red" pi:WrittenLabel="Red"',
        "nothing": "",
    }
    for name, text in said.items():
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
        (tmp_path / f"{name}.jpg.xmp").write_bytes(simple(text, ""))
    asked: list[str] = []
    real = xmp.read_embedded
    monkeypatch.setattr(xmp, "read_embedded", lambda uris, options: asked.extend(uris) or real(uris, options))
    sidecar.plan([Mark(f"{tmp_path}/{name}.jpg", 3, "Red") for name in said], "appended")
    assert {Path(uri).stem for uri in asked} == {"ours", "nothing"}


def test_ours_that_a_program_copied_into_the_photo_is_not_a_persons(tmp_path: Path) -> None:
    """Lightroom writes what it finds in a sidecar into the JPEG; the mark changes meanwhile."""
    photo = tmp_path / "a.jpg"
    photo.write_bytes(jpeg())
    run([Mark(str(photo), 4, "Red")])
    photo.write_bytes(jpeg(4, "Red"))
    [done] = run([Mark(str(photo), 2, "Blue")])
    assert done.note == "rating 2; label Blue"
    assert values((tmp_path / "a.jpg.xmp").read_bytes())["Rating"] in ("2", 2)
    photo.write_bytes(jpeg(2, "Blue"))
    assert xmp.read_ratings([str(photo)])[0] == {}
    photo.write_bytes(jpeg(5, "Blue"))
    assert xmp.read_ratings([str(photo)])[0] == {str(photo): 5}


def test_a_label_inside_of_the_photo_or_in_the_other_sidecar_is_a_persons(tmp_path: Path) -> None:
    for name, content in {"a": jpeg(label="Green"), "b": jpeg(5, "Green"), "c": jpeg(), "d": jpeg(label="")}.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    (tmp_path / "c.xmp").write_bytes(simple('xmp:Label="Green"', ""))
    (tmp_path / "c.jpg.xmp").write_bytes(simple("", ""))
    done = run([Mark(f"{tmp_path}/{name}.jpg", 3, "Red", ("night",)) for name in "abcd"])
    assert [action.note for action in done] == [
        "a person labelled it already: no label of ours; rating 3; keywords night",
        "a person rated it already: no rating of ours, no label of ours; keywords night",
        "a person labelled it already: no label of ours; rating 3; keywords night",
        "rating 3; label Red; keywords night",
    ]
    found = [values((tmp_path / f"{name}.jpg.xmp").read_bytes()).get("Label") for name in "abcd"]
    assert found == [None, None, None, "Red"]
    run([Mark(f"{tmp_path}/b.jpg", 3, "Red")], overwrite_ratings=True)
    assert values((tmp_path / "b.jpg.xmp").read_bytes())["Label"] == "Red"


@pytest.mark.parametrize(
    ("description", "label"),
    [
        ('xmp:Label="Green"/>', "Green"),
        ("xmp:Label = 'K&#228;se &amp; \"x\"' />", 'Käse & "x"'),
        ("><xmp:Label>Review Later</xmp:Label></rdf:Description>", "Review Later"),
        ('xmp:Label=""/>', None),
        ("><xmp:Label></xmp:Label></rdf:Description>", None),
        ("><xmp:Label/></rdf:Description>", None),
        ('xmp:LabelOf="Green"/>', None),
        ('xmp:Rating="4"/>', None),
    ],
)
def test_a_label_is_read_from_a_packet(description: str, label: str | None) -> None:
    data = simple("", "").replace(b"></rdf:Description>", f" {description}".encode())
    etree.fromstring(data)
    assert xmp.find_label(data) == xmp.find_persons_label(data) == label
    ours = content_of(None, Mark("a.jpg", label=label or "x & 'y'"))
    assert xmp.find_label(ours) == xmp.find_written_label(ours) == (label or "x & 'y'")
    assert xmp.find_persons_label(ours) is None


def test_a_rating_in_the_other_sidecar_is_a_persons(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.xmp").write_bytes(simple('xmp:Rating="5"', ""))
    (tmp_path / "a.jpg.xmp").write_bytes(DARKTABLE.replace(b'Rating="1"', b'Rating="0"'))
    [action] = run([Mark(f"{tmp_path}/a.jpg", 3, "Red")])
    assert action.target == f"{tmp_path}/a.jpg.xmp"
    assert action.note == "a person rated it already: no rating of ours, no label of ours"
    assert (tmp_path / "a.xmp").read_bytes() == simple('xmp:Rating="5"', "")


def test_photos_that_share_a_sidecar(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.nef", "b.jpg", "b.nef"):
        (tmp_path / name).write_bytes(jpeg())
    marks = [
        Mark(f"{tmp_path}/{name}", rating) for name, rating in {"a.jpg": 2, "a.nef": 5, "b.jpg": 3, "b.nef": 3}.items()
    ]
    first, second = run(marks, "replaced")
    assert first.source == f"{tmp_path}/a.nef"
    assert first.note == "rating 5; shared with a.jpg, whose marks differ: those of a.nef count"
    assert xmp.find_rating((tmp_path / "a.xmp").read_bytes()) == 5
    assert second.note == "rating 3"
    assert actions.count(run(marks, "appended")) == {"todo": 0, "done": 0, "already": 2, "refused": 0}


def test_the_sidecar_of_a_raw_that_has_no_mark_is_not_the_jpegs(tmp_path: Path) -> None:
    for name in ("a.NEF", "a.jpg", "b.nef", "b.jpg", "c.nef", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "a.xmp").write_bytes(LIGHTROOM)
    (tmp_path / "c.xmp").write_bytes(simple('xmp:Rating="5"', ""))
    marks = [Mark(f"{tmp_path}/{name}.jpg", 2, "Red") for name in "abc"]
    done = run(marks, "replaced")
    assert [(action.state, Path(action.target).name) for action in done] == [
        ("refused", "a.xmp"),
        ("refused", "b.xmp"),
        ("refused", "c.xmp"),
    ]
    assert done[0].note == "a.xmp is the sidecar of a.NEF, which is not marked; mark that too, or write a.jpg.xmp"
    assert not (tmp_path / "b.xmp").exists()
    done = run(marks, "appended")
    assert [(action.state, Path(action.target).name) for action in done] == [
        ("done", "a.jpg.xmp"),
        ("done", "b.jpg.xmp"),
        ("already", "c.jpg.xmp"),
    ]
    assert "a person rated it already" in done[2].note  # in the raw's sidecar: it is the same shot
    assert (tmp_path / "a.xmp").read_bytes() == LIGHTROOM
    again = run(marks, "replaced")  # whose own sidecar is there by now
    assert [(action.state, Path(action.target).name) for action in again[1:]] == [
        ("already", "a.jpg.xmp"),
        ("already", "b.jpg.xmp"),
    ]
    run([*marks, Mark(f"{tmp_path}/c.nef", 4, keywords=("night",))], "replaced")
    assert values((tmp_path / "c.xmp").read_bytes())["subject"] == ["night"]  # the raw's mark counts


def test_what_cannot_be_written_stops_nothing_else(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "b.jpg.xmp").mkdir()
    long = "n" * 250 + ".jpg"
    (tmp_path / long).write_bytes(jpeg())
    uris = [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg", f"{tmp_path}/c.jpg/x.jpg", f"{tmp_path}/{long}"]
    uris += [f"{tmp_path}/gone.jpg", "https://example.org/a.jpg"]
    done = {action.source: action for action in run([Mark(uri, 4) for uri in uris])}
    assert {uri: done[uri].state for uri in uris} == dict(zip(uris, ["done"] + ["refused"] * 5, strict=True))
    assert "web server" in done[uris[5]].note
    assert "directory" in done[uris[1]].note
    assert "No such file" in done[uris[4]].note
    assert not any("\n" in action.note for action in done.values())
    assert not list(tmp_path.glob("*.part"))


def test_a_rating_given_since_it_was_planned_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    planned = sidecar.plan([Mark(f"{tmp_path}/a.jpg", 4)], "appended")
    (tmp_path / "a.jpg.xmp").write_bytes(simple('xmp:Rating="2"', ""))
    [action] = actions.carry_out(planned)
    assert action.state == "already"
    assert xmp.find_rating((tmp_path / "a.jpg.xmp").read_bytes()) == 2


def test_a_sidecar_that_appears_while_ours_is_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    planned = sidecar.plan([Mark(f"{tmp_path}/a.jpg", 4)], "appended")

    def read(*arguments: Any) -> Any:
        found = fetch(*arguments)
        (tmp_path / "a.jpg.xmp").write_bytes(LIGHTROOM)
        return found

    fetch = sidecar.fetch
    monkeypatch.setattr(sidecar, "fetch", read)
    [action] = actions.carry_out(planned)
    assert (action.state, "FileExistsError" in action.note) == ("refused", True)
    assert (tmp_path / "a.jpg.xmp").read_bytes() == LIGHTROOM


def test_links_and_permissions_of_a_sidecar_stay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere/a.xmp"
    real.write_bytes(LIGHTROOM)
    real.chmod(0o640)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.xmp").symlink_to(real)
    run([Mark(f"{tmp_path}/a.jpg", 4)])
    assert (tmp_path / "a.xmp").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert xmp.find_rating(real.read_bytes()) == 4


def test_names_from_anywhere(tmp_path: Path) -> None:
    names = [b"new\nline.jpg", b"50%.jpg", b"a#b ?.jpg", b" blank.jpg", b"caf\xe9.jpg", b"-rf.jpg", b"$(id).jpg"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(jpeg())
    from picinspector.manifest import list_library

    uris = [uri for table in list_library(tmp_path) for uri in table["uri"].to_pylist()]
    assert len(uris) == len(names)
    marks = [Mark(uri, 4) for uri in uris]
    assert actions.count(run(marks))["done"] == len(names)
    assert actions.count(run(marks))["already"] == len(names)
    sidecars = {os.fsencode(path.name) for path in tmp_path.glob("*.xmp")}
    assert sidecars == {name + b".xmp" for name in names}
    assert not any("\n" in actions.describe(action) for action in run(marks))


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], xmp._list_folder
    monkeypatch.setattr(xmp, "_list_folder", lambda folder, options: asked.append(folder) or real(folder, options))
    for number in range(600):
        path = tmp_path / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\xff\xd8")
    marks = [Mark(str(path), 4) for path in tmp_path.glob("*/*.jpg")]
    assert actions.count(run(marks))["done"] == 600
    assert sorted(asked) == [f"{tmp_path}/a", f"{tmp_path}/b"]


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_sidecars_in_a_bucket(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    client = s3_server.client()
    keys = ["p/a.jpg", "p/b.jpg", "p/rated.jpg", "p/a?versionId=b.jpg", "p/50% #x.jpg", "p/new\nline.jpg", "p//two.jpg"]
    for key in keys:
        client.put_object(Bucket=s3_bucket, Key=key, Body=jpeg(5 if "rated" in key else None))
    client.put_object(Bucket=s3_bucket, Key="p/b.xmp", Body=LIGHTROOM)
    marks = [Mark(f"s3://{s3_bucket}/{key}", 4, "Red", ("night",)) for key in keys]
    done = run(marks, storage_options=s3_server.storage_options)
    assert [action.state for action in done] == ["done"] * len(keys)
    names = {item["Key"] for item in client.list_objects_v2(Bucket=s3_bucket)["Contents"]}
    own = {"p/b.jpg": "p/b.xmp", "p/rated.jpg": "p/rated.jpg.xmp"}
    assert names == {*keys, *(own.get(key, f"{key}.xmp") for key in keys)}
    path = tmp_path / "b.xmp"
    path.write_bytes(client.get_object(Bucket=s3_bucket, Key="p/b.xmp")["Body"].read())
    found = seen_by_exiftool(path)
    assert (found["XMP-xmp:Rating"], found["XMP-crs:Exposure2012"]) == (4, "+0.45")
    rated = client.get_object(Bucket=s3_bucket, Key="p/rated.jpg.xmp")["Body"].read()
    assert values(rated) == {"subject": ["night"], "WrittenKeywords": ["night"]}
    again = run(marks, storage_options=s3_server.storage_options)
    assert actions.count(again)["already"] == len(keys)


def test_a_bucket_that_is_read_only(s3_server: S3Server, s3_bucket: str) -> None:
    client = s3_server.client()
    for key in ("ro/a.jpg", "rw/a.jpg", "hidden/a.jpg"):
        client.put_object(Bucket=s3_bucket, Key=key, Body=jpeg())
    marks = [Mark(f"s3://{s3_bucket}/{folder}/a.jpg", 4) for folder in ("ro", "rw", "hidden")]
    faults = [Fault("AccessDenied", r"^PUT .*/ro/"), Fault("AccessDenied", r"^GET .*prefix=hidden")]
    with FaultProxy(s3_server.endpoint_url, faults) as proxy:
        done = {action.source: action for action in run(marks, storage_options=proxy.storage_options(s3_server))}
    states = [done[mark.uri].state for mark in marks]
    assert states == ["refused", "done", "refused"]
    assert "PermissionError" in done[marks[0].uri].note
    assert "cannot list" in done[marks[2].uri].note
    assert secrets_free(done.values(), s3_server)


def secrets_free(done: Any, server: S3Server) -> bool:
    return not any(server.secret_key in actions.describe(action) for action in done)
