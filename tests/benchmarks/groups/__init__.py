"""What is compared: a file for each group, listed in ``catalogue.py``.

A group has ``BENCHMARKS``, name → function of a ``Workshop`` that returns rows, and ``TASKS``,
the functions that these launch in processes of their own. Tasks import what they need
themselves, before their clock starts: one does not pay for another's libraries, and the process
that starts them stays small.
"""
