#include "launch.h"

#include <iterator>

namespace dlo {

namespace {

uint32_t ceilDivide(int64_t size, uint32_t step) noexcept { return static_cast<uint32_t>((size + step - 1) / step); }

}  // namespace

std::string launchOperator(LoadedKernel const& loaded, Op const& op, void const* const* inputs, void* output,
    Launch const& launch, CUstream stream) noexcept {
    int32_t integers[] = {static_cast<int32_t>(launch.tokens), static_cast<int32_t>(launch.depth),
        static_cast<int32_t>(launch.columns)};
    void* parameters[kMaxOperands + std::size(integers)];
    int32_t count = 0;
    for (int32_t i = 0; i < op.nbInputs; ++i) {
        parameters[count++] = const_cast<void**>(reinterpret_cast<void const* const*>(&inputs[i]));
    }
    for (int32_t& integer : integers) {
        parameters[count++] = &integer;
    }
    parameters[count++] = &output;
    return launchKernel(loaded, ceilDivide(launch.tokens, loaded.kernel->rows),
        ceilDivide(launch.columns, loaded.kernel->columns), parameters, stream);
}

}  // namespace dlo
