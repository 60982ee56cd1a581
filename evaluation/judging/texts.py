"""Small helpers for editing clinical text, in English. Standard library only."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

Template = str | Callable[[re.Match], str]  # a replacement as in re.sub: "\\1 no", or a function of the match

_WORD = re.compile(r"[A-Za-z]{4,}|\d+(?:[.,]\d+)*")
# A sentence with such words is understood only after the one before it.
_REFERS_BACK = re.compile(
    r"^(?:this|these|that|those|it|its|they|results|adjustments|added|depending|their|such|however|additionally|furthermore|moreover|therefore|"
    r"thus|due to|given|despite|instead|the (?:latter|former|procedure|surgery|operation))\b"
    r"|\b(?:this|these|those|such|(?:during|at|on|by|of) that|the (?:mass|lesion|tumor|cyst|latter|former|procedure))\b"
    r"|\b(?:then|subsequent(?:ly)?|later|after|afterwards?|thereafter|following|followed|next|finally|first|second|third|"
    r"initially|post-?operative(?:ly)?|also|other|others|else|same|above|remaining|both|if|once|additional|further)\b",
    re.IGNORECASE,
)


def capital(text: str) -> str:
    """Return `text` with a capital at its start."""
    return text[:1].upper() + text[1:]


def compiled(table: Iterable[tuple[str, Template]], flags: int = re.IGNORECASE) -> list[tuple[re.Pattern, Template]]:
    """Return the (pattern, template) pairs with compiled patterns."""
    return [(re.compile(pattern, flags), template) for pattern, template in table]


def expand(match: re.Match, template: Template) -> str:
    """Return the replacement of the match."""
    return match.expand(template) if isinstance(template, str) else template(match)


def replace(match: re.Match, new: str) -> str:
    """Replace the match with `new`. A capital at its start is kept, even if `new` is empty."""
    after = match.string[match.end() :]
    if match[0][:1].isupper():
        new, after = capital(new), after if new else capital(after)
    return match.string[: match.start()] + new + after


def with_article(match: re.Match, new: str) -> str:
    """Return `new` with the article and the capital of the match, whose first group is "a ", "an " or None."""
    if match[1]:
        article = "an " if new[0] in "aeioAEIO" or re.match(r"[FHLMNRSX][A-Z]", new) else "a "
        return (capital(article) if match[1][0].isupper() else article) + new
    begins = match.string[: match.start()].rstrip(" \t-*•")[-1:] in ("", ".", "!", "?", ":", "\n")
    return capital(new) if match[0][0].isupper() and (begins or match[0][1:2].islower()) else new


def refers(sentence: str) -> bool:
    """Return whether the sentence refers to one before it."""
    return bool(_REFERS_BACK.search(sentence))


def without(text: str, start: int, end: int) -> str:
    """Return `text` without the statement at [start, end) and the gap before it, or after it if it is the first."""
    before, after = text[:start].rstrip(), text[end:]
    before = re.sub(r"(?:^|(?<=\n))[ \t]*[-*•–—·▪◦‣]+$", "", before).rstrip()  # its bullet
    return (before + after).strip() if before else after.strip()


def sentence_before(match: re.Match) -> str:
    """Return the part of the sentence before the match, at most 200 characters."""
    return re.split(r"[.;]\s|\n", match.string[max(0, match.start() - 200) : match.start()])[-1]


def sentence_after(match: re.Match) -> str:
    """Return the rest of the sentence after the match, at most 200 characters."""
    return re.split(r"[.;]\s|\n", match.string[match.end() : match.end() + 200], maxsplit=1)[0]


def mentions(text: str, topic: str) -> bool:
    """Return whether a word of `text` starts with one of the words of `topic`, which are regular expressions."""
    return bool(re.search(rf"\b(?:{'|'.join(topic.split())})", text, re.IGNORECASE))


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
