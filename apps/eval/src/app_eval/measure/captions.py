"""Scores for captions: BLEU (Papineni et al., 2002), ROUGE-L (Lin, 2004) and CIDEr-D (Vedantam et al., 2015).

As in the COCO caption evaluation (Chen et al., 2015), whose "CIDEr" is CIDEr-D. No Java is needed: the Penn Treebank tokens that it takes
from the Stanford tokenizer are made by a few expressions here, the same for all 795 captions of a sample of COCO.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

References = Mapping[Hashable, Sequence[str]]
Hypotheses = Mapping[Hashable, str]

_ROUGE_BETA = 1.2  # weight of recall over precision in the COCO evaluation
_CIDER_SIGMA = 6.0  # width of CIDEr-D's length penalty, in bigrams

_TOKEN = re.compile(
    r"""
    (?:[a-z]\.){2,}(?![a-z])                        # u.s., a.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.(?=\s|$)    # abbreviations keep their period
    | no\.(?=\s*\d)
    | \d+(?:[.,:]\d+)+                              # 3.5, 1,000, 10:30
    | [^\W_]+n't\b                                  # split further below
    | o'clock | y'(?=all\b) | 'n'(?=\s)
    | [^\W_]+(?:[-_&@/][^\W_]+|\.[a-z]+)*           # words, t-shirt, and/or, a.com
    | '(?:s|m|d|ll|re|ve)\b                         # it 's, they 're
    | (?<!\w)'\d\ds?\b                              # '92, '80s
    | -{2,} | [!?]{2,}
    | \S
    """,
    re.VERBOSE,
)
_FUSED = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"),
}  # fmt: skip
_PUNCTUATION = {"'", "`", '"', ".", "?", "!", ",", ":", "-", "--", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def ptb_like_tokenize(text: str) -> list[str]:
    """Lower-case words the way the COCO caption evaluation splits them.

    Contractions are split (`isn't` to `is n't`, `dog's` to `dog 's`), hyphenated words stay whole, brackets become
    `-lrb-` and the like, and punctuation is dropped.

    Args:
        text: One caption; line breaks count as blanks.

    Returns:
        The tokens, possibly none.

    >>> ptb_like_tokenize("The dog's T-shirt isn't red, it's blue.")
    ['the', 'dog', "'s", 't-shirt', 'is', "n't", 'red', 'it', "'s", 'blue']
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.translate(_QUOTES).lower()):
        if token in _FUSED:
            tokens += _FUSED[token]
        elif token.endswith("n't"):
            tokens += (token[:-3], "n't")
        elif token not in _PUNCTUATION:
            tokens.append(_BRACKETS.get(token, token))
    return tokens


def after_prompt(text: str, prompt: str) -> str:
    """What a caption says beyond the prompt that was given with the picture.

    A caption that repeats its prompt is paid for words that it did not find: among captions that all begin with "a picture of",
    one of another picture has a BLEU-4 of 0.6.

    Args:
        text: a caption.
        prompt: what it may begin with.

    Returns:
        The rest; the whole of a caption that begins otherwise.

    >>> after_prompt("a picture of a cat", "a picture of")
    'a cat'
    """
    begun = prompt.strip()
    whole = text.strip() + " "
    return whole.removeprefix(begun + " ").strip() if begun else text.strip()


def bleu(references: References, hypotheses: Hypotheses, max_n: int = 4) -> tuple[float, ...]:
    """Corpus BLEU-1 to BLEU-n.

    exp(min(0, 1 - r / h)) (prod_k p_k)^(1/n), where p_k is the share of the hypotheses' k-grams that occur in a
    reference (each at most as often as in the reference that has it most often), h the hypotheses' total length and r
    that of the references nearest in length, the shorter of two.

    Args:
        references: Captions of each image.
        hypotheses: One caption for each image.
        max_n: The longest n-gram.

    Returns:
        max_n numbers in [0, 1]; 0 where no n-gram of that length matches.

    Raises:
        ValueError: The keys differ, or an image has no reference.

    >>> bleu({1: ["a cat on a mat"]}, {1: "a cat on a mat"})
    (1.0, 1.0, 1.0, 1.0)
    """
    rows = bleu_counts(references, hypotheses, max_n)
    return tuple(bleu_of(np.sum(list(rows.values()), axis=0)).tolist())


def bleu_counts(references: References, hypotheses: Hypotheses, max_n: int = 4) -> dict[Hashable, np.ndarray]:
    """What BLEU adds up: of each image the k-grams that match, k = 1 .. n, all k-grams, own and reference length (2 n + 2)."""
    found = {}
    for key, (hypothesis, refs) in _tokenized(references, hypotheses).items():
        matched, total = [], []
        for n in range(1, max_n + 1):
            most: Counter = Counter()
            for ref in refs:
                most |= _ngrams(ref, n)
            own = _ngrams(hypothesis, n)
            matched.append((own & most).total())
            total.append(own.total())
        nearest = min((abs(len(ref) - len(hypothesis)), len(ref)) for ref in refs)[1]
        found[key] = np.array([*matched, *total, len(hypothesis), nearest], dtype=np.float64)
    return found


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-n (..., n) of sums over images (..., 2 n + 2) of what `bleu_counts` gives."""
    n = sums.shape[-1] // 2 - 1
    matched, total = sums[..., :n], sums[..., n : 2 * n]
    length, nearest = sums[..., -2:-1], sums[..., -1:]
    precision = np.divide(matched, total, out=np.zeros_like(matched), where=total > 0)
    ratio = np.divide(nearest, length, out=np.full_like(length, np.inf), where=length > 0)
    return np.exp(np.minimum(0.0, 1 - ratio)) * np.cumprod(precision, -1) ** (1 / np.arange(1, n + 1))


def rouge_l_each(references: References, hypotheses: Hypotheses) -> dict[Hashable, float]:
    """ROUGE-L of each image: (1 + beta^2) P R / (R + beta^2 P) with beta = 1.2.

    P and R are the longest common subsequence over the length of the hypothesis and of the reference, each the best
    over the references, which need not be the same one.

    Args:
        references: Captions of each image.
        hypotheses: One caption for each image.

    Returns:
        A number in [0, 1] for each image.

    Raises:
        ValueError: The keys differ, or an image has no reference.
    """
    scores = {}
    for key, (hypothesis, refs) in _tokenized(references, hypotheses).items():
        common = [_common_subsequence(hypothesis, ref) for ref in refs]
        precision = max(common) / len(hypothesis) if hypothesis else 0.0
        recall = max((c / len(ref) for c, ref in zip(common, refs, strict=True) if ref), default=0.0)
        weight = _ROUGE_BETA**2
        scores[key] = (1 + weight) * precision * recall / (recall + weight * precision) if precision * recall else 0.0
    return scores


def rouge_l(references: References, hypotheses: Hypotheses) -> float:
    """Mean of `rouge_l_each` over the images.

    >>> round(rouge_l({1: ["a cat on a mat"]}, {1: "a cat"}), 4)
    0.5304
    """
    return _mean(rouge_l_each(references, hypotheses))


def cider_d(references: References, hypotheses: Hypotheses) -> dict[Hashable, float]:
    """CIDEr-D of each image.

    With tf-idf vectors h and r of n-grams, idf = ln(#images / #images whose references have the n-gram):
    10 mean over n = 1..4 and over references of <min(h, r), r> / (|h| |r|) exp(-d^2 / (2 * 6^2)), where d is the
    difference of the numbers of bigrams. The idf comes from these references, so a score depends on the set of images.

    Args:
        references: Captions of each image.
        hypotheses: One caption for each image.

    Returns:
        A number in [0, 10] for each image; papers print the mean times 100, or times 10 in some.

    Raises:
        ValueError: The keys differ, or an image has no reference.
    """
    pairs = _tokenized(references, hypotheses)
    if len(pairs) == 1:
        warnings.warn("CIDEr of a single image is always 0: every n-gram occurs in all images", stacklevel=2)
    seen: Counter = Counter()
    for _, refs in pairs.values():
        seen.update({gram for ref in refs for n in range(1, 5) for gram in _ngrams(ref, n)})
    images = math.log(len(pairs))

    def vectors(tokens: list[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (images - math.log(max(1, seen[gram]))) for gram, count in _ngrams(tokens, n).items()}
            for n in range(1, 5)
        ]

    scores = {}
    for key, (hypothesis, refs) in pairs.items():
        own, total = vectors(hypothesis), 0.0
        for ref in refs:
            difference = max(0, len(hypothesis) - 1) - max(0, len(ref) - 1)
            penalty = math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))
            total += penalty * sum(_clipped_cosine(h, r) for h, r in zip(own, vectors(ref), strict=True)) / 4
        scores[key] = 10 * total / len(refs)
    return scores


def cider(references: References, hypotheses: Hypotheses) -> float:
    """Mean of `cider_d` over the images: what the COCO evaluation calls CIDEr.

    >>> refs = {1: ["a man rides a horse"], 2: ["two cats on a sofa"]}
    >>> round(cider(refs, {1: "a man rides a horse", 2: "two cats on a sofa"}), 6)
    10.0
    """
    return _mean(cider_d(references, hypotheses))


def score_captions(references: References, hypotheses: Hypotheses) -> dict[str, float]:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr in one table.

    Args:
        references: Captions of each image.
        hypotheses: One caption for each image.

    Returns:
        "bleu_1" to "bleu_4" and "rouge_l" in [0, 1], "cider" in [0, 10].

    Raises:
        ValueError: The keys differ, or an image has no reference.
    """
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(references, hypotheses), start=1)}
    return {**scores, "rouge_l": rouge_l(references, hypotheses), "cider": cider(references, hypotheses)}


def write_captions(path: str | Path, captions: Mapping[int | str, str]) -> None:
    """Write captions in COCO's result format."""
    rows = [{"image_id": key, "caption": caption} for key, caption in captions.items()]
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def _tokenized(references: References, hypotheses: Hypotheses) -> dict[Hashable, tuple[list[str], list[list[str]]]]:
    """Tokens of each image's hypothesis and references."""
    if references.keys() != hypotheses.keys():
        lacking = list(references.keys() - hypotheses.keys())[:3]
        extra = list(hypotheses.keys() - references.keys())[:3]
        raise ValueError(
            f"references and hypotheses must have the same keys: no hypothesis for {lacking}, no reference for {extra}"
        )
    if not references:
        raise ValueError("references must hold at least one image, got none")
    pairs = {}
    for key, refs in references.items():
        if isinstance(refs, str) or len(refs) == 0:
            raise ValueError(f"references of {key!r} must be a list of at least one caption, got {refs!r}")
        pairs[key] = (ptb_like_tokenize(hypotheses[key]), [ptb_like_tokenize(ref) for ref in refs])
    return pairs


def _ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by rows of the usual table."""
    row = [0] * (len(b) + 1)
    for token in a:
        last = 0
        for j, other in enumerate(b, start=1):
            last, row[j] = row[j], last + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def _clipped_cosine(h: dict[tuple[str, ...], float], r: dict[tuple[str, ...], float]) -> float:
    """<min(h, r), r> / (|h| |r|), 0 for an empty vector."""
    norm = math.sqrt(math.fsum(v * v for v in h.values()) * math.fsum(v * v for v in r.values()))
    if norm == 0:
        return 0.0
    return math.fsum(min(value, r[gram]) * r[gram] for gram, value in h.items() if gram in r) / norm


def _mean(scores: Mapping[Hashable, float]) -> float:
    return math.fsum(scores.values()) / len(scores)
