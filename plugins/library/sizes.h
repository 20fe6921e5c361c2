// Whether shapes fit the schema: the same refusals in every runtime.
#pragma once

#include "dlo_ops.h"

#include <string>

namespace dlo {

// Size of the first axis of a name among the operands in front of one; below 0 where none is known yet.
template <typename SizeOf>
int64_t knownSize(Op const& op, int32_t before, std::string const& axisName, SizeOf&& sizeOf) {
    for (int32_t input = 0; input < before; ++input) {
        if (sizeOf(input, -1) != op.operands[input].rank) {
            continue;  // refused already: it may have fewer axes
        }
        for (int32_t axis = 0; axis < op.operands[input].rank; ++axis) {
            if (axisName == op.operands[input].dims[axis] && sizeOf(input, axis) >= 0) {
                return sizeOf(input, axis);
            }
        }
    }
    return -1;
}

// What is wrong with the inputs' shapes; empty when they fit the schema.
//
// sizeOf(input, axis) is the size of an axis, or below 0 where it is not known yet; sizeOf(input, -1) is the rank.
template <typename SizeOf>
std::string sizeProblems(Op const& op, int32_t nbInputs, SizeOf&& sizeOf) {
    std::string const subject = std::string("dlo::") + op.name;
    if (nbInputs != op.nbInputs) {
        return subject + " got " + std::to_string(nbInputs) + " inputs; the schema has " + std::to_string(op.nbInputs);
    }
    std::string problems;
    auto const report = [&](std::string const& text) { problems += (problems.empty() ? "" : "\n") + subject + text; };
    for (int32_t input = 0; input < op.nbInputs; ++input) {
        Operand const& operand = op.operands[input];
        std::string const name = std::string(" input '") + operand.name + "'";
        if (sizeOf(input, -1) != operand.rank) {
            report(name + " has rank " + std::to_string(sizeOf(input, -1)) + "; expected "
                + std::to_string(operand.rank));
            continue;
        }
        for (int32_t axis = 0; axis < operand.rank; ++axis) {
            int64_t const size = sizeOf(input, axis);
            std::string const axisName = operand.dims[axis];
            if (size < 0) {
                continue;
            }
            if ((axisName == "hidden" || axisName == "intermediate") && size % kWidthMultiple != 0) {
                report(name + " has " + axisName + " " + std::to_string(size) + "; expected a multiple of "
                    + std::to_string(kWidthMultiple));
            }
            int64_t const expected = knownSize(op, input, axisName, sizeOf);
            if (expected >= 0 && expected != size) {
                report(name + " has " + axisName + " " + std::to_string(size) + "; expected "
                    + std::to_string(expected));
            }
        }
    }
    return problems;
}

}  // namespace dlo
