"""Generation: engines (vLLM, transformers), the rollout worker around one, and the group of all of them."""
