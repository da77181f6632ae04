"""Show and describe taxonomies in text, and draw small ones."""

from dataclasses import dataclass
from typing import Any

from hier_losses._order import shorten, show_path
from hier_losses._tree import Tree


@dataclass(frozen=True)
class TaxonomySummary:
    """The shape of a taxonomy and what the losses will make of it.

    Attributes:
        level_sizes: number of nodes per level, top first.
        leaves_per_level: number of leaves per level, top first.
        num_leaves: number of leaves.
        leaf_depths: smallest, mean and largest depth of a leaf.
        lone_nodes: nodes without a sibling.
        lone_leaves: leaves without a sibling.
        largest_group: size of the largest sibling group.
        largest_group_parent: path of its parent, empty for the top nodes.
        imbalance: leaves below the fullest top node over the mean number of leaves below a top node.
        repeated_names: names that several nodes share.
        notes: one sentence for each thing that a loss ignores or that deserves care.
    """

    level_sizes: tuple[int, ...]
    leaves_per_level: tuple[int, ...]
    num_leaves: int
    leaf_depths: tuple[int, float, int]
    lone_nodes: int
    lone_leaves: int
    largest_group: int
    largest_group_parent: str
    imbalance: float
    repeated_names: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return a few lines to read."""
        low, mean, high = self.leaf_depths
        depth = f"depth {high}" if low == high else f"depth {low} to {high}, mean {mean:.2f} (ragged)"
        lines = [
            f"Taxonomy of {sum(self.level_sizes)} nodes in {len(self.level_sizes)} levels: "
            + " / ".join(map(str, self.level_sizes)),
            f"  leaves: {self.num_leaves}, {depth}",
            f"  lone children: {self.lone_nodes} nodes, of these {self.lone_leaves} leaves",
            f"  largest sibling group: {self.largest_group} below {self.largest_group_parent or 'the root'}",
            f"  imbalance of the top level: {self.imbalance:.2f} (fullest over mean, in leaves)",
        ]
        if self.repeated_names:
            lines.append(f"  names of several nodes: {shorten(self.repeated_names)}")
        return "\n".join([*lines, *(f"  - {note}" for note in self.notes)])


def describe(tree: Tree) -> TaxonomySummary:
    """Measure a tree."""
    lone = tree.n_siblings == 0
    leaf_depth = tree.depth[tree.leaf]
    group = int(tree.group_size.argmax())
    top_leaves = tree.n_leaves[: tree.level_sizes[0]].double()
    counts: dict[str, int] = {}
    for name in tree.names:
        counts[name] = counts.get(name, 0) + 1
    low, high = int(leaf_depth.min()), int(leaf_depth.max())
    lone_nodes, lone_leaves = int(lone.sum()), int(lone[tree.leaf].sum())
    repeats = tuple(name for name, count in counts.items() if count > 1)
    notes = []
    if lone_nodes:
        notes.append(
            f"nodes without a sibling: {lone_nodes}; the conditional softmax gives them probability 1 and no gradient, "
            "HiSCE falls back to plain cross-entropy there (nothing to smooth over)"
        )
    if low < high:
        shallow = int((leaf_depth < high).sum())
        notes.append(
            f"{shallow} of {tree.num_leaves} leaves end above level {high}: levels='ragged' masks the levels below "
            "them, levels='extended' repeats the leaf"
        )
    if tree.level_sizes[0] == 1:
        notes.append("the top level has a single node: its level cross-entropy is always 0; use root= to leave it out")
    if tree.num_levels == 1:
        notes.append("the tree is flat: TP-KL and level cross-entropy equal cross-entropy, the consistency term is 0")
    if repeats:
        notes.append("names repeat: look nodes up by full path, and write prompts from paths")
    return TaxonomySummary(
        level_sizes=tree.level_sizes,
        leaves_per_level=tuple(int((leaf_depth == level + 1).sum()) for level in range(tree.num_levels)),
        num_leaves=tree.num_leaves,
        leaf_depths=(low, float(leaf_depth.double().mean()), high),
        lone_nodes=lone_nodes,
        lone_leaves=lone_leaves,
        largest_group=tree.max_group_size,
        largest_group_parent=show_path(tree.path_of(group - 1)) if group else "",
        imbalance=float(top_leaves.max() / top_leaves.mean()),
        repeated_names=repeats,
        notes=tuple(notes),
    )


def show(tree: Tree, max_depth: int, max_children: int) -> str:
    """Return the upper part of a tree as indented text."""
    if max_depth < 1 or max_children < 1:
        raise ValueError(f"max_depth and max_children must be at least 1, got {max_depth} and {max_children}")
    start, size = tree.group_start.tolist(), tree.group_size.tolist()
    n_leaves, depth = tree.n_leaves.tolist(), tree.depth.tolist()
    lines = [
        f"Taxonomy({tree.num_nodes} nodes, {tree.num_leaves} leaves, levels {'/'.join(map(str, tree.level_sizes))})"
    ]
    stack: list[int | str] = [0]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            lines.append(item)
            continue
        node = item - 1
        level = 0
        if item:
            level = depth[node]
            more = size[item] and level >= max_depth
            lines.append("  " * level + tree.names[node] + (f" ({n_leaves[node]} leaves)" if more else ""))
        if level >= max_depth:
            continue
        shown = min(size[item], max_children)
        if shown < size[item]:
            stack.append("  " * (level + 1) + f"... {size[item] - shown} more")
        stack += range(start[item] + shown, start[item], -1)
    return "\n".join(lines)


def draw(tree: Tree, ax: Any = None, max_nodes: int = 300) -> Any:
    """Draw a tree from left to right, leaves at equal distances."""
    if tree.num_nodes > max_nodes:
        raise ValueError(f"max_nodes={max_nodes} is exceeded by the {tree.num_nodes} nodes of the tree; prune it first")
    import matplotlib.pyplot as plt  # optional, and slow to import

    if ax is None:
        _, ax = plt.subplots(figsize=(2.2 * tree.num_levels, 0.25 * tree.num_leaves + 1))
    middle = (tree.leaf_start + (tree.n_leaves - 1) / 2).tolist()
    depth = tree.depth.tolist()
    for up, down in zip(tree.edge_parent.tolist(), tree.edge_child.tolist(), strict=True):
        ax.plot([depth[up], depth[down]], [middle[up], middle[down]], color="0.7", linewidth=0.8, zorder=1)
    ax.scatter(depth, middle, s=12, zorder=2)
    for node, name in enumerate(tree.names):
        ax.annotate(name, (depth[node], middle[node]), xytext=(4, 2), textcoords="offset points", fontsize=8)
    ax.invert_yaxis()
    ax.set_xticks(range(1, tree.num_levels + 1))
    ax.set_xlabel("level")
    ax.set_yticks([])
    return ax
