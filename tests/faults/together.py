"""Two processes do what one does: the numbers that each recipe logs, without dropout, or its refusal in one sentence."""

import contextlib
import io
import json
import math
import socket
from collections.abc import Sequence
from pathlib import Path

from faults import children
from golden.recipes import RECIPES

REFUSED = "runs in one process; start it without torchrun or accelerate launch"
# Of these the papers' recipes differ in data only; `blip-mini-pairs` is `blip-mini` from another start.
NAMES = tuple(RECIPES)
# Spreads and entropies of a batch are no sums of what two halves have.
COMPARED = {"loss", "grad_norm"}
RTOL = 1e-4  # single precision, sums in another order


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def pair(
    folder: Path, command: list[str], inject: Sequence[children.Inject | None] = (None, None)
) -> list[children.End]:
    """Run a command in two processes that know of each other."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    pids = [
        children.start(folder, command, inject[rank], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    return [children.wait(pid, folder, rank) for rank, pid in enumerate(pids)]


def compare(name: str, root: Path) -> dict:
    """Run a recipe in one process and in two, without dropout, and with fixed queries and wrong pairs in place of drawn ones.

    Args:
        name: of a recipe in its smallest setting.
        root: an empty folder.

    Returns:
        `recipe`, and `says`: "refused", what went wrong, or "". If nothing did, also `steps`, how many were compared, `apart`, the
        largest relative difference of a number that they log, and `where`, its name.
    """
    (root / "given").mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        commands = RECIPES[name].prepare(root / "given")
    runs = {}
    for number in (2, 1):
        folder = root / f"processes-{number}"
        (folder / "work" / "home").mkdir(parents=True)
        for command in commands:
            own = [part if part != str(root / "given" / "run") else "run" for part in command]
            ends = [children.run(folder, own, _certain)] if number == 1 else pair(folder, own, [_certain, _certain])
            # The first process speaks for all.
            refused = number == 2 and all(end.status == 2 for end in ends) and REFUSED in ends[0].sentence
            if refused:
                return {"recipe": name, "says": "refused"}
            if wrong := [end for end in ends if end.status]:
                return {
                    "recipe": name,
                    "says": f"{number} processes ended with {wrong[0].status}: {wrong[0].said[-400:]}",
                }
        runs[number] = folder / "work" / "run"
    return {"recipe": name, **_apart(runs[1], runs[2])}


def _apart(one: Path, two: Path) -> dict:
    largest, where, count = 0.0, "", 0
    logs = [sorted(p.relative_to(run) for p in run.rglob("metrics.jsonl")) for run in (one, two)]
    if not logs[0] or logs[0] != logs[1]:
        return {"says": f"the logs are {[str(p) for p in logs[0]]} and {[str(p) for p in logs[1]]}"}
    for log in logs[0]:
        steps = [[json.loads(line) for line in (run / log).read_text().splitlines()] for run in (one, two)]
        if [set(line) for line in steps[0]] != [set(line) for line in steps[1]]:
            return {"says": f"{log} has other steps or other columns"}
        count += len(steps[0])
        for a, b in zip(*steps, strict=True):
            for column in [name for name in a if name.split("/")[0] in COMPARED]:
                value = a[column]
                if not math.isclose(value, b[column], abs_tol=1e-7):
                    difference = abs(value - b[column]) / max(abs(value), abs(b[column]))
                    if difference > largest:
                        largest, where = difference, f"{column} of {log}, step {a['step']}"
    said = f"{where} differs by {largest:.1e}" if largest > RTOL else ""
    return {"says": said, "steps": count, "apart": largest, "where": where}


def _certain(number: int, moment: children.Moment) -> None:
    """At the first moment, before anything is trained: nothing is left to chance that processes draw apart."""
    if number:
        return
    import torch
    from torch.nn import functional

    from hyper_blip import HyperBlip2ForPretraining, RandomQuerySelection, pretraining

    attention = functional.scaled_dot_product_attention

    def plain(query, key, value, attn_mask=None, dropout_p=0.0, *args, **more):
        return attention(query, key, value, attn_mask, 0.0, *args, **more)

    def hardest(i2t, t2i, positive, step, seed, rank):
        valid = ~positive.all(1)
        low = torch.finfo(i2t.dtype).min
        return t2i.masked_fill(positive, low).argmax(1), i2t.masked_fill(positive, low).argmax(1), valid

    functional.dropout = lambda x, *args, **more: x
    functional.scaled_dot_product_attention = plain
    pretraining.drawn_negatives = hardest
    RandomQuerySelection.__call__ = lambda self, num, *args: torch.zeros(num, dtype=torch.long)
    HyperBlip2ForPretraining._prunes = False
