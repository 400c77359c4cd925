"""Question and solution corpora as a LightningDataModule: any source, any tokenizer, the loss on the solution.

Knows the trainer (where the stream stands) but no model, and nothing of grading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from looplm.corpora.batches import Example, packed_batch, padded_batch
from looplm.corpora.corpus import BadRows, Corpus, Overlong, RowPolicy
from looplm.corpora.evaluation_rows import EvaluationRows, evaluation_batch
from looplm.corpora.learnt_tokenizer import learn_once
from looplm.corpora.questions import answered_line, prompt_batch, read_questions
from looplm.corpora.rows import check_rows
from looplm.corpora.sources import Source, content_key, load_rows
from looplm.corpora.splits import Splits
from looplm.corpora.stream import StreamOrigin, TrainingStream, batches_per_step, rows_per_batch, trained_batches
from looplm.corpora.streamed import StreamedOrder
from looplm.corpora.templates import SolutionText
from looplm.corpora.text_tokenizer import ByteTokenizer, TextTokenizer
from looplm.corpora.token_table import RowEncoder, TokenTable, plain_hash, prompts_that_change, token_table
from looplm.corpora.training_order import BUCKET, Batching, TrainingOrder
from looplm.errors import InputError

__all__ = ["MathDataModule"]

_CHECKED_PROMPTS = 64


class MathDataModule(L.LightningDataModule):
    """Questions with solutions from files or the Hugging Face hub, tokenised once, with the loss on the solution.

    A training batch is a dict: ``input_ids`` int64 ``(B, T)``; ``labels`` int64 ``(B, T)``, the token that each
    position must predict, −100 outside the solution and its end mark; ``attention_mask`` ``(B, T)``: bool, or where
    rows are packed the number of the document, 0 at padding; ``index`` int64 ``(B,)``, the rows' numbers in the stream.
    Row i of the stream is a function of (seed, i), and the stream begins where the trainer stands: worker count, rank
    count and resume change nothing.

    Batches of validation and test have the same keys, one row of the corpus a row, ``index`` being its place there, and
    beside them, for generation and grading: ``prompt_ids`` int64 and ``prompt_mask`` bool ``(B, P)``, padded on the
    left; ``final`` and ``answer``, lists of B texts (``final`` empty where the corpus has none); ``source``, its name;
    ``end_id``. Every row of a test source whose prompt fits is there; one whose solution does not fit has no labels.

    Rows whose question (but for white space and case) is in a validation or test set are never trained on. What became
    of every row is said in one line a source. Tokens are kept by the content of the corpus and all settings that decide
    them, and read from there without being loaded into memory.

    Args:
        train: Sources of training.
        val: Sources of validation; None: ``num_val`` rows are held out of training.
        test: Sources of the test, one set each; None: the validation sets.
        tokenizer: How text becomes ids; None: one token a byte.
        template: The prompt with ``{question}`` in it, which the solution follows directly; ``chat``: the tokenizer's
            chat template.
        solution: What is to be answered, of ``{answer}`` and ``{final}``.
        system_prompt: For the chat template.
        max_tokens: Most tokens of an example: prompt, solution, end mark.
        overlong: Training and validation rows that are longer: ``drop``, ``truncate`` or ``error``.
        bad_rows: Rows that are no text: ``error`` or ``skip`` (empty ones are always skipped, and counted).
        batching: ``shuffled``: one example a row; ``bucketed``: the same, like lengths together; ``packed``: several
            examples fill a row, each computed as if alone.
        row_tokens: Positions of a packed row; None: ``max_tokens``.
        batch_size: Rows of a training batch on each process.
        eval_batch_size: Rows of a batch in validation and test.
        num_val: Validation rows, at most that many of each source.
        num_test: At most that many rows of each test source; None: all.
        streaming: Whether training rows are read and encoded as they come, for corpora larger than the disk; a resumed
            run reads again what it had read. Needs ``val``.
        shuffle_buffer: In streaming, rows among which the next is drawn; None: 10,000.
        predict_file: Questions to answer, one a line, for ``predict``; ``-``: standard input.
        max_positions: What the model can take, where that is more than ``max_tokens``; None: ``max_tokens``.
        cache_dir: Where tokens are kept; None: ``looplm`` in the cache of ``datasets``.
        seed: Seed of the training stream.

    Raises:
        ValueError: If a value is outside its range or has no effect.

    Example:
        >>> numina = Source(path="AI-MO/NuminaMath-1.5", question="problem", answer="solution")
        >>> data = MathDataModule(train=[numina], template="{question} ", max_tokens=512)
    """

    def __init__(
        self,
        train: list[Source],
        val: list[Source] | None = None,
        test: list[Source] | None = None,
        tokenizer: TextTokenizer | None = None,
        template: str = "Question: {question}\nSolution:\n",
        solution: str = "{answer}",
        system_prompt: str | None = None,
        max_tokens: int = 512,
        overlong: Overlong = "drop",
        bad_rows: BadRows = "error",
        batching: Batching = "bucketed",
        row_tokens: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_val: int = 500,
        num_test: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int | None = None,
        predict_file: str = "-",
        max_positions: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = {"train": list(train), "val": list(val or []), "test": list(test or [])}
        for split, sources in self.sources.items():
            names = [source.label for source in sources]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated and split != "train":
                raise ValueError(f"`name` of each {split} source must be its own, got {repeated[0]!r} twice.")
        if not train:
            raise ValueError("`train` must hold a source at least, got [].")
        self.text = SolutionText(template, solution, system_prompt)
        for source in self.sources["train"] + self.sources["val"]:
            if "final" in self.text.parts and source.final is None:
                raise ValueError(f"`solution: {solution}` needs the column `final` of {source.path!r}, got None.")
        self.policy = RowPolicy(max_tokens=max_tokens, overlong=overlong, bad_rows=bad_rows)
        self._skip_malformed = bad_rows == "skip"
        if batching not in ("shuffled", "bucketed", "packed"):
            raise ValueError(f"`batching` must be one of ['shuffled', 'bucketed', 'packed'], got {batching!r}.")
        if row_tokens is not None and batching != "packed":
            raise ValueError(f"`row_tokens` has no effect without `batching: packed`, got {row_tokens}.")
        if shuffle_buffer is not None and not streaming:
            raise ValueError(f"`shuffle_buffer` has no effect without `streaming: true`, got {shuffle_buffer}.")
        if streaming and not val:
            raise ValueError("`streaming: true` needs `val`: rows cannot be held out of what is not read before.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_val", num_val, 1),
            ("num_test", num_test, 1),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("row_tokens", row_tokens, max_tokens),
            ("max_positions", max_positions, max_tokens),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}.")
        self.batching, self.batch_size, self.eval_batch_size = batching, batch_size, eval_batch_size
        self.row_tokens = max_tokens if row_tokens is None else row_tokens
        self.num_val, self.num_test = num_val, num_test
        self.streaming, self.shuffle_buffer = streaming, 10_000 if shuffle_buffer is None else shuffle_buffer
        self.max_positions = max_tokens if max_positions is None else max_positions
        self.seed = seed
        self._origin = StreamOrigin()
        self.predict_file, self.predict_questions = predict_file, list[str]()
        self._given_cache_dir = cache_dir
        tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        self._given_tokenizer, self._ready_tokenizer = tokenizer, None if tokenizer.learns else tokenizer

    # What everything else is made of; each is made when it is first asked for, since a model's shape may ask early.

    @property
    def cache_dir(self) -> Path:
        """Where tokens and tokenizers are kept."""
        if self._given_cache_dir is not None:
            return Path(self._given_cache_dir)
        import datasets

        return Path(datasets.config.HF_DATASETS_CACHE) / "looplm"

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer; one that learns has learnt from the training sources.

        Raises:
            InputError: If they cannot be read.
        """
        if self._ready_tokenizer is None:
            sources = self.sources["train"]
            rows = [self._load(source, streaming=self.streaming) for source in sources]
            learn_once(self._given_tokenizer, self.text, sources, rows, self.cache_dir, streaming=self.streaming)
            self._ready_tokenizer = self._given_tokenizer
        return self._ready_tokenizer

    @cached_property
    def encoder(self) -> RowEncoder:
        """Encodes rows and prompts."""
        return RowEncoder(self.text, self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def end_id(self) -> int:
        """Id that ends a solution."""
        return self.encoder.prompts.end_id

    def _load(self, source: Source, streaming: bool = False) -> Any:
        return load_rows(source, self.cache_dir / "sources", skip_malformed=self._skip_malformed, streaming=streaming)

    def _table(self, source: Source) -> TokenTable:
        return token_table(source, self.encoder, self.cache_dir, skip_malformed=self._skip_malformed)

    @cached_property
    def splits(self) -> Splits:
        """The corpora of each split, tokenised."""
        return Splits(self.sources, self._table, self.policy, self.num_val)

    @cached_property
    def order(self) -> TrainingOrder:
        """The order of training, where it is not streamed."""
        return TrainingOrder(self.splits.train, self.batching, self.batch_size, self.row_tokens, self.seed)

    def training_batch(self, micro_batch: int, *, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """Return one batch of the training stream; shapes as in the class.

        Args:
            micro_batch: Number of batches before it.
            rank: This process.
            world_size: Number of processes; together they read the stream that one would.
        """
        indices = self.order.indices(micro_batch, rank, world_size, self._origin)
        return self._collate_rows([self.order.row(int(index)) for index in indices], indices)

    def _collate_rows(self, rows: list[list[Example]], indices: np.ndarray) -> dict[str, Tensor]:
        pad_id = self.tokenizer.pad_id
        if self.batching == "packed":
            batch = packed_batch(rows, self.row_tokens, pad_id)
        else:
            batch = padded_batch([example for (example,) in rows], pad_id)
        return {**batch, "index": torch.from_numpy(np.ascontiguousarray(indices))}

    def prepare_data(self) -> None:
        """Fetch and tokenise what is not yet kept, once a node."""
        for split, sources in self.sources.items():
            if not (split == "train" and self.streaming):
                for source in sources:
                    self._table(source)

    def setup(self, stage: str) -> None:
        """Make what the stage needs and say what became of the rows.

        Raises:
            InputError: If a source cannot be read, or a row is refused.
        """
        if stage == "predict":
            self.predict_questions = read_questions(self.predict_file, self.encoder, self.max_positions)
            return
        splits = {"fit": ["train", "val"], "validate": ["val"]}.get(stage, ["test" if self.sources["test"] else "val"])
        for split in splits:
            if split == "train" and self.streaming:
                continue
            for corpus in self._corpora(split):
                rank_zero_info(f"{split} {corpus.report()}")
        if stage == "fit" and not self.streaming:
            rank_zero_info(f"an epoch has {self.order.rows_per_epoch} rows ({self.batching})")
            self._check_prompts()

    def _check_prompts(self) -> None:
        """Warn where a prompt is cut otherwise in front of its solution than alone, as generation reads it."""
        for source in self.sources["train"]:
            rows = check_rows(source, self._load(source)[:_CHECKED_PROMPTS])
            changed = prompts_that_change(self.encoder, rows)
            if changed:
                rank_zero_warn(
                    f"{source.label}: of the first {len(rows.fault)} prompts {changed} have other tokens in front of "
                    "their solution than alone, as generation reads them: let `template` end where a token ends, for "
                    "example with a line break."
                )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the endless training stream, from where the trainer stands."""
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

        def batches(start: int) -> Iterator[dict[str, Tensor]]:
            if self.streaming:
                return self.streamed_batches(start, rank, world_size)
            return map(partial(self.training_batch, rank=rank, world_size=world_size), count(start))

        stream = TrainingStream(batches, partial(trained_batches, trainer), partial(batches_per_step, trainer))
        return DataLoader(stream, batch_size=None)

    def streamed_batches(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of a streamed corpus from number ``start`` on; ``index`` numbers their rows.

        Raises:
            InputError: If a source cannot be read, or a row is refused.
        """
        order = StreamedOrder(
            self.sources["train"],
            self.encoder,
            self.policy,
            self.cache_dir,
            held_out=self.splits.held_out_keys,
            batching=self.batching,
            batch_size=self.batch_size,
            row_tokens=self.row_tokens,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
        )
        for number, rows in enumerate(order.batches(start, rank, world_size, self._origin), start):
            first = self._origin.first_row(number, self.batch_size * world_size) + rank
            indices = first + world_size * np.arange(self.batch_size)
            yield self._collate_rows(rows, indices)

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Return the validation sets, one a source."""
        return self._loaders("val", self.num_val if self.sources["val"] else None)

    def test_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Return the test sets, one a source; the validation sets where there are none."""
        return self._loaders("test", self.num_test) if self.sources["test"] else self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the prompts of ``predict_file``, padded on the left."""
        collate = partial(prompt_batch, encoder=self.encoder, pad_id=self.tokenizer.pad_id)
        questions: Any = self.predict_questions  # a list is a dataset to DataLoader, if not to its types
        return DataLoader(questions, batch_size=self.eval_batch_size, collate_fn=collate)

    def predicted_lines(self, continuations: Iterable[Tensor]) -> list[str]:
        """Return what ``predict`` prints: a JSON object a question with ``question`` and ``answer``.

        Warns of answers that were cut before their end.

        Args:
            continuations: Generated ids of each batch, ``(B, N)``.
        """
        rows = [row for batch in continuations for row in batch.tolist()]
        if num_cut := sum(self.end_id not in row for row in rows):
            rank_zero_warn(
                f"{num_cut} of {len(rows)} answers have no end: they were cut after `max_new_tokens`, or where the "
                "model's positions (`max_positions`) end."
            )
        answers = [self.tokenizer.decode(list(takewhile(lambda token: token != self.end_id, row))) for row in rows]
        return [answered_line(*pair) for pair in zip(self.predict_questions, answers, strict=True)]

    def _corpora(self, split: str) -> list[Corpus]:
        corpora: list[Corpus] = getattr(self.splits, split)
        return corpora

    def _loaders(self, split: str, limit: int | None) -> list[DataLoader[dict[str, Any]]]:
        corpora = self._corpora(split)
        return [
            DataLoader(
                EvaluationRows(corpus, self._load(corpus.source), self.encoder, limit),
                batch_size=self.eval_batch_size,
                collate_fn=partial(
                    evaluation_batch,
                    pad_id=self.tokenizer.pad_id,
                    extra={
                        "source": corpus.source.label,
                        "end_id": self.end_id,
                        **({"split": corpus.source.label} if len(corpora) > 1 else {}),
                    },
                ),
            )
            for corpus in corpora
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the tokenizer's files, as tensors of bytes, and what decides the stream."""
        files = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in self._files.items()}
        position = self._origin.state(self.trainer, self.batch_size)
        return {"tokenizer_files": files, "stream": self._stream_key, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with a checkpoint's.

        Raises:
            InputError: If its tokenizer is another: the ids would mean something else.
        """
        saved = {name: bytes(data.numpy().tobytes()) for name, data in state_dict["tokenizer_files"].items()}
        if saved.get("tokenizer.json") != self._files.get("tokenizer.json"):
            raise InputError(
                "the checkpoint was trained with another tokenizer than `data.tokenizer` is, or than it learns from "
                "these training sources."
            )
        trainer = self.trainer
        if trainer is not None and trainer.training and state_dict["stream"] != self._stream_key:
            rank_zero_warn("the training data or their order differ from the checkpoint's: the resume is not exact.")
        if "position" in state_dict:
            self._go_on(state_dict["position"])

    def _go_on(self, position: dict[str, int]) -> None:
        self._origin = StreamOrigin.resumed(position, rows_per_batch(self.trainer, self.batch_size))
        is_within_block = (position["batches"] - position["batch"]) % BUCKET != 0
        if self.batching == "bucketed" and self._origin.batch != position["batch"] and is_within_block:
            rank_zero_warn(
                f"a batch has other rows than the checkpoint's: of the {BUCKET} batches that were made of like lengths "
                "together some rows come again and others are left out. `batching` shuffled or packed goes on exactly."
            )

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return {name: data for name, data in self.tokenizer.files().items() if data}

    @cached_property
    def _stream_key(self) -> str:
        """A hash of what decides the training stream."""
        sources = [
            [content_key(s, thorough=not self.streaming), s.path, s.split, s.columns, s.weight, s.revision]
            for s in self.sources["train"]
        ]
        held_out = [int(key) for key in self.splits.held_out_keys] if not self.streaming else []
        policy = [self.policy.max_tokens, self.policy.overlong, self.policy.bad_rows, self.num_val]
        order = [self.batching, self.row_tokens, self.shuffle_buffer, self.seed]
        return plain_hash(sources, held_out, policy, order, self.encoder.settings())
