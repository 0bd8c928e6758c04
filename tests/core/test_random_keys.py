import jax

from sdjax.core.random_keys import fold_in_name


def test_names_with_a_common_prefix_give_different_keys():
    key = jax.random.key(0)
    names = ["", "gene", "generation", "generator", "generation/1", "generation/10"]
    data = {tuple(jax.random.key_data(fold_in_name(key, name)).tolist()) for name in names}
    assert len(data) == len(names)


def test_same_name_and_key_give_the_same_key():
    key = jax.random.key(7)
    assert fold_in_name(key, "shuffle") == fold_in_name(key, "shuffle")
    assert fold_in_name(key, "shuffle") != fold_in_name(jax.random.key(8), "shuffle")
