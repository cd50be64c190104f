"""What is said of the options is what is done with them."""

from pathlib import Path

import pytest

from ppo_ray.config import Config, UpdateConfig
from ppo_ray.config.explain import all_options, section_of
from ppo_ray.config.reference import FIRST, Option, OptionTable, find_table, make_tables, to_markdown
from ppo_ray.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def option(name: str) -> Option:
    return next(option for table in make_tables() for option in table.options if option.name == name)


def test_every_option_is_there_once() -> None:
    sections = {name for name, field in Config.model_fields.items() if section_of(field)}
    wanted = {name for name, _ in all_options(Config)} - sections
    found = [option.name for table in make_tables() for option in table.options]
    assert set(found) == wanted and len(found) == len(wanted)


def test_values_default_and_meaning_are_those_of_the_model() -> None:
    assert option("ppo.epochs") == Option(
        "ppo.epochs", "integer >= 1", "4", "Passes over a step's trajectories. TRL: `ppo_epochs`."
    )
    assert (option("ppo.gamma").values, option("ppo.gamma").default) == ("number >= 0, <= 1", "1.0")
    assert option("rollout.wire_dtype").values == "`bfloat16`, null"
    assert option("rollout.engine").values == "`vllm`, `hf`"
    assert (option("model.path").default, option("seed").values) == ("", "integer >= 0")
    assert option("rollout.max_context").meaning.endswith("rollout.max_response_tokens.")


def test_the_options_to_touch_first_exist() -> None:
    assert len(FIRST) == 10
    assert all(option(name).name == name for name in FIRST)


def test_a_section_is_found_by_its_name() -> None:
    found = find_table("ppo")
    assert isinstance(found, OptionTable) and len(found.options) == len(UpdateConfig.model_fields)
    with pytest.raises(InputError, match="pop is no section of a config; there are model, model.lora, prompts"):
        find_table("pop")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == to_markdown(), "make it again: ppo-ray options --markdown > docs/options.md"
