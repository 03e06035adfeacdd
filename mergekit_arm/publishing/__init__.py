"""What is published: statistics, and of a merged model what it was merged with.

``push`` uploads a statistics directory with a card that the Hub accepts.
``provenance`` runs at the end of every merge with our methods, and says which statistics it read.
"""
