"""Regenerate tests/golden, which the default tests compare with, using PyTorch and transformers.

    pip install torch transformers && python scripts/make_goldens.py

logits/<form>/  a small random model in a published form, with tokens, logits and a greedy
                continuation by transformers in float32 (reference.safetensors); those of Mamba-2
                and Falcon-Mamba also go to mamba_book/data/logits, which a page of the book reads
bin/*.bin       files by torch.save, each beside its tensors as safetensors
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.helpers import reference_models  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
FOR_THE_BOOK = ROOT / "mamba_book" / "data" / "logits"


def make_logits(folder):
    for seed, form in enumerate(reference_models.SHAPES):
        model = reference_models.reference(form, seed)
        reference_models.save(model, form, folder / form)
        tokens = reference_models.random_tokens(model, 2, 19, seed)
        tensors = {
            "tokens": tokens.int(),
            "logits": reference_models.logits(model, tokens),
            "greedy": reference_models.greedy(model, tokens, 12).int(),
        }
        save_file(tensors, folder / form / "reference.safetensors")


def make_bins(folder):
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    kinds = {
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "float32": base,
        "float16": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 3, 2).bfloat16(),
        "int64": torch.tensor([-(2**40), 7]),
        "int32": torch.tensor([[1, -2]], dtype=torch.int32),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "one by one": torch.randn(1, 1, 4).bfloat16()[:, :, 1:2],
    }
    views = {
        "whole": base,
        "transposed": base.t(),
        "every other": base[1:, ::2],
        "column": base[:, 3],
        "bfloat16 permuted": torch.randn(2, 3, 4).bfloat16().permute(2, 0, 1),
    }
    marked = torch.nn.Parameter(torch.randn(3))
    marked._no_weight_decay = True  # as the original Mamba marks A_log and D
    parameters = {"plain": torch.nn.Parameter(torch.randn(2, 2)), "marked": marked}
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Conv1d(2, 2, 3, groups=2))
    files = {
        "dtypes": (kinds, {}),
        "views": (views, {}),
        "parameters": (parameters, {}),
        "module": (module.bfloat16().state_dict(), {}),
        "protocol4": (views, {"pickle_protocol": 4}),
        "legacy": (views, {"_use_new_zipfile_serialization": False}),
    }
    for name, (tensors, options) in files.items():
        torch.save(tensors, folder / f"{name}.bin", **options)
        copies = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        if name != "legacy":
            save_file(copies, folder / f"{name}.safetensors")


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    make_logits(GOLDEN / "logits")
    make_bins(GOLDEN / "bin")
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes them for the owner alone
    shutil.rmtree(FOR_THE_BOOK, ignore_errors=True)
    for form in reference_models.SHAPES:
        if "mamba2" in form or "falcon" in form:
            shutil.copytree(GOLDEN / "logits" / form, FOR_THE_BOOK / form)
    print(f"{GOLDEN}: {sum(path.stat().st_size for path in files) / 1000:.0f} kB")
