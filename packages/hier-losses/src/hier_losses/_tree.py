"""The index tensors of a rooted tree in breadth-first order, the storage every loss, decoder and metric here reads."""

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hier_losses._order import bfs_order, index_arrays, shorten, show_path

AnyTree = TypeVar("AnyTree", bound="Tree")

_TENSORS = (
    "parent",
    "depth",
    "level_ptr",
    "group_start",
    "group_size",
    "leaf",
    "leaf_index",
    "leaf_start",
    "paths",
    "n_leaves",
    "height",
    "n_siblings",
    "edge_parent",
    "edge_child",
    "label",
    "label_to_node",
)


class Tree:
    """A rooted tree in breadth-first order; use the constructors of `Taxonomy`.

    A virtual root joins the top nodes and is not a node. Levels and sibling groups are contiguous, so `level_ptr` and
    `group_start`/`group_size` describe them as ranges; group `g = parent + 1` holds the children of node `g - 1`, and
    group 0 the top nodes. All index tensors are int64.

    Attributes:
        names: name of each node; unique among siblings only.
        parent: (N,) parent of each node, -1 for top nodes.
        depth: (N,) level of each node, 1 for top nodes.
        level_ptr: (D+1,) nodes of level l (from 1) are `level_ptr[l-1]:level_ptr[l]`.
        level_sizes: the same as a tuple of D Python integers.
        group_start: (N+1,) first node of each sibling group; an empty group has the place where it would stand, up to
            N.
        group_size: (N+1,) number of nodes in each sibling group; 0 below a leaf.
        max_group_size: the largest sibling group, a Python integer.
        leaf: (K,) node ids of the leaves, ascending.
        leaf_index: (N,) position of a node in `leaf`, -1 for internal nodes.
        leaf_start: (N,) position, among the leaves in depth-first order, of the first leaf at or below each node; its
            leaves are `leaf_start[v]:leaf_start[v] + n_leaves[v]` in that order.
        paths: (N, D) node ids from the top node to the node itself, padded with -1.
        n_leaves: (N,) number of leaves at or below each node.
        height: (N,) number of edges on the longest way down to a leaf, 0 for leaves.
        root_height: the height of the virtual root, equal to D.
        n_siblings: (N,) size of the sibling group without the node itself.
        edge_parent, edge_child: (E,) the parent-child edges, top nodes have none.
        label: (N,) the number of each node within its level as the data set counts it, from 0; the position within the
            level unless the tree was built from integer paths.
        natural_labels: whether `label` is the position within the level, a Python bool.
        leaves_on_one_level: whether all leaves are on the last level; they are then the last nodes.
        leaves_in_order: whether `leaf` is in depth-first order, as it is where all leaves end on one level.
        label_to_node: (N,) node id of label i of level l, at `level_ptr[l-1] + i`.
    """

    names: tuple[str, ...]
    parent: Tensor
    depth: Tensor
    level_ptr: Tensor
    group_start: Tensor
    group_size: Tensor
    leaf: Tensor
    leaf_index: Tensor
    leaf_start: Tensor
    paths: Tensor
    n_leaves: Tensor
    height: Tensor
    n_siblings: Tensor
    edge_parent: Tensor
    edge_child: Tensor
    label: Tensor
    label_to_node: Tensor
    num_nodes: int
    num_leaves: int
    num_levels: int
    level_sizes: tuple[int, ...]
    max_group_size: int
    root_height: int
    natural_labels: bool
    leaves_on_one_level: bool
    leaves_in_order: bool
    device: torch.device
    _by_name: dict[str, int]
    _child: dict[tuple[int, str], int]
    _moved: dict[torch.device, Any]

    def __init__(self, names: Sequence, parents: Sequence[int], labels: Sequence[int] | None = None):
        """Order the nodes and derive every tensor.

        Args:
            names: one name per node, in any order.
            parents: position of each node's parent in `names`, -1 for a top node.
            labels: number of each node within its level, ranked per level; positions within the level if None.
        """
        order = bfs_order(names, parents)
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        names = tuple(names[i] for i in order)
        above = np.asarray(parents, dtype=np.int64)[order]
        parent = np.where(above < 0, -1, rank[above])
        fields = index_arrays(parent)
        position = np.arange(len(order)) if labels is None else np.asarray(labels, dtype=np.int64)[order]
        # A stable sort by (depth, label): the node that each label of each level stands for.
        fields["label_to_node"] = np.lexsort((position, fields["depth"]))
        label = np.empty_like(parent)
        label[fields["label_to_node"]] = np.arange(len(order))
        fields["label"] = label - fields["level_ptr"][fields["depth"] - 1]
        self.__dict__.update(names=names, **{key: torch.from_numpy(fields[key]) for key in _TENSORS})
        self.__dict__.update(
            num_nodes=len(names),
            num_leaves=len(fields["leaf"]),
            num_levels=len(fields["level_ptr"]) - 1,
            level_sizes=tuple(np.diff(fields["level_ptr"]).tolist()),
            max_group_size=int(fields["group_size"].max()),
            root_height=len(fields["level_ptr"]) - 1,
            natural_labels=bool((fields["label_to_node"] == np.arange(len(order))).all()),
            leaves_on_one_level=bool((fields["depth"][fields["leaf"]] == fields["depth"][-1]).all()),
            leaves_in_order=bool((fields["leaf_start"][fields["leaf"]] == np.arange(len(fields["leaf"]))).all()),
            device=torch.device("cpu"),
            _by_name=_unique(names),
            _child={key: node for node, key in enumerate(zip(parent.tolist(), names, strict=True))},
            _moved={},
        )

    def __setattr__(self, name, value):
        """Refuse: a taxonomy is immutable."""
        raise AttributeError(f"a {type(self).__name__} is immutable; build a new one, or see extend and prune")

    def __delattr__(self, name):
        """Refuse: a taxonomy is immutable."""
        raise AttributeError(f"a {type(self).__name__} is immutable")

    def __len__(self) -> int:
        """Return the number of nodes."""
        return self.num_nodes

    def __eq__(self, other: object) -> bool:
        """Compare names, parents and level labels; the device does not matter."""
        if not isinstance(other, Tree):
            return NotImplemented
        if self is other:
            return True
        same = self.names == other.names and torch.equal(self.parent.cpu(), other.parent.cpu())
        return same and torch.equal(self.label.cpu(), other.label.cpu())

    def __hash__(self) -> int:
        """Hash names and parents."""
        return hash((self.names, tuple(self.parent.tolist())))

    def __copy__(self):
        """Return the tree itself, it is immutable."""
        return self

    def __deepcopy__(self, memo: dict):
        """Return the tree itself, it is immutable."""
        return self

    def __reduce__(self):
        """Rebuild from names, parents and labels, so that worker processes can receive a tree."""
        return _rebuild, (type(self), self.names, self.parent.tolist(), self.label.tolist(), str(self.device))

    def to(self: AnyTree, device: torch.device | str | int) -> AnyTree:
        """Return the same tree with its tensors on a device; copies are kept, so asking twice is free.

        Args:
            device: where the tensors go.

        Returns:
            This object if it is there already.
        """
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._moved:
            other = object.__new__(type(self))
            other.__dict__.update(self.__dict__)
            other.__dict__.update({key: getattr(self, key).to(device) for key in _TENSORS})
            # "cuda" means the current device: keep what the tensors report, so that "cuda:0" compares equal later.
            other.__dict__.update(device=other.parent.device, _moved={self.device: self})
            if other.device == self.device:
                return self
            self._moved[device] = other
        return self._moved[device]

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """Names of the leaves, in the order of `leaf`."""
        return tuple(self.names[node] for node in self.leaf.tolist())

    def path_of(self, node: SupportsIndex) -> tuple[str, ...]:
        """Return the names from the top node down to a node.

        Args:
            node: a node id.

        Raises:
            ValueError: no such node.
        """
        node = int(node)
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node must lie in [0, {self.num_nodes}), got {node}")
        return tuple(self.names[i] for i in self.paths[node].tolist() if i >= 0)

    def index(self, key: str | Sequence[str]) -> int:
        """Return the id of the node with a unique name or with a full path.

        Args:
            key: a name, or the names from the top node down.

        Returns:
            Node id in [0, N).

        Raises:
            ValueError: no such node, or a name that several nodes share (the message lists their paths).
        """
        if isinstance(key, str):
            node = self._by_name.get(key)
            if node is not None and node >= 0:
                return node
            if node is not None:
                found = [node for node, name in enumerate(self.names) if name == key]
                paths = "; ".join(show_path(self.path_of(node)) for node in found[:8])
                raise ValueError(f"name {key!r} stands for {len(found)} nodes, give a full path: {paths}")
            close = [name for name in self.names if name.lower() == key.lower()]
            hint = f"; did you mean {shorten(dict.fromkeys(close))}" if close else ""
            raise ValueError(f"no node is named {key!r}{hint}")
        node = -1
        for name in key:
            below = self._child.get((node, name))
            if below is None:
                where = f"below {show_path(self.path_of(node))!r}" if node >= 0 else "among the top nodes"
                start, size = int(self.group_start[node + 1]), int(self.group_size[node + 1])
                there = shorten(self.names[start : start + size], 8) or "nothing"
                raise ValueError(f"no node {name!r} {where}, which holds {there}")
            node = below
        if node < 0:
            raise ValueError("path must hold at least one name, got an empty one")
        return node

    def indices(self, keys: Iterable[str | Sequence[str]]) -> Int[Tensor, " keys"]:
        """Return the ids of several nodes, each given as `index` takes it."""
        nodes = [self.index(key) for key in keys]
        return torch.tensor(nodes, dtype=torch.int64, device=self.device)

    def node_ids(self, level_labels: Tensor, base: int = 0, ignore_index: int = -100) -> Int[Tensor, " batch"]:
        """Turn one label per level into node ids: the node of the deepest known level.

        Args:
            level_labels: (B, L) integer labels, top level first, L <= D; -1 where unknown, below the last known level.
            base: the first label of every level, 0 or 1. The markers -1 and `ignore_index` are never shifted.
            ignore_index: stands for no label, negative: on some levels it reads as -1, a row of nothing else gives it
                back, and losses and metrics then leave the sample out.

        Returns:
            (B,) node ids in [0, N), or `ignore_index`.

        Raises:
            ValueError: not integers of that shape; a label out of range, a known label below an unknown one, a row
                without any label, or a label whose parent is not the one beside it. The message names the row.
        """
        if level_labels.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
            raise ValueError(f"level_labels must hold integers, got {level_labels.dtype}")
        if level_labels.ndim != 2 or not 1 <= level_labels.shape[1] <= self.num_levels:
            raise ValueError(
                f"level_labels must have shape (batch, 1..{self.num_levels}), got {tuple(level_labels.shape)}"
            )
        if base not in (0, 1):
            raise ValueError(f"base must be 0 or 1, got {base}")
        num = level_labels.shape[1]
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative, since labels are not, got {ignore_index}")
        raw = level_labels.to(torch.int64)
        dropped = (raw == ignore_index).all(1)
        known = (raw != -1) & (raw != ignore_index)
        length = known.sum(1)
        labels = raw - base
        sizes = self.level_ptr[1 : num + 1] - self.level_ptr[:num]
        wrong = known & ((labels < 0) | (labels >= sizes))
        if wrong.any():
            row, level = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"level_labels row {row}: label {int(raw[row, level])} of level {level + 1} must lie in "
                f"[{base}, {int(sizes[level]) + base}) with base={base}, or be -1"
            )
        hole = (known != (torch.arange(num, device=raw.device) < length[:, None])).any(1)
        hole = hole | ((length == 0) & ~dropped)
        if hole.any():
            row = int(hole.nonzero()[0])
            raise ValueError(
                f"level_labels row {row}: known levels must come first, got {raw[row].tolist()}; "
                f"a row of {ignore_index} stands for a sample without label"
            )
        node = self.label_to_node[self.level_ptr[:num] + labels.clamp(min=0)]
        broken = (known[:, 1:] & (self.parent[node[:, 1:]] != node[:, :-1])).any(1)
        if broken.any():
            row = int(broken.nonzero()[0])
            raise ValueError(
                f"level_labels row {row}: {raw[row].tolist()} is no path of the tree "
                f"(order top to bottom, base={base}; are the rows fine to coarse, or counted from {1 - base}?)"
            )
        deepest = node.gather(1, (length - 1).clamp(min=0)[:, None]).squeeze(1)
        return torch.where(dropped, ignore_index, deepest)

    def cat_levels(self, levels: Sequence[Tensor]) -> Float[Tensor, "batch nodes"]:
        """Join one tensor of scores per level, columns in label order, into one over all nodes.

        Args:
            levels: D tensors (B, C_l), top level first; column i belongs to label i of that level.

        Returns:
            (B, N) scores in node order.

        Raises:
            ValueError: the number of levels or a width does not match.
        """
        widths = tuple(level.shape[-1] for level in levels)
        if widths != self.level_sizes:
            raise ValueError(f"levels must have the widths {self.level_sizes}, got {widths}")
        joined = torch.cat(list(levels), -1)
        if self.natural_labels:
            return joined
        return joined.index_select(-1, self.level_ptr[self.depth - 1] + self.label)


def _unique(names: Sequence[str]) -> dict[str, int]:
    by_name: dict[str, int] = {}
    for node, name in enumerate(names):
        by_name[name] = -1 if name in by_name else node  # -1: several nodes share the name
    return by_name


def _rebuild(cls: type, names: Sequence[str], parents: Sequence[int], labels: Sequence[int], device: str):
    return cls(names, parents, labels).to(device)
