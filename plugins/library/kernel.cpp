#include "kernel.h"

#include "dlo_ops.h"

#include <cstring>
#include <iterator>

namespace dlo {

namespace {

// Cubins of 8.x run on later minor versions of 8; from 9.0 on Triton compiles for one version alone ("sm_90a").
bool cubinRuns(Kernel const& kernel, int32_t major, int32_t minor) noexcept {
    return kernel.major == major && (major < 9 ? kernel.minor <= minor : kernel.minor == minor);
}

bool ptxRuns(Kernel const& kernel, int32_t major, int32_t minor) noexcept {
    return kernel.major < major || (kernel.major == major && kernel.minor <= minor);
}

}  // namespace

TileName tileFor(int64_t tokens) noexcept {
    static_assert(std::size(kMostTokens) == kTileCount - 1, "the last tile takes any number");
    int32_t tile = 0;
    while (tile < kTileCount - 1 && tokens > kMostTokens[tile]) {
        ++tile;
    }
    return static_cast<TileName>(tile);
}

Kernel const* findKernel(
    char const* op, ElementType type, TileName tile, int32_t major, int32_t minor) noexcept {
    Kernel const* best = nullptr;
    for (size_t i = 0; i < kKernelCount; ++i) {
        Kernel const& kernel = kKernels[i];
        if (std::strcmp(kernel.op, op) != 0 || kernel.type != type || kernel.tile != tile) {
            continue;
        }
        if (!(kernel.isPtx ? ptxRuns(kernel, major, minor) : cubinRuns(kernel, major, minor))) {
            continue;
        }
        bool const better = best == nullptr || (best->isPtx && !kernel.isPtx)
            || (best->isPtx == kernel.isPtx && kernel.minor > best->minor);
        if (better) {
            best = &kernel;
        }
    }
    return best;
}

}  // namespace dlo
