"""Find dialogues in one split that are nearly the same as one in another, by MinHash.

Two dialogues are near-duplicates if at least half of their distinct runs of 3 words, case ignored, are shared (Jaccard
similarity). Different visits share few: of 500 dialogues of omi-health/medical-dialogue-to-soap-summary, the two most
similar share 8.5%. MinHash only proposes pairs, and their similarity is then computed exactly: no pair is reported
wrongly, but one near the threshold may be missed.
"""

import re
from collections.abc import Mapping, Sequence

from common.dataset import Row

THRESHOLD = 0.5
_WORDS = 3
_PERMUTATIONS = 128
_PROPOSE_FROM = 0.4  # below THRESHOLD, because MinHash estimates the similarity with an error of about 0.05


def find_near_duplicates(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[int, str]]:
    """Return {split: {number of a row: the other split}} for validation rows near test, and train rows near either."""
    from datasketch import MinHash, MinHashLSH
    from tqdm import tqdm

    empty = MinHash(num_perm=_PERMUTATIONS)  # copied, because a new one takes longer than a dialogue
    index = MinHashLSH(threshold=_PROPOSE_FROM, num_perm=_PERMUTATIONS)
    runs: dict[tuple[str, int], set[bytes]] = {}
    found: dict[str, dict[int, str]] = {}
    with tqdm(total=sum(map(len, rows.values())), desc="Comparing splits", unit=" rows") as bar:
        for split in ("test", "validation", "train"):
            found[split], hashed = {}, []
            for number, row in enumerate(rows[split]):
                bar.update()
                own = word_runs(row["dialogue"])
                sketch = empty.copy()
                sketch.update_batch(own)
                near = next(
                    (key for key in sorted(index.query(sketch)) if similarity(own, runs[key]) >= THRESHOLD), None
                )
                if near:
                    found[split][number] = near[0]
                if split != "train":
                    hashed.append(((split, number), sketch))
                    runs[split, number] = own
            for key, sketch in hashed:  # only now: rows of one split are not compared with each other
                index.insert(key, sketch)
    return found


def word_runs(text: str) -> set[bytes]:
    """Return the distinct runs of 3 words of a text; of a shorter text, all its words as one run."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[k : k + _WORDS]).encode() for k in range(max(1, len(words) - _WORDS + 1))}


def similarity(first: set[bytes], second: set[bytes]) -> float:
    """Return the Jaccard similarity of two sets, 0 to 1."""
    return len(first & second) / len(first | second)
