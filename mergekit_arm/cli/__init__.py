"""The ``mergekit-arm`` command: ``main`` first, then one file a subcommand, and their ``tables``.

Importing torch, transformers and mergekit takes seconds. So a subcommand is imported when it is
called, and what only its work needs is imported inside its function: ``--help`` stays instant.
"""
