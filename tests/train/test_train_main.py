"""``python -m mamba.train``: what it writes, what its flags change, what it refuses."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from mamba import Mamba
from mamba.checkpoint.hub import load_tokenizer
from mamba.interrupts import Terminated
from mamba.train import __main__ as train_main
from mamba.train import arguments
from mamba.train.corpus import bits_per_byte
from mamba.train.experiment import evaluate_at, run
from mamba.train.presets import PRESETS
from tests.helpers.presets import TINY

WORDS = "".join(f"{i} and {i * i % 97} are numbers. " for i in range(300))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Sizes that train in a moment, and on the devices that there are."""
    jax.devices()
    language = dataclasses.replace(TINY, task="language-model", sizes={"vocab_size": 300})
    monkeypatch.setitem(PRESETS, "selective-copying", {"laptop": TINY, "paper": TINY})
    monkeypatch.setitem(PRESETS, "language-model", {"laptop": language})


def command(*arguments):
    return train_main.main([*map(str, arguments), "--quiet"])


def test_a_run_and_its_results(tmp_path, capsys):
    file = tmp_path / "deep" / "results.json"
    assert command("selective-copying", "--results", file) == 0
    data = json.loads(file.read_text())
    assert data["settings"]["model"]["selective"] == ["delta", "B", "C"]
    assert data["settings"]["seed"] == 0 and data["settings"]["preset"] == "laptop"
    assert data["run"]["versions"]["jax"] == jax.__version__ and "cpu" in data["run"]["devices"]
    assert [row[0] for row in data["curve"]] == list(range(1, 13))
    assert [row[0] for row in data["held_out"]] == [5, 10, 12]
    model, trained = run(TINY, progress=False)
    for row, length in zip(data["by_length"], (6, 9), strict=True):
        loss, accuracy, n = evaluate_at(TINY, model, trained.params, length)
        assert row == {
            "length": length,
            "sequences": n,
            "loss": round(loss, 5),
            "accuracy": accuracy,
        }
    assert "length        9: accuracy" in capsys.readouterr().out
    assert all(len(line) < 200 for line in file.read_text().splitlines())  # one row per line


def test_the_block_of_another_generation(tmp_path, capsys):
    file = tmp_path / "results.json"
    flags = ["--block", "mamba2", "--head-dim", 8, "--d-state", 3, "--results", file]
    assert command("selective-copying", *flags) == 0
    model = json.loads(file.read_text())["settings"]["model"]
    assert (model["head_dim"], model["d_state"]) == (8, 3)
    for flags in (["--head-dim", 8], ["--block", "mamba2", "--head-dim", 7]):
        with pytest.raises(SystemExit):
            command("selective-copying", *flags)
    assert "heads of 7 channels do not divide d_inner = 16" in capsys.readouterr().err


def test_flags_change_the_preset(tmp_path):
    file, folder = tmp_path / "results.json", tmp_path / "run"
    flags = "--steps 3 --batch 2 --length 5 --learning-rate 0.01 --selective none --bfloat16"
    flags += " --dt-init 0.5 0.7 --lengths 7,5 --seed 4 --weight-decay 0 --carry"
    out = ["--out", folder, "--results", file]
    assert command("selective-copying", *flags.split(), *out) == 0
    settings = json.loads(file.read_text())["settings"]
    changed = {"steps": 3, "batch": 2, "length": 5, "learning_rate": 0.01, "seed": 4}
    assert changed.items() <= settings.items() and settings["lengths"] == [7, 5]
    assert settings["carry"] is True and settings["weight_decay"] == 0
    model = settings["model"]
    assert model["selective"] == [] and model["dtype"] == "bfloat16"
    assert (model["dt_min"], model["dt_max"]) == (0.5, 0.7)


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("parity", "--block mamba"),
        ("parity", "--block mamba2"),
        ("parity", "--block mamba3"),
        ("modular-addition", "--block mamba3 --rope-fraction 0"),
        ("permutations", "--rope-fraction 0.5 --head-dim 32"),  # mamba3 is the preset's block
    ],
)
def test_every_block_tracks_a_state(task, flags, tmp_path):
    file = tmp_path / "results.json"
    sizes = "--steps 2 --batch 4 --length 10 --lengths 10".split()
    assert command(task, *flags.split(), *sizes, "--results", file) == 0
    data = json.loads(file.read_text())
    block = flags.split()[1] if "--block" in flags else "mamba3"
    assert data["settings"].get("block", "mamba") == block and "by_block" not in data["settings"]
    model = data["settings"]["model"]
    if block == "mamba3":
        turns, head = (None, 16) if "0" in flags.split() else (1.0, 16)
        turns, head = (0.5, 32) if "32" in flags else (turns, head)
        assert (model["rope_fraction"], model["head_dim"]) == (turns, head)
    assert 0 < data["by_length"][0]["accuracy"] < 1


def test_resume_of_a_finished_run_evaluates_it_at_other_lengths(tmp_path, capsys):
    out = ["selective-copying", "--out", tmp_path / "run"]
    assert command(*out) == 0
    assert command(*out) == 1 and "--resume" in capsys.readouterr().err
    assert command(*out, "--resume", "--lengths", "12") == 0
    assert "length       12: accuracy" in capsys.readouterr().out
    assert command(*out, "--resume", "--seed", "1") == 1
    assert "another run: seed = 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_ctrl_c_and_sigterm(tmp_path, monkeypatch, capsys, interrupt, code):
    def interrupted(*args, **kwargs):
        raise interrupt

    monkeypatch.setattr(train_main, "run", interrupted)
    assert command("selective-copying", "--out", tmp_path) == code
    assert "--resume continues" in capsys.readouterr().err


def test_a_run_may_get_more_steps(tmp_path):
    results = tmp_path / "results.json"
    out = ["selective-copying", "--out", tmp_path / "run"]
    assert command(*out) == 0
    assert command(*out, "--resume", "--steps", 14, "--results", results) == 0
    data = json.loads(results.read_text())
    assert data["settings"]["steps"] == 14 and [row[0] for row in data["curve"]][-1] == 14


def test_work_that_cannot_be_divided(capsys):
    """Refused in one line, before the first step."""
    assert command("selective-copying", "--batch", 3, "--accumulate", 2) == 1
    assert "cannot be divided into 2 equal parts" in capsys.readouterr().err


def test_help_of_a_task(capsys):
    """It has the task's own flags and presets, and no other task's."""
    shown = {}
    for task in ("selective-copying", "language-model"):
        with pytest.raises(SystemExit) as error:
            train_main.main([task, "--help"])
        assert error.value.code == 0
        shown[task] = capsys.readouterr().out
    assert "--selective" in shown["selective-copying"] and "--text" in shown["language-model"]
    assert (
        "--text" not in shown["selective-copying"] and "--selective" not in shown["language-model"]
    )
    assert "12 steps of 4 sequences of length 6" in shown["selective-copying"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("copying --preset minute", "invalid choice: 'minute'"),
        ("", "TASK"),
        ("sorting", "invalid choice: 'sorting'"),
        ("selective-copying --preset huge", "invalid choice: 'huge'"),
        ("selective-copying --selective A", "selective must be a tuple of names"),
        ("selective-copying --length 1", "length must be at least n_data = 2, got 1"),
        ("selective-copying --lengths 9,1", "length must be at least n_data = 2, got 1"),
        ("selective-copying --lengths 9,x", "--lengths"),
        ("parity --preset paper", "invalid choice: 'paper'"),
        ("parity --block mamba --head-dim 8", "--head-dim is for mamba2 and mamba3"),
        ("parity --block mamba2 --rope-fraction 1", "--rope-fraction is for --block mamba3"),
        ("parity --selective B", "only Mamba's block can be ablated, not that of mamba3"),
        ("parity --lengths 0", "length must be at least 1, got 0"),
        ("selective-copying --steps 0", "--steps must be at least 1, got 0"),
        ("selective-copying --batch 0", "--batch must be at least 1, got 0"),
        ("selective-copying --learning-rate 0", "learning_rate > 0"),
        ("selective-copying --save-every 0", "--save-every must be at least 1"),
        ("selective-copying --resume", "--resume needs --out"),
        ("selective-copying --seed -1", "--seed must lie in [0, 2^32), got -1"),
        ("selective-copying --mesh data=2,rows=3", "expected axes of data, sequence, model"),
        ("selective-copying --mesh data=2,data=2", "expected axes of data, sequence, model"),
        ("selective-copying --mesh data=x", "expected numbers of devices, got data=x"),
        ("selective-copying --mesh data=512", "--mesh needs 512 devices, and there are"),
        ("selective-copying --accumulate 0", "--accumulate must be at least 1, got 0"),
        ("selective-copying --process-id 0", "--process-id need --coordinator-address"),
        ("selective-copying --coordinator-address a:1", "needs --num-processes and --process-id"),
        ("selective-copying --devices 0", "expected auto, or at least 1, got 0"),
        ("selective-copying --devices 99", "JAX has started already, with "),
        ("selective-copying --out README.md", "--out README.md: cannot write there"),
        ("selective-copying --out README.md/x", "--out README.md/x: cannot write there"),
        ("selective-copying --results mamba", "--results mamba: cannot write there"),
        ("selective-copying --text README.md", "unrecognized arguments: --text"),
        ("language-model --text README.md", "language-model needs --text"),
        ("language-model --out x", "language-model needs --text"),
        ("language-model --text a --out x --selective B", "unrecognized arguments: --selective"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        train_main.main(words.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_mesh_that_does_not_divide_a_length_of_the_run_is_refused_before_it_begins(
    monkeypatch, capsys
):
    """parity begins with sequences of 10 and ends with 16: of these, 5 devices divide the first."""
    mesh = SimpleNamespace(shape={"data": 1, "sequence": 5}, size=5)
    monkeypatch.setattr(arguments, "make_mesh", lambda **axes: mesh)
    monkeypatch.setattr(jax, "device_count", lambda: 5)
    words = "parity --preset minute --length {} --mesh sequence=5"
    with pytest.raises(SystemExit):
        arguments.read_arguments(words.format(16).split())
    assert "'sequence' of 5 devices does not divide 16 tokens" in capsys.readouterr().err
    args, _, _ = arguments.read_arguments(words.format(20).split())
    assert args.mesh is mesh


def test_language_model(tmp_path, capsys, monkeypatch):
    """The last twentieth of a text is held out: it is evaluated on, and not trained on."""
    learned = []
    for name in ("train_tokenizer", "encode"):
        genuine = getattr(train_main, name)

        def spy(*arguments, genuine=genuine):
            learned.extend(next(v for v in arguments if isinstance(v, list)))
            return genuine(*arguments)

        monkeypatch.setattr(train_main, name, spy)
    folder, text, file = tmp_path / "model", tmp_path / "words.txt", tmp_path / "results.json"
    text.write_text(WORDS)
    arguments = ["language-model", "--text", text, "--out", folder, "--results", file]
    assert command(*arguments) == 0
    model, params = Mamba.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    cut = len(WORDS) - len(WORDS) // 20
    assert learned == 2 * [WORDS[:cut]]
    bits = json.loads(file.read_text())["bits_per_byte"]
    assert bits == pytest.approx(bits_per_byte(model, params, tokenizer, [WORDS[cut:]]), abs=1e-3)
    assert 0 < bits < 9 and f"python -m mamba --model {folder}" in capsys.readouterr().out
    assert command(*arguments, "--resume") == 0
    text.write_text(WORDS + WORDS)
    assert command(*arguments, "--resume") == 1
    assert "sha256" in capsys.readouterr().err
