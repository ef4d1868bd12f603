"""Benchmarks: what a dispatch, a report and a hand-over cost, as ratios measured in one run against a named reference.

Programs, not tests: `python -m tests.bench [NAME ...] [--quick] [--out FILE]` starts a private Redis, measures, prints
a table and writes JSON. A machine's noise hits both sides of a ratio, because the two are measured in turn.
"""
