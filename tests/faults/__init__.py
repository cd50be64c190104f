"""What users fear, done to real runs: each must end with the very weights of a run that nothing happened to."""
