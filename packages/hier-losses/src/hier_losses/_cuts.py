"""Containers for tree cuts: sets of nodes that cover every leaf exactly once.

Reference: Wu, Ho, Vasconcelos 2024, "ProTeCt: Prompt Tuning for Taxonomic Open Set Classification" (arXiv 2306.02240).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from hier_losses._fingerprint import fingerprint
from hier_losses._formats import load_json
from hier_losses.functional.tree_ops import ancestor_sum
from hier_losses.taxonomy import Taxonomy


class TreeCut:
    """A set of nodes that holds exactly one ancestor-or-self of every leaf.

    Attributes:
        tax: the taxonomy.
        nodes: (M,) the members, ascending node ids.
        member: (N,) position in `nodes` of the member at or above each node, -1 for nodes above the cut.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> TreeCut(tax, [0, 1]).leaf_to_member
    tensor([1, 0, 0])
    """

    def __init__(self, tax: Taxonomy, nodes: Sequence[int] | Int[Tensor, " members"]):
        """Check the set and derive the member of every node.

        Args:
            tax: the taxonomy.
            nodes: node ids in any order.

        Raises:
            ValueError: a node outside [0, N) or listed twice, a leaf that no member or more than one member covers.
        """
        ids = torch.as_tensor(nodes, dtype=torch.int64, device=tax.device).sort().values
        if ids.numel() and not (int(ids[0]) >= 0 and int(ids[-1]) < tax.num_nodes):
            raise ValueError(f"nodes must lie in [0, {tax.num_nodes}), got {int(ids[0])}..{int(ids[-1])}")
        marked = torch.zeros(tax.num_nodes, dtype=torch.int64, device=tax.device)
        marked = marked.index_add(0, ids, torch.ones_like(ids))
        cover = ancestor_sum(marked, tax)[tax.leaf]
        if not (cover == 1).all():
            position = int((cover != 1).nonzero()[0])
            leaf = tax.path_of(int(tax.leaf[position]))
            raise ValueError(
                f"nodes are no tree cut: leaf {' > '.join(leaf)} has {int(cover[position])} members above it"
            )
        self.tax = tax
        self.nodes = ids
        place = marked.index_copy(0, ids, torch.arange(1, len(ids) + 1, device=tax.device))
        self.member = ancestor_sum(place, tax) - 1

    @property
    def leaf_to_member(self) -> Int[Tensor, " leaves"]:
        """Position in `nodes` of the member above each leaf, in the order of `tax.leaf`."""
        return self.member[self.tax.leaf]

    def __len__(self) -> int:
        """Return the number of members."""
        return self.nodes.shape[0]

    def to(self, device: torch.device | str | int) -> "TreeCut":
        """Return the cut with its tensors on a device, itself if it is there already.

        Args:
            device: where the tensors go.
        """
        tax = self.tax.to(device)
        if tax is self.tax:
            return self
        moved = object.__new__(TreeCut)
        moved.tax, moved.nodes, moved.member = tax, self.nodes.to(tax.device), self.member.to(tax.device)
        return moved


class TreeCuts(Sequence):
    """A fixed list of tree cuts, as mean tree-cut accuracy is evaluated on.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> [cut.nodes.tolist() for cut in TreeCuts(tax, [[0, 1], [1, 2, 3]])]
    [[0, 1], [1, 2, 3]]
    """

    def __init__(self, tax: Taxonomy, cuts: Iterable[TreeCut | Sequence[int] | Tensor]):
        """Check every cut.

        Args:
            tax: the taxonomy.
            cuts: cuts of this taxonomy, or their node ids.

        Raises:
            ValueError: no cut, a set of nodes that is no cut, a cut of another taxonomy.
        """
        self.tax = tax
        self.cuts = tuple(cut if isinstance(cut, TreeCut) else TreeCut(tax, cut) for cut in cuts)
        if not self.cuts:
            raise ValueError("cuts must hold at least one cut, got none")
        if any(cut.tax is not tax and cut.tax != tax for cut in self.cuts):
            raise ValueError("cuts must belong to the given taxonomy")
        self._moved: dict[torch.device, TreeCuts] = {}

    def __len__(self) -> int:
        """Return the number of cuts T."""
        return len(self.cuts)

    @overload
    def __getitem__(self, index: int) -> TreeCut: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TreeCut, ...]: ...

    def __getitem__(self, index: int | slice) -> TreeCut | tuple[TreeCut, ...]:
        """Return one cut, or several for a slice."""
        return self.cuts[index]

    def __iter__(self) -> Iterator[TreeCut]:
        """Go through the cuts."""
        return iter(self.cuts)

    def __deepcopy__(self, memo: dict) -> "TreeCuts":
        """Return the cuts themselves, they are immutable."""
        return self

    def __repr__(self) -> str:
        """Return the number of cuts and their sizes."""
        return f"TreeCuts({len(self)} cuts of {min(map(len, self))} to {max(map(len, self))} members)"

    @property
    def node_ids(self) -> list[list[int]]:
        """Members of every cut."""
        return [cut.nodes.tolist() for cut in self]

    @property
    def leaf_to_member(self) -> Int[Tensor, "cuts leaves"]:
        """Position of the member above each leaf in each cut."""
        return torch.stack([cut.leaf_to_member for cut in self])

    def to(self, device: torch.device | str | int) -> "TreeCuts":
        """Return the cuts with their tensors on a device; copies are kept, so asking twice is free.

        Args:
            device: where the tensors go.
        """
        tax = self.tax.to(device)
        if tax is self.tax:
            return self
        if tax.device not in self._moved:
            self._moved[tax.device] = TreeCuts(tax, [cut.to(tax.device) for cut in self])
        return self._moved[tax.device]

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the node ids and a fingerprint of the taxonomy.

        Args:
            path: the file.
        """
        content = {"taxonomy": fingerprint(self.tax), "num_nodes": self.tax.num_nodes, "cuts": self.node_ids}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike, tax: Taxonomy) -> "TreeCuts":
        """Read what `to_json` wrote.

        Args:
            path: the file.
            tax: the taxonomy that the cuts were drawn from.

        Raises:
            ValueError: the file belongs to another taxonomy.
        """
        content = load_json(Path(path).read_text(encoding="utf-8"), str(path))
        if content["taxonomy"] != fingerprint(tax):
            raise ValueError(
                f"tax must be the taxonomy of the stored cuts ({content['num_nodes']} nodes, fingerprint "
                f"{content['taxonomy']}), got one of {tax.num_nodes} nodes, fingerprint {fingerprint(tax)}"
            )
        return cls(tax, content["cuts"])

    @classmethod
    def from_text_cuts(cls, source: str | os.PathLike | Mapping[str, Any], tax: Taxonomy) -> "TreeCuts":
        """Read cuts that name their members by text, the published form of ProTeCt's evaluation cuts.

        A text can stand for several nodes; the leaves that map to it decide which one is meant.

        Args:
            source: JSON file or its content: `nodes` (list of `id`, `name`, `parent`, optional `text`), `leaves`
                (node ids) and `treecuts` (list of `text`, one per member, and `leaf_to_label`, one index into `text`
                per entry of `leaves`).
            tax: the taxonomy of the same nodes, with or without their common root.

        Raises:
            ValueError: a leaf that the taxonomy lacks, a text that fits no node above its leaves.
        """
        file = isinstance(source, str | os.PathLike)
        content: Any = load_json(Path(str(source)).read_text(encoding="utf-8"), str(source)) if file else source
        texts, leaves = _resolve_nodes(content, tax)
        spans: dict[tuple[int, int], list[int]] = {}
        for node, span in enumerate(zip(tax.leaf_start.tolist(), tax.n_leaves.tolist(), strict=True)):
            spans.setdefault(span, []).append(node)
        start = tax.leaf_start.tolist()
        cuts = []
        for number, cut in enumerate(content["treecuts"]):
            below: list[list[int]] = [[] for _ in cut["text"]]
            wrong = [label for label in cut["leaf_to_label"] if label not in range(len(below))]
            if wrong:
                raise ValueError(
                    f"treecuts[{number}]: leaf_to_label must lie in [0, {len(below)}), the places in text, got {wrong[0]!r}"
                )
            for leaf, label in zip(leaves, cut["leaf_to_label"], strict=True):
                below[label].append(start[leaf])
            nodes = []
            for text, places in zip(cut["text"], below, strict=True):
                # Leaves of a subtree are an interval in depth-first order; a lone chain has several nodes on it.
                chain = spans.get((min(places), len(places)), []) if places else []
                found = [node for node in chain if max(places) - min(places) < len(places) and texts[node] == text]
                if not found:
                    raise ValueError(
                        f"treecuts[{number}]: no node with text {text!r} holds exactly its {len(places)} leaves"
                    )
                nodes.append(found[0])
            cuts.append(TreeCut(tax, nodes))
        return cls(tax, cuts)


def _resolve_nodes(source: Mapping[str, Any], tax: Taxonomy) -> tuple[list[str], list[int]]:
    """Return the text of every node of the taxonomy, and the node ids of the listed leaves."""
    by_id = {node["id"]: node for node in source["nodes"]}
    # One node more than the taxonomy has: the file spells out the root that the taxonomy keeps virtual.
    skip = len(by_id) - tax.num_nodes
    if skip not in (0, 1):
        raise ValueError(
            f"tax must have the {len(by_id)} nodes of the file, or one less without root, got {tax.num_nodes}"
        )
    texts, ids = [""] * tax.num_nodes, {}
    for key, node in by_id.items():
        names, up = [], node
        while up is not None:
            names.append(up["name"])
            up = None if up["parent"] is None else by_id[up["parent"]]
        path = names[::-1][skip:]
        if path:
            ids[key] = tax.index(path)
            texts[ids[key]] = node.get("text", node["name"])
    return texts, [ids[key] for key in source["leaves"]]
