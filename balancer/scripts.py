"""The Lua scripts as Redis gets them: each file of `lua/` with its includes spliced in where it asks for them.

Files are looked up in `balancer/lua` (an installed wheel) and then in `../lua` (a checkout). A script's header and
comments travel with it, so that an error's line number is that of `balancer script NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from pathlib import Path

from balancer.errors import InvalidInput

_INCLUDE = re.compile(r"^--@include (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A composed script: its name, its text, and the SHA1 by which Redis knows it."""

    name: str
    text: str
    sha: str


def lua_directory() -> Path:
    """Where the scripts lie."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "lua", here.parent / "lua"):
        if (candidate / "dispatch.lua").is_file():
            return candidate
    raise FileNotFoundError("the Lua scripts are missing from this installation: install dp-balancer again")


def script_names() -> list[str]:
    """Names of all scripts, sorted."""
    return sorted(path.stem for path in lua_directory().glob("*.lua"))


def policy_names() -> list[str]:
    """Names of all policies, sorted: one file each in `lua/policies`."""
    return sorted(path.stem for path in (lua_directory() / "policies").glob("*.lua"))


def read_part(name: str) -> str:
    """The text of an included part: `view` is `lua/lib/view.lua`, `policies/x` is `lua/policies/x.lua`."""
    folder = lua_directory() if "/" in name else lua_directory() / "lib"
    return (folder / f"{name}.lua").read_text(encoding="utf-8")


def included(parts: str) -> list[str]:
    """The names that an include line asks for; `policies/*` stands for every policy."""
    every = [f"policies/{policy}" for policy in policy_names()]
    return [name for part in parts.split(",") for name in (every if part.strip() == "policies/*" else [part.strip()])]


def compose(name: str, read: Callable[[str], str] = read_part) -> Script:
    """The script `name`, complete. `read` supplies the included parts (a test replaces the clock there)."""
    path = lua_directory() / f"{name}.lua"
    if not path.is_file():
        raise InvalidInput(f"no script {name!r}: there are {', '.join(script_names())}")

    def splice(match: re.Match[str]) -> str:
        return "\n".join(read(part).rstrip("\n") for part in included(match[1]))

    text = _INCLUDE.sub(splice, path.read_text(encoding="utf-8"))
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())


@cache
def load_script(name: str) -> Script:
    """The script `name`, composed once."""
    return compose(name)
