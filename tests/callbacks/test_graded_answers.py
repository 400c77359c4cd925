"""Answers graded by depth: what is counted, written, gone on with after a kill, and said."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forks import fork_looplm, run_looplm
from hypothesis import example, given, settings
from hypothesis import strategies as st

from looplm.callbacks.answer_log import AnswerLog
from looplm.callbacks.graded_summary import bootstrap_interval, graded_summary
from looplm.cli import main

SIZES = {"width": 16, "num_heads": 2, "ffn_width": 16, "dropout": 0.0}


def _problems(folder: Path, name: str, number: int) -> Path:
    path = folder / f"{name}.jsonl"
    rows = [
        {
            "question": f"What is {name} {i} plus {i}{'?' * (i % 3 + 1)}",
            "answer": f"{i}+{i}={2 * i}\n#### {2 * i}",
            "final": str(2 * i),
        }
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    def source(name: str, number: int, **more: Any) -> dict[str, Any]:
        return {"path": str(_problems(tmp_path, name, number)), "name": name, "final": "final", **more}

    content = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "GradedAnswers"}],
        },
        "model": {
            "config": SIZES,
            "objective": {"depth_sampler": {"class_path": "FixedDepth", "init_args": {"depth": 2}}},
            "test_depths": [1, 3],
            "max_new_tokens": 6,
        },
        "data": {
            "class_path": "MathDataModule",
            "init_args": {
                "train": [source("train", 40)],
                "test": [source("near", 7), source("far", 5)],
                "tokenizer": {"class_path": "ByteTokenizer"},
                "max_tokens": 96,
                "batch_size": 4,
                "eval_batch_size": 3,
                "num_val": 4,
                "cache_dir": str(tmp_path / "cache"),
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(path)]) == 0
    return path


def _answers(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _answers_so_far(root)][1:]


def _test(path: Path, *options: str) -> int:
    return main(["test", "--config", str(path), *options])


def test_every_problem_is_answered_at_every_depth_and_graded(config: Path, tmp_path: Path, caplog) -> None:
    root = tmp_path / "run"
    with caplog.at_level("INFO"):
        assert _test(config) == 0
    rows = _answers(root)
    keys = [(row["source"], row["index"], row["depth"], row["sample"]) for row in rows]
    assert keys == sorted({(s, i, d, 0) for s, n in (("near", 7), ("far", 5)) for i in range(n) for d in (1, 3)})
    assert {row["final"] for row in rows} == {str(2 * i) for i in range(7)}
    assert all(0 < row["num_tokens"] <= 6 for row in rows)
    with (root / "test_graded.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["source"], line["depth"], line["num_problems"]) for line in lines] == [
        ("far", "1", "5"), ("far", "3", "5"), ("near", "1", "7"), ("near", "3", "7")
    ]  # fmt: skip
    for line in lines:
        own = [r for r in rows if r["source"] == line["source"] and r["depth"] == int(line["depth"])]
        assert float(line["accuracy"]) == pytest.approx(np.mean([r["verdict"] == "right" for r in own]))
        assert float(line["unparsable"]) == pytest.approx(np.mean([r["verdict"] == "unparsable" for r in own]))
    assert (root / "test_graded.png").read_bytes().startswith(b"\x89PNG")
    assert any("near, 7 problems" in message for message in caplog.messages)


def test_answers_do_not_depend_on_the_batches(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    # Longer than what the prompts leave of the model's 96 positions, and than what the longest of them leaves.
    capped = "--model.max_new_tokens=80"
    sampled = ("--model.num_samples=3", "--model.temperature=1.0")
    for options in ((capped,), sampled):
        with warnings.catch_warnings(record=True) as told:
            assert _test(config, *options) == 0
        first = _answers(root)
        if capped in options:
            cut = [row for row in first if row["is_cut"]]
            assert len({row["num_tokens"] for row in cut if row["source"] == "near"}) == 3
            assert any(f"{len(cut)} of {len(first)} answers were cut" in str(warning.message) for warning in told)
        (root / "test_answers.jsonl").unlink()
        with warnings.catch_warnings(record=True):  # of the same cuts
            assert _test(config, *options, "--data.init_args.eval_batch_size=5") == 0
        assert _answers(root) == first
    assert {row["sample"] for row in first} == {0, 1, 2}
    assert len({row["text"] for row in first}) > len(first) / 2
    header = (root / "test_graded.csv").read_text().splitlines()[0].split(",")
    assert {"majority", "pass_at_2", "pass_at_3"} <= set(header)


def test_a_test_that_was_killed_goes_on_where_it_was(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert _test(config) == 0
    whole = (root / "test_answers.jsonl").read_text()
    table = (root / "test_graded.csv").read_bytes()
    lines = [f"{line}\n" for line in whole.split("\n")[:-1]]
    marked = lines[3].replace('"text": "', '"text": "kept ')
    assert all('"index": 4, ' in line for line in lines[9:11])  # a problem, at both depths
    # Cut after the problem's first depth, in the middle of its second line.
    (root / "test_answers.jsonl").write_text("".join([*lines[:3], marked, *lines[4:10]]) + lines[10][:20])
    assert _test(config) == 0
    again = (root / "test_answers.jsonl").read_text()
    assert again == whole.replace(lines[3], marked)  # what was there was not answered again
    assert (root / "test_graded.csv").read_bytes() == table
    # Other settings, other answers: nothing is taken over.
    assert _test(config, "--model.max_new_tokens=4") == 0
    assert all("kept" not in row["text"] and row["num_tokens"] <= 4 for row in _answers(root))


def test_other_problems_of_the_same_name_are_answered_anew(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert _test(config) == 0
    other = {"path": str(_problems(tmp_path, "other", 3)), "name": "near", "final": "final"}
    assert _test(config, f"--data.init_args.test={json.dumps([other])}") == 0
    assert {(row["source"], row["index"]) for row in _answers(root)} == {("near", 0), ("near", 1), ("near", 2)}
    assert _test(config, "--data.init_args.num_test=2") == 0
    assert {(row["source"], row["index"]) for row in _answers(root)} == {
        (s, i) for s in ("near", "far") for i in (0, 1)
    }


def test_kill_minus_nine(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert _test(config) == 0
    expected = _answers(root)
    (root / "test_answers.jsonl").unlink()
    process = fork_looplm(["test", "--config", config], tmp_path / "output")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (root / "test_answers.jsonl").is_file() and len(_answers_so_far(root)) > 4:
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    assert _test(config) == 0
    assert _answers(root) == expected


def _answers_so_far(root: Path) -> list[str]:
    return (root / "test_answers.jsonl").read_text().split("\n")[:-1]  # a text may hold other line ends


def test_without_the_callback_a_test_gives_no_answers(config: Path, tmp_path: Path) -> None:
    assert _test(config, "--trainer.callbacks=null") == 0
    assert not (tmp_path / "run" / "test_answers.jsonl").exists()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.text()), min_size=1, max_size=6),
    st.integers(min_value=0, max_value=400),
)
@example([("a", "\u2028"), ("b", "\u2029\x85")], 0)  # a line's end to `str.splitlines`, a character to JSON
def test_a_log_cut_anywhere_keeps_whole_problems(tmp_path_factory, texts: list[tuple[str, str]], cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "answers.jsonl"
    log = AnswerLog(path, {"a": 1})
    problems = [
        [{"source": name, "index": i, "depth": d, "sample": 0, "text": text, "num_answers": 2} for d in (1, 2)]
        for i, (name, text) in enumerate(texts)
    ]
    for rows in problems:
        log.append(rows)
    log.close()
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - cut, 0)])
    again = AnswerLog(path, {"a": 1})
    kept = [rows for rows in problems if rows[0] in again.rows]
    assert sorted(again.rows, key=str) == sorted((row for rows in kept for row in rows), key=str)
    lost = [rows for rows in problems if rows not in kept]
    assert len(lost) <= 1 + cut // 120
    for rows in lost:
        again.append(rows)
    again.merge()
    assert sorted(AnswerLog(path, {"a": 1}).rows, key=str) == sorted((r for rows in problems for r in rows), key=str)


def test_files_of_several_processes_become_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    logs = [AnswerLog(path, {}, rank) for rank in range(3)]
    row = {"source": "a", "depth": 1, "sample": 0}
    for rank, log in enumerate(logs):
        log.append([{**row, "index": rank}, {**row, "index": 9}])  # 9 is what the sampler repeats
    for log in logs[1:]:
        log.close()
    logs[0].merge()
    assert [r["index"] for r in AnswerLog(path, {}).rows] == [0, 1, 2, 9]
    assert list(tmp_path.iterdir()) == [path]


@given(st.integers(2, 400), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_the_interval_is_that_of_a_binomial_share(number: int, share: float) -> None:
    values = (np.arange(number) < round(share * number)).astype(float)
    low, high = bootstrap_interval(values)
    mean = values.mean()
    assert low <= mean <= high
    spread = 1.96 * math.sqrt(mean * (1 - mean) / number)
    assert abs((high - low) / 2 - spread) <= 0.15 * spread + 1 / number


def test_summary_by_hand() -> None:
    rows = [
        {"source": "a", "index": i, "depth": d, "sample": s, "verdict": v, "num_tokens": 4 + s, "majority_right": not i}
        for d, i, s, v in [
            (1, 0, 0, "right"), (1, 0, 1, "right"), (1, 1, 0, "wrong"), (1, 1, 1, "right"),
            (2, 0, 0, "right"), (2, 0, 1, "wrong"), (2, 1, 0, "unparsable"), (2, 1, 1, "wrong"),
        ]
    ]  # fmt: skip
    first, second = graded_summary(rows)
    assert (first["accuracy"], second["accuracy"]) == (0.75, 0.25)
    assert (first["drop"], second["drop"]) == (0.0, 50.0)
    assert (first["pass_at_2"], second["pass_at_2"]) == (1.0, 0.5)
    assert (first["majority"], second["unparsable"], first["mean_tokens"]) == (0.5, 0.25, 4.5)
    with pytest.raises(ValueError, match="1 are missing: problem 1 of 'a' has none at depth 2, sample 0"):
        graded_summary([*rows[:6], rows[7]])


def test_two_processes_grade_what_one_does(config: Path, tmp_path: Path) -> None:
    # 12 problems in batches of 3: the sampler repeats some on the second process.
    two = ["--config", "conf/overlays/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    argv = ["test", "--config", config, f"--ckpt_path={last}"]
    run_looplm(*argv, f"--trainer.default_root_dir={tmp_path / 'one'}")
    said = run_looplm(*argv, *two, f"--trainer.default_root_dir={tmp_path / 'two'}", num_ranks=2)
    assert said.count("near, 7 problems: best") == 1
    one, found = (tmp_path / name / "test_graded.csv" for name in ("one", "two"))
    assert found.read_text() == one.read_text()
    rows = [sorted(line for line in open(folder.parent / "test_answers.jsonl")) for folder in (one, found)]
    assert [line for line in rows[0] if '"text"' in line] == [line for line in rows[1] if '"text"' in line]
    assert (tmp_path / "two" / "test_graded.png").exists()
