"""The command line `balancer`: one module per verb, over the same rooms that dispatchers use.

It shows and asks; every rule about pools lives below it. `entry` turns errors into exit codes, `parser` lists the
verbs, `verb` says what a verb is, `checks_server` and `checks_pool` are what `doctor` looks at. Nothing imports it.
"""

from balancer.cli.entry import main

__all__ = ["main"]
