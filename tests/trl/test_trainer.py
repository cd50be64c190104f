import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ray.errors import NonFiniteError
from ppo_ray.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_ray.trl.generation import GenerateCall, generate

SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6, "pad_token_id": 0}
STATISTICS = {  # every key of TRL 0.11.3's step
    *("objective/kl", "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs", "objective/kl_coef"),
    *("objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/std_scores"),
    *("tokens/queries_len_mean", "tokens/queries_len_std", "tokens/queries_dist"),
    *("tokens/responses_len_mean", "tokens/responses_len_std", "tokens/responses_dist"),
    *("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy", "ppo/policy/approxkl"),
    *("ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/policy/advantages", "ppo/policy/advantages_mean"),
    *("ppo/policy/ratio", "ppo/returns/mean", "ppo/returns/var", "ppo/val/vpred", "ppo/val/error"),
    *("ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var", "ppo/val/var_explained", "ppo/learning_rate"),
    *("time/ppo/forward_pass", "time/ppo/compute_rewards", "time/ppo/compute_advantages"),
    *("time/ppo/optimize_step", "time/ppo/calc_stats", "time/ppo/total"),
}


@pytest.fixture
def make(tiny_policy: Path) -> Any:
    def make(config: dict[str, Any] | None = None, **arguments: Any) -> PPOTrainer:
        options = {"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-3} | (config or {})
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy)
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
        return PPOTrainer(PPOConfig(**options), **{"model": model, "tokenizer": tokenizer} | arguments)

    return make


def batch(trainer: PPOTrainer) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    queries = [torch.tensor(ids) for ids in ([5, 6], [7, 8, 9], [10], [11, 12, 13, 14])]
    responses = trainer.generate(queries, return_prompt=False, **SAMPLING)
    return queries, responses, [torch.tensor(float(len(response))) for response in responses]


def test_a_step_returns_every_statistic_of_trls_and_finite(make: Any) -> None:
    trainer = make()
    stats = trainer.step(*batch(trainer))
    assert set(stats) == STATISTICS
    assert all(np.isfinite(value).all() for value in stats.values())
    assert stats["objective/logprobs"].shape[0] == 4
    assert stats["objective/kl"] == 0 and stats["ppo/learning_rate"] == 1e-3


def test_the_model_that_was_given_is_trained_and_dropout_stays_off(make: Any) -> None:
    trainer = make()
    model = trainer.model
    before = model.pretrained_model.get_output_embeddings().weight.clone()
    head = model.v_head.summary.weight.clone()
    trainer.step(*batch(trainer))
    assert not torch.equal(before, model.pretrained_model.get_output_embeddings().weight)
    assert not torch.equal(head, model.v_head.summary.weight)
    assert not model.training  # TRL leaves it in train mode, and samples the next responses with dropout


def test_making_a_trainer_seeds_the_global_generators(make: Any) -> None:
    make({"seed": 7})
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert drawn[:2] == (random.random(), float(np.random.rand()))
    make({"seed": 7})
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))


def test_an_optimizer_and_a_scheduler_of_ones_own_are_used(make: Any, tiny_policy: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    trainer = make({"ppo_epochs": 1}, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    bias = model.v_head.summary.bias.clone()
    rates = [trainer.step(*batch(trainer))["ppo/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.5, 0.05, 0.005])
    assert trainer.optimizer is optimizer
    assert not torch.equal(bias, model.v_head.summary.bias)


def test_the_kl_coefficient_is_seen_and_set(make: Any) -> None:
    trainer = make({"horizon": 100})
    trainer.step(*batch(trainer))
    assert trainer.kl_ctl.value == pytest.approx(0.2 * (1 - 0.2 * 4 / 100))
    trainer.kl_ctl.value = 0.5
    assert trainer.step(*batch(trainer))["objective/kl_coef"] == 0.5


def test_generation_for_one_and_for_many(make: Any) -> None:
    trainer = make()
    query = torch.tensor([5, 6, 7])
    whole = trainer.generate(query, **SAMPLING)
    assert whole.shape[0] == 1 and whole[0, :3].tolist() == [5, 6, 7] and whole.shape[1] <= 9
    assert trainer.generate(query, return_prompt=False, **SAMPLING).shape[1] <= 6
    pair = trainer.generate(query, generate_ref_response=True, **SAMPLING)
    assert len(pair) == 2
    lengths = iter([1, 2, 3])
    many = trainer.generate(
        [query, query[:1], query[:2]],
        length_sampler=lambda: next(lengths),
        batch_size=1,
        return_prompt=False,
        **{name: value for name, value in SAMPLING.items() if name != "max_new_tokens"},
    )
    assert [len(response) for response in many] == [1, 2, 3] or 0 in torch.cat(many)


def test_left_padding_changes_no_distribution(make: Any) -> None:
    """A prompt answered beside a longer one is answered as it is alone."""
    trainer = make()
    prompts = [torch.tensor([5]), torch.tensor([7, 8, 9, 10, 11, 12])]
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    alone = [trainer.model.generate(p[None], attention_mask=torch.ones_like(p)[None], **greedy)[0] for p in prompts]
    beside = generate(trainer.model, trainer.tokenizer, GenerateCall(prompts, None, 2, True, greedy))
    for found, wanted in zip(beside, alone, strict=True):
        assert found.tolist() == wanted[: len(found)].tolist()


def test_the_temperature_that_was_sampled_at_counts_in_the_step(make: Any) -> None:
    trainer = make()
    queries, responses, scores = batch(trainer)
    trainer.step(queries, responses, scores)
    trainer.generate(queries[0], temperature=0.5, **SAMPLING)
    with pytest.raises(ValueError, match="must share one temperature"):
        trainer.generate(queries[0], temperature=0.7, **SAMPLING)
    stats = trainer.step(queries, responses, scores)
    with torch.no_grad():
        ids = torch.cat([queries[2], responses[2]])
        logits = trainer.ref_model.pretrained_model(ids[None]).logits[0, :-1] / 0.5
    wanted = logits.log_softmax(-1)[range(len(responses[2])), responses[2]]
    np.testing.assert_allclose(stats["objective/ref_logprobs"][2, : len(wanted)], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, r, s: (q[:3], r, s), "queries has 3 tensors, but batch_size=4"),
        (lambda q, r, s: (q, tuple(r), s), "responses must be a list of tensors"),
        (lambda q, r, s: (q, r, [1.0] * 4), "scores must be a list of tensors"),
        (lambda q, r, s: (q, r, [*s[:3], torch.tensor(float("nan"))]), r"scores\[3\] is nan"),
        (lambda q, r, s: (q, r, [*s[:3], torch.zeros(2)]), r"scores\[3\] has shape \(2,\)"),
        (lambda q, r, s: (q, [*r[:3], r[3][None]], s), r"responses\[3\] is torch.int64"),
        (lambda q, r, s: (q, [*r[:3], r[3][:0]], s), r"responses\[3\]"),
        (lambda q, r, s: (q, r, s, [torch.zeros_like(x) for x in r]), "response_masks cannot be honoured"),
    ],
)
def test_a_wrong_batch_is_refused_and_nothing_is_learnt(make: Any, change: Any, message: str) -> None:
    trainer = make()
    before = trainer.model.v_head.summary.weight.clone()
    with pytest.raises(ValueError, match=message):
        trainer.step(*change(*batch(trainer)))
    assert torch.equal(before, trainer.model.v_head.summary.weight)


def test_a_single_response_token_is_refused_and_nothing_is_learnt(make: Any) -> None:
    trainer = make({"batch_size": 1, "mini_batch_size": 1})
    before = trainer.model.v_head.summary.weight.clone()
    query, score = torch.tensor([5, 6]), torch.tensor(1.0)
    with pytest.raises(ValueError, match="batch_size=1 and responses.0. has one token.*larger batch_size"):
        trainer.step([query], [torch.tensor([7])], [score])
    assert torch.equal(before, trainer.model.v_head.summary.weight)
    stats = trainer.step([query], [torch.tensor([7, 8])], [score])  # two tokens are enough
    assert stats["objective/kl"] == 0 and stats["tokens/responses_len_mean"] == 2
    assert not torch.equal(before, trainer.model.v_head.summary.weight)


def test_masks_of_ones_are_fine(make: Any) -> None:
    trainer = make()
    queries, responses, scores = batch(trainer)
    trainer.step(queries, responses, scores, [torch.ones_like(response) for response in responses])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, "model must be a ppo_ray.trl.AutoModelForCausalLMWithValueHead"),
        ({"ref_model": torch.nn.Linear(1, 1)}, "ref_model must be"),
        ({"tokenizer": None}, "tokenizer must be a transformers tokenizer"),
        ({"training_data_collator": list}, "training_data_collator cannot be honoured"),
        ({"lr_scheduler": object()}, "lr_scheduler must be"),
    ],
)
def test_arguments_that_cannot_be_honoured_raise(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_loss_that_is_not_finite_is_an_error(make: Any) -> None:
    trainer = make({"cliprange_value": 1e30})
    queries, responses, _ = batch(trainer)
    with pytest.raises(NonFiniteError):
        trainer.step(queries, responses, [torch.tensor(x) for x in (1e30, -1e30, 3e38, 1e30)])


def test_the_dataloader_brings_whole_shuffled_batches(make: Any) -> None:
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[i] for i in range(10)], "query": list("abcdefghij"), "junk": [0] * 10}
    )
    trainer = make(dataset=rows, data_collator=lambda rows: {key: [row[key] for row in rows] for key in rows[0]})
    batches = list(trainer.dataloader)
    assert [len(one["query"]) for one in batches] == [4, 4]
    assert set(batches[0]) == {"input_ids", "query"}


def test_statistics_are_logged(make: Any, tmp_path: Path) -> None:
    trainer = make({"log_with": "tensorboard", "project_kwargs": {"logging_dir": str(tmp_path)}})
    queries, responses, scores = batch(trainer)
    trainer.log_stats(trainer.step(queries, responses, scores), {"query": [""] * 4, "response": [""] * 4}, scores)
    trainer.accelerator.end_training()
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    assert b"env/reward_mean" in events and b"objective/kl" in events
    assert trainer.current_step == 1


def test_what_is_saved_can_be_trained_on(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.step(*batch(trainer))
    trainer.save_pretrained(tmp_path)
    again = make(model=AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))
    assert torch.equal(again.model.v_head.summary.weight, trainer.model.v_head.summary.weight)
    assert AutoTokenizer.from_pretrained(tmp_path)("film")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0


def test_shared_layers_are_not_trained(make: Any) -> None:
    trainer = make(num_shared_layers=1)
    layer = trainer.model.pretrained_model.model.layers[0].mlp.up_proj.weight
    before = layer.clone()
    trainer.step(*batch(trainer))
    assert torch.equal(before, layer)
    other = trainer.ref_model.pretrained_model.model.layers[1].mlp.up_proj.weight
    assert not torch.equal(other, trainer.model.pretrained_model.model.layers[1].mlp.up_proj.weight)
