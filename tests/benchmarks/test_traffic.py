"""The memory traffic of an executable, read from its HLO text."""

from benchmarks.planning.traffic import Transfer, entry_transfers, loop_transfers, sum_by_role

# Weights and a cache: the loop copies both to on-chip memory, adds a row to the cache in place,
# multiplies, and copies the cache back.
PROGRAM = """HloModule jit_advance

%body (p: (bf16[4,8], bf16[8,8])) -> (bf16[4,8], bf16[8,8]) {
  %p = (bf16[4,8]{1,0}, bf16[8,8]{1,0:T(8,128)}) parameter(0)
  %c = bf16[4,8]{1,0} get-tuple-element(%p), index=0
  %w = bf16[8,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %halves = ((bf16[8,8]{1,0:T(8,128)}), bf16[4,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w)
  %half = bf16[4,8]{1,0:S(1)} slice-done(%halves)
  %joined = bf16[8,8]{1,0:S(1)} custom-call(%half, %half), custom_call_target="ConcatBitcast"
  %coming = (bf16[4,8]{1,0:S(1)}, bf16[4,8]{1,0}, u32[]{:S(2)}) copy-start(%c)
  %near = bf16[4,8]{1,0:S(1)} copy-done(%coming)
  %row = bf16[1,8]{1,0:S(1)} constant({...})
  %added = bf16[4,8]{1,0:S(1)} fusion(%near, %row), metadata={op_name="jit(advance)/scatter"}
  %sums = f32[4]{0:S(1)} fusion(%added, %joined), kind=kOutput, calls=%f
  %going = (bf16[4,8]{1,0}, bf16[4,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%added)
  %back = bf16[4,8]{1,0} copy-done(%going)
  ROOT %out = (bf16[4,8]{1,0}, bf16[8,8]{1,0:T(8,128)}) tuple(%back, %w)
}

ENTRY %main (c: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %weights = bf16[8,8]{1,0:T(8,128)} parameter(1), metadata={op_name="params['w']"}
  %cache = bf16[4,8]{0,1} parameter(0), metadata={op_name="state.cache"}
  %turned = bf16[4,8]{1,0} copy(%cache)
  %carried = (bf16[4,8]{1,0}, bf16[8,8]{1,0:T(8,128)}) tuple(%turned, %weights)
  %loop = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) while(%carried), condition=%more, body=%body
  ROOT %kept = bf16[4,8]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_transfers_outside_the_loop():
    assert entry_transfers(PROGRAM) == [
        Transfer(written=False, on_chip=False, source="state.cache", size=64),
        Transfer(written=True, on_chip=False, source=None, size=64),
    ]


def test_loop_transfers_are_summed_by_memory_and_argument():
    def role(source, size):
        return source or ("cache" if size == 64 else "a row" if size == 16 else "the rest")

    assert sum_by_role(loop_transfers(PROGRAM), role) == {
        # (on chip, written, role)
        (False, False, "params['w']"): 64,
        (False, False, "cache"): 64,
        (False, True, "cache"): 64,
        (True, False, "params['w']"): 128,
        (True, False, "cache"): 2 * 64,  # multiplied, and copied back
        (True, True, "cache"): 2 * 64,  # half of the weights has the same size
        (True, False, "a row"): 16,  # added in place
        (True, True, "a row"): 2 * 16,  # and the sums
    }
