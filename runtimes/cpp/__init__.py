"""Header-only C++17 runtime of artefacts on ONNX Runtime; the CMake target `dlo::runtime` (docs/cpp.md)."""
