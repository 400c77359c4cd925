"""The loss stands on the solution, all of it and nothing else, whatever the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import GSM8K, ROWS, write_lines

from looplm.corpora.batches import Example, padded_batch
from looplm.corpora.bpe import BPETokenizer
from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.rows import check_rows
from looplm.corpora.sources import Source
from looplm.corpora.templates import SolutionText
from looplm.corpora.text_tokenizer import ByteTokenizer, CorpusCharTokenizer, TextTokenizer
from looplm.corpora.token_table import RowEncoder, TokenTable, prompts_that_change, token_table

SOURCE = Source(path="x/y")
TEMPLATE = "Question: {question}\nSolution:\n"
KINDS = ["char", "byte", "bpe", "chat", "plain"]


def _encoder(kind: str, save_tokenizer: Callable[..., Path], corpus: list[dict[str, str]]) -> RowEncoder:
    tokenizer: TextTokenizer
    if kind in ("chat", "plain"):
        tokenizer = PretrainedTokenizer(str(save_tokenizer()))
    else:
        tokenizer = {"char": CorpusCharTokenizer, "byte": ByteTokenizer, "bpe": BPETokenizer}[kind]()
    tokenizer.learn(text for row in corpus for text in row.values())
    return RowEncoder(SolutionText("chat" if kind == "chat" else TEMPLATE, "{answer}", None), tokenizer)


def _columns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [row[name] for row in rows] for name in ("question", "answer")}


def _assert_labels_are_the_solutions(encoder: RowEncoder, rows: list[dict[str, str]]) -> None:
    encoded = encoder(check_rows(SOURCE, _columns(rows)))
    examples = [Example(ids, int(start)) for ids, start in zip(encoded.ids, encoded.num_prompt, strict=True)]
    for start in range(0, len(rows), 100):
        labels = padded_batch(examples[start : start + 100], encoder.tokenizer.pad_id)["labels"]
        for row, label in zip(rows[start : start + 100], labels.tolist(), strict=True):
            asked = [index for index in label if index != -100]
            assert asked[-1] == encoder.prompts.end_id
            assert encoder.tokenizer.decode(asked[:-1]) == row["answer"]
    prompts = encoder.prompts([row["question"] for row in rows])
    for prompt, ids, start in zip(prompts, encoded.ids, encoded.num_prompt, strict=True):
        if encoder.text.template != "chat":  # its marks are not decoded
            assert encoder.tokenizer.decode(ids[:start].tolist()) == prompt


def _gsm8k() -> list[dict[str, str]]:
    if not GSM8K.is_file():
        pytest.skip("the real corpora are not here")
    return [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_decode_to_the_solutions_of_a_real_corpus(kind: str, save_tokenizer: Callable[..., Path]) -> None:
    rows = _gsm8k()[:500]
    _assert_labels_are_the_solutions(_encoder(kind, save_tokenizer, rows), rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_labels_decode_to_the_solutions_of_a_whole_corpus(kind: str, save_tokenizer: Callable[..., Path]) -> None:
    rows = _gsm8k()
    assert len(rows) == 7473
    _assert_labels_are_the_solutions(_encoder(kind, save_tokenizer, rows), rows)


# Texts that begin and end with what tokenizers like to join.
edges = st.lists(st.sampled_from(["\n", " ", "  ", "apples", "2", "é", "$", "\n\n", "Ann"]), min_size=1, max_size=6)
solid = edges.map(lambda parts: "".join(parts)).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(question=solid, answer=solid)
def test_labels_decode_to_any_solution(
    kind: str, question: str, answer: str, save_tokenizer: Callable[..., Path]
) -> None:
    if kind not in ENCODERS:
        ENCODERS[kind] = _encoder(kind, save_tokenizer, [*ROWS, {"question": "é$", "answer": "é"}])
    encoder = ENCODERS[kind]
    _assert_labels_are_the_solutions(encoder, [{"question": question, "answer": answer}])


ENCODERS: dict[str, RowEncoder] = {}


def test_counting_the_tokens_of_the_prompt_alone_is_wrong_at_the_border(save_tokenizer: Callable[..., Path]) -> None:
    """The authors tokenise the prompt apart and take its length as the border, which is off where tokens join."""
    tokenizer = PretrainedTokenizer(str(save_tokenizer()))
    encoder = RowEncoder(SolutionText("{question} ", "{answer}", None), tokenizer)
    question, answer = "How many?", "Ann has 2"
    prompt = f"{question} "
    (whole,), (alone,) = tokenizer.encode([prompt + answer]), tokenizer.encode([prompt])
    # The blank joins the solution's first word, so the prompt alone has a token that the whole has not.
    counted = whole.ids[len(alone.ids) :]
    assert tokenizer.decode(list(counted)) != answer
    assert not tokenizer.decode(list(counted)).startswith("Ann")

    rows = check_rows(SOURCE, {"question": [question], "answer": [answer]})
    encoded = encoder(rows)
    assert tokenizer.decode(encoded.ids[0][encoded.num_prompt[0] : -1].tolist()) == answer
    assert encoded.joined.tolist() == [True]
    # What generation reads is what training read.
    assert np.array_equal(encoded.ids[0][: encoded.num_prompt[0]], encoder.encode_prompts([question])[0])


def test_prompt_that_is_cut_otherwise_before_its_solution_is_noticed(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = PretrainedTokenizer(str(save_tokenizer()))
    rows = check_rows(SOURCE, {"question": ["How many?"], "answer": ["Ann has 2"]})
    # Line breaks at a text's end are one token, before a word the last of them stands alone.
    changing = RowEncoder(SolutionText("{question}\n\n", "{answer}", None), tokenizer)
    assert len(tokenizer.encode(["?\n\n"])[0].ids) != len(tokenizer.encode(["?\n\nAnn"])[0].ids) - 1
    assert prompts_that_change(changing, rows) == 1
    assert prompts_that_change(RowEncoder(SolutionText("{question}\n", "{answer}", None), tokenizer), rows) == 0


def test_solution_is_made_of_answer_and_final_in_one_pass() -> None:
    text = SolutionText("{question}=", "{answer} #### {final}", None)
    assert text.solutions(["{final}"], ["{answer}"]) == ["{final} #### {answer}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no place", "{answer}", None), "`template` must be `chat` or hold {question} once"),
        (("{question}{question}", "{answer}", None), "once"),
        (("{question}", "nothing", None), "`solution` must hold"),
        (("{question}", "{answer}", "Be brief."), "`system_prompt` has no effect"),
    ],
)
def test_templates_are_checked(arguments: tuple[str, str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolutionText(*arguments)


def test_chat_needs_a_chat_template(save_tokenizer: Callable[..., Path]) -> None:
    text = SolutionText("chat", "{answer}", None)
    for tokenizer in (ByteTokenizer(), PretrainedTokenizer(str(save_tokenizer("bare", None)))):
        with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
            text.bind(tokenizer)


def _rows_of(table: TokenTable) -> list[list[int]]:
    return [table.ids(row).tolist() for row in range(len(table))]


def _byte_encoder(template: str = TEMPLATE) -> RowEncoder:
    return RowEncoder(SolutionText(template, "{answer}", None), ByteTokenizer())


def test_table_has_the_rows_that_were_encoded_over_many_chunks(tmp_path: Path) -> None:
    rows = [ROWS[i % 100] | {"question": f"{i} {ROWS[i % 100]['question']}"} for i in range(2345)]
    rows[1234] = {"question": " ", "answer": "x"}
    source = Source(path=str(write_lines(tmp_path / "rows.jsonl", rows)))
    encoder = _byte_encoder()
    table = token_table(source, encoder, tmp_path / "cache", skip_malformed=False)
    expected = encoder(check_rows(source, _columns(rows)))
    assert _rows_of(table) == [ids.tolist() for ids in expected.ids]
    assert table.lengths.tolist() == [len(ids) for ids in expected.ids]
    assert table.num_prompt.tolist() == expected.num_prompt.tolist()
    assert np.flatnonzero(table.fault).tolist() == [1234]


def test_tokens_are_kept_by_content_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Source(path=str(write_lines(tmp_path / "rows.jsonl", ROWS)))
    same = Source(path=str(write_lines(tmp_path / "copy.jsonl", ROWS)))
    encoder, cache = _byte_encoder(), tmp_path / "cache"
    table = token_table(first, encoder, cache, skip_malformed=False)
    files = sorted((cache / "tokens").iterdir())
    assert len(files) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("encoded a second time")

    monkeypatch.setattr(RowEncoder, "__call__", refuse)
    assert _rows_of(token_table(same, _byte_encoder(), cache, skip_malformed=False)) == _rows_of(table)
    monkeypatch.undo()
    token_table(first, _byte_encoder("Q {question}\n"), cache, skip_malformed=False)
    token_table(Source(path=first.path, split="train[:5]"), encoder, cache, skip_malformed=False)
    write_lines(tmp_path / "rows.jsonl", ROWS[:50])
    assert len(token_table(first, encoder, cache, skip_malformed=False)) == 50
    assert len(list((cache / "tokens").iterdir())) == 4


def test_interrupted_encoding_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(path=str(write_lines(tmp_path / "rows.jsonl", ROWS)))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RowEncoder, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        token_table(source, _byte_encoder(), tmp_path / "cache", skip_malformed=False)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    monkeypatch.undo()
    assert len(token_table(source, _byte_encoder(), tmp_path / "cache", skip_malformed=False)) == 100


def test_rows_with_a_character_that_was_not_learnt_are_told(save_tokenizer: Callable[..., Path]) -> None:
    learnt = [{"question": "1 + 1?", "answer": "It is 2."}]
    encoder = _encoder("char", save_tokenizer, learnt)
    rows = [
        {"question": "ξ 1?", "answer": "It is 2."},
        {"question": "", "answer": "It is 2."},  # left out: no question
        {"question": "1 + 1?", "answer": "It is 2."},
        {"question": "1 + 1?", "answer": "It is ξ"},
        {"question": "1?", "answer": "2"},
    ]
    encoded = encoder(check_rows(SOURCE, _columns(rows)))
    assert [len(ids) > 0 for ids in encoded.ids] == [True, False, True, True, True]
    assert encoded.unknown.tolist() == [True, False, False, True, False]
    assert encoder(check_rows(SOURCE, _columns([]))).unknown.shape == (0,)
