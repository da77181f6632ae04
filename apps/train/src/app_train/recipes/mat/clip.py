"""Recipe `mat-clip`: the table of Modality Alignment across Trees on CLIP weights, cell by cell.

    hier train mat-clip --data cifar100 --shots 1,16 --base maple,promptsrc --rows VANILLA PROTECT HETEROGENEOUS --seeds 3
    hier train mat-clip --data sun397 --shots 16 --novel            base and novel classes, and their harmonic mean
    hier train mat-clip --study layers --seeds 3                    which depths give tokens; the row without a text query
    hier train mat-clip --study cross                               a second tree over the same classes

--source DIR holds the data set or a folder for each, with the trees in or beside it; what is missing is said in a sentence with
where it comes from. Without --weights open_clip downloads its own. The few shots are chosen by file name and decoded alone. A cell
that is finished is not computed again: the same command, or one with more data sets, shots, bases, rows or seeds, goes on.
Controls: zero-shot, and the nearest training picture. No CLIP weights can be had here: what is tested is the path, on random ones.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app_data.read.folder import Found, load_found
from app_data.read.labelled import Decoding
from app_data.read.pictures import PictureSet
from app_data.sets.few_shot import FewShotFiles, find_few_shot
from app_data.store.atomic import write_json, write_text
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError
from app_data.store.features import weights_digest
from app_data.store.sealed import is_whole, new_sealed_folder, read_sealed, write_sealed
from app_eval.measure.cells import Parts, finished, keep
from app_eval.measure.embed import neighbour_logits
from app_eval.measure.tree_scores import tree_scores
from app_train.core.checkpoint import remove_checkpoints
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.mat.cells import ALL, BASE, NOVEL, cell_folder, compared, table
from app_train.recipes.mat.published import PublishedConfig, published
from app_train.recipes.mat.results import CONTROLS
from app_train.recipes.mat.rows import VARIANTS, Row, chosen_rows, study_rows, trained_as
from app_train.recipes.mat.second_tree import SecondTree, second_scores, superclasses
from app_train.recipes.mat.settings import MATClipConfig
from app_train.recipes.mat.tune import build_model, encode, encode_labels, load_clip, score, train_prompts
from mat_align import VANILLA, MATModel, released

# Settings that may grow, or move, from one command to the next: each cell says itself what it was computed from.
GROWS = ("data", "shots", "base", "study", "rows", "seeds", "novel", "source", "tree")
DESCRIPTION = "data.json"


def run(config: MATClipConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    config.check()
    rows = chosen_rows(study_rows(config.study, tuple(VARIANTS)), config.rows)
    if len(config.data) > 1 and config.tree is not None and not config.tree.is_dir():
        raise RunError(
            f"--tree must name the folder of the trees where there are several data sets, {config.tree} is none"
        )
    files = {n: find_few_shot(n, config.source, config.tree, config.cache_dir) for n in config.data}
    for name in config.data:
        for shots in config.shots:
            files[name].shots(shots, 1)  # a class that has too few is found before anything is trained
    with Run("mat-clip", config, GROWS, mixed_precision=config.mixed_precision, processes=False) as run:
        run.claim(f"see {DESCRIPTION} of each data set")
        for name, found in files.items():
            _describe(config.out / name / DESCRIPTION, found)
        if (known := run.result()) is not None:
            print(table(known))  # noqa: T201
            return known
        groups = [group for name in config.data for group in _Work(config, run, name, files[name], rows).groups()]
        content = run.finish({"study": config.study, "seeds": config.seeds, "novel": config.novel, "groups": groups})
        kind = f"{config.study}{'-novel' if config.novel else ''}"
        write_json(config.out / f"result-{kind}.json", content)
        write_text(config.out / f"table-{kind}.md", table(content))
        run.seal()
    print(f"{table(content)}\ntable: {config.out / f'table-{kind}.md'}")  # noqa: T201
    return content


def _describe(path: Path, files: FewShotFiles) -> None:
    """Write what a data set is, or refuse to mix two in one folder; say which classes nothing can be learned of."""
    tax = files.stored.taxonomy
    names = {part: [f.name for f in found.files] for part, found in (("train", files.train), ("test", files.test))}
    identity = fingerprint(
        {**names, "tree": [list(tax.names), tax.parent.tolist()], "text": list(files.stored.node_text)}
    )
    content = {
        "fingerprint": identity,
        "nodes": tax.num_nodes,
        "train": len(names["train"]),
        "test": len(names["test"]),
    }
    if path.exists() and (known := read_sealed(path)) != content:
        raise RunError(f"{path} belongs to other data ({known} -> {content}); choose another folder with --out")
    write_sealed(path, content)
    empty = len(tax.leaf) - len(np.unique(files.train.targets))
    if empty:
        print(  # noqa: T201
            f"warning: {empty} of the {len(tax.leaf)} classes have no training picture in {files.train.root}; they stay candidates",
            file=sys.stderr,
        )


@dataclass
class _Work:
    """The cells of one data set.

    Attributes:
        config, run: settings and run folder.
        name: of the data set.
        files: its pictures, none of them opened.
        rows: what is trained, by name.
        plain_tokens: tokens of the test pictures before anything is tuned, once a control has asked for them.
    """

    config: MATClipConfig
    run: Run
    name: str
    files: FewShotFiles
    rows: Mapping[str, Row]
    plain_tokens: dict[str, Tensor] | None = None

    @cached_property
    def clip(self) -> nn.Module:
        """The model with its weights."""
        return load_clip(self.settings(self.config.shots[0], self.config.base[0], 1), self.config.weights)

    @cached_property
    def weights(self) -> str:
        """What tells its weights from others."""
        return weights_digest(self.clip)

    @cached_property
    def sides(self) -> dict[str, FewShotFiles]:
        """The label sets: what is trained on is the first of them."""
        if not self.config.novel:
            return {ALL: self.files}
        tax = self.files.stored.taxonomy
        leaves = sorted(tax.leaf.tolist(), key=lambda leaf: tax.path_of(leaf)[::-1])
        half = (len(leaves) + 1) // 2
        return {part: self.files.under(some) for part, some in ((BASE, leaves[:half]), (NOVEL, leaves[half:]))}

    @cached_property
    def tests(self) -> dict[str, PictureSet]:
        """The test pictures of each label set."""
        return {part: self._decoded(side.test) for part, side in self.sides.items()}

    @property
    def trained(self) -> FewShotFiles:
        """The label set that is trained on."""
        return next(iter(self.sides.values()))

    def settings(self, shots: int, base: str, seed: int) -> PublishedConfig:
        """The published settings, with what the command exchanges."""
        config = self.config
        changes = {**config.fit.model_dump(), "model": config.model}
        known = published(self.name, shots, base)  # type: ignore[arg-type]
        return known.model_copy(update={k: v for k, v in changes.items() if v is not None} | {"seed": seed})

    def row(self, name: str) -> Row:
        """A row, with what the command exchanges."""
        config, row = self.config, self.rows[name]
        variant = row.variant
        if config.intermediate is not None and variant.curvature == "two":
            variant = replace(variant, intermediate=config.intermediate)
        return replace(
            row, variant=released(variant) if config.released else variant, radius=config.radius or row.radius
        )

    def groups(self) -> list[dict]:
        """Compute what is missing; all rows of every base and number of shots over the seeds."""
        config, seeds = self.config, range(1, self.config.seeds + 1)
        # Before any picture is decoded: a tower may have too few blocks for the prompts or the layers, or read too few tokens.
        for base in config.base:
            for name in self.rows:
                self._model(name, self.settings(config.shots[0], base, 1))
        cells: dict[tuple[int, str], dict[str, list[Path]]] = {}
        sizes = {}
        for shots in config.shots:
            for seed in seeds:
                train = self._decoded(self.trained.shots(shots, seed), max_bad_fraction=0, max_bad_files=0)
                sizes[shots] = len(train)
                for base in config.base:
                    for name in (*(c for c in CONTROLS if c != CONTROLS[1] or not config.novel), *self.rows):
                        folder = self._cell(name, shots, base, seed, train)
                        places = cells.setdefault((shots, base), {}).setdefault(name, [])
                        places += [folder] if folder not in places else []
        tax = self.files.stored.taxonomy
        return [
            compared(
                found,
                {
                    "data": self.name, "base": base, "shots": shots, "num_train": sizes[shots],
                    "num_test": sum(len(test) for test in self.tests.values()), "num_nodes": tax.num_nodes,
                },
            )
            for (shots, base), found in cells.items()
        ]  # fmt: skip

    def _cell(self, name: str, shots: int, base: str, seed: int, train: PictureSet) -> Path:
        self.run.check()
        home = name if name in CONTROLS else trained_as(self.rows[name])
        folder = cell_folder(self.config.out, self.name, base, home, shots, seed, self.config.novel)
        # The zero-shot model knows neither seed nor shots nor base, the nearest picture no base.
        known = {"set": self.name, "tests": [test.fingerprint for test in self.tests.values()], "weights": self.weights}
        if name != CONTROLS[0]:
            known |= {"shots": shots, "train": train.fingerprint}
        if name not in CONTROLS:
            known |= {"base": base}
        facts = self.run.facts(home, 1 if name == CONTROLS[0] else seed) | known
        done = finished(folder, facts)
        # A row that another study has trained lacks the scores on the second tree: it is scored again.
        if done is None or (self.config.study == "cross" and name not in CONTROLS and "second" not in done):
            try:
                parts, found = self._computed(name, folder, self.settings(shots, base, seed), train)
            except ValueError as error:
                if isinstance(error, RunError | DataError):
                    raise
                raise RunError(f"{self.name}, {base}, {name}, {shots} shots, seed {seed}: {error}") from error
            keep(folder, parts, facts | found)
            remove_checkpoints(folder)
        return folder

    def _computed(self, name: str, folder: Path, settings: PublishedConfig, train: PictureSet) -> tuple[Parts, dict]:
        stored = self.trained.stored
        if name in CONTROLS:
            plain = MATModel(self.clip, None, VANILLA).to(self.run.device).eval()
            if self.plain_tokens is None:
                self.plain_tokens = {part: self._encoded(plain, test) for part, test in self.tests.items()}
            if name == CONTROLS[0]:
                return self._scored(plain, self.plain_tokens)[0], {}
            test, new = self.tests[ALL], self.plain_tokens[ALL][:, -1]
            seen = self._encoded(plain, train)[:, -1]
            logits = neighbour_logits(seen, torch.from_numpy(train.targets), new, stored.taxonomy)
            return {ALL: tree_scores(logits, test.targets, stored.taxonomy, stored.cuts)}, {}
        second = None
        if self.config.study == "cross":
            second = superclasses(train, self.tests[ALL], stored.node_text)
        saved = folder / "model"
        if is_whole(saved):  # killed while scoring: the trained prompts are there, whole
            model = MATModel.from_pretrained(saved, self.clip).to(self.run.device)
            model.chunk_size = self.config.chunk_size
        else:
            model = self._model(name, settings).to(self.run.device)
            train_prompts(
                model, settings, train, stored, self.run, folder, self.config.released, accumulate=self.config.accumulate,
                second=second, trees=self.rows[name].trees, label=f"{name}, {settings.shots} shots, seed {settings.seed}",
            )  # fmt: skip
            with new_sealed_folder(saved, [folder / "metrics.jsonl"]) as target:
                model.save_pretrained(target)
        model.eval()
        facts = {
            "variant": model.variant.name,
            "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "curvatures": [c().item() for c in (model.c_img, model.c_txt) if c is not None],
        }
        parts, more = self._scored(
            model, {part: self._encoded(model, test) for part, test in self.tests.items()}, second
        )
        return parts, facts | more

    def _model(self, name: str, settings: PublishedConfig) -> MATModel:
        try:
            model = build_model(settings, self.clip, self.row(name), self.config.layers, self.config.chunk_size)
            model.tokens_of(self.files.stored.node_text)
            return model
        except ValueError as error:
            raise RunError(
                f"the row {name} cannot be built on {settings.model} with {settings.method}: {error}"
            ) from error

    def _scored(
        self, model: MATModel, tokens: Mapping[str, Tensor], second: SecondTree | None = None
    ) -> tuple[Parts, dict]:
        parts, more = {}, {}
        for part, side in self.sides.items():
            test, stored = self.tests[part], side.stored
            logits = score(model, tokens[part], self._labels(model, stored.node_text))
            parts[part] = tree_scores(logits, test.targets, stored.taxonomy, stored.cuts)
            if second is not None:
                other = score(model, tokens[part], self._labels(model, second.names))
                more = {"second": second_scores(logits, other, test, second)}
        return parts, more

    def _encoded(self, model: MATModel, pictures: PictureSet) -> Tensor:
        with self.run.accelerator.autocast():
            return encode(model, pictures)

    def _labels(self, model: MATModel, names: Sequence[str]) -> Tensor:
        with self.run.accelerator.autocast():
            return encode_labels(model, names)

    def _decoded(self, found: Found, **budget: float) -> PictureSet:
        """The pictures at the size of the model; no shot may be missing, so that none is left out."""
        size = self.clip.visual.image_size[0]
        decoding = Decoding(size, cache_dir=self.config.cache_dir, **budget)
        (pictures,) = load_found(found, decoding, allow_empty_classes=True).values()
        return pictures
