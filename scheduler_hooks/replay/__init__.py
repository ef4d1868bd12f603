"""`balancer replay`: policies live on the mock engine, with what the simulator says of the same requests beside it.

The top floor: it plays on the demo's stage and lets `balancer.simulator` summarise both sides, and nothing imports it.

    options  arguments and what they make: scenario, streams      live    a stream that was played, as a simulated run
    run      plays all policies in turn, simulates, writes        table   live beside simulated
"""
