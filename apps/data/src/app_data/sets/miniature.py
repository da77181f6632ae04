"""The six tasks in miniature: emoji and easy-VQA's drawings, written in the layouts of the releases (`six_tasks`).

Demonstrations are by two artists, questions are about a third's pictures. Questions in easy-VQA's own words stand for VQAv2; kinds of
things, which no picture says, for OK-VQA; a caption of a sibling in the taxonomy is what caption editing mends and matching refuses;
visual reasoning asks whether two pictures show the same kind.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app_data.sets.captions import CaptionSet
from app_data.sets.emoji import load_emoji_captions
from app_data.sets.vqa import QuestionSet, load_easy_vqa
from app_data.store.atomic import new_folder

POOL_ARTISTS, QUERY_ARTIST = ("openmoji", "noto-700"), "twemoji"
PEOPLE = 10  # answers of a question in VQAv2
_PARTS = ("train", "val")


def write_miniature(
    folder: Path, num_pool: int = 400, num_queries: int = 40, size: int = 96, cache_dir: Path | None = None
) -> None:
    """Write all six tasks into a folder, which appears whole.

    Args:
        folder: What is made; a folder that is there already is left alone.
        num_pool: Demonstrations of each task.
        num_queries: Questions of each task.
        size: Height and width of the pictures.
        cache_dir: Where drawn emoji are kept; the user's cache folder if None.

    Raises:
        MissingAssetError: A package of pictures is not installed.
    """
    if folder.is_dir():
        return
    easy = load_easy_vqa()
    emoji = {
        part: load_emoji_captions(artists, size=size, cache_dir=cache_dir)
        for part, artists in (("train", POOL_ARTISTS), ("val", (QUERY_ARTIST,)))
    }
    num = {"train": num_pool, "val": num_queries}
    chosen = {part: _drawn(len(emoji[part]), num[part], seed) for seed, part in enumerate(_PARTS)}
    with new_folder(folder) as root:
        for seed, (part, source) in enumerate((("train", easy["train"]), ("val", easy["test"]))):
            _easy_vqa(root / "vqav2", part, source, _drawn(len(source), num[part], seed))
        for part in _PARTS:
            data, rows = emoji[part], chosen[part]
            _kinds(root / "okvqa", part, data, rows)
            _captions(root / "coco-caption", part, data, rows)
            _editing(root / "caption-editing", part, data, rows)
            _reasoning(root / "visual-reasoning", part, data, rows, seed=_PARTS.index(part))
        _matching(root / "image-text-matching", [(emoji[part], chosen[part]) for part in _PARTS])


def _drawn(num: int, wanted: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng([7, seed]).permutation(num)[:wanted])


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, quality=95, subsampling=0)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _coco_name(part: str, number: int) -> str:
    return f"COCO_{part}2014_{number:012d}.jpg"


def _vqa(folder: Path, part: str, prefix: str, rows: Sequence[tuple[int, str, str]]) -> None:
    """Question and annotation files of rows of picture, question, answer."""
    asked = [{"question_id": i, "image_id": image, "question": q} for i, (image, q, _) in enumerate(rows)]
    notes = [
        {
            "question_id": i,
            "image_id": image,
            "answer_type": "other",
            "answers": [{"answer_id": number, "answer": answer} for number in range(1, PEOPLE + 1)],
        }
        for i, (image, _, answer) in enumerate(rows)
    ]
    year = f"{part}2014"
    _write(folder / f"{prefix}OpenEnded_mscoco_{year}_questions.json", {"data_subtype": year, "questions": asked})
    _write(folder / f"{prefix}mscoco_{year}_annotations.json", {"annotations": notes})


def _easy_vqa(folder: Path, part: str, data: QuestionSet, rows: np.ndarray) -> None:
    for row in rows:
        _save(folder / f"{part}2014" / _coco_name(part, data.image_ids[row]), data[row].pixels)
    _vqa(folder, part, "v2_", [(data.image_ids[row], data.questions[row], data.answers[row][0]) for row in rows])


def _pictures(folder: Path, part: str, data: CaptionSet, rows: np.ndarray, name: Callable[[int], str]) -> None:
    for number, row in enumerate(rows):
        _save(folder / f"{part}2014" / name(number), data[row].pixels)


def _kinds(folder: Path, part: str, data: CaptionSet, rows: np.ndarray) -> None:
    """Every other question asks for the broader kind."""
    _pictures(folder, part, data, rows, lambda number: _coco_name(part, number))
    asked = ("What kind of thing is this?", "Which group of things is this of?")
    _vqa(folder, part, "", [(n, asked[n % 2], data.broader[row][n % 2]) for n, row in enumerate(rows)])


def _captions(folder: Path, part: str, data: CaptionSet, rows: np.ndarray) -> None:
    _pictures(folder, part, data, rows, lambda number: _coco_name(part, number))
    images = [{"id": n, "file_name": _coco_name(part, n)} for n in range(len(rows))]
    notes = [{"image_id": n, "caption": text} for n, row in enumerate(rows) for text in data.captions[row]]
    _write(folder / "annotations" / f"captions_{part}2014.json", {"images": images, "annotations": notes})


def _sibling(data: CaptionSet, row: int) -> str:
    """The caption of another emoji of the same subgroup: the next one that has another name."""
    same = [i for i, broader in enumerate(data.broader) if broader == data.broader[row]]
    after = same[same.index(row) :] + same[: same.index(row)]
    return next((data.captions[i][0] for i in after if data.captions[i][0] != data.captions[row][0]), "a picture")


def _editing(folder: Path, part: str, data: CaptionSet, rows: np.ndarray) -> None:
    # As in the release all pictures lie in train2014, the test part's too.
    first = {"train": 0, "val": 10**6}[part]
    _pictures(folder, "train", data, rows, lambda number: _coco_name("train", first + number))
    content = [
        {"image_id": first + n, "Ref-Cap": _sibling(data, row), "GT-Cap": data.captions[row][0]}
        for n, row in enumerate(rows)
    ]
    _write(folder / f"COCO_EE_{'train' if part == 'train' else 'test'}.json", content)


def _matching(folder: Path, parts: Sequence[tuple[CaptionSet, np.ndarray]]) -> None:
    """One part, as released; half of the entries, since each makes two items."""
    content: dict[str, dict[str, str]] = {}
    for data, rows in parts:
        for row in rows[::2]:
            name = f"{len(content):012d}.jpg"
            _save(folder / "val2017" / name, data[row].pixels)
            caption, other = data.captions[row][0], _sibling(data, row)
            content[str(len(content))] = {"filename": name, "caption": caption, "negative_caption": other}
    _write(folder / "data" / "replace_obj.json", content)


def _reasoning(folder: Path, part: str, data: CaptionSet, rows: np.ndarray, seed: int) -> None:
    """Pairs of one kind and of two kinds in turn."""
    draw = np.random.default_rng([8, seed])
    kinds = np.array([broader[0] for broader in data.broader])
    lines = []
    name, home = ("train", folder / "images" / "train" / "0") if part == "train" else ("dev", folder / "dev")
    for number, row in enumerate(rows.tolist()):
        same = number % 2 == 0
        among = np.flatnonzero((kinds == kinds[row]) == same)
        other = int(draw.choice(among[among != row])) if len(among[among != row]) else row
        stem = f"{name}-{number}-0"
        for place, one in enumerate((row, other)):
            _save(home / f"{stem}-img{place}.png", data[one].pixels)
        line = {"identifier": f"{stem}-0", "sentence": f"Both show the kind {kinds[row]}.", "label": str(same)}
        lines.append({**line, "directory": 0} if part == "train" else line)
    path = folder / "data" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
