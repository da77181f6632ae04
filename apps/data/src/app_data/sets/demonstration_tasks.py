"""Data sets as tasks of in-context learning: pictures, a prompt, the answer a demonstration shows, and what is scored.

VQAv2, OK-VQA, easy-VQA and captioning come from the sets of `vqa` and `captions`. Read here: caption editing (COCO-EE and
Flickr30K-EE, Wang et al., "Explicit image caption editing", ECCV 2022), image-text matching (SugarCrepe, Hsieh et al.,
NeurIPS 2023), and visual reasoning over two pictures (NLVR2, Suhr et al., ACL 2019).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app_data.read.labelled import Decoding, PictureFile, decode_files
from app_data.read.splits import some
from app_data.sets.captions import CaptionSet
from app_data.sets.vqa import QuestionSet
from app_data.store.cache import fingerprint
from app_data.store.errors import DataError, Skipped
from app_data.store.text import read_json, read_jsonl


@dataclass(frozen=True)
class IclTask:
    """Items of one task; each can be a demonstration or a query.

    Attributes:
        name: What the task is called in results.
        score: How answers are scored: "vqa" (VQA accuracy), "cider" (CIDEr-D) or "exact" (exact match).
        store: All decoded pictures (m, size, size, 3) uint8.
        rows: For each item the rows of its pictures, one or two.
        prompts: What is asked, after the pictures.
        answers: What a demonstration shows as the answer; empty where answers are withheld.
        references: What a generated answer is scored against.
        groups: Number of each item's picture, so that no picture answers for itself.
        ids: The data set's own names, for result files.
        skipped: Pictures left out while reading, with reasons; their items are left out too.
        fingerprint: Changes whenever pictures or texts do; "" where nobody keeps results of the task.
    """

    name: str
    score: str
    store: np.ndarray
    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    groups: tuple[int, ...]
    ids: tuple[int | str, ...]
    skipped: tuple[Skipped, ...] = ()
    fingerprint: str = ""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.rows)

    def pictures(self, index: int) -> tuple[np.ndarray, ...]:
        """The pictures of an item, uint8 (size, size, 3) each."""
        return tuple(np.array(self.store[row]) for row in self.rows[index])

    def content(self, index: int) -> list[dict[str, Any]]:
        """The item's question as the content of a chat message: its pictures, then its prompt."""
        shown = [{"type": "image", "image": Image.fromarray(picture)} for picture in self.pictures(index)]
        return [*shown, {"type": "text", "text": self.prompts[index]}]

    def select(self, chosen: Sequence[int]) -> "IclTask":
        """Some of the items; pictures stay."""
        columns = ("rows", "prompts", "answers", "references", "groups", "ids")
        own = {column: tuple(getattr(self, column)[i] for i in chosen) for column in columns}
        return replace(self, **own, fingerprint=fingerprint({"of": self.fingerprint, "items": own["ids"]}))

    def demo(self, index: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The item as a demonstration: contents of the user's and of the assistant's message.

        Raises:
            DataError: The answers of this set are withheld.
        """
        if not self.answers[index]:
            raise DataError(
                f"item {self.ids[index]} of {self.name} has no answer: take demonstrations from another part"
            )
        return self.content(index), [{"type": "text", "text": self.answers[index]}]


def vqa_task(data: QuestionSet, name: str = "vqa") -> IclTask:
    """Questions with short answers; a demonstration shows the first answer, as OpenFlamingo's does."""
    return _of(data, name, "vqa", data.questions, data.answers, data.image_ids)


def caption_task(data: CaptionSet, name: str = "caption") -> IclTask:
    """Captioning; a demonstration shows the first caption."""
    asked = ("Describe the picture.",) * len(data.rows)
    return _of(data, name, "cider", asked, data.captions, tuple(int(row) for row in data.rows))


def _of(
    data: QuestionSet | CaptionSet, name: str, score: str, prompts: tuple[str, ...], references: tuple, groups: tuple
) -> IclTask:
    shown = tuple(found[0] if found else "" for found in references)
    rows = tuple((int(row),) for row in data.rows)
    return IclTask(
        name, score, data.store, rows, prompts, shown, references, groups, data.ids, data.skipped, data.fingerprint
    )


def load_caption_editing(
    path: str | Path,
    root: str | Path,
    decoding: Decoding | None = None,
    *,
    image_name: str = "COCO_train2014_{image_id:012d}.jpg",
    name: str = "caption-editing",
    num: int | None = None,
) -> IclTask:
    """COCO-EE or Flickr30K-EE, one part: mend a caption that does not quite fit the picture.

    Args:
        path: JSON, a list of {"image_id", "Ref-Cap", "GT-Cap"}.
        root: The folder of pictures.
        decoding: Size, cache and budget of bad files; 224 px if None.
        image_name: Form of the picture's names, with `image_id`; "{image_id}.jpg" for Flickr30K-EE.
        name: The task's name.
        num: See `some`.

    Raises:
        DataError: A missing file, a file of another form, or one without items.
        TooManyBadFiles: More unreadable pictures than the budget.
    """
    items = []
    for number, row in enumerate(_rows(read_json(path), path)):
        image, before, after = _fields(row, ("image_id", "Ref-Cap", "GT-Cap"), number, path)
        items.append(_Item((_file_name(image_name, image, path),), f"Correct this caption: {before}", after, number))
    return _task(name, "cider", some(items, num), root, decoding)


def load_image_text_matching(
    path: str | Path,
    root: str | Path,
    decoding: Decoding | None = None,
    *,
    name: str = "image-text-matching",
    num: int | None = None,
) -> IclTask:
    """SugarCrepe: whether a caption fits the picture. Two items an entry, one yes and one no.

    Args:
        path: JSON, {"0": {"filename", "caption", "negative_caption"}, ...}, or a list of such entries; or the folder of the
            release's seven files, of all that are there.
        root: The folder of pictures (COCO val2017).
        decoding: Size, cache and budget of bad files; 224 px if None.
        name: The task's name.
        num: See `some`.

    Raises:
        DataError: A missing file, a file of another form, or one without items.
        TooManyBadFiles: More unreadable pictures than the budget.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    items = []
    for file in files:
        content, prefix = read_json(file), f"{file.stem}-" if path.is_dir() else ""
        rows = list(content.items()) if isinstance(content, dict) else list(enumerate(_rows(content, file)))
        for number, row in rows:
            picture, right, wrong = _fields(row, ("filename", "caption", "negative_caption"), number, file)
            for caption, answer, kind in ((right, "yes", "positive"), (wrong, "no", "negative")):
                prompt = f"Does this caption describe the picture? {caption}"
                items.append(_Item((str(picture),), prompt, answer, f"{prefix}{number}-{kind}"))
    return _task(name, "exact", some(items, num), root, decoding)


def load_nlvr2(
    path: str | Path,
    root: str | Path,
    decoding: Decoding | None = None,
    *,
    name: str = "nlvr2",
    num: int | None = None,
) -> IclTask:
    """NLVR2, one part: whether a sentence is true of two pictures.

    Args:
        path: JSON lines with "identifier" (`dev-850-0-0`), "sentence" and "label" ("True" or "False").
        root: The folder of pictures, `dev-850-0-img0.png` and `dev-850-0-img1.png`; folders such as `images/train/12/` of
            the training part may stand below it, named by "directory".
        decoding: Size, cache and budget of bad files; 224 px if None.
        name: The task's name.
        num: See `some`.

    Raises:
        DataError: A missing file, a file of another form, or one without items.
        TooManyBadFiles: More unreadable pictures than the budget.
    """
    items = []
    for number, row in enumerate(read_jsonl(path), 1):
        identifier, sentence, label = _fields(row, ("identifier", "sentence", "label"), number, path)
        if str(label) not in ("True", "False"):
            raise DataError(f"item {number} of {path} must have the label True or False, got {label!r}")
        stem = str(identifier).rsplit("-", 1)[0]
        if "directory" in row:
            stem = f"{row['directory']}/{stem}"
        files = (f"{stem}-img0.png", f"{stem}-img1.png")
        answer = "yes" if str(label) == "True" else "no"
        items.append(_Item(files, f"Is this true of the two pictures? {sentence}", answer, identifier))
    return _task(name, "exact", some(items, num), root, decoding)


@dataclass(frozen=True)
class _Item:
    files: tuple[str, ...]
    prompt: str
    answer: str
    id: int | str


def _rows(content: Any, path: str | Path) -> list[Any]:
    if not isinstance(content, list):
        raise DataError(f"{path} must be a JSON list, got {type(content).__name__}")
    return content


def _fields(row: Any, keys: Sequence[str], number: int | str, path: str | Path) -> list[Any]:
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise DataError(f"item {number} of {path} lacks {', '.join(missing)}")
    wrong = next((key for key in keys if not isinstance(row[key], str | int)), None)
    if wrong is not None:
        raise DataError(f"item {number} of {path} must have a text or a number as {wrong}, got {row[wrong]!r}")
    return [row[key] for key in keys]


def _file_name(form: str, image_id: Any, path: str | Path) -> str:
    number = int(image_id) if ":012d" in form and str(image_id).isdigit() else image_id
    try:
        return form.format(image_id=number)
    except (ValueError, KeyError) as error:
        raise DataError(f"image_name {form!r} does not fit the image_id {image_id!r} of {path} ({error})") from error


def _task(name: str, score: str, items: list[_Item], root: str | Path, decoding: Decoding | None) -> IclTask:
    if not items:
        raise DataError(f"the file of {name} holds no item")
    names = list(dict.fromkeys(file for item in items for file in item.files))
    files = [PictureFile(Path(root) / file, file) for file in names]
    pixels, kept, skipped, key = decode_files(files, decoding or Decoding(size=224), missing_is_bad=True)
    row_of = {names[position]: row for row, position in enumerate(kept.tolist())}
    items = [item for item in items if all(file in row_of for file in item.files)]
    rows = tuple(tuple(row_of[file] for file in item.files) for item in items)
    return IclTask(
        name,
        score,
        pixels,
        rows,
        tuple(item.prompt for item in items),
        tuple(item.answer for item in items),
        tuple((item.answer,) for item in items),
        tuple(row[0] for row in rows),
        tuple(item.id for item in items),
        skipped,
        fingerprint({**key, "items": [[item.files, item.prompt, item.answer] for item in items]}),
    )
