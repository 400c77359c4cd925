"""The text of a problem: what the model is asked, what it must answer, what ends the answer. Knows no files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.text_tokenizer import TextTokenizer
from looplm.errors import InputError

__all__ = ["CHAT", "SolutionText", "filled", "placeholders"]

CHAT = "chat"
"""The template that stands for the tokenizer's own chat template."""
_PLACE = re.compile(r"\{(\w+)\}")


def placeholders(pattern: str) -> list[str]:
    """Return the names in braces, in order.

    Example:
        >>> placeholders("{Body} {Question}")
        ['Body', 'Question']
    """
    return _PLACE.findall(pattern)


def filled(pattern: str, values: dict[str, str]) -> str:
    """Put values in the places of their names, in one pass: braces in a value stay what they are.

    Example:
        >>> filled("Q: {question}", {"question": "What is {x}?"})
        'Q: What is {x}?'
    """
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), pattern)


class SolutionText:
    """Turns questions into prompts, and answers into solutions.

    Args:
        template: The prompt with ``{question}`` in it; the solution follows it directly. ``chat``: the chat template of
            a :class:`~looplm.corpora.pretrained_tokenizer.PretrainedTokenizer`.
        solution: The solution, of ``{answer}`` and ``{final}``.
        system_prompt: What the chat template's system role says.

    Raises:
        ValueError: If a template lacks its place, or an option has no effect.

    Example:
        >>> text = SolutionText("Q: {question} A: ", "{answer}", None)
        >>> text.plain_prompts(["1+1?"])
        ['Q: 1+1? A: ']
    """

    def __init__(self, template: str, solution: str, system_prompt: str | None) -> None:
        if template != CHAT and placeholders(template).count("question") != 1:
            raise ValueError(f"`template` must be `{CHAT}` or hold {{question}} once, got {template!r}.")
        if not set(placeholders(solution)) & {"answer", "final"}:
            raise ValueError(f"`solution` must hold {{answer}} or {{final}}, got {solution!r}.")
        if system_prompt is not None and template != CHAT:
            raise ValueError(f"`system_prompt` has no effect without `template: {CHAT}`, got {system_prompt!r}.")
        self.template, self.solution, self.system_prompt = template, solution, system_prompt

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, as plain data."""
        return {"template": self.template, "solution": self.solution, "system_prompt": self.system_prompt}

    @property
    def parts(self) -> set[str]:
        """Which of ``answer`` and ``final`` a solution is made of."""
        return set(placeholders(self.solution)) & {"answer", "final"}

    def plain_prompts(self, questions: Sequence[str]) -> list[str]:
        """Return the prompts of a template that is not the tokenizer's."""
        before, after = self.template.split("{question}")
        return [f"{before}{question}{after}" for question in questions]

    def bind(self, tokenizer: TextTokenizer) -> PromptWriter:
        """Return the writer of prompts for a tokenizer.

        Raises:
            InputError: If the chat template is asked for and the tokenizer has none.
        """
        return PromptWriter(self, tokenizer)

    def solutions(self, answers: Sequence[str], finals: Sequence[str]) -> list[str]:
        """Return the texts on which the loss stands."""
        if self.solution == "{answer}":
            return list(answers)
        rows = zip(answers, finals, strict=True)
        return [filled(self.solution, {"answer": answer, "final": final}) for answer, final in rows]


class PromptWriter:
    """Writes prompts, plainly or through the chat template, and knows which id ends a solution."""

    def __init__(self, text: SolutionText, tokenizer: TextTokenizer) -> None:
        self._text, self._chat = text, None
        self._lead, self.end_id = "", -1
        if text.template == CHAT:
            if not isinstance(tokenizer, PretrainedTokenizer) or not tokenizer.has_chat_template:
                whose = type(tokenizer).__name__
                raise InputError(f"`template: {CHAT}` needs a tokenizer with a chat template, this {whose} has none.")
            self._chat = tokenizer
            self._lead, self.end_id = tokenizer.chat_answer_marks(text.system_prompt)
        else:
            self.end_id = tokenizer.end_id

    def __call__(self, questions: Sequence[str]) -> list[str]:
        """Return the text before each solution."""
        if self._chat is None:
            return self._text.plain_prompts(questions)
        return [prompt + self._lead for prompt in self._chat.chat_prompts(questions, self._text.system_prompt)]
