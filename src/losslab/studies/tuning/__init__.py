"""The parts of `losslab.studies.tune`: the shared journal, who works on what, one trial, the result."""
