"""Where the checkpoints come from.

``checkpoints`` finds those of a finished training run, ``watch`` takes those of one that goes on,
and ``callback`` is the trainer's side of that.
"""
