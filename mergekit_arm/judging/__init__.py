"""How good a model is: on held-out tokens, or by a number from a command of the user's.

``sets`` says what may be asked for; ``heldout`` turns data into tokens, and ``loss`` a model into
its mean loss on them; ``metric`` runs a command, in which ``placeholder`` puts the model's
directory; ``judge`` scores a model on all sets of a file.
"""
