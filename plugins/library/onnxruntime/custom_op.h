// An operator of the schema as ONNX Runtime's C API knows it: one per operator, type and execution provider.
#pragma once

#include "op.h"

#include <onnxruntime_c_api.h>

namespace dlo {

// The version of ONNX Runtime's C API that is used, whatever that of the headers: every later one serves it too. The
// newest function used, KernelContext_ParallelFor, came with it.
inline constexpr uint32_t kApiVersion = 17;

enum class ProviderName { kCPU, kCUDA };

struct CustomOp final : OrtCustomOp {
    CustomOp(Op const& op, ElementType type, ProviderName provider) noexcept;

    Op const& op;
    ElementType type;
    ProviderName provider;
};

}  // namespace dlo
