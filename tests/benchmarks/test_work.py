"""All arms work on the same: what the others are given is what ppo_ray's own workers do."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from benchmarks.compare import rounds, work
from benchmarks.compare.arms import Step
from benchmarks.compare.rounds import Round
from benchmarks.compare.settings import ROOT, Settings
from ppo_ray import preflight
from ppo_ray.errors import InputError
from ppo_ray.learner.learner import PPOLearner
from ppo_ray.rollout.actor import RolloutWorker
from ppo_ray.rollout.engine import Completion

SCRIPT = ROOT / "benchmarks/compare/trl_loop.py"


def test_the_work_is_what_rollout_workers_would_do(config):
    asked = []

    def generate(requests, sampling):
        asked.extend(requests)
        return [Completion((1,), (-1.0,), "length")] * len(requests)

    worker = RolloutWorker.__ray_metadata__.modified_class.__new__(RolloutWorker.__ray_metadata__.modified_class)
    worker._config, worker._name, worker._sampling = config, "rollout-0", None
    worker._engine = SimpleNamespace(generate=generate, policy_version=0)
    worker._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "text")
    stream = preflight.check(config).open_prompts(config, print)
    for step in range(config.steps):
        worker.generate(stream.take(4), step, config.seed)
    portions = work.portions(config)
    found = [
        (tuple(ids), limit)
        for portion in portions
        for ids, limit in zip(portion.prompt_ids, portion.max_new_tokens, strict=True)
    ]
    assert found == [(request.prompt_ids, request.max_tokens) for request in asked]
    assert len(found) == 12 and len({limit for _, limit in found}) > 3


def test_trls_work_has_models_that_the_older_library_reads(config, tmp_path):
    found = work.trl_work(config, "one", 2, tmp_path)
    model = json.loads((Path(found["policy"]) / "config.json").read_text())
    source = json.loads((Path(config.model.path) / "config.json").read_text())
    assert model["rope_theta"] == source["rope_parameters"]["rope_theta"]
    assert "rope_parameters" not in model and model["torch_dtype"] == "float32"
    tokenizer = json.loads((Path(found["policy"]) / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (Path(found["policy"]) / "model.safetensors").is_file()
    ours = PPOLearner.load(config.model, config.ppo, config.learner, temperature=1.0, seed=config.seed).value_head()
    given = load_file(found["value_head"])
    assert given.keys() == ours.keys() and all((given[name] == ours[name]).all() for name in ours)
    assert json.loads(json.dumps(found)) == found and found["seed"] == 5 and len(found["steps"]) == 3


def test_trls_script_knows_nothing_of_ppo_ray():
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 11))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in names} == {"json", "os", "sys", "time", "pathlib", "typing", "torch"} | {
        *("safetensors", "transformers", "trl")
    }


def make_settings(code: str = "a", rounds: int = 3) -> Settings:
    return Settings("notebook", 4, 2, rounds, 7, 2, ["trl", "trl-batched", "ppo-ray"], [], code)


def test_the_order_of_the_arms_turns(tmp_path):
    orders = [Round(make_settings(), number, tmp_path).arms for number in range(4)]
    assert orders[0] == orders[3] == ["trl", "trl-batched", "ppo-ray"]
    assert [order[0] for order in orders[:3]] == ["trl", "trl-batched", "ppo-ray"]


def test_each_round_has_a_seed_of_its_own(tmp_path):
    rounds = [Round(make_settings(), number, tmp_path) for number in range(3)]
    assert [(round_.seed, round_.config.seed) for round_ in rounds] == [(7, 7), (8, 8), (9, 9)]


def test_results_go_on_only_under_the_same_settings_and_code(tmp_path):
    make_settings().claim(tmp_path / "out")
    make_settings(rounds=5).claim(tmp_path / "out")
    with pytest.raises(InputError, match="code: a -> b"):
        make_settings("b").claim(tmp_path / "out")


def test_a_finished_arm_is_not_run_again(tmp_path, monkeypatch):
    from tests.benchmarks.runs import make_run

    calls = []
    run = make_run("trl", 0, [1.0, 2.0])
    monkeypatch.setattr(Round, "_trl", lambda *arguments: calls.append(arguments) or run)
    round_ = Round(make_settings(), 0, tmp_path)
    assert [round_.run("trl", print) for _ in range(2)] == [run, run]
    assert len(calls) == 1


def test_an_arm_that_did_other_work_is_found_out():
    portion = work.Portion([[1, 2]], [3])
    rounds._check_step("trl", Step({}, 1.0, [(2, 3)], {}), portion)
    for lengths in ((3, 3), (2, 4), (2, 0)):
        with pytest.raises(AssertionError, match="trl"):
            rounds._check_step("trl", Step({}, 1.0, [lengths], {}), portion)
