"""A tokenizer with one token a character. Knows no corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["CharTokenizer"]


class CharTokenizer:
    """Maps each character of an alphabet to an id; id 0 is padding.

    Args:
        alphabet: The characters, each once; they get the ids 1, 2, … in this order.

    Raises:
        ValueError: If a character stands twice.

    Example:
        >>> tokenizer = CharTokenizer("ab")
        >>> tokenizer.encode_batch(["ab", "b"]).tolist()
        [[1, 2], [2, 0]]
        >>> tokenizer.decode([1, 2, 0])
        'ab'
    """

    pad_id = 0

    def __init__(self, alphabet: str) -> None:
        if len(set(alphabet)) != len(alphabet) or "\0" in alphabet:
            raise ValueError(f"`alphabet` must hold each character once and no NUL, got {alphabet!r}.")
        self.alphabet = alphabet
        self._ids = {character: index for index, character in enumerate(alphabet, start=1)}
        codes = [ord(character) for character in alphabet]
        self._table = np.full(max(codes) + 1, -1, dtype=np.int64)
        self._table[codes] = np.arange(1, len(codes) + 1)
        self._table[0] = self.pad_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return len(self.alphabet) + 1

    def id_of(self, character: str) -> int:
        """Return the id of one character of the alphabet."""
        return self._ids[character]

    def encode_batch(self, texts: Sequence[str], length: int | None = None, left: bool = False) -> Tensor:
        """Encode texts into one matrix.

        Args:
            texts: B texts.
            length: Number of columns; None: the longest text's length.
            left: Whether padding stands left.

        Returns:
            int64 ids, ``(B, length)``.

        Raises:
            ValueError: If a character is not in the alphabet, or a text is longer than ``length``.
        """
        longest = max(len(text) for text in texts)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a text of {longest} tokens does not fit into {length}.")
        padded = "".join(text.rjust(length, "\0") if left else text.ljust(length, "\0") for text in texts)
        codes = np.frombuffer(padded.encode("utf-32-le"), dtype=np.uint32)
        ids = np.where(codes < len(self._table), self._table[np.minimum(codes, len(self._table) - 1)], -1)
        if (ids < 0).any():
            raise ValueError(f"{padded[int((ids < 0).argmax())]!r} is not in the alphabet {self.alphabet!r}.")
        return torch.from_numpy(ids.reshape(len(texts), length))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, padding left out."""
        return "".join(self.alphabet[index - 1] for index in ids if index != self.pad_id)
