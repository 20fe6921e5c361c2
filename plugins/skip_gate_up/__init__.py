"""`dlo::SkipGateUp`: silu(x·gate) * (x·up) of the tokens that are not skipped."""
