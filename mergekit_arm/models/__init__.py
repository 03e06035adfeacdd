"""Models, from a reference to something that can be called.

``loading`` finds a model, chooses device and dtype, and loads it; ``placement`` is for weights
that no single device holds, ``calling`` for how a model is set up and called, and ``tokenizer``
for its tokenizer. ``checkpoint`` brings and opens the
files, whose ``tensors`` are read one at a time. ``names`` and ``conversion`` say
which parameter a tensor of them becomes. ``contents`` describes a model without loading it.
"""
