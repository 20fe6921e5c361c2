"""What a graph may hold: the dlo operators, stages and their invariants, where nodes come from."""
