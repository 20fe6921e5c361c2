// The operators on a CPU, in float32, as plugins/skip_gate_up/reference.py and plugins/skip_down/reference.py define
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace dlo {

// Calls work(0) … work(total - 1), in any order, on whatever threads there are; returns when all are done.
using ParallelFor = std::function<void(size_t total, std::function<void(size_t)> const& work)>;

// One node's operands, all of them contiguous.
struct CpuCall {
    float const* const* inputs;  // in the schema's order
    float* output;
    int64_t tokens;  // batch · sequence
    int64_t depth;  // of the summed axis
    int64_t columns;  // of the output
    ParallelFor parallelFor;
};

using CpuKernel = void (*)(CpuCall const& call);

// sigmoid(x · weight), in float32.
float routerScore(float const* x, float const* weight, int64_t hidden) noexcept;

// The operator's kernel; nullptr where it has none.
CpuKernel findCpuKernel(char const* op) noexcept;

}  // namespace dlo
