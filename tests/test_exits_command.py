import csv

import pytest
import torch

from looplm.cli import main
from looplm.commands.exits import ExitRow, Problems, choose
from looplm.corpora.arithmetic import ArithmeticDataModule


def row(rule, threshold, exact_match, mean_loops, split="train"):
    return ExitRow(
        split=split,
        rule=rule,
        threshold=threshold,
        cache="per_loop",
        exact_match=exact_match,
        mean_loops=mean_loops,
        cache_bytes=1,
    )


def test_rows_are_cut_into_prompts_and_answers():
    data = ArithmeticDataModule(min_digits=1, max_digits=3)
    batch = data.training_batch(0)
    problems = Problems.of(batch, data.end_id)
    for tokens, mask, answer, ids, labels in zip(
        problems.tokens, problems.mask, problems.answers, batch["input_ids"], batch["labels"], strict=True
    ):
        prompt, said = tokens[mask.bool()], answer[answer != -100]
        whole = torch.cat([prompt, said])
        assert data.tokenizer.decode(prompt.tolist()).endswith("= ")
        assert said[-1] == data.end_id
        assert torch.equal(whole[:-1], ids[: len(whole) - 1])
        assert torch.equal(said, labels[labels != -100])


def test_the_threshold_of_fewest_loops_that_loses_little_on_train_is_chosen():
    rows = [row("fixed", 4, 0.95, 4), row("fixed", 8, 0.98, 8)]
    rows += [row("kl", 0.3, 0.90, 2), row("kl", 0.2, 0.979, 3), row("kl", 0.1, 0.98, 5)]
    rows += [row("kl", 0.05, 1.0, 1, split="test")]
    assert choose(rows, "kl", 0.002) == 0.2
    assert choose(rows, "kl", 0.0) == 0.1
    assert choose([*rows[:3]], "kl", 0.0) == 0.3  # none holds: the one nearest to the full depth


def test_a_run_is_measured_and_drawn(write_config, tmp_path, capsys):
    root = tmp_path / "run"
    assert main(["fit", "--config", str(write_config(trainer__default_root_dir=str(root)))]) == 0
    capsys.readouterr()
    assert main(["exits", str(root), "--num_loops", "4", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "saved" in out
    assert out.endswith(f"next:    python -m looplm explore {root}\n")
    with (tmp_path / "out" / "exits.csv").open() as file:
        rows = list(csv.DictReader(file))
    fixed = [r for r in rows if r["rule"] == "fixed" and r["cache"] == "per_loop"]
    assert [(r["split"], float(r["threshold"])) for r in fixed] == [
        (s, d) for s in ("train", "test") for d in range(1, 5)
    ]
    assert all(float(r["mean_loops"]) == float(r["threshold"]) for r in fixed)
    assert all(1 <= float(r["mean_loops"]) <= 4 for r in rows)
    assert {r["rule"] for r in rows} == {"fixed", "residual", "kl", "entropy", "confidence"}
    caches = {r["cache"]: int(r["cache_bytes"]) for r in rows if r["split"] == "test" and r["threshold"] == "4.0"}
    assert caches["per_loop"] == 2 * caches["ring(2)"] == 4 * caches["last"]
    for name in ("exits.png", "caches.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_exits_are_measured_with_the_cache_that_is_asked_for(write_config, tmp_path, capsys):
    root = tmp_path / "run"
    assert main(["fit", "--config", str(write_config(trainer__default_root_dir=str(root)))]) == 0
    measured = {}
    for cache in ("per_loop", "last"):
        assert main(["exits", str(root), "--num_loops", "4", "--cache", cache, "--output", str(tmp_path / cache)]) == 0
        with (tmp_path / cache / "exits.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {r["cache"] for r in rows if r["rule"] != "fixed" or r["split"] == "train"} == {cache}
        measured[cache] = {r["cache"]: r for r in rows if (r["split"], r["threshold"]) == ("test", "4.0")}
    assert measured["per_loop"] == measured["last"]  # every cache at the greatest depth, whichever the exits had


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "is no config.yaml of a run"),
        (["none", "--num_loops", "1"], "must be >= 2, got 1"),
        (["none", "--most_lost", "2"], "`--most_lost` must be a share, from 0 to 1, got 2.0"),
        (["none", "--cache", "first"], "`--cache` must be `per_loop`, `last` or `ring(k)` with k >= 1, got 'first'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, tmp_path, capsys):
    assert main(["exits", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_problems_of_several_widths_are_measured_together(write_config, tmp_path):
    # Batches of four are not all as wide as the longest problem.
    options = {"data__init_args__batch_size": 4, "data__init_args__min_digits": 1, "data__init_args__max_digits": 3}
    root = tmp_path / "run"
    assert main(["fit", "--config", str(write_config(trainer__default_root_dir=str(root), **options))]) == 0
    assert main(["exits", str(root), "--num_loops", "2"]) == 0
