"""Reader of one column of texts from a file, a folder or a hub data set."""

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ppo_ray.config import PromptsConfig
from ppo_ray.errors import InputError, first_line
from ppo_ray.prompts.files import Texts, describe_formats, find_column, find_reader, is_unicode, pick_texts


@dataclass(frozen=True)
class LeftOut:
    """Counts of the texts that make no prompts; a text is counted under the first reason that it has."""

    blank: int = 0
    """White space, or no text at all."""
    invalid: int = 0
    """Not valid Unicode: bytes that are no UTF-8, or half a surrogate pair."""
    short: int = 0
    """Of at most `prompts.min_chars` characters."""
    repeated: int = 0
    """The same as an earlier one."""


@dataclass(frozen=True)
class UsableTexts:
    """The texts that prompts are made of."""

    texts: list[str]
    """Each once, in the order of the data set."""
    left_out: LeftOut
    """How many others there were."""
    config: PromptsConfig
    """The section of options that names the data set."""

    def describe(self) -> str:
        """Say how many texts there are, and how many were left out for which reasons."""
        reasons = self._reasons()
        return f"{len(self.texts):,} texts of {self.config.path}" + (f"; left out: {reasons}" if reasons else "")

    def describe_absence(self) -> str:
        """Return the message for a data set that has no usable text."""
        short, key, remedy = self.left_out.short, f"prompts.path={self.config.path}", "give texts"
        if short:
            key, remedy = f"prompts.min_chars={self.config.min_chars}", "lower it"
        total, reasons = sum(astuple(self.left_out)), self._reasons()
        left_out = f", left out: {reasons}" if reasons else ""
        return f"{key}: no prompt left: of {total:,} texts in {self.config.path}{left_out}; {remedy}"

    def _reasons(self) -> str:
        left_out = self.left_out
        reasons = {
            f"of at most {self.config.min_chars} characters": left_out.short,
            "blank": left_out.blank,
            "repeated": left_out.repeated,
            "not valid Unicode": left_out.invalid,
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


def read_usable_texts(config: PromptsConfig, num_held_out: int) -> UsableTexts:
    """Read the texts longer than `min_chars`, each once, in the order of the data set.

    Texts that are blank or not valid Unicode are left out.

    Raises:
        InputError: no data set, no such column, or fewer than `num_held_out + 1` texts left.
    """
    read = read_texts(config)
    worded = [text for text in read if text is not None and text.strip()]
    valid = [text for text in worded if is_unicode(text)]
    longer = [text for text in valid if len(text) > config.min_chars]
    texts = list(dict.fromkeys(longer))
    left_out = LeftOut(
        blank=len(read) - len(worded),
        invalid=len(worded) - len(valid),
        short=len(valid) - len(longer),
        repeated=len(longer) - len(texts),
    )
    usable = UsableTexts(texts, left_out, config)
    if not texts:
        raise InputError(usable.describe_absence())
    if len(texts) <= num_held_out:
        raise InputError(
            f"evaluation.num_prompts={num_held_out}: leaves no prompt for training: {usable.describe()}; "
            f"set it to {len(texts) - 1} or less"
        )
    return usable


def read_texts(config: PromptsConfig) -> Texts:
    """Read the texts of `config.column`; None where the data set has none.

    Bytes that are no UTF-8 are kept as lone surrogates, which `is_unicode` tells.

    Raises:
        InputError: there is no such data set, it cannot be read, or it has no such column of texts.
    """
    path = Path(config.path)
    if path.is_dir():
        return _read_folder(config)
    reader = find_reader(path)
    if reader is not None:
        return reader(config.column)
    if path.exists():
        raise InputError(
            f"prompts.path={config.path}: the file's name does not tell what it holds; let it end in "
            f"{describe_formats()}"
        )
    if config.path.startswith((".", "/")):
        raise InputError(f"prompts.path={config.path}: no such file or folder")
    return _load(config, "neither a file nor a folder here, and not to be had from the hub")


def _read_folder(config: PromptsConfig) -> Texts:
    """Read what `save_to_disk` of the `datasets` library wrote, or a folder of data files."""
    import datasets

    path = Path(config.path)
    names = (datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME)
    if any((path / name).is_file() for name in names):
        try:
            saved = datasets.load_from_disk(config.path)
        except Exception as error:  # the library raises a dozen kinds, some of them its dependencies' own
            raise InputError(f"prompts.path={config.path}: cannot be read: {first_line(error)}") from error
        if isinstance(saved, datasets.DatasetDict):
            if config.split not in saved:
                raise InputError(
                    f"prompts.split={config.split}: {config.path} has no such split; it has {', '.join(saved)}"
                )
            saved = saved[config.split]
        return _pick(config, saved)
    try:
        return _load(config, "the folder cannot be read as a data set")
    except InputError:
        # The library reads whole rows, and fails where another column differs from file to file.
        try:
            files = datasets.load_dataset_builder(config.path).config.data_files[config.split]
        except Exception:  # what is wrong is said above
            files = []
        readers = [find_reader(Path(file)) for file in files]
        if not readers or None in readers:
            raise
        return [text for reader in readers if reader for text in reader(config.column)]


def _load(config: PromptsConfig, what: str) -> Texts:
    """Read a folder or a hub data set through the `datasets` library; `what` begins the message if it cannot."""
    import datasets

    try:
        dataset = datasets.load_dataset(config.path, split=config.split)
    except Exception as error:  # the library raises a dozen kinds, some of them its dependencies' own
        where = f"prompts.path={config.path}, prompts.split={config.split}"
        cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        remedy = "; without a hub give asset:prompts, a folder, or a file that ends in " + describe_formats()
        if Path(config.path).is_dir():
            remedy = ""
        raise InputError(f"{where}: {what}: {error}{cause}{remedy}") from error
    return _pick(config, dataset)


def _pick(config: PromptsConfig, dataset: Any) -> Texts:
    """Read the one column of a data set of the library."""
    first = find_column(config.path, dataset.features.arrow_schema, config.column)[0]
    return pick_texts(config.path, dataset.select_columns([first]).with_format("arrow")[:], config.column)
