"""Shows the doctests at the end of docstrings as examples; plain Markdown would take their brackets for links."""

import griffe


class Doctests(griffe.Extension):
    """Gives every docstring that ends in a doctest a section for it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Move the lines from the first prompt on into the section."""
        if obj.docstring is None:
            return
        lines = obj.docstring.value.split("\n")
        first = next((at for at, line in enumerate(lines) if line.startswith(">>>")), None)
        if first is not None:
            inner = [f"    {line}".rstrip() for line in lines[first:]]
            obj.docstring.value = "\n".join([*lines[:first], "Examples:", *inner])
