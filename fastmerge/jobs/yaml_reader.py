"""YAML that strangers wrote, read into plain values within limits of size and depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 50_000

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str")


class RecipeError(ValueError):
    """A recipe that cannot be run, with the place and the reason."""


@dataclass
class _Open:
    """A list or mapping under construction; `size` counts values, those behind aliases too."""

    value: list | dict
    anchor: str | None
    line: int
    key: Any = None
    has_key: bool = False
    size: int = 1
    merged: list[dict] = field(default_factory=list)


def read_yaml(text: str | bytes, source: str = "recipe") -> Any:
    """The value of a YAML document: dict, list, str, int, float, bool or None.

    Works through the parser's events with a stack of its own, so that neither nesting nor aliases
    cost more than the limits above allow. Aliases and merge keys (`<<`) work within them.

    Args:
        text: the document.
        source: its name in error messages.

    Raises:
        RecipeError: syntax error, several documents, too large or too deep, a tag, a repeated or
            non-text key, or a recursive or unknown alias. Names the line.
    """
    size = len(text.encode() if isinstance(text, str) else text)
    if size > MAX_BYTES:
        raise RecipeError(f"{source}: {size} bytes, expected at most {MAX_BYTES}")
    try:
        return _Builder(source).build(yaml.parse(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise RecipeError(f"{source}{line}: not valid YAML: {problem}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 text: {error.reason}") from None


class _Builder:
    def __init__(self, source: str):
        self.source = source
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.values = 0
        self.documents = 0
        self.result: Any = None
        self.resolver = yaml.SafeLoader("")

    def build(self, events) -> Any:
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    self._fail(line, "a second document starts, expected one recipe a file")
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self._start(event, line)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                self._end()
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in self.anchors:
                    self._fail(line, f"alias *{event.anchor} has no finished anchor before it")
                self._put(*self.anchors[event.anchor], line)
            elif isinstance(event, yaml.ScalarEvent):
                value = self._scalar(event, line)
                if event.anchor:
                    self.anchors[event.anchor] = (value, 1)
                self._put(value, 1, line)
        return self.result

    def _fail(self, line: int, problem: str) -> None:
        raise RecipeError(f"{self.source} line {line}: {problem}")

    def _start(self, event, line: int) -> None:
        kind, empty = ("map", {}) if isinstance(event, yaml.MappingStartEvent) else ("seq", [])
        if event.tag not in (None, "!", _PREFIX + kind):
            self._fail(line, f"tag {event.tag!r} is refused: recipes hold plain values")
        if len(self.stack) == MAX_DEPTH:
            self._fail(line, f"nested deeper than {MAX_DEPTH} levels")
        if self.stack and isinstance(self.stack[-1].value, dict) and not self.stack[-1].has_key:
            self._fail(line, f"a {type(empty).__name__} as a key, expected text")
        self.stack.append(_Open(empty, event.anchor, line))

    def _end(self) -> None:
        done = self.stack.pop()
        if done.merged:
            for mapping in done.merged:
                done.value = {**mapping, **done.value}
        if done.anchor:
            self.anchors[done.anchor] = (done.value, done.size)
        self._put(done.value, done.size, done.line)

    def _put(self, value: Any, size: int, line: int) -> None:
        """Add a finished value, made of `size` values, to what surrounds it."""
        if not self.stack:
            self.result = value
            return
        outer = self.stack[-1]
        outer.size += size
        if outer.size > MAX_VALUES:
            self._fail(line, f"more than {MAX_VALUES} values once aliases are followed")
        if isinstance(outer.value, list):
            outer.value.append(value)
        elif not outer.has_key:
            self._key(outer, value, line)
        else:
            outer.has_key = False
            if outer.key is _MERGE:
                mappings = value if isinstance(value, list) else [value]
                if not all(isinstance(mapping, dict) for mapping in mappings):
                    self._fail(line, "<<: expected a mapping or a list of mappings")
                outer.merged += mappings
            else:
                outer.value[outer.key] = value

    def _key(self, outer: _Open, key: Any, line: int) -> None:
        if key is not _MERGE and not isinstance(key, str):
            self._fail(line, f"key {key!r} is no text; put it in quotes")
        if key is not _MERGE and key in outer.value:
            self._fail(line, f"key {key!r} is given twice")
        outer.key, outer.has_key = key, True

    def _scalar(self, event, line: int) -> Any:
        tag = event.tag
        if tag in (None, "!"):
            plain = tag is None and event.implicit[0]
            implicit = (True, False) if plain else (False, True)
            tag = self.resolver.resolve(yaml.ScalarNode, event.value, implicit)
        kind = tag.removeprefix(_PREFIX)
        if kind == "merge":
            return _MERGE
        if tag == kind or kind not in _SCALARS:
            if event.tag is None:  # a plain date, or a lone "=": text in a recipe
                return event.value
            self._fail(line, f"tag {tag!r} is refused: recipes hold plain values")
        node = yaml.ScalarNode(tag, event.value)
        try:
            return getattr(self.resolver, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError, OverflowError):
            self._fail(line, f"{event.value[:60]!r} is no {kind}")


_MERGE = object()
