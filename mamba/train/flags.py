"""The flags of ``python -m mamba.train``: one parser for each task."""

import argparse

from mamba import __version__
from mamba.parallel import AXES
from mamba.train.ablation import SELECTIVE
from mamba.train.experiment import BLOCKS, TASKS
from mamba.train.presets import PRESETS

__all__ = ["LANGUAGE_MODEL", "PROG", "make_parser"]

PROG = "python -m mamba.train"
LANGUAGE_MODEL = "language-model"
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
the options of a task: %(prog)s TASK --help
"""


def make_parser():
    """-> argparse.ArgumentParser, whose ``--help`` after a task shows that task's flags."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Train a small Mamba on a synthetic task, or on text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jax-mamba {__version__}")
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task, presets in PRESETS.items():
        about = "Predict the next token of a text of yours."
        if task != LANGUAGE_MODEL:
            about = TASKS[task].__doc__.splitlines()[0]
        one = tasks.add_parser(
            task,
            help=about,
            description=f"{about}\n\n{_describe(presets)}",
            epilog=_examples_of(task),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_run(one, presets)
        _add_model(one)
        if task == LANGUAGE_MODEL:
            one.set_defaults(selective=",".join(SELECTIVE), lengths=None)
            text = one.add_argument_group("the text")
            text.add_argument("--text", nargs="+", metavar="PATH", help="files and folders to read")
        else:
            one.set_defaults(text=None)
            _add_synthetic(one)
        _add_saves(one)
        _add_devices(one)
    return parser


def _describe(presets):
    """The presets, one a line."""
    lines = [
        f"  {name:8s}{p.steps:>8,} steps of {p.batch} sequences of length {p.length:,}"
        for name, p in presets.items()
    ]
    return "presets:\n" + "\n".join(lines)


def _examples_of(task):
    lines = [line for line in EXAMPLES.splitlines() if f"%(prog)s {task}" in line]
    if not lines:
        return None
    return "examples:\n" + "\n".join(lines).replace("%(prog)s", PROG)


def _add_run(parser, presets):
    add = parser.add_argument_group("the run").add_argument
    default = "laptop" if "laptop" in presets else next(iter(presets))
    add("--preset", default=default, choices=list(presets), help=f"its size (default: {default})")
    add("--seed", type=int, default=0, metavar="N", help="of parameters and data (default: 0)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="number of steps (default: the preset's); a run that is resumed may get more, and its "
        "learning rate goes on as that of the longer run",
    )
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


def _add_model(parser):
    add = parser.add_argument_group("the model").add_argument
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
    add("--bfloat16", action="store_true", help="compute matrix products in bfloat16")


def _add_synthetic(parser):
    add = parser.add_argument_group("the task").add_argument
    add(
        "--selective",
        default=",".join(SELECTIVE),
        metavar="NAMES",
        help="which of delta,B,C depend on the input, or none (default: all three)",
    )
    add("--lengths", type=_lengths, metavar="N,N,…", help="other lengths to evaluate at")


def _add_saves(parser):
    add = parser.add_argument_group("what is kept").add_argument
    add("--out", metavar="FOLDER", help="save the run in this folder")
    add("--save-every", type=int, default=500, metavar="N", help="in steps (default: 500)")
    add("--resume", action="store_true", help="continue from the save in --out, if there is one")
    add("--results", metavar="FILE", help="write curves, accuracy and settings as JSON")
    add("--quiet", action="store_true", help="show no progress bar")


def _add_devices(parser):
    add = parser.add_argument_group("devices").add_argument
    add(
        "--devices",
        type=_devices,
        metavar="N",
        help="divide the CPU of this process into N devices, which share the rows of a batch "
        "(default: auto, one for each core, or as many as --mesh needs)",
    )
    add(
        "--mesh",
        type=_mesh_sizes,
        metavar="AXIS=N,…",
        help="how all devices share the work: data, the rows; sequence, every text; model, the "
        "parameters; for example data=2,sequence=4",
    )
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="differentiate each device's rows in N parts, one after another: less memory",
    )
    add(
        "--remat", action="store_true", help="compute layers anew in the backward pass: less memory"
    )
    add(
        "--coordinator-address",
        metavar="HOST:PORT",
        help="of process 0, the same in all processes; auto: what JAX finds by itself under SLURM, "
        "Kubernetes, Open MPI or on TPUs",
    )
    add("--num-processes", type=int, metavar="N", help="number of processes")
    add("--process-id", type=int, metavar="I", help="of this process, from 0")


def _lengths(text):
    return tuple(int(part) for part in text.split(","))


def _mesh_sizes(text):
    """ "data=2,sequence=4" -> {"data": 2, "sequence": 4}"""
    pairs = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in pairs]
    if not set(names) <= set(AXES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected axes of {', '.join(AXES)}, got {text}")
    if not all(size.isdecimal() for _, _, size in pairs):
        raise argparse.ArgumentTypeError(f"expected numbers of devices, got {text}")
    return {name: int(size) for name, _, size in pairs}


def _devices(text):
    """ "auto" -> None, otherwise a number."""
    n = None if text == "auto" else int(text)
    if n is not None and n < 1:
        raise argparse.ArgumentTypeError(f"expected auto, or at least 1, got {n}")
    return n
