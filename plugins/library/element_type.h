// The element types an operand may have, by words of our own: TensorRT and ONNX Runtime number theirs differently.
#pragma once

#include <cstdint>

namespace dlo {

enum class ElementType : int32_t { kFLOAT, kHALF, kBF16 };

}  // namespace dlo
