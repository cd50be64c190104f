"""The models: the policy with its value head, the frozen reference, the reward classifier."""
