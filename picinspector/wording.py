"""The grammar of quality terms: facts to words, and words back to facts.

A caption speaks of six aspects, each an attribute of `schema.ATTRIBUTES` on its scale of 0-100, high is good. A grade
is a fifth of that scale, named as in ITU-R BT.500 (five-grade scale: bad, poor, fair, good, excellent). Every term
stands for a range of grades: `compose` writes a caption from the terms that hold, in many wordings, and `parse` finds
the terms in any caption, so that it can be checked against what was measured. What is no term of `TERMS` is not read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from picinspector.schema import ATTRIBUTES, SCENES

#: ITU-R BT.500-15, five-grade quality scale, each a fifth of 0-100.
GRADES = ("bad", "poor", "fair", "good", "excellent")
#: Mean luma (0-1) on either side of which an ill exposed photo is too dark or too bright; the same middle as in the
#: proxy labels that the builtin head learnt its `brightness` from (`training.builtin.labels`).
MIDDLE_LUMA = 0.45
#: How far (points of 0-100) a stated grade may be from the attribute and still be right: half a grade, as grades have
#: hard edges and attributes have errors.
TOLERANCE = 10.0
#: Beyond a whole grade a statement contradicts the attribute: "sharp" (60 and more) where sharpness is below 40.
CONTRADICTION = 20.0
#: A defect is clear, and must be named, below this: in the middle of "poor".
CLEAR_DEFECT = 30.0
#: As many defects as a caption names, the worst ones.
MAX_DEFECTS = 3
#: A scene is named from this probability on, and may be named from half of it on.
SURE_SCENE = 0.5

_LUMA_SLACK = 0.1
_ASPECTS = ATTRIBUTES[1:]  # all but the overall impression
#: The order in which a caption speaks of them.
_ORDER = ("brightness", "sharpness", "noisiness", "contrast", "colorfulness")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a caption may say of one photo.

    Attributes:
        attributes: 0-100 for each of `schema.ATTRIBUTES`.
        scenes: probability for each of `schema.SCENES`.
        luma: mean luma 0-1 (`measured_brightness`): which way the exposure is wrong.
    """

    attributes: Mapping[str, float]
    scenes: Mapping[str, float]
    luma: float

    @property
    def scene(self) -> str:
        """The most probable scene."""
        return max(self.scenes, key=lambda name: self.scenes[name])

    @property
    def side(self) -> str:
        """Which way an exposure that is not good is wrong: `dark`, `bright`, or empty where luma does not tell."""
        if abs(self.luma - MIDDLE_LUMA) <= _LUMA_SLACK:
            return ""
        return "dark" if self.luma < MIDDLE_LUMA else "bright"


@dataclass(frozen=True, slots=True)
class Statement:
    """One thing a caption says.

    Attributes:
        aspect: one of `schema.ATTRIBUTES`, or `scene`.
        low, high: the range of the attribute that it stands for, 0-100.
        side: `dark` or `bright` for an exposure said to be wrong that way; else empty.
        scene: one of `schema.SCENES` where the aspect is `scene`.
        words: as the caption has it.
    """

    aspect: str
    low: float
    high: float
    words: str
    side: str = ""
    scene: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A caption against the facts.

    Attributes:
        right, wrong: its statements, by `TOLERANCE`.
        missed: aspects with a clear defect, among the worst `MAX_DEFECTS`, that it does not call bad or poor.
        contradictions: those of the wrong that are off by more than `CONTRADICTION`.
    """

    right: list[Statement]
    wrong: list[Statement]
    missed: list[str]
    contradictions: list[Statement]

    @property
    def accuracy(self) -> float:
        """Right statements as a share of all that were made or should have been; 0 for a caption that says nothing."""
        total = len(self.right) + len(self.wrong) + len(self.missed)
        return len(self.right) / total if total else 0.0


def grade(value: float) -> int:
    """The grade 0 (bad) to 4 (excellent) of an attribute 0-100."""
    return min(len(GRADES) - 1, max(0, int(value // 20)))


# --- terms ------------------------------------------------------------------------------------------------------------

_OF_PHOTO = "(?:photo|image|picture|shot)"
#: Aspect -> (lowest grade, highest grade, side) -> patterns; a hyphen is read as a space. The longest wins where terms
#: overlap. Words that are as often about the subject as about the photo (clean, flat, sharp) want a word beside them.
TERMS: Mapping[str, Mapping[tuple[int, int, str], Sequence[str]]] = {
    "mos": {
        (0, 0, ""): ("bad quality", "very poor quality", "unusable", f"a bad {_OF_PHOTO}"),
        (0, 1, ""): ("quality is (?:poor|low|bad)", "low quality"),
        (1, 1, ""): ("poor quality", f"a (?:poor|weak) {_OF_PHOTO}", "below average", "disappointing"),
        (2, 2, ""): ("fair quality", "average quality", f"an? (?:average|ordinary|fair) {_OF_PHOTO}"),
        (3, 3, ""): ("good quality", "well made", f"a (?:good|fine) {_OF_PHOTO}"),
        (3, 4, ""): ("quality is (?:good|high)", "high quality"),
        (4, 4, ""): ("excellent", "outstanding", "superb"),
    },
    "brightness": {
        (0, 0, "dark"): ("severely underexposed", "far too dark", "almost black", "drowned in shadow"),
        (0, 1, "dark"): ("underexposed", "too dark", "lacks light"),
        (0, 2, "dark"): (f"{_OF_PHOTO} is (?:very |quite |rather )?dark",),
        (2, 2, "dark"): ("a little dark", "slightly dark", "on the dark side"),
        (0, 0, "bright"): ("severely overexposed", "far too bright", "burnt out", "washed out by light"),
        (0, 1, "bright"): ("overexposed", "too bright", "blown out", "highlights are blown"),
        (2, 2, "bright"): ("a little bright", "slightly bright", "on the bright side"),
        (0, 0, ""): ("very badly exposed", "exposure is all wrong", "light is very uneven"),
        (0, 1, ""): ("badly exposed", "poorly exposed", "unevenly exposed", "light is uneven"),
        (2, 2, ""): ("fairly exposed", "exposure is fair", "exposure is ordinary"),
        (3, 3, ""): ("well exposed", "exposure is good", "well lit", "well balanced exposure"),
        (4, 4, ""): ("perfectly exposed", "exposure is excellent", "beautifully lit", "flawless exposure"),
    },
    "sharpness": {
        (0, 0, ""): (
            "badly blurred", "heavily blurred", "very blurry", "nothing is in focus", "detail is lost to blur",
        ),
        (0, 1, ""): ("blurred", "blurry", "out of focus", "not sharp", "unsharp", "motion blur"),
        (1, 1, ""): ("soft focus", "rather soft", "lacks sharpness", "detail is soft"),
        (1, 2, ""): ("slightly (?:blurry|blurred|soft)", "a little (?:blurry|blurred|soft)"),
        (2, 2, ""): ("acceptably sharp", "reasonably sharp", "moderately sharp", "moderate sharpness"),
        (3, 4, ""): (
            "(?:is|are|looks?) sharp(?! contrasts?)", "sharp (?:image|photo|picture|focus|details?)", "in focus",
        ),
        (3, 3, ""): ("clearly focused", "good sharpness", "detail is sharp"),
        (4, 4, ""): (
            "very sharp", "(?:is|are|looks?|very) crisp", "crisp (?:image|photo|picture|focus|details?)",
            "(?:razor|tack) sharp", "excellent sharpness",
        ),
    },
    "noisiness": {
        (0, 0, ""): ("very noisy", "buried in noise", "heavy noise", "extremely grainy"),
        (0, 1, ""): ("noisy", "noticeable noise", "grainy", "visible noise"),
        (1, 2, ""): ("slightly noisy", "a little noisy"),
        (2, 2, ""): ("a little noise", "some noise", "slightly grainy", "a trace of grain"),
        (3, 3, ""): ("quite clean", "little noise", "low noise"),
        (3, 4, ""): ("(?:is|are|looks?) clean", "without noise", "no noise", "no visible noise", "not noisy"),
        (4, 4, ""): ("perfectly clean", "noise free", "free of noise"),
    },
    "contrast": {
        (0, 0, ""): ("extremely flat", "almost no contrast", "hardly any contrast", "lost in haze"),
        (0, 1, ""): (
            "(?:is|are|looks?|rather|very) flat", "low contrast", "lacks contrast", "weak contrast",
            "contrast is (?:low|weak|poor)", "hazy",
        ),
        (2, 2, ""): ("moderate contrast", "fair contrast", "contrast is average", "contrast is ordinary"),
        (3, 3, ""): ("good contrast", "contrast is good", "tones are well separated", "healthy contrast"),
        (3, 4, ""): ("high contrast", "contrast is (?:high|strong)"),
        (4, 4, ""): ("strong contrast", "excellent contrast", "punchy", "rich contrast"),
    },
    "colorfulness": {
        (0, 0, ""): ("almost colou?rless", "drained of colou?r", "hardly any colou?r", "nearly grey"),
        (0, 1, ""): ("(?:muted|pale|dull) colou?rs?", "colou?rs are (?:dull|pale|muted)", "desaturated"),
        (2, 2, ""): ("moderate colou?rs?", "colou?rs are average", "restrained colou?rs?", "colou?rs are modest"),
        (3, 3, ""): ("pleasing colou?rs?", "colou?rs are (?:good|lively)", "good colou?rs?", "lively colou?rs?"),
        (3, 4, ""): ("(?:is|are|very) colou?rful", "(?:vivid|vibrant) colou?rs?", "are (?:vivid|vibrant)"),
        (4, 4, ""): ("very vivid", "brilliant colou?rs?", "colou?rs are (?:splendid|brilliant)", "splendid colou?rs?"),
    },
}  # fmt: skip

_SCENE_TERMS: Mapping[str, Sequence[str]] = {
    "animal": ("animals?", "wildlife"),
    "cityscape": ("cityscape", "city", "buildings?", "architecture", "urban"),
    "human": ("person", "people", "portrait", "human"),
    "indoor": ("indoors?", "interior"),
    "landscape": ("landscape", "scenery"),
    "night": ("night", "after dark"),
    "plant": ("plants?", "flowers?", "foliage"),
    "still_life": ("still life", "an object"),
    "other": ("unusual subject", "mixed subject"),
}

#: A negation and at most three words, up to a term.
_NEGATED = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|without|hardly|barely|scarcely|cannot|lacks?|lacking|far from)|n't)"
    r"(?:\s+\w+){0,3}\s+$"
)
_LINKED = re.compile(r"^\s+(?:or|nor)\s+$")
_CLAUSE_END = re.compile(r"[.,;:!?]|\bbut\b|\bwhile\b")
_ELSEWHERE = re.compile(r"\b(?:background|backdrop|foreground|bokeh)\b")


def _compile() -> re.Pattern[str]:
    """All terms as one alternation of named groups; longer patterns first, so that `very sharp` is not `sharp`."""
    entries: list[tuple[str, str]] = []
    for aspect, ranges in TERMS.items():
        for (low, high, side), patterns in ranges.items():
            entries += [(f"{aspect}_{low}_{high}_{side}", pattern) for pattern in patterns]
    for scene, patterns in _SCENE_TERMS.items():
        entries += [(f"scene_{SCENES.index(scene)}_0_", pattern) for pattern in patterns]
    entries.sort(key=lambda entry: -len(entry[1]))
    groups = [f"(?P<{key}x{index}>{pattern})" for index, (key, pattern) in enumerate(entries)]
    return re.compile(rf"\b(?:{'|'.join(groups)})\b", re.IGNORECASE)


_TERM = _compile()


def parse(text: str) -> list[Statement]:
    """What a text says of the photo as a whole, in its order, nothing twice.

    A negated term is not read (`not sharp`, `no noise` and the like are terms of their own), nor what is said of the
    background. The grammar knows the English that `compose` writes and the commonest of what others write: a text may
    say more than is found here.
    """
    text = text.lower().replace("\u2019", "'").replace("-", " ")
    found: dict[Statement, None] = {}
    last_end, was_negated = 0, False
    for match in _TERM.finditer(text):
        key, _, _ = str(match.lastgroup).rpartition("x")
        aspect, low, high, side = key.split("_")
        # A negation reaches over "or" from the term before, and never over a term that stands.
        between = text[last_end : match.start()]
        clause = _CLAUSE_END.split(between)[-1]
        was_negated = bool(_NEGATED.search(clause)) or (was_negated and bool(_LINKED.match(between)))
        last_end = match.end()
        around = _CLAUSE_END.split(text[: match.start()])[-1] + _CLAUSE_END.split(text[match.start() :])[0]
        if was_negated or (aspect != "scene" and _ELSEWHERE.search(around)):
            continue
        if aspect == "scene":
            statement = Statement("scene", 0.0, 0.0, match[0], scene=SCENES[int(low)])
        else:
            statement = Statement(aspect, 20.0 * int(low), 20.0 * (int(high) + 1), match[0], side)
        found.setdefault(statement)
    return list(found)


def check(text: str, facts: Facts) -> Check:
    """Hold a caption against the facts."""
    right: list[Statement] = []
    wrong: list[Statement] = []
    contradictions: list[Statement] = []
    statements = parse(text)
    # A person in a city is both: one scene that may be so is enough.
    scenes = [statement for statement in statements if statement.aspect == "scene"]
    nearest = min((_distance(statement, facts) for statement in scenes), default=0.0)
    for statement in statements:
        off = nearest if statement.aspect == "scene" else _distance(statement, facts)
        (right if off <= TOLERANCE else wrong).append(statement)
        if off > CONTRADICTION:
            contradictions.append(statement)
    called_low = {statement.aspect for statement in statements if statement.high <= 40.0}
    missed = [name for name in defects(facts) if facts.attributes[name] < CLEAR_DEFECT and name not in called_low]
    return Check(right, wrong, missed, contradictions)


def _distance(statement: Statement, facts: Facts) -> float:
    """Points between what is stated and the attribute, 0 where it holds; 100 for another scene or the wrong side."""
    if statement.aspect == "scene":
        return 0.0 if facts.scenes[statement.scene] >= SURE_SCENE / 2 or statement.scene == facts.scene else 100.0
    if statement.side and facts.side and statement.side != facts.side:
        return 100.0
    value = facts.attributes[statement.aspect]
    return max(0.0, statement.low - value, value - statement.high)


# --- writing ----------------------------------------------------------------------------------------------------------

#: Clauses of one aspect and grade; {p} is the photo. Each holds one term of that grade.
_CLAUSES: Mapping[tuple[str, int, str], Sequence[str]] = {
    ("brightness", 0, "dark"): (
        "{p} is severely underexposed", "{p} is far too dark", "most of the picture is almost black",
        "the subject is drowned in shadow",
    ),
    ("brightness", 1, "dark"): ("{p} is underexposed", "{p} is too dark", "the scene lacks light"),
    ("brightness", 2, "dark"): (
        "the exposure is a little dark", "{p} is slightly dark", "the exposure is on the dark side",
    ),
    ("brightness", 0, "bright"): (
        "{p} is severely overexposed", "{p} is far too bright", "the tones are washed out by light",
    ),
    ("brightness", 1, "bright"): ("{p} is overexposed", "{p} is too bright", "the exposure is too bright"),
    ("brightness", 2, "bright"): (
        "the exposure is a little bright", "{p} is slightly bright", "the exposure is on the bright side",
    ),
    ("brightness", 0, ""): ("{p} is very badly exposed", "the exposure is all wrong", "the light is very uneven"),
    ("brightness", 1, ""): ("{p} is poorly exposed", "{p} is unevenly exposed", "the light is uneven"),
    ("brightness", 2, ""): ("{p} is fairly exposed", "the exposure is fair", "the exposure is ordinary"),
    ("brightness", 3, ""): ("{p} is well exposed", "the exposure is good", "the scene is well lit"),
    ("brightness", 4, ""): ("{p} is perfectly exposed", "the exposure is excellent", "the scene is beautifully lit"),
    ("sharpness", 0, ""): (
        "{p} is badly blurred", "{p} is heavily blurred", "nothing is in focus", "fine detail is lost to blur",
    ),
    ("sharpness", 1, ""): (
        "fine detail is soft", "{p} is rather soft", "the subject lacks sharpness", "{p} is blurry",
    ),
    ("sharpness", 2, ""): (
        "{p} is acceptably sharp", "the subject is reasonably sharp", "detail is moderately sharp",
    ),
    ("sharpness", 3, ""): ("{p} is sharp", "the subject is clearly focused", "fine detail is sharp"),
    ("sharpness", 4, ""): ("{p} is very sharp", "fine detail is crisp", "the subject is razor-sharp"),
    ("noisiness", 0, ""): (
        "{p} is very noisy", "the picture is buried in noise", "heavy noise covers everything",
        "{p} is extremely grainy",
    ),
    ("noisiness", 1, ""): (
        "{p} is noisy", "there is noticeable noise", "the surfaces look grainy", "there is visible noise",
    ),
    ("noisiness", 2, ""): ("there is a little noise", "there is some noise", "{p} is slightly grainy"),
    ("noisiness", 3, ""): ("{p} is quite clean", "there is little noise", "it was taken with low noise"),
    ("noisiness", 4, ""): ("{p} is perfectly clean", "{p} is noise-free", "the surfaces are free of noise"),
    ("contrast", 0, ""): (
        "{p} is extremely flat", "there is almost no contrast", "there is hardly any contrast",
    ),
    ("contrast", 1, ""): ("the tones are flat", "{p} lacks contrast", "there is only weak contrast"),
    ("contrast", 2, ""): ("there is moderate contrast", "the contrast is average", "the contrast is ordinary"),
    ("contrast", 3, ""): ("the contrast is good", "the tones are well separated", "there is healthy contrast"),
    ("contrast", 4, ""): ("there is strong contrast", "the tones are punchy", "there is rich contrast"),
    ("colorfulness", 0, ""): (
        "{p} is almost colourless", "the scene is drained of colour", "there is hardly any colour",
    ),
    ("colorfulness", 1, ""): ("the colours are pale", "the colours are dull", "the colours are muted"),
    ("colorfulness", 2, ""): ("the colours are average", "the colours are modest", "it shows restrained colours"),
    ("colorfulness", 3, ""): ("the colours are good", "the colours are lively", "it shows pleasing colours"),
    ("colorfulness", 4, ""): ("the colours are brilliant", "the colours are splendid", "the colours are very vivid"),
}  # fmt: skip

_SCENE_PHRASES: Mapping[str, Sequence[str]] = {
    "animal": ("an animal", "wildlife"),
    "cityscape": ("a city", "buildings", "urban architecture"),
    "human": ("a person", "people"),
    "indoor": ("an interior", "an indoor scene"),
    "landscape": ("a landscape", "natural scenery"),
    "night": ("a night scene", "a place after dark"),
    "plant": ("a plant", "flowers or foliage"),
    "still_life": ("a still life", "an object"),
    "other": ("an unusual subject", "a mixed subject"),
}
_QUALITY: Sequence[Sequence[str]] = (
    ("of bad quality", "of very poor quality"),
    ("of poor quality", "below average"),
    ("of fair quality", "of average quality"),
    ("of good quality", "well-made"),
    ("excellent", "outstanding"),
)
_OPENINGS = (
    "This photo of {scene} is {quality}.",
    "A photo of {scene}, {quality}.",
    "The picture shows {scene} and is {quality}.",
    "It shows {scene}; the photo is {quality}.",
)
_PLAIN_OPENINGS = ("This photo is {quality}.", "Overall the picture is {quality}.")
_PHOTO = ("the photo", "the image", "it")


def compose(facts: Facts, seed: int | None = None) -> str:
    """A caption of one to three sentences that says what holds, the worst defects first.

    Args:
        facts: of the photo.
        seed: chooses among wordings; None takes the first of each, always the same text.
    """
    rng = random.Random(seed) if seed is not None else None

    def pick(choices: Sequence[str]) -> str:
        return choices[0] if rng is None else rng.choice(choices)

    quality = pick(_QUALITY[grade(facts.attributes["mos"])])
    if facts.scenes[facts.scene] >= SURE_SCENE:
        sentences = [pick(_OPENINGS).format(scene=pick(_SCENE_PHRASES[facts.scene]), quality=quality)]
    else:
        sentences = [pick(_PLAIN_OPENINGS).format(quality=quality)]
    bad, good = defects(facts), strengths(facts)
    shown = good[: 2 if len(bad) < 2 else 1] if bad or good else _fair(facts)
    for aspects, turn in ((bad, False), (shown, bool(bad))):
        if aspects:
            clauses = [pick(_CLAUSES[_key(name, facts)]) for name in sorted(aspects, key=_ORDER.index)]
            sentences.append(_sentence(clauses, pick(("However", "Still", "On the other hand")) if turn else "", pick))
    return " ".join(sentences)


def defects(facts: Facts) -> list[str]:
    """Aspects that are bad or poor, the worst first, `MAX_DEFECTS` at most."""
    low = [name for name in _ASPECTS if grade(facts.attributes[name]) <= 1]
    return sorted(low, key=lambda name: facts.attributes[name])[:MAX_DEFECTS]


def strengths(facts: Facts) -> list[str]:
    """Aspects that are good or excellent, the best first."""
    high = [name for name in _ASPECTS if grade(facts.attributes[name]) >= 3]
    return sorted(high, key=lambda name: -facts.attributes[name])


def tell(facts: Facts) -> str:
    """The facts as a line for a prompt: what a captioner is told of what the heads see."""
    parts = [f"overall {GRADES[grade(facts.attributes['mos'])]}"]
    for name in _ORDER:
        value = grade(facts.attributes[name])
        side = f" ({facts.side})" if name == "brightness" and value <= 2 and facts.side else ""
        parts.append(f"{_NAMES[name]} {GRADES[value]}{side}")
    return f"scene {facts.scene.replace('_', ' ')}, {', '.join(parts)}"


#: For people: high is good in all of them.
_NAMES = {
    "brightness": "exposure",
    "sharpness": "sharpness",
    "noisiness": "cleanness",
    "contrast": "contrast",
    "colorfulness": "colour",
}


def _fair(facts: Facts) -> list[str]:
    return [name for name in ("brightness", "sharpness") if grade(facts.attributes[name]) == 2]


def _key(name: str, facts: Facts) -> tuple[str, int, str]:
    value = grade(facts.attributes[name])
    return name, value, facts.side if name == "brightness" and value <= 2 else ""


def _sentence(clauses: Sequence[str], turn: str, pick: Callable[[Sequence[str]], str]) -> str:
    first = f"{turn}, {clauses[0]}" if turn else clauses[0]
    named = [first, *clauses[1:]]
    photo = pick(_PHOTO)
    named = [clause.format(p=photo if index == 0 else "it") for index, clause in enumerate(named)]
    text = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return text[0].upper() + text[1:] + "."


def is_fluent(text: str) -> bool:
    """One to three sentences, ended, and no stretch of five words twice."""
    sentences = re.findall(r"\S.*?[.!?](?=\s|$)", text)  # not within a number
    words = re.findall(r"\w+", text.lower())
    stretches = list(zip(*(words[start:] for start in range(5)), strict=False))
    return 1 <= len(sentences) <= 3 and text[-1:] in ".!?" and len(set(stretches)) == len(stretches)
