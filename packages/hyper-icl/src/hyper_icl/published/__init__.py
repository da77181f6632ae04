"""The published Hyper-ICL: a gated low-rank adapter of the attention logits, and a Lorentz loss on hidden states.

Reference: Alipour Talemi et al., "Hyper-ICL", ICML 2026, arXiv 2606.04434. No demonstrations at test time.
"""

from hyper_icl._routing import text_attention_modules, use_calibrated_attention
from hyper_icl.published.adapter import LogitAdapter, attach
from hyper_icl.published.lorentz_anchor_loss import LorentzAnchorLoss, align_suffix, lorentz_anchor_loss

__all__ = [
    "LogitAdapter",
    "LorentzAnchorLoss",
    "align_suffix",
    "attach",
    "lorentz_anchor_loss",
    "text_attention_modules",
    "use_calibrated_attention",
]
