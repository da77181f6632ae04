"""Released data sets with a taxonomy, by name; the module is light, for `--help`.

`hier train folder --data NAME:PATH` reads one from the unpacked release at PATH.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from app_data.store.errors import DataError

if TYPE_CHECKING:
    from app_data.read.labelled import Decoding
    from app_data.read.pictures import PictureSet

__all__ = ["DATA", "DataSet", "load_named", "split_name"]


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        title: What it is, in a line.
        load: `module:function` in this package, from the folder of the release (and, where the release has no taxonomy, the
            file `hierarchy_file`) and `decoding` to parts.
    """

    title: str
    load: str


DATA: dict[str, DataSet] = {
    "cifar100": DataSet("CIFAR-100 under its 20 superclasses", "papers:load_cifar100_folders"),
    "cub": DataSet("CUB-200-2011 under a table of order, family, species (--taxonomy)", "papers:load_cub200"),
    "aircraft": DataSet("FGVC-Aircraft: manufacturer, family, variant", "papers:load_aircraft"),
    "butterfly": DataSet("Butterfly-200: family, subfamily, genus, species", "papers:load_butterfly200"),
    "inaturalist": DataSet("iNaturalist 2021: seven levels", "papers:load_inaturalist"),
}


def split_name(source: Path) -> tuple[str, Path]:
    """The name of a data set and the folder of `NAME:PATH`; ("", source) for a plain path.

    Raises:
        DataError: Something that looks like a name is none.
    """
    name, colon, path = str(source).partition(":")
    if not colon or source.exists() or "/" in name or len(name) < 2:  # C:/pictures is a path
        return "", source
    if name not in DATA or not path:
        raise DataError(f"the data {source} do not exist, and NAME:PATH takes the names {', '.join(DATA)}")
    return name, Path(path).expanduser()  # no shell expands a ~ after the colon


def load_named(name: str, root: Path, decoding: Decoding, taxonomy: Path | None = None) -> dict[str, PictureSet]:
    """Parts of a data set of `DATA`, as released.

    Raises:
        DataError: A missing file, or a taxonomy that is missing or not wanted.
    """
    module, _, function = DATA[name].load.partition(":")
    load = getattr(import_module(f"app_data.sets.{module}"), function)
    wants = "hierarchy_file" in signature(load).parameters
    if wants != (taxonomy is not None):
        raise DataError(f"--taxonomy is {'missing' if wants else 'not used'} for {name}: {DATA[name].title}")
    return load(root, *([taxonomy] if taxonomy is not None else []), decoding=decoding)
