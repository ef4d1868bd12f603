"""The embedded Redis: a real server on loopback for demos, tests and a first look.

`find_server` says which server program this machine has; `EmbeddedRedis` runs it in a private directory until its owner
stops it or dies. It has no password: every user of this machine can reach it, so it holds nothing but demo data.
"""

from balancer.embedded.search import SERVER_VARIABLE, EmbeddedServerError, FoundServer, find_server
from balancer.embedded.server import EmbeddedRedis

__all__ = ["SERVER_VARIABLE", "EmbeddedRedis", "EmbeddedServerError", "FoundServer", "find_server"]
