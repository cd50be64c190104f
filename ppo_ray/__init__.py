"""PPO for language models as Ray actors."""

__version__ = "0.1.0"
