"""Transport and number of chunks, chosen by measured costs. Start at `auto.py`; the command is `probe.py`."""
