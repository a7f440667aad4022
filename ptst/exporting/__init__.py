"""Models and adapters as files that other tools run: merged weights, shards, portable adapters, model cards."""
