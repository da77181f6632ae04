"""What single stories decide: commands of runs, what is not counted, and what warns; on small results made by hand."""

import copy
import json

import numpy as np
import pytest

from app_eval.ask.demonstration_task import COSINE
from app_eval.ask.level_task import ANCHORS
from app_eval.show.page import Claims, Table
from app_eval.show.stories import blip, icl, mat
from app_train.cli import hier as main

SCORES = ("la", "hca", "mta")
SETTINGS = {
    "epochs": 7, "batch_size": 8, "lr": 0.002, "curvature_lr": 0.01, "dropout": 0.5, "c_img": 0.05, "c_txt": 0.025, "scale": 1.0,
}  # fmt: skip


def row(value, against, plain=0.1, deviation=0.002, **more):
    return {
        "scores": {s: [value, value - 0.01, value + 0.01] for s in SCORES},
        "deviation": dict.fromkeys(SCORES, deviation),
        "baseline": "PROTECT",
        "against baseline": {s: [against, against - 0.01, against + 0.01] for s in SCORES},
        "against zero-shot": {s: [plain, plain - 0.01, plain + 0.01] for s in SCORES},
        **more,
    }


def entry(plain=0.1, deviation=0.002):
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
            "zero-shot": row(0.1, -0.3, deviation=0.0), "nearest picture": row(0.2, -0.2, deviation=0.0),
            "VANILLA": row(0.1 + plain, plain - 0.3, plain, deviation), "PROTECT": row(0.4, 0.0, 0.3, deviation),
            "HETEROGENEOUS": row(0.5, 0.1, 0.4, deviation, **curved),
        },
    }  # fmt: skip


def mat_page(*entries, tmp_path):
    for number, one in enumerate(entries):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    sources = [str(tmp_path / f"{number}.json") for number in range(len(entries))]
    assert main(["page", "mat", *sources, str(tmp_path / "page.md")]) == 0
    return (tmp_path / "page.md").read_text(), (tmp_path / "page-tables.md").read_text()


def test_parts_of_mat_are_counted_over_the_runs_whose_plain_row_learns(tmp_path):
    weak = entry(plain=0.005) | {"tower": "vit"}
    text, tables = mat_page(entry(), weak, tmp_path=tmp_path)
    assert "| tree losses: PROTECT against VANILLA | better 1 | better 1 | better 1 |" in text
    assert (
        "| the whole method over tree losses: HETEROGENEOUS against PROTECT | better 1 | better 1 | better 1 |" in text
    )
    assert "| entailment cones, one curvature: SHARED against EUCLIDEAN | not run 1 |" in text
    assert (
        "Not counted, because VANILLA does not beat zero-shot at the leaves: emoji of an unseen artist, DINOv2 ViT-S/14."
        in text
    )
    assert "| EUCLIDEAN | not run |  |  |" in text
    assert "--variant EUCLIDEAN --seeds 2" in text
    assert "--variant EUCLIDEAN SHARED SEPARATE --seeds 2" in tables
    assert "1,234" in tables
    assert "0.0600, 0.0200, 0.0400" in tables
    assert "0.0/25.0/-" in tables
    assert "0.20 / 0.80" in tables
    assert tables.count("| all rows | not run |") == 12


def test_seeds_can_undo_what_pictures_show(tmp_path):
    text, _ = mat_page(entry(deviation=0.2), tmp_path=tmp_path)
    assert "better" not in text.split("## Which parts")[1].split("Verdicts over")[0]


def test_commands_of_mat_runs():
    keys = [
        ("emoji", 3, "lite0", "main"),
        ("cifar100-fewshot", 16, "lite0", "radius"),
        ("emoji", 3, "mini-maple", "main"),
    ]
    mini = entry() | {"settings": {"epochs": 2, "batch_size": 128, "lr": 0.002, "method": "maple"}}
    run = [
        mat.plan.command_of(key, one) for key, one in zip(keys, (entry(), entry() | {"size": 96}, mini), strict=True)
    ]
    assert run[0] == (
        "hier train mat --data emoji --size 128 --tower lite0 --variant VANILLA PROTECT HETEROGENEOUS --seeds 2 "
        "--fit.epochs 7 --fit.lr 0.002 --out runs/mat/emoji-3-lite0"
    )
    assert (
        '--shots 16 --size 96 --tower lite0 --study radius --rows "VANILLA" "PROTECT" "HETEROGENEOUS" --seeds 2'
        in run[1]
    )
    assert run[2].endswith("--seeds 2 --method maple --epochs 2 --batch-size 128 --lr 0.002")
    # What is still to be run says how.
    flat = mat.plan.command_of(("cifar100-fewshot", 16, "lite0", "flat"))
    assert flat.endswith(
        "--study flat --seeds 3 --fit.epochs 12 --fit.lr 0.002 --out runs/mat/cifar100-fewshot-16-lite0-flat"
    )
    assert "hier train mat-mini --seeds 3 --method maple" in mat.plan.command_of(("emoji", 3, "mini-maple", "main"))


def test_later_runs_of_mat_replace_earlier_ones(tmp_path):
    run, path = tmp_path / "run", tmp_path / "all.json"
    run.mkdir()
    path.write_text(json.dumps([entry(), entry() | {"tower": "vit"}]))
    (run / "result-main.json").write_text(json.dumps(entry() | {"num_train": 11}))
    assert main(["page", "mat", str(path), str(run), str(tmp_path / "all.md")]) == 0
    assert [(e["tower"], e["num_train"]) for e in json.loads(path.read_text())] == [("lite0", 11), ("vit", 10)]
    before = (tmp_path / "all.md").read_text()
    assert main(["page", "mat", str(path), str(tmp_path / "all.md")]) == 0
    assert (tmp_path / "all.md").read_text() == before


def blip_row(itc=20.0, **more):
    levels = {name: {"txt_r1": itc} for name in ("subgroup", "group")}
    flat = {"spearman": 0.0}
    radius = {"scores": {"radius": {"error_auroc": 0.5}}, "crop": flat, "blur": flat}
    return {
        "retrieval": {"itc": {"txt_r1": itc, "img_r1": itc}, "levels": levels, **more.pop("retrieval", {})},
        "radius": radius,
        **more,
    }


def words(*seeds):
    config = {"losses": ["itc"], "stage2": {"epochs": 0}}
    section = blip._judged({"result": {"runs": list(seeds), "n": 100}, "settings": {"config": config}})
    block = section.parts[0]
    assert isinstance(block, Claims)
    found = {claim.text: word for claim, word in zip(block.claims, block.words, strict=True)}
    return found, " ".join(part for part in section.parts if isinstance(part, str))


def test_claims_of_blip_follow_the_seeds():
    claim = "Lorentz distance + RQS + RTP against Euclidean, first text right, %"
    nan = float("nan")
    cases = [((1.0, 1.2, 0.9), "better"), ((-1.0, -1.2, -0.9), "worse"), ((1.0, 0.2, 0.5), "undecided")]
    for differences, word in [*cases, ((1.0, nan, 1.0), "undecided"), ((1.0,), "undecided")]:
        runs = [{"euclidean": blip_row(10.0), "lorentz": blip_row(10.0 + d)} for d in differences]
        assert words(*runs)[0][claim] == word
    guess = [{"euclidean": blip_row(1.0), "lorentz": blip_row(50.0)}] * 3
    assert words(*guess)[0][claim] == "undecided"  # the plain row only guesses
    assert words(*guess)[0]["RQS added to Lorentz + RTP, first text right, %"] == "not run"


def test_captions_of_blip_are_judged_by_those_of_other_pictures():
    claim = "captions of Euclidean against captions of other pictures, CIDEr"
    cases = [([(0.5, 0.1), (0.6, 0.1), (0.5, 0.2)], "better"), ([(0.2, 0.2), (0.1, 0.2), (0.3, 0.1)], "undecided")]
    for cells, word in [*cases, ([(0.5, None)] * 3, "not run")]:
        runs = [{"euclidean": blip_row(captions={"cider": a, "controls": {"other": {"cider": b}}})} for a, b in cells]
        assert words(*runs)[0][claim] == word
    # Where CIDEr was kept picture by picture, the interval over pictures must exclude 0 as well.
    controls = {"other": {"cider": 0.1}}
    for own, word in (([0.5] * 8, "better"), ([4.0] + [0.0] * 7, "undecided")):
        each = {"own": own, "other": [0.1] * 8}
        runs = [
            {"euclidean": blip_row(captions={"cider": 0.5 + d, "controls": controls, "each": each})}
            for d in (0, 0.1, 0.2)
        ]
        assert words(*runs)[0][claim] == word


def test_captions_that_were_scored_with_the_prompt_are_not_shown(tmp_path):
    old, new = {"captions": {"bleu_4": 0.6}}, {"captions": {"bleu_4": 0.1, "controls": {}}}
    study = {"settings": {}, "result": {"runs": [{"euclidean": old, "lorentz": new}]}}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"studies": [study]}))
    (found,) = blip.collect([path])[""]["studies"]
    assert found["result"]["runs"] == [{"euclidean": {}, "lorentz": new}]


def test_controls_of_blip_stand_in_the_first_table():
    config = {
        "losses": ["itc"],
        "artists": ["a"],
        **dict.fromkeys(("num_layers", "num_queries", "max_tokens", "num_captions", "k_test"), 1),
    }
    config |= {name: {"epochs": 1, "batch_size": 2, "lr": 0.1} for name in ("stage1", "stage2", "match")}
    config |= {"start": "linear", "views": 3, "temperature": {"cosine": 0.15, "distance": 0.07, "lr": None}}
    start = {"itc": {"txt_r1": 5.0, "img_r1": 6.0}, "levels": {"group": {"txt_r1": 7.0}}}
    runs = [{"euclidean": blip_row(20.0 + d, start=start), "lorentz_plain": blip_row(10.0)} for d in (0.0, 0.5)]
    controls = {"ridge": {"itc": {"txt_r1": 30.0, "img_r1": 31.0}, "levels": {"group": {"txt_r1": 60.0}}}}
    result = {"n": 100, "seeds": 2, "runs": runs, "controls": controls}
    page = blip.tell({"": {"studies": [{"settings": {"config": config}, "result": result}]}})
    told = {row.title: row.values for row in page.table.rows}
    assert list(told)[:2] == [blip.plan.ROWS["euclidean"], blip.plan.ROWS["lorentz_plain"]]
    assert told[blip.plan.CONTROLS["ridge"]] == (30.0, 31.0, 60.0)
    assert page.control == blip.plan.CONTROLS["ridge"]
    assert [value.value for value in told[blip.plan.CONTROLS["start"]]] == [5.0, 6.0, 7.0]
    assert "ridge regression on the same features for 30.0 %" in page.outcome
    assert "--match.epochs 1" in page.commands[0]
    assert "--views 3" in page.commands[0]
    assert "--temperature.cosine 0.15" in page.commands[0]
    assert "temperature.distance" not in page.commands[0]
    claims = {
        c.text: c.seeds.value for s in page.body for p in s.parts if isinstance(p, Claims) for c in p.claims if c.seeds
    }
    assert claims["Euclidean against ridge regression on the same features, first text right, %"] == pytest.approx(
        -9.75
    )
    assert claims["Euclidean against its least-squares start, first text right, %"] == pytest.approx(15.25)


def test_what_warns_on_the_page_of_blip():
    matched = {"itm": {"txt_r1": 2.0}}
    diagnostics, lorentz = {"loss/itm": 0.64, "clipped_text": 0.9}, blip_row(captions={"distinct": 0.1})
    euclidean = [blip_row(10.0 + d, retrieval=matched, diagnostics=diagnostics) for d in (0, 0.1, 0.2)]
    runs = [{"euclidean": one, "lorentz": lorentz} for one in euclidean]
    found, warned = words(*runs)
    assert found["re-ranking by the matching head, Euclidean, first text right, %"] == "worse"
    assert "its loss over the last 20 is 0.640, and a constant has 0.637" in warned
    assert "sit at the largest radius in: Euclidean BLIP-2 (control)." in warned
    assert "hardly depend on the picture (fewer than half of them differ) in: Lorentz distance + RQS + RTP." in warned
    assert words(*[{"euclidean": blip_row(10.0)}] * 3)[1] == ""


def test_where_the_similarity_is_the_cosine_it_is_ranked_by_it_already():
    place = "retrieval/cosine/txt_r1"
    assert blip._get(blip_row(9.0, retrieval={"cosine": {"txt_r1": 12.0}}), place) == 12.0
    assert blip._get(blip_row(9.0), place) == 9.0
    assert np.isnan(blip._get(blip_row(9.0), "captions/cider"))


def study_json(accuracies, seeds=1):
    """A small study: no demonstrations, and two selectors with these shares of right answers of 40."""

    def bits(share):
        return "1" * round(40 * share) + "0" * (40 - round(40 * share))

    zero, random, ours = map(bits, accuracies)
    none = (("no demonstrations", zero), ("no demonstrations, no picture", bits(0.1)))
    cells = [{"selector": name, "seed": 0, "k": 0, "right": {"none": b}} for name, b in none]
    for seed in range(seeds):
        cells.append(
            {"selector": "random", "seed": seed, "k": 4, "right": {"none": random, "lorentz": ours}, "vote": bits(0.4)}
        )
        cells.append(
            {"selector": icl.OURS, "seed": seed, "k": 4, "right": {"none": ours, "lorentz": ours}, "vote": bits(0.6)}
        )
    task = {
        "name": "easy-vqa",
        "num_pool": 9,
        "num_queries": 40,
        "num_answers": 5,
        "kinds": ["a", "b"] * 20,
        "rows": [1],
    }
    tried = {"lambda": 1.0, "accuracy": {"1": 0.5, "2": 0.4}}
    return {
        "format": 1, "study": "icl-mini", "quick": False, "complete": False, "seeds": [0],
        "model": {"rank": 4, "steps": 10, "shots": [0, 2, 4]},
        "tasks": [task | {"selectors": ["random", icl.OURS, "RICES"], "cells": cells}],
        "lambda": {"lorentz": tried, "euclidean": tried, "none": {"accuracy": 0.3}, "n": 9, "k": 4},
    }  # fmt: skip


SELECTION = {"format": 1, "quick": False, "seeds": [0], "steps": 20, "studies": []}


def icl_page(tmp_path, model, distilled=None, selection=SELECTION):
    for name, content in (("a", selection), ("b", model), ("c", distilled)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    more = [] if distilled is None else ["--distilled", str(tmp_path / "c.json")]
    status = main(
        ["page", "icl", str(tmp_path / "a.json"), str(tmp_path / "page.md"), "--model", str(tmp_path / "b.json"), *more]
    )
    return status, (tmp_path / "page.md").read_text() if status == 0 else ""


def said(claim, text):
    """Difference over items, over seeds, and the word."""
    cells = next(line for line in text.splitlines() if line.startswith(f"| {claim} |")).split(" | ")
    return (*(cell.partition(" ")[0] for cell in cells[1:3]), cells[3].removesuffix(" |"))


def test_the_page_of_icl_ranks_selectors_only_where_random_demonstrations_help(tmp_path):
    _, text = icl_page(tmp_path, study_json((0.2, 0.5, 0.9), seeds=3))
    assert "Nothing is ranked" not in text
    assert said("hyperbolic anchors against none", text) == ("+70.0", "+70.0", "better")
    assert text.count("| better |") == 5
    _, text = icl_page(tmp_path, study_json((0.5, 0.5, 0.9), seeds=3))
    assert "this is not shown: random demonstrations against none is undecided." in text
    assert said("hyperbolic anchors against random demonstrations", text) == ("+40.0", "+40.0", "undecided")
    assert said("hyperbolic anchors against their vote", text) == ("+30.0", "+30.0", "better")
    assert "| RICES (the pictures nearest to the query's) | not run |" in text
    assert "hier eval icl runs/icl-mini" in text
    assert "cut short" in text
    assert "| distilled | not run |" in text


def test_one_seed_of_what_has_chance_in_it_decides_nothing(tmp_path):
    _, text = icl_page(tmp_path, study_json((0.2, 0.5, 0.9)))
    assert said("hyperbolic anchors against none", text) == ("+70.0", "+70.0", "undecided")
    assert "| better |" not in text


def test_the_page_of_icl_tells_the_table_of_six_tasks(tmp_path):
    row = {
        "seeds": 3,
        "exact": {"mean": [0.5, 0.4, 0.6], "deviation": 0.1},
        "vote": {"mean": [0.7, 0.6, 0.8], "deviation": None},
    }
    better = {"items": [0.1, 0.05, 0.15], "seeds": [0.1, 0.02, 0.18], "word": "better"}
    open_ = {"items": [0.1, -0.05, 0.15], "seeds": None, "word": "undecided"}
    rows = {"rices": row, "anchors, curvature 1": {**row, "against": better, "twin": open_}}
    group = {"task": "visual-reasoning", "title": "visual reasoning", "score": "exact", "k": 4, "baseline": "rices", "num_pool": 9,
             "num_queries": 40, "rows": rows}  # fmt: skip
    table = {
        "format": 1,
        "study": "icl-table",
        "model": "m",
        "preset": "mini",
        "seeds": 3,
        "strength": 1.0,
        "groups": [group],
    }
    for name, content in (("a", SELECTION), ("b", study_json((0.2, 0.5, 0.9))), ("c", table)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["page", "icl", *(str(tmp_path / f"{n}.json") for n in "abc"), str(tmp_path / "page.md")]) == 0
    text, tables = (tmp_path / "page.md").read_text(), (tmp_path / "page-tables.md").read_text()
    assert "40 questions each, 4 demonstrations from 9, 3 seeds" in text
    assert "Against rices: better 1" in text
    assert "Hyperbolic against Euclidean: undecided 1" in text
    assert said("anchors, curvature 1 against rices", tables) == ("+10.0", "+10.0", "better")
    assert said("anchors, curvature 1 against its Euclidean twin", tables) == ("+10.0", "", "undecided")
    assert "| anchors, curvature 1 | 3 | 50.0 [40.0, 60.0] | 70.0 [60.0, 80.0] |" in tables
    assert "hyper-icl-six.json" in text
    # The page's own JSON makes the page again.
    again = [str(tmp_path / f"page{suffix}.json") for suffix in ("", "-model", "-six")]
    assert main(["page", "icl", *again, str(tmp_path / "second.md")]) == 0
    assert (tmp_path / "second.md").read_text().replace("second", "page") == text


def test_the_page_of_icl_takes_json_of_one_model_in_full(tmp_path, capsys):
    study = study_json((0.5, 0.5, 0.5))
    right = {"model": "0" * 40, "calibrated": "01" * 20, "distilled": "1" * 40}
    options = dict.fromkeys(("strength", "rank", "steps", "batch_size"), 1)
    distilled = {
        "format": 1, "recipe": "icl-distill", "model": study["model"], "options": options, "masses": {"model": 0.5, "student": 0.1, "n": 8},
        "cells": [{"selector": "random", "right": right}] * 2,
    }  # fmt: skip
    status, text = icl_page(tmp_path, study, distilled)
    assert status == 0
    assert said("distilled against calibrated, random demonstrations", text) == ("+50.0", "+50.0", "better")
    for model, other, selection, expected in (
        (study, distilled | {"model": {"steps": -1}}, SELECTION, "one model"),
        (study | {"quick": True}, None, SELECTION, "--quick"),
        (study, None, SELECTION | {"quick": True}, "--quick"),
        (SELECTION, None, SELECTION, "the JSON of icl-study is missing"),
        (copy.deepcopy(study) | {"tasks": []}, None, SELECTION, "holds no row yet"),
        ({"format": 2}, None, SELECTION, "is no JSON of"),
    ):
        assert icl_page(tmp_path, model, other, selection)[0] == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_the_stored_range_bounds_the_deviation(seeds):
    draw = np.random.default_rng(seeds)
    for values in [*draw.random((50, seeds)), (np.arange(seeds) < seeds // 2).astype(float)]:
        stored = {"scores": {"vote": float(np.mean(values))}, "spread": {"vote": float(np.ptp(values))}, "seeds": seeds}
        (_, deviation, number), (_, widest, _) = icl._votes(stored, 50)
        assert widest >= np.std(values, ddof=1) - 1e-12
        assert number == 50
        assert deviation == pytest.approx(np.sqrt(stored["scores"]["vote"] * (1 - stored["scores"]["vote"])))
    assert widest == pytest.approx(np.std(values, ddof=1))  # half and half is the widest
    assert icl._votes({"scores": {"vote": 0.5}, "spread": {"vote": 0.0}, "seeds": 1}, 9)[1] == (0.5, 0.0, 1)


def test_captions_become_cells():
    sample = {"id": "1", "caption": "a | caf\u00e9\n of two", "reference": "a cat"}
    seed = blip_row(samples=[sample] * 9)
    stage = {"epochs": 1, "batch_size": 2, "lr": 0.1}
    config = {"losses": ["itc"], "stage1": stage, "stage2": stage}
    config |= dict.fromkeys(("num_layers", "num_queries", "max_tokens", "num_captions", "k_test"), 1)
    section = blip._tables({"result": {"runs": [{"lorentz": seed}], "seeds": 1}, "settings": {"config": config}}, 1)[0]
    last = section.parts[-1]
    assert isinstance(last, Table)
    assert [row.values for row in last.rows] == [(sample["caption"],)] * 6
    assert "--rows euclidean cosine" in section.parts[0].rows[-1].command


def taxonomy_json(ours=0.75, seeds=3):
    """Two levels are as they are; at the leaf the anchors find one demonstration more."""
    pictures, names = 20, ("one right demonstration", "no right demonstration", "random", "RICES", COSINE, *ANCHORS)

    def bits(share):
        return "".join("111" if i < round(share * pictures) else "000" for i in range(pictures))

    shares = {"no right demonstration": 0.0, icl.OURS: ours}
    cells = [{"selector": "no demonstrations", "seed": 0, "k": 0, "right": {"none": bits(0.0)}}]
    chosen = []
    for name in names:
        for seed in range(1 if name in ("RICES", COSINE) else seeds):
            cells.append({"selector": name, "seed": seed, "k": 4, "right": {"none": bits(shares.get(name, 0.5))}})
            hits = ("113" if name == icl.OURS else "112") * 2 * pictures
            chosen.append({"selector": name, "seed": seed, "k": 4, "hits": hits, "vote": bits(0.5) * 2})
    selection = {"num_queries": 6 * pictures, "kinds": [], "cells": chosen[2 * seeds :]}
    task = {
        "name": "taxonomy", "num_pool": 9, "num_queries": 3 * pictures, "selectors": list(names), "cells": cells, "rows": [1],
        "selection": selection,
    }  # fmt: skip
    card = {"steps": 7, "options": "--num-episodes 9 --align.epochs 2", "shots": [4]}
    return {
        "format": 1,
        "study": "icl-taxonomy",
        "quick": False,
        "seeds": list(range(seeds)),
        "model": card,
        "tasks": [task],
    }


def test_the_page_of_icl_tells_the_taxonomy(tmp_path):
    for name, content in (("a", SELECTION), ("b", study_json((0.2, 0.5, 0.9))), ("c", taxonomy_json())):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["page", "icl", *(str(tmp_path / f"{n}.json") for n in "abc"), str(tmp_path / "page.md")]) == 0
    text, tables = (tmp_path / "page.md").read_text(), (tmp_path / "page-tables.md").read_text()
    assert "one right demonstration 50.0 [25.0, 70.0], no right demonstration 0.0 [0.0, 0.0]" in text
    assert "(one against none: better; copying any of them would give 25)" in text
    assert "60 queries of an unseen artist" in text
    assert (
        "hier train icl-mini --data taxonomy --num-episodes 9 --align.epochs 2 --shots 4 --out runs/icl-taxonomy"
        in text
    )
    assert said("anchors, hyperbolic against anchors, Euclidean", text) == ("+25.0", "+25.0", "better")
    assert said("anchors, hyperbolic against their vote", tables)[:2] == ("+25.0", "+25.0")
    # Without a model: (1 + 1 + 3) / 12 against (1 + 1 + 2) / 12, all of it at the leaf.
    share = tables.partition("right demonstrations, %, no model: all levels")[2]
    assert said("anchors, hyperbolic against anchors, Euclidean", share)[0] == "+8.3"
    assert said("anchors, hyperbolic against anchors, Euclidean", share.partition(": leaf")[2])[0] == "+25.0"
    assert said("anchors, hyperbolic against anchors, Euclidean", share.partition(": group")[2])[0] == "+0.0"


def test_the_strength_of_the_calibration_is_told_as_it_was_set(tmp_path):
    _, text = icl_page(tmp_path, study_json((0.2, 0.5, 0.9)))
    assert "was chosen on 9 questions, which is noise" in text
    fixed = study_json((0.2, 0.5, 0.9)) | {"lambda": {kind: {"lambda": 1.0} for kind in ("lorentz", "euclidean")}}
    _, text = icl_page(tmp_path, fixed)
    assert "its strength, 1 (lorentz), 1 (euclidean), is fixed." in text
