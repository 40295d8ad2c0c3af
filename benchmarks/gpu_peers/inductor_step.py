"""The Triton kernels that torch.compile makes of x + a/2*s + sqrt(a)*torch.randn_like(x).

Written as Inductor writes them for 2^24 contiguous floats, names and temporaries included:
`inductor_step` by torch 2.13, whose kernels over one index take the four normals of a Philox block;
`inductor_step_tl_randn` by it for two indices and by earlier releases for all, where every element
has a block of its own and two of its four words are used. The seed comes from a launch before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Of the two configurations that Inductor tries, the one with fewer instructions per element.
BLOCK, WARPS = 1024, 4
POINTERS = {"in_out_ptr0": "*fp32", "in_ptr0": "*i64", "in_ptr1": "*fp32", "in_ptr2": "*fp32"}


@triton.jit
def inductor_step(
    in_out_ptr0, in_ptr0, in_ptr1, in_ptr2, load_seed_offset, xnumel, XBLOCK: tl.constexpr
):
    xoffset = tl.program_id(0) * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    x0 = xindex
    tmp3 = tl.load(in_ptr1 + (x0), None)
    tmp4 = tl.load(in_ptr2 + (x0), None)
    tmp0 = tl.load(in_ptr0 + load_seed_offset)
    tmp1 = (x0).to(tl.int32)
    tmp2 = triton_helpers.randn4x(tmp0, (tmp1).to(tl.uint32), XBLOCK)
    tmp5 = tl.full([1], 0.005, tl.float32)
    tmp6 = tmp4 * tmp5
    tmp7 = tmp3 + tmp6
    tmp8 = tl.full([1], 0.1, tl.float32)
    tmp9 = tmp2 * tmp8
    tmp10 = tmp7 + tmp9
    tl.store(in_out_ptr0 + (x0), tmp10, None)


@triton.jit
def inductor_step_tl_randn(
    in_out_ptr0, in_ptr0, in_ptr1, in_ptr2, load_seed_offset, xnumel, XBLOCK: tl.constexpr
):
    xoffset = tl.program_id(0) * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    x0 = xindex
    tmp3 = tl.load(in_ptr1 + (x0), None)
    tmp4 = tl.load(in_ptr2 + (x0), None)
    tmp0 = tl.load(in_ptr0 + load_seed_offset)
    tmp1 = (x0).to(tl.int32)
    tmp2 = tl.randn(tmp0, (tmp1).to(tl.uint32))
    tmp5 = tl.full([1], 0.005, tl.float32)
    tmp6 = tmp4 * tmp5
    tmp7 = tmp3 + tmp6
    tmp8 = tl.full([1], 0.1, tl.float32)
    tmp9 = tmp2 * tmp8
    tmp10 = tmp7 + tmp9
    tl.store(in_out_ptr0 + (x0), tmp10, None)


def compile_step(step: triton.JITFunction, capability: int) -> bytes:
    """The cubin of a step; needs no GPU."""
    signature = {**POINTERS, "load_seed_offset": "i32", "xnumel": "i32", "XBLOCK": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)}
    source = ASTSource(step, signature, constexprs={"XBLOCK": BLOCK}, attrs=aligned)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]
