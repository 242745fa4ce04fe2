from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from launch import hlo

# A scan over four layers as the TPU compiler schedules it: weights and cache in HBM, what is small in VMEM, S(1).
SCAN = Path(__file__).with_name("scan.hlo").read_text(encoding="utf-8")
CACHE = 4 * 16 * 64 * 128
BODY = "  %at = s32[16]"


def program_with(*lines: str) -> hlo.Program:
    """`SCAN` with more lines in the body, which may use %cache, %w and %x."""
    return hlo.Program(SCAN.replace(BODY, "".join(f"  {line}\n" for line in lines) + BODY))


@pytest.mark.parametrize(
    ("text", "expected", "space"),
    [
        ("bf16[28,16,4096,1,128]{4,2,1,0,3:T(8,128)(2,1)}", 28 * 16 * 4096 * 128 * 2, 0),
        ("bf16[28,16,4096,1,128]{4,3,2,1,0:T(8,128)(2,1)}", 28 * 16 * 4096 * 8 * 128 * 2, 0),
        ("bf16[2,3584]{1,0:T(2,128)(2,1)S(1)}", 2 * 3584 * 2, 1),
        ("f32[16]{0:T(128)}", 128 * 4, 0),
        ("s32[16,1]{0,1:T(1,128)S(1)}", 128 * 4, 1),
        ("pred[3,5]{1,0}", 15, 0),
        ("s4[6]{0}", 3, 0),
        ("f8e4m3fn[7]{0}", 7, 0),
        ("u32[]{:S(2)}", 4, 2),
        ("f32[7]", 28, 0),
    ],
)
def test_sizes_hold_the_padding_of_tiles(text, expected, space):
    array, rest = hlo.parse_shape(text + " copy(%x)")
    assert (array.bytes, array.space, rest) == (expected, space, " copy(%x)")


def test_a_tuple_is_read_with_its_parts():
    shape, rest = hlo.parse_shape("((f32[2]{0:T(128)}, s32[]), /*index=1*/bf16[3,4]{1,0}) while(")
    assert rest == " while("
    assert shape[0][0].dims == (2,)
    assert shape[1].dims == (3, 4)


def reads_of(program: hlo.Program) -> dict[str, hlo.Read]:
    """What the whole program reads, by instruction."""
    found = program.reads(program.computations[program.entry])
    return {read.instruction: read for read in found}


def test_a_scan_reads_its_slices_once_a_layer():
    reads = reads_of(program_with())
    layer = 128 * 256 * 2
    assert reads["y"].bytes == reads["start"].bytes == 4 * layer
    assert reads["y"].times == 4
    assert reads["y"].source == "jit(step)/dot"
    # The written rows come from VMEM, and the cache around them is not read.
    assert "grown" not in reads
    assert hlo.total_bytes(reads.values()) == 8 * layer + sum(
        reads[name].bytes for name in reads if name not in ("y", "start")
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%r = f32[] reduce(%cache, %one), to_apply=%assign", CACHE * 2 + 512),
        ("%r = bf16[4,16,64,128]{3,2,1,0:T(8,128)(2,1)S(1)} copy(%cache)", CACHE * 2),
        ("%r = bf16[4,1,64,128]{3,2,1,0:T(8,128)(2,1)} slice(%cache)", 4 * 64 * 128 * 2),
        ("%r = bf16[16,128]{1,0:T(8,128)(2,1)} gather(%cache, %at), index_vector_dim=1", 16 * 256),
        ("%r = bf16[16,128]{1,0:T(8,128)(2,1)} add(%x, %x)", 0),
        ("%r = bf16[16]{0} fusion(%w, %cache), kind=kLoop, calls=%unused", CACHE * 2),
    ],
)
def test_operands_count_whole_unless_they_are_sliced(line, expected):
    unused = """
%unused (a: bf16[4,128,256], b: bf16[4,16,64,128]) -> bf16[16] {
  %a = bf16[4,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,16,64,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %sum = bf16[16]{0} reduce(%b), to_apply=%assign
}
"""
    text = SCAN.replace("ROOT %out", line + "\n  ROOT %out").replace("\n%body", unused + "\n%body")
    reads = reads_of(hlo.Program(text))
    assert (reads["r"].bytes if "r" in reads else 0) == 4 * expected


def test_a_loop_without_a_known_end_cannot_be_counted():
    text = SCAN.replace("constant(4)", "parameter(1)")
    with pytest.raises(hlo.HloError, match="%while has no constant number"):
        reads_of(hlo.Program(text))


@pytest.mark.parametrize(
    "line",
    [
        "%c = bf16[4,16,64,128]{3,2,1,0:T(8,128)(2,1)} copy(%cache)",
        "%c = bf16[4,64,16,128]{3,2,1,0:T(8,128)(2,1)} transpose(%cache), dimensions={0,2,1,3}",
        "%c = f32[4096,128]{1,0:T(8,128)} convert(%cache)",
        "%c = (bf16[4,16,32,128]{3,2,1,0}, bf16[4,16,32,128]{3,2,1,0}) fusion(%cache), kind=kLoop, calls=%halves",
        "%c = (bf16[4,16,64,128]{3,2,1,0:S(1)}, bf16[4,16,64,128]{3,2,1,0}, u32[]) copy-start(%cache)",
        "%c = bf16[4,16,64,128]{3,2,1,0} broadcast(%one), dimensions={}",
    ],
)
def test_copies_of_the_cache_are_found(line):
    halves = """
%halves (p: bf16[4,16,64,128]) -> (bf16[4,16,32,128], bf16[4,16,32,128]) {
  %p = bf16[4,16,64,128]{3,2,1,0} parameter(0)
  %low = bf16[4,16,32,128]{3,2,1,0} slice(%p), slice={[0:4], [0:16], [0:32], [0:128]}
  %high = bf16[4,16,32,128]{3,2,1,0} slice(%p), slice={[0:4], [0:16], [32:64], [0:128]}
  ROOT %both = (bf16[4,16,32,128]{3,2,1,0}, bf16[4,16,32,128]{3,2,1,0}) tuple(%low, %high)
}
"""
    # 4096 x 128 scalars are the cache's too.
    line = line.replace("4096,128", f"{CACHE // 128},128")
    text = SCAN.replace("ROOT %out", line + "\n  ROOT %out").replace("\n%body", halves + "\n%body")
    assert [copied.name for copied in hlo.Program(text).copies(CACHE)] == ["c"]


def test_updates_in_place_and_smaller_results_are_no_copies():
    assert not program_with().copies(CACHE)
    assert not program_with("%c = bf16[16,128]{1,0} copy(%x)").copies(CACHE)


def test_a_conditional_counts_as_its_most_expensive_branch():
    branches = """
%small (p.1: bf16[4,16,64,128]) -> f32[] {
  %p.1 = bf16[4,16,64,128]{3,2,1,0} parameter(0)
  ROOT %nothing = f32[] constant(0)
}

%large (p.2: bf16[4,16,64,128]) -> f32[] {
  %p.2 = bf16[4,16,64,128]{3,2,1,0} parameter(0)
  %moved = bf16[4,16,64,128]{3,2,1,0} copy(%p.2)
  ROOT %r.2 = f32[] reduce(%moved), to_apply=%assign
}
"""
    line = "%c = f32[] conditional(%i, %cache, %cache), branch_computations={%small, %large}"
    text = SCAN.replace("ROOT %out", line + "\n  ROOT %out")
    program = hlo.Program(text.replace("\n%body", branches + "\n%body"))
    assert reads_of(program)["moved"].bytes == 4 * CACHE * 2
    assert [copied.name for copied in program.copies(CACHE)] == ["moved"]


def test_text_without_an_entry_is_refused():
    with pytest.raises(hlo.HloError, match="no ENTRY"):
        hlo.Program("HloModule empty")
    with pytest.raises(hlo.HloError, match="no HLO type"):
        hlo.parse_shape("?")


def test_programs_of_this_machine_are_read_too():
    def layers(cache, weights, x):
        def layer(carry, scanned):
            cache, x = carry
            index, w = scanned
            x = jnp.sin(x @ w)
            return (cache.at[index, 3].set(x[0]), x), None

        (cache, x), _ = jax.lax.scan(layer, (cache, x), (jnp.arange(6), weights))
        return cache, x

    arguments = (jnp.zeros((6, 32, 64)), jnp.zeros((6, 64, 64)), jnp.zeros((8, 64)))

    def program(**options):
        return hlo.Program(jax.jit(layers, **options).lower(*arguments).compile().as_text())

    in_place = program(donate_argnums=0)
    assert not in_place.copies(6 * 32 * 64)
    (loop,) = in_place.loops()
    assert in_place.trip_count(loop) == 6
    weights = 6 * 64 * 64 * 4
    read = hlo.total_bytes(in_place.reads(in_place.computations[in_place.entry]))
    # This compiler cuts a layer's weights out before it multiplies.
    assert weights <= read < 3 * weights
    # Without donation the caller keeps the buffer, and the loop needs one of its own.
    assert program().copies(6 * 32 * 64)
