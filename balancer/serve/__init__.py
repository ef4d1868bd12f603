"""The HTTP dispatcher: `balancer serve`, one stateless replica in front of the engines of a pool.

    client ─► front ─► endpoints, tokens ─► bookings (one EVAL) ─► wire ─► upstream ─► engine
                 ▲                                                            │
                 └────────────── the answer's own bytes, as they come ────────┘

What decides does no I/O: `options`, `endpoints`, `tokens`, `wire`, `retries`, `answer` (the head of one). What talks is
thin: `front` to clients, `upstream` to engines, `bookings` to Redis. `exchange` is one request's way through them,
`stand_in` speaks for engines that have no hook, `desk` is what all requests share, `replica` opens the doors, `workers`
runs it in several processes.
The core never imports this.
"""

from balancer.serve.options import Engine, EngineKind, Options, parse_engine

__all__ = ["Engine", "EngineKind", "Options", "parse_engine"]
