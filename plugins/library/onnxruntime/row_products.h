// Products of a few gathered rows with a weight, for a range of its columns: all that the operators multiply.
#pragma once

#include <cstdint>

namespace dlo {

// Sums of products of one strip of columns; what they are turned into is the caller's.
//
// rows: `count` pointers to `depth` floats each. weight: row-major, its rows `stride` floats apart, from the strip's
// first column on. sums: `count` rows of kStrip floats, written.
using RowProducts = void (*)(
    float const* const* rows, int64_t count, int64_t depth, float const* weight, int64_t stride, int64_t columns,
    float* sums);

// gate becomes silu(gate) * up.
using GatedProduct = void (*)(float* gate, float const* up, int64_t count);

inline constexpr int64_t kStrip = 128;  // columns of a strip at most; a multiple of every vector
inline constexpr int64_t kBlockRows = 96;  // rows of one call at most

struct RowKernels {
    RowProducts products;
    GatedProduct gated;
};

// The widest ones that this processor runs.
RowKernels const& rowKernels() noexcept;

}  // namespace dlo
