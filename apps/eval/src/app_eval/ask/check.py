"""`hier check DIR [--taxonomy FILE] [--listing FILE...]`: what would spoil a result, on one page or as JSON."""

import json
import sys

from app_data.read.check import check_taxonomy, examine
from app_data.read.folder import find_pictures
from app_data.read.pictures import allow_megapixels
from app_data.read.tables import read_taxonomy
from app_data.read.wordnet import PREFIX, find_wordnet, suggest_tree
from app_data.store.errors import DataError
from app_eval.ask.settings import Check


def run(config: Check) -> int:
    """Print the page; the exit status is 1 if something would spoil a result."""
    allow_megapixels(config.max_megapixels)
    if str(config.taxonomy).startswith(PREFIX):
        return _suggest(config)
    if config.data is None:
        if config.taxonomy is None:
            raise DataError("there is nothing to check: give a folder of pictures, --taxonomy, or both")
        classes = read_taxonomy(config.taxonomy)
        report = check_taxonomy(classes.taxonomy, classes.notes)
    else:
        found = find_pictures(
            config.data,
            config.taxonomy,
            listing=config.listing,
            listing_columns=config.listing_columns,
            outside=config.outside,
        )
        report = examine(
            found, cache_dir=config.cache_dir, whole=not config.quick, max_bad_fraction=config.max_bad_fraction
        )
    print(json.dumps(report.as_json(), indent=1) if config.json else report)  # noqa: T201
    return 1 if report.stops else 0


def _suggest(config: Check) -> int:
    """Print a tree over the classes, ready for a file, and on standard error what each name was taken for."""
    if config.data is None:
        raise DataError(f"--taxonomy {config.taxonomy} suggests a tree over the classes of a folder: name the folder")
    found = find_pictures(
        config.data, listing=config.listing, listing_columns=config.listing_columns, outside=config.outside
    )
    folder = find_wordnet(str(config.taxonomy).removeprefix(PREFIX))
    tree = suggest_tree([found.tree.names[node] for node in found.tree.leaf.tolist()], folder)
    print(tree.lines(), end="")  # noqa: T201
    for name, (gloss, others) in tree.senses.items():
        print(f"{name}: {gloss}" + (f" ({others} other senses)" if others else ""), file=sys.stderr)  # noqa: T201
    if tree.unknown:
        print(f"not in WordNet, left at the top: {', '.join(tree.unknown)}", file=sys.stderr)  # noqa: T201
    print("read it, correct it, and give it as --taxonomy FILE", file=sys.stderr)  # noqa: T201
    return 0
