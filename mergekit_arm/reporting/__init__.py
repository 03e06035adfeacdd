"""One HTML page on a directory that mergekit-arm or mergekit has written.

``report`` recognises what a directory is and writes its page; ``statistics``, ``merged``,
``stream`` and ``tune`` say what is on it. ``replay`` reads a merge's inputs again, tensor by
tensor. ``drawings`` makes figures as data, without plotly; ``page`` is the HTML, in which plotly
draws them. ``places`` finds the layer and the kind of a weight in its name, ``spread`` counts
values.
"""
