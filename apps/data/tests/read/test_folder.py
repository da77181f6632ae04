import os
import shutil

import numpy as np
import pytest
from PIL import Image

from app_data.read.folder import find_pictures, load_found
from app_data.read.labelled import Decoding
from app_data.store.errors import DataError, TooManyBadFiles
from hier_losses import Taxonomy


@pytest.fixture
def load(tmp_path):
    def call(*args, fractions=None, seed=0, allow_empty_classes=False, **kwargs):
        found = find_pictures(
            *args, **{k: kwargs.pop(k) for k in ("listing", "listing_columns", "outside") if k in kwargs}
        )
        decoding = Decoding(**{"size": 8, "cache_dir": tmp_path / "cache", "workers": 1, **kwargs})
        return load_found(found, decoding, fractions=fractions, seed=seed, allow_empty_classes=allow_empty_classes)

    return call


@pytest.fixture
def flat(zoo):
    """Class folders without a tree above them."""
    root = zoo.with_name("flat")
    for name in ("animal/cat", "animal/dog", "plant/oak"):
        shutil.copytree(zoo / name, root / name.split("/")[1])
    return root


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def by_file(parts):
    return {f: p.taxonomy.path_of(t) for p in parts.values() for f, t in zip(p.files, p.targets, strict=True)}


def test_nested_folders(zoo, load):
    parts = load(zoo)
    assert list(parts) == ["train", "val", "test"]
    assert [len(p) for p in parts.values()] == [24, 3, 3]
    labels = by_file(parts)
    assert len(labels) == 30
    assert labels["animal/dog/3.png"] == ("animal", "dog")
    train = parts["train"]
    item = train[0]
    assert item.pixels.shape == (8, 8, 3)
    assert item.name == train.taxonomy.names[item.target]
    assert train.taxonomy is parts["test"].taxonomy
    assert train.styles[0] == "zoo"
    for part in parts.values():
        for i, name in enumerate(part.files):
            value = 40 * ["cat", "dog", "oak"].index(part.names[i]) + int(name.rsplit("/", 1)[1][:-4])
            assert abs(part[i].pixels.mean() - value - 14.5) < 6, "each label lies beside its own pixels"


def test_split_follows_seed_and_shares(zoo, load):
    first, again, other = (load(zoo, seed=s) for s in (0, 0, 1))
    assert first["test"].files == again["test"].files
    assert first["test"].fingerprint == again["test"].fingerprint
    assert first["test"].files != other["test"].files
    assert first["test"].fingerprint != other["test"].fingerprint
    shares = load(zoo, fractions={"train": 0.5, "test": 0.5})
    assert {name: len(part) for name, part in shares.items()} == {"train": 15, "test": 15}


def test_existing_split_folders(zoo, load, make_picture):
    root = zoo.with_name("split")
    shutil.copytree(zoo, root / "train")
    make_picture(root / "validation" / "animal" / "cat" / "new.png")
    make_picture(root / "test" / "plant" / "oak" / "new.png")
    parts = load(root)
    assert {name: len(part) for name, part in parts.items()} == {"train": 30, "val": 1, "test": 1}
    assert parts["val"].files == ("validation/animal/cat/new.png",)
    assert parts["val"].names == ("cat",)
    assert parts["test"].styles == ("test",)
    assert parts["train"].taxonomy.num_leaves == 3


def test_a_class_may_be_called_train(load, tmp_path, make_picture):
    for name in ("train", "plane"):
        for i in range(3):
            make_picture(tmp_path / "vehicles" / name / f"{i}.png", value=i)
    parts = load(tmp_path / "vehicles")
    assert parts["train"].taxonomy.names == ("plane", "train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "leaf,parent,grandparent\ncat,pet,animal\ndog,pet,animal\noak,tree,plant\n"),
        ("t.csv", "\ufeffleaf, genus, family\r\ncat, pet, animal\r\ndog, pet, animal\r\noak, tree, plant\r\n"),
        ("t.csv", "kingdom,kind,leaf\nanimal,pet,cat\nanimal,pet,dog\nplant,tree,oak\n"),
        ("t.csv", "parent,child\nanimal,pet\npet,cat\npet,dog\nplant,tree\ntree,oak\n"),
        ("t.csv", "child,parent\npet,animal\ncat,pet\ndog,pet\ntree,plant\noak,tree\n"),
        ("t.json", '{"animal": {"pet": ["cat", "dog"]}, "plant": {"tree": ["oak"]}}'),
        (
            "t.json",
            '[{"id": 1, "name": "animal", "parent": null}, {"id": 2, "name": "pet", "parent": 1},'
            '{"id": 3, "name": "plant", "parent": null}, {"id": 4, "name": "tree", "parent": 3},'
            '{"id": 5, "name": "cat", "parent": 2}, {"id": 6, "name": "dog", "parent": 2},'
            '{"id": 7, "name": "oak", "parent": 4}]',
        ),
    ],
    ids=["leaf first", "spreadsheet", "leaf last", "edges", "reversed edges", "nested json", "node list"],
)
def test_flat_folders_with_a_taxonomy_file(flat, load, tmp_path, name, text):
    parts = load(flat, write(tmp_path / name, text))
    labels = by_file(parts)
    assert labels["dog/0.png"] == ("animal", "pet", "dog")
    assert labels["oak/9.png"] == ("plant", "tree", "oak")


def test_taxonomy_object_and_deeper_folders(zoo, load):
    """The folder that holds the picture names the class, whatever lies above it."""
    tree = Taxonomy.from_paths([("living", "cat"), ("living", "dog"), ("living", "oak")])
    assert by_file(load(zoo, tree))["plant/oak/1.png"] == ("living", "oak")


def test_repeated_leaf_names_need_full_paths(load, tmp_path, make_picture):
    for i in range(3):
        make_picture(tmp_path / "d" / "sport" / "bat" / f"{i}.png", value=i)
        make_picture(tmp_path / "d" / "animal" / "bat" / f"{i}.png", value=i)
    tree = Taxonomy.from_paths([("sport", "bat"), ("animal", "bat")])
    labels = by_file(load(tmp_path / "d", tree))
    assert labels["sport/bat/0.png"] == ("sport", "bat")
    assert labels["animal/bat/0.png"] == ("animal", "bat")
    with pytest.raises(DataError, match=r"'bat' stands for several leaves \(sport/bat and animal/bat\): use"):
        load(tmp_path / "d" / "sport", tree)


def test_listing(flat, load, tmp_path):
    rows = "".join(
        f"{c}/{i}.png,{leaf}\n" for c, leaf in (("cat", "animal/cat"), ("oak", "plant/oak")) for i in range(4)
    )
    parts = load(flat, listing=write(tmp_path / "l.csv", "path,leaf\n" + rows))
    assert sum(map(len, parts.values())) == 8
    assert by_file(parts)["oak/2.png"] == ("plant", "oak")
    tree = Taxonomy.from_paths([("living", "cat"), ("living", "oak")])
    split = write(
        tmp_path / "s.csv",
        "leaf,split,path\ncat,train,cat/1.png\noak,training,oak/1.png\noak,test,oak/2.png\ncat,valid,cat/2.png\n",
    )
    parts = load(flat, tree, listing=split)
    assert {name: part.files for name, part in parts.items()} == {
        "train": ("cat/1.png", "oak/1.png"),
        "val": ("cat/2.png",),
        "test": ("oak/2.png",),
    }


def test_second_load_reads_the_cache_and_sees_changes(zoo, load, tmp_path, make_picture):
    before = load(zoo)
    assert len(list((tmp_path / "cache").glob("*/pixels.npy"))) == 1
    same = load(zoo)
    os.utime(zoo / "animal" / "cat" / "1.png", (1, 1))
    same = load(zoo)
    assert len(list((tmp_path / "cache").glob("*/pixels.npy"))) == 1
    assert same["train"].fingerprint == before["train"].fingerprint, "a touched file is the same file"
    path = make_picture(zoo / "animal" / "cat" / "0.png", value=200)
    os.utime(path, (1, 1))
    after = load(zoo)
    assert len(list((tmp_path / "cache").glob("*/pixels.npy"))) == 2
    assert after["train"].fingerprint != before["train"].fingerprint
    everything = {f: p[i].pixels.mean() for p in after.values() for i, f in enumerate(p.files)}
    assert everything["animal/cat/0.png"] > 190


def test_another_tree_reuses_the_pixels_under_another_fingerprint(flat, load, tmp_path):
    one = load(flat, Taxonomy.from_paths([("a", "cat"), ("a", "dog"), ("b", "oak")]))
    two = load(flat, Taxonomy.from_paths([("a", "cat"), ("b", "dog"), ("b", "oak")]))
    assert len(list((tmp_path / "cache").glob("*/pixels.npy"))) == 1
    assert one["train"].fingerprint != two["train"].fingerprint


def test_bad_files_are_named(zoo, load):
    write(zoo / "animal" / "cat" / "notes.png", "hello")
    whole = (zoo / "animal" / "dog" / "1.png").read_bytes()
    (zoo / "animal" / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (zoo / "plant" / "oak" / "empty.jpg").write_bytes(b"")
    parts = load(zoo)
    skipped = {bad.path: bad.reason for bad in parts["train"].skipped}
    assert set(skipped) == {"animal/cat/notes.png", "animal/dog/cut.png", "plant/oak/empty.jpg"}
    assert "not a picture" in skipped["animal/cat/notes.png"]
    assert "damaged or truncated" in skipped["animal/dog/cut.png"]
    assert sum(map(len, parts.values())) == 30
    assert all(file == f"{'/'.join(label)}/{file.rsplit('/', 1)[1]}" for file, label in by_file(parts).items())
    with pytest.raises(TooManyBadFiles, match=r"more than 2 of 33 files.*(notes.png|cut.png|empty.jpg).*budget"):
        load(zoo, max_bad_files=2, cache_dir=zoo.with_name("other"))


def test_bad_files_of_a_split_go_with_their_part(zoo, load, make_picture):
    root = zoo.with_name("split")
    shutil.copytree(zoo, root / "train")
    make_picture(root / "test" / "plant" / "oak" / "new.png")
    write(root / "test" / "plant" / "oak" / "bad.png", "hello")
    parts = load(root)
    assert [bad.path for bad in parts["test"].skipped] == ["test/plant/oak/bad.png"]
    assert parts["train"].skipped == ()


def test_bombs_are_bad_files(zoo, load, monkeypatch):
    Image.new("RGB", (60, 60)).save(zoo / "plant" / "oak" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 20)
    (bad,) = load(zoo)["train"].skipped
    assert bad.path == "plant/oak/huge.png"
    assert "pixels" in bad.reason


def test_hidden_files_and_files_beside_the_classes_are_left_alone(zoo, load):
    write(zoo / "README.txt", "hello")
    write(zoo / "animal" / "cat" / ".DS_Store", "x")
    (zoo / ".git").mkdir()
    (zoo / "__MACOSX").mkdir()
    parts = load(zoo)
    assert parts["train"].skipped == ()
    assert sum(map(len, parts.values())) == 30


def test_linked_class_folders_are_followed_and_circles_refused(zoo, load, tmp_path):
    shutil.move(zoo / "plant", tmp_path / "elsewhere")
    (zoo / "plant").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert by_file(load(zoo))["plant/oak/1.png"] == ("plant", "oak")
    (zoo / "animal" / "circle").symlink_to(zoo / "animal", target_is_directory=True)
    with pytest.raises(DataError, match="links back to"):
        load(zoo)


def test_empty_classes_may_be_allowed(flat, load):
    tree = Taxonomy.from_paths([("animal", "cat"), ("animal", "dog"), ("animal", "yak"), ("plant", "oak")])
    with pytest.raises(DataError, match=r"classes with no pictures \(animal/yak\).*allow_empty_classes"):
        load(flat, tree)
    parts = load(flat, tree, allow_empty_classes=True)
    assert parts["train"].taxonomy.num_leaves == 4
    assert tree.index("yak") not in parts["train"].targets


def test_node_text_is_readable(load, tmp_path, make_picture):
    for i in range(3):
        make_picture(tmp_path / "d" / "dog" / "golden_retriever" / f"{i}.png", value=i)
    train = load(tmp_path / "d")["train"]
    assert train.node_text == ("dog", "golden retriever")
    assert train.taxonomy.names == ("dog", "golden_retriever")


def test_the_split_is_honoured_whatever_lies_beside_it(zoo, load, make_picture):
    """Nested classes, a folder and files of another kind beside the parts."""
    root = zoo.with_name("split")
    shutil.copytree(zoo, root / "Train")
    make_picture(root / "test" / "plant" / "oak" / "new.png", value=7)
    make_picture(root / "extra" / "x" / "new.png")
    write(root / "test" / "plant" / "oak" / "desktop.ini", "x")
    parts = load(root)
    assert {name: len(part) for name, part in parts.items()} == {"train": 30, "test": 1}
    assert parts["train"].taxonomy.num_leaves == 3
    assert parts["test"].skipped == ()
    notes = find_pictures(root).notes
    assert "the split is that of the folders Train/, test/" in notes
    assert any(note.startswith("extra/ with 1 pictures is left alone") for note in notes)


def test_a_lone_train_folder_among_others_is_said_to_be_a_class(tmp_path, make_picture):
    for name in ("train", "plane"):
        make_picture(tmp_path / "vehicles" / name / "0.png")
    assert "train/ is taken for a class" in find_pictures(tmp_path / "vehicles").warnings[0]


def test_test_pictures_without_labels_are_left_alone(zoo, load, make_picture):
    root = zoo.with_name("kaggle")
    shutil.copytree(zoo, root / "train")
    make_picture(root / "test" / "1.png")
    found = find_pictures(root)
    assert any(note.startswith("test/ with 1 pictures is left alone") for note in found.notes)
    assert {name: len(part) for name, part in load(root).items()} == {"train": 24, "val": 3, "test": 3}


def test_names_match_by_their_normal_form_and_it_is_said(zoo, load, make_picture):
    make_picture(zoo / "plant" / "Fl\u00e4mischer_Birnbaum" / "0.png", value=200)
    tree = Taxonomy.from_paths(
        [("a", "Cat"), ("a", "cat"), ("a", "DOG"), ("b", "oak"), ("b", "fla\u0308mischer birnbaum")]
    )
    found = find_pictures(zoo, tree)
    assert found.problems == []
    (note,) = [note for note in found.notes if "but for case" in note]
    assert "'dog' is 'DOG'" in note
    assert "'Fl\u00e4mischer_Birnbaum' is 'fla\u0308mischer birnbaum'" in note
    assert "cat" not in note.replace("but for case", ""), "the exact name wins"
    twice = Taxonomy.from_paths([("a", "Cat"), ("a", "CAT"), ("a", "dgo"), ("b", "oak"), ("b", "x")])
    problems = find_pictures(zoo, twice).problems
    assert len(problems) == 3, "all at once"
    assert "several leaves" in problems[0]


def test_a_picture_of_an_inner_class_is_a_partial_label(zoo, load, tmp_path):
    rows = "animal/cat/0.png;animal;cat\nanimal/dog/0.png;animal;\nplant/oak/0.png;plant;oak\n"
    listed = tmp_path / "l.csv"
    listed.write_bytes(b"\xef\xbb\xbfpath;level_1;level_2\r\n" + rows.replace("/", "\\").encode())
    found = find_pictures(zoo, listing=listed)
    assert found.tree.to_paths() == [("animal", "cat"), ("plant", "oak")]
    assert found.tree.names[found.targets[1]] == "animal"
    assert any("partial labels" in note for note in found.notes)
    assert any("semicolons" in note for note in found.notes)
    assert sum(map(len, load(zoo, listing=listed).values())) == 3


def test_columns_by_name_and_latin_1(zoo, tmp_path):
    listed = tmp_path / "l.tsv"
    listed.write_bytes("id\tspecies\tgenus\nanimal/cat/0.png\tk\u00e4tzchen\tfelis\n".encode("latin-1"))
    found = find_pictures(zoo, listing=listed, listing_columns="path=id,label=genus+species")
    assert found.files[0].label == ("felis", "k\u00e4tzchen")
    assert any("latin-1" in note for note in found.notes)
    with pytest.raises(DataError, match="must have the columns path and leaf.*--listing-columns"):
        find_pictures(zoo, listing=listed)


def test_a_home_folder_in_a_listing(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(zoo))
    found = find_pictures(tmp_path, listing=write(tmp_path / "l.csv", "path,leaf\n~/animal/cat/0.png,cat\n"))
    assert found.files[0].path == zoo / "animal" / "cat" / "0.png"


def test_dead_links_and_unknown_endings_are_listed(zoo, load):
    (zoo / "animal" / "cat" / "gone.jpg").symlink_to(zoo / "nowhere.jpg")
    write(zoo / "animal" / "cat" / "new.heic", "x")
    write(zoo / "animal" / "cat" / "notes.txt", "x")
    (zoo / "animal" / "empty").mkdir()
    warnings = find_pictures(zoo).warnings
    assert warnings[0] == "the class folder animal/empty has no pictures"
    assert "1 .heic" in warnings[1]
    assert ".txt" not in warnings[1]
    (bad,) = load(zoo)["train"].skipped
    assert (bad.path, bad.reason) == ("animal/cat/gone.jpg", "it is a dead link")


def test_copies_stay_in_one_part(zoo, load):
    for name in ("cat", "dog"):
        for i in range(10):
            shutil.copy(zoo / "animal" / name / f"{i}.png", zoo / "animal" / name / f"copy-{i}.png")
    part_of = {file: name for name, part in load(zoo).items() for file in part.files}
    for name in ("cat", "dog"):
        for i in range(10):
            assert part_of[f"animal/{name}/{i}.png"] == part_of[f"animal/{name}/copy-{i}.png"]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("id,name\n1,cat\n2,dog\n3,oak\n", [("cat",), ("dog",), ("oak",)]),
        ("species,genus\ncat,x\ndog,x\noak,y\n", [("x", "cat"), ("x", "dog"), ("y", "oak")]),
        (
            "id,name,parent\n1,a,\n2,cat,1\n3,dog,1\n4,oak,\n",
            [("oak",), ("a", "cat"), ("a", "dog")],
        ),
    ],
)
def test_taxonomy_tables_of_other_kinds(flat, load, tmp_path, text, paths):
    tree = load(flat, write(tmp_path / "t.csv", text))["train"].taxonomy
    assert sorted(tree.to_paths()) == sorted(paths)


def bad_missing_root(root):
    return {"root": root / "nowhere"}, "nowhere is not a folder"


def bad_empty_root(root):
    (root / "e").mkdir()
    return {"root": root / "e"}, "folder .*e is empty: put one folder of pictures per class"


def bad_no_class_folders(root):
    return {"root": root / "animal" / "cat"}, "no class folders: make one folder per class"


def bad_files_beside_folders(root):
    shutil.copy(root / "animal" / "cat" / "0.png", root / "animal" / "x.png")
    return {}, "both class folders and files .such as x.png"


def bad_empty_split(root):
    shutil.move(root, root.with_name("t"))
    shutil.move(root.with_name("t"), root / "train")
    (root / "test").mkdir()
    return {}, "test has no class folders"


def bad_class_all_damaged(root):
    for path in (root / "plant" / "oak").iterdir():
        path.write_text("x")
    return {"max_bad_files": 20}, "no picture of the class plant/oak can be read .for example plant/oak/0.png"


def bad_class_missing_in_taxonomy(root):
    tree = write(root.with_name("t.csv"), "leaf,parent\ncat,animal\ndogs,animal\noak,plant\n")
    return {"taxonomy": tree}, "class 'animal/dog' .* is no leaf of the taxonomy: add it.*did you mean 'dogs'"


def bad_class_like_no_other(root):
    tree = write(root.with_name("t.csv"), "leaf,parent\nxxx,animal\nyyy,animal\n")
    return {"taxonomy": tree}, "'animal/cat' .* is no leaf of the taxonomy.*for example xxx, yyy"


def bad_cycle(root):
    tree = write(root.with_name("t.csv"), "parent,child\na,b\nb,c\nc,a\nanimal,cat\n")
    return {"taxonomy": tree}, "t.csv is not a tree: .*cycle"


def bad_two_parents(root):
    tree = write(root.with_name("t.csv"), "parent,child\nanimal,cat\nplant,cat\nplant,oak\n")
    return {"taxonomy": tree}, "t.csv is not a tree: .*cat"


def bad_no_taxonomy_file(root):
    return {"taxonomy": root / "t.csv"}, "taxonomy .*t.csv does not exist"


def bad_taxonomy_suffix(root):
    return {"taxonomy": write(root.with_name("t.yaml"), "x")}, "t.yaml is not a tree"


def bad_no_header(root):
    return {"taxonomy": write(root.with_name("t.csv"), "cat,animal\ndog,animal\n")}, "must be a header.*'cat,animal'"


def bad_empty_taxonomy(root):
    return {"taxonomy": write(root.with_name("t.csv"), "\n")}, "t.csv is empty"


def bad_header_only(root):
    return {"taxonomy": write(root.with_name("t.csv"), "leaf,parent\n")}, "t.csv is not a tree"


def bad_ragged_row(root):
    return {"taxonomy": write(root.with_name("t.csv"), "leaf,parent\ncat\n")}, "t.csv is not a tree.*line 2"


def bad_json(root):
    return {"taxonomy": write(root.with_name("t.json"), '{"a": [')}, "t.json is not valid JSON: .*line 1"


def bad_json_value(root):
    return {"taxonomy": write(root.with_name("t.json"), "3")}, "t.json is not a tree"


def bad_no_listing(root):
    return {"listing": root / "l.csv"}, "listing .*l.csv does not exist"


def listing(root, text):
    return {"listing": write(root.with_name("l.csv"), text)}


def bad_listing_header(root):
    return listing(root, "file,leaf\na,b\n"), "must have the columns path and leaf, got 'file,leaf'"


def bad_listing_cell(root):
    return listing(root, "path,leaf\nanimal/cat/0.png,\n"), "row 2 of .*l.csv has an empty path or leaf"


def bad_listing_length(root):
    return listing(root, "path,leaf\na,b,c\n"), "row 2 of .*l.csv has 3 cells"


def bad_listing_twice(root):
    row = "animal/cat/0.png,cat\n"
    return listing(root, "path,leaf\n" + row + row), "row 3 of .* lists animal/cat/0.png a second time"


def bad_listing_split(root):
    return listing(root, "path,leaf,split\nanimal/cat/0.png,cat,fold1\n"), "the split 'fold1': use train, val or test"


def bad_listing_half_split(root):
    rows = "animal/cat/0.png,cat,train\nanimal/cat/1.png,cat,\n"
    return listing(root, "path,leaf,split\n" + rows), "gives animal/cat/1.png no split"


def bad_listing_file(root):
    return listing(root, "path,leaf\nanimal/cat/99.png,cat\n"), "99.png .in .*l.csv. does not exist: correct its path"


def bad_listing_empty(root):
    return listing(root, "path,leaf\n"), "has a header but no row"


BAD = [function for name, function in sorted(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_bad_input_gives_one_clear_sentence(zoo, load, make):
    kwargs, message = make(zoo)
    with pytest.raises(DataError, match=message) as caught:
        load(kwargs.pop("root", zoo), kwargs.pop("taxonomy", None), **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_size(zoo, load):
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load(zoo, size=0)
    with pytest.raises(ValueError, match="fractions must be"):
        load(zoo, fractions={"train": 0.5})


def test_threads_give_the_same_pictures(zoo, load, tmp_path):
    one = load(zoo)["train"]
    many = load(zoo, workers=4, cache_dir=tmp_path / "second")["train"]
    assert one.files == many.files
    np.testing.assert_array_equal(one.batch(range(len(one))), many.batch(range(len(many))))
