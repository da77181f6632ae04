import pytest

from app_eval.measure.vqa import exact_match, normalize_vqa_answer, vqa_accuracy, vqa_accuracy_each


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_matches(matches, score):
    references = ["yes"] * matches + [f"no{i}" for i in range(10 - matches)]
    assert vqa_accuracy("yes", references) == pytest.approx(score, abs=1e-12)


def test_accuracy_is_the_mean_over_leaving_one_out():
    """Written out over all subsets of nine, by position."""
    references = ["a", "b", "b", "c", "b", "d", "e", "f", "g", "h"]
    for answer in "abc":
        subsets = [references[:i] + references[i + 1 :] for i in range(10)]
        expected = sum(min(1, subset.count(answer) / 3) for subset in subsets) / 10
        # "a" is an article and normalises to nothing, as do equal references.
        assert vqa_accuracy(answer, references) == pytest.approx(expected)


def test_unanimous_answers_are_normalised_by_choice():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 10, normalize_unanimous=False) == 0
    assert vqa_accuracy("\tyes\n", ["yes"] * 10, normalize_unanimous=False) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"], normalize_unanimous=False) == 1
    # Compared raw, these ten are not unanimous.
    assert vqa_accuracy("2", ["two"] * 9 + ["2"], normalize_unanimous=False) == 1


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("  a red\tcar\n", "red car"),
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("ten to eleven", "10 to eleven"),
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),
        ("t-shirt -blue", "tshirt blue"),
        ("yes, it is", "yes it is"),
        ("black,white", "black white"),
        ("1,000 a/b", "1000 ab"),
        ("3.5", "3.5"),
        ("mr. smith.", "mr smith"),
        ("u.s.a", "usa"),
        (".5 miles", ".5 miles"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("twas", "'twas"),
        ("Im here", "im here"),
        ("somebody'd", "somebodyd"),
        ("what?", "what"),
        ("what?no!", "what no"),
        ("$5 & more: 50%", "$5 & more: 50%"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalisation(answer, normal):
    assert normalize_vqa_answer(answer) == normal


def test_normalised_answers_stay():
    for answer in ("2 dogs", "don't", "10:30", "t shirt", "y'all'd've"):
        assert normalize_vqa_answer(answer) == answer


def test_exact_match():
    assert exact_match("A circle.", "circle")
    assert exact_match("two", ["1", "2"])
    assert not exact_match("square", ["circle", "triangle"])
    assert not exact_match("Circle", "circle", normalize=False)
    assert exact_match(" circle\n", "circle", normalize=False)
    with pytest.raises(ValueError, match="at least one answer"):
        exact_match("a", [])


def test_each_question():
    references = {1: ["yes"] * 10, 2: ["no"] * 10}
    assert vqa_accuracy_each({2: "no", 1: "no"}, references) == {2: 1.0, 1: 0.0}
    with pytest.raises(ValueError, match=r"no answer for \[2\], no reference for \[\]"):
        vqa_accuracy_each({1: "yes"}, references)
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy_each({}, {})


def test_too_few_references():
    for references in ([], ["yes"], "yes"):
        with pytest.raises(ValueError, match="use exact_match for a single one"):
            vqa_accuracy("yes", references)
