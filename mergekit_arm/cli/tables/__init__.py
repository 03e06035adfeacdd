"""The tables that the commands print: ``calibration`` and ``stream``."""
