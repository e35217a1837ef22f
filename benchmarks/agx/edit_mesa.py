"""Edits Mesa 25.0, so that its AGX compiler knows 8x8 matrices and prints what it makes.

    python3 edit_mesa.py FOLDER

An edit names a file and a place in it, which must be there exactly once, and puts text before it,
behind it, or in its stead. Nothing is written unless all places are found.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """Puts `text` where `place`, a regular expression, matches; ``\\g<0>`` is what matched."""

    file: str
    place: str
    text: str


CLC = "src/asahi/clc/asahi_clc.c"
COMPILE = "src/asahi/compiler/agx_compile.c"
PACK = "src/asahi/compiler/agx_pack.c"
ALLOCATE = "src/asahi/compiler/agx_register_allocate.c"
NIR = "src/compiler/nir"

EDITS = (
    # One kernel per file, and only its figures: half-registers, threads that fit, and bytes.
    Edit(CLC, r"struct agx_shader_part compiled(?=;)", r"\g<0> = {0}"),
    Edit(CLC, r"\.is_helper = is_helper,", r"\g<0> .has_scratch = true,"),
    Edit(
        CLC,
        r"print_shader\(fp_c, .*;",
        r"""printf("AGX_STATS %u %u %u\\n", compiled.info.nr_gprs,
                   agx_occupancy_for_register_count(compiled.info.nr_gprs - 1).max_threads,
                   compiled.info.local_size);
            return 0;""",
    ),
    # Instructions and intrinsics.
    Edit(
        COMPILE,
        r"case nir_intrinsic_quad_swap_horizontal:",
        r"""case nir_intrinsic_simd_matrix_fmadd_agx:
      agx_simd_matrix_fmadd_to(b, dst, agx_src_index(&instr->src[0]),
                               agx_src_index(&instr->src[1]), agx_src_index(&instr->src[2]));
      agx_emit_cached_split(b, dst, 2);
      return NULL;

   case nir_intrinsic_simd_shuffle_xor_agx:
      return agx_shuffle_xor_to(b, dst, agx_src_index(&instr->src[0]),
                                agx_src_index(&instr->src[1]));

   case nir_intrinsic_simd_shuffle_agx:
      return agx_shuffle_to(b, dst, agx_src_index(&instr->src[0]),
                            agx_src_index(&instr->src[1]));

   \g<0>""",
    ),
    Edit(
        "src/asahi/compiler/agx_opcodes.py",
        r'op\("icmpsel",',
        r"""op("simd_matrix_fmadd", encoding = (0x800000000800006f, 0xFF, 8, _), srcs = 3)

\g<0>""",
    ),
    Edit(
        PACK,
        r"if \(info\.immediates & AGX_IMMEDIATE_TRUTH_TABLE\)",
        r"""if (I->op == AGX_OPCODE_SIMD_MATRIX_FMADD && I->dest[0].size == AGX_SIZE_32)
      raw |= (1 << 26);

   \g<0>""",
    ),
    *(
        Edit(f"{NIR}/{file}", place, text)
        for file, place, text in (
            (
                "nir_divergence_analysis.c",
                r"/\* Intrinsics with divergence depending on sources \*/",
                r"""case nir_intrinsic_simd_matrix_fmadd_agx:
   case nir_intrinsic_simd_shuffle_xor_agx:
   case nir_intrinsic_simd_shuffle_agx:
      is_divergent = true;
      break;

   \g<0>""",
            ),
            (
                "nir_intrinsics.py",
                r'intrinsic\("shuffle_xor",',
                r"""for name, sources, width in (
        ("matrix_fmadd", 3, 2), ("shuffle_xor", 2, 1), ("shuffle", 2, 1)):
    intrinsic(f"simd_{name}_agx", src_comp=[width] * sources, dest_comp=width,
              bit_sizes=[16, 32], flags=[CAN_ELIMINATE])
\g<0>""",
            ),
        )
    ),
    # The listing: offset, size, bytes that a lane moves, where a loop goes back to or -1, and text.
    Edit(
        PACK,
        r"/\* Relative branches may be emitted before their targets",
        r"""static void
agx_list_instr(const agx_instr *I, unsigned offset, unsigned size)
{
   bool memory =
      I->op == AGX_OPCODE_DEVICE_LOAD || I->op == AGX_OPCODE_DEVICE_STORE ||
      I->op == AGX_OPCODE_LOCAL_LOAD || I->op == AGX_OPCODE_LOCAL_STORE;
   unsigned width = I->format <= AGX_FORMAT_I32 ? 1 << I->format : 4;

   printf("AGX_INSTR %u %u %u %d", offset, size,
          memory ? width * util_bitcount(I->mask) : 0,
          I->op == AGX_OPCODE_JMP_EXEC_ANY ? (int)I->target->offset : -1);
   agx_print_instr(I, stdout);
}

\g<0>""",
    ),
    Edit(
        PACK,
        r"ctx->key->dev\.needs_g13x_coherency\);",
        r"""\g<0>
         if (!ctx->is_preamble)
            agx_list_instr(ins, block->last_offset, emission->size - block->last_offset);""",
    ),
    # The result of a matrix product must not overlap its factors: these are freed after it has
    # its registers.
    Edit(
        ALLOCATE,
        r"if \(!skip\)(?=\s+demand -= widths\[I->src\[s\]\.value\];)",
        r"""if (!skip && I->op == AGX_OPCODE_SIMD_MATRIX_FMADD && s < 2)
               late_kill_count += widths[I->src[s].value];
            else if (!skip)""",
    ),
    Edit(
        ALLOCATE,
        r"/\* First, free killed sources \*/",
        r"""bool late[2] = {false, false};
      for (unsigned s = 0; s < 2 && I->op == AGX_OPCODE_SIMD_MATRIX_FMADD; ++s) {
         late[s] = I->src[s].kill;
         I->src[s].kill = false;
      }

      \g<0>""",
    ),
    Edit(
        ALLOCATE,
        r"/\* Phi sources are special\.",
        r"""for (unsigned s = 0; s < 2; ++s) {
         if (late[s]) {
            unsigned reg = ssa_to_reg[I->src[s].value];
            I->src[s].kill = true;
            BITSET_CLEAR_RANGE(rctx->used_regs[ra_class_for_index(I->src[s])], reg,
                               reg + ncomps[I->src[s].value] - 1);
         }
      }

      \g<0>""",
    ),
    # Demand before spilling; and spilling to less than the limit where the allocator fails near it.
    Edit(ALLOCATE, r'#include "util/macros\.h"', r'\g<0>\n#include "util/u_debug.h"'),
    Edit(
        ALLOCATE,
        r"bool spilling = \(effective_demand > max_possible_regs\);",
        r"""if (!ctx->is_preamble)
      printf("AGX_DEMAND %u\\n", effective_demand);
   unsigned spill_limit = max_possible_regs - debug_get_num_option("AGX_MARGIN", 0);
   bool spilling = (effective_demand > spill_limit);""",
    ),
    Edit(ALLOCATE, r"(?<=agx_spill\(ctx, )max_possible_regs", "spill_limit"),
)


def main(folder: Path) -> None:
    texts = {edit.file: (folder / edit.file).read_text() for edit in EDITS}
    for edit in EDITS:
        texts[edit.file], found = re.subn(edit.place, edit.text, texts[edit.file])
        if found != 1:
            sys.exit(f"edit_mesa.py: {edit.file} has {edit.place!r} {found} times, not once")
    for file, text in texts.items():
        (folder / file).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
