"""What a statistics directory holds, in numbers that people can read.

``inputs`` reads one measured input; ``summary`` is a whole directory, ``tensor`` one weight of it,
``comparison`` two directories. The tables are in ``cli/tables/inspect.py``.
"""
