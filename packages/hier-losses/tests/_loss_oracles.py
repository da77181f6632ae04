"""Slow references for the losses: dense, in Python floats, from the parent list alone."""

import itertools
import math


class Brute:
    def __init__(self, parents):
        self.parents = list(parents)
        self.num = len(self.parents)
        self.paths = [self._path(v) for v in range(self.num)]
        self.depth = [len(p) for p in self.paths]
        self.num_levels = max(self.depth)
        self.leaves = [v for v in range(self.num) if v not in self.parents]

    def _path(self, v):
        path = []
        while v != -1:
            path.append(v)
            v = self.parents[v]
        return path[::-1]

    def below(self, v):
        """Descendants-or-self; all nodes for the root, -1."""
        return [u for u in range(self.num) if v == -1 or v in self.paths[u]]

    def siblings(self, v):
        return [u for u in range(self.num) if self.parents[u] == self.parents[v] and u != v]

    def height(self, v):
        return max(self.depth[u] for u in self.below(v)) - (0 if v == -1 else self.depth[v])

    def lca(self, a, b):
        common = [u for u, w in zip(self.paths[a], self.paths[b], strict=False) if u == w]
        return common[-1] if common else -1

    def distance(self, a, b):
        return 0 if a == b else self.height(self.lca(a, b))

    def classes(self, level, extended):
        """Classes of a level, counted from 1."""
        shallow = [v for v in self.leaves if self.depth[v] < level] if extended else []
        return [v for v in range(self.num) if self.depth[v] == level] + shallow

    def steps(self, y, extended):
        """(level, class) for each level that the target has a term on."""
        path = self.paths[y]
        steps = list(enumerate(path, 1))
        if extended and y in self.leaves:
            steps += [(level, y) for level in range(len(path) + 1, self.num_levels + 1)]
        return steps

    def level_terms(self, z, y, row, extended=False):
        """Cross-entropy of each level against `row(level, class, classes)`, a dict of class to mass."""
        terms = {}
        for level, v in self.steps(y, extended):
            classes = self.classes(level, extended)
            norm = lse(z[u] for u in classes)
            terms[level] = sum(mass * (norm - z[u]) for u, mass in row(level, v, classes).items())
        return terms

    def level_ce(self, z, y, extended=False, smoothing=None, class_weights=None, gamma=0.0):
        def row(level, v, classes):
            s = smoothing[level - 1] if smoothing else 0.0
            w = class_weights or [1.0] * self.num
            p = math.exp(z[v] - lse(z[u] for u in classes))
            factor = (1 - p) ** gamma
            return {u: factor * w[u] * ((1 - s) * (u == v) + s / len(classes)) for u in classes}

        return self.level_terms(z, y, row, extended)

    def hisce(self, z, y, eps, extended=False):
        def row(level, v, classes):
            near = [u for u in self.siblings(v) if u in classes]
            if not near:
                return {v: 1.0}
            return {v: 1 - eps[level - 1], **{u: eps[level - 1] / len(near) for u in near}}

        return self.level_terms(z, y, row, extended)

    def tp_kl(self, z, y, valid=False, weights=None):
        path = self.paths[y]
        weights = weights[: len(path)] if weights else [1.0] * len(path)
        nodes = [u for u in range(self.num) if not valid or self.depth[u] <= len(path)]
        norm = lse(z[u] for u in nodes)
        p = [w / sum(weights) for w in weights]
        return sum(q * (math.log(q) - (z[v] - norm)) for q, v in zip(p, path, strict=True) if q > 0)

    def conditional(self, z, y, alpha=0.0):
        return sum(
            math.exp(-alpha * i) * (lse(z[u] for u in [v, *self.siblings(v)]) - z[v])
            for i, v in enumerate(self.paths[y])
        )

    def hce(self, z, y):
        return lse(z) - lse(z[u] for u in self.below(y))

    def leaf_mass(self, leaf_z, v):
        return sum(math.exp(x) for x, leaf in zip(leaf_z, self.leaves, strict=True) if v == -1 or v in self.paths[leaf])

    def hxe(self, leaf_z, y, alpha, tree=False):
        steps = [-1, *self.paths[y]]
        total = 0.0
        for level in range(1, len(steps)):
            p = self.leaf_mass(leaf_z, steps[level]) / self.leaf_mass(leaf_z, steps[level - 1])
            total -= math.exp(-alpha * level) * math.log(p)
        return total / (sum(math.exp(-alpha * d) for d in [0, *self.depth]) if tree else 1.0)

    def soft(self, leaf_z, y, beta):
        farthest = max((self.distance(a, b) for a in self.leaves for b in self.leaves), default=0) or 1
        w = [math.exp(-beta * self.distance(y, k) / farthest) for k in self.leaves]
        norm = lse(leaf_z)
        return sum(a / sum(w) * (norm - x) for a, x in zip(w, leaf_z, strict=True))

    def consistency(self, z, kind):
        total = 0.0
        for level in range(1, self.num_levels):
            here, there = self.classes(level, True), self.classes(level + 1, True)
            p = {v: math.exp(z[v] - lse(z[u] for u in here)) for v in here}
            q = {v: math.exp(z[v] - lse(z[u] for u in there)) for v in there}
            s = {v: sum(q[u] for u in there if u == v or self.parents[u] == v) for v in here}
            if kind == "kl":
                total += sum(p[v] * math.log(p[v] / s[v]) for v in here)
            else:
                m = {v: (p[v] + s[v]) / 2 for v in here}
                total += sum(p[v] * math.log(p[v] / m[v]) + s[v] * math.log(s[v] / m[v]) for v in here) / 2
        return total / max(self.num_levels - 1, 1)

    def hinge(self, z, margin):
        edges = [(p, c) for c, p in enumerate(self.parents) if p >= 0]
        return sum(max(0.0, sigmoid(z[c]) - sigmoid(z[p]) + margin) for p, c in edges) / max(len(edges), 1)

    def hrn(self, f, y):
        """Marginal over all 2^N label sets that are legal: parents included, siblings exclusive."""
        legal = total = 0.0
        for bits in itertools.product((0, 1), repeat=self.num):
            on = [v for v in range(self.num) if bits[v]]
            closed = all(self.parents[v] == -1 or bits[self.parents[v]] for v in on)
            exclusive = all(not bits[u] for v in on for u in self.siblings(v))
            if closed and exclusive:
                weight = math.exp(sum(f[v] for v in on))
                total += weight
                legal += weight * bits[y]
        return -math.log(legal / total)


def mc_loss(z, labels, below):
    """Terms per node from probabilities; `below[v]` lists descendants-or-self, of a tree or a graph."""
    p = [sigmoid(x) for x in z]
    terms = []
    for v, y in enumerate(labels):
        if y:
            terms.append(-math.log(max(p[u] for u in below[v] if labels[u])))
        else:
            terms.append(-math.log(1 - max(p[u] for u in below[v])))
    return terms


def lse(values):
    values = list(values)
    peak = max(values)
    return peak + math.log(sum(math.exp(x - peak) for x in values))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))
