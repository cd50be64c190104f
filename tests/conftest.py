"""What tests share: tiny real models, made once per session, real ranks, a private Ray for a file, whole runs."""

import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing by more, and pytest has a process a core
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # read with torch; engines on a CPU have it, and gain ten seconds
# actors import classes of these tests; the current folder is no place where they look
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from tests.command_line import STEPS, CommandLine, Undisturbed, make_undisturbed, tiny_command_line

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's background job, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy machine", deadline=None)  # no test depends on how fast it is
settings.register_profile("long", deadline=None, max_examples=1000)  # `make test-fuzz`
settings.load_profile("busy machine")

SENTENCES = [
    f"The {noun} of this film was {quality}, and {more} I would {verb} it to all who like {kind} stories of people."
    for noun, more in (
        ("acting", "honestly"),
        ("story", "to be fair"),
        ("music", "in the end"),
        ("ending", "all in all"),
    )
    for quality, verb in (
        ("wonderful", "recommend"),
        ("awful", "never show"),
        ("slow", "hardly suggest"),
        ("funny", "gladly lend"),
    )
    for kind in ("quiet", "loud", "strange", "happy")
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="kills of each kind of worker in tests/faults")


def make_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE of 400 tokens on the sentences; `<eos>` is 0 and is the pad token too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a two-layer Llama of 128 hidden units, float32, tied, vocabulary 512."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a one-layer BERT with the labels NEGATIVE and POSITIVE."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny-classifier")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        initializer_range=0.5,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Parquet file of 64 film sentences in the column `text`."""
    path = tmp_path_factory.mktemp("tiny-prompts") / "prompts.parquet"
    pq.write_table(pa.table({"text": SENTENCES}), path)
    return path


@pytest.fixture(scope="session")
def crew() -> Iterator[Any]:
    """Yield three ranks, by which few things divide: real processes, started once (`tests.rank_processes`)."""
    from tests.rank_processes import rank_processes

    with rank_processes(3) as processes:
        yield processes


@pytest.fixture
def short_ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the test's Ray a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True) as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        yield


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """Start one Ray for all tests of a file."""
    from ppo_ray.actors.session import ray_session
    from ppo_ray.config import RayConfig

    folder = tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True)
    with folder as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", short)
        with ray_session(RayConfig(object_store_mib=128)):
            yield


@pytest.fixture
def ppo_ray(tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path: Path) -> Iterator[CommandLine]:
    """Yield `ppo-ray` with a config of tiny models, which runs in `tmp_path / "run"`."""
    with tiny_command_line(tiny_policy, tiny_classifier, tiny_prompts, tmp_path) as command_line:
        yield command_line


@pytest.fixture(scope="session")
def undisturbed(
    tiny_policy: Path, tiny_classifier: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """Return a function that makes a run that nothing happens to; see `make_undisturbed`."""

    def make(engine: str, steps: int | None = None, *options: str) -> Path:
        models = (tiny_policy, tiny_classifier, tiny_prompts)
        return make_undisturbed(models, tmp_path_factory, engine, steps or STEPS[engine], options)

    return make
