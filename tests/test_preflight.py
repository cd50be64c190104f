import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from ppo_ray.config import LoraConfig, load_config
from ppo_ray.errors import InputError
from ppo_ray.models.adapter_files import make_adapter_config, save_adapters
from ppo_ray.models.lora import add_adapters
from ppo_ray.plan.adapters import find_adapter_problem
from ppo_ray.preflight import check, cpu_demand
from ppo_ray.rollout.support import find_engine_problem

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
GIVEN = ("output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r")
BART = {"vocab_size": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 1}


def save_model(model, folder):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "film": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def llama(vocab_size=8, hidden_size=32):
    sizes = {"hidden_size": hidden_size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, **sizes))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a policy, a classifier and prompts that are all right."""
    home = tmp_path_factory.mktemp("home")
    save_model(llama(), home / "policy")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    save_model(BertForSequenceClassification(BertConfig(vocab_size=8, **sizes, **labels)), home / "classifier")
    (home / "texts.csv").write_text("text\n" + "".join(f"film number {number}\n" for number in range(5)))
    return home


@pytest.fixture
def configured(home, monkeypatch):
    monkeypatch.setattr("ppo_ray.preflight.count_cpus", lambda: 2)
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    base = [
        "output_dir=out",
        f"model.path={home / 'policy'}",
        f"prompts.path={home / 'texts.csv'}",
        f"reward.path={home / 'classifier'}",
        "prompts.min_chars=3",
        "prompts.min_tokens=2",
        "prompts.max_tokens=8",
        "rollout.max_response_tokens=16",
        "evaluation.num_prompts=2",
        "evaluation.num_samples=1",
        "rollout.max_context=64",
    ]
    return lambda *overrides: load_config(None, [*base, *overrides])


def problems(config):
    with pytest.raises(InputError) as caught:
        check(config)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_a_model_without_vocabulary_is_no_language_model(configured, home, tmp_path):
    shutil.copytree(home / "policy", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    lines = problems(configured(f"model.path={tmp_path}"))
    assert f"model.path={tmp_path}: its config has no vocab_size; give a language model" in lines


def test_adapters_that_do_not_fit(configured, home, tmp_path):
    check(configured("model.lora.rank=4", "model.critic=separate"))
    lines = problems(configured("model.lora.targets=[q_prj]"))
    assert lines[0].startswith(f"model.path={home / 'policy'}: model.lora.targets: 'q_prj' fits none of the model's")
    assert "q_proj" in lines[0]
    assert "output embedding" in problems(configured("model.lora.targets=[lm_head]"))[0]
    lines = problems(configured(f"model.lora.path={tmp_path}"))
    assert f"model.lora.path={tmp_path}: {tmp_path} holds no adapters" in lines[0]

    base, config = LlamaForCausalLM.from_pretrained(home / "policy"), LoraConfig(rank=2)
    add_adapters(base, make_adapter_config(config, str(home / "policy")), 0)
    trained = {name: tensor for name, tensor in base.named_parameters() if tensor.requires_grad}
    save_adapters(base, tmp_path / "adapters", trained)
    check(configured(f"model.lora.path={tmp_path / 'adapters'}"))
    lines = problems(configured(f"model.path={tmp_path / 'adapters'}"))
    assert any("holds adapters (LoRA), not a whole model; give their base as model.path" in line for line in lines)
    save_model(llama(hidden_size=64), tmp_path / "wider" / "policy")
    lines = problems(configured(f"model.lora.path={tmp_path / 'adapters'}", f"model.path={tmp_path}/wider/policy"))
    assert any("are of another base" in line for line in lines)
    alone = ("rollout.adapter_sync=adapter", "rollout.engine=vllm")
    check(configured("model.lora.rank=4", *alone))
    file, text = tmp_path / "adapters" / "adapter_config.json", (tmp_path / "adapters/adapter_config.json").read_text()
    file.write_text(text.replace('"r": 2', '"r": 513'))
    lines = problems(configured(f"model.lora.path={tmp_path / 'adapters'}", *alone))
    assert any("vLLM serves adapters up to rank 512, and these have rank 513. rollout.adapter_sync" in x for x in lines)
    file.write_text(text)
    text = (tmp_path / "adapters" / "adapter_config.json").read_text().replace(str(home / "policy"), "hub/policy")
    (tmp_path / "adapters" / "adapter_config.json").write_text(text)
    lines = problems(configured(f"model.lora.path={tmp_path / 'adapters'}", f"model.path={tmp_path}/wider/policy"))
    assert any("do not fit the model, they are of another base" in line for line in lines)


def test_adapters_that_vllm_was_not_seen_to_serve():
    config, model = load_config(None, [*GIVEN, "model.lora.rank=4", "rollout.adapter_sync=adapter"]), MambaConfig()
    problem = find_adapter_problem(config.rollout, config.model.lora, model)
    assert "vLLM 0.32 was not seen to serve adapters of the kind mamba" in problem
    assert "rollout.adapter_sync=merged" in problem
    auto = config.rollout.model_copy(update={"adapter_sync": "auto"})
    assert find_adapter_problem(auto, config.model.lora, model) is None
    assert find_adapter_problem(config.rollout.model_copy(update={"engine": "hf"}), config.model.lora, model) is None


def test_what_is_read_is_what_the_run_works_with(configured):
    config = configured()
    inputs = check(config)
    assert inputs.vocab_size == 8 and len(inputs.texts) == 5
    prompts = inputs.open_prompts(config, print)
    film = inputs.tokenizer("film")["input_ids"][0]
    assert {ids[0] for ids in prompts.take(3).prompt_ids} == {film}
    assert len(prompts.held_out().sample_ids) == 2


def test_what_is_right_passes(configured):
    check(configured())
    check(configured("rollout.workers=2", "reward.threads=2", "rollout.batch_size=4"))  # each phase fills both CPUs


def test_demand_is_the_busiest_phase(configured):
    overrides = ["rollout.workers=3", "rollout.threads=2", "reward.workers=5", "learner.threads=4"]
    assert cpu_demand(configured(*overrides)) == 6
    assert cpu_demand(configured(*overrides, "reward.threads=2")) == 10
    assert cpu_demand(configured(*overrides, "learner.threads=7")) == 7


def test_an_update_beside_generation_adds_to_its_threads(configured):
    overlapped = ["rollout.max_staleness=1", "ppo.importance_cap=2", "learner.threads=1"]
    check(configured(*overlapped))  # one thread of each on two CPUs
    assert cpu_demand(configured(*overlapped, "rollout.threads=3", "reward.threads=2")) == 4
    assert problems(configured(*overlapped, "reward.threads=2")) == [
        "reward.workers=1 x reward.threads=2 + learner.workers=1 x learner.threads=1: scoring beside the update "
        "(rollout.max_staleness=1) wants 3 CPU threads, but here are 2 CPUs to use; lower it"
    ]


def test_more_threads_than_the_machine_has(configured, monkeypatch):
    config = configured("rollout.workers=2", "rollout.threads=2", "reward.workers=3", "learner.threads=3")
    assert problems(config) == [
        "rollout.workers=2 x rollout.threads=2: generation wants 4 CPU threads, but here are 2 CPUs to use; lower it",
        "reward.workers=3 x reward.threads=1: scoring wants 3 CPU threads, but here are 2 CPUs to use; lower it",
        "learner.workers=1 x learner.threads=3: the update wants 3 CPU threads, but here are 2 CPUs to use; lower it",
    ]
    check(config.model_copy(update={"ray": config.ray.model_copy(update={"address": "auto"})}))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    check(config.model_copy(update={"output_dir": "/shared/run"}))


def test_a_job_writes_where_it_is_not_deleted_with_it(configured, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (line,) = problems(configured())
    assert line.startswith("output_dir=out: must be absolute, on storage that all nodes share")
    check(configured("output_dir=/shared/run"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ["engine=vllm"],
            "ipc: goes from GPU to GPU, but rollout.gpus=0 and learner.gpus=0; take auto or object_store",
        ),
        (["engine=hf"], "ipc: is vLLM's, but rollout.engine=hf; take auto or object_store"),
        (["gpus=1"], "ipc: goes from GPU to GPU, but rollout.gpus=1 and learner.gpus=0"),
        (
            ["gpus=1", "learner.gpus=1"],
            "ipc: needs a learner rank on every engine's GPU: set ray.placement=colocated and learner.workers to "
            "rollout.workers x rollout.tensor_parallel = 1, or take auto or object_store",
        ),
        (["gpus=1", "learner.gpus=1", "ray.placement=colocated"], None),
        (["weight_transport=nccl"], "nccl: goes from GPU to GPU"),
        (
            ["weight_transport=nccl", "gpus=0.5", "learner.gpus=1"],
            "nccl: needs GPUs that engines and learner do not share, but rollout.gpus=0.5 and learner.gpus=1 with "
            "ray.placement=apart",
        ),
        (
            ["weight_transport=nccl", "gpus=1", "learner.gpus=1", "ray.placement=colocated"],
            "nccl: needs GPUs that engines and learner do not share",
        ),
        (["weight_transport=nccl", "gpus=1", "learner.gpus=1"], None),
    ],
)
def test_transports_that_cannot_work(configured, options, problem):
    overrides = [option if "." in option.partition("=")[0] else f"rollout.{option}" for option in options]
    config = configured("rollout.weight_transport=ipc", *overrides)
    if problem is None:
        check(config)
    else:
        assert problems(config)[0].startswith(f"rollout.weight_transport={problem}")


def test_missing_models_and_texts_are_reported_together(configured, tmp_path):
    found = problems(
        configured(
            f"model.path={tmp_path / 'a'}",
            f"model.reference_path={tmp_path / 'b'}",
            f"reward.path={tmp_path / 'c'}",
            f"prompts.path={tmp_path / 'd.csv'}",
        )
    )
    assert [line.split("=")[0] for line in found] == [
        "model.path",
        "model.reference_path",
        "prompts.path",
        "reward.path",
    ]
    assert all("missing model: no such folder" in line for line in (*found[:2], found[3]))
    assert "no such file" in found[2]


def test_missing_assets_say_how_to_build_them(configured, tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_RAY_CACHE", str(tmp_path))
    found = problems(
        configured("model.path=asset:policy", "reward.path=asset:classifier", "prompts.path=asset:prompts")
    )
    assert len(found) == 3 and all(line.endswith("build it with `ppo-ray assets imdb`") for line in found)


def test_a_hub_name_that_cannot_be_had(configured, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = problems(configured("model.path=nobody/nothing"))
    assert line.startswith("model.path=nobody/nothing: missing model: neither a folder here nor to be had from the hub")


def test_a_folder_that_is_no_model(configured, tmp_path):
    (line,) = problems(configured(f"model.path={tmp_path}"))
    assert "missing model: its config cannot be loaded" in line


def test_pickled_weights_are_refused(configured, tmp_path):
    model = llama()
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "missing model: the folder holds no *.safetensors" in problems(configured(f"model.path={tmp_path}"))[0]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (line,) = problems(configured(f"model.path={tmp_path}"))
    assert "pickled weights only (pytorch_model.bin)" in line and "save_pretrained" in line
    assert "unless model.allow_pickled_weights=true" in line
    check(configured(f"model.path={tmp_path}", "model.allow_pickled_weights=true"))
    (line,) = problems(configured(f"model.path={tmp_path}", "reward.allow_pickled_weights=true"))
    assert "unless model.allow_pickled_weights=true" in line
    for option in ("reference", "critic"):
        overrides = [f"model.{option}_path={tmp_path}", "model.critic=separate"]
        (line,) = problems(configured(*overrides))
        assert line.startswith(f"model.{option}_path=") and "unless model.allow_pickled_weights=true" in line
        check(configured(*overrides, "model.allow_pickled_weights=true"))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "state.pt")  # nothing that transformers could load
    (line,) = problems(configured(f"model.path={tmp_path}", "model.allow_pickled_weights=true"))
    assert "pickled weights only (state.pt), which are not loaded; better convert them" in line


def test_pickled_weights_of_a_classifier_are_refused(configured, home, tmp_path):
    folder = shutil.copytree(home / "classifier", tmp_path / "judge")
    (folder / "model.safetensors").unlink()
    torch.save(load_file(home / "classifier" / "model.safetensors"), folder / "pytorch_model.bin")
    (line,) = problems(configured(f"reward.path={folder}", "model.allow_pickled_weights=true"))
    assert "unless reward.allow_pickled_weights=true" in line
    check(configured(f"reward.path={folder}", "reward.allow_pickled_weights=true"))


def add_code(folder, file, options, code):
    """Give a model or tokenizer code of its own, which leaves a mark beside it when it runs; return where."""
    ran = folder / "ran"
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(found | options))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n{code}")
    return ran


@pytest.mark.parametrize("option", ["model.path", "model.reference_path", "model.critic_path", "reward.path"])
def test_code_of_a_model_is_run_only_where_it_is_trusted(configured, home, tmp_path, option):
    own, base = tmp_path / option.replace(".", "_"), "classifier" if option == "reward.path" else "policy"
    shutil.copytree(home / base, own)
    kind = "Bert" if base == "classifier" else "Llama"
    classes = {"AutoModelForCausalLM": "ForCausalLM", "AutoModel": "Model"}
    classes = classes if kind == "Llama" else {"AutoModelForSequenceClassification": "ForSequenceClassification"}
    auto_map = {"AutoConfig": "own.OwnConfig"} | {auto: f"own.Own{name}" for auto, name in classes.items()}
    ran = add_code(
        own,
        "config.json",
        {"model_type": "own", "auto_map": auto_map},
        f"from transformers import {', '.join(kind + name for name in ('Config', *classes.values()))}\n"
        f"class OwnConfig({kind}Config): model_type = 'own'\n"
        + "".join(f"class Own{name}({kind}{name}): config_class = OwnConfig\n" for name in classes.values()),
    )
    overrides = [f"{option}={own}", "model.critic=separate"]
    section, other = ("reward", "model") if base == "classifier" else ("model", "reward")
    (line,) = problems(configured(*overrides, f"{other}.trust_remote_code=true"))
    assert line.startswith(f"{option}={own}: the model (auto_map in config.json) needs Python code that lies with it")
    assert f"unless {section}.trust_remote_code=true" in line and not ran.exists()
    check(configured(*overrides, f"{section}.trust_remote_code=true"))
    assert ran.exists()


@pytest.mark.parametrize("option", ["model.path", "reward.path"])
def test_code_of_a_tokenizer_is_run_only_where_it_is_trusted(configured, home, tmp_path, option):
    section = option.partition(".")[0]
    own = shutil.copytree(home / ("policy" if section == "model" else "classifier"), tmp_path / f"own_{section}")
    ran = add_code(
        own,
        "tokenizer_config.json",
        {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast): pass\n",
    )
    (line,) = problems(configured(f"{option}={own}"))
    assert line.startswith(f"{option}={own}: the tokenizer (auto_map in tokenizer_config.json) needs Python code")
    assert f"unless {section}.trust_remote_code=true" in line and not ran.exists()
    check(configured(f"{option}={own}", f"{section}.trust_remote_code=true"))
    assert ran.exists()


def test_trusted_code_that_fails_is_not_said_to_lack_trust(configured, home, tmp_path):
    own = shutil.copytree(home / "policy", tmp_path / "own_broken")
    options = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    add_code(own, "config.json", options, "raise RuntimeError('no such luck')")
    (line,) = problems(configured(f"model.path={own}", "model.trust_remote_code=true"))
    assert "its config cannot be loaded: no such luck" in line and "trust_remote_code" not in line


def test_a_model_without_tokenizer(configured, tmp_path):
    llama().save_pretrained(tmp_path)
    (line,) = problems(configured(f"model.path={tmp_path}"))
    assert "its tokenizer cannot be loaded" in line


def test_a_limit_that_a_config_names_otherwise_bounds_the_context(configured, tmp_path):
    save_model(MptForCausalLM(MptConfig(vocab_size=8, d_model=8, n_heads=1, n_layers=1, max_seq_len=24)), tmp_path)
    model = f"model.path={tmp_path}", "rollout.engine=hf", "rollout.stop_at_eos=false"
    check(configured(*model, "rollout.max_context=24"))
    assert problems(configured(*model, "rollout.max_context=25")) == [
        f"rollout.max_context=25: {tmp_path} has only 24 positions; set it to 24 or less"
    ]


def test_context_must_fit_the_model(configured, home):
    assert problems(configured("rollout.max_context=65")) == [
        f"rollout.max_context=65: {home / 'policy'} has only 64 positions; set it to 64 or less"
    ]
    lengths = ("rollout.max_context=null", "prompts.max_tokens=60", "rollout.max_response_tokens=5")
    assert problems(configured(*lengths)) == [
        f"prompts.max_tokens=60 + rollout.max_response_tokens=5: {home / 'policy'} has only 64 positions; lower them "
        "to 64 together"
    ]


def test_reference_must_share_the_vocabulary(configured, tmp_path):
    save_model(llama(vocab_size=9), tmp_path)
    (line,) = problems(configured(f"model.reference_path={tmp_path}"))
    assert "vocabulary of 9 tokens, model.path one of 8" in line


def test_unknown_label_lists_the_known_ones(configured, home):
    assert problems(configured("reward.label=HAPPY")) == [
        f"reward.label=HAPPY: {home / 'classifier'} has no such label; it has NEGATIVE, POSITIVE"
    ]


def test_reward_function(configured, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_preflight_reward.py").write_text("count = 3\ndef score(prompts, responses): return [0.0]")
    (tmp_path / "my_broken_reward.py").write_text("1 / 0")
    (tmp_path / "my_leaving_reward.py").write_text("raise SystemExit")
    check(configured("reward.path=null", "reward.function=my_preflight_reward:score"))
    for function in (
        "my_preflight_reward:count",
        "my_preflight_reward:nothing",
        "no_such_module:score",
        "my_broken_reward:score",
        "my_leaving_reward:score",
    ):
        (line,) = problems(configured("reward.path=null", f"reward.function={function}"))
        assert line.startswith("reward.function=") and function in line


def test_policy_loss_of_ones_own(configured, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_preflight_loss.py").write_text("def loss(logprobs, mask): ...\ndef other(scores): ...")
    (tmp_path / "my_broken_loss.py").write_text("1 / 0")
    check(configured("ppo.policy_loss=my_preflight_loss:loss"))
    for function in ("my_preflight_loss:other", "my_preflight_loss:nothing", "my_broken_loss:loss"):
        (line,) = problems(configured(f"ppo.policy_loss={function}"))
        assert line.startswith("ppo.policy_loss=") and function in line


def test_reward_server(configured, tmp_path, monkeypatch):
    def served(url, *options):
        return configured("reward.path=null", f"reward.url={url}", *options)

    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    assert check(served("http://[::1]:1/score")).notes == check(served("https://h/score")).notes == []
    (note,) = check(served("http://h/score", "reward.token_env=JUDGE_TOKEN")).notes
    assert note.startswith("warning: reward.url=http://h/score is not encrypted: texts and the token can be read")
    assert "texts can be read" in check(served("http://h/score")).notes[0]
    (line,) = problems(served("https://h/", "reward.token_env=NO_SUCH_TOKEN"))
    assert line.startswith("reward.url=https://h/: token_env=NO_SUCH_TOKEN: this environment variable is not set")
    (line,) = problems(served("https://h/", "reward.retries=3", "reward.timeout_s=450"))
    assert "(reward.retries=3 + 1) x reward.timeout_s=450" in line and "ray.call_timeout_s=1800" in line
    (tmp_path / "dates.csv").write_text("text,day\n" + "".join(f"film number {n},2020-01-0{n + 1}\n" for n in range(5)))
    (line,) = problems(served("https://h/", f"prompts.path={tmp_path / 'dates.csv'}", "prompts.keep=[day]"))
    assert "JSON, which cannot hold a value of the kept columns" in line and "date" in line


def test_prompts_are_checked(configured):
    assert problems(configured("prompts.column=review"))[0].startswith("prompts.column=review")
    assert problems(configured("prompts.min_chars=100"))[0].startswith("prompts.min_chars=100: no prompt left")
    assert problems(configured("evaluation.num_prompts=5"))[0].startswith("evaluation.num_prompts=5")


def test_what_ends_a_response_is_found_before_anything_starts(configured, home, tmp_path):
    folder = shutil.copytree(home / "policy", tmp_path / "policy")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1, 9]}')
    inputs = check(configured(f"model.path={folder}"))
    assert inputs.end_tokens.ids == (1, 3)
    assert inputs.describe_ends() == "a response ends with: 1 'film', 3 ''; not in the model's vocabulary: 9"
    (folder / "generation_config.json").write_text("{}")
    (line,) = problems(configured(f"model.path={folder}"))
    assert line.startswith(f"model.path={folder}: neither its tokenizer nor") and "rollout.stop_at_eos=false" in line
    inputs = check(configured(f"model.path={folder}", "rollout.stop_at_eos=false"))
    assert inputs.describe_ends() == "a response ends with: its last token, at its limit"


def test_neither_ray_nor_vllm_is_imported():
    names = "('ray', 'vllm', 'torch')"
    probe = f"import sys, json, ppo_ray.preflight; print(json.dumps([name in sys.modules for name in {names}]))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [False, False, False]


def drop(folder, *names, **new):
    """Take tensors out of a model's file and put others in."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    save_file(kept | {name.replace("__", "."): tensor for name, tensor in new.items()}, folder / "model.safetensors")
    return folder


def test_tensors_that_files_lack_are_found_before_anything_starts(configured, home, tmp_path):
    policy = drop(shutil.copytree(home / "policy", tmp_path / "policy"), "lm_head.weight")
    critic = drop(shutil.copytree(home / "policy", tmp_path / "critic"), "lm_head.weight")  # which a critic needs not
    judge = drop(
        shutil.copytree(home / "classifier", tmp_path / "judge"), "classifier.weight", score__weight=torch.ones(2, 8)
    )
    check(configured("model.critic=separate", f"model.critic_path={critic}"))
    drop(critic, "model.norm.weight")
    found = problems(
        configured(
            f"model.path={policy}",
            f"model.reference_path={drop(shutil.copytree(policy, tmp_path / 'reference'), 'model.norm.weight')}",
            "model.critic=separate",
            f"model.critic_path={critic}",
            f"reward.path={judge}",
        )
    )
    assert [line.split("=")[0] for line in found] == [
        "model.path",
        "model.reference_path",
        "model.critic_path",
        "reward.path",
    ]
    assert [line.partition("its files lack ")[2] for line in found] == [
        "lm_head.weight",
        "lm_head.weight, model.norm.weight",
        "norm.weight",
        "classifier.weight; its files hold, and the model has no place for, score.weight; "
        "score.weight may be what the model calls classifier.weight: rename it in the file",
    ]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0)),
            "changes its logits after the output embedding ({'final_logit_softcapping': 30.0}); the learner does not",
        ),
        (
            lambda: BartForConditionalGeneration(BartConfig(**BART)),
            "is an encoder-decoder (bart); give a model that is a decoder alone",
        ),
    ],
)
def test_a_model_that_the_learner_cannot_compute_is_told_by_its_config(configured, tmp_path, model, words):
    save_model(model(), tmp_path)
    for option in ("model.path", "model.reference_path"):
        lines = problems(configured(f"{option}={tmp_path}"))
        assert any(line.startswith(f"{option}={tmp_path}: {words}") for line in lines)


def test_positions_that_depend_on_the_batch_bound_the_context(configured, tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters=rope,
        pad_token_id=0,
        eos_token_id=0,
    )
    save_model(Phi3ForCausalLM(config), tmp_path)
    check(configured(f"model.path={tmp_path}", "rollout.engine=hf", "rollout.max_context=32"))
    assert problems(configured(f"model.path={tmp_path}", "rollout.engine=hf", "rollout.max_context=33")) == [
        f"rollout.max_context=33: beyond 32 tokens, the longrope positions of {tmp_path} depend on the longest "
        "sequence of a batch; set it to 32 or less"
    ]


@pytest.mark.parametrize(("size", "serves"), [(8, False), (24, False), (48, True), (64, True), (504, False)])
def test_vllm_has_no_attention_on_a_cpu_for_some_sizes_of_heads(configured, tmp_path, size, serves):
    save_model(llama(hidden_size=size), tmp_path)
    check(configured(f"model.path={tmp_path}", "rollout.engine=hf"))
    if serves:
        check(configured(f"model.path={tmp_path}"))
    else:
        assert problems(configured(f"model.path={tmp_path}")) == [
            f"model.path={tmp_path}: its attention heads have {size} units, and vLLM has no attention for that size on "
            "a CPU. rollout.engine=hf samples with transformers, slower, from any model the learner takes"
        ]
    assert "vllm" not in sys.modules


def test_layers_may_have_heads_of_different_sizes(configured):
    rollout = configured().rollout
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 6, "head_dim": 64}
    assert find_engine_problem(rollout, Gemma4TextConfig(**sizes, global_head_dim=128)) is None
    problem = find_engine_problem(rollout, Gemma4TextConfig(**sizes, global_head_dim=72))
    assert problem is not None and problem.startswith("its attention heads have 72 units")


def test_a_model_whose_weights_vllm_cannot_replace(configured, tmp_path):
    save_model(GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, head_dim=32, eos_token_id=0)), tmp_path)
    check(configured(f"model.path={tmp_path}", "rollout.engine=hf"))
    (line,) = problems(configured(f"model.path={tmp_path}", "rollout.gpus=0"))
    assert line.startswith(f"model.path={tmp_path}: vLLM cannot replace the experts' weights of the kind gpt_oss. roll")


def test_kinds_and_windows_that_vllm_does_not_compute_are_refused(configured, monkeypatch):
    cpu, gpu, hf = (configured(*more).rollout for more in ((), ("rollout.gpus=1",), ("rollout.engine=hf",)))
    said = find_engine_problem(cpu, Ernie4_5_MoeConfig())
    assert said is not None and said.startswith("vLLM 0.32, tried on a CPU, computes other log-probabilities than")
    assert (
        find_engine_problem(gpu, Ernie4_5_MoeConfig()) == said and find_engine_problem(hf, Ernie4_5_MoeConfig()) is None
    )
    said = find_engine_problem(cpu, MambaConfig())
    assert said is not None and said.startswith(
        "vLLM 0.32 cannot run models of the kind mamba on a CPU. rollout.engine="
    )
    assert find_engine_problem(gpu, MambaConfig()) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = find_engine_problem(cpu, Gemma3Config())
    assert said is not None and said.startswith("vLLM needs torchvision for the kind gemma3, which is not installed. r")
    monkeypatch.undo()
    windows = Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2)
    said = find_engine_problem(gpu, windows)
    assert said is not None and said.startswith("vLLM does not compute the attention windows of the kind qwen2")
    assert find_engine_problem(gpu, Qwen2Config(sliding_window=8)) is None  # not used
    said = find_engine_problem(gpu, DeepseekV3Config())
    assert said is not None and said.startswith("vLLM needs topk_method in the config.json of the kind deepseek_v3")
    assert find_engine_problem(gpu, DeepseekV3Config(topk_method="noaux_tc")) is None


def test_a_classifier_must_have_room_for_a_response(configured, home, tmp_path):
    shutil.copytree(home / "classifier", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 20}))
    table = "bert.embeddings.position_embeddings.weight"
    drop(tmp_path, table, **{table.replace(".", "__"): torch.ones(20, 8)})
    reward = f"reward.path={tmp_path}"
    assert problems(configured(reward, "rollout.max_response_tokens=21")) == [
        f"rollout.max_response_tokens=21: {tmp_path} takes texts of at most 20 tokens and would not see a whole "
        "response; set it to 20 or less"
    ]
    assert check(configured(reward, "rollout.max_response_tokens=15", "prompts.max_tokens=6")).notes == [
        f"{tmp_path} takes texts of at most 20 tokens, and prompt and response may have 21: of such a text it sees the "
        "end; score/truncated_rate is their share"
    ]
    assert check(configured(reward, "rollout.max_response_tokens=14", "prompts.max_tokens=6")).notes == []


def test_a_classifier_of_a_kind_that_transformers_does_not_have(configured, home, tmp_path):
    shutil.copytree(home / "classifier", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "codegen"}))
    assert problems(configured(f"reward.path={tmp_path}")) == [
        f"reward.path={tmp_path}: transformers has no sequence classifier of the kind codegen"
    ]


def test_a_softmax_that_means_nothing_is_found_before_anything_starts(configured, home, tmp_path):
    shutil.copytree(home / "classifier", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"problem_type": "multi_label_classification"}))
    (line,) = problems(configured(f"reward.path={tmp_path}", "reward.transform=softmax"))
    assert line.startswith("reward.transform=softmax: the outputs of") and "multi_label_classification" in line


def test_a_judge_is_checked_before_it_is_asked(configured, home, tmp_path):
    (tmp_path / "q.txt").write_text("{response} {answr}")
    judge = f"path: {home / 'policy'}, prompt: {tmp_path / 'q.txt'}, pattern: '(x)'"
    lines = problems(configured("reward.path=null", f"reward.judge={{{judge}, max_context: 9000}}"))
    assert f"reward.judge.prompt={tmp_path / 'q.txt'}: nothing is known for {{answr}}" in lines[0]
    assert any(line.startswith("reward.judge.max_context=9000:") for line in lines)
    (tmp_path / "q.txt").write_text("{response}")
    parts = f"[{{name: a, judge: {{{judge}, engine: hf, max_context: 64, max_tokens: 8}}}}]"
    check(configured("reward.path=null", f"reward.parts={parts}"))
    missing = f"[{{name: a, judge: {{path: /no, prompt: {tmp_path / 'q.txt'}, pattern: '(x)'}}}}]"
    (line,) = problems(configured("reward.path=null", f"reward.parts={missing}"))
    assert line.startswith("reward.parts[0].judge.path=/no: missing model")


def test_sets_and_sources_are_checked_by_their_own_names(configured, home, tmp_path):
    sets = f"evaluation.sets={{hard: {{path: {tmp_path / 'no.csv'}}}, easy: {{path: {home / 'texts.csv'}}}}}"
    (line,) = problems(configured(sets))
    assert line == f"evaluation.sets.hard.path={tmp_path / 'no.csv'}: no such file"
    config = configured(f"evaluation.sets={{easy: {{path: {home / 'texts.csv'}, num_prompts: 9}}}}")
    (batch,) = check(config).open_sets(config).values()
    assert sorted(batch.sample_ids) == [-5, -4, -3, -2, -1]  # all that there are


def test_it_is_said_how_many_texts_of_a_set_are_those_of_the_training_too(configured, home, tmp_path):
    known = (home / "texts.csv").read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join([known[0], "nobody wrote this before"]))
    (tmp_path / "mixed.csv").write_text("\n".join([*known[:3], "nobody wrote this before", "nor this one"]))
    sets = f"{{new: {{path: {tmp_path / 'new.csv'}}}, mixed: {{path: {tmp_path / 'mixed.csv'}}}}}"
    (note,) = [note for note in check(configured(f"evaluation.sets={sets}")).notes if "evaluation.sets" in note]
    assert note.startswith("evaluation.sets.mixed: 2 of its 4 texts are among those of ")
