"""The story of the LSTM papers, runnable: gradients that vanish or explode with the lag, and problems with long lags.

`python -m bench.longterm` measures the first, trains on the second and writes the report.
"""
