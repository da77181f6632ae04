"""Prompts, locators, LoRA settings and their exact cost."""

import pytest
import torch

from hier_lora import HFDualEncoder, PromptSet, load_dual_encoder, lora_config, lora_overhead
from hier_lora.lora import add_lora
from hier_losses import Taxonomy


def test_prompts_fill_every_node(tax):
    prompts = PromptSet(tax, ("a {}", "one {}"))
    assert prompts.sentences()[tax.index("oak")] == ["a oak", "one oak"]
    assert len(prompts) == tax.num_nodes


def test_styles(tax):
    assert PromptSet(tax, style="parent").words[tax.index("oak")] == "oak, a kind of plant"
    assert PromptSet(tax, style="path").words[tax.index("oak")] == "oak, plant"
    assert PromptSet(tax, names=[f"n{i}" for i in range(7)]).words[0] == "n0"


def test_homonyms_fall_back_to_the_path():
    tax = Taxonomy.from_paths([("bird", "crane"), ("machine", "crane"), ("machine", "drill")])
    words = PromptSet(tax).words
    assert words[tax.index(("bird", "crane"))] == "crane, bird"
    assert words[tax.index(("machine", "crane"))] == "crane, machine"
    assert words[tax.index("drill")] == "drill"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"templates": ("no braces",)}, "exactly one"),
        ({"templates": ("{} and {}",)}, "exactly one"),
        ({"templates": ()}, "at least one"),
        ({"style": "poem"}, "style must be one of"),
        ({"names": ["a"]}, "one name for each of the 7 nodes"),
    ],
)
def test_bad_prompts(tax, kwargs, message):
    with pytest.raises(ValueError, match=message):
        PromptSet(tax, **kwargs)


@pytest.mark.parametrize("locator", ["nothing", "unknown:x", "hf:", ":x"])
def test_unknown_locators_list_the_known(locator):
    with pytest.raises(ValueError, match="hf.*open_clip"):
        load_dual_encoder(locator)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"towers": "left"}, "towers must be one of"),
        ({"r": 0}, "r must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_bad_lora(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny, **kwargs)


def vit_b_32():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        return HFDualEncoder(CLIPModel(CLIPConfig()), None)


def test_overhead_of_clip_vit_b_32_is_exact():
    """r (d_in + d_out) per layer: 983,040 weights for q and v in both towers, counted by hand."""
    model = vit_b_32()
    assert sum(p.numel() for p in model.parameters()) == 151_277_313
    plain = lora_overhead(model)
    assert (plain["vision"].base, plain["text"].base) == (87_849_216, 63_428_096)
    with torch.device("meta"):
        add_lora(model, lora_config(model, r=16))
    found = lora_overhead(model)
    assert (found["vision"].adapter, found["text"].adapter, found["total"].adapter) == (589_824, 393_216, 983_040)
    assert [round(found[k].percent, 3) for k in ("vision", "text", "total")] == [0.671, 0.620, 0.650]


def test_overhead_of_all_six_linears():
    model = vit_b_32()
    targets = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    with torch.device("meta"):
        add_lora(model, lora_config(model, r=16, targets=targets))
    found = lora_overhead(model)
    assert (found["vision"].adapter, found["text"].adapter) == (2_654_208, 1_769_472)
    assert [round(found[k].percent, 2) for k in ("vision", "text")] == [3.02, 2.79]


def test_overhead_needs_named_towers():
    with pytest.raises(ValueError, match="tower_modules"):
        lora_overhead(torch.nn.Linear(2, 2))
