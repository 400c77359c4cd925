"""What a tokenizer of free text must give, and the two that need no library: bytes, and the characters of a corpus.

Every encoding knows which characters a token stands for (its offsets), so that the loss can be restricted to a part of
a text without tokenising that part again. Knows no corpus and no template.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from looplm.errors import InputError

__all__ = ["ByteTokenizer", "CorpusCharTokenizer", "Encoded", "TextTokenizer", "first_token_after"]

END_MARK, PADDING = "<|end|>", "<|pad|>"
_UNKNOWN = "\ufffd"


class Encoded(Protocol):
    """The tokens of one text."""

    @property
    def ids(self) -> Sequence[int] | np.ndarray:
        """The ids, ``(T,)``."""
        ...

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        """Return the characters of a token, as the first and one past the last; None where it stands for none."""
        ...


class TextTokenizer(ABC):
    """Text to ids and back. No mark is added to a text; what ends a solution is one id, ``end_id``.

    Example:
        >>> tokenizer: TextTokenizer = ByteTokenizer()
        >>> (encoded,) = tokenizer.encode(["1+1"])
        >>> tokenizer.decode(encoded.ids)
        '1+1'
    """

    learns: ClassVar[bool] = False
    """Whether :meth:`learn` must see a corpus before anything else is called."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, those of marks included."""

    @property
    def pad_id(self) -> int:
        """Id of padding; 0 unless the vocabulary is somebody else's."""
        return 0

    @property
    def end_id(self) -> int:
        """Id that ends a solution; 1 unless the vocabulary is somebody else's."""
        return 1

    @property
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary has not; None where every text has ids of its own."""
        return None

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """Return the tokens of each text; the ends of their offsets never decrease."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, marks left out."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the files of a Hugging Face tokenizer with the same ids: ``tokenizer.json`` and its config."""

    def settings(self) -> dict[str, Any]:
        """Return what beside the corpus decides the ids, as plain data."""
        return {}

    def learn(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary from a corpus; nothing where there is none to learn."""
        return None

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Take over what a tokenizer with the same settings has learnt, from its :meth:`files`."""
        return None


def first_token_after(encoded: Encoded, position: int) -> int:
    """Return the index of the first token that reaches beyond a character position; the number of tokens if none does.

    Args:
        encoded: The tokens of a text.
        position: A character position, 0 to the length of the text.

    Example:
        >>> first_token_after(ByteTokenizer().encode(["1+1=2"])[0], 4)
        4
    """
    if isinstance(encoded, _Plain):
        return encoded.first_after(position)
    low, high = 0, len(encoded.ids)
    while low < high:
        middle = (low + high) // 2
        span = encoded.token_to_chars(middle)
        if span is not None and span[1] > position:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True, slots=True)
class _Plain:
    """One token a character, or ids with the character that each belongs to."""

    ids: np.ndarray
    characters: np.ndarray | None = None

    def token_to_chars(self, token_index: int) -> tuple[int, int]:
        first = token_index if self.characters is None else int(self.characters[token_index])
        return first, first + 1

    def first_after(self, position: int) -> int:
        """Return what :func:`first_token_after` does, without a search."""
        return position if self.characters is None else int(np.searchsorted(self.characters, position))


class ByteTokenizer(TextTokenizer):
    """One token for each byte of UTF-8: 0 is padding, 1 the end mark, byte b has the id b + 2.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode(["é="])[0].ids.tolist(), tokenizer.decode([197, 171, 63, 1])
        ([197, 171, 63], 'é=')
    """

    @property
    def vocab_size(self) -> int:
        """256 bytes and two marks."""
        return 258

    def encode(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """Return the bytes of each text; a lone surrogate, which is no text, becomes ``?``."""
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> _Plain:
        data = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
        ids = data.astype(np.int32) + 2
        if text.isascii():
            return _Plain(ids)
        return _Plain(ids, np.cumsum((data & 0xC0) != 0x80) - 1)  # continuation bytes begin with 10

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return bytes(index - 2 for index in ids if index >= 2).decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        """Return a byte-level BPE without merges."""
        vocabulary = {_byte_sign(byte): byte + 2 for byte in range(256)}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        model = {"type": "BPE", "vocab": {PADDING: 0, END_MARK: 1, **vocabulary}, "merges": []}
        return _hugging_face_files(model, byte_level, byte_level, pad_id=0, end_id=1)


class CorpusCharTokenizer(TextTokenizer):
    """One token for each character: padding, the end mark, the unknown, then printable ASCII and the corpus's others.

    A character that the corpus has not becomes the unknown, U+FFFD.

    Example:
        >>> tokenizer = CorpusCharTokenizer()
        >>> tokenizer.learn(["3 × 4 = 12"])
        >>> tokenizer.decode(tokenizer.encode(["4×∞"])[0].ids)
        '4×�'
    """

    learns = True

    def __init__(self) -> None:
        self._alphabet = ""
        self._table = np.zeros(0, dtype=np.int32)

    def learn(self, texts: Iterable[str]) -> None:
        """Take the characters of a corpus, in the order of their code points."""
        known = {chr(code) for code in range(32, 127)} | {"\n"}
        seen: set[str] = set()
        for text in texts:
            seen |= set(text)
        self._set("".join(sorted(known | {c for c in seen if not "\ud800" <= c <= "\udfff"} - {_UNKNOWN})))

    def _set(self, alphabet: str) -> None:
        self._alphabet = alphabet
        codes = np.array([ord(character) for character in alphabet])
        self._table = np.full(codes.max() + 2, 2, dtype=np.int32)  # the last entry answers for all codes beyond
        self._table[codes] = np.arange(3, 3 + len(codes))

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Take the alphabet of a ``tokenizer.json`` that :meth:`files` gave."""
        vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
        ordered = sorted(vocabulary, key=lambda character: int(vocabulary[character]))
        self._set("".join(ordered[3:]))

    @property
    def vocab_size(self) -> int:
        """Number of characters and three marks."""
        return len(self._alphabet) + 3

    @property
    def unknown_id(self) -> int | None:
        """Id of a character that the corpus has not."""
        return 2

    def encode(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """Return one id a character."""
        last = len(self._table) - 1
        codes = [
            np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.int64)
            for text in texts
        ]
        return [_Plain(self._table[np.minimum(code, last)]) for code in codes]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the characters of ids."""
        return "".join(self._alphabet[i - 3] if i > 2 else _UNKNOWN for i in map(int, ids) if i >= 2)

    def files(self) -> dict[str, bytes]:
        """Return a word-level model whose words are single characters."""
        vocabulary = {PADDING: 0, END_MARK: 1, _UNKNOWN: 2}
        vocabulary |= {character: index for index, character in enumerate(self._alphabet, start=3)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN}
        every = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return _hugging_face_files(model, every, {"type": "Fuse"}, pad_id=0, end_id=1)


def _byte_sign(byte: int) -> str:
    """Return the printable character that stands for a byte in byte-level vocabularies (GPT-2)."""
    if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
        return chr(byte)
    # The others take the code points from 256 on, in order.
    others = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return chr(256 + others.index(byte))


def _hugging_face_files(model: Any, pre_tokenizer: Any, decoder: Any, *, pad_id: int, end_id: int) -> dict[str, bytes]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": pad_id, "content": PADDING, **flags}, {"id": end_id, "content": END_MARK, **flags}],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return {"tokenizer.json": json.dumps(content, ensure_ascii=False).encode(), **tokenizer_config()}


def tokenizer_config() -> dict[str, bytes]:
    """Return the ``tokenizer_config.json`` that names our marks."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_MARK, "pad_token": PADDING}
    return {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def missing_library(name: str, extra: str) -> InputError:
    """Return the error that tells how to install what is missing."""
    return InputError(f"{name} is not installed: pip install 'looplm[{extra}]'.")
