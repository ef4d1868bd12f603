"""dp-balancer: one exact, shared view of every data-parallel rank's load, for any number of dispatchers."""

from balancer.admin import PoolAdmin
from balancer.dispatcher import AsyncDispatcher, Dispatcher
from balancer.errors import (
    BalancerError,
    CorruptPool,
    Fenced,
    InvalidInput,
    NewerSchema,
    NoRank,
    NoRankReason,
    Refused,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    UnknownPool,
    WrongSize,
)
from balancer.model import (
    EngineState,
    EngineView,
    Incarnation,
    Outcome,
    Placement,
    PoolSettings,
    PoolSnapshot,
    RankCounts,
    RankView,
    Reported,
    Request,
    in_flight_id,
)
from balancer.reporter import Reporter
from balancer.settings import Settings

__all__ = [
    "AsyncDispatcher",
    "BalancerError",
    "CorruptPool",
    "Dispatcher",
    "EngineState",
    "EngineView",
    "Fenced",
    "Incarnation",
    "InvalidInput",
    "NewerSchema",
    "NoRank",
    "NoRankReason",
    "Outcome",
    "Placement",
    "PoolAdmin",
    "PoolSettings",
    "PoolSnapshot",
    "RankCounts",
    "RankView",
    "Refused",
    "Reported",
    "Reporter",
    "Request",
    "Settings",
    "StoreDenied",
    "StoreError",
    "StoreUnavailable",
    "UnknownPool",
    "WrongSize",
    "in_flight_id",
]
