"""Speed and memory, measured: `python -m forgetless.bench NAME`. One benchmark, one file; what they share is in measure.py and results.py."""
