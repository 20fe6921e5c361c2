// Checks what a program may rely on in dlo::runtime beyond the sample's use of it; says what fails.
#include <dlo/runtime.h>

#include <cmath>
#include <cstdint>
#include <iostream>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace {

int failures = 0;

void check(bool holds, std::string const& what) {
    if (holds) return;
    std::cout << what << '\n';
    ++failures;
}

std::vector<int64_t> generated(dlo::Model& model, std::vector<int64_t> const& prompt) {
    dlo::Sequence sequence(model);
    dlo::GenerateOptions options;
    options.newTokens = 40;
    return dlo::generate(sequence, prompt, options).tokens;
}

void threadsShareAModel(dlo::Model& model) {
    std::vector<std::vector<int64_t>> const prompts{{5, 6, 7}, {8, 9}, {30, 31, 32, 33, 34}};
    std::vector<std::vector<int64_t>> together(prompts.size());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < prompts.size(); ++i) {
        threads.emplace_back([&, i] { together[i] = generated(model, prompts[i]); });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t i = 0; i < prompts.size(); ++i) {
        check(together[i] == generated(model, prompts[i]), "threads: sequence " + std::to_string(i) + " differs");
    }
}

void sequenceGoesOnAndStartsOver(dlo::Model& model) {
    std::vector<int64_t> const tokens{5, 9, 14, 3, 27, 31, 8, 44};
    dlo::Sequence whole(model), parts(model);
    std::vector<float> const expected = whole.step(tokens);
    for (int round = 0; round < 2; ++round) {
        parts.reset();
        int64_t active = 0;
        for (int64_t token : tokens) {
            parts.step({token});
            active += parts.lastActivity().begin()->second.active;
        }
        check(parts.size() == 8, "sequence: size");
        check(active == parts.activity().begin()->second.active, "activity: steps and sum differ");
        check(parts.activity().begin()->second.active == whole.activity().begin()->second.active, "activity: differs");
        float error = 0;
        std::vector<float> const& logits = parts.prefill({tokens[0]}), again = whole.step({tokens[0]});
        for (size_t i = 0; i < logits.size(); ++i) error = std::max(error, std::abs(logits[i] - again[i]));
        check(expected.size() == logits.size() && error < 1e-4f, "sequence: logits differ by " + std::to_string(error));
        whole.reset();
        whole.step(tokens);
    }
}

void stepRefusesWhatTheModelHasNot(dlo::Model& model) {
    dlo::Sequence sequence(model);
    sequence.step({5});
    for (std::vector<int64_t> const& bad : {std::vector<int64_t>{}, {5, -1}, {model.vocabulary()}}) {
        try {
            sequence.step(bad);
            check(false, "step: takes no tokens, or one that is none");
        } catch (dlo::InputError const&) {
        }
    }
    check(sequence.size() == 1, "step: keeps what it refused");
    check(model.artefact().contextLength > 0, "artefact: no context length");
}

void bufferIsFreedOnceWhenMemoryRunsOut() {
    struct Counting : OrtAllocator {
        int held = 0;
    };
    Counting allocator{};
    allocator.Alloc = [](OrtAllocator* self, size_t bytes) -> void* {
        if (bytes > 100) throw std::bad_alloc();
        ++static_cast<Counting*>(self)->held;
        return ::operator new(bytes);
    };
    allocator.Free = [](OrtAllocator* self, void* data) {
        --static_cast<Counting*>(self)->held;
        ::operator delete(data);
    };
    {
        dlo::detail::Buffer buffer(&allocator);
        buffer.reserve(10);
        try {
            buffer.reserve(1000);
            check(false, "buffer: has memory that is not there");
        } catch (dlo::MachineError const&) {
        }
    }
    check(allocator.held == 0, "buffer: was freed " + std::to_string(1 - allocator.held) + " times");
}

void generationEndsWhenToldTo(dlo::Model& model) {
    dlo::Sequence sequence(model);
    int64_t seen = 0;
    auto const generation = dlo::generate(sequence, {5, 6, 7}, {}, [&](int64_t) { return ++seen < 3; });
    check(generation.tokens.size() == 3 && sequence.size() == 5, "generate: does not end when told to");
}

void samplerDrawsByProbability() {
    dlo::Sampler sampler({1.0, 2, 1.0, 7});
    std::vector<float> const logits{0.0f, std::log(3.0f), -1.0f, 0.0f};  // the two likeliest: 1 by 3/4, 0 by 1/4
    std::vector<int> drawn(4);
    for (int i = 0; i < 4000; ++i) ++drawn[static_cast<size_t>(sampler(logits))];
    check(drawn[2] == 0 && drawn[3] == 0, "sampler: draws what is not kept");
    check(std::abs(drawn[1] - 3000) < 150, "sampler: drew 1 " + std::to_string(drawn[1]) + " times of 4000");
    for (std::vector<float> const& bad : {std::vector{1.0f, NAN}, std::vector{INFINITY, 0.0f}, std::vector<float>{}}) {
        try {
            sampler(bad);
            check(false, "sampler: takes logits that are no numbers");
        } catch (dlo::Error const&) {
        }
    }
}

void jsonIsReadAsItIsWritten() {
    dlo::Json const json
        = dlo::Json::fromText(R"( {"a": [1.5e1, -2, "\u00e9\ud83c\udf89\n\"x", true, null], "b": {}} )", "text");
    auto const items = json["a"].items();
    check(items[0].number() == 15 && items[1].number() == -2, "json: numbers");
    check(items[2].text() == "é🎉\n\"x", "json: text is " + items[2].text());
    check(items[3].flag() && items[4].isNull() && json["b"].members().empty(), "json: words");
    for (char const* bad :
        {"", "{", "[1", "01", "1.", "+1", "[1,]", "{\"a\" 1}", "\"\\x\"", "\"\n\"", "tru", "1 2", "'a'"}) {
        try {
            dlo::Json::fromText(bad, "text");
            check(false, std::string("json: takes ") + bad);
        } catch (dlo::InputError const&) {
        }
    }
}

// Allocations are planned by shape where steps repeat theirs, and nowhere else: ONNX Runtime logs a session's options.
void patternsAreKept(char const* folder, bool expected) {
    std::string log;
    auto const append = [](void* to, OrtLoggingLevel, char const*, char const*, char const*, char const* message) {
        *static_cast<std::string*>(to) += message;
    };
    Ort::Env env(ORT_LOGGING_LEVEL_INFO, "options", append, &log);
    dlo::Model model(env, folder);
    std::string const option = "enable_mem_pattern:" + std::to_string(expected);
    check(log.find(option) != std::string::npos, std::string(folder) + ": is not run with " + option);
    check((model.slots() > 0) == expected, std::string(folder) + ": has another cache than its description says");
}

void stepRefusesWhatTheCacheDoesNotHold(char const* folder) {
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "full");
    dlo::Model model(env, folder);
    dlo::Sequence sequence(model);
    std::vector<int64_t> const full(static_cast<size_t>(model.slots()), 5);
    std::vector<float> const logits = sequence.prefill(full, 7);
    std::string const option = "--static-cache " + std::to_string(model.slots() + 1) + " or more";
    for (int attempt = 0; attempt < 2; ++attempt) {
        try {
            sequence.step({5});
            check(false, "static cache: takes a token more than it holds");
        } catch (dlo::InputError const& error) {
            check(std::string(error.what()).find(option) != std::string::npos, error.what());
        }
        check(sequence.size() == model.slots(), "static cache: a step that was refused counts");
    }
    sequence.reset();
    check(sequence.prefill(full, 7) == logits, "static cache: starts over with what it held");
}

}  // namespace

// checks GROWING_ARTEFACT STATIC_ARTEFACT
int main(int, char** values) {
    patternsAreKept(values[1], false);
    patternsAreKept(values[2], true);
    stepRefusesWhatTheCacheDoesNotHold(values[2]);
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "checks");
    dlo::Options options;
    options.threads = 1;
    dlo::Model model(env, values[1], options);
    threadsShareAModel(model);
    sequenceGoesOnAndStartsOver(model);
    stepRefusesWhatTheModelHasNot(model);
    bufferIsFreedOnceWhenMemoryRunsOut();
    generationEndsWhenToldTo(model);
    samplerDrawsByProbability();
    jsonIsReadAsItIsWritten();
    return failures == 0 ? 0 : 1;
}
