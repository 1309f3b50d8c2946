"""HTML and JSON for a page. Every text goes through here and is escaped: labels and errors come from strangers."""

from __future__ import annotations

import html
import json
import re
from typing import Any

_NAME = re.compile(r"[a-z][a-z0-9-]*", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_VOID = frozenset({"input"})
_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None


def text(value: object) -> Markup:
    """Any text as HTML; characters that no page may hold become U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True))


def element(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element: children that are not :class:`Markup` are escaped, ``None`` is left out.

    ``class_`` gives ``class``, other underscores hyphens; ``True`` is a bare attribute, ``None`` and ``False`` are left
    out. Event handlers and links to anything but this page are refused.
    """
    parts = [_checked(tag)]
    for key, value in attributes.items():
        name = _checked(key.rstrip("_").replace("_", "-"))
        if name.startswith("on") or (name in ("href", "src") and not str(value).startswith("#")):
            raise ValueError(f"attribute {name}={value!r} has no place on a page")
        if value is not None and value is not False:
            parts.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(parts)}>"
    if tag in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """Children one after the other."""
    return Markup("".join(text(child) for child in children if child is not None))


def json_in_script(value: Any) -> Markup:
    """``value`` as JSON that can stand inside a script element: no character of it can end or open one."""
    dumped = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return Markup(re.sub("[<>&\u2028\u2029]", lambda match: _IN_SCRIPT[match.group()], dumped))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an element or attribute")
    return name
