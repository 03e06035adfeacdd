"""Measure the inputs of a model's weights on text.

``calibrate`` has the three phases; read it first, then ``prepare``, what is checked and loaded.
What follows is measured by ``in_memory``, with the whole model, or in ``layerwise``, with one
layer's weights at a time. ``inputs`` finds out which input feeds which weight, ``sums`` adds up
what passes there, and ``records`` makes what is written of it. ``running`` is what happens around
the passes; ``processes``, with ``heartbeat`` below it, shares the work. ``options`` are the
command's.
"""
