"""Two gloo processes under DistributedDataParallel take the step of one process that holds the whole batch."""

import subprocess
import sys

import pytest
import torch

# Arguments: rank, world size, rendezvous file, output file.
WORKER = """
import sys
import torch
import torch.distributed as dist
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn.parallel import DistributedDataParallel

from hier_losses import Taxonomy
from mat_align import HETEROGENEOUS, PROTECT, MaPLePrompts, MATModel, MATObjective, PromptSRCPrompts, PromptSRCRegularizer

rank, world, store, target = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
tax = Taxonomy.from_paths([("animal", "cat", "tabby"), ("animal", "cat", "lion"), ("animal", "dog"), ("plant", "oak")])


def trained(method, variant, radius, together):
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=32, head_width=8, patch_size=8, image_size=16)
    clip = CLIP(24, vision, CLIPTextCfg(width=16, heads=2, layers=4))
    prompts = MaPLePrompts(clip, depth=3) if method == "maple" else PromptSRCPrompts(clip, depth_text=3, depth_vision=3)
    model = MATModel(clip, prompts, variant, radius=radius, c_img=0.05, c_txt=0.1).double()
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
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        logged.append(torch.stack(list(losses)).detach())
    return {"losses": torch.stack(logged), **model.trained_state()}


cases = ("maple", HETEROGENEOUS, "feature"), ("src", HETEROGENEOUS, "unit"), ("maple", PROTECT, "unit")
torch.save([[trained(*case, together) for together in (False, True)] for case in cases], target)
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


@pytest.mark.parametrize("index", range(3), ids=["maple", "promptsrc", "protect"])
def test_two_processes_take_the_step_of_one(outputs, index):
    for one, shared in (output[index] for output in outputs):
        assert shared.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-11, equal_nan=True, msg=name)
        assert one["losses"][0, 0] != one["losses"][1, 0]
