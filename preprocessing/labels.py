"""Classify the label of a heading: "Treatment Plan" means the section P, "Influenza A" is no heading."""

import json
import re
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from common.errors import UserError
from prompts import SECTION_NAMES, SECTIONS


class Kind(Enum):
    """The kind of a label, with an example."""

    LETTER = auto()  # S
    WORD = auto()  # Subjective
    BOTH = auto()  # S (Subjective)
    LONGER = auto()  # Treatment Plan, Assessment / Problem List
    MAPPED = auto()  # a heading from --section_map
    COMBINED = auto()  # two sections: Assessment and Plan
    EXTENDED = auto()  # a section's name and more: Assessment 2, Plan for today, O (continued)
    MODIFIED = auto()  # a section's name in another role: Risk Assessment
    PART = auto()  # part of a section: HPI, Vitals
    OUTSIDE = auto()  # no section: Addendum
    OTHER_LETTER = auto()  # B, as in a list from A to E
    PULSE = auto()  # P: 88


# The kinds that name a section and nothing else; and all that can begin a section.
PLAIN = frozenset({Kind.LETTER, Kind.WORD, Kind.BOTH})
SECTION_HEADINGS = PLAIN | {Kind.LONGER, Kind.MAPPED}


@dataclass(frozen=True)
class Label:
    """A label that may be a heading."""

    kind: Kind
    section: str  # S, O, A or P; empty for OUTSIDE and OTHER_LETTER
    name: str  # in normal form; of a combined label, the two sections


# --- vocabulary ------------------------------------------------------------------------------------------------------

LONGER_LABELS = {
    "S": "subjective findings, subjective data, subjective information, subjective complaints, subjective history",
    "O": "objective findings, objective data, objective information, objective exam, objective examination",
    "A": "clinical assessment, medical assessment, overall assessment, diagnostic assessment, assessment summary",
    "P": "treatment plan, plan of care, plan of treatment, plan of action, care plan, management plan, clinical plan, "
    "therapeutic plan, medical plan",
}
# Parts stay text. With a section's name they form a longer label ("Assessment / Problem List").
PART_LABELS = {
    "S": "chief complaint, cc, reason for visit, presenting complaint, history of present illness, hpi, history, "
    "interval history, review of systems, ros, past medical history, pmh, past surgical history, psh, family history, "
    "social history, medications, current medications, allergies, symptoms",
    "O": "physical exam, physical examination, exam, examination, pe, vitals, vital signs, labs, lab results, "
    "laboratory results, results, imaging, mental status exam, mse",
    "A": "impression, impressions, clinical impression, diagnosis, diagnoses, dx, differential diagnosis, "
    "problem list, problems, medical decision making",
    "P": "recommendations, recommendation, treatment, follow-up, follow up, disposition, orders, management, "
    "interventions, next steps",
}
# Parts that begin a visit: below the Assessment they belong to a second note.
FIRST_PARTS = {
    *("chief complaint", "cc", "reason for visit", "presenting complaint", "history of present illness", "hpi"),
    *("history", "interval history", "review of systems", "ros", "physical exam", "physical examination"),
}
OUTSIDE_LABELS = {"addendum", "addenda", "late entry", "attestation", "signature", "signed"}
COMBINATIONS = {frozenset("SO"): "Subjective and Objective", frozenset("AP"): "Assessment and Plan"}

_WORDS = {word.lower(): section for section, word in SECTION_NAMES.items()}
_NAMES = _WORDS | {"assessments": "A", "plans": "P"}


def _vocabulary() -> dict[str, Label]:
    """Return all known labels by their words, each section's letter as a capital."""
    labels = {}
    for kind, phrases in ((Kind.LONGER, LONGER_LABELS), (Kind.PART, PART_LABELS)):
        for section, text in phrases.items():
            labels |= {phrase: Label(kind, section, phrase) for phrase in text.split(", ")}
    for word, section in _WORDS.items():
        labels[section] = Label(Kind.LETTER, section, section)
        labels[word] = Label(Kind.WORD, section, word)
        labels[f"{section} {word}"] = labels[f"{word} {section}"] = Label(Kind.BOTH, section, word)
    for pair, name in COMBINATIONS.items():
        labels[name.lower().replace(" and", "")] = Label(Kind.COMBINED, min(pair, key=SECTIONS.index), name)
    labels |= {phrase: Label(Kind.OUTSIDE, "", phrase) for phrase in OUTSIDE_LABELS}
    return labels


_VOCABULARY = _vocabulary()

# --- classification --------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[&/+,]")
_CONNECTORS = {"&", "/", "+", ",", "and"}


def normal_form(label: str) -> str:
    """Return the words of a label in small letters, each connector ("/", "&", "and") as "and"."""
    return " ".join(_words(label)).lower()


def classify(label: str, section_map: dict[str, str]) -> Label | None:
    """Return the kind, section and name of a label; None if it is no heading. Letters count only as capitals."""
    words = _words(label)
    name = " ".join(words).lower()
    if name in section_map:
        return Label(Kind.MAPPED, section_map[name], name)
    parts = " ".join(words).split(" and ")
    known = [_VOCABULARY[part] for part in parts if part in _VOCABULARY]
    if len(parts) == len(known) == 1:
        return known[0]
    if any(part.kind in SECTION_HEADINGS for part in known):
        sections = {part.section for part in known}
        if frozenset(sections) in COMBINATIONS:
            return Label(Kind.COMBINED, min(sections, key=SECTIONS.index), COMBINATIONS[frozenset(sections)])
        if len(parts) == len(known) and len(sections) == 1:
            return Label(Kind.LONGER, known[0].section, name)
    if len(label) == 1 and label.isupper():
        return Label(Kind.OTHER_LETTER, "", label)
    return _with_section_name(words)


def _words(label: str) -> list[str]:
    """Return the words of a label in small letters, but a section's letter as a capital."""
    words = []
    for token in _TOKEN.findall(label):
        word = token if token in SECTIONS else token.casefold()
        words.append("and" if word in _CONNECTORS else word)
    return words


def _with_section_name(words: list[str]) -> Label | None:
    """Return a label that has a section's name among other words; None without one."""
    if words[:1] and words[0] in SECTIONS and any(word.isdigit() or word.startswith("cont") for word in words[1:]):
        return Label(Kind.EXTENDED, words[0], words[0])
    names = [word for word in words if word in _NAMES]
    if not names:
        return None
    extended = names[0] == words[0] or words[-1] in ("subjective", "objective") or re.search(r"\d", " ".join(words))
    return Label(Kind.EXTENDED if extended else Kind.MODIFIED, _NAMES[names[0]], names[0])


# --- a clinic's own headings -----------------------------------------------------------------------------------------

SectionMap = dict[str, str]  # a label in normal form -> its section
MAX_MAPPED_LABEL = 60  # characters


def read_section_map(path: Path) -> SectionMap:
    """Read a JSON object of headings and their sections: {"Impression": "A", "Recommendations": "P"}.

    A section is a letter or a whole word. Several headings may have one section: if they are adjacent in a note, they
    form one section, of which they stay text. Raises UserError with the file and the heading.
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
        try:
            section = _mapped_section(heading, str(value).strip())
        except ValueError as error:
            raise UserError(f"{path}: {heading}: {error}") from None
        if normal_form(heading) in section_map:
            raise UserError(f"{path}: {heading}: named twice; remove one")
        section_map[normal_form(heading)] = section
    return section_map


def _mapped_section(heading: str, value: str) -> str:
    """Return the section that a map gives to a heading. Raises ValueError with the reason if it cannot have it."""
    sections = {letter.lower(): letter for letter in SECTIONS} | _WORDS
    if value.lower() not in sections:
        raise ValueError(f"the section is {value}; write S, O, A or P")
    section, label = sections[value.lower()], heading.strip().rstrip(":")
    if not normal_form(label) or len(label) > MAX_MAPPED_LABEL or re.search(r"[:\uff1a\r\n]", label):
        raise ValueError(f"not a heading; write one without a colon, of at most {MAX_MAPPED_LABEL} characters")
    known = classify(label, {})
    is_other_section = known and known.kind in SECTION_HEADINGS and known.section != section
    if known and (known.kind is Kind.COMBINED or is_other_section):
        raise ValueError("its section cannot be changed; remove it")
    return section
