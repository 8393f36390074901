"""What the arguments of ``python -m mamba.train`` ask for, and whether it can be had."""

import contextlib
import dataclasses
import math
import os
from functools import partial
from pathlib import Path

import jax

from mamba.cores import use_every_core
from mamba.parallel import check_divides, make_mesh
from mamba.train.flags import LANGUAGE_MODEL, make_parser
from mamba.train.presets import PRESETS

__all__ = ["read_arguments"]


def read_arguments(argv=None):
    """What to train, as the words of the command line say, and JAX's devices divided as they say.

    argv: the words; None: those of this process.
    -> (argparse.Namespace, Preset, names of what is selective). Wrong usage ends the process.
    """
    parser = make_parser()
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
    n = args.devices
    if n is None and args.mesh and args.coordinator_address != "auto":
        n = max(1, math.prod(args.mesh.values()) // (args.num_processes or 1))
    started = contextlib.nullcontext() if args.devices else contextlib.suppress(RuntimeError)
    with started:  # unless asked for, it is left at the devices of a JAX that has started
        use_every_core(n)
    if args.coordinator_address == "auto":
        jax.distributed.initialize()
    elif args.coordinator_address:
        if args.num_processes is None or args.process_id is None:
            raise ValueError("--coordinator-address needs --num-processes and --process-id")
        jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)
    elif args.num_processes is not None or args.process_id is not None:
        raise ValueError("--num-processes and --process-id need --coordinator-address")
    needed = math.prod(args.mesh.values()) if args.mesh else 1
    if needed > jax.device_count():
        raise ValueError(
            f"--mesh needs {needed} devices, and there are {jax.device_count()} (of a CPU, "
            f"--devices {needed} makes as many)"
        )
    args.mesh = args.mesh and make_mesh(**args.mesh)
    if args.mesh and jax.process_count() > 1 and args.mesh.size != jax.device_count():
        raise ValueError(
            f"--mesh has {args.mesh.size} devices, but all {jax.device_count()} of the "
            f"{jax.process_count()} processes must have a part"
        )


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
    shapes = {(preset.batch, preset.length)}  # of the batches
    if args.task != LANGUAGE_MODEL:
        trained = {preset.length}
        if args.mesh:  # it must divide the shorter sequences, too, with which some tasks begin
            trained |= {preset.length_at(step) for step in range(preset.steps)}
        drawn = {length: _shape(preset, length) for length in sorted({*trained, *preset.lengths})}
        shapes = {drawn[length] for length in trained}
    for shape in sorted(shapes) if args.mesh else ():
        check_divides(args.mesh, shape)
    if args.out and not _can_write_folder(Path(args.out)):
        raise ValueError(f"--out {args.out}: cannot write there")
    if args.results and not _can_write_file(Path(args.results)):
        raise ValueError(f"--results {args.results}: cannot write there")
    if args.resume and not args.out:
        raise ValueError("--resume needs --out: the folder of the run to continue")
    if args.task == LANGUAGE_MODEL and not (args.text and args.out):
        raise ValueError("language-model needs --text, what to read, and --out, where to save")


def _shape(preset, length):
    """(b, l) of the batches that a task draws. Raises ValueError for sizes that it refuses."""
    draw = partial(preset.draw, batch=preset.batch, length=length)
    return jax.eval_shape(draw, jax.eval_shape(jax.random.key, 0)).tokens.shape


def _can_write_folder(path):
    return (path.is_dir() or not path.exists()) and _can_create(path)


def _can_write_file(path):
    return not path.is_dir() and _can_create(path)


def _can_create(path):
    """Whether the file or folder can be written, or be made where it does not exist yet."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return os.access(existing, os.W_OK) and (existing == path or existing.is_dir())
