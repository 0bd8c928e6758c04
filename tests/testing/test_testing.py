import doctest

import jax

import sdjax.testing
from sdjax.models.families import FAMILIES
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten


def test_docstring_examples_pass():
    results = doctest.testmod(sdjax.testing)
    assert results.attempted
    assert not results.failed


def test_tiny_models_exist_for_every_family():
    for family in FAMILIES:
        config, params = sdjax.testing.tiny_model(family)
        assert flatten(params).keys() == param_specs(config).keys()


def test_unknown_characters_become_the_unknown_token():
    tokenizer = sdjax.testing.tiny_tokenizer()
    assert tokenizer.encode("aéa", add_special=True) == [3, 2, 3]
    assert tokenizer.decode([3, 2, 1, 3]) == "aa"
    assert tokenizer.decode([3, 2, 1], skip_special=False) == "a<unk><eos>"


def test_counter_stops_after_the_block():
    with sdjax.testing.count_compilations() as compilations:
        pass
    jax.jit(lambda x: x + 41)(1.0)
    assert compilations.count == 0
