"""The benchmark: pytunnel beside what people use instead. `python tests/bench --help` tells how to run it."""
