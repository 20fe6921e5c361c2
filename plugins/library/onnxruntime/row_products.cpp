#include "row_products.h"

#include <algorithm>
#include <cstring>

// Inlined into functions that are compiled for one processor each, which is how one source serves all of them.
#define DLO_INLINE inline __attribute__((always_inline))

namespace dlo {

namespace {

constexpr int64_t kDepthBlock = 256;  // rows of a packed weight block: it stays in the second-level cache

// lanes floats, read and written wherever they lie
template <int lanes>
struct VectorOf {
    typedef float type __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
};

template <int lanes>
using Vector = typename VectorOf<lanes>::type;

// Decode: bound by reading the weight. Several of its rows at a time, along the strip, so that memory is read as it
// lies.
template <int lanes, int count, int unroll>
DLO_INLINE void addRows(float const* const* rows, int64_t k, float const* weight, int64_t stride, int64_t columns,
    float* sums) {
    using V = Vector<lanes>;
    float factor[count][unroll];
#pragma GCC unroll 8
    for (int row = 0; row < count; ++row) {
#pragma GCC unroll 8
        for (int step = 0; step < unroll; ++step) {
            factor[row][step] = rows[row][k + step];
        }
    }
    for (int64_t column = 0; column < columns; column += lanes) {
        V total[count];
#pragma GCC unroll 8
        for (int row = 0; row < count; ++row) {
            total[row] = *reinterpret_cast<V const*>(sums + row * kStrip + column);
        }
#pragma GCC unroll 8
        for (int step = 0; step < unroll; ++step) {
            V const loaded = *reinterpret_cast<V const*>(weight + step * stride + column);
#pragma GCC unroll 8
            for (int row = 0; row < count; ++row) {
                total[row] += factor[row][step] * loaded;
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < count; ++row) {
            *reinterpret_cast<V*>(sums + row * kStrip + column) = total[row];
        }
    }
}

template <int lanes, int count>
DLO_INLINE void fewRows(float const* const* rows, int64_t depth, float const* weight, int64_t stride, int64_t columns,
    float* sums) {
    int64_t const wide = columns / lanes * lanes;
    constexpr int unroll = count <= 2 ? 8 : 4;
    for (int64_t k = 0; k < depth; k += unroll) {  // widths, and with them depths, are multiples of eight
        addRows<lanes, count, unroll>(rows, k, weight + k * stride, stride, wide, sums);
        if (wide < columns) {
            addRows<8, count, unroll>(rows, k, weight + k * stride + wide, stride, columns - wide, sums + wide);
        }
    }
}

// Prefill: bound by arithmetic. `count` rows times two vectors of columns stay in registers along the depth block.
// packedRows: [depth][packRows]; packedWeight: [depth][2 vectors].
template <int lanes, int count, int packRows>
DLO_INLINE void addTile(float const* packedRows, float const* packedWeight, int64_t depth, float* sums) {
    using V = Vector<lanes>;
    V total[count][2];
#pragma GCC unroll 16
    for (int row = 0; row < count; ++row) {
        total[row][0] = *reinterpret_cast<V const*>(sums + row * kStrip);
        total[row][1] = *reinterpret_cast<V const*>(sums + row * kStrip + lanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
        V const first = *reinterpret_cast<V const*>(packedWeight + k * 2 * lanes);
        V const second = *reinterpret_cast<V const*>(packedWeight + k * 2 * lanes + lanes);
#pragma GCC unroll 16
        for (int row = 0; row < count; ++row) {
            float const factor = packedRows[k * packRows + row];
            total[row][0] += factor * first;
            total[row][1] += factor * second;
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < count; ++row) {
        *reinterpret_cast<V*>(sums + row * kStrip) = total[row][0];
        *reinterpret_cast<V*>(sums + row * kStrip + lanes) = total[row][1];
    }
}

template <int lanes, int packRows>
DLO_INLINE void manyRows(RowBlock const& block, float const* weight, int64_t stride, int64_t columns, float* sums) {
    constexpr int64_t kTile = 2 * lanes;
    alignas(64) float packedWeight[kDepthBlock * kStrip];
    int64_t const tiles = (columns + kTile - 1) / kTile;
    for (int64_t start = 0; start < block.depth; start += kDepthBlock) {
        int64_t const steps = std::min(kDepthBlock, block.depth - start);
        // The weight block, tile by tile, zeros behind the last column.
        for (int64_t tile = 0; tile < tiles; ++tile) {
            int64_t const used = std::min(kTile, columns - tile * kTile);
            float* const packed = packedWeight + tile * kDepthBlock * kTile;
            for (int64_t k = 0; k < steps; ++k) {
                float const* const source = weight + (start + k) * stride + tile * kTile;
                if (used == kTile) {
                    std::memcpy(packed + k * kTile, source, sizeof(float) * kTile);
                } else {
                    std::memset(packed + k * kTile, 0, sizeof(float) * kTile);
                    std::memcpy(packed + k * kTile, source, sizeof(float) * used);
                }
            }
        }
        for (int64_t first = 0; first < block.count; first += packRows) {
            int64_t const left = block.count - first;
            float const* const packedRows = block.packed + first * block.depth + start * packRows;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                float const* const packed = packedWeight + tile * kDepthBlock * kTile;
                float* const target = sums + first * kStrip + tile * kTile;
                // a last group of fewer rows costs less, in steps of a third
                if (left > packRows * 2 / 3) {
                    addTile<lanes, packRows, packRows>(packedRows, packed, steps, target);
                } else if (left > packRows / 3) {
                    addTile<lanes, packRows * 2 / 3, packRows>(packedRows, packed, steps, target);
                } else {
                    addTile<lanes, packRows / 3, packRows>(packedRows, packed, steps, target);
                }
            }
        }
    }
}

template <int lanes, int packRows>
DLO_INLINE void productsOf(RowBlock const& block, float const* weight, int64_t stride, int64_t columns, float* sums) {
    std::memset(sums, 0, sizeof(float) * kStrip * ((block.count + packRows - 1) / packRows * packRows));
    if (block.packed != nullptr) {
        manyRows<lanes, packRows>(block, weight, stride, columns, sums);
        return;
    }
    // in portions of what registers hold beside the weight, which the second portion finds in a cache
    for (int64_t first = 0; first < block.count; first += 4) {
        float const* const* const rows = block.rows + first;
        float* const target = sums + first * kStrip;
        switch (std::min<int64_t>(4, block.count - first)) {
        case 1: fewRows<lanes, 1>(rows, block.depth, weight, stride, columns, target); break;
        case 2: fewRows<lanes, 2>(rows, block.depth, weight, stride, columns, target); break;
        case 3: fewRows<lanes, 3>(rows, block.depth, weight, stride, columns, target); break;
        default: fewRows<lanes, 4>(rows, block.depth, weight, stride, columns, target);
        }
    }
}

// exp(x) for x in [-87, 87], within 2 units in the last place; NaN stays NaN. x = n·ln 2 + r, |r| <= ln 2 / 2.
DLO_INLINE float exponential(float x) {
    constexpr float kRounder = 12582912.0F;  // 1.5 · 2^23: adding it leaves the nearest integer in the last bits
    float const shifted = x * 1.44269504F + kRounder;
    float const n = shifted - kRounder;
    float const r = (x - n * 0.693359375F) + n * 2.12194440e-4F;  // ln 2 in two parts, the first one exact
    // Taylor's polynomial of degree 7: the next term is below 2^-27
    float power = 1.0F / 5040.0F;
    power = power * r + 1.0F / 720.0F;
    power = power * r + 1.0F / 120.0F;
    power = power * r + 1.0F / 24.0F;
    power = power * r + 1.0F / 6.0F;
    power = power * r + 0.5F;
    power = power * r + 1.0F;
    power = power * r + 1.0F;
    uint32_t bits = 0;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127U) << 23U;
    float factor = 0;
    std::memcpy(&factor, &bits, sizeof(factor));
    return power * factor;
}

DLO_INLINE void gatedOf(float* gate, float const* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        float const x = gate[i];
        float argument = -x;
        argument = argument > 87.0F ? 87.0F : argument;
        argument = argument < -87.0F ? -87.0F : argument;
        gate[i] = x / (1.0F + exponential(argument)) * up[i];
    }
}

// One set of functions per processor. 32, 16 and 16 vector registers: rows of a tile are what they have room for.
#define DLO_KERNELS(name, target, lanes, packRows)                                                                     \
    target void name##Products(                                                                                        \
        RowBlock const& block, float const* weight, int64_t stride, int64_t columns, float* sums) {                    \
        productsOf<lanes, packRows>(block, weight, stride, columns, sums);                                             \
    }                                                                                                                  \
    target void name##Gated(float* gate, float const* up, int64_t count) { gatedOf(gate, up, count); }                 \
    constexpr RowKernels name##Kernels{name##Products, name##Gated, packRows};

DLO_KERNELS(portable, , 4, 6)
#if defined(__x86_64__)
DLO_KERNELS(avx2, __attribute__((target("avx2,fma"))), 8, 6)
DLO_KERNELS(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))), 16, 12)
#endif

}  // namespace

RowKernels const& rowKernels() noexcept {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512bw")) {
        return avx512Kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return avx2Kernels;
    }
#endif
    return portableKernels;
}

}  // namespace dlo
