"""The sentiment notebook's loop on TRL 0.11.3: `python trl_loop.py WORK.json STEPS.jsonl`.

Runs in TRL's own environment (requirements/trl.txt) and knows nothing of ppo_ray. The work says which models, and for
each step the prompts, the limits of the responses and how they are generated: `one` a call, as the notebook does, or
`batched`: all to the longest limit, then each cut to its own, as `PPOTrainer.generate` takes one limit per call.
Writes one line per step.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

SENT_KWARGS = {"top_k": None, "function_to_apply": "none", "batch_size": 16}  # the notebook's


class Loop:
    """The notebook's objects, and one step of its loop."""

    def __init__(self, work: dict[str, Any]) -> None:
        batch_size = len(work["steps"][0]["prompt_ids"])
        config = PPOConfig(
            model_name=work["policy"],
            learning_rate=work["learning_rate"],
            batch_size=batch_size,
            mini_batch_size=batch_size,
            ppo_epochs=work["epochs"],
            seed=work["seed"],
        )
        self.tokenizer = AutoTokenizer.from_pretrained(config.model_name)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
        model.v_head.summary.load_state_dict(load_file(work["value_head"]))
        ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
        self.trainer = PPOTrainer(config, model, ref_model, self.tokenizer)
        self.pipe = pipeline("sentiment-analysis", model=work["classifier"], device="cpu")
        self.label, self.batched = work["label"], work["mode"] == "batched"
        self.generation_kwargs = {
            "min_length": -1,
            "top_k": 0.0,
            "top_p": 1.0,
            "do_sample": True,
            "pad_token_id": self.tokenizer.eos_token_id,
        }

    def step(self, prompt_ids: list[list[int]], max_new_tokens: list[int]) -> dict[str, Any]:
        """Generate, score, learn; returns seconds by phase, lengths and figures."""
        queries = [torch.tensor(ids) for ids in prompt_ids]
        texts = [self.tokenizer.decode(ids) for ids in prompt_ids]  # the notebook's data set has both already
        start = time.perf_counter()
        responses = self.generate(queries, max_new_tokens)
        generated = time.perf_counter()
        texts = [text + self.tokenizer.decode(ids) for text, ids in zip(texts, responses, strict=True)]
        scores = [torch.tensor(score) for score in self.scores(texts)]
        scored = time.perf_counter()
        stats = self.trainer.step(queries, responses, scores)
        total_s = time.perf_counter() - start
        return {
            "seconds": {
                "generation": generated - start,
                "scoring": scored - generated,
                "forward": stats["time/ppo/forward_pass"],
                "update": stats["time/ppo/optimize_step"],
                "sync": 0.0,
            },
            "total_s": total_s,
            "lengths": [[len(query), len(response)] for query, response in zip(queries, responses, strict=True)],
            "figures": {
                "score": float(stats["ppo/mean_scores"]),
                "kl": float(stats["objective/kl"]),
                "policy_loss": float(stats["ppo/loss/policy"]),
                "value_loss": float(stats["ppo/loss/value"]),
            },
        }

    def generate(self, queries: list[torch.Tensor], limits: list[int]) -> list[torch.Tensor]:
        """Sample a response to each query, of at most so many tokens."""
        if self.batched:
            kwargs = {**self.generation_kwargs, "max_new_tokens": max(limits)}
            responses = self.trainer.generate(queries, batch_size=len(queries), return_prompt=False, **kwargs)
            return [response[:limit] for response, limit in zip(responses, limits, strict=True)]
        responses = []
        for query, limit in zip(queries, limits, strict=True):
            output = self.trainer.generate(query, max_new_tokens=limit, **self.generation_kwargs).squeeze()
            responses.append(output[len(query) :])
        return responses

    def scores(self, texts: list[str]) -> list[float]:
        """Return the label's raw output for each text."""
        outputs = self.pipe(texts, **SENT_KWARGS)
        return [item["score"] for output in outputs for item in output if item["label"] == self.label]


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(work["threads"])
    loop = Loop(work)
    with Path(sys.argv[2]).open("w") as lines:
        for number, portion in enumerate(work["steps"]):
            found = loop.step(portion["prompt_ids"], portion["max_new_tokens"])
            lines.write(json.dumps({"step": number, **found}) + "\n")
            lines.flush()
            print(f"step {number}: {found['total_s']:.1f} s, {found['figures']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
