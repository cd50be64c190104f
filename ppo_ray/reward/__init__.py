"""Scoring of responses: a classifier or a Python function, the worker around it, and the group of all workers."""
