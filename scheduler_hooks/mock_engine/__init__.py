"""A mock LLM engine for demos and tests: real rank processes and the real hook around simulated steps.

It computes no tokens and needs no GPU. Its steps last as long as a documented cost model says (`cost`), its
queues follow SGLang's rules (`scheduler`), its ranks step together (`barrier`) and see requests at the step
boundary only (`rank`). `python -m scheduler_hooks.mock_engine --help` starts one; `wire` describes how to
talk to it, `client` does.

    cost           what a step costs              scheduler    the queues of one rank
    barrier        how ranks keep step            connections  a rank's sockets
    wire           lines of the protocol          rank         a rank's loop
    hook           where the real hook goes in    step_log     statistics of rank 0
    process_group  gloo, for the hook             client       asyncio client
    engine         fork, supervise, end
"""

from scheduler_hooks.mock_engine.client import MockEngineClient
from scheduler_hooks.mock_engine.cost import CostModel, StepWork
from scheduler_hooks.mock_engine.wire import RankEvent

__all__ = ["CostModel", "MockEngineClient", "RankEvent", "StepWork"]
