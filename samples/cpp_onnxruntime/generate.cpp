// Generates tokens with an artefact of dlo-export, in ONNX Runtime.
//
//   generate artefact/ --tokens 1,450,7483 --steps 16
//
// Prints the new token ids on one line, comma-separated; speed and active rates go to stderr.
#include <dlo/runtime.h>

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr char const* kUSAGE
    = "usage: generate ARTEFACT --tokens 1,2,3 [--steps N] [--temperature T] [--top-k K] [--top-p P] [--seed S] "
      "[--threads N] [--prefill N] [--provider cpu|cuda] [--plugin-library FILE] [--no-end] [--no-scores] [--json]";

struct Arguments {
    std::string artefact;
    std::vector<int64_t> tokens;
    dlo::Options model;
    dlo::GenerateOptions generation;
    bool end = true;    // at the model's own end tokens
    bool json = false;  // one line of JSON in place of the ids
};

template <typename Number>
Number number(std::string const& text, std::string const& option) {
    Number value = 0;
    std::istringstream stream(text);
    bool const negative = text.find('-') != std::string::npos;
    if (!(stream >> value) || stream.peek() != std::istringstream::traits_type::eof() || negative) {
        throw dlo::InputError(option + " got '" + text + "', expected a number >= 0", "");
    }
    return value;
}

std::vector<int64_t> numbers(std::string const& text, std::string const& option) {
    std::vector<int64_t> values;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) values.push_back(number<int64_t>(part, option));
    return values;
}

Arguments parse(std::vector<std::string> const& given) {
    Arguments arguments;
    for (size_t i = 0; i < given.size(); ++i) {
        std::string const& name = given[i];
        if (name.rfind("--", 0) != 0) {
            if (!arguments.artefact.empty()) {
                throw dlo::InputError("one artefact at a time, got " + name + " too", kUSAGE);
            }
            arguments.artefact = name;
            continue;
        }
        if (name == "--no-end" || name == "--no-scores" || name == "--json") {
            arguments.end = arguments.end && name != "--no-end";
            arguments.model.routerScores = arguments.model.routerScores && name != "--no-scores";
            arguments.json = arguments.json || name == "--json";
            continue;
        }
        if (i + 1 == given.size()) throw dlo::InputError(name + " is unknown or lacks its value", kUSAGE);
        std::string const& value = given[++i];
        if (name == "--tokens") {
            arguments.tokens = numbers(value, name);
        } else if (name == "--steps") {
            arguments.generation.newTokens = number<size_t>(value, name);
        } else if (name == "--temperature") {
            arguments.generation.sampling.temperature = number<double>(value, name);
        } else if (name == "--top-k") {
            arguments.generation.sampling.topK = number<size_t>(value, name);
        } else if (name == "--top-p") {
            arguments.generation.sampling.topP = number<double>(value, name);
        } else if (name == "--seed") {
            arguments.generation.sampling.seed = number<uint64_t>(value, name);
        } else if (name == "--threads") {
            arguments.model.threads = number<int>(value, name);
        } else if (name == "--prefill") {
            arguments.generation.prefillTokens = number<size_t>(value, name);
        } else if (name == "--provider") {
            arguments.model.provider = value;
        } else if (name == "--plugin-library") {
            arguments.model.pluginLibrary = value;
        } else {
            throw dlo::InputError(name + " is unknown", kUSAGE);
        }
    }
    if (arguments.artefact.empty() || arguments.tokens.empty()) {
        throw dlo::InputError("an artefact and --tokens are needed", kUSAGE);
    }
    return arguments;
}

template <typename Values>
std::string joined(Values const& values) {
    std::ostringstream text;
    char const* comma = "";
    for (auto const& value : values) {
        text << comma << value;
        comma = ",";
    }
    return text.str();
}

void printJson(dlo::Generation const& generation, dlo::Sequence const& sequence) {
    std::vector<std::string> rates;
    for (auto const& [layer, activity] : sequence.activity()) {
        rates.push_back('"' + std::to_string(layer) + "\":" + std::to_string(activity.rate()));
    }
    std::cout << "{\"tokens\":[" << joined(generation.tokens) << "],\"prefill_ms\":" << generation.prefillMilliseconds
              << ",\"step_ms\":[" << joined(generation.stepMilliseconds) << "],\"active_rate\":{" << joined(rates)
              << "}}\n";
}

void report(dlo::Generation const& generation, dlo::Sequence const& sequence, size_t prompt) {
    std::fprintf(stderr, "%zu prompt tokens in %.2f s, %zu new ones at %.1f tokens/s\n", prompt,
        generation.prefillMilliseconds / 1000, generation.tokens.size(), generation.tokensPerSecond());
    for (auto const& [layer, activity] : sequence.activity()) {
        std::fprintf(stderr, "active, layer %lld: %.1f%%\n", static_cast<long long>(layer), 100 * activity.rate());
    }
}

// Nothing is begun that would end with the cache full; the last new token is never fed.
void checkRoom(dlo::Model const& model, Arguments const& arguments) {
    if (model.slots() == 0) return;
    size_t const prompt = arguments.tokens.size(), steps = arguments.generation.newTokens;
    auto const slots = static_cast<size_t>(model.slots());
    if (prompt > slots || (steps > 0 && steps - 1 > slots - prompt)) {
        std::string const less = prompt > slots ? "a shorter prompt" : "--steps " + std::to_string(slots - prompt + 1) + " or less";
        throw dlo::InputError(arguments.artefact + ": a prompt of " + std::to_string(prompt) + " tokens and "
                + std::to_string(steps) + " new ones, its static cache holds " + std::to_string(slots),
            "give " + less + ", or export with a larger --static-cache");
    }
}

// Nothing ends there but what the model was trained for.
void warnBeyondContext(dlo::Artefact const& artefact, Arguments const& arguments) {
    size_t const prompt = arguments.tokens.size(), steps = arguments.generation.newTokens;
    if (artefact.contextLength == 0 || prompt + steps <= static_cast<size_t>(artefact.contextLength)) return;
    std::fprintf(stderr,
        "warning: a prompt of %zu tokens and up to %zu new ones go beyond the model's context of %lld: what it says "
        "there is not to be trusted\n",
        prompt, steps, static_cast<long long>(artefact.contextLength));
}

void run(Arguments const& arguments) {
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "dlo");
    dlo::Model model(env, arguments.artefact, arguments.model);
    checkRoom(model, arguments);
    warnBeyondContext(model.artefact(), arguments);
    dlo::Sequence sequence(model);
    dlo::GenerateOptions options = arguments.generation;
    if (arguments.end) options.endTokens = model.artefact().endTokens;
    dlo::Generation const generation = dlo::generate(sequence, arguments.tokens, options);
    if (arguments.json) {
        printJson(generation, sequence);
    } else {
        std::cout << joined(generation.tokens) << '\n';
        report(generation, sequence, arguments.tokens.size());
    }
}

}  // namespace

int main(int count, char** values) {
    try {
        run(parse({values + 1, values + count}));
        return 0;
    } catch (dlo::InputError const& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 2;
    } catch (dlo::MachineError const& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 4;
    } catch (std::exception const& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
}
