"""Record what TRL 0.11.3 computes: `python record_trl.py [CASE ...]` writes `trl_options/CASE.json`.

Run it in an environment of its own: trl==0.11.3, transformers==4.45.2, torch 2, accelerate 1.1, one thread
(OMP_NUM_THREADS=1). It starts by reproducing `trl_default/golden.json`, which proves that it is set up as that was.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
import trl
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

HERE = Path(__file__).parent
RECORD = HERE / "trl_default"
GOLDEN = json.loads((RECORD / "golden.json").read_text())
BASE = {"batch_size": 16, "mini_batch_size": 16, "learning_rate": 1e-3}
MANY = {"mini_batch_size": 4, "gradient_accumulation_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "kl_abs": {"kl_penalty": "abs"},
    "kl_mse": {"kl_penalty": "mse"},
    "kl_full": {"kl_penalty": "full"},
    "fixed_controller": {"adap_kl_ctrl": False, "init_kl_coef": 0.3},
    "fast_controller": {"target": 0.5, "horizon": 100.0, "init_kl_coef": 0.5},
    "gamma_lam": {"gamma": 0.9, "lam": 0.7},
    "cliprange": {"cliprange": 0.05},
    "cliprange_value": {"cliprange_value": 0.05},
    "vf_coef": {"vf_coef": 1.0},
    "epochs": {"ppo_epochs": 2},
    "minibatch": {"mini_batch_size": 4},
    "accumulation": MANY,
    "max_grad_norm": {"mini_batch_size": 8, "max_grad_norm": 0.1},
    "max_grad_norm_as_it_is": {"mini_batch_size": 8, "max_grad_norm": 0.1},
    "early_stopping": {"mini_batch_size": 8, "early_stopping": True, "target_kl": 0.01},
    "ratio_threshold": {"mini_batch_size": 4, "ratio_threshold": 1.1},
    "ratio_threshold_accumulation": {**MANY, "ratio_threshold": 1.1},
    "score_scaling": {"use_score_scaling": True},
    "score_norm": {"use_score_scaling": True, "use_score_norm": True},
    "score_clip": {"score_clip": 1.0},
    "whiten_rewards": {"whiten_rewards": True},
    "combined": {
        **MANY,
        "kl_penalty": "mse",
        "gamma": 0.97,
        "lam": 0.9,
        "cliprange": 0.1,
        "cliprange_value": 0.3,
        "vf_coef": 0.5,
        "use_score_scaling": True,
        "use_score_norm": True,
        "score_clip": 1.5,
        "whiten_rewards": True,
        "target": 2.0,
        "horizon": 200.0,
        "ppo_epochs": 3,
    },
    "combined_full": {
        "mini_batch_size": 8,
        "kl_penalty": "full",
        "whiten_rewards": True,
        "score_clip": 2.0,
        "max_grad_norm": 0.5,
        "early_stopping": True,
        "target_kl": 0.01,
    },
}


class Recorder(PPOTrainer):
    """TRL's trainer, which also tells what it computes on the way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, Any] = {}
        self.num_optimizer_steps = 0
        step = self.optimizer.optimizer.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.num_optimizer_steps += 1
            return step(*args, **kwargs)

        self.optimizer.optimizer.step = counted

    def compute_rewards(self, scores: Any, logprobs: Any, ref_logprobs: Any, masks: Any) -> Any:
        rewards, non_score, kls = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        self.seen |= {"used_scores": scores, "token_rewards": rewards, "kl": kls}
        return rewards, non_score, kls

    def compute_advantages(self, values: Any, rewards: Any, mask: Any) -> Any:
        values, advantages, returns = super().compute_advantages(values, rewards, mask)
        self.seen |= {"values": values, "advantages": advantages, "returns": returns}
        return values, advantages, returns


def make_trainer(options: dict[str, Any], as_it_is: bool, folder: str) -> Recorder:
    """Set TRL up as for `trl_default`, with other options."""
    tokenizer = AutoTokenizer.from_pretrained(RECORD / "policy")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(copy(RECORD / "policy", folder), summary_dropout_prob=0)
    model.v_head.summary.load_state_dict(safetensors.torch.load_file(RECORD / "value_head.safetensors"))
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(copy(RECORD / "reference", folder))
    config = PPOConfig(**{**BASE, **options})
    trainer = Recorder(config, model, reference, tokenizer)
    if not as_it_is:
        # TRL keeps an iterator over the parameters, which the first clipping exhausts
        trainer.model_params = list(trainer.model.parameters())
    update = trainer.running.update

    def mended(scores: torch.Tensor) -> Any:
        # 0.11.3 calls `.to` on the moments, which are floats, and crashes; nothing else is mended here
        trainer.running.mean, trainer.running.std = float(trainer.running.mean), float(trainer.running.std)
        moments = update(scores)
        trainer.running.mean, trainer.running.std = (
            torch.tensor(trainer.running.mean),
            torch.tensor(trainer.running.std),
        )
        return moments

    trainer.running.update = mended
    return trainer


def copy(source: Path, folder: str) -> str:
    """Copy a model to where TRL may look for more files beside it."""
    return str(shutil.copytree(source, Path(folder) / source.name, dirs_exist_ok=True))


def record(options: dict[str, Any], num_steps: int, as_it_is: bool = False) -> list[dict[str, Any]]:
    """Run TRL's step on the recorded token ids and scores; return what it computed."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, as_it_is, folder)
        return [run_step(trainer, step) for step in GOLDEN["steps"][:num_steps]]


def run_step(trainer: Recorder, step: dict[str, Any]) -> dict[str, Any]:
    queries, responses = ([torch.tensor(ids) for ids in step[name]] for name in ("queries", "responses"))
    before, permutations = float(trainer.kl_ctl.value), []
    permutation = np.random.permutation

    def drawn(size: int) -> np.ndarray:
        permutations.append(permutation(size).tolist())
        return np.array(permutations[-1])

    np.random.permutation, trainer.num_optimizer_steps = drawn, 0
    try:
        stats = trainer.step(queries, responses, [torch.tensor(score) for score in step["scores"]])
    finally:
        np.random.permutation = permutation
    logprobs, ref_logprobs = (torch.tensor(stats[f"objective/{name}"]) for name in ("logprobs", "ref_logprobs"))
    seen = {**trainer.seen, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
    with torch.no_grad():
        inputs = trainer.prepare_model_inputs(queries, responses)
        logprobs, _, values, _ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    seen |= {"new_logprobs": logprobs, "new_values": values}
    figures = {name: ragged(figure, queries, responses) for name, figure in seen.items() if figure.ndim == 2}
    return {
        "kl_coef_before": before,
        "kl_coef_after": float(trainer.kl_ctl.value),
        "epoch_permutations": permutations,
        "num_optimizer_steps": trainer.num_optimizer_steps,
        "used_scores": rounded(seen["used_scores"].tolist()),
        **figures,
        "stats": {
            name: rounded(float(value))
            for name, value in stats.items()
            if np.ndim(value) == 0 and not name.startswith("time/")
        },
    }


def ragged(figure: torch.Tensor, queries: list[torch.Tensor], responses: list[torch.Tensor]) -> list[list[float]]:
    """Cut `[B, T - 1]` to the response tokens of each row."""
    return [
        rounded(row[len(query) - 1 : len(query) - 1 + len(response)].tolist())
        for row, query, response in zip(figure.detach(), queries, responses, strict=True)
    ]


def rounded(value: Any) -> Any:
    """Keep eight significant digits: more than float32 has."""
    return [rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.8g}")


def check_default() -> None:
    """Reproduce the record of the defaults."""
    for found, wanted in zip(record({}, 3), GOLDEN["steps"], strict=True):
        for name in ("values", "token_rewards", "advantages", "returns", "new_logprobs", "new_values"):
            for row, wanted_row in zip(found[name], wanted[name], strict=True):
                np.testing.assert_allclose(row, wanted_row, atol=1e-5, err_msg=name)
        for name, value in wanted["stats"].items():
            np.testing.assert_allclose(found["stats"][name], value, atol=1e-5, err_msg=name)


def main() -> None:
    """Write the named cases, or all."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    check_default()
    (HERE / "trl_options").mkdir(exist_ok=True)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    for case in sys.argv[1:] or CASES:
        steps = record(CASES[case], 2, as_it_is=case.endswith("_as_it_is"))
        path = HERE / "trl_options" / f"{case}.json"
        content = {"case": case, "options": CASES[case], "source": versions, "steps": steps}
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
        print(
            f"{case}: optimizer steps {[step['num_optimizer_steps'] for step in steps]}, "
            f"epochs {[len(step['epoch_permutations']) for step in steps]}, "
            f"policy loss {[step['stats']['ppo/loss/policy'] for step in steps]}"
        )


if __name__ == "__main__":
    main()
