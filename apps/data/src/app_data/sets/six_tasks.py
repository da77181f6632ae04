"""The six tasks of `hier eval icl` by name, each read from a folder in its release's layout.

VQAv2 (Goyal et al., 2017), OK-VQA (Marino et al., 2019), COCO captions (Chen et al., 2015), COCO-EE (Wang et al., 2022), SugarCrepe
(Hsieh et al., 2023) and NLVR2 (Suhr et al., 2019).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app_data.read.labelled import Decoding
from app_data.read.splits import some
from app_data.sets.captions import caption_sets
from app_data.sets.coco import find_captions
from app_data.sets.demonstration_tasks import (
    IclTask,
    caption_task,
    load_caption_editing,
    load_image_text_matching,
    load_nlvr2,
    vqa_task,
)
from app_data.sets.vqa import load_vqa
from app_data.store.errors import DataError

_COCO = {"train": "train2014", "val": "val2014"}
_EDITING = {"train": "train", "val": "test"}
_NLVR2 = {"train": "train", "val": "dev"}

Load = Callable[[Path, str, Decoding, int | None], IclTask]


@dataclass(frozen=True)
class TaskLayout:
    """One task.

    Attributes:
        title: What it is, in a line.
        files: What its folder holds.
        load: From the folder, "train" or "val", a decoding and a number of items (None for all) to the part.
        whole: Whether the release has one part: what is asked is drawn from it, and no picture serves its own question.
    """

    title: str
    files: str
    load: Load
    whole: bool = False


def _vqa(name: str, prefix: str) -> Load:
    """VQAv2's files begin with v2_, OK-VQA's do not."""

    def load(folder: Path, part: str, decoding: Decoding, num: int | None) -> IclTask:
        year = _COCO[part]
        files = (f"{prefix}OpenEnded_mscoco_{year}_questions.json", f"{prefix}mscoco_{year}_annotations.json")
        return vqa_task(load_vqa(*(folder / file for file in files), folder, decoding, num=num), name)

    return load


def _captions(folder: Path, part: str, decoding: Decoding, num: int | None) -> IclTask:
    year = _COCO[part]
    files = find_captions(folder / "annotations" / f"captions_{year}.json", folder / year)
    return caption_task(caption_sets(some(files, num), decoding)["test"], "coco-caption")


def _editing(folder: Path, part: str, decoding: Decoding, num: int | None) -> IclTask:
    # All pictures of COCO-EE, those of its test part too, are of COCO's training part.
    return load_caption_editing(folder / f"COCO_EE_{_EDITING[part]}.json", folder / "train2014", decoding, num=num)


def _matching(folder: Path, part: str, decoding: Decoding, num: int | None) -> IclTask:
    if not any((folder / "data").glob("*.json")):
        raise DataError(f"the folder {folder / 'data'} holds no JSON file: give a folder of SugarCrepe")
    return load_image_text_matching(folder / "data", folder / "val2017", decoding, num=num)


def _reasoning(folder: Path, part: str, decoding: Decoding, num: int | None) -> IclTask:
    pictures = folder / "images" / "train" if part == "train" else folder / "dev"
    return load_nlvr2(folder / "data" / f"{_NLVR2[part]}.json", pictures, decoding, name="visual-reasoning", num=num)


TASKS: dict[str, TaskLayout] = {
    "vqav2": TaskLayout(
        "VQAv2",
        "v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json, train2014/, val2014/",
        _vqa("vqav2", "v2_"),
    ),
    "okvqa": TaskLayout(
        "OK-VQA",
        "OpenEnded_mscoco_{train,val}2014_questions.json, mscoco_{train,val}2014_annotations.json, train2014/, val2014/",
        _vqa("okvqa", ""),
    ),
    "coco-caption": TaskLayout(
        "COCO caption", "annotations/captions_{train,val}2014.json, train2014/, val2014/", _captions
    ),
    "caption-editing": TaskLayout(
        "caption editing (COCO-EE)", "COCO_EE_{train,test}.json, train2014/", _editing
    ),
    "image-text-matching": TaskLayout(
        "image-text matching (SugarCrepe)", "data/*.json, val2017/", _matching, whole=True
    ),
    "visual-reasoning": TaskLayout(
        "visual reasoning (NLVR2)", "data/{train,dev}.json, images/train/, dev/", _reasoning
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Demonstrations and questions of a task.

    Attributes:
        pool: What demonstrations are taken from.
        queries: What is asked.
        shared: Whether both are of one part, whose `groups` then say which item may not serve which question.
    """

    pool: IclTask
    queries: IclTask
    shared: bool


def load_parts(
    name: str, folder: Path, decoding: Decoding, num_pool: int | None = None, num_queries: int | None = None
) -> Parts:
    """Pool and questions of a task.

    Args:
        name: One of `TASKS`.
        folder: In the layout of the release, see `TaskLayout.files`.
        decoding: Size, cache and budget of bad files.
        num_pool: So many demonstrations; None for all. See `some`.
        num_queries: So many questions; None for all.

    Raises:
        DataError: The folder or a file is missing or of another form, a question has no answer to be scored against, or no
            demonstration has one.
        TooManyBadFiles: More unreadable pictures than the budget.
    """
    layout = TASKS[name]
    if not folder.is_dir():
        raise DataError(f"the folder {folder} of {layout.title} does not exist; it is to hold {layout.files}")
    if layout.whole:
        num = None if num_pool is None or num_queries is None else num_pool + num_queries
        pool = layout.load(folder, "val", decoding, num)
        queries = pool.select(some(range(len(pool)), num_queries))
    else:
        pool = layout.load(folder, "train", decoding, num_pool)
        queries = layout.load(folder, "val", decoding, num_queries)
    lacking = next((i for i, found in enumerate(queries.references) if not found), None)
    if lacking is not None:
        raise DataError(f"question {queries.ids[lacking]} of {layout.title} in {folder} has no answer to compare with")
    return Parts(pool, queries, layout.whole)
