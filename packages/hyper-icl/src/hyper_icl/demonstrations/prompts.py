"""Prompts of demonstrations, and the cuts that turn generated text into an answer.

References: Awadalla et al., "OpenFlamingo", 2023, whose templates, zero-shot rule (two demonstrations without their
pictures) and cuts are reproduced as facts; Alayrac et al., "Flamingo", NeurIPS 2022.
"""

import re
from collections.abc import Mapping, Sequence

from hyper_icl._checks import check_choice

TASKS = ("vqa", "caption")
_END = "<|endofchunk|>"


def format_prompt(
    task: str, demos: Sequence[Mapping[str, str]], query: Mapping[str, str], zero_shot: bool = False
) -> str:
    """One interleaved prompt; `<image>` stands where each picture goes.

    Args:
        task: "vqa" (items hold "question" and "answer") or "caption" (items hold "caption").
        demos: demonstrations in prompt order; of several answers give the first.
        query: the query; its answer or caption is not used.
        zero_shot: drop the demonstrations' pictures, OpenFlamingo's zero-shot prompt (with two demonstrations).

    Returns:
        The prompt, which ends where the model is to go on.

    Raises:
        ValueError: the task is unknown, or an item lacks a field.

    >>> format_prompt("vqa", [{"question": "Color?", "answer": "red"}], {"question": "Shape?"})
    '<image>Question:Color? Short answer:red<|endofchunk|>\\n<image>Question:Shape? Short answer:'
    >>> format_prompt("caption", [{"caption": "A dog."}], {})
    '<image>Output:A dog.<|endofchunk|><image>Output:'
    """
    check_choice("task", task, TASKS)
    picture = "" if zero_shot else "<image>"
    if task == "vqa":
        shown = [f"{picture}Question:{_get(d, 'question')} Short answer:{_get(d, 'answer')}{_END}\n" for d in demos]
        return "".join(shown) + f"<image>Question:{_get(query, 'question')} Short answer:"
    return "".join(f"{picture}Output:{_get(d, 'caption')}{_END}" for d in demos) + "<image>Output:"


def _get(item: Mapping[str, str], field: str) -> str:
    if field not in item:
        raise ValueError(f"every item must have the field {field!r}, got {sorted(item)}")
    return item[field]


def postprocess_vqa(text: str) -> str:
    """The answer in generated text: up to "Question", "Answer" or "Short", then up to the first ", ".

    >>> postprocess_vqa(" yes, it is\\nQuestion: foo")
    ' yes'
    """
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0]


def postprocess_caption(text: str) -> str:
    """The caption in generated text: up to "Output", without double quotes.

    >>> postprocess_caption('a "red" bus Output: a')
    'a red bus '
    """
    return re.split("Output", text, maxsplit=1)[0].replace('"', "")


def insert_demos(messages: Sequence[Mapping], demos: Sequence[tuple[object, object]]) -> list[dict]:
    """Put demonstrations into a chat as turns of user and assistant before the last user message.

    Args:
        messages: a chat of mappings with "role" and "content"; system messages stay first.
        demos: (user content, assistant content) of each demonstration, in prompt order; a string or a list of parts.

    Returns:
        A new list; the messages are not changed.

    Raises:
        ValueError: there is no user message, or a role is missing.

    >>> chat = [{"role": "user", "content": "Shape?"}]
    >>> [m["role"] for m in insert_demos(chat, [("Color?", "red")])]
    ['user', 'assistant', 'user']
    """
    roles = [message.get("role") for message in messages]
    if "user" not in roles:
        raise ValueError(f"messages must hold a user message, got roles {roles}")
    last = len(roles) - 1 - roles[::-1].index("user")
    turns = []
    for asked, answered in demos:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    copied = [dict(message) for message in messages]
    return copied[:last] + turns + copied[last:]
