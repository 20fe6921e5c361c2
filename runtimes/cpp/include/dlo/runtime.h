// Runs artefacts of dlo-export in ONNX Runtime: docs/cpp.md has a whole program.
#pragma once

#include <dlo/artefact.h>
#include <dlo/error.h>
#include <dlo/generate.h>
#include <dlo/model.h>
#include <dlo/sampling.h>
#include <dlo/sequence.h>
