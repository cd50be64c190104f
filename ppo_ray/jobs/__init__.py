"""A run as a job on a Ray cluster: what is sent, how it is followed, and what arrives there."""
