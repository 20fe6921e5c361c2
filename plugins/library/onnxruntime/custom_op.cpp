#include "custom_op.h"

#include "api_calls.h"
#include "cpu_kernels.h"
#include "driver.h"
#include "launch.h"
#include "sizes.h"

#include <memory>
#include <new>
#include <string>
#include <vector>

namespace dlo {

namespace {

CustomOp const& self(OrtCustomOp const* op) noexcept { return *static_cast<CustomOp const*>(op); }

ONNXTensorElementDataType onnxType(ElementType type) noexcept {
    switch (type) {
    case ElementType::kHALF: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case ElementType::kBF16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case ElementType::kFLOAT: break;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

// A node of a session.
struct NodeKernel {
    OrtApi const& api;
    CustomOp const& op;
    LoadedKernel loaded[kTileCount];  // on a GPU, so that a capturing stream finds both
};

// Refuses sizes that the schema does not allow, all of them at once.
void refuseSizes(Op const& op, std::vector<int64_t> const (&shapes)[kMaxOperands], bool declared) {
    std::string const problems = sizeProblems(op, op.nbInputs, [&](int32_t input, int32_t axis) -> int64_t {
        std::vector<int64_t> const& shape = shapes[input];
        if (declared && shape.empty()) {
            return axis < 0 ? op.operands[input].rank : -1;
        }
        return axis < 0 ? static_cast<int64_t>(shape.size()) : shape[static_cast<size_t>(axis)];
    });
    refuse(problems.empty() ? problems : problems + "\n\nhint: " + kSizesHint);
}

void prepare(NodeKernel& kernel, OrtKernelInfo const* node) {
    CustomOp const& op = kernel.op;
    std::vector<int64_t> shapes[kMaxOperands];
    for (int32_t i = 0; i < op.op.nbInputs; ++i) {
        shapes[i] = declaredShape(kernel.api, node, i);
    }
    refuseSizes(op.op, shapes, true);
    if (op.provider == ProviderName::kCPU) {
        if (op.type != ElementType::kFLOAT) {
            char const* const word = op.type == ElementType::kHALF ? "float16" : "bfloat16";
            refuse(std::string("dlo::") + op.op.name + ": on a CPU it computes float32 alone, the model is " + word
                + "\n\nhint: export the model with --dtype fp32");
        }
        return;
    }
    for (int32_t tile = 0; tile < kTileCount; ++tile) {
        refuse(loadKernel(op.op.name, op.type, static_cast<TileName>(tile), kernel.loaded[tile]));
    }
}

void computeOnCpu(NodeKernel const& kernel, OrtKernelContext* context, void const* const* inputs, void* output,
    Launch const& launch) {
    float const* operands[kMaxOperands];
    for (int32_t i = 0; i < kernel.op.op.nbInputs; ++i) {
        operands[i] = static_cast<float const*>(inputs[i]);
    }
    auto const shared = [&](size_t total, std::function<void(size_t)> const& work) {
        parallelFor(kernel.api, context, total, work);
    };
    findCpuKernel(kernel.op.op.name)(
        {operands, static_cast<float*>(output), launch.tokens, launch.depth, launch.columns, shared});
}

void computeOnGpu(NodeKernel const& kernel, OrtKernelContext* context, void const* const* inputs, void* output,
    Launch const& launch) {
    void* stream = nullptr;
    check(kernel.api.KernelContext_GetGPUComputeStream(context, &stream));
    refuse(launchOperator(kernel.loaded[static_cast<int32_t>(tileFor(launch.tokens))], kernel.op.op, inputs, output, launch,
        static_cast<CUstream>(stream)));
}

void compute(NodeKernel const& kernel, OrtKernelContext* context) {
    OrtApi const& api = kernel.api;
    Op const& op = kernel.op.op;
    std::vector<int64_t> shapes[kMaxOperands];
    void const* inputs[kMaxOperands];
    for (int32_t i = 0; i < op.nbInputs; ++i) {
        OrtValue const* value = nullptr;
        check(api.KernelContext_GetInput(context, static_cast<size_t>(i), &value));
        shapes[i] = shapeOf(api, value);
        inputs[i] = dataOf(api, value);
    }
    refuseSizes(op, shapes, false);
    int64_t dims[kMaxRank];
    auto const rank = static_cast<size_t>(op.operands[op.nbInputs].rank);
    for (size_t axis = 0; axis < rank; ++axis) {
        AxisSource const source = op.outputAxes[axis];
        dims[axis] = shapes[source.input][static_cast<size_t>(source.axis)];
    }
    OrtValue* output = nullptr;
    check(api.KernelContext_GetOutput(context, 0, dims, rank, &output));
    std::vector<int64_t> const& weight = shapes[op.weightInput];
    Launch const launch{dims[0] * dims[1], weight[0], weight[1]};
    if (launch.tokens > 0) {
        auto const run = kernel.op.provider == ProviderName::kCPU ? computeOnCpu : computeOnGpu;
        run(kernel, context, inputs, dataOf(api, output), launch);
    }
}

}  // namespace

CustomOp::CustomOp(Op const& op, ElementType type, ProviderName provider) noexcept
    : OrtCustomOp{}, op(op), type(type), provider(provider) {
    version = kApiVersion;
    GetName = [](OrtCustomOp const* op) { return self(op).op.name; };
    GetExecutionProviderType = [](OrtCustomOp const* op) {
        return self(op).provider == ProviderName::kCPU ? "CPUExecutionProvider" : "CUDAExecutionProvider";
    };
    GetInputTypeCount = [](OrtCustomOp const* op) { return static_cast<size_t>(self(op).op.nbInputs); };
    GetOutputTypeCount = [](OrtCustomOp const* op) { return static_cast<size_t>(self(op).op.nbOutputs); };
    GetInputType = [](OrtCustomOp const* op, size_t index) {
        return onnxType(self(op).op.operands[index].isT ? self(op).type : ElementType::kFLOAT);
    };
    GetOutputType = [](OrtCustomOp const* op, size_t index) {
        size_t const operand = static_cast<size_t>(self(op).op.nbInputs) + index;
        return onnxType(self(op).op.operands[operand].isT ? self(op).type : ElementType::kFLOAT);
    };
    GetInputCharacteristic = [](OrtCustomOp const*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](OrtCustomOp const*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](OrtCustomOp const*, size_t) { return OrtMemTypeDefault; };
    CreateKernelV2 = [](OrtCustomOp const* op, OrtApi const* api, OrtKernelInfo const* node, void** kernel) {
        return guarded(*api, [&] {
            auto made = std::make_unique<NodeKernel>(NodeKernel{*api, self(op), {}});
            prepare(*made, node);
            *kernel = made.release();
        });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        NodeKernel const& node = *static_cast<NodeKernel const*>(kernel);
        return guarded(node.api, [&] { compute(node, context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<NodeKernel*>(kernel); };
}

}  // namespace dlo
