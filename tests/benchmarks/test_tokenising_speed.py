"""Tokenising a corpus with its checks, templates and labels, against a bare `datasets.map` that only tokenises."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from looplm.corpora.bpe import BPETokenizer
from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.sources import Source, load_rows
from looplm.corpora.templates import SolutionText
from looplm.corpora.text_tokenizer import ByteTokenizer, CorpusCharTokenizer, TextTokenizer
from looplm.corpora.token_table import RowEncoder, token_table

pytestmark = pytest.mark.slow
GSM8K = Path(__file__).parents[3] / "shared" / "corpora" / "gsm8k_train.jsonl"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _directory(texts: list[str], folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "chat"])
def test_tokenising_is_nearly_as_fast_as_a_bare_map(kind: str, tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip("the real corpora are not here")
    datasets.disable_progress_bars()
    source = Source(path=str(GSM8K))
    rows = load_rows(source, tmp_path / "rows")
    texts = [*rows["question"], *rows["answer"]]
    bare: Callable[[dict[str, Any]], dict[str, Any]]
    if kind == "chat":
        folder = _directory(texts, tmp_path / "chat")
        tokenizer: TextTokenizer = PretrainedTokenizer(str(folder))
        plain = AutoTokenizer.from_pretrained(folder)

        def bare(batch: dict[str, Any]) -> dict[str, Any]:
            pairs = zip(batch["question"], batch["answer"], strict=True)
            chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
            return {"ids": plain(plain.apply_chat_template(chats, tokenize=False))["input_ids"]}

    else:
        tokenizer = {"char": CorpusCharTokenizer, "byte": ByteTokenizer, "bpe": BPETokenizer}[kind]()
        tokenizer.learn(texts)

        def bare(batch: dict[str, Any]) -> dict[str, Any]:
            pairs = zip(batch["question"], batch["answer"], strict=True)
            return {"ids": [encoded.ids for encoded in tokenizer.encode([f"Q: {q}\nA:\n{a}" for q, a in pairs])]}

    encoder = RowEncoder(SolutionText("chat" if kind == "chat" else "Q: {question}\nA:\n", "{answer}", None), tokenizer)

    def seconds(run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    ours, theirs = [], []
    for turn in range(7):  # they take turns, so that another load on the machine meets both
        cache = tmp_path / f"cache{turn}"
        (cache / "sources").parent.mkdir()
        (cache / "sources").symlink_to(tmp_path / "rows")  # both begin with rows that have been read
        theirs.append(
            seconds(lambda: rows.map(bare, batched=True, remove_columns=rows.column_names, load_from_cache_file=False))
        )
        ours.append(seconds(lambda cache=cache: token_table(source, encoder, cache, skip_malformed=False)))
    ratio = statistics.median(theirs) / statistics.median(ours)
    rate = len(rows) / statistics.median(ours)
    sys.stderr.write(f"{kind}: {rate:.0f} rows/s, {ratio:.2f} of a bare map's speed\n")
    assert ratio >= 0.8
