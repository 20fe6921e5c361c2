// What ONNX Runtime looks for in a custom-operator library, RegisterCustomOps, and the version that ours answers with.
#include "custom_op.h"
#include "dlo_ops.h"
#include "gather_active.h"

#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define DLO_EXPORT extern "C" __attribute__((visibility("default")))

namespace dlo {

namespace {

// The operators live as long as the process: sessions refer to them.
std::deque<CustomOp> const& customOps() {
    static std::deque<CustomOp> const ops = [] {
        std::deque<CustomOp> made;
        for (Op const& op : kOps) {
            for (ElementType const type : kTypesOfT) {
                for (ProviderName const provider : {ProviderName::kCPU, ProviderName::kCUDA}) {
                    made.emplace_back(op, type, provider);
                }
            }
        }
        return made;
    }();
    return ops;
}

std::vector<OrtCustomOp const*> allOps() {
    static GatherActiveOp const gathering[] = {GatherActiveOp(ProviderName::kCPU), GatherActiveOp(ProviderName::kCUDA)};
    std::vector<OrtCustomOp const*> ops;
    for (CustomOp const& op : customOps()) {
        ops.push_back(&op);
    }
    for (GatherActiveOp const& op : gathering) {
        ops.push_back(&op);
    }
    return ops;
}

OrtStatus* registerAll(OrtSessionOptions* options, OrtApi const& api) {
    // A domain is not a session's, but every session gets all of it. It belongs to the ONNX Runtime that made it, of
    // which a process may hold several: one for each, as long as the process lives.
    static std::mutex mutex;
    static std::map<OrtApi const*, OrtCustomOpDomain*> domains;
    std::lock_guard<std::mutex> const lock(mutex);
    OrtCustomOpDomain*& domain = domains[&api];
    if (domain == nullptr) {
        OrtCustomOpDomain* made = nullptr;
        if (OrtStatus* const status = api.CreateCustomOpDomain(kNamespace, &made)) {
            return status;
        }
        for (OrtCustomOp const* const op : allOps()) {
            if (OrtStatus* const status = api.CustomOpDomain_Add(made, op)) {
                api.ReleaseCustomOpDomain(made);
                return status;
            }
        }
        domain = made;
    }
    return api.AddCustomOpDomain(options, domain);
}

}  // namespace

}  // namespace dlo

// The version of the operators that a model's opset_import must ask for; another program's library has no such symbol.
DLO_EXPORT int32_t dlo_operator_version() { return std::atoi(dlo::kVersion); }

DLO_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base) {
    OrtApi const* const api = base->GetApi(dlo::kApiVersion);
    if (api == nullptr) {
        // Statuses are made by the API; version 1 of it, which every ONNX Runtime has, makes them too.
        std::string const problem = "libdlo_ort.so: needs ONNX Runtime 1." + std::to_string(dlo::kApiVersion)
            + " or newer, this is " + base->GetVersionString();
        return base->GetApi(1)->CreateStatus(ORT_FAIL, problem.c_str());
    }
    return dlo::registerAll(options, *api);
}
