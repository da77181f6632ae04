"""The page says what the numbers say, ranks nothing when the plain row learned nothing, and names what was not run."""

import copy
import json

import pytest
from app_eval.cli import main

from app_data.store.errors import DataError
from app_eval.show.stories.mat import collect, render

SCORES = ("la", "hca", "mta")
SETTINGS = {
    "epochs": 7, "batch_size": 8, "lr": 0.002, "curvature_lr": 0.01, "dropout": 0.5, "c_img": 0.05, "c_txt": 0.025, "scale": 1.0,
}  # fmt: skip


def row(value, against, plain=0.1, **more):
    return {
        "scores": {s: [value, value - 0.01, value + 0.01] for s in SCORES},
        "deviation": dict.fromkeys(SCORES, 0.002),
        "baseline": "PROTECT",
        "against baseline": {s: [against, against - 0.01, against + 0.01] for s in SCORES},
        "against zero-shot": {s: [plain, plain - 0.01, plain + 0.01] for s in SCORES},
        "against EUCLIDEAN": {s: [0.0, -0.01, 0.01] for s in SCORES},
        **more,
    }


def entry(plain=0.1):
    curved = {
        "num_trained": [1234] * 2,
        "curvatures": [[[1, 0.05, 0.025, 0.03], [99, 0.06, 0.02, 0.04]]] * 2,
        "c_mid_between": [1.0, 1.0],
        "attention": [[0.1, 0.9], [0.3, 0.7]],
        "met": [{"visual": 0.0, "textual": 0.25, "cross": float("nan")}] * 2,
    }
    return {
        "format": 1, "recipe": "mat", "study": "main", "data": "emoji", "shots": 3, "tower": "lite0", "num_train": 10,
        "num_test": 20, "num_nodes": 30, "seeds": 2, "mta_majority": 0.4, "settings": SETTINGS, "size": 128,
        "rows": {
            "zero-shot": row(0.1, -0.2), "nearest picture": row(0.2, 0.0), "VANILLA": row(0.3, -0.1, plain),
            "PROTECT": row(0.4, 0.0), "HETEROGENEOUS": row(0.5, 0.1, **curved),
        },
    }  # fmt: skip


def test_verdicts():
    text = render([entry()])
    assert "HETEROGENEOUS against PROTECT: better: LA, HCA, MTA." in text
    assert "HETEROGENEOUS against EUCLIDEAN: no difference shown: LA, HCA, MTA." in text
    assert "Inconclusive" not in text
    assert "0.0600, 0.0200, 0.0400" in text
    assert "0.0 %/25.0 %/-" in text
    assert "1,234" in text
    assert "HETEROGENEOUS 0.20 / 0.80" in text
    assert "nearest picture against PROTECT: no difference shown" in text
    assert "7 epochs of batches of 8, rate 0.002" in text
    assert text.count("Not run.") == 13
    assert "Not run here: EUCLIDEAN, SHARED, SEPARATE." in text
    assert "the paper's, not ours" in text
    assert (
        "python apps/train mat --data emoji --size 128 --tower lite0 --variant VANILLA PROTECT HETEROGENEOUS --seeds 2 "
        "--fit.epochs 7 --fit.lr 0.002 --out runs/mat/emoji-3-lite0\n"
    ) in text


def test_commands_of_other_runs():
    study = entry() | {"study": "radius", "data": "cifar100-fewshot", "shots": 16, "size": 96}
    text = render([study])
    assert (
        'mat --data cifar100-fewshot --source DIR --shots 16 --size 96 --tower lite0 --study radius --rows "VANILLA" '
        '"PROTECT" "HETEROGENEOUS" --seeds 2'
    ) in text
    # What is still to be run says how.
    assert (
        "--tower lite0 --study flat --seeds 3 --fit.epochs 12 --fit.lr 0.002 --out runs/mat/cifar100-fewshot-16-lite0-flat\n"
        in text
    )
    assert "python apps/train mat-mini --seeds 3 --method maple" in text
    settings = {
        "epochs": 2, "batch_size": 128, "lr": 0.002, "method": "maple", "c_img": 0.05, "c_txt": 0.025, "scale": 1.0,
    }  # fmt: skip
    mini = entry() | {"recipe": "mat-mini", "tower": "mini-maple", "settings": settings}
    text = render([mini])
    assert (
        "python apps/train mat-mini --variant VANILLA PROTECT HETEROGENEOUS --seeds 2 --method maple --epochs 2 "
        "--batch-size 128 --lr 0.002\n"
    ) in text
    assert "AdamW, 2 epochs of batches of 128, rate 0.002, c_img 0.05" in text


def test_nothing_is_ranked_when_the_plain_row_does_not_beat_zero_shot():
    text = render([entry(plain=0.005)])
    assert "Inconclusive" in text
    assert "better: " not in text.split("## In words")[1]


def test_the_file_keeps_what_it_holds(tmp_path, capsys):
    run, path, page = tmp_path / "run", tmp_path / "all.json", tmp_path / "page.md"
    run.mkdir()
    with pytest.raises(DataError, match="no finished result"):
        collect([run], path)
    (run / "result-main.json").write_text(json.dumps(entry()))
    other = copy.deepcopy(entry()) | {"tower": "vit"}
    (run / "result-other.json").write_text(json.dumps(other))
    assert main(["mat-page", str(path), str(page), str(run)]) == 0
    assert [e["tower"] for e in json.loads(path.read_text())] == ["lite0", "vit"]
    assert (tmp_path / "page-curvatures.png").stat().st_size > 1000
    assert "(page-curvatures.png)" in page.read_text()
    before = page.read_text()
    assert main(["mat-page", str(path), str(page)]) == 0
    assert page.read_text() == before
    assert main(["mat-page", str(tmp_path / "none.json"), str(page)]) == 2
    for damaged in ("", "[1]", '[{"data": "emoji"}]'):
        path.write_text(damaged)
        assert main(["mat-page", str(path), str(page)]) == 2
        assert main(["mat-page", str(path), str(page), str(run)]) == 2
    assert "is no collection of mat results" in capsys.readouterr().err


def test_an_empty_file_says_so():
    text = render([])
    assert text.count("Not run.") == 14
    assert "Nothing has been run." in text
