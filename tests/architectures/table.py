"""Writes docs/models.md: verdicts on every causal LM of transformers.

`python -m tests.architectures.table` tries the learner and the transformers engine (five minutes), with `--vllm` vLLM
alone (half an hour); names of architectures restrict it to these. What is not tried keeps its verdict.
"""

import argparse
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import tests.conftest  # noqa: F401  (sets the environment of torch and vLLM, which are imported below)
from ppo_ray.rollout.vllm import CPU_ENVIRONMENT, ENVIRONMENT

FILE = Path(__file__).parents[2] / "docs" / "models.md"
ARCHITECTURES = sorted(CLASSES)
NOT_TRIED = "not tried"
COLUMNS = ("learner", "transformers engine", "vLLM")
HEAD = """\
# Causal language models

Every causal language model of transformers {version}, tried as a tiny random one with a layer of each kind and with
attention windows shorter than the sequences. `python -m tests.architectures.table` makes this page.

- **learner**: log-probabilities, values and gradients of packed rows are those of transformers' own forward pass over
  each sequence alone, without padding, to 2e-5 in float32; a saved checkpoint loads with equal logits. {exact} of
  {total} are exact. The others are refused before anything is learnt, with the reason in the table.
- **transformers engine** (`rollout.engine=hf`) and **vLLM**: log-probabilities of sampled tokens are the model's own,
  before a weight update and after it: with transformers to 1e-4 nats, with vLLM to 2e-4. vLLM was tried on a CPU. What
  it computes otherwise than the model, or cannot run, is refused with the reason in the table, before
  anything starts. Qwen2, Qwen2-MoE and Qwen3 were tried without attention windows, with which vLLM is refused, and
  Llama 4 with chunks of attention as long as the sequences.

The tests try a sample, another each day, and hold it to this page; `make test-architectures` tries all. What a model
needs of memory is another question: `ppo-ray plan` answers it. Indexed attention (DeepSeek V3.2, GLM DSA) was tried on
sequences that the indexer takes whole.

| `model_type` | class | learner | transformers engine | vLLM |
|---|---|---|---|---|
"""


def read_table() -> dict[str, dict[str, str]]:
    """Return the verdicts on each architecture by column."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    rows = [re.split(r" *\| +", line.removesuffix("|")) for line in lines if line.startswith("| `")]
    return {row[1].strip("`"): dict(zip(COLUMNS, map(str.strip, row[3:6]), strict=True)) for row in rows[1:]}


def write_table(table: dict[str, dict[str, str]]) -> None:
    """Write the page."""
    exact = sum(verdicts.get("learner") == "exact" for verdicts in table.values())
    rows = []
    for name in ARCHITECTURES:
        verdicts = table.get(name, {})
        unknown = NOT_TRIED if verdicts.get("learner") == "exact" else ""
        cells = [verdicts.get(column) or unknown for column in COLUMNS]
        rows.append(f"| `{name}` | {CLASSES[name]} | {' | '.join(cells)} |\n")
    head = HEAD.format(version=transformers.__version__, total=len(ARCHITECTURES), exact=exact)
    FILE.write_text(head + "".join(rows))


def main() -> None:
    """Judge, and write the page after each architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--vllm", action="store_true")
    arguments = parser.parse_args()
    from tests.architectures.causal_lms import judge

    if arguments.vllm:
        os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT)
        from vllm import LLM  # noqa: F401  (once, for all the processes that are forked below)

    for name in arguments.names:
        if arguments.vllm and read_table()[name]["learner"] != "exact":
            continue
        with tempfile.TemporaryDirectory() as folder:
            if arguments.vllm:  # in a process of its own: what a start that fails leaves would fail the next
                with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
                    try:
                        verdicts = process.submit(judge, name, Path(folder), COLUMNS[2:]).result()
                    except BrokenProcessPool:
                        verdicts = {COLUMNS[2]: "fails: the process ends"}
            else:
                verdicts = judge(name, Path(folder), COLUMNS[:2])
        table = read_table()  # only now: another process may try another column
        known = table.get(name, {})
        table[name] = known | verdicts if arguments.vllm or verdicts["learner"] == "exact" else verdicts
        write_table(table)
        print(name, verdicts, flush=True)


if __name__ == "__main__":
    main()
