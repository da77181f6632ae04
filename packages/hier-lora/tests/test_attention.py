"""Attention with a linear layer for each projection is torch's own, and LoRA reaches all of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hier_lora import HierLoraCLIP, lora_config
from hier_lora._attention import ProjectedAttention, project_attention


def attention(**kwargs):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, dtype=kwargs.pop("dtype", torch.double), **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [None, "float", "bool", "heads"])
def test_it_is_the_same_function(batch_first, bias, mask):
    module = attention(batch_first=batch_first, bias=bias)
    x = torch.randn(3, 5, 8).double() if batch_first else torch.randn(5, 3, 8).double()
    masks = {
        None: None,
        "float": torch.full((5, 5), -torch.inf).triu(1).double(),
        "bool": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "heads": torch.randn(3 * 2, 5, 5).double(),
    }
    expected = module(x, x, x, need_weights=False, attn_mask=masks[mask])[0]
    found, weights = ProjectedAttention(module)(x, x, x, need_weights=False, attn_mask=masks[mask])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert weights is None


def test_keys_from_elsewhere():
    module = attention(batch_first=True)
    query, other = torch.randn(2, 3, 8).double(), torch.randn(2, 7, 8).double()
    expected = module(query, other, other, need_weights=False)[0]
    torch.testing.assert_close(ProjectedAttention(module)(query, other, other)[0], expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do():
    with pytest.raises(ValueError, match="one width for queries"):
        ProjectedAttention(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(ValueError, match="need_weights must be False"):
        ProjectedAttention(attention())(*[torch.randn(2, 3, 8)] * 3, need_weights=True)
    model = nn.ModuleDict({"a": attention(), "b": nn.MultiheadAttention(8, 2, kdim=4)})
    project_attention(model)
    assert isinstance(model["a"], ProjectedAttention)
    assert isinstance(model["b"], nn.MultiheadAttention)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = attention(batch_first=True, dtype=torch.float)
        self.ff = nn.Linear(8, 8)

    def forward(self, x):
        return self.ff(self.attn(x, x, x, need_weights=False)[0])


def b_gradients(model):
    model(torch.randn(2, 3, 8)).square().sum().backward()
    return [p.grad for n, p in model.named_parameters() if "lora_B" in n]


def test_why_the_whole_module_is_replaced():
    """peft around `out_proj` alone is never called; around the whole it works, but moves the frozen weights."""
    alone = get_peft_model(Block(), LoraConfig(target_modules=r"attn\.out_proj"))
    assert not alone(torch.randn(2, 3, 8)).requires_grad
    whole = get_peft_model(Block(), LoraConfig(target_modules=r"attn"))
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    base = whole.base_model.model.attn.get_base_layer()
    before = base.in_proj_weight.detach().clone()
    for _ in range(20):
        assert all(g is not None and g.any() for g in b_gradients(whole))
    assert not torch.equal(base.in_proj_weight, before)
    ours = Block()
    project_attention(ours)
    ours = get_peft_model(ours, LoraConfig(target_modules=r"attn\.(q_proj|k_proj|v_proj|out_proj)"))
    frozen = ours.base_model.model.attn.q_proj.base_layer.weight
    before = frozen.detach().clone()
    assert len(b_gradients(ours)) == 4
    assert all(g is not None and g.any() for g in b_gradients(ours))
    assert torch.equal(frozen, before)


def test_ignored_layers_are_refused(tiny, tax):
    tiny.block = Block()
    with pytest.raises(ValueError, match=r"targets must not name block\.attn\.out_proj"):
        HierLoraCLIP(tiny, tax, lora_config(tiny, targets=r".*\.(out_proj|0)"))
    HierLoraCLIP(tiny, tax, lora_config(tiny, targets=r"block\.attn(\.out_proj)?"))
