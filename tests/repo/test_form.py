"""The form of the package: names that act are verbs, files are few and full, rooms lie on few floors."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.test_layers import FILES, MODULES, PACKAGE, ROOMS, ROOT, imports

ADJECTIVES = {
    "clipped": "`clipped_surrogate`: the field's name of what an `algo` function computes",
    "colocated": "`ray.placement=colocated`, an option's value",
    "gathered": "`release_gathered`: the object of the verb",
    "held": "`held_out` prompts, the field's word; `update_held`: the object of the verb",
    "honoured": "`_find_not_honoured`: the object of the verb",
    "learned": "`with_learned`: columns of `trajectory.LEARNED_SCHEMA`",
    "lost": "`_find_lost`: the object of the verb",
    "masked": "`masked_mean`: the field's name of what an `algo` function computes",
    "named": "`named_weights`, as torch's `named_parameters`",
    "optimized": "`optimized_parameters`: the parameters that the optimizer steps",
    "overlapped": "`run_overlapped`: the loop that overlaps generation with learning",
    "pretrained": "`save_pretrained`: Hugging Face's names",
    "ragged": "`trajectory.ragged`: rows of unequal lengths; there is no such verb",
    "shared": "`_check_shared`: the object of the verb",
    "truncated": "`truncated_importance`: the field's name of what an `algo` function computes",
    "unfinished": "`_mark_unfinished`: what the object is marked as",
    "unknown": "`_explain_unknown`: the object of the verb",
    "weighted": "`weighted_sum`: the field's name of what an `algo` function computes",
}
"""Participles that a function's name may begin or end with."""

IRREGULAR = """
agreed beaten begun bent bitten blown bought bred broken brought built burnt caught chosen dealt done drawn driven eaten
fallen fed felt fled flown forgotten fought found freed frozen given gone gotten grown guaranteed heard held hidden hung
kept known laid learnt led left lent lit lost made meant met overwritten paid redrawn rewritten risen said seen sent
shaken shown shrunk slept sold sought spent spoken stolen stood stuck sunk swept sworn taken taught thrown told torn
understood undone unknown withdrawn woken won worn written
"""
"""Past participles without a regular -ed, but for those that are also the imperative, as `read`, `set` and `run`."""

NO_PARTICIPLES = {"embed", "hundred", "unembed"}
"""Words in -ed that are no participles, though there is a vowel before the ending."""

PREDICATES = {"are", "can", "has", "is", "was"}
"""First words of names that ask; a participle may follow."""

SMALL = {
    "ppo_ray.assets.arithmetic": "configs/arithmetic.yaml names its functions",
    "ppo_ray.assets.assistant": "configs/assistant.yaml names its function",
}
"""Modules of fewer than 60 lines that one other module imports, and why they are modules all the same."""


def is_participle(word: str) -> bool:
    """Say whether a word is a past participle: -ed after a vowel further up (not `red`), but for -eed (`seed`)."""
    regular = re.fullmatch(r"[a-z]*[aeiouy][a-z]*(?<!e)ed", word) is not None
    return (regular and word not in NO_PARTICIPLES) or word in IRREGULAR.split()


def participles(name: str) -> set[str]:
    """Return the past participles that a function's name begins or ends with; of a predicate that it begins with."""
    words = name.strip("_").split("_")
    ends = {words[0]} if words[0] in PREDICATES else {words[0], words[-1]}
    return {word for word in ends if is_participle(word)}


def acting_functions(tree: ast.AST) -> Iterator[str]:
    """Yield the names of a module's functions and methods, but for properties."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
            if not decorators & {"property", "cached_property", "setter"}:
                yield node.name


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


PARTICIPLES = "_replaced _launched _published merged drawn_limits evaluated weights_lost _left_padded freed"
OTHERS = "seed derive_seed feed embed _unembed read run_red set_speed replace is_finished has_started shed"


@pytest.mark.parametrize("name", PARTICIPLES.split())
def test_participles_are_found(name: str) -> None:
    assert participles(name)


@pytest.mark.parametrize("name", OTHERS.split())
def test_nouns_verbs_and_predicates_are_no_participles(name: str) -> None:
    assert not participles(name)


def test_properties_may_be_participles() -> None:
    tree = ast.parse("class A:\n @functools.cached_property\n def merged(self): ...\n def replaced(self): ...")
    assert list(acting_functions(tree)) == ["replaced"]


def test_functions_that_act_are_verbs() -> None:
    files = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
    found = {
        f"{file.relative_to(ROOT)}: {name}": participles(name)
        for file in files
        for name in acting_functions(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert {name: words - ADJECTIVES.keys() for name, words in found.items() if words - ADJECTIVES.keys()} == {}
    assert ADJECTIVES.keys() - set().union(*found.values()) == set(), "adjectives that no name has any more"


def test_a_small_module_has_several_importers_or_a_reason() -> None:
    importers = dict.fromkeys(MODULES, 0)
    for file in FILES:
        for name in imports(file) & MODULES.keys():
            importers[name] += 1
    assert {name for name in MODULES if importers[name] == 1 and num_lines(MODULES[name]) < 60} == SMALL.keys()


@pytest.mark.parametrize("folder", ["ppo_ray", "benchmarks", "examples"])
def test_no_file_has_more_than_300_lines(folder: str) -> None:
    lengths = {str(file.relative_to(ROOT)): num_lines(file) for file in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {file: length for file, length in lengths.items() if length > 300} == {}


def test_the_package_stays_flat_and_its_files_full() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    assert len(ROOMS) <= 11
    assert len(FILES) <= 8.0 * sum(map(num_lines, FILES)) / 1000
