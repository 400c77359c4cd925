"""Under FSDP 2 the weights travel once a step, whatever the number of loops."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from processes import environment


def test_a_sharded_step_gathers_once_and_scatters_once_at_any_depth() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("counted_step.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **environment(),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    once = {"_allgather_base_": 1, "_reduce_scatter_base_": 1}
    assert json.loads(outputs[0][0].splitlines()[-1]) == {"2": once, "8": once}
