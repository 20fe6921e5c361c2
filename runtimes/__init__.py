"""Run artefacts: runners behind one protocol, generation, parity."""
