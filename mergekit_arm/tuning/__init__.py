"""Finds the numbers of a merge: of any method, judged on held-out data or by a command."""
