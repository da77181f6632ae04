"""Label graphs: directed acyclic graphs of classes, where a class may have several parents.

Reachability is stored as pairs (compressed sparse rows), because sweeping levels, which is right on a tree, counts a
node twice when two ways lead to it. Giunchiglia and Lukasiewicz (2020, C-HMCNN) hold the dense (N, N) matrix instead.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hier_losses._order import find_cycle, repeated, shorten, show_path
from hier_losses._parse import split_edge
from hier_losses._tree import Tree

_TENSORS = (
    "edge_parent",
    "edge_child",
    "rank",
    "ancestor_ptr",
    "ancestor",
    "ancestor_row",
    "descendant_ptr",
    "descendant",
    "descendant_row",
)


class LabelGraph:
    """An immutable directed acyclic graph of labels with its reachability as index pairs.

    Nodes keep the order in which they are given: column v of a multi-hot target is node v. A tree and a graph share
    the attributes `names`, `num_nodes`, `edge_parent`, `edge_child`, `device`, `to` and `index`.

    Attributes:
        names: unique name of each node.
        num_nodes: N, a Python integer.
        edge_parent, edge_child: (E,) int64, the edges.
        rank: (N,) length of the longest way down from a node without parents, which has rank 0.
        num_ranks: number of ranks, a Python integer.
        ancestor_ptr, ancestor: (N+1,), (M,) ancestors-or-self of v are `ancestor[ancestor_ptr[v]:ancestor_ptr[v+1]]`.
        ancestor_row: (M,) the v that each entry of `ancestor` belongs to.
        descendant_ptr, descendant, descendant_row: the same for descendants-or-self.

    >>> graph = LabelGraph.from_edges([("pet", "dog"), ("canine", "dog"), ("dog", "puppy")])
    >>> graph.names, graph.rank.tolist()
    (('pet', 'dog', 'canine', 'puppy'), [0, 1, 0, 2])
    """

    names: tuple[str, ...]
    num_nodes: int
    num_ranks: int
    edge_parent: Tensor
    edge_child: Tensor
    rank: Tensor
    ancestor_ptr: Tensor
    ancestor: Tensor
    ancestor_row: Tensor
    descendant_ptr: Tensor
    descendant: Tensor
    descendant_row: Tensor
    device: torch.device
    _position: dict[str, int]
    _moved: dict[torch.device, "LabelGraph"]

    def __init__(self, names: Sequence[str], edges: Sequence[tuple[int, int]]):
        """Order the edges, rank the nodes and derive reachability; see `from_edges` for names.

        Args:
            names: unique names of the nodes.
            edges: pairs (parent, child) of positions in `names`.
        """
        num = len(names)
        if num == 0:
            raise ValueError("the graph is empty: at least one node is needed")
        if len(set(edges)) < len(edges):
            twice = [f"{names[a]} -> {names[b]}" for a, b in repeated(edges)]
            raise ValueError(f"duplicate edge {shorten(twice)}")
        ups: list[list[int]] = [[] for _ in range(num)]
        downs: list[list[int]] = [[] for _ in range(num)]
        for up, down in edges:
            ups[down].append(up)
            downs[up].append(down)
        order = _topological(names, ups, downs)
        rank = [0] * num
        above: list[set[int]] = [set() for _ in range(num)]
        for node in order:
            rank[node] = max((rank[up] + 1 for up in ups[node]), default=0)
            above[node] = {node}.union(*(above[up] for up in ups[node]))
        ancestor = np.fromiter((a for node in range(num) for a in sorted(above[node])), dtype=np.int64)
        sizes = np.fromiter((len(found) for found in above), dtype=np.int64, count=num)
        ancestor_row = np.repeat(np.arange(num), sizes)
        by_ancestor = np.argsort(ancestor, kind="stable")
        pairs = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
        fields = {
            "edge_parent": pairs[:, 0],
            "edge_child": pairs[:, 1],
            "rank": np.asarray(rank),
            "ancestor_ptr": np.concatenate([[0], np.cumsum(sizes)]),
            "ancestor": ancestor,
            "ancestor_row": ancestor_row,
            "descendant_ptr": np.concatenate([[0], np.cumsum(np.bincount(ancestor, minlength=num))]),
            "descendant": ancestor_row[by_ancestor],
            "descendant_row": ancestor[by_ancestor],
        }
        tensors = {key: torch.from_numpy(np.ascontiguousarray(fields[key], dtype=np.int64)) for key in _TENSORS}
        self.__dict__.update(
            names=tuple(names),
            num_nodes=num,
            num_ranks=max(rank) + 1,
            device=torch.device("cpu"),
            _position={name: node for node, name in enumerate(names)},
            _moved={},
            **tensors,
        )

    @classmethod
    def from_edges(
        cls, edges: Iterable, order: str = "parent_child", nodes: Sequence[str] | None = None
    ) -> "LabelGraph":
        """Build from parent-child pairs of names.

        Args:
            edges: pairs of names; the parent None only lists a node without parents.
            order: "parent_child" or "child_parent".
            nodes: the nodes in the order of the target's columns; order of first appearance if None.

        Returns:
            The graph.

        Raises:
            ValueError: a cycle (naming its nodes), a duplicate edge, repeated `nodes`, an edge outside `nodes`.
        """
        if order not in ("parent_child", "child_parent"):
            raise ValueError(f"order must be 'parent_child' or 'child_parent', got {order!r}")
        position: dict[str, int] = {}
        for name in nodes or ():
            if name in position:
                raise ValueError(f"nodes must be unique, got {name!r} twice")
            position[name] = len(position)
        pairs = []
        for number, edge in enumerate(edges):
            ends = split_edge(edge, number, order)
            for end in ends:
                if isinstance(end, tuple):
                    raise TypeError(f"edge {number}: labels of a graph are names, got the path {show_path(end)!r}")
                if end is None or end in position:
                    continue
                if nodes is not None:
                    raise ValueError(f"edge {number} uses {end!r}, which is not one of the nodes")
                position[end] = len(position)
            if ends[0] is not None:
                pairs.append((position[ends[0]], position[ends[1]]))
        return cls(tuple(position), pairs)

    @classmethod
    def from_taxonomy(cls, taxonomy: Tree) -> "LabelGraph":
        """Return a tree as a graph: same node ids; names are full paths where they repeat.

        Args:
            taxonomy: the tree.
        """
        tax = taxonomy.to("cpu")
        repeats = len(set(tax.names)) < len(tax.names)
        names = [show_path(tax.path_of(v)) for v in range(tax.num_nodes)] if repeats else tax.names
        edges = list(zip(tax.edge_parent.tolist(), tax.edge_child.tolist(), strict=True))
        return cls(tuple(names), edges).to(taxonomy.device)

    def __setattr__(self, name, value):
        """Refuse: a graph is immutable."""
        raise AttributeError("a LabelGraph is immutable; build a new one")

    def __delattr__(self, name):
        """Refuse: a graph is immutable."""
        raise AttributeError("a LabelGraph is immutable")

    def __len__(self) -> int:
        """Return the number of nodes."""
        return self.num_nodes

    def __eq__(self, other: object) -> bool:
        """Compare names and edges; the order of the edges does not matter, nor does the device."""
        if not isinstance(other, LabelGraph):
            return NotImplemented
        return self.names == other.names and self._edge_set() == other._edge_set()

    def __hash__(self) -> int:
        """Hash names and edges."""
        return hash((self.names, self._edge_set()))

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"LabelGraph(nodes={self.num_nodes}, edges={len(self.edge_child)}, ranks={self.num_ranks})"

    def __copy__(self):
        """Return the graph itself, it is immutable."""
        return self

    def __deepcopy__(self, memo: dict):
        """Return the graph itself, it is immutable."""
        return self

    def __reduce__(self):
        """Rebuild from names and edges, so that worker processes can receive a graph."""
        edges = list(zip(self.edge_parent.tolist(), self.edge_child.tolist(), strict=True))
        return _rebuild, (type(self), self.names, edges, str(self.device))

    def _edge_set(self) -> frozenset:
        return frozenset(zip(self.edge_parent.tolist(), self.edge_child.tolist(), strict=True))

    def index(self, name: str) -> int:
        """Return the id of a node.

        Args:
            name: its name.

        Raises:
            ValueError: no such node.
        """
        if name not in self._position:
            raise ValueError(f"no node is named {name!r}; the nodes are {shorten(self.names, 8)}")
        return self._position[name]

    def to(self, device: torch.device | str | int) -> "LabelGraph":
        """Return the same graph with its tensors on a device; copies are kept, so asking twice is free.

        Args:
            device: where the tensors go.
        """
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._moved:
            other = object.__new__(type(self))
            other.__dict__.update(self.__dict__)
            other.__dict__.update({key: getattr(self, key).to(device) for key in _TENSORS})
            other.__dict__.update(device=other.rank.device, _moved={self.device: self})
            if other.device == self.device:
                return self
            self._moved[device] = other
        return self._moved[device]


def _rebuild(cls: type, names: Sequence[str], edges: Sequence[tuple[int, int]], device: str):
    return cls(names, edges).to(device)


def _topological(names: Sequence[str], ups: list[list[int]], downs: list[list[int]]) -> list[int]:
    waiting = [len(found) for found in ups]
    order = [node for node, count in enumerate(waiting) if count == 0]
    for node in order:  # grows while it is read
        for down in downs[node]:
            waiting[down] -= 1
            if waiting[down] == 0:
                order.append(down)
    if len(order) < len(waiting):
        left = {node for node, count in enumerate(waiting) if count}
        # Every node left has a parent left.
        cycle = find_cycle(min(left), lambda node: next(up for up in ups[node] if up in left))
        raise ValueError(f"the edges hold a cycle: {show_path(names[i] for i in cycle)}")
    return order
