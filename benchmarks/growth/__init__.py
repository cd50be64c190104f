"""How cost grows, and whether faster than the work: docs/internals.md says what is measured and how."""
