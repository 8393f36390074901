"""Train a small Mamba from the command line: ``python -m mamba.train selective-copying``."""

import dataclasses
import hashlib
import sys
import time
from pathlib import Path

import jax

from mamba.interrupts import Terminated
from mamba.model import Mamba
from mamba.train.arguments import read_arguments
from mamba.train.corpus import bits_per_byte, encode, read_texts, text_batches, train_tokenizer
from mamba.train.experiment import evaluate_at, run
from mamba.train.flags import LANGUAGE_MODEL, PROG
from mamba.train.loop import train
from mamba.train.results import write_results

HELD_OUT_PART = 20  # of each text, the last 1/20 is held out


def main(argv=None):
    """Run the command -> its exit code.

    0; 1 after an error; 2 for wrong usage; 130 for Ctrl-C, 143 for SIGTERM.
    """
    args, preset, selective = read_arguments(argv)
    try:
        if args.task == LANGUAGE_MODEL:
            outcome = _train_language_model(args, preset)
        else:
            outcome = _train_synthetic(args, preset, selective)
        if args.results and jax.process_index() == 0:
            trained, settings, results = outcome
            settings = settings | {"seed": args.seed, "preset": args.preset}
            write_results(args.results, trained, settings, results)
    except KeyboardInterrupt as interrupt:
        saved = f"; saved in {args.out}, --resume continues" if args.out else ""
        print(f"\nstopped{saved}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
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
        _say(
            f"length {length:>8}: accuracy {accuracy:.2%} on {n} sequences, "
            f"{time.time() - start:.1f} s"
        )
    return trained, preset.settings(model.config), {"by_length": by_length}


def _train_language_model(args, preset):
    """Train on text, and save the model -> Trained, settings, results."""
    texts = read_texts(args.text)
    train_texts, held_out_texts = _split(texts.values())
    if not args.quiet and jax.process_index() == 0:
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
    if jax.process_index() == 0:
        model.save_pretrained(trained.params, args.out)
        tokenizer.save(str(Path(args.out) / "tokenizer.json"))
    bits = bits_per_byte(model, trained.params, tokenizer, held_out_texts)
    _say(f"{bits:.3f} bits per byte of the held-out text. To try the model:")
    _say(f'python -m mamba --model {args.out} "..."')
    return trained, settings, {"bits_per_byte": round(bits, 4)}


def _say(line):
    """Print a result, once for all processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


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
        "mesh": args.mesh,
        "accumulate": args.accumulate,
        "remat": args.remat,
    }


def _dtype(args):
    return "bfloat16" if args.bfloat16 else "float32"


if __name__ == "__main__":
    sys.exit(main())
