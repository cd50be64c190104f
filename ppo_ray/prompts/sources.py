"""Reader of a data set: a file, a folder, what `save_to_disk` wrote, or one of the hub."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from ppo_ray.config import PromptsConfig, revision_problem
from ppo_ray.errors import QUOTED, InputError, first_line
from ppo_ray.prompts.columns import Columns, pick_rows
from ppo_ray.prompts.files import describe_formats, find_reader
from ppo_ray.prompts.rows import KEEP, Meter, Rows

_PLAIN = {"config_name", "data_files", "data_dir", "default", "description"}
"""What a card says of a folder's files beside the options of their formats."""


def read_rows(config: PromptsConfig) -> Rows:
    """Read the texts of `config.column`, and the columns that are kept.

    Bytes that are no UTF-8 are kept as lone surrogates, which `is_unicode` tells.

    Raises:
        InputError: there is no such data set, it cannot be read, or it has no such columns.
    """
    path = Path(str(config.path))
    if problem := revision_problem(str(config.path), config.revision):
        raise InputError(f"prompts.path={config.path}: {problem}")
    if path.is_dir():
        return _read_folder(config)
    reader = find_reader(path)
    if config.subset is not None and (reader is not None or path.exists()):
        raise InputError(f"prompts.subset={config.subset}: {path} is a file, which has no subsets; leave it out")
    if reader is not None:
        return reader(Columns(config.column, config.keep))
    if path.exists():
        raise InputError(
            f"prompts.path={config.path}: the file's name does not tell what it holds; let it end in "
            f"{describe_formats()}"
        )
    if str(config.path).startswith((".", "/")):
        raise InputError(f"prompts.path={config.path}: no such file or folder")
    builder = _open_builder(config, "neither a file nor a folder here, and not to be had from the hub")
    for files in builder.config.data_files.values():
        for file in files:
            if "://" not in str(file):  # a hub's data set has no files here
                _refuse_outside(config, str(file))
    return _load(config, builder, builder.info.download_size or sys.maxsize)


def _read_folder(config: PromptsConfig) -> Rows:
    """Read what `save_to_disk` of the `datasets` library wrote, or a folder of data files."""
    import datasets

    root = Path(str(config.path))
    names = (datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME)
    if any((root / name).is_file() for name in names):
        if config.subset is not None:
            raise InputError(f"prompts.subset={config.subset}: {root} is of save_to_disk and has splits alone")
        return _read_files(config, [_find_file(config, file) for file in _list_arrow_files(config, *names)])
    has_options = _check_card(config)
    builder = _open_builder(config, "the folder cannot be read as a data set")
    found = {split: [_find_file(config, file) for file in files] for split, files in builder.config.data_files.items()}
    files = found.get(config.split, [])
    # The library reads whole rows, and fails where another column differs from file to file.
    if files and not has_options and all(map(find_reader, files)):
        return _read_files(config, files)
    return _load(config, builder, sum(file.stat().st_size for file in files))


def _list_arrow_files(config: PromptsConfig, of_splits: str, of_one: str) -> list[Path]:
    """List the Arrow files that `save_to_disk` wrote, as its own records name them."""
    root = Path(str(config.path))
    try:
        if (root / of_splits).is_file():
            splits = json.loads((root / of_splits).read_text(encoding="utf-8"))["splits"]
            if config.split not in splits:
                raise InputError(
                    f"prompts.split={config.split}: {config.path} has no such split; it has {', '.join(splits)}"
                )
            root = root / config.split
        state = json.loads((root / of_one).read_text(encoding="utf-8"))
        return [root / str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"prompts.path={config.path}: cannot be read: {first_line(error)}") from error


def _check_card(config: PromptsConfig) -> bool:
    """Look at what a folder's own card (README.md) says of its files; return whether it has options of their formats.

    Raises:
        InputError: it names files outside the folder, or on other machines.
    """
    import datasets
    import yaml

    texts: list[str] = []
    for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        path = Path(str(config.path), name)
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            texts += re.findall(r"\A---\s*\n(.*?)\n---", text, re.DOTALL) if path.suffix == ".md" else [text]
    has_options = False
    for text in texts:
        try:
            card = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"prompts.path={config.path}: its card cannot be read: {first_line(error)}") from error
        entries = card.get("configs") if isinstance(card, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict):
                has_options = has_options or not entry.keys() <= _PLAIN
                for pattern in _strings([entry.get("data_files"), entry.get("data_dir")]):
                    if ":" in pattern or pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
                        _refuse_outside(config, pattern)
    return has_options


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _find_file(config: PromptsConfig, file: Path | str) -> Path:
    """Return a file's path, if it lies in the folder, links followed, or is a hub's own blob for it.

    Raises:
        InputError: it lies elsewhere.
    """
    root, found = Path(str(config.path)).resolve(), Path(file).resolve()
    places = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(found.is_relative_to(place) for place in places):
        _refuse_outside(config, str(file))
    return Path(file)


def _refuse_outside(config: PromptsConfig, name: str) -> NoReturn:
    raise InputError(
        f"prompts.path={config.path}: {name[:QUOTED]!r} is named there and lies outside of it, so it is not read; if "
        "you want it, give its own path"
    )


def _read_files(config: PromptsConfig, files: Sequence[Path]) -> Rows:
    readers = [find_reader(file) for file in files]
    parts = [reader(Columns(config.column, config.keep)) for reader in readers if reader]
    return join_rows(config, parts)


def join_rows(config: PromptsConfig, parts: Sequence[Rows]) -> Rows:
    """Put the rows of several files behind one another; numbers of several types have the widest.

    Raises:
        InputError: their kept columns are of types that have none in common.
    """
    schemas = [part.kept for part in parts if part.kept is not None]
    try:
        kept = pa.unify_schemas(schemas, promote_options="permissive") if schemas else None
    except pa.ArrowException as error:
        names = f"{KEEP}=[{', '.join(config.keep)}]"
        what = "sources" if config.sources else "files"
        raise InputError(f"{names}: the {what} of {config.place} hold other types: {error}") from error
    return Rows([batch for part in parts for batch in part.batches], kept)


def _open_builder(config: PromptsConfig, what: str) -> Any:
    """Find the files of a folder or a hub data set through the `datasets` library, by its rules of splits."""
    import datasets

    try:
        return datasets.load_dataset_builder(str(config.path), name=config.subset, revision=config.revision)
    except Exception as error:  # the library raises a dozen kinds, some of them its dependencies' own
        raise _make_error(config, what, error) from error


def _load(config: PromptsConfig, builder: Any, size: int) -> Rows:
    """Read what a builder found.

    Args:
        config: which split, and which column.
        builder: of the library.
        size: of the files, bytes.
    """
    try:
        builder.download_and_prepare()
        dataset = builder.as_dataset(config.split)
    except Exception as error:
        raise _make_error(config, "cannot be read", error) from error
    columns = Columns(config.column, config.keep)
    first = list(dict.fromkeys(names[0] for names in columns.find(str(config.path), dataset.features.arrow_schema)))
    table = dataset.select_columns(first).with_format("arrow")[:]  # still on the disk: the library maps it
    return pick_rows(table.schema, table.to_batches(), columns, Meter(str(config.path), size), lambda column: True)


def _make_error(config: PromptsConfig, what: str, error: Exception) -> InputError:
    subset = "" if config.subset is None else f", prompts.subset={config.subset}"
    where = f"prompts.path={config.path}{subset}, prompts.split={config.split}"
    cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    remedy = "; without a hub give asset:prompts, a folder, or a file that ends in " + describe_formats()
    if Path(str(config.path)).is_dir():
        remedy = ""
    return InputError(f"{where}: {what}: {error}{cause}{remedy}")
