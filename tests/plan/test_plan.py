"""What a run holds in memory, worked by hand for the tiny models and held against what they really hold."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from ppo_ray.cli import app
from ppo_ray.config import Config, load_config
from ppo_ray.errors import InputError
from ppo_ray.learner.batch import Layout, ResponseBatch
from ppo_ray.learner.ranks import Ranks
from ppo_ray.models import token_logprobs
from ppo_ray.models.attention import attend, make_bounds
from ppo_ray.plan import ClusterShape, ModelSizes, Plan, make_plan
from ppo_ray.plan.adapters import sends_adapters
from ppo_ray.plan.cluster import GIB
from ppo_ray.plan.learner import KEPT_ENTRIES, learner_terms, widest_row
from ppo_ray.plan.memory import Term
from ppo_ray.plan.plan import describe_stop, find_stop_problem
from ppo_ray.run.folder import RunFolder
from ppo_ray.run.run import describe_run
from tests.learning import make_learner, make_table

MIB = 1 << 20
LAYER = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128  # q and o, k and v, feed-forward, norms
POLICY = 512 * 128 + 2 * LAYER + 128  # the tied embedding, two layers, the last norm
TRAINED = POLICY + 129  # and the value head
KEPT = 2 * (4 * (8 * 128 + 2 * 64 + 4 * 256) + 8) + 4 * 2 * 128 + 4 + 4 * 2 * 32 + 8
"""Bytes that the policy keeps of a token: per layer two norms' inputs, normed inputs and outputs, queries, keys and
values, attention's result, four of the feed-forward width, two norms' factors; the last norm; cosines and sines; the
token's own number."""
KEPT_ROUNDED = 2 * (2 * (10 * 128 + 2 * 64 + 4 * 256) + 8) + (4 + 2) * 128 + 4 + 2 * 2 * 32 + 8
"""The same in bfloat16, where norms keep their inputs in float32."""
CLASSIFIER = 512 * 32 + 128 * 32 + 2 * 32 + 64 + 4 * (32 * 32 + 32) + 2 * 64 + 2 * 32 * 64 + 96 + 33 * 32 + 66

Configured = Callable[..., Config]


@pytest.fixture
def configured(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path) -> Configured:
    base = (f"model.path={tiny_policy}", f"reward.path={tiny_classifier}", f"prompts.path={tiny_prompts}")
    base += ("output_dir=x", "rollout.batch_size=8", "rollout.kv_cache_mib=32", "learner.microbatch_tokens=100")
    base += ("prompts.max_tokens=8", "rollout.max_response_tokens=16", "rollout.max_context=512")
    return lambda *overrides: load_config(None, [*base, *overrides])


def planned(config: Config, cluster: ClusterShape) -> Plan:
    return make_plan(config, cluster, ModelSizes.read(config))


def amounts(terms: tuple[Term, ...]) -> dict[str, int]:
    return {term.what: term.num_bytes for term in terms}


def test_models_are_measured_by_their_configs_alone(configured: Configured, tmp_path: Path) -> None:
    sizes = ModelSizes.read(configured())
    assert (sizes.policy.parameters, POLICY) == (361_088, 361_088)
    assert [size.parameters for size in sizes.classifiers] == [CLASSIFIER] == [30_274]
    assert (sizes.policy.key_values, sizes.critic) == (2 * 2 * 32, None)
    rounded = ModelSizes.read(configured("model.dtype=bfloat16"))
    assert (sizes.policy.activation_bytes, rounded.policy.activation_bytes) == (KEPT, KEPT_ROUNDED)
    large = tmp_path / "large"  # 70 billion parameters that nobody has
    large.mkdir()
    (large / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, '
        '"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false}'
    )
    assert ModelSizes.read(configured(f"model.path={large}")).policy.parameters == 70_553_706_496
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(
        '{"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32}'
    )
    gpt2 = ModelSizes.read(configured(f"model.path={small}")).policy
    layer = 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64 + 2 * 128
    assert gpt2.parameters == 100 * 64 + 32 * 64 + 2 * layer + 128 == 108_544
    assert (gpt2.key_values, gpt2.intermediate, gpt2.layers) == (2 * 64, 256, 2)
    with pytest.raises(InputError, match=r"reward.path=nowhere/at-all: its size is not known"):
        ModelSizes.read(configured("reward.path=nowhere/at-all"))


def test_the_arithmetic_of_a_cpu_run(configured: Configured) -> None:
    found = planned(configured(), ClusterShape.uniform(1, cpus=2, memory=8 * GIB))
    process = {"process": 350 * MIB}
    assert amounts(found.terms["learner-0"]) == process | {
        "float32 weights": 4 * TRAINED,
        "gradients": 4 * TRAINED,
        "Adam's two moments": 8 * TRAINED,
        "reference": 4 * POLICY,
        "activations": 100 * KEPT,
        "attention probabilities": 100 * 4 * 24 * 2 * 4,  # sequences of 24 tokens are one block
        "a layer's backward pass": 100 * (5 * 128 + 2 * 256) * 4,  # more than the probabilities, freed by then
    }  # weights are published through a bucket in memory that a pass has freed
    assert amounts(found.terms["rollout-0"]) == {
        "process": 600 * MIB,
        "weights": 4 * POLICY,
        "KV cache": 32 * MIB,
        "packed copy of the head": 4 * 512 * 128,
        "embedding that is being replaced": 4 * 512 * 128,
    }
    assert amounts(found.terms["reward-0"])["classifier"] == 4 * CLASSIFIER
    assert amounts(found.store_terms)["weights on their way"] == 4 * POLICY
    assert amounts(found.disk_terms)["checkpoints"] == (2 + 1 + 1) * 12 * TRAINED
    (node,) = found.nodes
    everything = [term for terms in (*found.terms.values(), found.store_terms) for term in terms]
    assert node.needed == sum(term.num_bytes for term in everything) + 1050 * MIB  # and Ray itself
    assert found.fits


def test_of_lengths_that_are_drawn_the_mean_is_planned_and_three_deviations(configured: Configured) -> None:
    """The notebook's: 2 to 7 and 4 to 15 tokens, of mean 4.5 and 9.5 and variance 35 / 12 and 143 / 12."""
    options = (
        "prompts.min_tokens=2",
        "prompts.max_tokens=7",
        "rollout.batch_size=32",
        "rollout.max_response_tokens=15",
    )
    options += ("learner.microbatch_tokens=1000",)

    def count(*more: str) -> float:
        found = planned(configured(*options, *more), ClusterShape.uniform(1, cpus=2))
        return amounts(found.terms["learner-0"])["activations"] / KEPT

    assert count() == pytest.approx(32 * (4.5 + 15) + 3 * (32 * 35 / 12) ** 0.5, abs=1)
    assert count("rollout.min_response_tokens=4") == pytest.approx(32 * 14 + 3 * (32 * 178 / 12) ** 0.5, abs=1)
    assert count("rollout.batch_size=128") == 1000
    assert count("prompts.min_tokens=null") == 32 * 22


@pytest.mark.parametrize(("gpus", "rows"), [(0, 512), (1, 999)])
def test_of_more_probabilities_than_are_kept_a_block_is_planned(configured: Configured, gpus: int, rows: int) -> None:
    assert KEPT_ENTRIES == token_logprobs._KEPT_ENTRIES == 1 << 28
    config = configured("rollout.batch_size=64", "learner.microbatch_tokens=1000", f"learner.gpus={gpus}")
    sizes = ModelSizes.read(config)
    for vocabulary, tokens in ((268_435, 1000), (268_436, rows)):
        wide = replace(sizes, policy=replace(sizes.policy, vocabulary=vocabulary))
        terms = amounts(tuple(learner_terms(config, wide, 0)))
        assert terms["probabilities"] == 4 * vocabulary * tokens
        summed = terms.get("the head's gradient, which is being summed", 0)
        assert summed == (4 * vocabulary * 128 if vocabulary == 268_436 else 0)
    assert token_logprobs.count_rows(torch.device("cuda" if gpus else "cpu"), 268_436)[0] == rows


@pytest.mark.parametrize(("shortest", "longest", "tokens"), [(16, 16, 128), (4, 16, 80 + 32), (2, 2, 16)])
def test_no_more_probabilities_are_planned_than_a_step_has_response_tokens(
    configured: Configured, shortest: int, longest: int, tokens: int
) -> None:
    """Of 8 responses in one pass; of 4 to 16 tokens: three deviations of 8 x (13^2 - 1) / 12, rounded up, are 32."""
    lengths = (f"rollout.min_response_tokens={shortest}", f"rollout.max_response_tokens={longest}")
    config = configured("learner.microbatch_tokens=1000", *lengths)
    sizes = ModelSizes.read(config)
    wide = replace(sizes, policy=replace(sizes.policy, vocabulary=10_000))  # so that they are what takes most
    assert amounts(tuple(learner_terms(config, wide, 0)))["probabilities"] == 4 * 10_000 * tokens


def test_what_layers_keep_is_estimated_where_a_model_cannot_say(configured: Configured, tmp_path: Path) -> None:
    """OPT's code asks for the values of its mask."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "opt", "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"vocab_size": 100, "max_position_embeddings": 32, "word_embed_proj_dim": 64}'
    )
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        sizes = ModelSizes.read(configured(f"model.path={tmp_path}", f"model.dtype={dtype}"))
        assert sizes.policy.activation_bytes == 2 * (12 * 64 + 4 * 256) * size


def test_a_disk_too_slow_for_a_run_that_is_stopped_is_said(configured: Configured) -> None:
    config = configured("ray.stop_timeout_s=10")
    sizes, size = ModelSizes.read(config), 12 * TRAINED
    assert size == pytest.approx(4.3e6, rel=0.02)
    assert find_stop_problem(config, sizes, size / 5) is None
    problem = find_stop_problem(config, sizes, size / 6) or ""
    assert problem.startswith(
        "a checkpoint has 0.00 GiB, and the disk of output_dir takes 0.72 MB/s from one process: "
    )
    assert "to write it takes about 6 s. ray.stop_timeout_s=10 s must be enough" in problem
    assert "Set it to 12 or more" in problem
    assert "the disk must take 0.87 MB/s" in describe_stop(config, sizes)  # to have written it in five seconds


def test_without_values_nothing_is_held_for_them(configured: Configured) -> None:
    groups = ("ppo.advantages=grpo", "rollout.responses_per_prompt=4", "rollout.workers=2")
    found = planned(configured(*groups), ClusterShape.uniform(1, cpus=2, memory=8 * GIB))
    learner = amounts(found.terms["learner-0"])
    assert (learner["float32 weights"], learner["Adam's two moments"]) == (4 * POLICY, 8 * POLICY)
    assert amounts(found.disk_terms)["checkpoints"] == (2 + 1 + 1) * 12 * POLICY
    assert configured(*groups, "rollout.batch_size=12").rollout.share == 8  # groups are whole: two and one


def test_on_one_gpu_the_hungriest_of_all_counts_where_they_take_turns(configured: Configured) -> None:
    gpus = ("rollout.gpus=1", "learner.gpus=1", "reward.gpus=1", "rollout.dtype=bfloat16")
    shared = planned(configured(*gpus, "ray.placement=colocated"), ClusterShape.uniform(1, 8, 1, 64 * GIB, 8 * GIB))
    (gpu,) = shared.gpus
    kept = (12 * TRAINED + 4 * POLICY) + 4 * CLASSIFIER + 24 * 8 * (4 * 32 + 2 * 64) * 4
    cuda = (4000 + 800 + 1000 + 2 * 256) * MIB  # and a bucket of weights, lent and read
    engine = 2 * POLICY + 32 * MIB
    learning = 4 * TRAINED + 100 * KEPT + 100 * (5 * 128 + 2 * 256) * 4
    assert learning < engine  # tiny models: the KV cache is the largest thing there is
    assert gpu.needed == kept + cuda + engine
    assert gpu.actors == ("rollout-0", "learner-0", "reward-0")
    assert amounts(shared.terms["rollout-0"])["weights of the sleeping engine"] == 3 * POLICY  # on the host

    apart = planned(configured(*gpus), ClusterShape.uniform(1, 8, 3, 64 * GIB, 8 * GIB))
    assert [need.actors for need in apart.gpus] == [("learner-0",), ("rollout-0",), ("reward-0",)]
    assert apart.gpus[1].needed == engine + (4000 + 256) * MIB
    halves = configured("rollout.gpus=0.5", "learner.gpus=0.5", "rollout.dtype=bfloat16")  # nobody waits for the other
    (gpu,) = planned(halves, ClusterShape.uniform(1, 8, 1, 64 * GIB, 8 * GIB)).gpus
    masks = 100 * 80 * 2 * 4  # rows of 64 tokens, or a quarter more
    assert gpu.needed == engine + learning + masks + 12 * TRAINED + 4 * POLICY + (4000 + 1000) * MIB


def test_no_row_under_a_mask_is_wider_than_planned_and_some_are_as_wide(configured: Configured) -> None:
    """Where responses share their prompt, rows are wider than any sequence; packed by the learner's own code."""
    options = ("prompts.max_tokens=60", "rollout.max_response_tokens=20", "learner.microbatch_tokens=256")
    planned_width = widest_row(configured(*options), 128)
    assert planned_width == 175 + 43  # the root of 4 x 60 x 128, and a quarter
    rng, widest = np.random.default_rng(0), 0
    layout = Layout(256, 64, torch.device("cpu"), Ranks(), hidden_size=128, in_one_row=True)
    for _ in range(150):
        number, num_prompts = rng.integers((2, 1), (60, 4)).tolist()
        prompts = [rng.integers(1, 500, rng.integers(16, 61)) for _ in range(num_prompts)]
        table = make_table(number, lengths=[(1, int(length)) for length in rng.integers(1, 21, number)])
        batch = replace(ResponseBatch.from_table(table), prompt_ids=[prompts[i % num_prompts] for i in range(number)])
        passes = layout.passes(batch, np.arange(number))
        widest = max([widest, *(rows.input_ids.shape[1] for rows in passes if rows.bounds is None)])
    assert 0.8 * planned_width < widest <= planned_width


@pytest.mark.parametrize("length", [24, 192, 256, 257])
def test_attention_on_a_cpu_keeps_the_probabilities_that_are_planned(configured: Configured, length: int) -> None:
    config = configured(f"rollout.max_response_tokens={length - 8}", "learner.microbatch_tokens=10000")
    found = amounts(planned(config, ClusterShape.uniform(1, cpus=2, memory=8 * GIB)).terms["learner-0"])
    tensors = [torch.randn(1, heads, 8 * length, 32, requires_grad=True) for heads in (4, 2, 2)]
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attend(torch.nn.Module(), *tensors, make_bounds([length] * 8))
    more = sum(tensor.nbytes for tensor in kept if tensor.untyped_storage().data_ptr() not in inputs)
    assert found.get("attention probabilities", 0) == 2 * more


def test_ranks_of_an_engine_share_its_weights(configured: Configured) -> None:
    config = configured("rollout.gpus=1", "rollout.tensor_parallel=2", "learner.gpus=1")
    found = planned(config, ClusterShape.uniform(1, 8, 3, 64 * GIB))
    assert amounts(found.terms["rollout-0"])["weights"] == 2 * POLICY // 2
    assert [need.actors for need in found.gpus] == [("learner-0",), ("rollout-0",), ("rollout-0",)]
    assert found.gpus[0].available is None and found.fits  # what is not known is not refused


def test_ranks_of_a_learner_share_its_state_and_gather_layers(configured: Configured) -> None:
    sharing = ("learner.workers=4", "learner.sharding=fsdp2", "learner.gradient_checkpointing=true")
    options = ("model.dtype=bfloat16", "learner.gpus=1", "rollout.gpus=1")
    found = planned(configured(*sharing, *options), ClusterShape.uniform(1, 8, 5, 64 * GIB))
    assert amounts(found.terms["learner-0"]) == {
        "process": 350 * MIB,
        "CUDA": 1000 * MIB,
        "float32 weights": TRAINED,
        "gradients": TRAINED,
        "Adam's two moments": 2 * TRAINED,
        "reference": POLICY // 2,
        "gathered: embeddings, a layer": 2 * (512 * 128 + (2 * LAYER + 128) // 2),
        "the largest model, before it is shared out": 4 * POLICY,
        "the embeddings' gradients": 2 * 512 * 128,
        "a layer's gradients that are being reduced": (2 * LAYER + 128) // 2 * (2 + 4),
        "activations": 100 * 2 * 128 * 2,
        "a layer's backward pass": 100 * ((2 * 128 + 2 * 256) * 2 + KEPT_ROUNDED // 2),
        "a layer's attention masks": 100 * 80 * 2,
        "a bucket of weights (nccl)": 256 * MIB,
        "a checkpoint on its way to the disk": 12 * TRAINED // 4,
    }
    assert "the largest model, before it is shared out" not in amounts(found.terms["learner-1"])
    assert "weights on their way" not in amounts(found.store_terms)  # they go by NCCL
    copies = amounts(planned(configured(*options), ClusterShape.uniform(1, 8, 5, 64 * GIB)).terms["learner-0"])
    found_types = (copies["float32 weights"], copies["bfloat16 weights"], copies["reference"])
    assert found_types == (4 * TRAINED, 2 * TRAINED, 2 * POLICY)


def test_groups_of_ranks_share_less_and_smaller_gradients_travel(configured: Configured) -> None:
    sharing = ("learner.workers=4", "learner.sharding=fsdp2", "learner.gpus=1", "rollout.gpus=1")
    cluster = ClusterShape.uniform(1, 8, 5, 64 * GIB)
    whole = amounts(planned(configured(*sharing), cluster).terms["learner-1"])
    halves = planned(configured(*sharing, "learner.shard_size=2", "learner.reduce_dtype=bfloat16"), cluster)
    terms = amounts(halves.terms["learner-1"])
    shared = ("float32 weights", "gradients", "Adam's two moments", "reference")
    assert [terms[what] for what in shared] == [2 * whole[what] for what in shared]
    reduced = "a layer's gradients that are being reduced"
    assert (terms[reduced], whole[reduced]) == ((2 * LAYER + 128) // 2 * 6, (2 * LAYER + 128) // 2 * 8)
    assert terms["a checkpoint on its way to the disk"] == 12 * TRAINED // 4


def test_what_is_put_away_is_on_the_gpu_at_work_alone_and_on_the_host_always(configured: Configured) -> None:
    options = ("ray.placement=colocated", "learner.gpus=1", "rollout.gpus=1", "model.dtype=bfloat16")
    cluster = ClusterShape.uniform(1, 8, 1, 64 * GIB, 16 * GIB)
    stays, leaves = (
        planned(configured(*options, *more), cluster) for more in ((), ("learner.offload=[optimizer, reference]",))
    )

    def held(found: Plan, device: str, when: str = "always") -> int:
        terms = found.terms["learner-0"]
        return sum(term.num_bytes for term in terms if (term.device, term.when) == (device, when))

    moments, masters, reference = 8 * TRAINED, 4 * TRAINED, 2 * POLICY
    assert held(leaves, "gpu") == held(stays, "gpu") - moments - masters - reference
    assert held(leaves, "host") == held(stays, "host") + moments + masters + reference
    assert held(leaves, "gpu", "at work") == held(stays, "gpu", "at work") + moments + masters  # no reference then
    terms = amounts(leaves.terms["learner-0"])
    assert terms["reference, when it is not at work"] == reference and "reference" not in terms
    separate = ("model.lora.rank=1", f"model.reference_path={configured().model.path}", "learner.microbatch_tokens=1")
    before = amounts(
        planned(configured(*options, *separate, "learner.offload=[reference]"), cluster).terms["learner-0"]
    )
    assert before["reference"] == reference and "gradients" not in before  # the moment that takes most


ADAPTERS = 2 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))  # of rank 4, in two layers


def test_adapters_are_what_is_stepped_and_saved_and_the_base_is_there_once(configured: Configured) -> None:
    cluster = ClusterShape.uniform(1, 8, 0, 64 * GIB)
    found = planned(configured("model.lora.rank=4", "model.dtype=bfloat16"), cluster)
    terms = amounts(found.terms["learner-0"])
    assert "reference" not in terms and "bfloat16 weights" not in terms
    stepped = ADAPTERS + 129
    assert (terms["float32 adapters and value head"], terms["gradients"]) == (4 * stepped, 4 * stepped)
    assert terms["Adam's two moments"] == 8 * stepped
    assert terms["frozen base"] == 2 * POLICY
    assert amounts(found.disk_terms)["checkpoints"] == 4 * 12 * stepped
    alone = planned(configured("model.lora.rank=4", "rollout.adapter_sync=adapter", "model.dtype=bfloat16"), cluster)
    elsewhere = planned(configured("ray.address=auto"), cluster)  # a Ray that may keep for a second what was dropped
    assert amounts(elsewhere.store_terms)["weights on their way"] == 2 * 4 * POLICY
    assert amounts(alone.store_terms)["weights on their way"] == 4 * ADAPTERS
    engine = amounts(alone.terms["rollout-0"])
    assert engine["adapters, and those that replace them"] == 2 * 4 * ADAPTERS
    assert "embedding that is being replaced" not in engine
    separate = ("model.lora.rank=4", "model.critic=separate")
    both = amounts(planned(configured(*separate), cluster).terms["learner-0"])
    assert both["gradients"] == 4 * (2 * ADAPTERS + 129) and "the critic's frozen base" not in both
    ranks = ("learner.workers=2", "learner.sharding=fsdp2")
    assert amounts(planned(configured(*separate, *ranks), cluster).terms["learner-0"])["the critic's frozen base"] > 0
    some = amounts(
        planned(configured("model.lora={rank: 2, targets: [q_proj, down_proj]}"), cluster).terms["learner-0"]
    )
    assert some["gradients"] == 4 * (2 * 2 * (128 + 128 + 256 + 128) + 129)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("int8", 8 + 32 / 155)])
def test_codes_of_the_base_are_counted_and_what_has_none_is_as_before(
    kind: str, bits: float, configured: Configured
) -> None:
    options = ("model.lora.rank=4", "learner.gpus=1", "model.dtype=bfloat16", f"model.quantization={kind}")
    cluster = ClusterShape.uniform(1, 8, 2, 64 * GIB, 79 * GIB)
    found = planned(configured(*options), cluster)
    terms = amounts(found.terms["learner-0"])
    maps = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert terms["frozen base"] == 2 * (POLICY - maps)
    assert terms["frozen base in codes"] == pytest.approx(maps * bits / 8, rel=0.01)
    assert terms["frozen base, before it gets codes"] == 4 * POLICY
    assert terms["a bucket of weights to publish"] == 2 * POLICY  # engines get whole weights, in one bucket here
    assert "reference" not in terms
    assert terms["Adam's two moments"] == 8 * (ADAPTERS + 129)
    separate = amounts(planned(configured(*options, "model.critic=separate"), cluster).terms["learner-0"])
    assert separate["frozen base in codes"] == terms["frozen base in codes"]  # in memory once


def test_what_engines_are_sent_of_adapters(configured: Configured) -> None:
    lora, gpus = "model.lora.rank=4", ("rollout.gpus=1", "learner.gpus=1")
    for options, alone in (
        ((), False),
        ((lora,), False),
        ((lora, "rollout.adapter_sync=adapter"), True),
        ((lora, "rollout.engine=hf", "rollout.adapter_sync=adapter"), True),
        ((lora, *gpus), True),
        ((lora, *gpus, "rollout.adapter_sync=merged"), False),
        ((lora, *gpus, "model.quantization=nf4"), False),  # engines would read weights that are not quantised
        ((lora, *gpus, "rollout.engine=hf"), False),
        ((lora, *gpus, "rollout.dtype=float32"), False),
    ):
        assert sends_adapters(configured(*options)) is alone, options


SEQUENCE = 8 + 16 + 16  # tokens of prompt and response, and a block that is filled in part


def test_keys_and_values_have_room_for_all_or_for_what_a_gpu_has(configured: Configured) -> None:
    """On a GPU in bfloat16, 2 layers x 2 x 2 heads x 32 x 2 bytes a token."""
    options = ("rollout.kv_cache_mib=null", "rollout.gpus=1", "learner.gpus=1", "rollout.batch_size=64")

    def kv_cache(gpu_memory: int | None, *more: str) -> tuple[int, tuple[str, ...]]:
        found = planned(configured(*options, *more), ClusterShape.uniform(1, 64, 2, 64 * GIB, gpu_memory))
        return amounts(found.terms["rollout-0"])["KV cache"], found.warnings

    assert kv_cache(None) == (-(-64 * SEQUENCE * 512 // MIB) * MIB, ())
    assert kv_cache(80 * GIB, "rollout.workers=2") == (-(-32 * SEQUENCE * 512 // MIB) * MIB, ())
    assert kv_cache(80 * GIB, "rollout.max_num_seqs=16", "rollout.max_context=24") == (MIB, ())
    little = 2500 * MIB + 2 * POLICY + MIB  # CUDA, the weights, and room for some of the sequences
    found, (warning,) = kv_cache(int(little / 0.92) + 1, "rollout.max_context=24", "rollout.batch_size=128")
    assert found == MIB
    assert "have room for 85 of the 128 sequences of 24 tokens" in warning
    found, (warning,) = kv_cache(80 * GIB, "rollout.kv_cache_mib=1", "rollout.batch_size=1024")
    assert found == MIB
    assert warning == (
        "an engine's keys and values have room for 85 of the 1024 sequences of 24 tokens that it may decode at once: "
        "the others wait, and generation may take 12.0 times as long; rollout.kv_cache_mib=12 is enough for all"
    )


@pytest.mark.parametrize(
    ("options", "mib"),
    [
        ("", 64),  # little is needed
        ("rollout.batch_size=1000 rollout.max_response_tokens=80", 94),  # 1000 x 3 blocks of 32 tokens x 1 KiB
        ("rollout.batch_size=1000 rollout.max_response_tokens=80 evaluation.num_prompts=16", 94),
        ("rollout.max_response_tokens=800 evaluation.num_prompts=16", 105),  # 128 x 26 blocks of 32 tokens
        ("rollout.batch_size=1024 rollout.max_response_tokens=800", 512),  # the others wait
        ("rollout.max_context=1000000", 977),  # one sequence of that length
    ],
)
def test_keys_and_values_on_a_cpu(configured: Configured, options: str, mib: int) -> None:
    """In float32, 2 layers x 2 x 2 heads x 32 x 4 bytes a token: 1 KiB."""
    config = configured("rollout.kv_cache_mib=null", "rollout.max_context=null", *options.split())
    found = planned(config, ClusterShape.uniform(1, 2))
    assert amounts(found.terms["rollout-0"])["KV cache"] >> 20 == mib


def test_an_engine_leaves_room_for_those_that_share_its_gpu(configured: Configured) -> None:
    options = ("rollout.kv_cache_mib=null", "rollout.gpus=1", "learner.gpus=1", "ray.placement=colocated")
    config = configured(
        *options, "rollout.batch_size=1024", "rollout.max_response_tokens=20000", "rollout.max_context=null"
    )
    found = planned(config, ClusterShape.uniform(1, 64, 1, 64 * GIB, 8 * GIB))
    (gpu,) = found.gpus
    assert found.fits and gpu.available is not None
    assert 0.9 < gpu.needed / gpu.available <= 1


def test_an_engine_on_a_part_of_a_gpu_leaves_room_for_the_learner_and_rewards_there(configured: Configured) -> None:
    options = ("rollout.kv_cache_mib=null", "rollout.gpus=0.5", "rollout.batch_size=1024", "rollout.max_context=null")
    options += ("rollout.max_response_tokens=20000", "reward.workers=3")
    cuda = 4000 * MIB

    def plan(*more: str) -> tuple[int, Plan]:
        found = planned(configured(*options, *more), ClusterShape.uniform(1, 64, 1, 64 * GIB, 12 * GIB))
        return amounts(found.terms["rollout-0"])["KV cache"], found

    alone, found = plan("rollout.workers=2")  # each engine has its half
    assert found.fits and alone == pytest.approx(0.46 * 12 * GIB - cuda - 2 * POLICY, abs=2 * MIB)
    beside, found = plan("learner.gpus=0.25", "reward.gpus=0.125", "reward.workers=2")
    assert sorted(found.gpus[0].actors) == ["learner-0", "reward-0", "reward-1", "rollout-0"]
    assert found.fits and beside == alone  # the others need less than the other half
    beside, found = plan("learner.gpus=0.5", "learner.microbatch_tokens=255000")
    assert sorted(found.gpus[0].actors) == ["learner-0", "rollout-0"]
    assert found.fits and 0 < beside < alone
    colocated = ("ray.placement=colocated", "rollout.gpus=1", "learner.gpus=1", "reward.gpus=1")
    one, _ = plan(*colocated, "reward.workers=1")
    three, found = plan(*colocated)
    holds = sum(term.num_bytes for term in found.terms["reward-0"] if term.device == "gpu")
    assert found.fits and one - three == pytest.approx(2 * holds, abs=2 * MIB)


def test_what_is_too_small_is_told_with_its_options(configured: Configured) -> None:
    config = configured("rollout.gpus=1", "learner.gpus=1", "rollout.kv_cache_mib=8000")
    found = planned(config, ClusterShape.uniform(1, 8, 2, 2 * GIB, 8 * GIB))
    resources = {shortage.resource: shortage for shortage in found.shortages}
    assert set(resources) == {"GiB of GPU memory", "GiB of memory"}
    assert "rollout.kv_cache_mib" in str(resources["GiB of GPU memory"])
    assert all(shortage.demand > shortage.supply for shortage in found.shortages)


def test_the_learner_really_holds_that(tiny_policy: Path, configured: Configured) -> None:
    """Parameters, moments and what the backward pass needs: the first two to the byte, activations within a 20th."""
    learner = make_learner(tiny_policy)
    learner.update(make_table(), 0)
    terms = amounts(planned(configured(), ClusterShape.uniform(1, 2)).terms["learner-0"])
    held = sum(parameter.nbytes for parameter in learner._policy.parameters())
    assert held == terms["float32 weights"]
    moments = [tensor.nbytes for state in learner._optimizer.state.values() for tensor in state.values() if tensor.ndim]
    assert sum(moments) == terms["Adam's two moments"]

    owned = {parameter.untyped_storage().data_ptr() for parameter in learner._policy.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch_tokens = torch.arange(1, 101)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner._policy.causal_lm.base_model(input_ids=batch_tokens, use_cache=False)
    activations = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in owned)
    assert terms["activations"] == pytest.approx(activations, rel=0.05)


def shown(config: Config, tmp_path: Path, *flags: str, columns: int = 160) -> Result:
    from ppo_ray.config import to_yaml

    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    return CliRunner().invoke(app, ["plan", str(path), *flags], env={"COLUMNS": str(columns)})


def test_the_command_says_where_everything_goes(configured: Configured, tmp_path: Path) -> None:
    config = configured("rollout.workers=2", "rollout.gpus=1", "learner.gpus=1")
    sizes = ("--cpus", "8", "--gpus", "4", "--memory", "64", "--gpu-memory", "80")
    result = shown(config, tmp_path, *sizes)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("It fits. Nothing was started.\n")
    assert "unused on node-0: GPU 3\n" in result.output and "1 of 4 GPUs stay unused" in result.output
    assert "reward.gpus=1, more rollout.workers" in result.output and "KV cache" not in result.output
    assert "KV cache" in shown(config, tmp_path, *sizes, "--verbose").output
    assert "rollout-1 (STRICT_PACK)" in result.output and "node-0 GPU 2" in result.output
    result = shown(config, tmp_path, *sizes, "learner.workers=3")
    assert result.exit_code == 2
    assert result.output.startswith("It does not fit:\n")
    assert "5 GPUs needed, the cluster has 4" in result.output and "no room" in result.output


def test_gpus_that_nobody_asks_for_are_named_and_nothing_is_cut(configured: Configured, tmp_path: Path) -> None:
    sizes = ("--cpus", "8", "--nodes", "2", "--gpus", "2", "--verbose")
    output = shown(configured(), tmp_path, *sizes, columns=50).output
    assert "unused on node-0: GPUs 0, 1\nunused on node-1: GPUs 0, 1\n4 of 4 GPUs stay unused; " in output
    assert "would use them: rollout.gpus=1, reward.gpus=1, learner.gpus=1\n" in output
    assert "…" not in output


def test_the_command_takes_this_machine_or_a_whole_description(configured: Configured, tmp_path: Path) -> None:
    assert "this machine" in shown(configured(), tmp_path).output
    result = shown(configured(), tmp_path, "--gpus", "4")
    assert (result.exit_code, "--cpus is missing" in result.stderr) == (2, True)
    result = shown(configured(), tmp_path, "--address", "auto", "--nodes", "2")
    assert (result.exit_code, "leave out --nodes" in result.stderr) == (2, True)


def test_bfloat16_on_a_processor_without_it_is_warned_of(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("model.dtype=bfloat16", "rollout.dtype=bfloat16")
    monkeypatch.setattr("ppo_ray.plan.plan.multiplies_bfloat16", lambda: False)
    cluster = ClusterShape.uniform(1, 64, 2, 64 * GIB, 80 * GIB)
    assert [warning.partition(",")[0] for warning in planned(configured(*asked), cluster).warnings] == list(asked)
    assert planned(configured(*asked, "learner.gpus=1", "rollout.gpus=1"), cluster).warnings == ()
    assert any("model.dtype" in line for line in describe_run(configured(*asked), RunFolder(Path("run"))))
    monkeypatch.setattr("ppo_ray.plan.plan.multiplies_bfloat16", lambda: True)
    assert planned(configured(*asked), cluster).warnings == ()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["reward.path=null", "reward.function=m:f"], "reward: m:f"),
        (["reward.path=null", "reward.judge={path: /j, prompt: p.txt, pattern: '(.)'}"], "reward: judge /j"),
    ],
)
def test_a_run_says_what_scores(configured: Configured, options: list[str], shown: str) -> None:
    assert shown in list(describe_run(configured(*options), RunFolder(Path("run"))))
