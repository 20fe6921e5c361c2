// Runs libdlo_plugins.so on a GPU without TensorRT: creates the plugins through its creators, gives them shapes, captures
// one enqueue in a CUDA graph, and replays that with other decisions.
//
//   plugin_host LIBRARY FOLDER
//
// FOLDER/cases.txt has a line for each case: name, operator, type (float32, float16, bfloat16), batch, sequence, the
// weight's rows, its columns, replays. Files hold raw values: NAME.<input>.bin, the scale of replay k NAME.scale.k.bin;
// NAME.output.k.bin is written, poisoned before each replay with bytes 0x7f, as are 4096 bytes on each side of the output.
// Ends with 0; with 1 where a plugin refused, a CUDA call failed or a guard was written; with 4 where there is no GPU.
#include <NvInferRuntime.h>

#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

namespace {

constexpr int kFailed = 1;
constexpr int kNoGpu = 4;
constexpr size_t kGuard = 4096;
constexpr unsigned char kPoison = 0x7f;

[[noreturn]] void stop(int code, std::string const& message) {
    std::fprintf(stderr, "plugin_host: %s\n", message.c_str());
    std::exit(code);
}

void* gDriver = nullptr;

// A function of the driver, by the name that cuda.h's macro gives it.
template <typename Function>
Function driverFunction(char const* name) {
    void* const symbol = dlsym(gDriver, name);
    if (symbol == nullptr) {
        stop(kNoGpu, std::string("libcuda.so.1 has no ") + name);
    }
    return reinterpret_cast<Function>(symbol);
}

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define CUDA_AS(code, name, ...)                                                                                      \
    do {                                                                                                              \
        CUresult const answer = driverFunction<decltype(&::name)>(TEXT(name))(__VA_ARGS__);                           \
        if (answer != CUDA_SUCCESS) {                                                                                 \
            stop(code, std::string(TEXT(name)) + " says " + std::to_string(answer));                                  \
        }                                                                                                             \
    } while (false)
#define CUDA(name, ...) CUDA_AS(kFailed, name, __VA_ARGS__)

struct Logger final : ILogger {
    void log(Severity, AsciiChar const* message) noexcept override { std::fprintf(stderr, "library: %s\n", message); }
};

struct Finder final : ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
    Logger logger;
};

struct Type {
    DataType type;
    size_t bytes;
};

std::map<std::string, Type> const kTypes{
    {"float32", {DataType::kFLOAT, 4}}, {"float16", {DataType::kHALF, 2}}, {"bfloat16", {DataType::kBF16, 2}}};

struct Case {
    std::string name;
    std::string op;
    std::string type;
    int64_t batch;
    int64_t sequence;
    int64_t depth;
    int64_t columns;
    int replays;
};

struct Operand {
    char const* name;
    Dims dims;
};

std::vector<Operand> operandsOf(Case const& c) {
    Dims const scale{2, {c.batch, c.sequence}};
    Dims const weight{2, {c.depth, c.columns}};
    if (c.op == "SkipGateUp") {
        return {{"hidden_states", Dims{3, {c.batch, c.sequence, c.depth}}}, {"scale", scale}, {"gate_weight", weight},
            {"up_weight", weight}};
    }
    return {{"gated", Dims{3, {c.batch, c.sequence, c.depth}}}, {"scale", scale}, {"down_weight", weight},
        {"residual", Dims{3, {c.batch, c.sequence, c.columns}}}};
}

size_t elements(Dims const& dims) {
    size_t count = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        count *= static_cast<size_t>(dims.d[i]);
    }
    return count;
}

std::vector<char> read(std::string const& path, size_t bytes) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (data.size() != bytes) {
        stop(kFailed, path + ": " + std::to_string(data.size()) + " bytes; expected " + std::to_string(bytes));
    }
    return data;
}

// Copies in the stream that the kernels run on, which does not wait for the default one: a copy there may still be under
// way when its call returns, and would lay poison over what a kernel has written.
void copy(CUdeviceptr address, std::vector<char> const& data, CUstream stream) {
    CUDA(cuMemcpyHtoDAsync, address, data.data(), data.size(), stream);
    CUDA(cuStreamSynchronize, stream);
}

CUdeviceptr upload(std::vector<char> const& data, CUstream stream) {
    CUdeviceptr address = 0;
    CUDA(cuMemAlloc, &address, data.size());
    copy(address, data, stream);
    return address;
}

IPluginV3OneRuntime& create(std::map<std::string, IPluginCreatorV3One*> const& creators, std::string const& op) {
    auto const found = creators.find(op);
    if (found == creators.end()) {
        stop(kFailed, "the library has no creator for " + op);
    }
    PluginFieldCollection const none{0, nullptr};
    IPluginV3* const plugin = found->second->createPlugin(op.c_str(), &none, TensorRTPhase::kRUNTIME);
    auto* const runtime
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* const attached = runtime->attachToContext(nullptr);
    return *static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

void run(Case const& c, std::string const& folder, IPluginV3OneRuntime& plugin, CUstream stream) {
    std::string const stem = folder + "/" + c.name + ".";
    Type const t = kTypes.at(c.type);
    PluginTensorDesc descs[4] = {};
    void const* inputs[4] = {};
    CUdeviceptr scale = 0;
    size_t const scaleBytes = static_cast<size_t>(c.batch * c.sequence) * 4;
    int32_t count = 0;
    for (Operand const& operand : operandsOf(c)) {
        bool const isScale = std::string("scale") == operand.name;
        descs[count] = {operand.dims, isScale ? DataType::kFLOAT : t.type, TensorFormat::kLINEAR, 1.F};
        CUdeviceptr const address = upload(isScale
                ? read(stem + "scale.0.bin", scaleBytes)
                : read(stem + operand.name + ".bin", elements(operand.dims) * t.bytes), stream);
        inputs[count++] = reinterpret_cast<void const*>(address);
        scale = isScale ? address : scale;
    }
    PluginTensorDesc const out{Dims{3, {c.batch, c.sequence, c.columns}}, t.type, TensorFormat::kLINEAR, 1.F};
    size_t const bytes = elements(out.dims) * t.bytes;
    std::vector<char> const poison(bytes + 2 * kGuard, static_cast<char>(kPoison));
    CUdeviceptr const guarded = upload(poison, stream);
    void* const output = reinterpret_cast<void*>(guarded + kGuard);
    if (plugin.onShapeChange(descs, count, &out, 1) != 0) {
        stop(kFailed, c.name + ": onShapeChange failed");
    }

    CUgraph graph = nullptr;
    CUgraphExec executable = nullptr;
    CUDA(cuStreamBeginCapture, stream, CU_STREAM_CAPTURE_MODE_GLOBAL);
    int32_t const status
        = plugin.enqueue(descs, &out, inputs, &output, nullptr, reinterpret_cast<cudaStream_t>(stream));
    CUDA(cuStreamEndCapture, stream, &graph);
    if (status != 0) {
        stop(kFailed, c.name + ": enqueue failed");
    }
    CUDA(cuGraphInstantiateWithFlags, &executable, graph, 0);

    // One capture; what a replay skips is what the scale says then.
    for (int replay = 0; replay < c.replays; ++replay) {
        std::string const number = std::to_string(replay) + ".bin";
        copy(scale, read(stem + "scale." + number, scaleBytes), stream);
        copy(guarded, poison, stream);
        CUDA(cuGraphLaunch, executable, stream);
        std::vector<char> result(poison.size());
        CUDA(cuMemcpyDtoHAsync, result.data(), guarded, result.size(), stream);
        CUDA(cuStreamSynchronize, stream);
        for (size_t i = 0; i < kGuard; ++i) {
            if (result[i] != poison[0] || result[kGuard + bytes + i] != poison[0]) {
                stop(kFailed, c.name + ": replay " + std::to_string(replay) + " wrote outside the output");
            }
        }
        std::ofstream(stem + "output." + number, std::ios::binary)
            .write(result.data() + kGuard, static_cast<std::streamsize>(bytes));
    }
    CUDA(cuGraphExecDestroy, executable);
    CUDA(cuGraphDestroy, graph);
    CUDA(cuMemFree, guarded);
    for (int32_t i = 0; i < count; ++i) {
        CUDA(cuMemFree, reinterpret_cast<CUdeviceptr>(inputs[i]));
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        stop(2, "usage: plugin_host LIBRARY FOLDER");
    }
    void* const library = dlopen(argv[1], RTLD_NOW);
    if (library == nullptr) {
        stop(kFailed, dlerror());
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    using SetLoggerFinder = void (*)(ILoggerFinder*);
    auto const getCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    auto const setLoggerFinder = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
    if (getCreators == nullptr || setLoggerFinder == nullptr) {
        stop(kFailed, std::string(argv[1]) + " is no TensorRT plugin library");
    }
    static Finder finder;
    setLoggerFinder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const list = getCreators(count);
    std::map<std::string, IPluginCreatorV3One*> creators;
    for (int32_t i = 0; i < count; ++i) {
        auto* const creator = static_cast<IPluginCreatorV3One*>(list[i]);
        creators[creator->getPluginName()] = creator;
    }

    gDriver = dlopen("libcuda.so.1", RTLD_NOW);
    if (gDriver == nullptr) {
        stop(kNoGpu, std::string("no CUDA driver: ") + dlerror());
    }
    CUdevice device = 0;
    CUcontext context = nullptr;
    CUstream stream = nullptr;
    CUDA_AS(kNoGpu, cuInit, 0);
    CUDA_AS(kNoGpu, cuDeviceGet, &device, 0);
    CUDA_AS(kNoGpu, cuDevicePrimaryCtxRetain, &context, device);
    CUDA(cuCtxSetCurrent, context);
    CUDA(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);

    std::string const folder = argv[2];
    std::ifstream cases(folder + "/cases.txt");
    int done = 0;
    for (std::string line; std::getline(cases, line); ++done) {
        Case c;
        std::istringstream words(line);
        if (!(words >> c.name >> c.op >> c.type >> c.batch >> c.sequence >> c.depth >> c.columns >> c.replays)
            || kTypes.count(c.type) == 0) {
            stop(kFailed, "cases.txt: cannot read '" + line + "'");
        }
        run(c, folder, create(creators, c.op), stream);
    }
    std::printf("%d cases\n", done);
    return done > 0 ? 0 : kFailed;
}
