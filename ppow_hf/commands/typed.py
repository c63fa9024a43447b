"""Sentences of the library in the words of a command: its arguments as the user types them, in errors and warnings.

Knows words, and how a command spells its arguments.
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

# What the library calls otherwise than the commands do.
NAMES = {
    "train_dataset": ("train_data", "data", "target_states"),
    "eval_dataset": ("eval_data",),
    "target_model": ("target",),
    "processing_class": ("target",),
    "target_name": ("target",),
    "model": ("drafter",),
    "assistant_model": ("drafter",),
    "resume_from_checkpoint": ("resume",),
    "target_layer_ids": ("layers",),
    "git_tag": ("tag",),
}
# `name=value` and a name with an underscore, not within quotes, paths and the parentheses of a call.
SETTING = re.compile(r"""(?<!\w\()(?<![\w'"`/.\[-])(\w+)=(?>"[^"]*"|'[^']*'|[\w.-]*\w)(?![\w(])""")
NAME = re.compile(r"""(?<![\w'"`/.\[-])([a-z]+(?:_[a-z0-9]+)+)(?![\w('"=/:]|\.\w)""")
HEAD = re.compile(r"(\w+)(?:\['?([^\]']*)'?\])?: ")


class Typed:
    """Writes a command's arguments as they were typed in `argv`, or else as `spellings` gives them by name."""

    def __init__(self, argv: Sequence[str], spellings: Callable[[], Mapping[str, str]]):
        options = [option for option, _ in named_words(argv) if option is not None and option.startswith("--")]
        self._typed = {plain(option): option for option in options}
        self._spellings = spellings

    @cached_property
    def _options(self) -> dict[str, str]:
        known = self._spellings()
        return {**known, **{name: option for name, option in self._typed.items() if name in known}}

    def option(self, name: str) -> str | None:
        """The option that the library calls `name`; `None` where the command has none."""
        names = [own for own in (name, *NAMES.get(name, ())) if own in self._options]
        typed = [own for own in names if own in self._typed]
        return self._options[(typed or names)[0]] if names else None

    def sentence(self, text: str) -> str:
        """`text` with options in place of the argument it opens with, of settings `name=value`, and of other names
        that are none but an argument's (`max_length`)."""
        head = HEAD.match(text)
        opening, rest = "", text
        if head is not None and (option := self.option(head[1])):
            part = f" {head[2]}=" if head[2] and not head[2].isdigit() else ""
            opening, rest = f"{option}{part}: ", text[head.end() :]
        rest = SETTING.sub(self._setting, rest)
        return opening + NAME.sub(lambda found: self.option(found[1]) or found[0], rest)

    def _setting(self, found: re.Match) -> str:
        option, value = self.option(found[1]), found[0].partition("=")[2].strip("'\"")
        if option is None or value == "None":
            return found[0]
        return f"{option} {shlex.quote(value.lower() if value in ('True', 'False') else value)}"


class TypedWarnings(logging.StreamHandler):
    """Prints the library's warnings in the words of a command."""

    def __init__(self, typed: Typed):
        super().__init__()
        self._typed = typed

    def format(self, record: logging.LogRecord) -> str:
        return self._typed.sentence(super().format(record))

    def __enter__(self) -> "TypedWarnings":
        logging.getLogger("ppow_hf").addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        logging.getLogger("ppow_hf").removeHandler(self)


def plain(option: str) -> str:
    """`--max-length` as the library calls it: `max_length`."""
    return option.lstrip("-").replace("-", "_")


def named_words(argv: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """`(option, value)` of each word of a command that can be a value; positional ones have no option."""
    option: str | None = None
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("-") and equals:
            yield name, value
        elif word.startswith("-"):
            option = word
            yield option, ""
        else:
            yield option, word
