"""HTML that is put together of elements; a text becomes part of it only escaped."""

from __future__ import annotations

import html

from ..util.text import printable

VOID = {"meta", "br", "hr"}
"""Elements that have no content."""


class Html(str):
    """A text that is HTML already."""


def element(tag: str, *content: str, **attributes: str | bool | None) -> Html:
    """Return an element.

    Args:
        tag: its name.
        content: elements, or texts, which are escaped; what would act on a terminal or change the direction of writing
            is replaced.
        attributes: their values are escaped. `True` is an attribute without a value, `False` and `None` none at all; an
            underscore at the end of a name is left out, one within it is a hyphen.
    """
    begin = "".join([f"<{tag}", *(_attribute(name, value) for name, value in attributes.items()), ">"])
    if tag in VOID:
        return Html(begin)
    return Html(begin + "".join(map(text, content)) + f"</{tag}>")


def text(content: str) -> Html:
    """Return a text as HTML; HTML as it is."""
    return content if isinstance(content, Html) else Html(html.escape(printable(content)))


def joined(*content: str) -> Html:
    """Return elements and texts, one after the other."""
    return Html("".join(map(text, content)))


def _attribute(name: str, value: str | bool | None) -> str:
    name = name.rstrip("_").replace("_", "-")
    if isinstance(value, str):
        return f' {name}="{html.escape(printable(value))}"'
    return f" {name}" if value else ""
