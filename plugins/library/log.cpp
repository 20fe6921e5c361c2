#include "log.h"

#include <atomic>
#include <iostream>

namespace dlo {

namespace {
std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};
}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { gFinder = finder; }

void logError(std::string const& message) noexcept {
    nvinfer1::ILoggerFinder* const finder = gFinder;
    nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    } else {
        std::cerr << "dlo plugins: " << message << std::endl;
    }
}

}  // namespace dlo
