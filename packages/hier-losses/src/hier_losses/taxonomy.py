"""Taxonomies: immutable trees of classes, keyed by full path, that losses, decoders and metrics share."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hier_losses import _edit, _formats, _report
from hier_losses._edit import TaxonomyUpdate, match_taxonomies
from hier_losses._parse import parse_edges, parse_paths, synthesize
from hier_losses._report import TaxonomySummary
from hier_losses._tree import Tree

__all__ = ["Taxonomy", "TaxonomySummary", "TaxonomyUpdate", "match_taxonomies"]


class Taxonomy(Tree):
    """An immutable tree of classes in breadth-first order.

    Nodes are told apart by their full path, so equal names under different parents stay different nodes. A virtual
    root joins the top nodes and has no id. The index tensors are listed under `Tree`.

    >>> tax = Taxonomy.from_paths([("a", "a1"), ("a", "a2"), ("b",)])
    >>> tax.names, tax.parent.tolist(), tax.leaf.tolist()
    (('a', 'b', 'a1', 'a2'), [-1, -1, 0, 0], [1, 2, 3])
    """

    @classmethod
    def from_paths(
        cls,
        paths: Iterable,
        order: str = "coarse_to_fine",
        index_base: int = 0,
        names: Sequence[Sequence[str]] | None = None,
    ) -> "Taxonomy":
        """Build from paths of names, or from rows of integer labels counted per level.

        A path may stop early (a shallow leaf) and may be repeated. Rows may be padded with None, "" or a negative
        label. Integer labels are checked: each label has one parent and each level uses all labels from `index_base`
        on, so that rows in the wrong order and a wrong base are caught.

        Args:
            paths: the rows; strings, or integers (lists, an array, a tensor).
            order: "coarse_to_fine" (top level first) or "fine_to_coarse".
            index_base: the first integer label of every level, 0 or 1.
            names: for integer rows, the names of the labels of each level, top level first.

        Returns:
            The tree; siblings in order of first appearance.

        Raises:
            ValueError: no path, a hole in a row, a label with two parents or levels with gaps.
            TypeError: a row that is neither names nor integers.

        >>> tax = Taxonomy.from_paths([(3, 2, 1), (1, 1, 1), (2, 1, 1)], order="fine_to_coarse", index_base=1)
        >>> tax.level_sizes
        (1, 2, 3)
        """
        return cls(*parse_paths(paths, order, index_base, names))

    @classmethod
    def from_edges(cls, edges: Iterable, order: str = "parent_child", root: str | None = None) -> "Taxonomy":
        """Build from parent-child pairs.

        Args:
            edges: pairs of unique names; of full paths (tuples of names) where names repeat. The parent None stands
                for the virtual root, so that a top node without children can be listed.
            order: "parent_child" or "child_parent".
            root: a node of the edges that stands for the virtual root and is left out.

        Returns:
            The tree; siblings in order of first appearance.

        Raises:
            ValueError: an empty list, a duplicate edge, a node with two parents, a cycle.

        >>> Taxonomy.from_edges([("a", "a1"), ("a", "a2"), (None, "b")]).names
        ('a', 'b', 'a1', 'a2')
        """
        return cls(*parse_edges(edges, order, root))

    @classmethod
    def synthetic(cls, level_sizes: Sequence[int], lone_child_rate: float | None = None, seed: int = 0) -> "Taxonomy":
        """Draw a tree of equal leaf depth, for tests and benchmarks.

        Args:
            level_sizes: number of nodes per level, top level first, not shrinking.
            lone_child_rate: share of the leaves that have no sibling; left to chance if None.
            seed: seed of the drawing.

        Returns:
            A tree with nodes named `n<level>_<position>`; group sizes are heavy-tailed, as in real taxonomies.

        Raises:
            ValueError: sizes that shrink, a rate that no tree of these sizes has.

        >>> Taxonomy.synthetic((2, 4, 9), lone_child_rate=1 / 9, seed=0).level_sizes
        (2, 4, 9)
        """
        return cls(*synthesize(level_sizes, lone_child_rate, seed))

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike,
        layout: str = "auto",
        order: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        delimiter: str | None = None,
        encoding: str | None = None,
        header: bool | None = None,
        on_hole: str = "error",
    ) -> "Taxonomy":
        """Read a table of text: comma, semicolon, tab or bar between the cells.

        What is guessed raises a warning; `read_taxonomy` returns it instead.

        Args:
            path: the file. Empty cells at an end of a row are levels that a shallow leaf does not have.
            layout: "paths" (a row is a path), "edges" (a row is an edge), or "auto": edges for the header
                `parent,child` or `child,parent`, paths otherwise.
            order: as in `from_paths` or `from_edges`; None takes it from the header: rows are fine to coarse under
                `leaf,parent,...` and coarse to fine otherwise, edges follow the order of `parent` and `child`.
            columns: names of the columns to use, in their order; all if None.
            delimiter: None takes the one that stands equally often in all lines.
            encoding: None takes UTF-8, or UTF-16 with a byte order mark, or guesses cp1252.
            header: whether the first line names the columns; None says no if one of its cells stands in its column
                again.
            on_hole: what an empty cell between two known ones does: "error", "close" (the level is left out, so that
                all below moves up) or "fill" (a node named after the column).

        Raises:
            ValueError: an empty file, a missing column, rows of other length, several possible delimiters, a hole, or
                what `from_paths` and `from_edges` raise.
        """
        return cls(*_formats.read_csv(path, layout, order, columns, delimiter, encoding, header, on_hole))

    @classmethod
    def from_json(cls, source: str | os.PathLike | Mapping | Sequence, root: str | None = "auto") -> "Taxonomy":
        """Read JSON: a node list, nested objects with `name` and `children`, or nested mappings and lists of names.

        Args:
            source: a file, JSON text (a str that begins with a bracket), or the parsed data. A node list
                holds objects with `id`, `name` and `parent` (an id or
                null), alone or under the key `nodes`; `children` is optional and checked.
            root: which single top node is only a root and is left out: "auto" takes one without a name or named
                "root", another text takes the one of that name, None keeps every node.

        Raises:
            ValueError: unknown parents, repeated ids, children that disagree, or a broken tree.

        >>> Taxonomy.from_json({"animal": ["cat", "dog"], "plant": {"tree": ["oak"]}}).level_sizes
        (2, 3, 1)
        """
        return cls(*_formats.read_json(source, root))

    @classmethod
    def from_newick(cls, source: str | os.PathLike, root: str | None = "auto") -> "Taxonomy":
        """Read one tree in the Newick format.

        Args:
            source: the text (a str that begins with a parenthesis or ends in a semicolon), or a file.
                Branch lengths and comments in brackets are skipped, quoted
                labels are unquoted, underscores stay; inner nodes without a label are called `unnamed_<number>`.
            root: as in `from_json`.

        Raises:
            ValueError: broken text (the message names the position) or a leaf without a label.

        >>> Taxonomy.from_newick("((cat,dog)animal,oak);").names
        ('animal', 'oak', 'cat', 'dog')
        """
        return cls(*_formats.read_newick(source, root))

    @classmethod
    def from_networkx(cls, graph: Any, root: str | None = None) -> "Taxonomy":
        """Read a directed networkx graph whose edges go from parent to child.

        Args:
            graph: the graph; the node attribute `name`, else the node itself, is the name.
            root: the name of the single top node, if it is only a root and is to be left out.

        Raises:
            ValueError: an undirected graph, two parents, a cycle.
        """
        return cls(*_formats.read_networkx(graph, root))

    @classmethod
    def from_imagefolder(cls, root: str | os.PathLike, sep: str | None = None, skip: int = 0) -> "Taxonomy":
        """Read the folder names of an image data set, in alphabetical order; files are not looked at.

        Args:
            root: the folder of the classes.
            sep: None for nested folders, where a folder without folders is a leaf; otherwise each folder name is a
                whole path whose parts `sep` separates, as in `00001_Animalia_Chordata_..._epithet`.
            skip: number of leading parts to leave out (1 for a running number).

        Raises:
            ValueError: no folder, an empty part, a link back to a folder above.
        """
        return cls(*_formats.read_imagefolder(root, sep, skip))

    def to_paths(self) -> list[tuple[str, ...]]:
        """Return the path of each leaf, depth first, so that `from_paths` gives the same tree.

        >>> Taxonomy.from_paths([("a", "x"), ("b",), ("a", "y")]).to_paths()
        [('a', 'x'), ('a', 'y'), ('b',)]
        """
        return _formats.leaf_paths(self)

    def to_edges(self, ends: str = "name") -> list[tuple]:
        """Return (parent, child) for every node in id order, the parent None for top nodes.

        Args:
            ends: "name", or "path" for tuples of names, which trees with repeated names need.

        Raises:
            ValueError: ends="name" and a name is repeated.
        """
        return _formats.edge_list(self, ends)

    def to_csv(self, path: str | os.PathLike, layout: str = "paths") -> None:
        """Write a CSV file that `from_csv` reads.

        Args:
            path: the file to write.
            layout: "paths" for one row per leaf with the columns `level_1, ...`; "edges" for `parent,child`.

        Raises:
            ValueError: layout="edges" and a name is repeated.
        """
        _formats.write_csv(self, path, layout)

    def to_json(self, path: str | os.PathLike | None = None) -> dict[str, Any]:
        """Return a node list ready for `json.dump`; node 0 is the virtual root and node v + 1 is node v here.

        Args:
            path: write it into this file too.
        """
        return _formats.node_list(self, path)

    def to_newick(self) -> str:
        """Return Newick text; the outer node without a label is the virtual root."""
        return _formats.write_newick(self)

    def to_networkx(self) -> Any:
        """Return a `networkx.DiGraph` over node ids with the attribute `name`; needs networkx."""
        return _formats.write_networkx(self)

    def extend(self, paths: Iterable | None = None, *, edges: Iterable | None = None) -> TaxonomyUpdate:
        """Add nodes; those of the tree keep their order among siblings, new ones come after them.

        A leaf that gets children becomes an internal node.

        Args:
            paths: paths from the top; nodes on the way that exist already are reused.
            edges: instead of paths, pairs (parent, new child). The parent is a unique name, a full path, a new node of
                another edge, or None for a new top node.

        Returns:
            The new tree and the maps between node ids.

        Raises:
            ValueError: both or neither given, an edge that exists already, an unknown or ambiguous parent, a cycle.

        >>> tax = Taxonomy.from_paths([("a", "x"), ("b", "y")])
        >>> tax.extend([("a", "z")]).old_to_new.tolist()
        [0, 1, 2, 4]
        """
        return _edit.extend(self, paths, edges)

    def with_self_leaves(self, nodes: Iterable | Tensor | None = None, name: str = "(self)") -> TaxonomyUpdate:
        """Give inner nodes that are classes themselves a leaf of their own, below them.

        Decoders and losses on leaf logits only know leaves: "a dog of no named breed" then is a leaf beside the breeds.
        Without it such a sample is a partial label, "some dog", which says nothing about the breed.

        Args:
            nodes: node ids of inner nodes; all of them if None.
            name: name of each new leaf.

        Returns:
            The new tree and the maps between node ids; `old_to_new` of an inner node is the inner node, its new leaf is
            the one whose parent it is: `update.taxonomy.index((*tax.path_of(node), name))`.

        Raises:
            ValueError: an unknown id, a leaf, or a child that has the name already.

        >>> tax = Taxonomy.from_paths([("dog", "pug"), ("dog", "boxer"), ("cat",)])
        >>> tax.with_self_leaves([tax.index("dog")]).taxonomy.to_paths()
        [('dog', 'pug'), ('dog', 'boxer'), ('dog', '(self)'), ('cat',)]
        """
        return _edit.add_self_leaves(self, nodes, name)

    def prune(self, nodes: Iterable | Tensor, mode: str = "subtree") -> TaxonomyUpdate:
        """Remove nodes.

        A parent that loses all its children becomes a leaf; name it too if it has to go.

        Args:
            nodes: node ids.
            mode: "subtree" removes all below them as well; "splice" hands their children to their parents.

        Returns:
            The new tree and the maps between node ids.

        Raises:
            ValueError: an unknown id, nothing left, or splicing that gives siblings the same name.

        >>> tax = Taxonomy.from_paths([("a", "x"), ("b", "y")])
        >>> tax.prune([tax.index("b")], mode="splice").taxonomy.to_paths()
        [('a', 'x'), ('y',)]
        """
        return _edit.prune(self, nodes, mode)

    def describe(self) -> TaxonomySummary:
        """Return sizes, lone children, imbalance, ragged depth, and what the losses will ignore; print it to read."""
        return _report.describe(self)

    def show(self, max_depth: int = 3, max_children: int = 5) -> str:
        """Return the upper part of the tree as indented text.

        Args:
            max_depth: number of levels to show.
            max_children: number of children to show below each node.

        >>> print(Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)]).show())
        Taxonomy(4 nodes, 3 leaves, levels 2/2)
          a
            x
            y
          b
        """
        return _report.show(self, max_depth, max_children)

    def draw(self, ax: Any = None, max_nodes: int = 300) -> Any:
        """Draw a small tree with matplotlib.

        Args:
            ax: the axes to draw into; new ones if None.
            max_nodes: refuse larger trees.

        Returns:
            The axes.
        """
        return _report.draw(self, ax, max_nodes)

    def __str__(self) -> str:
        """Return the upper part of the tree as text."""
        return self.show(max_depth=2, max_children=5)

    def __repr__(self) -> str:
        """Return the sizes."""
        return (
            f"Taxonomy(nodes={self.num_nodes}, leaves={self.num_leaves}, levels={'/'.join(map(str, self.level_sizes))})"
        )
