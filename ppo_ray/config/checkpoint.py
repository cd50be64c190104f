"""The options of checkpoints."""

from pydantic import Field

from ppo_ray.config.section import Section


class CheckpointConfig(Section):
    """When the whole state of a run is written, and how much of it is kept."""

    every_steps: int = Field(default=10, ge=0)
    """Steps from one checkpoint to the next; 0: only at the end, and when the run is stopped."""
    keep_last: int = Field(default=2, ge=1)
    """How many of the newest are kept."""
    keep_best: bool = True
    """Whether the one whose policy scored highest is kept too: by `score/mean` of the step that it sampled."""
