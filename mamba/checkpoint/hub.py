"""Where a checkpoint lies: in a local folder, or in a repository of the Hugging Face Hub."""

import os
import queue
import re
import threading
from pathlib import Path

from mamba.checkpoint.files import read_json
from mamba.checkpoint.tensors import CheckpointError, abridged, quote

__all__ = ["CONFIG", "EMBEDDED", "WEIGHTS", "find_source", "load_tokenizer"]

EMBEDDED = Path(__file__).parents[1] / "weights" / "pystdlib"  # the checkpoint that ships with us

CONFIG = "config.json"
# In the order in which they are looked for.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TOKENIZER = "tokenizer.json"
MAX_TOKENIZER_BYTES = 2**27  # the library reads all of it; the largest published ones have 2^25
# With which the published models in the original naming were trained, and how many tokens it has.
TRAINED_WITH = {"EleutherAI/gpt-neox-20b": 50277, "meta-llama/Llama-3.1-8B": 128256}

PATIENCE = 3  # seconds to wait for the hub's first answer

_COMMIT = re.compile("[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "organization/name" or "name"


def load_tokenizer(name, revision=None, cache_dir=None):
    """Load the tokenizer of a local folder or hub repository -> ``tokenizers.Tokenizer``.

    It is read from ``tokenizer.json``. The repositories in the original naming have no such file.
    For them it is the one with which they were trained, told by the size of their vocabulary: that
    of EleutherAI/gpt-neox-20b, or of meta-llama/Llama-3.1-8B (Mamba-3), to which the hub restricts
    access. Raises as ``Mamba.from_pretrained``.
    """
    from tokenizers import Tokenizer

    source = find_source(name, revision, cache_dir)
    path = source.find(TOKENIZER)
    if path is None and isinstance(source, _Hub) and (other := _trained_with(source)):
        path = _Hub(other, None, cache_dir).require(TOKENIZER)
    path = path or source.require(TOKENIZER)
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_TOKENIZER_BYTES} bytes, which none needs")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


def _trained_with(source):
    """The repository whose tokenizer a model in the original naming was trained with, or None."""
    config = source.find(CONFIG)
    keys = read_json(config) if config else {}
    rows = keys.get("vocab_size")
    if "d_model" not in keys or "hidden_size" in keys or type(rows) is not int:
        return None
    fits = [name for name, tokens in TRAINED_WITH.items() if tokens <= rows < tokens + 128]
    return fits[0] if fits else None  # the table may be padded to a multiple of 128 at most


def find_source(name, revision, cache_dir):
    """Where the files of a checkpoint come from -> a folder or a hub repository.

    Both have ``find(name)``, the path of a file or None, and ``require(*names)``, the path of the
    first of these files that exists.

    Raises:
        ValueError: the name is empty, or a revision is given for a folder.
        FileNotFoundError: the name is neither a folder nor what a repository can be called.
        NotADirectoryError: the name is that of a file.
    """
    if not str(name):
        raise ValueError("the name is empty: give a folder or a repository of the hub")
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long; a user who is not there
        raise FileNotFoundError(f"{quote(str(name))}: no folder can have this name") from error
    if is_folder:
        if revision is not None:
            raise ValueError(f"{path} is a folder here: it has no revision {revision!r}")
        return _Folder(path)
    if path.exists():
        raise NotADirectoryError(f"{path} is a file: give the folder that holds it")
    if isinstance(name, Path) or not _REPOSITORY.fullmatch(str(name)):
        raise FileNotFoundError(
            f"{name!s}: there is no such folder (and no repository of the Hugging Face Hub, such "
            "as 'state-spaces/mamba-130m', can have this name)"
        )
    return _Hub(str(name), revision, cache_dir)


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
            published = _trained_with(self)
            hint = f" (that of {published}, if it is a published one)" if published else ""
            hint = f"; copy in the tokenizer that the model was trained with{hint}"
        held = ", ".join(abridged(sorted(map(_shown, self.path.iterdir())), 8)) or "nothing"
        raise FileNotFoundError(
            f"{self.path}: expected {' or '.join(names)}; the folder holds {held}{hint}"
        )


def _shown(path):
    """The name of a file; what is no file says so."""
    return path.name + ("" if path.is_file() else "/ (a folder)" if path.is_dir() else " (no file)")


class _Hub:
    """Files of a hub repository. Each is downloaded into the hub's cache when it is asked for."""

    def __init__(self, name, revision, cache_dir):
        self.name, self.revision, self.cache_dir = name, revision, cache_dir
        self.asked, self.no_answer = False, None  # whether the hub answers; why it does not
        self.offline = None  # why a file that is not in the cache cannot be had

    def find(self, name):
        """Path of a file, or None if the repository (without a network: the cache) has none."""
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub import utils as errors

        where = {"repo_id": self.name, "filename": name, "cache_dir": self.cache_dir}
        where["revision"] = self.revision
        try:
            # What a commit holds, and what it lacks, never changes: there is no need to ask again.
            if _COMMIT.fullmatch(self.revision or ""):
                cached = try_to_load_from_cache(**where)
                if cached is not None:
                    return None if cached is _CACHED_NO_EXIST else Path(cached)
            if not self.asked:
                self.asked, self.no_answer = True, _why_no_answer(self.name)
            only_cached = (self.offline or self.no_answer) is not None
            path = Path(hf_hub_download(**where, local_files_only=only_cached))
        except errors.LocalEntryNotFoundError as error:  # not in the cache, and no answer
            self.offline = self.offline or self.no_answer or error.__cause__ or error
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
                f"{self.name}: downloading {name} failed: {error}. Try again: the files that are "
                "complete are kept"
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
        reason = " ".join(str(self.offline).split())  # on one line
        raise ConnectionError(
            f"{self.name}: there is no such folder, the Hugging Face Hub cannot be reached "
            f"({reason}), and its cache here has no {wanted} of that name. Without a "
            "network, give a local folder or the name of a repository that was loaded before"
        )


def _why_no_answer(name):
    """Ask the hub for a repository -> None if it answers, whatever it says, else the error.

    The hub's own library tries again and again, for minutes where a network swallows what is sent.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import HfHubHTTPError

    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE)
    found = queue.SimpleQueue()

    def ask():
        try:
            get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=seconds)
        except HfHubHTTPError:  # an answer
            found.put(None)
        except Exception as error:
            found.put(error)
        else:
            found.put(None)

    # A thread: a timeout holds for each address that a name has, and not for the search for them.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return TimeoutError(f"no answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=20 waits longer")
