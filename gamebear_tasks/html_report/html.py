"""HTML elements: composed by functions that escape all text."""

from __future__ import annotations

import html

from ..util.text import printable

VOID = {"meta", "br", "hr"}
"""Void elements, which have neither content nor an end tag."""


class Html(str):
    """Text that is already HTML, and is not escaped again."""


def element(tag: str, *content: str, **attributes: str | bool | None) -> Html:
    """Return an element.

    Args:
        tag: the element's name.
        content: child elements, and texts, which are escaped and sanitized: unprintable characters, including those
            that change the writing direction, are replaced.
        attributes: values by name, which are escaped and sanitized too. `True` stands for an attribute without a value;
            `False` and `None` omit it. In names, a trailing underscore is removed, and others become hyphens.
    """
    begin = "".join([f"<{tag}", *(_attribute(name, value) for name, value in attributes.items()), ">"])
    if tag in VOID:
        return Html(begin)
    return Html(begin + "".join(map(text, content)) + f"</{tag}>")


def text(content: str) -> Html:
    """Escape and sanitize a text; HTML is returned unchanged."""
    return content if isinstance(content, Html) else Html(html.escape(printable(content)))


def joined(*content: str) -> Html:
    """Concatenate elements and texts; texts are escaped."""
    return Html("".join(map(text, content)))


def _attribute(name: str, value: str | bool | None) -> str:
    name = name.rstrip("_").replace("_", "-")
    if isinstance(value, str):
        return f' {name}="{html.escape(printable(value))}"'
    return f" {name}" if value else ""
