"""Record PyTorch's logits for the checkpoint that ships with us, which chapter 6 compares with.

    pip install torch transformers && python scripts/make_reference.py

Loads mamba/weights/pystdlib into transformers' MambaForCausalLM, in float32. Writes its logits for
a few lines of Python, and its greedy continuation of a prompt, to
mamba_book/data/reference.safetensors.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "mamba" / "weights" / "pystdlib"
TARGET = ROOT / "mamba_book" / "data" / "reference.safetensors"
TEXT = "class Stack:\n    def __init__(self, items=()):\n        self.items = list(items)\n"
PROMPT = "def __init__(self"
N_NEW = 40


def reference_model():
    """The checkpoint under transformers' names for its sizes and tensors."""
    ours = json.loads((WEIGHTS / "config.json").read_text())
    tensors = {name: t.float() for name, t in load_file(WEIGHTS / "model.safetensors").items()}
    tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
    config = transformers.MambaConfig(
        hidden_size=ours["d_model"],
        num_hidden_layers=ours["n_layer"],
        state_size=ours["ssm_cfg"]["d_state"],
        vocab_size=len(tensors["backbone.embeddings.weight"]),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.MambaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


@torch.no_grad()
def main():
    model, tokenizer = reference_model(), Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    tokens = torch.tensor([tokenizer.encode(TEXT).ids])  # (1, l)
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])  # (1, l)
    greedy = prompt
    for _ in range(N_NEW):  # reads the whole sequence again for every token, without a state
        following = model(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        greedy = torch.cat([greedy, following], dim=1)
    tensors = {
        "tokens": tokens.int(),
        "logits": model(tokens, use_cache=False).logits,
        "prompt": prompt.int(),
        "greedy": greedy[:, prompt.shape[1] :].int(),
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        TARGET,
        metadata={"transformers": transformers.__version__, "torch": torch.__version__},
    )
    print(f"wrote {TARGET}: {tuple(tensors['logits'].shape)} logits")


if __name__ == "__main__":
    main()
