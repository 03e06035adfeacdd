"""A complete run without a network: text, tiny models, calibration, merges, losses.

``demo`` is the order of things. ``text`` reads the standard library, ``train`` makes models of it,
``stream`` merges the checkpoints of one of them.
"""
