"""Miniatures of data sets in their released formats; each function writes below `root` and returns the recipe's options."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from helpers.pictures import grey, noisy

GROUPS = tuple((f"group {i % 2}", f"kind {i % 4}", f"thing_{i:02d}") for i in range(12))
SHAPES = ("circle", "rectangle", "triangle")
WALLS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220), "white": (240, 240, 240)}
HUES = {"black": (0, 0, 0), "blue": (0, 0, 255), "red": (255, 0, 0), "teal": (0, 128, 128)}


def cub(root: Path) -> list[str]:
    """CUB-200-2011: six birds with four pictures each, three of them to train on, and a tree."""
    root.mkdir()
    names = [f"{i + 1:03d}.Bird_{i}" for i in range(6)]
    (root / "classes.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    images = [f"{n}/{j}.jpg" for n in names for j in range(4)]
    for i, image in enumerate(images):
        grey(root / "images" / image, 9 * i)
    (root / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images, 1)))
    (root / "image_class_labels.txt").write_text("".join(f"{i + 1} {i // 4 + 1}\n" for i in range(24)))
    (root / "train_test_split.txt").write_text("".join(f"{i + 1} {int(i % 4 != 0)}\n" for i in range(24)))
    rows = "".join(f"order {i // 4},family {i // 2},Bird {i}\n" for i in range(6))
    (root / "tree.csv").write_text("order,family,species\n" + rows)
    return ["--data", str(root), "--hierarchy", str(root / "tree.csv")]


def aircraft(root: Path) -> list[str]:
    """FGVC-Aircraft: six variants, two of each family, with one picture in each part."""
    (root / "images").mkdir(parents=True)
    names = {"manufacturer": "maker {0}", "family": "family {1}", "variant": "variant {2}"}
    for p, part in enumerate(("train", "val", "test")):
        for level, name in names.items():
            lines = [f"{p}{i:03d} {name.format(int(i >= 4), i // 2, i)}\n" for i in range(6)]
            (root / f"images_{level}_{part}.txt").write_text("".join(lines))
        for i in range(6):
            grey(root / "images" / f"{p}{i:03d}.jpg", 20 * i + p)
    return ["--data", str(root)]


def butterfly(root: Path) -> list[str]:
    """Butterfly-200: eight species with one picture in each part."""
    root.mkdir()
    genus = (1, 1, 2, 3, 3, 4, 5, 5)
    subfamily, family = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3}, {1: 1, 2: 1, 3: 2}
    for p, part in enumerate(("train", "val", "test")):
        lines = []
        for i in range(8):
            grey(root / "images_small" / f"{i}.kind" / f"{part}.jpg", 20 * i + p)
            above = subfamily[genus[i]]
            lines.append(f"{i}.kind/{part}.jpg {i + 1} {genus[i]} {above} {family[above]}\n")
        (root / f"Butterfly200_{part}_release.txt").write_text("".join(lines))
    return ["--data", str(root)]


def inaturalist(root: Path) -> list[str]:
    """iNaturalist 2021: six species with three pictures to train on and one to test on."""
    for i in range(6):
        name = f"{i:05d}_Animalia_Chordata_Class{i // 4}_Order{i // 3}_Family{i // 2}_Genus{i}_epithet{i}"
        for part, count in (("train_mini", 3), ("val", 1)):
            for j in range(count):
                grey(root / part / name / f"{j}.jpg", 20 * i + j)
    return ["--data", str(root)]


def chest(root: Path) -> list[str]:
    """ChestX-ray14: 24 pictures of 24 patients, of whom 22 and 34 fall into the validation part."""
    root.mkdir()
    findings = ["Edema|Hernia", "No Finding", "Nodule", "Effusion"]
    names = [f"{i:08d}_000.png" for i in range(20, 44)]
    rows = "".join(f"{n},{findings[i % 4]}\n" for i, n in enumerate(names))
    (root / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels\n" + rows)
    (root / "train_val_list.txt").write_text("\n".join(names[:16]))
    (root / "test_list.txt").write_text("\n".join(names[16:]))
    for i, n in enumerate(names):
        grey(root / "images" / n, 50 * (i % 4) + i)
    return ["--data", str(root)]


def few_shot(root: Path, paths: Sequence[tuple[str, ...]] = GROUPS, train: int = 8, test: int = 3) -> Path:
    """Few-shot CIFAR-100's form: `images/{train,test}/<leaf>/`, and `trees/cifar100.json` with a cut at every depth.

    Args:
        root: Folder to write to.
        paths: Names from the top node to each leaf, all of one length.
        train, test: Pictures of each leaf.
    """
    draw = np.random.default_rng(0)
    for leaf, path in enumerate(paths):
        colour = tuple(int(c) for c in np.random.default_rng([leaf, 1]).integers(40, 215, 3))
        for part, count in (("train", train), ("test", test)):
            for index in range(count):
                noisy(root / "images" / part / path[-1] / f"{path[-1]}_{index}.png", colour, draw, size=32, spread=20)
    tree(root / "trees" / "cifar100.json", paths)
    # The recipes of few-shot CIFAR-100 read train/ and test/ beside trees/.
    for part in ("train", "test"):
        (root / part).symlink_to(root / "images" / part)
    return root


def tree(file: Path, paths: Sequence[tuple[str, ...]]) -> None:
    """A tree in ProTeCt's form with a cut at every depth.

    Args:
        file: The JSON file.
        paths: Names from the top node to each leaf, all of one length.
    """
    prefixes = sorted({path[:depth] for path in paths for depth in range(1, len(path) + 1)}, key=lambda p: (len(p), p))
    number = {(): 0} | {prefix: i for i, prefix in enumerate(prefixes, 1)}
    nodes = [
        {
            "id": i,
            "name": prefix[-1] if prefix else "root",
            "text": prefix[-1].replace("_", " ") if prefix else "root",
            "parent": number[prefix[:-1]] if prefix else None,
            "children": [j for p, j in number.items() if p and p[:-1] == prefix],
        }
        for prefix, i in number.items()
    ]
    leaves = [number[path] for path in sorted(paths)]
    cuts = []
    for depth in range(1, len(paths[0]) + 1):
        cut = sorted({path[:depth] for path in paths})
        labels = [cut.index(path[:depth]) for path in sorted(paths)]
        cuts.append({"text": [p[-1].replace("_", " ") for p in cut], "leaf_to_label": labels})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"nodes": nodes, "leaves": leaves, "treecuts": cuts}))


# Classes of the miniatures below; ImageNet's are tench, goldfish, bald eagle and vulture.
SCENES = (("built", "abbey"), ("built", "apartment_building_outdoor"), ("open", "field_wild"), ("open", "orchard"))
WNIDS = {
    "n01440764": ("fish", "tench"),
    "n01443537": ("fish", "goldfish"),
    "n01614925": ("bird", "bald_eagle"),
    "n01616318": ("bird", "vulture"),
}
# Short ranks: the small CLIPs of the tests read 24 tokens.
SPECIES = (
    ("Animalia", "Bird", "Oak", "Red", "Sun", "Hill", "green"),
    ("Animalia", "Bird", "Oak", "Red", "Sun", "Lake", "black"),
    ("Animalia", "Fish", "Pine", "Blue", "Moon", "Sand", "white"),
    ("Animalia", "Fish", "Pine", "Blue", "Moon", "Rock", "brown"),
)


def sun397(root: Path, train: int = 4, test: int = 2) -> Path:
    """SUN397: four scenes in the first of its splits, and its tree."""
    folders = ("a/abbey", "a/apartment_building/outdoor", "f/field/wild", "o/orchard")
    lists: dict[str, list[str]] = {"Training_01": [], "Testing_01": []}
    for number, folder in enumerate(folders):
        for index in range(train + test):
            grey(root / folder / f"sun_{index}.jpg", 40 * number + index)
            lists["Training_01" if index < train else "Testing_01"].append(f"/{folder}/sun_{index}.jpg")
    (root / "Partitions").mkdir()
    for name, lines in lists.items():
        (root / "Partitions" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    tree(root / "sun.json", SCENES)
    return root


def imagenet(root: Path, train: int = 4, test: int = 2) -> Path:
    """ImageNet-1k: four of its classes as folders, and their tree."""
    for number, wnid in enumerate(WNIDS):
        for part, count in (("train", train), ("val", test)):
            for index in range(count):
                grey(root / part / wnid / f"{part}_{index}.JPEG", 40 * number + index + 20 * (part == "val"))
    tree(root / "imagenet.json", tuple(WNIDS.values()))
    return root


def rare_species(root: Path, count: int = 10) -> Path:
    """Rare Species: four species with so many pictures, a fifth of which is tested on, and its tree."""
    rows = ["file_name,kingdom,phylum,class,order,family,genus,species"]
    for number, ranks in enumerate(SPECIES):
        for index in range(count):
            name = f"dataset/{'-'.join(ranks)}/{index}_eol.jpg"
            grey(root / name, 40 * number + index)
            rows.append(",".join([name, *ranks]))
    (root / "metadata.csv").write_text("\n".join(rows))
    tree(root / "rarespecies.json", [("_".join(r[1:5]).lower(), "_".join(r[1:]).lower()) for r in SPECIES])
    return root


def karpathy(root: Path, count: int = 8) -> list[str]:
    """COCO with Karpathy's split: so many training pictures, and one of each other part."""
    images = []
    for number, split in enumerate([*["train"] * count, "val", "test"]):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{number:012d}.jpg"
        grey(root / folder / name, 23 * number)
        raw = [f"a {hue} {SHAPES[number % 3]}" for hue in list(HUES)[number % 4 :][:2]]
        images.append(
            {
                "imgid": number, "split": split, "filename": name, "filepath": folder, "cocoid": 100 + number,
                "sentids": list(range(len(raw))), "sentences": [{"raw": text} for text in raw],
            }
        )  # fmt: skip
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return ["--annotations", str(root / "dataset_coco.json"), "--pictures", str(root)]


def easy_vqa(folder: Path, train: int = 24, test: int = 8) -> None:
    """The package easy-VQA: drawings of one shape each with four questions; put `folder` on the path to have it imported."""
    for part, count, seed in (("train", train, 0), ("test", test, 1)):
        draw, questions = np.random.default_rng(seed), []
        where = folder / "easy_vqa" / "data" / part
        (where / "images").mkdir(parents=True)
        for number in range(count):
            shape, hue = SHAPES[number % 3], list(HUES)[number % 4]
            picture = Image.new("RGB", (64, 64), "white")
            x, y, r = (int(v) for v in draw.integers((20, 20, 8), (44, 44, 18)))
            box = (x - r, y - r, x + r, y + r)
            pen = ImageDraw.Draw(picture)
            if shape == "triangle":
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=HUES[hue])
            else:
                {"circle": pen.ellipse, "rectangle": pen.rectangle}[shape](box, fill=HUES[hue])
            picture.save(where / "images" / f"{number}.png")
            asked = SHAPES[int(draw.integers(3))]
            questions += [
                ["what color is the shape?", hue, number],
                ["what shape is in the image?", shape, number],
                [f"is there a {asked}?", "yes" if asked == shape else "no", number],
                [f"is there not a {asked}?", "no" if asked == shape else "yes", number],
            ]
        (where / "questions.json").write_text(json.dumps(questions))
    (folder / "easy_vqa" / "__init__.py").touch()


def six_tasks(root: Path) -> Path:
    """The six tasks of `hier eval icl`: eight pictures to show, four to ask about; of four colours in turn."""
    names = tuple(WALLS)
    for part, first, num in (("train", 0, 8), ("val", 100, 4)):
        colours = [names[i % 4] for i in range(num)]
        year = f"{part}2014"
        for task, prefix, word in (("vqav2", "v2_", "Hue"), ("okvqa", "", "Tint")):
            asked = [
                {"question_id": first + i, "image_id": first + i, "question": f"{word} {i % 3}?"} for i in range(num)
            ]
            # Seven people say the colour, three something else.
            notes = [
                {
                    "question_id": first + i, "image_id": first + i, "answer_type": "other",
                    "answers": [{"answer": c}] * 7 + [{"answer": "dark"}] * 2 + [{"answer": "Two."}],
                }
                for i, c in enumerate(colours)
            ]  # fmt: skip
            folder = root / task
            _write(
                folder / f"{prefix}OpenEnded_mscoco_{year}_questions.json", {"data_subtype": year, "questions": asked}
            )
            _write(folder / f"{prefix}mscoco_{year}_annotations.json", {"annotations": notes})
            for i, c in enumerate(colours):
                _wall(folder / year / f"COCO_{year}_{first + i:012d}.jpg", c, first + i)
        folder = root / "coco-caption"
        images = [{"id": first + i, "file_name": f"{i}.jpg"} for i in range(num)]
        texts = [
            {"image_id": first + i, "caption": text}
            for i, c in enumerate(colours)
            for text in (f"a {c} wall in the sun", f"one {c} wall")
        ]
        _write(folder / "annotations" / f"captions_{year}.json", {"images": images, "annotations": texts})
        edits = [
            {"image_id": first + i, "Ref-Cap": "a wall", "GT-Cap": f"a {c} wall with some light"}
            for i, c in enumerate(colours)
        ]
        _write(root / "caption-editing" / f"COCO_EE_{'train' if part == 'train' else 'test'}.json", edits)
        for i, c in enumerate(colours):
            _wall(folder / year / f"{i}.jpg", c, first + i)
            _wall(root / "caption-editing" / "train2014" / f"COCO_train2014_{first + i:012d}.jpg", c, first + i)
        lines, name = [], {"train": "train", "val": "dev"}[part]
        home = root / "visual-reasoning" / ("images/train/3" if part == "train" else "dev")
        for i, c in enumerate(colours):
            other = c if i % 2 else names[(i + 1) % 4]
            for place, one in enumerate((c, other)):
                _wall(home / f"{name}-{i}-0-img{place}.png", one, 2 * i + place)
            line = {"identifier": f"{name}-{i}-0-0", "sentence": "They are alike.", "label": str(bool(i % 2))}
            lines.append(json.dumps(line | ({"directory": 3} if part == "train" else {})))
        _write(root / "visual-reasoning" / "data" / f"{name}.json", "\n".join(lines))
    pairs = {
        str(i): {"filename": f"{i}.jpg", "caption": f"a {c} wall", "negative_caption": "a horse"}
        for i, c in enumerate(WALLS)
    }
    for i, c in enumerate(WALLS):
        _wall(root / "image-text-matching" / "val2017" / f"{i}.jpg", c, i)
    _write(root / "image-text-matching" / "data" / "replace_obj.json", pairs)
    return root


def _wall(path: Path, colour: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 20, (20, 20, 3))
    Image.fromarray(np.clip(np.array(WALLS[colour]) + noise, 0, 255).astype(np.uint8)).save(path, quality=95)


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
