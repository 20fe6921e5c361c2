#include "driver.h"

#include <dlfcn.h>

#include <exception>
#include <map>
#include <mutex>
#include <utility>

namespace dlo {

namespace {

constexpr uint32_t kSharedBytesWithoutOptIn = 48 * 1024;

#define DLO_STRING_(x) #x
#define DLO_STRING(x) DLO_STRING_(x)  // expands cuda.h's macros, which carry a function's version: cuFoo -> cuFoo_v2
#define DLO_FUNCTION(name) decltype(&::name) name = find<decltype(&::name)>(DLO_STRING(name))

// libcuda's functions by name, so that nothing of it is linked.
class Driver {
public:
    static Driver const& get() {
        static Driver const driver;
        return driver;
    }

    std::string const& problem() const noexcept { return mProblem; }

private:
    template <typename Function>
    Function find(char const* name) {
        void* const symbol = mLibrary != nullptr ? dlsym(mLibrary, name) : nullptr;
        if (symbol == nullptr && mProblem.empty()) {
            mProblem = std::string("libcuda.so.1 has no ") + name + "\n\nhint: install a driver of CUDA 13 or newer";
        }
        return reinterpret_cast<Function>(symbol);
    }

    void* open() {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            mProblem = std::string("no CUDA driver: ") + dlerror() + "\n\nhint: the dlo kernels need an NVIDIA GPU";
        }
        return library;
    }

    // In this order: opening and finding write mProblem.
    std::string mProblem;
    void* mLibrary = open();

public:
    DLO_FUNCTION(cuGetErrorString);
    DLO_FUNCTION(cuCtxGetCurrent);
    DLO_FUNCTION(cuCtxGetId);
    DLO_FUNCTION(cuCtxGetDevice);
    DLO_FUNCTION(cuDeviceGetAttribute);
    DLO_FUNCTION(cuModuleLoadData);
    DLO_FUNCTION(cuModuleGetFunction);
    DLO_FUNCTION(cuFuncSetAttribute);
    DLO_FUNCTION(cuLaunchKernel);
};

struct CudaError : std::exception {
    explicit CudaError(std::string text) : message(std::move(text)) {}
    char const* what() const noexcept override { return message.c_str(); }
    std::string message;
};

void check(CUresult result, char const* call, std::string const& subject) {
    if (result != CUDA_SUCCESS) {
        char const* text = nullptr;
        Driver::get().cuGetErrorString(result, &text);
        std::string const reason = text != nullptr ? text : "error " + std::to_string(result);
        throw CudaError(subject + ": " + call + " says " + reason);
    }
}

// Modules live as long as the process: their context may end first, and takes them with it.
std::mutex gMutex;
std::map<std::pair<unsigned long long, Kernel const*>, CUfunction> gFunctions;

CUfunction functionOf(Kernel const& kernel, unsigned long long contextId, std::string const& subject) {
    Driver const& cuda = Driver::get();
    std::lock_guard<std::mutex> const lock(gMutex);
    auto const known = gFunctions.find({contextId, &kernel});
    if (known != gFunctions.end()) {
        return known->second;
    }
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    check(cuda.cuModuleLoadData(&module, kernel.image), "cuModuleLoadData", subject);
    check(cuda.cuModuleGetFunction(&function, module, kernel.entry), "cuModuleGetFunction", subject);
    if (kernel.sharedBytes > kSharedBytesWithoutOptIn) {
        check(cuda.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                  static_cast<int>(kernel.sharedBytes)),
            "cuFuncSetAttribute", subject);
    }
    gFunctions.emplace(std::make_pair(contextId, &kernel), function);
    return function;
}

LoadedKernel load(char const* op, ElementType type, TileName tile) {
    Driver const& cuda = Driver::get();
    std::string const subject = std::string("dlo::") + op;
    if (!cuda.problem().empty()) {
        throw CudaError(subject + ": " + cuda.problem());
    }
    CUcontext context = nullptr;
    check(cuda.cuCtxGetCurrent(&context), "cuCtxGetCurrent", subject);
    if (context == nullptr) {
        throw CudaError(subject + ": the calling thread has no CUDA context\n\nhint: call cudaSetDevice first");
    }
    unsigned long long contextId = 0;
    CUdevice device = 0;
    int major = 0;
    int minor = 0;
    check(cuda.cuCtxGetId(context, &contextId), "cuCtxGetId", subject);
    check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice", subject);
    check(cuda.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
        "cuDeviceGetAttribute", subject);
    check(cuda.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
        "cuDeviceGetAttribute", subject);
    LoadedKernel loaded;
    loaded.kernel = findKernel(op, type, tile, major, minor);
    if (loaded.kernel == nullptr) {
        throw CudaError(subject + ": no kernel for compute capability " + std::to_string(major) + "."
            + std::to_string(minor) + "; expected 8.0 or newer\n\nhint: build the model with another lowering");
    }
    loaded.function = functionOf(*loaded.kernel, contextId, subject);
    return loaded;
}

}  // namespace

std::string loadKernel(char const* op, ElementType type, TileName tile, LoadedKernel& loaded) noexcept {
    try {
        loaded = load(op, type, tile);
        return {};
    } catch (std::exception const& error) {
        return error.what();
    }
}

std::string launchKernel(
    LoadedKernel const& loaded, uint32_t gridX, uint32_t gridY, void** parameters, CUstream stream) noexcept {
    Kernel const& kernel = *loaded.kernel;
    try {
        check(Driver::get().cuLaunchKernel(loaded.function, gridX, gridY, 1, kernel.threads, 1, 1, kernel.sharedBytes,
                  stream, parameters, nullptr),
            "cuLaunchKernel", std::string("dlo::") + kernel.op);
        return {};
    } catch (std::exception const& error) {
        return error.what();
    }
}

}  // namespace dlo
