// Generates tokens: a prompt in steps, then one token per step.
#pragma once

#include <dlo/prompt_steps.h>
#include <dlo/sampling.h>
#include <dlo/sequence.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

namespace dlo {

struct GenerateOptions {
    size_t newTokens = 128;          // at most
    std::vector<int64_t> endTokens;  // any of them ends the sequence, and is its last token
    Sampling sampling;
    size_t prefillTokens = kPREFILL_TOKENS;  // the prompt is fed in steps of so many
};

// What a generation gave and took.
struct Generation {
    std::vector<int64_t> tokens;
    double prefillMilliseconds = 0;              // until the first token
    std::vector<double> stepMilliseconds;        // of every token after that

    // Of the tokens after the first; 0 where there are none.
    double tokensPerSecond() const {
        double total = 0;
        for (double milliseconds : stepMilliseconds) total += milliseconds;
        return total > 0 ? 1000 * static_cast<double>(stepMilliseconds.size()) / total : 0;
    }
};

// Continues a sequence, which may hold tokens already. The last token it chooses has not been fed: it begins what is
// fed next.
//
// onToken: called with every token as it is chosen; returns false to end.
inline Generation generate(Sequence& sequence, std::vector<int64_t> const& prompt, GenerateOptions const& options,
    std::function<bool(int64_t)> const& onToken = {}) {
    using Clock = std::chrono::steady_clock;
    Sampler sampler(options.sampling);
    Generation generation;
    for (size_t i = 0; i < options.newTokens; ++i) {
        auto const start = Clock::now();
        std::vector<float> const& logits
            = i == 0 ? sequence.prefill(prompt, options.prefillTokens) : sequence.step({generation.tokens.back()});
        int64_t const token = sampler(logits);
        double const milliseconds = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
        generation.tokens.push_back(token);
        if (i == 0) {
            generation.prefillMilliseconds = milliseconds;
        } else {
            generation.stepMilliseconds.push_back(milliseconds);
        }
        bool const goesOn = !onToken || onToken(token);
        auto const& ends = options.endTokens;
        if (!goesOn || std::find(ends.begin(), ends.end(), token) != ends.end()) break;
    }
    return generation;
}

}  // namespace dlo
