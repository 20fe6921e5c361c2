// JSON as RFC 8259 has it, read strictly: what an artefact's small files need, and no more.
#pragma once

#include <dlo/error.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <locale>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace dlo {

// A value of a file together with its place in it, so that whoever asks for something else is told where.
class Json {
public:
    // Reads a file; InputError with line and column where it is no JSON.
    static Json fromFile(std::filesystem::path const& path);

    // Parses a text that came from `file`.
    static Json fromText(std::string_view text, std::string const& file);

    bool isNull() const { return mNode->kind == Kind::kNULL; }
    bool isList() const { return mNode->kind == Kind::kLIST; }

    // A member of an object; InputError where it is missing.
    Json operator[](std::string const& name) const {
        for (auto const& [key, value] : members()) {
            if (key == name) return value;
        }
        throw InputError(mFile + ": " + fieldOf(name) + " is missing", kREWRITE);
    }

    bool has(std::string const& name) const {
        for (auto const& member : members()) {
            if (member.first == name) return true;
        }
        return false;
    }

    std::vector<std::pair<std::string, Json>> members() const {
        std::vector<std::pair<std::string, Json>> found;
        for (auto const& [name, node] : expect(Kind::kOBJECT, "an object").members) {
            found.emplace_back(name, Json(node, mFile, fieldOf(name)));
        }
        return found;
    }

    std::vector<Json> items() const {
        std::vector<Json> found;
        auto const& nodes = expect(Kind::kLIST, "a list").items;
        for (size_t i = 0; i < nodes.size(); ++i) {
            found.push_back(Json(nodes[i], mFile, mField + "[" + std::to_string(i) + "]"));
        }
        return found;
    }

    std::string const& text() const { return expect(Kind::kTEXT, "text").text; }

    bool flag() const { return expect(Kind::kFLAG, "true or false").text == "true"; }

    double number() const {
        char const* expected = "a number of moderate size";
        std::istringstream digits(expect(Kind::kNUMBER, expected).text);
        digits.imbue(std::locale::classic());  // a decimal point, whatever the user's locale has
        double value = 0;
        if (!(digits >> value)) refuse(expected);
        return value;
    }

    // A whole number >= 0.
    int64_t count() const {
        char const* expected = "a whole number >= 0";
        std::string const& digits = expect(Kind::kNUMBER, expected).text;
        if (digits.find_first_not_of("0123456789") != std::string::npos || digits.size() > 18) refuse(expected);
        return std::strtoll(digits.c_str(), nullptr, 10);
    }

    // One of these texts.
    std::string const& oneOf(std::vector<std::string> const& choices) const {
        std::string expected;
        for (std::string const& choice : choices) expected += (expected.empty() ? "" : ", ") + choice;
        if (mNode->kind != Kind::kTEXT || std::find(choices.begin(), choices.end(), mNode->text) == choices.end()) {
            refuse("one of " + expected);
        }
        return mNode->text;
    }

    // Says that the value is not what it should be.
    [[noreturn]] void refuse(std::string const& expected) const {
        throw InputError(mFile + ": " + (mField.empty() ? "the file" : mField) + " is " + shown() + ", expected "
                             + expected,
            kREWRITE);
    }

private:
    enum class Kind { kNULL, kFLAG, kNUMBER, kTEXT, kLIST, kOBJECT };

    struct Node {
        Kind kind = Kind::kNULL;
        std::string text;  // of a text its characters, of a number or flag what the file has
        std::vector<std::shared_ptr<Node const>> items;
        std::vector<std::pair<std::string, std::shared_ptr<Node const>>> members;
    };

    class Parser;

    static constexpr char const* kREWRITE
        = "export the model again, or use the version of this header that belongs to it";

    Json(std::shared_ptr<Node const> node, std::string file, std::string field)
        : mNode(std::move(node)), mFile(std::move(file)), mField(std::move(field)) {}

    std::string fieldOf(std::string const& name) const {
        return mField.empty() ? detail::shortened(name) : mField + "." + detail::shortened(name);
    }

    Node const& expect(Kind kind, char const* expected) const {
        if (mNode->kind != kind) refuse(expected);
        return *mNode;
    }

    std::string shown() const {
        switch (mNode->kind) {
        case Kind::kNULL: return "null";
        case Kind::kTEXT: return '"' + detail::shortened(mNode->text) + '"';
        case Kind::kLIST: return "a list";
        case Kind::kOBJECT: return "an object";
        default: return detail::shortened(mNode->text);
        }
    }

    static constexpr uintmax_t kMOST_BYTES = uintmax_t{1} << 28;  // far above any description

    std::shared_ptr<Node const> mNode;
    std::string mFile;
    std::string mField;
};

class Json::Parser {
public:
    Parser(std::string_view text, std::string const& file) : mText(text), mFile(file) {}

    std::shared_ptr<Node const> document() {
        auto node = value(0);
        skipSpace();
        if (mAt != mText.size()) fail("something behind the end");
        return node;
    }

private:
    static constexpr int kDEEPEST = 64;  // a file that nests deeper is no file of ours, and must not exhaust the stack

    std::shared_ptr<Node const> value(int depth) {
        if (depth > kDEEPEST) fail("lists or objects nested too deep");
        skipSpace();
        auto node = std::make_shared<Node>();
        switch (peek()) {
        case '{': object(*node, depth); break;
        case '[': list(*node, depth); break;
        case '"':
            node->kind = Kind::kTEXT;
            node->text = string();
            break;
        case 't': word(*node, "true", Kind::kFLAG); break;
        case 'f': word(*node, "false", Kind::kFLAG); break;
        case 'n': word(*node, "null", Kind::kNULL); break;
        default: number(*node);
        }
        return node;
    }

    void object(Node& node, int depth) {
        node.kind = Kind::kOBJECT;
        take('{');
        skipSpace();
        if (taken('}')) return;
        do {
            skipSpace();
            std::string name = string();
            for (auto const& member : node.members) {
                if (member.first == name) fail("\"" + detail::shortened(name) + "\" a second time");
            }
            skipSpace();
            take(':');
            node.members.emplace_back(std::move(name), value(depth + 1));
            skipSpace();
        } while (taken(','));
        take('}');
    }

    void list(Node& node, int depth) {
        node.kind = Kind::kLIST;
        take('[');
        skipSpace();
        if (taken(']')) return;
        do {
            node.items.push_back(value(depth + 1));
            skipSpace();
        } while (taken(','));
        take(']');
    }

    void word(Node& node, std::string_view expected, Kind kind) {
        if (mText.substr(mAt, expected.size()) != expected) fail("no value");
        mAt += expected.size();
        node.kind = kind;
        node.text = expected;
    }

    void number(Node& node) {
        size_t const start = mAt;
        taken('-');
        if (!taken('0')) digits();
        if (taken('.')) digits();
        if (taken('e') || taken('E')) {
            if (!taken('+')) taken('-');
            digits();
        }
        node.kind = Kind::kNUMBER;
        node.text = mText.substr(start, mAt - start);
    }

    void digits() {
        if (!isDigit(peek())) fail("no value");
        while (isDigit(peek())) ++mAt;
    }

    std::string string() {
        take('"');
        std::string found;
        while (!taken('"')) {
            unsigned char const byte = static_cast<unsigned char>(peek());
            if (mAt == mText.size() || byte < 0x20) fail("a text that does not end");
            ++mAt;
            if (byte == '\\') {
                escape(found);
            } else {
                found += static_cast<char>(byte);
            }
        }
        return found;
    }

    void escape(std::string& found) {
        static constexpr std::string_view kNAMES = "\"\\/bfnrt", kBYTES = "\"\\/\b\f\n\r\t";
        if (taken('u')) {
            uint32_t code = fourDigits();
            if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
                take('\\');
                take('u');
                uint32_t const low = fourDigits();
                if (low < 0xDC00 || low > 0xDFFF) fail("half a character");
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            } else if (code >= 0xDC00 && code < 0xE000) {
                fail("half a character");
            }
            appendUtf8(found, code);
            return;
        }
        size_t const which = kNAMES.find(peek());
        if (mAt == mText.size() || which == std::string_view::npos) fail("an unknown escape");
        ++mAt;
        found += kBYTES[which];
    }

    uint32_t fourDigits() {
        uint32_t code = 0;
        for (int i = 0; i < 4; ++i) {
            char const digit = peek();
            uint32_t const value = isDigit(digit)       ? static_cast<uint32_t>(digit - '0')
                : digit >= 'a' && digit <= 'f'          ? static_cast<uint32_t>(digit - 'a' + 10)
                : digit >= 'A' && digit <= 'F'          ? static_cast<uint32_t>(digit - 'A' + 10)
                                                        : 16u;
            if (value == 16) fail("an unknown escape");
            code = code * 16 + value;
            ++mAt;
        }
        return code;
    }

    static void appendUtf8(std::string& found, uint32_t code) {
        if (code < 0x80) {
            found += static_cast<char>(code);
            return;
        }
        int const more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes behind the first
        static constexpr uint32_t kFIRST[] = {0xC0, 0xE0, 0xF0};
        found += static_cast<char>(kFIRST[more - 1] | code >> (6 * more));
        for (int i = more - 1; i >= 0; --i) found += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
    }

    static bool isDigit(char byte) { return byte >= '0' && byte <= '9'; }

    char peek() const { return mAt < mText.size() ? mText[mAt] : '\0'; }

    bool taken(char expected) {
        if (mAt == mText.size() || mText[mAt] != expected) return false;
        ++mAt;
        return true;
    }

    void take(char expected) {
        if (!taken(expected)) fail(std::string("no '") + expected + "'");
    }

    void skipSpace() {
        while (mAt < mText.size() && std::string_view(" \t\r\n").find(mText[mAt]) != std::string_view::npos) ++mAt;
    }

    [[noreturn]] void fail(std::string const& found) const {
        size_t line = 1, column = 1;
        for (size_t i = 0; i < mAt; ++i) {
            column = mText[i] == '\n' ? 1 : column + 1;
            line += mText[i] == '\n';
        }
        throw InputError(mFile + ": is no JSON: " + found + " in line " + std::to_string(line) + ", column "
                + std::to_string(column),
            "copy the artefact again, or export the model again");
    }

    std::string_view mText;
    std::string const& mFile;
    size_t mAt = 0;
};

inline Json Json::fromText(std::string_view text, std::string const& file) {
    return Json(Parser(text, file).document(), file, "");
}

inline Json Json::fromFile(std::filesystem::path const& path) {
    char const* hint = "give a folder that dlo-export wrote";
    // Devices and pipes have no size, and no end either.
    std::error_code error;
    uintmax_t const bytes = std::filesystem::file_size(path, error);
    if (error) throw InputError(path.string() + ": cannot be read: " + error.message(), hint);
    if (bytes > kMOST_BYTES) {
        throw InputError(path.string() + ": has " + std::to_string(bytes) + " bytes, expected at most "
                + std::to_string(kMOST_BYTES),
            hint);
    }
    std::string text(static_cast<size_t>(bytes), '\0');
    std::ifstream file(path, std::ios::binary);
    if (!file.read(text.data(), static_cast<std::streamsize>(bytes))) {
        throw InputError(path.string() + ": cannot be read", hint);
    }
    return fromText(text, path.string());
}

}  // namespace dlo
