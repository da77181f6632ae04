"""What works on which family of transformers' image-text models, on tiny random weights; writes docs/hyper-icl/support.md.

    python packages/hyper-icl/tests/support.py docs/hyper-icl/support.md

Every cell compares the calibrated model with the family's own eager attention in fp64, to which a mask that loops write is
added. Prompts are text alone: pictures become tokens before the language model, and the nine families of the test suite read
them there.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import eager_mask
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hyper_icl import (
    CalibrationPlan,
    LogitAdapter,
    SegmentMap,
    attach,
    calibrate,
    lora_config,
    text_attention_modules,
    use_calibrated_attention,
)

FEATURES = {
    "no plan": "without a plan the model computes what it did, with the attention that transformers gives it by default",
    "plan": "one forward pass under a plan",
    "steps": "a cache that grows, one token a step",
    "beams": "`generate` with two beams, cached and uncached",
    "left": "a batch padded on the left",
    "right": "a batch padded on the right",
    "chunks": "the prompt in pieces (`chunked=True`)",
    "prefix": "a cache that already holds the demonstrations",
    "static": "a static cache",
    "compiled": "`torch.compile` (backend aot_eager)",
    "adapter": "`LogitAdapter`",
    "LoRA": "`lora_config`, then a plan",
}
# Their prompts are read by an encoder, without a causal mask: there are no demonstrations to weigh in the decoder.
ENCODER_DECODER = (
    "florence2",
    "pix2struct",
    "pp_formulanet",
    "t5gemma2",
    "udop",
    "vision-encoder-decoder",
    "blip",
    "git",
)
# Not a language model that answers: a policy, a denoiser, or a guard with Gemma 3's text model.
OTHER_KINDS = ("diffusion_gemma", "pi0", "shieldgemma2", "evolla")
# Their forward refuses a prompt without a picture: their language model alone is tried.
NEED_A_PICTURE = ("blip-2", "instructblip", "instructblipvideo")
SMALL = {
    "hidden_size": 64,
    "embed_dim": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "ffn_hidden_size": 128,
}
SMALL_VISION = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
}
PLACES = [-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
LENGTH, MORE = len(PLACES), 3
BIAS = torch.tensor([[2.0, -1.5], [-2.0, 1.0]])
IDS = torch.randint(3, 90, (2, LENGTH + MORE), generator=torch.Generator().manual_seed(0))
_REFERENCE = {"bias": None}


class Missing(Exception):
    """The family itself lacks the feature."""


def _helpers():
    path = Path(__file__).with_name("_families.py")
    spec = importlib.util.spec_from_file_location("hyper_icl_support_families", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _shrunk(config, small):
    known = config.to_dict()
    settings = {key: value for key, value in small.items() if key in known or key in config.attribute_map}
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        # One layer of two kinds, one of them with full attention.
        other = next(kind for kind in kinds if kind != "full_attention")
        settings["layer_types"] = [other, "full_attention" if "full_attention" in kinds else kinds[1]]
    if isinstance(getattr(config, "moe_intermediate_size", None), list):
        settings["moe_intermediate_size"] = [32, 32]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and ("mrope_section" in rope or type(config).__name__.startswith("Glm")):
        # Three sections of half the rotated width.
        half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = [half // 4, half // 4, half - 2 * (half // 4)]
        settings["rope_parameters"] = {**rope, "rope_type": "default", "mrope_section": sections}
    for key in config.sub_configs:
        sub = getattr(config, key, None)
        if hasattr(sub, "sub_configs"):
            settings[key] = _shrunk(sub, SMALL_VISION)
    return type(config)(**settings)


def build(name):
    """A tiny model of the family: hand-written settings where the test suite has them, else the default ones made small."""
    families = _helpers()
    hand = {"idefics": "idefics1"}.get(name, name)
    if hand in families.NAMES:
        return families.make_model(hand)
    default = CONFIG_MAPPING[name]()
    text = default.get_text_config(decoder=True)
    parts = {}
    for key in default.sub_configs:
        sub = getattr(default, key, None)
        if sub is not None and not isinstance(sub, dict):
            parts[key] = _shrunk(sub, SMALL if sub is text else SMALL_VISION)
    for key in ("image_token_id", "image_token_index"):
        if hasattr(default, key):
            parts[key] = families.IMAGE
    config = type(default)(**parts) if text is not default else _shrunk(default, SMALL)
    kind = getattr(__import__("transformers"), modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    if isinstance(kind, tuple):
        kind = kind[0]
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > 3e7:
        raise MemoryError(f"{size / 1e6:.0f} million parameters after shrinking")
    model = families.grown(kind, config)
    if name in NEED_A_PICTURE:
        model = model.language_model
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model


def _eager_with_a_mask(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The family's own eager attention plus the mask of the reference, for text layers."""
    bias = _REFERENCE["bias"]
    if bias is not None and getattr(module, "_is_text", False):
        shape = (1, 1, query.shape[2], key.shape[2])
        # fp32's lowest number: where the softmax is in fp32, fp64's would be -inf and a padded row NaN.
        causal = torch.full(shape, torch.finfo(torch.float32).min, dtype=query.dtype).triu(1)
        attention_mask = (causal if attention_mask is None else attention_mask[..., : key.shape[2]]).clamp(
            min=torch.finfo(torch.float32).min
        ) + bias.to(query.dtype)
    own = sys.modules[type(module).__module__].eager_attention_forward
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def reference(model, bias, ids=IDS, places=None, mask=None):
    """Logits of the family's own attention in fp64 under a bias."""
    AttentionInterface.register("icl_reference", _eager_with_a_mask)
    AttentionMaskInterface.register("icl_reference", eager_mask)
    model = copy.deepcopy(model).double()
    if hasattr(model.config.get_text_config(decoder=True), "_experts_implementation_internal"):
        model.set_experts_implementation("eager")
    for module in text_attention_modules(model).values():
        object.__setattr__(module, "_is_text", True)
    subs = {k: "eager" for k in model.config.sub_configs if getattr(model.config, k, None) is not None}
    text = model.config.get_text_config(decoder=True)
    key = next((k for k in subs if getattr(model.config, k) is text), "")
    model.set_attn_implementation({**subs, "": "icl_reference", key: "icl_reference"})
    total = ids.shape[1]
    places = [PLACES + [2] * (total - LENGTH)] * 2 if places is None else places
    added = torch.zeros(2, 1, total, total, dtype=torch.float64)
    for b in range(2):
        for i in range(total):
            for j in range(i + 1):
                if places[b][i] == 2 and 0 <= places[b][j] < 2:
                    added[b, 0, i, j] = bias[b, places[b][j]]
    _REFERENCE["bias"] = added
    try:
        return forward(model, ids, use_cache=False, **({} if mask is None else {"attention_mask": mask}))
    finally:
        _REFERENCE["bias"] = None


@torch.no_grad()
def forward(model, ids, **kwargs):
    return model(input_ids=ids, **picture(model, ids), **kwargs).logits


def picture(model, ids):
    """What Idefics-1 needs beside text: its forward wants a picture, and every token looks at the same one."""
    if model.config.model_type != "idefics":
        return {}
    seen = torch.ones(len(ids), ids.shape[1], 1, dtype=torch.long)
    return {"pixel_values": torch.ones(len(ids), 1, 3, 32, 32, dtype=model.dtype), "image_attention_mask": seen}


def _agree(found, expected, what, tolerance=1e-4):
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"{what} off by {error:.1e}"


def _pieces(model, cuts, cache):
    return torch.cat([forward(model, IDS[:, a:b], past_key_values=cache) for a, b in itertools.pairwise(cuts)], 1)


def _text(model):
    return model.config.get_text_config(decoder=True)


class Family:
    """One tiny model and its features; a method raises where a feature does not work."""

    def __init__(self, name):
        self.own = build(name)
        self.plain = forward(self.own, IDS, use_cache=False)
        self.model = copy.deepcopy(self.own)
        use_calibrated_attention(self.model)
        self.plan = CalibrationPlan(BIAS, SegmentMap.from_lengths([1, 1], [[4, 3]] * 2, [5, 5]))
        self.expected = reference(self.own, BIAS)
        # Attention that looks both ways within the prompt makes the prompt alone another text than the whole.
        self.prompt_plain = forward(self.own, IDS[:, :LENGTH], use_cache=False)
        self.prompt_expected = reference(self.own, BIAS, IDS[:, :LENGTH])

    def supports(self, run):
        """Run something without a plan; what fails there is no fault of ours."""
        try:
            return run(self.model)
        except Exception as error:
            raise Missing(f"{type(error).__name__}: {error}") from error

    def no_plan(self):
        _agree(forward(self.model, IDS, use_cache=False), self.plain.double(), "logits", 1e-5)

    def one_pass(self):
        assert float((self.expected - self.plain).abs().max() / self.plain.abs().max()) > 1e-3, (
            "the plan changes nothing"
        )
        with calibrate(self.model, self.plan):
            _agree(forward(self.model, IDS[:, :LENGTH]), self.prompt_expected, "logits")

    def _cached(self, cuts, make, chunked=False):
        self._same_without_a_plan(self.supports(lambda m: _pieces(m, cuts, make())))
        with calibrate(self.model, self.plan, chunked=chunked):
            _agree(_pieces(self.model, cuts, make()), self.expected, "logits")

    def _same_without_a_plan(self, cached):
        try:
            _agree(cached, self.plain.double(), "cached logits without a plan", 1e-3)
        except AssertionError as error:
            raise Missing(str(error)) from error

    def _dynamic(self):
        return DynamicCache(config=_text(self.own))

    def steps(self):
        self._cached([0, *range(LENGTH, LENGTH + MORE + 1)], self._dynamic)

    def chunks(self):
        self._cached([0, 5, 10, LENGTH, LENGTH + MORE], self._dynamic, chunked=True)

    def static(self):
        make = lambda: StaticCache(config=_text(self.own), max_cache_len=LENGTH + MORE + 2)  # noqa: E731
        self._cached([0, *range(LENGTH, LENGTH + MORE + 1)], make)

    def prefix(self):
        plain = self.supports(lambda m: _pieces(m, [0, 8, LENGTH, LENGTH + MORE], self._dynamic()))
        self._same_without_a_plan(plain)
        cache = self._dynamic()
        forward(self.model, IDS[:, :8], past_key_values=cache)
        with calibrate(self.model, self.plan):
            parts = [
                forward(self.model, IDS[:, a:b], past_key_values=cache)
                for a, b in ((8, LENGTH), (LENGTH, LENGTH + MORE))
            ]
        _agree(torch.cat(parts, 1), self.expected[:, 8:], "logits")

    def beams(self):
        options = {
            **picture(self.model, IDS[:, :LENGTH]),
            "max_new_tokens": 3,
            "num_beams": 2,
            "do_sample": False,
            "pad_token_id": 0,
        }
        self.supports(lambda m: m.generate(IDS[:, :LENGTH], **options))
        self.supports(lambda m: m.generate(IDS[:, :LENGTH], use_cache=False, **options))
        with calibrate(self.model, self.plan):
            cached = self.model.generate(IDS[:, :LENGTH], **options)
            fresh = self.model.generate(IDS[:, :LENGTH], use_cache=False, **options)
        assert torch.equal(cached, fresh), "cached and uncached tokens differ"

    def _padded(self, side):
        short, whole = (SegmentMap.from_lengths([1], [d], [5]) for d in ([4], [4, 3]))
        pad = LENGTH - short.length
        ids, mask = IDS[:, :LENGTH].clone(), torch.ones(2, LENGTH, dtype=torch.long)
        where = slice(0, pad) if side == "left" else slice(LENGTH - pad, LENGTH)
        ids[0, where], mask[0, where] = 0, 0
        segments = SegmentMap.batch([short, whole], mask)
        own = [-1] + [0] * 4 + [2] * 5
        places = [[-1] * pad + own if side == "left" else own + [-1] * pad, PLACES]
        bias = torch.tensor([[2.0, 0.0], [-2.0, 1.0]])
        self.supports(lambda m: forward(m, ids, attention_mask=mask))
        expected = reference(self.own, bias, ids, places, mask)
        with calibrate(self.model, CalibrationPlan(bias, segments)):
            found = forward(self.model, ids, attention_mask=mask)
        kept = mask.bool()
        _agree(found[kept], expected[kept], "logits")

    def left(self):
        self._padded("left")

    def right(self):
        self._padded("right")

    def compiled(self):
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend="aot_eager")
        self.supports(lambda _: forward(compiled, IDS[:, :LENGTH], use_cache=False))
        with calibrate(self.model, self.plan):
            _agree(forward(compiled, IDS[:, :LENGTH], use_cache=False), self.prompt_expected, "logits")
        _agree(forward(compiled, IDS[:, :LENGTH], use_cache=False), self.prompt_plain.double(), "logits after it", 1e-3)

    def adapter(self):
        adapter = LogitAdapter.for_model(self.model)
        with attach(self.model, adapter):
            _agree(forward(self.model, IDS, use_cache=False), self.plain.double(), "an adapter of zeros", 1e-5)
            torch.nn.init.normal_(adapter.u_k)
            torch.nn.init.normal_(adapter.u_q)
            assert (forward(self.model, IDS, use_cache=False) - self.plain).abs().max() > 1e-3, (
                "the adapter changes nothing"
            )

    def lora(self):
        student = get_peft_model(copy.deepcopy(self.model), lora_config(self.model, r=2))
        with calibrate(student, self.plan):
            found = forward(student, IDS[:, :LENGTH])
        _agree(found, self.prompt_expected, "logits of a LoRA of zeros")
        assert any("lora_B" in n for n, _ in student.named_parameters())


METHODS = dict(
    zip(
        FEATURES,
        (
            "no_plan",
            "one_pass",
            "steps",
            "beams",
            "left",
            "right",
            "chunks",
            "prefix",
            "static",
            "compiled",
            "adapter",
            "lora",
        ),
        strict=True,
    )
)


def row_of(name, features=tuple(FEATURES)):
    """What works: "yes", "refused" (with our sentence), "-" where the family itself lacks it, "no" where it is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            family = Family(name)
        except Exception as error:
            text = str(error).splitlines()
            return None, {"": f"{type(error).__name__}: {text[0] if text else ''}"}
        row, why = {}, {}
        for feature in features:
            try:
                getattr(family, METHODS[feature])()
                row[feature] = "yes"
            except Missing as error:
                row[feature], why[feature] = "-", str(error)
            except ValueError as error:
                row[feature], why[feature] = "refused", str(error)
            except Exception as error:
                row[feature], why[feature] = "no", f"{type(error).__name__}: {error}"
        return row, why


def page(names, kept):
    """Table rows, notes, and families that could not be built; finished families are kept in a file, so that runs go on."""
    done = {}
    if kept is not None and kept.exists():
        done = {name: (row, why) for name, row, why in map(json.loads, kept.read_text(encoding="utf-8").splitlines())}
    rows, notes, missing = [], [], []
    for name in names:
        if name not in done:
            done[name] = row_of(name)
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, *done[name]]) + "\n")
        row, why = done[name]
        if row is None:
            missing.append(f"{name} ({why['']})")
            continue
        rows.append(f"| {name} | " + " | ".join(row[feature] for feature in FEATURES) + " |")
        notes += [f"- {name}, {f}: {' '.join(why[f].split())[:200]}" for f in FEATURES if row[f] in ("refused", "no")]
    return rows, notes, missing


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--keep", type=Path, help="JSON lines of finished families; a run that was stopped goes on")
    args = parser.parse_args()
    every = sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    tried = args.families or [n for n in every if n not in (*ENCODER_DECODER, *OTHER_KINDS)]
    rows, notes, missing = page(tried, args.keep)
    import transformers

    lines = [
        "# What works on which family",
        "",
        f"Written by `python packages/hyper-icl/tests/support.py docs/hyper-icl/support.md` with transformers "
        f"{transformers.__version__}: every family of its image-text models whose default settings could be made small, on random "
        "weights and prompts of text. Each cell compares with the family's own eager attention in fp64 under a mask that loops "
        "write. Random weights prove the mechanics and say nothing about answers.",
        "",
        "yes: agrees. refused: our error says why. -: the family itself fails or changes its answers there without a plan. "
        "no: a fault.",
        "",
        "| family | " + " | ".join(FEATURES) + " |",
        "|---" * (len(FEATURES) + 1) + "|",
        *rows,
        "",
        *(f"- **{name}**: {what}." for name, what in FEATURES.items()),
        "",
        "## Refused, and faults",
        "",
        *(notes or ["None."]),
        "",
        "## Not tried",
        "",
        "Encoder and decoder, whose prompt the encoder reads: " + ", ".join(ENCODER_DECODER) + ".",
        "",
        "Not models that answer by text: " + ", ".join(OTHER_KINDS) + ".",
        "",
        "Could not be made small or routed here:",
        "",
        *(f"- {one[:220]}" for one in missing),
    ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
