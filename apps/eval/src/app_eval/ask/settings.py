"""What each command reads; the module is light, for `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Selector:
    """One way to choose demonstrations.

    Attributes:
        help: one line.
        run: `module:function` below `app_eval.ask`, from a `Request` to a `DemoSelection` and notes for the result.
        last: whether the most relevant stands last in the prompt, nearest to the question.
    """

    help: str
    run: str
    last: bool = False


SELECTORS: dict[str, Selector] = {
    "hyperbolic": Selector("near on a Lorentz manifold, general ones first", "select:hyperbolic", last=True),
    "rices": Selector("most similar, the best last", "select:rices", last=True),
    "topk": Selector("most similar, the best first", "select:topk"),
    "mmices": Selector("of the 200 most similar pictures those with the most similar question", "select:mmices"),
    "random": Selector("at random", "select:at_random"),
}
SelectorName = Literal[tuple(SELECTORS)]  # type: ignore[valid-type]
# Cosine of picture and question stands beside the selectors as a control: what anchors see, without anchors.
ControlName = Literal[(*(name for name in SELECTORS if name != "hyperbolic"), "cosine")]  # type: ignore[valid-type]
TaskName = Literal["vqav2", "okvqa", "coco-caption", "caption-editing", "image-text-matching", "visual-reasoning"]

Run = Annotated[Path, tyro.conf.Positional]
Count = Annotated[int, tyro.conf.arg(aliases=("-k",))]
Pictures = Annotated[tuple[Path, ...], tyro.conf.Positional]


@dataclass(frozen=True)
class Predict:
    """Print the path of each picture through the tree, level by level, with probabilities."""

    run: Run
    """A run folder, or a saved adapter."""
    pictures: Pictures = ()
    """Picture files, and folders of them."""
    decoder: Literal["joint_path", "bottom_up", "top_down", "level_argmax", "crm", "threshold"] | None = None
    """How scores become a path; as the run chose if not given."""
    tau: float | None = None
    """Least probability of a node (decoder threshold); one half if not given."""
    top: int | None = None
    """Print the paths of so many leaves, best first, in place of one path."""
    within: str = ""
    """Choose below this node of the taxonomy only: its name, or its full path such as animal/dog."""
    format: Literal["text", "csv", "jsonl"] = "text"
    """One line a path; csv and jsonl name file, rank, and names and probabilities by level."""
    out: Path | None = None
    """Write here in place of standard output."""
    tables: Path | None = None
    """Folder for classes.csv and confusion.csv; the folder that holds a picture is taken for its class."""
    export: Path | None = None
    """Write the whole model to this file as well: FILE.onnx, or FILE.safetensors for the merged weights of a LoRA run."""
    max_megapixels: float | None = None
    """Millions of pixels; larger pictures are refused, those of over 89 if not given."""


@dataclass(frozen=True)
class Check:
    """Say what would spoil a result on your own pictures; the exit status is 1 if something would."""

    data: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of pictures; --taxonomy alone is checked without one."""
    taxonomy: Path | None = None
    """Table or JSON tree; the nested folders themselves if not given; wordnet: or wordnet:FOLDER suggests one to read."""
    listing: tuple[Path, ...] = ()
    """Lists of pictures in place of class folders; of several each is the part of its name."""
    listing_columns: str = ""
    """Names of the columns of the lists, such as path=image_id,label=order+family+species,split=fold."""
    outside: bool = False
    """Let the lists name files that do not lie in the folder."""
    max_bad_fraction: float = 0.01
    """Budget of unreadable files, as a share; ten are always allowed."""
    quick: bool = False
    """Read only the head of each file, which misses truncated ones."""
    max_megapixels: float | None = None
    """Millions of pixels; larger pictures are left out, those of over 89 if not given."""
    cache_dir: Path | None = None
    """Where hashes of the files are kept; the user's cache folder if not given."""
    json: bool = False
    """Print JSON in place of the page."""


@dataclass(frozen=True)
class Caption:
    """Describe pictures with a trained blip-mini."""

    run: Run
    """A run folder, or a saved model of stage 2."""
    pictures: Pictures
    """Picture files."""


@dataclass(frozen=True)
class Search:
    """Find the pictures of a folder that fit a text best."""

    run: Run
    """A run folder, or a saved model of stage 1."""
    text: Annotated[str, tyro.conf.Positional]
    """What to look for."""
    data: Path
    """Folder of pictures, searched with its subfolders."""
    top: int = 5
    """How many to print."""


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How demonstrations are chosen."""

    k: Count = 4
    """Demonstrations a query."""
    method: SelectorName = "hyperbolic"
    """How to choose them."""
    seed: int = 0
    """Of "random" and of the training of the lift."""
    encoder: str | None = None
    """What turns pictures into features: a locator such as hf:openai/clip-vit-base-patch32 or open_clip:ViT-B-32/openai; the
    EfficientNet-Lite0 of the pip packages if not given."""
    cache_dir: Path | None = None
    """Where features of the pool and the lift are kept; the user's cache folder if not given."""


@dataclass(frozen=True, kw_only=True)
class Select(Choosing):
    """Choose demonstrations for pictures from your own pool."""

    data: Path
    """The pool: a folder of pictures, or JSON lines with image, question, answer."""
    query: tuple[Path, ...]
    """Pictures to choose for."""
    mu: float = 0.3
    """Weight of the depth (method hyperbolic)."""
    diversity: float = 0.0
    """0 to 1: maximal marginal relevance (method hyperbolic)."""
    question: str = ""
    """What is asked about the queries (method mmices)."""
    out: Path | None = None
    """Write the result here as JSON; - prints JSON in place of the table."""


@dataclass(frozen=True, kw_only=True)
class Answer(Choosing):
    """Answer questions about pictures with demonstrations from your own pool; one JSON line for each answer."""

    pool: Path
    """JSON lines with image, question, answer; or a folder, whose subfolders' names are the answers to your question."""
    model: str
    """An image-text model: a folder, a name on the hub, or the URL of an OpenAI-compatible server, as URL#NAME if it wants one."""
    image: tuple[Path, ...] = ()
    """Pictures to ask about."""
    question: str = ""
    """What is asked about each of them."""
    batch: Path | None = None
    """JSON lines with image (relative to the file) and question, in place of --image and --question."""
    calibrate: bool = False
    """Weigh demonstrations by their hyperbolic distance from the picture; needs the model here, not a URL."""
    max_new_tokens: int = 32
    """Longest answer."""
    outside: bool = False
    """Let the files name pictures elsewhere that a server would get."""
    out: Path | None = None
    """Write the lines here in place of standard output."""


@dataclass(frozen=True)
class EvalIcl:
    """A table of in-context learning: tasks x selectors x demonstrations x curvature x anchors, calibration, both; or, of a trained
    icl-mini without --preset and --data, the study of its results page.
    """

    model: Annotated[str, tyro.conf.Positional]
    """An image-text model: a folder, a name on the hub, or the folder of a finished run of icl-mini."""
    out: Path | None = None
    """Folder of the table, whose finished cells are not computed again; for the study a JSON file."""
    data: tuple[str, ...] = ()
    """Folder with a folder for each task, in the layout of its release; or TASK:DIR for a task that lies elsewhere."""
    preset: Literal["note", "published", "mini"] | None = None
    """note: the 24 cells of the note's table; published: the paper's configuration; mini: all six tasks from emoji and easy-VQA, which
    need no --data. What is given beside it holds."""
    tasks: tuple[TaskName, ...] | None = None
    """Which tasks; all six if not given."""
    selectors: tuple[ControlName, ...] | None = None
    """Ways to choose without anchors: those of `hier select`, and cosine of picture and question together."""
    methods: tuple[Literal["anchors", "calibration", "both"], ...] | None = None
    """anchors: demonstrations near in hyperbolic space; calibration: those of --against, weighed by it; both."""
    curvature: tuple[float, ...] | None = None
    """Of anchors and calibration; 0 is the Euclidean twin, without depth."""
    k: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=("-k",))] = None
    """Numbers of demonstrations; 4 if not given."""
    against: ControlName | None = None
    """The row that all others are compared with; rices if not given."""
    strength: float = 1.0
    """lambda of the calibration."""
    seeds: int | None = None
    """Seeds of random demonstrations and of the anchors; 3 if not given."""
    queries: int | None = None
    """Questions of each task, drawn by a fixed seed; 200 if not given, 0 for all."""
    pool: int | None = None
    """Demonstrations to choose from, drawn likewise; 2,048 if not given, 0 for all."""
    adapter: Path | None = None
    """Folder of the published adapter (`hier train icl-adapter`): a row without demonstrations."""
    batch: int = 1
    """Questions that are answered at once."""
    plan: bool = False
    """Print the cells with memory and hours, computed and not measured, and compute nothing."""
    tflops: float = 60.0
    """For --plan: TFLOP/s that the card sustains."""
    cache_dir: Path | None = None
    """Where pictures and features are kept; the user's cache folder if not given."""
    emoji: bool = True
    """Study: also name emoji; else easy-VQA alone."""
    quick: bool = False
    """Study: tiny sizes: does it run."""


@dataclass(frozen=True)
class EvalBlip:
    """Judge any BLIP-2, Euclidean or hyperbolic: retrieval, captions, and what its radius knows."""

    model: Run
    """Folder of a run or of a model, ours or of Hugging Face's Blip2 classes; or a .pth of LAVIS, with --base."""
    data: Path
    """Captions in the form of Karpathy, LAVIS, COCO or nocaps, or a table or tar archive of your own; or a folder with one."""
    out: Path
    """Folder for the numbers; the same command goes on from what it holds."""
    pictures: Path | None = None
    """Folder of pictures; that of the captions if not given."""
    base: Path | None = None
    """For a .pth of LAVIS: a folder of Hugging Face's classes with the frozen parts, the configuration and the processor."""
    tasks: tuple[Literal["retrieval", "captions", "radius"], ...] = ()
    """What to measure; all that the model can do if not given."""
    against: Path | None = None
    """The --out of another model on the same data: paired differences to it."""
    split: str = "test"
    """Part of the data, where they have parts."""
    limit: int | None = None
    """Take the first so many pictures."""
    rerank: int = 128
    """Candidates that the matching head scores, for each picture and for each text; 0 leaves it out."""
    batch_size: int = 16
    """Pictures, texts or pairs in one pass."""
    device: str = ""
    """Such as cuda:0 or cpu; a GPU where there is one if not given."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; that of the files if not given."""
    cache_dir: Path | None = None
    """Where archives are unpacked and hashes kept; the user's cache folder if not given."""


@dataclass(frozen=True)
class EvalSelection:
    """Judge selectors on easy-VQA and emoji without a language model; about ten minutes on one core."""

    out: Path
    """JSON file for the numbers."""
    quick: bool = False
    """Tiny sizes: does it run."""


@dataclass(frozen=True)
class Page:
    """Write a results page from stored results."""

    story: Annotated[Literal["emoji", "lora", "tree", "mat", "blip", "icl"], tyro.conf.Positional]
    """Which page."""
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders or JSON files, and last the Markdown file to write."""
    model: Path | None = None
    """icl: the JSON of `hier eval icl`."""
    distilled: Path | None = None
    """icl: the result.json of icl-distill on that model."""
