"""How a model is judged: ``heldout`` turns data into tokens, ``score`` a model into a number."""
