"""Scores for answers to questions about pictures: VQA accuracy (Antol et al., 2015) and exact match.

Answers are normalised as in the VQA challenge's evaluation, whose rules and table of contractions are facts that every
reported number rests on, its oddities included.
"""

import re
from collections.abc import Hashable, Mapping, Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# The contractions that the evaluation restores when one apostrophe is missing ("dont", "couldn'tve"). "i'm" and its kin
# are not among them: the table spells them with a capital, and answers are lower case by then.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_RESTORED = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
}
_RESTORED["somebody'd"] = "somebodyd"  # the wrong way round in the evaluation, and so in every reported number


def normalize_vqa_answer(answer: str) -> str:
    """An answer in the form in which the VQA evaluation compares it.

    Punctuation goes (a sign becomes a blank if it stands between letters everywhere, and vanishes otherwise), number
    words up to ten become digits, articles go, missing apostrophes come back, and the rest is lower case.

    Args:
        answer: Any text.

    Returns:
        The normalised text, possibly empty.

    >>> normalize_vqa_answer("The two T-shirts, dont you see?")
    "2 t shirts don't you see"
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for sign in _PUNCTUATION:
        # One number with a comma switches the blanks off for the whole answer; so does the evaluation.
        vanishes = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text)
        cleaned = cleaned.replace(sign, "" if vanishes else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str], *, normalize_unanimous: bool = True) -> float:
    """VQA accuracy of one answer.

    Over all ways to leave one of the people's answers out: the mean of min(1, matches among the others / 3). With ten
    references, 0, 1, 2, 3 or more matches give 0, .3, .6, .9, 1.

    Args:
        answer: The model's answer.
        references: What people answered, ten in VQAv2 and OK-VQA.
        normalize_unanimous: The challenge's own evaluation compares raw text where all people agree (False);
            OpenFlamingo's and most later ones normalise always.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: Fewer than two references.

    >>> vqa_accuracy("Two.", ["2", "two", "three"] + ["4"] * 7)
    0.6
    """
    if isinstance(references, str) or len(references) < 2:
        raise ValueError(
            f"references must hold at least two people's answers, got {references!r}: use exact_match for a single one"
        )
    if normalize_unanimous or len(set(references)) > 1:
        answer, references = normalize_vqa_answer(answer), [normalize_vqa_answer(other) for other in references]
    else:
        answer = " ".join(answer.split("\n")).replace("\t", " ").strip()
    matches = [other == answer for other in references]
    total = sum(matches)
    # By position, not by value: of equal answers only one is left out.
    scores = [min(3, total - match) for match in matches]
    return sum(scores) / (3 * len(scores))


def vqa_accuracy_each(
    answers: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    *,
    normalize_unanimous: bool = True,
) -> dict[Hashable, float]:
    """`vqa_accuracy` of every question, to be averaged.

    Raises:
        ValueError: The keys differ, or a question has fewer than two references.
    """
    if answers.keys() != references.keys() or not references:
        lacking, extra = list(references.keys() - answers.keys())[:3], list(answers.keys() - references.keys())[:3]
        raise ValueError(
            f"answers and references must have the same keys, at least one: no answer for {lacking}, no reference for "
            f"{extra}"
        )
    return {
        key: vqa_accuracy(answer, references[key], normalize_unanimous=normalize_unanimous)
        for key, answer in answers.items()
    }


def exact_match(answer: str, references: str | Sequence[str], *, normalize: bool = True) -> bool:
    """Whether an answer equals a reference.

    Args:
        answer: The model's answer.
        references: One right answer, or several.
        normalize: Compare normalised answers (see `normalize_vqa_answer`); else the text without outer blanks.

    Returns:
        True or False.

    Raises:
        ValueError: No reference.

    >>> exact_match("A circle.", "circle")
    True
    """
    accepted = [references] if isinstance(references, str) else list(references)
    if not accepted:
        raise ValueError("references must hold at least one answer, got none")
    form = normalize_vqa_answer if normalize else str.strip
    return form(answer) in {form(reference) for reference in accepted}
