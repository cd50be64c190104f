"""Tiny random models of every architecture of transformers, whose weights all matter, and the sample of a day.

`PPO_RAY_ALL_ARCHITECTURES=1` tries all of them; else a sample that turns with the date.
"""

import copy
import dataclasses
import datetime
import os
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "pooler_hidden_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "d_latents", "hidden_size_global"), 64),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "d_inner", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_size"), 32),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "entity_vocab_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "window_size", "rotary_dim"), 8),
    **dict.fromkeys(("n_latents", "num_latents"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "entity_emb_size"), 8),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("mamba_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "dim_head", "linear_head_dim"), 32),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size", "attention_window_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "max_window_layers", "n_shared_experts"), 1),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size", "dim_ff", "router_hidden_size"), 64),
    **dict.fromkeys(("moe_topk", "zero_expert_num"), 2),
    **dict.fromkeys(("use_sliding_window", "is_decoder"), True),
    "mamba_d_ssm": 128,
    "vocab_size": 512,
    "coordinate_size": 8,
    "shape_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 2,
}
"""What makes an architecture tiny, by the names that its config knows. On a CPU vLLM needs heads and ranks of 32."""

LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Options that name the kind of each layer."""
REQUIRED = ("text_encoder", "audio_encoder", "decoder")
"""Parts without which some configs cannot be made."""
DEFAULT = "default"
"""The config's own value."""
LATENT = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 32)
LATENT |= {"n_group": 1, "topk_group": 1}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
HYBRID |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 64}
INDEXED |= {"indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 16, "ngram_vocab_size_base": 64}
INDEXED |= {"hc_lowrank": 8, "heads_per_ngram": 2, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
ENCODERS: dict[str, Any] = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {},
}
ASSISTANT: dict[str, Any] = {
    "text_config": {
        **{"model_type": "gemma4_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
        **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "backbone_hidden_size": 32,
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3"), LATENT),
    **dict.fromkeys(("longcat_flash", "youtu", "glm4_moe_lite", "glm_moe_dsa", "hy_v4"), LATENT),
    "mimo_v2_flash": {"num_key_value_heads": 1, "v_head_dim": 16},
    "bamba": {"layers_block_type": DEFAULT, "attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "codegen": {"n_embd": 128, "n_head": 4, "rotary_dim": 4},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 100.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_next"), HYBRID),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "blt": {"vocab_size": 260, "encoder_hash_byte_group_vocab": 50},
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONVOLUTION),
    "falcon": {"ffn_hidden_size": 256},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), HYBRID | INDEXED | {"layer_types": DEFAULT}),
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
        **PER_LAYER,
    },
    **dict.fromkeys(("gemma4", "gemma4_text"), PER_LAYER),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), ASSISTANT),
    **dict.fromkeys(("musicgen", "musicgen_melody"), ENCODERS),
    "funnel": {"num_hidden_layers": DEFAULT, "block_sizes": [1, 1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "xlnet": {"max_position_embeddings": DEFAULT},
    "lilt": {"hidden_size": 96},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 8)},
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
NO_WINDOWS = {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}
FOR_VLLM: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "gemma4_text": {"num_experts": DEFAULT},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "llama4_text": {"attention_chunk_size": 32, "num_experts_per_tok": 1},
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3"), NO_WINDOWS),
}
"""What vLLM asks of a config beside what transformers does, or cannot compute."""


def chosen(names: list[str], size: int = 6) -> list[str]:
    """Return all names if the environment says so, else a few, other ones each day."""
    if os.environ.get("PPO_RAY_ALL_ARCHITECTURES") == "1":
        return names
    mixed = random.Random(0).sample(names, len(names))
    start = datetime.date.today().toordinal() * size
    return sorted(mixed[(start + index) % len(mixed)] for index in range(size))


def make_config(kind: type, special: dict[str, Any], **sizes: Any) -> Any:
    """Make a tiny config with a layer of every kind, and tiny ones of the parts that it has."""
    wanted = {**SIZES, **sizes, **special}
    required = {name: wanted[name] for name in REQUIRED if name in special}
    default = kind(**copy.deepcopy(required))
    names = set(dir(default)) | ({"decoder_start_token_id"} if getattr(default, "is_encoder_decoder", False) else set())
    fixed = {name for name in wanted if isinstance(getattr(kind, name, None), property)}
    known = {name: value for name, value in wanted.items() if name in names - fixed and value is not DEFAULT}
    parts = {
        name: type(getattr(default, name))
        for name in kind.sub_configs
        if getattr(default, name, None) is not None and name not in special
    }
    known |= {name: make_config(part, special) for name, part in parts.items()}
    return kind(**{**list_layers(kind, default), **known})


def list_layers(kind: type, default: Any) -> dict[str, list[str]]:
    """Return what names the kinds of layers: one layer of each kind, and a window if the architecture has one."""
    layers: dict[str, list[str]] = {}
    for field in dataclasses.fields(kind):
        kinds = getattr(default, field.name, None) if field.name in LAYERS else None
        if kinds:
            kinds = list(dict.fromkeys(kinds))
            if kinds == ["full_attention"] and hasattr(default, "sliding_window"):
                kinds.insert(0, "sliding_attention")
            layers[field.name] = (kinds * 2)[: max(2, len(kinds))]
    return layers


def tiny_config(name: str, **sizes: Any) -> Any:
    """Make the tiny config of an architecture, which its `model_type` names; `sizes` are what it has besides."""
    return make_config(CONFIG_MAPPING[name], copy.deepcopy(SPECIAL.get(name, {})), **sizes)


def make_model(auto_class: Any, config: Any, embedding_size: float = 1.0) -> Any:
    """Make a model whose weights all matter: of the size that keeps what goes through them, norms off 1.

    Args:
        auto_class: one of transformers' Auto classes.
        config: see `tiny_config`.
        embedding_size: of the embeddings' elements; a tied one of size 1 predicts its own token, whatever layers do.
    """
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                embeds = "embed" in key or "wte" in key or "wpe" in key
                fan_in = parameter.shape[-1] if "experts" in key else parameter[0].numel()
                parameter.copy_(noise * (embedding_size if embeds else fan_in**-0.5))
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
