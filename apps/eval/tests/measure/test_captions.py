import contextlib
import io
import json
import random
import shutil

import pytest

from app_eval.measure.captions import (
    bleu,
    cider,
    cider_d,
    ptb_like_tokenize,
    rouge_l,
    rouge_l_each,
    score_captions,
    write_captions,
)

REFERENCES = {
    1: ["a cat sits on the mat", "a grey cat on a mat", "the cat is sitting on a red mat"],
    2: ["a dog runs in the park", "two dogs run through a green park"],
    3: ["a man rides a red bike down the street", "a person riding a bicycle on a road"],
}
HYPOTHESES = {1: "a cat sitting on a mat", 2: "a dog runs in a green park", 3: "a man riding a bike"}


def corpus(images=60, seed=0):
    """Captions of random words; a hypothesis is a reference with every fifth word or so replaced or doubled."""
    draw = random.Random(seed)
    words = ["a", "the", "cat", "dog", "man", "red", "big", "runs", "sits", "on", "in", "with", "park", "street", "two"]

    def word():
        return words[int(draw.random() ** 2 * len(words))]

    references, hypotheses = {}, {}
    for image in range(images):
        count = 1 + int(draw.random() * 5)
        references[image] = [" ".join(word() for _ in range(3 + int(draw.random() * 9))) for _ in range(count)]
        changed = []
        for token in references[image][0].split():
            chance = draw.random()
            changed += [word()] if chance < 0.2 else [token, token] if chance < 0.3 else [token]
        hypotheses[image] = " ".join(changed)
    return references, hypotheses


def test_scores_of_the_coco_evaluation():
    scores = score_captions(REFERENCES, HYPOTHESES)
    expected = {
        "bleu_1": 0.7994549623,
        "bleu_2": 0.7044602742,
        "bleu_3": 0.5593793799,
        "bleu_4": 0.3581983732,
        "rouge_l": 0.7189381094,
        "cider": 2.6083560810,
    }
    assert list(scores) == list(expected)
    for name, value in expected.items():
        assert abs(scores[name] - value) < 1e-9, name


def test_cider_d_of_each_image():
    references = {
        "a": ["a man rides a horse", "a man riding a brown horse"],
        "b": ["two cats on a sofa", "cats sleeping on the couch"],
    }
    hypotheses = {"a": "a man riding a horse", "b": "two cats sleeping on a sofa"}
    scores = cider_d(references, hypotheses)
    assert abs(scores["a"] - 4.56789905) < 1e-8
    assert abs(scores["b"] - 3.93226844) < 1e-8
    assert cider(references, hypotheses) == (scores["a"] + scores["b"]) / 2


RECORDED = {
    "bleu_1": 0.859307359305,
    "bleu_2": 0.755469385464,
    "bleu_3": 0.642591415229,
    "bleu_4": 0.539447940905,
    "rouge_l": 0.816644123791,
    "cider": 2.587154654099,
}


def test_recorded_scores_of_a_larger_corpus():
    """What pycocoevalcap 1.2 gives for these 60 images."""
    scores = score_captions(*corpus())
    for name, value in RECORDED.items():
        assert abs(scores[name] - value) < 1e-9, name


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pycocoevalcap(seed):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, hypotheses = corpus(seed=seed)
    lists = {key: [text] for key, text in hypotheses.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = Bleu(4).compute_score(references, lists)[0]
        each_cider = Cider().compute_score(references, lists)[1]
        each_rouge = Rouge().compute_score(references, lists)[1]
    for ours, value in zip(bleu(references, hypotheses), theirs, strict=True):
        assert abs(ours - value) < 1e-9
    for ours, values in ((cider_d, each_cider), (rouge_l_each, each_rouge)):
        found = ours(references, hypotheses)
        assert list(found) == list(hypotheses)
        for mine, value in zip(found.values(), values, strict=True):
            assert abs(mine - value) < 1e-9


def test_bounds_and_perfect_captions():
    references, hypotheses = corpus()
    perfect = {key: refs[0] for key, refs in references.items()}
    assert bleu(references, perfect) == pytest.approx((1, 1, 1, 1))
    assert rouge_l(references, perfect) == pytest.approx(1)
    assert all(0 <= value <= 10 for value in cider_d(references, hypotheses).values())
    alone = {key: [refs[0]] for key, refs in references.items() if len(refs[0].split()) >= 4}
    assert cider(alone, {key: refs[0] for key, refs in alone.items()}) == pytest.approx(10)


def test_order_of_images_and_references_does_not_matter():
    references, hypotheses = corpus()
    turned = {key: references[key][::-1] for key in reversed(references)}
    assert score_captions(turned, hypotheses) == pytest.approx(score_captions(references, hypotheses), abs=1e-12)


def test_captions_without_words_or_matches():
    references = {1: ["a cat"], 2: ["a dog"]}
    assert score_captions(references, {1: "", 2: "!"}) == {
        "bleu_1": 0, "bleu_2": 0, "bleu_3": 0, "bleu_4": 0, "rouge_l": 0, "cider": 0,
    }  # fmt: skip
    none = score_captions(references, {1: "purple rain", 2: "blue moon"})
    assert none["bleu_1"] == none["rouge_l"] == none["cider"] == 0
    assert score_captions({1: ["", "a cat"], 2: ["."]}, {1: "a cat", 2: "a dog"})["rouge_l"] == 0.5


def test_brevity_uses_the_shorter_of_two_equally_near_references():
    """One word of a hypothesis of 3 between references of 2 and 4 words: no penalty."""
    assert bleu({1: ["a cat", "a cat is here"]}, {1: "a cat is"}, 1) == pytest.approx((1.0,))
    assert bleu({1: ["a cat is here"]}, {1: "a cat is"}, 1)[0] == pytest.approx(2.718281828459045 ** (1 - 4 / 3))


def test_repeated_words_are_clipped():
    assert bleu({1: ["the cat the mat", "a cat"]}, {1: "the the the the"}, 2) == pytest.approx((0.5, 0.0))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A cat, sitting on a MAT.", "a cat sitting on a mat"),
        ("The dog's T-shirt isn't red, it's blue!", "the dog 's t-shirt is n't red it 's blue"),
        ("I can't go; you cannot, they're gonna.", "i ca n't go you can not they 're gon na"),
        ("Mr. Smith (left) [right] at 10:30 a.m.", "mr. smith -lrb- left -rrb- -lsb- right -rsb- at 10:30 a.m."),
        ('a 3.5 m long and/or "thing" -- for $5...', "a 3.5 m long and/or thing for $ 5"),
        ("What?! A U.S. sign: 1,000 people!!", "what ?! a u.s. sign 1,000 people !!"),
        ("the dogs' bowl and '80s rock 'n' roll", "the dogs bowl and '80s rock 'n' roll"),
        ("5'10\" tall & 50% off #1 www.x.com", "5 10 tall & 50 % off # 1 www.x.com"),
        ("y'all wouldn't've been there", "y' all would n't 've been there"),
        ("\u201cquoted\u201d it\u2019s caf\u00e9\nnext line", "quoted it 's caf\u00e9 next line"),
        ("a table..", "a table"),
        ("No.5 bus on St. John St.", "no. 5 bus on st. john st."),
        (" \n", ""),
    ],
)
def test_tokens(text, tokens):
    """What the Stanford tokenizer of the COCO evaluation gives."""
    assert ptb_like_tokenize(text) == tokens.split()


def test_tokens_equal_the_stanford_tokenizer(coco_captions):
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("the Stanford tokenizer needs Java")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = [caption.replace("\n", " ") for caption in coco_captions]
    theirs = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    assert [" ".join(ptb_like_tokenize(line)) for line in lines] == [theirs[i][0] for i in range(len(lines))]


@pytest.mark.parametrize("score", [bleu, rouge_l, cider, cider_d, rouge_l_each, score_captions])
def test_bad_input(score):
    with pytest.raises(ValueError, match=r"same keys: no hypothesis for \[2\], no reference for \[3\]"):
        score({1: ["a"], 2: ["b"]}, {1: "a", 3: "b"})
    with pytest.raises(ValueError, match="references of 2 must be a list of at least one caption"):
        score({1: ["a"], 2: []}, {1: "a", 2: "b"})
    with pytest.raises(ValueError, match="references of 1 must be a list"):
        score({1: "a cat"}, {1: "a"})
    with pytest.raises(ValueError, match="at least one image"):
        score({}, {})


def test_a_single_image_has_no_cider():
    with pytest.warns(UserWarning, match="CIDEr of a single image is always 0"):
        assert cider_d({1: ["a cat"]}, {1: "a cat"}) == {1: 0.0}


def test_result_files(tmp_path):
    path = tmp_path / "results.json"
    write_captions(path, {7: "a cat", 9: "a dog"})
    rows = json.loads(path.read_text())
    assert rows == [{"image_id": 7, "caption": "a cat"}, {"image_id": 9, "caption": "a dog"}]
