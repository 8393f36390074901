"""The command line, in this process where possible and in one of its own for signals and pipes."""

import importlib
import inspect
import io
import os
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer

from mamba import Mamba, Mamba3Config, MambaConfig, __version__, generate
from mamba.__main__ import main
from mamba.train.corpus import train_tokenizer
from tests.helpers.checkpoints import ROOT
from tests.helpers.parameters import random_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model and a byte-level tokenizer as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    train_tokenizer([], 257).save(str(folder / "tokenizer.json"))
    model = Mamba(
        MambaConfig(d_model=16, n_layer=1, d_state=4, vocab_size=257, tie_embeddings=False)
    )
    model.save_pretrained(random_params(model), folder)
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run the command on that folder -> exit code, stdout, stderr. Stdin is text or a terminal."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        try:
            code = main(["--model", str(folder), *arguments])  # of two --model, the last counts
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, *capsys.readouterr()

    return run


def expected(folder, prompt, n, seed=0):
    """What the command must print, from `generate`."""
    model, params = Mamba.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = {"tokenizer": tokenizer, "n_tokens_to_gen": n, "eos_token_id": 0}
    settings |= {"key": jax.random.key(seed), "params": params, "prompt": prompt}
    return generate(model, **settings) + "\n"


def test_prints_what_generate_gives(run, folder):
    code, out, err = run("def main(", "--n-tokens", "20")
    assert code == 0 and out == expected(folder, "def main(", 20)
    assert err.startswith("[20 tokens, ") and "tokens/s" in err and err.count("\n") == 1
    assert run("def main(", "--n-tokens", "20")[1] == out  # the default seed is fixed
    other = run("def main(", "--n-tokens", "20", "--seed", "1")[1]
    assert other == expected(folder, "def main(", 20, seed=1) != out


class Captured:
    """In place of `stream`: keeps what it was called with, and writes a few words."""

    def __init__(self, texts=("one ", "", "two")):
        self.texts = texts

    def __call__(self, model, **settings):
        self.settings = settings | {"model": model}
        return iter(self.texts)


@pytest.fixture
def captured(monkeypatch):
    captured = Captured()
    monkeypatch.setattr("mamba.__main__.stream", captured)
    return captured


def test_defaults_are_those_of_generate(run, captured):
    assert run("a")[1] == "aone two\n"
    defaults = {name: p.default for name, p in inspect.signature(generate).parameters.items()}
    for name in ("temperature", "top_k", "top_p"):
        assert captured.settings[name] == defaults[name]
    assert captured.settings["eos_token_id"] == [0]  # <|endoftext|>


def test_the_end_token_of_llama_3_ends_a_text(run, captured, folder, monkeypatch):
    """With whose tokenizer the published Mamba-3 models were trained."""
    tokenizer = train_tokenizer([], 257)
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    monkeypatch.setattr("mamba.__main__.load_tokenizer", lambda *args, **options: tokenizer)
    run("a")
    assert captured.settings["eos_token_id"] == [0, 257]


def test_control_characters_do_not_reach_a_terminal(run, captured, monkeypatch):
    """Written to a terminal they are shown, not obeyed; a file or a pipe gets them as they are."""
    captured.texts = ("\x1b[31mred\n", "\ttab\x07\x9b")
    assert run("a\x08")[1] == "a\x08\x1b[31mred\n\ttab\x07\x9b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("a\x08")[1] == "a\\x08\\x1b[31mred\n\ttab\\x07\\x9b\n"


def test_control_characters_of_a_file_name_do_not_either(run, tmp_path):
    (tmp_path / "\x1b[31mred").touch()
    code, out, err = run("a", "--model", str(tmp_path))
    assert code == 1 and "holds \\x1b[31mred" in err and "\x1b" not in err


def test_settings_arrive(run, captured):
    run("日本", *"--temperature 0.5 --top-k 7 --top-p 0.8 --n-tokens 9 --seed 3".split())
    found = captured.settings
    assert (found["prompt"], found["n_tokens_to_gen"]) == ("日本", 9)
    assert (found["temperature"], found["top_k"], found["top_p"]) == (0.5, 7, 0.8)
    assert jax.random.key_data(found["key"]).tolist() == [0, 3]
    assert found["model"].config.dtype == jnp.float32
    run("a", "--top-k", "0", "--dtype", "bfloat16")
    assert captured.settings["top_k"] is None
    assert captured.settings["model"].config.dtype == jnp.bfloat16
    kernel = captured.settings["params"]["layers_0"]["mixer"]["in_proj"]["kernel"]
    assert kernel.dtype == jnp.bfloat16


def test_further_settings_arrive(run, captured):
    run("a", *"--min-p 0.1 --repetition-penalty 1.2 --stop x --stop yy -n 3".split())
    found = captured.settings
    assert (found["min_p"], found["repetition_penalty"]) == (0.1, 1.2)
    assert (found["stop"], found["n_tokens_to_gen"], found["state"]) == (["x", "yy"], 3, None)


def test_a_stop_string_ends_the_text(run, folder):
    whole = expected(folder, "def", 30)
    stop = next(c for c in whole[5:-1] if c.isprintable() and c != "\ufffd")
    code, out, _ = run("def", "--n-tokens", "30", "--stop", stop)
    assert code == 0 and out == "def" + whole[3:].split(stop)[0] + "\n"


def test_a_text_read_once(run, folder, tmp_path):
    """Reading and continuing in two commands gives what one command gives."""
    file = str(tmp_path / "text.safetensors")
    assert run("-n", "0", "--save-state", file, stdin="def main(\n") == (0, "", "")
    whole = expected(folder, "def main(", 20)
    assert run("--state", file, "--n-tokens", "20")[:2] == (0, whole[9:])
    both = run("def main(", "--save-state", file, "--n-tokens", "20")
    assert both[:2] == (0, whole)
    code, out, _ = run("x", "--state", file, "--n-tokens", "20")
    assert (code, out) == (0, expected(folder, "def main(x", 20)[9:])


def test_a_folder_of_mamba3(run, tmp_path):
    """Its text, and the same in two commands: its state has four arrays a layer."""
    model = Mamba(
        Mamba3Config(
            d_model=8, n_layer=1, d_state=4, head_dim=8, vocab_size=257, tie_embeddings=False
        )
    )
    folder, file = tmp_path / "model", str(tmp_path / "text.safetensors")
    model.save_pretrained(random_params(model), folder)
    train_tokenizer([], 257).save(str(folder / "tokenizer.json"))
    options = ["--model", str(folder), "--n-tokens", "8"]
    whole = expected(folder, "def main(", 8)
    assert run("def main(", *options)[:2] == (0, whole)
    saved = run("def main(", "--save-state", file, *options, "--n-tokens", "0")
    assert saved == (0, "", "")
    assert run("", "--state", file, *options)[:2] == (0, whole[9:])


def test_a_file_that_is_no_state(run, tmp_path):
    file = tmp_path / "text.safetensors"
    code, out, err = run("a", "--state", str(file))
    assert code == 1 and out == "" and "text.safetensors" in err
    file.write_bytes(b"no")
    code, out, err = run("a", "--state", str(file))
    assert code == 1 and "not a complete safetensors file" in err and err.count("\n") == 1


def test_prompt_from_standard_input(run, captured):
    for arguments in ([], ["-"]):
        code, out, _ = run(*arguments, stdin="def f(x):\n    y\n\n")
        assert code == 0 and out == "def f(x):\n    y\none two\n"
        assert captured.settings["prompt"] == "def f(x):\n    y\n"  # one newline ends the last line
    run("given", stdin="not read")
    assert captured.settings["prompt"] == "given"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as the locale has it
def test_standard_input_that_is_not_utf_8(run, monkeypatch, errors):
    class Bytes(io.TextIOWrapper):
        def __init__(self, text):
            super().__init__(io.BytesIO(b"a\xffb"), encoding="utf-8", errors=errors)

    monkeypatch.setattr(io, "StringIO", Bytes)
    code, out, err = run("-", stdin="")
    assert (code, out) == (1, "")
    assert err == "python -m mamba: error: standard input is not UTF-8 text\n"


def test_float16_weights(run, folder):
    code, out, _ = run("def", "--dtype", "float16", "--n-tokens", "5")
    assert code == 0 and out.startswith("def")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("heeded")
def test_a_signal_inside_a_callback_is_not_lost(run, captured, number, expected):
    """JAX prints and drops what is raised inside its callbacks; the text must end all the same."""
    before = signal.getsignal(number)

    def texts():
        yield "one "
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            pass
        yield "two"
        yield "three"

    captured.texts = texts()
    code, out, _ = run("a")
    assert (code, out) == (expected, "aone ")
    assert signal.getsignal(number) is before


def test_a_character_that_the_terminal_lacks(run, captured, monkeypatch):
    captured.texts = ("日本",)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run("a")[0] == 0
    assert raw.getvalue() == b"a??\n"


@pytest.mark.parametrize("module", ["mamba.__main__", "mamba.train.__main__"])
def test_version(capsys, module):
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(module).main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"jax-mamba {__version__}\n"


def test_another_package_under_our_name(run, monkeypatch):
    """PyPI's `mamba` puts its own __init__.py, which is nearly empty, over ours."""
    monkeypatch.delattr("mamba.Mamba")
    code, out, err = run("a")
    assert (code, out) == (2, "") and "a test tool that is called mamba, too" in err


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for word in ("python -m mamba", "examples:", "state-spaces/mamba-130m", "--top-p", "greedy"):
        assert word in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no prompt"),
        (["a", "--temperature", "-1"], "temperature must be"),
        (["a", "--top-k", "-1"], "top_k must be"),
        (["a", "--top-p", "1.5"], "top_p must lie in"),
        (["a", "--n-tokens", "0"], "--n-tokens must be at least 1 (or 0 with --save-state), got 0"),
        (["a", "--n-tokens", "x"], "invalid int"),
        (["a", "--min-p", "2"], "min_p must lie in"),
        (["a", "--repetition-penalty", "0"], "repetition_penalty must be"),
        (["a", "--seed", "9" * 20], "--seed must lie in [0, 2^32), got 9999"),
        (["a", "--seed", "-1"], "--seed must lie in [0, 2^32), got -1"),
        (["a", "--stop", ""], "--stop must not be empty"),
        (["a", "--state", "x.bin"], "a state is kept in a file named *.safetensors, not x.bin"),
        (["a", "--save-state", "x.safetensors.part"], "named *.safetensors, not x.safetensors.pa"),
        (["a", "--save-state", "no/x.safetensors"], "no/x.safetensors: there is no such folder"),
        (["a", "--dtype", "int8"], "invalid choice"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_wrong_usage_is_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and message in err


def test_the_model_that_ships_has_no_revision(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["a", "--revision", "main"])
    assert exit.value.code == 2
    assert "--revision is of a repository: give one by --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "the prompt '' has no tokens"),
        (["a\udcff"], "the prompt is not UTF-8 text"),
        (["a", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_errors_are_one_line_and_1(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 1 and out == ""
    assert err.startswith("python -m mamba: error: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")


# A shell that starts a job in the background makes it ignore Ctrl-C: undo that, then run mamba.
COMMAND = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("mamba", run_name="__main__", alter_sys=True)
"""


def start(*arguments):
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_tokens(process, n):
    """Read until n bytes came: the prompt, and a start of the continuation."""
    assert len(process.stdout.read(n)) == n


def test_ctrl_c_ends_cleanly(folder):
    process = start("--model", str(folder), "--n-tokens", "1000000", "--top-k", "1", "abc")
    wait_for_tokens(process, 10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == b""


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("command", ["mamba", "mamba.train"])
def test_ctrl_c_during_import(command, tmp_path):
    """Before the command begins there is nothing to say, even where an import swallows it."""
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "__init__.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('as NumPy makes of it')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = partial(subprocess.run, env=environment, cwd=tmp_path, capture_output=True)
    done = run([sys.executable, "-m", command, "a"])
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    done = run([sys.executable, "-c", "import mamba"])  # a program of its own hears of it
    assert done.returncode == 1 and b"as NumPy makes of it" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "<&-"])
def test_closed_standard_streams(folder, closed):
    command = f"exec {sys.executable} -m mamba --model {folder} -n 3 {closed}"
    done = subprocess.run(
        ["sh", "-c", command + (" a" if closed == ">&-" else "")], cwd=ROOT, capture_output=True
    )
    assert done.returncode == (0 if closed == ">&-" else 2) and b"Traceback" not in done.stderr


def test_a_broken_pipe_is_silent(folder):
    process = start("--model", str(folder), "--n-tokens", "1000000", "--top-k", "1", "abc")
    wait_for_tokens(process, 10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == b""


def test_the_embedded_model_continues_code():
    """Without a folder and a network, the model that ships with the module is used."""
    process = start("--n-tokens", "8", "--temperature", "0", "def __init__(self")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.startswith(b"def __init__(self"), err
    assert b"[8 tokens, " in err
