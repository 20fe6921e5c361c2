// What a graph takes and gives, compared with what a sequence binds to it.
#pragma once

#include <dlo/error.h>

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace dlo {

// An input that carries state from step to step, and the output that continues it.
struct State {
    std::string input;
    std::string output;
    ONNXTensorElementDataType type;
    std::vector<int64_t> shape;  // of one sequence; -1 where it has as many entries as tokens
    size_t elementBytes;

    // Tokens it has room for; -1 for any number.
    int64_t slots() const { return shape[shape.size() == 4 ? 2 : 1]; }

    int64_t elements(int64_t tokens) const {
        int64_t count = 1;
        for (int64_t size : shape) count *= size < 0 ? tokens : size;
        return count;
    }
};

// Inputs and outputs of a decoder with a KV cache.
struct GraphInterface {
    std::vector<std::string> inputs;
    std::vector<State> states;
    int64_t slots = 0;       // for tokens of a cache written in place; 0 where the cache grows
    int64_t vocabulary = 0;  // token ids are below it; 0 where the graph does not say

    // Memory will be of the sizes that are declared, so what does not fit together is refused here, by its name.
    //
    // file: of the graph, for messages.
    //
    // InputError: it is no such decoder.
    static GraphInterface of(Ort::Session& session, std::string const& file);
};

namespace detail {

struct TensorType {
    ONNXTensorElementDataType element;
    std::vector<int64_t> shape;  // -1 where a dimension has a name; nothing where the graph does not say
};

class InterfaceReader {
public:
    explicit InterfaceReader(std::string file) : mFile(std::move(file)) {}

    GraphInterface read(Ort::Session& session) {
        Ort::AllocatorWithDefaultOptions const host;
        for (size_t i = 0; i < session.GetInputCount(); ++i) {
            std::string const name = session.GetInputNameAllocated(i, host).get();
            mFound.inputs.push_back(name);
            addInput(name, tensorType(session.GetInputTypeInfo(i), "input " + name));
        }
        std::map<std::string, TensorType> outputs;
        for (size_t i = 0; i < session.GetOutputCount(); ++i) {
            std::string const name = session.GetOutputNameAllocated(i, host).get();
            outputs[name] = tensorType(session.GetOutputTypeInfo(i), "output " + name);
        }
        for (State const& state : mFound.states) checkContinuation(state, outputs);
        if (!takes("input_ids") || mFound.states.empty() || outputs.count("logits") == 0) {
            throw InputError(mFile + ": is no decoder with a KV cache", "give a folder that dlo-export wrote");
        }
        mFound.vocabulary = vocabularyOf(outputs.at("logits"));
        bool const inPlace = takes("kv_lengths");
        mFound.slots = inPlace ? mFound.states.front().slots() : 0;
        for (State const& state : mFound.states) {
            if (state.slots() != (inPlace ? mFound.slots : -1) || mFound.slots < 0) {
                throw unusable("input " + state.input + " has room for "
                    + (state.slots() < 0 ? "any number of" : std::to_string(state.slots())) + " tokens, expected "
                    + (!inPlace ? "any number" : "the same number as the other layers"));
            }
        }
        return mFound;
    }

private:
    bool takes(std::string const& input) const {
        return std::find(mFound.inputs.begin(), mFound.inputs.end(), input) != mFound.inputs.end();
    }

    InputError unusable(std::string const& problem) const {
        return InputError(mFile + ": " + problem, "export the model again");
    }

    TensorType tensorType(Ort::TypeInfo const& type, std::string const& name) const {
        if (type.GetONNXType() != ONNX_TYPE_TENSOR) throw unusable(name + " is no tensor");
        auto const tensor = type.GetTensorTypeAndShapeInfo();
        return {tensor.GetElementType(), tensor.GetShape()};
    }

    void addInput(std::string const& name, TensorType const& type) {
        // What a step says of its tokens, and how many dimensions that has.
        static std::map<std::string, size_t> const kTOKENS{
            {"input_ids", 2}, {"attention_mask", 2}, {"position_ids", 2}, {"kv_lengths", 1}};
        if (auto const tokens = kTOKENS.find(name); tokens != kTOKENS.end()) {
            // A name in place of a number, or 1 for the batch; nothing where the graph does not say.
            std::vector<int64_t> const& shape = type.shape;
            bool const isFree = shape.empty()
                || (shape.size() == tokens->second && shape.front() <= 1
                    && std::all_of(shape.begin() + 1, shape.end(), [](int64_t size) { return size < 0; }));
            if (type.element != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 || !isFree) {
                char const* expected = tokens->second == 1 ? "[batch]" : "[batch, tokens]";
                throw unusable("input " + name + " is not int64 " + expected);
            }
            return;
        }
        static std::vector<std::pair<std::string, std::string>> const kSTATES{
            {"past_key_values.", "present."}, {"past_active.", "present_active."}};
        for (auto const& [past, present] : kSTATES) {
            if (name.rfind(past, 0) == 0) return addState(name, present + name.substr(past.size()), type);
        }
        throw unusable("input " + detail::shortened(name) + " is none that this header feeds");
    }

    void addState(std::string const& input, std::string const& output, TensorType const& type) {
        // Keys and values [batch, heads, tokens, head_dim]; who was active [batch, tokens].
        size_t const bytes = bytesOf(type.element), tokens = type.shape.size() == 4 ? 2 : 1;
        double total = static_cast<double>(bytes);
        bool isKnown = bytes > 0 && (type.shape.size() == 4 || type.shape.size() == 2) && type.shape.front() <= 1;
        for (size_t i = 1; i < type.shape.size(); ++i) {
            isKnown = isKnown && (type.shape[i] > 0 || (type.shape[i] < 0 && i == tokens));
            total *= static_cast<double>(type.shape[i] < 0 ? kMOST_TOKENS : type.shape[i]);
        }
        if (!isKnown || total > kMOST_BYTES) {
            throw unusable("input " + input
                + " is not [batch, heads, tokens, head_dim] or [batch, tokens] of a type that caches have");
        }
        std::vector<int64_t> shape = type.shape;
        shape.front() = 1;
        mFound.states.push_back({input, output, type.element, shape, bytes});
    }

    // What a step writes is what the next one reads: of the same size, unless the output's has a name (-1).
    void checkContinuation(State const& state, std::map<std::string, TensorType> const& outputs) const {
        auto const found = outputs.find(state.output);
        if (found == outputs.end()) throw unusable("input " + state.input + " has no output " + state.output);
        TensorType const& type = found->second;
        auto const agree = [](int64_t written, int64_t read) { return written == read || written < 0; };
        bool const isSame = type.element == state.type
            && (type.shape.empty()
                || std::equal(type.shape.begin(), type.shape.end(), state.shape.begin(), state.shape.end(), agree));
        if (!isSame) throw unusable("output " + state.output + " is of another type or size than input " + state.input);
    }

    int64_t vocabularyOf(TensorType const& type) const {
        auto const& [element, shape] = type;
        bool const isFloat = element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
            || element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 || element == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
        if (!isFloat || (shape.size() != 3 && !shape.empty())) {
            throw unusable("output logits is not [batch, tokens, vocabulary] of floats");
        }
        return shape.empty() ? 0 : std::max<int64_t>(shape[2], 0);
    }

    // Per element; 0 for a type that no cache has.
    static size_t bytesOf(ONNXTensorElementDataType type) {
        switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return 4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return 2;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return 1;
        default: return 0;
        }
    }

    // Beyond these, sizes in bytes are no numbers of 64 bits any more.
    static constexpr int64_t kMOST_TOKENS = int64_t{1} << 31;
    static constexpr double kMOST_BYTES = 4e18;

    std::string mFile;
    GraphInterface mFound;
};

}  // namespace detail

inline GraphInterface GraphInterface::of(Ort::Session& session, std::string const& file) {
    try {
        return detail::InterfaceReader(file).read(session);
    } catch (Ort::Exception const& error) {
        throw InputError(file + ": ONNX Runtime does not say what it takes: " + error.what(), "export the model again");
    }
}

}  // namespace dlo
