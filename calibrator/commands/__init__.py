"""The commands, a module each: `add` its options to a parser, `run` it. Heavy imports wait until it runs."""
