"""Groups in the engines: a prompt is computed once for all its responses, and nothing of a response depends on that."""

from pathlib import Path

import pytest

from ppo_ray.rollout.engine import Engine, GenerationRequest, Sampling
from tests.rollout.comparison import reference
from tests.rollout.test_engines import engine as engine  # a fixture
from tests.rollout.test_engines import snapshot_of

PROMPT = tuple(7 + 3 * k % 490 for k in range(97))
GROUP = [GenerationRequest(PROMPT, 6, seed=10**17 + member) for member in range(8)]
OTHERS = [GenerationRequest((5 + n, *PROMPT[1:]), 6, seed=10**16 + n) for n in range(3)]


def test_a_group_is_what_its_members_are_alone(engine: Engine, tiny_policy: Path) -> None:
    engine.load_weights(snapshot_of(reference(tiny_policy), 20))
    together = engine.generate(GROUP, Sampling())
    assert len({completion.response_ids for completion in together}) > 1
    again = engine.generate([*OTHERS, *GROUP], Sampling())[len(OTHERS) :]
    for request, first, second in zip(GROUP, together, again, strict=True):
        (alone,) = engine.generate([request], Sampling())
        assert alone.response_ids == first.response_ids == second.response_ids
        assert alone.logprobs == pytest.approx(first.logprobs, abs=1e-4)
    assert engine.generate(GROUP, Sampling()) == together  # bit for bit


@pytest.mark.slow
def test_vllm_computes_a_groups_prompt_once(vllm_engine: Engine, tiny_policy: Path) -> None:
    """Blocks of 32 tokens: three of a prompt of 97 are taken from the cache by each member but the first."""
    vllm_engine.load_weights(snapshot_of(reference(tiny_policy), 21))
    scheduler = vllm_engine._llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    computed = []
    schedule = scheduler.schedule

    def count(*arguments: object) -> object:
        output = schedule(*arguments)
        computed.append(output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = count
    try:
        vllm_engine.generate(GROUP, Sampling())
        group = sum(computed)
        computed.clear()
        different = [GenerationRequest((9 + n, *PROMPT[1:]), 6, seed=n) for n in range(8)]
        vllm_engine.generate(different, Sampling())
    finally:
        scheduler.schedule = schedule
    assert group == sum(computed) - 7 * 96
