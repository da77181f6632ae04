"""`icl-mini --data taxonomy` and its study from the command line, on generated pictures and a tiny random Llama."""

import json

import numpy as np
import pytest
import torch

from app_data.read.pictures import PictureSet
from app_data.sets.levels import held_out_subgroups, picture_paths, shuffled_paths
from app_data.store.errors import DataError
from app_data.weights.llava import IGNORED, IMAGE_TOKEN, IclMini, Shown, build_llava, load_icl_mini
from app_eval.ask import demonstration_study, level_task
from app_eval.ask.demonstration_task import WITH, WITHOUT
from app_eval.ask.level_task import level_codes
from app_eval.measure.answers import ExactReader
from app_train.cli import hier
from app_train.recipes.icl import mini, sources
from app_train.recipes.icl.lift import train_lift
from helpers.language import tiny_language
from hier_losses import Taxonomy

pytestmark = pytest.mark.filterwarnings("default")
WIDTH = 16
PATHS = [(f"group {g}", f"kind {g}{s}", f"it {g}{s}{leaf}") for g in range(3) for s in range(4) for leaf in range(3)]
QUICK = ["--num-episodes", "8", "--episodes.batch-size", "2", "--align.epochs", "1", "--shots", "0", "3", "--rank", "2"]
QUICK += ["--no-tensorboard", "--save-every", "3"]


def load_emoji(artists, size=0, cache_dir=None):
    """Every leaf by each artist."""
    tree = Taxonomy.from_paths(PATHS)
    targets = np.array([tree.index(path) for _ in artists for path in PATHS])
    styles = tuple(artist for artist in artists for _ in PATHS)
    store = np.zeros((len(targets), 4, 4, 3), dtype=np.uint8)
    names = tuple(path[2] for path in PATHS) * len(artists)
    return PictureSet(store, np.arange(len(targets)), targets, styles, names, tree, f"made of {artists}")


def eye_features(data, size, cache_dir=None):
    """Leaves of one subgroup lie near each other, each artist draws in a way of its own."""
    draw = np.random.default_rng(0)
    group, kind, leaf = (draw.normal(size=(36, WIDTH)) * scale for scale in (2, 1, 0.5))
    at = [PATHS.index(path) for path in picture_paths(data)]
    artist = np.array([[len(style)] for style in data.styles])
    return torch.from_numpy(np.array([group[i // 12] + kind[i // 3] + leaf[i] for i in at]) + 0.1 * artist).float()


@pytest.fixture
def made(monkeypatch):
    """Everything real is replaced: pictures, eye, texts, language model."""
    for module in (sources, level_task):
        monkeypatch.setattr(module, "load_emoji", load_emoji)
        monkeypatch.setattr(module, "eye_features", eye_features)
    monkeypatch.setattr(level_task, "MiniLM", lambda: lambda texts: torch.eye(len(texts)))
    monkeypatch.setattr(mini, "load_language", tiny_language)
    monkeypatch.setattr(demonstration_study, "load_icl_mini", lambda run, _: load_icl_mini(run, tiny_language()))


def task():
    return level_task.level_task(32, None, lambda *a, **k: train_lift(*a, steps=5, **k))


def test_train_and_judge_from_the_command_line(made, tmp_path, capsys):
    out, path = tmp_path / "run", tmp_path / "taxonomy.json"
    assert hier(["train", "icl-mini", "--data", "taxonomy", "--out", str(out), *QUICK]) == 0
    said = capsys.readouterr().out
    assert f"hier eval icl {out} --out docs/results/hyper-icl-taxonomy.json" in said
    card = json.loads((out / "model" / "card.json").read_text())
    assert card["questions"] == "taxonomy"
    assert card["options"].startswith("--num-episodes 8 ")
    assert hier(["eval", "icl", str(out), "--out", str(path), "--quick"]) == 0
    found = json.loads(path.read_text())
    assert (found["study"], found["complete"]) == ("icl-taxonomy", True)
    (content,) = found["tasks"]
    assert content["num_pool"] == 3 * 3 * 18
    assert {(c["selector"], len(c["right"]["none"])) for c in content["cells"]} == {
        (name, 6) for name in (*content["selectors"], "no demonstrations", "no demonstrations, no picture")
    }
    assert len(content["selection"]["kinds"]) == content["selection"]["num_queries"] == 3 * 18
    for cell in content["selection"]["cells"]:
        assert len(cell["hits"]) == len(cell["vote"]) == 3 * 18
    # The same command has nothing left to do, and ends in the same file.
    before = path.read_bytes()
    assert hier(["eval", "icl", str(out), "--out", str(path), "--quick"]) == 0
    assert json.loads(path.read_text())["tasks"] == json.loads(before)["tasks"]


def test_bad_input_is_one_sentence(made, tmp_path, capsys):
    out = tmp_path / "run"
    run = ["train", "icl-mini", "--data", "taxonomy", "--out", str(out), *QUICK]
    assert hier([*run, "--shots", "0", "54"]) == 2
    assert "shots must be smaller than the 54 pictures of taxonomy, got 54" in capsys.readouterr().err
    assert hier(["train", "icl-mini", "--data", "taxonomies", "--out", str(out)]) == 2
    capsys.readouterr()
    assert hier(run) == 0
    assert hier(["eval", "icl", str(out), "--out", str(tmp_path / "x.json"), "--queries", "1"]) == 2
    assert hier(["eval", "icl", str(out)]) == 2
    assert "--out is missing" in capsys.readouterr().err
    for name in (WITH, WITHOUT):
        with pytest.raises(DataError, match="k must be at most"):
            task().choose(name, 160, 0)


def test_nothing_of_a_held_out_subgroup_trains(made):
    config = mini.IclMiniConfig(data="taxonomy")
    ((source,), _, _) = sources.load_sources(config, None)
    held = held_out_subgroups(PATHS)
    paths = picture_paths(load_emoji(sources.ARTISTS))
    seen, shown = set(), set()
    for number in range(300):
        draw = np.random.default_rng(number)
        seen |= {paths[source.items.rows[i]] for i in source.draw(3, 0.5, draw)}
        shown |= {one.answer for one in source.episode(3, 0.5, np.random.default_rng(number))}
    assert {path[:2] for path in seen} == {path[:2] for path in PATHS} - held
    assert not shown & {name for path in PATHS if path[:2] in held for name in path[1:]}
    # The model's statistics and words come of the same pictures.
    pool = task().pool_paths
    assert {path[:2] for path in pool} == held
    assert {path[:2] for path in task().query_paths} == held


def test_episodes_can_be_answered_from_their_demonstrations_alone(made):
    """One demonstration at least has the query's question and answer; names trade places within a level; the query is asked."""
    ((source,), _, _) = sources.load_sources(mini.IclMiniConfig(data="taxonomy"), None)
    items, renamed = source.items, 0
    for number in range(200):
        chosen = source.draw(3, 0.5, np.random.default_rng(number))
        episode = source.episode(3, 0.5, np.random.default_rng(number))
        assert len(set(items.rows[chosen[:-1]]) - {items.rows[chosen[-1]]}) >= 1
        assert items.rows[chosen[-1]] not in items.rows[chosen[:-1]]
        keys = [(items.kinds[i], items.answers[i]) for i in chosen]
        assert keys[-1] in keys[:-1]
        # A name stands for one answer throughout the episode.
        assert len({(k, one.answer) for k, one in zip(keys, episode, strict=True)}) == len(set(keys))
        assert len({(k[0], one.answer) for k, one in zip(keys, episode, strict=True)}) == len(set(keys))
        assert [one.asked for one in episode] == [k in keys[:at] or at == 3 for at, k in enumerate(keys)]
        assert [one.question for one in episode] == [items.questions[i] for i in chosen]
        level = [{a for k, a in zip(items.kinds, items.answers, strict=True) if k == kind} for kind, _ in keys]
        assert all(one.answer in names for one, names in zip(episode, level, strict=True))
        renamed += any(one.answer != key[1] for one, key in zip(episode, keys, strict=True))
    assert 60 < renamed < 140
    model = IclMini(
        build_llava(tiny_language()[0], tiny_language()[1].convert_tokens_to_ids(IMAGE_TOKEN), WIDTH),
        tiny_language()[1],
    )
    batch = model.episode_batch([episode])
    asked = model.tokenizer.decode(batch["targets"][0][batch["targets"][0] != IGNORED])
    assert asked == "".join(f" {one.answer}" for one in episode if one.asked)


def test_exact_answers_equal_generation():
    """Right is what greedy generation would say up to the end of its line; here every token in turn serves as that end."""
    language, tokenizer = tiny_language()
    model = IclMini(build_llava(language, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), WIDTH), tokenizer).eval()
    features = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    demos, query = [Shown(features[i], "color?", "red" * (i + 1)) for i in range(2)], Shown(features[2], "what?")
    rights = 0
    for end in range(3, 259):
        model._known = {"\n": [end]}
        prompt = [*model.start, *(t for one in demos for t in model.demo_ids(one)), *model.question_ids(query)]
        said: list[int] = []
        with torch.no_grad():
            while len(said) < 4:
                ids = torch.tensor([[*prompt, *said]])
                said.append(
                    int(model.llava(input_ids=ids, pixel_values=features, use_cache=False).logits[0, -1].argmax())
                )
        answers = [said[:1], said[:2], said[:3], [said[0], 300 - said[1]]]
        for number, answer in enumerate(answers):
            model._known[f" {number}"] = answer
        queries = [Shown(query.features, query.question, str(number)) for number in range(4)]
        found = ExactReader(model).right([demos] * 4, queries, {"none": None})["none"]
        assert found == [answer == said[: len(answer)] and said[len(answer)] == end for answer in answers]
        rights += sum(found)
    assert rights


def test_levels_train_the_anchors(made):
    paths, kinds = list(PATHS[:6]) * 3, [kind for kind in ("group", "subgroup", "leaf") for _ in range(6)]
    found = level_codes(kinds, paths)
    for depth, level in enumerate(("group", "subgroup", "leaf")):
        for i in range(18):
            for j in range(i):
                same = kinds[i] == kinds[j] == level and paths[i][: depth + 1] == paths[j][: depth + 1]
                assert bool(found[i, depth] == found[j, depth]) == same
    # A column of its own is the one that was trained before, to the bit; two columns are the mean of two losses.
    features, one = torch.randn(40, 8), torch.arange(40) // 4
    lifts = [
        train_lift(features, codes, out_dim=4, steps=3)
        for codes in (one, one[:, None], torch.stack([one, one // 2], 1))
    ]
    assert torch.equal(lifts[0].weight, lifts[1].weight)
    assert not torch.equal(lifts[0].weight, lifts[2].weight)
    with pytest.raises(DataError, match="no two items share"):
        train_lift(features, torch.arange(80).reshape(40, 2))


def test_selectors_on_the_tree(made):
    whole = task()
    hits = np.array(
        [
            [(a, x) == (b, y) for b, y in zip(whole.pool.kinds, whole.pool.answers, strict=True)]
            for a, x in zip(whole.query.kinds, whole.query.answers, strict=True)
        ]
    )
    assert np.array_equal(whole.hits.numpy(), hits)
    for name in whole.selectors():
        found = whole.choose(name, 3, 0)
        assert found.ids.shape == (54, 3)
        count = np.take_along_axis(hits, found.ids.numpy(), 1).sum(1)
        if name in (WITH, WITHOUT):
            assert set(count) == {int(name == WITH)}
            asked = np.array(whole.pool.questions)[found.ids.numpy()]
            assert (asked == np.array(whole.query.questions)[:, None]).all()
        judged = [c for c in whole.judged((0,), 3)["cells"] if c["selector"] == name]
        assert all(cell["hits"] == "".join(map(str, count)) for cell in judged)
    # Euclidean anchors are the nearest points.
    pool, query = whole.lifted(level_task.ANCHORS[level_task.EUCLIDEAN][0], 0)
    distance = (query[:, None] - pool).norm(dim=-1)
    ids = whole.choose(level_task.EUCLIDEAN, 3, 0).ids.flip(-1)
    torch.testing.assert_close(distance.gather(1, ids), distance.sort(-1).values[:, :3], atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole.lifted(1.0, 0)[0], whole.lifted(1.0, 0, own_tree=False)[0])
    assert shuffled_paths(whole.pool_paths, 0) != whole.pool_paths
    part = whole.first(7)
    assert part.query.answers == whole.query.answers[:6]  # whole pictures
    assert torch.equal(part.choose("RICES", 3, 0).ids, whole.choose("RICES", 3, 0).ids[:6])
