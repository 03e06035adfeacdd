"""Measure a model layer by layer, for models that do not fit into memory.

``walk`` explains the idea and leads; read it first. ``followers`` are the batches behind it,
``hidden`` what they hand from layer to layer. ``chain`` is the model with its layers taken out,
``calls`` how it calls them, and ``weights`` reads a layer's weights. ``estimate`` says early what
all will take.
"""
