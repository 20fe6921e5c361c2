// Products of a few gathered rows with a weight, for a range of its columns: all that the operators multiply.
#pragma once

#include <cstdint>

namespace dlo {

// A block of rows as the kernels read it.
struct RowBlock {
    float const* const* rows;  // `count` pointers to `depth` floats each: what up to kFewRows rows are read from
    float const* packed;  // what more rows are read from: groups of packRows, each [depth][packRows], zeros at the end
    int64_t count;  // kBlockRows at most
    int64_t depth;
};

// Sums of products of one strip of columns; what they are turned into is the caller's.
//
// weight: row-major, its rows `stride` floats apart, from the strip's first column on. sums: rows of kStrip floats, as
// many as whole groups have, written.
using RowProducts = void (*)(
    RowBlock const& block, float const* weight, int64_t stride, int64_t columns, float* sums);

// gate becomes silu(gate) * up.
using GatedProduct = void (*)(float* gate, float const* up, int64_t count);

inline constexpr int64_t kStrip = 128;  // columns of a strip at most; a multiple of every vector
inline constexpr int64_t kBlockRows = 192;  // rows of a block at most; a multiple of every packRows
inline constexpr int64_t kFewRows = 8;  // up to so many rows the weight is read once, where it lies: nothing is packed

struct RowKernels {
    RowProducts products;
    GatedProduct gated;
    int64_t packRows;
};

// The widest ones that this processor runs.
RowKernels const& rowKernels() noexcept;

}  // namespace dlo
