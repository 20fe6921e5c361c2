// Prints the steps of a prompt, "first:count" each: of so many tokens, for a model that takes so many at once.
#include <dlo/prompt_steps.h>

#include <algorithm>
#include <iostream>
#include <string>

int main(int, char** values) {
    size_t const tokens = std::stoul(values[1]), most = std::stoul(values[2]);
    dlo::feedInSteps(tokens, std::min(dlo::kPREFILL_TOKENS, most),
        [](size_t first, size_t count) { std::cout << first << ':' << count << ' '; });
}
