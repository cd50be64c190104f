"""examples/ppo_in_one_file.py: written apart from the package, it comes to PPOLearner's weights; and it learns."""

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from ppo_ray import trajectory
from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from tests.learning import largest_difference, make_table

PAGE = Path(__file__).parents[2] / "examples" / "ppo_in_one_file.py"
SHARED = {"epochs", "gamma", "gae_lambda", "clip_range", "value_clip_range", "value_coef"}
SHARED |= {"kl_coef", "kl_target", "kl_horizon"}


@pytest.fixture
def page() -> Any:
    spec = importlib.util.spec_from_file_location(PAGE.stem, PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_options_defaults(page: Any) -> None:
    assert {name: getattr(page, name.upper()) for name in SHARED} == UpdateConfig().model_dump(include=SHARED)


@pytest.mark.parametrize("options", [{}, {"learning_rate": 1e-4}])  # the larger one takes most tokens to the clip
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-5), ("float64", 1e-9)])
def test_three_updates_come_to_the_learners_weights(
    page: Any,
    tiny_policy: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    tolerance: float,
    options: dict[str, float],
) -> None:
    model = ModelConfig.model_construct(path=str(tiny_policy), dtype=dtype)
    ppo = UpdateConfig(minibatch_size=4, **options)
    monkeypatch.setattr(page, "MINIBATCH_SIZE", ppo.minibatch_size)
    learner = PPOLearner.load(model, ppo, LearnerConfig(microbatch_tokens=64), temperature=1.0, device="cpu")
    policy, reference = (
        LlamaForCausalLM.from_pretrained(tiny_policy, dtype=getattr(torch, dtype), attention_dropout=0.5).train()
        for _ in range(2)
    )
    policy, reference = page.ActorCritic(policy), page.ActorCritic(reference)  # which turns dropout off
    before = learned(learner)
    policy.value_head.load_state_dict({name: before[f"value_head.{name}"] for name in ("weight", "bias")})
    optimizer = torch.optim.Adam(policy.parameters(), lr=ppo.learning_rate)
    kl_coef, reports = page.KL_COEF, []
    for step, num_rows in enumerate((8, 12, 16)):
        table = contradictory(num_rows)
        torch.manual_seed(step)
        orders = [torch.randperm(num_rows).numpy() for _ in range(ppo.epochs)]
        reports += learner.update(table, step, orders.__getitem__).minibatches

        responses = as_responses(page, table)
        scores = torch.tensor(table.column("score").to_pylist(), dtype=torch.float32)
        experience = page.make_experience(policy, reference, responses, scores, kl_coef)
        torch.manual_seed(step)  # the page draws the same orders
        page.update(policy, optimizer, responses, experience)
        kl_coef = page.adapt(kl_coef, float(experience.kl.sum()) / num_rows, num_rows)
    found = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    assert largest_difference(found, learned(learner)) < tolerance
    assert largest_difference(found, before) > 1e-4
    assert kl_coef == pytest.approx(learner.kl_coef, rel=1e-12)
    assert len(reports) == ppo.epochs * (2 + 3 + 4) and {report.outcome for report in reports} == {"stepped"}
    assert max(report.metrics["policy/clip_fraction"] for report in reports) > 0.1
    assert float(experience.kl.abs().max()) > 1e-3  # the policy has left the reference


def contradictory(num_rows: int) -> pa.Table:
    """Make each trajectory twice, praised and blamed: some ratios go where their advantages do not want them."""
    halves = ([1.0, -1.0], [-1.0, 2.0])
    return pa.concat_tables([make_table(num_rows // 2, scores * (num_rows // 4)) for scores in halves])


def learned(learner: PPOLearner) -> dict[str, torch.Tensor]:
    """Copy the learner's weights, by the names that the page has for them."""
    named = {f"causal_lm.{name}": tensor.detach().clone() for name, tensor in learner.named_weights()}
    return named | {f"value_head.{name}": torch.from_numpy(array) for name, array in learner.value_head().items()}


def as_responses(page: Any, table: pa.Table) -> Any:
    """Lay a table's tokens out as the page samples them; 0, which is within responses too, pads."""
    prompts, responses = (
        [torch.tensor(ids, dtype=torch.int64) for ids in trajectory.ragged(table, name)]
        for name in ("prompt_ids", "response_ids")
    )
    starts, lengths = (torch.tensor([len(ids) for ids in column])[:, None] for column in (prompts, responses))
    assert len(starts.unique()) > 2 and len(lengths.unique()) > 2
    columns = torch.arange(int(lengths.max()))
    rows = [torch.cat(row) for row in zip(prompts, responses, strict=True)]
    tokens = torch.nn.functional.pad(pad_sequence(rows, batch_first=True), (0, len(columns)))
    return page.Responses(tokens, starts + columns, columns < lengths)


def test_the_score_rises(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page.main(num_steps=16)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["step", "score"]
    scores = [float(line.split()[1]) for line in lines]
    assert len(scores) == 16
    assert sum(scores[:3]) / 3 < 1.5  # by chance eight digits make 8 / 11
    assert sum(scores[-3:]) / 3 > 3
