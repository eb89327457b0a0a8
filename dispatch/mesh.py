"""The axes of a DeviceMesh, told by name.

"ep": the ranks that share the experts; it may be given as "node" and "local". "edp": the ranks that repeat
them. "etp": the ranks that hold slices of the same experts. Along all of these, ranks have tokens of their own.
`Meshes` adds the axes of the dense part, over the same ranks: "dp" has parts of the batch, "tp" parts of each sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .torch_internals import Backend

EP, EDP, ETP, NODE, LOCAL = "ep", "edp", "etp", "node", "local"
PP, DP, TP = "pp", "dp", "tp"


@dataclass(frozen=True)
class Meshes:
    """The ranks of a job in two orders: a dense mesh, and one for experts whose axes are folded over dp and tp.

    Attributes:
        dense: axes "pp", "dp", "tp".
        experts: axes "pp", "edp", "ep" (or "node" and "local" in its place), "etp"; edp * ep * etp = dp * tp.
        tokens: "dp_tp", one axis: the ranks of a pipeline stage, each of which has tokens of its own.
        timeout: of the groups of all three; None: that of the default group.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    tokens: DeviceMesh
    timeout: timedelta | None = None

    @classmethod
    def of(
        cls,
        device_type: str,
        *,
        pp: int = 1,
        tp: int = 1,
        ep: int = 1,
        etp: int = 1,
        ranks_per_node: int | None = None,
        timeout: timedelta | float | None = None,
    ) -> Meshes:
        """Meshes over all ranks of the default group; every rank must call it. dp and edp are what remains.

        Ranks next to each other lie along tp, then dp, then pp, as in PTD-P (arXiv:2104.04473, section 3.2):
        tensor parallelism, which talks most, stays in a node. Both meshes are views of one, so that DTensors
        on either can be combined (FSDP2 over "edp" of a parameter split over "ep").

        Args:
            device_type: "cuda" or "cpu".
            pp, tp: pipeline stages; ranks that split a layer and its sequences.
            ep: ranks that share the experts of a layer; may span dp and tp.
            etp: ranks that split each expert.
            ranks_per_node: torchrun's LOCAL_WORLD_SIZE. Where ep spans several whole nodes of several ranks, its
                axis is given as "node" and "local"; None: never.
            timeout: how long an operation of any of the meshes' groups may last, sends and receives included; in
                seconds, or a timedelta. None: as long as `init_process_group` was told.

        Raises:
            ValueError: sizes that do not multiply to the number of ranks, naming them; a timeout that is not positive.
        """
        limit = seconds(timeout)
        ranks = dist.get_world_size()
        for name, size in {"pp": pp, "tp": tp, "ep": ep, "etp": etp}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        if ranks % (pp * tp):
            raise ValueError(
                f"pp={pp} x tp={tp} = {pp * tp} does not divide the {ranks} ranks; start a multiple of {pp * tp} ranks"
            )
        stage = ranks // pp
        if stage % (ep * etp):
            raise ValueError(
                f"ep={ep} x etp={etp} = {ep * etp} does not divide the dp={stage // tp} x tp={tp} = {stage} ranks of a "
                f"pipeline stage ({ranks} ranks, pp={pp}); choose a divisor of {stage}"
            )
        spread = {EP: ep}
        if ranks_per_node is not None and (nodes := _whole_nodes(ep, etp, ranks_per_node)):
            spread = {NODE: nodes, LOCAL: ep // nodes}
        world = init_device_mesh(device_type, (ranks,), mesh_dim_names=("world",))
        dense = _fold(world, {PP: pp, DP: stage // tp, TP: tp}, limit)
        experts = _fold(world, {PP: pp, EDP: stage // (ep * etp), **spread, ETP: etp}, limit)
        tokens = f"{DP}_{TP}"
        flat = dense[DP, TP]._flatten(tokens, _options({tokens: stage}, limit).get(tokens))
        return cls(dense, experts, flat, limit)

    def __deepcopy__(self, memo: dict) -> Meshes:
        return self  # immutable, and of process groups


def _whole_nodes(ep: int, etp: int, ranks_per_node: int) -> int:
    """Nodes that the ranks of "ep" fill, 0 unless they fill several whole ones with several ranks of theirs on each."""
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node must be positive; got {ranks_per_node}")
    nodes, rest = divmod(ep * etp, ranks_per_node)
    local = ranks_per_node // etp
    return nodes if rest == 0 and nodes > 1 and ranks_per_node % etp == 0 and local > 1 else 0


def _fold(world: DeviceMesh, sizes: dict[str, int], limit: timedelta | None) -> DeviceMesh:
    assert math.prod(sizes.values()) == world.size()
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes), _options(sizes, limit) or None)


def _options(sizes: dict[str, int], limit: timedelta | None) -> dict[str, Any]:
    """For each axis, the options with which torch makes its groups; without, they have a timeout of torch's own.

    A send or a receive on gloo waits as long as its group was told when it was made, whatever `set_timeout` says later.
    An axis of all ranks is left out where the default group, which torch takes for it, has the right timeout.
    """
    default = default_timeout()
    limit = default if limit is None else limit
    if limit is None:
        return {}
    made = {}
    for name, size in sizes.items():
        if size < dist.get_world_size() or limit != default:
            nccl = dist.is_nccl_available() and "nccl" in dist.get_backend_config()
            made[name] = dist.ProcessGroupNCCL.Options() if nccl else Backend.Options("gloo", limit)
            made[name]._timeout = limit
    return made


def seconds(timeout: timedelta | float | None) -> timedelta | None:
    """A timeout given in seconds, as a timedelta.

    Raises:
        ValueError: one that is not positive.
        TypeError: no number and no timedelta.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, timedelta | int | float):
        raise TypeError(f"timeout must be a number of seconds, a timedelta or None; got {timeout!r}")
    limit = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    if limit <= timedelta(0):
        raise ValueError(f"timeout must be positive; got {timeout!r}")
    return limit


def default_timeout() -> timedelta | None:
    """How long `init_process_group` was told to wait; None for a backend that does not say."""
    everyone = dist.distributed_c10d._get_default_group()
    for device in everyone._device_types:
        options = getattr(everyone._get_backend(device), "options", None)
        if (timeout := getattr(options, "_timeout", None)) is not None:
            return timeout
    return None


def set_timeout(mesh: DeviceMesh | Meshes, timeout: timedelta | float | None = None) -> None:
    """Give every group that an MoE layer on these meshes uses a timeout, for its collectives from now on.

    torch gives groups of a mesh 30 minutes (10 on NCCL), whatever `init_process_group` was told. An axis of all ranks
    has the default group, whose timeout changes as well. On gloo sends and receives keep the timeout with which their
    group was made: `Meshes.of` takes it.

    Args:
        mesh: as given to `parallelize`.
        timeout: seconds, or a timedelta. None: as long as `Meshes.of` or else `init_process_group` was told.
    """
    limit = seconds(timeout) or (mesh.timeout if isinstance(mesh, Meshes) else None) or default_timeout()
    if limit is None:
        return
    parts = [mesh.dense, mesh.experts] if isinstance(mesh, Meshes) else [mesh]
    groups = {part.get_group(name) for part in parts for name in names(part)}
    groups |= {token_group(mesh), data_group(mesh), sequence_group(mesh)}
    ep = axis(of_experts(mesh), EP)
    groups |= {None if ep is None else ep.get_group()}
    for group in groups - {None}:
        assert group is not None
        group.set_timeout(limit)


def names(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a mesh's axes."""
    return mesh.mesh_dim_names or ()


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """The sub-mesh of one axis, None if there is none; "ep" is made of "node" and "local" where it is so given."""
    if name in names(mesh):
        return mesh[name]
    if name == EP and {NODE, LOCAL} <= set(names(mesh)):
        return mesh[NODE, LOCAL]._flatten(EP)
    return None


def holders(mesh: DeviceMesh) -> DeviceMesh:
    """The axes over which one copy of the experts lies: "ep", and "etp" where there is more than one slice."""
    etp = axis(mesh, ETP)
    if etp is None or etp.size() == 1:
        ep = axis(mesh, EP)
        assert ep is not None
        return ep
    return mesh[tuple(name for name in names(mesh) if name in (EP, NODE, LOCAL, ETP))]


def node_and_local(mesh: DeviceMesh) -> tuple[ProcessGroup, ProcessGroup]:
    """The groups of the axes "node" and "local", which stand in place of "ep".

    Ranks of a group are sorted, whatever their order in a mesh (torch 2.13). So a mesh must list them in
    ascending order, or a rank's place on the two axes would not tell its place on both together.
    """
    given = tuple(name for name in names(mesh) if name in (NODE, LOCAL, EP))
    if given != (NODE, LOCAL):
        raise ValueError(
            f'a hierarchical exchange needs a mesh with axes "node" and "local" in place of "ep"; got {names(mesh)}'
        )
    ranks = mesh.mesh.movedim([names(mesh).index(NODE), names(mesh).index(LOCAL)], [-2, -1]).flatten(-2)
    if bool((ranks.diff() < 0).any()):
        raise ValueError(
            f"ranks must ascend along node and local; got {mesh.mesh.tolist()}; init_device_mesh makes it so"
        )
    return mesh.get_group(NODE), mesh.get_group(LOCAL)


def staged(mesh: DeviceMesh | Meshes) -> bool:
    """Whether ranks along "pp" have other layers, also where `mesh` is a part of a mesh with that axis."""
    own = of_experts(mesh)
    stages = [axis(whole, PP) for whole in (own, own._get_root_mesh())]
    return any(pp is not None and pp.size() > 1 for pp in stages)


def of_experts(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    """The mesh with the axes of the experts."""
    return mesh.experts if isinstance(mesh, Meshes) else mesh


def token_mesh(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    """The axes along which ranks have tokens of their own; those along "pp" have other layers."""
    if isinstance(mesh, Meshes):
        return mesh.tokens
    axes = tuple(name for name in names(mesh) if name in (EDP, EP, NODE, LOCAL, ETP))
    if not axes:
        raise ValueError(f'the mesh needs axes named "ep" (or "node" and "local") and/or "edp"; got {names(mesh)}')
    others = [name for name in names(mesh) if name not in (*axes, PP) and mesh[name].size() > 1]
    if others:
        raise ValueError(
            f"the mesh has axes {names(mesh)}, and nothing would be exchanged along {', '.join(others)}: name the axis "
            'of data parallelism "edp"; with tensor parallelism pass Meshes.of(...)'
        )
    if ETP in axes and not {EP, NODE} & set(axes):
        raise ValueError(
            f'"etp" splits what "ep" spreads: give the mesh an axis "ep", too (of size 1); got {names(mesh)}'
        )
    return mesh[axes]


def token_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """All ranks that have tokens of their own; None if that is this one alone."""
    return _group(token_mesh(mesh))


def data_mesh(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    """The axes along which ranks have parts of the batch: the loss is averaged over them."""
    return mesh.dense[DP] if isinstance(mesh, Meshes) else token_mesh(mesh)


def data_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """The ranks that have parts of the batch, with this rank's part of each sequence; None if that is this one."""
    return _group(data_mesh(mesh))


def sequence_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """The ranks that have parts of the same sequences; None if that is this one alone."""
    return _group(mesh.dense[TP]) if isinstance(mesh, Meshes) else None


def _group(mesh: DeviceMesh) -> ProcessGroup | None:
    if mesh.size() == 1:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten("_".join(names(mesh))).get_group()
