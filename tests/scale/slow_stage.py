"""A stage that takes as long as a test needs to send a signal into it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L


class SlowStage(L.Callback):
    """Hold the first batch of one rank's evaluation up, once a file says that it has come so far."""

    def __init__(self, file: str, seconds: float, rank: int = 0) -> None:
        self.file, self.seconds, self.rank = Path(file), seconds, rank

    def _wait(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
            time.sleep(self.seconds)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _wait
