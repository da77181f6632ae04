"""No pair that fits is called wrong: matching negatives against a search of every caption in both of its forms."""

import pytest
import torch

from hyper_blip import HyperbolicConfig
from hyper_blip.negatives import matching_positives
from hyper_blip.qformer import ImageKeys

# Two captions twice, and one whose beginning is a caption of another picture.
IDS = torch.tensor(
    [[1, 10, 11, 12, 13, 2], [1, 10, 11, 12, 13, 2], [1, 20, 21, 2, 0, 0], [1, 20, 21, 22, 2, 0], [1, 20, 21, 2, 0, 0]]
)
SETTINGS = [
    pytest.param({"rtp_prob": 0.0}, id="whole"),
    pytest.param({"rtp_prob": 1.0}, id="contrastive"),
    pytest.param({"rtp_prob": 0.7, "rtp_targets": ("itc", "itm"), "itm_negatives": "local"}, id="matching"),
]


def words(ids, mask):
    return tuple(i for i, m in zip(ids.tolist(), mask.tolist(), strict=True) if m and i not in (1, 2))


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_false_negative(stage1, settings, monkeypatch):
    model = stage1(HyperbolicConfig.paper(share_image_kv="itm_negatives" in settings, **settings)).train()
    pixels, mask = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0)), (IDS != 0).long()
    image, seen = model.vision_features(pixels).detach(), []
    patches = {tuple(row.flatten()[:4].tolist()): i for i, row in enumerate(image)}
    keys = model.blip2.qformer.encoder.layer[0].crossattention.attention.key
    patches |= {
        tuple(row.flatten()[:4].tolist()): i
        for i, row in enumerate(keys(image).unflatten(-1, (4, 8)).transpose(1, 2).detach())
    }
    match = model.match
    monkeypatch.setattr(model, "match", lambda *args: seen.append(args) or match(*args))
    whole = [words(*row) for row in zip(IDS, mask, strict=True)]
    drawn = 0
    for step in range(30):
        model(pixels, IDS, mask, step=step)
        pictures, ids, shown = seen[-1]
        pictures = pictures.layers[0][0] if isinstance(pictures, ImageKeys) else pictures
        numbers = [patches[tuple(row.flatten()[:4].tolist())] for row in pictures.detach()]
        texts = [words(*row) for row in zip(ids, shown, strict=True)]
        forms = [{whole[i], texts[i]} for i in range(5)]
        for picture, text in list(zip(numbers, texts, strict=True))[5:]:
            assert text not in forms[picture]
            # Nor a piece of a caption that is this picture's as well.
            assert not all(forms[picture] & forms[i] for i in range(5) if texts[i] == text)
            drawn += 1
    assert drawn > 60


def test_keys_against_strings():
    whole, pruned = ["a b", "a b", "a", "c d"], ["a", "a b", "a", "c"]
    table = {text: number for number, text in enumerate(sorted({*whole, *pruned}))}
    captions = [torch.tensor([table[t] for t in texts]) for texts in (whole, pruned)]
    found = matching_positives(torch.tensor([0, 1, 2, 0]), captions)
    ids = [0, 1, 2, 0]
    expected = [
        [ids[i] == ids[j] or bool({whole[i], pruned[i]} & {whole[j], pruned[j]}) for j in range(4)] for i in range(4)
    ]
    assert found.tolist() == expected
    assert matching_positives(None, captions[:1]).tolist()[0] == [True, True, False, False]
    assert matching_positives(None, [torch.zeros(0, dtype=torch.long)]).shape == (0, 0)
