"""What `balancer doctor` finds in one pool: leases, engines, bookings. Pure: a snapshot in, findings out."""

from __future__ import annotations

from collections.abc import Iterator

from balancer.cli.finding import Finding, fail, ok, warn
from balancer.cli.table import duration, number, plural
from balancer.model import EngineState, PoolSnapshot

_SHORT_ENGINE_LEASE_MS = 1_000
"""A long prefill, a graph capture or a pause of the host's silences a healthy engine for about so long."""
_LONG_BOOKING_LEASE_MS = 600_000
_SHOWN_NAMES = 3


def check_pool(snapshot: PoolSnapshot) -> Iterator[Finding]:
    """All findings about a pool that exists."""
    yield ok("pool", f"{snapshot.pool}, policy {snapshot.settings.policy}, schema known to this release")
    yield check_leases(snapshot)
    yield check_engines(snapshot)
    yield check_bookings(snapshot)


def check_leases(snapshot: PoolSnapshot) -> Finding:
    """The two leases fit each other."""
    engine_ms, booking_ms = snapshot.settings.engine_lease_ms, snapshot.settings.booking_lease_ms
    seen = f"engine {duration(engine_ms)}, booking {duration(booking_ms)}"
    if engine_ms < _SHORT_ENGINE_LEASE_MS:
        return warn("leases", seen, "engine_lease_ms is short: one long step makes a healthy engine look silent")
    if booking_ms < 2 * engine_ms:
        advice = "booking_lease_ms should be twice engine_lease_ms or more: else bookings end before engines are missed"
        return warn("leases", seen, advice)
    if booking_ms > _LONG_BOOKING_LEASE_MS:
        return warn("leases", seen, "booking_lease_ms is long: what a dead dispatcher booked counts for all that time")
    return ok("leases", seen)


def check_engines(snapshot: PoolSnapshot) -> Finding:
    """Somebody is there to take requests."""
    states = [rank.state for rank in snapshot.ranks]
    if not states:
        return warn("engines", "none has joined", "check the pool's name, and that an engine's hook runs")
    up = states.count(EngineState.UP)
    seen = f"{plural(len(snapshot.engines), 'engine')}, {up} of {plural(len(states), 'rank')} up"
    silent = [e for e in snapshot.engines if e.state is EngineState.SILENT]
    if silent:
        names = ", ".join(f"{e.name} (for {duration(e.age_ms)})" for e in silent[:_SHOWN_NAMES])
        more = f" and {len(silent) - _SHOWN_NAMES} more" if len(silent) > _SHOWN_NAMES else ""
        seen += f"; silent: {names}{more}"
        advice = "look at these engines, their hook's log and their way to Redis"
        if len(silent) == len(snapshot.engines):
            return fail("engines", seen, f"{advice}: dispatchers have no fresh rank")
        return warn("engines", seen, advice)
    if not up:
        return warn("engines", f"{seen}, all draining", "no request can be placed: `balancer undrain` one")
    draining = states.count(EngineState.DRAINING)
    return ok("engines", f"{seen}, {draining} draining" if draining else seen)


def check_bookings(snapshot: PoolSnapshot) -> Finding:
    """Bookings end by acknowledgement, not by their lease."""
    seen = f"{number(snapshot.bookings)} in flight, {number(snapshot.expired)} expired since the pool began"
    if snapshot.expired:
        advice = (
            "dispatchers died before they sent, requests waited in an engine for a booking lease, or an engine does not"
            " acknowledge (its hook is missing, or it has other request ids)"
        )
        return warn("bookings", seen, advice)
    return ok("bookings", seen)
