"""Small random models of transformers (PyTorch), and how to write them in published forms.

They need PyTorch. scripts/make_goldens.py and tests/test_parity.py use them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

# The form of the folder -> the model, in the keys of transformers' configuration. Between them they
# give every size, switch and naming a value other than its default. "true_vocab" is the unpadded
# size.
SHAPES = {
    "transformers": dict(hidden_size=32, num_hidden_layers=2, state_size=16, vocab_size=64),
    "transformers-untied": dict(
        hidden_size=24,
        num_hidden_layers=2,
        state_size=5,
        conv_kernel=3,
        expand=3,
        time_step_rank=4,
        use_bias=True,
        use_conv_bias=False,
        layer_norm_epsilon=0.02,
        tie_word_embeddings=False,
        vocab_size=51,
    ),
    "transformers-sharded": dict(
        hidden_size=40, num_hidden_layers=3, state_size=8, expand=1, vocab_size=48
    ),
    "original-bin": dict(
        hidden_size=20,
        num_hidden_layers=3,
        state_size=1,
        conv_kernel=2,
        vocab_size=56,
        true_vocab=53,
    ),
    "original-safetensors": dict(
        hidden_size=16,
        num_hidden_layers=2,
        state_size=3,
        expand=3,
        time_step_rank=5,
        use_bias=True,
        tie_word_embeddings=False,
        vocab_size=40,
    ),
    "transformers-falcon": dict(
        hidden_size=24, num_hidden_layers=2, state_size=4, vocab_size=50, mixer_rms_eps=1e-3
    ),
    "transformers-falcon-7b": dict(  # as the 7B says it: the width wins over expand, untied head
        hidden_size=16,
        num_hidden_layers=2,
        expand=16,
        intermediate_size=32,
        tie_word_embeddings=False,
        vocab_size=40,
    ),
    "transformers-mamba2": dict(
        hidden_size=24,
        num_hidden_layers=2,
        state_size=6,
        head_dim=8,
        num_heads=6,
        n_groups=3,
        tie_word_embeddings=True,
        time_step_limit=(0.02, 0.3),
        chunk_size=16,
        vocab_size=50,
    ),
    "transformers-mamba2-codestral": dict(
        hidden_size=32,
        num_hidden_layers=2,
        state_size=5,
        head_dim=4,
        num_heads=16,
        n_groups=8,
        use_bias=True,
        use_conv_bias=False,
        conv_kernel=3,
        layer_norm_epsilon=0.02,
        chunk_size=16,
        vocab_size=40,
    ),
    "original-mamba2-bin": dict(
        hidden_size=20,
        num_hidden_layers=3,
        state_size=8,
        head_dim=10,
        num_heads=4,
        n_groups=1,
        tie_word_embeddings=True,
        chunk_size=16,
        vocab_size=64,
        true_vocab=53,
    ),
    "original-mamba2-safetensors": dict(
        hidden_size=16,
        num_hidden_layers=2,
        state_size=3,
        expand=3,
        head_dim=6,
        num_heads=8,
        n_groups=2,
        tie_word_embeddings=False,
        chunk_size=16,
        vocab_size=48,
    ),
}


def _classes(form):
    if "mamba2" in form:
        return Mamba2Config, Mamba2ForCausalLM
    if "falcon" in form:
        return FalconMambaConfig, FalconMambaForCausalLM
    return MambaConfig, MambaForCausalLM


def reference(form, seed):
    """A float32 model of the named shape whose every tensor is random."""
    shape = {key: value for key, value in SHAPES[form].items() if key != "true_vocab"}
    config_class, model_class = _classes(form)
    config = config_class(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.log(torch.empty_like(p).uniform_(0.2, 16)))
            elif name.endswith(("dt_proj.bias", "dt_bias")):
                p.uniform_(-6, 0)  # Δ between 0.0025 and 0.7
            elif name.endswith(("D", "norm.weight", "norm_f.weight")):
                p.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                p.uniform_(-0.5, 0.5)
            elif "embeddings" in name:
                p.normal_(0, 0.1)  # small: else a tied head mostly repeats its input
            else:  # matrices: keep the size of what passes through
                p.normal_(0, p[0].numel() ** -0.5)
    return model


def save(model, form, folder):
    """Write the model to a new folder in the named form."""
    folder = Path(folder)
    if form.startswith("transformers"):
        shards = {"max_shard_size": "20KB"} if form.endswith("sharded") else {}
        model.save_pretrained(folder, **shards)
        (folder / "generation_config.json").unlink(missing_ok=True)
        return
    c, mamba2 = model.config, "mamba2" in form
    ssm_cfg = {
        "d_state": c.state_size,
        "d_conv": c.conv_kernel,
        "expand": c.expand,
    }
    if mamba2:
        ssm_cfg |= {"layer": "Mamba2", "headdim": c.head_dim, "ngroups": c.n_groups}
    else:
        ssm_cfg["dt_rank"] = c.time_step_rank
    ssm_cfg |= {"conv_bias": c.use_conv_bias, "bias": c.use_bias}
    config = {
        "d_model": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "vocab_size": SHAPES[form].get("true_vocab", c.vocab_size),
        "ssm_cfg": ssm_cfg,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16 if mamba2 else 8,
    }
    if not c.tie_word_embeddings:
        config["tie_embeddings"] = False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name.replace("backbone.embeddings", "backbone.embedding"): tensor
        for name, tensor in model.state_dict().items()
    }
    assert "lm_head.weight" in tensors  # the original files repeat a tied head
    if form.endswith("bin"):
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(copies, folder / "model.safetensors")


def random_tokens(model, batch, length, seed):
    """Random token ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def logits(model, tokens):
    """Logits of a full forward pass, (b, l, vocab)."""
    return model(tokens, use_cache=False).logits.float()


@torch.no_grad()
def greedy(model, tokens, n, vocab_size=None):
    """n further tokens below vocab_size, by transformers' own generate with its cache, (b, n).

    Its decoding step of Mamba-2 ignores time_step_limit, so a model that has one runs without.
    """
    limits = getattr(model.config, "time_step_limit", None) or (0.0, float("inf"))
    padding = list(range(vocab_size or model.config.vocab_size, model.config.vocab_size))
    every = torch.ones_like(tokens)  # no padding: left to itself, it takes token 0 for that
    out = model.generate(
        tokens,
        attention_mask=every,
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=padding or None,
        use_cache=tuple(limits) == (0.0, float("inf")),
    )
    return out[:, tokens.shape[1] :]
