"""Measure the costs of messages and bytes, inside nodes and between them, and of matrix products.

    torchrun --nnodes 4 --nproc-per-node 8 ... -m turnout.dispatch.autoselect.probe --nodes 4 --save profile.json

Ranks must be numbered node by node, as torchrun does. It takes about a second, prints a table, and saves a profile.
`parallelize(model, mesh, profile="profile.json")` then chooses a transport and a number of chunks by it.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .measure import measure
from .profile import Profile


def table(profile: Profile) -> str:
    """A profile as a markdown table."""
    lines = ["| links | exchange ms | message ms | MB/s of a rank |", "|---|---|---|---|"]
    for name, link in (("inside a node", profile.inside), ("between nodes", profile.between)):
        speed = f"{1e-6 / link.byte:.0f}" if link.byte else "-"
        lines.append(f"| {name} | {link.step * 1e3:.3f} | {link.message * 1e3:.3f} | {speed} |")
    rates = (f"{name} {1e-9 / cost:.0f} GFLOP/s" for name, cost in asdict(profile.flop).items() if cost)
    return "\n".join([*lines, "", f"products of a rank: {', '.join(rates)}"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes that the ranks divide into")
    parser.add_argument("--device", default="cpu", help="cpu (gloo), the default, or cuda (nccl)")
    parser.add_argument("--save", help="file that the profile is written to; without it, only the table is printed")
    args = parser.parse_args()
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    ranks = dist.get_world_size()
    if args.nodes < 1 or ranks % args.nodes:
        parser.error(f"{ranks} ranks do not divide into {args.nodes} equal nodes: --nodes must divide {ranks}")
    profile = measure(
        init_device_mesh(args.device, (args.nodes, ranks // args.nodes), mesh_dim_names=("node", "local"))
    )
    if dist.get_rank() == 0:
        print(f"{profile.nodes} nodes of {profile.locals} ranks\n\n{table(profile)}", flush=True)
        if args.save:
            profile.save(args.save)
    dist.destroy_process_group()
    # The mesh is in a reference cycle and holds groups, whose threads must end before the interpreter. A thread that
    # frees a tensor later aborts the process ("terminate called without an active exception", torch 2.13).
    gc.collect()


if __name__ == "__main__":
    main()
