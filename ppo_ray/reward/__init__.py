"""Scoring of responses: a classifier, a Python function or a server, the worker around it, the group of all workers."""
