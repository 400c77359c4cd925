"""``doctor``: which extras, devices, strategies, products and compilers work on this machine, and why others do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from looplm.commands.arguments import Parser

if TYPE_CHECKING:
    from looplm.commands.checks import Check

__all__ = ["make_parser", "run"]

_YES_NO = {True: "yes", False: "no "}

_EXAMPLES = """\
examples:
  python -m looplm doctor
  python -m looplm doctor --json > report.json
"""


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("doctor", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``."""
    args = make_parser().parse_args(argv)
    import torch

    from looplm.commands import checks

    products = checks.check_products(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report: dict[str, Any] = {
        "versions": checks.list_versions(),
        "extras": checks.check_extras(),
        "devices": checks.check_devices(),
        "strategies": checks.check_strategies(products),
        "products": products,
        "compilation": [checks.check_compilation()],
    }
    sys.stdout.write(_as_json(report) if args.json else _as_text(report))
    return 0


def _as_json(report: dict[str, Any]) -> str:
    plain = {
        name: part if isinstance(part, dict) else [asdict(check) for check in part] for name, part in report.items()
    }
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def _as_text(report: dict[str, Any]) -> str:
    lines: list[str] = []
    for name, part in report.items():
        lines += ["", name] if lines else [name]
        if isinstance(part, dict):
            width = max(map(len, part))
            lines += [f"  {key:<{width}}  {value}" for key, value in part.items()]
        else:
            width = max(len(check.name) for check in part)
            lines += [f"  {_YES_NO[check.works]}  {check.name:<{width}}  {_words(check)}" for check in part]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _words(check: Check) -> str:
    parts = [check.detail] if check.detail else []
    if check.products and check.works:
        parts += [
            f"penalty with {weights} weights: {', '.join(names) or 'none'}" for weights, names in check.products.items()
        ]
    if check.remedy:
        parts.append(check.remedy)
    return "; ".join(parts)
