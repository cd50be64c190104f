"""Scoring: a classifier or a Python function, the reward worker around it, and the group of all of them."""
