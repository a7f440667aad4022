"""What is read from machine code, the bounds that follow, and the watch over the length of main loops."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ptst.kernels import flash_attention
from ptst.kernels.dispatch import triton
from ptst.kernels.flash_blocks import PARTS, safe_blocks
from ptst.kernels.machine_code import count, instructions, loops
from ptst.kernels.roofline import CHIPS, blocks_per_sm, bound, makespan, steps, streaming_bound

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is built for Linux alone")

SASS = """
        /*0000*/                   LDG.E.128 R8, desc[UR14][R46.64] ;
.L_x_0:
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
.L_x_1:
        /*0020*/              @P0  LDGSTS.E.BYPASS.128 [R33+0x8000], desc[UR14][R46.64], P3 ;
        /*0030*/                   DEPBAR.LE SB0, 0x2 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   MUFU.EX2 R193, R193 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*0090*/                   FSEL R1, R2, R3, P0 ;
        /*00a0*/                   FSEL R1, R2, R3, P0 ;
        /*00b0*/                   LDS.64 R4, [R5] ;
        /*00c0*/                   LDSM.16.M88.4 R4, [R5] ;
        /*00d0*/              @P1  BRA `(.L_x_2) ;
        /*00e0*/              @P2  BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
"""


def test_the_main_loop_is_the_innermost_one_with_most_products_for_its_length():
    main, edges = loops(SASS)
    assert (main.instructions, main.tensor, main.exponentials, main.copies) == (6, 2, 1, 1)
    assert main.flops == 2 * 64 * 64 * 16 // 4 + 2 * 64 * 128 * 16 // 4
    assert main.operand_bytes == 2 * 16 * (64 + 64) // 4 + 2 * 16 * 128 // 4  # left factor in shared memory, or not
    assert main.waits_with == 2
    assert main.global_bytes == main.load_bytes == 32 * 16
    (edge,) = edges
    assert (edge.instructions, edge.shared, edge.shared_bytes) == (6, 2, 32 * 8 + 4 * 128)


def test_a_matrix_alone_is_read():
    assert count(["LDSM.16.M88 R4, [R5]", "LDSM.16.M88.2 R4, [R5]"]).shared_bytes == 3 * 128


def test_without_products_the_loop_that_reads_or_the_whole():
    text = SASS.replace("HGMMA", "FFMA")
    assert loops(text)[0].global_bytes == 512
    whole, edges = loops(text.replace("BRA", "NOP"))
    assert not whole.is_loop and whole.instructions == len(instructions(text)[0]) and edges == []


def test_the_resource_that_sets_the_bound():
    main, _ = loops(SASS)
    chip = CHIPS[90]
    found = bound(chip, main, warps=4, blocks=1, tma_bytes=0, ahead=True)
    tensor, issue, exponentials = main.flops * 4 / 4096, 6.0, 32 * 4 / 16
    assert found.clocks == tensor + max(issue, exponentials) and "in turn" in found.resource
    filled = bound(chip, main, 4, 8, 0, True)  # by other blocks of threads
    assert (filled.clocks, filled.resource) == (tensor, "tensor cores")
    assert bound(chip, main, 4, 1, 0, False).clocks == found.clocks + 800
    assert bound(chip, main, 4, 8, 10**6, True).resource == "L2"
    few = count(["LDG.E R1, [R2]"] * 2)
    assert streaming_bound(chip, few, 4, 1).resource == "bytes in flight"
    assert streaming_bound(chip, count(["LDG.E.128 R1, [R2]"] * 8), 8, 8).per_second == chip.bandwidth


def test_blocks_of_threads_on_an_sm():
    assert blocks_per_sm(CHIPS[90], registers=255, warps=8, shared=0) == 1
    assert blocks_per_sm(CHIPS[90], registers=128, warps=8, shared=64 * 1024) == 2
    assert blocks_per_sm(CHIPS[90], registers=32, warps=8, shared=100 * 1024) == 2
    assert blocks_per_sm(CHIPS[80], registers=16, warps=8, shared=0) == 8


def test_programs_go_to_the_first_that_is_free():
    assert makespan([3, 2, 2, 1], 2) == 4
    assert makespan([1, 2, 2, 3], 2) == 5


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (130, 1000), (64, 64)])
def test_steps_cover_what_a_block_sees_once(part, queries, keys):
    """Unmasked and masked steps together cover each pair that is seen, and no unmasked step one that is not."""
    shape = safe_blocks(90, 128, torch.bfloat16, part)
    of_keys = part == "dkdv"
    own, other = (keys, queries) if of_keys else (queries, keys)
    size, step = (shape.keys, shape.queries) if of_keys else (shape.queries, shape.keys)
    offset = keys - queries
    for entry in flash_attention.table((0, own), (0, other), size, torch.device("cpu"), 0, of_keys).tolist():
        free, masked = steps(part, tuple(entry), shape, 1)
        mine = range(entry[0], min(entry[0] + size, own))
        if of_keys:
            some = sum(any(j <= i + offset for j in mine) for i in range(queries))
            every = sum(all(j <= i + offset for j in mine) for i in range(queries))
        else:
            some = sum(any(j <= i + offset for i in mine) for j in range(keys))
            every = sum(all(j <= i + offset for i in mine) for j in range(keys))
        assert free * step <= every and free * step + masked * shape.edge >= some
        assert masked * shape.edge < some - free * step + 2 * shape.edge


def test_a_main_loop_must_not_grow(tmp_path, monkeypatch):
    from ptst.kernels import main_loops

    monkeypatch.setattr(main_loops, "FILE", tmp_path / "main_loops.json")

    def compiled(instructions):
        return [SimpleNamespace(arch=90, name="dq", note="n", main=SimpleNamespace(instructions=instructions))]

    assert main_loops.grown("3.7.1", compiled(100)) == []  # another Triton: nothing to compare with
    main_loops.write("3.7.1", compiled(100))
    assert main_loops.grown("3.7.1", compiled(105)) == []
    assert "106 instructions, it had 100" in main_loops.grown("3.7.1", compiled(106))[0]
    main_loops.write("3.6.0", compiled(90))
    assert json.loads(main_loops.FILE.read_text()).keys() == {"3.7.1", "3.6.0"}
    new = [SimpleNamespace(**{**vars(compiled(1)[0]), "name": "new"})]
    assert "is not in" in main_loops.grown("3.7.1", new)[0]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_the_attention_loops_are_as_short_as_they_must_be(version):
    """Instructions per 128 x 64 scores and 8 warps, at head_dim 128 on sm_90."""
    from ptst.kernels import main_loops

    known = main_loops.read()[version]
    for part, most in (("forward", 345), ("dq", 420), ("dkdv", 500)):
        shape = safe_blocks(90, 128, torch.bfloat16, part)
        found = known[f"sm_90 {part}: attention bfloat16 D=128 W=0"]
        assert found * main_loops.TILE / (shape.queries * shape.keys) * shape.warps / 8 <= most
