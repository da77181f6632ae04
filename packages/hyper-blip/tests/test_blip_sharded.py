"""Frozen layers spread over two processes: the losses, gradients and files of whole ones."""

from pathlib import Path

import pytest
import torch

from hyper_blip import HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining

PROGRAM = """
import copy, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, job["tests"])
from conftest import tiny_config
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from hyper_blip import HyperBlip2ForConditionalGeneration, HyperBlip2ForPretraining

part = lambda x: x.chunk(2)[rank].clone()
torch.manual_seed(0)
first = HyperBlip2ForPretraining(tiny_config()).train()
language = LlamaForCausalLM(LlamaConfig(
    vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1))
second = HyperBlip2ForConditionalGeneration.from_pretraining(first, language, image_token_id=119).train()
lora = HyperBlip2ForConditionalGeneration.from_pretraining(
    first, copy.deepcopy(language), image_token_id=119, lora={"r": 2, "target_modules": ["q_proj"]}).train()
ids = torch.cat([torch.full((4, 8), 119), part(job["words"])], 1)
calls = {
    "first": lambda m: m(part(job["pixels"]), part(job["tokens"]), part(job["mask"]), step=0).loss,
    "second": lambda m: m(part(job["pixels"]), ids, torch.ones_like(ids), labels=ids).loss,
}
for name, whole in (("first", first), ("second", second), ("lora", lora), ("checkpointed", copy.deepcopy(second))):
    call = calls.get(name, calls["second"])
    spread = copy.deepcopy(whole).shard_frozen()
    if name == "checkpointed":
        spread.gradient_checkpointing_enable()
    shares = [(p.to_local().numel(), p.numel()) for p in spread.parameters() if isinstance(p, DTensor)]
    out[name + "_shares"] = torch.tensor(shares)
    out[name + "_part"] = torch.tensor(sum(b for _, b in shares) / sum(p.numel() for p in whole.parameters() if not p.requires_grad))
    out[name + "_trained"] = torch.tensor(not any(isinstance(p, DTensor) for p in spread.parameters() if p.requires_grad))
    for kind, model in (("whole", whole), ("spread", spread)):
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        loss = call(wrapped)
        if kind == "spread":
            out[name + "_between"] = torch.tensor(sum(isinstance(p, DTensor) for p in spread.parameters()))
        loss.backward()
        out[f"{name}_{kind}"] = loss.detach()
        out[f"{name}_{kind}_grads"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if name != "checkpointed":
        spread.save_pretrained(job["folder"] + "/" + name)
    if rank == 0 and name != "checkpointed":
        whole.save_pretrained(job["folder"] + "/" + name + "-whole")
    dist.barrier()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 90, (8, 6), generator=generator)
    tokens[:, 0], tokens[:, -1] = 1, 2
    return {
        "pixels": torch.randn(8, 3, 28, 28, generator=generator), "tokens": tokens, "mask": torch.ones_like(tokens),
        "words": torch.randint(10, 90, (8, 5), generator=generator), "tests": str(Path(__file__).parent),
        "folder": str(tmp_path_factory.mktemp("sharded")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outputs(job, two_processes):
    return two_processes(PROGRAM, job)


@pytest.mark.parametrize("name", ["first", "second", "lora", "checkpointed"])
def test_equal_to_whole(outputs, name):
    if name == "lora":
        pytest.importorskip("peft")
    for out in outputs:
        assert (out[f"{name}_shares"][:, 0] < out[f"{name}_shares"][:, 1]).all()
        assert abs(out[f"{name}_shares"][:, 0].sum() / out[f"{name}_shares"][:, 1].sum() - 0.5) < 0.05
        assert out[f"{name}_between"] == len(out[f"{name}_shares"])  # one layer at a time: none stays whole
        assert 0.4 < out[f"{name}_part"] < 1  # the rest are embeddings, large in so small a model
        assert out[f"{name}_trained"]
        torch.testing.assert_close(out[f"{name}_spread_grads"], out[f"{name}_whole_grads"], rtol=1e-4, atol=1e-6)
        assert out[f"{name}_spread_grads"]
        torch.testing.assert_close(out[f"{name}_spread"], out[f"{name}_whole"])
    assert outputs[0][f"{name}_whole"] != outputs[1][f"{name}_whole"]  # each rank has pairs of its own


@pytest.mark.parametrize("name", ["first", "second"])
def test_saved_whole(job, outputs, name):
    kind = HyperBlip2ForPretraining if name == "first" else HyperBlip2ForConditionalGeneration
    found, expected = (kind.from_pretrained(Path(job["folder"]) / f).state_dict() for f in (name, f"{name}-whole"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_needs_processes_and_layers(stage1):
    with pytest.raises(ValueError, match="needs an initialised process group"):
        stage1().shard_frozen()
