"""`ppo-ray view`: a run in the browser. Reads a run's folder and never writes to it."""
