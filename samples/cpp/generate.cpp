// Generates tokens greedily with the engine that `dlo-export MODEL --trt` wrote: one sequence, static KV cache.
//
//   dlo_generate engines/model.engine --tokens 1,450,7483 --new 16
//   dlo_generate engines/prefill.engine engines/decode.engine --tokens 1,450,7483     (exported with --trt-split)
//
// Prints the new token ids, one line, comma-separated. Compiled in tests; running it needs a GPU, and nobody has yet.
#include <dlo/prompt_steps.h>

#include <NvInferRuntime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace trt = nvinfer1;

struct UsageError : std::runtime_error {
    using runtime_error::runtime_error;
};

struct Arguments {
    std::vector<std::string> engines;  // one, or prefill and decode
    std::vector<int64_t> tokens;       // the prompt
    std::string plugins;               // libdlo_plugins.so, if the engine needs it
    int64_t newTokens = 32;
    int64_t endToken = -1;  // none
};

void check(cudaError_t status, std::string const& what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(what + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
    }
}

class Logger final : public trt::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << message << '\n';
    }
};

using DeviceMemory = std::unique_ptr<void, decltype(&cudaFree)>;
using Stream = std::unique_ptr<CUstream_st, decltype(&cudaStreamDestroy)>;

// Zeroed: slots of the cache that no token has written must still be numbers.
DeviceMemory zeroedMemory(std::string const& name, size_t bytes) {
    void* address = nullptr;
    check(cudaMalloc(&address, bytes), std::to_string(bytes) + " bytes for " + name);
    DeviceMemory memory(address, &cudaFree);
    check(cudaMemset(address, 0, bytes), "zeroing " + name);
    return memory;
}

size_t elementBytes(trt::DataType type) {
    switch (type) {
    case trt::DataType::kINT64: return 8;
    case trt::DataType::kFLOAT: return 4;
    case trt::DataType::kHALF:
    case trt::DataType::kBF16: return 2;
    default: throw std::runtime_error("the engine has a tensor of an unknown type");
    }
}

float toFloat(void const* values, size_t index, trt::DataType type) {
    switch (type) {
    case trt::DataType::kHALF: return __half2float(static_cast<__half const*>(values)[index]);
    case trt::DataType::kBF16: return __bfloat162float(static_cast<__nv_bfloat16 const*>(values)[index]);
    default: return static_cast<float const*>(values)[index];
    }
}

// An optimization profile of an engine, with a context of its own.
struct Profile {
    trt::ICudaEngine* engine;
    std::unique_ptr<trt::IExecutionContext> context;
    int64_t leastTokens, mostTokens;
};

class Decoder {
public:
    explicit Decoder(Arguments const& arguments) : mRuntime(trt::createInferRuntime(mLogger)) {
        if (!mRuntime) throw std::runtime_error("TensorRT does not start");
        if (!arguments.plugins.empty() && !mRuntime->getPluginRegistry().loadLibrary(arguments.plugins.c_str())) {
            throw std::runtime_error(arguments.plugins + ": is no plugin library of this TensorRT");
        }
        cudaStream_t stream = nullptr;
        check(cudaStreamCreate(&stream), "a CUDA stream");
        mStream.reset(stream);
        for (std::string const& path : arguments.engines) load(path);
        allocate();
    }

    // Appends a prompt in steps that the largest profile takes; returns the most likely next token.
    int64_t prefill(std::vector<int64_t> const& tokens) {
        requireRoom(static_cast<int64_t>(tokens.size()));  // for all of them, before the first step
        int64_t next = -1;
        dlo::feedInSteps(tokens.size(), stepTokens(), [&](size_t first, size_t count) {
            auto const begin = tokens.begin() + static_cast<std::ptrdiff_t>(first);
            next = step({begin, begin + static_cast<std::ptrdiff_t>(count)});
        });
        return next;
    }

    // Appends tokens to the cache in one step; returns the most likely next one.
    int64_t step(std::vector<int64_t> const& tokens) {
        auto const count = static_cast<int64_t>(tokens.size());
        requireRoom(count);
        Profile& profile = profileFor(count);
        std::vector<int64_t> positions(tokens.size());
        std::iota(positions.begin(), positions.end(), mCached);
        upload(profile, "input_ids", tokens, trt::Dims2(1, count));
        upload(profile, "position_ids", positions, trt::Dims2(1, count));
        upload(profile, "write_indices", {mCached}, trt::Dims{1, {1}});      // slot of the first token
        upload(profile, "kv_lengths", {mCached + count}, trt::Dims{1, {1}});  // tokens in the cache behind this step
        if (!profile.context->enqueueV3(mStream.get())) throw std::runtime_error("TensorRT failed to run a step");
        mCached += count;
        return mostLikely(profile);
    }

private:
    void requireRoom(int64_t count) const {
        if (mCached + count <= mMaxCache) return;
        throw std::runtime_error("the cache is full: it holds " + std::to_string(mCached) + " of "
            + std::to_string(mMaxCache) + " tokens and " + std::to_string(count) + " more are to be fed"
            + "\n\nhint: export with --trt-max-cache " + std::to_string(mCached + count) + " or more");
    }

    // As many as are worth feeding at once, and as some profile takes.
    size_t stepTokens() const {
        int64_t most = 0;
        for (Profile const& profile : mProfiles) most = std::max(most, profile.mostTokens);
        return std::min(dlo::kPREFILL_TOKENS, static_cast<size_t>(most));
    }

    void load(std::string const& path) {
        std::ifstream file(path, std::ios::binary | std::ios::ate);
        if (!file) throw UsageError(path + ": cannot be read");
        std::vector<char> plan(static_cast<size_t>(file.tellg()));
        file.seekg(0).read(plan.data(), static_cast<std::streamsize>(plan.size()));
        std::unique_ptr<trt::ICudaEngine> engine(mRuntime->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine) {
            throw std::runtime_error(path + ": TensorRT cannot load it\n\nhint: an engine runs in the TensorRT version "
                "that built it, on the GPUs it was built for, with its plugin library (--plugins)");
        }
        for (int32_t i = 0; i < engine->getNbOptimizationProfiles(); ++i) {
            std::unique_ptr<trt::IExecutionContext> context(engine->createExecutionContext());
            if (!context || !context->setOptimizationProfileAsync(i, mStream.get()))
                throw std::runtime_error(path + ": no execution context for profile " + std::to_string(i));
            trt::Dims const least = engine->getProfileShape("input_ids", i, trt::OptProfileSelector::kMIN);
            trt::Dims const most = engine->getProfileShape("input_ids", i, trt::OptProfileSelector::kMAX);
            if (least.nbDims != 2) throw std::runtime_error(path + ": no input_ids; is it an engine of dlo-export?");
            mProfiles.push_back({engine.get(), std::move(context), least.d[1], most.d[1]});
        }
        mEngines.push_back(std::move(engine));
    }

    // One buffer per tensor, for all profiles and engines; present and past share theirs: the cache changes in place.
    void allocate() {
        int64_t mostTokens = 0;
        for (Profile const& profile : mProfiles) mostTokens = std::max(mostTokens, profile.mostTokens);
        trt::ICudaEngine& engine = *mEngines.front();
        for (int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
            std::string const name = engine.getIOTensorName(i);
            trt::Dims shape = engine.getTensorShape(name.c_str());
            if (name.rfind("past_key_values.", 0) == 0) mMaxCache = shape.d[2];
            if (engine.getAliasedInputTensor(name.c_str()) != nullptr) continue;
            size_t bytes = elementBytes(engine.getTensorDataType(name.c_str()));
            for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
                // What varies is the batch, here 1, in front, and the number of tokens behind it.
                int64_t const size = shape.d[axis] >= 0 ? shape.d[axis] : axis == 0 ? 1 : mostTokens;
                bytes *= static_cast<size_t>(size);
            }
            mBuffers.emplace(name, zeroedMemory(name, bytes));
        }
        if (mMaxCache < 1) throw UsageError("the engine's cache grows\n\nhint: export without --trt-cache growing");
        for (Profile& profile : mProfiles) bind(profile);
    }

    void bind(Profile& profile) {
        for (int32_t i = 0; i < profile.engine->getNbIOTensors(); ++i) {
            char const* name = profile.engine->getIOTensorName(i);
            char const* past = profile.engine->getAliasedInputTensor(name);
            auto const buffer = mBuffers.find(past != nullptr ? past : name);
            if (buffer == mBuffers.end()) throw UsageError(std::string(name) + ": the engines are not of one model");
            profile.context->setTensorAddress(name, buffer->second.get());
            trt::Dims shape = profile.engine->getTensorShape(name);
            if (std::string(name).rfind("past_", 0) == 0) {
                shape.d[0] = 1;
                profile.context->setInputShape(name, shape);
            }
        }
    }

    // The profile with the fewest tokens that has room: decode has one of its own.
    Profile& profileFor(int64_t tokens) {
        Profile* best = nullptr;
        for (Profile& profile : mProfiles) {
            bool const fits = profile.leastTokens <= tokens && tokens <= profile.mostTokens;
            if (fits && (best == nullptr || profile.mostTokens < best->mostTokens)) best = &profile;
        }
        if (best == nullptr)
            throw UsageError("no profile of the engine takes " + std::to_string(tokens)
                + " tokens at once\n\nhint: export with --trt-max-sequence " + std::to_string(tokens) + " or more");
        return *best;
    }

    void upload(Profile& profile, char const* name, std::vector<int64_t> const& values, trt::Dims const& shape) {
        size_t const bytes = values.size() * sizeof(int64_t);
        void* address = mBuffers.at(name).get();
        check(cudaMemcpyAsync(address, values.data(), bytes, cudaMemcpyHostToDevice, mStream.get()), name);
        if (!profile.context->setInputShape(name, shape))
            throw std::runtime_error(std::string("TensorRT refuses the shape of ") + name);
    }

    int64_t mostLikely(Profile const& profile) {
        trt::DataType const type = profile.engine->getTensorDataType("logits");
        trt::Dims const shape = profile.context->getTensorShape("logits");  // [1, tokens or 1, vocabulary]
        size_t const vocabulary = static_cast<size_t>(shape.d[2]), rowBytes = vocabulary * elementBytes(type);
        auto const* logits = static_cast<char const*>(mBuffers.at("logits").get());
        std::vector<char> row(rowBytes);
        char const* last = logits + static_cast<size_t>(shape.d[1] - 1) * rowBytes;
        check(cudaMemcpyAsync(row.data(), last, rowBytes, cudaMemcpyDeviceToHost, mStream.get()), "logits");
        check(cudaStreamSynchronize(mStream.get()), "a step");
        size_t best = 0;
        for (size_t i = 1; i < vocabulary; ++i) {
            best = toFloat(row.data(), i, type) > toFloat(row.data(), best, type) ? i : best;
        }
        return static_cast<int64_t>(best);
    }

    // Destroyed from the last to the first: contexts before their engines, and all before the runtime and its log.
    Logger mLogger;
    Stream mStream{nullptr, &cudaStreamDestroy};
    std::unique_ptr<trt::IRuntime> mRuntime;
    std::vector<std::unique_ptr<trt::ICudaEngine>> mEngines;
    std::map<std::string, DeviceMemory> mBuffers;
    std::vector<Profile> mProfiles;
    int64_t mMaxCache{0};
    int64_t mCached{0};
};

int64_t number(std::string const& text, std::string const& option) {
    int64_t value = 0;
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 0) {
        throw UsageError(option + " got '" + text + "', expected a number >= 0");
    }
    return value;
}

std::vector<int64_t> numbers(std::string const& text, std::string const& option) {
    std::vector<int64_t> values;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) values.push_back(number(part, option));
    return values;
}

Arguments parse(int count, char** values) {
    Arguments arguments;
    for (int i = 1; i < count; ++i) {
        std::string const name = values[i], value = i + 1 < count ? values[i + 1] : "";
        if (name.rfind("--", 0) != 0) {
            arguments.engines.push_back(name);
            continue;
        }
        ++i;
        if (name == "--tokens") {
            arguments.tokens = numbers(value, name);
        } else if (name == "--new") {
            arguments.newTokens = number(value, name);
        } else if (name == "--end") {
            arguments.endToken = number(value, name);
        } else if (name == "--plugins") {
            arguments.plugins = value;
        } else {
            throw UsageError(name + " is unknown, expected --tokens, --new, --end or --plugins");
        }
    }
    if (arguments.engines.empty() || arguments.engines.size() > 2 || arguments.tokens.empty()) {
        throw UsageError("usage: dlo_generate ENGINE [DECODE_ENGINE] --tokens 1,2 [--new N] [--end ID] [--plugins SO]");
    }
    return arguments;
}

}  // namespace

int main(int count, char** values) try {
    Arguments const arguments = parse(count, values);
    int gpus = 0;
    cudaError_t const status = cudaGetDeviceCount(&gpus);
    if (status != cudaSuccess || gpus == 0) {
        std::cerr << "error: no GPU can be used: " << cudaGetErrorString(status) << '\n';
        return 4;
    }
    Decoder decoder(arguments);
    int64_t token = arguments.newTokens > 0 ? decoder.prefill(arguments.tokens) : -1;
    for (int64_t made = 1; made <= arguments.newTokens; ++made) {
        std::cout << (made > 1 ? "," : "") << token << std::flush;
        if (token == arguments.endToken || made == arguments.newTokens) break;
        token = decoder.step({token});
    }
    std::cout << '\n';
    return 0;
} catch (UsageError const& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
} catch (std::exception const& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
}
