from dataclasses import replace

import pytest
from pydantic import ValidationError

from sdjax.decoding.config import DecoderConfig, common_prefix, fit_decoder_config
from sdjax.testing import tiny_config


def test_prompts_are_divided_equally_among_three_buckets():
    model_config = tiny_config(max_seq_len=128)
    prompts = [[5] * 20 + [n] * n for n in range(6, 66)]
    config = fit_decoder_config(model_config, prompts, 32)
    assert config.prefix == (5,) * 20
    assert config.buckets == (32, 48, 72)
    assert (config.slots, config.prefill_batch) == (32, 2)
    assert fit_decoder_config(model_config, prompts[:1], 32).slots == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": (0, 8)}, "greater than or equal to 1"),
        ({"buckets": (8, 8)}, "must be distinct and ascending"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"slots": 2, "prefill_batch": 3}, r"prefill_batch \(3\) must be at most slots \(2\)"),
    ],
)
def test_invalid_sizes_raise_validation_error(changes, message):
    with pytest.raises(ValidationError, match=message):
        replace(DecoderConfig(), **changes)


def test_common_prefix_leaves_each_prompt_a_token():
    assert common_prefix([[5, 6, 7], [5, 6, 8, 9]]) == (5, 6)
    assert common_prefix([[5, 6], [5, 6, 8]]) == (5,)
    assert common_prefix([[5], [6]]) == ()
