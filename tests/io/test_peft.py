import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.core.errors import UserError
from sdjax.io.adapted_reader import open_weights
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import locate, model_folder
from sdjax.io.peft import merged_base, read_adapter, write_adapter
from sdjax.models.lora import init_adapter, merge_lora
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten, unflatten
from sdjax.sharding.mesh import make_mesh
from sdjax.testing import tiny_config
from tests.fuzzing.torch_files import torch_file

Q, HEAD, EMBED = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"
RNG = np.random.default_rng(0)
MODEL = {
    f"{Q}.weight": RNG.standard_normal((6, 4)),
    f"{HEAD}.weight": RNG.standard_normal((9, 4)),
    f"{EMBED}.weight": RNG.standard_normal((9, 4)),
}
A, B = (
    RNG.standard_normal((2, 4)).astype(np.float32),
    RNG.standard_normal((6, 2)).astype(np.float32),
)
EMBED_A = RNG.standard_normal((2, 9)).astype(np.float32)
EMBED_B = RNG.standard_normal((4, 2)).astype(np.float32)
WHOLE = RNG.standard_normal((9, 4)).astype(np.float32)


def adapted(tmp_path, tensors=None, dtype=np.float32, **settings):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir(exist_ok=True)
    adapter.mkdir(exist_ok=True)
    save_file({n: x.astype(dtype) for n, x in MODEL.items()}, model / "model.safetensors")
    if tensors is None:
        tensors = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
    prefixed = {f"base_model.model.{n}": np.ascontiguousarray(x) for n, x in tensors.items()}
    save_file(prefixed, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return open_weights(model, adapter)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 8}}, 4.0),
        ({"alpha_pattern": {"k_proj": 8}}, 1.5),
        ({"alpha_pattern": {"layers.[0-3].self_attn.(q|k)_proj": 8}}, 4.0),
    ],
)
def test_lora_product_is_added_with_scale(tmp_path, settings, scale):
    got = adapted(tmp_path, **settings).read(f"{Q}.weight")
    np.testing.assert_allclose(got, MODEL[f"{Q}.weight"] + scale * B @ A, rtol=1e-5, atol=1e-6)


def test_other_tensors_are_unchanged(tmp_path):
    folder = adapted(tmp_path)
    assert folder.names == tuple(sorted(MODEL))
    assert folder.shape(f"{HEAD}.weight") == (9, 4)
    np.testing.assert_array_equal(
        folder.read(f"{HEAD}.weight"), MODEL[f"{HEAD}.weight"].astype(np.float32)
    )


def test_adapted_tensor_is_rounded_once_to_stored_dtype(tmp_path):
    folder = adapted(tmp_path, dtype=ml_dtypes.bfloat16)
    got = folder.read(f"{Q}.weight")
    stored = MODEL[f"{Q}.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got, (stored + 1.5 * (B @ A)).astype(ml_dtypes.bfloat16))
    assert got.dtype == folder.dtype(f"{Q}.weight") == ml_dtypes.bfloat16


def test_embeddings_and_replaced_tensors(tmp_path):
    tensors = {
        f"{EMBED}.lora_embedding_A": EMBED_A,
        f"{EMBED}.lora_embedding_B": EMBED_B,
        f"{HEAD}.weight": WHOLE,
    }
    folder = adapted(tmp_path, tensors)
    np.testing.assert_array_equal(folder.read(f"{HEAD}.weight"), WHOLE)
    want = MODEL[f"{EMBED}.weight"] + 1.5 * (EMBED_B @ EMBED_A).T
    np.testing.assert_allclose(folder.read(f"{EMBED}.weight"), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (None, {"peft_type": "IA3"}, "not a LoRA adapter"),
        (None, {"use_dora": True}, "q_proj has no lora_magnitude_vector, though use_dora is set"),
        ({f"{Q}.lora_A.weight": A}, {}, "has no matching tensor"),
        ({f"{Q}.lora_B.weight": B}, {}, "has no matching tensor"),
        ({}, {}, "contains no adapter weights"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:, :1]}, {}, "cannot be multiplied"),
        ({f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]}, {}, "cannot be multiplied"),
        (None, {"lora_alpha": "x"}, "alpha must be a number, not 'x'"),
        (None, {"lora_alpha": 10**200}, "alpha must be a number, not 1000"),
        (None, {"lora_alpha": math.nan}, "alpha must be a number, not nan"),
        (None, {"lora_alpha": True}, "alpha must be a number, not True"),
        (None, {"use_rslora": "no"}, "use_rslora must be true or false, not 'no'"),
        (None, {"alpha_pattern": {"(": 8}}, "alpha_pattern must be a mapping of regular expr"),
        (None, {"alpha_pattern": {"(a+)+$|(?=q)": 8}}, r"\(\? is not supported.*merge the adapter"),
        (None, {"alpha_pattern": {"q_proj": "8"}}, "alpha must be a number, not '8'"),
        (None, {"alpha_pattern": {"q_proj": [], ".*": True}}, r"alpha must be a number, not \[\]"),
        (None, {"alpha_pattern": 5}, "alpha_pattern must be a mapping .*not 5"),
        (None, {"peft_type": ["LORA"]}, "not a LoRA adapter"),
        (None, {"use_dora": "false"}, "use_dora must be true or false, not 'false'"),
        (None, {"alora_invocation_tokens": [1]}, "changes only a part of each text"),
        (None, {"use_qalora": True}, "use_qalora is not supported; merge it with peft"),
        (None, {"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        (None, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.* starts from changed weig"),
        (None, {"init_lora_weights": "olora"}, "olora.* starts from changed weights"),
        (None, {"target_parameters": "x"}, "target_parameters must be a list of names"),
        (None, {"alpha_pattern": ["q_proj"]}, "alpha_pattern must be a mapping of regular expr"),
        ({"model.x.lora_A.weight": A, "model.x.lora_B.weight": B}, {}, "adapts model.x.weight"),
        ({f"{Q}.lora_magnitude_vector": A}, {}, "lora_magnitude_vector.* is not supported"),
    ],
)
def test_unsupported_adapter_raises_user_error(tmp_path, tensors, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        adapted(tmp_path, tensors, **settings)
    assert "\n" not in str(caught.value)


def test_read_box_equals_slice_of_read(tmp_path):
    tensors = {
        f"{Q}.lora_A.weight": A,
        f"{Q}.lora_B.weight": B,
        f"{EMBED}.lora_embedding_A": EMBED_A,
        f"{EMBED}.lora_embedding_B": EMBED_B,
        f"{HEAD}.weight": WHOLE,
    }
    folder = adapted(tmp_path, tensors)
    box = (slice(1, 5), slice(2, 4))
    for name in MODEL:
        np.testing.assert_allclose(folder.read_box(name, box), folder.read(name)[box], rtol=1e-6)


def test_merged_on_load_equals_merge_lora(tmp_path):
    """Check both a single device and a mesh."""
    seed = model_folder("zoo:seed")
    config, params = load_model(seed, dtype=np.float32)
    fresh = init_adapter(config, jax.random.key(0), rank=2, alpha=6)
    noise = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * noise.standard_normal(leaf.shape), jnp.float32), fresh
    )
    write_adapter(tmp_path / "adapter", config, trained, base="seed")
    folder, adapter = locate(f"zoo:seed+{tmp_path / 'adapter'}")
    assert folder == seed
    assert adapter is not None
    _, folded = load_model(seed, adapter=adapter, dtype=np.float32)
    factors = read_adapter(adapter, config, model=seed)
    expected = flatten(merge_lora(params, factors))
    for path, leaf in flatten(folded).items():
        # Stored in bfloat16, so it is rounded once more than in memory.
        np.testing.assert_allclose(leaf, expected[path], rtol=2**-8, atol=1e-6)
    stored = flatten(load_model(seed)[1])
    sharded = flatten(load_model(seed, adapter=adapter, mesh=make_mesh({"tensor": 1}))[1])
    for path, leaf in sharded.items():
        assert leaf.dtype == stored[path].dtype
        np.testing.assert_array_equal(leaf.astype(np.float32), flatten(folded)[path])


def test_change_of_wrong_shape_raises_user_error(tmp_path):
    folder = adapted(tmp_path, {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:5]})
    with pytest.raises(UserError, match=r"has an update of shape \[5, 4\]"):
        folder.read(f"{Q}.weight")


CONFIG = tiny_config(
    vocab_size=32, hidden_size=8, intermediate_size=12, num_heads=2, num_kv_heads=1, head_dim=4
)


def trained_adapter(**options):
    fresh = init_adapter(CONFIG, jax.random.key(0), rank=2, alpha=3, **options)
    return jax.tree.map(lambda leaf: leaf + 0.1, fresh)


def test_write_and_read_adapter(tmp_path):
    adapter = trained_adapter(target_modules=("attn.q_proj", "mlp.down_proj"))
    write_adapter(tmp_path / "a", CONFIG, adapter, base="org/model")
    found = read_adapter(tmp_path / "a", CONFIG, model=tmp_path)
    assert found.scale == adapter.scale == 1.5
    jax.tree.map(np.testing.assert_array_equal, found.factors, adapter.factors)
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    assert (settings["r"], settings["lora_alpha"]) == (2, 3.0)
    with pytest.raises(UserError, match="exists and is not empty"):
        write_adapter(tmp_path / "a", CONFIG, adapter, base="org/model")


def test_adapter_of_a_merged_model_gives_one_warning(tmp_path, caplog):
    adapter = trained_adapter(target_modules=("attn.q_proj",))
    write_adapter(tmp_path / "seed", CONFIG, adapter, base="org/model")
    base = merged_base("first", "program:" + "0f" * 16)
    write_adapter(tmp_path / "merged", CONFIG, adapter, base=base)
    read_adapter(tmp_path / "seed", CONFIG, model=tmp_path)
    read_adapter(tmp_path / "merged", CONFIG, model=tmp_path, is_base=True)
    assert not caplog.messages
    for _ in range(2):
        read_adapter(tmp_path / "merged", CONFIG, model=tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'merged'}: this adapter was trained on the merged ")
    assert base in message


def test_different_ranks_are_written_as_peft_reads_them(tmp_path):
    wide, narrow = (
        init_adapter(CONFIG, jax.random.key(0), rank=rank, alpha=2 * rank, target_modules=kinds)
        for rank, kinds in ((4, ("attn.q_proj",)), (2, ("attn.k_proj",)))
    )
    factors = unflatten(flatten(wide.factors) | flatten(narrow.factors))
    adapter = dataclasses.replace(wide, factors=factors)
    write_adapter(tmp_path / "a", CONFIG, adapter, base="org/model")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    keys = [f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)]
    assert (settings["r"], settings["rank_pattern"]) == (4, dict.fromkeys(keys, 2))
    assert (settings["lora_alpha"], settings["alpha_pattern"]) == (8, dict.fromkeys(keys, 4))
    assert read_adapter(tmp_path / "a", CONFIG, model=tmp_path).scale == 2
    settings["alpha_pattern"] = {"k_proj": 8}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter_config\.json: rank_pattern and alpha_pattern"):
        read_adapter(tmp_path / "a", CONFIG, model=tmp_path)


@pytest.mark.slow
def test_names_and_scale_of_a_written_adapter_are_those_of_transformers(tmp_path):
    """Apply the folder to transformers' modules, as PEFT does, and compare the logits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = model_folder("zoo:seed")
    config, params = load_model(folder, dtype=np.float32)
    adapter = init_adapter(config, jax.random.key(0), rank=2, alpha=4)
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, adapter)
    write_adapter(tmp_path / "a", config, adapter, base="zoo:seed")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [name for name in stored if name.endswith(".lora_A.weight")]
    assert len(names) == 7 * config.num_layers
    for name in names:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert module.split(".")[-1] in settings["target_modules"]
        a, b = stored[name], stored[name.replace("lora_A", "lora_B")]
        change = settings["lora_alpha"] / settings["r"] * b @ a
        model.get_submodule(module).weight.data += torch.from_numpy(change)
    tokens = np.arange(5, 17)[None]
    positions = np.arange(tokens.shape[1])[None]
    hidden, _ = forward(params, adapter, tokens, config=config, positions=positions)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(unembed(params, hidden, config=config), expected, atol=1e-3)


def test_adapter_of_another_model_raises_user_error(tmp_path):
    write_adapter(tmp_path / "a", CONFIG, trained_adapter(), base="org/model")
    shallow = dataclasses.replace(CONFIG, num_layers=1)
    with pytest.raises(UserError, match=r"adapts model\.layers\.1.*which other does not have"):
        read_adapter(tmp_path / "a", shallow, model=Path("other"))
    wide = dataclasses.replace(CONFIG, intermediate_size=16)
    with pytest.raises(UserError, match="use the model that it was trained for"):
        read_adapter(tmp_path / "a", wide, model=Path("other"))


REFERENCES = json.loads((Path(__file__).parent / "peft_references/references.json").read_text())


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("stored", ["adapter_model.safetensors", "adapter_model.bin"])
def test_merged_weights_equal_those_of_peft(tmp_path, name, stored):
    """The references come from PEFT itself (`peft_references/make_references.py`)."""
    reference = REFERENCES[name]
    arrays = {
        part: {n: np.array(values, np.float32) for n, values in reference[part].items()}
        for part in ("model", "adapter", "merged")
    }
    save_file(arrays["model"], tmp_path / "model.safetensors")
    if stored.endswith(".bin"):
        (tmp_path / stored).write_bytes(torch_file(arrays["adapter"]))
    else:
        save_file(arrays["adapter"], tmp_path / stored)
    (tmp_path / "adapter_config.json").write_text(json.dumps(reference["settings"]))
    reader = open_weights(tmp_path, tmp_path)
    assert len(reader.adapted) == len(arrays["adapter"]) // (3 if "dora" in name else 2)
    for tensor, expected in arrays["merged"].items():
        np.testing.assert_allclose(reader.read(tensor), expected, rtol=1e-6, atol=1e-7)
        for index in np.ndindex(expected.shape):  # such as a shard on a mesh
            box = tuple(slice(i, None) for i in index)
            part = reader.read_box(tensor, box)
            np.testing.assert_allclose(part, expected[box], rtol=1e-6, atol=1e-7)


def test_parameters_that_shapes_do_not_decide_are_refused(tmp_path):
    reference = REFERENCES["parameters"]
    model = {n: np.array(v, np.float32) for n, v in reference["model"].items()}
    adapter = {n: np.array(v, np.float32) for n, v in reference["adapter"].items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(reference["settings"]))
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    for shape in ((2, 3, 3), (2, 5, 3), (3, 4, 3), (4,)):
        changed = {**model, "experts.gate_up_proj": np.zeros(shape, np.float32)}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"the shapes in .* do not decide which") as error:
            open_weights(tmp_path, tmp_path)
        assert "\n" not in str(error.value)
