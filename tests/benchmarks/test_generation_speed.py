"""What the cache and the batch are worth, and what a large model needs: minutes, not part of the normal suite."""

import subprocess
import sys
import time

import pytest
import torch

from looplm.checkpoints import save_pretrained
from looplm.config import LoopedConfig
from looplm.generation import generate
from looplm.model import LoopedTransformer

pytestmark = pytest.mark.slow


def test_batched_cached_generation_is_twenty_times_as_fast_with_the_same_tokens():
    torch.manual_seed(0)
    config = LoopedConfig(
        vocab_size=256,
        max_positions=96,
        width=256,
        num_heads=4,
        ffn_width=512,
        positions="rotary",
        tie_embeddings=False,
        init_std=0.05,
        dropout=0.0,
    )
    model = LoopedTransformer(config).eval()
    prompts = torch.randint(256, (32, 16))
    generate(model, prompts[:2], num_loops=8, max_new_tokens=2, end_id=-1)  # warm up

    def batched():
        begin = time.perf_counter()
        tokens = generate(model, prompts, num_loops=8, max_new_tokens=64, end_id=-1)
        return tokens, 32 * 64 / (time.perf_counter() - begin)

    def single(row):
        begin = time.perf_counter()
        tokens = generate(model, prompts[row : row + 1], num_loops=8, max_new_tokens=64, end_id=-1, cache="none")
        return tokens, 64 / (time.perf_counter() - begin)

    # The two take turns, so that another load on the machine meets both; the best of each counts.
    fast, slow = [], []
    for row in range(4):
        tokens, rate = batched()
        fast.append(rate)
        alone, rate = single(row)
        slow.append(rate)
        assert torch.equal(alone[0], tokens[row])
    ratio = max(fast) / max(slow)
    sys.stderr.write(f"tokens/s: batched and cached {max(fast):.0f}, alone {max(slow):.1f}, ratio {ratio:.1f}\n")
    assert ratio >= 20


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
