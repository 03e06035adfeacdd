"""From the tensors that pass through a model to the sums at its inputs.

Read in this order: ``sites`` (an input and what is measured there), ``batches`` (which tokens go
through the model together), ``hooks`` (how a site sees its input), ``totals`` (the sums of all
processes become what a directory stores).
"""
