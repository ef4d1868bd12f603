"""The demo: a mock engine, dispatcher replicas and a stream of requests, all real processes on one machine.

The top floor: it uses the mock engine and balancer's public surface, and nothing imports it. `run` leads, `replica` is
one dispatcher's process, `measure` turns times into figures, `table` shows them.
"""
