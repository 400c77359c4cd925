"""Grade generated answers by depth, in any Lightning project.

Reads what ``test_step`` returns and never calls the model; knows no module and no DataModule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from looplm.callbacks.answer_log import AnswerLog
from looplm.callbacks.graded_summary import graded_summary
from looplm.callbacks.output import publish_figure, step_of_figures, write_table
from looplm.corpora.extraction import extract_answer
from looplm.corpora.grading import Grader
from looplm.corpora.votes import majority_vote
from looplm.figures import accuracy_bands

__all__ = ["GradedAnswers"]

_REQUIRED = ("answers", "answer_rows", "depths")


class GradedAnswers(L.Callback):
    """Accuracy of free-text answers at every evaluated depth, graded by what they mean.

    ``test_step`` returns a dict with ``depths`` (K loops), ``answers``, token ids int64 ``(K, R, S, N)`` for R problems
    of the batch and S samples of each, and ``answer_rows`` int64 ``(R,)``, which problems those are; where the model's
    positions bound an answer, also ``answer_room`` int64 ``(R,)``, the longest that can follow each problem. What
    decides the answers beside the weights may stand in the module's ``answer_settings``, as plain data. The batch holds
    ``index`` ``(B,)``, ``final`` and ``answer`` (B texts each: the true final answer or, where that is empty, a
    solution that ends in it), ``source`` (its name) and ``end_id``. Before each batch the callback adds ``wanted``,
    bool ``(B,)``: the problems that have no answers yet.

    It writes every answer into ``test_answers.jsonl`` in the log directory as it comes, with ``is_cut`` where it used
    up its room, and says at the end how many did. A test that was killed goes on there, if checkpoint, settings and
    problems are the same; which those are may stand in a dataset's ``fingerprint``.
    At the end it writes ``test_graded.csv`` and ``test_graded.png`` and logs ``test/accuracy/SOURCE/depth_00008``; the
    columns are those of :func:`~looplm.callbacks.graded_summary.graded_summary`.

    Args:
        decode_fn: Token ids to text; None: ``trainer.datamodule.tokenizer.decode``.
        confidence: Of the bootstrap intervals.
        cpu_seconds: Processor time for one comparison by SymPy.
        memory_mb: Memory for it, in MiB.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> trainer = L.Trainer(callbacks=[GradedAnswers()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        decode_fn: Callable[[Sequence[int]], str] | None = None,
        confidence: float = 0.95,
        cpu_seconds: int = 3,
        memory_mb: int = 1024,
    ) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
        self.decode_fn, self.confidence = decode_fn, confidence
        self.grader = Grader(cpu_seconds, memory_mb)
        self._log: AnswerLog | None = None
        self._done: set[tuple[str, int]] = set()
        self._num_ungraded = 0

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the answers of a test that was cut short."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        settings = {
            "checkpoint": _identity(trainer, pl_module),
            "problems": _fingerprints(trainer.test_dataloaders),
            **_settings_of(pl_module),
        }
        self._log = AnswerLog(folder / "test_answers.jsonl", settings, trainer.global_rank)
        self._done = {(row["source"], row["index"]) for row in self._log.rows}
        self._num_ungraded = 0
        if self._done:
            rank_zero_info(f"{folder / 'test_answers.jsonl'}: {len(self._done)} problems are answered, going on")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which problems want answers."""
        if "prompt_ids" in batch:
            done = [(batch["source"], int(index)) in self._done for index in batch["index"]]
            batch["wanted"] = ~torch.tensor(done, dtype=torch.bool)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Grade a batch and write its answers down."""
        missing = [name for name in _REQUIRED if not isinstance(outputs, Mapping) or name not in outputs]
        if missing:
            raise KeyError(f"GradedAnswers needs {list(_REQUIRED)} from test_step, {missing} are missing.")
        assert self._log is not None
        decode = self.decode_fn or trainer.datamodule.tokenizer.decode  # type: ignore[attr-defined]
        depths = [int(depth) for depth in outputs["depths"]]
        rows: list[dict[str, Any]] = []
        for place, b in enumerate(outputs["answer_rows"].tolist()):
            gold = batch["final"][b] or _final_of(batch["answer"][b])
            if not gold:
                self._num_ungraded += 1
                continue
            problem = {"source": batch["source"], "index": int(batch["index"][b]), "final": gold}
            room = int(outputs["answer_room"][place]) if "answer_room" in outputs else None
            for k, depth in enumerate(depths):
                samples = outputs["answers"][k, place].tolist()
                rows += self._graded(problem, depth, samples, room, batch["end_id"], decode)
        self._log.append(rows)

    def _graded(
        self,
        problem: dict[str, Any],
        depth: int,
        samples: list[list[int]],
        room: int | None,
        end_id: int,
        decode: Callable[..., str],
    ) -> list[dict[str, Any]]:
        gold, rows = problem["final"], []
        for number, ids in enumerate(samples):
            ids = ids[:room]  # what follows fills up to the longest answer of the batch
            ended = end_id in ids
            kept = ids[: ids.index(end_id)] if ended else ids
            text = decode(kept)
            grade = self.grader.grade(text, gold)
            rows.append(
                {
                    **problem,
                    "depth": depth,
                    "sample": number,
                    "text": text,
                    "num_tokens": len(kept) + ended,
                    "is_cut": not ended and len(ids) == room,
                    "verdict": grade.verdict,
                    "found": grade.answer,
                    "rule": grade.rule,
                }
            )
        if len(rows) > 1:
            vote = majority_vote([row["text"] for row in rows], self.grader)
            is_right = vote is not None and self.grader.compare(vote.answer, gold)[0] == "right"
            rows = [{**row, "majority_right": is_right} for row in rows]
        return rows

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join what all processes wrote; log, write and draw accuracy by depth."""
        log, folder = self._log, Path(trainer.log_dir or trainer.default_root_dir)
        assert log is not None
        log.close()
        trainer.strategy.barrier("answers")
        if trainer.is_global_zero:
            log.merge()
        trainer.strategy.barrier("merged")
        rows = AnswerLog(log.path, log.settings).rows if not trainer.is_global_zero else log.rows
        self.grader.close()
        if self._num_ungraded:
            rank_zero_warn(f"{self._num_ungraded} problems have no final answer to grade against and do not count.")
        if num_cut := sum(row["is_cut"] for row in rows):
            rank_zero_warn(
                f"{num_cut} of {len(rows)} answers were cut where the model's positions (`max_positions`) end: each "
                "has the room that its own problem leaves."
            )
        if not rows:
            return
        summary = graded_summary(rows, confidence=self.confidence)
        logged = {f"test/accuracy/{line['source']}/depth_{line['depth']:05d}": line["accuracy"] for line in summary}
        pl_module.log_dict(logged, rank_zero_only=False, sync_dist=trainer.world_size > 1)
        step = step_of_figures(trainer)
        if trainer.is_global_zero:
            self._write(trainer, folder, summary, step)

    def _write(self, trainer: L.Trainer, folder: Path, summary: list[dict[str, Any]], step: int) -> None:
        names = list(dict.fromkeys(name for line in summary for name in line))
        write_table(folder / "test_graded.csv", [{name: line.get(name, "") for name in names} for line in summary])
        curves: dict[str, Any] = {}
        for source in dict.fromkeys(line["source"] for line in summary):
            own = [line for line in summary if line["source"] == source]
            curves[source] = tuple([line[name] for line in own] for name in ("depth", "accuracy", "low", "high"))
            best, last = max(own, key=lambda line: line["accuracy"]), own[-1]
            rank_zero_info(
                f"{source}, {best['num_problems']} problems: best {100 * best['accuracy']:.1f} % "
                f"({100 * best['low']:.1f} to {100 * best['high']:.1f}) at depth {best['depth']}, "
                f"{last['drop']:.1f} points less at {last['depth']}; unparsable there {100 * last['unparsable']:.1f} %"
            )
        figure = accuracy_bands(curves, confidence=self.confidence)
        publish_figure(trainer, "test/graded_by_depth", figure, folder / "test_graded.png", step)
        rank_zero_info(f"graded: {folder}/test_graded.csv, test_graded.png, test_answers.jsonl")


def _final_of(answer: str) -> str:
    found = extract_answer(answer)
    return "" if found is None else found.text


def _fingerprints(loaders: Any) -> list[str]:
    """Return what the datasets of one or several loaders say of themselves."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    datasets = [getattr(loader, "dataset", None) for loader in (loaders if isinstance(loaders, list) else [loaders])]
    return [str(getattr(dataset, "fingerprint", "")) for dataset in datasets]


def _settings_of(pl_module: L.LightningModule) -> dict[str, Any]:
    settings = getattr(pl_module, "answer_settings", {})
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _identity(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    """Return what tells one set of weights from another."""
    if trainer.ckpt_path is not None and Path(trainer.ckpt_path).is_file():
        found = Path(trainer.ckpt_path).stat()
        return [found.st_size, found.st_mtime_ns]
    # In memory: two sums of every tensor, which another step of training would change.
    with torch.no_grad():
        return [[float(p.double().sum()), float(p.double().square().sum())] for p in pl_module.parameters()]
