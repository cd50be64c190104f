import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from ppo_ray.algo.kl import KLEstimator
from ppo_ray.algo.losses import Aggregation
from ppo_ray.config import Config, load_config, to_yaml, weight_transport
from ppo_ray.config.explain import ABBREVIATIONS, all_options
from ppo_ray.errors import InputError
from ppo_ray.learner.optimizer import Schedule
from ppo_ray.reward.classifier import Transform

REQUIRED = ["output_dir=runs/x", "model.path=gpt2", "prompts.path=reviews.csv", "reward.path=judge"]
NO_REWARD = REQUIRED[:3]


def violations(*overrides, path=None):
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_are_trls():
    ppo = load_config(None, REQUIRED).ppo
    assert (ppo.learning_rate, ppo.epochs, ppo.gamma, ppo.gae_lambda) == (1.41e-5, 4, 1.0, 0.95)
    assert (ppo.clip_range, ppo.value_clip_range, ppo.value_coef) == (0.2, 0.2, 0.1)
    assert (ppo.kl_controller, ppo.kl_coef, ppo.kl_target, ppo.kl_horizon) == ("adaptive", 0.2, 6.0, 10000.0)
    assert (ppo.max_grad_norm, ppo.ratio_threshold, ppo.whiten_rewards) == (None, 10.0, "off")


def test_file_then_overrides_in_order(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\noutput_dir: a\nmodel: {path: gpt2}\nprompts: {path: p.csv}\nreward: {path: r}\nppo:\n")
    config = load_config(path, ["steps=4", "output_dir=b", "steps=5", "ppo.minibatch_size=null"])
    assert (config.steps, config.output_dir, config.model.path, config.ppo.minibatch_size) == (5, "b", "gpt2", None)


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2", 2.0), ("0.5", 0.5), ("1E-3", 1e-3)])
def test_numbers_are_read_as_floats(text, value, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"ppo: {{learning_rate: {text}}}")
    from_file = load_config(path, REQUIRED).ppo.learning_rate
    from_override = load_config(None, [*REQUIRED, f"ppo.learning_rate={text}"]).ppo.learning_rate
    assert from_file == from_override == value and isinstance(from_file, float)


def test_environment_variables_are_put_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: ${oc.env:SCRATCH}/run")
    assert load_config(path, REQUIRED[1:]).output_dir == "/scratch/me/run"
    with pytest.raises(InputError, match=r"output_dir.*NOT_SET_ANYWHERE"):
        load_config(None, [*REQUIRED, "output_dir=${oc.env:NOT_SET_ANYWHERE}"])


def test_assets_and_home_become_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_RAY_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        None,
        [
            "output_dir=~/x",
            "model.path=asset:policy",
            "reward.path=asset:classifier",
            "prompts.path=asset:prompts",
        ],
    )
    assert config.output_dir == "/home/me/x"
    assert config.model.path == str(tmp_path / "imdb-v1" / "policy")
    assert config.reward.path == str(tmp_path / "imdb-v1" / "classifier")
    assert config.prompts.path == str(tmp_path / "imdb-v1" / "prompts.parquet")
    assert violations(*REQUIRED, "model.path=asset:polcy") == [
        "model.path: 'asset:polcy' is no asset; there are asset:policy, asset:classifier, asset:reward_model, "
        "asset:prompts, asset:sums, asset:two_digit_sums, asset:chats, asset:toy, asset:words"
    ]


def test_an_asset_is_nowhere_to_write_to(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert violations(*REQUIRED, "output_dir=asset:policy") == [
        "output_dir: 'asset:policy' is an asset, which is only read; give a folder that the run may write to"
    ]
    assert load_config(None, [*REQUIRED, "output_dir=~/asset:policy"]).output_dir == "/home/me/asset:policy"


@pytest.mark.parametrize(
    ("section", "option", "known"),
    [
        ("ppo", "loss_aggregation", get_args(Aggregation)),
        ("ppo", "kl_estimator", [*get_args(KLEstimator), "full"]),  # full is computed from the logits, not estimated
        ("ppo", "learning_rate_schedule", get_args(Schedule)),
        ("reward", "transform", get_args(Transform)),
    ],
)
def test_an_option_offers_what_the_code_can_do(section, option, known):
    model = Config.model_fields[section].annotation
    assert set(get_args(model.model_fields[option].annotation)) == set(known)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("ppo.clip_rnage=0.1", "ppo.clip_rnage: unknown option; did you mean ppo.clip_range?"),
        ("rolout.workers=2", "rolout: unknown option; did you mean rollout?"),
        ("ray.adress=auto", "ray.adress: unknown option; did you mean ray.address?"),
        ("min_chars=3", "min_chars: unknown option; did you mean prompts.min_chars?"),
        ("lr=3e-5", "lr: unknown option; did you mean ppo.learning_rate?"),
        ("ppo.lr=3e-5", "ppo.lr: unknown option; did you mean ppo.learning_rate?"),
        ("bs=64", "bs: unknown option; did you mean rollout.batch_size?"),
        ("kl=0.1", "kl: unknown option; did you mean ppo.kl_coef?"),
        ("num_gpus=2", "num_gpus: unknown option; did you mean rollout.gpus or reward.gpus or learner.gpus?"),
        ("threads=3", "threads: unknown option; did you mean rollout.threads or reward.threads or learner.threads?"),
        ("ppo.init_kl_coef=0.1", "ppo.init_kl_coef: unknown option; TRL's init_kl_coef is ppo.kl_coef here"),
        ("lam=0.9", "lam: unknown option; TRL's lam is ppo.gae_lambda here"),
        ("mini_batch_size=4", "mini_batch_size: unknown option; TRL's mini_batch_size is ppo.minibatch_size here"),
        (
            "ppo.gradient_accumulation_steps=4",
            "ppo.gradient_accumulation_steps: unknown option; TRL's gradient_accumulation_steps is "
            "ppo.gradient_accumulation here",
        ),
        (
            "ppo.gradient_accumulation=3",
            "ppo.gradient_accumulation: 3 equal parts cannot be made of a mini-batch of 128 trajectories",
        ),
        ("ppo.warmup_steps=101", "ppo.warmup_steps: 101 exceeds steps=100: the warm-up would never end"),
        ("ppo.value_warmup_steps=100", "ppo.value_warmup_steps: 100 of steps=100: the policy would never learn"),
        (
            "model.critic_path=gpt2",
            "model.critic_path: is for model.critic=separate; set that, or leave critic_path out",
        ),
        ("rollout.batch_size=x", "rollout.batch_size: 'x' is not a whole number"),
        ("rollout.batch_size='32'", "rollout.batch_size: '32' is not a whole number"),
        ("rollout.workers=true", "rollout.workers: true is not a whole number"),
        ("steps=1.5", "steps: 1.5 is not a whole number"),
        ("ppo.gamma=true", "ppo.gamma: true is not a number"),
        ("ppo.gamma=.nan", "ppo.gamma: nan must be a finite number"),
        ("ppo.clip_range=0", "ppo.clip_range: 0 must be greater than 0"),
        ("ppo.gae_lambda=1.5", "ppo.gae_lambda: 1.5 must be at most 1"),
        ("seed=-1", "seed: -1 must be at least 0"),
        ("rollout.temperature=0", "rollout.temperature: 0 must be greater than 0"),
        ("prompts.shuffle=1", "prompts.shuffle: 1 is neither true nor false"),
        ("model.dtype=fp16", "model.dtype: 'fp16' is not one of 'float32' or 'bfloat16'"),
        ("reward.label=3", "reward.label: 3 is not text; write it in quotes: \"'3'\""),
        ("model.path=null", "model.path: null is not text"),
        ("output_dir=''", "output_dir: must not be empty"),
        ("learner=3", "learner: 3 is not a section of options"),
        ("reward.function=len", "reward.function: 'len' must look like package.module:function"),
        ("checkpoint.best_by=eval/", "checkpoint.best_by: 'eval/' must match ^(score/mean|eval/[^ ]+)$"),
        ("steps", "steps: not an override; write section.option=value, e.g. ppo.learning_rate=1e-5"),
        ("ppo..x=1", "ppo..x=1: not an override; write section.option=value, e.g. ppo.learning_rate=1e-5"),
        ("ppo.minibatch_size=7", "ppo.minibatch_size: 7 does not divide rollout.batch_size=128"),
        ("prompts.min_tokens=513", "prompts.min_tokens: 513 exceeds prompts.max_tokens=512"),
        ("rollout.max_context=767", None),
        ("rollout.min_response_tokens=257", "rollout.min_response_tokens: 257 exceeds rollout.max_response_tokens=256"),
        ("evaluation.num_samples=257", "evaluation.num_samples: 257 exceeds evaluation.num_prompts=256"),
        ("prompts.path=null", "prompts.path: required, but not given; or give prompts.sources"),
        (
            "prompts.sources=[{name: a, path: a}]",
            "prompts.path: is for one data set; name it among prompts.sources, or leave these out",
        ),
        ("evaluation.sets={a: {}}", "evaluation.sets.a.path: required, but not given"),
        ("evaluation.sets={a/b: {path: p}}", "evaluation.sets: 'a/b' is no name: letters, digits and _ only"),
        ("reward.function=a:b", None),
        ("reward.url=http://h/", None),
        ("reward.path=null", None),
        ("reward.retries=-1", "reward.retries: -1 must be at least 0"),
        (
            "reward.token_env=TOKEN",
            "reward.token_env: reward.token_env is for reward.url; give that too, or leave it out",
        ),
    ],
)
def test_one_violation_one_line(override, line):
    found = violations(*REQUIRED, override)
    assert len(found) == 1
    if line:
        assert found == [line]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        *(
            (url, "must be the address of a server")
            for url in ("judge", "ftp://h/", "http://", "http://h:x/", "http://[::1")
        ),
        *((url, "must be the address of a server") for url in ("http://h/a b", "http://h/#part", "file:///etc/passwd")),
        *((url, "holds a user, password or query") for url in ("https://me:s3cret@h/", "https://h/score?key=s3cret")),
    ],
)
def test_what_is_no_address_or_holds_a_secret_is_refused_and_not_shown(url, why):
    (line,) = violations(*NO_REWARD, f"reward.url={url!r}")
    assert line.startswith("reward.url: ") and why in line and "s3cret" not in line


def test_a_token_in_place_of_its_variables_name_is_not_shown():
    (line,) = violations(*NO_REWARD, "reward.url=https://h/", "reward.token_env=s3cret-token")
    assert line.startswith("reward.token_env: must be the name of an environment variable") and "s3cret" not in line


def test_each_part_is_one_kind_of_reward():
    first = "{name: a, url: 'https://h/', function: 'b:c'}, {name: b}"
    both, none, token = violations(*NO_REWARD, f"reward.parts=[{first}, {{name: c, function: 'b:c', token_env: T}}]")
    assert "give reward.parts[0].path (a classifier), reward.parts[0].function (a Python function), reward" in both
    assert both.endswith(
        "reward.parts[0].url (a server) or reward.parts[0].judge (a judge), not several"
    ) and none.endswith("one of them")
    assert "reward.parts[2].token_env is for reward.parts[2].url" in token
    (line,) = violations(*NO_REWARD, "reward.parts=[{name: a, url: 'https://h/'}]", "reward.url=https://h/")
    assert line.startswith("reward.parts: stands instead of reward.path, reward.function, reward.url and")
    config = load_config(None, [*NO_REWARD, "reward.parts=[{name: a, url: 'https://h/', token_env: T}]"])
    assert config.reward.parts[0].url == "https://h/"


def test_a_judges_pattern_has_one_group_and_its_answer_leaves_room_for_the_question():
    def lines(**judge):
        options = ", ".join(f"{name}: {value}" for name, value in {"path": "m", "prompt": "q.txt", **judge}.items())
        return violations(*NO_REWARD, f"reward.judge={{{options}}}")

    assert lines(pattern="'('")[0].startswith("reward.judge.pattern: '(' is no regular expression: missing )")
    assert lines(pattern="good")[0].endswith("'good' has 0 groups in parentheses; it must have one, around the verdict")
    assert lines() == ["reward.judge.pattern: required, but not given"]
    assert lines(pattern="(yes|no)", max_tokens=2048) == [
        "reward.judge: reward.judge.max_tokens=2048 leaves no room for the question in max_context=2048"
    ]
    right = "reward.judge={path: m, prompt: q.txt, pattern: '(yes|no)', scores: {'yes': 1, 'no': 0.5}}"
    assert load_config(None, [*NO_REWARD, right]).reward.judge.scores == {"yes": 1, "no": 0.5}


def test_weights_of_a_mixture_are_whole_numbers_or_small_fractions():
    def sources(*weights):
        listed = ", ".join(f"{{name: s{n}, path: p, weight: {weight}}}" for n, weight in enumerate(weights))
        return [*REQUIRED, "prompts.path=null", f"prompts.sources=[{listed}]"]

    assert load_config(None, sources(0.7, 0.2, 0.1)).prompts.quotas == (7, 2, 1)
    assert load_config(None, sources(2, 4)).prompts.quotas == (1, 2)
    (line,) = violations(*sources(0.33333, 0.66667))
    assert line.startswith("prompts.sources: the weights 0.33333 : 0.66667 are exact after 100,000 prompts only")
    (line,) = violations(*sources(1, 0))
    assert line == "prompts.sources.1.weight: 0 must be greater than 0"


@pytest.mark.parametrize("name", ["top_k=50", "top_p=0.9", "repetition_penalty=1.1", "num_beams=4", "min_new_tokens=2"])
def test_sampling_that_the_learner_cannot_account_for_is_refused(name):
    (line,) = violations(*REQUIRED, f"rollout.{name}")
    assert line.startswith(f"rollout.{name.partition('=')[0]}: not offered: the learner's log-probabilities are those")
    assert "rollout.temperature" in line


def test_the_plain_log_ratio_is_for_the_reward():
    (line,) = violations(*REQUIRED, "ppo.kl_in=loss")
    assert line.startswith("ppo.kl_in: loss is not for kl_estimator=k1") and "take k2" in line
    for estimator in ("k2", "k3", "abs"):
        assert load_config(None, [*REQUIRED, "ppo.kl_in=loss", f"ppo.kl_estimator={estimator}"]).ppo.kl_in == "loss"


def test_a_penalty_for_a_missing_end_needs_ends():
    (line,) = violations(*REQUIRED, "rollout.stop_at_eos=false", "ppo.missing_eos_penalty=1.5")
    assert line.startswith("ppo.missing_eos_penalty: 1.5 would be taken off every score: with rollout.stop_at_eos=fal")
    load_config(None, [*REQUIRED, "rollout.stop_at_eos=false", "ppo.missing_eos_penalty=0"])
    load_config(None, [*REQUIRED, "ppo.missing_eos_penalty=1.5"])


def test_vllm_raises_temperatures_below_its_limit():
    (line,) = violations(*REQUIRED, "rollout.temperature=0.009")
    assert line.startswith("rollout.temperature: 0.009 is below 0.01, the lowest at which rollout.engine=vllm samples")
    assert line.endswith("set 0.01 or more, or rollout.engine=hf")
    load_config(None, [*REQUIRED, "rollout.temperature=0.01"])
    load_config(None, [*REQUIRED, "rollout.temperature=0.009", "rollout.engine=hf"])
    found = importlib.util.find_spec("vllm")  # read, not imported, which takes long
    if found is not None:
        (limit,) = re.findall(
            r"^_MAX_TEMP = (.+)$", Path(found.origin).with_name("sampling_params.py").read_text(), re.M
        )
        assert float(limit) == 0.01


def test_the_full_divergence_is_for_the_reward():
    (line,) = violations(*REQUIRED, "ppo.kl_estimator=full", "ppo.kl_in=loss")
    assert line.startswith("ppo.kl_estimator: full is for kl_in=reward")


def test_overlap_needs_importance_weights_and_two_checkpoints():
    both = violations(*REQUIRED, "rollout.max_staleness=1", "checkpoint.keep_last=1")
    assert [line.split(":")[0] for line in both] == ["rollout.max_staleness", "checkpoint.keep_last"]
    assert "set ppo.importance_cap (2 is usual)" in both[0] and "checkpoint.keep_best=false" in both[1]
    overlapped = [*REQUIRED, "rollout.max_staleness=1", "ppo.importance_cap=2"]
    for enough in ("checkpoint.keep_last=2", "checkpoint.keep_best=false"):
        assert load_config(None, [*overlapped, "checkpoint.keep_last=1", enough]).rollout.max_staleness == 1
    (colocated,) = violations(*overlapped, "ray.placement=colocated")
    assert colocated.startswith("ray.placement: colocated engines sleep")
    assert violations(*overlapped, "rollout.max_staleness=2") == ["rollout.max_staleness: 2 must be at most 1"]


def test_an_override_inside_a_list():
    found = violations(*REQUIRED, "ppo=[1]", "ppo.gamma=1")
    assert found == ["ppo.gamma: ppo is a list, not a section", "ppo: [1] is not a section of options"]


def test_limits_themselves_are_allowed():
    lengths = ["prompts.max_tokens=8", "rollout.max_response_tokens=16", "rollout.max_context=24"]
    config = load_config(None, [*REQUIRED, *lengths, "ppo.gamma=1", "ppo.gae_lambda=0", "seed=0"])
    assert config.rollout.max_context == 24
    assert load_config(None, [*REQUIRED, "evaluation.num_prompts=0"]).evaluation.num_prompts == 0


def test_all_violations_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("seed: x\nppo: {clip_rnage: 1, minibatch_size: 7}\nrollout: {max_context: 10}\n")
    found = violations("steps", "model.dtype=fp16", *REQUIRED[2:], path=path)
    assert [line.split(":")[0] for line in found] == [
        "steps",
        "seed",
        "output_dir",
        "model.path",
        "model.dtype",
        "ppo.clip_rnage",
        "rollout.max_context",  # contradictions are found although other options are wrong
        "ppo.minibatch_size",
    ]


def test_no_contradiction_is_blamed_on_an_option_that_is_wrong_already():
    found = violations(*REQUIRED, "rollout.batch_size=x", "ppo.minibatch_size=7")
    assert found == ["rollout.batch_size: 'x' is not a whole number"]


def test_empty_config_names_what_is_required():
    assert [line.split(":")[0] for line in violations()] == ["output_dir", "model.path", "prompts.path", "reward.path"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2", "not a list"), ("a: 1\na: 2", "duplicate"), ("${oops", "run.yaml")],
)
def test_broken_files(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path, REQUIRED)


def test_abbreviations_are_of_options_that_there_are():
    assert set(ABBREVIATIONS.values()) <= set(dict(all_options(Config)))
    assert not set(ABBREVIATIONS) & {name.rpartition(".")[2] for name in dict(all_options(Config))} - {"model"}


def test_the_word_off_needs_no_quotes(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("ppo: {early_stopping: off, whiten_rewards: off}")
    config = load_config(path, [*REQUIRED, "ppo.early_stopping=off"])
    assert (config.ppo.early_stopping, config.ppo.whiten_rewards) == ("off", "off")
    (line,) = violations(*REQUIRED, "ppo.early_stopping=on")
    assert line.startswith("ppo.early_stopping: true is not one of 'off'")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"is a folder; give a file, e\.g\. .*config\.yaml"):
        load_config(tmp_path, REQUIRED)
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "no.yaml", REQUIRED)
    with pytest.raises(InputError, match=r"binary\.yaml cannot be read"):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        load_config(tmp_path / "binary.yaml", REQUIRED)


def test_written_out_and_read_back_is_equal(tmp_path):
    config = load_config(None, [*REQUIRED, "ppo.learning_rate=3e-6", "reward.label='5'", "rollout.engine=hf"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml", []) == config
    written = yaml.safe_load(to_yaml(config))
    assert set(written) == set(Config.model_fields) and set(written["ppo"]) == set(type(config.ppo).model_fields)


FOUR_RANKS_OF_TWO_ENGINES = ["rollout.tensor_parallel=2", "rollout.workers=2", "learner.workers=4"]


@pytest.mark.parametrize(
    ("overrides", "transport"),
    [
        ([], "object_store"),
        (["ray.placement=colocated"], "object_store"),
        (["rollout.gpus=1"], "object_store"),
        (["rollout.gpus=1", "learner.gpus=1"], "nccl"),
        (["rollout.gpus=1", "learner.gpus=1", "ray.placement=colocated"], "ipc"),
        (["rollout.gpus=1", "learner.gpus=1", "ray.placement=colocated", "rollout.workers=2"], "object_store"),
        (["rollout.gpus=1", "learner.gpus=1", "ray.placement=colocated", *FOUR_RANKS_OF_TWO_ENGINES], "ipc"),
        (["rollout.gpus=0.4", "learner.gpus=0.5"], "object_store"),
        (["rollout.gpus=1", "learner.gpus=1", "rollout.engine=hf"], "object_store"),
        (["rollout.gpus=1", "learner.gpus=1", "rollout.weight_transport=object_store"], "object_store"),
        (["rollout.weight_transport=nccl"], "nccl"),
    ],
)
def test_weights_take_the_fastest_way_that_fits(overrides, transport):
    assert weight_transport(load_config(None, [*REQUIRED, *overrides])) == transport


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(None, REQUIRED).steps = 5


def test_every_option_is_documented():
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    assert len(sections) == 10
    for name, section in sections.items():
        for option, field in section.model_fields.items():
            assert field.description, f"{name}.{option}"


@pytest.mark.parametrize("section", ["", "ppo"])
def test_thousands_of_unknown_options_are_answered_in_a_screen(tmp_path, section):
    lines = [f"{'  ' if section else ''}key{number}: 1\n" for number in range(10_000)]
    (tmp_path / "other.yaml").write_text("".join([f"{section}:\n"] * bool(section) + lines))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "other.yaml", REQUIRED)
    first, *shown, last = str(caught.value).splitlines()
    assert first.startswith("10,000 problems") and len(shown) == 20 and last == "  ... and 9,980 more"
    assert all("unknown option; " in line for line in shown)


@pytest.mark.parametrize(
    "override", ["ppo.key{}=1", "key{}=1", "key{}.option=1", "word{}", "steps=[{}", "ppo..x=[{}", "ppo=[{}"]
)
def test_thousands_of_bad_overrides_are_answered_in_a_screen(override):
    good = [f"ppo.gamma=0.{number}" for number in range(1000)]
    found = violations(*REQUIRED, *good, *(override.format(number) for number in range(10_000)))
    assert len(found) == 21 and found[-1] == "... and 9,980 more"


def test_one_bad_override_among_thousands_of_good_ones_is_named():
    good = [f"ppo.gamma=0.{number}" for number in range(3000)]
    assert violations(*REQUIRED, *good, "seed=[", *good) == [
        "seed: '[' is not valid YAML; put it in quotes twice: seed='\"...\"'"
    ]


def test_a_file_beyond_any_config_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"key{number}: 1\n" for number in range(30_000)))
    with pytest.raises(InputError, match=r"holds more than 50,000 keys and values, aliases expanded; is it a config\?"):
        load_config(path, REQUIRED)
    bomb = "a: &a0 [1]\n" + "".join(f"k{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9))
    path.write_text(bomb)
    with pytest.raises(InputError, match=r"aliases expand"):
        load_config(path, REQUIRED)


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "a: " + "[" * 300 + "]" * 300])
def test_what_is_nested_deeper_than_any_config_is_refused(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match="more than 20 levels"):
        load_config(tmp_path / "run.yaml", REQUIRED)
    (line,) = violations(*REQUIRED, text.replace("a: ", "seed="))
    assert line == "seed: more than 20 levels, one in another; no option has two"


@pytest.mark.parametrize("override", ["seed={}", "{}=1", "ppo.{}=1", "{}"])
def test_a_problem_of_a_million_characters_is_a_line(override):
    (line,) = violations(*REQUIRED, override.format("x" * 1_000_000))
    assert len(line) < 600 and line.endswith("characters)")


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    (tmp_path / "run.yaml").write_text('"two\\nlines\\e[2J": 1')
    with pytest.raises(InputError, match=r"  two\\nlines\\x1b\[2J: unknown option"):
        load_config(tmp_path / "run.yaml", REQUIRED)
    assert violations(*REQUIRED, "seed=\udcff") == ["seed: '\\udcff' is not valid Unicode"]


def test_numbers_beyond_any_integer(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: " + "9" * 5000)
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "run.yaml", REQUIRED)
    (line,) = violations(*REQUIRED, "seed=" + "9" * 5000)
    assert line.startswith("seed: ")


def test_interpolations_of_interpolations_are_refused_in_no_time(tmp_path):
    lines = ["l0: lollollollol", *(f"l{i}: ${{l{i - 1}}}${{l{i - 1}}}" for i in range(1, 60))]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"l2: \$\{l1\} must name an option of the file that is not made of others"):
        load_config(path)


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "API_KEY"])
def test_a_secret_is_not_taken_into_a_config_that_is_written_out(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "s3cret")
    path = tmp_path / "c.yaml"
    path.write_text(f"output_dir: ${{oc.env:{name}}}")
    with pytest.raises(InputError, match=f"oc.env:{name}}} would write a secret") as refusal:
        load_config(path)
    assert "s3cret" not in str(refusal.value)


def test_a_value_that_its_interpolations_make_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LONG_NAME", "x" * 4000)
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: " + "${oc.env:LONG_NAME}" * 3)
    with pytest.raises(InputError, match=r"output_dir: 12,057 characters with what it refers to, more than 10,000"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.lora.rank=0", "model.lora.rank: 0 must be at least 1"),
        ("model.lora.rank=4096", "model.lora.rank: 4096 must be at most 512"),
        ("model.lora.alpha=0", "model.lora.alpha: 0 must be greater than 0"),
        ("model.lora.dropout=0.1", "model.lora.dropout: not offered: PPO compares two passes"),
        ("model.lora={dropout: 0.1}", "model.lora.dropout: not offered: PPO compares two passes"),
        ("model.lora.rnk=8", "model.lora.rnk: unknown option; did you mean model.lora.rank?"),
        ("model.lora={path: x, alpha: 3}", "model.lora.alpha: is for new adapters"),
        ("rollout.adapter_sync=adapter", "rollout.adapter_sync: adapter sends adapters alone, and without model.lora"),
    ],
)
def test_adapters_that_cannot_be(override: str, line: str) -> None:
    given = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r", override]
    with pytest.raises(InputError, match=re.escape(line)):
        load_config(None, given)


def test_codes_need_adapters_and_a_gpu_and_engines_that_are_sent_whole_weights() -> None:
    given = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r", "model.quantization=nf4"]
    works = [*given, "model.lora={}", "learner.gpus=1"]
    assert load_config(None, works).model.quantization == "nf4"
    load_config(None, [*works, "learner.sharding=fsdp2"])  # of one rank: there is nothing to share
    for options, key, words in (
        ([*given, "learner.gpus=1"], "model.lora", "codes cannot be trained"),
        ([*given, "model.lora={}"], "learner.gpus", "quantised weights are for GPUs"),
        (
            [*works, "rollout.adapter_sync=adapter"],
            "rollout.adapter_sync",
            "another policy; set rollout.adapter_sync=merged",
        ),
        ([*works, "learner.sharding=fsdp2", "learner.workers=2"], "learner.sharding", "shares no codes among ranks"),
        ([*works, "learner.compile=true"], "learner.compile", "quantised weights are not compiled"),
    ):
        with pytest.raises(InputError) as refusal:
            load_config(None, options)
        assert key in str(refusal.value) and "nf4: " in str(refusal.value) and words in str(refusal.value)
    with pytest.raises(InputError, match=r"model\.quantization"):
        load_config(None, [*works, "model.quantization=fp4"])


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        (["shard_size=2"], "shard_size", "2 is for learner.sharding=fsdp2"),
        (["shard_size=4", "workers=6", "sharding=fsdp2"], "shard_size", "4 does not divide learner.workers=6"),
        (["shard_size=1", "workers=6", "sharding=fsdp2"], "shard_size", "1 must be at least 2"),
        (["reduce_dtype=bfloat16"], "reduce_dtype", "bfloat16 is for gradients that travel between ranks"),
        (
            ["reduce_dtype=bfloat16", "workers=2", "sharding=fsdp2", "reduce_gradients=minibatch"],
            "reduce_dtype",
            "with minibatch the gradients of all passes would be added up in bfloat16 too",
        ),
        (["offload=[optimizer]"], "offload", "optimizer: on CPUs all of it is in the host's memory already"),
        (["offload=[critic]", "gpus=1"], "offload.0", "'critic' is not one of"),
        (["reduce_gradients=minibatch"], "reduce_gradients", "minibatch is for learner.sharding=fsdp2"),
    ],
)
def test_learners_that_cannot_be(options: list[str], key: str, message: str) -> None:
    given = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r"]
    with pytest.raises(InputError) as refusal:
        load_config(None, [*given, *(f"learner.{option}" for option in options)])
    assert f"learner.{key}: {message}" in str(refusal.value), refusal.value


def test_a_reference_that_is_the_policy_itself_is_not_put_away() -> None:
    given = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r", "learner.gpus=1"]
    given += ["learner.offload=[optimizer, reference]"]
    assert load_config(None, given).learner.offload == ("optimizer", "reference")
    load_config(None, [*given, "model.lora={}", "model.reference_path=r"])
    with pytest.raises(InputError, match=r"learner\.offload: reference: with adapters the reference is the policy"):
        load_config(None, [*given, "model.lora={}"])


def test_adapters_are_off_and_on_with_all_defaults() -> None:
    given = ["output_dir=x", "model.path=m", "prompts.path=p", "reward.path=r"]
    assert load_config(None, given).model.lora is None
    lora = load_config(None, [*given, "model.lora={dropout: off}"]).model.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.targets, lora.path) == (None, None, None, None)


GROUPS = ("rollout.responses_per_prompt=4", "rollout.batch_size=16")


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        (["ppo.advantages=grpo"], "ppo.advantages", "grpo compares the responses to a prompt, and there is one"),
        ([*GROUPS, "ppo.advantages=rloo", "ppo.minibatch_size=2"], "ppo.minibatch_size", "2 is no multiple of"),
        ([*GROUPS, "ppo.advantages=dr_grpo", "ppo.gamma=0.9"], "ppo.gamma", "gives all tokens of a response one"),
        (["ppo.advantages=reinforce", "ppo.value_coef=0.5"], "ppo.value_coef", "0.5 is for a value function, and"),
        (["ppo.advantages=reinforce", "ppo.gae_lambda=1"], "ppo.gae_lambda", "1.0 is for a value function"),
        (["ppo.advantages=reinforce", "ppo.whiten_rewards=tokens"], "ppo.whiten_rewards", "is for a value function"),
        (["ppo.advantages=reinforce", "model.critic=separate"], "model.critic", "separate is for a value function"),
        (["ppo.gae_length_alpha=0.05", "ppo.whiten_rewards=padded"], "ppo.whiten_rewards", "one lambda for all"),
        (["ppo.loss_aggregation=sequence_sum"], "ppo.loss_length", "set both or neither; rollout.max_response_tokens"),
        (["ppo.loss_length=9"], "ppo.loss_length", "no other aggregation does"),
        (["ppo.policy_loss=gspo", "ppo.importance_cap=2"], "ppo.importance_cap", "its weights are of single tokens"),
        (["ppo.policy_loss=cispo", "ppo.dual_clip=3"], "ppo.dual_clip", "no effect on ppo.policy_loss=cispo"),
        (["ppo.policy_loss=my.loss:f", "ppo.clip_range=0.1"], "ppo.clip_range", "it is your own; leave it out"),
        (
            ["ppo.policy_loss=ppo"],
            "ppo.policy_loss",
            "is not one of clip, gspo, cispo, and does not look like package.module:function; did you mean clip?",
        ),
        (["ppo.policy_loss=Gsop"], "ppo.policy_loss", "did you mean gspo?"),
        (["ppo.policy_loss=grpo"], "ppo.policy_loss", "did you mean clip, with ppo.advantages=grpo?"),
        (["ppo.advantages=reinforce++"], "ppo.advantages", "or 'reinforce_baseline'; did you mean reinforce?"),
        (["ppo.advantages=gea"], "ppo.advantages", "'gae', 'grpo', 'dr_grpo', 'rloo', 'reinforce' or"),
        (["ppo.advantages=gea"], "ppo.advantages", "; did you mean gae?"),
        (["rollout.flat_groups=drop"], "rollout.flat_groups", "with one to a prompt all scores of a group are"),
        (
            [*GROUPS, "rollout.flat_groups=refill", "rollout.max_staleness=1", "ppo.importance_cap=2"],
            "rollout.flat_groups",
            "the engines are a step ahead",
        ),
    ],
)
def test_what_does_not_go_with_an_estimator_or_a_loss_is_refused_by_name(options, key, message):
    (line,) = violations(*REQUIRED, *options)
    assert line.startswith(key) and message in line


@pytest.mark.parametrize("advantages", ["gae", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline"])
def test_one_key_changes_the_estimator(advantages, tmp_path):
    config = load_config(None, [*REQUIRED, *GROUPS, f"ppo.advantages={advantages}"])
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml", []) == config  # the defaults of values are written out, and no harm
    assert config.ppo.has_values == (advantages == "gae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.batch_size=10", "rollout.responses_per_prompt=4"], "4 does not divide rollout.batch_size=10"),
        (
            ["rollout.batch_size=8", "rollout.responses_per_prompt=4", "rollout.workers=3"],
            "3 workers, but rollout.batch_size=8 / rollout.responses_per_prompt=4",
        ),
    ],
)
def test_groups_fill_a_batch_and_give_each_worker_one(options, message):
    (line,) = violations(*REQUIRED, *options)
    assert message in line
