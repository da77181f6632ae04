"""Numbers of the Modality Alignment across Trees paper (arXiv 2510.27391), shown beside ours and marked as theirs.

LA / HCA / MTA in percent from the released README: ViT-B/16 CLIP, BioCLIP for Rare Species. `*`: the project page prints
21.58 there.
"""

DATA = ("CIFAR-100", "SUN", "ImageNet", "Rare Species")
# (shots, method, row): LA, HCA, MTA for each of `DATA`.
TARGETS: dict[tuple[int, str, str], tuple[tuple[float, float, float], ...]] = {
    (1, "MaPLe", "plain"): ((68.75, 4.65, 50.60), (63.98, 25.15, 50.31), (68.91, 2.97, 48.16), (41.55, 5.09, 44.75)),
    (1, "MaPLe", "+ProTeCt"): (
        (69.33, 48.10, 83.36), (64.29, 50.45, 76.73), (66.16, 20.44, 85.18), (39.92, 13.22, 70.04),
    ),
    (1, "MaPLe", "+MAT"): ((71.37, 53.19, 85.29), (67.57, 57.92, 80.55), (66.33, 25.56, 85.98), (46.77, 20.94, 76.83)),
    (1, "PromptSRC", "plain"): (
        (72.48, 14.36, 51.91), (70.58, 42.14, 57.19), (68.82, 4.46, 54.10), (45.39, 6.72, 44.72),
    ),
    (1, "PromptSRC", "+ProTeCt"): (
        (73.07, 49.54, 85.16), (70.61, 55.52, 78.73), (68.43, 20.36, 85.63), (44.56, 20.36, 74.42),
    ),
    (1, "PromptSRC", "+MAT"): (
        (73.54, 51.91, 85.76), (70.64, 57.79, 79.94), (68.86, 25.13, 86.45), (46.98, 23.03, 77.32),
    ),
    (16, "MaPLe", "plain"): (
        (75.01, 17.54, 52.21), (71.86, 33.25, 54.29), (70.70, 4.15, 48.16), (50.94, 5.30, 40.41),
    ),
    (16, "MaPLe", "+ProTeCt"): (
        (75.34, 61.15, 88.04), (72.17, 59.71, 82.27), (69.52, 31.24, 87.87), (48.14, 24.82, 78.79),
    ),
    (16, "MaPLe", "+MAT"): (
        (77.92, 69.38, 90.89), (75.47, 68.67, 86.02), (71.41, 43.79, 88.78), (69.96, 53.65, 87.27),
    ),
    (16, "PromptSRC", "plain"): (
        (77.71, 15.07, 56.86), (75.75, 45.23, 59.42), (71.50, 2.48, 46.71), (59.20, 11.64, 55.82),
    ),
    (16, "PromptSRC", "+ProTeCt"): (
        (78.76, 66.74, 90.79), (75.54, 66.01, 84.75), (70.98, 32.89, 88.31), (56.40, 33.92, 82.47),
    ),
    (16, "PromptSRC", "+MAT"): (
        (78.90, 68.47, 91.12), (76.54, 69.18, 86.20), (71.67, 42.26, 89.64), (67.38, 50.77, 87.60),
    ),
}  # fmt: skip
MAJORITY_MTA = (48.6, 30.2, 67.7, 40.0)
# HCA of 16-shot MaPLe on CIFAR-100, SUN and Rare Species.
ABLATION = {
    "EUCLIDEAN": (68.01, 66.81, 51.81),
    "SHARED": (69.05, 68.26, 52.85),
    "SEPARATE": (69.33, 68.65, 52.73),
    "HETEROGENEOUS": (69.38, 68.67, 53.65),
}


def published_tables() -> str:
    """The section with the published numbers."""
    lines = [
        "## Published numbers (the paper's, not ours)",
        "LA / HCA / MTA in percent with CLIP ViT-B/16 (BioCLIP for Rare Species), from the released README of arXiv 2510.27391; no "
        "standard deviations are published. They are other models on other test sets: compare nothing across.",
        "| shots | method | " + " | ".join(DATA) + " |",
        "|---|---|" + "---|" * len(DATA),
    ]
    table = [
        f"| {shots} | {method} {row} | " + " | ".join("/".join(f"{x:.2f}" for x in cell) for cell in cells) + " |"
        for (shots, method, row), cells in TARGETS.items()
    ]
    table.append("| | majority MTA | " + " | ".join(f"{x:.1f}" for x in MAJORITY_MTA) + " |")
    lines[2:] = ["\n".join([*lines[2:], *table])]
    ablation = ["| 16-shot MaPLe, HCA | CIFAR-100 | SUN | Rare Species |", "|---|---|---|---|"]
    ablation += [f"| {name} | " + " | ".join(f"{x:.2f}" for x in values) + " |" for name, values in ABLATION.items()]
    return "\n\n".join([*lines, "\n".join(ablation)])
