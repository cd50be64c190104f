"""The start of a run: at its first step, or at the newest checkpoint that is whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_ray.checkpoint import RunState, verify
from ppo_ray.config import Config, load_config
from ppo_ray.config.file import flatten
from ppo_ray.errors import CheckpointError, InputError
from ppo_ray.run.checkpoints import Checkpoints
from ppo_ray.run.folder import RunFolder

MAY_CHANGE = (
    "steps",
    "output_dir",
    "resume",
    "report",
    "checkpoint.*",
    "ray.*",
    "tracking.*",
    "evaluation.num_samples",
    "evaluation.every_steps",
    "evaluation.samples_per_prompt",
    "evaluation.temperature",
    "evaluation.pass_score",
    "evaluation.pass_part",
    "evaluation.sets.*",
    "rollout.workers",
    "rollout.threads",
    "rollout.gpus",
    "rollout.tensor_parallel",
    "rollout.max_num_seqs",
    "rollout.kv_cache_mib",
    "rollout.self_check",
    "rollout.adapter_sync",
    "rollout.weight_transport",
    "rollout.weight_bucket_mib",
    "reward.workers",
    "reward.threads",
    "reward.gpus",
    "reward.batch_size",
    "reward.batch_tokens",
    "reward.retries",
    "reward.token_env",
    "learner.workers",
    "learner.threads",
    "learner.gpus",
    "learner.microbatch_tokens",
    "learner.sharding",
    "learner.shard_size",
    "learner.reduce_gradients",
    "learner.offload",
    "learner.gradient_checkpointing",
    "learner.compile",
)
"""Options that say how long, how often and on what a run works, not what it computes. Where they move work to other
hardware or other numbers of threads, floating-point sums may round otherwise."""


@dataclass(frozen=True)
class Difference:
    """An option that two configs give different values."""

    key: str
    before: Any
    after: Any

    @property
    def may_change(self) -> bool:
        """Whether a run may go on with it."""
        sections = [known[:-1] for known in MAY_CHANGE if known.endswith(".*")]
        return self.key in MAY_CHANGE or self.key.startswith(tuple(sections))

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.before)} -> {_show(self.after)}"


@dataclass(frozen=True)
class Start:
    """The start of a run: its beginning, or the checkpoint at which it goes on."""

    state: RunState
    checkpoint: Path | None = None
    """Checkpoint that the learner loads; None: the models that the config names."""
    changed: tuple[Difference, ...] = ()
    """Options that are not as they were."""


def open_folder(config: Config) -> RunFolder:
    """Make the run's folder, or take that of the run to be resumed.

    Raises:
        InputError: it holds a run and that is not to be resumed, or it holds none and must.
    """
    folder = RunFolder(Path(config.output_dir).absolute())
    if config.resume == "never":
        return RunFolder.create(config.output_dir)
    if config.resume == "required" and not folder.holds_run():
        raise InputError(
            f"output_dir={config.output_dir}: holds no run to go on with; leave --resume out, or set resume=auto "
            "to go on if there is one"
        )
    return RunFolder.open(config.output_dir)


def is_finished(folder: RunFolder, config: Config) -> bool:
    """Say whether the folder's run has made all steps that the config asks for, and ended well.

    Raises:
        InputError: its config is another, or it has made more steps.
    """
    if config.resume == "never" or not folder.final_checkpoint.is_dir():
        return False
    _check_config(folder, config)
    try:
        verify(folder.final_checkpoint)
        return _check_steps(RunState.read(folder.final_checkpoint), config).step == config.steps
    except CheckpointError:
        return False  # it is made again from an earlier one


def find_start(folder: RunFolder, config: Config, checkpoints: Checkpoints, fingerprint: str) -> Start:
    """Find where to begin.

    A run that ended before its first checkpoint begins anew: its first steps are the same again.

    Args:
        folder: of the run.
        config: as it is now.
        checkpoints: of the folder.
        fingerprint: of the prompts as they are now.

    Raises:
        InputError: the config or the prompts are not those that the run began with.
    """
    fresh = RunState(prompts_fingerprint=fingerprint)
    if config.resume == "never":
        return Start(fresh)
    changed = _check_config(folder, config)
    newest = checkpoints.newest()
    if newest is None:
        return Start(fresh, None, changed)
    path, state = newest
    if state.prompts_fingerprint != fingerprint:
        option = "sources" if config.prompts.sources else "path"
        raise InputError(
            f"prompts.{option}={config.prompts.place}: the texts or the tokenizer are not those that the run in "
            f"{folder.path} began with (fingerprint {fingerprint}, was {state.prompts_fingerprint}), so it would meet "
            "other prompts. Put them back, or begin a new run in another output_dir"
        )
    return Start(_check_steps(state, config), path, changed)


def _check_config(folder: RunFolder, config: Config) -> tuple[Difference, ...]:
    """Return what differs from the run's own config.

    Raises:
        InputError: something that must not.
    """
    if not folder.config.is_file():
        return ()
    found = differences(load_config(folder.config, []), config)
    refused = [item for item in found if not item.may_change]
    if any(item.key == "steps" for item in found) and config.ppo.learning_rate_schedule != "constant":
        refused += [item for item in found if item.key == "steps"]
    if refused:
        schedule = f" (steps: ppo.learning_rate_schedule={config.ppo.learning_rate_schedule} ends with them)"
        hint = schedule if any(item.key == "steps" for item in refused) else ""
        raise InputError(
            "\n".join(
                [
                    f"the run in {folder.path} has another config; it would not be the same run{hint}",
                    *(f"  {item}" for item in refused),
                    "Set these back, or begin a new run in another output_dir.",
                ]
            )
        )
    return tuple(item for item in found if item.key not in ("output_dir", "resume"))


def _check_steps(state: RunState, config: Config) -> RunState:
    if state.step > config.steps:
        raise InputError(f"steps={config.steps}: the run has made {state.step} steps already; ask for as many or more")
    return state


def differences(before: Config, after: Config) -> list[Difference]:
    """Return what differs, in the order of the config."""
    old, new = dict(flatten(before.model_dump())), dict(flatten(after.model_dump()))
    keys = dict.fromkeys([*new, *old])  # names of options that the user gives are in one of them alone
    return [Difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
