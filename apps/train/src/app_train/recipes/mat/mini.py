"""Recipe `mat-mini`: prompts of Modality Alignment across Trees on a small CLIP, scored on emoji by an unseen artist.

    hier train mini-clip                     first: trains the model
    hier train mat-mini --variant VANILLA PROTECT EUCLIDEAN HETEROGENEOUS --seeds 3

The path of the paper, at small size: class tokens of three of the six blocks, MaPLe or PromptSRC prompts in both towers,
the rest frozen. Differences from the published configurations: AdamW, few epochs, prompts no deeper than the text tower.
Controls: zero-shot (the model with its prompt, nothing tuned) and the nearest picture. Features of the test pictures are
moved so that their mean is that of the training pictures, depth by depth: a new artist moves all pictures alike. A row is
twenty steps of one to two seconds, and the scoring of 3,412 pictures.
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app_data.read.pictures import PictureSet
from app_data.sets.cifar100 import StoredTree
from app_data.sets.emoji import load_emoji
from app_data.store.sealed import is_whole, new_sealed_folder
from app_eval.measure.cells import finished
from app_eval.measure.embed import neighbour_logits
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.errors import RunError
from app_train.core.records import read_records
from app_train.core.run_folder import Run
from app_train.recipes.lora.task import cuts_for
from app_train.recipes.mat.data import TEST_ARTIST, TRAIN_ARTISTS
from app_train.recipes.mat.results import CONTROLS, conclude, folder_name, geometry, store, summarise, table
from app_train.recipes.mat.rows import VARIANTS, Row
from app_train.recipes.mat.settings import MATMiniConfig
from app_train.recipes.mat.tune import build_model, encode, encode_labels, load_clip, score, train_prompts
from mat_align import VANILLA, MATModel, MATObjective


def run(config: MATMiniConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if not config.clip.is_dir():
        raise RunError(f"--clip: {config.clip} is no folder; make it with hier train mini-clip")
    clip = load_clip(config.settings(0), None)
    size = clip.visual.image_size[0]
    train, test = (load_emoji(a, size=size, cache_dir=config.cache_dir) for a in (TRAIN_ARTISTS, (TEST_ARTIST,)))
    if config.limit is not None:
        train, test = (part.select(range(min(config.limit, len(part)))) for part in (train, test))
    stored = StoredTree(train.taxonomy, train.node_text, cuts_for(train.taxonomy))
    weights = hashlib.sha256((config.clip / "open_clip_model.safetensors").read_bytes()).hexdigest()[:12]
    names = (*CONTROLS, *config.variant)
    folders = {n: [config.out / folder_name(n) / f"seed-{seed}" for seed in range(config.seeds)] for n in names}
    with Run("mat-mini", config, ("seeds", "variant"), processes=False) as run:
        run.claim(f"{train.fingerprint}-{test.fingerprint}-{weights}")
        if (known := run.result()) is not None:
            print(table(known))  # noqa: T201
            return known
        work = _Work(config, run, clip, train, test, stored)
        results = {
            n: [work.row(n, seed, folder) for seed, folder in enumerate(places)] for n, places in folders.items()
        }
        facts = {
            "shots": len(set(train.styles)), "tower": f"mini-{config.method}", "num_train": len(train), "size": size,
            "settings": config.settings(0).model_dump(), **summarise(results, folders, test, stored.cuts), "data": "emoji",
        }  # fmt: skip
        return conclude(run, "main", facts)


@dataclass(frozen=True)
class _Work:
    """What all rows share."""

    config: MATMiniConfig
    run: Run
    clip: torch.nn.Module
    train: PictureSet
    test: PictureSet
    stored: StoredTree

    def row(self, name: str, seed: int, folder: Path) -> dict:
        """The content of a row's `result.json`; a finished row is read back."""
        facts = self.run.facts(name, seed)
        if (known := finished(folder, facts)) is not None:
            return known
        return self._control(name, folder, facts) if name in CONTROLS else self._trained(name, folder, facts)

    def _control(self, name: str, folder: Path, facts: dict) -> dict:
        stored = self.stored
        plain = MATModel(self.clip, None, VANILLA).eval()
        seen, new = _tokens(plain, self.train, self.test)
        if name == "zero-shot":
            logits = score(plain, new, encode_labels(plain, stored.node_text))
        else:
            logits = neighbour_logits(seen[:, -1], torch.from_numpy(self.train.targets), new[:, -1], stored.taxonomy)
        return store(folder, logits, self.test, stored.cuts, facts)

    def _trained(self, name: str, folder: Path, facts: dict) -> dict:
        settings, stored, saved = self.config.settings(facts["seed"]), self.stored, folder / "model"
        if is_whole(saved):  # killed while scoring: the trained prompts are there, whole
            model = MATModel.from_pretrained(saved, self.clip)
        else:
            model = build_model(settings, self.clip, Row(VARIANTS[name]))
            train_prompts(model, settings, self.train, stored, self.run, folder)
            with new_sealed_folder(saved, [folder / "metrics.jsonl"]) as target:
                model.save_pretrained(target)
        model.eval()
        facts["num_trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        _, new = _tokens(model, self.train, self.test)
        text = encode_labels(model, stored.node_text)
        objective = MATObjective(stored.taxonomy, names=stored.node_text)
        exact, target = copy.deepcopy(model).double(), torch.from_numpy(self.test.targets)
        facts |= geometry(exact, objective, new.double(), text.double(), target, read_records(folder / "metrics.jsonl"))
        result = store(folder, score(model, new, text), self.test, stored.cuts, facts)
        remove_checkpoints(folder)
        return result


@torch.no_grad()
def _tokens(model: MATModel, train: PictureSet, test: PictureSet) -> tuple[Tensor, Tensor]:
    """Tokens of the training pictures, and those of the test pictures moved onto their mean."""
    seen, new = encode(model, train), encode(model, test)
    return seen, new - new.mean(0) + seen.mean(0)
