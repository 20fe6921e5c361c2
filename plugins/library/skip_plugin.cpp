#include "skip_plugin.h"

#include "launch.h"
#include "log.h"
#include "sizes.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>

namespace dlo {

using namespace nvinfer1;

namespace {

constexpr int32_t kFailed = -1;

// The type in our words; kFLOAT, kHALF and kBF16 mean the same in TensorRT's. Others cannot be T.
bool elementType(DataType type, ElementType& found) noexcept {
    switch (type) {
    case DataType::kFLOAT: found = ElementType::kFLOAT; break;
    case DataType::kHALF: found = ElementType::kHALF; break;
    case DataType::kBF16: found = ElementType::kBF16; break;
    default: return false;
    }
    return std::find(std::begin(kTypesOfT), std::end(kTypesOfT), found) != std::end(kTypesOfT);
}

bool isTypeOfT(DataType type) noexcept {
    ElementType found{};
    return elementType(type, found);
}

// The T of an operator given its inputs: that of the first input that is T. Every operator begins with one.
DataType typeOfT(DataType const* inputTypes) noexcept { return inputTypes[0]; }

int32_t refuse(std::string const& problems) noexcept {
    logError(problems + "\n\nhint: " + kSizesHint);
    return kFailed;
}

}  // namespace

IPluginCapability* SkipPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* SkipPlugin::clone() noexcept { return new (std::nothrow) SkipPlugin(*this); }

char const* SkipPlugin::getPluginName() const noexcept { return mOp.name; }

char const* SkipPlugin::getPluginVersion() const noexcept { return kVersion; }

char const* SkipPlugin::getPluginNamespace() const noexcept { return kNamespace; }

int32_t SkipPlugin::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) noexcept {
    auto const sizeOf = [&](int32_t input, int32_t axis) -> int64_t {
        return axis < 0 ? in[input].desc.dims.nbDims : in[input].desc.dims.d[axis];
    };
    std::string const problems = sizeProblems(mOp, nbInputs, sizeOf);
    return problems.empty() ? 0 : refuse(problems);
}

int32_t SkipPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept {
    bool fits = nbInputs == mOp.nbInputs && nbOutputs == mOp.nbOutputs && isTypeOfT(typeOfT(inputTypes));
    for (int32_t i = 0; fits && i < nbInputs; ++i) {
        fits = inputTypes[i] == (mOp.operands[i].isT ? typeOfT(inputTypes) : DataType::kFLOAT);
    }
    if (!fits) {
        return refuse(std::string("dlo::") + mOp.name
            + ": operand types; expected fp32 for scale, and one of fp32, fp16, bf16 for all others");
    }
    for (int32_t i = 0; i < nbOutputs; ++i) {
        outputTypes[i] = mOp.operands[nbInputs + i].isT ? typeOfT(inputTypes) : DataType::kFLOAT;
    }
    return 0;
}

int32_t SkipPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t, IExprBuilder&) noexcept {
    // While a model is parsed a refusal becomes a parser error; later TensorRT-RTX does not survive one.
    auto const sizeOf = [&](int32_t input, int32_t axis) -> int64_t {
        if (axis < 0) {
            return inputs[input].nbDims;
        }
        IDimensionExpr const* const size = inputs[input].d[axis];
        return size->isConstant() ? size->getConstantValue() : -1;
    };
    std::string const problems = sizeProblems(mOp, nbInputs, sizeOf);
    if (!problems.empty()) {
        return refuse(problems);
    }
    outputs[0].nbDims = mOp.operands[mOp.nbInputs].rank;
    for (int32_t axis = 0; axis < outputs[0].nbDims; ++axis) {
        AxisSource const source = mOp.outputAxes[axis];
        outputs[0].d[axis] = inputs[source.input].d[source.axis];
    }
    return 0;
}

bool SkipPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t, int32_t) noexcept {
    PluginTensorDesc const& desc = inOut[pos].desc;
    bool const typed = mOp.operands[pos].isT ? isTypeOfT(desc.type) && desc.type == inOut[0].desc.type
                                             : desc.type == DataType::kFLOAT;
    return typed && desc.format == TensorFormat::kLINEAR;
}

int32_t SkipPlugin::getNbOutputs() const noexcept { return mOp.nbOutputs; }

std::string SkipPlugin::loadKernels(DataType type) noexcept {
    ElementType element{};
    if (!elementType(type, element)) {
        return std::string("dlo::") + mOp.name + ": no kernel for this operand type";
    }
    for (int32_t tile = 0; tile < kTileCount; ++tile) {
        std::string problem = loadKernel(mOp.name, element, static_cast<TileName>(tile), mKernels[tile]);
        if (!problem.empty()) {
            return problem;
        }
    }
    return {};
}

int32_t SkipPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept {
    if (mPhase == TensorRTPhase::kBUILD) {
        return 0;  // an engine may be built without a driver; one that times kernels loads them in enqueue
    }
    std::string const problem = loadKernels(in[0].type);
    if (!problem.empty()) {
        logError(problem);
        return kFailed;
    }
    return 0;
}

// One launch and nothing else once the kernels are loaded, which onShapeChange has done before any capture.
int32_t SkipPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void*, cudaStream_t stream) noexcept {
    Dims const& rows = inputDesc[0].dims;
    Dims const& weight = inputDesc[mOp.weightInput].dims;
    int64_t const tokenCount = rows.d[0] * rows.d[1];
    if (tokenCount == 0) {
        return 0;
    }
    LoadedKernel& loaded = mKernels[static_cast<int32_t>(tileFor(tokenCount))];
    if (loaded.function == nullptr) {
        std::string const problem = loadKernels(inputDesc[0].type);
        if (!problem.empty()) {
            logError(problem);
            return kFailed;
        }
    }
    std::string const problem
        = launchOperator(loaded, mOp, inputs, outputs[0], {tokenCount, weight.d[0], weight.d[1]}, stream);
    if (!problem.empty()) {
        logError(problem);
        return kFailed;
    }
    return 0;
}

IPluginV3* SkipPlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

PluginFieldCollection const* SkipPlugin::getFieldsToSerialize() noexcept {
    static PluginFieldCollection const none{0, nullptr};
    return &none;
}

}  // namespace dlo
