"""Start of a reward's judge on an engine: what the reward workers, which know no engine, are given."""

from collections.abc import Sequence

import numpy as np
import xxhash

from ppo_ray.config import Config, JudgeConfig
from ppo_ray.models.tokens import read_model_ends
from ppo_ray.reward.judge import Ask
from ppo_ray.rollout.engine import Engine, GenerationRequest, Sampling


def start_judge(judge: JudgeConfig) -> Ask:
    """Load a judge.

    Raises:
        InputError: there is no such model, or nothing ends its answers.
        WorkerError: the engine does not start with it.
    """
    from ppo_ray.models.loading import load_tokenizer  # loads torch

    engine = _start_engine(judge)
    ends = read_model_ends(judge, load_tokenizer(judge.path, judge.trust))
    sampling = Sampling(judge.temperature, ends.ids)

    def ask(questions: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        requests = [
            GenerationRequest(ids, judge.max_tokens, _find_seed(ids), f"question {number}")
            for number, ids in enumerate(questions)
        ]
        return [completion.response_ids for completion in engine.generate(requests, sampling)]

    return ask


def judge_environment(config: Config) -> dict[str, str]:
    """Return the variables that reward workers need before a judge's engine is imported."""
    judges = [source.judge for _, source in config.reward.sources if source.judge is not None]
    if all(judge.engine != "vllm" for judge in judges):
        return {}
    from ppo_ray.rollout.vllm import engine_environment

    return engine_environment(config.reward.gpus)


def _start_engine(judge: JudgeConfig) -> Engine:
    if judge.engine == "hf":
        from ppo_ray.rollout.hf import HFEngine

        return HFEngine(judge.path, dtype=judge.dtype, max_context=judge.max_context, trust=judge.trust)
    from ppo_ray.rollout.vllm import VLLMEngine

    return VLLMEngine(
        judge.path,
        dtype=judge.dtype,
        max_context=judge.max_context,
        kv_cache_mib=judge.kv_cache_mib,
        trust=judge.trust,
    )


def _find_seed(ids: Sequence[int]) -> int:
    """Return a seed that follows from the question alone: whoever asks it again has the same answer."""
    return xxhash.xxh3_64_intdigest(np.array(ids, np.int32).tobytes()) >> 1
