import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from app_data.mat_towers import LITE0_WIDTHS, cached_features, dinov2_visual, lite0_stages


def test_stages_end_in_the_pooled_features(model_assets):
    from app_data.pip_models import lite0

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
    calls = []

    def compute():
        calls.append(1)
        return torch.arange(6.0).view(2, 3).T

    for _ in range(2):
        assert torch.equal(cached_features("a", compute, tmp_path), torch.arange(6.0).view(2, 3).T)
    assert len(calls) == 1
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"broken")
    cached_features("a", compute, tmp_path)
    cached_features("b", compute, tmp_path)
    assert len(calls) == 3
