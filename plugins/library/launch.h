// An operator's launch on a GPU, the same in every runtime.
#pragma once

#include "driver.h"
#include "op.h"

#include <cstdint>
#include <string>

namespace dlo {

// The integers that a kernel takes between its inputs and its output.
struct Launch {
    int64_t tokens;  // batch · sequence, above 0
    int64_t depth;  // the weight's rows
    int64_t columns;  // the weight's columns
};

// One launch and nothing else; a stream may be capturing. Returns an empty string, or what went wrong.
std::string launchOperator(LoadedKernel const& loaded, Op const& op, void const* const* inputs, void* output,
    Launch const& launch, CUstream stream) noexcept;

}  // namespace dlo
