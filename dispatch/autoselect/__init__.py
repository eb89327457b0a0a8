"""Choice of a transport and a number of chunks by measured costs. Start at `auto.py`; `probe.py` is the command."""
