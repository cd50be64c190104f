import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ppo_ray.config import load_config
from ppo_ray.errors import InputError
from ppo_ray.models.tokens import EndTokens, decode_pair, find_end_tokens, read_end_tokens
from tests.conftest import SENTENCES

CHINESE = ["这部电影非常好看", "日本の映画は美しい", "我不喜欢这个故事", "the 电影 was 好看 🎬🍿"]


def wrap(backend, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **options)


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CHINESE * 3, trainer)  # merges that begin in one character and end in the next
    return wrap(backend)


def byte_fallback():
    """As Llama 2's: words with a mark in front, and bytes for what is in no word."""
    words = ["<eos>", "<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "日"]
    backend = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return wrap(backend, unk_token="<unk>")


def word_pieces():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<eos>", "<unk>"], show_progress=False)
    backend.train_from_iterator([*SENTENCES, "it's here , don't !", *CHINESE], trainer)
    return wrap(backend, unk_token="<unk>", clean_up_tokenization_spaces=True)


MAKERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_pieces": word_pieces}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in MAKERS.items()}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizers_end_and_each_that_the_model_declares():
    def found(eos, declared, vocab_size=512):
        ends = find_end_tokens(eos, declared, vocab_size)
        return ends.ids, ends.ignored

    assert found(2, None) == ((2,), ())
    assert found(None, 7) == ((7,), ())
    assert found(1, [106, 1]) == ((1, 106), ())
    assert found(50256, [-1, 3]) == ((3,), (-1, 50256))
    assert found(None, []) == ((), ())
    for declared in ("</s>", 1.5, True, [[1]]):
        with pytest.raises(ValueError, match="neither a token id nor a list"):
            found(0, declared)


@pytest.fixture
def policy(tmp_path):
    """Return a function that writes a folder of a model of 400 tokens and says what ends its responses."""

    def ends(generation=None, own=None, *, eos="<eos>", options=()):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400} | (own or {})))
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(generation)
        tokenizer = byte_level()
        tokenizer.eos_token = eos
        base = ["output_dir=o", f"model.path={tmp_path}", "prompts.path=p", "reward.path=r", *options]
        return read_end_tokens(load_config(None, base), tokenizer)

    return ends


def test_the_models_folder_is_read(policy):
    assert policy('{"eos_token_id": [5, 9]}', {"eos_token_id": 7}) == EndTokens((0, 5, 9))
    assert policy('{"eos_token_id": 5}') == EndTokens((0, 5))
    assert policy("{}", {"eos_token_id": 7}) == EndTokens((0,))  # as generate and vLLM: the file alone counts
    assert policy(None, {"eos_token_id": [7, 8]}) == EndTokens((0, 7, 8))
    assert policy(None, {"eos_token_id": 50256}) == EndTokens((0,), (50256,))
    assert policy('{"eos_token_id": 5}', options=["rollout.stop_at_eos=false"]) == EndTokens(())


def test_nothing_that_can_end_a_response_is_an_error(policy):
    none = {"eos_token_id": None}
    with pytest.raises(InputError, match=r"^model.path=.*names an end-of-seq.*or set rollout.stop_at_eos=false"):
        policy("{}", none, eos=None)
    with pytest.raises(InputError, match=r"tokens \[400\] are not in its vocabulary of 400"):
        policy('{"eos_token_id": 400}', eos=None)
    assert policy("{}", none, eos=None, options=["rollout.stop_at_eos=false"]) == EndTokens(())
    for broken in ("{", "[]", '{"eos_token_id": "</s>"}'):
        with pytest.raises(InputError, match="what ends a response cannot be read"):
            policy(broken)


def test_what_ends_a_response_is_said(tokenizers):
    say = EndTokens((0, 40), (900,)).describe
    assert say(tokenizers["byte_level"]) == (
        "a response ends with: 0 '<eos>', 40 'H'; not in the model's vocabulary: 900"
    )
    many = EndTokens(tuple(range(40, 90))).describe(tokenizers["byte_level"])
    assert many.startswith("a response ends with: 40 'H', 41 'I', ") and many.endswith(" 49 'Q', 40 others")
    assert EndTokens(()).describe(None) == "a response ends with: its last token, at its limit"


def test_a_prompt_cut_in_a_character_keeps_all_whole_ones(tokenizers):
    for name in ("byte_level", "byte_fallback"):
        tokenizer = tokenizers[name]
        ids = ids_of(tokenizer, "本本片")
        alone = {tokenizer.decode(ids[:cut]) for cut in range(1, len(ids))}
        assert any("\ufffd" in text for text in alone)
        for cut in range(1, len(ids)):
            prompt, response = decode_pair(tokenizer, ids[:cut], ids[cut:])
            assert prompt == "本本片"[: len(prompt)] and prompt + response == "本本片"
            # whatever comes behind, the prompt stays
            assert decode_pair(tokenizer, ids[:cut], ids_of(tokenizer, "x"))[0] == prompt
            assert decode_pair(tokenizer, ids[:cut], ids[:1])[0] == prompt
    fallback = tokenizers["byte_fallback"]
    ids = ids_of(fallback, "a本本片")  # a mark, a, and three bytes for each of the others
    assert [decode_pair(fallback, ids[:cut], [])[0] for cut in range(2, 12)] == [
        *["a"] * 3,
        *["a本"] * 3,
        *["a本本"] * 3,
        "a本本片",
    ]
    assert decode_pair(fallback, ids[:5], ids[5:7]) == ("a本", "\ufffd\ufffd")  # a response that is cut off
    assert decode_pair(fallback, ids[:6], ids[6:7]) == ("a本", "\ufffd\ufffd")


def test_spaces_that_are_cleaned_up_at_the_border(tokenizers):
    tokenizer = tokenizers["word_pieces"]
    prompt, response = ids_of(tokenizer, "it '"), ids_of(tokenizer, "s here !")
    assert tokenizer.decode([*prompt, *response]) == "it's here!"
    assert decode_pair(tokenizer, prompt, response) == ("it '", " s here !")
    assert decode_pair(tokenizer, ids_of(tokenizer, "it"), ids_of(tokenizer, "'s here !")) == ("it", "'s here!")


@given(st.text(max_size=12), st.integers(0, 40))
def test_replacement_characters_of_the_text_itself_stay(text, cut):
    tokenizer = MADE["byte_level"]
    text = text.encode("utf-8", "ignore").decode() + "\ufffd"
    ids = ids_of(tokenizer, text)
    assert decode_pair(tokenizer, ids, ids_of(tokenizer, "x")) == (text, "x")


MADE = {name: make() for name, make in MAKERS.items()}
TEXTS = st.text(max_size=20) | st.lists(st.sampled_from([*"本片🎬e\u0301é'.,! s", "film", "don't"])).map("".join)


@pytest.mark.parametrize("name", MAKERS)
@given(text=TEXTS, cut=st.integers(0, 60), other=st.lists(st.integers(1, 290), max_size=8))
def test_texts_of_prompts_depend_on_prompts_alone_and_nothing_is_lost(name, text, cut, other):
    tokenizer = MADE[name]
    ids = ids_of(tokenizer, text.encode("utf-8", "ignore").decode())
    cut = min(cut, len(ids))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    prompt, response = decode_pair(tokenizer, ids[:cut], ids[cut:])
    if name == "word_pieces":  # spaces may be cleaned up at the border
        assert (prompt + response).replace(" ", "") == whole.replace(" ", "")
    else:
        assert prompt + response == whole
    if name == "byte_level":  # whose tokens are written with a character per byte
        num_bytes = sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids[:cut]))
        assert prompt == whole.encode()[:num_bytes].decode(errors="ignore")
    assert decode_pair(tokenizer, ids[:cut], other)[0] == prompt


def test_torch_is_not_loaded():
    probe = "import sys, ppo_ray.models.tokens; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
