"""Where checkpoints and tokenizers come from: folders and the hub, and what goes wrong there."""

import json
import os
import socket
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mamba import Mamba, load_tokenizer
from mamba.checkpoint.tensors import CheckpointError
from tests.helpers import bin_files
from tests.helpers.checkpoints import run_python, write_folder
from tests.helpers.hub_server import HubServer

NEOX, LLAMA = "EleutherAI/gpt-neox-20b", "meta-llama/Llama-3.1-8B"

# ------------------------------------------------------------------------------ bad input


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, kind, message in [
        ("", ValueError, "empty"),
        ("./nothing", FileNotFoundError, "no such folder"),
        ("../a/b", FileNotFoundError, "no such folder"),
        ("/nowhere/at/all", FileNotFoundError, "no such folder"),
        ("a/b/c", FileNotFoundError, "no such folder"),
        ("two words", FileNotFoundError, "no such folder"),
        ("https://huggingface.co/a/b", FileNotFoundError, "no such folder"),
        (Path("a/b"), FileNotFoundError, "no such folder"),
        ("file", NotADirectoryError, "is a file"),
        ("a" * 5000, FileNotFoundError, "^'a{100}'…: no folder can have this name"),
        ("~no such user/x", FileNotFoundError, "no folder can have this name"),
        ("a--b/c", ValueError, "neither a folder nor"),
    ]:
        with pytest.raises(kind, match=message):
            Mamba.from_pretrained(name)


def test_folders_without_their_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config\.json; the folder holds nothing"):
        Mamba.from_pretrained(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "flax_model.msgpack").write_text("")
    with pytest.raises(FileNotFoundError) as info:
        Mamba.from_pretrained(tmp_path)
    for part in ("model.safetensors", "pytorch_model.bin", "holds config.json, flax_model.msgpack"):
        assert part in str(info.value)


def test_an_interrupted_save_is_recognized(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        Mamba.from_pretrained(tmp_path)


def test_load_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    message = r"expected tokenizer\.json; .*copy in the tokenizer that the model was trained with$"
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(write_folder(tmp_path))
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(
        str(tmp_path / "tokenizer.json")
    )
    assert load_tokenizer(tmp_path).encode("a").ids == [0]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_absurd_size(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**40)  # it takes no room on disk, and would take all of the memory
    with pytest.raises(CheckpointError, match="more than 134217728 bytes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("rows", "trained_with"),
    [(50276, None), (50277, NEOX), (50288, NEOX), (65024, None), (128256, LLAMA), ("x", None)],
)
def test_a_missing_tokenizer_is_named_where_it_is_known(tmp_path, rows, trained_with):
    folder = write_folder(tmp_path, arrays={}, vocab_size=rows)
    with pytest.raises(FileNotFoundError, match="copy in the tokenizer") as info:
        load_tokenizer(folder)
    assert [name for name in (NEOX, LLAMA) if name in str(info.value)] == [trained_with] * (
        trained_with is not None
    )


def test_a_large_folder_is_not_listed_whole(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:02}").touch()
    with pytest.raises(FileNotFoundError, match=r"the folder holds 00, .*07, and 92 more$"):
        Mamba.from_pretrained(tmp_path)


# ------------------------------------------------------------------------ in a new process


HUB = """
import json, sys, time
time.sleep = lambda seconds: None  # between the hub library's retries
import warnings; warnings.simplefilter("ignore")
from mamba import Mamba, load_tokenizer
results = []
for function, name, revision in json.loads(sys.argv[1]):
    try:
        call = load_tokenizer if function == "load_tokenizer" else Mamba.from_pretrained
        got = call(name, revision=revision, cache_dir=sys.argv[2])
        results.append(["ok", got[0].config.n_layer if type(got) is tuple else got.get_vocab()])
    except Exception as error:
        results.append([type(error).__name__, str(error)])
print(json.dumps(results))
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_hub(tmp_path):
    """Files are downloaded. Each error names the repository and the reason."""
    single = files_of(write_folder(tmp_path / "single"))
    sharded = {name: data for name, data in single.items() if name == "config.json"}
    arrays = load_file(tmp_path / "single" / "model.safetensors")
    names = [f"model-{i % 2}.safetensors" for i in range(len(arrays))]
    for name in set(names):
        part = {key: arrays[key] for key, other in zip(arrays, names, strict=True) if name == other}
        save_file(part, tmp_path / name)
        sharded[name] = (tmp_path / name).read_bytes()
    index = {"weight_map": dict(zip(arrays, names, strict=True))}
    sharded["model.safetensors.index.json"] = json.dumps(index).encode()
    bin_files.write_bin(tmp_path / "pytorch_model.bin", arrays)
    original = {
        "config.json": single["config.json"],
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    other = {"config.json": b'{"hidden_size": 8, "model_type": "llama"}', "model.safetensors": b""}
    tokenizer = b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    repositories = {
        "org/single": single,
        "org/sharded": sharded,
        "org/original": original,
        "org/incomplete": {"config.json": single["config.json"], "README.md": b"soon"},
        "org/other": other,
        "org/empty": {"README.md": b"soon"},
        "org/gated": single,
        "org/tokenizer": {"tokenizer.json": tokenizer},
        "org/50277": {"config.json": b'{"d_model": 8, "vocab_size": 50277}'},
        "org/128256": {"config.json": b'{"d_model": 8, "vocab_size": 128256}'},
        NEOX: {"tokenizer.json": tokenizer.replace(b'"a"', b'"neox"')},
        LLAMA: {"tokenizer.json": tokenizer.replace(b'"a"', b'"llama"')},
    }
    cases = [
        ("from_pretrained", "org/single", None, "ok", 2),
        ("from_pretrained", "org/single", "main", "ok", 2),
        ("from_pretrained", "org/sharded", None, "ok", 2),
        ("from_pretrained", "org/original", None, "ok", 2),
        ("from_pretrained", "org/single", "v9", "FileNotFoundError", "no revision 'v9'"),
        ("from_pretrained", "org/empty", None, "FileNotFoundError", "has no config.json"),
        ("from_pretrained", "org/incomplete", None, "FileNotFoundError", "or pytorch_model.bin"),
        ("from_pretrained", "org/nowhere", None, "FileNotFoundError", "no such repository"),
        ("from_pretrained", "org/gated", None, "PermissionError", "hf auth login"),
        ("from_pretrained", "org/other", None, "CheckpointError", "model_type = 'llama'"),
        ("load_tokenizer", "org/tokenizer", None, "ok", {"a": 0}),
        ("load_tokenizer", "org/50277", None, "ok", {"neox": 0}),
        ("load_tokenizer", "org/128256", None, "ok", {"llama": 0}),
        ("load_tokenizer", "org/original", None, "FileNotFoundError", "has no tokenizer.json"),
        ("load_tokenizer", "org/other", None, "FileNotFoundError", "has no tokenizer.json"),
        ("load_tokenizer", "org/empty", None, "FileNotFoundError", "has no tokenizer.json"),
    ]

    def outcomes(cases, url, **environment):
        arguments = json.dumps([case[:3] for case in cases])
        return run_python(HUB, arguments, tmp_path / "cache", HF_ENDPOINT=url, **environment)

    def check(cases, results):
        for (_, name, _, kind, expected), (found, result) in zip(cases, results, strict=True):
            assert found == kind, (name, result)
            if kind == "ok":
                assert result == expected
            else:
                assert expected in result
                assert name in result or name.replace("/", "--") in result  # its folder's name

    with HubServer(repositories, gated=["org/gated"]) as hub:
        check(cases, outcomes(cases, hub.url))
        loads = [line for line in hub.requests if "org/other" in line and "GET" in line]
        assert loads == ["GET /org/other/resolve/main/config.json"]  # refused before the weights
        gone = hub.url

    # The server is gone. What was loaded loads again; the other errors give a reason and a way out.
    cases = [case for case in cases if case[3] == "ok" and case[2] is None] + [
        ("from_pretrained", "org/incomplete", None, "FileNotFoundError", "or pytorch_model.bin"),
        ("from_pretrained", "org/nowhere", None, "ConnectionError", "a local folder"),
        ("from_pretrained", "org/new", None, "ConnectionError", "cannot be reached"),
        ("load_tokenizer", "org/new", None, "ConnectionError", "tokenizer.json"),
    ]
    check(cases, outcomes(cases, gone))
    check(cases, outcomes(cases, gone, HF_HUB_OFFLINE="1"))


def test_a_network_that_does_not_answer(tmp_path):
    """One error, after one try: the hub's library alone would try again for minutes."""
    code = HUB.replace("lambda seconds: None", "None  # calling it fails")
    calls = json.dumps([("from_pretrained", "org/new", None), ("load_tokenizer", "org/new", None)])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes what is sent, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        swallowed = run_python(code, calls, tmp_path, HF_ENDPOINT=url, HF_HUB_ETAG_TIMEOUT="1")
    refused = run_python(code, calls, tmp_path, HF_ENDPOINT=url)
    for kind, message in swallowed + refused:
        assert kind == "ConnectionError" and "org/new: there is no such folder" in message
        assert "\n" not in message and "give a local folder" in message
    assert all("no answer within 1 s" in m or "timed out" in m for _, m in swallowed)


def test_what_is_no_file_says_so(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    held = r"holds config.json, model.safetensors/ \(a folder\), pipe.safetensors \(no file\)"
    with pytest.raises(FileNotFoundError, match=held):
        Mamba.from_pretrained(tmp_path)
