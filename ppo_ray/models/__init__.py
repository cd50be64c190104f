"""Networks of the learner, packing of sequences, and loading."""
