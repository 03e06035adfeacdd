"""What a stream will do, settled before its first step.

``method`` says which merge methods can be steps and where their learning rate goes; ``schedule``
gives every step its rate; ``document`` writes a step as a mergekit configuration; ``checks`` are
the single refusals; ``plan`` puts all of it together.
"""
