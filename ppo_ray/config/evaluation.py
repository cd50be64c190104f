"""The config of an evaluation: the little that a checkpoint's own config may decide, and what the command line adds.

A checkpoint may be a stranger's. Its config.yaml names no code to run, no machine to connect to and nothing to be
trusted: such options count only when they are given anew.
"""

from collections.abc import Sequence
from pathlib import Path

from ppo_ray.config.explain import all_options
from ppo_ray.config.file import load, read_plain
from ppo_ray.config.run import Config
from ppo_ray.errors import QUOTED, InputError

_TAKEN_SECTIONS = ("prompts", "evaluation")
_TAKEN = {
    *("seed", "model.dtype", "model.quantization", "learner.workers", "learner.threads", "learner.gpus"),
    *("rollout.engine", "rollout.workers", "rollout.threads", "rollout.gpus", "rollout.tensor_parallel"),
    *("rollout.batch_size", "rollout.min_response_tokens", "rollout.max_response_tokens", "rollout.temperature"),
    *("rollout.stop_at_eos", "rollout.stop_token_ids", "rollout.max_context", "rollout.kv_cache_mib", "rollout.dtype"),
    *("reward.path", "reward.revision", "reward.label", "reward.transform", "reward.dtype", "reward.batch_size"),
    *("reward.batch_tokens", "reward.chat_template", "reward.workers", "reward.threads", "reward.gpus"),
    *("ray.placement", "ray.object_store_mib", "ray.max_restarts"),
    *("ray.start_timeout_s", "ray.call_timeout_s", "ray.ping_timeout_s", "ray.stop_timeout_s"),
}
"""The options that are taken from a checkpoint's config: numbers, names of data, and how responses are sampled."""
_SAID = (
    "model.trust_remote_code",
    "model.allow_pickled_weights",
    "reward.function",
    "reward.url",
    "reward.judge",
    "reward.parts",
    "reward.trust_remote_code",
    "reward.allow_pickled_weights",
    "ray.address",
)
"""The options that are dropped and said: they run code, trust files or connect to another machine."""
SCORERS = {
    "reward.function": "code that is not run",
    "reward.url": "a server that is sent nothing",
    "reward.judge": "a model and files that are not read",
    "reward.parts": "which are not used",
}
"""What scores by running code or by asking another machine, and what does not become of it."""


def load_evaluation_config(checkpoint: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Make the config that evaluates a checkpoint, from its config.yaml and `key=value` overrides.

    Args:
        checkpoint: a folder such as `RUN/checkpoints/final`.
        overrides: as in `load_config`; any option may be given.

    Returns:
        The config, and a line for each option of the file that would have run code, trusted files or connected to
        another machine, and was dropped.

    Raises:
        InputError: it is no checkpoint of ours, its config holds an interpolation, or an option is wrong.
    """
    source = Path(checkpoint) / "config.yaml"
    if not source.is_file():
        raise InputError(
            f"{checkpoint}: has no config.yaml, so it is no checkpoint of ppo_ray; "
            "give a folder like RUN/checkpoints/final"
        )
    options = read_plain(source)
    if judge := {key: value for key, value in options.items() if key.startswith("reward.judge.")}:
        options["reward.judge"] = judge
    taken = {key: value for key, value in options.items() if key in _TAKEN or key.partition(".")[0] in _TAKEN_SECTIONS}
    for key, value in taken.items():
        if "${" in str(value):
            raise InputError(f"{source}: {key} holds an interpolation, which a checkpoint's config never does")
    given = {override.partition("=")[0] for override in overrides}
    defaults = {name: field.default for name, field in all_options(Config)}
    dropped = [
        f"{key}={str(options[key])[:QUOTED]}"
        for key in _SAID
        if key not in given and options.get(key, defaults[key]) != defaults[key]
    ]
    scored_by = next((key for key in SCORERS if options.get(key)), None)
    if scored_by and not {"reward.path", *SCORERS} & given:
        raise InputError(
            f"{source}: the run was scored by {scored_by}={str(options[scored_by])[:QUOTED]}, {SCORERS[scored_by]} "
            f"because a checkpoint names it. If you trust it, give {scored_by}=... here, or a classifier: "
            "reward.path=..."
        )
    if SCORERS.keys() & given:
        taken.pop("reward.path", None)
    for path, revision in (("reward.path", "reward.revision"), ("prompts.path", "prompts.revision")):
        if path in given or path not in taken:
            taken.pop(revision, None)  # of another path
    for one, other in (("prompts.path", "prompts.sources"), ("prompts.sources", "prompts.path")):
        if one in given:
            taken.pop(other, None)
    policy = {"model.path": str(checkpoint)}
    if (Path(checkpoint) / "adapter_config.json").is_file():
        policy = {"model.lora.path": str(checkpoint)}
        policy |= {key: options[key] for key in ("model.path", "model.revision") if options.get(key)}
        if "${" in str(options.get("model.path")):
            raise InputError(f"{source}: model.path holds an interpolation, which a checkpoint's config never does")
    return load(Config, None, [f"output_dir={checkpoint}", *overrides], given=taken | policy), dropped
