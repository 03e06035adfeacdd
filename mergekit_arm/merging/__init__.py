"""What a stream, a search and a check say of merges, and how mergekit makes them.

``documents`` are the configurations that are written, and ``keys`` finds what mergekit would not
read of one. ``options`` are what merges are told, and ``room`` is what they take. ``adapters``
merges an adapter into its model, and ``merge`` runs mergekit: whole or absent. ``movement`` is how
far a weight went, ``card`` what all cards have in common, and ``picture`` saves what is drawn.
"""
