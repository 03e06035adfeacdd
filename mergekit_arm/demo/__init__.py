"""A complete run without a network: text, tiny models, calibration, merges, losses."""
