"""A byte-level BPE that is trained on the corpus. Needs the library ``tokenizers`` (``looplm[math]``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.imports import RequirementCache

from looplm.corpora.text_tokenizer import END_MARK, PADDING, Encoded, TextTokenizer, missing_library, tokenizer_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BPETokenizer"]

_AVAILABLE = RequirementCache("tokenizers>=0.21")
_MOST_LEARNT = 100_000  # characters of a text
_LONGEST_WORD = 1000  # the time to learn grows with its square
_CUT = re.compile(rf"\S{{{_LONGEST_WORD}}}(?=\S)|\s{{{_LONGEST_WORD}}}(?=\s)")


class BPETokenizer(TextTokenizer):
    """Byte-pair encoding over bytes, learnt from the training corpus: every text has ids and comes back unchanged.

    Marks are ids that no text gives, whatever it says: ``<|end|>`` in a question is seven ordinary characters.

    Args:
        vocab_size: Most ids: 256 bytes, two marks and merges; a small corpus may give fewer.
        split_digits: Whether every digit is a token of its own, so that numbers are written digit by digit.

    Raises:
        ValueError: If the vocabulary has no room for the bytes.
        InputError: If ``tokenizers`` is not installed.

    Example:
        >>> tokenizer = BPETokenizer(vocab_size=280)
        >>> tokenizer.learn(["how many apples, how many pears"] * 9)
        >>> len(tokenizer.encode(["how many"])[0].ids) < 8
        True
    """

    learns = True

    def __init__(self, vocab_size: int = 4096, split_digits: bool = True) -> None:
        if vocab_size < 258:
            raise ValueError(f"`vocab_size` must be >= 258 (256 bytes and two marks), got {vocab_size}.")
        if not _AVAILABLE:
            raise missing_library("tokenizers", "math")
        self.most_ids, self.split_digits = vocab_size, split_digits
        self._tokenizer: Tokenizer | None = None

    @property
    def _learnt(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RuntimeError("`learn` or `restore` must be called first.")
        return self._tokenizer

    def settings(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"vocab_size": self.most_ids, "split_digits": self.split_digits}

    def learn(self, texts: Iterable[str]) -> None:
        """Learn the merges, from the first 100,000 characters of each text."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.split_digits else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.most_ids,
            special_tokens=[PADDING, END_MARK],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in _learnable(text)), trainer)
        self._take(tokenizer)

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Read the merges from ``tokenizer.json``."""
        from tokenizers import Tokenizer

        self._take(Tokenizer.from_buffer(files["tokenizer.json"]))

    def _take(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # a mark's name in a text is text
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._learnt.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """Return the tokens of each text."""
        return self._learnt.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._learnt.decode([int(index) for index in ids], skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        """Return what the library writes."""
        return {"tokenizer.json": self._learnt.to_str().encode(), **tokenizer_config()}


def _learnable(text: str) -> Iterator[str]:
    """Yield a text whose words can be learnt from: as it is but for what is no language and would take hours."""
    text, begin = text[:_MOST_LEARNT], 0
    if len(text) > _LONGEST_WORD:
        for match in _CUT.finditer(text):
            yield text[begin : match.end()]
            begin = match.end()
    yield text[begin:]
