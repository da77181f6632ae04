"""Agreement with installed packages; skipped where they are missing."""

import pytest
import torch

from hier_losses import functional as F


@pytest.mark.slow  # importing the peer alone takes many seconds
def test_hierarchicalsoftmax_is_conditional_softmax_nll(t11, random_tree, close):
    peer = pytest.importorskip("hierarchicalsoftmax")
    for tax in (t11, random_tree(0), random_tree(6)):
        root = peer.SoftmaxNode("root")
        nodes = []
        for node, parent in enumerate(tax.parent.tolist()):
            nodes.append(peer.SoftmaxNode(f"{node}", parent=nodes[parent] if parent >= 0 else root))
        root.set_indexes()
        logits = torch.randn(tax.num_leaves, tax.num_nodes, generator=torch.Generator().manual_seed(0))
        # Its vector has no place for lone children.
        scores = torch.zeros(tax.num_leaves, root.layer_size)
        lone = 0
        for parent in [root, *nodes]:
            if len(parent.children) == 1:
                lone += 1
                continue
            for position, child in enumerate(parent.children):
                scores[:, parent.softmax_start_index + position] = logits[:, nodes.index(child)]
        assert root.layer_size == tax.num_nodes - lone
        target = root.get_node_ids_tensor([nodes[v] for v in tax.leaf.tolist()])
        theirs = peer.HierarchicalSoftmaxLoss(root=root)(scores, target)
        close(F.conditional_softmax_nll(logits, tax.leaf, tax), theirs, rtol=1e-5)
