"""Does it help? Studies that anyone can rerun: ``python -m tests.evidence STUDY --size small``.

Read ``sizes`` (what a study is made of), then in the order of what happens: ``tasks`` and
``general`` (text), ``training`` (a run and its checkpoints), ``runs`` (what one run has on the
disk), ``recipes`` and ``merging`` (merges, tuned by ``tuning``), ``judging``, and the studies
themselves, ``streams`` and ``specialists``. ``units`` keeps every finished piece of work as one
line of JSON in ``results/``; ``tables`` makes ``RESULTS.md`` of them.
"""
