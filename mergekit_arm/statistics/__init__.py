"""What is measured, how it adds up, and the directory it lives in. ``FORMAT.md`` describes that.

Read in this order: ``kinds/`` (what a kind of statistic is, and the first two), ``format`` (the
schema of the metadata), ``write``, ``locate`` (where a directory lies) and ``read``; ``probe`` and
``matching`` (which weight is the one at hand); ``combine``; ``card``.
"""
