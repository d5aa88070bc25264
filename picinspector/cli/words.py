"""What the commands say to people: results as text, complaints in one line."""

from __future__ import annotations

import logging
import sys
import textwrap
from typing import Any

from picinspector import logs
from picinspector.storage import redact
from picinspector.text import one_line

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
        *_finished(record),
        f"{counts['scored']:,} photos scored, {counts['failed']:,} failed, {counts['unmodified']:,} unmodified "
        f"in {record['seconds']['total']:,.1f} s ({record['photos_per_s']:,.1f}/s)",
        *_changes(counts),
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


def night_text(record: dict[str, Any]) -> str:
    """What a night did."""
    lines = []
    if record["rescore"] is not None:
        lines.append(f"rescored with another scorer: {record['rescore']['counts']['to_do']:,} photos")
    lines.append(record_text(record["score"]))
    if record["warnings"]:
        lines += ["warnings, against the run before:", *(f"  {line}" for line in record["warnings"])]
    lines.append(prune_text(record["prune"], dry_run=False))
    if record["hook_exit_code"]:
        lines.append(f"the hook failed with exit code {record['hook_exit_code']}")
    return "\n".join(lines)


def prune_text(report: dict[str, Any], dry_run: bool) -> str:
    """What was, or would be, removed and put together."""
    would = "would be " if dry_run else ""
    text = f"{report['runs_removed']:,} superseded runs {would}removed, {report['bytes_removed'] / 1e6:,.1f} MB"
    if report["runs_folded"]:
        text += f"; {report['files_folded']:,} files of {report['runs_folded']:,} runs {would}folded into one run"
    return text


def _finished(record: dict[str, Any]) -> list[str]:
    """Of the run that was cut short, and finished first."""
    if (finished := record.get("finished")) is None:
        return []
    counts = finished["counts"]
    return [f"first finished run {finished['run_id']}: {counts['scored']:,} scored, {counts['failed']:,} failed"]


def _changes(counts: dict[str, Any]) -> list[str]:
    """Of a run over a library, what became of it since the last."""
    if "new" not in counts:
        return []
    names = ("new", "changed", "stale", "retried", "unmodified", "returned", "gone", "left_for_later")
    shown = (f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts[name] or name in names[:2])
    return ["library: " + ", ".join(shown)]


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
    said = {name: value for name, value in row["facts"].items() if value is not None and not name.endswith("hash")}
    facts = [f"{name} {value}" for name, value in said.items()]
    lines.append(f"facts    {one_line(', '.join(facts))}")
    lines.append("measured " + ", ".join(f"{name} {value:.3g}" for name, value in row["measurements"].items()))
    return "\n".join(lines)


def ranking_text(rows: list[dict[str, Any]]) -> str:
    """A ranking as a table; the measure has a column of its own where it is not the score."""
    mixed = any(row["value"] != row["quality_score"] for row in rows)
    lines = [f"{'rank':>4}  {'value  ' if mixed else ''}{'quality':>7}  {'scene':<10}  photo"]
    for row in rows:
        value = f"{row['value']:>5.1f}  " if mixed else ""
        lines.append(
            f"{row['rank']:>4}  {value}{row['quality_score']:>7.2f}  {row['scene']:<10}  {one_line(row['uri'])}"
        )
    return "\n".join(lines)


def groups_text(said: dict[str, Any]) -> str:
    """What was grouped."""
    names = {"exact": "of exact copies", "near": "of near-duplicates", "burst": "of bursts"}
    lines = [
        f"{said['groups'][kind]:>9,} groups {words:<19} {said['photos_in_groups'][kind]:>9,} photos"
        for kind, words in names.items()
    ]
    share = said["superfluous"] / said["photos"] if said["photos"] else 0.0
    lines.append(
        f"{said['superfluous']:>9,} of {said['photos']:,} photos ({share:.0%}) have a better one in their group; the "
        f"largest has {said['largest']:,}"
    )
    return "\n".join(lines)


def report_text(said: dict[str, Any]) -> str:
    """What is on a report."""
    lines = [f"{said['shown']:,} of {said['photos']:,} photos shown, {said['bytes'] / 1e6:,.1f} MB"]
    if said["unreadable"]:
        lines.append(f"{said['unreadable']:,} of them could not be read again and have no picture")
    if said["left_out"]:
        lines.append(f"{said['left_out']:,} of them have no picture, to keep the page's size")
    lines.append(f"report: {said['out']}")
    return "\n".join(lines)


def curated_text(said: dict[str, Any]) -> str:
    """What was grouped, chosen and written."""
    return "\n".join(
        [
            groups_text(said["groups"]),
            f"{said['selected']:>9,} photos selected: {said['selection']}",
            report_text(said["report"]),
        ]
    )


def drift_text(report: dict[str, Any]) -> str:
    """How the scores as of two runs differ, from `drift.compare`, with its `warnings`."""
    counts, moved = report["counts"], report["moved"]
    lines = [
        f"A {report['run_a']}  {counts['a']:,} photos, {counts['failed_a']:,} without a score",
        f"B {report['run_b']}  {counts['b']:,} photos, {counts['failed_b']:,} without a score",
        f"{counts['both']:,} photos in both: {counts['unchanged']:,} unchanged, {counts['changed']:,} with other bytes"
        f", {counts['other_scorer']:,} scored by another scorer",
        f"{counts['only_a']:,} photos only in A, {counts['only_b']:,} only in B",
        *report["notes"],
    ]
    if counts["compared"]:
        low, middle, high = (moved["quantiles"][q] for q in ("0.05", "0.5", "0.95"))
        order = "" if moved["srcc"] is None else f"; SRCC of the two orders {moved['srcc']:.3f}"
        lines.append(
            f"quality_score of {counts['compared']:,} photos moved by {moved['mean']:+.2f} on average, median "
            f"{middle:+.2f}, 90 % of them between {low:+.2f} and {high:+.2f}; {moved['share_moved']:.1%} by more than "
            f"0.5{order}"
        )
    lines += ["", f"{'':<24}{'photos A':>10}{'photos B':>10}{'mean A':>8}{'mean B':>8}{'PSI':>8}{'KS':>7}"]
    lines += [_shift_line(name, found) for name, found in report["shift"].items()]
    lines.append("quality_score by scene")
    for row in report["scenes"]:
        if row["shift"] is not None:
            lines.append(_shift_line(f"  {row['scene']}", row["shift"]["quality_score"]))
    if few := [row for row in report["scenes"] if row["shift"] is None]:
        names = ", ".join(f"{row['scene']} ({row['photos_b']:,})" for row in few)
        lines.append(f"  too few photos to tell: {names}")
    if report["scene_psi"] is not None:
        lines.append(f"distribution over scenes: PSI {report['scene_psi']:.3f}")
    for name, sign in (("risers", "rose"), ("fallers", "fell")):
        if report[name]:
            lines += ["", f"{sign} most"]
            for row in report[name]:
                change = f"{row['change']:+6.2f}  {row['quality_score_a']:5.2f} to {row['quality_score_b']:5.2f}"
                lines.append(f"{change}  {one_line(row['uri'])}")
    return "\n".join([*lines, "", *(report["warnings"] or ["no distribution shifted by more than the limit"])])


def _shift_line(name: str, found: dict[str, Any]) -> str:
    means, figures = (found["mean_a"], found["mean_b"]), (found["psi"], found["ks"])
    texts = [*("-" if value is None else f"{value:.2f}" for value in means)]
    texts += ["-" if value is None else f"{value:.3f}" for value in figures]
    photos = f"{found['photos_a']:>10,}{found['photos_b']:>10,}"
    return f"{name:<24}{photos}{texts[0]:>8}{texts[1]:>8}{texts[2]:>8}{texts[3]:>7}"


def verified_text(report: dict[str, Any]) -> str:
    """What `verify` found, from `verify.Report.to_json`."""
    lines = [f"broken ({found['kind']}): {one_line(found['message'])}" for found in report["problems"]]
    lines += [f"notice: {one_line(found['message'])}" for found in report["notices"]]
    outcome = "whole" if report["whole"] else f"broken in {len(report['problems']):,} ways"
    depth = "footers, ids and fingerprints" if report["quick"] else "every value"
    lines.append(
        f"{report['destination']}: {outcome}; {depth} of {report['rows']:,} rows in {report['files']:,} files "
        f"({report['size_bytes'] / 1e6:,.1f} MB) of {report['runs']:,} committed runs, {report['seconds']:,.1f} s"
    )
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
