"""Edit sections so that exactly one clinical fact becomes wrong.

Each edit takes a section's text and returns the edited text, or None if the edit does not apply. The same text always
gives the same edit. The patterns are for English notes. Standard library only.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from evaluation.judging import texts
from evaluation.judging.phrases import DIAGNOSIS_GROUPS, DRUG_GROUPS
from evaluation.judging.sentences import statement_spans
from evaluation.judging.texts import Rarity, capital, words

# --- a dropped finding -----------------------------------------------------------------------------------------------

_CLAUSE_GAP = re.compile(r"([;,] (?=(?:and|but|with|without|which|while|as well as)\b)|; )")

# A note without such a sentence may still pass.
_MINOR = re.compile(
    r"follow(?:ed|ing)?[- ]?up|educat|encourag|complian|adheren|emphasi|importance|prognos|\bmonitor|support|reach out|"
    r"differential|report any|advised|informed|instruct|as (?:needed|necessary)|no (?:other|additional|further)|"
    r"within normal limits|unremarkable|(?:is|are|was|were) (?:all )?normal|\bstable\b|\bunderstand|ongoing management|"
    r"not (?:provided|detailed|specified|mentioned|discussed)|multidisciplinary|critical (?:for|to)|crucial|necessitat|"
    r"inquire|express|agree|adjust|be considered|guide|(?:consistent|in keeping) with|suggest|"
    r"indicat(?:es?|ing) (?:a|the) (?:need|complex)",
    re.IGNORECASE,
)


def drop_finding(text: str, rarity: Rarity) -> str | None:
    """Remove the sentence with the most distinctive words; from a single sentence, remove its last clause.

    Keep sentences that a correct note may omit: advice, follow-up, normal findings, reasoning.
    """
    spans = statement_spans(text)
    if len(spans) == 1:
        return _drop_clause(text)
    count = Counter(word for start, end in spans for word in words(text[start:end]))
    own_words = {
        (start, end): {word for word in words(text[start:end]) if count[word] == 1}
        for start, end in spans
        if not _MINOR.search(text[start:end])
    }
    dropped = max(own_words, key=lambda span: rarity.weight(own_words[span]), default=None)
    if dropped is None or len(own_words[dropped]) < 5:
        return None
    return texts.without(text, *dropped)


def _drop_clause(text: str) -> str | None:
    parts = _CLAUSE_GAP.split(text.strip())
    if len(parts) == 1 or _MINOR.search(parts[-1]) or len(words(parts[-1]) - words("".join(parts[:-1]))) < 3:
        return None
    return "".join(parts[:-2]).rstrip(" ,;.") + "."


# --- a turned negation -----------------------------------------------------------------------------------------------

# Removing a negation is tried first: it reverses a finding without a trace.
_UNNEGATE = [
    (r"\bdenies\b(?: any\b)?", "reports"),
    (r"\bdenied\b(?: any\b)?", "reported"),
    (r"\bdenying\b(?: any\b)?", "reporting"),
    (r"\bdeny\b(?: any\b)?", "report"),
    (
        r"(?<!pending )(?<!yes or )\bno\b(?! (?:longer|more|less|later|earlier|further|other|additional|need|change|"
        r"significant|prior|known|one|doubt|matter|specific|formal|objective|details?|information|data)\b) ",
        "",
    ),
    (r"(?<!\bor )(?<!\bwith and )(?<!/)\bwithout\b(?: any\b)?(?! (?:delay|further|(?:or|and) with)\b)", "with"),
    (r"\b(is|are|was|were|did|does|do|has|have|had|can|could) not\b(?! (?:only|yet|been)\b)", r"\1"),
    (
        r"(?<!\bor )(?<!\band )(?<!\bfalse )\bnegative\b(?! (?:(?:or|and) positive|pressure|impact|effect|feedback)\b)",
        "positive",
    ),
    (r"\babsence of\b", "presence of"),
    (r"(?<!\bor )\babsent\b(?! or\b)", "present"),
]
_NEGATE = [
    (r"(?<=patient )reports\b", "denies"),
    (r"(?<=patient )reported\b", "denied"),
    (r"\bdiagnosis is\b", "diagnosis is not"),
    (
        r"(?<!\bwas )(?<!\bwere )(?<!\bbeen )(?<!\bas )(?<!\bis )(?<!\bare )(?<!\band )"
        r"\b(revealed|reveals|showed|shows|confirmed|demonstrated|demonstrates|identified)"
        r"(?: an?)?\b(?= [a-z])(?! (?:normal|healthy|intact|stable|preserved|only|that|the|to|by|in|on|at|via|with|"
        r"through|during|after|and|or|both|all|its|his|her|as|from|for)\b)(?![^,.;]{0,40}\d)",
        r"\1 no",
    ),
    (
        r"\b(is|are|was|were) (?=(?:started|prescribed|given|administered|initiated|continued|admitted|recommended|"
        r"advised|referred|planned|scheduled|performed|indicated|positive|elevated|present|noted|observed)\b)",
        r"\1 not ",
    ),
    (
        r"(?:(?<=[.!?] )|^)(start|initiate|begin|continue|prescribe|administer|order|refer|discontinue|stop|increase|"
        r"reduce|recommend|perform|obtain|monitor)\b",
        lambda match: f"Do not {match[1].lower()}",
    ),
]
_NEGATE_LAST = [
    (r"\bwill\b", "will not"),
    (r"(?<!diagnosis )\b(include|suggest|indicate|support)s\b", r"does not \1"),
]
_UNNEGATE, *_INSERT = map(texts.compiled, (_UNNEGATE, _NEGATE, _NEGATE_LAST))
_NEGATION = re.compile(
    r"\b(?:no|not|never|none|neither|nor|cannot|nothing|without|denie[sd]|deny(?:ing)?|negative|absen(?:t|ce))\b",
    re.IGNORECASE,
)


def turn_negation(text: str, rarity: Rarity) -> str | None:
    """Remove one negation, or insert one if none can be removed. Of several places, choose the most specific words."""
    for rules in (_UNNEGATE, *_INSERT):
        candidates = [(match, new) for pattern, new in rules for match in pattern.finditer(text)]
        if rules is not _UNNEGATE:
            # A second negation in a sentence would obscure its meaning, not reverse it.
            candidates = [(match, new) for match, new in candidates if not _NEGATION.search(_sentence_around(match))]
        if candidates:
            match, new = max(candidates, key=lambda found: rarity.weight(words(texts.sentence_after(found[0])[:60])))
            return texts.replace(match, texts.expand(match, new))
    return None


def _sentence_around(match: re.Match) -> str:
    return texts.sentence_before(match) + match[0] + texts.sentence_after(match)


# --- a changed number -----------------------------------------------------------------------------------------------

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
# The last number of a range or product ("2-3 cm", "20 × 15 cm"), but the first one of a blood pressure.
_QUANTITY = re.compile(
    rf"(?<![\w.,/^-])(?:(?:{_NUMBER})\s?(?:[-–×x]|to)\s?){{0,4}}(?P<number>{_NUMBER})(?![\d.]*\d)", re.IGNORECASE
)
# Before a value that is not the patient's own, or that depends on another value.
_NOT_OWN = re.compile(r"\b(?:normal|reference)[^.;)]{0,40}$|\b(?:between|from)\b[^.;,]{0,30}$|(?:±|\+/-) ?$")
_RANGE = re.compile(rf"({_NUMBER})\s?(?:[-–]|to)\s?$", re.IGNORECASE)


@dataclass(frozen=True)
class _Value:
    """A kind of value: the pattern of what follows the number, its change, and the pattern of what precedes it."""

    unit: re.Pattern
    change: Callable[[float], float]
    before: re.Pattern | None

    def fits(self, match: re.Match) -> bool:
        before = match.string[max(0, match.start() - 60) : match.start()]
        if not self.unit.match(match.string, match.end()) or _NOT_OWN.search(before):
            return False
        return self.before is None or bool(self.before.search(before))


def _value(unit: str, change: Callable[[float], float], names: str = "") -> _Value:
    """Return the kind of value with this unit. `names`: only after one of these names ("heart rate of ", "SpO2: ")."""
    linked = r"(?: (?:level|levels|count))?(?: \([^)]{1,20}\))?(?: (?:is|was|of|at|to)){0,2}(?: elevated at)?:? ?~?$"
    return _Value(re.compile(unit), change, re.compile(rf"\b(?:{names}){linked}", re.IGNORECASE) if names else None)


# Every new value is possible in a patient and differs clinically from the old one.
_NOT_A_DOSE = r"(?! of (?:\w+ )?(?:blood|plasma|platelets|red|packed))(?!\s?/\s?(?:[dmnpµμ]?[Ll]|g|24|mmol|mg)\b)"
_DOSES = [
    _value(
        rf"\s?(?:mg|mcg|µg|μg|micrograms?|milligrams?|units|IU)\b{_NOT_A_DOSE}", lambda x: x * 2 if x < 500 else x / 2
    ),
]
_DEVICE = (  # the size of an instrument is not a finding
    r"(?!,? (?:[\w°]+ )?(?:arthroscope|endoscope|punch|needle|port|incision|trocar|valve|stent|screw|balloon|tube|"
    r"catheter))"
)
_VALUES = [
    _value(r"/\d{2,3}\b", lambda x: x + 40 if x < 130 else x - 40, "blood pressure|BP"),
    _value(r"/\d{2,3}\s?mm\s?Hg\b", lambda x: x + 40 if x < 130 else x - 40),
    _value(r"\s?°\s?C\b", lambda x: 38.9 if x < 37.5 else 36.8),
    _value(r"\s?°\s?F\b", lambda x: 102.2 if x < 99.5 else 98.4),
    _value(r"\s?%", lambda x: x - 9 if x > 93 else 98, "(?:oxygen|O2|arterial) saturation|SpO2|O2 sat|SaO2"),
    _value(r"\s?%", lambda x: 60 if x < 45 else 30, "(?:ejection fraction|LVEF|EF)"),
    _value(r"\s?(?:bpm|beats)\b", lambda x: x + 45 if x < 90 else round(x * 0.55)),
    _value(r"\s?breaths\b", lambda x: x + 14 if x < 20 else 14),
    _value(r"(?![\d.,]*[\d/%-])", lambda x: x + 45 if x < 90 else round(x * 0.55), "pulse|heart rate|HR"),
    _value(r"\s?g/dL\b", lambda x: x - 4 if x > 10 else x + 5, "ha?emoglobin|Hb|Hgb"),
    _value(r"\s?g/[lL]\b", lambda x: x - 40 if x > 100 else x + 50, "ha?emoglobin|Hb|Hgb"),
    _value(
        r"(?![\d.,]*[\d/%-])",
        lambda x: x - 4 if 10 < x < 20 else x + 5 if x < 20 else x - 40,
        "(?<!corpuscular )ha?emoglobin|Hb|Hgb",
    ),
    _value(r"\s?(?:mmol|mEq)/L\b", lambda x: x - 20 if x > 120 else x + 20, "sodium|Na"),
    _value(r"\s?(?:mmol|mEq)/L\b", lambda x: x + 1.9 if x < 4.5 else x - 2, "potassium|K"),
    _value(
        r"\s?(?:[mµμnp]?(?:mol|g)|m?U|m?IU)\s?/\s?(?:d|m|µ|μ)?[Ll]\b",
        lambda x: x * 2.5,
        "creatinine|CRP|C-reactive protein|bilirubin|ALT|AST|BUN|TSH|D-dimer|ferritin|triglycerides|LDH|troponin|CK",
    ),
    _value(
        rf"[\s-]?mm\b(?!\s?Hg|/){_DEVICE}",
        lambda x: x * 2 if x < 10 else x / 2,
    ),
    _value(rf"[\s-]cm\b{_DEVICE}", lambda x: x * 2 if x < 5 else x / 2),
    _value(r"\s?kg\b(?!/)", lambda x: x * 1.3 if x < 70 else x * 0.75),
    _value(
        r"[\s-](?:hour|day|week|month|year)s?\b(?![ -]old|'? (?:of )?(?:gestation|pregnan))",
        lambda x: x * 3 if x < 6 else x / 3,
    ),
    _value(r"[\s-]year[\s-]old\b", lambda x: x - 20 if x >= 50 else x + 15 if x >= 18 else x + 5),
    _value(r"[\s-](?:month|week|day)s?[\s-]old\b", lambda x: x * 3 if x < 4 else x / 2),
]
_COUNTS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_COUNT = re.compile(
    rf"(?<!\bto )(?<!\bor )(?<!\band )(?<!-)\b(?P<number>{'|'.join(_COUNTS)})"
    r"(?=[\s-](?:day|week|month|year)s?\b(?![ -]old))",
    re.IGNORECASE,
)


def change_number(text: str) -> str | None:
    """Change one number: the first measured value, else the first duration or age. Doses are not changed."""
    new = _change_first(text, _VALUES)
    match = _COUNT.search(text)
    if new is not None or match is None:
        return new
    return texts.replace(match, _COUNTS[(_COUNTS.index(match[0].lower()) + 5) % len(_COUNTS)])


def change_dose(text: str) -> str | None:
    """Double or halve one dose, a step that is plausible on paper."""
    return _change_first(text, _DOSES)


def _change_first(text: str, values: list[_Value]) -> str | None:
    quantities = list(_QUANTITY.finditer(text))
    for value in values:
        for match in filter(value.fits, quantities):
            new = _format_like(value.change(float(match["number"].replace(",", ""))), match["number"])
            start = match.start("number")
            edited = text[:start] + new + text[match.end("number") :]
            if (
                new != match["number"]
                and _is_in_order(text[:start], new)
                and _is_possible(edited[start : match.end() + 20])
            ):
                return edited
    return None


def _is_in_order(before: str, number: str) -> bool:
    """Return False if `number` ends a range ("3-6 months") whose start is not below it."""
    start = _RANGE.search(before[-20:])
    return start is None or float(start[1].replace(",", "")) < float(number.replace(",", ""))


def _is_possible(text: str) -> bool:
    """Return whether a value at the start of `text` is above zero and, if a blood pressure, above the diastolic one."""
    pressure = re.match(r"(\d+)/(\d+)", text)
    if pressure:
        return int(pressure[2]) + 15 <= int(pressure[1]) <= 240
    return float(re.match(r"-?[\d,]+(?:\.\d+)?", text)[0].replace(",", "")) > 0


def _format_like(value: float, example: str) -> str:
    """Format `value` like `example`: with its thousands separator and its number of decimals, at least 1 in all."""
    decimals = len(example.partition(".")[2])
    if decimals == 0 and value < 1:
        decimals = 1
    return f"{value:{',' if ',' in example else ''}.{decimals}f}"


# --- a changed side --------------------------------------------------------------------------------------------------

# In these phrases, the other side does not exist or changes nothing.
_NO_SIDE = re.compile(
    r"\b(?:left (?:and|or|to|versus|vs\.?) (?:the )?right|right (?:and|or|to|versus|vs\.?) (?:the )?left|left-to-right|"
    r"right-to-left|left anterior descending|left main|right middle lobe|(?:right|left)[- ]hand(?:ed|[- ]dominant)|"
    r"right[- ]hand man|(?:right|left)[- ]dominant|(?:right|left) (?:lateral )?decubitus|left circumflex|"
    r"left upper lobe lingula)\b",
    re.IGNORECASE,
)
_WHO_LEFT = "has had was is he she they who patient be been being not all feels feel felt nothing pills tablets weeks "
_WHO_LEFT += "months years days doses"
_SIDE = re.compile(
    "".join(rf"(?<!\b{word} )" for word in _WHO_LEFT.split()) + r"\b(?P<side>left|right)\b"
    r"(?! (?:away|now|after|before|next|then|there|here|where|when|from|the|to|with|him|her|his|their|them|it|in|into|"
    r"for|an?|at|by|behind|beside|over|under|around|through|out|off|up|down|back|alone|home|work|school|college|hospital|town|"
    r"untreated|unattended|open|undone|early|against|because|until|without|shift|track|way|time|thing|dose|choice|kind|"
    r"decision|treatment|amount|moment|direction|foods?|answer)\b)(?!s\b)",
    re.IGNORECASE,
)


def change_side(text: str) -> str | None:
    """Swap left and right wherever the words mean a side.

    Texts in which a swap could change nothing or give an impossible place are left out.
    """
    if _NO_SIDE.search(text):
        return None
    swapped = _SIDE.sub(_other_side, text)
    return swapped if _clauses(swapped) != _clauses(text) else None


def _clauses(text: str) -> list[str]:
    """Return the clauses in lower case, sorted: "left knee 5/5, right knee 5/5" is the same on both sides."""
    return sorted(clause.strip() for clause in re.split(r"[.;,:\n]|\band\b", text.lower()))


def _other_side(match: re.Match) -> str:
    other = {"left": "right", "right": "left"}[match["side"].lower()]
    return capital(other) if match["side"][0].isupper() else other


# --- an added sentence, another drug or diagnosis ---------------------------------------------------------------------


def add_sentence(text: str, sentences: list[tuple[str, str]], visit: str, seed: str) -> str | None:
    """Add one of the (sentence, topic), on a topic that `visit` does not mention; `seed` chooses which one and where.

    `visit` is all that is known of the visit: the dialogue and the note.
    """
    chosen = random.Random(seed)
    possible = [sentence for sentence, topic in sentences if not texts.mentions(visit, topic)]
    spans = statement_spans(text)
    if not possible or not spans:
        return None
    # Do not insert into a list, or before a sentence that refers to the previous one.
    is_prose = not any("\n" in text[start:end] or text[start].isdigit() for start, end in spans) and "\n" not in text
    places = [start for start, end in spans[1:] if not texts.refers(text[start:end])] if is_prose else []
    place, sentence = chosen.choice([*places, len(text)]), chosen.choice(possible)
    if place == len(text):
        end = "" if text.rstrip()[-1:] in (".", "!", "?", ":", ";") else "."
        return f"{text.rstrip()}{end} {sentence}"
    return f"{text[:place]}{sentence} {text[place:]}"


class _Terms:
    """Groups of terms that can replace one another."""

    def __init__(self, groups: list[list[str]]):
        self._group_of = {term.lower(): group for group in groups for term in group}
        longest_first = sorted(map(re.escape, self._group_of), key=len, reverse=True)
        self._any = re.compile(rf"(?<![\w/-])(?:{'|'.join(longest_first)})(?![\w/-])", re.IGNORECASE)

    def replace_first(self, text: str, searched: str, visit: str) -> str | None:
        """Replace the first term in `searched` that has a substitute outside `visit`, everywhere in `text`.

        Terms after a negation are not replaced: "no aspirin or other anticoagulant" also denies warfarin.
        """
        visit = visit.lower()
        for found in self._any.finditer(searched):
            if _NEGATION.search(texts.sentence_before(found)):
                continue
            for other in self._group_of[found[0].lower()]:
                if other.lower() not in visit:
                    # With its article and a short form in parentheses.
                    pattern = rf"(\ban? )?(?<![\w/-]){re.escape(found[0])}(?![\w/-])(?: \([A-Z][\w-]+\))?"
                    return re.sub(pattern, partial(texts.with_article, new=other), text, flags=re.IGNORECASE)
        return None


_DRUGS, _DIAGNOSES = _Terms(DRUG_GROUPS), _Terms(DIAGNOSIS_GROUPS)

# A diagnosis after these words is not the patient's.
_NOT_STATED = re.compile(
    r"\b(?:differential|ruled out|rather than|versus|vs|history of|without|no|not|excluded|infected|dissecting)\b",
    re.IGNORECASE,
)


def change_drug(text: str, visit: str) -> str | None:
    """Replace one drug by another that `visit` does not mention, wherever the text names it."""
    return _DRUGS.replace_first(text, text, visit)


def change_diagnosis(text: str, visit: str) -> str | None:
    """Replace the diagnosis of the assessment's first sentence by another that `visit` does not mention."""
    spans = statement_spans(text)
    first = text[slice(*spans[0])] if spans else ""
    return _DIAGNOSES.replace_first(text, _NOT_STATED.split(first)[0], visit)
