"""What a stream and a search do alike, so that mergekit merges for them.

``documents`` are the configurations that they write, ``keys`` finds what mergekit would not read
of one, ``options`` are what their merges are told;
``adapters`` merges an adapter into its model, and ``merge`` runs mergekit: whole or absent.
"""
