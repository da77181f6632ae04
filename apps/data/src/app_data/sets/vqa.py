"""Questions about pictures: VQAv2 (Goyal et al., 2017) and OK-VQA (Marino et al., 2019) as released, and easy-VQA.

easy-VQA (Zhou, 2019) is a pip package of 5,000 drawings of one shape each with yes/no, colour and shape questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from app_data.read.labelled import Decoding, PictureFile, decode_files
from app_data.read.pictures import StoredPictures
from app_data.read.splits import some
from app_data.store.assets import asset_path
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError, Skipped
from app_data.store.text import read_json


class Asked(NamedTuple):
    """One item of a `QuestionSet`."""

    pixels: np.ndarray
    question: str
    answers: tuple[str, ...]
    id: int


@dataclass(frozen=True)
class QuestionSet(StoredPictures):
    """Questions about pictures; indexing gives an `Asked`. Several questions share one stored picture.

    Attributes:
        questions: The questions.
        answers: What people answered to each, ten in VQAv2 and OK-VQA; empty where answers are withheld.
        ids: The data set's number of each question, for result files.
        image_ids: The data set's number of each question's picture: the group that must not answer for itself.
        kinds: Kind of each answer: "yes/no", "number" or "other", or the data set's own.
        fingerprint: Changes whenever pictures or questions do.
        skipped: Pictures left out while reading, with reasons; their questions are left out too.
    """

    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    ids: tuple[int, ...]
    image_ids: tuple[int, ...]
    kinds: tuple[str, ...]
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()

    each: ClassVar[tuple[str, ...]] = ("questions", "answers", "ids", "image_ids", "kinds")

    def __getitem__(self, index: int) -> Asked:
        """The picture, question, answers and number at `index`."""
        pixels = np.array(self.store[self.rows[index]])
        return Asked(pixels, self.questions[index], self.answers[index], self.ids[index])

    def _identity(self, chosen: np.ndarray) -> list[int]:
        return [self.ids[i] for i in chosen]


class _Question(NamedTuple):
    question: str
    answers: tuple[str, ...]
    id: int
    image_id: int
    kind: str


def load_vqa(
    questions: str | Path,
    annotations: str | Path | None,
    root: str | Path,
    decoding: Decoding | None = None,
    *,
    name: str | None = None,
    answer_field: str = "answer",
    num: int | None = None,
) -> QuestionSet:
    """VQAv2 or OK-VQA, one part.

    Args:
        questions: `v2_OpenEnded_mscoco_val2014_questions.json`, `OpenEnded_mscoco_val2014_questions.json` or the like.
        annotations: `v2_mscoco_val2014_annotations.json` or the like; None for the test questions.
        root: The folder of COCO's pictures: `COCO_val2014_000000000042.jpg` in it, or in `val2014/` in it.
        decoding: Size, cache and budget of bad files; missing files count as bad.
        name: Form of the picture's names for other copies of COCO, such as "{image_id:012d}.jpg".
        answer_field: "answer", or "raw_answer" for OK-VQA's answers before stemming.
        num: See `some`; only their pictures are decoded.

    Returns:
        The questions in the order of the file.

    Raises:
        DataError: A missing file, a file of another form, or questions without annotation.
        TooManyBadFiles: More unreadable pictures than the budget.
    """
    root = Path(root)
    asked = read_json(questions)
    try:
        part = str(asked.get("data_subtype", ""))
        if set("{}/\\\0") & set(part):
            raise DataError(f"data_subtype of {questions} must be the name of a folder, got {part!r}")
        rows = [(row["question_id"], row["image_id"], row["question"]) for row in asked["questions"]]
        notes = {} if annotations is None else {n["question_id"]: n for n in read_json(annotations)["annotations"]}
        lacking = [] if annotations is None else [number for number, _, _ in rows if number not in notes]
        if lacking:
            raise DataError(
                f"question {lacking[0]} of {questions} has no annotation in {annotations}: give the same part"
            )
        items = [
            _Question(
                question,
                tuple(answer[answer_field] for answer in notes[number]["answers"]) if notes else (),
                number,
                image,
                notes[number].get("answer_type", "") if notes else "",
            )
            for number, image, question in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{questions} or its annotations are not in the VQA release's form ({error})") from error
    for item in items:
        if type(item.image_id) is not int or not all(isinstance(text, str) for text in (item.question, *item.answers)):
            raise DataError(f"question {item.id} of {questions} needs an image_id, a text and answers, got {item}")
    if name is None:
        name = f"COCO_{part}_" + "{image_id:012d}.jpg"
    folder = root / part if part and (root / part).is_dir() else root
    items = some(items, num)
    images = dict.fromkeys(item.image_id for item in items)
    files = {i: PictureFile(folder / name.format(image_id=i), name.format(image_id=i)) for i in images}
    return _question_set(items, files, decoding or Decoding(size=224))


def load_easy_vqa(decoding: Decoding | None = None) -> dict[str, QuestionSet]:
    """The easy-VQA set: 38,575 questions about 4,000 pictures, and 9,673 about 1,000 others; 13 answers.

    Args:
        decoding: Size and cache; 64 px if None, the size of the originals.

    Returns:
        "train" and "test". A question has one answer; its kind is "yes/no", "shape" or "color".

    Raises:
        MissingAssetError: `easy-vqa` is not installed.
    """
    shapes = {"circle", "rectangle", "triangle"}
    parts = {}
    for part in ("train", "test"):
        folder = asset_path("easy_vqa", f"data/{part}")
        items = [
            _Question(
                question,
                (answer,),
                number,
                image,
                "yes/no" if answer in ("yes", "no") else "shape" if answer in shapes else "color",
            )
            for number, (question, answer, image) in enumerate(read_json(folder / "questions.json"))
        ]
        images = sorted({item.image_id for item in items})
        files = {i: PictureFile(folder / "images" / f"{i}.png", f"{part}/{i}.png") for i in images}
        parts[part] = _question_set(items, files, decoding or Decoding(size=64))
    return parts


def _question_set(items: Sequence[_Question], files: dict[int, PictureFile], decoding: Decoding) -> QuestionSet:
    if not items:
        raise DataError("the release holds no question: give a file with questions")
    pixels, kept, skipped, key = decode_files(list(files.values()), decoding, missing_is_bad=True)
    images = list(files)
    row_of = {images[position]: row for row, position in enumerate(kept.tolist())}
    items = [item for item in items if item.image_id in row_of]
    return QuestionSet(
        store=pixels,
        rows=np.array([row_of[item.image_id] for item in items], dtype=np.int64),
        questions=tuple(item.question for item in items),
        answers=tuple(item.answers for item in items),
        ids=tuple(item.id for item in items),
        image_ids=tuple(item.image_id for item in items),
        kinds=tuple(item.kind for item in items),
        fingerprint=fingerprint({**key, "questions": [list(item) for item in items]}),
        skipped=skipped,
    )
