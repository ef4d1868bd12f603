"""The demo: a stream of requests, a mock engine and the table that compares two policies.

A tool for demonstrations and tests, not a part of the balancer: the core never imports this package.
"""
