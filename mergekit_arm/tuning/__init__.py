"""Finds the numbers of a merge: of any method, judged on held-out data or by a command.

    >>> from mergekit_arm.tuning import tune
    >>> tune("tune.yml", "./out")

Read this folder in the order of what happens. ``config`` is the YAML file, in which ``space``
finds what is to be searched; ``candidates`` is what of it each merge method takes, and ``plan``
puts all of it together and refuses what does not hold. ``search`` is the study, which knows
nothing of merges; ``run`` is one process's part in it. ``trying`` works on one trial: ``merging``
makes its model (through ``sink``, in memory), ``scoring`` judges it share by share, ``objective``
makes one number of that. ``measuring`` scores the base and the inputs, and ``results`` is the end.
``report`` is the files, the picture and the card; ``TUNING.md`` says all of it for users.
"""

from __future__ import annotations

from mergekit_arm.tuning.options import TuneOptions
from mergekit_arm.tuning.results import TuneResult
from mergekit_arm.tuning.tune import tune

__all__ = ["TuneOptions", "TuneResult", "tune"]
