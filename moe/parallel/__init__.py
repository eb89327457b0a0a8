"""Expert parallelism: experts spread over a mesh, gradient synchronisation, and checks. Start at `parallelize.py`."""
