"""Published weights <-> our parameters, from a folder or the Hugging Face Hub, and back.

``Mamba.from_pretrained`` and ``Mamba.save_pretrained`` are attached here, so that the model itself
knows nothing of files.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mamba.block import MambaConfig
from mamba.checkpoint import CheckpointError, read_json, shard_names, write_tensors
from mamba.model import Mamba
from mamba.naming import read_config, tensor_table, write_config
from mamba.params import _first, compare_tensors, read_params

__all__ = ["EMBEDDED", "from_pretrained", "load_tokenizer", "save_pretrained"]

EMBEDDED = Path(__file__).parent / "weights" / "pystdlib"  # the checkpoint that ships with us

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # in order
TOKENIZER = "tokenizer.json"
ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"  # the one that state-spaces/mamba-* trained with


def from_pretrained(name, *, revision=None, dtype=jnp.float32, cache_dir=None):
    """Load a model -> (Mamba, params), in either naming scheme, from safetensors or PyTorch's .bin.

    name: a local folder, or a repository of the Hugging Face Hub such as
        "state-spaces/mamba-370m". Files from there are kept in its cache (or in ``cache_dir``), and
        found there again without a network.
    revision: a branch, tag or commit of the repository.
    dtype: float32, bfloat16 or float16, of the matrices and of the products with them; norms, the
        Δ bias, A_log and D stay float32.

    Every tensor is accounted for. NaN or infinity in the weights is loaded, with a warning that
    names the tensor. Raises FileNotFoundError for an absent folder, repository or
    file; ConnectionError without a network; PermissionError for a gated repository; and ValueError
    (CheckpointError) for a file that is broken, or is another model than ours.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    source = _source(name, revision, cache_dir)
    config = read_config(source.require(CONFIG), dtype)  # before a long download
    weights = source.require(*WEIGHTS)
    if weights.name.endswith(".index.json"):
        for shard in shard_names(weights):
            source.require(shard)
    return Mamba(config), read_params(weights, config)


def save_pretrained(model, params, folder):
    """Write a model as ``config.json`` and ``model.safetensors`` in the original naming.

    ``from_pretrained(folder, dtype=model.config.dtype)`` returns the same model and, bit for bit,
    the same parameters. Interrupted at any moment, it leaves the folder as it was, or complete, or
    without a ``config.json``: never one that loads as something else. A tied head is not written.

    Raises TypeError if ``params`` is no dict; ValueError if it is not this model's or not all of Δ,
    B and C are selective, for which checkpoints have no names; FileExistsError if the folder holds
    weights in another form, which would then contradict the new ones.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            "save_pretrained(params, folder): params must be the dict of parameters, "
            f"got {type(params).__name__}"
        )
    if model.config.selective != MambaConfig.selective:
        raise ValueError(
            f"a model with selective = {model.config.selective} cannot be saved: checkpoints have "
            f"names for Mamba's tensors only, where it is {MambaConfig.selective}"
        )
    rows, flat = tensor_table(model.config), flatten_dict(params, sep=".")
    compare_tensors(
        "params",
        {row.path: row.our_shape for row in rows},
        {path: (np.shape(leaf), jnp.result_type(leaf)) for path, leaf in flat.items()},
    )
    arrays = {}
    for row in rows:
        array = np.asarray(flat[row.path])
        arrays[row.name] = array.T.reshape(row.shape) if row.transpose else array

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in WEIGHTS[1:] if (folder / name).exists()]
    if others:
        raise FileExistsError(f"{folder} holds {', '.join(others)}: save into another folder")
    parts = [folder / (WEIGHTS[0] + ".part"), folder / (CONFIG + ".part")]
    try:
        write_tensors(parts[0], arrays)
        write_config(parts[1], model.config)
        parts[0].chmod(parts[1].stat().st_mode)  # the library would keep it from other users
        for part in parts:
            _to_disk(part)
        # From here on the folder has no configuration, and does not load, until all is in place.
        (folder / CONFIG).unlink(missing_ok=True)
        _to_disk(folder)
        os.replace(parts[0], folder / WEIGHTS[0])
        _to_disk(folder)
        os.replace(parts[1], folder / CONFIG)
        _to_disk(folder)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _to_disk(path):
    """Wait until the file, or the folder's list of names, has reached the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_tokenizer(name, revision=None, cache_dir=None):
    """Load the tokenizer of a local folder or hub repository -> ``tokenizers.Tokenizer``.

    It is read from ``tokenizer.json``. The repositories in the original naming have none: they were
    trained with that of EleutherAI/gpt-neox-20b, which is then returned. Raises as from_pretrained.
    """
    from tokenizers import Tokenizer

    source = _source(name, revision, cache_dir)
    path = source.find(TOKENIZER)
    if path is None and isinstance(source, _Hub):
        config = source.find(CONFIG)
        keys = read_json(config) if config else {}
        if "d_model" in keys and "hidden_size" not in keys:  # the original naming
            path = _Hub(ORIGINAL_TOKENIZER, None, cache_dir).require(TOKENIZER)
    path = path or source.require(TOKENIZER)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


Mamba.from_pretrained = staticmethod(from_pretrained)
Mamba.save_pretrained = save_pretrained


# ------------------------------------------------------------------------ folder or hub


def _source(name, revision, cache_dir):
    if not str(name):
        raise ValueError("the name is empty: give a folder or a repository of the hub")
    path = Path(name).expanduser()
    if path.is_dir():
        return _Folder(path)
    if path.exists():
        raise NotADirectoryError(f"{path} is a file: give the folder that holds it")
    # "org/name" or "name": anything else was meant as a path
    if isinstance(name, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise FileNotFoundError(
            f"{name!s}: there is no such folder (nor can it be a repository of the Hugging Face "
            "Hub, such as 'state-spaces/mamba-130m')"
        )
    return _Hub(str(name), revision, cache_dir)


_COMMIT = re.compile("[0-9a-f]{40}")


class _Folder:
    """Files of a local folder."""

    def __init__(self, path):
        self.path = path

    def find(self, name):
        """Path of a file, or None if there is no such file."""
        return self.path / name if (self.path / name).is_file() else None

    def require(self, *names):
        """Path of the first of these files that exists."""
        for name in names:
            if path := self.find(name):
                return path
        hint = ""
        if CONFIG in names and (self.path / WEIGHTS[0]).exists():
            hint = "; was a save interrupted? Save it again"
        if TOKENIZER in names:
            hint = f"; copy it in (the published models use that of {ORIGINAL_TOKENIZER})"
        held = ", ".join(_first(sorted(p.name for p in self.path.iterdir()), 8)) or "nothing"
        raise FileNotFoundError(
            f"{self.path}: expected {' or '.join(names)}; the folder holds {held}{hint}"
        )


class _Hub:
    """Files of a hub repository, downloaded into the hub's cache as they are asked for."""

    def __init__(self, name, revision, cache_dir):
        self.name, self.revision, self.cache_dir = name, revision, cache_dir
        self.offline = None  # the error that told us so

    def find(self, name):
        """Path of a file, or None if the repository, or without a network its cache, has none."""
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub import utils as errors

        where = {"repo_id": self.name, "filename": name, "cache_dir": self.cache_dir}
        where["revision"] = self.revision
        try:
            # What a commit lacks, it lacks for ever; no need to ask, or to wait without a network.
            pinned = _COMMIT.fullmatch(self.revision or "")
            if pinned and try_to_load_from_cache(**where) is _CACHED_NO_EXIST:
                return None
            path = Path(hf_hub_download(**where, local_files_only=self.offline is not None))
        except errors.LocalEntryNotFoundError as error:  # not in the cache, and no answer
            self.offline = self.offline or error.__cause__ or error
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.HFValidationError as error:
            raise ValueError(f"{self.name!r} is neither a folder nor a hub repository") from error
        except errors.GatedRepoError as error:
            raise PermissionError(
                f"{self.name}: access is restricted; request it on its page at the hub, then log "
                "in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(f"{self.name} has no revision {self.revision!r}") from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name}: there is no such folder here and no such repository on the Hugging "
                "Face Hub (a private one needs `hf auth login`)"
            ) from error
        except Exception as error:  # the HTTP library's own, which changed between versions
            raise ConnectionError(
                f"{self.name}: downloading {name} failed: {error}. Try again: what is complete is "
                "kept"
            ) from error
        # All further files come from the same commit, even if the branch moves on meanwhile.
        if _COMMIT.fullmatch(path.parent.name):
            self.revision = path.parent.name
        return path

    def require(self, *names):
        """Path of the first of these files that exists."""
        for name in names:
            if path := self.find(name):
                return path
        wanted = " or ".join(names)
        if self.offline is None:
            raise FileNotFoundError(f"{self.name}: the repository has no {wanted}")
        raise ConnectionError(
            f"{self.name}: there is no such folder, the Hugging Face Hub cannot be reached "
            f"({self.offline}), and its cache here has no {wanted} of that name. Without a "
            "network, give a local folder or the name of a repository that was loaded before"
        )
