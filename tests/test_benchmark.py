"""`hier eval blip` on tiny checkpoints of Hugging Face's own classes, of LAVIS's form and of ours, against brute force."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor

from app_train.cli import hier
from helpers import weights

pytestmark = pytest.mark.filterwarnings("default")

CAPTIONS = (
    ("a red circle", "the shape is red", "a circle"),
    ("a blue triangle", "a picture of a triangle"),
    ("a green rectangle is the shape", "green"),
    ("a black circle", "the circle is black"),
    ("a teal shape", "a picture of a teal rectangle"),
    ("a yellow triangle", "yes the triangle is yellow"),
)
OWNER = [i for i, captions in enumerate(CAPTIONS) for _ in captions]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Six test pictures and one to train on, in the three forms."""
    root = tmp_path_factory.mktemp("coco")
    draw = np.random.default_rng(0)
    images, lists, rows, notes = [], [], [], []
    for number, captions in enumerate((*CAPTIONS, ("a brown shape",))):
        name = f"val2014/COCO_val2014_{number:012d}.png"
        (root / "val2014").mkdir(exist_ok=True)
        colour = draw.integers(0, 255, 3)
        pixels = np.clip(draw.normal(colour, 60, (20 + number, 30, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / name)
        split = "test" if number < 6 else "train"
        images.append(
            {"imgid": number, "cocoid": 10 + number, "split": split, "filepath": "val2014", "filename": name[8:],
             "sentences": [{"raw": text} for text in captions]}
        )  # fmt: skip
        if number < 6:
            lists.append({"image": name, "caption": list(captions)})
            rows.append({"id": number, "file_name": name, "domain": ("in-domain", "out-domain")[number % 2]})
            notes += [{"image_id": number, "caption": text} for text in captions]
    (root / "dataset_coco.json").write_text(json.dumps({"images": images}))
    (root / "coco_karpathy_test.json").write_text(json.dumps(lists))
    (root / "nocaps_val.json").write_text(json.dumps({"images": rows, "annotations": notes}))
    (root / "nocaps_test.json").write_text(json.dumps({"images": rows}))
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return weights.blip2_classes(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def evaluate(coco, tmp_path, capsys):
    """Run the command; the result, what it printed, and the table of a task."""

    def run(model, *more, out="run", data="dataset_coco.json", status=0):
        found = hier(
            ["eval", "blip", str(model), "--data", str(coco / data), "--pictures", str(coco), "--out", str(tmp_path / out),
             "--cache-dir", str(tmp_path / "cache"), "--device", "cpu", *more]
        )  # fmt: skip
        said = capsys.readouterr()
        assert found == status, said.err
        if status:
            (sentence,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
            return sentence
        return json.loads((tmp_path / out / "result.json").read_text()), said.out

    return run


def pictures(coco, processor):
    opened = [Image.open(coco / "val2014" / f"COCO_val2014_{i:012d}.png").convert("RGB") for i in range(6)]
    return processor.image_processor(opened, return_tensors="pt")["pixel_values"]


def ranks(scores, right):
    """By hand: how many wrong items of each row score at least as high as its best right one."""
    found = []
    for row, own in zip(scores.tolist(), right, strict=True):
        best = max(row[j] for j in own)
        found.append(sum(1 for j, s in enumerate(row) if j not in own and s >= best))
    return found


def recall(scores, right, k):
    return 100 * sum(rank < k for rank in ranks(scores, right)) / len(right)


@pytest.fixture(scope="module")
@torch.no_grad()
def by_hugging_face(checkpoints, coco):
    """Cosines and matching logits of all pairs, by Hugging Face's forward."""
    model = Blip2ForImageTextRetrieval.from_pretrained(checkpoints[0]).eval()
    processor = Blip2Processor.from_pretrained(checkpoints[0])
    pixels, texts = pictures(coco, processor), [t for captions in CAPTIONS for t in captions]
    made = processor.tokenizer(texts, padding=True, return_tensors="pt")
    itc = model(pixels, made["input_ids"], made["attention_mask"], use_image_text_matching_head=False).logits_per_image
    itm = torch.stack(
        [
            model(
                p.expand(len(texts), -1, -1, -1), made["input_ids"], made["attention_mask"], use_image_text_matching_head=True
            ).logits_per_image[:, 1]
            for p in pixels
        ]
    )  # fmt: skip
    return itc, itm


@pytest.mark.parametrize("data", ["dataset_coco.json", "coco_karpathy_test.json"])
def test_recalls_of_hugging_faces_model_are_those_of_brute_force(
    evaluate, checkpoints, by_hugging_face, data, tmp_path
):
    result, said = evaluate(checkpoints[0], "--rerank", "3", "--batch-size", "4", data=data)
    itc, itm = by_hugging_face
    own = [[j for j, owner in enumerate(OWNER) if owner == i] for i in range(6)]
    both = []
    for scores, size in ((itc, 13), (itc.T, 6)):
        candidates = scores.argsort(1, descending=True)[:, :3]
        total = (itm + itc) if size == 13 else (itm + itc).T
        both.append(torch.full_like(total, -torch.inf).scatter(1, candidates, total.gather(1, candidates)))
    expected = {}
    for words, i2t, t2i in (("", itc, itc.T), (", re-ranked", *both)):
        for k in (1, 5, 10):
            expected[f"TR@{k}{words}"] = recall(i2t, own, k)
            expected[f"IR@{k}{words}"] = recall(t2i, [[o] for o in OWNER], k)
        six = [expected[f"{side}@{k}{words}"] for side in ("TR", "IR") for k in (1, 5, 10)]
        expected[f"mean recall{words}"] = sum(six) / 6
    table = load_file(tmp_path / "run" / "retrieval.safetensors")
    for name, scores, right in (
        ("text_rank", itc, own), ("image_rank", itc.T, [[o] for o in OWNER]),
        ("text_rank_itm", both[0], own), ("image_rank_itm", both[1], [[o] for o in OWNER]),
    ):  # fmt: skip
        assert table[name].tolist() == ranks(scores, right), name
    for name, value in expected.items():
        found = result["scores"][name]
        assert found[0] == pytest.approx(value, abs=1e-4), name
        assert found[1] <= found[0] <= found[2]
    assert 0 < expected["TR@1"] < 100 or 0 < expected["IR@1"] < 100
    assert expected["IR@1"] != expected["IR@1, re-ranked"] or expected["TR@1"] != expected["TR@1, re-ranked"]
    assert "| IR@10, re-ranked |" in said
    assert result["tasks"] == ["retrieval", "radius"]
    assert "AUROC of errors by the radius" in result["scores"]
    assert set(result["radius"]["scores"]) == {
        "radius", "random", "the largest softmax probability", "the norm of the Euclidean query states",
        "the mean brightness", "the entropy of the grey values", "the mean caption length",
    }  # fmt: skip


@torch.no_grad()
def test_scores_kept_in_parts_are_hugging_faces_logits(evaluate, checkpoints, by_hugging_face, tmp_path, monkeypatch):
    """The parts are looked at before they are deleted."""
    from app_eval.ask import benchmark

    monkeypatch.setattr(benchmark.shutil, "rmtree", lambda *a, **k: None)
    evaluate(checkpoints[0], "--rerank", "100")
    parts = tmp_path / "run" / "parts"
    itc, itm = by_hugging_face
    torch.testing.assert_close(load_file(parts / "pictures-00000000.safetensors")["itc"], itc, rtol=0, atol=1e-5)
    found = load_file(parts / "matching-00000000.safetensors")["itm"]
    torch.testing.assert_close(found, itm, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_captions_are_hugging_faces_tokens(evaluate, checkpoints, coco, tmp_path):
    result, said = evaluate(checkpoints[1], "--batch-size", "4")
    model = Blip2ForConditionalGeneration.from_pretrained(checkpoints[1]).eval()
    processor = Blip2Processor.from_pretrained(checkpoints[1])
    opened = [Image.open(coco / "val2014" / f"COCO_val2014_{i:012d}.png").convert("RGB") for i in range(6)]
    made = processor(images=opened, text=["a photo of"] * 6, return_tensors="pt")
    out = model.generate(
        made["pixel_values"], input_ids=made["input_ids"], attention_mask=made["attention_mask"],
        num_beams=5, min_new_tokens=8, max_new_tokens=30, do_sample=False,
    )  # fmt: skip
    expected = processor.batch_decode(out[:, made["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert [row["caption"] for row in rows] == [text.strip() for text in expected]
    assert [row["image_id"] for row in rows] == [10, 11, 12, 13, 14, 15]
    from app_eval.measure.captions import score_captions

    scores = score_captions(dict(enumerate(CAPTIONS)), {i: row["caption"] for i, row in enumerate(rows)})
    for name, key in (("BLEU-1", "bleu_1"), ("BLEU-4", "bleu_4"), ("ROUGE-L", "rouge_l"), ("CIDEr", "cider")):
        assert result["scores"][name][0] == pytest.approx(100 * scores[key], abs=1e-5)
    assert result["absent"] == ["SPICE", "METEOR"]
    assert "SPICE and METEOR are absent" in said


def test_nocaps_has_domains_and_its_test_part_no_scores(evaluate, checkpoints, tmp_path):
    result, _ = evaluate(checkpoints[1], data="nocaps_val.json")
    assert {"CIDEr, in-domain", "CIDEr, out-domain"} <= set(result["scores"])
    one, two, both = (result["scores"][n][0] for n in ("CIDEr, in-domain", "CIDEr, out-domain", "CIDEr"))
    assert (one + two) / 2 == pytest.approx(both, abs=1e-4)
    result, _ = evaluate(checkpoints[1], data="nocaps_test.json", out="bare")
    assert result["scores"] == {}
    assert len(json.loads((tmp_path / "bare" / "captions.json").read_text())) == 6
    assert "6 of 6 pictures have no caption" in evaluate(checkpoints[0], data="nocaps_test.json", out="x", status=2)


@pytest.mark.parametrize("stage", ["retrieval", "captions"])
def test_a_lavis_file_gives_what_the_same_weights_give(evaluate, checkpoints, tmp_path, stage):
    """The trained part in LAVIS's names over a base whose own trained part is noise."""
    folder = checkpoints[stage == "captions"]
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    state = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    frozen = ("vision_model.embeddings.", "vision_model.encoder.", "language_model.")
    noise = {k: v if k.startswith(frozen) else torch.rand_like(v) for k, v in state.items()}
    save_file(noise, base / "model.safetensors", {"format": "pt"})
    renamed = {}
    for name, value in state.items():
        if name.startswith(frozen):
            continue
        for old, new in (
            ("vision_model.post_layernorm.", "ln_vision."), ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
            ("qformer.", "Qformer.bert."), ("embeddings.", "Qformer.bert.embeddings."), ("attention.attention.", "attention.self."),
            ("vision_projection.", "vision_proj."), ("text_projection.", "text_proj."), ("language_projection.", "opt_proj."),
        ):  # fmt: skip
            if old in name and (name.startswith(old) or old.startswith("attention")):
                name = name.replace(old, new, 1)
        renamed[name] = value
    torch.save({"model": renamed}, tmp_path / "lavis.pth")
    first, _ = evaluate(folder, out="first")
    second, _ = evaluate(tmp_path / "lavis.pth", "--base", str(base), out="second")
    assert second["scores"] == first["scores"]
    worse, _ = evaluate(base, out="noise")
    assert worse["scores"] != first["scores"]
    assert "name a folder of Hugging Face's classes" in evaluate(tmp_path / "lavis.pth", out="x", status=2)
    assert "goes with a checkpoint file" in evaluate(folder, "--base", str(base), out="x", status=2)
    torch.save({"model": {"query_tokens": renamed["query_tokens"]}}, tmp_path / "part.pth")
    assert "part.pth lacks blip2." in evaluate(tmp_path / "part.pth", "--base", str(base), out="x", status=2)
    torch.save({"model": print}, tmp_path / "code.pth")
    assert "weights_only=True" in evaluate(tmp_path / "code.pth", "--base", str(base), out="x", status=2)


@pytest.fixture(scope="module")
def hyperbolic(checkpoints, tmp_path_factory):
    """A model of ours with both stages in the form of a run."""
    from hyper_blip import HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining, HyperbolicConfig

    run = tmp_path_factory.mktemp("ours")
    ids = {"cls_token_id": 2, "sep_token_id": 3, "dec_token_id": 4}
    first = HyperBlip2ForPretraining.from_blip2(str(checkpoints[0]), HyperbolicConfig.distance(), **ids)
    first.save_pretrained(run / "stage1")
    second = HyperBlip2ForConditionalGeneration.from_blip2(str(checkpoints[1]))
    second.save_pretrained(run / "stage2")
    for stage, folder in zip(("stage1", "stage2"), checkpoints, strict=True):
        Blip2Processor.from_pretrained(folder).save_pretrained(run / stage)
    return run


def test_a_hyperbolic_model_against_a_euclidean_one(evaluate, checkpoints, hyperbolic, coco, tmp_path):
    from hyper_blip import HyperBlip2ForPretraining

    evaluate(checkpoints[0], out="plain")
    result, said = evaluate(hyperbolic, "--against", str(tmp_path / "plain"))
    assert result["tasks"] == ["retrieval", "radius", "captions"]
    # The distance ranks as the model itself says, and the radius is its own.
    model = HyperBlip2ForPretraining.from_pretrained(hyperbolic / "stage1")
    processor = Blip2Processor.from_pretrained(hyperbolic / "stage1")
    pixels = pictures(coco, processor)
    made = processor.tokenizer([t for c in CAPTIONS for t in c], padding=True, return_tensors="pt")
    with torch.no_grad():
        image = model.encode_image(pixels)
        scores = model.similarity(image, model.encode_text(made["input_ids"], made["attention_mask"]))
    own = [[j for j, owner in enumerate(OWNER) if owner == i] for i in range(6)]
    assert result["scores"]["TR@1"][0] == pytest.approx(recall(scores, own, 1), abs=1e-4)
    table = load_file(tmp_path / "run" / "retrieval.safetensors")
    torch.testing.assert_close(table["radius"], image.radius.mean(1), rtol=1e-5, atol=1e-6)
    plain = json.loads((tmp_path / "plain" / "result.json").read_text())
    against = result["against"]
    for name, found in against["differences"].items():
        a, b = result["scores"][name][0], plain["scores"][name][0]
        assert found["interval"][0] == pytest.approx(a - b, abs=2e-6)
        assert found["word"] in ("better", "worse", "undecided")
    assert "BLEU-1" not in against["differences"]
    assert "| difference | word |" in said
    assert not (tmp_path / "run" / "parts").exists()


def test_killed_and_resumed_gives_the_same_files(evaluate, hyperbolic, tmp_path, monkeypatch):
    """Ended within each pass; what was done is not done again."""
    from app_eval.ask import benchmark_tables as tables

    monkeypatch.setattr(tables, "CHUNK", 2)
    evaluate(hyperbolic, out="whole")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    written = []

    class Killed(BaseException):
        pass

    for limit in (4, 9, 12, 15):
        kept, json_kept = tables.new_file, tables.write_json

        def one_more(limit=limit):
            written.append(1)
            if len(written) > limit:
                raise Killed

        def save(path, kept=kept, one_more=one_more):
            one_more()
            return kept(path)

        def save_json(path, content, json_kept=json_kept, one_more=one_more):
            one_more()
            json_kept(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(tables, "new_file", save)
            patch.setattr(tables, "write_json", save_json)
            with pytest.raises(Killed):
                evaluate(hyperbolic, out="killed")
        written.pop()
    done = len(written)
    evaluate(hyperbolic, out="killed")
    assert done == 15
    resumed = {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()}
    assert resumed == whole
    # A finished evaluation loads no model.
    monkeypatch.setattr(tables, "load_stage", None)
    evaluate(hyperbolic, out="killed")


def test_bad_input_ends_in_one_sentence(evaluate, checkpoints, hyperbolic, coco, tmp_path):
    first, second = checkpoints

    def refused(model, *more, words, **kwargs):
        assert words in evaluate(model, *more, status=2, **kwargs)

    refused(tmp_path / "none", words="does not exist")
    refused(coco, words="holds no trained model")
    refused(first, "--tasks", "captions", words="is a model for retrieval and radius, not for captions")
    refused(second, "--tasks", "radius", words="is a model for captions, not for radius")
    refused(first, "--split", "val", words="has no part 'val', it has test, train")
    refused(first, "--limit", "0", words="--limit must be >= 1, got 0")
    refused(first, "--rerank", "-1", words="--rerank must be >= 0, got -1")
    refused(first, "--batch-size", "0", words="--batch-size must be >= 1, got 0")
    refused(first, "--device", "nothing", words="cannot be loaded")
    refused(first, "--against", str(tmp_path / "none"), words="holds no finished evaluation")
    refused(first, data="nothing.json", words="does not exist")
    refused(first, data="val2014", words="holds no tar archives")
    # A picture that is missing or damaged would make the scores those of other data.
    rows = [{"path": f"val2014/COCO_val2014_{i:012d}.png", "caption": "a circle"} for i in range(6)]
    table = tmp_path / "own.json"
    table.write_text(json.dumps([*rows, {"path": str(tmp_path / "bad.png"), "caption": "a shape"}]))
    refused(first, data=table, words="1 of 7 pictures do not exist, the first is")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    refused(first, data=table, words="cannot be read, it is not a picture", out="bad")
    evaluate(first, "--limit", "4", "--rerank", "0", out="four")
    refused(first, "--limit", "5", "--rerank", "0", out="four", words="holds an evaluation of other settings (data, n)")
    refused(first, "--against", str(tmp_path / "four"), words="was made on other pictures", out="w")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(first, out="full", words="is not empty and holds no evaluation")
    shutil.copytree(first, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(tmp_path / "broken", words="is no configuration of a model")
    (tmp_path / "broken" / "config.json").write_text('{"architectures": ["BertModel"]}')
    refused(tmp_path / "broken", words="holds a BertModel, not one of")
    shutil.copy(first / "config.json", tmp_path / "broken" / "config.json")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"cut")
    refused(tmp_path / "broken", words="cannot be loaded", out="v")
