"""Which input feeds which weight.

``readings`` classifies parameters by the layers that hold them; ``discovery`` completes that by a
short pass, in which ``products`` sees what no layer multiplies. ``coverage`` then gives every
tensor of the checkpoint its input or a reason, and ``merge_names`` adds the names by which a
merge asks for them.
"""
