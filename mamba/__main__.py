"""Text from the command line: ``python -m mamba "def main("``."""

import argparse
import dataclasses
import os
import sys
import time
import unicodedata
from pathlib import Path

import jax

import mamba
from mamba.checkpoint.hub import EMBEDDED, load_tokenizer
from mamba.interrupts import Terminated, defer_interrupt
from mamba.model import Mamba
from mamba.text.generate import stream
from mamba.text.prompt import read_prompt
from mamba.text.sampling import Sampling
from mamba.text.state import load_state, save_state

DESCRIPTION = "Continue a text with a Mamba language model."
EXAMPLES = """\
examples:
  %(prog)s "def main("                                  with the small model that ships inside
  %(prog)s --temperature 0 "import "                    always the likeliest token
  %(prog)s --model state-spaces/mamba-130m "Mamba is"   a model from the Hugging Face Hub
  %(prog)s --model ./my-folder --top-p 0.9 < start.txt  a local folder, the prompt from a file
a long text, read once and continued twice:
  %(prog)s -n 0 --save-state text.safetensors < long.txt
  %(prog)s --state text.safetensors "To sum up,"
  %(prog)s --state text.safetensors --seed 1 --stop . "In one sentence:"
"""
DTYPES = ["float32", "bfloat16", "float16"]  # those that from_pretrained takes
# The end tokens of our tokenizer and of GPT-NeoX's, and of Llama 3's.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


def main(argv=None):
    """Run the command -> its exit code.

    0; 1 after an error; 2 for wrong usage; 130 for Ctrl-C, 143 for SIGTERM; 141 where the
    reader of a pipe is gone.
    """
    parser = _parser()
    if not hasattr(mamba, "Mamba"):
        parser.error(
            f"{mamba.__file__} is another package's, a test tool that is called mamba, too: run "
            "pip uninstall mamba, then install jax-mamba again"
        )
    args = parser.parse_args(argv)
    try:
        sampling = Sampling(
            temperature=args.temperature,
            top_k=args.top_k or None,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.n_tokens < (0 if args.save_state else 1):
        parser.error(f"--n-tokens must be at least 1 (or 0 with --save-state), got {args.n_tokens}")
    for path in filter(None, (args.state, args.save_state)):
        if not path.endswith(".safetensors"):
            parser.error(f"a state is kept in a file named *.safetensors, not {path}")
    if args.save_state and not Path(args.save_state).absolute().parent.is_dir():
        parser.error(f"--save-state {args.save_state}: there is no such folder")
    if args.revision is not None and args.model == EMBEDDED:
        parser.error("--revision is of a repository: give one by --model")
    if "" in args.stop:
        parser.error("--stop must not be empty")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in [0, 2^32), got {args.seed}")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None: a shell has closed it
    if args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        if not args.state:
            parser.error("no prompt: give one as an argument, or pipe one in")
        args.prompt = ""
    try:
        _run(args, sampling)
    except KeyboardInterrupt as interrupt:
        print(file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())  # names of files in it may be a stranger's
        print(f"{parser.prog}: error:", _escape(message), file=sys.stderr)
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
    version = f"jax-mamba {getattr(mamba, '__version__', '?')}"
    add("--version", action="version", version=version)
    add(
        "prompt",
        nargs="?",
        help="the text to continue; if missing or -, read from standard input (without the line "
        "break at its end)",
    )
    add("--model", default=EMBEDDED, metavar="NAME", help="local folder, or repository of the hub")
    add("--revision", metavar="REV", help="branch, tag or commit of the repository")
    add("--dtype", default="float32", choices=DTYPES, help="number format of the weights")
    add("-n", "--n-tokens", type=int, default=128, metavar="N", help="at most N tokens (128)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    add("--top-k", type=int, default=40, metavar="K", help="only the K likeliest (40); 0 for all")
    add("--top-p", type=float, metavar="P", help="only the likeliest that reach probability P")
    add("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    add("--state", metavar="FILE", help="continue the text whose state is in FILE")
    add("--save-state", metavar="FILE", help="save the state after the prompt, for --state")
    return parser


def _read_prompt(args):
    """The text to continue. Raises ValueError if it is not UTF-8."""
    where = "the prompt"
    try:
        text = args.prompt
        if text in (None, "-"):
            where = "standard input"
            text = sys.stdin.read().removesuffix("\n")
        text.encode()  # Python lets bytes that are not characters through, as surrogates
    except UnicodeError as error:
        raise ValueError(f"{where} is not UTF-8 text") from error
    return text


def _run(args, sampling):
    """Load, read and write, as the arguments say."""
    prompt = _read_prompt(args)
    tokenizer = load_tokenizer(args.model, revision=args.revision)
    model, params = Mamba.from_pretrained(args.model, revision=args.revision, dtype=args.dtype)
    source = {"params": params, "tokenizer": tokenizer, "prompt": prompt, "state": None}
    if args.state:
        source["state"] = load_state(args.state, model)
    if args.save_state:
        source["state"] = read_prompt(model, **source)
        save_state(source["state"], args.save_state)
        source["prompt"] = ""  # the state includes it now
        if args.n_tokens == 0:
            return
    ends = [id for id in map(tokenizer.token_to_id, ENDS_OF_TEXT) if id is not None]
    texts = stream(
        model,
        **source,
        **dataclasses.asdict(sampling),
        key=jax.random.key(args.seed),
        n_tokens_to_gen=args.n_tokens,
        eos_token_id=ends,
        stop=args.stop,
    )
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model writes
    shown = _escape if sys.stdout.isatty() else str
    start = time.perf_counter()
    print(shown(prompt), end="", flush=True)
    times = []
    with defer_interrupt() as interrupts:
        for text in texts:
            if interrupts:
                raise interrupts[0]
            print(shown(text), end="", flush=True)
            times.append(time.perf_counter())
    print(flush=True)
    _report_speed(start, times)


def _escape(text):
    """The text with its control characters visible: raw, they would command the terminal."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _report_speed(start, times):
    """Print the speed to stderr, without the first two tokens: these compile, the others do not."""
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        compiling = times[1] - start
        print(
            f"[{len(times)} tokens, {rate:.1f} tokens/s after {compiling:.1f} s to compile]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
