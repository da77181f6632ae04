"""Puts chosen demonstrations into the messages of an evaluation harness, whose own few-shot option serves text only.

A task of lmms-eval names a function `doc_to_messages(doc, lmms_eval_specific_kwargs)` that returns chat messages with one
user turn. `with_demos` wraps such a function; the result is used in its place. `docs/hyper-icl/lmms_eval` is a whole task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyper_icl import insert_demos

Messages = list[dict[str, Any]]


def with_demos(
    doc_to_messages: Callable[..., Messages],
    choose: Callable[[Mapping[str, Any]], Sequence[Any]],
    demo: Callable[[Any], tuple[Any, Any]],
) -> Callable[..., Messages]:
    """A `doc_to_messages` that shows demonstrations before the question.

    Args:
        doc_to_messages: The task's own function; its further arguments are passed on.
        choose: From a document to its demonstrations, or their numbers, in prompt order. It must leave out the document's own
            picture (`search(exclude=...)`).
        demo: From a demonstration, or its number, to the contents of the user's and the assistant's message, as `IclTask.demo` gives them.

    Returns:
        The wrapped function.

    >>> task = with_demos(lambda doc: [{"role": "user", "content": doc["q"]}], lambda doc: [0], lambda i: ("2+2?", "4"))
    >>> [message["content"] for message in task({"q": "3+3?"})]
    ['2+2?', '4', '3+3?']
    """

    def wrapped(doc: Mapping[str, Any], *args: Any, **kwargs: Any) -> Messages:
        return insert_demos(doc_to_messages(doc, *args, **kwargs), [demo(index) for index in choose(doc)])

    return wrapped
