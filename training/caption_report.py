"""How good captions are: ROUGE against references, facts against the heads, faults on degradation ladders.

`python -m training.caption_report --bundle builtin --biq2021 DIR --out REPORT` measures a bundle's captioner on photos
that nothing was trained on: the official test split, and ladders of the demo's photos and of 20 of that split.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from picinspector.bundle import open_bundle
from picinspector.captioner import Captioner
from picinspector.degrade import DEGRADATIONS
from picinspector.errors import PhotoError, PicInspectorError, UsageError
from picinspector.photo import decode
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import Facts, check, compose, is_fluent, parse, tell
from training.captioner_loop import Captions
from training.ladders import LADDERS, STEPS, png

_ROUGE = ("rouge1", "rouge2", "rougeL")
#: From this severity on a fault is plain to see: the upper half of a ladder's steps.
_PLAIN_SEVERITY = 0.5


def validation_figures(captioner: Captioner, data: Captions, photos: int, seed: int) -> dict[str, Any]:
    """Captions of a sample of the validation split, from pixels alone, against texts and facts of the data."""
    rows = np.flatnonzero(data.split == "validation")
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:photos])
    started = time.monotonic()
    texts = captioner.caption(data.crops(rows))
    seconds = time.monotonic() - started
    references = [data.text(int(row), int(row)) for row in rows]
    facts = [data.facts[row] for row in rows]
    figures = text_figures(texts, references, facts) | {"captions_per_s": len(rows) / seconds}
    known = [fact for fact in facts if fact is not None]
    if len(known) == len(rows):
        figures["baselines"] = baselines(references, known)
        told = captioner.caption(data.crops(rows), [tell(fact) for fact in known])
        figures["told"] = text_figures(told, references, facts)
    return figures


def text_figures(texts: Sequence[str], references: Sequence[str], facts: Sequence[Facts | None]) -> dict[str, Any]:
    """Means over photos.

    Args:
        texts: captions.
        references: one for each.
        facts: what the heads see in each photo; None where nobody knows.

    Returns:
        `rouge1`, `rouge2`, `rougeL` (F-measure, Lin 2004, with Porter's stemmer); `fact_accuracy`, right statements as
        a share of all made or due; `contradicted`: share of the captions with a contradiction; `fluent`: share without
        repeated fragments and of one to three sentences; `words`, their mean number; `examples`.
    """
    scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, texts, strict=True)]
    figures: dict[str, Any] = {
        "photos": len(texts),
        **{name: float(np.mean([score[name].fmeasure for score in scores])) for name in _ROUGE},
        "fluent": float(np.mean([is_fluent(text) for text in texts])),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "examples": [{"caption": t, "reference": r} for t, r in list(zip(texts, references, strict=True))[:6]],
    }
    checks = [check(text, fact) for text, fact in zip(texts, facts, strict=True) if fact is not None]
    if checks:
        figures["fact_accuracy"] = float(np.mean([found.accuracy for found in checks]))
        figures["contradicted"] = float(np.mean([bool(found.contradictions) for found in checks]))
    return figures


def baselines(references: Sequence[str], facts: Sequence[Facts]) -> dict[str, dict[str, Any]]:
    """The same figures of texts that no model wrote.

    `fixed`: one sentence for every photo, that of their mean facts. `facts`: the fixed wording of each photo's true
    facts. `another wording`: a random wording of its true facts: what two perfect writers have in common.
    """
    mean = Facts(
        {name: float(np.mean([fact.attributes[name] for fact in facts])) for name in ATTRIBUTES},
        {name: float(np.mean([fact.scenes[name] for fact in facts])) for name in SCENES},
        float(np.mean([fact.luma for fact in facts])),
    )
    texts = {
        "fixed": [compose(mean)] * len(facts),
        "facts in a fixed wording": [compose(fact) for fact in facts],
        "facts in another wording": [compose(fact, 10**6 + row) for row, fact in enumerate(facts)],
    }
    return {name: _without_examples(text_figures(values, references, facts)) for name, values in texts.items()}


def ladder_figures(captioner: Captioner, judge: Any, photos: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Captions of degradation ladders (`training.ladders`): the right faults, in the right degree?

    Returns:
        what `text_figures` gives over all steps; `named`: fault -> share of its steps of severity above one half whose
        caption calls the fault's own attribute bad or poor; `false_alarms`: share of the undegraded photos' captions
        that call an attribute bad or poor which the head gives 50 or more; `due`: as `named`, of the head itself (below
        40): what the captioner could learn.
    """
    steps = np.linspace(0.0, 1.0, STEPS)
    kinds = [kind for kind in DEGRADATIONS if kind in LADDERS]
    files = [
        png(DEGRADATIONS[kind](image, float(severity)))
        for kind in kinds
        for image in photos.values()
        for severity in steps
    ]
    facts = facts_of(judge, files)
    crops = np.stack([decode(file, [captioner.crop]).crops[0] for file in files])
    started = time.monotonic()
    texts = captioner.caption(crops)
    seconds = time.monotonic() - started
    references = [compose(fact, row) for row, fact in enumerate(facts)]
    figures = text_figures(texts, references, facts)
    figures["captions_per_s"] = len(texts) / seconds
    told = captioner.caption(crops, [tell(fact) for fact in facts])
    figures["told"] = text_figures(told, references, facts) | {"named": _named(told, len(photos), steps, kinds)}
    shape = (len(kinds), len(photos), STEPS, len(ATTRIBUTES))
    low = np.array([[_called_low(text, name) for name in ATTRIBUTES] for text in texts]).reshape(shape)
    values = np.array([[fact.attributes[name] for name in ATTRIBUTES] for fact in facts]).reshape(shape)
    figures["named"] = _named(texts, len(photos), steps, kinds)
    own = [values[i, :, steps > _PLAIN_SEVERITY, ATTRIBUTES.index(LADDERS[kind])] for i, kind in enumerate(kinds)]
    figures["due"] = {kind: float((own[i] < 40).mean()) for i, kind in enumerate(kinds)}
    clean = (low[:, :, 0, 1:] & (values[:, :, 0, 1:] >= 50)).any(axis=-1)
    figures["false_alarms"] = float(clean.mean())
    figures["baselines"] = baselines(references, facts)
    return figures


def _named(texts: Sequence[str], photos: int, steps: np.ndarray, kinds: Sequence[str]) -> dict[str, float]:
    """Fault -> share of its plain steps whose caption calls its own attribute low; texts by kind, photo and step."""
    grid = np.array(texts, dtype=object).reshape(len(kinds), photos, len(steps))
    return {
        kind: float(np.mean([_called_low(text, LADDERS[kind]) for text in grid[i, :, steps > _PLAIN_SEVERITY].flat]))
        for i, kind in enumerate(kinds)
    }


def facts_of(judge: Any, files: Sequence[bytes]) -> list[Facts]:
    """What a bundle's heads see in encoded photos; `judge` is a `training.judge.Judge`."""
    columns = judge.embed_all(enumerate(files, 1))
    judged = judge.score(columns)
    return [
        Facts(
            dict(zip(ATTRIBUTES, map(float, judged.attributes[row]), strict=True)),
            dict(zip(SCENES, map(float, judged.scenes[row]), strict=True)),
            float(columns["measured_brightness"][row]),
        )
        for row in range(len(files))
    ]


def _called_low(text: str, name: str) -> bool:
    return any(statement.aspect == name and statement.high <= 40 for statement in parse(text))


def _without_examples(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "examples"}


# --- card -------------------------------------------------------------------------------------------------------------


def write_card(path: Path, metrics: Mapping[str, Any]) -> None:
    """The card of one training, Markdown."""
    figures = metrics["validation"]
    lines = [
        "# Captioner",
        "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in metrics["settings"].items()) + ".",
        f"Kept: step {metrics['best_step']}, the least loss on validation photos.",
        "",
        f"## {figures['photos']} validation photos",
        "",
        *table(figures, metrics.get("validation_untrained")),
        "",
        "## Examples",
        "",
        *[f"- {example['caption']}  \n  reference: {example['reference']}" for example in figures["examples"]],
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def table(figures: Mapping[str, Any], untrained: Mapping[str, Any] | None = None) -> list[str]:
    """Captioner and baselines beside each other, as a Markdown table."""
    rows = {"captioner, from pixels": figures}
    if "told" in figures:
        rows["captioner, told the facts"] = figures["told"]
    if untrained is not None:
        rows[f"before training ({untrained['photos']} photos)"] = untrained
    rows |= {f"text: {name}": row for name, row in figures.get("baselines", {}).items()}
    names = ("rouge1", "rouge2", "rougeL", "fact_accuracy", "contradicted", "fluent", "words")
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, row in rows.items():
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def plot_losses(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss on train and validation by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in history]
    axes.plot(steps, [line["train_loss"] for line in history], label="train")
    axes.plot(steps, [line["validation_loss"] for line in history], label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy of a token, nats")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Parse the command line and measure."""
    from picinspector.storage import fetch
    from training.datasets import read_biq2021
    from training.evaluate import ladder_photos, near_duplicates
    from training.judge import Judge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="builtin", help="whose heads say what is to be seen, and whose captioner")
    parser.add_argument("--captioner", type=Path, help="instead of the bundle's: a captioner folder")
    parser.add_argument("--untrained", type=Path, help="a captioner folder before training, to compare")
    parser.add_argument("--biq2021", type=Path, required=True, help="BIQ2021 checkout: its test split")
    parser.add_argument("--near-duplicates", type=Path, help="JSON list of test photos that have a twin in train")
    parser.add_argument("--photos", type=int, default=300, help="of the test split (default: 300)")
    parser.add_argument("--ladder-photos", type=int, default=20, help="of the test split, beside the demo's seven")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for captions.json, captions.md and embeddings")
    args = parser.parse_args()
    try:
        bundle = open_bundle(args.bundle)
        judge = Judge(bundle, cache=args.out)
        folder = args.captioner or bundle.piece("captioner")
        captioner = Captioner(folder)
        known = near_duplicates(args.near_duplicates)
        test = [photo for photo in read_biq2021(args.biq2021) if photo.split == "test"]
        ladders = ladder_photos(test, known, args.ladder_photos, args.seed)
        fresh = [photo for photo in test if photo.path.name.lower() not in known]
        chosen = np.sort(np.random.default_rng(args.seed).permutation(len(fresh))[: args.photos])
        files = fetch([fresh[row].uri for row in chosen])
        for row, data in zip(chosen, files, strict=True):
            if isinstance(data, PhotoError):
                raise UsageError(f"{fresh[row].uri}: {data.message}")
        facts = facts_of(judge, files)
        crops = np.stack([decode(data, [captioner.crop]).crops[0] for data in files])
        references = [compose(fact, row) for row, fact in enumerate(facts)]
        photos = text_figures(captioner.caption(crops), references, facts)
        photos["told"] = text_figures(captioner.caption(crops, [tell(fact) for fact in facts]), references, facts)
        photos["baselines"] = baselines(references, facts)
        untrained = None
        if args.untrained is not None:
            few = slice(0, 32)
            texts = Captioner(args.untrained).caption(crops[few])
            untrained = text_figures(texts, references[few], facts[few])
        result = {"photos": photos, "untrained": untrained, "ladders": ladder_figures(captioner, judge, ladders)}
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    (args.out / "captions.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    text = "\n".join(_report_lines(result)) + "\n"
    (args.out / "captions.md").write_text(text, "utf-8")
    print(text)


def _report_lines(result: Mapping[str, Any]) -> list[str]:
    photos, ladders = result["photos"], result["ladders"]
    named = [
        f"| {kind} | {share:.3f} | {ladders['told']['named'][kind]:.3f} | {ladders['due'][kind]:.3f} |"
        for kind, share in ladders["named"].items()
    ]
    return [
        f"## {photos['photos']} test photos",
        "",
        *table(photos, result["untrained"]),
        "",
        f"## Ladders, {ladders['photos']} steps",
        "",
        *table(ladders),
        "",
        f"False alarms on undegraded photos: {ladders['false_alarms']:.3f}. "
        f"Captions a second: {ladders['captions_per_s']:.1f}.",
        "",
        "| fault, severity above one half | named, from pixels | named, told the facts | below 40 by the head |",
        "|---|---|---|---|",
        *named,
        "",
        "## Examples, told the facts",
        "",
        *[f"- {re.sub(r'[|]', '/', example['caption'])}" for example in photos["told"]["examples"]],
    ]


if __name__ == "__main__":
    main()
