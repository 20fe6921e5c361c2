// What TensorRT looks for in a plugin library: getCreators and setLoggerFinder.
#include "dlo_ops.h"
#include "log.h"
#include "skip_plugin.h"

#include <NvInferRuntime.h>

#include <array>
#include <new>
#include <utility>

#define DLO_EXPORT extern "C" __attribute__((visibility("default")))

namespace dlo {

namespace {

class SkipPluginCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit SkipPluginCreator(Op const& op) noexcept : mOp(op) {}

    nvinfer1::IPluginV3* createPlugin(
        char const*, nvinfer1::PluginFieldCollection const*, nvinfer1::TensorRTPhase phase) noexcept override {
        return new (std::nothrow) SkipPlugin(mOp, phase);
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
        static nvinfer1::PluginFieldCollection const none{0, nullptr};
        return &none;
    }

    char const* getPluginName() const noexcept override { return mOp.name; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    Op const& mOp;
};

template <size_t... indices>
nvinfer1::IPluginCreatorInterface* const* creators(std::index_sequence<indices...>) noexcept {
    static SkipPluginCreator made[] = {SkipPluginCreator{kOps[indices]}...};
    static nvinfer1::IPluginCreatorInterface* const list[] = {&made[indices]...};
    return list;
}

}  // namespace

}  // namespace dlo

DLO_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    nbCreators = static_cast<int32_t>(dlo::kPluginOps);
    return dlo::creators(std::make_index_sequence<dlo::kPluginOps>{});
}

DLO_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { dlo::setLoggerFinder(finder); }
