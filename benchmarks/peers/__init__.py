"""Other trainers' data preparation, run and measured by benchmarks/who_trains_what.py."""
