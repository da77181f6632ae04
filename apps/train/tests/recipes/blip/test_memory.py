"""The memory plan against what steps of small models took on a CPU, counted tensor by tensor."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Blip2Config, OPTConfig

from app_train.recipes.blip.memory import memory_plan
from hyper_blip import HyperBlip2Config, HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining, HyperbolicConfig


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at once."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key):
        self.now -= self.sizes.pop(key, 0)


def config(width=64, layers=4, channels=96, size=112, words=2000, language=64, depth=2, vocabulary=3000):
    vision = {
        "hidden_size": channels, "intermediate_size": 2 * channels, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": size, "patch_size": 14, "initializer_range": 0.02,
    }  # fmt: skip
    qformer = {
        "vocab_size": words, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "max_position_embeddings": 64, "use_qformer_text_input": True,
    }  # fmt: skip
    text = OPTConfig(
        vocab_size=vocabulary, hidden_size=language, ffn_dim=4 * language, num_hidden_layers=depth, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=language, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    blip2 = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=8,
        image_text_hidden_size=16, image_token_index=vocabulary - 1,
    )  # fmt: skip
    return HyperBlip2Config(blip2, HyperbolicConfig.distance(), cls_token_id=1, sep_token_id=2, dec_token_id=words - 1)


def measured(stage, settings, pairs, tokens, checkpointing):
    """Bytes of a step after the first one, so that gradients are there already."""
    if stage == 2:
        settings.blip2.qformer_config.use_qformer_text_input = False
    kind = HyperBlip2ForPretraining if stage == 1 else HyperBlip2ForConditionalGeneration
    torch.manual_seed(0)
    model = kind.from_config(settings).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    size = settings.blip2.vision_config.image_size
    pixels, ids = torch.randn(pairs, 3, size, size), torch.randint(5, 100, (pairs, tokens))
    more = {"step": 0}
    if stage == 1:
        ids[:, 0], ids[:, -1] = 1, 2
    else:
        ids = torch.cat([torch.full((pairs, 8), settings.blip2.image_token_index), ids], 1)
        more = {"labels": ids.masked_fill(ids == ids[0, 0], -100)}

    def step():
        model(pixels, ids, torch.ones_like(ids), **more).loss.backward()

    step()
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Peak(known) as peak:
        step()
    return peak.peak


# What the plan once left out dominates in turn: logits, tripled features, keys and values, the language model.
CASES = [
    (1, {}), (1, {"words": 20000}), (1, {"channels": 960}), (1, {"width": 256}), (1, {"size": 224}),
    (2, {}), (2, {"vocabulary": 30000}), (2, {"depth": 6, "language": 256}), (2, {"channels": 960}), (2, {"width": 256, "layers": 8}),
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("stage", "changes"), CASES)
def test_a_step_takes_what_the_plan_says(stage, changes, checkpointing):
    settings = config(**changes)
    rows = memory_plan(
        stage, copy.deepcopy(settings), pairs=8, tokens=8, checkpointing=checkpointing, width=4
    )  # fmt: skip
    planned = sum(row.activations for row in rows)
    assert planned == pytest.approx(measured(stage, settings, 8, 8, checkpointing), rel=0.15)


def test_the_plan_of_the_large_model_counts_what_it_left_out():
    first = {row.part: row.activations for row in memory_plan(1, pairs=100)}
    features = 4 * 100 * 257 * 1408
    logits = 14 * 100 * 32 * 30523
    assert first["qformer"] > 14 * features > logits
    second = {row.part: row.activations for row in memory_plan(2, pairs=64)}
    # 64 tokens, 32 layers of width 2,560 and the logits; the layers of a frozen model are not computed again.
    assert second["language"] == 64 * 64 * (32 * 20 * 2560 + 14 * 50304)
    assert second == {row.part: row.activations for row in memory_plan(2, pairs=64, checkpointing=True)}
