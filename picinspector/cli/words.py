"""What the commands say to people: results as text, complaints in one line."""

from __future__ import annotations

import logging
import sys
import textwrap
from typing import Any

from picinspector import logs
from picinspector.storage import redact

_TEXT_WIDTH = 100


def complain(message: str, exit_code: int) -> int:
    """One line on stderr, without secrets, a JSON event where the log is JSON; returns the exit code it is given."""
    if logs.is_json():
        logs.event("failed", level=logging.ERROR, message=message, exit_code=exit_code)
    else:
        print(f"picinspector: {redact(message)}", file=sys.stderr)
    return exit_code


def plan_text(plan: dict[str, Any]) -> str:
    """What a run would do."""
    return (
        f"{plan['library']}: {plan['listed']:,} photos, {plan['listed_bytes'] / 1e6:,.1f} MB\n"
        f"to do: {plan['to_do']:,} photos, {plan['to_do_bytes'] / 1e6:,.1f} MB, with bundle {plan['bundle']}"
        f" ({plan['scorer_kind']}) into {plan['destination']}\n"
        "dry run: nothing was written"
    )


def record_text(record: dict[str, Any]) -> str:
    """What a committed run did."""
    counts = record["counts"]
    lines = [
        f"{counts['scored']:,} photos scored, {counts['failed']:,} failed, {counts['unchanged']:,} unchanged "
        f"in {record['seconds']['total']:,.1f} s ({record['photos_per_s']:,.1f}/s)",
        *(f"  {kind}: {number:,}" for kind, number in counts["errors_by_kind"].items()),
    ]
    if unread := counts["unread_by_kind"]:
        lines.append("could not be read again: " + ", ".join(f"{number:,} {kind}" for kind, number in unread.items()))
    if captions := counts["captions_by_source"]:
        lines.append("captions: " + ", ".join(f"{number:,} {source}" for source, number in captions.items()))
    if record["bundle"]["scorer_kind"] == "zero_shot":
        lines.append("scores are zero-shot (scorer_kind = zero_shot): no scorer has been trained for this bundle")
    if counts["failed_transient"]:
        lines.append(f"{counts['failed_transient']:,} failures may pass: run the same command again")
    lines.append(f"run {record['run_id']} committed to {record['destination']}")
    return "\n".join(lines)


def ratings_text(report: dict[str, Any]) -> str:
    """How a scorer that was trained on ratings does."""
    low, high = report["srcc_low_high"]
    lines = [f"{report['rated']:,} rated photos of {report['destination']}"]
    if report["missing"]:
        examples = ", ".join(one_line(name) for name in report["missing_examples"])
        lines.append(f"{report['missing']:,} ratings of photos that are not in these tables, left out: {examples}")
    if report["unreadable"]:
        lines.append(f"{report['unreadable']:,} photos could not be read for their rating")
    if report["different_photos"] < report["rated"]:
        lines.append(f"near-duplicates counted once, {report['different_photos']:,}; the check keeps them together")
    lines += [
        "agreement with the ratings (SRCC; 1 is the same order, 0 none)",
        f"  {report['srcc']!s:>6}  the new scorer, cross-validated ({low} to {high}); from {report['method']}",
        f"  {report['default_srcc']!s:>6}  the scorer of {report['default_bundle']}",
        f"bundle {report['name']} {report['version']} in {one_line(report['bundle'])}; to use it:",
        f"picinspector rescore {report['destination']} --bundle {one_line(report['bundle'])}",
    ]
    return "\n".join(lines)


def judgement_text(row: dict[str, Any]) -> str:
    """One photo's row, from `stages.single.judge`."""
    from picinspector.schema import labels_of

    lines = [one_line(row["uri"])]
    if row["caption"]:
        lines += ["", *textwrap.wrap(one_line(row["caption"]), _TEXT_WIDTH), ""]
    likely = "" if row["quality_low"] is None else f", likely {row['quality_low']:.1f} to {row['quality_high']:.1f}"
    lines.append(f"quality  {row['quality_score']:.2f} of 10{likely} ({row['scorer_kind']})")
    lines.append(f"scene    {row['scene'].replace('_', ' ')} ({row['scene_probability']:.0%})")
    labels = labels_of(row["scorer_kind"])
    lines += [f"  {labels[name]:<11}{value:5.1f}" for name, value in row["attributes"].items()]
    if row["suggestions"]:
        lines.append("suggestions")
        for suggestion in row["suggestions"]:
            lines += textwrap.wrap(suggestion["text"], _TEXT_WIDTH, initial_indent="  - ", subsequent_indent="    ")
    facts = [f"{name} {value}" for name, value in row["facts"].items() if value is not None and name != "phash"]
    lines.append(f"facts    {one_line(', '.join(facts))}")
    lines.append("measured " + ", ".join(f"{name} {value:.3g}" for name, value in row["measurements"].items()))
    return "\n".join(lines)


def critique_text(record: dict[str, Any]) -> str:
    """What a remote model said of some photos, and what it cost."""
    lines = []
    for row in record["rows"]:
        if row["error_kind"]:
            lines.append(f"   -  {one_line(row['uri'])}: {row['error_kind']}: {row['error_message']}\n")
            continue
        lines.append(f"{row['critic_score']:>4.1f}  {one_line(row['uri'])}\n      {row['description']}")
        for sign, name in (("+", "strengths"), ("-", "problems"), (">", "suggestions")):
            lines += [f"    {sign} {text}" for text in row[name]]
        lines.append("")
    counts, cost = record["counts"], record["cost_usd"]
    lines.append(
        f"{counts['critiqued']:,} photos criticised by {record['model']}, {counts['failed']:,} failed, "
        f"{counts['unchanged']:,} done before, in {record['seconds']:,.1f} s"
    )
    lines += [f"  {kind}: {number:,}" for kind, number in counts["errors_by_kind"].items()]
    price = "" if cost is None else f", ${cost:,.4f}"
    lines.append(f"{record['tokens_in']:,} prompt and {record['tokens_out']:,} answer tokens{price}")
    if record["critique_id"]:
        lines.append(f"written to {record['destination']}/critiques/critique_id={record['critique_id']}")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A file name as it may be shown in a terminal: no line breaks, no escape sequences."""
    return "".join(character if character.isprintable() else "�" for character in text)
