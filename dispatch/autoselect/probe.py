"""Measures what messages and bytes cost, inside nodes and between them, and what matrix products take.

    torchrun --nnodes 4 --nproc-per-node 8 ... -m turnout.dispatch.autoselect.probe --nodes 4 --save profile.json

Ranks are numbered node by node, as torchrun does it. Takes about a second, prints a table, and saves what
`parallelize(model, mesh, profile="profile.json")` chooses a transport and its number of chunks by.
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
    """A profile for people, in markdown."""
    lines = ["| links | exchange ms | message ms | MB/s of a rank |", "|---|---|---|---|"]
    for name, link in (("inside a node", profile.inside), ("between nodes", profile.between)):
        speed = f"{1e-6 / link.byte:.0f}" if link.byte else "-"
        lines.append(f"| {name} | {link.step * 1e3:.3f} | {link.message * 1e3:.3f} | {speed} |")
    rates = (f"{name} {1e-9 / cost:.0f} GFLOP/s" for name, cost in asdict(profile.flop).items() if cost)
    return "\n".join([*lines, "", f"products of a rank: {', '.join(rates)}"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--device", default="cpu", help="cpu (gloo) or cuda (nccl)")
    parser.add_argument("--save", help="write the profile to this file")
    args = parser.parse_args()
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    ranks = dist.get_world_size()
    if args.nodes < 1 or ranks % args.nodes:
        parser.error(f"{ranks} ranks are not {args.nodes} nodes of equal size: give another --nodes")
    profile = measure(
        init_device_mesh(args.device, (args.nodes, ranks // args.nodes), mesh_dim_names=("node", "local"))
    )
    if dist.get_rank() == 0:
        print(f"{profile.nodes} nodes of {profile.locals} ranks\n\n{table(profile)}", flush=True)
        if args.save:
            profile.save(args.save)
    dist.destroy_process_group()
    # The mesh lies in a cycle and holds groups, whose threads must end before the interpreter does: one that lets go
    # of a tensor later aborts the process ("terminate called without an active exception", torch 2.13).
    gc.collect()


if __name__ == "__main__":
    main()
