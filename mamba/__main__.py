"""Text from the command line: ``python -m mamba "def main("``."""

import argparse
import os
import sys
import time

import jax

from mamba.generate import stream
from mamba.model import Mamba
from mamba.pretrained import EMBEDDED, load_tokenizer
from mamba.sampling import check_sampling

DESCRIPTION = "Continue a text with a Mamba language model."
EXAMPLES = """\
examples:
  %(prog)s "def main("                                  with the small model that ships inside
  %(prog)s --temperature 0 "import "                    always the likeliest token
  %(prog)s --model state-spaces/mamba-130m "Mamba is"   a model from the Hugging Face Hub
  %(prog)s --model ./my-folder --top-p 0.9 < start.txt  a local folder, the prompt from a file
"""
END_OF_TEXT = "<|endoftext|>"  # as both our tokenizer and GPT-NeoX's call it


def main(argv=None):
    """Run the command -> its exit code: 0, 1 after an error, 2 for wrong usage, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.top_k = args.top_k or None
    try:
        check_sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        parser.error(str(error))
    if args.n_tokens < 1:
        parser.error(f"--n-tokens must be at least 1, got {args.n_tokens}")
    if args.prompt is None and sys.stdin.isatty():
        parser.error("no prompt: give one as an argument, or pipe one in")
    try:
        _run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"{parser.prog}: error:", *str(error).split(), file=sys.stderr)
        return 1
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m mamba",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue; - or nothing: read standard input")
    add("--model", default=EMBEDDED, metavar="NAME", help="folder, or repository of the hub")
    add("--revision", metavar="REV", help="branch, tag or commit of the repository")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    add("--n-tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0: greedy (default: 1)")
    add("--top-k", type=int, default=40, metavar="K", help="0: no limit (default: 40)")
    add("--top-p", type=float, metavar="P", help="in (0, 1] (default: no limit)")
    add("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    return parser


def _run(args):
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt in (None, "-") else args.prompt
    tokenizer = load_tokenizer(args.model, revision=args.revision)
    model, params = Mamba.from_pretrained(args.model, revision=args.revision, dtype=args.dtype)
    pieces = stream(
        model,
        key=jax.random.key(args.seed),
        params=params,
        tokenizer=tokenizer,
        prompt=prompt,
        n_tokens_to_gen=args.n_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than the model
    start = time.perf_counter()
    print(prompt, end="", flush=True)
    times = []
    for piece in pieces:
        print(piece, end="", flush=True)
        times.append(time.perf_counter())
    print(flush=True)
    _report(start, times)


def _report(start, times):
    """Speed to stderr. The first two tokens compile (reading the prompt, then the step)."""
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        compiling = times[1] - start
        print(
            f"[{len(times)} tokens, {rate:.1f} tokens/s after {compiling:.1f} s to compile]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
