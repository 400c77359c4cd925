"""The tokenizer that travels with a model, and which of its ids begin and end a text. Needs the library ``tokenizers``.

Knows files by name and content (:class:`~looplm.origin.Origin`); no model, no corpus and no template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.imports import RequirementCache

from looplm.errors import InputError
from looplm.origin import Origin
from looplm.untrusted import parse_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["begin_and_ends", "carried_tokenizer"]

_AVAILABLE = RequirementCache("tokenizers>=0.21")


def carried_tokenizer(source: str, origin: Origin, vocab_size: int) -> Tokenizer:
    """Return the tokenizer among the files that travel with a model.

    Args:
        source: What messages call the model.
        origin: The files.
        vocab_size: Number of ids that the model takes.

    Raises:
        InputError: If ``tokenizers`` is not installed, there is no ``tokenizer.json``, it is none, or it has ids that
            the model does not take.

    Example:
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> origin = Origin(config={}, files=ByteTokenizer().files())
        >>> carried_tokenizer("a model", origin, vocab_size=258).encode("1+1").ids
        [51, 45, 51]
    """
    if not _AVAILABLE:
        raise InputError("tokenizers is not installed: pip install 'looplm[math]'.")
    from tokenizers import Tokenizer

    if "tokenizer.json" not in origin.files:
        raise InputError(f"{source!r} has no tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_buffer(origin.files["tokenizer.json"])
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"{source!r}: tokenizer.json is no tokenizer: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise InputError(f"{source!r}: tokenizer.json has ids up to {largest}, the model takes {vocab_size} tokens.")
    return tokenizer


def begin_and_ends(origin: Origin, tokenizer: Tokenizer, vocab_size: int) -> tuple[int | None, list[int]]:
    """Return the id of the begin mark and those that end a text, each once.

    The tokenizer's own come first, then those of generation_config.json; config.json counts where both are silent:
    published ones are wrong.

    Args:
        origin: The files.
        tokenizer: The tokenizer.
        vocab_size: Number of ids that the model takes.

    Raises:
        InputError: If a file names an id that the model does not take.

    Example:
        >>> from looplm.corpora.text_tokenizer import ByteTokenizer
        >>> origin = Origin(config={}, files=ByteTokenizer().files())
        >>> begin_and_ends(origin, carried_tokenizer("a model", origin, 258), 258)
        (None, [1])
    """
    named, generation = (
        parse_object(f"{name}_config.json", origin.files.get(f"{name}_config.json", b"{}"))
        for name in ("tokenizer", "generation")
    )
    found: dict[str, list[int]] = {}
    for mark in ("bos", "eos"):
        token = named.get(f"{mark}_token")
        text = token.get("content") if isinstance(token, dict) else token
        known = tokenizer.token_to_id(text) if isinstance(text, str) else None
        ids = [] if known is None else [known]
        ids += _ids(f"{mark}_token_id` of `generation_config.json", generation.get(f"{mark}_token_id"), vocab_size)
        if not ids:
            ids = _ids(f"{mark}_token_id` of `config.json", origin.config.get(f"{mark}_token_id"), vocab_size)
        found[mark] = list(dict.fromkeys(ids))
    return next(iter(found["bos"]), None), found["eos"]


def _ids(what: str, value: Any, vocab_size: int) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(f"`{what}` must be an integer from 0 to {vocab_size - 1}, got {token!r}.")
    return ids
