"""Data set builders on small files in the published formats."""

import json

import pytest
import torch

from hier_losses import builders

# CIFAR-100 and ChestX-ray14 need no file


def test_cifar100(published_tree):
    tree = builders.cifar100()
    tax = tree.taxonomy
    assert tax.level_sizes == (20, 100)
    assert tax.group_size[1:21].tolist() == [5] * 20
    assert list(tree.class_names) == sorted(tree.class_names)
    assert list(tax.names[:20]) == sorted(tax.names[:20])
    # Fine labels 0, 1, 71 and 99 of the data set and their coarse labels.
    for fine, name, coarse in ((0, "apple", 4), (1, "aquarium_fish", 1), (71, "sea", 10), (99, "worm", 13)):
        node = int(tree.targets[fine])
        assert tax.names[node] == name
        assert int(tax.parent[node]) == coarse
    data = published_tree("cifar100")
    names = {node["id"]: node["name"] for node in data["nodes"]}
    assert {names[i] for i in data["leaves"]} == set(tree.class_names)


def test_leaf_to_class_reorders_class_logits():
    tree = builders.cifar100()
    logits = torch.arange(100.0)[None]
    leaf_logits = logits[:, tree.leaf_to_class]
    for column, node in enumerate(tree.taxonomy.leaf.tolist()):
        assert tree.class_names[int(leaf_logits[0, column])] == tree.taxonomy.names[node]


def test_chest_xray14(tmp_path):
    tree = builders.chest_xray14()
    tax = tree.taxonomy
    assert len(builders.FINDINGS) == len(set(builders.FINDINGS)) == tax.num_leaves == 14
    assert set(tax.leaf_names) == set(builders.FINDINGS)
    file = tmp_path / "Data_Entry_2017.csv"
    file.write_text("Image Index,Finding Labels,Patient Age\n1.png,Edema|Hernia,58\n2.png,No Finding,3\n")
    images, labels = builders.read_findings(file)
    assert images == ["1.png", "2.png"]
    assert labels.shape == (2, 14)
    targets = tree.multi_hot(labels)
    present = {tax.names[v] for v in targets[0].nonzero().flatten().tolist()}
    assert present == {"Edema", "Airspace opacity", "Lung opacity", "Lung", "Hernia", "Diaphragm"}
    assert not targets[1].any()
    assert torch.equal(targets[:, tree.targets], labels)
    assert tree.multi_hot(labels[:0].float()).shape == (0, tax.num_nodes)
    with pytest.raises(ValueError, match=r"labels must have shape \(batch, 14\)"):
        tree.multi_hot(labels[:, :3])
    file.write_text("Image Index,Finding Labels\n1.png,Oedema\n")
    with pytest.raises(ValueError, match=r"'1.png' has the unknown finding 'Oedema'"):
        builders.read_findings(file)
    file.write_text("Image,Finding Labels\n1.png,Edema\n")
    with pytest.raises(ValueError, match="no column 'Image Index'"):
        builders.read_findings(file)


def test_multi_hot_is_the_closure(random_tree):
    tax = random_tree(3)
    tree = builders.DatasetTree(tax, torch.arange(tax.num_nodes), tax.names)
    closed = tree.multi_hot(torch.eye(tax.num_nodes))
    for v in range(tax.num_nodes):
        assert closed[v].nonzero().flatten().tolist() == sorted(u for u in tax.paths[v].tolist() if u >= 0)
    with pytest.raises(ValueError, match="some class is an internal node"):
        tree.leaf_to_class  # noqa: B018


# CUB-200-2011

CLASSES = "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n3 003.Sooty_Tern\n4 004.Brown_Creeper\n5 005.Lark\n"
# [species, order, family], 1-based, as in published lists: the columns run neither up nor down.
LABELS = "1,2,1\n2,2,1\n3,2,3\n4,1,2\n5,1,2\n"


@pytest.fixture
def cub(tmp_path):
    (tmp_path / "classes.txt").write_text(CLASSES)

    def build(text, **kwargs):
        (tmp_path / "levels.csv").write_text(text)
        return builders.cub200(tmp_path / "classes.txt", tmp_path / "levels.csv", **kwargs)

    return build


def test_cub_from_integer_labels(cub):
    tree = cub(LABELS)
    assert tree.taxonomy.level_sizes == (2, 3, 5)
    assert tree.class_names[0] == "001.Black_footed_Albatross"
    paths = [tree.taxonomy.path_of(node) for node in tree.targets]
    assert paths[0] == ("order 2", "family 1", "Black footed Albatross")
    assert paths[3] == ("order 1", "family 2", "Brown Creeper")
    assert [path[-1] for path in paths] == [
        "Black footed Albatross",
        "Laysan Albatross",
        "Sooty Tern",
        "Brown Creeper",
        "Lark",
    ]
    rows = torch.tensor([[2, 1, 1], [2, 3, 3], [1, 2, 5]])
    assert torch.equal(tree.taxonomy.node_ids(rows, base=1), tree.targets[[0, 2, 4]])


def test_cub_from_names(cub):
    text = "species,family,order\n" + "".join(
        f"{name},{family},{order}\n"
        for name, family, order in [
            ("Lark", "Alaudidae", "Passeriformes"),
            ("Laysan Albatross", "Diomedeidae", "Procellariiformes"),
            ("001.Black_footed_Albatross", "Diomedeidae", "Procellariiformes"),
            ("Brown_Creeper", "Certhiidae", "Passeriformes"),
            ("Sooty Tern", "Laridae", "Charadriiformes"),
        ]
    )
    tree = cub(text)
    assert tree.taxonomy.level_sizes == (3, 4, 5)
    assert tree.taxonomy.path_of(tree.targets[4]) == ("Passeriformes", "Alaudidae", "Lark")
    with pytest.raises(ValueError, match=r"columns \['order', 'genus', 'species'\]; missing: \['genus'\]"):
        cub(text, levels=("order", "genus", "species"))
    with pytest.raises(ValueError, match="differ in 1 species, such as \\['Lark'\\]"):
        cub(text.replace("Lark,Alaudidae,Passeriformes\n", ""))


@pytest.mark.parametrize(
    ("text", "kwargs", "message"),
    [
        (LABELS, {"index_base": 0}, "index_base=1?"),
        ("1,2,1\n2,2,1\n3,1,1\n4,1,2\n5,1,2\n", {}, "columns have|two parents"),
        ("1,1,1\n2,1,2\n3,1,1\n4,1,3\n5,2,3\n", {}, "label 3 of level 2 has two parents"),
        ("1,2\n2,2\n", {}, "row 0 has 2 labels, 3 are needed"),
        ("1,2,1\n2,2,1\n3,2,3\n4,1,2\n", {}, "5 classes were given, the rows name 4"),
        ("", {}, "empty"),
    ],
)
def test_cub_refuses(cub, text, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cub(text, **kwargs)


def test_cub_class_list_must_count_from_one(cub, tmp_path):
    (tmp_path / "classes.txt").write_text("0 001.A\n1 002.B\n")
    with pytest.raises(ValueError, match="count its lines from 1, got '0 001.A'"):
        cub(LABELS)


# FGVC-Aircraft


@pytest.fixture
def aircraft_folder(tmp_path):
    lists = {
        "manufacturer": {"1": "Boeing", "2": "Boeing", "3": "Airbus", "4": "Boeing"},
        "family": {"1": "Boeing 737", "2": "Boeing 737", "3": "A320", "4": "Boeing 737"},
        "variant": {"1": "737-900", "2": "737-800", "3": "A320", "4": "737-800"},
    }
    for level, labels in lists.items():
        lines = [f"{image} {name}\n" for image, name in labels.items()]
        (tmp_path / f"images_{level}_trainval.txt").write_text("".join(lines[:3]))
        (tmp_path / f"images_{level}_test.txt").write_text("".join(lines[3:]))
    (tmp_path / "variants.txt").write_text("737-800\n737-900\nA320\n")
    return tmp_path


def test_aircraft(aircraft_folder):
    tree = builders.aircraft(aircraft_folder)
    assert tree.class_names == ("737-800", "737-900", "A320")
    assert tree.taxonomy.level_sizes == (2, 2, 3)
    assert tree.taxonomy.path_of(tree.targets[2]) == ("Airbus", "A320", "A320"), "equal names on two levels"
    assert tree.taxonomy.path_of(tree.targets[0]) == ("Boeing", "Boeing 737", "737-800")
    (aircraft_folder / "variants.txt").unlink()
    for level, name in (("manufacturer", "Airbus"), ("family", "A320"), ("variant", "A320")):
        (aircraft_folder / f"images_{level}_a.txt").write_text(f"0 {name}\n")
    assert builders.aircraft(aircraft_folder).class_names == tree.class_names


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("images_family_test.txt", "4 Boeing 757\n", "variant '737-800' has two paths"),
        ("images_family_test.txt", "", "image 4 has no family"),
        ("images_family_test.txt", "4\n", "a line without a name"),
        ("images_family_test.txt", "4 Boeing 737\n1 Boeing 757\n", "image 1 has two family names"),
        ("images_manufacturer_test.txt", "4 Airbus\n", "two paths"),
        ("variants.txt", "737-800\n737-900\n", r"differ in \['A320'\]"),
    ],
)
def test_aircraft_refuses(aircraft_folder, file, text, message):
    (aircraft_folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        builders.aircraft(aircraft_folder)


def test_aircraft_family_of_two_manufacturers(aircraft_folder):
    for level, name in (("manufacturer", "Airbus"), ("family", "Boeing 737"), ("variant", "odd")):
        (aircraft_folder / f"images_{level}_train.txt").write_text(f"9 {name}\n")
    with pytest.raises(ValueError, match="family 'Boeing 737' has two manufacturers"):
        builders.aircraft(aircraft_folder)
    with pytest.raises(ValueError, match="no image in images_manufacturer"):
        builders.aircraft(aircraft_folder / "nowhere")


# Butterfly-200


def test_butterfly(tmp_path):
    # file, species, genus, subfamily, family; all from 1.
    train = "001.Danaus_plexippus/a b.jpg 1 1 1 1\n002.Danaus_chrysippus/b.jpg 2 1 1 1\n003.Euploea/c.jpg 3 2 1 1\n"
    test = "004.Papilio/d.jpg 4 3 2 1\n005.Pieris/e.jpg 5 4 3 2\n001.Danaus_plexippus/f.jpg 1 1 1 1\n"
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "test.txt").write_text(test)
    files = (tmp_path / "train.txt", tmp_path / "test.txt")
    tree = builders.butterfly200(*files)
    assert tree.taxonomy.level_sizes == (2, 3, 4, 5)
    assert tree.taxonomy.path_of(tree.targets[4]) == ("family 2", "subfamily 3", "genus 4", "005.Pieris")
    assert tree.class_names[1] == "002.Danaus_chrysippus"
    with pytest.raises(ValueError, match=r"index_base=1\?"):
        builders.butterfly200(*files, index_base=0)
    with pytest.raises(ValueError, match="columns have|classes"):
        builders.butterfly200(tmp_path / "test.txt")
    (tmp_path / "bad.txt").write_text("a.jpg 1 2 x 4\n")
    with pytest.raises(ValueError, match="a file name and four integers"):
        builders.butterfly200(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text("\n")
    with pytest.raises(ValueError, match="hold no line"):
        builders.butterfly200(tmp_path / "bad.txt")


def test_butterfly_without_folders(tmp_path):
    (tmp_path / "all.txt").write_text("a.jpg 1 1 1 1\nb.jpg 2 1 1 1\nc.jpg 3 2 1 1\nd.jpg 4 3 2 1\ne.jpg 5 4 3 2\n")
    tree = builders.butterfly200(tmp_path / "all.txt")
    assert tree.class_names == tuple(f"species {i}" for i in range(1, 6))


# iNaturalist 2021

FOLDERS = [
    "00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
    "00001_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corone",
    "00002_Animalia_Chordata_Aves_Passeriformes_Corvidae_Pica_corone",
    "00003_Plantae_Tracheophyta_Magnoliopsida_Rosales_Rosaceae_Rosa_canina",
]
LEVELS = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")


def test_inaturalist_folders_and_annotations(tmp_path):
    for name in FOLDERS:
        (tmp_path / "train" / name).mkdir(parents=True)
    tree = builders.inaturalist(tmp_path / "train")
    assert tree.class_names == tuple(FOLDERS)
    assert tree.taxonomy.level_sizes == (2, 2, 2, 2, 2, 3, 4)
    assert tree.taxonomy.names[int(tree.targets[2])] == "Pica corone"
    assert tree.taxonomy.path_of(tree.targets[3])[5:] == ("Rosa", "Rosa canina")
    entries = [
        dict(zip(("id", *LEVELS), (int(n.split("_")[0]), *n.split("_")[1:]), strict=True)) for n in reversed(FOLDERS)
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"categories": entries}))
    again = builders.inaturalist(file)
    assert again.taxonomy == tree.taxonomy
    assert torch.equal(again.targets, tree.targets)
    named = [{"id": e["id"], "image_dir_name": FOLDERS[e["id"]]} for e in entries]
    file.write_text(json.dumps({"categories": named}))
    assert builders.inaturalist(file).taxonomy == tree.taxonomy


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([FOLDERS[0][:-6]], "must have eight pieces"),
        (["00000_A_B_C_D_E__f"], "must have eight pieces"),
        ([FOLDERS[1]], "must have the number 00000"),
        ([FOLDERS[0], FOLDERS[0].replace("00000", "00001")], "a species occurs twice"),
        ([], "holds no class"),
    ],
)
def test_inaturalist_refuses(tmp_path, names, message):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=message):
        builders.inaturalist(tmp_path)


# ImageNet over WordNet

# offset -> words and hypernyms (pointer, offset); entity > object > animal > {dog, wolf}; a dog is a pet as well, and
# the way over pet is as long: the smaller offset wins. The crane occurs as a bird and as a machine.
NOUNS = {
    1740: (["entity"], []),
    2000: (["physical_object", "object"], [("@", 1740)]),
    3000: (["animal", "beast"], [("@", 2000)]),
    2500: (["pet"], [("@", 2000)]),
    4000: (["dog", "domestic_dog"], [("@", 3000), ("@", 2500)]),
    4100: (["wolf"], [("@", 3000)]),
    4200: (["pug"], [("@", 4000)]),
    5000: (["bird"], [("@", 3000)]),
    5100: (["crane"], [("@", 5000)]),
    6000: (["machine"], [("@", 2000)]),
    6100: (["crane"], [("@", 6000)]),
    7000: (["rex"], [("@i", 4000)]),
}


@pytest.fixture
def wordnet(tmp_path):
    def write(nouns):
        lines = ["  1 This software and database is being provided to you\n", "  2 as licence text | with a bar\n"]
        for offset, (words, up) in nouns.items():
            text = " ".join(f"{word} 0" for word in words)
            # A part pointer to a noun and a derivation to a verb are no hypernyms.
            pointers = [*(f"{symbol} {target:08d} n 0000" for symbol, target in up), "%p 00001740 n 0000"]
            pointers.append("+ 00001740 v 0101")
            head = f"{offset:08d} 03 n {len(words):02x} {text}"
            lines.append(f"{head} {len(pointers):03d} {' '.join(pointers)} | a gloss @ 00000001 n\n")
        (tmp_path / "data.noun").write_text("".join(lines))
        index = ["  1 This software\n", "crane n 2 2 @ ~ 2 1 00006100 00005100  \n"]
        index.append("domestic_dog n 1 1 @ 1 0 00004000  \n")
        (tmp_path / "index.noun").write_text("".join(index))
        return tmp_path

    return write


def wnids(*offsets):
    return [f"n{offset:08d}" for offset in offsets]


def test_imagenet_collapsed(wordnet):
    tree = builders.imagenet(wnids(6100, 4100, 4000, 5100), wordnet(NOUNS))
    assert set(tree.taxonomy.to_paths()) == {
        ("dog",),
        ("animal", "wolf"),
        ("animal", "crane (n00005100)"),
        ("crane (n00006100)",),
    }
    assert tree.class_names == tuple(wnids(6100, 4100, 4000, 5100))
    assert tree.taxonomy.names[int(tree.targets[2])] == "dog"
    assert tree.leaf_to_class.shape == (4,)


def test_imagenet_in_full(wordnet):
    tree = builders.imagenet(wnids(6100, 4100, 4000, 5100), wordnet(NOUNS), collapse=False)
    assert set(tree.taxonomy.to_paths()) == {
        ("physical object", "pet", "dog"),
        ("physical object", "animal", "wolf"),
        ("physical object", "animal", "bird", "crane (n00005100)"),
        ("physical object", "machine", "crane (n00006100)"),
    }


def test_imagenet_keeps_the_shortest_path(wordnet):
    # The detour over the smaller offset is one step longer now.
    nouns = {**NOUNS, 2500: (["pet"], [("@", 2400)]), 2400: (["possession"], [("@", 2000)])}
    tree = builders.imagenet(wnids(4000, 4100), wordnet(nouns), collapse=False)
    assert tree.taxonomy.path_of(tree.targets[0]) == ("physical object", "animal", "dog")


def test_imagenet_class_above_a_class(wordnet):
    tree = builders.imagenet(wnids(4200, 4000, 4100, 7000), wordnet(NOUNS))
    assert tree.taxonomy.path_of(tree.targets[0]) == ("dog", "pug")
    assert tree.taxonomy.path_of(tree.targets[1]) == ("dog",)
    assert tree.taxonomy.path_of(tree.targets[3]) == ("dog", "rex")
    with pytest.raises(ValueError, match="internal node"):
        tree.leaf_to_class  # noqa: B018
    chain = builders.imagenet(wnids(4200, 4000, 4100), wordnet(NOUNS))
    assert chain.taxonomy.path_of(chain.targets[0]) == ("dog", "pug"), "a class with a single child stays"
    alone = builders.imagenet(wnids(4200), wordnet(NOUNS))
    assert alone.taxonomy.names == ("pug",)


def test_synset_with_more_than_nine_words(wordnet):
    nouns = {**NOUNS, 4100: ([f"wolf_{i}" for i in range(12)], [("@", 3000)])}
    tree = builders.imagenet(wnids(4100, 5100), wordnet(nouns))
    assert tree.taxonomy.names[int(tree.targets[0])] == "wolf 0"


def test_find_offsets(wordnet):
    found = builders.find_offsets(wordnet(NOUNS), ["Domestic dog", "crane", "unknown"])
    assert found == {"crane": (6100, 5100), "Domestic dog": (4000,)}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["4000"], "must look like 'n02084071', got '4000'"),
        (["n0000400x"], "must look like"),
        ([], "not empty"),
        (["n00004000", "n00004000"], "unique"),
        (["n00009999"], r"1 wnids are not in data.noun, such as \['n00009999'\]; is it WordNet 3.0"),
    ],
)
def test_imagenet_refuses_ids(wordnet, ids, message):
    with pytest.raises(ValueError, match=message):
        builders.imagenet(ids, wordnet(NOUNS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3000: (["animal"], [("@", 3500)])}, "lacks the hypernym 00003500"),
        ({3000: (["animal"], [("@", 4100)])}, "cycle through 'animal'"),
    ],
)
def test_imagenet_refuses_databases(wordnet, change, message):
    with pytest.raises(ValueError, match=message):
        builders.imagenet(wnids(4100), wordnet({**NOUNS, **change}))


def test_broken_database_line(wordnet):
    folder = wordnet(NOUNS)
    with (folder / "data.noun").open("a") as file:
        file.write("00008000 03 n 01\n")
    with pytest.raises(ValueError, match="no synset: '00008000 03 n 01"):
        builders.imagenet(wnids(4100), folder)
