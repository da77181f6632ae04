"""What may spoil a result, before anything is trained: copies, classes without pictures, names, odd files."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from app_data.read.folder import Found
from app_data.read.labelled import PARTS, LabelledFile
from app_data.read.names import look_alikes
from app_data.read.pictures import FORMATS, load_picture
from app_data.store.digests import content_digests
from app_data.store.errors import Skipped, UnreadablePicture
from hier_losses import Taxonomy

_SHOWN = 5  # entries of a list on the page; the JSON has all
_HASHED = hashlib.sha256(b"").hexdigest()[:16]  # of an empty file, which is no copy of another one


@dataclass
class Report:
    """What was found, what deserves a look, and what stops; `str` gives a page.

    Attributes:
        split: Where the parts come from.
        parts: Pictures of each part.
        classes: Pictures of each class by part.
        lacking: Classes without pictures, by part; those without any are under "all".
        lone_children: Nodes without siblings below a node of their own.
        look_alikes: Names that differ in case, accents or blanks only.
        copies: Files of one content, with class and part each.
        left_out: Files that cannot be read, or are no pictures.
        depths: Files of more than 8 bits a channel, by mode.
        modes: Files by colour mode.
        sizes: Smallest, median and largest (width, height).
        dead_links: Links to nothing.
        notes: What was understood.
        warnings: What deserves a look.
        stops: What would spoil a result.
    """

    split: str = ""
    parts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    lone_children: list[str] = field(default_factory=list)
    look_alikes: list[tuple[str, ...]] = field(default_factory=list)
    copies: list[list[str]] = field(default_factory=list)
    left_out: list[Skipped] = field(default_factory=list)
    depths: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    dead_links: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The content for a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one page."""
        lines = list(self.notes)
        if self.parts:
            lines.append(f"split: {self.split}; {', '.join(f'{part} {count}' for part, count in self.parts.items())}")
            columns = [*self.parts, ""]
            lines.append("".join(f"{name:>8}" for name in columns) + "class")
            for name, counts in self.classes.items():
                lines.append("".join(f"{counts.get(part, 0):>8}" for part in self.parts) + f"        {name}")
        if self.modes:
            lines.append(f"colour modes: {', '.join(f'{mode} {count}' for mode, count in self.modes.items())}")
            lines.append("sizes: " + ", ".join(f"{w} x {h}" for w, h in self.sizes) + " (smallest, median, largest)")
        if self.left_out:
            lines += ["left out:", *(f"  {entry.path}: {entry.reason}" for entry in self.left_out)]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"STOP: {text}" for text in self.stops]
        lines.append("nothing would spoil a result" if not self.stops else f"{len(self.stops)} to mend before training")
        return "\n".join(lines)


def check_taxonomy(tree: Taxonomy, notes: Sequence[str] = ()) -> Report:
    """Lone children and look-alikes of a tree."""
    parents = tree.parent.tolist()
    sizes = Counter(parents)
    lone = ["/".join(tree.path_of(node)) for node, up in enumerate(parents) if up >= 0 and sizes[up] == 1]
    twins = look_alikes(tree.names)
    report = Report(lone_children=lone, look_alikes=twins, notes=list(notes))
    shape = " > ".join(str(size) for size in tree.level_sizes)
    report.notes.append(f"the taxonomy has {tree.num_leaves} classes, {shape} nodes from the top to the last level")
    if lone:
        report.warnings.append(f"lone children, whose level says nothing: {_some(lone)}")
    if twins:
        report.warnings.append(f"names that look alike stay different: {_some(' and '.join(group) for group in twins)}")
    return report


def examine(
    found: Found,
    *,
    cache_dir: str | os.PathLike | None = None,
    whole: bool = False,
    max_bad_fraction: float = 0.01,
    max_bad_files: int = 10,
) -> Report:
    """Look at the files of a data set.

    Args:
        found: From `find_pictures`.
        cache_dir: Where hashes are kept; the user's cache folder if None.
        whole: Also decode every file, as training does anyway; else only its first bytes are read.
        max_bad_fraction: Budget of unreadable files: the larger of this share and `max_bad_files`.
        max_bad_files: See `max_bad_fraction`.
    """
    report = check_taxonomy(found.tree, found.notes)
    report.split, report.stops = found.split, [*found.problems]
    report.warnings += found.warnings
    report.parts = {p: n for p in ("", *PARTS) if (n := sum(file.part == p for file in found.files))}
    if "" in report.parts:
        report.parts = {"all": report.parts.pop("")}
    _count_classes(report, found)
    looks = _look(found.files, whole)
    bad = [Skipped(file.name, look) for file, look in zip(found.files, looks, strict=True) if isinstance(look, str)]
    report.left_out = [*bad, *found.left_out]
    budget = max(max_bad_files, int(max_bad_fraction * len(found.files)))
    if len(bad) > budget:
        report.stops.append(f"{len(bad)} of {len(found.files)} files cannot be read, more than {budget}")
    report.dead_links = [f.name for f in found.files if f.path.is_symlink() and not f.path.exists()]
    if report.dead_links:
        report.warnings.append(f"dead links: {_some(report.dead_links)}")
    good = [look for look in looks if not isinstance(look, str)]
    report.modes = dict(Counter(mode for mode, _ in good).most_common())
    report.depths = {mode: n for mode, n in report.modes.items() if mode.startswith(("I", "F"))}
    if report.depths:
        report.warnings.append(
            f"grey of more than 8 bits ({', '.join(f'{mode} {n}' for mode, n in report.depths.items())}) is scaled by the "
            "smallest of 8, 12 and 16 bits, or of 0 to 1 for floats, that holds it"
        )
    by_area = sorted((size for _, size in good), key=lambda size: size[0] * size[1])
    report.sizes = [by_area[0], by_area[len(by_area) // 2], by_area[-1]] if by_area else []
    _find_copies(report, found, content_digests([file.path for file in found.files], cache_dir))
    return report


def _count_classes(report: Report, found: Found) -> None:
    counts: dict[int, Counter] = {node: Counter() for node in found.tree.leaf.tolist()}
    for file, node in zip(found.files, found.targets.tolist(), strict=True):
        if node >= 0:
            counts.setdefault(node, Counter())[file.part or "all"] += 1
    paths = {node: "/".join(found.tree.path_of(node)) for node in counts}
    report.classes = {paths[node]: dict(counts[node]) for node in sorted(counts, key=paths.__getitem__)}
    for part in report.parts:
        lacking = [paths[node] for node, count in counts.items() if not count[part] and count.total()]
        if lacking:
            report.lacking[part] = lacking
    if empty := [paths[node] for node, count in counts.items() if not count.total()]:
        report.lacking["all"] = empty
        report.warnings.append(f"classes without any picture stay candidates: {_some(empty)}")
    if "train" in report.lacking:
        report.warnings.append(
            f"classes that training lacks stay candidates, their pictures are scored apart: {_some(report.lacking['train'])}"
        )
    for part in report.lacking.keys() - {"train", "all"}:
        report.warnings.append(f"classes without pictures in {part}: {_some(report.lacking[part])}")


def _look(files: Sequence[LabelledFile], whole: bool) -> list[tuple[str, tuple[int, int]] | str]:
    """Colour mode and size of every file, or why it cannot be read."""

    def look(file: LabelledFile) -> tuple[str, tuple[int, int]] | str:
        try:
            if whole:
                load_picture(file.path, 32)
            with Image.open(file.path, formats=FORMATS) as opened:
                return opened.mode, opened.size
        except UnreadablePicture as error:
            return str(error)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError):
            try:
                load_picture(file.path, 32)  # says why
            except UnreadablePicture as error:
                return str(error)
            return "it cannot be read"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(look, files))


def _find_copies(report: Report, found: Found, digests: Sequence[str]) -> None:
    groups: Mapping[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests):
        if digest not in ("", _HASHED):
            groups[digest].append(row)
    across_parts, across_classes, within = [], [], 0
    for rows in groups.values():
        if len(rows) == 1:
            continue
        names = [found.files[row].name for row in rows]
        report.copies.append(names)
        parts, classes = {found.files[row].part for row in rows}, np.unique(found.targets[rows])
        across_parts += [" = ".join(names)] * (len(parts) > 1)
        across_classes += [" = ".join(names)] * (len(classes) > 1)
        within += len(parts) == 1 and len(classes) == 1
    if across_parts:
        report.stops.append(f"copies of one picture in several parts: {_some(across_parts)}; keep each in one part")
    if across_classes:
        report.warnings.append(f"copies of one picture in several classes: {_some(across_classes)}")
    if within:
        report.warnings.append(f"{within} pictures have copies in their own class and part")


def _some(entries) -> str:
    entries = list(entries)
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more
