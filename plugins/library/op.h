// What the generated dlo_ops.h says of an operator.
#pragma once

#include "element_type.h"

#include <cstdint>

namespace dlo {

inline constexpr int32_t kMaxOperands = 5;  // inputs and output
inline constexpr int32_t kMaxRank = 3;

// An input or output. `isT`: its type is the operator's one type parameter; otherwise it is kFLOAT.
struct Operand {
    char const* name;
    bool isT;
    int32_t rank;
    char const* dims[kMaxRank];  // equal names are equal sizes
};

// Where an axis of the output gets its size from.
struct AxisSource {
    int32_t input;
    int32_t axis;
};

struct Op {
    char const* name;
    int32_t nbInputs;
    int32_t nbOutputs;
    int32_t weightInput;  // its two axes are the summed one and the output's columns
    Operand operands[kMaxOperands];  // inputs, then outputs
    AxisSource outputAxes[kMaxRank];
};

}  // namespace dlo
