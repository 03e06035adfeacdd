"""The ``mergekit-arm`` command: one file per subcommand."""
