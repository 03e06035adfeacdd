"""Measure a model: text → token blocks, which inputs, the forward loop."""
