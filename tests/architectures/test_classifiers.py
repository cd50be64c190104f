"""Every sequence classification of the installed transformers, tiny and random: scored as each text alone, or refused.

`PPO_RAY_ALL_ARCHITECTURES=1` tries all of them; else a sample that turns with the date.
"""

import datetime
import os
import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ppo_ray.errors import InputError
from ppo_ray.reward.classifier import Classifier

ARCHITECTURES = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "pooler_hidden_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "d_latents"), 32),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "d_inner", "ffn_dim", "n_inner", "mamba_d_ssm"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "entity_vocab_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "n_latents", "num_latents", "shape_size"), 8),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "entity_emb_size"), 8),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"), 32),
    "vocab_size": 512,
    "coordinate_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 2,
}
"""What makes an architecture tiny, by the names that its config knows."""

DEFAULT = object()
"""The config's own value."""
LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "n_group": 1, "topk_group": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
HYBRID |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3"), LATENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_next"), HYBRID),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "funnel": {"num_hidden_layers": DEFAULT, "block_sizes": [1, 1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "xlnet": {"max_position_embeddings": DEFAULT},
    "lilt": {"hidden_size": 48},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "markuplm": {"max_depth": 4},
    "mistral4": LATENT
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        }
    },
    "longformer": {"attention_window": [8, 8]},
    "xmod": {"default_language": "en_XX"},
}
"""What else some of them need."""

REFUSED = {"layoutlmv2": "requires the detectron2 library", "mra": "gives every text the same outputs"}
"""Those that are refused, and by which words."""


def chosen(names: list[str], size: int = 6) -> list[str]:
    """Return all names if the environment says so, else a few, other ones each day."""
    if os.environ.get("PPO_RAY_ALL_ARCHITECTURES") == "1":
        return names
    mixed = random.Random(0).sample(names, len(names))
    start = datetime.date.today().toordinal() * size
    return sorted(mixed[(start + index) % len(mixed)] for index in range(size))


def make_config(kind: type, special: dict[str, Any], **sizes: Any) -> Any:
    """Make a tiny config, and tiny ones of the parts that it has."""
    default = kind()
    wanted = {**SIZES, **special, **sizes}
    fixed = {name for name in wanted if isinstance(getattr(kind, name, None), property)}
    known = {name: value for name, value in wanted.items() if hasattr(default, name) or name.endswith("token_id")}
    known = {name: value for name, value in known.items() if name not in fixed and value is not DEFAULT}
    parts = {
        name: type(getattr(default, name)) for name in kind.sub_configs if getattr(default, name, None) is not None
    }
    return kind(**known, **{name: make_config(part, special) for name, part in parts.items()})


def make_model(name: str) -> Any:
    """Make a tiny model whose weights all matter: of the size that keeps what goes through them, norms off 1."""
    torch.manual_seed(0)
    config = make_config(CONFIG_MAPPING[name], SPECIAL.get(name, {}), num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                fan_in = 1 if "embed" in key or "wte" in key or "wpe" in key else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            elif not key.endswith(("A_log", "dt_bias", "D")):
                parameter.add_(0.2 * noise)
    return model


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes that puts a text between <cls> (1) and <eos> (2); <pad> is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<cls>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <eos>", special_tokens=[("<cls>", 1), ("<eos>", 2)]
    )
    names = {"pad_token": "<pad>", "cls_token": "<cls>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


TEXTS = ["so", "what a slow film", "x", "I liked it, and the end", "awful", "funny people"]


def check_scores(folder: Path) -> str:
    """Compare the scores of texts in a batch, at the limit and beyond it with those of each alone."""
    classifier = Classifier(str(folder), label="LABEL_1", batch_size=4)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    limit = classifier.max_tokens
    letters = random.Random(2)
    long = ["".join(letters.choice("abcdefgh ") for _ in range(90)) for _ in range(3)]
    exact = [text[: (limit or 92) - 2] for text in long]
    texts = [*TEXTS, *exact, *long]
    scores = classifier.score(texts)

    def score_alone(text: str) -> float | None:
        kept = [*text.encode()][-((limit or 92) - 2) :]
        vocabulary = classifier._tokenizer.get_vocab()
        ids = [1, *(vocabulary["Ġ" if byte == 32 else chr(byte)] for byte in kept), 2]
        try:
            with torch.no_grad():
                return float(model(input_ids=torch.tensor([ids])).logits[0, 1])
        except RuntimeError:  # some models fail on texts of a few tokens
            return None

    alone = [score_alone(text) for text in texts]
    assert [score is None for score in scores] == [score is None for score in alone]
    known = [score for score in alone if score is not None]
    spread, size = max(known) - min(known), max(map(abs, known))
    assert len(known) > len(texts) / 2 and spread > 1e-3 * size, "the weights do not matter"
    worst = max(abs(found - right) for found, right in zip(scores, alone, strict=True) if found is not None)
    assert worst <= 1e-5 * (spread + size), worst / spread
    assert classifier.truncated == [limit is not None and len(text) > limit - 2 for text in texts]
    return f"works: {classifier._batching}, {limit or 'any number of'} tokens"


def judge(name: str, folder: Path) -> str:
    """Say how an architecture is scored, or why it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make_model(name).save_pretrained(folder)
        except ImportError as error:
            return f"not built: {str(error).strip().splitlines()[0]}"
        save_tokenizer(folder)
        try:
            return check_scores(folder)
        except InputError as error:
            return f"refused: {str(error).partition(': ')[2]}"


def rows() -> Iterator[tuple[str, str]]:
    """Yield every architecture with the verdict."""
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            yield name, judge(name, Path(folder))


@pytest.mark.parametrize("name", chosen(ARCHITECTURES))
def test_a_text_has_the_score_that_it_has_alone_or_the_model_is_refused(name: str, tmp_path: Path) -> None:
    verdict = judge(name, tmp_path)
    if name in REFUSED:
        assert REFUSED[name] in verdict
    else:
        assert verdict.startswith("works"), verdict


def test_what_is_listed_as_refused_exists() -> None:
    assert REFUSED.keys() <= set(ARCHITECTURES)
