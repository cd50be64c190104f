"""Prompts: the texts of a data set, and the stream of token ids that every step takes its batch from."""
