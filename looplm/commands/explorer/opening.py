"""From what a user names (a run directory, a checkpoint, a Hugging Face directory) to a model and its form of problems.

Knows files and models; computes and serves nothing.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from looplm.carried_tokenizer import begin_and_ends, carried_tokenizer
from looplm.checkpoints import load_model
from looplm.commands.explorer.forms import ArithmeticForm, ProblemForm, TextForm
from looplm.commands.messages import nearest_path
from looplm.commands.next_step import last_of_run
from looplm.commands.run_data import RunData, read_run_data
from looplm.corpora.arithmetic import ArithmeticDataModule
from looplm.corpora.mathematics import MathDataModule
from looplm.corpora.pretrained_tokenizer import PretrainedTokenizer
from looplm.corpora.templates import CHAT, SolutionText
from looplm.durable import is_sharded, recover
from looplm.errors import InputError
from looplm.model import LoopedTransformer
from looplm.origin import Origin

__all__ = ["OpenedModel", "open_model"]

_EXAMPLE = "Tom has 3 apples and buys 4 more. How many apples does he have?"


@dataclass(frozen=True)
class OpenedModel:
    """A model that can be asked.

    Example:
        >>> from looplm.config import LoopedConfig
        >>> form = ArithmeticForm(ArithmeticDataModule(min_digits=2, max_digits=2), max_positions=16)
        >>> config = LoopedConfig(vocab_size=17, max_positions=16, width=16, num_heads=2, ffn_width=24)
        >>> opened = OpenedModel("runs/sums", LoopedTransformer(config).eval(), form)
        >>> opened.model.embed(torch.tensor([opened.form.encode("12+34")])).hidden.shape
        torch.Size([1, 7, 16])
    """

    name: str
    """What the user named."""
    model: LoopedTransformer
    """In evaluation mode."""
    form: ProblemForm
    """How problems are written."""


def open_model(
    source: str, *, config: Path | None = None, template: str | None = None, device: torch.device | str = "cpu"
) -> OpenedModel:
    """Open a model together with the form of its problems.

    The form is that of the run's ``config.yaml``, in the run directory or where ``config`` says. Without one the
    tokenizer that travels with the model reads free text.

    Args:
        source: A run directory, a checkpoint file, or a Hugging Face directory or hub id.
        config: The ``config.yaml`` of the run that trained the model; None: that beside a run's checkpoint.
        template: Of free text, with ``{question}`` in it, or ``chat``; None: the run's, or the text as it is.
        device: Where the model goes.

    Raises:
        InputError: If the model or what it needs to be asked cannot be read.

    Example:
        >>> from looplm.checkpoints import save_checkpoint
        >>> from looplm.config import LoopedConfig
        >>> run = Path(tempfile.mkdtemp())
        >>> config = LoopedConfig(vocab_size=17, max_positions=16, width=16, num_heads=2, ffn_width=24)
        >>> save_checkpoint(LoopedTransformer(config), run / "checkpoints" / "last.ckpt")
        >>> _ = (run / "config.yaml").write_text("data: {class_path: ArithmeticDataModule, init_args: {min_digits: 1}}")
        >>> open_model(str(run)).form.expected("12+34")
        '46'
    """
    checkpoint, beside = _locate(source)
    model = load_model(checkpoint, device=device)
    config = beside if config is None and beside is not None and beside.is_file() else config
    data = None if config is None else read_run_data(config)
    if data is not None and data.class_name == ArithmeticDataModule.__name__:
        if template is not None:
            raise InputError(f"`--template` has no effect on arithmetic problems, got {template!r}.")
        return OpenedModel(source, model, _arithmetic(data, model))
    return OpenedModel(source, model, _free_text(source, model, data, template))


def _locate(source: str) -> tuple[str, Path | None]:
    """Return the checkpoint, and where its run's config would be."""
    path = Path(source)
    recover(path)
    is_local = source.startswith((".", "/", "runs/")) or Path(*path.parts[:1]).exists()
    if is_local and not path.exists():  # the hub is not asked for what was meant to be here
        hint = nearest_path(path) or "; `python -m looplm fit` makes a run."
        raise InputError(f"{source!r} does not exist{hint}")
    if path.is_dir() and not (path / "config.json").is_file() and not is_sharded(path):
        last = last_of_run(path)
        if last == path:
            raise InputError(f"{source!r} is no run directory (checkpoints/last.ckpt) and no model's (config.json).")
        return str(last), path / "config.yaml"
    return source, path.resolve().parent.parent / "config.yaml" if path.is_file() else None


def _arithmetic(data: RunData, model: LoopedTransformer) -> ArithmeticForm:
    problems = data.arithmetic()
    if problems.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the config's problems have {problems.vocab_size} tokens, the model {model.config.vocab_size}: it is of "
            "another run."
        )
    return ArithmeticForm(problems, model.config.max_positions)


def _free_text(source: str, model: LoopedTransformer, data: RunData | None, template: str | None) -> TextForm:
    origin = Origin(config={}) if model.origin is None else model.origin
    if "tokenizer.json" not in origin.files:
        raise InputError(
            f"{source!r} has neither a tokenizer nor a run's config.yaml: name that of its run with `--config`."
        )
    tokenizer = carried_tokenizer(source, origin, model.config.vocab_size)
    arguments = {} if data is None else data.arguments
    default = "{question}" if data is None else str(inspect.signature(MathDataModule).parameters["template"].default)
    template = str(arguments.get("template") or default) if template is None else template
    system = arguments.get("system_prompt") if template == CHAT else None
    given = arguments.get("tokenizer") or {}
    given = given if isinstance(given, dict) else {}
    is_pretrained = data is None or str(given.get("class_path", "")).endswith(PretrainedTokenizer.__name__)
    end_token = (given.get("init_args") or {}).get("end_token")
    try:
        text = SolutionText(template, "{answer}", None if system is None else str(system))
    except ValueError as error:
        raise InputError(str(error)) from None
    ends = begin_and_ends(origin, tokenizer, model.config.vocab_size)[1]
    if end_token is not None:
        known = tokenizer.token_to_id(str(end_token))
        ends = ends if known is None else [known]
    write: Callable[[str], str]
    if template == CHAT:
        writer = text.bind(_with_chat_template(origin, end_token))
        ends = [writer.end_id]

        def write(question: str) -> str:
            return writer([question])[0]
    else:
        # Our own tokenizers never read a mark's name as the mark; published ones do, see their classes.
        tokenizer.encode_special_tokens = not is_pretrained

        def write(question: str) -> str:
            return text.plain_prompts([question])[0]

    return TextForm(tokenizer, write, ends, _EXAMPLE)


def _with_chat_template(origin: Origin, end_token: str | None) -> PretrainedTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in origin.files.items():
            # Code that travels with a model is not run, and not written where something might.
            if not name.endswith(".py"):
                (Path(folder) / name).write_bytes(content)
        return PretrainedTokenizer(folder, end_token=end_token)
