"""The simulator: barrier-coupled engines without a GPU, to see what a policy is worth before switching it on.

The core never imports this room; it imports downwards only (workload, protocol, scripts, model). No Redis, no sockets,
no clock: requests and their times come from `balancer.workload`, the engines' step times from `profiles`.

    profiles    price lists of a step, with the sources of each number
    scenario    what is simulated                  stream     which requests
    engine      ranks behind one barrier           simulation arrivals, steps and reports in order of time
    balancing   what a balancer is                 policies   twins of lua/policies; pool: the state around them
    trials      rules that no pool has yet; NOTES.md says what was tried
    baselines   SGLang, vLLM and the seed, as their sources do it
    lua_pool    the shipped Lua, on lua_redis (and its sorted_set)
    recorder    sums over a run                    metrics    a run in a dozen numbers
    experiment  balancers over seeds, capacity     report, report_html, svg, progress, command: what people see
"""

from balancer.simulator.balancing import Balancer, MakeBalancer, Moment, Report
from balancer.simulator.experiment import Comparison, Estimate, Objective, balancer_names, capacity_per_s, compare
from balancer.simulator.experiment import make_balancer as make_balancer
from balancer.simulator.metrics import Summary, summary
from balancer.simulator.profiles import H20, H200, MOCK, PROFILES, Profile
from balancer.simulator.scenario import EngineKind, Scenario
from balancer.simulator.simulation import Run, simulate
from balancer.simulator.stream import Stream

__all__ = [
    "H20",
    "H200",
    "MOCK",
    "PROFILES",
    "Balancer",
    "Comparison",
    "EngineKind",
    "Estimate",
    "MakeBalancer",
    "Moment",
    "Objective",
    "Profile",
    "Report",
    "Run",
    "Scenario",
    "Stream",
    "Summary",
    "balancer_names",
    "capacity_per_s",
    "compare",
    "make_balancer",
    "simulate",
    "summary",
]
