// Loads libdlo_ort.so as ONNX Runtime does and prints what it answers where no session gets to: to an ONNX Runtime that
// is too old, and to a CUDA provider on a machine without a driver. Arguments: the library, then ONNX Runtime's.
#include <onnxruntime_c_api.h>

#include <dlfcn.h>

#include <cstdio>
#include <vector>

namespace {

OrtApi gApi;  // the installed one's, but for what records
std::vector<OrtCustomOp const*> gOps;

void print(char const* subject, OrtStatus* status) {
    std::printf("%s: %s\n", subject, status == nullptr ? "made" : gApi.GetErrorMessage(status));
}

}  // namespace

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    void* const runtime = dlopen(arguments[2], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr || runtime == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    auto const getBase = reinterpret_cast<OrtApiBase const* (*)()>(dlsym(runtime, "OrtGetApiBase"));
    auto const registerOps
        = reinterpret_cast<OrtStatus* (*)(OrtSessionOptions*, OrtApiBase const*)>(dlsym(library, "RegisterCustomOps"));
    gApi = *getBase()->GetApi(17);
    OrtApiBase const old{[](uint32_t version) noexcept -> OrtApi const* { return version <= 16 ? &gApi : nullptr; },
        []() noexcept { return "1.16.0"; }};
    print("old", registerOps(nullptr, &old));

    gApi.CustomOpDomain_Add = [](OrtCustomOpDomain*, OrtCustomOp const* op) noexcept -> OrtStatus* {
        gOps.push_back(op);
        return nullptr;
    };
    // A node of no session: nothing is known of its inputs.
    gApi.KernelInfo_GetInputTypeInfo = [](OrtKernelInfo const*, size_t, OrtTypeInfo** info) noexcept -> OrtStatus* {
        *info = nullptr;
        return nullptr;
    };
    gApi.CastTypeInfoToTensorInfo
        = [](OrtTypeInfo const*, OrtTensorTypeAndShapeInfo const** tensor) noexcept -> OrtStatus* {
        *tensor = nullptr;
        return nullptr;
    };
    gApi.KernelInfoGetConstantInput_tensor
        = [](OrtKernelInfo const*, size_t, int* isConstant, OrtValue const** value) noexcept -> OrtStatus* {
        *isConstant = 0;
        *value = nullptr;
        return nullptr;
    };
    OrtApiBase const recording{
        [](uint32_t) noexcept -> OrtApi const* { return &gApi; }, []() noexcept { return "recording"; }};
    OrtSessionOptions* options = nullptr;
    gApi.CreateSessionOptions(&options);
    print("registration", registerOps(options, &recording));
    for (OrtCustomOp const* const op : gOps) {
        void* kernel = nullptr;
        OrtStatus* const status = op->CreateKernelV2(op, &gApi, nullptr, &kernel);
        std::printf("%s ", op->GetExecutionProviderType(op));
        print(op->GetName(op), status);
        if (status == nullptr) {
            op->KernelDestroy(kernel);
        }
    }
    return 0;
}
