// Messages through the logger of whichever TensorRT loaded the library.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace dlo {

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;
void logError(std::string const& message) noexcept;

}  // namespace dlo
