"""`balancer script`: the Lua that Redis runs, with the line numbers that its error messages name."""

from __future__ import annotations

import argparse

from balancer.cli.exits import Exit
from balancer.cli.table import table
from balancer.cli.verb import Verb
from balancer.scripts import Script, load_script, script_names

_SHOWN_SHA = 12


def purpose(script: Script) -> str:
    """The first sentence of a script's header."""
    words: list[str] = []
    for line in script.text.splitlines():
        words.append(line.removeprefix("--").strip())
        sentence, end, _ = " ".join(words).partition(". ")
        if end or not words[-1] or sentence.endswith("."):
            break
    return sentence.partition(": ")[2].rstrip(". ")


def _listing() -> list[str]:
    scripts = [load_script(name) for name in script_names()]
    return table(["SCRIPT", "SHA1", "PURPOSE"], [[s.name, s.sha[:_SHOWN_SHA], purpose(s)] for s in scripts])


def _numbered(script: Script) -> list[str]:
    lines = script.text.splitlines()
    width = len(str(len(lines)))
    return [f"{number:>{width}}  {line}".rstrip() for number, line in enumerate(lines, start=1)]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the script; without it, the list of all")
    parser.add_argument("--raw", action="store_true", help="exactly the text that Redis gets, without line numbers")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        print("\n".join(_listing()))
    elif arguments.raw:
        print(load_script(arguments.name).text, end="")
    else:
        print("\n".join(_numbered(load_script(arguments.name))))
    return Exit.OK


_DETAILS = """\
Print a script as Redis gets it, its includes spliced in. The line numbers are those
in Redis' error messages (user_script:12); the SHA1 is that of EVALSHA in MONITOR and
SLOWLOG, and `balancer script NAME --raw | sha1sum`. Without NAME: the list."""

VERB = Verb(
    name="script",
    summary="print the Lua that Redis runs, with line numbers",
    details=_DETAILS,
    examples=("balancer script", "balancer script dispatch", "balancer script dispatch --raw"),
    add_arguments=_add_arguments,
    run=_run,
)
