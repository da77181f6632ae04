import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from app_data.store.features import cached_features
from app_data.weights.towers import LITE0_WIDTHS, dinov2_visual, lite0_stages


def test_stages_end_in_the_pooled_features(model_assets):
    from app_data.weights.lite0_minilm import lite0

    vision = lite0(num_classes=0)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stages = lite0_stages(vision, pixels)
        assert stages.shape == (2, sum(LITE0_WIDTHS))
        torch.testing.assert_close(stages[:, -1280:], vision(pixels), atol=1e-5, rtol=1e-5)
        second = vision.blocks[1](vision.blocks[0](vision.bn1(vision.conv_stem(pixels)))).mean((2, 3))
        torch.testing.assert_close(stages[:, 16:40], second, atol=1e-5, rtol=1e-5)


def test_dinov2_in_the_form_of_open_clip():
    from mat_align import LayerTokens

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=20, layerscale_value=0.5
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pixels = torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        expected = model(pixels).pooler_output
        visual = dinov2_visual(model, 12)
        torch.testing.assert_close(visual(pixels), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(LayerTokens(visual, (0, 2))(pixels)[:, 1], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="multiple of 4"):
        dinov2_visual(model, 14)


def test_features_are_computed_once(tmp_path):
    calls, whole = [], torch.arange(10.0).view(2, 5).T

    def compute(start, end):
        calls.append((start, end))
        return whole[start:end]

    for _ in range(2):
        assert torch.equal(cached_features("a", compute, 5, tmp_path), whole)
    assert calls == [(0, 5)]
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"broken")
    cached_features("a", compute, 5, tmp_path)
    cached_features("b", compute, 5, tmp_path)
    assert len(calls) == 3


def test_a_stopped_computation_goes_on(tmp_path):
    calls, whole = [], torch.arange(10.0).view(2, 5).T

    def compute(start, end):
        calls.append((start, end))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole[start:end]

    with pytest.raises(KeyboardInterrupt):
        cached_features("a", compute, 5, tmp_path, piece=2)
    assert torch.equal(cached_features("a", compute, 5, tmp_path, piece=2), whole)
    assert calls == [(0, 2), (2, 4), (4, 5), (4, 5)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
