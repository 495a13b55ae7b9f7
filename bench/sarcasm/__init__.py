"""The sarcasm experiment: an LSTM that tells The Onion's headlines from HuffPost's.

`python -m bench.sarcasm` trains and reports it, `python -m bench.sarcasm.step_time` times its training step.
"""
