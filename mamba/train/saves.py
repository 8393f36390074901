"""The saves of a training run, which Orbax writes while the training goes on.

Every process writes the parts of the arrays that its own devices hold, and reads those that they
are to hold: so a run goes on with another number of devices, or of processes. A save is written
aside and then renamed, and only then is the one before removed. So a kill at any moment leaves the
last complete save.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mamba.train.untrusted import check_save

__all__ = ["OLD_SAVE", "SAVES", "Saves"]

SAVES = "saves"  # folder of the saves, in the folder of a run; each has the number of its step
OLD_SAVE = "training.msgpack"  # what earlier versions wrote
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a save that is still being written
ARRAYS, SETTINGS = "arrays", "settings"  # the two parts of a save


class Saves:
    """The saves in the folder of one run.

    saves = Saves(folder, settings)
    values = saves.load(values, last_step, resume=True)
    saves.save(step, values)  # returns before everything is written
    saves.close()  # waits until it is
    """

    def __init__(self, folder, settings):
        """folder: of the run.   settings: what defines the run, in types that JSON has."""
        self.folder = Path(folder).absolute() / SAVES
        self.settings = json.loads(json.dumps(settings))  # as they would come back from a save
        self.manager = None  # Orbax's

    def load(self, start, last_step, *, resume):
        """What a run continues from: the values of its last save, or ``start``.

        Args:
            start: the pytree of values to begin with if there is no save. A save has values of the
                same names, dtypes and shapes; those without a step number ("curve", "held_out") may
                have more rows. JAX's arrays come back on the devices on which they are here.
            last_step: number of steps of the whole run.
            resume: whether to continue from a save.

        Raises:
            FileExistsError: there is a save, and ``resume`` is False.
            ValueError: the folder holds no save of ours, or that of a run with other settings.
        """
        old = self.folder.with_name(OLD_SAVE)
        if old.exists() or old.is_symlink():
            raise ValueError(
                f"{old} was written by an earlier version, whose saves this one cannot continue: "
                "choose another folder"
            )
        step = self._last()
        if step is not None and not resume:
            raise FileExistsError(
                f"{self.folder} has the save of a run: continue it with resume (the flag "
                "--resume), or choose another folder"
            )
        if step is None:
            self._open()
            return start
        save, (names, tree) = self.folder / str(step), _flatten(start)
        saved = {  # Orbax saves no empty arrays
            name: value
            for name, value in names.items()
            if (value.size if isinstance(value, jax.Array) else (save / ARRAYS / name).exists())
        }
        try:
            check_save(save, {name: _form(value) for name, value in saved.items()})
            theirs = json.loads((save / SETTINGS / "metadata").read_bytes())
            self._compare(save, theirs, step, last_step)
            self._open()
            restored = self.manager.restore(step, args=_arguments(saved))[ARRAYS]
        except _Different:
            raise
        except Exception as error:  # Orbax has many kinds
            reason = _first_line(error)
            raise ValueError(f"{save} is not a save of this training loop: {reason}") from error
        _check_numbers(save, restored, step)
        return jax.tree.unflatten(tree, (names | restored).values())

    def save(self, step, values):
        """Begin to write the values after a step; the save before must be complete by then.

        Raises OSError where that one or this one cannot be written.
        """
        names = {name: value for name, value in _flatten(values)[0].items() if value.size}
        parts = {ARRAYS: ocp.args.PyTreeSave(names), SETTINGS: ocp.args.JsonSave(self.settings)}
        with self._failing_as_os_error():
            self.manager.save(step, args=ocp.args.Composite(**parts))

    def close(self):
        """Wait until everything is written. Raises as ``save``."""
        manager, self.manager = self.manager, None
        if manager is not None:
            with self._failing_as_os_error():
                manager.close()

    @contextlib.contextmanager
    def _failing_as_os_error(self):
        try:
            yield
        except Exception as error:
            raise OSError(f"{self.folder}: cannot save: {_first_line(error)}") from error

    def _last(self):
        """The step of the last save, or None."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(f"{self.folder} is not a folder of saves of this training loop")
        entries = self.folder.iterdir() if self.folder.exists() else ()
        return max((int(p.name) for p in entries if p.name.isdecimal()), default=None)

    def _open(self):
        if jax.process_index() == 0:
            _remove([path for path in self.folder.glob("*") if UNFINISHED in path.name])
        logging.getLogger("absl").addFilter(_not_of_orbax)
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={ARRAYS: handler, SETTINGS: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True),
        )

    def _compare(self, save, theirs, step, last_step):
        """Raise ValueError unless the settings are ours; a run may get more steps."""
        if not isinstance(theirs, dict):
            raise ValueError("its settings are no JSON object")
        ours = self.settings
        differences = [
            f"{key} = {theirs.get(key)} there, {ours.get(key)} here"[:200]
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and key != "steps"
        ]
        if differences:
            raise _Different(f"{save} is the save of another run: {'; '.join(differences)}")
        if step > last_step:
            raise _Different(f"{save} is the save after step {step}, but the run has {last_step}")


def _not_of_orbax(record):
    """What matters of Orbax's log is raised as an exception, too."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


class _Different(ValueError):
    """A save that is one, but of another run."""


def _remove(folders):
    """Remove what a kill has left; a little later, where somebody still writes there."""
    for _ in range(20):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not any(folder.exists() for folder in folders):
            return
        time.sleep(0.1)


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _flatten(values):
    """-> ({name: array}, the structure)."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(values)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): v for path, v in leaves}
    return named, tree


def _form(value):
    """-> (shape, dtype); None stands for the rows of a NumPy array, whose number may differ."""
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    shape = value.shape
    if not isinstance(value, jax.Array) and shape:
        shape = (None, *shape[1:])
    return shape, np.dtype(value.dtype)


def _arguments(names):
    """How Orbax is to restore each array."""
    restore = {
        name: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=v.sharding, global_shape=v.shape, dtype=v.dtype
        )
        if isinstance(v, jax.Array)
        else ocp.RestoreArgs(restore_type=np.ndarray)
        for name, v in names.items()
    }
    arrays = ocp.args.PyTreeRestore(item=names, restore_args=restore)
    return ocp.args.Composite(**{ARRAYS: arrays})


@jax.jit
def _all_finite(values):
    return jax.tree.map(lambda v: jnp.isfinite(v).all(), values)


def _check_numbers(save, restored, step):
    """Raise ValueError unless all numbers are finite, and all counts are those after ``step``."""
    arrays = {name: v for name, v in restored.items() if isinstance(v, jax.Array)}
    history = {name: v for name, v in restored.items() if name not in arrays}
    finite = jax.device_get(_all_finite(arrays)) | {
        name: np.isfinite(v).all() for name, v in history.items()
    }
    bad = [name for name, good in finite.items() if not good]
    if bad:
        raise ValueError(f"{save}: NaN or infinity in {', '.join(bad[:5])}")
    for name, value in arrays.items():
        if jnp.issubdtype(value.dtype, jnp.integer) and not value.ndim and int(value) != step:
            raise ValueError(f"{save}: {name} is {int(value)}, not {step}")
