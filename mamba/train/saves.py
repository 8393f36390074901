"""The save of a training run: one file, which a kill at any moment leaves complete."""

import json
from pathlib import Path

from flax import serialization

from mamba.checkpoint.files import write_atomically

__all__ = ["SAVE", "load_run", "save_run"]

SAVE = "training.msgpack"  # name of the file, in the folder of a run


def save_run(folder, values, settings):
    """Write the save of a run, in place of the one before.

    folder: made if it does not exist.   values: the pytree to save.   settings: what defines the
    run, in types that JSON has.
    """
    path = Path(folder) / SAVE
    data = serialization.to_bytes(values | {"settings": json.dumps(settings, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as part:
        part.write_bytes(data)


def load_run(folder, start, settings, *, resume):
    """What a run continues from: the values of the save in ``folder``, or ``start``.

    Args:
        folder: of the run.
        start: the values to begin with if there is no save; one that there is has the same form.
        settings: what defines the run, in types that JSON has.
        resume: whether to continue from a save.

    Returns:
        A pytree in the form of ``start``.

    Raises:
        FileExistsError: there is a save, and ``resume`` is False.
        ValueError: the file is no save, or it is the save of a run with other settings.
    """
    path = Path(folder) / SAVE
    ours = json.loads(json.dumps(settings))  # as they would come back from a save
    if not path.exists():
        return start
    if not resume:
        raise FileExistsError(
            f"{path} is the save of a run: continue it with resume (the flag --resume), or choose "
            "another folder"
        )
    try:
        values = serialization.msgpack_restore(path.read_bytes())
        theirs = json.loads(values.pop("settings"))
    except Exception as error:
        raise ValueError(f"{path} is not a save of this training loop ({error})") from error
    differences = [
        f"{key} = {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise ValueError(f"{path} is the save of another run: {'; '.join(differences)}")
    return serialization.from_state_dict(start, values)
