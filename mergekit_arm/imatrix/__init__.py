"""llama.cpp's importance matrices, as statistics and from statistics.

``files`` reads and writes the matrices themselves, ``names`` says which weight each is of.
``importing`` makes statistics of a matrix and the model's own weights, ``exporting`` a matrix of
statistics. ``IMATRIX.md`` has what the two formats hold, and what gets lost.
"""
