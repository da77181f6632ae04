"""Judgements follow from the intervals alone, and a tower whose plain row learned nothing is not judged."""

import pytest

from app_eval.show.stories.mat import render
from app_eval.show.stories.mat_verdicts import compared, judgement, plain_learns, verdicts, word

MAIN = ("emoji", 3, "lite0", "main")


def interval(value):
    return [value, value - 0.01, value + 0.01]


def scores(la, hca, mta):
    return {"la": interval(la), "hca": interval(hca), "mta": interval(mta)}


def run(plain=0.1, study="main", **rows):
    base = {"zero-shot": {"baseline": "PROTECT", "against baseline": scores(-0.5, -0.5, -0.5)}}
    base["VANILLA"] = {
        "baseline": "PROTECT", "against zero-shot": scores(plain, 0, 0), "against baseline": scores(0, -0.2, -0.3),
    }  # fmt: skip
    base["PROTECT"] = {"baseline": "PROTECT", "against baseline": scores(0, 0, 0)}
    return {"study": study, "rows": base | rows}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 0, 0), "no effect shown"), ((0.02, 0, 0), "earns its keep"), ((0, 0, -0.02), "costs"),
        ((0.02, -0.02, 0), "mixed"), ((0.01, 0, 0), "no effect shown"),
    ],
)  # fmt: skip
def test_judgement(values, expected):
    assert judgement(scores(*values)) == expected


def test_the_interval_decides():
    assert [word(x) for x in ([1, 0.1, 2], [-1, -2, -0.1], [1, -0.1, 2])] == ["better", "worse", "no effect shown"]


def test_what_is_compared():
    entry = run(
        HETEROGENEOUS={
            "baseline": "PROTECT", "against baseline": scores(0, 0.1, 0), "against EUCLIDEAN": scores(0, 0, -0.1),
            "against SHARED": scores(0.3, 0, 0),
        }
    )  # fmt: skip
    found = dict(compared(entry))
    assert len(found) == 4
    trees = found["tree losses: PROTECT against VANILLA"]
    assert trees["hca"] == pytest.approx((0.2, 0.19, 0.21))  # turned round with its bounds
    text = verdicts({MAIN: entry}, [MAIN], {MAIN: "here"})
    assert "- tree losses: PROTECT against VANILLA: earns its keep in 1 of 1." in text
    assert "- entailment, c_mid derived: HETEROGENEOUS against EUCLIDEAN: costs in 1 of 1." in text
    assert (
        "| the whole method: HETEROGENEOUS against PROTECT | here | +0.000 [-0.010, +0.010] | +0.100 [+0.090, +0.110]"
        in text
    )


def test_a_study_compares_with_its_first_row_and_leans_on_the_plain_row_of_its_tower():
    key = ("emoji", 3, "lite0", "radius")
    study = {"study": "radius", "rows": {
        "zero-shot": {"baseline": "unit", "against baseline": scores(-1, -1, -1)},
        "unit": {"baseline": "unit", "against baseline": scores(0, 0, 0)},
        "feature": {"baseline": "unit", "against baseline": scores(0, -0.1, 0)},
    }}  # fmt: skip
    assert [name for name, _ in compared(study)] == ["feature against unit"]
    names = {MAIN: "main", key: "radius"}
    assert not plain_learns({key: study}, key)
    assert "Inconclusive" in verdicts({key: study}, [MAIN, key], names)
    for plain, said in ((0.1, True), (0.0, False)):
        found = {MAIN: run(plain), key: study}
        assert plain_learns(found, key) is said
        text = verdicts(found, [MAIN, key], names)
        assert ("feature against unit" in text) is said
        assert ("main; radius" in text) is not said


def test_nothing_run():
    assert verdicts({}, [MAIN], {}).endswith("Nothing has been run.")
    assert render([]).count("Nothing has been run.") == 2
