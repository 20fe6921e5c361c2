// ONNX Runtime's C API as C++ wants it: statuses as exceptions, shapes as vectors.
#pragma once

#include <onnxruntime_c_api.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace dlo {

// The version of ONNX Runtime's C API that is used, whatever that of the headers: every later one serves it too. The
// newest function used, KernelContext_ParallelFor, came with it.
inline constexpr uint32_t kApiVersion = 17;

// What ONNX Runtime answers, as an exception within this library.
struct StatusError : std::exception {
    explicit StatusError(OrtStatus* failed) noexcept : status(failed) {}
    OrtStatus* status;
};

inline void check(OrtStatus* status) {
    if (status != nullptr) {
        throw StatusError(status);
    }
}

// Runs what may throw; ONNX Runtime's C API takes statuses.
template <typename Work>
OrtStatus* guarded(OrtApi const& api, Work const& work) noexcept {
    try {
        work();
        return nullptr;
    } catch (StatusError const& error) {
        return error.status;
    } catch (std::exception const& error) {
        return api.CreateStatus(ORT_FAIL, error.what());
    }
}

inline void refuse(std::string const& problem) {
    if (!problem.empty()) {
        throw std::runtime_error(problem);
    }
}

inline std::vector<int64_t> dimensionsOf(OrtApi const& api, OrtTensorTypeAndShapeInfo const* info) {
    size_t rank = 0;
    check(api.GetDimensionsCount(info, &rank));
    std::vector<int64_t> shape(rank);
    check(api.GetDimensions(info, shape.data(), rank));
    return shape;
}

// What a session knows of a node's inputs before it runs, which is all of the weights: an axis that it does not know is
// -1, and a shape that it does not know is empty.
inline std::vector<int64_t> declaredShape(OrtApi const& api, OrtKernelInfo const* node, int32_t input) {
    OrtTypeInfo* info = nullptr;
    check(api.KernelInfo_GetInputTypeInfo(node, static_cast<size_t>(input), &info));
    std::unique_ptr<OrtTypeInfo, decltype(api.ReleaseTypeInfo)> const owner(info, api.ReleaseTypeInfo);
    OrtTensorTypeAndShapeInfo const* tensor = nullptr;
    check(api.CastTypeInfoToTensorInfo(info, &tensor));
    return tensor == nullptr ? std::vector<int64_t>{} : dimensionsOf(api, tensor);
}

inline std::vector<int64_t> shapeOf(OrtApi const& api, OrtValue const* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api.GetTensorTypeAndShape(value, &info));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> const owner(
        info, api.ReleaseTensorTypeAndShapeInfo);
    return dimensionsOf(api, info);
}

inline void* dataOf(OrtApi const& api, OrtValue const* value) {
    void* data = nullptr;
    check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return data;
}

// Calls work(0) … work(count - 1) on ONNX Runtime's own threads, as many as the session has.
template <typename Work>
void parallelFor(OrtApi const& api, OrtKernelContext* context, size_t count, Work const& work) {
    auto const call = [](void* data, size_t item) { (*static_cast<Work const*>(data))(item); };
    // 0: it cuts the range itself
    check(api.KernelContext_ParallelFor(context, call, count, 0, const_cast<Work*>(&work)));
}

}  // namespace dlo
