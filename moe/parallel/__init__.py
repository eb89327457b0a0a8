"""Expert parallelism: experts over the ranks of a mesh, their gradients, and checks. Start at `parallelize.py`."""
