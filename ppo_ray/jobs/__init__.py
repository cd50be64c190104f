"""Runs as jobs on a Ray cluster: the request, the package that is sent, the job server, and `ppo-ray submit`."""
