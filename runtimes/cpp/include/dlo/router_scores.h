// Shows what the routers decide: their scores as further outputs of a released graph, in memory alone.
#pragma once

#include <dlo/error.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace dlo {

// A graph whose routers' scores are outputs, and the names of these.
struct ExposedGraph {
    std::string bytes;                    // of an ONNX ModelProto
    std::map<int64_t, std::string> names;  // by routed layer: float in (0, 1), one per token, batch first
};

namespace detail {

// Walks the fields of a serialized Protocol Buffers message; groups, which ONNX has none of, are refused.
class Fields {
public:
    Fields(std::string_view message, std::string const& file) : mMessage(message), mFile(file) {}

    // Goes to the next field; false behind the last.
    bool next() {
        if (mAt == mMessage.size()) return false;
        uint64_t const key = varint();
        number = key >> 3;
        content = {};
        switch (key & 7) {
        case 0: varint(); break;
        case 1: content = bytes(8); break;
        case 2: content = bytes(varint()); break;
        case 5: content = bytes(4); break;
        default: fail();
        }
        return true;
    }

    uint64_t number = 0;
    std::string_view content;  // of a text or an embedded message

private:
    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            if (mAt == mMessage.size()) fail();
            auto const byte = static_cast<unsigned char>(mMessage[mAt++]);
            value |= static_cast<uint64_t>(byte & 0x7F) << shift;
            if (byte < 0x80) return value;
        }
        fail();
    }

    std::string_view bytes(uint64_t count) {
        if (count > mMessage.size() - mAt) fail();
        mAt += count;
        return mMessage.substr(mAt - count, count);
    }

    [[noreturn]] void fail() const {
        throw InputError(mFile + ": is no ONNX graph, or is cut short", "copy the artefact again");
    }

    std::string_view mMessage;
    std::string const& mFile;
    size_t mAt = 0;
};

inline void appendVarint(std::string& message, uint64_t value) {
    for (; value >= 0x80; value >>= 7) message += static_cast<char>(value | 0x80);
    message += static_cast<char>(value);
}

// A field of type text or embedded message.
inline std::string field(uint64_t number, std::string_view content) {
    std::string message;
    appendVarint(message, number << 3 | 2);
    appendVarint(message, content.size());
    return message.append(content);
}

// Numbers of fields in onnx.proto.
inline constexpr uint64_t kMODEL_GRAPH = 7, kGRAPH_NODE = 1, kGRAPH_OUTPUT = 12;
inline constexpr uint64_t kNODE_INPUT = 1, kNODE_OUTPUT = 2, kNODE_OP_TYPE = 4, kNODE_METADATA = 9;

}  // namespace detail

// Makes outputs of the values that the exporter tagged as routers' scores, or of the sigmoids of those that it tagged as
// their logits: a graph that decides by these computes no scores.
//
// Two serialized messages one behind the other are one message, their repeated fields joined: so behind the graph's
// bytes goes a graph that has nothing but these outputs and sigmoids, and nothing of the graph itself is written anew.
//
// bytes: of model.onnx, which it was read from; InputError where they are no ONNX graph.
inline ExposedGraph exposeRouterScores(std::string bytes, std::string const& file) {
    using namespace detail;
    ExposedGraph exposed;
    std::string added;
    for (Fields model(bytes, file); model.next();) {
        if (model.number != kMODEL_GRAPH) continue;
        for (Fields graph(model.content, file); graph.next();) {
            if (graph.number != kGRAPH_NODE) continue;
            std::string_view output, role, layer;
            for (Fields node(graph.content, file); node.next();) {
                if (node.number == kNODE_OUTPUT && output.empty()) output = node.content;
                if (node.number != kNODE_METADATA) continue;
                std::string_view key, value;
                for (Fields entry(node.content, file); entry.next();) (entry.number == 1 ? key : value) = entry.content;
                if (key == "dlo.role") role = value;
                if (key == "dlo.layer") layer = value;
            }
            if (role != "router_scores" && role != "router_logits") continue;
            if (layer.empty() || layer.size() > 9 || layer.find_first_not_of("0123456789") != std::string_view::npos) {
                throw InputError(file + ": router '" + std::string(output) + "' does not say of which layer it is",
                    "copy the artefact again, or export the model again");
            }
            std::string scores(output);
            if (role == "router_logits") {
                scores = "router_scores." + std::string(layer);
                added += field(kGRAPH_NODE,
                    field(kNODE_INPUT, output) + field(kNODE_OUTPUT, scores) + field(kNODE_OP_TYPE, "Sigmoid"));
            }
            exposed.names[std::stoll(std::string(layer))] = scores;
            // ValueInfoProto: name, and TypeProto{tensor_type{elem_type: FLOAT}}; ONNX Runtime infers the shape.
            std::string const type = field(1, std::string_view("\x08\x01", 2));
            added += field(kGRAPH_OUTPUT, field(1, scores) + field(2, type));
        }
    }
    exposed.bytes = std::move(bytes) + field(kMODEL_GRAPH, added);
    return exposed;
}

}  // namespace dlo
