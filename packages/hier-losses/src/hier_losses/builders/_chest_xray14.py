"""ChestX-ray14: our own tree over the 14 findings of Wang et al. (2017, CVPR).

The data set has no hierarchy. This one sorts the findings first by the compartment of the chest, the usual order of a
systematic reading (Goodman, 2014, Felson's Principles of Chest Roentgenology), then the lung by pathology: opacities
that fill air spaces (consolidation, pneumonia, edema, and infiltration, an old word that the glossary of the
Fleischner Society advises against), volume loss (atelectasis), focal lesions (nodule up to 3 cm, mass above) and
diffuse remodelling (emphysema, fibrosis); definitions after Hansell et al. (2008, Radiology 246:697-722). CheXpert
(Irvin et al., 2019, AAAI) groups edema, consolidation, pneumonia, lesion and atelectasis as lung opacity likewise, and
puts cardiomegaly under the enlarged cardiomediastinum. All 14 findings are leaves, so closing labels upwards never
adds a finding that the annotators did not give.
"""

import csv
import os

import torch
from jaxtyping import Bool
from torch import Tensor

from hier_losses._tables import readable_csv
from hier_losses.builders._base import DatasetTree
from hier_losses.taxonomy import Taxonomy

_TREE = {
    "Lung": {
        "Lung opacity": {
            "Airspace opacity": ["Consolidation", "Pneumonia", "Edema", "Infiltration"],
            "Volume loss": ["Atelectasis"],
            "Focal lesion": ["Nodule", "Mass"],
        },
        "Diffuse remodelling": ["Emphysema", "Fibrosis"],
    },
    "Pleura": ["Effusion", "Pneumothorax", "Pleural_Thickening"],
    "Cardiomediastinum": ["Cardiomegaly"],
    "Diaphragm": ["Hernia"],
}

# The order in which Wang et al. (2017) list the findings, and in which classifiers of this data set number them.
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)


def chest_xray14() -> DatasetTree:
    """Return the tree over the findings.

    Returns:
        The tree; `multi_hot` of the result turns (B, 14) findings into targets over all nodes.

    >>> tree = chest_xray14()
    >>> tree.taxonomy.num_leaves, tree.taxonomy.path_of(tree.targets[9])
    (14, ('Lung', 'Lung opacity', 'Airspace opacity', 'Edema'))
    """
    tax = Taxonomy.from_json(_TREE)
    return DatasetTree(tax, tax.indices(FINDINGS), FINDINGS)


def read_findings(path: str | os.PathLike) -> tuple[list[str], Bool[Tensor, "images findings"]]:
    """Read the data set's label table.

    Args:
        path: `Data_Entry_2017.csv`, with the columns `Image Index` and `Finding Labels`, in which `|` separates the
            findings and `No Finding` means none.

    Returns:
        The image names and (B, 14) findings in the order of `FINDINGS`.

    Raises:
        ValueError: a missing column or an unknown finding.
    """
    column = {name: number for number, name in enumerate(FINDINGS)}
    images, rows = [], []
    with open(path, newline="", encoding="utf-8-sig") as file, readable_csv(str(path)):
        reader = csv.DictReader(file)
        missing = {"Image Index", "Finding Labels"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"the table has no column {sorted(missing)[0]!r}")
        for entry in reader:
            if None in (entry["Image Index"], entry["Finding Labels"]):
                raise ValueError(f"line {reader.line_num} of the table lacks a cell")
            row = [False] * len(FINDINGS)
            for name in entry["Finding Labels"].split("|"):
                if name == "No Finding":
                    continue
                if name not in column:
                    raise ValueError(f"image {entry['Image Index']!r} has the unknown finding {name!r}")
                row[column[name]] = True
            images.append(entry["Image Index"])
            rows.append(row)
    return images, torch.tensor(rows, dtype=torch.bool).reshape(-1, len(FINDINGS))
