// dlo::GatherActive: a router's decisions, and the rows of the tokens that it makes active, in one operator of the CPU
// provider. Its shape depends on data, which the schema's other operators know nothing of.
#pragma once

#include "custom_op.h"

namespace dlo {

struct GatherActiveOp final : OrtCustomOp {
    explicit GatherActiveOp(ProviderName provider) noexcept;

    ProviderName provider;
};

}  // namespace dlo
