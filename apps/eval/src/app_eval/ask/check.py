"""`hier check DIR [--taxonomy FILE] [--listing FILE...]`: what would spoil a result, on one page or as JSON."""

import json

from app_data.read.check import check_taxonomy, examine
from app_data.read.folder import find_pictures
from app_data.read.tables import read_taxonomy
from app_data.store.errors import DataError
from app_eval.ask.settings import Check


def run(config: Check) -> int:
    """Print the page; the exit status is 1 if something would spoil a result."""
    if config.data is None:
        if config.taxonomy is None:
            raise DataError("there is nothing to check: give a folder of pictures, --taxonomy, or both")
        classes = read_taxonomy(config.taxonomy)
        report = check_taxonomy(classes.taxonomy, classes.notes)
    else:
        found = find_pictures(
            config.data, config.taxonomy, listing=config.listing, listing_columns=config.listing_columns
        )
        report = examine(
            found, cache_dir=config.cache_dir, whole=not config.quick, max_bad_fraction=config.max_bad_fraction
        )
    print(json.dumps(report.as_json(), indent=1) if config.json else report)  # noqa: T201
    return 1 if report.stops else 0
