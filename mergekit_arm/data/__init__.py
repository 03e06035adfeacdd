"""Calibration data: a name → rows → token blocks.

Read ``settings`` (what can be asked), ``files`` and ``rows`` (where rows come from), ``formats``
(what a row is), ``chats``, ``masks`` and ``tokens`` (a row's token ids), ``packing`` and ``blocks``
(rows → blocks), ``corpus`` (several data sets), ``sample`` (which tokens a second moment sees).
"""
