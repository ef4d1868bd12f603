"""Where words meet the outside: complaints on stderr, and what differs between a terminal and a file or pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from balancer.settings import redacted

_COLOURS = {"green": "\x1b[32m", "yellow": "\x1b[33m", "red": "\x1b[31m"}
_RESET = "\x1b[0m"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def complain(message: str) -> None:
    """One line on stderr, without any password that somebody typed in the wrong place."""
    print(f"balancer: {redacted(message)}", file=sys.stderr, flush=True)


def is_terminal() -> bool:
    """Whether a person watches standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str) -> str:
    """`text` in a colour, on a terminal; NO_COLOR (no-color.org) turns it off."""
    if not is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"{_COLOURS[colour]}{text}{_RESET}"


def redraw(lines: Sequence[str]) -> None:
    """Put `lines` over what the screen shows; what does not fit is cut, for a scrolled line would stay behind."""
    width, height = shutil.get_terminal_size()
    if len(lines) > height - 1:
        hidden = len(lines) - (height - 2)
        lines = [*lines[: height - 2], f"... {hidden} more lines: a higher window shows them"]
    text = f"{_END_OF_LINE}\n".join(line[:width] for line in lines)
    print(f"{_HOME}{text}{_END_OF_LINE}\n{_END_OF_SCREEN}", end="", flush=True)


def clear() -> None:
    """An empty screen, before the first redraw."""
    print(f"\x1b[2J{_HOME}", end="")
