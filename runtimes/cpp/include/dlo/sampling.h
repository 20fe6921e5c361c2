// Chooses the next token from logits: greedy, or by temperature, top-k and top-p.
#pragma once

#include <dlo/error.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace dlo {

// How tokens are chosen; greedy by default. The fields mean what they do in `dlo run`; the random numbers are others.
struct Sampling {
    double temperature = 0;  // logits are divided by it; 0 for greedy
    size_t topK = 0;         // keep only so many most likely tokens; 0 for all
    double topP = 1;         // of those, keep the most likely ones whose probabilities sum to at least this
    uint64_t seed = 0;       // the same seed, model and prompt give the same tokens
};

class Sampler {
public:
    // InputError: a value is out of range.
    explicit Sampler(Sampling const& sampling) : mSampling(sampling), mRandom(sampling.seed) {
        if (!(std::isfinite(sampling.temperature) && sampling.temperature >= 0)) {
            throw InputError("temperature is " + std::to_string(sampling.temperature) + ", expected a number >= 0", "");
        }
        if (!(sampling.topP > 0 && sampling.topP <= 1)) {
            throw InputError("top-p is " + std::to_string(sampling.topP) + ", expected 0 < top-p <= 1", "");
        }
    }

    // Chooses from logits [vocab]; Error where the largest is no finite number.
    int64_t operator()(std::vector<float> const& logits) {
        // NaN compares false with everything, so that it is looked for by itself.
        bool const isNan = std::any_of(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); });
        auto const largest = std::max_element(logits.begin(), logits.end());
        if (isNan || largest == logits.end() || !std::isfinite(*largest)) {
            throw Error("the model's logits are no finite numbers",
                "a weight is damaged, or fp16 too narrow for the model: export it again, with --dtype fp32");
        }
        return mSampling.temperature == 0 ? largest - logits.begin() : draw(logits);
    }

private:
    int64_t draw(std::vector<float> const& logits) {
        std::vector<int64_t> tokens(logits.size());
        std::iota(tokens.begin(), tokens.end(), int64_t{0});
        auto const at = [&](int64_t token) { return logits[static_cast<size_t>(token)]; };
        auto const likelier = [&](int64_t a, int64_t b) { return at(a) != at(b) ? at(a) > at(b) : a < b; };
        size_t const kept = mSampling.topK == 0 ? tokens.size() : std::min(mSampling.topK, tokens.size());
        std::partial_sort(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(kept), tokens.end(), likelier);
        // Shifted first: a tiny temperature would turn the quotient of a positive logit into infinity.
        std::vector<double> weights(kept);
        std::transform(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(kept), weights.begin(),
            [&](int64_t token) {
                return std::exp((double{at(token)} - double{at(tokens[0])}) / mSampling.temperature);
            });
        double const enough = std::accumulate(weights.begin(), weights.end(), 0.0) * mSampling.topP;
        double before = 0;
        for (size_t i = 0; i < kept; ++i) {
            if (before >= enough) weights[i] = 0;
            before += weights[i];
        }
        std::discrete_distribution<size_t> distribution(weights.begin(), weights.end());
        return tokens[distribution(mRandom)];
    }

    Sampling mSampling;
    std::mt19937_64 mRandom;
};

}  // namespace dlo
