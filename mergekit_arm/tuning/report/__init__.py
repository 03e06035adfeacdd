"""What a search leaves: ``files`` for machines, ``plot`` as a picture, ``card`` of its model."""
