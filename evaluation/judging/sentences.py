"""Split clinical text into statements: sentences, list items and lines. Standard library only."""

import re

# A gap is a line break, a bullet within a line, or white space between a sentence's end and the next one's start. After
# "pH 7.4." or a word, the white space may be missing.
_GAP = re.compile(
    r"(?P<lines>[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*|(?<=\s)(?=[•▪◦‣]\s))"
    r"|(?<=[.!?…])[\"'”’)\]*]*(?P<space>[ \t\xa0\u202f]+)(?=[\"'“‘(\[*]*(?:[A-Z0-9À-ÖØ-Þ]|[a-z]{1,3}[A-Z]))"
    r"|(?:(?<=[a-z]{3}[.!?])|(?<=[\d%)][.!?])(?<!^\d[.])(?<!\s\d[.])(?<!\d\d[.]))(?P<none>)(?=[A-Z][a-z]*[ ,])"
)
_FIRST_DASH = re.compile(r"(?:^|(?<=[.:;!?])\s)\s*([-*–—])\s+(?=[A-Z0-9])")
_NEVER_LAST = re.compile(
    r"(?<![\w/])(?:M[rst]|Mrs|Drs?|Prof|Rev|Sgt|Capt|Lt|Col|Gen|St|Mt|Pts?|[Vv]it|vs|[Ee]\.g|[Ii]\.e|[Vv]iz|[Cc]f|[Cc]a|"
    r"[Aa]pprox|[Ff]igs?|[Ii]ncl|[Ee]sp|[Rr]esp|[Tt]emp|wt|ht|[Dd]ept|ref)\.$"
)
_STREET = re.compile(r"\b[A-Z0-9]\w* St\.$")
# "5 mg p.o. BID" and "p.o. 5 mg" continue; "5 mg p.o. Return in a week" does not.
_MAY_BE_LAST = re.compile(
    r"(?<![\w/])(?:(?:[a-z]\.){2,}|(?:po|bid|tid|qid|prn|qd|qhs|iv|im|sc|max|min|hrs?|wks?|mos?|yrs?|m[gl]|mcg|tabs?|caps?)\.)$"
)
_DOSING = re.compile(r"\d|(?:P\.?O|B\.?I\.?D|T\.?I\.?D|Q\.?I\.?D|P\.?R\.?N|QD|QHS|Q\d|HS|IV|IM|SC|SQ|STAT|OD)\b")
_BEFORE_A_NUMBER = re.compile(
    r"(?<!\w)(?:[Nn]os?|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|[Vv]ol|pp?|[Ss]ec|Rm|Apt|Ste|[Ee]xt|Tel|al)\.$"
)
# "J. Smith", "Mr. K. Jones" and "John F. Smith", but not "Hepatitis C." or "hospital A."
_NAME = re.compile(r"[A-Z](?:[a-z]|\.)")
_NO_NAME = re.compile(
    r"(?:A|An|The|This|That|These|Those|There|It|Its|I|He|She|They|We|His|Her|Their|Patient|Pt|No|Not|Denies|Denied|"
    r"Reports|Reported|Has|Had|Is|Was|Will|Lives|Works|Smokes|Drinks|Takes|Also|After|At|Before|During|For|From|If|In|On|"
    r"Since|To|Under|When|With|Without|Mother|Father|Mom|Dad|Wife|Husband|Physical|Blood|Continue|Start|Stop|Follow|"
    r"Return|Refer|Repeat|Monitor|Then)\b"
)
_INITIAL = re.compile(
    r"(?:^|[\"'“‘(\[\n]|\b(?!Hepatitis|Vitamin|Type|Class|Stage|Grade|Group)[A-Z][a-z]*\.? )(?:[A-Z]\. ?){1,3}$"
)
_ITEM_NUMBER = re.compile(r"(?<![\w.,/-])\(?(\d{1,2})[.)]\s*(?=[\"'“‘(\[*]*[A-Z])")
_ONLY_ITEM_NUMBER = re.compile(r"\s*[(*#]*\d{1,2}[.)]\**$")
_MARGIN = re.compile(r"(?:\s|[-*•–—·▪◦‣>]+\s)*")  # before a statement: white space and bullets
_HEADING = re.compile(r":[\s*_]*$|^#+\s[^\n]*$")


def split_statements(text: str) -> list[str]:
    """Return the statements of `text` in order, each an exact, stripped substring with a letter or a digit.

    A statement is a sentence or a line. A list item keeps its number but not its bullet. Findings separated by
    semicolons are one statement. A heading on its own line ("Vitals:") is joined to the statement that follows it.
    Abbreviations ("Mr.", "vs.", "Jan. 5", "p.o. BID"), initials and decimals do not end a statement.
    """
    return [text[start:end] for start, end in statement_spans(text)]


def statement_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each statement of `text`, in characters."""
    spans, start, last, length = [], 0, 0, len(text.rstrip())
    for end in [*_boundaries(text), len(text)]:
        if end < length and _HEADING.search(text[last:end].strip()):
            last = end
            continue
        piece = text[start:end]
        first = start + _MARGIN.match(piece).end()
        if any(map(str.isalnum, piece)):
            spans.append((first, start + len(piece.rstrip())))
        start = last = end
    return spans


def _boundaries(text: str) -> list[int]:
    """Return where a statement may start, in increasing order, without the start of the text."""
    items = _numbered_items(text) | _dash_items(text)
    gaps = {gap.end(): gap for gap in _GAP.finditer(text)}
    boundaries = [0]
    for place in sorted({*items, *gaps}):
        if place in items or gaps[place]["lines"] is not None or not _continues(text, boundaries[-1], gaps[place]):
            boundaries.append(place)
    return boundaries[1:]


def _numbered_items(text: str) -> set[int]:
    """Return the starts of the items of numbered lists: 1, 2, 3 in this order, the first one after a colon or a gap."""
    starts, expected = set(), None
    for match in _ITEM_NUMBER.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()].rstrip(" \t")
        if match[1] == "1" and (not before or before[-1] in "\n\r:.;!?"):
            expected = 1
        if expected is not None and int(match[1]) == expected:
            starts.add(match.start())
            expected += 1
    return starts


def _dash_items(text: str) -> set[int]:
    """Return the starts of list items within a line, as in "Plan: - Rest - Fluids"."""
    starts = set()
    for line in re.finditer(r"[^\n]+", text):
        first = _FIRST_DASH.search(line[0])
        if first:
            dash = re.compile(rf"(?<=\s){re.escape(first[1])}\s+(?=[A-Z])")
            starts |= {line.start() + first.start(1), *(match.start() for match in dash.finditer(text, *line.span()))}
    return starts - {0}


def _continues(text: str, start: int, gap: re.Match) -> bool:
    """Return whether the statement that began at `start` continues after the gap."""
    end = gap.start(gap.lastgroup)
    before, after = text[max(start, end - 40) : end], text[gap.end() : gap.end() + 20]
    if _ONLY_ITEM_NUMBER.match(text, start, end):
        return True
    if _NEVER_LAST.search(before):
        return not (_STREET.search(before) and _NO_NAME.match(after))
    if _BEFORE_A_NUMBER.search(before):
        return after.lstrip("([")[:1].isdigit()
    if _INITIAL.search(before):
        return bool(_NAME.match(after)) and not _NO_NAME.match(after)
    return bool(_MAY_BE_LAST.search(before) and _DOSING.match(after))
