"""``explore``: a page on this machine where a problem's answer can be seen at every depth (needs ``looplm[explore]``).

Shown are the answer's tokens by depth and how sure the model is of each, how far the state still moves, where exits
would stop, and the path of the latent state. Only this machine's browser can open the page.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.imports import RequirementCache

from looplm.commands.arguments import Parser
from looplm.errors import InputError

if TYPE_CHECKING:
    from looplm.commands.explorer.session import Session

__all__ = ["make_parser", "run"]

_ADDRESS = "127.0.0.1"
_NEEDED = ("starlette>=0.40", "uvicorn>=0.30")

_EXAMPLES = """\
examples:
  python -m looplm explore runs/stars
  python -m looplm explore runs/math/checkpoints/last.ckpt --max_new_tokens 200
  python -m looplm explore ByteDance/Ouro-1.4B --template chat --max_depth 8
"""


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("explore", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("source", metavar="CKPT", help="run directory, checkpoint file, Hugging Face directory or id")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port to listen on; 0: any that is free")
    parser.add_argument("--no_browser", "--no-browser", action="store_true", help="do not open the page")
    parser.add_argument("--max_depth", type=int, default=64, metavar="N", help="greatest depth that can be asked for")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N", help="longest answer")
    parser.add_argument("--max_seconds", type=float, default=120.0, metavar="S", help="longest computation")
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="config.yaml of the run, where it does not stand beside CKPT"
    )
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help="prompt of a model of text, with {question} in it, or `chat`; default: its run's",
    )
    parser.add_argument("--device", metavar="NAME", help="where the model computes; default: cuda if there is one")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command; for its options see ``--help``.

    Raises:
        InputError: If the model cannot be opened, the port is taken, or the server's packages are missing.
    """
    args = make_parser().parse_args(argv)
    missing = [requirement for requirement in _NEEDED if not RequirementCache(requirement)]
    if missing:
        raise InputError(f"`explore` needs {' and '.join(missing)}: pip install 'looplm[explore]'.")
    if not 0 <= args.port < 2**16:
        raise InputError(f"`--port` must be from 0 to 65535, got {args.port}.")
    import torch

    from looplm.commands.explorer.opening import open_model
    from looplm.commands.explorer.session import Limits, Session

    try:
        limits = Limits(max_depth=args.max_depth, max_new_tokens=args.max_new_tokens, max_seconds=args.max_seconds)
    except ValueError as error:
        raise InputError(str(error)) from None
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"`--device` must be one that this machine has, for example cpu, got {device!r}.") from None
    with _listen(args.port) as listener:
        opened = open_model(args.source, config=args.config, template=args.template, device=device)
        _serve(Session(opened, limits), listener, opens_browser=not args.no_browser and _has_screen())
    return 0


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port that a server has just left can be taken at once.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_ADDRESS, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(
            f"`--port` {port} cannot be used: {error.strerror}; without it any free port is taken."
        ) from None
    return listener


def _has_screen() -> bool:
    """Return whether a browser with windows can open: one that fills the terminal would hide this program's lines."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _serve(session: Session, listener: socket.socket, *, opens_browser: bool) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    from looplm.commands.explorer.app import build_app

    logging.basicConfig(format="%(levelname)s: %(message)s")
    port = listener.getsockname()[1]
    address = f"http://{_ADDRESS}:{port}/"
    config = uvicorn.Config(
        build_app(session, port), log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off"
    )
    sys.stdout.write(f"explore: {address} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    if opens_browser:
        # The listener already queues connections.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            session.stop()  # else the end would wait for it
            super().handle_exit(sig, frame)

    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again when it has ended in order
        sys.stdout.write("\n")
