// What an artefact's files say that a program must know to run it.
#pragma once

#include <dlo/error.h>
#include <dlo/json.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <system_error>
#include <vector>

namespace dlo {

// The form of dlo_artifact.json that this header reads.
inline constexpr int64_t kFORMAT_VERSION = 5;

// dlo_artifact.json (docs/artefact.md lists its fields), and the end tokens of generation_config.json.
struct Artefact {
    std::filesystem::path folder;
    std::string dtype;     // "fp32", "fp16" or "bf16": weights, KV cache and logits
    std::string provider;  // "cpu" or "cuda": what model.onnx was made for
    std::string lowering;  // "none", "masked", "compact", "if" or "plugin"
    std::vector<std::string> pluginOperators;
    bool growingCache = true;  // every step's is longer; false: of a fixed number of slots, written in place
    std::string routingKind;                     // "mlp", "layer", …; empty where nothing is routed
    std::map<int64_t, double> routerThresholds;  // of every routed layer: the score an active token exceeds
    std::vector<bool> injected;                  // by layer
    std::vector<int64_t> endTokens;              // any of them ends a sequence; empty where nothing says
    int64_t contextLength = 0;                   // tokens that the model was trained for; 0 where nothing says

    std::filesystem::path model() const { return folder / "model.onnx"; }

    // Reads an artefact and compares the sizes of its graph and weights with those it was written with.
    //
    // InputError: the folder is no artefact or of another format, a field is missing or wrong, a file not as described.
    static Artefact open(std::filesystem::path const& folder);
};

namespace detail {

inline constexpr size_t kLONGEST_NAME = 255;

// What is not as `files` says: a copy cut short is found here, before ONNX Runtime maps it.
inline void checkFiles(Json const& files, std::filesystem::path const& folder) {
    bool hasGraph = false, hasWeights = false;
    for (Json const& file : files.items()) {
        std::filesystem::path const name = file["name"].text();
        bool const climbs = std::find(name.begin(), name.end(), "..") != name.end();
        if (name.empty() || !name.is_relative() || climbs || name.native().size() > kLONGEST_NAME) {
            file["name"].refuse("a file inside the artefact");
        }
        if (*name.begin() == "engines") continue;
        (name == "model.onnx" ? hasGraph : hasWeights) = true;
        std::error_code error;
        auto const size = std::filesystem::file_size(folder / name, error);
        int64_t const expected = file["bytes"].count();
        char const* hint = "copy the artefact again, or export the model again";
        if (error) throw InputError((folder / name).string() + ": cannot be read: " + error.message(), hint);
        if (size != static_cast<uintmax_t>(expected)) {
            throw InputError((folder / name).string() + ": was changed: it has " + std::to_string(size)
                    + " bytes, expected " + std::to_string(expected),
                hint);
        }
    }
    if (!hasGraph) files.refuse("one that names model.onnx");
    if (!hasWeights) {
        throw InputError(folder.string() + ": has no weights, model.onnx.data was left out",
            "export the model again, without --no-weights");
    }
}

// A file beside the description, which the user may edit or remove; an empty object where there is none.
inline Json settings(std::filesystem::path const& file) {
    std::error_code error;
    bool const isMissing = !std::filesystem::exists(file, error) && !error;
    return isMissing ? Json::fromText("{}", file.string()) : Json::fromFile(file);
}

// As transformers has it: generation_config.json's tokens overrule config.json's; null and -1 say nothing.
inline std::vector<int64_t> endTokensOf(Json const& generation, Json const& config) {
    for (Json const& file : {generation, config}) {
        if (!file.has("eos_token_id") || file["eos_token_id"].isNull()) continue;
        Json const value = file["eos_token_id"];
        if (!value.isList()) {
            if (value.number() == -1) continue;
            return {value.count()};
        }
        std::vector<int64_t> tokens;
        for (Json const& token : value.items()) tokens.push_back(token.count());
        return tokens;
    }
    return {};
}

}  // namespace detail

inline Artefact Artefact::open(std::filesystem::path const& folder) {
    Json const description = Json::fromFile(folder / "dlo_artifact.json");
    if (description["format_version"].count() != kFORMAT_VERSION) {
        description["format_version"].refuse(std::to_string(kFORMAT_VERSION));
    }
    detail::checkFiles(description["files"], folder);
    Artefact artefact;
    artefact.folder = folder;
    artefact.dtype = description["dtype"].oneOf({"fp32", "fp16", "bf16"});
    artefact.provider = description["provider"].oneOf({"cpu", "cuda"});
    artefact.lowering = description["lowering"].text();
    for (Json const& name : description["plugin_operators"].items()) artefact.pluginOperators.push_back(name.text());
    for (Json const& input : description["interface"]["inputs"].items()) {
        if (input["name"].text() == "kv_lengths") artefact.growingCache = false;
    }
    for (Json const& layer : description["layers"].items()) artefact.injected.push_back(layer["injected"].flag());
    if (Json const routing = description["routing"]; !routing.isNull()) {
        artefact.routingKind = routing["kind"].text();
        for (Json const& layer : routing["layers"].items()) artefact.routerThresholds[layer.count()] = 0.5;
        for (auto const& [layer, threshold] : routing["router_thresholds"].members()) {
            bool const isNumber = !layer.empty() && layer.find_first_not_of("0123456789") == std::string::npos;
            auto const found = isNumber && layer.size() < 10 ? artefact.routerThresholds.find(std::stoll(layer))
                                                             : artefact.routerThresholds.end();
            if (found == artefact.routerThresholds.end()) {
                threshold.refuse("no entry: that layer is not routed");
            }
            found->second = threshold.number();
            if (!(found->second > 0 && found->second < 1)) threshold.refuse("a score above 0 and below 1");
        }
    }
    Json const config = detail::settings(folder / "config.json");
    artefact.endTokens = detail::endTokensOf(detail::settings(folder / "generation_config.json"), config);
    if (config.has("max_position_embeddings")) artefact.contextLength = config["max_position_embeddings"].count();
    return artefact;
}

}  // namespace dlo
