"""Canonical paths, layers and kinds of tensors in the spellings of other libraries."""

import pytest

from sdjax.models.families import FAMILIES
from sdjax.models.params import param_specs
from sdjax.models.tensor_names import layer_depths, name_tensors, parse_name
from sdjax.testing import tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_all_spellings_of_a_tensor_have_one_name(family):
    for path, spec in param_specs(tiny_config(family)).items():
        name = parse_name(path)
        assert name.path == path
        nested = spec.hf_name.replace(".", "/")
        for spelling in (spec.hf_name, nested, f"params/{path}", path.replace("/", ".")):
            assert parse_name(spelling) == name
        assert spec.hf_name in name.spellings


@pytest.mark.parametrize(
    ("name", "stack", "layer", "kind"),
    [
        ("transformer.h.7.mlp.c_fc.weight", "transformer/h", 7, "mlp.c_fc.weight"),
        ("gpt_neox.layers.11.attention.dense.bias", "gpt_neox/layers", 11, "attention.dense.bias"),
        ("blocks/7/kernel", "blocks", 7, "kernel"),
        ("params/Block_3/Dense_0/kernel", "params/Block", 3, "Dense_0.kernel"),
        ("Transformer/encoderblock_2/w", "Transformer/encoderblock", 2, "w"),
        ("transformer/layer_10/attn/q/w", "transformer/layer", 10, "attn.q.w"),
        ("layers/3", "layers", 3, "layers"),
        ("features.4.weight", "features", 4, "weight"),
        # The outermost stack is the model's.
        ("stages.1.blocks.3.w", "stages", 1, "blocks.3.w"),
        ("encoder.block.3.layer.0.k.weight", "encoder/block", 3, "layer.0.k.weight"),
        ("0/layers/5/w", "0/layers", 5, "w"),
        # Known tensors of a layer have their kind in every stack.
        ("vision.layers.1.self_attn.q_proj.weight", "vision/layers", 1, "attn.q_proj"),
        ("model.layers.2.self_attn.kv_b.weight", "layers", 2, "attn.kv_b.weight"),
        ("model.layers.2.mlp.experts.5.w", "layers", 2, "mlp.experts.5.w"),
        # Numbers that do not count layers: an expert, a version, a tuple (kernel, bias).
        ("moe.experts.5.w", None, None, "moe.experts.5.w"),
        ("Dense_0/kernel", None, None, "Dense_0.kernel"),
        ("dense/1", None, None, "dense.1"),
        ("net/~/first/w", None, None, "net.~.first.w"),
    ],
)
def test_layers_are_recognized_by_their_number(name, stack, layer, kind):
    found = parse_name(name)
    assert (found.stack, found.layer, found.kind) == (stack, layer, kind)
    assert parse_name(found.path) == found


def test_a_list_of_equal_layers_is_a_stack():
    names = name_tensors(["0/0", "0/1", "1/0", "1/1"])
    assert [(name.layer, name.path) for name in names.values()] == [
        (0, "layers/0/0"),
        (0, "layers/0/1"),
        (1, "layers/1/0"),
        (1, "layers/1/1"),
    ]
    for other in (["0", "1/w"], ["0/w"], ["0/layers/0/w", "1/layers/0/w"], ["0/w", "1/w", "x"]):
        assert all(name.stack != "layers" for name in name_tensors(other).values())


def test_canonical_paths_of_a_model_are_distinct():
    names = ["embed", "model.embed_tokens.weight", "layers/0/mlp/up_proj", "lm_head.weight"]
    paths = [name.path for name in name_tensors(names).values()]
    assert paths == ["embed", "model.embed_tokens.weight", "layers/0/mlp/up_proj", "lm_head"]


def test_depth_is_counted_per_stack():
    names = ["model.layers.0.w", "model.layers.4.w", "mtp.layers.0.w", "head"]
    names += [f"blocks_{i}/w" for i in (1, 2, 3)]  # numbered from one
    depths = layer_depths(name_tensors(names).values())
    assert list(depths.values()) == [0.0, 1.0, 0.0, -1.0, 0.0, 0.5, 1.0]
    assert parse_name("layers/3/w").depth(7) == 0.5
    assert parse_name("layers/0/w").depth(1) == 0.0
    assert parse_name("head").depth(7) == -1.0
