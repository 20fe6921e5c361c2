// Loads libdlo_plugins.so as TensorRT does, on a machine without a CUDA driver, and prints what it answers.
#include "kernel.h"

#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <iterator>

using namespace nvinfer1;

namespace {

struct Logger final : ILogger {
    void log(Severity, AsciiChar const* message) noexcept override { std::printf("log: %s\n", message); }
};

struct Finder final : ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
    Logger logger;
};

void printKernels() {
    int32_t const capabilities[][2]
        = {{7, 5}, {8, 0}, {8, 6}, {8, 7}, {8, 9}, {9, 0}, {10, 0}, {10, 3}, {12, 0}, {12, 1}};
    for (auto const& [major, minor] : capabilities) {
        dlo::Kernel const* const kernel
            = dlo::findKernel("SkipDown", dlo::ElementType::kBF16, dlo::TileName::kDECODE, major, minor);
        std::printf("kernel %d.%d: ", major, minor);
        if (kernel == nullptr) {
            std::printf("none\n");
        } else {
            char const* const image = reinterpret_cast<char const*>(kernel->image);
            bool const whole = kernel->isPtx ? std::strstr(image, ".visible .entry skip_down_kernel") != nullptr
                                             : std::memcmp(image, "\x7f" "ELF", 4) == 0;
            std::printf("%s %d.%d %s\n", kernel->isPtx ? "ptx" : "cubin", kernel->major, kernel->minor,
                whole ? "whole" : "broken");
        }
    }
}

void run(IPluginCreatorV3One& creator, TensorRTPhase phase) {
    IPluginV3* const plugin = creator.createPlugin("layer", nullptr, phase);
    auto* const runtime
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginTensorDesc in[4] = {};
    PluginTensorDesc out[1] = {};
    in[0] = {Dims{3, {1, 1, 64}}, DataType::kBF16, TensorFormat::kLINEAR, 1.F};
    in[1] = {Dims{2, {1, 1}}, DataType::kFLOAT, TensorFormat::kLINEAR, 1.F};
    in[2] = {Dims{2, {64, 64}}, DataType::kBF16, TensorFormat::kLINEAR, 1.F};
    in[3] = in[2];
    out[0] = in[0];
    void const* inputs[4] = {};
    void* outputs[1] = {};
    int32_t const prepared = runtime->onShapeChange(in, 4, out, 1);
    std::printf("onShapeChange: %d\n", prepared);
    std::printf("enqueue: %d\n", runtime->enqueue(in, out, inputs, outputs, nullptr, nullptr));
    in[0].dims.d[0] = 0;
    std::printf("enqueue of nothing: %d\n", runtime->enqueue(in, out, inputs, outputs, nullptr, nullptr));
    delete plugin;
}

}  // namespace

int main(int, char** arguments) {
    printKernels();
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    using SetLoggerFinder = void (*)(ILoggerFinder*);
    static Finder finder;
    reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"))(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators
        = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    for (int32_t i = 0; i < count; ++i) {
        auto& creator = *static_cast<IPluginCreatorV3One*>(creators[i]);
        std::printf("creator: %s %s %s fields %d\n", creator.getPluginNamespace(), creator.getPluginName(),
            creator.getPluginVersion(), creator.getFieldNames()->nbFields);
    }
    std::printf("build phase\n");
    run(*static_cast<IPluginCreatorV3One*>(creators[1]), TensorRTPhase::kBUILD);
    std::printf("runtime phase\n");
    run(*static_cast<IPluginCreatorV3One*>(creators[1]), TensorRTPhase::kRUNTIME);
    return 0;
}
