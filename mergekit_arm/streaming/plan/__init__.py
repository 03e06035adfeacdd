"""What a stream will do, settled before its first step.

``method`` says which merge methods can be steps and where their learning rate goes; ``document``
writes a step as a mergekit configuration; ``checks`` are the single refusals, and ``prefix`` those
of a stream that has begun; ``plan`` puts all of it together.
"""
