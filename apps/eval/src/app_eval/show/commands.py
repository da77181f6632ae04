"""`hier page STORY SOURCE... PAGE.md`: write a results page from run folders, or from the JSON beside a page.

A story is a module of `app_eval.show.stories` with two functions: `collect` reads sources into {suffix: content of the JSON file
`PAGE<suffix>.json`}, `tell` turns that into a `Page`.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from app_data.store.atomic import write_json
from app_data.store.errors import DataError
from app_data.store.text import read_json as read_json_file
from app_eval.ask.settings import Page
from app_eval.show.page import write

# The content of a JSON file, or what to do about one that is missing or damaged.
read_json = partial(
    read_json_file,
    missing="finish the run first, or give the JSON beside a page",
    damaged="restore it, or make it again from the run",
)
STORIES = ("emoji", "lora", "tree", "mat", "blip", "icl")


def run(config: Page) -> int:
    """The command `hier page`."""
    if len(config.sources) < 2:
        raise DataError("give the sources of the page and, last, the Markdown file to write")
    *sources, page = config.sources
    write_page(config.story, [*sources, *filter(None, (config.model, config.distilled))], page)
    return 0


def write_page(story: str, sources: Sequence[Path], page: Path) -> None:
    """Write a page, its tables, its figure and its JSON.

    Args:
        story: one of `STORIES`.
        sources: run folders of its recipe, and JSON files of earlier pages; later ones replace what they share with earlier ones.
        page: the Markdown file.

    Raises:
        DataError: a source is missing, damaged, of another recipe or not finished.
    """
    module = import_module(f"app_eval.show.stories.{story}")
    named = ", ".join(map(str, sources))
    try:
        content = module.collect(sources)
        told = module.tell(content)
    except DataError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, StopIteration) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{named} does not hold what the page {story} shows ({reason}): give a finished run of its recipe, or its JSON"
        ) from error
    except OSError as error:
        raise DataError(f"{named} cannot be read: {error}") from error
    stored = {page.with_name(f"{page.stem}{suffix}.json"): part for suffix, part in content.items()}
    for path, part in stored.items():
        write_json(path, part)
    write(told, page, [path.name for path in stored])
