// The table of embedded kernels (generated dlo_kernels.cpp) and the choice from it.
#pragma once

#include "element_type.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace dlo {

enum class TileName : int32_t { kDECODE = 0, kPREFILL = 1 };
inline constexpr int32_t kTileCount = 2;

struct Kernel {
    char const* op;
    ElementType type;
    TileName tile;
    int32_t major;  // compute capability
    int32_t minor;
    bool isPtx;
    char const* entry;
    unsigned char const* image;
    uint32_t rows;  // tokens per program
    uint32_t columns;  // output columns per program
    uint32_t threads;
    uint32_t sharedBytes;
};

extern Kernel const kKernels[];
extern size_t const kKernelCount;

// The tile launched for so many tokens.
TileName tileFor(int64_t tokens) noexcept;

// The kernel to run on a GPU of this compute capability, or nullptr when there is none.
Kernel const* findKernel(char const* op, ElementType type, TileName tile, int32_t major, int32_t minor) noexcept;

}  // namespace dlo
