"""The rounds: in each the machine and all arms, one after the other, the order of the arms turned from round to round.

What is finished lies in the folder and is not made again.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare import child
from benchmarks.compare.arms import OURS, OURS_BFLOAT16, ArmRun, Step, step_from
from benchmarks.compare.machine import Machine
from benchmarks.compare.ours import read_steps, run_config
from benchmarks.compare.settings import ROOT, Settings
from benchmarks.compare.work import Portion, portions, trl_work
from ppo_ray import atomic
from ppo_ray.config import Config, to_yaml
from ppo_ray.errors import InputError

TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
_MODES = {"trl": "one", "trl-batched": "batched"}
_MACHINE_LIMIT_S = 600.0
_START_LIMIT_S, _TOKEN_LIMIT_S = 900.0, 0.4  # five times what the slowest arm took for a token on two cores
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_OURS = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}

Tell = Callable[[int], None]
"""Is told how many of the steps under way are done."""


@dataclass(frozen=True)
class Round:
    """All arms once, on the same work."""

    settings: Settings
    number: int
    """From 0."""
    folder: Path

    @property
    def seed(self) -> int:
        """Of all arms."""
        return self.settings.first_seed + self.number

    @property
    def arms(self) -> list[str]:
        """In this round's order."""
        turn = self.number % len(self.settings.arms)
        return self.settings.arms[turn:] + self.settings.arms[:turn]

    @property
    def config(self) -> Config:
        """Of ppo_ray's run, by which the others' work is made too."""
        return run_config(self.settings, self.seed, self.folder / OURS / "run")

    def machine(self) -> Machine:
        """Return what the machine can do, measured in this round."""
        path = self.folder / "machine.json"
        if not path.is_file():
            work, config, threads = portions(self.config), self.config, self.settings.threads
            tokens, response_tokens = _mean_tokens(work)
            numbers = [str(number) for number in (tokens, response_tokens, self.settings.batch_size, threads)]
            command = [sys.executable, "-m", "benchmarks.compare.machine", config.model.path, *numbers]
            log = self.folder / "machine.log"
            child.run(command, log, _MACHINE_LIMIT_S, lambda: None, _QUIET | _threads(threads) | _OURS)
            atomic.write_text(path, log.read_text().splitlines()[-1])
        return Machine(**json.loads(path.read_text(encoding="utf-8")))

    def run(self, arm: str, tell: Tell) -> ArmRun:
        """Run an arm, unless its result is there.

        Raises:
            WorkerError: it failed or took too long.
            InputError: TRL's environment is not there.
        """
        folder = self.folder / arm
        result = folder / "result.json"
        if not result.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # seconds of a run that was cut off do not count
            folder.mkdir(parents=True)
            made = (self._ours if arm in (OURS, OURS_BFLOAT16) else self._trl)(arm, folder, tell)
            made.write(result)
        return ArmRun.read(result)

    def _ours(self, arm: str, folder: Path, tell: Tell) -> ArmRun:
        config = folder / "config.yaml"
        config.write_text(to_yaml(run_config(self.settings, self.seed, folder / "run", arm)), encoding="utf-8")
        metrics = folder / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "ppo_ray", "train", str(config)]
        memory = child.run(
            command,
            folder / "output.txt",
            self._limit_s,
            lambda: tell(_num_lines(metrics)),
            _QUIET | _OURS,
        )
        steps = read_steps(folder / "run")
        shutil.rmtree(folder / "run" / "checkpoints")  # some GB
        return self._check(ArmRun(arm, self.seed, steps, memory.peak_mib, memory.peak_processes))

    def _trl(self, arm: str, folder: Path, tell: Tell) -> ArmRun:
        if not TRL_PYTHON.is_file():
            raise InputError(f"{TRL_PYTHON} is not there: `make benchmark` makes TRL's environment")
        threads = self.settings.threads
        work, lines = folder / "work.json", folder / "steps.jsonl"
        work.write_text(json.dumps(trl_work(self.config, _MODES[arm], threads, folder)), encoding="utf-8")
        command = [str(TRL_PYTHON), str(ROOT / "benchmarks/compare/trl_loop.py"), str(work), str(lines)]
        memory = child.run(
            command,
            folder / "output.txt",
            self._limit_s,
            lambda: tell(_num_lines(lines)),
            _QUIET | _threads(threads),
        )
        steps = [step_from(json.loads(line)) for line in lines.read_text(encoding="utf-8").splitlines()]
        return self._check(ArmRun(arm, self.seed, steps, memory.peak_mib, memory.peak_processes))

    def _check(self, run: ArmRun) -> ArmRun:
        """Check that an arm did the work: all steps, and each sample's prompt and limit."""
        for step, portion in zip(run.steps, portions(self.config), strict=True):
            _check_step(run.arm, step, portion)
        return run

    @property
    def _limit_s(self) -> float:
        longest = self.config.prompts.max_tokens + self.config.rollout.max_response_tokens
        return _START_LIMIT_S + self.settings.steps * self.settings.batch_size * longest * _TOKEN_LIMIT_S


def _threads(number: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(number)}


def _mean_tokens(work: list[Portion]) -> tuple[int, int]:
    """Return a batch's tokens that matter and its response tokens, if every response has its full length."""
    prompts = sum(len(ids) for portion in work for ids in portion.prompt_ids)
    samples = sum(len(portion.prompt_ids) for portion in work)
    responses = sum(sum(portion.max_new_tokens) for portion in work)
    return (prompts + responses - samples) // len(work), responses // len(work)


def _check_step(arm: str, step: Step, portion: Portion) -> None:
    wanted = zip(portion.prompt_ids, portion.max_new_tokens, strict=True)
    for (prompt, response), (ids, limit) in zip(step.lengths, wanted, strict=True):
        assert prompt == len(ids) and 1 <= response <= limit, f"{arm}: {prompt}+{response} tokens of {len(ids)}+{limit}"


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
