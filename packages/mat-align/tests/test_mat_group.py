"""Two gloo processes, with whole towers or towers spread by FSDP2, take the step of one that holds the whole batch."""

import subprocess
import sys

import pytest
import torch

from mat_align import MATModel

# Arguments: rank, world size, rendezvous file, output file.
WORKER = """
import importlib.util
import sys
import torch
import torch.distributed as dist
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hier_losses import Taxonomy
from mat_align import HETEROGENEOUS, PROTECT, MaPLePrompts, MATModel, MATObjective, PromptSRCPrompts
from mat_align import PromptSRCRegularizer, released

rank, world, store, target = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
tax = Taxonomy.from_paths([("animal", "cat", "tabby"), ("animal", "cat", "lion"), ("animal", "dog"), ("plant", "oak")])


def frozen(kind="open_clip"):
    if kind == "open_clip":
        vision = CLIPVisionCfg(layers=4, width=32, head_width=8, patch_size=8, image_size=16)
        return CLIP(24, vision, CLIPTextCfg(width=16, heads=2, layers=4))
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=24))


def held(model):
    # Numbers in the frozen blocks, here and in all.
    blocks = [p for n, p in model.clip.named_parameters() if "blocks." in n or "layers." in n]
    assert all(isinstance(p, DTensor) for p in blocks)
    assert not any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    return torch.tensor([sum(p.to_local().numel() for p in blocks), sum(p.numel() for p in blocks)])


def trained(kind, method, variant, radius, chunk_size, spread, together):
    torch.manual_seed(0)
    clip = frozen(kind)
    prompts = MaPLePrompts(clip, depth=3) if method == "maple" else PromptSRCPrompts(clip, depth_text=3, depth_vision=3)
    model = MATModel(clip, prompts, variant, radius=radius, chunk_size=chunk_size, c_img=0.05, c_txt=0.1).double()
    model.train()
    spread &= together
    if spread:
        model.shard_frozen()
    wrapped, group = (DistributedDataParallel(model), dist.group.WORLD) if together else (model, None)
    objective = MATObjective(tax, regularizer=PromptSRCRegularizer() if method == "src" else None, group=group)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64, generator=generator)
    labels = tax.leaf[torch.randint(4, (2, 4), generator=generator)]
    logged = []
    for step in range(2):
        batch = images[step], labels[step]
        if together:
            batch = [part.chunk(world)[rank] for part in batch]
        losses = objective(wrapped, *batch, torch.Generator().manual_seed(step))
        if spread:
            held(model)  # no block stays whole between forward and backward
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        logged.append(torch.stack(list(losses)).detach())
    with torch.no_grad():
        scores = model.score(model.encode_image(images[0]), model.encode_text(tax.names))
    shares = held(model.shard_frozen()) if spread else torch.tensor([])  # a second time changes nothing
    return {"losses": torch.stack(logged), "scores": scores, **model.trained_state()}, shares


cases = (
    ("open_clip", "maple", HETEROGENEOUS, "feature", None, False), ("open_clip", "src", HETEROGENEOUS, "unit", None, False),
    ("open_clip", "maple", PROTECT, "unit", None, False), ("open_clip", "src", HETEROGENEOUS, "unit", None, True),
    ("open_clip", "maple", HETEROGENEOUS, "feature", 2, True), ("transformers", "src", HETEROGENEOUS, "unit", None, True),
)
if importlib.util.find_spec("transformers") is None:
    cases = cases[:-1]
if torch.__version__ < (2, 11):
    cases = cases[:3]
refusal, out = "", [[trained(*case, together) for together in (False, True)] for case in cases]
try:
    MATModel(frozen(), None, released(HETEROGENEOUS)).shard_frozen()
except ValueError as error:
    refusal = str(error)
torch.save([refusal, *out], target)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    targets = [folder / f"{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", str(folder / "store"), str(target)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, target in enumerate(targets)
    ]
    ends = [(worker.communicate(timeout=300)[1], worker.returncode) for worker in workers]
    for stderr, code in ends:
        assert code == 0, stderr[-3000:]
    return [torch.load(target, weights_only=True) for target in targets]


@pytest.mark.parametrize(
    "index", range(6), ids=["maple", "promptsrc", "protect", "sharded", "sharded-chunks", "sharded-transformers"]
)
def test_two_processes_take_the_step_of_one(outputs, index):
    if index == 5:
        pytest.importorskip("transformers")
    if index > 2 and torch.__version__ < (2, 11):
        pytest.skip("torch before 2.11 is refused")
    for (one, _), (shared, shares) in (output[index + 1] for output in outputs):
        assert shared.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11, equal_nan=True, msg=name)
        assert one["losses"][0, 0] != one["losses"][1, 0]
        assert shares.tolist() == [] if index < 3 else 2 * shares[0] == shares[1]


def test_released_is_not_sharded(outputs):
    assert all("pass_through='value' to be sharded, got 'released'" in output[0] for output in outputs)


def test_sharding_needs_processes(clip):
    with pytest.raises(ValueError, match="needs an initialised process group"):
        MATModel(clip, None).shard_frozen()


def test_sharding_needs_a_torch_that_gathers_again(clip, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    with pytest.raises(ValueError, match=r"needs torch 2\.11 or later, got 2\.10\.0"):
        MATModel(clip, None).shard_frozen()
