"""Files of every released form, damaged one at a time: a reader gives a value or one sentence, never another error.

A JSON file gets another value, no value or nesting without end at any place of it; a table loses, gains or swaps fields; any file is
cut, emptied, filled with other bytes or replaced by a folder. Pictures are damaged as bytes only.
"""

import io
import json
import shutil
import tarfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from app_data.read.folder import find_pictures, load_found
from app_data.read.labelled import Decoding
from app_data.sets.captions import caption_sets
from app_data.sets.chest import load_chest_xray14
from app_data.sets.cifar100 import load_cifar100_fewshot
from app_data.sets.coco import find_captions
from app_data.sets.papers import load_aircraft, load_butterfly200, load_cub200, load_inaturalist
from app_data.sets.shards import Shards
from app_data.sets.six_tasks import TASKS, load_parts
from app_data.sets.tree_sets import find_imagenet, find_rare_species, find_sun397
from app_data.store.errors import UnreadablePicture
from app_eval.ask.pool import read_items
from helpers import pictures, releases, weights
from hier_lora import HierLoraCLIP, load_dual_encoder
from hier_losses import Taxonomy
from hier_losses.reading import read_taxonomy

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, float("nan"), 10**30, "", " ", "x", "../x", "a\0b", "\ud800", "a\nb", "9" * 400, [], {}, [[]], [None],
    {"": None},
)  # fmt: skip
WORDS = ("", " ", "0", "-1", "nan", "x", "../x", "a\0b", '"', ",,,", "\t", "\u00e9", "9" * 400, "1" * 200_000)
PICTURES = (".png", ".jpg", ".jpeg", ".JPEG")


@dataclass(frozen=True)
class Reader:
    """Something that reads files of others.

    Attributes:
        write: writes a miniature into a missing folder.
        read: reads it; the second folder is for what it caches.
        files: a pattern of the files that are damaged.
        spared: endings of files that are not.
    """

    write: Callable[[Path], object]
    read: Callable[[Path, Decoding], object]
    files: str = "*"
    spared: frozenset[str] = frozenset()


def readers() -> dict[str, Reader]:
    """All of them by name."""
    found = {
        "folder": Reader(pictures.colour_folders, lambda r, d: load_found(find_pictures(r), d)),
        "listing": Reader(_listing, lambda r, d: load_found(find_pictures(r, listing=r / "list.csv"), d), "*.csv"),
        "cub": Reader(releases.cub, lambda r, d: load_cub200(r, r / "tree.csv", decoding=d)),
        "aircraft": Reader(releases.aircraft, load_aircraft),
        "butterfly": Reader(releases.butterfly, lambda r, d: load_butterfly200(r, decoding=d)),
        "inaturalist": Reader(releases.inaturalist, load_inaturalist),
        "chest": Reader(releases.chest, load_chest_xray14),
        "few-shot": Reader(releases.few_shot, lambda r, d: load_cifar100_fewshot(r, decoding=d), "*.json"),
        "sun": Reader(releases.sun397, lambda r, d: load_found(find_sun397(r, r / "sun.json"), d)),
        "imagenet": Reader(
            releases.imagenet, lambda r, d: load_found(find_imagenet(r, r / "imagenet.json"), d), "*.json"
        ),
        "rare species": Reader(
            releases.rare_species, lambda r, d: load_found(find_rare_species(r, r / "rarespecies.json"), d), "*.[cj]s*"
        ),
        "karpathy": Reader(releases.karpathy, _captions("dataset_coco.json"), "*.json"),
        "pool": Reader(
            lambda r: _table(r, "pool.jsonl", _QUESTIONS), lambda r, d: read_items(r / "pool.jsonl"), "*.jsonl"
        ),
        "adapter": Reader(
            _adapter, lambda r, d: HierLoraCLIP.from_pretrained(r / "adapter", load_dual_encoder(f"hf:{r}/clip"))
        ),
    }
    for name, rows in _CAPTIONS.items():
        found[f"captions, {name}"] = Reader(
            lambda r, n=name, w=rows: _table(r, n, w), _captions(name), f"*{Path(name).suffix}"
        )
    found["shard"] = Reader(_shards, _stream, "*.tar")
    found["captions, tar"] = Reader(_shards, _captions("shard.tar"), "*.tar")
    for name in TASKS:
        # The pictures of all tasks are read alike.
        found[name] = Reader(releases.six_tasks, lambda r, d, n=name: load_parts(n, r / n, d), f"{name}/**/*.json")
    for name, text in _TREES.items():
        found[f"tree, {name}"] = Reader(
            lambda r, n=name, t=text: _text(r, n, t), lambda r, d, n=name: read_taxonomy(r / n)
        )
    return found


_SAID = [{"image": f"{i}.png", "caption": [f"picture {i}", "a picture"], "split": "test", "id": i} for i in range(4)]
_QUESTIONS = [{"image": f"{i}.png", "question": "what?", "answer": f"number {i}"} for i in range(4)]
_COCO = {
    "images": [{"id": i, "file_name": f"{i}.png"} for i in range(4)],
    "annotations": [{"image_id": i, "caption": f"picture {i}", "id": i} for i in range(4)],
}
_CAPTIONS: dict[str, object] = {
    "own.json": _SAID,
    "own.jsonl": _SAID,
    "own.csv": _SAID,
    "own.tsv": _SAID,
    "coco.json": _COCO,
    "nocaps.json": {**_COCO, "images": [{**image, "domain": "in-domain"} for image in _COCO["images"]]},
    "lavis_test.json": [{"image": f"{i}.png", "caption": [f"picture {i}"]} for i in range(4)],
}
_TREES = {
    "edges.csv": "child,parent\ncat,animal\ndog,animal\noak,plant\nelm,plant\nanimal,\nplant,\n",
    "paths.csv": "kingdom,species\nanimal,cat\nanimal,dog\nplant,oak\nplant,elm\n",
    "lines.txt": "animal/cat\nanimal/dog\nplant/oak\nplant/elm\n",
    "nested.json": '{"animal": {"cat": {}, "dog": {}}, "plant": ["oak", "elm"]}',
    "newick.nwk": "((cat,dog)animal,(oak,elm)plant)root;",
}


def _table(root: Path, name: str, rows: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        pictures.grey(root / f"{number}.png", 40 * number)
    if name.endswith(".json"):
        text = json.dumps(rows)
    elif name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        between = "\t" if name.endswith(".tsv") else ","
        lines = [row.keys() for row in rows[:1]]
        lines += [[v if isinstance(v, (str, int)) else v[0] for v in row.values()] for row in rows]
        text = "".join(between.join(map(str, line)) + "\n" for line in lines)
    (root / name).write_text(text, encoding="utf-8")


def _text(root: Path, name: str, text: str) -> None:
    root.mkdir(parents=True)
    (root / name).write_text(text, encoding="utf-8")


def _shards(root: Path) -> None:
    _table(root, "own.jsonl", _SAID)
    with tarfile.open(root / "shard.tar", "w") as archive:
        for number, row in enumerate(_SAID):
            text = json.dumps(row).encode()
            entry = tarfile.TarInfo(f"{number}.json")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
            archive.add(root / f"{number}.png", f"{number}.png")


def _listing(root: Path) -> None:
    pictures.colour_folders(root)
    rows = [
        f"{p.relative_to(root)},{p.parent.name},{'test' if p.stem == '1' else 'train'}" for p in root.rglob("*.png")
    ]
    (root / "list.csv").write_text("\n".join(["path,leaf,split", *sorted(rows)]), encoding="utf-8")


def _captions(name: str) -> Callable[[Path, Decoding], object]:
    def read(root: Path, decoding: Decoding) -> object:
        return caption_sets(find_captions(root / name, cache_dir=decoding.cache_dir), decoding)

    return read


def _stream(root: Path, decoding: Decoding) -> object:
    shards, found = Shards(root / "shard.tar", decoding.cache_dir), []
    for row in range(len(shards)):
        with suppress(UnreadablePicture):  # passed over by a training
            found.append(shards.read(row))
    return found


def _adapter(root: Path) -> None:
    root.mkdir(parents=True)
    weights.clip(root / "clip")
    tax = Taxonomy.from_paths([("animal", "cat"), ("animal", "dog"), ("plant", "oak")])
    model = HierLoraCLIP(load_dual_encoder(f"hf:{root}/clip"), tax)
    model.save_pretrained(root / "adapter")


# -- damage -----------------------------------------------------------------------------------------------------------------------


def fuzz_readers(known: Mapping[str, Reader], count: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """Damage files and read them.

    Args:
        known: the readers by name.
        count: damages for each reader.
        seed: of the choices.
        folder: an empty folder to work in.

    Returns:
        How many readings gave a value, and what went wrong, one line each.
    """
    values, wrong = 0, []
    for name, reader in known.items():
        whole = folder / name / "whole"
        whole.parent.mkdir(parents=True)
        reader.write(whole)
        reader.read(whole, Decoding(size=8, cache_dir=folder / name / "cache", workers=1))
        files = sorted(
            p.relative_to(whole) for p in whole.rglob(reader.files) if p.is_file() and p.suffix not in reader.spared
        )
        # Lists and tables have more ways to go wrong than pictures.
        files += 4 * [p for p in files if p.suffix not in PICTURES]
        for number in range(count):
            draw = Random(f"{seed} {name} {number}")
            file = draw.choice(files)
            work = folder / name / "work"
            shutil.copytree(whole, work, symlinks=True)
            how = damage(work / file, draw)
            said = _read(reader, work, folder / name / "cache")
            values += said is None
            if said:
                wrong.append(f"{name}: {file}: {how}: {said}")
            shutil.rmtree(work)
        shutil.rmtree(folder / name)
    return values, wrong


def _read(reader: Reader, root: Path, cache: Path) -> str | None:
    """None if it gave a value, "" if it refused in a sentence, else what it did."""
    decoding = Decoding(size=8, cache_dir=cache, workers=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(root, decoding)
    except (ValueError, OSError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        # A sentence of ours, or about a file: the system's, or that of transformers.
        fit = isinstance(error, OSError) or type(error) is ValueError or _ours(type(error))
        if not str(error).strip() or not fit:
            return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        if "\n" in str(error).strip() and not isinstance(error, OSError):
            return f"more than one line: {str(error)[:200]!r} ({Path(place.filename).name}:{place.lineno})"
        return ""
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return None


def _ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("app_data", "app_eval", "app_train", "hier_losses", "hier_lora")


def damage(path: Path, draw: Random) -> str:
    """Spoil a file; says how."""
    content = path.read_bytes()
    kinds = ["cut", "emptied", "other bytes", "a folder", "missing", "flipped"]
    text = path.suffix not in (*PICTURES, ".tar", ".safetensors")
    if path.suffix in (".json", ".jsonl"):
        kinds += ["form"] * 20
    elif text:
        kinds += ["fields"] * 12
    how = draw.choice(kinds)
    if how == "cut":
        path.write_bytes(content[: draw.randrange(len(content) or 1)])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "other bytes":
        path.write_bytes(draw.randbytes(200))
    elif how == "flipped":
        place = draw.randrange(len(content) or 1)
        path.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
    elif how in ("a folder", "missing"):
        path.unlink()
        if how == "a folder":
            path.mkdir()
    elif how == "form":
        whole = content.decode()
        lines = (
            whole.splitlines()
            if path.suffix == ".jsonl" or "data/dev" in str(path) or "data/train" in str(path)
            else [whole]
        )
        number = draw.randrange(len(lines))
        changed, where = _other_form(json.loads(lines[number]), draw)
        lines[number] = changed
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        return where
    else:
        return _other_fields(path, content.decode(), draw)
    return how


def _other_form(tree: Any, draw: Random) -> tuple[str, str]:
    """JSON with one place changed, and what was done there."""
    if draw.random() < 0.04:
        return "[" * 100_000 + "]" * 100_000, "nested without end"
    holder, key, path = [tree], 0, ""
    while True:
        node = holder[key]
        inside = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not inside or draw.random() < 0.25:
            break
        holder, key = node, draw.choice(inside)
        path += f"/{key}"
    root = {"x": holder[key]} if holder == [tree] and key == 0 and not path else None
    act = draw.choice(["replaced", "replaced", "replaced", "dropped", "repeated"])
    value = draw.choice(VALUES)
    if root is not None or act == "replaced":
        if root is not None:
            return json.dumps(value), f"all of it replaced by {value!r:.40}"
        holder[key] = value
        act = f"replaced by {value!r:.40}"
    elif act == "dropped":
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[f"{key}2"] = holder[key]
    return json.dumps(tree), f"{path} {act}"


def _other_fields(path: Path, text: str, draw: Random) -> str:
    lines = text.split("\n")
    number = draw.randrange(len(lines))
    between = next((mark for mark in ("\t", ",", "|", "/", " ") if mark in lines[number]), ",")
    fields = lines[number].split(between)
    place, word = draw.randrange(len(fields)), draw.choice(WORDS)
    act = draw.choice(
        ["replaced", "replaced", "dropped", "inserted", "line dropped", "line repeated", "line endings", "bytes"]
    )
    if act == "replaced":
        fields[place] = word
    elif act == "dropped":
        del fields[place]
    elif act == "inserted":
        fields.insert(place, word)
    lines[number : number + 1] = {"line dropped": [], "line repeated": [lines[number]] * 2}.get(
        act, [between.join(fields)]
    )
    ending = "\r" if act == "line endings" else "\n"
    spoilt = ending.join(lines).encode("utf-8")
    path.write_bytes(b"\xff\xfe" + spoilt if act == "bytes" else spoilt)
    return f"line {number + 1}, field {place + 1} {act} {word!r:.20}"
