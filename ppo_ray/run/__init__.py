"""A run from its config to its last line: the loop, what stands around it, and everything it writes."""
