"""The cluster file of `ray up`, by Ray's own schema and checks."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

TEXT = (Path(__file__).parents[2] / "cluster" / "ray_up.yaml").read_text()


def read() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def check(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_accepts_it() -> None:
    check(read())


@pytest.mark.parametrize(
    ("section", "key", "value", "complaint"),
    [
        ((), "head_node_typ", "head", "'head_node_typ' was unexpected"),
        ((), "head_node_type", "nope", "must be one of `available_node_types`"),
        (("docker",), "images", "x", "'images' was unexpected"),
        (("available_node_types", "gpu"), "resorces", {}, "'resorces' was unexpected"),
        (("available_node_types", "gpu"), "min_workers", "1", "'1' is not of type 'integer'"),
        (("provider",), "type", None, "Unsupported node provider"),
    ],
)
def test_what_ray_would_refuse_is_refused(section: tuple[str, ...], key: str, value: Any, complaint: str) -> None:
    config = read()
    node = config
    for name in section:
        node = node[name]
    node[key] = value
    with pytest.raises(Exception, match=re.escape(complaint)):
        check(config)


def test_every_node_wants_the_token_and_nobody_gets_it_from_the_file() -> None:
    config = read()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start and "chmod 600" in start
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "0.0.0.0" not in TEXT


def test_what_runs_on_a_node_has_few_rights_in_the_cloud() -> None:
    types = read()["available_node_types"]
    configs = {name: kind["node_config"] for name, kind in types.items()}
    assert configs["head"]["IamInstanceProfile"]  # else Ray takes one that may do all with EC2 and S3
    assert "IamInstanceProfile" not in configs["gpu"]
    for node in configs.values():
        assert node["MetadataOptions"]["HttpTokens"] == "required"


def test_no_actor_runs_beside_the_driver() -> None:
    config = read()
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0 " in start


def test_shared_memory_holds_the_object_store() -> None:
    config = read()
    for kind in ("head", "worker"):
        (option,) = [option for option in config["docker"][f"{kind}_run_options"] if "--shm-size" in option]
        (store,) = re.findall(r"--object-store-memory=(\d+)", " ".join(config[f"{kind}_start_ray_commands"]))
        assert int(store) < int(re.findall(r"(\d+)g", option)[0]) << 30
