"""What happens around the passes through a model.

``session`` comes first: reports, signals and saving after every batch. ``progress`` is what is
saved. ``finishing`` makes of complete sums what a directory stores. ``estimate`` extrapolates from
the first batch to a ``preflight``, with the ``size`` of what will be written.
"""
