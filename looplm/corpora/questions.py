"""Questions of a user's own, one a line: read, encoded, and written out with their answers. Knows no trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from looplm.corpora.batches import padded_prompts
from looplm.corpora.lines import input_lines, input_name
from looplm.corpora.token_table import RowEncoder
from looplm.errors import InputError

__all__ = ["answered_line", "prompt_batch", "read_questions"]


def read_questions(path: str, encoder: RowEncoder, max_positions: int) -> list[str]:
    r"""Return the questions of a file, one a line; in it ``\n`` stands for a line break.

    Args:
        path: A file; ``-``: standard input.
        encoder: Makes prompts of them.
        max_positions: Tokens that the model takes; a prompt must leave one of them free.

    Raises:
        InputError: If it cannot be read, holds none, or one is too long.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from looplm.corpora.templates import SolutionText
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> path = Path(tempfile.mkdtemp()) / "questions"
        >>> _ = path.write_text("How many?")
        >>> read_questions(str(path), RowEncoder(SolutionText("{question} ", "{answer}", None), ByteTokenizer()), 64)
        ['How many?']
    """
    source, questions = input_name(path), []
    for number, line in enumerate(input_lines(path), start=1):
        question = line.strip().replace("\\n", "\n")
        if not question:
            continue
        length = len(encoder.encode_prompts([question])[0])
        if length >= max_positions:
            raise InputError(
                f"{source}, line {number}: the prompt has {length} tokens, and the model takes {max_positions}, one of "
                "them for the answer."
            )
        questions.append(question)
    if not questions:
        raise InputError(f"{source} holds no questions.")
    return questions


def prompt_batch(questions: Sequence[str], encoder: RowEncoder, pad_id: int) -> dict[str, Any]:
    """Return what generation reads: ``input_ids`` int64 and ``attention_mask`` bool ``(B, P)``, and ``end_id``.

    Example:
        >>> from looplm.corpora.templates import SolutionText
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> encoder = RowEncoder(SolutionText("{question}", "{answer}", None), ByteTokenizer())
        >>> prompt_batch(["1?", "12?"], encoder, pad_id=0)["attention_mask"].int().tolist()
        [[0, 1, 1], [1, 1, 1]]
    """
    tokens, mask = padded_prompts(encoder.encode_prompts(questions), pad_id)
    return {"input_ids": tokens, "attention_mask": mask, "end_id": encoder.prompts.end_id}


def answered_line(question: str, answer: str) -> str:
    """Return a JSON object in one line.

    Example:
        >>> answered_line("1 + 1?", "That is 2.")
        '{"question": "1 + 1?", "answer": "That is 2."}'
    """
    return json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
