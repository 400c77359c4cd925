"""How a problem is put to a model and how its answer is read: arithmetic, or free text. Knows no model and no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.corpora.problems import exact_result
from looplm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer

__all__ = ["ArithmeticForm", "ProblemForm", "TextForm"]

_PARTIAL = "\ufffd"
_MOST_BYTES = 4  # of a character in UTF-8
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


class ProblemForm(Protocol):
    """From a problem to ids, and from ids to an answer.

    Example:
        >>> form: ProblemForm = ArithmeticForm(ArithmeticDataModule(min_digits=2, max_digits=2), max_positions=32)
        >>> form.example, form.expected(form.example)
        ('12+89', '101')
    """

    example: str
    """A problem that can be typed."""
    end_ids: list[int]
    """Ids that end an answer."""

    def encode(self, problem: str) -> list[int]:
        """Return the prompt's ids.

        Raises:
            InputError: If the problem is none.
        """
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return what each id is written as, to be shown; of a character's several ids only the last has text."""
        ...

    def answer(self, ids: Sequence[int]) -> str:
        """Return the answer in generated ids, as a reader would write it."""
        ...

    def expected(self, problem: str) -> str | None:
        """Return the right answer, where it is known."""
        ...


class ArithmeticForm:
    """Arithmetic problems as a run was trained on them.

    Args:
        data: The run's problems.
        max_positions: Tokens that the model takes.

    Example:
        >>> form = ArithmeticForm(ArithmeticDataModule(min_digits=2, max_digits=2), max_positions=32)
        >>> form.tokens(form.encode("12+34")), form.expected("12+34")
        (['1', '2', '+', '3', '4', '=', '␣'], '46')
    """

    def __init__(self, data: ArithmeticDataModule, max_positions: int) -> None:
        self._data, self._max_positions = data, max_positions
        digits = "123456789"
        self.example = f"{digits[: data.max_digits]}{data.operations[0]}{digits[-data.max_digits :]}"
        self.end_ids = [data.end_id]

    def _read(self, problem: str) -> tuple[int, str, int]:
        try:
            return self._data.read_problem(problem, self._max_positions)
        except ValueError as error:
            raise InputError(str(error)) from None

    def encode(self, problem: str) -> list[int]:
        """See :meth:`ProblemForm.encode`."""
        return self._data.tokenizer.encode_batch([self._data.prompt(*self._read(problem))])[0].tolist()

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """See :meth:`ProblemForm.tokens`."""
        return [_shown(self._data.tokenizer.decode([token])) for token in ids]

    def answer(self, ids: Sequence[int]) -> str:
        """See :meth:`ProblemForm.answer`."""
        return self._data.encoder.form.read_answer(self._data.tokenizer.decode(ids))

    def expected(self, problem: str) -> str | None:
        """See :meth:`ProblemForm.expected`."""
        return str(exact_result(*self._read(problem)))


class TextForm:
    """Problems in words.

    Args:
        tokenizer: Text to ids and back.
        write: From a problem to the prompt.
        end_ids: Ids that end an answer.
        example: A problem that can be typed.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> tokenizer = Tokenizer(models.WordLevel({"Q:": 0, "2": 1, "plus": 2, "?": 3}, unk_token="?"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> form = TextForm(tokenizer, lambda problem: f"Q: {problem}", end_ids=[3], example="2 plus 2")
        >>> form.encode("2 plus 2"), form.answer([1, 2, 1])
        ([0, 1, 2, 1], '2 plus 2')
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], str], end_ids: list[int], example: str) -> None:
        self._tokenizer, self._write = tokenizer, write
        self.end_ids, self.example = end_ids, example

    def encode(self, problem: str) -> list[int]:
        """See :meth:`ProblemForm.encode`."""
        ids = list(self._tokenizer.encode(self._write(problem), add_special_tokens=False).ids)
        if not ids:
            raise InputError("the problem must be a text of at least one token, got an empty one.")
        return ids

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """See :meth:`ProblemForm.tokens`."""
        texts, pending = [], list[int]()
        for token in ids:
            pending.append(token)
            whole = str(self._tokenizer.decode(pending, skip_special_tokens=False))
            if len(pending) < _MOST_BYTES and whole.endswith(_PARTIAL):
                texts.append("")
                continue
            texts.append(_shown(whole if len(pending) > 1 else self._one(token)))
            pending.clear()
        # What began and never became whole is shown as the tokenizer shows it.
        return [*texts[: len(texts) - len(pending)], *map(self._one, pending)]

    def _one(self, token: int) -> str:
        text: Any = self._tokenizer.decode([token], skip_special_tokens=False)
        return str(text or self._tokenizer.id_to_token(token) or f"#{token}")

    def answer(self, ids: Sequence[int]) -> str:
        """See :meth:`ProblemForm.answer`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def expected(self, problem: str) -> str | None:
        """Nothing: only a corpus knows."""
        return None


def _shown(text: str) -> str:
    return "".join(_SIGNS.get(character, character) for character in text)
