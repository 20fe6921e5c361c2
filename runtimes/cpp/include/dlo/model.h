// An artefact's graph, open in ONNX Runtime: what sequences share.
#pragma once

#include <dlo/artefact.h>
#include <dlo/error.h>
#include <dlo/graph_interface.h>
#include <dlo/router_scores.h>

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace dlo {

// How a model is run; every default is what `dlo run` does.
struct Options {
    int threads = 0;              // of one operator; 0 leaves it to ONNX Runtime
    bool allowSpinning = true;    // let idle threads spin: faster alone, a disturbance to others
    std::string provider;         // "cpu" or "cuda"; empty: what the artefact was made for. No other one takes over.
    int deviceId = 0;             // of "cuda"
    std::filesystem::path pluginLibrary;  // libdlo_ort.so; loaded where the artefact has dlo operators, and never else
    bool routerScores = true;     // show who was active; false runs the released graph as it is
};

// The session is used by as many sequences, and threads, as there are. It refers to nothing but the environment.
class Model {
public:
    // env: ONNX Runtime's environment, which outlives the model.
    // folder: an artefact.
    //
    // InputError: the artefact cannot be read, or is of a kind that this header does not run.
    // MachineError: the provider, the plugin library or a recent enough ONNX Runtime is not there.
    Model(Ort::Env& env, std::filesystem::path const& folder, Options const& options = {})
        : mArtefact(Artefact::open(folder)), mOptions(options) {
        if (mOptions.provider.empty()) mOptions.provider = mArtefact.provider;
        checkVersion();
        Ort::SessionOptions session = sessionOptions();
        try {
            open(env, session);
        } catch (Ort::Exception const& error) {
            std::string const message = mArtefact.model().string() + ": ONNX Runtime " + Ort::GetVersionString()
                + " cannot load it: " + error.what();
            // On a GPU a driver or memory may be what is missing: whose fault it is, nobody can tell.
            if (mOptions.provider == "cuda") {
                throw Error(message, "the graph, the driver or the GPU's memory may be at fault");
            }
            throw InputError(message, "the file is damaged, or it needs another ONNX Runtime");
        }
        mInterface = GraphInterface::of(mSession, mArtefact.model().string());
        chooseMemory();
    }

    Model(Model const&) = delete;  // sequences refer to it
    Model& operator=(Model const&) = delete;

    Artefact const& artefact() const { return mArtefact; }
    Ort::Session& session() { return mSession; }

    // Slots for tokens of a cache written in place; 0 where the cache grows.
    int64_t slots() const { return mInterface.slots; }
    // Token ids are below it; 0 where the graph does not say.
    int64_t vocabulary() const { return mInterface.vocabulary; }
    std::vector<State> const& states() const { return mInterface.states; }
    bool takes(std::string const& input) const {
        auto const& inputs = mInterface.inputs;
        return std::find(inputs.begin(), inputs.end(), input) != inputs.end();
    }
    // Outputs with the routers' scores, by layer.
    std::map<int64_t, std::string> const& routerScores() const { return mScores; }

    // Where the cache lies.
    OrtMemoryInfo const* memory() const { return mMemory; }
    OrtAllocator* allocator() { return mOptions.provider == "cuda" ? mDevice : mHost; }

private:
    // Older ones refuse the graph's opset in words of their own; 1.23.0 loads it and computes wrong numbers.
    static void checkVersion() {
        std::string const version = Ort::GetVersionString();
        int major = 0, minor = 0, patch = 0;
        std::sscanf(version.c_str(), "%d.%d.%d", &major, &minor, &patch);
        if (std::vector{major, minor, patch} < std::vector{1, 23, 1}) {
            throw MachineError("ONNX Runtime " + version + " is too old, the graph needs 1.23.1 or newer",
                "link a newer libonnxruntime");
        }
    }

    Ort::SessionOptions sessionOptions() const {
        Ort::SessionOptions session;
        if (mOptions.threads > 0) session.SetIntraOpNumThreads(mOptions.threads);
        session.AddConfigEntry("session.intra_op.allow_spinning", mOptions.allowSpinning ? "1" : "0");
        // A plan of where to allocate is made and kept for every shape: of a growing cache, with each token.
        if (mArtefact.growingCache) session.DisableMemPattern();
        if (mOptions.provider == "cuda") {
            addCuda(session);
        } else if (mOptions.provider != "cpu") {
            throw InputError("provider is '" + mOptions.provider + "', expected cpu or cuda", "");
        }
        if (!mArtefact.pluginOperators.empty()) addPlugins(session);
        return session;
    }

    // Throws where this ONNX Runtime has no CUDA; the CPU does not take over.
    void addCuda(Ort::SessionOptions& session) const {
        char const* hint
            = "link libonnxruntime of a CUDA build, with NVIDIA's driver and libraries; or take the provider cpu";
        OrtCUDAProviderOptionsV2* cuda = nullptr;
        OrtApi const& api = Ort::GetApi();
        try {
            Ort::ThrowOnError(api.CreateCUDAProviderOptions(&cuda));
            std::string const device = std::to_string(mOptions.deviceId);
            char const* const keys[] = {"device_id", "use_tf32"};
            char const* const values[] = {device.c_str(), "0"};  // fp32 is float32
            Ort::ThrowOnError(api.UpdateCUDAProviderOptions(cuda, keys, values, 2));
            session.AppendExecutionProvider_CUDA_V2(*cuda);
        } catch (Ort::Exception const& error) {
            if (cuda != nullptr) api.ReleaseCUDAProviderOptions(cuda);
            throw MachineError(std::string("CUDA does not start in this ONNX Runtime: ") + error.what(), hint);
        }
        api.ReleaseCUDAProviderOptions(cuda);
    }

    void addPlugins(Ort::SessionOptions& session) const {
        std::string const folder = mArtefact.folder.string();
        if (mOptions.pluginLibrary.empty()) {
            throw MachineError(folder + ": its operators (" + detail::shortened(mArtefact.pluginOperators.front())
                    + ", …) are in libdlo_ort.so alone, and none is given",
                "build plugins/library, and give its libdlo_ort.so");
        }
        try {
            session.RegisterCustomOpsLibrary(mOptions.pluginLibrary.c_str());
        } catch (Ort::Exception const& error) {
            throw MachineError(mOptions.pluginLibrary.string() + ": cannot be used: " + error.what(),
                "build it for this machine");
        }
    }

    void open(Ort::Env& env, Ort::SessionOptions& options) {
        std::filesystem::path const file = mArtefact.model();
        if (!mOptions.routerScores || mArtefact.routerThresholds.empty()) {
            mSession = Ort::Session(env, file.c_str(), options);
            return;
        }
        std::ifstream stream(file, std::ios::binary);
        std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
        ExposedGraph const graph = exposeRouterScores(std::move(bytes), file.string());
        for (auto const& [layer, threshold] : mArtefact.routerThresholds) {
            if (graph.names.count(layer) == 0) {
                throw InputError(file.string() + ": has no router in layer " + std::to_string(layer)
                        + ", which dlo_artifact.json calls routed",
                    "export the model again");
            }
        }
        for (auto const& [layer, name] : graph.names) {
            if (mArtefact.routerThresholds.count(layer) == 0) {
                throw InputError(file.string() + ": has a router in layer " + std::to_string(layer)
                        + ", which dlo_artifact.json does not call routed",
                    "export the model again");
            }
        }
        mScores = graph.names;
        // A graph in memory says no more where its weights lie.
        options.AddConfigEntry("session.model_external_initializers_file_folder_path",
            std::filesystem::absolute(mArtefact.folder).c_str());
        mSession = Ort::Session(env, graph.bytes.data(), graph.bytes.size(), options);
    }

    void chooseMemory() {
        Ort::AllocatorWithDefaultOptions host;
        mHost = host;
        mMemory = mHostMemory;
        if (mOptions.provider != "cuda") return;
        if (mInterface.slots > 0) {
            throw InputError(mArtefact.model().string() + ": a static cache runs on the provider cpu alone here",
                "use dlo run");
        }
        mCudaMemory = Ort::MemoryInfo("Cuda", OrtDeviceAllocator, mOptions.deviceId, OrtMemTypeDefault);
        mCudaAllocator = Ort::Allocator(mSession, mCudaMemory);
        mDevice = mCudaAllocator;
        mMemory = mCudaMemory;
    }

    Artefact mArtefact;
    Options mOptions;
    Ort::Session mSession{nullptr};
    GraphInterface mInterface;
    std::map<int64_t, std::string> mScores;
    Ort::MemoryInfo mHostMemory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    Ort::MemoryInfo mCudaMemory{nullptr};
    Ort::Allocator mCudaAllocator{nullptr};
    OrtAllocator* mHost = nullptr;
    OrtAllocator* mDevice = nullptr;
    OrtMemoryInfo const* mMemory = nullptr;
};

}  // namespace dlo
