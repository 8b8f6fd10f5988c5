# Writes sm90/wgmma_table.cuh, the specialisations of jfa::sm90::Wgmma: wgmma's operands are N / 2 registers that must
# be named one by one. Each form exists for both element types.
function(jfa_write_wgmma_table path)
  set(text "// Written by cmake/wgmma.cmake.\n#pragma once\n\n#include <cuda_fp16.h>\n\n#include <type_traits>\n\nnamespace jfa::sm90 {\n")
  foreach(n RANGE 16 256 16)
    math(EXPR last "${n} / 2 - 1")
    set(registers "")
    set(operands "")
    foreach(i RANGE ${last})
      math(EXPR row "${i} / 2 % 2")
      math(EXPR column "${i} / 4 * 2 + ${i} % 2")
      list(APPEND registers "%${i}")
      list(APPEND operands "\"+f\"(d[${row}][${column}])")
    endforeach()
    list(JOIN registers ", " registers)
    list(JOIN operands ", " operands)
    foreach(i RANGE 6)
      math(EXPR x${i} "${last} + 1 + ${i}")
    endforeach()
    math(EXPR columns "${n} / 4")
    string(APPEND text
      "\ntemplate <>\nstruct Wgmma<${n}> {\n"
      "  template <class Element, bool kTransposedA, bool kTransposedB>\n"
      "  __device__ __forceinline__ static void ss(float (&d)[2][${columns}], uint64_t a, uint64_t b, bool accumulate) {\n"
      "    if constexpr (std::is_same_v<Element, __half>) {\n")
    foreach(type f16 bf16)
      string(APPEND text
        "      asm volatile(\"{\\n.reg .pred accumulate;\\nsetp.ne.b32 accumulate, %${x2}, 0;\\n\"\n"
        "        \"wgmma.mma_async.sync.aligned.m64n${n}k16.f32.${type}.${type} {${registers}}, \"\n"
        "        \"%${x0}, %${x1}, accumulate, 1, 1, %${x3}, %${x4};\\n}\\n\"\n"
        "        : ${operands}\n"
        "        : \"l\"(a), \"l\"(b), \"r\"(int(accumulate)), \"n\"(int(kTransposedA)), \"n\"(int(kTransposedB)));\n")
      if(type STREQUAL f16)
        string(APPEND text "    } else {\n")
      endif()
    endforeach()
    string(APPEND text
      "    }\n  }\n"
      "  template <class Element, bool kTransposedB>\n"
      "  __device__ __forceinline__ static void rs(float (&d)[2][${columns}], const uint32_t (&a)[4], uint64_t b, bool accumulate) {\n"
      "    if constexpr (std::is_same_v<Element, __half>) {\n")
    foreach(type f16 bf16)
      string(APPEND text
        "      asm volatile(\"{\\n.reg .pred accumulate;\\nsetp.ne.b32 accumulate, %${x5}, 0;\\n\"\n"
        "        \"wgmma.mma_async.sync.aligned.m64n${n}k16.f32.${type}.${type} {${registers}}, \"\n"
        "        \"{%${x0}, %${x1}, %${x2}, %${x3}}, %${x4}, accumulate, 1, 1, %${x6};\\n}\\n\"\n"
        "        : ${operands}\n"
        "        : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b), \"r\"(int(accumulate)), "
        "\"n\"(int(kTransposedB)));\n")
      if(type STREQUAL f16)
        string(APPEND text "    } else {\n")
      endif()
    endforeach()
    string(APPEND text "    }\n  }\n};\n")
  endforeach()
  string(APPEND text "\n}  // namespace jfa::sm90\n")
  file(CONFIGURE OUTPUT "${path}" CONTENT "${text}" @ONLY)
endfunction()
