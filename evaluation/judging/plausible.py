"""Make errors that fine-tuned models make: unjustified certainty, a wrong time or source, cause and effect reversed.

Each edit takes a section's text and returns the edited text, or None if the edit does not apply. The same text always
gives the same edit. The patterns are for English notes. Standard library only.
"""

import re
from functools import partial

from evaluation.judging import texts
from evaluation.judging.sentences import split_statements

# --- certainty -------------------------------------------------------------------------------------------------------

# A disease after at most five other words: "possible optic nerve glioma". "Possible surgery" is a plan.
_DISEASE = (
    r"(?=(?!(?:[\w'-]+ ){0,5}(?:consult|referr|evaluat|reevaluat|screen|adjust|surg|treat|therap|test|stud))"
    r"(?:[\w'-]+ ){0,5}?(?P<disease>(?!diagnosis|prognosis)\w*(?:itis|oma|osis|emia|pathy|plegia|sepsis|uria)|"
    r"infection|cancer|tumou?r|\w*disease|syndrome|fracture|\w*embol\w+|stroke|rupture|malignancy|failure|h(?:a?e)morrhage|"
    r"abscess|tear|hernia|disorder|injury|reaction|pneumonia|seizures?|accident|metasta\w+|obstruction|perforation|"
    r"stenosis|attack|migraine|tuberculosis|asthma|anaphylaxis)\b)"
)
_HEDGE = re.compile(
    r"\b(?:suspect\w*|presum\w*|possib\w*|probabl\w*|likely|may|might|could|suggest\w*|suspicious|concern\w*|consider\w*|"
    r"differential|consistent|indicat\w*|if|whether|rule|ruled|think|believe|potential\w*|looks?|seems?|appears?)\b|\?",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(r"confirm|histolog|biops|patholog|final diagnosis", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:no|not|never|none|without|denie[sd]|denying|neither|nor)\b", re.IGNORECASE)
_SURER = texts.compiled(
    [
        (rf"\b(?:an? )?(?:suspected|presumed|possible|probable) (?!(?:but|of|to|that|by)\b){_DISEASE}", "confirmed "),
        (rf"(?<!less )(?<!more )(?<!most ),? likely (due|secondary|related) to {_DISEASE}", r", proven to be \1 to "),
        (rf"\bdiagnosis is (?:most )?likely {_DISEASE}", "diagnosis is confirmed as "),
        (rf"\b(?:suggestive of|suspicious for|concerning for) {_DISEASE}", "diagnostic of "),
    ]
)
# Suspected diagnoses and pending results.
_SURER_WITHOUT_DISEASE = texts.compiled(
    [
        (
            r"\b(?:the )?differential diagnos[ie]s (?:(?:could|may|might) )?includes? (?!other|various|any|causes)"
            r"(?=[^.;]+(?:\.|$))(?![^.;]*\b(?:or|other|but|ruled|exclu\w+|less|unlikely|however|though|although|were|was)\b)",
            "confirmed additional diagnoses are ",
        ),
        (
            r"(?<=[a-z)]),? (?:(?:is|are) )?(?:still |currently )?pending(?=[.;]|$)",
            " came back normal",
        ),
    ]
)
_TEST = re.compile(
    r"test|result|stud|culture|biops|profile|patholog|sequenc|level|panel|scan|mri\b|\bct\b|count|lab|x-ray"
)


def raise_certainty(text: str, visit: str) -> str | None:
    """State as certain a diagnosis that is only suspected, or a test's result that is pending.

    A disease that another sentence of `visit`, the dialogue and the note, states without doubt is left out.
    """
    for pattern, new in _SURER:
        for match in pattern.finditer(text):
            named = texts.words(match.string[match.end() : match.end("disease")])
            if "diagnostic" in new and _CONFIRMED.search(text):  # a later sentence may give the result
                continue
            if named and not _is_negated(match) and not _is_stated(named, visit):
                return texts.replace(match, texts.expand(match, new))
    for pattern, new in _SURER_WITHOUT_DISEASE:
        for match in pattern.finditer(text):
            if "pending" not in match[0].lower() or _TEST.search(texts.sentence_before(match).lower()):
                return texts.replace(match, new)
    return None


def _is_negated(match: re.Match) -> bool:
    """Return whether a negation precedes the match in its sentence: a change might then keep the meaning."""
    return bool(_NEGATION.search(texts.sentence_before(match)))


def _is_stated(named: set[str], visit: str) -> bool:
    """Return whether a sentence of the visit has all these words and none that expresses doubt."""
    return any(
        named <= texts.words(sentence) and not _HEDGE.search(sentence)
        for line in visit.splitlines()
        for sentence in split_statements(line)
    )


# --- status and time -------------------------------------------------------------------------------------------------

_WHO = r"(?P<who>\b(?:patient|he|she|child|boy|girl|infant|man|woman))"
_NOT_ROUTINE = r"(?![^.;]*\b(?:follow|monitor|regular|ongoing|support))"
_STATUS = texts.compiled(
    [
        (rf"{_WHO} is (?:currently )?(on|taking|using|receiving)\b", r"\g<who> was formerly \2"),
        (r"\bcurrently (?=(?:on|taking|using|receiving|treated) )", "formerly "),
        (r"\bcurrent(?= (?:smoker|(?:medications?|treatments?|therapy) (?:is|are|includes?)\b))", "former"),
        (r"\bformer(?= smoker)", "current"),
        (rf"{_WHO} (smoke|drink)s\b", r"\g<who> used to \2"),
        (r"\bfor (?:the )?(?:past|last) ((?:\w+ ){1,2}(?:day|week|month|year)s)\b", r"until \1 ago"),
        (r"\b(symptoms?|pain|cough|fever|rash|which|that) (?:began|started) (?=(?:[\w-]+ ){1,4}ago\b)", r"\1 ended "),
        (r"\bresolved with\b", "persisted despite"),
        (r"\b(has|have) (?:completely |fully )?resolved\b", r"\1 persisted"),
        (
            rf"{_WHO} underwent (?:an? )?(?:successful )?(?!for\b|an?\b|successful\b)",
            r"\g<who> is scheduled to undergo ",
        ),
        (rf"{_WHO} (?:is|has been) (?:scheduled|planned|booked) for (?!.{{0,20}}follow)", r"\g<who> has already had "),
        (rf"{_WHO} is (?:scheduled|planned) to undergo\b", r"\g<who> has already undergone"),
        (rf"{_WHO} will undergo\b", r"\g<who> has already undergone"),
        (r"\bwill be (performed|conducted|done|administered|obtained|repeated|removed)\b", r"had already been \1"),
        (rf"\b(?:is|are) (?:scheduled|planned)(?=[.,;]| (?:to|on|at|for)\b){_NOT_ROUTINE}", "had been completed"),
        (rf"\bwas performed\b{_NOT_ROUTINE}", "is planned"),
        (rf"\bwere performed\b{_NOT_ROUTINE}", "are planned"),
        (r"\b(was|were) (?:discontinued|stopped)\b(?! (?:due|because|after|by|on|when|following)\b)", r"\1 continued"),
        (
            r"(?:^|(?<=[.] )|(?<=\n))(?:order|obtain|arrange|perform|schedule) "
            r"(?!follow|regular|routine|monthly|periodic|an? follow)([^.;:\n]+)(?=\.)",
            r"\1: already done",
        ),
        (r"(?:^|(?<=[.] ))refer (?:(?:the )?patient )?to (?![^.;]*\b(?:if|should|when|unless)\b)", "already seen by "),
    ]
)  # fmt: skip
_ROUTINE = re.compile(r"follow|monitor|regular|ongoing", re.IGNORECASE)


def change_status(text: str) -> str | None:
    """Change the first status: a plan to done, a past treatment or symptom to present, or the reverse."""
    found = [(match.start(), match, new) for pattern, new in _STATUS for match in pattern.finditer(text)]
    for _, match, new in sorted(found, key=lambda place: place[0]):
        is_routine = "had been completed" in new and _ROUTINE.search(texts.sentence_before(match))
        if not is_routine and not _is_negated(match):
            return texts.replace(match, texts.expand(match, new))
    return None


# --- source ----------------------------------------------------------------------------------------------------------

# (relative, other relative, words for the other one): used if the visit has none of these words.
_RELATIVES = [
    ("mother", "father", r"father|dad\w*|paternal"),
    ("father", "mother", r"mother|mom\w*|mum\w*|maternal"),
    ("brother", "sister", r"sister|sibling"),
    ("sister", "brother", r"brother|sibling"),
    ("son", "daughter", r"daughter|girl|child"),
    ("daughter", "son", r"sons?|boy|child"),
    ("wife", "sister", r"sister|sibling"),
    ("husband", "brother", r"brother|sibling"),
    ("aunt", "uncle", r"uncle"),
    ("uncle", "aunt", r"aunt"),
    ("grandmother", "grandfather", r"grand(?:father|pa|dad)\w*"),
    ("grandfather", "grandmother", r"grand(?:mother|ma|mom)\w*"),
]  # fmt: skip
_BIRTH = re.compile(
    r"\b(?:pregnan|deliver|birth|breast-?f|fetus|fetal|gestation|labor|maternal|neonat|newborn)", re.IGNORECASE
)
_PRONOUN = re.compile(r"\b(?:he|she|his|her|him|hers|himself|herself)\b", re.IGNORECASE)
# (examination, other one, words for the other one)
_EXAMINATIONS = [
    ("MRI", "CT", r"ct\w*|cat scan|computed|tomogr\w*"),
    ("CT", "MRI", r"mr[ai]\w*|magnetic"),
    ("computed tomography", "magnetic resonance imaging", r"mr[ai]\w*|magnetic"),
    ("magnetic resonance imaging", "computed tomography", r"ct\w*|cat scan|computed|tomogr\w*"),
    ("ultrasound", "MRI", r"mr[ai]\w*|magnetic"),
    ("ultrasonography", "MRI", r"mr[ai]\w*|magnetic"),
    ("X-ray", "ultrasound", r"ultraso\w*|sonogr\w*|doppler|duplex|echo\w*"),
    ("echocardiogram", "electrocardiogram", r"e[ck]gs?|electrocardio\w*|tracing|rhythm"),
    ("echocardiography", "electrocardiography", r"e[ck]gs?|electrocardio\w*|tracing|rhythm"),
    ("electrocardiogram", "echocardiogram", r"echo\w*|ultraso\w*"),
    ("ECG", "echocardiogram", r"echo\w*|ultraso\w*"),
    ("EKG", "echocardiogram", r"echo\w*|ultraso\w*"),
    ("EEG", "EMG", r"emgs?|electromyo\w*|nerve conduction"),
    ("colonoscopy", "gastroscopy", r"gastrosc\w*|egd|upper|endosc\w*|esophagogastro\w*|scopes?"),
    ("gastroscopy", "colonoscopy", r"colonosc\w*|sigmoido\w*|endosc\w*|scopes?"),
    ("bronchoscopy", "thoracoscopy", r"thoracosc\w*|vats|pleurosc\w*"),
    ("blood culture", "urine culture", r"urin\w*"),
    ("urine culture", "blood culture", r"blood"),
]  # fmt: skip


def change_source(text: str, visit: str) -> str | None:
    """Attribute a statement to another relative, to the patient in place of the family, or to another examination.

    The new relative or examination is not mentioned in `visit`, the dialogue and the note.
    """
    return _change_relative(text, visit) or _change_family_history(text) or _change_examination(text, visit)


def _change_relative(text: str, visit: str) -> str | None:
    for relative, other, words in _RELATIVES:
        # The empty group is in the place of an article, which fits the other relative, too.
        pattern = re.compile(rf"()(?<![\w-]){relative}(?=s?\b(?!-| cyst| cell| nucle))", re.IGNORECASE)
        uses = list(pattern.finditer(text))
        if (
            not uses
            or any(map(_is_negated, uses))
            or re.search(rf"\b(?:{words})\b", visit, re.IGNORECASE)
            or _BIRTH.search(text)
        ):
            continue
        if not any(_PRONOUN.search(texts.sentence_after(use)) for use in uses):
            return pattern.sub(partial(texts.with_article, new=other), text)
    return None


def _change_family_history(text: str) -> str | None:
    pattern = r"(?<!past or )(?<!past and )(?<!or )(?<!personal and )\bfamily history (?=of (?!similar|consang))"
    for match in re.finditer(pattern, text, re.IGNORECASE):
        if not re.search(
            r"\b(?:no|not|denie[sd]|without|personal|in (?:his|her|the))\b", texts.sentence_before(match), re.IGNORECASE
        ):
            return texts.replace(match, "personal history ")
    return None


def _change_examination(text: str, visit: str) -> str | None:
    found = []
    for name, other, words in _EXAMINATIONS:
        match = re.search(
            rf"(\ban? )?(?<![\w/-]){name}(?![\w/-]| (?:and|or|angiogr|enterogr|urogr|venogr|pulmonary))",
            text,
            re.IGNORECASE,
        )
        if match and not _is_negated(match) and not re.search(rf"\b(?:{words})\b", visit, re.IGNORECASE):
            found.append((match.start(), name, other))
    if not found:
        return None
    _, name, other = min(found)
    pattern = rf"(\ban? )?(?<![\w/-]){name}(?![\w/-])(?: \([A-Z][\w-]+\))?"
    return re.sub(pattern, partial(texts.with_article, new=other), text, flags=re.IGNORECASE)


# --- cause -----------------------------------------------------------------------------------------------------------

# Up to eight words without a verb or another relation.
_PHRASE = (
    r"(?!(?:and|or|with|likely|possibly|probably|was|were|is|are|has|had|which|that|but|in the context|due|secondary|"
    r"caused|resulting)\b)[\w'/-]+"
)
_PHRASE = rf"{_PHRASE}(?: {_PHRASE}){{0,7}}"
_CAUSE = re.compile(
    rf"(?P<lead>\bdiagnosis (?:is|was|of) |\bdiagnosed with |\bdiagnosis: |^{_DISEASE})(?P<effect>{_PHRASE})"
    rf"(?P<link> (?:due to|secondary to|caused by|resulting from) )(?P<cause>{_PHRASE})(?=[.,;]|$)",
    re.IGNORECASE | re.MULTILINE,
)


def reverse_cause(text: str) -> str | None:
    """Exchange cause and effect in a diagnosis: "anemia due to a duodenal ulcer"."""
    for match in _CAUSE.finditer(text):
        effect, cause = match["effect"], match["cause"]
        if not re.match(
            r"(?:the |his |her |this )?prognosis|age\b|(?:the|this|these|his|her|it)\b", effect, re.IGNORECASE
        ):
            if not match["lead"]:
                effect, cause = effect[0].lower() + effect[1:], texts.capital(cause)
            edited = f"{match['lead']}{cause}{match['link']}{effect}"
            return text[: match.start()] + edited + text[match.end() :]
    return None
