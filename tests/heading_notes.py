"""Generate notes whose correct reading is known by construction, and count how the reader reads them.

A case must be read (as exactly this note), must be rejected, or either. The generator shares no code with the reader.

    python tests/heading_notes.py --count 100000 --seed 1
"""

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KEYS = "SOAP"
WORDS = {"S": "Subjective", "O": "Objective", "A": "Assessment", "P": "Plan"}
Note = dict[str, str]


@dataclass
class Case:
    kind: str
    text: str
    note: Note | None  # None: must be rejected
    may_be_rejected: bool = False


@dataclass
class Style:
    """A style of headings; `heading("S")` returns the one for S."""

    name: str
    heading: Callable[[str], str]
    words: bool
    same_line: bool = True  # text may follow on the heading's line
    inline: bool = True  # all on one line is possible


@dataclass
class Block:
    section: str
    heading: str
    body: str
    join: str = " "


@dataclass
class Draft:
    """A note in blocks, which faults change before they are joined to a text."""

    style: Style
    blocks: list[Block]
    one_line: bool
    title: str = ""
    must_reject: bool = False
    may_reject: bool = False
    tail: str = ""
    kinds: list[str] = field(default_factory=list)


# --- styles ----------------------------------------------------------------------------------------------------------


def number(section: str) -> int:
    return KEYS.index(section) + 1


ROMAN = {"S": "I", "O": "II", "A": "III", "P": "IV"}
STYLES = [
    Style("letter colon", lambda s: f"{s}:", False),
    Style("letter space colon", lambda s: f"{s} :", False),
    Style("letter fullwidth colon", lambda s: f"{s}：", False),
    Style("letter dash", lambda s: f"{s} -", False),
    Style("letter en dash", lambda s: f"{s} –", False),
    Style("letter bold", lambda s: f"**{s}:**", False),
    Style("letter bold outside", lambda s: f"**{s}**:", False),
    Style("letter bold alone", lambda s: f"**{s}**", False, same_line=False, inline=False),
    Style("letter alone", lambda s: s, False, same_line=False, inline=False),
    Style("letter brackets", lambda s: f"({s})", False, inline=False),
    Style("letter brackets colon", lambda s: f"[{s}]:", False),
    Style("letter bullet", lambda s: f"- {s}:", False, inline=False),
    Style("letter bullet bold", lambda s: f"* **{s}:**", False, inline=False),
    Style("letter numbered", lambda s: f"{number(s)}. {s}:", False, inline=False),
    Style("letter Markdown", lambda s: f"## {s}", False, same_line=False, inline=False),
    Style("word colon", lambda s: f"{WORDS[s]}:", True),
    Style("word nbsp colon", lambda s: f"{WORDS[s]}\xa0:", True),
    Style("word fullwidth colon", lambda s: f"{WORDS[s]}：", True),
    Style("word capitals", lambda s: f"{WORDS[s].upper()}:", True),
    Style("word small", lambda s: f"{WORDS[s].lower()}:", True),
    Style("word dash", lambda s: f"{WORDS[s]} -", True),
    Style("word close dash", lambda s: f"{WORDS[s]}-", True),
    Style("word bold", lambda s: f"**{WORDS[s]}:**", True),
    Style("word bold outside", lambda s: f"**{WORDS[s]}**:", True),
    Style("word underlined", lambda s: f"__{WORDS[s]}:__", True),
    Style("word bold alone", lambda s: f"**{WORDS[s]}**", True, same_line=False, inline=False),
    Style("word alone", lambda s: WORDS[s], True, same_line=False, inline=False),
    Style("word capitals alone", lambda s: WORDS[s].upper(), True, same_line=False, inline=False),
    Style("word underline below", lambda s: f"{WORDS[s]}\n----------", True, same_line=False, inline=False),
    Style("word Markdown", lambda s: f"## {WORDS[s]}", True, same_line=False, inline=False),
    Style("word Markdown colon", lambda s: f"### {WORDS[s]}:", True, inline=False),
    Style("word Markdown bold", lambda s: f"### **{WORDS[s]}**", True, same_line=False, inline=False),
    Style("word Markdown numbered", lambda s: f"## {number(s)}. {WORDS[s]}", True, same_line=False, inline=False),
    Style("word Markdown closed", lambda s: f"## {WORDS[s]} ##", True, same_line=False, inline=False),
    Style("word numbered", lambda s: f"{number(s)}. {WORDS[s]}:", True, inline=False),
    Style("word numbered bracket", lambda s: f"{number(s)}) **{WORDS[s]}**", True, same_line=False, inline=False),
    Style("word Roman", lambda s: f"{ROMAN[s]}. {WORDS[s]}:", True, inline=False),
    Style("word bullet", lambda s: f"- {WORDS[s]}:", True, inline=False),
    Style("word dot", lambda s: f"• {WORDS[s]}:", True, inline=False),
    Style("word brackets", lambda s: f"[{WORDS[s]}]", True, inline=False),
    Style("word quoted", lambda s: f"> {WORDS[s]}:", True, inline=False),
    Style("word tilde", lambda s: f"~ {WORDS[s].upper()} ~", True, same_line=False, inline=False),
    Style("letter (word)", lambda s: f"{s} ({WORDS[s]}):", True),
    Style("letter (small word)", lambda s: f"{s} ({WORDS[s].lower()}):", True),
    Style("word (letter)", lambda s: f"{WORDS[s]} ({s}):", True),
    Style("bold word (letter)", lambda s: f"**{WORDS[s]} ({s}):**", True),
    Style("letter dash word", lambda s: f"{s} - {WORDS[s]}:", True),
    Style("letter en dash word", lambda s: f"{s} – {WORDS[s]}:", True),
    Style("letter dash word alone", lambda s: f"{s} - {WORDS[s]}", True, same_line=False, inline=False),
    Style("bold letter: word", lambda s: f"**{s}: {WORDS[s]}**", True, same_line=False, inline=False),
    Style("letter: word:", lambda s: f"{s}: {WORDS[s]}:", True),
    Style("letter: word alone", lambda s: f"{s}: {WORDS[s]}", True, same_line=False, inline=False),
    Style("Markdown letter - word", lambda s: f"## {s} - {WORDS[s]}", True, same_line=False, inline=False),
    Style("letter line, word line", lambda s: f"{s}:\n{WORDS[s]}:", True, inline=False),
    Style("Markdown word, then word", lambda s: f"## {WORDS[s]}\n**{WORDS[s]}:**", True, inline=False),
]

# Forms that people write but the reader need not know: the exact note or a rejection.
RARE_STYLES = [
    Style("letter full stop", lambda s: f"{s}.", False),
    Style("letter bracket", lambda s: f"{s})", False),
    Style("letter slash", lambda s: f"{s}/", False),
    Style("letter tab", lambda s: f"{s}\t", False, inline=False),
    Style("letter semicolon", lambda s: f"{s};", False),
    Style("letter equals", lambda s: f"{s} =", False),
    Style("letter hyphen", lambda s: f"{s}-", False),
    Style("letter small", lambda s: f"{s.lower()}:", False),
    Style("letter colon dash", lambda s: f"{s}:-", False),
    Style("letter section", lambda s: f"Section {s}:", False),
    Style("letter quoted", lambda s: f'"{s}":', False),
    Style("homoglyph", lambda s: {"S": "\u0405", "O": "\u041e", "A": "\u0410", "P": "\u0420"}[s] + ":", False),
    Style("fullwidth letter", lambda s: chr(ord(s) + 0xFEE0) + ":", False),
    Style("word full stop", lambda s: f"{WORDS[s]}.", True),
    Style("word abbreviated", lambda s: f"{WORDS[s][:4]}:", True),
    Style("word arrow", lambda s: f"{WORDS[s]} ->", True),
    Style("word em dash", lambda s: f"{WORDS[s]}—", True),
    Style("word equals signs", lambda s: f"=== {WORDS[s].upper()} ===", True, same_line=False, inline=False),
    Style("word stars", lambda s: f"*** {WORDS[s].upper()} ***", True, same_line=False, inline=False),
    Style("word angle brackets", lambda s: f"<{WORDS[s]}>", True),
    Style("word emoji", lambda s: f"\U0001fa7a {WORDS[s]}:", True, inline=False),
    Style("word emoji after", lambda s: f"{WORDS[s]} \U0001fa7a:", True, inline=False),
    Style("word section", lambda s: f"{WORDS[s]} Section:", True),
    Style("word notes", lambda s: f"{WORDS[s]} notes:", True),
    Style("word with comment", lambda s: f"{WORDS[s]} (as seen today):", True),
    Style("word italics", lambda s: f"*{WORDS[s]}:*", True),
    Style("word zero width", lambda s: f"\u200b{WORDS[s]}:", True, inline=False),
    Style("word slash letter", lambda s: f"{WORDS[s]}/{s}:", True),
    Style("word list marks", lambda s: f"{s}. {WORDS[s]}:", True),
    Style("word and time", lambda s: f"{WORDS[s]} 10:30:", True),
    Style("time and word", lambda s: f"10:30 {WORDS[s]}:", True),
    Style("levels", lambda s: f"{'#' * number(s)} {WORDS[s]}", True, same_line=False, inline=False),
    Style("indented by section", lambda s: f"{' ' * number(s)}{WORDS[s]}:", True, inline=False),
]

# Only the eye sees a heading in these.
UNREADABLE = {"homoglyph", "fullwidth letter", "time and word", "word abbreviated", "letter section"}

# --- bodies ----------------------------------------------------------------------------------------------------------

SENTENCES = {
    "S": [
        "Cough for 3 days, worse at night.",
        "Denies fever, chills and chest pain.",
        'She says it is "like a knife".',
        "Mother had breast cancer at 48 (see letter).",
        "Takes metformin 500 mg b.i.d. and vitamin D.",
        "Would like a plan for her return to work.",
        "Her objective is to walk 5 km.",
        "Pain 7/10!",
        "Is it contagious?",
    ],
    "O": [
        "BP: 120/80, P: 88, T: 37.1, SpO2: 97%.",
        "Chest CTA: clear.",
        "Hepatitis A: negative, hepatitis B: negative.",
        "Influenza A: confirmed by swab.",
        "Risk assessment: low.",
        "PO: 2 L, HPA: normal, S1 and S2 normal.",
        "Alert, A&O x3, no distress.",
        "Gait assessment - steady.",
        "Blood group O: positive.",
        "Mild erythema of the left ear; group A: strep positive.",
        "ECG: P-waves normal, QRS 90 ms.",
        "Vit. A: low.",
        "Type A: none.",
        "The nurse's pain assessment: 3 of 10.",
        "Nutrition assessment: at risk.",
    ],
    "A": [
        "Acute bronchitis, no pneumonia.",
        "Type 2 diabetes, HbA1c 8.1%.",
        "Influenza A: improving.",
        "Differential: asthma, COPD.",
        "Hepatitis A: excluded.",
        "On plan: yes.",
        "Not at goal under the current plan - adherence is poor.",
        "Objective signs: none.",
        "Major depression, suicide risk assessment: low.",
        "Protein S: deficient.",
    ],
    "P": [
        "Rest and fluids.",
        "Return in 7 days.",
        "Amoxicillin 500 mg t.i.d. for 7 days.",
        "Continue the safety plan: call 111 in a crisis.",
        "Hepatitis A: vaccinate.",
        "We agreed on a follow-up plan: visit in 2 weeks.",
        "Repeat suicide risk assessment: weekly.",
        "Vitamin A: stop.",
        "Objective: walk 5 km a day.",
        "Take **aspirin** 81 mg.",
    ],
}
SENTENCES["P"].remove("Objective: walk 5 km a day.")  # a heading, not a look-alike
SENTENCES["A"].remove("Objective signs: none.")
# Lines that begin like headings of parts and belong to the section.
PARTS = {
    "S": ["CC: cough", "HPI: 3 days of cough.", "Chief complaint: knee pain.", "PMH: asthma", "ROS: no fever.",
          "Medications: metformin 500 mg", "Allergies: none", "Social history: smokes.", "Current medications:",
          "**Past Medical History:** asthma", "### History of Present Illness", "- Family history: gout"],
    "O": ["Vitals: BP 120/80", "Vitals:\nT: 37\nP: 88\nR: 16", "Physical exam: chest clear.", "Labs: CRP 5", "Results:",
          "Impression: no pneumonia on the film.", "Risk assessment: low.", "Safety Assessment: no concerns.",
          "Blood group:\nA\nRh positive.", "**Physical Exam:**", "- Lungs: clear", "HEENT: normal", "P: 72 regular"],
    "A": ["1. Influenza A: confirmed.", "1. Hypertension\n2. Diabetes", "Impression: bronchitis.", "Diagnosis: flu.",
          "Differential diagnosis: asthma.", "Problem list:\n- asthma", "#1 Gout", "Prognosis: good."],
    "P": ["1. Rest.\n2. Fluids.", "- Rest\n- Fluids", "Treatment plan: rest.", "Follow-up plan: 2 weeks.",
          "Follow-up: 2 weeks.",
          "Medications: aspirin 81 mg.", "Recommendations: rest.", "Labs: CBC in 1 week.", "Plan for the knee: ice.",
          "Disposition: home.", "Patient education: hand washing.", "Safety plan: call 111."],
}  # fmt: skip


INLINE_PARTS = {
    "S": ["HPI: 3 days of cough.", "Medications: metformin 500 mg.", "Allergies: none.", "PMH: asthma."],
    "O": ["Vitals: BP 120/80, HR 88.", "Physical exam: chest clear.", "Labs: CRP 5.", "Impression: no pneumonia.",
          "Risk assessment: low.", "P: 88, R: 16.", "HEENT: normal."],
    "A": ["Diagnosis: flu.", "Differential diagnosis: asthma.", "Impression: bronchitis.", "1. Gout. 2. Asthma."],
    "P": ["1. Rest. 2. Fluids.", "Follow-up: 2 weeks.", "Treatment plan: rest.", "Labs: CBC in 1 week."],
}  # fmt: skip


def body(rng: random.Random, section: str, one_line: bool) -> str:
    """Return one to five sentences on one or more lines, with headings of parts among them."""
    pieces = rng.sample(SENTENCES[section], rng.randint(1, 3))
    if one_line:
        return " ".join(pieces + rng.sample(INLINE_PARTS[section], rng.choice((0, 0, 1, 2))))
    lines = [" ".join(pieces)] if rng.random() < 0.7 else pieces
    for part in rng.sample(PARTS[section], rng.choice((0, 0, 1, 2))):
        lines.insert(rng.randint(1, len(lines)), part)
    return rng.choice(("\n", "\n", "\n\n")).join(lines)


# --- faults ----------------------------------------------------------------------------------------------------------


def blocks(rng: random.Random, style: Style, one_line: bool, sections: str = KEYS) -> list[Block]:
    join = " " if one_line else rng.choice(("\n", "\n\n") if not style.same_line else (" ", "\n", "  "))
    return [Block(section, style.heading(section), body(rng, section, one_line), join) for section in sections]


def well_formed(rng: random.Random, draft: Draft) -> None:
    draft.title = rng.choice(("", "", "", "SOAP Note", "**SOAP Note**", "# SOAP Note", "Progress note:", "SOAP NOTE:"))


def missing(rng: random.Random, draft: Draft) -> None:
    """Remove a section, or only its heading."""
    block = rng.choice(draft.blocks)
    if rng.random() < 0.5:
        draft.blocks.remove(block)
    else:
        block.heading = ""
    for other in draft.blocks:  # any other of these may be the heading itself
        other.body = other.body.replace("Treatment plan", "Exercises")
    draft.must_reject = True


def other_visit(rng: random.Random, draft: Draft) -> None:
    """Add another visit, or the end of one, in the same style or another."""
    style = draft.style if rng.random() < 0.6 else rng.choice([s for s in STYLES if s.inline or not draft.one_line])
    if rng.random() < 0.1 and not draft.one_line:
        style = rng.choice([style for style in RARE_STYLES if style.name not in UNREADABLE])
    if draft.one_line and style.words != draft.style.words:
        style = draft.style
    sections = rng.choice(("SOAP", "SOAP", "AP") if style is draft.style else ("SOAP",))
    draft.blocks += blocks(rng, style, draft.one_line, sections)
    if rng.random() < 0.3 and not draft.one_line:
        draft.blocks[3].body += rng.choice(("\n\nFollow-up visit, 3 May", "\n---", "\nVisit 2:"))
    draft.must_reject = True


def visit_on_one_line(rng: random.Random, draft: Draft) -> None:
    """Add a second visit on one line below the first."""
    style = rng.choice([style for style in STYLES if style.inline])
    visit = " ".join(f"{block.heading} {block.body}" for block in blocks(rng, style, True))
    draft.blocks[3].body += rng.choice((" ", "\n")) + visit
    draft.must_reject = True


def repeated(rng: random.Random, draft: Draft) -> None:
    """Repeat a heading, so that its section begins twice or continues further down."""
    block = rng.choice(draft.blocks)
    again = Block(block.section, block.heading, body(rng, block.section, draft.one_line), block.join)
    draft.blocks.insert(rng.randint(0, 4), again)
    draft.must_reject = True


def wrong_sequence(rng: random.Random, draft: Draft) -> None:
    """Draw sections that are missing, repeated or out of order, in any combination."""
    sections = KEYS
    while sections == KEYS:
        sections = "".join(rng.choices(KEYS, k=rng.randint(2, 9)))
    draft.blocks = blocks(rng, draft.style, draft.one_line, sections)
    for block in draft.blocks:
        block.body = block.body.replace("Treatment plan", "Exercises")
    draft.must_reject = True


def rare_style(rng: random.Random, draft: Draft) -> None:
    style = rng.choice([style for style in RARE_STYLES if style.inline or not draft.one_line])
    draft.blocks = blocks(rng, style, draft.one_line)
    draft.may_reject = True


def rare_style_once(rng: random.Random, draft: Draft) -> None:
    style = rng.choice([style for style in RARE_STYLES if style.inline or not draft.one_line])
    block = rng.choice(draft.blocks)
    block.heading, block.join = style.heading(block.section), block.join if style.same_line else "\n"
    for other in draft.blocks:
        other.body = other.body.replace("Treatment plan", "Exercises")
    draft.may_reject = True


def questions(rng: random.Random, draft: Draft) -> None:
    """Add a question and an answer, and sometimes remove the assessment."""
    draft.blocks[rng.randint(0, 1)].body += (
        rng.choice((" ", "\n")[: 1 if draft.one_line else 2]) + "Q: Any pain? A: No."
    )
    draft.may_reject = True
    if rng.random() < 0.5:
        del draft.blocks[2]
        draft.must_reject = True


def wrapped_missing(rng: random.Random, draft: Draft) -> None:
    """Remove a section, and put its letter at a line's start by a wrapped sentence."""
    sentence = {
        "A": "He had fevers at home for 3 days, and the swab was positive for influenza\nA: this was confirmed later\n"
        "by the laboratory.",
        "P": "The echo shows a small effusion, and the waves that cardiologists have named\nP: these are of the usual\n"
        "height and width.",
    }
    section = rng.choice("AP")
    draft.blocks = [block for block in draft.blocks if block.section != section]
    for block in draft.blocks:
        block.body = block.body.replace("Treatment plan", "Exercises")
    draft.blocks[KEYS.index(section) - 1].body += "\n" + sentence[section]
    draft.must_reject = True


def out_of_order(rng: random.Random, draft: Draft) -> None:
    order = draft.blocks[:]
    while draft.blocks == order:
        rng.shuffle(draft.blocks)
    draft.must_reject = True


def in_place_of(rng: random.Random, draft: Draft, section: str, names: list[str]) -> None:
    block = next(block for block in draft.blocks if block.section == section)
    name = rng.choice(names)
    plain = draft.style.heading(section)
    if (
        draft.style.words
        and WORDS[section] in plain
        and plain.count(WORDS[section]) == 1
        and not re.search(r"\b[SOAP]\b", plain)
    ):
        block.heading = plain.replace(WORDS[section], name)
    else:
        block.heading = f"{name}:"


def synonym(rng: random.Random, draft: Draft) -> None:
    """Replace a heading with a synonym that is not one of the four."""
    names = {
        "S": ["HPI", "History of Present Illness", "History", "Chief Complaint", "Interval history"],
        "O": ["Physical Exam", "Exam", "Vitals", "Physical Examination", "Findings"],
        "A": ["Impression", "Diagnosis", "Assesment", "Dx", "Impressions", "Evaluation", "Clinical Impression"],
        "P": ["Recommendations", "Treatment", "Disposition", "Next steps", "Plans", "Rx"],
    }
    section = rng.choice(KEYS)
    in_place_of(rng, draft, section, names[section])
    draft.must_reject = True


def longer(rng: random.Random, draft: Draft) -> None:
    """Replace a heading with a longer one: all of it is the heading, or the note is rejected."""
    names = {
        "S": ["Subjective Findings", "Subjective / HPI", "Subjective complaints", "Patient's Subjective Report"],
        "O": ["Objective Findings", "Objective Data", "Objective / Physical Exam", "Objective & Vitals"],
        "A": ["Clinical Assessment", "Assessment / Problem List", "Assessment & Diagnosis", "Overall Assessment",
              "Assessment of the problems", "Nursing Assessment"],
        "P": ["Treatment Plan", "Plan of Care", "Management Plan", "Plan / Recommendations", "Care Plan",
              "Plan for today", "Discharge Plan", "Follow-up Plan", "Plan & Orders"],
    }  # fmt: skip
    section = rng.choice(KEYS)
    in_place_of(rng, draft, section, names[section])
    draft.may_reject = True


def longer_before(rng: random.Random, draft: Draft) -> None:
    """Put a longer heading without text right before the section's own."""
    block = rng.choice(draft.blocks[1:])
    name = {"O": "Objective / Exam", "A": "Assessment / Problem List", "P": "Treatment Plan"}[block.section]
    if block.section == "A" and rng.random() < 0.5:
        name = rng.choice(("Assessment and Plan", "A/P", "A&P"))
    block.heading = f"{name}:\n\n{block.heading}"
    draft.may_reject = True


def combined(rng: random.Random, draft: Draft) -> None:
    """Combine two sections under one heading; a look-alike in the text may seem to be the missing heading."""
    first, names = rng.choice(
        (
            ("A", ["A/P", "A&P", "Assessment and Plan", "Assessment/Plan", "Assessment & Plan", "A / P", "A + P",
                   "Assessment, Plan", "Impression and Plan", "Assessment and Treatment Plan"]),
            ("S", ["S/O", "Subjective and Objective", "Subjective/Objective"]),
        )
    )  # fmt: skip
    in_place_of(rng, draft, first, names)
    position = KEYS.index(first)
    if rng.random() < 0.7:
        del draft.blocks[position + 1]
    draft.must_reject = True


def addendum(rng: random.Random, draft: Draft) -> None:
    """Add text below the plan that belongs to no section."""
    name = rng.choice(
        ("Addendum:", "Signature:", "Electronically signed by", "Late entry:", "ADDENDUM:", "**Addendum:**")
    )
    draft.tail = f"\n{rng.choice(('', chr(10)))}{name} Dr. Jones, 3 May."
    draft.must_reject = True


def second_history(rng: random.Random, draft: Draft) -> None:
    """Add the parts of another visit below the plan."""
    draft.tail = "\nHPI: Knee pain after a fall.\nPhysical exam: Swollen.\nImpression: Sprain.\nRecommendations: Ice."
    draft.must_reject = True


def problem_by_problem(rng: random.Random, draft: Draft) -> None:
    """Write an assessment and a plan for each problem."""
    form = rng.choice(
        (
            "{a} 1: HTN.\n{p} 1: lisinopril.\n{a} 2: gout.\n{p} 2: colchicine.",
            "1. HTN\n  {a}: not at goal.\n  {p}: lisinopril.\n2. Gout\n  {a}: new.\n  {p}: colchicine.",
            "Problem: HTN\n- {a}: not at goal.\n- {p}: lisinopril.\nProblem: gout\n- {a}: new.\n- {p}: ice.",
            "#HTN {a}: not at goal. {p}: lisinopril.\n#Gout {a}: new. {p}: colchicine.",
        )
    )
    text = form.format(**({"a": "Assessment", "p": "Plan"} if draft.style.words else {"a": "A", "p": "P"}))
    if rng.random() < 0.5 or draft.one_line:
        draft.blocks[2:] = [Block("A", "", text)]
    else:
        draft.blocks[3].body = text
    draft.must_reject = True


def prose_before(rng: random.Random, draft: Draft) -> None:
    draft.title = rng.choice(("The patient came in today.", "Name: Jane Roe\nAge: 44", "Visit of 3 May, Dr. Jones"))
    draft.must_reject = True


def empty(rng: random.Random, draft: Draft) -> None:
    block = rng.choice(draft.blocks)
    block.body = ""
    draft.must_reject = True


def two_styles(rng: random.Random, draft: Draft) -> None:
    """Write headings in two styles."""
    other = rng.choice([style for style in STYLES if style.inline or not draft.one_line])
    for block in rng.sample(draft.blocks, rng.randint(1, 3)):
        block.heading = other.heading(block.section)
        block.join = "\n" if not other.same_line else block.join
    draft.may_reject = True


def listed_letters(rng: random.Random, draft: Draft) -> None:
    """Add a list of letters at line starts: airway to exposure, onset to time, allergies to events."""
    block = rng.choice(draft.blocks)
    block.body += rng.choice(
        (
            "\nA: patent\nB: clear\nC: warm\nD: alert\nE: normal",
            "\nO: 3 days ago\nP: worse lying\nQ: dull\nR: none\nS: 7/10\nT: constant",
            "\nS: pain\nA: penicillin\nM: none\nP: asthma\nL: 8 am\nE: fell",
            "\nA: surgery, or\nB: waiting",
        )
    )
    draft.may_reject = True
    if rng.random() < 0.5 and block.section != "A":  # the list must not replace the heading that is missing
        draft.blocks = [other for other in draft.blocks if other.section != "A"]
        draft.must_reject = True


def wrapped(rng: random.Random, draft: Draft) -> None:
    """Wrap the sentences at a width, so that a look-alike may begin a line."""
    for block in draft.blocks:
        words = (" ".join(rng.choices(SENTENCES[block.section], k=4))).split(" ")
        lines, line = [], draft.style.heading(block.section) if block.join == " " else ""
        room = rng.randint(50, 60)
        for word in words:
            if len(line) + 1 + len(word) > room:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip() if line else word
        lines.append(line)
        block.body = "\n".join(lines).removeprefix(draft.style.heading(block.section)).lstrip(" ")
    draft.may_reject = True


def unfinished(rng: random.Random, draft: Draft) -> None:
    """Write terse text without the ends of sentences."""
    for block in draft.blocks:
        block.body = rng.choice(
            {
                "S": ("cough x3d", "sad, no sleep", "knee pain since May"),
                "O": (
                    "chest clear",
                    "influenza A: positive",
                    "group A: strep",
                    "HR 88, BP 120/80",
                    "risk assessment: low",
                ),
                "A": ("bronchitis", "flu", "hepatitis A: new"),
                "P": ("rest", "hepatitis A: vaccinate", "fluids, safety plan: done"),
            }[block.section]
        )
    draft.may_reject = draft.one_line


def unfinished_missing(rng: random.Random, draft: Draft) -> None:
    unfinished(rng, draft)
    missing(rng, draft)


def capital_look_alikes(rng: random.Random, draft: Draft) -> None:
    """Add capitalized look-alikes inside sentences."""
    extra = [
        "No Suicide Risk Assessment: done.",
        "See the Asthma Action Plan: green zone.",
        "Per Dr. Cole's Plan: none yet.",
    ]
    for block in draft.blocks:
        block.body = f"{block.body} {rng.choice(extra)}" if "\n" not in block.body else block.body
    if rng.random() < 0.5:
        missing(rng, draft)


def first_part_only(rng: random.Random, draft: Draft) -> None:
    """Write two headings on each line."""
    for block in draft.blocks[1::2]:
        block.heading = f"\0{block.heading}"  # no line break before it
    draft.may_reject = True


def table(rng: random.Random, draft: Draft) -> None:
    for block in draft.blocks:
        block.body = block.body.replace("\n", " ")
        block.heading, block.join = f"| {WORDS[block.section]} |", " "
    draft.may_reject = True


def html(rng: random.Random, draft: Draft) -> None:
    for block in draft.blocks:
        block.heading, block.join = f"<b>{WORDS[block.section]}:</b>", " "
    draft.may_reject = True


def wrong_double(rng: random.Random, draft: Draft) -> None:
    """Write a letter with the word of another section."""
    one, two = rng.sample(range(4), 2)
    draft.blocks[one].heading = f"{KEYS[one]} ({WORDS[KEYS[two]]}):"
    draft.must_reject = True


def continued(rng: random.Random, draft: Draft) -> None:
    """Continue a section below the plan."""
    section = rng.choice("SOA")
    word = WORDS[section] if draft.style.words else section
    heading = rng.choice((f"{word} (continued):", f"{word} (cont'd):", f"{WORDS[section]} continued:"))
    draft.tail = f"\n{heading} {rng.choice(SENTENCES[section])}"
    draft.must_reject = True


KINDS: dict[Callable[[random.Random, Draft], None], tuple[int, bool]] = {  # weight, and whether for one line, too
    well_formed: (40, True),
    missing: (10, True),
    other_visit: (10, True),
    visit_on_one_line: (4, False),
    repeated: (8, True),
    out_of_order: (4, True),
    wrong_sequence: (8, True),
    rare_style: (8, True),
    rare_style_once: (5, True),
    questions: (3, True),
    wrapped_missing: (3, False),
    synonym: (6, True),
    longer: (8, True),
    longer_before: (4, False),
    combined: (8, True),
    addendum: (4, False),
    second_history: (2, False),
    problem_by_problem: (4, False),
    prose_before: (3, True),
    empty: (3, True),
    two_styles: (5, True),
    listed_letters: (5, False),
    wrapped: (5, False),
    unfinished: (5, True),
    unfinished_missing: (5, True),
    capital_look_alikes: (5, True),
    first_part_only: (3, False),
    table: (1, False),
    html: (1, False),
    wrong_double: (2, False),
    continued: (3, False),
}

# --- texts -----------------------------------------------------------------------------------------------------------


def make_case(rng: random.Random) -> Case:
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    style = rng.choice(STYLES)
    one_line = style.inline and KINDS[kind][1] and rng.random() < 0.35
    draft = Draft(style, blocks(rng, style, one_line), one_line)
    kind(rng, draft)
    gap = " " if one_line else rng.choice(("\n", "\n", "\n\n", "\n \n", "\n\n---\n\n" if style.words else "\n"))
    indent = rng.choice(("", "", "", "  ", "\t")) if not one_line else ""
    text = f"{draft.title}{' ' if one_line else gap}" if draft.title else ""
    for number_, block in enumerate(draft.blocks):
        before = "" if number_ == 0 else " " if block.heading.startswith("\0") else gap
        text += before + block.heading.strip("\0") + (block.join if block.heading else "") + block.body
    text += draft.tail
    note = {block.section: block.body for block in draft.blocks if block.section}
    change = changes(rng, indent)
    name = f"{kind.__name__}, {style.name}{', one line' if one_line else ''}"
    if draft.must_reject:
        return Case(name, change(text).strip(), None)
    value = style.name == "letter alone" and re.search(r":\s*\n\s*[SOAP]\n", text)  # "Blood group:", and its value
    may_reject = draft.may_reject or bool(value)
    return Case(name, change(text).strip(), {key: change(note[key]).strip() for key in KEYS}, may_reject)


def changes(rng: random.Random, indent: str) -> Callable[[str], str]:
    """Return a change of a whole text as exports make it: line breaks, indentation, spaces at the ends of lines."""
    line_break = rng.choice(("\n", "\n", "\n", "\r\n", "\r"))
    end = rng.choice(("", "", "", " ", "  "))

    def change(text: str) -> str:
        return text.replace("\n", end + line_break + indent)

    return change


def fault(case: Case, read: Callable[[str], Note]) -> str:
    """Return how `read` fails on a case: "misread", "rejected" with the reason, or an empty string."""
    try:
        note = read(case.text)
    except ValueError as error:
        return "" if case.note is None or case.may_be_rejected else f"rejected: {error}"
    return "" if note == case.note else "misread"


def difference(case: Case, read: Callable[[str], Note]) -> str:
    try:
        note = read(case.text)
    except ValueError:
        return f"right: {case.note}"
    if case.note is None:
        return f"right: rejected; read: {note}"
    return "\n".join(
        f"{key} right: {case.note[key]!r}\n{key} read:  {note[key]!r}" for key in KEYS if note[key] != case.note[key]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="notes to generate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the generator (default: %(default)s)")
    parser.add_argument("--show", type=int, default=5, help="failures to print (default: %(default)s)")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from preprocessing.headings import read_soap

    rng = random.Random(options.seed)
    faults: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for _ in range(options.count):
        case = make_case(rng)
        kinds[
            "must be read" if case.note and not case.may_be_rejected else "either" if case.note else "must be rejected"
        ] += 1
        if problem := fault(case, read_soap):
            if len(faults) < options.show and f"{case.kind.split(',')[0]}: {problem}" not in faults:
                print(f"{case.kind}: {problem}\n{case.text!r}\n{difference(case, read_soap)}\n")
            faults[f"{case.kind.split(',')[0]}: {problem}"] += 1
    print(*(f"{count:8,} {kind}" for kind, count in kinds.items()), sep="\n")
    print(*(f"{count:8,} {problem}" for problem, count in faults.most_common()), sep="\n")
    return min(1, len(faults))


if __name__ == "__main__":
    sys.exit(main())
