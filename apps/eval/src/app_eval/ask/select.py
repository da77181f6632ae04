"""`hier select`: choose demonstrations for pictures from a pool of one's own."""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import torch
from torch.nn import functional as F

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_data.weights.lite0_minilm import MiniLM
from app_eval.ask.pool import (
    DemoPool,
    PoolItem,
    TrainLift,
    encode_pictures,
    encode_pool,
    fit_bank,
    kept_lift,
    picture_encoder,
    read_items,
)
from app_eval.ask.settings import SELECTORS, Choosing, Select
from hyper_icl import (
    AnchorBank,
    DemoSelection,
    HyperbolicDemoIndex,
    MmicesSelector,
    RandomSelector,
    RicesSelector,
    TopKClipSelector,
)

FORMAT = 1


def select_demos(config: Select, train_lift: TrainLift) -> dict:
    """Choose demonstrations for every query picture.

    Args:
        config: The pool, see `read_items`; the queries, which do not get their own picture where the pool has it; and how to choose.
        train_lift: Trains a lift, for "hyperbolic".

    Returns:
        What was chosen, ready for JSON: demonstrations stand in prompt order.

    Raises:
        DataError: The pool or a query cannot be used, or k is too large.
        MissingAssetError: The encoder's packages are not installed.
    """
    question = config.question
    if (config.method == "mmices") != bool(question):
        raise DataError("question and method mmices belong together: give both or neither")
    request, selection, notes = choose(
        read_items(config.data), config.query, [question] * len(config.query), train_lift, config, config.mu, config.diversity
    )  # fmt: skip
    pool = request.pool
    if question:
        notes["question"] = question
    return {
        "format": FORMAT,
        "pool": str(config.data),
        "num_items": len(pool.items),
        "skipped": [{"path": s.path, "reason": s.reason} for s in pool.skipped],
        "method": config.method,
        "k": config.k,
        **notes,
        "queries": [
            {
                "query": str(path),
                "certified": bool(selection.certified[i]),
                "demos": [
                    {
                        "path": str(pool.items[row].path),
                        "question": pool.items[row].question,
                        "answer": pool.items[row].answer,
                        "score": round(float(selection.scores[i, j]), 6),
                        "depth": round(float(selection.depth[i, j]), 6),
                    }
                    for j, row in enumerate(selection.ids[i].tolist())
                ],
            }
            for i, path in enumerate(config.query)
        ],
    }


def choose(
    items: Sequence[PoolItem],
    queries: Sequence[Path],
    questions: Sequence[str],
    train_lift: TrainLift,
    config: Choosing,
    mu: float = 0.3,
    diversity: float = 0.0,
) -> tuple["Request", DemoSelection, dict]:
    """The work of `select_demos`, for items that are already read and a question for each query.

    Returns:
        What the selector worked with, what it chose, and what it notes for the result.

    Raises:
        DataError: See `select_demos`.
    """
    method, k, cache_dir = config.method, config.k, config.cache_dir
    if method not in SELECTORS:
        raise DataError(f"method must be one of {', '.join(SELECTORS)}, got {method!r}")
    if k < 1:
        raise DataError(f"k must be at least 1, got {k}")
    tower = picture_encoder(config.encoder)
    train_lift = kept_lift(train_lift, cache_dir)
    pool = encode_pool(items, tower, cache_dir)
    features, bad = encode_pictures(queries, tower)
    if bad:
        raise DataError(f"the query {bad[0].path} cannot be used: {bad[0].reason}")
    exclude = torch.tensor([pool.group_of(path) for path in queries])
    available = len(pool.items) - max(int((pool.groups == group).sum()) for group in exclude)
    if k > available:
        raise DataError(f"k must be at most {available}, the pool without the query's own picture, got {k}")
    request = Request(pool, features, exclude, k, mu, diversity, config.seed, tuple(questions), train_lift)
    return request, *selected(method, request)


def selected(method: str, request: "Request") -> tuple[DemoSelection, dict]:
    """What a selector of `SELECTORS` chooses, and what it notes."""
    module, _, name = SELECTORS[method].run.partition(":")
    return getattr(import_module(f"app_eval.ask.{module}"), name)(request)


@dataclass(frozen=True)
class Request:
    """What a selector works with.

    Attributes:
        pool: The demonstrations.
        features: Of the queries, not centred, (n, d).
        exclude: Group of each query's own picture, -1 for none, (n,).
        k, seed: See `Choosing`.
        mu, diversity: See `HyperbolicDemoIndex`; for "hyperbolic".
        questions: What is asked about each query.
        train_lift: Trains a lift.
        c: Curvature of what is hyperbolic.
    """

    pool: DemoPool
    features: torch.Tensor
    exclude: torch.Tensor
    k: int
    mu: float
    diversity: float
    seed: int
    questions: tuple[str, ...]
    train_lift: TrainLift
    c: float = 1.0

    def centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of pool and queries less the pool's mean."""
        mean = self.pool.features.mean(0)
        return self.pool.features - mean, self.features - mean

    @cached_property
    def lifted(self) -> tuple[AnchorBank, torch.Tensor, bool]:
        """The pool in hyperbolic space, the queries' tangent vectors, and whether the lift is trained."""
        bank, lift, mean, scale = fit_bank(self.pool, self.train_lift, self.seed, self.c)
        with torch.no_grad():
            centred = self.features - mean
            query = scale * centred if lift is None else lift(F.normalize(centred, dim=-1))
        return bank, query.clone(), lift is not None


def at_random(request: Request) -> tuple[DemoSelection, dict]:
    """The control."""
    selector = RandomSelector(len(request.pool.items), request.seed, request.pool.groups)
    return selector.search(request.features, request.k, request.exclude), {"seed": request.seed}


def rices(request: Request) -> tuple[DemoSelection, dict]:
    """Most similar pictures, the best last (Alayrac et al., 2022)."""
    pool, queries = request.centred()
    return RicesSelector(pool, request.pool.groups).search(queries, request.k, request.exclude), {}


def topk(request: Request) -> tuple[DemoSelection, dict]:
    """Most similar pictures, the best first."""
    pool, queries = request.centred()
    return TopKClipSelector(pool, request.pool.groups).search(queries, request.k, request.exclude), {}


def mmices(request: Request) -> tuple[DemoSelection, dict]:
    """Similar pictures ranked by their questions (Chen et al., 2024)."""
    items = request.pool.items
    if not all(item.question for item in items):
        raise DataError("method mmices needs a question for every item of the pool: give JSON lines with question")
    unique = sorted({item.question for item in items} | set(request.questions))
    with torch.no_grad():
        embedded = MiniLM()(unique)
    texts, asked = (
        embedded[torch.tensor([unique.index(question) for question in questions])]
        for questions in ([item.question for item in items], request.questions)
    )
    pool, queries = request.centred()
    selector = MmicesSelector(pool, texts, max(200, request.k), request.pool.groups)
    return selector.search(queries, request.k, request.exclude, text=asked), {}


def hyperbolic(request: Request) -> tuple[DemoSelection, dict]:
    """Exact search on a Lorentz manifold, which weighs how deep an item lies."""
    bank, query, trained = request.lifted
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            index = HyperbolicDemoIndex(bank.tangent, bank.c, request.mu, groups=bank.groups)
            found = index.search(query, request.k, request.exclude, diversity=request.diversity)
    except ValueError as error:
        raise DataError(str(error)) from error
    how = "trained on shared answers" if trained else "untrained: depth is the distance from the pool's mean"
    return found, {
        "mu": request.mu,
        "diversity": request.diversity,
        "lift": how,
        "warnings": [str(warning.message) for warning in caught if warning.category is UserWarning],
    }


def run(config: Select, train_lift: TrainLift) -> int:
    """The command: a table on standard output, JSON into a file (or, for "-", instead of the table)."""
    chosen = select_demos(config, train_lift)
    for skipped in chosen["skipped"]:
        print(f"skipped {skipped['path']}: {skipped['reason']}", file=sys.stderr)  # noqa: T201
    for warning in chosen.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    if str(config.out) == "-":
        print(json.dumps(chosen, indent=1))  # noqa: T201
        return 0
    if config.out is not None:
        write_json(config.out, chosen)
    print(text_table(chosen))  # noqa: T201
    return 0


def text_table(found: dict) -> str:
    """The chosen demonstrations in prompt order, one line each."""
    order = f"most relevant {'last' if SELECTORS[found['method']].last else 'first'}"
    facts = [f"{found['num_items']} items", found["method"], f"k = {found['k']}", order]
    if "lift" in found:
        facts += [f"mu = {found['mu']:g}", f"lift {found['lift']}"]
    lines = [", ".join(facts)]
    for query in found["queries"]:
        proof = ", proven exact" if query["certified"] else ""
        lines += ["", f"{query['query']}{proof}", f"  {'score':>8}  {'depth':>6}  demonstration"]
        for demo in query["demos"]:
            said = " ".join(part for part in (demo["question"], demo["answer"]) if part)
            lines.append(f"  {demo['score']:8.3f}  {demo['depth']:6.3f}  {demo['path']}{'  ' + said if said else ''}")
    return "\n".join(lines)
