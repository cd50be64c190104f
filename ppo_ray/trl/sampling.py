"""Which ways of sampling the learner can account for: the full softmax at one temperature. Others are refused.

The learner's log-probabilities are those of all tokens of the vocabulary. Tokens drawn from a truncated or penalised
distribution have others, so that every ratio and every KL would be wrong, and nothing would tell.
"""

import copy
from typing import Any

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, None),
    "top_p": (1.0, None),
    "min_p": (None, 0.0),
    "top_h": (None, 1.0),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "repetition_penalty": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
    "penalty_alpha": (0.0, None),
    "guidance_scale": (1.0, None),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "min_new_tokens": (0, None),
}
"""Options of transformers' generation, and the values at which they leave the distribution alone."""
_NEUTRAL_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "assistant_model", "custom_generate")


def sampling_temperature(generation_config: Any, arguments: dict[str, Any]) -> float:
    """Return the temperature that `generate(**arguments)` samples at.

    Args:
        generation_config: the model's own, of transformers; what the arguments leave open follows it.
        arguments: of `generate`.

    Raises:
        ValueError: it would not sample from the full softmax; names every option that forbids it.
    """
    effective = copy.deepcopy(arguments.get("generation_config") or generation_config)
    defaults = {"top_k": 50, "do_sample": False, "temperature": 1.0, "min_length": 0}  # transformers' own
    given = {name: value for name, value in arguments.items() if name != "generation_config"}
    effective.update(**given)

    def value_of(name: str) -> Any:
        value = getattr(effective, name, None)
        return defaults.get(name) if value is None and name not in given else value

    wrong = [f"{name}={value_of(name)!r}" for name, neutral in _NEUTRAL.items() if value_of(name) not in neutral]
    wrong += [name for name in _NEUTRAL_ARGUMENTS if arguments.get(name)]
    if (value_of("min_length") or 0) > 0:
        wrong.append(f"min_length={value_of('min_length')!r}")
    if not value_of("do_sample"):
        wrong.append("do_sample=False")
    if wrong:
        raise ValueError(
            f"generate({', '.join(wrong)}): PPO learns from samples of the full softmax, and cannot account for tokens "
            "drawn in another way. Pass do_sample=True, top_k=0, top_p=1.0 and no penalties or minimum lengths (use "
            "trainer.model.generate for samples that are not learnt from)"
        )
    return float(value_of("temperature"))
