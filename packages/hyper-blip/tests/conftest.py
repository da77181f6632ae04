"""Tiny models with random weights (they prove plumbing, never results) and batches for them."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import Blip2Config, OPTConfig
from transformers.utils import logging

from hyper_blip import HyperBlip2Config, HyperBlip2ForPretraining, HyperbolicConfig

logging.set_verbosity_error()
logging.disable_progress_bar()

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "initializer_range": 0.02,
}  # fmt: skip
QFORMER = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "use_qformer_text_input": True,
}  # fmt: skip
OPT = {
    "vocab_size": 120, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    "dropout": 0.0,
}  # fmt: skip
IDS = {"cls_token_id": 1, "sep_token_id": 2, "dec_token_id": 99}


def tiny_blip2_config(**changes):
    settings = {"num_query_tokens": 8, "image_text_hidden_size": 16, **changes}
    return Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=OPTConfig(**OPT).to_dict(), **settings)


def tiny_config(hyperbolic=None, **changes):
    return HyperBlip2Config(tiny_blip2_config(), hyperbolic or HyperbolicConfig.euclidean(), **{**IDS, **changes})


@pytest.fixture
def blip2_config():
    return tiny_blip2_config


@pytest.fixture
def config():
    """Build a configuration of the tiny model."""
    return tiny_config


@pytest.fixture
def stage1():
    """Build the tiny model of stage 1 from hyperbolic settings; the weights are the same every time."""

    def build(hyperbolic=None, attention="sdpa", seed=0, **more):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = tiny_config(hyperbolic)
            made.blip2._attn_implementation = attention
            model = HyperBlip2ForPretraining(made, **more)
        model.blip2.set_attn_implementation(attention)
        return model

    return build


@pytest.fixture
def batch():
    """Build a batch of pictures and captions of different lengths."""

    def build(size=4, tokens=7, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(size, 3, 28, 28, generator=generator)
        ids = torch.randint(10, 90, (size, tokens), generator=generator)
        lengths = torch.randint(3, tokens + 1, (size,), generator=generator)
        mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
        ids[:, 0] = 1
        ids[torch.arange(size), lengths - 1] = 2
        return pixels, ids * mask, mask

    return build


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Run a program in two gloo processes: it finds `rank`, `job` (a loaded dict) and fills the dict `out`."""

    def run(program, job):
        folder = tmp_path_factory.mktemp("gloo")
        torch.save(job, folder / "job.pt")
        head = (
            "import sys, torch\nimport torch.distributed as dist\n"
            "rank, folder = int(sys.argv[1]), sys.argv[2]\n"
            "dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)\n"
            "job, out = torch.load(f'{folder}/job.pt', weights_only=True), {}\n"
        )
        tail = "\ntorch.save(out, f'{folder}/out{rank}.pt')\ndist.barrier()\ndist.destroy_process_group()\n"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", head + program + tail, str(rank), str(folder)],
                stderr=subprocess.PIPE, text=True, env=env,
            )
            for rank in range(2)
        ]  # fmt: skip
        # Both are reaped before either is judged.
        ends = [(worker.communicate(timeout=900)[1], worker.returncode) for worker in workers]
        for stderr, code in ends:
            assert code == 0, stderr[-3000:]
        return [torch.load(folder / f"out{rank}.pt", weights_only=True) for rank in range(2)]

    return run
