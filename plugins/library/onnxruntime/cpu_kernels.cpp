#include "cpu_kernels.h"

#include "row_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace dlo {

namespace {

// Enough strips for every thread to have several, as wide as that allows: the wider, the more of a weight's row is read
// at once.
constexpr int64_t kStripsAtLeast = 16;

int64_t stripOf(int64_t columns) noexcept {
    int64_t const even = (columns / kStripsAtLeast + 31) / 32 * 32;
    return std::clamp<int64_t>(even, 32, kStrip);
}

// Tokens whose scale is not 0, ascending: NaN is active, -0 is not.
std::vector<int64_t> activeTokens(float const* scale, int64_t tokens) {
    std::vector<int64_t> active;
    for (int64_t token = 0; token < tokens; ++token) {
        if (scale[token] != 0.0F) {
            active.push_back(token);
        }
    }
    return active;
}

// The rows as products of many of them read them.
std::vector<float> packRows(CpuCall const& call, std::vector<float const*> const& rows, int64_t groupRows) {
    auto const count = static_cast<int64_t>(rows.size());
    int64_t const groups = (count + groupRows - 1) / groupRows;
    std::vector<float> packed(static_cast<size_t>(groups * groupRows * call.depth));  // zeros
    call.parallelFor(static_cast<size_t>(groups), [&](size_t group) {
        int64_t const first = static_cast<int64_t>(group) * groupRows;
        float* const target = packed.data() + first * call.depth;
        for (int64_t row = 0; row < std::min(groupRows, count - first); ++row) {
            float const* const source = rows[static_cast<size_t>(first + row)];
            for (int64_t k = 0; k < call.depth; ++k) {
                target[k * groupRows + row] = source[k];
            }
        }
    });
    return packed;
}

// Cuts the active tokens' part of the output into blocks of tokens and strips of columns.
//
// compute(block, tokens, first, width): a block of active tokens' rows of the input that is multiplied, their indices,
// and the strip's columns.
template <typename Compute>
void forEachTile(CpuCall const& call, Compute const& compute) {
    std::vector<int64_t> const active = activeTokens(call.inputs[1], call.tokens);
    if (active.empty()) {
        return;  // before a weight is touched
    }
    std::vector<float const*> rows;
    for (int64_t const token : active) {
        rows.push_back(call.inputs[0] + token * call.depth);
    }
    auto const count = static_cast<int64_t>(active.size());
    // Alone in its block or not, a token is computed by the same kernel as all others of the call.
    bool const packs = count > kFewRows;
    std::vector<float> const packed = packs ? packRows(call, rows, rowKernels().packRows) : std::vector<float>{};
    int64_t const strip = stripOf(call.columns);
    int64_t const strips = (call.columns + strip - 1) / strip;
    int64_t const blocks = (count + kBlockRows - 1) / kBlockRows;
    call.parallelFor(static_cast<size_t>(blocks * strips), [&](size_t item) {
        auto const tile = static_cast<int64_t>(item);
        int64_t const firstRow = tile / strips * kBlockRows;
        int64_t const firstColumn = tile % strips * strip;
        RowBlock const block{rows.data() + firstRow, packs ? packed.data() + firstRow * call.depth : nullptr,
            std::min(kBlockRows, count - firstRow), call.depth};
        compute(block, active.data() + firstRow, firstColumn, std::min(strip, call.columns - firstColumn));
    });
}

// inputs: hidden_states, scale, gate_weight, up_weight
void skipGateUp(CpuCall const& call) {
    RowKernels const& kernels = rowKernels();
    auto const compute = [&](RowBlock const& block, int64_t const* tokens, int64_t first, int64_t width) {
        alignas(64) float gate[kBlockRows * kStrip];
        alignas(64) float up[kBlockRows * kStrip];
        kernels.products(block, call.inputs[2] + first, call.columns, width, gate);
        kernels.products(block, call.inputs[3] + first, call.columns, width, up);
        for (int64_t row = 0; row < block.count; ++row) {
            kernels.gated(gate + row * kStrip, up + row * kStrip, width);
            std::memcpy(call.output + tokens[row] * call.columns + first, gate + row * kStrip, sizeof(float) * width);
        }
    };
    forEachTile(call, compute);
}

// inputs: gated, scale, down_weight, residual
void skipDown(CpuCall const& call) {
    RowKernels const& kernels = rowKernels();
    float const* const residual = call.inputs[3];
    for (int64_t token = 0; token < call.tokens; ++token) {
        if (call.inputs[1][token] == 0.0F) {  // bit for bit
            std::memcpy(call.output + token * call.columns, residual + token * call.columns,
                sizeof(float) * static_cast<size_t>(call.columns));
        }
    }
    auto const compute = [&](RowBlock const& block, int64_t const* tokens, int64_t first, int64_t width) {
        alignas(64) float branch[kBlockRows * kStrip];
        kernels.products(block, call.inputs[2] + first, call.columns, width, branch);
        for (int64_t row = 0; row < block.count; ++row) {
            int64_t const start = tokens[row] * call.columns + first;
            float const factor = call.inputs[1][tokens[row]];
            for (int64_t column = 0; column < width; ++column) {
                call.output[start + column] = residual[start + column] + factor * branch[row * kStrip + column];
            }
        }
    };
    forEachTile(call, compute);
}

// inputs: hidden_states, router_weight
void routerScores(CpuCall const& call) {
    call.parallelFor(static_cast<size_t>(call.tokens), [&](size_t token) {
        float const* const x = call.inputs[0] + static_cast<int64_t>(token) * call.depth;
        call.output[token] = routerScore(x, call.inputs[1], call.depth);
    });
}

}  // namespace

float routerScore(float const* x, float const* weight, int64_t hidden) noexcept {
    constexpr int64_t kLanes = 16;  // sums side by side, which a compiler makes vectors of
    float sums[kLanes] = {};
    int64_t const wide = hidden / kLanes * kLanes;
    for (int64_t k = 0; k < wide; k += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            sums[lane] += x[k + lane] * weight[k + lane];
        }
    }
    float logit = 0;
    for (float const sum : sums) {
        logit += sum;
    }
    for (int64_t k = wide; k < hidden; ++k) {
        logit += x[k] * weight[k];
    }
    return 1.0F / (1.0F + std::exp(-logit));
}

CpuKernel findCpuKernel(char const* op) noexcept {
    if (std::strcmp(op, "RouterScores") == 0) {
        return routerScores;
    }
    if (std::strcmp(op, "SkipGateUp") == 0) {
        return skipGateUp;
    }
    return std::strcmp(op, "SkipDown") == 0 ? skipDown : nullptr;
}

}  // namespace dlo
