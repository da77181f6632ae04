"""Slow references for decoders, cuts and metrics: Python lists and sets, from the parent list alone."""

import itertools
import math


def argmax(items, score):
    """First item, in ascending order, with the largest score."""
    best = None
    for item in sorted(items):
        if best is None or score(item) > score(best):
            best = item
    return best


class Slow:
    def __init__(self, tax):
        self.parents = tax.parent.tolist()
        self.nodes = range(len(self.parents))
        self.leaves = [v for v in self.nodes if v not in self.parents]
        self.path = {v: self._path(v) for v in self.nodes} | {-1: []}
        self.num_levels = max(len(self.path[v]) for v in self.nodes)
        self.children = {v: [u for u in self.nodes if self.parents[u] == v] for v in [-1, *self.nodes]}
        self.below = {v: [u for u in self.nodes if v == -1 or v in self.path[u]] for v in [-1, *self.nodes]}
        self.leaves_below = {v: [k for k in self.leaves if k in set(self.below[v])] for v in [-1, *self.nodes]}
        self.height = {v: max(len(self.path[u]) - len(self.path[v]) for u in self.below[v]) for v in [-1, *self.nodes]}

    def _path(self, v):
        return [] if v == -1 else [*self._path(self.parents[v]), v]

    def depth(self, v):
        return len(self.path[v])

    def lca(self, a, b):
        common = [v for v in self.path[a] if v in self.path[b]]
        return common[-1] if common else -1

    def distance(self, a, b):
        return 0 if a == b else self.height[self.lca(a, b)]

    def edges(self, a, b):
        return self.depth(a) + self.depth(b) - 2 * self.depth(self.lca(a, b))

    def d_max(self):
        return max((self.distance(a, b) for a, b in itertools.combinations(self.leaves, 2)), default=0)

    def level(self, level):
        """Classes of an extended level, level counted from 1."""
        shallow = [k for k in self.leaves if self.depth(k) < level]
        return sorted(shallow + [v for v in self.nodes if self.depth(v) == level])

    def on_level(self, v, level):
        """Ancestor-or-self on a level, a shallower leaf itself, None below an internal node."""
        if level <= self.depth(v):
            return self.path[v][level - 1]
        return v if v in self.leaves else None

    def extend(self, row):
        """Extended path out of a padded or extended one."""
        row, last = list(row), None
        for i, v in enumerate(row):
            if v >= 0:
                last = v
            elif last is not None and last in self.leaves:
                row[i] = last
        return [None if v < 0 else v for v in row]

    def pad(self, v):
        return self.path[v] + [-1] * (self.num_levels - self.depth(v))

    def leaf_probabilities(self, z):
        total = sum(math.exp(z[k]) for k in self.leaves)
        return {k: math.exp(z[k]) / total for k in self.leaves}

    def mass(self, z):
        p = self.leaf_probabilities(z)
        return {v: sum(p[k] for k in self.leaves_below[v]) for v in [-1, *self.nodes]}

    def level_argmax(self, z):
        return [argmax(self.level(level), z.__getitem__) for level in range(1, self.num_levels + 1)]

    def bottom_up(self, z):
        return self.pad(argmax(self.leaves, z.__getitem__))

    def top_down(self, z):
        node = -1
        while self.children[node]:
            node = argmax(self.children[node], z.__getitem__)
        return self.pad(node)

    def joint_scores(self, z):
        scores = {}
        for k in self.leaves:
            total = 0.0
            for level in range(1, self.num_levels + 1):
                total += z[self.on_level(k, level)] - math.log(sum(math.exp(z[v]) for v in self.level(level)))
            scores[k] = total
        return scores

    def risk(self, z, node, distance):
        p = self.leaf_probabilities(z)
        cost = self.distance if distance == "height" else self.edges
        return sum(p[k] * cost(node, k) for k in self.leaves)

    def threshold(self, z, tau):
        mass, node, row = self.mass(z), -1, []
        while self.children[node]:
            node = argmax(self.children[node], mass.__getitem__)
            if mass[node] < tau:
                break
            row.append(node)
        return row + [-1] * (self.num_levels - len(row))

    def consistent(self, row):
        row = self.extend(row)
        for above, below in itertools.pairwise(row):
            if below is None:
                continue
            if above != below and (above is None or above != self.parents[below]):
                return False
        return True

    def known(self, target):
        return [self.on_level(target, level) for level in range(1, self.num_levels + 1)]

    def end(self, row):
        return ([-1] + [v for v in row if v >= 0])[-1]

    def judged(self, row, target):
        """Deepest node of a row, cut at the depth of a partial label."""
        node = self.end(row)
        if target not in self.leaves and self.depth(node) > self.depth(target):
            return self.path[node][self.depth(target) - 1]
        return node

    def cuts(self):
        """All cuts as sorted lists, by recursion."""

        def under(v):
            if not self.children[v]:
                return [[v]]
            expanded = [[*itertools.chain(*parts)] for parts in itertools.product(*map(under, self.children[v]))]
            return expanded if v == -1 else [[v], *expanded]

        return [sorted(cut) for cut in under(-1)]


def random_rows(slow, rng, num, leaf_targets=False):
    """Rows of every kind: padded leaves and internal nodes, the root, extended leaves, and inconsistent ones."""
    rows, targets = [], []
    for i in range(num):
        node = rng.choice([-1, *slow.nodes])
        row = slow.pad(node)
        if i % 3 == 1:
            row = [-1 if v is None else v for v in slow.extend(slow.pad(rng.choice(slow.leaves)))]
        elif i % 3 == 2:
            row = [rng.choice(slow.level(level)) for level in range(1, slow.num_levels + 1)]
        rows.append(row)
        target = rng.choice(slow.leaves if leaf_targets else list(slow.nodes))
        if i % 4 == 0 and node >= 0 and (node in slow.leaves or not leaf_targets):
            target = node
        targets.append(target)
    return rows, targets


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def full_path_accuracy(slow, rows, targets):
    right = []
    for row, target in zip(rows, targets, strict=True):
        pred = slow.extend(row)
        right.append(all(g is None or g == h for g, h in zip(slow.known(target), pred, strict=True)))
    return mean(right)


def tice(slow, rows, targets):
    return mean(not slow.consistent(row) for row in rows)


def level_accuracy(slow, rows, targets):
    values = []
    for level in range(slow.num_levels):
        pairs = [(slow.known(t)[level], slow.extend(r)[level]) for r, t in zip(rows, targets, strict=True)]
        values.append(mean(g == h for g, h in pairs if g is not None))
    return values


def leaf_accuracy(slow, rows, targets, average):
    hits = {k: [] for k in slow.leaves}
    for row, target in zip(rows, targets, strict=True):
        if target in slow.leaves:
            hits[target].append(slow.end(row) == target)
    if average == "micro":
        return mean(h for hit in hits.values() for h in hit)
    return mean(mean(hit) for hit in hits.values() if hit)


def weighted_average_precision(slow, rows, targets, per_level):
    total, weight = 0.0, 0
    for level in range(1, slow.num_levels + 1):
        pairs = []
        for row, target in zip(rows, targets, strict=True):
            g, h = slow.known(target)[level - 1], slow.extend(row)[level - 1]
            if g is not None:
                pairs.append((g, h if h in slow.level(level) else None))
        if not pairs:
            continue
        if per_level == "accuracy":
            value = mean(g == h for g, h in pairs)
        else:
            scores = []
            for c in slow.level(level):
                tp = sum(g == h == c for g, h in pairs)
                fp = sum(h == c and g != c for g, h in pairs)
                fn = sum(g == c and h != c for g, h in pairs)
                if tp + fp + fn:
                    scores.append(tp / (tp + fp) if tp + fp else 0.0)
            value = mean(scores)
        size = sum(slow.depth(v) == level for v in slow.nodes)
        total, weight = total + size * value, weight + size
    return total / weight if weight else math.nan


def distances(slow, rows, targets):
    return [slow.distance(slow.judged(r, t), t) for r, t in zip(rows, targets, strict=True)]


def mistake_severity(slow, rows, targets):
    return mean(d for d in distances(slow, rows, targets) if d > 0)


def edge_distance(slow, rows, targets):
    return mean(slow.edges(slow.judged(r, t), t) for r, t in zip(rows, targets, strict=True))


def average_hierarchical_distance(slow, ranked, targets, k):
    return mean(mean(distances(slow, rows[:k], [t] * k)) for rows, t in zip(ranked, targets, strict=True))


def hierarchical_precision(slow, ranked, targets, k, over_ranks):
    scale = max(slow.d_max(), 1)
    values = []
    for rows, target in zip(ranked, targets, strict=True):
        got = [max(0.0, 1 - d / scale) for d in distances(slow, rows, [target] * len(rows))]
        best = sorted(1 - d / scale for d in distances(slow, map(slow.pad, slow.leaves), [target] * len(slow.leaves)))
        best.reverse()
        at = [sum(got[:j]) / sum(best[:j]) for j in range(1, k + 1)]
        values.append(mean(at) if over_ranks else at[-1])
    return mean(values)


def prf(slow, rows, targets, average, beta):
    counts = []
    for row, target in zip(rows, targets, strict=True):
        depth = slow.num_levels if target in slow.leaves else slow.depth(target)
        predicted = {v for v in row[:depth] if v >= 0}
        true = set(slow.path[target])
        counts.append((len(predicted & true), len(predicted), len(true)))

    def score(hits, num_predicted, num_true):
        p = hits / num_predicted if num_predicted else 1.0
        r = hits / num_true
        f = (1 + beta**2) * p * r / (beta**2 * p + r) if beta**2 * p + r else 0.0
        return p, r, f

    if average == "micro":
        return score(*map(sum, zip(*counts, strict=True)))
    return [mean(column) for column in zip(*(score(*c) for c in counts), strict=True)]


def lca(slow, rows, targets, value):
    def worth(v):
        return slow.depth(v) if value == "depth" else -math.log2(len(slow.leaves_below[v]) / len(slow.leaves))

    parts = []
    for row, target in zip(rows, targets, strict=True):
        node = slow.judged(row, target)
        s, h, g = worth(slow.lca(node, target)), worth(node), worth(target)
        p, r = (s / h if h else 1.0), (s / g if g else 1.0)
        parts.append((p, r, 2 * p * r / (p + r) if p + r else 0.0, g + h - 2 * s, h - s, g - s))
    return [mean(column) for column in zip(*parts, strict=True)]


def hca(slow, scores, targets):
    right = []
    for z, target in zip(scores, targets, strict=True):
        ok = target in slow.path[argmax(slow.leaves, z.__getitem__)]
        for u in [-1, *slow.path[target][:-1]]:
            ok = ok and argmax(slow.children[u], z.__getitem__) in slow.path[target]
        right.append(ok)
    return mean(right)


def mta(slow, scores, targets, cuts):
    hits = []
    for cut in cuts:
        for z, target in zip(scores, targets, strict=True):
            member = [v for v in slow.path[target] if v in cut]
            if member:
                hits.append(argmax(cut, z.__getitem__) == member[0])
    return mean(hits)


def auroc(scores, labels):
    pairs = [(p, n) for p, a in zip(scores, labels, strict=True) for n, b in zip(scores, labels, strict=True) if a > b]
    return mean(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs)


def violations(slow, scores, margin):
    edges = [(slow.parents[v], v) for v in slow.nodes if slow.parents[v] >= 0]
    return mean(z[v] > z[u] + margin for z in scores for u, v in edges)
