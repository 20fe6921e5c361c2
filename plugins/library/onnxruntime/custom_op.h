// An operator of the schema as ONNX Runtime's C API knows it: one per operator, type and execution provider.
#pragma once

#include "api_calls.h"
#include "op.h"

namespace dlo {

enum class ProviderName { kCPU, kCUDA };

struct CustomOp final : OrtCustomOp {
    CustomOp(Op const& op, ElementType type, ProviderName provider) noexcept;

    Op const& op;
    ElementType type;
    ProviderName provider;
};

}  // namespace dlo
