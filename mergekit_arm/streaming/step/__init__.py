"""One step of a stream.

``step`` is the order of things. ``measuring`` makes the statistics that the merge reads,
``movement`` compares the models before and after. ``workplace`` is what all steps share: the
directory, the state, the judge, and which weights may go.
"""
