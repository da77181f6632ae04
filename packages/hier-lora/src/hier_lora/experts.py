"""Products of experts over leaves: several classifiers, weights and a decoder chosen on held-out pictures, saved as one.

log p(k) is proportional to sum_e w_e log p_e(k) / T_e (a log-linear opinion pool: Genest and Zidek, 1986, "Combining
Probability Distributions"); the decoder by expected height is conditional risk minimisation (Karthik et al., 2021).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hier_lora.calibration import fit_temperature, fit_temperatures, guarded
from hier_lora.heads import LinearHead, Neighbours, as_update
from hier_lora.predict import Prediction, predict_paths
from hier_losses import Taxonomy, TaxonomyUpdate, decoding
from hier_losses.discriminant import TreeLDA
from hier_losses.functional import lca_height
from hier_losses.path_ops import end_of_paths
from hier_losses.probabilities import leaf_columns, leaf_to_node_logits

Features = Tensor | Mapping[str, Tensor]
CHOICES = ("leaf", "ahd")
_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SHARPER = (0.25, 0.5, 1.0, 2.0, 4.0)
STATE, SETTINGS, TREE = "experts.safetensors", "experts.json", "taxonomy.json"


class Expert(Protocol):
    """What a product takes: `LinearHead`, `TreeLDA`, `Neighbours`, or a module of one's own with these members."""

    tax: Taxonomy

    def log_prob(self, features: Tensor) -> Tensor:
        """Log-probabilities (batch, K) of the leaves, or (batch, N) of all nodes; -inf rules a leaf out."""

    def update_taxonomy(self, update: TaxonomyUpdate) -> Any:
        """Follow a change of the classes."""


@dataclass(frozen=True)
class PoolSettings:
    """What `choose` finds.

    Attributes:
        weights: of each expert, at least 0; 0 leaves it out.
        temperatures: of each expert.
        decoder: "bottom_up", or "crm" for the least expected height.
        temperature: of the product, fitted by cross-entropy; `crm` decides by it.
        leaf: accuracy on the pictures that chose.
        ahd: average hierarchical distance on them. Both flatter: others must judge.
    """

    weights: dict[str, float]
    temperatures: dict[str, float]
    decoder: str = "bottom_up"
    temperature: float = 1.0
    leaf: float | None = None
    ahd: float | None = None


def pool(log_probs: Mapping[str, Tensor], tax: Taxonomy, settings: PoolSettings) -> Float[Tensor, "batch leaves"]:
    """Log-probabilities of the product, normalised over the leaves.

    Args:
        log_probs: of each expert, over leaves or nodes.
        tax: the taxonomy.
        settings: weights and temperatures; the product's own temperature is applied too.

    Returns:
        (batch, K); -inf for leaves that an expert with a weight rules out.

    Raises:
        ValueError: an expert that is missing, or no weight above 0.
    """
    missing = sorted(settings.weights.keys() - log_probs.keys())
    if missing:
        raise ValueError(f"log_probs must hold every expert, {missing} are missing")
    used = {name: w for name, w in settings.weights.items() if w > 0}  # 0 times -inf would be NaN
    if not used:
        raise ValueError(f"weights must hold one above 0, got {settings.weights}")
    parts = [w / settings.temperatures[name] * leaf_columns(log_probs[name], tax) for name, w in used.items()]
    return (torch.stack(parts).sum(0) / settings.temperature).log_softmax(1)


def choose(
    log_probs: Mapping[str, Tensor],
    target: Tensor,
    tax: Taxonomy,
    by: str = "leaf",
    weights: Sequence[float] = _WEIGHTS,
) -> PoolSettings:
    """Choose temperatures, weights and the decoder of a product on held-out pictures.

    Each temperature minimises its expert's cross-entropy. The weights start at the best single expert; each in turn moves
    along the grid while the score rises, ties going to the smaller cross-entropy. Last, the least expected height at some
    temperatures around the fitted one competes with the best leaf.

    Args:
        log_probs: of each expert on pictures that none of them was fitted to, over leaves or nodes.
        target: (batch,) node ids of leaves.
        tax: the taxonomy.
        by: "leaf" for leaf accuracy, "ahd" for the average height of the lowest common ancestor with the truth.
        weights: the grid, at least 0.

    Returns:
        The settings, with the scores they reached.

    Raises:
        ValueError: no expert or picture, targets that are not leaves, an unknown `by`, a negative weight.
    """
    if by not in CHOICES:
        raise ValueError(f"by must be one of {CHOICES}, got {by!r}")
    if not log_probs or not len(target):
        raise ValueError(
            f"log_probs and target must not be empty, got {len(log_probs)} experts, {len(target)} pictures"
        )
    if min(weights, default=-1) < 0:
        raise ValueError(f"weights must hold numbers of at least 0, got {tuple(weights)}")
    truth = tax.leaf_index.to(target.device)[target]
    if (truth < 0).any():
        raise ValueError("target must hold leaves, got an inner node")
    leaves = {name: leaf_columns(found.detach(), tax).double() for name, found in log_probs.items()}
    temperatures = {name: fit_temperature(found, truth) for name, found in leaves.items()}

    def key(found: dict[str, float]) -> tuple[float, float]:
        scores = pool(leaves, tax, PoolSettings(found, temperatures))
        nll = -scores.gather(1, truth[:, None]).clamp(min=-1e6).mean()
        return _score(decoding.bottom_up(scores, tax), target, tax, by), -float(nll)

    singles = [{name: float(name == one) for name in leaves} for one in leaves]
    best = max(singles, key=key)
    reached, better = key(best), True
    while better:
        better = False
        for name in leaves:
            for weight in weights:
                other = {**best, name: float(weight)}
                if any(other.values()) and (value := key(other)) > reached:
                    best, reached, better = other, value, True
    scores = pool(leaves, tax, PoolSettings(best, temperatures))
    fitted = fit_temperature(scores, truth)
    decoder, temperature, top = "bottom_up", fitted, reached[0]
    for factor in _SHARPER:
        score = _score(decoding.crm(scores / (fitted * factor), tax), target, tax, by)
        if score > top:
            decoder, temperature, top = "crm", fitted * factor, score
    paths = getattr(decoding, decoder)(scores / temperature, tax)
    leaf, ahd = _score(paths, target, tax, "leaf"), -_score(paths, target, tax, "ahd")
    return PoolSettings(best, temperatures, decoder, temperature, leaf, ahd)


def _score(paths: Tensor, target: Tensor, tax: Taxonomy, by: str) -> float:
    found = end_of_paths(paths)
    if by == "leaf":
        return float((found == target).double().mean())
    return -float(lca_height(found, target, tax).double().mean())


class ProductOfExperts(nn.Module):
    """Several experts and the settings that join them; with a single expert it predicts, calibrates and saves that one.

    Args:
        experts: by name; all over the same taxonomy.
        settings: from `choose`; equal weights and temperatures of 1 if None.

    Raises:
        ValueError: no expert, several taxonomies, settings for other experts.

    >>> tax = Taxonomy.from_paths([("a", "x"), ("a", "y"), ("b",)])
    >>> x = torch.tensor([[0.0, 0.1], [0.0, 0.2], [1.0, 1.0], [1.0, 0.9], [5.0, 5.0]])
    >>> lda = TreeLDA(tax).fit(x, tax.indices(["x", "x", "y", "y", "b"]))
    >>> print(ProductOfExperts({"lda": lda}).predict(x[:1])[0])
    a (1.00) > x (1.00)
    """

    def __init__(self, experts: Mapping[str, Any], settings: PoolSettings | None = None) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts must hold at least one, got none")
        self.experts = nn.ModuleDict(experts)
        self.tax: Taxonomy = next(iter(experts.values())).tax
        if any(expert.tax != self.tax for expert in experts.values()):
            raise ValueError("experts must share one taxonomy")
        if settings is None:
            settings = PoolSettings(dict.fromkeys(experts, 1.0), dict.fromkeys(experts, 1.0))
        if not settings.weights.keys() == settings.temperatures.keys() == experts.keys():
            raise ValueError(f"settings must be for {sorted(experts)}, got {sorted(settings.weights)}")
        self.settings = settings
        self.temperature: Tensor | None = None

    def expert_log_probs(self, features: Features) -> dict[str, Tensor]:
        """Log-probabilities of each expert: what `choose` takes.

        Args:
            features: one tensor for all, or one for each expert by name.
        """
        each = features if isinstance(features, Mapping) else dict.fromkeys(self.experts, features)
        return {name: cast(Expert, expert).log_prob(each[name]) for name, expert in self.experts.items()}

    def log_prob(self, features: Features) -> Float[Tensor, "batch leaves"]:
        """Log-probabilities of the leaves under the product, at its temperature."""
        return pool(self.expert_log_probs(features), self.tax, self.settings)

    forward = log_prob

    @torch.no_grad()
    def choose(self, features: Features, target: Tensor, by: str = "leaf") -> PoolSettings:
        """Choose the settings on held-out pictures, see the function `choose`, and keep them."""
        self.settings = choose(self.expert_log_probs(features), target, self.tax, by)
        self.temperature = None
        return self.settings

    @torch.no_grad()
    def calibrate(self, features: Features, target: Tensor) -> bool:
        """Fit the temperature of each level that `predict` shows, on held-out pictures; decisions stay as they are.

        Returns:
            Whether the product is calibrated. A level whose temperature hits its bound of 0.01 or 100 keeps 1.
        """
        self.temperature = guarded(fit_temperatures(self.logits(features), target, self.tax))
        return self.temperature is not None

    @torch.no_grad()
    def predict(self, features: Features, decoder: str | None = None, **options: object) -> list[Prediction]:
        """Name the path of each picture; with the chosen decoder if None.

        Args:
            features: one row per picture, or such by expert.
            decoder: a name of `DECODERS`.
            options: of the decoder, see `predict_paths`.
        """
        decoder = self.settings.decoder if decoder is None else decoder
        return predict_paths(self.logits(features), self.tax, decoder, self.shown(decoder), **options)

    def shown(self, decoder: str) -> Float[Tensor, " levels"] | None:
        """The temperatures with which `predict` shows probabilities under a decoder."""
        # The product has its own temperature already: showing must not change what crm decides.
        return None if decoder in ("crm", "threshold") else self.temperature

    def logits(self, features: Features) -> Float[Tensor, "batch nodes"]:
        """Node scores for `predict_paths`: a leaf that is ruled out is hopeless, not -inf."""
        return leaf_to_node_logits(self.log_prob(features), self.tax).clamp(min=-1e4).float()

    def update_taxonomy(self, update: TaxonomyUpdate | Taxonomy) -> TaxonomyUpdate:
        """Let every expert follow a change of the classes; settings stay, levels keep their temperatures.

        A class without pictures is ruled out by `TreeLDA` and `Neighbours`, and so by the product, until it has some or
        until their weights are 0.
        """
        update = as_update(self.tax, update)
        for expert in self.experts.values():
            cast(Expert, expert).update_taxonomy(update)
        self.tax = update.taxonomy
        if self.temperature is not None:
            levels = torch.arange(self.tax.num_levels)
            self.temperature = self.temperature[levels.clamp(max=len(self.temperature) - 1)]
        return update

    def save_pretrained(self, folder: str | Path) -> None:
        """Write experts, settings and taxonomy: tensors in safetensors, the rest in JSON.

        Raises:
            ValueError: an expert of a kind that this package does not know.
        """
        folder = Path(folder)
        kinds = {name: _describe(name, expert) for name, expert in self.experts.items()}
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}
        save_file(state, folder / STATE)
        temperature = None if self.temperature is None else self.temperature.tolist()
        found = {"format": 1, "experts": kinds, "settings": asdict(self.settings), "temperature": temperature}
        (folder / SETTINGS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / TREE).write_text(json.dumps(self.tax.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ProductOfExperts":
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            ValueError: a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tax = Taxonomy.from_json(json.loads((folder / TREE).read_text(encoding="utf-8")))
            state = load_file(folder / STATE)
            experts = {name: _build(kind, tax, state, f"experts.{name}.") for name, kind in found["experts"].items()}
            product = cls(experts, PoolSettings(**found["settings"]))
            product.load_state_dict(state)
            temperature = found["temperature"]
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"folder must hold complete saved experts, got {folder}: {error}") from error
        product.temperature = None if temperature is None else torch.tensor(temperature)
        return product.eval()


def _describe(name: str, expert: nn.Module) -> dict[str, Any]:
    if isinstance(expert, LinearHead):
        return {"kind": "linear", "over": expert.over, "dropout": expert.dropout}
    if isinstance(expert, Neighbours):
        return {"kind": "neighbours", "scale": expert.scale}
    if isinstance(expert, TreeLDA):
        kept = ("shrinkage", "star", "plug_in", "tolerance", "max_steps")
        return {"kind": "tree-lda", **{key: getattr(expert, key) for key in kept}}
    raise ValueError(f"experts must be of kinds that can be saved, got {type(expert).__name__} for {name!r}")


def _build(found: dict[str, Any], tax: Taxonomy, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    settings = {key: value for key, value in found.items() if key != "kind"}
    if found["kind"] == "linear":
        return LinearHead(tax, state[f"{prefix}weight"].shape[1], **settings)
    if found["kind"] == "neighbours":
        return Neighbours(tax, state[f"{prefix}features"], state[f"{prefix}target"], **settings)
    if found["kind"] == "tree-lda":
        given: dict[str, Any] = {"v": state.get(f"{prefix}given_v"), "covariance": state.get(f"{prefix}covariance")}
        return TreeLDA(tax, **given, **settings)
    raise ValueError(f"unknown kind of expert {found['kind']!r}")


__all__ = ["CHOICES", "Expert", "PoolSettings", "ProductOfExperts", "choose", "pool"]
