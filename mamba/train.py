"""Train a small Mamba from the command line: ``python -m mamba.train selective-copying``."""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import jax

from mamba.block import MambaConfig
from mamba.corpus import bits_per_byte, encode, read_texts, text_batches, train_tokenizer
from mamba.experiments import PRESETS, evaluate_at, run
from mamba.loop import train
from mamba.machine import describe_run
from mamba.model import Mamba

LANGUAGE_MODEL = "language-model"
EXAMPLES = """\
examples:
  %(prog)s selective-copying                                   minutes on a laptop
  %(prog)s selective-copying --selective none                  the same block, blind to its input
  %(prog)s induction-heads --lengths 1024,16384,1048576        then far beyond the training length
  %(prog)s induction-heads --preset paper --out runs/induction --results induction.json
  %(prog)s induction-heads --preset paper --out runs/induction --resume
  %(prog)s language-model --text notes/ --out my-model
  python -m mamba --model my-model "Dear "                     and what it has learned
"""


def main(argv=None):
    """Run the command -> its exit code: 0, 1 after an error, 2 for wrong usage, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        preset, selective = _chosen(args)
        config = preset.config(selective, "bfloat16" if args.bfloat16 else "float32")
        preset.optimizer()
        if args.task != LANGUAGE_MODEL:
            for length in (preset.length, *preset.lengths):
                draw = partial(preset.draw, batch=preset.batch, length=length)
                jax.eval_shape(draw, jax.random.key(0))
    except ValueError as error:
        parser.error(str(error))
    for flag, path in (("--out", args.out), ("--results", args.results)):
        if path and not _can_be_written(Path(path), folder=flag == "--out"):
            parser.error(f"{flag} {path}: nothing can be written there")
    if args.resume and not args.out:
        parser.error("--resume needs --out: the folder of the run to go on with")
    if args.task == LANGUAGE_MODEL and not (args.text and args.out):
        parser.error("language-model needs --text, what to read, and --out, where the model goes")
    if args.task != LANGUAGE_MODEL and args.text:
        parser.error(f"--text is for language-model: {args.task} makes its own data")
    options = {
        "folder": args.out,
        "save_every": args.save_every,
        "resume": args.resume,
        "progress": not args.quiet,
    }
    try:
        job = _language_model if args.task == LANGUAGE_MODEL else _synthetic
        _report(args, job(args, preset, config, options))
    except KeyboardInterrupt:
        saved = f"; saved in {args.out}, --resume goes on" if args.out else ""
        print(f"\nstopped{saved}", file=sys.stderr)
        return 130
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def _can_be_written(path, folder):
    """Asked before the training: afterwards it would be too late."""
    if path.exists() and path.is_dir() != folder:
        return False
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    return os.access(above, os.W_OK) and (above == path or above.is_dir())


def _synthetic(args, preset, config, options):
    model, trained = run(
        preset,
        selective=config.selective,
        seed=args.seed,
        dtype=config.dtype,
        **options,
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
    return preset.settings(config), trained, {"by_length": by_length}


def _language_model(args, preset, config, options):
    texts = read_texts(args.text)
    cut = {name: len(text) - len(text) // 20 for name, text in texts.items()}
    read = [text[: cut[name]] for name, text in texts.items()]
    kept = [text[cut[name] :] for name, text in texts.items() if text[cut[name] :]]
    if not kept:
        raise ValueError(
            "the text is too short: of each file, the last twentieth is held out; add text"
        )
    if not args.quiet:
        print(f"read {len(texts)} files of {sum(map(len, read)):,} characters", file=sys.stderr)
    tokenizer = train_tokenizer(read, preset.sizes["vocab_size"])
    model = Mamba(dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size()))
    settings = preset.settings(model.config)
    settings["sha256"] = hashlib.sha256("".join(read).encode()).hexdigest()
    trained = train(
        model,
        text_batches(encode(tokenizer, read), preset.batch, preset.length, seed=args.seed),
        preset.optimizer(),
        preset.steps,
        seed=args.seed,
        carry=True,
        settings=settings,
        **options,
    )
    model.save_pretrained(trained.params, args.out)
    tokenizer.save(str(Path(args.out) / "tokenizer.json"))
    bits = bits_per_byte(model, trained.params, tokenizer, kept)
    print(f"{bits:.3f} bits per byte of the text held out. To try it:")
    print(f'python -m mamba --model {args.out} "..."')
    return settings, trained, {"bits_per_byte": round(bits, 4)}


def _report(args, outcome):
    settings, trained, result = outcome
    if not args.results:
        return
    curve, steps = trained.curve, len(trained.curve)
    stretch = max(1, steps // 400)
    points = [
        [end, *(round(float(v), 5) for v in curve[end - stretch : end].mean(axis=0))]
        for end in range(stretch, steps + 1, stretch)
    ]
    held_out = [[int(s), round(float(l), 5), round(float(a), 5)] for s, l, a in trained.held_out]
    data = {
        "run": describe_run()
        | {"devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}"},
        "settings": settings | {"seed": args.seed, "preset": args.preset},
        "seconds": round(trained.seconds, 1),
        **result,
        "held_out": held_out,  # step, loss, accuracy
        "curve": points,  # step, loss, accuracy: means over the steps since the last point
    }
    path = Path(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text)  # a row a line
    path.write_text(text + "\n", encoding="utf-8")


def _chosen(args):
    """-> the preset with the flags' changes, and the names that --selective gives."""
    if args.preset not in (presets := PRESETS[args.task]):
        raise ValueError(f"{args.task} has no preset {args.preset}, but {', '.join(presets)}")
    preset = presets[args.preset]
    flags = ("length", "steps", "batch", "learning_rate", "lengths")
    changes = {name: value for name in flags if (value := getattr(args, name)) is not None}
    if args.dt_init:
        low, high = args.dt_init
        changes["model"] = {**preset.model, "dt_min": low, "dt_max": high}
    preset = dataclasses.replace(preset, **changes)
    for name in ("steps", "batch", "length"):
        if getattr(preset, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(preset, name)}")
    if args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {args.save_every}")
    names = () if args.selective == "none" else tuple(args.selective.split(","))
    if args.task == LANGUAGE_MODEL and set(names) != set(MambaConfig.selective):
        raise ValueError("--selective is for the synthetic tasks: a language model is saved whole")
    return preset, names


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m mamba.train",
        description="Train a small Mamba on a synthetic task, or on text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", choices=PRESETS, metavar="TASK", help=", ".join(PRESETS))
    add(
        "--preset",
        default="laptop",
        choices=["minute", "laptop", "paper"],
        help="(default: laptop)",
    )
    add(
        "--selective",
        default="delta,B,C",
        metavar="NAMES",
        help="which of delta,B,C look at the input, or none (default: all three)",
    )
    add(
        "--dt-init",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of the time steps at the start (default: 0.001 0.1); a bias of 0 is 0.693 0.693",
    )
    add("--seed", type=int, default=0, help="of parameters and training data (default: 0)")
    add("--steps", type=int, metavar="N", help="instead of the preset's")
    add("--batch", type=int, metavar="N", help="sequences a step, instead of the preset's")
    add("--length", type=int, metavar="N", help="of a training sequence, instead of the preset's")
    add("--learning-rate", type=float, metavar="R", help="the highest, instead of the preset's")
    add("--lengths", type=_lengths, metavar="N,N,…", help="where to evaluate at the end")
    add("--bfloat16", action="store_true", help="matrix products in bfloat16")
    add("--text", nargs="+", metavar="PATH", help="files and folders that language-model reads")
    add("--out", metavar="FOLDER", help="save the run there")
    add("--save-every", type=int, default=500, metavar="N", help="steps (default: 500)")
    add("--resume", action="store_true", help="go on from the save in --out, if there is one")
    add("--results", metavar="FILE", help="write curves, accuracy and settings as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _lengths(text):
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
