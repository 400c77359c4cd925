"""Any fast tokenizer of ``transformers``, by directory or hub id, with its chat template. Needs ``looplm[hf]``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.imports import RequirementCache

from looplm.corpora.text_tokenizer import Encoded, TextTokenizer, missing_library
from looplm.errors import InputError, reason

__all__ = ["PretrainedTokenizer"]

_AVAILABLE = RequirementCache("transformers>=4.50")
_PROBE = "looplm-probe"


class PretrainedTokenizer(TextTokenizer):
    """A tokenizer that belongs to a published model.

    Names of marks in a text become those marks, as the chat template needs; so a plain template may begin with one, for
    example ``<s>{question}``. No mark is added beside.

    Args:
        path: A directory with ``tokenizer.json``, or a hub id ``owner/name``.
        revision: Of the hub id; None: the newest.
        num_embeddings: Rows of the model's embedding where it has more than the tokenizer has ids; None: as many.
        end_token: What ends a solution; None: with a chat template what that puts there, else the ``eos_token``.

    Raises:
        InputError: If ``transformers`` is not installed, the tokenizer cannot be read, has no offsets or no end mark.

    Example:
        >>> tokenizer = PretrainedTokenizer("ByteDance/Ouro-1.4B")  # doctest: +SKIP
    """

    def __init__(
        self, path: str, revision: str | None = None, num_embeddings: int | None = None, end_token: str | None = None
    ) -> None:
        if not _AVAILABLE:
            raise missing_library("transformers", "hf")
        from transformers import AutoTokenizer

        self.path = path
        is_local = Path(path).is_dir()
        if is_local and revision is not None:
            raise InputError(f"`revision` has no effect on a directory, got {revision!r} for {path!r}.")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
        except Exception as error:
            raise InputError(
                f"`tokenizer.path` must be a directory with a tokenizer, or a hub id that can be reached, got {path!r}"
                f": {type(error).__name__} {reason(error)}"
            ) from None
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{path!r} has no fast tokenizer (tokenizer.json), whose offsets the loss needs.")
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        # tokenizer.json may ask for either; both are the data module's to decide.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._end_token = end_token
        self._end_id = self._known_id(end_token) if end_token is not None else tokenizer.eos_token_id
        ids = max(tokenizer.get_vocab().values()) + 1
        if num_embeddings is not None and num_embeddings < ids:
            raise InputError(f"`num_embeddings` must be >= {ids}, the ids of {path!r}, got {num_embeddings}.")
        self._vocab_size = num_embeddings or ids

    def _known_id(self, token: str) -> int:
        index = self._tokenizer.get_vocab().get(token)
        if index is None:
            raise InputError(f"`end_token` must be a token of {self.path!r}, got {token!r}.")
        return int(index)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._vocab_size

    @property
    def pad_id(self) -> int:
        """Id of padding; where there is none, that of the end mark, which the attention mask tells apart."""
        index = self._tokenizer.pad_token_id
        return self.end_id if index is None else int(index)

    @property
    def end_id(self) -> int:
        """Id that ends a solution."""
        if self._end_id is None:
            raise InputError(f"{self.path!r} names no `eos_token`: give `end_token`.")
        return int(self._end_id)

    @property
    def unknown_id(self) -> int | None:
        """Id of ``unk_token``, where there is one that stands for nothing else."""
        index = self._tokenizer.unk_token_id
        return None if index is None or index == self._end_id else int(index)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer came with a chat template."""
        return self._tokenizer.chat_template is not None

    def chat_prompts(self, questions: Sequence[str], system_prompt: str | None) -> list[str]:
        """Return the chat template's texts up to where the assistant begins to answer."""
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        chats = [[*system, {"role": "user", "content": question}] for question in questions]
        return list(self._rendered(chats, True))

    def _rendered(self, chats: list[Any], for_generation: bool) -> list[str]:
        try:
            rendered: list[str] = self._tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=for_generation
            )
        except Exception as error:  # the template is a program of the tokenizer's author
            raise InputError(f"the chat template of {self.path!r} fails: {type(error).__name__} {error}") from None
        return rendered

    def chat_answer_marks(self, system_prompt: str | None) -> tuple[str, int]:
        """Return what the chat template puts between its prompt and an answer, and the id with which it ends one.

        Raises:
            InputError: If the answer does not stand after the prompt, or nothing ends it.
        """
        (prompt,) = self.chat_prompts([_PROBE], system_prompt)
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        answer = _PROBE + "-answer"
        turns = [*system, {"role": "user", "content": _PROBE}, {"role": "assistant", "content": answer}]
        (whole,) = self._rendered([turns], False)
        if not whole.startswith(prompt) or answer not in whole[len(prompt) :]:
            raise InputError(f"the chat template of {self.path!r} does not put an answer after its generation prompt.")
        lead, tail = whole[len(prompt) :].split(answer, 1)
        if self._end_token is None:
            (encoded,) = self.encode([tail.lstrip()])
            marks = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
            if len(encoded.ids) and encoded.ids[0] in marks | set(self._tokenizer.all_special_ids):
                return lead, int(encoded.ids[0])
        return lead, self.end_id

    def encode(self, texts: Sequence[str]) -> Sequence[Encoded]:
        """Return the tokens of each text."""
        encoded: Sequence[Encoded] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        text: str = self._tokenizer.decode(
            [int(index) for index in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def files(self) -> dict[str, bytes]:
        """Return what ``save_pretrained`` writes, the chat template included."""
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
