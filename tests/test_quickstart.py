"""The quick start of the README, as a newcomer runs it: from a hub, without PyTorch.

The hub is ``tests.helpers.hub_server``, on loopback. The model is tiny and random, in the original
format.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mamba.checkpoint.names import tensor_table
from mamba.mamba1 import MambaConfig
from mamba.train.corpus import train_tokenizer
from tests.helpers import bin_files
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[1]

QUICK_START = """\
from mamba import Mamba, generate
model, params = Mamba.from_pretrained('state-spaces/mamba-370m')
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('EleutherAI/gpt-neox-20b')
out = generate(model, key=jax.random.PRNGKey(42), params=params, tokenizer=tokenizer, prompt='Mamba is the', n_tokens_to_gen=40)
"""  # noqa: E501 (as in the README)

NO_TORCH = """\
import sys
sys.modules['torch'] = None  # importing it fails
import jax
"""

REPORT = """
assert sys.modules['torch'] is None
assert out.startswith('Mamba is the') and len(out) > len('Mamba is the')
import json
print(json.dumps({'out': out, 'd_model': model.config.d_model, 'vocab': model.config.vocab_size}))
"""


def original_repository(folder, config):
    """config.json and pytorch_model.bin of a random model -> {file name: bytes}."""
    rng = np.random.default_rng(0)
    arrays = {
        row.name: rng.normal(scale=0.2, size=row.shape).astype(np.float16)
        for row in tensor_table(config)
    }
    arrays["lm_head.weight"] = arrays["backbone.embedding.weight"]
    bin_files.write_bin(folder / "pytorch_model.bin", arrays)
    settings = {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    return {
        "config.json": json.dumps(settings).encode(),
        "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(),
    }


@pytest.fixture
def hub(tmp_path):
    # A byte-level BPE, the kind of tokenizer that gpt-neox-20b is.
    tokenizer = train_tokenizer(["Mamba is the name of a snake and of a model. " * 20], 300)
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>"}
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=tokenizer.get_vocab_size() + 1)
    repositories = {
        "state-spaces/mamba-370m": original_repository(tmp_path, config),
        "EleutherAI/gpt-neox-20b": {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(settings).encode(),
        },
    }
    with HubServer(repositories) as server:
        yield server


def run(code, home, url, *options):
    """Run code in a new process whose hub is at ``url`` and whose cache is empty at first."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= dict(options)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_quick_start(hub, tmp_path):
    home = tmp_path / "home"
    code = NO_TORCH + QUICK_START + REPORT
    done = run(code, home, hub.url, ("TQDM_POSITION", "-1"))  # a bar outside a terminal, too
    first = json.loads(done.stdout.splitlines()[-1])
    assert first["d_model"] == 16 and first["vocab"] % 8 != 0
    assert "pytorch_model.bin" in done.stderr  # the download shows its progress
    fetched = [request for request in hub.requests if request.endswith("pytorch_model.bin")]
    assert len(fetched) == 2, fetched  # HEAD and GET

    # once more without a network: everything is in the cache
    before = len(hub.requests)
    again = run(code, home, "http://127.0.0.1:9", ("HF_HUB_OFFLINE", "1"))
    assert json.loads(again.stdout.splitlines()[-1]) == first
    assert len(hub.requests) == before


def test_the_readme_has_this_quick_start():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    assert QUICK_START in readme.read_text(encoding="utf-8")
