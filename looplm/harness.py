"""The adapter to EleutherAI's lm-evaluation-harness, so that its tasks run at any depth.

Knows the harness, tokenizers and generation; no training. Importing this file registers the model ``looplm`` there:
``python -m looplm eval --model looplm --model_args pretrained=DIR,num_loops=8 --tasks …``, or
``import looplm.harness`` before ``lm_eval.simple_evaluate(model="looplm", …)``.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from looplm.carried_tokenizer import begin_and_ends, carried_tokenizer
from looplm.checkpoints import load_model
from looplm.errors import InputError
from looplm.generation import GenerationOptions, stream_tokens
from looplm.origin import Origin
from looplm.scoring import log_likelihoods_at_depths

_AVAILABLE = RequirementCache("lm-eval>=0.4.9"), RequirementCache("tokenizers>=0.21")
if not all(_AVAILABLE):
    raise ModuleNotFoundError(
        f"the evaluation harness needs {' and '.join(str(r.requirement) for r in _AVAILABLE if not r)}: "
        "`pip install 'looplm[eval]'`."
    )

from lm_eval.api.model import TemplateLM  # noqa: E402 - only where it is installed
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import (  # noqa: E402
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

__all__ = ["LoopedHarnessModel"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LOOPS_FIELDS = ("num_loops", "total_ut_steps", "mean_recurrence")
_KNOWN_OPTIONS = {"until", "max_gen_toks", "temperature", "do_sample", "top_k", "top_p"}


@register_model("looplm")
class LoopedHarnessModel(TemplateLM):  # type: ignore[misc]
    """A looped model and its tokenizer at one depth.

    Args:
        pretrained: A Hugging Face directory with ``tokenizer.json``, a hub id of one, or a checkpoint made from one.
        num_loops: Depth; None: the usual one that config.json names.
        batch_size: Requests computed together.
        max_batch_size: Not used; the harness passes it.
        device: Where the model is.
        dtype: Type of the weights, for example ``bfloat16``; None: that of the files.
        cache: Policy of the cache in generation, see :class:`~looplm.generation.GenerationOptions`.
        max_length: Longest text in tokens; None: what the model can take.
        max_gen_toks: Longest continuation where a task does not say.

    Raises:
        InputError: If there is no tokenizer, or a value is wrong.

    Example:
        >>> from lm_eval import simple_evaluate
        >>> arguments = {"pretrained": "runs/ouro", "num_loops": 8}
        >>> simple_evaluate(model="looplm", model_args=arguments, tasks=["gsm8k"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str,
        num_loops: int | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        cache: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in _DTYPES:
            raise InputError(f"`dtype` must be one of {list(_DTYPES)}, got {dtype!r}.")
        # The harness's command line passes it as text.
        size = int(batch_size) if isinstance(batch_size, str) and batch_size.isdecimal() else batch_size
        self.batch_size = _integer("batch_size", size, 1)
        self.max_gen_toks = _integer("max_gen_toks", max_gen_toks, 1)
        _integer("num_loops", 0 if num_loops is None else num_loops, 0)
        _integer("max_length", 2 if max_length is None else max_length, 2)
        self._device = _device(device)
        source = pretrained if isinstance(pretrained, str | os.PathLike) else repr(pretrained)
        self.model = load_model(source, dtype=None if dtype is None else getattr(torch, dtype), device=self._device)
        most = self.model.config.max_positions
        self.max_length = most if max_length is None else _integer("max_length", max_length, 2, most)
        origin = Origin(config={}) if self.model.origin is None else self.model.origin
        self.num_loops = _usual_loops(origin.config) if num_loops is None else num_loops
        self.tokenizer = carried_tokenizer(str(source), origin, self.model.config.vocab_size)
        self._marks = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        self._begin, self._ends = begin_and_ends(origin, self.tokenizer, self.model.config.vocab_size)
        self.cache = cache
        self._options({})

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> LoopedHarnessModel:
        """Build the model from the harness's ``--model_args``, which win over its other options.

        Raises:
            InputError: If an argument is unknown or missing, or a value is wrong.
        """
        known = list(inspect.signature(cls).parameters)
        unknown = sorted(set(arg_dict) - set(known))
        if unknown:
            raise InputError(f"`model_args` must be of {known}, got {unknown}.")
        if "pretrained" not in arg_dict:
            raise InputError("`model_args` must hold `pretrained`: a directory, a hub id or a checkpoint file.")
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> LoopedHarnessModel:
        """Build the model from ``name=value,…``; see :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text.

        Raises:
            InputError: If neither tokenizer nor config names one.
        """
        if not self._ends:
            raise InputError(
                "the task needs an end mark: tokenizer_config.json, generation_config.json and config.json name none."
            )
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before an empty context: the begin mark where there is one, else the end mark."""
        return self.eot_token_id if self._begin is None else self._begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text."""
        return list(self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations; longest first, so that texts of a batch have like lengths."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for batch in _batches(order, self.batch_size):
            # The last token is predicted, not read; what does not fit is cut from the left.
            texts = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in batch]
            ids, mask = self._padded([text[:-1] for text in texts], left=False)
            labels = torch.full_like(ids, -100)
            for row, (i, text) in enumerate(zip(batch, texts, strict=True)):
                scored = min(len(requests[i][2]), len(text) - 1)
                labels[row, len(text) - 1 - scored : len(text) - 1] = torch.tensor(text[len(text) - scored :])
            scores, right = log_likelihoods_at_depths(self.model, ids, labels.to(ids), [self.num_loops], mask)
            for row, i in enumerate(batch):
                results[i] = (scores[0, row].sum().item(), bool(right[0, row].all()))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of ``max_length``, every token once."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of the task's strings, the end mark, or the longest continuation."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for key, members in groups.items():
            wanted = self._options(json.loads(key))
            texts = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in members}
            for batch in _batches(sorted(members, key=lambda i: -len(texts[i])), self.batch_size):
                # A draw is named by its request: the batch around it changes nothing.
                answers = self._continue([texts[i] for i in batch], *wanted, torch.tensor(batch))
                for i, answer in zip(batch, answers, strict=True):
                    results[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return results

    def _options(self, wanted: Mapping[str, Any]) -> tuple[GenerationOptions, list[str]]:
        unknown = sorted(set(wanted) - _KNOWN_OPTIONS)
        if unknown:
            raise InputError(f"`generation_kwargs` must be of {sorted(_KNOWN_OPTIONS)}, got {unknown}.")
        until = wanted.get("until") or []
        try:
            temperature = float(wanted.get("temperature", 1.0 if wanted.get("do_sample") else 0.0))
            greedy = not wanted.get("do_sample", temperature > 0)
            longest = _integer("max_gen_toks", wanted.get("max_gen_toks", self.max_gen_toks), 1)
            options = GenerationOptions(
                num_loops=self.num_loops,
                max_new_tokens=min(longest, self.max_length - 1),
                end_id=self._ends[0] if self._ends else -1,
                stop=[[token] for token in self._ends[1:]],
                cache=self.cache,
                temperature=0.0 if greedy else temperature,
                top_k=None if greedy else wanted.get("top_k"),
                top_p=None if greedy else wanted.get("top_p"),
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list) or not all(isinstance(stop, str) for stop in until):
            raise InputError(f"`until` must be a text or a list of texts, got {until!r}.")
        return options, [stop for stop in until if stop]

    def _continue(
        self, texts: Sequence[list[int]], options: GenerationOptions, until: Sequence[str], keys: Tensor
    ) -> list[str]:
        room = self.max_length - options.max_new_tokens
        ids, mask = self._padded([text[-room:] for text in texts], left=True)
        written: list[list[int]] = [[] for _ in texts]
        open_rows = set(range(len(texts)))
        for step in stream_tokens(self.model, ids, options, mask, keys):
            for row in sorted(open_rows):
                token = int(step.tokens[row])
                if token not in self._ends:
                    written[row].append(token)
                # A stop string may span tokens, and be a mark: it is looked for in the text with its marks.
                text = self.tokenizer.decode(written[row], skip_special_tokens=False)
                if bool(step.finished[row]) or any(stop in text for stop in until):
                    open_rows.discard(row)
            if not open_rows:
                break
        return [self._answer(tokens, until) for tokens in written]

    def _answer(self, tokens: list[int], until: Sequence[str]) -> str:
        """Return the text without marks, up to the first of the stop strings."""
        whole = self.tokenizer.decode(tokens, skip_special_tokens=False)
        text = whole
        for stop in until:
            text = text.split(stop)[0]
        if text == whole:
            return str(self.tokenizer.decode(tokens))
        for mark in self._marks:
            text = text.replace(mark, "")
        return text

    def _padded(self, texts: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor | None]:
        longest = max(map(len, texts))
        ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest)
        for row, text in enumerate(texts):
            place = slice(longest - len(text), longest) if left else slice(0, len(text))
            ids[row, place] = torch.tensor(text, dtype=torch.long)
            mask[row, place] = 1
        return ids.to(self._device), None if bool(mask.all()) else mask.to(self._device)


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"`{name}` must be an integer from {least} to {most}, got {value!r}.")
    return value


def _device(name: Any) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        device = torch.device("meta")
    if device.type == "meta":
        raise InputError(f"`device` must be one that this machine has, for example cpu, got {name!r}.")
    return device


def _usual_loops(fields: Mapping[str, Any]) -> int:
    for name in _LOOPS_FIELDS:
        if fields.get(name) is not None:
            return _integer(name, fields[name], 0)
    raise InputError("`num_loops` must be given: config.json names no usual number of loops.")
