"""`balancer policy`: the rule by which a pool chooses ranks, shown with its alternatives or changed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing

from balancer.admin import PoolAdmin
from balancer.cli.configure import parsed_changes
from balancer.cli.exits import Exit
from balancer.cli.table import duration, table
from balancer.cli.verb import Verb, add_address, add_pool, settings_of
from balancer.errors import InvalidInput, UnknownPool
from balancer.model import PoolSettings
from balancer.policies import Policy, policies


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool(parser)
    parser.add_argument(
        "words", nargs="*", metavar="[NAME] [PARAMETER=VALUE ...]", help="without any: show the choice and the choices"
    )
    add_address(parser)


def _run(arguments: argparse.Namespace) -> int:
    words = arguments.words
    if arguments.pool_word and (arguments.pool is not None or "=" in arguments.pool_word):  # POOL was left out
        words, arguments.pool_word = [arguments.pool_word, *words], None
    settings = settings_of(arguments)
    with closing(PoolAdmin(settings)) as admin:
        if words:
            _change(admin, words)
        else:
            print("\n".join([f"pool {settings.pool}", *_shown(admin.snapshot().settings)]))
    return Exit.OK


def _change(admin: PoolAdmin, words: Sequence[str]) -> None:
    named, changes = [word for word in words if "=" not in word], parsed_changes([w for w in words if "=" in w])
    if len(named) > 1:
        raise InvalidInput(f"one policy at a time, not {' and '.join(named)}")
    before = _known(admin)
    name = named[0] if named else before.policy if before else "envelope"
    policy = policies().get(name)
    if policy is None:
        raise InvalidInput(f"no policy {name!r}: there are {', '.join(policies())}")
    for parameter in changes:
        if parameter not in policy.defaults:
            raise InvalidInput(f"{name} has no parameter {parameter!r}: {_choice(policy, {}) or 'it has none'}")
    parameters = {f"{name}.{parameter}": value for parameter, value in changes.items()}
    admin.configure(**{"policy": name, **parameters})
    after = admin.snapshot().settings
    was = f" (was {_line(before)})" if before and _line(before) != _line(after) else ""
    print(f"policy {_line(after)}{was}")


def _known(admin: PoolAdmin) -> PoolSettings | None:
    try:
        return admin.snapshot().settings
    except UnknownPool:
        return None


def _line(settings: PoolSettings) -> str:
    policy = policies().get(settings.policy)
    return f"{settings.policy} {_choice(policy, settings.parameters) if policy else ''}".rstrip()


def _choice(policy: Policy, settings: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in policy.stored(settings).items())


def _shown(settings: PoolSettings) -> list[str]:
    rows = [
        ["*" if name == settings.policy else "", name, _choice(policy, settings.parameters), policy.summary]
        for name, policy in policies().items()
    ]
    slow = duration(settings.slow_start_ms) if settings.slow_start_ms else "off"
    return [
        f"weights {settings.weights}; slow start {slow} (`balancer configure`)",
        "",
        *table(["", "POLICY", "PARAMETERS", "WHAT IT DOES"], rows),
    ]


def _parameters() -> str:
    lines = [
        f"  {f'{policy.name} {name}={policy.defaults[name]:g}':34}  {meaning}"
        for policy in policies().values()
        for name, meaning in policy.meanings.items()
    ]
    return "\n".join(lines)


_DETAILS = """\
Show or change the rule by which a pool chooses ranks. It lives in Redis and holds for all
dispatchers from their next request on; parameters are kept when the policy changes.

policies:
"""

VERB = Verb(
    name="policy",
    summary="show or change the rule by which ranks are chosen",
    details=_DETAILS
    + "\n".join(f"  {policy.name:17} {policy.summary}" for policy in policies().values())
    + f"\n\nparameters, with their defaults:\n{_parameters()}",
    examples=(
        "balancer policy chat",
        "balancer policy chat envelope",
        "balancer policy chat cost_envelope request_tokens=900 slack=3",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
