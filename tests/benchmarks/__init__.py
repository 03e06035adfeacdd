"""Benchmarks: ``python -m tests.benchmarks [NAMES…] [--out FILE.json] [--quick]``.

Every benchmark runs two things on the same inputs in turn (A B A B …), each in a process of its
own, and reports the ratio of the medians. No test asserts a time.

Nothing heavy is imported here or in the harness: on Linux a child's peak memory starts at its
parent's, so a harness that had loaded torch would hide the memory of whatever it measures.
"""
