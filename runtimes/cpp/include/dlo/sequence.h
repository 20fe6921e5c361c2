// One sequence of tokens in a model: its KV cache, which stays where ONNX Runtime reads and writes it.
#pragma once

#include <dlo/error.h>
#include <dlo/model.h>
#include <dlo/prompt_steps.h>

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace dlo {

// Of a routed layer: tokens fed, and those of them that did not skip.
struct Activity {
    int64_t tokens = 0;
    int64_t active = 0;

    double rate() const { return tokens > 0 ? static_cast<double>(active) / static_cast<double>(tokens) : 0; }
};

namespace detail {

// Memory of an allocator.
class Buffer {
public:
    explicit Buffer(OrtAllocator* allocator) : mAllocator(allocator) {}
    Buffer(Buffer&& other) noexcept
        : mAllocator(other.mAllocator),
          mData(std::exchange(other.mData, nullptr)),
          mBytes(std::exchange(other.mBytes, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(mAllocator, other.mAllocator);
        std::swap(mData, other.mData);
        std::swap(mBytes, other.mBytes);
        return *this;
    }
    ~Buffer() {
        if (mData != nullptr) mAllocator->Free(mAllocator, mData);
    }

    // Room for so many bytes; what was there is lost where it moves.
    void reserve(size_t bytes) {
        if (bytes <= mBytes) return;
        if (mData != nullptr) mAllocator->Free(mAllocator, std::exchange(mData, nullptr));
        mBytes = 0;
        try {
            mData = mAllocator->Alloc(mAllocator, bytes);
        } catch (std::exception const&) {  // the CPU's allocator throws where others return nothing
        }
        if (mData == nullptr) {
            throw MachineError(
                "no memory: " + std::to_string(bytes) + " bytes for the KV cache", "use a shorter prompt");
        }
        mBytes = bytes;
    }

    void* data() const { return mData; }
    size_t bytes() const { return mBytes; }

private:
    OrtAllocator* mAllocator;
    void* mData = nullptr;
    size_t mBytes = 0;
};

}  // namespace detail

// Used by one thread at a time; several sequences of one model may run at once.
class Sequence {
public:
    // model: outlives the sequence.
    explicit Sequence(Model& model) : mModel(model), mBinding(model.session()) {
        for (size_t i = 0; i < model.states().size(); ++i) {
            mPast.emplace_back(model.allocator());
            mPresent.emplace_back(model.allocator());
        }
        reset();
    }

    // Empties the cache and forgets who was active.
    void reset() {
        mTokens = 0;
        mActivity.clear();
        mLastActivity.clear();
        if (mModel.slots() == 0) return;
        size_t total = 0;
        for (State const& state : mModel.states()) total += bytesOf(state, 0);
        for (size_t i = 0; i < mPast.size(); ++i) {
            try {
                mPast[i].reserve(bytesOf(mModel.states()[i], 0));
            } catch (MachineError const&) {
                throw MachineError(mModel.artefact().folder.string() + ": no memory: a KV cache of "
                        + std::to_string(mModel.slots()) + " slots takes " + std::to_string(total) + " bytes",
                    "export with a smaller --static-cache, or let fewer sequences be open at once");
            }
        }
        // Attention multiplies by 0 what nobody has filled, so it must be numbers.
        for (detail::Buffer& slots : mPast) std::memset(slots.data(), 0, slots.bytes());
    }

    // Appends tokens in one step; returns the logits behind the last of them, float [vocab], valid until the next step.
    //
    // InputError: no tokens, one the model has not, or more than the cache has slots for. Error: ONNX Runtime failed;
    // the cache is as it was.
    std::vector<float> const& step(std::vector<int64_t> const& tokens) { return step(tokens.data(), tokens.size()); }

    // Appends a prompt in steps of so many tokens: at once, scores and mask grow with the square of it.
    std::vector<float> const& prefill(std::vector<int64_t> const& tokens, size_t stepTokens = kPREFILL_TOKENS) {
        if (stepTokens == 0) throw InputError("prefill in steps of 0 tokens", "");
        if (tokens.empty()) return step(tokens);  // refuses that
        feedInSteps(tokens.size(), stepTokens, [&](size_t first, size_t count) { step(tokens.data() + first, count); });
        return mLogits;
    }

    // Tokens in the cache.
    int64_t size() const { return mTokens; }

    // By routed layer, since the last reset; empty where the model shows no scores.
    std::map<int64_t, Activity> const& activity() const { return mActivity; }

    // The same of the last step alone.
    std::map<int64_t, Activity> const& lastActivity() const { return mLastActivity; }

private:
    std::vector<float> const& step(int64_t const* tokens, size_t count) {
        auto const added = static_cast<int64_t>(count);
        std::string const folder = mModel.artefact().folder.string();
        if (count == 0) {
            throw InputError(folder + ": a step of no tokens", "start with the beginning-of-sequence token");
        }
        for (size_t i = 0; i < count; ++i) {
            // ONNX counts negative numbers from the end.
            if (tokens[i] < 0 || (mModel.vocabulary() > 0 && tokens[i] >= mModel.vocabulary())) {
                int64_t const last = mModel.vocabulary() - 1;
                throw InputError(folder + ": token " + std::to_string(tokens[i]) + " is none of the model's",
                    last > 0 ? "they end at " + std::to_string(last) : "they begin at 0");
            }
        }
        if (mModel.slots() > 0 && mTokens + added > mModel.slots()) {
            throw InputError(folder + ": the cache is full: it holds " + std::to_string(mTokens) + " of "
                    + std::to_string(mModel.slots()) + " tokens and the step has " + std::to_string(count),
                "export with --static-cache " + std::to_string(mTokens + added) + " or more");
        }
        try {
            bindTokens(tokens, added);
            bindOutputs();
            bindCache(added);
            mModel.session().Run(Ort::RunOptions{nullptr}, mBinding);
            readOutputs(added);
        } catch (Ort::Exception const& error) {
            throw Error(folder + ": ONNX Runtime failed to run a step: " + error.what(), "");
        }
        mTokens += added;
        if (mModel.slots() == 0) std::swap(mPast, mPresent);  // what was written is read next
        return mLogits;
    }

    void bindTokens(int64_t const* tokens, int64_t count) {
        int64_t const total = mTokens + count;
        mIds.assign(tokens, tokens + count);
        bindInput("input_ids", mIds, {1, count});
        if (mModel.takes("attention_mask")) {
            mMask.assign(static_cast<size_t>(total), 1);
            bindInput("attention_mask", mMask, {1, total});
        }
        if (mModel.takes("position_ids")) {
            mPositions.resize(static_cast<size_t>(count));
            std::iota(mPositions.begin(), mPositions.end(), mTokens);
            bindInput("position_ids", mPositions, {1, count});
        }
        if (mModel.slots() > 0) {
            mLengths.assign(1, total);
            bindInput("kv_lengths", mLengths, {1});
        }
    }

    void bindInput(char const* name, std::vector<int64_t>& values, std::vector<int64_t> const& shape) {
        mBinding.BindInput(name,
            Ort::Value::CreateTensor<int64_t>(mHostMemory, values.data(), values.size(), shape.data(), shape.size()));
    }

    // Logits and scores come to the host, wherever they were computed; first in order, so that they are found there.
    void bindOutputs() {
        mBinding.BindOutput("logits", mHostMemory);
        for (auto const& [layer, name] : mModel.routerScores()) mBinding.BindOutput(name.c_str(), mHostMemory);
    }

    // A cache that grows has two sets of buffers that take turns; one that is written in place reads what it writes.
    void bindCache(int64_t added) {
        bool const inPlace = mModel.slots() > 0;
        for (size_t i = 0; i < mPast.size(); ++i) {
            State const& state = mModel.states()[i];
            detail::Buffer& past = mPast[i];
            detail::Buffer& present = inPlace ? past : mPresent[i];
            int64_t const total = mTokens + added;
            if (!inPlace && present.bytes() < bytesOf(state, total)) {
                present.reserve(bytesOf(state, total + total / 2 + kHEADROOM));
            }
            past.reserve(bytesOf(state, 1));  // an address, for a cache of no tokens too
            mBinding.BindInput(state.input.c_str(), tensor(past, state, mTokens));
            mBinding.BindOutput(state.output.c_str(), tensor(present, state, total));
        }
    }

    Ort::Value tensor(detail::Buffer const& buffer, State const& state, int64_t tokens) const {
        std::vector<int64_t> shape = state.shape;
        std::replace(shape.begin(), shape.end(), int64_t{-1}, tokens);
        return Ort::Value::CreateTensor(
            mModel.memory(), buffer.data(), bytesOf(state, tokens), shape.data(), shape.size(), state.type);
    }

    static size_t bytesOf(State const& state, int64_t tokens) {
        return static_cast<size_t>(state.elements(tokens)) * state.elementBytes;
    }

    void readOutputs(int64_t added) {
        std::vector<Ort::Value> const outputs = mBinding.GetOutputValues();
        auto const info = outputs.front().GetTensorTypeAndShapeInfo();
        std::vector<int64_t> const shape = info.GetShape();  // [1, tokens or 1, vocab]
        if (shape.size() != 3 || shape[0] != 1 || (shape[1] != added && shape[1] != 1) || shape[2] < 1) {
            throw notAsDeclared("logits");
        }
        auto const vocabulary = static_cast<size_t>(shape.at(2));
        size_t const skipped = static_cast<size_t>(shape[1] - 1) * vocabulary;
        mLogits.resize(vocabulary);
        switch (info.GetElementType()) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: {
            float const* row = outputs.front().GetTensorData<float>() + skipped;
            std::copy(row, row + vocabulary, mLogits.begin());
            break;
        }
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: widen<Ort::Float16_t>(outputs.front(), skipped); break;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: widen<Ort::BFloat16_t>(outputs.front(), skipped); break;
        default: throw notAsDeclared("logits");
        }
        size_t output = 1;
        for (auto const& [layer, name] : mModel.routerScores()) {
            auto const threshold = static_cast<float>(mModel.artefact().routerThresholds.at(layer));
            Ort::Value const& value = outputs.at(output++);
            if (value.GetTensorTypeAndShapeInfo().GetElementCount() != static_cast<size_t>(added)) {
                throw notAsDeclared(name);
            }
            float const* scores = value.GetTensorData<float>();
            int64_t const active
                = std::count_if(scores, scores + added, [=](float score) { return score > threshold; });
            mLastActivity[layer] = {added, active};
            mActivity[layer].tokens += added;
            mActivity[layer].active += active;
        }
    }

    InputError notAsDeclared(std::string const& output) const {
        return InputError(mModel.artefact().model().string() + ": output " + detail::shortened(output)
                + " is of another size or type than a step's",
            "export the model again");
    }

    template <typename Half>
    void widen(Ort::Value const& logits, size_t skipped) {
        Half const* row = logits.GetTensorData<Half>() + skipped;
        std::transform(row, row + mLogits.size(), mLogits.begin(), [](Half value) { return value.ToFloat(); });
    }

    // Tokens a new buffer has room for beyond those it is needed for; untouched pages of it cost no memory.
    static constexpr int64_t kHEADROOM = 256;

    Model& mModel;
    Ort::IoBinding mBinding;
    Ort::MemoryInfo mHostMemory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    std::vector<detail::Buffer> mPast;     // what the next step reads; in place, what it writes too
    std::vector<detail::Buffer> mPresent;  // what it writes
    std::vector<int64_t> mIds, mMask, mPositions, mLengths;  // bound, so they stay
    std::vector<float> mLogits;
    std::map<int64_t, Activity> mActivity, mLastActivity;
    int64_t mTokens = 0;
};

}  // namespace dlo
