"""The hier-lora page is made from the stored runs alone, says what the numbers say, and lists what was not run."""

import json

import numpy as np
import pytest
import torch

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_eval.measure.paths import outcome
from app_eval.measure.reduce import find, reduce_study
from app_eval.measure.results import save_outcome
from app_eval.show.commands import write_page
from hier_losses import Taxonomy
from hier_losses.treecuts import sample_cuts

TREE = Taxonomy.from_paths([(f"a{i % 3}", f"b{i % 6}", f"c{i}") for i in range(24)])
CUTS = sample_cuts(TREE, rates=(0.5,), per_rate=3)
TARGET = np.repeat(TREE.leaf.numpy(), 10)


def guess(share, seed):
    """Logits that name the true path of a share of the pictures."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.rand(len(TARGET), TREE.num_nodes, generator=draw)
    right = torch.rand(len(TARGET), generator=torch.Generator().manual_seed(1)) < share
    path = TREE.paths[torch.from_numpy(TARGET)]
    return logits.scatter_add(1, path, right[:, None].expand_as(path) * 3.0)


@pytest.fixture
def study(tmp_path):
    """Write a study folder whose rows have known strengths."""
    root = tmp_path / "study"

    def add(experiment, row, share, seeds=2, kind="head", data="emoji", parts=None, facts=None, rate=0.01):
        for seed in range(seeds):
            folder = root / experiment / data / row / f"seed-{seed}"
            parts = parts or [""]
            for part in parts:
                (folder / part).mkdir(parents=True, exist_ok=True)
                save_outcome(folder / part, outcome(guess(share, seed), TARGET, TREE, CUTS))
                write_json(folder / part / "facts.json", facts or {})
            content = {
                "experiment": experiment, "data": data, "row": row, "seed": seed, "kind": kind, "parts": parts,
                "rate": rate, "seconds": {"cpu": 60.0}, "ahd": 1.0 - rate,
            }  # fmt: skip
            write_json(folder / "run.json", content)

    def start(**shares):
        (root / "emoji").mkdir(parents=True)
        content = {"name": "emoji", "train": 5, "test": 240, "pixels": 96, "levels": list(TREE.level_sizes)}
        write_json(root / "emoji" / "data.json", {**content, "leaves": TREE.num_leaves, "tree": TREE.to_json()})
        for rate in (0.01, 0.1):
            add("tuning", f"both-{rate:g}", 0.5, seeds=1, rate=rate)
        for row, share in shares.items():
            fixed = row in ("zero_shot", "neighbour")
            add("main", row, share, seeds=1 if fixed else 2, kind="fixed" if fixed else "head")
        return add, root

    return start


def test_the_page_says_what_the_numbers_say(study, tmp_path):
    add, root = study(zero_shot=0.1, leaf_ce=0.4, both=0.8, hisce=0.4, tp_kl=0.1)
    add("alpha", "2", 0.6)
    add("rewired", "both-0.1", 0.5)
    add("consistency", "1-permuted", 0.5)
    new = [int(v) for v in TREE.leaf[:6]]
    facts = {"new leaves": new, "shots": 0, "largest change of an old text feature": 0.0}
    for loss, share in (("both", 0.7), ("leaf_ce", 0.2)):
        add("update", f"leaf-0.3-{loss}", share, parts=["shots-0"], facts=facts)
    page = tmp_path / "docs" / "page.md"
    write_page("lora", [root], page)
    text, tables = page.read_text(), (page.parent / "page-tables.md").read_text()
    assert "Nothing is ranked" not in text
    assert "{" not in text + tables
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["| TP-KL + HiSCE: leaf right, %, bottom-up"].endswith("| better |")
    assert rows["| HiSCE: leaf right, %, bottom-up"].endswith("| undecided |")
    assert rows["| TP-KL: leaf right, %, bottom-up"].endswith("| worse |")
    assert rows["| level cross-entropy: leaf right, %, bottom-up"].endswith("|  |  | not run |")
    assert rows["| level cross-entropy"] == "| level cross-entropy | not run |  |  |"
    assert (
        rows["| whole path right, by best path"]
        == "| whole path right, by best path | not run | worse | undecided | better |"
    )
    assert "What was not run:\n\n```\nhier train lora-study --data DIR\n```" in text
    assert "Learning rates: TP-KL + HiSCE 0.1." in text
    assert "- lambda on emoji: hier train lora-study" in text
    assert "- alpha on emoji" not in text
    assert "| 30% of the leaves, TP-KL + HiSCE, 0 pictures | 2 |" in tables
    assert "(page.svg)" in text


def test_the_json_is_enough(study, tmp_path):
    _, root = study(zero_shot=0.1, leaf_ce=0.4, both=0.8)
    first, second = tmp_path / "one" / "page.md", tmp_path / "two" / "page.md"
    write_page("lora", [root], first)
    write_page("lora", [first.with_suffix(".json")], second)
    assert second.read_text() == first.read_text()
    assert second.with_suffix(".json").read_text() == first.with_suffix(".json").read_text()
    json.loads(first.with_suffix(".json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_nothing_is_ranked_when_leaf_ce_does_not_beat_zero_shot(study, tmp_path):
    _, root = study(zero_shot=0.5, leaf_ce=0.4, both=0.9)
    write_page("lora", [root], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert (
        "Nothing is ranked here, because this is not shown: leaf cross-entropy against zero-shot, leaf right, is worse."
        in text
    )
    assert "| better |" not in text


def test_differences_are_paired_and_zero_for_the_same_row(study):
    add, root = study(leaf_ce=0.4, both=0.4, zero_shot=0.4)
    add("towers", "head-leaf_ce", 0.4)
    add("towers", "head-both", 0.4)
    found = reduce_study(root)
    for key in (("main", "emoji", "both"), ("main", "emoji", "zero_shot"), ("towers", "emoji", "head-both")):
        entry = find(found, *key)
        if key[2] != "zero_shot":  # one outcome against two seeds
            assert entry["against leaf CE"]["leaf@bottom_up"] == [0, 0, 0]
        assert entry["paired seeds"] == 2
    assert "against leaf CE" not in find(found, "main", "emoji", "leaf_ce")
    assert find(found, "main", "emoji", "soup") is None


def test_old_and_new_pictures_add_up(study):
    add, root = study(leaf_ce=0.4)
    new = [int(v) for v in TREE.leaf[3:9]]
    facts = {"new leaves": new, "shots": 0, "largest change of an old text feature": 0.0}
    add("update", "leaf-0.3-leaf_ce", 0.4, seeds=1, parts=["shots-0"], facts=facts)
    found = reduce_study(root)
    old, fresh = (find(found, "update", "emoji", "leaf-0.3-leaf_ce", "shots-0", p) for p in ("old", "new"))
    assert (old["n"], fresh["n"]) == (180, 60)
    whole = find(found, "main", "emoji", "leaf_ce")
    mixed = (180 * old["scores"]["leaf@bottom_up"][0] + 60 * fresh["scores"]["leaf@bottom_up"][0]) / 240
    assert mixed == pytest.approx(whole["by_seed"]["leaf@bottom_up"][0], abs=1e-5)
    assert fresh["facts"]["new leaves"] == 6


def test_what_is_no_study_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no finished run"):
        write_page("lora", [tmp_path], tmp_path / "page.md")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="is no reduced study"):
        write_page("lora", [tmp_path / "other.json"], tmp_path / "page.md")
    with pytest.raises(DataError, match="takes one source, got 2"):
        write_page("lora", [tmp_path, tmp_path], tmp_path / "page.md")
