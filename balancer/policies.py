"""The policies that ship: one Lua file each, whose header says what it does and which parameters it has.

The files are the only list: whoever adds one finds it here, in the command line and in what a pool accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from balancer.scripts import policy_names, read_part

_DEFAULT = re.compile(r"parameter\('(\w+)\.(\w+)', ([\d.]+)\)")
_MEANING = re.compile(r"^--   (\w+) +(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule by which ranks are chosen: what it does in a sentence, its parameters' defaults and meanings."""

    name: str
    summary: str
    defaults: Mapping[str, float]
    meanings: Mapping[str, str]

    @classmethod
    def read(cls, name: str) -> Policy:
        """From its file in `lua/policies`."""
        text = read_part(f"policies/{name}")
        prose = " ".join(re.match(r"(?:--.*\n)+", text)[0].replace("--", "").split())  # type: ignore[index]
        summary = prose.removeprefix(f"{name}: ").partition(". ")[0].removesuffix(".")
        defaults = {parameter: float(value) for _, parameter, value in _DEFAULT.findall(text)}
        return cls(name, summary, defaults, dict(_MEANING.findall(text)))

    def stored(self, settings: Mapping[str, float]) -> dict[str, float]:
        """Its parameters where a pool has stored these settings (`NAME.parameter`), each with its value."""
        return {name: settings.get(f"{self.name}.{name}", default) for name, default in self.defaults.items()}


@cache
def policies() -> Mapping[str, Policy]:
    """All of them, by name."""
    return {name: Policy.read(name) for name in policy_names()}


def parameters() -> list[str]:
    """The settings that are parameters of a policy, as they are stored: `envelope.k`."""
    return [f"{policy.name}.{name}" for policy in policies().values() for name in policy.defaults]
