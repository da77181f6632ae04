"""Two gloo processes give the loss and the averaged gradients of one process that holds every row."""

import subprocess
import sys

import pytest
import torch

from hyper_geom.contrastive import distance_info_nce

# Arguments: rank, world size, rendezvous file, input file, output file.
WORKER = """
import sys
import torch
import torch.distributed as dist
from hyper_geom.contrastive import distance_info_nce

rank, world, store, source, target = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
job = torch.load(source, weights_only=True)
results = []
for case in job["cases"]:
    x, y = (job[name].chunk(world)[rank].to(job[name].dtype).clone().requires_grad_() for name in "xy")
    c, scale = (torch.tensor(v, dtype=x.dtype, requires_grad=True) for v in (0.7, 3.0))
    labels = job["labels"].chunk(world)[rank] if case.pop("labels") else None
    loss = distance_info_nce(x, y, c=c, logit_scale=scale, labels=labels, group=dist.group.WORLD, **case)
    results.append([loss.detach(), *torch.autograd.grad(loss, (x, y, c, scale))])
try:
    num = 2 + rank
    distance_info_nce(torch.zeros(num, 2), torch.zeros(num, 2), logit_scale=1.0, group=dist.group.WORLD)
    message = "none raised"
except ValueError as error:
    message = str(error)
torch.save({"results": results, "message": message}, target)
dist.barrier()
dist.destroy_process_group()
"""
CASES = [
    {"symmetric": symmetric, "backend": backend, "labels": labels}
    for symmetric in (True, False)
    for backend in ("eager", "chunked")
    for labels in (True, False)
] + [
    {
        "symmetric": True,
        "backend": "chunked",
        "labels": False,
        "model": "poincare",
        "inputs": "tangent0",
        "chunk_size": 2,
    }
]


@pytest.fixture(scope="module")
def job():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    # Each rank permutes its own four targets.
    return {"x": x, "y": y, "labels": torch.tensor([2, 0, 3, 1, 1, 3, 0, 2]), "cases": [dict(case) for case in CASES]}


@pytest.fixture(scope="module")
def outputs(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    torch.save(job, folder / "job.pt")
    targets = [folder / f"rank{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", str(folder / "store"), str(folder / "job.pt"), str(target)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, target in enumerate(targets)
    ]
    # Both are reaped before either is judged.
    ends = [(worker.communicate(timeout=300)[1], worker.returncode) for worker in workers]
    for stderr, code in ends:
        assert code == 0, stderr[-3000:]
    return [torch.load(target, weights_only=True) for target in targets]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_processes_equal_one(job, outputs, index):
    case = dict(CASES[index])
    labels = job["labels"] + torch.tensor([0] * 4 + [4] * 4) if case.pop("labels") else None
    x, y = (job[name].clone().requires_grad_() for name in "xy")
    c, scale = (torch.tensor(v, dtype=x.dtype, requires_grad=True) for v in (0.7, 3.0))
    loss = distance_info_nce(x, y, c=c, logit_scale=scale, labels=labels, **case)
    gradients = torch.autograd.grad(loss, (x, y, c, scale))

    ranks = [output["results"][index] for output in outputs]
    torch.testing.assert_close(sum(rank[0] for rank in ranks) / 2, loss.detach(), rtol=1e-12, atol=0)
    # Averaging over ranks, as DistributedDataParallel does, divides the gradient of a rank's own rows by two.
    for part, expected in ((1, gradients[0]), (2, gradients[1])):
        torch.testing.assert_close(torch.cat([rank[part] for rank in ranks]) / 2, expected, rtol=1e-10, atol=1e-13)
    for part, expected in ((3, gradients[2]), (4, gradients[3])):
        torch.testing.assert_close(sum(rank[part] for rank in ranks) / 2, expected, rtol=1e-10, atol=1e-13)


def test_unequal_rows_are_refused_on_every_rank(outputs):
    for output in outputs:
        assert "[(2, 2), (3, 3)]" in output["message"]
