"""Edit sections with a known effect: one edit keeps every fact, four change exactly one.

Each edit takes a section's text and returns the edited text, or None if the edit does not apply. The same text always
gives the same edit. The patterns are for English notes. Standard library only.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

# --- words and sentences ---------------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Za-z]{4,}|\d+(?:[.,]\d+)*")

# The next sentence starts with a capital letter. "5." may number a list and "B." may be an initial: neither ends one.
_SENTENCE_GAP = re.compile(
    r"((?<=[.!?])(?<!\s\d\.)(?<!^\d\.)(?<!\b[A-Z]\.)(?<!\bDr\.)(?<!\bvs\.)[ \t]+(?=[A-Z])|\n\s*)"
)
_CLAUSE_GAP = re.compile(r"([;,] (?=(?:and|but|with|without|which|while|as well as)\b)|; )")


def words(text: str) -> set[str]:
    """Return the words of four letters or more, in lower case, and the numbers."""
    return {word.lower() for word in _WORD.findall(text)}


class Rarity:
    """Weigh how specific words are, by inverse document frequency: log(texts / texts with the word)."""

    def __init__(self, texts: Iterable[str]):
        self._texts = 0
        self._count: Counter[str] = Counter()
        for text in texts:
            self._texts += 1
            self._count.update(words(text))

    def weight(self, words: set[str]) -> float:
        """Return the sum of the words' weights. A word that is in no text weighs as much as a word that is in one."""
        return sum(math.log((self._texts + 1) / max(1, self._count[word])) for word in words)


# --- kept facts ------------------------------------------------------------------------------------------------------

# The phrases of each pair mean the same in a clinical note and have the same numbers, sides and negations. All phrases
# are replaced in one pass, so a replacement is never replaced again.
_SYNONYMS = {
    "reports that": "states that",
    "reported that": "stated that",
    "patient reports": "patient describes",
    "patient reported": "patient described",
    "patient also reports": "patient also describes",
    "he reports": "he describes",
    "he reported": "he described",
    "he also reports": "he also describes",
    "she reports": "she describes",
    "she reported": "she described",
    "she also reports": "she also describes",
    "mother reports": "mother describes",
    "presents with": "comes in with",
    "presented with": "came in with",
    "experiencing": "having",
    "approximately": "about",
    "prior to": "before",
    "due to": "because of",
    "because of": "due to",
    "caused by": "due to",
    "triggered by": "brought on by",
    "secondary to": "due to",
    "as well as": "along with",
    "additionally": "in addition",
    "furthermore": "in addition",
    "regarding": "about",
    "consistent with": "in keeping with",
    "no signs of": "no evidence of",
    "without signs of": "without evidence of",
    "probable": "likely",
    "needed": "required",
    "ongoing": "continuing",
    "dyspnea": "shortness of breath",
    "breathlessness": "shortness of breath",
    "high blood pressure": "hypertension",
    "heart attack": "myocardial infarction",
    "within normal limits": "in the normal range",
    "primary diagnosis": "main diagnosis",
    "management plan": "plan of care",
    "physical examination": "physical exam",
    "physical exam": "physical examination",
    "lab": "laboratory",
    "labs": "laboratory tests",
    "x-ray": "radiograph",
    "x-rays": "radiographs",
    "revealed": "showed",
    "reveals": "shows",
    "revealing": "showing",
    "demonstrated": "showed",
    "demonstrates": "shows",
    "was noted": "was seen",
    "were noted": "were seen",
    "elevated": "raised",
    "utilizing": "using",
    "utilized": "used",
    "underwent": "had",
    "performed": "carried out",
    "administered": "given",
    "initiate": "start",
    "initiated": "started",
    "initiating": "starting",
    "discontinue": "stop",
    "discontinued": "stopped",
    "medication": "medicine",
    "medications": "medicines",
    "recommended": "advised",
    "once daily": "once a day",
    "twice daily": "twice a day",
    "times daily": "times a day",
    "mg daily": "mg a day",
    "every morning": "each morning",
    "return for": "come back for",
    "return if": "come back if",
    "is scheduled": "is booked",
    "are scheduled": "are booked",
    "be scheduled": "be booked",
    "educate the patient on": "teach the patient about",
    "educate the patient about": "teach the patient about",
    "educate patient on": "teach patient about",
    "patient education on": "patient teaching on",
    "follow-up appointment": "follow-up visit",
    "follow-up appointments": "follow-up visits",
}
_ABBREVIATIONS = {
    "BMI": "body mass index",
    "BP": "blood pressure",
    "BUN": "blood urea nitrogen",
    "CKD": "chronic kidney disease",
    "COPD": "chronic obstructive pulmonary disease",
    "CRP": "C-reactive protein",
    "CT": "computed tomography",
    "DVT": "deep vein thrombosis",
    "ECG": "electrocardiogram",
    "EEG": "electroencephalogram",
    "EKG": "electrocardiogram",
    "ESR": "erythrocyte sedimentation rate",
    "GERD": "gastroesophageal reflux disease",
    "HR": "heart rate",
    "ICU": "intensive care unit",
    "MRI": "magnetic resonance imaging",
    "NSAIDs": "nonsteroidal anti-inflammatory drugs",
    "PRN": "as needed",
    "RR": "respiratory rate",
    "UTI": "urinary tract infection",
    "h/o": "history of",
    "s/p": "status post",
}


def _any_of(phrases: Iterable[str], flags: int = 0) -> re.Pattern:
    longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
    return re.compile(rf"(?<![\w/(-])(?:{'|'.join(longest_first)})(?![\w/-])", flags)


_SYNONYM = _any_of(_SYNONYMS, re.IGNORECASE)
_ABBREVIATION = _any_of(_ABBREVIATIONS)

# A sentence that refers to the previous one moves only together with it.
_REFERS_BACK = re.compile(
    r"^(?:this|these|that|those|it|its|they|their|such|however|additionally|furthermore|moreover|therefore|thus|due to|"
    r"given|despite|instead|the (?:latter|former|procedure|surgery|operation))\b"
    r"|\b(?:then|subsequent(?:ly)?|later|after|afterwards?|thereafter|following|followed|next|finally|first|second|third|"
    r"initially|post-?operative(?:ly)?|also|other|others|else|same|above|remaining|both|if|once)\b",
    re.IGNORECASE,
)
_PRONOUN = re.compile(r"^(?:he|she|his|her)\b", re.IGNORECASE)
_RELATIVE = re.compile(
    r"\b(?:mother|father|wife|husband|sister|brother|son|daughter|parents?|family|partner|donor|infant|baby|child|mom)\b",
    re.IGNORECASE,
)


def reword(text: str) -> str | None:
    """State the same facts in other words: expand abbreviations, replace synonyms, reorder sentences."""
    lower = text.lower()
    already_expanded = {short for short, phrase in _ABBREVIATIONS.items() if phrase.lower() in lower}

    def synonym(match: re.Match) -> str:
        return _match_case(match, _SYNONYMS[match[0].lower()])

    def expanded(match: re.Match) -> str:
        return match[0] if match[0] in already_expanded else _match_case(match, _ABBREVIATIONS[match[0]])

    text, original = _ABBREVIATION.sub(expanded, _SYNONYM.sub(synonym, text)), text
    text = _swap_sentences(text)
    return text if text != original else None


def _match_case(match: re.Match, new: str) -> str:
    """Return `new`, capitalized if the match starts a sentence."""
    before = match.string[max(0, match.start() - 3) : match.start()].rstrip(" ")
    return _capital(new) if not before or before[-1] in ".!?\n" else new


def _swap_sentences(text: str) -> str:
    """Move the second half of the sentences to the front; the gaps between sentences stay in place."""
    parts = _SENTENCE_GAP.split(text)
    sentences, gaps = parts[::2], parts[1::2]
    if any(re.match(r"\d+[.)]", sentence) for sentence in sentences):
        return text  # a numbered list
    blocks: list[list[str]] = []
    for sentence in sentences:
        refers_back = _REFERS_BACK.search(sentence) or (_PRONOUN.match(sentence) and _RELATIVE.search(text))
        if blocks and refers_back:
            blocks[-1].append(sentence)
        else:
            blocks.append([sentence])
    half = len(blocks) // 2
    reordered = [sentence for block in blocks[half:] + blocks[:half] for sentence in block]
    return reordered[0] + "".join(gap + sentence for gap, sentence in zip(gaps, reordered[1:], strict=True))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- changed facts ----------------------------------------------------------------------------------------------------


# A colleague does not need such a sentence, so a note without it may still pass.
_MINOR = re.compile(
    r"^(?:the |a |patient )?(?:differential|prognosis|education|educate|encourage|emphasi[sz]e|advise|ensure|regular|"
    r"follow-up|schedule|support|no (?:other|additional|further))"
    r"|^the patient (?:is|was|will be) (?:advised|instructed|encouraged|educated|informed)"
    r"|within normal limits|unremarkable|\bnot (?:provided|detailed|specified)",
    re.IGNORECASE,
)


def drop_finding(text: str, rarity: Rarity) -> str | None:
    """Remove the sentence with the most distinctive words; from a single sentence, remove its last clause."""
    parts = _SENTENCE_GAP.split(text)
    if len(parts) > 1:
        candidates = [k for k in range(0, len(parts), 2) if not _MINOR.search(parts[k])]
    else:
        parts = _CLAUSE_GAP.split(text)
        candidates = [len(parts) - 1] if len(parts) > 1 else []

    count = Counter(word for part in parts for word in words(part))
    own_words = {k: {word for word in words(parts[k]) if count[word] == 1} for k in candidates}
    dropped = max(candidates, key=lambda k: rarity.weight(own_words[k]), default=None)
    if dropped is None or len(own_words[dropped]) < 3:
        return None
    del parts[max(0, dropped - 1) : max(2, dropped + 1)]  # with the gap before it; for the first, the gap after it
    rest = "".join(parts).strip()
    return rest if rest[-1:] in (".", "!", "?") else f"{rest}." if rest else None


# Removing a negation is tried first: it reverses a finding without a trace. Replacements are functions of the match.
_DENIALS = {"denies": "reports", "denied": "reported", "denying": "reporting", "deny": "report"}
_UNNEGATE = [
    (r"\b(denies|denied|denying|deny)\b(?: any\b)?", lambda match: _DENIALS[match[1].lower()]),
    (r"\bno\b(?! (?:longer|more|less|later|earlier|further|other|additional|need|change)\b) ", lambda match: ""),
    (r"\bwithout\b(?: any\b)?(?! (?:delay|further)\b)", lambda match: "with"),
    (r"\b(is|are|was|were|did|does|do|has|have|had|can|could) not\b(?! only\b)", lambda match: match[1]),
    (r"\bnegative\b", lambda match: "positive"),
    (r"\babsence of\b", lambda match: "presence of"),
    (r"\babsent\b", lambda match: "present"),
]
_NEGATE = [
    (r"(?<=patient )reports\b", lambda match: "denies"),
    (r"(?<=patient )reported\b", lambda match: "denied"),
    (r"\bdiagnosis is\b", lambda match: "diagnosis is not"),
    (
        r"\b(revealed|reveals|showed|shows|confirmed|demonstrated|demonstrates|identified)"
        r"(?: an?)?\b(?= [a-z])(?! (?:normal|healthy|intact|stable|preserved|only|that|the|to)\b)(?![^,.;]{0,40}\d)",
        lambda match: f"{match[1]} no",
    ),
    (
        r"\b(is|are|was|were|be) (?=(?:started|prescribed|given|administered|initiated|continued|admitted|recommended|"
        r"advised|referred|planned|scheduled|performed|indicated|positive|elevated|present|noted|observed)\b)",
        lambda match: f"{match[1]} not ",
    ),
    (
        r"(?:(?<=[.!?] )|^)(start|initiate|begin|continue|prescribe|administer|order|refer|discontinue|stop|increase|"
        r"reduce|recommend|perform|obtain|monitor)\b",
        lambda match: f"Do not {match[1].lower()}",
    ),
]
_NEGATE_LAST = [
    (r"\bwill\b", lambda match: "will not"),
    (r"\b(include|suggest|indicate|support)s\b", lambda match: f"does not {match[1]}"),
]
_NEGATION = re.compile(
    r"\b(?:no|not|never|none|neither|nor|cannot|nothing|without|denie[sd]|deny(?:ing)?|negative|absen(?:t|ce))\b",
    re.IGNORECASE,
)


def turn_negation(text: str, rarity: Rarity) -> str | None:
    """Remove one negation, or insert one if none can be removed. Of several places, choose the most specific words."""
    for rules in (_UNNEGATE, _NEGATE, _NEGATE_LAST):
        candidates = [(match, new) for pattern, new in rules for match in re.finditer(pattern, text, re.IGNORECASE)]
        if rules is not _UNNEGATE:
            # A second negation in a sentence would obscure its meaning, not reverse it.
            candidates = [(match, new) for match, new in candidates if not _NEGATION.search(_sentence_around(match))]
        if candidates:
            match, new = max(candidates, key=lambda candidate: rarity.weight(words(_after(candidate[0])[:60])))
            return _replace(match, new(match))
    return None


def _after(match: re.Match) -> str:
    """Return the rest of the sentence, at most 200 characters."""
    return re.split(r"[.;]\s", match.string[match.end() : match.end() + 200], maxsplit=1)[0]


def _sentence_around(match: re.Match) -> str:
    before = match.string[max(0, match.start() - 200) : match.start()]
    return re.split(r"[.;]\s", before)[-1] + match[0] + _after(match)


def _replace(match: re.Match, new: str) -> str:
    """Replace the match with `new`. A capital at its start is kept, even if `new` is empty."""
    after = match.string[match.end() :]
    if match[0][0].isupper():
        new, after = _capital(new), after if new else _capital(after)
    return match.string[: match.start()] + new + after


_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"


Change = Callable[[float], float]


def _value(unit: str, change: Change, before: str = r"(?<![\w.,/^-])") -> tuple[re.Pattern, Change]:
    # Change the last number of a range or product ("2-3 cm", "20 × 15 cm"), but the first one of a blood pressure.
    return re.compile(rf"{before}(?:(?:{_NUMBER})\s?(?:[-–×x]|to)\s?){{0,4}}(?P<number>{_NUMBER}){unit}"), change


# Doses and measured values come before durations and ages. Every change is large enough to matter clinically.
_VALUES = [
    _value(
        r"\s?(?:mg|mcg|µg|μg|units|IU|g|mL|ml)\b(?!\s?/\s?(?:[dmnpµμ]?[Ll]|min)\b)",
        lambda x: x * 10 if x < 50 else x / 10,
    ),
    _value(r"/\d{2,3}\s?mm\s?Hg\b", lambda x: x + 60 if x < 150 else x - 40),
    _value(r"/\d{2,3}\b", lambda x: x + 60 if x < 150 else x - 40, before=r"\b(?:[Bb]lood pressure|BP)[a-z ]{1,12}"),
    _value(r"\s?°?\s?C\b", lambda x: x + 2.5 if x < 37.5 else x - 2.5 if x < 45 else x / 2),
    _value(r"\s?°\s?F\b", lambda x: x + 4.5 if x < 99.5 else x - 4.5),
    _value(r"\s?%", lambda x: x * 2 if x < 50 else x - 40),
    _value(r"\s?(?:bpm|beats|breaths)\b", lambda x: x * 2 if x < 100 else x / 2),
    _value(r"\s?(?:[mµμnpd]?(?:mol|g|Eq|U|IU|L)|K|k|cells|copies|units)\s?/\s?\S*\w", lambda x: x * 3),
    _value(r"[\s-]?(?:mm|cm|kg|mmHg|mm Hg)\b", lambda x: x * 3),
    _value(
        r"(?![\d.,]*[\d/%-])",
        lambda x: x * 2,
        before=r"(?i:\b(?:pulse|heart rate|ha?emoglobin|platelets|creatinine|potassium|sodium|glucose|HbA1c|CRP|INR|"
        r"score)[a-z ]{1,12})",
    ),
    _value(r"[\s-](?:hour|day|week|month|year|time|dose|session|cycle)s?\b(?!-old| old)", lambda x: x * 3),
    _value(r"[\s-](?:year|month|week|day)s?[\s-]old\b", lambda x: x - 30 if x > 40 else x + 30),
]
_NORMAL_RANGE = re.compile(r"\b(?:normal|reference)[^.;)]{0,40}$")  # not the patient's own value
_COUNTS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_COUNT = re.compile(
    rf"\b(?P<number>{'|'.join(_COUNTS)})(?=[\s-](?:hour|day|week|month|year|time|dose|session|cycle|tablet)s?\b)", re.I
)


def change_number(text: str) -> str | None:
    """Change one number: the first dose or measured value, else the first duration or age."""
    for pattern, change in _VALUES:
        for match in pattern.finditer(text):
            if _NORMAL_RANGE.search(text[max(0, match.start() - 60) : match.start()]):
                continue
            new = _format_like(change(float(match["number"].replace(",", ""))), match["number"])
            if new != match["number"]:
                return text[: match.start("number")] + new + text[match.end("number") :]
    match = _COUNT.search(text)
    if match is None:
        return None
    new = _COUNTS[(_COUNTS.index(match[0].lower()) + 5) % len(_COUNTS)]
    return _replace(match, new)


def _format_like(value: float, example: str) -> str:
    """Format `value` like `example`: with its thousands separator and at most as many decimals, but at least one."""
    decimals = max(len(example.partition(".")[2]), 1)
    return f"{value:{',' if ',' in example else ''}.{decimals}f}".rstrip("0").rstrip(".")


_SIDE = re.compile(
    r"(?<!\bhas )(?<!\bhad )(?<!\bwas )(?<!\bhe )(?<!\bbe )\b(?P<side>left|right)\b"
    r"(?! (?:away|now|after|the|to|with|him|her|them|in|for|an?|at|behind|over|alone|home|work|untreated|shift)\b)",
    re.IGNORECASE,
)


def change_side(text: str) -> str | None:
    """Swap left and right wherever the words mean a side."""
    swapped = _SIDE.sub(_other_side, text)
    return swapped if swapped != text else None


def _other_side(match: re.Match) -> str:
    other = {"left": "right", "right": "left"}[match["side"].lower()]
    return _capital(other) if match["side"][0].isupper() else other
