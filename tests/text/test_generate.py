"""Generation against a plain loop that re-reads the whole sequence for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from mamba.checkpoint.hub import EMBEDDED
from mamba.mamba1 import MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.model import Mamba
from mamba.text.generate import generate, stream
from mamba.text.prompt import read_prompt, upcast_on_cpu
from mamba.text.writer import TextWriter
from mamba.train.corpus import train_tokenizer
from tests.helpers.compilations import count_compilations
from tests.helpers.parameters import random_params

SIZES = {"d_model": 16, "n_layer": 2, "d_state": 4, "tie_embeddings": False}
KEY = jax.random.key(5)
TEXT = "def main(argv):\n    return print('hello', argv)\n"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE: any str is encodable, and some tokens are half a character."""
    return train_tokenizer([TEXT * 3, "日本 😀 " * 3], 290)


def make_indifferent_model(vocab_size, **config):
    """All parameters zero: every token is equally likely, whatever came before."""
    model = Mamba(MambaConfig(vocab_size=vocab_size, **(SIZES | {"n_layer": 1} | config)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


CONFIGS = {
    "mamba": lambda size: MambaConfig(vocab_size=size, **SIZES),
    "mamba2": lambda size: Mamba2Config(vocab_size=size, head_dim=8, n_groups=2, **SIZES),
    "mamba3": lambda size: Mamba3Config(
        vocab_size=size, head_dim=8, d_intermediate=8, **SIZES | {"n_layer": 1}
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tokenizer):
    """A random model. Its head is not the embedding, or greedy text would repeat one token."""
    model = Mamba(CONFIGS[request.param](tokenizer.get_vocab_size()))
    return model, random_params(model, seed=2 if request.param == "mamba2" else 0)


@pytest.fixture
def arguments(pair, tokenizer):
    model, params = pair
    return {
        "model": model,
        "params": params,
        "tokenizer": tokenizer,
        "key": KEY,
        "n_tokens_to_gen": 12,
    }


def reference_ids(model, params, ids, n):
    """Greedy tokens the slow way: the full sequence through the model for each."""
    ids = list(ids)
    for _ in range(n):
        padded = np.zeros((1, 64), np.int32)  # one length to compile; causal, so zeros do no harm
        padded[0, : len(ids)] = ids
        logits = _full(model, params, padded)[0, len(ids) - 1, : model.config.vocab_size]
        ids.append(int(np.argmax(logits)))
    return ids[-n:]


_full = jax.jit(
    lambda model, params, tokens: model.apply({"params": params}, tokens), static_argnums=0
)


def generated_ids(monkeypatch, arguments, **changes):
    """The token ids of a generated text, row by row (encoding the text may give others)."""
    writers = []

    class Spy(TextWriter):
        def __init__(self, *args):
            super().__init__(*args)
            self.drawn = []
            writers.append(self)

        def write(self, token):
            self.drawn.append(token)  # also after the text has ended
            return super().write(token)

    with monkeypatch.context() as patch:
        patch.setattr("mamba.text.request.TextWriter", Spy)
        generate(**(arguments | changes))
    return [writer.drawn for writer in writers]


PROMPTS = [
    "d",
    "def main(",
    "日本語 😀",
    "    return print('hello', argv) # and a longer line of text",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_the_full_sequence(arguments, monkeypatch, prompt):
    (ids,) = generated_ids(monkeypatch, arguments, prompt=prompt, temperature=0)
    context = arguments["tokenizer"].encode(prompt).ids
    expected = reference_ids(arguments["model"], arguments["params"], context, 12)
    assert ids == expected
    assert len(set(ids)) > 1  # else a constant would pass
    text = generate(prompt=prompt, temperature=0, **arguments)
    whole = arguments["tokenizer"].decode(context + ids, skip_special_tokens=False)
    assert text == whole and text.startswith(prompt)


def test_ragged_batch_equals_each_alone(arguments, monkeypatch):
    alone = [generated_ids(monkeypatch, arguments, prompt=p, temperature=0)[0] for p in PROMPTS]
    assert generated_ids(monkeypatch, arguments, prompt=PROMPTS, temperature=0) == alone
    texts = generate(prompt=PROMPTS, temperature=0, **arguments)
    assert texts == [generate(prompt=p, temperature=0, **arguments) for p in PROMPTS]
    assert generate(prompt=PROMPTS[:1], temperature=0, **arguments) == texts[:1]  # still a list


def test_sampled_rows_do_not_depend_on_neighbours(arguments):
    first = generate(prompt=["def main(", "x"], **arguments)
    assert generate(prompt=["def main(", "日本語"], **arguments)[0] == first[0]
    assert generate(prompt="def main(", **arguments) == first[0]
    twice = generate(prompt=["def", "def"], **arguments)
    assert twice[0] != twice[1]  # each row has a key of its own


def test_same_key_same_text(arguments):
    texts = {generate(prompt="def", **(arguments | {"key": jax.random.key(i)})) for i in range(5)}
    assert len(texts) == 5
    text = generate(prompt="def", **arguments)
    assert generate(prompt="def", **arguments) == text
    old_form = arguments | {"key": jax.random.PRNGKey(5)}
    assert generate(prompt="def", **old_form) == text
    longer = generate(prompt="def", **(arguments | {"n_tokens_to_gen": 20}))
    assert longer.startswith(text.rstrip("\ufffd"))


def test_each_token_draws_with_a_fresh_key(tokenizer, monkeypatch):
    """With logits that never change, one key used twice would repeat its token for ever."""
    model, params = make_indifferent_model(tokenizer.get_vocab_size())
    arguments = {"model": model, "params": params, "tokenizer": tokenizer, "key": KEY}
    (ids,) = generated_ids(
        monkeypatch, arguments, prompt="a", n_tokens_to_gen=64, top_k=None, temperature=1.0
    )
    assert len(set(ids)) > 45  # of 290 equally likely ones


def test_few_compilations_for_many_prompts(tokenizer):
    """Only a new padded length compiles a program; the values of the settings do not."""
    vocab = tokenizer.get_vocab_size()
    model, params = make_indifferent_model(vocab, norm_eps=2e-5)  # not compiled before
    arguments = {"model": model, "params": params, "tokenizer": tokenizer, "key": KEY}
    programs = []  # how many were compiled for each n
    for n in range(1, 21):  # byte-level: between 1 and ~40 tokens, padded to 16, 32 and 64
        settings = {"temperature": n / 10, "eos_token_id": n, "n_tokens_to_gen": 10 + n % 6}
        with count_compilations() as compiled:
            generate(prompt="日xz"[n % 3] * n, **arguments, **settings)
            assert "".join(stream(prompt="q" * (1 + n % 9), **arguments, **settings)) is not None
        programs.append(len(compiled))
    assert programs[0] >= 4  # to read, for the first token, in the loop, for a single step
    assert sum(programs[1:]) == 2  # to read 32, and 64


def test_eos_ends_the_text_before_it(arguments, monkeypatch):
    (ids,) = generated_ids(monkeypatch, arguments, prompt="def", temperature=0)
    decode = arguments["tokenizer"].decode
    context = arguments["tokenizer"].encode("def").ids
    for eos in {ids[0], ids[5], ids[-1]}:
        settings = arguments | {"prompt": "def", "temperature": 0, "eos_token_id": eos}
        cut = ids[: ids.index(eos)]
        expected = decode(context + cut, skip_special_tokens=False)
        assert generate(**settings) == expected
        assert "def" + "".join(stream(**settings)) == expected


def test_loop_stops_when_every_row_met_eos(arguments, monkeypatch):
    """A row ends by itself. The loop runs as long as another row has not ended, and no longer."""
    rows = generated_ids(monkeypatch, arguments, prompt=["def", "日本"], temperature=0)
    eos = next(token for token in rows[0] if token in rows[1])
    changes = {"prompt": ["def", "日本"], "temperature": 0, "eos_token_id": eos}
    last = max(row.index(eos) for row in rows)
    assert last < 11
    ended = generated_ids(monkeypatch, arguments, **changes)
    assert [row[: last + 1] for row in ended] == [row[: last + 1] for row in rows]
    assert all(row[last + 1 :] == [0] * (11 - last) for row in ended)  # never computed
    texts = generate(**(arguments | changes))
    assert texts == [generate(**(arguments | changes | {"prompt": p})) for p in ["def", "日本"]]


@pytest.mark.parametrize("prompt", ["def main(", "日本語 😀"])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": None, "top_p": 0.9}])
def test_stream_equals_generate(arguments, prompt, settings):
    arguments |= {"prompt": prompt, "n_tokens_to_gen": 16} | settings
    texts = list(stream(**arguments))
    assert prompt + "".join(texts) == generate(**arguments)
    assert len(texts) in (16, 17) and not any(t.endswith("\ufffd") for t in texts[:16])


def test_both_kinds_of_tokenizer(arguments):
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=arguments["tokenizer"], eos_token="<|endoftext|>"
    )
    assert isinstance(wrapped.encode("def"), list)
    for prompt in ("def main(", "日本語 😀"):
        plain = generate(prompt=prompt, **arguments)
        assert generate(prompt=prompt, **(arguments | {"tokenizer": wrapped})) == plain
        assert generate(prompt=prompt, **(arguments | {"tokenizer": Duck(wrapped)})) == plain


class Duck:
    """A tokenizer written in Python, as transformers still has some: no `backend_tokenizer`."""

    def __init__(self, tokenizer):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.get_vocab = tokenizer.get_vocab


def test_special_tokens_that_the_tokenizer_adds(arguments, monkeypatch):
    """A special token that begins the text is read and not shown; one that is drawn is shown."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(arguments["tokenizer"].to_str())
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    arguments |= {"tokenizer": tokenizer, "temperature": 0, "prompt": "def"}
    (ids,) = generated_ids(monkeypatch, arguments)
    context = [0, *tokenizer.encode("def", add_special_tokens=False).ids]
    assert ids == reference_ids(arguments["model"], arguments["params"], context, 12)
    assert generate(**arguments) == "def" + tokenizer.decode(ids, skip_special_tokens=False)
    assert TextWriter(tokenizer, context).write(0) == "<|endoftext|>"


def test_padding_of_the_vocabulary_is_never_drawn(tokenizer, monkeypatch):
    """Neither rows that only pad the embedding nor ids that the tokenizer lacks are drawn."""
    model, params = make_indifferent_model(590, pad_vocab_size_multiple=256)  # 768 rows
    words = {"!": 0} | {f"w{i}": i for i in range(1, 700)}  # ids that the model does not have
    large = Tokenizer(models.WordLevel(words, unk_token="!"))
    for fitted, allowed in ((tokenizer, tokenizer.get_vocab_size()), (large, 590)):
        arguments = {"model": model, "params": params, "tokenizer": fitted, "key": KEY}
        rows = generated_ids(
            monkeypatch, arguments, prompt=["!"] * 16, n_tokens_to_gen=64, top_k=None
        )
        assert allowed - 20 < max(map(max, rows)) < allowed  # and nothing more is forbidden


@pytest.mark.parametrize("n", [1, 2, 16, 17])
def test_as_many_tokens_as_asked(arguments, n, monkeypatch):
    settings = {"prompt": "def", "temperature": 0, "n_tokens_to_gen": n}
    (ids,) = generated_ids(monkeypatch, arguments, **settings)
    (more,) = generated_ids(monkeypatch, arguments, **settings | {"n_tokens_to_gen": 30})
    assert ids == more[:n]
    assert len(list(stream(**(arguments | settings)))) in (n, n + 1)


def test_a_prompt_that_fills_its_padded_length(arguments, monkeypatch):
    for length in (15, 16, 17, 32):
        prompt = "q" * length
        ids = arguments["tokenizer"].encode(prompt).ids
        assert len(ids) == length
        (found,) = generated_ids(monkeypatch, arguments, prompt=prompt, temperature=0)
        assert found == reference_ids(arguments["model"], arguments["params"], ids, 12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompt": ""}, ValueError, "the prompt '' has no tokens"),
        ({"prompt": ["a", ""]}, ValueError, "the prompt '' has no tokens"),
        ({"prompt": []}, ValueError, "non-empty list of such, got \\[\\]"),
        ({"prompt": None}, ValueError, "must be a str, a list of token ids, or .* got None"),
        ({"prompt": ["a", 3]}, TypeError, "a prompt must be a str or a list of token ids, got int"),
        ({"prompt": "a\udcff"}, ValueError, "surrogates not allowed"),
        ({"n_tokens_to_gen": 0}, ValueError, "n_tokens_to_gen must be at least 1, got 0"),
        ({"n_tokens_to_gen": True}, TypeError, "n_tokens_to_gen must be an integer, got True"),
        ({"n_tokens_to_gen": 2.5}, TypeError, "n_tokens_to_gen must be an integer, got 2.5"),
        ({"n_tokens_to_gen": 2**31}, ValueError, r"must be below 2\^31, got 2147483648"),
        ({"model": (1, 2)}, TypeError, r"model must be a Mamba, .* got \(1, 2\)"),
        ({"tokenizer": None}, TypeError, "tokenizer must be a tokenizer, .* got None"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer must be a tokenizer, .* got 'gpt2'"),
        ({"params": {"embedding": jnp.ones((2, 3))}}, ValueError, "params are another model's"),
        ({"eos_token_id": "<|endoftext|>"}, TypeError, "eos_token_id must be a token id, or sev"),
        ({"eos_token_id": [1, 2.0]}, TypeError, "eos_token_id must be a token id, .* got 2.0"),
        ({"eos_token_id": True}, TypeError, "eos_token_id must be a token id, .* got True"),
        ({"eos_token_id": [1, -1]}, ValueError, "eos_token_id -1 is no token of this model"),
        ({"eos_token_id": 10**6}, ValueError, "eos_token_id 1000000 is no token of this model"),
        ({"stop": 3}, ValueError, "stop must be a non-empty str or a list of such, got 3"),
        ({"temperature": "1"}, ValueError, "temperature must be 0 .* or a number .* got '1'"),
        ({"top_p": "a"}, ValueError, "top_p must lie in .* got 'a'"),
        ({"params": None}, ValueError, "params must be this model's parameters"),
        ({"key": 42}, TypeError, r"such as jax.random.key\(0\), got 42"),
        ({"key": jax.random.split(KEY)}, TypeError, "one random key"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": True}, ValueError, "top_k must be a whole number .* got True"),
        ({"temperature": 1e-40}, ValueError, "temperature must be 0 .* got 1e-40"),
        ({"top_p": 0}, ValueError, "top_p"),
    ],
)
def test_errors(arguments, change, error, message):
    with pytest.raises(error, match=message):
        generate(**(arguments | {"prompt": "def"} | change))
    if isinstance(change.get("prompt", ""), str):
        with pytest.raises(error, match=message):
            stream(**(arguments | {"prompt": "def"} | change))  # at the call, not at the first text


def spoil(tree, path, value):
    """The tree with one number of the leaf at the path replaced."""
    change = lambda p, leaf: leaf.at[(0,) * leaf.ndim].set(value)  # noqa: E731
    found = lambda p: jax.tree_util.keystr(p, simple=True, separator=".") == path  # noqa: E731
    return jax.tree.map_with_path(lambda p, v: change(p, v) if found(p) else v, tree)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["layers_0.mixer.D", "norm_f.scale", "lm_head.kernel"])
@pytest.mark.parametrize("function", [generate, lambda **kw: list(stream(**kw))])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_parameters_that_are_not_finite(arguments, function, temperature, path, value):
    params = spoil(arguments["params"], path, value)
    changes = {"params": params, "prompt": "def", "temperature": temperature}
    with pytest.raises(ValueError, match=f"the parameters hold NaN or infinity: {path}"):
        function(**(arguments | changes))


@pytest.mark.parametrize("stop", [None, "never"])
def test_logits_that_overflow_after_some_tokens(arguments, stop):
    """A state that is finite and absurd: the text ends with an error, wherever it shows."""
    model, params = arguments["model"], arguments["params"]
    state = read_prompt(model, params=params, tokenizer=arguments["tokenizer"], prompt=["def", "x"])
    layers = jax.tree.map(lambda leaf: leaf.at[1].set(3e38), state.layers)
    changes = {"state": state._replace(layers=layers), "prompt": ["", ""], "stop": stop}
    with pytest.raises(ValueError, match=r"logits are NaN or infinite.*largest number 3.0e\+38"):
        generate(**(arguments | changes))
    layers = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.layers)
    changes["state"] = state._replace(layers=layers)
    first = layers[0]._fields[0]
    with pytest.raises(ValueError, match=f"the state holds NaN or infinity: layers.0.{first}"):
        generate(**(arguments | changes))


def test_parameters_of_another_depth(arguments):
    n = arguments["model"].config.n_layer
    params = arguments["params"] | {f"layers_{n}": arguments["params"]["layers_0"]}
    with pytest.raises(ValueError, match=f"params are another model's: {n + 1} layers, not {n}"):
        generate(**(arguments | {"params": params, "prompt": "def"}))


def test_several_end_tokens(arguments, monkeypatch):
    (ids,) = generated_ids(monkeypatch, arguments, prompt="def", temperature=0)
    changes = {"prompt": "def", "temperature": 0}
    first = min(ids.index(ids[5]), ids.index(ids[-1]))
    expected = generate(**(arguments | changes | {"eos_token_id": ids[first]}))
    for ends in ([ids[5], ids[-1]], (ids[-1], ids[5]), np.array([ids[5], ids[-1]])):
        assert generate(**(arguments | changes | {"eos_token_id": ends})) == expected


def test_stream_takes_one_prompt(arguments):
    with pytest.raises(TypeError, match="one prompt, a str or its token ids, got several"):
        stream(**(arguments | {"prompt": ["def"]}))


def test_whole_variables_instead_of_parameters(arguments):
    with pytest.raises(ValueError, match="params must be this model's parameters"):
        generate(prompt="def", **(arguments | {"params": {"params": arguments["params"]}}))


def test_a_tokenizer_that_does_not_fit(arguments):
    model, params = make_indifferent_model(100)
    with pytest.raises(
        ValueError, match=r"token ids from \d+ to \d+, but the model's vocabulary is 0 … 99"
    ):
        generate(prompt="日本", **(arguments | {"model": model, "params": params}))


def test_stop_strings(arguments):
    """A row ends before the first stop string, wherever it lies, also across calls of the loop."""
    arguments |= {"n_tokens_to_gen": 50, "temperature": 0}
    prompts = ["def", "日本", "x = ("]
    whole = generate(prompt=prompts, **arguments)
    news = [text[len(p) :] for text, p in zip(whole, prompts, strict=True)]
    for i, new in enumerate(news):
        for start in (0, 3, len(new) // 2, len(new) - 2):
            stop = [new[start : start + 2], "never there"]
            cut = [p + n.split(stop[0])[0] for p, n in zip(prompts, news, strict=True)]
            assert generate(prompt=prompts, stop=stop, **arguments) == cut
            streamed = "".join(stream(prompt=prompts[i], stop=stop[0], **arguments))
            assert prompts[i] + streamed == cut[i]


def test_a_stop_string_spares_the_rest(arguments, monkeypatch):
    """At most two calls of the loop, of 16 tokens each, after the first token."""
    arguments |= {"n_tokens_to_gen": 500, "temperature": 0, "prompt": "def"}
    new = generate(**arguments | {"n_tokens_to_gen": 20})[3:]
    (ids,) = generated_ids(monkeypatch, arguments, stop=new[12:14])
    assert len(ids) <= 1 + 32


def test_repetition_penalty(tokenizer, monkeypatch):
    """With equal logits, each token is drawn once, and none of the prompt's is drawn."""
    model, params = make_indifferent_model(tokenizer.get_vocab_size())
    params["norm_f"]["scale"] = jnp.ones_like(params["norm_f"]["scale"])
    params["embedding"]["embedding"] = jnp.ones_like(params["embedding"]["embedding"])
    params["lm_head"]["kernel"] = jnp.ones_like(params["lm_head"]["kernel"])  # all logits 16
    arguments = {"model": model, "params": params, "tokenizer": tokenizer, "key": KEY}
    settings = {"prompt": ["q", "x!"], "n_tokens_to_gen": 100, "top_k": None}
    rows = generated_ids(monkeypatch, arguments, repetition_penalty=1e6, **settings)
    for row, prompt in zip(rows, settings["prompt"], strict=True):
        assert len(set(row)) == 100 and not set(row) & set(tokenizer.encode(prompt).ids)
    rows = generated_ids(monkeypatch, arguments, **settings)
    assert len(set(rows[0])) < 100  # without it, some come twice
    greedy = generated_ids(
        monkeypatch, arguments, repetition_penalty=2.0, **settings | {"temperature": 0}
    )
    assert all(len(set(row)) == 100 for row in greedy)


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_bad_stop_strings(arguments, stop):
    with pytest.raises(ValueError, match="stop must be a non-empty str or a list of such"):
        generate(prompt="a", stop=stop, **arguments)


def test_bfloat16_of_the_embedded_model():
    tokens = jnp.array([Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).encode(TEXT).ids])
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model, params = Mamba.from_pretrained(EMBEDDED, dtype=dtype)
        apply, state = jax.jit(model.apply), model.initial_state(1)
        logits[dtype], state = apply({"params": params}, tokens, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    full, half = logits.values()
    assert 1e-4 < jnp.abs(full - half).max() / jnp.abs(full).max() < 2e-2


def test_bfloat16_weights_give_the_text_of_their_values_in_float32(arguments):
    """On a CPU, where they are converted once."""
    model, params = arguments["model"], arguments["params"]
    half = model.clone(config=dataclasses.replace(model.config, dtype=jnp.bfloat16))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    upcast, values = upcast_on_cpu(half, rounded)
    settings = arguments | {"prompt": "def", "n_tokens_to_gen": 12}
    text = generate(**settings | {"model": upcast, "params": values})
    narrow = settings | {"model": half, "params": rounded}
    assert generate(**narrow) == text
    assert "def" + "".join(stream(**narrow)) == text
