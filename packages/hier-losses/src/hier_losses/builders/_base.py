"""What every data set builder returns: a taxonomy and the node that each class of the data set stands for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hier_losses.taxonomy import Taxonomy


@dataclass(frozen=True, eq=False)
class DatasetTree:
    """A taxonomy together with the classes of a data set, in the data set's own order.

    Attributes:
        taxonomy: the tree.
        targets: (C,) node id of each class; `targets[labels]` turns data set labels into targets for the losses.
        class_names: the name the data set uses for each class (a folder name, a synset id, ...).
    """

    taxonomy: Taxonomy
    targets: Int[Tensor, " classes"]
    class_names: tuple[str, ...]

    @property
    def leaf_to_class(self) -> Int[Tensor, " leaves"]:
        """Class of each leaf: `logits[:, leaf_to_class]` puts class logits into leaf order for leaf-logit losses.

        Raises:
            ValueError: the classes are not exactly the leaves.
        """
        leaf = self.taxonomy.leaf_index[self.targets]
        if len(leaf) != self.taxonomy.num_leaves or not torch.equal(leaf.sort().values, torch.arange(len(leaf))):
            raise ValueError(
                f"the {len(leaf)} classes are not the {self.taxonomy.num_leaves} leaves: some class is an "
                "internal node, or a leaf has none"
            )
        return leaf.argsort()

    def multi_hot(self, labels: Tensor) -> Bool[Tensor, "batch nodes"]:
        """Turn multi-label targets over the classes into targets over all nodes, closed upwards.

        Args:
            labels: (B, C), nonzero where a class is present.

        Returns:
            (B, N), true for every present class and its ancestors.

        Raises:
            ValueError: the width is not C.
        """
        if labels.ndim != 2 or labels.shape[1] != len(self.targets):
            raise ValueError(f"labels must have shape (batch, {len(self.targets)}), got {tuple(labels.shape)}")
        tax = self.taxonomy.to(labels.device)
        out = torch.zeros(len(labels), tax.num_nodes, dtype=torch.bool, device=labels.device)
        out[:, self.targets.to(labels.device)] = labels != 0
        for level in range(tax.num_levels - 1, 0, -1):
            nodes = torch.arange(int(tax.level_ptr[level]), int(tax.level_ptr[level + 1]), device=labels.device)
            row, child = out[:, nodes].nonzero(as_tuple=True)
            out[row, tax.parent[nodes[child]]] = True
        return out


def tree_of_labels(
    rows: Sequence[Sequence[int]], level_names: Sequence[str], class_names: Sequence[str], index_base: int
) -> DatasetTree:
    """Build from rows of integer labels in any column order; the column with fewer labels is the higher level.

    Published lists disagree on the order of columns (Butterfly-200 and some CUB lists run fine to coarse, others put
    the species first and the order second), so the order is read from the number of labels and then checked: each
    label must have one parent.
    """
    width = len(level_names)
    for number, row in enumerate(rows):
        if len(row) != width:
            raise ValueError(f"row {number} has {len(row)} labels, {width} are needed ({', '.join(level_names)})")
    counts = [len({row[column] for row in rows}) for column in range(width)]
    order = sorted(range(width), key=counts.__getitem__)
    if len(set(counts)) < width:
        raise ValueError(f"columns have {counts} labels: levels of equal size cannot be told apart")
    names = [
        [f"{level} {label + index_base}" for label in range(counts[column])]
        for level, column in zip(level_names[:-1], order, strict=False)
    ]
    ordered = [[row[column] for column in order] for row in rows]
    if counts[order[-1]] != len(class_names):
        raise ValueError(f"{len(class_names)} classes were given, the rows name {counts[order[-1]]}")
    tax = Taxonomy.from_paths(ordered, index_base=index_base, names=[*names, class_names])
    return DatasetTree(tax, last_level(tax), tuple(class_names))


def last_level(tax: Taxonomy) -> Int[Tensor, " classes"]:
    """Return the nodes of the lowest level in label order."""
    return tax.label_to_node[int(tax.level_ptr[-2]) :].clone()
