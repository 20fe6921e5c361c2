"""`dlo::SkipDown`: adds scale · (gated·down) to the residual of the tokens that are not skipped."""
