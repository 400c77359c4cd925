"""Every shipped maths config trains a step, is graded, and names columns that its corpus has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import looplm
from looplm import LogNormalDepth, LoopedConfig
from looplm.checkpoints import save_pretrained
from looplm.cli import main
from looplm.model import LoopedTransformer

CONF = Path(looplm.__file__).parents[1] / "conf"
WHOLE = sorted(CONF.glob("*math*.yaml"))
OVERLAYS = sorted(CONF.glob("eval/*.yaml"))


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _standing_in(source: dict[str, Any], folder: Path, split: str, number: int) -> dict[str, Any]:
    """Return a small local source with the columns that a config asks a hub id or a generator for."""
    columns = {"question": source.get("question", "question"), "answer": source.get("answer", "answer")}
    columns["final"] = source.get("final")
    path = folder / f"{split}_{number}.jsonl"
    lines = []
    for i in range(12):
        texts = {"question": f"{split} {number} and {i}?", "answer": f"It is {i}.\n#### {i}", "final": str(i)}
        row = {}
        for part, pattern in columns.items():
            if pattern is not None:
                names = [field.split("}")[0] for field in pattern.split("{")[1:]] or [pattern]
                row |= dict.fromkeys(names, texts[part])
        lines.append(json.dumps(row))
    path.write_text("".join(f"{line}\n" for line in lines))
    kept = {key: value for key, value in source.items() if key in ("name", "question", "answer", "final", "weight")}
    return {**kept, "path": str(path), "split": "train", "subset": None}


def _argv(config: Path, tmp_path: Path, overlay: Path | None = None) -> list[str]:
    content = _read(config)
    data = content["data"]["init_args"]
    if overlay is not None:
        data = {**data, **_read(overlay)["data"]["init_args"]}
    argv = ["--config", str(config)] + ([] if overlay is None else ["--config", str(overlay)])
    for split in ("train", "val", "test"):
        if split in data:
            sources = [_standing_in(source, tmp_path, split, number) for number, source in enumerate(data[split])]
            argv.append(f"--data.init_args.{split}={json.dumps(sources)}")
    argv += [
        f"--data.init_args.cache_dir={tmp_path}/cache",
        "--data.init_args.num_val=2",
        "--data.init_args.num_test=3",
    ]
    argv += ["--data.init_args.batch_size=2", "--data.init_args.eval_batch_size=2"]
    argv += ["--data.init_args.max_tokens=64", "--data.init_args.max_positions=96"]
    if data["template"] == "chat":
        argv += ["--data.init_args.tokenizer=ByteTokenizer", "--data.init_args.template={question}"]
    if "init_from" in content["model"]:
        small = replace(LoopedConfig.ouro_1_4b(), vocab_size=300, max_positions=96, width=16, num_heads=2, ffn_width=16)
        save_pretrained(LoopedTransformer(replace(small, num_core_layers=1)), tmp_path / "ouro", num_loops=4)
        argv.append(f"--model.init_from={tmp_path / 'ouro'}")
    else:
        argv += ["--model.config.width=32", "--model.config.num_heads=2", "--model.config.ffn_width=32"]
    argv += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    argv += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.precision=32-true"]
    argv += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    argv += ["--trainer.num_sanity_val_steps=0", "--model.val_depths=[1]", "--model.test_depths=[1,2]"]
    return [*argv, "--model.max_new_tokens=3"]


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_config_trains_a_step_and_is_graded(path: Path, tmp_path: Path) -> None:
    argv = _argv(path, tmp_path)
    assert main(["fit", *argv]) == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert main(["test", *argv]) == 0
    graded = (tmp_path / "run" / "test_graded.csv").read_text().splitlines()[1:]
    names = {source["name"] for source in _read(path)["data"]["init_args"]["test"]}
    assert {line.split(",")[0] for line in graded} == names


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_evaluation_overlay_puts_its_corpus_in_the_place_of_the_tests(path: Path, tmp_path: Path) -> None:
    argv = _argv(CONF / "math.yaml", tmp_path, overlay=path)
    assert main(["fit", *argv]) == 0
    assert main(["test", *argv]) == 0
    graded = (tmp_path / "run" / "test_graded.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in graded} == {path.stem}
    answers = (tmp_path / "run" / "test_answers.jsonl").read_text().split("\n")[1:-1]
    assert {json.loads(line)["final"] for line in answers} == {"0", "1", "2"}


@pytest.mark.parametrize("name", ["math", "math_gpu"])
def test_the_curve_goes_to_eight_times_the_mean_depth_of_training_and_the_baselines_too(name: str) -> None:
    model, baseline = (_read(CONF / f"{file}.yaml")["model"] for file in (name, f"{name}_fixed_depth"))
    last = model["objective"]["depth_sampler"]["init_args"]["stages"][-1]["sampler"]["init_args"]
    assert 8 * LogNormalDepth(**last).mean <= model["test_depths"][-1]
    assert baseline["test_depths"] == model["test_depths"]


def test_predict_answers_questions_a_line_in_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = _argv(CONF / "math.yaml", tmp_path)
    assert main(["fit", *argv]) == 0
    (tmp_path / "questions").write_text("Ann has 2 pens.\\nHow many?\n\n 1 and\u2028“1”? \n", encoding="utf-8")
    capfd.readouterr()
    # One token, and no model that has hardly been trained ends with it.
    argv.append("--model.max_new_tokens=1")
    with pytest.warns(UserWarning, match="2 of 2 answers have no end: they were cut after `max_new_tokens`"):
        assert main(["predict", *argv, f"--data.init_args.predict_file={tmp_path / 'questions'}"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.removesuffix("\n").split("\n")]
    assert [row["question"] for row in rows] == ["Ann has 2 pens.\nHow many?", "1 and\u2028“1”?"]
    assert all(isinstance(row["answer"], str) for row in rows)
    (tmp_path / "questions").write_text("short?\n" + "long " * 200, encoding="utf-8")
    assert main(["predict", *argv, f"--data.init_args.predict_file={tmp_path / 'questions'}"]) == 2
    assert "questions, line 2: the prompt has" in capfd.readouterr().err
