"""Tokenizers of free text: offsets, round trips, and the same ids in the files that travel with a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import ROWS
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from looplm.corpora.bpe import BPETokenizer
from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.text_tokenizer import ByteTokenizer, CorpusCharTokenizer, TextTokenizer, first_token_after
from looplm.errors import InputError

CORPUS = [text for row in ROWS for text in row.values()]
# Whatever a text may hold, mark names included, in a mixture that merges often.
texts = st.lists(
    st.sampled_from(["a", "apples", " ", "\n", "12", "é", "𝟙", "<|end|>", "½ = ", "Zoë", "$x^{2}$", "  ", "日本"]),
    max_size=12,
).map("".join)


def learnt(kind: type[TextTokenizer]) -> TextTokenizer:
    tokenizer = kind()
    tokenizer.learn([*CORPUS, "é𝟙½日本xX^{}$<|end|>"])
    return tokenizer


OURS = [learnt(kind) for kind in (ByteTokenizer, CorpusCharTokenizer, BPETokenizer)]
IDS = [type(tokenizer).__name__ for tokenizer in OURS]


@pytest.mark.parametrize("tokenizer", OURS, ids=IDS)
@settings(deadline=None, max_examples=40)
@given(text=texts)
def test_text_comes_back_unchanged_and_no_text_gives_a_mark(tokenizer: TextTokenizer, text: str) -> None:
    (encoded,) = tokenizer.encode([text])
    ids = [int(index) for index in encoded.ids]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.end_id]) == text
    assert not {tokenizer.pad_id, tokenizer.end_id} & set(ids)
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


@pytest.mark.parametrize("tokenizer", OURS, ids=IDS)
@settings(deadline=None, max_examples=40)
@given(text=texts, data=st.data())
def test_offsets_tell_which_token_reaches_beyond_a_character(
    tokenizer: TextTokenizer, text: str, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(text)))
    (encoded,) = tokenizer.encode([text])
    first = first_token_after(encoded, position)
    spans = [encoded.token_to_chars(token) for token in range(len(encoded.ids))]
    assert all(span is not None and span[1] <= position for span in spans[:first])
    assert all(span is not None and span[1] > position for span in spans[first:])
    if first == len(spans) or (spans[first] or (0, 0))[0] >= position:
        assert tokenizer.decode(list(encoded.ids[:first])) == text[:position]


@pytest.mark.parametrize("tokenizer", OURS, ids=IDS)
def test_files_hold_the_same_tokenizer(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    sample = [*CORPUS[:20], "Zoë pays ½ = 日本\n\t x"]
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text, encoded in zip(sample, tokenizer.encode(sample), strict=True):
        ids = [int(index) for index in encoded.ids]
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert library.decode(ids) == tokenizer.decode(ids)
    assert (fast.eos_token_id, fast.pad_token_id) == (tokenizer.end_id, tokenizer.pad_id)
    again = type(tokenizer)()
    again.restore(tokenizer.files())
    assert again.files() == tokenizer.files()
    assert [list(e.ids) for e in again.encode(sample)] == [list(e.ids) for e in tokenizer.encode(sample)]


def test_learning_is_deterministic() -> None:
    assert learnt(BPETokenizer).files() == learnt(BPETokenizer).files()


@pytest.mark.parametrize("character", ["letters", " "])
def test_bpe_learns_from_unbroken_runs_piece_by_piece(character: str) -> None:
    letters = np.random.default_rng(0).integers(97, 123, 10**6, dtype=np.uint8).tobytes().decode()
    run = letters if character == "letters" else character * 10**6
    whole, pieces = BPETokenizer(300), BPETokenizer(300)
    whole.learn([*CORPUS, run])  # as one word, this would take hours
    pieces.learn([*CORPUS, *[run[begin : begin + 1000] for begin in range(0, 100_000, 1000)]])
    assert whole.files() == pieces.files()


def test_bpe_writes_numbers_digit_by_digit_unless_told_otherwise() -> None:
    joined, split = BPETokenizer(vocab_size=400, split_digits=False), BPETokenizer(vocab_size=400)
    for tokenizer in (joined, split):
        tokenizer.learn(["1234 1234 1234"] * 50)
    assert len(split.encode(["1234"])[0].ids) == 4
    assert len(joined.encode(["1234"])[0].ids) < 4


def test_character_outside_the_corpus_is_the_unknown() -> None:
    tokenizer = CorpusCharTokenizer()
    tokenizer.learn(["abc"])
    assert tokenizer.decode(tokenizer.encode(["a∞b\ud800"])[0].ids) == "a\ufffdb\ufffd"


def test_pretrained_takes_its_end_mark_from_the_chat_template(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = PretrainedTokenizer(str(save_tokenizer()))
    assert tokenizer.decode([tokenizer.end_id]) == ""
    lead, end_id = tokenizer.chat_answer_marks(None)
    assert lead == ""
    assert tokenizer._tokenizer.convert_ids_to_tokens(end_id) == "<|im_end|>"
    assert tokenizer._tokenizer.convert_ids_to_tokens(tokenizer.end_id) == "<|endoftext|>"
    assert tokenizer.pad_id == tokenizer.end_id
    assert "chat_template" in " ".join(tokenizer.files()) or b"im_start" in tokenizer.files()["tokenizer_config.json"]


def test_chat_template_may_put_text_before_an_answer(save_tokenizer: Callable[..., Path]) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = PretrainedTokenizer(str(save_tokenizer("inst", template)))
    lead, end_id = tokenizer.chat_answer_marks(None)
    assert (lead, end_id) == (" ", tokenizer.end_id)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "fails: .* no system role"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not put an answer"),
    ],
)
def test_broken_chat_template_is_an_error_of_one_line(
    save_tokenizer: Callable[..., Path], template: str, message: str
) -> None:
    tokenizer = PretrainedTokenizer(str(save_tokenizer("broken", template)))
    with pytest.raises(InputError, match=message):
        tokenizer.chat_answer_marks("Be brief.")


def test_pretrained_refuses_what_cannot_be(save_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(save_tokenizer("plain", None))
    with pytest.raises(InputError, match="must be a directory with a tokenizer"):
        PretrainedTokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="`num_embeddings` must be >= "):
        PretrainedTokenizer(folder, num_embeddings=10)
    with pytest.raises(InputError, match="`end_token` must be a token"):
        PretrainedTokenizer(folder, end_token="<|no|>")
    with pytest.raises(InputError, match="`revision` has no effect"):
        PretrainedTokenizer(folder, revision="main")
    assert PretrainedTokenizer(folder, num_embeddings=1024, end_token="<|im_end|>").vocab_size == 1024


def test_bpe_needs_room_for_the_bytes() -> None:
    with pytest.raises(ValueError, match="`vocab_size` must be >= 258"):
        BPETokenizer(vocab_size=200)
