"""How cost grows, and whether faster than the work: docs/performance.md says what is measured and how."""
