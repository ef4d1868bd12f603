"""The demo: a mock engine, dispatcher replicas and a stream of requests, all real processes on one machine.

It uses the mock engine and balancer's public surface; `scheduler_hooks.replay` plays on the same stage. `run` leads,
`stage` starts the processes, `replica` is one dispatcher's, `measure` turns times into figures, `table` shows them.
"""
