"""What is wrong with a configuration, found in seconds, from headers and never from weights.

``check`` is the order of things, and tells merges from streams. ``document`` is the YAML with its
line numbers, ``findings`` what can be said of it. For a merge, ``keys`` and ``parameters`` look at
the text, ``models`` at headers and configurations; ``planning`` lets mergekit plan, and writes down
what it planned; ``tensors`` looks whether the planned tensors are there, of one shape, and can be
merged; ``filters`` which settings no tensor has read. ``vocabulary`` is about tokenizers, ``room``
about disk and memory.
"""
