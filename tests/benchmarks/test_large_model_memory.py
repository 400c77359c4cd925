"""What a large model needs: minutes, not part of the normal suite."""

import subprocess
import sys

import pytest
import torch

from looplm.checkpoints import save_pretrained
from looplm.config import LoopedConfig
from looplm.model import LoopedTransformer

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_ouro_of_1_4_billion_parameters_runs_within_8_gb(tmp_path):
    with torch.device("meta"):
        model = LoopedTransformer(LoopedConfig.ouro_1_4b()).bfloat16()
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Uniform bits are drawn fast; a gain of one keeps the norms as they are trained.
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.uniform_(-0.03, 0.03, generator=generator)
    save_pretrained(model, tmp_path / "ouro", num_loops=4, max_shard_bytes=10**9)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    del model
    code = (
        "import sys, torch, looplm.checkpoints\n"
        # Not getrusage: its peak counts what the parent had before this program was started.
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak()\n"
        "model = looplm.checkpoints.from_pretrained(sys.argv[1])\n"
        "loaded = peak()\n"
        "with torch.no_grad(): logits = model(torch.arange(1, 33)[None], num_loops=4)\n"
        "assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all()) and logits.std() > 0\n"
        "print(loaded - before, peak())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "ouro")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loading, whole = map(int, done.stdout.split())
    sys.stderr.write(f"loading {loading / weights:.3f} of the weights, peak {whole / 2**30:.2f} GiB\n")
    assert loading <= 1.1 * weights
    assert whole <= 8 * 10**9
