"""ppo_ray beside TRL 0.11.3 on the same work: `make benchmark`; docs/internals.md says what is measured and how."""
