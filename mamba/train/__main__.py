"""Train a small Mamba from the command line: ``python -m mamba.train selective-copying``."""

import argparse
import dataclasses
import hashlib
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax

from mamba import __version__
from mamba.model import Mamba
from mamba.train.ablation import SELECTIVE
from mamba.train.corpus import bits_per_byte, encode, read_texts, text_batches, train_tokenizer
from mamba.train.experiment import BLOCKS, evaluate_at, run
from mamba.train.loop import train
from mamba.train.presets import PRESETS
from mamba.train.results import write_results

LANGUAGE_MODEL = "language-model"
HELD_OUT_PART = 20  # of each text, the last 1/20 is held out
EXAMPLES = """\
examples:
  %(prog)s selective-copying                                   a quarter of an hour, two cores
  %(prog)s selective-copying --selective none                  the same block, time-invariant
  %(prog)s selective-copying --block mamba2 --head-dim 16      with the block of Mamba-2
  %(prog)s induction-heads --lengths 1024,16384,1048576        evaluated at longer lengths, too
  %(prog)s induction-heads --steps 3000 --carry --weight-decay 0
  %(prog)s induction-heads --preset paper --out runs/induction --results induction.json
  %(prog)s induction-heads --preset paper --out runs/induction --resume
  %(prog)s parity --preset minute                              can a block count modulo 2?
  %(prog)s parity --block mamba2                               (mamba2 cannot)
  %(prog)s language-model --text notes/ --out my-model
  python -m mamba --model my-model "Dear "                     what that model writes
"""


def main(argv=None):
    """Run the command -> its exit code: 0, 1 after an error, 2 for wrong usage, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        preset, selective = _preset(args), _selective(args)
        _check(args, preset, selective)
    except ValueError as error:
        parser.error(str(error))
    try:
        if args.task == LANGUAGE_MODEL:
            outcome = _train_language_model(args, preset)
        else:
            outcome = _train_synthetic(args, preset, selective)
        if args.results:
            trained, settings, results = outcome
            settings = settings | {"seed": args.seed, "preset": args.preset}
            write_results(args.results, trained, settings, results)
    except KeyboardInterrupt:
        saved = f"; saved in {args.out}, --resume continues" if args.out else ""
        print(f"\nstopped{saved}", file=sys.stderr)
        return 130
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


# --- training -----------------------------------------------------------------------------------


def _train_synthetic(args, preset, selective):
    """Train on a task, then evaluate at each length -> Trained, settings, results."""
    dtype = _dtype(args)
    model, trained = run(
        preset, selective=selective, seed=args.seed, dtype=dtype, **_train_options(args)
    )
    by_length = []
    for length in sorted({preset.length, *preset.lengths}):
        start = time.time()
        loss, accuracy, n = evaluate_at(preset, model, trained.params, length)
        by_length.append(
            {"length": length, "sequences": n, "loss": round(loss, 5), "accuracy": accuracy}
        )
        print(
            f"length {length:>8}: accuracy {accuracy:.2%} on {n} sequences, "
            f"{time.time() - start:.1f} s",
            flush=True,
        )
    return trained, preset.settings(model.config), {"by_length": by_length}


def _train_language_model(args, preset):
    """Train on text, and save the model -> Trained, settings, results."""
    texts = read_texts(args.text)
    train_texts, held_out_texts = _split(texts.values())
    if not args.quiet:
        characters = sum(map(len, train_texts))
        print(f"read {len(texts)} files of {characters:,} characters", file=sys.stderr)
    tokenizer = train_tokenizer(train_texts, preset.sizes["vocab_size"])
    config = preset.config(dtype=_dtype(args))
    model = Mamba(dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size()))
    settings = preset.settings(model.config)
    settings["sha256"] = hashlib.sha256("".join(train_texts).encode()).hexdigest()
    trained = train(
        model,
        text_batches(encode(tokenizer, train_texts), preset.batch, preset.length, seed=args.seed),
        preset.optimizer(),
        preset.steps,
        seed=args.seed,
        carry=preset.carry,
        settings=settings,
        **_train_options(args),
    )
    model.save_pretrained(trained.params, args.out)
    tokenizer.save(str(Path(args.out) / "tokenizer.json"))
    bits = bits_per_byte(model, trained.params, tokenizer, held_out_texts)
    print(f"{bits:.3f} bits per byte of the held-out text. To try the model:")
    print(f'python -m mamba --model {args.out} "..."')
    return trained, settings, {"bits_per_byte": round(bits, 4)}


def _split(texts):
    """The last part of each text is held out -> the training texts, the held-out texts."""
    train_texts, held_out_texts = [], []
    for text in texts:
        end = len(text) - len(text) // HELD_OUT_PART
        train_texts.append(text[:end])
        if text[end:]:
            held_out_texts.append(text[end:])
    if not held_out_texts:
        raise ValueError(
            "the text is too short: the last twentieth of each file is held out; add text"
        )
    return train_texts, held_out_texts


def _train_options(args):
    """The options of ``train`` that are flags."""
    return {
        "folder": args.out,
        "save_every": args.save_every,
        "resume": args.resume,
        "progress": not args.quiet,
    }


def _dtype(args):
    return "bfloat16" if args.bfloat16 else "float32"


# --- arguments ----------------------------------------------------------------------------------


def _preset(args):
    """The preset, changed as the flags say. Raises ValueError for one that does not exist."""
    presets = PRESETS[args.task]
    if args.preset not in presets:
        raise ValueError(f"{args.task} has no preset {args.preset}, but {', '.join(presets)}")
    preset = presets[args.preset]
    fields = ("block", "length", "steps", "batch", "learning_rate", "weight_decay", "carry")
    changes = {
        name: getattr(args, name)
        for name in (*fields, "lengths")
        if getattr(args, name) is not None
    }
    block, model = args.block or preset.block, dict(preset.model)
    if args.dt_init:
        model["dt_min"], model["dt_max"] = args.dt_init
    if args.d_state is not None:
        model["d_state"] = args.d_state
    if args.head_dim is not None:
        if block not in ("mamba2", "mamba3"):
            raise ValueError("--head-dim is for mamba2 and mamba3: Mamba's block has no heads")
        model["head_dim"] = args.head_dim
    if args.rope_fraction is not None:
        if block != "mamba3":
            raise ValueError("--rope-fraction is for --block mamba3: no other block turns states")
        model["rope_fraction"] = args.rope_fraction or None
    return dataclasses.replace(preset, model=model, **changes)


def _selective(args):
    """The names that --selective gives."""
    return () if args.selective == "none" else tuple(args.selective.split(","))


def _check(args, preset, selective):
    """Raise ValueError for arguments that would make the run fail, before it begins."""
    for name in ("steps", "batch", "length"):
        if getattr(preset, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(preset, name)}")
    if args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {args.save_every}")
    if args.task == LANGUAGE_MODEL and set(selective) != set(SELECTIVE):
        raise ValueError("--selective is for the synthetic tasks: a saved model has all three")
    preset.config(selective)
    preset.optimizer()
    if args.task != LANGUAGE_MODEL:
        for length in (preset.length, *preset.lengths):
            draw = partial(preset.draw, batch=preset.batch, length=length)
            jax.eval_shape(draw, jax.random.key(0))
    if args.out and not _can_write_folder(Path(args.out)):
        raise ValueError(f"--out {args.out}: cannot write there")
    if args.results and not _can_write_file(Path(args.results)):
        raise ValueError(f"--results {args.results}: cannot write there")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the folder of the run to continue")
    if args.task == LANGUAGE_MODEL and not (args.text and args.out):
        raise ValueError("language-model needs --text, what to read, and --out, where to save")
    if args.task != LANGUAGE_MODEL and args.text:
        raise ValueError(f"--text is for language-model: {args.task} makes its own data")


def _can_write_folder(path):
    return (path.is_dir() or not path.exists()) and _can_create(path)


def _can_write_file(path):
    return not path.is_dir() and _can_create(path)


def _can_create(path):
    """Whether the file or folder can be written, or be made where it does not exist yet."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return os.access(existing, os.W_OK) and (existing == path or existing.is_dir())


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m mamba.train",
        description="Train a small Mamba on a synthetic task, or on text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"jax-mamba {__version__}")
    add("task", choices=PRESETS, metavar="TASK", help=f"one of {', '.join(PRESETS)}")
    add(
        "--preset",
        default="laptop",
        choices=["minute", "laptop", "paper"],
        help="size of the run (default: laptop); not every task has all three",
    )
    add(
        "--selective",
        default=",".join(SELECTIVE),
        metavar="NAMES",
        help="which of delta,B,C depend on the input, or none (default: all three)",
    )
    add("--block", choices=BLOCKS, help="of which generation (default: the preset's)")
    add("--head-dim", type=int, metavar="N", help="channels of a head, for mamba2 and mamba3")
    add("--rope-fraction", type=float, metavar="R", help="share of states that turn, for mamba3")
    add("--d-state", type=int, metavar="N", help="states of a channel (default: the block's)")
    add(
        "--dt-init",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of the initial time steps (default: 0.001 0.1); 0.693 0.693 is a bias of 0",
    )
    add("--seed", type=int, default=0, metavar="N", help="of parameters and data (default: 0)")
    add("--steps", type=int, metavar="N", help="number of steps (default: the preset's)")
    add("--batch", type=int, metavar="N", help="sequences in a step (default: the preset's)")
    add("--length", type=int, metavar="N", help="of training sequences (default: the preset's)")
    add("--learning-rate", type=float, metavar="R", help="the highest (default: the preset's)")
    add("--weight-decay", type=float, metavar="R", help="per unit of learning rate")
    add(
        "--carry",
        action="store_const",
        const=True,
        help="start each training sequence from the state after the one before",
    )
    add("--lengths", type=_lengths, metavar="N,N,…", help="other lengths to evaluate at")
    add("--bfloat16", action="store_true", help="compute matrix products in bfloat16")
    add("--text", nargs="+", metavar="PATH", help="files and folders for language-model to read")
    add("--out", metavar="FOLDER", help="save the run in this folder")
    add("--save-every", type=int, default=500, metavar="N", help="in steps (default: 500)")
    add("--resume", action="store_true", help="continue from the save in --out, if there is one")
    add("--results", metavar="FILE", help="write curves, accuracy and settings as JSON")
    add("--quiet", action="store_true", help="show no progress bar")
    return parser


def _lengths(text):
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
