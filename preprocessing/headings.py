"""Read a note that is text under the headings Subjective, Objective, Assessment and Plan.

A heading is found by its place and its whole label, never by a word alone. The place is the start of a line or, in a
note on one line, the end of a sentence. The label is everything up to the colon, so that "Treatment Plan:" is one
heading and "Influenza A:" is none. The four headings must look alike. A text with doubtful or further headings is
rejected with the reason.
"""

import itertools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from prompts import SECTION_NAMES, SECTIONS, Note, NoteError

SectionMap = dict[str, str]  # a heading in normal form -> its section

# --- vocabulary ------------------------------------------------------------------------------------------------------

_WORDS = {name.lower(): section for section, name in SECTION_NAMES.items()}


def _by_phrase(phrases: dict[str, str]) -> dict[str, str]:
    return {phrase: section for section, text in phrases.items() for phrase in text.split(", ")}


# Longer headings that mean the whole section.
_LONGER = _by_phrase(
    {
        "S": "subjective findings, subjective data, subjective information, subjective complaints, subjective history",
        "O": "objective findings, objective data, objective information, objective exam, objective examination",
        "A": "clinical assessment, medical assessment, overall assessment, diagnostic assessment, assessment summary",
        "P": "treatment plan, plan of care, plan of treatment, plan of action, care plan, management plan, "
        "clinical plan, therapeutic plan, medical plan",
    }
)
# Headings of a part of a section. They stay text. With the section's word they form a longer heading ("Assessment /
# Problem List"). Where the section's own heading is missing, the reason names them.
_PARTS = _by_phrase(
    {
        "S": "chief complaint, cc, reason for visit, presenting complaint, history of present illness, hpi, history, "
        "interval history, review of systems, ros, past medical history, pmh, past surgical history, psh, "
        "family history, social history, medications, current medications, allergies, symptoms",
        "O": "physical exam, physical examination, exam, examination, pe, vitals, vital signs, labs, lab results, "
        "laboratory results, results, imaging, mental status exam, mse",
        "A": "impression, impressions, clinical impression, diagnosis, diagnoses, dx, differential diagnosis, "
        "problem list, problems, medical decision making",
        "P": "recommendations, recommendation, treatment, follow-up, follow up, disposition, orders, management, "
        "interventions, next steps",
    }
)
# Parts that begin a visit: below the Assessment they belong to a second note.
_VISIT_BEGINS = {
    *("chief complaint", "cc", "reason for visit", "presenting complaint", "history of present illness", "hpi"),
    *("history", "interval history", "review of systems", "ros", "physical exam", "physical examination"),
}
# Headings of text that belongs to no section, and beginnings of lines that a person's name follows.
_OUTSIDE = {"addendum", "addenda", "late entry", "attestation", "signature", "signed"}
_SIGNED = re.compile(
    r"\W*(?:(?:electronically |digitally |e-)?signed by|electronically signed|dictated by)\b|\W*signed,?\s*\Z", re.I
)
_ONE_HEADING = {frozenset("SO"): "Subjective and Objective", frozenset("AP"): "Assessment and Plan"}

_SINGULAR = {"plans": "plan", "assessments": "assessment"}
_TITLE = re.compile(r"(?:[a-z]{1,30} )?(?:(?:SOAP|clinical|medical|progress) ?)?(?:note|summary)?", re.IGNORECASE)

# --- a clinic's own headings ------------------------------------------------------------------------------------------


def read_section_map(path: Path) -> SectionMap:
    """Read a JSON object of headings and their sections: {"Impression": "A", "Recommendations": "P"}.

    A section is a letter or a whole word. Several headings may have one section: where they follow each other in a
    note they are joined, and stay text. Raises UserError with the file and the heading.
    """
    try:
        pairs = json.loads(path.read_text("utf-8"), object_pairs_hook=list)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give another --section_map") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); write an object of headings and sections") from error
    if not (isinstance(pairs, list) and pairs and all(isinstance(pair, tuple) for pair in pairs)):
        raise UserError(f'{path} is not an object of headings and sections; write {{"Impression": "A"}}')
    section_map: SectionMap = {}
    for heading, value in pairs:
        section = {"s": "S", "o": "O", "a": "A", "p": "P", **_WORDS}.get(str(value).strip().lower())
        if section is None:
            raise UserError(f"{path}: {heading}: the section is {value}; write S, O, A or P")
        label, name = heading.strip().rstrip(":"), normal_form(heading)
        known, form, _ = _classify(label, {})
        if not name or len(label) > _MAX_LABEL - 4 or re.search(r"[:\uff1a\r\n]", label):
            raise UserError(f"{path}: {heading}: no heading; write one without a colon, of at most 60 characters")
        if form == "combined" or (form in ("letter", "word", "both", "longer") and known != section):
            raise UserError(f"{path}: {heading}: its section cannot be changed; remove it")
        if name in section_map:
            raise UserError(f"{path}: {heading}: named twice; remove one")
        section_map[name] = section
    return section_map


# --- candidates ------------------------------------------------------------------------------------------------------

# Where a label may begin: a line, after a title, after a sentence, after a vital sign ("HR: 88 A: ..."), before bold,
# or at a letter and its word ("A: Assessment:"). Each quantifier stays within a line.
_PLACE = re.compile(
    r"(?i:\A[*_# ]{0,6}(?:[a-z]{1,30} )?(?:(?:SOAP|clinical|medical|progress) )?(?:note|summary)[:*_]{0,4}[ \t]+)"
    r"|\A|[\r\n]"
    r"|[.!?\u2026\u3002][)\]\"'\u201d\u2019*_]{0,4}[^\S\r\n]+"
    r"|(?<![^\W_])(?:P|R|T|HR|RR|BP|Temp|SpO2|SaO2)[:\uff1a][ \t]?\d[\d./]{0,8}%?[^\S\r\n]+"
    r"|[^\S\r\n](?=\*\*|__)"
    r"|(?<![ \t])[ \t]+(?=(?i:S\W{1,4}subjective|O\W{1,4}objective|A\W{1,4}assessment|P\W{1,4}plan)\W)"
)
# "Hep. A: negative" ends no sentence.
_ABBREVIATION = re.compile(
    r"\b(?:hep|inf|vit|strep|gr|grp|gp|var|cf|vs|dr|mr|mrs|(?-i:Ms)|prof|e\.g|i\.e)\.\s+A\Z", re.I
)
_OPENING = re.compile(
    r"(?P<indent>[^\S\r\n]{0,40})"
    r"(?P<marks>(?:[^\w\r\n]|_){0,12}(?:(?:(?:\d{1,2}|[IVX]{1,4})[.)]|[SOAP]\.)(?:[^\w\r\n]|_){1,8})?)"
)
_MARK = re.compile(
    r"[*_)\]\s]{0,8}(?P<colon>[:\uff1a]{1,2}(?:[-\u2013\u2014](?=\s|\Z))?)[*_]{0,4}"
    r"|[*_)\]]{0,6}[^\S\r\n]{0,2}(?P<dash>[-\u2013\u2014])[*_]{0,4}(?=[^\S\r\n]|\Z)"
    r"|(?P<end>[*_)\]#\s]{0,8}\Z)"
    r"|(?P<close>[)\]][*_]{0,4}|\*\*|__)(?=[^\S\r\n])"
)
_MAX_LABEL = 64  # characters
_MIN_WIDTH = 40  # characters of a line that may be wrapped before a heading
_SENTENCE_END = re.compile(r"[.!?;]\s")
_TOKEN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[&/+,]")
_CONNECTORS = {"&", "/", "+", ",", "and"}
_SPACE = re.compile(r"\s*")
_PULSE = re.compile(
    r"[*_ \t]{0,4}\d{2,3}(?=\s{0,2}(?:[.,;\r\n]|\Z|bpm|/ ?min|(?:ir)?regular|(?:R|T|RR|BP|Temp|SpO2)\b|[A-Z]:))"
)
_VITALS = re.compile(r"[*_ \t]{0,4}\d{2,3}[^\w]{1,6}(?:R|T|RR|BP|Temp|SpO2|SaO2)\b")
_HEADS = {"letter", "word", "both", "mapped", "longer"}


@dataclass(frozen=True)
class _Heading:
    """A candidate: `text[start:end]` is the whole heading with its marks.

    Its form is one of _HEADS, or "combined" (two sections), "numbered", "unknown" or "modified" (a longer label that
    has a number, begins or ends with a section's word), "part", "outside", or "list" (another letter).
    """

    start: int
    end: int
    section: str
    form: str
    name: str  # in normal form, from the vocabulary above
    begins_line: bool  # else it follows the end of a sentence
    indent: str
    marks: str  # before the label: "##", "**", "1.", "-" or a bracket
    mark: str  # after the label: ":", "-", ")" for a closing bracket or bold, "" for a label alone on its line
    lower: bool


def normal_form(label: str) -> str:
    """The words of a heading in small letters, each connector ("/", "&", "and") as "and"."""
    return " ".join("and" if token in _CONNECTORS else token for token in _TOKEN.findall(label.casefold()))


def _classify(label: str, section_map: SectionMap) -> tuple[str, str, str]:
    """Section, form and name of a label. The form is empty if it is no heading."""
    name = normal_form(label)
    if name in section_map:
        return section_map[name], "mapped", name
    if name in _OUTSIDE:
        return "", "outside", name
    tokens = [token for token in _TOKEN.findall(label) if token.lower() not in _CONNECTORS]
    exact = [token if token in SECTION_NAMES else _WORDS.get(token.lower()) for token in tokens]
    if 1 <= len(tokens) <= 2 and all(exact):
        if len(set(exact)) == 1:
            lengths = {len(token) > 1 for token in tokens}
            return exact[0], "both" if len(lengths) == 2 else "word" if True in lengths else "letter", exact[0]
        two = len(tokens) < len(_TOKEN.findall(label)) or all(len(token) > 1 for token in tokens)
        if two and frozenset(exact) in _ONE_HEADING and (exact[0] in "SA" or len(tokens[0]) > 1):
            return min(exact, key=SECTIONS.index), "combined", _ONE_HEADING[frozenset(exact)]
    if len(tokens) == 1 and len(label) == 1 and label.isupper():
        return "", "list", label
    if tokens[:1] and tokens[0] in SECTION_NAMES and any(t.isdigit() or t.startswith("cont") for t in tokens[1:]):
        return tokens[0], "numbered", tokens[0]
    parts = name.split(" and ")
    sections = [_WORDS.get(part) or _LONGER.get(part) or _PARTS.get(part) for part in parts]
    words = [_SINGULAR.get(word, word) for word in name.split()]
    words = [word for word in words if word in _WORDS]
    if not words:
        return (sections[0], "part", name) if len(parts) == 1 and sections[0] else ("", "", "")
    if len(parts) > 1 and any(part in _WORDS for part in parts):
        meant = frozenset(filter(None, [*sections, *(_WORDS[word] for word in words)]))
        if meant in _ONE_HEADING:
            return min(meant, key=SECTIONS.index), "combined", _ONE_HEADING[meant]
    section = _WORDS[words[0]]
    ends = [_SINGULAR.get(word, word) for word in (name.split()[0], name.split()[-1])]
    if all(sections) and set(sections) == {section}:
        return section, "longer", name
    leads = ends[0] in _WORDS or (ends[1] in ("subjective", "objective"))
    form = "numbered" if any(map(str.isdigit, name)) else "unknown" if leads else "modified"
    return section, form, words[0]


def _label_at(
    text: str, start: int, begins_line: bool, section_map: SectionMap, alone: bool = False
) -> _Heading | None:
    """The candidate that begins at `start`. A label without a mark counts at a line's start or if `alone`."""
    opening = _OPENING.match(text, start)
    line = re.match(r"[^\r\n]*", text[opening.end() : opening.end() + _MAX_LABEL])[0]
    ends = len(line) < _MAX_LABEL or opening.end() + len(line) == len(text)
    marks = re.sub(r"\d+|[IVX]+|[SOAP]", "1", opening["marks"]).strip()

    def candidate(length: int, section: str, form: str, name: str, mark: str) -> _Heading:
        lower = line[:1].islower()
        end = opening.end() + length
        return _Heading(start, end, section, form, name, begins_line, opening["indent"], marks, mark, lower)

    if begins_line and (_SIGNED.match(line) or (marks == "/" and line[:2] == "s/")):
        return candidate(len(line), "", "outside", "signature", "")
    longest = None
    for number, match in enumerate(_MARK.finditer(line)):
        label = line[: match.start()]
        if number == 4 or not label or _SENTENCE_END.search(label) or (match["end"] is not None and not ends):
            break
        if match["close"] and not set(marks) & set("([*_"):
            continue
        mark = ":" if match["colon"] else "-" if match["dash"] else ")" if match["close"] else ""
        section, form, name = _classify(label, section_map)
        if not form or (not mark and not begins_line and not alone):
            continue
        heading = candidate(match.end(), section, form, name, mark)
        if form not in ("part", "numbered", "unknown", "modified"):
            return heading
        if mark or "#" in marks or "**" in marks or label.istitle() or label.isupper():
            longest = longest or heading
    return longest


def _scan(text: str, section_map: SectionMap) -> list[_Heading]:
    """All candidates in order. A label that only repeats its heading ("A: Assessment:") becomes part of it."""
    found: list[_Heading] = []
    for place in _PLACE.finditer(text):
        if found and place.end() < found[-1].end:
            continue
        begins_line = place.start() == 0 or place[0] in ("\r", "\n")
        if not begins_line and _ABBREVIATION.search(text[max(0, place.start() - 8) : place.end() + 1]):
            continue
        heading = _label_at(text, place.end(), begins_line, section_map)
        while heading is not None:
            if found and _introduces(text, found[-1], heading):
                heading = replace(heading, start=found.pop().start)
            found.append(heading)
            heading = _label_after(text, found, section_map)
    return _without_lists(found)


def _introduces(text: str, longer: _Heading, heading: _Heading) -> bool:
    """Whether `longer` ("Assessment and Plan:") has no text of its own before `heading` ("Assessment:")."""
    return (
        longer.form in ("combined", "numbered", "unknown")
        and longer.section == heading.section
        and heading.form in _HEADS
        and not text[longer.end : heading.start].strip()
    )


def _label_after(text: str, found: list[_Heading], section_map: SectionMap) -> _Heading | None:
    """Join the last heading with labels of the same section right after it; return one of another on its line."""
    while found[-1].form in _HEADS:
        heading = found[-1]
        start = _SPACE.match(text, heading.end).end()
        same_line = not re.search(r"[\r\n]", text[heading.end : start])
        label = _label_at(text, start, False, section_map, alone=True) if start < len(text) else None
        if label is None or (same_line and "1" in label.marks):
            return None  # "A: 1. Plan: ..." is a list
        if heading.form == "letter" and same_line and label.section == heading.section:
            if label.form == "combined":
                found[-1] = replace(label, start=heading.start)
                return None
            if label.form == "longer" and label.name.startswith(SECTION_NAMES[label.section].lower()):
                found[-1] = replace(heading, end=label.end, form="both")
                return None
        if label.form not in ("letter", "word", "both", "list"):
            return None
        if label.section == heading.section:
            letter_again = label.form == "letter" and (heading.form != "word" or label.mark not in (":", "-"))
            if letter_again or label.lower or heading.form == "mapped":
                return None
            form = "both" if "letter" in (heading.form, label.form) else label.form
            found[-1] = replace(heading, end=label.end, form=form)
        elif same_line and label.mark:
            if heading.mark != ":" and frozenset((heading.section, label.section)) in _ONE_HEADING:
                name = _ONE_HEADING[frozenset((heading.section, label.section))]
                found[-1] = replace(heading, end=label.end, form="combined", name=name)
                return None
            return label
        else:
            return None
    return None


def _without_lists(found: list[_Heading]) -> list[_Heading]:
    """Leave out other letters, and each A before a B (airway, breathing) or after a Q (question, answer)."""
    letters = [heading for heading in found if heading.form in ("letter", "list") and heading.mark]
    listed = {heading.start for heading in found if heading.form == "list"}
    for before, after in itertools.pairwise(letters):
        if (before.section, after.name) == ("A", "B"):
            listed.add(before.start)
        if (before.name, after.section) == ("Q", "A"):
            listed.add(after.start)
    return [heading for heading in found if heading.start not in listed]


# --- choice ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How the headings of one note look, as its first one does."""

    first: _Heading
    forms: frozenset[str]
    lines: bool  # each begins a line, else all are on one

    def fits(self, heading: _Heading) -> bool:
        return heading.form in self.forms and self.looks_alike(heading) and (heading.begins_line or not self.lines)

    def looks_alike(self, heading: _Heading) -> bool:
        first = self.first
        letters = "letter" in (first.form, heading.form)
        return (
            (heading.marks, heading.lower) == (first.marks, first.lower)
            and (not letters or bool(heading.mark) == bool(first.mark))
            and (self.lines or heading.mark == first.mark)
        )


def _layout(text: str, heads: list[_Heading], first: _Heading) -> _Layout:
    rest = [heading for heading in heads if heading.start > first.start and not _is_pulse(text, heading)]
    forms = {heading.form for heading in ([first] if first.form in ("letter", "word") else [first, *rest])}
    letters = "letter" in forms and "word" not in forms
    layout = _Layout(first, frozenset({"letter", "both", "mapped"} if letters else _HEADS - {"letter"}), False)
    by_lines = replace(layout, lines=True)
    return by_lines if any(map(by_lines.fits, rest)) else layout


def _is_pulse(text: str, heading: _Heading) -> bool:
    """ "P: 88" among vital signs."""
    return (heading.section, heading.form) == ("P", "letter") and bool(_PULSE.match(text, heading.end))


def _is_bare(heading: _Heading) -> bool:
    """A letter alone on its line, which may be a blood group."""
    return heading.form == "letter" and not heading.mark and not heading.marks


def read_soap(text: str, section_map: SectionMap | None = None) -> Note:
    """Read a note under four headings in the order S, O, A, P, each at a line's start or all on one line.

    Headings are letters, whole words or both ("S - Subjective:"), plain, bold, numbered, in brackets or Markdown, with
    a colon, a dash or a line of their own. `section_map` adds headings. Inside a line a heading must follow the end of
    a sentence. Raises NoteError where a section has no heading, more than one, or no text; where one heading covers
    two sections; and where text stands before S or outside the sections. Time is linear in the length.
    """
    found = _scan(text, section_map or {})
    heads = [heading for heading in found if heading.form in _HEADS]
    first = next((heading for heading in heads if heading.section == "S"), None)
    if first is None:
        raise NoteError(_why_missing("S", text, found, [], None))
    layout = _layout(text, heads, first)
    chain = [first]
    for section in SECTIONS[1:]:
        fitting = [head for head in heads if head.section == section and head.start >= chain[-1].end]
        fitting = [head for head in fitting if layout.fits(head)]
        fitting = [head for head in fitting if head.form != "longer"] or fitting
        if not fitting and layout.lines:  # words may follow letters: a word that begins a line is no look-alike
            words = replace(layout, forms=frozenset({"word"}))
            fitting = [head for head in heads if head.section == section and head.start >= chain[-1].end]
            fitting = [head for head in fitting if words.fits(head)]
        if not fitting:
            raise NoteError(_why_missing(section, text, found, chain, layout))
        chain.append(fitting[0])
    title = " ".join(text[: first.start].split()).strip(" *#_:-=~")
    if not _TITLE.fullmatch(title):
        raise NoteError("text stands before the Subjective heading")
    _check_form(text, chain, layout)
    _check_others(text, found, chain, layout)
    _check_inside(text, chain)
    return _sections(text, found, chain)


def _sections(text: str, found: list[_Heading], chain: list[_Heading]) -> Note:
    note = {}
    ends = [heading.start for heading in chain[1:]] + [len(text)]
    for heading, end in zip(chain, ends, strict=True):
        joined = heading.form == "mapped" and any(
            other.section == heading.section and other.form in _HEADS
            for other in found
            if heading.start < other.start < end
        )
        note[heading.section] = _clean(text, heading.start if joined else heading.end, end)
        if not note[heading.section]:
            raise NoteError(f"section {heading.section} is empty")
    return note


def _clean(text: str, start: int, end: int) -> str:
    """`text[start:end]` without white space, Markdown rules and one half of a bold mark at its ends."""
    lines = re.split(r"(\r\n|\r|\n)", text[start:end])  # texts and, between them, line breaks
    first, last = 0, len(lines)
    while first < last and (not lines[first].strip() or _RULE.fullmatch(lines[first])):
        first += 1
    while first < last and (not lines[last - 1].strip() or _RULE.fullmatch(lines[last - 1])):
        last -= 1
    section = "".join(lines[first:last]).strip()
    return section.removesuffix("**").strip() if section.count("**") % 2 else section


_RULE = re.compile(r"[ \t]*(?:-{3,}|={3,}|\*{3,}|_{3,}|~{3,})[ \t]*")

# --- reasons ---------------------------------------------------------------------------------------------------------

_INSIDE = re.compile(
    r"(?<![^\W_])(?P<label>[A-Z]|Subjective|SUBJECTIVE|Objective|OBJECTIVE|Assessment|ASSESSMENT"
    r"|(?<=[.!?]\s)(?i:subjective|objective|plan))[*_)\]]{0,4}[^\S\r\n]?(?:[:\uff1a]|[-\u2013\u2014](?=\s))"
)
# Lines that begin with S or O in any form: "s)", "Subjective ->".
_LINE = re.compile(r"[\r\n][^\w\r\n]{0,12}(?i:([so])(?= ?[^\w\s]|\t)|(subj|obj)ective\b)")
_PAIRS = {("S", "O"), ("A", "P"), ("Subjective", "Objective"), ("Assessment", "Plan")}
_ANY = re.compile(r"(?<![^\W_])([SOAP]|subjective|objective|assessment|plan)[*_)\]]{0,4}[^\S\r\n]?[:\uff1a]", re.I)
_MANY = "more headings follow the Plan"


def _as_written(name: str) -> str:
    return name.upper() if len(name) <= 3 else name.capitalize()


def _why_missing(section: str, text: str, found: list[_Heading], chain: list[_Heading], layout: _Layout | None) -> str:
    """Why a section has no heading after `chain`."""
    for heading in found:
        if heading.form == "combined":
            return f"{heading.name} stand under one heading"
    name = f"{SECTION_NAMES[section]} ({section})"
    rest = [heading for heading in found if heading.section == section]
    rest = [heading for heading in rest if not chain or heading.start >= chain[-1].end]
    for heading in rest if layout else []:
        if heading.form in _HEADS and not _is_pulse(text, heading):
            if heading.form not in layout.forms:
                return f"no heading for {name} in the form of the first: some are letters, some words"
            if not heading.begins_line and layout.lines:
                return f"no heading for {name} at the start of a line, as the others are"
            return f"no heading for {name} that looks like the first one"
    for heading in rest:
        if heading.form == "part" and (heading.begins_line or (layout and not layout.lines)):
            return f'no heading for {name}; give --section_map to read "{_as_written(heading.name)}" as one'
        if heading.form in ("numbered", "unknown", "modified"):
            return f'no heading for {name}, only a longer one with "{heading.name.capitalize()}"'
    if layout is None or layout.lines:
        return f"no heading for {name} in the order S, O, A, P"
    inside = {match[1][0].upper() for match in _ANY.finditer(text, chain[-1].end) if match[1] not in "soap"}
    for other in SECTIONS[SECTIONS.index(section) :]:
        if other not in inside:
            return f"no heading for {SECTION_NAMES[other]} ({other}) in the order S, O, A, P"
    return f"no heading for {name} after the end of a sentence"


def _check_form(text: str, chain: list[_Heading], layout: _Layout) -> None:
    """Raise NoteError if a heading's form or place leaves a doubt that it is the section's."""
    if chain[-1].form == "letter" and _VITALS.match(text, chain[-1].end):
        raise NoteError("the heading P may be a pulse")
    for previous, heading in itertools.pairwise(chain):
        if heading.form == "longer" and _OTHER_LABEL.search(text, previous.end, heading.start):
            raise NoteError(f"no plain heading for {SECTION_NAMES[heading.section]}, and more than one that may be it")
    if not layout.lines:
        return
    indents = {heading.indent for heading in chain[1:]}
    if len(indents | ({chain[0].indent} if chain[0].start else set())) > 1:
        raise NoteError("the headings are not indented alike")
    for heading in chain[1:]:
        if _is_bare(heading) and _LABEL_BEFORE.search(text, max(0, heading.start - 20), heading.start):
            raise NoteError(f"the heading {heading.section} may be a value, such as a blood group")
    width = 0 if layout.first.marks else _wrapped_width(text)
    for heading in chain[1:] if width else []:
        before = _unfinished_line_before(text, heading)
        if before and len(before) + 1 + heading.end - heading.start > width:
            raise NoteError(f"the heading {heading.section} may be part of a wrapped sentence")


_OTHER_LABEL = re.compile(
    r"(?:[\r\n]|[.!?]\s)[^\w\r\n]{0,12}[A-Z][^.:;\r\n]{0,40}(?:[:\uff1a]|[-\u2013\u2014]\s)|[\r\n][ \t]*(?:#|\*\*|__)"
)
_LABEL_BEFORE = re.compile(r"(?:[:\uff1a]|group|type)\s*\Z", re.I)


def _wrapped_width(text: str) -> int:
    """A lower bound of the width at which sentences are wrapped; 0 where none seems to be."""
    lines = [line.rstrip() for line in re.split(r"\r\n|\r|\n", text)]
    pairs = itertools.pairwise(lines)
    widths = [len(line) for line, following in pairs if _is_unfinished(line) and following.lstrip()[:1].islower()]
    return max([width for width in widths if width >= _MIN_WIDTH / 2], default=0)


def _is_unfinished(line: str) -> bool:
    return line[-1:] not in ("", *".!?:;\u2026\u3002)\"'")


def _unfinished_line_before(text: str, heading: _Heading) -> str:
    """The line before the heading's, if its sentence may continue, else an empty string."""
    lines = re.split(r"\r\n|\r|\n", text[max(0, heading.start - 400) : heading.start])
    before = lines[-2].rstrip() if len(lines) > 1 else ""
    return before if _is_unfinished(before) and len(before) >= _MIN_WIDTH else ""


def _check_others(text: str, found: list[_Heading], chain: list[_Heading], layout: _Layout) -> None:
    """Raise NoteError if a candidate outside the chain may begin a section."""
    position = 0
    before = ""
    for heading in found:
        if heading in chain:
            position, before = chain.index(heading), ""
            continue
        here = chain[position].section
        if heading.form in _HEADS and not (_is_pulse(text, heading) or heading.lower):
            if (before, heading.section) in _PAIRS:
                raise NoteError(_MANY if here == "P" else f"more than one heading for {SECTION_NAMES[before]}")
            before = heading.section
        if layout.lines and not heading.begins_line and heading.form not in ("letter", "word", "both"):
            continue
        if heading.form == "combined":
            raise NoteError(f"{heading.name} stand under one heading")
        if heading.form == "outside":
            raise NoteError(f"{heading.name.capitalize()} belongs to no section")
        if heading.form == "part":
            if heading.name in _VISIT_BEGINS and here in "AP":
                raise NoteError(f"{_as_written(heading.name)} stands under {SECTION_NAMES[here]}")
        elif _begins_section(text, heading, here, chain, layout):
            raise NoteError(_MANY if here == "P" else f"more than one heading for {SECTION_NAMES[heading.section]}")


def _begins_section(text: str, heading: _Heading, here: str, chain: list[_Heading], layout: _Layout) -> bool:
    """Whether a candidate in the section `here` looks like one more heading, not like text."""
    own = heading.section == here
    if heading.form == "modified" or (_is_pulse(text, heading) and here in "SO"):
        return False
    if heading.form in ("numbered", "unknown"):
        return not own and (layout.lines or heading.form == "numbered")
    open_form = next(head.form for head in chain if head.section == here)
    if heading.form == "longer" or "mapped" in (heading.form, open_form):
        return not own
    if _is_bare(heading) and not layout.fits(heading):
        return False  # a blood group
    if heading.lower and not layout.first.lower:
        return heading.begins_line and not own and not _unfinished_line_before(text, heading)
    if heading.form not in layout.forms:
        return heading.begins_line and not own
    if layout.lines:
        return heading.begins_line or not own or heading.form == "letter"
    return layout.looks_alike(heading)


def _check_inside(text: str, chain: list[_Heading]) -> None:
    """Raise NoteError if labels inside sentences make one more note: S: before O:, or A: before P:."""
    ends = [heading.start for heading in chain[1:]] + [len(text)]
    for heading, end in zip(chain, ends, strict=True):
        letter = word = ""
        for match in _INSIDE.finditer(text, heading.end, end):
            label = match["label"].capitalize()
            if label == "P" and _PULSE.match(text, match.end()):
                continue
            before = letter if len(label) == 1 else word
            if (before, label) in _PAIRS:
                name = SECTION_NAMES.get(before, before)
                raise NoteError(_MANY if heading.section == "P" else f"more than one heading for {name}")
            letter, word = (label, word) if len(label) == 1 else (letter, label)
        lines = [match[match.lastindex][0].upper() for match in _LINE.finditer(text, heading.end, end)]
        if ("S", "O") in itertools.pairwise(lines):
            raise NoteError(_MANY if heading.section == "P" else "more than one heading for Subjective")
