"""The adapter to EleutherAI's lm-evaluation-harness, so that its tasks run at any depth.

Knows the harness, tokenizers and generation; no training. Importing this file registers the model ``looplm`` there:
``python -m looplm eval --model looplm --model_args pretrained=DIR,num_loops=8 --tasks …``, or
``import looplm.harness`` before ``lm_eval.simple_evaluate(model="looplm", …)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from looplm.checkpoints import from_pretrained, local_folder, read_origin
from looplm.errors import InputError
from looplm.generation import GenerationOptions, log_likelihoods_at_depths, stream_tokens

_AVAILABLE = RequirementCache("lm-eval>=0.4.9"), RequirementCache("tokenizers>=0.21")
if not all(_AVAILABLE):
    raise ModuleNotFoundError(
        f"the evaluation harness needs {' and '.join(str(r.requirement) for r in _AVAILABLE if not r)}: "
        "`pip install 'looplm[eval]'`."
    )

from lm_eval.api.model import TemplateLM  # noqa: E402 - only where it is installed
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

__all__ = ["LoopedHarnessModel"]

_LOOPS_FIELDS = ("num_loops", "total_ut_steps", "mean_recurrence")
_KNOWN_OPTIONS = {"until", "max_gen_toks", "temperature", "do_sample", "top_k", "top_p"}


@register_model("looplm")
class LoopedHarnessModel(TemplateLM):
    """A looped model of a Hugging Face directory at one depth.

    Args:
        pretrained: The directory, with its ``tokenizer.json``, or a hub id.
        num_loops: Depth; None: the usual one that config.json names.
        batch_size: Requests computed together.
        max_batch_size: Not used; the harness passes it.
        device: Where the model is.
        dtype: Type of the weights, for example ``bfloat16``; None: that of the files.
        cache: Policy of the cache in generation, see :class:`~looplm.generation.GenerationOptions`.
        max_length: Longest text in tokens; None: what the model can take.
        max_gen_toks: Longest continuation where a task does not say.

    Raises:
        InputError: If the directory has no tokenizer, or a value is wrong.

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
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise InputError(f"`dtype` must be a type of torch, for example bfloat16, got {dtype!r}.")
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise InputError(f"`batch_size` must be an integer, got {batch_size!r}.") from None
        folder = local_folder(pretrained)
        fields = read_origin(folder).config
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{str(folder)!r} has no tokenizer.json.")
        self.num_loops = _usual_loops(fields) if num_loops is None else int(num_loops)
        for name, value, least in (("num_loops", self.num_loops, 0), ("batch_size", self.batch_size, 1)):
            if value < least:
                raise InputError(f"`{name}` must be >= {least}, got {value}.")
        self.model = from_pretrained(folder, dtype=None if dtype is None else getattr(torch, dtype), device=device)
        self._device = torch.device(device)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.cache, self.max_gen_toks = cache, max_gen_toks
        self.max_length = self.model.config.max_positions if max_length is None else max_length
        self._special = _special_ids(folder, fields, self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text.

        Raises:
            InputError: If neither tokenizer nor config names one.
        """
        if self._special["eos"] is None:
            raise InputError("the task needs an end mark: neither tokenizer_config.json nor config.json names one.")
        return self._special["eos"]

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before an empty context: the begin mark where there is one, else the end mark."""
        begin = self._special["bos"]
        return self.eot_token_id if begin is None else begin

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
                answers = self._continue([texts[i] for i in batch], *wanted)
                for i, answer in zip(batch, answers, strict=True):
                    results[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return results

    def _options(self, wanted: Mapping[str, Any]) -> tuple[GenerationOptions, list[str]]:
        unknown = sorted(set(wanted) - _KNOWN_OPTIONS)
        if unknown:
            raise InputError(f"`generation_kwargs` must be of {sorted(_KNOWN_OPTIONS)}, got {unknown}.")
        until = wanted.get("until") or []
        temperature = float(wanted.get("temperature", 1.0 if wanted.get("do_sample") else 0.0))
        greedy = not wanted.get("do_sample", temperature > 0)
        options = GenerationOptions(
            num_loops=self.num_loops,
            max_new_tokens=min(int(wanted.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1),
            end_id=-1 if self._special["eos"] is None else self.eot_token_id,
            cache=self.cache,
            temperature=0.0 if greedy else temperature,
            top_k=None if greedy else wanted.get("top_k"),
            top_p=None if greedy else wanted.get("top_p"),
        )
        return options, [until] if isinstance(until, str) else list(until)

    def _continue(self, texts: Sequence[list[int]], options: GenerationOptions, until: Sequence[str]) -> list[str]:
        room = self.max_length - options.max_new_tokens
        ids, mask = self._padded([text[-room:] for text in texts], left=True)
        written: list[list[int]] = [[] for _ in texts]
        answers = [""] * len(texts)
        open_rows = set(range(len(texts)))
        for step in stream_tokens(self.model, ids, options, mask):
            for row in sorted(open_rows):
                token = int(step.tokens[row])
                if token != options.end_id:
                    written[row].append(token)
                # A stop string may span tokens: it is looked for in the text.
                answers[row] = self.tokenizer.decode(written[row])
                if bool(step.finished[row]) or any(stop in answers[row] for stop in until):
                    open_rows.discard(row)
            if not open_rows:
                break
        return [_cut(answer, until) for answer in answers]

    def _padded(self, texts: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor | None]:
        longest = max(map(len, texts))
        ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest)
        for row, text in enumerate(texts):
            place = slice(longest - len(text), longest) if left else slice(0, len(text))
            ids[row, place] = torch.tensor(text, dtype=torch.long)
            mask[row, place] = 1
        return ids.to(self._device), None if bool(mask.all()) else mask.to(self._device)


def _cut(text: str, until: Iterable[str]) -> str:
    """Return the text before the first of the stop strings."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _usual_loops(fields: Mapping[str, Any]) -> int:
    for name in _LOOPS_FIELDS:
        if fields.get(name) is not None:
            return int(fields[name])
    raise InputError("`num_loops` must be given: config.json names no usual number of loops.")


def _special_ids(folder: Path, fields: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return the ids of begin and end mark; the tokenizer's own come first, published model configs have wrong ones."""
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, int | None] = {}
    for mark in ("bos", "eos"):
        token = named.get(f"{mark}_token")
        text = token.get("content") if isinstance(token, dict) else token
        known = None if text is None else tokenizer.token_to_id(text)
        fallback = fields.get(f"{mark}_token_id")
        found[mark] = known if known is not None else fallback if isinstance(fallback, int) else None
    return found
