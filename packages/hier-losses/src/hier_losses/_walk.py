"""Class means that walk down a tree in Gaussian steps: their posterior, step sizes and likelihood, level by level.

The mean of a child is normal around its parent's, with the variance v_l on each axis of the features, which are whitened
(the pictures of a class have unit variance); the prior on the root is flat. Felsenstein, 1985, "Phylogenies and the
Comparative Method"; the sweeps are those of Gaussian belief propagation.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hier_losses._tree import Tree
from hier_losses.functional.tree_ops import leaves_to_nodes, subtree_sum

# Steps far below or above the spread of a class make no difference; the bounds keep extrapolated ones finite.
LEAST, MOST = 1e-8, 1e8
_EM_STEPS, _SMALL, _LONGEST, _ROUNDS = 10, 1e-2, 2.0, 3


def squares(rows: Tensor) -> Tensor:
    """Squared length of each row, without a copy of the rows."""
    return torch.linalg.vector_norm(rows, dim=1).square()


class Walk(NamedTuple):
    """The pictures of each leaf: what the sweeps read, all in float64.

    Attributes:
        tax: the tree, on the device of the rest.
        pictures: (K,) number of each leaf, in the order of `tax.leaf`.
        mean: (K, d) their whitened mean; 0 where there are none.
    """

    tax: Tree
    pictures: Tensor
    mean: Tensor

    def levels(self) -> list[slice]:
        """The nodes of each level, top first."""
        ends = [0]
        for size in self.tax.level_sizes:
            ends.append(ends[-1] + size)
        return [slice(a, b) for a, b in pairwise(ends)]

    def informed(self) -> Tensor:
        """Which nodes have pictures at or below them, (N,)."""
        return subtree_sum(leaves_to_nodes(self.pictures, self.tax), self.tax) > 0

    def _up(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Precision and mean of what the pictures below say about each node and the root, and their misfit.

        A node sends q = p / (1 + v p) up, and its mean; a parent adds the q and averages the means. The misfit is
        sum q |u - u_parent|^2, which integrating out the nodes leaves behind.
        """
        tax = self.tax
        precision = self.pictures.new_zeros(tax.num_nodes)
        center = self.mean.new_zeros(tax.num_nodes, self.mean.shape[1])
        precision[tax.leaf], center[tax.leaf] = self.pictures, self.mean
        root_p, root_u, misfit = self.pictures.new_zeros(1), self.mean.new_zeros(1, self.mean.shape[1]), v.new_zeros(())
        levels = self.levels()
        for level in range(tax.num_levels - 1, -1, -1):
            here = levels[level]
            q = precision[here] / (1 + v[level] * precision[here])
            sent = q[:, None] * center[here]
            misfit = misfit + (q * squares(center[here])).sum()
            if level:
                above, group = levels[level - 1], tax.parent[here] - levels[level - 1].start
                total = q.new_zeros(above.stop - above.start).index_add_(0, group, q)
                # Leaves of the level above have no children: their own pictures stay.
                inner = (tax.leaf_index[above] < 0).nonzero().squeeze(1)
                mean = self.mean.new_zeros(len(total), self.mean.shape[1]).index_add_(0, group, sent)[inner]
                mean /= total[inner].clamp(min=torch.finfo(q.dtype).tiny)[:, None]
                misfit = misfit - (total[inner] * squares(mean)).sum()
                precision[above.start + inner], center[above.start + inner] = total[inner], mean
            else:
                root_p = q.sum()
                root_u = sent.sum(0) / root_p
                misfit = misfit - root_p * root_u.square().sum()
        return precision, center, root_p, root_u, misfit

    def _down(
        self, v: Tensor, precision: Tensor, center: Tensor, root_p: Tensor, root_u: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Turn the messages into posterior means, in place, and give the moments of the steps of each level."""
        above = self.tax.parent
        spread = torch.empty_like(precision)
        levels = self.levels()
        for level, here in enumerate(levels):
            p = precision[here]
            g = 1 / (1 + v[level] * p)
            pull = v[level] * p * g  # 1 - g without cancellation
            if level:
                mean_above, spread_above = center[above[here]], spread[above[here]]
            else:
                mean_above, spread_above = root_u[None], 1 / root_p
            step = pull[:, None] * (center[here] - mean_above)
            rest = v[level] * g + pull.square() * spread_above
            spread[here] = v[level] * g + g.square() * spread_above
            center[here] = mean_above + step
            yield here, step, rest, spread[here], p

    def posterior(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, d) and variance on each axis (N,) of every node."""
        precision, center, root_p, root_u, _ = self._up(v)
        spread = [found[3] for found in self._down(v, precision, center, root_p, root_u)]
        return center, torch.cat(spread)

    def em_step(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """One step of expectation-maximisation, and the log-likelihood at the v that was given.

        v_l becomes the mean of |step|^2 / d over the nodes of level l with pictures below; it stays where there are none.
        """
        precision, center, root_p, root_u, misfit = self._up(v)
        value = self._log_likelihood(v, precision, root_p, misfit)
        found = []
        for level, (_, step, rest, _, p) in enumerate(self._down(v, precision, center, root_p, root_u)):
            moment = squares(step) / step.shape[1] + rest
            known = p > 0
            found.append(torch.where(known.any(), moment[known].sum() / known.sum().clamp(min=1), v[level]))
        return torch.stack(found), value

    def log_likelihood(self, v: Tensor) -> Tensor:
        """Log density of the class means, in units of the pictures: what remains is free of v.

        The root is integrated out against Lebesgue measure (the restricted likelihood). The density of the pictures
        within their classes is added by the caller.
        """
        precision, _, root_p, _, misfit = self._up(v)
        return self._log_likelihood(v, precision, root_p, misfit)

    def _log_likelihood(self, v: Tensor, precision: Tensor, root_p: Tensor, misfit: Tensor) -> Tensor:
        shrink = torch.log1p(v[self.tax.depth - 1] * precision).sum() + root_p.log()
        return -0.5 * (self.mean.shape[1] * (shrink - math.log(2 * math.pi)) + misfit)

    def unidentified(self) -> tuple[tuple[int, ...], ...]:
        """Runs of levels of which only the sum of their v counts; level 0 is the flat root, whose run says nothing.

        A level joins the one above where every informed node there has exactly one informed child.
        """
        informed, levels = self.informed(), self.levels()
        runs: list[list[int]] = []
        for level, here in enumerate(levels):
            children = torch.zeros(self.tax.num_nodes + 1, dtype=torch.int64, device=informed.device)
            children.index_add_(0, self.tax.parent[here] + 1, informed[here].long())
            above = informed[levels[level - 1]] if level else informed.new_ones(1)
            number = children[1:][levels[level - 1]] if level else children[:1]
            if above.any() and bool((number[above] == 1).all()):
                if runs and runs[-1][-1] == level:
                    runs[-1].append(level + 1)
                else:
                    runs.append([level, level + 1])
        return tuple(tuple(run) for run in runs)

    def fit(self, tolerance: float, max_steps: int) -> tuple[Tensor, bool]:
        """The v of each level that maximises the likelihood, from v = 1, and whether it settled.

        EM comes close in a few steps but is sublinear where v tends to 0. One step of it also gives the slope, by Fisher's
        identity dl / d log v_l = n_l d (EM(v)_l / v_l - 1) / 2 for n_l informed nodes, so BFGS in log v goes on from
        there, with EM for its first direction. It has settled when EM would change no v by more than the share `tolerance`.
        """
        v = torch.ones(self.tax.num_levels, dtype=self.mean.dtype, device=self.mean.device)
        left = max_steps
        for _ in range(min(_EM_STEPS, max_steps)):
            v, _ = self.em_step(v)
            left -= 1
        for remaining in range(_ROUNDS, -1, -1):
            v, change, left = self._climb(v, tolerance, left)
            # In log v every v of almost 0 looks like a maximum: go back up where the slope in v itself says otherwise.
            stuck = (v < _SMALL) & (change > 1e-3 * v)
            if not stuck.any() or not remaining:
                break
            v = torch.where(stuck, _SMALL, v)
        return v, bool((change.abs() <= tolerance).all())

    def _climb(self, v: Tensor, tolerance: float, left: int) -> tuple[Tensor, Tensor, int]:
        """BFGS (Nocedal and Wright, 2006, eq. 6.17) with halved steps, until it settles or gains nothing more.

        Returns v, the relative change that a step of EM would make there, and the steps that are left.
        """
        share = torch.stack([level.sum() for level in self.informed().split(self.tax.level_sizes)]).to(v)
        share = share / share.sum()
        inverse = (1 / share.clamp(min=1e-12)).diag()
        change, value = self._slope(v)
        left -= 1
        while left > 0 and float(change.abs().max()) > tolerance:
            step = inverse @ (share * change)
            step = step * min(1.0, _LONGEST / float(step.abs().max()))
            gain = float((share * change) @ step)
            while left > 0:
                new = (v.log() + step).exp().clamp(LEAST, MOST)
                new_change, new_value = self._slope(new)
                left -= 1
                if new_value >= value + 1e-4 * gain or not step.abs().max() > 1e-9:
                    break
                step, gain = step / 2, gain / 2
            if not new_value > value:
                break
            moved, bend = new.log() - v.log(), share * (change - new_change)
            curve = moved @ bend
            if curve > 0:
                side = torch.eye(len(v)).to(v) - torch.outer(moved, bend) / curve
                inverse = side @ inverse @ side.T + torch.outer(moved, moved) / curve
            v, change, value = new, new_change, new_value
        return v, change, left

    def _slope(self, v: Tensor) -> tuple[Tensor, Tensor]:
        after, value = self.em_step(v)
        return after / v - 1, 2 * value / (self.mean.shape[1] * self.informed().sum())
