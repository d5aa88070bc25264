"""The captioner in the package, on real photos it was never trained on."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.demo import real_photos
from picinspector.bundle import open_bundle
from picinspector.captioner import Captioner
from picinspector.degrade import DEGRADATIONS
from picinspector.photo import decode
from picinspector.stages.caption import describe
from picinspector.wording import Facts, check, is_fluent, tell
from training.caption_report import facts_of
from training.judge import Judge
from training.ladders import png


@pytest.fixture(scope="module")
def shown() -> tuple[Captioner, np.ndarray, list[Facts]]:
    """Four photos, clean and with each fault at severity 0.8: 32 crops, and what the heads see in them."""
    bundle = open_bundle("builtin")
    captioner = Captioner(bundle.piece("captioner"))
    photos = list(real_photos().values())[:4]
    files = [png(image) for image in photos]
    files += [png(degrade(image, 0.8)) for degrade in DEGRADATIONS.values() for image in photos]
    crops = np.stack([decode(file, [captioner.crop]).crops[0] for file in files])
    return captioner, crops, facts_of(Judge(bundle), files)


def test_words_agree_with_the_heads(shown: tuple[Captioner, np.ndarray, list[Facts]]) -> None:
    """As the caption stage asks; and what is delivered never contradicts.

    Whole ladders give .94 (the bundle's card); these are gross steps alone, with the most to say, where it was .89.
    """
    captioner, crops, facts = shown
    texts = captioner.caption(crops, [tell(fact) for fact in facts])
    assert np.mean([check(text, fact).accuracy for text, fact in zip(texts, facts, strict=True)]) >= 0.85
    assert all(is_fluent(text) for text in texts)
    delivered, sources = describe(captioner, crops, facts)
    assert not any(check(text, fact).contradictions for text, fact in zip(delivered, facts, strict=True))
    assert sources.count("model") >= 0.8 * len(sources)


def test_a_photo_has_the_same_words_in_any_batch(shown: tuple[Captioner, np.ndarray, list[Facts]]) -> None:
    captioner, crops, facts = shown
    for lines in (None, [tell(fact) for fact in facts]):
        together = captioner.caption(crops, lines)
        rows = [3, 17, 30]
        assert [together[row] for row in rows] == [
            captioner.caption(crops[[row]], lines and [lines[row]])[0] for row in rows
        ]


def test_untold_it_writes_sentences_about_what_it_sees(shown: tuple[Captioner, np.ndarray, list[Facts]]) -> None:
    captioner, crops, _ = shown
    texts = captioner.caption(crops)
    assert all(is_fluent(text) for text in texts)
    assert len(set(texts)) > 8
