"""Entailment terms along paths."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.nn import functional as F

from hyper_geom import lorentz
from mat_align import PathFeatures, entailment_terms, fraction_met

CURVATURES = (0.05, 0.3, 0.11)


def problem(B=4, H=3, d=6, unit=True, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    img, txt = (torch.randn(B, H, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    if unit:
        img, txt = F.normalize(img, dim=-1), F.normalize(txt, dim=-1)
    return img, txt, torch.tensor([3, 1, 2, 3][:B])


def by_loop(img, txt, length, c_img, c_txt, c_mid, scale_img=1.0, scale_txt=1.0, min_radius=0.1):
    def excess(parent, child, c):
        omega = math.asin(min(1.0, 2 * min_radius / (math.sqrt(c) * parent.norm().item())))
        return max(0.0, lorentz.exterior_angle(parent, child, c=c).item() - omega)

    found = [[], [], []]
    for b, stop in enumerate(length.tolist()):
        for i in range(stop):
            v, t = scale_img * img[b], scale_txt * txt[b]
            if i + 1 < stop:
                found[0].append(excess(*(lorentz.exp_map0(v[j], c=c_img) for j in (i, i + 1)), c_img))
                found[1].append(excess(*(lorentz.exp_map0(t[j], c=c_txt) for j in (i, i + 1)), c_txt))
            found[2].append(excess(lorentz.exp_map0(t[i], c=c_mid), lorentz.exp_map0(v[i], c=c_mid), c_mid))
    return [sum(x) / len(x) if x else 0.0 for x in found]


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (10.0, 3.0)])
def test_against_a_loop(unit, scales):
    img, txt, length = problem(unit=unit)
    got = entailment_terms(img, txt, length, *CURVATURES, *scales, min_radius=0.05)
    expected = by_loop(img, txt, length, *CURVATURES, *scales, min_radius=0.05)
    for value, reference in zip(got, expected, strict=True):
        assert value.item() == pytest.approx(reference, abs=1e-12)
    low = entailment_terms(img.float(), txt.float(), length, *CURVATURES, *scales, min_radius=0.05)
    assert [x.item() for x in low] == pytest.approx(expected, abs=2e-6)
    half = entailment_terms(img.bfloat16(), txt.bfloat16(), length, *CURVATURES, *scales, min_radius=0.05)
    assert [x.item() for x in half] == pytest.approx(expected, abs=3e-2)


@pytest.mark.parametrize(
    ("c", "scale", "cosine", "phi", "omega"),
    [
        (0.05, 1, 0.9, 1.801774, 1.090844),
        (0.5, 1, 0.3, 2.317265, 0.263621),
        (0.5, 10, 0.99, 3.117635, 0.000340),
        (0.025, 1, 0.9, 1.799038, math.pi / 2),
    ],
)
def test_goldens_on_unit_features(c, scale, cosine, phi, omega):
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
    points = [lorentz.exp_map0(scale * x, c=c) for x in (a, b)]
    assert lorentz.exterior_angle(*points, c=c).item() == pytest.approx(phi, abs=1e-5)
    assert lorentz.half_aperture(points[0], c=c).item() == pytest.approx(omega, abs=1e-5)
    theta = math.acos(cosine)
    exact = math.pi - math.atan(1 / (math.tan(theta / 2) * math.cosh(math.sqrt(c) * scale)))
    assert phi == pytest.approx(exact, abs=1e-5)
    path = torch.stack((a, b))[None]
    visual, textual, cross = entailment_terms(
        path, path.flip(1), torch.tensor([2]), c, c, c, float(scale), float(scale)
    )
    assert visual.item() == pytest.approx(phi - omega, abs=2e-5)
    assert textual.item() == pytest.approx(phi - omega, abs=2e-5)
    assert cross.item() == pytest.approx(phi - omega, abs=2e-5)


def test_half_aperture_saturates_on_unit_features():
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for c, saturated in ((0.039477, True), (0.039480, False)):
        omega = lorentz.half_aperture(lorentz.exp_map0(x, c=c), c=c).item()
        assert (omega == math.pi / 2) is saturated


def test_unit_features_of_one_scale_never_meet_the_cone():
    img, txt, length = problem(B=4, H=3)
    shares = fraction_met(PathFeatures(img, txt, 1.0, 1.0), length, *CURVATURES)
    assert shares == (0.0, 0.0, 0.0)
    chain = torch.stack([torch.eye(6, dtype=torch.float64)[0] * r for r in (0.5, 2.0, 4.0)])[None]
    features = PathFeatures(chain, chain / 2, 1.0, 1.0)
    assert fraction_met(features, torch.tensor([3]), 1.0, 1.0, 1.0) == (1.0, 1.0, 1.0)
    assert all(math.isnan(x) for x in fraction_met(features, torch.tensor([0]), 1.0, 1.0, 1.0))


def test_padding_changes_nothing():
    img, txt, length = problem()
    expected = entailment_terms(img, txt, length, *CURVATURES)
    junk = torch.full((4, 2, 6), 7.0, dtype=torch.float64)
    padded = entailment_terms(torch.cat((img, junk), 1), torch.cat((txt, -junk), 1), length, *CURVATURES)
    torch.testing.assert_close(padded, expected)
    img.requires_grad_()
    bad = torch.cat((img, torch.full((4, 1, 6), math.nan, dtype=torch.float64)), 1)
    sum(entailment_terms(bad, bad, length, *CURVATURES)).backward()
    assert img.grad.isfinite().all()


def test_released_padding():
    img, txt, _ = problem()
    full = torch.full((4,), 3)
    torch.testing.assert_close(
        entailment_terms(img, txt, full, *CURVATURES, padding="released"), entailment_terms(img, txt, full, *CURVATURES)
    )
    one = torch.ones(4, dtype=torch.int64)
    visual, _, cross = entailment_terms(img, txt, one, *CURVATURES, padding="released")
    omega = lorentz.half_aperture(lorentz.exp_map0(img[0, 0], c=0.05), c=0.05).item()
    assert visual.item() == pytest.approx((math.pi - omega) / 2)  # leaf -> padding, then padding -> padding
    alone = entailment_terms(img, txt, one, *CURVATURES)[2]
    assert cross.item() == pytest.approx(alone.item() / 3)


def test_gradients():
    img, txt, length = problem(B=2, H=2, d=3, unit=False)
    length = torch.tensor([2, 1])
    c = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.3, 0.4)]
    scales = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.9, 1.1)]
    img.requires_grad_()
    txt.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, *rest: entailment_terms(a, b, length, *rest), (img, txt, *c, *scales))


def test_nothing_to_compare_is_zero():
    img, txt, _ = problem()
    img.requires_grad_()
    for length, H in ((torch.zeros(4, dtype=torch.int64), 3), (torch.ones(4, dtype=torch.int64), 1)):
        terms = entailment_terms(img[:, :H], txt[:, :H], length, *CURVATURES)
        assert terms[0].item() == terms[1].item() == 0
    sum(terms).backward()
    assert img.grad.isfinite().all()
    empty = entailment_terms(img[:0], txt[:0], torch.zeros(0, dtype=torch.int64), *CURVATURES)
    assert [x.item() for x in empty] == [0, 0, 0]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_numbers_refused(bad):
    img, txt, length = problem()
    for name in ("c_img", "c_txt", "c_mid", "scale_img", "scale_txt", "min_radius"):
        values = dict.fromkeys(("c_img", "c_txt", "c_mid"), 1.0) | {name: bad}
        with pytest.raises(ValueError, match=f"^{name} must be finite and > 0"):
            entailment_terms(img, txt, length, **values)


def test_shapes_refused():
    img, txt, length = problem()
    for call, name in (
        (lambda: entailment_terms(img[:, :0], txt[:, :0], length, *CURVATURES), "H >= 1"),
        (lambda: entailment_terms(img, txt[..., :5], length, *CURVATURES), "share a shape"),
        (lambda: entailment_terms(img, txt, length + 1, *CURVATURES), "length"),
        (lambda: entailment_terms(img, txt, length[:3], *CURVATURES), "length"),
        (lambda: entailment_terms(img, txt, length, *CURVATURES, padding="x"), "padding"),
    ):
        # Under the shape-checking hook the annotations speak first.
        with pytest.raises((ValueError, TypeCheckError), match=f"{name}|txt"):
            call()


@pytest.mark.compile
def test_compiles():
    img, txt, length = problem(dtype=torch.float32)
    c = [torch.tensor(x) for x in CURVATURES]
    compiled = torch.compile(entailment_terms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(img, txt, length, *c), entailment_terms(img, txt, length, *c))
