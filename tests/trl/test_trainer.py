import math
import random
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MptConfig,
    MptForCausalLM,
)

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
    beside = generate(trainer.model, trainer.tokenizer, GenerateCall(prompts, None, 2, True, greedy, (0,)))
    for found, wanted in zip(beside, alone, strict=True):
        assert found.tolist() == wanted.tolist()


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
        (
            lambda q, r, s: ([q[0], torch.tensor([5, 512]), *q[2:]], r, s),
            r"queries\[1\] has the token id 512; the model knows 0 to 511",
        ),
        (lambda q, r, s: (q, [*r[:3], torch.tensor([5, -100, 6])], s), r"responses\[3\] has the token id -100"),
        (lambda q, r, s: (q, [torch.tensor([-1]), *r[1:]], s), r"responses\[0\] has the token id -1;"),
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


def test_mini_batches_of_one_token_and_returns_that_are_all_the_same(make: Any) -> None:
    trainer = make({"batch_size": 2, "mini_batch_size": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = trainer.step([torch.tensor([5])] * 2, [torch.tensor([6])] * 2, [torch.tensor(1.0)] * 2)
    assert math.isnan(stats["ppo/returns/var"]) and math.isnan(stats["ppo/val/var"])  # as TRL's
    assert math.isfinite(stats["ppo/loss/total"]) and stats["ppo/returns/mean"] == pytest.approx(1)
    stats = trainer_of_equal_returns(make).step([torch.tensor([5])], [torch.tensor([6, 7])], [torch.tensor(1.0)])
    assert stats["ppo/returns/var"] == 0 and stats["ppo/val/var_explained"] == -math.inf


def trainer_of_equal_returns(make: Any) -> PPOTrainer:
    """Without discount and KL every token's return is the score; a value head of zeros keeps it exact."""
    trainer = make({"batch_size": 1, "mini_batch_size": 1, "lam": 1.0, "init_kl_coef": 0.0, "adap_kl_ctrl": False})
    with torch.no_grad():
        for parameter in trainer.model.v_head.parameters():
            parameter.zero_()
    return trainer


def with_gpt2(make: Any, positions: int = 16) -> PPOTrainer:
    """Make a trainer of a model that has learnt a table of positions."""
    config = GPT2Config(vocab_size=400, n_positions=positions, n_embd=16, n_layer=1, n_head=1, eos_token_id=0)
    return make(model=AutoModelForCausalLMWithValueHead(GPT2LMHeadModel(config)))


def test_sequences_beyond_the_positions_of_a_model(make: Any) -> None:
    trainer = with_gpt2(make)
    queries, scores = [torch.tensor([5] * 8)] * 4, [torch.tensor(float(n)) for n in range(4)]
    before = trainer.model.v_head.summary.weight.clone()
    responses = [torch.tensor([6] * 8)] * 3
    with pytest.raises(ValueError, match=r"queries\[3\] and responses\[3\]: 17 tokens; the model has 16 positions"):
        trainer.step(queries, [*responses, torch.tensor([6] * 9)], scores)
    with pytest.raises(ValueError, match=r"a prompt of 8 tokens and max_new_tokens=9: 17 tokens; the model has 16"):
        trainer.generate(queries, **SAMPLING | {"max_new_tokens": 9})
    with pytest.raises(ValueError, match="the model has 16 positions"):
        trainer.generate(queries[0], **SAMPLING | {"max_new_tokens": 9})
    assert torch.equal(before, trainer.model.v_head.summary.weight)
    trainer.step(queries, trainer.generate(queries, return_prompt=False, **SAMPLING | {"max_new_tokens": 8}), scores)
    mpt = MptForCausalLM(MptConfig(vocab_size=400, d_model=16, n_heads=1, n_layers=1, max_seq_len=16))
    with pytest.raises(ValueError, match=r"queries\[0\] and responses\[0\]: 17 tokens; the model has 16 positions"):
        make({"batch_size": 1, "mini_batch_size": 1}, model=AutoModelForCausalLMWithValueHead(mpt)).step(
            [torch.tensor([5] * 8)], [torch.tensor([6] * 9)], scores[:1]
        )
    # positions that are computed have no end, but the model may not have been trained on them
    rotary = make({"batch_size": 1, "mini_batch_size": 1})
    with pytest.warns(UserWarning, match=r"257 tokens; the model's config has 256 positions"):
        rotary.step([torch.tensor([5] * 250)], [torch.tensor([6] * 7)], scores[:1])


def test_prompts_that_the_model_does_not_know_are_refused(make: Any) -> None:
    trainer = make()
    known = torch.tensor([5, 6])
    with pytest.raises(ValueError, match=r"query_tensor\[1\] has the token id -1; the model knows 0 to 511"):
        trainer.generate([known, torch.tensor([-1])], **SAMPLING)
    with pytest.raises(ValueError, match="query_tensor has the token id 512"):
        trainer.generate(torch.tensor([512]), **SAMPLING)
    with pytest.raises(ValueError, match=r"query_tensor\[0\] is torch.int64 \(0,\)"):
        trainer.generate([known[:0]], **SAMPLING)


ENDS = list(range(0, 512, 8))
LONG = SAMPLING | {"max_new_tokens": 24}
PROMPTS = [torch.tensor(ids) for ids in ([5, 6], [7, 8, 9], [10], [11, 12, 13, 14], [1], [2], [3, 4], [4])]


def ended(responses: list[torch.Tensor], ends: list[int]) -> int:
    """Check that each response ends at its first end, or at its limit; return how many came to an end."""
    for response in responses:
        found = [token in ends for token in response.tolist()]
        assert True not in found[:-1] and (found[-1] or len(response) == 24)
    return sum(int(response[-1]) in ends for response in responses)


def test_a_list_is_cut_at_all_that_ends_a_response(make: Any) -> None:
    """The tokenizer's end is 0, and pads; a model that declares others stops there, and padding follows."""
    trainer = make()
    trainer.model.pretrained_model.generation_config.eos_token_id = ENDS[1:]
    many = trainer.generate(PROMPTS, batch_size=8, return_prompt=False, **LONG)
    alone = [trainer.generate(prompt, return_prompt=False, **LONG)[0] for prompt in PROMPTS]
    assert ended(many, ENDS) > 4 and ended(alone, ENDS) > 4
    given = trainer.generate(PROMPTS, batch_size=8, return_prompt=False, eos_token_id=ENDS[1:33], **LONG)
    assert ended(given, ENDS[1:33]) > 2
    for never in (-1, 100_000, None):
        whole = trainer.generate(PROMPTS, batch_size=8, return_prompt=False, eos_token_id=never, **LONG)
        assert {len(response) for response in whole} == {24}
    with pytest.raises(ValueError, match=r"eos_token_id='</s>' is neither a token id nor a list of them"):
        trainer.generate(PROMPTS, eos_token_id="</s>", **LONG)


def test_transformers_is_told_all_that_ends_a_response(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, told = make(), []
    trainer.model.pretrained_model.generation_config.eos_token_id = 7
    generate = trainer.model.generate

    def record(**arguments: Any) -> Any:
        told.append(arguments["eos_token_id"])
        return generate(**arguments)

    monkeypatch.setattr(trainer.model, "generate", record)
    for queries in (PROMPTS[0], PROMPTS):
        trainer.generate(queries, batch_size=8, **SAMPLING)
        trainer.generate(queries, batch_size=8, eos_token_id=torch.tensor([9, 3]), **SAMPLING)
        trainer.generate(queries, batch_size=8, generation_config=GenerationConfig(eos_token_id=[4]), **SAMPLING)
    assert told == [[0, 7], [3, 9], [4]] * 2


def test_what_ended_a_response_counts_in_the_step(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, reasons = make(), []
    monkeypatch.setattr(
        trainer, "_update", lambda table, temperature: reasons.extend(table.column("finish_reason").to_pylist())
    )
    responses = [torch.tensor([3, last]) for last in (0, 7, 9, 9)]
    for arguments in ({}, {"eos_token_id": [9, 600]}, None):
        if arguments is not None:
            trainer.model.pretrained_model.generation_config.eos_token_id = [7]
            trainer.generate(PROMPTS[0], **SAMPLING, **arguments)
        with pytest.raises(TypeError):  # there is no update
            trainer.step(PROMPTS[:4], responses, [torch.tensor(0.0)] * 4)
    assert reasons[:4] == ["stop", "stop", "length", "length"]
    assert reasons[4:8] == ["length", "length", "stop", "stop"]
    assert reasons[8:] == reasons[:4]


def test_a_padding_token_without_an_embedding_pads_all_the_same(make: Any) -> None:
    trainer = make()
    trainer.tokenizer.add_tokens([f"new {n}" for n in range(200)])
    trainer.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert trainer.tokenizer.pad_token_id >= 512
    for arguments in (LONG | {"pad_token_id": None}, LONG | {"pad_token_id": trainer.tokenizer.pad_token_id}):
        responses = trainer.generate(PROMPTS, batch_size=8, return_prompt=False, eos_token_id=ENDS, **arguments)
        assert ended(responses, ENDS) > 4
    with pytest.raises(ValueError, match=r"pad_token_id=\d+, remove_padding=False\): the model knows 0 to 511"):
        trainer.generate(PROMPTS, remove_padding=False, **LONG | {"pad_token_id": None})


def test_what_stops_without_a_token_is_for_one_prompt_at_a_time(make: Any) -> None:
    trainer = make()
    with pytest.raises(ValueError, match=r"generate\(stop_strings=..., batch_size=4\): the padding behind"):
        trainer.generate(PROMPTS, stop_strings=["a"], tokenizer=trainer.tokenizer, **LONG)
    responses = trainer.generate(
        PROMPTS, batch_size=1, return_prompt=False, stop_strings=["a"], tokenizer=trainer.tokenizer, **LONG
    )
    for response in responses:
        texts = [trainer.tokenizer.decode([token]) for token in response.tolist()]
        assert not any("a" in text for text in texts[:-1])


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
