"""The sentiment notebook of TRL 0.11 as a script: its calls and settings, on `ppo_ray.trl`.

A language model learns to write happier film reviews: prompts are the first tokens of IMDB reviews, the reward is a
classifier's POSITIVE logit. Only the imports differ from the notebook's, and the paths: models and reviews are those of
`ppo-ray assets imdb`, which needs no hub. On two CPU cores a step of 128 samples takes about two minutes:

    python examples/sentiment_trl.py --steps 3 --output runs/sentiment-trl

For the notebook's own: --policy lvwerra/gpt2-imdb --classifier lvwerra/distilbert-imdb --prompts stanfordnlp/imdb
"""

import argparse
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer, pipeline

from ppo_ray.assets.cache import asset_path
from ppo_ray.trl import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default=str(asset_path("policy")), help="causal LM: folder or hub name")
parser.add_argument("--classifier", default=str(asset_path("classifier")), help="sentiment classifier, likewise")
parser.add_argument(
    "--prompts", default=str(asset_path("prompts")), help="Parquet file with a column `text`, or hub data set"
)
parser.add_argument("--steps", type=int, default=None, help="stop after so many; default: one pass over the reviews")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--learning-rate", type=float, default=1.41e-5)
parser.add_argument("--log-with", choices=("wandb", "tensorboard"), default=None)
parser.add_argument("--output", default="gpt2-imdb-pos-v2")
arguments = parser.parse_args()

config = PPOConfig(
    model_name=arguments.policy,
    learning_rate=arguments.learning_rate,
    batch_size=arguments.batch_size,
    mini_batch_size=arguments.batch_size,
    log_with=arguments.log_with,
    project_kwargs={"logging_dir": arguments.output},
)
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16}

tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token


def build_dataset(path: str, input_min_text_length: int = 2, input_max_text_length: int = 8):
    """Cut reviews of more than 200 characters to their first 2 to 7 tokens."""
    local = {"path": "parquet", "data_files": path} if Path(path).is_file() else {"path": path}
    reviews = load_dataset(**local, split="train").rename_column("text", "review")
    reviews = reviews.filter(lambda row: len(row["review"]) > 200)
    input_size = LengthSampler(input_min_text_length, input_max_text_length)

    def tokenize(row):
        row["input_ids"] = tokenizer.encode(row["review"])[: input_size()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    reviews = reviews.map(tokenize)
    reviews.set_format(type="torch")
    return reviews


def collator(rows):
    """Turn a list of rows into a dictionary of lists: queries are of different lengths."""
    return {key: [row[key] for row in rows] for key in rows[0]}


dataset = build_dataset(arguments.prompts)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline("sentiment-analysis", model=arguments.classifier, device=device)


def positive_scores(texts: list[str]) -> list[float]:
    """Return the raw POSITIVE logit of each text; the pipeline sorts labels by score, so it is chosen by name."""
    outputs = sentiment_pipe(texts, **sent_kwargs)
    return [item["score"] for output in outputs for item in output if item["label"] == "POSITIVE"]


output_length_sampler = LengthSampler(4, 16)
generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}
num_steps = min(arguments.steps or len(ppo_trainer.dataloader), len(ppo_trainer.dataloader))
for batch in tqdm(islice(ppo_trainer.dataloader, num_steps), total=num_steps):
    query_tensors = batch["input_ids"]

    response_tensors = []
    for query in query_tensors:
        generation_kwargs["max_new_tokens"] = output_length_sampler()
        query_response = ppo_trainer.generate(query, **generation_kwargs).squeeze()
        response_tensors.append(query_response[len(query) :])
    batch["response"] = [tokenizer.decode(response) for response in response_tensors]

    texts = [query + response for query, response in zip(batch["query"], batch["response"], strict=True)]
    rewards = [torch.tensor(score) for score in positive_scores(texts)]

    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    print(
        f"mean score {stats['ppo/mean_scores']:+.3f}, KL {stats['objective/kl']:.3f}, "
        f"{stats['time/ppo/total']:.1f} s in step"
    )

# what the model writes now, beside what it wrote before
dataset.set_format("pandas")
sample = dataset[:].sample(min(16, len(dataset)))
comparison = {"query": sample["query"].tolist()}
for name, writer in (("before", ref_model), ("after", model)):
    responses = []
    for input_ids in sample["input_ids"].tolist():
        query = torch.tensor(input_ids, device=writer.pretrained_model.device)
        generation_kwargs["max_new_tokens"] = output_length_sampler()
        output = writer.generate(
            query.unsqueeze(dim=0), attention_mask=torch.ones_like(query)[None], **generation_kwargs
        )
        responses.append(tokenizer.decode(output.squeeze()[len(query) :]))
    comparison[f"response ({name})"] = responses
    comparison[f"rewards ({name})"] = positive_scores(
        [query + response for query, response in zip(comparison["query"], responses, strict=True)]
    )
results = pd.DataFrame(comparison)
scores = results[["rewards (before)", "rewards (after)"]]
print(results.to_string(max_colwidth=50), scores.mean().rename("mean"), scores.median().rename("median"), sep="\n\n")

model.save_pretrained(arguments.output)
tokenizer.save_pretrained(arguments.output)
print(f"model, value head and tokenizer: {arguments.output}")
