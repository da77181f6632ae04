"""What several processes exchange for the contrastive and the matching loss.

Features are gathered whole; pictures for the matching loss travel only to the rank that chose them, in one all-to-all, so
a rank receives as many as it uses instead of all N. Outside a process group everything is the identity.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks) of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x: Tensor, with_grad: bool) -> Tensor:
    """Rows of all ranks in rank order, (W * n, ...); every rank must hold the same shape.

    With `with_grad` the gradient of a row is the sum over the ranks that used it; without, there is none.
    """
    if world()[1] == 1:
        return x
    return _GatherRows.apply(x) if with_grad else _gather(x.detach())


def fetch_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of the global batch, of which this rank holds `x`, without gathering it.

    Args:
        x: this rank's rows (n, ...); every rank must hold the same shape.
        index: global rows (m), in [0, W * n); m may differ between ranks.

    Returns:
        (m, ...); the gradient goes back to the rank that holds a row.
    """
    if world()[1] == 1:
        return x[index]
    return _FetchRows.apply(x, index)


def mean_of_all(mean: Tensor, count: Tensor | int) -> Tensor:
    """A mean over this rank's terms, weighted so that the average over ranks is the mean over the terms of all of them.

    Args:
        mean: over `count` terms of this rank.
        count: how many they are; ranks may have unequally many, as captions have words.

    Returns:
        The mean times W count / (sum of the counts of all ranks).
    """
    if world()[1] == 1:
        return mean
    mine = torch.as_tensor(count, device=mean.device).to(mean.dtype)
    total = mine.clone()
    dist.all_reduce(total)
    return mean * (mine * world()[1] / total)


def everywhere(flag: Tensor) -> bool:
    """Whether a Boolean scalar is True on every rank."""
    if world()[1] > 1:
        flag = flag.int()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def common_tokens(num: int, tokens: int, problem: ValueError | None, device: torch.device) -> int:
    """The largest number of tokens of any rank, once every rank knows that all batches can be used.

    One rank that raised alone would leave the others waiting for it.

    Args:
        num: pairs of this rank.
        tokens: of this rank's captions.
        problem: why this rank refuses its batch, if it does.
        device: of the exchange.

    Raises:
        ValueError: on every rank: a rank refuses its batch, or ranks hold different numbers of pairs.
    """
    if world()[1] > 1:
        mine = torch.tensor([[num, tokens, int(problem is not None)]], device=device)
        table = _gather(mine).tolist()
        if problem is None:
            refused = [rank for rank, row in enumerate(table) if row[2]]
            if refused:
                raise ValueError(f"every rank must hold a batch that can be used: ranks {refused} refuse theirs")
            pairs = [row[0] for row in table]
            if len(set(pairs)) > 1:
                raise ValueError(f"every rank must hold as many pairs, got {pairs}: leave out the incomplete batch")
        tokens = max(row[1] for row in table)
    if problem is not None:
        raise problem
    return tokens


def _gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return _gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        start = world()[0] * ctx.num_rows
        return total[start : start + ctx.num_rows]


class _FetchRows(torch.autograd.Function):
    """Ask the owners for rows, receive them; backward sends their gradients the way they came."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        size, n = world()[1], x.shape[0]
        owner = index // n
        # Sorted by owner, so that what arrives from each rank is one block.
        order = torch.argsort(owner, stable=True)
        wanted = torch.bincount(owner, minlength=size)
        asked = _exchange(torch.ones_like(wanted), wanted, [1] * size, [1] * size)
        take, give = wanted.tolist(), asked.tolist()
        rows = _exchange(index, (index % n)[order], give, take)
        ctx.save_for_backward(rows, order)
        ctx.take, ctx.give, ctx.shape = take, give, x.shape
        arrived = _exchange(x, x[rows].contiguous(), take, give)
        out = torch.empty_like(arrived)
        out[order] = arrived
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rows, order = ctx.saved_tensors
        returned = _exchange(grad, grad[order].contiguous(), ctx.give, ctx.take)
        return grad.new_zeros(ctx.shape).index_add_(0, rows, returned), None


def _exchange(like: Tensor, send: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
    """All-to-all of blocks of rows."""
    out = torch.empty((sum(receive_sizes), *send.shape[1:]), dtype=send.dtype, device=like.device)
    dist.all_to_all_single(out, send, receive_sizes, send_sizes)
    return out
