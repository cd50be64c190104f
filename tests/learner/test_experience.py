"""Options that make rewards and losses of scores and log-probabilities, through the learner."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ppo_ray.config import LearnerConfig, ModelConfig, UpdateConfig
from ppo_ray.learner.learner import PPOLearner
from tests.learning import largest_difference, make_learner, make_table, weights

SCORES = [0.5, 3.0, -1.0, 2.0, -4.0, 0.0, 1.0, -0.5]


def column(table: pa.Table, name: str) -> list[np.ndarray]:
    return [np.array(row) for row in table.column(name).to_pylist()]


def last(table: pa.Table, name: str) -> list[float]:
    return [row[-1] for row in column(table, name)]


def with_other_reference(policy: Path, reference: Path, **ppo: object) -> PPOLearner:
    model = ModelConfig(path=str(policy), reference_path=str(reference))
    return PPOLearner.load(
        model, UpdateConfig(learning_rate=1e-3, **ppo), LearnerConfig(), temperature=1.0, device="cpu"
    )


@pytest.fixture
def reference(tiny_policy: Path, tmp_path: Path) -> Path:
    """Return a model that the policy has drifted away from."""
    learner = make_learner(tiny_policy, learning_rate=1e-3)
    learner.update(make_table(), 0)
    learner.save(tmp_path / "reference")
    return tmp_path / "reference"


def test_scores_are_scaled_by_all_scores_so_far_then_clipped_then_the_missing_end_costs(tiny_policy: Path) -> None:
    learner = make_learner(tiny_policy, score_scaling="mean_std", score_clip=1.0, missing_eos_penalty=0.25)
    table = make_table(8, SCORES)
    reasons = pa.array(["stop", "length"] * 4)
    table = table.set_column(
        table.schema.get_field_index("finish_reason"), table.schema.field("finish_reason"), reasons
    )
    scores = np.float32(SCORES)
    for step, seen in enumerate([scores, np.concatenate([scores, scores])]):
        update = learner.update(table, step)
        wanted = np.clip((scores - seen.mean()) / seen.std(ddof=1), -1, 1) - 0.25 * np.array([0, 1] * 4)
        kl = np.array(last(update.trajectories, "kl")) * update.metrics["kl/coef"]
        np.testing.assert_allclose(np.array(last(update.trajectories, "rewards")) + kl, wanted, atol=1e-5)
        assert update.metrics["score/mean"] == pytest.approx(scores.mean())  # as they were given
        assert update.metrics["score/used_mean"] == pytest.approx(wanted.mean(), abs=1e-6)
        assert update.metrics["score/used_std"] == pytest.approx(wanted.std(ddof=1), abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "full"])
def test_the_kl_is_taken_off_each_tokens_reward(tiny_policy: Path, reference: Path, estimator: str) -> None:
    learner = with_other_reference(tiny_policy, reference, kl_estimator=estimator, kl_coef=0.5)
    update = learner.update(make_table(8, SCORES), 0)
    table = update.trajectories
    for row, score in enumerate(SCORES):
        d = column(table, "old_logprobs")[row] - column(table, "ref_logprobs")[row]
        kl = column(table, "kl")[row]
        formula = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "abs": abs(d)}
        if estimator == "full":
            assert (kl > 0).all()
        else:
            np.testing.assert_allclose(kl, formula[estimator], atol=1e-5, rtol=1e-5)
        rewards = -0.5 * kl
        rewards[-1] += score
        np.testing.assert_allclose(column(table, "rewards")[row], rewards, atol=1e-5, rtol=1e-5)
    assert update.metrics["kl/per_sequence"] == pytest.approx(
        np.mean([row.sum() for row in column(table, "kl")]), rel=1e-4
    )
    assert update.metrics["reward/kl_penalty_mean"] == pytest.approx(
        -0.5 * np.concatenate(column(table, "kl")).mean(), rel=1e-4
    )


def test_the_full_kl_is_what_k1_estimates(tiny_policy: Path, reference: Path) -> None:
    """Averaged over tokens that the policy itself sampled."""
    learner = with_other_reference(tiny_policy, reference, kl_estimator="full")
    rows = learner.update(make_table(8, SCORES), 0).trajectories
    same = make_learner(tiny_policy, kl_estimator="full").update(make_table(8, SCORES), 0).trajectories
    assert max(abs(np.concatenate(column(same, "kl")))) < 1e-6  # a model is no distance from itself
    assert min(np.concatenate(column(rows, "kl"))) > 1e-4


def test_in_the_loss_the_kl_leaves_the_rewards_alone_and_pulls_the_policy_back(
    tiny_policy: Path, reference: Path
) -> None:
    kls = []
    for coef in (0.0, 20.0):
        learner = with_other_reference(tiny_policy, reference, kl_in="loss", kl_estimator="k2", kl_coef=coef)
        update = learner.update(make_table(8, SCORES), 0)
        assert last(update.trajectories, "rewards") == pytest.approx(SCORES)
        assert update.metrics["reward/kl_penalty_mean"] == 0
        assert update.metrics["loss/kl"] > 0
        kls.append(learner.update(make_table(8, SCORES), 1).metrics["kl/per_sequence"])
    assert kls[1] < 0.8 * kls[0]


def test_rewards_are_clipped(tiny_policy: Path, reference: Path) -> None:
    learner = with_other_reference(tiny_policy, reference, reward_clip=0.3)
    rewards = np.concatenate(column(learner.update(make_table(8, SCORES), 0).trajectories, "rewards"))
    assert np.abs(rewards).max() == pytest.approx(0.3)


def test_the_entropy_bonus_raises_the_entropy(tiny_policy: Path) -> None:
    entropies = []
    for coef in (0.0, 10.0):
        learner = make_learner(tiny_policy, entropy_coef=coef)
        learner.update(make_table(8, SCORES), 0)
        entropies.append(learner.update(make_table(8, SCORES), 1).minibatches[0].metrics["policy/entropy"])
    assert entropies[1] > entropies[0] + 0.01


def test_the_mismatch_of_engine_and_learner_is_measured_and_weighed(tiny_policy: Path) -> None:
    """make_table's engine claims -1 for every token."""
    learner = make_learner(tiny_policy, importance_cap=0.5)
    plain = make_learner(tiny_policy)
    update = learner.update(make_table(8, SCORES), 0)
    old = np.concatenate(column(update.trajectories, "old_logprobs"))
    weight = np.minimum(np.exp(old + 1), 0.5)
    metrics = update.metrics
    assert metrics["mismatch/importance_mean"] == pytest.approx(weight.mean(), rel=1e-4)
    assert metrics["mismatch/capped_fraction"] == pytest.approx((np.exp(old + 1) >= 0.5).mean())
    assert metrics["mismatch/logprob_mean"] == pytest.approx(abs(old + 1).mean(), rel=1e-4)
    assert metrics["mismatch/kl"] == pytest.approx((np.exp(old + 1) - 1 - (old + 1)).mean(), rel=1e-3)
    other = plain.update(make_table(8, SCORES), 0)
    assert "mismatch/importance_mean" not in other.metrics
    assert largest_difference(weights(learner), weights(plain)) > 1e-6
