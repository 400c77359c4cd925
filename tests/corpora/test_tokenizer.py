"""One token a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.corpora.tokenizer import CharTokenizer

ALPHABET = "0123456789+-*= §−𝟙"
texts = st.lists(st.text(ALPHABET, max_size=8), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(texts, st.booleans(), st.integers(0, 3))
def test_decoding_inverts_encoding_whatever_the_padding(batch: list[str], left: bool, extra: int) -> None:
    tokenizer = CharTokenizer(ALPHABET)
    length = max(map(len, batch)) + extra
    ids = tokenizer.encode_batch(batch, length, left=left)
    assert ids.shape == (len(batch), length)
    assert [tokenizer.decode(row) for row in ids.tolist()] == batch
    for row, text in zip(ids.tolist(), batch, strict=True):
        padding = row[: length - len(text)] if left else row[len(text) :]
        assert set(padding) <= {tokenizer.pad_id}


def test_ids_are_dense_and_leave_zero_to_padding() -> None:
    tokenizer = CharTokenizer(ALPHABET)
    assert sorted(tokenizer.encode_batch([ALPHABET])[0].tolist()) == list(range(1, tokenizer.vocab_size))
    assert [tokenizer.id_of(character) for character in ALPHABET] == list(range(1, tokenizer.vocab_size))


@pytest.mark.parametrize("stranger", ["a", "~", "𝟚", "\uffff"])
def test_character_outside_the_alphabet_is_named(stranger: str) -> None:
    with pytest.raises(ValueError, match="is not in the alphabet") as caught:
        CharTokenizer(ALPHABET).encode_batch(["12", "3" + stranger])
    assert repr(stranger) in str(caught.value)


def test_text_longer_than_the_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        CharTokenizer("ab").encode_batch(["aba", "b"], length=2)


@pytest.mark.parametrize("alphabet", ["aba", "a\0"])
def test_alphabet_must_be_unambiguous(alphabet: str) -> None:
    with pytest.raises(ValueError, match="each character once and no NUL"):
        CharTokenizer(alphabet)
