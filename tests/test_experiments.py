"""``python -m mamba.train``, the presets behind it, and text as data."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mamba import Mamba, MambaConfig, corpus, experiments, train
from mamba.experiments import PRESETS, Preset, evaluate_at, run
from mamba.pretrained import load_tokenizer
from tests.parameters import random_params

TINY = Preset(
    "selective-copying",
    *(6, 12, 4, 1e-3),
    {"vocab_size": 8, "n_data": 2},
    {"d_model": 8, "n_layer": 1, "d_state": 4},
    held_out=10,
    evaluate_every=5,
    lengths=(9,),
)
WORDS = "".join(f"{i} and {i * i % 97} are numbers. " for i in range(300))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Sizes that train in a moment."""
    language = dataclasses.replace(TINY, task="language-model", sizes={"vocab_size": 300})
    monkeypatch.setitem(PRESETS, "selective-copying", {"laptop": TINY, "paper": TINY})
    monkeypatch.setitem(PRESETS, "language-model", {"laptop": language})


# --- presets ------------------------------------------------------------------------------------


def test_presets_describe_runs_that_can_be():
    presets = [p for name, two in PRESETS.items() for p in two.values() if p.task == name]
    assert {preset.task for preset in presets} == set(PRESETS)
    for preset in presets:
        json.dumps(preset.settings(preset.config()))
        preset.optimizer()
        if preset.task != "language-model":
            for length in (preset.length, *preset.lengths):
                batch = jax.eval_shape(lambda key, p=preset, n=length: p.draw(key, 2, n), KEY)
                assert batch.tokens.shape[1] >= length


KEY = jax.random.key(0)


def test_paper_settings():
    """What the paper states: §4.1, Appendix E.1."""
    copying, induction = (experiments.PRESETS[n]["paper"] for n in ("copying", "induction-heads"))
    assert (copying.length, copying.steps, copying.batch) == (4096, 400_000, 64)
    assert (copying.learning_rate, copying.sizes) == (1e-4, {"vocab_size": 16, "n_data": 16})
    assert (induction.length, induction.batch, induction.learning_rate) == (256, 8, 1e-3)
    assert induction.sizes == {"vocab_size": 16} and max(induction.lengths) == 2**20
    for preset in (copying, induction):
        assert preset.model == {"d_model": 64, "n_layer": 2}
        assert (preset.warmup, preset.end) == (0.0, 1.0)  # a constant learning rate


def test_training_sequences_double_up_to_the_last_length():
    grown = dataclasses.replace(TINY, length=20, steps=8, first_length=5)
    assert [grown.length_at(step) for step in range(8)] == [5, 5, 5, 10, 10, 10, 20, 20]
    thirds = dataclasses.replace(grown, steps=9)  # each length for exactly as many steps
    assert [thirds.length_at(step) for step in range(9)] == [5, 5, 5, 10, 10, 10, 20, 20, 20]
    assert {TINY.length_at(step) for step in range(TINY.steps)} == {TINY.length}
    odd = dataclasses.replace(grown, first_length=6)
    assert [odd.length_at(step) for step in range(8)] == [6, 6, 6, 12, 12, 12, 20, 20]
    assert dataclasses.replace(grown, first_length=99).length_at(0) == 20


def test_held_out_sequences_are_no_training_sequences_and_always_the_same():
    held_out = TINY.held_out_batches(6)
    again = dataclasses.replace(TINY, steps=99, learning_rate=1.0).held_out_batches(6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(held_out, again, strict=True))
    assert sum(len(batch.tokens) for batch in held_out) >= 10
    seen = {np.asarray(batch.tokens).tobytes() for batch in held_out}
    assert len(seen) == len(held_out)
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        for step in range(100):
            batch = TINY.draw(jax.random.fold_in(key, step), 4, 6)
            seen.add(np.asarray(batch.tokens).tobytes())
    assert len(seen) == len(held_out) + 300


def test_far_fewer_sequences_where_they_are_very_long(monkeypatch):
    monkeypatch.setattr(experiments, "MOST_TOKENS", 90)
    for length, n in ((9, 12), (60, 8)):  # 12: 10 in batches of 4
        batches = jax.eval_shape(lambda length=length: TINY.held_out_batches(length))
        assert sum(len(batch.tokens) for batch in batches) == n


def test_the_seed_changes_data_and_parameters():
    curves = [run(TINY, seed=seed, progress=False).trained.curve for seed in (0, 0, 1)]
    assert np.array_equal(curves[0], curves[1]) and not np.array_equal(curves[0], curves[2])


# --- the command --------------------------------------------------------------------------------


def command(*arguments):
    return train.main([*map(str, arguments), "--quiet"])


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
    assert all(len(line) < 200 for line in file.read_text().splitlines())  # a row of it a line


def test_flags_change_the_preset(tmp_path):
    file, folder = tmp_path / "results.json", tmp_path / "run"
    flags = "--steps 3 --batch 2 --length 5 --learning-rate 0.01 --selective none --bfloat16"
    flags += " --dt-init 0.5 0.7"
    out = ["--out", folder, "--results", file, "--lengths", "7,8", "--seed", 4]
    assert command("selective-copying", *flags.split(), *out) == 0
    settings = json.loads(file.read_text())["settings"]
    changed = {"steps": 3, "batch": 2, "length": 5, "learning_rate": 0.01, "seed": 4}
    assert changed.items() <= settings.items() and settings["lengths"] == [7, 8]
    model = settings["model"]
    assert model["selective"] == [] and model["dtype"] == "bfloat16"
    assert (model["dt_min"], model["dt_max"]) == (0.5, 0.7)


def test_resume_of_a_finished_run_evaluates_it_at_other_lengths(tmp_path, capsys):
    out = ["selective-copying", "--out", tmp_path / "run"]
    assert command(*out) == 0
    assert command(*out) == 1 and "--resume" in capsys.readouterr().err
    assert command(*out, "--resume", "--lengths", "12") == 0
    assert "length       12: accuracy" in capsys.readouterr().out
    assert command(*out, "--resume", "--seed", "1") == 1
    assert "another run: seed = 0 there, 1 here" in capsys.readouterr().err


def test_ctrl_c(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert command("selective-copying", "--out", tmp_path) == 130
    assert "--resume goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("copying --preset minute", "no preset minute"),
        ("", "TASK"),
        ("sorting", "invalid choice: 'sorting'"),
        ("selective-copying --preset huge", "invalid choice: 'huge'"),
        ("selective-copying --selective A", "selective must be a tuple of names"),
        ("selective-copying --length 1", "length must be at least n_data = 2, got 1"),
        ("selective-copying --lengths 9,1", "length must be at least n_data = 2, got 1"),
        ("selective-copying --lengths 9,x", "--lengths"),
        ("selective-copying --steps 0", "--steps must be at least 1, got 0"),
        ("selective-copying --batch 0", "--batch must be at least 1, got 0"),
        ("selective-copying --learning-rate 0", "learning_rate > 0"),
        ("selective-copying --save-every 0", "--save-every must be at least 1"),
        ("selective-copying --resume", "--resume needs --out"),
        ("selective-copying --out README.md", "--out README.md: nothing can be written there"),
        ("selective-copying --out README.md/x", "--out README.md/x: nothing can be written"),
        ("selective-copying --results mamba", "--results mamba: nothing can be written there"),
        ("selective-copying --text README.md", "--text is for language-model"),
        ("language-model --text README.md", "language-model needs --text"),
        ("language-model --out x", "language-model needs --text"),
        ("language-model --text a --out x --selective B", "--selective is for the synthetic"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(arguments.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_language_model(tmp_path, capsys, monkeypatch):
    """The last twentieth of a text is what it is evaluated on, and no part of what it learns."""
    learned = []
    for name in ("train_tokenizer", "encode"):
        genuine = getattr(train, name)

        def spy(*arguments, genuine=genuine):
            learned.extend(next(v for v in arguments if isinstance(v, list)))
            return genuine(*arguments)

        monkeypatch.setattr(train, name, spy)
    folder, text, file = tmp_path / "model", tmp_path / "words.txt", tmp_path / "results.json"
    text.write_text(WORDS)
    arguments = ["language-model", "--text", text, "--out", folder, "--results", file]
    assert command(*arguments) == 0
    model, params = Mamba.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    cut = len(WORDS) - len(WORDS) // 20
    kept = WORDS[cut:]
    assert learned == 2 * [WORDS[:cut]]
    bits = json.loads(file.read_text())["bits_per_byte"]
    assert bits == pytest.approx(corpus.bits_per_byte(model, params, tokenizer, [kept]), abs=1e-3)
    assert 0 < bits < 9 and f"python -m mamba --model {folder}" in capsys.readouterr().out
    assert command(*arguments, "--resume") == 0
    text.write_text(WORDS + WORDS)
    assert command(*arguments, "--resume") == 1
    assert "sha256" in capsys.readouterr().err


# --- text ---------------------------------------------------------------------------------------


def test_read_texts(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.md").write_text("øne")
    (tmp_path / "a" / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "a" / "empty.md").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    assert list(corpus.read_texts([tmp_path]).values()) == ["øne", "two"]
    assert list(corpus.read_texts([tmp_path / "b.txt"]).values()) == ["two"]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        corpus.read_texts([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="image.png is not UTF-8 text"):
        corpus.read_texts([tmp_path / "a" / "image.png"])
    with pytest.raises(ValueError, match="no UTF-8 text in"):
        corpus.read_texts([tmp_path / "a" / "empty.md"])


def test_tokenizer_gives_back_every_text():
    tokenizer = corpus.train_tokenizer([WORDS], 300)
    assert tokenizer.get_vocab_size() == 300
    for text in (WORDS, "ünknown ✓\n\t ", corpus.END):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    (ids,) = corpus.encode(tokenizer, ["and are"])
    assert ids[0] == tokenizer.token_to_id(corpus.END) and tokenizer.decode(ids) == "and are"


def test_bits_per_byte():
    """Of texts of unequal lengths, some characters two bytes long, read in windows of 8 tokens."""
    tokenizer = corpus.train_tokenizer([WORDS], 300)
    model = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=300, d_state=4))
    params = random_params(model)
    texts = ["3 and 9 are numbers", "ünknown", "and are. " * 4]
    tokens = np.zeros((3, 40), np.int32)  # causal: what comes after a text does not matter
    files = corpus.encode(tokenizer, texts)
    for row, file in zip(tokens, files, strict=True):
        row[: len(file)] = file
    logits = np.float64(jax.jit(model.apply)({"params": params}, tokens))
    nats = 0.0
    for row, file in zip(logits, files, strict=True):
        log_p = row - np.log(np.exp(row).sum(axis=-1, keepdims=True))
        nats -= log_p[np.arange(len(file) - 1), file[1:]].sum()
    expected = nats / np.log(2) / sum(len(text.encode()) for text in texts)
    actual = corpus.bits_per_byte(model, params, tokenizer, texts, rows=2, window=8)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_text_batches_read_on_and_shuffle_by_epoch():
    files = [np.arange(start, start + 40) for start in (0, 100, 200)]
    batch = corpus.text_batches(files, 2, 9, seed=3)
    row = np.concatenate([batch(step).tokens[0] for step in range(6)])  # 60 tokens: 6 windows
    assert len({*row.tolist()}) == 54 and (np.diff(row) == 1).sum() >= 52
    first, second = batch(0), batch(1)
    assert (first.targets[:, :-1] == first.tokens[:, 1:]).all() and first.mask.all()
    assert (first.targets[:, -1] == second.tokens[:, 0]).all()
    assert (batch(0).tokens == first.tokens).all() and (batch(6).tokens != first.tokens).any()
    assert (corpus.text_batches(files, 2, 9, seed=4)(0).tokens != first.tokens).any()
    with pytest.raises(ValueError, match="120 tokens are too few for 4 rows of 30"):
        corpus.text_batches(files, 4, 30)
