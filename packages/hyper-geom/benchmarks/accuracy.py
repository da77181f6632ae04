"""Errors of distances and of their gradients by regime: this package, geoopt and the usual acosh form, against mpmath.

    python tools/bench.py packages/hyper-geom/benchmarks/accuracy.py [--json OUT.json] [--quick]
        [--write README.md] [--plot error.png] [--kernels]

Every method gets the same stored points: Lorentz space components in the input dtype; geoopt's Lorentz gets the time
component it computes itself, its ball the same points through a float64 conversion rounded to the input dtype. The
reference takes those stored values exactly, in 60 digits. r is k times the distance to the origin. A gap is the
distance of a pair at equal radius, "radial" pairs lie on one ray with radii r and r + 0.5.
"""

import math
import warnings
from pathlib import Path

import torch
from _acosh import acosh_dist
from bench import Bench, arguments, header
from mpmath import mp

from hyper_geom import build_cpu_kernels, convert, lorentz, poincare

MARKERS = "<!-- accuracy -->", "<!-- /accuracy -->"
DIM = 512


def unit(num: int, generator: torch.Generator) -> torch.Tensor:
    v = torch.randn(num, DIM, dtype=torch.float64, generator=generator)
    return v / v.norm(dim=-1, keepdim=True)


def pairs(
    kind: str, radius: float, c: float, num: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lorentz points in float64."""
    size = math.sinh(radius) / math.sqrt(c)
    x = size * unit(num, generator)
    if kind == "random":
        return x, size * unit(num, generator)
    if kind == "radial":
        return x, x * (math.sinh(radius + 0.5) / math.sinh(radius))
    v = unit(num, generator)
    v = v * (float(kind.removeprefix("gap ")) / math.sqrt(c)) / lorentz.norm(x, v, c=c)[:, None]
    return x, lorentz.exp_map(x, v, c=c)


def exact_lorentz(x: torch.Tensor, y: torch.Tensor, c: float) -> list:
    found = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        square_a, square_b, product = mp.fdot(a, a), mp.fdot(b, b), mp.fdot(a, b)
        cosh = mp.sqrt(1 + c * square_a) * mp.sqrt(1 + c * square_b) - c * product
        found.append(mp.acosh(cosh) / mp.sqrt(c))
    return found


def exact_ball(p: torch.Tensor, q: torch.Tensor, c: float) -> list:
    found = []
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        square_a, square_b, product = mp.fdot(a, a), mp.fdot(b, b), mp.fdot(a, b)
        cosh = 1 + 2 * c * (square_a + square_b - 2 * product) / ((1 - c * square_a) * (1 - c * square_b))
        found.append(mp.acosh(cosh) / mp.sqrt(c))
    return found


def worst(found: torch.Tensor, exact: list) -> float:
    """Largest relative error, nan if a value is not finite."""
    errors = [abs(mp.mpf(value) - want) / want for value, want in zip(found.double().tolist(), exact, strict=True)]
    return float(max(errors)) if found.isfinite().all() else math.nan


def peers() -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import geoopt

    def ambient(x, y, c):
        manifold = geoopt.Lorentz(k=1 / c)
        points = (torch.cat(((1 / c + (v * v).sum(-1, keepdim=True)).sqrt(), v), -1) for v in (x, y))
        return manifold.dist(*points)

    return {"geoopt Lorentz": ambient, "geoopt ball": lambda x, y, c: geoopt.PoincareBall(c=c).dist(x, y)}


def methods(names: list[str]) -> dict:
    """Each method as (function of x, y, c; whether it takes ball points)."""
    found = {
        "dist": (lambda x, y, c: lorentz.dist(x, y, c=c), False),
        "pairwise_dist": (lambda x, y, c: lorentz.pairwise_dist(x[:, None], y[:, None], c=c).flatten(), False),
        'pairwise_dist "high"': (
            lambda x, y, c: lorentz.pairwise_dist(x[:, None], y[:, None], c=c, precision="high").flatten(),
            False,
        ),
        "acosh form": (lambda x, y, c: acosh_dist(x[:, None], y[:, None], c).flatten(), False),
        "ball dist": (lambda x, y, c: poincare.dist(x, y, c=c), True),
    }
    for name, function in peers().items():
        found[name] = function, "ball" in name
    return {name: found[name] for name in names}


def measure(bench: Bench, quick: bool) -> list[dict]:
    num = 2 if quick else 16
    names = [
        "dist",
        "pairwise_dist",
        'pairwise_dist "high"',
        "acosh form",
        "geoopt Lorentz",
        "ball dist",
        "geoopt ball",
    ]
    radii = {"random": (0.01, 1, 3, 5, 8, 10), "gap 1e-3": (0.01, 1, 3, 5), "radial": (1, 3, 5, 8)}
    settings = [(torch.float32, kind, r, 1.0) for kind, values in radii.items() for r in values]
    settings += [(torch.float32, kind, 1.0, c) for kind in ("random", "gap 1e-3") for c in (0.1, 4.0)]
    settings += [(torch.bfloat16, "random", r, 1.0) for r in (0.1, 1, 3)] + [(torch.bfloat16, "gap 0.1", 1, 1.0)]
    table = []
    for dtype, kind, radius, c in settings[:: 8 if quick else 1]:
        generator = torch.Generator().manual_seed(0)
        points = pairs(kind, radius, c, num, generator)
        stored = [v.to(dtype) for v in points]
        balls = [convert.lorentz_to_poincare(v, c=c).to(dtype) for v in points]
        exact = {False: exact_lorentz(*stored, c), True: exact_ball(*balls, c)}
        row = {"dtype": str(dtype).removeprefix("torch."), "kind": kind, "radius": radius, "c": c, "errors": {}}
        for name, (function, on_ball) in methods(names).items():
            row["errors"][name] = worst(function(*(balls if on_ball else stored), c), exact[on_ball])
        table.append(row)
        setting = f"{row['dtype']}, {kind}, r={radius:g}, c={c:g}"
        for ours, theirs in (("dist", "acosh form"), ("dist", "geoopt Lorentz"), ("ball dist", "geoopt ball")):
            bench.add(f"{ours} against {theirs}", setting, row["errors"][ours], row["errors"][theirs], "rel.")
        bench.add(
            "pairwise_dist against acosh form",
            setting,
            row["errors"]["pairwise_dist"],
            row["errors"]["acosh form"],
            "rel.",
        )
    return table


def gradients(bench: Bench, quick: bool) -> list[dict]:
    """Largest Riemannian norm of the gradient for x in float32; the exact norm is 1 for every pair."""
    names = ["dist", "pairwise_dist", "acosh form", "geoopt Lorentz"]
    table = []
    for gap in ("1e-5", "1e-3", "1e-1"):
        for radius in (1,) if quick else (0.1, 1, 3, 5):
            points = pairs(f"gap {gap}", radius, 1.0, 4 if quick else 64, torch.Generator().manual_seed(0))
            row = {"dtype": "float32", "kind": f"gap {gap}", "radius": radius, "c": 1.0, "errors": {}}
            for name, (function, _) in methods(names).items():
                leaf = points[0].float().requires_grad_()
                (g,) = torch.autograd.grad(function(leaf, points[1].float(), 1.0).sum(), leaf)
                x, g = leaf.detach().double(), g.double()
                norm = ((g * g).sum(-1) + (x * g).sum(-1) ** 2).sqrt()
                row["errors"][name] = norm.max().item() if norm.isfinite().all() else math.nan
            table.append(row)
            for name in names[1:]:
                setting = f"float32, gap {gap}, r={radius:g}, c=1; exact 1"
                bench.add(
                    f"gradient norm, dist against {name}", setting, row["errors"]["dist"], row["errors"][name], "norm"
                )
    return table


def markdown(table: list[dict], digits: str) -> str:
    names = list(table[0]["errors"])
    titles = [f"`{name}`" if "dist" in name else name for name in names]
    lines = ["| input | pairs | r | c | " + " | ".join(titles) + " |", "|---" * (4 + len(names)) + "|"]
    for row in table:
        cells = [row["dtype"], row["kind"], f"{row['radius']:g}", f"{row['c']:g}"]
        for name in names:
            value = row["errors"][name]
            cells.append("not finite" if math.isnan(value) else format(value, digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: str, text: str) -> None:
    """Put the table between the markers of a file; a missing second marker is added."""
    file = Path(path)
    before, found, rest = file.read_text(encoding="utf-8").partition(MARKERS[0])
    if not found:
        raise SystemExit(f"{path} has no {MARKERS[0]}")
    inside, closed, after = rest.partition(MARKERS[1])
    file.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after if closed else inside}", encoding="utf-8")


def plot(path: str, quick: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    radii = [0.1 * 1.35**i for i in range(0, 16, 8 if quick else 1)]
    names = ["dist", "pairwise_dist", "acosh form", "geoopt Lorentz", "geoopt ball"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("random", "gap 1e-3"), strict=True):
        curves = {name: [] for name in names}
        for radius in radii:
            points = pairs(kind, radius, 1.0, 2 if quick else 8, torch.Generator().manual_seed(0))
            stored = [v.float() for v in points]
            balls = [convert.lorentz_to_poincare(v).float() for v in points]
            exact = {False: exact_lorentz(*stored, 1.0), True: exact_ball(*balls, 1.0)}
            for name, (function, on_ball) in methods(names).items():
                curves[name].append(worst(function(*(balls if on_ball else stored), 1.0), exact[on_ball]))
        for name, errors in curves.items():
            axis.loglog(radii, [max(error, 1e-8) for error in errors], marker=".", label=name)
        axis.set(title=f"float32, {kind} pairs, d={DIM}", xlabel="r = k * distance to the origin")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("largest relative error of the distance")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--write", metavar="FILE", help=f"put the table between {MARKERS[0]} and {MARKERS[1]}")
    parser.add_argument("--kernels", action="store_true", help="float32 through the compiled CPU kernels")
    parser.add_argument("--plot", metavar="FILE", help="error against radius, .png or .svg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mp.dps = 60
    if args.kernels and not build_cpu_kernels():
        raise SystemExit("no kernels: see the warning")
    bench = Bench(1)
    header()
    text = "\n\n".join(
        (
            f"Largest relative error of the distance, d = {DIM}:",
            markdown(measure(bench, args.quick), ".0e"),
            "Largest norm of the gradient, exact value 1:",
            markdown(gradients(bench, args.quick), ".3g"),
        )
    )
    print(text)
    if args.write:
        write(args.write, text)
    if args.plot:
        plot(args.plot, args.quick)
    bench.write(args.json)


if __name__ == "__main__":
    main()
