// The CUDA driver, opened when a kernel is first needed: the library loads and builds engines on a machine without one.
#pragma once

#include "kernel.h"

#include <cuda.h>

#include <string>

namespace dlo {

// Code of a kernel in the calling thread's CUDA context.
struct LoadedKernel {
    Kernel const* kernel{nullptr};
    CUfunction function{nullptr};
};

// Loads a kernel for the calling thread's device, once per CUDA context and process. May allocate and synchronise: call
// it before a stream is captured.
//
// Returns an empty string, or what went wrong and what to do about it.
std::string loadKernel(char const* op, ElementType type, TileName tile, LoadedKernel& loaded) noexcept;

// Launches on a stream. Neither allocates nor synchronises, so a stream may be capturing.
//
// Returns an empty string, or what went wrong.
std::string launchKernel(
    LoadedKernel const& loaded, uint32_t gridX, uint32_t gridY, void** parameters, CUstream stream) noexcept;

}  // namespace dlo
