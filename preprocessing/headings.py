"""Read a note that is text under the headings Subjective, Objective, Assessment and Plan.

A heading is found by its place and its whole label, never by a word alone. The place is the start of a line or, in a
note on one line, the end of a sentence. The label is everything up to the colon. `read_soap` works in three steps:

1. `find_headings` lists every label at such a place, with its kind (see preprocessing.labels).
2. `_choose` takes one heading for each section, all written alike.
3. The checks reject the note if any other label, or the text around a heading, leaves a doubt.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from preprocessing.labels import FIRST_PARTS, PLAIN, SECTION_HEADINGS, Kind, Label, SectionMap, classify
from prompts import SECTION_NAMES, SECTIONS, Note, NoteError

# --- step 1: find the labels -----------------------------------------------------------------------------------------

MAX_LABEL = 64  # characters, with marks

# Where a label may begin. Each quantifier stays within a line, which keeps the time linear.
_TITLE_BEFORE = (
    r"\A[*_# ]{0,6}(?i:(?:[a-z]{1,30} )?(?:(?:SOAP|clinical|medical|progress) )?(?:note|summary))[:*_]{0,4}[ \t]+"
)
_LINE_START = r"\A|[\r\n]"
_SENTENCE_END = r"[.!?\u2026\u3002][)\]\"'\u201d\u2019*_]{0,4}[^\S\r\n]+"
_VITAL_SIGN = r"(?<![^\W_])(?:P|R|T|HR|RR|BP|Temp|SpO2|SaO2)[:\uff1a][ \t]?\d[\d./]{0,8}%?[^\S\r\n]+"
_BEFORE_BOLD = r"[^\S\r\n](?=\*\*|__)"
_BEFORE_BOTH = r"(?<![ \t])[ \t]+(?=(?i:S\W{1,4}subjective|O\W{1,4}objective|A\W{1,4}assessment|P\W{1,4}plan)\W)"
_PLACE = re.compile("|".join((_TITLE_BEFORE, _LINE_START, _SENTENCE_END, _VITAL_SIGN, _BEFORE_BOLD, _BEFORE_BOTH)))
# "Hep. A: negative" ends no sentence.
_ABBREVIATION = re.compile(
    r"\b(?:hep|inf|vit|strep|gr|grp|gp|var|cf|vs|dr|mr|mrs|(?-i:Ms)|prof|e\.g|i\.e)\.\s+A\Z", re.I
)
# Before a label: "##", "**", "-", "1.", "IV)", "S. "
_OPENING = re.compile(
    r"(?P<indent>[^\S\r\n]{0,40})"
    r"(?P<marks>(?:[^\w\r\n]|_){0,12}(?:(?:(?:\d{1,2}|[IVX]{1,4})[.)]|[SOAP]\.)(?:[^\w\r\n]|_){1,8})?)"
)
# After a label: a colon, a dash, the end of the line, or the bracket or bold mark that closes it.
_MARK = re.compile(
    r"[*_)\]\s]{0,8}(?P<colon>[:\uff1a]{1,2}(?:[-\u2013\u2014](?=\s|\Z))?)[*_]{0,4}"
    r"|[*_)\]]{0,6}[^\S\r\n]{0,2}(?P<dash>[-\u2013\u2014])[*_]{0,4}(?=[^\S\r\n]|\Z)"
    r"|(?P<end>[*_)\]#\s]{0,8}\Z)"
    r"|(?P<close>[)\]][*_]{0,4}|\*\*|__)(?=[^\S\r\n])"
)
_SIGNED = re.compile(
    r"\W*(?:(?:electronically |digitally |e-)?signed by|electronically signed|dictated by)\b|\W*signed,?\s*\Z", re.I
)
_PULSE = re.compile(
    r"[*_ \t]{0,4}\d{2,3}(?=\s{0,2}(?:[.,;\r\n]|\Z|bpm|/ ?min|(?:ir)?regular|(?:R|T|RR|BP|Temp|SpO2)\b|[A-Z]:))"
)
_PULSE_AND_VITALS = re.compile(r"[*_ \t]{0,4}\d{2,3}[^\w]{1,6}(?:R|T|RR|BP|Temp|SpO2|SaO2)\b")


@dataclass(frozen=True)
class Heading:
    """A label in a text: `text[start:end]` is the whole heading with its marks."""

    label: Label
    start: int
    end: int
    begins_line: bool  # else it follows the end of a sentence, or another heading
    indent: str
    opening: str  # the marks before the label: "##", "**", "-", a bracket, or "1." for any number
    mark: str  # the mark after it: ":", "-", ")" for a closing bracket or bold, "" for a label alone on its line
    lower: bool  # begins with a small letter

    @property
    def kind(self) -> Kind:
        return self.label.kind

    @property
    def section(self) -> str:
        return self.label.section

    @property
    def is_bare(self) -> bool:
        """A letter alone on its line, which may be a value. A and O may be a blood group."""
        return self.kind is Kind.LETTER and not self.mark and not self.opening


def find_headings(text: str, section_map: SectionMap) -> list[Heading]:
    """Return all labels of headings in order. One that only repeats the one before it is joined to it."""
    found: list[Heading] = []
    for start, begins_line in _places(text):
        if found and start < found[-1].end:
            continue
        heading = _heading_at(text, start, begins_line, section_map)
        while heading is not None:
            if found and _is_same_heading(text, found[-1], heading):
                heading = _join(found.pop(), heading)
            found.append(heading)
            heading = _heading_after(text, heading, section_map)
    return _without_lists(found)


def _heading_after(text: str, heading: Heading, section_map: SectionMap) -> Heading | None:
    """Return the label right after a heading on its line: "A: Assessment", "O: A: flu"."""
    if heading.kind not in SECTION_HEADINGS or heading.end == len(text):
        return None
    after = _heading_at(text, heading.end, False, section_map, after_heading=True)
    if after is None or "1" in after.opening:  # "A: 1. Plan: ..." is a list
        return None
    is_heading = after.kind in PLAIN | {Kind.OTHER_LETTER} and after.mark
    return after if is_heading or _is_same_heading(text, heading, after) else None


def _places(text: str) -> Iterator[tuple[int, bool]]:
    """Yield each position where a label may begin, and whether it is the start of a line."""
    for place in _PLACE.finditer(text):
        begins_line = place.start() == 0 or place[0] in ("\r", "\n")
        if begins_line or not _ABBREVIATION.search(text[max(0, place.start() - 8) : place.end() + 1]):
            yield place.end(), begins_line


def _heading_at(
    text: str, start: int, begins_line: bool, section_map: SectionMap, after_heading: bool = False
) -> Heading | None:
    """Return the label that begins at `start`. One without a mark must begin a line or follow a heading."""
    opening = _OPENING.match(text, start)
    line = re.match(r"[^\r\n]*", text[opening.end() : opening.end() + MAX_LABEL])[0]
    marks = re.sub(r"\d+|[IVX]+|[SOAP]", "1", opening["marks"]).strip()

    def heading(label: Label, length: int, mark: str) -> Heading:
        end = opening.end() + length
        return Heading(label, start, end, begins_line, opening["indent"], marks, mark, line[:1].islower())

    if begins_line and _SIGNED.match(line):
        return heading(Label(Kind.OUTSIDE, "", "signature"), len(line), "")
    uncertain = None  # a longer mark may make the label a certain one: "Plan for today - Plan:"
    for match in _MARK.finditer(line):
        words = line[: match.start()]
        if not words or re.search(r"[.!?;](?:\s|\Z)", words):
            break
        if match["close"] and not set(marks) & set("([*_"):
            continue
        mark = ":" if match["colon"] else "-" if match["dash"] else ")" if match["close"] else ""
        label = classify(words, section_map)
        if label is None or not (mark or begins_line or after_heading):
            continue
        if label.section == "P" and label.kind is Kind.LETTER and _PULSE.match(text, opening.end() + match.end()):
            label = replace(label, kind=Kind.PULSE)
        if label.kind not in (Kind.EXTENDED, Kind.MODIFIED):
            return heading(label, match.end(), mark)
        is_emphasized = "#" in marks or "**" in marks or words.istitle() or words.isupper()
        if uncertain is None and (mark or is_emphasized):
            uncertain = heading(label, match.end(), mark)
    return uncertain


def _is_same_heading(text: str, first: Heading, second: Heading) -> bool:
    """Return whether `second` only repeats `first` ("A: Assessment:", "A/P:" above "A:"), with nothing between."""
    repeats = second.kind in PLAIN or second.kind is Kind.COMBINED
    if second.kind is Kind.LONGER:  # "O: Objective / Exam:", but "P: Treatment plan:" begins the text
        repeats = first.kind is Kind.LETTER and second.label.name.startswith(SECTION_NAMES[second.section].lower())
    return (
        repeats
        and first.section == second.section
        and first.kind in SECTION_HEADINGS - {Kind.MAPPED} | {Kind.COMBINED, Kind.EXTENDED}
        and not text[first.end : second.start].strip()
    )


def _join(first: Heading, second: Heading) -> Heading:
    """Return one heading over both. It looks like `first`, or like `second` below a label of two sections."""
    if first.kind not in SECTION_HEADINGS or second.kind is Kind.COMBINED:
        return replace(second, start=first.start)
    both = Kind.LETTER in (first.kind, second.kind)
    label = replace(second.label, kind=Kind.BOTH) if both else second.label
    return replace(first, end=second.end, label=label)


def _without_lists(found: list[Heading]) -> list[Heading]:
    """Leave out other letters, and each A before a B (airway, breathing) or after a Q (question, answer)."""
    letters = [heading for heading in found if heading.kind in (Kind.LETTER, Kind.OTHER_LETTER) and heading.mark]
    listed = {heading.start for heading in found if heading.kind is Kind.OTHER_LETTER}
    for before, after in itertools.pairwise(letters):
        if (before.section, after.label.name) == ("A", "B"):
            listed.add(before.start)
        if (before.label.name, after.section) == ("Q", "A"):
            listed.add(after.start)
    return [heading for heading in found if heading.start not in listed]


# --- step 2: choose four ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The style of a note's headings, given by the first one."""

    first: Heading
    kinds: frozenset[Kind]
    second_choice: frozenset[Kind]  # taken where a section has no heading of `kinds`
    lines: bool  # each heading begins a line; else the note is one line

    def fits(self, heading: Heading) -> bool:
        """Return whether this can be one of the four headings."""
        known = self.kinds | self.second_choice
        return heading.kind in known and self.looks_alike(heading) and (heading.begins_line or not self.lines)

    def looks_alike(self, heading: Heading) -> bool:
        """Return whether this is written like the first heading. On lines the mark may vary: "S:" and "O -"."""
        if (heading.opening, heading.lower) != (self.first.opening, self.first.lower):
            return False
        if not self.lines:
            return heading.mark == self.first.mark
        return Kind.LETTER not in (self.first.kind, heading.kind) or bool(heading.mark) == bool(self.first.mark)


def _layout(heads: list[Heading]) -> _Layout:
    """Return the layout of a note whose first heading for S is `heads[0]`."""
    first, *rest = heads
    plain = [heading.kind for heading in heads if heading.kind in (Kind.LETTER, Kind.WORD)]
    if plain[:1] == [Kind.LETTER]:
        kinds, second_choice = PLAIN - {Kind.WORD}, frozenset({Kind.WORD, Kind.PULSE})
    else:
        kinds, second_choice = PLAIN - {Kind.LETTER}, frozenset({Kind.LONGER})
    by_lines = _Layout(first, kinds | {Kind.MAPPED}, second_choice, lines=True)
    on_lines = any(by_lines.fits(heading) and heading.kind is not Kind.PULSE for heading in rest)
    return replace(by_lines, lines=on_lines)


def _choose(text: str, found: list[Heading]) -> tuple[list[Heading], _Layout]:
    """Return the headings of S, O, A and P, and how they look. Raises NoteError."""
    for heading in found:
        if heading.kind is Kind.COMBINED:
            raise NoteError(f"{heading.label.name} share one heading")
    heads = [heading for heading in found if heading.kind in SECTION_HEADINGS | {Kind.PULSE}]
    heads = list(itertools.dropwhile(lambda heading: heading.section != "S", heads))
    if not heads:
        raise NoteError(_why_missing("S", text, found, [], None))
    layout = _layout(heads)
    chain = heads[:1]
    for section in SECTIONS[1:]:
        later = [heading for heading in heads if heading.section == section and heading.start >= chain[-1].end]
        fitting = [heading for heading in later if layout.fits(heading)]
        if not fitting:
            raise NoteError(_why_missing(section, text, found, chain, layout))
        chain.append(min(fitting, key=lambda heading: heading.kind in layout.second_choice))
    return chain, layout


# A section's letter or word with a colon, at any place.
_LETTER_OR_WORD = re.compile(
    r"(?<![^\W_])([SOAP]|(?i:subjective|objective|assessment|plan))[*_)\]]{0,4}[^\S\r\n]?[:\uff1a]"
)


def _why_missing(section: str, text: str, found: list[Heading], chain: list[Heading], layout: _Layout | None) -> str:
    """Return the reason why a section has no heading after `chain`."""
    reason = f"no heading for {SECTION_NAMES[section]} ({section})"
    position = chain[-1].end if chain else 0
    rest = [heading for heading in found if heading.section == section and heading.start >= position]
    for heading in rest if layout else []:
        if heading.kind in SECTION_HEADINGS:
            if heading.kind not in layout.kinds | layout.second_choice:
                return f"{reason} in the form of the first: some are letters, some words"
            if not heading.begins_line and layout.lines:
                return f"{reason} at the start of a line, as the others are"
            return f"{reason} that looks like the first one"
    for heading in rest:
        if heading.kind is Kind.PART and (heading.begins_line or (layout and not layout.lines)):
            return f'{reason}; give --section_map to read "{_as_written(heading.label.name)}" as one'
        if heading.kind in (Kind.EXTENDED, Kind.MODIFIED):
            return f'{reason}, only a longer one with "{heading.label.name.capitalize()}"'
    if layout is None or layout.lines:
        return f"{reason} in the order S, O, A, P"
    inside = {match[1][0].upper() for match in _LETTER_OR_WORD.finditer(text, position)}
    for other in SECTIONS[SECTIONS.index(section) :]:
        if other not in inside:
            return f"no heading for {SECTION_NAMES[other]} ({other}) in the order S, O, A, P"
    return f"{reason} after the end of a sentence"


def _as_written(name: str) -> str:
    """Return a name from the vocabulary with capitals: HPI, Physical exam."""
    return name.upper() if len(name) <= 3 else name.capitalize()


# --- step 3: reject doubtful notes -----------------------------------------------------------------------------------

_TITLE = re.compile(r"(?:[a-z]{1,30} )?(?:(?:SOAP|clinical|medical|progress) ?)?(?:note|summary)?", re.IGNORECASE)
# A capitalized label of any name at the start of a line or sentence.
_OTHER_LABEL = re.compile(
    r"(?:[\r\n]|[.!?]\s)[^\w\r\n]{0,12}[A-Z][^.:;\r\n]{0,40}(?:[:\uff1a]|[-\u2013\u2014]\s)|[\r\n][ \t]*(?:#|\*\*|__)"
)
_VALUE_NAME = re.compile(r"(?:[:\uff1a]|group|type)\s*\Z", re.I)  # precedes a letter that is a value
# A line without the end of a sentence: above a line in small letters, and as a long line above a heading.
_WRAPPED = re.compile(r"[^\s.!?:;\u2026\u3002)\"'][ \t]*(?:\r\n|\r|\n)[ \t]*[a-z]")
_UNFINISHED_LINE = re.compile(r"[^\r\n]{39,}[^\s.!?:;\u2026\u3002)\"'][ \t]*(?:\r\n|\r|\n)\Z")


def _check_chain(text: str, chain: list[Heading], layout: _Layout) -> None:
    """Raise NoteError if the text around a heading leaves a doubt that it begins its section."""
    title = " ".join(text[: chain[0].start].split()).strip(" *#_:-=~")
    if not _TITLE.fullmatch(title):
        raise NoteError("there is text before the Subjective heading")
    if chain[-1].kind is Kind.PULSE and _PULSE_AND_VITALS.match(text, chain[-1].end):
        raise NoteError("the heading P may be a pulse")
    for previous, heading in itertools.pairwise(chain):
        if heading.kind is Kind.LONGER and _OTHER_LABEL.search(text, previous.end, heading.start):
            raise NoteError(f"no plain heading for {SECTION_NAMES[heading.section]}, and more than one that may be it")
    if not layout.lines:
        return
    if len({heading.indent for heading in chain if heading.start}) > 1:
        raise NoteError("the headings differ in indentation")
    is_wrapped = _WRAPPED.search(text)
    for heading in chain[1:]:
        if heading.is_bare and _VALUE_NAME.search(text, max(0, heading.start - 20), heading.start):
            raise NoteError(f"the heading {heading.section} may be a value, such as a blood group")
        if is_wrapped and _UNFINISHED_LINE.search(text, max(0, heading.start - 400), heading.start):
            raise NoteError(f"the heading {heading.section} may be part of a wrapped sentence")


def _check_others(found: list[Heading], chain: list[Heading], layout: _Layout) -> None:
    """Raise NoteError if a label outside the chain may begin a section."""
    here = chain[0]
    for heading in found:
        if heading in chain:
            here = heading
        elif heading.kind is Kind.OUTSIDE:
            raise NoteError(f"{heading.label.name.capitalize()} belongs to no section")
        elif heading.kind is Kind.PART and heading.label.name in FIRST_PARTS and here.section in "AP":
            raise NoteError(f"{_as_written(heading.label.name)} appears under {SECTION_NAMES[here.section]}")
        elif _begins_section(heading, here, layout):
            raise _repeated(here.section, heading.section)


def _begins_section(heading: Heading, here: Heading, layout: _Layout) -> bool:
    """Return whether a label in the section of `here` looks like one more heading, not like text."""
    if heading.kind is Kind.PULSE:
        return here.section in "AP"  # in S and O it is among vital signs
    if heading.kind not in SECTION_HEADINGS | {Kind.EXTENDED}:
        return False
    if heading.is_bare and heading.section in "AO" and not layout.fits(heading):
        return False  # a blood group
    if heading.section != here.section:
        return True
    return heading.kind in layout.kinds - {Kind.MAPPED} and here.kind is not Kind.MAPPED


def _repeated(here: str, section: str) -> NoteError:
    """Return the error for one more heading of `section` in the text of the section `here`."""
    return NoteError(
        "more headings follow the Plan" if here == "P" else f"more than one heading for {SECTION_NAMES[section]}"
    )


# Labels anywhere in a sentence, and lines that begin with S or O in any form: "s)", "Subjective ->".
_INSIDE = re.compile(
    r"(?<![^\W_])(?P<label>[A-Z]|Subjective|SUBJECTIVE|Objective|OBJECTIVE|Assessment|ASSESSMENT"
    r"|(?<=[.!?]\s)(?i:subjective|objective|plan))[*_)\]]{0,4}[^\S\r\n]?(?:[:\uff1a]|[-\u2013\u2014](?=\s))"
)
_LINE = re.compile(r"[\r\n][^\w\r\n]{0,12}(?i:([so])(?= ?[^\w\s]|\t)|(subj|obj)ective\b)")
_PAIRS = {("S", "O"), ("A", "P"), ("Subjective", "Objective"), ("Assessment", "Plan")}


def _check_inside(text: str, chain: list[Heading]) -> None:
    """Raise NoteError if labels inside sentences make one more note (S: before O:, A: before P:) or end a section."""
    for heading, end in zip(chain, _ends(text, chain), strict=True):
        letters, words, match = [], [], None
        for match in _INSIDE.finditer(text, heading.end, end):
            label = match["label"].capitalize()
            if label != "P" or not _PULSE.match(text, match.end()):
                (letters if len(label) == 1 else words).append(label)
        if match and match["label"][0].upper() in SECTIONS and not text[match.end() : end].strip("*_ \t\r\n"):
            raise NoteError(f"section {heading.section} ends with another heading")
        lines = [match[match.lastindex][0].upper() for match in _LINE.finditer(text, heading.end, end)]
        for labels in (letters, words, lines):
            for before, after in itertools.pairwise(labels):
                if (before, after) in _PAIRS:
                    raise _repeated(heading.section, before[0])


# --- the note --------------------------------------------------------------------------------------------------------


def read_soap(text: str, section_map: SectionMap | None = None) -> Note:
    """Read a note under four headings in the order S, O, A, P, each at a line's start or all on one line.

    Headings are letters, whole words or both ("S - Subjective:"), plain, bold, numbered, in brackets or Markdown, with
    a colon, a dash or a line of their own. `section_map` adds headings. Inside a line a heading must follow the end of
    a sentence. Raises NoteError where a section has no heading, more than one, or no text; where one heading covers
    two sections; and where there is text before S or outside the sections. Time is linear in the length.
    """
    found = find_headings(text, section_map or {})
    chain, layout = _choose(text, found)
    _check_chain(text, chain, layout)
    _check_others(found, chain, layout)
    _check_inside(text, chain)
    note = {}
    for heading, end in zip(chain, _ends(text, chain), strict=True):
        several = [other for other in found if heading.start < other.start < end and other.kind in SECTION_HEADINGS]
        keep = heading.kind is Kind.MAPPED and several  # mapped headings of one section stay text
        note[heading.section] = _clean(text[heading.start if keep else heading.end : end])
        if not note[heading.section]:
            raise NoteError(f"section {heading.section} is empty")
    return note


def _ends(text: str, chain: list[Heading]) -> list[int]:
    """Return where the section of each heading ends."""
    return [heading.start for heading in chain[1:]] + [len(text)]


_RULE = re.compile(r"(?:-{3,}|={3,}|\*{3,}|_{3,}|~{3,})?")


def _clean(text: str) -> str:
    """Return a section without white space, Markdown rules and one half of a bold mark at its ends."""
    lines = re.split(r"(?<=[\r\n])", text)
    for _ in range(2):  # drop blank lines and rules at the start; then, in reversed order, at the end
        lines = list(itertools.dropwhile(lambda line: _RULE.fullmatch(line.strip()), lines))[::-1]
    section = "".join(lines).strip()
    return section.removesuffix("**").strip() if section.count("**") % 2 else section
