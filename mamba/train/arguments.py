"""The arguments of ``python -m mamba.train``: one parser for each task, and what they mean."""

import argparse
import contextlib
import dataclasses
import os
from functools import partial
from pathlib import Path

import jax

from mamba.cores import use_every_core
from mamba.parallel import AXES, make_mesh
from mamba.train.ablation import SELECTIVE
from mamba.train.experiment import BLOCKS, TASKS
from mamba.train.presets import PRESETS

__all__ = ["LANGUAGE_MODEL", "PROG", "read_arguments"]

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


def read_arguments(argv=None):
    """What to train, as the words of the command line say, and JAX's devices divided as they say.

    argv: the words; None: those of this process.
    -> (argparse.Namespace, Preset, names of what is selective). Wrong usage ends the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _start_jax(args)
        preset, selective = _preset(args), _selective(args)
        _check(args, preset, selective)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    return args, preset, selective


def _start_jax(args):
    """Divide the CPU into devices and meet the other processes, before JAX starts."""
    started = contextlib.nullcontext() if args.devices else contextlib.suppress(RuntimeError)
    with started:  # "auto" leaves it at the devices of a JAX that has started
        use_every_core(args.devices)
    if args.coordinator_address == "auto":
        jax.distributed.initialize()
    elif args.coordinator_address:
        if args.num_processes is None or args.process_id is None:
            raise ValueError("--coordinator-address needs --num-processes and --process-id")
        jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)
    elif args.num_processes is not None or args.process_id is not None:
        raise ValueError("--num-processes and --process-id need --coordinator-address")
    args.mesh = args.mesh and make_mesh(**args.mesh)
    if args.mesh and jax.process_count() > 1 and args.mesh.size != jax.device_count():
        raise ValueError(
            f"--mesh has {args.mesh.size} devices, but all {jax.device_count()} of the "
            f"{jax.process_count()} processes must have a part"
        )


# --- words --------------------------------------------------------------------------------------


def _parser():
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Train a small Mamba on a synthetic task, or on text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        help="divide the CPU into N devices, which share the rows of a batch (default: auto, one "
        "for each core)",
    )
    add(
        "--mesh",
        type=_mesh_sizes,
        metavar="AXIS=N,…",
        help="how all devices share the work: data, of the rows; sequence, of every text; model, of "
        "the parameters; for example data=2,sequence=4",
    )
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="differentiate each device's rows in N parts, one after another: less memory",
    )
    add("--remat", action="store_true", help="compute layers anew in the backward pass: the same")
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


# --- what they mean -----------------------------------------------------------------------------


def _preset(args):
    """The preset, changed as the flags say. Raises ValueError for flags that do not fit it."""
    preset = PRESETS[args.task][args.preset]
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
    for name in ("save_every", "accumulate"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must lie in [0, 2^32), got {args.seed}")
    preset.config(selective)
    preset.optimizer()
    if args.task != LANGUAGE_MODEL:
        for length in (preset.length, *preset.lengths):
            draw = partial(preset.draw, batch=preset.batch, length=length)
            jax.eval_shape(draw, jax.eval_shape(jax.random.key, 0))
    if args.out and not _can_write_folder(Path(args.out)):
        raise ValueError(f"--out {args.out}: cannot write there")
    if args.results and not _can_write_file(Path(args.results)):
        raise ValueError(f"--results {args.results}: cannot write there")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the folder of the run to continue")
    if args.task == LANGUAGE_MODEL and not (args.text and args.out):
        raise ValueError("language-model needs --text, what to read, and --out, where to save")


def _can_write_folder(path):
    return (path.is_dir() or not path.exists()) and _can_create(path)


def _can_write_file(path):
    return not path.is_dir() and _can_create(path)


def _can_create(path):
    """Whether the file or folder can be written, or be made where it does not exist yet."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return os.access(existing, os.W_OK) and (existing == path or existing.is_dir())
