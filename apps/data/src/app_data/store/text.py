"""Text and JSON files of others: what they hold, or one sentence that names the file."""

import json
from pathlib import Path
from typing import Any

from app_data.store.errors import DataError

RELEASE = "give a file of the release"


def read_text(path: str | Path, missing: str = RELEASE) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Args:
        path: The file.
        missing: What to do if there is none.

    Raises:
        DataError: It is missing, cannot be read or is no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"the file {path} does not exist: {missing}") from error
    except OSError as error:
        raise DataError(f"the file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the file {path} is not UTF-8 text: save it as UTF-8") from error


def read_json(path: str | Path, missing: str = RELEASE, damaged: str = "fetch it again") -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        missing: What to do if there is none.
        damaged: What to do if it is no JSON.

    Raises:
        DataError: It is missing, cannot be read, or is no JSON.
    """
    return parse_json(read_text(path, missing), f"the file {path}", damaged)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; empty lines are passed over.

    Raises:
        DataError: The file is missing, a line is no JSON object, or there is none.
    """
    rows = []
    for number, line in enumerate(read_text(path, "give a file of JSON lines").splitlines(), 1):
        if line.strip():
            row = parse_json(line, f"line {number} of {path}", "mend it")
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {path} must be a JSON object, got {line[:40]!r}")
            rows.append(row)
    if not rows:
        raise DataError(f"the file {path} holds no item")
    return rows


def parse_json(text: str, where: str, damaged: str = "fetch it again") -> Any:
    """The content of JSON.

    Args:
        text: The JSON.
        where: Names it, in errors.
        damaged: What to do if it is none.

    Raises:
        DataError: It is no JSON, nested deeper than Python's reader goes, or holds half of a surrogate pair, which is no text.
    """
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds {error.object[error.start : error.end]!r}, half of a character: {damaged}"
        ) from error
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}): {damaged}") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deep for JSON: {damaged}") from error
    return content
