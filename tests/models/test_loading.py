import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ppo_ray.config import ModelConfig, Trust
from ppo_ray.errors import InputError
from ppo_ray.learner.loading import load_actor_critic, load_reference
from ppo_ray.learner.reader import Reader
from ppo_ray.models import loading
from ppo_ray.models.loading import check_gpu, check_weights, load_causal_lm, load_pretrained, load_tokenizer
from ppo_ray.rollout.hf import HFEngine


def test_dropout_is_off_and_attention_is_sdpa(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), dtype="bfloat16", device="cpu")
    assert model.config.resid_pdrop == 0.1  # dropout there is, but not in eval mode
    assert not any(module.training for module in model.modules())
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot load the model '.*nowhere'.*Give a folder"):
        load_causal_lm(missing)
    with pytest.raises(InputError, match=r"cannot load a tokenizer from '.*nowhere'"):
        load_tokenizer(missing)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors.*allow_pickled_weights"):
        load_causal_lm(str(tmp_path))
    loaded = load_causal_lm(str(tmp_path), trust=Trust(pickles=True))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


def test_a_pickle_never_runs_code_even_where_it_is_allowed(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict() | {"evil": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="its pickled weights are damaged or hold more than tensors"):
        load_causal_lm(str(tmp_path), trust=Trust(pickles=True))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def pickled(tiny_policy: Path, tmp_path: Path) -> Path:
    """Return the tiny policy's folder with its weights pickled."""
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save(load_causal_lm(str(tiny_policy)).state_dict(), folder / "pytorch_model.bin")
    return folder


def test_every_model_of_a_run_follows_the_options_of_the_model_section(tiny_policy: Path, pickled: Path) -> None:
    weights, device = load_causal_lm(str(tiny_policy)).state_dict(), torch.device("cpu")

    def load(options: dict[str, str], allowed: bool) -> None:
        model = ModelConfig.model_validate({"path": str(tiny_policy), "allow_pickled_weights": allowed, **options})
        actor_critic = load_actor_critic(model, 1.0, 0, Reader(device))
        found = {name.rpartition("causal_lm.")[2]: tensor for name, tensor in actor_critic.state_dict().items()}
        assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"])
        load_reference(model, 1.0, Reader(device))

    for options in (
        {"path": str(pickled)},
        {"reference_path": str(pickled)},
        {"critic": "separate", "critic_path": str(pickled)},
    ):
        with pytest.raises(InputError, match=r"Only for models you trust there are .* allow_pickled_weights"):
            load(options, False)
        load(options, True)


def test_the_engine_follows_them_too(pickled: Path) -> None:
    with pytest.raises(InputError, match="allow_pickled_weights"):
        HFEngine(str(pickled))
    HFEngine(str(pickled), trust=Trust(pickles=True)).close()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), cut, lambda file: file.write_bytes(b"no" * 99)])
def test_damaged_weights_are_the_users_mistake(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot load the model .*SafetensorError"):
        load_causal_lm(str(tmp_path))


def test_weights_of_another_shape_are_the_users_mistake(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"of another shape: transformer.*\[24\], by config.json \[48\].*and 13 more"):
        load_causal_lm(str(tmp_path))


def test_code_that_lies_with_a_tokenizer_is_not_run_unasked(tiny_policy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "own_code"))
    (folder / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    options = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(options | own))
    with contextlib.suppress(InputError):  # refused, or made of the other files: by model type
        load_tokenizer(str(folder))
    assert not (folder / "ran").exists()
    assert type(load_tokenizer(str(folder), Trust(remote_code=True))).__name__ == "Own"
    assert (folder / "ran").exists()


def test_code_that_lies_with_a_model_is_not_run_unasked(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config): model_type = 'own'\n"
        "class Own(GPT2LMHeadModel): config_class = OwnConfig\n"
    )
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    with pytest.raises(InputError, match=r"cannot load the model.*trust_remote_code"):
        load_causal_lm(str(tmp_path))
    assert not ran.exists()
    assert type(load_causal_lm(str(tmp_path), trust=Trust(remote_code=True))).__name__ == "Own"
    assert ran.exists()


def test_a_folder_without_weights_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="cannot load the model"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match="cannot load the model"):
        load_causal_lm(str(tmp_path))


SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
Edit = Callable[[dict[str, torch.Tensor]], object]


def save(model: torch.nn.Module, folder: Path, edit: Edit) -> str:
    """Save a model, its tensors changed by `edit`."""
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def llama(tie: bool = False) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tie))


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))


def roberta() -> torch.nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES))


def rename(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def add(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


UP, EXPERT = "model.layers.1.mlp.up_proj.weight", "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.mark.parametrize(
    ("auto_class", "make", "edit", "words"),
    [
        (AutoModelForCausalLM, llama, lambda t: t.pop("lm_head.weight"), "its files lack lm_head.weight$"),
        (AutoModelForCausalLM, llama, lambda t: t.pop(UP), f"its files lack {UP}$"),
        (AutoModelForCausalLM, lambda: llama(tie=True), lambda t: t.pop("model.embed_tokens.weight"), "lack lm_head"),
        (AutoModelForCausalLM, llama, add("model.layers.1.mlp.up_proj.bias", 8), "has no place for, .*up_proj.bias$"),
        (AutoModelForCausalLM, llama, add("model.layers.2.mlp.up_proj.weight", 8, 8), "has no place for, .*layers.2"),
        (AutoModelForCausalLM, llama, add("v_head.0.weight", 8, 8), None),  # the learner refuses such a head
        (
            AutoModelForCausalLM,
            llama,
            add("model.norm.weight", 9),
            r"model.norm.weight \(\[9\], by config.json \[8\]\)$",
        ),
        (AutoModelForCausalLM, gpt2, add("transformer.h.0.attn.masked_bias", 1), None),
        (AutoModelForCausalLM, mixtral, lambda t: t.pop(EXPERT), "layers.0.mlp.experts.gate_up_proj is made of"),
        (AutoModel, llama, lambda t: t, None),  # a critic needs no head
        (AutoModel, llama, lambda t: t.pop(UP), "its files lack layers.1.mlp.up_proj.weight$"),
        (AutoModel, llama, add("model.layers.2.mlp.up_proj.weight", 8, 8), "has no place for, .*layers.2"),
        (AutoModel, llama, add("v_head.summary.weight", 1, 8), None),
        (
            AutoModelForSequenceClassification,
            lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)),
            rename("score.weight", "value_head.weight"),
            "value_head.weight may be what the model calls score.weight: rename it in the file$",
        ),
        (
            AutoModelForSequenceClassification,
            lambda: BertForSequenceClassification(BertConfig(**SIZES)).bert,
            lambda t: t,
            "its files lack classifier.bias, classifier.weight$",
        ),
        (AutoModelForSequenceClassification, roberta, add("roberta.pooler.dense.weight", 8, 8), None),
        (AutoModelForSequenceClassification, roberta, add("lm_head.bias", 20), None),
    ],
)
def test_files_hold_the_tensors_of_the_model_and_no_others(
    tmp_path: Path, auto_class: Any, make: Callable[[], Any], edit: Edit, words: str | None
) -> None:
    path = save(make(), tmp_path, edit)
    model, problem = check_weights("model.path", auto_class.__name__, path, Trust())
    if words is None:
        assert problem is None and {tensor.device.type for tensor in model.parameters()} == {"meta"}
        load_pretrained(auto_class, path, dtype="float32", device="cpu")
        return
    with pytest.raises(InputError, match=f"cannot load the model .*{words}"):
        load_pretrained(auto_class, path, dtype="float32", device="cpu")
    assert model is None and re.search(rf"^model\.path=.*{words}", str(problem))


def test_a_head_that_is_tied_by_the_config_alone_is_refused(tmp_path: Path) -> None:
    copy: Edit = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    model = load_causal_lm(save(llama(tie=True), tmp_path, copy))  # both there and equal, as in many files
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"config.json ties \(tie_word_embeddings\), .* of its own, lm_head.weight"):
        load_causal_lm(save(llama(tie=True), tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(20, 8)})))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    path = save(llama(), tmp_path, lambda t: t[UP].view(-1)[3:4].fill_(value))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(InputError, match=f"has NaN or infinite weights: {UP}; its files are damaged"):
            load_pretrained(AutoModelForCausalLM, path, dtype=dtype, device="cpu")
    large = save(llama(), tmp_path, lambda t: t[UP].fill_(3e38))  # whose sum is infinite
    load_causal_lm(large)


def test_what_is_not_on_this_machine_is_left_to_the_worker_that_loads_it() -> None:
    assert check_weights("model.path", "AutoModelForCausalLM", "nobody/nothing", Trust()) == (None, None)


def test_a_gpu_that_is_asked_for_is_there_or_the_run_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver that is too old, or a torch for CPUs, would compute on the CPU without a word."""
    monkeypatch.delenv("PPO_RAY_GPUS_ARE_NUMBERS", raising=False)
    check_gpu("learner.gpus", 0)
    monkeypatch.setattr(loading, "_DRIVER", tmp_path / "version")
    told = r"learner\.gpus=0\.5, but torch .* \(built for .*\) finds no GPU on node .*: .*; it has no NVIDIA driver\. "
    with pytest.raises(InputError, match=told):
        check_gpu("learner.gpus", 0.5)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Wed Mar\nGCC version: 12\n"
    )
    with pytest.raises(InputError, match=r"its NVIDIA driver is 535\.161\.08\. Install .* needs driver 580 or newer"):
        check_gpu("learner.gpus", 1)
    monkeypatch.setenv("PPO_RAY_GPUS_ARE_NUMBERS", "1")
    check_gpu("learner.gpus", 1)
