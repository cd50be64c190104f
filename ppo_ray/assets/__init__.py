"""Models and data of the demo, built from Python packages; no hub is needed."""
