"""The sarcasm experiment: an LSTM that tells The Onion's headlines from HuffPost's.

`python -m bench.sarcasm` trains and reports it, by `--cell` with other cells, `python -m bench.sarcasm.step_time`
times its training step, `python -m bench.sarcasm.gates` draws what its gates do over a headline.
"""
