import pytest

from sdjax.core.errors import UserError
from sdjax.merging.scope import select_paths

PATHS = ["embed", "layers/0/mlp/up_proj", "layers/1/mlp/up_proj", "layers/1/attn/q_proj"]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("mlp", PATHS[1:3]),
        ("attention", PATHS[3:]),
        ("all", sorted(PATHS)),
        ("layers/1/*", ["layers/1/attn/q_proj", "layers/1/mlp/up_proj"]),
        (["embed", "*/q_proj"], ["embed", "layers/1/attn/q_proj"]),
    ],
)
def test_select_paths(scope, expected):
    assert list(select_paths(PATHS, scope)) == expected


def test_pattern_without_a_match_raises_user_error():
    with pytest.raises(UserError, match="scope '\\*/moe/\\*' matches no tensor"):
        select_paths(PATHS, ["*/mlp/*", "*/moe/*"])
    with pytest.raises(UserError, match="scope is empty"):
        select_paths(PATHS, [])
