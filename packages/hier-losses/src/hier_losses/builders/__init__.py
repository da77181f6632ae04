"""Taxonomies of published data sets, built from the files that come with them; nothing is downloaded or unpickled."""

from hier_losses.builders._aircraft import aircraft
from hier_losses.builders._base import DatasetTree
from hier_losses.builders._butterfly200 import butterfly200
from hier_losses.builders._chest_xray14 import FINDINGS, chest_xray14, read_findings
from hier_losses.builders._cifar100 import cifar100
from hier_losses.builders._cub200 import cub200
from hier_losses.builders._inaturalist import inaturalist
from hier_losses.builders._wordnet import find_offsets, imagenet

__all__ = [
    "FINDINGS",
    "DatasetTree",
    "aircraft",
    "butterfly200",
    "chest_xray14",
    "cifar100",
    "cub200",
    "find_offsets",
    "imagenet",
    "inaturalist",
    "read_findings",
]
