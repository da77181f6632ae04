"""One step of stage 1 on the Q-Former (forward and backward): our fused pass beside four passes as LAVIS makes them.

    python tools/bench.py packages/hyper-blip/benchmarks/bench_stage1.py --json OUT.json [--quick] [--batches 8 32]

Features 257 x 1408, 32 queries, 32 tokens, BERT-base Q-Former, the same weights and losses on both sides. The peer is written
by us after LAVIS's order: queries; text of the language loss over the cached keys and values of the queries; contrastive text;
matching on three times as many pairs. Matching negatives are fixed to the next row, so that both sides do the same work.

Also here: re-ranking with the keys and values of a picture computed once, beside 128 copies of its features.
"""

import torch
from bench import Bench, arguments
from transformers import Blip2Config

from hyper_blip import (
    HyperBlip2Config,
    HyperBlip2ForPretraining,
    HyperbolicConfig,
    image_text_matching_loss,
    text_generation_loss,
)
from hyper_blip.losses import image_text_contrastive_loss
from hyper_blip.qformer import BIDIRECTIONAL, CAUSAL, JOINT, Segment, image_keys, joint_states


def build(quick: bool, device: str) -> tuple[HyperBlip2ForPretraining, int]:
    """The model without a vision encoder, and the number of patches."""
    width, patches, layers = (64, 17, 2) if quick else (1408, 257, 12)
    vision = {"hidden_size": width, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": width}
    qformer = {"use_qformer_text_input": True, "vocab_size": 30523, "num_hidden_layers": layers}
    qformer |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if quick:
        qformer |= {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    blip2 = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config={"model_type": "opt", "num_hidden_layers": 0}
    )
    return HyperBlip2ForPretraining.from_config(HyperBlip2Config(blip2, HyperbolicConfig.euclidean())).to(
        device
    ).train(), patches


def losses(model, queries, lm, itc, matching, ids, mask):
    image, text = model.project_queries(queries), model._project_text(itc)
    loss = image_text_contrastive_loss(image.tangent, text.tangent, model.config.hyperbolic, model.temperature())[0]
    labels = ids.masked_fill(mask == 0, -100)
    loss = loss + text_generation_loss(model.lm_head(lm, model.blip2.embeddings.word_embeddings.weight), labels)
    truth = torch.zeros(len(matching), dtype=torch.long, device=ids.device)
    truth[: len(ids)] = 1
    return loss + image_text_matching_loss(model.blip2.itm_head(matching).mean(1), truth)


def triple(ids, mask, image):
    texts = torch.cat([ids, ids, ids.roll(1, 0)]), torch.cat([mask, mask, mask.roll(1, 0)])
    return texts, torch.cat([image, image.roll(1, 0), image])


def ours(model, image, ids, mask, share: bool):
    """Two calls; with `share` the image keys and values are computed once."""
    given = image_keys(model.blip2.qformer, image) if share else image
    queries, lm, itc = joint_states(model.blip2, given, [Segment(ids, mask, CAUSAL), Segment(ids, mask, BIDIRECTIONAL)])
    texts, pictures = triple(ids, mask, image)
    if share:
        num = torch.arange(len(ids), device=ids.device)
        pictures = given.select(torch.cat([num, num.roll(1), num]))
    matching = joint_states(model.blip2, pictures, [Segment(*texts, JOINT)])[0]
    return losses(model, queries, lm, itc, matching, ids, mask)


def four_passes(model, image, ids, mask):
    """LAVIS's order, with the self-attention inputs of the queries cached for the language text."""
    blip2, qformer = model.blip2, model.blip2.qformer
    cached = []
    hooks = [
        layer.attention.register_forward_pre_hook(lambda m, a, k: cached.append(k["hidden_states"]), with_kwargs=True)
        for layer in qformer.encoder.layer
    ]
    queries = joint_states(blip2, image)[0]
    for hook in hooks:
        hook.remove()
    hidden = qformer.dropout(qformer.layernorm(blip2.embeddings(input_ids=ids)))
    num, tokens = cached[0].shape[1], ids.shape[1]
    seen = torch.ones(len(ids), tokens, num + tokens, dtype=torch.bool, device=ids.device)
    seen[:, :, num:] = mask.bool()[:, None].expand(-1, tokens, -1).tril()
    bias = torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    for layer, before in zip(qformer.encoder.layer, cached, strict=True):
        attention, heads = layer.attention.attention, layer.attention.attention.num_attention_heads
        both = torch.cat([before, hidden], dim=1)
        q, k, v = (
            f(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for f, x in ((attention.query, hidden), (attention.key, both), (attention.value, both))
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        hidden = layer.feed_forward_chunk(layer.attention.output(out, hidden))
    itc = joint_states(blip2, None, [Segment(ids, mask, BIDIRECTIONAL)], queries=False)[0]
    texts, pictures = triple(ids, mask, image)
    matching = joint_states(blip2, pictures, [Segment(*texts, JOINT)])[0]
    return losses(model, queries, hidden, itc, matching, ids, mask)


def inputs(num: int, patches: int, width: int, tokens: int, device: str):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(num, patches, width, generator=generator).to(device)
    ids = torch.randint(1000, 30000, (num, tokens), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[::2, tokens // 2 :] = 0
    return image, ids, mask


def step(model, function, *args):
    def run():
        model.zero_grad(set_to_none=True)
        loss = function(model, *args)
        loss.backward()
        return float(loss.detach())

    return run


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--batches", type=int, nargs="*", help="batch sizes to measure; the others are listed as not measured"
    )
    parser.add_argument("--texts", type=int, default=128, help="texts for each picture in re-ranking")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(2 if args.quick else 5 if cuda else 1)
    model, patches = build(args.quick, device)
    width, tokens = model.config.blip2.vision_config.hidden_size, 8 if args.quick else 32
    sizes = args.batches if args.batches is not None else ((2, 3) if args.quick else (8, 32, 100))
    for num in sorted({*sizes, *(() if args.quick else (8, 32, 100))}):
        setting = f"B={num}, {patches}x{width}, T={tokens}"
        fused_target = "ratio <= 0.9 (CUDA)" if num == 8 else "ratio <= 1.0"
        share_target = "ratio <= 0.80" if num == 32 else None
        for kind in ("cpu", "cuda"):
            if kind != device or num not in sizes:
                bench.add("stage 1: fused / four passes", setting, None, None, "ms", fused_target, kind)
                bench.add(
                    "stage 1: fused + shared image K/V / four passes", setting, None, None, "ms", share_target, kind
                )
                continue
            data = inputs(num, patches, width, tokens, device)
            runs = [step(model, four_passes, *data), step(model, ours, *data, False), step(model, ours, *data, True)]
            peer, fused, shared = bench.times(*runs)
            values = [run() for run in runs]
            assert max(values) - min(values) < 1e-3, values
            bench.add("stage 1: fused / four passes", setting, fused, peer, "ms", fused_target, device)
            bench.add(
                "stage 1: fused + shared image K/V / four passes", setting, shared, peer, "ms", share_target, device
            )
    model.eval()
    texts = 4 if args.quick else args.texts
    image, ids, mask = inputs(1, patches, width, tokens, device)
    ids, mask = ids.expand(texts, -1).contiguous(), mask.expand(texts, -1).contiguous()
    with torch.inference_mode():
        once, copies = bench.times(
            lambda: model.match(image_keys(model.blip2.qformer, image), ids, mask),
            lambda: model.match(image.expand(texts, -1, -1), ids, mask),
        )
    bench.add(
        "re-ranking: image K/V once / for every text",
        f"{texts} texts a picture",
        once,
        copies,
        "ms",
        "ratio <= 0.70",
        device,
    )
    bench.write(args.json)


if __name__ == "__main__":
    main()
