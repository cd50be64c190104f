"""Learning: one PPO update of policy and values, the worker around it, and the group of all its ranks."""
