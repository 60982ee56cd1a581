"""Edit sections without making them wrong: reword and reorder them, add a true fact, or remove a minor sentence.

Each edit takes a section's text and returns the edited text, or None if the edit does not apply. The same text always
gives the same edit. The patterns are for English notes. Standard library only.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

from evaluation.judging.phrases import (
    ABBREVIATIONS,
    CONTRACTIONS,
    FINITE_VERBS,
    GENERAL_WORDS,
    PARTICIPLES,
    SYNONYMS,
    VERBS_OR_NOUNS,
)
from evaluation.judging.sentences import split_statements, statement_spans
from evaluation.judging.texts import capital, compiled, expand, refers, without, words

# --- other words and order -------------------------------------------------------------------------------------------


def _any_of(phrases: Iterable[str], flags: int = 0) -> re.Pattern:
    longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
    return re.compile(rf"(?<![\w/(-])(?:{'|'.join(longest_first)})(?![\w/-])", flags)


_SYNONYM = _any_of(SYNONYMS, re.IGNORECASE)
_ABBREVIATION = _any_of(ABBREVIATIONS)
_SHORT = {phrase.lower(): short for short, phrase in ABBREVIATIONS.items()} | CONTRACTIONS
_CONTRACTION = _any_of(_SHORT, re.IGNORECASE)
_COPULA = re.compile(
    r" (?:is|are|was|were) (?=(?:normal|negative|positive|elevated|raised|unremarkable|stable|intact|noted|seen|"
    r"observed|present|absent|palpable|tender|soft|clear|palpated|found|pending|ongoing|within)\b)"
)
_ARTICLE = re.compile(r"(?<=[a-z,] )(?:the|an?) (?=[a-z0-9])")


def _finding(match: re.Match) -> str:
    subject, finding = match.groups()
    return f"On {subject[0].lower()}{subject[1:]}: {finding}" if "exam" in subject else f"{subject}: {finding}"


# Whole sentences without their final period, in order of preference. \1 is the part that is kept.
_VERBLESS = r"(?!(?:If|Given|Due|Although|As|For|However|Additionally|No|It|This|These|There|In|After|Once|While)\b)"
_VERBLESS += (
    r"((?:(?! (?:is|are|was|were|will|has|have|should|may|if|which|who|not|also|but|revealed|showed) )[^;.:])+)"
)
_PATIENT = r"(?:The patient|Patient|He|She)"
_SENTENCES = [
    (r"There (?:is|was|are|were) no ([^;]+)", r"No \1"),
    (
        rf"{_PATIENT}(?: also)? (?:reports?|reported|complains? of)(?: (?:experiencing|having))? "
        r"(?!that\b|no\b|being\b|\w+ing\b|when\b|how\b)"
        rf"(?!.* (?:as having|and (?:{FINITE_VERBS}|{VERBS_OR_NOUNS})) )(.+)",
        r"Reported: \1",
    ),
    (r"The patient, (an? [^,;]+), ((?:presents?|presented|reports?|reported|underwent|was|has|had|is) .+)", r"\1 \2"),
    (r"The patient is (an? .+)", r"\1"),
    (rf"{_PATIENT} has an? (?:past |medical )*history of (.+)", r"History includes \1"),
    (r"(?:The )?primary (?:diagnosis|assessment) (?:is|was|of) (.+)", r"Main diagnosis: \1"),
    (r"(?:The )?differential diagnos[ie]s (?:include|includes|included|considered) (.+)", r"Also considered: \1"),
    (r"(?:The )?differential diagnos[ie]s (?:could|may|might|would) (?:include|consider) (.+)", r"To consider: \1"),
    (r"(?:The )?(?:management |treatment )?plan (?:includes|involves) (.+)", r"Plan: \1"),
    (r"(?:The )?prognosis is (.+)", r"Prognosis: \1"),
    (r"(?:The )?prognosis depends on (.+)", r"Outlook: will depend on \1"),
    (r"(?:The )?differential diagnos[ie]s initially (?:included|considered) (.+)", r"Also considered at first: \1"),
    (r"(?:The )?presence of (.+?) (?:suggests|indicates) (.+)", r"\2 is suggested by \1"),
    (
        r"(?:Regular |Routine )?follow-up (?:appointments?|visits?) (?:are|is|will be) "
        r"(?:scheduled|planned|arranged|needed) ((?:to|for|in|with|every) .+)",
        r"Arrange follow-up \1",
    ),
    (
        r"Regular follow-ups (?:are|will be) (?:scheduled|planned|necessary|needed) ((?:to|for|in|with) .+)",
        r"See regularly \1",
    ),
    (r"Schedule (?:an? )?(?:regular )?follow-up (?:appointments?|visits?) (.+)", r"Come back for review \1"),
    (
        r"(?:Patient |Further |Patient and family )?education (?:on|about|regarding) (.+?) "
        r"(?:will be provided|is (?:crucial|essential|important|recommended|necessary|needed)|to be provided)(.*)",
        r"Teach the patient about \1\2",
    ),
    (r"Encourage (?:the )?patient to (.+)", r"The patient should be urged to \1"),
    (
        r"(?:Close|Continuous|Ongoing|Continued) monitoring of (.+?) (?:is|will be) \w+(| to .+)",
        r"Keep monitoring \1\2",
    ),
    (r"Continue (?:with )?monitoring (.+)", r"Keep watching \1"),
    (
        r"Referral to (.+?) (?:is|was|has been) (?:also )?(?:recommended|advised|planned)(.*)",
        r"Refer to \1\2",
    ),
    (r"Referral to (?!.*\b(?:is|are|was|will|has|may)\b)(.+)", r"Refer to \1"),
    (r"Consider (referral to|consultation with) (.+)", r"Possible \1 \2"),
    (r"Close monitoring of (?!.*\b(?:is|are|was|will|has|may)\b)(.+)", r"Closely monitor \1"),
    (r"The patient also (.+)", r"Also \1"),
    (r"The patient had (.+)", r"Had \1"),
    (r"Plan to (perform|conduct|monitor|continue|initiate|start|discuss) (.+)", r"To \1 \2"),
    (r"(?:The )?patient's (\w+) (?:is|are|was|were) (.+)", r"\1: \2"),
    (r"Educate (?:the )?patient (?:on|about|regarding) (.+)", r"Patient teaching: \1"),
    (
        r"(?!(?:The )?(?:patient|he|she|they|mother|family|parents?|this|it|these|there)\b)(?:The |An? )?"
        r"([A-Z][\w-]*(?: (?!(?:was|were|been|is|are|has|had|that|which|who)\b)[\w/-]+){0,6}?) "
        r"(?:revealed|reveals|showed|shows|demonstrated|demonstrates|indicated|indicates|"
        r"identified|displayed) (?!that\b|both\b|to\b)(?:an? )?(.+)",
        _finding,
    ),
    (rf"{_VERBLESS} (?:is|are) (recommended|planned|scheduled)", r"\2: \1"),
    (
        rf"{_VERBLESS} will be (provided|performed|conducted|monitored|scheduled|continued|initiated|arranged|reviewed|"
        r"given|emphasized)",
        r"To be \2: \1",
    ),
    (rf"{_VERBLESS} (?:was|were|is|are) (noted|observed|found|seen)", r"\2: \1"),
    (rf"{_VERBLESS} (?:was|were|is|are) (normal|unremarkable)", r"\2: \1"),
    (rf"{_PATIENT} has (an? .+)", r"Has \1"),
    (
        r"The patient (?:is|was|has been) ((?:advised|instructed|encouraged|referred|started|admitted|scheduled|"
        r"prescribed|treated|diagnosed|discharged) .+)",
        r"\1",
    ),
    (r"The patient ((?:will|underwent|presented|presents|received|experienced|developed|continues|should) .+)", r"\1"),
]
_DENIAL = re.compile(
    rf"{_PATIENT}(?: also)? (?:(?:denies|denied) (?:any |having |experiencing )*|reports? no )([\w,/'’ -]+)"
)
# A denial's list ends before another verb: "denies pain and reports a cough".
_NOT_A_LIST = re.compile(
    r"\b(?:that|but|however|who|which|except|though|although|when|if|while|whereas|because|since|until|not|no|never|"
    r"without|apart from|other than|he|she|they|"
    rf"{FINITE_VERBS})\b"
    r"|(?:\band|\bor|,|\bthen)(?: (?:also|now|still|instead|\w+ly))* "
    rf"(?:{VERBS_OR_NOUNS}|(?!(?:{PARTICIPLES})\b)\w+ed)\b",
    re.IGNORECASE,
)

# Parts of a sentence.
_PARTS = [
    (r"\ban? (1|one)-(day|week|month|year) history of\b", r"\1 \2 of"),
    (r"\ban? (\d+|[a-z]+)-(day|week|month|year) history of\b", r"\1 \2s of"),
    (
        r"(?<=[a-z] )(?<!\bto )(?<!\bof )(?<!\bat )(?<!\bwith )(\d+(?:\.\d+)? ?mg) (?:once )?daily\b",
        r"in a daily dose of \1",
    ),
    (r"\bfor the (?:past|last) (?=\w+ (?:day|week|month|year))", "over the preceding "),
    (r"\b(blood pressure|heart rate|respiratory rate|temperature|oxygen saturation) (?:of|at|was|is) (?=\d)", r"\1 "),
    (r"\b(?:beats|breaths|respirations)(?:/min(?:ute)?| per minute)\b", "per minute"),
]
_SENTENCES, _PARTS = compiled(_SENTENCES), compiled(_PARTS, 0)


def reword(text: str) -> str | None:
    """State the same facts in other words: rewrite sentences by template, replace synonyms and reorder sentences.

    Half of the texts become telegraphic ("pt w/ HTN", few articles); in the others, abbreviations are written out.
    """
    telegraphic = zlib.crc32(text.encode("utf-8", "replace")) % 2 == 0
    spans = statement_spans(text)
    if not spans:
        return None
    gaps = [text[: spans[0][0]], *(text[end:start] for (_, end), (start, _) in pairwise(spans))]
    sentences = [_rewrite(text[start:end]) for start, end in spans]
    blocks = _blocks(sentences, [text[start:end] for start, end in spans])
    half = len(blocks) // 2
    sentences = [sentence for block in blocks[half:] + blocks[:half] for sentence in block]
    new = "".join(gap + sentence for gap, sentence in zip(gaps, sentences, strict=True))
    new = _fix_articles(_contract(new) if telegraphic else _expand(new))
    return new if _is_different(text, new) else None


def _is_different(text: str, new: str) -> bool:
    """Return whether at least one word in ten of `text` is gone in `new`."""
    old_words = Counter(re.findall(r"\w+", text.lower()))
    kept = old_words & Counter(re.findall(r"\w+", new.lower()))
    return kept.total() <= 0.9 * old_words.total()


def _rewrite(sentence: str) -> str:
    body, end = (sentence[:-1], ".") if sentence.endswith(".") else (sentence, "")
    denial = _DENIAL.fullmatch(body)
    if denial and not _NOT_A_LIST.search(denial[1]):
        body = "No " + re.sub(r",? and (?!/)(?!.*,? (?:and|or) )", " or ", denial[1])
    else:
        for pattern, new in _SENTENCES:
            match = pattern.fullmatch(body)
            if match:
                body = capital(expand(match, new))
                break
    for pattern, new in _PARTS:
        body = pattern.sub(new, body)
    return body + end


def _expand(text: str) -> str:
    lower = text.lower()
    already_expanded = {short for short, phrase in ABBREVIATIONS.items() if phrase.lower() in lower}
    text = _SYNONYM.sub(lambda match: _match_case(match, SYNONYMS[match[0].lower()]), text)
    return _ABBREVIATION.sub(
        lambda match: match[0] if match[0] in already_expanded else _match_case(match, ABBREVIATIONS[match[0]]), text
    )


def _contract(text: str) -> str:
    text = _CONTRACTION.sub(lambda match: _match_case(match, _SHORT[match[0].lower()]), text)
    text = _SYNONYM.sub(lambda match: _match_case(match, SYNONYMS[match[0].lower()]), text)
    return _COPULA.sub(" ", _ARTICLE.sub("", text)).replace(" and ", " & ")


def _fix_articles(text: str) -> str:
    """Repair "an raised" and "a elevated", which replacements leave behind."""
    text = re.sub(r"\b([Aa])n (?=[b-df-gj-np-tv-z][a-z]{2})", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=(?!one|eu)[aeio][a-z]{2})", r"\1n ", text)


def _match_case(match: re.Match, new: str) -> str:
    """Return `new`, capitalized if the match starts a sentence."""
    before = match.string[max(0, match.start() - 3) : match.start()].rstrip(" ")
    return capital(new) if not before or before[-1] in ".!?\n" else new


_ITEM_OR_HEADING = re.compile(r"^\(?\d+[.)]|^[A-Z][A-Za-z ]{1,30}:|\n")
_PRONOUN = re.compile(r"^(?:he|she|his|her)\b", re.IGNORECASE)
_RELATIVE = re.compile(
    r"\b(?:mother|father|wife|husband|sister|brother|son|daughter|parents?|family|partner|donor|infant|baby|child|mom)\b",
    re.IGNORECASE,
)


def _blocks(sentences: list[str], originals: list[str]) -> list[list[str]]:
    """Group the sentences into blocks that can be reordered, according to the original sentences."""
    has_relative = any(map(_RELATIVE.search, originals))
    is_list = any(map(_ITEM_OR_HEADING.search, originals))
    blocks: list[list[str]] = []
    for sentence, original in zip(sentences, originals, strict=True):
        refers_back = is_list or refers(original) or (_PRONOUN.match(original) and has_relative)
        if blocks and refers_back:
            blocks[-1].append(sentence)
        else:
            blocks.append([sentence])
    return blocks


# --- omitted minor sentences -----------------------------------------------------------------------------------------

# A colleague does not need such a sentence.
_BOILERPLATE = re.compile(
    r"^(?:(?:patient |further |provide |provide patient |continued? |ongoing )*education\b|educate\b|encourage\b"
    r"|emphasi[sz]e\b|(?:patient )?(?:compliance|adherence) (?:with|to)\b"
    r"|(?:ensure|reinforce|stress) (?:the )?(?:patient|importance|compliance)"
    r"|the patient (?:is|was|will be) (?:encouraged|educated|informed) (?:to|about|on|of|regarding)\b"
    r"|all questions were answered|the patient (?:verbali[sz]es|expressed) understanding)",
    re.IGNORECASE,
)
_SPECIFIC = re.compile(
    r"\d|\b(?:no|not|without|avoid|report|emergency|urgent|immediate|refer|referral|prescri|started?|surgery|biopsy|scan|diet|"
    r"smoking|alcohol|insulin|inject|dose|therapy|allerg|return|seek|warning|red flags|signs?\b|risks?\b|infection|"
    r"due to|medication|recurrence|pregnan|technique|device|restrict|mobili|prevent|exercise|weight|"
    r"wound|glucose|safety|\w*trauma)",
    re.IGNORECASE,
)


def omit_minor(text: str) -> str | None:
    """Remove a sentence of general education or encouragement, which a colleague does not need."""
    spans = statement_spans(text)
    minor = [
        (start, end)
        for start, end in spans
        if _BOILERPLATE.match(text[start:end])
        and not _SPECIFIC.search(text[start:end])
        and sum(not re.fullmatch(GENERAL_WORDS, word) for word in words(text[start:end])) <= 2
    ]
    if not minor or len(spans) < 3:
        return None
    return without(text, *minor[-1])


# --- a further fact --------------------------------------------------------------------------------------------------

_SAYS = re.compile(r"^\s*(?:Patient|Pt)\s*:\s*(.+)$", re.MULTILINE | re.IGNORECASE)
_OWN_FACT = re.compile(r"^(?:I|My|I've|I'm|I'd|There|The (?:pain|rash|cough|swelling))\b")
_NO_FACT = re.compile(
    r"\?|\b(?:thank|thanks|understand|okay|ok|appreciate|doctor|sure|guess|hope|hear|sorry|will|'ll|question|worried|"
    r"you|your|glad|relie|great|good|sounds|know|think|told|said|that|this|those|these|them|agree|see|happy|follow|"
    r"wait|forward|ready|concern|scared|nervous|sense|done|same|not|no|never|since then|anymore|any|better|fine)\b|"
    r"'ll|n't|\*",
    re.IGNORECASE,
)


def quote_patient(text: str, dialogue: str, weight: Callable[[str], float]) -> str | None:
    """Quote the patient's most specific sentence. `weight` says how specific a sentence is.

    Only sentences about the patient that make sense without the doctor's preceding words are used.
    """
    candidates = [
        sentence
        for speech in _SAYS.findall(dialogue)
        for sentence in split_statements(speech)
        if 6 <= len(sentence.split()) <= 25
        and '"' not in sentence
        and sentence[-1] == "."
        and _OWN_FACT.search(sentence)
        and not _NO_FACT.search(sentence)
    ]
    if not candidates:
        return None
    return f'{text.rstrip()} The patient says: "{max(candidates, key=weight)}"'


_NO_FINDING = re.compile(
    r"^(?:he|she|his|her|\d)\b|\bnot (?:detailed|provided|specified|mentioned|discussed|reported|documented)|"
    r"transcript|dialogue|conversation",
    re.IGNORECASE,
)


def add_finding(text: str, findings: str, weight: Callable[[str], float]) -> str | None:
    """Add to an assessment the most specific sentence of the same note's objective section."""
    candidates = [
        sentence
        for sentence in split_statements(findings)
        if 6 <= len(sentence.split()) <= 30
        and sentence[-1] == "."
        and "\n" not in sentence
        and sentence not in text
        and not refers(sentence)
        and not _NO_FINDING.search(sentence)
    ]
    return f"{text.rstrip()} Objective findings: {max(candidates, key=weight)}" if candidates else None


def add_diagnosis(text: str, assessment: str) -> str | None:
    """Put before a plan the first sentence of the same note's assessment, if it states the diagnosis."""
    first = next(iter(split_statements(assessment)), "")
    if not re.search(r"diagnos|^(?:\d\.)", first) or refers(first) or len(first.split()) > 40 or first in text:
        return None
    if "\n" in first or first[-1] != ".":
        return None
    return f"Assessed as follows: {first} {text.lstrip()}"
