"""What a stream tells of itself: ``card`` in words, beside its model, and ``plot`` as a picture."""
