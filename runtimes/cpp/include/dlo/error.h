// What can go wrong, in classes that say whose matter it is.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace dlo {

// Base of all errors: what() is the message and, behind an empty line, a hint.
class Error : public std::runtime_error {
public:
    Error(std::string const& message, std::string const& hint)
        : std::runtime_error(hint.empty() ? message : message + "\n\nhint: " + hint) {}
};

// An artefact is missing, damaged or used in a way it is not made for; an argument is wrong.
class InputError : public Error {
public:
    using Error::Error;
};

// This machine lacks something: a provider, a plugin library, a newer ONNX Runtime.
class MachineError : public Error {
public:
    using Error::Error;
};

namespace detail {

// Of a text from a file, as much as a message has room for.
inline std::string shortened(std::string const& text) {
    constexpr size_t kSHOWN = 60;
    return text.size() > kSHOWN ? text.substr(0, kSHOWN) + "…" : text;
}

}  // namespace detail

}  // namespace dlo
