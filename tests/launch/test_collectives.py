from launch import collectives, hlo

TEXT = """HloModule m

%body (c: (u32[], bf16[4,128])) -> (u32[], bf16[4,128]) {
  %c = (u32[], bf16[4,128]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  %x = bf16[4,128]{1,0} get-tuple-element(%c), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %sent = (bf16[4,128]{1,0}, bf16[4,128]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %came = bf16[4,128]{1,0} collective-permute-done(%sent)
  ROOT %out = (u32[], bf16[4,128]) tuple(%next, %came)
}

%condition (c.1: (u32[], bf16[4,128])) -> pred[] {
  %c.1 = (u32[], bf16[4,128]) parameter(0)
  %i.1 = u32[] get-tuple-element(%c.1), index=0
  %end = u32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

%starts (p: bf16[4,128]) -> (bf16[4,128], bf16[16,128], u32[]) {
  %p = bf16[4,128]{1,0} parameter(0)
  %whole = bf16[16,128]{1,0} all-gather(%p), dimensions={0}, metadata={op_name="layer/weights"}
  ROOT %start = (bf16[4,128]{1,0}, bf16[16,128]{1,0}, u32[]) custom-call(%whole), target="AsyncCollectiveStart"
}

%goes_on (q: bf16[4,128]) -> bf16[16,128] {
  %q = bf16[4,128]{1,0} parameter(0)
  %again = bf16[16,128]{1,0} all-gather(%q), dimensions={0}
  ROOT %other = bf16[16,128]{1,0} copy(%again)
}

ENTRY %main (a: bf16[4,128]) -> f32[64] {
  %a = bf16[4,128]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %init = (u32[], bf16[4,128]) tuple(%zero, %a)
  %loop = (u32[], bf16[4,128]) while(%init), condition=%condition, body=%body
  %gather = (bf16[4,128]{1,0}, bf16[16,128]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%starts
  %beside = bf16[16,128]{1,0} fusion(%a), kind=kCustom, calls=%goes_on
  %part = f32[64]{0} parameter(1)
  ROOT %sum = f32[64]{0} all-reduce(%part), to_apply=%add
}
"""


def test_collectives_count_as_often_as_they_run_and_once():
    found = collectives.collectives(hlo.Program(TEXT))
    # The loop counts to 8 in steps of two; a gather that runs beside other work is counted where it starts.
    assert collectives.by_kind(found) == {
        "collective-permute": 4 * 4 * 128 * 2,
        "all-gather": 16 * 128 * 2,
        "all-reduce": 64 * 4,
    }
    gather = next(one for one in found if one.kind == "all-gather")
    assert (gather.dims, gather.times, gather.source) == ((16, 128), 1, "layer/weights")
