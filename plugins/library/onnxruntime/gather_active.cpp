#include "gather_active.h"

#include "cpu_kernels.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace dlo {

namespace {

// Operands, by their places in graph_passes/spec/ops.py.
enum Input : size_t { kSTREAM, kWEIGHT, kTHRESHOLD, kVALUES, kINPUTS };
enum Output : size_t { kSCORES, kINDEX, kROWS, kOUTPUTS };
constexpr char const* kInputNames[] = {"hidden_states", "router_weight", "threshold", "values"};

using Shape = std::vector<int64_t>;

constexpr int64_t kUnknown = -1;

// A node of a session.
struct GatherActive {
    OrtApi const& api;
    int64_t width;  // of streams, where the router is constant
};

void expect(bool holds, Input input, std::string const& problem) {
    if (!holds) {
        refuse(std::string("dlo::GatherActive input '") + kInputNames[input] + "' " + problem);
    }
}

void checkRank(Shape const& shape, Input input, size_t rank) {
    expect(shape.size() == rank, input,
        "has rank " + std::to_string(shape.size()) + "; expected " + std::to_string(rank));
}

void checkAxis(Shape const& shape, Input input, size_t axis, char const* name, int64_t expected) {
    expect(shape[axis] == expected, input,
        std::string("has ") + name + " " + std::to_string(shape[axis]) + "; expected " + std::to_string(expected));
}

// The width of streams that a router reads.
int64_t routerWidth(Shape const& weight, Shape const& threshold) {
    checkRank(weight, kWEIGHT, 2);
    checkRank(threshold, kTHRESHOLD, 0);
    checkAxis(weight, kWEIGHT, 1, "one", 1);
    return weight[0];
}

// The same of a constant router, asked once: a step then asks for the shapes of its tokens alone.
int64_t constantRouterWidth(OrtApi const& api, OrtKernelInfo const* node) {
    OrtValue const* router[] = {nullptr, nullptr};
    for (Input const input : {kWEIGHT, kTHRESHOLD}) {
        int isConstant = 0;
        OrtValue const*& value = router[input - kWEIGHT];
        check(api.KernelInfoGetConstantInput_tensor(node, input, &isConstant, &value));
        if (isConstant == 0 || value == nullptr) {
            return kUnknown;
        }
    }
    return routerWidth(shapeOf(api, router[0]), shapeOf(api, router[1]));
}

OrtValue* makeOutput(OrtApi const& api, OrtKernelContext* context, Output output, int64_t const* dims, size_t rank) {
    OrtValue* value = nullptr;
    check(api.KernelContext_GetOutput(context, output, dims, rank, &value));
    return value;
}

// Calls work(0) … work(count - 1), on ONNX Runtime's threads where there is more than one.
template <typename Work>
void forEach(OrtApi const& api, OrtKernelContext* context, int64_t count, Work const& work) {
    if (count == 1) {
        work(0);
    } else if (count > 0) {
        parallelFor(api, context, static_cast<size_t>(count), work);
    }
}

void compute(GatherActive const& kernel, OrtKernelContext* context) {
    OrtApi const& api = kernel.api;
    OrtValue const* inputs[kINPUTS];
    float const* data[kINPUTS];
    for (size_t i = 0; i < kINPUTS; ++i) {
        check(api.KernelContext_GetInput(context, i, &inputs[i]));
        data[i] = static_cast<float const*>(dataOf(api, inputs[i]));
    }
    Shape const stream = shapeOf(api, inputs[kSTREAM]), values = shapeOf(api, inputs[kVALUES]);
    bool const asks = kernel.width == kUnknown;
    checkRank(stream, kSTREAM, 3);
    checkAxis(stream, kSTREAM, 2, "hidden",
        asks ? routerWidth(shapeOf(api, inputs[kWEIGHT]), shapeOf(api, inputs[kTHRESHOLD])) : kernel.width);
    checkRank(values, kVALUES, 3);
    checkAxis(values, kVALUES, 0, "batch", stream[0]);
    checkAxis(values, kVALUES, 1, "sequence", stream[1]);
    int64_t const sequence = stream[1], tokens = stream[0] * sequence, hidden = stream[2], width = values[2];

    // The decision is made on the score, by its threshold alone: NaN is skipped, as Greater has it.
    auto* const scores = static_cast<float*>(dataOf(api, makeOutput(api, context, kSCORES, stream.data(), 2)));
    forEach(api, context, tokens, [&](int64_t token) {
        scores[token] = routerScore(data[kSTREAM] + token * hidden, data[kWEIGHT], hidden);
    });
    float const threshold = *data[kTHRESHOLD];
    int64_t active = 0;
    for (int64_t token = 0; token < tokens; ++token) {
        active += scores[token] > threshold;
    }

    int64_t const places[] = {active, 2}, rowed[] = {active, width};
    auto* const index = static_cast<int64_t*>(dataOf(api, makeOutput(api, context, kINDEX, places, 2)));
    auto* const rows = static_cast<float*>(dataOf(api, makeOutput(api, context, kROWS, rowed, 2)));
    for (int64_t token = 0, row = 0; token < tokens; ++token) {
        if (scores[token] > threshold) {
            index[2 * row] = token / sequence;
            index[2 * row + 1] = token % sequence;
            ++row;
        }
    }
    forEach(api, context, active, [&](int64_t row) {
        int64_t const token = index[2 * row] * sequence + index[2 * row + 1];
        std::memcpy(rows + row * width, data[kVALUES] + token * width, sizeof(float) * static_cast<size_t>(width));
    });
}

}  // namespace

GatherActiveOp::GatherActiveOp(ProviderName provider) noexcept : OrtCustomOp{}, provider(provider) {
    version = kApiVersion;
    GetName = [](OrtCustomOp const*) { return "GatherActive"; };
    GetExecutionProviderType = [](OrtCustomOp const* op) {
        return static_cast<GatherActiveOp const*>(op)->provider == ProviderName::kCPU ? "CPUExecutionProvider"
                                                                                     : "CUDAExecutionProvider";
    };
    GetInputTypeCount = [](OrtCustomOp const*) -> size_t { return kINPUTS; };
    GetOutputTypeCount = [](OrtCustomOp const*) -> size_t { return kOUTPUTS; };
    GetInputType = [](OrtCustomOp const*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetOutputType = [](OrtCustomOp const*, size_t output) {
        return output == kINDEX ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    };
    GetInputCharacteristic = [](OrtCustomOp const*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](OrtCustomOp const*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](OrtCustomOp const*, size_t) { return OrtMemTypeDefault; };
    CreateKernelV2 = [](OrtCustomOp const* op, OrtApi const* api, OrtKernelInfo const* node, void** kernel) {
        return guarded(*api, [&] {
            if (static_cast<GatherActiveOp const*>(op)->provider == ProviderName::kCUDA) {
                refuse("dlo::GatherActive: is for the CPU provider; on CUDA the host would wait for the number of active "
                       "tokens\n\nhint: export the model again with --provider cuda");
            }
            *kernel = new GatherActive{*api, constantRouterWidth(*api, node)};
        });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        GatherActive const& node = *static_cast<GatherActive const*>(kernel);
        return guarded(node.api, [&] { compute(node, context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<GatherActive*>(kernel); };
}

}  // namespace dlo
