from sdjax.planning.traffic import by_role, operations

PROGRAM = """HloModule jit_step

%fused (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %negated = bf16[4,8]{1,0} negate(%p)
}

ENTRY %main (w: bf16[8,8], c: bf16[4,8]) -> (bf16[4,8], f32[4]) {
  %w = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params['w']"}
  %c = bf16[4,8]{1,0} parameter(1), metadata={op_name="state.cache"}
  %near = (bf16[8,8]{1,0:S(1)}, bf16[8,8]{1,0}, u32[]) copy-start(%w)
  %nearer = bf16[8,8]{1,0:S(1)} copy-done(%near)
  %out = bf16[4,8]{1,0} fusion(%c, %nearer), kind=kOutput, calls=%fused
  %sums = f32[4]{0} reduce(%out), dimensions={1}
  ROOT %both = (bf16[4,8]{1,0}, f32[4]{0}) tuple(%out, %sums)
}
"""


def test_operands_are_traced_to_arguments_and_what_moves_nothing_counts_nothing():
    fusion, reduction = operations(PROGRAM)
    assert fusion.reads == (("state.cache", 64), ("params['w']", 128))
    assert (fusion.kind, fusion.writes) == ("fusion", 64)
    assert reduction.reads == ((None, 64),)
    assert reduction.writes == 16


def test_bytes_by_role():
    def role(source, size):
        return source or ("large" if size >= 64 else "small")

    assert by_role(operations(PROGRAM), role) == {
        ("read", "state.cache"): 64,
        ("read", "params['w']"): 128,
        ("read", "large"): 64,
        ("written", "large"): 64,
        ("written", "small"): 16,
    }
