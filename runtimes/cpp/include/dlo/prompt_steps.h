// In which steps a prompt is fed: the rule of runtimes/generation/generate.py, for whatever runs them.
#pragma once

#include <algorithm>
#include <cstddef>

namespace dlo {

// Tokens of a step unless less fits or is asked for: all at once, scores and mask grow with the square of the prompt.
inline constexpr std::size_t kPREFILL_TOKENS = 256;

// Calls step(first, count) for the tokens from `first` on, until all are fed.
//
// tokens: of the prompt.
// stepTokens: of a step, at least 1.
template <typename Step>
void feedInSteps(std::size_t tokens, std::size_t stepTokens, Step step) {
    for (std::size_t first = 0; first < tokens; first += stepTokens) step(first, std::min(stepTokens, tokens - first));
}

}  // namespace dlo
